//! `qconv calibrate`: second moments of the inputs of a model's matrices.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qconv::calibrate::inputs::{Layers, Selection};
use qconv::calibrate::merge::merge;
use qconv::calibrate::moments::{Calibration, Options, Summary};
use qconv::container::moments::{Contents, Input, Moments};
use qconv::convert::Observer;
use qconv::error::{Error, Result};
use qconv::limits::Limits;
use serde_json::json;

use super::calibration::CalibrationArgs;
use super::common::parse_size;
use super::runnable::Loaded;
use super::ui::{self, Progress};
use qconv::plain;

/// Collect the second moments of a model's activations, for quantizers that search
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model: a GGUF file (of a split one, the first shard), a .qpack file or a Hugging Face directory
    #[arg(required_unless_present = "merge")]
    pub model: Option<PathBuf>,

    /// The file to write
    #[arg(short, long)]
    pub output: PathBuf,

    #[command(flatten)]
    pub calibration: CalibrationArgs,

    /// Layers whose inputs are wanted, such as 0-3,7; all by default
    #[arg(long, value_name = "LAYERS")]
    pub layers: Option<Layers>,

    /// Only inputs of weights whose name matches
    #[arg(long, value_name = "REGEX")]
    pub tensors: Option<regex::Regex>,

    /// The input of the matrix that makes the logits too
    #[arg(long)]
    pub process_output: bool,

    /// Most memory for the sums, such as 64M or 1G, beside the model and llama.cpp's own; where it is
    /// short, the text is read several times
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G")]
    pub max_memory: u64,

    /// How often the state is saved, after which the same command goes on when it was killed
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub save_every: u64,

    /// Add up files of earlier runs, on other texts or layers, instead of reading a text
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["model", "text", "chats", "dry_run"])]
    pub merge: Vec<PathBuf>,

    /// Show what would be done, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Overwrite the output, and drop what another run left unfinished there
    #[arg(long)]
    pub force: bool,

    /// Print a machine-readable summary to stdout
    #[arg(long)]
    pub json: bool,

    /// Say only what went wrong
    #[arg(short, long)]
    pub quiet: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    ui::catch_interrupt();
    let Some(path) = &args.model else { return merge_files(args) };
    let begun = Instant::now();
    let Loaded { runs, model } = args.calibration.model(path, args.quiet)?;
    let source = args.calibration.source();
    let windows = source.windows(&model).map_err(|e| if e.path().is_some() { e } else { e.at(path) })?;
    let selection =
        Selection { layers: args.layers.clone(), tensors: args.tensors.clone(), output: args.process_output };
    let on_gpu = args.calibration.gpu_layers != 0;
    let names = source.names().join(", ");
    let job =
        Calibration::new(&model, &runs.path, windows, &names, &selection, on_gpu).map_err(|e| at(e, path))?;
    if args.dry_run {
        return show(args, &job, model.tensor_bytes());
    }
    let options = Options {
        threads: args.calibration.threads(),
        max_memory: args.max_memory,
        save_every: Duration::from_secs(args.save_every),
    };
    let summary = collect(&job, &args.output, args.force, &options, args.quiet).map_err(|e| at(e, path))?;
    let file = Moments::open(&args.output, &Limits::default())?;
    let thin = coverage(&file)?;
    if args.json {
        let value = json!({
            "output": args.output.to_string_lossy(), "bytes": job.plan.layout.total_len, "inputs": file.contents().inputs.len(),
            "windows": job.windows(), "passes": summary.passes, "resumed": summary.resumed,
            "seconds": begun.elapsed().as_secs_f64(), "reading_seconds": summary.reading.as_secs_f64(),
            "summing_seconds": summary.summing.as_secs_f64(), "thin_experts": thin_json(&thin),
            "converted": runs.json(),
        });
        ui::print(format_args!("{value:#}"))?;
    } else if !args.quiet {
        ui::say(&format!(
            "{}: {}, {} inputs, {} windows in {} passes, {:.1} s ({:.1} s in the model, {:.1} s for the sums)",
            args.output.display(),
            ui::size(job.plan.layout.total_len),
            file.contents().inputs.len(),
            job.windows(),
            summary.passes,
            begun.elapsed().as_secs_f64(),
            summary.reading.as_secs_f64(),
            summary.summing.as_secs_f64(),
        ));
        say_thin(&thin);
    }
    Ok(())
}

/// Does the work under a progress bar.
pub fn collect(
    job: &Calibration<'_>,
    output: &Path,
    force: bool,
    options: &Options,
    quiet: bool,
) -> Result<Summary> {
    let passes = job.plan.passes(0, options.max_memory)?.len();
    let progress = Progress::counting("reading", "windows", (passes * job.windows()) as u64, quiet);
    let summary = job.run(output, force, options, &mut |p| {
        progress.advance(1, &format!("pass {} of {}", p.pass + 1, p.passes));
        if progress.interrupted() {
            return Err(
                Error::interrupted().hint("what was done is kept: the same command goes on from here")
            );
        }
        Ok(())
    });
    progress.finish();
    summary
}

/// An error without a file is one of this file.
fn at(e: Error, path: &Path) -> Error {
    if e.path().is_some() { e } else { e.at(path) }
}

