//! How far RoPE turns each pair of elements per position, and the tables of sines and cosines.
//!
//! Formulas and defaults are those of transformers' `modeling_rope_utils.py` (`ROPE_INIT_FUNCTIONS`), in f64 where
//! that has f32: linear (kaiokendev), dynamic NTK (bloc97), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753),
//! Llama 3.1.

use std::f64::consts::PI;

use half::f16;
use serde_json::Value as Json;

use super::graph::RopeSpec;
use super::rope::Llama3;
use crate::error::{Error, Result};

/// Most elements of one table.
const MAX_TABLE: usize = 1 << 28;

/// Lengths that some kinds of scaling depend on, in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// What the model says it can (`max_position_embeddings`).
    pub model: Option<u64>,
    /// What the table is for.
    pub context: u64,
}

/// RoPE's parameters in config.json, by key.
struct Parameters<'a>(&'a Json);

impl Parameters<'_> {
    fn get(&self, key: &str) -> Option<&Json> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let positive = |v: &Json| {
            v.as_f64()
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| Error::malformed(format!("RoPE parameter {key} = {v} is no positive number")))
        };
        self.get(key).map(positive).transpose()
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| Error::malformed(format!("RoPE parameter {key} is missing")))
    }

    /// `values` numbers.
    fn list(&self, key: &str, values: usize) -> Result<Vec<f64>> {
        let list = self.get(key).and_then(Json::as_array).filter(|list| list.len() == values);
        let number = |v: &Json| v.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        list.and_then(|list| list.iter().map(number).collect()).ok_or_else(|| {
            Error::malformed(format!("RoPE parameter {key} should hold {values} positive numbers"))
        })
    }
}

impl RopeSpec {
    /// Frequencies for heads of which `dim` elements are rotated, from config.json's parameters in
    /// transformers' terms (`rope_type`, `rope_theta`, `factor`, ...), where `theta` stands for a `rope_theta` that is
    /// not there.
    ///
    /// # Errors
    /// `Malformed` for parameters that are missing or no positive numbers; `Unsupported` for other kinds of
    /// scaling, and for `dynamic` beyond the model's own length, where frequencies change as the text grows.
    pub fn of(parameters: &Json, dim: usize, theta: f64, lengths: Lengths) -> Result<Self> {
        let p = Parameters(parameters);
        let kind = p.get("rope_type").or_else(|| p.get("type"));
        let kind = kind.map_or(Some("default"), Json::as_str).map(str::to_lowercase);
        let theta = p.number("rope_theta")?.unwrap_or(theta);
        let plain = |j: usize| theta.powf(-2.0 * j as f64 / dim as f64);
        let divided = |factors: &[f64]| factors.iter().enumerate().map(|(j, f)| plain(j) / f).collect();
        let half = dim / 2;
        let (frequencies, attention_factor) = match kind.as_deref() {
            Some("default") => (divided(&vec![1.0; half]), 1.0),
            Some("linear") => (divided(&vec![p.needed("factor")?; half]), 1.0),
            Some("dynamic") => {
                let own = lengths.model;
                if p.get("alpha").is_some() {
                    return Err(Error::unsupported("dynamic RoPE with an alpha is not known here"));
                }
                if own.is_none_or(|own| lengths.context > own) {
                    let own = own.map_or("an unknown number".into(), |n| n.to_string());
                    return Err(Error::unsupported(format!(
                        "dynamic RoPE turns otherwise beyond {own} tokens, and with every further one; a table for {} cannot follow",
                        lengths.context
                    ))
                    .hint(format!("--context {own} at most")));
                }
                (divided(&vec![1.0; half]), 1.0)
            }
            Some("llama3") => {
                let factors = Llama3 { theta, ..Llama3::of(parameters)? }.factors(dim as u64);
                (divided(&factors.into_iter().map(f64::from).collect::<Vec<_>>()), 1.0)
            }
            Some("longrope" | "su") => {
                let original = p.number("original_max_position_embeddings")?;
                let original = original.or(lengths.model.map(|n| n as f64)).filter(|n| *n > 1.0);
                let original = original.ok_or_else(|| {
                    Error::malformed("RoPE parameter original_max_position_embeddings is missing")
                })?;
                let is_long = lengths.context as f64 > original;
                let factors = p.list(if is_long { "long_factor" } else { "short_factor" }, half)?;
                let factor =
                    p.number("factor")?.or(lengths.model.map(|n| n as f64 / original)).unwrap_or(1.0);
                let own = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                (divided(&factors), p.number("attention_factor")?.unwrap_or(own))
            }
            Some("yarn") => yarn(&p, dim, theta, lengths, &plain)?,
            _ => {
                let kind = p.get("rope_type").or_else(|| p.get("type")).cloned().unwrap_or_default();
                return Err(Error::unsupported(format!(
                    "RoPE of the kind {kind} is not known here; known are default, linear, dynamic, llama3, longrope and yarn"
                )));
            }
        };
        let spec = Self { frequencies, attention_factor };
        if spec.frequencies.iter().chain([&spec.attention_factor]).any(|f| !f.is_finite()) {
            return Err(Error::malformed(format!(
                "RoPE parameters {parameters} give numbers that are not finite"
            )));
        }
        Ok(spec)
    }

