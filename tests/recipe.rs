//! The type of every tensor against the linked `llama_model_quantize`: all file types, with models
//! made up so that every rule has its say. Most of the time (20 s) goes into tables that ggml makes
//! for the IQ types.
#![cfg(feature = "ggml")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qconv::container::gguf::{Gguf, Metadata, Value, write::Layout};
use qconv::convert::{Choice, ModelFacts, Overrides, Recipe, parse_tensor_type};
use qconv::ggml::oracle::{QuantizeOptions, model_quantize};
use qconv::limits::Limits;
use qconv::sys::write_all_at;
use qconv::tensor::DType;

/// A model of zeros. llama.cpp reads its metadata and does not look at its shapes, so that two rows
/// are enough for a matrix.
#[derive(Clone)]
struct Hollow {
    metadata: Metadata,
    tensors: Vec<(String, DType, Vec<u64>)>,
}

impl Hollow {
    fn new(arch: &str, layers: u32, heads: u32, kv_heads: u32, experts: u32) -> Self {
        let metadata = Metadata::default();
        let mut model = Self { metadata, tensors: Vec::new() };
        model.metadata.set("general.architecture", arch);
        for (key, value) in [
            ("block_count", layers),
            ("context_length", 64),
            ("embedding_length", 256),
            ("feed_forward_length", 256),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("expert_count", experts),
            ("expert_used_count", experts.min(2)),
        ] {
            model.set(key, Value::U32(value));
        }
        model.set("attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        model.set("attention.layer_norm_epsilon", Value::F32(1e-5));
        model
    }

    fn set(&mut self, key: &str, value: Value) {
        let arch = self.metadata.str("general.architecture").unwrap();
        self.metadata.set(format!("{arch}.{key}"), value);
    }

    fn with(mut self, name: &str, shape: &[u64]) -> Self {
        self.tensors.push((name.to_owned(), DType::F32, shape.to_vec()));
        self
    }

    /// The tensors at both ends of a model.
    fn ends(self, width: u64, tied: bool) -> Self {
        let model = self.with("output_norm.weight", &[width]).with("token_embd.weight", &[2, width]);
        if tied { model } else { model.with("output.weight", &[2, width]) }
    }

    /// The matrices of these names in all layers, those of experts stacked. The last layer comes
    /// first: the order of a file must not matter.
    fn layers(mut self, names: &[&str], width: u64) -> Self {
        let count = |key| self.metadata.u64(&format!("{}.{key}", self.arch())).unwrap();
        let (layers, experts) = (count("block_count"), count("expert_count"));
        for layer in (0..layers).rev() {
            for name in names {
                let shape: &[u64] = if name.ends_with("_exps") { &[experts, 2, width] } else { &[2, width] };
                self = self.with(&format!("blk.{layer}.{name}.weight"), shape);
            }
            self = self.with(&format!("blk.{layer}.attn_norm.weight"), &[width]);
        }
        self
    }

    fn arch(&self) -> String {
        self.metadata.str("general.architecture").unwrap().to_owned()
    }

    /// The metadata and names of a converted model.
    fn of(path: &Path) -> Self {
        let gguf = Gguf::open(path, &Limits::default()).unwrap();
        let tensors = gguf.store.tensors().iter().map(|t| {
            let mut shape = t.shape.clone();
            if let [.., rows, _] = shape.as_mut_slice() {
                *rows = 2.min(*rows);
            }
            (t.name.clone(), t.dtype, shape)
        });
        Self { tensors: tensors.collect(), metadata: gguf.metadata }
    }

    fn write(&self, path: &Path) {
        let layout = Layout::new(&self.metadata, &self.list()).unwrap();
        let file = std::fs::File::create(path).unwrap();
        file.set_len(layout.total_len).unwrap();
        write_all_at(&file, &layout.header, 0).unwrap();
    }

    fn list(&self) -> Vec<(&str, DType, &[u64])> {
        self.tensors.iter().map(|(n, d, s)| (n.as_str(), *d, s.as_slice())).collect()
    }

    /// An importance of one for every column.
    fn imatrix(&self) -> Vec<(String, Vec<f32>)> {
        let entry = |(name, _, shape): &(String, DType, Vec<u64>)| {
            let stacked = if shape.len() == 3 { shape[0] } else { 1 };
            let width = *shape.last().unwrap();
            (name.clone(), vec![1.0; (stacked * width) as usize])
        };
        self.tensors.iter().map(entry).collect()
    }
}

const DENSE: &[&str] = &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
const FUSED: &[&str] = &["attn_qkv", "attn_output", "ffn_up", "ffn_down"];
const EXPERTS: &[&str] = &[
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate_inp",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
];

struct Bench {
    dir: tempfile::TempDir,
    input: PathBuf,
    output: PathBuf,
    compared: usize,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (dir.path().join("in.gguf"), dir.path().join("out.gguf"));
        Self { dir, input, output, compared: 0 }
    }

