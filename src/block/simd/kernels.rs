//! The algorithms, once for all implementations of [`Lanes`].

use super::{Lanes, float, q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0};
use crate::block::cast::inverse;
use crate::block::{decode_blocks, encode_blocks};
use core::arch::x86_64::*;

/// Whether a block whose largest magnitude (or range) is `m` can take the fast path: with no NaN,
/// nothing infinite, and scales whose inverses are normal numbers.
#[inline(always)]
fn is_ordinary(m: f32) -> bool {
    const LEAST: f32 = f32::from_bits((127 - 100) << 23);
    m == 0.0 || (LEAST..f32::INFINITY).contains(&m)
}

#[inline(always)]
unsafe fn f16(d: f32) -> [u8; 2] {
    let half = _mm_cvtps_ph(_mm_set_ss(d), _MM_FROUND_TO_NEAREST_INT);
    (_mm_cvtsi128_si32(half) as u16).to_le_bytes()
}

#[inline(always)]
unsafe fn f32(half: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(half)))))
}

#[inline(always)]
unsafe fn load(bytes: &[u8; 32]) -> __m256i {
    _mm256_loadu_si256(bytes.as_ptr().cast())
}

#[inline(always)]
unsafe fn store(bytes: &mut [u8; 32], v: __m256i) {
    _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v);
}

/// The weight farthest from zero, the first among equals; its magnitude is `amax`.
#[inline(always)]
unsafe fn extreme<V: Lanes>(x: &[f32; 32], magnitudes: V, amax: f32) -> f32 {
    let first = magnitudes.eq(amax).trailing_zeros() as usize & 31;
    // Adding +0 turns -0, the case of a zero block, into +0.
    x[first] + 0.0
}

/// Least weight with the right sign should it be zero, and the range.
#[inline(always)]
unsafe fn min_range<V: Lanes>(x: &[f32; 32], v: V) -> (f32, f32) {
    let (min, max) = v.min_max();
    let first_zero = if min == 0.0 { v.eq(0.0).trailing_zeros() as usize & 31 } else { 32 };
    (x.get(first_zero).copied().unwrap_or(min), max - min)
}

/// Codes of 4 bits in 32 bytes, two to a byte: `j` low, `j + 16` high.
#[inline(always)]
unsafe fn nibbles(q: __m256i) -> [u8; 16] {
    let (low, high) = (_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    let mask = _mm_set1_epi8(15);
    let both = _mm_or_si128(_mm_and_si128(low, mask), _mm_slli_epi16(_mm_and_si128(high, mask), 4));
    let mut bytes = [0; 16];
    _mm_storeu_si128(bytes.as_mut_ptr().cast(), both);
    bytes
}

/// The inverse of [`nibbles`].
#[inline(always)]
unsafe fn from_nibbles(qs: &[u8; 16]) -> __m256i {
    let both = _mm_loadu_si128(qs.as_ptr().cast());
    _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15))
}

/// Bit 4 of each of 32 bytes.
#[inline(always)]
unsafe fn fifth_bits(q: __m256i) -> [u8; 4] {
    _mm256_movemask_epi8(_mm256_slli_epi16(q, 3)).to_le_bytes()
}

/// 16 in each byte whose bit is set.
#[inline(always)]
unsafe fn from_fifth_bits(qh: &[u8; 4]) -> __m256i {
    let word = _mm256_set1_epi32(i32::from_le_bytes(*qh));
    let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(word, byte), bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

#[inline(always)]
pub(super) unsafe fn encode_q8_0<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut q8_0::Block| {
        let v = V::load(x);
        let amax = v.abs().reduce_max();
        if !is_ordinary(amax) {
            return q8_0::encode_block(x, block);
        }
        let d = amax / 127.0;
        block.d = f16(d);
        store(bytemuck::cast_mut(&mut block.qs), v.mul(inverse(d)).round());
    });
}

#[inline(always)]
pub(super) unsafe fn decode_q8_0<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &q8_0::Block, y| {
        V::from_i8(load(bytemuck::cast_ref(&block.qs))).mul(f32(block.d)).store(y);
    });
}

