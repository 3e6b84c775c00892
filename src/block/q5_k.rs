//! Q5_K: 256 weights in 176 bytes, 8 groups with a scale and a minimum of 6 bits, codes of 5 bits.

use super::groups::LANES;
use super::kquant::{Lined, encode_lines, pack_bits, pack_halves, unpack_bits, unpack_halves};
use super::lattice::{Latticed, whole};
use super::lines::{Affine, Weight};
use super::q4_k::{self, Scales};
use super::{Codec, decode_pairs};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    pub scales: Scales,
    /// Bit 4 of every code: weight `32 n + m` in bit `n` of byte `m`.
    pub qh: [u8; 32],
    /// Bits 0 to 3: of each 64 weights, weight `j` in the low half of byte `j`, weight `j + 32` in
    /// the high half. A weight is `d * scale * code - dmin * minimum`.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q5_K.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &whole::<32>(0);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        for (line, (scale, min)) in lines.iter_mut().zip(self.scales.values()) {
            *line = (scale, -min);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        Lined::<32, 8>::pack(self, codes);
    }

    fn set(&mut self, group: usize, line: (f32, f32)) {
        self.scales.set(group, line);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q5_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<LANES>(src, None, dst)),
    weigh: Some(|src, importance, dst| encode::<LANES>(src, Some(importance), dst)),
    decode: |src, dst| decode(src, dst),
    bound: None,
};

#[inline(always)]
pub(super) fn encode<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    encode_lines::<Block, L, 32, 8>(src, importance, dst);
}

impl Lined<32, 8> for Block {
    const PLAIN: Affine = Affine {
        weight: Weight::Mean,
        codes: 31,
        attempts: 16,
        first: -0.5,
        step: 0.1,
        absolute: false,
        limited: false,
    };
    const LEVELS: u8 = 63;
    const LIMITS: [u8; 2] = [63, 63];
    const SPREAD: f32 = 2.0;

    #[inline(always)]
    fn store(&mut self, d: [u8; 2], dmin: [u8; 2], scales: &[u8; 8], mins: &[u8; 8]) -> [(f32, f32); 8] {
        self.scales = Scales { d, dmin, packed: q4_k::pack(scales, mins) };
        self.scales.values()
    }

    #[inline(always)]
    fn pack(&mut self, codes: &[u8; 256]) {
        self.qh = pack_bits(codes, 4);
        pack_halves::<32>(codes, &mut self.qs);
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
    unpack_halves::<32>(&block.qs, &mut codes);
    unpack_bits(&block.qh, 4, &mut codes);
    block.scales.decode(&codes, y);
}
