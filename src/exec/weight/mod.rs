//! Constants that stay as they are stored, and are decoded where they are read.
//!
//! Formulas: coremltools, `converters/mil/mil/ops/defs/iOS18/compression.py`. They are computed in float32 and rounded
//! to the type of the result, so values are those of coremltools to the bit.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::groups::Groups;
use super::sparse::{Sparse, Values};
use super::tensor::{Data, MOST_STORED, Tensor, bounded, elements};
use crate::block::bits;
use crate::container::coreml::DataType;
use crate::container::map::MappedFile;
use crate::error::{Error, Result};

/// Codes are unpacked in runs of so many, on the stack.
pub(super) const RUN: usize = 512;
/// Most weights of weights of weights.
const MOST_DEPTH: u32 = 4;

/// Bytes of a constant.
#[derive(Clone, Debug)]
pub(super) enum Bytes {
    /// From the program.
    Here(Arc<[u8]>),
    /// In a weight file.
    Mapped(Arc<MappedFile>, Range<usize>),
}

impl Bytes {
    pub(super) fn get(&self) -> &[u8] {
        match self {
            Self::Here(bytes) => bytes,
            // The package has checked where its blobs lie.
            Self::Mapped(file, range) => file.bytes().get(range.clone()).unwrap_or_default(),
        }
    }
}

/// A tensor as it is stored, row-major; types below a byte are a stream of bits.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) dtype: DataType,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Bytes,
}

impl Stored {
    /// # Errors
    /// `Unsupported` for types that constants of programs do not have; `Malformed` for another number of bytes.
    pub(super) fn new(dtype: DataType, shape: Vec<usize>, bytes: Bytes) -> Result<Self> {
        use DataType::{
            Float16, Float32, Int4, Int8, Int16, Int32, UInt1, UInt2, UInt3, UInt4, UInt6, UInt8, UInt16,
        };
        let is_known =
            [Float16, Float32, Int4, Int8, Int16, Int32, UInt1, UInt2, UInt3, UInt4, UInt6, UInt8, UInt16]
                .contains(&dtype);
        if !is_known {
            return Err(Error::unsupported(format!("constants of type {dtype} are not computed with")));
        }
        let (n, found) = (bounded(&shape, MOST_STORED)? as u64, bytes.get().len());
        match dtype.bytes(n) == Some(found as u64) {
            true => Ok(Self { dtype, shape, bytes }),
            false => Err(Error::malformed(format!("{found} bytes for {n} elements of type {dtype}"))),
        }
    }

    /// The codes from `first` on, as they are stored. `out` has at most as many as remain.
    pub(super) fn codes(&self, first: usize, out: &mut [u8]) {
        bits::unpack(self.bytes.get(), self.dtype.bits(), first, out);
    }

    /// The elements from `first` on, as numbers. `out` has at most as many as remain.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        let bytes = self.bytes.get();
        let width = self.dtype.bits() as usize / 8;
        let words = bytes.get(first * width..).unwrap_or_default();
        match self.dtype {
            DataType::Float16 if out.len() < 16 => {
                out.iter_mut()
                    .zip(words.as_chunks().0)
                    .for_each(|(to, b)| *to = f16::from_le_bytes(*b).to_f32());
            }
            DataType::Float16 => {
                let mut run = [f16::ZERO; RUN];
                for (out, words) in out.chunks_mut(RUN).zip(words.chunks(2 * RUN)) {
                    let run = &mut run[..out.len()];
                    run.iter_mut().zip(words.as_chunks().0).for_each(|(to, b)| *to = f16::from_le_bytes(*b));
                    run.convert_to_f32_slice(out);
                }
            }
            DataType::Float32 => {
                out.iter_mut().zip(words.as_chunks().0).for_each(|(to, b)| *to = f32::from_le_bytes(*b));
            }
            DataType::Int32 => {
                let words = words.as_chunks().0;
                out.iter_mut().zip(words).for_each(|(to, b)| *to = i32::from_le_bytes(*b) as f32);
            }
            DataType::Int16 => {
                let words = words.as_chunks().0;
                out.iter_mut().zip(words).for_each(|(to, b)| *to = i16::from_le_bytes(*b).into());
            }
            DataType::UInt16 => {
                let words = words.as_chunks().0;
                out.iter_mut().zip(words).for_each(|(to, b)| *to = u16::from_le_bytes(*b).into());
            }
            DataType::UInt8 => out.iter_mut().zip(words).for_each(|(to, b)| *to = (*b).into()),
            DataType::Int8 => out.iter_mut().zip(words).for_each(|(to, b)| *to = (*b as i8).into()),
            below_a_byte => {
                let (mut codes, sign) = ([0; RUN], if below_a_byte == DataType::Int4 { 8 } else { 0 });
                for (k, out) in out.chunks_mut(RUN).enumerate() {
                    let codes = &mut codes[..out.len()];
                    self.codes(first + k * RUN, codes);
                    let value = |code: u8| f32::from(i16::from(code ^ sign) - i16::from(sign));
                    out.iter_mut().zip(codes).for_each(|(to, code)| *to = value(*code));
                }
            }
        }
    }
}

