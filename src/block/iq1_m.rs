//! IQ1_M: 256 weights in 56 bytes, 16 groups with a scale of 3 bits; eight weights at a time are one
//! of 2048 points, with a shift of their own.

use super::iq1::{
    Best, DOWN, Each, Found, GROUPS, Groups, Means, Portable, UP, WORDS, Wide, attempt, deviation, greatest,
    point, settle, weigh,
};
use super::iq1_s::decode_eight;
use super::kquant::nearest;
use super::{Codec, decode_pairs, encode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Bits 0 to 7 of the points.
    pub qs: [u8; 32],
    /// Of two points each, one in each half: bits 8 to 10, and bit 3 set if the levels are shifted
    /// down.
    pub qh: [u8; 16],
    /// Four words, little endian: scales of four groups in bits 0 to 11, 3 bits each, and 4 bits of
    /// the f16 `d` above them, its low bits in the first word. A weight is
    /// `d * (2 * scale + 1) * (level + shift)`.
    pub scales: [[u8; 2]; 4],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ1_M.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ1_M,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<Portable>(src, None, dst)),
    weigh: Some(|row, importance, dst| encode::<Portable>(row, Some(importance), dst)),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

/// Groups whose largest weight is below this are stored as nothing.
const NOTHING: f32 = 1e-7;

/// Which eights of a group a combination of shifts shifts down.
const KINDS: [u8; 4] = [0, 2, 1, 3];

#[inline(always)]
pub(super) fn encode<M: Means>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    for (i, (x, block)) in encode_pairs::<Block, 256>(src, dst).enumerate() {
        let mut weights = [[0.0; 16]; GROUPS];
        let deviation = if importance.is_some() { deviation(x) } else { 0.0 };
        let x: &[[f32; 16]; GROUPS] = bytemuck::cast_ref(x);
        for g in 0..GROUPS {
            match importance {
                Some(importance) => weights[g] = weigh(&x[g], &importance[256 * i + 16 * g..], deviation),
                None => {
                    for (weight, x) in weights[g].iter_mut().zip(&x[g]) {
                        *weight = x * x;
                    }
                }
            }
        }
        store(&search::<M>(x, &weights), x, &weights, block);
    }
}

/// The sums of one half of each group: the first or the second eight weights.
struct Half {
    /// Over those among the first so many weights of the sorted group.
    x: [Each; 17],
    w: [Each; 17],
}

#[inline(always)]
fn search<M: Means>(x: &[[f32; 16]; GROUPS], weights: &[[f32; 16]; GROUPS]) -> Found<2> {
    let groups = Groups::new::<M::Wide>(x, weights);
    let mut halves = [
        Half { x: [[0.0; GROUPS]; 17], w: [[0.0; GROUPS]; 17] },
        Half { x: [[0.0; GROUPS]; 17], w: [[0.0; GROUPS]; 17] },
    ];
    for j in 0..16 {
        let half = &mut halves[j / 8];
        for g in 0..GROUPS {
            let place = groups.ranks[j][g] as usize + 1;
            half.x[place][g] = groups.weight_columns[j][g] * groups.columns[j][g];
            half.w[place][g] = groups.weight_columns[j][g];
        }
    }
    for half in &mut halves {
        for j in 0..16 {
            for g in 0..GROUPS {
                half.x[j + 1][g] += half.x[j][g];
                half.w[j + 1][g] += half.w[j][g];
            }
        }
    }
    let best = cut::<M::Wide>(&halves).taken(&groups.columns, NOTHING);
    settle::<M, 16, 2>(&groups, &best, &KINDS)
}

/// By how much a weight's square of the level changes with each step down from the upper level.
const STEPS: [[f32; 2]; 2] = [
    [UP[0] * UP[0] - UP[1] * UP[1], UP[1] * UP[1] - UP[2] * UP[2]],
    [DOWN[0] * DOWN[0] - DOWN[1] * DOWN[1], DOWN[1] * DOWN[1] - DOWN[2] * DOWN[2]],
];

