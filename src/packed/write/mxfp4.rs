//! MXFP4 as gpt-oss is published: see [`super::super::mxfp4`].

use super::{Data, Layout, Part, Put, lost, unfit};
use crate::block::codec;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Blocks of 32 columns, codes and scales in tensors of their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Mxfp4;

const BLOCK: u64 = 32;
const TYPE_SIZE: usize = DType::MXFP4.type_size() as usize;
/// Bytes of codes in a block.
const CODES: usize = 16;

impl Mxfp4 {
    /// Puts blocks of ggml's MXFP4 from block `first` of the stack on: bits are moved.
    fn put_blocks(first: u64, blocks: &[u8], put: &mut Put<'_>) -> Result<()> {
        let blocks = blocks.as_chunks::<TYPE_SIZE>().0;
        let codes: Vec<u8> = blocks.iter().flat_map(pairs).collect();
        put(0, first * CODES as u64, &codes)?;
        put(1, first, &blocks.iter().map(|b| b[0]).collect::<Vec<_>>())
    }
}

/// Elements `j` and `j + 16` in a byte become neighbours.
fn pairs(block: &[u8; TYPE_SIZE]) -> [u8; CODES] {
    let element = |i: usize| block[1 + i % CODES] >> (4 * (i / CODES)) & 15;
    std::array::from_fn(|j| element(2 * j) | element(2 * j + 1) << 4)
}

impl Layout for Mxfp4 {
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        if !cols.is_multiple_of(BLOCK) || cols == 0 {
            return Err(unfit("MXFP4", rows, cols, "columns have to be multiples of 32"));
        }
        Ok(vec![
            Part::new("_blocks", DType::U8, &[rows, cols / BLOCK, CODES as u64]),
            Part::new("_scales", DType::U8, &[rows, cols / BLOCK]),
        ])
    }

    fn write(&self, [_, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let at = first * cols / BLOCK;
        if let Data::Mxfp4(blocks) = data {
            Self::put_blocks(at, blocks, put)?;
            return Ok(0.0);
        }
        let weights = data.weights()?;
        let mxfp4 = codec(DType::MXFP4).ok_or_else(|| Error::unsupported("MXFP4 cannot be written"))?;
        let mut blocks = vec![0; weights.len() / BLOCK as usize * TYPE_SIZE];
        mxfp4.encode(weights, cols as usize, None, &mut blocks)?;
        Self::put_blocks(at, &blocks, put)?;
        let mut stored = vec![0.0; weights.len()];
        mxfp4.decode(&blocks, &mut stored)?;
        Ok(lost(weights, &stored))
    }
}
