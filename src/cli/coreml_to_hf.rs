//! `qconv coreml-to-hf`

use std::path::PathBuf;

use qconv::convert::ToHf;

use super::Status;
use super::common::{self, WriteArgs};
use super::convert::dtype_arg;

/// Turn a Core ML package back into a Hugging Face directory
///
/// Weights are decoded as the program decodes them. With the model's config.json beside the package they get the names
/// and the layout of a checkpoint; without, or of packages of other programs, each is called as the program calls it.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The package, X.mlpackage, or the directory of a model in several
    pub source: PathBuf,

    /// The directory to write
    #[arg(short, long)]
    pub output: PathBuf,

    /// f32, f16 or bf16; by default f16, which holds what the package holds
    #[arg(long)]
    pub dtype: Option<String>,

    /// Largest weights file
    #[arg(long, value_name = "SIZE", default_value = "5G", value_parser = common::parse_size)]
    pub max_shard_size: u64,

    /// Take the definition of the architecture from this file (CONTRIBUTING.md describes it)
    #[arg(long, value_name = "FILE")]
    pub arch_file: Option<PathBuf>,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let conversion = ToHf {
        dtype: dtype_arg(args.dtype.as_deref())?,
        max_shard_size: args.max_shard_size,
        arch_file: args.arch_file.clone(),
        ..ToHf::new(&args.source, &args.output)
    };
    conversion.check_coreml()?;
    common::finish(&conversion.plan()?, &args.write)
}
