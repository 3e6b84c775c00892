//! Core ML: protocol buffers, weight files, packages.

use std::sync::Arc;

use qconv::container::InputFile;
use qconv::container::coreml::blob::BlobFile;
use qconv::container::coreml::{Model, Package, decode, encode};
use qconv::exec::Program;
use qconv::packed::coreml::{Constants, Weight};

use super::containers::limits;
use super::input::{part, parts};
use super::scratch;

const MOST: u64 = 1 << 14;

/// A weight file.
pub fn blob(data: &[u8]) -> bool {
    let Ok(file) = BlobFile::open(InputFile::of_bytes("weight.bin", data.to_vec()), &limits()) else {
        return false;
    };
    for blob in file.blobs() {
        assert!(blob.data().checked_add(blob.bytes).is_some_and(|end| end <= data.len() as u64));
        let mut bytes = vec![0; blob.bytes as usize];
        file.read(blob, 0, &mut bytes).expect("within the file");
        assert!(bytes == data[blob.data() as usize..][..bytes.len()]);
        assert!(file.read(blob, blob.bytes, &mut [0]).is_err());
    }
    true
}

/// A model as a protocol buffer; what is known of it is written again the same.
pub fn model(data: &[u8]) -> bool {
    let Ok((model, _)) = decode::<Model>(data) else { return false };
    let bytes = encode(&model);
    let (again, unknown) = decode::<Model>(&bytes).expect("what was written can be read");
    assert!(unknown.is_empty());
    assert!(encode(&again) == bytes);
    true
}

/// A package: `model.mlmodel`, `weight.bin`, and `Manifest.json` where it is not the usual one.
pub fn package(data: &[u8]) -> bool {
    const MANIFEST: &[u8] = include_bytes!("../../fixtures/coreml/mini.mlpackage/Manifest.json");
    let files = parts(data);
    let dir = scratch::directory([
        ("a.mlpackage/Manifest.json", part(&files, "Manifest.json").unwrap_or(MANIFEST)),
        (
            "a.mlpackage/Data/com.apple.CoreML/model.mlmodel",
            part(&files, "model.mlmodel").unwrap_or_default(),
        ),
        (
            "a.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
            part(&files, "weight.bin").unwrap_or_default(),
        ),
    ]);
    let path = dir.join("a.mlpackage");
    let Ok(package) = Package::open(&path, &limits()) else { return false };
    let package = Arc::new(package);
    if let Ok(constants) = Constants::of(std::slice::from_ref(&package)) {
        for constant in constants.iter().take(64) {
            let _ = (constant.encoding(), constant.bytes(), constant.parts().len());
            let Ok(weight) = Weight::new(Arc::clone(&package), Arc::clone(constant)) else { continue };
            let n = constant.elements().min(MOST);
            let mut out = vec![0.0; n as usize];
            let _ = weight.read(0, &mut out);
            let _ = weight.read(constant.elements() - n, &mut out);
        }
    }
    let _ = qconv::inspect::inspect(&path, &limits());
    Program::open(&path, &limits()).is_ok()
}
