//! Scales that move between tensors: names, what is refused, that nothing else depends on them.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use place::Place;
use qconv::container::gguf::Gguf;
use qconv::eval::embed::output;
use qconv::ggml::{Model, ModelOptions};
use qconv::limits::Limits;

fn logits(place: &Place, name: &str) -> Vec<f32> {
    let model = Model::load(place.path(name), &ModelOptions::default()).unwrap();
    output(&model, &[5, 17, 300, 42, 7, 99, 256, 3], 1).unwrap().matrix().values.clone()
}

#[test]
fn names_mean_what_they_say() {
    let place = Place::calibrated();
    // One layer is enough, and quicker.
    let common = ["--moments", "m.gguf", "--prune-layers", "0", "-q"];
    let quantize = |output: &str, file_type: &str, more: &[&str]| {
        place.succeeds(&[&["quantize", "f32.gguf", output, "-t", file_type], &common[..], more].concat());
        let gguf = Gguf::open(place.path(output), &Limits::default()).unwrap();
        let bytes = |name| gguf.store.read_all(gguf.store.get(name).unwrap()).unwrap();
        [bytes("blk.0.attn_norm.weight"), bytes("blk.0.attn_v.weight"), bytes("blk.0.ffn_down.weight")]
    };
    let alias = quantize("alias", "awq_q4_0", &["-j", "1"]);
    assert!(alias == quantize("method", "q4_0", &["--method", "awq", "-j", "3"]));
    let without = quantize("without", "q4_0", &["--method", "imatrix"]);
    assert!((0..3).all(|i| alias[i] != without[i]), "tensors are as without");
    let both = quantize("both", "awq_q4_0", &["--method", "awq+gptq", "-j", "3"]);
    assert!(both[0] == alias[0] && both[1] != alias[1] && both[2] != alias[2]);
    let source = common::fixture("models/llama");
    let hf = ["hf-to-gguf", source.to_str().unwrap(), "-o", "hf", "-t", "awq_q4_0", "--method", "awq+gptq"];
    place.succeeds(&[&hf[..], &common[..], &["-j", "1"]].concat());
    let tensors = |file: &str| {
        let gguf = Gguf::open(place.path(file), &Limits::default()).unwrap();
        let read = |t| gguf.store.read_all(t).unwrap();
        gguf.store.tensors().iter().map(|t| (t.name.clone(), read(t))).collect::<Vec<_>>()
    };
    assert!(tensors("hf") == tensors("both"));
    for file_type in ["awq_q4_1", "AWQ_Q8_0", "awq_f16"] {
        let args = ["quantize", "f32.gguf", "x", "-t", file_type, "--moments", "m.gguf", "--dry-run"];
        let said = place.succeeds(&args);
        let said = [said.stdout, said.stderr].concat();
        assert!(String::from_utf8_lossy(&said).contains("awq: scales are folded in 8 places"), "{file_type}");
    }
}

#[test]
fn the_model_stays_the_same() {
    let place = Place::calibrated();
    place.succeeds(&["quantize", "f32.gguf", "awq.gguf", "-t", "awq_f32", "--moments", "m.gguf", "-q"]);
    let (before, after) = (logits(&place, "f32.gguf"), logits(&place, "awq.gguf"));
    assert_ne!(before, after);
    let most = before.iter().fold(0f32, |m, v| m.max(v.abs()));
    let change = before.iter().zip(&after).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(change <= 1e-5 * most, "{change} of {most}");
}

#[test]
fn what_cannot_be_is_refused() {
    let place = Place::calibrated();
    let quantize = |more: &[&'static str]| [&["quantize", "f32.gguf", "x"], more].concat();
    let moments = ["--moments", "m.gguf"];
    place.refuses(
        &[&quantize(&["-t", "awq_q4_0", "--method", "gptq"]), &moments[..]].concat(),
        &["the type asks for awq"],
    );
    let by_tensor = place.qconv(&quantize(&["-t", "q4_0", "--tensor-method", "ffn=awq"]));
    assert!(String::from_utf8_lossy(&by_tensor.stderr).contains("stands for a whole model"));
    let other =
        ["--override-kv", "general.architecture=str:rwkv6", "--override-kv", "rwkv6.block_count=int:2"];
    let args = [&quantize(&["-t", "awq_f16"]), &moments[..], &other[..]].concat();
    place.refuses(&args, &["no scales can be folded", "rwkv6"]);
}
