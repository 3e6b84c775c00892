//! Weights as integers of 4 or 8 bits times a scale, `constexpr_blockwise_shift_scale` without an offset.
//!
//! Scales are of a row, or of blocks of its columns, in float16. With 8 bits they are the greatest magnitude over 127;
//! where importance is known, scales around that are tried. With 4 bits there is a code more below zero than above, which
//! goes to the weight of the greatest magnitude, so that scales have its sign turned. A few are tried, each gives codes,
//! and for codes the scale that loses least is known (least squares); the best of these is taken.

use super::values::{BEYOND, Outcome, Scratch, Span, Tensor, half, whole_bytes};
use super::{Encoding, Operand, Put};
use crate::block::{WHOLE, f16_from_f32};
use crate::container::coreml::DataType;
use crate::error::{Error, Result};
use crate::mil::{Form, Stored};

/// How many of which size.
#[derive(Debug)]
pub(super) struct Integers {
    bits: u32,
    /// Columns that share a scale.
    block: u64,
    unit: u64,
}

/// Scales of 8 bits that are tried where importance is known, in parts of the usual one: from 0.8 to 1.05.
const TRIED: u32 = 16;
/// The codes, in parts of a step, that the weight of the greatest magnitude is given with 4 bits.
const ENDS: [f32; 4] = [-8.5, -8.0, -7.5, -7.0];
/// The same where importance is known: that weight may be of none.
const WEIGHED_ENDS: [f32; 13] = [-10.5, -9.7, -9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0, 7.0, 7.5, 8.3, 9.2];

impl Integers {
    pub fn new(tensor: &Tensor, bits: u32, block: Option<u64>) -> Result<Self> {
        if ![4, 8].contains(&bits) {
            return Err(Error::misuse(format!("integers of {bits} bits; Core ML has those of 4 and 8")));
        }
        tensor.check_matrix()?;
        let block = block.unwrap_or(tensor.cols);
        if block == 0 || !tensor.cols.is_multiple_of(block) {
            return Err(Error::misuse(format!("{} columns are no blocks of {block}", tensor.cols)));
        }
        Ok(Self { bits, block, unit: whole_bytes(tensor.cols, bits) })
    }
}

impl Encoding for Integers {
    fn name(&self) -> &'static str {
        if self.bits == 4 { "int4" } else { "int8" }
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        let mut scales = tensor.shape.clone();
        if let Some(last) = scales.last_mut() {
            *last /= self.block;
        }
        let codes = if self.bits == 4 { DataType::Int4 } else { DataType::Int8 };
        vec![Operand::new(codes, tensor.shape.clone()), Operand::new(DataType::Float16, scales)]
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let [data, scale] = <[Stored; 2]>::try_from(operands).ok()?;
        Some((Form::Blockwise { data, scale, offset: None }, None))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        span.values(scratch)?;
        let (cols, block) = (tensor.cols as usize, self.block as usize);
        scratch.codes.resize(scratch.values.len(), 0);
        scratch.stored.resize(scratch.values.len(), 0.0);
        scratch.small.clear();
        for row in rows.clone() {
            tensor.importance(row / tensor.of_matrix, scratch)?;
            let Scratch { values, importance, codes, stored, small, .. } = scratch;
            let at = (row - rows.start) as usize * cols..(row - rows.start + 1) as usize * cols;
            let blocks =
                values[at.clone()].chunks_exact(block).zip(codes[at.clone()].chunks_exact_mut(block));
            let blocks = blocks.zip(stored[at].chunks_exact_mut(block)).zip(importance.chunks_exact(block));
            for (((x, codes), y), importance) in blocks {
                let scale = match (tensor.is_weighed(), self.bits) {
                    (true, 4) => fitted(x, &WEIGHED_ENDS, |i| importance[i]),
                    (true, _) => tried::<-127, 127>(x, importance),
                    (false, 4) => fitted(x, &ENDS, |_| 1.0),
                    (false, _) => half(greatest(x) / 127.0, 127.0),
                };
                match self.bits {
                    4 => encode::<-8, 7>(x, scale, codes, y),
                    _ => encode::<-127, 127>(x, scale, codes, y),
                }
                small.extend(f16_from_f32(scale).to_le_bytes());
            }
        }
        let outcome = Outcome::of(&scratch.values, &scratch.stored);
        scratch.put_codes(0, self.bits, rows.start * tensor.cols, put)?;
        put(1, rows.start * (tensor.cols / self.block) * 2, &scratch.small)?;
        Ok(outcome)
    }
}

