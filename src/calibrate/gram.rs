//! Sums of `x x^T` in bands of rows, each of which can be held, computed and written apart from the
//! others: memory decides how many bands are held at once, never what comes out.
//!
//! Tokens are taken in blocks of at most [`ROWS`], whose products are summed in f32 and then added in
//! f64. So with FMA each sum differs from the exact one by at most `ROWS * 2^-24` (1.6e-5) of
//! `sqrt(H_ii H_jj)`, however many tokens there are; by two millionths as a rule.

use crate::block::gram::{PANEL, Tile, product};

/// Most tokens whose products are summed in f32.
pub const ROWS: usize = 256;

/// Up to [`ROWS`] tokens' inputs, cut into panels of [`PANEL`] columns.
#[derive(Debug, Default)]
pub struct Panels {
    columns: usize,
    rows: usize,
    // Panel after panel, each with all rows; beyond the last column zeros.
    data: Vec<[f32; PANEL]>,
}

/// Panels, which are also bands, of so many columns.
pub fn bands(columns: u64) -> u64 {
    columns.div_ceil(PANEL as u64)
}

/// Values of band `b` of a packed upper triangle: rows `b * PANEL` on, each from its diagonal to the end.
pub fn band_len(columns: u64, b: u64) -> u64 {
    let first = b * PANEL as u64;
    let rows = columns.saturating_sub(first).min(PANEL as u64);
    rows * (columns - first.min(columns)) - rows * rows.saturating_sub(1) / 2
}

/// Bytes of [`Panels`] of so many columns.
pub fn panel_bytes(columns: u64) -> u64 {
    bands(columns) * (PANEL * ROWS * 4) as u64
}

impl Panels {
    /// Takes `rows` of `columns` values each, at most [`ROWS`] of them.
    pub fn pack<'x>(&mut self, columns: usize, rows: impl ExactSizeIterator<Item = &'x [f32]>) {
        (self.columns, self.rows) = (columns, rows.len().min(ROWS));
        self.data.clear();
        self.data.resize(columns.div_ceil(PANEL) * self.rows, [0.0; PANEL]);
        for (t, row) in rows.take(ROWS).enumerate() {
            for (p, part) in row.chunks(PANEL).enumerate() {
                self.data[p * self.rows + t][..part.len()].copy_from_slice(part);
            }
        }
    }

    fn panel(&self, p: usize) -> &[[f32; PANEL]] {
        &self.data[p * self.rows..(p + 1) * self.rows]
    }

    /// Adds the products of these tokens to band `b`, `acc` as [`band_len`] says.
    pub fn add_products(&self, b: usize, acc: &mut [f64]) {
        let first = b * PANEL;
        let height = self.columns.saturating_sub(first).min(PANEL);
        let mut tile: Tile = [[0.0; PANEL]; PANEL];
        for p in b..self.columns.div_ceil(PANEL) {
            product(self.panel(b), self.panel(p), &mut tile);
            let mut start = 0;
            for (k, sums) in tile.iter().enumerate().take(height) {
                // Row `first + k` lies at `start`, from its own column on.
                let from = (first + k).max(p * PANEL);
                let to = self.columns.min((p + 1) * PANEL);
                let places = &mut acc[start + from - (first + k)..start + to - (first + k)];
                for (sum, &v) in places.iter_mut().zip(&sums[from - p * PANEL..]) {
                    *sum += f64::from(v);
                }
                start += self.columns - (first + k);
            }
        }
    }

    /// Adds the number of these tokens, their sum and the sum of their magnitudes to `acc`, which has
    /// `1 + 2 * columns` values.
    pub fn add_sums(&self, acc: &mut [f64]) {
        let Some((count, sums)) = acc.split_first_mut() else { return };
        *count += self.rows as f64;
        let (sum, sum_abs) = sums.split_at_mut(self.columns);
        let columns = sum.chunks_mut(PANEL).zip(sum_abs.chunks_mut(PANEL));
        for (p, (sum, sum_abs)) in columns.enumerate() {
            for row in self.panel(p) {
                for ((sum, sum_abs), &x) in sum.iter_mut().zip(sum_abs.iter_mut()).zip(row) {
                    *sum += f64::from(x);
                    *sum_abs += f64::from(x.abs());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_make_up_the_triangle() {
        for columns in [1u64, 31, 32, 33, 70, 576] {
            let all: u64 = (0..bands(columns)).map(|b| band_len(columns, b)).sum();
            assert_eq!(all, columns * (columns + 1) / 2);
            assert_eq!(band_len(columns, bands(columns)), 0);
        }
    }

    /// Against sums in f64, with columns whose scales differ by 10^6 and a mean far from zero.
    #[test]
    fn sums_are_within_the_bound() {
        for columns in [1usize, 33, 70] {
            let tokens = 3 * ROWS + 17;
            let x: Vec<f32> = (0..tokens * columns)
                .map(|i| {
                    let noise = ((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 8388608.0;
                    (noise - 0.3) * [1.0, 1e-3, 1e3][i % columns % 3]
                })
                .collect();
            let mut bands: Vec<Vec<f64>> = (0..super::bands(columns as u64))
                .map(|b| vec![0.0; band_len(columns as u64, b) as usize])
                .collect();
            let mut sums = vec![0.0; 1 + 2 * columns];
            let mut panels = Panels::default();
            for block in x.chunks(ROWS * columns) {
                panels.pack(columns, block.chunks_exact(columns));
                bands.iter_mut().enumerate().for_each(|(b, acc)| panels.add_products(b, acc));
                panels.add_sums(&mut sums);
            }
            let packed = bands.concat();
            let exact = |i: usize, j: usize| -> f64 {
                x.chunks_exact(columns).map(|r| f64::from(r[i]) * f64::from(r[j])).sum()
            };
            let mut at = 0;
            for i in 0..columns {
                for j in i..columns {
                    let scale = (exact(i, i) * exact(j, j)).sqrt();
                    let bound = 2.0 * ROWS as f64 * f64::from(f32::EPSILON / 2.0) * scale;
                    assert!((packed[at] - exact(i, j)).abs() <= bound, "{i} {j}");
                    at += 1;
                }
                let (sum, abs) = x
                    .chunks_exact(columns)
                    .fold((0.0, 0.0), |(s, a), r| (s + f64::from(r[i]), a + f64::from(r[i].abs())));
                assert!((sums[1 + i] - sum).abs() <= 1e-12 * abs);
                assert!((sums[1 + columns + i] - abs).abs() <= 1e-12 * abs);
            }
            assert_eq!((at, sums[0]), (packed.len(), tokens as f64));
        }
    }
}
