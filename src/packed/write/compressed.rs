//! Layouts of compressed-tensors: see [`super::super::compressed`].

use super::{Data, Grid, Layout, Part, Put, greatest, halves, unfit};
use crate::block::bits;
use crate::error::Result;
use crate::tensor::DType;

/// Integers: pack-quantized, or int-quantized where they have 8 bits and are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Compressed {
    /// The integers.
    pub grid: Grid,
    /// Whether codes are bytes, as the int-quantized layout has them.
    pub bytes: bool,
    /// Whether columns name their groups; not for bytes.
    pub act_order: bool,
}

impl Layout for Compressed {
    fn grid(&self) -> Option<&Grid> {
        Some(&self.grid)
    }

    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let shape = self.grid.shape(rows, cols);
        if !cols.is_multiple_of(shape.group_size) || rows * cols == 0 {
            let why = format!("groups of {} do not divide rows", shape.group_size);
            return Err(unfit("compressed-tensors", rows, cols, &why));
        }
        let words = |n: u64| bits::bytes(n, shape.bits).map_or(u64::MAX, |n| n.div_ceil(4));
        let mut parts = match self.bytes {
            true => vec![Part::new(".weight", DType::I8, &[rows, cols])],
            false => vec![Part::new(".weight_packed", DType::I32, &[rows, words(cols)])],
        };
        parts.push(Part::new(".weight_scale", DType::F16, &[rows, shape.groups]));
        if !self.bytes {
            parts.push(Part::new(".weight_shape", DType::I64, &[2]));
        }
        if !self.grid.symmetric {
            let packed = Part::new(".weight_zero_point", DType::I32, &[words(rows), shape.groups]);
            let plain = Part::new(".weight_zero_point", DType::I8, &[rows, shape.groups]);
            parts.push(if self.bytes { plain } else { packed });
        }
        if self.act_order {
            parts.push(Part::new(".weight_g_idx", DType::I32, &[cols]));
        }
        Ok(parts)
    }

    fn holds_order(&self) -> bool {
        self.act_order
    }

    fn unit(&self, _cols: u64) -> u64 {
        // Zeros of so many rows fill whole words.
        32
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let (given, data) = (data, data.integers()?);
        let shape = self.grid.shape(rows, cols);
        let (n, groups) = (data.codes.len() / cols as usize, shape.groups as usize);
        let middle = self.grid.middle();
        let signed = |code: u8| code.wrapping_sub(middle);
        put(1, first * shape.groups * 2, &halves(data.scales.iter().copied()))?;
        let zeros: Vec<u8> = data.zeros.iter().map(|z| *z as u8).collect();
        if self.bytes {
            put(0, first * cols, &data.codes.iter().map(|c| signed(*c)).collect::<Vec<_>>())?;
            if !self.grid.symmetric {
                put(2, first * shape.groups, &zeros.into_iter().map(signed).collect::<Vec<_>>())?;
            }
            return Ok(0.0);
        }
        let row_bytes = bits::bytes(cols, shape.bits).map_or(0, |n| n.next_multiple_of(4)) as usize;
        let mut streams = vec![0; n * row_bytes];
        for (codes, stream) in data.codes.chunks_exact(cols as usize).zip(streams.chunks_exact_mut(row_bytes))
        {
            bits::pack(codes, shape.bits, stream);
        }
        put(0, first * row_bytes as u64, &streams)?;
        if first == 0 {
            put(2, 0, &[rows, cols].map(u64::to_le_bytes).concat())?;
            if self.act_order {
                let last = if self.grid.symmetric { 3 } else { 4 };
                put(last, 0, &given.group_bytes(cols as usize, shape.group_size))?;
            }
        }
        if !self.grid.symmetric {
            // A stream along the rows for each group, words side by side.
            let words = (n * shape.bits as usize).div_ceil(32);
            let mut table = vec![0; words * groups * 4];
            let mut stream = vec![0; words * 4];
            for g in 0..groups {
                let fields: Vec<u8> = zeros[g..].iter().step_by(groups).copied().collect();
                bits::pack(&fields, shape.bits, &mut stream);
                for (w, word) in stream.as_chunks::<4>().0.iter().enumerate() {
                    table[(w * groups + g) * 4..][..4].copy_from_slice(word);
                }
            }
            put(3, first / 32 * u64::from(shape.bits) * shape.groups * 4, &table)?;
        }
        Ok(0.0)
    }
}

/// FP8 with a scale for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct CompressedFp8;

impl Layout for CompressedFp8 {
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        Ok(vec![
            Part::new(".weight", DType::F8_E4M3, &[rows, cols]),
            Part::new(".weight_scale", DType::F32, &[rows, 1]),
        ])
    }

    fn write(&self, [_, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let weights = data.weights()?;
        let mut scales = Vec::with_capacity(weights.len() / cols as usize * 4);
        let mut codes = vec![0; weights.len()];
        let mut loss = 0.0;
        for (weights, codes) in weights.chunks(cols as usize).zip(codes.chunks_mut(cols as usize)) {
            let scale = super::fp8::scale(greatest(weights));
            loss += super::fp8::encode(weights, scale, codes);
            scales.extend(scale.to_le_bytes());
        }
        put(0, first * cols, &codes)?;
        put(1, first * 4, &scales)?;
        Ok(loss)
    }
}
