//! Conversions of one model with different types.

use indexmap::IndexMap;

use super::Measure;
use super::table::Table;
use crate::convert::{Job, Overrides, Quantize, Quantizer, Recipe, Scratch, Sharding, parse_tensor_type};
use crate::error::{Error, Result};
use crate::sha256::{Sha256, hex};
use crate::tensor::DType;

/// Types by tensor.
pub type Types = IndexMap<String, DType>;

/// Values of a tensor that tell a model from another of the same shapes.
const LOOKED_AT: u64 = 256;
/// A file type whose main type makes patterns count, and which asks nothing of its own.
const NEUTRAL: &str = "Q8_0";

/// A model that is converted again and again.
pub struct Variants<'a> {
    quantize: &'a Quantize,
    /// As each type that may be chosen, what the user fixed aside: in the order of the types.
    pub jobs: Vec<Job>,
    /// Types of all tensors of weights in the source.
    pub stored: Types,
    /// The tensors among whose types there is a choice.
    pub open: Vec<String>,
}

impl<'a> Variants<'a> {
    /// # Errors
    /// What is no model, and options that do not fit it; `Misuse` where there is nothing to choose.
    pub fn new(quantize: &'a Quantize, types: &[DType]) -> Result<Self> {
        if !quantize.quantizer.prune_layers.is_empty() {
            return Err(Error::misuse("types cannot be searched for a model that loses layers on the way")
                .hint("write it with --prune-layers first, and search then"));
        }
        let mut jobs = Vec::new();
        for dtype in types {
            let mut wishes = quantize.quantizer.overrides.clone();
            wishes.tensor_types.push(parse_tensor_type(&format!(".={dtype}"))?);
            let quantizer = with(quantize, wishes)?;
            let job = Quantize { quantizer, ..quantize.clone() }.plan()?;
            job.plan.check_feasible(false).map_err(|e| e.context(format!("--types: {dtype}")))?;
            jobs.push(job);
        }
        let first = jobs.first().ok_or_else(|| Error::misuse("--types names no type"))?;
        let stored =
            first.plan.tensors.iter().map(|t| (t.name.clone(), t.source.dtype().unwrap_or(DType::F32)));
        let stored = stored.filter(|(_, dtype)| is_of_weights(*dtype)).collect();
        let is_open = |at: usize| {
            jobs.iter().any(|j| {
                j.plan.tensors.get(at).map(|t| t.dtype) != first.plan.tensors.get(at).map(|t| t.dtype)
            })
        };
        let tensors = first.plan.tensors.iter().enumerate();
        let open: Vec<String> = tensors.filter(|(at, _)| is_open(*at)).map(|(_, t)| t.name.clone()).collect();
        if open.is_empty() {
            return Err(Error::misuse("there is no tensor whose type could be chosen")
                .hint("name several --types, and leave tensors to them (--tensor-type fixes some)"));
        }
        Ok(Self { quantize, jobs, stored, open })
    }

    /// The types of all matrices where the open ones are `chosen`: what to write into a recipe.
    pub fn recipe(&self, chosen: &Types) -> Types {
        let tensors = self.jobs.first().map_or(&[][..], |j| &j.plan.tensors).iter();
        let matrices =
            tensors.filter(|t| t.shape.len() > 1 && t.name.ends_with("weight") && is_of_weights(t.dtype));
        matrices.map(|t| (t.name.clone(), chosen.get(&t.name).copied().unwrap_or(t.dtype))).collect()
    }

    /// What gives the matrices these types, and the file the number of the file type whose main type
    /// most weights have.
    ///
    /// # Errors
    /// As [`Recipe::all`].
    pub fn quantizer(&self, recipe: &Types) -> Result<Quantizer> {
        let mut overrides = self.quantize.quantizer.overrides.clone();
        overrides.tensor_types.extend(exactly(recipe)?);
        let mut weights = IndexMap::<DType, u64>::new();
        for t in self.jobs.first().map_or(&[][..], |j| &j.plan.tensors) {
            if let Some(dtype) = recipe.get(&t.name) {
                *weights.entry(*dtype).or_default() += t.source.elements();
            }
        }
        let most = weights.iter().max_by_key(|(_, n)| **n).map(|(dtype, _)| *dtype);
        let named = Recipe::all()?.iter().find(|r| Some(r.dtype) == most && r.needs_imatrix.is_empty());
        let neutral = with(self.quantize, overrides)?;
        Ok(Quantizer { recipe: named.unwrap_or(neutral.recipe), ..neutral })
    }

    /// The whole conversion, as the user wants it, with these types.
    ///
    /// # Errors
    /// As planning has them.
    pub fn whole(&self, recipe: &Types) -> Result<Job> {
        Quantize { quantizer: self.quantizer(recipe)?, ..self.quantize.clone() }.plan()
    }

