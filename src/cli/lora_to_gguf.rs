//! `qconv lora-to-gguf`

use std::path::PathBuf;

use qconv::convert::{FileType, LoraToGguf};
use qconv::error::Error;
use qconv::limits::Limits;

use super::Status;
use super::common::{self, EditArgs, WriteArgs};

/// Convert a LoRA adapter (PEFT) to a GGUF file that llama.cpp adds to its base
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The adapter's directory, with adapter_config.json and its weights
    pub adapter: PathBuf,

    /// The base it was made for: its directory, its config.json alone, or a GGUF file of it
    #[arg(long, value_name = "MODEL")]
    pub base: PathBuf,

    /// The file to write, or a directory for it; by default beside the adapter
    #[arg(short, long)]
    pub output: Option<PathBuf>,

    /// f32, f16, bf16, q8_0, or auto (the adapter's precision)
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "auto")]
    pub file_type: String,

    /// Take the base for this architecture, whatever config.json says
    #[arg(long)]
    pub arch: Option<String>,

    /// Take the definition of the architecture from this file (CONTRIBUTING.md describes it)
    #[arg(long, value_name = "FILE", conflicts_with = "arch")]
    pub arch_file: Option<PathBuf>,

    #[command(flatten)]
    pub edits: EditArgs,

    #[command(flatten)]
    pub write: WriteArgs,
}

pub fn run(args: &Args) -> anyhow::Result<Status> {
    let file_type = match args.file_type.to_ascii_lowercase().as_str() {
        "auto" => None,
        name @ ("f32" | "f16" | "bf16" | "q8_0") => FileType::parse(name),
        other => {
            return Err(Error::misuse(format!("an adapter cannot be {other:?}"))
                .hint("types are f32, f16, bf16, q8_0 and auto")
                .into());
        }
    };
    let job = LoraToGguf {
        adapter: args.adapter.clone(),
        base: args.base.clone(),
        output: args.output.clone(),
        file_type,
        arch: args.arch.clone(),
        arch_file: args.arch_file.clone(),
        edits: args.edits.edits(),
        limits: Limits::default(),
    }
    .plan()?;
    common::finish(&job, &args.write)
}
