//! What the K types share: how a block is encoded around the search for its scales, and how 256
//! codes are packed.

use super::f16_from_f32;
use super::groups::{Groups, LANES, WHOLE, byte, limit, positive, side_by_side, whole};
use super::lines::{Affine, Lines, Weight, affine};

/// Groups whose largest weight is below this are stored as zeros.
pub(super) const NOTHING: f32 = 1e-15;

/// Rounds to nearest, ties to even, by adding 1.5 * 2^23 and reading the low 23 bits as ggml's
/// `nearest_int` does: right for magnitudes below 2^22, the same bits as there beyond.
#[inline(always)]
pub(super) fn nearest(x: f32) -> i32 {
    ((x + WHOLE).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

/// A type whose groups have a scale and a minimum: `G` groups of `N` weights in a block.
pub(super) trait Lined<const N: usize, const G: usize>: bytemuck::Pod {
    /// The search without importance.
    const PLAIN: Affine;
    /// The code of the greatest scale, and of the greatest minimum.
    const LEVELS: u8;
    /// What limits these codes, without importance and with one.
    const LIMITS: [u8; 2];
    /// How much the mean square of the block counts in the importance of a weight.
    const SPREAD: f32;

    /// Stores scales and minima, and gives those of each group as they will be read.
    fn store(&mut self, d: [u8; 2], dmin: [u8; 2], scales: &[u8; G], mins: &[u8; G]) -> [(f32, f32); G];
    /// Stores the codes.
    fn pack(&mut self, codes: &[u8; 256]);
}

/// Encodes whole blocks, or one row with its importance.
#[inline(always)]
pub(super) fn encode_lines<B: Lined<N, G>, const L: usize, const N: usize, const G: usize>(
    src: &[f32],
    importance: Option<&[f32]>,
    dst: &mut [u8],
) {
    let blocks = bytemuck::cast_slice_mut::<u8, B>(dst);
    match importance {
        None => {
            for (x, blocks) in src.chunks(L * N).zip(blocks.chunks_mut(L / G)) {
                lines_plain::<B, L, N, G>(x, blocks);
            }
        }
        Some(importance) => {
            let batches = src.chunks(BATCH * 256).zip(importance.chunks(BATCH * 256));
            for ((x, importance), blocks) in batches.zip(blocks.chunks_mut(BATCH)) {
                lines_weighed::<B, L, N, G>(x, importance, blocks);
            }
        }
    }
}

#[inline(always)]
fn lines_plain<B: Lined<N, G>, const L: usize, const N: usize, const G: usize>(x: &[f32], blocks: &mut [B]) {
    let turned = side_by_side::<L, N>(x);
    let lines = affine(B::PLAIN, &turned, &turned, [0.0; L]);
    let found = lines.scale.as_chunks::<G>().0.iter().zip(lines.min.as_chunks::<G>().0);
    for (b, ((x, block), (scales, mins))) in x.as_chunks().0.iter().zip(blocks).zip(found).enumerate() {
        let (d, scales) = levels(scales, B::LEVELS, B::LIMITS[0]);
        let (dmin, mins) = levels(mins, B::LEVELS, B::LIMITS[0]);
        let stored = block.store(d, dmin, &scales, &mins);
        block.pack(&lined_codes(B::PLAIN, x, &stored, &lines, b * G));
    }
}

/// Blocks whose scales and minima are settled side by side.
const BATCH: usize = LANES / 2;

#[inline(always)]
fn lines_weighed<B: Lined<N, G>, const L: usize, const N: usize, const G: usize>(
    x: &[f32],
    importance: &[f32],
    blocks: &mut [B],
) {
    let how = Affine {
        weight: Weight::Importance,
        codes: B::PLAIN.codes,
        attempts: 37,
        first: -0.9,
        step: 0.05,
        absolute: false,
        limited: true,
    };
    let spreads = spreads::<BATCH>(x, B::SPREAD);
    let mut lines = [Lines::NONE; BATCH];
    // The scales of a block in one lane, its minima in another.
    let (mut found, mut weights) = (Groups([[0.0; LANES]; G]), Groups([[0.0; LANES]; G]));
    let parts = x.chunks(L * N).zip(importance.chunks(L * N));
    for (part, (lines, (x, importance))) in lines.iter_mut().zip(parts).enumerate() {
        let mut spread = [0.0; L];
        for t in 0..L {
            spread[t] = spreads[(part * L + t) / G];
        }
        *lines = affine(how, &side_by_side::<L, N>(x), &side_by_side(importance), spread);
        for t in 0..L {
            let (b, g) = ((part * L + t) / G, t % G);
            (found.0[g][b], found.0[g][b + BATCH]) = (lines.scale[t], lines.min[t]);
            (weights.0[g][b], weights.0[g][b + BATCH]) = (lines.weight[t], lines.weight[t]);
        }
    }
    let mut codes = Groups([[0.0; LANES]; G]);
    let d = positive(B::LEVELS, &found, &weights, &mut codes);
    for (b, (x, block)) in x.as_chunks().0.iter().zip(blocks).enumerate() {
        let (mut scales, mut mins) = ([0; G], [0; G]);
        for g in 0..G {
            scales[g] = byte(codes.0[g][b]).min(B::LIMITS[1]);
            mins[g] = byte(codes.0[g][b + BATCH]).min(B::LIMITS[1]);
        }
        let (d, dmin) = (f16_from_f32(d[b]).to_le_bytes(), f16_from_f32(d[b + BATCH]).to_le_bytes());
        let stored = block.store(d, dmin, &scales, &mins);
        let first = b * G;
        block.pack(&lined_codes(how, x, &stored, &lines[first / L], first % L));
    }
}

/// The mean square of each block, `times` over. Not inlined, for the reason of
/// [`side_by_side`]: wider registers gather.
#[inline(never)]
pub(super) fn spreads<const B: usize>(x: &[f32], times: f32) -> [f32; B] {
    let mut sums = [0.0; B];
    let (fours, rest) = x.as_chunks::<256>().0.as_chunks::<4>();
    for (sums, four) in sums.as_chunks_mut::<4>().0.iter_mut().zip(fours) {
        for (((a, b), c), d) in four[0].iter().zip(&four[1]).zip(&four[2]).zip(&four[3]) {
            sums[0] += a * a;
            sums[1] += b * b;
            sums[2] += c * c;
            sums[3] += d * d;
        }
    }
    for (sum, x) in sums.iter_mut().skip(4 * fours.len()).zip(rest) {
        for x in x {
            *sum += x * x;
        }
    }
    for sum in &mut sums {
        *sum = times * *sum / 256.0;
    }
    sums
}

/// Values as multiples of the greatest by `levels`.
#[inline(always)]
fn levels<const G: usize>(found: &[f32; G], levels: u8, limit: u8) -> ([u8; 2], [u8; G]) {
    let levels = f32::from(levels);
    let mut greatest = 0.0;
    for &v in found {
        greatest = if v > greatest { v } else { greatest };
    }
    let inverse = if greatest > 0.0 { levels / greatest } else { 0.0 };
    let mut codes = [0; G];
    for g in 0..G {
        codes[g] = (nearest(inverse * found[g]) as u8).min(limit);
    }
    (f16_from_f32(greatest / levels).to_le_bytes(), codes)
}

/// The codes for scales and minima as they were stored. A scale of 0 leaves what the search found
/// in the lanes from `first` on.
#[inline(always)]
fn lined_codes<const L: usize, const G: usize>(
    how: Affine,
    x: &[f32; 256],
    stored: &[(f32, f32); G],
    lines: &Lines<L>,
    first: usize,
) -> [u8; 256] {
    let mut codes = [0; 256];
    for (g, (x, codes)) in x.chunks_exact(256 / G).zip(codes.chunks_exact_mut(256 / G)).enumerate() {
        let (d, min) = stored[g];
        if d == 0.0 {
            lines.codes(how, first + g, x, codes);
            continue;
        }
        for (code, x) in codes.iter_mut().zip(x) {
            *code = byte(limit(whole((x + min) / d), 0.0, how.codes.into()));
        }
    }
    codes
}

/// Codes around `half` for a scale as it was stored.
#[inline(always)]
pub(super) fn requantize(x: &[f32; 16], d: f32, half: i32, codes: &mut [u8; 16]) {
    let half = half as f32;
    for i in 0..16 {
        codes[i] = byte(limit(whole(x[i] / d), -half, half - 1.0) + half);
    }
}

/// Bits `shift` and `shift + 1` of every code, four to a byte: of each 128 weights, weight
/// `32 n + m` in bits `2n` and `2n + 1` of byte `m`.
pub(super) fn pack_pairs(codes: &[u8; 256], shift: u8) -> [u8; 64] {
    let mut packed = [0; 64];
    for (bytes, codes) in packed.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
        for (n, codes) in codes.chunks_exact(32).enumerate() {
            for (byte, code) in bytes.iter_mut().zip(codes) {
                *byte |= (code >> shift & 3) << (2 * n);
            }
        }
    }
    packed
}

/// Adds what [`pack_pairs`] packed to codes that lack it.
pub(super) fn unpack_pairs(packed: &[u8; 64], shift: u8, codes: &mut [u8; 256]) {
    for (bytes, codes) in packed.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (n, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (byte, code) in bytes.iter().zip(codes) {
                *code |= (byte >> (2 * n) & 3) << shift;
            }
        }
    }
}

