//! IQ3_S: 256 weights in 110 bytes, 8 groups of 32 with a scale of 4 bits; four weights at a time
//! are one of 512 points, each weight has its sign.
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
    /// Bits 0 to 7 of the points of four weights each.
    pub points: [[u8; 8]; 8],
    /// Bit 8 of the points of a group: point `k` in bit `k`.
    pub qh: [u8; 8],
    /// Signs of eight weights each.
    pub signs: [[u8; 4]; 8],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (1 + 2 scale) * level`.
    pub scales: [u8; 4],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ3_S.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ3_S,
    implementation: "scalar",
    encode: Some(encode_row::<Portable>),
    weigh: Some(weigh_row::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 512] = words(include_bytes!("../../formats/block/iq3_s.txt"));
static LEVELS: [[i8; 4]; 512] = points(&WORDS, &[1, 3, 5, 7, 9, 11, 13, 15]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    let (y, _) = y.as_chunks_mut::<4>();
    for n in 0..8 {
        let scale = block.scales[n / 2] >> (4 * (n % 2)) & 15;
        let d = d * f32::from(1 + 2 * scale);
        for k in 0..4 {
            let point = |k: usize| usize::from(block.points[n][k]) | usize::from(block.qh[n] >> k & 1) << 8;
            let levels = [LEVELS[point(2 * k)], LEVELS[point(2 * k + 1)]];
            decode_eight(d, &bytemuck::cast(levels), block.signs[n][k], &mut y[n][k]);
        }
    }
}

fn grid() -> &'static Grid<4> {
    static GRID: OnceLock<Grid<4>> = OnceLock::new();
    GRID.get_or_init(|| Grid::new(&WORDS, 8, 3))
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
    const RULES: Rules = Rules { levels: 8, attempts: 9, step: 0.2, again: Again::AllIfInexact };
    let sigma2 = 2.0 * search::sum_of_squares(x) / 256.0;
    let (x, _) = x.as_chunks::<4>().0.as_chunks::<8>();
    let mut scales = [0.0; 8];
    *block = bytemuck::Zeroable::zeroed();
    // A group of zeros takes no room among the points and signs: those of the groups behind it move
    // up, and decoding finds them in the wrong group. An error of ggml's, and part of its bytes.
    let mut places = block.points.iter_mut().zip(&mut block.signs);
    for (n, x) in x.iter().enumerate() {
        let weight = match importance {
            Some(importance) => {
                search::weigh(x, &importance.as_chunks::<4>().0.as_chunks::<8>().0[n], sigma2)
            }
            None => search::squares(x, 0.0),
        };
        let group = search::Group::new(x, weight, false);
        if group.max == 0.0 {
            continue;
        }
        let fit = group.search::<V, 24>(grid, RULES, group.max, group.max / 15.0);
        scales[n] = fit.scale;
        if let Some((points, signs)) = places.next() {
            *signs = group.signs(fit.flip, false);
            for k in 0..8 {
                let point = grid.point(fit.words[k]);
                points[k] = point as u8;
                block.qh[n] |= ((point >> 8) as u8) << k;
            }
        }
    }
    let (d, codes) = search::scales(&scales);
    block.d = f16_from_f32(d * 1.033).to_le_bytes();
    for (byte, codes) in block.scales.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = codes[0] | codes[1] << 4;
    }
}
