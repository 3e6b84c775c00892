//! Whole files: `qconv quantize` beside the linked `llama_model_quantize`, and whether they write the
//! same bytes.
//!
//! `cargo bench --profile release --bench quantize` takes the made-up Llama of 1.66 billion weights
//! (see the benchmark `convert`) to five file types, and from Hugging Face to Q4_K_M in one pass.
//! With `QCONV_BENCH_GGUF=FILE` it takes that file to every file type, with a made-up importance
//! matrix where one is needed. Arguments name the file types instead. Each measurement is a process
//! of its own, on one thread.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{measure, write_model};
use qconv::container::gguf::Gguf;
use qconv::container::imatrix::{self, ImportanceMatrix, Sums};
use qconv::convert::{Quantize, Quantizer, Recipe};
use qconv::ggml::oracle::{QuantizeOptions, model_quantize};
use qconv::limits::Limits;

/// CPU seconds of llama.cpp's converter for the made-up model in BF16, the first of its two steps.
/// Measured on another occasion with llama.cpp 0c1e57098, on two shared cores.
const CONVERTER: f64 = 30.9;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [step, input, output, file_type, imatrix] = &args[..]
        && step == "llama.cpp"
    {
        return by_llama_cpp(input.as_ref(), output.as_ref(), file_type, imatrix);
    }
    // `cargo test --benches` runs this too, to see that it starts.
    if !args.iter().any(|a| a == "--bench") {
        return;
    }
    let mut types: Vec<String> = args.iter().filter(|a| !a.starts_with('-')).cloned().collect();
    let given = std::env::var_os("QCONV_BENCH_DIR").map(PathBuf::from);
    let dir = given.clone().unwrap_or_else(|| std::env::temp_dir().join("qconv-bench"));
    fs::create_dir_all(&dir).unwrap();
    let qconv = || Command::new(env!("CARGO_BIN_EXE_qconv"));
    let (full, imatrix, ours, ggmls) = (
        std::env::var_os("QCONV_BENCH_GGUF").map_or(dir.join("full.gguf"), PathBuf::from),
        dir.join("imatrix.gguf"),
        dir.join("ours.gguf"),
        dir.join("ggmls.gguf"),
    );
    let model = dir.join("made-up-1.7b");
    let made_up = std::env::var_os("QCONV_BENCH_GGUF").is_none();
    if made_up {
        write_model(&model);
        let mut convert = qconv();
        measure({
            convert.args(["hf-to-gguf", "-q", "--no-verify", "--force", "-o"]).arg(&full).arg(&model);
            convert
        });
        if types.is_empty() {
            types = ["q4_0", "q4_k_m", "q6_k", "iq4_xs", "tq2_0"].map(String::from).to_vec();
        }
    } else if types.is_empty() {
        types = Recipe::all().unwrap().iter().map(|r| r.name.to_lowercase()).collect();
    }
    write_imatrix(&full, &imatrix);
    println!("{}: {:.2} GB; one thread", full.display(), gb(&full));
    println!(
        "{:<14}{:>9}{:>26}{:>26}{:>9}{:>9}  tensors",
        "", "out GB", "llama.cpp: wall, CPU, MB", "qconv: wall, CPU, MB", "wall", "CPU"
    );
    let mut q4_k_m = None;
    for name in &types {
        let recipe = Recipe::parse(name).unwrap();
        let weighed = match needs_imatrix(&full, recipe) {
            Ok(weighed) => weighed,
            Err(why) => {
                println!("{name:<14} {why}");
                continue;
            }
        };
        let used = if weighed { imatrix.as_path() } else { Path::new("") };
        let mut by_llama_cpp = Command::new(std::env::current_exe().unwrap());
        by_llama_cpp.arg("llama.cpp").arg(&full).arg(&ggmls).arg(name).arg(used);
        let theirs = measure(by_llama_cpp);
        let mut own = qconv();
        own.args(["quantize", "-q", "--force", "-j1", "--type", name]).arg(&full).arg(&ours);
        if weighed {
            own.arg("--imatrix").arg(&imatrix);
        }
        let found = measure(own);
        let same = if weighed { same_tensors(&ours, &ggmls) } else { same_files(&ours, &ggmls) };
        println!(
            "{:<14}{:>9.2}{:>12.2}{:>8.2}{:>6.0}{:>12.2}{:>8.2}{:>6.0}{:>8.1}x{:>8.1}x  {}",
            format!("{name}{}", if weighed { " imatrix" } else { "" }),
            gb(&ours),
            theirs.wall,
            theirs.cpu,
            theirs.peak as f64 / 1e6,
            found.wall,
            found.cpu,
            found.peak as f64 / 1e6,
            theirs.wall / found.wall,
            theirs.cpu / found.cpu,
            same
        );
        if recipe.name == "Q4_K_M" {
            q4_k_m = Some(theirs.cpu);
        }
    }
    if let (Some(theirs), true) = (q4_k_m, made_up) {
        let mut own = qconv();
        own.args(["hf-to-gguf", "-q", "--no-verify", "--force", "-j1", "--type", "q4_k_m", "-o"]);
        own.arg(&ours).arg(&model);
        let found = measure(own);
        println!(
            "Hugging Face to q4_k_m in one pass: {:.1} s wall, {:.1} s CPU, {:.0} MB; llama.cpp's two steps: \
             {CONVERTER} s CPU (on another occasion) + {theirs:.1} s, {:.1}x",
            found.wall,
            found.cpu,
            found.peak as f64 / 1e6,
            (CONVERTER + theirs) / found.cpu
        );
    }
    for file in [&ours, &ggmls, &imatrix] {
        let _ = fs::remove_file(file);
    }
    if given.is_none() {
        fs::remove_dir_all(&dir).unwrap();
    }
}

