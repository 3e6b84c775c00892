//! Each converted model computes what transformers computes: F32 output, run by the linked
//! llama.cpp on the ids of `reference_logits.safetensors`.
#![cfg(feature = "ggml")]

mod common;

use qconv::eval::embed::{answer_logits, hidden_states};
use qconv::eval::logits::{Matrix, compare, forward};
use qconv::ggml::{Model, ModelOptions};

/// Where llama.cpp computes something else. gpt-oss takes the ends of YaRN's ramp unrounded
/// (`truncate: false`), llama.cpp rounds them; transformers' arithmetic with rounded ends differs from
/// the reference by 9.14e-4, as llama.cpp does.
const LESS_EXACT: &[(&str, f64)] = &[("models/gpt_oss-mxfp4", 9.2e-4)];

#[test]
fn logits_agree_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for name in common::MODELS {
        let source = common::fixture(name);
        let output = dir.path().join("model.gguf");
        common::convert(&source, &output, Some("f32"));
        let (ids, values) = common::reference(&source);
        let wanted = Matrix { columns: values.len() / ids.len(), values };
        let found = forward(&output, &ids, 1).unwrap();
        let agreement = compare(&found, &wanted).unwrap();
        println!("{name}: {agreement:?}");
        assert!(agreement.finite, "{name}");
        let bound = LESS_EXACT.iter().find(|(n, _)| n == name).map_or(5e-4, |(_, bound)| *bound);
        assert!(agreement.rel_rms < bound, "{name}: {agreement:?}");
        assert_eq!(agreement.argmax_agree, agreement.rows, "{name}: {agreement:?}");
    }
}

/// The last hidden states of encoders. llama.cpp computes BERT's GELU by its tanh formula, which
/// transformers does not: that is the difference of some 3e-4.
#[test]
fn hidden_states_agree_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for (name, key) in common::ENCODERS.iter().zip(["last_hidden_state", "encoder_last_hidden_state"]) {
        let source = common::fixture(name);
        let output = dir.path().join("model.gguf");
        common::convert(&source, &output, Some("f32"));
        let (ids, values) = common::reference_named(&source, key);
        let wanted = Matrix { columns: values.len() / ids.len(), values };
        let model = Model::load(&output, &ModelOptions::default()).unwrap();
        let agreement = compare(&hidden_states(&model, &ids, 1).unwrap(), &wanted).unwrap();
        println!("{name}: {agreement:?}");
        assert!(agreement.finite && agreement.rel_rms < 5e-4, "{name}: {agreement:?}");
        assert_eq!(agreement.argmax_agree, agreement.rows, "{name}: {agreement:?}");
    }
}

/// T5's answer to a text: both halves at work. transformers scales tied logits by 1/sqrt(d_model),
/// llama.cpp does not.
#[test]
fn the_answer_of_t5_agrees_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let source = common::fixture("models/t5");
    let output = dir.path().join("model.gguf");
    common::convert(&source, &output, Some("f32"));
    let (ids, values) = common::reference(&source);
    let model = Model::load(&output, &ModelOptions::default()).unwrap();
    let start = model.decoder_start().unwrap();
    let mut found = answer_logits(&model, &ids, &[start], 1).unwrap();
    let scale = (model.n_embd() as f32).sqrt();
    found.values.iter_mut().for_each(|v| *v /= scale);
    let agreement = compare(&found, &Matrix { columns: values.len(), values }).unwrap();
    assert!(agreement.finite && agreement.rel_rms < 5e-4, "{agreement:?}");
    assert_eq!(agreement.argmax_agree, 1, "{agreement:?}");
}