fn greatest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, x| if x.abs() > most { x.abs() } else { most })
}

/// A code, as a number.
#[inline(always)]
fn code<const LOW: i32, const HIGH: i32>(x: f32, inverse: f32) -> f32 {
    let v = x * inverse;
    let v = if v < LOW as f32 { LOW as f32 } else { v };
    let v = if v > HIGH as f32 { HIGH as f32 } else { v };
    // To the nearest whole number, without a branch.
    v + WHOLE - WHOLE
}

fn encode<const LOW: i32, const HIGH: i32>(x: &[f32], scale: f32, codes: &mut [u8], y: &mut [f32]) {
    let inverse = 1.0 / scale;
    for ((x, c), y) in x.iter().zip(codes).zip(y) {
        let v = code::<LOW, HIGH>(*x, inverse);
        *c = (v as i32) as u8;
        *y = v * scale;
    }
}

/// What a scale loses.
#[inline(always)]
fn loss<const LOW: i32, const HIGH: i32>(x: &[f32], scale: f32, weight: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 8;
    let inverse = 1.0 / scale;
    let one = |x: f32, w: f32| {
        let lost = x - code::<LOW, HIGH>(x, inverse) * scale;
        w * lost * lost
    };
    let mut sums = [0f32; LANES];
    let (lanes, rest) = x.as_chunks::<LANES>();
    for (i, x) in lanes.iter().enumerate() {
        for k in 0..LANES {
            sums[k] += one(x[k], weight(i * LANES + k));
        }
    }
    let first = lanes.len() * LANES;
    let rest: f32 = rest.iter().enumerate().map(|(k, x)| one(*x, weight(first + k))).sum();
    sums.iter().sum::<f32>() + rest
}

/// The scale for codes from -8 to 7: of those that `ends` give, with what least squares make of each, the best.
fn fitted(x: &[f32], ends: &[f32], weight: impl Fn(usize) -> f32 + Copy) -> f32 {
    let end = x.iter().fold(0f32, |end, x| if x.abs() > end.abs() { *x } else { end });
    let (mut best, mut most) = (end / -8.0, 0.0);
    for n in ends {
        let [xq, qq] = products::<-8, 7>(x, end / n, weight);
        // What is lost is the sum of squares less this. Of weights that are too small it is no number.
        let gain = xq * xq / qq;
        if gain > most {
            (best, most) = (xq / qq, gain);
        }
    }
    let scale = half(best.abs(), 8.0);
    match scale * 8.0 < BEYOND {
        true => scale.copysign(best),
        // Codes of -8 would be too large for float16.
        false => half(end.abs() / 7.0, 7.0),
    }
}

/// Sums of weights times their codes, and of the squares of codes.
#[inline(always)]
fn products<const LOW: i32, const HIGH: i32>(
    x: &[f32],
    scale: f32,
    weight: impl Fn(usize) -> f32,
) -> [f32; 2] {
    const LANES: usize = 8;
    let inverse = 1.0 / scale;
    let mut sums = [[0f32; LANES]; 2];
    let mut add = |k: usize, x: f32, w: f32| {
        let q = code::<LOW, HIGH>(x, inverse);
        let wq = w * q;
        sums[0][k] += wq * x;
        sums[1][k] += wq * q;
    };
    let (lanes, rest) = x.as_chunks::<LANES>();
    for (i, x) in lanes.iter().enumerate() {
        for (k, x) in x.iter().enumerate() {
            add(k, *x, weight(i * LANES + k));
        }
    }
    let first = lanes.len() * LANES;
    rest.iter().enumerate().for_each(|(k, x)| add(k, *x, weight(first + k)));
    sums.map(|lanes| lanes.iter().sum())
}

