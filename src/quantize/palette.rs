//! Tables of few values that many weights are taken from: k-means in one dimension.
//!
//! Weights are looked at as float16, so that there are 65536 different ones at most, each with the sum of what its
//! weights count. Sums over neighbours make the error of a cluster a difference of two of them. Clusters start from an
//! exact dynamic programme over bins of neighbours, and go on by Lloyd's rounds over all points
//! (Lloyd, "Least squares quantization in PCM", 1982). Bins, and many clusters where the programme would take too long,
//! are spread as the best quantizers of many levels are: by the cube root of the density (Panter and Dite, 1951).
//!
//! Time and memory are linear in the weights. Nothing is random: the same weights give the same table.

use crate::block::{f16_from_f32, f32_from_f16};

/// Values that float16 has.
const HALVES: usize = 1 << 16;
/// Most bytes that [`Counts`], [`Points`] and two [`Palette`]s hold.
pub const HELD: u64 = (HALVES * (8 + 8 + 24 + 2) + HALVES / 8) as u64;
/// Most bins in the dynamic programme.
const BINS: usize = 64;
/// Most clusters that it finds. It takes clusters times bins and their logarithm.
const MOST_EXACT: usize = 16;
/// Most rounds. Few have more to gain, and the last gain little.
const ROUNDS: usize = 32;

/// How much weights of each value count, of any number of weights.
#[derive(Clone, Debug)]
pub struct Counts {
    /// By key.
    counts: Vec<f64>,
    /// A bit for each key that was met.
    met: Vec<u64>,
}

impl Default for Counts {
    fn default() -> Self {
        Self { counts: vec![0.0; HALVES], met: vec![0; HALVES / 64] }
    }
}

impl Counts {
    /// Adds rows of weights, which are finite as float16. Each column counts as `importance` says.
    pub fn add(&mut self, weights: &[f32], importance: &[f32]) {
        for row in weights.chunks(importance.len().max(1)) {
            for (x, w) in row.iter().zip(importance) {
                let key = usize::from(key(*x));
                self.counts[key] += f64::from(*w);
                self.met[key / 64] |= 1 << (key % 64);
            }
        }
    }
}

/// Weights as sorted points, each value once, and how much it counts.
#[derive(Clone, Debug, Default)]
pub struct Points {
    /// Ascending.
    values: Vec<f64>,
    /// Sums up to each point, and over all: of how much points count, that times their values, and that times the
    /// squares of them.
    sums: Vec<[f64; 3]>,
}

/// Keys are in the order of their values.
#[inline(always)]
fn key(x: f32) -> u16 {
    let bits = f16_from_f32(x);
    match bits {
        0x8000.. if bits != 0x8000 => !bits,
        // Both zeros are one.
        _ => bits & 0x7FFF | 0x8000,
    }
}

fn value(key: u16) -> f64 {
    f32_from_f16(if key < 0x8000 { !key } else { key & 0x7FFF }).into()
}

impl Points {
    /// Those that were counted, and counts begin anew.
    pub fn take(&mut self, counts: &mut Counts) {
        self.values.clear();
        self.sums.clear();
        let mut sum = [0.0; 3];
        for (first, met) in counts.met.iter_mut().enumerate() {
            while *met != 0 {
                let key = first * 64 + met.trailing_zeros() as usize;
                *met &= *met - 1;
                let w = std::mem::take(&mut counts.counts[key]);
                let x = value(key as u16);
                self.values.push(x);
                self.sums.push(sum);
                sum = [sum[0] + w, sum[1] + w * x, sum[2] + w * x * x];
            }
        }
        self.sums.push(sum);
    }

