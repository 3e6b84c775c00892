//! `.qpack` files that are damaged, or made to deceive: each is refused with its reason.

#[path = "common/qpack.rs"]
mod made;

use std::fs;
use std::path::Path;

use made::{Contents, example, file};
use qconv::container::qpack::{
    Codebook, Compression, Encoding, Integers, MAX_COLS, Manifest, Origin, Qpack, Segment, ShardSeal, Source,
    Sparse, Split, Tensor, Ternary, Trits, Zeros,
};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;
use qconv::packed::qpack::{open, restore};
use qconv::tensor::DType;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

fn whole() -> Vec<u8> {
    let (manifest, contents) = example();
    file(manifest, &contents, &[]).0
}

fn at(dir: &Path, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.join("x.qpack");
    fs::write(&path, bytes).unwrap();
    path
}

fn opened(bytes: &[u8]) -> Result<Qpack, Error> {
    let dir = tempfile::tempdir().unwrap();
    Qpack::open(at(dir.path(), bytes), &Limits::default())
}

fn refused(bytes: &[u8], kind: ErrorKind, words: &str) {
    let e = opened(bytes).unwrap_err();
    assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
    assert!(e.path().is_some());
}

/// A file whose manifest is this text, with the right SHA-256.
fn with_manifest(text: &str, contents: &Contents) -> Vec<u8> {
    let bytes = whole();
    let mut out = bytes[..64].to_vec();
    for content in contents {
        out.extend(content);
        out.resize(out.len().next_multiple_of(64), 0);
    }
    let at = out.len() as u64;
    out.extend(text.bytes());
    let mut footer = bytes[bytes.len() - 128..].to_vec();
    footer[..8].copy_from_slice(&at.to_le_bytes());
    footer[8..16].copy_from_slice(&(text.len() as u64).to_le_bytes());
    footer[16..48].copy_from_slice(&Sha256::digest(text));
    out.extend(footer);
    out
}

/// The example's manifest as JSON, changed.
fn changed(change: impl FnOnce(&mut Json)) -> Vec<u8> {
    let (manifest, contents) = example();
    let mut json: Json = serde_json::from_slice(&manifest.bytes().unwrap()).unwrap();
    change(&mut json);
    // Keys are in order already, but for what was put in.
    let mut json: Json = serde_json::from_str(&json.to_string()).unwrap();
    sort(&mut json);
    with_manifest(&json.to_string(), &contents)
}

fn sort(value: &mut Json) {
    match value {
        Json::Object(map) => {
            map.sort_keys();
            map.values_mut().for_each(sort);
        }
        Json::Array(list) => list.iter_mut().for_each(sort),
        _ => {}
    }
}

#[test]
fn the_example_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = at(dir.path(), &whole());
    let model = Qpack::open(&path, &Limits::default()).unwrap();
    assert!(model.verify(2, &|_| true).unwrap().is_empty());
    assert_eq!(model.read_file("config.json", &Limits::default()).unwrap(), br#"{"model_type": "none"}"#);
    let (store, tensors) = open(&path, &Limits::default()).unwrap();
    assert_eq!(tensors.len(), 3);
    let read = |name: &str| {
        let bytes = store.read_all(store.get(name).unwrap()).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(read("norm"), [1.0, 2.0, 3.0]);
    // Scales 1, 2; 0.5, -1. Zeros 3 + 1, 4 + 1; 7 + 1, 0 + 1.
    assert_eq!(read("q"), [-4.0, -3.0, -2.0, -1.0, -2.0, 0.0, -0.5, -1.0, -1.5, -2.0, -2.0, -1.0]);
    assert_eq!(read("t"), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, -2.0]);
}

