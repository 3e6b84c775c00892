//! What `quantize` and `hf-to-gguf` share: a model's tensors and metadata become those of a
//! quantized file, as llama-quantize would write it, tensor by tensor and key by key.
//! Source: `llama_model_quantize_impl` (llama-quant.cpp), `tools/quantize`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::fold::plan_folds;
use super::gather::Source;
use super::guide::{Guiding, MethodChoice, Way};
use super::outcome::Fallback;
use super::plan::{Importance, Obstacle, Plan, Rounding, TensorPlan};
use super::recipe::{Choice, ModelFacts, Overrides, Recipe, loader_order};
use crate::arch::Mapped;
use crate::block::{codec, lattice};
use crate::container::Store;
use crate::container::gguf::{Array, Metadata, Value};
use crate::container::imatrix::{Entry, ImportanceMatrix};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::DType;

/// `GGML_QUANT_VERSION` (ggml.h): the generation of block layouts.
pub(super) const QUANTIZATION_VERSION: u32 = 2;

/// What begins the stream of each token.
const EMBEDDINGS: &str = "token_embd.weight";

/// How a model shall be quantized.
#[derive(Clone, Debug)]
pub struct Quantizer {
    /// The file type.
    pub recipe: &'static Recipe,
    /// What the user decides in the recipe's place.
    pub overrides: Overrides,
    /// The importance matrix.
    pub imatrix: Option<ImatrixChoice>,
    /// How codes are chosen, where it is not as llama.cpp does.
    pub method: Option<MethodChoice>,
    /// Plan as if no method were asked for, as long as its moments are not there.
    pub ignore_methods: bool,
    /// Layers to leave out; the others are numbered anew.
    pub prune_layers: BTreeSet<u64>,
    /// `KEY=TYPE:VALUE` with the types int, float, bool and str, as llama-quantize takes them.
    pub override_kv: Vec<String>,
    /// Whether tensors that are quantized already may be quantized again.
    pub allow_requantize: bool,
}

/// An importance matrix, and which of its entries count.
#[derive(Clone, Debug)]
pub struct ImatrixChoice {
    /// GGUF or .dat file, as the user named it.
    pub path: PathBuf,
    /// Entries whose name contains one of these; all where empty.
    pub include: Vec<String>,
    /// But not those whose name contains one of these.
    pub exclude: Vec<String>,
}

/// A tensor as it would be in a file that is not quantized.
pub(super) struct Unquantized {
    pub mapped: Mapped,
    /// Its type there.
    pub dtype: DType,
    /// Its place in the source: file, and offset in it.
    pub place: (usize, u64),
}

impl Quantizer {
    /// With a recipe and no options.
    pub fn new(recipe: &'static Recipe) -> Self {
        Self {
            recipe,
            overrides: Overrides::default(),
            imatrix: None,
            method: None,
            ignore_methods: false,
            prune_layers: BTreeSet::new(),
            override_kv: Vec::new(),
            allow_requantize: false,
        }
    }

    /// The methods that may be used: those of the recipe's rules too.
    pub fn methods(&self) -> Option<MethodChoice> {
        if self.ignore_methods {
            return None;
        }
        let by_rule: Vec<Way> = self.recipe.ways().collect();
        match (&self.method, by_rule.is_empty()) {
            (None, true) => None,
            (choice, _) => Some(MethodChoice { by_rule, ..choice.clone().unwrap_or_default() }),
        }
    }

    /// With second moments that were missing.
    pub fn take_moments(&mut self, moments: PathBuf) {
        self.ignore_methods = false;
        self.method.get_or_insert_default().moments = Some(moments);
    }

