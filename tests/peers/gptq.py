"""GPTQ's codes, computed apart from qconv in F64, by the inverse of H and one column at a time as the
paper has it (Frantar et al., arXiv 2210.17323, algorithm 1).

    gptq.py QCONV

Random matrices and moments, in files of our own making; `qconv quantize` writes codes and scales. From
its file come the scales alone, found by reading blocks whose codes were overwritten, with gguf-py. The
codes have to be the reference's, every one. Embeddings are held to the metric of what reads them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

COLUMNS, ROWS, TOKENS = 256, 3, 700
WHOLE = lambda first, n: np.arange(first, first + n)
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
# Of each type: levels, weights that share a scale, and where in a block the codes lie. Filling these bytes
# with 0 gives the first level everywhere, with the last number another one, which is named before it.
TYPES = {
    T.Q4_0: (WHOLE(-8, 16), 32, [(2, 18)], 1, 0x11),
    T.Q4_1: (WHOLE(0, 16), 32, [(4, 20)], 1, 0x11),
    T.Q5_0: (WHOLE(-16, 32), 32, [(2, 22)], 17, (0x11, [(2, 6, 0xFF)])),
    T.Q5_1: (WHOLE(0, 32), 32, [(4, 24)], 17, (0x11, [(4, 8, 0xFF)])),
    T.Q8_0: (WHOLE(-127, 255), 32, [(2, 34)], 128, 0x01),
    T.Q2_K: (WHOLE(0, 4), 16, [(16, 80)], 1, 0x55),
    T.Q3_K: (WHOLE(-4, 8), 16, [(0, 96)], 5, (0x55, [(0, 32, 0xFF)])),
    T.Q4_K: (WHOLE(0, 16), 32, [(16, 144)], 1, 0x11),
    T.Q5_K: (WHOLE(0, 32), 32, [(16, 176)], 17, (0x11, [(16, 48, 0xFF)])),
    T.Q6_K: (WHOLE(-32, 64), 16, [(0, 192)], 17, (0x11, [(128, 192, 0x55)])),
    T.IQ4_NL: (IQ4, 32, [(2, 18)], 1, 0x11),
    T.IQ4_XS: (IQ4, 32, [(8, 136)], 1, 0x11),
    T.TQ1_0: (WHOLE(-1, 3), 256, [(0, 52)], 2, 0xFF),
    T.TQ2_0: (WHOLE(-1, 3), 256, [(0, 64)], 1, 0x55),
}


def lines(blocks: np.ndarray, dtype: T) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each weight of encoded rows."""
    levels, _, places, other, fill = TYPES[dtype]
    fill, special = fill if isinstance(fill, tuple) else (fill, [])
    size = gguf.GGML_QUANT_SIZES[dtype][1]
    filled = []
    for byte in (0, fill):
        b = blocks.reshape(-1, size).copy()
        for lo, hi in places:
            b[:, lo:hi] = byte
        if byte:
            for lo, hi, value in special:
                b[:, lo:hi] = value
        filled.append(gguf.quants.dequantize(b.reshape(blocks.shape), dtype).astype(np.float64))
    low, high = (levels[0], levels[other]) if dtype != T.Q8_0 else (0, 1)
    scale = (filled[1] - filled[0]) / (high - low)
    return scale, filled[0] - scale * low


def reference(w, h, scale, offset, levels, damp, desc_act):
    """The values that the weights become, and how near the closest decision was to another, in levels."""
    n = w.shape[1]
    h = h + damp * np.diag(h).mean() * np.eye(n)
    order = np.argsort(-np.diag(h), kind="stable") if desc_act else np.arange(n)
    u = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    w, scale, offset = w[:, order].copy(), scale[:, order], offset[:, order]
    out, margin = np.zeros_like(w), np.inf
    middles = (levels[1:] + levels[:-1]) / 2
    for j in range(n):
        assert (scale[:, j] != 0).all()
        wish = (w[:, j] - offset[:, j]) / scale[:, j]
        margin = min(margin, np.abs(wish[:, None] - middles).min())
        out[:, j] = scale[:, j] * levels[np.searchsorted(middles, wish)] + offset[:, j]
        w[:, j:] -= np.outer((w[:, j] - out[:, j]) / u[j, j], u[j, j:])
    return out[:, np.argsort(order)], margin


