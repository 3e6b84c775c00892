//! IQ4_NL and IQ4_XS: the attempts of the search side by side, levels looked up in registers.

use super::avx2::Avx2;
use super::avx512::Avx512;
use super::{Decode, kernels};
use crate::block::cast::inverse;
use crate::block::iq4_nl::{LEVELS, NUMERATORS, best, middle};
use crate::block::kquant::NOTHING;
use crate::block::{Codec, decode_pairs, f16_from_f32, iq4_nl, iq4_xs};
use core::arch::x86_64::*;

/// 16 numbers: one for each attempt, or for each of 16 weights.
trait Lanes: Copy {
    unsafe fn load(x: &[f32; 16]) -> Self;
    unsafe fn store(self) -> [f32; 16];
    unsafe fn splat(x: f32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    unsafe fn sqrt(self) -> Self;
    /// The same with `x` in lane 0.
    unsafe fn with_first(self, x: f32) -> Self;
    /// The largest magnitude of both, NaN passed over, and which of the 32 are as large.
    unsafe fn farthest(low: Self, high: Self) -> (f32, u32);
    /// The nearest level, the upper of two; any for NaN. The attempts' steps only, -135 to 135.
    unsafe fn level(self) -> Self;
    /// The code of the nearest level, the upper of two; 15 for NaN.
    unsafe fn code(self) -> __m128i;
}

/// The numbers of steps are cut into 32 parts of this width, numbered from zero to either side: so
/// wide that few are needed, so narrow that no part holds two of the points where the nearest level
/// changes, and such that none of these lies near the end of a part.
const PART: f32 = 10.25;

/// Of each part, its number taken modulo 32: the point where the level changes, the level
/// before it, and by how much it grows there.
struct Parts {
    change: [f32; 32],
    level: [f32; 32],
    gap: [f32; 32],
    code: [i32; 32],
}

static PARTS: Parts = {
    let mut parts = Parts { change: [f32::INFINITY; 32], level: [0.0; 32], gap: [0.0; 32], code: [0; 32] };
    let (mut part, mut code) = (-16i32, 0);
    while part < 16 {
        let i = (part & 31) as usize;
        (parts.level[i], parts.code[i]) = (LEVELS[code] as f32, code as i32);
        if code < 15 && middle(code) < (part as f32 + 0.5) * PART {
            parts.change[i] = middle(code);
            parts.gap[i] = LEVELS[code + 1] as f32 - LEVELS[code] as f32;
            code += 1;
        }
        part += 1;
    }
    assert!(code == 15);
    parts
};

/// Added to a number, it leaves the nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

impl Lanes for __m512 {
    #[inline(always)]
    unsafe fn load(x: &[f32; 16]) -> Self {
        _mm512_loadu_ps(x.as_ptr())
    }

    #[inline(always)]
    unsafe fn store(self) -> [f32; 16] {
        let mut x = [0.0; 16];
        _mm512_storeu_ps(x.as_mut_ptr(), self);
        x
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        _mm512_set1_ps(x)
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        _mm512_add_ps(self, other)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        _mm512_mul_ps(self, other)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        _mm512_div_ps(self, other)
    }

    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        _mm512_sqrt_ps(self)
    }

