//! Descent: codes and scales of encoded rows are moved, one at a time, wherever that lowers the change of
//! the output.
//!
//! With `e` what a row lost and `H` the mean of `x x^T`, the cost `e H e^T` is a quadratic function of
//! every code, scale and offset while the others rest, and `H e` is its whole gradient (but for a factor):
//! the best step is known, so none needs a rate, and no step makes the row worse. A code moves to the
//! level next to `q + (H e)[k] / H[k, k]`; scale and offset of a group move by least squares in the metric
//! of `H`, to what the block type can hold.
//!
//! GPTQ's codes are the start. GPTQ looks ahead only: a column that was rounded stays, though later ones
//! did worse than it expected. Descent looks back. Both are then done again with the scales it found.

use std::ops::Range;

use super::gptq::{self, Feedback, Sums, keep_better, nearest};
use crate::block::Lattice;
use crate::block::gram::{PANEL, Tile, product};
use crate::error::Result;

/// How to descend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The start.
    pub start: gptq::Options,
    /// Rounds over all codes and scales, at most: it ends where nothing moves.
    pub iters: usize,
    /// How often GPTQ and descent are done again with the scales that were found.
    pub restarts: usize,
    /// Whether scales and offsets move, or codes only.
    pub scales: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { start: gptq::Options::default(), iters: 8, restarts: 1, scales: true }
    }
}

/// The second moments of an input, damped as the start's are.
#[derive(Debug)]
pub struct Descent {
    feedback: Feedback,
    /// `H`: for each panel of columns all its rows.
    panels: Vec<Vec<[f32; PANEL]>>,
    options: Options,
}

/// A weight of each of the rows that are worked on side by side.
pub(super) type Lane = [f32; PANEL];

/// Rows of a matrix as they are encoded, by column.
pub(super) struct Rows<'a> {
    pub lattice: &'a Lattice,
    /// How many there are; the other lanes are zeros.
    count: usize,
    /// The weights.
    pub weights: Vec<Lane>,
    /// What they became.
    values: Vec<Lane>,
    /// What they lost.
    pub errors: Vec<Lane>,
    /// The levels of their codes.
    pub levels: Vec<Lane>,
    /// Scale and offset of each group, row by row.
    lines: Vec<(f32, f32)>,
    /// Their blocks, row by row. The codes in these are old.
    bytes: Vec<u8>,
}

impl Descent {
    /// Bytes that making one from `columns` columns takes at most, and those that it then keeps.
    pub fn bytes(columns: u64) -> (u64, u64) {
        let (making, kept) = Feedback::bytes(columns);
        let own = columns.saturating_mul(columns).saturating_mul(4);
        (making.saturating_add(own), kept.saturating_add(own))
    }

    /// From `moments`, the sums of `x x^T` over `count` tokens.
    ///
    /// # Errors
    /// As [`Feedback::new`].
    pub fn new(moments: &dyn Sums, count: u64, options: &Options) -> Result<Self> {
        let feedback = Feedback::new(moments, count, &options.start)?;
        let n = feedback.columns();
        let per_token = 1.0 / count.max(1) as f64;
        let mean = feedback.importance().iter().map(|&s| f64::from(s)).sum::<f64>() / n as f64;
        let mut panels = vec![vec![[0f32; PANEL]; n]; n / PANEL];
        let mut row = vec![0f32; n];
        for i in 0..n {
            let row = &mut row[i..];
            moments.read(i, row)?;
            for (j, &sum) in (i..).zip(row.iter()) {
                let damp = if i == j { feedback.damp() * mean } else { 0.0 };
                let value = (f64::from(sum) * per_token + damp) as f32;
                panels[j / PANEL][i][j % PANEL] = value;
                panels[i / PANEL][j][i % PANEL] = value;
            }
        }
        Ok(Self { feedback, panels, options: *options })
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.feedback.columns()
    }

    /// What the start is made with.
    pub fn feedback(&self) -> &Feedback {
        &self.feedback
    }

