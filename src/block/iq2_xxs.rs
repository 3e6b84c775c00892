//! IQ2_XXS: 256 weights in 66 bytes, 8 groups of 32 with a scale of 4 bits; eight weights at a time
//! are one of 256 points, their signs in 7 bits.
// Loops over lanes and groups go by index: several arrays run along.
#![allow(clippy::needless_range_loop)]

use super::grid::{EVEN, Grid, decode_eight, points, words};
use super::grid_search::{self as search, Again, Closest, Portable, Rules};
use super::kquant::{NOTHING, nearest};
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;
use std::sync::OnceLock;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    pub groups: [Group; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ2_XXS.type_size());

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Group {
    /// A point for eight weights each.
    pub points: [u8; 4],
    /// Little endian: 7 bits of signs for each point from bit 0 on, the scale in bits 28 to 31. A
    /// weight is `d * (0.5 + scale) * 0.25 * level`.
    pub signs: [u8; 4],
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ2_XXS,
    implementation: "scalar",
    encode: None,
    weigh: Some(weigh_row::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

const WORDS: [u16; 256] = words(include_bytes!("../../formats/block/iq2_xxs.txt"));
static LEVELS: [[i8; 8]; 256] = points(&WORDS, &[8, 25, 43]);

#[inline(always)]
pub(super) fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    let (y, _) = y.as_chunks_mut::<8>();
    for (group, y) in block.groups.iter().zip(y.as_chunks_mut::<4>().0) {
        let signs = u32::from_le_bytes(group.signs);
        let d = d * (0.5 + (signs >> 28) as f32) * 0.25;
        for k in 0..4 {
            let levels = &LEVELS[usize::from(group.points[k])];
            decode_eight(d, levels, EVEN[(signs >> (7 * k) & 127) as usize], &mut y[k]);
        }
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
    const RULES: Rules = Rules { levels: 3, attempts: 6, step: 0.1, again: Again::All };
    let sigma2 = search::sum_of_squares(x) / 256.0;
    let (x, importance) = (x.as_chunks::<8>().0.as_chunks::<4>().0, importance.as_chunks::<8>().0);
    let mut groups = [search::Group::EMPTY; 8];
    for ((group, x), importance) in groups.iter_mut().zip(x).zip(importance.as_chunks::<4>().0) {
        *group = search::Group::new(x, search::weigh(x, importance, sigma2), true);
    }
    let first = first_scales(&groups);
    let mut scales = [0.0; 8];
    let mut fields = [(0u32, [0; 4]); 8];
    for n in 0..8 {
        let (group, scale) = (&groups[n], first[n]);
        let max = scale * 3.0;
        if group.max < NOTHING || max <= 0.0 {
            continue;
        }
        let fit = group.search::<V, 16>(grid, RULES, max, scale);
        scales[n] = fit.scale;
        let (signs, points) = &mut fields[n];
        for (k, s) in group.signs(fit.flip, true).into_iter().enumerate() {
            *signs |= u32::from(s) << (7 * k);
            points[k] = grid.point(fit.words[k]) as u8;
        }
    }
    let (d, codes) = search::scales(&scales);
    block.d = f16_from_f32(d).to_le_bytes();
    for ((group, (signs, points)), code) in block.groups.iter_mut().zip(fields).zip(codes) {
        *group = Group { points, signs: (signs | u32::from(code) << 28).to_le_bytes() };
    }
    if search::is_nothing(&scales) {
        block.groups = [Group { points: [0; 4], signs: [0; 4] }; 8];
    }
}

/// The scales from which the attempts of the groups start: those of the best fit with codes from 0
/// to 4 on no grid. First the best of nine inverses, then each code in turn moves to where the scale
/// of the others would have it, as long as the fit gains, five rounds at most. The groups run side
/// by side. Source: `make_qp_quants`.
#[inline(always)]
fn first_scales(groups: &[search::Group<8, 4>; 8]) -> [f32; 8] {
    const MOST: i32 = 4;
    let (mut x, mut w) = ([[0.0; 8]; 32], [[0.0; 8]; 32]);
    let mut max = [0.0; 8];
    for (g, group) in groups.iter().enumerate() {
        for i in 0..32 {
            x[i][g] = group.x[i / 8][i % 8];
            w[i][g] = group.weight[i / 8][i % 8];
        }
        max[g] = if group.max > 0.0 { group.max } else { 0.0 };
    }
    // Codes are kept as bytes: one below zero comes back as more than 128 wherever it is read.
    let mut inverses = [0.0; 8];
    let mut least = [0.0; 8];
    for g in 0..8 {
        inverses[g] = MOST as f32 / max[g];
    }
    for i in 0..32 {
        for g in 0..8 {
            let code = nearest(inverses[g] * x[i][g]) & 255;
            let diff = x[i][g] - 1.0 / inverses[g] * code as f32;
            least[g] += w[i][g] * diff * diff;
        }
    }
    for step in [-4i8, -3, -2, -1, 1, 2, 3, 4] {
        let mut errors = [0.0; 8];
        let mut tried = [0.0; 8];
        for g in 0..8 {
            tried[g] = (0.1 * f32::from(step) + MOST as f32) / max[g];
        }
        for i in 0..32 {
            for g in 0..8 {
                let diff = x[i][g] - 1.0 / tried[g] * nearest(tried[g] * x[i][g]).min(MOST) as f32;
                errors[g] += w[i][g] * diff * diff;
            }
        }
        for g in 0..8 {
            if errors[g] < least[g] {
                (least[g], inverses[g]) = (errors[g], tried[g]);
            }
        }
    }
    let mut codes = [[0i32; 8]; 32];
    let (mut sum_xl, mut sum_l2) = ([0.0; 8], [0.0; 8]);
    for i in 0..32 {
        for g in 0..8 {
            let code = nearest(inverses[g] * x[i][g]).min(MOST);
            codes[i][g] = code & 255;
            sum_xl[g] += w[i][g] * x[i][g] * code as f32;
            sum_l2[g] += w[i][g] * code as f32 * code as f32;
        }
    }
    for _ in 0..5 {
        let mut moved = false;
        for i in 0..32 {
            for g in 0..8 {
                let (x, w, l) = (x[i][g], w[i][g], codes[i][g] as f32);
                let xl = sum_xl[g] - w * x * l;
                let l2 = sum_l2[g] - w * l * l;
                let code = nearest(x * l2 / xl).min(MOST);
                let l = code as f32;
                let new_xl = xl + w * x * l;
                let new_l2 = l2 + w * l * l;
                let better = new_xl * new_xl * sum_l2[g] > sum_xl[g] * sum_xl[g] * new_l2;
                if xl > 0.0 && l2 > 0.0 && code != codes[i][g] && better {
                    codes[i][g] = code & 255;
                    (sum_xl[g], sum_l2[g]) = (new_xl, new_l2);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    let mut scales = [0.0; 8];
    for g in 0..8 {
        if max[g] >= NOTHING && sum_l2[g] > 0.0 {
            scales[g] = sum_xl[g] / sum_l2[g];
        }
    }
    scales
}
