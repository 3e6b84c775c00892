//! Block types without ggml: known answers, hostile input, misuse.

use qconv::block::{codec, implementations};
use qconv::tensor::DType;
use qconv::{Error, ErrorKind};

/// Type, weights, the bytes of the row, the weights read back. What `...` leaves out repeats the
/// weight before it up to the end of a block. An importance may follow the type. Bytes as the linked
/// ggml writes them.
const KNOWN: &str = "
F32   | 1 -2.5 | 0000803f 000020c0 | 1 -2.5
F64   | 1 -2.5 | 000000000000f03f 00000000000004c0 | 1 -2.5
F16   | 1 -2 65504 65520 6e-8 1e-9 0.33325195 inf | 003c 00c0 ff7b 007c 0100 0000 5535 007c | 1 -2 65504 inf 5.9604645e-8 0 0.33325195 inf
BF16  | 1 -2 3.1415927 1.00390625 1.01171875 1e-40 | 803f 00c0 4940 803f 823f 0100 | 1 -2 3.140625 1 1.015625 9.2e-41
Q8_0  | 127 -127 0.5 -0.5 1.5 2.4 0 ... | 003c 7f 81 01 ff 02 02 00*26 | 127 -127 1 -1 2 2 0 ...
Q8_0  | 0 ... | 0000 00*32 | 0 ...
Q4_0  | -8 7 8 3 0.49 -0.5 0 ... | 003c 80 8f 8f 8b 88 88 88*10 | -8 7 7 3 0 0 0 ...
Q4_0  | 8 -8 0 ... | 00bc 80 8f 88*14 | 8 -7 0 ...
Q4_0  | 0 ... | 0080 88*16 | 0 ...
Q4_1  | -1 14 0 6.5 6.4 2 ... | 003c 00bc 30 3f 31 38 37 33*11 | -1 14 0 7 6 2 ...
Q4_1  | 5 ... | 0000 0045 00*16 | 5 ...
Q4_1  | -0 0 ... | 0000 0080 00*16 | 0 ...
Q5_0  | -16 15 16 3 0 ... | 003c feffffff 00 0f 0f 03 00*12 | -16 15 15 3 0 ...
Q5_1  | -1 30 0 15.5 2 ... | 003c 00bc 0a000000 30 3f 31 31 33*12 | -1 30 0 16 2 ...
TQ2_0 | 2 -2 1 -0.99 0 ... | 56 54 56 55*61 0040 | 2 -2 2 0 0 ...
TQ1_0 | 2 -2 1 -0.99 0 ... | d5 2b d5 80*45 7f*4 0040 | 2 -2 2 0 0 ...
Q2_0  | 2 -2 1 -0.99 0 ... | 0040 62 55*15 | 2 -2 2 0 0 ...
Q1_0  | 1 -1 ... | 003c 01 00*15 | 1 -1 ...
MXFP4 | 4 -6 0.5 0 ... | 7f 06 0f 01 00*13 | 4 -6 0.5 0 ...
MXFP4 | 7.9999995 0 ... | 80 06 00*15 | 8 0 ...
MXFP4 | 7.999999 0 ... | 7f 07 00*15 | 6 0 ...
NVFP4 | 6 -4 0.5 0 0 0 0 0 0 0 0 0 0 0 0 0 12 0 ... | 38 40 00 00 07 0e 01 00*5 07 00*7 00*16 | 6 -4 0.5 0 0 0 0 0 0 0 0 0 0 0 0 0 12 0 ...
Q4_0 1 ... | -8 7 6 3 0 ... | 003c 80 8f 8e 8b 88*12 | -8 7 6 3 0 ...
Q4_0 0 ... | -8 7 6 3 0 ... | 0000 80 8f 8e 8b 88*12 | 0 ...
Q4_0 1 ... | 0 ... | 0000 00*16 | 0 ...
Q4_1 1 ... | -1 14 0 6 2 ... | 003c 00bc 30 3f 31 37 33*12 | -1 14 0 6 2 ...
Q4_1 1 ... | 5 ... | 5535 0000 ff*16 | 4.998779296875 ...
Q4_1 1 ... | -5 ... | 0000 00c5 00*16 | -5 ...
Q5_0 1 ... | -16 15 3 0 ... | 003c feffffff 00 0f 03 00*13 | -16 15 3 0 ...
Q5_1 1 ... | -1 30 0 15 2 ... | 003c 00bc 0a000000 30 3f 31 30 33*12 | -1 30 0 15 2 ...
";

