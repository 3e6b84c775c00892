//! Hugging Face directory -> GGUF file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::adapter::Adapter;
use super::checkpoint::{Checkpoint, GGUF_METADATA_FILE, is_conv1d};
use super::edits::{MetadataEdits, parse_typed};
use super::gather::Source;
use super::general::{self, Described, General, ParameterCounts};
use super::plan::{Plan, TensorPlan};
use super::quantizer::{QUANTIZATION_VERSION, Quantizer, Unquantized};
use super::sentence::Sentence;
use super::shards::{Sharding, lay_out};
use super::side_files::SideFiles;
use super::tokens::{self, TokenCheck};
use super::types::{FileType, is_decoded};
use super::{Job, output_path};
use crate::arch::{self, Facts, Mapped, Model};
use crate::block::codec;
use crate::container::Store;
use crate::container::gguf::{Metadata, Value};
use crate::container::side::read_json;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed;
use crate::tensor::{DType, TensorInfo};
use crate::vocab;

/// An adapter to be merged into the weights, so many times.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeLora {
    /// The adapter's directory.
    pub adapter: PathBuf,
    /// What its change is multiplied by; 1 is the adapter as it was trained.
    pub scale: f32,
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
    /// What becomes of weights that were quantized in a way that no type holds, where `file_type` and `quantizer`
    /// are `None`: a type that the converter writes; F16 where rows do not fit it. `None`: as other weights.
    pub decoded: Option<FileType>,
    /// How the output is divided into files.
    pub sharding: Sharding,
    /// Whether to write the projector of a model that sees or hears, and not its language model.
    pub mmproj: bool,
    /// Architecture, where the config's class is unknown.
    pub arch: Option<String>,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Pre-tokenizer, instead of finding out.
    pub pre: Option<String>,
    /// Whether llama.cpp's tokens must be those of the source's tokenizer.
    pub tokens: TokenCheck,
    /// Adapters that are merged into the weights, in this order.
    pub merge_lora: Vec<MergeLora>,
    /// Changes to the metadata.
    pub edits: MetadataEdits,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// Block types that integers of the source may become without rounding.
const EXACT: [DType; 7] = {
    let [a, b, c, d, e, f] = packed::BLOCKS;
    [a, b, c, d, e, f, DType::TQ1_0]
};

/// A source that has been opened and recognised: everything but types and places is known.
pub struct Recognised {
    pub checkpoint: Checkpoint,
    pub model: Model,
    /// Its pre-tokenizer is still to be chosen. A projector has none.
    pub vocab: Option<(vocab::Vocab, vocab::Candidates)>,
    /// What was done on the way.
    pub notes: Vec<String>,
}

impl HfToGguf {
    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// Everything that can be wrong with a source but its tensors' contents.
    pub fn plan(&self) -> Result<Job> {
        let recognised = self.recognise()?;
        let place = recognised.checkpoint.side.place();
        self.plan_recognised(recognised).map_err(place)
    }

