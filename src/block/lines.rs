//! The search of Q2_K, Q4_K and Q5_K: scale and minimum of many groups side by side.
//!
//! See `groups` for how. Source: `make_qkx2_quants`, `make_qkx3_quants` (`ggml-quants.c`).
// As in `groups`.
#![allow(clippy::needless_range_loop)]

use super::groups::{Groups, WHOLE, byte, choose, limit, mask, whole};

/// The code nearest to `v`.
#[inline(always)]
fn code_of(limited: bool, v: f32, most: f32) -> f32 {
    if limited { limit(v, 0.0, most) + WHOLE - WHOLE } else { limit(whole(v), 0.0, most) }
}

/// What weighs the squared error of a weight `x`.
#[derive(Clone, Copy)]
pub(super) enum Weight {
    /// `|x|`.
    Magnitude,
    /// `|x|` and the root of the mean square of its group.
    Mean,
    /// The importance times the root of `x * x` and what is given for its block.
    Importance,
}

/// How [`affine`] searches.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    pub weight: Weight,
    /// The largest code.
    pub codes: u8,
    /// Attempts: the range above the minimum is divided by `codes + first + step * n`.
    pub attempts: u8,
    pub first: f32,
    pub step: f32,
    /// Whether errors count by magnitude instead of by their square.
    pub absolute: bool,
    /// Whether attempts limit codes before they round them, which differs far from the range only.
    pub limited: bool,
}

/// What [`affine`] found for each group: weights are about `scale * code - min`.
#[derive(Clone, Copy)]
pub(super) struct Lines<const L: usize> {
    pub scale: [f32; L],
    pub min: [f32; L],
    /// Sum of the importance.
    pub weight: [f32; L],
    /// The inverse scale and the minimum that give the codes.
    inverse: [f32; L],
    from: [f32; L],
    /// Whether an attempt gave them, all bits or none.
    attempt: [u32; L],
}

impl<const L: usize> Lines<L> {
    /// Of groups of nothing.
    pub(super) const NONE: Self = Self {
        scale: [0.0; L],
        min: [0.0; L],
        weight: [0.0; L],
        inverse: [0.0; L],
        from: [0.0; L],
        attempt: [0; L],
    };

    /// The codes of group `t`, whose weights are `x`.
    pub(super) fn codes(&self, how: Affine, t: usize, x: &[f32], codes: &mut [u8]) {
        for (code, x) in codes.iter_mut().zip(x) {
            // Of two NaN the weight's counts, whichever way round the compiler multiplies.
            let above = x - self.from[t];
            let v = if above.is_nan() { above } else { self.inverse[t] * above };
            *code = byte(code_of(how.limited && self.attempt[t] != 0, v, how.codes.into()));
        }
    }
}