    /// No rotation, whatever the position.
    pub fn still(dim: usize) -> Self {
        Self { frequencies: vec![0.0; dim / 2], attention_factor: 1.0 }
    }

    /// Cosines and sines, `[positions, 2 * frequencies]` each.
    ///
    /// # Errors
    /// As [`Self::elements`].
    pub fn table(&self, positions: usize) -> Result<(Vec<f16>, Vec<f16>)> {
        let elements = self.elements(positions)?;
        let table = |sines: bool| {
            let mut values = Vec::with_capacity(elements);
            (0..positions as u64).for_each(|position| self.row(position, sines, &mut values));
            values
        };
        Ok((table(false), table(true)))
    }

    /// Elements of a table of so many positions.
    ///
    /// # Errors
    /// `Limit` for more than 2^28.
    pub fn elements(&self, positions: usize) -> Result<usize> {
        let elements = self.frequencies.len().checked_mul(2).and_then(|dim| dim.checked_mul(positions));
        elements.filter(|n| *n <= MAX_TABLE).ok_or_else(|| {
            Error::limit(format!(
                "a rotary table of {positions} positions and {} frequencies has more than {MAX_TABLE} elements",
                self.frequencies.len()
            ))
        })
    }

    /// Adds the cosines or the sines of a position, `[2 * frequencies]`, the second half equal to the first. Angles are
    /// computed in f64, and values rounded once.
    pub fn row(&self, position: u64, sines: bool, values: &mut Vec<f16>) {
        let of = if sines { f64::sin } else { f64::cos };
        let angles = self.frequencies.iter().map(|f| position as f64 * f);
        let first = values.len();
        values.extend(angles.map(|angle| f16::from_f64(of(angle) * self.attention_factor)));
        values.extend_from_within(first..);
    }
}

