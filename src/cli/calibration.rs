//! The options of commands that calibrate: which text, how much of it, and on what.

use std::path::{Path, PathBuf};

use qconv::calibrate::text::TextSource;
use qconv::error::Result;
use qconv::ggml::ModelOptions;

use super::runnable::{self, Loaded};
use super::ui;

/// Which text a model reads, and how.
#[derive(clap::Args, Debug)]
pub struct CalibrationArgs {
    /// A text in UTF-8; can be repeated. Without --text and --chats a part of a novel is read
    #[arg(long, value_name = "FILE")]
    pub text: Vec<PathBuf>,

    /// Conversations, one JSON object a line with messages, conversations (ShareGPT) or text, put into
    /// the model's chat template; can be repeated
    #[arg(long, value_name = "FILE.jsonl")]
    pub chats: Vec<PathBuf>,

    /// Tokens that the model reads at once
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub ctx: usize,

    /// Stop after so many times --ctx
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,

    /// Leave out so many times --ctx at the beginning
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub from_chunk: usize,

    /// Read the names of control tokens in --text as those tokens
    #[arg(long)]
    pub parse_special: bool,

    /// Threads; all processors by default
    #[arg(short = 'j', long)]
    pub threads: Option<u32>,

    /// Layers to place on a GPU, where a GPU backend is built in; -1 for all
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub gpu_layers: i32,
}

impl CalibrationArgs {
    /// The text that is meant.
    pub fn source(&self) -> TextSource {
        TextSource {
            texts: self.text.clone(),
            chats: self.chats.clone(),
            n_ctx: self.ctx,
            skip: self.from_chunk,
            most: self.chunks,
            parse_special: self.parse_special,
        }
    }

    /// Loads the model, so that what its matrices are multiplied with can be seen.
    pub fn model(&self, path: &Path, quiet: bool) -> Result<Loaded> {
        let options = ModelOptions { n_gpu_layers: self.gpu_layers, ..ModelOptions::default() };
        let loaded = runnable::load(path, &options, self.threads, quiet)?;
        let trained = loaded.model.n_ctx_train() as usize;
        if !quiet && trained > 0 && self.ctx > trained {
            ui::say(&format!("note: the model was trained with {trained} tokens, --ctx is {}", self.ctx));
        }
        Ok(loaded)
    }

    /// Threads to compute with.
    pub fn threads(&self) -> u32 {
        super::common::threads(self.threads)
    }
}
