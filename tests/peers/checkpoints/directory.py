"""Directories of models: their tensors, config.json, and what quantizing leaves out."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODELS = Path(__file__).resolve().parents[3] / "fixtures"


def fixture(name: str) -> Path:
    """tiny-llama, or one of fixtures/models."""
    return MODELS / name if name == "tiny-llama" else MODELS / "models" / name


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards of safetensors."""
    files = sorted(directory.glob("model*.safetensors"))
    assert files, f"{directory} has no safetensors"
    return {name: t for file in files for name, t in load_file(file).items()}


def is_quantized(name: str, t: torch.Tensor) -> bool:
    """Whether quantizing takes this weight: not embeddings, the head, norms and routers."""
    left_out = ("embed_tokens", "lm_head", "norm", "router", "block_sparse_moe.gate.", "mlp.gate.")
    return t.ndim == 2 and name.endswith(".weight") and not any(part in name for part in left_out)


def write(directory: Path, like: Path, tensors: dict[str, torch.Tensor], quantization: dict | None, dtype="bfloat16"):
    """A model of these tensors, with config.json and tokenizer of `like`."""
    directory.mkdir(parents=True)
    for file in like.iterdir():
        if "token" in file.name or file.name == "generation_config.json":
            shutil.copy(file, directory)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    values = config(like) | {"dtype": dtype}
    values.pop("quantization_config", None)
    if quantization is not None:
        values["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(values, indent=2))
