//! `qconv inspect`

use std::io::Write;
use std::path::PathBuf;

use qconv::inspect::{Filter, inspect, print};
use qconv::limits::Limits;

use super::ui;

/// Show what a model file or directory holds, from its headers alone
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A GGUF or .qpack file (any shard), a safetensors or PyTorch file, a Hugging Face directory, or a Core ML
    /// package
    pub path: PathBuf,

    /// Show only tensors whose name matches
    #[arg(long, value_name = "REGEX")]
    pub tensor: Option<regex::Regex>,

    /// Show only metadata
    #[arg(long, conflicts_with = "tensor")]
    pub metadata: bool,

    /// Show long arrays and texts whole
    #[arg(long)]
    pub full: bool,

    /// Show the programs of a Core ML package, operation by operation
    #[arg(long, conflicts_with_all = ["tensor", "metadata"])]
    pub ops: bool,

    /// Print everything as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut report = inspect(&args.path, &Limits::default())?;
    let mut out = ui::stdout();
    if args.json {
        if !args.ops {
            report.functions.iter_mut().for_each(|f| f.text = None);
        }
        if let Some(regex) = &args.tensor {
            report.tensors.retain(|t| regex.is_match(&t.name));
            report.encoded.retain(|t| regex.is_match(&t.name));
            report.weights.retain(|w| regex.is_match(&w.name));
        }
        if args.metadata {
            report.tensors.clear();
            report.encoded.clear();
            report.weights.clear();
            report.functions.clear();
        }
        if let Some(quantization) = &mut report.quantization {
            let shown = |name: &str| !args.metadata && args.tensor.as_ref().is_none_or(|r| r.is_match(name));
            quantization.matrices.retain(|m| shown(&m.name));
        }
        serde_json::to_writer_pretty(&mut out, &report).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        let filter = Filter {
            tensor: args.tensor.clone(),
            metadata_only: args.metadata,
            whole_arrays: args.full,
            ops: args.ops,
        };
        print(&report, &filter, &mut out)?;
    }
    out.flush()?;
    // What is there is shown all the same.
    match report.quantization.and_then(|q| q.contradiction) {
        Some(e) => Err(e.into()),
        None => Ok(()),
    }
}
