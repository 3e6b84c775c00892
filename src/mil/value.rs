//! What is known of a value while a program is built.

use super::types::{Dim, TensorType};

/// An integer that is known, or known to be a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int {
    /// A constant.
    Known(i64),
    /// The size of a dimension.
    Size(Dim),
    /// Anything.
    Unknown,
}

impl Int {
    /// The number, where it is known.
    pub fn known(self) -> Option<i64> {
        match self {
            Self::Known(n) => Some(n),
            Self::Size(Dim::Known(n)) => i64::try_from(n).ok(),
            Self::Size(Dim::Any(_)) | Self::Unknown => None,
        }
    }
}

/// Elements that shapes can depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// Integers: a scalar, or a vector.
    Ints(Vec<Int>),
    /// Truth values.
    Bools(Vec<bool>),
    /// A text.
    Text(String),
}

/// A value that an operation reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Its type.
    pub ty: TensorType,
    /// Whether it is a constant, or decoded from constants.
    pub constant: bool,
    /// Its elements, where shapes can depend on them.
    pub known: Option<Known>,
}

impl Operand {
    /// A value of which nothing but the type is known.
    pub fn of(ty: TensorType) -> Self {
        Self { ty, constant: false, known: None }
    }

    /// The same as a constant, such as a weight.
    pub fn weight(ty: TensorType) -> Self {
        Self { ty, constant: true, known: None }
    }

    /// The integers, where they are known.
    pub fn ints(&self) -> Option<&[Int]> {
        match &self.known {
            Some(Known::Ints(ints)) => Some(ints),
            _ => None,
        }
    }
}