    /// Plans every tensor, and turns `metadata` into those of the quantized file. Files and offsets
    /// are still to be laid out.
    ///
    /// # Errors
    /// Options that do not fit the model; tensors that are quantized already, unless that is
    /// allowed; an importance matrix that is missing or does not fit.
    pub(super) fn plan(
        &self,
        tensors: Vec<Unquantized>,
        store: &Store,
        metadata: &mut Metadata,
        limits: &Limits,
    ) -> Result<Plan> {
        let mut plan = Plan::new(Vec::with_capacity(tensors.len()));
        let imatrix = match &self.imatrix {
            Some(choice) => Some(Weighing::open(choice, limits)?),
            None => None,
        };
        let guiding =
            self.methods().map(|choice| Guiding::open(&choice, imatrix.is_some(), limits)).transpose()?;
        append(metadata, "general.quantization_version", Value::U32(QUANTIZATION_VERSION));
        append(metadata, "general.file_type", Value::U32(self.recipe.id));
        for entry in &self.override_kv {
            let (key, value) = parse_override(entry)?;
            append(metadata, key, value);
        }
        if let (Some(choice), Some(weighing)) = (&self.imatrix, &imatrix) {
            weighing.describe(choice, metadata);
        }
        let facts = ModelFacts::from_metadata(metadata)?;
        let mut tensors = self.prune(tensors, metadata)?;
        match self.overrides.file_order {
            true => tensors.sort_by_key(|t| t.unquantized.place),
            false => tensors.sort_by(|a, b| loader_order(&a.original, &b.original)),
        }
        let targets: Vec<(&str, DType, &[u64])> = tensors
            .iter()
            .map(|t| {
                (t.unquantized.mapped.name.as_str(), t.unquantized.dtype, &t.unquantized.mapped.shape[..])
            })
            .collect();
        let overrides = Overrides { imatrix: imatrix.is_some(), ..self.overrides.clone() };
        let choices = self.recipe.choose(&facts, &overrides, &targets)?;
        let mut weighing = imatrix.map(|w| (w, Report::default()));
        let mut originals = Vec::with_capacity(tensors.len());
        let mut embeddings = None;
        for (t, choice) in tensors.into_iter().zip(choices) {
            let original = t.original.clone();
            let planned = self.plan_tensor(t, &choice, store, weighing.as_mut(), guiding.as_ref())?;
            let lacks = self.lacks_importance(&planned, &choice);
            if let (Some(what), None) = (lacks, &plan.obstacle) {
                plan.obstacle = Some(Obstacle {
                    message: format!("tensor {original:?}: {what}"),
                    hint: "give one with --imatrix FILE; llama.cpp's imatrix tool makes them, and who publishes \
                           quantized models often adds the matrix"
                        .into(),
                    yields: false,
                });
            }
            if original == EMBEDDINGS && planned.is_rounded() {
                let way = guiding.as_ref().and_then(|g| g.way(&planned.name, choice.way));
                embeddings = way.map(|way| (plan.tensors.len(), way));
            }
            plan.tensors.push(planned);
            originals.push(original);
        }
        if let (Some(guiding), Some((number, Way::Method(method)))) = (&guiding, embeddings) {
            let arch = metadata.str("general.architecture").unwrap_or_default();
            let guide = guiding.guide_embeddings(method, &plan.tensors, &originals, number, arch)?;
            if let Some(guide) = guide {
                plan.tensors[number].rounding = Rounding::Guided(Box::new(guide));
                plan.tensors[number].fallback = None;
            }
        }
        plan.note_fallbacks();
        if let Some(guiding) = &guiding
            && let Some(folding) = guiding.choice.fold
        {
            plan_folds(folding, guiding.moments.clone(), &mut plan, &originals, metadata)?;
        }
        plan.notes.extend(guiding.iter().flat_map(|g| g.notes(&plan.tensors)));
        if let Some((weighing, report)) = weighing {
            plan.notes.extend(report.notes(&weighing, plan.tensors.len()));
        }
        Ok(plan)
    }

