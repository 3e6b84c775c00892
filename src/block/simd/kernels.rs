//! The algorithms, once for all implementations of [`Decode`] and [`Encode`].
//!
//! Loops, not closures: a closure does not inherit the features of the function that it is inlined
//! into, and intrinsics then become calls, forty times slower.

use super::{Decode, Encode, float, q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0};
use crate::block::cast::inverse;
use crate::block::{decode_pairs, encode_pairs};
use core::arch::x86_64::*;

/// Whether a block whose largest magnitude (or range) is `m` can take the fast path: with no NaN,
/// nothing infinite, and scales whose inverses are normal numbers.
#[inline(always)]
pub(super) fn is_ordinary(m: f32) -> bool {
    const LEAST: f32 = f32::from_bits((127 - 100) << 23);
    m == 0.0 || (LEAST..f32::INFINITY).contains(&m)
}

#[inline(always)]
pub(super) unsafe fn f16(d: f32) -> [u8; 2] {
    let half = _mm_cvtps_ph(_mm_set_ss(d), _MM_FROUND_TO_NEAREST_INT);
    (_mm_cvtsi128_si32(half) as u16).to_le_bytes()
}

#[inline(always)]
pub(super) unsafe fn f32(half: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(half)))))
}

#[inline(always)]
pub(super) unsafe fn load(bytes: &[u8; 32]) -> __m256i {
    _mm256_loadu_si256(bytes.as_ptr().cast())
}

#[inline(always)]
unsafe fn store(bytes: &mut [u8; 32], v: __m256i) {
    _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v);
}

/// The weight farthest from zero, the first among equals; its magnitude is `amax`.
#[inline(always)]
unsafe fn extreme<V: Encode>(x: &[f32; 32], magnitudes: V, amax: f32) -> f32 {
    let first = magnitudes.eq(amax).trailing_zeros() as usize & 31;
    // Adding +0 turns -0, the case of a zero block, into +0.
    x[first] + 0.0
}

/// Least weight with the right sign should it be zero, and the range.
#[inline(always)]
unsafe fn min_range<V: Encode>(x: &[f32; 32], v: V) -> (f32, f32) {
    let (min, max) = v.min_max();
    let first_zero = if min == 0.0 { v.eq(0.0).trailing_zeros() as usize & 31 } else { 32 };
    (x.get(first_zero).copied().unwrap_or(min), max - min)
}

/// Codes of 4 bits in 32 bytes, two to a byte: `j` low, `j + 16` high.
#[inline(always)]
pub(super) unsafe fn nibbles(q: __m256i) -> [u8; 16] {
    let (low, high) = (_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    let mask = _mm_set1_epi8(15);
    let both = _mm_or_si128(_mm_and_si128(low, mask), _mm_slli_epi16(_mm_and_si128(high, mask), 4));
    let mut bytes = [0; 16];
    _mm_storeu_si128(bytes.as_mut_ptr().cast(), both);
    bytes
}

/// The inverse of [`nibbles`].
#[inline(always)]
pub(super) unsafe fn from_nibbles(qs: &[u8; 16]) -> __m256i {
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
    _mm256_and_si256(from_bits(qh), _mm256_set1_epi8(16))
}

/// All bits in each byte whose bit is set.
#[inline(always)]
pub(super) unsafe fn from_bits(qh: &[u8; 4]) -> __m256i {
    let word = _mm256_set1_epi32(i32::from_le_bytes(*qh));
    let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(word, byte), bit), bit)
}

/// Blocks that are encoded side by side: each step of a block waits for the step before, the steps
/// of several fill the gaps. Measured: 1.0 to 1.3 times as fast as one by one.
const GROUP: usize = 4;

/// Makes the encoder of a row out of a kernel that encodes the `G` blocks of a group, or says that
/// one of them is not ordinary.
macro_rules! in_groups {
    ($name:ident, $kernel:ident, $module:ident) => {
        #[inline(always)]
        pub(super) unsafe fn $name<V: Encode>(src: &[f32], dst: &mut [u8]) {
            let blocks = bytemuck::cast_slice_mut::<u8, $module::Block>(dst);
            let (x, rest) = src.as_chunks::<32>().0.as_chunks::<GROUP>();
            let (blocks, rest_blocks) = blocks.as_chunks_mut::<GROUP>();
            for (x, blocks) in x.iter().zip(blocks) {
                if !$kernel::<V, GROUP>(x, blocks) {
                    for (x, block) in x.iter().zip(blocks) {
                        $module::encode_block(x, block);
                    }
                }
            }
            for (x, block) in rest.iter().zip(rest_blocks) {
                if !$kernel::<V, 1>(std::array::from_ref(x), std::array::from_mut(block)) {
                    $module::encode_block(x, block);
                }
            }
        }
    };
}

