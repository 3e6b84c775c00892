//! The search for scale and points of a group, once for IQ2 and IQ3.
//!
//! A group's weights are made positive first. Attempts with several inverses of the scale then
//! round them to codes, each vector of codes to a point of the grid, and the attempt wins whose
//! points lie closest after a scale of least squares. Attempts do not depend on each other, so that
//! what is done for each weight runs over `A` attempts side by side; points are compared eight at a
//! time. Every sum keeps the order of its terms, and ties are settled in ggml's order.
//! Source: `quantize_row_iq2_xxs_impl` and its siblings (`ggml-quants.c`).
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::grid::{Candidates, Grid, LANES};
use super::kquant::nearest;

/// Compares candidates: what implementations do differently.
pub(super) trait Closest {
    /// For each of two scales, the word of the candidate `c` for which
    /// `sum(root * (scale * q - x)^2)` is least, where `q` is twice a code of `c` plus 1: the first
    /// among equals, the very first where no sum is finite. And whether the others' sums are beyond
    /// its own and [`margin`].
    ///
    /// A candidate's sum less another's is `scale * (a * scale - b)`, and so changes its sign once
    /// at most: who wins at both ends of a range of scales wins between, but for roundings. These
    /// cannot matter where the margin is kept at both ends.
    fn closest<const D: usize>(
        near: &[Candidates],
        x: &[f32; D],
        root: &[f32; D],
        scales: [f32; 2],
        slack: f32,
    ) -> ([u16; 2], [bool; 2]);

    /// Adds, for each attempt, what the weights of its point add to the sums of `w * x * q` and
    /// `w * q * q`.
    fn add<const D: usize, const A: usize>(
        words: &[u32; A],
        x: &[f32; D],
        weight: &[f32; D],
        xq: &mut [f32; A],
        q2: &mut [f32; A],
    );
}

/// By how much the winner's sum `least` has to undercut the others.
///
/// With `u` = 2^-24 and `s` = `sum(root * (scale * most)^2)`, a sum of at most eight terms is off by
/// `12 u` of itself and `u * s` at most. Within a range of scales up to 1.5 times the least, a sum `f`
/// of one end stays below `2 f + s / 2`, and the difference of two sums changes no faster than the
/// scale. So `97 u` of the least sum and `28 u * s` at both ends are enough for the winner's computed
/// sum to be the least between them.
#[inline(always)]
pub(super) fn margin(scale: f32, slack: f32, least: f32) -> f32 {
    const SHARE: f32 = 128.0 / 16_777_216.0;
    scale * scale * slack + least * SHARE + 1e-30
}

/// [`Closest`] as the compiler vectorizes it.
pub(super) struct Portable;

impl Closest for Portable {
    #[inline(always)]
    fn closest<const D: usize>(
        near: &[Candidates],
        x: &[f32; D],
        root: &[f32; D],
        scales: [f32; 2],
        slack: f32,
    ) -> ([u16; 2], [bool; 2]) {
        // The least sum with its word, and the least of all others.
        let mut best = [(f32::MAX, near[0][0]); 2];
        let mut second = [f32::INFINITY; 2];
        for words in near {
            let mut sums = [[0.0; LANES]; 2];
            for i in 0..D {
                for c in 0..LANES {
                    let value = value::<D>(words[c].into(), i);
                    for e in 0..2 {
                        let diff = scales[e] * value - x[i];
                        sums[e][c] += root[i] * diff * diff;
                    }
                }
            }
            for e in 0..2 {
                for c in 0..LANES {
                    if sums[e][c] < best[e].0 {
                        second[e] = best[e].0;
                        best[e] = (sums[e][c], words[c]);
                    } else if words[c] != best[e].1 && sums[e][c] < second[e] {
                        second[e] = sums[e][c];
                    }
                }
            }
        }
        let (mut words, mut sure) = ([0; 2], [false; 2]);
        for e in 0..2 {
            words[e] = best[e].1;
            sure[e] = second[e] > best[e].0 + margin(scales[e], slack, best[e].0);
        }
        (words, sure)
    }

    #[inline(always)]
    fn add<const D: usize, const A: usize>(
        words: &[u32; A],
        x: &[f32; D],
        weight: &[f32; D],
        xq: &mut [f32; A],
        q2: &mut [f32; A],
    ) {
        for i in 0..D {
            for a in 0..A {
                let q = value::<D>(words[a], i);
                xq[a] += weight[i] * x[i] * q;
                q2[a] += weight[i] * q * q;
            }
        }
    }
}