    /// Encodes whole rows, and returns the cost of each, with the damped `H`. A row's bytes do not depend
    /// on the rows around it.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn encode(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        self.feedback.encode(lattice, weights, out)?;
        let mut best = self.improve(lattice, weights, out)?;
        let mut values = vec![0f32; weights.len()];
        for _ in 0..self.options.restarts {
            let mut attempt = out.to_vec();
            self.feedback.round(lattice, weights, &mut attempt, &mut values)?;
            let costs = self.improve(lattice, weights, &mut attempt)?;
            keep_better(&mut best, out, &costs, &attempt);
        }
        Ok(best)
    }

    /// Improves rows that are encoded. None gets worse.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn improve(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        let rows = weights.len() / self.columns();
        let row_bytes = (out.len() / rows.max(1)).max(1);
        let mut costs = Vec::with_capacity(rows);
        for (weights, out) in weights.chunks(self.columns() * PANEL).zip(out.chunks_mut(row_bytes * PANEL)) {
            let mut rows = Rows::new(lattice, weights, self.columns(), out)?;
            let before = self.costs(&rows.errors);
            for _ in 0..self.options.iters {
                let moved = self.move_codes(&mut rows);
                let moved = self.options.scales && self.move_lines(&mut rows)? || moved;
                if !moved {
                    break;
                }
            }
            let count = rows.count;
            let found = rows.finish()?;
            let after = self.costs(&Rows::new(lattice, weights, self.columns(), &found)?.errors);
            let mut best = before[..count].to_vec();
            keep_better(&mut best, out, &after[..count], &found);
            costs.extend(best);
        }
        Ok(costs)
    }

    /// The cost of each row as it is encoded.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn costs_of(&self, lattice: &Lattice, weights: &[f32], out: &[u8]) -> Result<Vec<f64>> {
        let rows = weights.len() / self.columns();
        let row_bytes = (out.len() / rows.max(1)).max(1);
        let mut costs = Vec::with_capacity(rows);
        for (weights, out) in weights.chunks(self.columns() * PANEL).zip(out.chunks(row_bytes * PANEL)) {
            let rows = Rows::new(lattice, weights, self.columns(), out)?;
            costs.extend_from_slice(&self.costs(&rows.errors)[..rows.count]);
        }
        Ok(costs)
    }

    /// `H[k, k]`.
    pub(super) fn diagonal(&self, k: usize) -> f32 {
        self.panels[k / PANEL][k][k % PANEL]
    }

    /// Hands each column of `H e` in these panels to `each`, with its number.
    pub(super) fn gradients(
        &self,
        panels: Range<usize>,
        errors: &[Lane],
        mut each: impl FnMut(usize, &Lane),
    ) {
        let mut gradient: Tile = [[0.0; PANEL]; PANEL];
        for c in panels {
            product(&self.panels[c], errors, &mut gradient);
            gradient.iter().enumerate().for_each(|(j, g)| each(c * PANEL + j, g));
        }
    }

    /// `e H e^T` of each lane.
    fn costs(&self, errors: &[Lane]) -> [f64; PANEL] {
        let mut costs = [0f64; PANEL];
        self.gradients(0..self.panels.len(), errors, |k, g| {
            for r in 0..PANEL {
                costs[r] += f64::from(g[r]) * f64::from(errors[k][r]);
            }
        });
        costs
    }

    /// Moves each code once, where that pays; whether any moved.
    fn move_codes(&self, rows: &mut Rows) -> bool {
        let mut any = false;
        let mut gradient: Tile = [[0.0; PANEL]; PANEL];
        for (c, panel) in self.panels.iter().enumerate() {
            product(panel, &rows.errors, &mut gradient);
            for j in 0..PANEL {
                let k = c * PANEL + j;
                let diagonal = panel[k][j];
                if diagonal <= 0.0 {
                    continue;
                }
                let (scale, offset) = rows.lines_at(k);
                let (values, g) = (&mut rows.values[k], gradient[j]);
                let mut wish = [0f32; PANEL];
                for r in 0..PANEL {
                    wish[r] = values[r] + g[r] / diagonal;
                }
                let (_, level, rounded) = nearest(rows.lattice.levels, &wish, &scale, &offset);
                let mut step = [0f32; PANEL];
                for r in 0..PANEL {
                    let moved = rounded[r] - values[r];
                    if moved * (2.0 * g[r] - moved * diagonal) > 0.0 {
                        step[r] = moved;
                        values[r] = rounded[r];
                        rows.levels[k][r] = level[r];
                        rows.errors[k][r] = rows.weights[k][r] - rounded[r];
                    }
                }
                if step == [0.0; PANEL] {
                    continue;
                }
                any = true;
                for i in j + 1..PANEL {
                    let h = panel[k][i];
                    for r in 0..PANEL {
                        gradient[i][r] -= step[r] * h;
                    }
                }
            }
        }
        any
    }

    /// Moves scale and offset of each group once, where that pays; whether any moved.
    fn move_lines(&self, rows: &mut Rows) -> Result<bool> {
        let mut any = false;
        let (mut gradient, mut bend): (Tile, Tile) = ([[0.0; PANEL]; PANEL], [[0.0; PANEL]; PANEL]);
        for g in 0..rows.groups() {
            let columns = rows.columns(g);
            let mut slopes = [Slopes::default(); PANEL];
            for c in columns.start / PANEL..columns.end.div_ceil(PANEL) {
                let panel = &self.panels[c];
                product(panel, &rows.errors, &mut gradient);
                product(&panel[columns.clone()], &rows.levels[columns.clone()], &mut bend);
                let mut ones = [0f64; PANEL];
                for row in &panel[columns.clone()] {
                    ones.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
                }
                for (j, &ones) in ones.iter().enumerate() {
                    let k = c * PANEL + j;
                    if !columns.contains(&k) {
                        continue;
                    }
                    for (r, slopes) in slopes.iter_mut().enumerate() {
                        slopes.add(rows.levels[k][r], gradient[j][r], bend[j][r], ones);
                    }
                }
            }
            for (r, slopes) in slopes.iter().enumerate().take(rows.count) {
                any |= rows.move_line(r, g, slopes)?;
            }
        }
        Ok(any)
    }
}

