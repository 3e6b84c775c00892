//! Q8_0: 32 weights in 34 bytes, one scale, codes of 8 bits around zero.

use super::cast::{abs_max, away, has_inverse, inverse, round_up, scale_error, truncate};
use super::lattice::{Latticed, half, whole};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Codes: a weight is `d * qs`.
    pub qs: [i8; 32],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q8_0.type_size());

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<255>(-127);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        for (q, &code) in self.qs.iter_mut().zip(codes) {
            // -128 is left out, as ggml does: its dot products negate codes.
            *q = code.wrapping_sub(127) as i8;
        }
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q8_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(bound),
};

pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let d = abs_max(x) / 127.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    for (q, x) in block.qs.iter_mut().zip(x) {
        *q = truncate(away(x * id)) as i8;
    }
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (y, &q) in y.iter_mut().zip(&block.qs) {
        *y = f32::from(q) * d;
    }
}

/// Half a step, and what rounding the scale to f16 does to the largest code.
fn bound(x: &[f32]) -> f32 {
    let amax = abs_max(x);
    let d = amax / 127.0;
    if !has_inverse(d) {
        return amax;
    }
    round_up(0.5 * f64::from(d) + scale_error(d, 127.0))
}
