//! Embeddings: pooling as the model states it, `qconv embed`, and a real encoder.
#![cfg(feature = "ggml")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use qconv::container::gguf::Gguf;
use qconv::convert::{Silent, ToHf};
use qconv::eval::embed::{hidden_states, texts};
use qconv::ggml::{Model, ModelOptions, Pooling};
use qconv::limits::Limits;
use qconv::verify::{Options, verify};

const TEXTS: [&str; 3] = [
    "This is an example sentence",
    "Each sentence is converted",
    "It was a fine morning, and Emma walked to Highbury.",
];

fn load(path: &Path) -> Model {
    Model::load(path, &ModelOptions::default()).unwrap()
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|t| t.to_string()).collect()
}

/// The bert fixture, with the files of sentence-transformers that pool so.
fn pooled_bert(dir: &Path, mode: &str) -> PathBuf {
    let bert = dir.join("bert");
    fs::create_dir_all(bert.join("1_Pooling")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(common::fixture("models/bert").join(name), bert.join(name)).unwrap();
    }
    let modules = r#"[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;
    fs::write(bert.join("modules.json"), modules).unwrap();
    fs::write(bert.join("1_Pooling/config.json"), format!(r#"{{"pooling_mode_{mode}": true}}"#)).unwrap();
    bert
}

fn back(source: &Path, output: &Path) {
    ToHf::new(source, output).plan().and_then(|job| job.run(true, &common::budget(), &Silent)).unwrap();
}

#[test]
fn the_model_says_how_to_pool() {
    for (mode, id, pooling) in
        [("mean_tokens", 1, Pooling::Mean), ("cls_token", 2, Pooling::Cls), ("lasttoken", 3, Pooling::Last)]
    {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a.gguf", "b.gguf"].map(|name| dir.path().join(name));
        common::convert(&pooled_bert(dir.path(), mode), &a, Some("f32"));
        back(&a, &dir.path().join("back"));
        common::convert(&dir.path().join("back"), &b, Some("f32"));
        for path in [&a, &b] {
            let metadata = Gguf::open(path, &Limits::default()).unwrap().metadata;
            assert_eq!(metadata.u64("bert.pooling_type"), Some(id));
        }
        let model = load(&b);
        let (found, embeddings) = texts(&model, &owned(&TEXTS), None, 1).unwrap();
        assert_eq!(found, pooling);
        for (text, embedding) in TEXTS.iter().zip(&embeddings) {
            let ids = model.tokenize(text, true, false).unwrap();
            let states = hidden_states(&model, &ids, 1).unwrap();
            let rows: Vec<&[f32]> = states.values.chunks(states.columns).collect();
            let column = |k: usize| match pooling {
                Pooling::Mean => rows.iter().map(|r| r[k]).sum::<f32>() / rows.len() as f32,
                Pooling::Cls => rows[0][k],
                _ => rows[rows.len() - 1][k],
            };
            let one: Vec<f32> = (0..states.columns).map(column).collect();
            let length = one.iter().map(|v| v * v).sum::<f32>().sqrt();
            assert_eq!((embedding.tokens, embedding.values.len()), (ids.len(), one.len()));
            for (a, b) in embedding.values.iter().zip(&one) {
                assert!((a - b / length).abs() < 1e-3, "{mode} {text:?}: {a} is not {}", b / length);
            }
        }
    }
}

#[test]
fn on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("a.gguf");
    common::convert(&common::fixture("models/bert"), &gguf, None);
    fs::write(dir.path().join("texts"), "the second\nthe third\n").unwrap();
    let qconv = || {
        let mut command = assert_cmd::Command::cargo_bin("qconv").unwrap();
        command.current_dir(dir.path()).args(["embed", "a.gguf", "-p", "the first"]);
        command
    };
    let failed = qconv().assert().code(2);
    let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(said.contains("a.gguf") && said.contains("--pooling"), "{said}");
    let long = "the ".repeat(600);
    let failed = qconv().args(["--pooling", "mean", "-p", &long]).assert().code(2);
    let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(said.contains("text 2 has 602 tokens, the model takes 512"), "{said}");

    let done = qconv().args(["--pooling", "cls", "--file", "texts"]).assert().success();
    let lines = String::from_utf8(done.get_output().stdout.clone()).unwrap();
    let plain: Vec<Vec<f32>> =
        lines.lines().map(|l| l.split(' ').map(|v| v.parse().unwrap()).collect()).collect();
    assert_eq!(plain.len(), 3);
    for row in &plain {
        let length: f32 = row.iter().map(|v| v * v).sum();
        assert!(row.len() == 64 && (length - 1.0).abs() < 1e-5);
    }
    let done = qconv().args(["--pooling", "cls", "--file", "texts", "--json"]).assert().success();
    let json: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!(json["pooling"], "cls");
    assert_eq!(json["embeddings"][2]["text"], "the third");
    let found: Vec<f32> = serde_json::from_value(json["embeddings"][2]["embedding"].clone()).unwrap();
    assert_eq!(found, plain[2]);
}

#[test]
fn verify_runs_encoders() {
    let dir = tempfile::tempdir().unwrap();
    for name in common::ENCODERS {
        let file = dir.path().join("a.gguf");
        common::convert(&common::fixture(name), &file, Some("f16"));
        assert_verified(&file, &common::fixture(name));
    }
}

/// Every check passes, the forward pass among them.
fn assert_verified(file: &Path, source: &Path) {
    let options = Options { against: Some(source.to_path_buf()), ..Options::new(file) };
    let report = verify(&options, &common::budget(), &Silent).unwrap();
    let passed = report.checks.iter().filter(|c| c.outcome == qconv::verify::Outcome::Passed).count();
    assert_eq!(passed, 4, "{:#?}", report.checks);
}

/// all-MiniLM-L6-v2 embeds as in transformers 5.23 (F32, eager attention; mean, length 1), is
/// verified against its source, and returns from a Hugging Face directory the same.
/// `make demo MODEL=minilm` fetches it; then
/// `QCONV_MINILM=DIR cargo test --release --test embed -- --ignored`
#[test]
#[ignore = "needs the directory that `make demo MODEL=minilm` fetches"]
fn minilm() {
    let source = PathBuf::from(std::env::var_os("QCONV_MINILM").expect("QCONV_MINILM names the directory"));
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a.gguf", "b.gguf"].map(|name| dir.path().join(name));
    common::convert(&source, &a, Some("f32"));
    assert_verified(&a, &source);
    back(&a, &dir.path().join("back"));
    common::convert(&dir.path().join("back"), &b, Some("f32"));
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "the round trip changes the file");

    let first = [
        [0.067657, 0.063496, 0.048713, 0.079305, 0.037448, 0.002653, 0.039375, -0.007098],
        [0.086439, 0.102763, 0.005395, 0.002044, -0.009963, 0.025385, 0.049288, -0.030627],
        [0.040683, -0.024747, 0.108493, 0.02202, 0.054189, 0.015812, 0.023634, -0.042692],
    ];
    let (pooling, found) = texts(&load(&b), &owned(&TEXTS), None, 1).unwrap();
    assert_eq!((pooling, found[0].values.len()), (Pooling::Mean, 384));
    for (found, wanted) in found.iter().zip(first) {
        for (a, b) in found.values.iter().zip(wanted) {
            // llama.cpp computes GELU by its tanh formula, and looks it up in F16.
            assert!((a - b).abs() < 5e-4, "{a} is not {b}");
        }
    }
}
