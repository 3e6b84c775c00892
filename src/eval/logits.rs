//! Logits, and how far two sets of them (or of embeddings) lie apart.

use crate::error::{Error, Result};

/// What a model gives for a sequence, one row per token: logits have one column per entry of the
/// vocabulary, embeddings one per dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Columns.
    pub columns: usize,
    /// `rows * columns` values, row by row.
    pub values: Vec<f32>,
}

impl Matrix {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }
}

/// How `actual` logits agree with a `reference`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Agreement {
    /// Root mean square of the difference, over all values.
    pub rms: f64,
    /// Standard deviation of the reference, over all values.
    pub spread: f64,
    /// `rms / spread`: 0 when both are 0, infinite when only the spread is.
    pub rel_rms: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Rows whose largest value stands in the same column.
    pub argmax_agree: usize,
    /// Rows compared.
    pub rows: usize,
    /// Whether every value of both is finite. When not, the measures above are NaN or infinite.
    pub finite: bool,
}

/// Compares two sets of logits of the same tokens.
///
/// # Errors
/// `Check` when they differ in shape or are empty.
pub fn compare(actual: &Matrix, reference: &Matrix) -> Result<Agreement> {
    let shape = |m: &Matrix| (m.rows(), m.columns, m.values.len());
    if shape(actual) != shape(reference) || actual.rows() == 0 {
        return Err(Error::check(format!(
            "{} tokens by {} values cannot be compared with {} by {}",
            actual.rows(),
            actual.columns,
            reference.rows(),
            reference.columns
        )));
    }
    let n = reference.values.len() as f64;
    let mean = reference.values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let (mut squares, mut variance, mut max_abs, mut finite) = (0.0, 0.0, 0f64, true);
    for (&a, &b) in actual.values.iter().zip(&reference.values) {
        let (a, b) = (f64::from(a), f64::from(b));
        finite &= a.is_finite() && b.is_finite();
        squares += (a - b) * (a - b);
        variance += (b - mean) * (b - mean);
        max_abs = if (a - b).is_nan() { f64::NAN } else { max_abs.max((a - b).abs()) };
    }
    let rows =
        actual.values.chunks_exact(actual.columns).zip(reference.values.chunks_exact(reference.columns));
    let (rms, spread) = ((squares / n).sqrt(), (variance / n).sqrt());
    Ok(Agreement {
        rms,
        spread,
        rel_rms: if rms == 0.0 { 0.0 } else { rms / spread },
        max_abs,
        argmax_agree: rows.filter(|(a, b)| argmax(a) == argmax(b)).count(),
        rows: actual.rows(),
        finite,
    })
}

/// Whether no value is NaN or above all numbers; such a row has no probabilities.
pub fn is_sound(values: &[f32]) -> bool {
    values.iter().fold(0, |bad, &x| bad | u32::from(x.is_nan() || x == f32::INFINITY)) == 0
}

/// Index of the largest value, the first of equals; NaN never wins. `None` when nothing can.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (i, &v) in values.iter().enumerate() {
        if !v.is_nan() && best.is_none_or(|(_, b)| v > b) {
            best = Some((i, v));
        }
    }
    best.map(|(i, _)| i)
}

/// The logits that llama.cpp computes for `ids` with the GGUF file at `path`: on the CPU, with
/// `threads` threads, F32 keys and values, no rearranged weights.
///
/// # Errors
/// As [`crate::ggml::Model::load`] and [`crate::ggml::Context::decode`]; `Unsupported` for
/// encoders, which predict no next token.
#[cfg(feature = "ggml")]
pub fn forward(path: impl AsRef<std::path::Path>, ids: &[i32], threads: u32) -> Result<Matrix> {
    let path = path.as_ref();
    let model = crate::ggml::Model::load(path, &crate::ggml::ModelOptions::default())?;
    forward_with(&model, ids, threads).map_err(|e| e.at(path))
}

/// As [`forward`], with a model in memory.
///
/// # Errors
/// As [`forward`].
#[cfg(feature = "ggml")]
pub fn forward_with(model: &crate::ggml::Model, ids: &[i32], threads: u32) -> Result<Matrix> {
    run(model, ids, threads, None)
}

/// As [`forward_with`], under the eyes of `observer`.
///
/// # Errors
/// As [`forward`], and those of the observer.
#[cfg(feature = "ggml")]
pub fn observed(
    model: &crate::ggml::Model,
    ids: &[i32],
    threads: u32,
    observer: &mut dyn crate::ggml::Observer,
) -> Result<Matrix> {
    run(model, ids, threads, Some(observer))
}

#[cfg(feature = "ggml")]
fn run(
    model: &crate::ggml::Model,
    ids: &[i32],
    threads: u32,
    mut observer: Option<&mut dyn crate::ggml::Observer>,
) -> Result<Matrix> {
    use crate::ggml::{Context, ContextOptions, Logits};
    // A batch this long bounds the logits that llama.cpp holds beside ours.
    const BATCH: usize = 128;
    if !model.is_decoder_only() {
        return Err(Error::unsupported("an encoder predicts no next token"));
    }
    let n_ctx = u32::try_from(ids.len()).map_err(|_| Error::limit("too many tokens for one context"))?;
    let options = ContextOptions {
        n_ctx: n_ctx.max(1),
        n_batch: ids.len().clamp(1, BATCH) as u32,
        threads,
        exact: true,
        observed: observer.is_some(),
    };
    let mut context = Context::new(model, &options)?;
    let n_vocab = model.n_tokens();
    let mut values = Vec::new();
    for chunk in ids.chunks(context.n_batch()) {
        match &mut observer {
            Some(observer) => context.decode_observed(chunk, Logits::All, *observer)?,
            None => context.decode(chunk, Logits::All)?,
        }
        for i in 0..chunk.len() {
            let row = context.logits(i).ok_or_else(|| Error::unsupported("the model gives no logits"))?;
            values.extend_from_slice(row);
        }
    }
    Ok(Matrix { columns: n_vocab, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(columns: usize, values: &[f32]) -> Matrix {
        Matrix { columns, values: values.to_vec() }
    }

    #[test]
    fn the_measures_are_what_they_say() {
        let reference = matrix(2, &[1.0, -1.0, 1.0, -1.0]);
        let same = compare(&reference, &reference).unwrap();
        assert_eq!((same.rms, same.spread, same.argmax_agree, same.rows), (0.0, 1.0, 2, 2));
        let other = compare(&matrix(2, &[1.0, -1.0, -1.0, -1.0]), &reference).unwrap();
        assert_eq!((other.rms, other.rel_rms, other.max_abs), (1.0, 1.0, 2.0));
        let bad = compare(&matrix(2, &[1.0, -1.0, f32::NAN, -1.0]), &reference).unwrap();
        assert!(!bad.finite && bad.rms.is_nan() && bad.argmax_agree == 1);
        assert!(compare(&matrix(4, &[0.0; 4]), &reference).is_err());
        assert!(compare(&matrix(0, &[]), &matrix(0, &[])).is_err());
    }

    #[test]
    fn argmax_takes_the_first_and_skips_nan() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, 3.0]), Some(2));
        assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[f32::NAN]), None);
        assert_eq!(argmax(&[]), None);
    }
}