fn weights(text: &str, block: usize) -> Vec<f32> {
    let mut weights: Vec<f32> = Vec::new();
    for word in text.split_whitespace() {
        if word == "..." {
            weights.resize(weights.len().next_multiple_of(block), *weights.last().unwrap());
        } else {
            weights.push(word.parse().unwrap());
        }
    }
    weights
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unfold(text: &str) -> String {
    let word = |w: &str| match w.split_once('*') {
        Some((byte, count)) => byte.repeat(count.parse().unwrap()),
        None => w.to_string(),
    };
    text.split_whitespace().map(word).collect()
}

#[test]
fn known_answers() {
    let mut lines = 0;
    for line in KNOWN.lines().filter(|l| !l.is_empty()) {
        let [name, src, bytes, back] = line.split('|').map(str::trim).collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let (name, importance) = name.split_once(' ').unwrap_or((name, ""));
        let dtype = DType::from_name(name).unwrap();
        let block = dtype.block_size() as usize;
        let (src, back) = (weights(src, block), weights(back, block));
        let importance = (!importance.is_empty()).then(|| weights(importance, block));
        for codec in implementations(dtype) {
            let mut dst = vec![0; dtype.bytes_for(src.len() as u64).unwrap() as usize];
            codec.encode(&src, src.len(), importance.as_deref(), &mut dst).unwrap();
            assert_eq!(hex(&dst), unfold(bytes), "{} {line}", codec.implementation);
            let mut read = vec![0.0; src.len()];
            codec.decode(&dst, &mut read).unwrap();
            for (r, b) in read.iter().zip(&back) {
                assert!(r == b || (r - b).abs() < 1e-42, "{} {line}: {read:?}", codec.implementation);
            }
        }
        lines += 1;
    }
    assert_eq!(lines, 30);
}

#[test]
fn implementations_agree_on_any_input() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 32) as u32
    };
    for &dtype in DType::ALL {
        let Some(scalar) = implementations(dtype).next() else { continue };
        assert_eq!(scalar.implementation, "scalar");
        // Sizes around the width of a vector; blocks are multiples of it.
        for n in [1, 2, 31, 32, 33, 97].map(|n| n * dtype.block_size() as usize) {
            let mut any: Vec<f32> = (0..n).map(|_| f32::from_bits(random())).collect();
            if [DType::Q2_K, DType::Q4_K, DType::Q5_K].contains(&dtype) {
                // Which of two NaN a sum keeps is the compiler's choice, here as in ggml.
                any.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 1.0);
            }
            let tame: Vec<f32> = (0..n).map(|_| random() as i32 as f32 * 1e-10).collect();
            let hostile: Vec<u8> = (0..dtype.bytes_for(n as u64).unwrap()).map(|_| random() as u8).collect();
            let mut read = vec![0.0; n];
            scalar.decode(&hostile, &mut read).unwrap();
            for codec in implementations(dtype) {
                let importance = vec![1.0; n];
                let importance = codec.needs_importance().then_some(&importance[..]);
                // Where sums overflow no point of a grid is nearest, and ggml stops.
                let grid = ["IQ1", "IQ2", "IQ3"].iter().any(|family| dtype.name().starts_with(family));
                let inputs = [&any, &tame].into_iter().filter(|_| codec.can_encode());
                for src in inputs.skip(usize::from(grid)) {
                    let (mut a, mut b) = (hostile.clone(), hostile.clone());
                    scalar.encode(src, n, importance, &mut a).unwrap();
                    codec.encode(src, n, importance, &mut b).unwrap();
                    assert_eq!(a, b, "{dtype} {}", codec.implementation);
                }
                let mut other = vec![0.0; n];
                codec.decode(&hostile, &mut other).unwrap();
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                assert!(read.iter().zip(&other).all(same), "{dtype} {}", codec.implementation);
            }
        }
    }
}

