//! `[graph]`: what a decoder computes, as expressions over one model's config.

use std::borrow::Borrow;
use std::collections::HashMap;

use indexmap::IndexMap;
use serde::{Deserialize, Deserializer};
use serde_json::{Value as Json, json};

use super::expr::{Expr, truth};
use super::graph::{Activation, Clamp, Decoder, Ffn, Norm, Positions, RopeSpec, Router};
use super::mapping::MAX_LAYERS;
use super::rope_table::Lengths;
use super::{Architecture, Model};
use crate::error::{Error, Result};

/// The keys; CONTRIBUTING.md says what each means.
const KEYS: &[&str] = &[
    "unless",
    "layers",
    "width",
    "context",
    "norm",
    "eps",
    "heads",
    "kv_heads",
    "head_dim",
    "scale",
    "score_softcap",
    "window",
    "windowed",
    "positions",
    "rope_dim",
    "rope_theta",
    "rope",
    "rope_sliding",
    "unrotated",
    "activation",
    "ffn",
    "attn_norm",
    "ffn_norm",
    "experts",
    "experts_used",
    "router",
    "router_norm",
    "clamp",
    "alpha",
    "parallel",
    "residual",
    "stream",
    "embedding_scale",
    "logit_scale",
    "logit_softcap",
    "tied",
];

/// Widths, and heads times their width.
const MAX_WIDTH: u64 = 1 << 20;
/// Positions of a graph.
const MAX_CONTEXT: u64 = 1 << 20;
const MAX_EXPERTS: u64 = 1 << 12;

/// Names of activations in config.json, which transformers' `ACT2FN` has.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
];

/// A key of `[graph]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey(&'static str);

impl<'de> Deserialize<'de> for GraphKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        KEYS.iter().find(|k| **k == name).map(|k| Self(k)).ok_or_else(|| {
            serde::de::Error::custom(format!("[graph] has no key `{name}`; it has {}", KEYS.join(", ")))
        })
    }
}

impl Borrow<str> for GraphKey {
    fn borrow(&self) -> &str {
        self.0
    }
}

impl Architecture {
    /// Whether the definition has a `[graph]`.
    pub fn has_graph(&self) -> bool {
        self.graph.is_some()
    }
}

impl Model {
    /// What the model computes, for a graph of `context` positions. It decides which frequencies RoPE has where these
    /// depend on the length, and whether a window is one.
    ///
    /// # Errors
    /// `Unsupported` where the definition has no `[graph]` (naming those that have), where its `unless` holds, or a
    /// value is none that a graph can have; `Malformed` for values that do not go together; `Limit` for absurd sizes.
    pub fn decoder(&self, context: u64) -> Result<Decoder> {
        let Some(graph) = &self.arch.graph else {
            let described = super::all()?.into_iter().filter(Architecture::has_graph);
            let names: Vec<String> = described.map(|a| a.name).collect();
            return Err(Error::unsupported(format!(
                "what {} computes is not described: formats/arch/{}.toml has no [graph]",
                self.arch.arch, self.arch.name
            ))
            .hint(format!("described are {}", names.join(", "))));
        };
        Reading { model: self, graph }.decoder(context)
    }

    /// Whether checkpoints of the model have no head of their own: as its `[graph]` says, which has the default of the
    /// class, or else its config.
    ///
    /// # Errors
    /// As expressions are evaluated.
    pub fn is_tied(&self) -> Result<bool> {
        match &self.arch.graph {
            Some(graph) if graph.contains_key("tied") => {
                Reading { model: self, graph }.value("tied").map(|tied| truth(&tied))
            }
            _ => Ok(self.config().get("tie_word_embeddings") == Some(&Json::Bool(true))),
        }
    }
}

/// Values of `[graph]` for one model.
struct Reading<'a> {
    model: &'a Model,
    graph: &'a IndexMap<GraphKey, Expr>,
}

