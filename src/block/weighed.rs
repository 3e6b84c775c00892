//! Q4_0, Q4_1, Q5_0 and Q5_1 with an importance: searches for the scale, and the minimum, of 32
//! weights.
//!
//! A search tries several inverses of the scale and keeps the one whose decoded weights lie
//! closest, each error counting with its importance. The blocks of a row do not depend on each
//! other, so that `L` of them run side by side, a lane each; each keeps the order of its own sums
//! and attempts. Source: `make_qx_quants`, `make_qkx3_quants` (`ggml-quants.c`).

use super::f16_from_f32;
use super::kquant::{NOTHING, nearest};

/// Blocks side by side in the portable build: four registers of SSE2.
pub(super) const LANES: usize = 16;

/// Weight `i` of block `k` is `[i][k]`. Aligned, so that no register is loaded from two lines of
/// the cache.
#[repr(align(64))]
struct Weights<const L: usize>([[f32; L]; 32]);

/// A type whose blocks hold 32 weights, with a scale and perhaps a minimum.
pub(super) trait Weighed: bytemuck::Pod {
    /// The code that stands for 0, in types without a minimum.
    const MIDDLE: Option<u8>;
    /// The largest code.
    const MOST: u8;

    /// A block of a scale and a minimum, as halves, and codes.
    fn pack(d: [u8; 2], m: [u8; 2], codes: &[u8; 32]) -> Self;
}

/// What the searches find for each block.
struct Found<const L: usize> {
    scale: [f32; L],
    min: [f32; L],
    codes: [[u8; L]; 32],
}

/// Encodes a row. An error counts with the importance of its column, times the root of the
/// weight's square plus the mean square of the row.
#[inline(always)]
pub(super) fn row<B: Weighed, const L: usize>(row: &[f32], importance: &[f32], bytes: &mut [u8]) {
    let mut sum = 0.0;
    for x in row {
        sum += x * x;
    }
    let mean = sum / row.len() as f32;
    // Which of several NaN a sum keeps would depend on the compiler, and the sign of one that
    // comes from infinities on the processor: the first of the row, and x86's.
    let first = if sum.is_finite() { None } else { row.iter().find(|x| x.is_nan()) };
    let nan = first.copied().unwrap_or(f32::NAN.copysign(-1.0));
    let (row, importance) = (row.as_chunks::<32>().0, importance.as_chunks::<32>().0);
    let groups = row.chunks(L).zip(importance.chunks(L));
    for ((row, importance), blocks) in groups.zip(bytemuck::cast_slice_mut::<u8, B>(bytes).chunks_mut(L)) {
        let mut weights = [[0.0; 32]; L];
        // One loop over all blocks: two would be turned around and gather.
        let each = row.as_flattened().iter().zip(importance.as_flattened());
        for (w, (x, importance)) in weights.as_flattened_mut().iter_mut().zip(each) {
            *w = importance * (mean + x * x).sqrt();
        }
        let x = side_by_side(row);
        let w = side_by_side(&weights);
        let found = match B::MIDDLE {
            // Only sums of squares of finite weights are finite.
            Some(middle) if sum.is_finite() => symmetric::<L, false>(middle.into(), &x, &w),
            Some(middle) => symmetric::<L, true>(middle.into(), &x, &w),
            None => affine(B::MOST.into(), &x, &w),
        };
        for (k, block) in blocks.iter_mut().enumerate() {
            let mut codes = [0; 32];
            for (code, lanes) in codes.iter_mut().zip(&found.codes) {
                *code = lanes[k];
            }
            let scale = if B::MIDDLE.is_some() && found.scale[k].is_nan() { nan } else { found.scale[k] };
            *block = B::pack(half(scale), half(found.min[k]), &codes);
        }
    }
}

/// Up to `L` blocks, zeros for those that are missing. On its own, because with AVX-512 the compiler
/// would gather, slower than one by one.
#[inline(never)]
fn side_by_side<const L: usize>(blocks: &[[f32; 32]]) -> Weights<L> {
    let mut turned = Weights([[0.0; L]; 32]);
    for (k, block) in blocks.iter().enumerate().take(L) {
        for (lanes, x) in turned.0.iter_mut().zip(block) {
            lanes[k] = *x;
        }
    }
    turned
}

