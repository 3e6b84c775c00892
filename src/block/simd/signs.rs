//! Q1_0 and Q2_0: codes of one and two bits, placed one weight after the other.

use super::kernels::{f16, f32, from_bits, is_ordinary};
use super::{Decode, Encode, q1_0, q2_0};
use crate::block::cast::inverse;
use crate::block::{decode_pairs, encode_pairs};
use core::arch::x86_64::*;

/// The sums of eight blocks, each in its own order: lane `k` for block `k`.
#[inline(always)]
unsafe fn sums(x: &[[f32; 128]; 8]) -> [f32; 8] {
    let p = x.as_ptr().cast::<f32>();
    let mut sums = _mm256_setzero_ps();
    for i in (0..128).step_by(4) {
        // Four weights of each block, then turned: block 0 and 4, 1 and 5, ... in the halves.
        let mut pairs = [_mm256_setzero_ps(); 4];
        for (k, pair) in pairs.iter_mut().enumerate() {
            let (low, high) = (_mm_loadu_ps(p.add(128 * k + i)), _mm_loadu_ps(p.add(128 * (k + 4) + i)));
            *pair = _mm256_andnot_ps(_mm256_set1_ps(-0.0), _mm256_set_m128(high, low));
        }
        let [a, b, c, d] = pairs;
        let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        sums = _mm256_add_ps(sums, _mm256_shuffle_ps(ab_low, cd_low, 0b01_00_01_00));
        sums = _mm256_add_ps(sums, _mm256_shuffle_ps(ab_low, cd_low, 0b11_10_11_10));
        sums = _mm256_add_ps(sums, _mm256_shuffle_ps(ab_high, cd_high, 0b01_00_01_00));
        sums = _mm256_add_ps(sums, _mm256_shuffle_ps(ab_high, cd_high, 0b11_10_11_10));
    }
    let mut lanes = [0.0; 8];
    _mm256_storeu_ps(lanes.as_mut_ptr(), sums);
    lanes
}

#[inline(always)]
pub(super) unsafe fn encode_q1_0<V: Encode>(src: &[f32], dst: &mut [u8]) {
    let (x, rest) = src.as_chunks::<128>().0.as_chunks::<8>();
    let (blocks, rest_blocks) = bytemuck::cast_slice_mut::<u8, q1_0::Block>(dst).as_chunks_mut::<8>();
    for (x, blocks) in x.iter().zip(blocks) {
        let sums = sums(x);
        for k in 0..8 {
            if sums[k].is_nan() {
                q1_0::encode_block(&x[k], &mut blocks[k]);
                continue;
            }
            blocks[k].d = f16(sums[k] / 128.0);
            for (byte, x) in blocks[k].qs.iter_mut().zip(x[k].as_chunks::<8>().0) {
                let x = _mm256_loadu_ps(x.as_ptr());
                *byte = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x, _mm256_setzero_ps())) as u8;
            }
        }
    }
    for (x, block) in rest.iter().zip(rest_blocks) {
        q1_0::encode_block(x, block);
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q1_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q1_0::Block, 128>(src, dst) {
        let d = f32(block.d);
        for (qs, y) in block.qs.as_chunks::<4>().0.iter().zip(y.as_chunks_mut::<32>().0) {
            // 1 where the bit is set, else -1.
            let set = _mm256_and_si256(from_bits(qs), _mm256_set1_epi8(2));
            V::from_i8(_mm256_sub_epi8(set, _mm256_set1_epi8(1))).mul(d).store(y);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn encode_q2_0<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<q2_0::Block, 64>(src, dst) {
        let halves = x.as_chunks::<32>().0;
        let d = V::load(&halves[0]).abs().max(V::load(&halves[1]).abs()).reduce_max();
        if !is_ordinary(d) {
            q2_0::encode_block(x, block);
            continue;
        }
        let id = inverse(d);
        block.d = f16(d);
        for (qs, x) in block.qs.as_chunks_mut::<8>().0.iter_mut().zip(halves) {
            let codes = _mm256_add_epi8(V::load(x).mul(id).round(), _mm256_set1_epi8(1));
            // Two codes to the lower byte of 16 bits, then four to that of 32.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401));
            let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001));
            let bytes = _mm256_packus_epi32(fours, fours);
            let bytes = _mm256_packus_epi16(bytes, bytes);
            let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
            *qs = _mm_cvtsi128_si64(_mm_unpacklo_epi32(low, high)).to_le_bytes();
        }
    }
}

#[inline(always)]
pub(super) unsafe fn decode_q2_0<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<q2_0::Block, 64>(src, dst) {
        let d = f32(block.d);
        for (qs, y) in block.qs.as_chunks::<8>().0.iter().zip(y.as_chunks_mut::<32>().0) {
            // A byte to each 32 bits, its halves to each 16, its codes to each 8.
            let q = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*qs)));
            let q = _mm256_and_si256(_mm256_or_si256(q, _mm256_slli_epi32(q, 12)), _mm256_set1_epi16(15));
            let q = _mm256_and_si256(_mm256_or_si256(q, _mm256_slli_epi16(q, 6)), _mm256_set1_epi8(3));
            V::from_i8(_mm256_sub_epi8(q, _mm256_set1_epi8(1))).mul(d).store(y);
        }
    }
}
