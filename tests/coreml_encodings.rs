//! Weights as Core ML stores them, decoded by the formulas of its operations: within what each form promises, and the
//! same where codes of the source go in as they are.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/encoded.rs"]
mod encoded;
#[path = "common/unpacked.rs"]
mod unpacked;

use std::path::Path;
use std::sync::Arc;

use checkpoint::{Made, Random, f32_bytes, i32_bytes};
use encoded::{encode, half};
use qconv::ErrorKind;
use qconv::arch::{Data, Mapped, Piece};
use qconv::block::codec;
use qconv::container::imatrix::{ImportanceMatrix, Sums, to_gguf};
use qconv::container::{InputFile, Store, safetensors};
use qconv::convert::to_coreml::weights::{Keep, Wish};
use qconv::convert::{Importance, identity};
use qconv::limits::Limits;
use qconv::tensor::{DType, Dim, StridedCopy, TensorInfo};
use serde_json::json;
use unpacked::{decoded, open, stream};

const FORMS: [Wish; 16] = [
    Wish::F16,
    Wish::Int { bits: 4, block: None },
    Wish::Int { bits: 4, block: Some(32) },
    Wish::Int { bits: 8, block: None },
    Wish::Int { bits: 8, block: Some(16) },
    Wish::Lut { bits: 1, rows: Some(4) },
    Wish::Lut { bits: 2, rows: Some(8) },
    Wish::Lut { bits: 3, rows: Some(1) },
    Wish::Lut { bits: 3, rows: None },
    Wish::Lut { bits: 4, rows: Some(8) },
    Wish::Lut { bits: 4, rows: None },
    Wish::Lut { bits: 6, rows: Some(2) },
    Wish::Lut { bits: 6, rows: None },
    Wish::Lut { bits: 8, rows: None },
    Wish::Ternary { sparse: false },
    Wish::Ternary { sparse: true },
];

/// What a form takes for a matrix: bits of a weight, but for what a byte is rounded up by.
fn bits(wish: Wish, rows: f64, cols: f64, used: f64) -> f64 {
    match wish {
        Wish::F16 => 16.0,
        Wish::Int { bits, block } => f64::from(bits) + 16.0 / block.map_or(cols, |b| b as f64),
        Wish::Lut { bits, rows: group } => {
            f64::from(bits) + 16.0 * f64::from(1 << bits) / (group.map_or(rows, |g| g as f64) * cols)
        }
        Wish::Ternary { sparse: false } => 2.0 + 16.0 / cols,
        Wish::Ternary { sparse: true } => 1.0 + used + 32.0 / cols,
    }
}

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| (0..4).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).sum::<f32>() * 0.3).collect()
}

fn of_values(name: &str, shape: &[u64], values: Vec<f32>) -> Mapped {
    Mapped { name: name.into(), shape: shape.to_vec(), data: Data::Values(values), fixed: None }
}

fn nmse(x: &[f32], y: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v).powi(2);
    x.iter().zip(y).map(|(x, y)| square(x - y)).sum::<f64>() / x.iter().map(|x| square(*x)).sum::<f64>()
}

