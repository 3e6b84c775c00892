//! Cosines and sines of rotations as float16, computed as they are written: tables of long contexts are larger than what
//! memory there may be.

use std::ops::Range;

use half::f16;

use crate::arch::RopeSpec;

/// A table with a row for each position.
#[derive(Debug)]
pub(super) struct Rotation {
    pub spec: RopeSpec,
    /// Whether it holds sines, rather than cosines.
    pub sines: bool,
}

impl Rotation {
    /// The rows of these positions, little-endian.
    pub fn bytes(&self, rows: &Range<u64>) -> Vec<u8> {
        let mut values: Vec<f16> = Vec::new();
        rows.clone().for_each(|position| self.spec.row(position, self.sines, &mut values));
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}
