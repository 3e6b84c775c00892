//! `qconv quantize`

use std::path::PathBuf;

use qconv::convert::{Quantize, Sharding};
use qconv::limits::Limits;

use super::Status;
use super::common::{self, EditArgs, WriteArgs};
use super::quantizer::{QuantizerArgs, ShardArgs, type_names};

/// Write a GGUF file with another type
#[derive(clap::Args, Debug)]
#[command(after_help = format!("Types: {}", type_names()))]
pub struct Args {
    /// The GGUF file; of a split one, any shard
    pub source: PathBuf,

    /// The file to write; shards are named after it
    pub output: PathBuf,

    /// The file type, such as q4_k_m; below are all
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    pub file_type: String,

    /// Quantize again what is quantized already, and lose twice
    #[arg(long)]
    pub allow_requantize: bool,

    /// Divide the output into files as the source is
    #[arg(long, conflicts_with_all = ["split_max_size", "split_max_tensors"])]
    pub keep_split: bool,

    #[command(flatten)]
    pub shards: ShardArgs,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub write: WriteArgs,

    #[command(flatten)]
    pub quantizer: QuantizerArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let mut quantizer = args.quantizer.quantizer(&args.file_type)?;
    quantizer.allow_requantize = args.allow_requantize;
    let job = Quantize {
        source: args.source.clone(),
        output: args.output.clone(),
        quantizer,
        sharding: if args.keep_split { Sharding::Keep } else { args.shards.sharding()? },
        edits: args.edits.edits(),
        limits: Limits::default(),
    }
    .plan()?;
    common::finish(&job, &args.write)
}
