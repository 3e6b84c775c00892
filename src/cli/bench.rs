//! `qconv bench`: how fast models are, and what memory they take.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use qconv::convert::Observer;
use qconv::error::{Error, Result};
use qconv::eval::bench::{Speed, Test, measure};
use qconv::ggml::{Model, ModelOptions, set_verbose};
use qconv::sys;
use serde_json::{Value as Json, json};

use super::runnable::Runnable;
use super::ui::{self, Progress};

/// Measure tokens per second, load time and memory of models, as llama-bench does
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Models: GGUF files (of a split one, the first shard), .qpack files or Hugging Face directories
    #[arg(required = true)]
    pub models: Vec<PathBuf>,

    /// Lengths of prompts in tokens; 0 for none
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    pub n_prompt: Vec<u32>,

    /// Tokens to generate; 0 for none
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "128")]
    pub n_gen: Vec<u32>,

    /// Runs of each test, after one to warm up
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub repetitions: u32,

    /// Numbers of threads; all processors by default
    #[arg(short, long, visible_short_alias = 'j', value_name = "N,...", value_delimiter = ',')]
    pub threads: Vec<u32>,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i32,

    /// Print JSON, with every run
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,

    /// Print comma-separated values, a line for each test
    #[arg(long)]
    pub csv: bool,

    /// Say only what went wrong
    #[arg(short, long)]
    pub quiet: bool,

    /// Show what llama.cpp says
    #[arg(long)]
    pub log: bool,
}

/// A model with a number of threads.
struct Row<'a> {
    path: &'a Path,
    description: String,
    bytes: u64,
    parameters: u64,
    threads: u32,
    load_seconds: f64,
    tests: Vec<(Test, Speed)>,
    converted: Json,
    weights: u64,
    cache: u64,
    compute: u64,
    // From loading on; of mapped files what was read.
    peak: Option<u64>,
}

/// The table goes to stdout.
///
/// # Errors
/// When a model cannot be loaded or generates nothing, or stdout cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    set_verbose(args.log);
    let prompts = args.n_prompt.iter().map(|&n| Test::Prompt(n));
    let tests: Vec<Test> =
        prompts.chain(args.n_gen.iter().map(|&n| Test::Generation(n))).filter(|t| t.tokens() > 0).collect();
    if tests.is_empty() {
        return Err(Error::misuse("there is nothing to measure").hint("give -p or -n a length").into());
    }
    let threads =
        if args.threads.is_empty() { vec![super::common::threads(None)] } else { args.threads.clone() };
    ui::catch_interrupt();
    let runs = args.models.len() * threads.len() * tests.len() * (args.repetitions as usize + 1);
    let progress = Progress::counting("measuring", "runs", runs as u64, args.quiet);
    let mut rows = Vec::new();
    for path in &args.models {
        bench(path, args, &tests, &threads, &progress, &mut rows).map_err(|e| e.at(path))?;
    }
    progress.finish();
    let text = match (args.json, args.csv) {
        (true, _) => format!("{:#}\n", Json::from_iter(rows.iter().map(|r| as_json(r, args.gpu_layers)))),
        (_, true) => as_csv(&rows, args.gpu_layers),
        _ => as_table(&rows, &tests),
    };
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| Error::io("write", "stdout", e))?;
    Ok(())
}

