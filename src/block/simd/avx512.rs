//! 32 weights in two registers of AVX-512: decoding only, see `AVX512` in `mod.rs`.

use super::Decode;
use core::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx512([__m512; 2]);

#[inline(always)]
unsafe fn float(q: __m128i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q))
}

impl Decode for Avx512 {
    #[inline(always)]
    unsafe fn store(self, y: &mut [f32; 32]) {
        _mm512_storeu_ps(y.as_mut_ptr(), self.0[0]);
        _mm512_storeu_ps(y.as_mut_ptr().add(16), self.0[1]);
    }

    #[inline(always)]
    unsafe fn load_f16(x: &[u8; 64]) -> Self {
        let p = x.as_ptr().cast::<__m256i>();
        Self([_mm512_cvtph_ps(_mm256_loadu_si256(p)), _mm512_cvtph_ps(_mm256_loadu_si256(p.add(1)))])
    }

    #[inline(always)]
    unsafe fn from_i8(q: __m256i) -> Self {
        Self([float(_mm256_castsi256_si128(q)), float(_mm256_extracti128_si256(q, 1))])
    }

    #[inline(always)]
    unsafe fn mul(self, s: f32) -> Self {
        let s = _mm512_set1_ps(s);
        Self([_mm512_mul_ps(self.0[0], s), _mm512_mul_ps(self.0[1], s)])
    }

    #[inline(always)]
    unsafe fn add(self, s: f32) -> Self {
        let s = _mm512_set1_ps(s);
        Self([_mm512_add_ps(self.0[0], s), _mm512_add_ps(self.0[1], s)])
    }

    #[inline(always)]
    unsafe fn mul_halves(self, s: [f32; 2]) -> Self {
        Self([_mm512_mul_ps(self.0[0], _mm512_set1_ps(s[0])), _mm512_mul_ps(self.0[1], _mm512_set1_ps(s[1]))])
    }

    #[inline(always)]
    unsafe fn add_halves(self, s: [f32; 2]) -> Self {
        Self([_mm512_add_ps(self.0[0], _mm512_set1_ps(s[0])), _mm512_add_ps(self.0[1], _mm512_set1_ps(s[1]))])
    }
}