    /// Our types of `tensors` are those that llama.cpp writes, or both refuse.
    fn compare(
        &mut self,
        what: &str,
        recipe: &Recipe,
        facts: &ModelFacts,
        overrides: &Overrides,
        options: &QuantizeOptions,
        tensors: &[(&str, DType, &[u64])],
    ) {
        let what = format!("{what}, {}, imatrix {}", recipe.name, overrides.imatrix);
        let ours = recipe.choose(facts, overrides, tensors);
        let theirs = model_quantize(&self.input, &self.output, options);
        let ours: Vec<Choice> = match (ours, &theirs) {
            (Ok(ours), _) => ours,
            (Err(e), Err(theirs)) => {
                let reason = theirs.to_string();
                let same =
                    ["no tensor type fallback is defined", "Bad layer"].iter().any(|r| reason.contains(r));
                assert!(same, "{what}: {e}, {reason}");
                return self.compared += 1;
            }
            (Err(e), Ok(())) => panic!("{what}: llama.cpp accepts what we refuse: {e}"),
        };
        if !overrides.imatrix && ours.iter().any(|c| c.needs_imatrix) {
            let reason = theirs.expect_err(&what).to_string();
            assert!(reason.contains("imatrix") || reason.contains("importance"), "{what}: {reason}");
            self.compared += 1;
            return;
        }
        theirs.unwrap_or_else(|e| panic!("{what}: {e}"));
        let shard = self.dir.path().join("out.gguf-00001-of-00001.gguf");
        let output = if options.keep_split { &shard } else { &self.output };
        let gguf = Gguf::open(output, &Limits::default()).unwrap();
        assert_eq!(gguf.metadata.u64("general.file_type"), Some(u64::from(recipe.id)), "{what}");
        let theirs: BTreeMap<_, _> =
            gguf.store.tensors().iter().map(|t| (t.name.as_str(), t.dtype)).collect();
        assert_eq!(theirs.len(), tensors.len(), "{what}");
        for ((name, ..), choice) in tensors.iter().zip(ours) {
            assert_eq!(Some(&choice.dtype), theirs.get(name), "{what}: {name}");
        }
        self.compared += 1;
    }

    /// All file types, with and without importances.
    fn all(&mut self, what: &str, model: &Hollow) {
        model.write(&self.input);
        let facts = ModelFacts::from_metadata(&model.metadata).unwrap();
        for recipe in Recipe::all().unwrap() {
            for imatrix in [false, true] {
                let overrides = Overrides { imatrix, ..Overrides::default() };
                let mut options = QuantizeOptions::new(recipe.id);
                if imatrix {
                    options.imatrix = model.imatrix();
                }
                self.compare(what, recipe, &facts, &overrides, &options, &model.list());
            }
        }
    }
}

#[test]
fn dense_models() {
    let mut bench = Bench::new();
    for (heads, kv_heads, layers, tied) in
        [(4, 4, 24, true), (4, 2, 3, false), (4, 1, 24, false), (8, 1, 2, true), (4, 1, 17, true)]
    {
        let model = Hollow::new("llama", layers, heads, kv_heads, 0).ends(256, tied).layers(DENSE, 256);
        bench.all(&format!("llama {layers} {heads}/{kv_heads}"), &model);
    }
    assert_eq!(bench.compared, 5 * 2 * Recipe::all().unwrap().len());
}

