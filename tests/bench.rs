//! `qconv bench`: what it reports is of this model and these tests.
#![cfg(feature = "ggml")]

mod common;
#[path = "common/place.rs"]
mod place;

use place::Place;
use serde_json::Value as Json;

#[test]
fn speeds_and_memory_are_reported() {
    let place = Place::new();
    let source = common::fixture("tiny-llama");
    for t in ["bf16", "q8_0"] {
        common::convert(&source, &place.path(&format!("{t}.gguf")), Some(t));
    }
    let args = ["bench", "bf16.gguf", "q8_0.gguf", "-p", "300,40", "-n", "8", "-r", "3", "-t", "1,1", "-q"];
    let json = place.succeeds(&[&args[..], &["--json"]].concat()).stdout;
    let rows: Vec<Json> = serde_json::from_slice(&json).unwrap();
    let column = |key: &str| rows.iter().map(|r| r[key].clone()).collect::<Vec<Json>>();
    assert_eq!(column("model"), ["bf16.gguf", "bf16.gguf", "q8_0.gguf", "q8_0.gguf"]);
    // Two threads would wait for each other on a busy machine.
    assert_eq!(column("threads"), [1; 4]);
    for row in &rows {
        let tests = row["tests"].as_array().unwrap();
        let names: Vec<&str> = tests.iter().map(|t| t["test"].as_str().unwrap()).collect();
        assert_eq!(names, ["pp300", "pp40", "tg8"]);
        for test in tests {
            let runs: Vec<f64> =
                test["runs"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
            let mean = runs.iter().sum::<f64>() / 3.0;
            assert!(runs.len() == 3 && runs.iter().all(|r| *r > 0.0), "{test}");
            assert!((test["tokens_per_second"].as_f64().unwrap() / mean - 1.0).abs() < 1e-9, "{test}");
        }
        // Keys and values in F16: 4 layers of 2 x 4 heads x 32 values, for 300 tokens rounded up to 512.
        assert_eq!(row["cache_bytes"], 512 * 4 * 2 * 4 * 32 * 2);
        let n = |key: &str| row[key].as_u64().unwrap();
        assert!(n("compute_bytes") > 0 && n("weight_bytes") + (1 << 16) > n("bytes"), "{row}");
        if cfg!(target_os = "linux") {
            assert!(n("peak_bytes") > n("cache_bytes") + n("compute_bytes"), "{row}");
        }
    }
    assert!(rows[0]["bytes"].as_u64() > rows[2]["bytes"].as_u64());

    let csv = String::from_utf8(place.succeeds(&[&args[..], &["--csv"]].concat()).stdout).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 1 + 4 * 3);
    assert!(lines.iter().all(|l| l.split(',').count() == 13), "{csv}");
    let table = String::from_utf8(place.succeeds(&args).stdout).unwrap();
    assert!(table.lines().count() == 5 && table.contains("pp40 tokens/s"), "{table}");
    place.refuses(&["bench", "bf16.gguf", "-p", "0", "-n", "0"], &["nothing to measure"]);
    place.refuses(&["bench", "none.gguf"], &["none.gguf"]);
    common::convert(&common::fixture("models/bert"), &place.path("bert.gguf"), None);
    place.refuses(&["bench", "bert.gguf", "-q"], &["bert.gguf", "an encoder"]);
}
