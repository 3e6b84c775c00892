//! Text generation: prompt, sample, decode, until something ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::logits::argmax;
use crate::error::{Error, Result};
use crate::ggml::{Context, ContextOptions, Logits, Model};

/// How a token is chosen from the logits.
///
/// As in llama.cpp: the `top_k` likeliest are kept, of these the smallest set whose probabilities
/// reach `top_p`, and the temperature is applied to what remains.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest token (greedy); otherwise logits are divided by it.
    pub temperature: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: usize,
    /// Probability that the candidates must reach together; 1 keeps all.
    pub top_p: f32,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 40, top_p: 0.95, seed: 0 }
    }
}

/// How to generate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Context length; 0 takes what prompt and `max_tokens` need, at most the model's own.
    pub n_ctx: u32,
    /// Threads.
    pub threads: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The model said so, with this token.
    EndOfGeneration(i32),
    /// `max_tokens` were generated.
    Length,
    /// The context is full.
    ContextFull,
    /// The `stop` flag was set.
    Stopped,
}

/// What was done, in what time.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Summary {
    pub prompt_tokens: usize,
    pub prompt_time: Duration,
    pub generated: Vec<i32>,
    pub generation_time: Duration,
    pub end: End,
}

/// The ids of a prompt, with the tokens that the vocabulary puts in front. A text that begins with
/// the beginning-of-sequence token already (as chat templates do) gets no second one, and none
/// gets an end-of-sequence token, after which a model has nothing to say.
///
/// # Errors
/// As [`Model::tokenize`].
pub fn tokenize_prompt(model: &Model, text: &str) -> Result<Vec<i32>> {
    let special = model.special_tokens();
    let mut ids = model.tokenize(text, true, true)?;
    if let (true, Some(bos)) = (special.add_bos, special.bos)
        && ids.starts_with(&[bos, bos])
    {
        ids.remove(0);
    }
    if let (true, Some(eos)) = (special.add_eos, special.eos)
        && ids.last() == Some(&eos)
    {
        ids.pop();
    }
    Ok(ids)
}

/// Continues `prompt`, handing text to `emit` as it comes, in whole characters. Bytes that are no
/// UTF-8 come as U+FFFD. Setting `stop` ends the generation between two tokens.
///
/// # Errors
/// `Misuse` when the prompt is empty or does not fit the context, `Unsupported` when the model
/// cannot be executed, and whatever `emit` returns.
pub fn generate(
    model: &Model,
    prompt: &[i32],
    options: &Options,
    stop: &AtomicBool,
    emit: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Summary> {
    const BATCH: u32 = 512;
    if prompt.is_empty() {
        return Err(Error::misuse("the prompt has no tokens").hint("give some text with -p"));
    }
    if !model.is_decoder_only() {
        return Err(Error::unsupported(match model.decoder_start() {
            Some(_) => "a model with an encoder and a decoder, such as T5, is not run here",
            None => "this model is an encoder; it generates no text",
        })
        .hint("`qconv embed` prints the embeddings of texts"));
    }
    let n_ctx = match options.n_ctx {
        0 => {
            let wanted = prompt.len().saturating_add(options.max_tokens);
            u32::try_from(wanted).unwrap_or(u32::MAX).min(model.n_ctx_train().max(1))
        }
        n => n,
    };
    if prompt.len() > n_ctx as usize {
        return Err(Error::misuse(format!("the prompt has {} tokens, the context {n_ctx}", prompt.len()))
            .hint("shorten the prompt or raise --ctx"));
    }
    let context_options =
        ContextOptions { n_ctx, n_batch: BATCH, threads: options.threads, ..ContextOptions::default() };
    let mut context = Context::new(model, &context_options)?;
    let mut sampler = Sampler::new(&options.sampling);
    let mut text = Utf8Stream::default();
    let mut generated = Vec::new();

    let begin = Instant::now();
    let mut last = 0;
    for chunk in prompt.chunks(context.n_batch()) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        context.decode(chunk, Logits::Last)?;
        last = chunk.len() - 1;
    }
    let prompt_time = begin.elapsed();

    let begin = Instant::now();
    let end = loop {
        if stop.load(Ordering::Relaxed) {
            break End::Stopped;
        }
        if generated.len() >= options.max_tokens {
            break End::Length;
        }
        let logits = context.logits(last).ok_or_else(|| Error::unsupported("the model gives no logits"))?;
        let id = sampler
            .choose(logits)
            .ok_or_else(|| Error::check("the model computed only NaN; its weights are damaged"))?;
        if model.is_end_of_generation(id) {
            break End::EndOfGeneration(id);
        }
        generated.push(id);
        let ready = text.push(&model.token_to_piece(id, false)?);
        if !ready.is_empty() {
            emit(&ready)?;
        }
        if generated.len() < options.max_tokens {
            if context.position() >= context.n_ctx() {
                break End::ContextFull;
            }
            context.decode(&[id], Logits::Last)?;
            last = 0;
        }
    };
    let rest = text.finish();
    if !rest.is_empty() {
        emit(&rest)?;
    }
    let generation_time = begin.elapsed();
    Ok(Summary { prompt_tokens: prompt.len(), prompt_time, generated, generation_time, end })
}

