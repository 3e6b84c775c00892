//! `qconv pack`

use std::path::PathBuf;

use qconv::convert::ToQpack;

use super::Status;
use super::common::{self, WriteArgs, parse_size};

/// Put a whole model into one .qpack file: its tensors, its other files, and where they come from
///
/// Tensors stay what they are: codes and scales of quantized checkpoints go into encodings of the file, and
/// `qconv unpack` gives the same files back.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A Hugging Face directory, quantized or not, a GGUF file, a file of weights, or a .qpack
    pub source: PathBuf,

    /// The file to write; by default beside the source, called after it
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// Most bytes of tensors in a file; a larger model becomes a set of files
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_shard_size: Option<u64>,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let job = ToQpack {
        output: args.output.clone(),
        max_shard_size: args.max_shard_size.unwrap_or(u64::MAX),
        ..ToQpack::new(&args.source)
    }
    .plan()?;
    common::finish(&job, &args.write)
}
