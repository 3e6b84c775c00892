//! `qconv eval`: what a model's predictions are worth, and what a quantization did to them.

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};

use qconv::container::coreml::chunks::is_model as is_coreml;
use qconv::container::side::read_text;
use qconv::convert::Stage;
use qconv::error::{Error, Result};
use qconv::eval::SAMPLE_TEXT;
use qconv::eval::baseline::{Baseline, Shape};
use qconv::eval::engine::Engine;
use qconv::eval::score::{Base, Divergence, Estimate, Perplexity, log_norm};
use qconv::eval::windows::Windows;
use qconv::limits::Limits;
use serde_json::{Value as Json, json};

use super::compare::{compare, files};
use super::runnable::{self, Execution, Ready};
use super::ui::{self, Progress};

/// Measure what a model predicts: perplexity, and divergence from the model it was made from
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// How well a model predicts a text, by llama.cpp's definition
    Perplexity {
        /// The model: a GGUF file (of a split one, the first shard), a .qpack file, a Hugging Face directory or a Core ML package
        model: PathBuf,
        #[command(flatten)]
        text: TextArgs,
    },
    /// How far a model's predictions depart from those of the model it was made from
    Kld {
        /// The model: a GGUF file (of a split one, the first shard), a .qpack file, a Hugging Face directory or a Core ML package
        model: PathBuf,
        /// The model to compare with, or what `eval baseline` or llama-perplexity kept of it
        #[arg(long, value_name = "MODEL|BASELINE")]
        base: PathBuf,
        #[command(flatten)]
        text: TextArgs,
    },
    /// Keep a model's predictions in a small file, to compare others with it later
    Baseline {
        /// The model: a GGUF file (of a split one, the first shard), a .qpack file, a Hugging Face directory or a Core ML package
        model: PathBuf,
        /// The file to write
        #[arg(short, long)]
        output: PathBuf,
        /// Tokens to keep of each prediction; by default as many as make a twentieth of the size
        /// of 16-bit logits, 1024 at most
        #[arg(long)]
        top_k: Option<usize>,
        /// Overwrite the output
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        text: TextArgs,
    },
    /// Several models in one table, in one pass over the text
    Compare {
        /// Models, as for perplexity; the first is what the others are compared with
        #[arg(required = true, num_args = 2..)]
        models: Vec<PathBuf>,
        /// Write the table to this file, as comma-separated values
        #[arg(long, value_name = "FILE")]
        csv: Option<PathBuf>,
        /// Draw KLD over size to this file, .svg or .png; may be given twice
        #[arg(long, value_name = "FILE")]
        plot: Vec<PathBuf>,
        /// Overwrite these files
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        text: TextArgs,
    },
}

#[derive(clap::Args, Debug)]
pub struct TextArgs {
    /// The text, in UTF-8, or - for stdin; by default a part of a novel by Jane Austen
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Tokens that the model reads at once, of which the second half is scored; 512 by default
    #[arg(long, value_name = "TOKENS")]
    ctx: Option<usize>,

    /// Stop after so many times --ctx
    #[arg(long)]
    chunks: Option<usize>,

    /// Threads; all processors by default
    #[arg(short = 'j', long)]
    threads: Option<u32>,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    gpu_layers: i32,

    /// Round the result of each operation to float16, as devices do (Core ML packages)
    #[arg(long)]
    fp16: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// No progress
    #[arg(short, long)]
    pub quiet: bool,
}

impl TextArgs {
    pub fn model(&self, path: &Path) -> Result<Ready> {
        let execution = Execution {
            gpu_layers: self.gpu_layers,
            lora: &[],
            fp16: self.fp16,
            #[cfg(feature = "ggml")]
            linked: runnable::Linked { threads: self.threads, rearranges: false, quiet: self.quiet },
        };
        runnable::execute(path, &execution)
    }