/// What the cost changes by when a group's scale grows by `s` and its offset by `o`:
/// `-2 (s a + o b) + s^2 aa + 2 s o ab + o^2 bb`.
#[derive(Clone, Copy, Debug, Default)]
struct Slopes {
    a: f64,
    b: f64,
    aa: f64,
    ab: f64,
    bb: f64,
}

impl Slopes {
    fn add(&mut self, level: f32, gradient: f32, bend: f32, ones: f64) {
        let (level, gradient, bend) = (f64::from(level), f64::from(gradient), f64::from(bend));
        self.a += level * gradient;
        self.b += gradient;
        self.aa += level * bend;
        self.ab += bend;
        self.bb += ones;
    }

    fn change(&self, s: f64, o: f64) -> f64 {
        -2.0 * (s * self.a + o * self.b) + s * s * self.aa + 2.0 * s * o * self.ab + o * o * self.bb
    }

    /// The best step of the scale, that of the offset given.
    fn scale(&self, o: f64) -> f64 {
        (self.a - o * self.ab) / self.aa
    }

    /// The best steps of both, from these values, where the offset is to be `-zero` times the scale.
    fn with_zero(&self, zero: f64, scale: f64, offset: f64) -> (f64, f64) {
        // The offset's step without one of the scale.
        let first = -zero * scale - offset;
        let slope = self.a - zero * self.b - first * (self.ab - zero * self.bb);
        let s = slope / (self.aa - 2.0 * zero * self.ab + zero * zero * self.bb);
        (s, first - zero * s)
    }

    /// The best step of the offset, both free.
    fn offset(&self) -> f64 {
        let area = self.aa * self.bb - self.ab * self.ab;
        match area > 1e-9 * self.aa * self.bb {
            true => (self.b * self.aa - self.a * self.ab) / area,
            false => 0.0,
        }
    }
}

impl<'a> Rows<'a> {
    pub fn new(lattice: &'a Lattice, weights: &[f32], columns: usize, bytes: &[u8]) -> Result<Self> {
        let count = weights.len() / columns;
        let mut decoded = vec![0f32; weights.len()];
        lattice.decode(bytes, &mut decoded)?;
        let mut lines = vec![(0.0, 0.0); lattice.groups(weights.len())];
        lattice.lines(bytes, &mut lines)?;
        let lanes = |row_major: &[f32]| {
            let mut lanes = vec![[0f32; PANEL]; columns];
            for (r, row) in row_major.chunks_exact(columns).enumerate() {
                lanes.iter_mut().zip(row).for_each(|(lane, &x)| lane[r] = x);
            }
            lanes
        };
        let mut rows = Self {
            lattice,
            count,
            weights: lanes(weights),
            values: lanes(&decoded),
            errors: vec![[0f32; PANEL]; columns],
            levels: vec![[0f32; PANEL]; columns],
            lines,
            bytes: bytes.to_vec(),
        };
        for k in 0..columns {
            let (scale, offset) = rows.lines_at(k);
            (_, rows.levels[k], _) = nearest(lattice.levels, &rows.values[k], &scale, &offset);
            for r in 0..PANEL {
                rows.errors[k][r] = rows.weights[k][r] - rows.values[k][r];
            }
        }
        Ok(rows)
    }

