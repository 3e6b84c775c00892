//! IQ2_S: 256 weights in 82 bytes, 16 groups of 16 with a scale of 4 bits; eight weights at a time
//! are one of 1024 points and eight signs.
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::grid::{Grid, decode_eight, points, words};
use super::grid_search::{self as search, Again, Closest, Portable, Rules};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;
use std::sync::OnceLock;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bits 0 to 7 of the points of eight weights each.
    pub points: [u8; 32],
    /// Their signs.
    pub signs: [u8; 32],
    /// Bits 8 and 9 of point `n`: bits `2 (n % 4)` and above of byte `n / 4`.
    pub qh: [u8; 8],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (0.5 + scale) * 0.25 * level`.
    pub scales: [u8; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ2_S.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ2_S,
    implementation: "scalar",
    encode: Some(encode_row::<Portable>),
    weigh: Some(weigh_row::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 1024] = words(include_bytes!("../../formats/block/iq2_s.txt"));
static LEVELS: [[i8; 8]; 1024] = points(&WORDS, &[8, 25, 43]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for n in 0..32 {
        let scale = block.scales[n / 4] >> (4 * (n / 2 % 2)) & 15;
        let d = d * (0.5 + f32::from(scale)) * 0.25;
        let high = usize::from(block.qh[n / 4] >> (2 * (n % 4)) & 3);
        let point = usize::from(block.points[n]) | high << 8;
        decode_eight(d, &LEVELS[point], block.signs[n], &mut y[n]);
    }
}

fn grid() -> &'static Grid<8> {
    static GRID: OnceLock<Grid<8>> = OnceLock::new();
    GRID.get_or_init(|| Grid::new(&WORDS, 3, 1))
}

#[inline(always)]
pub(super) fn encode_row<V: Closest>(src: &[f32], dst: &mut [u8]) {
    let grid = grid();
    for (x, block) in encode_pairs(src, dst) {
        encode_block::<V>(grid, x, None, block);
    }
}

#[inline(always)]
pub(super) fn weigh_row<V: Closest>(src: &[f32], importance: &[f32], dst: &mut [u8]) {
    let grid = grid();
    for ((x, block), importance) in encode_pairs(src, dst).zip(importance.as_chunks().0) {
        encode_block::<V>(grid, x, Some(importance), block);
    }
}

#[inline(always)]
fn encode_block<V: Closest>(
    grid: &Grid<8>,
    x: &[f32; 256],
    importance: Option<&[f32; 256]>,
    block: &mut Block,
) {
    const RULES: Rules = Rules { levels: 3, attempts: 9, step: 0.1, again: Again::Inexact };
    /// Groups whose largest weight is below this are stored as zeros.
    const NOTHING: f32 = 1e-8;
    let sigma2 = 2.0 * search::sum_of_squares(x) / 256.0;
    let (x, _) = x.as_chunks::<8>().0.as_chunks::<2>();
    let mut scales = [0.0; 16];
    *block = bytemuck::Zeroable::zeroed();
    for (n, x) in x.iter().enumerate() {
        let weight = match importance {
            Some(importance) => {
                search::weigh(x, &importance.as_chunks::<8>().0.as_chunks::<2>().0[n], sigma2)
            }
            None => search::squares(x, 0.25 * sigma2),
        };
        let group = search::Group::new(x, weight, false);
        if group.max < NOTHING {
            continue;
        }
        let fit = group.search::<V, 24>(grid, RULES, group.max, group.max / 5.0);
        scales[n] = fit.scale;
        let signs = group.signs(fit.flip, false);
        for k in 0..2 {
            let (i, point) = (2 * n + k, grid.point(fit.words[k]));
            block.points[i] = point as u8;
            block.qh[i / 4] |= ((point >> 8) as u8) << (2 * (i % 4));
            block.signs[i] = signs[k];
        }
    }
    let (d, codes) = search::scales(&scales);
    block.d = f16_from_f32(d * 0.9875).to_le_bytes();
    block.scales = search::halves(&codes);
}
