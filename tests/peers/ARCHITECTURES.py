"""Compares the definitions of formats/arch with transformers and with llama.cpp's converter.

`make peers-models` runs it: ARCHITECTURES.py QCONV AGREEMENT LLAMA_CPP [NAME ...], from the
repository's root; NAME is a definition or a class, and without one all are tried and
tests/peers/architectures.tsv is written anew.

For each class of each definition that transformers has, a tiny model is made from the definition's
[example] with random weights, norms and biases too, in BF16, and transformers' logits are recorded in
F32. Then the model is converted to F32 by qconv and by llama.cpp's converter; tensors and metadata of
the two are compared, and what our file gives in the linked llama.cpp (AGREEMENT, examples/agreement.rs)
with transformers. QCONV_PEERS_DIR keeps the models.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

from explained import CONFIG, ENCODERS, EXPLAINED, LLAMA_CPP, NOT_RUN, SENTENCEPIECE, TOKENS_MORE

ARCH = Path("formats/arch")
TABLE = Path("tests/peers/architectures.tsv")
TOKENS = 40
# Relative RMS of the logits: sound ones lie near 1e-6, and below this where ggml rounds GELU to F16.
EXACT, SAME = 2e-5, 5e-4
# What transformers' configurations take although they have no field of this name.
LEGACY = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}
# Sizes of a vision or audio tower, which is not looked at.
TOWER = {"depth": 1, "num_hidden_layers": 1, "encoder_layers": 1, "hidden_size": 32, "embed_dim": 32, "d_model": 32,
         "intermediate_size": 32, "num_heads": 2, "num_attention_heads": 2, "encoder_attention_heads": 2,
         "out_hidden_size": 64, "num_position_embeddings": 16, "image_size": 56}


# --- cases: what to make --------------------------------------------------------------------------

def definition(name):
    """The TOML, with the base's example below its own, and the base's tokenizer where it has none."""
    own = tomllib.loads((ARCH / f"{name}.toml").read_text())
    if base := own.get("extends"):
        base = definition(base)
        own["example"] = base.get("example", {}) | own.get("example", {})
        own.setdefault("tokenizer", base.get("tokenizer", {}))
    return own


def without_null(config):
    return {k: v for k, v in config.items() if v != "null"}


def cases(name):
    """(variant, class, config) of a definition, each class once and each variant once."""
    own = definition(name)
    classes = own.get("class", [])
    if "arch" not in own or not classes:
        return
    first = {"architectures": [classes[0]["name"]], "model_type": classes[0]["model_type"]}
    names = {n for entry in classes for n in [entry["name"], *entry.get("aliases", [])]}
    example = without_null(first | own["example"])
    if example["architectures"][0] not in names:    # the base's
        example |= first
    tried = set()
    for variant, changes in [("example", {})] + list(own.get("variant", {}).items()):
        config = without_null(example | changes)
        tried.add(config["architectures"][0])
        yield variant, config["architectures"][0], config
    for entry in classes:
        for cls in [entry["name"]] + entry.get("aliases", []):
            if cls not in tried:
                tried.add(cls)
                yield "example", cls, example | {"architectures": [cls], "model_type": entry["model_type"]}


def tokenizer_of(name):
    if name in SENTENCEPIECE:
        return Path("fixtures/models/gemma3-spm")
    kinds = definition(name).get("tokenizer", {}).get("try", [])
    if "wpm" in kinds or "wordpiece" in kinds:
        return Path("fixtures/models/bert")
    return Path("fixtures/models/llama" if not kinds or "bpe" in kinds else "fixtures/models/gemma3-spm")


# --- the model ------------------------------------------------------------------------------------

def known(config_class, values):
    """`values` without what the class has no field for: it would be written into config.json all the same."""
    fields = {f.name for f in dataclasses.fields(config_class)} | LEGACY
    fields |= set(config_class.attribute_map) | set(config_class.attribute_map.values())
    return {k: v for k, v in values.items() if k in fields}


def configuration(cls, values):
    """The configuration of a class from a flat config.json, its text part where it has parts."""
    config_class = cls.config_class
    values = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
    values = {"text_config": {}} | values
    parts = getattr(config_class, "sub_configs", {})
    text = parts.get("text_config")
    if text is None:
        return config_class(**known(config_class, values))
    if text is transformers.AutoConfig:
        kind = values.get("text_config", {}).get("model_type", config_class().text_config.model_type)
        text = transformers.CONFIG_MAPPING[kind]
    whole = {"text_config": known(text, values)}
    top = known(config_class, values)
    for part in ["vision_config", "audio_config"]:
        if part in parts:
            tower = parts[part]
            if tower is transformers.AutoConfig:
                tower = type(getattr(config_class(), part))
            whole[part] = known(tower, TOWER) | values.get(part, {})
    whole["text_config"] |= values.get("text_config", {})
    tokens = {k: v for k, v in top.items() if k.endswith("_token_id") or k == "tie_word_embeddings"}
    return config_class(**whole, **tokens)


def randomize(model):
    """Activations stay near 1, and every norm, bias and constant differs from its neighbours."""
    generator = torch.Generator().manual_seed(1234)
    noise = lambda p: torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "conv1d" in name or "A_log" in name:
                if not torch.isfinite(p).all():
                    p.zero_()
                p.add_(0.2 * noise(p))
            else:
                p.copy_(noise(p) / p.shape[-1] ** 0.5)
        for name, p in model.named_buffers():
            if p.is_floating_point() and ("bias" in name or "scalar" in name):
                p.add_(0.2 * noise(p))


def input_ids(vocab_size):
    return torch.randint(5, vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(99))


def ggml_gelu(x, *args, **kwargs):
    """GELU by its tanh formula, argument and result rounded to F16: how ggml's CPU code looks it up."""
    rounded = GELU(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, rounded))