    fn plan_recognised(&self, recognised: Recognised) -> Result<Job> {
        let Recognised { mut checkpoint, mut model, vocab, mut notes } = recognised;
        let sentence = Sentence::read(&checkpoint.dir, &self.limits)?;
        let mapped = self.mapped(&model, &mut checkpoint)?;
        let store = &checkpoint.store;
        for dtype in EXACT {
            let is_moved = |t: &&TensorInfo| t.dtype == dtype && store.grouped(t).is_some();
            let n = store.tensors().iter().filter(is_moved).count();
            if n > 0 {
                notes.push(format!("{n} tensors of the source keep their codes and scales, as {dtype}"));
            }
        }
        let file_type = match (self.file_type, &self.quantizer) {
            (Some(given), _) => given,
            (None, None) => FileType::of_source(&checkpoint.store, self.decoded.map(|t| t.dtype)),
            // The recipe decides about what could be kept, too.
            (None, Some(_)) => FileType::of_source(&checkpoint.store, None).main(),
        };
        let facts = model.facts_mut();
        (facts.file_type, facts.pooling) = (Some(file_type.id), sentence.pooling);
        let size = counts(&mapped)?;
        let (vocab, tokens) = match vocab {
            Some((vocab, candidates)) => {
                let (vocab, tokens) = tokens::choose(&checkpoint.dir, vocab, candidates, self.tokens)?;
                (Some(vocab), tokens)
            }
            None => (None, None),
        };
        let described = Described {
            dir_name: &checkpoint.side.model_name(),
            config: &checkpoint.config,
            generation: checkpoint.generation.as_ref(),
            model_card: checkpoint.model_card.as_deref(),
        };
        let general = General::derive(&described, size, self.edits.name.as_deref());
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", model.arch.arch.as_str());
        metadata.set("general.type", if self.mmproj { "mmproj" } else { "model" });
        general.write(&mut metadata);
        restore(&mut metadata, &checkpoint.dir, &self.limits)?;
        let config_path = checkpoint.dir.join("config.json");
        for (key, value) in model.metadata().map_err(|e| e.at(&config_path))?.0 {
            metadata.set(key, value);
        }
        let mut number_of = |name: &str| one_number(&checkpoint.store, name);
        for (key, value) in model.scalars(&mut number_of).map_err(|e| e.at(&checkpoint.dir))?.0 {
            metadata.set(key, value);
        }
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
        if let Some(vocab) = &vocab {
            vocab.to_metadata(&mut metadata);
        }
        let mut plan = match &self.quantizer {
            Some(quantizer) => {
                let unquantized = |m: Mapped| {
                    let (dtype, _) = file_type.choose(&m.name, &m.shape, None, m.fixed);
                    Unquantized { mapped: m, dtype, place: (0, 0) }
                };
                let tensors = mapped.into_iter().map(unquantized).collect();
                let plan = quantizer.plan(tensors, &checkpoint.store, &mut metadata, &self.limits);
                plan.map_err(|e| e.at(&checkpoint.dir))?
            }
            None => {
                converted(file_type, self.decoded.filter(|_| self.file_type.is_none()), mapped, &checkpoint)?
            }
        };
        let notes = notes
            .into_iter()
            .chain(model.warnings().map_err(|e| e.at(&config_path))?)
            .chain(sentence.notes)
            .chain(checkpoint.notes());
        let other = (!self.mmproj && arch::has_projector(&checkpoint.config))
            .then(|| "this is the language model; what sees or hears is written by --mmproj".to_string());
        let renamed = vocab.as_ref().and_then(|v| general::avoid_phi3(&mut metadata, &v.tokens));
        let of_vocab = vocab.into_iter().flat_map(|v| v.notes);
        plan.notes.splice(0..0, notes.chain(of_vocab).chain(renamed).chain(other));
        self.edits.apply(&mut metadata)?;
        let type_name = self.quantizer.as_ref().map_or(file_type.name(), |q| &q.recipe.name);
        let name = general.file_name(type_name, self.mmproj);
        let output = output_path(self.output.as_deref(), checkpoint.side.beside(), &name);
        lay_out(&mut plan, &mut metadata, &self.sharding, &output)?;
        Job { tokens, ..Job::gguf(plan, checkpoint.store, &output) }.vouching(&self.source)
    }

    /// The small files of the source, such as those of its tokenizer.
    ///
    /// # Errors
    /// As [`SideFiles::of`].
    pub fn side_files(&self) -> Result<SideFiles> {
        SideFiles::of(&self.source, &self.limits)
    }

    /// Opens the source, and recognises architecture and vocabulary. What the model may ask about
    /// the source is known to it then, but for the file type.
    ///
    /// # Errors
    /// What is no model, unknown architectures, unknown tokenizers.
    pub fn recognise(&self) -> Result<Recognised> {
        let checkpoint = Checkpoint::open(&self.source, &self.limits)?;
        let place = checkpoint.side.place();
        self.recognise_opened(checkpoint).map_err(place)
    }

    fn recognise_opened(&self, mut checkpoint: Checkpoint) -> Result<Recognised> {
        // Of transposed matrices blocks are across.
        let types = if is_conv1d(&checkpoint.config) { Vec::new() } else { self.exact_types() };
        packed::give_blocks(&mut checkpoint.store, &types)?;
        let config_path = checkpoint.dir.join("config.json");
        if self.mmproj {
            let model = self.recognise_projector(&checkpoint).map_err(|e| e.at(&config_path))?;
            return Ok(Recognised { checkpoint, model, vocab: None, notes: Vec::new() });
        }
        let model = match &self.arch_file {
            Some(path) => arch::take_for(arch::read(path, &self.limits)?, &checkpoint.config),
            None => arch::recognise(&checkpoint.config, checkpoint.store.tensors(), self.arch.as_deref()),
        };
        let mut model = model.map_err(|e| e.at(&config_path))?;
        let vocab_size = model.var("vocab_size").map_err(|e| e.at(&config_path))?.as_u64();
        let (mut vocab, candidates) = vocab::load_undecided(
            &vocab::Source {
                dir: &checkpoint.dir,
                config: &checkpoint.config,
                vocab_size,
                pre: self.pre.as_deref(),
                kinds: &model.arch.tokenizer.kinds,
            },
            &self.limits,
        )?;
        for (role, token) in &model.arch.tokenizer.special {
            vocab.name_special(role, token)?;
        }
        if vocab.kind == vocab::Kind::Spm {
            vocab.add_space_prefix = model.arch.tokenizer.add_space_prefix.or(vocab.add_space_prefix);
        }
        model.facts_mut().n_tokens = Some(vocab.tokens.len() as u64);
        let mut notes = Vec::new();
        for MergeLora { adapter, scale } in &self.merge_lora {
            let adapter = Adapter::open(adapter, &self.limits)?;
            adapter.merge(&model.placer()?, &mut checkpoint.store, *scale)?;
            let (n, dir) = (adapter.pairs.len(), adapter.dir.display());
            notes.push(format!("{n} weights are changed by {dir}, {scale} times"));
        }
        Ok(Recognised { checkpoint, model, vocab: Some((vocab, candidates)), notes })
    }