    #[inline(always)]
    unsafe fn with_first(self, x: f32) -> Self {
        _mm512_mask_mov_ps(self, 1, _mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn farthest(low: Self, high: Self) -> (f32, u32) {
        let (low, high) = (_mm512_abs_ps(low), _mm512_abs_ps(high));
        // Where an operand is NaN the second one is the result.
        let m = _mm512_max_ps(high, _mm512_max_ps(low, _mm512_setzero_ps()));
        let m = _mm256_max_ps(_mm512_castps512_ps256(m), _mm512_extractf32x8_ps(m, 1));
        let m = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        let m = _mm_cvtss_f32(_mm_max_ps(m, _mm_movehdup_ps(m)));
        let most = _mm512_set1_ps(m);
        let low = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(low, most);
        let high = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(high, most);
        (m, u32::from(low) | u32::from(high) << 16)
    }

    #[inline(always)]
    unsafe fn level(self) -> Self {
        let (part, pass) = part(self);
        let [low, high] =
            [_mm512_loadu_ps(PARTS.level.as_ptr()), _mm512_loadu_ps(PARTS.level.as_ptr().add(16))];
        let level = _mm512_permutex2var_ps(low, part, high);
        let [low, high] = [_mm512_loadu_ps(PARTS.gap.as_ptr()), _mm512_loadu_ps(PARTS.gap.as_ptr().add(16))];
        _mm512_mask_add_ps(level, pass, level, _mm512_permutex2var_ps(low, part, high))
    }

    #[inline(always)]
    unsafe fn code(self) -> __m128i {
        let limit = _mm512_set1_ps(135.0);
        // NaN becomes the limit.
        let steps = _mm512_max_ps(_mm512_min_ps(self, limit), _mm512_set1_ps(-135.0));
        let (part, pass) = part(steps);
        let codes = PARTS.code.as_ptr();
        let [low, high] = [_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(16).cast())];
        let code = _mm512_permutex2var_epi32(low, part, high);
        _mm512_cvtepi32_epi8(_mm512_mask_add_epi32(code, pass, code, _mm512_set1_epi32(1)))
    }
}

/// The part in which each lane lies, modulo 32, and whether it has passed the change there.
#[inline(always)]
unsafe fn part(steps: __m512) -> (__m512i, __mmask16) {
    // One rounding or two: no change lies where it matters.
    let part = _mm512_fmadd_ps(steps, _mm512_set1_ps(1.0 / PART), _mm512_set1_ps(ROUND));
    let part = _mm512_castps_si512(part);
    let changes = PARTS.change.as_ptr();
    let [low, high] = [_mm512_loadu_ps(changes), _mm512_loadu_ps(changes.add(16))];
    let change = _mm512_permutex2var_ps(low, part, high);
    (part, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(steps, change))
}

#[derive(Clone, Copy)]
struct Pair([__m256; 2]);

/// What a step of the bisection looks up: entry `-n` modulo 8 for the `n`-th case.
macro_rules! cases {
    ($n:ident => $value:expr) => {{
        let mut table = [0.0; 8];
        let mut $n = 0;
        while $n < 8 {
            table[(8 - $n) & 7] = $value;
            $n += 1;
        }
        table
    }};
}
static QUARTERS: [f32; 8] = cases!(n => middle(if n == 0 { 3 } else { 11 }));
static EIGHTHS: [f32; 8] = cases!(n => middle(4 * (n & 3) + 1));
static LAST: [f32; 8] = cases!(n => middle(2 * n));
static LOWER: [f32; 8] = cases!(n => LEVELS[2 * n] as f32);
static GAPS: [f32; 8] = cases!(n => (LEVELS[2 * n + 1] as i32 - LEVELS[2 * n] as i32) as f32);

#[inline(always)]
unsafe fn case(table: &[f32; 8], n: __m256i) -> __m256 {
    _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), n)
}

/// -1 where a lane is no less than the other; NaN is not.
#[inline(always)]
unsafe fn passes(a: __m256, b: __m256) -> __m256i {
    _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, b))
}

/// The upper three bits of each lane's code, their sign turned, and -1 where the last bit is set.
#[inline(always)]
unsafe fn bisect(x: __m256) -> (__m256i, __m256i) {
    let n = passes(x, _mm256_set1_ps(middle(7)));
    // The first look-up has two cases: of 0 and -1, -1 modulo 8 is entry 7.
    let n = _mm256_add_epi32(_mm256_add_epi32(n, n), passes(x, case(&QUARTERS, n)));
    let n = _mm256_add_epi32(_mm256_add_epi32(n, n), passes(x, case(&EIGHTHS, n)));
    (n, passes(x, case(&LAST, n)))
}

#[inline(always)]
unsafe fn level(x: __m256) -> __m256 {
    let (n, last) = bisect(x);
    _mm256_add_ps(case(&LOWER, n), _mm256_and_ps(_mm256_castsi256_ps(last), case(&GAPS, n)))
}

#[inline(always)]
unsafe fn negative_code(x: __m256) -> __m256i {
    let (n, last) = bisect(x);
    _mm256_add_epi32(_mm256_add_epi32(n, n), last)
}