/// Each form, for matrices and stacks: the shape, the size of the formulas, the error that is said, and no more of it
/// than expected of so many bits.
#[test]
fn every_form() {
    let store = Store::default();
    for (shape, seed) in [(&[24u64, 96][..], 1), (&[3, 8, 32], 2), (&[40, 64], 3), (&[2, 1640, 160], 4)] {
        let n: u64 = shape.iter().product();
        let mut x = random(seed, n as usize);
        // The last of these is what float16 has, if only just.
        x[..3].copy_from_slice(&[1e-9, -2f32.powi(-25), 2f32.powi(-25) * 1.0001]);
        let tensor = of_values("blk.0.ffn_up.weight", shape, x.clone());
        let (rows, cols) = (shape[shape.len() - 2] as f64, shape[shape.len() - 1] as f64);
        for wish in FORMS {
            // Several spans matter where they share something.
            let shares = matches!(wish, Wish::Lut { rows: None, .. } | Wish::Ternary { sparse: true });
            if n > 100_000 && !shares {
                continue;
            }
            let made = encode(&tensor, &store, None, wish, Keep::Blocks, None).unwrap();
            assert!(n < 100_000 || made.plan.spans() > 1);
            let again = encode(&tensor, &store, None, wish, Keep::Blocks, None).unwrap();
            assert_eq!((&again.blobs, again.outcome), (&made.blobs, made.outcome), "threads do not show");
            let y = made.decode();
            assert_eq!((made.encoded.shape.as_slice(), made.plan.note()), (shape, None));
            let used = y.iter().filter(|v| **v != 0.0).count() as f64 / n as f64;
            let expected = bits(wish, rows, cols, used);
            assert!(
                (made.bits() - expected).abs() < 8.0 / n as f64 + 1e-9,
                "{wish:?}: {} {expected}",
                made.bits()
            );
            let lost = nmse(&x, &y);
            let most = match wish {
                Wish::F16 => 1e-6,
                Wish::Int { bits: 4, block: Some(_) } => 0.01,
                Wish::Int { bits: 4, .. } => 0.02,
                Wish::Int { .. } => 5e-5,
                Wish::Lut { bits: 1, .. } => 0.36,
                Wish::Lut { bits: 2, .. } => 0.12,
                Wish::Lut { bits: 3, .. } => 0.035,
                Wish::Lut { bits: 4, .. } => 0.0095,
                Wish::Lut { bits: 6, .. } => 0.0008,
                Wish::Lut { .. } => 6e-5,
                Wish::Ternary { .. } => 0.2,
            };
            assert!(lost < most, "{shape:?} {wish:?}: {lost}");
            // Ternary scales are taken for what they are in float16.
            assert!((made.outcome.lost / made.outcome.power - lost).abs() < 1e-6 + lost * 1e-2, "{wish:?}");
            let flushed = x.iter().filter(|x| **x != 0.0 && half(**x) == 0.0).count() as u64;
            assert!(made.outcome.flushed == flushed && flushed >= 2, "{wish:?}: {flushed}");
        }
    }
}

/// Rows of a matrix are those of the whole, encoded alone.
#[test]
fn some_rows() {
    let store = Store::default();
    let x = random(9, 40 * 32);
    let whole = of_values("output.weight", &[40, 32], x.clone());
    for wish in FORMS {
        let part = of_values("output.weight", &[24, 32], x[8 * 32..32 * 32].to_vec());
        let found = encode(&whole, &store, Some(8..32), wish, Keep::Never, None).unwrap();
        let wanted = encode(&part, &store, None, wish, Keep::Never, None).unwrap();
        assert_eq!((&found.blobs, found.decode()), (&wanted.blobs, wanted.decode()), "{wish:?}");
    }
    for rows in [8..8, 0..41, 41..42] {
        let e = encode(&whole, &store, Some(rows), Wish::F16, Keep::Never, None).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Misuse);
    }
}

/// What is rounded to a form is the same after it, and rounded again: values stay.
#[test]
fn what_is_encoded_stays() {
    let store = Store::default();
    for wish in FORMS {
        let once =
            encode(&of_values("w", &[24, 96], random(5, 24 * 96)), &store, None, wish, Keep::Never, None);
        let once = once.unwrap().decode();
        let twice =
            encode(&of_values("w", &[24, 96], once.clone()), &store, None, wish, Keep::Never, None).unwrap();
        match wish {
            // The second scale may be another, an end of the codes not having been used.
            Wish::Int { .. } => assert!(nmse(&once, &twice.decode()) < 1e-5, "{wish:?}"),
            _ => assert_eq!(once, twice.decode(), "{wish:?}"),
        }
    }
}

#[test]
fn few_elements_stand_in_the_program() {
    let store = Store::default();
    for n in [1, 9, 10] {
        let made =
            encode(&of_values("b", &[n], random(n, n as usize)), &store, None, Wish::F16, Keep::Never, None)
                .unwrap();
        assert_eq!((made.plan.blobs().len(), made.plan.spans()), if n < 10 { (0, 0) } else { (1, 1) });
        let wanted: Vec<f32> = random(n, n as usize).into_iter().map(half).collect();
        assert_eq!(made.decode(), wanted);
    }
    let scalar = encode(&of_values("s", &[], vec![0.5]), &store, None, Wish::F16, Keep::Never, None).unwrap();
    assert_eq!((scalar.decode(), scalar.encoded.shape.len()), (vec![0.5], 0));
}

