//! `.qpack` files and Hugging Face directories run through the engine: exactly where a type of ggml holds their
//! weights, else with an error that is stated.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::path::Path;

use place::Place;
use qconv::block::codec;
use qconv::container::gguf::Gguf;
use qconv::eval::logits;
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::Value as Json;

fn model(name: &str) -> String {
    common::fixture(name).to_str().unwrap().to_string()
}

/// Types and values of a GGUF file's tensors.
fn tensors(path: &Path) -> BTreeMap<String, (DType, Vec<f32>)> {
    let store = Gguf::open(path, &Limits::default()).unwrap().store;
    let one = |t: &qconv::tensor::TensorInfo| {
        let mut values = vec![0.0; t.elements() as usize];
        codec(t.dtype).unwrap().decode(&store.read_all(t).unwrap(), &mut values).unwrap();
        (t.name.clone(), (t.dtype, values))
    };
    store.tensors().iter().map(one).collect()
}

/// How many tensors have the type.
fn count(tensors: &BTreeMap<String, (DType, Vec<f32>)>, dtype: DType) -> usize {
    tensors.values().filter(|(own, _)| *own == dtype).count()
}

fn json(place: &Place, args: &[&str]) -> Json {
    let output = place.qconv(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What `run` says of a model, which leaves nothing behind.
fn run(place: &Place, file: &str) -> (String, Json) {
    let before = place.listing();
    let found = json(place, &["run", file, "-p", "It was", "-n", "6", "--temp", "0", "-j", "1", "--json"]);
    assert_eq!(place.listing(), before, "{file} leaves something behind");
    (found["text"].as_str().unwrap().to_string(), found["converted"].clone())
}

/// The bits of the logits of some tokens.
fn predicted(place: &Place, file: &str) -> Vec<u32> {
    let ids: Vec<i32> = (0..24).map(|i| i * 7 % 200).collect();
    let found = logits::forward(place.path(file), &ids, 1).unwrap();
    found.values.iter().map(|v| v.to_bits()).collect()
}

fn convert(place: &Place, source: &str, output: &str, more: &[&str]) {
    place.succeeds(&[&["hf-to-gguf", source, "-o", output, "--no-verify", "-q"], more].concat());
}

const DECODED: [&str; 2] = ["--decoded-type", "q8_0"];

/// The same codes give the same logits, whatever holds them.
#[test]
fn codes_of_gptq_and_gguf_are_the_same() {
    let place = Place::new();
    let source = model("tiny-llama");
    let gptq = ["--to", "gptq", "--bits", "4", "--group-size", "32", "--sym", "--dtype", "f16"];
    place.succeeds(&[&["convert", &source, "-o", "gptq", "-q"], &gptq[..]].concat());
    convert(&place, "gptq", "a.gguf", &[]);
    assert_eq!(count(&tensors(&place.path("a.gguf")), DType::Q4_0), 28);
    for (source, packed, command) in [
        ("gptq", "gptq.qpack", "qconv hf-to-gguf --decoded-type q8_0"),
        ("a.gguf", "gguf.qpack", "qconv unpack"),
    ] {
        place.succeeds(&["pack", source, "-o", packed, "-q"]);
        let (text, converted) = run(&place, packed);
        assert_eq!(text, run(&place, "a.gguf").0, "{packed}");
        assert_eq!((&converted["command"], &converted["rounded"]), (&command.into(), &serde_json::json!({})));
        assert_eq!(converted["exact_tensors"], 39);
        let options = ["--chunks", "1", "--ctx", "64", "-j", "1", "--json"];
        let kld = json(&place, &[&["eval", "kld", packed, "--base", "a.gguf"], &options[..]].concat());
        assert_eq!(kld["divergence"]["kld_max"], 0.0, "{kld}");
        assert_eq!(kld["divergence"]["perplexity"], kld["divergence"]["base_perplexity"]);
    }
    // What is run is what the command writes.
    convert(&place, "gptq.qpack", "b.gguf", &DECODED);
    place.succeeds(&["unpack", "gguf.qpack", "-o", "c.gguf", "-q"]);
    let wanted = predicted(&place, "a.gguf");
    assert!(wanted == predicted(&place, "b.gguf") && wanted == predicted(&place, "c.gguf"));
    // A file that is given is what it is.
    assert_eq!(run(&place, "a.gguf").1, Json::Null);
}

/// Digits go into TQ2_0 where 256 share a scale, into Q4_0 where 32 do; both are the same weights.
#[test]
fn ternary_digits_run_exactly() {
    let place = Place::new();
    for (group, dtype) in [("-1", DType::TQ2_0), ("32", DType::Q4_0)] {
        let options = ["--encoding", "ternary", "--group-size", group];
        place.succeeds(
            &[&["pack", &model("tiny-llama"), "-o", "t.qpack", "-q", "--force"], &options[..]].concat(),
        );
        let (text, converted) = run(&place, "t.qpack");
        assert_eq!(converted["rounded"], serde_json::json!({}), "{dtype}");
        convert(&place, "t.qpack", "t.gguf", &["--force"]);
        convert(&place, "t.qpack", "f32.gguf", &["-t", "f32", "--force"]);
        let (found, wanted) = (tensors(&place.path("t.gguf")), tensors(&place.path("f32.gguf")));
        assert_eq!(count(&found, dtype), 28);
        assert!(found.iter().all(|(name, (_, values))| *values == wanted[name].1), "{dtype}");
        assert_eq!(text, run(&place, "t.gguf").0);
        // TQ1_0 where it is asked for; embeddings are left alone.
        if dtype == DType::TQ2_0 {
            convert(&place, "t.qpack", "t1.gguf", &["-t", "tq1_0"]);
            let found = tensors(&place.path("t1.gguf"));
            assert_eq!(count(&found, DType::TQ1_0), 28);
            assert_eq!(found["token_embd.weight"].0, DType::F16);
            let is_same = |name: &String| found[name].1 == wanted[name].1;
            assert!(found.keys().filter(|name| name.starts_with("blk.")).all(is_same));
        }
    }
}

/// What no type holds is rounded to Q8_0, and the error is stated; it is that of the values.
#[test]
fn tables_run_nearly() {
    let place = Place::new();
    place.succeeds(&["pack", &model("tiny-llama"), "-o", "n.qpack", "--encoding", "nf4", "-q"]);
    let (text, converted) = run(&place, "n.qpack");
    convert(&place, "n.qpack", "n.gguf", &DECODED);
    assert_eq!(text, run(&place, "n.gguf").0);
    convert(&place, "n.qpack", "f32.gguf", &["-t", "f32"]);
    let (found, wanted) = (tensors(&place.path("n.gguf")), tensors(&place.path("f32.gguf")));
    let mut worst = 0f64;
    for (name, (dtype, values)) in &found {
        let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
        let lost = squares(&mut values.iter().zip(&wanted[name].1).map(|(a, b)| a - b));
        let nmse = lost / squares(&mut wanted[name].1.iter().copied());
        assert_eq!(nmse > 0.0, *dtype == DType::Q8_0, "{name}");
        worst = worst.max(nmse);
    }
    assert_eq!(count(&found, DType::Q8_0), 28);
    assert_eq!(converted["rounded"]["Q8_0"]["tensors"], 28);
    let stated = converted["rounded"]["Q8_0"]["worst_nmse"].as_f64().unwrap();
    assert!((stated / worst - 1.0).abs() < 1e-6 && stated < 1e-4, "{stated} {worst}");
    place.refuses(
        &["hf-to-gguf", "n.qpack", "-o", "x.gguf", "-t", "f16", "--decoded-type", "q8_0"],
        &["--type"],
    );
    place.refuses(&["hf-to-gguf", "n.qpack", "-o", "x.gguf", "--decoded-type", "q5_k"], &["q5_k", "q8_0"]);
}

/// Every command that runs a model takes it in any form, and leaves nothing behind.
#[test]
fn every_command_runs_any_form() {
    let place = Place::new();
    let source = model("models/llama");
    // The model's name is its file's.
    place.succeeds(&["pack", &source, "-o", "llama.qpack", "-q"]);
    convert(&place, &source, "m.gguf", &[]);
    let text = ["--ctx", "64", "--chunks", "2", "-q"];
    for file in ["llama.qpack", "m.gguf"] {
        let output = |name: &str| format!("{file}.{name}");
        let (moments, imatrix, baseline) = (output("moments"), output("imatrix"), output("baseline"));
        place.succeeds(&[&["calibrate", file, "-o", &moments], &text[..]].concat());
        place.succeeds(&[&["imatrix", file, "-o", &imatrix], &text[..]].concat());
        place.succeeds(&[&["eval", "baseline", file, "-o", &baseline], &text[..]].concat());
        place.succeeds(&["bench", file, "-p", "4", "-n", "1", "-r", "1", "-q"]);
    }
    let same = |name: &str| {
        let [a, b] = ["llama.qpack", "m.gguf"]
            .map(|file| std::fs::read(place.path(&format!("{file}.{name}"))).unwrap());
        assert!(a == b, "{name}");
    };
    same("moments");
    same("baseline");
    let table =
        json(&place, &[&["eval", "compare", "m.gguf", "llama.qpack", &source, "--json"], &text[..]].concat());
    for row in &table.as_array().unwrap()[1..] {
        assert_eq!(row["kld_max"], 0.0, "{row}");
        assert!(row["converted"]["exact_tensors"].as_u64() > Some(0), "{row}");
    }
    // GGUF in .qpack is quantized as GGUF is, by a method that has to run it.
    place.succeeds(&["pack", "m.gguf", "-o", "g.qpack", "-q"]);
    let method = ["--method", "gptq", "--samples", "2", "--sample-length", "64", "-q"];
    for file in ["m.gguf", "g.qpack"] {
        place.succeeds(&[&["quantize", file, &format!("{file}.q4"), "-t", "q4_0"], &method[..]].concat());
    }
    let quantized = ["m.gguf.q4", "g.qpack.q4"].map(|file| tensors(&place.path(file)));
    assert!(quantized[0] == quantized[1] && count(&quantized[0], DType::Q4_0) > 10);
    // Its predictions are those of what it was made of.
    let report = json(&place, &["verify", "m.gguf", "--against", "g.qpack", "--json"]);
    let forward = report["checks"].as_array().unwrap().iter().find(|c| c["name"] == "forward").unwrap();
    assert_eq!(forward["outcome"], "passed", "{forward}");
    assert!(forward["detail"].as_str().unwrap().contains("0.00e0"), "{forward}");
    let files: Vec<_> = place.listing().into_keys().collect();
    let is_left = |path: &&std::path::PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with('.');
    assert_eq!(files.iter().find(is_left), None);
}

#[test]
fn what_cannot_be_run_is_said() {
    let place = Place::new();
    let weights = common::fixture("tiny-llama").join("model.safetensors");
    std::fs::copy(weights, place.path("lone.safetensors")).unwrap();
    place.succeeds(&["pack", "lone.safetensors", "-o", "lone.qpack", "-q"]);
    place.refuses(&["run", "lone.qpack", "-p", "x"], &["lone.qpack", "config.json", "inspect"]);
    place.refuses(&["eval", "perplexity", "none.qpack"], &["none.qpack"]);
}

/// Ctrl-C ends the program, and removes what it runs.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};
    let place = Place::new();
    place.succeeds(&["pack", &model("tiny-llama"), "-o", "m.qpack", "-q"]);
    let before = place.listing();
    let mut child = Command::new(env!("CARGO_BIN_EXE_qconv"))
        .args(["run", "m.qpack", "-n", "-1", "-p", "It was", "-j", "1"])
        .current_dir(place.0.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().flush().unwrap();
    // It generates.
    let mut byte = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    assert!(
        Command::new("kill").args([common::interrupt(), &child.id().to_string()]).status().unwrap().success()
    );
    child.wait_with_output().unwrap();
    assert_eq!(place.listing(), before);
}
