//! AdaRound: scales rest, and each weight goes to one of the two levels around it, chosen by gradient.
//!
//! Nagel et al., "Up or down?" (arXiv 2004.10568): a weight becomes `low + h(v) (high - low)` with
//! `h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)`, and Adam moves all `v` by the gradient of the cost
//! `e H e^T` and of `1 - |2 h - 1|^b`, which pushes `h` to 0 or 1 while `b` falls from 20 to 2. The cost is
//! taken in units of what rounding a weight at random costs on average, so that one strength of the
//! push suits all matrices.
//!
//! What comes out is improved by [descent] on codes, as GPTQ's codes are, which may go
//! beyond the two levels. Each row keeps the better of the two.

use super::descent::{self, Descent, Lane, Rows};
use super::gptq::{Feedback, Sums, keep_better};
use crate::block::Lattice;
use crate::block::gram::PANEL;
use crate::error::Result;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The rounds of descent; its scales rest.
    pub descent: descent::Options,
    /// Steps of Adam; 0 leaves descent from GPTQ's codes.
    pub iters: usize,
    /// Their size.
    pub lr: f32,
    /// Columns that a step moves, in whole panels; steps take these in turn.
    pub batch: usize,
}

impl Default for Options {
    fn default() -> Self {
        let descent = descent::Options { scales: false, restarts: 0, ..descent::Options::default() };
        Self { descent, iters: 300, lr: 0.03, batch: usize::MAX }
    }
}

/// Strength of the push.
const PUSH: f32 = 0.05;
/// The part of the steps that goes without.
const FREE: f32 = 0.2;
/// The exponent of the push, from and to.
const EXPONENT: (f32, f32) = (20.0, 2.0);
/// Adam's decays.
const DECAY: (f32, f32) = (0.9, 0.999);

/// What is prepared for an input.
#[derive(Debug)]
pub struct AdaRound {
    descent: Descent,
    options: Options,
}

impl AdaRound {
    /// From `moments`, the sums of `x x^T` over `count` tokens.
    ///
    /// # Errors
    /// As [`Descent::new`].
    pub fn new(moments: &dyn Sums, count: u64, options: &Options) -> Result<Self> {
        Ok(Self { descent: Descent::new(moments, count, &options.descent)?, options: *options })
    }

    /// The moments, as they were factored.
    pub fn feedback(&self) -> &Feedback {
        self.descent.feedback()
    }

    /// Encodes whole rows, and returns the cost of each.
    ///
    /// # Errors
    /// `Misuse` when sizes do not fit.
    pub fn encode(&self, lattice: &Lattice, weights: &[f32], out: &mut [u8]) -> Result<Vec<f64>> {
        let n = self.descent.columns();
        let mut costs = self.descent.encode(lattice, weights, out)?;
        if self.options.iters == 0 {
            return Ok(costs);
        }
        let row_bytes = (out.len() / costs.len().max(1)).max(1);
        let tiles = weights.chunks(n * PANEL).zip(out.chunks_mut(row_bytes * PANEL));
        for ((weights, out), costs) in tiles.zip(costs.chunks_mut(PANEL)) {
            let mut rows = Rows::new(lattice, weights, n, out)?;
            self.relax(&mut rows);
            let mut other = rows.finish()?;
            let found = self.descent.improve(lattice, weights, &mut other)?;
            keep_better(costs, out, &found, &other);
        }
        Ok(costs)
    }