#[test]
fn what_cannot_be_is_said() {
    let store = Store::default();
    let refused = |shape: &[u64], values: Vec<f32>, wish: Wish, kind: ErrorKind, words: &str| {
        let e = encode(&of_values("blk.0.w", shape, values), &store, None, wish, Keep::Never, None).err();
        let e = e.unwrap_or_else(|| panic!("{words}"));
        assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} is not in: {e}");
        assert!(e.to_string().contains("\"blk.0.w\""), "{e}");
    };
    use ErrorKind::{Malformed, Misuse, Unsupported};
    for wish in FORMS {
        for (wrong, kind, words) in [
            (f32::NAN, Malformed, "row 1, column 31 is NaN"),
            (f32::NEG_INFINITY, Malformed, "row 1, column 31 is -inf"),
            (-65520.0, Unsupported, "row 1, column 31 is -65520: weights of Core ML are of float16"),
        ] {
            let mut x = random(3, 8 * 32);
            x[63] = wrong;
            refused(&[8, 32], x, wish, kind, words);
        }
        // What float16 has is fine, and so are zeros.
        for value in [65519.0, -65519.0, 0.0, 1e-30] {
            let mut x = vec![0.0; 8 * 32];
            x[63] = value;
            let made = encode(&of_values("w", &[8, 32], x), &store, None, wish, Keep::Never, None).unwrap();
            assert!(made.decode().iter().all(|y| y.is_finite()), "{wish:?} {value}");
            if wish == (Wish::Ternary { sparse: true }) {
                let is_dense = made.encoded.after.is_some();
                assert_eq!(
                    (is_dense, made.plan.fallback().is_some()),
                    (value.abs() < 1.0, value.abs() < 1.0)
                );
            }
        }
    }
    let int = |bits, block| Wish::Int { bits, block };
    let lut = |bits, rows| Wish::Lut { bits, rows };
    refused(&[8, 32], random(1, 256), int(5, None), Misuse, "integers of 5 bits");
    refused(&[8, 32], random(1, 256), int(4, Some(24)), Misuse, "32 columns are no blocks of 24");
    refused(&[8, 32], random(1, 256), int(4, Some(0)), Misuse, "no blocks of 0");
    refused(&[8, 32], random(1, 256), lut(5, None), Misuse, "has those of 1, 2, 3, 4, 6 and 8");
    refused(&[8, 32], random(1, 256), lut(4, Some(3)), Misuse, "8 rows are no groups of 3");
    refused(&[256], random(1, 256), lut(4, None), Misuse, "is no matrix");
    refused(&[256], random(1, 256), Wish::Ternary { sparse: true }, Misuse, "is no matrix");
    refused(&[0, 32], vec![], Wish::F16, Unsupported, "no elements");
}

/// Importance moves errors to where they matter less.
#[test]
fn importance_weighs_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("imatrix.gguf");
    // Two matrices of a stack, each with its own important columns.
    let squares: Vec<f64> = (0..128).map(|i| if (i % 64 < 8) == (i < 64) { 100.0 } else { 0.1 }).collect();
    let sums = [("w".to_string(), Sums { squares: squares.clone(), counts: vec![1, 1] })];
    std::fs::write(&path, to_gguf(&sums.into(), &["text".into()], 1, 1).unwrap()).unwrap();
    let matrix = Arc::new(ImportanceMatrix::open(&path, &Limits::default()).unwrap());
    let entry = matrix.entries["w"].clone();
    let importance = Importance::Matrix { matrix, entry };
    let x = random(11, 2 * 16 * 64);
    let tensor = of_values("w", &[2, 16, 64], x.clone());
    let lost = |y: &[f32]| -> f64 {
        let of =
            |(i, (x, y)): (usize, (&f32, &f32))| squares[i / 1024 * 64 + i % 64] * f64::from(x - y).powi(2);
        x.iter().zip(y).enumerate().map(of).sum()
    };
    for wish in FORMS {
        let plain = encode(&tensor, &Store::default(), None, wish, Keep::Never, None).unwrap().decode();
        let made =
            encode(&tensor, &Store::default(), None, wish, Keep::Never, Some(importance.clone())).unwrap();
        let (plain, weighed) = (lost(&plain), lost(&made.decode()));
        match wish {
            Wish::F16 => assert_eq!(weighed, plain),
            // There are hardly fewer levels than weights.
            Wish::Lut { bits: 8, .. } => assert!(weighed <= plain * 1.01, "{weighed} {plain}"),
            _ => assert!(weighed < plain, "{wish:?}: {weighed} {plain}"),
        }
    }
}

