//! Architectures as data: which config.json describes which model, how its tensors are called and
//! laid out in GGUF, and which metadata llama.cpp wants.
//!
//! One TOML file in `formats/arch/` is one architecture, one in `formats/mmproj/` one projector;
//! CONTRIBUTING.md describes the fields. [`recognise`] matches a config.json, [`Model::map`] plans
//! the way to GGUF, and [`Model::map_back`] the way back, from the same rows.

mod active;
mod also;
mod decoder;
mod elementwise;
mod example;
mod expr;
mod fold;
mod fuel;
mod graph;
mod halves;
mod inverse;
mod low_rank;
mod mapping;
mod misfit;
mod projector;
mod recognise;
mod rope;
mod rope_table;
mod rows;
mod scalars;
mod schema;
mod scope;
mod template;

pub use elementwise::Elementwise;
pub use example::Target;
pub use expr::{Expr, Scope, truth};
pub use fold::{FoldKind, FoldRule, folds};
pub use graph::{Activation, Clamp, Decoder, Ffn, Norm, Positions, RopeSpec, Router};
pub use halves::Layout;
pub use low_rank::{Placed, Placer};
pub use mapping::{Data, Generated, Mapped, Piece};
pub use projector::{PROJECTOR, has_projector, recognise_projector, take_for_projector};
pub use recognise::{recognise, take_for};
pub use rope_table::Lengths;
pub use schema::{Architecture, TokenizerRule};
pub use scope::Facts;
pub use template::{Captures, Template};

use std::path::Path;

use serde_json::Value as Json;

use crate::container::gguf::{Metadata, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::tensor::TensorInfo;
use projector::Around;
use schema::{Class, KvType};
use scope::ModelScope;

/// An architecture together with the config of one model.
pub struct Model {
    /// The definition.
    pub arch: Architecture,
    /// Which of its classes the config names.
    class: Class,
    /// Where the model is only a part of the checkpoint: the whole.
    around: Option<Around>,
    scope: ModelScope,
}

/// All embedded definitions, by name of the file.
///
/// # Errors
/// `Malformed` when an embedded file is faulty (a test holds them to be sound).
pub fn all() -> Result<Vec<Architecture>> {
    schema::embedded()
}

/// The embedded definitions of the architecture that llama.cpp calls `arch`.
///
/// # Errors
/// As [`all`].
pub fn named(arch: &str) -> Result<Vec<Architecture>> {
    schema::named(arch)
}

/// All embedded definitions of projectors, by name of the file.
///
/// # Errors
/// As [`all`].
pub fn all_projectors() -> Result<Vec<Architecture>> {
    schema::projectors()
}

/// Names of classes that are known and not converted, each with the reason.
///
/// # Errors
/// As [`all`].
pub fn refused() -> Result<Vec<(String, String)>> {
    let refused = schema::refused()?;
    Ok(refused.iter().flat_map(|(c, why)| c.names().map(|n| (n.to_string(), why.clone()))).collect())
}

/// Reads a definition from a file; what it extends lies beside it, or is embedded.
///
/// # Errors
/// `Io`; `Malformed`, with file and line.
pub fn read(path: &Path, limits: &Limits) -> Result<Architecture> {
    schema::read(path, limits)
}

impl Model {
    /// From a GGUF file's metadata and tensors: the config.json that a Hugging Face directory would
    /// have, as far as they tell.
    ///
    /// # Errors
    /// `Unsupported` when `general.architecture` is none that we know.
    pub fn from_gguf(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Self> {
        let name = metadata
            .str("general.architecture")
            .ok_or_else(|| Error::malformed("general.architecture is missing or no string"))?;
        if name == PROJECTOR {
            return Err(projector::no_way_back());
        }
        let archs = all()?;
        let mut found = Err(Error::unsupported(format!("the architecture {name:?} is not known"))
            .hint(format!("known are: {}", recognise::names(&archs))));
        // Families of one architecture may have a definition each: the first with a class that fits.
        for arch in archs.into_iter().filter(|a| a.arch == name) {
            found = Self::from_gguf_as(arch, metadata, tensors);
            if found.as_ref().err().is_none_or(|e| e.kind() != ErrorKind::Unsupported) {
                break;
            }
        }
        found
    }

    /// The same, by a definition that is given.
    ///
    /// # Errors
    /// `Unsupported` when the file is of another architecture or none of its classes fits.
    pub fn from_gguf_as(arch: Architecture, metadata: &Metadata, tensors: &[TensorInfo]) -> Result<Self> {
        let name = metadata.str("general.architecture");
        if name != Some(arch.arch.as_str()) {
            return Err(Error::unsupported(format!(
                "the file's architecture is {name:?}, the definition is of {:?}",
                arch.arch
            )));
        }
        let (config, class) = inverse::config(&arch, metadata, tensors)?;
        let scope = ModelScope::new(&arch, config);
        Ok(Self { arch, class, around: None, scope })
    }

    /// The class in config.json that was matched, e.g. `LlamaForCausalLM`.
    pub fn class_name(&self) -> &str {
        &self.class.name
    }

    /// config.json as it was read, or as it was made from GGUF metadata.
    pub fn config(&self) -> &Json {
        self.scope.config()
    }

    /// Facts that the config does not tell, such as the vocabulary's size.
    pub fn facts_mut(&mut self) -> &mut Facts {
        &mut self.scope.facts
    }

    /// Evaluates a named variable of the definition, such as `n_layers`.
    ///
    /// # Errors
    /// As the expression's evaluation.
    pub fn var(&self, name: &str) -> Result<Json> {
        use expr::Scope;
        Ok(self.scope.get(name)?.unwrap_or(Json::Null))
    }

    /// What the definition warns of for this config.
    ///
    /// # Errors
    /// As the evaluation of its conditions.
    pub fn warnings(&self) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        for w in &self.arch.warn {
            if !expr::truth(&w.expr.eval(&self.scope)?) {
                warnings.push(w.why.clone());
            }
        }
        Ok(warnings)
    }

    fn check(&self) -> Result<()> {
        for r in &self.arch.require {
            if !expr::truth(&r.expr.eval(&self.scope)?) {
                return Err(Error::unsupported(format!("{}: {}", self.arch.name, r.why)));
            }
        }
        Ok(())
    }

    /// The architecture's metadata, `general.file_type` among them, in the definition's order.
    ///
    /// # Errors
    /// `Malformed` when a value does not fit its type; the key is named.
    pub fn metadata(&self) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        for (key, kv) in &self.arch.kv {
            let context = |e: Error| e.context(format!("{key} from config.json"));
            let value = kv.expr.eval(&self.scope).map_err(context)?;
            if let Some(value) = typed(kv.kind, &value).map_err(context)? {
                metadata.set(key.as_str(), value);
            }
        }
        Ok(metadata)
    }
}

