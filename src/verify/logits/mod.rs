//! The proof at the logits: what the source computes by another implementation, beside what the
//! linked llama.cpp computes of the finished file.
//!
//! The source's side is candle, on the checkpoint's own weights, where it has the family. Where not,
//! llama.cpp runs a conversion to F32 as well; then an error that both conversions share stays
//! hidden, and the report says so. `formats/spec/logits.md` has the tolerances and the way from
//! logits that differ to the layer and the tensor.

#[cfg(feature = "reference")]
mod candle;
mod departure;
mod nodes;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use self::departure::Suspects;
pub use self::departure::{Departure, Place};
use super::{Check, LogitsOptions, Options, Outcome, Report, SourceModel};
use crate::container::gguf::Gguf;
use crate::convert::{Budget, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::SAMPLE_TEXT;
use crate::eval::logits::{self, Agreement, Matrix};
use crate::eval::score::log_norm;
use crate::ggml::{self, Model, ModelOptions, Node};
use crate::tensor::DType;

/// What the logits showed.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Whose logits the file's are compared with.
    pub reference: String,
    /// Why this is not candle.
    pub no_candle: Option<String>,
    /// Tokens of the text.
    pub tokens: usize,
    /// The file's logits beside the source's.
    pub source: Comparison,
    /// For a quantized file: its logits beside candle's with the file's own weights.
    pub own_weights: Option<Comparison>,
    /// What `rel_rms` may be, of `own_weights` where that is there, else of `source`. `None`: the
    /// types promise nothing.
    pub tolerance: Option<f64>,
    /// Where it departs, where it does.
    pub departure: Option<Departure>,
}

/// How two sets of logits lie beside each other.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Differences of the values.
    #[serde(flatten)]
    pub agreement: Agreement,
    /// Mean absolute difference.
    pub mean_abs: f64,
    /// Mean divergence of the file's probabilities from the reference's (Kullback-Leibler, natural
    /// logarithms).
    pub kld_mean: f64,
    /// The largest of a token.
    pub kld_max: f64,
}

impl Comparison {
    /// Compares what was `found` with what was `wanted`.
    ///
    /// # Errors
    /// As [`logits::compare`].
    fn new(found: &Matrix, wanted: &Matrix) -> Result<Self> {
        let agreement = logits::compare(found, wanted)?;
        let differences = found.values.iter().zip(&wanted.values).map(|(a, b)| f64::from((a - b).abs()));
        let mean_abs = differences.sum::<f64>() / found.values.len().max(1) as f64;
        let rows = found.values.chunks_exact(found.columns).zip(wanted.values.chunks_exact(wanted.columns));
        let (mut sum, mut kld_max) = (0.0, 0f64);
        for (q, p) in rows {
            let (norm_q, norm_p) = (log_norm(q), log_norm(p));
            let terms = p.iter().zip(q).map(|(&p, &q)| {
                let (p, q) = (f64::from(p) - norm_p, f64::from(q) - norm_q);
                p.exp() * (p - q)
            });
            let kld = terms.sum::<f64>().max(0.0);
            sum += kld;
            kld_max = kld_max.max(kld);
        }
        Ok(Self { mean_abs, kld_mean: sum / agreement.rows.max(1) as f64, kld_max, agreement })
    }

    fn within(&self, tolerance: Option<f64>) -> bool {
        self.agreement.finite && tolerance.is_none_or(|most| self.agreement.rel_rms <= most)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let a = &self.agreement;
        write!(
            f,
            "{:.2e} of their spread (largest {:.2e}, mean {:.2e}), same largest at {} of {}, KLD {:.2e}",
            a.rel_rms, a.max_abs, self.mean_abs, a.argmax_agree, a.rows, self.kld_mean
        )
    }
}

impl Proof {
    /// Whether the file computes what it should.
    pub fn passed(&self) -> bool {
        self.departure.is_none() && self.own_weights.as_ref().unwrap_or(&self.source).within(self.tolerance)
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tokens: logits differ from those of {} by {}",
            self.tokens, self.reference, self.source
        )?;
        if let Some(own) = &self.own_weights {
            write!(f, "; from candle's with this file's weights by {own}")?;
        }
        match self.tolerance {
            Some(most) => write!(f, "; {most:.0e} is allowed")?,
            None => write!(f, "; so few bits promise nothing")?,
        }
        if let Some(why) = &self.no_candle {
            write!(f, " (not compared with candle: {why})")?;
        }
        match &self.departure {
            Some(departure) => write!(f, "\n         {departure}"),
            None => Ok(()),
        }
    }
}

/// The file and what it is held to.
struct Case<'a> {
    gguf: &'a Gguf,
    options: &'a Options,
    model: &'a Model,
    /// Tokens of the text.
    ids: Vec<i32>,
    threads: u32,
    suspects: Suspects,
    observer: &'a dyn Observer,
}