#[inline(always)]
pub(super) unsafe fn encode_q4_0<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut q4_0::Block| {
        let v = V::load(x);
        let amax = v.abs().reduce_max();
        if !is_ordinary(amax) {
            return q4_0::encode_block(x, block);
        }
        let d = extreme(x, v.abs(), amax) / -8.0;
        block.d = f16(d);
        block.qs = nibbles(_mm256_min_epu8(v.mul(inverse(d)).add(8.5).truncate(), _mm256_set1_epi8(15)));
    });
}

#[inline(always)]
pub(super) unsafe fn decode_q4_0<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &q4_0::Block, y| {
        let q = _mm256_sub_epi8(from_nibbles(&block.qs), _mm256_set1_epi8(8));
        V::from_i8(q).mul(f32(block.d)).store(y);
    });
}

#[inline(always)]
pub(super) unsafe fn encode_q5_0<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut q5_0::Block| {
        let v = V::load(x);
        let amax = v.abs().reduce_max();
        if !is_ordinary(amax) {
            return q5_0::encode_block(x, block);
        }
        let d = extreme(x, v.abs(), amax) / -16.0;
        block.d = f16(d);
        let q = _mm256_min_epu8(v.mul(inverse(d)).add(16.5).truncate(), _mm256_set1_epi8(31));
        block.qh = fifth_bits(q);
        block.qs = nibbles(q);
    });
}

#[inline(always)]
pub(super) unsafe fn decode_q5_0<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &q5_0::Block, y| {
        let q = _mm256_or_si256(from_nibbles(&block.qs), from_fifth_bits(&block.qh));
        V::from_i8(_mm256_sub_epi8(q, _mm256_set1_epi8(16))).mul(f32(block.d)).store(y);
    });
}

#[inline(always)]
pub(super) unsafe fn encode_q4_1<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut q4_1::Block| {
        let v = V::load(x);
        let (min, range) = min_range(x, v);
        if !is_ordinary(range) {
            return q4_1::encode_block(x, block);
        }
        let d = range / 15.0;
        block.d = f16(d);
        block.m = f16(min);
        block.qs = nibbles(v.add(-min).mul(inverse(d)).add(0.5).truncate());
    });
}

#[inline(always)]
pub(super) unsafe fn decode_q4_1<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &q4_1::Block, y| {
        V::from_i8(from_nibbles(&block.qs)).mul(f32(block.d)).add(f32(block.m)).store(y);
    });
}

#[inline(always)]
pub(super) unsafe fn encode_q5_1<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut q5_1::Block| {
        let v = V::load(x);
        let (min, range) = min_range(x, v);
        if !is_ordinary(range) {
            return q5_1::encode_block(x, block);
        }
        let d = range / 31.0;
        block.d = f16(d);
        block.m = f16(min);
        let q = v.add(-min).mul(inverse(d)).add(0.5).truncate();
        block.qh = fifth_bits(q);
        block.qs = nibbles(q);
    });
}

#[inline(always)]
pub(super) unsafe fn decode_q5_1<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &q5_1::Block, y| {
        let q = _mm256_or_si256(from_nibbles(&block.qs), from_fifth_bits(&block.qh));
        V::from_i8(q).mul(f32(block.d)).add(f32(block.m)).store(y);
    });
}

/// The codes 0, 1, 2 of 256 weights in groups of 32, and the scale; `None` where the portable
/// code must do it.
#[inline(always)]
unsafe fn ternary<V: Lanes>(x: &[f32; 256]) -> Option<([__m256i; 8], f32)> {
    let groups = x.as_chunks::<32>().0;
    let max = |a: V, b: &[f32; 32]| a.max(V::load(b).abs());
    let d = groups.iter().fold(V::load(&[0.0; 32]), max).reduce_max();
    if !is_ordinary(d) {
        return None;
    }
    let id = inverse(d);
    let mut codes = [_mm256_setzero_si256(); 8];
    for (code, group) in codes.iter_mut().zip(groups) {
        *code = _mm256_add_epi8(V::load(group).mul(id).round(), _mm256_set1_epi8(1));
    }
    Some((codes, d))
}

