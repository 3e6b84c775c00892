"""Quantized checkpoints as transformers loads and runs them on a CPU, beside plain ones.

`compared` gives how far the logits of the two differ, after it has looked at what was reported when loading.
"""

import contextlib
from pathlib import Path

import torch
import transformers

from directory import config

transformers.logging.set_verbosity_error()


class Unfit(Exception):
    """The client does not take the directory."""


def load(directory: Path, dtype=torch.float32):
    """The model; nothing may be missing, unknown or of another shape."""
    quantization = config(directory).get("quantization_config", {})
    more = {}
    if quantization.get("quant_method") == "gptq" and quantization["group_size"] == -1:
        # The kernel that is chosen otherwise has no groups of more than 256.
        more["quantization_config"] = transformers.GPTQConfig(bits=quantization["bits"], backend="torch")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="cpu", output_loading_info=True, **more)
    wrong = {kind: sorted(map(str, names))[:4] for kind, names in report.items() if names}
    if wrong:
        raise Unfit(f"reported when loading: {wrong}")
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # bitsandbytes would compute in BF16, and round the weights to that of the model before.
            module.support_avx512bf16_for_cpu, module.compute_type_is_set = False, True
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    for p in model.parameters():
        if p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.to(dtype)   # transformers leaves them so beside layers of bitsandbytes
    return model.eval()


def outputs(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of some short texts, and which experts the routers chose: `[text, token, *]`."""
    texts, length = 24, 8
    ids = torch.randint(3, min(model.config.vocab_size, 32000), (texts, length),
                        generator=torch.Generator().manual_seed(1))
    chosen = []
    hooks = [m.register_forward_hook(lambda _, args, out: chosen.append(out[-1].sort(-1).values))
             for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    with torch.no_grad():
        found = model(ids).logits.float()
    for hook in hooks:
        hook.remove()
    return found, torch.cat([c.reshape(texts, length, -1) for c in chosen] or [torch.zeros(texts, length, 1)], -1)


def kinds(model) -> str:
    """What the quantized layers have become."""
    found = {type(m).__name__ for name, m in model.named_modules() if name.endswith(("q_proj", "experts"))}
    return ", ".join(sorted(found))


@contextlib.contextmanager
def activations(model, quantize):
    """Within, what goes into each linear layer but the head is quantized before."""
    hooks = [m.register_forward_pre_hook(lambda _, args: (quantize(args[0]), *args[1:]))
             for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    yield
    for hook in hooks:
        hook.remove()


def int8_by_token(x: torch.Tensor) -> torch.Tensor:
    """As compressed-tensors quantizes activations of W8A8: from -128 to 127, the greatest being 127.5."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def fp8_by_token(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def emulated(quantization: dict):
    """How the client quantizes activations, where it does."""
    if quantization.get("quant_method") != "compressed-tensors":
        return None
    group, = quantization["config_groups"].values()
    inputs = group.get("input_activations")
    return inputs and {"int": int8_by_token, "float": fp8_by_token}[inputs["type"]]


def relative(found, wanted) -> float:
    """The greatest difference of logits in parts of their standard deviation.

    Where two experts are nearly as good, the least difference has a router choose the other one, and this token and
    what follows is about another model. Such tokens are left out, and may be few.
    """
    (ours, chosen), (theirs, their_choice) = found, wanted
    same = (chosen == their_choice).all(-1).cumprod(1).bool()
    if same.float().mean() < 0.7:
        return float("inf")
    return ((ours - theirs)[same].abs().max() / theirs.std()).item()


def compared(packed: Path, plain: Path, control: Path, dtype=torch.float32) -> tuple[float, float, str]:
    """How far logits differ from those of `plain`, and of `control`, and what the quantized layers are."""
    model = load(packed, dtype)
    quantize = emulated(config(packed)["quantization_config"])
    found = []
    for directory in (plain, control):
        reference = load(directory, dtype)
        with activations(reference, quantize) if quantize else contextlib.nullcontext():
            found.append(relative(outputs(model), outputs(reference)))
    return *found, kinds(model)


def int8_modules(packed: Path, plain: Path) -> float:
    """LLM.int8, layer by layer: how far each is from the weights and inputs that it means, in parts of the
    norm of what comes out.

    Roundings of activations add up over layers, so that whole models cannot be compared. Inputs are made F16, what
    is 6 or more is taken out, the rest becomes bytes by each token's greatest; columns taken out come back in F16.
    """
    import bitsandbytes

    model, reference = load(packed), load(plain)
    seen = {}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, args[0]))
    outputs(reference)
    worst, found = 0.0, 0
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear8bitLt):
            continue
        x = seen[name].half().float()
        outliers = x.abs() >= 6
        columns = outliers.reshape(-1, x.shape[-1]).any(0)
        rest = x.masked_fill(outliers, 0)
        most = rest.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        rest = (rest * 127 / most).round() * most / 127
        rest[..., columns] = x[..., columns]
        with torch.no_grad():
            out = module(seen[name]).float()
            wanted = rest @ reference.get_submodule(name).weight.T
        worst = max(worst, ((out - wanted).norm() / wanted.norm()).item())
        found += 1
    if not found:
        raise Unfit("no layer of LLM.int8")
    return worst
