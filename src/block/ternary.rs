//! Scales of ternary weights: each weight becomes `-a`, `0` or `a`, whichever is next to it.

use super::groups::LANES;

/// The mean magnitude (BitNet b1.58).
pub fn absmean(values: &[f32]) -> f32 {
    values.iter().map(|v| v.abs()).sum::<f32>() / values.len() as f32
}

/// The scale `a` of least squares, the square of each error times its weight. It is the mean of the magnitudes
/// that become `a`, those beyond half of it: of all such splits of the magnitudes in order, the one that explains
/// most. Of weights that are ternary already it is the scale that they have.
///
/// The mean of all magnitudes from half of a scale on is not below `a` where the scale is not, and not above it
/// where the scale is not: two means that close in leave few magnitudes to be put in order.
pub fn threshold(values: &[f32], weights: &[f32]) -> f32 {
    let half = |scale: f64| (0.5 * scale) as f32;
    let mean = |least: f32| {
        let (sum, weight) = above(values, weights, least);
        (weight > 0.0).then(|| sum / weight)
    };
    // Columns that no input uses say nothing: their weights may be anything.
    let Some(mut low) = mean(0.0) else { return 0.0 };
    let mut high = values.iter().fold(0f32, |most, v| if v.abs() > most { v.abs() } else { most }).into();
    for _ in 0..CLOSER {
        match mean(half(high)) {
            Some(next) if next < high => high = next,
            _ => break,
        }
    }
    for _ in 0..CLOSER {
        match mean(half(low)) {
            Some(next) if next > low => low = next,
            _ => break,
        }
    }
    let (low, high) = (half(low), half(high));
    let pairs = values.iter().map(|v| v.abs()).zip(weights).filter(|(v, _)| (low..high).contains(v));
    // Magnitudes are in the order of their bits.
    let mut order: Vec<u64> =
        pairs.map(|(v, w)| u64::from(v.to_bits()) << 32 | u64::from(w.to_bits())).collect();
    order.sort_unstable();
    let (mut sum, mut weight) = above(values, weights, high);
    let (mut best, mut scale) = if weight > 0.0 { (sum * sum / weight, sum / weight) } else { (0.0, 0.0) };
    for pair in order.into_iter().rev() {
        let (value, w) = (f32::from_bits((pair >> 32) as u32), f32::from_bits(pair as u32));
        sum += f64::from(w) * f64::from(value);
        weight += f64::from(w);
        if weight > 0.0 && sum * sum / weight > best {
            (best, scale) = (sum * sum / weight, sum / weight);
        }
    }
    scale as f32
}

/// How often the means close in, at most.
const CLOSER: usize = 6;

/// The sum of the weighed magnitudes from `least` on, and that of their weights.
fn above(values: &[f32], weights: &[f32], least: f32) -> (f64, f64) {
    let (mut sums, mut all) = ([0f64; LANES], [0f64; LANES]);
    let mut add = |x: &[f32; LANES], w: &[f32; LANES]| {
        for k in 0..LANES {
            let value = x[k].abs();
            let w = if value >= least { w[k] } else { 0.0 };
            sums[k] += f64::from(w) * f64::from(value);
            all[k] += f64::from(w);
        }
    };
    let ((values, rest), (weights, last)) = (values.as_chunks(), weights.as_chunks());
    values.iter().zip(weights).for_each(|(x, w)| add(x, w));
    let (mut x, mut w) = ([0f32; LANES], [0f32; LANES]);
    x[..rest.len()].copy_from_slice(rest);
    let n = rest.len().min(last.len());
    w[..n].copy_from_slice(&last[..n]);
    add(&x, &w);
    (sums.iter().sum(), all.iter().sum())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// No other scale does better on the same weights.
        #[test]
        fn thresholds_are_of_least_squares(
            values in prop::collection::vec(-3f32..3.0, 32),
            weights in prop::collection::vec(0f32..2.0, 32),
            other in 0f32..4.0,
        ) {
            let loss = |scale: f32| -> f64 {
                let each = values.iter().zip(&weights).map(|(v, w)| {
                    let left = v.abs().min((v.abs() - scale).abs());
                    f64::from(*w) * f64::from(left) * f64::from(left)
                });
                each.sum()
            };
            let best = threshold(&values, &weights);
            prop_assert!(loss(best) <= loss(other) * (1.0 + 1e-5) + 1e-9, "{best} {other}");
            prop_assert_eq!(threshold(&values, &[0.0; 32]), 0.0);
        }

        /// Nor is there a better split where magnitudes differ widely.
        #[test]
        fn thresholds_are_those_of_all_splits(
            values in prop::collection::vec((-30f32..30.0, any::<bool>()), 1..200),
            weights in prop::collection::vec(prop_oneof![Just(0f32), 0f32..2.0, Just(1e6)], 200),
        ) {
            let values: Vec<f32> = values.iter().map(|(e, minus)| if *minus { -e.exp2() } else { e.exp2() }).collect();
            let weights = &weights[..values.len()];
            let gain = |scale: f32| -> f64 {
                let scale = f64::from(scale);
                let each = values.iter().zip(weights).map(|(v, w)| {
                    let v = f64::from(v.abs());
                    if v > 0.5 * scale { f64::from(*w) * scale * (2.0 * v - scale) } else { 0.0 }
                });
                each.sum()
            };
            let split = |least: f32| {
                let (sum, weight) = above(&values, weights, least);
                if weight > 0.0 { (sum / weight) as f32 } else { 0.0 }
            };
            let best = values.iter().map(|v| gain(split(v.abs()))).fold(0.0, f64::max);
            let found = gain(threshold(&values, weights));
            prop_assert!(found >= best * (1.0 - 1e-5), "{found} {best}");
        }

        /// What is ternary has its own scale, whatever counts.
        #[test]
        fn ternary_weights_keep_their_scale(
            digits in prop::collection::vec(-1i8..=1, 1..3000),
            scale in 1e-6f32..1e4,
            weights in prop::collection::vec(1e-3f32..2.0, 3000),
        ) {
            let values: Vec<f32> = digits.iter().map(|d| f32::from(*d) * scale).collect();
            let wanted = if digits.iter().any(|d| *d != 0) { scale } else { 0.0 };
            prop_assert_eq!(threshold(&values, &weights[..values.len()]), wanted);
            prop_assert_eq!(threshold(&values, &vec![1.0; values.len()]), wanted);
        }
    }
}
