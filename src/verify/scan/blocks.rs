//! What bytes of each type are judged by: on the integers that they are, without decoding them.
//!
//! ggml judges scales when it loads with `--check-tensors` (`ggml_validate_row_data`): none may be NaN or infinite. This
//! looks at more: signs that no encoder writes, scales out of all proportion, codes beyond the grid of the type.

use super::rules::{
    CODE_GRID, Rule, SCALE_HUGE as HUGE_RULE, SCALE_NEGATIVE as NEGATIVE_RULE,
    SCALE_NOT_FINITE as SCALE_RULE, TENSOR_INF, TENSOR_NAN,
};
use crate::tensor::DType;

/// What a block or value can be, as bits.
pub(super) type Flags = u8;
pub(super) const NAN: Flags = 1;
pub(super) const INF: Flags = 2;
pub(super) const SCALE_NOT_FINITE: Flags = 4;
pub(super) const SCALE_NEGATIVE: Flags = 8;
pub(super) const SCALE_HUGE: Flags = 16;
pub(super) const GRID: Flags = 32;
/// Not zero: of a block, that a scale or minimum is not.
pub(super) const NONZERO: Flags = 64;
/// Subnormal, or above 1e10.
pub(super) const ODD: Flags = 128;
/// Number of flags.
pub(super) const KINDS: usize = 8;

/// Of each flag that is a finding by itself: its number, the rule, and what is said of blocks or values.
pub(super) static FAULTS: &[(usize, &Rule, &str)] = &[
    (0, &TENSOR_NAN, "are NaN"),
    (1, &TENSOR_INF, "are infinite"),
    (2, &SCALE_RULE, "have a scale that is NaN or infinite"),
    (3, &NEGATIVE_RULE, "have a negative scale"),
    (4, &HUGE_RULE, "have a scale of 1024 or more"),
    (5, &CODE_GRID, "hold a code that no encoder writes"),
];
/// Number of the flag `ODD`.
pub(super) const ODD_AT: usize = 7;

/// What was found in some bytes of a tensor.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    /// How many blocks or values have each flag, but for `NONZERO`.
    pub count: [u64; KINDS],
    /// Where the first of them lies in the tensor.
    pub first: [Option<u64>; KINDS],
    pub nonzero: bool,
}