GELU = torch.nn.functional.gelu


@contextlib.contextmanager
def with_ggml_gelu():
    """All GELUs of transformers, of whichever formula, as ggml computes them."""
    from transformers import activations
    from transformers.models.bloom import modeling_bloom
    kinds = [c for n, c in vars(activations).items() if "gelu" in n.lower() and "quick" not in n.lower()
             and isinstance(c, type)] + [torch.nn.GELU, modeling_bloom.BloomGelu]
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "forward", lambda self, x: ggml_gelu(x)))
        stack.enter_context(mock.patch.object(torch.nn.functional, "gelu", ggml_gelu))
        yield


def compute(model, ids, hidden_states):
    """Logits or hidden states. Of a decoder without a head, the hidden states times the embeddings, as in
    llama.cpp; of T5, the logits of the first token of the answer."""
    start = {}
    if model.config.is_encoder_decoder and not hidden_states:
        start["decoder_input_ids"] = torch.full((1, 1), getattr(model.config, "decoder_start_token_id", None) or 0)
    with torch.no_grad():
        if hidden_states:
            values = getattr(model, "base_model", model)(input_ids=ids).last_hidden_state
        else:
            result = model(input_ids=ids, **start)
            values = result.get("logits")
            if values is None:
                values = result.last_hidden_state @ model.get_input_embeddings().weight.T
            elif getattr(model.config, "scale_decoder_outputs", model.config.model_type == "umt5"):
                values = values * model.config.d_model ** 0.5    # llama.cpp does not scale T5's tied logits
    if not torch.isfinite(values).all() or values.std() == 0:
        raise ValueError("transformers computes nothing that could be compared")
    return values[0].float().contiguous()


def reference(directory, cls, hidden_states):
    """Records what transformers computes; beside it, with ggml's GELU."""
    model = cls.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ids = input_ids(model.config.get_text_config().vocab_size)
    key = "last_hidden_state" if hidden_states else "logits"
    save_file({"input_ids": ids[0], key: compute(model, ids, hidden_states)},
              directory / "reference_logits.safetensors")
    with with_ggml_gelu():
        save_file({"input_ids": ids[0], key: compute(model, ids, hidden_states)},
                  directory.parent / "ggml_gelu.safetensors")


