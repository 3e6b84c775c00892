//! Seeds for fuzzing, made of fixtures and of what other tests put together: small, and read by their targets.

#[path = "checkpoint.rs"]
mod checkpoint;
#[path = "qpack.rs"]
mod qpack;
#[path = "raw.rs"]
mod raw;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::fuzz::torch;
use checkpoint::{Made, Random, f32_bytes};
use qconv::block::codec;
use qconv::container::imatrix::{Sums, to_flat, to_gguf};
use qconv::container::moments::{Contents, Input, Text};
use qconv::container::qpack::Qpack;
use qconv::container::safetensors;
use qconv::limits::Limits;
use qconv::tensor::DType;
use raw::{Raw, kind};
use serde_json::{Value as Json, json};

/// Target, name, bytes.
pub type Seeds = Vec<(&'static str, String, Vec<u8>)>;

/// All of them.
pub fn all(fixtures: &Path) -> Seeds {
    let mut seeds = Seeds::new();
    gguf(&mut seeds);
    calibrations(&mut seeds);
    tensors(&mut seeds, fixtures);
    packed(&mut seeds, &fixtures.join("packed"));
    torch_files(&mut seeds);
    qpacks(&mut seeds, fixtures);
    coreml(&mut seeds, &fixtures.join("coreml"));
    models(&mut seeds, &fixtures.join("models"));
    texts(&mut seeds);
    blocks(&mut seeds);
    seeds
}

/// As the targets take several files.
fn join(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, bytes) in parts {
        let line = if out.is_empty() { "" } else { "\n" };
        out.extend(format!("{line}%% {name}\n").bytes());
        out.extend(*bytes);
    }
    out
}

