//! Weights of Core ML packages: what constants decode to, and the tensors of a model that they are.
//!
//! How constants are made up is read by [`constants()`]. A tensor of a model is a constant that is called after it; a
//! matrix with a factor for each row may have these apart, behind its product (`NAME_scale`).

mod nearest;
mod weight;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::block::f16_from_f32;
use crate::container::coreml::{Constant, DataType, Form, Package, Place, constants};
use crate::container::{InputFile, Joined, Packing, Store, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo, elements};

pub use weight::Weight;

/// What the factors behind a product are called: the matrix's name with this behind it.
pub const FACTORS: &str = "_scale";

/// The constants of the functions of some packages, by name.
#[derive(Debug, Default)]
pub struct Constants {
    by_name: IndexMap<String, Named>,
    /// Functions that have another constant by a name that was met before, and of the same shape.
    differing: Vec<Differing>,
}

#[derive(Debug)]
struct Named {
    package: Arc<Package>,
    constant: Arc<Constant>,
    function: String,
}

/// Two functions of a package that have different constants of one name and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// The name.
    pub constant: String,
    /// The functions.
    pub functions: [String; 2],
}

impl Constants {
    /// Those of all functions of these packages. Where a name comes again, the first counts.
    ///
    /// # Errors
    /// As [`constants()`].
    pub fn of(packages: &[Arc<Package>]) -> Result<Self> {
        let mut all = Self::default();
        for package in packages {
            for (function, body) in &package.model().program.functions {
                let context = |e: Error| e.context(format_args!("function {function:?}")).at(package.path());
                for constant in constants(package, body).map_err(context)? {
                    all.add(package, function, constant);
                }
            }
        }
        Ok(all)
    }

    fn add(&mut self, package: &Arc<Package>, function: &str, constant: Arc<Constant>) {
        if let Some(first) = self.by_name.get(&constant.name) {
            let is_other = first.constant.form != constant.form && first.constant.shape == constant.shape;
            if Arc::ptr_eq(&first.package, package) && first.function != function && is_other {
                let functions = [first.function.clone(), function.into()];
                self.differing.push(Differing { constant: constant.name.clone(), functions });
            }
            return;
        }
        let named = Named { package: Arc::clone(package), function: function.into(), constant };
        self.by_name.insert(named.constant.name.clone(), named);
    }

    /// Functions of a package that have different constants of one name and shape.
    pub fn differing(&self) -> &[Differing] {
        &self.differing
    }

    /// The constant of this name.
    pub fn get(&self, name: &str) -> Option<&Arc<Constant>> {
        self.by_name.get(name).map(|named| &named.constant)
    }

    /// All of them, in the order in which they were met.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Constant>> {
        self.by_name.values().map(|named| &named.constant)
    }

    /// The tensor that these hold, one or several that follow on each other along its first dimension; `None` where one
    /// is not there. Second, the names of all constants that are part of it.
    ///
    /// # Errors
    /// As [`Weight::new`]; `Malformed` for pieces that do not fit together; `Io`.
    pub fn tensor(&self, of: &[String]) -> Result<Option<(Tensor, Vec<&str>)>> {
        let (mut pieces, mut used) = (Vec::with_capacity(of.len()), Vec::new());
        for name in of {
            let Some((name, named)) = self.by_name.get_key_value(name) else { return Ok(None) };
            let factors = self.factors(name, &named.constant);
            used.push(name.as_str());
            used.extend(factors.map(|(name, _)| name));
            pieces.push(Piece::new(named, factors.map(|(_, factors)| factors))?);
        }
        Ok(if pieces.is_empty() { None } else { Some((Tensor::new(pieces)?, used)) })
    }

    /// The tensors of a model that are among them: `names` are those of tensors, each with the names of the constants
    /// that hold it, as [`Self::tensor`] takes them. Those that are not there are left out. Second, the names of all
    /// constants that are part of a tensor.
    ///
    /// # Errors
    /// As there.
    pub fn store(&self, names: &[(String, Vec<String>)]) -> Result<(Store, HashSet<&str>)> {
        let mut parts = Parts::default();
        let (mut joined, mut used) = (Vec::new(), HashSet::new());
        for (name, of) in names {
            let context = |e: Error| e.context(format_args!("tensor {name:?}"));
            if let Some((tensor, constants)) = self.tensor(of).map_err(context)? {
                used.extend(constants);
                joined.push(parts.tensor(name, tensor).map_err(context)?);
            }
        }
        Ok((parts.store(joined)?, used))
    }

    /// The factors behind the product of a matrix, or of several: one for each row.
    fn factors(&self, name: &str, constant: &Constant) -> Option<(&str, &Named)> {
        let (name, factors) = self.by_name.get_key_value(&format!("{name}{FACTORS}"))?;
        let rows: u64 = match matrix(&constant.shape) {
            [] | [_] => return None,
            [rows @ .., _] => elements(rows).ok()?,
        };
        (factors.constant.elements() == rows).then_some((name.as_str(), factors))
    }
}

