//! Every implementation of every type against the linked ggml: the same bytes, the same weights.
#![cfg(feature = "ggml")]

use llama_cpp_sys_2 as ggml;
use qconv::block::{Codec, codec, implementations};
use qconv::tensor::DType;

/// Each type has a test of its own for every part of the suite, so that they run side by side and one
/// can be run alone: `cargo test --release --test block_ggml q4_k`.
macro_rules! suite {
    ($($name:ident: $dtype:ident,)*) => {
        $(mod $name {
            use super::*;
            #[test]
            fn encoding_gives_ggmls_bytes() {
                super::encoding_gives_ggmls_bytes(DType::$dtype);
            }
            #[test]
            fn importance_gives_ggmls_bytes() {
                super::importance_gives_ggmls_bytes(DType::$dtype);
            }
            #[test]
            fn any_bytes_decode_to_ggmls_weights() {
                super::any_bytes_decode_to_ggmls_weights(DType::$dtype);
            }
            #[test]
            fn the_error_keeps_the_promised_bound() {
                super::the_error_keeps_the_promised_bound(DType::$dtype);
            }
        })*
    };
}

suite! {
    f32: F32,
    f16: F16,
    bf16: BF16,
    q4_0: Q4_0,
    q4_1: Q4_1,
    q5_0: Q5_0,
    q5_1: Q5_1,
    q8_0: Q8_0,
    tq1_0: TQ1_0,
    tq2_0: TQ2_0,
    q1_0: Q1_0,
    q2_0: Q2_0,
    q2_k: Q2_K,
    q3_k: Q3_K,
    q4_k: Q4_K,
    q5_k: Q5_K,
    q6_k: Q6_K,
    iq1_s: IQ1_S,
    iq1_m: IQ1_M,
    iq2_xxs: IQ2_XXS,
    iq2_xs: IQ2_XS,
    iq2_s: IQ2_S,
    iq3_xxs: IQ3_XXS,
    iq3_s: IQ3_S,
    iq4_nl: IQ4_NL,
    iq4_xs: IQ4_XS,
    mxfp4: MXFP4,
    nvfp4: NVFP4,
}

/// Rows that are compared at once, and weights in a long row: blocks of every type, several of the
/// small ones, so that what is worked out over a row differs from what is worked out over a block.
const CHUNK: usize = 100;
const ROW: usize = 512;

/// Weights in the rows of a chunk: every tenth has long rows, the others rows of half the length.
fn row_of(chunk: usize) -> usize {
    if chunk.is_multiple_of(10) { ROW } else { ROW / 2 }
}
/// Rows of each of the first distributions; the others, and pairs with an importance, get a tenth.
/// `QCONV_QUICK=1` makes it a twentieth.
const ROWS: usize = 10_000;
/// The first distributions, which get all rows.
const MAIN: usize = 10;

fn chunks(distribution: usize) -> usize {
    let quick = cfg!(debug_assertions) || std::env::var_os("QCONV_QUICK").is_some_and(|v| v != "0");
    let rows = ROWS / if quick { 20 } else { 1 } / if distribution < MAIN { 1 } else { 10 };
    (rows / CHUNK).max(1)
}

/// Encoders that search a grid stop the process, or loop, on what is not finite. So do those of IQ2
/// and IQ3 where a sum of squares is not: when it is infinite, no point is nearest;
/// and that of IQ1_M, where a weighted sum over a group is.
fn takes(dtype: DType, distribution: usize) -> bool {
    let family = |names: &[&str]| names.iter().any(|n| dtype.name().starts_with(n));
    match DISTRIBUTIONS[distribution].0 {
        "any bits" | "nan and infinity" => !family(&["IQ1", "IQ2", "IQ3"]),
        "huge" => !family(&["IQ1_M", "IQ2", "IQ3"]),
        "extremes" => dtype == DType::IQ2_XXS || !family(&["IQ1_M", "IQ2", "IQ3"]),
        _ => true,
    }
}

/// SplitMix64: small, seeded, good enough.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Near enough to Gaussian, of unit variance.
    fn gaussian(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn sign(&mut self) -> f32 {
        if self.next() & 1 == 0 { 1.0 } else { -1.0 }
    }
}

type Weight = fn(&mut Random, usize) -> f32;

