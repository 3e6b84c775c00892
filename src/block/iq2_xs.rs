//! IQ2_XS: 256 weights in 74 bytes, 16 groups of 16 with a scale of 4 bits; eight weights at a time
//! are one of 512 points, their signs in 7 bits.

use super::grid::{EVEN, decode_eight, points, words};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// For eight weights each, little endian: the point in bits 0 to 8, seven signs above.
    pub qs: [[u8; 2]; 32],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (0.5 + scale) * 0.25 * level`.
    pub scales: [u8; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ2_XS.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ2_XS,
    implementation: "scalar",
    encode: None,
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 512] = words(include_bytes!("../../formats/block/iq2_xs.txt"));
static LEVELS: [[i8; 8]; 512] = points(&WORDS, &[8, 25, 43]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for n in 0..32 {
        let scale = block.scales[n / 4] >> (4 * (n / 2 % 2)) & 15;
        let d = d * (0.5 + f32::from(scale)) * 0.25;
        let q = u16::from_le_bytes(block.qs[n]);
        decode_eight(d, &LEVELS[usize::from(q & 511)], EVEN[usize::from(q >> 9)], &mut y[n]);
    }
}
