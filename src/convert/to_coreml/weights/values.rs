//! Rows of a tensor as values, and what is said of them.

use std::ops::Range;

use super::{Put, SCATTERED_SPAN, SPAN};
use crate::arch::Mapped;
use crate::block::{bits, f16_from_f32, f32_from_f16};
use crate::container::Store;
use crate::container::grouped::Rows;
use crate::convert::gather;
use crate::convert::{Importance, Source};
use crate::error::{Error, Result};
use crate::quantize::palette::{Counts, Palette, Points};

/// The tensor behind a plan: rows of one matrix, or of all matrices of a stack.
#[derive(Debug)]
pub(super) struct Tensor {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Rows, of all matrices together.
    pub rows: u64,
    /// Rows of one matrix.
    pub of_matrix: u64,
    pub cols: u64,
    pub source: Source,
    /// The row of the source that is the first one here.
    first: u64,
    importance: Option<Importance>,
}

/// Buffers of one worker, kept between spans.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) fetch: gather::Scratch,
    /// Weights of a span.
    pub(super) values: Vec<f32>,
    /// Importance of the columns.
    pub(super) importance: Vec<f32>,
    /// The tensor and matrix whose importance that is.
    important: Option<(String, u64)>,
    /// What they are stored as.
    pub(super) stored: Vec<f32>,
    /// Codes, one in a byte.
    pub(super) codes: Vec<u8>,
    /// Of rows, or of groups; tables too.
    pub(super) scales: Vec<f32>,
    pub(super) zeros: Vec<u8>,
    /// The same as bytes.
    pub(super) small: Vec<u8>,
    /// Codes of the source, and of a part of the span.
    pub(super) rows: Rows,
    pub(super) some: Rows,
    pub(super) counts: Counts,
    pub(super) points: Points,
    pub(super) palette: Palette,
    pub(super) bytes: Vec<u8>,
}

impl Scratch {
    /// Puts codes of so many bits into a blob, from an element on that begins a byte.
    pub(super) fn put_codes(&mut self, blob: usize, bits: u32, element: u64, put: &Put<'_>) -> Result<()> {
        let n = bits::bytes(self.codes.len() as u64, bits).and_then(|n| usize::try_from(n).ok());
        self.bytes.resize(n.ok_or_else(|| Error::misuse("a span beyond memory"))?, 0);
        bits::pack(&self.codes, bits, &mut self.bytes);
        let first = bits::bytes(element, bits).ok_or_else(|| Error::misuse("a blob beyond 2^64 bytes"))?;
        put(blob, first, &self.bytes)
    }
}

/// A scale as float16, such that `most` of it are of float16 too; never 0, so that nobody divides by it.
pub(super) fn half(scale: f32, most: f32) -> f32 {
    let bits = f16_from_f32(scale);
    let rounded = f32_from_f16(bits);
    match rounded {
        0.0 => LEAST,
        _ if rounded * most >= BEYOND => f32_from_f16(bits - 1),
        _ => rounded,
    }
}

/// The least common multiple.
pub(super) fn common(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x.max(1)).saturating_mul(b)
}

/// The fewest rows that fill whole bytes with codes of so many bits.
pub(super) fn whole_bytes(cols: u64, bits: u32) -> u64 {
    let mut rows = 1;
    // 8 at most: all numbers are of bits.
    while !(cols % 8 * rows * u64::from(bits)).is_multiple_of(8) {
        rows += 1;
    }
    rows
}

/// What became of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Weights that are not zero, and too small for float16, in which they are.
    pub flushed: u64,
    /// Sum of the squares of what they lost.
    pub lost: f64,
    /// Sum of their squares.
    pub power: f64,
}

impl Outcome {
    /// Adds what became of other weights. Sums of spans are the same each time if they are added in order.
    pub fn add(&mut self, other: Self) {
        self.flushed += other.flushed;
        self.lost += other.lost;
        self.power += other.power;
    }

    /// Of weights that are now what `stored` says.
    pub(super) fn of(values: &[f32], stored: &[f32]) -> Self {
        let mut outcome = Self::default();
        for (x, y) in values.iter().zip(stored) {
            let lost = f64::from(x - y);
            outcome.lost += lost * lost;
            outcome.power += f64::from(*x) * f64::from(*x);
            outcome.flushed += u64::from(*x != 0.0 && x.abs() <= TINY);
        }
        outcome
    }
}

/// From here on numbers round to what float16 does not have: half a unit beyond 65504.
pub(super) const BEYOND: f32 = 65520.0;
/// Up to here they round to zero: half of the least of float16.
const TINY: f32 = 1.0 / (1 << 25) as f32;
/// What stands for a scale of zero: the least number of float16 that is not subnormal.
pub(super) const LEAST: f32 = 1.0 / 16384.0;

/// Rows of a tensor and where they are read from.
pub(super) struct Span<'a> {
    pub tensor: &'a Tensor,
    pub store: &'a Store,
    pub rows: Range<u64>,
}

impl Span<'_> {
    /// Their values ([`Tensor::values`]).
    pub fn values(&self, scratch: &mut Scratch) -> Result<()> {
        self.tensor.values(self.store, &self.rows, scratch)
    }
}