fn half(x: f32) -> [u8; 2] {
    f16_from_f32(x).to_le_bytes()
}

/// The nearest integer, ties to even, for magnitudes below 2^22; NaN for NaN.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + 12_582_912.0) - 12_582_912.0
}

/// [`nearest`], limited to `least..=most`. Where `EXACT` is false only for magnitudes below 2^22.
#[inline(always)]
fn limited<const EXACT: bool>(x: f32, least: f32, most: f32) -> f32 {
    let l = if EXACT { nearest(x) as f32 } else { round(x) };
    let l = if l > least { l } else { least };
    if l < most { l } else { most }
}

/// Scale and codes of weights that are about `scale * (code - middle)`. `EXACT` says that weights
/// may be infinite or NaN.
#[inline(always)]
fn symmetric<const L: usize, const EXACT: bool>(middle: f32, x: &Weights<L>, w: &Weights<L>) -> Found<L> {
    let (x, w) = (&x.0, &w.0);
    let mut max = [0.0f32; L];
    let mut wx = Weights([[0.0; L]; 32]);
    let products = w.as_flattened().iter().zip(x.as_flattened());
    for (wx, (w, x)) in wx.0.as_flattened_mut().iter_mut().zip(products) {
        *wx = w * x;
    }
    for x in x {
        for k in 0..L {
            max[k] = choose(mask(max[k].abs() < x[k].abs()), x[k], max[k]);
        }
    }
    let (mut best, mut scale, mut gain) = ([0.0; L], [0.0; L], [0.0; L]);
    // The plain scale first, then up to nine tenths of a step to either side.
    for n in 0..19i8 {
        let step = if n == 0 { 0 } else { n - if n < 10 { 10 } else { 9 } };
        let numerator = -(middle + 0.1 * f32::from(step));
        let (mut inverse, mut xl, mut l2) = ([0.0; L], [0.0; L], [0.0; L]);
        for k in 0..L {
            inverse[k] = numerator / max[k];
        }
        for i in 0..32 {
            for k in 0..L {
                let l = limited::<EXACT>(inverse[k] * x[i][k], -middle, middle - 1.0);
                xl[k] += wx.0[i][k] * l;
                l2[k] += w[i][k] * l * l;
            }
        }
        for k in 0..L {
            let line = choose(mask(l2[k] != 0.0), xl[k] / l2[k], 0.0);
            let better = mask(n == 0) | mask(l2[k] > 0.0) & mask(xl[k] * xl[k] > gain[k] * l2[k]);
            best[k] = choose(better, inverse[k], best[k]);
            scale[k] = choose(better, line, scale[k]);
            gain[k] = choose(better, line * xl[k], gain[k]);
        }
    }
    let mut codes = [[0; L]; 32];
    for i in 0..32 {
        for k in 0..L {
            let code = limited::<EXACT>(best[k] * x[i][k], -middle, middle - 1.0) + middle;
            codes[i][k] = byte(choose(mask(max[k].abs() < NOTHING), 0.0, code));
        }
    }
    for k in 0..L {
        scale[k] = if max[k].abs() < NOTHING { 0.0 } else { scale[k] };
    }
    Found { scale, min: [0.0; L], codes }
}

