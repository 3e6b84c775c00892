//! Integers of one grid on another, without rounding: codes and zeros are moved together, scales stay.

use std::ops::Range;
use std::sync::Arc;

use super::{Grid, Layout};
use crate::block::{codec, f16_from_f32, f32_from_f16};
use crate::container::Stored;
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A matrix of integers in groups, wherever it lies.
#[derive(Clone, Debug)]
pub enum Integers {
    /// Packed in a checkpoint.
    Grouped(Arc<dyn Grouped>),
    /// Blocks of ggml, each of which is a group.
    Blocks(DType, Shape),
}

/// What integers are read from.
pub enum Data<'a> {
    /// The files behind them.
    Stored(&'a Stored),
    /// The bytes of whole rows.
    Blocks(&'a [u8]),
}

impl Integers {
    /// A matrix of so many rows and columns in blocks of `dtype`; `None` for other types and sizes.
    pub fn blocks(dtype: DType, rows: u64, cols: u64) -> Option<Self> {
        let bits = match dtype {
            DType::Q4_0 | DType::Q4_1 => 4,
            DType::Q8_0 => 8,
            DType::TQ1_0 | DType::TQ2_0 => 2,
            _ => return None,
        };
        let group_size = dtype.block_size();
        let fits = cols > 0 && cols.is_multiple_of(group_size);
        fits.then(|| Self::Blocks(dtype, Shape { rows, cols, bits, group_size, groups: cols / group_size }))
    }

    /// Its size.
    pub fn shape(&self) -> &Shape {
        match self {
            Self::Grouped(matrix) => matrix.shape(),
            Self::Blocks(_, shape) => shape,
        }
    }

    /// The greatest code there is.
    fn most(&self) -> u8 {
        match self {
            Self::Grouped(matrix) => matrix.most(),
            Self::Blocks(DType::TQ1_0, _) => 2,
            Self::Blocks(_, shape) => u8::MAX >> 8u32.saturating_sub(shape.bits),
        }
    }

    /// The group of each column, where groups do not follow on each other.
    ///
    /// # Errors
    /// As reads fail.
    pub fn order(&self, stored: &Stored) -> Result<Option<Vec<u32>>> {
        match self {
            Self::Grouped(matrix) => matrix.order(stored),
            Self::Blocks(..) => Ok(None),
        }
    }

    /// Reads whole rows.
    ///
    /// # Errors
    /// As reads fail; `Misuse` for data of the other kind.
    pub fn read(&self, data: Data<'_>, rows: Range<u64>, out: &mut Rows) -> Result<()> {
        match (self, data) {
            (Self::Grouped(matrix), Data::Stored(stored)) => out.read(&**matrix, stored, rows),
            (Self::Blocks(dtype @ (DType::TQ1_0 | DType::TQ2_0), _), Data::Blocks(bytes)) => {
                split_ternary(*dtype, bytes, out)
            }
            (Self::Blocks(dtype, _), Data::Blocks(bytes)) => {
                split(*dtype, bytes, out);
                Ok(())
            }
            _ => Err(Error::misuse("integers of the other kind are wanted")),
        }
    }

    /// The same without codes, where that is cheaper.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_lines(&self, data: Data<'_>, rows: Range<u64>, out: &mut Rows) -> Result<()> {
        match (self, data) {
            (Self::Grouped(matrix), Data::Stored(stored)) => {
                let n = ((rows.end - rows.start) * matrix.shape().groups) as usize;
                out.scales.resize(n, 0.0);
                out.zeros.resize(n, 0.0);
                matrix.lines(stored, rows, &mut out.scales, &mut out.zeros)
            }
            (integers, data) => integers.read(data, rows, out),
        }
    }

    /// Whether zeros are the middle code, by the type; `None` where that has to be looked up.
    pub fn is_symmetric(&self) -> Option<bool> {
        match self {
            Self::Blocks(dtype, _) => Some([DType::Q4_0, DType::Q8_0].contains(dtype)),
            Self::Grouped(_) => None,
        }
    }
}

