"""Packed tensors as the libraries themselves decode them, in F32.

`decoded(tensors, quantization)` gives all tensors of a checkpoint by their ordinary names. Arithmetic is that of
the libraries, with scales made F32 before, where a library would compute in the scales' type.
"""

import torch


def under(tensors: dict, stem: str) -> dict:
    """The parts of a module, by what follows its name."""
    return {name[len(stem) + 1:]: t for name, t in tensors.items() if name.startswith(stem + ".")}


def gptq(parts: dict, quantization: dict) -> torch.Tensor:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits = quantization["bits"]
    inputs, outputs = parts["qweight"].shape[0] * 32 // bits, parts["qweight"].shape[1]
    linear = TorchLinear(bits=bits, group_size=quantization["group_size"], sym=quantization.get("sym", True),
                         desc_act=quantization.get("desc_act", False), in_features=inputs, out_features=outputs,
                         bias=False, register_buffers=True)
    linear.load_state_dict({k: t for k, t in parts.items() if k != "bias"}, strict=False)
    if quantization.get("checkpoint_format", "gptq") == "gptq":
        convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.scales = linear.scales.float()
    return super(TorchLinear, linear).dequantize_weight().T


def awq(parts: dict, quantization: dict) -> torch.Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    size = quantization["group_size"]
    size = parts["qweight"].shape[0] if size == -1 else size
    return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), quantization["bits"], size).T


def auto_round(parts: dict, quantization: dict) -> torch.Tensor:
    if quantization["packing_format"] == "auto_round:auto_awq":
        return awq(parts, quantization)
    return gptq(parts, quantization)


def bitsandbytes(parts: dict, _: dict) -> torch.Tensor:
    import bitsandbytes.functional as functional

    if "SCB" in parts:
        return functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    state = {name: t for name, t in parts.items() if name.startswith("weight.")}
    state = functional.QuantState.from_dict(state, device=torch.device("cpu"))
    state.dtype = torch.float32
    return functional.dequantize_4bit(parts["weight"], state)


def compressed_tensors(parts: dict, quantization: dict) -> torch.Tensor:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group, = quantization["config_groups"].values()
    scheme = QuantizationScheme(**{k: v for k, v in group.items() if k != "format"})
    compressor = BaseCompressor.get_value_from_registry(group.get("format") or quantization["format"])
    if "weight_packed" in parts and parts["weight_packed"].dtype == torch.uint8:
        return fp4(parts, scheme, compressor)
    floats = {k: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for k, t in parts.items()}
    return compressor.decompress(floats, scheme)["weight"].float()


def fp4(parts: dict, scheme, compressor) -> torch.Tensor:
    """The compressor's steps, without its rounding of weights to BF16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, packed = parts["weight_packed"].shape
    codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, packed * 2, torch.float32)
    scales = compressor._decompress_scale(parts["weight_scale"], torch.float32)
    return dequantize(x_q=codes, scale=scales, args=scheme.weights, dtype=torch.float32,
                      global_scale=parts.get("weight_global_scale"))


def fp8(parts: dict, _: dict) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[expert, in, out]`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def bitnet(parts: dict, quantization: dict) -> torch.Tensor:
    """What the layer does to the rows of the identity: activations quantized to 127 are exact."""
    from transformers.integrations.bitnet import AutoBitLinear, unpack_weights

    weight = unpack_weights(parts["weight"], torch.float32)
    if quantization.get("linear_class") != "autobitlinear":
        return weight / parts["weight_scale"].float()
    layer = AutoBitLinear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    layer.weight_scale = parts["weight_scale"].float()
    with torch.no_grad():
        return layer(torch.eye(weight.shape[1])).T


def modelopt(parts: dict, _: dict) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    rows, packed = parts["weight"].shape
    weight = NVFP4QTensor(torch.Size((rows, packed * 2)), torch.float32, parts["weight"])
    return weight.dequantize(dtype=torch.float32, scale=parts["weight_scale"], double_scale=parts["weight_scale_2"],
                             block_sizes={-1: 16})


# The tensor that each module has, by method, and what decodes the module.
METHODS = {
    "gptq": (("qweight",), gptq),
    "awq": (("qweight",), awq),
    "auto-round": (("qweight",), auto_round),
    "bitsandbytes": (("weight.quant_map", "SCB"), bitsandbytes),
    "compressed-tensors": (("weight_scale",), compressed_tensors),
    "fp8": (("weight_scale_inv",), fp8),
    "bitnet": (("weight_scale",), bitnet),
    "modelopt": (("weight_scale_2",), modelopt),
}


def decoded(tensors: dict, quantization: dict) -> dict[str, torch.Tensor]:
    """All tensors in F32, by the names that the unquantized model has."""
    rest, found = dict(tensors), {}
    if quantization["quant_method"] == "mxfp4":
        for name in [name for name in tensors if name.endswith("_blocks")]:
            stem = name.removesuffix("_blocks")
            found[stem] = mxfp4(rest.pop(name), rest.pop(stem + "_scales"))
    else:
        marks, decode = METHODS[quantization["quant_method"]]
        for mark in marks:
            for stem in [name.removesuffix("." + mark) for name in tensors if name.endswith("." + mark)]:
                parts = under(tensors, stem)
                found[stem + ".weight"] = decode(parts, quantization)
                rest = {k: t for k, t in rest.items() if not k.startswith(stem + ".") or k == stem + ".bias"}
    return {name: t.float() for name, t in (rest | found).items()}
