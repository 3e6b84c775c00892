//! IQ2_XS: 256 weights in 74 bytes, 16 groups of 16 with a scale of 4 bits; eight weights at a time
//! are one of 512 points, their signs in 7 bits.
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::grid::{EVEN, Grid, decode_eight, points, words};
use super::grid_search::{self as search, Again, Closest, Portable, Rules};
use super::kquant::NOTHING;
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;
use std::sync::OnceLock;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// For eight weights each, little endian: the point in bits 0 to 8, seven signs above.
    pub qs: [[u8; 2]; 32],
    /// Scales of two groups each, the first in the low half. A weight is
    /// `d * (0.5 + scale) * 0.25 * level`.
    pub scales: [u8; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ2_XS.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ2_XS,
    implementation: "scalar",
    encode: None,
    weigh: Some(weigh_row::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 512] = words(include_bytes!("../../formats/block/iq2_xs.txt"));
static LEVELS: [[i8; 8]; 512] = points(&WORDS, &[8, 25, 43]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for n in 0..32 {
        let scale = block.scales[n / 4] >> (4 * (n / 2 % 2)) & 15;
        let d = d * (0.5 + f32::from(scale)) * 0.25;
        let q = u16::from_le_bytes(block.qs[n]);
        decode_eight(d, &LEVELS[usize::from(q & 511)], EVEN[usize::from(q >> 9)], &mut y[n]);
    }
}

fn grid() -> &'static Grid<8> {
    static GRID: OnceLock<Grid<8>> = OnceLock::new();
    GRID.get_or_init(|| Grid::new(&WORDS, 3, 2))
}

#[inline(always)]
pub(super) fn weigh_row<V: Closest>(src: &[f32], importance: &[f32], dst: &mut [u8]) {
    let grid = grid();
    for ((x, block), importance) in encode_pairs(src, dst).zip(importance.as_chunks().0) {
        encode_block::<V>(grid, x, importance, block);
    }
}

#[inline(always)]
fn encode_block<V: Closest>(grid: &Grid<8>, x: &[f32; 256], importance: &[f32; 256], block: &mut Block) {
    const RULES: Rules = Rules { levels: 3, attempts: 9, step: 0.1, again: Again::Inexact };
    let sigma2 = search::sum_of_squares(x) / 256.0;
    let (x, importance) = (x.as_chunks::<8>().0.as_chunks::<2>().0, importance.as_chunks::<8>().0);
    let mut scales = [0.0; 16];
    *block = bytemuck::Zeroable::zeroed();
    for (n, (x, importance)) in x.iter().zip(importance.as_chunks::<2>().0).enumerate() {
        let group = search::Group::new(x, search::weigh(x, importance, sigma2), true);
        if group.max < NOTHING {
            continue;
        }
        let fit = group.search::<V, 24>(grid, RULES, group.max, group.max / 5.0);
        scales[n] = fit.scale;
        let signs = group.signs(fit.flip, true);
        for k in 0..2 {
            block.qs[2 * n + k] = (grid.point(fit.words[k]) | u16::from(signs[k]) << 9).to_le_bytes();
        }
    }
    let (d, codes) = search::scales(&scales);
    block.d = f16_from_f32(d).to_le_bytes();
    block.scales = search::halves(&codes);
    if search::is_nothing(&scales) {
        block.qs = [[0; 2]; 32];
    }
}
