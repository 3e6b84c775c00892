//! The function of a language model: from token ids to logits, with a cache of keys and values.
//!
//! There are two layouts, which compute the same. Interfaces, shapes outermost dimension first:
//!
//! | | [`Layout::Rows`] | [`Layout::Channels`] |
//! |---|---|---|
//! | token ids | `inputIds` int32 `[1, tokens]` | `input_ids` int32 `[1, tokens]` |
//! | where they stand | the last ones of the mask's keys | `position_ids` int32 `[tokens]`, `current_pos` int32 `[1]`, the first one's |
//! | what they see | `causalMask` fp16 `[1, 1, tokens or 1, keys]`, added; later keys are hidden in any case | `causal_mask` fp16 `[1, 1, tokens, context]`, added |
//! | states | `keyCache`, `valueCache` fp16 `[layers, 1, kv_heads, context, head_dim]` | `model_model_kv_cache_0` fp16 `[2 layers, kv_heads, context, head_dim]`, keys before values |
//! | result | `logits` fp16 `[1, tokens, vocabulary]` | `logits1`, `logits2`, .. fp16 `[1, tokens, part of the vocabulary]` |
//!
//! The first is that of swift-transformers (`LanguageModel.swift`), the second that of ANEMLL (`llama_converter.py`).
//! Between parts goes `hidden_states` fp16 `[1, tokens, width]`; what layers make of it is `output_hidden_states`.

mod attention;
mod cache;
mod experts;
mod feed_forward;
mod layout;
mod norm;
mod positions;

use std::ops::Range;

use super::builder::{Builder, Built, Value};
use super::types::Dim;
use super::weight::Weights;
use crate::arch::{Decoder, Positions};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};
use cache::Cache;
pub use norm::LEAST_EPS;
use positions::Places;

/// What goes between parts.
const HIDDEN: &str = "hidden_states";

/// What a function is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// How activations lie.
    pub layout: Layout,
    /// How many tokens the cache holds.
    pub context: u64,
    /// Into how many parts the head is divided: `output.0.weight`, `output.1.weight`, ..; 1: it is not.
    pub vocab_split: usize,
}

/// How activations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[1, tokens, width]`, multiplied with matrices: any number of tokens, fused attention. For GPUs.
    Rows,
    /// `[1, width, 1, tokens]`, multiplied with kernels of 1 by 1: every size is known. For the Neural Engine.
    Channels {
        /// How many tokens there are.
        tokens: u64,
    },
}

/// Which part of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// Token ids to hidden states.
    Embedding,
    /// These layers, with a cache of their own.
    Layers(Range<usize>),
    /// The last norm, and logits.
    Head,
}

/// The function of a model, or of a part.
///
/// # Errors
/// `Unsupported` where the model lacks a tensor that the graph asks for; `Misuse` where shapes do not go together, for
/// layers that are not there, and for sizes that do not fit each other.
pub fn decoder(decoder: &Decoder, weights: &dyn Weights, target: &Target, part: Part) -> Result<Built> {
    check(decoder, target, &part)?;
    let graph = Graph { model: decoder, target };
    let mut b = Builder::new(weights);
    let layers = match &part {
        Part::Whole => 0..decoder.layers,
        Part::Layers(range) => range.clone(),
        Part::Embedding | Part::Head => 0..0,
    };
    let from_ids = matches!(part, Part::Whole | Part::Embedding);
    let input = graph.input(&mut b, from_ids)?;
    let is_placed = !layers.is_empty() || (from_ids && decoder.positions == Positions::Learned);
    let places = if is_placed { Some(Places::new(&graph, &mut b, &input, &layers)?) } else { None };
    let mut x = if from_ids { graph.embed(&mut b, &input, places.as_ref())? } else { input };
    if let Some(places) = places.as_ref().filter(|_| !layers.is_empty()) {
        let mut cache = Cache::new(&graph, &mut b, &layers)?;
        x = graph.channels(&mut b, &x)?;
        for i in layers {
            x = b.within(&format!("blk.{i}."), |b| graph.layer(b, i, &x, places, &mut cache))?;
        }
        if !matches!(part, Part::Whole) {
            x = graph.rows(&mut b, "hidden", &x)?;
        }
    } else if matches!(part, Part::Whole | Part::Head) {
        x = graph.channels(&mut b, &x)?;
    }
    match part {
        Part::Embedding => b.finish(&[(HIDDEN, &x)]),
        Part::Layers(_) => b.finish(&[("output_hidden_states", &x)]),
        Part::Whole | Part::Head => {
            let logits = graph.head(&mut b, &x)?;
            let outputs: Vec<(&str, &Value)> = logits.iter().map(|(name, value)| (&**name, value)).collect();
            b.finish(&outputs)
        }
    }
}

