//! Checkpoints of safetensors files: order, shards and how they are found, limits. Files and indexes that lie are in
//! `malformed_corpus.rs`; the decisions are those of `formats/spec/safetensors.md`.

#[path = "common/corpus/mod.rs"]
mod corpus;
#[path = "common/raw.rs"]
mod raw;

use std::path::Path;

use corpus::index::{FIRST, INDEX, SECOND};
use corpus::safetensors::{GOOD, file, with_length};
use qconv::ErrorKind::{Io, Limit, Malformed, Unsupported};
use qconv::Result;
use qconv::container::safetensors::{SafeTensors, open};
use qconv::limits::Limits;
use serde_json::json;

fn open_bytes(bytes: &[u8]) -> Result<SafeTensors> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    open(&path, &Limits::default())
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
    open_bytes(&file(&GOOD.replace("F32", "F8_E4M3").replace("16]", "4]"), 4)).unwrap();
}

#[test]
fn long_headers() {
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

/// A directory with two shards, `a` in the first and `b` in the second.
fn shards() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in corpus::index::shards() {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

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
fn a_name_in_two_shards_is_refused() {
    let dir = shards();
    std::fs::copy(dir.path().join(FIRST), dir.path().join(SECOND)).unwrap();
    let error = open(dir.path(), &Limits::default()).unwrap_err();
    assert_eq!(error.kind(), Malformed);
    assert!(error.to_string().contains("\"a\""), "{error}");
}
