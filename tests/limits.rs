//! The limits on what files may demand: each has an option that moves it, every command that reads models has the
//! option, and whoever runs into it is told.
#![cfg(unix)]

#[path = "common/raw.rs"]
mod raw;
#[path = "common/watched.rs"]
mod watched;

use std::fs;
use std::path::Path;

use qconv::limits::{Bound, Limits};
use raw::{Raw, kind};
use watched::qconv;

const OUT: &str = "out.gguf";

/// A directory with a GGUF file, the two shards of another, a safetensors file, a sharded checkpoint and its index.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: Vec<u8>| fs::write(dir.path().join(name), bytes).unwrap();
    let nested = [&0u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[1]].concat();
    put("model.gguf", Raw::valid().array("x.a", kind::ARRAY, 1, nested).bytes());
    for no in 0..2u16 {
        let mut shard = Raw::llama()
            .entry("split.no", kind::U16, no.to_le_bytes())
            .entry("split.count", kind::U16, 2u16.to_le_bytes())
            .entry("split.tensors.count", kind::I32, 2i32.to_le_bytes())
            .info(format!("t{no}"), &[8], 0, 0);
        shard.data = vec![0; 32];
        put(&format!("s-{:05}-of-00002.gguf", no + 1), shard.bytes());
    }
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    let file =
        |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    put("one.safetensors", file(header));
    put("model-00001-of-00002.safetensors", file(header));
    put("model-00002-of-00002.safetensors", file(&header.replace("\"a\"", "\"b\"")));
    let index =
        r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    put("model.safetensors.index.json", index.into());
    dir
}

/// Each limit, a file that runs into a low one, and that low one.
const CASES: &[(Bound, &str, &str)] = &[
    (Bound::Header, "model.gguf", "100"),
    (Bound::Header, "one.safetensors", "50"),
    (Bound::String, "model.gguf", "4"),
    (Bound::Tensors, "model.gguf", "2"),
    (Bound::Tensors, "s-00002-of-00002.gguf", "1"),
    (Bound::Tensors, "one.safetensors", "0"),
    (Bound::Tensors, "model.safetensors.index.json", "1"),
    (Bound::Metadata, "model.gguf", "4"),
    (Bound::Depth, "model.gguf", "1"),
    (Bound::Shards, "s-00001-of-00002.gguf", "1"),
    (Bound::Shards, "model-00002-of-00002.safetensors", "1"),
    (Bound::SideFile, "model.safetensors.index.json", "20"),
];

#[test]
fn limits_have_options_and_errors_name_them() {
    let dir = place();
    for &(bound, file, low) in CASES {
        let option = format!("--{}", bound.option());
        let run = qconv(dir.path(), &["inspect", file, &option, low]);
        assert_eq!(run.code, Some(2), "{}: {}", run.args, run.stderr);
        let hint = format!("hint: if the file is what it should be, {option} allows for more");
        assert!(run.stderr.contains(&hint), "{}: {}", run.args, run.stderr);
        // It is the option that did it: without, all is well.
        assert_eq!(qconv(dir.path(), &["inspect", file]).code, Some(0), "{file}");
    }
}

#[test]
fn limits_can_be_raised() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep.gguf");
    let level = [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat();
    let last = [0u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec(), vec![1]].concat();
    let deep = |n: usize| Raw::valid().entry("x", kind::ARRAY, [level.repeat(n - 1), last.clone()].concat());
    fs::write(&path, deep(3).bytes()).unwrap();
    let run = qconv(dir.path(), &["inspect", "deep.gguf"]);
    assert!(run.code == Some(2) && run.stderr.contains("--max-depth"), "{}", run.stderr);
    assert_eq!(qconv(dir.path(), &["inspect", "deep.gguf", "--max-depth", "3"]).code, Some(0));
    // Not so far that the stack would not last.
    let run = qconv(dir.path(), &["inspect", "deep.gguf", "--max-depth", "65"]);
    assert!(run.code == Some(2) && run.stderr.contains("64"), "{}", run.stderr);
    fs::write(&path, deep(64).bytes()).unwrap();
    assert_eq!(qconv(dir.path(), &["inspect", "deep.gguf", "--max-depth", "64"]).code, Some(0));
}

