//! Tests of weights: each form against its formula, from every place on.

use proptest::prelude::*;

use super::super::sparse::Values;
use super::*;

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
}

fn stored(dtype: DataType, shape: &[usize], bytes: Vec<u8>) -> Stored {
    Stored::new(dtype, shape.to_vec(), Bytes::Here(bytes.into())).unwrap()
}

fn floats(shape: &[usize], values: &[f32]) -> Arc<Weight> {
    Arc::new(Weight::plain(stored(DataType::Float16, shape, halves(values))))
}

fn codes(dtype: DataType, shape: &[usize], codes: &[u8]) -> Stored {
    let n = bits::bytes(codes.len() as u64, dtype.bits()).unwrap();
    let mut bytes = vec![0; n as usize];
    bits::pack(codes, dtype.bits(), &mut bytes);
    stored(dtype, shape, bytes)
}

/// Read whole and from places within, a weight is the same.
fn all(weight: &Weight) -> Vec<f32> {
    let n: usize = weight.shape.iter().product();
    let whole = weight.tensor().unwrap();
    let whole = match whole.as_floats() {
        Some(values) => values.to_vec(),
        None => whole.as_ints().unwrap().iter().map(|v| *v as f32).collect(),
    };
    for first in [0, 1, 7, n / 2, n.saturating_sub(1)].into_iter().filter(|first| *first < n) {
        let mut part = vec![f32::NAN; (n - first).div_ceil(2)];
        weight.read(first, &mut part);
        assert_eq!(part, whole[first..first + part.len()], "from {first}");
    }
    whole
}

/// Codes that are different in every row.
fn some(n: usize, most: usize) -> Vec<u8> {
    (0..n).map(|i| ((i * 7 + i / 5) % most) as u8).collect()
}

#[test]
fn numbers_as_they_are_stored() {
    let words = |values: &[i32], width: usize| -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()).collect()
    };
    for (dtype, bytes, wanted) in [
        (DataType::Int8, words(&[-128, 5, 127], 1), [-128.0, 5.0, 127.0]),
        (DataType::UInt8, words(&[0, 5, 255], 1), [0.0, 5.0, 255.0]),
        (DataType::Int16, words(&[-32768, 5, 9], 2), [-32768.0, 5.0, 9.0]),
        (DataType::UInt16, words(&[65535, 5, 9], 2), [65535.0, 5.0, 9.0]),
        (DataType::Int32, words(&[-70000, 5, 9], 4), [-70000.0, 5.0, 9.0]),
        (DataType::Float32, [1.5f32, -0.1, 7.0].map(f32::to_le_bytes).concat(), [1.5, -0.1, 7.0]),
        (DataType::Int4, vec![0x78, 0x0F], [-8.0, 7.0, -1.0]),
        (DataType::UInt3, vec![0xD1, 0x00], [1.0, 2.0, 3.0]),
    ] {
        assert_eq!(all(&Weight::plain(stored(dtype, &[3], bytes))), wanted, "{dtype}");
    }
    let many: Vec<f32> = (0..1500).map(|i| i as f32 / 8.0).collect();
    assert_eq!(all(&floats(&[30, 50], &many)), many);
    let int = Weight::plain(stored(DataType::Int32, &[], i32::MAX.to_le_bytes().to_vec()));
    assert_eq!(int.tensor().unwrap().as_ints().unwrap(), [i32::MAX], "float32 has no such number");
    for (dtype, n) in [(DataType::Float16, 5), (DataType::UInt3, 1), (DataType::Float64, 24)] {
        assert!(Stored::new(dtype, vec![3], Bytes::Here(vec![0; n].into())).is_err(), "{dtype}");
    }
    assert!(Stored::new(DataType::UInt1, vec![usize::MAX, 9], Bytes::Here([].into())).is_err());
}