/// A shape without the two dimensions of 1 that the matrix of a convolution has behind it.
pub fn matrix(shape: &[u64]) -> &[u64] {
    match shape {
        [matrix @ .., 1, 1] if matrix.len() == 2 => matrix,
        shape => shape,
    }
}

/// A run of rows of a tensor.
#[derive(Debug)]
struct Piece {
    weight: Weight,
    /// With how many elements each belongs to.
    factors: Option<(Weight, u64)>,
}

impl Piece {
    fn new(named: &Named, factors: Option<&Named>) -> Result<Self> {
        let open = |named: &Named| Weight::new(Arc::clone(&named.package), Arc::clone(&named.constant));
        let row = matrix(&named.constant.shape).last().copied().unwrap_or(1);
        let factors = factors.map(open).transpose()?.map(|weight| (weight, row));
        Ok(Self { weight: open(named)?, factors })
    }

    fn constant(&self) -> &Constant {
        self.weight.constant()
    }

    fn weights(&self) -> impl Iterator<Item = &Weight> {
        std::iter::once(&self.weight).chain(self.factors.iter().map(|(factors, _)| factors))
    }

    fn constants(&self) -> impl Iterator<Item = &Constant> {
        self.weights().map(|weight| &**weight.constant())
    }

    fn read(&self, start: u64, out: &mut [f32]) -> Result<()> {
        self.weight.read(start, out)?;
        self.with_factors(start, out, |x, factor| x * factor)
    }

    fn nearest(&self, start: u64, values: &mut [f32]) -> Result<bool> {
        self.with_factors(start, values, |x, factor| if factor == 0.0 { 0.0 } else { x / factor })?;
        let is_told = self.weight.nearest(start, values)?;
        self.with_factors(start, values, |x, factor| x * factor)?;
        Ok(is_told)
    }

    /// Each value with the factor of its row; nothing where there are no factors.
    fn with_factors(&self, start: u64, values: &mut [f32], of: impl Fn(f32, f32) -> f32) -> Result<()> {
        let Some((factors, row)) = &self.factors else { return Ok(()) };
        if values.is_empty() {
            return Ok(());
        }
        let first = start / row;
        let n = (start + values.len() as u64 - 1) / row - first + 1;
        let mut of_rows = vec![0.0; n as usize];
        factors.read(first, &mut of_rows)?;
        for (at, x) in (start..).zip(values) {
            *x = of(*x, of_rows[(at / row - first) as usize]);
        }
        Ok(())
    }
}

/// A tensor of a model, as packages have it.
#[derive(Debug)]
pub struct Tensor {
    shape: Vec<u64>,
    dtype: DType,
    pieces: Vec<Piece>,
}

impl Tensor {
    fn new(pieces: Vec<Piece>) -> Result<Self> {
        let shapes = || pieces.iter().map(|piece| matrix(&piece.constant().shape));
        let mut shape = shapes().next().unwrap_or_default().to_vec();
        if pieces.len() > 1 {
            let rest = shape.split_first().map(|(_, rest)| rest.to_vec()).unwrap_or_default();
            if shapes().any(|s| s.split_first().is_none_or(|(_, other)| other != rest)) {
                return Err(Error::malformed("is in pieces that have rows of different shapes"));
            }
            let rows = shapes().filter_map(|s| s.first()).try_fold(0u64, |n, rows| n.checked_add(*rows));
            let rows = rows.ok_or_else(|| Error::malformed("has more than 2^64 rows"))?;
            shape = [&[rows], &rest[..]].concat();
            elements(&shape)?;
        }
        let is_half = pieces.iter().all(|piece| piece.constant().data_type == DataType::Float16);
        Ok(Self { shape, dtype: if is_half { DType::F16 } else { DType::F32 }, pieces })
    }

