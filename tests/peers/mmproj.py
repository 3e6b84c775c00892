"""Records what llama.cpp's converter makes of the examples of formats/mmproj.

    python tests/peers/mmproj.py LLAMA_CPP_DIR [--checkpoints DIR] [--ours DIR] [NAME ...]

Needs torch, transformers and what llama.cpp's convert_hf_to_gguf.py needs. For each example a tiny
checkpoint is made: transformers says which tensors it has (where it does not know the class, the
record in fixtures/mmproj says it already), and their values follow from name and index. The record
holds those names and shapes, and the metadata and tensors that llama.cpp's converter made of them,
so that `cargo test` needs neither Python nor the checkpoints.
"""

import argparse, contextlib, hashlib, io, json, logging, pathlib, shutil, sys, tempfile, tomllib, traceback

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER, RECORDS = ROOT / "formats/mmproj", ROOT / "fixtures/mmproj"
FILE_TYPES = ("f16", "q8_0")
# What transformers 5 writes, and how published checkpoints have it, of which llama.cpp's converter knows.
PUBLISHED = {
    "Lfm2VlForConditionalGeneration": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "Gemma3ForConditionalGeneration": {"vision_tower.": "vision_tower.vision_model."},
    "InternVLForConditionalGeneration": {
        "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
}


def values(name, shape):
    """Noise in [-1/8, 1/8): splitmix64 of the index, begun at FNV-1a of the name."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    n = int(np.prod(shape, dtype=np.int64)) if shape else 1
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return ((unit - np.float32(0.5)) * np.float32(0.25)).reshape(shape)


def examples(path):
    """Configs by name, as src/arch/example.rs makes them."""
    def load(path):
        own = tomllib.loads(path.read_text())
        base = load(path.with_name(own["extends"] + ".toml")) if "extends" in own else {}
        return own | {"example": base.get("example", {}) | own.get("example", {})}
    whole = load(path)
    if "arch" not in whole:
        return {}
    first = whole["class"][0]
    config = {"architectures": [first["name"]], "model_type": first["model_type"]} | whole["example"]
    named = {"example": config} | {name: config | v for name, v in whole.get("variant", {}).items()}
    return {name: {k: v for k, v in c.items() if v != "null"} for name, c in named.items()}


def shapes(config, folder):
    """Names and shapes of a checkpoint, and what transformers writes for these names where that is
    another thing; None where it knows no such class."""
    import torch, transformers
    from safetensors import safe_open
    cls = getattr(transformers, config["architectures"][0], None)
    if cls is None:
        return None
    plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    torch.manual_seed(0)
    cls(cls.config_class(**plain)).save_pretrained(folder)
    found = {}
    with safe_open(folder / "model.safetensors", "np") as f:
        for name in f.keys():
            found[name] = list(f.get_slice(name).get_shape())
    saved = {}
    for begin, published in PUBLISHED.get(config["architectures"][0], {}).items():
        saved |= {published + n.removeprefix(begin): n for n in found if n.startswith(begin)}
    names = {v: k for k, v in saved.items()}
    return {names.get(n, n): s for n, s in found.items()}, saved


def convert(folder, file_type, out):
    """llama.cpp's own way, within this process."""
    import torch, gguf
    from conversion import ModelBase, ModelType, get_model_class
    from conversion.base import get_model_architecture
    types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    with torch.inference_mode():
        hparams = ModelBase.load_hparams(folder, False)
        cls = get_model_class(get_model_architecture(hparams, ModelType.MMPROJ), mmproj=True)
        cls(folder, types[file_type], out).write()


def read(path):
    from gguf import GGUFReader
    reader = GGUFReader(path)
    kv = {}
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        value = field.contents()
        if field.types[-1].name == "FLOAT32":
            value = [float(v) for v in value] if isinstance(value, list) else float(value)
        kind = "array" if len(field.types) > 1 else "type"
        kv[field.name] = {kind: field.types[-1].name, "value": value}
    tensors = {t.name: [[int(n) for n in reversed(t.shape)], t.tensor_type.name,
                        hashlib.sha256(t.data.tobytes()).hexdigest()[:16]] for t in reader.tensors}
    return kv, tensors


def main():
    args = argparse.ArgumentParser()
    args.add_argument("llama_cpp", type=pathlib.Path)
    args.add_argument("names", nargs="*")
    args.add_argument("--checkpoints", type=pathlib.Path, help="where to leave the checkpoints")
    args.add_argument("--ours", type=pathlib.Path, help="QCONV_KEEP of tests/mmproj.rs: what to record where "
                      "llama.cpp's converter refuses")
    args = args.parse_args()
    sys.path[:0] = [str(args.llama_cpp), str(args.llama_cpp / "gguf-py")]
    from safetensors.numpy import save_file
    logging.disable(logging.INFO)
    scratch = pathlib.Path(tempfile.mkdtemp())
    for path in sorted(FOLDER.glob("*.toml")):
        for example, config in examples(path).items():
            key = f"{path.stem}-{example}"
            if args.names and path.stem not in args.names and key not in args.names:
                continue
            record_path = RECORDS / f"{key}.json"
            record = json.loads(record_path.read_text()) if record_path.exists() else {}
            files = {k: v for k, v in config.items() if k.endswith(".json")}
            files["config.json"] = config = {k: v for k, v in config.items() if not k.endswith(".json")}
            folder = (args.checkpoints or scratch) / key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    made = shapes(config, scratch / "made") or (record.get("checkpoint"), record.get("saved"))
                checkpoint, saved = made
            except Exception as e:
                traceback.print_exc()
                print(f"{key}: transformers: {e}")
                continue
            if checkpoint is None:
                print(f"{key}: transformers has no such class, and {record_path.name} no checkpoint")
                continue
            save_file({n: values(n, s) for n, s in checkpoint.items()}, folder / "model.safetensors")
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content))
            record = {"checkpoint": checkpoint, "saved": saved, "differs": record.get("differs")}
            try:
                kv, types = None, {}
                for file_type in FILE_TYPES:
                    out = scratch / f"{key}-{file_type}.gguf"
                    convert(folder, file_type, out)
                    metadata, types[file_type] = read(out)
                    kv = kv or metadata
                record |= {"kv": kv, "tensors": types}
                print(f"{key}: {len(checkpoint)} tensors, {len(types['f16'])} in GGUF")
            except Exception as e:
                record["reference_refuses"] = f"{type(e).__name__}: {e}"
                print(f"{key}: llama.cpp's converter: {type(e).__name__}: {e}")
                if args.ours:
                    found = {t: read(args.ours / key / f"mmproj-{t}.gguf") for t in FILE_TYPES}
                    record |= {"kv": found["f16"][0], "tensors": {t: f[1] for t, f in found.items()}}
            write(record_path, {k: v for k, v in record.items() if v})


def write(path, record):
    """JSON with one line a tensor or key."""
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            inner = []
            for k, v in value.items():
                if isinstance(v, dict) and key == "tensors":
                    rows = ",\n".join(f"    {json.dumps(a)}: {json.dumps(b)}" for a, b in v.items())
                    inner.append(f"  {json.dumps(k)}: {{\n{rows}\n  }}")
                else:
                    inner.append(f"  {json.dumps(k)}: {json.dumps(v)}")
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


main()
