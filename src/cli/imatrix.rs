//! `qconv imatrix`: importance matrices, made from a text, added up, and looked at.

use std::path::{Path, PathBuf};

use qconv::calibrate::importance::{Coverage, Format, Importance};
use qconv::calibrate::statistics::{TensorStatistics, by_layer, statistics};
use qconv::container::imatrix::ImportanceMatrix;
use qconv::convert::Stage;
use qconv::error::Error;
use qconv::limits::Limits;
use qconv::plain;
use serde_json::{Value as Json, json};

use super::ui;

/// Make an importance matrix: what a model's matrices are multiplied with, over a text
#[derive(clap::Args, Debug)]
#[command(group(clap::ArgGroup::new("source").required(true).multiple(true).args(["model", "in_file"])))]
pub struct Args {
    /// The model: a GGUF file (of a split one, the first shard), a .qpack file or a Hugging Face directory. Without it the files of --in-file are added up
    #[cfg(feature = "ggml")]
    pub model: Option<PathBuf>,

    /// Needs the execution of models, which this qconv was built without
    #[cfg(not(feature = "ggml"))]
    #[arg(hide = true)]
    pub model: Option<PathBuf>,

    /// The file to write
    #[arg(short, long, required_unless_present = "show_statistics")]
    pub output: Option<PathBuf>,

    /// Add an importance matrix made before, GGUF or .dat; can be repeated
    #[arg(long, value_name = "FILE")]
    pub in_file: Vec<PathBuf>,

    /// Print what the result says of each tensor and layer
    #[arg(long)]
    pub show_statistics: bool,

    /// The file's format
    #[arg(long, value_enum, default_value_t = OutputFormat::Gguf)]
    pub output_format: OutputFormat,

    /// Collect the inputs of output.weight too
    #[arg(long)]
    pub process_output: bool,

    /// Leave out the perplexity, which takes a little time
    #[arg(long)]
    pub no_ppl: bool,

    /// Keep the progress every N times --ctx, to go on from there after a crash; by default every
    /// half minute
    #[arg(long, value_name = "N")]
    pub save_frequency: Option<usize>,

    /// Show what would be read, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Overwrite the output if it exists
    #[arg(long)]
    pub force: bool,

    /// Print a machine-readable summary to stdout
    #[arg(long)]
    pub json: bool,

    /// Say only what went wrong
    #[arg(short, long)]
    pub quiet: bool,

