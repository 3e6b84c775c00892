//! Every tensor decoded, and compared with its source.

use std::collections::HashMap;

use serde::Serialize;

use super::{Outcome, SourceModel};
use crate::arch::Mapped;
use crate::block::codec;
use crate::container::Store;
use crate::container::gguf::Gguf;
use crate::convert::{Observer, Scratch, Source, identity, source_tensors};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

/// One tensor compared with its source. Errors are absolute, in the unit of the weights.
#[derive(Clone, Debug, Serialize)]
pub struct TensorCheck {
    /// Name.
    pub name: String,
    /// Type in the file; of a package, that it is decoded to.
    pub dtype: DType,
    /// How a package encodes it, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// Elements looked at.
    pub elements: u64,
    /// Largest error.
    pub max_error: f64,
    /// Root mean square error.
    pub rmse: f64,
    /// Root mean square error over the root mean square of the source.
    pub relative_rmse: f64,
    /// Cosine of the angle between file and source.
    pub cosine: f64,
    /// Blocks whose error exceeds what the type promises.
    pub out_of_bound: u64,
    /// Values that are NaN or infinite in the file, but not in the source.
    pub non_finite: u64,
}

/// Elements decoded at a time.
const SPAN: u64 = 1 << 17;
/// Spans of a sample are this long, taken from beginning, middle and end.
const SAMPLE_SPAN: u64 = 4096;

type Compared = (Vec<TensorCheck>, Outcome, String);

pub(super) fn compare(
    gguf: &Gguf,
    source: Option<&SourceModel>,
    sample: Option<u64>,
    observer: &dyn Observer,
) -> Result<Compared> {
    let opened;
    let (store, mapped): (&Store, Vec<Mapped>) = match source {
        Some(SourceModel::HuggingFace(hf)) => {
            opened = source_tensors(hf)?;
            (&opened.0, opened.1.clone())
        }
        Some(SourceModel::Gguf(other)) => (&other.store, identity(other.store.tensors())),
        None => (&gguf.store, identity(gguf.store.tensors())),
    };
    let mut by_name: HashMap<&str, &Mapped> = mapped.iter().map(|m| (m.name.as_str(), m)).collect();
    let mut checks = Vec::with_capacity(mapped.len());
    for info in gguf.store.tensors() {
        let Some(m) = by_name.remove(info.name.as_str()) else {
            return Ok((checks, Outcome::Failed, format!("tensor {:?} is not in the source", info.name)));
        };
        if m.shape != info.shape {
            let detail =
                format!("tensor {:?} has shape {:?}, its source {:?}", info.name, info.shape, m.shape);
            return Ok((checks, Outcome::Failed, detail));
        }
        let one = check_tensor(&gguf.store, info, store, m, sample, observer)
            .map_err(|e| e.context(format!("tensor {:?}", info.name)))?;
        checks.push(one);
    }
    if let Some(name) = by_name.into_keys().min() {
        return Ok((checks, Outcome::Failed, format!("tensor {name:?} of the source is missing")));
    }
    let judged = judge(&checks, source.is_some());
    let (outcome, detail) = judged;
    Ok((checks, outcome, detail))
}

fn judge(checks: &[TensorCheck], compared: bool) -> (Outcome, String) {
    if let Some(bad) = checks.iter().find(|c| c.non_finite > 0) {
        let detail = format!("tensor {:?}: {} values are NaN or infinite", bad.name, bad.non_finite);
        return (Outcome::Failed, detail);
    }
    if let Some(bad) = checks.iter().find(|c| c.out_of_bound > 0) {
        let detail = format!(
            "tensor {:?}: {} blocks differ from the source by more than {} allows (largest error {:.3e})",
            bad.name, bad.out_of_bound, bad.dtype, bad.max_error
        );
        return (Outcome::Failed, detail);
    }
    // Most block types promise nothing for a single weight; but nothing is better than this.
    if let Some(bad) = checks.iter().find(|c| compared && c.relative_rmse > 1.0) {
        let detail = format!(
            "tensor {:?} ({}) is farther from the source than zeros would be: relative error {:.2}",
            bad.name, bad.dtype, bad.relative_rmse
        );
        return (Outcome::Failed, detail);
    }
    let n: u64 = checks.iter().map(|c| c.elements).sum();
    let detail = match checks.iter().max_by(|a, b| a.relative_rmse.total_cmp(&b.relative_rmse)) {
        Some(worst) if compared => format!(
            "{} tensors, {n} weights within bounds; worst {} ({}): relative error {:.2e}, cosine {:.6}",
            checks.len(),
            worst.name,
            worst.dtype,
            worst.relative_rmse,
            worst.cosine
        ),
        _ => format!("{} tensors, {n} weights decoded, all finite", checks.len()),
    };
    (Outcome::Passed, detail)
}