/// Commands that open a model by themselves obey, and write nothing.
#[test]
fn every_command_obeys() {
    let dir = place();
    let files = fs::read_dir(dir.path()).unwrap().count();
    for args in [
        &["inspect", "model.gguf"][..],
        &["quantize", "model.gguf", OUT, "-t", "f32"],
        &["gguf-to-hf", "model.gguf", "-o", "out"],
        &["verify", "model.gguf", "--no-forward"],
        &["diff", "model.gguf", "model.gguf"],
        &["merge", "s-00001-of-00002.gguf", OUT],
        &["pack", "model.gguf", "-o", "out.qpack"],
        &["gguf-to-coreml", "model.gguf", "-o", "out.mlpackage"],
    ] {
        let run = qconv(dir.path(), &[args, &["--max-tensors", "0"]].concat());
        println!("{}: {:?} {}", run.args, run.code, run.stderr);
        assert!(run.code.is_some_and(|code| code != 0), "{}: {}", run.args, run.stderr);
        let words = String::from_utf8_lossy(&run.stdout).into_owned() + &run.stderr;
        assert!(words.contains("at most 0 are allowed"), "{}: {words}", run.args);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files, "{}", run.args);
    }
    // Here it is what the shards are to hold.
    let run = qconv(dir.path(), &["split", "model.gguf", "t.gguf", "--max-tensors", "1", "-q"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(dir.path().join("t-00003-of-00003.gguf").exists());
    let run =
        qconv(dir.path(), &["split", "model.gguf", "u.gguf", "--max-tensors", "1", "--max-metadata", "4"]);
    assert!(run.code == Some(2) && run.stderr.contains("at most 4 are allowed"), "{}", run.stderr);
}

/// The library's callers give limits of their own, whatever the process says.
#[test]
fn the_library_is_told_by_its_caller() {
    let dir = place();
    let open = |limits: &Limits| qconv::Model::open(&dir.path().join("model.gguf"), limits).map(drop);
    assert_eq!(Limits::default(), Limits::STANDARD);
    open(&Limits::default()).unwrap();
    let error = open(&Limits { metadata_entries: 4, ..Limits::STANDARD }).unwrap_err();
    assert_eq!(error.kind(), qconv::ErrorKind::Limit);
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--max-metadata")));
}

/// What the specification says is so.
#[test]
fn defaults_are_written_down() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("formats/spec/gguf.md");
    let page = fs::read_to_string(page).unwrap();
    let row = |bound: Bound| {
        let option = format!("`--{}`", bound.option());
        page.lines().find(|l| l.contains(&option)).unwrap_or_else(|| panic!("no {option}"))
    };
    let Limits { header_bytes, string_bytes, tensors, metadata_entries, array_depth, shards, .. } =
        Limits::STANDARD;
    for (bound, value, says) in [
        (Bound::Header, header_bytes, "1 GiB"),
        (Bound::String, string_bytes, "64 MiB"),
        (Bound::Tensors, tensors, "2^20"),
        (Bound::Metadata, metadata_entries, "2^16"),
        (Bound::Depth, u64::from(array_depth), "2 deep"),
        (Bound::Shards, shards, "2^16"),
    ] {
        let said = match says.split(['^', ' ']).collect::<Vec<_>>()[..] {
            ["2", "deep"] => 2,
            ["2", n] => 1 << n.parse::<u32>().unwrap(),
            [n, unit] => n.parse::<u64>().unwrap() << if unit == "GiB" { 30 } else { 20 },
            _ => unreachable!(),
        };
        assert_eq!(value, said);
        assert!(row(bound).contains(says), "{}", row(bound));
    }
}
