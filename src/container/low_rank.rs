//! Products of two small matrices that are added to a tensor's values: LoRA, merged.

use std::fmt;
use std::sync::Arc;

use super::Store;
use crate::tensor::TensorInfo;

/// One of the two matrices, as an adapter stores it.
#[derive(Clone, Debug)]
pub struct Factor {
    /// Where it lies.
    pub tensor: TensorInfo,
    /// Whether it is stored transposed.
    pub turned: bool,
}

impl Factor {
    /// Elements from one row to the next, and from one column to the next.
    pub fn strides(&self) -> (u64, u64) {
        if self.turned { (1, self.tensor.row()) } else { (self.tensor.row(), 1) }
    }
}

/// `left (rows x rank) * right (rank x columns)`, to be added to a matrix of the same shape.
#[derive(Clone)]
pub struct LowRank {
    /// Holds both.
    pub store: Arc<Store>,
    /// Of (rows, rank).
    pub left: Factor,
    /// Of (rank, columns).
    pub right: Factor,
    /// Rows of the product.
    pub rows: u64,
    /// Columns of the product.
    pub columns: u64,
    /// The dimension between.
    pub rank: u64,
    /// What the product is multiplied by.
    pub scale: f32,
}

/// Without the store: the same product looks the same in every process.
impl fmt::Debug for LowRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { left, right, rows, columns, rank, scale, store: _ } = self;
        write!(f, "LowRank {{ {left:?} {right:?} {rows} {columns} {rank} {scale} }}")
    }
}
