//! Scales of bitsandbytes that are quantized themselves ("double quantization", Dettmers et al., arXiv
//! 2305.14314, section 3): less their mean, in blocks of 256, to one byte each.

use std::sync::LazyLock;

/// Scales in a block.
pub const BLOCK: usize = 256;

/// The values of codes: bitsandbytes' "dynamic map" (`create_dynamic_map` in `functional.py`). For each power
/// of ten from -6 to 0, the middles of `2^i` equal parts of 0.1 .. 1, of both signs; and 0 and 1. Rounded as
/// PyTorch does on a CPU: `linspace` comes from both ends, with one rounding for product and sum.
static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut map = vec![0.0, 1.0];
    for (i, power) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
        let parts = 1u32 << i;
        let step = (1.0 - 0.1) / parts as f32;
        let end = |k: u32| match k < parts.div_ceil(2) {
            true => step.mul_add(k as f32, 0.1),
            false => (-step).mul_add((parts - k) as f32, 1.0),
        };
        for k in 0..parts {
            let middle = (end(k) + end(k + 1)) / 2.0 * power;
            map.extend([middle, -middle]);
        }
    }
    map.sort_by(f32::total_cmp);
    let mut values = [0.0; 256];
    values.copy_from_slice(&map);
    values
});

/// Scales as bytes.
#[derive(Debug, Default, PartialEq)]
pub struct Nested {
    /// One code for each scale.
    pub codes: Vec<u8>,
    /// The greatest magnitude of each block, after the mean was taken away.
    pub most: Vec<f32>,
    /// The scales that these are.
    pub values: Vec<f32>,
}

/// The values of codes.
pub fn map() -> &'static [f32; 256] {
    &MAP
}

/// Quantizes scales, whose mean over the whole matrix this is.
pub fn quantize(scales: &[f32], mean: f32) -> Nested {
    let mut nested = Nested::default();
    for block in scales.chunks(BLOCK) {
        let most = block.iter().fold(0f32, |most, s| most.max((s - mean).abs()));
        nested.most.push(most);
        for scale in block {
            let x = if most > 0.0 { (scale - mean) / most } else { 0.0 };
            let above = MAP.partition_point(|v| *v < x).min(255);
            let below = above.saturating_sub(1);
            let code = if x - MAP[below] <= MAP[above] - x { below } else { above };
            nested.codes.push(code as u8);
            nested.values.push(MAP[code] * most + mean);
        }
    }
    nested
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_symmetric_but_for_one() {
        assert_eq!((MAP[0], MAP[127], MAP[255]), (-0.992_968_74, 0.0, 1.0));
        assert!(MAP.is_sorted());
        assert!((0..127).all(|i| MAP[i] == -MAP[254 - i]));
    }

    #[test]
    fn each_scale_becomes_the_next_value() {
        let scales: Vec<f32> = (0..600).map(|i| 0.5 + (i * 37 % 101) as f32 / 100.0).collect();
        let nested = quantize(&scales, 1.0);
        assert_eq!((nested.codes.len(), nested.most.len()), (600, 3));
        for (k, (scale, value)) in scales.iter().zip(&nested.values).enumerate() {
            let best = MAP.iter().map(|v| (v * nested.most[k / BLOCK] + 1.0 - scale).abs());
            let best = best.fold(f32::INFINITY, f32::min);
            assert!((value - scale).abs() <= best + 1e-7, "{scale} {value}");
        }
        assert_eq!(quantize(&[2.0; 3], 2.0).values, [2.0; 3]);
    }
}
