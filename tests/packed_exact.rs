//! Integers in groups become blocks of ggml without rounding, where there are such blocks.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/qpack.rs"]
mod made;
#[path = "common/unpacked.rs"]
mod unpacked;

use checkpoint::{Made, Random, f32_bytes};
use proptest::prelude::*;
use qconv::block::codec;
use qconv::container::Store;
use qconv::container::grouped::Rows;
use qconv::container::qpack::{Encoding, Sparse, Tensor, Ternary, Trits};
use qconv::limits::Limits;
use qconv::packed::qpack::{put_sparse, put_ternary, sign_bytes};
use qconv::packed::{BLOCKS, give_blocks, give_same};
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
        let lines: Vec<(f32, u32)> =
            (0..(groups * rows * 32) as usize).map(|i| (scales[i % scales.len()], zeros[i % zeros.len()])).collect();
        // Groups that a block has columns of are alike.
        let line = |g: u64, r: u64| lines[(g * rows * 32 + r) as usize];
        let is_one = (0..rows * 32).all(|r| {
            (0..cols / 32).all(|b| {
                let mut groups = b * 32 / size..=(b * 32 + 31) / size;
                groups.all(|g| line(g, r) == line(b * 32 / size, r))
            })
        });
        let fits = in_order && is_one && scales.iter().all(|s| is_half(*s));
        let within = |below: i64, above: i64| {
            lines.iter().all(|(_, z)| i64::from(*z) <= below && (1 << bits) - 1 - i64::from(*z) <= above)
        };
        let minima = || lines.iter().all(|(s, z)| is_half(-(*z as f32) * s));
        let wanted = match bits {
            _ if !fits => None,
            _ if within(8, 7) => Some(DType::Q4_0),
            2..=4 if minima() => Some(DType::Q4_1),
            _ if within(16, 15) => Some(DType::Q5_0),
            _ if within(128, 127) => Some(DType::Q8_0),
            _ => None,
        };
        prop_assert_eq!(found(&made), wanted);
    }
}

#[test]
fn minima_that_f16_holds() {
    // Zeros that are powers of two, one beyond Q4_0's middle.
    let made = gptq(5, 4, [32, 64], 32, &[4, 8, 2, 1], &[0.125, -0.375], false);
    assert_eq!(found(&made), Some(DType::Q4_1));
    // 7 times a number of eleven bits has more.
    let made = gptq(5, 4, [32, 64], 32, &[7, 8], &[2047.0 / 2048.0], false);
    assert_eq!(found(&made), Some(DType::Q5_0));
    let made = gptq(5, 8, [32, 64], 32, &[128], &[2047.0 / 2048.0], false);
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

/// Ternary digits of `.qpack`, wherever their scales lie; the same values, in the smallest type.
#[test]
fn ternary_digits() {
    use Packing::{Dense, Sparse as Few};
    #[derive(Clone, Copy)]
    enum Packing {
        Dense(Trits),
        Sparse,
    }
    let given = |packing, [rows, cols]: [u64; 2], block: [u64; 2], scales: &[f32]| {
        let (shape, dtype) = (vec![rows, cols], DType::F32);
        let encoding = match packing {
            Dense(packing) => Encoding::Ternary(Ternary { packing, block, scales: dtype }),
            Few => Encoding::Sparse(Sparse { block, scales: dtype }),
        };
        let mut random = Random(cols);
        let groups = cols.div_ceil(block[1]);
        let line = |i: u64| scales[((i / groups / block[0] * groups) + i % groups) as usize % scales.len()];
        let read = Rows {
            codes: (0..rows * cols).map(|_| random.below(3) as u8).collect(),
            scales: (0..rows * groups).map(line).collect(),
            zeros: vec![1.0; (rows * groups) as usize],
        };
        let mut tensor = Tensor::new("p.weight", shape.clone(), encoding.clone()).unwrap();
        if let Encoding::Sparse(_) = encoding {
            tensor.parts[2].segment.bytes = read.codes.chunks_exact(cols as usize).map(sign_bytes).sum();
        }
        let contents = made::fill(&tensor, |put| match &encoding {
            Encoding::Ternary(e) => put_ternary(e, &shape, 0, &read, put),
            Encoding::Sparse(e) => put_sparse(e, &shape, 0, &mut 0, &read, put),
            _ => unreachable!(),
        });
        let dir = tempfile::tempdir().unwrap();
        let path = made::write(dir.path(), vec![(tensor, contents)]);
        let mut store = qconv::packed::qpack::open(path, &Limits::default()).unwrap().0;
        let (_, wanted) = values(&store);
        give_blocks(&mut store, &BLOCKS).unwrap();
        let (dtype, given) = values(&store);
        assert!(given == wanted, "{dtype}");
        dtype
    };
    for packing in [Dense(Trits::Base3), Dense(Trits::Bits2), Few] {
        let tq = |shape, block, scales: &[f32]| given(packing, shape, block, scales);
        assert_eq!(tq([3, 512], [1, 256], &[0.5, -0.25, 0.0, 1.5]), DType::TQ2_0);
        assert_eq!(tq([3, 512], [3, 512], &[0.5]), DType::TQ2_0);
        // Groups that happen to agree.
        assert_eq!(tq([3, 512], [1, 64], &[0.5]), DType::TQ2_0);
        assert_eq!(tq([3, 512], [1, 64], &[0.5, 0.75]), DType::Q4_0);
        assert_eq!(tq([2, 2880], [1, 2880], &[0.5, -0.125]), DType::Q4_0);
        assert_eq!(tq([2, 2880], [1, 192], &[0.5, 0.125, 0.25]), DType::Q4_0);
        assert_eq!(tq([2, 2880], [1, 48], &[0.5, 0.125, 0.25]), DType::F32);
        assert_eq!(tq([2, 250], [1, 250], &[0.5]), DType::F32);
        assert_eq!(tq([2, 512], [1, 256], &[1.0 / 3.0]), DType::F32);
    }
}

/// Matrices that become one tensor have one type: the first that holds all.
#[test]
fn the_same_type_for_all() {
    let given = |zeros: [u32; 2], scale: f32| {
        let [a, b] = zeros.map(|zero| gptq(7, 4, [32, 64], 32, &[zero], &[scale], false));
        let mut made = a;
        made.tensors.extend(b.tensors.into_iter().map(|(name, tensor)| (name.replace("p.", "q."), tensor)));
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), &made).unwrap();
        give_blocks(&mut store, &BLOCKS).unwrap();
        let types = |store: &Store| ["p", "q"].map(|p| store.get(&format!("{p}.weight")).unwrap().dtype);
        let apart = types(&store);
        give_same(&mut store, &["p.weight", "q.weight"], &BLOCKS).unwrap();
        let same = types(&store);
        assert_eq!(same[0], same[1]);
        values(&store);
        (apart, same[0])
    };
    // Q4_1 has numbers of F16 only: 7 times this is none.
    let (odd, even) = (2047.0 / 2048.0, 0.5);
    assert_eq!(given([8, 8], odd), ([DType::Q4_0; 2], DType::Q4_0));
    assert_eq!(given([8, 7], even), ([DType::Q4_0, DType::Q4_1], DType::Q4_1));
    assert_eq!(given([8, 7], odd), ([DType::Q4_0, DType::Q5_0], DType::Q5_0));
}
