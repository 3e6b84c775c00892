//! A base model's predictions in a file, for [`Divergence`](super::score::Divergence) without the model.
//!
//! Ours keeps of each prediction the likeliest tokens, and a few drawn from the rest, from which the
//! rest's divergence is estimated; `formats/spec/baseline.md` has the bytes. What llama.cpp's
//! perplexity tool writes with `--save-all-logits` is read as well: all log-probabilities, in 16
//! bits each.

use std::path::Path;

use super::score::{Base, Choice, Sampled};
use super::softmax;
use super::windows::Windows;
use crate::container::InputFile;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"qcbase02";
const LLAMA_CPP_MAGIC: &[u8; 8] = b"_logits_";
/// Magic, n_ctx, n_vocab, windows, k, drawn, BOS.
const HEADER: u64 = 8 + 6 * 4;
/// Most bytes of a prediction as a share of 16-bit logits: one of so many.
const SHARE: usize = 20;
/// More tokens than this tell nothing more.
const MOST_TOKENS: usize = 1024;
/// Log-probabilities are kept in units of one of so many: 16 bits reach to -32.
const UNITS: f32 = 2048.0;

/// The layout of a baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Likeliest tokens kept of each prediction.
    pub k: usize,
    /// Tokens drawn from the rest.
    pub drawn: usize,
}

impl Shape {
    /// With as many tokens as make, with the text, a twentieth of the size of 16-bit logits.
    pub fn fitting(n_vocab: usize) -> Self {
        // Every second token of the text is predicted: 8 bytes of text for each prediction.
        let bytes = (2 * n_vocab / SHARE).saturating_sub(8 + 8);
        let tokens = (bytes / (Self::with_top(n_vocab, 1).id_bytes() + 2)).min(MOST_TOKENS);
        Self::with_top(n_vocab, tokens * 3 / 4)
    }

    /// With the `k` likeliest tokens, at least 1, and a third as many drawn.
    pub fn with_top(n_vocab: usize, k: usize) -> Self {
        let k = k.clamp(1, n_vocab.max(1));
        Self { n_vocab, k, drawn: if k < n_vocab { (k / 3).max(1) } else { 0 } }
    }

    fn id_bytes(self) -> usize {
        if self.n_vocab <= 1 << 16 { 2 } else { 4 }
    }

    fn row(self) -> usize {
        8 + (self.k + self.drawn) * (self.id_bytes() + 2)
    }

    /// Bytes of the file for a text in these windows.
    pub fn file_len(self, windows: &Windows) -> u64 {
        let rows = (windows.count() * windows.scored()) as u64;
        HEADER + 4 * windows.tokens.len() as u64 + rows * self.row() as u64
    }

