//! Speed and memory of whole conversions, beside copying the same bytes.
//!
//! `cargo bench --bench convert`. The model is a made-up Llama of 1.66 billion weights in four BF16
//! shards (3.3 GB), written once into `$QCONV_BENCH_DIR` (default: a folder of the system's
//! temporary directory, removed at the end); outputs come and go beside it, so 7 GB must be free.
//! Each measurement is a process of its own: wall time, CPU time and peak resident memory are what
//! the system accounts to it. The input is in the page cache as far as memory allows.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{SHARDS, Usage, measure, shard_name, write_model};

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

fn best(mut run: impl FnMut() -> Usage) -> Usage {
    (0..ROUNDS).map(|_| run()).min_by(|a, b| a.wall.total_cmp(&b.wall)).unwrap()
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
