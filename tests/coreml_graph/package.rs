//! Packages around functions, with weights of noise.

use std::fs;
use std::path::PathBuf;

use half::f16;
use qconv::container::coreml::blob::layout;
use qconv::container::coreml::mil::Program;
use qconv::container::coreml::model::{
    ArrayDataType, FeatureDescription, Flexibility, FunctionDescription, ModelDescription, SizeRange,
};
use qconv::container::coreml::package::{WEIGHTS, small_files};
use qconv::container::coreml::{DataType, Model, Only, Package};
use qconv::limits::Limits;
use qconv::mil::{Built, TensorType};

use crate::families::{CONTEXT, Family};

/// A package on disk.
pub struct Saved {
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

/// A weight file of noise, and the package around these functions; opened again, it is the same.
pub fn save(family: &Family, what: &str, functions: &[(&str, &Built)]) -> Saved {
    let kept = std::env::var_os("QCONV_PACKAGES").map(PathBuf::from);
    let dir = tempfile::tempdir().unwrap();
    let path = kept.unwrap_or_else(|| dir.path().into());
    let path = path.join(format!("{}-{what}.mlpackage", family.name));
    let wanted = family.weights.wanted();
    let (file, blobs) = layout("weight.bin", &wanted).unwrap();
    let mut bytes = vec![0u8; file.len as usize];
    bytes[..file.header.len()].copy_from_slice(&file.header);
    let put =
        |bytes: &mut [u8], at: u64, data: &[u8]| bytes[at as usize..][..data.len()].copy_from_slice(data);
    let records = std::sync::Mutex::new(Vec::new());
    let keep = |at: u64, data: &[u8]| {
        records.lock().unwrap().push((at, data.to_vec()));
        Ok(())
    };
    file.ending.unwrap().write(1, &mut Vec::new(), &|_, _| unreachable!(), &keep, &|_| true).unwrap();
    records.into_inner().unwrap().iter().for_each(|(at, data)| put(&mut bytes, *at, data));
    let mut random = 1u64;
    let mut next = || {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as u32
    };
    for ((blob, wanted), owner) in blobs.iter().zip(&wanted).zip(family.weights.owners()) {
        let factor = match owner {
            _ if owner.contains("post_") => family.loud,
            _ if owner.contains("norm") => 8.0,
            _ => 1.0,
        };
        let data: Vec<u8> = match wanted.data_type {
            DataType::Float16 => {
                let number =
                    |n: u32| f16::from_f32((n as f32 / 2f32.powi(33) - 0.125) * factor).to_le_bytes();
                (0..wanted.elements).flat_map(|_| number(next())).collect()
            }
            // A mask with as many ones as there are indices.
            _ => (0..blob.bytes).map(|_| 0x55).collect(),
        };
        put(&mut bytes, blob.data(), &data);
    }
    let model = model(functions);
    for (name, content) in small_files(&model, true).unwrap() {
        fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
        fs::write(path.join(name), content).unwrap();
    }
    fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
    fs::write(path.join(WEIGHTS), bytes).unwrap();
    let package = Package::open(&path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(*package.model(), model);
    Saved { path, _dir: dir }
}

fn model(functions: &[(&str, &Built)]) -> Model {
    let description = |name: &str, built: &Built| {
        let array = |name: &str, ty: &TensorType, is_output: bool| {
            let data_type = match ty.dtype {
                DataType::Int32 => ArrayDataType::Int32,
                _ => ArrayDataType::Float16,
            };
            let sizes: Vec<i64> = ty.dims.iter().map(|d| d.known().unwrap_or(1) as i64).collect();
            let range = |d: Option<u64>| {
                let (low, high) = d.map_or((1, CONTEXT), |n| (n, n));
                SizeRange { lower_bound: low, upper_bound: high as i64 }
            };
            let ranges = ty.declared().into_iter().map(range).collect();
            match ty.declared().contains(&None) {
                true if is_output => FeatureDescription::array(name, data_type, &[], Flexibility::None),
                true => FeatureDescription::array(name, data_type, &sizes, Flexibility::Range(Only(ranges))),
                false => FeatureDescription::array(name, data_type, &sizes, Flexibility::None),
            }
        };
        let state = |f: &qconv::mil::Feature| {
            let sizes: Vec<i64> = f.ty.dims.iter().map(|d| d.known().unwrap() as i64).collect();
            FeatureDescription::state(&f.name, &sizes)
        };
        FunctionDescription {
            name: name.into(),
            input: built.inputs.iter().map(|f| array(&f.name, &f.ty, false)).collect(),
            output: built.outputs.iter().map(|f| array(&f.name, &f.ty, true)).collect(),
            state: built.states.iter().map(state).collect(),
        }
    };
    let mut described: Vec<FunctionDescription> =
        functions.iter().map(|(name, built)| description(name, built)).collect();
    let description = match &mut described[..] {
        [one] if one.name == "main" => {
            let FunctionDescription { input, output, state, .. } = one.clone();
            ModelDescription { input, output, state, ..ModelDescription::default() }
        }
        _ => ModelDescription {
            default_function_name: described[0].name.clone(),
            functions: described,
            ..ModelDescription::default()
        },
    };
    let functions = functions.iter().map(|(name, built)| ((*name).into(), built.function.clone()));
    let program = Program { version: 1, functions: functions.collect(), ..Program::default() };
    Model { specification_version: 9, description, program, ..Model::default() }
}
