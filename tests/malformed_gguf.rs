//! Files that break GGUF's rules, and such as only look as if they did. Each is refused with the
//! right kind of error, or read; never a panic, never an allocation beyond the file's size.
//! The decisions are those of `formats/spec/gguf.md`; the cases follow published faults of other
//! readers (the CVE numbers are named where there is one).

#[path = "common/raw.rs"]
mod raw;

use std::path::{Path, PathBuf};

use qconv::container::gguf::Gguf;
use qconv::limits::Limits;
use qconv::{ErrorKind, Result};
use raw::{Raw, kind};

fn open_bytes(bytes: &[u8]) -> Result<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let opened = Gguf::open(&path, &Limits::default())?;
    // Whatever is accepted can be read: no tensor leaves the file.
    for t in opened.store.tensors() {
        opened.store.read_all(t)?;
    }
    Ok(opened)
}

#[track_caller]
fn refused(case: &str, bytes: &[u8], kind: ErrorKind, says: &str) {
    match open_bytes(bytes) {
        Ok(_) => panic!("{case}: accepted"),
        Err(e) => {
            assert_eq!(e.kind(), kind, "{case}: {e}");
            assert!(e.to_string().contains(says), "{case}: {e}");
            assert!(e.path().is_some(), "{case}: {e} names no file");
        }
    }
}

#[track_caller]
fn accepted(case: &str, raw: &Raw) -> Gguf {
    open_bytes(&raw.bytes()).unwrap_or_else(|e| panic!("{case}: {e}"))
}

use ErrorKind::{Limit, Malformed, Unsupported};

#[test]
fn good_files_are_read() {
    let valid = accepted("valid", &Raw::valid());
    assert_eq!((valid.version, valid.big_endian, valid.alignment, valid.shards), (3, false, 32, 1));
    let shapes: Vec<&[u64]> = valid.store.tensors().iter().map(|t| t.shape.as_slice()).collect();
    assert_eq!(shapes, [&[4, 8][..], &[16], &[2, 32]]);
    assert_eq!(accepted("version 2", &Raw { version: 2, ..Raw::valid() }).version, 2);
    accepted("no tensors", &Raw::llama());
    accepted("nothing at all", &Raw::empty());
    accepted("empty array", &Raw::valid().strings("x.empty", &[]));
    accepted("vendor key", &Raw::valid().u32("acme.custom", 7));
    accepted("key in upper case", &Raw::valid().u32("General.Name X", 7));
    accepted("NUL in a value", &Raw::valid().text("general.name", b"a\0b"));
    accepted("tokens that are not UTF-8", &Raw::valid().strings("x.s", &[b"ok", b"\xc0\xaf", b"\xff"]));
    accepted("template that escapes", &Raw::valid().text("tokenizer.chat_template", "{{ ''.__class__ }}"));
    accepted("name like a path", &Raw::llama().info("../../tmp/x", &[8], 0, 0).with_data(32));
    accepted("name of 63 bytes", &Raw::llama().info("n".repeat(63), &[8], 0, 0).with_data(32));
    accepted("scalar", &Raw::llama().info("t", &[], 0, 0).with_data(32));
    accepted("no elements", &Raw::llama().info("t", &[0], 0, 0));
    accepted("no columns, quantized", &Raw::llama().info("t", &[0, 4], 8, 0));
    accepted("no rows", &Raw::llama().info("t", &[32, 0], 8, 0)); // GHSA-3p75-pq92-q28f
    accepted(
        "data in another order",
        &Raw::llama().info("a", &[8], 0, 32).info("b", &[8], 0, 0).with_data(64),
    );
    accepted("a gap", &Raw::llama().info("a", &[8], 0, 0).info("b", &[8], 0, 64).with_data(96));
    let data = Raw::llama().info("t", &[8], 0, 0).with_data(32);
    let nan = Raw { data: f32::NAN.to_le_bytes().repeat(8), ..data.clone() };
    accepted("NaN as a weight", &nan);

    let mut padding = Raw::valid().bytes();
    let start = padding.len() - 256;
    assert!(padding[start - 1] == 0);
    padding[start - 1] = 0xaa;
    open_bytes(&padding).unwrap();

    let polyglot = [data.bytes(), b"PK\x05\x06".to_vec(), vec![0; 18]].concat();
    assert_eq!(open_bytes(&polyglot).unwrap().trailing_bytes, 22);
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
    // The version alone swapped: the counts are absurd in the order it announces.
    let swapped = Raw { version: 3u32.swap_bytes(), ..Raw::valid() };
    refused("swapped version", &swapped.bytes(), Malformed, "metadata entries");
}

