//! `qconv split` and `qconv merge`

use std::path::PathBuf;

use qconv::convert::{Reshard, Sharding};
use qconv::limits::Limits;

use super::Status;
use super::common::{self, WriteArgs, parse_size};

/// Divide a GGUF file into shards
#[derive(clap::Args, Debug)]
#[group(id = "bounds", required = true, multiple = true, args = ["max_size", "max_tensors"])]
pub struct SplitArgs {
    /// The GGUF file; of a split one, any shard
    pub source: PathBuf,

    /// Shards are named after it: NAME.gguf gives NAME-00001-of-00003.gguf; by default they lie
    /// beside the source
    pub output: Option<PathBuf>,

    /// Most bytes of a shard, such as 2G; a larger tensor gets a shard of its own
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_size: Option<u64>,

    /// Most tensors of a shard
    #[arg(long, value_name = "N")]
    pub max_tensors: Option<u64>,

    #[command(flatten)]
    pub write: WriteArgs,
}

/// Join the shards of a GGUF file
#[derive(clap::Args, Debug)]
pub struct MergeArgs {
    /// Any shard; the others lie beside it
    pub source: PathBuf,

    /// The file to write
    pub output: PathBuf,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn split(args: &SplitArgs) -> anyhow::Result<Status> {
    let job = Reshard {
        source: args.source.clone(),
        output: args.output.clone().unwrap_or_else(|| args.source.clone()),
        sharding: Sharding::bounded(args.max_size, args.max_tensors)?,
        limits: Limits::default(),
    }
    .plan()?;
    common::finish(&job, &args.write)
}

pub fn merge(args: &MergeArgs) -> anyhow::Result<Status> {
    let job = Reshard {
        source: args.source.clone(),
        output: args.output.clone(),
        sharding: Sharding::Whole,
        limits: Limits::default(),
    }
    .plan()?;
    common::finish(&job, &args.write)
}
