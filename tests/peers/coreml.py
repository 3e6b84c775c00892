"""Holds Core ML packages that qconv writes to coremltools 9: what they are, what their weights decode to, and what
they compute.

`make peers` runs it: coreml.py PATH/TO/qconv PATH/TO/examples/coreml_values [NAMES], from the repository's root. For
each family and encoding it converts a fixture, and looks:

- coremltools loads the package, and rebuilds the program operation by operation: every type that it infers is the one
  that the file declares; its library for packages takes the manifest, and no field of the model is unknown to it
- every weight that coremltools decodes has the values that qconv decodes, bit for bit
- a walk over the program's messages with numpy, which shares no line with qconv, gives the logits that qconv's
  executor gives, for many tokens at once and one by one
"""

import json
import logging
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

logging.disable(logging.WARNING)
import coremltools as ct  # noqa: E402
from coremltools.converters.mil.frontend.milproto.load import load as rebuild  # noqa: E402
from coremltools.libmodelpackage import ModelPackage  # noqa: E402
from coremltools.proto import MIL_pb2  # noqa: E402
from google.protobuf.unknown_fields import UnknownFieldSet  # noqa: E402

MODELS = Path("fixtures/models")
FAMILIES = ["llama", "llama-rope3", "mistral", "qwen2", "qwen3", "gemma3-spm", "phi_3", "gpt2", "gpt_oss"]
# Of every family; the others of the first one alone.
EVERYWHERE = [["--profile", "gpu"], ["--profile", "ane"], ["--profile", "gpu", "--bits", "4"], ["--profile", "ane", "--bits", "2"]]
ONCE = [
    ["--profile", "gpu", "--bits", "8"],
    ["--profile", "ane", "--bits", "4"],
    ["--profile", "ane", "--bits", "ternary"],
    ["--profile", "gpu", "--bits", "ternary"],
    ["--profile", "gpu", "--bits", "ternary", "--ternary-form", "sparse"],
    *[["--profile", "gpu", "--palettize", bits] for bits in "123468"],
    ["--profile", "gpu", "--palettize", "4", "--granularity", "tensor"],
]
CONTEXT = 80
TOKENS = 70  # more than the 64 that `prefill` takes at once
# Experts are not for the Neural Engine.
EXPERTS = {"gpt_oss"}
# How far logits may lie apart, as root mean square over their spread. Both compute in float32.
CLOSE = 1e-4

TYPES = {MIL_pb2.FLOAT16: np.float16, MIL_pb2.FLOAT32: np.float32, MIL_pb2.INT32: np.int32, MIL_pb2.BOOL: np.bool_}
BITS = {MIL_pb2.UINT1: 1, MIL_pb2.UINT2: 2, MIL_pb2.UINT3: 3, MIL_pb2.UINT4: 4, MIL_pb2.UINT6: 6, MIL_pb2.UINT8: 8,
        MIL_pb2.INT4: 4, MIL_pb2.INT8: 8}


def sizes(tensor_type):
    return [d.constant.size if d.HasField("constant") else None for d in tensor_type.dimensions]


def elements(raw, data_type, n):
    """Numbers of `n` elements in little-endian bytes; small integers are a stream of bits, lowest first."""
    if data_type in TYPES:
        return np.frombuffer(raw, TYPES[data_type], n)
    width = BITS[data_type]
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: n * width].reshape(n, width)
    codes = bits.astype(np.int32) @ (1 << np.arange(width, dtype=np.int32))
    if data_type in (MIL_pb2.INT4, MIL_pb2.INT8):
        codes = np.where(codes >> (width - 1), codes - (1 << width), codes)
    return codes


