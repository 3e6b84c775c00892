//! PyTorch files that we lay out: our own reader takes them, and the `zip` crate, which compares
//! checksums. `tests/peers/checkpoints/pytorch.py` has torch itself read what `convert` writes.

mod common;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use qconv::ErrorKind::{Malformed, Unsupported};
use qconv::container::pytorch::write::layout;
use qconv::container::shards::Layout;
use qconv::container::{pytorch, weights};
use qconv::convert::{FilePlan, Silent, ToHf};
use qconv::limits::Limits;
use qconv::sys::{read_exact_at, write_all_at};
use qconv::tensor::DType;

type Spec<'a> = (&'a str, DType, &'a [u64]);

/// Every type that torch has, a scalar, and no elements at all.
const TENSORS: &[Spec] = &[
    ("model.embed.weight", DType::BF16, &[3, 5]),
    ("f32", DType::F32, &[2, 3]),
    ("f64", DType::F64, &[]),
    ("none", DType::F16, &[0, 7]),
    ("f16", DType::F16, &[33]),
    ("i8", DType::I8, &[1, 1, 3, 1, 2]),
    ("i16", DType::I16, &[4]),
    ("i32", DType::I32, &[300]),
    ("i64", DType::I64, &[2]),
    ("u8", DType::U8, &[70]),
    ("u16", DType::U16, &[3]),
    ("u32", DType::U32, &[2, 2]),
    ("u64", DType::U64, &[1]),
    ("bool", DType::Bool, &[2]),
    ("e4m3", DType::F8_E4M3, &[5, 1]),
    ("e5m2", DType::F8_E5M2, &[9]),
    ("e8m0", DType::F8_E8M0, &[3]),
];

fn data(i: usize, nbytes: u64) -> Vec<u8> {
    (0..nbytes).map(|k| (k * 7 + i as u64 * 13 + 1) as u8 & 1).collect()
}

/// Writes the data from the last to the first, as the layout has them.
fn write(dir: &Path, tensors: &[Spec], layout: &Layout) {
    let create = |name: &str| {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).open(dir.join(name)).unwrap()
    };
    for (k, f) in layout.files.iter().enumerate() {
        let file = create(&f.name);
        file.set_len(f.len).unwrap();
        for (i, (_, dtype, shape)) in tensors.iter().enumerate().rev() {
            let (at_file, at) = layout.places[i];
            if at_file == k {
                write_all_at(&file, &data(i, dtype.nbytes(shape).unwrap()), at).unwrap();
            }
        }
        write_all_at(&file, &f.header, 0).unwrap();
        let read = |at: u64, bytes: &mut [u8]| read_exact_at(&file, bytes, at).map_err(|e| panic!("{e}"));
        let write = |at: u64, bytes: &[u8]| write_all_at(&file, bytes, at).map_err(|e| panic!("{e}"));
        f.ending.as_ref().unwrap().write(1, &mut Vec::new(), &read, &write, &|_| true).unwrap();
        assert_eq!(file.metadata().unwrap().len(), f.len, "nothing is written beyond the end");
    }
    if let Some((name, index)) = &layout.index {
        std::fs::write(dir.join(name), index).unwrap();
    }
}