def copy_tokenizer(name, directory, config):
    """The fixture's files and the keys of config.json that belong to them."""
    source = tokenizer_of(name)
    theirs = json.loads((source / "config.json").read_text())
    for file in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt"]:
        if (source / file).exists():
            shutil.copy(source / file, directory)
    if more := TOKENS_MORE.get(name):
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens(more)
        tokenizer.save(str(directory / "tokenizer.json"))
        theirs["vocab_size"] = tokenizer.get_vocab_size()
    for key in ["vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"]:
        if key in theirs:
            config.setdefault(key, theirs[key])


def make(directory, name, variant, class_name, example):
    """Writes the checkpoint and what transformers computes with it. Raises where it cannot."""
    cls = getattr(transformers, class_name)
    copy_tokenizer(name, directory, example)
    config = configuration(cls, example | CONFIG.get(class_name, {}) | CONFIG.get((class_name, variant), {}))
    torch.manual_seed(1234)
    model = cls._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    reference(directory, cls, name in ENCODERS)


# --- llama.cpp's converter ------------------------------------------------------------------------

def run_converter(tree, directory, output, pre, file_type="ALL_F32"):
    """Raises where the converter refuses. `pre`: these vocabularies are in no list of hashes."""
    sys.path[:0] = [p for p in [str(tree), str(tree / "gguf-py")] if p not in sys.path]
    gguf = importlib.import_module("gguf")
    conversion = importlib.import_module("conversion")
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        hparams = conversion.ModelBase.load_hparams(directory, False)
        cls = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
        if cls.supports_mtp_export:
            cls.no_mtp = True    # transformers leaves out the layers that predict further tokens
        cls(directory, gguf.LlamaFileType[file_type], output).write()


def contents(path):
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}
    fields = {k: ([t.name for t in f.types], f.contents()) for k, f in reader.fields.items()
              if not k.startswith("GGUF.") and k != "tokenizer.ggml.pre"}
    return tensors, fields


def short(field):
    """Value and type of a metadata entry."""
    kinds, value = field
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kinds[-1].lower()})"


def differences(ours, theirs):
    """Sentences, ours first."""
    (a, fields_a), (b, fields_b) = contents(ours), contents(theirs)
    found = []
    for n in sorted(a.keys() | b.keys()):
        if n not in b:
            found.append(f"tensor {n} only here")
        elif n not in a:
            found.append(f"tensor {n} only there")
        elif a[n][:2] != b[n][:2]:
            found.append(f"tensor {n} {a[n][:2]} there {b[n][:2]}")
        elif a[n][2] != b[n][2]:
            x, y = (np.frombuffer(t[n][2], np.float32) if t[n][1] == "F32" else None for t in (a, b))
            how = ""
            if x is not None:
                how = f" (same values in other order)" if np.array_equal(np.sort(x), np.sort(y)) \
                    else f" (up to {np.abs(x - y).max():.1e})"
            found.append(f"tensor {n} differs{how}")
    for k in sorted(fields_a.keys() | fields_b.keys()):
        if k not in fields_b:
            found.append(f"{k} = {short(fields_a[k])} only here")
        elif k not in fields_a:
            found.append(f"{k} = {short(fields_b[k])} only there")
        elif fields_a[k] != fields_b[k]:
            found.append(f"{k} = {short(fields_a[k])} there {short(fields_b[k])}")
    return found


# --- one case -------------------------------------------------------------------------------------

