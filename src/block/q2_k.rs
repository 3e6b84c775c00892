//! Q2_K: 256 weights in 84 bytes, 16 groups with a scale and a minimum of 4 bits, codes of 2 bits.

use super::groups::LANES;
use super::kquant::{Lined, encode_lines, pack_pairs, unpack_pairs};
use super::lattice::{Latticed, steps, whole};
use super::lines::{Affine, Weight};
use super::{Codec, decode_pairs, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Of each group of 16: scale in the low half, minimum in the high half.
    pub scales: [u8; 16],
    /// Codes: of each 128 weights, weight `32 n + m` in bits `2n` and `2n + 1` of byte `m`. A
    /// weight is `d * scale * code - dmin * minimum`.
    pub qs: [u8; 64],
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
    /// Scale of the minima, f16 little endian.
    pub dmin: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q2_K.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 16;
    const LEVELS: &'static [f32] = &whole::<4>(0);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        for (line, (scale, min)) in lines.iter_mut().zip(self.values()) {
            *line = (scale, -min);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        Lined::<16, 16>::pack(self, codes);
    }

    fn set(&mut self, group: usize, (scale, offset): (f32, f32)) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let dmin = f32_from_f16(u16::from_le_bytes(self.dmin));
        self.scales[group] = steps(scale, d, 0, 15) as u8 | (steps(-offset, dmin, 0, 15) as u8) << 4;
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q2_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<LANES>(src, None, dst)),
    weigh: Some(|src, importance, dst| encode::<LANES>(src, Some(importance), dst)),
    decode: |src, dst| decode(src, dst),
    bound: None,
};

#[inline(always)]
pub(super) fn encode<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_lines::<Block, L, 16, 16>(src, importance, dst);
}

impl Lined<16, 16> for Block {
    const PLAIN: Affine = Affine {
        weight: Weight::Magnitude,
        codes: 3,
        attempts: 16,
        first: -0.5,
        step: 0.1,
        absolute: true,
        limited: false,
    };
    const LEVELS: u8 = 15;
    const LIMITS: [u8; 2] = [255, 255];
    const SPREAD: f32 = 1.0;

    #[inline(always)]
    fn store(&mut self, d: [u8; 2], dmin: [u8; 2], scales: &[u8; 16], mins: &[u8; 16]) -> [(f32, f32); 16] {
        (self.d, self.dmin) = (d, dmin);
        for g in 0..16 {
            self.scales[g] = scales[g] | mins[g] << 4;
        }
        self.values()
    }

    #[inline(always)]
    fn pack(&mut self, codes: &[u8; 256]) {
        self.qs = pack_pairs(codes, 0);
    }
}

impl Block {
    /// Scale and minimum of each group.
    #[inline(always)]
    pub(super) fn values(&self) -> [(f32, f32); 16] {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let dmin = f32_from_f16(u16::from_le_bytes(self.dmin));
        let mut values = [(0.0, 0.0); 16];
        for (value, s) in values.iter_mut().zip(self.scales) {
            *value = (d * f32::from(s & 15), dmin * f32::from(s >> 4));
        }
        values
    }
}

#[inline(always)]
fn decode(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs(src, dst) {
        decode_block(block, y);
    }
}

#[inline(always)]
fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack_pairs(&block.qs, 0, &mut codes);
    for ((y, codes), (scale, min)) in y.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(block.values()) {
        for (y, &code) in y.iter_mut().zip(codes) {
            *y = scale * f32::from(code) - min;
        }
    }
}