/// Bit `shift` of every code: weight `32 n + m` in bit `n` of byte `m`.
pub(super) fn pack_bits(codes: &[u8; 256], shift: u8) -> [u8; 32] {
    let mut packed = [0; 32];
    for (n, codes) in codes.chunks_exact(32).enumerate() {
        for (byte, code) in packed.iter_mut().zip(codes) {
            *byte |= (code >> shift & 1) << n;
        }
    }
    packed
}

/// Adds what [`pack_bits`] packed to codes that lack it.
pub(super) fn unpack_bits(packed: &[u8; 32], shift: u8, codes: &mut [u8; 256]) {
    for (n, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (byte, code) in packed.iter().zip(codes) {
            *code |= (byte >> n & 1) << shift;
        }
    }
}

/// Low halves of codes: of each `2 * N`, the first `N` in the low half of a byte, the others in
/// the high half.
pub(super) fn pack_halves<const N: usize>(codes: &[u8], packed: &mut [u8]) {
    for (bytes, codes) in packed.chunks_exact_mut(N).zip(codes.chunks_exact(2 * N)) {
        let (low, high) = codes.split_at(N);
        for (byte, (low, high)) in bytes.iter_mut().zip(low.iter().zip(high)) {
            *byte = low & 15 | high << 4;
        }
    }
}

/// The inverse of [`pack_halves`].
pub(super) fn unpack_halves<const N: usize>(packed: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in packed.chunks_exact(N).zip(codes.chunks_exact_mut(2 * N)) {
        let (low, high) = codes.split_at_mut(N);
        for (byte, (low, high)) in bytes.iter().zip(low.iter_mut().zip(high)) {
            *low = byte & 15;
            *high = byte >> 4;
        }
    }
}
