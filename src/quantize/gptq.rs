//! GPTQ: rounds the weights of a row one after the other, and lets those that are still to come make up
//! for the error so far, as the second moments of the inputs allow.
//!
//! With `H` the mean of `x x^T`, an error `e` of a row costs `e H e^T`. Let `H = (F + 1) D (F + 1)^T`,
//! `F` strictly upper triangular and `D` diagonal, in the order in which columns are rounded. Column `k`
//! becomes the value `q_k` of the grid next to `v_k = w_k + sum over i < k of (w_i - q_i) F[i, k]`, and
//! the cost is the sum of `D[k] (v_k - q_k)^2`. This is the same as the update by the inverse of `H` in
//! Frantar et al., "GPTQ" (arXiv 2210.17323), as Chee et al., "QuIP" (arXiv 2307.13304), theorem 6
//! show, and needs no inverse.
//!
//! Grids are static: scales are found before, by the type's own search weighed with the diagonal of `H`,
//! so columns can be rounded in any order, at no cost in the format.

use faer::MatMut;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};

use super::ternary::search;
use crate::block::gram::{PANEL, Tile, product};
use crate::block::{Lattice, WHOLE};
use crate::error::{Error, Result};

/// The sums of `x x^T`, a symmetric matrix.
pub trait Sums {
    /// Its columns.
    fn columns(&self) -> usize;
    /// Row `i` from the diagonal on: as many values as `row` takes.
    ///
    /// # Errors
    /// As reads fail.
    fn read(&self, i: usize, row: &mut [f32]) -> Result<()>;
}

/// How to prepare the moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// What is added to the diagonal, in parts of its mean. Where the factorization fails with it, more
    /// is added.
    pub damp: f64,
    /// Round columns in the order of their mean squares, the greatest first, instead of as they stand.
    pub desc_act: bool,
    /// How often scales are sought anew, for the values that were rounded.
    pub refits: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { damp: 0.01, desc_act: true, refits: 2 }
    }
}

/// The most that damping may grow to.
const MOST_DAMP: f64 = 1.0;

/// An entry of `F` that changes no value of F32.
const NOTHING: f32 = 1e-20;

/// What the inputs of a matrix say about its columns.
#[derive(Debug)]
pub struct Feedback {
    /// Columns in the order in which they are rounded.
    order: Vec<u32>,
    /// `F`: for each panel of columns the rows above its diagonal block.
    above: Vec<Vec<[f32; PANEL]>>,
    /// `F`: the diagonal blocks.
    diagonal: Vec<Tile>,
    /// `D`.
    pivots: Vec<f32>,
    /// The mean square of each column, as the columns stand.
    importance: Vec<f32>,
    /// `D` as the columns stand.
    by_column: Vec<f32>,
    /// The damping that was needed.
    damp: f64,
    /// Whether that is more than was asked for.
    damp_grew: bool,
    /// What damping added to the diagonal.
    ridge: f64,
    /// Columns that were 0 with every token.
    dead: u64,
    refits: usize,
}

impl Feedback {
    /// Bytes that making one from `columns` columns takes at most, and those that it then keeps.
    pub fn bytes(columns: u64) -> (u64, u64) {
        let n = columns.saturating_mul(columns);
        let kept = n.saturating_mul(2).saturating_add(columns.saturating_mul(PANEL as u64 * 4 + 16));
        (n.saturating_mul(8).saturating_add(kept), kept)
    }

