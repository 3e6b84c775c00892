//! IQ2_S: 256 weights in 82 bytes, 16 groups of 16 with a scale of 4 bits; eight weights at a time
//! are one of 1024 points and eight signs.

use super::grid::{decode_eight, points, words};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bits 0 to 7 of the points of eight weights each.
    pub points: [u8; 32],
    /// Their signs.
    pub signs: [u8; 32],
    /// Bits 8 and 9 of point `n`: bits `2 (n % 4)` and above of byte `n / 4`.
    pub qh: [u8; 8],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (0.5 + scale) * 0.25 * level`.
    pub scales: [u8; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ2_S.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ2_S,
    implementation: "scalar",
    encode: None,
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 1024] = words(include_bytes!("../../formats/block/iq2_s.txt"));
static LEVELS: [[i8; 8]; 1024] = points(&WORDS, &[8, 25, 43]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for n in 0..32 {
        let scale = block.scales[n / 4] >> (4 * (n / 2 % 2)) & 15;
        let d = d * (0.5 + f32::from(scale)) * 0.25;
        let high = usize::from(block.qh[n / 4] >> (2 * (n % 4)) & 3);
        let point = usize::from(block.points[n]) | high << 8;
        decode_eight(d, &LEVELS[point], block.signs[n], &mut y[n]);
    }
}
