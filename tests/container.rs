//! What the writers lay out, the readers read back; and the readers of others too.

#[path = "common/raw.rs"]
mod raw;

use std::path::Path;

use proptest::prelude::*;
use qconv::container::gguf::{self, Array, Gguf, Metadata, Value};
use qconv::container::safetensors;
use qconv::container::shards::Layout;
use qconv::limits::Limits;
use qconv::sys::write_all_at;
use qconv::tensor::DType;
use raw::Raw;

type Spec<'a> = (&'a str, DType, &'a [u64]);

/// Writes a file of `len` bytes: the header, and each tensor's data filled with its number.
fn write(path: &Path, header: &[u8], tensors: impl Iterator<Item = (u64, u64)>, len: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    write_all_at(&file, header, 0).unwrap();
    for (i, (offset, nbytes)) in tensors.enumerate() {
        write_all_at(&file, &vec![i as u8 + 1; nbytes as usize], offset).unwrap();
    }
}

fn write_gguf(path: &Path, metadata: &Metadata, tensors: &[Spec]) -> gguf::write::Layout {
    let layout = gguf::write::Layout::new(metadata, tensors).unwrap();
    let data = tensors.iter().zip(&layout.offsets).map(|((_, d, s), at)| (*at, d.nbytes(s).unwrap()));
    write(path, &layout.header, data, layout.total_len);
    layout
}

fn everything() -> Metadata {
    let mut m = Metadata::default();
    m.set("general.architecture", "llama");
    m.set("u8", Value::U8(255));
    m.set("i8", Value::I8(-128));
    m.set("u16", Value::U16(65535));
    m.set("i16", Value::I16(-32768));
    m.set("u32", Value::U32(u32::MAX));
    m.set("i32", Value::I32(i32::MIN));
    m.set("f32", Value::F32(-0.0));
    m.set("bool", Value::Bool(true));
    m.set("text", Value::String(b"no \xff utf-8 \0".to_vec()));
    m.set("u64", Value::U64(u64::MAX));
    m.set("i64", Value::I64(i64::MIN));
    m.set("f64", Value::F64(1e300));
    m.set("a.u8", Value::Array(Array::U8(vec![1, 2, 3])));
    m.set("a.i8", Value::Array(Array::I8(vec![-1])));
    m.set("a.u16", Value::Array(Array::U16(vec![1, 65535])));
    m.set("a.i16", Value::Array(Array::I16(vec![-1])));
    m.set("a.u32", Value::Array(Array::U32(vec![7; 40_000])));
    m.set("a.i32", Value::Array(Array::I32(vec![-7])));
    m.set("a.f32", Value::Array(Array::F32(vec![0.1, f32::INFINITY])));
    m.set("a.bool", Value::Array(Array::Bool(vec![true, false])));
    m.set("a.text", Value::Array(Array::String(vec![b"a".to_vec(), Vec::new(), vec![b'x'; 100_000]])));
    m.set("a.u64", Value::Array(Array::U64(vec![u64::MAX])));
    m.set("a.i64", Value::Array(Array::I64(vec![i64::MIN])));
    m.set("a.f64", Value::Array(Array::F64(vec![])));
    m.set(
        "a.a",
        Value::Array(Array::Array(vec![Array::I32(vec![1, 2]), Array::String(vec![b"b".to_vec()])])),
    );
    m
}

#[test]
fn every_type_of_value_comes_back_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let metadata = everything();
    let tensors: &[Spec] = &[
        ("a", DType::F32, &[3, 5]),
        ("b", DType::Q4_K, &[2, 256]),
        ("c", DType::I8, &[7]),
        ("d", DType::F64, &[]),
    ];
    let layout = write_gguf(&path, &metadata, tensors);
    let read = Gguf::open(&path, &Limits::default()).unwrap();
    assert_eq!(read.metadata, metadata);
    assert!(read.metadata.iter().map(|(k, _)| k).eq(metadata.iter().map(|(k, _)| k)));
    assert_eq!((read.version, read.alignment, read.trailing_bytes), (3, 32, 0));
    assert_eq!(read.data_offset, layout.header.len() as u64);
    for (i, (t, (name, dtype, shape))) in read.store.tensors().iter().zip(tensors).enumerate() {
        assert_eq!((t.name.as_str(), t.dtype, t.shape.as_slice()), (*name, *dtype, *shape));
        assert_eq!(t.offset, layout.offsets[i]);
        assert!(read.store.read_all(t).unwrap().iter().all(|b| *b == i as u8 + 1));
    }
}