class Program:
    """The functions of a package, read from its protocol buffer, with the weight file beside it."""

    def __init__(self, package: Path):
        self.spec = ct.utils.load_spec(str(package))
        self.weights = (package / "Data/com.apple.CoreML/weights/weight.bin").read_bytes()
        self.constants = {}

    def block(self, function):
        f = self.spec.mlProgram.functions[function]
        return f, f.block_specializations[f.opset]

    def value(self, value):
        t = value.type.tensorType
        shape = sizes(t)
        n = math.prod(shape)
        if value.HasField("blobFileValue"):
            at = value.blobFileValue.offset
            assert self.weights[at:at + 4] == b"\xef\xbe\xad\xde", f"no record at {at}"
            length, data = (int.from_bytes(self.weights[at + k:at + k + 8], "little") for k in (8, 16))
            return elements(self.weights[data:data + length], t.dataType, n).reshape(shape)
        held = value.immediateValue.tensor
        kind = held.WhichOneof("value")
        if kind == "strings":
            return held.strings.values[0]
        if kind == "bytes":
            return elements(held.bytes.values, t.dataType, n).reshape(shape)
        return np.array(list(getattr(held, kind).values), TYPES[t.dataType]).reshape(shape)

    def call(self, function, given, states):
        """Outputs by name. Numbers with a fraction are float32 between operations."""
        f, block = self.block(function)
        held = dict(given)
        known = self.constants.setdefault(function, {})
        for op in block.operations:
            if op.type == "write_state":
                state, data = (op.inputs[k].arguments[0].name for k in ("input", "data"))
                states[state] = held[data]
                continue
            names = [o.name for o in op.outputs]
            is_constant = op.type == "const" or op.type.startswith("constexpr_")
            if is_constant and names[0] in known:
                held.update((name, known[name]) for name in names)
                continue
            if op.type == "const":
                results = self.value(op.attributes["val"])
            elif op.type == "read_state":
                results = states[op.inputs["input"].arguments[0].name]
            else:
                inputs = {}
                for parameter, argument in op.inputs.items():
                    all_of = [held[b.name] if b.HasField("name") else self.value(b.value) for b in argument.arguments]
                    inputs[parameter] = all_of if parameter == "values" else all_of[0]
                results = OPERATIONS[op.type](**inputs)
            results = results if isinstance(results, tuple) else (results,)
            for output, result in zip(op.outputs, results, strict=True):
                t = output.type.tensorType
                if isinstance(result, str):
                    held[output.name] = result
                    continue
                result = np.asarray(result)
                if t.dataType in (MIL_pb2.FLOAT16, MIL_pb2.FLOAT32):
                    result = result.astype(np.float32)
                declared = sizes(t)
                fits = len(declared) == result.ndim and all(d in (None, n) for d, n in zip(declared, result.shape))
                assert fits, f"{op.type} {output.name}: {result.shape}, {declared} is declared"
                held[output.name] = result
            if is_constant:
                known.update((name, held[name]) for name in names)
        return {name: held[name] for name in block.outputs}


# --- operations, as Apple's documentation of MIL describes them ---------------------------------

def spread(of_blocks, shape):
    """Each element's entry of what blocks share."""
    for axis, n in enumerate(shape):
        of_blocks = np.repeat(of_blocks, n // of_blocks.shape[axis], axis)
    return of_blocks


def blockwise(data, scale, offset=None):
    whole = data.astype(np.float32)
    if offset is not None:
        whole = whole - spread(offset.astype(np.float32), data.shape)
    return (whole * spread(scale.astype(np.float32), data.shape)).astype(scale.dtype)


def palette(indices, lut):
    assert lut.shape[-1] == 1, "entries of one element each are written"
    tables = spread(lut[..., 0], [*indices.shape, lut.shape[-2]])
    return np.take_along_axis(tables, indices[..., None].astype(np.int64), -1)[..., 0]


def sparse_palette(indices_mask, indices_nonzero_data, lut):
    codes = np.zeros(indices_mask.shape, np.int64)
    codes[indices_mask != 0] = indices_nonzero_data
    return indices_mask, palette(codes, lut)[indices_mask != 0]


def sparse(nonzero_data, mask):
    whole = np.zeros(mask.shape, nonzero_data.dtype)
    whole[mask != 0] = nonzero_data
    return whole


def index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    none = [False] * x.ndim
    masks = [none if m is None else m for m in (begin_mask, end_mask, squeeze_mask)]
    stride = [1] * x.ndim if stride is None else stride
    for i in range(x.ndim):
        if masks[2][i]:
            yield int(begin[i])
        else:
            yield slice(None if masks[0][i] else int(begin[i]), None if masks[1][i] else int(end[i]), int(stride[i]))


def slice_update(x, update, begin, end, **rest):
    x = x.copy()
    at = tuple(index(x, begin, end, **rest))
    assert x[at].shape == update.shape, f"{update.shape} into {x[at].shape}"
    x[at] = update
    return x


def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    assert batch_dims == 0 and (np.asarray(indices) >= 0).all()
    return np.take(x, indices, int(axis))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(int(axis), keepdims=True))
    return e / e.sum(int(axis), keepdims=True)


def layer_norm(x, axes, epsilon, gamma=None, beta=None):
    axes = tuple(int(a) for a in axes)
    centred = x - x.mean(axes, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(axes, keepdims=True) + np.float32(epsilon))
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def attention(query, key, value, attn_mask=None):
    scores = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(query.shape[-1]))
    return softmax(scores if attn_mask is None else scores + attn_mask) @ value


def gelu(x, mode="EXACT"):
    if mode == "TANH_APPROXIMATION":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert mode == "EXACT"
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))


def topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True, output_indices_dtype="int32"):
    assert not ascending
    order = np.argsort(-x, int(axis), kind="stable").take(np.arange(int(k)), int(axis))
    return np.take_along_axis(x, order, int(axis)), order.astype(np.int32)


def scatter_along_axis(data, indices, updates, axis, mode, validate_indices=False):
    assert mode == "update"
    data = data.copy()
    np.put_along_axis(data, indices, updates, int(axis))
    return data


def conv(x, weight, bias=None, **rest):
    assert weight.shape[2:] == (1, 1) and int(rest.get("groups", 1)) == 1
    y = np.einsum("nchw,oc->nohw", x, weight[:, :, 0, 0], optimize=True)
    return y if bias is None else y + bias.reshape(1, -1, 1, 1)


def split(x, axis, num_splits=None, split_sizes=None):
    at = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return tuple(np.split(x, at, int(axis)))


def reduced(of):
    return lambda x, axes, keep_dims=False: of(x, axis=tuple(int(a) for a in axes), keepdims=bool(keep_dims))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, is_turned):
    return x.swapaxes(-1, -2) if is_turned else x


CASTS = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
OPERATIONS = {
    "constexpr_blockwise_shift_scale": blockwise,
    "constexpr_lut_to_dense": palette,
    "constexpr_lut_to_sparse": sparse_palette,
    "constexpr_sparse_to_dense": sparse,
    "shape": lambda x: np.array(x.shape, np.int32),
    "gather": gather,
    "range_1d": lambda start, end, step: np.arange(int(start), int(end), int(step), dtype=np.int32),
    "slice_by_index": lambda x, begin, end, **rest: x[tuple(index(x, begin, end, **rest))],
    "slice_update": slice_update,
    "concat": lambda values, axis, interleave=False: np.concatenate(values, int(axis)),
    "split": split,
    "reshape": lambda x, shape: x.reshape([int(n) for n in shape]),
    "transpose": lambda x, perm: x.transpose([int(n) for n in perm]),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(a) for a in axes)),
    "squeeze": lambda x, axes: x.squeeze(tuple(int(a) for a in axes)),
    "tile": lambda x, reps: np.tile(x, [int(n) for n in reps]),
    "cast": lambda x, dtype: x.astype(CASTS[dtype]),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "logical_and": lambda x, y: np.logical_and(x, y),
    "logical_or": lambda x, y: np.logical_or(x, y),
    "logical_not": lambda x: np.logical_not(x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + np.float32(epsilon)),
    "exp": lambda x: np.exp(x),
    "tanh": lambda x: np.tanh(x),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "reduce_mean": reduced(np.mean),
    "reduce_sum": reduced(np.sum),
    "reduce_max": reduced(np.max),
    "softmax": softmax,
    "layer_norm": layer_norm,
    "topk": topk,
    "scatter_along_axis": scatter_along_axis,
    "linear": lambda x, weight, bias=None: x @ weight.T + (0 if bias is None else bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: turned(x, transpose_x) @ turned(y, transpose_y),
    "conv": conv,
    "scaled_dot_product_attention": attention,
}


# --- the two interfaces -------------------------------------------------------------------------

def empty(program, function):
    f, _ = program.block(function)
    states = [i for i in f.inputs if i.type.HasField("stateType")]
    return {i.name: np.zeros(sizes(i.type.stateType.wrappedType.tensorType), np.float32) for i in states}


def decode(program, states, ids, past):
    """Logits of `ids`, which follow on `past` tokens."""
    functions = program.spec.mlProgram.functions
    n = len(ids)
    if "main" in functions:
        given = {"inputIds": np.array([ids], np.int32), "causalMask": np.zeros((1, 1, n, past + n), np.float32)}
        return program.call("main", given, states)["logits"][0]
    function = {1: "infer", 64: "prefill"}[n]
    positions = np.arange(past, past + n, dtype=np.int32)
    hidden = np.arange(CONTEXT)[None] > positions[:, None]
    given = {
        "input_ids": np.array([ids], np.int32),
        "position_ids": positions,
        "causal_mask": np.where(hidden, np.float32(-np.inf), np.float32(0))[None, None],
        "current_pos": np.array([past], np.int32),
    }
    given = {i.name: given[i.name] for i in program.block(function)[0].inputs if i.name in given}
    found = program.call(function, given, states)
    return np.concatenate([found[f"logits{j + 1}"][0] for j in range(len(found))], -1)


def logits(program, ids, pieces):
    states = empty(program, next(iter(program.spec.mlProgram.functions)))
    rows, past = [], 0
    for n in pieces:
        rows.append(decode(program, states, ids[past:past + n], past))
        past += n
    return np.concatenate(rows)