def where(e):
    frame = traceback.extract_tb(e.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"


def last_line(e):
    if isinstance(e, SystemExit):
        return f"it ended with status {e.code}"
    lines = [l for l in str(e).strip().splitlines() if l.strip()]
    return f"{type(e).__name__}: {lines[-1] if lines else where(e)}"[:200]


def told(what, found, class_name):
    """What the converter does, and why as far as it is known."""
    whys, left = {}, []
    for difference in found:
        patterns = EXPLAINED.get(class_name, []) + EXPLAINED["*"]
        why = next((why for pattern, why in patterns if re.search(pattern, difference)), None)
        if why:
            whys[why] = None
        else:
            left.append(difference)
    more = [f"and {len(left) - 6} more"] if len(left) > 6 else []
    causes = list(whys) + left[:6] + more
    return f"{what}: {'; '.join(causes)}" if causes else what


def run(*command):
    quiet = os.environ | {"RUST_BACKTRACE": "0"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=quiet)


def try_case(tools, root, name, variant, class_name, example):
    """The two cells of the table."""
    qconv, agreement, tree = tools
    directory = root / f"{name}-{class_name}-{variant}" / "micro"
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.mkdir(parents=True)
    if (why := NOT_RUN.get(class_name)) or not hasattr(transformers, class_name):
        return None, why or "transformers has no such class"
    try:
        make(directory, name, variant, class_name, dict(example))
    except Exception as e:
        if os.environ.get("QCONV_PEERS_TRACE"):
            traceback.print_exc()
        return None, f"not made: {last_line(e)}"
    ours, theirs = directory.parent / "ours.gguf", directory.parent / "theirs.gguf"
    done = run(qconv, "hf-to-gguf", directory, "-o", ours, "--type", "f32", "--no-verify", "-q")
    if done.returncode != 0:
        return "", f"qconv refuses: {' '.join(done.stderr.replace(f'{directory}', 'micro').split())[:300]}"
    pre = contents_pre(ours)
    try:
        run_converter(tree, directory, theirs, pre)
        found = differences(ours, theirs)
        converter = "differs" if found else "equal"
    except (Exception, SystemExit) as e:
        if os.environ.get("QCONV_PEERS_TRACE"):
            traceback.print_exc()
        found = [last_line(e)]
        converter = "refuses"
    cell = told(converter, found, class_name)
    if converter == "differs" and (far := logits(agreement, theirs, directory / "reference_logits.safetensors")) > SAME:
        cell += f" (its file: {'does not run' if far == float('inf') else f'{far:.1e}'})"
    return cell, logits_of(agreement, ours, class_name, variant)


def logits(agreement, model, recorded):
    """Relative RMS, infinite when llama.cpp does not run the file."""
    done = run(agreement, model, recorded)
    return json.loads(done.stdout)["rel_rms"] if done.returncode == 0 else float("inf")


def logits_of(agreement, ours, class_name, variant):
    """How far llama.cpp with our file lies from transformers, and from transformers with ggml's GELU."""
    why = LLAMA_CPP.get((class_name, variant), LLAMA_CPP.get(class_name))
    cell = []
    for recorded, note in [("micro/reference_logits.safetensors", ""), ("ggml_gelu.safetensors", " with ggml's GELU")]:
        done = run(agreement, ours, ours.parent / recorded)
        if done.returncode != 0:
            lines = [l for l in done.stderr.splitlines() if l.lower().startswith("error:")] or ["error: ?"]
            return f"does not run: {why or lines[0][7:].replace(f'{ours}: ', '')[:300]}"
        result = json.loads(done.stdout)
        if not cell or result["rel_rms"] < previous / 2:
            cell.append(f"{result['rel_rms']:.1e}{note}")
        previous = result["rel_rms"]
        if previous < EXACT:
            break
    if previous > SAME or not result["finite"]:
        cell.append(why or "DIFFERS")
    return ", ".join(cell)


def contents_pre(path):
    gguf = importlib.import_module("gguf")
    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    return field.contents() if field else "default"


def main():
    *tools, = (Path(p).resolve() for p in sys.argv[1:4])
    wanted = sys.argv[4:]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.path[:0] = [str(tools[2]), str(tools[2] / "gguf-py")]
    rows = []
    with contextlib.ExitStack() as stack:
        kept = os.environ.get("QCONV_PEERS_DIR")
        root = Path(kept or stack.enter_context(tempfile.TemporaryDirectory()))
        for file in sorted(ARCH.glob("*.toml")):
            for variant, class_name, example in cases(file.stem):
                if wanted and file.stem not in wanted and class_name not in wanted:
                    continue
                cells = try_case(tools, root, file.stem, variant, class_name, example)
                row = [file.stem, class_name, variant, *(c or "-" for c in cells)]
                print("\t".join(row), flush=True)
                rows.append(row)
                if not kept:
                    shutil.rmtree(root / f"{file.stem}-{class_name}-{variant}", ignore_errors=True)
    if not wanted:
        head = ["architecture", "class", "example", "llama.cpp's converter", "transformers (rel. RMS of the logits)"]
        TABLE.write_text("".join("\t".join(r) + "\n" for r in [head] + rows))


if __name__ == "__main__":
    main()