    #[cfg(feature = "ggml")]
    #[command(flatten)]
    pub text: super::calibration::CalibrationArgs,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum OutputFormat {
    /// As llama.cpp writes it today
    Gguf,
    /// The older flat format
    Dat,
}

impl Args {
    fn window(&self) -> u32 {
        #[cfg(feature = "ggml")]
        return u32::try_from(self.text.ctx).unwrap_or(u32::MAX);
        #[cfg(not(feature = "ggml"))]
        512
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    ui::catch_interrupt();
    let mut importance = Importance::default();
    for path in &args.in_file {
        importance.add(&ImportanceMatrix::open(path, &Limits::default())?, args.window())?;
    }
    // Hours of work are not to end at a name that is taken; and nobody else writes it meanwhile.
    let stage = match &args.output {
        Some(output) if !args.dry_run => Some(Stage::files_at(&[(output.clone(), 0)], args.force)?),
        _ => None,
    };
    let mut summary = json!({ "output": args.output.as_ref().map(|path| path.to_string_lossy()) });
    if let Some(model) = &args.model {
        match read::collect(args, model, importance)? {
            None => return Ok(()),
            Some(done) => {
                importance = done.0;
                summary["reading"] = done.1;
            }
        }
    }
    if let (Some(stage), Some(output)) = (stage, &args.output) {
        let format = match args.output_format {
            OutputFormat::Gguf => Format::Gguf,
            OutputFormat::Dat => Format::Flat,
        };
        let bytes = importance.to_file(format, args.window())?;
        let file = stage.files().first().ok_or_else(|| Error::misuse("no output"))?;
        file.write_at(0, &bytes)?;
        stage.commit()?;
        read::clean_up(output);
        summary["bytes"] = bytes.len().into();
        if !args.quiet {
            let entries = importance.sums.len();
            ui::say(&format!("{}: {entries} matrices, {}", output.display(), ui::size(bytes.len() as u64)));
        }
    }
    let coverage = importance.coverage();
    if !args.quiet {
        say_coverage(&coverage);
    }
    let tensors = if args.show_statistics { statistics(&importance) } else { Vec::new() };
    if args.json {
        summary["entries"] = importance.sums.len().into();
        summary["experts"] = json!(coverage);
        if args.show_statistics {
            summary["statistics"] = json!({ "tensors": tensors, "layers": by_layer(&tensors) });
        }
        ui::print(format_args!("{summary:#}"))?;
    } else if args.show_statistics {
        show(&tensors)?;
    }
    Ok(())
}

/// Names the experts of which the text says nothing, or little.
fn say_coverage(coverage: &[Coverage]) {
    let list = |experts: &[usize]| experts.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut faulty = 0;
    for c in coverage {
        for (experts, what) in [(&c.unseen, "never"), (&c.rarely_seen, "rarely")] {
            if !experts.is_empty() {
                faulty += 1;
                ui::say(&format!("warning: layer {}: {what} chosen: expert {}", c.layer, list(experts)));
            }
        }
    }
    if faulty > 0 {
        ui::say(
            "  experts that no token came to are quantized as without an importance matrix, and of those with \
             less than a tenth of an equal share little is known: give more text, or text of more kinds",
        );
    } else if let Some(fewest) = coverage.iter().flat_map(|c| &c.tokens).min() {
        ui::say(&format!("every expert was chosen, {fewest} times at least"));
    }
}

fn show(tensors: &[TensorStatistics]) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = ui::stdout();
    let or_dash = |v: Option<String>| v.unwrap_or_else(|| "-".to_string());
    let width = plain::width(tensors.iter().map(|t| t.kind().chars().count()), 6);
    writeln!(
        out,
        "{:>5}  {:width$}  {:>12}  {:>10}  {:>12}  {:>10}  {:>10}  {:>8}  {:>8}  {:>8}  {:>8}  {:>7}  {:>7}",
        "layer",
        "tensor",
        "sum(x^2)",
        "min",
        "max",
        "mean",
        "std",
        "active",
        "N",
        "entropy",
        "of most",
        "z>1",
        "cosine"
    )?;
    for t in tensors {
        writeln!(
            out,
            "{:>5}  {:width$}  {:>12.2}  {:>10.4}  {:>12.4}  {:>10.4}  {:>10.4}  {:>6.2} %  {:>8}  {:>8.4}  {:>6.2} %  {:>5.2} %  {:>7}",
            or_dash(t.layer.map(|l| l.to_string())),
            t.kind(),
            t.sum,
            t.min,
            t.max,
            t.mean,
            t.std,
            100.0 * t.active,
            t.n,
            t.entropy,
            100.0 * t.entropy_share,
            100.0 * t.outliers,
            or_dash(t.similarity.map(|s| format!("{s:.4}"))),
        )?;
    }
    writeln!(out, "\n{:>5}  {:>12}  {:>9}  {:>7}", "layer", "sum(x^2)", "z>1", "cosine")?;
    for l in by_layer(tensors) {
        let outliers = 100.0 * l.outliers;
        writeln!(out, "{:>5}  {:>12.2}  {outliers:>7.4} %  {:>7.4}", l.layer, l.sum, l.similarity)?;
    }
    out.flush()
}

#[cfg(feature = "ggml")]
mod read {
    use std::time::{Duration, Instant};

    use qconv::calibrate::checkpoint::{self, Key};
    use qconv::calibrate::collect::{Options, Progress, collect as collect_from};
    use qconv::convert::Observer;

    use super::*;
    use crate::cli::runnable::Loaded;

