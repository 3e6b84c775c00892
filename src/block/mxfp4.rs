//! MXFP4: 32 weights in 17 bytes, a power of two as scale, codes that are floats of 4 bits.

use super::cast::{magnitude, truncate};
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
pub(super) const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::MXFP4,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

/// How many of the numbers just below a power of two have a logarithm that rounds up to it, by
/// the exponent field of these numbers.
///
/// `log2(2^t - n ulp)` lacks `n 2^-24 / ln 2` to `t`. Where the neighbours of `t` are 2^(p - 23)
/// away, it rounds to `t` up to n = 2^p ln 2.
const ROUNDED_UP: [u8; 255] = {
    let mut counts = [0; 255];
    let mut field = 1;
    while field < 255 {
        let t = field as i32 - 126;
        // Logarithms of numbers below 2^t lie on the side of 0 for t above 0, beyond t below it.
        let p = if t > 1 {
            (t - 1).ilog2()
        } else if t < 0 {
            (-t).ilog2()
        } else {
            0
        };
        counts[field] = [0, 1, 2, 5, 11, 22, 44][p as usize];
        field += 1;
    }
    counts
};

/// The exponent is that of the largest weight less 2, so that it lies from 4 to 8 scales; what
/// does not fit E8M0 keeps its low byte. It is the exponent in a logarithm rounded to f32: of
/// numbers just below a power of two that of the power.
#[inline(always)]
pub(super) fn exponent(amax: f32) -> u8 {
    let field = amax.to_bits() >> 23;
    match field {
        0 | 255 if amax > 0.0 => {
            let log2 = f64::from(amax).log2() as f32;
            truncate(log2.floor() - 2.0 + 127.0) as u8
        }
        0 | 255 => 0,
        _ => ((amax.to_bits() + u32::from(ROUNDED_UP[field as usize])) >> 23).wrapping_sub(2) as u8,
    }
}

pub(super) fn encode_block(x: &[f32; 32], block: &mut Block) {
    let amax = magnitude(x);
    block.e = exponent(amax);
    quantize(x, amax, half_scale(block.e), &mut block.qs);
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    dequantize(&block.qs, half_scale(block.e), y);
}

/// `2^(e - 128)`, subnormal for the two least exponents.
#[inline(always)]
pub(super) fn half_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// Codes of the values nearest to `x`, the first in [`DOUBLED`] of equally near ones, by
/// differences rounded to f32; 0 for NaN. `amax` is the largest magnitude. The first half of the
/// weights goes to the low halves of the bytes.
#[inline(always)]
pub(super) fn quantize<const N: usize>(x: &[f32; N], amax: f32, d: f32, qs: &mut [u8]) {
    let mut codes = [0; N];
    // Weights that differ from a value by 2^23 of its steps and more are equally far from all;
    // above 2^124 values are infinite.
    if amax < d * 2f32.powi(20) && d < 2f32.powi(100) {
        between(x, d, &mut codes);
    } else if d > 0.0 {
        nearest(x, d, &mut codes);
    }
    for j in 0..N / 2 {
        qs[j] = codes[j] | codes[j + N / 2] << 4;
    }
}

/// Codes by the places half way between two values. These are exact, and so are the differences
/// from a weight to its two neighbours `a` and `b` (both are at least half of `b`, or `a` is 0 and
/// the weight at least `b / 2`, or `a` wins without). Farther values stay farther when rounded,
/// those of the other sign lose to 0. Of equally near ones the smaller comes first.
#[inline(always)]
fn between<const N: usize>(x: &[f32; N], d: f32, codes: &mut [u8; N]) {
    let [t1, t2, t3, t4, t5, t6, t7] = [0.5 * d, 1.5 * d, 2.5 * d, 3.5 * d, 5.0 * d, 7.0 * d, 10.0 * d];
    for j in 0..N {
        let a = x[j].abs();
        let low = u32::from(a > t1) + u32::from(a > t2) + u32::from(a > t3) + u32::from(a > t4);
        let code = low + u32::from(a > t5) + u32::from(a > t6) + u32::from(a > t7);
        // Nothing has code 8, -0.
        let sign = (x[j].to_bits() >> 28 & 8) & u32::from(code != 0).wrapping_neg();
        codes[j] = (code | sign) as u8;
    }
}

/// Codes by the distances themselves.
fn nearest<const N: usize>(x: &[f32; N], d: f32, codes: &mut [u8; N]) {
    let mut errors = x.map(|x| (f32::from(DOUBLED[0]) * d - x).abs());
    for (code, value) in (1..).zip(&DOUBLED[1..]) {
        let value = f32::from(*value) * d;
        for ((x, least), best) in x.iter().zip(&mut errors).zip(&mut *codes) {
            let error = (value - x).abs();
            (*least, *best) = if error < *least { (error, code) } else { (*least, *best) };
        }
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