    /// Gives each weight one of the two levels around it.
    fn relax(&self, rows: &mut Rows) {
        let mut choices: Vec<Choice> = (0..rows.weights.len()).map(|k| Choice::new(rows, k)).collect();
        let mut random = [0f32; PANEL];
        for (k, choice) in choices.iter().enumerate() {
            let diagonal = self.descent.diagonal(k);
            random.iter_mut().zip(&choice.step).for_each(|(sum, step)| *sum += diagonal * step * step);
        }
        let each = random.map(|sum| if sum > 0.0 { rows.weights.len() as f32 / sum } else { 0.0 });
        let iters = self.options.iters as f32;
        let panels = rows.weights.len() / PANEL;
        let batch = self.options.batch.div_ceil(PANEL).clamp(1, panels);
        let turns = panels.div_ceil(batch);
        for t in 0..self.options.iters {
            for (k, choice) in choices.iter().enumerate() {
                for (r, h) in choice.hardness().into_iter().enumerate() {
                    let value = choice.low[r] + h * choice.step[r];
                    rows.errors[k][r] = rows.weights[k][r] - value;
                }
            }
            let done = (t as f32 / iters - FREE) / (1.0 - FREE);
            let exponent = EXPONENT.1 + (EXPONENT.0 - EXPONENT.1) * (1.0 - done);
            let push = if done >= 0.0 { PUSH } else { 0.0 };
            let turn = t % turns;
            let time = (t / turns) as i32 + 1;
            let bias = (1.0 - DECAY.0.powi(time), 1.0 - DECAY.1.powi(time));
            let panels = turn * batch..((turn + 1) * batch).min(panels);
            self.descent.gradients(panels, &rows.errors, |k, gradient| {
                choices[k].advance(gradient, &each, push, exponent, self.options.lr, bias);
            });
        }
        for (k, choice) in choices.iter().enumerate() {
            for (r, h) in choice.hardness().into_iter().enumerate() {
                rows.levels[k][r] = if h >= 0.5 { choice.levels.1[r] } else { choice.levels.0[r] };
            }
        }
    }
}

/// The choices of the weights of a column.
struct Choice {
    /// The lower value, and how far above it the other is.
    low: Lane,
    step: Lane,
    /// Their levels.
    levels: (Lane, Lane),
    v: Lane,
    /// Adam's means of gradients and of their squares.
    mean: Lane,
    square: Lane,
}

impl Choice {
    fn new(rows: &Rows, column: usize) -> Self {
        let (scale, offset) = rows.lines_at(column);
        let mut new = Self {
            low: [0.0; PANEL],
            step: [0.0; PANEL],
            levels: ([0.0; PANEL], [0.0; PANEL]),
            v: [0.0; PANEL],
            mean: [0.0; PANEL],
            square: [0.0; PANEL],
        };
        let levels = rows.lattice.levels;
        for r in 0..PANEL {
            let wish = match scale[r] != 0.0 {
                true => (rows.weights[column][r] - offset[r]) / scale[r],
                false => 0.0,
            };
            let above = levels.partition_point(|&l| l <= wish).clamp(1, levels.len() - 1);
            let (low, high) = (levels[above - 1], levels[above]);
            new.levels.0[r] = low;
            new.levels.1[r] = high;
            new.low[r] = scale[r] * low + offset[r];
            new.step[r] = scale[r] * (high - low);
            let part = ((wish - low) / (high - low)).clamp(0.01, 0.99);
            new.v[r] = -(1.2 / (part + 0.1) - 1.0).ln();
        }
        new
    }

    /// `h(v)`.
    fn hardness(&self) -> Lane {
        self.v.map(|v| (1.2 / (1.0 + (-v).exp()) - 0.1).clamp(0.0, 1.0))
    }

    /// A step of Adam. `gradient` is `H e`; `each` the inverse of what a weight costs on average.
    fn advance(&mut self, gradient: &Lane, each: &Lane, push: f32, exponent: f32, lr: f32, bias: (f32, f32)) {
        for r in 0..PANEL {
            let sigmoid = 1.0 / (1.0 + (-self.v[r]).exp());
            let h = 1.2 * sigmoid - 0.1;
            if !(0.0..=1.0).contains(&h) {
                continue;
            }
            let side = 2.0 * h - 1.0;
            let mut slope = -2.0 * gradient[r] * self.step[r] * each[r];
            if push > 0.0 {
                slope -= push * 2.0 * exponent * side.signum() * side.abs().powf(exponent - 1.0);
            }
            slope *= 1.2 * sigmoid * (1.0 - sigmoid);
            self.mean[r] = DECAY.0 * self.mean[r] + (1.0 - DECAY.0) * slope;
            self.square[r] = DECAY.1 * self.square[r] + (1.0 - DECAY.1) * slope * slope;
            self.v[r] -= lr * (self.mean[r] / bias.0) / ((self.square[r] / bias.1).sqrt() + 1e-8);
        }
    }
}
