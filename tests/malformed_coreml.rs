//! Core ML packages that are damaged, or made to deceive: each is refused with its reason. The table of
//! `formats/spec/coreml.md` has a line for each; what messages and weight files alone can show is tested beside them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::fixture;
use qconv::container::coreml::mil::{Binding, Operation, Stored, TensorType, TensorValue, Value, ValueType};
use qconv::container::coreml::package::{MANIFEST, MODEL, WEIGHTS};
use qconv::container::coreml::{DataType, Model, Only, Package, decode, encode};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const MINI: &str = "coreml/mini.mlpackage";

/// A copy of the smallest package.
struct Damaged {
    _dir: TempDir,
    path: PathBuf,
}

impl Damaged {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mlpackage");
        fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
        for name in [MANIFEST, MODEL, WEIGHTS] {
            fs::copy(fixture(MINI).join(name), path.join(name)).unwrap();
        }
        Self { _dir: dir, path }
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path.join(name)).unwrap()
    }

    fn with(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.path.join(name), bytes).unwrap();
        self
    }

    fn open(&self) -> Result<Package, Error> {
        Package::open(&self.path, &Limits::default())
    }

    fn refused(&self, kind: ErrorKind, words: &str) {
        let e = self.open().unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
        assert!(e.path().is_some_and(|path| path.starts_with(&self.path)), "{e}");
    }
}

fn model() -> Model {
    decode(&fs::read(fixture(MINI).join(MODEL)).unwrap()).unwrap().0
}

/// The package with its model changed.
fn with_model(change: impl FnOnce(&mut Model)) -> Damaged {
    let mut model = model();
    change(&mut model);
    Damaged::new().with(MODEL, encode(&model))
}

/// The operation that gives `name`.
fn operation<'a>(model: &'a mut Model, name: &str) -> &'a mut Operation {
    let main = model.program.functions.get_mut("main").unwrap();
    let block = main.block_specializations.get_mut("CoreML8").unwrap();
    block.operations.iter_mut().find(|o| o.outputs.first().is_some_and(|first| first.name == name)).unwrap()
}

/// The value that a parameter is bound to.
fn value<'a>(model: &'a mut Model, name: &str, parameter: &str) -> &'a mut Value {
    match &mut operation(model, name).inputs.get_mut(parameter).unwrap().0[0] {
        Binding::Value(value) => value,
        other => panic!("{other:?}"),
    }
}

fn tensor(value: &mut Value) -> &mut TensorType {
    match &mut value.value_type {
        ValueType::Tensor(tensor) => tensor,
        other => panic!("{other:?}"),
    }
}

/// The package with its manifest changed.
fn with_manifest(change: impl FnOnce(&mut Json)) -> Damaged {
    let copy = Damaged::new();
    let mut json: Json = serde_json::from_slice(&copy.bytes(MANIFEST)).unwrap();
    change(&mut json);
    copy.with(MANIFEST, json.to_string())
}

/// The entry of that name.
fn item<'a>(manifest: &'a mut Json, name: &str) -> &'a mut Json {
    let entries = manifest["itemInfoEntries"].as_object_mut().unwrap();
    entries.values_mut().find(|item| item["name"] == name).unwrap()
}

#[test]
fn the_smallest_package_is_read() {
    let package = Damaged::new().open().unwrap();
    assert_eq!(package.model().program.functions["main"].opset, "CoreML8");
    assert_eq!(package.weights()["@model_path/weights/weight.bin"].blobs().len(), 2);
}

#[test]
fn a_model_that_is_cut_short_is_refused() {
    let mut copy = Damaged::new();
    let bytes = copy.bytes(MODEL);
    for len in 0..bytes.len() {
        copy = copy.with(MODEL, &bytes[..len]);
        let e = copy.open().unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Unsupported), "{len} bytes: {e}");
    }
}

#[test]
fn flipped_bits_are_refused_or_say_what_they_say() {
    let mut copy = Damaged::new();
    let bytes = copy.bytes(MODEL);
    let (mut refused, mut taken) = (0, 0);
    for at in 0..bytes.len() {
        for mask in [1 << (at % 8), 0xFF] {
            let mut flipped = bytes.clone();
            flipped[at] ^= mask;
            copy = copy.with(MODEL, &flipped);
            match copy.open() {
                Err(e) => {
                    assert!(e.path().is_some(), "byte {at}: {e}");
                    refused += 1;
                }
                Ok(package) => {
                    let written = encode(package.model());
                    let (again, unknown) = decode::<Model>(&written).unwrap();
                    assert!(unknown.is_empty());
                    assert_eq!(encode(&again), written, "byte {at}");
                    taken += 1;
                }
            }
        }
    }
    // Names may be any; lengths, types and what is between may not.
    assert!(refused > bytes.len() && taken > bytes.len() / 5, "{refused} refused, {taken} taken");
}