impl Tensor {
    pub fn new(
        mapped: &Mapped,
        store: &Store,
        rows: Option<Range<u64>>,
        importance: Option<Importance>,
    ) -> Result<Self> {
        let source = Source::new(mapped, store)?;
        source.check_decodable()?;
        if source.elements() == 0 {
            return Err(Error::unsupported(format!(
                "has shape {:?}, and no elements; Core ML has no such constants",
                mapped.shape
            )));
        }
        let mut shape = mapped.shape.clone();
        let (all, of_matrix, cols) = match shape[..] {
            [.., rows, cols] => (source.elements() / cols, rows, cols),
            _ => (source.elements(), source.elements(), 1),
        };
        let mut tensor = Self {
            name: mapped.name.clone(),
            shape: Vec::new(),
            rows: all,
            of_matrix,
            cols,
            source,
            first: 0,
            importance,
        };
        if let Some(rows) = rows {
            let ([n] | [n, _]) = &mut shape[..] else {
                return Err(Error::misuse(format!("rows {rows:?} of shape {shape:?}, which has none")));
            };
            if rows.start >= rows.end || rows.end > all {
                return Err(Error::misuse(format!("rows {rows:?} of {all}")));
            }
            *n = rows.end - rows.start;
            (tensor.rows, tensor.of_matrix, tensor.first) = (*n, *n, rows.start);
        }
        tensor.shape = shape;
        Ok(tensor)
    }

    /// A matrix that is computed, not read.
    pub fn made(name: &str, rows: u64, cols: u64) -> Self {
        Self {
            name: name.into(),
            shape: vec![rows, cols],
            rows,
            of_matrix: rows,
            cols,
            source: Source::moved(rows.saturating_mul(cols)),
            first: 0,
            importance: None,
        }
    }

    /// Elements, of the rows that are here.
    pub fn elements(&self) -> u64 {
        self.rows * self.cols // as many as the source has at most
    }

    /// Rows of a span, a multiple of `unit`.
    pub fn step(&self, unit: u64) -> u64 {
        let span = if self.source.is_contiguous() { SPAN } else { SCATTERED_SPAN };
        (span / self.cols / unit).max(1).saturating_mul(unit)
    }

    /// The rows of the source that are these.
    pub fn in_source(&self, rows: &Range<u64>) -> Range<u64> {
        self.first + rows.start..self.first + rows.end
    }

    /// Fills `scratch.values` with some rows. All of them fit float16.
    pub fn values(&self, store: &Store, rows: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let from = self.in_source(rows);
        let (start, end) = (from.start * self.cols, from.end * self.cols);
        self.source.values(store, start, end, &mut scratch.values, &mut scratch.fetch)?;
        // Without branches: most spans are fine.
        let fits = |chunk: &[f32]| chunk.iter().fold(true, |all, v| all & (v.abs() < BEYOND));
        if scratch.values.chunks(4096).all(fits) {
            return Ok(());
        }
        let wrong = scratch.values.iter().position(|v| v.is_nan() || v.abs() >= BEYOND).unwrap_or(0);
        let at = start + wrong as u64;
        let value = scratch.values.get(wrong).copied().unwrap_or(0.0);
        let place = match self.shape.len() {
            0 | 1 => format!("element {at}"),
            _ => format!("row {}, column {}", at / self.cols, at % self.cols),
        };
        Err(match value.is_finite() {
            false => Error::malformed(format!("{place} is {value}")).hint("the model is damaged"),
            true => Error::unsupported(format!(
                "{place} is {value}: weights of Core ML are of float16, which ends at 65504"
            )),
        })
    }

    /// Fills `scratch.importance` with that of the columns of a matrix, by its number; all alike where none is known,
    /// or nothing is important.
    pub fn importance(&self, matrix: u64, scratch: &mut Scratch) -> Result<()> {
        let is_known = |(name, n): &(String, u64)| *name == self.name && *n == matrix;
        if scratch.important.as_ref().is_some_and(is_known) {
            return Ok(());
        }
        scratch.important = None;
        scratch.importance.clear();
        scratch.importance.resize(self.cols as usize, 1.0);
        if let Some(importance) = &self.importance {
            importance.read(matrix, &mut scratch.importance)?;
            if let Some(wrong) = scratch.importance.iter().find(|w| !w.is_finite() || **w < 0.0) {
                return Err(Error::malformed(format!("its importance holds {wrong}")));
            }
            if scratch.importance.iter().all(|w| *w == 0.0) {
                scratch.importance.fill(1.0);
            }
        }
        scratch.important = Some((self.name.clone(), matrix));
        Ok(())
    }

    /// That these are rows of matrices, of which alone rows can share anything.
    pub fn check_matrix(&self) -> Result<()> {
        match self.shape.len() {
            2.. => Ok(()),
            _ => Err(Error::misuse(format!("shape {:?} is no matrix: it is stored as float16", self.shape))),
        }
    }

    /// Whether errors are weighed.
    pub fn is_weighed(&self) -> bool {
        self.importance.is_some()
    }
}
