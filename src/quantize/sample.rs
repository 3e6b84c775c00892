//! Problems to try methods on.

use super::gptq::Sums;
use crate::error::Result;

/// Random numbers of about unit size.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// Sums of `x x^T`, as they stand.
pub struct Square {
    /// Columns.
    pub n: usize,
    /// Row by row.
    pub sums: Vec<f32>,
}

impl Sums for Square {
    fn columns(&self) -> usize {
        self.n
    }

    fn read(&self, i: usize, row: &mut [f32]) -> Result<()> {
        row.copy_from_slice(&self.sums[i * self.n + i..][..row.len()]);
        Ok(())
    }
}

impl Square {
    /// Of inputs that depend on each other, with columns of very different size.
    pub fn new(n: usize, tokens: usize) -> Self {
        let mut sums = vec![0f32; n * n];
        for t in 0..tokens {
            let z = noise(n + 8, 7 + t as u64);
            let x: Vec<f32> =
                (0..n).map(|i| (z[i] + z[i + 1] + z[i + 8] + z[n]) * (1.0 + (i % 7) as f32)).collect();
            for i in 0..n {
                for j in 0..n {
                    sums[i * n + j] += x[i] * x[j];
                }
            }
        }
        Self { n, sums }
    }

    /// `e H e^T`, damped, `H` being the mean over `tokens`.
    pub fn cost(&self, tokens: usize, damp: f64, error: &[f32]) -> f64 {
        let n = self.n;
        let mean = (0..n).map(|i| f64::from(self.sums[i * n + i])).sum::<f64>() / n as f64;
        let row = |i: usize| -> f64 {
            let sums = &self.sums[i * n..(i + 1) * n];
            let product: f64 = sums.iter().zip(error).map(|(s, e)| f64::from(*s) * f64::from(*e)).sum();
            f64::from(error[i]) * (product + damp * mean * f64::from(error[i]))
        };
        (0..n).map(row).sum::<f64>() / tokens as f64
    }
}
