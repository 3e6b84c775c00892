//! Speed and memory of whole conversions, beside copying the same bytes.
//!
//! `cargo bench --bench convert`. The model is a made-up Llama of 1.66 billion weights in four BF16
//! shards (3.3 GB), written once into `$QCONV_BENCH_DIR` (default: a folder of the system's
//! temporary directory, removed at the end); outputs come and go beside it, so 7 GB must be free.
//! Each measurement is a process of its own: wall time, CPU time and peak resident memory are what
//! the system accounts to it. The input is in the page cache as far as memory allows.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value as Json, json};
use wait4::Wait4;

const HIDDEN: u64 = 2048;
const FFN: u64 = 8192;
const LAYERS: u64 = 24;
const HEADS: u64 = 32;
const KV_HEADS: u64 = 8;
const VOCAB: u64 = 49152;
const SHARDS: usize = 4;

/// Rounds of each measurement; the fastest counts.
const ROUNDS: usize = 3;

/// llama.cpp's converter on a model of the same shape: CPU seconds, with 1000 to 1180 MB resident.
/// Measured on another occasion with llama.cpp 0c1e57098, on two shared cores.
const LLAMA_CPP: &[(&str, f64)] =
    &[("bf16", 30.9), ("f16", 21.3), ("q8_0", 31.2), ("tq1_0", 18.7), ("tq2_0", 17.7)];

fn main() {
    // `cargo test --benches` runs this too, to see that it starts.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let given = std::env::var_os("QCONV_BENCH_DIR").map(PathBuf::from);
    let dir = given.clone().unwrap_or_else(|| std::env::temp_dir().join("qconv-bench"));
    fs::create_dir_all(&dir).unwrap();
    let model = dir.join("made-up-1.7b");
    let weights = write_model(&model);
    run(&dir, &model, weights);
    if given.is_none() {
        fs::remove_dir_all(&dir).unwrap();
    }
}

fn run(dir: &Path, model: &Path, weights: u64) {
    let shards: Vec<PathBuf> = (1..=SHARDS).map(|k| model.join(shard_name(k))).collect();
    let input: u64 = shards.iter().map(|s| fs::metadata(s).unwrap().len()).sum();
    let output = dir.join("out.gguf");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{:.3} G weights, {:.2} GB of BF16 in {SHARDS} shards; {cores} cores",
        weights as f64 / 1e9,
        gb(input)
    );
    println!("fastest of {ROUNDS} rounds; outputs flushed to the disk, except where it says page cache");
    println!(
        "wall/copy: beside reading the input and writing as many bytes as the output has, flushed too\n"
    );

    let cat = best(|| {
        let mut cat = Command::new("cat");
        cat.args(&shards).stdout(Stdio::null());
        measure(cat)
    });
    println!("cat of the input to /dev/null: {:.2} s wall, {:.2} s CPU\n", cat.wall, cat.cpu);
    println!(
        "{:<7}{:>4}{:>9}{:>9}{:>9}{:>9}{:>12}{:>10}{:>9}{:>12}{:>8}",
        "type",
        "-j",
        "out GB",
        "wall s",
        "CPU s",
        "peak MB",
        "write s",
        "cached s",
        "/copy",
        "llama.cpp",
        "/CPU"
    );
    for file_type in ["bf16", "f16", "q8_0", "q4_0", "tq2_0"] {
        for threads in [1, 2] {
            let found = best(|| {
                let _ = fs::remove_file(&output);
                let mut qconv = Command::new(env!("CARGO_BIN_EXE_qconv"));
                qconv.args(["hf-to-gguf", "--no-verify", "-q", "--type", file_type]);
                qconv.arg(format!("-j{threads}")).arg("-o").arg(&output).arg(model);
                measure(qconv)
            });
            let bytes = fs::metadata(&output).unwrap().len();
            let _ = fs::remove_file(&output);
            let (mut flushed, mut cached) = (f64::MAX, f64::MAX);
            for _ in 0..ROUNDS {
                let (c, f) = write_zeros(&output, bytes);
                (cached, flushed) = (cached.min(c), flushed.min(f));
            }
            let theirs = LLAMA_CPP.iter().find(|(name, _)| *name == file_type);
            println!(
                "{file_type:<7}{threads:>4}{:>9.2}{:>9.2}{:>9.2}{:>9.0}{flushed:>12.2}{cached:>10.2}{:>9.2}{:>12}{:>8}",
                gb(bytes),
                found.wall,
                found.cpu,
                found.peak as f64 / 1e6,
                found.wall / (cat.wall + flushed),
                theirs.map_or("-".into(), |(_, s)| format!("{s:.1} s")),
                theirs.map_or("-".into(), |(_, s)| format!("{:.1}x", s / found.cpu)),
            );
        }
    }
    println!("\nllama.cpp: CPU seconds of its Python converter for this size, as published in the project's");
    println!(
        "notes (commit 0c1e57098, two shared cores, 1000 to 1180 MB resident); not measured in this run."
    );
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

#[derive(Clone, Copy)]
struct Usage {
    /// Seconds.
    wall: f64,
    /// Seconds, user and system.
    cpu: f64,
    /// Largest resident set, in bytes.
    peak: u64,
}

fn best(mut run: impl FnMut() -> Usage) -> Usage {
    (0..ROUNDS).map(|_| run()).min_by(|a, b| a.wall.total_cmp(&b.wall)).unwrap()
}

fn measure(mut command: Command) -> Usage {
    let begun = Instant::now();
    let used = command.spawn().unwrap().wait4().unwrap();
    let wall = begun.elapsed().as_secs_f64();
    assert!(used.status.success(), "{command:?}");
    let cpu = (used.rusage.utime + used.rusage.stime).as_secs_f64();
    Usage { wall, cpu, peak: used.rusage.maxrss }
}

/// Writes `bytes` zeros; seconds until they are in the page cache, and until they are on the disk.
fn write_zeros(path: &Path, bytes: u64) -> (f64, f64) {
    let zeros = vec![0u8; 1 << 20];
    let begun = Instant::now();
    let mut file = File::create(path).unwrap();
    let mut left = bytes;
    while left > 0 {
        let n = left.min(zeros.len() as u64);
        file.write_all(&zeros[..n as usize]).unwrap();
        left -= n;
    }
    let cached = begun.elapsed().as_secs_f64();
    file.sync_all().unwrap();
    let flushed = begun.elapsed().as_secs_f64();
    drop(file);
    fs::remove_file(path).unwrap();
    (cached, flushed)
}

fn shard_name(k: usize) -> String {
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
fn write_model(dir: &Path) -> u64 {
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