#[test]
fn the_bytes_are_those_of_the_specification() {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    metadata.set("llama.block_count", Value::U32(1));
    metadata.set("llama.embedding_length", Value::U32(8));
    metadata.set("llama.attention.head_count", Value::U32(2));
    let layout = gguf::write::Layout::new(
        &metadata,
        &[
            ("token_embd.weight", DType::F32, &[4, 8]),
            ("output_norm.weight", DType::F16, &[16]),
            ("blk.0.ffn_up.weight", DType::Q8_0, &[2, 32]),
        ],
    )
    .unwrap();
    let by_hand = Raw::valid().bytes();
    assert_eq!(layout.header, by_hand[..by_hand.len() - 256]);
    assert_eq!(layout.total_len, by_hand.len() as u64);
}

#[test]
fn tensors_follow_each_other_at_any_alignment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for alignment in [1u32, 8, 32, 64, 4096] {
        let mut metadata = Metadata::default();
        metadata.set("general.alignment", Value::U32(alignment));
        let tensors: &[Spec] =
            &[("a", DType::I8, &[5]), ("none", DType::F32, &[0]), ("b", DType::I8, &[4096])];
        let layout = write_gguf(&path, &metadata, tensors);
        let step = u64::from(alignment);
        assert_eq!(layout.offsets[0], layout.header.len() as u64);
        assert_eq!(layout.offsets[1], layout.offsets[0] + 5u64.next_multiple_of(step));
        assert_eq!(layout.offsets[2], layout.offsets[1]);
        assert_eq!(layout.total_len, layout.offsets[2] + 4096u64.next_multiple_of(step));
        assert!(layout.offsets.iter().all(|at| at.is_multiple_of(step)));
        assert_eq!(Gguf::open(&path, &Limits::default()).unwrap().alignment, alignment);
    }
}

#[test]
fn what_gguf_cannot_hold_is_refused() {
    let none = Metadata::default();
    let long = "n".repeat(64);
    for (case, spec) in [
        ("no name", ("", DType::F32, &[1][..])),
        ("long name", (long.as_str(), DType::F32, &[1])),
        ("NUL", ("a\0", DType::F32, &[1])),
        ("type", ("a", DType::U16, &[1])),
        ("row", ("a", DType::Q8_0, &[33])),
        ("dimensions", ("a", DType::F32, &[1; 5])),
        ("size", ("a", DType::F32, &[1 << 40, 1 << 40])),
    ] {
        assert!(gguf::write::Layout::new(&none, &[spec]).is_err(), "{case}");
    }
    let twice: Spec = ("a", DType::F32, &[1]);
    assert!(gguf::write::Layout::new(&none, &[twice, twice]).is_err());
    for (key, value) in [("", Value::U8(0)), ("general.alignment", Value::U32(3)), ("a\0", Value::U8(0))] {
        let mut metadata = Metadata::default();
        metadata.set(key, value);
        assert!(gguf::write::Layout::new(&metadata, &[]).is_err(), "{key:?}");
    }
}

#[test]
fn more_than_four_gibibytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.gguf");
    let tensors: &[Spec] = &[("a", DType::I8, &[5 << 30]), ("b", DType::F32, &[4])];
    let layout = gguf::write::Layout::new(&Metadata::default(), tensors).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(layout.total_len).unwrap(); // a hole, not five gibibytes
    write_all_at(&file, &layout.header, 0).unwrap();
    write_all_at(&file, &[9; 16], layout.offsets[1]).unwrap();
    let read = Gguf::open(&path, &Limits::default()).unwrap();
    let b = read.store.get("b").unwrap();
    assert!(b.offset > 5 << 30);
    assert_eq!(read.store.read_all(b).unwrap(), [9; 16]);

    let layout = safetensors::write::layout(tensors, u64::MAX).unwrap();
    let path = dir.path().join("model.safetensors");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(layout.files[0].len).unwrap();
    write_all_at(&file, &layout.files[0].header, 0).unwrap();
    write_all_at(&file, &[9; 16], layout.places[1].1).unwrap();
    let read = safetensors::open(&path, &Limits::default()).unwrap();
    assert_eq!(read.store.read_all(read.store.get("b").unwrap()).unwrap(), [9; 16]);
}

fn write_safetensors(dir: &Path, tensors: &[Spec], max: u64) -> Layout {
    let layout = safetensors::write::layout(tensors, max).unwrap();
    for (k, file) in layout.files.iter().enumerate() {
        let data = tensors
            .iter()
            .zip(&layout.places)
            .map(|((_, d, s), (at_file, at))| (*at, if *at_file == k { d.nbytes(s).unwrap() } else { 0 }));
        write(&dir.join(&file.name), &file.header, data, file.len);
    }
    if let Some((name, index)) = &layout.index {
        std::fs::write(dir.join(name), index).unwrap();
    }
    layout
}

