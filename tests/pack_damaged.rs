//! What is damaged, or lies about itself, is neither unpacked nor packed anew.

mod common;
#[path = "common/qpack.rs"]
mod made;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::Path;

use common::fixture;
use place::Place;
use qconv::container::qpack::{Encoding, Kept, Manifest, Qpack, Segment, SideFile, Tensor, Unknown};
use qconv::convert::{Budget, FromQpack, Silent, ToQpack};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::json;

fn unpack(source: &Path, output: &Path) -> Result<(), Error> {
    let job = FromQpack { output: Some(output.into()), ..FromQpack::new(source) }.plan()?;
    job.run(true, &Budget::new(Some(2), None)?, &Silent).map(drop)
}

fn pack(source: &Path, output: &Path) -> Result<(), Error> {
    let job = ToQpack { output: Some(output.into()), ..ToQpack::new(source) }.plan()?;
    job.run(true, &Budget::new(Some(2), None)?, &Silent).map(drop)
}

/// A file with a plain tensor and these side files.
fn with_files(dir: &Path, tensors: &[&str], files: &[(&str, Vec<u8>)]) -> std::path::PathBuf {
    let tensor = |name: &&str| Tensor::new(*name, vec![2], Encoding::Plain(DType::F32)).unwrap();
    let file = |(name, bytes): &(&str, Vec<u8>)| SideFile {
        name: name.to_string(),
        segment: Segment::plain(bytes.len() as u64),
    };
    let manifest = Manifest {
        tensors: tensors.iter().map(tensor).collect(),
        files: files.iter().map(file).collect(),
        ..Manifest::default()
    };
    let data = tensors.iter().map(|_| vec![0, 0, 128, 63, 0, 0, 0, 64]);
    let contents = files.iter().map(|(_, bytes)| bytes.clone()).chain(data).collect();
    let path = dir.join("made.qpack");
    fs::write(&path, made::file(manifest, &contents, &[]).0).unwrap();
    path
}