    /// Groups of a row.
    fn groups(&self) -> usize {
        self.lattice.groups(self.weights.len())
    }

    /// The columns of a group.
    fn columns(&self, group: usize) -> Range<usize> {
        let size = self.lattice.group;
        group * size..((group + 1) * size).min(self.weights.len())
    }

    /// Scale and offset of a column.
    pub fn lines_at(&self, column: usize) -> (Lane, Lane) {
        let (mut scale, mut offset) = ([0f32; PANEL], [0f32; PANEL]);
        for r in 0..self.count {
            (scale[r], offset[r]) = self.lines[r * self.groups() + column / self.lattice.group];
        }
        (scale, offset)
    }

    /// Moves scale and offset of a group of a row, where that pays; whether they moved.
    fn move_line(&mut self, r: usize, g: usize, slopes: &Slopes) -> Result<bool> {
        let lattice = self.lattice;
        if !(slopes.aa > 0.0 && slopes.a.is_finite() && slopes.b.is_finite()) {
            return Ok(false);
        }
        let in_block = lattice.block_size / lattice.group;
        let size = lattice.type_size;
        let at = (r * self.groups() + g) / in_block * size;
        let block = &mut self.bytes[at..at + size];
        let was = self.lines[r * lattice.groups(self.weights.len()) + g];
        let (scale, offset) = (f64::from(was.0), f64::from(was.1));
        let mut lines = [(0f32, 0f32); 16];
        let lines = &mut lines[..in_block];
        // What `block` makes of a wish: the block, the line in it, and what the cost changes by.
        let mut attempt = |s: f64, o: f64| -> Result<_> {
            let mut tried = block.to_vec();
            lattice.set(g % in_block, ((scale + s) as f32, (offset + o) as f32), &mut tried)?;
            lattice.lines(&tried, lines)?;
            let line = lines[g % in_block];
            let change = slopes.change(f64::from(line.0) - scale, f64::from(line.1) - offset);
            Ok((change, line, tried))
        };
        let mut best = attempt(slopes.scale(0.0), 0.0)?;
        let mut keep = |other: (f64, (f32, f32), Vec<u8>)| {
            if other.0 < best.0 {
                best = other;
            }
        };
        if lattice.has_zero() {
            let zero = |s: f64, o: f64| (-(offset + o) / (scale + s)).round();
            let (own, o) = (zero(0.0, 0.0), slopes.offset());
            for zero in [own, own - 1.0, own + 1.0, zero(slopes.scale(o), o)] {
                let (s, o) = slopes.with_zero(zero, scale, offset);
                keep(attempt(s, o)?);
            }
        } else if lattice.has_offset() {
            let o = slopes.offset();
            let both = attempt(slopes.scale(o), o)?;
            // With the offset as it can be stored.
            let o = f64::from(both.1.1) - offset;
            keep(both);
            keep(attempt(slopes.scale(o), o)?);
        }
        let (change, line, tried) = best;
        if !(change < 0.0 && line != was) {
            return Ok(false);
        }
        block.copy_from_slice(&tried);
        let groups = self.groups();
        self.lines[r * groups + g] = line;
        for k in self.columns(g) {
            self.values[k][r] = line.0 * self.levels[k][r] + line.1;
            self.errors[k][r] = self.weights[k][r] - self.values[k][r];
        }
        Ok(true)
    }

