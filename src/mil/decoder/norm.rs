//! Norms.

use super::super::builder::{Builder, Value};
use super::Graph;
use crate::arch::{Decoder, Norm};
use crate::error::{Error, Result};

/// The smallest number above 0 in float16: what is added to a variance at least.
pub const LEAST_EPS: f32 = 1.0 / 16_777_216.0;

impl Graph<'_> {
    /// The norm of the stream that is called so, over the channels.
    pub(super) fn norm(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        let Decoder { eps, stream, .. } = *self.model;
        // A stream that is multiplied has the square of that in its variance.
        let eps = eps * stream * stream;
        self.normed(b, name, x, self.axis(), eps, 1.0)
    }

    /// A norm along an axis, times a factor. An `eps` that float16 would take for 0 is raised: nothing is to be divided
    /// by 0.
    pub(super) fn normed(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        x: &Value,
        axis: i64,
        eps: f32,
        factor: f32,
    ) -> Result<Value> {
        let eps = eps.max(LEAST_EPS);
        match self.model.norm {
            Norm::Rms => self.rms_norm(b, name, x, axis, eps, factor),
            Norm::Layer => {
                let normed = self.layer_norm(b, name, x, axis, eps)?;
                self.times(b, &format!("{name}_scaled"), normed, factor)
            }
        }
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias` along an axis.
    fn layer_norm(&self, b: &mut Builder<'_>, name: &str, x: &Value, axis: i64, eps: f32) -> Result<Value> {
        let shape = along(axis, x.dims().len(), size(x, axis)?);
        let inputs = [("x", x.into()), ("axes", [axis].into()), ("epsilon", eps.into())];
        let normed = b.op("layer_norm", &format!("{name}_normed"), inputs)?;
        let weight = b.vector(&format!("{name}.weight"), &shape)?;
        let weighed = b.mul(name, &normed, &weight)?;
        let bias = format!("{name}.bias");
        if !b.has(&bias) {
            return Ok(weighed);
        }
        let bias = b.vector(&bias, &shape)?;
        b.add(&format!("{name}_biased"), &weighed, &bias)
    }

    /// `x / sqrt(mean(x^2) + eps) * factor * weight` along an axis.
    ///
    /// As half of the layer norm of `x` and `-x`, whose mean is 0 and whose variance is `mean(x^2)`: squares of their
    /// own would exceed float16 from 256 on.
    fn rms_norm(
        &self,
        b: &mut Builder<'_>,
        name: &str,
        x: &Value,
        axis: i64,
        eps: f32,
        factor: f32,
    ) -> Result<Value> {
        let n = size(x, axis)?;
        let rank = x.dims().len();
        let at = |here: i64, elsewhere: i64| -> Vec<i64> {
            (0..rank as i64).map(|i| if i == axis { here } else { elsewhere }).collect()
        };
        let negative = b.mul(&format!("{name}_negative"), x, -1.0)?;
        let both = b.concat(&format!("{name}_both"), [x, &negative], axis)?;
        let inputs = [("x", (&both).into()), ("axes", [axis].into()), ("epsilon", eps.into())];
        let normed = b.op("layer_norm", &format!("{name}_normed"), inputs)?;
        let inputs = [
            ("x", (&normed).into()),
            ("begin", vec![0i64; rank].into()),
            ("end", at(n as i64, 0).into()),
            ("begin_mask", vec![true; rank].into()),
            ("end_mask", at(0, 1).iter().map(|n| *n == 1).collect::<Vec<bool>>().into()),
        ];
        let half = b.op("slice_by_index", &format!("{name}_half"), inputs)?;
        // Weights can be large: the factor comes first.
        let half = self.times(b, &format!("{name}_scaled"), half, factor)?;
        let weight = b.vector(&format!("{name}.weight"), &along(axis, rank, n))?;
        b.mul(name, &half, &weight)
    }
}

/// The size along an axis, which has to be known.
fn size(x: &Value, axis: i64) -> Result<u64> {
    let dim = usize::try_from(axis).ok().and_then(|axis| x.dims().get(axis));
    dim.and_then(|d| d.known()).ok_or_else(|| Error::misuse(format!("{} has no known axis {axis}", x.ty())))
}

/// The shape of a vector that goes along an axis: `[n]` along the last one, `[n, 1, ..]` before others.
fn along(axis: i64, rank: usize, n: u64) -> Vec<u64> {
    (axis..rank as i64).map(|i| if i == axis { n } else { 1 }).collect()
}