/// Frequencies between plain and divided, by how often they turn in the original length, and the factor of the
/// scores' temperature, on sines and cosines.
fn yarn(
    p: &Parameters<'_>,
    dim: usize,
    theta: f64,
    lengths: Lengths,
    plain: &dyn Fn(usize) -> f64,
) -> Result<(Vec<f64>, f64)> {
    let original = p.needed("original_max_position_embeddings")?;
    let factor = match p.number("factor")? {
        Some(factor) => factor,
        None => lengths
            .model
            .map(|n| n as f64 / original)
            .ok_or_else(|| Error::malformed("RoPE parameter factor is missing"))?,
    };
    // Which pair turns this often in the original length.
    let pair = |turns: f64| dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let mut low = pair(p.number("beta_fast")?.unwrap_or(32.0));
    let mut high = pair(p.number("beta_slow")?.unwrap_or(1.0));
    if p.get("truncate") != Some(&Json::Bool(false)) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let frequency = |j: usize| {
        let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
        plain(j) * (ramp / factor + (1.0 - ramp))
    };
    let frequencies = (0..dim / 2).map(frequency).collect();
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor =
        match (p.number("attention_factor")?, p.number("mscale")?, p.number("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(scale), Some(all)) => magnitude(scale) / magnitude(all),
            _ => magnitude(1.0),
        };
    Ok((frequencies, attention_factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::json;

    /// `tests/peers/rope.py` made it with transformers.
    const CASES: &str = include_str!("../../fixtures/graph/rope.json");

    fn spec(case: &Json) -> Result<RopeSpec> {
        let lengths =
            Lengths { model: case["model"].as_u64(), context: case["context"].as_u64().unwrap_or(1) };
        RopeSpec::of(&case["parameters"], case["dim"].as_u64().unwrap() as usize, 1.0, lengths)
    }

    #[test]
    fn frequencies_are_those_of_transformers() {
        let cases: Vec<Json> = serde_json::from_str(CASES).unwrap();
        assert_eq!(cases.len(), 15);
        for case in cases {
            let name = &case["name"];
            let spec = spec(&case).unwrap();
            let wanted = case["frequencies"].as_array().unwrap();
            assert_eq!(spec.frequencies.len(), wanted.len(), "{name}");
            for (j, (found, wanted)) in spec.frequencies.iter().zip(wanted).enumerate() {
                let wanted = wanted.as_f64().unwrap();
                // transformers has them in f32.
                assert!((found - wanted).abs() <= 2e-6 * wanted, "{name}: {j} is {found}, not {wanted}");
            }
            let wanted = case["attention_factor"].as_f64().unwrap();
            assert!((spec.attention_factor - wanted).abs() < 1e-8, "{name}");
        }
    }

    #[test]
    fn tables_hold_each_angle_twice() {
        let spec = RopeSpec { frequencies: vec![1.0, 0.25], attention_factor: 0.5 };
        let (cos, sin) = spec.table(3).unwrap();
        let row =
            |table: &[f16], p: usize| table[4 * p..][..4].iter().map(|v| v.to_f64()).collect::<Vec<_>>();
        assert_eq!((cos.len(), sin.len()), (12, 12));
        assert_eq!((row(&cos, 0), row(&sin, 0)), (vec![0.5; 4], vec![0.0; 4]));
        let near = |v: f64| f16::from_f64(v).to_f64();
        let wanted = |f: fn(f64) -> f64| [2.0, 0.5, 2.0, 0.5].map(|angle| near(0.5 * f(angle))).to_vec();
        assert_eq!((row(&cos, 2), row(&sin, 2)), (wanted(f64::cos), wanted(f64::sin)));
        let (cos, sin) = RopeSpec::still(4).table(9).unwrap();
        assert!(cos.iter().all(|v| *v == f16::ONE) && sin.iter().all(|v| *v == f16::ZERO));
        assert_eq!(spec.table(1 << 27).unwrap_err().kind(), ErrorKind::Limit);
        assert_eq!(spec.table(usize::MAX).unwrap_err().kind(), ErrorKind::Limit);
    }

    #[test]
    fn what_no_table_can_hold_is_refused() {
        let of = |parameters: Json| {
            spec(&json!({ "parameters": parameters, "dim": 8, "model": 64, "context": 65 }))
        };
        let cases = [
            (json!({ "rope_type": "dynamic", "factor": 2.0 }), ErrorKind::Unsupported, "64"),
            (json!({ "rope_type": "proportional" }), ErrorKind::Unsupported, "proportional"),
            (json!({ "rope_type": 7 }), ErrorKind::Unsupported, "7"),
            (json!({ "rope_type": "linear" }), ErrorKind::Malformed, "factor"),
            (json!({ "rope_type": "linear", "factor": -1.0 }), ErrorKind::Malformed, "-1"),
            (json!({ "rope_type": "yarn", "factor": 4.0 }), ErrorKind::Malformed, "original_max_position"),
            (json!({ "rope_type": "linear", "factor": 1e-320 }), ErrorKind::Malformed, "not finite"),
            (
                json!({ "rope_type": "longrope", "original_max_position_embeddings": 32, "long_factor": [1.0], "short_factor": [1.0] }),
                ErrorKind::Malformed,
                "long_factor should hold 4",
            ),
            (json!({ "rope_theta": "much" }), ErrorKind::Malformed, "rope_theta"),
        ];
        for (parameters, kind, says) in cases {
            let error = of(parameters.clone()).unwrap_err();
            assert_eq!(error.kind(), kind, "{parameters}");
            assert!(error.to_string().contains(says), "{error}");
        }
        // Within its length dynamic RoPE is as if unscaled.
        let within = json!({ "parameters": { "rope_type": "dynamic", "factor": 2.0 }, "dim": 8, "model": 64, "context": 64 });
        assert_eq!(
            spec(&within).unwrap().frequencies,
            RopeSpec::of(&json!({}), 8, 1.0, Lengths { model: None, context: 9 }).unwrap().frequencies
        );
    }
}
