//! What the K types share: the searches for a scale, and how 256 codes are packed.
//!
//! A search tries several inverses of the scale and keeps the one whose decoded weights lie
//! closest. Attempts do not depend on each other, so that [`LANES`] of them run side by side; each
//! keeps the order of its own sums, and ties are settled in the order of ggml's attempts.
//! Source: `make_qx_quants`, `make_q3_quants`, `make_qkx2_quants` (`ggml-quants.c`).

use super::cast::extreme;

/// Attempts that run side by side: two registers of SSE2, one of AVX2.
const LANES: usize = 8;

/// Groups whose largest weight is below this are stored as zeros.
pub(super) const NOTHING: f32 = 1e-15;

/// Rounds to nearest, ties to even, by adding 1.5 * 2^23 and reading the low 23 bits as ggml's
/// `nearest_int` does: right for magnitudes below 2^22, the same bits as there beyond.
#[inline(always)]
pub(super) fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x007F_FFFF) as i32 - 0x0040_0000
}

/// Codes `0..2 * half` around `half` for `x`, and their scale: least squares over several
/// attempts, each weight counting with its square. All codes of a group of nothing are 0.
pub(super) fn symmetric(x: &[f32; 16], half: i32, codes: &mut [u8]) -> f32 {
    let max = extreme(x);
    if max.abs() < NOTHING {
        codes.fill(0);
        return 0.0;
    }
    // The plain scale first, then nine tenths of a step to either side.
    const STEPS: [i8; 24] = [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0];
    const ATTEMPTS: usize = 19;
    let code = |inverse: f32, x: f32| nearest(inverse * x).clamp(-half, half - 1);
    let mut best = (0.0, 0.0, 0.0);
    for (part, steps) in STEPS.as_chunks::<LANES>().0.iter().enumerate() {
        let inverses = steps.map(|step| -(half as f32 + 0.1 * f32::from(step)) / max);
        let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
        for &x in x {
            let w = x * x;
            for ((inverse, sum_xl), sum_l2) in inverses.iter().zip(&mut sum_xl).zip(&mut sum_l2) {
                let l = code(*inverse, x) as f32;
                *sum_xl += w * x * l;
                *sum_l2 += w * l * l;
            }
        }
        let attempts = inverses.into_iter().zip(sum_xl.into_iter().zip(sum_l2));
        for (n, (inverse, (xl, l2))) in attempts.enumerate().take(ATTEMPTS - part * LANES) {
            let first = part == 0 && n == 0;
            let (_, _, gain) = best;
            if first || l2 > 0.0 && xl * xl > gain * l2 {
                let scale = if l2 != 0.0 { xl / l2 } else { 0.0 };
                best = (inverse, scale, scale * xl);
            }
        }
    }
    let (inverse, scale, _) = best;
    for (code_, &x) in codes.iter_mut().zip(x) {
        *code_ = (code(inverse, x) + half) as u8;
    }
    scale
}

/// As [`symmetric`] by another road: from the plain scale on, one code at a time moves to where
/// the scale of the others would have it, as long as the fit gains, five rounds at most.
pub(super) fn descend(x: &[f32; 16], half: i32, codes: &mut [u8]) -> f32 {
    let max = extreme(x);
    if max.abs() < NOTHING {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -half as f32 / max;
    let mut fit = x.map(|x| nearest(inverse * x).clamp(-half, half - 1));
    let (mut sum_xl, mut sum_l2) = (0.0f32, 0.0f32);
    for (x, &l) in x.iter().zip(&fit) {
        let (w, l) = (x * x, l as f32);
        sum_xl += w * x * l;
        sum_l2 += w * l * l;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (x, code) in x.iter().zip(&mut fit) {
            let (w, l) = (x * x, *code as f32);
            let mut xl = sum_xl - w * x * l;
            if xl > 0.0 {
                let mut l2 = sum_l2 - w * l * l;
                let new = nearest(x * l2 / xl).clamp(-half, half - 1);
                if new != *code {
                    let l = new as f32;
                    xl += w * x * l;
                    l2 += w * l * l;
                    if l2 > 0.0 && xl * xl * sum_l2 > sum_xl * sum_xl * l2 {
                        (*code, sum_xl, sum_l2) = (new, xl, l2);
                        moved = true;
                    }
                }
            }
        }
        if !moved {
            break;
        }
    }
    for (code, l) in codes.iter_mut().zip(fit) {
        *code = (l + half) as u8;
    }
    if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }
}

