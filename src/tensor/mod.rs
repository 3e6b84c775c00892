//! What a tensor is: an element or block type, a shape, a place in a file.

mod dtype;
mod strided;

pub use dtype::DType;
pub use strided::{Axes, Dim, StridedCopy};

use crate::error::{Error, Result};

/// A tensor as a container's header describes it.
///
/// `shape` is in row-major order, the outermost dimension first, as Hugging Face writes it; GGUF
/// stores the same numbers reversed (`ne[0]` is the row length). A scalar has an empty shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique within a checkpoint.
    pub name: String,
    /// Element or block type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Which of the checkpoint's files holds the data.
    pub file: usize,
    /// First byte of the data, from the beginning of that file.
    pub offset: u64,
    /// Bytes of data: always `dtype.nbytes(&shape)`.
    pub nbytes: u64,
}

impl TensorInfo {
    /// Number of elements. The reader has checked that it fits.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Elements in a row (the innermost dimension); 1 for a scalar.
    pub fn row(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// Most dimensions of a tensor in any format: NumPy's and PyTorch's bound.
pub const MAX_DIMS: usize = 64;

/// Number of elements of `shape`.
///
/// # Errors
/// `Malformed` when the product does not fit 63 bits, and for more than [`MAX_DIMS`] dimensions.
pub fn elements(shape: &[u64]) -> Result<u64> {
    if shape.len() > MAX_DIMS {
        return Err(Error::malformed(format!("{} dimensions, at most {MAX_DIMS} are allowed", shape.len())));
    }
    shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= i64::MAX as u64)
        .ok_or_else(|| Error::malformed(format!("shape {shape:?} has more than 2^63 elements")))
}