fn show(args: &Args, job: &Calibration<'_>, model_bytes: u64) -> anyhow::Result<()> {
    let plan = &job.plan;
    let passes = plan.passes(0, args.max_memory)?;
    let sums = |p: &std::ops::Range<u64>| plan.bytes(p.clone());
    let most = passes.iter().map(sums).max().unwrap_or(0);
    let state =
        passes.iter().map(|p| p.clone().map(|n| plan.unit_len(n) * 8).sum::<u64>()).max().unwrap_or(0);
    if args.json {
        let one = |i: &Input| json!({"name": i.name, "weights": i.weights, "columns": i.columns, "experts": i.experts});
        let inputs: Vec<_> = plan.contents.inputs.iter().map(one).collect();
        let value = json!({
            "output": args.output.to_string_lossy(), "bytes": plan.layout.total_len, "state_bytes": 2 * state,
            "passes": passes.len(), "windows": job.windows(), "ctx": args.calibration.ctx,
            "peak_bytes": plan.scratch + most, "model_bytes": model_bytes, "inputs": inputs,
        });
        ui::print(format_args!("{value:#}"))?;
        return Ok(());
    }
    let width = plain::width(plan.contents.inputs.iter().map(|i| i.name.chars().count()), 0);
    for i in &plan.contents.inputs {
        let experts = if i.experts > 1 { format!(" x {}", i.experts) } else { String::new() };
        let others = i.weights.get(1..).unwrap_or_default().join(" ");
        ui::print(format_args!("{:<width$}  {:>6}{experts}  {others}", plain::line(&i.name), i.columns))?;
    }
    ui::print(format_args!(
        "\n{} inputs; {} windows of {} tokens, read in {} {}",
        plan.contents.inputs.len(),
        job.windows(),
        args.calibration.ctx,
        passes.len(),
        if passes.len() == 1 { "pass" } else { "passes" },
    ))?;
    ui::print(format_args!(
        "disk: {} for {}, at most {} for the state until then",
        ui::size(plan.layout.total_len),
        args.output.display(),
        ui::size(2 * state)
    ))?;
    ui::print(format_args!(
        "memory: at most {} for the sums; beside it the model with {}, and llama.cpp's own",
        ui::size(plan.scratch + most),
        ui::size(model_bytes)
    ))?;
    Ok(())
}

/// Experts that have seen fewer tokens than they have columns: their moments have no full rank.
struct Thin {
    input: String,
    columns: u64,
    experts: Vec<(usize, u64)>,
    of: u64,
}

fn coverage(file: &Moments) -> Result<Vec<Thin>> {
    let mut found = Vec::new();
    for input in &file.contents().inputs {
        let counts = file.counts(input)?.iter().copied().enumerate();
        let experts: Vec<_> = counts.filter(|(_, n)| *n < input.columns).collect();
        if !experts.is_empty() {
            let (input, columns, of) = (input.name.clone(), input.columns, input.experts);
            found.push(Thin { input, columns, experts, of });
        }
    }
    Ok(found)
}

fn thin_json(thin: &[Thin]) -> serde_json::Value {
    let one = |t: &Thin| {
        let experts: Vec<_> = t.experts.iter().map(|(e, n)| json!({"expert": e, "tokens": n})).collect();
        json!({"input": t.input, "columns": t.columns, "experts": experts})
    };
    thin.iter().map(one).collect()
}

fn say_thin(thin: &[Thin]) {
    const SHOWN: usize = 8;
    for t in thin {
        let unseen = t.experts.iter().filter(|(_, n)| *n == 0).count();
        let list: Vec<_> = t.experts.iter().take(SHOWN).map(|(e, n)| format!("{e} ({n})")).collect();
        let more = if t.experts.len() > SHOWN { ", ..." } else { "" };
        ui::say(&match t.of {
            1 => format!("note: {} has {} columns, and saw {} tokens", t.input, t.columns, t.experts[0].1),
            of => format!(
                "note: {}: {} of {of} experts saw fewer tokens than their {} columns, {unseen} none: {}{more}",
                t.input,
                t.experts.len(),
                t.columns,
                list.join(", ")
            ),
        });
    }
}

fn merge_files(args: &Args) -> anyhow::Result<()> {
    let limits = Limits::default();
    let files = args.merge.iter().map(|p| Moments::open(p, &limits)).collect::<Result<Vec<_>>>()?;
    let progress = Progress::new("merging", 0, true);
    let contents: Contents = merge(&files, &args.merge, &args.output, args.force, &mut || {
        if progress.interrupted() { Err(Error::interrupted()) } else { Ok(()) }
    })?;
    let merged = Moments::open(&args.output, &limits)?;
    let thin = coverage(&merged)?;
    if args.json {
        let value = json!({"output": args.output.to_string_lossy(), "inputs": contents.inputs.len(), "files": files.len(),
            "texts": contents.texts.iter().map(|t| &t.name).collect::<Vec<_>>(), "thin_experts": thin_json(&thin)});
        ui::print(format_args!("{value:#}"))?;
    } else if !args.quiet {
        ui::say(&format!(
            "{}: {} inputs from {} files",
            args.output.display(),
            contents.inputs.len(),
            files.len()
        ));
        say_thin(&thin);
    }
    Ok(())
}
