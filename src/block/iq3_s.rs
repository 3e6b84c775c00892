//! IQ3_S: 256 weights in 110 bytes, 8 groups of 32 with a scale of 4 bits; four weights at a time
//! are one of 512 points, each weight has its sign.

use super::grid::{decode_eight, points, words};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bits 0 to 7 of the points of four weights each.
    pub points: [[u8; 8]; 8],
    /// Bit 8 of the points of a group: point `k` in bit `k`.
    pub qh: [u8; 8],
    /// Signs of eight weights each.
    pub signs: [[u8; 4]; 8],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (1 + 2 scale) * level`.
    pub scales: [u8; 4],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ3_S.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ3_S,
    implementation: "scalar",
    encode: None,
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 512] = words(include_bytes!("../../formats/block/iq3_s.txt"));
static LEVELS: [[i8; 4]; 512] = points(&WORDS, &[1, 3, 5, 7, 9, 11, 13, 15]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    let (y, _) = y.as_chunks_mut::<4>();
    for n in 0..8 {
        let scale = block.scales[n / 2] >> (4 * (n % 2)) & 15;
        let d = d * f32::from(1 + 2 * scale);
        for k in 0..4 {
            let point = |k: usize| usize::from(block.points[n][k]) | usize::from(block.qh[n] >> k & 1) << 8;
            let levels = [LEVELS[point(2 * k)], LEVELS[point(2 * k + 1)]];
            decode_eight(d, &bytemuck::cast(levels), block.signs[n][k], &mut y[n][k]);
        }
    }
}
