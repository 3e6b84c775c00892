"""PyTorch files that qconv wrote, read by torch itself.

    pytorch.py QCONV

Models are converted to PyTorch and to safetensors. Every *.bin is loaded with weights_only, read whole and
mapped; the archive is held to zipfile, its pickle to what torch.save makes of the same tensors, byte for byte.
The tensors are those of safetensors, bit for bit, and transformers computes the same logits.
"""

import io
import json
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from directory import fixture, tensors
from run import qconv


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, after everything that can be held against it alone."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, f"{path}: a checksum is wrong"
        pickle = archive.read(f"{path.stem}/data.pkl")
    found = torch.load(path, weights_only=True)
    assert type(found) is OrderedDict, type(found)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert list(mapped) == list(found)
    assert all(same(mapped[name], t) for name, t in found.items()), path
    saved = io.BytesIO()
    torch.save(OrderedDict((name, t.clone()) for name, t in found.items()), saved)
    with zipfile.ZipFile(saved) as archive:
        assert pickle == archive.read("archive/data.pkl"), f"{path}: its pickle is not torch's"
    return found


def check(ours: Path, plain: Path) -> int:
    """How many tensors torch reads, all as in the safetensors of `plain`."""
    files = sorted(ours.glob("*.bin"))
    found, places = {}, {}
    for path in files:
        of_file = load(path)
        assert not found.keys() & of_file.keys(), "a tensor is in two files"
        found |= of_file
        places |= dict.fromkeys(of_file, path.name)
    assert len(files) > 1, f"{ours}: one file"
    index = json.loads((ours / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    expected = tensors(plain)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    for name, t in expected.items():
        assert same(found[name], t), name
    return len(found)


def logits(directory: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.arange(64).reshape(2, 32) * 7 % 500
    with torch.no_grad():
        return model.eval()(ids).logits


def main() -> None:
    for name in ("llama", "qwen3", "mixtral"):
        with tempfile.TemporaryDirectory() as tmp:
            ours, plain = Path(tmp) / "pytorch", Path(tmp) / "safetensors"
            qconv(sys.argv[1], "convert", fixture(name), "--to", "pytorch", "--max-shard-size", "200K", "-o", ours)
            qconv(sys.argv[1], "convert", fixture(name), "--to", "safetensors", "-o", plain)
            count = check(ours, plain)
            assert torch.equal(logits(ours), logits(plain)), name
        print(f"equal  the {count} tensors of {name}, and its logits, as torch reads them", flush=True)


main()
