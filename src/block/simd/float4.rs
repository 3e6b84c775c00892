//! MXFP4 and NVFP4: weights take the place of the thresholds they pass, codes look up their value
//! in a register.

use super::kernels::{from_nibbles, nibbles};
use super::{Decode, Encode, mxfp4, nvfp4};
use crate::block::{decode_pairs, encode_pairs};
use core::arch::x86_64::*;

/// Weights of MXFP4 from here on, and NaN, are left to the portable code.
const LIMIT: f32 = f32::from_bits((127 + 100) << 23);
/// The same of NVFP4: still far below 2^23 steps of the largest scale.
const LARGEST: f32 = 65536.0;

/// Twice the values of codes.
#[inline(always)]
unsafe fn values(codes: __m256i) -> __m256i {
    let table = _mm_loadu_si128(mxfp4::DOUBLED.as_ptr().cast());
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes)
}

#[inline(always)]
pub(super) unsafe fn encode_mxfp4<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<mxfp4::Block, 32>(src, dst) {
        let v = V::load(x);
        let (low, high) = v.abs().max_halves();
        let amax = if high > low { high } else { low };
        // NaN is in the half that it makes the largest; no power of two overflows.
        if !(low < LIMIT && high < LIMIT) {
            mxfp4::encode_block(x, block);
            continue;
        }
        block.e = mxfp4::exponent(amax);
        // Zeros are below any threshold, and those of e = 0 slow to work out.
        let d = if amax == 0.0 { 1.0 } else { mxfp4::half_scale(block.e) };
        block.qs = nibbles(v.between(d, d));
    }
}

#[inline(always)]
pub(super) unsafe fn decode_mxfp4<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<mxfp4::Block, 32>(src, dst) {
        V::from_i8(values(from_nibbles(&block.qs))).mul(mxfp4::half_scale(block.e)).store(y);
    }
}

#[inline(always)]
pub(super) unsafe fn encode_nvfp4<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<nvfp4::Block, 64>(src, dst) {
        let mut ordinary = true;
        for (i, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let v = V::load(x);
            let (low, high) = v.abs().max_halves();
            let (e, f) = (nvfp4::ue4m3(low / 6.0), nvfp4::ue4m3(high / 6.0));
            // The largest scale takes what is larger still; nothing passes the thresholds of 0.
            ordinary &= low < LARGEST && high < LARGEST;
            let unit = [nvfp4::half_scale(e), nvfp4::half_scale(f)];
            let unit = unit.map(|d| if d == 0.0 { f32::INFINITY } else { d });
            // A group's eight low halves, then its eight high halves.
            let codes = _mm256_permute4x64_epi64(v.between(unit[0], unit[1]), 0b11_01_10_00);
            block.d[2 * i..][..2].copy_from_slice(&[e, f]);
            block.qs[16 * i..][..16].copy_from_slice(&nibbles(codes));
        }
        if !ordinary {
            nvfp4::encode_block(x, block);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn decode_nvfp4<V: Decode>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<nvfp4::Block, 64>(src, dst) {
        let halves = block.qs.as_chunks::<16>().0.iter().zip(block.d.as_chunks::<2>().0);
        for (y, (qs, d)) in y.as_chunks_mut::<32>().0.iter_mut().zip(halves) {
            // Two groups: a group's eight low halves, then its eight high halves.
            let both = _mm256_permute4x64_epi64(from_nibbles(qs), 0b11_01_10_00);
            let (low, high) = (nvfp4::half_scale(d[0]), nvfp4::half_scale(d[1]));
            V::from_i8(values(both)).mul_halves([low, high]).store(y);
        }
    }
}