#[test]
fn beginnings() {
    refused("one byte", b"G", Malformed, "file ends");
    refused("magic only", b"GGUF", Malformed, "file ends"); // CVE-2024-39720
    refused("nothing", b"", Malformed, "file ends");
    refused("lower case", &[b"gguf".to_vec(), vec![0; 64]].concat(), Unsupported, "GGUF");
    refused("pickle", b"\x80\x04\x95........................", Unsupported, "GGUF");
    for (version, says) in [(0, "too old"), (1, "too old"), (4, "newer"), (u32::MAX, "newer")] {
        let raw = Raw { version, ..Raw::valid() };
        refused("version", &raw.bytes(), Unsupported, says);
    }
}

#[test]
fn counts() {
    // CVE-2024-21836, CVE-2024-23605: count times size wraps around.
    for n in [u64::MAX, 1 << 63, 1 << 62, 1 << 40, u64::MAX / 120 + 1, u64::MAX / 368 + 1, u64::MAX / 80 + 1]
    {
        let raw = Raw { tensor_count: Some(n), ..Raw::valid() };
        refused("tensor count", &raw.bytes(), Malformed, "tensor infos");
        let raw = Raw { entry_count: Some(n), ..Raw::valid() };
        refused("entry count", &raw.bytes(), Malformed, "metadata entries");
    }
    let raw = Raw { entry_count: Some(5), ..Raw::valid() };
    refused("an info read as an entry", &raw.bytes(), Malformed, "");
    let raw = Raw { tensor_count: Some(4), ..Raw::valid() };
    refused("data read as an info", &raw.bytes(), Malformed, "");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, Raw::valid().bytes()).unwrap();
    for limits in [
        Limits { tensors: 2, ..Limits::default() },
        Limits { metadata_entries: 3, ..Limits::default() },
        Limits { header_bytes: 200, ..Limits::default() },
        Limits { string_bytes: 4, ..Limits::default() },
    ] {
        assert_eq!(Gguf::open(&path, &limits).unwrap_err().kind(), Limit);
    }
}

#[test]
fn strings() {
    let length = |n: u64| {
        let key = [n.to_le_bytes().to_vec(), b"general.architecture".to_vec(), vec![8, 0, 0, 0]].concat();
        let value = [n.to_le_bytes().to_vec(), b"llama".to_vec()].concat();
        (Raw { entries: vec![key], ..Raw::valid() }, Raw::valid().entry("x", kind::STRING, value))
    };
    for n in [u64::MAX, 1 << 63, (1 << 32) + 5, 1 << 30, 10_000] {
        let (key, value) = length(n); // CVE-2024-23496
        refused("key length", &key.bytes(), Malformed, "bytes of string");
        refused("value length", &value.bytes(), Malformed, "bytes of string");
        let mut info = Raw::llama().with_data(32);
        info.infos.push([n.to_le_bytes().to_vec(), b"t".to_vec(), vec![0; 24]].concat());
        refused("name length", &info.bytes(), Malformed, "bytes of string");
    }
    refused("empty key", &Raw::valid().u32("", 1).bytes(), Malformed, "empty");
    refused("long key", &Raw::valid().u32(&"k".repeat(65536), 1).bytes(), Limit, "65535");
    accepted("longest key", &Raw::valid().u32(&"k".repeat(65535), 1));
    refused("key not UTF-8", &Raw::valid().entry(b"a\xff", kind::U8, [0]).bytes(), Malformed, "UTF-8");
    refused("NUL in a key", &Raw::valid().u32("general.name\0x", 1).bytes(), Malformed, "NUL");
    let twice = Raw::valid().text("general.architecture", "llama");
    refused("key twice", &twice.bytes(), Malformed, "appears twice");
}

