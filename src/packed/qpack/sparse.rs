//! Ternary weights most of which are 0: a bit for each that says whether it is not, and a bit for the sign of
//! each that is not.

use std::ops::Range;

use super::integers::{shape_of, streams};
use super::ternary::check_ternary;
use super::{Parts, Scales, Shared, count_rows};
use crate::block::bits;
use crate::container::Stored;
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::container::qpack::{Matrix, Sparse};
use crate::error::{Error, Result};
use crate::packed::write::Put;
use crate::tensor::TensorInfo;

/// Signs of a tensor, in files.
#[derive(Debug)]
pub(super) struct Signs {
    shape: Shape,
    mask: TensorInfo,
    starts: TensorInfo,
    signs: TensorInfo,
    scales: Scales,
}

impl Signs {
    pub(super) fn new(e: &Sparse, shape: &[u64], parts: &Parts<'_>) -> Result<Self> {
        let matrix = Matrix::of(shape, false)?;
        Ok(Self {
            shape: shape_of(matrix, 2, e.block),
            mask: parts.get("mask")?,
            starts: parts.get("starts")?,
            signs: parts.get("signs")?,
            scales: Scales::new(parts.get("scales")?, matrix, e.block),
        })
    }
}

impl Grouped for Signs {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn most(&self) -> u8 {
        2
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let cols = self.shape.cols as usize;
        let wrong = || Error::malformed("the rows of its signs do not begin where they should");
        streams(stored, &self.mask, 1, rows.clone(), self.shape.cols, codes)?;
        let n = (rows.end - rows.start) as usize;
        let starts = crate::packed::bytes(stored, &self.starts, rows.start, n + 1)?;
        let starts: Vec<u64> = starts.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let [begin, .., end] = starts[..] else { return Ok(()) };
        let begins = rows.start > 0 || begin == 0;
        let ends =
            if rows.end < self.shape.rows { end <= self.signs.nbytes } else { end == self.signs.nbytes };
        let len = end.checked_sub(begin).filter(|_| begins && ends).ok_or_else(wrong)?;
        let bytes = crate::packed::bytes(stored, &self.signs, begin, len as usize)?;
        let mut signs = vec![0; cols];
        for (codes, ends) in codes.chunks_exact_mut(cols).zip(starts.windows(2)) {
            let ones: usize = codes.iter().map(|c| usize::from(*c)).sum();
            if ends[1].checked_sub(ends[0]) != Some(ones.div_ceil(8) as u64) {
                return Err(wrong());
            }
            let stream = bytes.get((ends[0].wrapping_sub(begin)) as usize..).ok_or_else(wrong)?;
            let signs = &mut signs[..ones];
            bits::unpack(stream, 1, 0, signs);
            // 1 for 0; 2, less twice the sign, for the others.
            let mut next = 0;
            for code in codes {
                let sign = signs.get(next).copied().unwrap_or(0);
                next += usize::from(*code);
                *code = 1 + *code - 2 * (*code & sign);
            }
        }
        Ok(())
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        zeros.fill(1.0);
        self.scales.of_rows(stored, rows, scales)
    }
}

/// Bytes of the signs of a row of codes 0, 1 and 2.
pub fn sign_bytes(codes: &[u8]) -> u64 {
    (codes.iter().filter(|c| **c != 1).count() as u64).div_ceil(8)
}

/// Puts the rows from `first` on: codes 0, 1 and 2, zeros of 1. `at` is the number of bytes of the signs of all
/// rows before, and is moved on.
///
/// # Errors
/// As for a ternary tensor that is not sparse.
pub fn put(
    e: &Sparse,
    shape: &[u64],
    first: u64,
    at: &mut u64,
    rows: &Rows,
    put: &mut Put<'_>,
) -> Result<()> {
    let matrix = Matrix::of(shape, false)?;
    let n = count_rows(matrix, first, rows, matrix.blocks(e.block)[1])?;
    check_ternary(rows)?;
    let (cols, begin) = (matrix.cols as usize, *at);
    let (mut starts, mut signs) = (Vec::with_capacity(n as usize + 1), Vec::new());
    for codes in rows.codes.chunks_exact(cols) {
        starts.push(*at);
        let row: Vec<u8> = codes.iter().filter(|c| **c != 1).map(|c| u8::from(*c == 0)).collect();
        let from = signs.len();
        signs.resize(from + row.len().div_ceil(8), 0);
        bits::pack(&row, 1, &mut signs[from..]);
        *at = begin + signs.len() as u64;
    }
    if first + n == matrix.rows {
        starts.push(*at);
    }
    let mask: Vec<u8> = rows.codes.iter().map(|c| u8::from(*c != 1)).collect();
    super::integers::put_streams(1, matrix.cols, first, &mask, 0, put)?;
    put(1, first * 8, &starts.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>())?;
    put(2, begin, &signs)?;
    Shared { matrix, block: e.block, first, values: &rows.scales }.put(3, e.scales, put)
}
