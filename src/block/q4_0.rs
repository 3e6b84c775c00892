//! Q4_0: 32 weights in 18 bytes, one scale, codes of 4 bits around 8.

use super::cast::{extreme, has_inverse, inverse, round_up, scale_error, truncate};
use super::lattice::{Latticed, half, whole};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16, weighed};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Codes: weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
    /// A weight is `d * (code - 8)`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q4_0.type_size());

impl weighed::Weighed for Block {
    const MIDDLE: Option<u8> = Some(8);
    const MOST: u8 = 15;

    #[inline(always)]
    fn pack(d: [u8; 2], _: [u8; 2], codes: &[u8; 32]) -> Self {
        Self { d, qs: pack(codes) }
    }
}

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<16>(-8);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        self.qs = pack(codes);
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q4_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: Some(weighed::portable::<Block>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(|x| bound(x, 8.0)),
};

/// The weight farthest from zero gets code 0, so that its sign picks the sign of `d`.
pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let d = extreme(x) / -8.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (truncate(x * id + 8.5) as i8).min(15) as u8;
    }
    block.qs = pack(&codes);
}

/// Two codes of 4 bits to a byte; Q4_1 shares it.
pub(super) fn pack(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] | codes[j + 16] << 4)
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (low, high) = y.split_at_mut(16);
    for ((low, high), &q) in low.iter_mut().zip(high).zip(&block.qs) {
        *low = f32::from((q & 15) as i8 - 8) * d;
        *high = f32::from((q >> 4) as i8 - 8) * d;
    }
}

/// Codes reach `middle` steps on the side of the extreme weight and one step less on the other:
/// half a step, or whatever the farthest weight of the other side lacks.
pub(super) fn bound(x: &[f32], middle: f32) -> f32 {
    let max = extreme(x);
    let d = max / -middle;
    if !has_inverse(d) {
        return max.abs();
    }
    let other = x.iter().fold(0.0, |most: f32, v| most.max(v * -max.signum()));
    let step = f64::from(d.abs());
    let beyond = f64::from(other) - f64::from(middle - 1.0) * step;
    round_up(beyond.max(0.5 * step) + scale_error(d, middle.into()))
}