    /// From `moments`, the sums of `x x^T` over `count` tokens.
    ///
    /// # Errors
    /// `Misuse` when the columns are no multiple of [`PANEL`], or nothing has been seen; `Check` when the
    /// moments cannot be factored even with a damping of the size of their mean; as `moments` fails.
    pub fn new(moments: &dyn Sums, count: u64, options: &Options) -> Result<Self> {
        let n = moments.columns();
        if n == 0 || !n.is_multiple_of(PANEL) || n.checked_mul(n).is_none() {
            return Err(Error::misuse(format!("{n} columns: a multiple of {PANEL} is needed")));
        }
        let per_token = 1.0 / count.max(1) as f64;
        let mut row = vec![0f32; n];
        let mut squares = vec![0f64; n];
        for (i, square) in squares.iter_mut().enumerate() {
            moments.read(i, &mut row[..1])?;
            *square = f64::from(row[0]) * per_token;
        }
        let mean = squares.iter().sum::<f64>() / n as f64;
        if count == 0 || !mean.is_finite() || mean <= 0.0 {
            return Err(Error::misuse("the moments are those of no input, or not finite"));
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        if options.desc_act {
            order.sort_by(|&a, &b| squares[b as usize].total_cmp(&squares[a as usize]));
        }
        // A lower factor of the matrix in the reverse order is an upper one in the right order.
        let mut place = vec![0; n];
        order.iter().enumerate().for_each(|(k, &c)| place[c as usize] = n - 1 - k);
        let mut matrix = vec![0f64; n * n];
        let mut damp = options.damp.max(0.0);
        loop {
            for i in 0..n {
                let row = &mut row[i..];
                moments.read(i, row)?;
                for (j, &value) in (i..).zip(row.iter()) {
                    let (a, b) = (place[i], place[j]);
                    matrix[a.min(b) * n + a.max(b)] = f64::from(value) * per_token;
                }
                matrix[place[i] * n + place[i]] += damp * mean;
            }
            if factor(&mut matrix, n) {
                break;
            }
            damp = if damp == 0.0 { 1e-4 } else { damp * 2.0 };
            if damp > MOST_DAMP {
                return Err(Error::check("the second moments cannot be factored, even with damping")
                    .hint("calibrate with more text"));
            }
        }
        let lower = |i: usize, j: usize| matrix[j * n + i];
        let f = |i: usize, k: usize| {
            let f = (lower(n - 1 - i, n - 1 - k) / lower(n - 1 - k, n - 1 - k)) as f32;
            // What moves no weight would only make products subnormal, which cost many times the time.
            if f.abs() < NOTHING { 0.0 } else { f }
        };
        let panels = n / PANEL;
        let above = (0..panels)
            .map(|c| (0..c * PANEL).map(|i| std::array::from_fn(|j| f(i, c * PANEL + j))).collect())
            .collect();
        let diagonal = (0..panels)
            .map(|c| {
                let first = c * PANEL;
                std::array::from_fn(|i| {
                    std::array::from_fn(|j| if i < j { f(first + i, first + j) } else { 0.0 })
                })
            })
            .collect();
        let pivots: Vec<f32> = (0..n).map(|k| lower(n - 1 - k, n - 1 - k).powi(2) as f32).collect();
        let mut by_column = vec![0f32; n];
        order.iter().zip(&pivots).for_each(|(&c, &pivot)| by_column[c as usize] = pivot);
        let importance = squares.iter().map(|&s| s as f32).collect();
        Ok(Self {
            order,
            above,
            diagonal,
            pivots,
            importance,
            by_column,
            damp,
            damp_grew: damp > options.damp.max(0.0),
            ridge: damp * mean,
            dead: squares.iter().filter(|&&s| s <= 0.0).count() as u64,
            refits: options.refits,
        })
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.order.len()
    }

    /// The damping that was needed, in parts of the mean of the diagonal.
    pub fn damp(&self) -> f64 {
        self.damp
    }

    /// Whether more damping was needed than was asked for.
    pub fn damp_grew(&self) -> bool {
        self.damp_grew
    }

    /// Columns that were 0 with every token. Damping lets them be rounded by themselves.
    pub fn dead_columns(&self) -> u64 {
        self.dead
    }

    /// The mean square of each column.
    pub fn importance(&self) -> &[f32] {
        &self.importance
    }

    /// Rounds whole rows of `weights` to the lattice, and writes their blocks to `out`. Returns the cost
    /// of each row, `e H e^T` with the damped `H`. A row's bytes do not depend on the rows around it.
    ///
    /// Scales are first those of the type's own search on the weights. What was then rounded were other
    /// values, the weights as they made up for earlier errors: the search on these, each weighed as it
    /// counts in the cost, gives scales for the next attempt. Each row keeps its best.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn encode(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        let n = self.columns();
        search(lattice, weights, n, &self.importance, out)?;
        let mut attempt = out.to_vec();
        let mut values = vec![0f32; weights.len()];
        let mut best = vec![f64::INFINITY; weights.len() / n];
        for _ in 0..=self.refits {
            let costs = self.round(lattice, weights, &mut attempt, &mut values)?;
            keep_better(&mut best, out, &costs, &attempt);
            search(lattice, &values, n, &self.by_column, &mut attempt)?;
        }
        Ok(best)
    }

