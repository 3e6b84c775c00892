//! What lies where a file should be: pipes, devices, directories, links that lead in circles. Unix only.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use qconv::ErrorKind::{Io, Misuse, Unsupported};

use crate::side::{Accepted, Expect, Place, Refused, run, small_gguf};

fn pipe(path: &std::path::Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

const PIPE: Expect = Refused(Misuse, "is a pipe, a socket or a device");
const DIRECTORY: Expect = Refused(Misuse, "is a directory");

#[test]
fn side_files_are_regular_files() {
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "added_tokens.json",
    ] {
        // Only SentencePiece has a file of added tokens.
        let place = Place::model(if name == "added_tokens.json" { "fmt-spm-bpe" } else { "llama" });
        let path = place.path(name);
        let _ = fs::remove_file(&path);
        pipe(&path);
        place.converts(&format!("{name} is a pipe"), PIPE);
        if matches!(name, "config.json" | "tokenizer.json") {
            fs::remove_file(&path).unwrap();
            symlink("/dev/zero", &path).unwrap();
            place.converts(&format!("{name} is /dev/zero"), PIPE);
            fs::remove_file(&path).unwrap();
            symlink(name, &path).unwrap();
            place.converts(&format!("{name} is a circle"), Refused(Io, "cannot open"));
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            place.converts(&format!("{name} is a directory"), DIRECTORY);
        }
    }
}

#[test]
fn weights_are_regular_files() {
    let place = Place::model("llama");
    let weights = place.path("model.safetensors");
    fs::remove_file(&weights).unwrap();
    pipe(&weights);
    place.converts("a pipe", Refused(Unsupported, "holds no weights"));
    fs::remove_file(&weights).unwrap();
    symlink("/dev/zero", &weights).unwrap();
    place.converts("a device", Refused(Unsupported, "holds no weights"));
    fs::remove_file(&weights).unwrap();
    symlink(crate::common::fixture("models/llama/model.safetensors"), &weights).unwrap();
    place.converts("a link to a file, as caches have them", Accepted);
}

/// Each command that takes a file, with a pipe and with a device that has no end.
#[test]
fn every_command_refuses_pipes() {
    let place = Place::new();
    let (fifo, output) = (place.path("x.gguf"), place.output());
    pipe(&fifo);
    let device = std::path::PathBuf::from("/dev/zero");
    for path in [&fifo, &device] {
        let path = path.to_str().unwrap();
        let (small, out) = (small_gguf().to_str().unwrap(), output.to_str().unwrap());
        for args in [
            &["inspect", path][..],
            &["verify", path],
            &["verify", small, "--against", path],
            &["diff", small, path],
            &["quantize", path, out, "-t", "q8_0"],
            &["quantize", small, out, "-t", "q4_k_m", "--imatrix", path],
            &["quantize", small, out, "-t", "q4_k_m", "--method", "gptq", "--moments", path],
            &["gguf-to-hf", path, "-o", out],
            &["hf-to-gguf", path, "-o", out],
            &["imatrix", "--in-file", path, "--show-statistics"],
        ] {
            let args: Vec<_> = args.iter().map(|a| a.as_ref()).collect();
            let ran = run(&format!("{args:?}"), &args);
            assert!(matches!(ran.code, Some(1 | 2)), "{args:?}: {}", ran.message);
            assert!(ran.message.contains(path), "{args:?}: {}", ran.message);
            assert!(!output.exists(), "{args:?}");
        }
    }
}