/// The line of least squares over the codes of several attempts, each starting from the best
/// minimum so far. `importance` and `spread` are for [`Weight::Importance`].
#[inline(always)]
pub(super) fn affine<const L: usize, const N: usize>(
    how: Affine,
    x: &Groups<L, N>,
    importance: &Groups<L, N>,
    mut spread: [f32; L],
) -> Lines<L> {
    let (x, importance, most) = (&x.0, &importance.0, f32::from(how.codes));
    if let Weight::Mean = how.weight {
        for i in 0..N {
            for t in 0..L {
                spread[t] += x[i][t] * x[i][t];
            }
        }
        for t in 0..L {
            spread[t] = (spread[t] / N as f32).sqrt();
        }
    }
    let mut weights = Groups([[0.0; L]; N]);
    let w = &mut weights.0;
    // -0 is what a sum starts from without changing its first term.
    let (mut min, mut max, mut sum_w, mut sum_x) = (x[0], x[0], [-0.0; L], [-0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let x = x[i][t];
            let weight = match how.weight {
                Weight::Magnitude => x.abs(),
                Weight::Mean => spread[t] + x.abs(),
                Weight::Importance => importance[i][t] * (spread[t] + x * x).sqrt(),
            };
            w[i][t] = weight;
            min[t] = if x < min[t] { x } else { min[t] };
            max[t] = if x > max[t] { x } else { max[t] };
            sum_w[t] += weight;
            sum_x[t] += weight * x;
        }
    }
    let (mut inverse, mut scale, mut flat) = ([0.0; L], [0.0; L], [0; L]);
    for t in 0..L {
        min[t] = if min[t] > 0.0 { 0.0 } else { min[t] };
        flat[t] = mask(max[t] == min[t]);
        // So that there is a range.
        max[t] = choose(flat[t], min[t] + 1.0, max[t]);
        inverse[t] = most / (max[t] - min[t]);
        scale[t] = 1.0 / inverse[t];
    }
    let (mut best, mut from, mut attempt, mut least) = (inverse, min, [0; L], [0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let l = code_of(false, inverse[t] * (x[i][t] - min[t]), most);
            let off = scale[t] * l + min[t] - x[i][t];
            least[t] += w[i][t] * if how.absolute { off.abs() } else { off * off };
        }
    }
    let mut odd = 0;
    for x in x.as_flattened() {
        odd |= mask(!x.is_finite());
    }
    let (low, mut codes) = (min, Groups([[0.0; L]; N]));
    for n in 0..how.attempts {
        let steps = how.first + how.step * f32::from(n) + most;
        for t in 0..L {
            inverse[t] = steps / (max[t] - min[t]);
        }
        // What the least and the greatest weights give; all others lie between.
        let mut ends = [0; L];
        for t in 0..L {
            let (a, b) = (inverse[t] * (low[t] - min[t]), inverse[t] * (max[t] - min[t]));
            let under = mask(a <= -0.5) | mask(b <= -0.5);
            let over = mask(a >= most + 0.5) | mask(b >= most + 0.5);
            let far = !(mask(a.abs() < 1e6) & mask(b.abs() < 1e6));
            ends[t] = under & 1 | over & 2 | far & 4;
        }
        let mut reach = odd & 4;
        for t in 0..L {
            reach |= ends[t];
        }
        let [sum_l, sum_l2, sum_xl] = match reach {
            0 => line_sums::<L, N, 0>(how, &inverse, &min, x, w, &mut codes.0),
            2 => line_sums::<L, N, 1>(how, &inverse, &min, x, w, &mut codes.0),
            1 | 3 => line_sums::<L, N, 2>(how, &inverse, &min, x, w, &mut codes.0),
            _ => line_sums::<L, N, 3>(how, &inverse, &min, x, w, &mut codes.0),
        };
        let (mut determinant, mut new_scale, mut new_min) = ([0.0; L], [0.0; L], [0.0; L]);
        for t in 0..L {
            let d = sum_w[t] * sum_l2[t] - sum_l[t] * sum_l[t];
            let m = (sum_l2[t] * sum_x[t] - sum_l[t] * sum_xl[t]) / d;
            let s = (sum_w[t] * sum_xl[t] - sum_x[t] * sum_l[t]) / d;
            determinant[t] = d;
            new_min[t] = if m > 0.0 { 0.0 } else { m };
            new_scale[t] = if m > 0.0 { sum_xl[t] / sum_l2[t] } else { s };
        }
        let mut error = [0.0; L];
        for i in 0..N {
            for t in 0..L {
                let off = new_scale[t] * codes.0[i][t] + new_min[t] - x[i][t];
                error[t] += w[i][t] * if how.absolute { off.abs() } else { off * off };
            }
        }
        for t in 0..L {
            let better = mask(determinant[t] > 0.0) & mask(error[t] < least[t]);
            least[t] = choose(better, error[t], least[t]);
            best[t] = choose(better, inverse[t], best[t]);
            from[t] = choose(better, min[t], from[t]);
            attempt[t] |= better;
            scale[t] = choose(better, new_scale[t], scale[t]);
            min[t] = choose(better, new_min[t], min[t]);
        }
    }
    for t in 0..L {
        best[t] = choose(flat[t], 0.0, best[t]);
        scale[t] = choose(flat[t], 0.0, scale[t]);
        min[t] = -min[t];
    }
    Lines { scale, min, weight: sum_w, inverse: best, from, attempt }
}

/// The sums of one attempt of [`affine`], over codes, their squares, and codes times weights.
/// Weights that are finite need a limit only where codes reach it: `LIMITS` is 0 for none, 1 for the
/// upper one, 2 for both, 3 for weights of any kind.
#[inline(always)]
fn line_sums<const L: usize, const N: usize, const LIMITS: u8>(
    how: Affine,
    inverse: &[f32; L],
    min: &[f32; L],
    x: &[[f32; L]; N],
    w: &[[f32; L]; N],
    codes: &mut [[f32; L]; N],
) -> [[f32; L]; 3] {
    let most = f32::from(how.codes);
    let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; L], [0.0; L], [0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let v = inverse[t] * (x[i][t] - min[t]);
            let l = match LIMITS {
                0 => v + WHOLE - WHOLE,
                1 => (if v < most { v } else { most }) + WHOLE - WHOLE,
                2 => limit(v, 0.0, most) + WHOLE - WHOLE,
                _ => code_of(how.limited, v, most),
            };
            let wl = w[i][t] * l;
            sum_l[t] += wl;
            sum_l2[t] += wl * l;
            sum_xl[t] += wl * x[i][t];
            codes[i][t] = l;
        }
    }
    [sum_l, sum_l2, sum_xl]
}
