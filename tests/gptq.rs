//! GPTQ on models: what it gains, what its options do, and what it says where it cannot be had. Its codes
//! are held to a reference in numpy by `tests/peers/gptq.py`.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use place::Place;
use serde_json::Value as Json;

fn convert(place: &Place, fixture: &str) {
    let source = common::fixture(fixture);
    let source = source.to_str().unwrap();
    place.succeeds(&["hf-to-gguf", source, "-o", "m.gguf", "-t", "bf16", "--no-verify", "-q"]);
}

/// Quantizes, and returns the summary.
fn quantize(place: &Place, output: &str, more: &[&str]) -> Json {
    let done = place.succeeds(&[&["quantize", "m.gguf", output, "-q", "--json", "--force"], more].concat());
    serde_json::from_slice(&done.stdout).unwrap()
}

fn notes(summary: &Json) -> String {
    let notes = summary["notes"].as_array().unwrap().iter();
    notes.map(|n| n.as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

/// On text that was not used for calibration, beside llama.cpp's search with an importance matrix of more
/// text than GPTQ has here.
#[test]
fn a_model_comes_out_closer_than_with_an_importance_matrix() {
    let place = Place::new();
    convert(&place, "tiny-llama");
    let calibration = common::fixture("tiny-llama/calibration.txt");
    let calibration = calibration.to_str().unwrap();
    let args = ["--text", calibration, "--ctx", "512", "--chunks", "12", "--process-output", "-q"];
    place.succeeds(&[&["calibrate", "m.gguf", "-o", "moments.gguf"], &args[..]].concat());
    let imatrix = common::fixture("imatrix/tiny-llama.gguf");
    let imatrix = ["-t", "q4_0", "--imatrix", imatrix.to_str().unwrap()];
    quantize(&place, "imatrix.gguf", &imatrix);
    let summary =
        quantize(&place, "gptq.gguf", &["-t", "q4_0", "--method", "gptq", "--moments", "moments.gguf"]);
    // The embeddings too, by what reads them.
    assert!(notes(&summary).contains("rounded: 30 by gptq"), "{}", notes(&summary));

    let text = common::fixture("tiny-llama/evaluation.txt");
    let args = ["--text", text.to_str().unwrap(), "--chunks", "3", "--json", "-q"];
    let files = ["eval", "compare", "m.gguf", "imatrix.gguf", "gptq.gguf"];
    let done = place.succeeds(&[&files[..], &args].concat());
    let compared: Json = serde_json::from_slice(&done.stdout).unwrap();
    let kld = |i: usize| compared[i]["kld"]["value"].as_f64().unwrap();
    assert!(kld(1) > 0.0 && kld(2) < 0.75 * kld(1), "{} beside {}", kld(2), kld(1));
}

#[test]
fn options_do_what_they_say() {
    let place = Place::new();
    convert(&place, "models/llama");
    let calibrate = ["calibrate", "m.gguf", "-o", "moments.gguf", "--ctx", "64", "--chunks", "4", "-q"];
    place.succeeds(&calibrate);
    let common = ["-t", "q4_0", "--method", "gptq", "--moments", "moments.gguf"];
    let with = |name: &str, more: &[&str]| {
        let summary = quantize(&place, name, &[&common[..], more].concat());
        (std::fs::read(place.path(name)).unwrap(), summary)
    };
    let (usual, _) = with("usual", &[]);
    let same = [
        "--damp-percent=0.01",
        "--desc-act",
        "--static-groups",
        "--true-sequential=false",
        "--block-size",
        "32",
    ];
    assert!(usual == with("same", &same).0);
    assert!(usual != with("damped", &["--damp-percent", "0.5"]).0);
    assert!(usual != with("ordered", &["--desc-act=false"]).0);
    // The output's are those that --process-output would add.
    let (_, summary) = with("usual", &[]);
    assert!(notes(&summary).contains("not by gptq, since the moments have nothing of what it reads"));
    for (option, why) in [
        ("--static-groups=false", "neighbouring columns"),
        ("--true-sequential", "qconv calibrate"),
        ("--block-size=128", "the same with any number"),
        ("--damp-percent=2", "from 0 to 1"),
    ] {
        let refused = place.qconv(&[&["quantize", "m.gguf", "x", option], &common[..]].concat());
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(2) && said.contains(why), "{option}: {said}");
    }
    let rtn = ["quantize", "m.gguf", "x", "-t", "q4_0", "--method", "rtn", "--desc-act"];
    place.refuses(&rtn, &["--desc-act has no effect"]);
}

#[test]
fn too_few_tokens_are_named() {
    let place = Place::new();
    convert(&place, "models/mixtral");
    let calibrate = |chunks: &str| {
        let args = ["--ctx", "32", "--chunks", chunks, "--force", "-q"];
        place.succeeds(&[&["calibrate", "m.gguf", "-o", "moments.gguf"], &args[..]].concat());
        let args = ["-t", "q4_0", "--method", "gptq", "--moments", "moments.gguf"];
        notes(&quantize(&place, "out.gguf", &args))
    };
    let few = calibrate("1");
    assert!(few.contains("not by gptq, since fewer than 64 tokens reached it"), "{few}");
    assert!(few.contains("attn_q.weight by imatrix"), "{few}");
    let some = calibrate("5");
    assert!(
        some.contains("are weighed by the diagonal") && some.contains("ffn_gate_exps.weight by gptq"),
        "{some}"
    );
    // One token for each column is too little for a factor without damping that counts.
    let args = ["-t", "q4_0", "--method", "gptq", "--moments", "moments.gguf", "--damp-percent=0"];
    let grown = notes(&quantize(&place, "out.gguf", &args));
    assert!(grown.contains("damping had to grow"), "{grown}");
}

#[test]
fn moments_of_another_model_are_refused() {
    let place = Place::new();
    convert(&place, "models/llama");
    place.succeeds(&["calibrate", "m.gguf", "-o", "moments.gguf", "--ctx", "32", "--chunks", "1", "-q"]);
    std::fs::remove_file(place.path("m.gguf")).unwrap();
    convert(&place, "tiny-llama");
    for method in ["gptq", "imatrix", "awq"] {
        let args = ["quantize", "m.gguf", "x", "-t", "q4_0", "--method", method, "--moments", "moments.gguf"];
        place.refuses(&args, &["second moments (moments.gguf)", "columns", "of another model"]);
    }
}