def write_moments(path: Path, inputs: dict[str, tuple[np.ndarray, int]]) -> None:
    """As formats/spec/moments.md has it: sums over the tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("moments")
    writer.add_uint32("moments.version", 1)
    writer.add_string("moments.model", "0" * 64)
    for key, value in (("weights", list(inputs)), ("inputs", list(inputs)), ("texts", ["random"]),
                       ("tokens.sha256", ["0" * 64]), ("contexts", [512]), ("chunks", [1])):
        if isinstance(value[0], str):
            writer.add_array(f"moments.{key}", value)
        else:
            writer.add_key_value(f"moments.{key}", value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    for name, (sums, count) in inputs.items():
        n = len(sums)
        writer.add_tensor(f"{name}.in_moments", sums[np.triu_indices(n)].reshape(1, -1))
        writer.add_tensor(f"{name}.in_sum", np.zeros((1, n), np.float32))
        writer.add_tensor(f"{name}.in_sum_abs", np.zeros((1, n), np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.int64))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                 writer.close):
        step()


def write_model(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                 writer.close):
        step()


def main() -> None:
    qconv = Path(sys.argv[1]).resolve()
    rng = np.random.default_rng(SEED)
    names = [f"blk.0.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
    codes, closest = 0, np.inf
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for damp, desc_act in ((0.01, True), (0.01, False), (0.1, True)):
            # Inputs that depend on each other, columns of very different size.
            mix = np.eye(COLUMNS) + rng.normal(size=(COLUMNS, COLUMNS)) / 16
            x = rng.normal(size=(TOKENS, COLUMNS)) @ mix * np.exp(rng.normal(size=COLUMNS))
            sums = (x.T @ x).astype(np.float32)
            tensors = {n: rng.normal(size=(ROWS, COLUMNS)).astype(np.float32) for n in names}
            tensors |= {f"blk.0.{n}_norm.weight": np.exp(rng.normal(size=COLUMNS)).astype(np.float32)
                        for n in ("attn", "ffn")}
            tensors["token_embd.weight"] = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
            write_model(tmp / "model.gguf", tensors)
            write_moments(tmp / "moments.gguf", {names[0]: (sums, TOKENS)})
            gained = {n: tensors[n].astype(np.float64) * tensors[f"blk.0.{n[6:].split('_')[0]}_norm.weight"]
                      for n in names}
            metric = sum(w.T @ w for w in gained.values())
            for dtype, (levels, group, *_) in TYPES.items():
                subprocess.run([qconv, "quantize", "model.gguf", "out.gguf", "-t", "q4_0", "--pure", "--force", "-q",
                                "--method", "gptq", "--moments", "moments.gguf", f"--damp-percent={damp}",
                                f"--desc-act={str(desc_act).lower()}", "--tensor-type", f".={dtype.name.lower()}",
                                "--token-embedding-type", dtype.name.lower()],
                               check=True, cwd=tmp)
                found = {t.name: t for t in gguf.GGUFReader(tmp / "out.gguf").tensors}
                for name, h in ((names[0], sums.astype(np.float64) / TOKENS), ("token_embd.weight", metric)):
                    blocks = np.array(found[name].data)
                    assert found[name].tensor_type == dtype, (name, found[name].tensor_type, dtype)
                    scale, offset = lines(blocks, dtype)
                    expected, margin = reference(tensors[name].astype(np.float64), h, scale, offset, levels, damp,
                                                 desc_act)
                    values = gguf.quants.dequantize(blocks, dtype).astype(np.float64)
                    wrong = np.abs(values - expected) > 0.1 * np.abs(scale)
                    assert not wrong.any(), (f"{name} as {dtype.name}, damping {damp}, desc_act {desc_act}: "
                                             f"{wrong.sum()} codes differ; the closest decision was {margin:.1e}")
                    codes, closest = codes + wrong.size, min(closest, margin)
    print(f"gptq: {codes} codes of {len(TYPES)} types are the reference's; the closest decision was {closest:.1e} "
          "of a level from another")


# With this one no decision is so close that rounding in F32 could change it.
SEED = 6

if __name__ == "__main__":
    main()
