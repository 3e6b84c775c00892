//! Keys and values of all tokens so far.

use std::ops::Range;

use super::super::builder::{Arg, Builder, Value};
use super::super::state::State;
use super::positions::Places;
use super::{Graph, Layout};
use crate::error::Result;

/// The cache of some layers. A state's first dimension counts its rows: one for each layer and, where keys and values
/// share a state, those of the values behind those of the keys.
pub(super) struct Cache {
    /// The first layer.
    first: usize,
    layers: usize,
    heads: i64,
    context: i64,
    head_dim: i64,
    states: States,
}

enum States {
    /// `[layers, 1, kv_heads, context, head_dim]` each.
    Two { keys: State, values: State },
    /// `[2 layers, kv_heads, context, head_dim]`.
    One(State),
}

impl Cache {
    pub(super) fn new(graph: &Graph<'_>, b: &mut Builder<'_>, layers: &Range<usize>) -> Result<Self> {
        let count = layers.len() as u64;
        let (heads, dim) = (graph.model.kv_heads as u64, graph.model.head_dim as u64);
        let context = graph.target.context;
        let states = match graph.target.layout {
            Layout::Rows => {
                let shape = [count, 1, heads, context, dim];
                let keys = State::new(b, "keyCache", &shape)?;
                States::Two { keys, values: State::new(b, "valueCache", &shape)? }
            }
            Layout::Channels { .. } => {
                States::One(State::new(b, "model_model_kv_cache_0", &[2 * count, heads, context, dim])?)
            }
        };
        Ok(Self {
            first: layers.start,
            layers: layers.len(),
            heads: heads as i64,
            context: context as i64,
            head_dim: dim as i64,
            states,
        })
    }

    /// Puts a layer's keys and values `[1, kv_heads, tokens, head_dim]` to those that are there, and gives all of them:
    /// `[1, kv_heads, keys, head_dim]`. In channels that is the whole cache; the mask hides what is not filled.
    pub(super) fn update(
        &mut self,
        b: &mut Builder<'_>,
        layer: usize,
        new: [&Value; 2],
        places: &Places,
    ) -> Result<[Value; 2]> {
        let row = (layer - self.first) as i64;
        let (heads, context, dim) = (self.heads, self.context, self.head_dim);
        let [begin, end] = &places.bounds;
        match &mut self.states {
            States::Two { keys, values } => {
                let begin = place(b, "cache_begin", &[row, 0, 0], begin, 0)?;
                let end = place(b, "cache_end", &[row + 1, 1, heads], end, dim)?;
                let mut update = |name: &str, state: &mut State, new: &Value| {
                    let new = b.expand_dims(&format!("{name}_new"), new, [0])?;
                    state.write(b, &new, &begin, &end)?;
                    let all = state.read(b);
                    let inputs: [(&str, Arg<'_>); 6] = [
                        ("x", (&all).into()),
                        ("begin", [row, 0, 0, 0, 0].into()),
                        ("end", (&end).into()),
                        ("begin_mask", [false, true, true, true, true].into()),
                        ("end_mask", [false, true, true, false, true].into()),
                        ("squeeze_mask", [true, false, false, false, false].into()),
                    ];
                    b.op("slice_by_index", &format!("{name}_all"), inputs)
                };
                Ok([update("keys", keys, new[0])?, update("values", values, new[1])?])
            }
            States::One(state) => {
                let mut update = |name: &str, row: i64, new: &Value| {
                    let begin = place(b, &format!("{name}_begin"), &[row, 0], begin, 0)?;
                    let end = place(b, &format!("{name}_end"), &[row + 1, heads], end, dim)?;
                    state.write(b, new, &begin, &end)?;
                    let all = state.read(b);
                    b.slice(&format!("{name}_all"), &all, [row, 0, 0, 0], [row + 1, heads, context, dim])
                };
                let keys = update("keys", row, new[0])?;
                Ok([keys, update("values", self.layers as i64 + row, new[1])?])
            }
        }
    }
}

/// A place in a state: these, where the tokens are, and one more.
fn place(b: &mut Builder<'_>, name: &str, outer: &[i64], at: &Value, last: i64) -> Result<Value> {
    let outer = b.ints(outer)?;
    let last = b.ints(&[last])?;
    b.concat(name, [&outer, at, &last], 0)
}