    fn text(&self) -> Result<Cow<'static, str>> {
        let most = Limits::default().side_file_bytes;
        match &self.text {
            None => Ok(SAMPLE_TEXT.into()),
            Some(path) if path.as_os_str() == "-" => {
                let mut bytes = Vec::new();
                let mut input = std::io::stdin().lock().take(most + 1);
                input.read_to_end(&mut bytes).map_err(|e| Error::io("read", "stdin", e))?;
                if bytes.len() as u64 > most {
                    return Err(Error::limit(format!("has more than {most} bytes")).at("stdin"));
                }
                let text = String::from_utf8(bytes);
                text.map(Cow::Owned).map_err(|_| Error::malformed("is no UTF-8 text").at("stdin"))
            }
            Some(path) => read_text(path, most).map(Cow::Owned),
        }
    }

    fn windows(&self, model: &dyn Engine) -> Result<Windows> {
        self.windows_of(model, &self.text()?)
    }

    fn windows_of(&self, model: &dyn Engine, text: &str) -> Result<Windows> {
        Windows::new(model, text, self.ctx.unwrap_or(512), self.chunks)
    }

    pub fn threads(&self) -> u32 {
        super::common::threads(self.threads)
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    ui::catch_interrupt();
    let (models, text): (Vec<&PathBuf>, _) = match &args.command {
        Command::Perplexity { model, text } | Command::Baseline { model, text, .. } => (vec![model], text),
        Command::Kld { model, base, text } => (vec![model, base], text),
        Command::Compare { models, text, .. } => (models.iter().collect(), text),
    };
    runnable::check_fp16(text.fp16, models.into_iter().map(PathBuf::as_path))?;
    match &args.command {
        Command::Perplexity { model, text } => perplexity(model, text),
        Command::Kld { model, base, text } => kld(model, base, text),
        Command::Baseline { model, output, top_k, force, text } => {
            baseline(model, output, *top_k, *force, text)
        }
        Command::Compare { models, csv, plot, force, text } => {
            compare(models, &files(csv.as_deref(), plot)?, *force, text)
        }
    }
}

/// Shows a window's end with a running value, and stops on Ctrl-C.
pub struct Watch {
    progress: Progress,
    window: usize,
    quiet: bool,
}

impl Watch {
    pub fn new(windows: &Windows, quiet: bool) -> Self {
        let progress = Progress::counting("reading", "windows", windows.count() as u64, quiet);
        Self { progress, window: 0, quiet }
    }

    pub fn at(&mut self, window: usize, value: impl FnOnce() -> String) -> Result<()> {
        use qconv::convert::Observer;
        if self.progress.interrupted() {
            return Err(Error::interrupted());
        }
        if window > self.window {
            self.window = window;
            self.progress.advance(1, &value());
        }
        Ok(())
    }

    /// Clears the bar, and says what happened to the models that their predictions do not show.
    pub fn finish(&self, models: &[(&Path, &dyn Engine)]) {
        self.progress.finish();
        models.iter().for_each(|(path, model)| runnable::say_remark(path, *model, self.quiet));
    }
}

fn perplexity(path: &Path, args: &TextArgs) -> anyhow::Result<()> {
    let Ready { runs, model, .. } = args.model(path)?;
    let windows = args.windows(&*model).map_err(|e| e.at(path))?;
    let mut watch = Watch::new(&windows, args.quiet);
    let mut ppl = Perplexity::default();
    windows
        .read(&[&*model], args.threads(), |window, rows, next| {
            watch.at(window, || format!("perplexity {:.4}", ppl.estimate().value))?;
            for row in rows {
                ppl.add(log_norm(row) - row.get(next).map_or(f64::NEG_INFINITY, |&x| f64::from(x)));
            }
            Ok(())
        })
        .map_err(|e| e.at(path))?;
    watch.finish(&[(path, &*model)]);
    let estimate = ppl.estimate();
    if args.json {
        ui::print(format_args!(
            "{:#}",
            json!({ "perplexity": estimate, "scored": ppl.count(), "windows": windows.count(), "ctx": windows.n_ctx,
                    "converted": runs.json() })
        ))?;
    } else {
        ui::print(format_args!("perplexity {}", plus_minus(estimate, 4)))?;
        ui::print(format_args!(
            "{} predictions in {} windows of {} tokens",
            ppl.count(),
            windows.count(),
            windows.n_ctx
        ))?;
    }
    Ok(())
}

