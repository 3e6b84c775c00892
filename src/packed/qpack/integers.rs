//! Integers in groups: `(code - zero) * scale`.

use std::ops::Range;

use super::{Parts, Scales, Shared, count_rows, index_of};
use crate::block::bits;
use crate::container::Stored;
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::container::qpack::{Encoding, Integers, Matrix, Zeros};
use crate::error::{Error, Result};
use crate::packed::write::Put;
use crate::tensor::TensorInfo;

/// Codes of a tensor, in files.
#[derive(Debug)]
pub(super) struct Codes {
    shape: Shape,
    codes: TensorInfo,
    scales: Scales,
    zeros: Minus,
    g_idx: Option<TensorInfo>,
}

/// What is taken from codes.
#[derive(Debug)]
enum Minus {
    /// The same everywhere.
    Number(f32),
    /// Streams of codes, to which this is added.
    Codes(TensorInfo, u8),
    Numbers(Scales),
}

impl Codes {
    pub(super) fn new(e: &Integers, shape: &[u64], parts: &Parts<'_>) -> Result<Self> {
        let matrix = Matrix::of(shape, false)?;
        Ok(Self {
            shape: shape_of(matrix, e.bits, e.block),
            codes: parts.get("codes")?,
            scales: Scales::new(parts.get("scales")?, matrix, e.block),
            zeros: match e.zeros {
                Zeros::Middle => Minus::Number((1u32 << (e.bits - 1)) as f32),
                Zeros::Codes(more) => Minus::Codes(parts.get("zeros")?, more),
                Zeros::Numbers(_) => Minus::Numbers(Scales::new(parts.get("zeros")?, matrix, e.block)),
            },
            g_idx: e.g_idx.then(|| parts.get("g_idx")).transpose()?,
        })
    }
}

/// The size of a matrix whose rows and columns share scales so.
pub(super) fn shape_of(matrix: Matrix, bits: u32, block: [u64; 2]) -> Shape {
    Shape {
        rows: matrix.rows,
        cols: matrix.cols,
        bits,
        group_size: block[1],
        groups: matrix.blocks(block)[1],
    }
}

impl Grouped for Codes {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        streams(stored, &self.codes, self.shape.bits, rows, self.shape.cols, codes)
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        self.scales.of_rows(stored, rows.clone(), scales)?;
        match &self.zeros {
            Minus::Number(zero) => zeros.fill(*zero),
            Minus::Numbers(numbers) => numbers.of_rows(stored, rows, zeros)?,
            Minus::Codes(info, more) => {
                let (high, across) = (self.scales.high, self.shape.groups as usize);
                let mut fields = vec![0; across];
                let mut at = u64::MAX;
                for (row, zeros) in rows.zip(zeros.chunks_exact_mut(across)) {
                    if at != row / high {
                        at = row / high;
                        streams(stored, info, self.shape.bits, at..at + 1, self.shape.groups, &mut fields)?;
                    }
                    for (zero, field) in zeros.iter_mut().zip(&fields) {
                        *zero = f32::from(u16::from(*field) + u16::from(*more));
                    }
                }
            }
        }
        Ok(())
    }

    fn groups(&self, stored: &Stored) -> Result<Option<Vec<u32>>> {
        self.g_idx.as_ref().map(|t| crate::packed::groups_of(stored, t, &self.shape)).transpose()
    }
}

/// Codes of whole rows, each row a stream of whole bytes.
pub(super) fn streams(
    stored: &Stored,
    info: &TensorInfo,
    bits: u32,
    rows: Range<u64>,
    cols: u64,
    codes: &mut [u8],
) -> Result<()> {
    let row = info.row();
    let n = (rows.end - rows.start) * row; // lies within the part
    let bytes = crate::packed::bytes(stored, info, rows.start * row, n as usize)?;
    for (stream, codes) in bytes.chunks_exact(row as usize).zip(codes.chunks_exact_mut(cols as usize)) {
        bits::unpack(stream, bits, 0, codes);
    }
    Ok(())
}

