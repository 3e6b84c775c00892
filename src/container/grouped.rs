//! Integers in groups: what GPTQ, AWQ, compressed-tensors and others store, whatever their layout.
//!
//! `W[r, c] = (code[r, c] - zero[r, g]) * scale[r, g]` in f32, where `g` is the group of column `c`. Codes
//! are unsigned, of 1 to 8 bits; zeros mostly integers, and no larger than 2^24.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::{Packing, Stored, View};
use crate::error::{Error, Result};

/// The size of a matrix of integers in groups.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Rows: outputs of a linear layer.
    pub rows: u64,
    /// Columns: its inputs.
    pub cols: u64,
    /// Bits of a code.
    pub bits: u32,
    /// Columns of a group; the last one may have fewer.
    pub group_size: u64,
    /// Groups in a row.
    pub groups: u64,
}

impl Shape {
    /// What people want to know of it.
    pub fn packing(&self) -> Packing {
        let cols = if self.groups == 1 { 0 } else { self.group_size };
        Packing { bits: self.bits, block: [1, cols] }
    }
}

/// A matrix of integers in groups, in files.
pub trait Grouped: Debug + Send + Sync {
    /// Its size.
    fn shape(&self) -> &Shape;

    /// The greatest code there is.
    fn most(&self) -> u8 {
        u8::MAX >> 8u32.saturating_sub(self.shape().bits)
    }

    /// Fills `codes` with those of whole rows.
    ///
    /// # Errors
    /// As reads fail; `Malformed` for parts that contradict each other.
    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()>;

    /// Fills scales and zeros with those of whole rows.
    ///
    /// # Errors
    /// As [`Self::codes`].
    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()>;

    /// The group of each column, where groups do not follow on each other.
    ///
    /// # Errors
    /// As [`Self::codes`].
    fn groups(&self, _: &Stored) -> Result<Option<Vec<u32>>> {
        Ok(None)
    }

    /// The same; `None`, too, where columns name their groups in the order in which they stand.
    ///
    /// # Errors
    /// As [`Self::codes`].
    fn order(&self, stored: &Stored) -> Result<Option<Vec<u32>>> {
        let size = self.shape().group_size as usize;
        let in_order = |(c, g): (usize, &u32)| c / size == *g as usize;
        Ok(self.groups(stored)?.filter(|groups| !groups.iter().enumerate().all(in_order)))
    }

    /// Whether what a row is made of lies apart, so that small reads are slow.
    fn is_scattered(&self) -> bool {
        false
    }
}

/// Whole rows of a matrix of integers in groups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// Codes, row by row.
    pub codes: Vec<u8>,
    /// Scales of each row's groups.
    pub scales: Vec<f32>,
    /// Zeros of each row's groups.
    pub zeros: Vec<f32>,
}

impl Rows {
    /// Reads rows.
    ///
    /// # Errors
    /// As [`Grouped`]'s; `Misuse` for rows that are not there.
    pub fn read(&mut self, matrix: &dyn Grouped, stored: &Stored, rows: Range<u64>) -> Result<()> {
        let shape = matrix.shape();
        let n = rows.end.checked_sub(rows.start).filter(|_| rows.end <= shape.rows);
        let n = n.ok_or_else(|| Error::misuse(format!("rows {rows:?} of {}", shape.rows)))?;
        let size = |per_row: u64| {
            let n = n.checked_mul(per_row).and_then(|n| usize::try_from(n).ok());
            n.ok_or_else(|| Error::misuse(format!("rows {rows:?} do not fit memory")))
        };
        self.codes.resize(size(shape.cols)?, 0);
        self.scales.resize(size(shape.groups)?, 0.0);
        self.zeros.resize(size(shape.groups)?, 0.0);
        matrix.codes(stored, rows.clone(), &mut self.codes)?;
        matrix.lines(stored, rows, &mut self.scales, &mut self.zeros)
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.codes.clear();
        self.scales.clear();
        self.zeros.clear();
    }

    /// Puts other rows behind these.
    pub fn append(&mut self, rows: &Self) {
        self.codes.extend_from_slice(&rows.codes);
        self.scales.extend_from_slice(&rows.scales);
        self.zeros.extend_from_slice(&rows.zeros);
    }

    /// The weights of all these rows, of a matrix of this shape whose groups follow on each other.
    pub fn all_weights(&self, shape: &Shape, out: &mut [f32]) {
        for (r, out) in out.chunks_exact_mut((shape.cols as usize).max(1)).enumerate() {
            self.weights(r, shape, None, out);
        }
    }

    /// The weights of row `r` among these, of a matrix of this shape.
    fn weights(&self, r: usize, shape: &Shape, groups: Option<&[u32]>, out: &mut [f32]) {
        let (cols, n, size) = (shape.cols as usize, shape.groups as usize, shape.group_size as usize);
        let codes = &self.codes[r * cols..(r + 1) * cols];
        let (scales, zeros) = (&self.scales[r * n..(r + 1) * n], &self.zeros[r * n..(r + 1) * n]);
        let value = |code: u8, g: usize| (f32::from(code) - zeros[g]) * scales[g];
        match groups {
            Some(groups) => {
                for ((y, code), g) in out.iter_mut().zip(codes).zip(groups) {
                    *y = value(*code, *g as usize);
                }
            }
            None => {
                for (g, (out, codes)) in out.chunks_mut(size).zip(codes.chunks(size)).enumerate() {
                    out.iter_mut().zip(codes).for_each(|(y, code)| *y = value(*code, g));
                }
            }
        }
    }
}

/// The weights, in F32.
#[derive(Debug)]
pub struct Values(pub Arc<dyn Grouped>);

impl View for Values {
    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let matrix = &*self.0;
        let shape = matrix.shape();
        let out = out.as_chunks_mut::<4>().0;
        let Some(last) = (out.len() as u64).checked_sub(1) else { return Ok(()) };
        let first = start / shape.cols;
        let mut rows = Rows::default();
        rows.read(matrix, stored, first..(start + last) / shape.cols + 1)?;
        let groups = matrix.groups(stored)?;
        let cols = shape.cols as usize;
        let mut weights = vec![0f32; cols];
        let (mut at, mut out) = ((start % shape.cols) as usize, out);
        for r in 0.. {
            rows.weights(r, shape, groups.as_deref(), &mut weights);
            let (these, rest) = out.split_at_mut(out.len().min(cols - at));
            these.iter_mut().zip(&weights[at..]).for_each(|(y, x)| *y = x.to_le_bytes());
            (at, out) = (0, rest);
            if out.is_empty() {
                break;
            }
        }
        Ok(())
    }

    fn is_scattered(&self) -> bool {
        self.0.is_scattered()
    }

    fn packing(&self) -> Packing {
        self.0.shape().packing()
    }

    fn grouped(&self) -> Option<&Arc<dyn Grouped>> {
        Some(&self.0)
    }
}
