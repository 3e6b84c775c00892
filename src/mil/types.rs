//! Shapes whose sizes may not be known before execution.

use std::fmt;

use crate::container::coreml::DataType;
use crate::error::{Error, Result};

/// A size that is not known before execution. Equal ones are equal sizes; different ones may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Symbol(u32);

/// Gives symbols that nobody has yet.
#[derive(Debug, Default)]
pub struct Symbols(u32);

impl Symbols {
    /// A size that no other is known to equal.
    pub fn fresh(&mut self) -> Dim {
        self.0 += 1;
        Dim::Any(Symbol(self.0))
    }
}

/// The size of a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// So many.
    Known(u64),
    /// Not known before execution.
    Any(Symbol),
}

impl Dim {
    /// The size, where it is known.
    pub fn known(self) -> Option<u64> {
        match self {
            Self::Known(n) => Some(n),
            Self::Any(_) => None,
        }
    }

    /// Whether both can be the same size.
    pub fn may_equal(self, other: Self) -> bool {
        match (self, other) {
            (Self::Known(a), Self::Known(b)) => a == b,
            _ => true,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(n) => write!(f, "{n}"),
            Self::Any(Symbol(k)) => write!(f, "?{k}"),
        }
    }
}

/// Type of the elements, and shape, outermost dimension first. A scalar has no dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// Type of the elements.
    pub dtype: DataType,
    /// Sizes.
    pub dims: Vec<Dim>,
}

impl TensorType {
    /// A type.
    pub fn new(dtype: DataType, dims: Vec<Dim>) -> Self {
        Self { dtype, dims }
    }

    /// A type with a shape that is known.
    pub fn fixed(dtype: DataType, shape: &[u64]) -> Self {
        Self { dtype, dims: shape.iter().map(|n| Dim::Known(*n)).collect() }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The shape as a program declares it: `None` where a size is not known.
    pub fn declared(&self) -> Vec<Option<u64>> {
        self.dims.iter().map(|d| d.known()).collect()
    }

    /// The place of an axis that may be counted from the end, among `rank` of them.
    ///
    /// # Errors
    /// `Misuse` where there is no such axis.
    pub fn axis(axis: i64, rank: usize) -> Result<usize> {
        let from_end = if axis < 0 { axis.checked_add_unsigned(rank as u64) } else { Some(axis) };
        from_end
            .and_then(|a| usize::try_from(a).ok())
            .filter(|a| *a < rank)
            .ok_or_else(|| Error::misuse(format!("axis {axis} of {rank}")))
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.dims.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(","))
    }
}

/// The shape of an operation on each pair of elements, where sizes of 1 are repeated, and so is the whole for
/// dimensions that one of the two lacks in front. Two sizes that are not known to be equal give a new one.
///
/// # Errors
/// `Misuse` for sizes that differ.
pub fn broadcast(x: &[Dim], y: &[Dim], symbols: &mut Symbols) -> Result<Vec<Dim>> {
    let rank = x.len().max(y.len());
    let at = |dims: &[Dim], i: usize| (i + dims.len()).checked_sub(rank).map_or(Dim::Known(1), |k| dims[k]);
    let one = |i: usize| match (at(x, i), at(y, i)) {
        (a, b) if a == b => Ok(a),
        (Dim::Known(1), other) | (other, Dim::Known(1)) => Ok(other),
        (Dim::Known(n), Dim::Any(_)) | (Dim::Any(_), Dim::Known(n)) => Ok(Dim::Known(n)),
        (Dim::Any(_), Dim::Any(_)) => Ok(symbols.fresh()),
        (a, b) => Err(Error::misuse(format!("sizes {a} and {b} in dimension {i} do not go together"))),
    };
    (0..rank).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_go_together() {
        let mut symbols = Symbols::default();
        let (q, k) = (symbols.fresh(), symbols.fresh());
        let n = Dim::Known;
        let mut both = |x: &[Dim], y: &[Dim]| broadcast(x, y, &mut symbols);
        assert_eq!(both(&[n(1), q, n(8)], &[n(8)]).unwrap(), [n(1), q, n(8)]);
        assert_eq!(both(&[q, n(1)], &[n(1), k]).unwrap(), [q, k]);
        assert_eq!(both(&[q], &[n(4)]).unwrap(), [n(4)]);
        assert_eq!(both(&[], &[q]).unwrap(), [q]);
        let other = both(&[q], &[k]).unwrap();
        assert!(matches!(other[..], [Dim::Any(_)]) && other != [q] && other != [k]);
        let e = both(&[n(2)], &[n(3)]).unwrap_err();
        assert!(e.to_string().contains("sizes 2 and 3"), "{e}");
    }

    #[test]
    fn axes_from_both_ends() {
        assert_eq!(TensorType::axis(-1, 3).unwrap(), 2);
        assert_eq!(TensorType::axis(0, 1).unwrap(), 0);
        for (axis, rank) in [(3, 3), (-4, 3), (0, 0), (i64::MIN, 2)] {
            assert!(TensorType::axis(axis, rank).is_err(), "{axis} of {rank}");
        }
    }
}
