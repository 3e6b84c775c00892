//! `qconv diff`

use std::io::Write;
use std::path::PathBuf;

use qconv::diff::{Options, diff, print};
use qconv::model::Model;

use super::common::WorkArgs;
use super::{Status, ui};

/// Compare two models: metadata or config.json, other files, and tensors by name and value
///
/// Each may be a GGUF, safetensors, PyTorch or .qpack file, or a Hugging Face directory. Names are compared as
/// they are: GGUF has other names than Hugging Face. Values are compared however they are stored; where they are
/// the same, another type or encoding is shown (-v), and is no difference. Exit code 0: no difference, 1: some.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The first model
    pub a: PathBuf,

    /// The second model
    pub b: PathBuf,

    /// Compare only tensors whose name matches
    #[arg(long, value_name = "REGEX")]
    pub tensor: Option<regex::Regex>,

    /// Compare only metadata and files
    #[arg(long, conflicts_with = "tensor")]
    pub metadata: bool,

    #[command(flatten)]
    pub work: WorkArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let budget = args.work.budget()?;
    let (a, b) = (qconv::open(&args.a)?, qconv::open(&args.b)?);
    let options = Options { tensor: args.tensor.clone(), metadata_only: args.metadata };
    ui::catch_interrupt();
    let total = total(&a, &options);
    let progress = ui::Progress::new("comparing", total, args.work.quiet);
    let found = diff([&a, &b], &options, &budget, &progress);
    progress.finish();
    let found = found?;
    let mut out = ui::stdout();
    if args.work.json {
        serde_json::to_writer_pretty(&mut out, &found).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else if !args.work.quiet {
        print(&found, args.work.verbose, &mut out)?;
    }
    out.flush()?;
    Ok(if found.equal { Status::Done } else { Status::Findings })
}

/// Bytes that will be compared.
fn total(model: &Model, options: &Options) -> u64 {
    let wanted = |name: &str| options.tensor.as_ref().is_none_or(|r| r.is_match(name));
    match options.metadata_only {
        true => 0,
        false => model.tensors().filter(|t| wanted(t.name())).map(|t| t.stored_bytes()).sum(),
    }
}
