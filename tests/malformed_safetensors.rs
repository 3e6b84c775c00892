//! Files and indexes that break the rules of safetensors, and such as only look as if they did.
//! The decisions are those of `formats/spec/safetensors.md`.

use std::path::Path;

use qconv::ErrorKind::{Io, Limit, Malformed, Unsupported};
use qconv::container::safetensors::{SafeTensors, open};
use qconv::limits::Limits;
use qconv::{ErrorKind, Result};
use serde_json::json;

/// A file with this header, padded to 8 bytes, and `data` zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut header = header.as_bytes().to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    with_length(header.len() as u64, &header, data)
}

fn with_length(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    [&length.to_le_bytes()[..], header, &vec![0; data]].concat()
}

/// A header with one tensor `a`.
fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
}

const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;

fn open_at(path: &Path, bytes: &[u8]) -> Result<SafeTensors> {
    std::fs::write(path, bytes).unwrap();
    let opened = open(path, &Limits::default())?;
    for t in opened.store.tensors() {
        opened.store.read_all(t)?;
    }
    Ok(opened)
}

/// Opens `whole` with each byte of its first `n` changed in several ways.
fn change_bytes(whole: &[u8], n: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed");
    std::fs::write(&path, whole).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for (i, &old) in whole.iter().enumerate().take(n) {
        for byte in [0, b'"', b'{', b'9', 0x7f, 0xff, old ^ 1, old] {
            qconv::sys::write_all_at(&file, &[byte], i as u64).unwrap();
            let _ = open(&path, &Limits::default()); // an error or not, never a panic
        }
    }
    open(&path, &Limits::default()).unwrap();
}

