//! A matrix given as the product of two small ones (LoRA): where its rows and columns go, each by
//! itself, so that the factors can be rearranged instead of their product.

use super::active::ActiveRow;
use super::elementwise::Elementwise;
use super::halves::Layout;
use super::{Model, Template};
use crate::error::{Error, Result};
use crate::tensor::{Axes, TensorInfo};

/// What one matrix of a checkpoint contributes to one tensor of the GGUF file.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The tensor.
    pub target: String,
    /// All its axes but the last. They are made of the matrix's rows, or of its columns where it is
    /// `turned`; strides count in these.
    pub rows: Axes,
    /// Its last axis, made of the other.
    pub columns: Axes,
    /// Whether the tensor is the matrix transposed.
    pub turned: bool,
    /// What every value is multiplied by.
    pub factor: f32,
    /// Where the tensor stacks matrices: the number of this one, and of all.
    pub stack: Option<(u64, u64)>,
    /// Where the tensor joins parts of the matrix: the first row of this one, and the rows of all.
    pub joined: Option<(u64, u64)>,
}

/// Layers beyond these are not looked for.
const MAX_LAYERS: usize = 1 << 12;

/// Finds the places of single matrices of a checkpoint.
pub struct Placer<'a> {
    model: &'a Model,
    rows: Vec<ActiveRow<'a>>,
}

impl Model {
    /// What finds the places of single matrices, whether or not others are there.
    ///
    /// # Errors
    /// As the evaluation of the rules' conditions.
    pub fn placer(&self) -> Result<Placer<'_>> {
        Ok(Placer { model: self, rows: self.active_rows(MAX_LAYERS)? })
    }
}

impl Placer<'_> {
    /// The name of a checkpoint's tensor in the definition's terms: two that agree in this are the
    /// same tensor.
    pub fn canonical(&self, name: &str) -> String {
        self.model.canonical(name)
    }

    /// Whether any rule makes the tensor `target`, in every checkpoint or in some.
    pub fn knows_target(&self, target: &str) -> bool {
        self.rows.iter().any(|r| r.row.to.iter().any(|to| to.matches(target).is_some()))
    }

    /// Where the rows and the columns of a matrix go: `matrix` is a tensor of the checkpoint, of
    /// which only name and shape count.
    ///
    /// # Errors
    /// `Malformed` for a tensor that the architecture does not know or leaves out, or whose shape its
    /// rule does not fit; `Unsupported` where the rule does more than to move rows and columns.
    pub fn place(&self, matrix: &TensorInfo) -> Result<Vec<Placed>> {
        let [_, columns] = matrix.shape[..] else {
            return Err(Error::unsupported(format!("shape {:?} is no matrix", matrix.shape)));
        };
        let Self { model, rows } = self;
        let [(name, whole)] = &model.taken_for(matrix, rows)?[..] else {
            return Err(Error::unsupported("it is several matrices in one"));
        };
        if model.is_dropped(name, true)? || model.is_dropped(name, false)? {
            return Err(Error::malformed(format!("the architecture {} leaves it out", model.arch.name))
                .hint(
                    "the adapter was made for another base, or for one whose output is no matrix of its own",
                ));
        }
        let found = rows.iter().find_map(|r| Some((r, r.captures(name)?)));
        let Some((active, captures)) = found else {
            return Err(model.unknown_tensor(&matrix.name, name, rows));
        };
        model.check_layer(&captures)?;
        let stack = match (&active.row.stack, captures.integers.get(&'e')) {
            (Some(_), Some(&e)) if e < active.stack => Some((e, active.stack)),
            (Some(_), e) => {
                let n = active.stack;
                return Err(Error::malformed(format!("is number {e:?}, config.json says there are {n}")));
            }
            (None, _) => None,
        };
        let place = |(k, to): (usize, &Template)| {
            let (axes, elementwise) = model.transform(active.row, k, whole, &captures, Layout::Ggml)?;
            let factor = elementwise.iter().try_fold(1.0, |product, e| match e {
                Elementwise::Affine { mul, add: 0.0 } => Ok(product * mul),
                _ => Err(Error::unsupported(
                    "the architecture changes its values by more than a factor, which a product of two matrices cannot follow",
                )),
            })?;
            let (rows, columns, turned) = axes.apart(columns).ok_or_else(|| {
                Error::unsupported(
                    "the architecture mixes its rows and columns, which a product of two matrices cannot follow",
                )
            })?;
            let target = to.fill(&captures).ok_or_else(|| Error::malformed("no target name"))?;
            let joined = model.joined(active.row, k, whole, &captures, Layout::Ggml)?;
            Ok(Placed { target, rows, columns, turned, factor, stack, joined })
        };
        active.row.to.iter().enumerate().map(place).collect()
    }

    /// Whether GGUF has a matrix of the checkpoint transposed, so that the checkpoint's is stored as
    /// (inputs, outputs). `Conv1D` of GPT-2 is.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn is_transposed(&self, matrix: &TensorInfo) -> Result<bool> {
        Ok(self.place(matrix)?.first().is_some_and(|p| p.turned))
    }
}