# --- checks -------------------------------------------------------------------------------------

def unknown_fields(message, path="Model"):
    yield from (f"{path}: field {field.field_number}" for field in UnknownFieldSet(message))
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inside = [value[key] for key in value]
        else:
            inside = [value] if hasattr(value, "ListFields") else list(value)
        for one in inside:
            if hasattr(one, "ListFields"):
                yield from unknown_fields(one, f"{path}.{field.name}")


def loads(package: Path):
    """What coremltools makes of it; returns the program as it rebuilds it."""
    assert ModelPackage.isValid(str(package)), "libmodelpackage refuses it"
    ct.models.MLModel(str(package), skip_model_load=True)
    spec = ct.utils.load_spec(str(package))
    unknown = list(unknown_fields(spec))
    assert not unknown, unknown[:5]
    # Infers every type again, and compares it with the declared one.
    weights = package / "Data/com.apple.CoreML/weights"
    program = rebuild(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    program.validate()
    return program


def same_weights(program, ours):
    """Every weight decoded by coremltools has the values that qconv decodes."""
    n = 0
    for name, function in program.functions.items():
        decoded = {}
        for op in function.operations:
            if op.op_type == "const" and op.outputs[0].name in ours[name]:
                value, mine = op.outputs[0].val, ours[name][op.outputs[0].name]
                assert np.array_equal(np.asarray(value, np.float32), mine), f"{op.outputs[0].name} differs"
                n += 1
            if not op.op_type.startswith("constexpr_"):
                continue
            given = {k: decoded[v.name] if v.val is None else v.val for k, v in op.inputs.items() if v is not None}
            found = op.decompress(*[given.get(k) for k in op.input_spec.input_types])
            for output, value in zip(op.outputs, found if isinstance(found, tuple) else (found,), strict=True):
                decoded[output.name] = value
                if output.name not in ours[name]:
                    assert op.op_type == "constexpr_lut_to_sparse", f"{output.name} is not decoded by qconv"
                    continue
                mine = ours[name][output.name]
                assert list(value.shape) == list(mine.shape), output.name
                assert np.array_equal(np.asarray(value, np.float32), mine), f"{output.name} differs"
                n += 1
    return n


def read(out: Path):
    """What the example wrote."""
    index_of = json.loads((out / "index.json").read_text())
    raw = np.fromfile(out / "values.bin", np.float32)

    def tensor(entry):
        return raw[entry["start"]:entry["start"] + math.prod(entry["shape"])].reshape(entry["shape"])

    weights = {f: {w["name"]: tensor(w) for w in list_of} for f, list_of in index_of["weights"].items()}
    return weights, tensor(index_of["logits"])


def check(qconv, example, name, options, tmp):
    package, out = tmp / "x.mlpackage", tmp / "values"
    fallback = ["--allow-fallback"] if options == ["--profile", "gpu", "--bits", "4"] else []
    subprocess.run([qconv, "hf-to-coreml", MODELS / name, "-o", package, "--context", str(CONTEXT), *options,
                    *fallback, "-q"], check=True)
    ids = [int(i) for i in (np.arange(TOKENS, dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(200)]
    subprocess.run([example, package, out, *map(str, ids)], check=True)
    weights, wanted = read(out)
    n = same_weights(loads(package), weights)
    program = Program(package)
    is_static = "main" not in program.spec.mlProgram.functions
    apart = []
    for pieces in [[64] + [1] * (TOKENS - 64) if is_static else [TOKENS], [1] * 8]:
        found = logits(program, ids, pieces)
        difference = found - wanted[:len(found)]
        assert np.isfinite(found).all()
        apart.append(float(np.sqrt((difference**2).mean()) / wanted.std()))
    assert max(apart) < CLOSE, f"logits differ by {apart}"
    print(f"coreml {name:<12} {' '.join(options):<46} {n:>3} weights equal, logits {apart[0]:.1e}, one by one {apart[1]:.1e}")


def main() -> None:
    qconv, example = (Path(path).resolve() for path in sys.argv[1:3])
    names = sys.argv[3:] or FAMILIES
    for name in names:
        forms = EVERYWHERE + (ONCE if name == FAMILIES[0] else [])
        for options in forms:
            if name in EXPERTS and "ane" in options:
                continue
            with tempfile.TemporaryDirectory() as tmp:
                check(qconv, example, name, options, Path(tmp))
    print("make peers: coremltools loads what qconv writes, decodes it alike, and numpy computes the same of it")


if __name__ == "__main__":
    main()
