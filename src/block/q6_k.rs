//! Q6_K: 256 weights in 210 bytes, 16 groups with a scale of 8 bits, codes of 6 bits around 32.

use super::cast::extreme;
use super::groups::{LANES, Scales, side_by_side, squares, symmetric};
use super::kquant::{NOTHING, nearest, pack_halves, pack_pairs, requantize, unpack_halves, unpack_pairs};
use super::lattice::{Latticed, steps, whole};
use super::{Codec, decode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;
use bytemuck::Zeroable;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Bits 0 to 3 of the codes: of each 128 weights, weight `j` in the low half of byte `j`,
    /// weight `j + 64` in the high half.
    pub ql: [u8; 128],
    /// Bits 4 and 5: of each 128 weights, weight `32 n + m` in bits `2n` and `2n + 1` of byte `m`.
    /// A weight is `d * scale * (code - 32)`.
    pub qh: [u8; 64],
    /// Scales of the groups of 16.
    pub scales: [i8; 16],
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q6_K.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 16;
    const LEVELS: &'static [f32] = &whole::<64>(-32);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        for (line, &scale) in lines.iter_mut().zip(&self.scales) {
            *line = (d * f32::from(scale), 0.0);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        pack_halves::<64>(codes, &mut self.ql);
        self.qh = pack_pairs(codes, 4);
    }

    fn set(&mut self, group: usize, (scale, _): (f32, f32)) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        self.scales[group] = steps(scale, d, -128, 127) as i8;
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q6_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<LANES>(src, None, dst)),
    weigh: Some(|src, importance, dst| encode::<LANES>(src, Some(importance), dst)),
    decode: |src, dst| decode(src, dst),
    bound: None,
};

#[inline(always)]
pub(super) fn encode<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    let blocks = bytemuck::cast_slice_mut::<u8, Block>(dst);
    for (n, (x, blocks)) in src.chunks(L * 16).zip(blocks.chunks_mut(L / 16)).enumerate() {
        let turned = side_by_side::<L, 16>(x);
        let found = match importance {
            Some(importance) => symmetric(32, &turned, &side_by_side(&importance[n * L * 16..])),
            None => symmetric(32, &turned, &squares(&turned)),
        };
        for (b, (x, block)) in x.as_chunks().0.iter().zip(blocks).enumerate() {
            encode_block(x, &found, 16 * b, block);
        }
    }
}

/// Encodes a block, of whose groups the scales were `found` from the lane `first` on.
#[inline(always)]
fn encode_block<const L: usize>(x: &[f32; 256], found: &Scales<L>, first: usize, block: &mut Block) {
    let scales = &found.scale[first..first + 16];
    let max = extreme(scales);
    if max.abs() < NOTHING {
        *block = Block::zeroed();
        return;
    }
    let inverse = -128.0 / max;
    block.d = f16_from_f32(1.0 / inverse).to_le_bytes();
    for (code, scale) in block.scales.iter_mut().zip(scales) {
        *code = nearest(inverse * scale).min(127) as i8;
    }
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let mut codes = [0; 256];
    for (g, (x, codes)) in x.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut().0).enumerate() {
        let d = d * f32::from(block.scales[g]);
        if d != 0.0 {
            requantize(x, d, 32, codes);
        } else {
            found.codes(32, first + g, x, codes);
        }
    }
    pack_halves::<64>(&codes, &mut block.ql);
    block.qh = pack_pairs(&codes, 4);
}

#[inline(always)]
fn decode(src: &[u8], dst: &mut [f32]) {
    for (block, y) in decode_pairs(src, dst) {
        decode_block(block, y);
    }
}

#[inline(always)]
fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let mut codes = [0; 256];
    unpack_halves::<64>(&block.ql, &mut codes);
    unpack_pairs(&block.qh, 4, &mut codes);
    for ((y, codes), &scale) in y.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(&block.scales) {
        let scale = d * f32::from(scale);
        for (y, &code) in y.iter_mut().zip(codes) {
            *y = scale * f32::from(code as i8 - 32);
        }
    }
}
