//! The searches of the K types, many groups side by side.
//!
//! A search tries several inverses of the scale and keeps the one whose decoded weights lie
//! closest. Each of its sums runs over the weights of a group in their order, so that the bytes are
//! ggml's; what runs side by side are groups, `L` lanes of them. Plain loops over the lanes: the
//! compiler makes vectors of whatever width the CPU has (with 16 lanes and more; it fails with 8).
//! Source: `make_qx_quants`, `make_q3_quants`, `make_qp_quants` (`ggml-quants.c`).
// An index per lane in every array is what the compiler turns into vectors, and what reads well.
#![allow(clippy::needless_range_loop)]

use super::cast::extreme;
use super::kquant::NOTHING;

/// What most loops do side by side, in registers.
pub(crate) const LANES: usize = 16;

/// `N` weights of `L` groups: `[i][t]` is weight `i` of group `t`.
///
/// Aligned, so that no vector lies across two lines of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Groups<const L: usize, const N: usize>(pub [[f32; L]; N]);

/// 1.5 * 2^23: numbers of its size have no fraction. Adding it rounds to an integer, which then lies in the lowest
/// bits.
pub(crate) const WHOLE: f32 = 12_582_912.0;

/// [`nearest`](super::kquant::nearest) as a float: the low 23 bits become the fraction of a number
/// between 2^23 and 2^24.
#[inline(always)]
pub(super) fn whole(x: f32) -> f32 {
    f32::from_bits((x + WHOLE).to_bits() & 0x007F_FFFF | 0x4B00_0000) - WHOLE
}

/// Limits a number that is not NaN.
#[inline(always)]
pub(super) fn limit(l: f32, least: f32, most: f32) -> f32 {
    let l = if l > least { l } else { least };
    if l < most { l } else { most }
}

/// All bits or none.
#[inline(always)]
pub(super) fn mask(set: bool) -> u32 {
    u32::from(set).wrapping_neg()
}

/// `a` where the mask is set, else `b`: written with bits, for what is written with `if` becomes
/// branches lane by lane.
#[inline(always)]
pub(super) fn choose(mask: u32, a: f32, b: f32) -> f32 {
    f32::from_bits(a.to_bits() & mask | b.to_bits() & !mask)
}

/// Up to `L` groups that follow each other, turned so that they lie side by side; zeros for those
/// that are missing.
#[inline(always)]
pub(super) fn side_by_side<const L: usize, const N: usize>(x: &[f32]) -> Groups<L, N> {
    let mut turned = Groups([[0.0; L]; N]);
    turn(x, &mut turned);
    turned
}

/// Not inlined: where the compiler sees through it, the loops that follow gather weights one by
/// one.
#[inline(never)]
fn turn<const L: usize, const N: usize>(x: &[f32], turned: &mut Groups<L, N>) {
    for (t, x) in x.as_chunks::<N>().0.iter().enumerate().take(L) {
        for i in 0..N {
            turned.0[i][t] = x[i];
        }
    }
}

/// A whole number from 0 to 255.
#[inline(always)]
pub(super) fn byte(l: f32) -> u8 {
    (l + WHOLE).to_bits() as u8
}

/// What [`symmetric`] found for each group.
#[derive(Clone, Copy)]
pub(super) struct Scales<const L: usize> {
    pub scale: [f32; L],
    /// The inverse scale that gives the codes.
    inverse: [f32; L],
}

impl<const L: usize> Scales<L> {
    /// Of groups of nothing.
    pub(super) const NONE: Self = Self { scale: [0.0; L], inverse: [0.0; L] };

    /// The codes of group `t`, whose weights are `x`, around `half`; 0 in a group of nothing.
    pub(super) fn codes(&self, half: i32, t: usize, x: &[f32], codes: &mut [u8]) {
        let nothing = extreme(x).abs() < NOTHING;
        let half = half as f32;
        for (code, x) in codes.iter_mut().zip(x) {
            let l = limit(whole(self.inverse[t] * x), -half, half - 1.0) + half;
            *code = if nothing { 0 } else { byte(l) };
        }
    }
}

/// All weights in one: loops over a weight of each group alone are taken for gathers.
#[inline(always)]
fn flat<const L: usize, const N: usize>(x: &Groups<L, N>) -> &[f32] {
    x.0.as_flattened()
}

/// As [`flat`].
#[inline(always)]
fn flat_mut<const L: usize, const N: usize>(x: &mut Groups<L, N>) -> &mut [f32] {
    x.0.as_flattened_mut()
}

