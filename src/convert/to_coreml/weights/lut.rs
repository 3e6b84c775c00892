//! Weights as indices into tables of float16, `constexpr_lut_to_dense`. A table is of some rows, or of a whole matrix.

use std::sync::{Arc, Mutex};

use super::plain::halves;
use super::values::{Outcome, Scratch, Span, Tensor, common, whole_bytes};
use super::{Encoding, Operand, Put, SPAN};
use crate::container::Store;
use crate::container::coreml::DataType;
use crate::error::{Error, Result};
use crate::mil::{Form, Stored};
use crate::quantize::palette::{self, Palette};

/// The type of indices of so many bits; Core ML has no others.
pub(super) fn indices(bits: u32) -> Result<DataType> {
    Ok(match bits {
        1 => DataType::UInt1,
        2 => DataType::UInt2,
        3 => DataType::UInt3,
        4 => DataType::UInt4,
        6 => DataType::UInt6,
        8 => DataType::UInt8,
        _ => {
            let why = format!("indices of {bits} bits; Core ML has those of 1, 2, 3, 4, 6 and 8");
            return Err(Error::misuse(why));
        }
    })
}

/// What palettes of so many bits are called.
pub(super) fn name(bits: u32) -> &'static str {
    match bits {
        1 => "lut1",
        2 => "lut2",
        3 => "lut3",
        4 => "lut4",
        6 => "lut6",
        _ => "lut8",
    }
}

/// The shape of tables for a matrix or a stack, each for so many rows and columns.
pub(super) fn tables(shape: &[u64], rows: u64, cols: u64, bits: u32) -> Vec<u64> {
    let mut tables = shape.to_vec();
    if let [.., high, wide] = &mut tables[..] {
        (*high, *wide) = (*high / rows, *wide / cols);
    }
    tables.extend([1 << bits, 1]);
    tables
}

/// Tables, and which rows share one.
#[derive(Debug)]
pub(super) struct Lut {
    bits: u32,
    indices: DataType,
    /// Rows that share a table.
    rows: u64,
    unit: u64,
    /// Tables of more rows than a span has: made by whoever comes first, and gone after the last span of their rows.
    shared: Vec<Mutex<Shared>>,
}

/// A table that several spans use.
#[derive(Debug, Default)]
struct Shared {
    palette: Option<Arc<Palette>>,
    /// Rows that were written with it.
    rows: u64,
}

impl Lut {
    pub fn new(tensor: &Tensor, bits: u32, rows: Option<u64>) -> Result<Self> {
        let indices = indices(bits)?;
        tensor.check_matrix()?;
        let rows = rows.unwrap_or(tensor.of_matrix);
        if rows == 0 || !tensor.of_matrix.is_multiple_of(rows) {
            return Err(Error::misuse(format!("{} rows are no groups of {rows}", tensor.of_matrix)));
        }
        let bytes = whole_bytes(tensor.cols, bits);
        let unit = common(bytes, rows);
        let in_span = unit.checked_mul(tensor.cols).is_some_and(|n| n <= SPAN);
        let groups = if in_span { 0 } else { tensor.rows / rows };
        let shared = (0..groups).map(|_| Mutex::default()).collect();
        Ok(Self { bits, indices, rows, unit: if in_span { unit } else { bytes }, shared })
    }

    /// The table of a group of rows that no span holds. It is made of all of them.
    fn shared(
        &self,
        group: u64,
        tensor: &Tensor,
        store: &Store,
        scratch: &mut Scratch,
    ) -> Result<Option<Arc<Palette>>> {
        let Some(shared) = self.shared.get(group as usize) else { return Ok(None) };
        let mut shared = shared.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(palette) = &shared.palette {
            return Ok(Some(palette.clone()));
        }
        // What an error left behind.
        scratch.points.take(&mut scratch.counts);
        let step = tensor.step(1);
        let (mut row, end) = (group * self.rows, (group + 1) * self.rows);
        tensor.importance(row / tensor.of_matrix, scratch)?;
        while row < end {
            let rows = row..end.min(row + step);
            tensor.values(store, &rows, scratch)?;
            scratch.counts.add(&scratch.values, &scratch.importance);
            row = rows.end;
        }
        scratch.points.take(&mut scratch.counts);
        let mut palette = Palette::default();
        palette.fit(&scratch.points, self.bits);
        Ok(Some(shared.palette.insert(Arc::new(palette)).clone()))
    }

