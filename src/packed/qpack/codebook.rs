//! Numbers of a table: `table[code] * scale`, the table one of a tensor, a row or a group.

use super::{Blocks, Parts, numbers, runs};
use crate::block::bits;
use crate::container::qpack::{Codebook, Matrix};
use crate::container::{Packing, Stored, View};
use crate::error::{Error, Result};
use crate::packed::write::Put;
use crate::packed::{Tile, bytes, tiles};
use crate::tensor::TensorInfo;

/// Codes of a tensor, in files.
#[derive(Debug)]
pub(super) struct Codes {
    encoding: Codebook,
    matrix: Matrix,
    codes: TensorInfo,
    table: TensorInfo,
    scales: Option<TensorInfo>,
    nested: Option<Nested>,
}

/// Scales that are codes themselves.
#[derive(Debug)]
struct Nested {
    table: TensorInfo,
    scales: TensorInfo,
    offset: TensorInfo,
    block: u64,
}

impl Codes {
    pub(super) fn new(e: &Codebook, shape: &[u64], parts: &Parts<'_>) -> Result<Self> {
        let nested = e.nested.map(|nested| {
            Ok(Nested {
                table: parts.get("scales_table")?,
                scales: parts.get("scales_scales")?,
                offset: parts.get("scales_offset")?,
                block: nested.block,
            })
        });
        Ok(Self {
            encoding: e.clone(),
            matrix: Matrix::of(shape, e.flat)?,
            codes: parts.get("codes")?,
            table: parts.get("table")?,
            scales: e.scales.map(|_| parts.get("scales")).transpose()?,
            nested: nested.transpose()?,
        })
    }

    /// `n` scales from number `first` on.
    fn scales(&self, stored: &Stored, first: u64, n: usize) -> Result<Vec<f32>> {
        let Some(info) = &self.scales else { return Ok(vec![1.0; n]) };
        let Some(nested) = &self.nested else { return numbers(stored, info, first, n) };
        let codes = bytes(stored, info, first, n)?;
        let table = numbers(stored, &nested.table, 0, 256)?;
        let offset = numbers(stored, &nested.offset, 0, 1)?[0];
        let outer = first / nested.block;
        let outers = (first + n as u64).div_ceil(nested.block) - outer;
        let scales = numbers(stored, &nested.scales, outer, outers as usize)?;
        let scale = |(code, at): (u8, u64)| {
            table[usize::from(code)] * scales[(at / nested.block - outer) as usize] + offset
        };
        Ok(codes.into_iter().zip(first..).map(scale).collect())
    }

    /// The values of a tile: columns of one row, or whole rows.
    fn tile(&self, stored: &Stored, tile: &Tile, out: &mut [[u8; 4]]) -> Result<()> {
        let e = &self.encoding;
        let bits = u64::from(e.bits);
        // Eight codes are whole bytes.
        let (row, start, end) =
            (self.codes.row(), tile.cols.start / 8 * bits, tile.cols.end.div_ceil(8) * bits);
        let (last, end) = (tile.rows.end - 1, end.min(row));
        let n = (last - tile.rows.start) * row + end - start;
        let streams = bytes(stored, &self.codes, tile.rows.start * row + start, n as usize)?;
        let shared = |block| Blocks::of(tile, block, self.matrix);
        let (scales_at, tables_at) = (shared(e.block), shared(e.tables));
        let scales = self.scales(stored, scales_at.first, scales_at.n as usize)?;
        let entries = 1usize << e.bits;
        let tables =
            numbers(stored, &self.table, tables_at.first * entries as u64, tables_at.n as usize * entries)?;
        let wide = (tile.cols.end - tile.cols.start) as usize;
        let mut codes = vec![0; wide];
        // As long as bytes have codes: none is beyond.
        let (mut table, mut own) = ([0f32; 256], usize::MAX);
        let rows = streams.chunks((row as usize).max(1)).zip(tile.rows.clone());
        for ((stream, row), out) in rows.zip(out.chunks_exact_mut(wide.max(1))) {
            bits::unpack(stream, e.bits, (tile.cols.start % 8) as usize, &mut codes);
            for part in runs(&tile.cols, e.tables[1]) {
                let at = tables_at.index(row, part.start) * entries;
                if own != at {
                    table[..entries].copy_from_slice(&tables[at..at + entries]);
                    own = at;
                }
                for part in runs(&part, e.block[1]) {
                    let scale = scales[scales_at.index(row, part.start)];
                    let within =
                        (part.start - tile.cols.start) as usize..(part.end - tile.cols.start) as usize;
                    let values = codes[within.clone()].iter().map(|code| table[usize::from(*code)]);
                    let out = out[within].iter_mut().zip(values);
                    match self.scales {
                        Some(_) => out.for_each(|(y, x)| *y = (x * scale).to_le_bytes()),
                        None => out.for_each(|(y, x)| *y = x.to_le_bytes()),
                    }
                }
            }
        }
        Ok(())
    }
}

impl View for Codes {
    fn packing(&self) -> Packing {
        let [rows, cols] = self.encoding.block;
        let is_row = !self.encoding.flat && cols == self.matrix.cols;
        Packing { bits: self.encoding.bits, block: [rows, if is_row { 0 } else { cols }] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let mut out = out.as_chunks_mut().0;
        for tile in tiles(start, start + out.len() as u64, self.matrix.cols) {
            let n = (tile.rows.end - tile.rows.start) * (tile.cols.end - tile.cols.start);
            let (these, rest) = out.split_at_mut(n as usize);
            self.tile(stored, &tile, these)?;
            out = rest;
        }
        Ok(())
    }
}

/// Puts codes from element `start` on, in the order of the tensor. Both ends are those of rows, or, where the
/// tensor is one row, multiples of 8 but for its end. The other parts are written as they are.
///
/// # Errors
/// As `put` fails; `Misuse` for other ends, and codes of more bits.
pub fn put(e: &Codebook, shape: &[u64], start: u64, codes: &[u8], put: &mut Put<'_>) -> Result<()> {
    let matrix = Matrix::of(shape, e.flat)?;
    let all = crate::tensor::elements(shape)?;
    let end = start.checked_add(codes.len() as u64).filter(|end| *end <= all);
    let unit = if e.flat { 8 } else { matrix.cols };
    let is_end = |n: u64| n.is_multiple_of(unit) || n == all;
    let Some(end) = end.filter(|end| is_end(*end) && is_end(start)) else {
        return Err(Error::misuse(format!(
            "{} codes from {start} on are no rows of {}",
            codes.len(),
            matrix.cols
        )));
    };
    if !e.flat {
        return super::integers::put_streams(e.bits, matrix.cols, start / matrix.cols, codes, 0, put);
    }
    if start == end {
        return Ok(());
    }
    let mut stream = vec![0; bits::bytes(codes.len() as u64, e.bits).unwrap_or(0) as usize];
    bits::pack(codes, e.bits, &mut stream);
    put(0, start / 8 * u64::from(e.bits), &stream)
}
