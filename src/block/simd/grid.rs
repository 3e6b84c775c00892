//! IQ2 and IQ3: the portable search and decoders, compiled with more features; between points,
//! table look-ups in registers. AVX-512's gained nothing: the same code compiled with them reached
//! 0.85 of AVX2's speed.
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::Codec;
use crate::block::grid::Candidates;
use crate::block::grid_search::{Closest, Portable, margin};
use crate::block::{iq2_s, iq2_xs, iq2_xxs, iq3_s, iq3_xxs};
use core::arch::x86_64::*;

/// A weight has few codes, and the square of what each would cost is worked out once: a candidate's
/// distance is then a sum of look-ups, by codes that lie in the low bits of shifted words.
struct Lookup;

impl Closest for Lookup {
    #[inline(always)]
    fn closest<const D: usize>(
        near: &[Candidates],
        x: &[f32; D],
        root: &[f32; D],
        scales: [f32; 2],
        slack: f32,
    ) -> ([u16; 2], [bool; 2]) {
        // SAFETY: only functions of the tables below use this, which have the features.
        unsafe { closest(near, x, root, scales, slack) }
    }

    #[inline(always)]
    fn add<const D: usize, const A: usize>(
        words: &[u32; A],
        x: &[f32; D],
        weight: &[f32; D],
        xq: &mut [f32; A],
        q2: &mut [f32; A],
    ) {
        // SAFETY: only functions of the tables below use this, which have the features.
        unsafe { add(words, x, weight, xq, q2) }
    }
}

/// Twice the codes plus 1. A look-up takes three bits: where codes have two, the third is of the next
/// code.
#[inline(always)]
unsafe fn values<const D: usize>() -> __m256 {
    if D == 8 {
        _mm256_setr_ps(1.0, 3.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0)
    } else {
        _mm256_setr_ps(1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
    }
}

#[inline(always)]
unsafe fn add<const D: usize, const A: usize>(
    words: &[u32; A],
    x: &[f32; D],
    weight: &[f32; D],
    xq: &mut [f32; A],
    q2: &mut [f32; A],
) {
    let values = values::<D>();
    let (words, _) = words.as_chunks::<8>();
    let (xq, _) = xq.as_chunks_mut::<8>();
    let (q2, _) = q2.as_chunks_mut::<8>();
    for i in 0..D {
        let with_x = _mm256_mul_ps(_mm256_set1_ps(weight[i] * x[i]), values);
        let squared = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(weight[i]), values), values);
        for a in 0..A / 8 {
            let words = _mm256_loadu_si256(words[a].as_ptr().cast());
            let codes = if D == 8 {
                _mm256_srlv_epi32(words, _mm256_set1_epi32(2 * i as i32))
            } else {
                _mm256_srlv_epi32(words, _mm256_set1_epi32(3 * i as i32))
            };
            let sum = _mm256_add_ps(_mm256_loadu_ps(xq[a].as_ptr()), _mm256_permutevar8x32_ps(with_x, codes));
            _mm256_storeu_ps(xq[a].as_mut_ptr(), sum);
            let sum =
                _mm256_add_ps(_mm256_loadu_ps(q2[a].as_ptr()), _mm256_permutevar8x32_ps(squared, codes));
            _mm256_storeu_ps(q2[a].as_mut_ptr(), sum);
        }
    }
}