impl Tally {
    /// Adds what was found in another part of the same tensor.
    pub fn add(&mut self, other: &Self) {
        for k in 0..KINDS {
            self.count[k] += other.count[k];
            self.first[k] = match (self.first[k], other.first[k]) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        self.nonzero |= other.nonzero;
    }
}

/// A flag, where it holds.
#[inline(always)]
fn flag(flag: Flags, holds: bool) -> Flags {
    flag * Flags::from(holds)
}

/// A half-precision scale.
#[inline(always)]
fn half(bytes: [u8; 2], signed: bool) -> Flags {
    let bits = u16::from_le_bytes(bytes);
    let magnitude = bits & 0x7fff;
    let not_finite = magnitude >= 0x7c00;
    // 1024 and more.
    let huge = magnitude >= 0x6400 && !not_finite;
    let negative = !signed && bits > 0x8000;
    flag(SCALE_NOT_FINITE, not_finite)
        | flag(SCALE_HUGE, huge)
        | flag(SCALE_NEGATIVE, negative)
        | flag(NONZERO, magnitude != 0)
}

/// A single-precision number; as bfloat16 its upper half.
#[inline(always)]
fn single(bits: u32) -> Flags {
    let magnitude = bits & 0x7fff_ffff;
    let (nan, inf) = (magnitude > 0x7f80_0000, magnitude == 0x7f80_0000);
    // 1e10 is 0x501502f9.
    let odd =
        (magnitude > 0x5015_02f9 && magnitude < 0x7f80_0000) || (magnitude < 0x0080_0000 && magnitude != 0);
    flag(NAN, nan) | flag(INF, inf) | flag(ODD, odd) | flag(NONZERO, magnitude != 0)
}

/// The bytes that ternary digits are packed into, five a byte (`ceil(digits * 256 / 243)`).
static TRITS: [bool; 256] = {
    let mut known = [false; 256];
    let mut n = 0;
    while n < 243 {
        known[(n * 256usize).div_ceil(243)] = true;
        n += 1;
    }
    known
};

/// Goes through `bytes`, which lie at `at` in their tensor, by pieces of `SIZE`.
#[inline(always)]
fn each<const SIZE: usize>(bytes: &[u8], at: u64, tally: &mut Tally, judge: impl Fn(&[u8; SIZE]) -> Flags) {
    let pieces = bytes.as_chunks::<SIZE>().0;
    // Some at a time, so that what is found needs no second look at all of it.
    for (group, some) in pieces.chunks(4096).enumerate() {
        let seen = some.iter().fold(0, |seen, piece| seen | judge(piece));
        tally.nonzero |= seen & NONZERO != 0;
        if seen & !NONZERO != 0 {
            let at = at + (group * 4096 * SIZE) as u64;
            locate(some, at, tally, &judge);
        }
    }
}

#[cold]
#[inline(never)]
fn locate<const SIZE: usize>(
    some: &[[u8; SIZE]],
    at: u64,
    tally: &mut Tally,
    judge: &impl Fn(&[u8; SIZE]) -> Flags,
) {
    for (i, piece) in some.iter().enumerate() {
        let flags = judge(piece) & !NONZERO;
        if flags == 0 {
            continue;
        }
        for k in (0..KINDS).filter(|k| flags >> k & 1 == 1) {
            tally.count[k] += 1;
            tally.first[k].get_or_insert(at + (i * SIZE) as u64);
        }
    }
}

/// Judges bytes of a type: whole blocks, the first of which lies at `at` in the tensor.
pub(super) fn judge(dtype: DType, bytes: &[u8], at: u64, tally: &mut Tally) {
    // `scales!(SIZE; offsets with "signed"; offsets without)`: places of half-precision numbers in a block.
    macro_rules! scales {
        ($size:literal; [$($signed:literal),*] [$($unsigned:literal),*]) => {
            scales!($size; [$($signed),*] [$($unsigned),*] |_b| 0)
        };
        ($size:literal; [$($signed:literal),*] [$($unsigned:literal),*] |$b:ident| $more:expr) => {
            each::<$size>(bytes, at, tally, |$b| {
                0 $(| half([$b[$signed], $b[$signed + 1]], true))* $(| half([$b[$unsigned], $b[$unsigned + 1]], false))* | $more
            })
        };
    }
    match dtype {
        DType::F32 => each::<4>(bytes, at, tally, |b| single(u32::from_le_bytes(*b))),
        DType::BF16 => each::<2>(bytes, at, tally, |b| single(u32::from(u16::from_le_bytes(*b)) << 16)),
        DType::F16 => each::<2>(bytes, at, tally, |b| {
            let magnitude = u16::from_le_bytes(*b) & 0x7fff;
            flag(NAN, magnitude > 0x7c00) | flag(INF, magnitude == 0x7c00) | flag(NONZERO, magnitude != 0)
        }),
        DType::F64 => each::<8>(bytes, at, tally, |b| {
            let magnitude = u64::from_le_bytes(*b) & (u64::MAX >> 1);
            flag(NAN, magnitude > 0x7ff0 << 48)
                | flag(INF, magnitude == 0x7ff0 << 48)
                | flag(NONZERO, magnitude != 0)
        }),
        DType::F8_E4M3 => {
            each::<1>(bytes, at, tally, |b| flag(NAN, b[0] & 0x7f == 0x7f) | flag(NONZERO, b[0] & 0x7f != 0))
        }
        DType::F8_E5M2 => each::<1>(bytes, at, tally, |b| {
            let magnitude = b[0] & 0x7f;
            flag(NAN, magnitude > 0x7c) | flag(INF, magnitude == 0x7c) | flag(NONZERO, magnitude != 0)
        }),
        // A power of two: no byte is zero.
        DType::F8_E8M0 => each::<1>(bytes, at, tally, |b| flag(NAN, b[0] == 0xff) | NONZERO),
        DType::Bool => each::<1>(bytes, at, tally, |b| flag(GRID, b[0] > 1) | NONZERO),
        DType::I8
        | DType::I16
        | DType::I32
        | DType::I64
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64 => {
            tally.nonzero = true; // zero points are zeros as a rule
        }
        DType::Q4_0 => scales!(18; [0] []),
        DType::Q4_1 => scales!(20; [2] [0]),
        DType::Q5_0 => scales!(22; [0] []),
        DType::Q5_1 => scales!(24; [2] [0]),
        DType::Q8_0 => scales!(34; [] [0]),
        DType::Q8_1 => scales!(36; [2] [0]),
        DType::Q2_K => scales!(84; [] [80, 82]),
        DType::Q3_K => scales!(110; [108] []),
        DType::Q4_K => scales!(144; [] [0, 2]),
        DType::Q5_K => scales!(176; [] [0, 2]),
        DType::Q6_K => scales!(210; [208] []),
        DType::Q8_K => each::<292>(bytes, at, tally, |b| {
            let flags = single(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            flag(SCALE_NOT_FINITE, flags & (NAN | INF) != 0) | (flags & NONZERO)
        }),
        DType::IQ2_XXS => scales!(66; [] [0]),
        DType::IQ2_XS => scales!(74; [] [0]),
        DType::IQ2_S => scales!(82; [] [0]),
        DType::IQ3_XXS => scales!(98; [] [0]),
        DType::IQ3_S => scales!(110; [] [0]),
        DType::IQ1_S => scales!(50; [] [0]),
        // Four bits each on top of four words.
        DType::IQ1_M => each::<56>(bytes, at, tally, |b| {
            let low = b[49] >> 4 | (b[51] & 0xf0);
            let high = b[53] >> 4 | (b[55] & 0xf0);
            half([low, high], false)
        }),
        DType::IQ4_NL => scales!(18; [0] []),
        DType::IQ4_XS => scales!(136; [0] []),
        DType::TQ1_0 => scales!(54; [] [52] |b| flag(GRID, b[..52].iter().any(|b| !TRITS[usize::from(*b)]))),
        DType::TQ2_0 => scales!(66; [] [64] |b| flag(GRID, has_three(&b[..64]))),
        DType::Q1_0 => scales!(18; [] [0]),
        DType::Q2_0 => scales!(18; [] [0] |b| flag(GRID, has_three(&b[2..]))),
        // A power of two, which is no weight; all codes 0 is.
        DType::MXFP4 => each::<17>(bytes, at, tally, |b| {
            flag(SCALE_NOT_FINITE, b[0] == 0xff)
                | flag(SCALE_HUGE, (0x90..0xff).contains(&b[0]))
                | flag(NONZERO, b[1..].iter().any(|q| q & 0x77 != 0))
        }),
        DType::NVFP4 => each::<36>(bytes, at, tally, |b| {
            let scales = [b[0], b[1], b[2], b[3]];
            flag(SCALE_NOT_FINITE, scales.iter().any(|s| s & 0x7f == 0x7f))
                | flag(SCALE_NEGATIVE, scales.iter().any(|s| *s >= 0x80))
                | flag(NONZERO, scales != [0; 4])
        }),
    }
}

/// Whether one of the codes of two bits is 3.
#[inline(always)]
fn has_three(codes: &[u8]) -> bool {
    codes.iter().fold(0, |seen, b| seen | (b & (b >> 1))) & 0x55 != 0
}
