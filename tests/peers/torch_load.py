"""Reads PyTorch files that qconv wrote with torch itself, and compares them with safetensors files.

torch_load.py PYTORCH_DIR [SAFETENSORS_DIR]: every *.bin of the first is loaded with weights_only,
read whole and mapped; the archive is held to zipfile, its pickle to what torch.save makes of the
same tensors, byte for byte. The tensors have to be those of the second, bit for bit.
"""

import io
import json
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, after everything that can be held against it alone."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, f"{path}: a checksum is wrong"
        pickle = archive.read(f"{path.stem}/data.pkl")
    tensors = torch.load(path, weights_only=True)
    assert type(tensors) is OrderedDict, type(tensors)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert list(mapped) == list(tensors)
    assert all(same(mapped[name], t) for name, t in tensors.items()), path
    saved = io.BytesIO()
    torch.save(OrderedDict((name, t.clone()) for name, t in tensors.items()), saved)
    with zipfile.ZipFile(saved) as archive:
        assert pickle == archive.read("archive/data.pkl"), f"{path}: its pickle is not torch's"
    return tensors


def main() -> None:
    ours = Path(sys.argv[1])
    files = sorted(ours.glob("*.bin"))
    assert files, f"{ours}: holds no *.bin"
    found, places = {}, {}
    for path in files:
        tensors = load(path)
        assert not found.keys() & tensors.keys(), "a tensor is in two files"
        found |= tensors
        places |= dict.fromkeys(tensors, path.name)
    if len(files) > 1:
        index = json.loads((ours / "pytorch_model.bin.index.json").read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    if len(sys.argv) > 2:
        expected = {}
        for path in sorted(Path(sys.argv[2]).glob("model*.safetensors")):
            expected |= load_file(path)
        assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
        for name, t in expected.items():
            assert same(found[name], t), name
    print(f"{ours}: torch {torch.__version__} reads the {len(found)} tensors of {len(files)} files")


main()