impl Case<'_> {
    /// How far logits may stray from exact ones with the same weights, as root mean square over
    /// their spread; and whether the weights are the source's but for the rounding of 16 bits. ggml
    /// rounds activations to the type that goes with the weights'.
    fn tolerance(&self) -> (f64, bool) {
        let weights = self.gguf.store.tensors().iter().filter(|t| t.shape.len() > 1).map(|t| t.dtype);
        let of_type = |dtype| match dtype {
            DType::F64 | DType::F32 => (1e-3, true),
            DType::F16 => (5e-3, true),
            DType::BF16 => (2e-2, true),
            _ => (1e-1, false),
        };
        weights.map(of_type).fold((1e-3, true), |(a, exact), (b, other)| (a.max(b), exact && other))
    }
}

/// Adds the check of the logits to the report.
///
/// # Errors
/// Where the comparison could not be made: not enough memory, a model without logits.
pub(super) fn check(
    report: &mut Report,
    gguf: &Gguf,
    source: &SourceModel,
    options: &Options,
    how: &LogitsOptions,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    let model = Model::load(&options.file, &ModelOptions::default())?;
    if !model.is_decoder_only() {
        return Err(Error::unsupported("an encoder predicts no next token: it has no logits to compare")
            .at(&options.file));
    }
    let ids = text(&model, how.tokens)?;
    let suspects = Suspects::new(&report.tensors);
    let threads = budget.threads as u32;
    let case = Case { gguf, options, model: &model, ids, threads, suspects, observer };
    #[cfg(feature = "reference")]
    let by_candle = candle::Candle::open(&case, source, how).and_then(|candle| candle.prove(&case));
    #[cfg(not(feature = "reference"))]
    let by_candle: Result<Proof> =
        Err(Error::unsupported("this program was built without the feature reference"));
    let proof = match by_candle {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            nodes::prove(&case, source, how, budget, &e.to_string())
        }
        by_candle => by_candle,
    };
    let proof = match proof {
        Ok(proof) => proof,
        // The file's own fault: a tensor without a place, another vocabulary.
        Err(e) if matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Check) => {
            report.add("logits", Err(e));
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let outcome = if proof.passed() { Outcome::Passed } else { Outcome::Failed };
    report.checks.push(Check { name: "logits", outcome, detail: proof.to_string() });
    report.proof = Some(proof);
    Ok(())
}

/// The first `n` tokens of the built-in text; ids spread over the vocabulary where the file has no
/// tokenizer.
fn text(model: &Model, n: usize) -> Result<Vec<i32>> {
    let n = n.min(model.n_ctx_train().max(1) as usize).max(1);
    // A token is rarely longer.
    let end =
        (0..=SAMPLE_TEXT.len().min(n.saturating_mul(16))).rev().find(|&i| SAMPLE_TEXT.is_char_boundary(i));
    let mut ids = match model.vocab_type() {
        ggml::VocabType::None => Vec::new(),
        _ => model.tokenize(&SAMPLE_TEXT[..end.unwrap_or(0)], true, false)?,
    };
    ids.truncate(n);
    if ids.is_empty() {
        let n_tokens = model.n_tokens().max(1) as u64;
        ids.extend((0..n as u64).map(|i| (i.wrapping_mul(2_654_435_761) % n_tokens) as i32));
    }
    Ok(ids)
}

/// What each layer gives, one row per token.
#[derive(Default)]
struct LayerOutputs(BTreeMap<usize, Matrix>);

/// The layer of a node called `l_out-3`.
fn layer_of_output(name: &str) -> Option<usize> {
    name.strip_prefix("l_out-")?.parse().ok()
}

impl ggml::Observer for LayerOutputs {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        layer_of_output(&node.name()).is_some()
    }

    fn see(&mut self, node: &Node<'_>) -> Result<()> {
        let Some(layer) = layer_of_output(&node.name()) else { return Ok(()) };
        let mut scratch = Vec::new();
        let values = node.values(&mut scratch)?;
        let empty = Matrix { columns: node.shape()[0], values: Vec::new() };
        self.0.entry(layer).or_insert(empty).values.extend_from_slice(values);
        Ok(())
    }
}

/// Refuses what would not fit into the memory.
///
/// # Errors
/// `Limit`, with both sizes and a way on.
pub(super) fn check_memory(what: &str, bytes: u64, how: &LogitsOptions) -> Result<()> {
    let Some(most) = how.memory.or_else(crate::sys::available_memory) else { return Ok(()) };
    if bytes <= most {
        return Ok(());
    }
    let mib = |n: u64| n.div_ceil(1 << 20);
    let hint = match how.memory {
        Some(_) => "give more with --max-memory, or verify without --logits",
        None => "free some, or verify without --logits on this machine",
    };
    Err(Error::limit(format!("{what} takes {} MiB of memory, {} MiB are there", mib(bytes), mib(most)))
        .hint(hint))
}