/// A file of `fixtures/packed` with the quantization that it states, and the values of its library.
fn example(path: &Path, dir: &Path) -> (Store, Vec<f32>) {
    let file = safetensors::open(path, &Limits::default()).unwrap();
    let mut made = Made::new(json!({}));
    for t in file.store.tensors() {
        let dtype = t.dtype.safetensors_name().unwrap().to_string();
        made.tensors.push((t.name.clone(), (dtype, t.shape.clone(), file.store.read_all(t).unwrap())));
    }
    if let Some(quantization) = file.metadata[0].get("quantization_config") {
        made = made.quantized(serde_json::from_str(quantization).unwrap());
    }
    let expected = made.take("expected").2;
    let values = expected.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (open(dir, &made).unwrap(), values)
}

/// What the libraries quantized goes in as it is, or is said not to: every value is the source's, rounded once to
/// float16.
#[test]
fn codes_of_the_libraries() {
    let dir = tempfile::tempdir().unwrap();
    let mut found = String::new();
    let mut paths: Vec<_> =
        std::fs::read_dir(common::fixture("packed")).unwrap().map(|f| f.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.extension().is_none_or(|e| e != "safetensors") || name == "base" || name.starts_with("model-")
        {
            continue;
        }
        let (store, expected) = example(&path, dir.path());
        let tensor = identity(store.tensors())
            .into_iter()
            .find(|t| ["p.weight", "p_blocks"].contains(&&*t.name))
            .unwrap();
        for keep in [Keep::Blocks, Keep::Rows] {
            let made = encode(&tensor, &store, None, Wish::F16, keep, None).unwrap();
            let differ = made.decode().iter().zip(&expected).position(|(y, x)| *y != half(*x));
            assert_eq!(differ, None, "{name} {keep:?}");
            let note = made.plan.note().unwrap_or("no codes");
            found += &format!("{name} {keep:?}: {note}; {:.3} bits\n", made.bits());
        }
    }
    let path = common::fixture("coreml/codes.txt");
    if std::env::var_os("QCONV_UPDATE").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), found, "QCONV_UPDATE=1 writes it anew");
}

/// A store of one matrix of blocks with any codes, and its values. The scales of blocks are `scales`, in turn.
fn blocks(dtype: DType, shape: &[u64], scales: &[f32], seed: u64) -> (Store, Vec<f32>) {
    let codec = codec(dtype).unwrap();
    let n = shape.iter().product::<u64>();
    let mut bytes = vec![0; dtype.nbytes(shape).unwrap() as usize];
    codec.encode(&random(seed, n as usize), n as usize, None, &mut bytes).unwrap();
    let mut random = Random(seed);
    let size = dtype.type_size() as usize;
    let at = if matches!(dtype, DType::TQ1_0 | DType::TQ2_0) { size - 2 } else { 0 };
    for (k, block) in bytes.chunks_mut(size).enumerate() {
        let scale = scales[k % scales.len()];
        if matches!(dtype, DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::Q2_0) {
            block.iter_mut().for_each(|b| *b = random.below(256) as u8);
        }
        match dtype {
            DType::MXFP4 => block[0] = 127 + scale.log2() as i32 as u8,
            _ => block[at..at + 2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes()),
        }
    }
    let mut values = vec![0.0; n as usize];
    codec.decode(&bytes, &mut values).unwrap();
    let nbytes = bytes.len() as u64;
    let info = TensorInfo { name: "w".into(), dtype, shape: shape.to_vec(), file: 0, offset: 0, nbytes };
    (Store::new(vec![InputFile::of_bytes("x.gguf", bytes)], vec![info]).unwrap(), values)
}

