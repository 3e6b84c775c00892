//! Products of narrow panels: the arithmetic of second moments.
//!
//! A panel is [`PANEL`] columns of a tall matrix, row by row. The product of two sums, over the rows, the
//! outer products of their rows. It lives beside the codecs because it is chosen by the features of the
//! CPU as they are (see `simd`).

/// Columns of a panel.
pub const PANEL: usize = 32;

/// `PANEL x PANEL` sums of products.
pub type Tile = [[f32; PANEL]; PANEL];

/// `out[i][j]` becomes the sum of `a[t][i] * b[t][j]` over all rows `t` that both have, in their order, in
/// f32. Where the CPU contracts products and sums (FMA) each step rounds once, elsewhere twice: the error
/// of `n` rows is at most `2 n` times 2^-24 of the sum of `|a[t][i] * b[t][j]|`, half that with FMA.
pub fn product(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) {
    #[cfg(target_arch = "x86_64")]
    if super::simd::product(a, b, out) {
        return;
    }
    portable(a, b, out);
}

/// [`product`] for any CPU.
pub(super) fn portable(a: &[[f32; PANEL]], b: &[[f32; PANEL]], out: &mut Tile) {
    kernel::<4, 8>(a, b, out, |x, y, sum| x * y + sum);
}

/// `R` rows and `C` columns of the result at once, which should fit the registers.
#[inline(always)]
pub(super) fn kernel<const R: usize, const C: usize>(
    a: &[[f32; PANEL]],
    b: &[[f32; PANEL]],
    out: &mut Tile,
    step: impl Fn(f32, f32, f32) -> f32 + Copy,
) {
    const { assert!(PANEL.is_multiple_of(R) && PANEL.is_multiple_of(C)) };
    for i in (0..PANEL).step_by(R) {
        for j in (0..PANEL).step_by(C) {
            let mut sums = [[0f32; C]; R];
            for (a, b) in a.iter().zip(b) {
                for k in 0..R {
                    for l in 0..C {
                        sums[k][l] = step(a[i + k], b[j + l], sums[k][l]);
                    }
                }
            }
            for k in 0..R {
                out[i + k][j..j + C].copy_from_slice(&sums[k]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(rows: usize, seed: u64) -> Vec<[f32; PANEL]> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Of very different magnitudes, as activations are.
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
                * [1.0, 1.0, 0.01, 300.0][(state >> 33) as usize & 3]
        };
        (0..rows).map(|_| std::array::from_fn(|_| next())).collect()
    }

    #[test]
    fn sums_are_within_the_bound() {
        for rows in [0, 1, 7, 256] {
            let (a, b) = (panel(rows, 1), panel(rows, 2));
            for run in [product, portable] {
                let mut out = [[f32::NAN; PANEL]; PANEL];
                run(&a, &b, &mut out);
                for i in 0..PANEL {
                    for j in 0..PANEL {
                        let terms = a.iter().zip(&b).map(|(a, b)| f64::from(a[i]) * f64::from(b[j]));
                        let (exact, size) = terms.fold((0.0, 0.0), |(s, m), x| (s + x, m + x.abs()));
                        let bound = 2.0 * rows as f64 * f64::from(f32::EPSILON / 2.0) * size;
                        assert!((f64::from(out[i][j]) - exact).abs() <= bound, "{rows} rows, {i} {j}");
                    }
                }
            }
        }
    }

    /// With FMA, whatever the width of registers: the same order, so the same bits.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn registers_do_not_show() {
        let (a, b) = (panel(256, 3), panel(256, 4));
        let mut results = Vec::new();
        for run in super::super::simd::PRODUCTS {
            let mut out = [[0f32; PANEL]; PANEL];
            if run(&a, &b, &mut out) {
                results.push(out);
            }
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
