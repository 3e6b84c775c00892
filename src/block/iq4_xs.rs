//! IQ4_XS: 256 weights in 136 bytes, 8 groups with a scale of 6 bits, the levels of IQ4_NL.

use super::cast::{extreme, inverse};
use super::iq4_nl::{dequantize, deviation, quantize, search, squares, weigh};
use super::kquant::nearest;
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
    /// Bits 4 and 5 of the scales: group `j` in bits `2j` and `2j + 1` of this little-endian word.
    pub scales_h: [u8; 2],
    /// Bits 0 to 3: group `j` in half `j % 2` of byte `j / 2`.
    pub scales_l: [u8; 4],
    /// Codes: 16 bytes for each group of 32, packed as in IQ4_NL. A weight is
    /// `d * (scale - 32) * LEVELS[code]`.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ4_XS.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ4_XS,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, None, block))),
    weigh: Some(|row, importance, dst| {
        for ((x, block), importance) in encode_pairs(row, dst).zip(importance.as_chunks().0) {
            encode_block(x, Some(importance), block);
        }
    }),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], importance: Option<&[f32; 256]>, block: &mut Block) {
    let mut found = [0.0; 8];
    let deviation = deviation(x);
    let x = x.as_chunks::<32>().0;
    for (i, (scale, x)) in found.iter_mut().zip(x).enumerate() {
        let weights = match importance {
            Some(importance) => weigh(x, &importance.as_chunks().0[i], deviation),
            None => squares(x),
        };
        *scale = search(x, &weights);
    }
    let d = extreme(&found) / -32.0;
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    let mut scales_h = 0;
    block.scales_l = [0; 4];
    for (j, ((x, scale), qs)) in x.iter().zip(found).zip(block.qs.chunks_exact_mut(16)).enumerate() {
        let scale = nearest(id * scale).clamp(-32, 31);
        // The codes are those of the scale before it is rounded to f16.
        quantize(x, d * scale as f32, qs);
        let bits = (scale + 32) as u16;
        block.scales_l[j / 2] |= (bits as u8 & 15) << (4 * (j % 2));
        scales_h |= bits >> 4 << (2 * j);
    }
    block.scales_h = scales_h.to_le_bytes();
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let scales_h = u16::from_le_bytes(block.scales_h);
    for (j, (y, qs)) in y.chunks_exact_mut(32).zip(block.qs.chunks_exact(16)).enumerate() {
        let low = block.scales_l[j / 2] >> (4 * (j % 2)) & 15;
        let scale = low | ((scales_h >> (2 * j) & 3) as u8) << 4;
        dequantize(qs, d * f32::from(scale as i8 - 32), y);
    }
}
