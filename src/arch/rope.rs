//! Tensors that llama.cpp expects and no checkpoint holds: factors for RoPE frequencies.

use serde_json::{Value as Json, json};

use super::Model;
use super::schema::{Generate, GenerateFn};
use crate::error::{Error, Result};

const MAX_DIM: u64 = 1 << 16;

/// Parameters of Llama 3.1's frequency scaling, with transformers' names and defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Llama3 {
    pub theta: f64,
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl Llama3 {
    /// From config.json's object.
    ///
    /// # Errors
    /// `Malformed` for what is no positive number.
    pub fn of(rope: &Json) -> Result<Self> {
        let get = |key: &str, default: f64| match rope.get(key).filter(|v| !v.is_null()) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|v| *v > 0.0)
                .ok_or_else(|| Error::malformed(format!("RoPE parameter {key} = {v} is no positive number"))),
        };
        Ok(Self {
            theta: get("rope_theta", 10_000.0)?,
            factor: get("factor", 8.0)?,
            low_freq_factor: get("low_freq_factor", 1.0)?,
            high_freq_factor: get("high_freq_factor", 4.0)?,
            original_max_position_embeddings: get("original_max_position_embeddings", 8192.0)?,
        })
    }

    /// One divisor for each pair of dimensions: 1 for short wavelengths, `factor` for long ones,
    /// and between them a line in the frequency.
    /// Source: `ROPE_INIT_FUNCTIONS["llama3"]` of transformers; Llama 3.1's release notes.
    pub fn factors(&self, dim: u64) -> Vec<f32> {
        // The programs whose result is to be met compute in 32 bits, and divide by multiplying
        // with the reciprocal.
        let original = self.original_max_position_embeddings as f32;
        let (factor, low, high) =
            (self.factor as f32, self.low_freq_factor as f32, self.high_freq_factor as f32);
        let low_wavelength = (self.original_max_position_embeddings / self.low_freq_factor) as f32;
        let high_wavelength = (self.original_max_position_embeddings / self.high_freq_factor) as f32;
        (0..dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / dim as f32;
                let frequency = 1.0 / (self.theta.powf(f64::from(exponent)) as f32);
                let wavelength = (1.0 / frequency) * (2.0 * std::f32::consts::PI);
                if wavelength < high_wavelength {
                    1.0
                } else if wavelength > low_wavelength {
                    factor
                } else {
                    let smooth = ((1.0 / wavelength) * original - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect()
    }

    /// The config.json entry.
    pub fn config(&self) -> Json {
        json!({
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings as u64,
        })
    }

    /// The parameters that give these factors; GGUF keeps the factors alone. Released models vary
    /// `factor` and the original context; the other two are 1 and 4, or both 1 (Llama 4).
    pub fn recover(factors: &[f32], theta: f64) -> Option<Self> {
        let factor = f64::from(factors.iter().copied().fold(1.0f32, f32::max));
        let dim = factors.len() as u64 * 2;
        [4.0, 1.0]
            .into_iter()
            .flat_map(|high| (6..22).map(move |k| (high, k)))
            .map(|(high_freq_factor, k)| Self {
                theta,
                factor,
                low_freq_factor: 1.0,
                high_freq_factor,
                original_max_position_embeddings: f64::from(1u32 << k),
            })
            .find(|p| p.factors(dim).iter().zip(factors).all(|(a, b)| (a - b).abs() <= 2e-6 * b.abs()))
    }
}

/// Shape and values of a generated tensor.
pub(super) fn generate(rule: &Generate, model: &Model) -> Result<(Vec<u64>, Vec<f32>)> {
    match rule.function {
        None => computed(rule, model),
        Some(GenerateFn::RopeLong) => listed(model, "long_factor"),
        Some(GenerateFn::RopeShort) => listed(model, "short_factor"),
        Some(GenerateFn::RopeLlama3) => {
            let parameters = Llama3::of(&model.var("rope")?)?;
            let dim = model.var("rope_dim")?.as_u64().filter(|d| (2..=MAX_DIM).contains(d));
            let dim = dim.ok_or_else(|| Error::malformed("the head dimension is unknown or absurd"))?;
            Ok((vec![dim / 2], parameters.factors(dim)))
        }
    }
}

/// What an expression gives.
fn computed(rule: &Generate, model: &Model) -> Result<(Vec<u64>, Vec<f32>)> {
    let fail = |why: &str| Error::malformed(format!("generated {}: {why}", rule.name.text()));
    let list = rule.values.as_ref().map(|e| e.eval(&model.scope)).transpose()?;
    let list = list.as_ref().and_then(Json::as_array).ok_or_else(|| fail("`values` is no list"))?;
    let values = list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect::<Option<Vec<_>>>();
    let values = values.ok_or_else(|| fail("`values` holds what is no number"))?;
    Ok((vec![values.len() as u64], values))
}

/// LongRoPE's factors stand in config.json, one for each pair of dimensions.
fn listed(model: &Model, key: &str) -> Result<(Vec<u64>, Vec<f32>)> {
    let fail = |why: &str| Error::malformed(format!("RoPE parameter {key} {why}"));
    let rope = model.var("rope")?;
    let list = rope.get(key).and_then(Json::as_array).ok_or_else(|| fail("is no list"))?;
    let values = list
        .iter()
        .map(|v| v.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && *v > 0.0))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| fail("holds what is no positive number"))?;
    match model.var("rope_dim")?.as_u64() {
        Some(dim) if dim / 2 != values.len() as u64 => {
            Err(fail(&format!("has {} numbers where {dim} dimensions need {}", values.len(), dim / 2)))
        }
        _ => Ok((vec![values.len() as u64], values)),
    }
}
