//! What names in expressions mean for one model.

use std::cell::RefCell;

use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

use super::expr::{Expr, Scope};
use super::schema::Architecture;
use super::template::Captures;
use crate::error::{Error, Result};

/// What the config alone does not tell.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Tokens of the vocabulary.
    pub n_tokens: Option<u64>,
    /// `general.file_type` (`enum llama_ftype`).
    pub file_type: Option<u32>,
    /// How the files of sentence-transformers pool embeddings (`enum llama_pooling_type`).
    pub pooling: Option<u32>,
    /// Ids of the tokens that tokenizer.json and tokenizer_config.json add, by text.
    pub added_tokens: Json,
    /// How images and sound are prepared: preprocessor_config.json and processor_config.json.
    pub preprocessor: Json,
}

pub(super) struct ModelScope {
    vars: IndexMap<String, Expr>,
    /// Searched in order; the last is the root of config.json.
    roots: Vec<Json>,
    pub(super) facts: Facts,
    rope: Json,
    rope_sliding: Json,
    /// Metadata of the GGUF, on the way back.
    pub(super) kv: Json,
    /// Names of its tensors, likewise.
    pub(super) tensors: Json,
    /// Variables being evaluated: within its own definition a name means config.json's key.
    active: RefCell<Vec<String>>,
}

impl ModelScope {
    pub fn new(arch: &Architecture, config: Json) -> Self {
        let path = |root: &String| format!("/{}", root.replace('.', "/"));
        let mut roots: Vec<Json> =
            arch.config_root.iter().filter_map(|r| config.pointer(&path(r)).cloned()).collect();
        roots.push(config);
        let (rope, rope_sliding) = canonical_rope(&roots);
        Self {
            vars: arch.vars.clone(),
            roots,
            facts: Facts::default(),
            rope,
            rope_sliding,
            kv: Json::Null,
            tensors: Json::Null,
            active: RefCell::default(),
        }
    }

    pub fn config(&self) -> &Json {
        self.roots.last().unwrap_or(&Json::Null)
    }

    /// The same facts about another config.
    pub fn with_config(&self, arch: &Architecture, config: Json) -> Self {
        Self { facts: self.facts.clone(), kv: self.kv.clone(), ..Self::new(arch, config) }
    }
}

fn find(roots: &[Json], keys: &[&str]) -> Option<Json> {
    keys.iter().find_map(|k| roots.iter().find_map(|r| r.get(*k)).filter(|v| !v.is_null()).cloned())
}

/// One form for the dialects of config.json: `rope_parameters` of transformers 5 (flat, or one
/// object for each kind of attention), and `rope_theta` + `rope_scaling` of those before.
/// Returns the parameters of full and of sliding attention.
fn canonical_rope(roots: &[Json]) -> (Json, Json) {
    let given = find(roots, &["rope_parameters", "rope_scaling"]);
    let mut rope = given.and_then(|v| v.as_object().cloned()).unwrap_or_default();
    if let (Some(full), sliding) = (rope.get("full_attention"), rope.get("sliding_attention")) {
        return (full.clone(), sliding.cloned().unwrap_or(Json::Null));
    }
    let theta = find(
        roots,
        &["global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base"],
    );
    let local = find(
        roots,
        &[
            "local_rope_theta",
            "rope_local_theta",
            "rope_theta_local",
            "swa_rope_theta",
            "rope_local_base_freq",
        ],
    );
    let mut fill = |key: &str, value: Option<Json>| {
        if let (false, Some(value)) = (rope.contains_key(key), value) {
            rope.insert(key.to_string(), value);
        }
    };
    fill("rope_theta", theta);
    fill("partial_rotary_factor", find(roots, &["partial_rotary_factor", "rope_pct", "rope_percent"]));
    fill("original_max_position_embeddings", find(roots, &["original_max_position_embeddings"]));
    if let (false, Some(kind)) = (rope.contains_key("rope_type"), rope.get("type").cloned()) {
        rope.insert("rope_type".to_string(), kind);
    }
    if rope.get("rope_type").and_then(Json::as_str) == Some("su") {
        rope.insert("rope_type".to_string(), json!("longrope"));
    }
    let sliding = match rope.get("sliding_attention").cloned() {
        Some(sliding) => sliding,
        None => local
            .map_or(Json::Null, |theta| Json::Object(Map::from_iter([("rope_theta".to_string(), theta)]))),
    };
    (Json::Object(rope), sliding)
}

impl Scope for ModelScope {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        let known = match name {
            "rope" => Some(self.rope.clone()),
            "rope_sliding" => Some(self.rope_sliding.clone()),
            "preprocessor" => Some(self.facts.preprocessor.clone()),
            "tokenizer" => Some(json!({ "n_tokens": self.facts.n_tokens, "added": self.facts.added_tokens })),
            "file_type" => Some(json!(self.facts.file_type)),
            "pooling" => Some(json!(self.facts.pooling)),
            "kv" => Some(self.kv.clone()),
            "tensors" => Some(self.tensors.clone()),
            _ => None,
        };
        if known.is_some() {
            return Ok(known);
        }
        if let Some(expr) = self.vars.get(name)
            && !self.active.borrow().iter().any(|a| a == name)
        {
            self.active.borrow_mut().push(name.to_string());
            let value = expr.eval(self);
            self.active.borrow_mut().pop();
            return value.map(Some).map_err(|e: Error| e.context(format!("variable {name}")));
        }
        Ok(find(&self.roots, &[name]))
    }
}

/// A scope with the shape of one tensor: `shape[0]`.
pub(super) struct WithShape<'a>(pub &'a dyn Scope, pub &'a [u64]);

impl Scope for WithShape<'_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        if name == "shape" { Ok(Some(json!(self.1))) } else { self.0.get(name) }
    }
}

/// A scope with what the placeholders of a name stood for: `i`, and any other letter.
pub(super) struct WithCaptures<'a>(pub &'a ModelScope, pub &'a Captures);

impl Scope for WithCaptures<'_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        let mut letters = name.chars();
        match (letters.next(), letters.next()) {
            (Some(c), None) if self.1.integers.contains_key(&c) => Ok(Some(json!(self.1.integers[&c]))),
            _ => self.0.get(name),
        }
    }
}

/// A scope with the values of a generated tensor: `values`.
pub(super) struct WithValues<'a>(pub &'a dyn Scope, pub &'a Json);

impl Scope for WithValues<'_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        if name == "values" { Ok(Some(self.1.clone())) } else { self.0.get(name) }
    }
}

/// A scope with the index of one layer: `i`.
pub(super) struct WithLayer<'a>(pub &'a ModelScope, pub u64);

impl Scope for WithLayer<'_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        if name == "i" { Ok(Some(self.1.into())) } else { self.0.get(name) }
    }
}