    /// Rounds whole rows with the scales that `bytes` have, and puts the codes there. `values` become what
    /// was rounded. Returns the cost of each row.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub(super) fn round(
        &self,
        lattice: &Lattice,
        weights: &[f32],
        bytes: &mut [u8],
        values: &mut [f32],
    ) -> Result<Vec<f64>> {
        let n = self.columns();
        let mut lines = vec![(0.0, 0.0); lattice.groups(weights.len())];
        lattice.lines(bytes, &mut lines)?;
        let mut codes = vec![0u8; weights.len()];
        let tiles = weights.chunks(n * PANEL).zip(lines.chunks(lattice.groups(n) * PANEL));
        let results = codes.chunks_mut(n * PANEL).zip(values.chunks_mut(n * PANEL));
        let mut costs = Vec::with_capacity(weights.len() / n);
        for ((weights, lines), (codes, values)) in tiles.zip(results) {
            let cost = self.round_tile(lattice, weights, lines, codes, values);
            costs.extend_from_slice(&cost[..weights.len() / n]);
        }
        lattice.put(&codes, bytes)?;
        Ok(costs)
    }

    /// The mean square of the output of whole `rows`, `x H x^T` summed over them, with `H` as it is without
    /// damping.
    pub fn output(&self, rows: &[f32]) -> f64 {
        let n = self.columns();
        let squares: f64 = rows.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let damped: f64 = rows.chunks(n * PANEL).map(|tile| self.output_of_tile(tile)).sum();
        self.without_damping(damped, squares)
    }

    /// What rows cost with `H` as it is, from what they cost with the damped one, and their squares.
    pub fn without_damping(&self, damped: f64, squares: f64) -> f64 {
        (damped - self.ridge * squares).max(0.0)
    }

    fn output_of_tile(&self, rows: &[f32]) -> f64 {
        let n = self.columns();
        let mut lanes = vec![[0f32; PANEL]; n];
        for (lane, &column) in lanes.iter_mut().zip(&self.order) {
            for (x, row) in lane.iter_mut().zip(rows.chunks_exact(n)) {
                *x = row[column as usize];
            }
        }
        let mut sum = 0f64;
        let mut shift: Tile = [[0.0; PANEL]; PANEL];
        for (c, (above, diagonal)) in self.above.iter().zip(&self.diagonal).enumerate() {
            let first = c * PANEL;
            product(&lanes[..first], above, &mut shift);
            for j in 0..PANEL {
                for r in 0..PANEL {
                    let within = (0..j).map(|i| lanes[first + i][r] * diagonal[i][j]).sum::<f32>();
                    let value = f64::from(lanes[first + j][r] + shift[r][j] + within);
                    sum += f64::from(self.pivots[first + j]) * value * value;
                }
            }
        }
        sum
    }

    /// At most [`PANEL`] rows, side by side.
    fn round_tile(
        &self,
        lattice: &Lattice,
        weights: &[f32],
        lines: &[(f32, f32)],
        codes: &mut [u8],
        compensated: &mut [f32],
    ) -> [f64; PANEL] {
        let n = self.columns();
        let rows = weights.len() / n;
        let groups = lattice.groups(n);
        let mut costs = [0f64; PANEL];
        // By column, in the order of rounding: what each row's weight lost.
        let mut errors = vec![[0f32; PANEL]; n];
        let mut shift: Tile = [[0.0; PANEL]; PANEL];
        for (c, (above, diagonal)) in self.above.iter().zip(&self.diagonal).enumerate() {
            let first = c * PANEL;
            product(&errors[..first], above, &mut shift);
            // `v`: by column, then row.
            let mut values: Tile = [[0.0; PANEL]; PANEL];
            let mut originals: Tile = [[0.0; PANEL]; PANEL];
            for j in 0..PANEL {
                let column = self.order[first + j] as usize;
                for r in 0..rows {
                    originals[j][r] = weights[r * n + column];
                    values[j][r] = originals[j][r] + shift[r][j];
                }
            }
            for j in 0..PANEL {
                let column = self.order[first + j] as usize;
                let (mut scale, mut offset) = ([0f32; PANEL], [0f32; PANEL]);
                for r in 0..rows {
                    (scale[r], offset[r]) = lines[r * groups + column / lattice.group];
                }
                let (code, _, rounded) = nearest(lattice.levels, &values[j], &scale, &offset);
                let mut error = [0f32; PANEL];
                for r in 0..PANEL {
                    error[r] = originals[j][r] - rounded[r];
                }
                for r in 0..rows {
                    codes[r * n + column] = code[r];
                    compensated[r * n + column] = values[j][r];
                    let left = f64::from(values[j][r] - rounded[r]);
                    costs[r] += f64::from(self.pivots[first + j]) * left * left;
                }
                errors[first + j] = error;
                for k in j + 1..PANEL {
                    let f = diagonal[j][k];
                    for r in 0..PANEL {
                        values[k][r] += error[r] * f;
                    }
                }
            }
        }
        costs
    }
}

