//! Attention.

use super::super::builder::{Builder, Value};
use super::cache::Cache;
use super::positions::Places;
use super::{Graph, Layout};
use crate::arch::Positions;
use crate::error::Result;

impl Graph<'_> {
    /// What a layer's tokens take from all that they see.
    pub(super) fn attention(
        &self,
        b: &mut Builder<'_>,
        layer: usize,
        x: &Value,
        places: &Places,
        cache: &mut Cache,
    ) -> Result<Value> {
        let (heads, kv_heads) = (self.model.heads, self.model.kv_heads);
        let [q, k, v] = self.queries_keys_values(b, x)?;
        let q = self.placed(b, layer, "attn_q", &q, heads, places)?;
        let k = self.placed(b, layer, "attn_k", &k, kv_heads, places)?;
        let v = self.heads(b, "attn_v", &v, kv_heads)?;
        let k = self.turned(b, "attn_k", k)?;
        let v = self.turned(b, "attn_v", v)?;
        let [k, v] = cache.update(b, layer, [&k, &v], places)?;
        let q = self.turned(b, "attn_q", q)?;
        let mask = places.mask_of(self, layer);
        let attended = match self.target.layout {
            Layout::Rows => {
                let k = self.repeated(b, "keys", k)?;
                let v = self.repeated(b, "values", v)?;
                match self.model.score_softcap.is_some() || b.has("attn_sinks.weight") {
                    false => self.fused(b, &q, &k, &v, mask)?,
                    true => {
                        let q = self.times(b, "attn_q_scaled", q, self.model.scale)?;
                        let scores = b.matmul_transposed("scores", &q, &k)?;
                        let shares = self.shares(b, scores, mask, [1, heads as u64])?;
                        b.matmul("attended", &shares, &v)?
                    }
                }
            }
            Layout::Channels { tokens } => self.grouped(b, q, [&k, &v], mask, tokens)?,
        };
        let attended = self.join(b, "attended_joined", &attended)?;
        self.project(b, "attn_output", "attn_output", &attended)
    }

    fn queries_keys_values(&self, b: &mut Builder<'_>, x: &Value) -> Result<[Value; 3]> {
        if !b.has("attn_qkv.weight") {
            let mut one = |name: &str| self.project(b, name, name, x);
            return Ok([one("attn_q")?, one("attn_k")?, one("attn_v")?]);
        }
        let joined = self.project(b, "attn_qkv", "attn_qkv", x)?;
        let width = |heads: usize| (heads * self.model.head_dim) as i64;
        let (queries, keys) = (width(self.model.heads), width(self.model.kv_heads));
        b.split(["attn_q", "attn_k", "attn_v"], &joined, [queries, keys, keys], self.axis())
    }

    /// Heads with their norm, where there is one, and rotated, where the layer does so.
    fn placed(
        &self,
        b: &mut Builder<'_>,
        layer: usize,
        name: &str,
        x: &Value,
        heads: usize,
        places: &Places,
    ) -> Result<Value> {
        let mut x = self.heads(b, name, x, heads)?;
        let norm = format!("{name}_norm");
        if b.has(&format!("{norm}.weight")) {
            x = self.normed(b, &norm, &x, self.head_axis(), self.model.eps, 1.0)?;
        }
        match places.rotation_of(self, layer) {
            Some(rotation) => self.rotated(b, name, x, rotation),
            None => Ok(x),
        }
    }

    /// Pairs of elements, one of the first half and one of the second, turned by an angle for each: `x cos + (-b, a)
    /// sin` for `x = (a, b)`. What lies behind the elements that are rotated stays.
    fn rotated(&self, b: &mut Builder<'_>, name: &str, x: Value, rotation: &[Value; 2]) -> Result<Value> {
        let (axis, head_dim) = (self.head_axis(), self.model.head_dim as i64);
        let dim = match &self.model.positions {
            Positions::Rope { dim, .. } => *dim as i64,
            Positions::Learned | Positions::None => head_dim,
        };
        let named = |what: &str| format!("{name}_{what}");
        let (x, rest) = match dim < head_dim {
            true => {
                let names = [&*named("turning"), &*named("resting")];
                let [x, rest] = b.split(names, &x, [dim, head_dim - dim], axis)?;
                (x, Some(rest))
            }
            false => (x, None),
        };
        let names = [&*named("first"), &*named("second")];
        let [first, second] = b.split(names, &x, [dim / 2, dim / 2], axis)?;
        let negative = b.mul(&named("negative"), &second, -1.0)?;
        let turned = b.concat(&named("swapped"), [&negative, &first], axis)?;
        let [cos, sin] = rotation;
        let along = b.mul(&named("cos"), &x, cos)?;
        let across = b.mul(&named("sin"), &turned, sin)?;
        let rotated = b.add(&named("rotated"), &along, &across)?;
        match rest {
            Some(rest) => b.concat(&named("whole"), [&rotated, &rest], axis),
            None => Ok(rotated),
        }
    }

    /// Each head of keys or values `[1, kv_heads, keys, head_dim]` as often as queries share it.
    fn repeated(&self, b: &mut Builder<'_>, name: &str, x: Value) -> Result<Value> {
        let (heads, kv_heads) = (self.model.heads as i64, self.model.kv_heads as i64);
        if heads == kv_heads {
            return Ok(x);
        }
        let x = b.expand_dims(&format!("{name}_apart"), &x, [2])?;
        let x = b.tile(&format!("{name}_tiled"), &x, [1, 1, heads / kv_heads, 1, 1])?;
        b.reshape(&format!("{name}_repeated"), &x, [1, heads, -1, self.model.head_dim as i64])
    }

    /// Attention as one operation, which scales by `1 / sqrt(head_dim)` itself.
    fn fused(
        &self,
        b: &mut Builder<'_>,
        q: &Value,
        k: &Value,
        v: &Value,
        mask: Option<&Value>,
    ) -> Result<Value> {
        let ratio = f64::from(self.model.scale) * (self.model.head_dim as f64).sqrt();
        let is_plain = (ratio - 1.0).abs() < 1e-6;
        let q = self.times(b, "attn_q_scaled", q.clone(), if is_plain { 1.0 } else { ratio as f32 })?;
        let mut inputs = vec![("query", (&q).into()), ("key", k.into()), ("value", v.into())];
        inputs.extend(mask.map(|mask| ("attn_mask", mask.into())));
        b.op("scaled_dot_product_attention", "attended", inputs)
    }

    /// Attention where queries that share keys lie one behind the other, so that nothing is repeated: queries
    /// `[1, heads, tokens, head_dim]`, keys and values `[1, kv_heads, context, head_dim]`.
    fn grouped(
        &self,
        b: &mut Builder<'_>,
        q: Value,
        [k, v]: [&Value; 2],
        mask: Option<&Value>,
        tokens: u64,
    ) -> Result<Value> {
        let (heads, kv_heads) = (self.model.heads as i64, self.model.kv_heads as i64);
        let (dim, context, tokens) = (self.model.head_dim as i64, self.target.context as i64, tokens as i64);
        let group = heads / kv_heads;
        let q = self.times(b, "attn_q_scaled", q, self.model.scale)?;
        let q = match group {
            1 => q,
            _ => b.reshape("attn_q_grouped", &q, [1, kv_heads, group * tokens, dim])?,
        };
        let mut scores = b.matmul_transposed("scores", &q, k)?;
        if group > 1 {
            scores = b.reshape("scores_apart", &scores, [kv_heads, group, tokens, context])?;
        }
        let outer = if group > 1 { [kv_heads, group] } else { [1, heads] };
        let mut shares = self.shares(b, scores, mask, outer.map(|n| n as u64))?;
        if group > 1 {
            shares = b.reshape("shares_grouped", &shares, [1, kv_heads, group * tokens, context])?;
        }
        let attended = b.matmul("attended", &shares, v)?;
        match group {
            1 => Ok(attended),
            _ => b.reshape("attended_apart", &attended, [1, heads, tokens, dim]),
        }
    }

    /// What each key gets, of scores `[.., tokens, keys]` whose first two dimensions are `heads`. A sink is one key
    /// more of each head that takes a share and gives nothing.
    fn shares(
        &self,
        b: &mut Builder<'_>,
        scores: Value,
        mask: Option<&Value>,
        heads: [u64; 2],
    ) -> Result<Value> {
        let mut scores = self.capped(b, "scores", scores, self.model.score_softcap)?;
        if let Some(mask) = mask {
            scores = b.add("scores_masked", &scores, mask)?;
        }
        if !b.has("attn_sinks.weight") {
            return b.softmax("shares", &scores, -1);
        }
        let sinks = b.vector("attn_sinks.weight", &[heads[0], heads[1], 1, 1])?;
        // Repeated for each token: what is added to is a column of zeros of that size.
        let largest = b.max("sink_largest", &scores, [-1])?;
        let zeros = b.mul("sink_zeros", &largest, 0.0)?;
        let column = b.add("sink_column", &zeros, &sinks)?;
        let scores = b.concat("scores_sunk", [&scores, &column], -1)?;
        let shares = b.softmax("shares_sunk", &scores, -1)?;
        let inputs = [
            ("x", (&shares).into()),
            ("begin", [0; 4].into()),
            ("end", [0, 0, 0, -1].into()),
            ("begin_mask", [true; 4].into()),
            ("end_mask", [true, true, true, false].into()),
        ];
        b.op("slice_by_index", "shares", inputs)
    }
}
