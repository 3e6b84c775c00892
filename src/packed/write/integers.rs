//! Weights become integers in groups.

use crate::block::{f16_from_f32, f32_from_f16};
use crate::container::grouped::{Rows, Shape};
use crate::error::{Error, Result};

/// The integers of a layout, and how groups share scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Bits of a code: 2 to 8.
    pub bits: u32,
    /// Columns of a group; `None` for one group in a row.
    pub group_size: Option<u64>,
    /// Whether all zeros are the middle code.
    pub symmetric: bool,
    /// The least zero that can be stored.
    pub least_zero: u8,
}

impl Grid {
    /// The size of a matrix on this grid.
    pub fn shape(&self, rows: u64, cols: u64) -> Shape {
        let group_size = self.group_size.unwrap_or(cols).max(1);
        Shape { rows, cols, bits: self.bits, group_size, groups: cols.div_ceil(group_size) }
    }

    /// The middle code.
    pub fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    fn most(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// Scale (a number of F16) and zero of the weights of a group, as AutoGPTQ's `Quantizer.find_params`
    /// has them: the least and the greatest weight, and zero, are at the ends of the codes.
    fn line(&self, weights: &[f32]) -> (f32, u8) {
        let (low, high) = weights.iter().fold((0f32, 0f32), |(l, h), w| (l.min(*w), h.max(*w)));
        let span = if self.symmetric { 2.0 * high.max(-low) } else { high - low };
        let half = |x: f32| f32_from_f16(f16_from_f32(x));
        // Below, F16 has no number but 0.
        let scale = half(span / self.most()).max(half(6e-8));
        let zero = match self.symmetric {
            true => self.middle(),
            false => (-low / scale).round_ties_even().clamp(f32::from(self.least_zero), self.most()) as u8,
        };
        (scale, zero)
    }
}

/// Rounds whole rows of `cols` weights, each to the next code.
///
/// # Errors
/// `Malformed` for weights that are not finite, or too large for a scale in F16.
pub fn round(grid: &Grid, weights: &[f32], cols: u64, rows: &mut Rows) -> Result<()> {
    let shape = grid.shape(0, cols);
    let n = weights.len() / cols.max(1) as usize;
    rows.codes.resize(weights.len(), 0);
    rows.scales.clear();
    rows.zeros.clear();
    let size = shape.group_size as usize;
    let of_rows =
        weights.chunks_exact(cols.max(1) as usize).zip(rows.codes.chunks_exact_mut(cols.max(1) as usize));
    for (weights, codes) in of_rows.take(n) {
        for (weights, codes) in weights.chunks(size).zip(codes.chunks_mut(size)) {
            let (scale, zero) = grid.line(weights);
            if !scale.is_finite() || weights.iter().any(|w| !w.is_finite()) {
                return Err(Error::malformed("weights are NaN, infinite, or too large for a scale in F16"));
            }
            let inverse = 1.0 / scale;
            for (code, w) in codes.iter_mut().zip(weights) {
                let near = (w * inverse).round_ties_even() + f32::from(zero);
                *code = near.clamp(0.0, grid.most()) as u8;
            }
            rows.scales.push(scale);
            rows.zeros.push(zero.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_weight_is_further_than_half_a_step(
            weights in prop::collection::vec(-9f32..9.0, 96),
            bits in 2u32..=8,
            symmetric: bool,
            least_zero in 0u8..2,
        ) {
            let grid = Grid { bits, group_size: Some(40), symmetric, least_zero };
            let mut rows = Rows::default();
            round(&grid, &weights, 48, &mut rows).unwrap();
            prop_assert_eq!((rows.scales.len(), rows.zeros.len()), (4, 4));
            for (i, (w, code)) in weights.iter().zip(&rows.codes).enumerate() {
                let g = i / 48 * 2 + i % 48 / 40;
                let value = (f32::from(*code) - rows.zeros[g]) * rows.scales[g];
                // Scales are rounded to F16, zeros to integers: the ends may lie a step off.
                let step = rows.scales[g] * if symmetric { 1.01 } else { 1.51 };
                prop_assert!((w - value).abs() <= step, "{w} {value} {}", rows.scales[g]);
            }
        }
    }

    #[test]
    fn weights_that_no_scale_has() {
        let grid = Grid { bits: 4, group_size: None, symmetric: true, least_zero: 0 };
        for w in [f32::NAN, f32::INFINITY, 1e6] {
            assert!(round(&grid, &[1.0, w], 2, &mut Rows::default()).is_err());
        }
        let mut rows = Rows::default();
        round(&grid, &[0.0; 4], 2, &mut rows).unwrap();
        assert_eq!(rows.codes, [8; 4]);
    }
}
