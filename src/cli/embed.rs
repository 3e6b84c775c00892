//! `qconv embed`: the embeddings of texts, through the linked llama.cpp.

use std::io::Write;
use std::path::PathBuf;

use qconv::container::side::read_text;
use qconv::eval::embed::{Embedding, texts};
use qconv::ggml::{ModelOptions, Pooling, set_verbose};
use qconv::limits::Limits;
use serde_json::json;

use super::runnable::{self, Loaded};
use super::ui;

/// Embed texts with a GGUF model: print one vector of length 1 a line
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The model: a GGUF file (of a split one, the first shard), a .qpack file or a Hugging Face directory
    pub model: PathBuf,

    /// A text; may be given several times
    #[arg(short = 'p', long = "prompt", value_name = "TEXT", required_unless_present = "file")]
    pub prompts: Vec<String>,

    /// A file with one text a line
    #[arg(short, long)]
    pub file: Option<PathBuf>,

    /// How the vectors of a text's tokens become one, where the model does not say
    #[arg(long, value_enum)]
    pub pooling: Option<PoolingArg>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    /// Threads; all processors by default
    #[arg(short = 'j', long)]
    pub threads: Option<u32>,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i32,

    /// Show what llama.cpp says
    #[arg(long)]
    pub log: bool,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub enum PoolingArg {
    /// Their mean
    Mean,
    /// The first
    Cls,
    /// The last
    Last,
}

impl From<PoolingArg> for Pooling {
    fn from(arg: PoolingArg) -> Self {
        match arg {
            PoolingArg::Mean => Self::Mean,
            PoolingArg::Cls => Self::Cls,
            PoolingArg::Last => Self::Last,
        }
    }
}

/// Vectors go to stdout, everything else to stderr.
///
/// # Errors
/// When the model cannot be loaded or gives no embeddings, a text is too long, or stdout cannot be
/// written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    set_verbose(args.log);
    let mut given = args.prompts.clone();
    if let Some(path) = &args.file {
        let text = read_text(path, Limits::default().side_file_bytes)?;
        given.extend(text.lines().map(str::to_string));
    }
    let options =
        ModelOptions { use_extra_bufts: true, n_gpu_layers: args.gpu_layers, ..ModelOptions::default() };
    let Loaded { runs, model } = runnable::load(&args.model, &options, args.threads, false)?;
    if runs.is_temporary() {
        // From here on Ctrl-C ends it at once.
        ui::patience(0);
    }
    let threads = super::common::threads(args.threads);
    let (pooling, found) =
        texts(&model, &given, args.pooling.map(Pooling::from), threads).map_err(|e| e.at(&args.model))?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.json {
        let one = |(text, e): (&String, &Embedding)| json!({"text": text, "tokens": e.tokens, "embedding": e.values});
        let embeddings: Vec<_> = given.iter().zip(&found).map(one).collect();
        let pooling = format!("{pooling:?}").to_lowercase();
        writeln!(out, "{}", json!({"pooling": pooling, "embeddings": embeddings, "converted": runs.json()}))?;
    } else {
        for Embedding { values, .. } in &found {
            let values: Vec<String> = values.iter().map(f32::to_string).collect();
            writeln!(out, "{}", values.join(" "))?;
        }
    }
    out.flush()?;
    Ok(())
}