    /// So many rows of a group are written: its table goes where these were the last ones.
    fn written(&self, group: u64, rows: u64) {
        let Some(shared) = self.shared.get(group as usize) else { return };
        let mut shared = shared.lock().unwrap_or_else(|e| e.into_inner());
        shared.rows += rows;
        if shared.rows >= self.rows {
            *shared = Shared::default();
        }
    }
}

impl Encoding for Lut {
    fn name(&self) -> &'static str {
        name(self.bits)
    }

    fn method(&self, is_weighed: bool) -> Option<&'static str> {
        Some(if is_weighed { "weighed k-means" } else { "k-means" })
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        let tables = tables(&tensor.shape, self.rows, tensor.cols, self.bits);
        vec![Operand::new(self.indices, tensor.shape.clone()), Operand::new(DataType::Float16, tables)]
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let [indices, lut] = <[Stored; 2]>::try_from(operands).ok()?;
        Some((Form::Lut { indices, lut }, None))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn held_bytes(&self) -> u64 {
        palette::HELD
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, store, rows } = span;
        let groups = rows.start / self.rows..rows.end.div_ceil(self.rows);
        let made: Vec<_> =
            groups.clone().map(|group| self.shared(group, tensor, store, scratch)).collect::<Result<_>>()?;
        span.values(scratch)?;
        let cols = tensor.cols as usize;
        scratch.codes.resize(scratch.values.len(), 0);
        scratch.stored.resize(scratch.values.len(), 0.0);
        let mut tables = Vec::new();
        for (group, made) in groups.clone().zip(made) {
            let first = group * self.rows;
            let these = first.max(rows.start)..(first + self.rows).min(rows.end);
            let at = (these.start - rows.start) as usize * cols..(these.end - rows.start) as usize * cols;
            let palette = match &made {
                Some(palette) => palette,
                None => {
                    tensor.importance(first / tensor.of_matrix, scratch)?;
                    scratch.counts.add(&scratch.values[at.clone()], &scratch.importance);
                    scratch.points.take(&mut scratch.counts);
                    scratch.palette.fit(&scratch.points, self.bits);
                    &scratch.palette
                }
            };
            let (codes, stored) = (&mut scratch.codes[at.clone()], &mut scratch.stored[at.clone()]);
            palette.codes(&scratch.values[at], codes);
            stored.iter_mut().zip(&*codes).for_each(|(y, c)| *y = palette.levels[usize::from(*c)]);
            // Of a table that several spans use, the first one writes it.
            if these.start == first {
                tables.extend_from_slice(&palette.levels);
            }
        }
        if !tables.is_empty() {
            let first = rows.start.div_ceil(self.rows) << self.bits;
            halves(&tables, &mut scratch.small)?;
            put(1, first * 2, &scratch.small)?;
        }
        let outcome = Outcome::of(&scratch.values, &scratch.stored);
        scratch.put_codes(0, self.bits, rows.start * tensor.cols, put)?;
        for group in groups {
            let (first, end) = (group * self.rows, (group + 1) * self.rows);
            self.written(group, end.min(rows.end) - first.max(rows.start));
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_tables_go_with_their_last_rows() {
        // Two groups of 2048 rows of 512: more than a span has.
        let lut = Lut::new(&Tensor::made("x", 4096, 512), 4, Some(2048)).unwrap();
        assert_eq!(lut.shared.len(), 2);
        let is_held = |group: usize| lut.shared[group].lock().unwrap().palette.is_some();
        for shared in &lut.shared {
            shared.lock().unwrap().palette = Some(Arc::default());
        }
        lut.written(0, 2000);
        assert!(is_held(0) && is_held(1));
        lut.written(0, 48);
        assert!(!is_held(0) && is_held(1));
        lut.written(1, 2048);
        lut.written(7, 1);
        assert!(!is_held(1));
        // Tables that a span holds whole are not shared.
        assert!(Lut::new(&Tensor::made("x", 4096, 512), 4, Some(8)).unwrap().shared.is_empty());
    }
}
