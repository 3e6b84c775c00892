//! Norms.

use super::super::builder::{Builder, Value};
use super::Graph;
use crate::arch::Norm;
use crate::error::{Error, Result};

impl Graph<'_> {
    /// The norm of the stream that is called so, over the channels.
    pub(super) fn norm(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        match self.model.norm {
            Norm::Rms => self.rms_norm(b, name, x, self.axis()),
            Norm::Layer => self.layer_norm(b, name, x),
        }
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the channels.
    fn layer_norm(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        let axis = self.axis();
        let shape = along(axis, x.dims().len(), size(x, axis)?);
        let inputs = [("x", x.into()), ("axes", [axis].into()), ("epsilon", self.model.eps.into())];
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

    /// `x / sqrt(mean(x^2) + eps) * weight` along an axis.
    ///
    /// As half of the layer norm of `x` and `-x`, whose mean is 0 and whose variance is `mean(x^2)`: squares of their
    /// own would exceed float16 from 256 on.
    pub(super) fn rms_norm(&self, b: &mut Builder<'_>, name: &str, x: &Value, axis: i64) -> Result<Value> {
        let n = size(x, axis)?;
        let rank = x.dims().len();
        let at = |here: i64, elsewhere: i64| -> Vec<i64> {
            (0..rank as i64).map(|i| if i == axis { here } else { elsewhere }).collect()
        };
        let negative = b.mul(&format!("{name}_negative"), x, -1.0)?;
        let both = b.concat(&format!("{name}_both"), [x, &negative], axis)?;
        let inputs = [("x", (&both).into()), ("axes", [axis].into()), ("epsilon", self.model.eps.into())];
        let normed = b.op("layer_norm", &format!("{name}_normed"), inputs)?;
        let inputs = [
            ("x", (&normed).into()),
            ("begin", vec![0i64; rank].into()),
            ("end", at(n as i64, 0).into()),
            ("begin_mask", vec![true; rank].into()),
            ("end_mask", at(0, 1).iter().map(|n| *n == 1).collect::<Vec<bool>>().into()),
        ];
        let half = b.op("slice_by_index", &format!("{name}_half"), inputs)?;
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