    /// A conversion to one file at `path`.
    ///
    /// # Errors
    /// As planning has them.
    pub fn trial(&self, types: &Types, path: &std::path::Path) -> Result<Job> {
        let wishes = Overrides { tensor_types: exactly(types)?, ..Overrides::default() };
        let quantizer = with(self.quantize, wishes)?;
        let output = path.to_path_buf();
        let job =
            Quantize { quantizer, output, sharding: Sharding::Whole, ..self.quantize.clone() }.plan()?;
        Ok(Job { is_trial: true, ..job })
    }

    /// The model as it is, but for these tensors.
    pub fn alone(&self, tensors: &[String], dtype: DType) -> Types {
        let of = |name: &String, stored: DType| if tensors.contains(name) { dtype } else { stored };
        self.stored.iter().map(|(name, stored)| (name.clone(), of(name, *stored))).collect()
    }

    /// The types that a tensor can have, in the order of the jobs, each once.
    pub fn types_of(&self, name: &str) -> Vec<DType> {
        let mut types = Vec::new();
        for job in &self.jobs {
            let dtype = job.plan.tensors.iter().find(|t| t.name == name).map(|t| t.dtype);
            types.extend(dtype.filter(|d| !types.contains(d)));
        }
        types
    }

    /// SHA-256 of what tells the model from others.
    ///
    /// # Errors
    /// As tensors can be read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let (mut values, mut scratch) = (Vec::new(), Scratch::default());
        for job in self.jobs.iter().take(1) {
            for t in &job.plan.tensors {
                hash.update(format!("{} {:?} {:?}\n", t.name, t.shape, t.source.dtype()));
                let end = t.rows().0.max(LOOKED_AT).min(t.source.elements());
                t.source.unfolded(&job.store, 0, end, &mut values, &mut scratch)?;
                values.iter().for_each(|v| hash.update(v.to_le_bytes()));
            }
        }
        Ok(hex(&hash.finalize()))
    }

    /// What is to be measured: tensors that become a type together. Of the types that all of them can
    /// have the smallest, and one in the middle, tell most.
    pub fn plan(&self, measure: Measure) -> Vec<(Vec<String>, DType)> {
        let mut groups: IndexMap<String, Vec<String>> = IndexMap::new();
        for name in &self.open {
            let layer = name.split('.').nth(1).filter(|_| name.starts_with("blk."));
            let group = match (measure, layer) {
                (Measure::Layers, Some(layer)) => layer.to_string(),
                _ => name.clone(),
            };
            groups.entry(group).or_default().push(name.clone());
        }
        let mut trials = Vec::new();
        for tensors in groups.into_values() {
            let mut types = self.types_of(&tensors[0]);
            types.retain(|d| tensors.iter().all(|t| self.types_of(t).contains(d)));
            types.sort_by(|a, b| a.bits_per_weight().total_cmp(&b.bits_per_weight()));
            let middle = types.len() / 2;
            match measure {
                Measure::Nothing => return Vec::new(),
                Measure::Layers => types = types.into_iter().skip(middle).take(1).collect(),
                Measure::Tensors if types.len() > 2 => types = vec![types[0], types[middle]],
                Measure::Tensors | Measure::All => {}
            }
            trials.extend(types.into_iter().map(|dtype| (tensors.clone(), dtype)));
        }
        trials
    }
}

/// The user's quantizer with other wishes about types.
fn with(quantize: &Quantize, overrides: Overrides) -> Result<Quantizer> {
    Ok(Quantizer { recipe: Recipe::parse(NEUTRAL)?, overrides, ..quantize.quantizer.clone() })
}

/// Whether a pattern may name this type: integers stay as they are.
fn is_of_weights(dtype: DType) -> bool {
    parse_tensor_type(&format!(".={dtype}")).is_ok()
}

/// Patterns for just these names.
fn exactly(types: &Types) -> Result<Vec<(regex::Regex, DType)>> {
    types.iter().map(|(name, dtype)| parse_tensor_type(&entry(name, *dtype))).collect()
}

/// A line of `--tensor-type-file`.
pub fn entry(name: &str, dtype: DType) -> String {
    format!("^{}$={}", regex::escape(name), dtype.to_string().to_lowercase())
}

/// The offers of each open tensor, with the losses that `table` expects: bytes as they lie in a file.
pub fn offers(table: &Table, align: u64) -> Vec<Vec<super::knapsack::Offer>> {
    let of_tensor = |(name, costs): (&String, &IndexMap<String, super::table::Cost>)| {
        let offers = costs.values().zip(table.losses(name));
        offers
            .map(|(c, loss)| super::knapsack::Offer { bytes: c.bytes.next_multiple_of(align), loss })
            .collect()
    };
    table.tensors.iter().map(of_tensor).collect()
}
