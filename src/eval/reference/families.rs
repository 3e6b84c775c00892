//! The families, one row each.

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma2, gemma3, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen2_moe, qwen3, qwen3_moe,
};
use serde_json::Value as Json;

use super::config::Config;
use super::gpt2::Gpt2;
use super::{Step, failed};
use crate::error::Result;

/// A family and how candle computes it.
pub(super) struct Family {
    /// As in config.json.
    pub model_type: &'static str,
    /// The embedding's name.
    pub embedding: &'static str,
    /// What embeddings are multiplied by.
    pub embedding_scale: fn(&Config) -> f32,
    /// Whether the sliding window is computed; where not, texts have to stay within it.
    pub has_window: bool,
    /// Fills gaps in a config.json; refuses what candle's model would leave out.
    pub prepare: fn(Config) -> Result<Config>,
    /// Builds the model.
    pub load: fn(&Config, VarBuilder<'static>) -> Result<Step>,
}

const USUAL: Family = Family {
    model_type: "",
    embedding: "model.embed_tokens.weight",
    embedding_scale: |_| 1.0,
    has_window: false,
    prepare: plain,
    load: |_, _| Err(crate::Error::misuse("no family")),
};

/// `(config, builder) -> model.forward(ids, position)` for models with one `new` and one `forward`.
macro_rules! load {
    ($model:ty, $config:ty) => {
        |config, vb| {
            let mut model = <$model>::new(&config.parse::<$config>()?, vb).map_err(failed)?;
            Ok(Box::new(move |ids, position| model.forward(ids, position)))
        }
    };
    (plain_attention: $model:ty, $config:ty) => {
        |config, vb| {
            let mut model = <$model>::new(false, &config.parse::<$config>()?, vb).map_err(failed)?;
            Ok(Box::new(move |ids, position| model.forward(ids, position)))
        }
    };
}

pub(super) const FAMILIES: &[Family] = &[
    Family { model_type: "llama", prepare: llama, load: load_llama, ..USUAL },
    Family { model_type: "mistral", load: load!(mistral::Model, mistral::Config), ..USUAL },
    Family { model_type: "mixtral", prepare: mixtral, load: load!(mixtral::Model, mixtral::Config), ..USUAL },
    Family {
        model_type: "qwen2",
        prepare: qwen,
        load: load!(qwen2::ModelForCausalLM, qwen2::Config),
        ..USUAL
    },
    Family {
        model_type: "qwen2_moe",
        prepare: qwen,
        load: load!(qwen2_moe::Model, qwen2_moe::Config),
        ..USUAL
    },
    Family {
        model_type: "qwen3",
        prepare: qwen,
        load: load!(qwen3::ModelForCausalLM, qwen3::Config),
        ..USUAL
    },
    Family {
        model_type: "qwen3_moe",
        prepare: qwen,
        load: load!(qwen3_moe::ModelForCausalLM, qwen3_moe::Config),
        ..USUAL
    },
    Family {
        model_type: "gemma2",
        embedding_scale: root_of_width,
        prepare: gemma,
        load: load!(plain_attention: gemma2::Model, gemma2::Config),
        ..USUAL
    },
    Family {
        model_type: "gemma3_text",
        embedding_scale: root_of_width,
        has_window: true,
        prepare: gemma3,
        load: load!(plain_attention: gemma3::Model, gemma3::Config),
        ..USUAL
    },
    Family { model_type: "phi3", prepare: phi3, load: load!(phi3::Model, phi3::Config), ..USUAL },
    Family { model_type: "olmo2", load: load!(olmo2::Model, olmo2::Config), ..USUAL },
    Family {
        model_type: "gpt2",
        embedding: "transformer.wte.weight",
        prepare: gpt2,
        load: |config, vb| {
            let mut model = Gpt2::new(&config.parse()?, vb).map_err(failed)?;
            Ok(Box::new(move |ids, position| model.forward(ids, position)))
        },
        ..USUAL
    },
];

fn root_of_width(config: &Config) -> f32 {
    config.count("hidden_size").map_or(1.0, |n| (n as f64).sqrt() as f32)
}

/// RoPE as it was first, `silu`, no biases but those that a model always has.
fn plain(config: Config) -> Result<Config> {
    let scaled = !config.get("rope_scaling").is_null();
    config
        .or("rope_theta", 10_000.0)
        .or("rms_norm_eps", 1e-6)
        .or("hidden_act", "silu")
        .or("attention_bias", false)
        .checked()?
        .without(scaled, "rope_scaling")
}

/// As [`plain`], with heads as wide as they usually are.
fn with_usual_heads(config: Config) -> Result<Config> {
    let config = config.checked()?;
    let width = config.count("head_dim")? * config.count("num_attention_heads")?;
    let other = width != config.count("hidden_size")?;
    config.without(other, "heads of another width")
}

fn llama(config: Config) -> Result<Config> {
    let scaling = config.get("rope_scaling").clone();
    let other = scaling.get("rope_type").is_some_and(|kind| kind != "llama3");
    let biased = config.is("attention_bias") || config.is("mlp_bias");
    let other_act = config.text("hidden_act").is_some_and(|act| act != "silu");
    let config = plain(with_usual_heads(config.with("rope_scaling", Json::Null))?)?
        .without(other, "this rope_scaling")?
        .without(biased, "biases")?
        .without(other_act, "this hidden_act")?;
    Ok(config.with("rope_scaling", scaling))
}

/// candle's Llama takes a cache beside the model.
fn load_llama(config: &Config, vb: VarBuilder<'static>) -> Result<Step> {
    let config = config.parse::<llama::LlamaConfig>()?.into_config(false);
    let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).map_err(failed)?;
    let model = llama::Llama::load(vb, &config).map_err(failed)?;
    Ok(Box::new(move |ids, position| model.forward(ids, position, &mut cache)))
}

