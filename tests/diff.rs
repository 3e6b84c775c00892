//! `qconv diff`: two models beside each other.

mod common;
#[path = "common/qpack.rs"]
mod made;
#[path = "common/place.rs"]
mod place;

use std::fs;

use place::Place;
use serde_json::{Value as Json, json};

/// The exit code, and what was found.
fn diff(place: &Place, args: &[&str]) -> (i32, Json) {
    let output = place.qconv(&[&["diff", "--json", "-q"], args].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).expect(&said))
}

fn kinds(found: &Json) -> Json {
    found["counts"].clone()
}

fn a_llama(place: &Place) -> String {
    let dir = common::fixture("models/llama").to_str().unwrap().to_string();
    for (file, dtype) in [("f32.gguf", "f32"), ("f16.gguf", "f16"), ("q8.gguf", "q8_0")] {
        place.succeeds(&["hf-to-gguf", &dir, "-o", file, "-t", dtype, "--no-verify", "-q"]);
    }
    dir
}

#[test]
fn equal_models_in_any_format() {
    let place = Place::new();
    let dir = a_llama(&place);
    for (a, b) in [("f32.gguf", "f32.gguf"), (dir.as_str(), dir.as_str())] {
        let (code, found) = diff(&place, &[a, b]);
        assert_eq!((code, &found["equal"]), (0, &json!(true)), "{found}");
        assert_eq!(kinds(&found).as_object().unwrap().keys().collect::<Vec<_>>(), ["same_bytes"]);
    }
    // A quantized checkpoint beside the same in a .qpack file.
    for name in ["models/fmt-gptq4", "models/gpt_oss-mxfp4"] {
        let dir = common::fixture(name);
        fs::write(place.path("x.qpack"), made::of_directory(&dir)).unwrap();
        let (_, found) = diff(&place, &[dir.to_str().unwrap(), "x.qpack"]);
        assert_eq!(found["metadata"], json!([]), "{found}");
        let of_values: Vec<&Json> = found["tensors"].as_array().unwrap().iter().map(|t| &t["kind"]).collect();
        assert!(of_values.iter().all(|k| **k == "same_values" || **k == "same_bytes"), "{found}");
        let (code, found) = diff(&place, &["x.qpack", "x.qpack"]);
        assert_eq!((code, found["equal"].clone()), (0, json!(true)));
    }
    let output = place.succeeds(&["diff", "f32.gguf", "f32.gguf"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.ends_with("no difference\n"), "{said}");
}

#[test]
fn what_rounding_made_of_it() {
    let place = Place::new();
    a_llama(&place);
    let (code, found) = diff(&place, &["f32.gguf", "q8.gguf"]);
    assert_eq!(code, 1);
    let keys: Vec<_> = found["metadata"].as_array().unwrap().iter().map(|e| e["key"].clone()).collect();
    assert!(keys.contains(&json!("general.file_type")), "{keys:?}");
    let tensors = found["tensors"].as_array().unwrap();
    let q = tensors.iter().find(|t| t["name"] == "blk.0.attn_q.weight").unwrap();
    assert_eq!((&q["kind"], &q["encodings"]), (&json!("other_values"), &json!(["F32", "Q8_0"])));
    let error = |key: &str| q["errors"][key].as_f64().unwrap();
    // Of a block of 32 the largest weight is divided by 127, and rounded to the half of a step.
    assert!(error("nmse") > 0.0 && error("nmse") < 1e-3 && error("cosine") > 0.999, "{q}");
    let largest = {
        let model = qconv::open(place.path("f32.gguf")).unwrap();
        let tensor = model.get("blk.0.attn_q.weight").unwrap();
        let (rows, cols) = tensor.matrix();
        let mut values = vec![0.0; (rows * cols) as usize];
        tensor.rows(0..rows, &mut values).unwrap();
        values.iter().fold(0f32, |most, v| most.max(v.abs()))
    };
    assert!(error("max") > 0.0 && error("max") < f64::from(largest) / 127.0, "{q}");
    let norm = tensors.iter().find(|t| t["name"] == "output_norm.weight").unwrap();
    assert_eq!(norm["kind"], "same_bytes");
    // Threads do not show.
    assert_eq!(
        diff(&place, &["f32.gguf", "q8.gguf", "-j", "1"]),
        diff(&place, &["f32.gguf", "q8.gguf", "-j", "4"])
    );
    // F16 of F32 loses bits; the other way round it does not.
    place.succeeds(&["quantize", "f16.gguf", "back.gguf", "-t", "f32", "-q"]);
    let (_, found) = diff(&place, &["f16.gguf", "back.gguf"]);
    let counts = kinds(&found);
    assert!(counts["same_values"].as_u64() > Some(0) && counts.get("other_values").is_none(), "{counts}");
    let output = place.qconv(&["diff", "f32.gguf", "q8.gguf"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("blk.0.attn_q.weight: of other values; ") && said.contains("F32 -> Q8_0"),
        "{said}"
    );
    let (code, found) = diff(&place, &["f32.gguf", "q8.gguf", "--tensor", "norm"]);
    assert_eq!((code, &found["metadata"]), (0, &json!([])));
    let (code, found) = diff(&place, &["f32.gguf", "q8.gguf", "--metadata"]);
    assert_eq!((code, &found["tensors"]), (1, &json!([])));
}

#[test]
fn directories_that_differ() {
    let place = Place::new();
    let source = common::fixture("models/llama");
    for name in ["a", "b"] {
        fs::create_dir(place.path(name)).unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
            fs::copy(source.join(file), place.path(name).join(file)).unwrap();
        }
    }
    assert_eq!(diff(&place, &["a", "b"]).0, 0);
    let config = place.path("b/config.json");
    let mut value: Json = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value["vocab_size"] = json!(7);
    value["more"] = json!({"inner": [1, 2]});
    value.as_object_mut().unwrap().shift_remove("hidden_act");
    fs::write(&config, value.to_string()).unwrap();
    fs::write(place.path("b/README.md"), "text").unwrap();
    fs::remove_file(place.path("b/tokenizer_config.json")).unwrap();
    // One value, one name and one shape.
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let (mut data, mut shape) = (t.data().to_vec(), t.shape().to_vec());
            let mut name = name.clone();
            match name.as_str() {
                "model.norm.weight" => data[1] ^= 0x80,
                "model.embed_tokens.weight" => shape = vec![shape[0] * shape[1]],
                "model.layers.0.mlp.up_proj.weight" => name = "renamed".to_string(),
                _ => {}
            }
            (name, t.dtype(), shape, data)
        })
        .collect();
    let views = changed.iter().map(|(name, dtype, shape, data)| {
        (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(place.path("b/model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let (code, found) = diff(&place, &["a", "b"]);
    assert_eq!(code, 1);
    let metadata: Vec<_> = found["metadata"].as_array().unwrap().iter().map(|e| e["key"].clone()).collect();
    assert_eq!(metadata, ["hidden_act", "vocab_size", "more.inner"]);
    let files: Vec<_> = found["files"].as_array().unwrap().iter().map(|e| e["name"].clone()).collect();
    assert_eq!(files, ["config.json", "tokenizer_config.json", "README.md"]);
    let kind = |name: &str| {
        found["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap()["kind"].clone()
    };
    assert_eq!(kind("model.norm.weight"), "other_values");
    assert_eq!(kind("model.embed_tokens.weight"), "other_shape");
    assert_eq!(kind("model.layers.0.mlp.up_proj.weight"), "only_first");
    assert_eq!(kind("renamed"), "only_second");
    assert_eq!(kind("model.layers.0.mlp.down_proj.weight"), "same_bytes");
    place.refuses(&["diff", "a", "nowhere"], &["nowhere", "No such file"]);
}
