//! `[graph]`: what definitions say a model computes.

mod common;

use std::fmt::Write as _;

use common::fixture;
use qconv::arch::{self, Architecture, Decoder, Model, Positions};
use qconv::container::gguf::Value;
use qconv::error::ErrorKind;
use qconv::limits::Limits;
use qconv::tensor::{DType, TensorInfo};
use serde_json::{Value as Json, json};

/// Definitions that have a `[graph]`.
const DESCRIBED: &str = "cohere2 command-r ernie4_5 falcon gemma gemma2 gemma3 glm4 gpt-oss gpt2 gptneox granite granitemoe internlm2 llama minicpm mistral3 phi2 phi3 qwen2 qwen3 qwen3moe seed_oss smollm3 stablelm starcoder starcoder2 xverse";

/// Examples and variants that it does not describe.
const REFUSED: &[(&str, &str)] =
    &[("granitemoe", "shared"), ("mistral3", "example"), ("stablelm", "norms_of_heads")];

fn described() -> Vec<Architecture> {
    arch::all().unwrap().into_iter().filter(Architecture::has_graph).collect()
}

/// One line for each fact.
fn text(d: &Decoder) -> String {
    let mut out = String::new();
    let Decoder { layers, width, heads, kv_heads, head_dim, norm, eps, scale, activation, .. } = d;
    writeln!(out, "  {layers} layers of {width}, {heads} heads on {kv_heads} of {head_dim}, scores x{scale}")
        .unwrap();
    writeln!(
        out,
        "  {norm:?} norm + {eps}, {activation:?}, {:?}, norms are {} and {}",
        d.ffn, d.attn_norm, d.ffn_norm
    )
    .unwrap();
    match &d.positions {
        Positions::Rope { dim, tables, of_layer } => {
            for (t, table) in tables.iter().enumerate() {
                let sum: f64 = table.frequencies.iter().sum();
                let last = table.frequencies.last().unwrap();
                let of: Vec<usize> = (0..of_layer.len()).filter(|i| of_layer[*i] == t).collect();
                writeln!(
                    out,
                    "  rope {dim} of layers {of:?}: {} to {last:.6e}, sum {sum:.6}, x{:.6}",
                    table.frequencies[0], table.attention_factor
                )
                .unwrap();
            }
        }
        other => writeln!(out, "  positions {other:?}").unwrap(),
    }
    if d.windows.iter().any(Option::is_some) {
        writeln!(out, "  windows {:?}", d.windows).unwrap();
    }
    if d.stream != 1.0 {
        writeln!(out, "  stream x{}", d.stream).unwrap();
    }
    if (d.embedding_scale, d.residual, d.logit_scale, d.parallel) != (1.0, 1.0, 1.0, false) {
        let parallel = if d.parallel { ", side by side" } else { "" };
        let (embedding, residual, logits) = (d.embedding_scale, d.residual, d.logit_scale);
        writeln!(out, "  embeddings x{embedding}, residual x{residual}, logits x{logits}{parallel}").unwrap();
    }
    if d.logit_softcap.is_some() || d.score_softcap.is_some() {
        writeln!(out, "  caps of logits {:?}, of scores {:?}", d.logit_softcap, d.score_softcap).unwrap();
    }
    out
}

