//! IQ1_S and IQ1_M: the portable search, which the compiler makes vectors of, but for look-ups by
//! codes of 2 bits.

use super::kernels;
use crate::block::grid::Candidates;
use crate::block::iq1::{DOWN, Each, Means, UP, WORDS, Wide};
use crate::block::{Codec, decode_pairs, iq1_m, iq1_s};
use core::arch::x86_64::*;

/// The means of AVX2 and of AVX-512.
struct Avx2;
struct Avx512;

macro_rules! means {
    ($means:ident, $wide:ty, $nearest:ident) => {
        impl Means for $means {
            type Wide = $wide;

            #[inline(always)]
            fn nearest(near: &[Candidates], terms: &[[f32; 4]; 8]) -> u16 {
                // SAFETY: used by the tables below only, with AVX2.
                unsafe { $nearest(near, terms) }
            }
        }
    };
}
means!(Avx2, Pair, nearest);
means!(Avx512, __m512, nearest_of_pairs);

#[derive(Clone, Copy)]
struct Pair(__m256, __m256);

/// Methods of [`Wide`], each an expression of registers.
macro_rules! wide {
    ($mask:ty, $($name:ident($($arg:tt)*) -> $result:ty { $body:expr })*) => {
        type Mask = $mask;

        $(#[inline(always)]
        fn $name($($arg)*) -> $result {
            // SAFETY: used by the tables below only, with the features; a load or store is of an
            // array of 16 numbers.
            unsafe { $body }
        })*
    };
}

impl Wide for __m512 {
    wide! {
        __mmask16,
        load(x: &Each) -> Self { _mm512_loadu_ps(x.as_ptr()) }
        splat(x: f32) -> Self { _mm512_set1_ps(x) }
        add(self, b: Self) -> Self { _mm512_add_ps(self, b) }
        sub(self, b: Self) -> Self { _mm512_sub_ps(self, b) }
        mul(self, b: Self) -> Self { _mm512_mul_ps(self, b) }
        div(self, b: Self) -> Self { _mm512_div_ps(self, b) }
        no_more(self, b: Self) -> __mmask16 { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(self, b) }
        gains(l2: Self, a: Self, b: Self) -> __mmask16 {
            _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(l2, _mm512_setzero_ps()), a, b)
        }
        select(mask: __mmask16, yes: Self, no: Self) -> Self { _mm512_mask_mov_ps(no, mask, yes) }
        store(self) -> Each {{
            let mut x = [0.0; 16];
            _mm512_storeu_ps(x.as_mut_ptr(), self);
            x
        }}
    }
}