fn sorted(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    paths.sort();
    paths
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

/// A llama of one layer with a vocabulary.
fn with_vocabulary(model: &str) -> Raw {
    let tokens: [&[u8]; 6] = [b"<unk>", b"<s>", b"</s>", b"<0x0A>", b"\xe2\x96\x81a", b"b"];
    let f32s = f32_bytes(&[0.0, 0.0, 0.0, 0.0, -1.0, -2.0]);
    let i32s: Vec<u8> = [2i32, 3, 3, 6, 1, 1].iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut raw = Raw::valid();
    raw = raw
        .u32("llama.context_length", 64)
        .u32("llama.feed_forward_length", 16)
        .text("tokenizer.ggml.model", model);
    raw = raw.text("tokenizer.ggml.pre", "default").strings("tokenizer.ggml.tokens", &tokens);
    raw =
        raw.array("tokenizer.ggml.scores", kind::F32, 6, f32s).array("tokenizer.ggml.token_type", 5, 6, i32s);
    raw = raw.strings("tokenizer.ggml.merges", &[b"a b", b"b a"]);
    raw = raw.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
    raw.text("tokenizer.chat_template", "{{ messages }}")
}

fn gguf(seeds: &mut Seeds) {
    let mut big = Raw::llama();
    big.big_endian = true;
    let eps = 1e-5f32.to_le_bytes();
    let all = [
        ("empty", Raw::empty()),
        ("valid", Raw::valid()),
        (
            "big-endian",
            Raw { big_endian: true, ..Raw::empty() }.text("a", "b").info("x", &[4], 0, 0).with_data(16),
        ),
        ("version-2", Raw { version: 2, ..Raw::valid() }),
        (
            "aligned",
            Raw { alignment: 64, ..Raw::empty() }
                .u32("general.alignment", 64)
                .info("x", &[2], 1, 0)
                .with_data(64),
        ),
        (
            "arrays",
            Raw::llama().array("a", kind::U8, 3, [1, 2, 3]).strings("b", &[b"x", b""]).entry(
                "e",
                kind::F32,
                eps,
            ),
        ),
        (
            "split",
            Raw::empty().entry("split.no", 2, [0, 0]).entry("split.count", 2, [1, 0]).entry(
                "split.tensors.count",
                5,
                [0; 4],
            ),
        ),
    ];
    for (name, raw) in &all {
        for target in ["gguf", "gguf_round_trip", "inspect"] {
            seeds.push((target, name.to_string(), raw.bytes()));
        }
    }
    for model in ["llama", "gpt2", "bert", "t5", "gemma4"] {
        let mut raw = with_vocabulary(model);
        raw = raw.entry("llama.attention.layer_norm_rms_epsilon", kind::F32, eps);
        seeds.push(("gguf_model", model.to_string(), raw.bytes()));
    }
    let types: Vec<_> = DType::ALL.iter().filter_map(|t| Some((*t, t.ggml_id()?))).collect();
    let (mut raw, mut at) = (Raw::empty(), 0);
    for (dtype, id) in types {
        raw = raw.info(format!("t.{dtype}"), &[256], id, at);
        at = (at + dtype.nbytes(&[256]).unwrap()).next_multiple_of(32);
    }
    let raw = raw.with_data(at as usize);
    for target in ["gguf", "gguf_round_trip", "inspect"] {
        seeds.push((target, "types".into(), raw.bytes()));
    }
}

fn calibrations(seeds: &mut Seeds) {
    let sums = |columns: usize, counts: &[u64]| Sums {
        squares: (0..columns * counts.len()).map(|i| i as f64 * 3.5).collect(),
        counts: counts.to_vec(),
    };
    let all = BTreeMap::from([
        ("blk.0.attn_q.weight".to_string(), sums(4, &[12])),
        ("blk.0.ffn_down_exps.weight".to_string(), sums(3, &[5, 0, 7])),
    ]);
    seeds.push(("imatrix", "gguf".into(), to_gguf(&all, &["a.txt".into()], 3, 512).unwrap()));
    seeds.push(("imatrix", "flat".into(), to_flat(&all, &["a.txt".into()], 3, 512).unwrap()));
    let input = |name: &str, columns, experts| Input {
        name: name.into(),
        weights: vec![name.to_string(), format!("{name}.too")],
        columns,
        experts,
    };
    let contents = Contents {
        model: "m".into(),
        texts: vec![Text { name: "a.txt".into(), tokens: "00".repeat(32), n_ctx: 16, chunks: 2 }],
        inputs: vec![input("blk.0.attn_q.weight", 3, 1), input("blk.0.ffn_up_exps.weight", 2, 2)],
    };
    let (layout, _) = contents.layout().unwrap();
    let mut bytes = layout.header;
    bytes.resize(layout.total_len as usize, 0);
    seeds.push(("moments", "two".into(), bytes));
}

fn tensors(seeds: &mut Seeds, fixtures: &Path) {
    let made = Made::new(Json::Null)
        .with("a", "F32", &[2, 3], [1; 24])
        .with("b", "BF16", &[4], [2; 8])
        .with("c", "BOOL", &[], [1])
        .with("d", "I64", &[0, 5], [])
        .with("e", "F8_E4M3", &[3], [3; 3]);
    let (file, one) = (made.safetensors(), Made::new(Json::Null).with("x", "U8", &[2], [7; 2]).safetensors());
    let empty = Made::new(Json::Null).safetensors();
    for (name, bytes) in [("types", &file), ("one", &one), ("empty", &empty)] {
        seeds.push(("safetensors", name.into(), bytes.clone()));
        seeds.push(("inspect", format!("safetensors-{name}"), bytes.clone()));
    }
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let map: serde_json::Map<String, Json> =
        [("a", first), ("b", first), ("c", first), ("d", first), ("e", first), ("x", second)]
            .map(|(t, f)| (t.to_string(), json!(f)))
            .into_iter()
            .collect();
    let index = json!({"metadata": {"total_size": 35}, "weight_map": map}).to_string();
    let index = ("model.safetensors.index.json", index.as_bytes());
    seeds.push(("index", "two".into(), join(&[index, (first, &file), (second, &one)])));
    seeds.push(("index", "numbered".into(), join(&[(first, &file), (second, &one)])));
    seeds.push(("index", "single".into(), join(&[("model.safetensors", &file)])));
    let torch_file = fs::read(fixtures.join("pytorch/plain-2.pt")).unwrap();
    seeds.push(("index", "pytorch".into(), join(&[("pytorch_model.bin", &torch_file)])));
}

/// Checkpoints that libraries made: all that is said of them, and the beginning of their data.
fn packed(seeds: &mut Seeds, dir: &Path) {
    for path in sorted(dir).iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")) {
        let file = safetensors::open(path, &Limits::default()).unwrap();
        let Some(config) = file.metadata[0].get("quantization_config") else { continue };
        let (mut lines, mut data) = (String::new(), Vec::new());
        for t in file.store.tensors().iter().filter(|t| t.name != "expected") {
            let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
            lines += &format!("{} {} {}\n", t.name, t.dtype, shape.join(" "));
            let all = file.store.read_all(t).unwrap();
            data.extend(&all[..all.len().min(96)]);
        }
        let parts = [("config.json", config.as_bytes()), ("tensors", lines.as_bytes()), ("data", &data)];
        seeds.push(("packed", stem(path), join(&parts)));
    }
    let quantization =
        json!({"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": false, "sym": true});
    let made = Made::new(json!({"quantization_config": quantization}))
        .with("a.qweight", "I32", &[2, 8], [0x53; 64])
        .with("a.qzeros", "I32", &[2, 1], [0x77; 8])
        .with("a.scales", "F16", &[2, 8], [0x3c; 32])
        .with("a.g_idx", "I32", &[16], [0; 64])
        .with("b.weight", "F32", &[4], [0; 16]);
    let parts = [
        ("config.json", &made.config.to_string().into_bytes()[..]),
        ("model.safetensors", &made.safetensors()),
    ];
    seeds.push(("packed_directory", "gptq".into(), join(&parts)));
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [2, 4]});
    let made = Made::new(json!({"quantization_config": fp8}))
        .with("a.weight", "F8_E4M3", &[4, 8], [0x38; 32])
        .with("a.weight_scale_inv", "F32", &[2, 2], f32_bytes(&[1.0, 2.0, 0.5, 4.0]));
    let parts = [
        ("config.json", &made.config.to_string().into_bytes()[..]),
        ("model.safetensors", &made.safetensors()),
    ];
    seeds.push(("packed_directory", "fp8".into(), join(&parts)));
}

