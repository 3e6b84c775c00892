//! Q2_K: 256 weights in 84 bytes, 16 groups with a scale and a minimum of 4 bits, codes of 2 bits.

use super::kquant::{Affine, affine, greatest, nearest, pack_pairs, requantize, unpack_pairs};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
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

const SEARCH: Affine = Affine { codes: 3, attempts: 16, first: -0.5, absolute: true };

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q2_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], block: &mut Block) {
    let mut codes = [0; 256];
    let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
    let found = scales.iter_mut().zip(&mut mins);
    for ((x, codes), (scale, min)) in x.as_chunks::<16>().0.iter().zip(codes.chunks_exact_mut(16)).zip(found)
    {
        (*scale, *min) = affine(SEARCH, x, &x.map(f32::abs), codes);
    }
    let quantize = |found: [f32; 16]| {
        let most = greatest(&found);
        let inverse = 15.0 / most;
        let codes = if most > 0.0 { found.map(|v| nearest(inverse * v) as u8) } else { [0; 16] };
        (f16_from_f32(most / 15.0), codes)
    };
    let (d, scales) = quantize(scales);
    let (dmin, mins) = quantize(mins);
    (block.d, block.dmin) = (d.to_le_bytes(), dmin.to_le_bytes());
    for (byte, (scale, min)) in block.scales.iter_mut().zip(scales.iter().zip(mins)) {
        *byte = scale | min << 4;
    }
    let (d, dmin) = (f32_from_f16(d), f32_from_f16(dmin));
    for ((x, codes), &s) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).zip(&block.scales) {
        requantize(x, d * f32::from(s & 15), dmin * f32::from(s >> 4), SEARCH.codes, codes);
    }
    block.qs = pack_pairs(&codes, 0);
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let dmin = f32_from_f16(u16::from_le_bytes(block.dmin));
    let mut codes = [0; 256];
    unpack_pairs(&block.qs, 0, &mut codes);
    for ((y, codes), &s) in y.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(&block.scales) {
        let (scale, min) = (d * f32::from(s & 15), dmin * f32::from(s >> 4));
        for (y, &code) in y.iter_mut().zip(codes) {
            *y = scale * f32::from(code) - min;
        }
    }
}