    /// So many clusters, of which there are fewer than points: where each begins, and where the last one ends. Some
    /// may be without points in the end.
    fn clusters(&self, most: usize) -> Vec<usize> {
        let mut ends = match most <= MOST_EXACT {
            true => programme(&self.sums, &self.bins(BINS), most),
            false => self.bins(most),
        };
        let mut centres: Vec<f64> = ends.windows(2).map(|c| self.centre(c[0], c[1])).collect();
        for _ in 0..ROUNDS {
            let mut moved = false;
            for k in 1..centres.len() {
                let middle = (centres[k - 1] + centres[k]) / 2.0;
                let from = ends[k - 1];
                let end = from + self.values[from..].partition_point(|x| *x <= middle);
                moved |= end != ends[k];
                ends[k] = end;
            }
            if !moved {
                break;
            }
            for (k, centre) in centres.iter_mut().enumerate() {
                // One without points stays where it is: others may come back to it.
                if ends[k] < ends[k + 1] {
                    *centre = self.centre(ends[k], ends[k + 1]);
                }
            }
        }
        ends
    }

    /// The mean of some points.
    fn centre(&self, first: usize, end: usize) -> f64 {
        let [w, wx, _] = [0, 1, 2].map(|i| self.sums[end][i] - self.sums[first][i]);
        if w > 0.0 { wx / w } else { (self.values[first] + self.values[end - 1]) / 2.0 }
    }

    /// Neighbours in so many bins, or as many as there are points: where each begins, and where the last one ends. In
    /// each is about the same sum of the cube roots of the density over its width.
    fn bins(&self, most: usize) -> Vec<usize> {
        let n = self.values.len();
        if n <= most {
            return (0..=n).collect();
        }
        let share = |i: usize| {
            let (low, high) = (i.saturating_sub(1), (i + 1).min(n - 1));
            let gap = (self.values[high] - self.values[low]) / (high - low) as f64;
            root((self.sums[i + 1][0] - self.sums[i][0]) * gap * gap)
        };
        let mut left: f64 = (0..n).map(share).sum();
        let (mut begins, mut sum) = (vec![0], 0.0);
        for i in 0..n - 1 {
            let bins = most - begins.len(); // behind this one
            if bins == 0 {
                break;
            }
            sum += share(i);
            // Points with the share of several bins are one, and those behind them share what is left.
            if sum >= left / (bins + 1) as f64 || n - 1 - i == bins {
                begins.push(i + 1);
                (left, sum) = (left - sum, 0.0);
            }
        }
        begins.push(n);
        begins
    }
}

/// The cube root, but for a common factor, to within 6 percent: a third of the exponent, and of the fraction.
fn root(x: f64) -> f64 {
    if x > 0.0 { f64::from_bits(x.to_bits() / 3 + (682 << 52)) } else { 0.0 }
}

/// The squared error of the points of a cluster, given the sums up to it, and up to its end.
#[inline(always)]
fn error(first: &[f64; 3], end: &[f64; 3]) -> f64 {
    let (w, wx, wxx) = (end[0] - first[0], end[1] - first[1], end[2] - first[2]);
    if w > 0.0 { (wxx - wx * wx / w).max(0.0) } else { 0.0 }
}

/// The best of all ways to make so many clusters of bins that are not divided: where clusters begin, and where the last
/// one ends.
///
/// With one cluster more, the best beginning of the last cluster comes no earlier for bins that come later, so that
/// the middle one's halves the search for the others (Gronlund and others, "Fast exact k-means", 2017).
fn programme(sums: &[[f64; 3]], bins: &[usize], most: usize) -> Vec<usize> {
    let sums: Vec<[f64; 3]> = bins.iter().map(|b| sums[*b]).collect();
    let n = sums.len() - 1;
    let most = most.min(n);
    // The error of the first `i` bins, in so many clusters as there are rounds.
    let mut before: Vec<f64> = sums.iter().map(|end| error(&sums[0], end)).collect();
    let mut now = before.clone();
    let mut begins = vec![vec![0u16; n + 1]];
    let mut stack = Vec::new();
    for k in 1..most {
        let mut best = vec![0u16; n + 1];
        stack.push((k + 1, n, k, n - 1));
        while let Some((low, high, from, to)) = stack.pop() {
            if low > high {
                continue;
            }
            let middle = (low + high) / 2;
            let (mut least, mut at) = (f64::INFINITY, from);
            for j in from..=to.min(middle - 1) {
                let sum = before[j] + error(&sums[j], &sums[middle]);
                if sum < least {
                    (least, at) = (sum, j);
                }
            }
            (now[middle], best[middle]) = (least, at as u16);
            stack.push((low, middle - 1, from, at));
            stack.push((middle + 1, high, at, to));
        }
        std::mem::swap(&mut before, &mut now);
        begins.push(best);
    }
    let mut ends = vec![n];
    for best in begins.iter().rev() {
        let end = ends[ends.len() - 1];
        ends.push(best[end].into());
    }
    ends.iter().rev().map(|i| bins[*i]).collect()
}

