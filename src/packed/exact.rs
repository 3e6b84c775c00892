//! Integers in groups that are blocks of ggml without rounding: codes are moved, and scales are the same.
//!
//! A block has one scale `d` in F16 for its columns. TQ1_0 and TQ2_0 have `(q - 1) d` for 256, Q4_0 `(q - 8) d`,
//! Q5_0 `(q - 16) d` and Q8_0 `q d` for 32, Q4_1 and Q5_1 `q d + m`. Where all columns of a block are of groups
//! with one scale and zero, these are the block's, if `d` (and `m = -zero d`) are numbers of F16, and `code - zero`
//! is within the block's codes. Scales below 0 are scales as well.

use std::ops::Range;
use std::sync::Arc;

use crate::block::{Lattice, f16_from_f32, f32_from_f16, lattice};
use crate::container::grouped::{Grouped, Rows, Shape, Values};
use crate::container::{Packing, Store, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Block types that can hold integers in groups, the smallest first; but for TQ1_0, which is smaller than TQ2_0 and
/// slower, and has to be asked for.
pub const BLOCKS: [DType; 6] =
    [DType::TQ2_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0];

/// Lets joined tensors of integers in groups give the blocks of one of `types`, the first that holds all
/// of their values exactly. The others go on giving F32. Returns how many there are of each.
///
/// # Errors
/// As reading scales and zeros; `Misuse` for a type that has no whole steps.
pub fn give_blocks(store: &mut Store, types: &[DType]) -> Result<Vec<(DType, u64)>> {
    let names: Vec<String> = store.tensors().iter().map(|t| t.name.clone()).collect();
    for name in &names {
        give_same(store, &[name], types)?;
    }
    let of_type = |dtype: &DType| {
        store.tensors().iter().filter(|t| store.grouped(t).is_some() && t.dtype == *dtype).count() as u64
    };
    Ok(types.iter().map(|dtype| (*dtype, of_type(dtype))).filter(|(_, n)| *n > 0).collect())
}

/// Lets joined tensors of integers in groups, which become one, give blocks of the first of `types` that holds all
/// their values exactly, or F32.
///
/// # Errors
/// As [`give_blocks`].
pub fn give_same(store: &mut Store, names: &[&str], types: &[DType]) -> Result<()> {
    let blocks = types.iter().map(|t| Block::of(*t)).collect::<Result<Vec<_>>>()?;
    let mut matrices = Vec::with_capacity(names.len());
    let mut fits = vec![true; types.len()];
    for name in names {
        let Some((matrix, stored)) = store.get(name).and_then(|t| store.grouped(t)) else {
            fits.fill(false);
            continue;
        };
        let own =
            fitting(&**matrix, stored, &blocks).map_err(|e| e.context(format_args!("tensor {name:?}")))?;
        fits.iter_mut().zip(own).for_each(|(all, own)| *all &= own);
        matrices.push((name, matrix.clone()));
    }
    let found = fits.iter().position(|fits| *fits);
    for (name, matrix) in matrices {
        match found {
            Some(k) => store.give_as(name, types[k], Box::new(Blocks { matrix, block: blocks[k] }))?,
            None => store.give_as(name, DType::F32, Box::new(Values(matrix)))?,
        }
    }
    Ok(())
}

/// Which of `blocks` hold a matrix exactly.
fn fitting(matrix: &dyn Grouped, stored: &Stored, blocks: &[Block]) -> Result<Vec<bool>> {
    let shape = matrix.shape();
    let mut fits: Vec<bool> = blocks
        .iter()
        .map(|b| shape.cols > 0 && shape.cols.is_multiple_of(b.lattice.block_size as u64))
        .collect();
    if fits.contains(&true) && matrix.order(stored)?.is_some() {
        fits.fill(false);
    }
    // As many rows at a time as have 1 Mi groups.
    let step = ((1 << 20) / shape.groups.max(1)).max(1);
    let mut first = 0;
    while first < shape.rows && fits.contains(&true) {
        let rows = first..shape.rows.min(first + step);
        let n = ((rows.end - rows.start) * shape.groups) as usize;
        let (mut scales, mut zeros) = (vec![0f32; n], vec![0f32; n]);
        first = rows.end;
        matrix.lines(stored, rows, &mut scales, &mut zeros)?;
        for (fits, block) in fits.iter_mut().zip(blocks) {
            let most = matrix.most().into();
            *fits &= scales.iter().zip(&zeros).all(|(s, z)| block.holds(most, *s, *z));
            let mut rows =
                scales.chunks_exact(shape.groups as usize).zip(zeros.chunks_exact(shape.groups as usize));
            *fits = *fits
                && (block.is_part(shape) || rows.all(|(scales, zeros)| block.is_one(shape, scales, zeros)));
        }
    }
    Ok(fits)
}

/// Blocks of a type whose codes stand for whole numbers, which share a scale.
#[derive(Clone, Copy, Debug)]
struct Block {
    lattice: &'static Lattice,
    /// The number that the first code stands for.
    first: i32,
}

impl Block {
    fn of(dtype: DType) -> Result<Self> {
        let is_whole = |l: &&Lattice| {
            l.group == l.block_size && l.levels.windows(2).all(|pair| pair[1] - pair[0] == 1.0)
        };
        let found = lattice(dtype).filter(is_whole);
        let lattice = found.ok_or_else(|| Error::misuse(format!("{dtype} has no whole steps")))?;
        Ok(Self { lattice, first: lattice.levels[0] as i32 })
    }

    /// Whether it holds each code up to this one, with this scale and zero.
    fn holds(&self, greatest: i32, scale: f32, zero: f32) -> bool {
        let exact = |x: f32| x.is_finite() && f32_from_f16(f16_from_f32(x)) == x;
        let Some(offset) = self.offset(zero) else { return false };
        // -128 has a code too, which is not chosen when weights are rounded.
        let least = if self.lattice.levels.len() == 255 { -1 } else { 0 };
        let most = self.lattice.levels.len() as i32 - 1;
        let within = offset >= least && greatest + offset <= most;
        within && exact(scale) && (!self.lattice.has_offset() || exact(-zero * scale))
    }

    /// What is added to a code to have that of the block. `None` for a zero that is no integer.
    fn offset(&self, zero: f32) -> Option<i32> {
        if zero.fract() != 0.0 || zero.abs() > 1024.0 {
            return None;
        }
        Some(if self.lattice.has_offset() { 0 } else { -(zero as i32) - self.first })
    }

    /// Whether no block has columns of two groups.
    fn is_part(&self, shape: &Shape) -> bool {
        shape.groups == 1 || shape.group_size.is_multiple_of(self.lattice.block_size as u64)
    }

    /// Whether the groups that a block has columns of have the same scale and zero, in a row.
    fn is_one(&self, shape: &Shape, scales: &[f32], zeros: &[f32]) -> bool {
        let (size, group) = (self.lattice.block_size, shape.group_size as usize);
        (0..shape.cols as usize / size).all(|b| {
            let (first, last) = (b * size / group, ((b + 1) * size - 1) / group);
            (first..=last).all(|g| (scales[g], zeros[g]) == (scales[first], zeros[first]))
        })
    }
}

/// Rows as blocks.
#[derive(Debug)]
struct Blocks {
    matrix: Arc<dyn Grouped>,
    block: Block,
}

impl View for Blocks {
    fn packing(&self) -> Packing {
        self.matrix.shape().packing()
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let shape = self.matrix.shape();
        let Lattice { block_size: size, type_size, .. } = *self.block.lattice;
        let per_row = shape.cols / size as u64;
        let first = start / size as u64;
        let end = first + (out.len() / type_size) as u64;
        if first == end {
            return Ok(());
        }
        let rows: Range<u64> = first / per_row..end.div_ceil(per_row);
        let mut read = Rows::default();
        read.read(&*self.matrix, stored, rows.clone())?;
        let skipped = (first - rows.start * per_row) as usize;
        let line = |k: usize| {
            let (row, col) = ((skipped + k) / per_row as usize, (skipped + k) % per_row as usize * size);
            let line = row * shape.groups as usize + col / shape.group_size as usize;
            (read.scales[line], read.zeros[line])
        };
        let codes = &mut read.codes[skipped * size..][..(end - first) as usize * size];
        for (k, codes) in codes.chunks_exact_mut(size).enumerate() {
            // Modulo 256, as codes of 8 bits with a sign are.
            let offset = self.block.offset(line(k).1).unwrap_or(0) as u8;
            codes.iter_mut().for_each(|code| *code = code.wrapping_add(offset));
        }
        self.block.lattice.put(codes, out)?;
        for k in 0..(end - first) as usize {
            let (scale, zero) = line(k);
            let out = &mut out[k * type_size..][..type_size];
            self.block.lattice.set(0, (scale, -zero * scale), out)?;
        }
        Ok(())
    }

    fn is_scattered(&self) -> bool {
        self.matrix.is_scattered()
    }

    fn grouped(&self) -> Option<&Arc<dyn Grouped>> {
        Some(&self.matrix)
    }
}