#[test]
fn models_of_80_layers() {
    let mut bench = Bench::new();
    for (arch, kv_heads, layers) in [
        ("llama", 1, 80),
        ("llama", 4, 80),
        ("llama", 2, 80),
        ("qwen2", 4, 80),
        ("jais2", 4, 68),
        ("qwen3", 1, 80),
    ] {
        let names = ["attn_v", "attn_output", "ffn_down"];
        let mut model = Hollow::new(arch, layers, 4, kv_heads, 0).ends(256, false).layers(&names, 256);
        bench.all(&format!("{arch} {layers} /{kv_heads}"), &model);
        model.set("nextn_predict_layers", Value::U32(1));
        if arch == "llama" && kv_heads == 1 {
            bench.all("llama with a layer that predicts", &model);
        }
    }
}

#[test]
fn models_with_experts() {
    let mut bench = Bench::new();
    for (experts, kv_heads, layers) in [(8, 1, 32), (8, 4, 9), (4, 4, 16), (2, 4, 8), (1, 4, 16)] {
        let model = Hollow::new("llama", layers, 4, kv_heads, experts).ends(256, experts == 2);
        bench.all(&format!("{experts} experts"), &model.layers(EXPERTS, 256));
    }
    // Experts that are not stacked: several tensors of a layer.
    let names = ["attn_v", "ffn_gate.0", "ffn_gate.1", "ffn_up.0", "ffn_up.1", "ffn_down.0", "ffn_down.1"];
    bench.all("single experts", &Hollow::new("llama", 16, 4, 4, 2).ends(256, false).layers(&names, 256));
    // A layer that the model does not have.
    let beyond = Hollow::new("llama", 2, 4, 4, 8).with("blk.2.ffn_down_exps.weight", &[8, 2, 256]);
    beyond.write(&bench.input);
    let facts = ModelFacts::from_metadata(&beyond.metadata).unwrap();
    for name in ["Q4_K_M", "IQ2_XXS"] {
        let recipe = Recipe::parse(name).unwrap();
        let overrides = Overrides { imatrix: true, ..Overrides::default() };
        let options = QuantizeOptions { imatrix: beyond.imatrix(), ..QuantizeOptions::new(recipe.id) };
        bench.compare("a layer too many", recipe, &facts, &overrides, &options, &beyond.list());
    }
}

