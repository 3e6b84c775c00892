//! Weights of Core ML packages: what constants decode to, and the tensors of a model that they are.
//!
//! How constants are made up is read by [`constants`]. A tensor of a model is a constant that is called after it; a
//! matrix with a factor for each row may have these apart, behind its product (`NAME_scale`).

mod weight;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use indexmap::IndexMap;

use crate::block::f16_from_f32;
use crate::container::coreml::{Constant, DataType, Package, Place, constants};
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
    /// As [`constants`].
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

    /// The tensors of a model that are among them: `names` are those of tensors, each with the names of the constants
    /// that hold it: one, or several that follow on each other along its first dimension. Those that are not there
    /// are left out. Second, the constants that are part of a tensor.
    ///
    /// # Errors
    /// As [`Weight::new`]; `Malformed` for pieces that do not fit together; `Io`.
    pub fn store(&self, names: &[(String, Vec<String>)]) -> Result<(Store, HashSet<&str>)> {
        let mut parts = Parts::default();
        let (mut joined, mut used) = (Vec::new(), HashSet::new());
        for (name, of) in names {
            if of.is_empty() || !of.iter().all(|of| self.by_name.contains_key(of)) {
                continue;
            }
            let context = |e: Error| e.context(format_args!("tensor {name:?}"));
            let pieces = of.iter().filter_map(|of| self.by_name.get_key_value(of));
            let pieces: Vec<Piece> = pieces
                .map(|(of, named)| {
                    used.insert(of.as_str());
                    let factors = self.factors(of, &named.constant);
                    used.extend(factors.map(|(name, _)| name));
                    Piece::new(named, factors.map(|(_, factors)| factors))
                })
                .collect::<Result<_>>()
                .map_err(context)?;
            joined.push(parts.tensor(name, pieces).map_err(context)?);
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

    fn read(&self, start: u64, out: &mut [f32]) -> Result<()> {
        self.weight.read(start, out)?;
        let Some((factors, row)) = &self.factors else { return Ok(()) };
        if out.is_empty() {
            return Ok(());
        }
        let first = start / row;
        let n = (start + out.len() as u64 - 1) / row - first + 1;
        let mut of_rows = vec![0.0; n as usize];
        factors.read(first, &mut of_rows)?;
        for (at, x) in (start..).zip(out) {
            *x *= of_rows[(at / row - first) as usize];
        }
        Ok(())
    }
}

/// What decodes a tensor.
#[derive(Debug)]
struct Values {
    pieces: Vec<Piece>,
    dtype: DType,
}

impl View for Values {
    fn packing(&self) -> Packing {
        let constant = self.pieces.first().map(Piece::constant);
        let codes = constant.and_then(|c| c.parts().first().map(|(_, codes)| codes.data_type.bits()));
        let bits = codes.or(constant.map(|c| c.data_type.bits())).unwrap_or(0);
        Packing { bits, block: [1, 0] }
    }

    fn read(&self, _: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let size = self.dtype.type_size() as usize;
        let mut values = vec![0.0; out.len() / size];
        let (mut at, mut rest, mut before) = (start, &mut values[..], 0);
        for piece in &self.pieces {
            let end = before + piece.constant().elements();
            if at < end && !rest.is_empty() {
                let n = usize::try_from(end - at).unwrap_or(rest.len()).min(rest.len());
                let (these, others) = rest.split_at_mut(n);
                piece.read(at - before, these)?;
                (at, rest) = (at + n as u64, others);
            }
            before = end;
        }
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
    /// A tensor of pieces: what each is stored as becomes a tensor of bytes.
    fn tensor(&mut self, name: &str, pieces: Vec<Piece>) -> Result<Joined> {
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
        let mut parts = Vec::new();
        for piece in &pieces {
            let weights = std::iter::once(&piece.weight).chain(piece.factors.iter().map(|(w, _)| w));
            for weight in weights {
                for (constant, place) in weight.constant().stored() {
                    let part = format!("{name} / {}", constant.name);
                    self.part(&part, weight.package(), place)?;
                    parts.push(part);
                }
            }
        }
        let dtype = if is_half { DType::F16 } else { DType::F32 };
        let view = Box::new(Values { pieces, dtype });
        Ok(Joined { name: name.into(), dtype, shape, parts, view })
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