#[test]
fn any_flipped_bit_is_found() {
    let bytes = whole();
    let (manifest, _) = example();
    let places = manifest.places().unwrap();
    let (mut refusals, mut found) = (0, 0);
    let dir = tempfile::tempdir().unwrap();
    for at_byte in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at_byte] ^= 1 << (at_byte % 8);
        let path = at(dir.path(), &flipped);
        let inside = (64..*places.last().unwrap() as usize).contains(&at_byte);
        match Qpack::open(&path, &Limits::default()) {
            Err(e) => {
                assert!(!inside, "byte {at_byte}: {e}");
                refusals += 1;
            }
            Ok(model) => {
                let faults = model.verify(2, &|_| true).unwrap();
                assert_eq!(faults.len(), 1, "byte {at_byte}");
                let shown = faults[0].part.to_string();
                let segment = places.iter().rposition(|p| *p as usize <= at_byte).unwrap();
                let name = ["config.json", "norm", "\"q\"", "\"q\"", "\"q\"", "\"t\"", "\"t\""].get(segment);
                match inside {
                    true => assert!(shown.contains(name.unwrap()), "byte {at_byte}: {shown}"),
                    false => assert_eq!(shown, "the signature", "byte {at_byte}"),
                }
                found += 1;
            }
        }
    }
    assert_eq!(found, places.last().unwrap() - 64 + 32);
    assert!(refusals > 1000, "{refusals}");
}

#[test]
fn every_other_length_is_refused() {
    let bytes = whole();
    for len in 0..bytes.len() {
        assert!(opened(&bytes[..len]).is_err(), "{len} bytes");
    }
    for more in 1..200 {
        let mut longer = bytes.clone();
        longer.resize(bytes.len() + more, 0);
        refused(&longer, ErrorKind::Malformed, "does not end as a .qpack file");
    }
    refused(&bytes[..191], ErrorKind::Malformed, "at least 192");
    refused(&bytes[..bytes.len() - 1], ErrorKind::Malformed, "does not end");
    // A part in the middle is missing, or there twice.
    let missing = [&bytes[..128], &bytes[192..]].concat();
    refused(&missing, ErrorKind::Malformed, "and the file ends at");
    let twice = [&bytes[..192], &bytes[128..]].concat();
    refused(&twice, ErrorKind::Malformed, "and the file ends at");
}

#[test]
fn segments_that_change_places_are_found() {
    let bytes = whole();
    let dir = tempfile::tempdir().unwrap();
    // The third and the fourth have 64 bytes each with their zeros.
    let swapped = [&bytes[..192], &bytes[256..320], &bytes[192..256], &bytes[320..]].concat();
    let model = Qpack::open(at(dir.path(), &swapped), &Limits::default()).unwrap();
    let faults: Vec<String> =
        model.verify(2, &|_| true).unwrap().iter().map(|f| f.part.to_string()).collect();
    assert!(
        faults.iter().any(|f| f.contains("codes")) && faults.iter().any(|f| f.contains("scales")),
        "{faults:?}"
    );
    // In the manifest as well: these are no longer the parts of the encoding.
    let swapped = changed(|m| m["tensors"][1]["parts"].as_array_mut().unwrap().swap(0, 1));
    refused(&swapped, ErrorKind::Malformed, "its part \"codes\" is missing, or not in its place");
}

#[test]
fn versions_and_magic() {
    let bytes = whole();
    let with = |at: usize, byte: u8| {
        let mut other = bytes.clone();
        other[at] = byte;
        other
    };
    refused(&with(0, b'x'), ErrorKind::Malformed, "is no .qpack file");
    refused(&with(8, 2), ErrorKind::Unsupported, "is of version 2, versions up to 1 are read");
    refused(&with(8, 0), ErrorKind::Malformed, "version 0");
    refused(&with(20, 1), ErrorKind::Malformed, "byte 20 of its header is not 0");
    let footer = bytes.len() - 128;
    refused(&with(footer + 88, 3), ErrorKind::Unsupported, "is of version 3");
    refused(&with(footer + 100, 3), ErrorKind::Malformed, "footer");
    refused(&with(footer + 16, bytes[footer + 16] ^ 1), ErrorKind::Malformed, "another SHA-256");
    for (field, value) in [(0, u64::MAX), (0, 0), (0, 65), (8, u64::MAX), (48, u64::MAX), (48, 1)] {
        let mut other = bytes.clone();
        other[footer + field..][..8].copy_from_slice(&value.to_le_bytes());
        refused(&other, ErrorKind::Malformed, "and the file ends at");
    }
    // Text mode changes line ends.
    let text: Vec<u8> = bytes.iter().copied().filter(|b| *b != b'\r').collect();
    refused(&text, ErrorKind::Malformed, "is no .qpack file");
}

