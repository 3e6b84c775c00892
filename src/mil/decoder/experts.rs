//! Experts. All of them are computed for every token, and weighed by zeros where they were not chosen: whether Core ML
//! can take single experts out of a compressed weight is not known.

use super::super::builder::{Builder, Value};
use super::Graph;
use crate::arch::{Clamp, Ffn, Router};
use crate::error::{Error, Result};

impl Graph<'_> {
    /// The feed-forward of a layer of experts.
    pub(super) fn experts(&self, b: &mut Builder<'_>, x: &Value) -> Result<Value> {
        let Ffn::Experts { clamp, .. } = self.model.ffn else {
            return Err(Error::misuse("the feed-forward has no experts"));
        };
        let x = self.rows(b, "ffn_in", x)?;
        let gates = self.gates(b, &x)?;
        let gate = expert(b, "ffn_gate_exps", &x)?;
        let up = expert(b, "ffn_up_exps", &x)?;
        let inner = match clamp {
            Some(clamp) => clamped(b, &gate, &up, clamp)?,
            None => self.gated(b, &gate, &up)?,
        };
        let down = expert(b, "ffn_down_exps", &inner)?;
        let weighed = b.mul("ffn_weighed", &down, &gates)?;
        let sum = b.sum("ffn_sum", &weighed, [0])?;
        self.channels(b, &sum)
    }

    /// What each expert's result is multiplied by, `[experts, tokens, 1]`, of `[1, tokens, width]`.
    fn gates(&self, b: &mut Builder<'_>, x: &Value) -> Result<Value> {
        let Ffn::Experts { count, used, router, norm, .. } = self.model.ffn else {
            return Err(Error::misuse("the feed-forward has no experts"));
        };
        let logits = self.linear(b, "ffn_gate_inp", "router", x)?;
        if logits.dims().last().and_then(|d| d.known()) != Some(count as u64) {
            return Err(Error::misuse(format!(
                "the router gives {}, there are {count} experts",
                logits.ty()
            )));
        }
        let scores = match router {
            Router::TopkSoftmax => logits.clone(),
            Router::SoftmaxTopk => b.softmax("router_shares", &logits, -1)?,
            Router::SigmoidTopk => b.sigmoid("router_shares", &logits)?,
        };
        let inputs = [
            ("x", (&scores).into()),
            ("k", (used as i64).into()),
            ("axis", (-1).into()),
            ("ascending", false.into()),
            ("sort", true.into()),
            ("return_indices", true.into()),
            ("output_indices_dtype", "int32".into()),
        ];
        let [mut chosen, places] = b.ops("topk", ["router_chosen", "router_places"], inputs)?;
        if router == Router::TopkSoftmax {
            chosen = b.softmax("router_softmax", &chosen, -1)?;
        }
        if norm {
            let sum = b.sum("router_sum", &chosen, [-1])?;
            chosen = b.div("router_normed", &chosen, &sum)?;
        }
        let zeros = b.mul("router_zeros", &logits, 0.0)?;
        let inputs = [
            ("data", (&zeros).into()),
            ("indices", (&places).into()),
            ("updates", (&chosen).into()),
            ("axis", (-1).into()),
            ("mode", "update".into()),
            ("validate_indices", false.into()),
        ];
        let gates = b.op("scatter_along_axis", "router_gates", inputs)?;
        b.transpose("gates", &gates, [2, 1, 0])
    }
}

/// `[1 or experts, tokens, in]` times the matrices `[experts, out, in]`: `[experts, tokens, out]`.
fn expert(b: &mut Builder<'_>, stem: &str, x: &Value) -> Result<Value> {
    let weight = b.encoded(&format!("{stem}.weight"))?;
    let [experts, outputs, _] = weight.shape[..] else {
        return Err(Error::misuse(format!("weight {}: {:?} are no experts", weight.name, weight.shape)));
    };
    let values = b.decode(&weight)?;
    let product = b.matmul_transposed(stem, x, &values)?;
    b.after(&format!("{stem}.bias"), stem, product, &weight, &[experts, 1, outputs])
}

/// gpt-oss's activation: `g = min(g, limit)`, `u = clamp(u)`, `(u + 1) g sigmoid(alpha g)`.
fn clamped(b: &mut Builder<'_>, gate: &Value, up: &Value, clamp: Clamp) -> Result<Value> {
    let gate = b.minimum("ffn_gate_clamped", gate, clamp.limit)?;
    let up = b.clip("ffn_up_clamped", up, -clamp.limit, clamp.limit)?;
    let slope = b.mul("ffn_gate_slope", &gate, clamp.alpha)?;
    let share = b.sigmoid("ffn_gate_share", &slope)?;
    let gate = b.mul("ffn_act", &gate, &share)?;
    let up = b.add("ffn_up_one", &up, 1.0)?;
    b.mul("ffn_gated", &up, &gate)
}
