//! `qconv hf-to-gguf`

use std::path::PathBuf;

use qconv::convert::{FileType, HfToGguf};
use qconv::limits::Limits;
use qconv::verify;
use serde_json::json;

use super::common::{self, EditArgs, WriteArgs};
use super::{Status, ui};

/// Convert a Hugging Face model to a GGUF file
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model's directory, or its weights file or index
    pub source: PathBuf,

    /// The file to write, or a directory for it; by default named after model and type, beside
    /// the source
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// auto (the source's precision), f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, tq2_0, tq1_0
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "auto")]
    pub file_type: String,

    /// Take the model for this architecture, whatever config.json says
    #[arg(long)]
    pub arch: Option<String>,

    /// The pre-tokenizer (tokenizer.ggml.pre), where the tokenizer's structure is unknown
    #[arg(long)]
    pub pre: Option<String>,

    /// Skip the checks of the finished file
    #[arg(long)]
    pub no_verify: bool,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

/// `auto` is `None`.
pub fn file_type(name: &str) -> qconv::Result<Option<FileType>> {
    if name.eq_ignore_ascii_case("auto") { Ok(None) } else { FileType::parse(name).map(Some) }
}

/// Weights of each tensor that the spot check looks at.
const SPOT_CHECK: u64 = 16 << 10;

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let conversion = HfToGguf {
        source: args.source.clone(),
        output: args.output.clone(),
        file_type: file_type(&args.file_type)?,
        arch: args.arch.clone(),
        pre: args.pre.clone(),
        edits: args.edits.edits(),
        limits: Limits::default(),
    };
    let job = conversion.plan()?;
    let Some(seconds) = common::carry_out(&job, &args.write)? else { return Ok(Status::Done) };
    let work = &args.write.work;
    if !work.quiet {
        common::say_summary(&job, seconds);
    }
    let report = if args.no_verify {
        None
    } else {
        let options = verify::Options {
            file: job.output.clone(),
            against: Some(args.source.clone()),
            sample: Some(SPOT_CHECK),
            forward: false,
            arch: args.arch.clone(),
            pre: args.pre.clone(),
            limits: Limits::default(),
        };
        Some(verify::verify(&options, &work.budget()?, &ui::Progress::new("verifying", 0, true))?)
    };
    if work.json {
        let mut summary = common::summary(&job, seconds);
        summary["verify"] = json!(report.as_ref().map(|r| &r.checks));
        println!("{summary:#}");
    }
    match report {
        Some(report) => Ok(super::verify::say(&report, work.quiet)),
        None => Ok(Status::Done),
    }
}