    /// Its shape, outermost dimension first; of the matrix of a convolution without the dimensions of 1.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.constant().elements()).fold(0, u64::saturating_add)
    }

    /// How it is encoded, in words.
    pub fn encoding(&self) -> String {
        let Some(piece) = self.pieces.first() else { return String::new() };
        let factors = if piece.factors.is_some() { ", a factor per row" } else { "" };
        format!("{}{factors}", piece.constant().encoding())
    }

    /// Bits of a code, or of an element that is stored as it is.
    pub fn bits(&self) -> u32 {
        let codes =
            self.pieces.first().and_then(|piece| piece.constant().stored().first().map(|(c, _)| c.data_type));
        codes.map_or(0, DataType::bits)
    }

    /// Whether it is codes with scales or tables, or has factors: not stored as it is.
    pub fn is_coded(&self) -> bool {
        self.pieces.iter().any(|p| p.factors.is_some() || !matches!(p.constant().form, Form::Plain(_)))
    }

    /// How much farther than [`Self::nearest`] a value may lie from what was rounded, as a part of the largest: products
    /// of scales are rounded themselves.
    pub fn slack(&self) -> f64 {
        let of = |piece: &Piece| match (&piece.constant().form, &piece.factors) {
            (Form::Plain(_), None) => 0.0,
            (Form::Blockwise { .. }, _) => f64::from(f32::EPSILON) * 4096.0, // half a place of float16
            _ => f64::from(f32::EPSILON) * 8.0,
        };
        self.pieces.iter().map(of).fold(0.0, f64::max)
    }

    /// Bytes of all that is stored for it.
    pub fn bytes(&self) -> u64 {
        let constants = self.pieces.iter().flat_map(Piece::constants);
        constants.map(Constant::bytes).fold(0, u64::saturating_add)
    }

    /// Fills `out` with the values from element `start` on.
    ///
    /// # Errors
    /// As [`Weight::read`].
    pub fn read(&self, start: u64, out: &mut [f32]) -> Result<()> {
        self.each(start, out, |piece, start, out| piece.read(start, out))
    }

    /// As [`Weight::nearest`].
    ///
    /// # Errors
    /// As there.
    pub fn nearest(&self, start: u64, values: &mut [f32]) -> Result<bool> {
        let mut is_told = true;
        self.each(start, values, |piece, start, values| {
            is_told &= piece.nearest(start, values)?;
            Ok(())
        })?;
        Ok(is_told)
    }

    /// Calls `each` with every stretch of elements that share a scale, a table or a factor among the `n` from `start`
    /// on: where it is, counted from `start`, which group it is of, and how many elements that has. What shares
    /// nothing smaller is a group as a whole.
    pub fn groups(&self, start: u64, n: usize, mut each: impl FnMut(Range<usize>, u64, u64)) {
        let (mut before, mut groups, end) = (0, 0, start + n as u64);
        for piece in &self.pieces {
            let elements = piece.constant().elements();
            let (from, to) = (start.max(before), end.min(before + elements));
            let (shared, size) = match (piece.weight.shared(), &piece.factors) {
                (Some((shared, size)), None) => (Some(shared), size),
                (Some((shared, size)), Some((_, row))) if size <= *row => (Some(shared), size),
                (_, Some((_, row))) => (None, (*row).max(1)),
                (None, None) => (None, elements.max(1)),
            };
            if from < to {
                let (at, n) = (from - before, (to - from) as usize);
                let offset = (from - start) as usize;
                let mut one = |run: Range<usize>, group: u64| {
                    each(run.start + offset..run.end + offset, groups + group, size);
                };
                match shared {
                    Some(shared) => shared.runs(at, n, one),
                    None => {
                        let mut done = 0;
                        while done < n {
                            let place = at + done as u64;
                            let left = usize::try_from(size - place % size).unwrap_or(n);
                            let end = done + left.min(n - done);
                            one(done..end, place / size);
                            done = end;
                        }
                    }
                }
            }
            before += elements;
            groups += elements.div_ceil(size);
        }
    }

    /// Calls `of` with each piece that has elements from `start` on, the first of these, and their place in `values`.
    fn each(
        &self,
        start: u64,
        values: &mut [f32],
        mut of: impl FnMut(&Piece, u64, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let (mut at, mut rest, mut before) = (start, values, 0);
        for piece in &self.pieces {
            let end = before + piece.constant().elements();
            if at < end && !rest.is_empty() {
                let n = usize::try_from(end - at).unwrap_or(rest.len()).min(rest.len());
                let (these, others) = rest.split_at_mut(n);
                of(piece, at - before, these)?;
                (at, rest) = (at + n as u64, others);
            }
            before = end;
        }
        match rest.is_empty() {
            true => Ok(()),
            false => Err(Error::misuse(format!("{} elements beyond its end", rest.len()))),
        }
    }
}

