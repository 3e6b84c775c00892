//! What calibrations read: files and conversations as windows of a model's tokens.
#![cfg(feature = "ggml")]

mod common;

use std::fs;

use qconv::calibrate::text::{SAMPLE_TEXT, TextSource};
use qconv::error::ErrorKind;
use qconv::ggml::{Model, ModelOptions};

/// The fixture as a model, in a directory for files of text.
fn model(name: &str) -> (tempfile::TempDir, Model) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    common::convert(&common::fixture(name), &path, None);
    let model = Model::load(&path, &ModelOptions::default()).unwrap();
    (dir, model)
}

#[test]
fn plain_text_is_one_stream() {
    let (dir, model) = model("tiny-llama");
    let all = model.tokenize(SAMPLE_TEXT, true, false).unwrap();
    let windows = TextSource::default().windows(&model).unwrap();
    assert_eq!(windows.tokens, all[..all.len() / 512 * 512]);
    assert_ne!(SAMPLE_TEXT, qconv::eval::SAMPLE_TEXT);
    let part = TextSource { n_ctx: 100, skip: 3, most: Some(2), ..TextSource::default() };
    assert_eq!(part.windows(&model).unwrap().tokens, all[300..500]);
    // Two files, of which neither fills its last window.
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    fs::write(&paths[0], &SAMPLE_TEXT[..1000]).unwrap();
    fs::write(&paths[1], &SAMPLE_TEXT[1000..2000]).unwrap();
    let mut both = model.tokenize(&SAMPLE_TEXT[..1000], true, false).unwrap();
    both.extend(model.tokenize(&SAMPLE_TEXT[1000..2000], true, false).unwrap());
    let source = TextSource { texts: paths.to_vec(), n_ctx: 64, ..TextSource::default() };
    let windows = source.windows(&model).unwrap();
    assert_eq!(windows.tokens, both[..both.len() / 64 * 64]);
    assert!(source.names()[1].ends_with('b'));
    let long = TextSource { n_ctx: both.len() + 1, ..source.clone() };
    let error = long.windows(&model).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(error.to_string().contains("not one window"), "{error}");
}

#[test]
fn conversations_in_the_models_own_words() {
    let (dir, model) = model("models/fmt-gptq4");
    let path = dir.path().join("chats.jsonl");
    let chat = r#"{"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]}"#;
    fs::write(&path, format!("{chat}\n{}\n{{\"text\": \"And so on.\"}}\n", chat.replace("It is", "It was")))
        .unwrap();
    let chats = vec![path.clone()];
    let source = TextSource { chats, n_ctx: 4, ..TextSource::default() };
    let windows = source.windows(&model).unwrap();
    let text: Vec<u8> =
        windows.tokens.iter().flat_map(|&id| model.token_to_piece(id, true).unwrap()).collect();
    let text = String::from_utf8(text).unwrap();
    println!("{text}");
    let at = |needle: &str| text.find(needle).unwrap_or_else(|| panic!("{needle:?} is not in {text:?}"));
    assert!(at("Is it?") < at("It is.") && at("It is.") < at("It was.") && at("It was.") < at("And so"));
    // No more is read than is needed.
    fs::write(&path, format!("{chat}\nthis is no JSON\n")).unwrap();
    let first = TextSource { most: Some(2), ..source.clone() };
    assert_eq!(first.windows(&model).unwrap().tokens, windows.tokens[..8]);
    let error = source.windows(&model).unwrap_err();
    assert!(error.to_string().contains("chats.jsonl: line 2: is no JSON"), "{error}");
    fs::write(&path, r#"{"messages": [{"role": "user"}]}"#.to_string() + "\n{}").unwrap();
    let error = source.windows(&model).unwrap_err();
    assert!(error.to_string().contains("chats.jsonl: line "), "{error}");
}

#[test]
fn without_a_template_conversations_are_refused() {
    let (dir, model) = model("tiny-llama");
    let path = dir.path().join("chats.jsonl");
    fs::write(&path, r#"{"conversations": [{"from": "human", "value": "Is it?"}]}"#).unwrap();
    let error = TextSource { chats: vec![path], ..TextSource::default() }.windows(&model).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("line 1: the model has no chat template"), "{error}");
    assert!(error.hint_text().unwrap().contains("--parse-special"));
}