fn kld(path: &Path, base: &Path, args: &TextArgs) -> anyhow::Result<()> {
    let Ready { runs, model, .. } = args.model(path)?;
    let mut divergence = Divergence::default();
    let mut base_converted = Json::Null;
    let note = if !base.is_dir() && Baseline::is_one(base)? {
        let mut baseline = Baseline::open(base)?;
        if baseline.n_vocab != model.n_tokens() {
            let found = format!("of {} tokens, the model has {}", baseline.n_vocab, model.n_tokens());
            return Err(Error::misuse(format!("was made with a vocabulary {found}")).at(base).into());
        }
        if args.text.is_some() || args.chunks.is_some() || args.ctx.is_some() {
            let message = "--text, --ctx and --chunks do not apply: the baseline holds its text";
            return Err(Error::misuse(message).at(base).into());
        }
        let mut windows = baseline.windows.clone();
        if baseline.shape.is_none() {
            // llama.cpp's file leaves this to the model.
            windows.bos = Windows::bos_of(&*model);
        }
        let mut watch = Watch::new(&windows, args.quiet);
        windows
            .read(&[&*model], args.threads(), |window, rows, next| {
                watch.at(window, || running(&divergence))?;
                let base = baseline.next_row()?;
                rows.iter().for_each(|row| divergence.add(row, base, next));
                Ok(())
            })
            .map_err(|e| e.at(path))?;
        watch.finish(&[(path, &*model)]);
        baseline.shape.map(|s| {
            let error = divergence.summary().kld_sampling_error;
            format!(
                "the base's {} likeliest tokens and {} drawn of the rest: this adds ± {error:.6} to the KLD",
                s.k, s.drawn
            )
        })
    } else {
        let Ready { runs, model: base_model, .. } = args.model(base)?;
        base_converted = runs.json();
        divergence = side_by_side(args, (base, &*base_model), (path, &*model))?;
        None
    };
    let s = divergence.summary();
    if args.json {
        let converted = runs.json();
        ui::print(format_args!(
            "{:#}",
            json!({ "divergence": s, "note": note, "converted": converted, "base_converted": base_converted })
        ))?;
        return Ok(());
    }
    ui::print(format_args!("perplexity          {}", plus_minus(s.perplexity, 4)))?;
    ui::print(format_args!("perplexity of base  {}", plus_minus(s.base_perplexity, 4)))?;
    ui::print(format_args!("ln of their ratio   {}", plus_minus(s.ln_ratio, 6)))?;
    ui::print(format_args!("KLD mean            {}", plus_minus(s.kld, 6)))?;
    ui::print(format_args!("KLD median          {:.6}", s.kld_median))?;
    ui::print(format_args!("KLD 99 %            {:.6}", s.kld_99))?;
    ui::print(format_args!("KLD 99.9 %          {:.6}", s.kld_999))?;
    ui::print(format_args!("KLD maximum         {:.6}", s.kld_max))?;
    ui::print(format_args!("RMS of change in p  {} %", plus_minus(percent(s.p_rms), 3)))?;
    ui::print(format_args!("same top token      {} %", plus_minus(percent(s.same_top), 3)))?;
    ui::print(format_args!("{} predictions{}", s.count, note.map(|n| format!(", {n}")).unwrap_or_default()))?;
    Ok(())
}

fn running(divergence: &Divergence) -> String {
    format!("KLD {:.6}", divergence.kld().value)
}

/// Lets a model and its base read the text.
fn side_by_side(args: &TextArgs, base: (&Path, &dyn Engine), of: (&Path, &dyn Engine)) -> Result<Divergence> {
    let windows = same_windows(args, &[base, of])?;
    let mut divergence = Divergence::default();
    let mut watch = Watch::new(&windows, args.quiet);
    windows
        .read(&[base.1, of.1], args.threads(), |window, rows, next| {
            watch.at(window, || running(&divergence))?;
            if let [base, row] = rows {
                divergence.add(row, Base::Whole(base, log_norm(base)), next);
            }
            Ok(())
        })
        .map_err(|e| e.at(of.0))?;
    watch.finish(&[base, of]);
    Ok(divergence)
}

/// How a written file is compared with its source.
#[cfg(feature = "ggml")]
pub struct Comparison<'t> {
    /// The text; a part of a novel where there is none.
    pub text: Option<&'t Path>,
    /// Most windows.
    pub chunks: usize,
    pub threads: u32,
    pub quiet: bool,
}

/// Loads both files, and compares what they predict.
///
/// # Errors
/// What cannot be run; texts that are too short.
#[cfg(feature = "ggml")]
pub fn compare_files(
    base: &Path,
    path: &Path,
    options: &Comparison<'_>,
) -> Result<qconv::eval::score::DivergenceSummary> {
    let args = TextArgs {
        text: options.text.map(Path::to_path_buf),
        ctx: None,
        chunks: Some(options.chunks),
        threads: Some(options.threads),
        gpu_layers: 0,
        fp16: false,
        json: false,
        quiet: options.quiet,
    };
    let (base_model, model) = (args.model(base)?, args.model(path)?);
    Ok(side_by_side(&args, (base, &*base_model.model), (path, &*model.model))?.summary())
}