#[test]
fn wrong_lengths_are_misuse() {
    let kind = |r: Result<(), Error>| r.map_err(|e| e.kind());
    for &dtype in DType::ALL {
        for codec in implementations(dtype) {
            let block = dtype.block_size() as usize;
            let bytes = dtype.type_size() as usize;
            let (src, mut dst) = (vec![1.0; 4 * block], vec![0; 4 * bytes]);
            let importance = vec![1.0; 2 * block];
            let importance = codec.needs_importance().then_some(&importance[..]);
            let written = kind(codec.encode(&src, 2 * block, importance, &mut dst));
            assert_eq!(written.is_ok(), codec.can_encode());
            assert!(matches!(written, Ok(()) | Err(ErrorKind::Unsupported)), "{dtype}");
            let mut misuse = |src: &[f32], row, importance: Option<&[f32]>, n: usize| {
                assert_eq!(kind(codec.encode(src, row, importance, &mut dst[..n])), Err(ErrorKind::Misuse));
            };
            misuse(&src, 0, None, 4 * bytes);
            misuse(&src, 3 * block, None, 4 * bytes);
            misuse(&src, 4 * block, None, 4 * bytes - 1);
            misuse(&src, 4 * block, Some(&[1.0]), if block == 1 { 0 } else { 4 * bytes });
            if block > 1 {
                misuse(&src[1..], 4 * block - 1, None, 4 * bytes);
                misuse(&src[..block / 2], block / 2, None, 0);
                let mut half = vec![0.0; block / 2];
                assert_eq!(kind(codec.decode(&[], &mut half)), Err(ErrorKind::Misuse));
            }
            let mut back = vec![0.0; 4 * block];
            assert_eq!(kind(codec.decode(&dst[1..], &mut back)), Err(ErrorKind::Misuse));
        }
    }
}

#[test]
fn bounds_say_what_a_type_promises() {
    let q8_0 = codec(DType::Q8_0).unwrap();
    let mut x = [0.0f32; 32];
    assert_eq!(q8_0.error_bound(&x), Some(0.0));
    x[3] = 127.0;
    let bound = q8_0.error_bound(&x).unwrap();
    assert!((0.5..0.51).contains(&bound), "{bound}");
    x[4] = f32::NAN;
    assert_eq!(q8_0.error_bound(&x), Some(f32::INFINITY));
    // A scale beyond f16 promises nothing.
    assert_eq!(q8_0.error_bound(&[1e30; 32]), Some(f32::INFINITY));
    // The block's extreme is met exactly, its mirror image is a step off.
    let q4_0 = codec(DType::Q4_0).unwrap();
    let one_sided = q4_0.error_bound(&[8.0; 32]).unwrap();
    x = [8.0; 32];
    x[9] = -8.0;
    let two_sided = q4_0.error_bound(&x).unwrap();
    assert!((0.5..0.51).contains(&one_sided) && (1.0..1.01).contains(&two_sided), "{one_sided} {two_sided}");
    assert_eq!(codec(DType::F32).unwrap().error_bound(&[1.0, 2.0]), Some(0.0));
    assert_eq!(codec(DType::BF16).unwrap().error_bound(&[f32::MAX]), Some(f32::INFINITY));
    assert!(codec(DType::I32).is_none());
}

#[test]
fn importance_is_heeded_or_ignored_as_the_codec_says() {
    let src: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin()).collect();
    let importance: Vec<f32> = (0..256).map(|i| (i % 5) as f32).collect();
    for &dtype in DType::ALL {
        for codec in implementations(dtype).filter(|c| c.can_encode()) {
            let bytes = |importance| {
                let mut dst = vec![0; dtype.bytes_for(256).unwrap() as usize];
                codec.encode(&src, 256, importance, &mut dst).map(|()| dst)
            };
            let (plain, weighed) = (bytes(None), bytes(Some(&importance)).unwrap());
            assert_eq!(plain.is_err(), codec.needs_importance(), "{dtype}");
            assert!(plain.is_err() || (plain.unwrap() != weighed) == codec.heeds_importance(), "{dtype}");
        }
    }
}
