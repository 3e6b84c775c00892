//! NVFP4: 64 weights in 36 bytes, 4 groups with a scale that is a float of 8 bits, the codes of
//! MXFP4.

use super::cast::magnitude;
use super::mxfp4::{dequantize, quantize};
use super::{Codec, decode_pairs, encode_pairs};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scales of the groups of 16: UE4M3, four bits of exponent with bias 7, three of mantissa.
    pub d: [u8; 4],
    /// Codes: 8 bytes for each group, weight `j` in the low half of byte `j`, weight `j + 8` in
    /// the high half.
    pub qs: [u8; 32],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::NVFP4.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::NVFP4,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

/// The scale lays the largest weight of a group at 6, the largest value of a code.
pub(super) fn encode_block(x: &[f32; 64], block: &mut Block) {
    for (i, x) in x.as_chunks::<16>().0.iter().enumerate() {
        let amax = magnitude(x);
        block.d[i] = ue4m3(amax / 6.0);
        quantize(x, amax, half_scale(block.d[i]), &mut block.qs[8 * i..][..8]);
    }
}

fn decode_block(block: &Block, y: &mut [f32; 64]) {
    let groups = y.chunks_exact_mut(16).zip(block.qs.chunks_exact(8));
    for ((y, qs), &d) in groups.zip(&block.d) {
        dequantize(qs, half_scale(d), y);
    }
}

/// The nearest UE4M3, halves up; 448, the largest, for all that rounds to 256 or more. For numbers
/// that are not negative.
#[inline(always)]
pub(super) fn ue4m3(x: f32) -> u8 {
    // 2^-6 is the least normal number. A step of its mantissa, and of every subnormal, is 2^-9;
    // below, the steps are counted, and rounding never reaches the first normal number.
    if x < 2f32.powi(-6) {
        return ((x * 512.0 + 0.5) as u8).min(7);
    }
    // Exponent and three bits of mantissa, rounded at the fourth, in the bias of f32.
    let rounded = (x.to_bits() >> 19).div_ceil(2) - ((127 - 7) << 3);
    // ggml has no use for the highest exponent but its last number.
    if rounded < 15 << 3 { rounded as u8 } else { 0x7E }
}

/// Half the value of a UE4M3; 0x7F, which stands for NaN, counts as 0, and the sign bit for
/// nothing.
#[inline(always)]
pub(super) fn half_scale(bits: u8) -> f32 {
    HALF_SCALES[usize::from(bits)]
}

static HALF_SCALES: [f32; 256] = {
    let mut scales = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        let (exponent, mantissa) = (bits as u32 >> 3 & 15, bits as u32 & 7);
        scales[bits] = match exponent {
            _ if bits == 0x7F => 0.0,
            // Steps of 2^-10.
            0 => mantissa as f32 / 1024.0,
            // (1 + mantissa / 8) * 2^(exponent - 8)
            _ => f32::from_bits((exponent + 127 - 8) << 23 | mantissa << 20),
        };
        bits += 1;
    }
    scales
};
