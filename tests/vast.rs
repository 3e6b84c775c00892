//! A checkpoint of a terabyte with a hundred thousand tensors, in files that are sparse: what headers say is read
//! and planned in little memory. `QCONV_VAST` names a directory to keep the files in, for measuring by hand.
#![cfg(unix)]

mod common;
#[path = "common/place.rs"]
mod place;
#[path = "common/raw.rs"]
mod raw;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};
use wait4::Wait4;

/// Most bytes that a process may take at its peak.
const MOST: u64 = 200 << 20;
const LAYERS: u64 = 129;
const EXPERTS: u64 = 256;
const SHARDS: usize = 200;
const HIDDEN: u64 = 4096;
const EXPERT: u64 = 1536;
const VOCAB: u64 = 512;
/// Of a layer: what is no expert's.
const PLAIN: u64 = 9;
const TENSORS: u64 = LAYERS * (3 * EXPERTS + PLAIN) + 3;

/// Where files are made, and whether they stay.
enum Ground {
    Kept(PathBuf),
    Passing(tempfile::TempDir),
}

impl Ground {
    /// `None`, with a word, where files are not sparse.
    fn new() -> Option<Self> {
        let ground = match std::env::var_os("QCONV_VAST") {
            Some(dir) => Self::Kept(dir.into()),
            None => Self::Passing(tempfile::tempdir().unwrap()),
        };
        fs::create_dir_all(ground.path()).unwrap();
        let probe = ground.path().join("probe");
        let file = File::create(&probe).unwrap();
        let is_sparse =
            file.set_len(8 << 30).is_ok() && file.metadata().is_ok_and(|m| m.blocks() * 512 < 1 << 20);
        fs::remove_file(&probe).unwrap();
        if !is_sparse {
            eprintln!("SKIPPED: no sparse files of 8 GB at {}", ground.path().display());
        }
        is_sparse.then_some(ground)
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Passing(dir) => dir.path(),
        }
    }
}

/// Name, name in an old GGUF file, and shape.
fn tensors() -> impl Iterator<Item = (String, String, Vec<u64>)> {
    let layer = |i: u64| {
        let plain = [
            ("input_layernorm", "attn_norm", vec![HIDDEN]),
            ("self_attn.q_proj", "attn_q", vec![4096, HIDDEN]),
            ("self_attn.k_proj", "attn_k", vec![512, HIDDEN]),
            ("self_attn.v_proj", "attn_v", vec![512, HIDDEN]),
            ("self_attn.o_proj", "attn_output", vec![HIDDEN, 4096]),
            ("self_attn.q_norm", "attn_q_norm", vec![128]),
            ("self_attn.k_norm", "attn_k_norm", vec![128]),
            ("post_attention_layernorm", "ffn_norm", vec![HIDDEN]),
            ("mlp.gate", "ffn_gate_inp", vec![EXPERTS, HIDDEN]),
        ];
        let plain = plain.into_iter().map(move |(hf, gguf, shape)| {
            (format!("model.layers.{i}.{hf}.weight"), format!("blk.{i}.{gguf}.weight"), shape)
        });
        let experts = (0..EXPERTS).flat_map(move |e| {
            let three = [
                ("gate", vec![EXPERT, HIDDEN]),
                ("up", vec![EXPERT, HIDDEN]),
                ("down", vec![HIDDEN, EXPERT]),
            ];
            three.into_iter().map(move |(kind, shape)| {
                let hf = format!("model.layers.{i}.mlp.experts.{e}.{kind}_proj.weight");
                (hf, format!("blk.{i}.ffn_{kind}.{e}.weight"), shape)
            })
        });
        plain.chain(experts)
    };
    let ends = [
        ("model.embed_tokens.weight", "token_embd.weight", vec![VOCAB, HIDDEN]),
        ("model.norm.weight", "output_norm.weight", vec![HIDDEN]),
        ("lm_head.weight", "output.weight", vec![VOCAB, HIDDEN]),
    ];
    let ends = ends.into_iter().map(|(hf, gguf, shape)| (hf.to_string(), gguf.to_string(), shape));
    (0..LAYERS).flat_map(layer).chain(ends)
}

fn bytes(shape: &[u64]) -> u64 {
    2 * shape.iter().product::<u64>()
}

