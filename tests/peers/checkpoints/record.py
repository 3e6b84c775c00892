"""Writes fixtures/packed: matrices and models that the libraries quantized, and what they decode them to.

    record.py

A llama of one layer is quantized by each example of make.py. NAME.safetensors holds the parts of one matrix, called
`p` instead of its module, and `expected`, the matrix in F32. The metadata hold config.json's quantization_config
and the library. base.safetensors and model-NAME.safetensors together are whole models, with the logits that
transformers computes in F32 from the weights that the library decodes.
"""

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from decode import decoded, under
from directory import MODELS, config, fixture, tensors, write
from make import EXAMPLES, make

TO = MODELS / "packed"
MODULE = "model.layers.0.self_attn.k_proj"
# Rows of one group in a matrix of 64 columns.
LEFT_OUT = ["gptq4-g128", "awq-sym-g128"]
WHOLE = ["awq", "nf4-nested", "pack4-asym"]
LIBRARIES = {"gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto-round", "bitsandbytes": "bitsandbytes",
             "compressed-tensors": "compressed-tensors", "mxfp4": "gguf", "modelopt": "nvidia-modelopt"}


def llama(to: Path) -> None:
    torch.manual_seed(7)
    settings = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    model = transformers.LlamaForCausalLM(settings).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.1 * torch.randn_like(p))
    model.save_pretrained(to)
    for file in fixture("llama").glob("token*"):
        shutil.copy(file, to)


def metadata(quantization: dict) -> dict[str, str]:
    library = LIBRARIES.get(quantization["quant_method"], "transformers")
    return {"quantization_config": json.dumps(quantization),
            "library": f"{library} {importlib.metadata.version(library)}"}


def save(name: str, found: dict, more: dict) -> None:
    save_file({k: t.contiguous() for k, t in found.items()}, TO / f"{name}.safetensors", metadata=more)


def logits(like: Path, found: dict, tmp: Path) -> dict:
    write(tmp, like, found, None, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {"input_ids": ids, "logits": model(ids).logits[0].float()}


def main() -> None:
    shutil.rmtree(TO, ignore_errors=True)
    TO.mkdir()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        llama(tmp / "llama")
        plain = tensors(tmp / "llama")
        save("base", {k: t for k, t in plain.items() if "_proj" not in k}, {})
        shutil.copy(tmp / "llama/config.json", TO)
        for name in [name for name in EXAMPLES if name not in LEFT_OUT]:
            make(name, tmp / "llama", tmp / name)
            quantization, stored = config(tmp / name)["quantization_config"], tensors(tmp / name)
            values = decoded(stored, quantization)
            parts = {f"p.{k}": t for k, t in under(stored, MODULE).items()}
            save(name, parts | {"expected": values[MODULE + ".weight"]}, metadata(quantization))
            if name in WHOLE:
                packed = {k: t for k, t in stored.items() if "_proj" in k}
                save("model-" + name, packed | logits(tmp / "llama", values, tmp / f"{name}-plain"),
                     metadata(quantization))
        make("mxfp4", fixture("gpt_oss"), tmp / "mxfp4")
        stored, module = tensors(tmp / "mxfp4"), "model.layers.0.mlp.experts.down_proj"
        parts = {f"p{k}": stored[module + k][:2, :32] for k in ("_blocks", "_scales")}
        values = decoded(parts, {"quant_method": "mxfp4"})["p"].transpose(1, 2)
        save("mxfp4", parts | {"expected": values}, metadata({"quant_method": "mxfp4"}))


if __name__ == "__main__":
    main()