#[track_caller]
fn same(found: &[f32], source: &[f32]) {
    assert_eq!(found.len(), source.len());
    let differ = found.iter().zip(source).position(|(y, x)| *y != half(*x));
    assert_eq!(differ, None, "{:?}", differ.map(|i| (found[i], source[i])));
}

/// Every value is that of the source, rounded once; and what takes fewer bits than there are is rounded anew.
#[test]
fn blocks_of_ggml() {
    let some = [0.5, -0.25, 2.0, 0.125, 1.0];
    let odd = [0.3, -0.07, 1e-6, 0.0, 300.0];
    let powers = [0.5, 0.25, 2.0, 4.0, 1.0 / 4096.0];
    let (blocks_, rows) = (Keep::Blocks, Keep::Rows);
    for (dtype, cols, scales, keep, bits, note) in [
        (DType::Q4_0, 64, odd, blocks_, 4.5, "integers of 4 bits for groups of 32"),
        (DType::Q5_0, 64, odd, blocks_, 8.5, "integers of 8 bits for groups of 32"),
        (DType::Q8_0, 64, odd, blocks_, 8.5, "integers of 8 bits for groups of 32"),
        (DType::Q2_0, 64, odd, blocks_, 3.0, "tables of 2 bits for rows"),
        (DType::Q2_0, 128, odd, blocks_, 3.0, "tables of 2 bits for groups of 64"),
        (DType::TQ1_0, 512, some, blocks_, 2.25, "tables of 2 bits for groups of 256"),
        (DType::TQ2_0, 512, odd, blocks_, 2.25, "tables of 2 bits for groups of 256"),
        (DType::TQ2_0, 256, odd, rows, 2.0625, "ternary"),
        (DType::TQ1_0, 512, [0.3; 5], rows, 2.03125, "ternary"),
        (DType::MXFP4, 64, powers, blocks_, 8.5, "integers of 8 bits for groups of 32"),
        (DType::Q4_0, 64, some, rows, 16.0, "groups of 32 have scales of their own"),
        (DType::TQ2_0, 512, some, rows, 16.0, "groups of 256 have scales of their own"),
    ] {
        let (store, values) = blocks(dtype, &[24, cols], &scales, cols);
        let tensor = identity(store.tensors()).remove(0);
        let made = encode(&tensor, &store, None, Wish::F16, keep, None).unwrap();
        same(&made.decode(), &values);
        assert_eq!(made.bits(), bits, "{dtype}");
        assert!(made.plan.note().unwrap().contains(note), "{dtype}: {:?}", made.plan.note());
        // Some rows of it, and two matrices of a stack.
        let made = encode(&tensor, &store, Some(8..16), Wish::F16, keep, None).unwrap();
        same(&made.decode(), &values[8 * cols as usize..16 * cols as usize]);
        let stack = Mapped { shape: vec![2, 12, cols], ..tensor.clone() };
        same(&encode(&stack, &store, None, Wish::F16, keep, None).unwrap().decode(), &values);
    }
    // One of few digits is none of 3 bits or more, and one of 8 bits none of 4.
    for (dtype, wish, stays) in [
        (DType::TQ2_0, Wish::Int { bits: 4, block: Some(32) }, true),
        (DType::TQ2_0, Wish::Lut { bits: 1, rows: Some(8) }, false),
        (DType::Q4_0, Wish::Int { bits: 4, block: Some(32) }, true),
        (DType::Q4_0, Wish::Lut { bits: 2, rows: Some(8) }, false),
        (DType::Q5_0, Wish::Int { bits: 8, block: None }, true),
        (DType::Q8_0, Wish::Int { bits: 4, block: Some(32) }, false),
        (DType::MXFP4, Wish::Int { bits: 4, block: Some(32) }, false),
        (DType::MXFP4, Wish::Int { bits: 8, block: None }, true),
    ] {
        let (store, values) = blocks(dtype, &[24, 256], &powers, 5);
        let tensor = identity(store.tensors()).remove(0);
        let made = encode(&tensor, &store, None, wish, Keep::Blocks, None).unwrap();
        let differs = made.decode().iter().zip(&values).any(|(y, x)| *y != half(*x));
        assert_eq!(differs, !stays, "{dtype} {wish:?}: {:?}", made.plan.note());
        assert_eq!(made.plan.note().unwrap().contains("as they are"), stays);
        let made = encode(&tensor, &store, None, wish, Keep::Never, None).unwrap();
        assert_eq!(made.plan.note(), None);
    }
    // Scales that float16 does not have, or that make values beyond it.
    let (store, values) = blocks(DType::MXFP4, &[8, 64], &[2f32.powi(-60), 1.0], 3);
    let tensor = identity(store.tensors()).remove(0);
    let made = encode(&tensor, &store, None, Wish::F16, Keep::Blocks, None).unwrap();
    same(&made.decode(), &values);
    assert_eq!(made.bits(), 16.0, "a table of 32 values would take more: {:?}", made.plan.note());
    for (dtype, scale, words) in [
        (DType::Q4_0, f32::INFINITY, "times a scale of"),
        (DType::Q8_0, f32::NAN, "times a scale of NaN"),
        (DType::Q8_0, 60000.0, "row 0, group 1: codes times a scale of 60000"),
        (DType::TQ2_0, f32::NEG_INFINITY, "has a scale of -inf"),
    ] {
        let (store, _) = blocks(dtype, &[8, 512], &[1.0, scale], 3);
        let tensor = identity(store.tensors()).remove(0);
        let e = encode(&tensor, &store, None, Wish::F16, Keep::Blocks, None).err().unwrap();
        assert!(e.to_string().contains(words) && e.to_string().contains("\"w\""), "{dtype}: {e}");
    }
}