#[inline(always)]
pub(super) unsafe fn encode_tq2_0<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut tq2_0::Block| {
        let Some((codes, d)) = ternary::<V>(x) else {
            return tq2_0::encode_block(x, block);
        };
        block.d = f16(d);
        for (qs, c) in block.qs.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
            // Codes are at most 2: shifts within 16 bits do not reach the next byte.
            let low = _mm256_or_si256(c[0], _mm256_slli_epi16(c[1], 2));
            let high = _mm256_or_si256(_mm256_slli_epi16(c[2], 4), _mm256_slli_epi16(c[3], 6));
            store(qs, _mm256_or_si256(low, high));
        }
    });
}

#[inline(always)]
pub(super) unsafe fn decode_tq2_0<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &tq2_0::Block, y: &mut [f32; 256]| {
        let d = f32(block.d);
        for (qs, y) in block.qs.as_chunks::<32>().0.iter().zip(y.as_chunks_mut::<128>().0) {
            let mut q = load(qs);
            for y in y.as_chunks_mut::<32>().0 {
                let code = _mm256_and_si256(q, _mm256_set1_epi8(3));
                V::from_i8(_mm256_sub_epi8(code, _mm256_set1_epi8(1))).mul(d).store(y);
                q = _mm256_srli_epi16(q, 2);
            }
        }
    });
}

/// Each byte times 3, modulo 256.
#[inline(always)]
unsafe fn times_3(q: __m256i) -> __m256i {
    _mm256_add_epi8(q, _mm256_add_epi8(q, q))
}

/// [`tq1_0::fraction`] of each byte, for numbers below 243.
#[inline(always)]
unsafe fn fractions(q: __m256i) -> __m256i {
    let fraction = |q: __m128i| {
        // 256 n / 243 = n + 13 n / 243; the quotient, rounded up, by a multiplication with
        // 2^27 / (16 * 243).
        let n = _mm256_cvtepu8_epi16(q);
        let sum = _mm256_add_epi16(_mm256_mullo_epi16(n, _mm256_set1_epi16(13)), _mm256_set1_epi16(242));
        let product = _mm256_mulhi_epu16(_mm256_slli_epi16(sum, 4), _mm256_set1_epi16(34522u16 as i16));
        _mm256_add_epi16(n, _mm256_srli_epi16(product, 11))
    };
    let (low, high) = (fraction(_mm256_castsi256_si128(q)), fraction(_mm256_extracti128_si256(q, 1)));
    _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0b11_01_10_00)
}

#[inline(always)]
pub(super) unsafe fn encode_tq1_0<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    encode_blocks(src, dst, |x, block: &mut tq1_0::Block| {
        let Some((c, d)) = ternary::<V>(x) else {
            return tq1_0::encode_block(x, block);
        };
        block.d = f16(d);
        // The next digit of a number: 3 n + digit.
        let push = |n, digit| _mm256_add_epi8(times_3(n), digit);
        let first = push(push(push(push(c[0], c[1]), c[2]), c[3]), c[4]);
        // 16 bytes and their five digits lie in the halves of three groups; the last half holds
        // the four digits of the last four bytes.
        let (low, high) = (|v| _mm256_castsi256_si128(v), |v| _mm256_extracti128_si256(v, 1));
        let digits = [low(c[5]), high(c[5]), low(c[6]), high(c[6]), low(c[7])].map(|v| _mm256_castsi128_si256(v));
        let last = high(c[7]);
        let mut n = _mm256_inserti128_si256(digits[0], last, 1);
        for (i, digit) in digits.into_iter().enumerate().skip(1) {
            let next = match i {
                1 => _mm_srli_si128(last, 4),
                2 => _mm_srli_si128(last, 8),
                3 => _mm_srli_si128(last, 12),
                _ => _mm_setzero_si128(),
            };
            n = push(n, _mm256_inserti128_si256(digit, next, 1));
        }
        let n = fractions(n);
        let (qs, rest) = block.qs.split_at_mut(32);
        if let (Some(qs), Some(rest)) = (qs.first_chunk_mut(), rest.first_chunk_mut::<16>()) {
            store(qs, fractions(first));
            _mm_storeu_si128(rest.as_mut_ptr().cast(), low(n));
        }
        block.qh = _mm_cvtsi128_si32(high(n)).to_le_bytes();
    });
}

