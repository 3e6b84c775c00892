//! Exponentials over a whole vocabulary: what scoring a prediction costs.
//!
//! Written so that the compiler makes vectors of it: no branches, several sums side by side.

/// Sums that grow side by side.
const LANES: usize = 16;
/// So many values are summed in f32 before the sums go on in f64.
const STRETCH: usize = 1024;

/// `e^x` within 2 units of the last place, for `x` up to 88; 0 below -87.
///
/// `2^n e^r` with `n` the nearest integer to `x / ln 2`, and a polynomial for `e^r` (Cephes, `expf`).
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding this rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let y = x.clamp(-87.0, 88.0);
    let n = y * std::f32::consts::LOG2_E + ROUND;
    let power = f32::from_bits(n.to_bits().wrapping_add(127) << 23);
    let n = n - ROUND;
    let r = y - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];
    let p = p.into_iter().fold(1.987_569_1e-4, |sum, c| sum * r + c);
    let value = (p * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// The largest value; NaN does not count.
pub fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (stretches, rest) = values.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for stretch in stretches {
        most.iter_mut().zip(stretch).for_each(|(m, &x)| *m = larger(*m, x));
    }
    most.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| larger(m, x))
}

/// The sum of `f(i)` of `n` indices, `f` in f32.
#[inline(always)]
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f64 {
    let mut total = 0.0;
    for begin in (0..n).step_by(STRETCH) {
        let end = (begin + STRETCH).min(n);
        let whole = begin + (end - begin) / LANES * LANES;
        let mut sums = [0f32; LANES];
        for i in (begin..whole).step_by(LANES) {
            for (k, s) in sums.iter_mut().enumerate() {
                *s += f(i + k);
            }
        }
        total += sums.iter().map(|&s| f64::from(s)).sum::<f64>();
        total += (whole..end).map(|i| f64::from(f(i))).sum::<f64>();
    }
    total
}

/// The sum of `e^(x - shift)`; NaN when a value is NaN.
pub fn sum_exp(values: &[f32], shift: f32) -> f64 {
    sum(values.len(), |i| exp(values[i] - shift))
}

/// The Kullback-Leibler divergence of `own` from `base`, logits with the logarithms of their norms.
/// Tokens whose probability in the base has a logarithm of at most `least` do not count.
pub fn divergence(base: &[f32], base_norm: f64, own: &[f32], own_norm: f64, least: f64) -> f64 {
    let n = base.len().min(own.len());
    let (base, own) = (&base[..n], &own[..n]);
    // The norms' difference is the same everywhere: it is left to f64.
    let (norm, least) = (base_norm as f32, least as f32);
    let p = |i: usize| {
        let l = base[i] - norm;
        if l > least { exp(l) } else { 0.0 }
    };
    let difference = |i: usize| {
        let p = p(i);
        if p > 0.0 { p * (base[i] - own[i]) } else { 0.0 }
    };
    sum(n, difference) + sum(n, p) * (own_norm - base_norm)
}

#[cfg(test)]
mod tests {
    use super::super::logits::is_sound;
    use super::*;

    #[test]
    fn exponentials_are_exact_enough() {
        for i in -88_000..=88_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            let close = (ours / exact - 1.0).abs() < 2.5e-7 || (x < -87.0 && ours == 0.0);
            assert!(close, "{x}: {ours} for {exact}");
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_are_those_of_f64() {
        let value = |i: u32, k: u32| (i.wrapping_mul(2_654_435_761 + k) >> 8) as f32 / 1e6 - 8.0;
        for n in [1, 15, 16, 17, 1023, 5000] {
            let [base, own] = [0, 64].map(|k| (0..n).map(|i| value(i, k)).collect::<Vec<f32>>());
            let exact = |v: &[f32]| v.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
            for v in [&base, &own] {
                assert_eq!(max(v), v.iter().copied().fold(f32::MIN, f32::max));
                assert!((sum_exp(v, 1.0) * 1f64.exp() / exact(v) - 1.0).abs() < 1e-6);
            }
            let (b, o) = (exact(&base).ln(), exact(&own).ln());
            let kld = |(x, y): (&f32, &f32)| {
                let (l, m) = (f64::from(*x) - b, f64::from(*y) - o);
                if l > -16.0 { l.exp() * (l - m) } else { 0.0 }
            };
            let kld: f64 = base.iter().zip(&own).map(kld).sum();
            assert!((divergence(&base, b, &own, o, -16.0) - kld).abs() < 1e-5 * (1.0 + kld), "{n}");
            assert_eq!(divergence(&base, b, &base, b, -16.0), 0.0);
        }
    }

    #[test]
    fn what_is_no_number_shows() {
        let mut row = vec![0.5; 100];
        assert!(is_sound(&row));
        for (x, sound) in [(f32::NEG_INFINITY, true), (f32::NAN, false), (f32::INFINITY, false)] {
            row[77] = x;
            assert_eq!(is_sound(&row), sound, "{x}");
        }
        row[77] = f32::NAN;
        assert!(sum_exp(&row, max(&row)).is_nan());
    }
}