#[test]
fn scaled_blocks() {
    let (rows, columns, n) = (6, 64, 6 * 64);
    let four = some(n, 16);
    let data = || Arc::new(Weight::plain(codes(DataType::Int4, &[rows, columns], &four)));
    let scales: Vec<f32> = (0..12).map(|i| f16::from_f32(0.1 + i as f32 / 3.0).to_f32()).collect();
    let signed = |i: usize| f32::from(four[i]) - if four[i] >= 8 { 16.0 } else { 0.0 };
    let half = |v: f32| f16::from_f32(v).to_f32();
    let weight = Weight::blockwise(data(), floats(&[6, 2], &scales), None).unwrap();
    let wanted: Vec<f32> = (0..n).map(|i| half(signed(i) * scales[i / 32])).collect();
    assert_eq!(all(&weight), wanted);
    let offset = Arc::new(Weight::plain(codes(DataType::Int4, &[6, 1], &[0, 1, 2, 15, 4, 5])));
    let weight = Weight::blockwise(data(), floats(&[6, 1], &scales[..6]), Some(offset)).unwrap();
    let offsets = [0.0, 1.0, 2.0, -1.0, 4.0, 5.0];
    let wanted: Vec<f32> = (0..n).map(|i| half((signed(i) - offsets[i / 64]) * scales[i / 64])).collect();
    assert_eq!(all(&weight), wanted);
    let e = Weight::blockwise(data(), floats(&[5, 2], &scales[..10]), None).unwrap_err();
    assert!(e.to_string().contains("scale: groups [5, 2] do not divide [6, 64]"), "{e}");
    let e =
        Weight::blockwise(data(), floats(&[6, 1], &scales[..6]), Some(floats(&[1, 1], &[0.0]))).unwrap_err();
    assert!(e.to_string().contains("offset has shape [1, 1]"), "{e}");
    assert!(Weight::blockwise(floats(&[1], &[1.0]), data(), None).is_err());
}

#[test]
fn tables() {
    let n = 16 * 40;
    for (dtype, bits) in [
        (DataType::UInt1, 1),
        (DataType::UInt2, 2),
        (DataType::UInt3, 3),
        (DataType::UInt6, 6),
        (DataType::UInt8, 8),
    ] {
        let entries = 1usize << bits;
        let (four, table) = (some(n, entries), |k: usize| half_of(k));
        // A table for each eight rows and half of the columns; of matrices, and of kernels.
        let lut: Vec<f32> = (0..4 * entries).map(table).collect();
        let wanted: Vec<f32> =
            (0..n).map(|i| table((i / 40 / 8 * 2 + i % 40 / 20) * entries + usize::from(four[i]))).collect();
        for tail in [&[][..], &[1, 1]] {
            let (shape, groups) = ([&[16, 40], tail].concat(), [&[2, 2], tail, &[entries, 1]].concat());
            let weight = Weight::lut(codes(dtype, &shape, &four), floats(&groups, &lut), None).unwrap();
            assert_eq!((all(&weight), &weight.shape), (wanted.clone(), &shape));
        }
    }
    fn half_of(k: usize) -> f32 {
        f16::from_f32(k as f32 * 0.37 - 3.0).to_f32()
    }
    let indices = || codes(DataType::UInt2, &[4, 2], &some(8, 4));
    for (shape, words) in [
        (vec![1, 1, 8, 1], "uint2 reads 4 entries"),
        (vec![3, 1, 4, 1], "lut: groups [3, 1] do not divide [4, 2]"),
        (vec![4, 1], "lut: groups [] do not divide"),
        (vec![1, 1, 4, 2], "these have 2"),
        (vec![4], "its last two sizes"),
    ] {
        let n = shape.iter().product();
        let e = Weight::lut(indices(), floats(&shape, &vec![0.0; n]), None).unwrap_err();
        assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
    }
    let int4 = codes(DataType::Int4, &[2], &[0, 1]);
    assert!(Weight::lut(int4, floats(&[1, 16, 1], &[0.0; 16]), None).is_err());
}

