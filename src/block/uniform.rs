//! Integers in groups, as quantized checkpoints hold them: a weight is `(code - zero) * scale`.
//!
//! [`round`] takes each group's scale from its ends, as AutoGPTQ does, or, of ternary weights, by least squares.
//! [`weigh`] searches for the scale and the zero of the least weighed squared error. Methods that know more see a [`Lattice`], whose blocks are
//! groups: scale as F16, zero, and a byte for each code.

use super::groups::{LANES, WHOLE};
use super::lattice::{half, whole};
use super::ternary::threshold;
use super::{Lattice, f16_from_f32, f32_from_f16};
use crate::container::grouped::{Rows, Shape};
use crate::error::{Error, Result};

/// Integers, and how groups share scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// How many codes there are, from 0 on: 2 to the power of their bits, or [`TERNARY`].
    pub levels: u16,
    /// Columns of a group; `None` for one group in a row.
    pub group_size: Option<u64>,
    /// Whether all zeros are the middle code.
    pub symmetric: bool,
    /// The least zero that can be stored.
    pub least_zero: u8,
}

/// Codes of weights that are -1, 0 and 1 times a scale.
pub const TERNARY: u16 = 3;
/// What codes stand for, once their zero is taken away.
static LEVELS: [f32; 384] = whole(-128);
/// Where 0 stands there.
const NAUGHT: usize = 128;
/// Bytes of a block before its codes.
const HEAD: usize = 3;
/// The greatest number of F16.
const MOST_SCALE: f32 = 65504.0;
/// The least number of F16 but for 0.
const LEAST_SCALE: f32 = 1.0 / (1 << 24) as f32;

impl Grid {
    /// The size of a matrix on this grid.
    pub fn shape(&self, rows: u64, cols: u64) -> Shape {
        let group_size = self.group_size.unwrap_or(cols).max(1);
        Shape { rows, cols, bits: self.bits(), group_size, groups: cols.div_ceil(group_size) }
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        u16::BITS - self.levels.saturating_sub(1).leading_zeros()
    }

    /// The middle code.
    pub fn middle(&self) -> u8 {
        (self.levels / 2) as u8
    }

    /// Whether codes are the digits of ternary weights.
    pub fn is_ternary(&self) -> bool {
        self.levels == TERNARY
    }

    /// For rows of so many columns, of which the last group may have fewer than the others.
    ///
    /// # Errors
    /// `Misuse` when there are no columns, or codes are not 2 to 256.
    pub fn lattice(&self, cols: u64) -> Result<Lattice> {
        let row = usize::try_from(cols).ok().filter(|n| *n > 0 && n.checked_add(HEAD).is_some());
        let (Some(row), 2..=256) = (row, self.levels) else {
            return Err(Error::misuse(format!("rows of {cols} with {} codes", self.levels)));
        };
        let size = self.shape(0, cols).group_size.min(cols) as usize;
        let first = if self.symmetric { NAUGHT - usize::from(self.middle()) } else { NAUGHT };
        let levels = &LEVELS[first..first + usize::from(self.levels)];
        Ok(Lattice::of_grid(*self, row, size, HEAD + size, levels))
    }

    fn most(&self) -> f32 {
        f32::from(self.levels) - 1.0
    }

    /// Scale (a number of F16) and zero for weights from `low` to `high`, as AutoGPTQ's
    /// `Quantizer.find_params` has them: these, and 0 between them, are at the ends of the codes.
    fn line(&self, (low, high): (f32, f32)) -> Line {
        let span = if self.symmetric { 2.0 * high.max(-low) } else { high - low };
        let half = |x: f32| f32_from_f16(f16_from_f32(x));
        // Below, F16 has no number but 0.
        let scale = half(span / self.most()).max(LEAST_SCALE);
        let zero = match self.symmetric {
            true => self.middle(),
            false => self.nearest_zero(-low / scale),
        };
        Line { scale, zero }
    }

    /// That of a ternary group.
    fn ternary_line(&self, weights: &[f32], importance: &[f32]) -> Line {
        Line { scale: storable(threshold(weights, importance)), zero: self.middle() }
    }

