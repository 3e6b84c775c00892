//! A text in windows, as llama.cpp's perplexity tool reads it, through one or several models at once.
//!
//! The text is tokenized whole, with what the vocabulary puts before it, and cut into windows of
//! `n_ctx` tokens, each read on its own; a rest that fills no window is left out. Where the
//! vocabulary begins texts with a token (BOS), each window's first token is replaced by it. Of each
//! window the predictions from position `n_ctx / 2` on are scored: before it there is too little
//! context. Source: `tools/perplexity/perplexity.cpp`.

use std::time::{Duration, Instant};

use super::engine::{Engine, Keep, Kind, ReaderOptions};
use crate::error::{Error, Result};

/// Most bytes of the logits that are held of one model at once.
const LOGIT_BYTES: usize = 32 << 20;

/// A tokenized text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of all windows, one after another.
    pub tokens: Vec<i32>,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// What each window's first token is replaced by.
    pub bos: Option<i32>,
}

impl Windows {
    /// Windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.n_ctx.max(1)
    }

    /// The tokens of each window as a model reads them.
    pub fn each(&self) -> impl Iterator<Item = Vec<i32>> + '_ {
        self.tokens.chunks_exact(self.n_ctx.max(1)).map(|window| {
            let mut read = window.to_vec();
            if let (Some(bos), Some(first)) = (self.bos, read.first_mut()) {
                *first = bos;
            }
            read
        })
    }

    /// Predictions that are scored in each window.
    pub fn scored(&self) -> usize {
        self.n_ctx - 1 - self.n_ctx / 2
    }

    /// Tokenizes `text`, and takes at most `most` windows of it.
    ///
    /// # Errors
    /// `Misuse` when the text is shorter than two windows, as in llama.cpp, or windows than 4 tokens.
    pub fn new(model: &dyn Engine, text: &str, n_ctx: usize, most: Option<usize>) -> Result<Self> {
        if n_ctx < 4 {
            return Err(Error::misuse(format!("windows of {n_ctx} tokens: at least 4 are needed")));
        }
        let mut tokens = model.tokenize(text, true, false)?;
        let count = tokens.len() / n_ctx;
        if count < 2 {
            return Err(Error::misuse(format!(
                "the text has {} tokens; two windows of {n_ctx} are needed at least",
                tokens.len()
            ))
            .hint("give a longer text, or shorter windows with --ctx"));
        }
        tokens.truncate(count.min(most.unwrap_or(count)) * n_ctx);
        Ok(Self { tokens, n_ctx, bos: Self::bos_of(model) })
    }

    /// What each window's first token is replaced by: the token that the vocabulary begins texts with.
    pub fn bos_of(model: &dyn Engine) -> Option<i32> {
        let delimiters = model.delimiters();
        delimiters.bos.filter(|_| delimiters.add_bos)
    }

    /// Lets every model read every window, side by side. `score` gets, for each scored prediction,
    /// the number of the window, the logits of every model, and the token that came. Returns the
    /// time that each model took.
    ///
    /// # Errors
    /// Those of `score`, and of the models' execution; `Misuse` when vocabularies differ in size.
    pub fn read(
        &self,
        models: &[&dyn Engine],
        threads: u32,
        mut score: impl FnMut(usize, &[&[f32]], usize) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        let Some(first) = models.first() else { return Ok(Vec::new()) };
        if let Some(other) = models.iter().find(|m| m.n_tokens() != first.n_tokens()) {
            return Err(Error::misuse(format!(
                "the vocabularies have {} and {} tokens: predictions cannot be compared",
                first.n_tokens(),
                other.n_tokens()
            )));
        }
        if let Some(m) = models.iter().find(|m| m.kind() != Kind::Decoder) {
            return Err(Error::unsupported(format!("{} predicts no next token", m.description())));
        }
        let n_batch = (LOGIT_BYTES / 4 / first.n_tokens().max(1)).clamp(16, 512).min(self.n_ctx);
        let options = ReaderOptions {
            n_ctx: u32::try_from(self.n_ctx).map_err(|_| Error::misuse("windows are too long"))?,
            n_batch: n_batch as u32,
            threads,
        };
        let mut readers = models.iter().map(|m| m.reader(&options)).collect::<Result<Vec<_>>>()?;
        let mut times = vec![Duration::ZERO; models.len()];
        let half = self.n_ctx / 2;
        let windows = self.tokens.chunks_exact(self.n_ctx).zip(self.each());
        for (number, (window, read)) in windows.enumerate() {
            for (reader, time) in readers.iter_mut().zip(&mut times) {
                let begun = Instant::now();
                reader.clear();
                for part in read[..half].chunks(n_batch) {
                    reader.decode(part, Keep::Last)?;
                }
                *time += begun.elapsed();
            }
            // Nothing follows the last token: what it predicts cannot be scored.
            for (k, part) in read[half..self.n_ctx - 1].chunks(n_batch).enumerate() {
                for (reader, time) in readers.iter_mut().zip(&mut times) {
                    let begun = Instant::now();
                    reader.decode(part, Keep::All)?;
                    *time += begun.elapsed();
                }
                for i in 0..part.len() {
                    let rows = readers.iter().map(|r| r.logits(i)).collect::<Option<Vec<_>>>();
                    let rows = rows.ok_or_else(|| Error::unsupported("the model gives no logits"))?;
                    let next = window[half + k * n_batch + i + 1];
                    if let Some(bad) = rows.iter().position(|row| !super::logits::is_sound(row)) {
                        return Err(no_numbers(models, bad, number, half + k * n_batch + i));
                    }
                    score(number, &rows, usize::try_from(next).unwrap_or(usize::MAX))?;
                }
            }
        }
        Ok(times)
    }
}

fn no_numbers(models: &[&dyn Engine], bad: usize, window: usize, token: usize) -> Error {
    let which = match models.len() {
        1 => String::new(),
        n => format!(" of model {} of {n}", bad + 1),
    };
    Error::check(format!(
        "the logits{which} are no numbers (NaN or infinite) after token {token} of window {window}: \
         its predictions cannot be scored"
    ))
    .hint("qconv inspect and qconv verify tell whether its tensors are sound")
}