#[test]
fn fixtures_compute_what_they_computed() {
    let mut names: Vec<_> = std::fs::read_dir(fixture("models"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let (described, mut found) = (described(), String::new());
    for name in names {
        let Ok(config) = std::fs::read(fixture(&format!("models/{name}/config.json"))) else { continue };
        let config: Json = serde_json::from_slice(&config).unwrap();
        let class = config["architectures"][0].as_str().unwrap();
        let Some(arch) = described.iter().find(|a| a.class_names().any(|c| c == class)) else { continue };
        match arch::take_for(arch.clone(), &config).unwrap().decoder(512) {
            Ok(decoder) => write!(found, "{name}\n{}", text(&decoder)).unwrap(),
            Err(e) => writeln!(found, "{name}\n  {e}").unwrap(),
        }
    }
    let golden = fixture("graph/decoders.txt");
    if std::env::var_os("QCONV_UPDATE").is_some() {
        std::fs::write(&golden, &found).unwrap();
    }
    assert_eq!(found, std::fs::read_to_string(&golden).unwrap());
}

#[test]
fn every_graph_holds_for_its_examples() {
    let described = described();
    let names: Vec<&str> = described.iter().map(|a| a.name.as_str()).collect();
    assert_eq!(names.join(" "), DESCRIBED);
    for arch in &described {
        for (example, config) in arch.examples().unwrap() {
            let decoder = arch::take_for(arch.clone(), &config).unwrap().decoder(64);
            match decoder {
                // What the `unless` of these says of one of their examples.
                Err(e) if REFUSED.contains(&(&arch.name, &example)) => {
                    assert!(e.to_string().contains("does not describe this model"), "{e}");
                }
                Err(e) => panic!("{} {example}: {e}", arch.name),
                Ok(decoder) => assert!(decoder.layers > 0),
            }
        }
    }
}

/// The model of a GGUF file that a model would become.
fn from_gguf(model: &Model) -> Model {
    let mut metadata = model.metadata().unwrap();
    metadata.set("general.architecture", Value::from(model.arch.arch.as_str()));
    let info =
        |name: String| TensorInfo { name, dtype: DType::F32, shape: vec![1], file: 0, offset: 0, nbytes: 4 };
    let tensors: Vec<TensorInfo> = model.targets(512).unwrap().into_iter().map(|t| info(t.name)).collect();
    let generated = model.generated().unwrap().into_iter().map(|g| (g.name, g.values)).collect();
    let mut back = Model::from_gguf_as(model.arch.clone(), &metadata, &tensors).unwrap();
    back.complete_config([], &generated).unwrap();
    back
}

/// Numbers in GGUF are f32.
fn nearly(a: &Decoder, b: &Decoder) -> bool {
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs();
    let tables = |d: &Decoder| match &d.positions {
        Positions::Rope { tables, .. } => tables.iter().flat_map(|t| t.frequencies.clone()).collect(),
        _ => Vec::new(),
    };
    let (x, y) = (tables(a), tables(b));
    let blank = |d: &Decoder| {
        let mut d = d.clone();
        (d.eps, d.scale, d.residual, d.embedding_scale, d.logit_scale) = (1.0, 1.0, 1.0, 1.0, 1.0);
        if let Positions::Rope { tables, .. } = &mut d.positions {
            tables.iter_mut().for_each(|t| t.frequencies.fill(0.0));
            tables.iter_mut().for_each(|t| t.attention_factor = (t.attention_factor * 1e5).round());
        }
        d
    };
    let numbers = |d: &Decoder| [d.eps, d.scale, d.residual, d.embedding_scale, d.logit_scale].map(f64::from);
    blank(a) == blank(b)
        && x.iter().zip(&y).all(|(a, b)| near(*a, *b))
        && numbers(a).iter().zip(numbers(b)).all(|(a, b)| near(*a, b))
}

#[test]
fn a_gguf_file_computes_the_same() {
    let mut compared = 0;
    for arch in described() {
        for (example, config) in arch.examples().unwrap() {
            let model = arch::take_for(arch.clone(), &config).unwrap();
            let Ok(decoder) = model.decoder(64) else { continue };
            let back = from_gguf(&model).decoder(64).unwrap();
            assert!(nearly(&decoder, &back), "{} {example}:\n{}{}", arch.name, text(&decoder), text(&back));
            compared += 1;
        }
    }
    assert!(compared >= 8);
}

#[test]
fn lengths_decide() {
    let archs = described();
    let [llama, gpt2] = ["llama", "gpt2"].map(|name| archs.iter().find(|a| a.name == name).unwrap());
    let of = |changes: Json, context: u64| {
        let mut config = json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "sliding_window": 32,
        });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        arch::take_for(llama.clone(), &config)?.decoder(context)
    };
    assert_eq!(of(json!({}), 64).unwrap().windows, [Some(32); 2]);
    assert_eq!(of(json!({}), 32).unwrap().windows, [None; 2]);
    // What config.json says without meaning it.
    for (key, value, says) in [
        ("num_key_value_heads", json!(3), "key/value heads"),
        ("num_hidden_layers", json!(513), "layers"),
        ("hidden_size", json!(1u64 << 40), "width"),
        ("rms_norm_eps", json!(-1.0), "eps"),
        ("rms_norm_eps", json!(1e-60), "eps"),
        ("head_dim", json!(33), "rope_dim"),
        ("head_dim", json!(1u64 << 60), "head_dim"),
        ("hidden_act", json!("relu6"), "activation"),
        ("rope_scaling", json!({ "rope_type": "linear" }), "rope"),
    ] {
        let error = match of(json!({ key: value }), 64) {
            Err(error) => error,
            Ok(decoder) => panic!("{key} = {value}: {decoder:?}"),
        };
        assert!(error.to_string().contains(says), "{key}: {error}");
    }
    assert_eq!(of(json!({}), 0).unwrap_err().kind(), ErrorKind::Limit);
    assert_eq!(of(json!({}), u64::MAX).unwrap_err().kind(), ErrorKind::Limit);
    let learned = |context| {
        let config = json!({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4,
            "n_positions": 128, "layer_norm_epsilon": 1e-5,
        });
        arch::take_for(gpt2.clone(), &config)?.decoder(context)
    };
    assert_eq!(learned(128).unwrap().positions, Positions::Learned);
    assert!(learned(129).unwrap_err().to_string().contains("128 positions"));
}

