//! PEFT adapter -> GGUF adapter, which llama.cpp adds to a base model when it runs.
//!
//! llama.cpp computes `scale * alpha / r * B A x`; `NAME.lora_a` is A of (r, inputs) and `NAME.lora_b`
//! is B of (outputs, r), for the tensor NAME of the base. Of the token embedding it reads rows, so
//! there `lora_a` is A transposed. Source: `llm_graph_context::build_lora_mm`, `build_lora_mm_id` and
//! `build_inp_embd` in llama.cpp's `llama-graph.cpp`, and `llama-adapter.cpp`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::Value as Json;

use super::adapter::{Adapter, Pair};
use super::checkpoint::Checkpoint;
use super::gather::Source;
use super::general::{Described, General, ParameterCounts};
use super::plan::{Plan, TensorPlan};
use super::quantizer::QUANTIZATION_VERSION;
use super::shards::{Sharding, lay_out};
use super::side_files::{SideFiles, is_qpack_file};
use super::types::{FileType, LORA_A, LORA_B};
use super::{Job, MetadataEdits, output_path};
use crate::arch::{self, Data, Elementwise, Mapped, Model, Piece, Placed, Placer};
use crate::container::gguf::{Array, Gguf, Metadata, Value, is_gguf};
use crate::container::side::read_json;
use crate::container::{Factor, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::tensor::{Axes, StridedCopy, TensorInfo, elements};

const TOKEN_EMBD: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";
const MERGE: &str = "merge the adapter into its base: qconv hf-to-gguf --merge-lora";

/// A conversion of an adapter.
#[derive(Clone, Debug, Default)]
pub struct LoraToGguf {
    /// The adapter's directory, or a file in it.
    pub adapter: PathBuf,
    /// The base: a directory with config.json, that file, a GGUF or a `.qpack` file. Weights need not be there;
    /// where they are, shapes are checked.
    pub base: PathBuf,
    /// The file to write, or a directory for it; default: beside the adapter.
    pub output: Option<PathBuf>,
    /// Type of the matrices; `None` keeps the precision of the source.
    pub file_type: Option<FileType>,
    /// Architecture, where the config's class is unknown.
    pub arch: Option<String>,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Changes to the metadata.
    pub edits: MetadataEdits,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// What is known of the base.
struct Base {
    model: Model,
    weights: BaseWeights,
}

enum BaseWeights {
    Unknown,
    HuggingFace(Store),
    Gguf(Store),
}

/// A pair of tensors of the output, while its parts come in.
struct Target {
    a: Mapped,
    b: Mapped,
    rank: u64,
    /// `alpha` as llama.cpp would need it for this tensor alone.
    alpha: f64,
    /// Which pairs went into it: those of experts by their number, parts by their first row.
    parts: BTreeMap<u64, String>,
    /// How many experts there are, where they are stacked.
    experts: Option<u64>,
}

/// A factor, as seen from what it adds to a tensor: its rows, or its columns.
struct Side<'a> {
    tensor: &'a TensorInfo,
    /// Elements from one row (or column) to the next.
    along: u64,
    /// Elements from one step of the rank to the next.
    rank: u64,
}

impl LoraToGguf {
    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// Everything that can be wrong with an adapter but its tensors' contents.
    pub fn plan(&self) -> Result<Job> {
        let adapter = Adapter::open(&self.adapter, &self.limits)?;
        let base = self.open_base()?;
        let targets = targets(&adapter, &base).map_err(|e| e.at(&adapter.dir))?;
        let file_type = self.file_type.unwrap_or_else(|| FileType::of_source(&adapter.store, None));
        // One alpha for all where all agree; else what differs goes into B.
        let alpha = targets.values().next().map_or(0.0, |t| t.alpha) as f32;
        let mut plan = Plan::new(Vec::with_capacity(2 * targets.len()));
        for target in targets.into_values() {
            let Target { a, mut b, alpha: own, .. } = target;
            let factor = (own / f64::from(alpha)) as f32;
            if let (Data::Copied { elementwise, .. }, true) = (&mut b.data, own as f32 != alpha) {
                elementwise.push(Elementwise::Affine { mul: factor, add: 0.0 });
            }
            for m in [a, b] {
                let (dtype, wanted) = file_type.choose(&m.name, &m.shape, None, m.fixed);
                let source = Source::new(&m, &adapter.store).map_err(|e| e.at(&adapter.dir))?;
                plan.tensors.push(TensorPlan::new(m.name, m.shape, dtype, wanted, source)?);
            }
        }
        plan.note_fallbacks();
        if matches!(base.weights, BaseWeights::Unknown) {
            plan.notes.push("the base's weights are not there, so shapes were not compared with it".into());
        }
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", base.model.arch.arch.as_str());
        metadata.set("general.type", "adapter");
        metadata.set("adapter.type", "lora");
        let dir_name = adapter.dir.canonicalize().unwrap_or_else(|_| adapter.dir.clone());
        let described = Described {
            dir_name: &dir_name.file_name().map(|n| n.to_string_lossy()).unwrap_or_default(),
            config: &Json::Null,
            generation: None,
            model_card: adapter.model_card.as_deref(),
        };
        let general = General::derive(&described, ParameterCounts::default(), self.edits.name.as_deref());
        general.write(&mut metadata);
        metadata.set("adapter.lora.alpha", Value::F32(alpha));
        if !adapter.invocation_tokens.is_empty() {
            let tokens = Array::U32(adapter.invocation_tokens.clone());
            metadata.set("adapter.alora.invocation_tokens", Value::Array(tokens));
        }
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
        self.edits.apply(&mut metadata)?;
        let beside = adapter.dir.parent().filter(|p| !p.as_os_str().is_empty());
        let name = general.file_name(file_type.name(), false).replace(".gguf", "-LoRA.gguf");
        let output = output_path(self.output.as_deref(), beside.unwrap_or(Path::new(".")), &name);
        lay_out(&mut plan, &mut metadata, &Sharding::default(), &output)?;
        let store = std::sync::Arc::into_inner(adapter.store);
        let store = store.ok_or_else(|| Error::misuse("the adapter is still in use"))?;
        Ok(Job::gguf(plan, store, &output))
    }

    fn open_base(&self) -> Result<Base> {
        let path = &self.base;
        if path.is_file() && is_gguf(path)? {
            let gguf = Gguf::open(path, &self.limits)?;
            let tensors = gguf.store.tensors();
            let model = match &self.arch_file {
                Some(file) => Model::from_gguf_as(arch::read(file, &self.limits)?, &gguf.metadata, tensors),
                None => Model::from_gguf(&gguf.metadata, tensors),
            };
            return Ok(Base {
                model: model.map_err(|e| e.at(path))?,
                weights: BaseWeights::Gguf(gguf.store),
            });
        }
        let is_whole = path.is_dir() || is_qpack_file(path)?;
        let side = SideFiles::of(path, &self.limits)?;
        let config_path = if is_whole { side.dir().join("config.json") } else { path.clone() };
        let config = read_json::<Json>(&config_path, self.limits.side_file_bytes);
        let config = config.map_err(side.place())?.ok_or_else(|| {
            Error::unsupported("has no config.json")
                .at(path)
                .hint("give the base's directory, its config.json, or a GGUF file of it")
        })?;
        // Weights that are there are compared with; a base without any, or of a kind that cannot be
        // read, serves by its config alone.
        let weights = match is_whole.then(|| Checkpoint::open(path, &self.limits)) {
            Some(Ok(checkpoint)) => BaseWeights::HuggingFace(checkpoint.store),
            Some(Err(e)) if e.kind() != ErrorKind::Unsupported => return Err(e),
            _ => BaseWeights::Unknown,
        };
        let tensors = match &weights {
            BaseWeights::HuggingFace(store) => store.tensors(),
            _ => &[],
        };
        let model = match &self.arch_file {
            Some(file) => arch::take_for(arch::read(file, &self.limits)?, &config),
            None => arch::recognise(&config, tensors, self.arch.as_deref()),
        };
        let mut model = model.map_err(|e| e.at(&config_path)).map_err(side.place())?;
        // Unless more tokens are known than there are, embeddings are taken over whole.
        model.facts_mut().n_tokens = model.var("vocab_size")?.as_u64();
        Ok(Base { model, weights })
    }
}

/// The tensors of the output, by the name of the tensor that each pair changes.
fn targets(adapter: &Adapter, base: &Base) -> Result<IndexMap<String, Target>> {
    let placer = base.model.placer()?;
    if let BaseWeights::HuggingFace(store) = &base.weights {
        adapter.products(&placer, store)?;
    }
    let mut targets: IndexMap<String, Target> = IndexMap::new();
    for pair in &adapter.pairs {
        let context = |e: Error| e.context(format!("adapter's {:?}", pair.name));
        let product = pair.product(&placer, &adapter.store).map_err(context)?;
        for placed in placer.place(&pair.weight(product.rows, product.columns)).map_err(context)? {
            add(&mut targets, pair, placed, &product.left, &product.right).map_err(context)?;
        }
    }
    for (name, target) in &targets {
        check(name, target, base, &placer)?;
    }
    Ok(targets)
}

/// Adds what one pair contributes to one tensor.
fn add(
    targets: &mut IndexMap<String, Target>,
    pair: &Pair,
    placed: Placed,
    left: &Factor,
    right: &Factor,
) -> Result<()> {
    let rank = pair.rank;
    let (along, step) = left.strides();
    let left = Side { tensor: &left.tensor, along, rank: step };
    let (step, along) = right.strides();
    let right = Side { tensor: &right.tensor, along, rank: step };
    let (outer, inner) = if placed.turned { (right, left) } else { (left, right) };
    let by_rank = |side: &Side<'_>| Axes::new(&[rank]).scaled(side.rank);
    let rows = placed.rows.scaled(outer.along);
    let columns = placed.columns.scaled(inner.along);
    let ((a, a_side), (b, b_side)) = if placed.target == TOKEN_EMBD {
        ((rows.then(by_rank(&outer)), &outer), (columns.then(by_rank(&inner)), &inner))
    } else {
        ((by_rank(&inner).then(columns), &inner), (rows.then(by_rank(&outer)), &outer))
    };
    let (mut a_shape, mut b_shape) = (a.shape(), b.shape());
    let (a_len, b_len) = (elements(&a_shape)?, elements(&b_shape)?);
    let (number, a_at, b_at) = match (placed.stack, placed.joined) {
        (Some((e, n)), _) => {
            a_shape.insert(0, n);
            b_shape.insert(0, n);
            (e, Some(e.saturating_mul(a_len)), e.saturating_mul(b_len))
        }
        (None, Some((first, total))) => {
            b_shape[0] = total;
            // All parts have the same columns, so A is there once.
            (first, (first == 0).then_some(0), first.saturating_mul(elements(&b_shape[1..])?))
        }
        (None, None) => (0, Some(0), 0),
    };
    elements(&a_shape)?;
    elements(&b_shape)?;
    let alpha = pair.scaling * rank as f64 * f64::from(placed.factor);
    let empty = |suffix: &str, shape: &[u64]| Mapped {
        name: format!("{}{suffix}", placed.target),
        shape: shape.to_vec(),
        data: Data::Copied { pieces: Vec::new(), elementwise: Vec::new() },
        fixed: None,
    };
    let target = targets.entry(placed.target.clone()).or_insert_with(|| Target {
        a: empty(LORA_A, &a_shape),
        b: empty(LORA_B, &b_shape),
        rank,
        alpha,
        parts: BTreeMap::new(),
        experts: placed.stack.map(|(_, n)| n),
    });
    if target.rank != rank || target.alpha != alpha || target.a.shape != a_shape || target.b.shape != b_shape
    {
        return Err(Error::unsupported(format!(
            "its rank, alpha or shape is not that of the others that go into {:?} with it",
            placed.target
        ))
        .hint(MERGE));
    }
    if let Some(other) = target.parts.insert(number, pair.name.clone()) {
        return Err(Error::malformed(format!("takes the same place as {other:?}")));
    }
    if let Some(at) = a_at {
        push(&mut target.a, a_side, a.into_copy(at));
    }
    push(&mut target.b, b_side, b.into_copy(b_at));
    Ok(())
}

fn push(mapped: &mut Mapped, side: &Side<'_>, copy: StridedCopy) {
    if let Data::Copied { pieces, .. } = &mut mapped.data {
        pieces.push(Piece { source: side.tensor.name.clone(), copy });
    }
}

/// Whether the tensor is complete, and llama.cpp will find what it changes.
fn check(name: &str, target: &Target, base: &Base, placer: &Placer<'_>) -> Result<()> {
    if let Some(n) = target.experts
        && let Some(lacking) = (0..n).find(|e| !target.parts.contains_key(e))
    {
        let one = target.parts.values().next().map_or("", String::as_str);
        return Err(Error::unsupported(format!(
            "adapts {one:?}, but of expert {lacking} of the {n} in its layer nothing; a GGUF adapter has all or none"
        ))
        .hint(MERGE));
    }
    if (name == TOKEN_EMBD || name == OUTPUT) && tied(base, placer) {
        return Err(Error::unsupported(format!(
            "adapts {name:?}, but the base has one matrix for embedding and output, which llama.cpp cannot adapt apart"
        ))
        .hint(MERGE));
    }
    let BaseWeights::Gguf(store) = &base.weights else { return Ok(()) };
    let Some(TensorInfo { shape, .. }) = store.get(name) else {
        return Err(Error::malformed(format!("adapts {name:?}, which the base lacks"))
            .hint("the adapter was made for another base"));
    };
    let of = |m: &Mapped| {
        (m.shape.first().copied(), m.shape.iter().rev().nth(1).copied(), m.shape.last().copied())
    };
    let ((a_first, a_rows, a_columns), (b_first, b_rows, _)) = (of(&target.a), of(&target.b));
    let expected: Vec<Option<u64>> = shape.iter().copied().map(Some).collect();
    let found = match (name == TOKEN_EMBD, target.experts) {
        (true, _) => vec![a_rows, b_rows],
        (false, None) => vec![b_rows, a_columns],
        (false, Some(_)) => vec![a_first.filter(|_| a_first == b_first), b_rows, a_columns],
    };
    if expected != found {
        let found: Vec<u64> = found.into_iter().flatten().collect();
        return Err(Error::malformed(format!("adapts {name:?} as {found:?}, the base has it as {shape:?}"))
            .hint("the adapter was made for another base"));
    }
    Ok(())
}

/// Whether the base's embedding is its output, too.
fn tied(base: &Base, placer: &Placer<'_>) -> bool {
    match &base.weights {
        BaseWeights::Gguf(store) => store.get(OUTPUT).is_none(),
        BaseWeights::HuggingFace(store) => {
            let makes_output = |t: &TensorInfo| {
                placer.place(t).is_ok_and(|placed| placed.iter().any(|p| p.target == OUTPUT))
            };
            !store.tensors().iter().any(makes_output)
        }
        BaseWeights::Unknown => {
            let says = base.model.config().get("tie_word_embeddings").and_then(Json::as_bool);
            says.unwrap_or(false) || !placer.knows_target(OUTPUT)
        }
    }
}
