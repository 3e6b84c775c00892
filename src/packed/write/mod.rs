//! Writing matrices as quantized checkpoints store them: the inverse of the readers beside.
//!
//! A layout says of which tensors a matrix consists, and where the bytes of some of its rows lie in them.
//! Rows come as integers in groups, or as weights, as the layout wants them.

mod awq;
mod bnb;
mod compressed;
mod fp8;
mod gptq;
mod mxfp4;
mod nested;
mod qpack;
mod regrid;
mod target;

use std::fmt::Debug;
use std::sync::Arc;

pub use awq::Awq;
pub use bnb::{Bnb4, Bnb8};
pub use compressed::{Compressed, CompressedFp8};
pub use fp8::Fp8;
pub use gptq::Gptq;
pub use mxfp4::Mxfp4;
pub use qpack::{QpackCodebook, QpackIntegers, QpackScaled, QpackSparse, QpackTernary};
pub use regrid::{Data as IntegerData, Integers, Regrid, is_half};
pub use target::{CompressedFormat, Format, QpackEncoding, Target};

pub use crate::block::uniform::{Grid, round, weigh};

use crate::block::LANES;
use crate::container::grouped::Rows;
use crate::container::qpack::Encoding;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// One tensor of a packed matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// What its name has instead of the matrix' `.weight`.
    pub suffix: String,
    /// Its type.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
}

impl Part {
    fn new(suffix: &str, dtype: DType, shape: &[u64]) -> Self {
        Self { suffix: suffix.to_string(), dtype, shape: shape.to_vec() }
    }
}

/// Some rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// As integers in groups, on the layout's grid.
    Integers(&'a Rows),
    /// The same, and the group of each column, where groups do not follow on each other.
    Ordered(&'a Rows, &'a [u32]),
    /// As weights.
    Weights(&'a [f32]),
    /// As blocks of ggml's MXFP4.
    Mxfp4(&'a [u8]),
}

impl<'a> Data<'a> {
    fn integers(self) -> Result<&'a Rows> {
        match self {
            Self::Integers(rows) | Self::Ordered(rows, _) => Ok(rows),
            Self::Weights(_) | Self::Mxfp4(_) => Err(Error::misuse("integers in groups are wanted")),
        }
    }

    /// The group of each of so many columns.
    fn groups(self, cols: usize, group_size: u64) -> Vec<u32> {
        let of_column = |c: usize| match self {
            Self::Ordered(_, groups) => groups.get(c).copied().unwrap_or(0),
            _ => (c as u64 / group_size.max(1)) as u32,
        };
        (0..cols).map(of_column).collect()
    }

    /// The same as I32.
    fn group_bytes(self, cols: usize, group_size: u64) -> Vec<u8> {
        self.groups(cols, group_size).into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Weights, all of them finite: scales have no room for what is not.
    fn weights(self) -> Result<&'a [f32]> {
        match self {
            Self::Weights(weights) if are_finite(weights) => Ok(weights),
            Self::Weights(_) => Err(Error::malformed("weights are NaN or infinite")),
            _ => Err(Error::misuse("weights are wanted")),
        }
    }
}

/// Puts bytes at an offset of a part, by its number.
pub type Put<'a> = dyn FnMut(usize, u64, &[u8]) -> Result<()> + 'a;

/// How a checkpoint stores matrices.
pub trait Layout: Debug + Send + Sync {
    /// The integers that it takes; `None` where it takes weights.
    fn grid(&self) -> Option<&Grid> {
        None
    }

    /// Type of the scales of integers.
    fn scales(&self) -> DType {
        DType::F16
    }

    /// The encoding of a `.qpack` tensor of so many rows and columns, whose parts, in its order, it writes; `None`
    /// where it writes tensors of a checkpoint.
    fn encoding(&self, _rows: u64, _cols: u64) -> Option<Encoding> {
        None
    }

    /// The tensors of a matrix of so many rows and columns.
    ///
    /// # Errors
    /// `Unsupported` where it cannot hold such a matrix.
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>>;

    /// Rows of so many columns are written in multiples of so many, but for the last ones.
    fn unit(&self, _cols: u64) -> u64 {
        1
    }

    /// Whether columns may name their groups.
    fn holds_order(&self) -> bool {
        false
    }

    /// The sum over whole rows of what has to be known of all weights before any is written, and of how many
    /// numbers; `None` where nothing has.
    fn survey(&self, _weights: &[f32]) -> Option<(f64, u64)> {
        None
    }

    /// Itself, for a matrix whose mean of that is known.
    fn informed(&self, _mean: f64) -> Option<Arc<dyn Layout>> {
        None
    }

    /// Itself, for a matrix each of whose rows has so many weights other than 0; `None` where sizes do not
    /// depend on that.
    fn counted(&self, _used: &[u64]) -> Option<Arc<dyn Layout>> {
        None
    }

    /// Puts the rows from `first` on, of a matrix of so many rows and columns. Returns the sum of the
    /// squares of what weights lose by that: 0 for integers.
    ///
    /// # Errors
    /// As `put` fails; `Misuse` for data of the other kind.
    fn write(&self, shape: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64>;
}

/// An error for a matrix that does not fit.
fn unfit(method: &str, rows: u64, cols: u64, why: &str) -> Error {
    Error::unsupported(format!("{method} cannot hold {rows} x {cols}: {why}"))
}

/// The sum of the squares of what `weights` lose when they become `stored`.
pub fn lost(weights: &[f32], stored: &[f32]) -> f64 {
    let (weights, rest) = weights.as_chunks::<LANES>();
    let (stored, last) = stored.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for (w, y) in weights.iter().zip(stored) {
        for k in 0..LANES {
            let lost = f64::from(w[k] - y[k]);
            sums[k] += lost * lost;
        }
    }
    let rest = rest.iter().zip(last).map(|(w, y)| f64::from(w - y).powi(2)).sum::<f64>();
    sums.iter().sum::<f64>() + rest
}

fn are_finite(weights: &[f32]) -> bool {
    // Without branches.
    weights.chunks(4096).all(|some| some.iter().fold(true, |all, w| all & w.is_finite()))
}

/// The greatest magnitude of weights that are finite.
fn greatest(weights: &[f32]) -> f32 {
    let mut most = [0f32; LANES];
    let (lanes, rest) = weights.as_chunks::<LANES>();
    let greater = |most: f32, w: f32| if w.abs() > most { w.abs() } else { most };
    for w in lanes {
        for k in 0..LANES {
            most[k] = greater(most[k], w[k]);
        }
    }
    most.iter().chain(rest).fold(0.0, |most, w| greater(most, *w))
}

/// Numbers as F16, little-endian.
fn halves(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(|v| crate::block::f16_from_f32(v).to_le_bytes()).collect()
}