#[test]
fn values() {
    for t in [13, 99, 0x8000_0000, u32::MAX] {
        refused("value type", &Raw::valid().entry("x", t, [0; 8]).bytes(), Malformed, "value type");
        refused("element", &Raw::valid().array("x", t, 1, [0; 8]).bytes(), Malformed, "value type");
        refused("element of none", &Raw::valid().array("x", t, 0, []).bytes(), Malformed, "value type");
    }
    for (element, n) in [
        (kind::U8, u64::MAX), // CVE-2024-21825; gguf-py #27188 hangs
        (kind::U8, 1 << 63),
        (kind::U64, (1 << 61) + 1),
        (kind::U32, (1 << 62) + 1),
        (kind::STRING, 1 << 60),
        (kind::STRING, 1 << 30),
        (kind::F32, 1 << 30),
        (kind::ARRAY, 1 << 62),
        (kind::U32, 64),
    ] {
        let raw = Raw::llama().array("x", element, n, [1; 64]);
        refused("array length", &raw.bytes(), Malformed, "\"x\"");
    }
    refused("bool 7", &Raw::valid().entry("x", kind::BOOL, [7]).bytes(), Malformed, "BOOL");
    refused("bool 2 in an array", &Raw::valid().array("x", kind::BOOL, 2, [1, 2]).bytes(), Malformed, "BOOL");
    let nested = |depth: usize| {
        let level = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat();
        let last = [0u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec(), vec![1]].concat();
        Raw::valid().entry("x", kind::ARRAY, [level.repeat(depth - 1), last].concat())
    };
    accepted("array of arrays", &nested(2));
    refused("three deep", &nested(3).bytes(), Limit, "deeper");
    refused("very deep", &nested(20_000).bytes(), Limit, "deeper");
}

#[test]
fn alignment() {
    let aligned = |n: u32| Raw::valid().u32("general.alignment", n);
    for n in [0, 3, 12, 24, u32::MAX] {
        refused("no power of two", &aligned(n).bytes(), Malformed, "power of two"); // CVE-2025-0317
    }
    for n in [1u32, 4, 8, 64, 4096] {
        let mut raw = Raw::llama().u32("general.alignment", n).info("t", &[8], 0, 0).with_data(32);
        raw.alignment = n as usize;
        assert_eq!(accepted("power of two", &raw).alignment, n);
    }
    for n in [1 << 20, 1 << 31] {
        refused("padding is missing", &aligned(n).bytes(), Malformed, "");
    }
    let text = Raw::valid().text("general.alignment", "32");
    refused("text", &text.bytes(), Malformed, "STRING");
}

#[test]
fn tensors() {
    let one = |name: &[u8], dims: &[u64], t: u32| Raw::llama().info(name, dims, t, 0).with_data(4096).bytes();
    refused("no name", &one(b"", &[8], 0), Malformed, "name");
    refused("64 bytes", &one(&[b'n'; 64], &[8], 0), Malformed, "63");
    refused("not UTF-8", &one(b"\xff\xfe", &[8], 0), Malformed, "UTF-8");
    let two =
        |a: &[u8], b: &[u8], at: u64| Raw::llama().info(a, &[32], 0, 0).info(b, &[32], 0, at).with_data(512);
    refused("same name", &two(b"a", b"a", 128).bytes(), Malformed, "appears twice");
    refused("same up to NUL", &two(b"a", b"a\0b", 128).bytes(), Malformed, "NUL");

    refused("five dimensions", &one(b"t", &[2; 5], 0), Malformed, "5 dimensions");
    let mut many = Raw::llama().with_data(64); // CVE-2024-21802
    many.infos.push([1u64.to_le_bytes().to_vec(), b"t".to_vec(), vec![0xff; 4], vec![0; 20]].concat());
    refused("2^32 - 1 dimensions", &many.bytes(), Malformed, "4294967295 dimensions");
    for dims in [
        &[1u64 << 32, 1 << 32][..], // wraps to 0
        &[(1 << 63) - 1, 2],        // llama.cpp #27203
        &[1 << 63],                 // negative
        &[u64::MAX / 4],            // llama.cpp PR 24759
        &[1 << 40, 1 << 18],        // CVE-2026-7482
        &[1 << 62, 2, 2, 2],
        &[8, 1000],
    ] {
        refused("size", &one(b"t", dims, 0), Malformed, "\"t\"");
    }
    refused("size wraps as F64", &one(b"t", &[1 << 61], 28), Malformed, "\"t\"");
    for (t, says) in [(4, "removed"), (5, "removed"), (31, "removed"), (33, "removed"), (36, "removed")] {
        refused("removed type", &one(b"t", &[256], t), Unsupported, says);
    }
    for t in [43, 255, 0x7fff_ffff, u32::MAX] {
        refused("type", &one(b"t", &[256], t), Unsupported, "not known"); // llama.cpp #19856
    }
    refused("row of 33", &one(b"t", &[33], 8), Malformed, "blocks of 32");
    refused("row of 32 for a K-quant", &one(b"t", &[32, 8], 12), Malformed, "blocks of 256");

    refused("offset 144", &two(b"a", b"b", 144).bytes(), Malformed, "no multiple of 32");
    refused("all bytes shared", &two(b"a", b"b", 0).bytes(), Malformed, "overlap");
    refused("some bytes shared", &two(b"a", b"b", 96).bytes(), Malformed, "overlap");
    for at in [512, 1 << 40, 1 << 63, u64::MAX - 31] {
        refused("beyond the file", &two(b"a", b"b", at).bytes(), Malformed, "\"b\"");
    }
}

