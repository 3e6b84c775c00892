//! GGUF file -> Hugging Face directory.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Map, Value as Json, json};

use super::Job;
use super::checkpoint::GGUF_METADATA_FILE;
use super::edits::format_typed;
use super::gather::{Scratch, Source};
use super::plan::{FilePlan, Plan, TensorPlan};
use super::sentence;
use crate::arch::{self, Mapped, Model};
use crate::block::codec;
use crate::container::Store;
use crate::container::gguf::{Gguf, Metadata};
use crate::container::safetensors;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::DType;
use crate::vocab::Vocab;

/// Tensors up to this many elements are looked at to see whether the target type holds them.
const SMALL: u64 = 1 << 20;

/// A conversion to a Hugging Face directory.
#[derive(Clone, Debug)]
pub struct GgufToHf {
    /// The file, or any shard of it.
    pub source: PathBuf,
    /// The directory to write.
    pub output: PathBuf,
    /// Type of the weights: F32, F16 or BF16; `None` takes the source's own, or BF16 for
    /// quantized files.
    pub dtype: Option<DType>,
    /// Largest weights file, in bytes.
    pub max_shard_size: u64,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl GgufToHf {
    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// What is no GGUF file, unknown architectures, tensors without a place.
    pub fn plan(&self) -> Result<Job> {
        let gguf = Gguf::open(&self.source, &self.limits)?;
        gguf.check_model()?;
        let Gguf { metadata, store, .. } = gguf;
        let at = |e: Error| e.at(&self.source);
        let model = match &self.arch_file {
            Some(path) => Model::from_gguf_as(arch::read(path, &self.limits)?, &metadata, store.tensors()),
            None => Model::from_gguf(&metadata, store.tensors()),
        };
        let mut model = model.map_err(at)?;
        let vocab = Vocab::from_metadata(&metadata).map_err(at)?;
        let dtype = self.dtype.unwrap_or_else(|| main_dtype(&store));
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::misuse(format!("--dtype {dtype}: weights are written as f32, f16 or bf16")));
        }
        model.facts_mut().n_tokens = Some(vocab.tokens.len() as u64);
        self.complete(&mut model, &vocab, &store, dtype)?;

        let mut mapped = model.map_back(store.tensors()).map_err(at)?;
        mapped.extend(model.scalars_back(&metadata).map_err(at)?);
        let mut plan = Plan::new(Vec::with_capacity(mapped.len()));
        for m in mapped {
            let source = Source::new(&m, &store)?;
            let given = if holds(&m, &source, &store, dtype)? { dtype } else { DType::F32 };
            if given != dtype {
                plan.notes.push(format!("{} stays F32: {dtype} would not hold its values exactly", m.name));
            }
            plan.tensors.push(TensorPlan::new(m.name, m.shape, given, None, source)?);
        }
        plan.notes.extend(vocab.notes.iter().cloned());
        self.lay_out(&mut plan, &model, &metadata, &vocab)?;
        let output = self.output.clone();
        Ok(Job { plan, store, output, is_directory: true, tokens: None, resume: true, is_trial: false })
    }

    /// What config.json says beyond the metadata.
    fn complete(&self, model: &mut Model, vocab: &Vocab, store: &Store, dtype: DType) -> Result<()> {
        let mut extra = Map::new();
        let embedded = store.get("token_embd.weight").and_then(|t| t.shape.first().copied());
        extra.insert("vocab_size".into(), json!(embedded.unwrap_or(vocab.tokens.len() as u64)));
        extra.insert("tie_word_embeddings".into(), json!(store.get("output.weight").is_none()));
        extra.extend(vocab.config_ids().map(|(key, id)| (key, json!(id))));
        let name = match dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            _ => "bfloat16",
        };
        extra.insert("torch_dtype".into(), json!(name));
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

    fn lay_out(&self, plan: &mut Plan, model: &Model, metadata: &Metadata, vocab: &Vocab) -> Result<()> {
        let infos: Vec<(&str, DType, &[u64])> =
            plan.tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())).collect();
        let layout = safetensors::write::layout(&infos, self.max_shard_size)?;
        for (tensor, (file, offset)) in plan.tensors.iter_mut().zip(&layout.places) {
            (tensor.file, tensor.offset) = (*file, *offset);
        }
        plan.files = layout.files.into_iter().map(FilePlan::from).collect();
        let mut side = |name: String, bytes: Vec<u8>| {
            plan.files.push(FilePlan::whole(name, bytes));
        };
        if let Some((name, index)) = layout.index {
            side(name, index);
        }
        side("config.json".into(), pretty(model.config()));
        if let Some(generation) = generation_config(model.config()) {
            side("generation_config.json".into(), pretty(&generation));
        }
        let saved = general_metadata(metadata);
        side(GGUF_METADATA_FILE.into(), pretty(&saved));
        for (name, bytes) in vocab.write_hf()? {
            side(name, bytes);
        }
        let number = |key: &str| metadata.u64(&format!("{}.{key}", model.arch.arch));
        if let (Some(pooling), Some(n_embd)) = (number("pooling_type"), number("embedding_length")) {
            for (name, config) in sentence::files(pooling, n_embd) {
                side(name, pretty(&config));
            }
        }
        Ok(())
    }
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

/// Whether `dtype` holds a small F32 tensor without loss; of large ones it is taken as wanted.
fn holds(m: &Mapped, source: &Source, store: &Store, dtype: DType) -> Result<bool> {
    let n = source.elements();
    if dtype == DType::F32 || n > SMALL || source.dtype().is_some_and(|d| d != DType::F32) {
        return Ok(true);
    }
    let context = |e: Error| e.context(format!("tensor {:?}", m.name));
    let (mut values, mut scratch) = (Vec::new(), Scratch::default());
    source.values(store, 0, n, &mut values, &mut scratch).map_err(context)?;
    let codec = codec(dtype).ok_or_else(|| Error::unsupported(format!("{dtype} cannot be written")))?;
    let mut bytes = vec![0; dtype.bytes_for(n)? as usize];
    codec.encode(&values, values.len(), None, &mut bytes)?;
    let mut back = vec![0.0f32; values.len()];
    codec.decode(&bytes, &mut back)?;
    Ok(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()))
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

fn pretty(value: &Json) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}