/// `None` for null.
fn typed(kind: KvType, value: &Json) -> Result<Option<Value>> {
    use crate::container::gguf::Array;
    let wrong = || Error::malformed(format!("{value} is no {}", kind.name()));
    if value.is_null() {
        return Ok(None);
    }
    // Neither a number nor one for each layer.
    if value.as_array().is_some_and(Vec::is_empty) {
        return Err(wrong());
    }
    let u32_of = |v: &Json| {
        let n = v.as_u64().or_else(|| v.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64));
        n.and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong)
    };
    let i32_of = |v: &Json| v.as_i64().and_then(|n| i32::try_from(n).ok()).ok_or_else(wrong);
    Ok(Some(match (kind, value) {
        // As llama.cpp's converter writes lists of numbers.
        (KvType::U32, Json::Array(list)) => Value::Array(Array::I32(
            list.iter().map(|v| i32::try_from(u32_of(v)?).map_err(|_| wrong())).collect::<Result<_>>()?,
        )),
        (KvType::U32, v) => Value::U32(u32_of(v)?),
        (KvType::I32, Json::Array(list)) => {
            Value::Array(Array::I32(list.iter().map(i32_of).collect::<Result<_>>()?))
        }
        (KvType::I32, v) => Value::I32(i32_of(v)?),
        (KvType::F32, Json::Array(list)) => Value::Array(Array::F32(
            list.iter().map(|v| v.as_f64().map(|v| v as f32).ok_or_else(wrong)).collect::<Result<_>>()?,
        )),
        (KvType::F32, v) => Value::F32(v.as_f64().ok_or_else(wrong)? as f32),
        (KvType::Bool, Json::Array(list)) => Value::Array(Array::Bool(
            list.iter().map(|v| v.as_bool().ok_or_else(wrong)).collect::<Result<_>>()?,
        )),
        (KvType::Bool, v) => Value::Bool(v.as_bool().ok_or_else(wrong)?),
        (KvType::Str, Json::Array(list)) => Value::Array(Array::String(
            list.iter()
                .map(|v| v.as_str().map(|s| s.as_bytes().to_vec()).ok_or_else(wrong))
                .collect::<Result<_>>()?,
        )),
        (KvType::Str, v) => Value::from(v.as_str().ok_or_else(wrong)?),
    }))
}