#[inline(always)]
unsafe fn closest<const D: usize>(
    near: &[Candidates],
    x: &[f32; D],
    root: &[f32; D],
    scales: [f32; 2],
    slack: f32,
) -> ([u16; 2], [bool; 2]) {
    let values = values::<D>();
    let mut costs = [[_mm256_setzero_ps(); D]; 2];
    for e in 0..2 {
        let scaled = _mm256_mul_ps(_mm256_set1_ps(scales[e]), values);
        for i in 0..D {
            let diff = _mm256_sub_ps(scaled, _mm256_set1_ps(x[i]));
            costs[e][i] = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(root[i]), diff), diff);
        }
    }
    // In each lane the least sum with its word, and the next to least.
    let mut least = [_mm256_set1_ps(f32::MAX); 2];
    let mut second = [_mm256_set1_ps(f32::INFINITY); 2];
    let mut best = [_mm256_set1_epi32(near[0][0].into()); 2];
    for words in near {
        let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(words.as_ptr().cast()));
        let mut rest = words;
        let mut sums =
            [_mm256_permutevar8x32_ps(costs[0][0], rest), _mm256_permutevar8x32_ps(costs[1][0], rest)];
        for i in 1..D {
            rest = if D == 8 { _mm256_srli_epi32(rest, 2) } else { _mm256_srli_epi32(rest, 3) };
            for e in 0..2 {
                sums[e] = _mm256_add_ps(sums[e], _mm256_permutevar8x32_ps(costs[e][i], rest));
            }
        }
        for e in 0..2 {
            let closer = _mm256_cmp_ps(sums[e], least[e], _CMP_LT_OQ);
            second[e] = _mm256_min_ps(_mm256_max_ps(sums[e], least[e]), second[e]);
            // The second operand remains where one is NaN.
            least[e] = _mm256_min_ps(sums[e], least[e]);
            best[e] = _mm256_blendv_epi8(best[e], words, _mm256_castps_si256(closer));
        }
    }
    let mut chosen = [_mm256_setzero_si256(); 2];
    let mut sure = [false; 2];
    for e in 0..2 {
        let pairs = _mm256_min_ps(least[e], _mm256_permute_ps(least[e], 0b10_11_00_01));
        let fours = _mm256_min_ps(pairs, _mm256_permute_ps(pairs, 0b01_00_11_10));
        let all = _mm256_min_ps(fours, _mm256_permute2f128_ps(fours, fours, 1));
        let equal = _mm256_movemask_ps(_mm256_cmp_ps(least[e], all, _CMP_EQ_OQ));
        // A later lane may have its equal from an earlier eight.
        if near.len() > 1 && equal & (equal - 1) != 0 {
            return Portable::closest(near, x, root, scales, slack);
        }
        let lane = _mm256_set1_epi32(equal.trailing_zeros() as i32);
        chosen[e] = _mm256_permutevar8x32_epi32(best[e], lane);
        let own = _mm256_castsi256_ps(_mm256_cmpeq_epi32(best[e], chosen[e]));
        let least_sum = _mm256_cvtss_f32(all);
        let limit = _mm256_set1_ps(least_sum + margin(scales[e], slack, least_sum));
        let close = _mm256_andnot_ps(own, _mm256_cmp_ps(least[e], limit, _CMP_NGT_UQ));
        let close = _mm256_or_ps(close, _mm256_cmp_ps(second[e], limit, _CMP_NGT_UQ));
        sure[e] = _mm256_movemask_ps(close) == 0;
    }
    let words = [_mm256_cvtsi256_si32(chosen[0]) as u16, _mm256_cvtsi256_si32(chosen[1]) as u16];
    (words, sure)
}

macro_rules! table {
    ($table:ident, $name:literal, $features:literal) => {
        pub(super) static $table: &[Codec] = {
            macro_rules! row {
                ($module:ident, $encode:expr) => {
                    Codec {
                        implementation: $name,
                        encode: $encode,
                        weigh: Some(|src, importance, dst| {
                            #[target_feature(enable = $features)]
                            unsafe fn run(src: &[f32], importance: &[f32], dst: &mut [u8]) {
                                $module::weigh_row::<Lookup>(src, importance, dst);
                            }
                            // SAFETY: the table is handed out only after the features were detected.
                            unsafe { run(src, importance, dst) }
                        }),
                        ..$module::SCALAR
                    }
                };
            }
            macro_rules! encode {
                ($module:ident) => {
                    Some(|src, dst| {
                        #[target_feature(enable = $features)]
                        unsafe fn run(src: &[f32], dst: &mut [u8]) {
                            $module::encode_row::<Lookup>(src, dst);
                        }
                        // SAFETY: the table is handed out only after the features were detected.
                        unsafe { run(src, dst) }
                    })
                };
            }
            &[
                row!(iq2_xxs, None),
                row!(iq2_xs, None),
                row!(iq2_s, encode!(iq2_s)),
                row!(iq3_xxs, encode!(iq3_xxs)),
                row!(iq3_s, encode!(iq3_s)),
            ]
        };
    };
}

table!(AVX2, "avx2", "avx2,f16c");
