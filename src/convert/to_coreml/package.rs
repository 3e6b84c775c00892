//! Packages laid out: which weights are where, and the program that names them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::forms::{Forms, may_keep};
use super::parts::At;
use super::profile::{self, Profile};
use super::source::Opened;
use super::weights::{Keep, WeightPlan, Wish};
use crate::arch::{Data, Decoder, Mapped, Positions};
use crate::container::Store;
use crate::container::coreml::blob::{self, ALIGNMENT, Wanted};
use crate::container::coreml::model::Metadata;
use crate::container::coreml::package::{WEIGHTS, small_files};
use crate::container::imatrix::ImportanceMatrix;
use crate::convert::Importance;
use crate::convert::moved::Moved;
use crate::convert::pack::PartPlan;
use crate::convert::plan::{FilePlan, Plan, TensorPlan};
use crate::error::{Error, Result};
use crate::mil::{self, Encoded, Part};
use crate::tensor::DType;

/// What packages are to be like.
pub struct Asked<'a> {
    pub profile: Profile,
    pub forms: &'a Forms,
    /// Tokens that the cache holds.
    pub context: u64,
    pub imatrix: Option<Arc<ImportanceMatrix>>,
    pub metadata: Metadata,
}

/// The weights of a model, and how each is encoded.
pub struct Weights<'a> {
    asked: &'a Asked<'a>,
    decoder: &'a Decoder,
    arch: &'a str,
    all: Vec<Weight<'a>>,
    /// Rows of the head, in parts.
    head: Vec<Range<u64>>,
    /// By what is said of them: tensors.
    notes: BTreeMap<String, Vec<String>>,
}

/// A tensor, or some of its rows.
struct Weight<'a> {
    /// What the graph calls it.
    name: String,
    mapped: Mapping<'a>,
    rows: Option<Range<u64>>,
    at: At,
    /// Whether it is the head as well.
    is_tied: bool,
    wish: Wish,
    importance: Option<Importance>,
    /// Taken by the first package that needs it.
    planned: Option<WeightPlan>,
    /// Bytes in a weight file.
    bytes: u64,
}

/// A tensor of the source, or one that is made.
enum Mapping<'a> {
    Source(&'a Mapped),
    Made(Mapped),
}

impl Mapping<'_> {
    fn get(&self) -> &Mapped {
        match self {
            Self::Source(mapped) => mapped,
            Self::Made(mapped) => mapped,
        }
    }
}

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

impl<'a> Weights<'a> {
    /// All weights that the graph of `decoder` may ask for.
    ///
    /// # Errors
    /// `Malformed` for a model without embeddings; those of [`WeightPlan::new`], and of the forms.
    pub fn of(opened: &'a Opened, decoder: &'a Decoder, asked: &'a Asked<'a>) -> Result<Self> {
        let by_name: HashMap<&str, &Mapped> = opened.mapped.iter().map(|m| (m.name.as_str(), m)).collect();
        let embedding = *by_name
            .get(EMBEDDING)
            .ok_or_else(|| Error::malformed(format!("tensor {EMBEDDING:?} is missing")))?;
        let head_tensor = by_name.get(HEAD).copied().unwrap_or(embedding);
        let rows = head_tensor.shape.first().copied().unwrap_or_default();
        let head = asked.profile.vocabulary(rows);
        let is_tied = !by_name.contains_key(HEAD);
        let mut weights = Self {
            asked,
            decoder,
            arch: &opened.model.arch.name,
            all: Vec::with_capacity(opened.mapped.len()),
            head,
            notes: BTreeMap::new(),
        };
        // What only rotations depend on is in their tables.
        let generated: BTreeSet<String> = opened.model.arch.generates().collect();
        let (is_split, store) = (weights.head.len() > 1, &opened.store);
        for mapped in opened.mapped.iter().filter(|m| !generated.contains(&m.name)) {
            let at = At::of(&mapped.name);
            if mapped.name != HEAD || !is_split {
                let both = is_tied && !is_split && mapped.name == EMBEDDING;
                weights.add(mapped.name.clone(), Mapping::Source(mapped), None, (at, both), store)?;
            }
        }
        if is_split {
            for (j, rows) in weights.head.clone().into_iter().enumerate() {
                let name = format!("output.{j}.weight");
                weights.add(name, Mapping::Source(head_tensor), Some(rows), (At::Head, false), store)?;
            }
            if is_tied {
                let why =
                    "embeddings and head are the same, and stored twice: the head is divided".to_string();
                weights.notes.entry(why).or_default();
            }
        }
        weights.rotations(store)?;
        Ok(weights)
    }

