//! Bytes of block types to weights, and weights to bytes.

use qconv::block::{Codec, codec, implementations};
use qconv::tensor::DType;

use super::input::Bytes;

/// Most blocks of an input.
const MOST_BLOCKS: usize = 16;

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

fn decoded(codec: &Codec, bytes: &[u8]) -> Vec<f32> {
    let blocks = bytes.len() / codec.dtype.type_size() as usize;
    let mut values = vec![f32::NAN; blocks * codec.dtype.block_size() as usize];
    codec.decode(bytes, &mut values).expect("whole blocks");
    values
}

/// Bytes of any type: all implementations decode them to the same, and what is encoded again comes out within the
/// type's bound.
pub fn decode(data: &[u8]) -> bool {
    let mut input = Bytes(data);
    let dtype = input.pick(DType::ALL);
    let Some(fastest) = codec(dtype) else { return false };
    let size = dtype.type_size() as usize;
    let whole = (input.0.len() / size).min(MOST_BLOCKS) * size;
    let bytes = input.take(whole);
    let values = decoded(fastest, bytes);
    for other in implementations(dtype) {
        assert!(
            same(&decoded(other, bytes), &values),
            "{dtype}: {} decodes to something else",
            other.implementation
        );
    }
    let mut short = vec![0.0; dtype.block_size() as usize * (whole / size + 1)];
    assert!(fastest.decode(bytes, &mut short).is_err(), "{dtype}: too few bytes");
    // Those whose encoder searches a grid take seconds for its tables at first; the other target has them.
    if !dtype.name().starts_with("IQ") {
        encoded(dtype, &values, None);
    }
    whole > 0
}

/// Weights and importances of any value.
pub fn encode(data: &[u8]) -> bool {
    let mut input = Bytes(data);
    let dtype = input.pick(DType::ALL);
    let weighed = input.u8() % 2 == 1;
    let block = dtype.block_size() as usize;
    let mut values = input.floats();
    values.resize((values.len().div_ceil(block)).min(MOST_BLOCKS) * block, 0.25);
    let importance: Vec<f32> = values.iter().rev().copied().collect();
    encoded(dtype, &values, weighed.then_some(&importance))
}

fn encoded(dtype: DType, values: &[f32], importance: Option<&[f32]>) -> bool {
    let finite = |list: &[f32]| list.iter().all(|v| v.is_finite());
    let sound = finite(values) && importance.is_none_or(finite);
    let block = dtype.block_size() as usize;
    let mut first: Option<Vec<u8>> = None;
    for codec in implementations(dtype) {
        let mut bytes = vec![0xEE; values.len() / block * dtype.type_size() as usize];
        if values.is_empty() || codec.encode(values, values.len(), importance, &mut bytes).is_err() {
            return false;
        }
        let back = decoded(codec, &bytes);
        if sound {
            assert!(
                first.as_ref().is_none_or(|first| *first == bytes),
                "{dtype}: {} encodes to something else",
                codec.implementation
            );
        }
        for (from, to) in values.chunks(block).zip(back.chunks(block)) {
            let Some(bound) = codec.error_bound(from).filter(|_| sound && importance.is_none()) else {
                continue;
            };
            let most = from.iter().zip(to).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(most <= bound, "{dtype}: {} is {most} away, {bound} is the most", codec.implementation);
        }
        first.get_or_insert(bytes);
    }
    first.is_some()
}