/// Takes over the rows of `attempt` that cost less than the best so far.
pub(super) fn keep_better(best: &mut [f64], out: &mut [u8], costs: &[f64], attempt: &[u8]) {
    let row_bytes = (out.len() / best.len().max(1)).max(1);
    let rows = out.chunks_exact_mut(row_bytes).zip(attempt.chunks_exact(row_bytes));
    for ((best, cost), (out, attempt)) in best.iter_mut().zip(costs).zip(rows) {
        if cost < best {
            *best = *cost;
            out.copy_from_slice(attempt);
        }
    }
}

/// Next to `values`: codes, their levels, and the values of the lattice. A scale of 0 gives the offset.
#[inline(always)]
pub(super) fn nearest(
    levels: &[f32],
    values: &[f32; PANEL],
    scale: &[f32; PANEL],
    offset: &[f32; PANEL],
) -> ([u8; PANEL], [f32; PANEL], [f32; PANEL]) {
    let (first, last) = (levels[0], levels[levels.len() - 1]);
    let mut level = [0f32; PANEL];
    let mut codes = [0u8; PANEL];
    for r in 0..PANEL {
        level[r] = ((values[r] - offset[r]) / scale[r]).max(first).min(last);
    }
    if levels.len() == (last - first + 1.0) as usize {
        for r in 0..PANEL {
            level[r] = (level[r] + WHOLE) - WHOLE;
            codes[r] = (level[r] - first) as u8;
        }
    } else {
        for r in 0..PANEL {
            let above = levels.windows(2).map(|l| 0.5 * (l[0] + l[1]));
            codes[r] = above.map(|middle| u8::from(level[r] > middle)).sum();
            level[r] = levels[usize::from(codes[r])];
        }
    }
    let mut rounded = [0f32; PANEL];
    for r in 0..PANEL {
        rounded[r] = scale[r] * level[r] + offset[r];
    }
    (codes, level, rounded)
}