fn bench<'a>(
    path: &'a Path,
    args: &Args,
    tests: &[Test],
    threads: &[u32],
    progress: &Progress,
    rows: &mut Vec<Row<'a>>,
) -> Result<()> {
    // Where the peak cannot begin anew, only the first model's is its own.
    let own_peak = sys::reset_peak_memory() || rows.is_empty();
    let options =
        ModelOptions { use_extra_bufts: true, n_gpu_layers: args.gpu_layers, ..ModelOptions::default() };
    let runs = Runnable::of(path, None, args.quiet)?;
    let begin = Instant::now();
    let model = Model::load(&runs.path, &options)?;
    let load_seconds = begin.elapsed().as_secs_f64();
    let name = name(path);
    for &threads in threads {
        let mut measured = Vec::new();
        for &test in tests {
            let mut between = || {
                progress.advance(1, &format!("{name} {test}"));
                if progress.interrupted() { Err(Error::interrupted()) } else { Ok(()) }
            };
            measured.push((test, measure(&model, test, args.repetitions as usize, threads, &mut between)?));
        }
        let most = |bytes: fn(&Speed) -> u64| measured.iter().map(|(_, s)| bytes(s)).max().unwrap_or(0);
        rows.push(Row {
            path,
            description: model.description(),
            bytes: model.tensor_bytes(),
            parameters: model.n_params(),
            threads,
            load_seconds,
            converted: runs.json(),
            weights: model.buffers().weights,
            cache: most(|s| s.buffers.cache),
            compute: most(|s| s.buffers.compute),
            tests: measured,
            peak: own_peak.then(sys::peak_memory).flatten(),
        });
    }
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn as_table(rows: &[Row<'_>], tests: &[Test]) -> String {
    let mut head: Vec<String> =
        ["model", "size", "weights", "threads", "load"].into_iter().map(String::from).collect();
    head.extend(tests.iter().map(|t| format!("{t} tokens/s")));
    head.extend(["cache", "compute", "peak memory"].into_iter().map(String::from));
    let mut table = vec![head];
    for r in rows {
        let mut line = vec![
            name(r.path),
            ui::size(r.bytes),
            ui::count(r.parameters),
            r.threads.to_string(),
            format!("{:.2} s", r.load_seconds),
        ];
        line.extend(r.tests.iter().map(|(_, s)| format!("{:.2} ± {:.2}", s.mean(), s.deviation())));
        line.extend([ui::size(r.cache), ui::size(r.compute), r.peak.map_or("?".into(), ui::size)]);
        table.push(line);
    }
    let width =
        |i: usize| table.iter().filter_map(|l| l.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..tests.len() + 8).map(width).collect();
    let mut text = String::new();
    for line in &table {
        for (i, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            text += &if i == 0 { format!("{cell:width$}") } else { format!("  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

fn as_json(r: &Row<'_>, gpu_layers: i32) -> Json {
    let tests: Vec<Json> = r
        .tests
        .iter()
        .map(|(test, s)| {
            let (prompt, generated) = match test {
                Test::Prompt(n) => (*n, 0),
                Test::Generation(n) => (0, *n),
            };
            json!({"test": test.to_string(), "n_prompt": prompt, "n_gen": generated,
                   "tokens_per_second": s.mean(), "deviation": s.deviation(), "runs": s.runs})
        })
        .collect();
    json!({
        "model": r.path, "description": r.description, "bytes": r.bytes, "parameters": r.parameters,
        "threads": r.threads, "gpu_layers": gpu_layers, "load_seconds": r.load_seconds, "tests": tests,
        "weight_bytes": r.weights, "cache_bytes": r.cache, "compute_bytes": r.compute, "peak_bytes": r.peak,
        "converted": r.converted,
    })
}

fn as_csv(rows: &[Row<'_>], gpu_layers: i32) -> String {
    let mut out = String::from(
        "model,bytes,parameters,threads,gpu_layers,load_seconds,test,tokens_per_second,deviation,weight_bytes,\
         cache_bytes,compute_bytes,peak_bytes\n",
    );
    for r in rows {
        let quoted = r.path.to_string_lossy().replace('"', "\"\"");
        for (test, s) in &r.tests {
            out += &format!(
                "\"{quoted}\",{},{},{},{gpu_layers},{:.4},{test},{:.4},{:.4},{},{},{},{}\n",
                r.bytes,
                r.parameters,
                r.threads,
                r.load_seconds,
                s.mean(),
                s.deviation(),
                r.weights,
                r.cache,
                r.compute,
                r.peak.map(|p| p.to_string()).unwrap_or_default()
            );
        }
    }
    out
}