/// Each gives weight `i` of a row; finite ones first.
const DISTRIBUTIONS: [(&str, Weight); 17] = [
    ("gaussian", |r, _| r.gaussian()),
    ("heavy-tailed", |r, _| (0.02 / (r.unit() - 0.5)).clamp(-1e6, 1e6)),
    ("sparse", |r, i| if r.below(8 + 16 * (i / 32 % 4)) == 0 { r.gaussian() } else { 0.0 * r.sign() }),
    ("constant", |r, i| [1.0, -0.37, 65504.0, 1e-7][i / 32 % 4] * if i % 256 < 128 { 1.0 } else { r.sign() }),
    ("zero", |r, i| if i < 256 { 0.0 } else { 0.0 * r.sign() }),
    ("denormal", |r, i| f32::from_bits(r.next() as u32 & (0x80FF_FFFF >> (i / 32 % 16 / 4)))),
    ("huge", |r, i| r.sign() * r.unit() * if i % 64 < 32 { f32::MAX } else { 1e38 }),
    ("large", |r, _| r.gaussian() * 1e10),
    ("mixed scales", |r, _| r.gaussian() * 10f32.powi(r.below(20) as i32 - 10)),
    ("one-sided", |r, i| r.unit() * [1.0, -1.0, 1e3, 1e-3][i / 32 % 4] + [0.0, 0.0, 5.0, -1.0][i / 32 % 4]),
    ("tiny scales", |r, i| r.gaussian() * 2f32.powi(-90 - (i / 32 % 16) as i32 * 4)),
    ("f16 scale edge", |r, i| r.gaussian() * 2f32.powi([-24, -20, -14, -10, 15, 18, 20, 22][i / 32 % 8])),
    ("extremes", |r, _| [f32::MAX, -f32::MAX, 1.0, 0.0, f32::MIN_POSITIVE][r.below(5)]),
    ("grid with ties", |r, _| (r.below(513) as f32 - 256.0) / 16.0),
    ("half codes", |r, i| if i % 32 == 0 { 127.0 } else { r.below(254) as f32 - 127.0 + 0.5f32 }),
    ("any bits", |r, _| f32::from_bits(r.next() as u32)),
    ("nan and infinity", |r, _| match r.below(40) {
        0 => f32::NAN,
        1 => -f32::NAN,
        2 => f32::from_bits(0x7F80_0001 | r.next() as u32 & 0x807F_FFFF),
        3 => f32::INFINITY,
        4 => -f32::INFINITY,
        _ => r.gaussian() * [1.0, 1e30, 1e-30][r.below(3)],
    }),
];

/// What an importance matrix may hold for a row: sums of squares, so never negative.
const IMPORTANCES: [(&str, Weight); 6] = [
    ("random", |r, _| r.gaussian().powi(2)),
    ("heavy-tailed importance", |r, _| 10f32.powi(r.below(12) as i32 - 8) * r.unit()),
    ("sparse importance", |r, _| if r.below(6) == 0 { r.unit() } else { 0.0 }),
    ("zero importance", |_, _| 0.0),
    ("zero in places", |r, i| if i / 32 % 3 == 0 { 0.0 } else { r.unit() }),
    ("equal importance", |_, _| 1.0),
];

fn ggml_type(dtype: DType) -> ggml::ggml_type {
    dtype.ggml_id().unwrap() as ggml::ggml_type
}

fn ggml_encode(dtype: DType, src: &[f32], row: usize, importance: Option<&[f32]>) -> Vec<u8> {
    let mut dst = vec![0xAA; dtype.bytes_for(src.len() as u64).unwrap() as usize];
    // SAFETY: src holds whole rows, dst exactly their bytes, importance one weight per column.
    let written = unsafe {
        ggml::ggml_quantize_chunk(
            ggml_type(dtype),
            src.as_ptr(),
            dst.as_mut_ptr().cast(),
            0,
            (src.len() / row) as i64,
            row as i64,
            importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
        )
    };
    assert_eq!(written, dst.len());
    dst
}

fn ggml_decode(dtype: DType, src: &[u8], dst: &mut [f32]) {
    // SAFETY: the traits live forever, and src holds exactly the bytes of dst's weights.
    unsafe {
        let to_float = (*ggml::ggml_get_type_traits(ggml_type(dtype))).to_float.unwrap();
        to_float(src.as_ptr().cast(), dst.as_mut_ptr(), dst.len() as i64);
    }
}