    /// Tables of cosines and sines.
    fn rotations(&mut self, store: &Store) -> Result<()> {
        let Positions::Rope { dim, tables, .. } = &self.decoder.positions else { return Ok(()) };
        let too_large = || Error::limit("tables of rotations beyond the address space");
        let context = usize::try_from(self.asked.context).map_err(|_| too_large())?;
        for (t, spec) in tables.iter().enumerate() {
            let (cos, sin) = spec.table(context)?;
            for (name, values) in [("rope_cos", cos), ("rope_sin", sin)] {
                let name = format!("{name}.{t}");
                let values = values.into_iter().map(f32::from).collect();
                let shape = vec![self.asked.context, *dim as u64];
                let mapped = Mapped { name: name.clone(), shape, data: Data::Values(values), fixed: None };
                self.add(name, Mapping::Made(mapped), None, (At::Table(t), false), store)?;
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        mapped: Mapping<'a>,
        rows: Option<Range<u64>>,
        (at, is_tied): (At, bool),
        store: &Store,
    ) -> Result<()> {
        let tensor = mapped.get();
        let context = |e: Error| e.context(format_args!("tensor {:?}", tensor.name));
        let mut shape = tensor.shape.clone();
        if let (Some(rows), Some(n)) = (&rows, shape.first_mut()) {
            *n = rows.end - rows.start;
        }
        let (wish, note) =
            self.asked.forms.wish(self.asked.profile, &tensor.name, &shape).map_err(context)?;
        if let Some(note) = note {
            self.notes.entry(note).or_default().push(name.clone());
        }
        let importance = if wish == Wish::F16 { None } else { self.importance(tensor).map_err(context)? };
        let mut weight =
            Weight { name, mapped, rows, at, is_tied, wish, importance, planned: None, bytes: 0 };
        let planned = weight.plan(self.asked.profile, store)?;
        for said in planned.note().into_iter().chain(planned.fallback()) {
            self.notes.entry(said.to_string()).or_default().push(weight.name.clone());
        }
        let bytes = planned.blobs().iter().map(stored_bytes);
        weight.bytes = bytes.fold(0, u64::saturating_add);
        weight.planned = Some(planned);
        self.all.push(weight);
        Ok(())
    }

    /// The importance of a tensor's columns, where the matrix has it.
    fn importance(&self, tensor: &Mapped) -> Result<Option<Importance>> {
        let Some(matrix) = &self.asked.imatrix else { return Ok(None) };
        let Some(entry) = matrix.entries.get(&tensor.name) else { return Ok(None) };
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let experts = if let [experts, _, _] = tensor.shape[..] { experts } else { 1 };
        if Some(entry.values()) != columns.checked_mul(experts) {
            return Err(Error::misuse(format!(
                "its entry in the importance matrix has {} values for {columns} columns of {experts} experts",
                entry.values()
            ))
            .at(matrix.path())
            .hint("it was made from another model"));
        }
        Ok(Some(Importance::Matrix { matrix: matrix.clone(), entry: entry.clone() }))
    }

    /// Rows of the vocabulary.
    pub fn vocabulary(&self) -> u64 {
        self.head.last().map_or(0, |rows| rows.end)
    }

    /// What is worth saying, each with the tensors that it is said of.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(imatrix) = &self.asked.imatrix {
            let compressed = self.all.iter().filter(|w| w.wish != Wish::F16);
            let (with, without): (Vec<_>, Vec<_>) = compressed.partition(|w| w.importance.is_some());
            notes.push(format!(
                "{} of {} compressed tensors are weighed by {}",
                with.len(),
                with.len() + without.len(),
                imatrix.path().display()
            ));
        }
        for (said, of) in &self.notes {
            let shown = of[..of.len().min(3)].join(", ");
            let more = if of.len() > 3 { ", ..." } else { "" };
            notes.push(match of.len() {
                0 => said.clone(),
                n => format!("{n} tensors: {said} ({shown}{more})"),
            });
        }
        notes
    }

    /// Bytes of the weights of a part, as a weight file has them.
    pub fn bytes(&self, part: &Part) -> u64 {
        let of_part = self.all.iter().filter(|w| self.is_in(w, part));
        of_part.map(|w| w.bytes).fold(ALIGNMENT, u64::saturating_add)
    }

