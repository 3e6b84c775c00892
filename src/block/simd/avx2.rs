//! 32 weights in four registers of AVX2.

use super::Lanes;
use core::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 4]);

impl Avx2 {
    #[inline(always)]
    unsafe fn each(self, f: impl Fn(__m256) -> __m256) -> Self {
        Self([f(self.0[0]), f(self.0[1]), f(self.0[2]), f(self.0[3])])
    }
}

#[inline(always)]
unsafe fn max_bits(a: __m256, b: __m256) -> __m256 {
    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
}

#[inline(always)]
unsafe fn abs(v: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), v)
}

/// The lower half combined with the upper, then again, down to one lane.
macro_rules! reduce {
    ($v:expr, $op:expr) => {{
        let v = $op(_mm256_castps256_ps128($v), _mm256_extractf128_ps($v, 1));
        let v = $op(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32($op(v, _mm_movehdup_ps(v)))
    }};
}

impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn load(x: &[f32; 32]) -> Self {
        let p = x.as_ptr();
        Self([
            _mm256_loadu_ps(p),
            _mm256_loadu_ps(p.add(8)),
            _mm256_loadu_ps(p.add(16)),
            _mm256_loadu_ps(p.add(24)),
        ])
    }

    #[inline(always)]
    unsafe fn store(self, y: &mut [f32; 32]) {
        for (v, y) in self.0.into_iter().zip(y.as_chunks_mut::<8>().0) {
            _mm256_storeu_ps(y.as_mut_ptr(), v);
        }
    }

    #[inline(always)]
    unsafe fn load_f16(x: &[u8; 64]) -> Self {
        let p = x.as_ptr().cast::<__m128i>();
        let load = |i| _mm256_cvtph_ps(_mm_loadu_si128(p.add(i)));
        Self([load(0), load(1), load(2), load(3)])
    }

    #[inline(always)]
    unsafe fn store_f16(self, y: &mut [u8; 64]) {
        for (v, y) in self.0.into_iter().zip(y.as_chunks_mut::<16>().0) {
            _mm_storeu_si128(y.as_mut_ptr().cast(), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        }
    }

    #[inline(always)]
    unsafe fn from_i8(q: __m256i) -> Self {
        let (low, high) = (_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        let float = |q| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
        Self([float(low), float(_mm_srli_si128(low, 8)), float(high), float(_mm_srli_si128(high, 8))])
    }

    #[inline(always)]
    unsafe fn mul(self, s: f32) -> Self {
        self.each(|v| _mm256_mul_ps(v, _mm256_set1_ps(s)))
    }

    #[inline(always)]
    unsafe fn add(self, s: f32) -> Self {
        self.each(|v| _mm256_add_ps(v, _mm256_set1_ps(s)))
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        self.each(|v| abs(v))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        let (a, b) = (self.0, other.0);
        Self([max_bits(a[0], b[0]), max_bits(a[1], b[1]), max_bits(a[2], b[2]), max_bits(a[3], b[3])])
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        let v = max_bits(max_bits(self.0[0], self.0[1]), max_bits(self.0[2], self.0[3]));
        let max = |a, b| _mm_castsi128_ps(_mm_max_epi32(_mm_castps_si128(a), _mm_castps_si128(b)));
        reduce!(v, max)
    }

    #[inline(always)]
    unsafe fn min_max(self) -> (f32, f32) {
        // Where an operand is NaN the second one is the result.
        let [a, b, c, d] = self.0;
        let fold = |start: f32, op: unsafe fn(__m256, __m256) -> __m256| {
            op(d, op(c, op(b, op(a, _mm256_set1_ps(start)))))
        };
        let min = fold(f32::MAX, |a, b| _mm256_min_ps(a, b));
        let max = fold(-f32::MAX, |a, b| _mm256_max_ps(a, b));
        (reduce!(min, |a, b| _mm_min_ps(a, b)), reduce!(max, |a, b| _mm_max_ps(a, b)))
    }

    #[inline(always)]
    unsafe fn eq(self, s: f32) -> u32 {
        let s = _mm256_set1_ps(s);
        let mask = |v| _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(v, s)) as u32;
        mask(self.0[0]) | mask(self.0[1]) << 8 | mask(self.0[2]) << 16 | mask(self.0[3]) << 24
    }

    #[inline(always)]
    unsafe fn truncate(self) -> __m256i {
        let [a, b, c, d] = self.0;
        let ab = _mm256_packs_epi32(_mm256_cvttps_epi32(a), _mm256_cvttps_epi32(b));
        let cd = _mm256_packs_epi32(_mm256_cvttps_epi32(c), _mm256_cvttps_epi32(d));
        in_order(_mm256_packus_epi16(ab, cd))
    }

    #[inline(always)]
    unsafe fn round(self) -> __m256i {
        // Just below 1/2, with the lane's sign: the sum reaches the next integer exactly when the
        // fraction is 1/2 or more.
        let half = _mm256_set1_ps(0.5f32.next_down());
        let sign = _mm256_set1_ps(-0.0);
        let round = |v| _mm256_cvttps_epi32(_mm256_add_ps(v, _mm256_or_ps(_mm256_and_ps(v, sign), half)));
        let [a, b, c, d] = self.0;
        let ab = _mm256_packs_epi32(round(a), round(b));
        let cd = _mm256_packs_epi32(round(c), round(d));
        in_order(_mm256_packs_epi16(ab, cd))
    }
}

/// Undoes the interleaving of two rounds of packing within halves.
#[inline(always)]
unsafe fn in_order(v: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}