/// Puts the rows from `first` on, and with the first of them what all share. `g_idx` is the group of each
/// column, where the encoding has such a list.
///
/// # Errors
/// As `put` fails; `Unsupported` for a scale or zero that the encoding does not have; `Misuse` for rows of
/// another size.
pub fn put(
    e: &Integers,
    shape: &[u64],
    first: u64,
    rows: &Rows,
    g_idx: Option<&[u32]>,
    put: &mut Put<'_>,
) -> Result<()> {
    let matrix = Matrix::of(shape, false)?;
    count_rows(matrix, first, rows, matrix.blocks(e.block)[1])?;
    put_streams(e.bits, matrix.cols, first, &rows.codes, 0, put)?;
    put_lines(e, shape, first, rows, put)?;
    match (g_idx, e.g_idx) {
        (Some(list), true) if list.len() as u64 == matrix.cols => {
            let bytes: Vec<u8> = list.iter().flat_map(|g| g.to_le_bytes()).collect();
            let parts = Encoding::Integers(e.clone()).parts(shape)?.unwrap_or_default();
            if first == 0 { put(index_of(&parts, "g_idx"), 0, &bytes) } else { Ok(()) }
        }
        (None, false) => Ok(()),
        _ => Err(Error::misuse("a list of groups that the encoding has not, or the other way round")),
    }
}

/// Puts scales and zeros of the rows from `first` on.
///
/// # Errors
/// As `put`, the first of them.
pub(super) fn put_lines(
    e: &Integers,
    shape: &[u64],
    first: u64,
    rows: &Rows,
    put: &mut Put<'_>,
) -> Result<()> {
    let matrix = Matrix::of(shape, false)?;
    let groups = matrix.blocks(e.block)[1];
    let shared = |values| Shared { matrix, block: e.block, first, values };
    shared(&rows.scales).put(1, e.scales, put)?;
    let zeros = 2; // behind codes and scales
    match e.zeros {
        Zeros::Middle => {
            let middle = (1u32 << (e.bits - 1)) as f32;
            if let Some(zero) = rows.zeros.iter().find(|z| **z != middle) {
                return Err(Error::unsupported(format!("a zero of {zero}, all have to be {middle}")));
            }
        }
        Zeros::Numbers(dtype) => shared(&rows.zeros).put(zeros, dtype, put)?,
        Zeros::Codes(more) => {
            let range = f32::from(more)..f32::from(more) + (1u32 << e.bits) as f32;
            if let Some(zero) = rows.zeros.iter().find(|z| !range.contains(z) || z.fract() != 0.0) {
                return Err(Error::unsupported(format!(
                    "a zero of {zero} has no place among {} bits",
                    e.bits
                )));
            }
            for (row, values) in shared(&rows.zeros).rows()? {
                let fields: Vec<u8> = values.iter().map(|z| (*z - f32::from(more)) as u8).collect();
                put_streams(e.bits, groups, row, &fields, zeros, put)?;
            }
        }
    }
    Ok(())
}

/// Puts rows of codes, each as a stream of whole bytes.
pub(super) fn put_streams(
    bits: u32,
    cols: u64,
    first: u64,
    codes: &[u8],
    part: usize,
    put: &mut Put<'_>,
) -> Result<()> {
    let most = u8::MAX >> (8 - bits);
    if codes.iter().fold(0, |all, c| all | c) > most {
        return Err(Error::misuse(format!("codes of more than {bits} bits")));
    }
    let row = bits::bytes(cols, bits).ok_or_else(|| Error::misuse("rows beyond 2^64 bytes"))?;
    let n = codes.len() / cols as usize;
    let mut streams = vec![0; n * row as usize];
    for (codes, stream) in codes.chunks_exact(cols as usize).zip(streams.chunks_exact_mut(row as usize)) {
        bits::pack(codes, bits, stream);
    }
    put(part, first * row, &streams)
}