#[test]
fn entries_of_several_elements() {
    let four = [3, 0, 1, 2, 2, 1];
    let lut: Vec<f32> = (0..8).map(|i| i as f32).collect();
    let of = |axis| {
        let indices = codes(DataType::UInt2, &[2, 3], &four);
        Weight::lut(indices, floats(&[1, 1, 4, 2], &lut), Some(axis)).unwrap()
    };
    // Entry k is 2k, 2k + 1.
    let first = of(0);
    assert_eq!(first.shape, [4, 3]);
    assert_eq!(all(&first), [6.0, 0.0, 2.0, 7.0, 1.0, 3.0, 4.0, 4.0, 2.0, 5.0, 5.0, 3.0]);
    let last = of(-1);
    assert_eq!(last.shape, [2, 6]);
    assert_eq!(all(&last), [6.0, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 5.0, 2.0, 3.0]);
}

/// MXFP4: a table of integers, scaled by blocks.
#[test]
fn weights_of_weights() {
    let table = [0u8, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244];
    let lut = Arc::new(Weight::plain(stored(DataType::Int8, &[1, 1, 16, 1], table.to_vec())));
    let four = some(2 * 64, 16);
    let data = Weight::lut(codes(DataType::UInt4, &[2, 64], &four), lut, None).unwrap();
    let mut weight = Weight::blockwise(Arc::new(data), floats(&[2, 2], &[0.5, 1.0, 2.0, 4.0]), None).unwrap();
    let wanted = |i: usize| f32::from(table[usize::from(four[i])] as i8) * [0.5, 1.0, 2.0, 4.0][i / 32];
    assert_eq!(all(&weight), (0..128).map(wanted).collect::<Vec<_>>());
    let again = |weight| Weight::blockwise(Arc::new(weight), floats(&[1, 1], &[1.0]), None);
    for _ in 0..2 {
        weight = again(weight).unwrap();
    }
    assert!(again(weight).unwrap_err().to_string().contains("more than 4 times"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn sparse_weights(ones in prop::collection::vec(any::<bool>(), 1..1400), rows in 1usize..4) {
        let columns = ones.len() / rows;
        prop_assume!(columns > 0);
        let ones = &ones[..rows * columns];
        let bits: Vec<u8> = ones.iter().map(|b| u8::from(*b)).collect();
        let n = ones.iter().filter(|b| **b).count();
        let mask = codes(DataType::UInt1, &[rows, columns], &bits);
        let rank = |at: usize| ones[..at].iter().filter(|b| **b).count();
        // As they are.
        let values: Vec<f32> = (1..=n).map(|i| i as f32).collect();
        let weight = Weight::sparse(mask.clone(), Values::Plain(floats(&[n], &values))).unwrap();
        let wanted = |at: usize| if ones[at] { values[rank(at)] } else { 0.0 };
        prop_assert_eq!(all(&weight), (0..ones.len()).map(wanted).collect::<Vec<_>>());
        // Signs of one scale for each row.
        let signs = some(n, 2);
        let lut: Vec<f32> = (1..=rows).flat_map(|r| [-(r as f32), r as f32]).collect();
        let indices = codes(DataType::UInt1, &[n], &signs);
        let values = Values::lut(&mask, indices, floats(&[rows, 1, 2, 1], &lut)).unwrap();
        let weight = Weight::sparse(mask.clone(), values).unwrap();
        let wanted = |at: usize| if ones[at] { lut[at / columns * 2 + usize::from(signs[rank(at)])] } else { 0.0 };
        prop_assert_eq!(all(&weight), (0..ones.len()).map(wanted).collect::<Vec<_>>());
        let short = Values::Plain(floats(&[n + 1], &vec![0.0; n + 1]));
        prop_assert!(Weight::sparse(mask, short).is_err());
    }

    #[test]
    fn rounded_as_one_by_one(values in prop::collection::vec(any::<f32>(), 0..1200)) {
        let mut rounded = values.clone();
        let overflows = round(&mut rounded);
        let mut beyond = false;
        for (value, found) in values.iter().zip(rounded) {
            let wanted = f16::from_f32(*value).to_f32();
            prop_assert!(found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan()));
            beyond |= value.is_finite() && wanted.is_infinite();
        }
        prop_assert_eq!(overflows, beyond);
    }
}
