//! AWQ (Lin et al., arXiv 2306.00978): columns that carry much are multiplied before rounding, so that
//! they lose less, and what they read is divided by the same.
//!
//! Of the scales `x^r / w^(1 - r)`, `x` the mean magnitude of a column's input and `w` the mean of its
//! weights' magnitudes in parts of their group's greatest, and of `x^r`, those win whose rounded matrices
//! change their outputs least: the sum of `e H e^T` over rows, `e` the change of a row and `H` the second
//! moments of the input. All matrices that read the same share their scales; each counts in parts of
//! its own output's power.
//!
//! AWQ's second search, for a limit at which weights are clipped, is not here: the searches of the block
//! types choose each group's scale, which is that limit, with the importance of each column.

use super::gptq::Sums;
use super::ternary::{self, is_ternary};
use crate::block::gram::{PANEL, Tile, product};
use crate::block::{Codec, lattice};
use crate::error::{Error, Result};

/// Exponents that are tried: `k / STEPS`.
const STEPS: u32 = 20;
/// All that are tried: both forms, and none.
const CANDIDATES: u64 = 2 * STEPS as u64 + 1;
/// Weights of a matrix that are looked at, and rows at least and at most.
const WEIGHTS: u64 = 1 << 19;
const ROWS: (u64, u64) = (32, 512);
/// All candidates are tried on one row in so many, and so many of them on all.
const PART: usize = 8;
const FINALISTS: usize = 6;
/// Weights that a scale is taken to belong to, for their magnitudes in parts of the greatest.
const GROUP: usize = 32;
/// Experts of a stack that stand for all where they share their scales.
pub const MOST_EXPERTS: u64 = 8;
/// Fewest tokens that say anything.
pub const LEAST_TOKENS: u64 = 64;

/// Rows of a matrix of so many columns that are looked at.
pub fn sampled_rows(columns: u64) -> u64 {
    (WEIGHTS / columns.max(1)).clamp(ROWS.0, ROWS.1)
}

/// Bytes that a search over so many matrices takes at most.
pub fn bytes(columns: u64, matrices: u64) -> u64 {
    let rows = sampled_rows(columns).saturating_mul(matrices.saturating_mul(MOST_EXPERTS));
    // What is held of each matrix, twice; a panel's errors by each candidate; a band of moments.
    let panels = (CANDIDATES + 6) * PANEL as u64;
    columns.saturating_mul(rows.saturating_mul(2).saturating_add(panels)).saturating_mul(4)
}

/// Some rows of a matrix, and what they read.
pub struct Matrix<'a> {
    /// Row by row.
    pub rows: Vec<f32>,
    /// What rounds them; `None` where nothing does.
    pub codec: Option<&'static Codec>,
    /// Whether rounding heeds how much each column counts.
    pub weighed: bool,
    /// The mean magnitude of each column's input.
    pub mean_abs: Vec<f32>,
    /// Tokens that were seen.
    pub count: u64,
    /// The sums of their `x x^T`.
    pub sums: Box<dyn Sums + 'a>,
}

/// The scales of `outputs` values, of which each column of the matrices reads one. All are 1 where
/// nothing better is found.
///
/// # Errors
/// As the sums are read; `Interrupted` as `stop` says.
pub fn search(
    matrices: &[Matrix],
    output_of: &[u32],
    outputs: usize,
    stop: &dyn Fn() -> bool,
) -> Result<Vec<f32>> {
    let even = vec![1f32; outputs];
    let n = output_of.len();
    if matrices.iter().all(|m| m.codec.is_none()) || n == 0 {
        return Ok(even);
    }
    let mut left = candidates(matrices, output_of, outputs);
    for (every, most) in [(PART, FINALISTS), (1, 1)] {
        let by_column: Vec<Vec<f32>> =
            left.iter().map(|c| output_of.iter().map(|&o| c[o as usize]).collect()).collect();
        let mut costs = vec![0f64; left.len()];
        for matrix in matrices {
            let rows: Vec<f32> = matrix.rows.chunks(n).step_by(every).flatten().copied().collect();
            let of_matrix = matrix.costs(&rows, &by_column, stop)?;
            costs.iter_mut().zip(of_matrix).for_each(|(sum, cost)| *sum += cost);
        }
        let mut ranked: Vec<_> = costs.into_iter().zip(left).filter(|(cost, _)| cost.is_finite()).collect();
        ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        left = ranked.into_iter().take(most).map(|(_, scales)| scales).collect();
        if most > 1 && !left.contains(&even) {
            left.push(even.clone());
        }
    }
    Ok(left.pop().unwrap_or(even))
}