#[test]
fn keys_are_inherited_one_by_one_and_unknown_ones_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = |graph: &str| {
        let path = dir.path().join("mine.toml");
        let head = "schema = 1\narch = \"llama\"\nextends = \"llama\"\n[[class]]\nname = \"Mine\"\nmodel_type = \"mine\"\n";
        std::fs::write(&path, format!("{head}{graph}")).unwrap();
        arch::read(&path, &Limits::default())
    };
    let config = json!({
        "architectures": ["Mine"], "model_type": "mine", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "other": "gelu",
    });
    let decoder = |graph: &str| arch::take_for(read(graph).unwrap(), &config).unwrap().decoder(64);
    assert!(decoder("").unwrap_err().to_string().contains("has no [graph]"));
    let plain = decoder("[graph]\n").unwrap();
    let other = decoder("[graph]\nactivation = \"other\"\nparallel = \"true\"\n").unwrap();
    assert_eq!(other.activation, qconv::arch::Activation::Gelu);
    assert_eq!(Decoder { activation: plain.activation, parallel: false, ..other }, plain);
    for (key, value, says) in [
        ("positions", "'alibi'", "rope, learned or none"),
        ("ffn", "'mixed'", "ffn"),
        ("windowed", "[true]", "each of 2 layers"),
        ("unrotated", "other", "unrotated"),
        ("residual", "0", "residual"),
        ("unless", "other == 'gelu' ? 'because of that' : null", "because of that"),
    ] {
        let error = decoder(&format!("[graph]\n{key} = \"{value}\"\n")).unwrap_err().to_string();
        assert!(error.contains(says), "{key}: {error}");
    }
    let unknown = read("[graph]\nwindws = \"1\"\n").unwrap_err().to_string();
    assert!(unknown.contains("windws") && unknown.contains("windowed"), "{unknown}");
}

