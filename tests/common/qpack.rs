//! Made-up `.qpack` files.
#![allow(dead_code)] // each test uses its part

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use qconv::container::qpack::{
    Encoding, Integers, Manifest, Segment, ShardSeal, SideFile, Tensor, Ternary, Trits, Zeros,
};
use qconv::tensor::DType;
use serde_json::json;

/// What segments hold, in the order of the manifest.
pub type Contents = Vec<Vec<u8>>;

/// The bytes of a file whose segments hold these.
pub fn file(manifest: Manifest, contents: &Contents, others: &[ShardSeal]) -> (Vec<u8>, ShardSeal) {
    file_on(3, manifest, contents, others)
}

/// As [`file`], on so many threads.
pub fn file_on(
    threads: usize,
    manifest: Manifest,
    contents: &Contents,
    others: &[ShardSeal],
) -> (Vec<u8>, ShardSeal) {
    let (layout, places) = qconv::container::qpack::write::file("x".to_string(), manifest).unwrap();
    let mut bytes = vec![0xEE; layout.len as usize];
    bytes[..layout.header.len()].copy_from_slice(&layout.header);
    assert_eq!(places.len(), contents.len());
    for (at, content) in places.iter().zip(contents) {
        bytes[*at as usize..][..content.len()].copy_from_slice(content);
    }
    let bytes = Mutex::new(bytes);
    let read = |at: u64, out: &mut [u8]| {
        out.copy_from_slice(&bytes.lock().unwrap()[at as usize..][..out.len()]);
        Ok(())
    };
    let write = |at: u64, from: &[u8]| {
        bytes.lock().unwrap()[at as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    };
    let mut seals = others.to_vec();
    layout.ending.unwrap().write(threads, &mut seals, &read, &write, &|_| true).unwrap();
    let seal = seals.pop().unwrap();
    let bytes = bytes.into_inner().unwrap();
    assert_eq!(seal.bytes, bytes.len() as u64);
    (bytes, seal)
}

/// A file of these tensors at `NAME.qpack` in a directory.
pub fn write(dir: &Path, tensors: Vec<(Tensor, Contents)>) -> PathBuf {
    let path = dir.join("model.qpack");
    let (tensors, contents): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
    let manifest = Manifest { tensors, ..Manifest::default() };
    std::fs::write(&path, file(manifest, &contents.concat(), &[]).0).unwrap();
    path
}

pub fn side_file(name: &str, bytes: &[u8]) -> SideFile {
    SideFile { name: name.to_string(), segment: Segment::plain(bytes.len() as u64) }
}

/// The contents of a tensor's parts, of these lengths, as `put` fills them.
pub fn fill(
    tensor: &Tensor,
    put: impl FnOnce(&mut dyn FnMut(usize, u64, &[u8]) -> qconv::error::Result<()>) -> qconv::error::Result<()>,
) -> Contents {
    let mut contents: Contents = tensor.parts.iter().map(|p| vec![0xDD; p.segment.bytes as usize]).collect();
    put(&mut |part, at, bytes| {
        contents[part][at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    contents
}

/// The bytes of a file with all that a Hugging Face directory holds in one safetensors file, and its config.json.
pub fn of_directory(dir: &Path) -> Vec<u8> {
    let text = std::fs::read(dir.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let store = qconv::container::safetensors::open(&dir.join("model.safetensors"), &Default::default());
    let stated = config.get("quantization_config");
    let (store, _) = qconv::packed::unpack(store.unwrap().store, stated).unwrap();
    let taken = qconv::packed::qpack::take(&store, stated).unwrap();
    let files = vec![side_file("config.json", &text)];
    let tensors = taken.iter().map(|t| t.tensor.clone()).collect();
    let filled = taken.iter().flat_map(|t| fill(&t.tensor, |put| t.write(&store, put)));
    let contents = [text].into_iter().chain(filled).collect();
    file(Manifest { files, tensors, ..Manifest::default() }, &contents, &[]).0
}

/// A file with one of everything.
pub fn example() -> (Manifest, Contents) {
    let integers =
        Integers { bits: 3, block: [1, 4], scales: DType::F16, zeros: Zeros::Codes(1), g_idx: false };
    let ternary = Ternary { packing: Trits::Base3, block: [1, 7], scales: DType::BF16 };
    let tensors = vec![
        Tensor::new("norm", vec![3], Encoding::Plain(DType::F32)).unwrap(),
        Tensor::new("q", vec![2, 6], Encoding::Integers(integers)).unwrap(),
        Tensor::new("t", vec![2, 7], Encoding::Ternary(ternary)).unwrap(),
    ];
    let config = br#"{"model_type": "none"}"#;
    let files = vec![side_file("config.json", config)];
    let mut provenance = serde_json::Map::new();
    provenance.insert("tool".into(), json!("qconv"));
    let contents = vec![
        config.to_vec(),
        [1f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
        // 3 bits each: 0 1 2 3 4 5, and 7 6 5 4 3 2.
        vec![0b1000_1000, 0b1100_0110, 0b10, 0b0111_0111, 0b0011_1001, 0b01],
        vec![0x00, 0x3C, 0x00, 0x40, 0x00, 0x38, 0x00, 0xBC],
        vec![0b0010_0011, 0b0000_0111],
        vec![242, 8, 121, 0],
        vec![0x80, 0x3F, 0x00, 0x40],
    ];
    (Manifest { files, tensors, provenance, ..Manifest::default() }, contents)
}

/// These tensors, and the small files of a directory.
pub fn with_side_files(dir: &Path, tensors: Vec<(Tensor, Contents)>, output: &Path) {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".json") && !name.ends_with(".index.json") || name.ends_with(".txt") {
            files.push((name.clone(), std::fs::read(dir.join(name)).unwrap()));
        }
    }
    files.sort();
    with_files(files, tensors, output);
}

/// These tensors, and these files.
pub fn with_files(files: Vec<(String, Vec<u8>)>, tensors: Vec<(Tensor, Contents)>, output: &Path) {
    let (tensors, contents): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
    let side = files.iter().map(|(name, bytes)| side_file(name, bytes)).collect();
    let contents: Contents = files.into_iter().map(|(_, bytes)| bytes).chain(contents.concat()).collect();
    let manifest = Manifest { files: side, tensors, ..Manifest::default() };
    std::fs::write(output, file(manifest, &contents, &[]).0).unwrap();
}