    fn plan_tensor(
        &self,
        tensor: Tensor,
        choice: &Choice,
        store: &Store,
        weighing: Option<&mut (Weighing, Report)>,
        guiding: Option<&Guiding>,
    ) -> Result<TensorPlan> {
        let Tensor { unquantized: Unquantized { mapped, dtype, place }, original } = tensor;
        let context = |e: Error| e.context(format!("tensor {original:?}"));
        let source = Source::new(&mapped, store)?;
        let stays = choice.dtype == dtype;
        if !stays && dtype.is_block() && !self.allow_requantize {
            return Err(context(Error::misuse(format!("is quantized already ({dtype})")))
                .hint("start from the full-precision file, or accept the loss with --allow-requantize"));
        }
        let mut shape = mapped.shape;
        while shape.len() > 1 && shape[0] == 1 {
            shape.remove(0); // ggml writes no outer dimensions of 1
        }
        let mut planned = TensorPlan::new(mapped.name, shape, choice.dtype, choice.wanted, source)?;
        planned.file = place.0;
        let codec = codec(choice.dtype);
        let weighing = weighing.map(|(weighing, report)| {
            report.present.insert(original.clone());
            (weighing, report)
        });
        if stays {
            return Ok(planned);
        }
        guiding.map_or(Ok(()), |g| g.check_fit(&original, &planned)).map_err(context)?;
        let way = guiding.and_then(|g| g.way(&planned.name, choice.way));
        if let (Some(Way::Method(method)), Some(guiding), true) = (way, guiding, planned.is_rounded()) {
            let grid =
                lattice(planned.dtype).ok_or_else(|| format!("type {} has no fixed grid", planned.dtype));
            let (found, why) = match grid.and_then(|grid| guiding.guide(method, &original, *grid)) {
                Ok((guide, some)) => (Some(guide), some),
                Err(all) => (None, Some(all)),
            };
            planned.fallback = why.map(|why| Fallback { wanted: method.name(), why });
            if let Some(guide) = found {
                planned.rounding = Rounding::Guided(Box::new(guide));
                return Ok(planned);
            }
        }
        if codec.is_none_or(|c| !c.heeds_importance()) || way == Some(Way::Rtn) {
            return Ok(planned);
        }
        let by_matrix = match weighing {
            Some((weighing, report)) => weighing.find(&original, &planned, report).map_err(context)?,
            None => None,
        };
        // Where llama.cpp's result is not what is asked for, the better search is taken in any case.
        let searching = way.and(guiding);
        let importance = by_matrix.or_else(|| searching?.diagonal(&original));
        planned.rounding = match (importance, searching) {
            (Some(importance), _) => Rounding::Weighed(importance),
            (None, Some(_)) => Rounding::Even,
            (None, None) => Rounding::Nearest,
        };
        Ok(planned)
    }

    /// Why a tensor cannot be written without an importance, if it has none.
    fn lacks_importance(&self, planned: &TensorPlan, choice: &Choice) -> Option<String> {
        let needed = choice.needs_imatrix || codec(planned.dtype).is_some_and(|c| c.needs_importance());
        if !matches!(planned.rounding, Rounding::Nearest) || planned.is_plain() || !needed {
            return None;
        }
        Some(match &self.imatrix {
            None => format!("type {} needs an importance matrix", planned.dtype),
            Some(_) => format!("type {} needs an importance, and the matrix has none for it", planned.dtype),
        })
    }

    /// Leaves layers out and numbers the others anew.
    fn prune(&self, tensors: Vec<Unquantized>, metadata: &mut Metadata) -> Result<Vec<Tensor>> {
        let keep =
            |unquantized: Unquantized| Tensor { original: unquantized.mapped.name.clone(), unquantized };
        if self.prune_layers.is_empty() {
            return Ok(tensors.into_iter().map(keep).collect());
        }
        let arch = metadata.str("general.architecture").unwrap_or_default().to_string();
        let key = format!("{arch}.block_count");
        let layers = metadata
            .u64(&key)
            .ok_or_else(|| Error::misuse(format!("--prune-layers: the model has no {key}")))?;
        let pruned = &self.prune_layers;
        if let Some(beyond) = pruned.iter().find(|&&l| l >= layers) {
            return Err(Error::misuse(format!(
                "--prune-layers: there is no layer {beyond}, they are numbered from 0 to {}",
                layers.saturating_sub(1)
            )));
        }
        if pruned.len() as u64 == layers {
            return Err(Error::misuse("--prune-layers: no layer would be left"));
        }
        let mut left = Vec::with_capacity(tensors.len());
        for unquantized in tensors {
            let mut tensor = keep(unquantized);
            if let Some((layer, rest)) = layer_of(&tensor.original) {
                if pruned.contains(&layer) {
                    continue;
                }
                let before = pruned.range(..layer).count() as u64;
                tensor.unquantized.mapped.name = format!("blk.{}.{rest}", layer - before);
            }
            left.push(tensor);
        }
        append(metadata, &key, Value::U32((layers - pruned.len() as u64) as u32));
        // What is listed for each layer is listed for those that are left.
        for (key, value) in &mut metadata.0 {
            let Value::Array(array) = value else { continue };
            if key.strip_prefix(&arch).is_some_and(|k| k.starts_with('.')) && array.len() as u64 == layers {
                *array = without(array, pruned);
            }
        }
        Ok(left)
    }
}