impl View for Tensor {
    fn packing(&self) -> Packing {
        Packing { bits: self.bits(), block: [1, 0] }
    }

    fn read(&self, _: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let size = self.dtype.type_size() as usize;
        let mut values = vec![0.0; out.len() / size];
        Self::read(self, start, &mut values)?;
        match self.dtype {
            DType::F16 => {
                let halves = out.as_chunks_mut::<2>().0.iter_mut().zip(&values);
                halves.for_each(|(out, x)| *out = f16_from_f32(*x).to_le_bytes());
            }
            _ => {
                let singles = out.as_chunks_mut::<4>().0.iter_mut().zip(&values);
                singles.for_each(|(out, x)| *out = x.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// What tensors are stored as.
#[derive(Default)]
struct Parts {
    files: Vec<InputFile>,
    /// By package and name of the file.
    numbers: HashMap<(usize, String), usize>,
    tensors: Vec<TensorInfo>,
}

impl Parts {
    /// What a tensor is stored as becomes tensors of bytes.
    fn tensor(&mut self, name: &str, tensor: Tensor) -> Result<Joined> {
        let mut parts = Vec::new();
        for piece in &tensor.pieces {
            for weight in piece.weights() {
                for (constant, place) in weight.constant().stored() {
                    let part = format!("{name} / {}", constant.name);
                    self.part(&part, weight.package(), place)?;
                    parts.push(part);
                }
            }
        }
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        Ok(Joined { name: name.into(), dtype, shape, parts, view: Box::new(tensor) })
    }

    fn part(&mut self, name: &str, package: &Arc<Package>, place: &Place) -> Result<()> {
        let (file, offset) = match place {
            Place::Immediate(bytes) => {
                self.files.push(InputFile::of_bytes(name, bytes.to_vec()));
                (self.files.len() - 1, 0)
            }
            Place::File(file, blob) => {
                let key = (Arc::as_ptr(package).addr(), file.to_string());
                let number = match self.numbers.get(&key) {
                    Some(number) => *number,
                    None => {
                        let opened = package.weights().get(&key.1);
                        let opened =
                            opened.ok_or_else(|| Error::malformed(format!("{file:?} is missing")))?;
                        self.files.push(InputFile::open(opened.file().path())?);
                        self.numbers.insert(key, self.files.len() - 1);
                        self.files.len() - 1
                    }
                };
                (number, blob.data())
            }
        };
        let nbytes = place.bytes();
        let shape = vec![nbytes];
        self.tensors.push(TensorInfo { name: name.into(), dtype: DType::U8, shape, file, offset, nbytes });
        Ok(())
    }

    fn store(self, joined: Vec<Joined>) -> Result<Store> {
        Store::new(self.files, self.tensors)?.join(joined)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_of_convolutions() {
        assert_eq!(matrix(&[8, 4, 1, 1]), [8, 4]);
        assert_eq!(matrix(&[8, 1, 1]), [8, 1, 1]);
        assert_eq!(matrix(&[4, 8, 2, 1]), [4, 8, 2, 1]);
        assert_eq!(matrix(&[1, 1]), [1, 1]);
    }
}