#[test]
fn every_truncation_is_an_error() {
    let mut whole = Raw::valid();
    whole.data.truncate(160 + 68); // without the last tensor's padding, which may be missing
    let whole = whole.bytes();
    open_bytes(&whole).unwrap();
    for n in 0..whole.len() {
        refused(&format!("cut at {n}"), &whole[..n], Malformed, "");
    }
}

#[test]
fn no_changed_byte_panics() {
    let whole = Raw::valid().strings("x.s", &[b"a", b"b"]).array("x.a", kind::U32, 2, [1; 8]).bytes();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, &whole).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let (mut accepted, mut refused) = (0, 0);
    for (i, &old) in whole.iter().enumerate().take(whole.len() - 256) {
        for byte in [0x00, 0x01, 0x7f, 0x80, 0xff, old ^ 1, old.wrapping_add(1), old] {
            qconv::sys::write_all_at(&file, &[byte], i as u64).unwrap();
            let opened = Gguf::open(&path, &Limits::default());
            if opened.is_ok() { accepted += 1 } else { refused += 1 }
        }
    }
    assert!(accepted > 0 && refused > 0);
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
    let named = |raw: Raw| open_bytes(&raw.bytes());
    let split = |no: u16, count: u16, tensors: i32| {
        Raw::valid()
            .entry("split.no", kind::U16, no.to_le_bytes())
            .entry("split.count", kind::U16, count.to_le_bytes())
            .entry("split.tensors.count", kind::I32, tensors.to_le_bytes())
    };
    named(split(0, 1, 3)).unwrap();
    named(split(0, 0, 3)).unwrap();
    for raw in [
        split(0, 2, 6),
        split(1, 2, 6),
        split(0, 1, -1),
        split(1, 1, 3),
        Raw::valid().text("split.no", "0").u32("split.count", 2),
        Raw::valid().u32("split.count", 2),
    ] {
        assert_eq!(named(raw).unwrap_err().kind(), Malformed);
    }
}

#[test]
fn files_that_are_no_models_can_be_looked_at_but_not_used() {
    let hyper = || Raw { entries: Raw::llama().entries[1..].to_vec(), ..Raw::valid() };
    let types =
        |raw: Raw, n: u64| raw.array("tokenizer.ggml.token_type", kind::I32, n, vec![1; 4 * n as usize]);
    for (case, raw) in [
        ("no architecture", hyper()),
        ("architecture is an array", hyper().strings("general.architecture", &[b"llama"])),
        ("architecture is empty", hyper().text("general.architecture", "")),
        ("block_count is text", Raw::empty().text("general.architecture", "l").text("l.block_count", "1")),
        (
            "more blocks than tensors",
            Raw { entries: Raw::llama().entries[..1].to_vec(), ..Raw::valid() }
                .u32("llama.block_count", u32::MAX),
        ),
        ("no width", Raw::empty().text("general.architecture", "l").u32("l.embedding_length", 0)),
        (
            "heads are text",
            Raw::empty().text("general.architecture", "l").text("l.attention.head_count", "2"),
        ),
        ("NaN", Raw::valid().entry("llama.rope.freq_base", kind::F32, f32::NAN.to_le_bytes())),
        ("tokens are numbers", Raw::valid().array("tokenizer.ggml.tokens", kind::U32, 1, [0; 4])),
        ("tokens are a text", Raw::valid().text("tokenizer.ggml.tokens", "a")),
        ("too few types", types(Raw::valid().strings("tokenizer.ggml.tokens", &[b"a", b"b"]), 1)),
    ] {
        let error = accepted(case, &raw).check_model().expect_err(case);
        assert_eq!(error.kind(), Malformed, "{case}: {error}");
    }
    accepted("model", &Raw::valid()).check_model().unwrap();
    let raw = types(Raw::valid().strings("tokenizer.ggml.tokens", &[b"a", b"\xff"]), 2);
    accepted("model with tokens", &raw).check_model().unwrap();
}