/// Scales to try, of each value that columns read. The first are 1.
fn candidates(matrices: &[Matrix], output_of: &[u32], outputs: usize) -> Vec<Vec<f32>> {
    let n = output_of.len();
    let mut inputs = vec![0f64; outputs];
    let mut weights = vec![0f64; outputs];
    for m in matrices {
        for (c, &o) in output_of.iter().enumerate() {
            inputs[o as usize] += f64::from(m.mean_abs[c]) * m.count as f64;
        }
        for row in m.rows.chunks_exact(n) {
            for (g, group) in row.chunks(GROUP).enumerate() {
                let most = group.iter().fold(0f32, |m, w| m.max(w.abs()));
                for (c, w) in (g * GROUP..).zip(group).filter(|_| most > 0.0) {
                    weights[output_of[c] as usize] += f64::from(w.abs() / most);
                }
            }
        }
    }
    let in_parts = |v: &mut [f64]| {
        let mean = v.iter().sum::<f64>() / v.len() as f64;
        v.iter_mut().for_each(|x| *x = (*x / mean).max(1e-3));
    };
    in_parts(&mut inputs);
    in_parts(&mut weights);
    let mut all = vec![vec![1f32; outputs]];
    for k in 0..STEPS {
        for with_weights in [false, true] {
            let r = f64::from(k + u32::from(!with_weights)) / f64::from(STEPS);
            let scale = |(x, w): (&f64, &f64)| x.powf(r) / if with_weights { w.powf(1.0 - r) } else { 1.0 };
            let scales: Vec<f64> = inputs.iter().zip(&weights).map(scale).collect();
            let (low, high) = scales.iter().fold((f64::MAX, 0f64), |(l, h), s| (l.min(*s), h.max(*s)));
            let middle = (low * high).sqrt();
            let scales: Vec<f32> = scales.iter().map(|s| (s / middle) as f32).collect();
            if scales.iter().all(|s| s.is_finite() && *s > 0.0) {
                all.push(scales);
            }
        }
    }
    all
}

