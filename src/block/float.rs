//! The element types F32, F16, BF16 and F64, and the conversions between them.
//!
//! A NaN stays a NaN of the same sign: as F16 it becomes the canonical quiet one (payload
//! dropped), as BF16 it keeps its upper payload bits and is made quiet. Sources: ggml's
//! `ggml_compute_fp32_to_fp16`, `ggml_compute_fp32_to_bf16` and their inverses (`ggml-impl.h`).

use super::Codec;
use super::cast::round_up;
use crate::tensor::DType;

/// F32: the weights themselves, little endian.
pub(super) const F32: Codec = Codec {
    dtype: DType::F32,
    implementation: "scalar",
    encode: Some(|src, dst| {
        for (bytes, x) in dst.as_chunks_mut().0.iter_mut().zip(src) {
            *bytes = x.to_le_bytes();
        }
    }),
    weigh: None,
    decode: |src, dst| {
        for (y, bytes) in dst.iter_mut().zip(src.as_chunks().0) {
            *y = f32::from_le_bytes(*bytes);
        }
    },
    bound: Some(|_| 0.0),
};

/// F64: exact for every weight; reading rounds to the nearest f32.
pub(super) const F64: Codec = Codec {
    dtype: DType::F64,
    encode: Some(|src, dst| {
        for (bytes, &x) in dst.as_chunks_mut().0.iter_mut().zip(src) {
            *bytes = f64::from(x).to_le_bytes();
        }
    }),
    decode: |src, dst| {
        for (y, bytes) in dst.iter_mut().zip(src.as_chunks().0) {
            *y = f64::from_le_bytes(*bytes) as f32;
        }
    },
    ..F32
};

/// F16: IEEE half precision.
pub(super) const F16: Codec = Codec {
    dtype: DType::F16,
    encode: Some(encode_f16),
    decode: decode_f16,
    bound: Some(|x| match x {
        // Half a unit in the last of 11 bits, or half the least subnormal.
        [x] if x.abs() < 65520.0 => round_up((f64::from(x.abs()) / 2048.0).max(2f64.powi(-25))),
        _ => f32::INFINITY,
    }),
    ..F32
};

/// BF16: the upper half of an f32.
pub(super) const BF16: Codec = Codec {
    dtype: DType::BF16,
    encode: Some(encode_bf16),
    decode: decode_bf16,
    bound: Some(|x| match x {
        // Half a unit in the last of 8 bits, or half the least subnormal; what rounds up past
        // the largest finite number is infinite.
        [x] if bf16_from_f32(x.abs()) < 0x7F80 => round_up((f64::from(x.abs()) / 256.0).max(2f64.powi(-134))),
        _ => f32::INFINITY,
    }),
    ..F32
};

#[inline(always)]
pub(super) fn encode_f16(src: &[f32], dst: &mut [u8]) {
    for (bytes, &x) in dst.as_chunks_mut().0.iter_mut().zip(src) {
        *bytes = f16_from_f32(x).to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn decode_f16(src: &[u8], dst: &mut [f32]) {
    for (y, bytes) in dst.iter_mut().zip(src.as_chunks().0) {
        *y = f32_from_f16(u16::from_le_bytes(*bytes));
    }
}

#[inline(always)]
pub(super) fn encode_bf16(src: &[f32], dst: &mut [u8]) {
    for (bytes, &x) in dst.as_chunks_mut().0.iter_mut().zip(src) {
        *bytes = bf16_from_f32(x).to_le_bytes();
    }
}

#[inline(always)]
pub(super) fn decode_bf16(src: &[u8], dst: &mut [f32]) {
    for (y, bytes) in dst.iter_mut().zip(src.as_chunks().0) {
        *y = f32_from_bf16(u16::from_le_bytes(*bytes));
    }
}

/// Rounds to the nearest BF16, ties to even; a NaN is made quiet.
#[inline(always)]
pub fn bf16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let even = (bits >> 16) & 1;
    let rounded = bits.wrapping_add(0x7FFF + even) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// The value of a BF16: exact; a NaN keeps its bits.
#[inline(always)]
pub fn f32_from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to the nearest half, ties to even; a NaN becomes `0x7E00` with its sign.
#[inline(always)]
pub fn f16_from_f32(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let half = if magnitude > 0x7F80_0000 {
        0x7E00
    } else if magnitude >= 0x477F_F000 {
        // 65520 and above round to infinity.
        0x7C00
    } else if magnitude >= 0x3880_0000 {
        // Normal: move the bias from 127 to 15 and round off 13 bits.
        let even = (magnitude >> 13) & 1;
        (magnitude - (112 << 23) + 0xFFF + even) >> 13
    } else {
        // Subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits, correctly rounded.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
    };
    ((bits >> 16) & 0x8000) as u16 | half as u16
}

/// The value of a half: exact; a NaN keeps its payload and is made quiet.
#[inline(always)]
pub fn f32_from_f16(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let magnitude = u32::from(half & 0x7FFF);
    let bits = match magnitude {
        0x0000..0x0400 => (magnitude as f32 * 2f32.powi(-24)).to_bits(),
        0x0400..0x7C00 => (magnitude << 13) + (112 << 23),
        0x7C00 => 0x7F80_0000,
        _ => (magnitude << 13) | 0x7FC0_0000,
    };
    f32::from_bits(sign | bits)
}