#[test]
fn damaged_weights_are_refused_but_in_the_data() {
    let mut copy = Damaged::new();
    let bytes = copy.bytes(WEIGHTS);
    for len in 0..bytes.len() {
        copy = copy.with(WEIGHTS, &bytes[..len]);
        copy.refused(ErrorKind::Malformed, "");
    }
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        copy = copy.with(WEIGHTS, &flipped);
        // Two blobs: records at 64 and 192, of 64 and 96 bytes.
        let is_data = (128..192).contains(&at) || (256..352).contains(&at);
        assert_eq!(copy.open().is_ok(), is_data, "byte {at}");
    }
}

#[test]
fn values_lie_where_their_types_say() {
    let malformed = |change: &dyn Fn(&mut Value), words: &str| {
        let copy = with_model(|model| change(value(model, "w", "data")));
        copy.refused(ErrorKind::Malformed, words);
    };
    let at = |value: &mut Value, offset: i64| match &mut value.stored {
        Stored::Blob(blob) => blob.offset = blob.offset.wrapping_add_signed(offset),
        other => panic!("{other:?}"),
    };
    malformed(&|v| at(v, 64), "no blob's record begins at byte 256");
    malformed(&|v| at(v, -64), "no blob's record begins at byte 128");
    malformed(&|v| at(v, -128), "the blob at byte 64 has elements of type uint2, int4 were expected");
    malformed(&|v| at(v, i64::MIN), "no blob's record begins");
    malformed(&|v| tensor(v).data_type = DataType::UInt4, "elements of type int4, uint4 were expected");
    malformed(&|v| tensor(v).data_type = DataType::Int8, "elements of type int4, int8 were expected");
    malformed(
        &|v| *tensor(v) = TensorType::new(DataType::Int4, &[Some(6), Some(31)]),
        "not 186 elements of int4",
    );
    malformed(
        &|v| *tensor(v) = TensorType::new(DataType::Int4, &[Some(u64::MAX), Some(2)]),
        "more than 2^64",
    );
    malformed(&|v| *tensor(v) = TensorType::new(DataType::Int4, &[Some(6), None]), "is not fixed");
    malformed(&|v| tensor(v).rank = 3, "its rank is 3, and it has 2 dimensions");
    malformed(&|v| v.value_type = ValueType::None, "lies in a weight file, and is no tensor");
    malformed(&|v| v.stored = Stored::None, "constexpr_blockwise_shift_scale \"w\": data: has no value");
    let scale = |change: &dyn Fn(&mut TensorType), words: &str| {
        with_model(|model| change(tensor(value(model, "w", "scale")))).refused(ErrorKind::Malformed, words);
    };
    scale(
        &|t| *t = TensorType::new(DataType::Float16, &[Some(7), Some(1)]),
        "which are not 7 elements of type fp16",
    );
    scale(&|t| t.data_type = DataType::Float32, "of type fp32 among Bytes, they belong to Floats");
    with_model(|model| tensor(value(model, "w", "scale")).rank = -1)
        .refused(ErrorKind::Unsupported, "its rank is not fixed");
}

#[test]
fn what_is_read_all_the_same() {
    // A blob that no value names: its elements stand in the program.
    let unnamed = with_model(|model| {
        let elements = TensorValue::Bytes(Only(vec![0; 96]));
        *value(model, "w", "data") = Value::immediate(DataType::Int4, &[6, 32], elements);
    });
    assert_eq!(unnamed.open().unwrap().weights().values().next().unwrap().blobs().len(), 2);
    // Two values at one blob.
    with_model(|model| *value(model, "w", "data") = value(model, "table", "indices").clone()).open().unwrap();
    let padded = Damaged::new();
    let bytes = [&padded.bytes(WEIGHTS)[..], &[0; 32]].concat();
    padded.with(WEIGHTS, bytes).open().unwrap();
    with_manifest(|m| m["more"] = json!({"a": 1})).open().unwrap();
}

#[test]
fn weight_files_are_those_of_the_package() {
    let refused = |name: &str, kind: ErrorKind, words: &str| {
        let copy = with_model(|model| match &mut value(model, "w", "data").stored {
            Stored::Blob(blob) => blob.file_name = name.into(),
            other => panic!("{other:?}"),
        });
        copy.refused(kind, words);
    };
    refused("weights/weight.bin", ErrorKind::Malformed, "does not begin with \"@model_path/\"");
    refused("@model_path/../../Manifest.json", ErrorKind::Malformed, "leads out of the package");
    refused("@model_path/model.mlmodel", ErrorKind::Malformed, "in none of the items");
    refused("@model_path/weights/other.bin", ErrorKind::Io, "other.bin");
    let copy = Damaged::new();
    fs::remove_file(copy.path.join(WEIGHTS)).unwrap();
    copy.refused(ErrorKind::Io, "weight.bin");
    let directory = Damaged::new();
    fs::remove_file(directory.path.join(WEIGHTS)).unwrap();
    fs::create_dir(directory.path.join(WEIGHTS)).unwrap();
    directory.refused(ErrorKind::Misuse, "is a directory");
}

