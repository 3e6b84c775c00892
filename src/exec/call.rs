//! What an operation is given.

use std::sync::Arc;

use super::parse::Declared;
use super::program::FUEL_HINT;
use super::program::MEMORY_HINT;
use super::tensor::{Data, Tensor, described, elements};
use super::weight::{Weight, is_float};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};

/// Most values of a list of sizes, axes and the like; of parts, as many as there are results.
const MOST_LISTED: usize = 16;

/// What a parameter is bound to.
#[derive(Clone, Debug)]
pub(super) enum Operand {
    /// A value in memory.
    Tensor(Tensor),
    /// A constant that is decoded where it is read.
    Weight(Arc<Weight>),
}

impl Operand {
    pub(super) fn dtype(&self) -> DataType {
        match self {
            Self::Tensor(tensor) => tensor.dtype,
            Self::Weight(weight) => weight.dtype,
        }
    }

    pub(super) fn shape(&self) -> &[usize] {
        match self {
            Self::Tensor(tensor) => &tensor.shape,
            Self::Weight(weight) => &weight.shape,
        }
    }

    /// As a tensor is described.
    pub(super) fn described(&self) -> String {
        described(self.dtype(), self.shape())
    }

    /// How many elements it has.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Tensor(tensor) => tensor.len(),
            Self::Weight(weight) => weight.len(),
        }
    }

    /// In memory, where there is room for so many elements.
    ///
    /// # Errors
    /// As [`Weight::tensor`]; `Limit` where there is not.
    pub(super) fn tensor(self, room: usize) -> Result<Tensor> {
        match self {
            Self::Tensor(tensor) => Ok(tensor),
            Self::Weight(weight) if weight.len() > room => Err(no_room(&weight.shape, room)),
            Self::Weight(weight) => weight.tensor(),
        }
    }
}

/// An operation's parameters with what they are bound to. Each is taken once.
#[derive(Default)]
pub(super) struct Call<'a> {
    pub(super) inputs: Vec<(&'a str, Vec<Operand>)>,
    /// How many results are declared.
    pub(super) results: usize,
    /// What the first of them is declared to be.
    pub(super) declared: Option<&'a Declared>,
    /// How many elements there is memory for: less with every tensor that is made or decoded.
    pub(super) room: usize,
    /// How much may still be computed, about an element each.
    pub(super) fuel: u64,
}

