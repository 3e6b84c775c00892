//! Where tokens stand, what they see, and how they are rotated.

use std::collections::BTreeMap;
use std::ops::Range;

use super::super::builder::{Builder, Value};
use super::super::types::Dim;
use super::{Graph, Layout};
use crate::arch::Positions;
use crate::container::coreml::DataType;
use crate::error::Result;

/// What hides a key: more than any score, and twice as much is within float16.
const HIDDEN: f32 = -30000.0;

/// What layers need to know of the tokens' places.
pub(super) struct Places {
    /// Where each token stands: int32 `[tokens]`.
    pub(super) positions: Value,
    /// Where the first one stands, and where the next one will: int32 `[1]`.
    pub(super) bounds: [Value; 2],
    /// What is added to scores, `[1, 1, tokens, keys]` or such, by window.
    masks: BTreeMap<Option<u64>, Value>,
    /// Cosines and sines by table, as they go with heads.
    rotations: BTreeMap<usize, [Value; 2]>,
}

impl Places {
    /// For these layers. `tokens` has the tokens along its second axis.
    pub(super) fn new(
        graph: &Graph<'_>,
        b: &mut Builder<'_>,
        tokens: &Value,
        layers: &Range<usize>,
    ) -> Result<Self> {
        let one = Dim::Known(1);
        let context = graph.target.context;
        let (positions, keys, bounds, given) = match graph.target.layout {
            Layout::Rows => {
                let dims = [one, one, b.any(), b.any()];
                let given = b.input("causalMask", DataType::Float16, &dims)?;
                let size = |b: &mut Builder<'_>, name: &str, of: &Value, axis: i64| {
                    let shape = b.shape(&format!("{name}_shape"), of)?;
                    b.gather(name, &shape, axis, 0)
                };
                let count = size(b, "tokens", tokens, 1)?;
                let end = size(b, "keys", &given, 3)?;
                let past = b.sub("past", &end, &count)?;
                let positions = b.range("positions", &end, &past)?;
                let keys = b.range("key_positions", &end, 0)?;
                let bounds = [b.expand_dims("begin", &past, [0])?, b.expand_dims("end", &end, [0])?];
                (positions, Some(keys), bounds, given)
            }
            Layout::Channels { tokens } => {
                let n = Dim::Known(tokens);
                let positions = b.input("position_ids", DataType::Int32, &[n])?;
                let given = b.input("causal_mask", DataType::Float16, &[one, one, n, Dim::Known(context)])?;
                let begin = b.input("current_pos", DataType::Int32, &[one])?;
                let end = b.add("end", &begin, tokens as i64)?;
                (positions, None, [begin, end], given)
            }
        };
        let mut places = Self { positions, bounds, masks: BTreeMap::new(), rotations: BTreeMap::new() };
        for i in layers.clone() {
            let window = graph.window(i);
            if !places.masks.contains_key(&window) {
                let mask = places.mask(graph, b, &given, keys.as_ref(), window)?;
                places.masks.insert(window, mask);
            }
            if let Positions::Rope { of_layer, .. } = &graph.model.positions
                && let table = of_layer[i]
                && !places.rotations.contains_key(&table)
            {
                let cos = places.rotation(graph, b, &format!("rope_cos.{table}"))?;
                let sin = places.rotation(graph, b, &format!("rope_sin.{table}"))?;
                places.rotations.insert(table, [cos, sin]);
            }
        }
        Ok(places)
    }

    /// What a layer adds to its scores.
    pub(super) fn mask_of(&self, graph: &Graph<'_>, layer: usize) -> Option<&Value> {
        self.masks.get(&graph.window(layer))
    }

    /// Cosines and sines of a layer, where it rotates.
    pub(super) fn rotation_of(&self, graph: &Graph<'_>, layer: usize) -> Option<&[Value; 2]> {
        match &graph.model.positions {
            Positions::Rope { of_layer, .. } => self.rotations.get(&of_layer[layer]),
            Positions::Learned | Positions::None => None,
        }
    }

    /// What is given, and what lies behind a token (in rows, where the caller's mask may not say so) or before its
    /// window. No row is without a finite number, whatever is given.
    fn mask(
        &self,
        graph: &Graph<'_>,
        b: &mut Builder<'_>,
        given: &Value,
        keys: Option<&Value>,
        window: Option<u64>,
    ) -> Result<Value> {
        let name = window.map_or("mask".into(), |n| format!("mask_{n}"));
        let named = |what: &str| format!("{name}_{what}");
        let queries = b.expand_dims(&named("queries"), &self.positions, [1])?;
        let behind = match keys {
            Some(keys) => Some(b.less(&named("behind"), &queries, keys)?),
            None => None,
        };
        let before = match window {
            Some(window) => {
                let distance = match keys {
                    Some(keys) => b.sub(&named("distance"), &queries, keys)?,
                    None => {
                        let keys: Vec<i64> = (0..graph.target.context as i64).collect();
                        b.sub(&named("distance"), &queries, keys)?
                    }
                };
                Some(b.greater_equal(&named("before"), &distance, window as i64)?)
            }
            None => None,
        };
        let hidden = match (behind, before) {
            (Some(behind), Some(before)) => Some(b.logical_or(&named("hidden"), &behind, &before)?),
            (one, other) => one.or(other),
        };
        let sum = match hidden {
            Some(hidden) => {
                let hidden = b.cast(&named("number"), &hidden, "fp16")?;
                let hidden = b.mul(&named("own"), &hidden, HIDDEN)?;
                b.add(&named("sum"), given, &hidden)?
            }
            None => given.clone(),
        };
        b.maximum(&name, &sum, HIDDEN)
    }

    /// Rows of a table, `[tokens, dim]`; in channels `[dim, tokens]`.
    fn rotation(&self, graph: &Graph<'_>, b: &mut Builder<'_>, name: &str) -> Result<Value> {
        let table = b.encoded(name)?;
        let table = b.decode(&table)?;
        let rows = b.gather(&format!("{name}_rows"), &table, &self.positions, 0)?;
        match graph.target.layout {
            Layout::Rows => Ok(rows),
            Layout::Channels { .. } => b.transpose(&format!("{name}_columns"), &rows, [1, 0]),
        }
    }
}

impl Graph<'_> {
    /// How many tokens a layer sees, where that is fewer than there can be.
    fn window(&self, layer: usize) -> Option<u64> {
        self.model.windows[layer].filter(|n| *n < self.target.context)
    }
}