#[test]
fn programs_of_other_kinds_are_refused() {
    let unsupported = |change: &dyn Fn(&mut Model), words: &str| {
        with_model(change).refused(ErrorKind::Unsupported, words);
    };
    unsupported(&|m| m.program = Default::default(), "is no ML Program");
    unsupported(&|m| m.program.version = 2, "its program is of version 2");
    with_model(|m| m.program.functions.get_mut("main").unwrap().opset = "CoreML9".into())
        .refused(ErrorKind::Malformed, "function \"main\": has no block for its opset \"CoreML9\"");
    // A type that MIL does not have: 5, behind the key of a tensor's type, in the place of 10.
    let bytes = encode(&model());
    let at = bytes.windows(4).position(|w| w == [0x08, 10, 0x10, 2]).unwrap();
    let mut changed = bytes.clone();
    changed[at + 1] = 5;
    Damaged::new().with(MODEL, &changed).refused(ErrorKind::Unsupported, "data type 5 is not known");
    // A field that MIL does not have is passed over: 30 of the model.
    let more = [&bytes[..], &[0xf0, 0x01, 1]].concat();
    let package = Damaged::new().with(MODEL, &more).open().unwrap();
    assert_eq!(package.unknown().iter().collect::<Vec<_>>(), [(&("Model", 30), &1)]);
    assert_eq!(package.model(), &model());
}

#[test]
fn manifests() {
    let malformed = |change: &dyn Fn(&mut Json), words: &str| {
        with_manifest(change).refused(ErrorKind::Malformed, words);
    };
    for version in ["2.0.0", "1.0", "0.9.0", ""] {
        with_manifest(|m| m["fileFormatVersion"] = json!(version))
            .refused(ErrorKind::Unsupported, "its fileFormatVersion is");
    }
    malformed(&|m| m["fileFormatVersion"] = json!(1), "is not the JSON expected");
    malformed(&|m| m["rootModelIdentifier"] = json!("x"), "\"x\" is none of its items");
    for field in ["path", "name", "author", "description"] {
        malformed(&|m| drop(item(m, "weights").as_object_mut().unwrap().remove(field)), "missing field");
    }
    for field in ["fileFormatVersion", "rootModelIdentifier", "itemInfoEntries"] {
        malformed(&|m| drop(m.as_object_mut().unwrap().remove(field)), "missing field");
    }
    malformed(&|m| item(m, "weights")["path"] = json!("com.apple.CoreML/other"), "is not its author");
    malformed(
        &|m| {
            let item = item(m, "weights");
            item["name"] = json!("../../../x");
            item["path"] = json!("com.apple.CoreML/../../../x");
        },
        "or leads out of the package",
    );
    with_manifest(|m| {
        let item = item(m, "weights");
        item["name"] = json!("other");
        item["path"] = json!("com.apple.CoreML/other");
    })
    .refused(ErrorKind::Io, "cannot find");
    let without = |m: &mut Json| {
        m["itemInfoEntries"].as_object_mut().unwrap().retain(|_, item| item["name"] != "weights");
    };
    with_manifest(without).refused(ErrorKind::Malformed, "is in none of the items that the manifest lists");
    let text = String::from_utf8(Damaged::new().bytes(MANIFEST)).unwrap();
    let twice = text.replacen("{", "{\"rootModelIdentifier\": \"x\",", 1);
    Damaged::new().with(MANIFEST, twice).refused(ErrorKind::Malformed, "duplicate field");
    let id =
        serde_json::from_str::<Json>(&text).unwrap()["rootModelIdentifier"].as_str().unwrap().to_string();
    let other = serde_json::from_str::<Json>(&text).unwrap()["itemInfoEntries"]
        .as_object()
        .unwrap()
        .keys()
        .find(|key| **key != id)
        .unwrap()
        .clone();
    Damaged::new().with(MANIFEST, text.replace(&other, &id)).refused(ErrorKind::Malformed, "appears twice");
    Damaged::new().with(MANIFEST, "[]").refused(ErrorKind::Malformed, "is not the JSON expected");
    let bytes = text.as_bytes();
    let mut copy = Damaged::new();
    for len in 0..bytes.len() {
        copy = copy.with(MANIFEST, &bytes[..len]);
        copy.refused(ErrorKind::Malformed, "");
    }
}

#[test]
fn what_is_no_package() {
    let open = |path: &Path| Package::open(path, &Limits::default()).unwrap_err();
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("missing"), fixture(MINI).join(MODEL)] {
        let e = open(&path);
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        assert!(e.to_string().contains("is no Core ML package: it has no Manifest.json"), "{e}");
    }
    let limits = Limits { side_file_bytes: 1000, ..Limits::default() };
    let e = Package::open(fixture(MINI), &limits).unwrap_err();
    assert!(e.kind() == ErrorKind::Limit && e.path().unwrap().ends_with("model.mlmodel"), "{e}");
    let limits = Limits { tensors: 1, ..Limits::default() };
    let e = Package::open(fixture(MINI), &limits).unwrap_err();
    assert!(e.kind() == ErrorKind::Limit && e.to_string().contains("2 blobs"), "{e}");
}