    /// The bytes before the first prediction.
    pub fn header(self, windows: &Windows) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for n in [windows.n_ctx, self.n_vocab, windows.count(), self.k, self.drawn] {
            bytes.extend((n as u32).to_le_bytes());
        }
        bytes.extend(windows.bos.unwrap_or(-1).to_le_bytes());
        windows.tokens.iter().for_each(|t| bytes.extend(t.to_le_bytes()));
        bytes
    }

    /// Keeps of a prediction what the file keeps; `number` counts the predictions, and decides what
    /// is drawn.
    pub fn sample(self, logits: &[f32], next: usize, number: u64) -> Sampled {
        let max = softmax::max(logits);
        let norm = f64::from(max) + softmax::sum_exp(logits, max).ln();
        let log_p = |x: f32| (f64::from(x) - norm) as f32;
        let choice = |id: u32| Choice { id, log_prob: log_p(logits[id as usize]) };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.k < ids.len() {
            ids.select_nth_unstable_by(self.k, by_logit);
        }
        let (top, rest) = ids.split_at_mut(self.k.min(logits.len()));
        top.sort_unstable_by(by_logit);
        // In an order that does not depend on how the likeliest were found.
        rest.sort_unstable();
        let weight = |id: &u32| f64::from(logits[*id as usize] - max).exp();
        let all: f64 = rest.iter().map(weight).sum();
        // Evenly spaced over the rest's probability, from a place that chance decides.
        let step = all / self.drawn.max(1) as f64;
        let mut drawn = Vec::with_capacity(self.drawn);
        let (mut at, mut passed) = (step * chance(number), 0.0);
        for id in rest.iter() {
            passed += weight(id);
            while at < passed && drawn.len() < self.drawn {
                drawn.push(choice(*id));
                at += step;
            }
        }
        Sampled {
            top: top.iter().map(|&id| choice(id)).collect(),
            drawn,
            log_rest: (all.ln() + f64::from(max) - norm) as f32,
            log_prob_next: logits.get(next).map_or(f32::NEG_INFINITY, |&x| log_p(x)),
        }
    }

    /// The bytes of one prediction.
    pub fn row_bytes(self, sampled: &Sampled) -> Vec<u8> {
        let mut bytes = sampled.log_prob_next.to_le_bytes().to_vec();
        bytes.extend(sampled.log_rest.to_le_bytes());
        let kept = sampled.top.iter().chain(&sampled.drawn);
        kept.clone().for_each(|c| bytes.extend_from_slice(&c.id.to_le_bytes()[..self.id_bytes()]));
        // Where nothing is left to draw from, zeros.
        bytes.resize(8 + (self.k + self.drawn) * self.id_bytes(), 0);
        kept.for_each(|c| bytes.extend(((-c.log_prob * UNITS).round() as u16).to_le_bytes()));
        bytes.resize(self.row(), 0);
        bytes
    }
}

/// A number from 0 to below 1 for each `n`, the same on every machine (SplitMix64).
fn chance(n: u64) -> f64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// An opened baseline.
#[derive(Debug)]
pub struct Baseline {
    /// The text it was made from.
    pub windows: Windows,
    /// Tokens of the vocabulary it was made with.
    pub n_vocab: usize,
    /// What is kept of each prediction; `None` for all.
    pub shape: Option<Shape>,
    file: InputFile,
    at: u64,
    row: Vec<u8>,
    sampled: Sampled,
    log_probs: Vec<f32>,
}

impl Baseline {
    /// Whether a file begins like a baseline.
    ///
    /// # Errors
    /// `Io`.
    pub fn is_one(path: &Path) -> Result<bool> {
        let file = InputFile::open(path)?;
        let mut magic = [0; 8];
        if file.len() < 8 {
            return Ok(false);
        }
        file.read_at(0, &mut magic)?;
        Ok(&magic == MAGIC || &magic == LLAMA_CPP_MAGIC)
    }

    /// Opens either format. Tokens are read; predictions when they are asked for.
    ///
    /// # Errors
    /// `Malformed` when header and length disagree, or a token is outside the vocabulary; `Io`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = InputFile::open(path)?;
        let bad = |why: String| Error::malformed(format!("is no sound baseline: {why}")).at(path);
        if file.len() < HEADER {
            return Err(bad(format!("{} bytes are fewer than the header's {HEADER}", file.len())));
        }
        let mut head = [0; HEADER as usize];
        file.read_at(0, &mut head)?;
        let is_ours = &head[..8] == MAGIC;
        if !is_ours && &head[..8] != LLAMA_CPP_MAGIC {
            return Err(bad("it begins with neither qcbase02 nor _logits_".into())
                .hint("qconv eval baseline makes them, and llama-perplexity with --save-all-logits"));
        }
        let word = |i: usize| head[8 + 4 * i..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let [n_ctx, n_vocab, count] = [0, 1, 2].map(|i| word(i) as usize);
        let shape = is_ours.then(|| Shape { n_vocab, k: word(3) as usize, drawn: word(4) as usize });
        let header = if is_ours { HEADER } else { 20 };
        let n_tokens = n_ctx.checked_mul(count).filter(|&n| n > 0 && n_ctx >= 4);
        let n_tokens = n_tokens.ok_or_else(|| bad(format!("{count} windows of {n_ctx} tokens")))?;
        let whole = Shape { n_vocab, k: n_vocab, drawn: 0 };
        let Shape { k, drawn, .. } = shape.unwrap_or(whole);
        if n_vocab == 0 || k == 0 || k > n_vocab || drawn > n_vocab {
            return Err(bad(format!("{k} and {drawn} of {n_vocab} tokens of each prediction")));
        }
        let row = shape.map_or(2 * (2 * n_vocab.div_ceil(2) + 4), Shape::row);
        let begin = header + 4 * n_tokens as u64;
        let rows = (count * (n_ctx - 1 - n_ctx / 2)) as u64;
        let len = rows.checked_mul(row as u64).and_then(|n| n.checked_add(begin));
        if len != Some(file.len()) {
            return Err(bad(format!(
                "the file has {} bytes, {count} windows of {n_ctx} tokens take {}",
                file.len(),
                len.unwrap_or(u64::MAX)
            )));
        }
        let mut bytes = vec![0; 4 * n_tokens];
        file.read_at(header, &mut bytes)?;
        let tokens: Vec<i32> = bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        if let Some(t) = tokens.iter().find(|&&t| !usize::try_from(t).is_ok_and(|t| t < n_vocab)) {
            return Err(bad(format!("token {t} of a vocabulary of {n_vocab}")));
        }
        let bos = is_ours.then(|| word(5) as i32).filter(|&t| t >= 0 && (t as usize) < n_vocab);
        Ok(Self {
            windows: Windows { tokens, n_ctx, bos },
            n_vocab,
            shape,
            file,
            at: begin,
            row: vec![0; row],
            sampled: Sampled::default(),
            log_probs: Vec::new(),
        })
    }

