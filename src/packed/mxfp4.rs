//! MXFP4 as gpt-oss is published: `X_blocks` and `X_scales` for a stack of matrices `X`.
//!
//! A block is 32 elements along the input, 16 bytes of E2M1 codes, of which byte `j` holds element
//! `2j` in its low half and `2j + 1` in its high half, and an E8M0 scale. ggml has the same block
//! with the halves of the block in the halves of the bytes: bits are moved, nothing is rounded.
//!
//! The matrices are stored `[.., out, in]`, other than the unpacked parameter of the same model,
//! which is `[.., in, out]`. The joined tensor is called `X_blocks`, so that a definition can tell
//! the two apart. Source: transformers' `integrations/mxfp4.py`, checked by values.

use super::{Format, Packed, View, check};
use crate::container::{Joined, Packing, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "mxfp4",
    name: "MXFP4",
    marks: |t| t.dtype == DType::U8 && (t.name.ends_with("_blocks") || t.name.ends_with("_scales")),
    join,
};

/// Bytes of codes in a block.
const CODES: usize = 16;
const TYPE_SIZE: usize = DType::MXFP4.type_size() as usize;

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let mut joined = Vec::new();
    // Those that are ggml's blocks already, or were joined from something else, are what they are.
    let is_packed = |t: &TensorInfo| t.dtype != DType::MXFP4 && !packed.store.is_joined(t);
    for (stem, blocks) in packed.ending("_blocks").filter(|(_, t)| is_packed(t)) {
        let [outer @ .., n, bytes] = &blocks.shape[..] else {
            return Err(Error::malformed(format!("tensor {:?} has shape {:?}", blocks.name, blocks.shape)));
        };
        let grid = [outer, &[*n]].concat();
        check(blocks, &[DType::U8], &[&grid[..], &[CODES as u64]].concat())
            .map_err(|e| e.context(format!("blocks of {bytes} bytes")))?;
        let scales = packed.part(&format!("{stem}_scales"), &[DType::U8, DType::F8_E8M0], &grid)?;
        let row = n.checked_mul(DType::MXFP4.block_size());
        let row = row.ok_or_else(|| Error::malformed(format!("tensor {:?}: sizes overflow", blocks.name)))?;
        joined.push(Joined {
            name: blocks.name.clone(),
            dtype: DType::MXFP4,
            shape: [outer, &[row]].concat(),
            parts: vec![blocks.name.clone(), scales.name.clone()],
            view: Box::new(Blocks { blocks: blocks.clone(), scales: scales.clone() }),
        });
    }
    Ok(joined)
}

#[derive(Debug)]
struct Blocks {
    blocks: TensorInfo,
    scales: TensorInfo,
}

impl View for Blocks {
    fn packing(&self) -> Packing {
        Packing { bits: 4, block: [1, DType::MXFP4.block_size()] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let first = start / DType::MXFP4.block_size();
        let n = out.len() / TYPE_SIZE;
        let (mut codes, mut scales) = (vec![0; n * CODES], vec![0; n]);
        stored.read(&self.blocks, first * CODES as u64, &mut codes)?;
        stored.read(&self.scales, first, &mut scales)?;
        if let Some(k) = scales.iter().position(|s| *s == 0xFF) {
            let at = first + k as u64;
            return Err(Error::malformed(format!("tensor {:?}: scale {at} is NaN", self.scales.name)));
        }
        let blocks = out.as_chunks_mut::<TYPE_SIZE>().0.iter_mut();
        for (block, (codes, scale)) in blocks.zip(codes.as_chunks::<CODES>().0.iter().zip(scales)) {
            block[0] = scale;
            block[1..].copy_from_slice(&repack(codes));
        }
        Ok(())
    }
}

/// Neighbours in a byte become elements `j` and `j + 16` in a byte.
fn repack(pairs: &[u8; CODES]) -> [u8; CODES] {
    std::array::from_fn(|j| {
        let element = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
        element(j) | element(j + CODES) << 4
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_finds_its_place() {
        for i in 0..32 {
            let mut pairs = [0; CODES];
            pairs[i / 2] = 13 << (4 * (i % 2));
            let mut halves = [0; CODES];
            halves[i % CODES] = 13 << (4 * (i / CODES));
            assert_eq!(repack(&pairs), halves, "element {i}");
        }
    }
}