/// Takes blocks apart: one scale and zero for each.
fn split(dtype: DType, bytes: &[u8], out: &mut Rows) {
    let size = dtype.type_size() as usize;
    let half = |b: &[u8], at: usize| f32_from_f16(u16::from_le_bytes([b[at], b[at + 1]]));
    out.codes.clear();
    out.scales.clear();
    out.zeros.clear();
    for block in bytes.chunks_exact(size) {
        let scale = half(block, 0);
        out.scales.push(scale);
        let halves = |codes: &mut Vec<u8>, qs: &[u8]| {
            codes.extend(qs.iter().map(|q| q & 15));
            codes.extend(qs.iter().map(|q| q >> 4));
        };
        match dtype {
            DType::Q8_0 => {
                out.zeros.push(128.0);
                out.codes.extend(block[2..].iter().map(|q| q.wrapping_add(128)));
            }
            DType::Q4_1 => {
                let min = half(block, 2);
                let zero = if min == 0.0 { 0.0 } else { -min / scale };
                // A minimum that is no multiple of the scale has no zero.
                out.zeros.push(if zero * scale == -min { zero } else { f32::NAN });
                halves(&mut out.codes, &block[4..]);
            }
            _ => {
                out.zeros.push(8.0);
                halves(&mut out.codes, &block[2..]);
            }
        }
    }
}

/// Whether F16 has this number.
pub fn is_half(x: f32) -> bool {
    f32_from_f16(f16_from_f32(x)).to_bits() == x.to_bits()
}

/// Takes ternary blocks apart: digits are what they decode to with a scale of 1.
fn split_ternary(dtype: DType, bytes: &[u8], out: &mut Rows) -> Result<()> {
    let codec = codec(dtype).ok_or_else(|| Error::unsupported(format!("type {dtype} has no codec")))?;
    let mut blocks = bytes.to_vec();
    out.scales.clear();
    for block in blocks.chunks_exact_mut(dtype.type_size() as usize) {
        // Scales are at the end.
        if let Some(scale) = block.last_chunk_mut() {
            out.scales.push(f32_from_f16(u16::from_le_bytes(*scale)));
            *scale = f16_from_f32(1.0).to_le_bytes();
        }
    }
    out.zeros.clear();
    out.zeros.resize(out.scales.len(), 1.0);
    let mut digits = vec![0f32; out.scales.len() * dtype.block_size() as usize];
    codec.decode(&blocks, &mut digits)?;
    out.codes.clear();
    out.codes.extend(digits.iter().map(|d| (d + 1.0) as u8));
    Ok(())
}

/// Brings integers onto another grid.
#[derive(Clone, Debug)]
pub struct Regrid {
    from: Shape,
    /// The greatest code there.
    most: u8,
    to: Shape,
    grid: Grid,
    /// Type of the scales there.
    scales: DType,
    /// The group of each column, where groups do not follow on each other.
    order: Option<Vec<u32>>,
}

impl Regrid {
    /// From matrices of such integers, whose columns are of these groups. `None` where the layout takes no integers,
    /// or such groups have to be others there.
    pub fn new(from: &Integers, layout: &dyn Layout, order: Option<Vec<u32>>) -> Option<Self> {
        let (grid, scales) = (*layout.grid()?, layout.scales());
        let (from, most) = (from.shape(), from.most());
        let to = grid.shape(from.rows, from.cols);
        let same = (to.group_size, to.groups) == (from.group_size, from.groups);
        let fits = order.is_none() || same && layout.holds_order();
        fits.then(|| Self { from: from.clone(), most, to, grid, scales, order })
    }

    /// The group of each column, where groups do not follow on each other.
    pub fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// Whether it depends on codes what the grid holds, besides scales and zeros.
    pub fn needs_codes(&self) -> bool {
        self.grid.is_ternary() && self.most >= self.grid.levels as u8
    }

