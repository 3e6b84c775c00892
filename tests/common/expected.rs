//! `fixtures/expect`: what llama.cpp's own converter wrote.

use std::fs;
use std::path::Path;

use qconv::container::gguf::{Gguf, Value};
use qconv::limits::Limits;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

/// Differences that are on purpose; README.md gives the reasons.
const ON_PURPOSE: &[(&str, &str)] = &[
    // transformers 5 does not write which function chooses the experts, and the converter then lacks it.
    ("deepseek_v3", "deepseek2.expert_gating_func"),
    // The converter forgets it for this architecture.
    ("gpt_neox-seq", "general.file_type"),
    // It writes 2048 whatever config.json says.
    ("falcon2", "falcon.context_length"),
];

pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Python's `json.dumps`: ASCII, and a space behind commas.
fn python_json(values: &[Json]) -> String {
    let one = |v: &Json| match v {
        Json::String(s) => {
            let quoted = serde_json::to_string(s).unwrap();
            quoted
                .chars()
                .map(|c| match c {
                    '\u{7f}' => c.to_string(),
                    c if c.is_ascii() => c.to_string(),
                    c => c.encode_utf16(&mut [0; 2]).iter().map(|u| format!("\\u{u:04x}")).collect(),
                })
                .collect::<String>()
        }
        Json::Number(n) if n.is_f64() => python_float(n.as_f64().unwrap()),
        Json::Bool(b) => b.to_string(),
        v => v.to_string(),
    };
    format!("[{}]", values.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// Python's repr of a float: of two shortest forms equally near it takes the even one.
fn python_float(v: f64) -> String {
    let plain = format!("{v:?}");
    match plain.split_once('e') {
        // Rust 1e-5, Python 1e-05
        Some((digits, exponent)) => {
            let n: i32 = exponent.parse().unwrap();
            format!("{digits}e{}{:02}", if n < 0 { '-' } else { '+' }, n.abs())
        }
        None => {
            let decimals = plain.split_once('.').map_or(0, |(_, digits)| digits.len());
            let even = format!("{v:.decimals$}");
            if even.parse() == Ok(v) { even } else { plain }
        }
    }
}

fn scalar(v: &Value) -> Json {
    match v {
        Value::String(s) => json!(String::from_utf8_lossy(s)),
        Value::Bool(b) => json!(b),
        Value::F32(f) => json!(f64::from(*f)),
        Value::F64(f) => json!(f),
        Value::I32(i) => json!(i),
        Value::I64(i) => json!(i),
        v => json!(v.as_u64().unwrap()),
    }
}

/// A value in the form of `fixtures/expect`.
pub fn recorded(v: &Value) -> Json {
    match v {
        Value::Array(a) => {
            let items: Vec<Json> = (0..a.len()).map(|i| scalar(&a.get(i).unwrap())).collect();
            if items.len() <= 24 {
                json!({"array": a.element_type().name(), "value": items})
            } else {
                let digest = hex(python_json(&items).as_bytes());
                json!({"array": a.element_type().name(), "len": items.len(), "sha256": digest})
            }
        }
        Value::String(s) if String::from_utf8_lossy(s).chars().count() > 160 => {
            json!({"type": "STRING", "len": String::from_utf8_lossy(s).chars().count(), "sha256": hex(s)})
        }
        v => json!({"type": v.value_type().name(), "value": scalar(v)}),
    }
}

/// Compares a converted file with what is recorded; `skip` tells which keys do not count.
pub fn compare(name: &str, output: &Path, skip: &dyn Fn(&str) -> bool) {
    let text = fs::read(super::fixture(&format!("expect/{name}.json"))).unwrap();
    let expected: Json = serde_json::from_slice(&text).unwrap();
    if expected["converts_by_reference"] == false {
        println!("{name}: llama.cpp's converter refuses it: {}", expected["reason"]);
        return;
    }
    let gguf = Gguf::open(output, &Limits::default()).unwrap();
    let tensors = expected["tensors"].as_object().unwrap();
    assert!(!tensors.is_empty());
    for t in gguf.store.tensors() {
        let shape: Vec<u64> = t.shape.iter().rev().copied().collect();
        let found = json!([shape, t.dtype.name(), hex(&gguf.store.read_all(t).unwrap())]);
        assert_eq!(Some(&found), tensors.get(&t.name), "{name}: tensor {}", t.name);
    }
    assert_eq!(gguf.store.tensors().len(), tensors.len(), "{name}: number of tensors");

    let soft: Vec<&str> = expected["soft_kv"].as_array().unwrap().iter().filter_map(Json::as_str).collect();
    let counts = |key: &str| {
        !soft.contains(&key) && !skip(key) && !ON_PURPOSE.iter().any(|(model, k)| *model == name && *k == key)
    };
    let mut faults = Vec::new();
    for (key, value) in expected["kv"].as_object().unwrap() {
        if counts(key) {
            let found = gguf.metadata.get(key).map(recorded);
            let same = found.as_ref().is_some_and(|f| {
                // The record may say more than we do (the first entries of an array).
                f.as_object()
                    .unwrap()
                    .iter()
                    .all(|(k, v)| value.get(k) == Some(v) || (k == "len" && value.get(k).is_none()))
            });
            if !same {
                faults.push(format!("{key}: expected {value}, found {found:?}"));
            }
        }
    }
    for (key, value) in gguf.metadata.iter() {
        if counts(key) && expected["kv"].get(key).is_none() {
            faults.push(format!("{key}: not expected, found {value}"));
        }
    }
    assert!(faults.is_empty(), "{name}:\n{}", faults.join("\n"));
}
