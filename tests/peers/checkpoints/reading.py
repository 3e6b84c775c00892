"""Checkpoints that the libraries made give the values that the libraries decode, exactly.

    reading.py QCONV [EXAMPLE ...]

Each example of make.py is converted to GGUF in F32, and so is the plain model of the weights that the library
itself decodes (decode.py). The two files hold the same bytes.
"""

import sys
import tempfile
import traceback
from pathlib import Path

import gguf
import numpy as np

from decode import decoded
from directory import config, fixture, tensors, write
from make import EXAMPLES, make
from run import qconv

SOURCES = {"mxfp4": ["gpt_oss"]}
# Whose experts are matrices of their own in the file: what packs each matrix packs them too.
EXPERTS = ["gptq4", "awq", "pack4", "fp8-block"]


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: t.data for t in gguf.GGUFReader(path).tensors}


def compared(binary: str, name: str, model: str, tmp: Path, damaged=False) -> str:
    """How much the two files differ; empty where they do not."""
    packed, plain = tmp / "packed", tmp / "plain"
    make(name, fixture(model), packed)
    stored = tensors(packed)
    found = decoded(stored, config(packed)["quantization_config"])
    assert len(found) < len(stored), "nothing is packed"
    if damaged:
        name = next(k for k in sorted(found) if "o_proj" in k)
        found[name][3, 5] += found[name].abs().max() * 2**-20
    write(plain, packed, found, None, "float32")
    files = []
    for directory in (packed, plain):
        files.append(tmp / f"{directory.name}.gguf")
        qconv(binary, "hf-to-gguf", directory, "-t", "f32", "--no-verify", "-o", files[-1])
    ours, theirs = map(values, files)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    worst = {k: np.abs(ours[k].astype(np.float64) - theirs[k]).max() / np.abs(theirs[k]).max()
             for k in ours if not np.array_equal(ours[k], theirs[k])}
    if not worst:
        return ""
    name = max(worst, key=worst.get)
    return f"{len(worst)} of {len(ours)} tensors differ, {name} by {worst[name]:.2e} of its greatest"


def main() -> None:
    binary, names = sys.argv[1], sys.argv[2:] or [*EXAMPLES, "mxfp4"]
    failed = []
    for name in names:
        for model in SOURCES.get(name, ["llama", "qwen3"] + ["mixtral"] * (name in EXPERTS)):
            with tempfile.TemporaryDirectory() as tmp:
                try:
                    found = compared(binary, name, model, Path(tmp))
                except Exception:
                    found = traceback.format_exc()
            print(f"{'FAILED' if found else 'equal '} {name} of {model} {found}", flush=True)
            failed += [name] * bool(found)
    with tempfile.TemporaryDirectory() as tmp:
        control = compared(binary, "gptq4", "llama", Path(tmp), damaged=True)
    assert control.startswith("1 of "), f"one weight was changed a little, and this was found: {control!r}"
    if failed:
        sys.exit(f"{len(failed)} examples are read otherwise than by the library that made them")


if __name__ == "__main__":
    main()