    const SAVE_EVERY: Duration = Duration::from_secs(30);
    /// A window that takes longer is not read to its end after Ctrl-C.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// Lets the model read; `None` after a dry run.
    pub fn collect(
        args: &Args,
        path: &Path,
        begin: Importance,
    ) -> anyhow::Result<Option<(Importance, Json)>> {
        let Loaded { runs, model } = args.text.model(path, args.quiet)?;
        let source = args.text.source();
        let windows = source.windows(&model).map_err(|e| e.at(path))?;
        let options = Options {
            threads: args.text.threads(),
            process_output: args.process_output,
            perplexity: !args.no_ppl,
        };
        let key = Key::new(path, &windows, options, &begin)?;
        let kept = args.output.as_deref().map(checkpoint::path_for).transpose()?;
        let resumed = kept.as_ref().and_then(|kept| checkpoint::open(kept, &key, &windows));
        let (total, n_ctx) = (windows.count(), windows.n_ctx);
        let already = resumed.as_ref().map_or(0, |p| p.windows);
        if args.dry_run {
            let tokens = total * n_ctx;
            if args.json {
                ui::print(format_args!(
                    "{:#}",
                    json!({"windows": total, "ctx": n_ctx, "tokens": tokens, "read_already": already})
                ))?;
            } else {
                ui::print(format_args!(
                    "{tokens} tokens in {total} windows of {n_ctx}, {already} of which are read already"
                ))?;
            }
            return Ok(None);
        }
        if let (false, Some(kept)) = (args.quiet, kept.as_ref().filter(|k| k.exists())) {
            ui::say(&match already {
                0 => format!("note: what {} keeps is of another run: begun anew", kept.display()),
                n => format!("goes on after {n} of {total} windows"),
            });
        }
        let datasets = begin.datasets.clone();
        let mut state = resumed.unwrap_or(Progress { importance: begin, ..Progress::default() });
        state.importance.datasets = datasets;
        state.importance.datasets.extend(source.names());

        let progress = ui::Progress::counting("reading", "windows", (total - already) as u64, args.quiet);
        let begun = Instant::now();
        let mut window_begun = begun;
        let slow = std::cell::Cell::new(false);
        let mut last_save = begun;
        let mut saved = already;
        let stop = || match slow.get() && progress.interrupted() {
            true => Err(interrupted()),
            false => Ok(()),
        };
        let mut after = |state: &Progress| {
            slow.set(window_begun.elapsed() > PATIENCE);
            window_begun = Instant::now();
            let running = match args.no_ppl {
                true => String::new(),
                false => format!("perplexity {:.4}", state.perplexity.estimate().value),
            };
            progress.advance(1, &running);
            let due = match args.save_frequency {
                Some(n) => state.windows - saved >= n.max(1),
                None => last_save.elapsed() >= SAVE_EVERY,
            };
            let stopped = progress.interrupted();
            if let Some(kept) = kept.as_ref().filter(|_| (due || stopped) && state.windows < total) {
                let bytes = checkpoint::to_bytes(state, &key, &windows)?;
                let stage = Stage::files_at(&[(kept.clone(), bytes.len() as u64)], true)?;
                stage.files().first().map_or(Ok(()), |file| file.write_at(0, &bytes))?;
                stage.commit()?;
                (last_save, saved) = (Instant::now(), state.windows);
            }
            if stopped && state.windows < total { Err(interrupted()) } else { Ok(()) }
        };
        let outcome = collect_from(&model, &windows, options, &mut state, &stop, &mut after);
        progress.finish();
        outcome.map_err(|e| e.at(path))?;
        let seconds = begun.elapsed().as_secs_f64();
        let ppl = (!args.no_ppl).then(|| state.perplexity.estimate());
        if !args.quiet {
            let ppl = ppl.map_or(String::new(), |p| format!(", perplexity {:.4} ± {:.4}", p.value, p.error));
            ui::say(&format!("{} tokens in {total} windows of {n_ctx}{ppl}, {seconds:.1} s", total * n_ctx));
        }
        let summary = json!({"windows": total, "ctx": n_ctx, "tokens": total * n_ctx, "read_before": already,
            "perplexity": ppl, "seconds": seconds, "converted": runs.json()});
        Ok(Some((state.importance, summary)))
    }

    fn interrupted() -> Error {
        Error::interrupted().hint("the same command goes on where the progress was kept")
    }

    /// Removes the progress, now that the output is there.
    pub fn clean_up(output: &Path) {
        if let Ok(kept) = checkpoint::path_for(output) {
            // Often there is none; what stays is found to belong to nothing.
            let _ = std::fs::remove_file(kept);
        }
    }
}

#[cfg(not(feature = "ggml"))]
mod read {
    use super::*;

    pub fn collect(_: &Args, path: &Path, _: Importance) -> qconv::Result<Option<(Importance, Json)>> {
        Err(Error::unsupported("this qconv was built without ggml and cannot execute models").at(path))
    }

    pub fn clean_up(_: &Path) {}
}