    /// The next prediction, in the order in which `Windows::read` gives them.
    ///
    /// # Errors
    /// `Malformed` for what is no probability, or when there is no further one; `Io`.
    pub fn next_row(&mut self) -> Result<Base<'_>> {
        let at = self.at;
        let bad =
            |file: &InputFile, why: &str| Error::malformed(format!("{why} at offset {at}")).at(file.path());
        if self.at >= self.file.len() {
            return Err(bad(&self.file, "there is no further prediction"));
        }
        self.file.read_at(self.at, &mut self.row)?;
        self.at += self.row.len() as u64;
        let float = |b: &[u8]| b.first_chunk().map_or(f32::NAN, |b| f32::from_le_bytes(*b));
        let Some(shape) = self.shape else {
            let (scale, least) = (float(&self.row), float(&self.row[4..]));
            if !scale.is_finite() || !least.is_finite() {
                return Err(bad(&self.file, "the scale is not finite"));
            }
            let codes = self.row[8..].as_chunks::<2>().0.iter().take(self.n_vocab);
            self.log_probs.clear();
            self.log_probs.extend(codes.map(|b| scale * f32::from(u16::from_le_bytes(*b)) + least));
            return Ok(Base::Whole(&self.log_probs, 0.0));
        };
        let (head, rest) = self.row.split_at(8);
        let (ids, codes) = rest.split_at((shape.k + shape.drawn) * shape.id_bytes());
        let ids = ids.chunks_exact(shape.id_bytes());
        let ids = ids.map(|b| b.iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b)));
        let log_probs = codes.as_chunks::<2>().0.iter().map(|b| -f32::from(u16::from_le_bytes(*b)) / UNITS);
        let mut kept = ids.zip(log_probs).map(|(id, log_prob)| Choice { id, log_prob });
        let sampled = &mut self.sampled;
        (sampled.log_prob_next, sampled.log_rest) = (float(head), float(&head[4..]));
        sampled.top.clear();
        sampled.top.extend(kept.by_ref().take(shape.k));
        sampled.drawn.clear();
        if sampled.log_rest > f32::NEG_INFINITY {
            sampled.drawn.extend(kept);
        }
        let sound = |l: f32| l <= 1e-3;
        if !sound(sampled.log_prob_next) || !sound(sampled.log_rest) {
            return Err(bad(&self.file, "a probability is above 1 or none"));
        }
        if sampled.top.iter().chain(&sampled.drawn).any(|c| c.id as usize >= self.n_vocab) {
            return Err(bad(&self.file, "a token is outside the vocabulary"));
        }
        Ok(Base::Sampled(&self.sampled))
    }
}