#[test]
fn manifests_that_are_no_canonical_json() {
    let (manifest, contents) = example();
    let text = String::from_utf8(manifest.bytes().unwrap()).unwrap();
    assert!(opened(&with_manifest(&text, &contents)).is_ok());
    for other in [
        format!("{text}\n"),
        format!(" {text}"),
        text.replacen("\"files\":", "\"files\": ", 1),
        text.replacen("\"name\":\"q\"", "\"name\":\"q\",\"name\":\"q\"", 1),
        text.replacen("\"bytes\":12", "\"bytes\":12.0", 1),
        text.replacen("norm", "\\u006eorm", 1),
    ] {
        assert_ne!(other, text);
        refused(&with_manifest(&other, &contents), ErrorKind::Malformed, "its manifest");
    }
}

#[test]
fn manifests_that_deceive() {
    let set = |path: &'static str, value: Json| {
        changed(move |m| {
            let (at, key) = path.rsplit_once('/').unwrap();
            m.pointer_mut(at).unwrap()[key] = value;
        })
    };
    let bad = |path: &'static str, value: Json, words: &str| {
        refused(&set(path, value), ErrorKind::Malformed, words);
    };
    bad("/tensors/0/name", json!("q"), "tensor \"q\" appears twice");
    bad("/tensors/0/name", json!(""), "the name \"\"");
    bad("/tensors/0/name", json!("a\nb"), "control characters");
    bad("/tensors/0/name", json!("x".repeat(1025)), "too long");
    bad("/tensors/0/shape", json!([4]), "has 12 bytes, F32 of shape [4] has 16");
    bad("/tensors/0/shape", json!([1u64 << 40, 1u64 << 40]), "more than 2^63");
    bad("/tensors/0/shape", json!(["a"]), "shape that are no numbers");
    bad("/tensors/0/encoding/type", json!("F31"), "type = \"F31\"");
    bad("/tensors/0/encoding/type", json!("f32"), "type = \"f32\"");
    bad("/tensors/0/encoding/more", json!(1), "has a field \"more\"");
    bad("/tensors/0/parts/0/bytes", json!(13), "has 13 bytes");
    bad("/tensors/0/parts/0/bytes", json!(MAX), "bytes, F32 of shape");
    bad("/tensors/0/parts/0/sha256", json!("00"), "sha256 = \"00\"");
    bad("/tensors/0/parts/0/sha256", json!("A".repeat(64)), "sha256");
    bad("/tensors/0/parts/0/name", json!("date"), "its part \"data\" is missing");
    bad("/tensors/1/encoding/bits", json!(9), "bits = 9");
    bad("/tensors/1/encoding/bits", json!(0), "bits = 0");
    bad("/tensors/1/encoding/bits", json!(7), "its part");
    bad("/tensors/1/encoding/block", json!([1, 7]), "block = [1, 7] of 2 rows of 6");
    bad("/tensors/1/encoding/block", json!([0, 6]), "block = [0,6]");
    bad("/tensors/1/encoding/block", json!([1]), "block = [1]");
    bad("/tensors/1/encoding/scales", json!("F64"), "scales = \"F64\"");
    bad("/tensors/1/encoding/zeros", json!("none"), "zeros = \"none\"");
    bad("/tensors/1/encoding/zeros", json!("middle"), "\"integers\" has no part \"zeros\"");
    bad("/tensors/1/encoding/g_idx", json!(true), "its part \"g_idx\" is missing");
    bad("/tensors/1/shape", json!([2, 0]), "has no elements");
    bad("/tensors/2/encoding/packing", json!("base4"), "packing = \"base4\"");
    bad("/files/0/name", json!("../config.json"), "no plain path");
    for name in ["/etc/x", "a//b", "a/./b", "C:x", "a\\b", "a/", "nul. "] {
        bad("/files/0/name", json!(name), "no plain path");
    }
    bad("/files/0/bytes", json!(200), "its segments end at");
    bad("/provenance", json!([]), "provenance");
    bad("/split", json!({"no": 1, "count": 1}), "count = 1");
    bad("/split", json!({"no": 3, "count": 2}), "file 3 of 2");
    bad("/split", json!({"no": 2, "count": 2}), "names 0 others");
    let twice = changed(|m| {
        let files = m["files"].as_array_mut().unwrap();
        let mut again = files[0].clone();
        again["name"] = json!("CONFIG.json");
        files.push(again);
    });
    refused(&twice, ErrorKind::Malformed, "is there twice");
    let dims = set("/tensors/0/shape", json!([3, 1, 1, 1, 1, 1, 1, 1, 1]));
    refused(&dims, ErrorKind::Limit, "9 dimensions");
    let missing = changed(|m| drop(m.as_object_mut().unwrap().remove("tensors")));
    refused(&missing, ErrorKind::Malformed, "manifest has no tensors");
    // So is what takes many times its bytes.
    let many = |n: usize| Json::from(vec![0; n]);
    for (path, most) in [("/tensors/0/future", 4096), ("/files/0/shape", 4096), ("/future", 1 << 20)] {
        refused(&set(path, many(most)), ErrorKind::Limit, &format!("more than {most} JSON values"));
    }
    // What is unknown outside of encodings is passed over, and kept.
    for path in ["/future", "/tensors/0/future", "/files/0/future"] {
        assert!(opened(&set(path, json!({"a": [1]}))).is_ok(), "{path}");
    }
    let few = Limits { tensors: 2, ..Limits::default() };
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Qpack::open(at(dir.path(), &whole()), &few).unwrap_err().kind(), ErrorKind::Limit);
    let short = Limits { header_bytes: 100, ..Limits::default() };
    assert_eq!(Qpack::open(at(dir.path(), &whole()), &short).unwrap_err().kind(), ErrorKind::Limit);
}

