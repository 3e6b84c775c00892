//! Weights of Core ML packages decode to what coremltools' own decoder makes of them (`fixtures/coreml`).

mod common;

use std::fs;
use std::sync::Arc;

use common::fixture;
use qconv::container::coreml::{Constant, DataType, Form, Package, constants};
use qconv::limits::Limits;
use qconv::packed::coreml::Weight;
use serde_json::Value as Json;

fn package(name: &str) -> (Arc<Package>, Vec<Arc<Constant>>) {
    let package = Package::open(fixture(name), &Limits::default()).unwrap();
    let all = constants(&package, &package.model().program.functions["main"]).unwrap();
    (Arc::new(package), all)
}

/// A number of as many hexadecimal digits as its type has.
fn number(digits: &[u8]) -> f32 {
    let bits = u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    if digits.len() == 4 { half::f16::from_bits(bits as u16).to_f32() } else { f32::from_bits(bits) }
}

#[test]
fn every_form_decodes_to_what_coremltools_makes_of_it() {
    let (package, all) = package("coreml/weights.mlpackage");
    let expected: Vec<Json> =
        serde_json::from_slice(&fs::read(fixture("coreml/decoded.json")).unwrap()).unwrap();
    assert_eq!(expected.len(), 30);
    for wanted in expected {
        let name = wanted["name"].as_str().unwrap();
        let constant = all.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{name}"));
        assert_eq!(wanted["shape"], serde_json::json!(constant.shape), "{name}");
        let digits = if constant.data_type == DataType::Float16 { 4 } else { 8 };
        let values: Vec<f32> =
            wanted["values"].as_str().unwrap().as_bytes().chunks(digits).map(number).collect();
        let weight = Weight::new(Arc::clone(&package), Arc::clone(constant)).unwrap();
        // Whole, and in pieces that begin and end anywhere.
        for piece in [values.len(), values.len() / 50 + 1, 1000] {
            for start in (0..values.len()).step_by(piece) {
                let wanted = &values[start..values.len().min(start + piece)];
                let mut found = vec![f32::NAN; wanted.len()];
                weight.read(start as u64, &mut found).unwrap();
                assert!(
                    wanted.iter().zip(&found).all(|(a, b)| a == b),
                    "{name} from {start}: {found:?}, {wanted:?}"
                );
            }
        }
        assert!(weight.read(1, &mut vec![0.0; values.len()]).is_err(), "{name}");
    }
}

#[test]
fn forms_in_words() {
    let (_, all) = package("coreml/weights.mlpackage");
    let of = |name: &str| all.iter().find(|c| c.name == name).unwrap();
    for (name, words, bytes) in [
        ("int4_blocks", "int4, a scale per 1 x 32", 256 + 32),
        ("int4_tiles", "int4, a scale per 2 x 32", 256 + 16),
        ("uint4_zeros", "uint4, a scale and a zero point per 1 x 11", 99 + 36 + 9),
        ("int8_rows", "int8, a scale per row", 35 + 10),
        ("uint8_whole", "uint8, a scale and a zero point per tensor", 35 + 2 + 1),
        ("conv", "int4, a scale per row", 64 + 8),
        ("palette2_rows", "2-bit palette per 2 rows", 18 + 32),
        ("palette8", "8-bit palette per tensor", 72 + 512),
        ("palette_conv", "2-bit palette per 4 rows", 32 + 16),
        ("vectors_of_rows", "4-bit palette per 4 rows, 2 at a time", 18 + 128),
        ("palette_of_integers", "4-bit palette per 4 rows, entries int8, a scale per row", 36 + 32 + 4),
        ("scaled_palette", "2-bit palette per tensor, a scale per 1 x 4", 32 + 8 + 64),
    ] {
        assert_eq!((of(name).encoding().as_str(), of(name).bytes()), (words, bytes), "{name}");
    }
    let sparse = of("sparse_palette");
    assert_eq!(sparse.encoding(), "sparse 2-bit palette per 4 rows");
    let names: Vec<&str> = sparse.parts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["mask", "nonzero_data"]);
    assert!(matches!(of("sparse").form, Form::Sparse { .. }) && of("sparse").is_in_file());
}

/// What is decoded is the nearest to itself; to anything else nothing that is decoded there is nearer.
#[test]
fn the_nearest_that_a_weight_could_hold() {
    let (package, all) = package("coreml/weights.mlpackage");
    let mut told = Vec::new();
    for constant in all.iter().filter(|c| c.shape.len() > 1 && !matches!(c.form, Form::Plain(_))) {
        let weight = match Weight::new(Arc::clone(&package), Arc::clone(constant)) {
            Ok(weight) => weight,
            Err(e) => panic!("{}: {e}", constant.name),
        };
        let mut decoded = vec![0.0; constant.elements() as usize];
        weight.read(0, &mut decoded).unwrap();
        let mut nearest = decoded.clone();
        if !weight.nearest(0, &mut nearest).unwrap() {
            continue;
        }
        let name = constant.name.as_str();
        // -128 is given up for codes that are the same in both signs.
        let differs = decoded.iter().zip(&nearest).filter(|(x, y)| x != y).count();
        assert!(differs == 0 || name.starts_with("int8") || name == "table", "{name}: {differs} differ");
        let wanted: Vec<f32> = (0..decoded.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        let mut nearest = wanted.clone();
        weight.nearest(0, &mut nearest).unwrap();
        for ((x, best), found) in wanted.iter().zip(&nearest).zip(&decoded) {
            let slack = 1e-3 * best.abs();
            assert!(
                (x - best).abs() <= (x - found).abs() + slack,
                "{name}: {best} for {x}, {found} is there"
            );
        }
        // In pieces as of the whole.
        let half = wanted.len() / 2;
        let mut pieces = wanted.clone();
        let (first, second) = pieces.split_at_mut(half);
        assert!(weight.nearest(0, first).unwrap() && weight.nearest(half as u64, second).unwrap());
        assert_eq!(pieces, nearest, "{name}");
        told.push(name);
    }
    assert_eq!(told.len(), 25, "{told:?}");
}
