//! Ternary weights: each is one of `-a`, `0` and `a`, with one `a` for 256 of them.
//!
//! What is known of PT-BitNet (Guo et al., Neural Networks 191, 2025) are its two parts, a search for
//! scales and thresholds, and an optimization of the codes by blocks. These are the same with what this
//! crate has: thresholds by least squares weighed with the mean squares of the columns, GPTQ's feedback,
//! scales sought anew for the values that were rounded, and [descent] on codes and scales.
//! Other block types of the same file, those of embeddings and output, get the last two as well.

use super::descent::{self, Descent};
use super::gptq::{Feedback, Sums};
use crate::block::Lattice;
use crate::block::ternary::{absmean, threshold};
use crate::error::{Error, Result};

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The last stage.
    pub stage: Stage,
    /// For the stages that need it.
    pub descent: descent::Options,
}

impl Default for Options {
    fn default() -> Self {
        let descent = descent::Options { iters: 12, ..descent::Options::default() };
        Self { stage: Stage::Descent, descent }
    }
}

/// The stages, each on top of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The mean magnitude as the scale, each weight rounded by itself (BitNet b1.58).
    Absmean,
    /// The scale and threshold of least squares.
    Threshold,
    /// The same, weighed with the mean squares of the columns.
    Importance,
    /// GPTQ's feedback on these scales.
    Feedback,
    /// And on scales for the values that were rounded.
    Refit,
    /// Descent on codes and scales.
    Descent,
}

impl Stage {
    /// What stages are called.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("absmean", Self::Absmean),
        ("threshold", Self::Threshold),
        ("importance", Self::Importance),
        ("feedback", Self::Feedback),
        ("refit", Self::Refit),
        ("descent", Self::Descent),
    ];

    /// By its name.
    ///
    /// # Errors
    /// `Misuse` for an unknown one.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, stage)| *stage).ok_or_else(|| {
            let names: Vec<&str> = Self::NAMES.iter().map(|(name, _)| *name).collect();
            Error::misuse(format!("{name:?} is no stage; there are {}", names.join(", ")))
        })
    }
}

/// What is prepared for an input.
#[derive(Debug)]
pub struct Ternary {
    descent: Descent,
    stage: Stage,
}

impl Ternary {
    /// From `moments`, the sums of `x x^T` over `count` tokens.
    ///
    /// # Errors
    /// As [`Descent::new`].
    pub fn new(moments: &dyn Sums, count: u64, options: &Options) -> Result<Self> {
        let mut descent = options.descent;
        if options.stage < Stage::Refit {
            descent.start.refits = 0;
        }
        Ok(Self { descent: Descent::new(moments, count, &descent)?, stage: options.stage })
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
        let feedback = self.descent.feedback();
        match self.stage {
            _ if !is_ternary(lattice) => self.descent.encode(lattice, weights, out),
            Stage::Absmean | Stage::Threshold | Stage::Importance => {
                let n = self.descent.columns();
                let even = vec![1.0; n];
                match self.stage {
                    Stage::Absmean => scales(lattice, weights, n, &even, |values, _| absmean(values), out)?,
                    Stage::Threshold => scales(lattice, weights, n, &even, threshold, out)?,
                    _ => scales(lattice, weights, n, feedback.importance(), threshold, out)?,
                }
                self.descent.costs_of(lattice, weights, out)
            }
            Stage::Feedback | Stage::Refit => feedback.encode(lattice, weights, out),
            Stage::Descent => self.descent.encode(lattice, weights, out),
        }
    }
}

/// Whether codes of the lattice are -1, 0 and 1.
pub(super) fn is_ternary(lattice: &Lattice) -> bool {
    lattice.levels == [-1.0, 0.0, 1.0]
}

/// Encodes rows of `n` values by the type's own search with `importance`. The ternary types have none
/// (their encoders expect ternary values, and take the greatest for the scale): they get the scales and
/// thresholds of least squares.
///
/// # Errors
/// `Misuse` when sizes do not fit.
pub(super) fn search(
    lattice: &Lattice,
    values: &[f32],
    n: usize,
    importance: &[f32],
    out: &mut [u8],
) -> Result<()> {
    match is_ternary(lattice) {
        true => scales(lattice, values, n, importance, threshold, out),
        false => lattice.encode(values, n, importance, out),
    }
}

/// Encodes rows with the scales that `find` gives for the values of a group and their weights, each value
/// next to what it was.
fn scales(
    lattice: &Lattice,
    values: &[f32],
    n: usize,
    importance: &[f32],
    find: fn(&[f32], &[f32]) -> f32,
    out: &mut [u8],
) -> Result<()> {
    let mut codes = vec![1u8; values.len()];
    out.fill(0);
    let size = lattice.group;
    let rows = values.chunks_exact(n).zip(codes.chunks_exact_mut(n));
    let groups = rows.flat_map(|(values, codes)| {
        values.chunks(size).zip(codes.chunks_mut(size)).zip(importance[..n].chunks(size))
    });
    for (g, ((values, codes), importance)) in groups.enumerate() {
        let scale = find(values, importance);
        lattice.set(g, (scale, 0.0), out)?;
        for (code, value) in codes.iter_mut().zip(values) {
            *code = 1 + u8::from(*value > 0.5 * scale) - u8::from(*value < -0.5 * scale);
        }
    }
    lattice.put(&codes, out)
}
