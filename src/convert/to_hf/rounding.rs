//! By which method matrices of integers are rounded: what calibration says of their inputs, by the names that
//! these have in GGUF.

use std::collections::HashMap;
use std::sync::Arc;

use super::Wanted;
use super::model::BLOCKS;
use crate::arch::{self, Data, Mapped};
use crate::container::Store;
use crate::container::imatrix::ImportanceMatrix;
use crate::convert::guide::{Guiding, MethodChoice, Way};
use crate::convert::outcome::Fallback;
use crate::convert::plan::{Importance, Rounding, TensorPlan};
use crate::convert::quantizer::ImatrixChoice;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed::write::Layout;
use crate::quantize::Method;
use crate::tensor::{Dim, StridedCopy};

/// Where a matrix is in GGUF: its name, and its number in a stack of experts.
pub type Places = HashMap<String, (String, u64)>;

/// Whether places are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nobody asks for them.
    Not,
    /// They are told where they are known.
    Gladly,
    /// Nothing can be done without.
    Must,
}

/// The places of the tensors of a checkpoint.
///
/// # Errors
/// Unknown architectures; as definitions say.
pub fn places_of_checkpoint(config: &serde_json::Value, store: &Store) -> Result<Places> {
    let model = arch::recognise(config, store.tensors(), None)?;
    let mut places = Places::new();
    for m in model.map(store.tensors())? {
        let Data::Copied { pieces, .. } = &m.data else { continue };
        let matrix = matrix_of_stack(&m.shape);
        for piece in pieces {
            let Some(from) = store.get(&piece.source) else { continue };
            if !keeps_columns(&piece.copy, &from.shape, &m.shape) {
                // A stack `[expert, in, out]`: as blocks its matrices are the way round that GGUF has them.
                if let ([_, inner, _], [_, _, cols]) = (&from.shape[..], &m.shape[..])
                    && inner == cols
                {
                    let name = format!("{}{BLOCKS}", piece.source);
                    places.entry(name).or_insert_with(|| (m.name.clone(), 0));
                }
                continue;
            }
            let expert = matrix.map_or(0, |n| piece.copy.dst_base / n);
            places.entry(piece.source.clone()).or_insert_with(|| (m.name.clone(), expert));
        }
    }
    Ok(places)
}

/// The places of tensors that come from GGUF.
pub fn places_of_gguf(mapped: &[Mapped], store: &Store) -> Places {
    let of = |m: &Mapped| {
        let Data::Copied { pieces, .. } = &m.data else { return None };
        let piece = pieces.first()?;
        let from = store.get(&piece.source)?;
        if !keeps_columns(&piece.copy, &from.shape, &m.shape) {
            return None;
        }
        let matrix = matrix_of_stack(&from.shape).filter(|_| m.shape.len() == 2);
        let expert = matrix.map_or(0, |n| piece.copy.src_base / n);
        Some((m.name.clone(), (piece.source.clone(), expert)))
    };
    mapped.iter().filter_map(of).collect()
}

/// Whether rows are copied whole: what calibration says of columns is said of them in GGUF's order.
fn keeps_columns(copy: &StridedCopy, from: &[u64], to: &[u64]) -> bool {
    let (Some(&cols), true) = (from.last(), from.last() == to.last()) else { return false };
    let within = |d: &Dim| d.src == d.dst && d.n.checked_mul(d.src).is_some_and(|n| n <= cols);
    let by_rows = |d: &Dim| d.src.is_multiple_of(cols) && d.dst.is_multiple_of(cols);
    let runs_on = |d: &Dim| (d.src, d.dst) == (1, 1) && d.n.is_multiple_of(cols);
    cols > 0
        && copy.src_base % cols == copy.dst_base % cols
        && copy.dims.iter().all(|d| within(d) || by_rows(d) || runs_on(d))
}

/// Elements of each matrix of a stack.
fn matrix_of_stack(shape: &[u64]) -> Option<u64> {
    match shape {
        [_, rows, cols] => rows.checked_mul(*cols).filter(|n| *n > 0),
        _ => None,
    }
}

/// Methods, and what they need.
pub struct Rounder {
    guiding: Guiding,
    matrix: Option<Arc<ImportanceMatrix>>,
    places: Places,
}

