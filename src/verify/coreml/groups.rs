//! Whether scales, tables and factors are worth something: codes are held to them, so they have to be held to the
//! source. What shares one must be nearer to its source than zeros are.

use std::collections::HashMap;

use crate::packed::coreml::Tensor;

/// The square of a group's error, as a part of the square of what the source has there: zeros have 1. Of normal
/// values, the best table of two entries leaves 1 - 2/pi = 0.36, of three (ternary) 0.19.
const LOST: f64 = 0.95;
/// Groups whose largest value is smaller are passed over: scales of float16 are too coarse there, or zero.
const TINY: f32 = 1e-5;

/// Root mean square error, as a part of that of the source, that a tensor of codes of so many bits may have: a few times
/// what normal values leave (0.006 at 8 bits, 0.09 at 4, 0.34 with four entries, 0.43 as ternary), since the largest of
/// a row sets its scale.
pub(super) fn most_error(bits: u32) -> f64 {
    match bits {
        8.. => 0.1,
        5..8 => 0.15,
        4 => 0.3,
        3 => 0.5,
        2 => 0.75,
        _ => 0.9,
    }
}

#[derive(Clone, Copy, Default)]
struct Sums {
    n: u64,
    error: f64,
    source: f64,
    largest: f32,
}

/// The groups of a tensor that is looked at from its first element on.
#[derive(Default)]
pub(super) struct Groups {
    /// Those that were not seen as a whole yet.
    open: HashMap<u64, Sums>,
    /// Those that are lost.
    pub(super) lost: u64,
}

impl Groups {
    /// Adds what was `found` from element `start` on, beside what was `wanted`.
    pub(super) fn add(&mut self, tensor: &Tensor, start: u64, found: &[f32], wanted: &[f32]) {
        tensor.groups(start, found.len().min(wanted.len()), |run, group, size| {
            let mut sums = match run.len() as u64 == size {
                true => Sums::default(),
                false => self.open.remove(&group).unwrap_or_default(),
            };
            for (x, y) in found[run.clone()].iter().zip(&wanted[run]) {
                let (error, y64) = (f64::from(x - y), f64::from(*y));
                sums.error += error * error;
                sums.source += y64 * y64;
                sums.largest = sums.largest.max(y.abs());
                sums.n += 1;
            }
            if sums.n < size {
                self.open.insert(group, sums);
            } else if sums.largest >= TINY && sums.error > LOST * sums.source {
                self.lost += 1;
            }
        });
    }
}
