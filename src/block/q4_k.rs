//! Q4_K: 256 weights in 144 bytes, 8 groups with a scale and a minimum of 6 bits, codes of 4 bits.

use super::kquant::{Affine, affine, greatest, nearest, pack_halves, requantize, unpack_halves};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    pub scales: Scales,
    /// Codes: of each 64 weights, weight `j` in the low half of byte `j`, weight `j + 32` in the
    /// high half. A weight is `d * scale * code - dmin * minimum`.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q4_K.type_size());

/// Scales and minima of the groups; Q5_K shares it.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Scales {
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
    /// Scale of the minima, f16 little endian.
    pub dmin: [u8; 2],
    /// Groups 0 to 3: scale in bits 0 to 5 of byte `j`, minimum in those of byte `j + 4`. Groups 4
    /// to 7: bits 0 to 3 of scale and minimum in the halves of byte `j + 4`, bits 4 and 5 at the
    /// top of the bytes `j - 4` and `j`.
    pub packed: [u8; 12],
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q4_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 256], block: &mut Block) {
    let codes;
    (block.scales, codes) = search(Affine { codes: 15, attempts: 21, first: -1.0, absolute: false }, x);
    pack_halves::<32>(&codes, &mut block.qs);
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let mut codes = [0; 256];
    unpack_halves::<32>(&block.qs, &mut codes);
    block.scales.decode(&codes, y);
}

/// Scales and codes of a block.
pub(super) fn search(how: Affine, x: &[f32; 256]) -> (Scales, [u8; 256]) {
    let mut codes = [0; 256];
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    let found = scales.iter_mut().zip(&mut mins);
    for ((x, codes), (scale, min)) in x.as_chunks::<32>().0.iter().zip(codes.chunks_exact_mut(32)).zip(found)
    {
        let mean = (x.iter().fold(0.0, |sum, x| sum + x * x) / 32.0).sqrt();
        (*scale, *min) = affine(how, x, &x.map(|x| mean + x.abs()), codes);
    }
    let quantize = |found: [f32; 8]| {
        let most = greatest(&found);
        let inverse = if most > 0.0 { 63.0 / most } else { 0.0 };
        let codes = found.map(|v| (nearest(inverse * v) as u8).min(63));
        (f16_from_f32(most / 63.0).to_le_bytes(), codes)
    };
    let ((d, scales), (dmin, mins)) = (quantize(scales), quantize(mins));
    let stored = Scales { d, dmin, packed: pack(&scales, &mins) };
    for ((x, codes), (scale, min)) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)).zip(stored.values())
    {
        requantize(x, scale, min, how.codes, codes);
    }
    (stored, codes)
}

impl Scales {
    pub(super) fn decode(&self, codes: &[u8; 256], y: &mut [f32; 256]) {
        for ((y, codes), (scale, min)) in
            y.chunks_exact_mut(32).zip(codes.chunks_exact(32)).zip(self.values())
        {
            for (y, &code) in y.iter_mut().zip(codes) {
                *y = scale * f32::from(code) - min;
            }
        }
    }

    /// Scale and minimum of each group.
    fn values(&self) -> [(f32, f32); 8] {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let dmin = f32_from_f16(u16::from_le_bytes(self.dmin));
        let p = &self.packed;
        std::array::from_fn(|j| {
            let (scale, min) = if j < 4 {
                (p[j] & 63, p[j + 4] & 63)
            } else {
                (p[j + 4] & 15 | p[j - 4] >> 6 << 4, p[j + 4] >> 4 | p[j] >> 6 << 4)
            };
            (d * f32::from(scale), dmin * f32::from(min))
        })
    }
}

fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|j| match j {
        0..4 => scales[j] | scales[j + 4] >> 4 << 6,
        4..8 => mins[j - 4] | mins[j] >> 4 << 6,
        _ => scales[j - 4] & 15 | mins[j - 4] << 4,
    })
}