    fn is_in(&self, weight: &Weight<'_>, part: &Part) -> bool {
        let tables: &[usize] = match &self.decoder.positions {
            Positions::Rope { of_layer, .. } => of_layer,
            _ => &[],
        };
        weight.at.is_in(part, tables) || weight.is_tied && *part == Part::Head
    }

    /// Adds the package of a part, which lies in `folder` of the output.
    ///
    /// # Errors
    /// As the graph is built; `Malformed` for a weight that it has no use for.
    pub fn package(&mut self, plan: &mut Plan, folder: &Path, part: &Part, store: &Store) -> Result<()> {
        let chosen: Vec<usize> =
            (0..self.all.len()).filter(|i| self.all.get(*i).is_some_and(|w| self.is_in(w, part))).collect();
        let mut planned = Vec::with_capacity(chosen.len());
        for i in &chosen {
            let weight = &mut self.all[*i];
            planned.push(match weight.planned.take() {
                Some(planned) => planned,
                None => weight.plan(self.asked.profile, store)?,
            });
        }
        let wanted: Vec<Wanted> = planned.iter().flat_map(|p| p.blobs().iter().copied()).collect();
        let name = folder.join(WEIGHTS);
        let (layout, mut blobs) = blob::layout(name.to_string_lossy(), &wanted)?;
        let (has_weights, file) = (!blobs.is_empty(), plan.files.len());
        plan.files.push(FilePlan::from(layout));
        let mut placed = Placed::default();
        for (i, planned) in chosen.into_iter().zip(planned) {
            let weight = &self.all[i];
            let rest = blobs.split_off(planned.blobs().len());
            let own = std::mem::replace(&mut blobs, rest);
            let encoded = planned.encoded(mil::identifier(&weight.name), &own)?;
            let shape = encoded.shape.clone();
            placed.0.insert(weight.name.clone(), encoded);
            let parts = own.iter().enumerate().map(|(k, blob)| PartPlan {
                file,
                offset: blob.data(),
                ..PartPlan::new(&format!("{}.{k}", weight.name), DType::U8, &[blob.bytes])
            });
            let moved = Moved::encoding(planned, parts.collect());
            plan.tensors.push(TensorPlan::moved(weight.name.clone(), shape, moved)?);
        }
        let model = self.model(part, &placed)?;
        for (name, bytes) in small_files(&model, has_weights)? {
            plan.files.push(FilePlan::whole(folder.join(name), bytes));
        }
        Ok(())
    }

    /// The program of a part, and its description.
    fn model(&self, part: &Part, placed: &Placed) -> Result<crate::container::coreml::Model> {
        let (profile, context) = (self.asked.profile, self.asked.context);
        let mut functions = Vec::new();
        let mut used = BTreeSet::new();
        for (name, layout) in profile.functions(context) {
            let target = mil::Target { layout, context, vocab_split: self.head.len() };
            let built = mil::decoder(self.decoder, placed, &target, part.clone())?;
            used.extend(built.used.iter().cloned());
            functions.push((name, built));
        }
        match placed.0.keys().find(|name| !used.contains(*name)) {
            None => Ok(profile::model(functions, self.asked.metadata.clone(), context)),
            Some(name) => {
                Err(Error::unsupported(format!("tensor {name:?} has no place in the graph of {}", self.arch))
                    .hint("its [graph] lacks something: the definition is in formats/arch"))
            }
        }
    }
}

impl Weight<'_> {
    fn plan(&self, profile: Profile, store: &Store) -> Result<WeightPlan> {
        // The Neural Engine has no scales of blocks within a row.
        let keep = match profile {
            _ if !may_keep(&self.mapped.get().name) => Keep::Never,
            Profile::Gpu => Keep::Blocks,
            Profile::Ane => Keep::Rows,
        };
        WeightPlan::new(self.mapped.get(), store, self.rows.clone(), self.wish, keep, self.importance.clone())
    }
}

/// Bytes of a blob with its record, up to the next.
fn stored_bytes(wanted: &Wanted) -> u64 {
    let data = wanted.data_type.bytes(wanted.elements).unwrap_or(u64::MAX);
    data.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX).saturating_add(ALIGNMENT)
}

/// Weights that have their places.
#[derive(Default)]
struct Placed(BTreeMap<String, Encoded>);

impl mil::Weights for Placed {
    fn get(&self, name: &str) -> Option<Encoded> {
        self.0.get(name).cloned()
    }
}