fn check(decoder: &Decoder, target: &Target, part: &Part) -> Result<()> {
    let misuse = |what: String| Err(Error::misuse(format!("the graph: {what}")));
    let Decoder { layers, heads, kv_heads, head_dim, .. } = *decoder;
    if kv_heads == 0 || heads % kv_heads != 0 || head_dim == 0 {
        return misuse(format!("{heads} heads of {head_dim} share {kv_heads} heads of keys"));
    }
    if decoder.windows.len() != layers {
        return misuse(format!("{} windows of {layers} layers", decoder.windows.len()));
    }
    if let Positions::Rope { dim, tables, of_layer } = &decoder.positions {
        let fits = of_layer.len() == layers && of_layer.iter().all(|t| *t < tables.len());
        if !fits || *dim == 0 || *dim > head_dim || dim % 2 != 0 {
            return misuse(format!("rotations of {dim} elements, {} tables", tables.len()));
        }
    }
    match part {
        Part::Layers(range) if range.is_empty() || range.end > layers => {
            return misuse(format!("layers {range:?} of {layers}"));
        }
        Part::Whole if layers == 0 => return misuse("no layers".into()),
        _ => {}
    }
    let tokens = match target.layout {
        Layout::Rows => 1,
        Layout::Channels { tokens } => tokens,
    };
    if tokens == 0 || tokens > target.context || target.vocab_split == 0 {
        return misuse(format!(
            "{tokens} tokens at once, {} in the cache, {} parts of the vocabulary",
            target.context, target.vocab_split
        ));
    }
    Ok(())
}

/// What all parts of a graph depend on.
#[derive(Clone, Copy)]
struct Graph<'a> {
    model: &'a Decoder,
    target: &'a Target,
}

