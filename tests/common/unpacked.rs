//! Packed tensors as the library gives them.
#![allow(dead_code)] // each test uses its part

use std::path::Path;

use qconv::Result;
use qconv::container::{Store, safetensors};
use qconv::limits::Limits;
use qconv::packed::unpack;
use qconv::tensor::DType;

use crate::checkpoint::{Made, Random};

/// Opened, and what is packed joined.
pub fn open(dir: &Path, made: &Made) -> Result<Store> {
    let path = dir.join("model.safetensors");
    std::fs::write(&path, made.safetensors()).unwrap();
    let store = safetensors::open(&path, &Limits::default())?.store;
    Ok(unpack(store, made.config.get("quantization_config"))?.0)
}

/// All values of a tensor in F32, read in one go; ranges of it give the same.
pub fn decoded(store: &Store, name: &str) -> Vec<f32> {
    let info = store.get(name).unwrap_or_else(|| panic!("no {name}: {:?}", store.tensors()));
    assert_eq!(info.dtype, DType::F32);
    let whole = store.read_all(info).unwrap();
    let mut random = Random(whole.len() as u64);
    for _ in 0..40 {
        let start = random.below(info.elements() + 1);
        let n = random.below(info.elements() - start + 1);
        let mut part = vec![0; n as usize * 4];
        store.read(info, start * 4, &mut part).unwrap();
        assert!(part == whole[start as usize * 4..][..part.len()], "{name} {start} {n}");
    }
    whole.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[track_caller]
pub fn same(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    let differ = found.iter().zip(wanted).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differ, None, "{:?}", differ.map(|i| (found[i], wanted[i])));
}

/// A stream of codes, lowest bits first, in words.
pub fn stream(codes: &[u32], bits: usize) -> Vec<u32> {
    let mut words = vec![0u32; (codes.len() * bits).div_ceil(32)];
    for (i, code) in codes.iter().enumerate() {
        for bit in 0..bits {
            words[(i * bits + bit) / 32] |= (code >> bit & 1) << ((i * bits + bit) % 32);
        }
    }
    words
}