/// Chooses tokens.
struct Sampler<'a> {
    sampling: &'a Sampling,
    state: u64,
}

impl<'a> Sampler<'a> {
    fn new(sampling: &'a Sampling) -> Self {
        Self { sampling, state: sampling.seed }
    }

    /// The next number of SplitMix64, in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn choose(&mut self, logits: &[f32]) -> Option<i32> {
        let best = argmax(logits)?;
        if self.sampling.temperature <= 0.0 {
            return i32::try_from(best).ok();
        }
        let mut candidates: Vec<(usize, f64)> =
            logits.iter().enumerate().filter(|(_, v)| !v.is_nan()).map(|(i, &v)| (i, v.into())).collect();
        let likeliest = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = self.sampling.top_k;
        if (1..candidates.len()).contains(&k) {
            candidates.select_nth_unstable_by(k - 1, likeliest);
            candidates.truncate(k);
        }
        candidates.sort_unstable_by(likeliest);
        let top = candidates.first()?.1;
        let total: f64 = candidates.iter().map(|(_, v)| (v - top).exp()).sum();
        let mut reached = 0.0;
        let kept = candidates
            .iter()
            .position(|(_, v)| {
                reached += (v - top).exp() / total;
                reached >= f64::from(self.sampling.top_p)
            })
            .map_or(candidates.len(), |i| i + 1);
        candidates.truncate(kept);
        let temperature = f64::from(self.sampling.temperature);
        for (_, v) in &mut candidates {
            *v = ((*v - top) / temperature).exp();
        }
        let mut point = self.uniform() * candidates.iter().map(|(_, v)| v).sum::<f64>();
        let chosen = candidates.iter().find(|(_, v)| {
            point -= v;
            point < 0.0
        });
        i32::try_from(chosen.map_or(best, |c| c.0)).ok()
    }
}

/// Joins the bytes of tokens to whole characters.
#[derive(Debug, Default)]
pub struct Utf8Stream {
    // The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes; returns what is complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let rest = std::mem::take(&mut self.pending);
        for chunk in rest.utf8_chunks() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            // An incomplete character at the very end may still be completed.
            let at_end = std::ptr::eq(chunk.invalid().as_ptr_range().end, rest.as_ptr_range().end);
            let incomplete = at_end && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if incomplete {
                self.pending = invalid.to_vec();
            } else if !invalid.is_empty() {
                out.push('\u{fffd}');
            }
        }
        out
    }

    /// What is left at the end: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() { String::new() } else { "\u{fffd}".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_never_cut() {
        let text = "a\u{e9}\u{4e2d}\u{1f469}\u{200d}\u{1f680}z";
        for size in 1..=7 {
            let mut stream = Utf8Stream::default();
            let mut out: String = text.as_bytes().chunks(size).map(|c| stream.push(c)).collect();
            out.push_str(&stream.finish());
            assert_eq!(out, text);
        }
        for (bytes, expected) in [
            (&b"a\xff\xe4\xb8"[..], "a\u{fffd}\u{fffd}"),
            (b"\xe4\xb8b", "\u{fffd}b"),
            (b"\xf0\x9f", "\u{fffd}"),
        ] {
            let mut stream = Utf8Stream::default();
            let mut out: String = bytes.iter().map(|b| stream.push(&[*b])).collect();
            out.push_str(&stream.finish());
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn sampling_keeps_to_its_candidates() {
        let logits = [1.0, 5.0, f32::NAN, 4.0, -3.0];
        let choose = |sampling: Sampling, n: usize| -> Vec<i32> {
            let mut sampler = Sampler::new(&sampling);
            (0..n).map(|_| sampler.choose(&logits).unwrap()).collect()
        };
        let sampling = |temperature, top_k, top_p| Sampling { temperature, top_k, top_p, seed: 7 };
        assert_eq!(choose(Sampling::default(), 2), [1, 1]);
        assert_eq!(choose(sampling(9.0, 1, 1.0), 3), [1, 1, 1]);
        assert_eq!(choose(sampling(9.0, 0, 0.1), 3), [1, 1, 1]);
        let two = choose(sampling(1.0, 2, 1.0), 4000);
        let ones = two.iter().filter(|&&id| id == 1).count() as f64 / 4000.0;
        assert!(two.iter().all(|id| [1, 3].contains(id)));
        // e / (1 + e) of a difference of one.
        assert!((ones - 0.731).abs() < 0.03, "{ones}");
        let all = choose(sampling(50.0, 0, 1.0), 400);
        assert!([0, 1, 3, 4].iter().all(|id| all.contains(id)) && !all.contains(&2));
        assert_eq!(choose(sampling(50.0, 0, 1.0), 400), all);
        assert_eq!(Sampler::new(&Sampling::default()).choose(&[f32::NAN]), None);
    }
}
