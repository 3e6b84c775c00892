//! Elements of 8 bits times the scale of their block.

use super::{Blocks, Parts, numbers, runs};
use crate::container::qpack::{Matrix, Scaled};
use crate::container::{Packing, Stored, View};
use crate::error::{Error, Result};
use crate::packed::write::Put;
use crate::packed::{bytes, tiles};
use crate::tensor::{DType, TensorInfo};

/// Elements of a tensor, in files.
#[derive(Debug)]
pub(super) struct Elements {
    block: [u64; 2],
    matrix: Matrix,
    data: TensorInfo,
    scales: TensorInfo,
    divisor: u64,
}

impl Elements {
    pub(super) fn new(e: &Scaled, shape: &[u64], parts: &Parts<'_>) -> Result<Self> {
        let matrix = Matrix::of(shape, false)?;
        let scales = parts.get("scales")?;
        Ok(Self { block: e.block, matrix, data: parts.get("data")?, scales, divisor: e.divisor })
    }
}

impl View for Elements {
    fn packing(&self) -> Packing {
        let [rows, cols] = self.block;
        Packing { bits: 8, block: [rows, if cols == self.matrix.cols { 0 } else { cols }] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let out = out.as_chunks_mut::<4>().0;
        let n = out.len();
        let values: Vec<f32> = match self.data.dtype {
            DType::I8 => {
                bytes(stored, &self.data, start, n)?.into_iter().map(|b| f32::from(b as i8)).collect()
            }
            _ => crate::packed::values(stored, &self.data, start, n)?,
        };
        let inverse = (self.divisor > 1).then_some(1.0 / self.divisor as f32);
        let (mut out, mut values) = (out, &values[..]);
        for tile in tiles(start, start + n as u64, self.matrix.cols) {
            let blocks = Blocks::of(&tile, self.block, self.matrix);
            let scales = numbers(stored, &self.scales, blocks.first, blocks.n as usize)?;
            for row in tile.rows {
                for run in runs(&tile.cols, self.block[1]) {
                    let scale = scales[blocks.index(row, run.start)];
                    let n = (run.end - run.start) as usize;
                    let (these, rest) = out.split_at_mut(n);
                    let pairs = these.iter_mut().zip(&values[..n]);
                    match inverse {
                        Some(inverse) => pairs.for_each(|(y, x)| *y = (x * scale * inverse).to_le_bytes()),
                        None => pairs.for_each(|(y, x)| *y = (x * scale).to_le_bytes()),
                    }
                    (out, values) = (rest, &values[n..]);
                }
            }
        }
        Ok(())
    }
}

/// Puts elements from number `start` on. Scales are written as they are.
///
/// # Errors
/// As `put` fails; `Misuse` beyond the tensor.
pub fn put(_: &Scaled, shape: &[u64], start: u64, data: &[u8], put: &mut Put<'_>) -> Result<()> {
    let all = crate::tensor::elements(shape)?;
    if start.checked_add(data.len() as u64).is_none_or(|end| end > all) {
        return Err(Error::misuse(format!("{} elements from {start} on, of {all}", data.len())));
    }
    put(0, start, data)
}
