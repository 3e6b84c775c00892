"""A reader of .qpack files, written from formats/spec/qpack.md alone, with nothing but Python.

    qpack.py FILE...                          each tensor's name, kind, and the SHA-256 of its values in F32
    qpack.py fixtures/qpack/example.txt       the same of a file as text
    qpack.py --qconv QCONV MODEL              packs a model in every encoding, and reads the values that qconv reads

Everything that the specification has a reader check is checked; what does not hold ends it with the reason.
"""

import contextlib
import hashlib
import io
import json
import struct
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

MAGIC = b"\x89qpack\r\n"
# What the example's numbers are, worked out by hand.
EXAMPLE = {
    "norm": [1.0, 2.0, 3.0],
    "q": [-4.0, -3.0, -2.0, -1.0, -2.0, 0.0, -0.5, -1.0, -1.5, -2.0, -2.0, -1.0],
    "t": [1.0] * 7 + [0.0] * 5 + [-2.0] * 2,
}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2}
SIZES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def need(holds, reason):
    if not holds:
        sys.exit(f"refused: {reason}")


def f32(x):
    """Rounded to F32. Of one operation on numbers of F32 in F64 that is what F32 gives."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return float("inf") if x > 0 else float("-inf")


def small_float(byte, exponent_bits, bias, last):
    sign, mantissa_bits = -1.0 if byte & 128 else 1.0, 7 - exponent_bits
    exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
    if last(exponent, mantissa):
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def numbers(kind, data):
    if kind == "F8_E8M0":
        need(255 not in data, "a scale of 255")
        return [2.0 ** (byte - 127) for byte in data]
    if kind == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    if kind == "F8_E4M3":
        return [small_float(b, 4, 7, lambda e, m: e == 15 and m == 7) for b in data]
    if kind == "F8_E5M2":
        return [small_float(b, 5, 15, lambda e, m: e == 31) for b in data]
    code = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b"}
    code |= {"U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "B"}
    return [f32(x) if kind[0] == "F" else x for x in struct.unpack(f"<{len(data) // SIZES[kind]}{code[kind]}", data)]


def stream(data, bits, n):
    """Numbers of so many bits, and 0 behind them."""
    whole = int.from_bytes(data, "little")
    need(whole >> bits * n == 0, "bits left over are not 0")
    return [whole >> bits * i & (1 << bits) - 1 for i in range(n)]


def streams(data, bits, rows, cols):
    length = (cols * bits + 7) // 8
    return [stream(data[r * length : (r + 1) * length], bits, cols) for r in range(rows)]


def canonical(value, depth=0):
    need(depth <= 32, "JSON is nested too deep")
    if isinstance(value, dict):
        need(all(key.isascii() for key in value), "a key is not ASCII")
        inner = (json.dumps(k, ensure_ascii=False) + ":" + canonical(value[k], depth + 1) for k in sorted(value))
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(v, depth + 1) for v in value) + "]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        need(isinstance(value, int) and 0 <= value < 1 << 53, f"the number {value}")
    # Python's own escapes are those of RFC 8785, but for the characters that it need not escape.
    return json.dumps(value, ensure_ascii=False)


def plane(code, n):
    """A plane that is coded."""
    occurring = [b for b in range(256) if code[b // 8] >> b % 8 & 1]
    at = 32 + 2 * len(occurring)
    frequencies = struct.unpack(f"<{len(occurring)}H", code[32:at])
    need(sum(frequencies) == 4096 and all(0 < f < 4096 for f in frequencies), "frequencies")
    slots = [(b, f, k) for b, f in zip(occurring, frequencies) for k in range(f)]
    states = list(struct.unpack("<8I", code[at : at + 32]))
    words = struct.unpack(f"<{(len(code) - at - 32) // 2}H", code[at + 32 :])
    need(all(x >= 1 << 16 for x in states), "a state below 2^16")
    out, taken = bytearray(), 0
    for i in range(n):
        x = states[i % 8]
        byte, frequency, k = slots[x % 4096]
        x = frequency * (x // 4096) + k
        if x < 1 << 16:
            need(taken < len(words), "a word is missing")
            x, taken = x << 16 | words[taken], taken + 1
        states[i % 8] = x
        out.append(byte)
    need(states == [1 << 16] * 8 and taken == len(words), "a coded plane is of another length")
    return bytes(out)


def expanded(data, c):
    """What a compressed segment stands for."""
    need(c["kind"] == "planes", f"compression {c['kind']}")
    planes, chunk, total = c["planes"], c["chunk"], c["bytes"]
    need(1 <= planes <= 8 and 1 << 16 <= chunk <= 1 << 24 and chunk.bit_count() == 1, "planes, or chunk")
    need(total <= 1024 * len(data) + 1023, "it stands for too much")
    table = -(-total // chunk) * planes * 4
    need(table <= len(data), "no room for its table")
    entries = struct.unpack(f"<{table // 4}I", data[len(data) - table :])
    out, at = bytearray(), 0
    for k in range(0, len(entries), planes):
        length = min(chunk, total - len(out))
        part = bytearray(length)
        for p, entry in enumerate(entries[k : k + planes]):
            kind, stored = entry >> 30, entry & (1 << 30) - 1
            n = len(range(p, length, planes))
            found = data[at : at + stored]
            at += stored
            need(kind != 0 or stored == n, "a plane of another length")
            need(kind != 1 or stored == 1 and n > 0, "a plane of one byte")
            need(kind < 3, "a plane that is neither")
            part[p::planes] = found if kind == 0 else found * n if kind == 1 else plane(found, n)
        out += part
    need(at + table == len(data), "planes and table do not fill the segment")
    need(hashlib.sha256(out).hexdigest() == c["sha256"], "the content has another SHA-256")
    return bytes(out)


def block_of(block, cols, row, col):
    return row // block[0] * -(-cols // block[1]) + col // block[1]


def values(tensor, parts):
    """The values of a tensor in F32, row-major."""
    e, shape = tensor["encoding"], tensor["shape"]
    if e["kind"] == "plain":
        return numbers(e["type"], parts["data"]) if e["type"] in SIZES else None
    if e["kind"] not in ("integers", "codebook", "ternary", "sparse_ternary", "scaled"):
        return None
    n = prod(shape)
    cols = n if e.get("flat") else (shape[-1] if shape else 1)
    rows = n // cols
    places = [(r, c) for r in range(rows) for c in range(cols)]
    block = e["block"]
    if e["kind"] == "scaled":
        scales = numbers(e["scales"], parts["scales"])
        product = [f32(x * scales[block_of(block, cols, r, c)]) for x, (r, c) in zip(numbers(e["type"], parts["data"]), places)]
        return product if e["divisor"] == 1 else [f32(x * f32(1 / e["divisor"])) for x in product]
    high, wide = -(-rows // block[0]), -(-cols // block[1])
    if e["kind"] == "integers":
        codes, scales = streams(parts["codes"], e["bits"], rows, cols), numbers(e["scales"], parts["scales"])
        zeros = [1 << e["bits"] - 1] * (high * wide)
        if e["zeros"].startswith("codes"):
            more = 1 if e["zeros"] == "codes+1" else 0
            zeros = [z + more for row in streams(parts["zeros"], e["bits"], high, wide) for z in row]
        elif e["zeros"] != "middle":
            zeros = numbers(e["zeros"], parts["zeros"])
        group = [c // block[1] for c in range(cols)]
        if e["g_idx"]:
            group = numbers("I32", parts["g_idx"])
            need(all(0 <= g < wide for g in group), "a group that is not there")
        at = lambda r, c: r // block[0] * wide + group[c]
        return [f32(f32(codes[r][c] - zeros[at(r, c)]) * scales[at(r, c)]) for r, c in places]
    if e["kind"] == "codebook":
        codes, table = streams(parts["codes"], e["bits"], rows, cols), numbers(e["table"], parts["table"])
        entry = lambda r, c: table[(block_of(e["tables"], cols, r, c) << e["bits"]) + codes[r][c]]
        if e["scales"] is None:
            return [entry(r, c) for r, c in places]
        if isinstance(e["scales"], dict):
            of_scales, outer = numbers("F32", parts["scales_table"]), numbers("F32", parts["scales_scales"])
            offset, size = numbers("F32", parts["scales_offset"])[0], e["scales"]["block"]
            scale = lambda i, code: f32(f32(of_scales[code] * outer[i // size]) + offset)
            scales = [scale(i, code) for i, code in enumerate(parts["scales"])]
        else:
            scales = numbers(e["scales"], parts["scales"])
        return [f32(entry(r, c) * scales[block_of(block, cols, r, c)]) for r, c in places]
    scales = numbers(e["scales"], parts["scales"])
    if e["kind"] == "ternary" and e["packing"] == "base3":
        length = -(-cols // 5)
        digits = []
        for r in range(rows):
            data = parts["codes"][r * length : (r + 1) * length]
            row = [byte // 3**i % 3 for byte in data for i in range(5)]
            need(max(data) < 243 and not any(row[cols:]), "a byte that holds no digits")
            digits.append(row[:cols])
    elif e["kind"] == "ternary":
        digits = streams(parts["codes"], 2, rows, cols)
        need(all(d < 3 for row in digits for d in row), "a code of 3")
    else:
        mask, starts = streams(parts["mask"], 1, rows, cols), numbers("U64", parts["starts"])
        need(starts[0] == 0 and starts[-1] == len(parts["signs"]), "the ends of the rows' signs")
        digits = []
        for r, row in enumerate(mask):
            need(starts[r + 1] - starts[r] == -(-sum(row) // 8), "where a row's signs begin")
            signs = iter(stream(parts["signs"][starts[r] : starts[r + 1]], 1, sum(row)))
            digits.append([1 if not bit else (0 if next(signs) else 2) for bit in row])
    return [f32((digits[r][c] - 1) * scales[block_of(block, cols, r, c)]) for r, c in places]


def contents(path):
    data = Path(path).read_bytes()
    if data[:1] == MAGIC[:1]:
        return data
    # The example: lines of hexadecimal numbers, and the manifest with a line for each field.
    head, _, rest = data.decode().partition("{")
    manifest, _, tail = ("{" + rest).rpartition("}\n")
    of_lines = lambda text: bytes.fromhex("".join(line.split("  ", 1)[1] for line in text.splitlines()))
    return of_lines(head) + canonical(json.loads(manifest + "}")).encode() + of_lines(tail)


def read(path):
    """Prints what there is; returns the SHA-256 of each tensor's values."""
    data, sums = contents(path), {}
    need(len(data) >= 192 and data[:8] == MAGIC and data[-8:] == MAGIC, "the first or the last bytes")
    need(data[8:12] == struct.pack("<I", 1) == data[-40:-36], "the version")
    need(not any(data[12:64]) and not any(data[-36:-8]), "bytes that have to be 0")
    at, length, digest, signed, of_signature = struct.unpack("<QQ32sQ32s", data[-128:-40])
    need(at % 64 == 0 and at >= 64 and at + length + signed + 128 == len(data), "where the manifest lies")
    text, signature = data[at : at + length], data[at + length : at + length + signed]
    need(hashlib.sha256(text).digest() == digest, "the manifest's SHA-256")
    need(hashlib.sha256(signature).digest() == of_signature, "the signature's SHA-256")
    manifest = json.loads(text)
    need(canonical(manifest).encode() == text, "the manifest is not canonical")
    end = 64

    def segment(s):
        nonlocal end
        found = data[end : end + s["bytes"]]
        need(hashlib.sha256(found).hexdigest() == s["sha256"], f"the SHA-256 of {s['name']}")
        behind = -(-(end + s["bytes"]) // 64) * 64
        need(not any(data[end + s["bytes"] : behind]), f"bytes behind {s['name']}")
        end = behind
        return expanded(found, s["compression"]) if "compression" in s else found

    for file in manifest["files"]:
        print(f"{file['name']}  file  {len(segment(file))} bytes")
    for tensor in manifest["tensors"]:
        parts = {s["name"]: segment(s) for s in tensor["parts"]}
        found = values(tensor, parts)
        if found is not None:
            sums[tensor["name"]] = hashlib.sha256(struct.pack(f"<{len(found)}f", *found)).hexdigest()
        shown = sums.get(tensor["name"], "not decoded here")
        print(f"{tensor['name']}  {tensor['encoding']['kind']}  {shown}")
        if path.endswith("example.txt"):
            need(found == EXAMPLE[tensor["name"]], f"{tensor['name']}: {found}")
    need(end == at, "segments do not end where the manifest begins")
    return sums


# Options of `qconv pack`, and the kind of encoding that matrices have then.
PACKED = {
    "": "plain",
    "--compress": "plain",
    "--bits 4": "integers",
    "--bits 3 --group-size 48 --asym": "integers",
    "--bits 8 --group-size -1": "integers",
    "--bits 1 --asym --group-size 100": "integers",
    "--encoding ternary --group-size -1": "ternary",
    "--encoding ternary-bits2 --group-size 100": "ternary",
    "--encoding nf4 --compress": "codebook",
    "--encoding fp4": "codebook",
    "--encoding int8": "scaled",
    "--encoding fp8": "scaled",
}


def of_safetensors(path):
    """SHA-256 of the bytes of each tensor, all of which are F32."""
    data = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    need(all(t["dtype"] == "F32" for t in header.values()), "tensors that are not F32")
    of = lambda t: data[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]]
    return {name: hashlib.sha256(of(t)).hexdigest() for name, t in header.items()}


def beside(qconv, model):
    for options, kind in PACKED.items():
        with tempfile.TemporaryDirectory() as directory:
            packed, plain = f"{directory}/x.qpack", f"{directory}/x"
            run = lambda *args: subprocess.run([qconv, *args, "-q"], check=True)
            run("pack", model, "-o", packed, *options.split())
            run("convert", packed, "--to", "safetensors", "--dtype", "f32", "-o", plain)
            with contextlib.redirect_stdout(io.StringIO()) as listing:
                found = read(packed)
            need(f"  {kind}  " in listing.getvalue(), f"{options}: no tensor is {kind}")
            need(found == of_safetensors(f"{plain}/model.safetensors"), f"{options}: qconv reads other values")
            print(f"pack {options}: {len(found)} tensors, the values that qconv reads")


if __name__ == "__main__":
    if sys.argv[1] == "--qconv":
        beside(*sys.argv[2:])
    else:
        for path in sys.argv[1:]:
            read(path)