fn torch_files(seeds: &mut Seeds) {
    let turned = torch::tensor(torch::storage("torch\nBFloat16Storage", "1", 32), 1, &[3, 2], &[1, 3]);
    let nested = torch::dict(&[(torch::text("a"), torch::dict(&[(torch::text("b"), torch::six())]))]);
    for (name, pickle) in [
        ("one", torch::one(torch::six())),
        ("turned", torch::one(turned)),
        ("nested", torch::whole(&nested)),
        ("empty", torch::whole(&torch::dict(&[]))),
    ] {
        seeds.push(("pytorch", name.into(), torch::archive(&pickle)));
        seeds.push(("inspect", format!("pytorch-{name}"), torch::archive(&pickle)));
        seeds.push(("pickle", name.into(), pickle));
    }
}

fn qpacks(seeds: &mut Seeds, fixtures: &Path) {
    let (manifest, contents) = qpack::example();
    let (bytes, _) = qpack::file(manifest.clone(), &contents, &[]);
    let text = manifest.bytes().unwrap();
    seeds.push(("qpack", "example".into(), join(&[("manifest", &text), ("segments", &contents.concat())])));
    seeds.push(("qpack", "whole".into(), bytes.clone()));
    seeds.push(("inspect", "qpack".into(), bytes));
    seeds.push(("qpack_manifest", "example".into(), text));
    let all = Qpack::open(fixtures.join("qpack/all.qpack"), &Limits::default()).unwrap();
    let (_, manifest) = all.manifests().next().unwrap();
    let mut small = manifest.clone();
    small.files.clear();
    let text = small.bytes().unwrap();
    seeds.push(("qpack_manifest", "all".into(), text.clone()));
    seeds.push((
        "qpack",
        "all".into(),
        join(&[("manifest", &text), ("segments", &[0x3c, 0x11, 0x80, 0x02, 0x44])]),
    ));
    // Two planes: one copied, one of a single byte; 3 numbers come before.
    let entries = [8u32, 1 << 30 | 1].map(u32::to_le_bytes).concat();
    let stored = [&[1, 16, 0, 0][..], &[9, 8, 7, 6, 5, 4, 3, 2], &[7], &entries].concat();
    seeds.push(("qpack_planes", "two".into(), stored));
    let skewed: Vec<u8> = (0..600u32).map(|i| if i % 7 == 0 { (i / 7) as u8 } else { 3 }).collect();
    seeds.push(("qpack_planes", "skewed".into(), [&[0, 88, 2, 0][..], &skewed].concat()));
}

fn coreml(seeds: &mut Seeds, dir: &Path) {
    for name in ["mini", "coremltools", "weights"] {
        let data = dir.join(format!("{name}.mlpackage/Data/com.apple.CoreML"));
        let model = fs::read(data.join("model.mlmodel")).unwrap();
        let weights = fs::read(data.join("weights/weight.bin")).unwrap();
        if name != "weights" {
            seeds.push(("coreml_blob", name.into(), weights.clone()));
            seeds.push((
                "coreml_package",
                name.into(),
                join(&[("model.mlmodel", &model), ("weight.bin", &weights)]),
            ));
        }
        seeds.push(("coreml_model", name.into(), model));
    }
}

/// Lines of the first tensors of each kind.
fn lines(dir: &Path) -> String {
    let Ok(opened) = safetensors::open(dir, &Limits::default()) else { return String::new() };
    let mut lines = String::new();
    for t in opened.store.tensors().iter().take(24) {
        let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
        lines += &format!("{} {} {}\n", t.name, t.dtype, shape.join(" "));
    }
    lines
}

