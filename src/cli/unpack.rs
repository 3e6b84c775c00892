//! `qconv unpack`

use std::path::PathBuf;

use qconv::convert::FromQpack;

use super::common::{self, WriteArgs};
use super::convert::{self, GridArgs, RoundingArgs, To};
use super::{Status, ui};

/// Write what a .qpack file was made from: the Hugging Face directory, or the GGUF file
///
/// The same files, where it was made from safetensors or GGUF. What was quantized for .qpack has no other form:
/// its weights are written, or, with --to, stored in another format.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The .qpack file; of a set any
    pub source: PathBuf,

    /// The directory to write, or the GGUF file; by default beside the source, called after it
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// Another format than it was made from, as `qconv convert` has them
    #[arg(long, value_name = "FORMAT", value_parser = convert::parse_to)]
    pub to: Option<To>,

    /// Type of the weights that are not quantized, where another format is written: f32, f16 or bf16
    #[arg(long)]
    pub dtype: Option<String>,

    /// Largest weights file, where these are not the files that they were
    #[arg(long, value_name = "SIZE", default_value = "5G", value_parser = common::parse_size)]
    pub max_shard_size: u64,

    #[command(flatten)]
    pub grid: GridArgs,

    #[command(flatten)]
    pub rounding: RoundingArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn run(args: Args) -> anyhow::Result<Status> {
    let exact = FromQpack {
        output: args.output.clone(),
        max_shard_size: args.max_shard_size,
        ..FromQpack::new(&args.source)
    };
    let to = match (args.to, &args.dtype, exact.own_encoding()?) {
        (None, None, None) => return common::finish(&exact.plan()?, &args.write),
        (Some(to), ..) => to,
        (None, None, Some(name)) => {
            if !args.write.work.quiet {
                ui::say(&format!(
                    "note: {name:?} was quantized for .qpack, and perhaps others: weights are written as numbers, \
                     --to keeps them small"
                ));
            }
            To::Safetensors
        }
        (None, Some(_), _) => To::Safetensors,
    };
    convert::run(&convert::Args {
        source: args.source,
        output: args.output,
        to,
        dtype: args.dtype,
        ignore: Vec::new(),
        max_shard_size: args.max_shard_size,
        exact_only: false,
        grid: args.grid,
        rounding: args.rounding,
        arch_file: None,
        write: args.write,
    })
}
