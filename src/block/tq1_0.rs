//! TQ1_0: 256 weights in 54 bytes, one scale, five ternary codes in a byte.

use super::cast::{abs_max, inverse, round};
use super::lattice::{Latticed, half, whole};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// 240 weights, five to a byte: the first 160 in 32 bytes (weight `32 n + m` is digit `n` of
    /// byte `m`), the next 80 in 16 bytes (weight `160 + 16 n + m`).
    pub qs: [u8; 48],
    /// The last 16 weights, four to a byte: weight `240 + 4 n + m` is digit `n` of byte `m`; the
    /// fifth digit is 0.
    pub qh: [u8; 4],
    /// Scale, f16 little endian. A weight is `d * (digit - 1)`.
    pub d: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::TQ1_0.type_size());

/// The runs of bytes that share a layout: bytes in the run, digits used of each.
const RUNS: [(usize, usize); 3] = [(32, 5), (16, 5), (4, 4)];

impl Latticed<256> for Block {
    const GROUP: usize = 256;
    const LEVELS: &'static [f32] = &whole::<3>(-1);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        lines.fill((d, 0.0));
    }

    fn put(&mut self, codes: &[u8; 256]) {
        self.pack(|i| codes[i]);
    }

    fn set(&mut self, _: usize, (scale, _): (f32, f32)) {
        self.d = half(scale);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::TQ1_0,
    implementation: "scalar",
    encode: Some(|src, dst| encode_pairs(src, dst).for_each(|(x, block)| encode_block(x, block))),
    weigh: None,
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: Some(super::tq2_0::bound),
};

pub(super) fn encode_block(x: &[f32; 256], block: &mut Block) {
    let d = abs_max(x);
    let id = inverse(d);
    block.d = f16_from_f32(d).to_le_bytes();
    block.pack(|i| round(x[i] * id).wrapping_add(1) as u8);
}

impl Block {
    /// Stores the digits of all weights.
    #[inline(always)]
    fn pack(&mut self, digit: impl Fn(usize) -> u8) {
        let mut bytes = self.qs.iter_mut().chain(&mut self.qh);
        let mut first = 0;
        for (width, digits) in RUNS {
            for (m, byte) in bytes.by_ref().take(width).enumerate() {
                let number = (0..5).fold(0u8, |number, n| {
                    let digit = if n < digits { digit(first + n * width + m) } else { 0 };
                    number.wrapping_mul(3).wrapping_add(digit)
                });
                *byte = fraction(number);
            }
            first += width * digits;
        }
    }
}

/// `number / 243` as a fraction of 256, rounded up: multiplying it by 3 moves the digits out at
/// the top, one at a time.
pub(super) fn fraction(number: u8) -> u8 {
    (u16::from(number) * 256).div_ceil(243) as u8
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let mut bytes = block.qs.as_slice();
    let mut y = y.as_mut_slice();
    for (width, digits) in RUNS {
        let run = if width == block.qh.len() { &block.qh } else { &bytes[..width] };
        let (head, rest) = y.split_at_mut(width * digits);
        let mut power = 1u8;
        for y in head.chunks_exact_mut(width) {
            for (y, byte) in y.iter_mut().zip(run) {
                let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
                *y = f32::from(digit as i8 - 1) * d;
            }
            power = power.wrapping_mul(3);
        }
        bytes = bytes.get(width..).unwrap_or_default();
        y = rest;
    }
}