in_groups!(encode_q8_0, group_q8_0, q8_0);
in_groups!(encode_q4_0, group_q4_0, q4_0);
in_groups!(encode_q5_0, group_q5_0, q5_0);
in_groups!(encode_q4_1, group_q4_1, q4_1);
in_groups!(encode_q5_1, group_q5_1, q5_1);

/// The largest magnitude of each block, and whether all are ordinary.
#[inline(always)]
unsafe fn magnitudes<V: Encode, const G: usize>(x: &[[f32; 32]; G]) -> ([f32; G], bool) {
    let mut amax = [0.0; G];
    let mut ordinary = true;
    for i in 0..G {
        amax[i] = V::load(&x[i]).abs().reduce_max();
        ordinary &= is_ordinary(amax[i]);
    }
    (amax, ordinary)
}

/// The weight farthest from zero of each block, and whether all blocks are ordinary.
#[inline(always)]
unsafe fn extremes<V: Encode, const G: usize>(x: &[[f32; 32]; G]) -> ([f32; G], bool) {
    let (mut amax, ordinary) = magnitudes::<V, G>(x);
    for i in 0..G {
        amax[i] = extreme(&x[i], V::load(&x[i]).abs(), amax[i]);
    }
    (amax, ordinary)
}

/// Minimum and range of each block, and whether all are ordinary.
#[inline(always)]
unsafe fn min_ranges<V: Encode, const G: usize>(x: &[[f32; 32]; G]) -> ([f32; G], [f32; G], bool) {
    let (mut min, mut range) = ([0.0; G], [0.0; G]);
    let mut ordinary = true;
    for i in 0..G {
        (min[i], range[i]) = min_range(&x[i], V::load(&x[i]));
        ordinary &= is_ordinary(range[i]);
    }
    (min, range, ordinary)
}

#[inline(always)]
unsafe fn group_q8_0<V: Encode, const G: usize>(x: &[[f32; 32]; G], blocks: &mut [q8_0::Block; G]) -> bool {
    let (amax, ordinary) = magnitudes::<V, G>(x);
    let d = amax.map(|amax| amax / 127.0);
    let id = d.map(inverse);
    for i in 0..G {
        blocks[i].d = f16(d[i]);
        store(bytemuck::cast_mut(&mut blocks[i].qs), V::load(&x[i]).mul(id[i]).round());
    }
    ordinary
}

#[inline(always)]
unsafe fn group_q4_0<V: Encode, const G: usize>(x: &[[f32; 32]; G], blocks: &mut [q4_0::Block; G]) -> bool {
    let (max, ordinary) = extremes::<V, G>(x);
    let d = max.map(|max| max / -8.0);
    let id = d.map(inverse);
    for i in 0..G {
        let q = V::load(&x[i]).mul(id[i]).add(8.5).truncate();
        blocks[i].d = f16(d[i]);
        blocks[i].qs = nibbles(_mm256_min_epu8(q, _mm256_set1_epi8(15)));
    }
    ordinary
}

#[inline(always)]
unsafe fn group_q5_0<V: Encode, const G: usize>(x: &[[f32; 32]; G], blocks: &mut [q5_0::Block; G]) -> bool {
    let (max, ordinary) = extremes::<V, G>(x);
    let d = max.map(|max| max / -16.0);
    let id = d.map(inverse);
    for i in 0..G {
        let q = V::load(&x[i]).mul(id[i]).add(16.5).truncate();
        let q = _mm256_min_epu8(q, _mm256_set1_epi8(31));
        blocks[i] = q5_0::Block { d: f16(d[i]), qh: fifth_bits(q), qs: nibbles(q) };
    }
    ordinary
}

#[inline(always)]
unsafe fn group_q4_1<V: Encode, const G: usize>(x: &[[f32; 32]; G], blocks: &mut [q4_1::Block; G]) -> bool {
    let (min, range, ordinary) = min_ranges::<V, G>(x);
    let d = range.map(|range| range / 15.0);
    let id = d.map(inverse);
    for i in 0..G {
        let q = V::load(&x[i]).add(-min[i]).mul(id[i]).add(0.5).truncate();
        blocks[i] = q4_1::Block { d: f16(d[i]), m: f16(min[i]), qs: nibbles(q) };
    }
    ordinary
}

#[inline(always)]
unsafe fn group_q5_1<V: Encode, const G: usize>(x: &[[f32; 32]; G], blocks: &mut [q5_1::Block; G]) -> bool {
    let (min, range, ordinary) = min_ranges::<V, G>(x);
    let d = range.map(|range| range / 31.0);
    let id = d.map(inverse);
    for i in 0..G {
        let q = V::load(&x[i]).add(-min[i]).mul(id[i]).add(0.5).truncate();
        blocks[i] = q5_1::Block { d: f16(d[i]), m: f16(min[i]), qh: fifth_bits(q), qs: nibbles(q) };
    }
    ordinary
}

