//! `qconv verify X.qpack`: what is damaged is named, or the file refused with the reason.

mod common;
#[path = "common/qpack.rs"]
mod made;
#[path = "common/place.rs"]
mod place;

use std::fs;

use made::{example, file};
use place::Place;
use qconv::container::qpack::{Codebook, Encoding, Kept, Manifest, Scaled, Sparse, Tensor, Unknown};
use qconv::tensor::DType;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

fn whole() -> Vec<u8> {
    let (manifest, contents) = example();
    file(manifest, &contents, &[]).0
}

/// Exit code and what was said.
fn verify(place: &Place, bytes: &[u8], more: &[&str]) -> (i32, String) {
    fs::write(place.path("x.qpack"), bytes).unwrap();
    let output = place.qconv(&[&["verify", "x.qpack"], more].concat());
    assert!(output.stdout.is_empty() || more.contains(&"--json"));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn fails(place: &Place, bytes: &[u8], says: &str) {
    let (code, said) = verify(place, bytes, &["-q"]);
    assert!(
        code == 1 && said.contains("FAILED") && said.contains(says),
        "{says:?} was expected: {code} {said}"
    );
}

/// With a signature behind the manifest.
fn signed() -> Vec<u8> {
    let mut bytes = whole();
    let mut footer = bytes.split_off(bytes.len() - 128);
    bytes.extend(b"none\nsigned by nobody");
    footer[48..56].copy_from_slice(&21u64.to_le_bytes());
    footer[56..88].copy_from_slice(&Sha256::digest(b"none\nsigned by nobody"));
    bytes.extend(footer);
    bytes
}

#[test]
fn what_is_whole_passes() {
    let place = Place::new();
    let (code, said) = verify(&place, &signed(), &[]);
    assert_eq!(code, 0, "{said}");
    for words in [
        "ok  structure: 1 files, 3 tensors, 1 other files, signed",
        "ok  integrity: SHA-256 of 7 segments, 58 bytes",
        "ok  other files: 1 read",
        "ok  encodings: 3 tensors, 29 weights decoded",
    ] {
        assert!(said.contains(words), "{words:?} was expected: {said}");
    }
    let (code, said) = verify(&place, &whole(), &["-q"]);
    assert_eq!((code, said.as_str()), (0, ""));
    place.refuses(&["verify", "nowhere.qpack"], &["nowhere.qpack", "No such file"]);
    place.refuses(&["verify", "x.qpack", "--merge-lora", "y", "--against", "z"], &["of GGUF files"]);
}

/// One bit in each region of the file.
#[test]
fn a_flipped_bit_is_named() {
    let place = Place::new();
    let bytes = signed();
    let places: Vec<usize> = example().0.places().unwrap().iter().map(|p| *p as usize).collect();
    let manifest = *places.last().unwrap();
    let flipped = |at: usize| {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        flipped
    };
    let names = [
        "file \"config.json\"",
        "tensor \"norm\", part \"data\"",
        "tensor \"q\", part \"codes\"",
        "tensor \"q\", part \"scales\"",
        "tensor \"q\", part \"zeros\"",
        "tensor \"t\", part \"codes\"",
        "tensor \"t\", part \"scales\"",
    ];
    for (at, name) in places.iter().zip(names) {
        fails(&place, &flipped(*at), &format!("integrity: {name} is damaged"));
        fails(&place, &flipped(at + 63), &format!("integrity: the zeros behind {name} is damaged"));
    }
    let footer = bytes.len() - 128;
    fails(&place, &flipped(footer - 3), "integrity: the signature is damaged");
    fails(&place, &flipped(footer + 60), "integrity: the signature is damaged");
    for (at, says) in [
        (0, "structure: x.qpack: is no .qpack file: it begins otherwise"),
        (9, "structure: x.qpack: is of version"),
        (40, "structure: x.qpack: byte 40 of its header is not 0"),
        (manifest, "structure: x.qpack: its manifest has another SHA-256"),
        (manifest + 100, "structure: x.qpack: its manifest has another SHA-256"),
        (footer, "structure: x.qpack: its manifest should have"),
        (footer + 8, "structure: x.qpack: its manifest should have"),
        (footer + 20, "structure: x.qpack: its manifest has another SHA-256"),
        (footer + 48, "structure: x.qpack: its manifest should have"),
        (footer + 89, "structure: x.qpack: is of version"),
        (footer + 100, "structure: x.qpack: bytes of its footer"),
        (footer + 127, "structure: x.qpack: does not end as a .qpack file"),
    ] {
        fails(&place, &flipped(at), says);
    }
}

#[test]
fn cut_grown_and_moved() {
    let place = Place::new();
    let bytes = whole();
    fails(&place, &bytes[..150], "structure: x.qpack: has 150 bytes, a .qpack file at least 192");
    fails(&place, &bytes[..bytes.len() - 1], "does not end as a .qpack file");
    fails(&place, &bytes[..bytes.len() / 2], "does not end as a .qpack file");
    fails(&place, &[&bytes[..], b"x"].concat(), "does not end as a .qpack file");
    let missing = [&bytes[..128], &bytes[192..]].concat();
    fails(&place, &missing, "its manifest should have");
    let swapped = [&bytes[..192], &bytes[256..320], &bytes[192..256], &bytes[320..]].concat();
    fails(&place, &swapped, "tensor \"q\", part \"codes\" is damaged");
    fails(&place, &swapped, "tensor \"q\", part \"scales\" is damaged");
}

/// SHA-256 that are right do not help.
#[test]
fn codes_that_mean_nothing() {
    let place = Place::new();
    let (manifest, contents) = example();
    let with = |segment: usize, content: &[u8]| {
        let mut contents = contents.clone();
        contents[segment] = content.to_vec();
        file(manifest.clone(), &contents, &[]).0
    };
    fails(
        &place,
        &with(5, &[243, 8, 121, 0]),
        "encodings: tensor \"t\": a byte of its codes holds no ternary",
    );
    fails(
        &place,
        &with(3, &[0, 0x7C, 0, 0x40, 0, 0x38, 0, 0xBC]),
        "encodings: tensor \"q\": 4 values are NaN",
    );
    fails(
        &place,
        &with(0, b"{\"model_type\": \"none\""),
        "other files: config.json: is not the JSON expected",
    );
    // NaN in what is stored as it was is noted.
    let (code, said) = verify(&place, &with(1, &[0xFF; 12]), &[]);
    assert!(code == 0 && said.contains("tensor \"norm\" has 3 that are NaN or infinite"), "{said}");

    let one = |tensor: Tensor, contents: Vec<Vec<u8>>| {
        file(Manifest { tensors: vec![tensor], ..Manifest::default() }, &contents, &[]).0
    };
    let scaled = Scaled { dtype: DType::I8, block: [1, 2], scales: DType::F8_E8M0, divisor: 1 };
    let scaled = Tensor::new("w", vec![1, 2], Encoding::Scaled(scaled)).unwrap();
    fails(&place, &one(scaled, vec![vec![1, 2], vec![255]]), "a scale is 255, which is no number");
    let sparse = Sparse { block: [1, 8], scales: DType::F16 };
    let mut sparse = Tensor::new("w", vec![1, 8], Encoding::Sparse(sparse)).unwrap();
    sparse.parts[2].segment.bytes = 1;
    let starts = [7u64, 1].iter().flat_map(|n| n.to_le_bytes()).collect();
    fails(&place, &one(sparse, vec![vec![1], starts, vec![1], vec![0, 0x3C]]), "encodings: tensor \"w\"");
    let codebook = Codebook {
        bits: 1,
        block: [1, 2],
        flat: false,
        scales: None,
        nested: None,
        table: DType::F32,
        tables: [1, 2],
    };
    let codebook = Tensor::new("w", vec![1, 2], Encoding::Codebook(codebook)).unwrap();
    let table = [1.0, f32::NAN].iter().flat_map(|x: &f32| x.to_le_bytes()).collect();
    fails(&place, &one(codebook, vec![vec![2], table]), "tensor \"w\": 1 values are NaN");

    // What a later version wrote is not judged.
    let mut later = Tensor::new("w", vec![1], Encoding::Plain(DType::F32)).unwrap();
    later.encoding = Encoding::Unknown(Unknown { kind: "later".into(), more: Kept::default() });
    let (code, said) = verify(&place, &one(later, vec![vec![1; 4]]), &[]);
    assert!(code == 0 && said.contains("skipped  encodings: tensor \"w\": encoding \"later\""), "{said}");
}

#[test]
fn beside_its_source() {
    let place = Place::new();
    for model in ["models/fmt-gptq4", "models/llama", "models/gpt_oss-mxfp4"] {
        let source = common::fixture(model);
        let packed = made::of_directory(&source);
        let (code, said) = verify(&place, &packed, &["--against", source.to_str().unwrap()]);
        assert!(code == 0 && said.contains("tensors equal to those of the source"), "{model}: {said}");
        if model == "models/fmt-gptq4" {
            assert!(said.contains("ok  origins:"), "{said}");
        }
        // Beside itself, and another.
        fs::copy(place.path("x.qpack"), place.path("y.qpack")).unwrap();
        assert_eq!(verify(&place, &packed, &["-q", "--against", "y.qpack"]), (0, String::new()));
    }
    let llama = common::fixture("models/llama");
    let (code, said) = verify(&place, &whole(), &["--against", llama.to_str().unwrap(), "-q"]);
    assert!(code == 1 && said.contains("tensor \"norm\" is not in the source"), "{said}");
    assert!(said.contains("tensor \"model.embed_tokens.weight\" of the source is missing"), "{said}");

    // The same with one value changed.
    let (manifest, mut contents) = example();
    fs::write(place.path("y.qpack"), whole()).unwrap();
    contents[1][3] = 0x40; // 1.0 becomes 3.0
    contents[1][2] = 0x40;
    let changed = file(manifest.clone(), &contents, &[]).0;
    let (code, said) = verify(&place, &changed, &["--against", "y.qpack", "-q"]);
    assert!(code == 1 && said.contains("tensor \"norm\": 1 values are not those of the source"), "{said}");
    // What is rounded may differ, within reason.
    let (manifest, mut contents) = example();
    contents[2][0] ^= 1;
    let rounded = file(manifest, &contents, &[]).0;
    let (code, said) = verify(&place, &rounded, &["--against", "y.qpack"]);
    assert!(
        code == 0 && said.contains("2 tensors equal to those of the source, 1 rounded; worst q"),
        "{said}"
    );
    place.refuses(&["verify", "y.qpack", "--against", "nowhere"], &["nowhere", "No such file"]);
}

#[test]
fn origins_that_do_not_fit() {
    let place = Place::new();
    let bytes = made::of_directory(&common::fixture("models/fmt-gptq4"));
    fs::write(place.path("x.qpack"), &bytes).unwrap();
    let model = qconv::container::qpack::Qpack::open(place.path("x.qpack"), &Default::default()).unwrap();
    let manifest = model.manifests().next().unwrap().1.clone();
    let places = manifest.places().unwrap();
    let contents: Vec<Vec<u8>> = manifest
        .segments()
        .zip(places)
        .map(|(s, at)| bytes[at as usize..][..s.bytes as usize].to_vec())
        .collect();
    let with = |change: &dyn Fn(&mut Json)| {
        let mut manifest = manifest.clone();
        let made = manifest.tensors.iter_mut().find(|t| t.origin.is_some()).unwrap();
        let mut origin = made.origin.as_ref().unwrap().value();
        change(&mut origin);
        made.origin = Some((&origin).into());
        file(manifest, &contents, &[]).0
    };
    assert_eq!(verify(&place, &with(&|_| {}), &["-q"]), (0, String::new()));
    fails(&place, &with(&|o| o["parts"] = json!([])), "origins: ");
    fails(&place, &with(&|o| o["parts"][0]["from"] = json!("nothing")), "its origin names \"nothing\"");
    fails(&place, &with(&|o| o["parts"][0]["shape"] = json!([1, 1])), "origins: ");
    fails(&place, &with(&|o| o["parts"][0]["shape"] = json!([100_000, 100])), "origins: ");
    let (code, said) = verify(&place, &with(&|o| o["layout"] = json!("later")), &[]);
    assert!(code == 0 && said.contains("layout \"later\" is not known to this version"), "{said}");
}

#[test]
fn json_names_all() {
    let place = Place::new();
    let mut bytes = whole();
    bytes[64] ^= 1;
    bytes[130] ^= 1;
    fs::write(place.path("x.qpack"), &bytes).unwrap();
    for threads in ["1", "3"] {
        let output = place.qconv(&["verify", "x.qpack", "--json", "-q", "-j", threads]);
        assert_eq!(output.status.code(), Some(1));
        let report: Json = serde_json::from_slice(&output.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let failed: Vec<&str> =
            checks.iter().filter(|c| c["outcome"] == "failed").filter_map(|c| c["detail"].as_str()).collect();
        assert_eq!(failed, ["file \"config.json\" is damaged", "tensor \"norm\", part \"data\" is damaged"]);
    }
}