/// Twice code `i` of a word plus 1.
#[inline(always)]
pub(super) fn value<const D: usize>(word: u32, i: usize) -> f32 {
    let bits = if D == 8 { 2 } else { 3 };
    ((word as i32 >> (bits * i)) & ((1 << bits) - 1)) as f32 * 2.0 + 1.0
}

/// Weights of a group, as the search takes them.
#[derive(Clone, Copy)]
pub(super) struct Group<const D: usize, const K: usize> {
    /// Magnitudes; one in eight may be below zero where signs are even in number.
    pub x: [[f32; D]; K],
    /// How much the error of each counts.
    pub weight: [[f32; D]; K],
    /// Its square root, which counts between points.
    root: [[f32; D]; K],
    /// Signs of eight weights each.
    pub signs: [u8; 4],
    /// The greatest of `x`.
    pub max: f32,
}

/// What a search found. Points are words: [`Grid::point`] tells which ones.
pub(super) struct Fit<const K: usize> {
    /// Never below zero.
    pub scale: f32,
    pub words: [u16; K],
    /// Whether the signs have to change: a scale came out below zero.
    pub flip: bool,
}

/// How the types differ.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// Codes of a weight.
    pub levels: usize,
    /// Attempts to either side of the plain scale, and how far apart.
    pub attempts: usize,
    pub step: f32,
    /// Which points are sought anew for the scale that was found.
    pub again: Again,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Again {
    /// Those of code vectors that were no points.
    Inexact,
    /// All, if one of the code vectors was no point, or no attempt was any good.
    AllIfInexact,
    /// All.
    All,
}

impl<const D: usize, const K: usize> Group<D, K> {
    /// A group to be filled.
    pub(super) const EMPTY: Self =
        Self { x: [[0.0; D]; K], weight: [[0.0; D]; K], root: [[0.0; D]; K], signs: [0; 4], max: 0.0 };

    /// `even`: signs that are odd in number change, by the one that costs least.
    #[inline(always)]
    pub(super) fn new(weights: &[[f32; D]; K], weight: [[f32; D]; K], even: bool) -> Self {
        let (mut x, mut root, mut signs) = (*weights, weight, [0; 4]);
        for root in root.as_flattened_mut() {
            *root = root.sqrt();
        }
        let eights = x.as_flattened_mut().as_chunks_mut::<8>().0.iter_mut();
        let weight_eights = weight.as_flattened().as_chunks::<8>().0;
        for ((x, w), signs) in eights.zip(weight_eights).zip(&mut signs) {
            let mut least = (0, w[0] * x[0] * x[0]);
            for i in 0..8 {
                let cost = w[i] * x[i] * x[i];
                if cost < least.1 {
                    least = (i, cost);
                }
                // NaN counts as negative.
                let plus = x[i] >= 0.0;
                *signs |= u8::from(!plus) << i;
                x[i] = if plus { x[i] } else { -x[i] };
            }
            if even {
                if signs.count_ones() % 2 == 1 {
                    x[least.0] = -x[least.0];
                    *signs ^= 1 << least.0;
                }
                *signs &= 127;
            }
        }
        let mut max = x[0][0];
        for &x in x.as_flattened() {
            max = if max > x { max } else { x };
        }
        Self { x, weight, root, signs, max }
    }

    /// What group `k` gives to [`margin`]: infinite where sums might not be finite.
    #[inline(always)]
    fn slack(&self, k: usize, levels: usize) -> f32 {
        let (mut sum, mut farthest) = (0.0, 0.0);
        for i in 0..D {
            sum += self.root[k][i];
            farthest += self.x[k][i].abs();
        }
        let most = (2 * levels - 1) as f32;
        const SHARE: f32 = 32.0 / 16_777_216.0;
        if sum < 1e15 && farthest < 1e15 { SHARE * most * most * sum } else { f32::INFINITY }
    }

    /// The signs to store after the search.
    pub(super) fn signs(&self, flip: bool, even: bool) -> [u8; 4] {
        self.signs.map(|s| if flip { !s & if even { 127 } else { 255 } } else { s })
    }