impl Lanes for Pair {
    #[inline(always)]
    unsafe fn load(x: &[f32; 16]) -> Self {
        Self([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))])
    }

    #[inline(always)]
    unsafe fn store(self) -> [f32; 16] {
        let mut x = [0.0; 16];
        _mm256_storeu_ps(x.as_mut_ptr(), self.0[0]);
        _mm256_storeu_ps(x.as_mut_ptr().add(8), self.0[1]);
        x
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self([_mm256_add_ps(self.0[0], other.0[0]), _mm256_add_ps(self.0[1], other.0[1])])
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self([_mm256_mul_ps(self.0[0], other.0[0]), _mm256_mul_ps(self.0[1], other.0[1])])
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self([_mm256_div_ps(self.0[0], other.0[0]), _mm256_div_ps(self.0[1], other.0[1])])
    }

    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        Self([_mm256_sqrt_ps(self.0[0]), _mm256_sqrt_ps(self.0[1])])
    }

    #[inline(always)]
    unsafe fn with_first(self, x: f32) -> Self {
        Self([_mm256_blend_ps::<1>(self.0[0], _mm256_set1_ps(x)), self.0[1]])
    }

    #[inline(always)]
    unsafe fn farthest(low: Self, high: Self) -> (f32, u32) {
        let mut m = _mm256_setzero_ps();
        let sign = _mm256_set1_ps(-0.0);
        let x = [low.0[0], low.0[1], high.0[0], high.0[1]];
        for v in x {
            m = _mm256_max_ps(_mm256_andnot_ps(sign, v), m);
        }
        let m = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        let m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        let m = _mm_cvtss_f32(_mm_max_ps(m, _mm_movehdup_ps(m)));
        let mut mask = 0;
        for (i, v) in x.into_iter().enumerate() {
            let equal = _mm256_cmp_ps::<_CMP_EQ_OQ>(_mm256_andnot_ps(sign, v), _mm256_set1_ps(m));
            mask |= (_mm256_movemask_ps(equal) as u32) << (8 * i);
        }
        (m, mask)
    }

    #[inline(always)]
    unsafe fn level(self) -> Self {
        Self([level(self.0[0]), level(self.0[1])])
    }

    #[inline(always)]
    unsafe fn code(self) -> __m128i {
        let words = _mm256_packs_epi32(negative_code(self.0[0]), negative_code(self.0[1]));
        let words = _mm256_permute4x64_epi64(words, 0b11_01_10_00);
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_sub_epi8(_mm_setzero_si128(), bytes)
    }
}

/// [`iq4_nl::search`].
#[inline(always)]
unsafe fn search<V: Lanes>(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    let [low, high] = halves(x);
    let (amax, farthest) = V::farthest(V::load(low), V::load(high));
    if amax < NOTHING {
        return 0.0;
    }
    let max = x[farthest.trailing_zeros() as usize & 31];
    let plain = 1.0 / (-max / f32::from(LEVELS[0]));
    let inverses = V::load(&NUMERATORS).div(V::splat(max)).with_first(plain);
    let (mut sum_xl, mut sum_l2) = (V::splat(0.0), V::splat(0.0));
    for j in 0..32 {
        let x = V::splat(x[j]);
        let l = inverses.mul(x).level();
        let wl = V::splat(weights[j]).mul(l);
        sum_xl = sum_xl.add(wl.mul(x));
        sum_l2 = sum_l2.add(wl.mul(l));
    }
    best(&sum_xl.store(), &sum_l2.store())
}

#[inline(always)]
fn halves(x: &[f32; 32]) -> &[[f32; 16]; 2] {
    bytemuck::cast_ref(x)
}

#[inline(always)]
unsafe fn quantize<V: Lanes>(x: &[f32; 32], d: f32, qs: &mut [u8; 16]) {
    let id = V::splat(inverse(d));
    let [low, high] = halves(x);
    let (low, high) = (V::load(low).mul(id).code(), V::load(high).mul(id).code());
    _mm_storeu_si128(qs.as_mut_ptr().cast(), _mm_or_si128(low, _mm_slli_epi16(high, 4)));
}

/// What each weight counts: [`iq4_nl::squares`], or [`iq4_nl::weigh`].
#[inline(always)]
unsafe fn weigh<V: Lanes>(x: &[f32; 32], importance: Option<(&[f32; 32], f32)>) -> [f32; 32] {
    let mut weights = [[0.0; 16]; 2];
    for (i, x) in halves(x).iter().enumerate() {
        let x = V::load(x);
        let mut w = x.mul(x);
        if let Some((importance, deviation)) = importance {
            w = V::load(&halves(importance)[i]).mul(V::splat(deviation).add(w).sqrt());
        }
        weights[i] = w.store();
    }
    bytemuck::cast(weights)
}

/// Blocks whose squares are added up side by side: each sum waits for its last addition.
const GROUP: usize = 8;

/// [`iq4_nl::deviation`] of each block.
#[inline(always)]
fn deviations<const N: usize>(x: &[[f32; N]]) -> [f32; GROUP] {
    let mut sums = [0.0; GROUP];
    if let Ok(x) = <&[[f32; N]; GROUP]>::try_from(x) {
        for j in 0..N {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += x[j] * x[j];
            }
        }
        for sum in &mut sums {
            *sum *= 2.0 / N as f32;
        }
    } else {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = iq4_nl::deviation(x);
        }
    }
    sums
}

/// The importance of the columns of a block, or `None` for all if there is none.
#[inline(always)]
fn columns<const N: usize>(importance: Option<&[f32]>, block: usize) -> Option<&[f32; N]> {
    importance?.as_chunks().0.get(block)
}

