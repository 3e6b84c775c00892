//! Core ML packages: those that others wrote are read, what is written comes back.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::fixture;
use half::f16;
use qconv::block::bits;
use qconv::container::coreml::blob::{Wanted, layout};
use qconv::container::coreml::mil::{Binding, Program, Stored, Value, ValueType};
use qconv::container::coreml::package::{MODEL, WEIGHTS, is_package, small_files};
use qconv::container::coreml::{DataType, Model, Package, decode, encode};
use qconv::limits::Limits;
use serde_json::Value as Json;

const PACKAGES: [&str; 2] = ["coreml/coremltools.mlpackage", "coreml/mini.mlpackage"];

fn open(path: &Path) -> Package {
    Package::open(path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// Values of a program that lie in weight files.
fn stored(program: &Program) -> Vec<&Value> {
    let blocks = program.functions.values().flat_map(|f| f.block_specializations.values());
    let operations = blocks.flat_map(|b| &b.operations);
    let values = operations.flat_map(|o| {
        let bindings = o.inputs.values().flat_map(|argument| &argument.0);
        let inline = bindings.filter_map(|binding| match binding {
            Binding::Value(value) => Some(value),
            _ => None,
        });
        inline.chain(o.attributes.values())
    });
    values.filter(|value| matches!(value.stored, Stored::Blob(_))).collect()
}

/// The elements of such a value, as numbers.
fn elements(package: &Package, value: &Value) -> (u64, DataType, Vec<u64>, Vec<f64>) {
    let (Stored::Blob(at), ValueType::Tensor(tensor)) = (&value.stored, &value.value_type) else {
        panic!("{value:?}")
    };
    let (file, blob) = package.blob(at, tensor).unwrap();
    let mut bytes = vec![0; blob.bytes as usize];
    file.read(blob, 0, &mut bytes).unwrap();
    let numbers = match tensor.data_type {
        DataType::Float16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect(),
        DataType::Float32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
        DataType::Int16 => bytes.as_chunks().0.iter().map(|b| i16::from_le_bytes(*b).into()).collect(),
        DataType::UInt16 => bytes.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b).into()).collect(),
        DataType::Int32 => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        DataType::Int8 => bytes.iter().map(|b| (*b as i8).into()).collect(),
        t => {
            let mut codes = vec![0; tensor.elements().unwrap() as usize];
            bits::unpack(&bytes, t.bits(), 0, &mut codes);
            let sign = if t == DataType::Int4 { 8 } else { 0 };
            codes.into_iter().map(|code| f64::from(code ^ sign) - f64::from(sign)).collect()
        }
    };
    (at.offset, tensor.data_type, tensor.fixed_shape().unwrap(), numbers)
}

#[test]
fn packages_of_others_are_read_whole() {
    for name in PACKAGES {
        let path = fixture(name);
        assert!(is_package(&path), "{name}");
        let package = open(&path);
        assert!(package.unknown().is_empty(), "{name}: {:?}", package.unknown());
        let bytes = fs::read(path.join(MODEL)).unwrap();
        let again = encode(package.model());
        // Entries of maps may come in another order.
        assert_eq!(again.len(), bytes.len(), "{name}");
        let mut histograms = [[0u32; 256]; 2];
        bytes.iter().for_each(|b| histograms[0][usize::from(*b)] += 1);
        again.iter().for_each(|b| histograms[1][usize::from(*b)] += 1);
        assert_eq!(histograms[0], histograms[1], "{name}");
        assert_eq!(&decode::<Model>(&again).unwrap().0, package.model(), "{name}");
    }
}