#[inline(always)]
pub(super) unsafe fn decode_tq1_0<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    decode_blocks(src, dst, |block: &tq1_0::Block, y: &mut [f32; 256]| {
        let d = f32(block.d);
        // The digit at the top of each byte, less 1: the upper byte of 3 q counts how many of
        // 1/3 and 2/3 of 256 q has passed.
        let digit = |q: __m256i| {
            let at_least = |least: u8| {
                let least = _mm256_set1_epi8(least as i8);
                _mm256_cmpeq_epi8(_mm256_max_epu8(q, least), q)
            };
            let passed = _mm256_add_epi8(at_least(86), at_least(171));
            _mm256_sub_epi8(_mm256_set1_epi8(-1), passed)
        };
        let (groups, _) = y.as_chunks_mut::<32>();
        let Some(qs) = block.qs.first_chunk::<32>() else { return };
        let mut q = load(qs);
        for y in groups.iter_mut().take(5) {
            V::from_i8(digit(q)).mul(d).store(y);
            q = times_3(q);
        }
        // 16 bytes with five digits, 4 bytes with four: two halves to a group.
        let Some(rest) = block.qs.last_chunk::<16>() else { return };
        let mut halves = [_mm_setzero_si128(); 6];
        let word = _mm_cvtsi32_si128(i32::from_le_bytes(block.qh));
        let mut q = _mm256_set_m128i(word, _mm_loadu_si128(rest.as_ptr().cast()));
        let mut last = [0i32; 4];
        for (i, half) in halves.iter_mut().take(5).enumerate() {
            let digit = digit(q);
            *half = _mm256_castsi256_si128(digit);
            if let Some(last) = last.get_mut(i) {
                *last = _mm_cvtsi128_si32(_mm256_extracti128_si256(digit, 1));
            }
            q = times_3(q);
        }
        halves[5] = _mm_setr_epi32(last[0], last[1], last[2], last[3]);
        for (half, y) in halves.as_chunks::<2>().0.iter().zip(groups.iter_mut().skip(5)) {
            V::from_i8(_mm256_set_m128i(half[1], half[0])).mul(d).store(y);
        }
    });
}

#[inline(always)]
pub(super) unsafe fn encode_f16<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    let (chunks, rest) = src.as_chunks::<32>();
    let (bytes, rest_bytes) = dst.as_chunks_mut::<64>();
    for (x, bytes) in chunks.iter().zip(bytes) {
        let v = V::load(x);
        // NaN would keep its payload.
        if v.abs().reduce_max().is_nan() {
            float::encode_f16(x, bytes);
        } else {
            v.store_f16(bytes);
        }
    }
    float::encode_f16(rest, rest_bytes);
}

#[inline(always)]
pub(super) unsafe fn decode_f16<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    let (chunks, rest) = dst.as_chunks_mut::<32>();
    let (bytes, rest_bytes) = src.as_chunks::<64>();
    for (y, bytes) in chunks.iter_mut().zip(bytes) {
        V::load_f16(bytes).store(y);
    }
    float::decode_f16(rest_bytes, rest);
}

/// The portable loop again: with the features enabled the compiler makes vectors of it.
#[inline(always)]
pub(super) unsafe fn encode_bf16<V: Lanes>(src: &[f32], dst: &mut [u8]) {
    float::encode_bf16(src, dst);
}

/// As [`encode_bf16`].
#[inline(always)]
pub(super) unsafe fn decode_bf16<V: Lanes>(src: &[u8], dst: &mut [f32]) {
    float::decode_bf16(src, dst);
}