impl Matrix<'_> {
    /// What rounding by each of the scales changes of the outputs, in parts of their power.
    fn costs(&self, rows: &[f32], scales: &[Vec<f32>], stop: &dyn Fn() -> bool) -> Result<Vec<f64>> {
        let Some(codec) = self.codec else { return Ok(vec![0.0; scales.len()]) };
        let n = self.sums.columns();
        if !rows.len().is_multiple_of(n) || scales.iter().any(|s| s.len() != n) {
            return Err(Error::misuse("scales or rows do not fit the moments"));
        }
        let mut squares = vec![0f32; n];
        for (i, square) in squares.iter_mut().enumerate() {
            self.sums.read(i, std::slice::from_mut(square))?;
            *square /= self.count.max(1) as f32;
        }
        let mut costs = vec![0f64; scales.len()];
        let mut power = 0f64;
        let mut band = Vec::new();
        for rows in rows.chunks(n * PANEL) {
            // The weights themselves come last: their output's power.
            let mut errors = Vec::with_capacity(scales.len() + 1);
            for scales in scales {
                errors.push(self.errors(codec, rows, scales, &squares)?);
            }
            errors.push(transposed(rows, n));
            let mut sums = vec![0f64; errors.len()];
            for first in (0..n).step_by(PANEL) {
                if stop() {
                    return Err(Error::interrupted());
                }
                self.band(first, &mut band)?;
                for (errors, sum) in errors.iter().zip(&mut sums) {
                    let mut tile: Tile = [[0.0; PANEL]; PANEL];
                    product(&errors[first..], &band, &mut tile);
                    for (k, errors) in errors[first..].iter().take(PANEL).enumerate() {
                        let dot = errors.iter().zip(&tile).map(|(e, t)| f64::from(*e) * f64::from(t[k]));
                        *sum += dot.sum::<f64>();
                    }
                }
            }
            power += sums.pop().unwrap_or(0.0);
            costs.iter_mut().zip(sums).for_each(|(cost, sum)| *cost += sum);
        }
        let power = if power > 0.0 { power } else { 1.0 };
        Ok(costs.into_iter().map(|c| c / power).collect())
    }

    /// What rounding changes, by column.
    fn errors(
        &self,
        codec: &Codec,
        rows: &[f32],
        scales: &[f32],
        squares: &[f32],
    ) -> Result<Vec<[f32; PANEL]>> {
        let n = scales.len();
        let mut values: Vec<f32> = rows.iter().zip(scales.iter().cycle()).map(|(w, s)| w * s).collect();
        let importance: Vec<f32> = squares.iter().zip(scales).map(|(q, s)| q / (s * s)).collect();
        let mut bytes = vec![0; codec.dtype.bytes_for(values.len() as u64)? as usize];
        match lattice(codec.dtype).filter(|l| is_ternary(l)) {
            // These types have no search of their own, and what rounds them does not encode as they do.
            Some(lattice) => ternary::search(lattice, &values, n, &importance, &mut bytes)?,
            None => {
                let importance = (self.weighed && codec.heeds_importance()).then_some(&importance[..]);
                codec.encode(&values, n, importance, &mut bytes)?;
            }
        }
        codec.decode(&bytes, &mut values)?;
        values.iter_mut().zip(rows).zip(scales.iter().cycle()).for_each(|((y, w), s)| *y = *y / s - w);
        Ok(transposed(&values, n))
    }

    /// Of `PANEL` rows of the moments what lies from their diagonal on, by column; what has no mirror
    /// image in the band counts twice.
    fn band(&self, first: usize, band: &mut Vec<[f32; PANEL]>) -> Result<()> {
        let n = self.sums.columns();
        band.clear();
        band.resize(n - first, [0.0; PANEL]);
        let mut row = vec![0f32; n - first];
        for k in 0..PANEL.min(n - first) {
            let row = &mut row[k..];
            self.sums.read(first + k, row)?;
            for (j, &value) in (k..).zip(row.iter()) {
                if j < PANEL {
                    band[j][k] = value;
                    band[k][j] = value;
                } else {
                    band[j][k] = 2.0 * value;
                }
            }
        }
        Ok(())
    }
}

