//! IQ3_XXS: 256 weights in 98 bytes, 8 groups of 32 with a scale of 4 bits; four weights at a time
//! are one of 256 points, the signs of eight in 7 bits.

use super::grid::{EVEN, decode_eight, points, words};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// A point for four weights each.
    pub points: [[[u8; 2]; 4]; 8],
    /// Of each group, little endian: 7 bits of signs for eight weights each from bit 0 on, the
    /// scale in bits 28 to 31. A weight is `d * (0.5 + scale) * 0.5 * level`.
    pub signs: [[u8; 4]; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ3_XXS.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ3_XXS,
    implementation: "scalar",
    encode: None,
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 256] = words(include_bytes!("../../formats/block/iq3_xxs.txt"));
static LEVELS: [[i8; 4]; 256] = points(&WORDS, &[4, 12, 20, 28, 36, 44, 52, 62]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for ((points, signs), y) in block.points.iter().zip(&block.signs).zip(y.as_chunks_mut::<4>().0) {
        let signs = u32::from_le_bytes(*signs);
        let d = d * (0.5 + (signs >> 28) as f32) * 0.5;
        for k in 0..4 {
            let levels = [LEVELS[usize::from(points[k][0])], LEVELS[usize::from(points[k][1])]];
            let levels = bytemuck::cast(levels);
            decode_eight(d, &levels, EVEN[(signs >> (7 * k) & 127) as usize], &mut y[k]);
        }
    }
}
