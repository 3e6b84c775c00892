//! MXFP4 and NVFP4: the portable encoders compiled for wider registers, decoding with the values
//! looked up in a register.

use super::kernels::from_nibbles;
use super::{Decode, Encode, mxfp4, nvfp4};
use crate::block::{decode_pairs, encode_pairs};
use core::arch::x86_64::*;

/// Twice the values of codes.
#[inline(always)]
unsafe fn values(codes: __m256i) -> __m256i {
    let table = _mm_loadu_si128(mxfp4::DOUBLED.as_ptr().cast());
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes)
}

#[inline(always)]
pub(super) unsafe fn encode_mxfp4<V: Encode>(src: &[f32], dst: &mut [u8]) {
    for (x, block) in encode_pairs::<mxfp4::Block, 32>(src, dst) {
        mxfp4::encode_block(x, block);
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
        nvfp4::encode_block(x, block);
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
