"""Models that the hqq library quantized and saved give the values that it decodes, exactly.

    hqq_models.py QCONV

Each model is saved in the library's own form (qmodel.pt) and as a state dict in safetensors, which is what transformers
writes; both are converted to GGUF in F32, and so is the plain model of the weights that the library decodes
in F32. The three files hold the same tensors.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM

from directory import fixture, write
from run import qconv

# Bits, group size, axis, whether codes are called floats.
CASES = [(8, 32, 1, False), (4, 64, 1, False), (4, 16, 0, True), (3, 32, 1, False), (3, 16, 0, False),
         (2, 16, 1, True), (1, 8, 1, False)]


def decoded(module: HQQLinear) -> torch.Tensor:
    meta = dict(module.meta, compute_dtype=torch.float32)
    meta["scale"], meta["zero"] = meta["scale"].float(), meta["zero"].float()
    return Quantizer.dequantize(module.W_q.data, meta)


def make(name: str, case: tuple, dtype: torch.dtype, tmp: Path) -> list[Path]:
    """The plain model, and the quantized one in both forms."""
    bits, group, axis, floats = case
    model = AutoModelForCausalLM.from_pretrained(fixture(name), dtype=dtype)
    settings = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=floats)
    AutoHQQHFModel.quantize_model(model, quant_config=settings, compute_dtype=dtype, device="cpu")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, HQQLinear)}
    assert len(modules) >= 14, modules.keys()
    encoded = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    rest = {k: v for k, v in encoded.items() if k.rpartition(".")[0] not in modules or k.endswith(".bias")}
    directories = [tmp / form for form in ("plain", "encoded", "own")]
    plain, hf, own = directories
    write(plain, fixture(name), rest | {f"{n}.weight": decoded(m) for n, m in modules.items()}, None, "float32")
    write(hf, fixture(name), encoded, {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]})
    own.mkdir()
    AutoHQQHFModel.save_quantized(model, str(own))
    for file in fixture(name).glob("token*"):
        shutil.copy(file, own)
    return directories


def main() -> None:
    for name in ("llama", "qwen3"):
        for case in CASES:
            for dtype in (torch.float16, torch.bfloat16):
                with tempfile.TemporaryDirectory() as tmp:
                    found = []
                    for directory in make(name, case, dtype, Path(tmp)):
                        file = Path(tmp) / f"{directory.name}.gguf"
                        qconv(sys.argv[1], "hf-to-gguf", directory, "-t", "f32", "--no-verify", "-o", file)
                        found.append({t.name: t.data for t in gguf.GGUFReader(file).tensors})
                    plain, *packed = found
                    for ours in packed:
                        assert ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
                        wrong = [k for k in plain if not np.array_equal(plain[k], ours[k])]
                        assert not wrong, (name, case, dtype, wrong)
                print(f"equal  hqq {case} {dtype} of {name}", flush=True)


main()
