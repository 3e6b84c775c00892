//! `.qpack` files compressed, and back: the same file, whatever the threads.

#[path = "common/qpack.rs"]
mod made;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use made::{Contents, example, file, side_file};
use qconv::container::qpack::{Encoding, Integers, Manifest, Qpack, Split, Tensor, Ternary, Trits, Zeros};
use qconv::convert::{Budget, Observer, Silent, recompress};
use qconv::error::{ErrorKind, Result};
use qconv::limits::Limits;
use qconv::packed::qpack::open;
use qconv::tensor::DType;
use serde_json::json;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// About normal.
    fn weight(&mut self) -> f32 {
        (self.next() + self.next() + self.next()) * 0.02
    }
}

/// Weights in BF16, digits, codes, zeros, and what is in the example.
fn a_model() -> (Manifest, Contents) {
    let (mut manifest, mut contents) = example();
    let mut noise = Noise(1);
    let mut add = |tensor: Tensor, of: Contents| {
        assert!(tensor.parts.iter().map(|p| p.segment.bytes).eq(of.iter().map(|c| c.len() as u64)));
        manifest.tensors.push(tensor);
        contents.extend(of);
    };
    // More than one window of chunks, and a piece.
    let shape = vec![401, 4096];
    let n = 401 * 4096;
    let bf16 = (0..n).flat_map(|_| ((noise.weight().to_bits() >> 16) as u16).to_le_bytes()).collect();
    add(Tensor::new("bf16", shape, Encoding::Plain(DType::BF16)).unwrap(), vec![bf16]);
    let trit = |x: f32| if x.abs() < 0.015 { 1 } else { if x > 0.0 { 2 } else { 0 } };
    let e = Ternary { packing: Trits::Base3, block: [1, 2000], scales: DType::F16 };
    let codes =
        (0..300 * 400).map(|_| (0..5).fold(0, |b, k| b + trit(noise.weight()) * 3u8.pow(k))).collect();
    let digits = Tensor::new("digits", vec![300, 2000], Encoding::Ternary(e)).unwrap();
    add(digits, vec![codes, vec![0x3C; 600]]);
    let e = Integers { bits: 4, block: [1, 64], scales: DType::F16, zeros: Zeros::Middle, g_idx: false };
    let bytes = (0..256 * 512).map(|_| (noise.next().to_bits() >> 3) as u8).collect();
    let codes = Tensor::new("codes", vec![256, 1024], Encoding::Integers(e)).unwrap();
    add(codes, vec![bytes, (0..4096 * 2).map(|k| [0, 0x2C][k % 2]).collect()]);
    // A byte would stand for too many.
    add(Tensor::new("zeros", vec![1 << 19], Encoding::Plain(DType::F32)).unwrap(), vec![vec![0; 1 << 21]]);
    add(Tensor::new("none", vec![0, 4], Encoding::Plain(DType::F32)).unwrap(), vec![vec![]]);
    (manifest, contents)
}

fn budget(threads: usize) -> Budget {
    Budget::new(Some(threads), None).unwrap()
}

fn again(from: &Path, to: &Path, compress: bool, threads: usize) -> Result<Vec<PathBuf>> {
    let source = Qpack::open(from, &Limits::default()).unwrap();
    Ok(recompress(&source, to, compress, false, &budget(threads), &Silent)?.outputs)
}

#[test]
fn smaller_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (manifest, contents) = a_model();
    let plain = file(manifest, &contents, &[]).0;
    fs::write(at("plain"), &plain).unwrap();
    again(&at("plain"), &at("small"), true, 1).unwrap();
    let small = fs::read(at("small")).unwrap();
    for threads in [2, 5] {
        again(&at("plain"), &at("other"), true, threads).unwrap();
        assert!(fs::read(at("other")).unwrap() == small, "{threads} threads");
        again(&at("small"), &at("back"), false, threads).unwrap();
        assert!(fs::read(at("back")).unwrap() == plain, "{threads} threads");
        fs::remove_file(at("other")).unwrap();
        fs::remove_file(at("back")).unwrap();
    }
    // What is compressed, or is not, stays what it is.
    again(&at("small"), &at("twice"), true, 2).unwrap();
    assert!(fs::read(at("twice")).unwrap() == small);
    again(&at("plain"), &at("same"), false, 2).unwrap();
    assert!(fs::read(at("same")).unwrap() == plain);

    let model = Qpack::open(at("small"), &Limits::default()).unwrap();
    assert!(model.verify(2, &|_| true).unwrap().is_empty());
    let share = |name: &str| {
        let tensor = model.tensors().find(|t| t.name == name).unwrap();
        let segment = &tensor.parts[0].segment;
        assert_eq!(segment.compression.is_some(), segment.bytes < segment.content_bytes());
        segment.bytes as f64 / segment.content_bytes() as f64
    };
    assert!((0.6..0.72).contains(&share("bf16")), "{}", share("bf16"));
    // Three kinds of digits, of which one is in about 60 %: 1.37 bits of 1.6.
    assert!((0.8..0.95).contains(&share("digits")), "{}", share("digits"));
    assert_eq!((share("codes"), share("zeros"), share("norm")), (1.0, 1.0, 1.0));
    let values = |name: &str| {
        let (store, tensors) = open(at(name), &Limits::default()).unwrap();
        tensors.iter().map(|t| store.read_all(store.get(&t.name).unwrap()).unwrap()).collect::<Vec<_>>()
    };
    assert!(values("small") == values("plain"));
}

