//! Q2_0: 64 weights in 18 bytes, one scale, codes of 2 bits around 1.

use super::cast::{away, extreme, inverse, truncate};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Codes: weight `j` in bits `2 (j % 4)` and above of byte `j / 4`. A weight is
    /// `d * (code - 1)`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q2_0.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q2_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(super::tq2_0::bound),
};

/// The scale is the largest magnitude, so that code 3 is never written for finite weights.
pub(super) fn encode_block(x: &[f32; 64], block: &mut Block) {
    let d = extreme(x).abs();
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    let code = |x: f32| (truncate(away(x * id)) + 1).clamp(0, 3) as u8;
    for (byte, x) in block.qs.iter_mut().zip(x.as_chunks::<4>().0) {
        *byte = x.iter().rev().fold(0, |byte, &x| byte << 2 | code(x));
    }
}

fn decode_block(block: &Block, y: &mut [f32; 64]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (y, byte) in y.as_chunks_mut::<4>().0.iter_mut().zip(block.qs) {
        for (j, y) in y.iter_mut().enumerate() {
            *y = f32::from((byte >> (2 * j) & 3) as i8 - 1) * d;
        }
    }
}