fn header(tensors: &[(&str, u64)]) -> Vec<u8> {
    let entry = |(name, at): &(&str, u64)| {
        (name.to_string(), json!({"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]}))
    };
    let text = serde_json::Value::Object(tensors.iter().map(entry).collect()).to_string();
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn a_flipped_bit_is_not_passed_on() {
    let place = Place::new();
    let source = fixture("models/llama");
    place.succeeds(&["pack", source.to_str().unwrap(), "-o", "x.qpack", "-q"]);
    let mut bytes = fs::read(place.path("x.qpack")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(place.path("x.qpack"), &bytes).unwrap();
    let says = ["tensor \"model.", "SHA-256"];
    place.refuses(&["unpack", "x.qpack", "-o", "back", "-q"], &says);
    place.refuses(&["pack", "x.qpack", "-o", "y.qpack", "-q"], &says);
    place.refuses(&["pack", "x.qpack", "--compress", "-o", "y.qpack", "-q"], &says);
    place.refuses(&["hf-to-gguf", "x.qpack", "-o", "y.gguf", "-q"], &says);
    place.refuses(&["convert", "x.qpack", "--to", "fp8", "-o", "y", "-q"], &says);
    place.refuses(&["pack", "x.qpack", "--encoding", "int8", "-o", "y.qpack", "-q"], &says);
    let output = place.qconv(&["verify", "x.qpack"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn inputs_are_not_overwritten() {
    let place = Place::new();
    place.succeeds(&["pack", fixture("models/llama").to_str().unwrap(), "-o", "x.qpack", "-q"]);
    place.succeeds(&["unpack", "x.qpack", "-o", "d", "-q"]);
    for more in [&[][..], &["--compress"]] {
        for (source, output) in [("d", "d/model.safetensors"), ("x.qpack", "x.qpack")] {
            let args = [&["pack", source, "-o", output, "--force", "-q"][..], more].concat();
            place.refuses(&args, &["its own input"]);
        }
    }
}

/// The same model, wherever one stands and however it is called.
#[test]
fn files_are_known_by_any_name() {
    let place = Place::new();
    place.succeeds(&["pack", fixture("models/llama").to_str().unwrap(), "-o", "x.qpack", "-q"]);
    place.succeeds(&["unpack", "x.qpack", "-o", "d", "-q"]);
    fs::write(place.path("d/.hidden"), "x").unwrap();
    let here = std::process::Command::new(env!("CARGO_BIN_EXE_qconv"))
        .args(["pack", "model.safetensors", "-o", "../y.qpack"])
        .current_dir(place.path("d"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&here.stderr);
    assert!(here.status.success() && said.contains("1 files are left out: .hidden"), "{said}");
    place.succeeds(&["unpack", "y.qpack", "-o", "again", "-q"]);
    fs::remove_file(place.path("d/.hidden")).unwrap();
    place.succeeds(&["diff", "d", "again"]);
    assert_eq!(
        fs::read(place.path("d/model.safetensors")).unwrap(),
        fs::read(place.path("again/model.safetensors")).unwrap()
    );
    // Weights alone keep their name too.
    fs::create_dir(place.path("lone")).unwrap();
    fs::copy(place.path("d/model.safetensors"), place.path("lone/w.safetensors")).unwrap();
    place.succeeds(&["pack", "lone/w.safetensors", "-o", "w.qpack", "-q"]);
    place.succeeds(&["unpack", "w.qpack", "-o", "w", "-q"]);
    assert_eq!(
        fs::read(place.path("w/w.safetensors")).unwrap(),
        fs::read(place.path("lone/w.safetensors")).unwrap()
    );
}

#[test]
fn headers_that_lie() {
    let dir = tempfile::tempdir().unwrap();
    let check = |tensors: &[&str], files: &[(&str, Vec<u8>)], says: &str| {
        let e = unpack(&with_files(dir.path(), tensors, files), &dir.path().join("out")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Malformed, "{says}: {e}");
        assert!(e.to_string().contains(says), "{says:?} is not in {e}");
        assert!(!dir.path().join("out").exists());
    };
    let config = ("config.json", b"{}".to_vec());
    let twice = [
        (".qpack/headers/a.safetensors", header(&[("w", 0)])),
        (".qpack/headers/b.safetensors", header(&[("w", 0)])),
    ];
    check(&["w"], &twice, "headers of two files");
    check(&["w"], &[(".qpack/headers/config.json", header(&[("w", 0)]))], "no name of a safetensors file");
    let own = [(".qpack/headers/a.safetensors", header(&[("w", 0)])), ("A.safetensors", vec![1])];
    check(&["w"], &own, "name of another");
    check(&["w"], &[config.clone(), (".qpack/headers/a.safetensors", vec![9; 30])], "header");
    // Headers of other tensors are no use.
    let other = [config, (".qpack/headers/a.safetensors", header(&[("v", 0)]))];
    unpack(&with_files(dir.path(), &["w"], &other), &dir.path().join("out")).unwrap();
    assert!(dir.path().join("out/model.safetensors").exists());
}

/// What is not known is kept, even where it seems to be nothing.
#[test]
fn unknown_encodings_keep_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let future = Unknown { kind: "future".into(), more: Kept::default() };
    let mut tensor = Tensor::new("w", vec![4], Encoding::Plain(DType::F32)).unwrap();
    tensor.shape = vec![0, 4];
    tensor.encoding = Encoding::Unknown(future);
    let manifest = Manifest { tensors: vec![tensor], ..Manifest::default() };
    let content: Vec<u8> = (1..=16).collect();
    let [source, packed] = ["a.qpack", "b.qpack"].map(|n| dir.path().join(n));
    fs::write(&source, made::file(manifest, &vec![content.clone()], &[]).0).unwrap();
    pack(&source, &packed).unwrap();
    let (store, _) = Qpack::open(&packed, &Limits::default()).unwrap().into_parts().unwrap();
    assert_eq!(store.read_all(&store.tensors()[0]).unwrap(), content);
    assert!(unpack(&packed, &dir.path().join("out")).is_err());
}
