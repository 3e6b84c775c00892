//! Q1_0: 128 weights in 18 bytes, one scale, the sign of each weight.

use super::cast::round_up;
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bit `j % 8` of byte `j / 8`: whether weight `j` is `d` instead of `-d`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q1_0.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q1_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(bound),
};

pub(super) fn encode_block(x: &[f32; 128], block: &mut Block) {
    block.d = mean(x).to_le_bytes();
    for (byte, x) in block.qs.iter_mut().zip(x.as_chunks::<8>().0) {
        *byte = x.iter().enumerate().fold(0, |byte, (j, &x)| byte | u8::from(x >= 0.0) << j);
    }
}

/// The mean magnitude as f16.
fn mean(x: &[f32]) -> u16 {
    f16_from_f32(x.iter().fold(0.0, |sum, x| sum + x.abs()) / 128.0)
}

fn decode_block(block: &Block, y: &mut [f32; 128]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (y, byte) in y.as_chunks_mut::<8>().0.iter_mut().zip(block.qs) {
        for (j, y) in y.iter_mut().enumerate() {
            *y = if byte >> j & 1 == 1 { d } else { -d };
        }
    }
}

/// Signs are kept, so that the error is what the magnitude lacks to the scale.
fn bound(x: &[f32]) -> f32 {
    let d = f64::from(f32_from_f16(mean(x)));
    round_up(x.iter().fold(0.0, |most: f64, &x| most.max((f64::from(x.abs()) - d).abs())))
}