/// What config.json may leave out, and what the class of transformers has then (5.23, `configuration_*.py`).
#[test]
fn keys_that_are_left_out_have_the_defaults_of_their_class() {
    let cases: &[(&str, &[(&str, Json)])] = &[
        (
            "llama",
            &[("rms_norm_eps", json!(1e-6)), ("hidden_act", json!("silu")), ("rope_theta", json!(10000.0))],
        ),
        ("mistral", &[("rms_norm_eps", json!(1e-6)), ("hidden_act", json!("silu"))]),
        (
            "mixtral",
            &[
                ("rms_norm_eps", json!(1e-5)),
                ("rope_theta", json!(1e6)),
                ("num_experts_per_tok", json!(2)),
                ("hidden_act", json!("silu")),
            ],
        ),
        ("qwen2", &[("rms_norm_eps", json!(1e-6)), ("use_sliding_window", json!(false))]),
        ("qwen3", &[("rms_norm_eps", json!(1e-6)), ("head_dim", json!(128))]),
        ("qwen3_moe", &[("norm_topk_prob", json!(false))]),
        (
            "gemma2-spm",
            &[
                ("rms_norm_eps", json!(1e-6)),
                ("head_dim", json!(256)),
                ("sliding_window", json!(4096)),
                ("query_pre_attn_scalar", json!(256)),
                ("hidden_activation", json!("gelu_pytorch_tanh")),
            ],
        ),
        ("gemma3-spm", &[("rms_norm_eps", json!(1e-6)), ("sliding_window", json!(4096))]),
        (
            "phi_3",
            &[("rms_norm_eps", json!(1e-5)), ("hidden_act", json!("silu")), ("sliding_window", json!(null))],
        ),
        ("gpt2", &[("activation_function", json!("gelu_new")), ("scale_attn_weights", json!(true))]),
        ("gpt_neox", &[("layer_norm_eps", json!(1e-5)), ("use_parallel_residual", json!(true))]),
        ("falcon2", &[("layer_norm_epsilon", json!(1e-5)), ("activation", json!("gelu"))]),
        ("cohere", &[("layer_norm_eps", json!(1e-5)), ("logit_scale", json!(0.0625))]),
        ("granite", &[("attention_multiplier", json!(1.0)), ("residual_multiplier", json!(1.0))]),
        (
            "gpt_oss",
            &[
                ("rms_norm_eps", json!(1e-5)),
                ("head_dim", json!(64)),
                ("sliding_window", json!(128)),
                ("num_experts_per_tok", json!(4)),
                ("swiglu_limit", json!(7.0)),
                ("swiglu_alpha", json!(1.702)),
            ],
        ),
    ];
    let decoder = |arch: &Architecture, config: &Json, what: &str| {
        let model = arch::take_for(arch.clone(), config).unwrap_or_else(|e| panic!("{what}: {e}"));
        model.decoder(8192).or_else(|_| model.decoder(64)).unwrap_or_else(|e| panic!("{what}: {e}"))
    };
    for (name, keys) in cases {
        let path = fixture("models").join(name).join("config.json");
        let config: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let arch = arch::recognise(&config, &[], None).unwrap().arch;
        for (key, default) in *keys {
            let what = format!("{name} without {key}");
            let (mut stated, mut silent) = (config.clone(), config.clone());
            if *key == "rope_theta" {
                // It stands among the parameters of RoPE, which may be lacking as a whole.
                for config in [&mut stated, &mut silent] {
                    config.as_object_mut().unwrap().retain(|key, _| !key.starts_with("rope_"));
                }
            }
            stated[*key] = default.clone();
            silent.as_object_mut().unwrap().remove(*key);
            assert_eq!(decoder(&arch, &silent, &what), decoder(&arch, &stated, &what), "{what}");
        }
        let tied = |tie: Option<bool>| {
            let mut config = config.clone();
            config.as_object_mut().unwrap().remove("tie_word_embeddings");
            tie.into_iter().for_each(|tie| config["tie_word_embeddings"] = json!(tie));
            arch::take_for(arch.clone(), &config).unwrap().is_tied().unwrap()
        };
        let wanted = ["gemma2-spm", "gemma3-spm", "gpt2", "falcon2", "cohere"].contains(name);
        assert_eq!((tied(None), tied(Some(true)), tied(Some(false))), (wanted, true, false), "{name}");
    }
}