/// A table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Palette {
    /// Its values, ascending, which float16 has; the last may come several times.
    pub levels: Vec<f32>,
    /// The number of the nearest one for each key.
    codes: Vec<u8>,
}

impl Palette {
    /// Becomes the table of `2^bits` values for these points, of which there is one at least.
    pub fn fit(&mut self, points: &Points, bits: u32) {
        let most = 1usize << bits;
        self.levels.clear();
        if points.values.len() <= most {
            self.levels.extend(points.values.iter().map(|x| *x as f32));
        } else {
            let ends = points.clusters(most);
            let full = ends.windows(2).filter(|c| c[0] < c[1]);
            self.levels.extend(full.map(|c| f32_from_f16(f16_from_f32(points.centre(c[0], c[1]) as f32))));
        }
        self.levels.resize(most, self.levels.last().copied().unwrap_or(0.0));
        self.codes.resize(HALVES, 0);
        let mut first = 0;
        for (code, pair) in (0..).zip(self.levels.windows(2)) {
            let middle = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
            let near = key(middle as f32);
            let end = usize::from(near) + usize::from(value(near) <= middle);
            self.codes[first..end.max(first)].fill(code);
            first = end.max(first);
        }
        self.codes[first..].fill((most - 1) as u8);
    }

    /// For each weight the number of the value that is nearest to it as float16; of two the lower one's.
    pub fn codes(&self, weights: &[f32], codes: &mut [u8]) {
        let Some(table) = self.codes.first_chunk::<HALVES>() else { return };
        codes.iter_mut().zip(weights).for_each(|(code, x)| *code = table[usize::from(key(*x))]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::sample::noise;
    use proptest::prelude::*;

    fn points(weights: &[f32], importance: &[f32]) -> Points {
        let (mut points, mut counts) = (Points::default(), Counts::default());
        counts.add(weights, importance);
        points.take(&mut counts);
        points
    }

    fn fit(points: &Points, bits: u32) -> Palette {
        let mut table = Palette::default();
        table.fit(points, bits);
        table
    }

    fn lost(weights: &[f32], importance: &[f32], levels: &[f32]) -> f64 {
        let nearest = |x: f32| levels.iter().map(|l| f64::from(x - l).powi(2)).fold(f64::INFINITY, f64::min);
        weights.iter().zip(importance).map(|(x, w)| f64::from(*w) * nearest(*x)).sum()
    }

    /// The least error of all ways to make clusters of neighbours.
    fn least(points: &Points, clusters: usize) -> f64 {
        let sums = &points.sums;
        let mut best: Vec<f64> = sums.iter().map(|end| error(&sums[0], end)).collect();
        for _ in 1..clusters {
            let of =
                |i: usize| (0..=i).map(|j| best[j] + error(&sums[j], &sums[i])).fold(f64::INFINITY, f64::min);
            best = (0..sums.len()).map(of).collect();
        }
        best[sums.len() - 1]
    }

    proptest! {
        #[test]
        fn clusters_of_few_points_are_the_best(
            pairs in prop::collection::vec((-4f32..4.0, 0f32..2.0), 1..64), bits in 1u32..=4,
        ) {
            let (x, w): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let points = points(&x, &w);
            let ends = points.clusters(1 << bits);
            let found: f64 = ends.windows(2).map(|c| error(&points.sums[c[0]], &points.sums[c[1]])).sum();
            let (best, all) = (least(&points, 1 << bits), points.sums[points.sums.len() - 1][2]);
            prop_assert!(found <= best + 1e-12 * all, "{found} {best}");
        }

        /// Whatever the weights: codes are of the nearest value, equal steps do not lose less, and what a table gives
        /// has the same table.
        #[test]
        fn tables_are_good(
            x in prop::collection::vec(prop_oneof![-1f32..1.0, -60000f32..60000.0, Just(0f32)], 1..900),
            bits in prop::sample::select(&[1u32, 2, 3, 4, 6, 8][..]),
        ) {
            let even = vec![1.0; x.len()];
            let table = fit(&points(&x, &even), bits);
            prop_assert!(table.levels.len() == 1 << bits && table.levels.is_sorted());
            let mut codes = vec![0; x.len()];
            table.codes(&x, &mut codes);
            let y: Vec<f32> = codes.iter().map(|c| table.levels[usize::from(*c)]).collect();
            for (x, y) in x.iter().zip(&y) {
                let nearest = table.levels.iter().map(|l| (x - l).abs()).fold(f32::INFINITY, f32::min);
                // As float16, which moves it by half a unit.
                prop_assert!((x - y).abs() <= nearest * 1.000001 + x.abs() / 1024.0 + 1e-7, "{x} {y}");
            }
            let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
            let steps = (1u32 << bits) - 1;
            let equal: Vec<f32> = (0..=steps).map(|k| low + (high - low) * (k as f32 / steps as f32)).collect();
            let all: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            if bits <= 4 {
                prop_assert!(lost(&x, &even, &table.levels) <= lost(&x, &even, &equal) + 1e-6 * all);
            }
            let again = fit(&points(&y, &even), bits);
            table.codes(&y, &mut codes);
            let mut new = vec![0; y.len()];
            again.codes(&y, &mut new);
            for ((y, a), b) in y.iter().zip(&codes).zip(&new) {
                prop_assert_eq!((*y, *y), (table.levels[usize::from(*a)], again.levels[usize::from(*b)]));
            }
        }
    }

    /// As good as Lloyd and Max say that tables for normal weights can be, but for what few samples give.
    #[test]
    fn normal_weights() {
        let n = 60000;
        let mut x = noise(4 * n, 7);
        x = x.chunks(4).map(|some| some.iter().sum::<f32>() / 2.0).collect();
        let even = vec![1.0; n];
        let all: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        // Max, "Quantizing for minimum distortion" (1960), table 1: the mean square that is lost.
        for (bits, expected) in
            [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (6, 0.00070), (8, 0.000047)]
        {
            let table = fit(&points(&x, &even), bits);
            let found = lost(&x, &even, &table.levels) / all;
            assert!(found < expected * 1.03, "{bits} bits: {found}, {expected} was expected");
            let mut turned = x.clone();
            turned.reverse();
            assert_eq!(table, fit(&points(&turned, &even), bits));
        }
    }

    #[test]
    fn few_values_and_what_does_not_count() {
        for bits in [1, 2, 3, 4, 6, 8] {
            for x in [[0.0; 7], [-2.5; 7], [-0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0]] {
                let table = fit(&points(&x, &[1.0; 7]), bits);
                assert_eq!(table.levels, vec![x[0]; 1 << bits]);
            }
        }
        let x = [1.0, 2.0, 3.0, 4.0, 100.0, 200.0];
        let table = fit(&points(&x, &[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]), 1);
        assert_eq!(table.levels, [1.5, 3.5]);
        // Of two values in the same distance the lower one.
        let mut codes = [9; 3];
        table.codes(&[2.5, 2.6, 1e9], &mut codes);
        assert_eq!(codes, [0, 1, 1]);
        assert_eq!(fit(&points(&[3.0, -1.0, 3.0, 0.5], &[1.0; 4]), 2).levels, [-1.0, 0.5, 3.0, 3.0]);
    }

    #[test]
    fn keys_are_in_the_order_of_values() {
        for k in 0..=u16::MAX {
            let bits = if k < 0x8000 { !k } else { k & 0x7FFF };
            let x = f32_from_f16(bits);
            if x.is_finite() && bits != 0x8000 {
                assert_eq!((key(x), value(k)), (k, f64::from(x)));
            }
        }
    }
}