/// What is not known is written again as it was.
#[test]
fn what_is_not_known_is_kept() {
    let bytes = changed(|m| {
        m["future"] = json!([1]);
        m["tensors"][0]["future"] = json!({"b": [1, {}], "a": "é"});
        m["tensors"][1]["origin"] = json!({"later": null});
        m["tensors"][2]["encoding"] = json!({"kind": "spiral", "turns": 3});
    });
    let (place, length) = (&bytes[bytes.len() - 128..][..8], &bytes[bytes.len() - 120..][..8]);
    let [place, length] = [place, length].map(|b| u64::from_le_bytes(b.try_into().unwrap()) as usize);
    let model = opened(&bytes).unwrap();
    let (_, manifest) = model.manifests().next().unwrap();
    assert!(manifest.bytes().unwrap() == bytes[place..][..length]);
    let found = &manifest.tensors;
    assert_eq!(found[0].more.fields()["future"], json!({"a": "é", "b": [1, {}]}));
    assert_eq!(found[1].origin.as_ref().unwrap().value(), json!({"later": null}));
    assert_eq!(manifest.more.value(), json!({"future": [1]}));
}

const MAX: u64 = (1 << 53) - 1;

#[test]
fn what_is_not_known_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = changed(|m| {
        m["tensors"][2]["encoding"] = json!({"kind": "spiral", "turns": 3});
        // Its SHA-256 is not set here.
        m["files"][0]["name"] = json!("notes.json");
    });
    let (store, tensors) = open(at(dir.path(), &unknown), &Limits::default()).unwrap();
    let names: Vec<&str> = store.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["norm", "q", "t / codes", "t / scales"]);
    assert_eq!(tensors[2].encoding.kind(), "spiral");
    assert_eq!(store.read_all(store.get("t / codes").unwrap()).unwrap(), [242, 8, 121, 0]);
    let (mut manifest, contents) = example();
    manifest.tensors[0].parts[0].segment = Segment {
        bytes: 12,
        sha256: [0; 32],
        compression: Some(Compression {
            kind: "squeeze".into(),
            bytes: 12,
            sha256: [0; 32],
            more: Default::default(),
        }),
    };
    let (bytes, _) = file(manifest, &contents, &[]);
    let path = at(dir.path(), &bytes);
    assert!(Qpack::open(&path, &Limits::default()).unwrap().verify(2, &|_| true).unwrap().is_empty());
    let (store, _) = open(&path, &Limits::default()).unwrap();
    let names: Vec<&str> = store.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["norm / data", "q", "t"]);
}

