//! Tensors of other formats, out of `.qpack`: the bytes that `take` moved into an encoding, as they were.

use super::take::pieces;
use crate::block::bits;
use crate::container::qpack::{Encoding, Matrix, Origin, Tensor, part_name};
use crate::container::{Store, Stored};
use crate::error::{Error, Result};
use crate::packed::awq::word;
use crate::packed::write::Put;
use crate::tensor::{DType, TensorInfo};

/// The layouts that [`restore`] knows.
pub const KNOWN_LAYOUTS: [&str; 7] =
    ["gptq", "awq", "pack-quantized", "int-quantized", "mxfp4", "bitsandbytes", "plain"];
/// Bytes that are moved at a time.
const BUFFER: u64 = 1 << 20;
/// Bytes of rows that change places with columns at a time; of long rows (`MAX_COLS`) 32, which fill words.
const PANEL: u64 = 4 << 20;

/// Puts the bytes of each tensor that `tensor` was made of, by their number in `origin`.
///
/// # Errors
/// As reads and `put` fail; `Unsupported` for a layout that is not known; `Malformed` where the note does not
/// fit the tensor: each byte of each source is put once, or it is an error.
pub fn restore(store: &Store, tensor: &Tensor, origin: &Origin, put: &mut Put<'_>) -> Result<()> {
    let context = |e: Error| e.context(format_args!("tensor {:?}", tensor.name));
    let restorer = Restorer::new(store, tensor).map_err(context)?;
    for (k, source) in origin.parts.iter().enumerate() {
        let len = source.dtype.nbytes(&source.shape)?;
        let wrong = |found: &str| {
            Error::malformed(format!(
                "{:?}, {} of shape {:?}, is not made of {:?}: it has {len} bytes, and {found}",
                source.name, source.dtype, source.shape, source.from
            ))
        };
        // No byte is put twice: as many as there are fill it.
        let mut filled = 0;
        let mut put = |at: u64, bytes: &[u8]| {
            if at.checked_add(bytes.len() as u64).is_none_or(|end| end > len) {
                return Err(wrong("more are stored"));
            }
            filled += bytes.len() as u64;
            put(k, at, bytes)
        };
        restorer.part(&origin.layout, &source.from, len, &mut put).map_err(context)?;
        if filled != len {
            return Err(context(wrong(&format!("{filled} are stored"))));
        }
    }
    Ok(())
}

/// Puts bytes at an offset.
type PutAt<'a> = dyn FnMut(u64, &[u8]) -> Result<()> + 'a;

struct Restorer<'a> {
    stored: &'a Stored,
    tensor: &'a Tensor,
    /// The stored tensors that hold the parts.
    infos: Vec<&'a TensorInfo>,
    matrix: Matrix,
    /// Blocks of a row, and bits of a code.
    across: u64,
    bits: u32,
}

impl<'a> Restorer<'a> {
    fn new(store: &'a Store, tensor: &'a Tensor) -> Result<Self> {
        let missing = || Error::misuse("is not of this store");
        let info = store.get(&tensor.name).ok_or_else(missing)?;
        let infos = match store.packing(info) {
            Some((_, parts)) => parts.iter().collect(),
            None => vec![info],
        };
        let matrix = Matrix::of(&tensor.shape, false)?;
        let (across, bits) = match &tensor.encoding {
            Encoding::Integers(e) => (matrix.blocks(e.block)[1], e.bits),
            _ => (1, 8),
        };
        Ok(Self { stored: store.stored(), tensor, infos, matrix, across, bits })
    }