/// Chunk `chunk` of a distribution, and every implementation of `dtype` on it.
fn compare(dtype: DType, src: &[f32], row: usize, importance: Option<&[f32]>, what: &str) {
    let expected = ggml_encode(dtype, src, row, importance);
    let (size, bytes) = (dtype.block_size() as usize, dtype.type_size() as usize);
    for codec in implementations(dtype) {
        let mut dst = vec![0x55; expected.len()];
        codec.encode(src, row, importance, &mut dst).unwrap();
        // ggml's compiler picks which of two NaN a sum keeps, and with it the code.
        let open = |byte: usize| {
            [DType::Q2_K, DType::Q4_K, DType::Q5_K].contains(&dtype)
                && src[byte / bytes * size..][..size].iter().any(|x| x.is_nan())
        };
        let row_bytes = row / size * bytes;
        // As there, for the sign of the NaN that becomes the scale when a row holds NaN of both.
        let open_sign = |byte: usize| {
            let row = &src[byte / row_bytes * row..][..row];
            let nan = |negative| row.iter().any(|x| x.is_nan() && x.is_sign_negative() == negative);
            importance.is_some()
                && [DType::Q4_0, DType::Q5_0].contains(&dtype)
                && byte % bytes == 1
                && [dst[byte] & 0x7F, expected[byte] & 0x7F] == [0x7E; 2]
                && nan(false)
                && nan(true)
        };
        let differs = |&i: &usize| dst[i] != expected[i] && !open(i) && !open_sign(i);
        if let Some(byte) = (0..dst.len()).find(differs) {
            let b = byte / bytes;
            panic!(
                "{dtype} {} {what}, block {b}: {:x?}, ggml {:x?}, of {:?}, importance {:?}",
                codec.implementation,
                &dst[b * bytes..][..bytes],
                &expected[b * bytes..][..bytes],
                &src[b * size..][..size.min(32)],
                importance.map(|m| &m[b * size % row..][..size.min(32)]),
            );
        }
    }
}

fn rows(random: &mut Random, weight: Weight, n: usize) -> Vec<f32> {
    (0..n * ROW).map(|i| weight(random, i % ROW)).collect()
}

fn encoding_gives_ggmls_bytes(dtype: DType) {
    assert!(implementations(dtype).next().is_some(), "{dtype}");
    if codec(dtype).unwrap().needs_importance() {
        // SAFETY: a constant answer.
        assert!(unsafe { ggml::ggml_quantize_requires_imatrix(ggml_type(dtype)) });
        let mut dst = vec![0; dtype.bytes_for(ROW as u64).unwrap() as usize];
        assert!(codec(dtype).unwrap().encode(&[1.0; ROW], ROW, None, &mut dst).is_err());
        return;
    }
    for (seed, (name, weight)) in DISTRIBUTIONS.into_iter().enumerate().filter(|(d, _)| takes(dtype, *d)) {
        let mut random = Random(seed as u64);
        for chunk in 0..chunks(seed) {
            let row = row_of(chunk);
            let src = &rows(&mut random, weight, CHUNK)[..CHUNK * row];
            compare(dtype, src, row, None, &format!("{name}, chunk {chunk}"));
        }
    }
}

/// Types that do not heed an importance must not change with it either.
fn importance_gives_ggmls_bytes(dtype: DType) {
    for (seed, (name, weight)) in DISTRIBUTIONS.into_iter().enumerate().filter(|(d, _)| takes(dtype, *d)) {
        for (kind, (importance_name, importance)) in IMPORTANCES.into_iter().enumerate() {
            let mut random = Random((seed * 100 + kind) as u64);
            // All rows with random importance, a tenth with the others.
            let n = chunks(seed).div_ceil(if kind == 0 { 1 } else { 10 });
            for chunk in 0..n {
                let row = row_of(chunk);
                let importance = &rows(&mut random, importance, 1)[..row];
                let src = &rows(&mut random, weight, CHUNK)[..CHUNK * row];
                let what = format!("{name}, {importance_name}, chunk {chunk}");
                compare(dtype, src, row, Some(importance), &what);
            }
        }
    }
}

fn any_bytes_decode_to_ggmls_weights(dtype: DType) {
    let mut random = Random(77);
    for _ in 0..chunks(0) {
        let mut expected = vec![0.0; CHUNK * ROW];
        let bytes: Vec<u8> = (0..CHUNK * ROW / 2).flat_map(|_| random.next().to_le_bytes()).collect();
        let src = &bytes[..dtype.bytes_for(expected.len() as u64).unwrap() as usize];
        if dtype == DType::F32 {
            // ggml has no to_float for F32.
            expected.copy_from_slice(bytemuck::cast_slice(src));
        } else {
            ggml_decode(dtype, src, &mut expected);
        }
        for codec in implementations(dtype) {
            let mut dst = vec![0.0; expected.len()];
            codec.decode(src, &mut dst).unwrap();
            for (i, (y, e)) in dst.iter().zip(&expected).enumerate() {
                let same = y.to_bits() == e.to_bits() || y.is_nan() && e.is_nan();
                assert!(same, "{dtype} {} weight {i}: {y:e}, ggml {e:e}", codec.implementation);
            }
        }
    }
}

