//! Text generation: read the prompt, choose a token, decode it, until something ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::engine::{Engine, Keep, Kind, Reader, ReaderOptions};
use super::sample::{Sampler, Sampling};
use super::stop::{StopStrings, Utf8Stream};
use crate::error::{Error, Result};

/// Most tokens of a prompt that are computed at once.
const BATCH: u32 = 512;

/// When to end, and how to choose.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Most tokens to generate; `None` leaves it to the model and the context.
    pub max_tokens: Option<usize>,
    /// Texts that end the generation. They are not shown.
    pub stop: Vec<String>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The model said so, with this token.
    EndOfGeneration(i32),
    /// This stop string came.
    StopString(String),
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    ContextFull,
    /// The `stop` flag was set.
    Interrupted,
}

impl End {
    /// `eos`, `stop`, `length` or `interrupted`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::EndOfGeneration(_) => "eos",
            Self::StopString(_) => "stop",
            Self::Length | Self::ContextFull => "length",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What was done, in what time.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What was generated, without the stop string.
    pub text: String,
    /// Its tokens, those of the stop string among them.
    pub generated: Vec<i32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens that had been read before.
    pub cached_tokens: usize,
    /// For the rest of the prompt.
    pub prompt_time: Duration,
    /// For the generated tokens that were decoded: all, or all but the last.
    pub generation_time: Duration,
    /// Why it ended.
    pub end: End,
    decoded: usize,
}

impl Summary {
    /// Tokens of the prompt read in a second; `None` where all had been read before.
    pub fn prompt_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens - self.cached_tokens, self.prompt_time)
    }

    /// Tokens generated in a second; `None` where none was decoded.
    pub fn generation_rate(&self) -> Option<f64> {
        rate(self.decoded, self.generation_time)
    }
}

fn rate(n: usize, time: Duration) -> Option<f64> {
    (n > 0).then(|| n as f64 / time.as_secs_f64().max(1e-9))
}

/// The ids of a prompt, with the tokens that the vocabulary puts in front. A text that begins with
/// the beginning-of-sequence token already (as chat templates do) gets no second one. At its end
/// only an encoder gets the end-of-sequence token, after which a decoder has nothing to say.
///
/// # Errors
/// As [`Engine::tokenize`].
pub fn tokenize_prompt(model: &dyn Engine, text: &str) -> Result<Vec<i32>> {
    let delimiters = model.delimiters();
    let mut ids = model.tokenize(text, true, true)?;
    if let (true, Some(bos)) = (delimiters.add_bos, delimiters.bos)
        && ids.starts_with(&[bos, bos])
    {
        ids.remove(0);
    }
    if let (true, Some(eos)) = (delimiters.add_eos, delimiters.eos)
        && ids.last() == Some(&eos)
        && model.kind() == Kind::Decoder
    {
        ids.pop();
    }
    Ok(ids)
}

/// Whether a model generates text at all.
///
/// # Errors
/// `Unsupported` when it does not.
pub fn check_generates(model: &dyn Engine) -> Result<()> {
    if model.kind() == Kind::Encoder {
        return Err(Error::unsupported("this model is an encoder; it generates no text")
            .hint("`qconv embed` prints the embeddings of texts"));
    }
    Ok(())
}

/// A reader that remembers what it has read: a prompt that begins as the last one did is read from
/// where it departs.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m dyn Engine,
    reader: Box<dyn Reader + 'm>,
    // The tokens that it has read.
    read: Vec<i32>,
}

impl<'m> Session<'m> {
    /// A session of `n_ctx` tokens, prompt and answer together. (A model with an encoder reads the
    /// prompt with that, and has as many tokens again for the answer.)
    ///
    /// # Errors
    /// `Unsupported` when the model generates no text or cannot be executed.
    pub fn new(model: &'m dyn Engine, n_ctx: u32, threads: u32) -> Result<Self> {
        check_generates(model)?;
        // An encoder looks at its text at once; llama.cpp rounds contexts up to 256 tokens.
        let n_batch = if model.kind() == Kind::Decoder { BATCH } else { n_ctx.next_multiple_of(256) };
        let reader = model.reader(&ReaderOptions { n_ctx, n_batch, threads })?;
        Ok(Self { model, reader, read: Vec::new() })
    }