/// A Qwen 3 with experts.
fn checkpoint(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let like = common::fixture("models/qwen3_moe");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(like.join(name), dir.join(name)).unwrap();
    }
    let mut config: Json = serde_json::from_slice(&fs::read(like.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("num_hidden_layers", LAYERS),
        ("num_local_experts", EXPERTS),
        ("hidden_size", HIDDEN),
        ("moe_intermediate_size", EXPERT),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 4),
        ("head_dim", 128),
        ("vocab_size", VOCAB),
    ] {
        config[key] = value.into();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let all: Vec<_> = tensors().map(|(name, _, shape)| (name, shape)).collect();
    let mut index = BufWriter::new(File::create(dir.join("model.safetensors.index.json")).unwrap());
    write!(index, "{{\"metadata\": {{}}, \"weight_map\": {{").unwrap();
    let mut comma = "";
    for (i, shard) in all.chunks(all.len().div_ceil(SHARDS)).enumerate() {
        let file = format!("model-{:05}-of-{SHARDS:05}.safetensors", i + 1);
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in shard {
            let next = end + bytes(shape);
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, next]});
            end = next;
            header.insert(name.clone(), entry);
            write!(index, "{comma}\n\"{name}\": \"{file}\"").unwrap();
            comma = ",";
        }
        let mut header = Json::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = File::create(dir.join(file)).unwrap();
        out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        out.write_all(&header).unwrap();
        out.set_len(8 + header.len() as u64 + end).unwrap();
    }
    write!(index, "}}}}").unwrap();
    index.into_inner().unwrap();
}

/// One file, with experts apart as llama.cpp once wrote them.
fn gguf(path: &Path) {
    let mut file = raw::Raw::empty().text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 512),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", EXPERT),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 4),
        ("expert_count", EXPERTS),
        ("expert_used_count", 2),
    ] {
        file = file.u32(&format!("llama.{key}"), value as u32);
    }
    let mut end = 0u64;
    for (_, name, shape) in tensors() {
        let dims: Vec<u64> = shape.iter().rev().copied().collect();
        file = file.info(name, &dims, 30, end);
        end += bytes(&shape).next_multiple_of(32);
    }
    let header = file.bytes();
    let mut out = File::create(path).unwrap();
    out.write_all(&header).unwrap();
    out.set_len(header.len() as u64 + end).unwrap();
}

/// Runs qconv, with stdout to a file, and gives the peak of its memory.
fn peak(ground: &Ground, args: &[&str]) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(args).current_dir(ground.path());
    let out = File::create(ground.path().join("out")).unwrap();
    let start = std::time::Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    let used = child.wait4().unwrap();
    assert!(used.status.success(), "{args:?}: {said}");
    let peak = used.rusage.maxrss;
    println!("{:>6.2} s  {:>4} MB  {}", start.elapsed().as_secs_f64(), peak >> 20, args.join(" "));
    peak
}

/// How many lines of what it said begin with `word`, white space aside.
fn lines(ground: &Ground, word: &str) -> usize {
    let out = BufReader::new(File::open(ground.path().join("out")).unwrap());
    out.lines().filter(|l| l.as_ref().unwrap().trim_start().starts_with(word)).count()
}

fn is_within(ground: &Ground, args: &[&str]) {
    let peak = peak(ground, args);
    assert!(peak <= MOST, "{args:?} took {peak} bytes");
}

#[test]
fn a_checkpoint() {
    let Some(ground) = Ground::new() else { return };
    checkpoint(&ground.path().join("hf"));
    let n = TENSORS as usize;
    assert!(n > 100_000 && tensors().map(|(_, _, shape)| bytes(&shape)).sum::<u64>() > 1 << 40);
    is_within(&ground, &["inspect", "hf"]);
    assert_eq!(lines(&ground, "model."), n - 1);
    assert_eq!(lines(&ground, &format!("{n} tensors, ")), 1);
    is_within(&ground, &["inspect", "--json", "hf"]);
    assert_eq!(lines(&ground, "\"name\": \"model."), n - 1);
    // Experts lie in one tensor there.
    for file_type in ["auto", "q8_0", "q4_k_m"] {
        is_within(&ground, &["hf-to-gguf", "hf", "-t", file_type, "--dry-run", "-o", "x.gguf"]);
        assert_eq!(lines(&ground, "blk."), (LAYERS * (PLAIN + 3)) as usize, "{file_type}");
    }
}

#[test]
fn a_gguf_file() {
    let Some(ground) = Ground::new() else { return };
    gguf(&ground.path().join("x.gguf"));
    let n = TENSORS as usize;
    is_within(&ground, &["inspect", "x.gguf"]);
    assert_eq!(lines(&ground, "blk."), n - 3);
    is_within(&ground, &["inspect", "--json", "x.gguf"]);
    assert_eq!(lines(&ground, "\"name\": \"blk."), n - 3);
    is_within(&ground, &["quantize", "x.gguf", "y.gguf", "-t", "q4_k_m", "--dry-run"]);
    assert_eq!(lines(&ground, "blk."), n - 3);
}