/// What the child process does.
fn by_llama_cpp(input: &Path, output: &Path, file_type: &str, imatrix: &str) {
    let mut options = QuantizeOptions::new(Recipe::parse(file_type).unwrap().id);
    if !imatrix.is_empty() {
        let matrix = ImportanceMatrix::open(imatrix, &Limits::default()).unwrap();
        for (name, entry) in &matrix.entries {
            let mut values = vec![0.0; entry.values() as usize];
            matrix.read(entry, 0, &mut values).unwrap();
            options.imatrix.push((name.clone(), values));
        }
    }
    model_quantize(input, output, &options).unwrap();
}

fn gb(path: &Path) -> f64 {
    fs::metadata(path).unwrap().len() as f64 / 1e9
}

/// Whether the file type needs an importance matrix; what is wrong where it cannot be written at all.
fn needs_imatrix(full: &Path, recipe: &'static Recipe) -> Result<bool, String> {
    let job = Quantize::new(full, "x.gguf", Quantizer::new(recipe));
    job.plan().map(|job| job.plan.obstacle.is_some()).map_err(|e| e.to_string())
}

/// Made up: positive and uneven.
fn write_imatrix(full: &Path, path: &Path) {
    let gguf = Gguf::open(full, &Limits::default()).unwrap();
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let matrices = gguf.store.tensors().iter().filter(|t| t.shape.len() > 1);
    let sums: BTreeMap<String, Sums> = matrices
        .map(|t| {
            let experts = if t.shape.len() > 2 { t.shape[0] } else { 1 };
            let values = experts * t.shape[t.shape.len() - 1];
            let squares = (0..values).map(|_| f64::from(random().powi(3))).collect();
            (t.name.clone(), Sums { squares, counts: vec![1; experts as usize] })
        })
        .collect();
    fs::write(path, imatrix::to_gguf(&sums, &["made up".to_string()], 1, 1).unwrap()).unwrap();
}

fn same_files(a: &Path, b: &Path) -> &'static str {
    if fs::metadata(a).unwrap().len() != fs::metadata(b).unwrap().len() {
        return "DIFFERENT LENGTHS";
    }
    let open = |p| BufReader::with_capacity(1 << 20, fs::File::open(p).unwrap());
    let (mut a, mut b) = (open(a), open(b));
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let n = a.read(&mut x).unwrap();
        if n == 0 {
            return "same file";
        }
        b.read_exact(&mut y[..n]).unwrap();
        if x[..n] != y[..n] {
            return "DIFFERENT";
        }
    }
}

/// With an importance matrix the metadata say where it came from, which the library does not.
fn same_tensors(a: &Path, b: &Path) -> &'static str {
    let open = |p: &Path| Gguf::open(p, &Limits::default()).unwrap();
    let (a, b) = (open(a), open(b));
    let same = a.store.tensors().len() == b.store.tensors().len()
        && a.store.tensors().iter().zip(b.store.tensors()).all(|(t, u)| {
            (&t.name, t.dtype, &t.shape) == (&u.name, u.dtype, &u.shape)
                && a.store.read_all(t).unwrap() == b.store.read_all(u).unwrap()
        });
    if same { "same" } else { "DIFFERENT" }
}