#[test]
fn safetensors_come_back_and_their_own_library_agrees() {
    let tensors: &[Spec] = &[
        ("b", DType::BF16, &[3]),
        ("a", DType::F32, &[2, 2]),
        ("c", DType::U8, &[5]),
        ("d", DType::F64, &[]),
        ("e", DType::I64, &[0, 3]),
    ];
    for (max, names) in [
        (u64::MAX, vec!["model.safetensors"]),
        (22, vec!["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let layout = write_safetensors(dir.path(), tensors, max);
        assert_eq!(layout.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), names);
        let read = safetensors::open(dir.path(), &Limits::default()).unwrap();
        assert_eq!(read.store.tensors().len(), tensors.len());
        for (i, ((name, dtype, shape), (file, at))) in tensors.iter().zip(&layout.places).enumerate() {
            let t = read.store.get(name).unwrap();
            assert_eq!((t.dtype, t.shape.as_slice(), t.file, t.offset), (*dtype, *shape, *file, *at));
            assert!(at.is_multiple_of(dtype.type_size()), "{name} is aligned");
            let bytes = read.store.read_all(t).unwrap();
            assert!(bytes.iter().all(|b| *b == i as u8 + 1));
            let whole = std::fs::read(dir.path().join(&layout.files[*file].name)).unwrap();
            let theirs = ::safetensors::SafeTensors::deserialize(&whole).unwrap();
            let theirs = theirs.tensor(name).unwrap();
            assert_eq!(theirs.data(), bytes);
            assert!(theirs.shape().iter().map(|n| *n as u64).eq(shape.iter().copied()));
        }
        assert!(read.metadata.iter().all(|m| m["format"] == "pt"));
        assert!(layout.files.iter().all(|f| f.header.len().is_multiple_of(8)));
    }
    let none = tempfile::tempdir().unwrap();
    write_safetensors(none.path(), &[], 100);
    assert!(safetensors::open(none.path(), &Limits::default()).unwrap().store.tensors().is_empty());
    assert!(safetensors::write::layout(&[("q", DType::Q8_0, &[32])], 100).is_err());
    assert!(safetensors::write::layout(&[tensors[0], tensors[0]], 100).is_err());
}

#[test]
fn files_of_their_library_are_read() {
    use ::safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let data: Vec<u8> = (0..16).collect();
    let view = |dtype, shape: Vec<usize>| TensorView::new(dtype, shape, &data).unwrap();
    let tensors = [("z", view(Dtype::F32, vec![2, 2])), ("a", view(Dtype::BF16, vec![8]))];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs.safetensors");
    serialize_to_file(tensors, None, &path).unwrap();
    let read = safetensors::open(&path, &Limits::default()).unwrap();
    for (name, shape) in [("z", &[2, 2][..]), ("a", &[8])] {
        let t = read.store.get(name).unwrap();
        assert_eq!(t.shape, shape);
        assert_eq!(read.store.read_all(t).unwrap(), data);
    }
}

fn element() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i64>().prop_map(Value::I64),
        any::<bool>().prop_map(Value::Bool),
        any::<i32>().prop_map(|v| Value::F32(v as f32)),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::String),
        prop::collection::vec(any::<u16>(), 0..9).prop_map(|v| Value::Array(Array::U16(v))),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..9)
            .prop_map(|v| Value::Array(Array::String(v))),
        prop::collection::vec(prop::collection::vec(any::<i32>(), 0..5), 0..5)
            .prop_map(|v| Value::Array(Array::Array(v.into_iter().map(Array::I32).collect()))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_metadata_and_any_tensors_come_back(
        entries in prop::collection::vec(("[a-z]{1,8}\\.[a-z_]{1,8}", element()), 0..12),
        shapes in prop::collection::vec((0..DType::ALL.len(), prop::collection::vec(0u64..4, 0..4)), 0..8),
    ) {
        let mut metadata = Metadata::default();
        entries.into_iter().for_each(|(key, value)| metadata.set(key, value));
        let tensors: Vec<(String, DType, Vec<u64>)> = shapes
            .into_iter()
            .map(|(d, shape)| (DType::ALL[d], shape))
            .filter(|(d, _)| d.ggml_id().is_some())
            .enumerate()
            .map(|(i, (dtype, mut shape))| {
                if let Some(row) = shape.last_mut() {
                    *row *= dtype.block_size();
                } else {
                    shape.push(dtype.block_size());
                }
                (format!("t{i}"), dtype, shape)
            })
            .collect();
        let specs: Vec<Spec> = tensors.iter().map(|(n, d, s)| (n.as_str(), *d, s.as_slice())).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        write_gguf(&path, &metadata, &specs);
        let read = Gguf::open(&path, &Limits::default()).unwrap();
        prop_assert_eq!(read.metadata, metadata);
        prop_assert_eq!(read.store.tensors().len(), specs.len());
        for (i, (t, spec)) in read.store.tensors().iter().zip(&specs).enumerate() {
            prop_assert_eq!((t.name.as_str(), t.dtype, t.shape.as_slice()), *spec);
            prop_assert!(read.store.read_all(t).unwrap().iter().all(|b| *b == i as u8 + 1));
        }
    }
}