#[test]
fn codes_that_mean_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let read = |contents: &dyn Fn(&mut Contents), change: &dyn Fn(&mut Manifest)| {
        let (mut manifest, mut bytes) = example();
        contents(&mut bytes);
        change(&mut manifest);
        let (store, _) = open(at(dir.path(), &file(manifest, &bytes, &[]).0), &Limits::default()).unwrap();
        let name = ["q", "t"].map(|n| store.read_all(store.get(n).unwrap()));
        name.into_iter().find_map(Result::err).map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(read(&|_| {}, &|_| {}), "");
    let e = read(&|c| c[5][0] = 243, &|_| {});
    assert!(e.contains("\"t\"") && e.contains("no ternary digits"), "{e}");
    let e = read(&|c| c[5][1] = 9, &|_| {});
    assert!(e.contains("no ternary digits"), "{e}");
    let bits2 = |m: &mut Manifest| {
        m.tensors[2].encoding =
            Encoding::Ternary(Ternary { packing: Trits::Bits2, block: [1, 7], scales: DType::BF16 });
    };
    let e = read(&|c| c[5] = vec![0, 0, 0b1100, 0], &bits2);
    assert!(e.contains("no ternary digits"), "{e}");
    let list = |m: &mut Manifest| {
        let Encoding::Integers(e) = &m.tensors[1].encoding else { panic!() };
        let e = Encoding::Integers(Integers { g_idx: true, ..e.clone() });
        m.tensors[1] = Tensor::new("q", vec![2, 6], e).unwrap();
    };
    let groups = |last: u32| {
        move |c: &mut Contents| {
            c.insert(5, [0, 1, 0, 1, 0, last].iter().flat_map(|g| g.to_le_bytes()).collect())
        }
    };
    assert_eq!(read(&groups(1), &list), "");
    let e = read(&groups(2), &list);
    assert!(e.contains("input 5 is of group 2, there are 2"), "{e}");
    // Rows of 7 weights, of which 3 and 0 are not zero.
    let sparse = |m: &mut Manifest| {
        let e = Encoding::Sparse(Sparse { block: [1, 7], scales: DType::BF16 });
        m.tensors[2] = Tensor::new("t", vec![2, 7], e).unwrap();
        m.tensors[2].parts[2].segment.bytes = 1;
    };
    let parts = |starts: [u64; 3]| {
        move |c: &mut Contents| {
            let starts = starts.iter().flat_map(|n| n.to_le_bytes()).collect();
            c.splice(5..6, [vec![0b0101_0001, 0], starts, vec![0b010]]);
        }
    };
    assert_eq!(read(&parts([0, 1, 1]), &sparse), "");
    for starts in [[0, 0, 1], [0, 1, 2], [1, 1, 1], [0, 2, 1], [u64::MAX, 0, 0], [0, u64::MAX, 1]] {
        let e = read(&parts(starts), &sparse);
        assert!(e.contains("do not begin where they should"), "{starts:?}: {e}");
    }
}

