"""Makes a fixture of a model that ARCHITECTURES.py left in QCONV_PEERS_DIR.

record.py LLAMA_CPP FOLDER NAME, from the repository's root: the checkpoint goes to fixtures/models/NAME,
with the first twenty tokens of the reference, and what llama.cpp's converter makes of it to
fixtures/expect/NAME.json.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from ARCHITECTURES import contents, run_converter

TOKENS = 20


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def entry(kinds, value):
    """A metadata entry: long lists and long strings as their hash."""
    if kinds[0] == "ARRAY":
        if len(value) <= 24:
            return {"array": kinds[1], "value": value}
        return {"array": kinds[1], "len": len(value), "sha256": sha256(json.dumps(value).encode())}
    if kinds[0] == "STRING" and len(value) > 160:
        return {"type": "STRING", "len": len(value), "sha256": sha256(value.encode())}
    return {"type": kinds[0], "value": value}


def main():
    tree, source, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    model = Path("fixtures/models") / name
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(source / "micro", model)
    recorded = load_file(model / "reference_logits.safetensors")
    save_file({k: v[:TOKENS].clone() for k, v in recorded.items()}, model / "reference_logits.safetensors")
    output = source / f"{name}.gguf"
    run_converter(tree, model, output, "smollm", "MOSTLY_BF16")
    tensors, fields = contents(output)
    expected = {
        "converts_by_reference": True,
        "pre_forced": "smollm",
        "soft_kv": ["tokenizer.ggml.pre"],
        "tensors": {n: [list(shape), kind, sha256(data)] for n, (shape, kind, data) in sorted(tensors.items())},
        "kv": {k: entry(*field) for k, field in sorted(fields.items())},
    }
    Path(f"fixtures/expect/{name}.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(name, sum(f.stat().st_size for f in model.iterdir()), "bytes,", len(tensors), "tensors")


if __name__ == "__main__":
    main()
