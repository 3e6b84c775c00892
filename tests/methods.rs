//! Methods by tensor, and what is said of them.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;

use place::Place;
use qconv::container::gguf::Gguf;
use qconv::container::moments::Moments;
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::Value as Json;

fn tensor(place: &Place, file: &str, name: &str) -> Vec<u8> {
    let gguf = Gguf::open(place.path(file), &Limits::default()).unwrap();
    gguf.store.read_all(gguf.store.get(name).unwrap()).unwrap()
}

#[test]
fn each_tensor_is_rounded_by_its_method() {
    let place = Place::calibrated();
    let quantize = |output: &str, more: &[&str]| {
        place.succeeds(&[&["quantize", "f32.gguf", output, "-t", "q4_0", "-q"], more].concat());
    };
    quantize("plain", &[]);
    quantize("rtn", &["--method", "rtn"]);
    assert_eq!(fs::read(place.path("plain")).unwrap(), fs::read(place.path("rtn")).unwrap());
    quantize("imatrix", &["--method", "imatrix", "--moments", "m.gguf"]);
    quantize("gptq", &["--method", "gptq", "--moments", "m.gguf"]);
    quantize(
        "mixed",
        &[
            "--method",
            "imatrix",
            "--tensor-method",
            "FFN_down=gptq",
            "--tensor-method",
            "ffn|attn_q=rtn",
            "--moments",
            "m.gguf",
        ],
    );
    let gguf = Gguf::open(place.path("mixed"), &Limits::default()).unwrap();
    let mut seen = [0; 3];
    for t in gguf.store.tensors().iter().filter(|t| t.dtype.is_block()) {
        let (at, like) = match &*t.name {
            n if n.contains("ffn_down") => (0, "gptq"),
            n if n.contains("ffn") || n.contains("attn_q") => (1, "rtn"),
            _ => (2, "imatrix"),
        };
        seen[at] += 1;
        let found = tensor(&place, "mixed", &t.name);
        assert!(found == tensor(&place, like, &t.name), "{} is not as by {like}", t.name);
        // Embeddings have no input, and Q8_0 no search.
        let is_searched = t.name != "token_embd.weight" && t.dtype != DType::Q8_0;
        let differs =
            ["gptq", "rtn", "imatrix"].iter().filter(|o| found != tensor(&place, o, &t.name)).count();
        assert!(!is_searched || differs == 2, "{}: methods give the same", t.name);
    }
    assert!(seen.iter().all(|&n| n > 0), "{seen:?}");
    place.refuses(&["quantize", "f32.gguf", "x", "-t", "q4_0", "--moments", "m.gguf"], &["without a method"]);
    place.refuses(&["quantize", "f32.gguf", "x", "-t", "q4_0", "--samples", "4"], &["no effect"]);
}

#[test]
fn a_recipe_names_methods() {
    let place = Place::calibrated();
    let rules = "schema = 1\nname = 'OWN'\nid = 2\ntype = 'Q4_0'\nextends = 'q4_0'\n\
                 rules = [{ role = 'attn_v', type = 'Q8_0', method = 'rtn' }, { role = 'attn_q', method = 'gptq' }]\n";
    fs::write(place.path("own.toml"), rules).unwrap();
    let begin = ["quantize", "f32.gguf", "out", "-t", "own.toml", "--force", "--moments", "m.gguf"];
    let methods = |more: &[&str]| {
        place.succeeds(&[&begin[..], &["-q", "--report", "r.json"], more].concat());
        let report: Json = serde_json::from_slice(&fs::read(place.path("r.json")).unwrap()).unwrap();
        let of = |name: &str| {
            let all = report["outcomes"].as_array().unwrap();
            let one = all.iter().find(|o| o["name"].as_str().unwrap().contains(name)).unwrap();
            format!("{} {}", one["dtype"].as_str().unwrap(), one["method"].as_str().unwrap())
        };
        ["blk.1.attn_v", "blk.1.attn_q", "blk.1.ffn_up"].map(of)
    };
    assert_eq!(methods(&[]), ["Q8_0 rtn", "Q4_0 gptq", "Q4_0 rtn"]);
    assert_eq!(
        methods(&["--method", "imatrix", "--tensor-method", "attn_q=rtn"]),
        ["Q8_0 rtn", "Q4_0 rtn", "Q4_0 imatrix"]
    );
    fs::write(place.path("own.toml"), rules.replace("gptq", "gptx")).unwrap();
    let refused = place.qconv(&begin);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("own.toml") && stderr(&refused).contains("gptx"),
        "{}",
        stderr(&refused)
    );
    place.refuses(&["quantize", "f32.gguf", "x", "-t", "no.toml"], &["no.toml"]);
}