#[inline(always)]
unsafe fn encode_nl<V: Lanes>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    let blocks: &mut [iq4_nl::Block] = bytemuck::cast_slice_mut(dst);
    let mut at = 0;
    for (x, blocks) in src.as_chunks::<32>().0.chunks(GROUP).zip(blocks.chunks_mut(GROUP)) {
        let deviations = if importance.is_some() { deviations(x) } else { [0.0; GROUP] };
        for ((x, block), deviation) in x.iter().zip(blocks).zip(deviations) {
            let d = search::<V>(x, &weigh::<V>(x, columns(importance, at).map(|m| (m, deviation))));
            block.d = f16_from_f32(d).to_le_bytes();
            quantize::<V>(x, d, &mut block.qs);
            at += 1;
        }
    }
}

#[inline(always)]
unsafe fn encode_xs<V: Lanes>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    let blocks: &mut [iq4_xs::Block] = bytemuck::cast_slice_mut(dst);
    let mut at = 0;
    for (x, blocks) in src.as_chunks::<256>().0.chunks(GROUP).zip(blocks.chunks_mut(GROUP)) {
        let deviations = if importance.is_some() { deviations(x) } else { [0.0; GROUP] };
        for ((x, block), deviation) in x.iter().zip(blocks).zip(deviations) {
            let x = x.as_chunks::<32>().0;
            let mut found = [0.0; 8];
            for (scale, x) in found.iter_mut().zip(x) {
                *scale = search::<V>(x, &weigh::<V>(x, columns(importance, at).map(|m| (m, deviation))));
                at += 1;
            }
            let scales = block.store_scales(&found);
            for ((x, d), qs) in x.iter().zip(scales).zip(block.qs.as_chunks_mut().0) {
                quantize::<V>(x, d, qs);
            }
        }
    }
}

/// Bytes of 16 codes to the weights of a scale.
trait Levels {
    unsafe fn dequantize(qs: &[u8; 16], d: f32, y: &mut [f32; 32]);
}

impl Levels for Avx2 {
    #[inline(always)]
    unsafe fn dequantize(qs: &[u8; 16], d: f32, y: &mut [f32; 32]) {
        let levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(LEVELS.as_ptr().cast()));
        Avx2::from_i8(_mm256_shuffle_epi8(levels, kernels::from_nibbles(qs))).mul(d).store(y);
    }
}

impl Levels for Avx512 {
    #[inline(always)]
    unsafe fn dequantize(qs: &[u8; 16], d: f32, y: &mut [f32; 32]) {
        let levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(LEVELS.as_ptr().cast())));
        let levels = _mm512_mul_ps(levels, _mm512_set1_ps(d));
        // A look-up heeds the low four bits only.
        let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(qs.as_ptr().cast()));
        let low = _mm512_permutexvar_ps(codes, levels);
        let high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), levels);
        _mm512_storeu_ps(y.as_mut_ptr(), low);
        _mm512_storeu_ps(y.as_mut_ptr().add(16), high);
    }
}

#[inline(always)]
unsafe fn decode_nl<V: Levels>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<iq4_nl::Block, 32>(src, dst) {
        V::dequantize(&block.qs, kernels::f32(block.d), y);
    }
}

#[inline(always)]
unsafe fn decode_xs<V: Levels>(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs::<iq4_xs::Block, 256>(src, dst) {
        let scales = block.scales(kernels::f32(block.d));
        for ((y, d), qs) in y.as_chunks_mut().0.iter_mut().zip(scales).zip(block.qs.as_chunks().0) {
            V::dequantize(qs, d, y);
        }
    }
}

macro_rules! table {
    ($table:ident, $name:literal, $features:literal, $lanes:ty, $levels:ty) => {
        pub(super) static $table: &[Codec] = {
            macro_rules! row {
                ($base:expr, $encode:ident, $decode:ident) => {{
                    #[target_feature(enable = $features)]
                    unsafe fn encode(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
                        $encode::<$lanes>(src, importance, dst);
                    }
                    #[target_feature(enable = $features)]
                    unsafe fn decode(src: &[u8], dst: &mut [f32]) {
                        $decode::<$levels>(src, dst);
                    }
                    Codec {
                        implementation: $name,
                        // SAFETY: the table is handed out only after the features were detected.
                        encode: Some(|src, dst| unsafe { encode(src, None, dst) }),
                        // SAFETY: as above.
                        weigh: Some(|row, importance, dst| unsafe { encode(row, Some(importance), dst) }),
                        // SAFETY: as above.
                        decode: |src, dst| unsafe { decode(src, dst) },
                        ..$base
                    }
                }};
            }
            &[row!(iq4_nl::SCALAR, encode_nl, decode_nl), row!(iq4_xs::SCALAR, encode_xs, decode_xs)]
        };
    };
}

table!(IQ4_AVX2, "avx2", "avx2,f16c", Pair, Avx2);
table!(IQ4_AVX512, "avx512", "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c", __m512, Avx512);