#[test]
fn our_reader_takes_them() {
    for (max, names) in [
        (u64::MAX, vec!["pytorch_model.bin"]),
        (1400, vec!["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(TENSORS, max).unwrap();
        write(dir.path(), TENSORS, &layout);
        assert_eq!(layout.files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(dir.path().join("pytorch_model.bin.index.json").exists(), names.len() > 1);
        let read = weights::open(dir.path(), &Limits::default()).unwrap();
        assert_eq!(read.format, "PyTorch");
        assert_eq!(read.store.tensors().len(), TENSORS.len());
        for (i, (t, (name, dtype, shape))) in read.store.tensors().iter().zip(TENSORS).enumerate() {
            assert_eq!((t.name.as_str(), t.dtype, t.shape.as_slice()), (*name, *dtype, *shape));
            if t.nbytes > 0 {
                assert_eq!((t.file, t.offset), layout.places[i], "{name}");
            }
            assert!(layout.places[i].1.is_multiple_of(64), "{name}");
            assert_eq!(read.store.read_all(t).unwrap(), data(i, t.nbytes), "{name}");
        }
    }
    let none = tempfile::tempdir().unwrap();
    write(none.path(), &[], &layout(&[], 100).unwrap());
    assert!(pytorch::open(none.path(), &Limits::default()).unwrap().tensors().is_empty());
}

#[test]
fn they_are_sound_zip_archives() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(TENSORS, u64::MAX).unwrap();
    write(dir.path(), TENSORS, &layout);
    let path = dir.path().join("pytorch_model.bin");
    let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
    assert_eq!(archive.len(), TENSORS.len() + 3);
    let small = [("byteorder", "little"), ("version", "3\n")];
    for (name, text) in small {
        let mut found = String::new();
        archive.by_name(&format!("pytorch_model/{name}")).unwrap().read_to_string(&mut found).unwrap();
        assert_eq!(found, text);
    }
    for (i, (_, dtype, shape)) in TENSORS.iter().enumerate() {
        let mut member = archive.by_name(&format!("pytorch_model/data/{i}")).unwrap();
        assert_eq!(member.compression(), zip::CompressionMethod::Stored);
        assert_eq!(member.data_start().unwrap(), layout.places[i].1);
        let mut found = Vec::new();
        member.read_to_end(&mut found).unwrap(); // fails where the checksum differs
        assert_eq!(found, data(i, dtype.nbytes(shape).unwrap()));
    }
    // That it would.
    write_all_at(&File::options().write(true).open(&path).unwrap(), &[9], layout.places[1].1).unwrap();
    let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
    let mut member = archive.by_name("pytorch_model/data/1").unwrap();
    assert!(member.read_to_end(&mut Vec::new()).unwrap_err().to_string().contains("checksum"));
}

#[test]
fn sizes_offsets_and_counts_beyond_the_first_zip() {
    let dir = tempfile::tempdir().unwrap();
    // A hole, not four gibibytes; and both ends of the field.
    let tensors: &[Spec] =
        &[("small", DType::U8, &[3]), ("large", DType::U8, &[1 << 32]), ("b", DType::F32, &[4])];
    let layout = layout(tensors, u64::MAX).unwrap();
    let f = &layout.files[0];
    let path = dir.path().join(&f.name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(f.len).unwrap();
    write_all_at(&file, &f.header, 0).unwrap();
    write_all_at(&file, &[9; 16], layout.places[2].1).unwrap();
    let hole = layout.places[1].1..layout.places[1].1 + (1 << 32);
    let read = |at: u64, bytes: &mut [u8]| {
        if hole.contains(&at) {
            bytes.fill(0);
            return Ok(());
        }
        read_exact_at(&file, bytes, at).map_err(|e| panic!("{e}"))
    };
    let write_at = |at: u64, bytes: &[u8]| write_all_at(&file, bytes, at).map_err(|e| panic!("{e}"));
    f.ending.as_ref().unwrap().write(1, &mut Vec::new(), &read, &write_at, &|_| true).unwrap();
    let store = pytorch::open(&path, &Limits::default()).unwrap();
    let b = store.get("b").unwrap();
    assert!(b.offset > 1 << 32);
    assert_eq!(store.read_all(b).unwrap(), [9; 16]);
    assert_eq!(store.get("large").unwrap().nbytes, 1 << 32);
    let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
    let large = archive.by_name("pytorch_model/data/1").unwrap();
    assert_eq!((large.size(), large.data_start().unwrap()), (1 << 32, layout.places[1].1));
    assert_eq!(large.crc32(), 0xd202_ef8d, "of 2^32 zeros, as zlib has it");
    drop(large);
    let mut found = Vec::new();
    archive.by_name("pytorch_model/data/2").unwrap().read_to_end(&mut found).unwrap();
    assert_eq!(found, [9; 16]);

    let names: Vec<String> = (0..66_000).map(|i| format!("t{i}")).collect();
    let many: Vec<Spec> = names.iter().map(|n| (n.as_str(), DType::U8, &[1][..])).collect();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &many, &self::layout(&many, u64::MAX).unwrap());
    let store = pytorch::open(dir.path(), &Limits::default()).unwrap();
    assert!(store.tensors().iter().map(|t| &t.name).eq(&names));
    let archive = zip::ZipArchive::new(File::open(dir.path().join("pytorch_model.bin")).unwrap()).unwrap();
    assert_eq!(archive.len(), 66_003);
}

#[test]
fn what_torch_lacks_is_refused() {
    let refused = |tensors: &[Spec], kind, says: &str| {
        let e = layout(tensors, 100).unwrap_err();
        assert_eq!(e.kind(), kind);
        assert!(e.to_string().contains(says), "{e}");
    };
    refused(&[("q", DType::Q4_0, &[32])], Unsupported, r#"tensor "q": PyTorch has no type Q4_0"#);
    refused(&[TENSORS[0], TENSORS[0]], Malformed, "appears twice");
    refused(&[("x", DType::U8, &[1 << 62][..]); 4], Malformed, "exceed");
}

/// A conversion writes them like any other output, checksums last.
#[test]
fn a_conversion_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let limits = Limits::default();
    common::convert(&common::fixture("models/llama"), &path("a.gguf"), Some("f16"));
    let back =
        |output: &str, max_shard_size| ToHf { max_shard_size, ..ToHf::new(path("a.gguf"), path(output)) };
    back("expected", u64::MAX).plan().unwrap().run(false, &common::budget(), &Silent).unwrap();
    let expected = weights::open(&path("expected"), &limits).unwrap().store;

    let mut job = back("found", u64::MAX).plan().unwrap();
    let tensors: Vec<Spec> =
        job.plan.tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())).collect();
    let layout = layout(&tensors, 100_000).unwrap();
    assert!(layout.files.len() > 2);
    for (t, (file, offset)) in job.plan.tensors.iter_mut().zip(layout.places) {
        (t.file, t.offset) = (file, offset);
    }
    let index = layout.index.map(|(name, bytes)| FilePlan::whole(name, bytes));
    job.plan.files = layout.files.into_iter().map(FilePlan::from).chain(index).collect();
    job.run(false, &common::budget(), &Silent).unwrap();

    let found = weights::open(&path("found"), &limits).unwrap();
    assert_eq!((found.format, found.store.tensors().len()), ("PyTorch", expected.tensors().len()));
    for t in found.store.tensors() {
        let same = expected.get(&t.name).unwrap();
        assert_eq!((t.dtype, &t.shape), (same.dtype, &same.shape), "{}", t.name);
        assert_eq!(found.store.read_all(t).unwrap(), expected.read_all(same).unwrap(), "{}", t.name);
    }
    for file in found.store.files() {
        let mut archive = zip::ZipArchive::new(File::open(file.path()).unwrap()).unwrap();
        for i in 0..archive.len() {
            archive.by_index(i).unwrap().read_to_end(&mut Vec::new()).unwrap();
        }
    }
}
