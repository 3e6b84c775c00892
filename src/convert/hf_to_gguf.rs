//! Hugging Face directory -> GGUF file.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::checkpoint::{Checkpoint, GGUF_METADATA_FILE};
use super::gather::Source;
use super::general::{Described, General, ParameterCounts};
use super::plan::{Plan, TensorPlan};
use super::quantizer::{QUANTIZATION_VERSION, Quantizer, Unquantized};
use super::shards::{Sharding, lay_out};
use super::types::FileType;
use super::{Job, output_path};
use crate::arch::{self, Facts, Mapped, Model};
use crate::container::Store;
use crate::container::gguf::{Metadata, Value, ValueType};
use crate::container::side::read_json;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::TensorInfo;
use crate::vocab;

/// Changes the user asks for in the metadata.
#[derive(Clone, Debug, Default)]
pub struct MetadataEdits {
    /// `general.name`.
    pub name: Option<String>,
    /// `key=value` or `key=type:value`.
    pub set: Vec<String>,
    /// Keys to leave out.
    pub remove: Vec<String>,
}

/// A conversion from a Hugging Face directory.
#[derive(Clone, Debug, Default)]
pub struct HfToGguf {
    /// The directory, or a file in it.
    pub source: PathBuf,
    /// The file to write, or a directory for it; default: beside the source, by llama.cpp's naming
    /// convention.
    pub output: Option<PathBuf>,
    /// What llama.cpp's converter would be asked for; `None` keeps the precision of the source.
    pub file_type: Option<FileType>,
    /// What becomes of that on the way, as llama-quantize would do it. `file_type` then is the type
    /// of what stays as it is.
    pub quantizer: Option<Quantizer>,
    /// How the output is divided into files.
    pub sharding: Sharding,
    /// Architecture, where the config's class is unknown.
    pub arch: Option<String>,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Pre-tokenizer, where the tokenizer's structure is unknown.
    pub pre: Option<String>,
    /// Changes to the metadata.
    pub edits: MetadataEdits,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// A source that has been opened and recognised: everything but types and places is known.
pub struct Recognised {
    pub checkpoint: Checkpoint,
    pub model: Model,
    pub vocab: vocab::Vocab,
}

impl HfToGguf {
    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// Everything that can be wrong with a source but its tensors' contents.
    pub fn plan(&self) -> Result<Job> {
        let Recognised { checkpoint, mut model, vocab } = self.recognise()?;
        let infos = checkpoint.store.tensors();
        let file_type =
            self.file_type.unwrap_or_else(|| FileType::of_source(infos.iter().map(|t| (t.dtype, t.nbytes))));
        model.set_facts(Facts { n_tokens: Some(vocab.tokens.len() as u64), file_type: Some(file_type.id) });
        let mapped = model.map(infos).map_err(|e| e.at(&checkpoint.dir))?;
        let size = counts(&mapped)?;
        let described = Described {
            dir_name: &checkpoint.dir_name(),
            config: &checkpoint.config,
            generation: checkpoint.generation.as_ref(),
            model_card: checkpoint.model_card.as_deref(),
        };
        let general = General::derive(&described, size, self.edits.name.as_deref());
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", model.arch.arch.as_str());
        metadata.set("general.type", "model");
        general.write(&mut metadata);
        restore(&mut metadata, &checkpoint.dir, &self.limits)?;
        for (key, value) in model.metadata()?.0 {
            metadata.set(key, value);
        }
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
        vocab.to_metadata(&mut metadata);
        if let (Some(prefix), "llama") = (model.arch.tokenizer.add_space_prefix, vocab.kind.ggml_model()) {
            metadata.set("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
        }
        let mut plan = match &self.quantizer {
            Some(quantizer) => {
                let unquantized = |m: Mapped| {
                    let (dtype, _) = file_type.choose(&m.name, &m.shape);
                    Unquantized { mapped: m, dtype, place: (0, 0) }
                };
                let tensors = mapped.into_iter().map(unquantized).collect();
                let plan = quantizer.plan(tensors, &checkpoint.store, &mut metadata, &self.limits);
                plan.map_err(|e| if e.path().is_some() { e } else { e.at(&checkpoint.dir) })?
            }
            None => converted(file_type, mapped, &checkpoint)?,
        };
        plan.notes.splice(0..0, model.warnings()?.into_iter().chain(vocab.notes.iter().cloned()));
        self.edits.apply(&mut metadata)?;
        let beside = checkpoint.dir.parent().filter(|p| !p.as_os_str().is_empty());
        let type_name = self.quantizer.as_ref().map_or(file_type.name(), |q| &q.recipe.name);
        let name = general.file_name(type_name);
        let output = output_path(self.output.as_deref(), beside.unwrap_or(Path::new(".")), &name);
        lay_out(&mut plan, &mut metadata, &self.sharding, &output)?;
        Ok(Job::gguf(plan, checkpoint.store, &output))
    }

    /// The directory of the source, also where a file in it was given.
    pub fn directory(&self) -> &Path {
        match self.source.parent() {
            Some(parent) if self.source.is_file() => parent,
            _ => &self.source,
        }
    }

    /// Opens the source, and recognises architecture and vocabulary.
    ///
    /// # Errors
    /// What is no model, unknown architectures, unknown tokenizers.
    pub fn recognise(&self) -> Result<Recognised> {
        let checkpoint = Checkpoint::open(&self.source, &self.limits)?;
        let config_path = checkpoint.dir.join("config.json");
        if let Some(method) = checkpoint.config.get("quantization_config").filter(|q| !q.is_null()) {
            let name = method.get("quant_method").and_then(Json::as_str).unwrap_or("unnamed");
            return Err(Error::unsupported(format!("weights quantized by {name} cannot be read yet"))
                .at(&config_path)
                .hint("convert the unquantized model that it was made from"));
        }
        let model = match &self.arch_file {
            Some(path) => arch::take_for(arch::read(path, &self.limits)?, &checkpoint.config),
            None => arch::recognise(&checkpoint.config, self.arch.as_deref()),
        };
        let model = model.map_err(|e| e.at(&config_path))?;
        let vocab_size = model.var("vocab_size")?.as_u64();
        let vocab = vocab::load(
            &vocab::Source {
                dir: &checkpoint.dir,
                config: &checkpoint.config,
                vocab_size,
                pre: self.pre.as_deref(),
                kinds: &model.arch.tokenizer.kinds,
            },
            &self.limits,
        )?;
        Ok(Recognised { checkpoint, model, vocab })
    }
}

/// The tensors a source becomes in GGUF, tied to their store: what `verify` compares with.
///
/// # Errors
/// As [`HfToGguf::plan`].
pub fn source_tensors(source: &HfToGguf) -> Result<(Store, Vec<Mapped>)> {
    let Recognised { checkpoint, mut model, vocab } = source.recognise()?;
    model.set_facts(Facts { n_tokens: Some(vocab.tokens.len() as u64), file_type: None });
    let mapped = model.map(checkpoint.store.tensors()).map_err(|e| e.at(&checkpoint.dir))?;
    Ok((checkpoint.store, mapped))
}

/// Tensors that stay what they are.
pub fn identity(tensors: &[TensorInfo]) -> Vec<Mapped> {
    use crate::arch::{Data, Piece};
    use crate::tensor::StridedCopy;
    tensors
        .iter()
        .map(|t| Mapped {
            name: t.name.clone(),
            shape: t.shape.clone(),
            data: Data::Copied {
                pieces: vec![Piece { source: t.name.clone(), copy: StridedCopy::identity(t.elements()) }],
                elementwise: Vec::new(),
            },
        })
        .collect()
}

/// Every tensor in the type that llama.cpp's converter gives it.
fn converted(file_type: FileType, mapped: Vec<Mapped>, checkpoint: &Checkpoint) -> Result<Plan> {
    let mut plan = Plan::new(Vec::with_capacity(mapped.len()));
    for m in mapped {
        let (dtype, wanted) = file_type.choose(&m.name, &m.shape);
        let source = Source::new(&m, &checkpoint.store).map_err(|e| e.at(&checkpoint.dir))?;
        plan.tensors.push(TensorPlan::new(m.name, m.shape, dtype, wanted, source)?);
    }
    plan.note_fallbacks();
    Ok(plan)
}

/// Weights by kind, as llama.cpp counts them for `general.size_label`: `*_exps` tensors count one
/// expert, the rest is shared.
fn counts(mapped: &[Mapped]) -> Result<ParameterCounts> {
    let mut counts = ParameterCounts::default();
    let (mut experts_sum, mut expert_tensors) = (0u64, 0u64);
    for m in mapped {
        let n = crate::tensor::elements(&m.shape)?;
        counts.total += n;
        match (m.name.contains("_exps."), m.shape.as_slice()) {
            (true, [experts, ..]) if m.shape.len() >= 3 && *experts > 0 => {
                counts.expert += n / experts;
                experts_sum += experts;
                expert_tensors += 1;
            }
            _ => counts.shared += n,
        }
    }
    counts.expert_count = experts_sum.checked_div(expert_tensors).unwrap_or(0);
    Ok(counts)
}

/// `general.*` as an earlier GGUF had them.
fn restore(metadata: &mut Metadata, dir: &Path, limits: &Limits) -> Result<()> {
    let path = dir.join(GGUF_METADATA_FILE);
    let Some(saved) = read_json::<Json>(&path, limits.side_file_bytes)? else { return Ok(()) };
    let bad = |why: String| Error::malformed(why).at(&path);
    let saved = saved.as_object().ok_or_else(|| bad("is no JSON object".into()))?;
    // What is written there replaces what the directory's name would suggest.
    let derived: Vec<String> = metadata
        .iter()
        .map(|(k, _)| k.to_string())
        .filter(|k| k.starts_with("general.") && k != "general.architecture" && k != "general.type")
        .collect();
    derived.iter().for_each(|key| {
        metadata.remove(key);
    });
    for (key, entry) in saved {
        let parsed = entry.as_str().map(|text| parse_typed(text, None));
        let value = parsed.ok_or_else(|| bad(format!("{key} is no string")))?.map_err(|e| e.at(&path))?;
        metadata.set(key.as_str(), value);
    }
    Ok(())
}

impl MetadataEdits {
    /// Applies the changes.
    ///
    /// # Errors
    /// `Misuse` for a value that does not parse, or a key to remove that is not there.
    pub fn apply(&self, metadata: &mut Metadata) -> Result<()> {
        for entry in &self.set {
            let (key, text) = entry
                .split_once('=')
                .ok_or_else(|| Error::misuse(format!("--set {entry:?} is not of the form key=value")))?;
            let value =
                parse_typed(text, metadata.get(key)).map_err(|e| e.context(format!("--set {key}")))?;
            metadata.set(key, value);
        }
        for key in &self.remove {
            if metadata.remove(key).is_none() {
                return Err(Error::misuse(format!("--remove {key}: there is no such key")));
            }
        }
        Ok(())
    }
}

/// `type:value`, or a value of the type that the key has already, or of the plainest type.
fn parse_typed(text: &str, old: Option<&Value>) -> Result<Value> {
    let named = text.split_once(':').and_then(|(t, v)| Some((type_named(t)?, v)));
    let (kind, text) = match (named, old) {
        (Some((kind, text)), _) => (kind, text),
        (None, Some(old)) => (old.value_type(), text),
        (None, None) if text.parse::<u32>().is_ok() => (ValueType::U32, text),
        (None, None) if text.parse::<i64>().is_ok() => (ValueType::I64, text),
        (None, None) if text.parse::<f32>().is_ok() => (ValueType::F32, text),
        (None, None) if text.parse::<bool>().is_ok() => (ValueType::Bool, text),
        (None, None) => (ValueType::String, text),
    };
    fn parse<T: std::str::FromStr>(text: &str, kind: ValueType) -> Result<T> {
        text.parse().map_err(|_| Error::misuse(format!("{text:?} is no {}", kind.name())))
    }
    Ok(match kind {
        ValueType::U8 => Value::U8(parse(text, kind)?),
        ValueType::I8 => Value::I8(parse(text, kind)?),
        ValueType::U16 => Value::U16(parse(text, kind)?),
        ValueType::I16 => Value::I16(parse(text, kind)?),
        ValueType::U32 => Value::U32(parse(text, kind)?),
        ValueType::I32 => Value::I32(parse(text, kind)?),
        ValueType::F32 => Value::F32(parse(text, kind)?),
        ValueType::Bool => Value::Bool(parse(text, kind)?),
        ValueType::U64 => Value::U64(parse(text, kind)?),
        ValueType::I64 => Value::I64(parse(text, kind)?),
        ValueType::F64 => Value::F64(parse(text, kind)?),
        ValueType::String => Value::from(text),
        ValueType::Array => {
            use crate::container::gguf::Array;
            let items: Vec<String> = serde_json::from_str(text)
                .map_err(|_| Error::misuse("an array is written as JSON: [\"a\", \"b\"]"))?;
            Value::Array(Array::String(items.into_iter().map(String::into_bytes).collect()))
        }
    })
}

/// The short names of types: `u32`, `f32`, `str`, `arr`.
const TYPE_NAMES: &[(&str, ValueType)] = &[
    ("u8", ValueType::U8),
    ("i8", ValueType::I8),
    ("u16", ValueType::U16),
    ("i16", ValueType::I16),
    ("u32", ValueType::U32),
    ("i32", ValueType::I32),
    ("f32", ValueType::F32),
    ("bool", ValueType::Bool),
    ("u64", ValueType::U64),
    ("i64", ValueType::I64),
    ("f64", ValueType::F64),
    ("str", ValueType::String),
    ("arr", ValueType::Array),
];

fn type_named(name: &str) -> Option<ValueType> {
    TYPE_NAMES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}

/// The inverse of [`parse_typed`]; `None` for what it cannot say (arrays of anything but text).
pub(super) fn format_typed(value: &Value) -> Option<String> {
    use crate::container::gguf::Array;
    let name = TYPE_NAMES.iter().find(|(_, t)| *t == value.value_type())?.0;
    let text = match value {
        Value::String(_) => value.as_str()?.to_string(),
        Value::Array(Array::String(items)) => {
            let items: Option<Vec<&str>> = items.iter().map(|s| std::str::from_utf8(s).ok()).collect();
            serde_json::to_string(&items?).ok()?
        }
        Value::Array(_) => return None,
        v => v.to_string(),
    };
    Some(format!("{name}:{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits() {
        let mut m = Metadata::default();
        m.set("general.name", "old");
        m.set("llama.context_length", Value::U32(5));
        let edits = MetadataEdits {
            name: None,
            set: [
                "general.name=7",
                "llama.context_length=4096",
                "a=b:c",
                "n=12",
                "f=f32:1",
                "g=0.5",
                "t=true",
            ]
            .map(String::from)
            .to_vec(),
            remove: vec!["n".into()],
        };
        edits.apply(&mut m).unwrap();
        assert_eq!(m.str("general.name"), Some("7"));
        assert_eq!(m.get("llama.context_length"), Some(&Value::U32(4096)));
        assert_eq!(m.str("a"), Some("b:c"));
        assert_eq!(m.get("n"), None);
        assert_eq!(m.get("f"), Some(&Value::F32(1.0)));
        assert_eq!(m.get("t"), Some(&Value::Bool(true)));
        for bad in ["x", "llama.context_length=much", "k=u8:300", "k=arr:x"] {
            assert!(
                MetadataEdits { set: vec![bad.into()], ..Default::default() }.apply(&mut m).is_err(),
                "{bad}"
            );
        }
        assert!(MetadataEdits { remove: vec!["zz".into()], ..Default::default() }.apply(&mut m).is_err());
        for v in [Value::from("u32:é"), Value::F32(1e-6), Value::I8(-3), Value::Bool(false)] {
            assert_eq!(parse_typed(&format_typed(&v).unwrap(), None).unwrap(), v);
        }
    }
}