impl Call<'_> {
    /// How many elements a tensor of this shape has that is to be made.
    ///
    /// # Errors
    /// `Limit` for more than are computed with, or there is memory for.
    pub(super) fn elements(&mut self, shape: &[usize]) -> Result<usize> {
        let n = elements(shape)?;
        self.room = self.room.checked_sub(n).ok_or_else(|| no_room(shape, self.room))?;
        self.work(n)?;
        Ok(n)
    }

    /// The same of the first result, which is to have the shape that is declared.
    ///
    /// # Errors
    /// As [`Self::elements`]; `Malformed` for another shape.
    pub(super) fn result(&mut self, shape: &[usize]) -> Result<usize> {
        self.declared.map_or(Ok(()), |declared| declared.check(declared.dtype, shape))?;
        self.elements(shape)
    }

    /// Takes memory for so many elements that are needed meanwhile.
    ///
    /// # Errors
    /// `Limit` where there is none.
    pub(super) fn reserve(&mut self, n: usize) -> Result<()> {
        self.room = self.room.checked_sub(n).ok_or_else(|| no_room(&[n], self.room))?;
        Ok(())
    }

    /// Counts what is to be computed, before it is.
    ///
    /// # Errors
    /// `Limit` where a call has computed too much.
    pub(super) fn work(&mut self, n: usize) -> Result<()> {
        let left = self.fuel.checked_sub(n as u64);
        self.fuel = left.ok_or_else(|| {
            Error::limit("a call computes far more than such a package should").hint(FUEL_HINT)
        })?;
        Ok(())
    }

    /// In memory: what a weight takes there is taken from the room.
    ///
    /// # Errors
    /// As [`Weight::tensor`]; `Limit` where there is no room.
    pub(super) fn decoded(&mut self, operand: Operand) -> Result<Tensor> {
        match operand {
            Operand::Tensor(tensor) => Ok(tensor),
            Operand::Weight(weight) => {
                self.elements(&weight.shape)?;
                if !is_float(weight.dtype) {
                    self.reserve(weight.len())?; // floats, of which they are made
                }
                weight.tensor()
            }
        }
    }

    /// Elements that are to be changed in place, copied where somebody else has them.
    ///
    /// # Errors
    /// `Limit` where there is no room for a copy.
    pub(super) fn own<'v, T: Clone>(&mut self, values: &'v mut Arc<Vec<T>>) -> Result<&'v mut Vec<T>> {
        if Arc::get_mut(values).is_none() {
            self.reserve(values.len())?;
        }
        Ok(Arc::make_mut(values))
    }

    /// A short list, in memory.
    fn list(&mut self, name: &str, operand: Operand) -> Result<Tensor> {
        let (n, most) = (operand.len(), MOST_LISTED.max(self.results));
        match n > most {
            true => Err(Error::limit(format!("{name} has {n} values, at most {most} are read"))),
            false => self.decoded(operand),
        }
    }

    /// All that a parameter is bound to.
    pub(super) fn all(&mut self, name: &str) -> Vec<Operand> {
        let found = self.inputs.iter_mut().find(|(n, _)| *n == name);
        found.map(|(_, operands)| std::mem::take(operands)).unwrap_or_default()
    }

    /// What a parameter is bound to, if it is.
    ///
    /// # Errors
    /// `Malformed` for several values.
    pub(super) fn given(&mut self, name: &str) -> Result<Option<Operand>> {
        let mut operands = self.all(name);
        match operands.len() {
            0 | 1 => Ok(operands.pop()),
            n => Err(Error::malformed(format!("{name} is bound to {n} values, not one"))),
        }
    }

    /// What a parameter is bound to that has to be.
    ///
    /// # Errors
    /// `Malformed` where it is not.
    pub(super) fn operand(&mut self, name: &str) -> Result<Operand> {
        self.given(name)?.ok_or_else(|| Error::malformed(format!("{name} is missing")))
    }

    /// The same, in memory.
    ///
    /// # Errors
    /// As [`Self::operand`]; `Limit` for a weight that is too large.
    pub(super) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let operand = self.operand(name)?;
        self.decoded(operand).map_err(|e| e.context(name))
    }

    /// The same, with its elements as floats.
    ///
    /// # Errors
    /// `Malformed` for other types.
    pub(super) fn floats(&mut self, name: &str) -> Result<(Tensor, Arc<Vec<f32>>)> {
        let tensor = self.tensor(name)?;
        let values = floats(&tensor).map_err(|e| e.context(name))?;
        Ok((tensor, values))
    }

    /// Integers, if there are any.
    ///
    /// # Errors
    /// `Malformed` for other types, and for more than one dimension.
    pub(super) fn ints(&mut self, name: &str) -> Result<Option<Vec<i64>>> {
        let Some(operand) = self.given(name)? else { return Ok(None) };
        let tensor = self.list(name, operand)?;
        match &tensor.data {
            Data::Ints(ints) if tensor.shape.len() <= 1 => {
                Ok(Some(ints.iter().map(|n| i64::from(*n)).collect()))
            }
            _ => Err(Error::malformed(format!("{name} is {}, integers were expected", tensor.described()))),
        }
    }

    /// Integers that have to be there.
    ///
    /// # Errors
    /// As [`Self::ints`]; `Malformed` where they are not.
    pub(super) fn some_ints(&mut self, name: &str) -> Result<Vec<i64>> {
        self.ints(name)?.ok_or_else(|| Error::malformed(format!("{name} is missing")))
    }

    /// One integer.
    ///
    /// # Errors
    /// As [`Self::ints`]; `Malformed` for several.
    pub(super) fn int(&mut self, name: &str, default: i64) -> Result<i64> {
        match self.ints(name)?.as_deref() {
            None => Ok(default),
            Some([one]) => Ok(*one),
            Some(several) => Err(Error::malformed(format!("{name} has {} integers, not one", several.len()))),
        }
    }

    /// Truth values, if there are any.
    ///
    /// # Errors
    /// `Malformed` for other types, and for more than one dimension.
    fn bools(&mut self, name: &str) -> Result<Option<Vec<bool>>> {
        let Some(operand) = self.given(name)? else { return Ok(None) };
        let tensor = self.list(name, operand)?;
        match &tensor.data {
            Data::Bools(bools) if tensor.shape.len() <= 1 => Ok(Some(bools.to_vec())),
            _ => {
                Err(Error::malformed(format!("{name} is {}, truth values were expected", tensor.described())))
            }
        }
    }

    /// One truth value.
    ///
    /// # Errors
    /// `Malformed` for several, and for other types.
    pub(super) fn is(&mut self, name: &str, default: bool) -> Result<bool> {
        match self.bools(name)?.as_deref() {
            None => Ok(default),
            Some([one]) => Ok(*one),
            Some(several) => Err(Error::malformed(format!("{name} has {} values, not one", several.len()))),
        }
    }

    /// A truth value for each of `n` dimensions, false where none are given.
    ///
    /// # Errors
    /// `Malformed` for another number of them, and for other types.
    pub(super) fn mask(&mut self, name: &str, n: usize) -> Result<Vec<bool>> {
        match self.bools(name)? {
            None => Ok(vec![false; n]),
            Some(bools) if bools.len() == n => Ok(bools),
            Some(bools) => {
                Err(Error::malformed(format!("{name} has {} values for {n} dimensions", bools.len())))
            }
        }
    }

    /// One number.
    ///
    /// # Errors
    /// `Malformed` for several, and for other types.
    pub(super) fn float(&mut self, name: &str, default: f32) -> Result<f32> {
        let Some(operand) = self.given(name)? else { return Ok(default) };
        let tensor = self.list(name, operand)?;
        match tensor.as_floats() {
            Some([one]) => Ok(*one),
            _ => Err(Error::malformed(format!("{name} is {}, a float was expected", tensor.described()))),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// `Malformed` for other types.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<Arc<str>>> {
        match self.given(name)? {
            None => Ok(None),
            Some(Operand::Tensor(Tensor { data: Data::Text(text), .. })) => Ok(Some(text)),
            Some(other) => Err(Error::malformed(format!("{name} is {}, a text was expected", other.dtype()))),
        }
    }

    /// The places of the axes that a parameter lists, among `rank`, each once.
    ///
    /// # Errors
    /// `Malformed` for axes that are not there, or twice.
    pub(super) fn axes(&mut self, name: &str, rank: usize) -> Result<Option<Vec<usize>>> {
        let Some(given) = self.ints(name)? else { return Ok(None) };
        let mut axes = Vec::with_capacity(rank);
        for given in given {
            let axis = axis(given, rank).map_err(|e| e.context(name))?;
            if axes.contains(&axis) {
                return Err(Error::malformed(format!("{name} has axis {axis} twice")));
            }
            axes.push(axis);
        }
        Ok(Some(axes))
    }

    /// One axis of `rank`.
    ///
    /// # Errors
    /// `Malformed` where there is no such axis.
    pub(super) fn axis(&mut self, name: &str, default: i64, rank: usize) -> Result<usize> {
        axis(self.int(name, default)?, rank).map_err(|e| e.context(name))
    }
}

