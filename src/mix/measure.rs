//! Models measured by the linked llama.cpp, each in a temporary file.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Judge, Sample};
use crate::convert::{Budget, Job, Observer, Temporary};
use crate::error::{Error, Result};
use crate::eval::baseline::Shape;
use crate::eval::score::{Base, Divergence, DivergenceSummary, Sampled};
use crate::eval::windows::Windows;
use crate::ggml::{Model, ModelOptions};
use crate::sha256::{Sha256, hex};

/// Likeliest tokens that are kept of each prediction: all of a small vocabulary, and of others so many
/// that the rest hardly matters.
const MOST_TOKENS: usize = 2048;

/// What models are to read.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The text.
    pub text: &'a str,
    /// Windows from its beginning, and from its second half.
    pub n_windows: usize,
    /// Tokens in a window.
    pub n_ctx: usize,
}

/// Windows of a text, and what the base model predicts in them.
struct Part {
    windows: Windows,
    predictions: Vec<Sampled>,
}

/// Compares models with a base.
pub struct Measurer<'a> {
    choosing: Part,
    held_out: Part,
    scratch: Temporary,
    threads: u32,
    budget: Budget,
    observer: &'a dyn Observer,
    reading: Duration,
    text: String,
}

impl<'a> Measurer<'a> {
    /// Lets the model in `base` read the text: types are chosen by windows from its beginning, the result
    /// is checked by those of its second half. Models that are measured lie at `scratch` meanwhile.
    ///
    /// # Errors
    /// As the model can be loaded and executed; `Misuse` where the text is too short.
    pub fn new(
        base: &Path,
        scratch: Temporary,
        reading: &Reading<'_>,
        budget: Budget,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let &Reading { text, n_windows, n_ctx } = reading;
        let model = Model::load(base, &ModelOptions::default())?;
        let all = Windows::new(&model, text, n_ctx, None)?;
        let half = all.count() / 2;
        let part = |from: usize| {
            let range = from * n_ctx..(from + n_windows.min(half)) * n_ctx;
            Windows { tokens: all.tokens.get(range).unwrap_or_default().to_vec(), ..all.clone() }
        };
        let threads = budget.threads as u32;
        let begun = Instant::now();
        let read = |windows: Windows| -> Result<Part> {
            let shape = Shape::with_top(model.n_tokens(), MOST_TOKENS);
            let mut predictions = Vec::new();
            windows.read(&[&model], threads, |_, rows, next| {
                if observer.interrupted() {
                    return Err(Error::interrupted());
                }
                let number = predictions.len() as u64;
                predictions.extend(rows.iter().map(|row| shape.sample(row, next, number)));
                Ok(())
            })?;
            Ok(Part { windows, predictions })
        };
        let choosing = read(part(0))?;
        let reading = begun.elapsed();
        let held_out = read(part(half))?;
        let mut hash = Sha256::new();
        choosing.windows.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
        let digest = hex(&hash.finalize()[..8]);
        let text = format!("{} windows of {n_ctx} tokens, {digest}", choosing.windows.count());
        Ok(Self { choosing, held_out, scratch, threads, budget, observer, reading, text })
    }

    /// Windows in each part.
    pub fn windows(&self) -> usize {
        self.choosing.windows.count()
    }
}

impl Judge for Measurer<'_> {
    fn text(&self) -> String {
        self.text.clone()
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().to_path_buf()
    }

    fn seconds(&self) -> f64 {
        self.reading.as_secs_f64()
    }

    fn measure(&mut self, job: &Job, sample: Sample) -> Result<DivergenceSummary> {
        let begun = Instant::now();
        job.run(true, &self.budget, self.observer)?;
        let model = Model::load(self.scratch.path(), &ModelOptions::default())?;
        let part = if sample == Sample::Choosing { &self.choosing } else { &self.held_out };
        let mut divergence = Divergence::default();
        let mut base = part.predictions.iter();
        part.windows.read(&[&model], self.threads, |_, rows, next| {
            if self.observer.interrupted() {
                return Err(Error::interrupted());
            }
            if let (Some(row), Some(base)) = (rows.first(), base.next()) {
                divergence.add(row, Base::Sampled(base), next);
            }
            Ok(())
        })?;
        self.reading = begun.elapsed();
        Ok(divergence.summary())
    }
}
