//! The K types: the portable encoders compiled for wider registers, and decoders of their own.

use super::kernels::{f32, load};
use super::{Decode, avx2, avx512};
use crate::block::{Codec, decode_pairs, q2_k, q3_k, q4_k, q5_k, q6_k};
use core::arch::x86_64::*;

/// The low bits of each byte.
#[inline(always)]
unsafe fn low(q: __m256i, mask: i8) -> __m256i {
    _mm256_and_si256(q, _mm256_set1_epi8(mask))
}

/// Codes less what zero is coded as.
#[inline(always)]
unsafe fn around(half: i8, q: __m256i) -> __m256i {
    _mm256_sub_epi8(q, _mm256_set1_epi8(half))
}

#[inline(always)]
unsafe fn decode_q2_k<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q2_k::Block, 256>(src, dst) {
        let (d, dmin) = (f32(block.d), f32(block.dmin));
        let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
        for g in 0..16 {
            scales[g] = d * f32::from(block.scales[g] & 15);
            mins[g] = -(dmin * f32::from(block.scales[g] >> 4));
        }
        let groups = scales.as_chunks::<8>().0.iter().zip(mins.as_chunks::<8>().0);
        let halves = block.qs.as_chunks().0.iter().zip(y.as_chunks_mut::<128>().0);
        for ((qs, y), (scales, mins)) in halves.zip(groups) {
            let mut q = load(qs);
            for n in 0..4 {
                let (s, m) = ([scales[2 * n], scales[2 * n + 1]], [mins[2 * n], mins[2 * n + 1]]);
                V::from_i8(low(q, 3)).mul_halves(s).add_halves(m).store(&mut y.as_chunks_mut().0[n]);
                // Shifts of 16 bits: what comes from the next byte lies above the mask.
                q = _mm256_srli_epi16(q, 2);
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_q3_k<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q3_k::Block, 256>(src, dst) {
        let d = f32(block.d);
        let codes = q3_k::unpack_scales(&block.scales);
        let mut scales = [0.0; 16];
        for g in 0..16 {
            scales[g] = d * f32::from(codes[g] as i8 - 32);
        }
        let mut high = load(&block.hmask);
        let halves = block.qs.as_chunks().0.iter().zip(y.as_chunks_mut::<128>().0);
        for ((qs, y), scales) in halves.zip(scales.as_chunks::<8>().0) {
            let mut q = load(qs);
            for n in 0..4 {
                let code = _mm256_or_si256(low(q, 3), _mm256_slli_epi16(low(high, 1), 2));
                let s = [scales[2 * n], scales[2 * n + 1]];
                V::from_i8(around(4, code)).mul_halves(s).store(&mut y.as_chunks_mut().0[n]);
                (q, high) = (_mm256_srli_epi16(q, 2), _mm256_srli_epi16(high, 1));
            }
        }
    }
}

/// Scales and minima, the latter with their signs turned.
#[inline(always)]
unsafe fn lines(stored: &q4_k::Scales) -> [(f32, f32); 8] {
    let (d, dmin) = (f32(stored.d), f32(stored.dmin));
    let (scales, mins) = q4_k::unpack(&stored.packed);
    let mut lines = [(0.0, 0.0); 8];
    for g in 0..8 {
        lines[g] = (d * f32::from(scales[g]), -(dmin * f32::from(mins[g])));
    }
    lines
}

#[inline(always)]
unsafe fn decode_q4_k<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q4_k::Block, 256>(src, dst) {
        let lines = lines(&block.scales);
        for n in 0..4 {
            let q = load(&block.qs.as_chunks().0[n]);
            for (i, q) in [q, _mm256_srli_epi16(q, 4)].into_iter().enumerate() {
                let (scale, min) = lines[2 * n + i];
                V::from_i8(low(q, 15)).mul(scale).add(min).store(&mut y.as_chunks_mut().0[2 * n + i]);
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_q5_k<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q5_k::Block, 256>(src, dst) {
        let lines = lines(&block.scales);
        let mut high = load(&block.qh);
        for n in 0..4 {
            let q = load(&block.qs.as_chunks().0[n]);
            for (i, q) in [q, _mm256_srli_epi16(q, 4)].into_iter().enumerate() {
                let code = _mm256_or_si256(low(q, 15), _mm256_slli_epi16(low(high, 1), 4));
                let (scale, min) = lines[2 * n + i];
                V::from_i8(code).mul(scale).add(min).store(&mut y.as_chunks_mut().0[2 * n + i]);
                high = _mm256_srli_epi16(high, 1);
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_q6_k<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q6_k::Block, 256>(src, dst) {
        let d = f32(block.d);
        let mut scales = [0.0; 16];
        for (scale, code) in scales.iter_mut().zip(block.scales) {
            *scale = d * f32::from(code);
        }
        for half in 0..2 {
            let (a, b) =
                (load(&block.ql.as_chunks().0[2 * half]), load(&block.ql.as_chunks().0[2 * half + 1]));
            let mut high = load(&block.qh.as_chunks().0[half]);
            let fours = [a, b, _mm256_srli_epi16(a, 4), _mm256_srli_epi16(b, 4)];
            for (n, q) in fours.into_iter().enumerate() {
                let code = _mm256_or_si256(low(q, 15), _mm256_slli_epi16(low(high, 3), 4));
                let g = 8 * half + 2 * n;
                let s = [scales[g], scales[g + 1]];
                V::from_i8(around(32, code)).mul_halves(s).store(&mut y.as_chunks_mut().0[4 * half + n]);
                high = _mm256_srli_epi16(high, 2);
            }
        }
    }
}

/// A table of codecs: the portable functions compiled with the given features.
macro_rules! table {
    ($table:ident, $name:literal, $features:literal, decode $lanes:ty, groups $groups:literal) => {
        pub(super) static $table: &[Codec] = {
            macro_rules! row {
                ($module:ident, $decode:ident) => {
                    Codec {
                        implementation: $name,
                        encode: Some(|src, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], dst: &mut [u8]) {
                                $module::encode::<$groups>(src, None, dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, dst) }
                        }),
                        weigh: Some(|src, importance, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], importance: &[f32], dst: &mut [u8]) {
                                $module::encode::<$groups>(src, Some(importance), dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, importance, dst) }
                        }),
                        decode: |src, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[u8], dst: &mut [f32]) {
                                $decode::<$lanes>(src, dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, dst) }
                        },
                        ..$module::SCALAR
                    }
                };
            }
            &[
                row!(q2_k, decode_q2_k),
                row!(q3_k, decode_q3_k),
                row!(q4_k, decode_q4_k),
                row!(q5_k, decode_q5_k),
                row!(q6_k, decode_q6_k),
            ]
        };
    };
}

table!(AVX2, "avx2", "avx2,f16c", decode avx2::Avx2, groups 16);
table!(AVX512, "avx512", "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c", decode avx512::Avx512, groups 32);
