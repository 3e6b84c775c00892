//! `qconv quantize`

use std::path::PathBuf;

use qconv::convert::{FileType, Quantize};
use qconv::limits::Limits;

use super::Status;
use super::common::{self, EditArgs, WriteArgs};

/// Write a GGUF file with another type
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The GGUF file; of a split one, any shard
    pub source: PathBuf,

    /// The file to write
    pub output: PathBuf,

    /// f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, tq2_0, tq1_0
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    pub file_type: String,

    /// Quantize again what is quantized already, and lose twice
    #[arg(long)]
    pub allow_requantize: bool,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let job = Quantize {
        source: args.source.clone(),
        output: args.output.clone(),
        file_type: FileType::parse(&args.file_type)?,
        allow_requantize: args.allow_requantize,
        edits: args.edits.edits(),
        limits: Limits::default(),
    }
    .plan()?;
    common::finish(&job, &args.write)
}