/// The weight of largest magnitude of each group, as [`extreme`] finds it.
#[inline(always)]
fn extremes<const L: usize, const N: usize>(x: &Groups<L, N>) -> [f32; L] {
    let mut max = [0.0f32; L];
    for i in 0..N {
        for t in 0..L {
            let v = x.0[i][t];
            max[t] = choose(mask(max[t].abs() < v.abs()), v, max[t]);
        }
    }
    max
}

/// Each weight times itself.
#[inline(always)]
pub(super) fn squares<const L: usize, const N: usize>(x: &Groups<L, N>) -> Groups<L, N> {
    let mut w = Groups([[0.0; L]; N]);
    for (w, x) in flat_mut(&mut w).iter_mut().zip(flat(x)) {
        *w = x * x;
    }
    w
}

/// The scale for codes from `-half` to `half - 1`: least squares, weighed by `w`, over several
/// attempts.
#[inline(always)]
pub(super) fn symmetric<const L: usize, const N: usize>(
    half: i32,
    x: &Groups<L, N>,
    w: &Groups<L, N>,
) -> Scales<L> {
    let half = half as f32;
    let max = extremes(x);
    let mut wx = Groups([[0.0; L]; N]);
    for (wx, (w, x)) in flat_mut(&mut wx).iter_mut().zip(flat(w).iter().zip(flat(x))) {
        *wx = w * x;
    }
    let mut odd = 0;
    for x in flat(x) {
        odd |= mask(!x.is_finite());
    }
    let finite = odd == 0;
    let (mut best, mut scale, mut gain) = ([0.0; L], [0.0; L], [0.0; L]);
    // The plain scale first, then nine tenths of a step to either side.
    for n in 0..19u8 {
        let step = f32::from(n)
            - if n == 0 {
                0.0
            } else if n < 10 {
                10.0
            } else {
                9.0
            };
        let steps = half + 0.1 * step;
        let mut inverse = [0.0; L];
        for t in 0..L {
            inverse[t] = -steps / max[t];
        }
        // Half a step less to the upper limit, half a step more to the lower one.
        let (sum_xl, sum_l2) = match (finite, step) {
            (true, ..-5.5) => sums::<L, N, 0>(half, &inverse, x, &wx, w),
            (true, -5.5..4.5) => sums::<L, N, 1>(half, &inverse, x, &wx, w),
            (true, _) => sums::<L, N, 2>(half, &inverse, x, &wx, w),
            (false, _) => sums::<L, N, 3>(half, &inverse, x, &wx, w),
        };
        for t in 0..L {
            let (xl, l2) = (sum_xl[t], sum_l2[t]);
            let better = mask(n == 0) | mask(l2 > 0.0) & mask(xl * xl > gain[t] * l2);
            let new = if l2 != 0.0 { xl / l2 } else { 0.0 };
            best[t] = choose(better, inverse[t], best[t]);
            scale[t] = choose(better, new, scale[t]);
            gain[t] = choose(better, new * xl, gain[t]);
        }
    }
    let mut nan = 0;
    for t in 0..L {
        scale[t] = choose(mask(max[t].abs() < NOTHING), 0.0, scale[t]);
        nan |= mask(scale[t].is_nan());
    }
    if nan != 0 {
        for t in 0..L {
            if scale[t].is_nan() {
                scale[t] = first_nan(half, t, best[t], x, &wx, w);
            }
        }
    }
    Scales { scale, inverse: best }
}

/// The sums of one attempt of [`symmetric`]: what the codes have in common with the weights, and
/// their squares. Weights that are finite need a limit only where the range is stretched to it:
/// `LIMITS` is 0 for none, 1 for the upper one, 2 for both, 3 for weights of any kind.
#[inline(always)]
fn sums<const L: usize, const N: usize, const LIMITS: u8>(
    half: f32,
    inverse: &[f32; L],
    x: &Groups<L, N>,
    wx: &Groups<L, N>,
    w: &Groups<L, N>,
) -> ([f32; L], [f32; L]) {
    let (mut sum_xl, mut sum_l2) = ([0.0; L], [0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let v = inverse[t] * x.0[i][t];
            let mut l = if LIMITS == 3 { whole(v) } else { v + WHOLE - WHOLE };
            if LIMITS >= 2 {
                l = if l > -half { l } else { -half };
            }
            if LIMITS >= 1 {
                l = if l < half - 1.0 { l } else { half - 1.0 };
            }
            sum_xl[t] += wx.0[i][t] * l;
            sum_l2[t] += w.0[i][t] * l * l;
        }
    }
    (sum_xl, sum_l2)
}