/// Ternary digits stay, densely or sparsely, whatever is wished; more rows than a span has.
#[test]
fn ternary_digits_stay() {
    let (store, values) = blocks(DType::TQ2_0, &[1100, 256], &[0.5, 0.25, 0.1], 6);
    let tensor = identity(store.tensors()).remove(0);
    for sparse in [false, true] {
        let made = encode(&tensor, &store, None, Wish::Ternary { sparse }, Keep::Rows, None).unwrap();
        assert!(made.plan.spans() > 1);
        same(&made.decode(), &values);
        let used = values.iter().filter(|v| **v != 0.0).count() as f64 / values.len() as f64;
        let wanted = bits(Wish::Ternary { sparse }, 1100.0, 256.0, used);
        assert!((made.bits() - wanted).abs() < 1e-4, "{} {wanted}", made.bits());
        assert_eq!(made.encoded.after.is_some(), !sparse);
        // Least squares finds the same.
        let rounded = encode(&tensor, &store, None, Wish::Ternary { sparse }, Keep::Never, None).unwrap();
        assert_eq!((rounded.blobs, rounded.outcome.lost), (made.blobs, 0.0));
    }
}

/// GPTQ matrices `p0`, `p1`.. of the same size, with the groups of their columns dealt out or not.
fn gptq(bits: u64, [rows, cols]: [u64; 2], size: u64, scales: &[f32], count: u64) -> Made {
    let mut random = Random(bits * 100 + size);
    let mut made = Made::new(json!({}));
    for k in 0..count {
        let groups = cols.div_ceil(size);
        let mut codes = |n: u64| (0..n).map(|_| random.below(1 << bits) as u32).collect::<Vec<_>>();
        let streams: Vec<Vec<u32>> = (0..rows).map(|_| stream(&codes(cols), bits as usize)).collect();
        let qweight =
            (0..streams[0].len()).flat_map(|w| streams.iter().map(move |s| s[w])).collect::<Vec<_>>();
        let qzeros: Vec<u32> = (0..groups).flat_map(|_| stream(&codes(rows), bits as usize)).collect();
        let scales: Vec<f32> = (0..groups * rows).map(|i| scales[i as usize % scales.len()]).collect();
        made = made
            .with(&format!("p{k}.qweight"), "I32", &[cols * bits / 32, rows], i32_bytes(qweight))
            .with(&format!("p{k}.qzeros"), "I32", &[groups, rows * bits / 32], i32_bytes(qzeros))
            .with(&format!("p{k}.scales"), "F32", &[groups, rows], f32_bytes(&scales));
    }
    made.quantized(json!({
        "quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_v2",
    }))
}