fn mixtral(config: Config) -> Result<Config> {
    let config = plain(with_usual_heads(config)?)?;
    config.count("num_local_experts")?;
    config.count("num_experts_per_tok")?;
    // The window, which bounds the text, is not needed for the masks.
    Ok(config.or("sliding_window", i32::MAX).with("use_flash_attn", false))
}

fn qwen(config: Config) -> Result<Config> {
    let windowed = config.is("use_sliding_window");
    let some_dense = config.get("mlp_only_layers").as_array().is_some_and(|layers| !layers.is_empty());
    let experts = config.get("num_local_experts").clone();
    let config = plain(config)?.or("num_experts", experts).without(windowed, "the sliding window")?;
    let config = config.without(some_dense, "mlp_only_layers")?;
    // Not used then.
    let config = config.with("sliding_window", i32::MAX).with("use_sliding_window", false);
    Ok(config.or("max_window_layers", 0).or("decoder_sparse_step", 1).or("norm_topk_prob", false))
}

fn gemma(config: Config) -> Result<Config> {
    let config = config.or("hidden_activation", "gelu_pytorch_tanh");
    let config = plain(config)?;
    let scale = config.get("query_pre_attn_scalar").as_u64();
    let other = scale.is_some_and(|n| Some(n) != config.get("head_dim").as_u64());
    let both_ways = config.is("use_bidirectional_attention");
    config.without(other, "query_pre_attn_scalar")?.without(both_ways, "bidirectional attention")
}

fn gemma3(config: Config) -> Result<Config> {
    // What config.json leaves out where it is transformers' default.
    let defaults = [
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("rope_theta", 1_000_000),
        ("rope_local_base_freq", 10_000),
        ("query_pre_attn_scalar", 256),
    ];
    let config = defaults.into_iter().fold(config, |config, (key, value)| config.or(key, value));
    let config = gemma(config)?;
    let layers = config.count("num_hidden_layers")?;
    let pattern = match config.get("layer_types").as_array() {
        Some(types) => {
            let is_full = |t: &Json| t == "full_attention";
            let every = types.iter().position(is_full).map_or(layers, |first| first) + 1;
            let regular = types.iter().zip(1..).all(|(t, i)| is_full(t) == (i % every == 0));
            (every, regular)
        }
        None => {
            let stated = ["sliding_window_pattern", "_sliding_window_pattern"];
            (stated.iter().find_map(|key| config.count(key).ok()).unwrap_or(6), true)
        }
    };
    let (every, regular) = pattern;
    Ok(config.without(!regular, "this order of layer_types")?.with("sliding_window_pattern", every))
}

fn phi3(config: Config) -> Result<Config> {
    let partial = config.get("partial_rotary_factor").as_f64().is_some_and(|f| f != 1.0);
    plain(with_usual_heads(config)?)?.without(partial, "partial_rotary_factor")
}

fn gpt2(config: Config) -> Result<Config> {
    let (width, layers, heads) = (config.count("n_embd")?, config.count("n_layer")?, config.count("n_head")?);
    let other_act = config.text("activation_function").is_some_and(|act| act != "gelu_new");
    let scaled = config.is("scale_attn_by_inverse_layer_idx");
    config
        .with("hidden_size", width)
        .with("num_hidden_layers", layers)
        .with("num_attention_heads", heads)
        .or("n_inner", 4 * width)
        .or("layer_norm_epsilon", 1e-5)
        .without(other_act, "this activation_function")?
        .without(scaled, "scale_attn_by_inverse_layer_idx")
        .and_then(|config| {
            let inner = config.count("n_inner")?;
            config.with("intermediate_size", inner).checked()
        })
}