#[test]
fn searches_do_not_depend_on_threads() {
    let place = Place::calibrated();
    let quantize = |output: &str, more: &[&str]| {
        let moments = ["--moments", "m.gguf"];
        place.succeeds(&[&["quantize", "f32.gguf", output, "-t", "q4_0", "-q"], &moments[..], more].concat());
        fs::read(place.path(output)).unwrap()
    };
    let gptq = quantize("gptq", &["--tensor-method", "attn_q=gptq"]);
    for (method, few) in [("trainable", "2"), ("adaround", "4"), ("ternary", "1")] {
        let run = |output: &str, iters: &str, j: &str| {
            let by_method = format!("attn_q={method}");
            let options = ["--tensor-method", &by_method, "--iters", iters, "-j", j];
            quantize(&format!("{method}-{output}"), &options)
        };
        let found = run("one", few, "1");
        assert!(found == run("three", few, "3"), "{method} depends on threads");
        assert!(found != gptq, "{method} found nothing");
    }
    let options = ["quantize", "f32.gguf", "x", "-t", "q4_0", "--moments", "m.gguf", "--method"];
    place.refuses(&[&options[..], &["trainable", "--lr", "0.1"]].concat(), &["--lr", "adaround"]);
    place.refuses(&[&options[..], &["gptq", "--iters", "2"]].concat(), &["--iters"]);
}

#[test]
fn means_are_those_of_the_diagonal() {
    let place = Place::calibrated();
    let m = Moments::open(place.path("m.gguf"), &Limits::default()).unwrap();
    for input in &m.contents().inputs {
        let n = input.columns as usize;
        let (square, count) = (m.square(input, 0).unwrap(), m.counts(input).unwrap()[0] as f64);
        let mut means = vec![0f32; n];
        m.mean_squares(input, 0, &mut means).unwrap();
        assert!((0..n).all(|i| means[i] == (square[i * n + i] / count) as f32), "{}", input.name);
        assert!(m.mean_squares(input, 0, &mut means[1..]).is_err());
    }
}

#[test]
fn a_file_says_what_could_be_typed() {
    let place = Place::calibrated();
    fs::create_dir(place.path("sub")).unwrap();
    let yaml = "method: imatrix\nmoments: ../m.gguf\nquiet: true\nmodels:\n\
                - {source: ../f32.gguf, output: a.gguf, type: q4_0}\n\
                - {source: ../f32.gguf, output: b.gguf, type: q5_0, tensor-method: {ffn: rtn}}\n";
    fs::write(place.path("sub/batch.yaml"), yaml).unwrap();
    place.succeeds(&["quantize", "--config", "sub/batch.yaml"]);
    let typed = ["--method", "imatrix", "--moments", "m.gguf", "-q"];
    place.succeeds(&[&["quantize", "f32.gguf", "a", "-t", "q4_0"], &typed[..]].concat());
    let more = ["--tensor-method", "ffn=rtn"];
    place.succeeds(&[&["quantize", "f32.gguf", "b", "-t", "q5_0"], &typed[..], &more].concat());
    for name in ["a", "b"] {
        let own = fs::read(place.path(&format!("sub/{name}.gguf"))).unwrap();
        assert!(own == fs::read(place.path(name)).unwrap(), "{name}");
    }
    fs::write(place.path("bad.toml"), "type = 'q4_0'\nmethd = 'gptq'\n").unwrap();
    place.refuses(
        &["quantize", "f32.gguf", "x", "--config", "bad.toml"],
        &["bad.toml", "methd", "there is method"],
    );
    place.refuses(&["quantize", "f32.gguf", "x", "--config", "none"], &["balanced"]);
}

/// Methods for a few tensors only, for their time.
const FEW: &[&str] = &["-t", "q4_0", "--tensor-method", "blk.0.attn=gptq"];
const SAMPLES: &[&str] = &["--samples", "4", "--sample-length", "64"];