impl Reading<'_> {
    fn decoder(&self, context: u64) -> Result<Decoder> {
        let unless = self.value("unless")?;
        if truth(&unless) {
            let why = unless.as_str().map_or_else(|| "its `unless` holds".to_string(), str::to_string);
            return Err(Error::unsupported(format!(
                "{}: [graph] does not describe this model: {why}",
                self.model.arch.name
            )));
        }
        if context == 0 || context > MAX_CONTEXT {
            return Err(Error::limit(format!(
                "a context of {context} tokens: 1 to {MAX_CONTEXT} are possible"
            )));
        }
        let layers = self.count("layers", MAX_LAYERS)?;
        let width = self.count("width", MAX_WIDTH)?;
        let heads = self.count("heads", MAX_WIDTH)?;
        let kv_heads = self.integer("kv_heads", MAX_WIDTH)?.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(self.wrong("kv_heads", &json!(kv_heads), &format!("a divisor of `heads` = {heads}")));
        }
        let head_dim = self.count("head_dim", MAX_WIDTH / heads as u64)?;
        let scale = self.number("scale")?.unwrap_or_else(|| 1.0 / (head_dim as f64).sqrt());
        let window = self.integer("window", u64::MAX)?.filter(|w| *w > 0);
        let windowed = self.truths("windowed", layers)?.unwrap_or_else(|| vec![window.is_some(); layers]);
        let seen = window.map(|w| w as u64).filter(|w| *w < context);
        Ok(Decoder {
            layers,
            width,
            heads,
            kv_heads,
            head_dim,
            norm: self.one_of("norm", &[("rms", Norm::Rms), ("layer", Norm::Layer)])?.unwrap_or(Norm::Rms),
            eps: self.positive("eps")?.ok_or_else(|| self.wrong("eps", &Json::Null, "a positive number"))?,
            scale: self.single("scale", scale)?,
            positions: self.positions(head_dim, context, &windowed)?,
            windows: windowed.iter().map(|w| seen.filter(|_| *w)).collect(),
            activation: self.one_of("activation", ACTIVATIONS)?.unwrap_or(Activation::Silu),
            ffn: self.ffn()?,
            attn_norm: self.text("attn_norm")?.unwrap_or_else(|| "attn_norm".into()),
            ffn_norm: self.text("ffn_norm")?.unwrap_or_else(|| "ffn_norm".into()),
            embedding_scale: self.positive("embedding_scale")?.unwrap_or(1.0),
            residual: self.positive("residual")?.unwrap_or(1.0),
            stream: self.positive("stream")?.unwrap_or(1.0),
            parallel: truth(&self.value("parallel")?),
            logit_scale: self.positive("logit_scale")?.unwrap_or(1.0),
            logit_softcap: self.positive("logit_softcap")?,
            score_softcap: self.positive("score_softcap")?,
        })
    }

    fn positions(&self, head_dim: usize, context: u64, windowed: &[bool]) -> Result<Positions> {
        let own = self.integer("context", u64::MAX)?.map(|n| n as u64);
        match self.text("positions")?.as_deref() {
            None | Some("rope") => self.rope(head_dim, Lengths { model: own, context }, windowed),
            Some("none") => Ok(Positions::None),
            Some("learned") if own.is_none_or(|own| context <= own) => Ok(Positions::Learned),
            Some("learned") => Err(Error::unsupported(format!(
                "a context of {context} tokens: the model has learned {} positions",
                own.unwrap_or_default()
            ))
            .hint("a smaller --context")),
            Some(other) => Err(self.wrong("positions", &json!(other), "rope, learned or none")),
        }
    }

    fn rope(&self, head_dim: usize, lengths: Lengths, windowed: &[bool]) -> Result<Positions> {
        let dim = self.integer("rope_dim", MAX_WIDTH)?.unwrap_or(head_dim);
        if dim < 2 || !dim.is_multiple_of(2) || dim > head_dim {
            let expected = format!("an even number from 2 to `head_dim` = {head_dim}");
            return Err(self.wrong("rope_dim", &json!(dim), &expected));
        }
        let theta = self.number("rope_theta")?.unwrap_or(10_000.0);
        let parameters = self.value("rope")?;
        let sliding = match self.value("rope_sliding")? {
            Json::Null => parameters.clone(),
            sliding => sliding,
        };
        let unrotated = self.truths("unrotated", windowed.len())?;
        let is_still = |i: usize| unrotated.as_ref().is_some_and(|layers| layers[i]);
        let kinds: Vec<&str> = (0..windowed.len())
            .map(|i| {
                if is_still(i) {
                    "unrotated"
                } else if windowed[i] {
                    "rope_sliding"
                } else {
                    "rope"
                }
            })
            .collect();
        let (mut tables, mut of_kind) = (Vec::<RopeSpec>::new(), HashMap::new());
        for kind in &kinds {
            if of_kind.contains_key(kind) {
                continue;
            }
            let spec = match *kind {
                "unrotated" => Ok(RopeSpec::still(dim)),
                "rope_sliding" => RopeSpec::of(&sliding, dim, theta, lengths),
                _ => RopeSpec::of(&parameters, dim, theta, lengths),
            };
            let spec = spec.map_err(|e| e.context(self.name(kind)))?;
            let known = tables.iter().position(|t| *t == spec);
            of_kind.insert(*kind, known.unwrap_or(tables.len()));
            if known.is_none() {
                tables.push(spec);
            }
        }
        let of_layer = kinds.iter().filter_map(|kind| of_kind.get(kind).copied()).collect();
        Ok(Positions::Rope { dim, tables, of_layer })
    }

    fn ffn(&self) -> Result<Ffn> {
        let kind = self.text("ffn")?;
        Ok(match kind.as_deref() {
            None | Some("gated") => Ffn::Gated,
            Some("fused") => Ffn::Fused,
            Some("plain") => Ffn::Plain,
            Some("experts") => {
                let count = self.count("experts", MAX_EXPERTS)?;
                let routers = [
                    ("topk_softmax", Router::TopkSoftmax),
                    ("softmax_topk", Router::SoftmaxTopk),
                    ("sigmoid_topk", Router::SigmoidTopk),
                ];
                let clamp = match (self.positive("clamp")?, self.positive("alpha")?) {
                    (Some(limit), Some(alpha)) => Some(Clamp { limit, alpha }),
                    (None, None) => None,
                    _ => {
                        return Err(self.wrong(
                            "alpha",
                            &self.value("alpha")?,
                            "a number where `clamp` is one",
                        ));
                    }
                };
                Ffn::Experts {
                    count,
                    used: self.count("experts_used", count as u64)?,
                    router: self.one_of("router", &routers)?.unwrap_or(Router::SoftmaxTopk),
                    norm: truth(&self.value("router_norm")?),
                    clamp,
                }
            }
            Some(other) => return Err(self.wrong("ffn", &json!(other), "gated, fused, plain or experts")),
        })
    }

    fn name(&self, key: &str) -> String {
        format!("{}: [graph] {key}", self.model.arch.name)
    }

    fn wrong(&self, key: &str, value: &Json, expected: &str) -> Error {
        Error::unsupported(format!("{} is {value}, expected was {expected}", self.name(key)))
    }

    /// `null` where the key is not there.
    fn value(&self, key: &str) -> Result<Json> {
        let value = self.graph.get(key).map(|e| e.eval(&self.model.scope)).transpose();
        Ok(value.map_err(|e| e.context(self.name(key)))?.unwrap_or_default())
    }

    fn integer(&self, key: &str, most: u64) -> Result<Option<usize>> {
        let value = self.value(key)?;
        let whole =
            |v: &Json| v.as_u64().or_else(|| v.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as u64));
        match whole(&value).filter(|n| *n <= most).and_then(|n| usize::try_from(n).ok()) {
            None if value.is_null() => Ok(None),
            None => Err(self.wrong(key, &value, &format!("a whole number up to {most}"))),
            n => Ok(n),
        }
    }

    /// One at least.
    fn count(&self, key: &str, most: u64) -> Result<usize> {
        let n = self.integer(key, most)?;
        n.filter(|n| *n > 0).ok_or_else(|| self.wrong(key, &json!(n), &format!("a number from 1 to {most}")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let value = self.value(key)?;
        match value.as_f64() {
            Some(n) if n > 0.0 && n.is_finite() => Ok(Some(n)),
            None if value.is_null() => Ok(None),
            _ => Err(self.wrong(key, &value, "a positive number")),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f32>> {
        self.number(key)?.map(|n| self.single(key, n)).transpose()
    }

    /// In f32, where it must still be a positive number.
    fn single(&self, key: &str, n: f64) -> Result<f32> {
        Some(n as f32)
            .filter(|n| n.is_finite() && *n > 0.0)
            .ok_or_else(|| self.wrong(key, &json!(n), "a positive number in the range of f32"))
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        match self.value(key)? {
            Json::Null => Ok(None),
            Json::String(text) => Ok(Some(text)),
            other => Err(self.wrong(key, &other, "a name")),
        }
    }

    fn one_of<T: Copy>(&self, key: &str, known: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let found = known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        found.map(Some).ok_or_else(|| self.wrong(key, &json!(text), &names.join(", ")))
    }

    /// One for each layer.
    fn truths(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        match self.value(key)? {
            Json::Null => Ok(None),
            Json::Array(list) if list.len() == layers => Ok(Some(list.iter().map(truth).collect())),
            other => {
                let found = match &other {
                    Json::Array(list) => json!(format!("a list of {}", list.len())),
                    _ => other,
                };
                Err(self.wrong(key, &found, &format!("a list with one truth for each of {layers} layers")))
            }
        }
    }
}
