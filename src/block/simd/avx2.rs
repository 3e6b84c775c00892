//! 32 weights in four registers of AVX2.

use super::{Decode, Encode};
use core::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 4]);

/// The same expression for each of the four registers.
macro_rules! each {
    ($lanes:expr, $v:ident => $result:expr) => {{
        let [a, b, c, d] = $lanes.0;
        Avx2([each!(a, $v, $result), each!(b, $v, $result), each!(c, $v, $result), each!(d, $v, $result)])
    }};
    ($register:ident, $v:ident, $result:expr) => {{
        let $v = $register;
        $result
    }};
}

/// The lower half of a register combined with the upper, then again, down to one lane.
macro_rules! reduce {
    ($v:expr, $op:path) => {{
        let v = $v;
        let v = $op(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = $op(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32($op(v, _mm_movehdup_ps(v)))
    }};
}

/// The larger of non-negative numbers: their bits are in their order, NaN above all.
#[inline(always)]
unsafe fn max(a: __m256, b: __m256) -> __m256 {
    _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
}

/// As [`max`].
#[inline(always)]
unsafe fn max_128(a: __m128, b: __m128) -> __m128 {
    _mm_castsi128_ps(_mm_max_epi32(_mm_castps_si128(a), _mm_castps_si128(b)))
}

#[inline(always)]
unsafe fn float(q: __m128i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))
}

impl Decode for Avx2 {
    #[inline(always)]
    unsafe fn store(self, y: &mut [f32; 32]) {
        let p = y.as_mut_ptr();
        _mm256_storeu_ps(p, self.0[0]);
        _mm256_storeu_ps(p.add(8), self.0[1]);
        _mm256_storeu_ps(p.add(16), self.0[2]);
        _mm256_storeu_ps(p.add(24), self.0[3]);
    }

    #[inline(always)]
    unsafe fn load_f16(x: &[u8; 64]) -> Self {
        let p = x.as_ptr().cast::<__m128i>();
        Self([
            _mm256_cvtph_ps(_mm_loadu_si128(p)),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(2))),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(3))),
        ])
    }

    #[inline(always)]
    unsafe fn from_i8(q: __m256i) -> Self {
        let (low, high) = (_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        Self([float(low), float(_mm_srli_si128(low, 8)), float(high), float(_mm_srli_si128(high, 8))])
    }

    #[inline(always)]
    unsafe fn mul(self, s: f32) -> Self {
        each!(self, v => _mm256_mul_ps(v, _mm256_set1_ps(s)))
    }

    #[inline(always)]
    unsafe fn add(self, s: f32) -> Self {
        each!(self, v => _mm256_add_ps(v, _mm256_set1_ps(s)))
    }

    #[inline(always)]
    unsafe fn mul_halves(self, s: [f32; 2]) -> Self {
        let ([a, b, c, d], s) = (self.0, [_mm256_set1_ps(s[0]), _mm256_set1_ps(s[1])]);
        Self([_mm256_mul_ps(a, s[0]), _mm256_mul_ps(b, s[0]), _mm256_mul_ps(c, s[1]), _mm256_mul_ps(d, s[1])])
    }

    #[inline(always)]
    unsafe fn add_halves(self, s: [f32; 2]) -> Self {
        let ([a, b, c, d], s) = (self.0, [_mm256_set1_ps(s[0]), _mm256_set1_ps(s[1])]);
        Self([_mm256_add_ps(a, s[0]), _mm256_add_ps(b, s[0]), _mm256_add_ps(c, s[1]), _mm256_add_ps(d, s[1])])
    }
}

impl Encode for Avx2 {
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
    unsafe fn store_f16(self, y: &mut [u8; 64]) {
        let p = y.as_mut_ptr().cast::<__m128i>();
        _mm_storeu_si128(p, _mm256_cvtps_ph(self.0[0], _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(p.add(1), _mm256_cvtps_ph(self.0[1], _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(p.add(2), _mm256_cvtps_ph(self.0[2], _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(p.add(3), _mm256_cvtps_ph(self.0[3], _MM_FROUND_TO_NEAREST_INT));
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        each!(self, v => _mm256_andnot_ps(_mm256_set1_ps(-0.0), v))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        let (a, b) = (self.0, other.0);
        Self([max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    }

    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        reduce!(max(max(self.0[0], self.0[1]), max(self.0[2], self.0[3])), max_128)
    }

    #[inline(always)]
    unsafe fn max_halves(self) -> (f32, f32) {
        let [a, b, c, d] = self.0;
        (reduce!(max(a, b), max_128), reduce!(max(c, d), max_128))
    }

    #[inline(always)]
    unsafe fn between(self, low: f32, high: f32) -> __m256i {
        let units = [low, low, high, high];
        let mut codes = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let a = _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0[i]);
            // Bit 3 of 28 bits further up is the sign.
            let sign = _mm256_srli_epi32(_mm256_castps_si256(self.0[i]), 28);
            codes[i] = _mm256_and_si256(sign, _mm256_set1_epi32(8));
            for place in [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0] {
                let passed = _mm256_cmp_ps::<_CMP_GT_OQ>(a, _mm256_set1_ps(place * units[i]));
                codes[i] = _mm256_sub_epi32(codes[i], _mm256_castps_si256(passed));
            }
        }
        let ab = _mm256_packs_epi32(codes[0], codes[1]);
        let cd = _mm256_packs_epi32(codes[2], codes[3]);
        let codes = in_order(_mm256_packs_epi16(ab, cd));
        // Nothing has code 8, -0.
        _mm256_andnot_si256(_mm256_cmpeq_epi8(codes, _mm256_set1_epi8(8)), codes)
    }

    #[inline(always)]
    unsafe fn min_max(self) -> (f32, f32) {
        // Where an operand is NaN the second one is the result.
        let (mut min, mut max) = (_mm256_set1_ps(f32::MAX), _mm256_set1_ps(-f32::MAX));
        for v in self.0 {
            min = _mm256_min_ps(v, min);
            max = _mm256_max_ps(v, max);
        }
        (reduce!(min, _mm_min_ps), reduce!(max, _mm_max_ps))
    }

    #[inline(always)]
    unsafe fn eq(self, s: f32) -> u32 {
        let equal = each!(self, v => _mm256_cmp_ps::<_CMP_EQ_OQ>(v, _mm256_set1_ps(s)));
        let mut mask = 0;
        for (i, v) in equal.0.into_iter().enumerate() {
            mask |= (_mm256_movemask_ps(v) as u32) << (8 * i);
        }
        mask
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
        let [a, b, c, d] = each!(self, v => _mm256_add_ps(v, _mm256_or_ps(_mm256_and_ps(v, sign), half))).0;
        let ab = _mm256_packs_epi32(_mm256_cvttps_epi32(a), _mm256_cvttps_epi32(b));
        let cd = _mm256_packs_epi32(_mm256_cvttps_epi32(c), _mm256_cvttps_epi32(d));
        in_order(_mm256_packs_epi16(ab, cd))
    }
}

/// Undoes the interleaving of two rounds of packing within halves.
#[inline(always)]
unsafe fn in_order(v: __m256i) -> __m256i {
    _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}
