//! A base model's predictions in a file, for [`Divergence`](super::score::Divergence) without the model.
//!
//! Ours keeps of each prediction the likeliest tokens; `formats/spec/baseline.md` has the bytes. What
//! llama.cpp's perplexity tool writes with `--save-all-logits` is read as well: all
//! log-probabilities, in 16 bits each.

use std::path::Path;

use super::score::{Base, Top, log_norm};
use super::windows::Windows;
use crate::container::InputFile;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"qcbase01";
const LLAMA_CPP_MAGIC: &[u8; 8] = b"_logits_";
/// Magic, n_ctx, n_vocab, windows, k, BOS.
const HEADER: u64 = 8 + 5 * 4;
/// Most bytes of a prediction as a share of 16-bit logits: one of so many.
const SHARE: usize = 20;
/// More tokens than this tell nothing more.
const MOST_TOKENS: usize = 1024;

/// The layout of a baseline: sizes that follow from the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Tokens kept of each prediction.
    pub k: usize,
}

impl Shape {
    /// With as many tokens as make a twentieth of the size of 16-bit logits.
    pub fn fitting(n_vocab: usize) -> Self {
        let bytes = 2 * n_vocab / SHARE;
        let k = bytes.saturating_sub(4) / Self { n_vocab, k: 0 }.entry();
        Self { n_vocab, k: k.clamp(1, MOST_TOKENS.min(n_vocab.max(1))) }
    }

    fn id_bytes(self) -> usize {
        if self.n_vocab <= 1 << 16 { 2 } else { 4 }
    }

    fn entry(self) -> usize {
        self.id_bytes() + 4
    }

    fn row(self) -> usize {
        4 + self.k * self.entry()
    }

    /// Bytes of the file for a text in these windows.
    pub fn file_len(self, windows: &Windows) -> u64 {
        let rows = (windows.count() * windows.scored()) as u64;
        HEADER + 4 * windows.tokens.len() as u64 + rows * self.row() as u64
    }

    /// The bytes before the first prediction.
    pub fn header(self, windows: &Windows) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for n in [windows.n_ctx, self.n_vocab, windows.count(), self.k] {
            bytes.extend((n as u32).to_le_bytes());
        }
        bytes.extend(windows.bos.unwrap_or(-1).to_le_bytes());
        windows.tokens.iter().for_each(|t| bytes.extend(t.to_le_bytes()));
        bytes
    }

    /// Keeps of one prediction what the file keeps.
    pub fn top(self, logits: &[f32], next: usize) -> Top {
        let norm = log_norm(logits);
        let log_p = |x: f32| (f64::from(x) - norm) as f32;
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.k < ids.len() {
            ids.select_nth_unstable_by(self.k, by_logit);
            ids.truncate(self.k);
        }
        ids.sort_by(by_logit);
        let log_probs = ids.iter().map(|&i| log_p(logits[i as usize])).collect();
        Top { ids, log_probs, log_prob_next: logits.get(next).map_or(f32::NEG_INFINITY, |&x| log_p(x)) }
    }

    /// The bytes of one prediction.
    pub fn row_bytes(self, top: &Top) -> Vec<u8> {
        let mut bytes = top.log_prob_next.to_le_bytes().to_vec();
        for id in &top.ids {
            bytes.extend_from_slice(&id.to_le_bytes()[..self.id_bytes()]);
        }
        top.log_probs.iter().for_each(|l| bytes.extend(l.to_le_bytes()));
        bytes
    }
}

/// An opened baseline.
#[derive(Debug)]
pub struct Baseline {
    /// The text it was made from.
    pub windows: Windows,
    /// Tokens of the vocabulary it was made with.
    pub n_vocab: usize,
    /// Tokens kept of each prediction; `None` for all.
    pub k: Option<usize>,
    file: InputFile,
    at: u64,
    row: Vec<u8>,
    top: Top,
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
            return Err(bad("it begins with neither qcbase01 nor _logits_".into())
                .hint("qconv eval baseline makes them, and llama-perplexity with --save-all-logits"));
        }
        let word = |i: usize| head[8 + 4 * i..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let [n_ctx, n_vocab, count] = [0, 1, 2].map(|i| word(i) as usize);
        let (k, header) = if is_ours { (word(3) as usize, HEADER) } else { (n_vocab, 20) };
        let n_tokens = n_ctx.checked_mul(count).filter(|&n| n > 0 && n_ctx >= 4);
        let n_tokens = n_tokens.ok_or_else(|| bad(format!("{count} windows of {n_ctx} tokens")))?;
        if n_vocab == 0 || k == 0 || k > n_vocab {
            return Err(bad(format!("{k} of {n_vocab} tokens of each prediction")));
        }
        let row = if is_ours { Shape { n_vocab, k }.row() } else { 2 * (2 * n_vocab.div_ceil(2) + 4) };
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
        let bos = is_ours.then(|| word(4) as i32).filter(|&t| t >= 0 && (t as usize) < n_vocab);
        Ok(Self {
            windows: Windows { tokens, n_ctx, bos },
            n_vocab,
            k: is_ours.then_some(k),
            file,
            at: begin,
            row: vec![0; row],
            top: Top::default(),
            log_probs: Vec::new(),
        })
    }

    /// The next prediction, in the order in which [`Windows::read`] gives them.
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
        let Some(k) = self.k else {
            let (scale, least) = (float(&self.row), float(&self.row[4..]));
            if !scale.is_finite() || !least.is_finite() {
                return Err(bad(&self.file, "the scale is not finite"));
            }
            let codes = self.row[8..].as_chunks::<2>().0.iter().take(self.n_vocab);
            self.log_probs.clear();
            self.log_probs.extend(codes.map(|b| scale * f32::from(u16::from_le_bytes(*b)) + least));
            return Ok(Base::Whole(&self.log_probs, 0.0));
        };
        let (next, rest) = self.row.split_at(4);
        let id_bytes = Shape { n_vocab: self.n_vocab, k }.id_bytes();
        let (ids, log_probs) = rest.split_at(k * id_bytes);
        self.top.log_prob_next = float(next);
        self.top.ids.clear();
        self.top.ids.extend(
            ids.chunks_exact(id_bytes).map(|b| b.iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b))),
        );
        self.top.log_probs.clear();
        self.top.log_probs.extend(log_probs.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        let sound = |l: &f32| *l <= 1e-3;
        if !self.top.log_probs.iter().chain([&self.top.log_prob_next]).all(sound) {
            return Err(bad(&self.file, "a probability is above 1 or none"));
        }
        if self.top.ids.iter().any(|&i| i as usize >= self.n_vocab) {
            return Err(bad(&self.file, "a token is outside the vocabulary"));
        }
        Ok(Base::Top(&self.top))
    }
}
