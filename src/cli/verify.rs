//! `qconv verify`

use std::path::PathBuf;

use qconv::convert::MergeLora;
use qconv::limits::Limits;
use qconv::verify::{LogitsOptions, Options, Outcome, Report, bytes_to_read, verify};

use super::common::{self, WorkArgs, parse_scaled};
use super::{Status, ui};

/// Check a file: of GGUF its structure, its tensors, its tokens, and that it runs; of .qpack all SHA-256, that
/// all values decode, and that quantized checkpoints come back
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The GGUF or .qpack file; of a split one, any shard
    pub file: PathBuf,

    /// Compare with the source it was made from: a Hugging Face directory or a GGUF file; with a .qpack file
    /// a model of any format
    #[arg(long, value_name = "SRC")]
    pub against: Option<PathBuf>,

    /// Skip the forward pass
    #[arg(long)]
    pub no_forward: bool,

    /// Compare the logits with those of the source, computed by candle from the source's own weights;
    /// where they differ, say in which layer first, and by which tensor
    #[arg(long, requires = "against", conflicts_with = "no_forward")]
    pub logits: bool,

    /// Tokens of the text for --logits
    #[arg(long, value_name = "N", default_value_t = 128, requires = "logits", value_parser = clap::value_parser!(u16).range(1..))]
    pub tokens: u16,

    /// The architecture that the conversion was told
    #[arg(long)]
    pub arch: Option<String>,

    /// The definition of the architecture that the conversion was told
    #[arg(long, value_name = "FILE", requires = "against", conflicts_with = "arch")]
    pub arch_file: Option<PathBuf>,

    /// The pre-tokenizer that the conversion was told
    #[arg(long)]
    pub pre: Option<String>,

    /// Let llama.cpp's tokens differ from those of tokenizer.json
    #[arg(long)]
    pub allow_token_mismatch: bool,

    /// The adapters that the conversion merged into the weights
    #[arg(long, value_name = "ADAPTER[:SCALE]", value_parser = parse_scaled, requires = "against")]
    pub merge_lora: Vec<(PathBuf, f32)>,

    #[command(flatten)]
    pub work: WorkArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let merge = |(adapter, scale): &(PathBuf, f32)| MergeLora { adapter: adapter.clone(), scale: *scale };
    let options = Options {
        file: args.file.clone(),
        against: args.against.clone(),
        sample: None,
        forward: !args.no_forward,
        logits: args
            .logits
            .then(|| LogitsOptions { tokens: args.tokens.into(), memory: args.work.max_memory }),
        arch: args.arch.clone(),
        arch_file: args.arch_file.clone(),
        pre: args.pre.clone(),
        tokens: common::token_check(args.allow_token_mismatch),
        merge_lora: args.merge_lora.iter().map(merge).collect(),
        limits: Limits::default(),
    };
    ui::catch_interrupt();
    let total = bytes_to_read(&options)?;
    let progress = ui::Progress::new("verifying", total, args.work.quiet);
    let report = verify(&options, &args.work.budget()?, &progress);
    progress.finish();
    let report = report?;
    if args.work.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    if args.work.verbose {
        for t in &report.tensors {
            ui::say(&format!(
                "{:<40} {:>6}  max {:.3e}  rmse {:.3e}  relative {:.3e}  cosine {:.6}",
                t.name, t.dtype, t.max_error, t.rmse, t.relative_rmse, t.cosine
            ));
        }
    }
    if args.work.verbose {
        for t in &report.compared {
            let apart = t.errors.map_or(String::new(), |e| {
                format!(": at most {:.3e} apart, NMSE {:.3e}, cosine {:.6}", e.max, e.nmse, e.cosine)
            });
            ui::say(&format!("{:<40} {}{apart}", t.name, t.kind.words()));
        }
    }
    Ok(say(&report, args.work.quiet))
}

/// Prints the checks; what failed is said even when quiet.
pub fn say(report: &Report, quiet: bool) -> Status {
    for c in &report.checks {
        let mark = match c.outcome {
            Outcome::Passed => "ok",
            Outcome::Failed => "FAILED",
            Outcome::Skipped => "skipped",
        };
        if !quiet || c.outcome == Outcome::Failed {
            ui::say(&format!("{mark:>7}  {}: {}", c.name, c.detail));
        }
    }
    if report.passed() { Status::Done } else { Status::Findings }
}