    fn info(&self, part: &str) -> Result<&'a TensorInfo> {
        let missing = || Error::malformed(format!("its origin names {part:?}, which it has not"));
        let part = self.tensor.parts.iter().find(|p| p.name == part).ok_or_else(missing)?;
        let name = part_name(self.tensor, part);
        self.infos.iter().find(|t| t.name == name).copied().ok_or_else(missing)
    }

    /// The bytes of one tensor, of which there are `len`.
    fn part(&self, layout: &str, from: &str, len: u64, put: &mut PutAt<'_>) -> Result<()> {
        let is_integers = matches!(self.tensor.encoding, Encoding::Integers(_));
        let is_known = match layout {
            "gptq" | "awq" | "pack-quantized" | "int-quantized" => is_integers,
            "mxfp4" => self.tensor.encoding == Encoding::Plain(DType::MXFP4),
            "bitsandbytes" | "plain" => true,
            _ => false,
        };
        if !is_known {
            return Err(Error::unsupported(format!("its origin {layout:?} is not known for its encoding")));
        }
        match (layout, from) {
            (_, "columns") => return self.columns(put),
            ("gptq" | "awq", "scales") => {
                let info = self.info(from)?;
                return self.transposed(info, info.dtype.type_size(), put);
            }
            ("gptq", "codes") => return self.transposed(self.info(from)?, 4, put),
            ("gptq", "zeros") => return self.zeros(false, put),
            ("pack-quantized", "zeros") => return self.zeros(true, put),
            ("awq", "codes") => return self.nibbles(self.info(from)?, self.matrix.cols, put),
            ("awq", "zeros") => return self.nibbles(self.info(from)?, self.across, put),
            ("mxfp4", "blocks" | "scales") => return self.blocks(from == "blocks", put),
            _ => {}
        }
        let info = self.info(from)?;
        if info.nbytes != len {
            return Err(Error::malformed(format!(
                "its part {from:?} has {} bytes, {len} are named",
                info.nbytes
            )));
        }
        let size = info.dtype.type_size();
        pieces(len, (BUFFER / size).max(1) * size, |at, bytes| {
            self.stored.read(info, at, bytes)?;
            match (layout, from) {
                ("bitsandbytes", "codes") => halves_exchanged(bytes),
                ("int-quantized", "codes" | "zeros") => bytes.iter_mut().for_each(|b| *b ^= 0x80),
                _ => {}
            }
            put(at, bytes)
        })
    }

    /// Rows in panels: from the first on, how many, and their bytes in a part.
    fn panels(
        &self,
        info: &TensorInfo,
        mut each: impl FnMut(u64, usize, Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let row = info.nbytes / self.matrix.rows;
        let is_by_row = matches!(&self.tensor.encoding, Encoding::Integers(e) if e.block[0] == 1);
        if !is_by_row || row == 0 || !info.nbytes.is_multiple_of(self.matrix.rows) {
            return Err(Error::malformed("its origin has scales for each row"));
        }
        let step = (PANEL / row.max(1) / 32 * 32).max(32);
        let mut first = 0;
        while first < self.matrix.rows {
            let n = step.min(self.matrix.rows - first);
            let mut found = vec![0; (n * row) as usize];
            self.stored.read(info, first * row, &mut found)?;
            each(first, n as usize, found)?;
            first += n;
        }
        Ok(())
    }

    /// Elements of so many bytes: rows become columns.
    fn transposed(&self, info: &TensorInfo, size: u64, put: &mut PutAt<'_>) -> Result<()> {
        let (rows, size) = (self.matrix.rows, size as usize);
        self.panels(info, |first, n, found| {
            let cols = found.len() / n / size;
            if !found.len().is_multiple_of(n * size) {
                return Err(Error::malformed("its rows are no whole words"));
            }
            if size == 4 {
                let mut out = vec![[0; 4]; cols * n];
                bits::transpose(found.as_chunks::<4>().0, cols, &mut out);
                let put = |(c, column): (usize, &[[u8; 4]])| {
                    put((c as u64 * rows + first) * 4, column.as_flattened())
                };
                return out.chunks_exact(n).enumerate().try_for_each(put);
            }
            let mut column = vec![0; n * size];
            for c in 0..cols {
                for (to, row) in column.chunks_exact_mut(size).zip(found.chunks_exact(cols * size)) {
                    to.copy_from_slice(&row[c * size..][..size]);
                }
                put((c as u64 * rows + first) * size as u64, &column)?;
            }
            Ok(())
        })
    }

    /// Zeros as a stream along the rows for each group, of words that lie behind or, `side_by_side`, beside each
    /// other.
    fn zeros(&self, side_by_side: bool, put: &mut PutAt<'_>) -> Result<()> {
        let (across, bits) = (self.across as usize, self.bits);
        if !(self.matrix.rows * u64::from(bits)).is_multiple_of(32) {
            return Err(Error::malformed(format!(
                "{} zeros of {bits} bits are no whole words",
                self.matrix.rows
            )));
        }
        self.panels(self.info("zeros")?, |first, n, found| {
            let mut fields = vec![0; n * across];
            for (stream, fields) in found.chunks_exact(found.len() / n).zip(fields.chunks_exact_mut(across)) {
                bits::unpack(stream, bits, 0, fields);
            }
            let words = (n * bits as usize).div_ceil(32);
            let first_word = first / 32 * u64::from(bits);
            let mut stream = vec![0; words * 4];
            let mut table = vec![0; if side_by_side { words * across * 4 } else { 0 }];
            for g in 0..across {
                let column: Vec<u8> = fields[g..].iter().step_by(across).copied().collect();
                bits::pack(&column, bits, &mut stream);
                if !side_by_side {
                    let of_group = self.matrix.rows * u64::from(bits) / 32;
                    put((g as u64 * of_group + first_word) * 4, &stream)?;
                }
                for (word, row) in stream.as_chunks::<4>().0.iter().zip(table.chunks_exact_mut(across * 4)) {
                    row[g * 4..][..4].copy_from_slice(word);
                }
            }
            if side_by_side { put(first_word * self.across * 4, &table) } else { Ok(()) }
        })
    }

    /// AWQ's words: eight neighbouring rows of a column.
    fn nibbles(&self, info: &TensorInfo, cols: u64, put: &mut PutAt<'_>) -> Result<()> {
        let (rows, width) = (self.matrix.rows, cols as usize);
        if !rows.is_multiple_of(8) || self.bits != 4 {
            return Err(Error::malformed(format!(
                "its origin is AWQ's, with {} bits and {rows} rows",
                self.bits
            )));
        }
        self.panels(info, |first, n, found| {
            let mut codes = vec![0; n * width];
            for (stream, codes) in found.chunks_exact(found.len() / n).zip(codes.chunks_exact_mut(width)) {
                bits::unpack(stream, 4, 0, codes);
            }
            let mut words = vec![[0u8; 4]; n / 8 * width];
            for (words, codes) in words.chunks_exact_mut(width).zip(codes.chunks_exact(8 * width)) {
                for (c, to) in words.iter_mut().enumerate() {
                    *to = word(|i| codes[i * width + c]);
                }
            }
            let mut out = vec![[0; 4]; words.len()];
            bits::transpose(&words, width, &mut out);
            let mut columns = out.chunks_exact(n / 8).enumerate();
            columns
                .try_for_each(|(c, column)| put((c as u64 * rows / 8 + first / 8) * 4, column.as_flattened()))
        })
    }

    /// The group of each column.
    fn columns(&self, put: &mut PutAt<'_>) -> Result<()> {
        let Encoding::Integers(e) = &self.tensor.encoding else {
            return Err(Error::malformed("has no groups"));
        };
        let group = |c: u64| ((c / e.block[1]) as u32).to_le_bytes();
        put(0, &(0..self.matrix.cols).flat_map(group).collect::<Vec<_>>())
    }

    /// Of ggml's blocks the codes, neighbours in a byte, or the scales.
    fn blocks(&self, codes: bool, put: &mut PutAt<'_>) -> Result<()> {
        let info = self.info("data")?;
        const SIZE: u64 = DType::MXFP4.type_size();
        pieces(info.nbytes, BUFFER / SIZE * SIZE, |at, found| {
            self.stored.read(info, at, found)?;
            let first = at / SIZE;
            let blocks = found.as_chunks::<{ SIZE as usize }>().0;
            if !codes {
                return put(first, &blocks.iter().map(|block| block[0]).collect::<Vec<_>>());
            }
            let element = |block: &[u8; SIZE as usize], i: usize| block[1 + i % 16] >> (4 * (i / 16)) & 15;
            let pairs = |block| (0..16).map(move |j| element(block, 2 * j) | element(block, 2 * j + 1) << 4);
            put(first * 16, &blocks.iter().flat_map(pairs).collect::<Vec<_>>())
        })
    }
}

/// Lets the halves of each byte change places.
pub(super) fn halves_exchanged(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|b| *b = b.rotate_left(4));
}