/// Experts of several tensors become one, rows change places, and codes go with them.
#[test]
fn codes_of_stacks_and_of_moved_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, cols, n) = (64u64, 96u64, 64 * 96u64);
    for (bits, size, scales, per_weight) in [
        (2, 32, &[0.5f32, 0.3][..], 4.0),
        (2, 96, &[0.3, 0.1], 2.0 + 64.0 / 96.0),
        (3, 32, &[0.5, 0.25], 4.5),
        // Tables where float16 does not have the scales, and they take less than float16 throughout.
        (3, 96, &[0.3, 0.1], 3.0 + 128.0 / 96.0),
        (3, 32, &[0.3, 0.1], 7.0),
        (4, 32, &[0.5, -2.0], 4.625),
        (4, 96, &[0.3, 0.1], 4.0 + 256.0 / 96.0),
        (8, 32, &[0.5, -2.0], 8.75),
        (8, 32, &[0.3, -2.0], 16.0),
    ] {
        let store = open(dir.path(), &gptq(bits, [rows, cols], size, scales, 3)).unwrap();
        let copies = |copy: fn(u64, u64) -> StridedCopy| {
            let piece = |k: u64| Piece { source: format!("p{k}.weight"), copy: copy(k, 64 * 96) };
            Data::Copied { pieces: (0..3).map(piece).collect(), elementwise: Vec::new() }
        };
        let whole = copies(|k, n| StridedCopy { dst_base: k * n, ..StridedCopy::identity(n) });
        let experts = Mapped { name: "exps".into(), shape: vec![3, rows, cols], data: whole, fixed: None };
        let made = encode(&experts, &store, None, Wish::F16, Keep::Blocks, None).unwrap();
        let values: Vec<Vec<f32>> = (0..3).map(|k| decoded(&store, &format!("p{k}.weight"))).collect();
        same(&made.decode(), &values.concat());
        assert!(
            (made.bits() - per_weight).abs() < 1e-9,
            "{bits} {size}: {} {:?}",
            made.bits(),
            made.plan.note()
        );
        // Rows of both halves in turn.
        let moved = copies(|k, n| {
            let dims = vec![
                Dim { n: 32, src: 96, dst: 192 },
                Dim { n: 2, src: 32 * 96, dst: 96 },
                Dim { n: 96, src: 1, dst: 1 },
            ];
            StridedCopy::new(dims, 0, k * n)
        });
        let moved = Mapped { data: moved, ..experts.clone() };
        let made = encode(&moved, &store, None, Wish::F16, Keep::Blocks, None).unwrap();
        let row = |m: usize, r: usize| &values[m][r * cols as usize..(r + 1) * cols as usize];
        let wanted: Vec<f32> = (0..192).flat_map(|i| row(i / 64, i % 2 * 32 + i % 64 / 2).to_vec()).collect();
        same(&made.decode(), &wanted);
        // A transposed matrix has no rows of the source.
        let turned = Data::Copied {
            pieces: vec![Piece {
                source: "p0.weight".into(),
                copy: StridedCopy::new(
                    vec![Dim { n: cols, src: 1, dst: rows }, Dim { n: rows, src: cols, dst: 1 }],
                    0,
                    0,
                ),
            }],
            elementwise: Vec::new(),
        };
        let turned = Mapped { name: "t".into(), shape: vec![cols, rows], data: turned, fixed: None };
        let made = encode(&turned, &store, None, Wish::F16, Keep::Blocks, None).unwrap();
        assert!(made.plan.note().unwrap().contains("rows are not rows") && made.bits() == 16.0);
        let y = made.decode();
        assert!(
            (0..n as usize)
                .all(|i| y[i] == half(values[0][i % rows as usize * cols as usize + i / rows as usize]))
        );
    }
}