/// Weights of `src` after a way through the type.
fn there_and_back(codec: &Codec, src: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0; codec.dtype.bytes_for(src.len() as u64).unwrap() as usize];
    let mut back = vec![0.0; src.len()];
    codec.encode(src, ROW, None, &mut bytes).unwrap();
    codec.decode(&bytes, &mut back).unwrap();
    back
}

fn the_error_keeps_the_promised_bound(dtype: DType) {
    let size = dtype.block_size() as usize;
    for (seed, (name, weight)) in DISTRIBUTIONS.iter().enumerate().take(15) {
        let src = rows(&mut Random(seed as u64 + 1000), *weight, CHUNK);
        for codec in implementations(dtype) {
            if codec.error_bound(&src).is_none() {
                return;
            }
            let back = there_and_back(codec, &src);
            // The largest part of the bound that an error takes: 1 at most, and on ordinary
            // weights not much less, or the bound would be idle.
            let mut tight = 0f64;
            for (x, y) in src.chunks(size).zip(back.chunks(size)) {
                let bound = codec.error_bound(x).unwrap();
                for (x, y) in x.iter().zip(y) {
                    let error = (f64::from(*x) - f64::from(*y)).abs();
                    // Beyond f16's range a scale is infinite and nothing is promised.
                    let kept = error <= f64::from(bound) || bound == f32::INFINITY;
                    assert!(kept, "{dtype} {name}: {x:e} became {y:e}, bound {bound:e}");
                    tight = tight.max(error / f64::from(bound));
                }
            }
            assert!(
                *name != "gaussian" || tight > 0.9 || dtype == DType::F32,
                "{dtype}: largest error is {tight} of the bound"
            );
        }
    }
}

/// Encoders that treat several blocks at a time: whatever their number in a row, each block is that
/// of a row of its own.
#[test]
fn blocks_of_a_row_do_not_depend_on_their_number() {
    let mut random = Random(5);
    for dtype in [DType::IQ1_S, DType::IQ1_M, DType::IQ4_NL, DType::IQ4_XS] {
        let (size, bytes) = (dtype.block_size() as usize, dtype.type_size() as usize);
        for codec in implementations(dtype) {
            for blocks in 1..=17 {
                let src: Vec<f32> = (0..blocks * size).map(|_| random.gaussian()).collect();
                let importance: Vec<f32> = (0..blocks * size).map(|_| random.unit()).collect();
                let mut together = vec![0; blocks * bytes];
                codec.encode(&src, blocks * size, Some(&importance), &mut together).unwrap();
                let columns = importance.chunks_exact(size);
                for ((x, columns), block) in src.chunks_exact(size).zip(columns).zip(together.chunks(bytes)) {
                    let mut alone = vec![0; bytes];
                    codec.encode(x, size, Some(columns), &mut alone).unwrap();
                    assert!(block == alone, "{dtype} {}, {blocks} blocks", codec.implementation);
                }
            }
        }
    }
}

/// Where ggml stops the process there is nothing to compare with; there are bytes nevertheless.
#[test]
fn iq1_takes_any_weights_and_importance() {
    let mut random = Random(6);
    for dtype in [DType::IQ1_S, DType::IQ1_M] {
        for codec in implementations(dtype) {
            let mut dst = vec![0; dtype.bytes_for(ROW as u64).unwrap() as usize];
            for (_, weight) in DISTRIBUTIONS {
                for (_, importance) in DISTRIBUTIONS {
                    let importance = rows(&mut random, importance, 1);
                    let src = rows(&mut random, weight, 1);
                    codec.encode(&src, ROW, Some(&importance), &mut dst).unwrap();
                }
                if !codec.needs_importance() {
                    codec.encode(&rows(&mut random, weight, 1), ROW, None, &mut dst).unwrap();
                }
            }
        }
    }
}