    /// The blocks, with the codes that were found.
    pub fn finish(self) -> Result<Vec<u8>> {
        let Self { lattice, count, levels, mut bytes, .. } = self;
        let code = |level: f32| lattice.levels.partition_point(|&l| l < level) as u8;
        let codes: Vec<u8> =
            (0..count).flat_map(|r| levels.iter().map(move |level| code(level[r]))).collect();
        lattice.put(&codes, &mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Square, noise};
    use super::*;
    use crate::block::lattice;
    use crate::tensor::DType;

    /// Only the first six inputs are ever other than zero: the other columns count by their damping
    /// alone, for themselves. So every choice of codes that matters can be tried.
    #[test]
    fn codes_are_near_the_best_of_all() {
        let (n, tokens, free) = (32, 60, 6);
        let mut sums = Square::new(n, tokens);
        for i in 0..n * n {
            if i % n >= free || i / n >= free {
                sums.sums[i] = 0.0;
            }
        }
        let options = Options { scales: false, restarts: 0, ..Options::default() };
        let descent = Descent::new(&sums, tokens as u64, &options).unwrap();
        let lattice = lattice(DType::Q4_0).unwrap();
        let (mut found, mut start, mut best) = (0.0, 0.0, 0.0);
        for seed in 0..12 {
            let weights = noise(n, 100 + seed);
            let mut bytes = [0; 18];
            start += descent.feedback.encode(lattice, &weights, &mut bytes).unwrap()[0];
            found += descent.improve(lattice, &weights, &mut bytes).unwrap()[0];
            let rows = Rows::new(lattice, &weights, n, &bytes).unwrap();
            let scale = rows.lines[0].0;
            let lost = |k: usize, level: f32| weights[k] - scale * level.clamp(-8.0, 7.0);
            // Two levels around each weight, and one beyond on each side.
            let mut errors: Vec<f32> = (0..n).map(|k| lost(k, (weights[k] / scale).round())).collect();
            let mut least = f64::INFINITY;
            for choice in 0..1usize << (2 * free) {
                for (k, error) in errors.iter_mut().enumerate().take(free) {
                    let up = (choice >> (2 * k) & 3) as f32 - 1.0;
                    *error = lost(k, (weights[k] / scale).floor() + up);
                }
                least = least.min(small_cost(&sums, free, tokens, &errors));
            }
            best += least;
        }
        assert!(found <= start && found <= 1.05 * best, "{start} {found} {best}");
        assert!(found >= best * (1.0 - 1e-4), "{found} {best}");
    }

    /// [`Square::cost`] where only the first `free` columns have moments.
    fn small_cost(sums: &Square, free: usize, tokens: usize, error: &[f32]) -> f64 {
        let n = sums.n;
        let mean = (0..free).map(|i| f64::from(sums.sums[i * n + i])).sum::<f64>() / n as f64;
        let damping = error.iter().map(|e| 0.01 * mean * f64::from(*e) * f64::from(*e)).sum::<f64>();
        let row = |i: usize| -> f64 {
            let terms = sums.sums[i * n..][..free].iter().zip(error);
            let product: f64 = terms.map(|(s, e)| f64::from(*s) * f64::from(*e)).sum();
            f64::from(error[i]) * product
        };
        ((0..free).map(row).sum::<f64>() + damping) / tokens as f64
    }

    #[test]
    fn where_it_ends_no_code_is_left_to_move() {
        let (n, tokens) = (256, 300);
        let sums = Square::new(n, tokens);
        let options = Options { scales: false, restarts: 0, iters: 1000, ..Options::default() };
        let descent = Descent::new(&sums, tokens as u64, &options).unwrap();
        let weights = noise(n, 9);
        for dtype in [DType::Q4_1, DType::Q3_K, DType::IQ4_XS, DType::TQ1_0] {
            let lattice = lattice(dtype).unwrap();
            let mut bytes = vec![0; lattice.bytes(n)];
            let cost = descent.encode(lattice, &weights, &mut bytes).unwrap()[0];
            let rows = Rows::new(lattice, &weights, n, &bytes).unwrap();
            let mut gradient = vec![0.0; n];
            descent.gradients(0..n / PANEL, &rows.errors, |k, g| gradient[k] = g[0]);
            for (k, gradient) in gradient.iter().enumerate() {
                let (scale, offset) = rows.lines_at(k);
                for &level in lattice.levels {
                    let moved = scale[0] * level + offset[0] - rows.values[k][0];
                    let change = moved * (moved * descent.diagonal(k) - 2.0 * gradient);
                    assert!(f64::from(change) >= -1e-4 * cost, "{dtype} {k}: {change} of {cost}");
                }
            }
        }
    }
}