#[inline(always)]
pub(super) unsafe fn decode_q8_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q8_0::Block, 32>(src, dst) {
        V::from_i8(load(bytemuck::cast_ref(&block.qs))).mul(f32(block.d)).store(y);
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q4_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q4_0::Block, 32>(src, dst) {
        let q = _mm256_sub_epi8(from_nibbles(&block.qs), _mm256_set1_epi8(8));
        V::from_i8(q).mul(f32(block.d)).store(y);
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q5_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q5_0::Block, 32>(src, dst) {
        let q = _mm256_or_si256(from_nibbles(&block.qs), from_fifth_bits(&block.qh));
        V::from_i8(_mm256_sub_epi8(q, _mm256_set1_epi8(16))).mul(f32(block.d)).store(y);
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q4_1<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q4_1::Block, 32>(src, dst) {
        V::from_i8(from_nibbles(&block.qs)).mul(f32(block.d)).add(f32(block.m)).store(y);
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q5_1<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q5_1::Block, 32>(src, dst) {
        let q = _mm256_or_si256(from_nibbles(&block.qs), from_fifth_bits(&block.qh));
        V::from_i8(q).mul(f32(block.d)).add(f32(block.m)).store(y);
    }
}

/// The codes 0, 1, 2 of 256 weights in groups of 32, and the scale; `None` where the portable
/// code must do it.
#[inline(always)]
unsafe fn ternary<V: Encode>(x: &[f32; 256]) -> Option<([__m256i; 8], f32)> {
    let groups = x.as_chunks::<32>().0;
    let mut largest = V::load(&[0.0; 32]);
    for group in groups {
        largest = largest.max(V::load(group).abs());
    }
    let d = largest.reduce_max();
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
pub(super) unsafe fn encode_tq2_0<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<tq2_0::Block, 256>(src, dst) {
        let Some((codes, d)) = ternary::<V>(x) else {
            tq2_0::encode_block(x, block);
            continue;
        };
        block.d = f16(d);
        for (qs, c) in block.qs.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
            // Codes are at most 2: shifts within 16 bits do not reach the next byte.
            let low = _mm256_or_si256(c[0], _mm256_slli_epi16(c[1], 2));
            let high = _mm256_or_si256(_mm256_slli_epi16(c[2], 4), _mm256_slli_epi16(c[3], 6));
            store(qs, _mm256_or_si256(low, high));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn decode_tq2_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<tq2_0::Block, 256>(src, dst) {
        let d = f32(block.d);
        for (qs, y) in block.qs.as_chunks::<32>().0.iter().zip(y.as_chunks_mut::<128>().0) {
            let mut q = load(qs);
            for y in y.as_chunks_mut::<32>().0 {
                let code = _mm256_and_si256(q, _mm256_set1_epi8(3));
                V::from_i8(_mm256_sub_epi8(code, _mm256_set1_epi8(1))).mul(d).store(y);
                q = _mm256_srli_epi16(q, 2);
            }
        }
    }
}

/// Each byte times 3, modulo 256.
#[inline(always)]
unsafe fn times_3(q: __m256i) -> __m256i {
    _mm256_add_epi8(q, _mm256_add_epi8(q, q))
}

/// [`tq1_0::fraction`] of each byte, for numbers below 243, widened to 16 bits.
#[inline(always)]
unsafe fn wide_fractions(q: __m128i) -> __m256i {
    // 256 n / 243 = n + 13 n / 243; the quotient, rounded up, by a multiplication with
    // 2^27 / (16 * 243).
    let n = _mm256_cvtepu8_epi16(q);
    let sum = _mm256_add_epi16(_mm256_mullo_epi16(n, _mm256_set1_epi16(13)), _mm256_set1_epi16(242));
    let product = _mm256_mulhi_epu16(_mm256_slli_epi16(sum, 4), _mm256_set1_epi16(34522u16 as i16));
    _mm256_add_epi16(n, _mm256_srli_epi16(product, 11))
}

/// [`tq1_0::fraction`] of each byte, for numbers below 243.
#[inline(always)]
unsafe fn fractions(q: __m256i) -> __m256i {
    let low = wide_fractions(_mm256_castsi256_si128(q));
    let high = wide_fractions(_mm256_extracti128_si256(q, 1));
    _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0b11_01_10_00)
}

/// The numbers whose base-3 digits these are, the first digit the most significant.
#[inline(always)]
unsafe fn number(digits: [__m256i; 5]) -> __m256i {
    let mut number = digits[0];
    for digit in &digits[1..] {
        number = _mm256_add_epi8(times_3(number), *digit);
    }
    number
}

#[inline(always)]
pub(super) unsafe fn encode_tq1_0<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<tq1_0::Block, 256>(src, dst) {
        let Some((c, d)) = ternary::<V>(x) else {
            tq1_0::encode_block(x, block);
            continue;
        };
        block.d = f16(d);
        let first = fractions(number([c[0], c[1], c[2], c[3], c[4]]));
        // Lower halves: the digits of the next 16 bytes, a half of a group each. Upper halves:
        // the digits of the last four bytes, moved down from the last half; 0 after them.
        let last = _mm256_extracti128_si256(c[7], 1);
        let second = fractions(number([
            _mm256_inserti128_si256(c[5], last, 1),
            _mm256_set_m128i(_mm_srli_si128(last, 4), _mm256_extracti128_si256(c[5], 1)),
            _mm256_inserti128_si256(c[6], _mm_srli_si128(last, 8), 1),
            _mm256_set_m128i(_mm_srli_si128(last, 12), _mm256_extracti128_si256(c[6], 1)),
            _mm256_inserti128_si256(c[7], _mm_setzero_si128(), 1),
        ]));
        let qs = block.qs.as_mut_ptr();
        _mm256_storeu_si256(qs.cast(), first);
        _mm_storeu_si128(qs.add(32).cast(), _mm256_castsi256_si128(second));
        block.qh = _mm_cvtsi128_si32(_mm256_extracti128_si256(second, 1)).to_le_bytes();
    }
}

/// The base-3 digit at the top of each byte, less 1: the upper byte of `3 q` counts how many
/// thirds of 256 `q` has passed.
#[inline(always)]
unsafe fn top_digit(q: __m256i) -> __m256i {
    // -1 where passed.
    let one_third = _mm256_cmpeq_epi8(_mm256_max_epu8(q, _mm256_set1_epi8(86)), q);
    let two_thirds = _mm256_cmpeq_epi8(_mm256_max_epu8(q, _mm256_set1_epi8(171u8 as i8)), q);
    _mm256_sub_epi8(_mm256_set1_epi8(-1), _mm256_add_epi8(one_third, two_thirds))
}

#[inline(always)]
pub(super) unsafe fn decode_tq1_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<tq1_0::Block, 256>(src, dst) {
        let d = f32(block.d);
        let (first, second) = y.as_chunks_mut::<32>().0.split_at_mut(5);
        let qs = block.qs.as_ptr();
        let mut q = _mm256_loadu_si256(qs.cast());
        for y in first {
            V::from_i8(top_digit(q)).mul(d).store(y);
            q = times_3(q);
        }
        // Lower halves: 16 bytes with five digits; upper halves: 4 bytes with four. The digits
        // make six halves of groups.
        let word = _mm_cvtsi32_si128(i32::from_le_bytes(block.qh));
        let mut q = _mm256_set_m128i(word, _mm_loadu_si128(qs.add(32).cast()));
        let mut halves = [_mm_setzero_si128(); 6];
        let mut last = [0; 5];
        for i in 0..5 {
            let digit = top_digit(q);
            halves[i] = _mm256_castsi256_si128(digit);
            last[i] = _mm_cvtsi128_si32(_mm256_extracti128_si256(digit, 1));
            q = times_3(q);
        }
        halves[5] = _mm_setr_epi32(last[0], last[1], last[2], last[3]);
        for (half, y) in halves.as_chunks::<2>().0.iter().zip(second) {
            V::from_i8(_mm256_set_m128i(half[1], half[0])).mul(d).store(y);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn encode_f16<V: Encode>(src: &[f32], dst: &mut [u8]) {
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
pub(super) unsafe fn decode_f16<V: Decode>(src: &[u8], dst: &mut [f32]) {
    let (chunks, rest) = dst.as_chunks_mut::<32>();
    let (bytes, rest_bytes) = src.as_chunks::<64>();
    for (y, bytes) in chunks.iter_mut().zip(bytes) {
        V::load_f16(bytes).store(y);
    }
    float::decode_f16(rest_bytes, rest);
}

/// The portable loop again: with the features enabled the compiler makes vectors of it.
#[inline(always)]
pub(super) unsafe fn encode_bf16<V: Encode>(src: &[f32], dst: &mut [u8]) {
    float::encode_bf16(src, dst);
}

/// As [`encode_bf16`].
#[inline(always)]
pub(super) unsafe fn decode_bf16<V: Decode>(src: &[u8], dst: &mut [f32]) {
    float::decode_bf16(src, dst);
}
