//! Packages laid out: which weights are where, and the program that names them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::forms::{self, Forms};
use super::parts::At;
use super::profile::{self, Profile};
use super::source::Opened;
use super::weights::{Keep, WeightPlan, Wish};
use crate::arch::{Decoder, Mapped, Positions, RopeSpec};
use crate::container::Store;

use crate::container::coreml::blob::{self, Blob, Wanted};
use crate::container::coreml::model::Metadata;
use crate::container::coreml::package::{WEIGHTS, small_files};
use crate::container::imatrix::ImportanceMatrix;
use crate::container::shards::FileLayout;
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
    /// What the packages say of themselves.
    pub metadata: Metadata,
}

/// A weight of the graph.
struct Weight<'a> {
    /// What the graph calls it.
    name: String,
    of: Of<'a>,
    at: At,
    /// Whether it is the head as well.
    is_tied: bool,
    wish: Wish,
    importance: Option<Importance>,
    /// Taken by the first package that needs it.
    planned: Option<WeightPlan>,
    /// How it is encoded, and how codes come about.
    kind: (&'static str, &'static str),
    elements: u64,
}

/// What a weight is.
#[derive(Clone)]
enum Of<'a> {
    /// A tensor of the source, or some of its rows.
    Tensor(&'a Mapped, Option<Range<u64>>),
    /// Cosines or sines of so many positions.
    Table { spec: &'a RopeSpec, sines: bool, positions: u64 },
}

impl Weight<'_> {
    /// Whether it is one of the matrices of layers.
    fn is_matrix(&self) -> bool {
        matches!(self.of, Of::Tensor(mapped, _) if forms::is_matrix(&mapped.name, &mapped.shape))
    }

    /// Whether the source's codes stay, where something else might be wished.
    fn is_kept(&self) -> bool {
        self.kind.1 == "copy" && self.kind.0 != "f16"
    }
}

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
const HEAD_BIAS: &str = "output.bias";

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
            metadata: Metadata::default(),
        };
        // What only rotations depend on is in their tables.
        let generated: BTreeSet<String> = opened.model.arch.generates().collect();
        let (is_split, store) = (weights.head.len() > 1, &opened.store);
        for mapped in opened.mapped.iter().filter(|m| !generated.contains(&m.name)) {
            let at = At::of(&mapped.name);
            let is_of_head = [HEAD, HEAD_BIAS].contains(&mapped.name.as_str());
            if !is_of_head || !is_split {
                let both = is_tied && !is_split && mapped.name == EMBEDDING;
                weights.add(mapped.name.clone(), Of::Tensor(mapped, None), (at, both), store)?;
            }
        }
        if is_split {
            let bias = by_name.get(HEAD_BIAS).copied();
            for (j, rows) in weights.head.clone().into_iter().enumerate() {
                let parts = [(Some(head_tensor), "weight"), (bias, "bias")];
                for (mapped, kind) in parts.into_iter().filter_map(|(mapped, kind)| Some((mapped?, kind))) {
                    let of = Of::Tensor(mapped, Some(rows.clone()));
                    weights.add(format!("output.{j}.{kind}"), of, (At::Head, false), store)?;
                }
            }
            if is_tied {
                let why =
                    "embeddings and head are the same, and stored twice: the head is divided".to_string();
                weights.notes.entry(why).or_default();
            }
        }
        weights.rotations(store)?;
        weights.check_heeded()?;
        Ok(weights)
    }

    /// Tables of cosines and sines.
    fn rotations(&mut self, store: &Store) -> Result<()> {
        let Positions::Rope { tables, .. } = &self.decoder.positions else { return Ok(()) };
        let positions = self.asked.context;
        for (t, spec) in tables.iter().enumerate() {
            for (name, sines) in [("rope_cos", false), ("rope_sin", true)] {
                let of = Of::Table { spec, sines, positions };
                self.add(format!("{name}.{t}"), of, (At::Table(t), false), store)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, name: String, of: Of<'a>, (at, is_tied): (At, bool), store: &Store) -> Result<()> {
        let (mut wish, mut importance, mut elements) = (Wish::F16, None, 0);
        if let Of::Tensor(tensor, rows) = &of {
            let context = |e: Error| e.context(format_args!("tensor {:?}", tensor.name));
            let mut shape = tensor.shape.clone();
            if let (Some(rows), Some(n)) = (rows, shape.first_mut()) {
                *n = rows.end - rows.start;
            }
            elements = crate::tensor::elements(&shape).map_err(context)?;
            let (wished, note) =
                self.asked.forms.wish(self.asked.profile, &tensor.name, &shape).map_err(context)?;
            if let Some(note) = note {
                self.notes.entry(note).or_default().push(name.clone());
            }
            wish = wished;
            importance = if wish == Wish::F16 { None } else { self.importance(tensor).map_err(context)? };
        }
        let kind = ("f16", "copy");
        let mut weight = Weight { name, of, at, is_tied, wish, importance, planned: None, kind, elements };
        let planned = weight.plan(self.asked.profile, store)?;
        for said in planned.note().into_iter().chain(planned.fallback()) {
            self.notes.entry(said.to_string()).or_default().push(weight.name.clone());
        }
        weight.kind = planned.kind();
        weight.planned = Some(planned);
        self.all.push(weight);
        Ok(())
    }

    /// How the matrices of layers are encoded, what most of them are first: `int4`, `int4+f16`. Codes of the source
    /// that stay are named as what they are.
    pub fn form(&self) -> String {
        let mut shares: BTreeMap<&str, u64> = BTreeMap::new();
        for weight in self.all.iter().filter(|w| w.is_matrix()) {
            let name = if weight.kind.0 == "sparse_ternary" { "ternary" } else { weight.kind.0 };
            let share = shares.entry(name).or_default();
            *share = share.saturating_add(weight.elements);
        }
        let mut shares: Vec<(&str, u64)> = shares.into_iter().collect();
        shares.sort_by_key(|(_, share)| std::cmp::Reverse(*share));
        let names: Vec<&str> = shares.into_iter().map(|(name, _)| name).collect();
        if names.is_empty() { self.asked.forms.name() } else { names.join("+") }
    }

    /// That what was asked for says something of this model.
    ///
    /// # Errors
    /// `Misuse` for options that none of its tensors heeds.
    fn check_heeded(&mut self) -> Result<()> {
        let forms = self.asked.forms;
        let is_weighed = |w: &&Weight<'_>| w.importance.is_some() && !w.is_kept();
        if let Some(matrix) = &self.asked.imatrix
            && !self.all.iter().any(|w| is_weighed(&w))
        {
            return Err(
                Error::misuse("--imatrix does nothing: no tensor that it knows is rounded").at(matrix.path())
            );
        }
        let Some(option) = forms.exact_option() else { return Ok(()) };
        let matrices = self.all.iter().filter(|w| w.is_matrix());
        let (kept, others): (Vec<_>, Vec<_>) = matrices.partition(|w| w.is_kept());
        if kept.is_empty() {
            return Ok(());
        }
        if others.is_empty() {
            return Err(Error::misuse(format!("{option} does nothing: the source's codes stay as they are"))
                .hint("leave it out, or convert the source to float16 first"));
        }
        let names = kept.iter().map(|w| w.name.clone()).collect();
        self.notes.insert(format!("{option} says nothing of them: their codes stay as they are"), names);
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
            let compressed = self.all.iter().filter(|w| w.wish != Wish::F16 && !w.is_kept());
            let (with, without): (Vec<_>, Vec<_>) = compressed.partition(|w| w.importance.is_some());
            notes.push(format!(
                "{} of {} rounded tensors are weighed by {}",
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

    /// Bytes of the package of a part, before any is added to a plan.
    ///
    /// # Errors
    /// As [`Self::package`].
    pub fn bytes(&self, part: &Part) -> Result<u64> {
        let chosen = self.chosen(part);
        let planned: Vec<&WeightPlan> =
            chosen.iter().filter_map(|i| self.all.get(*i)?.planned.as_ref()).collect();
        let LaidOut { layout, small, .. } = self.lay_out(Path::new(""), part, &chosen, &planned)?;
        let small = small.iter().map(|(_, bytes)| bytes.len() as u64);
        Ok(small.fold(layout.len, u64::saturating_add))
    }

    /// The weights of a part, by their places.
    fn chosen(&self, part: &Part) -> Vec<usize> {
        let is_in = |i: &usize| self.all.get(*i).is_some_and(|w| self.is_in(w, part));
        (0..self.all.len()).filter(is_in).collect()
    }

    fn is_in(&self, weight: &Weight<'_>, part: &Part) -> bool {
        let tables: &[usize] = match &self.decoder.positions {
            Positions::Rope { of_layer, .. } => of_layer,
            _ => &[],
        };
        weight.at.is_in(part, tables) || weight.is_tied && *part == Part::Head
    }

    /// Where the weights of a part lie in its package, and its small files.
    fn lay_out(
        &self,
        folder: &Path,
        part: &Part,
        chosen: &[usize],
        planned: &[&WeightPlan],
    ) -> Result<LaidOut> {
        let wanted: Vec<Wanted> = planned.iter().flat_map(|p| p.blobs().iter().copied()).collect();
        let (layout, mut blobs) = blob::layout(folder.join(WEIGHTS).to_string_lossy(), &wanted)?;
        let has_weights = !blobs.is_empty();
        let (mut placed, mut of_each) = (Placed::default(), Vec::with_capacity(chosen.len()));
        for (weight, planned) in chosen.iter().filter_map(|i| self.all.get(*i)).zip(planned) {
            let rest = blobs.split_off(planned.blobs().len().min(blobs.len()));
            let own = std::mem::replace(&mut blobs, rest);
            placed.0.insert(weight.name.clone(), planned.encoded(mil::identifier(&weight.name), &own)?);
            of_each.push(own);
        }
        let small = small_files(&self.model(part, &placed)?, has_weights)?;
        Ok(LaidOut { layout, blobs: of_each, placed, small })
    }

    /// Adds the package of a part, which lies in `folder` of the output.
    ///
    /// # Errors
    /// As the graph is built; `Malformed` for a weight that it has no use for.
    pub fn package(&mut self, plan: &mut Plan, folder: &Path, part: &Part, store: &Store) -> Result<()> {
        let chosen = self.chosen(part);
        let mut planned = Vec::with_capacity(chosen.len());
        for i in &chosen {
            let weight = &mut self.all[*i];
            planned.push(match weight.planned.take() {
                Some(planned) => planned,
                None => weight.plan(self.asked.profile, store)?,
            });
        }
        let laid_out = self.lay_out(folder, part, &chosen, &planned.iter().collect::<Vec<_>>())?;
        let LaidOut { layout, blobs, placed, small } = laid_out;
        let file = plan.files.len();
        plan.files.push(FilePlan::from(layout));
        for ((i, planned), own) in chosen.into_iter().zip(planned).zip(blobs) {
            let name = &self.all[i].name;
            let shape = placed.0.get(name).map(|encoded| encoded.shape.clone()).unwrap_or_default();
            let parts = own.iter().enumerate().map(|(k, blob)| PartPlan {
                file,
                offset: blob.data(),
                ..PartPlan::new(&format!("{name}.{k}"), DType::U8, &[blob.bytes])
            });
            let moved = Moved::encoding(planned, parts.collect());
            plan.tensors.push(TensorPlan::moved(name.clone(), shape, moved)?);
        }
        for (name, bytes) in small {
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
            None => Ok(profile::model(functions, self.metadata.clone(), context)),
            Some(name) => {
                Err(Error::unsupported(format!("tensor {name:?} has no place in the graph of {}", self.arch))
                    .hint("its [graph] lacks something: the definition is in formats/arch"))
            }
        }
    }
}

impl Weight<'_> {
    fn plan(&self, profile: Profile, store: &Store) -> Result<WeightPlan> {
        let (mapped, rows) = match &self.of {
            Of::Tensor(mapped, rows) => (*mapped, rows.clone()),
            Of::Table { spec, sines, positions } => {
                return WeightPlan::rotation(&self.name, spec, *sines, *positions);
            }
        };
        // The Neural Engine has no scales of blocks within a row.
        let keep = match profile {
            _ if !forms::may_keep(&mapped.name) => Keep::Never,
            Profile::Gpu => Keep::Blocks,
            Profile::Ane => Keep::Rows,
        };
        WeightPlan::new(mapped, store, rows, self.wish, keep, self.importance.clone())
    }
}

/// A package, laid out.
struct LaidOut {
    layout: FileLayout,
    /// Of each weight.
    blobs: Vec<Vec<Blob>>,
    placed: Placed,
    small: [(&'static str, Vec<u8>); 2],
}

/// Weights that have their places.
#[derive(Default)]
struct Placed(BTreeMap<String, Encoded>);

impl mil::Weights for Placed {
    fn get(&self, name: &str) -> Option<Encoded> {
        self.0.get(name).cloned()
    }
}
