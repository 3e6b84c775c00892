//! What IQ1_S and IQ1_M share: eight weights are a point of one grid, whose codes mean -1, 0 and 1,
//! all of them shifted up or down by an eighth.
//!
//! The search sorts a group and tries every way to cut it into lower, middle and upper weights,
//! with every combination of shifts; sums over the sorted weights give the scale of least squares
//! and its gain at once. Then each eight weights move to a point of the grid. [`GROUPS`] groups are
//! searched side by side: each keeps the order of its own sums and of its own attempts.
//! Source: `quantize_row_iq1_s_impl`, `quantize_row_iq1_m_impl`, `iq1_find_best_neighbour2`.

use super::grid::{Candidates, Grid, LANES, words};
use std::sync::OnceLock;

/// Groups that are searched side by side: all of a block of IQ1_M, those of two of IQ1_S.
pub(super) const GROUPS: usize = 16;

/// One number of each group.
pub(super) type Each = [f32; GROUPS];

/// By how much the codes are shifted.
pub(super) const SHIFT: f32 = 0.125;

/// What the codes mean when they are shifted up, and down.
pub(super) const UP: [f32; 3] = [-1.0 + SHIFT, SHIFT, 1.0 + SHIFT];
pub(super) const DOWN: [f32; 3] = [-1.0 - SHIFT, -SHIFT, 1.0 - SHIFT];

/// The points; code `i` in bits `2i` and `2i + 1`.
pub(super) static WORDS: [u16; 2048] = words(include_bytes!("../../formats/block/iq1_s.txt"));

/// The points and what lies near them, worked out once.
fn grid() -> &'static Grid<8> {
    static GRID: OnceLock<Grid<8>> = OnceLock::new();
    GRID.get_or_init(|| Grid::new(&WORDS, 3, 3))
}

/// What is done by means of the processor.
pub(super) trait Means {
    type Wide: Wide;
    /// The word with the least sum of `terms[j][code j]`, the first of several.
    fn nearest(near: &[Candidates], terms: &[[f32; 4]; 8]) -> u16;
}

/// What every processor has.
pub(super) struct Portable;

impl Means for Portable {
    type Wide = Each;

    #[inline(always)]
    fn nearest(near: &[Candidates], terms: &[[f32; 4]; 8]) -> u16 {
        let (mut word, mut least) = (near[0][0], f32::MAX);
        for candidates in near {
            let mut sums = [0.0; LANES];
            for (j, term) in terms.iter().enumerate() {
                for (sum, candidate) in sums.iter_mut().zip(candidates) {
                    let code = candidate >> (2 * j) & 3;
                    let upper = if code == 1 { term[1] } else { term[2] };
                    *sum += if code == 0 { term[0] } else { upper };
                }
            }
            for (sum, candidate) in sums.into_iter().zip(candidates) {
                if sum < least {
                    (word, least) = (*candidate, sum);
                }
            }
        }
        word
    }
}

#[inline(always)]
pub(super) fn transpose<const N: usize>(x: &[[f32; N]; GROUPS]) -> [Each; N] {
    let mut columns = [[0.0; GROUPS]; N];
    for (g, x) in x.iter().enumerate() {
        for (column, &x) in columns.iter_mut().zip(x) {
            column[g] = x;
        }
    }
    columns
}

/// Twice the mean square of a block.
#[inline(always)]
pub(super) fn deviation(x: &[f32; 256]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    2.0 * sum / 256.0
}

/// What each error of a group counts.
#[inline(always)]
pub(super) fn weigh<const N: usize>(x: &[f32; N], importance: &[f32], deviation: f32) -> [f32; N] {
    let mut weights = [0.0; N];
    for ((weight, x), importance) in weights.iter_mut().zip(x).zip(importance) {
        *weight = importance * (deviation + x * x).sqrt();
    }
    weights
}

/// How many weights of its group precede each, in ascending order; equals keep their order.
#[inline(always)]
fn ranks<W: Wide, const N: usize>(x: &[Each; N]) -> [[u32; GROUPS]; N] {
    // Counted as f32, from where the low bits are an integer.
    const ZERO: f32 = 8_388_608.0;
    let mut ranks = [W::splat(ZERO); N];
    let one = W::splat(1.0);
    for i in 0..N {
        let own = W::load(&x[i]);
        let mut rank = W::splat(ZERO + (N - 1 - i) as f32);
        for j in 0..i {
            let precedes = W::select(W::load(&x[j]).no_more(own), one, W::splat(0.0));
            rank = rank.add(precedes);
            ranks[j] = ranks[j].sub(precedes);
        }
        ranks[i] = rank;
    }
    let mut integers = [[0; GROUPS]; N];
    for (integers, rank) in integers.iter_mut().zip(ranks) {
        for (integer, rank) in integers.iter_mut().zip(rank.store()) {
            *integer = rank.to_bits() & 63;
        }
    }
    integers
}

