//! `qconv gguf-to-hf`

use std::path::PathBuf;

use qconv::convert::ToHf;

use super::Status;
use super::to_hf::ToHfArgs;

/// Turn a GGUF file back into a Hugging Face directory
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The GGUF file (of a split one, any shard), or a .qpack file that was made of one
    pub source: PathBuf,

    #[command(flatten)]
    pub to: ToHfArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    args.to.run(&args.source, ToHf::check_gguf)
}