    fn nearest_zero(&self, zero: f32) -> u8 {
        zero.round_ties_even().clamp(self.least_zero.into(), self.most()) as u8
    }

    /// The least and greatest that codes stand for.
    fn limits(&self, zero: u8) -> (f32, f32) {
        (-f32::from(zero), self.most() - f32::from(zero))
    }

    /// The code next to each weight.
    fn codes(&self, line: Line, weights: &[f32], codes: &mut [u8]) {
        let (inverse, (low, high)) = (1.0 / line.scale, self.limits(line.zero));
        for (code, w) in codes.iter_mut().zip(weights) {
            let near = limited(w * inverse, low, high) + WHOLE;
            *code = (near.to_bits() as u8).wrapping_add(line.zero);
        }
    }

    /// The error if all weights are finite, and F16 has a scale for each group.
    ///
    /// # Errors
    /// `Malformed` otherwise.
    pub fn check(&self, weights: &[f32], cols: u64) -> Result<()> {
        let size = self.shape(0, cols).group_size as usize;
        let fits = |group: &[f32]| ends(group).is_some_and(|ends| self.line(ends).scale.is_finite());
        match weights.chunks(cols.max(1) as usize).flat_map(|row| row.chunks(size)).all(fits) {
            true => Ok(()),
            false => Err(too_large()),
        }
    }

    /// Puts the codes and lines of encoded blocks of whole rows into `rows`.
    ///
    /// # Errors
    /// As [`Self::lattice`].
    pub fn unpack(&self, blocks: &[u8], cols: u64, rows: &mut Rows) -> Result<()> {
        let lattice = self.lattice(cols)?;
        let (size, row) = (lattice.block_size, cols as usize);
        let groups = lattice.groups(row);
        rows.codes.clear();
        rows.scales.clear();
        rows.zeros.clear();
        for (g, block) in blocks.chunks_exact(HEAD + size).enumerate() {
            let line = Line::of(block);
            rows.scales.push(line.scale);
            rows.zeros.push(line.zero.into());
            let wide = size.min(row - g % groups * size);
            rows.codes.extend_from_slice(&block[HEAD..][..wide]);
        }
        Ok(())
    }

    pub(super) fn lines(&self, size: usize, bytes: &[u8], lines: &mut [(f32, f32)]) {
        for (line, block) in lines.iter_mut().zip(bytes.chunks_exact(HEAD + size)) {
            let Line { scale, zero } = Line::of(block);
            *line = (scale, if self.symmetric { 0.0 } else { -scale * f32::from(zero) });
        }
    }

    pub(super) fn put(&self, row: usize, size: usize, codes: &[u8], bytes: &mut [u8]) {
        let groups = codes.chunks_exact(row).flat_map(|row| row.chunks(size));
        for (codes, block) in groups.zip(bytes.chunks_exact_mut(HEAD + size)) {
            block[HEAD..][..codes.len()].copy_from_slice(codes);
        }
    }

    /// Scale and offset of one block.
    pub(super) fn set(&self, (scale, offset): (f32, f32), block: &mut [u8]) {
        let scale = storable(scale);
        let zero = if self.symmetric { self.middle() } else { self.nearest_zero(-offset / scale) };
        Line { scale, zero }.store(block);
    }

    pub(super) fn decode(&self, row: usize, size: usize, bytes: &[u8], weights: &mut [f32]) {
        let groups = weights.chunks_exact_mut(row).flat_map(|row| row.chunks_mut(size));
        for (weights, block) in groups.zip(bytes.chunks_exact(HEAD + size)) {
            let Line { scale, zero } = Line::of(block);
            for (w, code) in weights.iter_mut().zip(&block[HEAD..]) {
                *w = (f32::from(*code) - f32::from(zero)) * scale;
            }
        }
    }

    /// Encodes rows by the search, in groups of `size`.
    pub(super) fn encode(&self, size: usize, weights: &[f32], importance: &[f32], bytes: &mut [u8]) {
        let mut group = Group::default();
        let rows = weights.chunks_exact(importance.len());
        let groups = rows.flat_map(|row| row.chunks(size).zip(importance.chunks(size)));
        for ((weights, importance), block) in groups.zip(bytes.chunks_exact_mut(HEAD + size)) {
            group.take(weights, importance);
            let line = match self.is_ternary() {
                true => self.ternary_line(&group.weights, &group.importance),
                false => group.search(self),
            };
            line.store(block);
            self.codes(line, &group.weights, &mut block[HEAD..][..weights.len()]);
        }
    }
}