/// Tries all cuts of the sorted groups.
///
/// A sum is that of all weights at the upper level and what each step down changes: 1 for the
/// levels, [`STEPS`] for their squares.
#[inline(always)]
fn cut<W: Wide>(halves: &[Half; 2]) -> Best<W> {
    let mut best = Best::none();
    for low in 0..17 {
        let mut all_x = [[W::splat(0.0); 2]; 2];
        let mut all_w = [[W::splat(0.0); 2]; 2];
        for (h, half) in halves.iter().enumerate() {
            for (s, upper) in [W::splat(UP[2]), W::splat(DOWN[2])].into_iter().enumerate() {
                let step = W::load(&half.w[low]).mul(W::splat(STEPS[s][0]));
                all_x[h][s] = W::load(&half.x[16]).mul(upper);
                all_w[h][s] = W::load(&half.w[16]).mul(upper).mul(upper).add(step);
            }
        }
        for middle in low..17 {
            let mut xl = [[W::splat(0.0); 2]; 2];
            let mut l2 = [[W::splat(0.0); 2]; 2];
            for (h, half) in halves.iter().enumerate() {
                let x = W::load(&half.x[low]).add(W::load(&half.x[middle]));
                let w = W::load(&half.w[middle]);
                for s in 0..2 {
                    xl[h][s] = all_x[h][s].sub(x);
                    l2[h][s] = all_w[h][s].add(w.mul(W::splat(STEPS[s][1])));
                }
            }
            for kind in 0..4 {
                let (first, second) = (kind / 2, kind % 2);
                let (xl, l2) = (xl[0][first].add(xl[1][second]), l2[0][first].add(l2[1][second]));
                best.offer(xl, l2, attempt(low, middle, kind));
            }
        }
    }
    best
}

/// Stores what was found, with a `d` of least squares over the whole block.
#[inline(always)]
fn store(found: &Found<2>, x: &[[f32; 16]; GROUPS], weights: &[[f32; 16]; GROUPS], block: &mut Block) {
    let most = greatest(&found.scale);
    let id = 1.0 / (most / 15.0);
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    let mut packed = [0u16; 4];
    for g in 0..GROUPS {
        let words = found.words[g];
        let points = [point(words[0]), point(words[1])];
        block.qs[2 * g..][..2].copy_from_slice(&points.map(|point| point as u8));
        block.qh[g] = (points[0] >> 8 | points[1] >> 8 << 4) as u8;
        if most == 0.0 {
            continue;
        }
        let down = KINDS[usize::from(found.kind[g])];
        block.qh[g] |= (down & 1) << 3 | (down & 2) << 6;
        let scale = nearest(0.5 * (id * found.scale[g] - 1.0)).clamp(0, 7);
        packed[g / 4] |= (scale as u16) << (3 * (g % 4));
        for j in 0..16 {
            let levels = if down >> (j / 8) & 1 == 0 { &UP } else { &DOWN };
            let code = usize::from(words[j / 8] >> (2 * (j % 8)) & 3).min(2);
            let level = levels[code] * (2 * scale + 1) as f32;
            sum_xl += weights[g][j] * level * x[g][j];
            sum_l2 += weights[g][j] * level * level;
        }
    }
    let mut d = 0;
    if most != 0.0 {
        d = f16_from_f32((if sum_l2 > 0.0 { sum_xl / sum_l2 } else { most / 15.0 }) * 1.1125);
    }
    for (n, (scales, packed)) in block.scales.iter_mut().zip(packed).enumerate() {
        *scales = (packed | (d >> (4 * n) & 15) << 12).to_le_bytes();
    }
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let (d, words) = block.scales();
    let d = f32_from_f16(d);
    for (n, y) in y.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let scale = words[n / 8] >> (3 * (n / 2 % 4)) & 7;
        let high = u16::from(block.qh[n / 2]) >> (4 * (n % 2));
        let d = d * f32::from(2 * scale + 1);
        let levels = (if high & 8 == 0 { UP } else { DOWN }).map(|level| d * level);
        decode_eight(WORDS[usize::from(u16::from(block.qs[n]) | (high & 7) << 8)], &levels, y);
    }
}

impl Block {
    /// The f16 `d`, and the words with the scales.
    #[inline(always)]
    pub(super) fn scales(&self) -> (u16, [u16; 4]) {
        let words = self.scales.map(u16::from_le_bytes);
        let d = words[0] >> 12 | words[1] >> 12 << 4 | words[2] >> 12 << 8 | words[3] >> 12 << 12;
        (d, words)
    }
}
