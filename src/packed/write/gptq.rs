//! GPTQ's layout: see [`super::super::gptq`].

use super::{Data, Grid, Layout, Part, Put, halves, unfit};
use crate::block::bits;
use crate::error::Result;
use crate::tensor::DType;

/// The tensors of GPTQ.
#[derive(Clone, Debug, PartialEq)]
pub struct Gptq {
    /// The integers.
    pub grid: Grid,
    /// Whether zeros are stored less 1, as the first version of the format has them.
    pub first_version: bool,
}

/// Codes that fill whole words at any width.
const UNIT: u64 = 32;

impl Layout for Gptq {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let shape = self.grid.shape(rows, cols);
        if !rows.is_multiple_of(UNIT) || !cols.is_multiple_of(UNIT) || rows * cols == 0 {
            return Err(unfit("GPTQ", rows, cols, "both have to be multiples of 32"));
        }
        if !cols.is_multiple_of(shape.group_size) {
            return Err(unfit(
                "GPTQ",
                rows,
                cols,
                &format!("groups of {} do not divide rows", shape.group_size),
            ));
        }
        let bits = u64::from(shape.bits);
        Ok(vec![
            Part::new(".qweight", DType::I32, &[cols / UNIT * bits, rows]),
            Part::new(".qzeros", DType::I32, &[shape.groups, rows / UNIT * bits]),
            Part::new(".scales", DType::F16, &[shape.groups, rows]),
            Part::new(".g_idx", DType::I32, &[cols]),
        ])
    }

    fn holds_order(&self) -> bool {
        true
    }

    fn unit(&self, _cols: u64) -> u64 {
        UNIT
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let (given, data) = (data, data.integers()?);
        let shape = self.grid.shape(rows, cols);
        let (cols, groups, width) = (cols as usize, shape.groups as usize, shape.bits);
        let n = data.codes.len() / cols;
        // Each row's stream; a word of all rows lies side by side.
        let row_bytes = cols * width as usize / 8;
        let mut streams = vec![0; n * row_bytes];
        for (codes, stream) in data.codes.chunks_exact(cols).zip(streams.chunks_exact_mut(row_bytes)) {
            bits::pack(codes, width, stream);
        }
        let words = streams.as_chunks::<4>().0;
        let mut sides = vec![[0; 4]; words.len()];
        bits::transpose(words, row_bytes / 4, &mut sides);
        for (word, side) in sides.chunks_exact(n).enumerate() {
            put(0, (word as u64 * rows + first) * 4, side.as_flattened())?;
        }
        let mut stream = vec![0; n * width as usize / 8];
        for g in 0..groups {
            let lines = || (0..n).map(|r| r * groups + g);
            let zero = |i: usize| data.zeros[i] as u8;
            let fields: Vec<u8> = lines().map(|i| zero(i).wrapping_sub(self.first_version.into())).collect();
            bits::pack(&fields, width, &mut stream);
            put(1, (g as u64 * rows + first) * u64::from(width) / 8, &stream)?;
            put(2, (g as u64 * rows + first) * 2, &halves(lines().map(|i| data.scales[i])))?;
        }
        if first == 0 {
            put(3, 0, &given.group_bytes(cols, shape.group_size))?;
        }
        Ok(0.0)
    }
}