fn models(seeds: &mut Seeds, dir: &Path) {
    let mut tokenizers = Vec::new();
    for model in sorted(dir) {
        let name = stem(&model);
        let Ok(config) = fs::read(model.join("config.json")) else { continue };
        let lines = lines(&model);
        seeds.push((
            "config",
            name.clone(),
            join(&[("config.json", &config), ("tensors", lines.as_bytes())]),
        ));
        if let Ok(proto) = fs::read(model.join("tokenizer.model"))
            && proto.len() < 16_000
            && !tokenizers.contains(&proto)
        {
            seeds.push(("tokenizer_model", name.clone(), proto.clone()));
            tokenizers.push(proto);
        }
        let Ok(text) = fs::read(model.join("tokenizer.json")) else { continue };
        let small = shortened(&text);
        if small.len() < 12_000 && !tokenizers.contains(&small) {
            let beside = fs::read(model.join("tokenizer_config.json")).unwrap_or(b"{}".to_vec());
            let parts =
                [("tokenizer.json", &small[..]), ("tokenizer_config.json", &beside), ("config.json", b"{}")];
            seeds.push(("tokenizer_json", name, join(&parts)));
            tokenizers.push(small);
        }
    }
    let words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\n";
    seeds.push(("tokenizer_json", "words".into(), join(&[("vocab.txt", words), ("config.json", b"{}")])));
}

/// tokenizer.json with few tokens.
fn shortened(text: &[u8]) -> Vec<u8> {
    let mut json: Json = serde_json::from_slice(text).unwrap();
    let most = 320;
    match json.pointer_mut("/model/vocab") {
        Some(Json::Object(vocab)) => vocab.retain(|_, id| id.as_u64() < Some(most)),
        Some(Json::Array(list)) => list.truncate(most as usize),
        _ => {}
    }
    let vocab = json.pointer("/model/vocab").cloned().unwrap_or_default();
    if let Some(Json::Array(merges)) = json.pointer_mut("/model/merges") {
        merges.truncate(24);
        merges.retain(|m| {
            let words: Vec<&str> = match m {
                Json::String(s) => s.split(' ').collect(),
                m => m.as_array().unwrap().iter().filter_map(Json::as_str).collect(),
            };
            vocab.get(words.concat()).is_some()
        });
    }
    json.to_string().into_bytes()
}

fn texts(seeds: &mut Seeds) {
    for (name, text) in [
        ("choice", "a ?? b ? c : !d.e"),
        ("lists", "[a, b[0], max(b), len(c)] == where([true, i < 0])"),
        ("arithmetic", "round_up(a * 7 + 3, 32) / 4 % 5 - -i"),
        ("object", "{ x: a, y: numbered([1, 2.5]) }['y'].0\n{\"a\": 1}"),
    ] {
        seeds.push(("expression", name.into(), text.into()));
    }
    let template =
        "{% for m in messages %}{{ m['role'] | trim }}: {{ m.content }}{% endfor %}{{ bos_token }}";
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "x"}]}]).to_string();
    seeds.push(("chat", "plain".into(), template.into()));
    let parts =
        [("template", template.as_bytes()), ("messages.json", messages.as_bytes()), ("tools.json", b"[{}]")];
    seeds.push(("chat", "parts".into(), join(&parts)));
    let line =
        "3 0 64 0:128:256,1:0:4:8:3 0123456789abcdef01234567 {\"tallies\":[],\"loss\":null,\"flushed\":0}\n";
    seeds.push((
        "journal",
        "two".into(),
        format!("{line}4 64 128 0:384:256 0123456789abcdef01234567 {{}}\n").into(),
    ));
    let recipe = "schema = 1\nname = \"X\"\nid = 7\ntype = \"q4_k\"\n[vars]\nn = \"layers\"\n\
        [[rules]]\nrole = \"attn_v\"\nwhen = \"layer < n / 8\"\ntype = \"q6_k\"\n";
    seeds.push(("recipe", "small".into(), recipe.into()));
    let arch = "schema = 1\narch = \"x\"\nextends = \"decoder_base\"\n[[class]]\nname = \"XForCausalLM\"\n\
        model_type = \"x\"\n[example]\nnum_hidden_layers = 1\n";
    seeds.push(("architecture", "small".into(), arch.into()));
}

fn blocks(seeds: &mut Seeds) {
    let mut random = Random(7);
    for (k, dtype) in DType::ALL.iter().enumerate() {
        let Some(codec) = codec(*dtype) else { continue };
        let values: Vec<f32> = (0..dtype.block_size().max(8)).map(|_| random.value()).collect();
        let mut bytes = vec![0; dtype.bytes_for(values.len() as u64).unwrap() as usize];
        let importance = vec![1.0; values.len()];
        if codec.encode(&values, values.len(), Some(&importance), &mut bytes).is_err() {
            bytes.fill_with(|| random.below(256) as u8);
        }
        seeds.push(("blocks", dtype.to_string(), [&[k as u8][..], &bytes].concat()));
        seeds.push(("blocks_encode", dtype.to_string(), [&[k as u8, 1][..], &f32_bytes(&values)].concat()));
    }
}
