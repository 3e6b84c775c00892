//! IQ3_XXS: 256 weights in 98 bytes, 8 groups of 32 with a scale of 4 bits; four weights at a time
//! are one of 256 points, the signs of eight in 7 bits.
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::grid::{EVEN, Grid, decode_eight, points, words};
use super::grid_search::{self as search, Again, Closest, Portable, Rules};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;
use std::sync::OnceLock;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// A point for four weights each.
    pub points: [[[u8; 2]; 4]; 8],
    /// Of each group, little endian: 7 bits of signs for eight weights each from bit 0 on, the
    /// scale in bits 28 to 31. A weight is `d * (0.5 + scale) * 0.5 * level`.
    pub signs: [[u8; 4]; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ3_XXS.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ3_XXS,
    implementation: "scalar",
    encode: Some(encode_row::<Portable>),
    weigh: Some(weigh_row::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 256] = words(include_bytes!("../../formats/block/iq3_xxs.txt"));
static LEVELS: [[i8; 4]; 256] = points(&WORDS, &[4, 12, 20, 28, 36, 44, 52, 62]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for ((points, signs), y) in block.points.iter().zip(&block.signs).zip(y.as_chunks_mut::<4>().0) {
        let signs = u32::from_le_bytes(*signs);
        let d = d * (0.5 + (signs >> 28) as f32) * 0.5;
        for k in 0..4 {
            let levels = [LEVELS[usize::from(points[k][0])], LEVELS[usize::from(points[k][1])]];
            let levels = bytemuck::cast(levels);
            decode_eight(d, &levels, EVEN[(signs >> (7 * k) & 127) as usize], &mut y[k]);
        }
    }
}

fn grid() -> &'static Grid<4> {
    static GRID: OnceLock<Grid<4>> = OnceLock::new();
    GRID.get_or_init(|| Grid::new(&WORDS, 8, 2))
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
    grid: &Grid<4>,
    x: &[f32; 256],
    importance: Option<&[f32; 256]>,
    block: &mut Block,
) {
    const RULES: Rules = Rules { levels: 8, attempts: 15, step: 0.2, again: Again::Inexact };
    /// Groups whose largest weight is below this are stored as zeros.
    const NOTHING: f32 = 1e-8;
    let sigma2 = 2.0 * search::sum_of_squares(x) / 256.0;
    let (x, _) = x.as_chunks::<4>().0.as_chunks::<8>();
    let mut scales = [0.0; 8];
    let mut signs = [0u32; 8];
    *block = bytemuck::Zeroable::zeroed();
    for (n, x) in x.iter().enumerate() {
        let weight = match importance {
            Some(importance) => {
                search::weigh(x, &importance.as_chunks::<4>().0.as_chunks::<8>().0[n], sigma2)
            }
            None => search::squares(x, 0.0),
        };
        let group = search::Group::new(x, weight, true);
        if group.max < NOTHING {
            continue;
        }
        let fit = group.search::<V, 32>(grid, RULES, group.max, group.max / 15.0);
        scales[n] = fit.scale;
        for (k, s) in group.signs(fit.flip, true).into_iter().enumerate() {
            signs[n] |= u32::from(s) << (7 * k);
            block.points[n][k] = [2 * k, 2 * k + 1].map(|k| grid.point(fit.words[k]) as u8);
        }
    }
    if search::is_nothing(&scales) {
        *block = bytemuck::Zeroable::zeroed();
        return;
    }
    let (d, codes) = search::scales(&scales);
    block.d = f16_from_f32(d * 1.0125).to_le_bytes();
    for n in 0..8 {
        block.signs[n] = (signs[n] | u32::from(codes[n]) << 28).to_le_bytes();
    }
}