#[test]
fn sets_stay_sets() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (manifest, contents) = a_model();
    let count = manifest.tensors.len() as u64;
    let mut contents = contents.into_iter();
    let mut seals = Vec::new();
    for no in 1..=count {
        let tensor = manifest.tensors[no as usize - 1].clone();
        let files = if no == 1 { manifest.files.clone() } else { Vec::new() };
        let n = tensor.parts.len() + files.len();
        let others = if no == count { vec![Default::default(); seals.len()] } else { Vec::new() };
        let mut split = Split { no, count, seals: others };
        if no == count {
            split.seals.clone_from(&seals);
        }
        let part = Manifest { files, tensors: vec![tensor], split: Some(split), ..Manifest::default() };
        let contents = contents.by_ref().take(n).collect();
        let (bytes, seal) = file(part, &contents, if no == count { &seals } else { &[] });
        fs::write(at(&format!("a-{no:05}-of-{count:05}.qpack")), bytes).unwrap();
        seals.push(seal);
    }
    let name = |stem: &str, no: u64| at(&format!("{stem}-{no:05}-of-{count:05}.qpack"));
    let outputs = again(&name("a", 2), &at("b.qpack"), true, 2).unwrap();
    assert_eq!(outputs, (1..=count).map(|no| name("b", no)).collect::<Vec<_>>());
    let model = Qpack::open(name("b", 1), &Limits::default()).unwrap();
    assert!(model.verify(2, &|_| true).unwrap().is_empty());
    assert!(model.manifests().all(|(_, m)| m.tensors.len() == 1));
    let outputs = again(&name("b", 1), &name("c", 3), false, 2).unwrap();
    for (no, output) in (1..).zip(outputs) {
        assert_eq!(output, name("c", no));
        assert!(fs::read(output).unwrap() == fs::read(name("a", no)).unwrap(), "{no}");
    }
}

/// Says to stop after so many bytes.
struct Impatient(AtomicU64);

impl Observer for Impatient {
    fn advance(&self, bytes: u64, _: &str) {
        self.0.fetch_sub(bytes.min(self.0.load(Ordering::Relaxed)), Ordering::Relaxed);
    }

    fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

#[test]
fn nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let files = || fs::read_dir(dir.path()).unwrap().count();
    let (mut manifest, mut contents) = a_model();
    manifest.files.push(side_file("x.txt", b"text"));
    manifest.provenance.insert("tool".into(), json!("none"));
    contents.insert(1, b"text".to_vec());
    let mut bytes = file(manifest.clone(), &contents, &[]).0;
    fs::write(at("plain"), &bytes).unwrap();
    let source = Qpack::open(at("plain"), &Limits::default()).unwrap();
    let stop = Impatient(AtomicU64::new(2 << 20));
    let e = recompress(&source, &at("small"), true, false, &budget(2), &stop).unwrap_err();
    assert_eq!((e.kind(), files()), (ErrorKind::Interrupted, 1));
    let e = again(&at("plain"), &at("plain"), true, 2).unwrap_err();
    assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains("is read, and cannot be written"), "{e}");
    fs::write(at("small"), "there").unwrap();
    let e = again(&at("plain"), &at("small"), true, 2).unwrap_err();
    assert_eq!((e.kind(), files()), (ErrorKind::Misuse, 2));
    assert_eq!(fs::read(at("small")).unwrap(), b"there");
    fs::remove_file(at("small")).unwrap();
    // What is damaged is not sealed anew.
    let place = manifest.places().unwrap()[8] as usize;
    bytes[place + 2_000_000] ^= 4;
    fs::write(at("plain"), &bytes).unwrap();
    for compress in [true, false] {
        let e = again(&at("plain"), &at("small"), compress, 2).unwrap_err();
        assert_eq!((e.kind(), files()), (ErrorKind::Malformed, 1));
        assert!(e.to_string().contains("tensor \"bf16\", part \"data\" is damaged"), "{e}");
    }
}
