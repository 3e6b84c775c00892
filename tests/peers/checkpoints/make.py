"""Examples of quantized checkpoints, made by the libraries whose formats they are.

`EXAMPLES` maps a name to a function of a plain model's directory and the directory to write.
"""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from directory import config, is_quantized, tensors, write

IGNORED = ["lm_head"]


def each(source: Path, to: Path, quantization: dict, pack, dtype="bfloat16"):
    """Writes the model, its weights replaced by what `pack` makes of each: parts by their suffixes."""
    found = {}
    for name, t in tensors(source).items():
        if is_quantized(name, t):
            stem = name.removesuffix(".weight")
            found |= {f"{stem}.{suffix}": part for suffix, part in pack(t.float()).items()}
        else:
            found[name] = t
    write(to, source, found, quantization, dtype)


def lines(weight: torch.Tensor, bits: int, group: int, symmetric: bool):
    """Scales and zeros `[rows, groups]`, by the least and the greatest weight of each group, and the groups."""
    rows, cols = weight.shape
    group = cols if group == -1 else group
    blocks = weight.reshape(rows, cols // group, group)
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    most = 2**bits - 1
    scales = (torch.maximum(-low, high) * 2 if symmetric else high - low) / most
    scales = scales.clamp(min=1e-6).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(1, most)
    return scales, zeros, torch.arange(cols) // group


def gptq(bits=4, group=128, symmetric=True, version="gptq", act_order=False):
    """GPTQModel's packer; the order of groups as if columns had been sorted by their activations."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    settings = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, desc_act=act_order, format=version,
                              offload_to_disk=False)

    def pack(weight):
        scales, zeros, groups = lines(weight, bits, group, symmetric)
        if act_order:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        packed = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=act_order,
                             in_features=weight.shape[1], out_features=weight.shape[0], bias=False)
        packed.pack_original(linear, scales, zeros, groups.int())
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, settings)
        return {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales", "g_idx")}

    return lambda source, to: each(source, to, json.loads(json.dumps(settings.to_dict(), default=str)), pack)


def awq(group=128, symmetric=False):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def pack(weight):
        scales, zeros, _ = lines(weight, 4, group, symmetric)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        size = weight.shape[1] if group == -1 else group
        packed = AwqTorchLinear(bits=4, group_size=size, sym=symmetric, desc_act=False, in_features=weight.shape[1],
                                out_features=weight.shape[0], bias=False)
        packed.pack(linear, scales.half(), zeros)
        return {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales")}

    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not symmetric,
                    "version": "gemm", "modules_to_not_convert": None}
    return lambda source, to: each(source, to, quantization, pack)


def bitsandbytes(**settings):
    """Loaded by transformers, quantized by bitsandbytes on the way, and saved."""
    import transformers

    def make(source, to):
        quantization = transformers.BitsAndBytesConfig(**settings)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization,
                                                                  device_map="cpu", dtype=torch.float16)
        model.save_pretrained(to)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(to)

    return make


def compressed(layout: str, **weights):
    """compressed-tensors' compressors, each module by itself."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    strategy = str(args.strategy)

    def ends(weight):
        if strategy == "tensor":
            return weight.amin().reshape(1), weight.amax().reshape(1)
        if strategy == "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        if strategy == "block":
            high, wide = args.block_structure
            blocks = weight.reshape(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
            return blocks.amin((1, 3)), blocks.amax((1, 3))
        groups = weight.reshape(weight.shape[0], -1, args.group_size)
        return groups.amin(2), groups.amax(2)

    def pack(weight):
        parts = {"weight": weight}
        factor = {}
        if strategy == "tensor_group":
            factor["global_scale"] = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
            parts["weight_global_scale"] = factor["global_scale"]
        scales, zeros = calculate_qparams(*ends(weight), args, **factor)
        is_float = layout.startswith(("mxfp4", "nvfp4"))
        parts["weight_scale"] = scales if is_float else scales.bfloat16().float()
        if not args.symmetric:
            parts["weight_zero_point"] = zeros.round().to(torch.int8)
        if args.actorder == "group":
            groups = torch.arange(weight.shape[1], dtype=torch.int32) // args.group_size
            parts["weight_g_idx"] = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))]
        parts = BaseCompressor.get_value_from_registry(layout).compress(parts, scheme)
        if not is_float:
            parts["weight_scale"] = parts["weight_scale"].bfloat16()
        return parts

    settings = QuantizationConfig(config_groups={"group_0": scheme}, quant_method="compressed-tensors",
                                  format=layout, quantization_status="compressed", ignore=IGNORED)
    return lambda source, to: each(source, to, settings.model_dump(mode="json"), pack)


def fp8(block=None, scale_fmt=None):
    """transformers' own quantizer of FP8."""
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt or "float",
                                    modules_to_not_convert=IGNORED)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def pack(weight):
        return quantizer.convert({"weight": weight})

    return lambda source, to: each(source, to, settings.to_dict(), pack)


def mxfp4(source, to):
    """gguf-py's quantizer of MXFP4, its blocks in the order of gpt-oss."""
    import gguf

    found = {}
    for name, t in tensors(source).items():
        if t.ndim == 3:
            rows = t.float().transpose(1, 2).contiguous().numpy()
            blocks = torch.from_numpy(gguf.quants.quantize(rows, gguf.GGMLQuantizationType.MXFP4))
            blocks = blocks.reshape(*blocks.shape[:-1], -1, 17)
            low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
            codes = torch.cat([low, high], -1)
            found[name + "_scales"] = blocks[..., 0]
            found[name + "_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        else:
            found[name] = t
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write(to, source, found, {"quant_method": "mxfp4", "modules_to_not_convert": left_out})


def bitnet(linear_class="bitlinear"):
    """transformers' packer of BitNet, the scale being the reciprocal of what weights are, or what they are."""
    from transformers.integrations.bitnet import pack_weights

    def pack(weight):
        scale = 1 / weight.abs().mean()
        trits = (weight * scale).round().clamp(-1, 1)
        scale = scale if linear_class == "bitlinear" else 1 / scale
        return {"weight": pack_weights(trits), "weight_scale": scale.reshape(1).bfloat16()}

    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline",
                    "modules_to_not_convert": IGNORED}
    return lambda source, to: each(source, to, quantization, pack)


