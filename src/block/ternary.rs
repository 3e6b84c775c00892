//! Scales of ternary weights: each weight becomes `-a`, `0` or `a`, whichever is next to it.

/// The mean magnitude (BitNet b1.58).
pub fn absmean(values: &[f32]) -> f32 {
    values.iter().map(|v| v.abs()).sum::<f32>() / values.len() as f32
}

/// The scale `a` of least squares, the square of each error times its weight. It is the mean of the magnitudes
/// that become `a`, those beyond half of it: of all such splits of the magnitudes in order, the one that explains
/// most. Of weights that are ternary already it is the scale that they have.
pub fn threshold(values: &[f32], weights: &[f32]) -> f32 {
    // Magnitudes are in the order of their bits.
    let pair = |(v, w): (&f32, &f32)| u64::from(v.abs().to_bits()) << 32 | u64::from(w.to_bits());
    let mut order: Vec<u64> = values.iter().zip(weights).map(pair).collect();
    order.sort_unstable();
    let (mut sum, mut weight) = (0f64, 0f64);
    let (mut best, mut scale) = (0f64, 0f64);
    for pair in order.into_iter().rev() {
        let (value, w) = (f32::from_bits((pair >> 32) as u32), f32::from_bits(pair as u32));
        sum += f64::from(w) * f64::from(value);
        weight += f64::from(w);
        if weight > 0.0 && sum * sum / weight > best {
            (best, scale) = (sum * sum / weight, sum / weight);
        }
    }
    // Columns that no input uses say nothing: their weights may be anything.
    scale as f32
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

        /// What is ternary has its own scale, whatever counts.
        #[test]
        fn ternary_weights_keep_their_scale(
            digits in prop::collection::vec(-1i8..=1, 1..3000),
            scale in 1e-6f32..1e4,
            weights in prop::collection::vec(1e-3f32..2.0, 3000),
        ) {
            let values: Vec<f32> = digits.iter().map(|d| f32::from(*d) * scale).collect();
            let wanted = if digits.iter().any(|d| *d != 0) { scale } else { 0.0 };
            prop_assert_eq!(threshold(&values, &weights), wanted);
            prop_assert_eq!(threshold(&values, &vec![1.0; values.len()]), wanted);
        }
    }
}
