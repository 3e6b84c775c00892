//! Q3_K: 256 weights in 110 bytes, 16 groups with a scale of 6 bits, codes of 3 bits around 4.

use super::cast::extreme;
use super::kquant::{
    descend, nearest, pack_bits, pack_pairs, requantize_symmetric, unpack_bits, unpack_pairs,
};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Bit 2 of every code: weight `32 n + m` in bit `n` of byte `m`.
    pub hmask: [u8; 32],
    /// Bits 0 and 1: of each 128 weights, weight `32 n + m` in bits `2n` and `2n + 1` of byte `m`.
    /// A weight is `d * (scale - 32) * (code - 4)`.
    pub qs: [u8; 64],
    /// Bits 0 to 3 of the scales: group `j` in the low half of byte `j`, group `j + 8` in the high
    /// half; bits 4 and 5 of group `4 n + m` in bits `2n` and `2n + 1` of byte `8 + m`.
    pub scales: [u8; 12],
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q3_K.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q3_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], block: &mut Block) {
    let mut codes = [0; 256];
    let mut found = [0.0; 16];
    for ((x, codes), scale) in x.as_chunks().0.iter().zip(codes.chunks_exact_mut(16)).zip(&mut found) {
        *scale = descend(x, 4, codes);
    }
    let max = extreme(&found);
    let mut scales = [0; 16];
    block.d = [0; 2];
    if max != 0.0 {
        let inverse = -32.0 / max;
        scales = found.map(|scale| (nearest(inverse * scale) as i8).clamp(-32, 31) + 32);
        block.d = f16_from_f32(1.0 / inverse).to_le_bytes();
    }
    block.scales = pack_scales(&scales.map(|s| s as u8));
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for ((x, codes), scale) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).zip(scales) {
        requantize_symmetric(x, d * f32::from(scale - 32), 4, codes);
    }
    block.hmask = pack_bits(&codes, 2);
    block.qs = pack_pairs(&codes, 0);
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let mut codes = [0; 256];
    unpack_pairs(&block.qs, 0, &mut codes);
    unpack_bits(&block.hmask, 2, &mut codes);
    let scales = unpack_scales(&block.scales);
    for ((y, codes), scale) in y.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(scales) {
        let scale = d * f32::from(scale as i8 - 32);
        for (y, &code) in y.iter_mut().zip(codes) {
            *y = scale * f32::from(code as i8 - 4);
        }
    }
}

fn pack_scales(scales: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, scale) in scales.iter().enumerate() {
        packed[j % 8] |= (scale & 15) << (4 * (j / 8));
        packed[8 + j % 4] |= scale >> 4 << (2 * (j / 4));
    }
    packed
}

fn unpack_scales(packed: &[u8; 12]) -> [u8; 16] {
    std::array::from_fn(|j| {
        packed[j % 8] >> (4 * (j / 8)) & 15 | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4
    })
}