def modelopt():
    """ModelOpt's tensors of NVFP4."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def pack(weight):
        packed, scales, factor = NVFP4QTensor.quantize(weight, 16)
        return {"weight": packed._quantized_data, "weight_scale": scales, "weight_scale_2": factor}

    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": IGNORED}
    return lambda source, to: each(source, to, quantization, pack)


def auto_round(layout: str):
    """AutoRound without rounds: nearest codes, packed and saved by its own exporter."""
    import transformers
    from auto_round import AutoRound

    def make(source, to):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        rounder = AutoRound(model, tokenizer, bits=4, group_size=32, sym=layout != "auto_round:auto_awq", iters=0,
                            nsamples=1, seqlen=16, device_map="cpu", disable_opt_rtn=True)
        with tempfile.TemporaryDirectory() as tmp:
            rounder.quantize_and_save(tmp, format=layout)
            found, = Path(tmp).glob("**/config.json")
            shutil.copytree(found.parent, to)

    return make


def as_gptqmodel_names(directory: Path):
    """Experts of Mixtral under the names that GPTQModel gives them."""
    names = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    found = {}
    for name, t in tensors(directory).items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = t
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})


INT = {"type": "int", "observer": "minmax"}

EXAMPLES = {
    **{f"gptq{bits}{'' if s else '-asym'}{'-v2' if v else ''}": (gptq, (bits, 32, s, "gptq_v2" if v else "gptq"), {})
       for bits in (2, 3, 4, 8) for s in (True, False) for v in (False, True)},
    "gptq4-g128": (gptq, (4, 128), {}),
    "gptq4-row": (gptq, (4, -1), {}),
    "gptq4-act": (gptq, (4, 32), {"act_order": True}),
    "gptq3-asym-act": (gptq, (3, 32, False), {"act_order": True}),
    "awq": (awq, (32,), {}),
    "awq-sym-g128": (awq, (128, True), {}),
    "nf4": (bitsandbytes, (), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4-nested": (bitsandbytes, (), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                      "bnb_4bit_use_double_quant": True}),
    "nf4-storage": (bitsandbytes, (), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                       "bnb_4bit_quant_storage": torch.bfloat16}),
    "fp4": (bitsandbytes, (), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "fp4-nested": (bitsandbytes, (), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
                                      "bnb_4bit_use_double_quant": True}),
    "int8": (bitsandbytes, (), {"load_in_8bit": True}),
    **{f"pack{bits}{'' if s else '-asym'}": (compressed, ("pack-quantized",), {
        **INT, "num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": s})
       for bits in (2, 3, 4, 5, 8) for s in (True, False)},
    "pack4-channel": (compressed, ("pack-quantized",), {**INT, "num_bits": 4, "strategy": "channel"}),
    "int-channel": (compressed, ("int-quantized",), {**INT, "num_bits": 8, "strategy": "channel"}),
    "int-asym": (compressed, ("int-quantized",), {**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int-tensor": (compressed, ("int-quantized",), {**INT, "num_bits": 8, "strategy": "tensor"}),
    "int4-bytes": (compressed, ("int-quantized",), {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}),
    "naive-group": (compressed, ("naive-quantized",), {**INT, "num_bits": 8, "strategy": "group", "group_size": 32}),
    "float-channel": (compressed, ("float-quantized",), {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float-tensor": (compressed, ("float-quantized",), {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float-block": (compressed, ("float-quantized",), {"num_bits": 8, "type": "float", "strategy": "block",
                                                       "block_structure": [16, 32]}),
    "nvfp4": (compressed, ("nvfp4-pack-quantized",), {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                                                      "group_size": 16, "scale_dtype": torch.float8_e4m3fn}),
    "mxfp4-linear": (compressed, ("mxfp4-pack-quantized",), {"num_bits": 4, "type": "float", "strategy": "group",
                                                             "group_size": 32, "scale_dtype": torch.uint8}),
    "fp8-block": (fp8, ((16, 32),), {}),
    "fp8-ue8m0": (fp8, ((16, 32), "ue8m0"), {}),
    "fp8-tensor": (fp8, (), {}),
    "bitnet": (bitnet, (), {}),
    "bitnet-auto": (bitnet, ("autobitlinear",), {}),
    "modelopt-nvfp4": (modelopt, (), {}),
    "auto-round": (auto_round, ("auto_round",), {}),
    "auto-round-gptq": (auto_round, ("auto_gptq",), {}),
    "auto-round-awq": (auto_round, ("auto_round:auto_awq",), {}),
}

# Versions of compressed-tensors before 0.20 have an order of groups.
if not version("compressed-tensors").startswith("0.2"):
    EXAMPLES["pack4-act"] = (compressed, ("pack-quantized",), {
        **INT, "num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"})


def make(name: str, source: Path, to: Path):
    if config(source)["model_type"] == "gpt_oss":
        return mxfp4(source, to)
    maker, args, settings = EXAMPLES[name]
    maker(*args, **settings)(source, to)
    if name.startswith("gptq") and config(source)["model_type"] == "mixtral":
        as_gptqmodel_names(to)
