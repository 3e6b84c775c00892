//! -1, 0 and 1 times a scale: five digits in a byte, or four.

use std::ops::Range;

use super::integers::{put_streams, shape_of, streams};
use super::{Parts, Scales, Shared, count_rows};
use crate::block::trits;
use crate::container::Stored;
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::container::qpack::{Matrix, Ternary, Trits};
use crate::error::{Error, Result};
use crate::packed::write::Put;
use crate::tensor::TensorInfo;

/// Digits of a tensor, in files.
#[derive(Debug)]
pub(super) struct Digits {
    shape: Shape,
    packing: Trits,
    codes: TensorInfo,
    scales: Scales,
}

impl Digits {
    pub(super) fn new(e: &Ternary, shape: &[u64], parts: &Parts<'_>) -> Result<Self> {
        let matrix = Matrix::of(shape, false)?;
        Ok(Self {
            shape: shape_of(matrix, 2, e.block),
            packing: e.packing,
            codes: parts.get("codes")?,
            scales: Scales::new(parts.get("scales")?, matrix, e.block),
        })
    }
}

impl Grouped for Digits {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn most(&self) -> u8 {
        2
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let cols = self.shape.cols;
        let is_valid = match self.packing {
            Trits::Bits2 => {
                streams(stored, &self.codes, 2, rows, cols, codes)?;
                // Without branches: 3 is the only code with both bits.
                codes.iter().fold(0, |all, c| all | (c & c >> 1)) == 0
            }
            Trits::Base3 => {
                let row = self.codes.row();
                let n = (rows.end - rows.start) * row; // lies within the part
                let bytes = crate::packed::bytes(stored, &self.codes, rows.start * row, n as usize)?;
                let rows = bytes.chunks_exact(row as usize).zip(codes.chunks_exact_mut(cols as usize));
                rows.fold(true, |all, (bytes, codes)| all & trits::unpack(bytes, codes))
            }
        };
        match is_valid {
            true => Ok(()),
            false => Err(Error::malformed("a byte of its codes holds no ternary digits")),
        }
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        zeros.fill(1.0);
        self.scales.of_rows(stored, rows, scales)
    }
}

/// Puts the rows from `first` on: codes 0, 1 and 2, zeros of 1.
///
/// # Errors
/// As `put` fails; `Unsupported` for a scale that the encoding does not have; `Misuse` for rows of another
/// size, and other codes.
pub fn put(e: &Ternary, shape: &[u64], first: u64, rows: &Rows, put: &mut Put<'_>) -> Result<()> {
    let matrix = Matrix::of(shape, false)?;
    let n = count_rows(matrix, first, rows, matrix.blocks(e.block)[1])?;
    check_ternary(rows)?;
    match e.packing {
        Trits::Bits2 => put_streams(2, matrix.cols, first, &rows.codes, 0, put)?,
        Trits::Base3 => {
            let row = matrix.cols.div_ceil(5) as usize;
            let mut bytes = vec![0; n as usize * row];
            for (codes, bytes) in
                rows.codes.chunks_exact(matrix.cols as usize).zip(bytes.chunks_exact_mut(row))
            {
                trits::pack(codes, bytes);
            }
            put(0, first * row as u64, &bytes)?;
        }
    }
    Shared { matrix, block: e.block, first, values: &rows.scales }.put(1, e.scales, put)
}

/// That codes are 0, 1 and 2, and mean -1, 0 and 1.
pub(super) fn check_ternary(rows: &Rows) -> Result<()> {
    let is_ternary = rows.codes.iter().fold(0, |most, c| c.max(&most).to_owned()) <= 2;
    match is_ternary && rows.zeros.iter().all(|z| *z == 1.0) {
        true => Ok(()),
        false => Err(Error::misuse("codes that are not ternary")),
    }
}