/// One number of each group, in registers where there are any.
pub(super) trait Wide: Copy {
    type Mask: Copy;
    fn load(x: &Each) -> Self;
    fn store(self) -> Each;
    fn splat(x: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// Where it is not the greater one.
    fn no_more(self, other: Self) -> Self::Mask;
    /// Where `l2 > 0` and `a > b`.
    fn gains(l2: Self, a: Self, b: Self) -> Self::Mask;
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
}

impl Wide for Each {
    type Mask = [bool; GROUPS];

    #[inline(always)]
    fn load(x: &Each) -> Self {
        *x
    }

    #[inline(always)]
    fn store(self) -> Each {
        self
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; GROUPS]
    }

    #[inline(always)]
    fn add(mut self, other: Self) -> Self {
        for g in 0..GROUPS {
            self[g] += other[g];
        }
        self
    }

    #[inline(always)]
    fn sub(mut self, other: Self) -> Self {
        for g in 0..GROUPS {
            self[g] -= other[g];
        }
        self
    }

    #[inline(always)]
    fn mul(mut self, other: Self) -> Self {
        for g in 0..GROUPS {
            self[g] *= other[g];
        }
        self
    }

    #[inline(always)]
    fn div(mut self, other: Self) -> Self {
        for g in 0..GROUPS {
            self[g] /= other[g];
        }
        self
    }

    #[inline(always)]
    fn no_more(self, other: Self) -> Self::Mask {
        let mut mask = [false; GROUPS];
        for g in 0..GROUPS {
            mask[g] = self[g] <= other[g];
        }
        mask
    }

    #[inline(always)]
    fn gains(l2: Self, a: Self, b: Self) -> Self::Mask {
        let mut mask = [false; GROUPS];
        for g in 0..GROUPS {
            mask[g] = (l2[g] > 0.0) & (a[g] > b[g]);
        }
        mask
    }

    #[inline(always)]
    fn select(mask: Self::Mask, mut yes: Self, no: Self) -> Self {
        for g in 0..GROUPS {
            yes[g] = if mask[g] { yes[g] } else { no[g] };
        }
        yes
    }
}

/// The best attempt of each group so far.
#[derive(Clone, Copy)]
pub(super) struct Best<W> {
    gain: W,
    scale: W,
    /// See [`attempt`]; -1 before the first.
    attempt: W,
}

/// The number of an attempt: how many weights are low, how many low or in the middle, and which
/// combination of shifts. Exact as f32.
#[inline(always)]
pub(super) fn attempt(low: usize, middle: usize, kind: usize) -> f32 {
    (low | middle << 6 | kind << 12) as f32
}

impl<W: Wide> Best<W> {
    #[inline(always)]
    pub(super) fn none() -> Self {
        Self { gain: W::splat(-f32::MAX), scale: W::splat(0.0), attempt: W::splat(-1.0) }
    }

    /// Takes an attempt, where it gains: its sums of `w * x * level` and `w * level * level`.
    #[inline(always)]
    pub(super) fn offer(&mut self, xl: W, l2: W, attempt: f32) {
        let scale = xl.div(l2);
        let takes = W::gains(l2, xl.mul(xl), self.gain.mul(l2));
        self.gain = W::select(takes, scale.mul(xl), self.gain);
        self.scale = W::select(takes, scale, self.scale);
        self.attempt = W::select(takes, W::splat(attempt), self.attempt);
    }

    /// What it found, but for groups whose largest weight is below `nothing`.
    #[inline(always)]
    pub(super) fn taken<const N: usize>(self, x: &[Each; N], nothing: f32) -> Taken {
        let mut largest = [0.0; GROUPS];
        for x in x {
            for (largest, x) in largest.iter_mut().zip(x) {
                *largest = if *largest > x.abs() { *largest } else { x.abs() };
            }
        }
        let mut taken = Taken { scale: self.scale.store(), attempt: [-1; GROUPS] };
        let attempt = self.attempt.store();
        for g in 0..GROUPS {
            taken.attempt[g] = if largest[g] < nothing { -1 } else { attempt[g] as i32 };
        }
        taken
    }
}

/// The best attempts: scales, and [`attempt`] numbers, -1 where there is none.
pub(super) struct Taken {
    scale: Each,
    attempt: [i32; GROUPS],
}

/// A group with weights, importance and ranks, each column by column, and rows of the first two.
pub(super) struct Groups<'a, const N: usize> {
    pub x: &'a [[f32; N]; GROUPS],
    pub weights: &'a [[f32; N]; GROUPS],
    pub columns: [Each; N],
    pub weight_columns: [Each; N],
    pub ranks: [[u32; GROUPS]; N],
}

impl<'a, const N: usize> Groups<'a, N> {
    #[inline(always)]
    pub(super) fn new<W: Wide>(x: &'a [[f32; N]; GROUPS], weights: &'a [[f32; N]; GROUPS]) -> Self {
        let columns = transpose(x);
        Self { x, weights, columns, weight_columns: transpose(weights), ranks: ranks::<W, N>(&columns) }
    }
}