    /// The best of all attempts: with the inverse scale `(most + step * n) / max`, where `most` is
    /// the largest value of a code. `scale` is what remains where none is any good.
    #[inline(always)]
    pub(super) fn search<V: Closest, const A: usize>(
        &self,
        grid: &Grid<D>,
        rules: Rules,
        max: f32,
        scale: f32,
    ) -> Fit<K> {
        let Rules { levels, attempts, step, again } = rules;
        let mut inverses = [0.0; A];
        for a in 0..A {
            let n = (a as i32 - attempts as i32) as f32;
            inverses[a] = ((2 * levels - 1) as f32 + n * step) / max;
        }
        // Words of the points, and a bit for each attempt whose code vector was one. Runs of words
        // are written by eights, beyond their end into what follows.
        let mut words = [[0u32; A]; 9];
        let mut exact = [0u32; K];
        for k in 0..K {
            let mut index = [0i32; A];
            for i in (0..D).rev() {
                for a in 0..A {
                    index[a] = index[a] * levels as i32 + code(inverses[a], self.x[k][i], levels);
                }
            }
            let mut changes = 1 << (2 * attempts + 1);
            for a in 1..A {
                changes |= u32::from(index[a] != index[a - 1]) << a;
            }
            let words = &mut words.as_flattened_mut()[k * A..];
            let (x, root, slack) = (&self.x[k], &self.root[k], self.slack(k, levels));
            let mut start = 0;
            while start <= 2 * attempts {
                let end = changes.trailing_zeros() as usize;
                changes &= changes - 1;
                let found = grid.find(index[start] as usize);
                if found.exact {
                    exact[k] |= (1 << end) - (1 << start);
                    fill(words, start, end, found.near[0][0]);
                } else {
                    let near = found.near;
                    let scales = [1.0 / inverses[start], 1.0 / inverses[end - 1]];
                    let (ends, sure) = V::closest(near, x, root, scales, slack);
                    fill(words, start, end, ends[0]);
                    if ends[0] != ends[1] || !sure[0] || !sure[1] {
                        for a in (start + 1..end - 1).step_by(2) {
                            let scales = [1.0 / inverses[a], 1.0 / inverses[a + 1]];
                            let (two, _) = V::closest(near, x, root, scales, slack);
                            (words[a], words[a + 1]) = (two[0].into(), two[1].into());
                        }
                        words[end - 1] = ends[1].into();
                    }
                }
                start = end;
            }
        }
        let (mut xq, mut q2) = ([0.0; A], [0.0; A]);
        for k in 0..K {
            V::add(&words[k], &self.x[k], &self.weight[k], &mut xq, &mut q2);
        }
        // What follows is done for every attempt, so that the choice needs no branches.
        let (mut squares, mut scales, mut gains) = ([0.0; A], [0.0; A], [0.0; A]);
        for a in 0..A {
            squares[a] = if q2[a] > 0.0 { xq[a] * xq[a] } else { -1.0 };
            scales[a] = xq[a] / q2[a];
            gains[a] = scales[a] * xq[a];
        }
        let (mut gain, mut best) = (0.0, A);
        for a in 0..=2 * attempts {
            let better = squares[a] > gain * q2[a];
            gain = if better { gains[a] } else { gain };
            best = if better { a } else { best };
        }
        let mut scale = if best < A { scales[best] } else { scale };
        let mut chosen = [0; K];
        let mut renew = [again != Again::Inexact; K];
        if best < A {
            let mut all_exact = true;
            for k in 0..K {
                let exact = exact[k] >> best & 1 != 0;
                chosen[k] = words[k][best] as u16;
                renew[k] |= !exact;
                all_exact &= exact;
            }
            if all_exact && again == Again::AllIfInexact {
                renew = [false; K];
            }
        }
        if scale > 0.0 && renew.contains(&true) {
            let inverse = 1.0 / scale;
            for k in 0..K {
                if renew[k] {
                    let mut index = 0;
                    for i in (0..D).rev() {
                        index = index * levels + code(inverse, self.x[k][i], levels) as usize;
                    }
                    let found = grid.find(index);
                    chosen[k] = found.near[0][0];
                    if !found.exact {
                        let (words, _) = V::closest(found.near, &self.x[k], &self.root[k], [scale; 2], 0.0);
                        chosen[k] = words[0];
                    }
                }
            }
            let (mut xq, mut q2) = (0.0, 0.0);
            for k in 0..K {
                for i in 0..D {
                    let (x, w, q) = (self.x[k][i], self.weight[k][i], value::<D>(chosen[k].into(), i));
                    xq += w * x * q;
                    q2 += w * q * q;
                }
            }
            if q2 > 0.0 {
                scale = xq / q2;
            }
        }
        Fit { scale: scale.abs(), words: chosen, flip: scale < 0.0 }
    }
}

