"""What the libraries' own packers make of the weights that a directory of ours means.

`differences(directory, source)` lists the tensors whose bytes are not those of the library.
"""

from pathlib import Path

import torch

from decode import METHODS, decoded, under
from directory import config, tensors


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def sizes(weight: torch.Tensor, quantization: dict) -> dict:
    size = quantization["group_size"]
    return {"bits": quantization["bits"], "group_size": weight.shape[1] if size == -1 else size,
            "in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False}


def gptq(parts: dict, weight: torch.Tensor, _, quantization: dict) -> dict:
    """GPTQModel packs weights by scales and zeros; the zeros are read from our words, a field after another."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    bits, version = quantization["bits"], quantization["checkpoint_format"]
    stream = (parts["qzeros"].long().unsqueeze(-1) >> torch.arange(32)) & 1
    fields = stream.reshape(stream.shape[0], -1, bits) << torch.arange(bits)
    zeros = fields.sum(-1) + (version == "gptq")
    packer = TorchLinear(sym=quantization["sym"], desc_act=quantization["desc_act"], **sizes(weight, quantization))
    packer.pack_original(linear(weight), parts["scales"].float().T, zeros.float().T, parts["g_idx"])
    if version == "gptq":
        settings = QuantizeConfig(bits=bits, group_size=quantization["group_size"], sym=quantization["sym"],
                                  offload_to_disk=False)
        convert_gptq_v2_to_v1_format_module(packer, settings)
    return {k: getattr(packer, k) for k in ("qweight", "qzeros", "scales", "g_idx")}


def awq(parts: dict, weight: torch.Tensor, _, quantization: dict) -> dict:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import reverse_awq_order, unpack_awq

    zeros, _ = reverse_awq_order(*unpack_awq(parts["qzeros"], None, 4), 4)
    packer = AwqTorchLinear(sym=False, desc_act=False, **sizes(weight, quantization))
    packer.pack(linear(weight), parts["scales"].float().T, (zeros & 15).float().T)
    return {k: getattr(packer, k) for k in ("qweight", "qzeros")} | {"scales": packer.scales.half()}


def bitsandbytes(parts: dict, _, source: torch.Tensor, quantization: dict) -> dict:
    """From the source: codes and scales are the library's choice as well.

    Its FP4 has two codes for 0, of which its CPU kernel takes the second for positive weights, and that for GPUs for
    negative ones. Its CPU kernel for the scales of scales does not always take the next code.
    """
    import bitsandbytes.functional as functional

    if "SCB" in parts:
        codes, scales, _ = functional.int8_vectorwise_quant(source.half())
        return {"weight": codes, "SCB": scales}
    codes, state = functional.quantize_4bit(
        source, blocksize=64, quant_type=quantization["bnb_4bit_quant_type"],
        compress_statistics=quantization["bnb_4bit_use_double_quant"])
    found = {f"weight.{k}": t for k, t in state.as_dict(packed=True).items() if not k.startswith("quant_state")}
    if quantization["bnb_4bit_quant_type"] == "fp4":
        low, high = ((codes >> shift) & 15 for shift in (0, 4))
        codes = low.masked_fill(low == 8, 0) | high.masked_fill(high == 8, 0) << 4
    if "weight.nested_absmax" in found:
        theirs, ours = found.pop("weight.absmax").int(), parts["weight.absmax"].int()
        assert (theirs - ours).abs().max() <= 1 and (theirs != ours).float().mean() < 0.05
    return found | {"weight": codes}


def compressed_tensors(parts: dict, weight: torch.Tensor, _, quantization: dict) -> dict:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme

    group, = quantization["config_groups"].values()
    scheme = QuantizationScheme(**{k: v for k, v in group.items() if k != "format"})
    given = {"weight": weight, "weight_scale": parts["weight_scale"].float()}
    if (zeros := parts.get("weight_zero_point")) is not None:
        shape = torch.Size((weight.shape[0], zeros.shape[1]))
        is_packed = zeros.dtype == torch.int32
        given["weight_zero_point"] = (
            unpack_from_int32(zeros, scheme.weights.num_bits, shape, packed_dim=0) if is_packed else zeros)
    found = BaseCompressor.get_value_from_registry(quantization["format"]).compress(given, scheme)
    return {k: t for k, t in found.items() if k != "weight_scale"}


PACKERS = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes, "compressed-tensors": compressed_tensors}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a).equal(bytes_of(b))


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def differences(directory: Path, source: Path) -> tuple[int, list[str]]:
    """How many matrices were packed, and which tensors differ."""
    quantization, stored, plain = config(directory)["quantization_config"], tensors(directory), tensors(source)
    method = quantization["quant_method"]
    values = decoded(stored, quantization)
    marks, _ = METHODS[method]
    stems = [name.removesuffix("." + mark) for name in stored for mark in marks if name.endswith("." + mark)]
    found = []
    for stem in stems:
        parts = under(stored, stem)
        theirs = PACKERS[method](parts, values[stem + ".weight"], plain[stem + ".weight"].float(), quantization)
        for suffix, t in theirs.items():
            ours = parts.get(suffix)
            if ours is None or not same_bytes(ours, t):
                part = "" if ours is None or ours.shape != t.shape else (
                    f" ({(bytes_of(ours) != bytes_of(t)).float().mean():.1%} of its bytes)"
                    if ours.dtype == t.dtype else f" ({ours.dtype}, {t.dtype})")
                found.append(f"{stem}.{suffix}{part}")
    return len(stems), found
