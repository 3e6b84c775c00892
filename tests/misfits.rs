//! Models whose parts do not fit together: each kind has a message of its own, which says what to do.
//! And definitions from outside the program, both ways.

mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use place::Place;
use serde_json::{Value as Json, json};

/// A copy of a fixture with another config and other tensors (names to names of the fixture's).
fn altered(
    place: &Place,
    model: &str,
    config: &[(&str, Json)],
    change: impl Fn(&mut BTreeMap<String, String>),
) -> PathBuf {
    let (source, copy) = (common::fixture(model), place.path("model"));
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir_all(&copy).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(source.join(name), copy.join(name)).unwrap();
    }
    let mut json: Json = serde_json::from_slice(&fs::read(copy.join("config.json")).unwrap()).unwrap();
    for (key, value) in config {
        json[key] = value.clone();
    }
    fs::write(copy.join("config.json"), json.to_string()).unwrap();
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names: BTreeMap<String, String> =
        file.names().into_iter().map(|n| (n.to_string(), n.to_string())).collect();
    change(&mut names);
    let tensors = names.iter().map(|(name, of)| (name.clone(), file.tensor(of).unwrap()));
    safetensors::serialize_to_file(tensors, None, &copy.join("model.safetensors")).unwrap();
    copy
}

fn refuses(place: &Place, says: &[&str]) {
    place.refuses(&["hf-to-gguf", "model", "-o", "x.gguf"], &[says, &["hint: "]].concat());
}

#[test]
fn a_renamed_class() {
    let place = Place::new();
    altered(&place, "models/qwen2", &[("architectures", json!(["Qwen2ForCausalLMFineTuned"]))], |_| {});
    refuses(&place, &["Qwen2ForCausalLMFineTuned is not known", "nearest", "--arch qwen2"]);
    place.succeeds(&["hf-to-gguf", "model", "-o", "x.gguf", "--arch", "qwen2", "--no-verify"]);
}

#[test]
fn a_missing_tensor() {
    let place = Place::new();
    let lost = "model.layers.0.self_attn.k_proj.weight";
    altered(&place, "models/qwen2", &[], |t| drop(t.remove(lost)));
    refuses(&place, &[lost, "is missing", "other layers", "fetch the weights again"]);
    altered(&place, "models/qwen2", &[], |t| drop(t.remove("model.norm.weight")));
    refuses(&place, &["model.norm.weight", "is missing", "qwen2 needs it", "another kind of model"]);
}

#[test]
fn a_surplus_tensor() {
    let place = Place::new();
    let surplus = "model.layers.0.self_attn.k_projection.weight";
    altered(&place, "models/qwen2", &[], |t| {
        t.insert(surplus.into(), "model.layers.0.self_attn.k_proj.weight".into());
    });
    refuses(&place, &[surplus, "has no place", "nearest rule", "k_proj", "--arch-file"]);
}

#[test]
fn layers_that_are_not_there() {
    let place = Place::new();
    altered(&place, "models/qwen2", &[("num_hidden_layers", json!(5)), ("layer_types", Json::Null)], |_| {});
    refuses(&place, &["have 2 layers", "says there are 5", "not of the same model"]);
    altered(&place, "models/qwen2", &[("num_hidden_layers", json!(1)), ("layer_types", Json::Null)], |_| {});
    refuses(&place, &["model.layers.1.", "layer 1", "says there are 1", "not of the same model"]);
}

#[test]
fn experts_that_are_not_there() {
    let place = Place::new();
    let key = "num_local_experts";
    for model in ["models/mixtral", "models/qwen3_moe"] {
        altered(&place, model, &[(key, json!(8))], |_| {});
        refuses(&place, &["layer 0 has 4 experts", "says there are 8", "not of the same model"]);
        altered(&place, model, &[(key, json!(3))], |_| {});
        refuses(&place, &["experts.3.", "is number 3", "says there are 3", "not of the same model"]);
        // One that lies between the others is another matter.
        altered(&place, model, &[], |t| {
            t.retain(|name, _| !name.contains("layers.1.") || !name.contains("experts.2."))
        });
        refuses(&place, &["layers.1.", "experts.2.", "is missing", "fetch the weights again"]);
    }
}

/// A definition under another name of the class, which extends one that is built in; then the same file
/// for the way back, and for `verify`.
#[test]
fn a_definition_from_a_file() {
    let place = Place::new();
    let definition = "schema = 1\narch = \"llama\"\nextends = \"llama\"\n\n[[class]]\nname = \"MyOwnForCausalLM\"\nmodel_type = \"mine\"\n\n[tensors]\n\"model.norm.weight\" = false\n\"model.last_norm.weight\" = \"output_norm.weight\"\n";
    fs::write(place.path("mine.toml"), definition).unwrap();
    altered(&place, "models/llama", &[("architectures", json!(["MyOwnForCausalLM"]))], |t| {
        let norm = t.remove("model.norm.weight").unwrap();
        t.insert("model.last_norm.weight".into(), norm);
    });
    refuses(&place, &["MyOwnForCausalLM", "--arch"]);
    place.succeeds(&["hf-to-gguf", "model", "-o", "x.gguf", "--arch-file", "mine.toml"]);
    place.succeeds(&["verify", "x.gguf", "--against", "model", "--arch-file", "mine.toml"]);
    place.succeeds(&["gguf-to-hf", "x.gguf", "-o", "back", "--arch-file", "mine.toml"]);
    let read = |dir: &Path| {
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec()));
        tensors.collect::<BTreeMap<String, Vec<u8>>>()
    };
    let (there, back) = (read(&place.path("model")), read(&place.path("back")));
    assert!(there.contains_key("model.last_norm.weight") && there == back);
    let config: Json = serde_json::from_slice(&fs::read(place.path("back/config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["architectures"], &config["model_type"]),
        (&json!(["MyOwnForCausalLM"]), &json!("mine"))
    );

    // Faults in it are told with their line, and nothing is written.
    fs::write(place.path("bad.toml"), definition.replace("[tensors]", "[tensor]")).unwrap();
    let output = place.qconv(&["hf-to-gguf", "model", "-o", "y.gguf", "--arch-file", "bad.toml"]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(
        ["bad.toml", "line 9", "[tensor]", "unknown field"].iter().all(|w| message.contains(w)),
        "{message}"
    );
    assert!(!place.path("y.gguf").exists());
    place.refuses(&["gguf-to-hf", "x.gguf", "-o", "y", "--arch-file", "none.toml"], &["none.toml"]);
}