/// The text in windows, after a look at whether all models read the same tokens in it. Where a Core ML package has
/// the same vocabulary and other tokens, all read the first model's, and that is said: tokenizer.json and llama.cpp
/// differ here and there (see [`qconv::eval::parity`]).
///
/// # Errors
/// `Misuse` where models with different tokens cannot be compared.
pub fn same_windows(args: &TextArgs, models: &[(&Path, &dyn Engine)]) -> Result<Windows> {
    let text = args.text()?;
    let &(first_path, first) = models.first().ok_or_else(|| Error::misuse("no model is given"))?;
    let windows = args.windows_of(first, &text).map_err(|e| e.at(first_path))?;
    for &(path, model) in models.iter().skip(1) {
        if args.windows_of(model, &text).map_err(|e| e.at(path))? == windows {
            continue;
        }
        let ids = || 0..i32::try_from(first.n_tokens()).unwrap_or(i32::MAX);
        let same = first.n_tokens() == model.n_tokens()
            && ids().all(|id| first.token_text(id) == model.token_text(id));
        if !same || !is_coreml(path) && !is_coreml(first_path) {
            return Err(Error::misuse("reads other tokens in the text than the first model")
                .at(path)
                .hint("only models with the same tokenizer can be compared"));
        }
        if !args.quiet {
            ui::say(&format!(
                "note: {} would read the text in other tokens of the same vocabulary; it reads those of {}",
                path.display(),
                first_path.display()
            ));
        }
    }
    Ok(windows)
}

fn baseline(
    path: &Path,
    output: &Path,
    top_k: Option<usize>,
    force: bool,
    args: &TextArgs,
) -> anyhow::Result<()> {
    let Ready { runs, model, .. } = args.model(path)?;
    let windows = args.windows(&*model).map_err(|e| e.at(path))?;
    let mut shape = Shape::fitting(model.n_tokens());
    if let Some(k) = top_k {
        if k == 0 || k > shape.n_vocab {
            let message = format!("--top-k {k}: 1 to {} tokens can be kept", shape.n_vocab);
            return Err(Error::misuse(message).into());
        }
        shape = Shape::with_top(shape.n_vocab, k);
    }
    let stage = Stage::files_at(&[(output.to_path_buf(), shape.file_len(&windows))], force)?;
    let file = stage.files().first().ok_or_else(|| Error::misuse("no output"))?;
    let header = shape.header(&windows);
    file.write_at(0, &header)?;
    let mut at = header.len() as u64;
    let mut watch = Watch::new(&windows, args.quiet);
    let (mut rest, mut count) = (0.0, 0u64);
    windows
        .read(&[&*model], args.threads(), |window, rows, next| {
            watch.at(window, String::new)?;
            for row in rows {
                let sampled = shape.sample(row, next, count);
                rest += f64::from(sampled.log_rest).exp();
                count += 1;
                let bytes = shape.row_bytes(&sampled);
                file.write_at(at, &bytes)?;
                at += bytes.len() as u64;
            }
            Ok(())
        })
        .map_err(|e| e.at(path))?;
    watch.finish(&[(path, &*model)]);
    stage.commit()?;
    let full = 2 * shape.n_vocab as u64 * count;
    let (rest, share) = (rest / count.max(1) as f64, at as f64 / full.max(1) as f64);
    if args.json {
        ui::print(format_args!(
            "{:#}",
            json!({ "output": output.to_string_lossy(), "bytes": at, "top_k": shape.k, "drawn": shape.drawn, "share_of_f16_logits": share, "mean_rest": rest, "converted": runs.json() })
        ))?;
    } else {
        ui::print(format_args!(
            "{}: {}, {:.2} % of 16-bit logits; the {} likeliest tokens hold {:.3} % of the probability, \
             {} drawn stand for the rest",
            output.display(),
            ui::size(at),
            100.0 * share,
            shape.k,
            100.0 * (1.0 - rest),
            shape.drawn
        ))?;
    }
    Ok(())
}

pub fn plus_minus(e: Estimate, digits: usize) -> String {
    format!("{:.digits$} ± {:.digits$}", e.value, e.error)
}

fn percent(e: Estimate) -> Estimate {
    Estimate { value: 100.0 * e.value, error: 100.0 * e.error }
}