    /// Most tokens of prompt and answer together.
    pub fn n_ctx(&self) -> usize {
        self.reader.n_ctx()
    }

    /// Continues `prompt`, handing text to `emit` as it comes, in whole characters; what may become
    /// a stop string is held back. Bytes that are no UTF-8 come as U+FFFD. Setting `stop` ends it
    /// between two tokens, or between two batches of the prompt.
    ///
    /// # Errors
    /// `Misuse` when the prompt is empty or does not fit the context, `Check` when the model computes
    /// only NaN, and whatever `emit` returns.
    pub fn generate(
        &mut self,
        prompt: &[i32],
        options: &Options,
        stop: &AtomicBool,
        emit: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Summary> {
        if prompt.is_empty() {
            return Err(Error::misuse("the prompt has no tokens").hint("give some text with -p"));
        }
        if prompt.len() > self.n_ctx() {
            let message = format!("the prompt has {} tokens, the context {}", prompt.len(), self.n_ctx());
            return Err(Error::misuse(message).hint("shorten the prompt, or give a longer context with -c"));
        }
        let begin = Instant::now();
        let (cached, ready) = self.read_prompt(prompt, stop)?;
        let prompt_time = begin.elapsed();

        let begin = Instant::now();
        let mut sampler = Sampler::new(&options.sampling);
        let (mut characters, mut stops) = (Utf8Stream::default(), StopStrings::new(&options.stop));
        let (mut text, mut generated, mut decoded) = (String::new(), Vec::new(), 0);
        let mut show = |ready: &str, text: &mut String| {
            text.push_str(ready);
            if ready.is_empty() { Ok(()) } else { emit(ready) }
        };
        let end = loop {
            if stop.load(Ordering::Relaxed) || !ready {
                break End::Interrupted;
            }
            if options.max_tokens.is_some_and(|most| generated.len() >= most) {
                break End::Length;
            }
            if let Some(&id) = generated.last() {
                if self.reader.position() >= self.n_ctx() {
                    break End::ContextFull;
                }
                self.decode(&[id])?;
                decoded += 1;
            }
            let logits =
                self.reader.last_logits().ok_or_else(|| Error::unsupported("the model gives no logits"))?;
            let id = sampler
                .choose(logits, &self.read)
                .ok_or_else(|| Error::check("the model computed only NaN; its weights are damaged"))?;
            if self.model.is_end_of_generation(id) {
                break End::EndOfGeneration(id);
            }
            generated.push(id);
            let (ready, found) = stops.push(&characters.push(&self.model.piece(id)?));
            show(&ready, &mut text)?;
            if let Some(found) = found {
                break End::StopString(found.to_string());
            }
        };
        let generation_time = begin.elapsed();
        let end = match end {
            End::StopString(_) => end,
            _ => {
                let (ready, found) = stops.push(&characters.finish());
                show(&(ready + &stops.finish()), &mut text)?;
                found.map_or(end, |stop| End::StopString(stop.to_string()))
            }
        };
        Ok(Summary {
            text,
            generated,
            prompt_tokens: prompt.len(),
            cached_tokens: cached,
            prompt_time,
            generation_time,
            end,
            decoded,
        })
    }

    /// Reads what is new of `prompt`, at least its last token. Returns how many tokens were not, and
    /// whether it got to the end before `stop` was set.
    fn read_prompt(&mut self, prompt: &[i32], stop: &AtomicBool) -> Result<(usize, bool)> {
        if let Kind::EncoderDecoder { start } = self.model.kind() {
            self.reader.clear();
            self.read.clear();
            self.reader.encode(prompt)?;
            self.decode(&[start])?;
            return Ok((0, true));
        }
        let same = self.read.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let kept = self.reader.truncate(same.min(prompt.len() - 1));
        self.read.truncate(kept);
        for chunk in prompt[kept..].chunks(self.reader.n_batch()) {
            if stop.load(Ordering::Relaxed) {
                return Ok((kept, false));
            }
            self.decode(chunk)?;
        }
        Ok((kept, true))
    }

    fn decode(&mut self, ids: &[i32]) -> Result<()> {
        self.reader.decode(ids, Keep::Last)?;
        self.read.extend_from_slice(ids);
        Ok(())
    }
}