/// The lower Cholesky factor of a matrix whose lower triangle is given, column by column, in its place;
/// false where there is none.
fn factor(matrix: &mut [f64], n: usize) -> bool {
    let par = faer::Par::Seq; // the same bits for any number of threads
    let mut buffer = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, par, Default::default()));
    let matrix = MatMut::from_column_major_slice_mut(matrix, n, n);
    let stack = MemStack::new(&mut buffer);
    cholesky_in_place(matrix, Default::default(), par, stack, Default::default()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{codec, lattice};
    use crate::tensor::DType;

    /// Random numbers of about unit size.
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() + next() + next()).collect()
    }

    struct Square<'a>(&'a [f64], usize);

    impl Sums for Square<'_> {
        fn columns(&self) -> usize {
            self.1
        }
        fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
            row.iter_mut().zip(&self.0[i * self.1 + i..]).for_each(|(r, &v)| *r = v as f32);
            Ok(())
        }
    }

    /// Moments of inputs that depend on each other, with columns of very different size.
    fn moments(n: usize, tokens: usize) -> Vec<f64> {
        let mut h = vec![0f64; n * n];
        for t in 0..tokens {
            let z = noise(n + 8, 7 + t as u64);
            let x: Vec<f64> = (0..n)
                .map(|i| f64::from(z[i] + z[i + 1] + z[i + 8] + z[n]) * (1.0 + (i % 7) as f64))
                .collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j];
                }
            }
        }
        h
    }

    fn cost(h: &[f64], n: usize, tokens: usize, error: &[f64]) -> f64 {
        let quadratic = |i: usize| (0..n).map(|j| error[i] * h[i * n + j] * error[j]).sum::<f64>();
        (0..n).map(quadratic).sum::<f64>() / tokens as f64
    }

    const TYPES: [DType; 14] = [
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q2_K,
        DType::Q3_K,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
        DType::IQ4_NL,
        DType::IQ4_XS,
        DType::TQ1_0,
        DType::TQ2_0,
    ];

    #[test]
    fn the_output_is_closer_than_by_rounding_each_weight() {
        let (n, tokens, rows) = (256, 600, 40);
        let h = moments(n, tokens);
        let weights = noise(n * rows, 3);
        for desc_act in [false, true] {
            let feedback = Feedback::new(
                &Square(&h, n),
                tokens as u64,
                &Options { damp: 1e-6, desc_act, ..Options::default() },
            )
            .unwrap();
            for dtype in TYPES {
                let lattice = lattice(dtype).unwrap();
                let codec = codec(dtype).unwrap();
                let mut bytes = vec![0; lattice.bytes(n * rows)];
                let decode = |bytes: &[u8]| {
                    let mut y = vec![0f32; n * rows];
                    codec.decode(bytes, &mut y).unwrap();
                    let each = y.iter().zip(&weights).map(|(y, w)| f64::from(w - y)).collect::<Vec<_>>();
                    each.chunks(n).map(|e| cost(&h, n, tokens, e)).collect::<Vec<f64>>()
                };
                codec.encode(&weights, n, Some(feedback.importance()), &mut bytes).unwrap();
                let before = decode(&bytes);
                let claimed = feedback.encode(lattice, &weights, &mut bytes).unwrap();
                let after = decode(&bytes);
                let (b, a): (f64, f64) = (before.iter().sum(), after.iter().sum());
                assert!(a < 0.9 * b, "{dtype}: {a} after {b}");
                let mut left = vec![0f32; n * rows];
                codec.decode(&bytes, &mut left).unwrap();
                left.iter_mut().zip(&weights).for_each(|(y, w)| *y = w - *y);
                assert!((feedback.output(&left) - a).abs() <= 1e-3 * a, "{dtype}");
                // The cost that is reported is the cost (but for the damping).
                for (claimed, after) in claimed.iter().zip(&after) {
                    assert!((claimed - after).abs() <= 1e-2 * after, "{dtype}: {claimed} {after}");
                }
                // Rows do not depend on each other.
                let mut alone = vec![0; lattice.bytes(n)];
                feedback.encode(lattice, &weights[37 * n..38 * n], &mut alone).unwrap();
                assert_eq!(alone, bytes[37 * alone.len()..38 * alone.len()], "{dtype}");
            }
        }
    }

    /// The textbook form, with the inverse, in f64: the same codes but where a value lies on an edge.
    #[test]
    fn the_same_codes_as_by_the_inverse() {
        let (n, tokens) = (96, 300);
        let h = moments(n, tokens);
        let feedback =
            Feedback::new(&Square(&h, n), tokens as u64, &Options { damp: 0.01, desc_act: true, refits: 0 })
                .unwrap();
        let lattice = lattice(DType::Q4_0).unwrap();
        let weights = noise(n, 11);
        let mut bytes = vec![0; 18 * 3];
        feedback.encode(lattice, &weights, &mut bytes).unwrap();
        let mut rounded = vec![0f32; n];
        lattice.decode(&bytes, &mut rounded).unwrap();
        let mut lines = vec![(0.0, 0.0); 3];
        lattice.lines(&bytes, &mut lines).unwrap();

        let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        let order: Vec<usize> = feedback.order.iter().map(|&c| c as usize).collect();
        let mut a: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                (0..n).map(|j| h[order[i] * n + order[j]] + if i == j { 0.01 * mean } else { 0.0 }).collect()
            })
            .collect();
        // Gauss-Jordan: the inverse.
        let mut inverse: Vec<Vec<f64>> =
            (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
        for k in 0..n {
            let pivot = a[k][k];
            for j in 0..n {
                a[k][j] /= pivot;
                inverse[k][j] /= pivot;
            }
            for i in (0..n).filter(|&i| i != k) {
                let factor = a[i][k];
                for j in 0..n {
                    a[i][j] -= factor * a[k][j];
                    inverse[i][j] -= factor * inverse[k][j];
                }
            }
        }
        let mut w: Vec<f64> = order.iter().map(|&c| weights[c].into()).collect();
        for k in 0..n {
            let (scale, _) = lines[order[k] / 32];
            let q = (w[k] / f64::from(scale)).round_ties_even().clamp(-8.0, 7.0) * f64::from(scale);
            assert!((q - f64::from(rounded[order[k]])).abs() < 1e-6, "column {k}");
            let error = (w[k] - q) / inverse[k][k];
            for j in k..n {
                w[j] -= error * inverse[k][j];
            }
            // Takes the column out of the inverse.
            let row = inverse[k].clone();
            for other in &mut inverse[k + 1..] {
                let factor = other[k] / row[k];
                for j in k..n {
                    other[j] -= factor * row[j];
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_factored_gets_more_damping_or_is_refused() {
        let n = 32;
        // One token: rank 1.
        let h = moments(n, 1);
        let feedback =
            Feedback::new(&Square(&h, n), 1, &Options { damp: 0.0, desc_act: false, refits: 0 }).unwrap();
        assert!(feedback.damp() > 0.0 && feedback.damp_grew() && feedback.dead_columns() == 0);
        // A column that is always 0.
        let mut without = moments(n, 100);
        (0..n).for_each(|i| (without[3 * n + i], without[i * n + 3]) = (0.0, 0.0));
        let feedback = Feedback::new(&Square(&without, n), 100, &Options::default()).unwrap();
        assert!(!feedback.damp_grew() && feedback.dead_columns() == 1);
        assert!(Feedback::new(&Square(&vec![0.0; n * n], n), 5, &Options::default()).is_err());
        assert!(Feedback::new(&Square(&h, n), 0, &Options::default()).is_err());
        assert!(Feedback::new(&Square(&h, 31), 1, &Options::default()).is_err());
    }
}