#[test]
fn weights_are_what_coremltools_reads() {
    let package = open(&fixture("coreml/coremltools.mlpackage"));
    let expected: Json = serde_json::from_slice(&fs::read(fixture("coreml/expected.json")).unwrap()).unwrap();
    let mut found: Vec<_> =
        stored(&package.model().program).into_iter().map(|value| elements(&package, value)).collect();
    found.sort_by_key(|(offset, ..)| *offset);
    let expected = expected.as_array().unwrap();
    assert_eq!((found.len(), expected.len()), (18, 18));
    for ((offset, data_type, shape, numbers), wanted) in found.iter().zip(expected) {
        assert_eq!(wanted["offset"], *offset);
        assert_eq!(wanted["type"], data_type.number());
        assert_eq!(wanted["shape"], serde_json::json!(shape));
        let values: Vec<f32> =
            wanted["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let numbers: Vec<f32> = numbers.iter().map(|n| *n as f32).collect();
        assert_eq!(numbers, values, "{data_type} at {offset}");
    }
    let mut types: Vec<DataType> = found.iter().map(|(_, t, ..)| *t).collect();
    types.sort();
    types.dedup();
    assert_eq!(types.len(), 13, "{types:?}");
}

/// A package with this model and these bytes of weights.
fn write(path: PathBuf, model: &Model, weights: &[u8]) -> PathBuf {
    fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
    for (name, bytes) in small_files(model, true).unwrap() {
        fs::write(path.join(name), bytes).unwrap();
    }
    fs::write(path.join(WEIGHTS), weights).unwrap();
    path
}

#[test]
fn what_is_written_is_read_and_is_always_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for name in PACKAGES {
        let package = open(&fixture(name));
        let weights = fs::read(fixture(name).join(WEIGHTS)).unwrap();
        let path = write(dir.path().join(name), package.model(), &weights);
        let again = open(&path);
        assert_eq!(again.model(), package.model());
        for (one, other) in stored(&package.model().program).iter().zip(stored(&again.model().program)) {
            assert_eq!(elements(&package, one), elements(&again, other));
        }
        assert_eq!(small_files(again.model(), true).unwrap(), small_files(package.model(), true).unwrap());
    }
}

#[test]
fn a_weight_file_is_laid_out_as_coremltools_does() {
    let package = open(&fixture("coreml/coremltools.mlpackage"));
    let bytes = fs::read(fixture("coreml/coremltools.mlpackage").join(WEIGHTS)).unwrap();
    let mut values = stored(&package.model().program);
    values.sort_by_key(|value| elements(&package, value).0);
    let wanted: Vec<Wanted> = values
        .iter()
        .map(|value| {
            let (_, data_type, shape, _) = elements(&package, value);
            Wanted { data_type, elements: shape.iter().product(), sum: None }
        })
        .collect();
    // The tables of the smallest palettes stand in the program; all else is here.
    let (file, blobs) = layout("weight.bin", &wanted).unwrap();
    assert_eq!(file.len, bytes.len() as u64);
    assert_eq!(file.header, bytes[..64]);
    let Some(ending) = file.ending else { panic!("no records") };
    let same = |at: u64, record: &[u8]| {
        assert_eq!(record, &bytes[at as usize..][..record.len()], "record at {at}");
        Ok(())
    };
    ending.write(1, &mut Vec::new(), &|_, _| unreachable!(), &same, &|_| true).unwrap();
    let places: Vec<u64> = blobs.iter().map(|b| b.record).collect();
    assert_eq!(places, values.iter().map(|v| elements(&package, v).0).collect::<Vec<_>>());
}

/// The table of `formats/spec/coreml.md`.
#[test]
fn types_below_a_byte_are_packed_as_the_table_says() {
    for (t, codes, bytes) in [
        (DataType::UInt1, &[1, 0, 1, 1, 0, 0, 1, 0, 1][..], &[0x4d, 0x01][..]),
        (DataType::UInt2, &[0, 1, 2, 3, 3], &[0xe4, 0x03]),
        (DataType::UInt3, &[1, 2, 3, 4, 5, 6, 7, 0, 5], &[0xd1, 0x58, 0x1f, 0x05]),
        (DataType::UInt4, &[1, 2, 15], &[0x21, 0x0f]),
        (DataType::UInt6, &[1, 2, 3, 63, 33], &[0x81, 0x30, 0xfc, 0x21]),
        (DataType::Int4, &[(-8i8) as u8, 7, (-1i8) as u8], &[0x78, 0x0f]),
    ] {
        let mut packed = vec![0xFF; t.bytes(codes.len() as u64).unwrap() as usize];
        bits::pack(codes, t.bits(), &mut packed);
        assert_eq!(packed, bytes, "{t}");
    }
}