fn no_room(shape: &[usize], room: usize) -> Error {
    Error::limit(format!("a tensor of shape {shape:?}: there is memory for {room} elements more"))
        .hint(MEMORY_HINT)
}

/// The place of an axis that may be counted from the end, among `rank` of them.
///
/// # Errors
/// `Malformed` where there is no such axis.
pub(super) fn axis(axis: i64, rank: usize) -> Result<usize> {
    let from_end = if axis < 0 { axis.checked_add_unsigned(rank as u64) } else { Some(axis) };
    let place = from_end.and_then(|a| usize::try_from(a).ok()).filter(|a| *a < rank);
    place.ok_or_else(|| Error::malformed(format!("axis {axis} of {rank}")))
}

/// The elements as floats.
///
/// # Errors
/// `Malformed` for other types.
pub(super) fn floats(tensor: &Tensor) -> Result<Arc<Vec<f32>>> {
    match &tensor.data {
        Data::Floats(values) => Ok(values.clone()),
        _ => Err(Error::malformed(format!("is {}, floats were expected", tensor.described()))),
    }
}

/// That two tensors have elements of one type.
///
/// # Errors
/// `Malformed`, with both.
pub(super) fn same_dtype(x: &Tensor, y: &Tensor) -> Result<()> {
    match x.dtype == y.dtype {
        true => Ok(()),
        false => {
            Err(Error::malformed(format!("{} and {} have different types", x.described(), y.described())))
        }
    }
}