/// How a weight is made of what is stored.
#[derive(Debug)]
pub(super) enum Form {
    Plain(Stored),
    /// `scale * (data - offset)`, one scale for each group.
    Blockwise {
        data: Arc<Weight>,
        scale: Arc<Weight>,
        offset: Option<Arc<Weight>>,
        groups: Groups,
    },
    /// `lut[group][index]`. Entries of several elements lie along an axis: `Vectors`.
    Lut {
        indices: Stored,
        lut: Arc<Weight>,
        groups: Groups,
        vectors: Option<Vectors>,
    },
    Sparse(Sparse),
}

/// Table entries of several elements.
#[derive(Debug)]
pub(super) struct Vectors {
    /// Elements of an entry.
    size: usize,
    /// Product of the dimensions behind the axis that they lie along.
    inner: usize,
}

/// A constant of numbers.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) dtype: DataType,
    pub(super) shape: Vec<usize>,
    form: Form,
    depth: u32,
}

impl Weight {
    pub(super) fn plain(stored: Stored) -> Self {
        Self { dtype: stored.dtype, shape: stored.shape.clone(), form: Form::Plain(stored), depth: 0 }
    }

    /// `constexpr_blockwise_shift_scale`: sizes of `scale` divide those of `data`.
    ///
    /// # Errors
    /// `Malformed` for shapes that do not go together.
    pub(super) fn blockwise(data: Arc<Self>, scale: Arc<Self>, offset: Option<Arc<Self>>) -> Result<Self> {
        let groups = Groups::new(&data.shape, &scale.shape).map_err(|e| e.context("scale"))?;
        if let Some(offset) = offset.as_ref().filter(|offset| offset.shape != scale.shape) {
            let (found, wanted) = (&offset.shape, &scale.shape);
            return Err(Error::malformed(format!("offset has shape {found:?}, scale {wanted:?}")));
        }
        if !is_float(scale.dtype) {
            return Err(Error::malformed(format!("scale is {}, a float was expected", scale.dtype)));
        }
        let parts = [Some(&data), Some(&scale), offset.as_ref()];
        let (dtype, shape, depth) = (scale.dtype, data.shape.clone(), depth(parts.into_iter().flatten())?);
        Ok(Self { dtype, shape, form: Form::Blockwise { data, scale, offset, groups }, depth })
    }

    /// `constexpr_lut_to_dense`: the table's shape is groups of each dimension, entries, elements of an entry.
    ///
    /// # Errors
    /// `Malformed` for shapes that do not go together.
    pub(super) fn lut(indices: Stored, lut: Arc<Self>, vector_axis: Option<i64>) -> Result<Self> {
        let (groups, size) = table(&indices.shape, indices.dtype, &lut)?;
        let mut shape = indices.shape.clone();
        let vectors = match (size, vector_axis) {
            (1, None) => None,
            (2.., Some(axis)) => {
                let axis = super::call::axis(axis, shape.len())?;
                shape[axis] = shape[axis].checked_mul(size).ok_or_else(|| Error::limit("too large"))?;
                bounded(&shape, MOST_STORED)?;
                Some(Vectors { size, inner: shape[axis + 1..].iter().product() })
            }
            _ => {
                return Err(Error::malformed(format!(
                    "vector_axis belongs to entries of several elements; these have {size}"
                )));
            }
        };
        let (dtype, depth) = (lut.dtype, depth([&lut])?);
        Ok(Self { dtype, shape, form: Form::Lut { indices, lut, groups, vectors }, depth })
    }

    /// `constexpr_sparse_to_dense`.
    ///
    /// # Errors
    /// `Malformed` where there are not as many values as ones in the mask.
    pub(super) fn sparse(mask: Stored, values: Values) -> Result<Self> {
        let (dtype, shape, depth) = (values.dtype(), mask.shape.clone(), depth([values.weight()])?);
        Ok(Self { dtype, shape, form: Form::Sparse(Sparse::new(mask, values)?), depth })
    }

    /// What is stored, where nothing is computed.
    pub(super) fn as_stored(&self) -> Option<&Stored> {
        match &self.form {
            Form::Plain(stored) => Some(stored),
            _ => None,
        }
    }

