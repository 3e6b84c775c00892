//! `quantize`, `split` and `merge` on the command line: wishes that cannot be met get one clear message
//! and exit code 2 and leave nothing behind, shards go and come back.

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;

use place::Place;
use qconv::container::gguf::Gguf;
use qconv::limits::Limits;
use serde_json::Value as Json;

/// The bundled model as `full.gguf`.
fn place() -> Place {
    let place = Place::new();
    common::convert(&common::fixture("tiny-llama"), &place.path("full.gguf"), None);
    place
}

fn stdout_json(output: &std::process::Output) -> Json {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn wishes_that_cannot_be_met() {
    let place = place();
    let quantize = |more: &[&str], says: &[&str]| {
        let args = [&["quantize", "full.gguf", "x.gguf"], more].concat();
        place.refuses(&args, says);
    };
    quantize(&["--type", "q4_k_x"], &["q4_k_x", "hint:", "Q4_K_M"]);
    quantize(
        &["--type", "q4_k_m", "--override-kv", "llama.context_length=5"],
        &["llama.context_length", "int"],
    );
    quantize(&["--type", "q4_k_m", "--prune-layers", "0,99"], &["no layer 99"]);
    quantize(&["--type", "q4_k_m", "--prune-layers", "0,1,2,3"], &["no layer would be left"]);
    quantize(&["--type", "iq2_xxs"], &["IQ2_XXS", "importance matrix", "--imatrix"]);
    quantize(&["--type", "q4_k_m", "--split-max-size", "0"], &["room for a tensor"]);
    quantize(&["--type", "q4_k_m", "--imatrix", "nowhere"], &["nowhere", "No such file"]);
    quantize(&["--type", "q4_k_m", "--imatrix", "full.gguf"], &["full.gguf", "is no importance matrix"]);
    fs::write(place.path("cut.dat"), [5, 0, 0, 0, 20, 0, 0, 0, b'b', b'l', b'k']).unwrap();
    quantize(&["--type", "q4_k_m", "--imatrix", "cut.dat"], &["cut.dat"]);
    fs::write(place.path("huge.dat"), [0xFF, 0xFF, 0xFF, 0x7F, 20, 0, 0, 0, b'b', b'l', b'k']).unwrap();
    quantize(&["--type", "q4_k_m", "--imatrix", "huge.dat"], &["huge.dat", "entries"]);
    // What the command line itself refuses.
    for (more, says) in [
        (&["--type", "q4_k_m", "--tensor-type", "attn_v"][..], "REGEX=TYPE"),
        (&["--type", "q4_k_m", "--tensor-type", "attn_(v=q8_0"], "attn_("),
        (&["--type", "q4_k_m", "--output-tensor-type", "q9"], "q9"),
        (&["--type", "q4_k_m", "--keep-split", "--split-max-size", "1G"], "cannot be used with"),
        (&["--type", "q4_k_m", "--include-weights", "attn"], "--imatrix"),
    ] {
        let output = place.qconv(&[&["quantize", "full.gguf", "x.gguf"], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{more:?}: {output:?}");
    }
    place.refuses(
        &["hf-to-gguf", common::fixture("tiny-llama").to_str().unwrap(), "-o", "x.gguf", "--pure"],
        &["need a --type"],
    );
}

/// What needs an importance matrix can be looked at without one.
#[test]
fn dry_run_tells_what_is_missing() {
    let place = place();
    let before = place.listing();
    let output =
        place.succeeds(&["quantize", "full.gguf", "x.gguf", "--type", "iq2_xs", "--dry-run", "--json"]);
    let plan = stdout_json(&output);
    assert!(plan["obstacle"].as_str().unwrap().contains("importance"), "{plan}");
    assert!(plan["bytes"].as_u64().unwrap() > 0);
    assert_eq!(place.listing(), before);
}

#[test]
fn split_and_merge() {
    let place = place();
    let full = fs::read(place.path("full.gguf")).unwrap();
    let output = place.succeeds(&["split", "full.gguf", "--max-size", "3M", "--json", "-q"]);
    let files = stdout_json(&output)["files"].as_array().unwrap().clone();
    assert_eq!(files.len(), 3);
    for file in &files {
        let len = fs::metadata(place.path(file.as_str().unwrap())).unwrap().len();
        assert!(len <= 3 << 20, "{file} has {len} bytes");
    }
    // Any shard will do.
    for shard in 1..=3 {
        let shard = format!("full-0000{shard}-of-00003.gguf");
        place.succeeds(&["merge", &shard, "merged.gguf", "--force"]);
        assert!(fs::read(place.path("merged.gguf")).unwrap() == full, "{shard}");
    }
    // Shards are divided anew, and quantized into as many.
    place.succeeds(&["split", "full-00002-of-00003.gguf", "other.gguf", "--max-tensors", "20"]);
    place.succeeds(&["merge", "other-00001-of-00002.gguf", "merged.gguf", "--force"]);
    assert!(fs::read(place.path("merged.gguf")).unwrap() == full);
    place.succeeds(&["quantize", "other-00001-of-00002.gguf", "q.gguf", "--type", "q4_k_m", "--keep-split"]);
    place.succeeds(&["quantize", "full.gguf", "p.gguf", "--type", "q4_k_m", "--split-max-size", "1M"]);
    let count = |prefix: &str| {
        let files = place.listing().into_keys();
        files.filter(|f| f.file_name().unwrap().to_str().unwrap().starts_with(prefix)).count()
    };
    assert_eq!((count("q-0000"), count("p-0000")), (2, 3));

    place.refuses(&["split", "full.gguf", "--max-size", "1G"], &["nothing to split"]);
    place.refuses(&["merge", "full.gguf", "x.gguf"], &["nothing to merge"]);
    place.refuses(&["split", "full.gguf", "--max-size", "3M"], &["exists already", "--force"]);
    // Not even by force.
    place.refuses(
        &["merge", "other-00001-of-00002.gguf", "other-00002-of-00002.gguf", "--force"],
        &["own input"],
    );
    place.refuses(&["split", "other-00001-of-00002.gguf", "--max-tensors", "20", "--force"], &["own input"]);
    fs::remove_file(place.path("full-00002-of-00003.gguf")).unwrap();
    place.refuses(
        &["merge", "full-00001-of-00003.gguf", "x.gguf"],
        &["full-00002-of-00003.gguf", "shard 2 of 3"],
    );
}

/// Options reach the file.
#[test]
fn options_are_heeded() {
    let place = place();
    place.succeeds(&[
        "quantize",
        "full.gguf",
        "x.gguf",
        "--type",
        "q4_k_m",
        "--prune-layers",
        "1",
        "--tensor-type",
        "ffn_down=q5_1",
        "--token-embedding-type",
        "q8_0",
        "--output-tensor-type",
        "f16",
        "--override-kv",
        "general.name=str:pruned",
        "--override-kv",
        "llama.context_length=int:64",
    ]);
    let output = place.succeeds(&["inspect", "x.gguf", "--json", "--metadata"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for wanted in ["\"pruned\"", "Q5_1", "Q8_0", "F16"] {
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    }
    assert!(!text.contains("blk.3."), "a layer too many");
    #[cfg(feature = "ggml")]
    place.succeeds(&["run", "x.gguf", "-p", "It was", "-n", "2", "-j", "1"]);
}

/// From Hugging Face the same options hold, in one pass.
#[test]
fn hugging_face_in_one_pass() {
    let place = Place::new();
    let model = common::fixture("tiny-llama");
    let imatrix = model.join("imatrix.gguf");
    let (model, imatrix) = (model.to_str().unwrap(), imatrix.to_str().unwrap());
    let output = place.succeeds(&[
        "hf-to-gguf",
        model,
        "-o",
        "h.gguf",
        "--type",
        "iq4_xs",
        "--imatrix",
        imatrix,
        "--exclude-weights",
        "attn_k",
        "--prune-layers",
        "0,2",
        "--split-max-tensors",
        "10",
        "--json",
    ]);
    let summary = stdout_json(&output);
    let notes = summary["notes"].to_string();
    assert!(notes.contains("importance matrix") && notes.contains("attn_k"), "{notes}");
    assert_eq!(summary["files"].as_array().unwrap().len(), 3);
    assert!(place.path("h-00003-of-00003.gguf").is_file());
    place.succeeds(&["hf-to-gguf", model, "-o", "q.gguf", "--type", "q4_k_m", "--imatrix", imatrix]);
    place.succeeds(&["verify", "q.gguf", "--against", model, "--no-forward"]);
}

/// Blocks cannot hold what is not finite.
#[test]
fn damaged_weights_are_refused() {
    let place = place();
    let mut bytes = fs::read(place.path("full.gguf")).unwrap();
    let gguf = Gguf::open(place.path("full.gguf"), &Limits::default()).unwrap();
    let matrix = gguf.store.get("blk.1.ffn_up.weight").unwrap();
    bytes[matrix.offset as usize + 1000..][..2].copy_from_slice(&0x7FC0u16.to_le_bytes());
    fs::write(place.path("nan.gguf"), bytes).unwrap();
    place.refuses(
        &["quantize", "nan.gguf", "x.gguf", "--type", "q4_k_m", "-q"],
        &["NaN or infinite", "blk.1.ffn_up.weight"],
    );
}
