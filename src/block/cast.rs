//! Arithmetic that several block types share, each with one defined result for every input.

use super::{f16_from_f32, f32_from_f16};

/// Truncates as x86's `cvttss2si` does: what does not fit, NaN included, becomes `i32::MIN`.
///
/// C leaves such casts undefined; this is what ggml's x86-64 build does with them, and so what
/// its files hold. Blocks narrow the result to its low byte, which is then 0.
pub(super) fn truncate(x: f32) -> i32 {
    if x.abs() < 2_147_483_648.0 { x as i32 } else { i32::MIN }
}

/// Rounds half away from zero to 64 bits, then keeps the low 32, as C's `(int) lroundf(x)` does
/// on x86-64: what does not fit 64 bits, NaN included, becomes 0.
pub(super) fn round(x: f32) -> i32 {
    if x.abs() < 9_223_372_036_854_775_808.0 { away(x) as i64 as i32 } else { 0 }
}

/// What truncates to `x` rounded half away from zero: just below 1/2 farther from zero, a sum that
/// reaches the next integer exactly when the fraction is 1/2 or more. `f32::round` is a function
/// call on processors without SSE4.1.
#[inline(always)]
pub(super) fn away(x: f32) -> f32 {
    x + 0.5f32.next_down().copysign(x)
}

/// `1 / d`, or 0 for a zero of either sign.
#[inline(always)]
pub(super) fn inverse(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

/// The largest absolute value, as C's `MAX(amax, fabsf(v))` accumulates it: a NaN replaces
/// whatever came before it, and is replaced by whatever comes next.
pub(super) fn abs_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |amax: f32, v| if amax > v.abs() { amax } else { v.abs() })
}

/// The largest absolute value, NaN passed over.
#[inline(always)]
pub(super) fn magnitude(x: &[f32]) -> f32 {
    // Magnitudes are in the order of their bits, and whole numbers make no chain of selections.
    let mut most = 0;
    for x in x {
        let bits = (x.to_bits() & 0x7FFF_FFFF) as i32;
        let bits = if bits > 0x7F80_0000 { 0 } else { bits };
        most = if bits > most { bits } else { most };
    }
    f32::from_bits(most as u32)
}

/// The weight with the largest absolute value: the first among equals, +0 if all are zeros, NaN
/// passed over.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> f32 {
    let most = magnitude(x);
    // Adding +0 turns -0 into it; nothing is found where all are NaN.
    x.iter().find(|x| x.abs() == most).map_or(0.0, |x| x + 0.0)
}

/// Least and greatest weight: the first among equals, NaN passed over. Starts from the largest
/// finite numbers, which therefore remain where all weights lie beyond them or are NaN.
pub(super) fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, -f32::MAX), |(min, max), &v| {
        (if v < min { v } else { min }, if v > max { v } else { max })
    })
}

/// The error that remains when a code of magnitude up to `codes` is multiplied by the f16 that
/// stands for `d`, beyond the rounding of the code itself; allows for the roundings of single
/// precision on the way.
pub(super) fn scale_error(d: f32, codes: f64) -> f64 {
    codes * f16_error(d) + f64::from(d.abs()) * 1e-4
}

/// The error of storing `v` as f16.
pub(super) fn f16_error(v: f32) -> f64 {
    (f64::from(f32_from_f16(f16_from_f32(v))) - f64::from(v)).abs()
}

/// `bound` as f32, never below it; infinite where scales overflowed and the sum is NaN.
pub(super) fn round_up(bound: f64) -> f32 {
    if bound.is_nan() { f32::INFINITY } else { (bound as f32).next_up() }
}

/// Whether the inverse of the scale `d` is usable: neither 0 nor infinite. Otherwise every code
/// of the block means "no step from the middle".
pub(super) fn has_inverse(d: f32) -> bool {
    d != 0.0 && (1.0 / d).is_finite()
}