impl Rounder {
    /// Opens what was asked for; `None` where nothing was.
    ///
    /// # Errors
    /// `Misuse` for methods that the format has no use for; as files open.
    pub fn open(
        wanted: &Wanted,
        method: Option<&MethodChoice>,
        imatrix: Option<&ImatrixChoice>,
        places: Places,
        limits: &Limits,
    ) -> Result<Option<Self>> {
        if method.is_none() && imatrix.is_none() {
            return Ok(None);
        }
        let name = wanted.format.name();
        if !wanted.format.has_grid() {
            return Err(Error::misuse(format!("{name} has no methods: each weight becomes the next code"))
                .hint("gptq, awq and compressed-tensors have"));
        }
        let mut choice = method.cloned().unwrap_or_default();
        choice.others = choice.others.or(imatrix.map(|_| Way::Imatrix));
        if choice.fold.is_some() {
            return Err(Error::misuse("awq moves scales between tensors, which needs a step of its own").hint(
                "qconv hf-to-gguf SRC -t awq_bf16 --moments FILE -o folded.gguf, and convert that with --method \
                 imatrix or gptq",
            ));
        }
        let ways = choice.by_tensor.iter().map(|(_, way)| way).chain(&choice.others);
        let is_ternary = |way: &Way| matches!(way, Way::Method(Method::Ternary(_)));
        if !wanted.format.is_ternary() && ways.into_iter().any(is_ternary) {
            return Err(Error::misuse(format!("method ternary has no use for {name}: its codes are others"))
                .hint("qconv pack --encoding ternary has"));
        }
        let guiding = Guiding::open(&choice, imatrix.is_some(), limits)?;
        let matrix = imatrix.map(|choice| ImportanceMatrix::open(&choice.path, limits).map(Arc::new));
        Ok(Some(Self { guiding, matrix: matrix.transpose()?, places }))
    }

    /// How a tensor is rounded, and the number of its expert; with the reason where it is not as asked for.
    ///
    /// # Errors
    /// `Misuse` for what belongs to another model; as the layout's grid has no such rows.
    pub fn rounding(&self, t: &TensorPlan, layout: &dyn Layout) -> Result<(Rounding, u64, Option<Fallback>)> {
        let (columns, rows) = t.rows();
        let way = self.guiding.way(&t.name, None);
        let (wanted, method) = match way {
            None | Some(Way::Rtn) => return Ok((Rounding::Nearest, 0, None)),
            Some(Way::Imatrix) => ("imatrix", None),
            Some(Way::Method(method)) => (method.name(), Some(method)),
        };
        let without = |why: String| Ok((Rounding::Nearest, 0, Some(Fallback { wanted, why })));
        let Some((name, expert)) = self.places.get(&t.name) else {
            return without(
                "its columns have another name, or another order, where calibration saw them".into(),
            );
        };
        let importance = match self.importance(name)? {
            None => return without("calibration has nothing of what it reads".into()),
            Some(importance) => importance,
        };
        let (has, experts) = match &importance {
            Importance::Matrix { entry, .. } => (entry.columns(), entry.experts()),
            Importance::Diagonal { input, .. } => (input.columns, input.experts),
        };
        let stacked = (t.source.elements() / columns.max(1) / rows.max(1)).max(1);
        if has != columns || expert.saturating_add(stacked) > experts.max(1) {
            return Err(Error::misuse(format!(
                "has {columns} columns, and is number {expert} of its stack, or the first of {stacked}; {name} was \
                 calibrated with {has} columns and {experts} experts"
            ))
            .hint("what calibration wrote is of another model"));
        }
        let (Some(method), Some(grid)) = (method, layout.grid()) else {
            return Ok((Rounding::Weighed(importance), *expert, None));
        };
        match self.guiding.guide(method, name, grid.lattice(columns)?) {
            Ok((guide, some)) => {
                let fallback = some.map(|why| Fallback { wanted, why });
                Ok((Rounding::Guided(Box::new(guide)), *expert, fallback))
            }
            Err(why) => Ok((Rounding::Weighed(importance), *expert, Some(Fallback { wanted, why }))),
        }
    }

    fn importance(&self, name: &str) -> Result<Option<Importance>> {
        let of_matrix = self.matrix.as_ref().and_then(|matrix| {
            let entry = matrix.entries.get(name)?.clone();
            Some(Importance::Matrix { matrix: matrix.clone(), entry })
        });
        Ok(of_matrix.or_else(|| self.guiding.diagonal(name)))
    }

    /// What was rounded how.
    pub fn notes(&self, tensors: &[TensorPlan]) -> Vec<String> {
        self.guiding.notes(tensors)
    }
}
