//! Feed-forwards.

use super::super::builder::{Builder, Value};
use super::Graph;
use crate::arch::{Activation, Ffn};
use crate::error::{Error, Result};

impl Graph<'_> {
    /// The feed-forward of a layer.
    pub(super) fn feed_forward(&self, b: &mut Builder<'_>, x: &Value) -> Result<Value> {
        let inner = match self.model.ffn {
            Ffn::Experts { .. } => return self.experts(b, x),
            Ffn::Gated => {
                let gate = self.project(b, "ffn_gate", "ffn_gate", x)?;
                let up = self.project(b, "ffn_up", "ffn_up", x)?;
                self.gated(b, &gate, &up)?
            }
            Ffn::Fused => {
                let both = self.project(b, "ffn_up", "ffn_gate_up", x)?;
                let axis = self.axis();
                let width = both.dims().get(axis as usize).and_then(|d| d.known()).unwrap_or_default();
                if width % 2 != 0 {
                    return Err(Error::misuse(format!("{} is no gate above as much", both.ty())));
                }
                let half = (width / 2) as i64;
                let [gate, up] = b.split(["ffn_gate", "ffn_up"], &both, [half, half], axis)?;
                self.gated(b, &gate, &up)?
            }
            Ffn::Plain => {
                let up = self.project(b, "ffn_up", "ffn_up", x)?;
                self.activated(b, "ffn_act", &up)?
            }
        };
        self.project(b, "ffn_down", "ffn_down", &inner)
    }

    /// `act(gate) up`.
    pub(super) fn gated(&self, b: &mut Builder<'_>, gate: &Value, up: &Value) -> Result<Value> {
        let gate = self.activated(b, "ffn_act", gate)?;
        b.mul("ffn_gated", &gate, up)
    }

    fn activated(&self, b: &mut Builder<'_>, name: &str, x: &Value) -> Result<Value> {
        match self.model.activation {
            Activation::Silu => b.silu(name, x),
            Activation::Gelu => b.gelu(name, x, "EXACT"),
            Activation::GeluTanh => b.gelu(name, x, "TANH_APPROXIMATION"),
        }
    }
}
