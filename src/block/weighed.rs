//! Q4_0, Q4_1, Q5_0 and Q5_1 with an importance: the searches of `groups`, over the blocks of a
//! row.

use super::f16_from_f32;
use super::groups::{LANES, side_by_side, symmetric};
use super::lines::{Affine, Weight, affine};

/// A type whose blocks hold 32 weights, with a scale and perhaps a minimum.
pub(super) trait Weighed: bytemuck::Pod {
    /// The code that stands for 0, in types without a minimum.
    const MIDDLE: Option<u8>;
    /// The largest code.
    const MOST: u8;

    /// A block of a scale and a minimum, as halves, and codes.
    fn pack(d: [u8; 2], m: [u8; 2], codes: &[u8; 32]) -> Self;
}

/// [`row`] as the portable build runs it.
pub(super) fn portable<B: Weighed>(x: &[f32], importance: &[f32], bytes: &mut [u8]) {
    row::<B, LANES>(x, importance, bytes);
}

/// Encodes a row, `L` blocks side by side. An error counts with the importance of its column, times
/// the root of the weight's square plus the mean square of the row.
#[inline(always)]
pub(super) fn row<B: Weighed, const L: usize>(row: &[f32], importance: &[f32], bytes: &mut [u8]) {
    let mut sum = 0.0;
    for x in row {
        sum += x * x;
    }
    let mean = sum / row.len() as f32;
    // Which of several NaN a sum keeps would depend on the compiler, and the sign of one that
    // comes from infinities on the processor: the first of the row, and x86's.
    let first = if sum.is_finite() { None } else { row.iter().find(|x| x.is_nan()) };
    let nan = first.copied().unwrap_or(f32::NAN.copysign(-1.0));
    let groups = row.chunks(32 * L).zip(importance.chunks(32 * L));
    for ((row, importance), blocks) in groups.zip(bytemuck::cast_slice_mut::<u8, B>(bytes).chunks_mut(L)) {
        let x = side_by_side::<L, 32>(row);
        let each = row.as_chunks::<32>().0.iter().zip(blocks).enumerate();
        let mut codes = [0; 32];
        if let Some(middle) = B::MIDDLE {
            let mut weights = [[0.0; 32]; L];
            let weights = weights.as_flattened_mut();
            for (w, (x, importance)) in weights.iter_mut().zip(row.iter().zip(importance)) {
                *w = importance * (mean + x * x).sqrt();
            }
            let found = symmetric(middle.into(), &x, &side_by_side::<L, 32>(weights));
            for (k, (x, block)) in each {
                found.codes(middle.into(), k, x, &mut codes);
                let scale = if found.scale[k].is_nan() { nan } else { found.scale[k] };
                *block = B::pack(half(scale), half(0.0), &codes);
            }
        } else {
            let how = Affine {
                weight: Weight::Importance,
                codes: B::MOST,
                attempts: 37,
                first: -0.9,
                step: 0.05,
                absolute: false,
                limited: true,
            };
            let found = affine(how, &x, &side_by_side::<L, 32>(importance), [mean; L]);
            for (k, (x, block)) in each {
                found.codes(how, k, x, &mut codes);
                *block = B::pack(half(found.scale[k]), half(-found.min[k]), &codes);
            }
        }
    }
}

fn half(x: f32) -> [u8; 2] {
    f16_from_f32(x).to_le_bytes()
}
