//! Mixed precision on the small trained model: targets are kept, mixtures are better than file types,
//! recipes can be used again, and what was measured is not measured twice.
#![cfg(feature = "ggml")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use assert_cmd::Command;
use serde_json::Value;

/// The model as GGUF, not quantized.
fn model() -> &'static Path {
    static MODEL: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bf16.gguf");
        common::convert(&common::fixture("tiny-llama"), &path, None);
        (dir, path)
    });
    path
}

fn quantize(args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("qconv").unwrap();
    command.arg("quantize").arg(model()).args(args).output().unwrap()
}

/// The summary in JSON.
fn done(args: &[&str]) -> Value {
    let output = quantize(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(args: &[&str]) -> String {
    let output = quantize(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn sizes_are_kept_and_recipes_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (a, b, c) = (path("a.gguf"), path("b.gguf"), path("c.gguf"));
    let (kept, recipe) = (path("s.json"), path("types.txt"));
    let common = ["--target-size", "2200000", "--windows", "1", "--measure", "layers"];
    let first = done(&[&[&a[..], "--sensitivity", &kept, "--save-recipe", &recipe], &common[..]].concat());
    let bytes = fs::metadata(&a).unwrap().len();
    assert!((2_150_000..=2_200_000).contains(&bytes), "{bytes}");
    assert_eq!(first["mix"]["trials"], 6, "four layers, the embeddings and the output");
    // The recipe is an ordinary one.
    let file_type = first["mix"]["file_type"].as_str().unwrap();
    done(&[&b, "-t", file_type, "--tensor-type-file", &recipe]);
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    // What was measured stays so; an edit shows that it is used.
    let text = fs::read_to_string(&kept).unwrap();
    let mut table: Value = serde_json::from_str(&text).unwrap();
    let output = first["mix"]["types"]["output.weight"].as_str().unwrap().to_string();
    let trials = table["trials"].as_array_mut().unwrap();
    trials.iter_mut().filter(|t| t["tensors"][0] == "output.weight").for_each(|t| t["kld"] = 1e-9.into());
    fs::write(&kept, table.to_string()).unwrap();
    let second = done(&[&[&c[..], "--sensitivity", &kept], &common[..]].concat());
    assert_eq!(second["mix"]["trials"], 6);
    // Also where nothing is to be measured.
    let args =
        [&c[..], "--force", "--sensitivity", &kept, "--target-size", "2200000", "--measure", "nothing"];
    assert_eq!(done(&args)["mix"]["types"], second["mix"]["types"]);
    assert_eq!(second["mix"]["types"]["output.weight"], "Q2_K", "it was {output}");
    // Of another rounding it says nothing.
    let imatrix = common::fixture("imatrix/tiny-llama.gguf");
    let args = [&c[..], "--force", "--sensitivity", &kept, "--imatrix", imatrix.to_str().unwrap()];
    assert!(refused(&[&args[..], &common[..]].concat()).contains("another rounding"));
}

#[test]
fn estimates_alone_and_types_that_are_fixed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (a, b) = (path("a.gguf"), path("b.gguf"));
    let imatrix = common::fixture("imatrix/tiny-llama.gguf");
    let found = done(&[
        &a,
        "--target-bpw",
        "3.5",
        "--measure",
        "nothing",
        "--types",
        "iq2_xs,q3_k,iq4_xs,q5_0",
        "--tensor-type",
        "attn_v=q8_0",
        "--token-embedding-type",
        "q4_0",
        "--imatrix",
        imatrix.to_str().unwrap(),
    ]);
    assert!(found["bits_per_weight"].as_f64().unwrap() <= 3.5);
    assert!(found["bits_per_weight"].as_f64().unwrap() > 3.4);
    let types = found["mix"]["types"].as_object().unwrap();
    for (name, dtype) in types {
        let dtype = dtype.as_str().unwrap();
        match name.as_str() {
            "token_embd.weight" => assert_eq!(dtype, "Q4_0"),
            n if n.contains("attn_v") => assert_eq!(dtype, "Q8_0"),
            _ => assert!(["IQ2_XS", "Q3_K", "IQ4_XS", "Q5_0"].contains(&dtype), "{name}: {dtype}"),
        }
    }
    assert_eq!(types.len(), 30);
    assert!(found["mix"]["measured"].is_null());
    for (args, says) in [
        (vec!["--target-size", "1000"], "no mixture has 1000 bytes or fewer: the smallest has 1"),
        (vec!["--target-bpw", "1"], "no mixture has 1 bits for each weight or fewer: the smallest has 2"),
        (vec!["--target-bpw", "4", "-t", "q4_k_m"], "cannot be used with"),
        (vec!["--max-kld", "0.1", "--target-bpw", "3"], "cannot be used with"),
        (vec!["--max-kld", "0"], "above 0"),
        (vec!["--target-bpw", "3", "--types", "iq2_xs,q8_0"], "iq2_xs"),
        (vec!["--target-bpw", "3", "--types", "q4_k"], "no tensor whose type could be chosen"),
        (vec!["--windows", "2"], "--target-size"),
        (vec![], "--type"),
    ] {
        let message = refused(&[&[&b[..], "--measure", "nothing"][..], &args].concat());
        assert!(message.to_lowercase().contains(says), "{args:?}: {message}");
    }
}

#[test]
fn quality_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (a, b) = (path("a.gguf"), path("b.gguf"));
    let sensitivity = path("s.json");
    let args = ["--windows", "2", "--measure", "layers", "--sensitivity", &sensitivity];
    let kld = done(&[&[&a[..], "--max-kld", "0.02"], &args[..]].concat());
    let value = |of: &Value, what: &str| of["mix"][what]["kld"]["value"].as_f64().unwrap();
    assert!(value(&kld, "measured") <= 0.02 && value(&kld, "held_out") <= 0.02, "{kld:#}");
    assert!(value(&kld, "measured") > 0.012, "the model could be smaller: {kld:#}");
    let ppl = done(&[&[&b[..], "--max-ppl-increase", "3%"], &args[..]].concat());
    let increase = |what: &str| ppl["mix"][what]["ln_ratio"]["value"].as_f64().unwrap().exp_m1();
    assert!(increase("measured") <= 0.03 && increase("held_out") <= 0.03, "{ppl:#}");
    assert_eq!(ppl["mix"]["trials"], kld["mix"]["trials"]);
    let none = refused(&[&[&b[..], "--force", "--max-kld", "1e-7"], &args[..]].concat());
    assert!(none.contains("no mixture of these types meets the target"), "{none}");
}

/// Bytes of the tensors and KLD of models, on a text that nothing was chosen by.
fn compare(models: &[PathBuf]) -> Vec<(f64, f64)> {
    let text = common::fixture("tiny-llama/evaluation.txt");
    let mut command = Command::cargo_bin("qconv").unwrap();
    command.args(["eval", "compare"]).arg(model()).args(models);
    let output = command.args(["--chunks", "4", "--json", "-q", "--text"]).arg(text).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let number = |v: &Value| v.as_f64().unwrap();
    rows[1..].iter().map(|r| (number(&r["bytes"]), number(&r["kld"]["value"]))).collect()
}

/// `cargo test --release --test mix -- --nocapture mixtures` prints the table of docs/quantizers.md; with
/// `QCONV_MIX_METHOD=gptq` and `QCONV_MIX_MOMENTS=FILE` that of another method.
#[test]
fn mixtures_lie_below_the_curve_of_file_types() {
    const FIXED: [&str; 8] = ["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"];
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(format!("{name}.gguf"));
    let var = |name: &str| std::env::var(format!("QCONV_MIX_{name}")).ok();
    let imatrix = common::fixture("imatrix/tiny-llama.gguf").to_str().unwrap().to_string();
    let rounding = match (var("METHOD"), var("MOMENTS")) {
        (Some(method), Some(moments)) => ["--method".to_string(), method, "--moments".to_string(), moments],
        _ => ["--method".to_string(), "imatrix".to_string(), "--imatrix".to_string(), imatrix],
    };
    let rounding = rounding.each_ref().map(String::as_str);
    let make = |name: &str, args: &[&str]| {
        done(&[&[path(name).to_str().unwrap()], args, &rounding[..]].concat());
        path(name)
    };
    let mut models: Vec<PathBuf> = FIXED.iter().map(|name| make(name, &["-t", name])).collect();
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    let (least, most) = (size(&models[0]), size(&models[7]));
    let text = common::fixture("tiny-llama/calibration.txt");
    let kept = dir.path().join("sensitivity.json");
    let text = text.to_str().unwrap();
    let search = ["--sensitivity", kept.to_str().unwrap(), "--measure-text", text, "--windows", "1"];
    for quarter in 1..4 {
        let target = least + (most - least) * quarter / 4;
        let bytes = target.to_string();
        let args = [&["--target-size", &bytes][..], &search].concat();
        let mixture = make(&format!("mixture {quarter}"), &args);
        assert!(size(&mixture) <= target);
        models.push(mixture);
    }
    let found = compare(&models);
    for (path, (bytes, kld)) in models.iter().zip(&found) {
        println!("| {} | {bytes} | {kld:.5} |", path.file_stem().unwrap().to_str().unwrap());
    }
    let (fixed, mixtures) = found.split_at(FIXED.len());
    for (bytes, kld) in mixtures {
        // Below each line between two file types, the KLD in logarithms.
        for a in fixed.iter().filter(|f| f.0 <= *bytes) {
            for b in fixed.iter().filter(|f| f.0 > *bytes) {
                let line = a.1.ln() + (b.1.ln() - a.1.ln()) * (bytes - a.0) / (b.0 - a.0);
                assert!(kld.ln() < line, "{bytes} bytes, {kld}: a line of file types is at {}", line.exp());
            }
        }
    }
}