fn check_tensor(
    store: &Store,
    info: &TensorInfo,
    source_store: &Store,
    mapped: &Mapped,
    sample: Option<u64>,
    observer: &dyn Observer,
) -> Result<TensorCheck> {
    let own = identity(std::slice::from_ref(info));
    let own = own.first().ok_or_else(|| Error::misuse("no tensor to check"))?;
    let file = Source::new(own, store)?;
    let source = Source::new(mapped, source_store)?;
    let bound = codec(info.dtype);
    let block = info.dtype.block_size() as usize;
    let (mut a, mut b, mut scratch) = (Vec::new(), Vec::new(), Scratch::default());
    let mut sums = Sums::default();
    for (start, end) in spans(file.elements(), sample, info.dtype.block_size()) {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        file.values(store, start, end, &mut a, &mut scratch)?;
        source.values(source_store, start, end, &mut b, &mut scratch)?;
        for (found, wanted) in a.chunks(block.max(32)).zip(b.chunks(block.max(32))) {
            let largest = sums.add(found, wanted);
            let allowed = bound.and_then(|c| c.error_bound(wanted)).map_or(f64::INFINITY, f64::from);
            if largest > allowed {
                sums.out_of_bound += 1;
            }
        }
        observer.advance(info.dtype.bytes_for(end - start)?, &info.name);
    }
    Ok(sums.finish(&info.name, info.dtype))
}

/// All of the tensor, or a few stretches of it.
fn spans(elements: u64, sample: Option<u64>, block: u64) -> Vec<(u64, u64)> {
    let whole = |from: u64, to: u64, step: u64| {
        (from..to).step_by(step as usize).map(move |s| (s, (s + step).min(to))).collect::<Vec<_>>()
    };
    match sample {
        Some(n) if elements > n.max(3 * SAMPLE_SPAN) => {
            let count = (n / SAMPLE_SPAN).max(3);
            let step = (elements - SAMPLE_SPAN) / (count - 1);
            (0..count)
                .map(|k| {
                    let start = k * step / block * block;
                    (start, (start + SAMPLE_SPAN).min(elements))
                })
                .collect()
        }
        _ => whole(0, elements, SPAN),
    }
}

#[derive(Default)]
pub(super) struct Sums {
    n: u64,
    max: f64,
    square: f64,
    file: f64,
    source: f64,
    product: f64,
    pub(super) out_of_bound: u64,
    non_finite: u64,
}

impl Sums {
    /// Adds a block and returns its largest error.
    pub(super) fn add(&mut self, found: &[f32], wanted: &[f32]) -> f64 {
        let mut largest = 0.0f64;
        for (&x, &y) in found.iter().zip(wanted) {
            if !x.is_finite() || !y.is_finite() {
                self.non_finite += u64::from(!x.is_finite());
                continue;
            }
            let (x, y) = (f64::from(x), f64::from(y));
            let error = (x - y).abs();
            largest = largest.max(error);
            self.square += error * error;
            self.file += x * x;
            self.source += y * y;
            self.product += x * y;
        }
        self.n += found.len() as u64;
        self.max = self.max.max(largest);
        largest
    }

    pub(super) fn finish(self, name: &str, dtype: DType) -> TensorCheck {
        let n = self.n.max(1) as f64;
        let norm = (self.file * self.source).sqrt();
        TensorCheck {
            name: name.into(),
            dtype,
            encoding: None,
            elements: self.n,
            max_error: self.max,
            rmse: (self.square / n).sqrt(),
            relative_rmse: if self.source > 0.0 {
                (self.square / self.source).sqrt()
            } else {
                self.square.sqrt()
            },
            cosine: match norm > 0.0 {
                true => self.product / norm,
                // Nothing is like nothing, and like nothing else.
                false => f64::from(u8::from(self.file == self.source)),
            },
            out_of_bound: self.out_of_bound,
            non_finite: self.non_finite,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_within() {
        for elements in [0, 1, 4096, 100_000, 1 << 30] {
            for sample in [None, Some(16 * 4096)] {
                let spans = spans(elements, sample, 32);
                assert!(spans.iter().all(|(s, e)| s < e && *e <= elements && s % 32 == 0));
                let sum: u64 = spans.iter().map(|(s, e)| e - s).sum();
                assert!(sum <= elements && (sample.is_some() || sum == elements));
            }
        }
    }
}
