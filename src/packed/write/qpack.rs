//! Integers in groups as `.qpack` files store them, which take rows and groups of any length: see
//! `formats/spec/qpack.md`.

use super::{Data, Grid, Layout, Part, Put};
use crate::container::qpack::{Encoding, Integers, Zeros};
use crate::error::Result;
use crate::packed::qpack::put_integers;
use crate::tensor::DType;

/// The parts of a tensor in the encoding `integers`.
#[derive(Clone, Debug, PartialEq)]
pub struct QpackIntegers {
    /// The integers.
    pub grid: Grid,
    /// Type of the scales; those that rounding finds are numbers of F16.
    pub scales: DType,
}

impl QpackIntegers {
    /// The encoding of a matrix of so many columns.
    pub fn encoding(&self, cols: u64) -> Integers {
        let zeros = match self.grid.symmetric {
            true => Zeros::Middle,
            false => Zeros::Codes(0),
        };
        let wide = self.grid.group_size.unwrap_or(cols).min(cols);
        Integers { bits: self.grid.bits, block: [1, wide], scales: self.scales, zeros, g_idx: false }
    }
}

impl Layout for QpackIntegers {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    /// The suffix is a part's name in the manifest.
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let parts = Encoding::Integers(self.encoding(cols)).parts(&[rows, cols])?.unwrap_or_default();
        Ok(parts.into_iter().map(|p| Part::new(p.name, p.dtype, &p.shape)).collect())
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        put_integers(&self.encoding(cols), &[rows, cols], first, data.integers()?, None, put)?;
        Ok(0.0)
    }
}
