//! AWQ's layout: see [`super::super::awq`].

use super::{Data, Grid, Layout, Part, Put, halves, unfit};
use crate::block::bits;
use crate::error::Result;
use crate::packed::awq::word;
use crate::tensor::DType;

/// The tensors of AutoAWQ's GEMM layout; codes of 4 bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Awq {
    /// The integers.
    pub grid: Grid,
}

impl Layout for Awq {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let shape = self.grid.shape(rows, cols);
        if self.grid.bits() != 4 {
            return Err(unfit("AWQ", rows, cols, "codes have 4 bits"));
        }
        if !rows.is_multiple_of(8) || !cols.is_multiple_of(shape.group_size) || rows * cols == 0 {
            let why = format!("rows come in eights, and columns in groups of {}", shape.group_size);
            return Err(unfit("AWQ", rows, cols, &why));
        }
        Ok(vec![
            Part::new(".qweight", DType::I32, &[cols, rows / 8]),
            Part::new(".qzeros", DType::I32, &[shape.groups, rows / 8]),
            Part::new(".scales", DType::F16, &[shape.groups, rows]),
        ])
    }

    fn unit(&self, _cols: u64) -> u64 {
        8
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let data = data.integers()?;
        let (groups, cols) = (self.grid.shape(rows, cols).groups as usize, cols as usize);
        let n = data.codes.len() / cols;
        let mut words = vec![[0; 4]; n / 8 * cols];
        for (codes, words) in data.codes.chunks_exact(8 * cols).zip(words.chunks_exact_mut(cols)) {
            let rows: [&[u8]; 8] = std::array::from_fn(|k| &codes[k * cols..][..cols]);
            for (c, to) in words.iter_mut().enumerate() {
                *to = word(|k| rows[k][c]);
            }
        }
        let mut sides = vec![[0; 4]; words.len()];
        bits::transpose(&words, cols, &mut sides);
        for (c, side) in sides.chunks_exact(n / 8).enumerate() {
            put(0, (c as u64 * rows + first) / 2, side.as_flattened())?;
        }
        for g in 0..groups {
            let zero = |row: usize| data.zeros[row * groups + g] as u8;
            let words: Vec<u8> = (0..n / 8).flat_map(|w| word(|k| zero(w * 8 + k))).collect();
            put(1, (g as u64 * rows + first) / 2, &words)?;
            put(2, (g as u64 * rows + first) * 2, &halves((0..n).map(|r| data.scales[r * groups + g])))?;
        }
        Ok(0.0)
    }
}
