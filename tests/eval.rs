//! Perplexity and divergence: against transformers, and from a baseline against side by side.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::PathBuf;

use place::Place;
use qconv::eval::SAMPLE_TEXT;
use qconv::eval::windows::Windows;
use qconv::ggml::{Model, ModelOptions};
use serde_json::Value as Json;

/// Windows of the text that the divergences are measured on.
const CHUNKS: &str = "8";

fn number(v: &Json, keys: &[&str]) -> f64 {
    let found = keys.iter().fold(v, |v, k| &v[*k]);
    found.as_f64().unwrap_or_else(|| panic!("{keys:?} of {v}"))
}

fn json(place: &Place, args: &[&str]) -> Json {
    let args = [args, &["-q", "-j", "1", "--json"]].concat();
    serde_json::from_slice(&place.succeeds(&args).stdout).unwrap()
}

fn converted(types: &[&str]) -> Place {
    let place = Place::new();
    for t in types {
        let output: PathBuf = place.path(&format!("{t}.gguf"));
        let source = common::fixture("tiny-llama");
        let args = ["hf-to-gguf", source.to_str().unwrap(), "-o", output.to_str().unwrap(), "--no-verify"];
        place.succeeds(&[&args[..], &["-q", "-t", t]].concat());
    }
    place
}

/// fixtures/tiny-llama/reference.json has the number and its recipe: the same windows, the same half.
#[test]
fn perplexity_is_transformers() {
    let place = converted(&["f32"]);
    let reference = fs::read(common::fixture("tiny-llama/reference.json")).unwrap();
    let reference: Json = serde_json::from_slice(&reference).unwrap();
    let ours = json(&place, &["eval", "perplexity", "f32.gguf"]);
    let (theirs, ppl) = (number(&reference, &["perplexity"]), number(&ours, &["perplexity", "value"]));
    assert!((ppl / theirs - 1.0).abs() < 1e-4, "{ppl} against {theirs}");
    assert_eq!(ours["scored"], reference["scored_tokens"]);
    assert_eq!(ours["windows"], reference["chunks"]);
    let error = number(&ours, &["perplexity", "error"]);
    assert!((1.0..2.0).contains(&error), "{error}");
}