/// At most `PANEL` rows, by column.
fn transposed(rows: &[f32], n: usize) -> Vec<[f32; PANEL]> {
    let mut out = vec![[0f32; PANEL]; n];
    for (r, row) in rows.chunks_exact(n).enumerate().take(PANEL) {
        out.iter_mut().zip(row).for_each(|(o, v)| o[r] = *v);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::codec;
    use crate::tensor::DType;

    /// Sums of inputs whose every eighth column is thirty times as large.
    struct Synthetic(usize, Vec<f32>);

    const COLUMNS: usize = 128;
    const TOKENS: usize = 400;

    fn noise(state: &mut u64) -> f32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    impl Synthetic {
        fn new(seed: u64) -> (Self, Vec<f32>) {
            let mut state = seed;
            let mut sums = vec![0f32; COLUMNS * COLUMNS];
            let mut mean_abs = vec![0f32; COLUMNS];
            for _ in 0..TOKENS {
                let x: Vec<f32> =
                    (0..COLUMNS).map(|c| noise(&mut state) * if c % 8 == 3 { 30.0 } else { 1.0 }).collect();
                for (i, a) in x.iter().enumerate() {
                    mean_abs[i] += a.abs() / TOKENS as f32;
                    x.iter().enumerate().for_each(|(j, b)| sums[i * COLUMNS + j] += a * b);
                }
            }
            (Self(COLUMNS, sums), mean_abs)
        }
    }

    impl Sums for Synthetic {
        fn columns(&self) -> usize {
            self.0
        }
        fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
            row.copy_from_slice(&self.1[i * self.0 + i..][..row.len()]);
            Ok(())
        }
    }

    fn matrix(dtype: DType, rows: usize) -> Matrix<'static> {
        let (sums, mean_abs) = Synthetic::new(5);
        let mut state = 9;
        Matrix {
            rows: (0..rows * COLUMNS).map(|_| noise(&mut state)).collect(),
            codec: codec(dtype),
            weighed: true,
            mean_abs,
            count: TOKENS as u64,
            sums: Box::new(sums),
        }
    }

    /// The change of the outputs, the long way.
    fn cost(m: &Matrix, scales: &[f32]) -> f64 {
        let codec = m.codec.unwrap();
        let Synthetic(_, sums) = Synthetic::new(5).0;
        let importance: Vec<f32> =
            (0..COLUMNS).map(|c| sums[c * COLUMNS + c] / TOKENS as f32 / scales[c].powi(2)).collect();
        let (mut errors, mut power) = (0f64, 0f64);
        for row in m.rows.chunks(COLUMNS) {
            let mut values: Vec<f32> = row.iter().zip(scales).map(|(w, s)| w * s).collect();
            let mut bytes = vec![0; codec.dtype.bytes_for(COLUMNS as u64).unwrap() as usize];
            codec.encode(&values, COLUMNS, Some(&importance), &mut bytes).unwrap();
            codec.decode(&bytes, &mut values).unwrap();
            let e: Vec<f32> = values.iter().zip(scales).zip(row).map(|((v, s), w)| v / s - w).collect();
            let form = |v: &[f32]| {
                let pairs = (0..COLUMNS).flat_map(|i| (0..COLUMNS).map(move |j| (i, j)));
                pairs
                    .map(|(i, j)| f64::from(v[i]) * f64::from(v[j]) * f64::from(sums[i * COLUMNS + j]))
                    .sum::<f64>()
            };
            errors += form(&e);
            power += form(row);
        }
        errors / power
    }

    #[test]
    fn costs_are_what_the_outputs_change() {
        let m = matrix(DType::Q4_0, 20);
        let mut state = 3;
        let scales: Vec<f32> = (0..COLUMNS).map(|_| (noise(&mut state) * 2.0).exp2()).collect();
        let even = vec![1f32; COLUMNS];
        let costs = m.costs(&m.rows, &[even.clone(), scales.clone()], &|| false).unwrap();
        for (cost_of, scales) in costs.iter().zip([&even, &scales]) {
            let expected = cost(&m, scales);
            assert!((cost_of - expected).abs() < 1e-4 * expected, "{cost_of}, not {expected}");
        }
        assert!(m.costs(&m.rows, &[vec![1.0; 5]], &|| false).is_err());
        assert!(m.costs(&m.rows, &[even], &|| true).is_err());
    }

    #[test]
    fn scales_help_columns_that_carry_much() {
        for dtype in [DType::Q4_0, DType::Q4_1] {
            let m = matrix(dtype, 40);
            let output_of: Vec<u32> = (0..COLUMNS as u32).collect();
            let scales = search(std::slice::from_ref(&m), &output_of, COLUMNS, &|| false).unwrap();
            let (even, found) = (cost(&m, &[1.0; COLUMNS]), cost(&m, &scales));
            assert!(found < 0.8 * even, "{dtype}: {found} with scales, {even} without");
            assert!(scales[3] > scales[4], "{dtype}");
        }
    }

    #[test]
    fn heads_share_scales() {
        let m = matrix(DType::Q4_0, 40);
        let output_of: Vec<u32> = (0..COLUMNS as u32).map(|c| c % 32).collect();
        let scales = search(std::slice::from_ref(&m), &output_of, 32, &|| false).unwrap();
        assert_eq!(scales.len(), 32);
        let by_column: Vec<f32> = output_of.iter().map(|&o| scales[o as usize]).collect();
        assert!(cost(&m, &by_column) < cost(&m, &[1.0; COLUMNS]));
        let nothing = Matrix { codec: None, ..m };
        assert_eq!(search(&[nothing], &output_of, 32, &|| false).unwrap(), [1.0; 32]);
    }
}
