//! GGUF files of more than one part or of another kind than most: byte order, alignment, shards. Files that lie are
//! in `malformed_corpus.rs`; the decisions are those of `formats/spec/gguf.md`.

#[path = "common/raw.rs"]
mod raw;

use std::path::{Path, PathBuf};

use qconv::ErrorKind::{self, Limit, Malformed, Unsupported};
use qconv::container::gguf::Gguf;
use qconv::limits::Limits;
use raw::{Raw, kind};

#[track_caller]
fn open(bytes: &[u8]) -> Gguf {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path, &Limits::default()).unwrap()
}

#[test]
fn facts_of_a_file() {
    let valid = open(&Raw::valid().bytes());
    assert_eq!((valid.version, valid.big_endian, valid.alignment, valid.shards), (3, false, 32, 1));
    let shapes: Vec<&[u64]> = valid.store.tensors().iter().map(|t| t.shape.as_slice()).collect();
    assert_eq!(shapes, [&[4, 8][..], &[16], &[2, 32]]);
    valid.check_model().unwrap();
    assert_eq!(open(&Raw { version: 2, ..Raw::valid() }.bytes()).version, 2);
    open(&Raw::empty().bytes());
    let data = Raw::llama().info("t", &[8], 0, 0).with_data(32);
    let polyglot = [data.bytes(), b"PK\x05\x06".to_vec(), vec![0; 18]].concat();
    assert_eq!(open(&polyglot).trailing_bytes, 22);
    for n in [1u32, 4, 8, 64, 4096] {
        let mut raw = Raw::llama().u32("general.alignment", n).info("t", &[8], 0, 0).with_data(32);
        raw.alignment = n as usize;
        assert_eq!(open(&raw.bytes()).alignment, n);
    }
    let types = [1i32.to_le_bytes(), 6i32.to_le_bytes()].concat();
    let tokens = Raw::valid().strings("tokenizer.ggml.tokens", &[b"a", b"\xff"]);
    let raw = tokens.array("tokenizer.ggml.token_type", kind::I32, 2, types);
    open(&raw.bytes()).check_model().unwrap();
}

#[test]
fn big_endian_files_are_read() {
    let mut raw = Raw { big_endian: true, ..Raw::empty() };
    raw = raw.text("general.architecture", "llama").u32("llama.block_count", 1);
    raw = raw.array("x.a", kind::F32, 2, [1f32.to_be_bytes(), 2.5f32.to_be_bytes()].concat());
    raw = raw.info("a", &[2, 1], 0, 0).info("b", &[32], 8, 32).info("c", &[256], 16, 96);
    raw.data = [1f32.to_be_bytes(), (-2f32).to_be_bytes()].concat();
    raw.data.resize(32, 0);
    raw.data.extend([0x3c, 0x00]); // f16 1.0
    raw.data.extend([7; 32]);
    raw.data.resize(96 + 66, 0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big.gguf");
    std::fs::write(&path, raw.bytes()).unwrap();
    let gguf = Gguf::open(&path, &Limits::default()).unwrap();
    assert!(gguf.big_endian);
    assert_eq!(gguf.metadata.u64("llama.block_count"), Some(1));
    assert_eq!(gguf.metadata.get("x.a").unwrap().to_string(), "[1, 2.5]");
    let read = |name: &str| gguf.store.read_all(gguf.store.get(name).unwrap());
    assert_eq!(read("a").unwrap(), [1f32.to_le_bytes(), (-2f32).to_le_bytes()].concat());
    assert_eq!(read("b").unwrap()[..3], [0x00, 0x3c, 7]);
    let error = read("c").unwrap_err();
    assert_eq!(error.kind(), Unsupported);
    assert!(error.to_string().contains("\"c\""), "{error}");
}

#[test]
fn no_file_and_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| Gguf::open(path, &Limits::default()).unwrap_err();
    assert_eq!(open(&dir.path().join("none.gguf")).kind(), ErrorKind::Io);
    assert_eq!(open(dir.path()).kind(), ErrorKind::Misuse);
}

fn shard(dir: &Path, file: (u64, u64), split: (u16, u16, i32), name: &str) -> PathBuf {
    let mut raw = Raw::llama()
        .entry("split.no", kind::U16, split.0.to_le_bytes())
        .entry("split.count", kind::U16, split.1.to_le_bytes())
        .entry("split.tensors.count", kind::I32, split.2.to_le_bytes())
        .info(name, &[8], 0, 0);
    raw.data = vec![file.0 as u8; 32];
    let path = dir.join(format!("m-{:05}-of-{:05}.gguf", file.0, file.1));
    std::fs::write(&path, raw.bytes()).unwrap();
    path
}

#[test]
fn splits_are_joined_from_any_shard() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> =
        (0..3).map(|i| shard(dir.path(), (u64::from(i) + 1, 3), (i, 3, 3), &format!("t{i}"))).collect();
    for path in &paths {
        let gguf = Gguf::open(path, &Limits::default()).unwrap();
        assert_eq!(gguf.shards, 3);
        let names: Vec<&str> = gguf.store.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["t0", "t1", "t2"]);
        for (i, t) in gguf.store.tensors().iter().enumerate() {
            assert_eq!(gguf.store.read_all(t).unwrap(), [i as u8 + 1; 32]);
        }
        assert!(gguf.metadata.iter().all(|(key, _)| !key.starts_with("split.")));
    }
    let limits = Limits { shards: 2, ..Limits::default() };
    assert_eq!(Gguf::open(&paths[0], &limits).unwrap_err().kind(), Limit);
    let limits = Limits { tensors: 2, ..Limits::default() };
    assert_eq!(Gguf::open(&paths[0], &limits).unwrap_err().kind(), Limit);

    std::fs::remove_file(&paths[1]).unwrap();
    let error = Gguf::open(&paths[2], &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("m-00002-of-00003.gguf"), "{error}");
    assert!(error.hint_text().is_some());
}

#[test]
fn splits_that_do_not_agree() {
    let pair = |a: (u16, u16, i32), b: (u16, u16, i32), names: [&str; 2]| {
        let dir = tempfile::tempdir().unwrap();
        let first = shard(dir.path(), (1, 2), a, names[0]);
        shard(dir.path(), (2, 2), b, names[1]);
        Gguf::open(first, &Limits::default()).map(drop)
    };
    let good = (0, 2, 2);
    pair(good, (1, 2, 2), ["a", "b"]).unwrap();
    for (case, a, b, names) in [
        ("second says first", good, (0, 2, 2), ["a", "b"]),
        ("second of three", good, (1, 3, 2), ["a", "b"]),
        ("another total", good, (1, 2, 3), ["a", "b"]),
        ("a tensor too few", (0, 2, 3), (1, 2, 3), ["a", "b"]),
        ("a tensor in both", good, (1, 2, 2), ["a", "a"]),
        ("number beyond", (5, 2, 2), (1, 2, 2), ["a", "b"]),
        ("number of the other", (1, 2, 2), (1, 2, 2), ["a", "b"]),
        ("negative total", (0, 2, -1), (1, 2, -1), ["a", "b"]),
        ("65535 shards", (0, 65535, 2), (1, 2, 2), ["a", "b"]),
    ] {
        let error = pair(a, b, names).expect_err(case);
        assert_eq!(error.kind(), Malformed, "{case}: {error}");
    }
}