impl Wide for Pair {
    wide! {
        Pair,
        load(x: &Each) -> Self { Pair(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
        splat(x: f32) -> Self { Pair(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        add(self, b: Self) -> Self { Pair(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
        sub(self, b: Self) -> Self { Pair(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
        mul(self, b: Self) -> Self { Pair(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        div(self, b: Self) -> Self { Pair(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
        no_more(self, b: Self) -> Self {
            Pair(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, b.0), _mm256_cmp_ps::<_CMP_LE_OQ>(self.1, b.1))
        }
        gains(l2: Self, a: Self, b: Self) -> Self {
            Pair(gains(l2.0, a.0, b.0), gains(l2.1, a.1, b.1))
        }
        select(mask: Self, yes: Self, no: Self) -> Self {
            Pair(_mm256_blendv_ps(no.0, yes.0, mask.0), _mm256_blendv_ps(no.1, yes.1, mask.1))
        }
        store(self) -> Each {{
            let mut x = [0.0; 16];
            _mm256_storeu_ps(x.as_mut_ptr(), self.0);
            _mm256_storeu_ps(x.as_mut_ptr().add(8), self.1);
            x
        }}
    }
}

#[inline(always)]
unsafe fn gains(l2: __m256, a: __m256, b: __m256) -> __m256 {
    let positive = _mm256_cmp_ps::<_CMP_GT_OQ>(l2, _mm256_setzero_ps());
    _mm256_and_ps(positive, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
}

/// Candidates side by side, terms looked up by their codes.
#[inline(always)]
unsafe fn nearest(near: &[Candidates], terms: &[[f32; 4]; 8]) -> u16 {
    let mut least = _mm256_set1_ps(f32::MAX);
    let mut place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mut places = place;
    for candidates in near {
        let mut codes = _mm256_cvtepu16_epi32(_mm_loadu_si128(candidates.as_ptr().cast()));
        let mut sum = _mm256_setzero_ps();
        for term in terms {
            let term = _mm256_broadcast_ps(&_mm_loadu_ps(term.as_ptr()));
            sum = _mm256_add_ps(sum, _mm256_permutevar_ps(term, codes));
            codes = _mm256_srli_epi32(codes, 2);
        }
        let less = _mm256_cmp_ps::<_CMP_LT_OQ>(sum, least);
        least = _mm256_blendv_ps(least, sum, less);
        places = _mm256_blendv_epi8(places, place, _mm256_castps_si256(less));
        place = _mm256_add_epi32(place, _mm256_set1_epi32(8));
    }
    near.as_flattened()[first(least, places)]
}

/// As [`nearest`], two eights at a time.
#[inline(always)]
unsafe fn nearest_of_pairs(near: &[Candidates], terms: &[[f32; 4]; 8]) -> u16 {
    let mut least = _mm512_set1_ps(f32::MAX);
    let mut place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let mut places = place;
    for candidates in near.chunks(2) {
        let first = _mm_loadu_si128(candidates[0].as_ptr().cast());
        // Without a second, the first again: it is not less.
        let second = _mm_loadu_si128(candidates[candidates.len() - 1].as_ptr().cast());
        let mut codes = _mm512_cvtepu16_epi32(_mm256_set_m128i(second, first));
        let mut sum = _mm512_setzero_ps();
        for term in terms {
            let term = _mm512_broadcast_f32x4(_mm_loadu_ps(term.as_ptr()));
            sum = _mm512_add_ps(sum, _mm512_permutevar_ps(term, codes));
            codes = _mm512_srli_epi32(codes, 2);
        }
        let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(sum, least);
        least = _mm512_mask_mov_ps(least, less, sum);
        places = _mm512_mask_mov_epi32(places, less, place);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    let (low, high) = (_mm512_castps512_ps256(least), _mm512_extractf32x8_ps(least, 1));
    let (low_places, high_places) = (_mm512_castsi512_si256(places), _mm512_extracti64x4_epi64(places, 1));
    // The upper lane's, where it is less, or as little and earlier.
    let less = _mm256_cmp_ps_mask::<_CMP_LT_OQ>(high, low);
    let equal = _mm256_cmp_ps_mask::<_CMP_EQ_OQ>(high, low);
    let takes = less | equal & _mm256_cmplt_epi32_mask(high_places, low_places);
    let least = _mm256_mask_mov_ps(low, takes, high);
    let places = _mm256_mask_mov_epi32(low_places, takes, high_places);
    near.as_flattened()[first(least, places)]
}

/// The first of equals: the least place among the lanes with the least sum.
#[inline(always)]
unsafe fn first(least: __m256, places: __m256i) -> usize {
    let mut all = _mm256_min_ps(least, _mm256_permute2f128_ps(least, least, 1));
    all = _mm256_min_ps(all, _mm256_permute_ps(all, 0b01_00_11_10));
    all = _mm256_min_ps(all, _mm256_permute_ps(all, 0b10_11_00_01));
    let others = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NEQ_UQ>(least, all));
    // All ones, as an unsigned number, is behind every place.
    let places = _mm256_or_si256(places, others);
    let place = _mm_min_epu32(_mm256_castsi256_si128(places), _mm256_extracti128_si256(places, 1));
    let place = _mm_min_epu32(place, _mm_shuffle_epi32(place, 0b01_00_11_10));
    let place = _mm_min_epu32(place, _mm_shuffle_epi32(place, 0b10_11_00_01));
    _mm_cvtsi128_si32(place) as usize
}

/// The points' words, ready to be broadcast.
static WIDE: [i32; 2048] = {
    let mut wide = [0; 2048];
    let mut n = 0;
    while n < wide.len() {
        wide[n] = WORDS[n] as i32;
        n += 1;
    }
    wide
};

/// What the codes of eight weights mean: `d` by the shifted levels.
#[inline(always)]
unsafe fn levels(d: f32, down: bool) -> __m256 {
    let [a, b, c] = if down { DOWN } else { UP };
    let levels = _mm_mul_ps(_mm_setr_ps(a, b, c, c), _mm_set1_ps(d));
    _mm256_set_m128(levels, levels)
}

#[inline(always)]
unsafe fn decode_eight(point: u16, levels: __m256, y: &mut [f32; 8]) {
    let word = _mm256_set1_epi32(WIDE[usize::from(point & 2047)]);
    let codes = _mm256_srlv_epi32(word, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    _mm256_storeu_ps(y.as_mut_ptr(), _mm256_permutevar_ps(levels, codes));
}

#[inline(always)]
unsafe fn decode_s(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<iq1_s::Block, 256>(src, dst) {
        let d = kernels::f32(block.d);
        for (g, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let high = u16::from_le_bytes(block.qh[g]);
            let levels = levels(d * f32::from(2 * (high >> 12 & 7) + 1), high >> 15 != 0);
            for (n, y) in y.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                decode_eight(u16::from(block.qs[4 * g + n]) | (high >> (3 * n) & 7) << 8, levels, y);
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_m(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<iq1_m::Block, 256>(src, dst) {
        let (d, scales) = block.scales();
        let d = kernels::f32(d.to_le_bytes());
        for (g, y) in y.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let d = d * f32::from(2 * (scales[g / 4] >> (3 * (g % 4)) & 7) + 1);
            let high = u16::from(block.qh[g]);
            let [first, second] = [levels(d, high & 8 != 0), levels(d, high & 128 != 0)];
            let y = y.as_chunks_mut::<8>().0;
            decode_eight(u16::from(block.qs[2 * g]) | (high & 7) << 8, first, &mut y[0]);
            decode_eight(u16::from(block.qs[2 * g + 1]) | (high >> 4 & 7) << 8, second, &mut y[1]);
        }
    }
}

macro_rules! table {
    ($table:ident, $name:literal, $features:literal, $means:ty) => {
        pub(super) static $table: &[Codec] = {
            #[target_feature(enable = $features)]
            unsafe fn encode_s(row: &[f32], importance: &[f32], dst: &mut [u8]) {
                iq1_s::encode::<$means>(row, importance, dst);
            }
            #[target_feature(enable = $features)]
            unsafe fn encode_m(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
                iq1_m::encode::<$means>(src, importance, dst);
            }
            // AVX-512's instructions make this slower: 0.85 of the speed.
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn run_s(src: &[u8], dst: &mut [f32]) {
                decode_s(src, dst);
            }
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn run_m(src: &[u8], dst: &mut [f32]) {
                decode_m(src, dst);
            }
            // SAFETY, of all: the table is handed out only after the features were detected.
            &[
                Codec {
                    implementation: $name,
                    // SAFETY: see above.
                    weigh: Some(|row, importance, dst| unsafe { encode_s(row, importance, dst) }),
                    // SAFETY: see above.
                    decode: |src, dst| unsafe { run_s(src, dst) },
                    ..iq1_s::SCALAR
                },
                Codec {
                    implementation: $name,
                    // SAFETY: see above.
                    encode: Some(|src, dst| unsafe { encode_m(src, None, dst) }),
                    // SAFETY: see above.
                    weigh: Some(|row, importance, dst| unsafe { encode_m(row, Some(importance), dst) }),
                    // SAFETY: see above.
                    decode: |src, dst| unsafe { run_m(src, dst) },
                    ..iq1_m::SCALAR
                },
            ]
        };
    };
}

table!(IQ1_AVX2, "avx2", "avx2,f16c", Avx2);
table!(IQ1_AVX512, "avx512", "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c", Avx512);
