//! How much an error in the embeddings matters: by the matrices that read them first.
//!
//! A row of `token_embd` begins a token's stream, and nothing calibrates it, since it is no factor of a
//! product. But the first layer's norms read the stream, and matrices read the norms: an error `e` changes
//! what such a matrix gives by about `W D e / r`, with `D` the norm's weight and `r` the row's size. So
//! `M = sum of D W^T W D` over these matrices is to the embeddings what second moments are to a matrix.
//! Later layers read a stream that has grown by then, so that the error is a smaller part of it.

use std::sync::Arc;

use super::gather::Scratch;
use super::plan::{Plan, TensorPlan};
use crate::arch::{Captures, FoldKind, FoldRule, Template};
use crate::block::gram::PANEL;
use crate::calibrate::gram::{Panels, ROWS, band_len, bands};
use crate::container::Store;
use crate::error::{Error, Result};
use crate::quantize::gptq::Sums;

/// Rows of a matrix that are looked at, evenly spread.
const MOST_ROWS: u64 = 1 << 14;

/// A norm on the stream, and the matrices that read it, as numbers of the plan's tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reader {
    norm: usize,
    /// Whether the norm takes the mean away, as those do that have a bias.
    centred: bool,
    matrices: Vec<usize>,
}

/// All that read the embeddings first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readers {
    columns: u64,
    readers: Vec<Reader>,
}

impl Readers {
    /// Those behind the first layer's norms of `columns` values, as `[fold]` of the architecture has them;
    /// `originals` are the names of `tensors` in the model. `None` where there are none.
    pub(super) fn find(
        folds: &[(Template, FoldRule)],
        originals: &[String],
        tensors: &[TensorPlan],
        columns: u64,
    ) -> Option<Arc<Self>> {
        let first = Captures::of_layer(0);
        let find = |name: &Template, end: &str| {
            let name = format!("{}{end}", name.fill(&first)?);
            originals.iter().position(|n| *n == name)
        };
        let readable = |i: usize| tensors[i].source.check_decodable().is_ok();
        let reader = |(norm, rule): &(Template, FoldRule)| {
            let is_norm = rule.kind == FoldKind::Norm && norm.has('i');
            let number = find(norm, ".weight").filter(|&i| is_norm && readable(i))?;
            let matrices: Vec<usize> = rule
                .to
                .iter()
                .filter_map(|m| find(m, ".weight"))
                .filter(|&i| readable(i) && tensors[i].rows().0 == columns)
                .collect();
            let fits = tensors[number].source.elements() == columns && !matrices.is_empty();
            fits.then(|| Reader { norm: number, centred: find(norm, ".bias").is_some(), matrices })
        };
        let readers: Vec<Reader> = folds.iter().filter_map(reader).collect();
        (!readers.is_empty()).then(|| Arc::new(Self { columns, readers }))
    }

    /// Bytes that [`Self::measure`] takes, beyond what is then made of it.
    pub fn bytes(&self) -> u64 {
        self.columns.saturating_mul(self.columns.saturating_add(8 * ROWS as u64)).saturating_mul(4)
    }

    /// `M`.
    ///
    /// # Errors
    /// As reads fail; `Malformed` for weights that are not finite.
    pub(super) fn measure(&self, plan: &Plan, store: &Store) -> Result<Metric> {
        let n = self.columns as usize;
        let mut metric: Vec<Vec<f64>> =
            (0..bands(self.columns)).map(|b| vec![0.0; band_len(self.columns, b) as usize]).collect();
        let (mut gain, mut rows) = (Vec::new(), Vec::new());
        let (mut scratch, mut panels) = (Scratch::default(), Panels::default());
        for reader in &self.readers {
            plan.tensors[reader.norm].source.values(store, 0, self.columns, &mut gain, &mut scratch)?;
            for matrix in reader.matrices.iter().map(|&m| &plan.tensors[m]) {
                let all = matrix.source.elements() / self.columns;
                // Of experts, each token reads some only; they stand for one.
                let experts = (all / matrix.rows().1).max(1);
                let spans = all.div_ceil(ROWS as u64);
                let taken = spans.min(MOST_ROWS / ROWS as u64);
                let factor = (spans as f64 / (taken * experts) as f64).sqrt() as f32;
                for k in 0..taken {
                    let start = (k * spans / taken) * ROWS as u64;
                    let end = (start + ROWS as u64).min(all);
                    let (start, end) = (start * self.columns, end * self.columns);
                    matrix.source.values(store, start, end, &mut rows, &mut scratch)?;
                    for row in rows.chunks_exact_mut(n) {
                        row.iter_mut().zip(&gain).for_each(|(w, g)| *w *= g * factor);
                        if reader.centred {
                            let mean = row.iter().sum::<f32>() / n as f32;
                            row.iter_mut().for_each(|w| *w -= mean);
                        }
                    }
                    panels.pack(n, rows.chunks_exact(n));
                    for (b, band) in metric.iter_mut().enumerate() {
                        panels.add_products(b, band);
                    }
                }
            }
        }
        if metric.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::malformed("the matrices that read the embeddings are not finite"));
        }
        Ok(Metric { columns: n, bands: metric })
    }
}

/// `M`, as a sum over one token.
pub(super) struct Metric {
    columns: usize,
    bands: Vec<Vec<f64>>,
}

impl Sums for Metric {
    fn columns(&self) -> usize {
        self.columns
    }

    fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
        let band = self.bands.get(i / PANEL).map(Vec::as_slice).unwrap_or_default();
        let before: usize = (i / PANEL * PANEL..i).map(|k| self.columns - k).sum();
        let values = band.get(before..before + row.len());
        let values = values.ok_or_else(|| Error::misuse("a row beyond the matrix"))?;
        row.iter_mut().zip(values).for_each(|(r, &v)| *r = v as f32);
        Ok(())
    }
}