    /// The elements from `first` on. `out` has at most as many as remain.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        match &self.form {
            Form::Plain(stored) => stored.read(first, out),
            Form::Sparse(sparse) => sparse.read(first, out),
            Form::Blockwise { data, scale, offset, groups } => {
                data.read(first, out);
                groups.runs(first, out.len(), |group, run| {
                    let (mut factor, mut shift) = ([0.0], [0.0]);
                    scale.read(group, &mut factor);
                    if let Some(offset) = offset {
                        offset.read(group, &mut shift);
                    }
                    out[run].iter_mut().for_each(|v| *v = (*v - shift[0]) * factor[0]);
                });
                if self.dtype == DataType::Float16 {
                    round(out);
                }
            }
            Form::Lut { indices, lut, groups, vectors: None } => {
                let (mut codes, mut table) = ([0; RUN], [0.0; 256]);
                let entries = 1 << indices.dtype.bits();
                let mut of = usize::MAX;
                for (k, out) in out.chunks_mut(RUN).enumerate() {
                    let (first, codes) = (first + k * RUN, &mut codes[..out.len()]);
                    indices.codes(first, codes);
                    groups.runs(first, out.len(), |group, run| {
                        if of != group {
                            lut.read(group * entries, &mut table[..entries]);
                            of = group;
                        }
                        let codes = &codes[run.clone()];
                        out[run].iter_mut().zip(codes).for_each(|(to, c)| *to = table[usize::from(*c)]);
                    });
                }
            }
            Form::Lut { indices, lut, groups, vectors: Some(vectors) } => {
                let entries = 1 << indices.dtype.bits();
                for (k, out) in out.iter_mut().enumerate() {
                    // Places along the axis are `index, element of the entry`.
                    let (row, inner) = ((first + k) / vectors.inner, (first + k) % vectors.inner);
                    let at = row / vectors.size * vectors.inner + inner;
                    let mut code = [0];
                    indices.codes(at, &mut code);
                    let entry = groups.of(at) * entries + usize::from(code[0]);
                    lut.read(entry * vectors.size + row % vectors.size, std::slice::from_mut(out));
                }
            }
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// `Limit` where it is too large.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let n = elements(&self.shape)?;
        let mut values = vec![0.0; n];
        self.read(0, &mut values);
        if is_float(self.dtype) {
            return Ok(Tensor::of_floats(self.dtype, self.shape.clone(), values));
        }
        let ints = match self.as_stored() {
            // float32 does not hold all of them.
            Some(stored) if stored.dtype == DataType::Int32 => {
                stored.bytes.get().as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
            }
            _ => values.into_iter().map(|v| v as i32).collect(),
        };
        Ok(Tensor { dtype: self.dtype, shape: self.shape.clone(), data: Data::Ints(Arc::new(ints)) })
    }
}

/// Groups of a table, and elements of its entries.
///
/// # Errors
/// `Malformed` for a table that is not for these indices.
pub(super) fn table(whole: &[usize], indices: DataType, lut: &Weight) -> Result<(Groups, usize)> {
    let wrong = |what: String| Error::malformed(format!("lut of shape {:?}: {what}", lut.shape));
    if ![1, 2, 3, 4, 6, 8].contains(&indices.bits()) || indices == DataType::Int4 || indices == DataType::Int8
    {
        return Err(wrong(format!("indices of type {indices}")));
    }
    let [groups @ .., entries, size] = &lut.shape[..] else {
        return Err(wrong("its last two sizes are entries, and elements of an entry".into()));
    };
    if *entries != 1 << indices.bits() || *size == 0 {
        return Err(wrong(format!("{indices} reads {} entries", 1 << indices.bits())));
    }
    Ok((Groups::new(whole, groups).map_err(|e| e.context("lut"))?, *size))
}

fn depth<'a>(parts: impl IntoIterator<Item = &'a Arc<Weight>>) -> Result<u32> {
    let depth = parts.into_iter().map(|w| w.depth).max().unwrap_or(0) + 1;
    match depth <= MOST_DEPTH {
        true => Ok(depth),
        false => {
            Err(Error::unsupported(format!("weights that are made of weights, more than {MOST_DEPTH} times")))
        }
    }
}

pub(super) fn is_float(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Float32)
}

/// Rounds to float16; whether one that was finite is not any more: from 65520 on they are not.
pub(super) fn round(values: &mut [f32]) -> bool {
    let (mut halves, mut overflows) = ([f16::ZERO; RUN], false);
    for values in values.chunks_mut(RUN) {
        let halves = &mut halves[..values.len()];
        overflows |= values.iter().fold(false, |any, v| any | ((v.abs() >= 65520.0) & v.is_finite()));
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
    overflows
}

#[cfg(test)]
mod tests;
