//! TQ2_0: 256 weights in 66 bytes, one scale, ternary codes of 2 bits each.

use super::cast::{abs_max, has_inverse, inverse, round, round_up, scale_error};
use super::lattice::{Latticed, half, whole};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Two groups of 128 weights; within a group, weight `32 n + m` in bits `2n` and `2n + 1` of
    /// byte `m`. A weight is `d * (code - 1)`.
    pub qs: [u8; 64],
    /// Scale, f16 little endian.
    pub d: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::TQ2_0.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 256;
    const LEVELS: &'static [f32] = &whole::<3>(-1);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 256]) {
        for (qs, codes) in self.qs.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
            for (m, q) in qs.iter_mut().enumerate() {
                *q = codes[m] | codes[m + 32] << 2 | codes[m + 64] << 4 | codes[m + 96] << 6;
            }
        }
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::TQ2_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(bound),
};

pub(super) fn encode_block(x: &[f32; 256], block: &mut Block) {
    let d = abs_max(x);
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    for (qs, x) in block.qs.chunks_exact_mut(32).zip(x.chunks_exact(128)) {
        for (m, q) in qs.iter_mut().enumerate() {
            let code = |n: usize| (round(x[32 * n + m] * id).wrapping_add(1) & 3) as u8;
            *q = code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6;
        }
    }
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (qs, y) in block.qs.chunks_exact(32).zip(y.chunks_exact_mut(128)) {
        for (n, y) in y.chunks_exact_mut(32).enumerate() {
            for (y, q) in y.iter_mut().zip(qs) {
                *y = f32::from((q >> (2 * n) & 3) as i8 - 1) * d;
            }
        }
    }
}

/// Half the scale, and its rounding to f16; TQ1_0 shares it.
pub(super) fn bound(x: &[f32]) -> f32 {
    let d = abs_max(x);
    if !has_inverse(d) {
        return d;
    }
    round_up(0.5 * f64::from(d) + scale_error(d, 1.0))
}
