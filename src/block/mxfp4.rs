//! MXFP4: 32 weights in 17 bytes, a power of two as scale, codes that are floats of 4 bits.

use super::cast::{extreme, truncate};
use super::{Codec, decode_pairs, encode_pairs};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale `2^(e - 127)` (E8M0).
    pub e: u8,
    /// Codes: weight `j` in the low half of byte `j`, weight `j + 16` in the high half. A weight
    /// is half the scale times `DOUBLED[code]`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::MXFP4.type_size());

/// Twice the values of E2M1 (OCP Microscaling Formats 1.0): sign, two bits of exponent, one of
/// mantissa.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::MXFP4,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

/// The exponent is that of the largest weight less 2, so that it lies from 4 to 8 scales; what
/// does not fit E8M0 keeps its low byte.
fn encode_block(x: &[f32; 32], block: &mut Block) {
    let amax = extreme(x).abs();
    // In f64 and rounded once: what a log2 for f32 gives, just below a power of two too.
    let log2 = f64::from(amax).log2() as f32;
    block.e = if amax > 0.0 { truncate(log2.floor() - 2.0 + 127.0) as u8 } else { 0 };
    quantize(x, half_scale(block.e), &mut block.qs);
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    dequantize(&block.qs, half_scale(block.e), y);
}

/// `2^(e - 128)`, subnormal for the two least exponents.
fn half_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Codes of the values nearest to `x`, the first in [`DOUBLED`] of equally near ones; 0 for
/// NaN. The first half of the weights goes to the low halves
/// of the bytes.
pub(super) fn quantize<const N: usize>(x: &[f32; N], d: f32, qs: &mut [u8]) {
    let mut codes = [0; N];
    let mut errors = x.map(|x| (f32::from(DOUBLED[0]) * d - x).abs());
    for (code, value) in (1..).zip(&DOUBLED[1..]) {
        let value = f32::from(*value) * d;
        for ((x, least), best) in x.iter().zip(&mut errors).zip(&mut codes) {
            let error = (value - x).abs();
            (*least, *best) = if error < *least { (error, code) } else { (*least, *best) };
        }
    }
    let (low, high) = codes.split_at(N / 2);
    for (byte, (low, high)) in qs.iter_mut().zip(low.iter().zip(high)) {
        *byte = low | high << 4;
    }
}

/// The inverse, for as many weights as `y` holds.
pub(super) fn dequantize(qs: &[u8], d: f32, y: &mut [f32]) {
    let (low, high) = y.split_at_mut(y.len() / 2);
    for (byte, (low, high)) in qs.iter().zip(low.iter_mut().zip(high)) {
        *low = f32::from(DOUBLED[usize::from(byte & 15)]) * d;
        *high = f32::from(DOUBLED[usize::from(byte >> 4)]) * d;
    }
}