/// The grid of IQ1 is a fact of the format: each of its points, unscaled and shifted either way.
#[test]
fn the_points_of_iq1_are_ggmls() {
    let mut bytes = Vec::new();
    for down in [0, 0x8000] {
        for group in 0..2048 / 32 {
            let points: Vec<u16> = (32 * group..32 * (group + 1)).collect();
            bytes.extend([0x00, 0x3C]);
            bytes.extend(points.iter().map(|point| *point as u8));
            for four in points.as_chunks::<4>().0 {
                let high = four.iter().rev().fold(0, |high, point| high << 3 | point >> 8);
                bytes.extend((high | down).to_le_bytes());
            }
        }
    }
    let mut expected = vec![0.0; 2 * 2048 * 8];
    ggml_decode(DType::IQ1_S, &bytes, &mut expected);
    for codec in implementations(DType::IQ1_S) {
        let mut dst = vec![0.0; expected.len()];
        codec.decode(&bytes, &mut dst).unwrap();
        assert!(dst == expected, "{}", codec.implementation);
    }
    let mut points: Vec<[u32; 8]> =
        expected[..2048 * 8].as_chunks().0.iter().map(|p: &[f32; 8]| p.map(f32::to_bits)).collect();
    points.sort_unstable();
    points.dedup();
    assert_eq!(points.len(), 2048);
}

#[test]
fn halves_convert_as_in_ggml() {
    for bits in 0..=u16::MAX {
        for dtype in [DType::F16, DType::BF16] {
            let mut expected = [0.0];
            ggml_decode(dtype, &bits.to_le_bytes(), &mut expected);
            for codec in implementations(dtype) {
                // 33 times: once in the vector part, once in the rest.
                let mut dst = [0.0; 33];
                codec.decode(&bits.to_le_bytes().repeat(33), &mut dst).unwrap();
                for y in [dst[0], dst[32]] {
                    assert_eq!(
                        y.to_bits(),
                        expected[0].to_bits(),
                        "{dtype} {bits:#06x} {}",
                        codec.implementation
                    );
                }
            }
        }
    }
    // Every 509th f32, and the neighbourhood of every rounding tie of f16.
    let ties = (0..0x7C00u32).flat_map(|h| {
        let tie = qconv::block::f32_from_f16(h as u16).to_bits() / 2
            + qconv::block::f32_from_f16(h as u16 + 1).to_bits() / 2;
        (tie - 2..=tie + 2).flat_map(|bits| [bits, bits | 1 << 31])
    });
    let src: Vec<f32> = (0..u32::MAX).step_by(509).chain(ties).map(f32::from_bits).collect();
    let src = &src[..src.len() / ROW * ROW];
    for dtype in [DType::F16, DType::BF16] {
        let expected = ggml_encode(dtype, src, ROW, None);
        for codec in implementations(dtype) {
            let mut dst = vec![0; expected.len()];
            codec.encode(src, ROW, None, &mut dst).unwrap();
            assert!(dst == expected, "{dtype} {}", codec.implementation);
        }
    }
}

/// Compares what is left of a row too.
fn compare_all(dtype: DType, mut src: Vec<f32>, what: &str) {
    src.resize(src.len().next_multiple_of(ROW), 0.0);
    compare(dtype, &src, ROW, None, what);
}

/// The logarithm of what lies just below a power of two rounds up to it or not, in each octave.
#[test]
fn mxfp4_scales_change_where_ggmls_do() {
    let mut src = Vec::new();
    for power in (0..255u32).map(|field| field << 23) {
        for largest in (power.saturating_sub(64)..power + 64).filter(|bits| *bits < 255 << 23) {
            src.push(f32::from_bits(largest));
            src.resize(src.len() + 31, 0.0);
        }
    }
    assert_eq!(src.len() / 32, 255 * 128 - 64);
    compare_all(DType::MXFP4, src, "largest weights around powers of two");
}

/// Weights half way between two values, and their neighbours, at every scale.
#[test]
fn four_bit_floats_change_where_ggmls_do() {
    for (dtype, group, mantissas) in [(DType::MXFP4, 32, 1), (DType::NVFP4, 16, 8)] {
        let mut src = Vec::new();
        for (k, mantissa) in (-149..=125).flat_map(|k| (0..mantissas).map(move |m| (k, m))) {
            let half_scale = (1.0 + f64::from(mantissa) / 8.0) * 2f64.powi(k);
            let ties = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0].map(|t| (t * half_scale) as f32);
            let weights = ties.iter().flat_map(|t| [t.next_down(), *t, t.next_up()]);
            let weights: Vec<f32> = weights.filter(|w| w.is_finite()).collect();
            for weights in weights.chunks(group / 2 - 1) {
                src.push((12.0 * half_scale).min(f32::MAX.into()) as f32);
                src.extend(weights.iter().flat_map(|w| [*w, -w]));
                src.resize(src.len().next_multiple_of(group), f32::NAN);
            }
        }
        compare_all(dtype, src, "weights half way");
    }
}