/// How [`affine`] searches.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    /// The largest code.
    pub codes: u8,
    /// Attempts: the range is divided by `codes + first + 0.1 * n`.
    pub attempts: u8,
    pub first: f32,
    /// Whether errors count by magnitude instead of by their square.
    pub absolute: bool,
}

/// Scale, minimum with its sign turned, and codes of a group of weights of which each is about
/// `scale * code - minimum`: the line of least squares over the codes of several attempts.
/// `importance` weighs the squares.
///
/// An attempt starts from the best minimum so far. Those behind the one that improves it are
/// therefore void, and run again.
pub(super) fn affine(how: Affine, x: &[f32], importance: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    // -0 is what a sum starts from without changing its first term.
    let (mut sum_w, mut sum_x) = (-0.0, -0.0);
    for (&x, &w) in x.iter().zip(importance) {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    min = if min > 0.0 { 0.0 } else { min };
    if max == min {
        codes.fill(0);
        return (0.0, -min);
    }
    let most = f32::from(how.codes);
    let code = |inverse: f32, x: f32| nearest(inverse * x).clamp(0, how.codes.into()) as f32;
    let measure = |diff: f32| if how.absolute { diff.abs() } else { diff * diff };

    // The inverse scale and the minimum that give the best codes.
    let mut best = (most / (max - min), min);
    let mut scale = 1.0 / best.0;
    let mut least = x
        .iter()
        .zip(importance)
        .fold(0.0, |error, (&x, w)| error + w * measure(scale * code(best.0, x - min) + min - x));
    let mut n = 0;
    while n < how.attempts {
        let inverses: [f32; LANES] =
            std::array::from_fn(|t| (how.first + 0.1 * f32::from(n + t as u8) + most) / (max - min));
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (&x, &w) in x.iter().zip(importance) {
            let sums = sum_l.iter_mut().zip(&mut sum_l2).zip(&mut sum_xl);
            for (inverse, ((l1, l2), xl)) in inverses.iter().zip(sums) {
                let l = code(*inverse, x - min);
                *l1 += w * l;
                *l2 += w * l * l;
                *xl += w * l * x;
            }
        }
        let determinants: [f32; LANES] = std::array::from_fn(|t| sum_w * sum_l2[t] - sum_l[t] * sum_l[t]);
        let lines: [(f32, f32); LANES] = std::array::from_fn(|t| {
            let min = (sum_l2[t] * sum_x - sum_l[t] * sum_xl[t]) / determinants[t];
            if min > 0.0 {
                (sum_xl[t] / sum_l2[t], 0.0)
            } else {
                ((sum_w * sum_xl[t] - sum_x * sum_l[t]) / determinants[t], min)
            }
        });
        let (scales, mins) = (lines.map(|line| line.0), lines.map(|line| line.1));
        let mut errors = [0.0; LANES];
        for (&x, &w) in x.iter().zip(importance) {
            let lines = scales.iter().zip(&mins);
            for ((inverse, (scale, m)), error) in inverses.iter().zip(lines).zip(&mut errors) {
                *error += w * measure(scale * code(*inverse, x - min) + m - x);
            }
        }
        let left = LANES.min(usize::from(how.attempts - n));
        match (0..left).find(|&t| determinants[t] > 0.0 && errors[t] < least) {
            Some(t) => {
                best = (inverses[t], min);
                (scale, min, least) = (scales[t], mins[t], errors[t]);
                n += t as u8 + 1;
            }
            None => n += LANES as u8,
        }
    }
    let (inverse, from) = best;
    for (byte, &x) in codes.iter_mut().zip(x) {
        *byte = code(inverse, x - from) as u8;
    }
    (scale, -min)
}

/// The largest, above zero, of what the search found; NaN passed over.
pub(super) fn greatest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |max, &v| if v > max { v } else { max })
}

/// Codes `0..=most` anew, for a scale and a minimum as they were stored. A scale of 0 leaves
/// what the search found.
pub(super) fn requantize(x: &[f32], d: f32, min: f32, most: u8, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest((x + min) / d).clamp(0, most.into()) as u8;
        }
    }
}

/// As [`requantize`] for codes around `half`.
pub(super) fn requantize_symmetric(x: &[f32], d: f32, half: i32, codes: &mut [u8]) {
    if d != 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (nearest(x / d).clamp(-half, half - 1) + half) as u8;
        }
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
