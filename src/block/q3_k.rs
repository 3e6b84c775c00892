//! Q3_K: 256 weights in 110 bytes, 16 groups with a scale of 6 bits, codes of 3 bits around 4.

use super::cast::extreme;
use super::groups::{Groups, LANES, Scales, at_rest, byte, descend, side_by_side, symmetric};
use super::kquant::{nearest, pack_bits, pack_pairs, requantize, spreads, unpack_bits, unpack_pairs};
use super::lattice::{Latticed, steps, whole};
use super::{Codec, decode_pairs, f16_from_f32, f32_from_f16};
use crate::tensor::DType;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Block {
    /// Bit 2 of every code: weight `32 n + m` in bit `n` of byte `m`.
    pub hmask: [u8; 32],
    /// Bits 0 and 1: of each 128 weights, weight `32 n + m` in bits `2n` and `2n + 1` of byte `m`.
    /// A weight is `d * (scale - 32) * (code - 4)`.
    pub qs: [u8; 64],
    /// Bits 0 to 3 of the scales: group `j` in the low half of byte `j`, group `j + 8` in the high
    /// half; bits 4 and 5 of group `4 n + m` in bits `2n` and `2n + 1` of byte `8 + m`.
    pub scales: [u8; 12],
    /// Scale of the scales, f16 little endian.
    pub d: [u8; 2],
}
const _: () = assert!(size_of::<Block>() as u64 == DType::Q3_K.type_size());

impl Latticed<256> for Block {
    const GROUP: usize = 16;
    const LEVELS: &'static [f32] = &whole::<8>(-4);

    fn lines(&self, lines: &mut [(f32, f32)]) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        for (line, scale) in lines.iter_mut().zip(unpack_scales(&self.scales)) {
            *line = (d * f32::from(scale as i8 - 32), 0.0);
        }
    }

    fn put(&mut self, codes: &[u8; 256]) {
        self.hmask = pack_bits(codes, 2);
        self.qs = pack_pairs(codes, 0);
    }

    fn set(&mut self, group: usize, (scale, _): (f32, f32)) {
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let mut scales = unpack_scales(&self.scales);
        scales[group] = (steps(scale, d, -32, 31) + 32) as u8;
        self.scales = pack_scales(&scales);
    }
}

pub(super) const SCALAR: Codec = Codec {
    dtype: DType::Q3_K,
    implementation: "scalar",
    encode: Some(|src, dst| encode::<LANES>(src, None, dst)),
    weigh: Some(|src, importance, dst| encode::<LANES>(src, Some(importance), dst)),
    decode: |src, dst| decode(src, dst),
    bound: None,
};

/// Blocks that are searched together: without importance to fill the lanes with those groups in
/// which codes move, with one because the scales of a block are searched like its weights.
const BATCH: [usize; 2] = [16, LANES];
/// Groups in which codes move, side by side: several registers, for a code waits for the one
/// before and a division.
const MOVING: usize = 32;

#[inline(always)]
pub(super) fn encode<const L: usize>(src: &[f32], importance: Option<&[f32]>, dst: &mut [u8]) {
    let blocks = bytemuck::cast_slice_mut(dst);
    match importance {
        None => {
            for (x, blocks) in src.chunks(BATCH[0] * 256).zip(blocks.chunks_mut(BATCH[0])) {
                encode_plain::<L>(x, blocks);
            }
        }
        Some(importance) => {
            let batches = src.chunks(BATCH[1] * 256).zip(importance.chunks(BATCH[1] * 256));
            for ((x, importance), blocks) in batches.zip(blocks.chunks_mut(BATCH[1])) {
                encode_weighed::<L>(x, importance, blocks);
            }
        }
    }
}

#[inline(always)]
fn encode_plain<const L: usize>(x: &[f32], blocks: &mut [Block]) {
    let mut found = [[0.0; 16]; BATCH[0]];
    let (mut moving, mut count) = ([0; 16 * BATCH[0]], 0);
    for (part, (x, found)) in x.chunks(L * 16).zip(found.chunks_mut(L / 16)).enumerate() {
        let (scales, moves) = at_rest(4, &side_by_side::<L, 16>(x));
        found.as_flattened_mut().copy_from_slice(&scales);
        for (t, moves) in moves.into_iter().enumerate() {
            moving[count] = part * L + t;
            count += usize::from(moves != 0);
        }
    }
    let groups = x.as_chunks::<16>().0;
    for moving in moving[..count].chunks(MOVING) {
        let mut gathered = [[0.0; 16]; MOVING];
        for (x, &g) in gathered.iter_mut().zip(moving) {
            *x = groups[g];
        }
        let turned = side_by_side::<MOVING, 16>(gathered.as_flattened());
        let scales = descend(4, &turned, &mut Groups([[0.0; MOVING]; 16]));
        for (&g, scale) in moving.iter().zip(scales) {
            found[g / 16][g % 16] = scale;
        }
    }
    for (x, (block, found)) in x.as_chunks().0.iter().zip(blocks.iter_mut().zip(&found)) {
        let max = extreme(found);
        let mut scales = [0; 16];
        block.d = [0; 2];
        if max != 0.0 {
            let inverse = -32.0 / max;
            for g in 0..16 {
                scales[g] = ((nearest(inverse * found[g]) as i8).clamp(-32, 31) + 32) as u8;
            }
            block.d = f16_from_f32(1.0 / inverse).to_le_bytes();
        }
        block.store(x, &scales, |_, x, codes| {
            let mut found = Groups([[0.0; 1]; 16]);
            descend(4, &side_by_side::<1, 16>(x), &mut found);
            for (code, found) in codes.iter_mut().zip(found.0) {
                *code = byte(found[0]);
            }
        });
    }
}