    /// The tensors that a checkpoint becomes. Those of which one is made give the same type.
    fn mapped(&self, model: &Model, checkpoint: &mut Checkpoint) -> Result<Vec<Mapped>> {
        let mapped = model.map(checkpoint.store.tensors()).map_err(|e| e.at(&checkpoint.dir))?;
        for m in &mapped {
            let store = &checkpoint.store;
            let dtypes: BTreeSet<DType> =
                m.sources().filter_map(|name| Some(store.get(name)?.dtype)).collect();
            let sources: Vec<&str> = m.sources().collect();
            if dtypes.len() > 1
                && sources.iter().any(|name| store.get(name).is_some_and(|t| store.grouped(t).is_some()))
            {
                packed::give_same(&mut checkpoint.store, &sources, &self.exact_types())?;
            }
        }
        Ok(mapped)
    }

    /// The block types that integers of the source may become without rounding.
    fn exact_types(&self) -> Vec<DType> {
        let wanted = match (&self.quantizer, self.file_type) {
            (Some(quantizer), _) => quantizer.recipe.dtype,
            (None, Some(file_type)) => file_type.dtype,
            (None, None) => return packed::BLOCKS.to_vec(),
        };
        EXACT.into_iter().filter(|block| *block == wanted).collect()
    }

    fn recognise_projector(&self, checkpoint: &Checkpoint) -> Result<Model> {
        if !self.merge_lora.is_empty() {
            return Err(Error::misuse("adapters change the language model, and not a projector"));
        }
        let facts = Facts {
            added_tokens: vocab::added_token_ids(&checkpoint.dir, &self.limits)?,
            preprocessor: checkpoint.preprocessor(&self.limits)?,
            ..Facts::default()
        };
        match &self.arch_file {
            Some(path) => {
                arch::take_for_projector(arch::read(path, &self.limits)?, &checkpoint.config, facts)
            }
            None => arch::recognise_projector(&checkpoint.config, self.arch.as_deref(), facts),
        }
    }
}

/// The number that a tensor holds.
fn one_number(store: &Store, name: &str) -> Result<f32> {
    let t = store.get(name).ok_or_else(|| Error::malformed(format!("tensor {name:?} is missing")))?;
    let mut value = [0.0];
    match codec(t.dtype) {
        Some(codec) if t.elements() == 1 => codec.decode(&store.read_all(t)?, &mut value)?,
        _ => {
            let why = format!("tensor {name:?} is {} {:?}, one number was expected", t.dtype, t.shape);
            return Err(Error::malformed(why));
        }
    }
    Ok(value[0])
}

/// The tensors a source becomes in GGUF, tied to their store: what `verify` compares with.
///
/// # Errors
/// As [`HfToGguf::plan`].
pub fn source_tensors(source: &HfToGguf) -> Result<(Store, Vec<Mapped>)> {
    let Recognised { mut checkpoint, model, .. } = source.recognise()?;
    let mapped = source.mapped(&model, &mut checkpoint)?;
    Ok((checkpoint.store, mapped))
}

/// Every tensor in the type that llama.cpp's converter gives it; those that were decoded as `decoded` has them.
fn converted(
    file_type: FileType,
    decoded: Option<FileType>,
    mapped: Vec<Mapped>,
    checkpoint: &Checkpoint,
) -> Result<Plan> {
    let store = &checkpoint.store;
    let was_decoded =
        |m: &Mapped| m.sources().any(|name| store.get(name).is_some_and(|t| is_decoded(store, t)));
    let mut plan = Plan::new(Vec::with_capacity(mapped.len()));
    for m in mapped {
        let source = Source::new(&m, &checkpoint.store).map_err(|e| e.at(&checkpoint.dir))?;
        // Blocks are kept where they can be moved.
        let stored = source.dtype().filter(|dtype| source.is_plain(*dtype));
        let is_apart = stored.is_none() && source.dtype().is_some_and(DType::is_block);
        let file_type = decoded.filter(|_| is_apart || was_decoded(&m)).unwrap_or(file_type);
        let (dtype, wanted) = file_type.choose(&m.name, &m.shape, stored, m.fixed);
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