/// The scale that loses least, errors weighed by importance.
fn tried<const LOW: i32, const HIGH: i32>(x: &[f32], importance: &[f32]) -> f32 {
    let usual = greatest(x) / HIGH as f32;
    let lost_by = |scale| loss::<LOW, HIGH>(x, scale, |i| importance[i]);
    let mut best = half(usual, HIGH as f32);
    let mut least = lost_by(best);
    for k in 0..TRIED {
        let scale = half(usual * (0.8 + 0.25 * k as f32 / (TRIED - 1) as f32), HIGH as f32);
        let lost = lost_by(scale);
        if lost < least {
            (best, least) = (scale, lost);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::values::LEAST;
    use super::*;
    use proptest::prelude::*;

    fn decoded<const LOW: i32, const HIGH: i32>(x: &[f32], scale: f32) -> Vec<f32> {
        let (mut codes, mut y) = (vec![0; x.len()], vec![0.0; x.len()]);
        encode::<LOW, HIGH>(x, scale, &mut codes, &mut y);
        for (y, c) in y.iter().zip(&codes) {
            assert_eq!(*y, f32::from(*c as i8) * scale);
        }
        y
    }

    proptest! {
        /// With 8 bits no weight is further from what it becomes than half a step, but for what float16 takes from
        /// scales, and a scale that was sought loses no more than the usual one. With 4 bits all together lose no more
        /// than by the greatest magnitude over 7, or over -8.
        #[test]
        fn weights_stay_near(x in prop::collection::vec(-4f32..4.0, 1..70), w in prop::collection::vec(0f32..3.0, 70)) {
            let eight = half(greatest(&x) / 127.0, 127.0);
            for (x, y) in x.iter().zip(decoded::<-127, 127>(&x, eight)) {
                prop_assert!((x - y).abs() <= eight * 0.57, "{x} {y} {eight}");
            }
            let end = x.iter().fold(0f32, |end, x| if x.abs() > end.abs() { *x } else { end });
            let usual = [half(greatest(&x) / 7.0, 7.0), half(end.abs() / 8.0, 8.0).copysign(-end)];
            let even = vec![1.0; 70];
            for (w, ends) in [(&even, &ENDS[..]), (&w, &WEIGHED_ENDS)] {
                let weigh = |i: usize| w[i];
                let lost = |scale| loss::<-8, 7>(&x, scale, weigh);
                let all: f32 = x.iter().zip(w).map(|(x, w)| w * x * x).sum();
                let found = lost(fitted(&x, ends, weigh));
                for usual in usual {
                    // But for what float16 takes.
                    prop_assert!(found <= lost(usual) * 1.002 + all * 1e-6, "{found} {}", lost(usual));
                }
            }
            prop_assert!(loss::<-127, 127>(&x, tried::<-127, 127>(&x, &w), |i| w[i]) <= loss::<-127, 127>(&x, eight, |i| w[i]));
        }
    }

    /// What is lost of normal weights: 0.0813 in blocks of 32 where all scales were tried it is 0.0808. The greatest
    /// magnitude over 7 loses 0.093, Q4_0's rule 0.0859.
    #[test]
    fn normal_weights() {
        let noise = crate::quantize::sample::noise(4 * 64 * 1024, 7);
        let x: Vec<f32> = noise.chunks(4).map(|some| some.iter().sum::<f32>()).collect();
        let lost: f32 = x.chunks(32).map(|x| loss::<-8, 7>(x, fitted(x, &ENDS, |_| 1.0), |_| 1.0)).sum();
        let all: f32 = x.iter().map(|x| x * x).sum();
        let found = (lost / all).sqrt();
        assert!(found < 0.083, "{found}");
    }

    #[test]
    fn ends() {
        let fitted = |x: &[f32]| fitted(x, &ENDS, |_| 1.0);
        assert_eq!(fitted(&[0.0; 32]).abs(), LEAST);
        assert_eq!(fitted(&[1e-40; 32]).abs(), LEAST);
        assert_eq!(fitted(&[-8.0, 1.0, 2.0, 7.0]), 1.0);
        assert_eq!(fitted(&[8.0, -1.0, -2.0, -7.0]), -1.0);
        assert_eq!(decoded::<-8, 7>(&[-8.0, 1.0, 2.0, 7.0], 1.0), [-8.0, 1.0, 2.0, 7.0]);
        // Seven of the scale above would be too large for float16.
        let scale = fitted(&[65504.0, 0.0]);
        assert!(scale.abs() * 8.0 < BEYOND && scale.abs() * 8.0 > 65400.0, "{scale}");
        assert_eq!(tried::<-127, 127>(&[0.0, 0.0], &[1.0, 1.0]), LEAST);
    }
}