/// Scale, minimum and codes of weights that are about `scale * code + min`: the line of least
/// squares over the codes of several attempts.
#[inline(always)]
fn affine<const L: usize>(most: f32, x: &Weights<L>, w: &Weights<L>) -> Found<L> {
    let (x, w) = (&x.0, &w.0);
    let (mut min, mut max) = (x[0], x[0]);
    // -0 is what a sum starts from without changing its first term.
    let (mut sum_w, mut sum_x) = ([-0.0; L], [-0.0; L]);
    for i in 0..32 {
        for k in 0..L {
            min[k] = if x[i][k] < min[k] { x[i][k] } else { min[k] };
            max[k] = if x[i][k] > max[k] { x[i][k] } else { max[k] };
            sum_w[k] += w[i][k];
            sum_x[k] += w[i][k] * x[i][k];
        }
    }
    // The first attempt takes the ends of the range for granted.
    let mut inverse = [0.0; L];
    let mut scale = [0.0; L];
    for k in 0..L {
        min[k] = if min[k] > 0.0 { 0.0 } else { min[k] };
        inverse[k] = most / (max[k] - min[k]);
        scale[k] = 1.0 / inverse[k];
    }
    let least = min;
    let (mut best, mut from) = ([0.0; L], min);
    let mut found = [[0.0; L]; 32];
    let mut error = [0.0; L];
    for i in 0..32 {
        for k in 0..L {
            let above = x[i][k] - least[k];
            // Of two NaN the weight counts.
            let l = limited::<true>(if above.is_nan() { above } else { inverse[k] * above }, 0.0, most);
            let diff = scale[k] * l + least[k] - x[i][k];
            error[k] += w[i][k] * (diff * diff);
            found[i][k] = l;
        }
    }
    // Those that follow stretch it by up to nine tenths of a step, and start from the best
    // minimum so far.
    let mut improved = [0; L];
    let mut l = Weights([[0.0; L]; 32]);
    for n in 0..=36u8 {
        let numerator = -0.9 + 0.05 * f32::from(n) + most;
        let mut sums = [[0.0; L]; 3];
        for k in 0..L {
            inverse[k] = numerator / (max[k] - min[k]);
        }
        for i in 0..32 {
            for k in 0..L {
                let code = inside(inverse[k] * (x[i][k] - min[k]), most);
                let wl = w[i][k] * code;
                sums[0][k] += wl;
                sums[1][k] += wl * code;
                sums[2][k] += wl * x[i][k];
                l.0[i][k] = code;
            }
        }
        let (mut this_scale, mut this_min) = ([0.0; L], [0.0; L]);
        let mut determinant = [0.0; L];
        for k in 0..L {
            let [sum_l, sum_l2, sum_xl] = [sums[0][k], sums[1][k], sums[2][k]];
            determinant[k] = sum_w[k] * sum_l2 - sum_l * sum_l;
            let slope = (sum_w[k] * sum_xl - sum_x[k] * sum_l) / determinant[k];
            let start = (sum_l2 * sum_x[k] - sum_l * sum_xl) / determinant[k];
            // A minimum above 0 gives way to the line through 0.
            let above = mask(start > 0.0);
            this_min[k] = choose(above, 0.0, start);
            this_scale[k] = choose(above, sum_xl / sum_l2, slope);
        }
        let mut this_error = [0.0; L];
        for i in 0..32 {
            for k in 0..L {
                let diff = this_scale[k] * l.0[i][k] + this_min[k] - x[i][k];
                this_error[k] += w[i][k] * (diff * diff);
            }
        }
        for k in 0..L {
            let better = mask(determinant[k] > 0.0) & mask(this_error[k] < error[k]);
            best[k] = choose(better, inverse[k], best[k]);
            from[k] = choose(better, min[k], from[k]);
            scale[k] = choose(better, this_scale[k], scale[k]);
            min[k] = choose(better, this_min[k], min[k]);
            error[k] = choose(better, this_error[k], error[k]);
            improved[k] |= better;
        }
    }
    let mut codes = [[0; L]; 32];
    for i in 0..32 {
        for k in 0..L {
            let code = inside(best[k] * (x[i][k] - from[k]), most);
            let code = choose(improved[k], code, found[i][k]);
            codes[i][k] = byte(choose(mask(max[k] <= least[k]), 0.0, code));
        }
    }
    for k in 0..L {
        scale[k] = if max[k] <= least[k] { 0.0 } else { scale[k] };
        min[k] = if max[k] <= least[k] { least[k] } else { min[k] };
    }
    Found { scale, min, codes }
}

/// A whole number from 0 to 255.
#[inline(always)]
fn byte(l: f32) -> u8 {
    (l + 12_582_912.0).to_bits() as u8
}

/// All bits or none.
#[inline(always)]
fn mask(set: bool) -> u32 {
    u32::from(set).wrapping_neg()
}

/// `a` where the mask is set, else `b`: written with bits, for what is written with `if` becomes
/// branches lane by lane.
#[inline(always)]
fn choose(mask: u32, a: f32, b: f32) -> f32 {
    f32::from_bits(a.to_bits() & mask | b.to_bits() & !mask)
}

/// The nearest of `0..=most`, ties to even; 0 for NaN.
#[inline(always)]
fn inside(x: f32, most: f32) -> f32 {
    let x = if x > 0.0 { x } else { 0.0 };
    round(if x < most { x } else { most })
}
