//! Q4_1: 32 weights in 20 bytes, a scale and a minimum, codes of 4 bits.

use super::cast::{f16_error, has_inverse, inverse, min_max, round_up, scale_error, truncate};
use super::lattice::{Latticed, half, whole};
use super::q4_0::pack;
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16, weighed};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Minimum, f16 little endian.
    pub m: [u8; 2],
    /// Codes: weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    /// A weight is `d * code + m`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q4_1.type_size());

impl weighed::Weighed for Block {
    const MIDDLE: Option<u8> = None;
    const MOST: u8 = 15;

    #[inline(always)]
    fn pack(d: [u8; 2], m: [u8; 2], codes: &[u8; 32]) -> Self {
        Self { d, m, qs: pack(codes) }
    }
}

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<16>(0);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let m = f32_from_f16(u16::from_le_bytes(self.m));
        lines.fill((d, m));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        self.qs = pack(codes);
    }

    fn set(&mut self, _: usize, (scale, offset): (f32, f32)) {
        self.d = half(scale);
        self.m = half(offset);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q4_1,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: Some(weighed::portable::<Block>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(|x| bound(x, 15.0)),
};

pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let (min, max) = min_max(x);
    let d = (max - min) / 15.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    block.m = f16_from_f32(min).to_le_bytes();
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (truncate((x - min) * id + 0.5) as i8).min(15) as u8;
    }
    block.qs = pack(&codes);
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let m = f32_from_f16(u16::from_le_bytes(block.m));
    let (low, high) = y.split_at_mut(16);
    for ((low, high), &q) in low.iter_mut().zip(high).zip(&block.qs) {
        *low = f32::from(q & 15) * d + m;
        *high = f32::from(q >> 4) * d + m;
    }
}

/// Half a step of `1 / codes` of the range, what rounding scale and minimum to f16 does, and the
/// rounding of the sum.
pub(super) fn bound(x: &[f32], codes: f32) -> f32 {
    let (min, max) = min_max(x);
    let range = max - min;
    let d = range / codes;
    let offset = f16_error(min) + 2.5e-7 * f64::from(min.abs().max(max.abs()));
    if !has_inverse(d) {
        return round_up(f64::from(range) + offset);
    }
    round_up(0.5 * f64::from(d) + scale_error(d, codes.into()) + offset)
}