    /// Whether rows with these scales and zeros, and codes where these are needed, keep all their values.
    pub fn holds(&self, rows: &Rows) -> bool {
        self.holds_lines(rows) && (!self.needs_codes() || self.is_ternary(rows))
    }

    /// Whether no code is further than 1 from its zero.
    fn is_ternary(&self, rows: &Rows) -> bool {
        let groups = rows.codes.chunks_exact(self.from.cols as usize);
        let groups = groups.flat_map(|row| row.chunks(self.from.group_size as usize));
        groups.zip(&rows.zeros).all(|(codes, zero)| {
            let least = (*zero as i32 - 1) as u8;
            // Without branches.
            codes.iter().fold(0, |most, code| code.wrapping_sub(least).max(most)) <= 2
        })
    }

    fn holds_lines(&self, rows: &Rows) -> bool {
        let n = self.from.groups.max(1) as usize;
        let line = |row: usize, g: usize| (rows.scales[row * n + g], rows.zeros[row * n + g]);
        (0..rows.scales.len() / n).all(|row| {
            (0..self.to.groups).all(|g| {
                let mut sources = self.sources(g);
                let first = line(row, sources.start);
                self.shift(first).is_some() && sources.all(|s| line(row, s) == first)
            })
        })
    }

    /// The groups that a group of the target consists of.
    fn sources(&self, group: u64) -> Range<usize> {
        let first = group * self.to.group_size;
        let end = (first + self.to.group_size).min(self.to.cols);
        (first / self.from.group_size) as usize..end.div_ceil(self.from.group_size) as usize
    }

    /// What is added to codes and zero; `None` where the grid has no such line.
    fn shift(&self, (scale, zero): (f32, f32)) -> Option<i32> {
        if !scale.is_finite() || self.scales != DType::F32 && !is_half(scale) {
            return None;
        }
        if zero.fract() != 0.0 || zero.abs() > 1024.0 {
            return None;
        }
        let zero = zero as i32;
        let most = i32::from(self.grid.levels) - 1;
        let wanted = match self.grid.symmetric {
            true => i32::from(self.grid.middle()),
            false => zero.clamp(self.grid.least_zero.into(), most),
        };
        let shift = wanted - zero;
        if self.needs_codes() {
            return (0..=255).contains(&zero).then_some(shift);
        }
        (shift >= 0 && i32::from(self.most) + shift <= most).then_some(shift)
    }

    /// Rows that [`Self::holds`] is true of.
    ///
    /// # Errors
    /// `Misuse` for others.
    pub fn apply(&self, from: &Rows, to: &mut Rows) -> Result<()> {
        let (n, cols) = (self.from.groups as usize, self.from.cols as usize);
        to.codes.clone_from(&from.codes);
        to.scales.clear();
        to.zeros.clear();
        for (row, codes) in to.codes.chunks_exact_mut(cols.max(1)).enumerate() {
            let mut shifts = Vec::with_capacity(self.to.groups as usize);
            for g in 0..self.to.groups {
                let at = row * n + self.sources(g).start;
                let (scale, zero) = (from.scales[at], from.zeros[at]);
                let shift = self.shift((scale, zero));
                let shift = shift.ok_or_else(|| Error::misuse("integers are not on this grid"))?;
                shifts.push(shift as u8);
                to.scales.push(scale);
                to.zeros.push(zero + shift as f32);
            }
            if shifts.iter().all(|shift| *shift == 0) {
                continue;
            }
            match &self.order {
                Some(order) => {
                    let of_columns = codes.iter_mut().zip(order);
                    of_columns.for_each(|(code, g)| {
                        *code = code.wrapping_add(*shifts.get(*g as usize).unwrap_or(&0));
                    });
                }
                None => {
                    let of_groups = codes.chunks_mut(self.to.group_size as usize).zip(shifts);
                    of_groups.for_each(|(codes, shift)| {
                        codes.iter_mut().for_each(|code| *code = code.wrapping_add(shift));
                    });
                }
            }
        }
        Ok(())
    }
}
