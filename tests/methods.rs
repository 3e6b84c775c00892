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

/// A small model, and its moments.
fn calibrated() -> Place {
    let place = Place::new();
    let source = common::fixture("models/llama");
    let source = source.to_str().unwrap();
    place.succeeds(&["hf-to-gguf", source, "-o", "f32.gguf", "-t", "f32", "--no-verify", "-q"]);
    let text = ["--ctx", "64", "--chunks", "4", "--process-output"];
    place.succeeds(&[&["calibrate", "f32.gguf", "-o", "m.gguf", "-q"], &text[..]].concat());
    place
}

fn tensor(place: &Place, file: &str, name: &str) -> Vec<u8> {
    let gguf = Gguf::open(place.path(file), &Limits::default()).unwrap();
    gguf.store.read_all(gguf.store.get(name).unwrap()).unwrap()
}

#[test]
fn each_tensor_is_rounded_by_its_method() {
    let place = calibrated();
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
    place.refuses(
        &["quantize", "f32.gguf", "x", "-t", "q4_0", "--method", "imatrix"],
        &["needs an importance", "--moments"],
    );
}

#[test]
fn means_are_those_of_the_diagonal() {
    let place = calibrated();
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
    let place = calibrated();
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