impl Graph<'_> {
    /// Token ids `[1, tokens]`, or hidden states `[1, tokens, width]`.
    fn input(&self, b: &mut Builder<'_>, ids: bool) -> Result<Value> {
        let (tokens, name) = match self.target.layout {
            Layout::Rows => (b.any(), "inputIds"),
            Layout::Channels { tokens } => (Dim::Known(tokens), "input_ids"),
        };
        match ids {
            true => b.input(name, DataType::Int32, &[Dim::Known(1), tokens]),
            false => {
                let width = Dim::Known(self.model.width as u64);
                b.input(HIDDEN, DataType::Float16, &[Dim::Known(1), tokens, width])
            }
        }
    }

    /// Embeddings `[1, tokens, width]`, with positions where these are learned.
    fn embed(&self, b: &mut Builder<'_>, ids: &Value, places: Option<&Places>) -> Result<Value> {
        let table = b.encoded("token_embd.weight")?;
        let weight = b.decode(&table)?;
        let mut x = b.gather("embedding", &weight, ids, 0)?;
        if let Some(scale) = &table.after {
            let scales = b.factors(&table, scale, &[table.shape[0], 1])?;
            let scale = b.gather("embedding_scale", &scales, ids, 0)?;
            x = b.mul("embedding", &x, &scale)?;
        }
        x = self.times(b, "embedding_scaled", x, self.model.embedding_scale * self.model.stream)?;
        if let (Positions::Learned, Some(places)) = (&self.model.positions, places) {
            let table = b.encoded("position_embd.weight")?;
            let weight = b.decode(&table)?;
            let at = b.gather("position_embedding", &weight, &places.positions, 0)?;
            let at = self.times(b, "position_embedding_scaled", at, self.model.stream)?;
            x = b.add("embedding_placed", &x, &at)?;
        }
        Ok(x)
    }

    /// One layer.
    fn layer(
        &self,
        b: &mut Builder<'_>,
        i: usize,
        x: &Value,
        places: &Places,
        cache: &mut Cache,
    ) -> Result<Value> {
        let model = self.model;
        let h = self.norm(b, &model.attn_norm, x)?;
        let attended = self.attention(b, i, &h, places, cache)?;
        // gpt-oss has the norm before the feed-forward under this name.
        let post = Some("post_attention_norm").filter(|name| *name != model.ffn_norm);
        let attended = self.added(b, "attn_residual", post, attended)?;
        let after_attention = b.add("attn_sum", x, &attended)?;
        let norms_own = b.has(&format!("{}.weight", model.ffn_norm));
        let h = match model.parallel {
            true if norms_own => self.norm(b, &model.ffn_norm, x)?,
            true => h,
            false => self.norm(b, &model.ffn_norm, &after_attention)?,
        };
        let fed = self.feed_forward(b, &h)?;
        let fed = self.added(b, "ffn_residual", Some("post_ffw_norm"), fed)?;
        b.add("sum", &after_attention, &fed)
    }

    /// What a sublayer adds to the stream: what it gave, behind the norm of this name where there is one.
    fn added(&self, b: &mut Builder<'_>, name: &str, norm: Option<&str>, x: Value) -> Result<Value> {
        let Decoder { eps, residual, stream, .. } = *self.model;
        match norm.filter(|norm| b.has(&format!("{norm}.weight"))) {
            Some(norm) => self.normed(b, norm, &x, self.axis(), eps, residual * stream),
            None => self.times(b, name, x, residual * stream),
        }
    }

    /// Logits, in parts where the vocabulary is divided, with the names of the outputs.
    fn head(&self, b: &mut Builder<'_>, x: &Value) -> Result<Vec<(String, Value)>> {
        let x = self.norm(b, "output_norm", x)?;
        let parts = self.target.vocab_split;
        let stems: Vec<String> = match parts {
            1 if b.has("output.weight") => vec!["output".into()],
            1 => vec!["token_embd".into()],
            _ => (0..parts).map(|j| format!("output.{j}")).collect(),
        };
        let mut outputs = Vec::with_capacity(parts);
        for (j, stem) in stems.iter().enumerate() {
            let logits = self.project(b, stem, &format!("head.{j}"), &x)?;
            let logits = self.rows(b, &format!("head.{j}"), &logits)?;
            let logits = self.times(b, &format!("head.{j}_scaled"), logits, self.model.logit_scale)?;
            let logits = self.capped(b, &format!("head.{j}"), logits, self.model.logit_softcap)?;
            let name = match self.target.layout {
                Layout::Rows if parts == 1 => "logits".into(),
                _ => format!("logits{}", j + 1),
            };
            outputs.push((name, logits));
        }
        Ok(outputs)
    }

    /// `x factor`.
    fn times(&self, b: &mut Builder<'_>, name: &str, x: Value, factor: f32) -> Result<Value> {
        if factor == 1.0 { Ok(x) } else { b.mul(name, &x, factor) }
    }

    /// `tanh(x / cap) cap`.
    fn capped(&self, b: &mut Builder<'_>, name: &str, x: Value, cap: Option<f32>) -> Result<Value> {
        let Some(cap) = cap else { return Ok(x) };
        let x = b.div(&format!("{name}_uncapped"), &x, cap)?;
        let x = b.tanh(&format!("{name}_tanh"), &x)?;
        b.mul(&format!("{name}_capped"), &x, cap)
    }
}
