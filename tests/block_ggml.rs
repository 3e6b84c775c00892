//! Every implementation of every type against the linked ggml: the same bytes, the same weights.
#![cfg(feature = "ggml")]

use llama_cpp_sys_2 as ggml;
use qconv::block::{Codec, implementations};
use qconv::tensor::DType;

const TYPES: [DType; 21] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::TQ1_0,
    DType::TQ2_0,
    DType::Q1_0,
    DType::Q2_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
    DType::MXFP4,
    DType::NVFP4,
];
/// Weights in a row: blocks of every type, and a part of a vector for the element types.
const ROW: usize = 512;
/// Rows per distribution; the whole suite takes seconds in release mode.
const ROWS: usize = if cfg!(debug_assertions) { 500 } else { 10_000 };
/// Types whose encoder searches: slower by far, so that a tenth of the rows must do.
const SEARCHING: [DType; 7] =
    [DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K, DType::IQ4_NL, DType::IQ4_XS];

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
const DISTRIBUTIONS: [(&str, Weight); 16] = [
    ("gaussian", |r, _| r.gaussian()),
    ("heavy-tailed", |r, _| (0.02 / (r.unit() - 0.5)).clamp(-1e6, 1e6)),
    ("sparse", |r, i| if r.below(8 + 16 * (i / 32 % 4)) == 0 { r.gaussian() } else { 0.0 * r.sign() }),
    ("constant", |r, i| [1.0, -0.37, 65504.0, 1e-7][i / 32 % 4] * if i % 256 < 128 { 1.0 } else { r.sign() }),
    ("zero", |r, i| if i < 256 { 0.0 } else { 0.0 * r.sign() }),
    ("denormal", |r, i| f32::from_bits(r.next() as u32 & (0x80FF_FFFF >> (i / 32 % 16 / 4)))),
    ("tiny scales", |r, i| r.gaussian() * 2f32.powi(-90 - (i / 32 % 16) as i32 * 4)),
    ("f16 scale edge", |r, i| r.gaussian() * 2f32.powi([-24, -20, -14, -10, 15, 18, 20, 22][i / 32 % 8])),
    ("huge", |r, i| r.sign() * r.unit() * if i % 64 < 32 { f32::MAX } else { 1e38 }),
    ("extremes", |r, _| [f32::MAX, -f32::MAX, 1.0, 0.0, f32::MIN_POSITIVE][r.below(5)]),
    ("grid with ties", |r, _| (r.below(513) as f32 - 256.0) / 16.0),
    ("half codes", |r, i| if i % 32 == 0 { 127.0 } else { r.below(254) as f32 - 127.0 + 0.5f32 }),
    ("mixed scales", |r, _| r.gaussian() * 10f32.powi(r.below(20) as i32 - 10)),
    ("one-sided", |r, i| r.unit() * [1.0, -1.0, 1e3, 1e-3][i / 32 % 4] + [0.0, 0.0, 5.0, -1.0][i / 32 % 4]),
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

fn ggml_type(dtype: DType) -> ggml::ggml_type {
    dtype.ggml_id().unwrap() as ggml::ggml_type
}

fn ggml_encode(dtype: DType, src: &[f32]) -> Vec<u8> {
    let mut dst = vec![0xAA; dtype.bytes_for(src.len() as u64).unwrap() as usize];
    // SAFETY: src holds whole rows, dst exactly their bytes.
    let written = unsafe {
        ggml::ggml_quantize_chunk(
            ggml_type(dtype),
            src.as_ptr(),
            dst.as_mut_ptr().cast(),
            0,
            (src.len() / ROW) as i64,
            ROW as i64,
            std::ptr::null(),
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

fn each_implementation(f: impl Fn(&Codec)) {
    for dtype in TYPES {
        let mut count = 0;
        for codec in implementations(dtype) {
            f(codec);
            count += 1;
        }
        assert!(count > 0, "{dtype}");
    }
}

#[test]
fn encoding_gives_ggmls_bytes() {
    for (seed, (name, weight)) in DISTRIBUTIONS.into_iter().enumerate() {
        let mut random = Random(seed as u64);
        for chunk in 0..ROWS / 100 {
            let src: Vec<f32> = (0..100 * ROW).map(|i| weight(&mut random, i % ROW)).collect();
            for dtype in TYPES.into_iter().filter(|t| chunk % 10 == 0 || !SEARCHING.contains(t)) {
                let expected = ggml_encode(dtype, &src);
                for codec in implementations(dtype) {
                    let mut dst = vec![0x55; expected.len()];
                    codec.encode(&src, ROW, None, &mut dst).unwrap();
                    let (size, bytes) = (dtype.block_size() as usize, dtype.type_size() as usize);
                    // ggml's compiler picks which of two NaN a sum keeps, and with it the code.
                    let open = |byte: usize| {
                        [DType::Q2_K, DType::Q4_K, DType::Q5_K].contains(&dtype)
                            && src[byte / bytes * size..][..size].iter().any(|x| x.is_nan())
                    };
                    if let Some(byte) = (0..dst.len()).find(|&i| dst[i] != expected[i] && !open(i)) {
                        let b = byte / bytes;
                        panic!(
                            "{dtype} {} {name}, chunk {chunk}, block {b}: {:x?}, ggml {:x?}, of {:?}",
                            codec.implementation,
                            &dst[b * bytes..][..bytes],
                            &expected[b * bytes..][..bytes],
                            &src[b * size..][..size],
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn any_bytes_decode_to_ggmls_weights() {
    let mut random = Random(77);
    for _ in 0..ROWS / 100 {
        let bytes: Vec<u8> = (0..100 * ROW / 2).flat_map(|_| random.next().to_le_bytes()).collect();
        each_implementation(|codec| {
            let dtype = codec.dtype;
            let mut expected = vec![0.0; 100 * ROW];
            let src = &bytes[..dtype.bytes_for(expected.len() as u64).unwrap() as usize];
            if dtype == DType::F32 {
                // ggml has no to_float for F32.
                expected.copy_from_slice(bytemuck::cast_slice(src));
            } else {
                ggml_decode(dtype, src, &mut expected);
            }
            let mut dst = vec![0.0; expected.len()];
            codec.decode(src, &mut dst).unwrap();
            for (i, (y, e)) in dst.iter().zip(&expected).enumerate() {
                let same = y.to_bits() == e.to_bits() || y.is_nan() && e.is_nan();
                assert!(same, "{dtype} {} weight {i}: {y:e}, ggml {e:e}", codec.implementation);
            }
        });
    }
}

#[test]
fn the_error_keeps_the_promised_bound() {
    let mut tightness = vec![0f64; TYPES.len()];
    for (seed, (name, weight)) in DISTRIBUTIONS[..14].iter().enumerate() {
        let mut random = Random(seed as u64 + 1000);
        let src: Vec<f32> = (0..100 * ROW).map(|i| weight(&mut random, i % ROW)).collect();
        each_implementation(|codec| {
            let mut bytes = vec![0; codec.dtype.bytes_for(src.len() as u64).unwrap() as usize];
            let mut back = vec![0.0; src.len()];
            codec.encode(&src, ROW, None, &mut bytes).unwrap();
            codec.decode(&bytes, &mut back).unwrap();
            let size = codec.dtype.block_size() as usize;
            for (x, y) in src.chunks(size).zip(back.chunks(size)) {
                let Some(bound) = codec.error_bound(x) else { break };
                for (x, y) in x.iter().zip(y) {
                    let error = (f64::from(*x) - f64::from(*y)).abs();
                    // Beyond f16's range a scale is infinite and nothing is promised.
                    let kept = error <= f64::from(bound) || bound == f32::INFINITY;
                    assert!(kept, "{} {name}: {x:e} became {y:e}, bound {bound:e}", codec.dtype);
                }
            }
        });
        // On ordinary weights the bound is not idle either.
        if *name == "gaussian" {
            for (tight, dtype) in tightness.iter_mut().zip(TYPES) {
                let codec = qconv::block::codec(dtype).unwrap();
                let mut bytes = vec![0; dtype.bytes_for(src.len() as u64).unwrap() as usize];
                let mut back = vec![0.0; src.len()];
                codec.encode(&src, ROW, None, &mut bytes).unwrap();
                codec.decode(&bytes, &mut back).unwrap();
                let size = dtype.block_size() as usize;
                for (x, y) in src.chunks(size).zip(back.chunks(size)) {
                    let worst = x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                    let bound = codec.error_bound(x).unwrap_or(worst);
                    *tight = tight.max(f64::from(worst) / f64::from(bound));
                }
            }
        }
    }
    for (tight, dtype) in tightness.into_iter().zip(TYPES) {
        assert!(tight > 0.9 || dtype == DType::F32, "{dtype}: largest error is {tight} of the bound");
    }
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
        let expected = ggml_encode(dtype, src);
        for codec in implementations(dtype) {
            let mut dst = vec![0; expected.len()];
            codec.encode(src, ROW, None, &mut dst).unwrap();
            assert!(dst == expected, "{dtype} {}", codec.implementation);
        }
    }
}
