//! `qconv verify`

use std::path::PathBuf;

use qconv::convert::{MergeLora, TokenCheck};
use qconv::error::Error;
use qconv::limits::Limits;
use qconv::verify::scan::Severity;
use qconv::verify::{LogitsOptions, Options, Outcome, Report, bytes_to_read, verify};

use super::common::{self, WorkArgs, parse_scaled};
use super::scan::{self, ScanArgs};
use super::{Status, ui};

/// Check files. One GGUF file is read, decoded, and run; of .qpack all SHA-256 are compared, and all values decoded.
/// Many files, directories, and files of other formats are scanned: nothing is executed
///
/// Exit codes: 0 clean, 1 something was found (with --strict, a warning suffices), 2 it could not be checked.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// GGUF, safetensors, PyTorch and .qpack files, of a split one any shard; Hugging Face directories, Core ML packages,
    /// importance matrices; directories of such
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    pub scan: ScanArgs,

    /// Compare with the source it was made from: a Hugging Face directory or a GGUF file; with a .qpack file
    /// a model of any format
    #[arg(long, value_name = "SRC")]
    pub against: Option<PathBuf>,

    /// Skip the forward pass
    #[arg(long)]
    pub no_forward: bool,

    /// Compare the logits with those of the source, computed by candle from the source's own weights;
    /// where they differ, say in which layer first, and by which tensor. Those of a Core ML package are compared
    /// with llama.cpp's for the same weights
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
    let limits = Limits::default();
    let [file] = args.files.as_slice() else {
        refuse_options(args, "with one FILE only")?;
        return args.scan.run(&args.files, &args.work, &limits);
    };
    if args.against.is_none() && args.scan.is_meant(&args.files)? {
        refuse_options(args, "where a file is run, and not scanned only")?;
        return args.scan.run(&args.files, &args.work, &limits);
    }
    if args.against.is_some() && args.scan.is_meant(&args.files)? {
        return Err(Error::misuse(
            "--against compares one GGUF, .qpack or Core ML file, which is not scanned only",
        )
        .into());
    }
    // Nothing that is suspicious is handed to the engine.
    let found = scan::beforehand(file, &args.work, &limits)?;
    let is_sound = found.count(Severity::Error) == 0;
    let merge = |(adapter, scale): &(PathBuf, f32)| MergeLora { adapter: adapter.clone(), scale: *scale };
    let options = Options {
        file: file.clone(),
        against: args.against.clone(),
        sample: None,
        forward: !args.no_forward && is_sound,
        logits: (args.logits && is_sound)
            .then(|| LogitsOptions { tokens: args.tokens.into(), memory: args.work.max_memory }),
        arch: args.arch.clone(),
        arch_file: args.arch_file.clone(),
        pre: args.pre.clone(),
        tokens: match is_sound {
            true => common::token_check(args.allow_token_mismatch),
            false => TokenCheck::Skipped,
        },
        merge_lora: args.merge_lora.iter().map(merge).collect(),
        limits,
    };
    ui::catch_interrupt();
    let total = bytes_to_read(&options)?;
    let progress = ui::Progress::new("verifying", total, args.work.quiet);
    let report = verify(&options, &args.work.budget()?, &progress);
    progress.finish();
    let report = report?;
    if args.work.json {
        ui::print(serde_json::to_string_pretty(&scan::joined(&report, &found)?)?)?;
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
    let status = say(&report, args.work.quiet);
    if !is_sound && !args.work.quiet {
        ui::say("skipped  engine: the file was not loaded, because of the errors above");
    }
    match found.is_clean(args.scan.strict) {
        true => Ok(status),
        false => Ok(Status::Findings),
    }
}

/// Options that say how one file is compared or run.
fn refuse_options(args: &Args, when: &str) -> Result<(), Error> {
    let given = [
        (args.against.is_some(), "--against"),
        (args.no_forward && args.files.len() > 1, "--no-forward"),
        (args.arch.is_some(), "--arch"),
        (args.pre.is_some(), "--pre"),
        (args.allow_token_mismatch, "--allow-token-mismatch"),
    ];
    match given.iter().find(|(is_given, _)| *is_given) {
        Some((_, option)) => Err(Error::misuse(format!("{option} has a meaning {when}"))),
        None => Ok(()),
    }
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