fn stderr(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_a_method_needs_is_collected_first() {
    let place = Place::calibrated();
    let quantize = |output: &'static str| [&["quantize", "f32.gguf", output][..], FEW, SAMPLES].concat();
    let before = place.listing();
    let shown = place.succeeds(&[&quantize("a.gguf")[..], &["--dry-run"]].concat());
    assert!(String::from_utf8_lossy(&shown.stdout).contains("calibrated first, into f32.moments.gguf"));
    assert_eq!(place.listing(), before);
    place.succeeds(&quantize("a.gguf"));
    let given = [&["quantize", "f32.gguf", "b.gguf"][..], FEW, &["--moments", "f32.moments.gguf", "-q"]];
    place.succeeds(&given.concat());
    assert!(fs::read(place.path("a.gguf")).unwrap() == fs::read(place.path("b.gguf")).unwrap());
    // It is kept for the next, and for nothing else.
    let again = place.succeeds(&quantize("c.gguf"));
    assert!(stderr(&again).contains("calibrated before"), "{}", stderr(&again));
    let other = [&["quantize", "f32.gguf", "d.gguf"][..], FEW, &["--samples", "3", "--sample-length", "64"]];
    place.refuses(&[&other.concat()[..], &["-q"]].concat(), &["f32.moments.gguf", "another model, text"]);
    fs::write(place.path("own.jsonl"), "{\"text\": \"It is a truth universally acknowledged\"}\n".repeat(99))
        .unwrap();
    let own = [&other.concat()[..], &["--calibration", "own.jsonl", "--force", "-q"]].concat();
    place.succeeds(&own);
    let moments = Moments::open(place.path("f32.moments.gguf"), &Limits::default()).unwrap();
    assert!(moments.contents().texts[0].name.contains("own.jsonl"));
    place.refuses(&quantize("a.gguf"), &["exists already"]);
}

#[test]
fn a_checkpoint_is_made_to_run_for_that() {
    let place = Place::new();
    let source = common::fixture("models/llama");
    let convert = |more: &[&'static str]| {
        let begin = ["hf-to-gguf", source.to_str().unwrap(), "-o", "a.gguf", "--no-verify"];
        [&begin[..], FEW, SAMPLES, more].concat().into_iter().map(String::from).collect::<Vec<_>>()
    };
    let args = convert(&["--dry-run"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let shown = place.succeeds(&args);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("that can be run would lie"));
    assert!(place.listing().is_empty());
    let args = convert(&["--evaluate", "--evaluate-chunks", "2", "--json", "-q"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let summary: Json = serde_json::from_slice(&place.succeeds(&args).stdout).unwrap();
    assert!(summary["evaluation"]["kld"]["value"].as_f64().unwrap() > 0.0);
    // The conversion is gone, its moments are kept.
    let names: Vec<_> = place.listing().into_keys().map(|p| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["a.gguf", "llama.moments.gguf"]);
    // Converted again it is the same model.
    let args = convert(&["--force"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(stderr(&place.succeeds(&args)).contains("calibrated before"));
}

#[test]
fn a_report_says_what_became_of_each_tensor() {
    let place = Place::calibrated();
    let args = [&["quantize", "f32.gguf", "q.gguf", "--moments", "m.gguf", "-q"][..], FEW];
    let reports = ["--report", "r.md", "--report", "r.json", "--evaluate", "--evaluate-chunks", "2"];
    place.succeeds(&[&args.concat()[..], &reports].concat());
    let report: Json = serde_json::from_slice(&fs::read(place.path("r.json")).unwrap()).unwrap();
    let outcomes = report["outcomes"].as_array().unwrap();
    let gguf = Gguf::open(place.path("q.gguf"), &Limits::default()).unwrap();
    assert_eq!(outcomes.len(), gguf.store.tensors().len());
    let markdown = fs::read_to_string(place.path("r.md")).unwrap();
    let mut guided = 0;
    for (outcome, t) in outcomes.iter().zip(gguf.store.tensors()) {
        assert_eq!(outcome["name"], t.name.as_str());
        assert!(markdown.contains(&format!("| {} | {} |", t.name, t.dtype)), "{}", t.name);
        let is_guided = t.name.starts_with("blk.0.attn") && t.dtype.is_block();
        assert_eq!(outcome["method"] == "gptq", is_guided, "{}", t.name);
        if is_guided {
            guided += 1;
            let error = |part: &str| outcome["error"][part].as_f64().unwrap();
            assert!(0.0 < error("after") && error("after") < error("before"), "{}", t.name);
        }
    }
    assert_eq!(guided, 4);
    let kld = ["eval", "kld", "q.gguf", "--base", "f32.gguf", "--chunks", "2", "--json", "-q"];
    let measured: Json = serde_json::from_slice(&place.succeeds(&kld).stdout).unwrap();
    for part in ["kld", "perplexity", "base_perplexity", "same_top"] {
        let (own, other) = (&report["evaluation"][part]["value"], &measured["divergence"][part]["value"]);
        assert!(
            (own.as_f64().unwrap() / other.as_f64().unwrap() - 1.0).abs() < 1e-6,
            "{part}: {own} {other}"
        );
    }
    assert_eq!(report["evaluation"]["has_collapsed"], false);
    let no = [&["quantize", "f32.gguf", "x.gguf", "-t", "q4_0", "--report"][..], &["r.md"]].concat();
    place.refuses(&no, &["r.md", "exists already"]);
}