/// A tensor that stays, with the name it has in the source.
struct Tensor {
    unquantized: Unquantized,
    original: String,
}

fn without(array: &Array, pruned: &BTreeSet<u64>) -> Array {
    macro_rules! each {
        ($($variant:ident)*) => {
            match array {
                $(Array::$variant(v) => {
                    let left = (0..).zip(v).filter(|(i, _)| !pruned.contains(i));
                    Array::$variant(left.map(|(_, v)| v.clone()).collect())
                })*
            }
        };
    }
    each!(U8 I8 U16 I16 U32 I32 F32 Bool String U64 I64 F64 Array)
}

/// `blk.3.attn_q.weight` -> 3 and `attn_q.weight`.
fn layer_of(name: &str) -> Option<(u64, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// Sets a key anew, at the end, as `gguf_set_val` does.
fn append(metadata: &mut Metadata, key: &str, value: Value) {
    metadata.remove(key);
    metadata.set(key, value);
}

/// `KEY=TYPE:VALUE` as llama-quantize reads it: integers become UINT32, without their sign.
fn parse_override(entry: &str) -> Result<(&str, Value)> {
    let bad = |why: &str| {
        Error::misuse(format!("--override-kv {entry:?} {why}"))
            .hint("it is KEY=TYPE:VALUE, where TYPE is int, float, bool or str")
    };
    let (key, typed) = entry.split_once('=').ok_or_else(|| bad("has no ="))?;
    let (kind, text) = typed.split_once(':').ok_or_else(|| bad("has no type"))?;
    let value = match kind {
        "int" => {
            let n: i64 = text.parse().map_err(|_| bad("is no integer"))?;
            Value::U32(u32::try_from(n.unsigned_abs()).map_err(|_| bad("does not fit 32 bits"))?)
        }
        "float" => Value::F32(text.parse::<f64>().map_err(|_| bad("is no number"))? as f32),
        "bool" => Value::Bool(text.parse().map_err(|_| bad("is neither true nor false"))?),
        "str" => Value::from(text),
        _ => return Err(bad("has an unknown type")),
    };
    if key.is_empty() {
        return Err(bad("has no key"));
    }
    Ok((key, value))
}

/// An opened importance matrix.
struct Weighing {
    matrix: Arc<ImportanceMatrix>,
}

/// What an importance matrix had for the tensors of the model.
#[derive(Default)]
struct Report {
    /// Tensors of the model.
    present: BTreeSet<String>,
    /// Those that the matrix weighs.
    weighed: u64,
    missing: Vec<String>,
    wrong_size: Vec<String>,
    all_zero: Vec<String>,
    negative: Vec<String>,
    unseen: Vec<String>,
}

impl Weighing {
    fn open(choice: &ImatrixChoice, limits: &Limits) -> Result<Self> {
        let mut matrix = ImportanceMatrix::open(&choice.path, limits)?;
        for name in choice.include.iter().chain(&choice.exclude) {
            if !matrix.entries.keys().any(|entry| entry.contains(name.as_str())) {
                return Err(Error::misuse(format!("no entry of the importance matrix contains {name:?}"))
                    .at(&choice.path));
            }
        }
        if !choice.include.is_empty() {
            matrix.include(&choice.include);
        }
        matrix.exclude(&choice.exclude);
        if matrix.entries.is_empty() {
            return Err(Error::misuse("no entry of the importance matrix is left").at(&choice.path));
        }
        Ok(Self { matrix: Arc::new(matrix) })
    }

    /// The keys that say what the file was made with.
    fn describe(&self, choice: &ImatrixChoice, metadata: &mut Metadata) {
        // llama-quantize keeps 127 bytes.
        let text = |s: &str| Value::String(s.as_bytes()[..s.len().min(127)].to_vec());
        append(metadata, "quantize.imatrix.file", text(&choice.path.to_string_lossy()));
        if let Some(dataset) = self.matrix.datasets.first() {
            append(metadata, "quantize.imatrix.dataset", text(dataset));
        }
        append(metadata, "quantize.imatrix.entries_count", Value::U32(self.matrix.entries.len() as u32));
        if let Some(chunks) = self.matrix.chunks.filter(|&n| n > 0) {
            append(metadata, "quantize.imatrix.chunks_count", Value::U32(chunks));
        }
    }

    /// The importance of a tensor's columns; `None` where the matrix has none.
    ///
    /// # Errors
    /// `Misuse` when the entry does not fit the tensor (but for token embeddings, which
    /// llama-quantize then leaves unweighed), `Malformed` when it is not finite.
    fn find(&self, name: &str, tensor: &TensorPlan, report: &mut Report) -> Result<Option<Importance>> {
        let Some(entry) = self.matrix.entries.get(name) else {
            report.missing.push(name.to_string());
            return Ok(None);
        };
        let (columns, rows) = tensor.rows();
        let experts = (tensor.source.elements() / columns / rows).max(1);
        if entry.values() != columns * experts {
            let what = format!("{} values for {columns} columns of {experts} experts", entry.values());
            if matches!(name, "token_embd.weight" | "per_layer_token_embd.weight") {
                report.wrong_size.push(format!("{name} ({what})"));
                return Ok(None);
            }
            return Err(Error::misuse(format!("its entry in the importance matrix has {what}"))
                .at(self.matrix.path())
                .hint("it was made from another model; leave this entry out with --exclude-weights"));
        }
        self.examine(name, entry, report)?;
        report.weighed += 1;
        Ok(Some(Importance::Matrix { matrix: self.matrix.clone(), entry: entry.clone() }))
    }

    fn examine(&self, name: &str, entry: &Entry, report: &mut Report) -> Result<()> {
        let found = self.matrix.examine(entry)?;
        if found.not_finite > 0 {
            return Err(Error::malformed(format!(
                "{} of {} values of its entry in the importance matrix are NaN or infinite",
                found.not_finite, found.values
            ))
            .at(self.matrix.path())
            .hint("make it anew, or leave this entry out with --exclude-weights"));
        }
        if found.zero == found.values {
            report.all_zero.push(name.to_string());
        }
        if found.negative > 0 {
            report.negative.push(format!("{name} ({} values)", found.negative));
        }
        if found.unseen_experts > 0 {
            report.unseen.push(format!("{name} ({} experts)", found.unseen_experts));
        }
        Ok(())
    }
}

impl Report {
    fn notes(&self, weighing: &Weighing, tensors: usize) -> Vec<String> {
        let matrix = &weighing.matrix;
        let mut notes = vec![format!(
            "importance matrix {}: {} entries, {} of {tensors} tensors weighed",
            matrix.path().display(),
            matrix.entries.len(),
            self.weighed,
        )];
        let unused: Vec<String> =
            matrix.entries.keys().filter(|name| !self.present.contains(*name)).cloned().collect();
        for (names, what) in [
            (&self.missing, "have no entry in the importance matrix, and are quantized without"),
            (
                &self.wrong_size,
                "have an entry of the wrong size in the importance matrix, and are quantized without",
            ),
            (&self.all_zero, "have an entry of zeros only: all their weights count alike, as nothing"),
            (
                &self.negative,
                "have negative importance, which is no mean of squares; it is used as it stands",
            ),
            (&self.unseen, "have experts that the calibration text never reached; their columns count alike"),
            (&unused, "belong to no tensor of the model"),
        ] {
            if !names.is_empty() {
                let thing = if names == &unused { "entries" } else { "tensors" };
                notes.push(format!(
                    "{thing} that {what}: {} ({}{})",
                    names.len(),
                    names[..names.len().min(3)].join(", "),
                    if names.len() > 3 { ", ..." } else { "" },
                ));
            }
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides() {
        assert_eq!(parse_override("a.b=int:-5").unwrap(), ("a.b", Value::U32(5)));
        assert_eq!(parse_override("a=float:1e-5").unwrap(), ("a", Value::F32(1e-5)));
        assert_eq!(parse_override("a=bool:true").unwrap(), ("a", Value::Bool(true)));
        assert_eq!(parse_override("a=str:x=y:z").unwrap(), ("a", Value::from("x=y:z")));
        for bad in ["", "a", "a=5", "=int:5", "a=int:x", "a=int:5000000000", "a=bool:1", "a=u32:5"] {
            assert!(parse_override(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_loaders_order() {
        let mut names = ["blk.10.a", "token_embd.weight", "blk.2.b", "blk.2.a", "output.weight"];
        names.sort_by(|a, b| loader_order(a, b));
        assert_eq!(names, ["output.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]);
    }
}
