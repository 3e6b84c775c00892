//! Where two computations part.

use std::collections::HashMap;
use std::fmt;

use serde::Serialize;

use super::super::TensorCheck;
use crate::tensor::DType;

/// A part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// A layer, the first being 0.
    Layer(usize),
    /// The last norm and the output matrix.
    Head,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layer(k) => write!(f, "layer {k}"),
            Self::Head => f.write_str("the head"),
        }
    }
}

/// The first part that computes something else than the source's, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Departure {
    /// The part; `None` where llama.cpp does not show its layers.
    pub place: Option<Place>,
    /// The file's tensors that are to blame.
    pub tensors: Vec<String>,
    /// What was found.
    pub why: String,
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place} is the first to depart: ")?;
        }
        f.write_str(&self.why)
    }
}

/// How far a tensor may lie from its source, as root mean square over that of the source; beyond it is
/// another tensor, not a rounded one.
pub(super) fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 | DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        DType::BF16 => 8e-3,
        other => match other.bits_per_weight() {
            b if b >= 8.0 => 0.03,
            b if b >= 6.0 => 0.06,
            b if b >= 5.0 => 0.12,
            b if b >= 4.0 => 0.25,
            b if b >= 3.0 => 0.45,
            b if b >= 2.0 => 0.8,
            _ => 1.0,
        },
    }
}

/// The file's tensors that are not their source's, rounded: name and relative difference.
#[derive(Default)]
pub(super) struct Suspects(HashMap<String, f64>);

impl Suspects {
    pub fn new(checks: &[TensorCheck]) -> Self {
        let is_other = |c: &&TensorCheck| {
            c.non_finite > 0 || c.relative_rmse.is_nan() || c.relative_rmse > rounding(c.dtype)
        };
        Self(checks.iter().filter(is_other).map(|c| (c.name.clone(), c.relative_rmse)).collect())
    }

    /// Those that a part reads, the most different first.
    pub fn of(&self, place: Place) -> Vec<String> {
        let mut found: Vec<&String> = self.0.keys().filter(|name| is_of(name, place)).collect();
        let difference = |name: &str| self.0.get(name).copied().unwrap_or(0.0);
        found.sort_by(|a, b| difference(b).total_cmp(&difference(a)).then_with(|| a.cmp(b)));
        found.into_iter().cloned().collect()
    }

    /// The first part with such a tensor.
    pub fn first(&self) -> Option<Place> {
        let layers = self.0.keys().filter_map(|name| layer_of(name));
        match layers.min() {
            _ if !self.of(Place::Layer(0)).is_empty() => Some(Place::Layer(0)),
            Some(k) => Some(Place::Layer(k)),
            None => (!self.0.is_empty()).then_some(Place::Head),
        }
    }

    /// Names with their differences, the first few.
    pub fn describe(&self, names: &[String]) -> String {
        const SOME: usize = 6;
        let mut said: Vec<String> = names
            .iter()
            .take(SOME)
            .map(|name| {
                format!("{name} (relative difference {:.2e})", self.0.get(name).copied().unwrap_or(0.0))
            })
            .collect();
        if names.len() > SOME {
            said.push(format!("{} more", names.len() - SOME));
        }
        said.join(", ")
    }
}

/// The layer of a tensor in GGUF's names.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// What comes before the layers counts to the first, in whose output it shows.
fn is_of(name: &str, place: Place) -> bool {
    let is_head = name.starts_with("output");
    match (layer_of(name), place) {
        (Some(layer), Place::Layer(k)) => layer == k,
        (None, Place::Layer(k)) => k == 0 && !is_head,
        (None, Place::Head) => is_head || name == "token_embd.weight",
        (Some(_), Place::Head) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_belong_to_parts() {
        assert_eq!(layer_of("blk.12.attn_q.weight"), Some(12));
        for (name, place) in [
            ("blk.3.ffn_down.weight", Place::Layer(3)),
            ("token_embd.weight", Place::Layer(0)),
            ("rope_freqs.weight", Place::Layer(0)),
            ("output_norm.weight", Place::Head),
            ("output.weight", Place::Head),
        ] {
            assert!(is_of(name, place), "{name}");
            assert!(!is_of(name, Place::Layer(7)), "{name}");
        }
    }
}
