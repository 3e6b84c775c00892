//! What an importance matrix says of each tensor, by the definitions of llama.cpp's imatrix tool
//! (`--show-statistics`).

use std::collections::BTreeMap;

use serde::Serialize;

use super::importance::Importance;
use crate::container::imatrix::Sums;

/// Measures of the mean squares of one matrix's input columns; those of experts that no token
/// reached are left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorStatistics {
    /// The matrix.
    pub tensor: String,
    /// Its layer, where it belongs to one.
    pub layer: Option<u32>,
    /// Values, of all experts.
    pub n: usize,
    /// Sum of the mean squares.
    pub sum: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation.
    pub std: f64,
    /// Share of those above 1e-5.
    pub active: f64,
    /// Entropy of their distribution over the columns, in bits.
    pub entropy: f64,
    /// The same as a share of the largest possible.
    pub entropy_share: f64,
    /// Share of those more than one standard deviation above the mean.
    pub outliers: f64,
    /// Cosine similarity with the same matrix one layer before.
    pub similarity: Option<f64>,
}

/// Averages over the matrices of a layer, weighed by their numbers of values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerStatistics {
    /// The layer.
    pub layer: u32,
    /// Of [`TensorStatistics::sum`].
    pub sum: f64,
    /// Of [`TensorStatistics::outliers`].
    pub outliers: f64,
    /// Of [`TensorStatistics::similarity`], which counts as 0 where there is none.
    pub similarity: f64,
}

const INACTIVE: f64 = 1e-5;

impl TensorStatistics {
    /// The matrix without its layer: `ffn_down` of `blk.3.ffn_down.weight`.
    pub fn kind(&self) -> &str {
        kind(&self.tensor)
    }
}

fn kind(tensor: &str) -> &str {
    let name = tensor.strip_suffix(".weight").unwrap_or(tensor);
    name.rsplit('.').next().unwrap_or(name)
}

/// The layer that a name states, and the name in the layer before.
fn place(tensor: &str) -> Option<(u32, Option<String>)> {
    let (layer, rest) = tensor.strip_prefix("blk.")?.split_once('.')?;
    let layer = layer.parse::<u32>().ok()?;
    Some((layer, layer.checked_sub(1).map(|before| format!("blk.{before}.{rest}"))))
}

/// Measures of every tensor: those of a kind together, the largest sum first. Entries that no token
/// reached are left out.
pub fn statistics(importance: &Importance) -> Vec<TensorStatistics> {
    let mut all: Vec<_> =
        importance.sums.iter().filter_map(|(name, sums)| one(importance, name, sums)).collect();
    all.sort_by(|a, b| a.kind().cmp(b.kind()).then(b.sum.total_cmp(&a.sum)));
    all
}

fn one(importance: &Importance, tensor: &str, sums: &Sums) -> Option<TensorStatistics> {
    let columns = sums.squares.len() / sums.counts.len().max(1);
    let seen = sums.squares.chunks(columns.max(1)).zip(&sums.counts).filter(|(_, count)| **count > 0);
    let means: Vec<f64> =
        seen.flat_map(|(squares, &count)| squares.iter().map(move |s| s / count as f64)).collect();
    if means.is_empty() {
        return None;
    }
    let n = means.len() as f64;
    let count = |wanted: &dyn Fn(f64) -> bool| means.iter().filter(|v| wanted(**v)).count() as f64;
    let sum: f64 = means.iter().sum();
    let mean = sum / n;
    let std = (means.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    let shares = means.iter().map(|v| v / sum).filter(|p| *p > 0.0);
    let entropy = -shares.map(|p| p * p.log2()).sum::<f64>();
    let (layer, before) = place(tensor).map_or((None, None), |(layer, before)| (Some(layer), before));
    let before = before.and_then(|name| importance.sums.get(&name));
    Some(TensorStatistics {
        tensor: tensor.to_string(),
        layer,
        n: means.len(),
        sum,
        min: means.iter().copied().fold(f64::INFINITY, f64::min),
        max: means.iter().copied().fold(0.0, f64::max),
        mean,
        std,
        active: 1.0 - count(&|v| v <= INACTIVE) / n,
        entropy,
        entropy_share: if means.len() > 1 { entropy / n.log2() } else { 0.0 },
        outliers: if std > 0.0 { count(&|v| (v - mean) / std > 1.0) / n } else { 0.0 },
        similarity: before.and_then(|before| cosine(&sums.squares, &before.squares)),
    })
}

fn cosine(a: &[f64], b: &[f64]) -> Option<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    (a.len() == b.len() && cosine.is_finite()).then_some(cosine)
}

/// Averages of every layer.
pub fn by_layer(tensors: &[TensorStatistics]) -> Vec<LayerStatistics> {
    let mut layers = BTreeMap::<u32, (f64, LayerStatistics)>::new();
    for t in tensors {
        let Some(layer) = t.layer else { continue };
        let none = LayerStatistics { layer, sum: 0.0, outliers: 0.0, similarity: 0.0 };
        let (weight, all) = layers.entry(layer).or_insert((0.0, none));
        let n = t.n as f64;
        *weight += n;
        all.sum += n * t.sum;
        all.outliers += n * t.outliers;
        all.similarity += n * t.similarity.unwrap_or(0.0);
    }
    let averages = |(n, all): (f64, LayerStatistics)| LayerStatistics {
        layer: all.layer,
        sum: all.sum / n,
        outliers: all.outliers / n,
        similarity: all.similarity / n,
    };
    layers.into_values().map(averages).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_by_hand() {
        let mut all = Importance::default();
        let mut put = |name: &str, squares: &[f64], counts: &[u64]| {
            all.sums.insert(name.into(), Sums { squares: squares.to_vec(), counts: counts.to_vec() });
        };
        put("blk.0.ffn_up.weight", &[2.0, 2.0, 2.0, 2.0], &[2]);
        put("blk.1.ffn_up.weight", &[8.0, 0.0, 0.0, 0.0], &[2]);
        put("blk.1.ffn_up_exps.weight", &[3.0, 3.0, 5.0, 5.0], &[3, 0]);
        put("output.weight", &[1.0], &[0]);
        let found = statistics(&all);
        assert_eq!(
            found.iter().map(|t| (t.kind(), t.layer)).collect::<Vec<_>>(),
            [("ffn_up", Some(0)), ("ffn_up", Some(1)), ("ffn_up_exps", Some(1))]
        );
        let (even, odd, experts) = (&found[0], &found[1], &found[2]);
        assert_eq!((even.sum, even.min, even.max, even.mean, even.std), (4.0, 1.0, 1.0, 1.0, 0.0));
        assert_eq!((even.active, even.entropy, even.entropy_share, even.outliers), (1.0, 2.0, 1.0, 0.0));
        assert_eq!((even.similarity, odd.similarity), (None, Some(0.5)));
        assert_eq!((odd.active, odd.entropy, odd.outliers), (0.25, 0.0, 0.25));
        assert!((odd.std - 3f64.sqrt()).abs() < 1e-12);
        assert_eq!((experts.n, experts.sum), (2, 2.0));
        let layers = by_layer(&found);
        assert_eq!((layers.len(), layers[1].layer), (2, 1));
        assert!((layers[1].sum - (4.0 * 4.0 + 2.0 * 2.0) / 6.0).abs() < 1e-12);
        assert!((layers[1].similarity - 4.0 * 0.5 / 6.0).abs() < 1e-12);
    }
}
