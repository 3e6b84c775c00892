"""Random models of families that no fixture has, with transformers' logits, for tests/coreml_logits.rs:

    python tests/peers/graph.py DIR
    QCONV_GRAPHS=DIR cargo test --release --test coreml_logits -- --ignored --nocapture

from the repository's root. Needs torch and transformers (5.23 was used). Biases, norms and multipliers are not what they are at first, so that one
that is left out shows; texts are longer than windows, and than what LongRoPE was trained on.
"""
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENIZER = Path("fixtures/models/llama")
TOKENS = 24

COMMON = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False)
GPT2 = dict(n_positions=512, n_embd=64, n_layer=2, n_head=4)
FALCON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, parallel_attn=True, bias=False,
              new_decoder_architecture=True, num_ln_in_parallel_attn=2, alibi=False)
GRANITE = dict(attention_multiplier=0.3, embedding_multiplier=6.0, residual_multiplier=0.4, logits_scaling=4.0)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=8, short_factor=[1.0] * 8,
                long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0])
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64)
GEMMA3 = {"full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
          "sliding_attention": dict(rope_type="default", rope_theta=10000.0)}

# name: model_type, config
MODELS = {
    "cohere2": ("cohere2", {**COMMON, "num_hidden_layers": 4, "sliding_window": 8, "tie_word_embeddings": True, "logit_scale": 0.25}),
    "ernie4_5": ("ernie4_5", {**COMMON, "head_dim": 16}),
    "falcon-two": ("falcon", FALCON),
    "gemma": ("gemma", {**COMMON, "head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma3-linear": ("gemma3_text", {**COMMON, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
                                      "num_hidden_layers": 6, "tie_word_embeddings": True, "rope_parameters": GEMMA3}),
    "gpt2-unscaled": ("gpt2", {**GPT2, "scale_attn_weights": False, "activation_function": "gelu"}),
    "gpt_bigcode": ("gpt_bigcode", {**GPT2, "multi_query": True}),
    "granite": ("granite", {**COMMON, **GRANITE}),
    "granitemoe": ("granitemoe", {**COMMON, **GRANITE, **EXPERTS}),
    "llama-yarn": ("llama", {**COMMON, "rope_parameters": YARN}),
    "mistral-window": ("mistral", {**COMMON, "head_dim": 16, "sliding_window": 8}),
    "phi": ("phi", {**COMMON, "num_key_value_heads": 4}),
    "phi3-long": ("phi3", {**COMMON, "original_max_position_embeddings": 8, "sliding_window": None, "rope_parameters": LONGROPE}),
    "qwen2-window": ("qwen2", {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                "norm_topk_prob": False, "mlp_only_layers": []}),
    "seed_oss": ("seed_oss", {**COMMON, "head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {**COMMON, "num_hidden_layers": 4}),
    "stablelm": ("stablelm", {**COMMON, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {**COMMON, "use_bias": True, "sliding_window": 8, "tie_word_embeddings": True}),
}


def fill(name, p, stored_less_one):
    """Random values, that BF16 holds."""
    is_gain = p.dim() == 1 and name.endswith("weight") and not stored_less_one
    spread = 0.1 if p.dim() == 1 else 0.5 if "embed" in name or "wte" in name else 0.08
    p.copy_((torch.randn_like(p) * spread + float(is_gain)).to(torch.bfloat16).float())


def main():
    root = Path(sys.argv[1])
    for name, (model_type, config) in MODELS.items():
        torch.manual_seed(7)
        config = AutoConfig.for_model(model_type, vocab_size=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                                      **{k: v for k, v in config.items() if k != "vocab_size"})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        ids = torch.tensor([(i * 37 + 11) % 500 + 1 for i in range(TOKENS)])
        with torch.no_grad():
            for tensor, p in model.named_parameters():
                fill(tensor, p, model_type.startswith("gemma"))
            logits = model(ids[None]).logits[0].float().contiguous()
        output = root / name
        shutil.rmtree(output, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(output)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / file, output)
        save_file({"input_ids": ids, "logits": logits}, output / "reference_logits.safetensors")
        print(name, f"spread {logits.std():.3f}")


if __name__ == "__main__":
    main()
