//! Tensors in memory.

use std::sync::Arc;

use crate::container::coreml::DataType;
use crate::error::{Error, Result};

/// Most elements of a tensor that an operation makes.
const MOST_ELEMENTS: usize = 1 << 29;
/// Most dimensions: Core ML has 5, and tables of weights 2 more.
const MOST_DIMENSIONS: usize = 8;
/// Most elements of a tensor that is stored, or a state.
pub(super) const MOST_STORED: usize = 1 << (usize::BITS / 2 + usize::BITS / 8);

/// Elements, row-major.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// Of float16 and float32. Those of float16 are such numbers where operations are rounded, see
    /// [`Rounding`](super::Rounding).
    Floats(Arc<Vec<f32>>),
    /// Of all integers.
    Ints(Arc<Vec<i32>>),
    /// Of truth values.
    Bools(Arc<Vec<bool>>),
    /// Of one text.
    Text(Arc<str>),
}

/// A tensor. Its elements are shared: a clone copies none.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub(super) dtype: DataType,
    pub(super) shape: Vec<usize>,
    pub(super) data: Data,
}

impl Tensor {
    /// A tensor of float32, outermost dimension first. It may be given where float16 is demanded, too.
    ///
    /// # Errors
    /// `Misuse` for another number of values than the shape has.
    pub fn floats(shape: &[usize], values: Vec<f32>) -> Result<Self> {
        check_len(shape, values.len())?;
        Ok(Self::of_floats(DataType::Float32, shape.to_vec(), values))
    }

    /// A tensor of int32, outermost dimension first.
    ///
    /// # Errors
    /// `Misuse` for another number of values than the shape has.
    pub fn ints(shape: &[usize], values: Vec<i32>) -> Result<Self> {
        check_len(shape, values.len())?;
        Ok(Self::of_ints(shape.to_vec(), values))
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DataType {
        self.dtype
    }

    /// The shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, row-major, where they are of float16 or float32.
    pub fn as_floats(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Floats(values) => Some(values),
            _ => None,
        }
    }

    /// The elements, row-major, where they are integers.
    pub fn as_ints(&self) -> Option<&[i32]> {
        match &self.data {
            Data::Ints(values) => Some(values),
            _ => None,
        }
    }

    pub(super) fn of_floats(dtype: DataType, shape: Vec<usize>, values: Vec<f32>) -> Self {
        Self { dtype, shape, data: Data::Floats(Arc::new(values)) }
    }

    pub(super) fn of_ints(shape: Vec<usize>, values: Vec<i32>) -> Self {
        Self { dtype: DataType::Int32, shape, data: Data::Ints(Arc::new(values)) }
    }

    pub(super) fn of_bools(shape: Vec<usize>, values: Vec<bool>) -> Self {
        Self { dtype: DataType::Bool, shape, data: Data::Bools(Arc::new(values)) }
    }

    /// How many elements there are.
    pub(super) fn len(&self) -> usize {
        match &self.data {
            Data::Floats(values) => values.len(),
            Data::Ints(values) => values.len(),
            Data::Bools(values) => values.len(),
            Data::Text(_) => 1,
        }
    }

    /// `int32[1,5]`
    pub(super) fn described(&self) -> String {
        described(self.dtype, &self.shape)
    }
}

/// `int32[1,5]`
pub(super) fn described(dtype: DataType, shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("{dtype}[{}]", sizes.join(","))
}

fn check_len(shape: &[usize], found: usize) -> Result<()> {
    match elements(shape)? == found {
        true => Ok(()),
        false => Err(Error::misuse(format!("{found} values for a tensor of shape {shape:?}"))),
    }
}

/// How many elements a tensor of this shape has that is to be made.
///
/// # Errors
/// `Limit` for more than are computed with.
pub(super) fn elements(shape: &[usize]) -> Result<usize> {
    bounded(shape, MOST_ELEMENTS)
}

/// So many zeros.
///
/// # Errors
/// `Limit` where there is no memory for them.
pub(super) fn zeros(n: usize) -> Result<Vec<f32>> {
    // Only to find out: zeros that nobody has written to take no memory.
    let reserved = Vec::<f32>::new().try_reserve_exact(n);
    reserved.map_err(|_| Error::limit(format!("there is no memory for a tensor of {n} elements")))?;
    Ok(vec![0.0; n])
}

/// How many elements a tensor of this shape has, at most `most`. Sizes of the others are bounded where one is 0, too:
/// products of any of them are safe.
///
/// # Errors
/// `Limit` for more.
pub(super) fn bounded(shape: &[usize], most: usize) -> Result<usize> {
    if shape.len() > MOST_DIMENSIONS {
        return Err(Error::limit(format!(
            "{} dimensions, at most {MOST_DIMENSIONS} are computed with",
            shape.len()
        )));
    }
    let product = shape.iter().try_fold(1usize, |n, size| n.checked_mul((*size).max(1)));
    match product.filter(|n| *n <= most) {
        Some(_) => Ok(shape.iter().product()),
        None => Err(Error::limit(format!(
            "a tensor of shape {shape:?} has more than {most} elements, the most that are computed with"
        ))),
    }
}
