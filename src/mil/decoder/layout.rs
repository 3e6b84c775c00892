//! All in which the two layouts differ, but for attention.

use super::super::builder::{Builder, Value};
use super::super::types::Dim;
use super::super::weight::Encoded;
use super::{Graph, Layout};
use crate::error::{Error, Result};

impl Graph<'_> {
    /// The axis of the channels.
    pub(super) fn axis(&self) -> i64 {
        match self.target.layout {
            Layout::Rows => 2,
            Layout::Channels { .. } => 1,
        }
    }

    /// From `[1, tokens, width]` to this layout.
    pub(super) fn channels(&self, b: &mut Builder<'_>, x: &Value) -> Result<Value> {
        match self.target.layout {
            Layout::Rows => Ok(x.clone()),
            Layout::Channels { .. } => {
                let turned = b.transpose("channels", x, [0, 2, 1])?;
                b.expand_dims("channels", &turned, [2])
            }
        }
    }

    /// From this layout to `[1, tokens, width]`.
    pub(super) fn rows(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        match self.target.layout {
            Layout::Rows => Ok(x.clone()),
            Layout::Channels { .. } => {
                let flat = b.squeeze(&format!("{name}_flat"), x, [2])?;
                b.transpose(&format!("{name}_rows"), &flat, [0, 2, 1])
            }
        }
    }

    /// The product with the matrix `{stem}.weight`, with `{stem}.bias` added where there is one.
    pub(super) fn project(&self, b: &mut Builder<'_>, stem: &str, name: &str, x: &Value) -> Result<Value> {
        match self.target.layout {
            Layout::Rows => self.linear(b, stem, name, x),
            Layout::Channels { .. } => {
                let kernels = b.encoded(&format!("{stem}.weight"))?.kernels()?;
                product(b, "conv", stem, name, x, &kernels, &[1, kernels.shape[0], 1, 1])
            }
        }
    }

    /// The same for `[1, tokens, width]` in either layout.
    pub(super) fn linear(&self, b: &mut Builder<'_>, stem: &str, name: &str, x: &Value) -> Result<Value> {
        let matrix = b.encoded(&format!("{stem}.weight"))?;
        let [outputs, _] = matrix.shape[..] else {
            return Err(Error::misuse(format!("weight {}: {:?} is no matrix", matrix.name, matrix.shape)));
        };
        product(b, "linear", stem, name, x, &matrix, &[outputs])
    }

    /// Heads of a projection: `[1, heads, tokens, head_dim]` in rows, `[1, heads, head_dim, tokens]` in channels.
    pub(super) fn heads(&self, b: &mut Builder<'_>, name: &str, x: &Value, heads: usize) -> Result<Value> {
        let (heads, dim) = (heads as i64, self.model.head_dim as i64);
        if x.dims()[self.axis() as usize] != Dim::Known((heads * dim) as u64) {
            return Err(Error::misuse(format!(
                "{} of type {} is not {heads} heads of {dim}",
                x.name(),
                x.ty()
            )));
        }
        let name = format!("{name}_heads");
        match self.target.layout {
            Layout::Rows => {
                let x = b.reshape(&name, x, [1, -1, heads, dim])?;
                b.transpose(&name, &x, [0, 2, 1, 3])
            }
            Layout::Channels { tokens } => b.reshape(&name, x, [1, heads, dim, tokens as i64]),
        }
    }

    /// The axis of a head's elements.
    pub(super) fn head_axis(&self) -> i64 {
        match self.target.layout {
            Layout::Rows => 3,
            Layout::Channels { .. } => 2,
        }
    }

    /// Heads as attention takes them: `[1, heads, tokens, head_dim]`.
    pub(super) fn turned(&self, b: &mut Builder<'_>, name: &str, x: Value) -> Result<Value> {
        match self.target.layout {
            Layout::Rows => Ok(x),
            Layout::Channels { .. } => b.transpose(&format!("{name}_turned"), &x, [0, 1, 3, 2]),
        }
    }

    /// What attention gave, `[1, heads, tokens, head_dim]`, one head behind the other.
    pub(super) fn join(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        let width = (self.model.heads * self.model.head_dim) as i64;
        match self.target.layout {
            Layout::Rows => {
                let x = b.transpose(name, x, [0, 2, 1, 3])?;
                b.reshape(name, &x, [1, -1, width])
            }
            Layout::Channels { tokens } => {
                let x = b.transpose(name, x, [0, 1, 3, 2])?;
                b.reshape(name, &x, [1, width, 1, tokens as i64])
            }
        }
    }
}

/// `linear` or `conv`; `outputs` is the shape of what is multiplied to, or added to, its result.
fn product(
    b: &mut Builder<'_>,
    kind: &'static str,
    stem: &str,
    name: &str,
    x: &Value,
    weight: &Encoded,
    outputs: &[u64],
) -> Result<Value> {
    let values = b.decode(weight)?;
    let mut inputs = vec![("x", x.into()), ("weight", (&values).into())];
    let bias = format!("{stem}.bias");
    if weight.after.is_none() {
        let bias = if b.has(&bias) { Some(b.vector(&bias, &weight.shape[..1])?) } else { None };
        inputs.extend(bias.as_ref().map(|bias| ("bias", bias.into())));
        return b.op(kind, name, inputs);
    }
    let product = b.op(kind, name, inputs)?;
    b.after(&bias, name, product, weight, outputs)
}

impl Builder<'_> {
    /// The weight of this name, which is not compressed, in another shape.
    pub(super) fn vector(&mut self, name: &str, shape: &[u64]) -> Result<Value> {
        let encoded = self.encoded(name)?.reshaped(shape)?;
        self.decode(&encoded)
    }

    /// What follows a product: the factors of its weight, and the bias of this name, where there are any.
    pub(super) fn after(
        &mut self,
        bias: &str,
        name: &str,
        mut product: Value,
        weight: &Encoded,
        shape: &[u64],
    ) -> Result<Value> {
        if let Some(factors) = &weight.after {
            let factors = self.factors(weight, factors, shape)?;
            product = self.mul(&format!("{name}_scaled"), &product, &factors)?;
        }
        if self.has(bias) {
            let bias = self.vector(bias, shape)?;
            product = self.add(&format!("{name}_biased"), &product, &bias)?;
        }
        Ok(product)
    }
}