#[test]
fn divergence_grows_as_bits_fall() {
    let types = ["bf16", "q8_0", "q6_k", "q4_k_m", "q4_0", "q2_k", "tq2_0"];
    let place = converted(&types);
    let files: Vec<String> = types.iter().map(|t| format!("{t}.gguf")).collect();
    let mut args = vec!["eval", "compare"];
    args.extend(files.iter().map(String::as_str));
    args.extend(["--chunks", CHUNKS, "--csv", "table.csv", "--plot", "a.svg", "--plot", "a.PNG"]);
    let rows = json(&place, &args);
    let rows = rows.as_array().unwrap();
    let kld = |r: &Json| number(r, &["kld", "value"]);
    assert_eq!((kld(&rows[0]), number(&rows[0], &["same_top", "value"])), (0.0, 1.0));
    for (pair, names) in rows.windows(2).zip(types.windows(2)) {
        assert!(kld(&pair[0]) < kld(&pair[1]), "{names:?}: {} and {}", kld(&pair[0]), kld(&pair[1]));
    }
    // shared/specs/llama-cpp-behaviour.md has llama.cpp's numbers over the whole text.
    for (name, theirs) in [("q8_0", 0.000154), ("q6_k", 0.000816), ("q4_k_m", 0.005225), ("q4_0", 0.007704)] {
        let row = &rows[types.iter().position(|t| *t == name).unwrap()];
        assert!((kld(row) / theirs - 1.0).abs() < 0.25, "{name}: {} against {theirs}", kld(row));
    }
    let table = fs::read_to_string(place.path("table.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + types.len());
    assert!(table.lines().all(|l| l.split(',').count() == 14), "{table}");
    let svg = fs::read_to_string(place.path("a.svg")).unwrap();
    assert_eq!(svg.matches("<circle").count(), types.len() - 1);
    assert!(types[1..].iter().all(|t| svg.contains(&format!(">{t}</text>"))), "{svg}");
    assert!(fs::read(place.path("a.PNG")).unwrap().starts_with(b"\x89PNG\r\n\x1a\n"));
    // Before anything is computed.
    let two = ["eval", "compare", "bf16.gguf", "q8_0.gguf", "-q"];
    place.refuses(&[&two[..], &["--csv", "table.csv"]].concat(), &["table.csv", "--force"]);
    place.refuses(&[&two[..], &["--plot", "a.svg"]].concat(), &["a.svg", "--force"]);
    place.refuses(&[&two[..], &["--plot", "a.pdf"]].concat(), &["a.pdf", ".svg or .png"]);
}

#[test]
fn a_baseline_says_what_the_model_would() {
    let types = ["q8_0", "q4_0", "tq2_0"];
    let place = converted(&[&["bf16"], &types[..]].concat());
    let made = json(&place, &["eval", "baseline", "bf16.gguf", "-o", "base", "--chunks", CHUNKS]);
    assert!(number(&made, &["share_of_f16_logits"]) <= 0.05, "{made}");
    let of = |v: &Json| number(v, &["divergence", "kld", "value"]);
    // Beside what drawing may do (three times the error that is stated), with some air.
    for name in types {
        let name = format!("{name}.gguf");
        let live = json(&place, &["eval", "kld", &name, "--base", "bf16.gguf", "--chunks", CHUNKS]);
        let kept = json(&place, &["eval", "kld", &name, "--base", "base"]);
        let error = number(&kept, &["divergence", "kld_sampling_error"]);
        println!("{name}: {} ± {error} from the baseline, {} side by side", of(&kept), of(&live));
        assert!((of(&kept) / of(&live) - 1.0).abs() < 0.03, "{name}: {} and {}", of(&kept), of(&live));
        assert!((of(&kept) - of(&live)).abs() < 4.0 * error, "{name}: ± {error}");
        for keys in
            [["perplexity", "value"], ["base_perplexity", "value"], ["p_rms", "value"], ["same_top", "value"]]
        {
            let keys = [&["divergence"], &keys[..]].concat();
            let (a, b) = (number(&live, &keys), number(&kept, &keys));
            assert!((a - b).abs() <= 1e-5 * a.abs(), "{name} {keys:?}: {a} and {b}");
        }
    }
    let live = json(&place, &["eval", "kld", "q4_0.gguf", "--base", "bf16.gguf", "--chunks", CHUNKS]);
    // All tokens: nothing is lost.
    json(&place, &["eval", "baseline", "bf16.gguf", "-o", "all", "--chunks", CHUNKS, "--top-k", "2048"]);
    let all = json(&place, &["eval", "kld", "q4_0.gguf", "--base", "all"]);
    assert!((of(&all) / of(&live) - 1.0).abs() < 1e-3, "{} and {}", of(&all), of(&live));
    // And in llama.cpp's format.
    fs::write(place.path("theirs"), llama_cpp_logits(&place.path("bf16.gguf"))).unwrap();
    let theirs = json(&place, &["eval", "kld", "q4_0.gguf", "--base", "theirs"]);
    assert!((of(&theirs) / of(&live) - 1.0).abs() < 1e-3, "{} and {}", of(&theirs), of(&live));
}

/// What `llama-perplexity --save-all-logits` writes, by its `log_softmax`.
fn llama_cpp_logits(model: &std::path::Path) -> Vec<u8> {
    let model = Model::load(model, &ModelOptions::default()).unwrap();
    let windows = Windows::new(&model, SAMPLE_TEXT, 512, Some(CHUNKS.parse().unwrap())).unwrap();
    let mut bytes = b"_logits_".to_vec();
    for n in [512, model.n_tokens() as i32, windows.count() as i32] {
        bytes.extend(n.to_le_bytes());
    }
    windows.tokens.iter().for_each(|t| bytes.extend(t.to_le_bytes()));
    let score = |_: usize, rows: &[&[f32]], _: usize| {
        let row = rows[0];
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let min = row.iter().copied().fold(f32::MAX, f32::min).max(max - 16.0);
        let sum = row.iter().map(|x| f64::from((x - max).exp())).sum::<f64>().ln() as f32;
        let scale = (max - min) / 65535.0;
        bytes.extend(scale.to_le_bytes());
        bytes.extend((min - max - sum).to_le_bytes());
        for &x in row {
            let code = if x > min { ((x - min) / scale).round() as u16 } else { 0 };
            bytes.extend(code.to_le_bytes());
        }
        Ok(())
    };
    windows.read(&[&model], 1, score).unwrap();
    bytes
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = converted(&["q8_0"]);
    let args = ["eval", "baseline", "q8_0.gguf", "-o", "base", "--chunks", "2", "-q", "-j", "1"];
    place.succeeds(&args);
    place.refuses(&args, &["base", "exists already", "--force"]);
    let sound = fs::read(place.path("base")).unwrap();
    let kld = |bytes: &[u8], says: &[&str]| {
        fs::write(place.path("bad"), bytes).unwrap();
        place.refuses(&["eval", "kld", "q8_0.gguf", "--base", "bad", "-q"], says);
        fs::remove_file(place.path("bad")).unwrap();
    };
    kld(&sound[..sound.len() - 1], &["bad", "no sound baseline", "bytes"]);
    kld(&sound[..20], &["bad", "no sound baseline"]);
    let with = |at: usize, word: u32| {
        let mut bytes = sound.clone();
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        bytes
    };
    kld(&with(8, 0), &["windows of 0 tokens"]);
    kld(&with(8, u32::MAX), &["bytes"]);
    kld(&with(12, 100), &["vocabulary of 100"]);
    kld(&with(20, u32::MAX), &["of each prediction"]);
    kld(&with(24, u32::MAX), &["of each prediction"]);
    kld(&with(32, 1 << 20), &["token 1048576", "2048"]);
    let first_row = 32 + 4 * 1024;
    kld(&with(first_row, f32::NAN.to_bits()), &["probability"]);
    place.refuses(&["eval", "kld", "q8_0.gguf", "--base", "base", "--chunks", "1"], &["--chunks"]);
    fs::write(place.path("short.txt"), "It was a fine morning.").unwrap();
    place.refuses(&["eval", "perplexity", "q8_0.gguf", "--text", "short.txt"], &["two windows", "--ctx"]);
    place.refuses(&["eval", "perplexity", "q8_0.gguf", "--text", "none.txt"], &["none.txt"]);
    fs::write(place.path("odd.txt"), [0xff, 0xfe]).unwrap();
    place.refuses(&["eval", "perplexity", "q8_0.gguf", "--text", "odd.txt"], &["odd.txt", "UTF-8"]);
    place.refuses(&["eval", "perplexity", "q8_0.gguf", "--ctx", "2"], &["at least 4"]);
}