/// Writes `word` to `words[start..end]` and up to seven places beyond.
#[inline(always)]
fn fill(words: &mut [u32], mut start: usize, end: usize, word: u16) {
    while start < end {
        words[start..start + LANES].fill(word.into());
        start += LANES;
    }
}

/// The code of `x`.
#[inline(always)]
fn code(inverse: f32, x: f32, levels: usize) -> i32 {
    let code = nearest(0.5 * (inverse * x - 1.0));
    let most = levels as i32 - 1;
    let code = if code < 0 { 0 } else { code };
    if code > most { most } else { code }
}

/// The sum of the squares of a block.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32; 256]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    sum
}

/// Whether no group has a scale.
pub(super) fn is_nothing(scales: &[f32]) -> bool {
    scales.iter().all(|s| *s == 0.0)
}

/// The scale of a block, and of each group: `d` such that the greatest is `31 d`, and codes `0..16`
/// that stand for `d * (2 code + 1)`. Zeros where no scale is above zero.
#[inline(always)]
pub(super) fn scales<const G: usize>(found: &[f32; G]) -> (f32, [u8; G]) {
    if is_nothing(found) {
        return (0.0, [0; G]);
    }
    let mut max = 0.0;
    for &scale in found {
        max = if max > scale { max } else { scale };
    }
    let d = max / 31.0;
    let inverse = 1.0 / d;
    let mut codes = [0; G];
    for (code, scale) in codes.iter_mut().zip(found) {
        *code = nearest(0.5 * (inverse * scale - 1.0)).clamp(0, 15) as u8;
    }
    (d, codes)
}

/// Sixteen codes of four bits, the first of two in the low half.
pub(super) fn halves(codes: &[u8; 16]) -> [u8; 8] {
    std::array::from_fn(|n| codes[2 * n] | codes[2 * n + 1] << 4)
}

/// How much errors count without an importance: the square and `more`.
#[inline(always)]
pub(super) fn squares<const D: usize, const K: usize>(x: &[[f32; D]; K], more: f32) -> [[f32; D]; K] {
    let mut weight = *x;
    for w in weight.as_flattened_mut() {
        *w = more + *w * *w;
    }
    weight
}

/// How much errors count with an importance: its product with the root of the sum of `sigma2` and
/// the square.
#[inline(always)]
pub(super) fn weigh<const D: usize, const K: usize>(
    x: &[[f32; D]; K],
    importance: &[[f32; D]; K],
    sigma2: f32,
) -> [[f32; D]; K] {
    let mut weight = *importance;
    for (w, x) in weight.as_flattened_mut().iter_mut().zip(x.as_flattened()) {
        *w *= (sigma2 + x * x).sqrt();
    }
    weight
}

#[cfg(test)]
mod tests {
    use crate::block::implementations;
    use crate::tensor::DType;

    /// Where ggml stops the process: squares that overflow, and what is not finite.
    #[test]
    fn anything_is_encoded() {
        let finite = [f32::MAX, -1e30, 1.0, 0.0, f32::MIN_POSITIVE, -0.3, 1e-40];
        let other = [f32::NAN, 1.0, f32::INFINITY, -f32::NAN, 1e38, f32::NEG_INFINITY, 0.0];
        for dtype in [DType::IQ2_XXS, DType::IQ2_XS, DType::IQ2_S, DType::IQ3_XXS, DType::IQ3_S] {
            for (values, agree) in [(finite, true), (other, false)] {
                let x: Vec<f32> = (0..2048).map(|i| values[(i * i / 3 + i / 11) % 7]).collect();
                let importance: Vec<f32> = x.iter().map(|x| x.abs()).collect();
                let encoded: Vec<Vec<u8>> = implementations(dtype)
                    .map(|codec| {
                        let mut bytes = vec![0; dtype.bytes_for(2048).unwrap() as usize];
                        codec.encode(&x, 2048, Some(&importance), &mut bytes).unwrap();
                        bytes
                    })
                    .collect();
                assert!(!agree || encoded.iter().all(|e| *e == encoded[0]), "{dtype}");
            }
        }
    }
}