/// What the search found for each group, of `V` times eight weights.
pub(super) struct Found<const V: usize> {
    /// 0 where there was nothing to find.
    pub scale: Each,
    /// Combinations of shifts.
    pub kind: [u8; GROUPS],
    /// The points; the first where there was nothing to find.
    pub words: [[u16; V]; GROUPS],
}

/// Moves each eight weights to a point, and fits the scales of groups where that changed codes.
///
/// `down` says of each combination of shifts which eights it shifts down, the first in bit 0.
#[inline(always)]
pub(super) fn settle<M: Means, const N: usize, const V: usize>(
    groups: &Groups<N>,
    best: &Taken,
    down: &[u8],
) -> Found<V> {
    let mut found = Found { scale: [0.0; GROUPS], kind: [0; GROUPS], words: [[WORDS[0]; V]; GROUPS] };
    let mut vectors = [[0; GROUPS]; V];
    code_vectors(groups, best, &mut vectors);
    let mut shifts = [[SHIFT; GROUPS]; V];
    let mut moved = [false; GROUPS];
    for g in 0..GROUPS {
        if best.attempt[g] < 0 {
            continue;
        }
        let kind = (best.attempt[g] >> 12) as usize;
        // A negative scale turns all signs, those of the shifts too.
        let kind = if best.scale[g] < 0.0 { down.len() - 1 - kind } else { kind };
        found.kind[g] = kind as u8;
        found.scale[g] = best.scale[g].abs();
        for v in 0..V {
            let levels = if down[kind] >> v & 1 == 0 { &UP } else { &DOWN };
            shifts[v][g] = levels[1];
            let near = grid().find(vectors[v][g] as usize);
            found.words[g][v] = if near.exact {
                near.near[0][0]
            } else {
                moved[g] = true;
                let (x, weights) = (&groups.x[g].as_chunks().0[v], &groups.weights[g].as_chunks().0[v]);
                M::nearest(near.near, &terms(x, weights, found.scale[g], levels))
            };
        }
    }
    let fitted = fit(groups, &found.words, &shifts);
    for g in 0..GROUPS {
        if moved[g] && fitted[g] > 0.0 {
            found.scale[g] = fitted[g];
        }
        // ggml stops at a NaN.
        if found.scale[g].is_nan() {
            found.scale[g] = 0.0;
        }
    }
    found
}

/// The codes of the best attempt, as the grid numbers them.
#[inline(always)]
fn code_vectors<const N: usize, const V: usize>(
    groups: &Groups<N>,
    best: &Taken,
    vectors: &mut [[i32; GROUPS]; V],
) {
    for (vector, ranks) in vectors.iter_mut().zip(groups.ranks.as_chunks::<8>().0) {
        for rank in ranks.iter().rev() {
            for g in 0..GROUPS {
                let (low, middle) = ((best.attempt[g] & 63) as u32, (best.attempt[g] >> 6 & 63) as u32);
                let code = i32::from(rank[g] >= low) + i32::from(rank[g] >= middle);
                let code = if best.scale[g] < 0.0 { 2 - code } else { code };
                vector[g] = 3 * vector[g] + code;
            }
        }
    }
}

/// The weighted squares of the errors that each code would leave.
#[inline(always)]
fn terms(x: &[f32; 8], weights: &[f32; 8], scale: f32, levels: &[f32; 3]) -> [[f32; 4]; 8] {
    let mut terms = [[0.0; 4]; 8];
    for ((term, x), w) in terms.iter_mut().zip(x).zip(weights) {
        for (term, level) in term.iter_mut().zip(levels) {
            let error = scale * level - x;
            *term = w * error * error;
        }
    }
    terms
}

/// The scales of least squares for points, 0 where there is none.
#[inline(always)]
fn fit<const N: usize, const V: usize>(
    groups: &Groups<N>,
    words: &[[u16; V]; GROUPS],
    shifts: &[[f32; GROUPS]; V],
) -> Each {
    let (mut sum_xl, mut sum_l2) = ([0.0; GROUPS], [0.0; GROUPS]);
    for v in 0..V {
        let mut rest = [0; GROUPS];
        for g in 0..GROUPS {
            rest[g] = i32::from(words[g][v]);
        }
        let columns = groups.columns.as_chunks::<8>().0[v].iter();
        for (x, w) in columns.zip(&groups.weight_columns.as_chunks::<8>().0[v]) {
            for g in 0..GROUPS {
                let level = ((rest[g] & 3) - 1) as f32 + shifts[v][g];
                rest[g] >>= 2;
                sum_xl[g] += w[g] * level * x[g];
                sum_l2[g] += w[g] * level * level;
            }
        }
    }
    for (xl, l2) in sum_xl.iter_mut().zip(sum_l2) {
        *xl = if *xl > 0.0 && l2 > 0.0 { *xl / l2 } else { 0.0 };
    }
    sum_xl
}

/// The index of the point of a word.
pub(super) fn point(word: u16) -> u16 {
    grid().point(word)
}

/// The largest of the scales.
pub(super) fn greatest(scales: &[f32]) -> f32 {
    scales.iter().fold(0.0, |most: f32, &s| if most > s { most } else { s })
}