#[inline(always)]
fn encode_weighed<const L: usize>(x: &[f32], importance: &[f32], blocks: &mut [Block]) {
    let spreads = spreads::<LANES>(x, 2.0);
    let mut lines = [Scales::NONE; LANES];
    let (mut found, mut weights) = (Groups([[0.0; LANES]; 16]), Groups([[0.0; LANES]; 16]));
    let parts = x.chunks(L * 16).zip(importance.chunks(L * 16));
    for (part, (lines, (x, importance))) in lines.iter_mut().zip(parts).enumerate() {
        let mut spread = [0.0; L];
        for t in 0..L {
            spread[t] = spreads[(part * L + t) / 16];
        }
        let x = side_by_side::<L, 16>(x);
        let (w, sums) = weigh(&x, &side_by_side(importance), &spread);
        *lines = symmetric(4, &x, &w);
        for (t, (scale, sum)) in lines.scale.into_iter().zip(sums).enumerate() {
            let (b, g) = ((part * L + t) / 16, t % 16);
            (found.0[g][b], weights.0[g][b]) = (scale, sum);
        }
    }
    let d = symmetric(32, &found, &weights);
    for (b, (x, block)) in x.as_chunks().0.iter().zip(blocks).enumerate() {
        let (lines, first) = (&lines[16 * b / L], 16 * b % L);
        let mut scales = [0; 16];
        d.codes(32, b, &lines.scale[first..first + 16], &mut scales);
        block.d = f16_from_f32(d.scale[b]).to_le_bytes();
        block.store(x, &scales, |g, x, codes| lines.codes(4, first + g, x, codes));
    }
}

/// The weights of squares with importance, and their sums.
#[inline(always)]
fn weigh<const L: usize>(
    x: &Groups<L, 16>,
    importance: &Groups<L, 16>,
    spread: &[f32; L],
) -> (Groups<L, 16>, [f32; L]) {
    let (mut w, mut sums) = (Groups([[0.0; L]; 16]), [0.0; L]);
    for i in 0..16 {
        for t in 0..L {
            let weight = importance.0[i][t] * (spread[t] + x.0[i][t] * x.0[i][t]).sqrt();
            w.0[i][t] = weight;
            sums[t] += weight;
        }
    }
    (w, sums)
}

impl Block {
    /// Stores scales, and codes for them as they will be read. A scale of 0 leaves the codes that
    /// the search `found`.
    #[inline(always)]
    fn store(&mut self, x: &[f32; 256], scales: &[u8; 16], found: impl Fn(usize, &[f32; 16], &mut [u8; 16])) {
        self.scales = pack_scales(scales);
        let d = f32_from_f16(u16::from_le_bytes(self.d));
        let mut codes = [0; 256];
        for (g, (x, codes)) in x.as_chunks().0.iter().zip(codes.as_chunks_mut().0).enumerate() {
            let d = d * f32::from(scales[g] as i8 - 32);
            if d != 0.0 {
                requantize(x, d, 4, codes);
            } else {
                found(g, x, codes);
            }
        }
        self.hmask = pack_bits(&codes, 2);
        self.qs = pack_pairs(&codes, 0);
    }
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
    unpack_pairs(&block.qs, 0, &mut codes);
    unpack_bits(&block.hmask, 2, &mut codes);
    let scales = unpack_scales(&block.scales);
    for ((y, codes), scale) in y.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(scales) {
        let scale = d * f32::from(scale as i8 - 32);
        for (y, &code) in y.iter_mut().zip(codes) {
            *y = scale * (f32::from(code) - 4.0);
        }
    }
}

fn pack_scales(scales: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (j, scale) in scales.iter().enumerate() {
        packed[j % 8] |= (scale & 15) << (4 * (j / 8));
        packed[8 + j % 4] |= scale >> 4 << (2 * (j / 4));
    }
    packed
}

pub(super) fn unpack_scales(packed: &[u8; 12]) -> [u8; 16] {
    std::array::from_fn(|j| {
        packed[j % 8] >> (4 * (j / 8)) & 15 | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4
    })
}
