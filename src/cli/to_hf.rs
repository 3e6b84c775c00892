//! What the commands share that turn a file back into a Hugging Face directory.

use std::path::{Path, PathBuf};

use qconv::convert::ToHf;

use super::Status;
use super::common::{self, WriteArgs};
use super::convert::dtype_arg;

/// Where to, and how.
#[derive(clap::Args, Debug)]
pub struct ToHfArgs {
    /// The directory to write
    #[arg(short, long)]
    pub output: PathBuf,

    /// f32, f16 or bf16; by default what the file has: bf16 for quantized GGUF files, f16 for packages
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

impl ToHfArgs {
    /// Converts `source`, where it is what the command is for.
    pub fn run(&self, source: &Path, check: fn(&ToHf) -> qconv::Result<()>) -> anyhow::Result<Status> {
        let conversion = ToHf {
            dtype: dtype_arg(self.dtype.as_deref())?,
            max_shard_size: self.max_shard_size,
            arch_file: self.arch_file.clone(),
            ..ToHf::new(source, &self.output)
        };
        check(&conversion)?;
        common::finish(&conversion.plan()?, &self.write)
    }
}