#[test]
fn other_architectures() {
    let mut bench = Bench::new();
    for (arch, layers, tied) in [("falcon", 32, false), ("falcon", 5, true), ("gpt2", 24, true)] {
        let model = Hollow::new(arch, layers, 4, 1, 0)
            .ends(256, tied)
            .with("position_embd.weight", &[2, 256])
            .layers(FUSED, 256);
        bench.all(arch, &model);
    }
    bench.all(
        "falcon with 8 experts",
        &Hollow::new("falcon", 16, 4, 4, 8).ends(256, false).layers(EXPERTS, 256),
    );
    let mla = ["attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "attn_output"];
    let extra = ["nextn.eh_proj", "hc_attn_fn", "indexer.attn_k", "ssm_f_a", "ffn_down_exps", "ffn_up_shexp"];
    let names = [&mla[..], &extra].concat();
    bench.all("MLA", &Hollow::new("llama", 8, 4, 4, 16).ends(256, false).layers(&names, 256));
    let model = glm5_next(Hollow::new("glm5-next", 8, 4, 4, 16)).ends(256, false);
    bench.all("glm5-next", &model.layers(&names, 256));
    let model = bailingmoe3(Hollow::new("bailingmoe3", 8, 4, 4, 16)).ends(256, false);
    bench.all("bailingmoe3", &model.layers(&names, 256).with("blk.0.attn_k_b_exps.weight", &[3, 2, 256]));
    let mut loops = Hollow::new("nanbeige", 8, 4, 4, 0).ends(256, false).layers(DENSE, 256);
    loops.set("num_loops", Value::U32(2));
    bench.all("nanbeige", &loops);
}

fn glm5_next(mut model: Hollow) -> Hollow {
    for (key, value) in [
        ("attention.key_length_mla", 64),
        ("attention.value_length_mla", 64),
        ("attention.q_lora_rank", 64),
        ("attention.kv_lora_rank", 64),
        ("ssm.conv_kernel", 4),
        ("kda.head_dim", 64),
        ("expert_feed_forward_length", 256),
        ("expert_shared_count", 1),
        ("attention.indexer.head_count", 4),
        ("attention.indexer.key_length", 64),
        ("attention.indexer.top_k", 8),
        ("attention.indexer.kpool", 2),
        ("hyper_connection.count", 4),
        ("hyper_connection.sinkhorn_iterations", 4),
    ] {
        model.set(key, Value::U32(value));
    }
    model.set("hyper_connection.epsilon", Value::F32(1e-5));
    model
}

fn bailingmoe3(mut model: Hollow) -> Hollow {
    for (key, value) in [
        ("attention.key_length_mla", 64),
        ("attention.value_length_mla", 64),
        ("attention.kv_lora_rank", 64),
        ("ssm.conv_kernel", 4),
        ("kda.head_dim", 64),
        ("expert_feed_forward_length", 256),
        ("expert_shared_count", 1),
        ("leading_dense_block_count", 1),
        ("expert_gating_func", 2),
    ] {
        model.set(key, Value::U32(value));
    }
    model.set("kda.gate_lower_bound", Value::F32(-1.0));
    model
}

#[test]
fn odd_widths() {
    let mut bench = Bench::new();
    for width in [576, 96, 64, 33, 128] {
        for tied in [false, true] {
            let model = Hollow::new("llama", 3, 4, 2, 0).ends(width, tied).layers(DENSE, width);
            bench.all(&format!("rows of {width}"), &model);
        }
    }
}

#[test]
fn tensors_that_are_never_quantized() {
    let mut model = Hollow::new("llama", 2, 4, 2, 0).ends(256, false).layers(DENSE, 256);
    for name in [
        "altup_proj.weight",
        "per_layer_model_proj.weight",
        "per_layer_token_embd.weight",
        "blk.0.laurel_l.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.ssm_conv1d_q.weight",
        "blk.0.ssm_in.weight",
        "blk.0.shortconv.conv.weight",
        "blk.0.shortconv.in_proj.weight",
        "blk.0.indexer.k_proj.weight",
        "blk.0.indexer.attn_k.weight",
        "blk.0.ffn_gate_tid2eid.weight",
        "blk.0.ffn_gate_inp_shexp.weight",
        "blk.0.time_mix_w1.weight",
        "blk.0.time_mix_w3.weight",
        "blk.0.time_mix_decay_w2.weight",
        "blk.0.time_mix_lerp_fused.weight",
        "blk.0.attn_rel_b.weight",
        "enc.blk.0.attn_rel_b.weight",
        "position_embd.weight",
        "token_types.weight",
        "v.position_embd.weight",
        "v.patch_embd.weight",
        "mm.patch_merger.weight",
        "sam.neck.0.weight",
        "a.rvq.codebook.weight",
        "mm.a.code_embd.weight",
        "blk.0.attn_q.scale",
        "blk.0.some_bias",
        "cls.weight",
        "cls.output.weight",
        "blk.0.attn_q_norm.weight",
        "enc.blk.0.ffn_down.weight",
    ] {
        model = model.with(name, &[2, 256]);
    }
    model = model.with("blk.0.outer.weight", &[1, 256]).with("blk.0.inner.weight", &[256, 1]);
    let mut bench = Bench::new();
    bench.all("many kinds", &model);
    // Tensors of other types than F32 stay what they are, or change.
    for (dtype, tensor) in [DType::F16, DType::BF16].iter().cycle().zip(&mut model.tensors) {
        tensor.1 = *dtype;
    }
    bench.all("many kinds in half precision", &model);
}

#[test]
fn every_number_has_a_recipe_or_is_refused() {
    let bench = Bench::new();
    let model = Hollow::new("llama", 1, 4, 4, 0).ends(256, true);
    model.write(&bench.input);
    for id in 0..64 {
        let options = QuantizeOptions { imatrix: model.imatrix(), ..QuantizeOptions::new(id) };
        let theirs = model_quantize(&bench.input, &bench.output, &options).is_ok();
        assert_eq!(Recipe::parse(&id.to_string()).is_ok(), theirs, "{id}");
    }
}

#[test]
fn converted_fixtures() {
    let mut bench = Bench::new();
    let converted = bench.dir.path().join("converted.gguf");
    for (at, model) in common::MODELS.iter().enumerate() {
        let file_type = ["f16", "bf16", "f32"][at % 3];
        common::convert(&common::fixture(model), &converted, Some(file_type));
        bench.all(model, &Hollow::of(&converted));
    }
}

#[test]
fn wishes() {
    let mut bench = Bench::new();
    let types = |list: &[&str]| -> Vec<_> { list.iter().map(|t| parse_tensor_type(t).unwrap()).collect() };
    let cases = [
        Overrides { pure: true, ..Overrides::default() },
        Overrides { leave_output: true, ..Overrides::default() },
        Overrides { output: Some(DType::Q5_0), ..Overrides::default() },
        Overrides { token_embedding: Some(DType::F16), ..Overrides::default() },
        Overrides {
            pure: true,
            output: Some(DType::F32),
            token_embedding: Some(DType::Q4_1),
            leave_output: true,
            ..Overrides::default()
        },
        Overrides {
            tensor_types: types(&["attn_v=q3_k", "attn_[vk]=q2_k", r"blk\.(0|1[0-9])\.ffn_down=f16"]),
            ..Overrides::default()
        },
        Overrides {
            tensor_types: types(
                &["token_embd=q8_0", "^output=q4_k", "norm=q4_k", "down=tq2_0$"]
                    .map(|t| t.trim_end_matches('$')),
            ),
            output: Some(DType::Q6_K),
            token_embedding: Some(DType::Q5_K),
            ..Overrides::default()
        },
    ];
    for (tied, width) in [(false, 256), (true, 256), (false, 1280)] {
        let model = Hollow::new("llama", 16, 4, 1, 0)
            .ends(width, tied)
            .with("per_layer_token_embd.weight", &[2, width])
            .layers(DENSE, width);
        model.write(&bench.input);
        let facts = ModelFacts::from_metadata(&model.metadata).unwrap();
        for wish in &cases {
            for recipe in Recipe::all().unwrap() {
                let overrides = Overrides { imatrix: true, ..wish.clone() };
                let options = QuantizeOptions {
                    imatrix: model.imatrix(),
                    pure: wish.pure,
                    quantize_output_tensor: !wish.leave_output,
                    output_tensor_type: wish.output,
                    token_embedding_type: wish.token_embedding,
                    tensor_types: wish
                        .tensor_types
                        .iter()
                        .map(|(r, d)| (r.as_str().to_owned(), *d))
                        .collect(),
                    ..QuantizeOptions::new(recipe.id)
                };
                bench.compare(&format!("{wish:?}"), recipe, &facts, &overrides, &options, &model.list());
            }
        }
    }
}

#[test]
fn shards_that_are_kept() {
    let mut bench = Bench::new();
    let model = Hollow::new("llama", 24, 4, 1, 0).ends(256, false).layers(DENSE, 256);
    model.write(&bench.input);
    let facts = ModelFacts::from_metadata(&model.metadata).unwrap();
    let mut types = Vec::new();
    for file_order in [true, false] {
        let recipe = Recipe::parse("Q4_K_M").unwrap();
        let overrides = Overrides { file_order, ..Overrides::default() };
        let options = QuantizeOptions { keep_split: file_order, ..QuantizeOptions::new(recipe.id) };
        bench.compare("shards kept", recipe, &facts, &overrides, &options, &model.list());
        types.push(recipe.choose(&facts, &overrides, &model.list()).unwrap());
    }
    assert_ne!(types[0], types[1]);
}

#[test]
fn removed_layers() {
    let mut bench = Bench::new();
    let model = Hollow::new("llama", 16, 4, 1, 0).ends(256, false).layers(DENSE, 256);
    model.write(&bench.input);
    let facts = ModelFacts::from_metadata(&model.metadata).unwrap();
    let removed = [2, 9];
    let mut left = model.clone();
    left.tensors.retain_mut(|(name, ..)| {
        let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|n| n.split_once('.')) else {
            return true;
        };
        let layer: i32 = layer.parse().unwrap();
        let before = removed.iter().filter(|&&r| r < layer).count() as i32;
        let keep = !removed.contains(&layer);
        *name = format!("blk.{}.{rest}", layer - before);
        keep
    });
    for recipe in Recipe::all().unwrap() {
        let overrides = Overrides { imatrix: true, ..Overrides::default() };
        let options = QuantizeOptions {
            imatrix: model.imatrix(),
            prune_layers: removed.to_vec(),
            ..QuantizeOptions::new(recipe.id)
        };
        bench.compare("two layers removed", recipe, &facts, &overrides, &options, &left.list());
    }
}
