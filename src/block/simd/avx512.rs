//! 32 weights in two registers of AVX-512.

use super::Lanes;
use core::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx512([__m512; 2]);

#[inline(always)]
unsafe fn max_bits(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

/// The lower half combined with the upper, then again, down to one lane.
macro_rules! reduce {
    ($v:expr, $op256:expr, $op:expr) => {{
        let v = $op256(_mm512_castps512_ps256($v), _mm512_extractf32x8_ps($v, 1));
        let v = $op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = $op(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32($op(v, _mm_movehdup_ps(v)))
    }};
}

impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn load(x: &[f32; 32]) -> Self {
        Self([_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))])
    }

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
    unsafe fn store_f16(self, y: &mut [u8; 64]) {
        let p = y.as_mut_ptr().cast::<__m256i>();
        _mm256_storeu_si256(p, _mm512_cvtps_ph(self.0[0], _MM_FROUND_TO_NEAREST_INT));
        _mm256_storeu_si256(p.add(1), _mm512_cvtps_ph(self.0[1], _MM_FROUND_TO_NEAREST_INT));
    }

    #[inline(always)]
    unsafe fn from_i8(q: __m256i) -> Self {
        let float = |q| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
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
    unsafe fn abs(self) -> Self {
        Self([_mm512_abs_ps(self.0[0]), _mm512_abs_ps(self.0[1])])
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self([max_bits(self.0[0], other.0[0]), max_bits(self.0[1], other.0[1])])
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        let max256 = |a, b| _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
        let max = |a, b| _mm_castsi128_ps(_mm_max_epi32(_mm_castps_si128(a), _mm_castps_si128(b)));
        reduce!(max_bits(self.0[0], self.0[1]), max256, max)
    }

    #[inline(always)]
    unsafe fn min_max(self) -> (f32, f32) {
        // Where an operand is NaN the second one is the result.
        let [a, b] = self.0;
        let min = _mm512_min_ps(b, _mm512_min_ps(a, _mm512_set1_ps(f32::MAX)));
        let max = _mm512_max_ps(b, _mm512_max_ps(a, _mm512_set1_ps(-f32::MAX)));
        (
            reduce!(min, |a, b| _mm256_min_ps(a, b), |a, b| _mm_min_ps(a, b)),
            reduce!(max, |a, b| _mm256_max_ps(a, b), |a, b| _mm_max_ps(a, b)),
        )
    }

    #[inline(always)]
    unsafe fn eq(self, s: f32) -> u32 {
        let s = _mm512_set1_ps(s);
        let mask = |v| u32::from(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(v, s));
        mask(self.0[0]) | mask(self.0[1]) << 16
    }

    #[inline(always)]
    unsafe fn truncate(self) -> __m256i {
        bytes(_mm512_cvttps_epi32(self.0[0]), _mm512_cvttps_epi32(self.0[1]))
    }

    #[inline(always)]
    unsafe fn round(self) -> __m256i {
        // Just below 1/2, with the lane's sign: the sum reaches the next integer exactly when the
        // fraction is 1/2 or more.
        let half = _mm512_set1_ps(0.5f32.next_down());
        let sign = _mm512_set1_ps(-0.0);
        let round = |v| _mm512_cvttps_epi32(_mm512_add_ps(v, _mm512_or_ps(_mm512_and_ps(v, sign), half)));
        bytes(round(self.0[0]), round(self.0[1]))
    }
}

/// The low byte of each lane.
#[inline(always)]
unsafe fn bytes(a: __m512i, b: __m512i) -> __m256i {
    _mm256_set_m128i(_mm512_cvtepi32_epi8(b), _mm512_cvtepi32_epi8(a))
}
