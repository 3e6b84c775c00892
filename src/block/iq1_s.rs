//! IQ1_S: 256 weights in 50 bytes, 8 groups with a scale of 3 bits and one shift; eight weights at a
//! time are one of 2048 points.

use super::iq1::{
    Best, DOWN, Each, Found, GROUPS, Groups, Means, Portable, SHIFT, UP, WORDS, Wide, attempt, deviation,
    greatest, point, settle, weigh,
};
use super::kquant::nearest;
use super::{Codec, decode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Scale, f16 little endian.
    pub d: [u8; 2],
    /// Bits 0 to 7 of the points, four for each group.
    pub qs: [u8; 32],
    /// Of each group, little endian: bits 8 to 10 of point `n` in bits `3n` to `3n + 2`, the scale in
    /// bits 12 to 14, and bit 15 set if the levels are shifted down. A weight is
    /// `d * (2 * scale + 1) * (level + shift)`.
    pub qh: [[u8; 2]; 8],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::IQ1_S.type_size());

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::IQ1_S,
    implementation: "scalar",
    encode: None,
    weigh: Some(encode::<Portable>),
    decode: |src, dst| decode_pairs(src, dst).for_each(|(block, y)| decode_block(block, y)),
    bound: None,
};

/// Groups whose largest weight is below this are stored as nothing.
const NOTHING: f32 = 1e-12;

#[inline(always)]
pub(super) fn encode<M: Means>(row: &[f32], importance: &[f32], dst: &mut [u8]) {
    let blocks: &mut [Block] = bytemuck::cast_slice_mut(dst);
    let x = row.as_chunks::<256>().0.chunks(2).zip(importance.as_chunks::<256>().0.chunks(2));
    for ((x, importance), blocks) in x.zip(blocks.chunks_mut(2)) {
        // Where a row ends with half a pair, the other half is nothing.
        let (mut all, mut weights) = ([[0.0; 32]; GROUPS], [[0.0; 32]; GROUPS]);
        for (i, (x, importance)) in x.iter().zip(importance).enumerate() {
            let deviation = deviation(x);
            for g in 0..8 {
                let group = &x.as_chunks::<32>().0[g];
                all[8 * i + g] = *group;
                weights[8 * i + g] = weigh(group, &importance[32 * g..], deviation);
            }
        }
        let found = search::<M>(&all, &weights);
        for (i, block) in blocks.iter_mut().enumerate() {
            store(&found, 8 * i, block);
        }
    }
}

#[inline(always)]
fn search<M: Means>(x: &[[f32; 32]; GROUPS], weights: &[[f32; 32]; GROUPS]) -> Found<4> {
    let groups = Groups::new::<M::Wide>(x, weights);
    // Sums over the first so many weights of the sorted group.
    let (mut sum_x, mut sum_w) = ([[0.0; GROUPS]; 33], [[0.0; GROUPS]; 33]);
    for j in 0..32 {
        for g in 0..GROUPS {
            let place = groups.ranks[j][g] as usize + 1;
            sum_x[place][g] = groups.weight_columns[j][g] * groups.columns[j][g];
            sum_w[place][g] = groups.weight_columns[j][g];
        }
    }
    for j in 0..32 {
        for g in 0..GROUPS {
            sum_x[j + 1][g] += sum_x[j][g];
            sum_w[j + 1][g] += sum_w[j][g];
        }
    }
    let best = cut::<M::Wide>(&sum_x, &sum_w).taken(&groups.columns, NOTHING);
    settle::<M, 32, 4>(&groups, &best, &[0, 15])
}

/// Tries all cuts of the sorted groups, given the sums over their first so many weights.
#[inline(always)]
fn cut<W: Wide>(sum_x: &[Each; 33], sum_w: &[Each; 33]) -> Best<W> {
    let shift = W::splat(SHIFT);
    let (all_x, all_w) = (W::load(&sum_x[32]), W::load(&sum_w[32]));
    // What the upper weights add, by where they begin, for both shifts.
    let (mut upper_x, mut upper_w) = ([[W::splat(0.0); 2]; 33], [[W::splat(0.0); 2]; 33]);
    for i in 0..33 {
        let x = all_x.sub(W::load(&sum_x[i]));
        let w = all_w.sub(W::load(&sum_w[i]));
        for (kind, level) in [W::splat(UP[2]), W::splat(DOWN[2])].into_iter().enumerate() {
            upper_x[i][kind] = x.mul(level);
            upper_w[i][kind] = w.mul(level).mul(level);
        }
    }
    let mut best = Best::none();
    for low in 0..33 {
        let (x, w) = (W::load(&sum_x[low]), W::load(&sum_w[low]));
        let (up, down) = (W::splat(UP[0]), W::splat(DOWN[0]));
        let lower_x = [x.mul(up), x.mul(down)];
        let lower_w = [w.mul(up).mul(up), w.mul(down).mul(down)];
        for middle in low..33 {
            // The levels of the middle are the shifts themselves, and their squares the same.
            let middle_x = W::load(&sum_x[middle]).sub(x).mul(shift);
            let middle_w = W::load(&sum_w[middle]).sub(w).mul(shift).mul(shift);
            let (upper_x, upper_w) = (&upper_x[middle], &upper_w[middle]);
            let xl = lower_x[0].add(middle_x).add(upper_x[0]);
            let l2 = lower_w[0].add(middle_w).add(upper_w[0]);
            best.offer(xl, l2, attempt(low, middle, 0));
            let xl = lower_x[1].sub(middle_x).add(upper_x[1]);
            let l2 = lower_w[1].add(middle_w).add(upper_w[1]);
            best.offer(xl, l2, attempt(low, middle, 1));
        }
    }
    best
}

/// Stores what was found for the groups from `first` on.
fn store(found: &Found<4>, first: usize, block: &mut Block) {
    let scales: &[f32] = &found.scale[first..first + 8];
    let most = greatest(scales);
    let d = most / 15.0;
    let id = 1.0 / d;
    block.d = f16_from_f32(if most != 0.0 { d * 1.125 } else { 0.0 }).to_le_bytes();
    for (i, scale) in scales.iter().enumerate() {
        let mut high = 0;
        for (n, &word) in found.words[first + i].iter().enumerate() {
            let point = point(word);
            block.qs[4 * i + n] = point as u8;
            high |= point >> 8 << (3 * n);
        }
        if most != 0.0 {
            let scale = nearest(0.5 * (id * scale - 1.0)).clamp(0, 7) as u16;
            high |= scale << 12 | u16::from(found.kind[first + i]) << 15;
        }
        block.qh[i] = high.to_le_bytes();
    }
}

fn decode_block(block: &Block, y: &mut [f32; 256]) {
    let d = f32_from_f16(u16::from_le_bytes(block.d));
    for (g, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let high = u16::from_le_bytes(block.qh[g]);
        let d = d * f32::from(2 * (high >> 12 & 7) + 1);
        let levels = (if high >> 15 == 0 { UP } else { DOWN }).map(|level| d * level);
        for (n, y) in y.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let point = u16::from(block.qs[4 * g + n]) | (high >> (3 * n) & 7) << 8;
            decode_eight(WORDS[usize::from(point)], &levels, y);
        }
    }
}

/// The levels of the codes of a point.
#[inline(always)]
pub(super) fn decode_eight(word: u16, levels: &[f32; 3], y: &mut [f32; 8]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = levels[usize::from(word >> (2 * i) & 3).min(2)];
    }
}
