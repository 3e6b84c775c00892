//! Integers in groups that are blocks of ggml without rounding: codes are moved, and scales are the same.
//!
//! Q4_0 has `(q - 8) d` for 32 columns with `d` in F16, Q4_1 `q d + m`, Q8_0 `q d`. A group of a multiple of
//! 32 columns is several such blocks with one `d`, if `d` (and `m = -zero d`) are numbers of F16, and
//! `code - zero` is within the block's codes.

use std::ops::Range;
use std::sync::Arc;

use crate::block::{f16_from_f32, f32_from_f16};
use crate::container::grouped::{Grouped, Rows};
use crate::container::{Packing, Store, Stored, View};
use crate::error::Result;
use crate::tensor::DType;

/// Block types that can hold integers in groups, the smallest first.
pub const BLOCKS: [DType; 3] = [DType::Q4_0, DType::Q4_1, DType::Q8_0];

/// Columns of a block of any of these.
const BLOCK: usize = 32;

/// Lets joined tensors of integers in groups give the blocks of one of `types`, the first that holds all
/// of their values exactly. The others go on giving F32. Returns how many there are of each.
///
/// # Errors
/// As reading scales and zeros.
pub fn give_blocks(store: &mut Store, types: &[DType]) -> Result<Vec<(DType, u64)>> {
    let mut counts: Vec<_> = types.iter().map(|t| (*t, 0)).collect();
    let names: Vec<String> = store.tensors().iter().map(|t| t.name.clone()).collect();
    for name in names {
        let Some((matrix, stored)) = store.get(&name).and_then(|t| store.grouped(t)) else { continue };
        let fit =
            fitting(&**matrix, stored, types).map_err(|e| e.context(format_args!("tensor {name:?}")))?;
        let Some(k) = fit else { continue };
        let view = Blocks { matrix: matrix.clone(), dtype: types[k] };
        store.give_as(&name, types[k], Box::new(view))?;
        counts[k].1 += 1;
    }
    counts.retain(|(_, n)| *n > 0);
    Ok(counts)
}

/// The first of `types` whose blocks hold a matrix exactly.
fn fitting(matrix: &dyn Grouped, stored: &Stored, types: &[DType]) -> Result<Option<usize>> {
    let shape = matrix.shape();
    let whole = |n: u64| n.is_multiple_of(BLOCK as u64);
    let groups_fit = shape.cols > 0 && whole(shape.cols) && (shape.groups == 1 || whole(shape.group_size));
    if !groups_fit || reordered(matrix, stored)? {
        return Ok(None);
    }
    let mut fits = vec![true; types.len()];
    // As many rows at a time as have 1 Mi groups.
    let step = ((1 << 20) / shape.groups.max(1)).max(1);
    let mut first = 0;
    while first < shape.rows && fits.contains(&true) {
        let rows = first..shape.rows.min(first + step);
        let n = ((rows.end - rows.start) * shape.groups) as usize;
        let (mut scales, mut zeros) = (vec![0f32; n], vec![0f32; n]);
        first = rows.end;
        matrix.lines(stored, rows, &mut scales, &mut zeros)?;
        for (fits, dtype) in fits.iter_mut().zip(types) {
            *fits &= scales.iter().zip(&zeros).all(|(s, z)| holds(*dtype, shape.bits, *s, *z));
        }
    }
    Ok(fits.iter().position(|fits| *fits))
}

/// Whether columns name their groups, and not in the order in which they stand.
fn reordered(matrix: &dyn Grouped, stored: &Stored) -> Result<bool> {
    let size = matrix.shape().group_size as usize;
    Ok(matrix
        .groups(stored)?
        .is_some_and(|groups| groups.iter().enumerate().any(|(c, g)| c / size != *g as usize)))
}

/// Whether a block of this type holds every code of so many bits, with this scale and zero.
fn holds(dtype: DType, bits: u32, scale: f32, zero: f32) -> bool {
    let exact = |x: f32| x.is_finite() && f32_from_f16(f16_from_f32(x)) == x;
    let codes = match offset(dtype, zero) {
        Some(offset) => offset..=(1 << bits) - 1 + offset,
        None => return false,
    };
    let (least, most) = range(dtype);
    let min = -zero * scale;
    *codes.start() >= least && *codes.end() <= most && exact(scale) && (dtype != DType::Q4_1 || exact(min))
}

/// The codes of a block type.
fn range(dtype: DType) -> (i32, i32) {
    match dtype {
        DType::Q8_0 => (-128, 127),
        _ => (0, 15),
    }
}

/// What is added to a code, in a block of this type. `None` for a zero that is no integer.
fn offset(dtype: DType, zero: f32) -> Option<i32> {
    if zero.fract() != 0.0 || zero.abs() > 1024.0 {
        return None;
    }
    Some(match dtype {
        DType::Q4_0 => 8 - zero as i32,
        DType::Q8_0 => -(zero as i32),
        _ => 0,
    })
}

/// Rows as blocks.
#[derive(Debug)]
struct Blocks {
    matrix: Arc<dyn Grouped>,
    dtype: DType,
}

impl View for Blocks {
    fn packing(&self) -> Packing {
        self.matrix.shape().packing()
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let shape = self.matrix.shape();
        let size = self.dtype.type_size() as usize;
        let per_row = shape.cols / BLOCK as u64;
        let first = start / BLOCK as u64;
        let end = first + (out.len() / size) as u64;
        if first == end {
            return Ok(());
        }
        let rows: Range<u64> = first / per_row..end.div_ceil(per_row);
        let mut read = Rows::default();
        read.read(&*self.matrix, stored, rows.clone())?;
        let skipped = (first - rows.start * per_row) as usize;
        let blocks = read.codes.as_chunks::<BLOCK>().0.iter().enumerate().skip(skipped);
        for (out, (k, codes)) in out.chunks_exact_mut(size).zip(blocks) {
            let (row, col) = (k / per_row as usize, k % per_row as usize * BLOCK);
            let line = row * shape.groups as usize + col / shape.group_size as usize;
            self.block(codes, read.scales[line], read.zeros[line], out);
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

impl Blocks {
    fn block(&self, codes: &[u8; BLOCK], scale: f32, zero: f32, out: &mut [u8]) {
        // Modulo 256, as codes of 8 bits with a sign are.
        let offset = offset(self.dtype, zero).unwrap_or(0) as u8;
        let codes = codes.map(|code| code.wrapping_add(offset));
        let half = |x: f32| f16_from_f32(x).to_le_bytes();
        out[..2].copy_from_slice(&half(scale));
        if self.dtype == DType::Q8_0 {
            out[2..].copy_from_slice(&codes);
            return;
        }
        let pairs: [u8; BLOCK / 2] = std::array::from_fn(|j| codes[j] | codes[j + BLOCK / 2] << 4);
        let minimum = out.len() - 2 - pairs.len();
        let (minimum, qs) = out[2..].split_at_mut(minimum);
        if self.dtype == DType::Q4_1 {
            minimum.copy_from_slice(&half(-zero * scale));
        }
        qs.copy_from_slice(&pairs);
    }
}
