//! Q5_K: 256 weights in 176 bytes, 8 groups with a scale and a minimum of 6 bits, codes of 5 bits.

use super::kquant::{Affine, pack_bits, pack_halves, unpack_bits, unpack_halves};
use super::q4_k::{Scales, search};
use super::{Codec, decode_pairs, encode_pairs};
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

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q5_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], block: &mut Block) {
    let codes;
    (block.scales, codes) = search(Affine { codes: 31, attempts: 16, first: -0.5, absolute: false }, x);
    block.qh = pack_bits(&codes, 4);
    pack_halves::<32>(&codes, &mut block.qs);
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack_halves::<32>(&block.qs, &mut codes);
    unpack_bits(&block.qh, 4, &mut codes);
    block.scales.decode(&codes, y);
}
