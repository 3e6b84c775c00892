//! Quantized checkpoints that the libraries made (`fixtures/packed`) give the values that the same libraries
//! decode, bit by bit but for the sign of zeros, and models of them the logits that transformers computes.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/unpacked.rs"]
mod unpacked;

use std::path::Path;

use checkpoint::{Made, Random};
use qconv::block::codec;
use qconv::container::safetensors;
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::json;
use unpacked::{decoded, open, same};

/// Tensors of a file, with the quantization_config that lies with them.
fn example(path: &Path) -> Made {
    let file = safetensors::open(path, &Limits::default()).unwrap();
    let tensors = file.store.tensors().iter().map(|t| {
        let dtype = t.dtype.safetensors_name().unwrap().to_string();
        (t.name.clone(), (dtype, t.shape.clone(), file.store.read_all(t).unwrap()))
    });
    let mut made = Made::new(json!({}));
    made.tensors = tensors.collect();
    if let Some(quantization) = file.metadata[0].get("quantization_config") {
        made = made.quantized(serde_json::from_str(quantization).unwrap());
    }
    made
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn libraries_and_we_decode_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut methods: Vec<String> = Vec::new();
    for file in std::fs::read_dir(common::fixture("packed")).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        if path.extension().is_none_or(|e| e != "safetensors") || name == "base" || name.starts_with("model-")
        {
            continue;
        }
        println!("{name}");
        let mut made = example(&path);
        let expected = floats(&made.take("expected").2);
        assert!(expected.iter().any(|v| *v != expected[0]), "{name}");
        let store = open(dir.path(), &made).unwrap();
        let found = match store.get("p.weight") {
            Some(_) => decoded(&store, "p.weight"),
            None => {
                let blocks = store.get("p_blocks").unwrap();
                assert_eq!(blocks.dtype, DType::MXFP4);
                let mut values = vec![0.0; expected.len()];
                codec(blocks.dtype).unwrap().decode(&store.read_all(blocks).unwrap(), &mut values).unwrap();
                values
            }
        };
        if found != expected {
            same(&found, &expected);
        }
        // The comparison sees a bit: the codes with one turned over are of other values.
        let codes = ["p.qweight", "p.weight_packed", "p.weight", "p_blocks"];
        let codes = codes.iter().find(|c| made.tensors.iter().any(|(n, _)| n == *c)).unwrap();
        made.get(codes).2[Random(expected.len() as u64).below(100) as usize] ^= 1;
        let store = open(dir.path(), &made).unwrap();
        assert!(store.get("p.weight").is_none_or(|_| decoded(&store, "p.weight") != expected), "{name}");
        methods.push(made.config["quantization_config"]["quant_method"].as_str().unwrap().into());
    }
    methods.sort();
    methods.dedup();
    let wanted = [
        "auto-round",
        "awq",
        "bitnet",
        "bitsandbytes",
        "compressed-tensors",
        "fp8",
        "gptq",
        "modelopt",
        "mxfp4",
    ];
    assert_eq!(methods, wanted);
}

/// What lies in `base.safetensors` and `model-NAME.safetensors`, as a model's directory.
#[cfg(feature = "ggml")]
fn model(name: &str, dir: &Path) -> (Vec<i32>, Vec<f32>) {
    let folder = common::fixture("packed");
    let mut made = example(&folder.join(format!("model-{name}.safetensors")));
    let ids = made.take("input_ids").2.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect();
    let logits = floats(&made.take("logits").2);
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let quantization = std::mem::replace(&mut made.config, config)["quantization_config"].take();
    made.tensors.extend(example(&folder.join("base.safetensors")).tensors);
    made.quantized(quantization).write(dir, &common::fixture("models/llama"));
    (ids, logits)
}

#[test]
#[cfg(feature = "ggml")]
fn logits_of_what_libraries_made() {
    use qconv::eval::logits::{Matrix, compare, forward};
    for name in ["awq", "nf4-nested", "pack4-asym"] {
        let dir = tempfile::tempdir().unwrap();
        let (ids, values) = model(name, dir.path());
        let output = dir.path().join("model.gguf");
        common::convert(dir.path(), &output, Some("f32"));
        let wanted = Matrix { columns: values.len() / ids.len(), values };
        let agreement = compare(&forward(&output, &ids, 1).unwrap(), &wanted).unwrap();
        println!("{name}: {agreement:?}");
        assert!(agreement.finite && agreement.rel_rms < 5e-4, "{name}: {agreement:?}");
        assert_eq!(agreement.argmax_agree, agreement.rows, "{name}: {agreement:?}");
    }
}