/// The scale of [`symmetric`] where it is NaN: of several NaN that meet in a sum the first one
/// remains. Its payload decides the code of the scale, and compilers turn sums around.
fn first_nan<const L: usize, const N: usize>(
    half: f32,
    t: usize,
    inverse: f32,
    x: &Groups<L, N>,
    wx: &Groups<L, N>,
    w: &Groups<L, N>,
) -> f32 {
    let add = |sum: f32, term: f32| if sum.is_nan() { sum } else { sum + term };
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    for i in 0..N {
        let l = limit(whole(inverse * x.0[i][t]), -half, half - 1.0);
        sum_xl = add(sum_xl, wx.0[i][t] * l);
        sum_l2 = add(sum_l2, w.0[i][t] * l * l);
    }
    if sum_xl.is_nan() { sum_xl } else { sum_xl / sum_l2 }
}

/// Which codes [`settle`] may give, and what it asks of the sums.
#[derive(Clone, Copy)]
struct Codes {
    least: f32,
    most: f32,
    /// Whether codes are stored as bytes, which those below 0 do not fit, and whether a code is
    /// moved only where the others have a sum of squares.
    bytes: bool,
}

impl Codes {
    #[inline(always)]
    fn nearest(self, v: f32) -> f32 {
        limit(whole(v), self.least, self.most)
    }

    /// The code as it is read back.
    #[inline(always)]
    fn stored(self, l: f32) -> f32 {
        // A whole number plus 1.5 * 2^23 ends in its own bits.
        if self.bytes { ((l + WHOLE).to_bits() & 255) as f32 } else { l }
    }
}

/// Moves one code at a time to where the scale of the others would have it, as long as the fit
/// gains, five rounds at most. Codes start from `inverse`, and the least squares of the last ones
/// give the scale.
#[inline(always)]
fn settle<const L: usize, const N: usize>(
    how: Codes,
    inverse: &[f32; L],
    x: &Groups<L, N>,
    w: &Groups<L, N>,
    codes: &mut Groups<L, N>,
) -> [f32; L] {
    let (mut sum_xl, mut sum_l2) = ([0.0; L], [0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let (x, w) = (x.0[i][t], w.0[i][t]);
            let l = how.nearest(inverse[t] * x);
            sum_xl[t] += w * x * l;
            sum_l2[t] += w * l * l;
            codes.0[i][t] = how.stored(l);
        }
    }
    for _ in 0..5 {
        let mut moved = [0; L];
        for i in 0..N {
            for t in 0..L {
                let (x, w, l) = (x.0[i][t], w.0[i][t], codes.0[i][t]);
                let xl = sum_xl[t] - w * x * l;
                let l2 = sum_l2[t] - w * l * l;
                let new = how.nearest(x * l2 / xl);
                let (new_xl, new_l2) = (xl + w * x * new, l2 + w * new * new);
                let gains = mask(new_xl * new_xl * sum_l2[t] > sum_xl[t] * sum_xl[t] * new_l2);
                let sums = mask(if how.bytes { l2 > 0.0 } else { new_l2 > 0.0 });
                let better = mask(xl > 0.0) & mask(new != l) & sums & gains;
                codes.0[i][t] = choose(better, how.stored(new), l);
                sum_xl[t] = choose(better, new_xl, sum_xl[t]);
                sum_l2[t] = choose(better, new_l2, sum_l2[t]);
                moved[t] |= better;
            }
        }
        let mut any = 0;
        for t in 0..L {
            any |= moved[t];
        }
        if any == 0 {
            break;
        }
    }
    let mut scale = [0.0; L];
    for t in 0..L {
        scale[t] = if sum_l2[t] > 0.0 { sum_xl[t] / sum_l2[t] } else { 0.0 };
    }
    scale
}

/// Scale and codes of each group by another road than [`symmetric`]: from the plain scale on,
/// weights counting with their squares.
#[inline(always)]
pub(super) fn descend<const L: usize, const N: usize>(
    half: i32,
    x: &Groups<L, N>,
    codes: &mut Groups<L, N>,
) -> [f32; L] {
    let half = half as f32;
    let max = extremes(x);
    let mut inverse = [0.0; L];
    for t in 0..L {
        inverse[t] = -half / max[t];
    }
    let how = Codes { least: -half, most: half - 1.0, bytes: false };
    let mut scale = settle(how, &inverse, x, &squares(x), codes);
    for t in 0..L {
        scale[t] = choose(mask(max[t].abs() < NOTHING), 0.0, scale[t]);
    }
    for i in 0..N {
        for t in 0..L {
            let l = codes.0[i][t] + half;
            codes.0[i][t] = choose(mask(max[t].abs() < NOTHING), 0.0, l);
        }
    }
    scale
}