fn open_bytes(bytes: &[u8]) -> Result<SafeTensors> {
    let dir = tempfile::tempdir().unwrap();
    open_at(&dir.path().join("model.safetensors"), bytes)
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

#[test]
fn good_files_are_read() {
    let opened = open_bytes(&file(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},
            "a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#,
        20,
    ))
    .unwrap();
    let names: Vec<&str> = opened.store.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "b"], "sorted, as llama.cpp's converter sees them");
    assert_eq!(opened.metadata[0]["format"], "pt");
    open_bytes(&file(&one("F32", "[0,4]", "[0,0]"), 0)).unwrap();
    open_bytes(&file(&one("F32", "[]", "[0,4]"), 4)).unwrap();
    open_bytes(&file(&one("F8_E4M3", "[3]", "[0,3]"), 3)).unwrap();
    open_bytes(&file("{}", 0)).unwrap();
    open_bytes(&file(r#"{"__metadata__":{}}"#, 0)).unwrap();
    open_bytes(&file(&GOOD.replace("\"a\"", "\"../../x\""), 16)).unwrap();
    open_bytes(&file(&GOOD.replace("\"a\"", "\"\""), 16)).unwrap();
    open_bytes(&file(&GOOD.replace("\"a\"", "\"a\\u0000b\""), 16)).unwrap();
    let many: Vec<String> = (0..20_000)
        .map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    let many = open_bytes(&file(&format!("{{{}}}", many.join(",")), 0)).unwrap();
    assert_eq!(many.store.tensors().len(), 20_000);
}

#[test]
fn headers() {
    refused("nothing", b"", Malformed, "0 bytes");
    refused("7 bytes", &[1; 7], Malformed, "7 bytes");
    refused("length only", &8u64.to_le_bytes(), Malformed, "8 bytes");
    refused("length 0", &[0; 8], Malformed, "{");
    refused("length 2^64 - 1", &with_length(u64::MAX, GOOD.as_bytes(), 16), Malformed, "bytes");
    refused("one too long", &with_length(9, b"{}      ", 0), Malformed, "9 bytes");
    refused("length cuts the JSON", &with_length(10, GOOD.as_bytes(), 16), Malformed, "header");
    refused("pickle", &[b"\x80\x04\x95".to_vec(), vec![0; 64]].concat(), Malformed, "header");
    refused("space before it", &file(&format!(" {GOOD}"), 16), Malformed, "{");
    refused("array", &file("[]", 0), Malformed, "{");
    refused("brace is missing", &file(&GOOD[..GOOD.len() - 1], 16), Malformed, "header");
    refused("something behind it", &file("{}x", 0), Malformed, "header");
    refused("NUL as padding", &with_length(8, b"{}\0\0\0\0\0\0", 0), Malformed, "header");
    refused("not UTF-8", &with_length(8, b"{\"\xff\":1}", 0), Malformed, "header");
    refused("deep", &file(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), Malformed, "header");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.safetensors");
    let large = std::fs::File::create(&path).unwrap();
    large.set_len(200_000_000).unwrap();
    qconv::sys::write_all_at(&large, &with_length(100_000_001, b"{", 0), 0).unwrap();
    assert_eq!(open(&path, &Limits::default()).unwrap_err().kind(), Limit);
    std::fs::write(&path, file(GOOD, 16)).unwrap();
    for limits in
        [Limits { header_bytes: 40, ..Limits::default() }, Limits { tensors: 0, ..Limits::default() }]
    {
        assert_eq!(open(&path, &limits).unwrap_err().kind(), Limit);
    }
}

#[test]
fn entries() {
    let tensor = r#""dtype":"F32","shape":[4],"data_offsets":[0,16]"#;
    for (case, header, says) in [
        ("name twice", format!(r#"{{"a":{{{tensor}}},"a":{{{tensor}}}}}"#), "\"a\" appears twice"),
        ("field twice", format!(r#"{{"a":{{"dtype":"F32",{tensor}}}}}"#), "duplicate field"),
        ("metadata twice", r#"{"__metadata__":{},"__metadata__":{}}"#.into(), "appears twice"),
        ("key of metadata twice", r#"{"__metadata__":{"a":"","a":""}}"#.into(), "appears twice"),
        ("unknown field", format!(r#"{{"a":{{{tensor},"x":1}}}}"#), "\"a\": unknown field"),
        ("number in metadata", r#"{"__metadata__":{"a":1}}"#.into(), "__metadata__"),
        ("no dtype", r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#.into(), "\"a\": missing field"),
        ("not an object", r#"{"a":1}"#.into(), "\"a\""),
        ("negative", one("F32", "[-4]", "[0,16]"), "\"a\""),
        ("float", one("F32", "[4.0]", "[0,16]"), "\"a\""),
        ("exponent", one("F32", "[4e0]", "[0,16]"), "\"a\""),
        ("negative offset", one("F32", "[4]", "[-16,0]"), "\"a\""),
        ("one offset", one("F32", "[4]", "[16]"), "\"a\""),
        ("three offsets", one("F32", "[4]", "[0,16,32]"), "\"a\""),
        ("above 2^64", one("F32", "[4]", "[0,99999999999999999999]"), "\"a\""),
        ("size wraps to 0", one("F32", "[4611686018427387904]", "[0,0]"), "\"a\""),
        ("product wraps to 0", one("F32", "[4294967296,4294967296]", "[0,0]"), "\"a\""),
        ("range at 2^64", one("F32", "[4]", "[18446744073709551599,18446744073709551615]"), "\"a\""),
        ("end before begin", one("F32", "[4]", "[16,0]"), "\"a\""),
        ("too few bytes", one("F32", "[4]", "[0,15]"), "takes 16 bytes"),
    ] {
        refused(case, &file(&header, 16), Malformed, says);
    }
    for dtype in ["F33", "f32", "", "Q8_0"] {
        refused("type", &file(&one(dtype, "[4]", "[0,16]"), 16), Unsupported, "not known");
    }
    for dtype in ["F4", "F6_E2M3", "C64"] {
        refused("type", &file(&one(dtype, "[4]", "[0,2]"), 2), Unsupported, "not supported");
    }
}

#[test]
fn nothing_hides_between_tensors() {
    let two = |begin: usize| {
        let b = one("F32", "[4]", &format!("[{begin},{}]", begin + 16)).replace("\"a\"", "\"b\"");
        format!("{},{}", &GOOD[..GOOD.len() - 1], &b[1..])
    };
    open_bytes(&file(&two(16), 32)).unwrap();
    refused("same bytes", &file(&two(0), 16), Malformed, "overlaps");
    refused("some bytes", &file(&two(8), 24), Malformed, "overlaps");
    refused("gap", &file(&two(32), 48), Malformed, "gap");
    refused("gap before", &file(&one("F32", "[4]", "[16,32]"), 32), Malformed, "gap");
    refused("one byte behind", &file(GOOD, 17), Malformed, "1 bytes");
    refused("zip behind", &[file(GOOD, 16), b"PK\x05\x06".to_vec(), vec![0; 18]].concat(), Malformed, "22");
    refused("one byte short", &file(GOOD, 15), Malformed, "end at byte");
}

#[test]
fn no_truncation_and_no_changed_byte_gets_through() {
    let whole = file(GOOD, 16);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for n in 0..whole.len() {
        assert_eq!(open_at(&path, &whole[..n]).unwrap_err().kind(), Malformed, "cut at {n}");
    }
    change_bytes(&whole, whole.len() - 16);
}

/// A directory with two shards, `a` in the first and `b` in the second.
fn shards() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (no, name) in [(1, "a"), (2, "b")] {
        let header = GOOD.replace("\"a\"", &format!("\"{name}\""));
        let path = dir.path().join(format!("model-{no:05}-of-00002.safetensors"));
        std::fs::write(path, file(&header, 16)).unwrap();
    }
    dir
}

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn shards_are_joined() {
    let dir = shards();
    let names = |path: &Path| -> Vec<String> {
        let opened = open(path, &Limits::default()).unwrap();
        opened.store.tensors().iter().map(|t| t.name.clone()).collect()
    };
    assert_eq!(names(dir.path()), ["a", "b"], "complete by its numbering");
    let (zeros, header) = ([0; 16], format!("{GOOD:<123}"));
    let odd = dir.path().join("odd");
    std::fs::write(&odd, [&123u64.to_le_bytes()[..], header.as_bytes(), &zeros].concat()).unwrap();
    assert_eq!(names(&odd), ["a"], "begins with a brace, and is no index");
    let index = json!({"metadata": {"total_size": 32}, "weight_map": {"b": SECOND, "a": FIRST}});
    std::fs::write(dir.path().join(INDEX), index.to_string()).unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join(INDEX), dir.path().join(SECOND)] {
        assert_eq!(names(&path), ["a", "b"]);
    }
    let limits = Limits { shards: 1, ..Limits::default() };
    assert_eq!(open(dir.path(), &limits).unwrap_err().kind(), Limit);
    let limits = Limits { tensors: 1, ..Limits::default() };
    assert_eq!(open(dir.path(), &limits).unwrap_err().kind(), Limit);

    std::fs::remove_file(dir.path().join(SECOND)).unwrap();
    let error = open(dir.path(), &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), Io);
    assert!(error.to_string().contains(SECOND), "{error}");
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    let error = open(dir.path(), &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), Io, "by the numbering alone");
    assert!(error.to_string().contains(SECOND), "{error}");
    std::fs::remove_file(dir.path().join(FIRST)).unwrap();
    assert_eq!(open(dir.path(), &Limits::default()).unwrap_err().kind(), Unsupported, "no weights");
}

#[test]
fn shards_of_two_sets_do_not_mix() {
    let dir = shards();
    std::fs::rename(dir.path().join(SECOND), dir.path().join("model-00002-of-00003.safetensors")).unwrap();
    std::fs::write(dir.path().join("model-00003-of-00003.safetensors"), file("{}", 0)).unwrap();
    assert_eq!(open(dir.path(), &Limits::default()).unwrap_err().kind(), Malformed);
    let shard = dir.path().join("model-00003-of-00003.safetensors");
    let error = open(&shard, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("model-00001-of-00003"), "{error}");
    std::fs::rename(dir.path().join(FIRST), dir.path().join("model-00001-of-00003.safetensors")).unwrap();
    open(dir.path(), &Limits::default()).unwrap();
    std::fs::write(dir.path().join("consolidated-00001-of-00001.safetensors"), b"not looked at").unwrap();
    open(dir.path(), &Limits::default()).unwrap();
}

#[test]
fn indexes() {
    let with = |index: &str| {
        let dir = shards();
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        open(dir.path(), &Limits::default())
    };
    let map = |a: &str| json!({"weight_map": {"a": a, "b": SECOND}}).to_string();
    with(&map(FIRST)).unwrap();
    for outside in
        ["../../../etc/passwd", "/etc/passwd", "..", ".", "", "x/y.safetensors", "C:\\x", "a\\b", "a\0b"]
    {
        let error = with(&map(outside)).expect_err(outside);
        assert_eq!(error.kind(), Malformed, "{outside:?}: {error}");
        assert!(error.to_string().contains("plain file name"), "{error}");
    }
    assert_eq!(with(&map("nope.safetensors")).unwrap_err().kind(), Io);
    for (case, index, says) in [
        ("no map", r#"{"metadata":{}}"#.to_string(), "weight_map"),
        ("list", r#"{"weight_map":["a"]}"#.into(), "index"),
        ("number", r#"{"weight_map":{"a":1}}"#.into(), "index"),
        ("no JSON", "weight_map".into(), "index"),
        ("name twice", format!(r#"{{"weight_map":{{"a":"{FIRST}","a":"{FIRST}"}}}}"#), "appears twice"),
        ("other shard", map(SECOND), "\"a\""),
        ("absent tensor", json!({"weight_map": {"a": FIRST, "b": SECOND, "zz": FIRST}}).to_string(), "zz"),
        ("surplus tensor", json!({"weight_map": {"a": FIRST}}).to_string(), ""),
    ] {
        match with(&index) {
            // A whole shard that the index does not name is not opened at all.
            Ok(opened) => assert!(case == "surplus tensor" && opened.store.tensors().len() == 1),
            Err(error) => {
                assert_eq!(error.kind(), Malformed, "{case}: {error}");
                assert!(error.to_string().contains(says), "{case}: {error}");
            }
        }
    }
}

#[test]
fn a_name_in_two_shards_is_refused() {
    let dir = shards();
    std::fs::copy(dir.path().join(FIRST), dir.path().join(SECOND)).unwrap();
    let error = open(dir.path(), &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), Malformed);
    assert!(error.to_string().contains("\"a\""), "{error}");
}
