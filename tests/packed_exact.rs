//! Integers in groups become blocks of ggml without rounding, where there are such blocks.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/unpacked.rs"]
mod unpacked;

use checkpoint::{Made, Random, f32_bytes};
use proptest::prelude::*;
use qconv::block::codec;
use qconv::container::Store;
use qconv::packed::{BLOCKS, give_blocks};
use qconv::tensor::DType;
use serde_json::json;
use unpacked::{open, stream};

/// A matrix of random integers as GPTQ's second version stores them; the columns of a group may be dealt out.
fn gptq(seed: u64, bits: u64, shape: [u64; 2], size: u64, zeros: &[u32], scales: &[f32], deal: bool) -> Made {
    let mut random = Random(seed);
    let [rows, cols] = shape;
    let groups = cols.div_ceil(size);
    let codes: Vec<Vec<u32>> =
        (0..rows).map(|_| (0..cols).map(|_| random.below(1 << bits) as u32).collect()).collect();
    let streams: Vec<Vec<u32>> = codes.iter().map(|row| stream(row, bits as usize)).collect();
    let words = streams[0].len();
    let qweight = (0..words).flat_map(|w| streams.iter().map(move |s| s[w]));
    let zero = |g: u64, r: u64| zeros[(g * rows + r) as usize % zeros.len()];
    let qzeros =
        (0..groups).flat_map(|g| stream(&(0..rows).map(|r| zero(g, r)).collect::<Vec<_>>(), bits as usize));
    let scales: Vec<f32> = (0..groups * rows).map(|i| scales[i as usize % scales.len()]).collect();
    let group = |c: u64| if deal { c % groups } else { c / size };
    Made::new(json!({}))
        .with("p.qweight", "I32", &[words as u64, rows], checkpoint::i32_bytes(qweight))
        .with("p.qzeros", "I32", &[groups, rows * bits / 32], checkpoint::i32_bytes(qzeros))
        .with("p.scales", "F32", &[groups, rows], f32_bytes(&scales))
        .with("p.g_idx", "I32", &[cols], checkpoint::i32_bytes((0..cols).map(|c| group(c) as u32)))
        .quantized(json!({
            "quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_v2",
        }))
}

fn values(store: &Store) -> (DType, Vec<f32>) {
    let t = store.get("p.weight").unwrap();
    let bytes = store.read_all(t).unwrap();
    let mut values = vec![0.0; t.elements() as usize];
    codec(t.dtype).unwrap().decode(&bytes, &mut values).unwrap();
    if t.dtype.is_block() {
        // Any range of blocks is the same as within the whole.
        let size = t.dtype.type_size();
        let n = t.nbytes / size;
        for (start, end) in [(0, 1), (1, n), (n / 2, n / 2 + 2), (n - 1, n)] {
            let mut part = vec![0; ((end.min(n) - start) * size) as usize];
            store.read(t, start * size, &mut part).unwrap();
            assert!(part == bytes[(start * size) as usize..][..part.len()]);
        }
    }
    (t.dtype, values)
}

/// The type that is found for a matrix, whose values have to be the same; `None` where it stays F32.
fn found(made: &Made) -> Option<DType> {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path(), made).unwrap();
    let (_, wanted) = values(&store);
    give_blocks(&mut store, &BLOCKS).unwrap();
    let (dtype, given) = values(&store);
    assert!(given == wanted, "{dtype}");
    dtype.is_block().then_some(dtype)
}

/// Whether F16 has the number.
fn is_half(x: f32) -> bool {
    half::f16::from_f32(x).to_f32() == x
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_groups(
        seed: u64,
        bits in prop::sample::select(vec![2u64, 3, 4, 8]),
        rows in 1u64..4,
        cols in 1u64..6,
        size in prop::sample::select(vec![32u64, 64, 96, 128, 40]),
        zeros in prop::collection::vec(0u32..256, 1..8),
        symmetric: bool,
        scales in prop::collection::vec(-200i32..200, 1..8),
        half: bool,
        deal: bool,
    ) {
        let middle = 1u32 << (bits - 1);
        let zeros: Vec<u32> =
            zeros.iter().map(|z| if symmetric { middle } else { z % (middle * 2) }).collect();
        let step = if half { 2f32.powi(-9) } else { 1.0 / 3.0 };
        let scales: Vec<f32> = scales.iter().map(|s| *s as f32 * step).collect();
        let cols = cols * 32;
        let made = gptq(seed, bits, [rows * 32, cols], size, &zeros, &scales, deal);
        let groups = cols.div_ceil(size);
        let in_order = !deal || groups == 1 || size == 1;
        let fits = in_order && (size % 32 == 0 || groups == 1) && scales.iter().all(|s| is_half(*s));
        let found = found(&made);
        // All integers of up to 8 bits less a zero among them fit Q8_0, but for those beyond 127.
        let used: Vec<u32> = (0..groups * rows * 32).map(|i| zeros[i as usize % zeros.len()]).collect();
        let most = (1i64 << bits) - 1;
        let q8 = used.iter().all(|z| most - i64::from(*z) <= 127 && i64::from(*z) <= 128);
        let q4 = used.iter().all(|z| *z <= 8 && most - i64::from(*z) <= 7);
        prop_assert_eq!(found.is_some() && found != Some(DType::Q4_1), fits && (q4 || q8) && found != Some(DType::Q4_1));
        if fits && q4 {
            prop_assert_eq!(found, Some(DType::Q4_0));
        }
        if !fits {
            prop_assert_eq!(found, None);
        }
        if bits == 8 && found.is_some() {
            prop_assert_eq!(found, Some(DType::Q8_0));
        }
    }
}

#[test]
fn minima_that_f16_holds() {
    // Zeros that are powers of two, one beyond Q4_0's middle.
    let made = gptq(5, 4, [32, 64], 32, &[4, 8, 2, 1], &[0.125, -0.375], false);
    assert_eq!(found(&made), Some(DType::Q4_1));
    // 7 times a number of eleven bits has more.
    let made = gptq(5, 4, [32, 64], 32, &[7, 8], &[2047.0 / 2048.0], false);
    assert_eq!(found(&made), Some(DType::Q8_0));
    let made = gptq(5, 4, [32, 64], 32, &[7, 8], &[1.0 / 3.0], false);
    assert_eq!(found(&made), None);
    let made = gptq(5, 4, [32, 64], 32, &[8], &[f32::INFINITY], false);
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path(), &made).unwrap();
    assert!(give_blocks(&mut store, &BLOCKS).unwrap().is_empty());
}

/// Such a matrix has any number of rows in a file of a few bytes.
#[test]
fn rows_of_nothing_end_soon() {
    let rows = 1u64 << 50;
    let made = Made::new(json!({}))
        .with("p.qweight", "I32", &[0, rows / 8], [])
        .with("p.qzeros", "I32", &[0, rows / 8], [])
        .with("p.scales", "F16", &[0, rows], [])
        .quantized(json!({"quant_method": "awq", "bits": 4, "group_size": 128}));
    let dir = tempfile::tempdir().unwrap();
    let Ok(mut store) = open(dir.path(), &made) else { return };
    assert!(give_blocks(&mut store, &BLOCKS).unwrap().is_empty());
}