/// The scale that [`descend`] finds for groups in which no code moves, and a mask for the groups
/// in which one may. Moves are rare (one group of five has any), and without them weights do not
/// wait for each other.
#[inline(always)]
pub(super) fn at_rest<const L: usize, const N: usize>(half: i32, x: &Groups<L, N>) -> ([f32; L], [u32; L]) {
    let (x, half) = (&x.0, half as f32);
    let max = extremes(&Groups(*x));
    let mut inverse = [0.0; L];
    for t in 0..L {
        inverse[t] = -half / max[t];
    }
    let mut codes = Groups([[0.0; L]; N]);
    let (mut sum_xl, mut sum_l2) = ([0.0; L], [0.0; L]);
    for i in 0..N {
        for t in 0..L {
            let w = x[i][t] * x[i][t];
            let l = limit(whole(inverse[t] * x[i][t]), -half, half - 1.0);
            sum_xl[t] += w * x[i][t] * l;
            sum_l2[t] += w * l * l;
            codes.0[i][t] = l;
        }
    }
    let mut moves = [0; L];
    for i in 0..N {
        for t in 0..L {
            let (x, l) = (x[i][t], codes.0[i][t]);
            let w = x * x;
            let xl = sum_xl[t] - w * x * l;
            let l2 = sum_l2[t] - w * l * l;
            // A code stays where `x * l2 / xl` lies within half a step of it, or beyond the last
            // one, but not as far as `nearest` goes wrong. The margins cover the roundings, those
            // of tiny numbers too.
            let off = x * l2 - l * xl;
            let above = choose(mask(l < half - 1.0), 0.499, 1e6);
            let below = choose(mask(l > -half), 0.499, 1e6);
            let up = !mask(off <= above * xl - 1e-36);
            let down = !mask(-off <= below * xl - 1e-36);
            moves[t] |= mask(xl > 0.0) & (up | down);
        }
    }
    let mut scale = [0.0; L];
    for t in 0..L {
        let nothing = mask(max[t].abs() < NOTHING);
        scale[t] = choose(mask(sum_l2[t] > 0.0) & !nothing, sum_xl[t] / sum_l2[t], 0.0);
        moves[t] &= !nothing;
    }
    (scale, moves)
}

/// Scale and codes, `most` or less, of values that should be positive: the best of several
/// inverses, then as [`descend`]. Codes of negative values are the low bytes.
#[inline(always)]
pub(super) fn positive<const L: usize, const N: usize>(
    most: u8,
    x: &Groups<L, N>,
    w: &Groups<L, N>,
    codes: &mut Groups<L, N>,
) -> [f32; L] {
    let how = Codes { least: f32::NEG_INFINITY, most: most.into(), bytes: true };
    let mut max = [0.0f32; L];
    for i in 0..N {
        for t in 0..L {
            let v = x.0[i][t];
            max[t] = if max[t] > v { max[t] } else { v };
        }
    }
    let (mut best, mut least) = ([0.0; L], [0.0; L]);
    // The plain inverse first, then four tenths of a step to either side.
    for n in 0..9u8 {
        let step = f32::from(n) - if n < 5 { 5.0 } else { 4.0 };
        let steps = if n == 0 { how.most } else { 0.1 * step + how.most };
        let (mut inverse, mut scale, mut error) = ([0.0; L], [0.0; L], [0.0; L]);
        for t in 0..L {
            inverse[t] = steps / max[t];
            scale[t] = 1.0 / inverse[t];
        }
        for i in 0..N {
            for t in 0..L {
                let v = inverse[t] * x.0[i][t];
                let l = if n == 0 { how.stored(whole(v)) } else { how.nearest(v) };
                let off = x.0[i][t] - scale[t] * l;
                error[t] += w.0[i][t] * off * off;
            }
        }
        for t in 0..L {
            let better = mask(n == 0) | mask(error[t] < least[t]);
            best[t] = choose(better, inverse[t], best[t]);
            least[t] = choose(better, error[t], least[t]);
        }
    }
    let mut scale = settle(how, &best, x, w, codes);
    for t in 0..L {
        scale[t] = choose(mask(max[t] < NOTHING), 0.0, scale[t]);
    }
    for i in 0..N {
        for t in 0..L {
            codes.0[i][t] = choose(mask(max[t] < NOTHING), 0.0, codes.0[i][t]);
        }
    }
    scale
}