/// Each of these is decoded by rows.
#[test]
fn rows_that_are_too_long() {
    let block = [1, 32];
    let integers = Integers { bits: 1, block, scales: DType::F16, zeros: Zeros::Middle, g_idx: false };
    let ternary = |packing| Encoding::Ternary(Ternary { packing, block, scales: DType::F16 });
    for e in [
        Encoding::Integers(integers),
        ternary(Trits::Base3),
        ternary(Trits::Bits2),
        Encoding::Sparse(Sparse { block, scales: DType::F16 }),
    ] {
        assert!(Tensor::new("w", vec![3, MAX_COLS], e.clone()).is_ok());
        for shape in [vec![1, MAX_COLS + 1], vec![2, 3, 1 << 40], vec![MAX_COLS + 1]] {
            let error = Tensor::new("w", shape, e.clone()).unwrap_err();
            assert!(error.kind() == ErrorKind::Limit, "{error}");
        }
    }
    let flat = Codebook {
        bits: 4,
        block,
        flat: true,
        scales: Some(DType::F16),
        nested: None,
        table: DType::F16,
        tables: [1, 4 * MAX_COLS],
    };
    assert!(Tensor::new("w", vec![4, MAX_COLS], Encoding::Codebook(flat)).is_ok());
    let long = changed(|m| m["tensors"][2]["shape"] = json!([1, MAX_COLS + 1]));
    refused(&long, ErrorKind::Limit, "tensor \"t\": a row has 1048577 columns, at most 1048576 are read");
}

#[test]
fn the_longest_row_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let e = Ternary { packing: Trits::Bits2, block: [1, MAX_COLS], scales: DType::F32 };
    let tensor = Tensor::new("w", vec![2, MAX_COLS], Encoding::Ternary(e)).unwrap();
    // 0, 1, 2, 1 and so on, less 1.
    let codes = vec![0b0110_0100; MAX_COLS as usize / 2];
    let scales = [1f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let (store, _) =
        open(made::write(dir.path(), vec![(tensor, vec![codes, scales])]), &Limits::default()).unwrap();
    let mut found = [0; 24];
    store.read(store.get("w").unwrap(), (MAX_COLS - 3) * 4, &mut found).unwrap();
    let found: Vec<f32> = found.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(found, [0.0, 1.0, 0.0, -2.0, 0.0, 2.0]);
}

