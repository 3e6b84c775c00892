//! `qconv coreml-to-hf`

use std::path::PathBuf;

use qconv::convert::ToHf;

use super::Status;
use super::to_hf::ToHfArgs;

/// Turn a Core ML package back into a Hugging Face directory
///
/// Weights are decoded as the program decodes them. With the model's config.json beside the package they get the names
/// and the layout of a checkpoint; without, or of packages of other programs, each is called as the program calls it.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The package, X.mlpackage, or the directory of a model in several
    pub source: PathBuf,

    #[command(flatten)]
    pub to: ToHfArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    args.to.run(&args.source, ToHf::check_coreml)
}
