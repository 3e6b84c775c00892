"""What ARCHITECTURES.py knows of single classes: settings, and differences that are on purpose."""

# Keys beyond the definition's example, for a class or a variant of its definition.
CONFIG = {
    # Without windows, as the small EXAONE 4.
    ("Exaone4ForCausalLM", "rope_llama3"): {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    ("Exaone4ForCausalLM", "example"): {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    # Trained with further layers, which transformers leaves out but counts in config.json.
    "Glm4MoeForCausalLM": {"num_nextn_predict_layers": 0},
    # llama.cpp reads no epsilon for this architecture and takes 0.
    "Qwen2VLForConditionalGeneration": {"rms_norm_eps": 1e-12},
    "Qwen2_5_VLForConditionalGeneration": {"rms_norm_eps": 1e-12},
    # With few heads many keys have the score 0, and which of them an indexer chooses is chance.
    "DeepseekV32ForCausalLM": {"index_n_heads": 16},
    "GlmMoeDsaForCausalLM": {"index_n_heads": 16},
    # transformers divides experts into groups by default.
    ("DeepseekV3ForCausalLM", "v3_of_transformers"): {"n_group": 1, "topk_group": 1},
    "Mistral3ForConditionalGeneration": {"text_config": {"model_type": "ministral3"}},
    "Mamba2ForCausalLM": {"num_heads": 8},
    # transformers keeps time steps above this, llama.cpp does not.
    "NemotronHForCausalLM": {"time_step_min": 1e-9},
    "Olmo3ForCausalLM": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ["full_attention", "sliding_attention"]}},
}

# Class, or `*` -> (pattern of differences, why). A difference that no pattern knows is shown as it is.
EXPLAINED = {
    "*": [
        (r"Architecture .* not supported", "it does not know this class"),
        (r"tokenizer.model$|Llama BPE tokenizer", "it wants another kind of vocabulary than the fixtures have"),
        (r"add_bos_token to true", "it insists on add_bos_token"),
        (r"KeyError: '(moe_intermediate_size|n_positions)'", "it wants a key that transformers 5 does not write"),
        (r"Duplicated tensor name 'cls.bias'|classifier_pooling", "it does not know this head"),
        (r"tokenizer.ggml.add_space_prefix .* only here", "it leaves out what tokenizer.model says of the space in front"),
        (r"tensor blk.\d+.ssm_a differs \(up to .*e-07\)", "the last bit of exp"),
        (r"(expert_gating_func = 2|expert_weights_norm = true).* only here",
         "transformers does not write the kind of the router, and the converter then lacks it"),
        (r"rope.freq_base = 10000.0 .* only here", "it leaves out a value that is llama.cpp's default"),
    ],
    "BambaForCausalLM": [(r"attn_[qk]|rope.dimension_count", "it turns whole heads, Bamba a part of them")],
    "GraniteMoeHybridForCausalLM": [
        (r"attn_[qk]|head_count_kv", "it does not find the layers with attention in transformers 5's layer_types"),
        (r"expert_", "it writes experts of models that have none")],
    "GraniteSWAForCausalLM": [(r"rope_pattern", "it leaves out which layers turn")],
    "GraniteMoeSWAForCausalLM": [(r"rope_pattern", "it leaves out which layers turn")],
    "FalconH1ForCausalLM": [(r"KeyError: 'head_dim'", "it wants head_dim, which config.json need not have")],
    "LagunaForCausalLM": [(r"sliding_window_pattern", "it leaves out the pattern of windows")],
    "Gemma4ForCausalLM": [
        (r"tokenizer.ggml|size_label|per_layer_token_embd", "it takes tokenizer.json first, and does not cut surplus rows"),
        (r"head_count_kv", "it writes one number where all layers have the same")],
    "Gemma4ForConditionalGeneration": [
        (r"tokenizer.ggml|size_label|per_layer_token_embd", "it takes tokenizer.json first, and does not cut surplus rows")],
    "NemotronHForCausalLM": [
        (r"nemotron_h|general.architecture", "it takes every model for one with experts, as transformers 5 writes their keys")],
    "Qwen3VLMoeForConditionalGeneration": [(r"_exps", "it takes transformers 5's layout of the experts for the older one")],
    "BertForSequenceClassification": [
        (r"cls\.|pooling_type|size_label", "it drops the classifier of a class that is no reranker")],
    "DbrxForCausalLM": [(r"rope.freq_base", "it reads an older place, where transformers 5 leaves the default")],
    "Ernie4_5_MoeForCausalLM": [
        (r"exp_probs_b", "it keeps an axis of length 1"),
        (r"expert_shared_feed_forward_length", "it divides by the number of key/value heads instead of counting experts")],
    "FalconForCausalLM": [(r"shape .* is invalid", "it takes num_kv_heads, which multi_query overrides")],
    "GemmaForCausalLM": [(r"eot_token_id = 107", "it sets token 107 whatever it is")],
    "GlmForCausalLM": [
        (r"context_length", "it takes the hidden size for it"),
        (r"add_bos_token|tensor_data_layout", "llama.cpp does not read it, or has it as its default")],
    "GPT2LMHeadModel": [(r"KeyError: 'n_ctx'", "it wants n_ctx, which transformers 5 does not write")],
    "GPTNeoXForCausalLM": [(r"KeyError: 'rotary_pct'", "it wants rotary_pct, which transformers 5 writes elsewhere")],
    "MiniCPM3ForCausalLM": [
        (r"value_length|attn_factor|original_context_length", "it leaves out what differs from the original model")],
    "MiniMaxM2ForCausalLM": [(r"rotary_dim", "it wants rotary_dim, which transformers 5 writes elsewhere")],
    "NemotronForCausalLM": [
        (r"layer_norm_rms_epsilon", "it writes the epsilon twice"),
        (r"unknown_token_id", "it sets token 1 whatever it is")],
    "PhiForCausalLM": [
        (r"feed_forward_length", "it assumes four times the hidden size"),
        (r"add_bos_token = false", "llama.cpp's default")],
    "Phi3ForCausalLM": [
        (r"tokenizer.ggml.(scores|token_type)", "it marks added tokens another way, which tokenizes the same")],
    "T5ForConditionalGeneration": [
        (r"KeyError: 'decoder_start_token_id'", "it wants decoder_start_token_id, which transformers 5 does not write")],
}
# Class, or class and variant -> why llama.cpp computes something else.
LLAMA_CPP = {
    "PhimoeForCausalLM": "llama.cpp normalises without subtracting the mean and weighs experts otherwise",
}

# Class -> why transformers' model is not made.
NOT_RUN = {
    "ChameleonForConditionalGeneration": "it needs a vocabulary with image tokens",
    "Qwen3OmniMoeForConditionalGeneration": "its talker is made in full size, which takes more than 20 GB",
}

# Definitions whose models give hidden states instead of logits.
ENCODERS = {"bert", "distilbert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed",
            "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "roberta", "t5encoder", "xlm-roberta"}

# Definitions that are tried with tokenizer.model, without which llama.cpp's converter refuses them.
SENTENCEPIECE = {"ernie4_5", "ernie4_5-moe", "gemma", "gemma2", "gemma4", "minicpm3", "nemotron", "paddleocr", "phi3"}

# Tokens that llama.cpp's converter looks for.
GLM = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
       "<|observation|>"]
TOKENS_MORE = {"chatglm": GLM, "glm-dsa": GLM, "glm4": GLM, "glm4moe": GLM}
