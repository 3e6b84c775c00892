//! What the benchmarks share: a made-up model, and what a process took.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value as Json, json};
use wait4::Wait4;

const HIDDEN: u64 = 2048;
const FFN: u64 = 8192;
const LAYERS: u64 = 24;
const HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const VOCAB: u64 = 49152;
/// Files of the made-up model.
pub const SHARDS: usize = 4;

#[derive(Clone, Copy)]
pub struct Usage {
    /// Seconds.
    pub wall: f64,
    /// Seconds, user and system.
    pub cpu: f64,
    /// Largest resident set, in bytes.
    pub peak: u64,
}

/// Runs a command that must succeed.
pub fn measure(mut command: Command) -> Usage {
    let begun = Instant::now();
    let used = command.spawn().unwrap().wait4().unwrap();
    let wall = begun.elapsed().as_secs_f64();
    assert!(used.status.success(), "{command:?}");
    let cpu = (used.rusage.utime + used.rusage.stime).as_secs_f64();
    Usage { wall, cpu, peak: used.rusage.maxrss }
}

/// Name of shard `k`, from 1.
pub fn shard_name(k: usize) -> String {
    format!("model-{k:05}-of-{SHARDS:05}.safetensors")
}

fn tensors() -> Vec<(String, Vec<u64>)> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
        ("lm_head.weight".to_string(), vec![VOCAB, HIDDEN]),
    ];
    let kv = HIDDEN / HEADS * KV_HEADS;
    for i in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![kv, HIDDEN]),
            ("self_attn.v_proj", vec![kv, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
        ] {
            tensors.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
    }
    tensors
}

/// Writes the model unless it is there already; returns the number of its weights.
pub fn write_model(dir: &Path) -> u64 {
    let tensors = tensors();
    let elements = |shape: &[u64]| shape.iter().product::<u64>();
    let total: u64 = tensors.iter().map(|(_, s)| elements(s)).sum();
    if dir.join("complete").is_file() {
        return total;
    }
    println!("writing {} ...", dir.display());
    fs::create_dir_all(dir).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture.join(name), dir.join(name)).unwrap();
    }
    let mut config: Json = serde_json::from_slice(&fs::read(fixture.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", FFN),
        ("num_hidden_layers", LAYERS),
        ("num_attention_heads", HEADS),
        ("num_key_value_heads", KV_HEADS),
        ("head_dim", HIDDEN / HEADS),
        ("vocab_size", VOCAB),
    ] {
        config[key] = value.into();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let mut shards: Vec<Vec<&(String, Vec<u64>)>> = vec![Vec::new(); SHARDS];
    let mut before = 0;
    for tensor in &tensors {
        shards[(before * SHARDS as u64 / total) as usize].push(tensor);
        before += elements(&tensor.1);
    }
    let mut random = Gaussian::new();
    let mut weight_map = serde_json::Map::new();
    for (k, shard) in shards.iter().enumerate() {
        let file = shard_name(k + 1);
        let mut header = serde_json::Map::new();
        let mut at = 0;
        for (name, shape) in shard {
            let end = at + 2 * elements(shape);
            header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
            weight_map.insert(name.clone(), file.as_str().into());
            at = end;
        }
        let header = Json::Object(header).to_string();
        let padding = " ".repeat(header.len().next_multiple_of(8) - header.len());
        let mut out = BufWriter::with_capacity(1 << 20, File::create(dir.join(&file)).unwrap());
        out.write_all(&((header.len() + padding.len()) as u64).to_le_bytes()).unwrap();
        out.write_all(header.as_bytes()).unwrap();
        out.write_all(padding.as_bytes()).unwrap();
        std::io::copy(&mut random.by_ref().take(at), &mut out).unwrap();
        out.into_inner().unwrap().sync_all().unwrap();
    }
    let index = json!({"metadata": {"total_size": 2 * total}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(dir.join("complete"), "").unwrap();
    total
}

/// Endless BF16 values that are distributed about as weights are: normal, deviation 0.02.
struct Gaussian {
    table: Vec<[u8; 2]>,
    state: u64,
}

impl Gaussian {
    fn new() -> Self {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        // The sum of twelve uniform numbers has the deviation 1.
        let table = (0..1 << 16)
            .map(|_| half::bf16::from_f32(0.02 * (0..12).map(|_| uniform()).sum::<f32>()).to_le_bytes())
            .collect();
        Self { table, state: 88172645463325252 }
    }
}

impl Read for Gaussian {
    /// Fills whole groups of four values, so `buf` has to be longer than that.
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let (groups, rest) = buf.as_chunks_mut::<8>();
        let mut next = || {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            let index = self.state;
            let mut group = [0; 8];
            for (k, value) in group.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *value = self.table[(index >> (16 * k)) as usize & 0xffff];
            }
            group
        };
        let n = groups.len() * 8;
        groups.iter_mut().for_each(|g| *g = next());
        if n > 0 {
            return Ok(n);
        }
        let last = next();
        rest.copy_from_slice(&last[..rest.len()]);
        Ok(rest.len())
    }
}