/// Scale and zero of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    scale: f32,
    zero: u8,
}

impl Line {
    fn of(block: &[u8]) -> Self {
        Self { scale: f32_from_f16(u16::from_le_bytes([block[0], block[1]])), zero: block[2] }
    }

    fn store(self, block: &mut [u8]) {
        block[..2].copy_from_slice(&half(self.scale));
        block[2] = self.zero;
    }
}

/// The number of F16 next to a scale, other than 0.
fn storable(scale: f32) -> f32 {
    let stored = f32_from_f16(f16_from_f32(scale.clamp(-MOST_SCALE, MOST_SCALE)));
    if stored == 0.0 { LEAST_SCALE.copysign(scale) } else { stored }
}

#[inline(always)]
fn limited(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// The least and the greatest weight, or 0 beyond; `None` where a weight is not finite.
fn ends(weights: &[f32]) -> Option<(f32, f32)> {
    let (mut low, mut high, mut nothing) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let (lanes, rest) = weights.as_chunks::<LANES>();
    let mut add = |weights: &[f32; LANES]| {
        for (k, &w) in weights.iter().enumerate() {
            low[k] = if w < low[k] { w } else { low[k] };
            high[k] = if w > high[k] { w } else { high[k] };
            // NaN for what is not finite.
            nothing[k] += w * 0.0;
        }
    };
    lanes.iter().for_each(&mut add);
    let mut last = [0f32; LANES];
    last[..rest.len()].copy_from_slice(rest);
    add(&last);
    let fold = |lanes: [f32; LANES], with: fn(f32, f32) -> f32| lanes.into_iter().fold(0.0, with);
    (nothing == [0.0; LANES]).then(|| (fold(low, f32::min), fold(high, f32::max)))
}

fn too_large() -> Error {
    Error::malformed("weights are NaN, infinite, or too large for a scale in F16")
}

/// Rounds whole rows of `cols` weights, each to the next code, with the scales of AutoGPTQ's
/// `Quantizer.find_params`; ternary ones with those of least squares.
///
/// # Errors
/// `Malformed` for weights that are not finite, or too large for a scale in F16.
pub fn round(grid: &Grid, weights: &[f32], cols: u64, rows: &mut Rows) -> Result<()> {
    let (size, cols) = (grid.shape(0, cols).group_size as usize, cols.max(1) as usize);
    let even = vec![1.0; if grid.is_ternary() { size.min(cols) } else { 0 }];
    rows.codes.resize(weights.len(), 0);
    rows.scales.clear();
    rows.zeros.clear();
    for (weights, codes) in weights.chunks_exact(cols).zip(rows.codes.chunks_exact_mut(cols)) {
        for (weights, codes) in weights.chunks(size).zip(codes.chunks_mut(size)) {
            let line = ends(weights).map(|ends| grid.line(ends)).filter(|line| line.scale.is_finite());
            let mut line = line.ok_or_else(too_large)?;
            if grid.is_ternary() {
                line = grid.ternary_line(weights, &even[..weights.len()]);
            }
            grid.codes(line, weights, codes);
            rows.scales.push(line.scale);
            rows.zeros.push(line.zero.into());
        }
    }
    Ok(())
}

/// Rounds whole rows of `cols` weights with the scale and zero of each group that are found to lose least: the
/// sum of squares, those of each column times its `importance`.
///
/// # Errors
/// As [`round`]; `Misuse` where `importance` has not one value for each column.
pub fn weigh(grid: &Grid, weights: &[f32], cols: u64, importance: &[f32], rows: &mut Rows) -> Result<()> {
    let lattice = grid.lattice(cols)?;
    grid.check(weights, cols)?;
    let mut blocks = vec![0; lattice.bytes(weights.len())];
    lattice.encode(weights, cols as usize, importance, &mut blocks)?;
    grid.unpack(&blocks, cols, rows)
}

/// The weights of a group, and what the square of each error counts: at most 1.
#[derive(Default)]
struct Group {
    weights: Vec<f32>,
    importance: Vec<f32>,
}

/// What comes of trying a scale and a zero.
#[derive(Clone, Copy)]
struct Attempt {
    /// What is lost with them.
    lost: f64,
    /// The scale of least squares for the same codes, and what is lost with that.
    scale: f32,
    zero: u8,
    cost: f64,
}

/// The greatest scale that is tried, in parts of the one that lets no weight be clipped.
const FIRST: f32 = 1.1;
/// Each further scale, in parts of the one before.
const RATIO: f32 = 0.93;
/// So many that are no better end it.
const PATIENCE: usize = 4;
/// How far scales around the best are tried in the end.
const NEAR: [f32; 3] = [0.03, 0.015, 0.007];

impl Group {
    /// Takes the weights of a group. What no scale has is cut.
    fn take(&mut self, weights: &[f32], importance: &[f32]) {
        let cut = |w: f32| if w.is_nan() { 0.0 } else { w.clamp(-MOST_SCALE, MOST_SCALE) };
        let most = importance.iter().fold(0f32, |most, w| most.max(*w));
        let unit = 1.0 / most;
        let weigh = |w: f32| if w > 0.0 { w * unit } else { 0.0 };
        self.weights.clear();
        self.weights.extend(weights.iter().map(|&w| cut(w)));
        self.importance.clear();
        match unit.is_normal() {
            true => self.importance.extend(importance.iter().map(|&w| weigh(w))),
            // Nothing is known of the columns.
            false => self.importance.resize(weights.len(), 1.0),
        }
    }

    /// The line of the least cost that is found.
    fn search(&self, grid: &Grid) -> Line {
        let ends = ends(&self.weights).unwrap_or_default();
        let plain = grid.line(ends);
        let span = if grid.symmetric {
            ends.1.max(-ends.0) / f32::from(grid.middle())
        } else {
            (ends.1 - ends.0) / grid.most()
        };
        if span < LEAST_SCALE {
            return plain;
        }
        // The end that reaches further gets the side that does.
        let span = if grid.symmetric && ends.1 > -ends.0 { -span } else { span };
        let mut best = self.fit(grid, span * FIRST, plain.zero);
        let (mut scale, mut idle) = (span * FIRST, 0);
        while idle < PATIENCE {
            scale *= RATIO;
            idle = if self.improve(grid, scale, plain.zero, &mut best) { 0 } else { idle + 1 };
        }
        if grid.symmetric {
            self.improve(grid, -best.scale, best.zero, &mut best);
        }
        for near in NEAR {
            let Attempt { scale, zero, .. } = best;
            if !grid.symmetric {
                for zero in [
                    zero.saturating_sub(1).max(grid.least_zero),
                    zero.saturating_add(1).min(grid.most() as u8),
                ] {
                    self.improve(grid, scale, zero, &mut best);
                }
            }
            self.improve(grid, scale * (1.0 + near), best.zero, &mut best);
            self.improve(grid, scale * (1.0 - near), best.zero, &mut best);
        }
        // With the codes of its own.
        for _ in 0..2 {
            self.improve(grid, best.scale, best.zero, &mut best);
        }
        let found = Line { scale: storable(best.scale), zero: best.zero };
        let lost = |line: Line| self.fit(grid, line.scale, line.zero).lost;
        if lost(found) <= lost(plain) { found } else { plain }
    }

    fn improve(&self, grid: &Grid, scale: f32, zero: u8, best: &mut Attempt) -> bool {
        let attempt = self.fit(grid, scale, zero);
        let better = attempt.cost < best.cost;
        if better {
            *best = attempt;
        }
        better
    }

    /// Tries the codes next to the weights at a scale.
    fn fit(&self, grid: &Grid, scale: f32, zero: u8) -> Attempt {
        let (inverse, limits) = (1.0 / scale, grid.limits(zero));
        let (weights, importance) = (self.weights.as_chunks::<LANES>(), self.importance.as_chunks::<LANES>());
        let mut sums = Sums::default();
        for (x, w) in weights.0.iter().zip(importance.0) {
            sums.add(x, w, scale, inverse, limits);
        }
        if !weights.1.is_empty() {
            let (mut x, mut w) = ([0f32; LANES], [0f32; LANES]);
            x[..weights.1.len()].copy_from_slice(weights.1);
            w[..importance.1.len()].copy_from_slice(importance.1);
            sums.add(&x, &w, scale, inverse, limits);
        }
        let total = |lanes: [f32; LANES]| lanes.into_iter().map(f64::from).sum::<f64>();
        let (lost, slope, bend) = (total(sums.lost), total(sums.slope), total(sums.bend));
        let best = (f64::from(scale) + slope / bend) as f32;
        match bend > 0.0 && best.is_normal() {
            true => Attempt { lost, scale: best, zero, cost: lost - slope * slope / bend },
            false => Attempt { lost, scale, zero, cost: lost },
        }
    }
}

/// Of the errors: their squares, and their products with the codes; the squares of these. All weighed.
#[derive(Default)]
struct Sums {
    lost: [f32; LANES],
    slope: [f32; LANES],
    bend: [f32; LANES],
}

impl Sums {
    #[inline(always)]
    fn add(&mut self, x: &[f32; LANES], w: &[f32; LANES], scale: f32, inverse: f32, (low, high): (f32, f32)) {
        for k in 0..LANES {
            let q = (limited(x[k] * inverse, low, high) + WHOLE) - WHOLE;
            let error = x[k] - q * scale;
            let weighed = w[k] * error;
            self.lost[k] += weighed * error;
            self.slope[k] += weighed * q;
            self.bend[k] += w[k] * q * q;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn squares(grid: &Grid, weights: &[f32], cols: usize, importance: &[f32], rows: &Rows) -> f64 {
        let shape = grid.shape(0, cols as u64);
        let lost = |(i, w): (usize, &f32)| {
            let g = i / cols * shape.groups as usize + i % cols / shape.group_size as usize;
            let value = (f32::from(rows.codes[i]) - rows.zeros[g]) * rows.scales[g];
            f64::from(importance[i % cols]) * f64::from(w - value).powi(2)
        };
        weights.iter().enumerate().map(lost).sum()
    }

    /// Whether a checkpoint can hold them.
    fn check(grid: &Grid, rows: &Rows) {
        let most = u32::from(grid.levels) - 1;
        assert!(rows.codes.iter().all(|c| u32::from(*c) <= most));
        for (&scale, &zero) in rows.scales.iter().zip(&rows.zeros) {
            assert!(scale != 0.0 && scale.is_finite() && f32_from_f16(f16_from_f32(scale)) == scale);
            let range = match grid.symmetric {
                true => f32::from(grid.middle())..=f32::from(grid.middle()),
                false => f32::from(grid.least_zero)..=most as f32,
            };
            assert!(range.contains(&zero) && zero.fract() == 0.0, "{zero}");
        }
    }

    proptest! {
        #[test]
        fn no_weight_is_further_than_half_a_step(
            weights in prop::collection::vec(-9f32..9.0, 96),
            bits in 2u32..=8,
            symmetric: bool,
            least_zero in 0u8..2,
        ) {
            let grid = Grid { levels: 1 << bits, group_size: Some(40), symmetric, least_zero };
            let mut rows = Rows::default();
            round(&grid, &weights, 48, &mut rows).unwrap();
            check(&grid, &rows);
            prop_assert_eq!((rows.scales.len(), rows.zeros.len()), (4, 4));
            for (i, (w, code)) in weights.iter().zip(&rows.codes).enumerate() {
                let g = i / 48 * 2 + i % 48 / 40;
                let value = (f32::from(*code) - rows.zeros[g]) * rows.scales[g];
                // Scales are rounded to F16, zeros to integers: the ends may lie a step off.
                let step = rows.scales[g] * if symmetric { 1.01 } else { 1.51 };
                prop_assert!((w - value).abs() <= step, "{w} {value} {}", rows.scales[g]);
            }
        }

        #[test]
        fn what_is_weighed_loses_no_more(
            weights in prop::collection::vec(-3f32..3.0, 384),
            importance in prop::collection::vec(prop_oneof![Just(0f32), 0f32..4.0, Just(1e25)], 192),
            size in -120f32..60.0,
            levels in prop_oneof![(1u32..=8).prop_map(|bits| 1 << bits), Just(TERNARY)],
            group_size in prop::sample::select(vec![None, Some(32u64), Some(80), Some(24)]),
            symmetric: bool,
            least_zero in 0u8..2,
        ) {
            let weights: Vec<f32> = weights.iter().map(|w| w * w * w * (size / 10.0).exp2()).collect();
            let grid = Grid { levels, group_size, symmetric: symmetric && levels != 2 || levels == TERNARY, least_zero };
            let (mut plain, mut found) = (Rows::default(), Rows::default());
            round(&grid, &weights, 192, &mut plain).unwrap();
            weigh(&grid, &weights, 192, &importance, &mut found).unwrap();
            check(&grid, &found);
            let [before, after] = [&plain, &found].map(|rows| squares(&grid, &weights, 192, &importance, rows));
            prop_assert!(after <= before * (1.0 + 1e-5), "{before} {after}");
        }
    }

    /// Beside all scales and zeros there are.
    #[test]
    fn the_search_is_near_the_best() {
        let mut state = 3u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        for bits in [2, 3, 4, 8] {
            for symmetric in [false, true] {
                let grid = Grid { levels: 1 << bits, group_size: None, symmetric, least_zero: 0 };
                let (mut plain, mut found, mut best) = (0.0, 0.0, 0.0);
                for n in [32, 32, 32, 128, 128, 128] {
                    let weights: Vec<f32> = (0..n).map(|_| noise() + noise() + noise() + 0.3).collect();
                    let importance: Vec<f32> = (0..n).map(|_| (noise() * 2.0).exp()).collect();
                    let mut rows = Rows::default();
                    round(&grid, &weights, n, &mut rows).unwrap();
                    plain += squares(&grid, &weights, n as usize, &importance, &rows);
                    weigh(&grid, &weights, n, &importance, &mut rows).unwrap();
                    found += squares(&grid, &weights, n as usize, &importance, &rows);
                    let mut group = Group::default();
                    group.take(&weights, &importance);
                    let unit = importance.iter().fold(0f32, |most, w| most.max(*w));
                    let zeros = if symmetric { grid.middle()..=grid.middle() } else { 0..=grid.most() as u8 };
                    let tried = zeros.flat_map(|zero| (-2000..2000i16).map(move |k| (zero, k)));
                    let tried = tried.filter(|(_, k)| *k != 0).map(|(zero, k)| {
                        let scale = storable(f32::from(k) / 2000.0 * 6.0 / grid.most());
                        group.fit(&grid, scale, zero).lost * f64::from(unit)
                    });
                    best += tried.fold(f64::INFINITY, f64::min);
                }
                // With 8 bits the best are lucky ones.
                let near = if bits == 8 { 1.1 } else { 1.01 };
                assert!(found <= near * best && found < 0.97 * plain, "{grid:?}: {plain} {found} {best}");
            }
        }
    }

    #[test]
    fn weights_that_no_scale_has() {
        let grid = Grid { levels: 1 << 4, group_size: None, symmetric: true, least_zero: 0 };
        let mut rows = Rows::default();
        for w in [f32::NAN, f32::INFINITY, 1e6] {
            assert!(round(&grid, &[1.0, w], 2, &mut rows).is_err());
            assert!(weigh(&grid, &[1.0, w], 2, &[1.0; 2], &mut rows).is_err());
        }
        for symmetric in [false, true] {
            let grid = Grid { symmetric, least_zero: 1, ..grid };
            for importance in [0.0, 1.0, f32::NAN, f32::INFINITY] {
                weigh(&grid, &[0.0; 4], 2, &[importance; 2], &mut rows).unwrap();
                check(&grid, &rows);
                assert!(rows.codes.iter().zip([rows.zeros[0]; 4]).all(|(c, z)| f32::from(*c) == z));
                round(&grid, &[0.0; 4], 2, &mut rows).unwrap();
                check(&grid, &rows);
            }
        }
        assert!(Grid { levels: 1, ..grid }.lattice(8).is_err() && grid.lattice(0).is_err());
        assert!(weigh(&grid, &[0.0; 4], 2, &[1.0], &mut rows).is_err());
    }
}
