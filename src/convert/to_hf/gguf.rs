//! A GGUF file as a Hugging Face directory would have it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::model::HfModel;
use super::rounding::places_of_gguf;
use super::{SMALL, pretty};
use crate::arch::{self, Model};
use crate::block::codec;
use crate::container::Store;
use crate::container::gguf::{Gguf, Metadata};
use crate::convert::checkpoint::GGUF_METADATA_FILE;
use crate::convert::edits::format_typed;
use crate::convert::sentence;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::DType;
use crate::vocab::Vocab;

/// What the way back depends on.
pub struct Wish<'a> {
    /// Type of the weights that are not packed.
    pub dtype: Option<DType>,
    /// Whether tensors keep their own types where none was said.
    pub keeps_types: bool,
    /// What config.json will say of the method, where definitions ask for it.
    pub quant_method: Option<&'static str>,
    /// A definition outside the program.
    pub arch_file: Option<&'a Path>,
}

/// A GGUF file that has been opened and recognised.
pub struct Recognised {
    /// Its tensors.
    pub store: Store,
    pub metadata: Metadata,
    /// With a complete config.json.
    pub model: Model,
    pub vocab: Vocab,
    /// Type of the weights that are not packed.
    pub dtype: DType,
}

impl Recognised {
    /// config.json, without what it says of quantization.
    pub fn config(&self) -> Json {
        let mut config = self.model.config().clone();
        if let Some(config) = config.as_object_mut() {
            config.shift_remove("quantization_config");
        }
        config
    }

    /// generation_config.json and the tokenizer's files.
    ///
    /// # Errors
    /// As [`Vocab::write_hf`].
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let generation = generation_config(self.model.config());
        let generation = generation.map(|g| ("generation_config.json".to_string(), pretty(&g)));
        Ok(generation.into_iter().chain(self.vocab.write_hf()?).collect())
    }

    /// What it calls itself.
    pub fn name(&self) -> Option<String> {
        self.metadata.str("general.name").map(|name| name.replace(['/', ' '], "-"))
    }
}

/// Opens and recognises.
///
/// # Errors
/// What is no GGUF file, unknown architectures, tensors without a place.
pub fn open(path: &Path, wish: &Wish<'_>, limits: &Limits) -> Result<HfModel> {
    let at = |e: Error| e.at(path);
    let found = recognise(path, wish, limits)?;
    let (store, metadata) = (&found.store, &found.metadata);
    let mut mapped = found.model.map_back(store.tensors()).map_err(at)?;
    mapped.extend(found.model.scalars_back(metadata).map_err(at)?);
    let mut side = found.side_files()?;
    side.push((GGUF_METADATA_FILE.to_string(), pretty(&general_metadata(metadata))));
    let number = |key: &str| metadata.u64(&format!("{}.{key}", found.model.arch.arch));
    if let (Some(pooling), Some(n_embd)) = (number("pooling_type"), number("embedding_length")) {
        side.extend(
            sentence::files(pooling, n_embd).into_iter().map(|(name, config)| (name, pretty(&config))),
        );
    }
    let keeps_types = wish.keeps_types && wish.dtype.is_none();
    let places = places_of_gguf(&mapped, store);
    let (config, name) = (found.config(), found.name());
    let Recognised { store, vocab, dtype, .. } = found;
    Ok(HfModel { store, mapped, config, side, dtype, keeps_types, name, places, notes: vocab.notes })
}

/// Opens and recognises.
///
/// # Errors
/// What is no GGUF file; unknown architectures.
pub fn recognise(path: &Path, wish: &Wish<'_>, limits: &Limits) -> Result<Recognised> {
    let gguf = Gguf::open(path, limits)?;
    gguf.check_model()?;
    let Gguf { metadata, store, .. } = gguf;
    let at = |e: Error| e.at(path);
    let model = match wish.arch_file {
        Some(file) => Model::from_gguf_as(arch::read(file, limits)?, &metadata, store.tensors()),
        None => Model::from_gguf(&metadata, store.tensors()),
    };
    let mut model = model.map_err(at)?;
    let vocab = Vocab::from_metadata(&metadata).map_err(at)?;
    let dtype = wish.dtype.unwrap_or_else(|| main_dtype(&store));
    model.facts_mut().n_tokens = Some(vocab.tokens.len() as u64);
    complete(&mut model, &vocab, &store, dtype, wish.quant_method)?;
    Ok(Recognised { store, metadata, model, vocab, dtype })
}

/// What config.json says beyond the metadata.
fn complete(
    model: &mut Model,
    vocab: &Vocab,
    store: &Store,
    dtype: DType,
    quant_method: Option<&str>,
) -> Result<()> {
    let mut extra = Map::new();
    let embedded = store.get("token_embd.weight").and_then(|t| t.shape.first().copied());
    extra.insert("vocab_size".into(), json!(embedded.unwrap_or(vocab.tokens.len() as u64)));
    extra.insert("tie_word_embeddings".into(), json!(store.get("output.weight").is_none()));
    extra.extend(vocab.config_ids().map(|(key, id)| (key, json!(id))));
    extra.insert("torch_dtype".into(), json!(super::torch_name(dtype)));
    if let Some(method) = quant_method {
        extra.insert("quantization_config".into(), json!({"quant_method": method}));
    }
    let has_bias = |role: &str| store.get(&format!("blk.0.{role}.bias")).is_some();
    if model.config().get("attention_bias").is_none() && model.arch.arch == "llama" {
        extra.insert("attention_bias".into(), json!(has_bias("attn_q")));
        extra.insert("mlp_bias".into(), json!(has_bias("ffn_up")));
    }
    let mut generated = HashMap::new();
    for name in model.arch.generates() {
        let Some(t) = store.get(&name).filter(|t| t.elements() <= SMALL) else { continue };
        let bytes = store.read_all(t)?;
        let mut values = vec![0.0; t.elements() as usize];
        codec(t.dtype)
            .ok_or_else(|| Error::unsupported(format!("{name} cannot be read")))?
            .decode(&bytes, &mut values)?;
        generated.insert(name, values);
    }
    model.complete_config(extra, &generated)
}

/// The type of most weights, where Hugging Face has it.
fn main_dtype(store: &Store) -> DType {
    let mut bytes = std::collections::BTreeMap::new();
    for t in store.tensors() {
        *bytes.entry(t.dtype).or_insert(0u64) += t.nbytes;
    }
    let most = bytes.into_iter().max_by_key(|(_, n)| *n).map(|(d, _)| d);
    most.filter(|d| matches!(d, DType::F32 | DType::F16)).unwrap_or(DType::BF16)
}

/// What config.json cannot hold: name, authors, licence ... , in the form of `--set`.
fn general_metadata(metadata: &Metadata) -> Json {
    const ELSEWHERE: [&str; 4] =
        ["general.architecture", "general.type", "general.file_type", "general.quantization_version"];
    Json::Object(
        metadata
            .iter()
            .filter(|(k, _)| k.starts_with("general.") && !ELSEWHERE.contains(k) && *k != "general.alignment")
            .filter_map(|(k, v)| Some((k.to_string(), Json::from(format_typed(v)?))))
            .collect(),
    )
}

fn generation_config(config: &Json) -> Option<Json> {
    let keys = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let ids: Map<String, Json> =
        keys.iter().filter_map(|k| Some((k.to_string(), config.get(*k)?.clone()))).collect();
    (!ids.is_empty()).then_some(Json::Object(ids))
}
