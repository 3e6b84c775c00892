"""Frequencies of RoPE as transformers computes them: fixtures/graph/rope.json.

    python tests/peers/rope.py > fixtures/graph/rope.json

Needs torch and transformers (5.23 was used). Parameters are those of published models, and of fixtures.
"""
import json

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
           "original_max_position_embeddings": 4096, "rope_theta": 150000.0}
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0}
# Of Phi 3's config.json with 128k tokens, of its first release.
LONG = [1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
        1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
        1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164,
        5.489999771118164, 9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355,
        15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203,
        32.35000228881836, 32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156,
        56.20000457763672, 57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844,
        61.190006256103516, 61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086,
        63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922, 64.760009765625,
        64.80001068115234, 64.81001281738281, 64.81001281738281]
SHORT = ([1.05] * 3 + [1.1] * 3 + [1.25] * 2 + [1.4, 1.45, 1.55, 1.85, 1.9] + [2.0] * 19 + [2.1] * 2 + [2.2]
         + [2.35] * 4 + [2.4] * 2 + [2.65, 2.7, 2.9, 2.95] + [3.05] * 3)
PHI = {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, "rope_theta": 10000.0,
       "original_max_position_embeddings": 4096}

# name, parameters, width of what is rotated, the model's length, the length the table is for
CASES = [
    ("llama", {"rope_type": "default", "rope_theta": 10000.0}, 32, 512, 512),
    ("gpt-neox, a quarter of each head", {"rope_type": "default", "rope_theta": 10000.0}, 8, 512, 512),
    ("llama-rope3", {**LLAMA3, "original_max_position_embeddings": 128}, 32, 512, 512),
    ("Llama 3.1 8B", LLAMA3, 128, 131072, 2048),
    ("Llama 3.2 1B", {**LLAMA3, "factor": 32.0}, 64, 131072, 2048),
    ("Gemma 3 4B, layers without window", {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}, 256, 131072, 2048),
    ("InternLM 3", {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 50000000.0}, 128, 32768, 2048),
    ("gpt-oss", GPT_OSS, 64, 131072, 2048),
    ("gpt_oss", GPT_OSS, 32, 512, 512),
    ("gpt-oss, truncated as in GGUF", {k: v for k, v in GPT_OSS.items() if k != "truncate"}, 64, 131072, 2048),
    ("Qwen 2.5 7B with YaRN", QWEN, 128, 131072, 2048),
    ("YaRN with both mscales", {**QWEN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}, 64, 163840, 2048),
    ("YaRN with a factor of attention", {**QWEN, "attention_factor": 0.75}, 64, 163840, 2048),
    ("Phi 3 mini 128k, short", PHI, 96, 131072, 4096),
    ("Phi 3 mini 128k, long", PHI, 96, 131072, 4097),
]


def frequencies(parameters, dim, model, context):
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, head_dim=dim, max_position_embeddings=model,
                         rope_parameters=dict(parameters))
    if parameters["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=context)


lines = []
for name, parameters, dim, model, context in CASES:
    values, factor = frequencies(parameters, dim, model, context)
    case = {"name": name, "parameters": parameters, "dim": dim, "model": model, "context": context,
            "attention_factor": float(f"{factor:.9g}"), "frequencies": [float(f"{v:.9g}") for v in values.tolist()]}
    lines.append(json.dumps(case))
print("[\n" + ",\n".join(lines) + "\n]")
