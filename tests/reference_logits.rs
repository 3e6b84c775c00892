//! Each converted model computes what transformers computes: F32 output, run by the linked
//! llama.cpp on the ids of `reference_logits.safetensors`.
#![cfg(feature = "ggml")]

mod common;

use qconv::eval::embed::{answer_logits, hidden_states};
use qconv::eval::logits::{Matrix, compare, forward};
use qconv::ggml::{Context, ContextOptions, Model, ModelOptions, Pooling};

/// Where llama.cpp computes something else. gpt-oss takes the ends of YaRN's ramp unrounded
/// (`truncate: false`), llama.cpp rounds them; transformers' arithmetic with rounded ends differs from
/// the reference by 9.14e-4, as llama.cpp does.
const LESS_EXACT: &[(&str, f64)] = &[("models/gpt_oss-mxfp4", 9.2e-4)];

/// Models whose files differ from llama.cpp's converter on purpose: queries of another scale than llama.cpp
/// gives them, in whose weights the difference goes.
const BEYOND: &[&str] = &["models/gemma2-scaled"];

#[test]
fn logits_agree_with_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for name in common::MODELS.iter().chain(BEYOND) {
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

/// Any directories of models with references of their own, among them rerankers, whose reference is a
/// row of scores. `QCONV_REFERENCES=DIR cargo test --release --test reference_logits -- --ignored
/// --nocapture`
#[test]
#[ignore = "needs directories of models with reference_logits.safetensors"]
fn references_elsewhere() {
    let root = std::env::var_os("QCONV_REFERENCES").expect("QCONV_REFERENCES names the directory");
    let dir = tempfile::tempdir().unwrap();
    let mut faults = 0;
    let mut sources: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    sources.sort();
    for source in sources.iter().filter(|s| s.join("reference_logits.safetensors").exists()) {
        let output = dir.path().join("model.gguf");
        common::convert(source, &output, Some("f32"));
        let model = Model::load(&output, &ModelOptions::default()).unwrap();
        let keys = ["last_hidden_state", "encoder_last_hidden_state", "logits"];
        let found = keys.iter().find_map(|key| Some((*key, common::find_reference(source, key)?)));
        let (key, (ids, values)) = found.expect("a reference");
        let is_rank = key == "logits" && values.len() < ids.len();
        let found = if is_rank {
            let options =
                ContextOptions { n_ctx: 512, n_batch: 512, exact: true, ..ContextOptions::default() };
            let mut context = Context::for_embeddings(&model, &options, Some(Pooling::Rank)).unwrap();
            context.embed(&ids).unwrap();
            Matrix { columns: values.len(), values: context.embeddings().unwrap().concat() }
        } else if key == "logits" {
            forward(&output, &ids, 1).unwrap()
        } else {
            hidden_states(&model, &ids, 1).unwrap()
        };
        let wanted = Matrix { columns: found.columns, values };
        println!("{} {key}: {:?}", source.file_name().unwrap().display(), compare(&found, &wanted));
        let near = compare(&found, &wanted).is_ok_and(|a| a.finite && a.max_abs < 1e-2 && a.rms < 2e-3);
        faults += usize::from(!near);
    }
    assert_eq!(faults, 0);
}
