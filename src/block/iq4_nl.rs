//! IQ4_NL: 32 weights in 18 bytes, one scale, codes of 4 bits that number uneven levels.

use super::cast::{extreme, inverse};
use super::kquant::{NOTHING, pack_halves, unpack_halves};
use super::lattice::{Latticed, half};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Codes: weight `j` in the low half of byte `j`, weight `j + 16` in the high half. A weight
    /// is `d * LEVELS[code]`.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ4_NL.type_size());

/// What the codes stand for: close together around zero, where weights are many. Source:
/// `kvalues_iq4nl` (`ggml-common.h`).
pub(super) const LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The same.
pub(super) const AS_FLOATS: [f32; 16] = {
    let mut levels = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        levels[i] = LEVELS[i] as f32;
        i += 1;
    }
    levels
};

/// Attempts of the search: the plain scale and 15 more, side by side.
const LANES: usize = 16;

/// Where each attempt but the plain one lays the extreme weight.
pub(super) const NUMERATORS: [f32; LANES] = {
    let mut steps = [0.0; LANES];
    let mut n = 0;
    while n < LANES {
        steps[n] = n as f32 - 8.0 + LEVELS[0] as f32;
        n += 1;
    }
    steps
};

impl Latticed<32> for Block {
    const GROUP: usize = 32;
    const LEVELS: &'static [f32] = &AS_FLOATS;

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 32]) {
        pack_halves::<16>(codes, &mut self.qs);
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ4_NL,
    implementation: "scalar",
    encode: Some(|src, dst| {
        encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, &squares(x), block))
    }),
    weigh: Some(|row, importance, dst| {
        for ((x, block), importance) in encode_pairs(row, dst).zip(importance.as_chunks().0) {
            encode_block(x, &weigh(x, importance, deviation(x)), block);
        }
    }),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

fn encode_block(x: &[f32; 32], weights: &[f32; 32], block: &mut Block) {
    let d = search(x, weights);
    block.d = f16_from_f32(d).to_le_bytes();
    quantize(x, d, &mut block.qs);
}

fn decode_block(block: &Block, y: &mut [f32; 32]) {
    dequantize(&block.qs, f32_from_f16(u16::from_le_bytes(block.d)), y);
}

/// Codes of the nearest levels.
pub(super) fn quantize(x: &[f32; 32], d: f32, qs: &mut [u8]) {
    let id = inverse(d);
    pack_halves::<16>(&x.map(|x| index(id * x)), qs);
}

pub(super) fn dequantize(qs: &[u8], d: f32, y: &mut [f32]) {
    let mut codes = [0; 32];
    unpack_halves::<16>(qs, &mut codes);
    for (y, code) in y.iter_mut().zip(codes) {
        *y = d * f32::from(LEVELS[usize::from(code & 15)]);
    }
}

/// Halfway between the levels `i` and `i + 1`: exact.
pub(super) const fn middle(i: usize) -> f32 {
    (LEVELS[i] as f32 + LEVELS[i + 1] as f32) / 2.0
}

/// The code of the level nearest to `x`, the upper one of two that are equally near; 15 for NaN.
fn index(x: f32) -> u8 {
    (0..15).map(|i| u8::from(!matches!(x.partial_cmp(&middle(i)), Some(std::cmp::Ordering::Less)))).sum()
}

/// The level of [`index`], without a branch.
#[inline(always)]
fn level(x: f32) -> f32 {
    (0..15).fold(f32::from(LEVELS[0]), |level, i| {
        let gap = f32::from(i16::from(LEVELS[i + 1]) - i16::from(LEVELS[i]));
        level + if x < middle(i) { 0.0 } else { gap }
    })
}

/// What each error counts without an importance.
pub(super) fn squares(x: &[f32; 32]) -> [f32; 32] {
    x.map(|x| x * x)
}

/// Twice the mean square of a block.
pub(super) fn deviation<const N: usize>(x: &[f32; N]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x) * (2.0 / N as f32)
}

/// What each error counts: its column's importance, the more the farther the weight from zero.
pub(super) fn weigh(x: &[f32; 32], importance: &[f32; 32], deviation: f32) -> [f32; 32] {
    std::array::from_fn(|j| importance[j] * (deviation + x[j] * x[j]).sqrt())
}

/// The scale of least squares, the error of each of `x` counted as `weights` says, over attempts
/// that lay the extreme weight from 120 to 134 steps below zero.
pub(super) fn search(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    let max = extreme(x);
    if max.abs() < NOTHING {
        return 0.0;
    }
    let plain = 1.0 / (-max / f32::from(LEVELS[0]));
    let mut inverses = NUMERATORS.map(|steps| steps / max);
    inverses[0] = plain;
    let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
    for (&x, &w) in x.iter().zip(weights) {
        for ((inverse, sum_xl), sum_l2) in inverses.iter().zip(&mut sum_xl).zip(&mut sum_l2) {
            let l = level(inverse * x);
            *sum_xl += w * l * x;
            *sum_l2 += w * l * l;
        }
    }
    best(&sum_xl, &sum_l2)
}

/// The scale of the best attempt: the first, unless a later one gains.
#[inline(always)]
pub(super) fn best(sum_xl: &[f32; LANES], sum_l2: &[f32; LANES]) -> f32 {
    let (mut d, mut best) = (0.0, 0.0);
    for (n, (&xl, &l2)) in sum_xl.iter().zip(sum_l2).enumerate() {
        if n == 0 {
            d = if l2 > 0.0 { xl / l2 } else { 0.0 };
            best = d * xl;
        } else if l2 > 0.0 && xl * xl > best * l2 {
            d = xl / l2;
            best = d * xl;
        }
    }
    d
}