#[test]
fn origins_that_leave_bytes_out() {
    let (manifest, contents) = example();
    let dir = tempfile::tempdir().unwrap();
    let (store, tensors) =
        open(at(dir.path(), &file(manifest, &contents, &[]).0), &Limits::default()).unwrap();
    // 2 rows of 6 codes of 3 bits, two groups in a row.
    let q = tensors.iter().find(|t| t.name == "q").unwrap();
    let restored = |layout: &str, from: &str, dtype: DType, shape: &[u64]| {
        let part = Source { name: "q.x".into(), dtype, shape: shape.to_vec(), from: from.into() };
        let origin = Origin { layout: layout.into(), parts: vec![part] };
        let mut bytes = vec![0xDD; dtype.nbytes(shape).unwrap() as usize];
        let put = &mut |_: usize, at: u64, from: &[u8]| {
            bytes[at as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        };
        restore(&store, q, &origin, put).map(|()| bytes).map_err(|e| (e.kind(), e.to_string()))
    };
    let scales = [1f32, 0.5, 2.0, -1.0].map(qconv::block::f16_from_f32);
    let scales: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(restored("gptq", "scales", DType::F16, &[2, 2]), Ok(scales));
    assert_eq!(restored("plain", "zeros", DType::U8, &[2]).as_deref(), Ok(&contents[4][..]));
    let list: Vec<u8> = [0u32, 0, 0, 0, 1, 1].iter().flat_map(|g| g.to_le_bytes()).collect();
    assert_eq!(restored("gptq", "columns", DType::I32, &[6]), Ok(list));
    for (layout, from, dtype, shape) in [
        ("gptq", "scales", DType::F16, vec![2, 3]),
        ("gptq", "scales", DType::F16, vec![3]),
        ("gptq", "columns", DType::I32, vec![7]),
        ("gptq", "columns", DType::I32, vec![5]),
        ("gptq", "columns", DType::I32, vec![0]),
        ("plain", "zeros", DType::U8, vec![3]),
        // Zeros of 3 bits for two rows are no words, of which each group has its own.
        ("gptq", "zeros", DType::I32, vec![2, 1]),
        ("pack-quantized", "zeros", DType::I32, vec![1, 2]),
        ("gptq", "codes", DType::I32, vec![2, 1]),
    ] {
        let (kind, said) = restored(layout, from, dtype, &shape).unwrap_err();
        assert!(kind == ErrorKind::Malformed && said.contains("\"q\""), "{from} {shape:?}: {said}");
    }
}

#[test]
fn files_of_a_set() {
    let dir = tempfile::tempdir().unwrap();
    let shard = |no: u64, others: &[ShardSeal]| {
        let name = format!("part{no}");
        let tensors = vec![Tensor::new(name, vec![2], Encoding::Plain(DType::F32)).unwrap()];
        // Lengths are known beforehand.
        let seals = others.iter().map(|s| ShardSeal { manifest: [0; 32], ..*s }).collect();
        Manifest { tensors, split: Some(Split { no, count: 3, seals }), ..Manifest::default() }
    };
    let data = |byte: u8| vec![vec![byte; 8]];
    let name = |no: u64| dir.path().join(format!("m-{no:05}-of-00003.qpack"));
    let (one, first) = file(shard(1, &[]), &data(1), &[]);
    let (two, second) = file(shard(2, &[]), &data(2), &[]);
    let (three, _) = file(shard(3, &[first, second]), &data(3), &[first, second]);
    let write = || {
        for (no, bytes) in [(1, &one), (2, &two), (3, &three)] {
            fs::write(name(no), bytes).unwrap();
        }
    };
    write();
    for no in 1..=3 {
        let model = Qpack::open(name(no), &Limits::default()).unwrap();
        let names: Vec<_> = model.tensors().map(|t| t.name.clone()).collect();
        assert_eq!(names, ["part1", "part2", "part3"]);
    }
    let (store, _) = open(name(2), &Limits::default()).unwrap();
    assert_eq!(store.read_all(store.get("part3").unwrap()).unwrap(), [3; 8]);
    let refused = |words: &str| {
        let e = Qpack::open(name(3), &Limits::default()).unwrap_err();
        assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
    };
    // Of another version of the model.
    fs::write(name(1), file(shard(1, &[]), &data(9), &[]).0).unwrap();
    refused("is not the file that the last one of the set names");
    write();
    fs::rename(name(1), dir.path().join("other")).unwrap();
    refused("cannot open");
    write();
    fs::copy(name(1), name(2)).unwrap();
    refused("does not say that it is file 2 of 3");
    let e = Qpack::open(dir.path().join("other"), &Limits::default()).unwrap_err();
    assert!(e.to_string().contains("is file 1 of 3, and not called so"), "{e}");
}

/// Nothing but the two ends and the manifest is read at opening, and memory does not depend on what is between.
#[test]
fn a_hundred_gigabytes() {
    use std::io::{Seek, SeekFrom, Write};
    let tensor =
        |k: u64| Tensor::new(format!("w{k}"), vec![1 << 15, 1 << 15], Encoding::Plain(DType::F32)).unwrap();
    let manifest = Manifest { tensors: (0..25).map(tensor).collect(), ..Manifest::default() };
    let text = manifest.bytes().unwrap();
    let at = *manifest.places().unwrap().last().unwrap();
    let example = whole();
    let mut footer = example[example.len() - 128..].to_vec();
    footer[..8].copy_from_slice(&at.to_le_bytes());
    footer[8..16].copy_from_slice(&(text.len() as u64).to_le_bytes());
    footer[16..48].copy_from_slice(&Sha256::digest(&text));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qpack");
    let mut file = fs::File::create(&path).unwrap();
    file.write_all(&example[..64]).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&text).unwrap();
    file.write_all(&footer).unwrap();
    drop(file);
    let (store, tensors) = open(&path, &Limits::default()).unwrap();
    assert!(fs::metadata(&path).unwrap().len() > 100 << 30 && tensors.len() == 25);
    let mut last = [1; 16];
    store.read(store.get("w24").unwrap(), (4 << 30) - 16, &mut last).unwrap();
    assert_eq!(last, [0; 16]);
}
