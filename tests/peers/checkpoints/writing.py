"""What `qconv convert` writes loads in the libraries, and computes what we say we wrote.

    writing.py QCONV [CASE ...]

Of each case and model: transformers loads the directory on a CPU and reports nothing missing or unknown; its logits
are those of the weights that qconv itself decodes (`--to safetensors --dtype f32` of what it wrote), and not those
of the source; the library's own arithmetic gives the same weights exactly, and its own packer the same bytes.
"""

import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from client import Unfit, compared, int8_modules
from decode import decoded
from directory import config, fixture, tensors
from packers import PACKERS, differences
from run import qconv

DENSE = ("llama", "qwen3", "tiny-llama")
ALL = (*DENSE, "mixtral")
# With biases as well.
BIASES = (*ALL, "qwen2")


@dataclass
class Case:
    """Arguments of qconv convert, models, and how far logits may be off, in parts of their standard deviation."""
    to: str
    tolerance: float
    models: tuple[str, ...] = ALL
    # Whether experts are quantized as well: transformers has room for them in some formats only.
    experts: bool = False
    dtype: torch.dtype = torch.float32
    # Whether transformers loads it, or with which version of compressed-tensors; if not, weights and bytes are
    # compared all the same.
    loads: bool | str = True
    packer: bool = True


GPTQ, AWQ, NF4, EXACT = 5e-3, 7e-3, 1e-2, 0.0
# Experts are decoded in the type of their scales, F16.
EXPERTS = 2e-2
COMPRESSED = "compressed-tensors --compressed-format"

CASES = {
    **{f"gptq{bits}": Case(f"gptq --bits {bits} --group-size 32", GPTQ) for bits in (2, 3, 4, 8)},
    "gptq": Case("gptq", GPTQ, BIASES),
    "gptq-asym": Case("gptq --group-size 32 --asym", GPTQ),
    "gptq-asym-v1": Case("gptq --group-size 32 --asym --checkpoint-format gptq", GPTQ),
    "gptq-v2": Case("gptq --group-size 32 --checkpoint-format gptq_v2", GPTQ, DENSE),
    "gptq-rows": Case("gptq --group-size -1", GPTQ),
    "gptq-desc-act": Case("gptq --group-size 32 --desc-act", GPTQ, DENSE),
    "gptq-left-out": Case("gptq --ignore 1.self_attn.k_proj --max-shard-size 150K", GPTQ, ("llama",)),
    "awq-left-out": Case("awq --ignore k_proj --max-shard-size 150K", AWQ, ("llama",)),
    "nf4-left-out": Case("bnb-nf4 --ignore k_proj --max-shard-size 150K", NF4, ("llama",)),
    "pack-left-out": Case("compressed-tensors --ignore k_proj --max-shard-size 150K", EXACT, ("llama",)),
    "gptq-experts": Case("gptq --group-size 32", GPTQ, ("mixtral",), experts=True, loads=False),
    "awq": Case("awq", AWQ, BIASES),
    "awq-experts": Case("awq", AWQ, ("mixtral",), experts=True, loads=False),
    "awq-g32": Case("awq --group-size 32", AWQ, DENSE),
    "awq-sym": Case("awq --group-size 32 --sym", AWQ, ("llama",)),
    "nf4": Case("bnb-nf4", NF4, BIASES),
    "nf4-nested": Case("bnb-nf4 --double-quant", NF4),
    "fp4": Case("bnb-fp4", NF4),
    "nf4-experts": Case("bnb-nf4", NF4, ("mixtral",), experts=True, loads=False),
    "int8": Case("bnb-int8", 2e-3),
    **{f"pack{bits}": Case(f"compressed-tensors --bits {bits} --group-size 32", EXACT, experts=True)
       for bits in (2, 3, 4, 5, 8)},
    "pack": Case("compressed-tensors", EXACT, BIASES, experts=True),
    "pack-rows": Case("compressed-tensors --group-size -1", EXACT, DENSE),
    "pack-asym": Case("compressed-tensors --group-size 32 --asym", EXACT, DENSE, loads="0.17.1"),
    "naive": Case(f"{COMPRESSED} naive-quantized", EXACT, DENSE),
    "int": Case(f"{COMPRESSED} int-quantized", EXACT, DENSE),
    "float": Case(f"{COMPRESSED} float-quantized", EXACT, experts=True, packer=False),
    "fp8": Case("fp8", EXACT, BIASES, experts=True, dtype=torch.bfloat16),
    "mxfp4": Case("mxfp4", EXACT, ("gpt_oss",), experts=True, dtype=torch.bfloat16, packer=False),
}


def checked(binary: str, name: str, model: str, tmp: Path) -> str:
    """What was found; an exception where it is not as it should be."""
    case, source, packed, plain = CASES[name], fixture(model), tmp / "packed", tmp / "plain"
    left_out = ["--ignore", "experts"] if model == "mixtral" and not case.experts else []
    qconv(binary, "convert", source, "-o", packed, "--to", *case.to.split(), *left_out)
    qconv(binary, "convert", packed, "-o", plain, "--to", "safetensors", "--dtype", "f32")
    quantization = config(packed)["quantization_config"]
    # What we decode is what the library decodes.
    ours, theirs = tensors(plain), decoded(tensors(packed), quantization)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    wrong = [k for k in ours if not torch.equal(ours[k], theirs[k])]
    assert not wrong, f"the library decodes {len(wrong)} tensors to other values, such as {wrong[0]}"
    said = []
    if case.packer and quantization["quant_method"] in PACKERS:
        count, differ = differences(packed, source)
        assert count and not differ, f"the library packs {len(differ)} tensors otherwise: {differ[:3]}"
        said.append(f"the library packs {count} matrices into the same bytes")
    loads = case.loads == version("compressed-tensors") if isinstance(case.loads, str) else case.loads
    if not loads:
        return ", ".join(said)
    if name == "int8":
        found, control, kinds = int8_modules(packed, plain), int8_modules(packed, source), "Linear8bitLt"
    else:
        found, control, kinds = compared(packed, plain, source, case.dtype)
    tolerance = EXPERTS if model == "mixtral" and case.experts and name.startswith("pack") else case.tolerance
    assert found <= tolerance, f"logits differ by {found:.2e} ({tolerance:.0e} allowed) in {kinds}"
    assert control > max(2 * tolerance, 1e-3), f"the unquantized source would pass as well: {control:.2e}"
    said.insert(0, f"{kinds}: {found:.1e} (the source: {control:.1e})")
    return ", ".join(said)


def main() -> None:
    binary, names = sys.argv[1], sys.argv[2:] or [*CASES]
    failed = []
    for name in names:
        for model in CASES[name].models:
            with tempfile.TemporaryDirectory() as tmp:
                try:
                    print(f"ok     {name} of {model}: {checked(binary, name, model, Path(tmp))}", flush=True)
                except (AssertionError, Unfit) as why:
                    failed.append(name)
                    print(f"FAILED {name} of {model}: {why}", flush=True)
                except Exception:
                    failed.append(name)
                    print(f"FAILED {name} of {model}: {traceback.format_exc()}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} checks failed")


if __name__ == "__main__":
    main()
