//! How fast a model is: tokens per second, measured as llama-bench does it.
//!
//! A prompt (`pp512`) is read in batches into an empty context, with the logits of each batch's last
//! token; generation (`tg128`) decodes token after token into an empty context. The tokens are random,
//! since the speed does not depend on them (nearly: experts are chosen by them), and begin with the
//! beginning-of-sequence token where the vocabulary adds one. A run to warm up comes first. Source:
//! llama.cpp's `tools/llama-bench`.

use std::fmt;
use std::time::Instant;

use super::generate::check_generates;
use super::sample::Random;
use crate::error::{Error, Result};
use crate::ggml::{Buffers, Context, ContextOptions, Logits, Model};

/// llama-bench's; llama.cpp computes 512 of these at once.
const BATCH: u32 = 2048;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Reading a prompt of so many tokens.
    Prompt(u32),
    /// Generating so many tokens.
    Generation(u32),
}

impl Test {
    /// Tokens.
    pub fn tokens(self) -> u32 {
        match self {
            Self::Prompt(n) | Self::Generation(n) => n,
        }
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prompt(n) => write!(f, "pp{n}"),
            Self::Generation(n) => write!(f, "tg{n}"),
        }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Speed {
    /// Tokens per second of each run.
    pub runs: Vec<f64>,
    /// Memory of the context.
    pub buffers: Buffers,
}

impl Speed {
    /// Their mean.
    pub fn mean(&self) -> f64 {
        self.runs.iter().sum::<f64>() / self.runs.len().max(1) as f64
    }

    /// Their standard deviation (of a sample: divided by one less than their number); 0 of a single
    /// run.
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.runs.iter().map(|r| (r - mean).powi(2)).sum();
        (squares / self.runs.len().saturating_sub(1).max(1) as f64).sqrt()
    }
}

/// Measures `test`, `repetitions` times after a run to warm up. `between` is told after each of these
/// runs, and may end it all with an error.
///
/// # Errors
/// `Misuse` for a test without tokens, `Unsupported` when the model cannot be executed or is an
/// encoder, and what `between` returns.
pub fn measure(
    model: &Model,
    test: Test,
    repetitions: usize,
    threads: u32,
    between: &mut dyn FnMut() -> Result<()>,
) -> Result<Speed> {
    check_generates(model)?;
    if model.has_encoder() {
        return Err(Error::unsupported("a model with an encoder beside its decoder is not measured"));
    }
    if test.tokens() == 0 {
        return Err(Error::misuse("a test of 0 tokens measures nothing"));
    }
    let options =
        ContextOptions { n_ctx: test.tokens(), n_batch: BATCH, threads, ..ContextOptions::default() };
    let mut context = Context::new(model, &options)?;
    let mut random = Random(1);
    let mut runs = Vec::new();
    match test {
        Test::Prompt(_) => run(&mut context, test, &mut random)?,
        // A token is enough to bring the weights into memory.
        Test::Generation(_) => run(&mut context, Test::Generation(1), &mut random)?,
    };
    between()?;
    for _ in 0..repetitions {
        runs.push(run(&mut context, test, &mut random)?);
        between()?;
    }
    Ok(Speed { runs, buffers: context.buffers() })
}

/// Tokens per second of one run.
fn run(context: &mut Context<'_>, test: Test, random: &mut Random) -> Result<f64> {
    let model = context.model();
    let special = model.special_tokens();
    let n_tokens = model.n_tokens().max(1) as u64;
    // Below the size of a vocabulary, whose ids have 32 bits.
    let mut ids: Vec<i32> = (0..test.tokens()).map(|_| (random.next() % n_tokens) as i32).collect();
    if let (Some(first), Some(bos), true) = (ids.first_mut(), special.bos, special.add_bos) {
        *first = bos;
    }
    context.clear();
    let at_once = match test {
        Test::Prompt(_) => context.n_batch(),
        Test::Generation(_) => 1,
    };
    let begin = Instant::now();
    for batch in ids.chunks(at_once) {
        context.decode(batch, Logits::Last)?;
        if at_once == 1 {
            // The next token is chosen by these logits, so they are waited for.
            context.synchronize();
        }
    }
    context.synchronize();
    Ok(f64::from(test.tokens()) / begin.elapsed().as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_that_of_a_sample() {
        let speed = |runs: &[f64]| Speed { runs: runs.to_vec(), buffers: Buffers::default() };
        assert_eq!((speed(&[2.0, 4.0, 6.0]).mean(), speed(&[2.0, 4.0, 6.0]).deviation()), (4.0, 2.0));
        assert_eq!((speed(&[3.0]).mean(), speed(&[3.0]).deviation()), (3.0, 0.0));
    }
}
