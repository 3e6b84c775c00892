//! What is written, where, and with which rights: reports, names, files that are inputs too.
#![cfg(unix)]

mod common;
#[path = "common/place.rs"]
mod place;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::process::Command;

use serde_json::Value as Json;

use place::Place;

/// With a small model, `in.gguf`.
fn with_model() -> Place {
    let place = Place::new();
    let source = common::fixture("models/llama");
    let source = source.to_str().unwrap();
    place.succeeds(&["hf-to-gguf", source, "-o", "in.gguf", "-t", "f16", "--no-verify", "-q"]);
    place
}

fn mode(place: &Place, name: &str) -> u32 {
    fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777
}

fn chmod(place: &Place, name: &str, mode: u32) {
    fs::set_permissions(place.path(name), fs::Permissions::from_mode(mode)).unwrap();
}

/// What `verify` writes replaces what is of its kind, and nothing else.
#[test]
fn reports_replace_reports() {
    let place = with_model();
    let model = fs::read(place.path("in.gguf")).unwrap();
    fs::write(place.path("b.gguf"), &model).unwrap();
    fs::write(place.path("notes.json"), "{\"dear\": 1}").unwrap();
    fs::write(place.path("new"), "").unwrap();
    let usual = mode(&place, "new");
    for (option, name) in [("--sarif", "SARIF log"), ("--write-manifest", "list of hashes")] {
        let args =
            |path: &str| ["verify".to_string(), "-q".into(), "in.gguf".into(), format!("{option}={path}")];
        let run = |path: &str| place.succeeds(&args(path).each_ref().map(String::as_str));
        let refuses =
            |path: &str, says: &str| place.refuses(&args(path).each_ref().map(String::as_str), &[says]);
        refuses("in.gguf", "would overwrite its own input");
        refuses("b.gguf", name);
        refuses("notes.json", name);
        refuses(".", "is a directory");
        assert!(fs::read(place.path("in.gguf")).unwrap() == model);
        // Again and again, through a link, with the rights it has.
        run("log");
        assert_eq!(mode(&place, "log"), usual);
        chmod(&place, "log", 0o640);
        symlink("log", place.path("link")).unwrap();
        fs::write(place.path("log"), fs::read_to_string(place.path("log")).unwrap() + " ").unwrap();
        run("link");
        assert!(place.path("link").is_symlink());
        assert_eq!(mode(&place, "log"), 0o640);
        let text = fs::read_to_string(place.path("log")).unwrap();
        assert!(text.ends_with("}\n"));
        serde_json::from_str::<Json>(&text).unwrap();
        // An empty file is one that was made for it.
        run("new");
        // Pipes, and what is open already, stay what they are.
        assert!(Command::new("mkfifo").arg(place.path("pipe")).status().unwrap().success());
        let reader = Command::new("cat").arg(place.path("pipe")).stdout(std::process::Stdio::piped()).spawn();
        run("pipe");
        let read = reader.unwrap().wait_with_output().unwrap();
        serde_json::from_slice::<Json>(&read.stdout).unwrap();
        assert!(fs::metadata(place.path("pipe")).unwrap().file_type().is_fifo());
        for name in ["log", "link", "pipe"] {
            fs::remove_file(place.path(name)).unwrap();
        }
        fs::write(place.path("new"), "").unwrap();
    }
    let output = place.succeeds(&["verify", "-q", "in.gguf", "--sarif=/proc/self/fd/1"]);
    serde_json::from_slice::<Json>(&output.stdout).unwrap();
    let output = place.succeeds(&["verify", "-q", "in.gguf", "--sarif=/proc/self/fd/2"]);
    serde_json::from_slice::<Json>(&output.stderr).unwrap();
}

/// Not only weights are inputs, and outputs are not each other.
#[test]
fn outputs_are_no_inputs() {
    let place = with_model();
    let bytes = fs::read(place.path("in.gguf")).unwrap();
    fs::write(place.path("x.md"), "text").unwrap();
    fs::write(place.path("x.json"), "text").unwrap();
    fs::create_dir(place.path("d")).unwrap();
    symlink("../in.gguf", place.path("d/link")).unwrap();
    let own = ["would overwrite its own input"];
    for args in [
        &["imatrix", "in.gguf", "-o", "in.gguf", "--force"][..],
        &["imatrix", "in.gguf", "-o", "d/link", "--force"],
        &["imatrix", "--in-file", "x.md", "-o", "x.md", "--force"],
        &["eval", "baseline", "in.gguf", "-o", "in.gguf", "--force"],
        &["eval", "baseline", "in.gguf", "-o", "x.md", "--text", "x.md", "--force"],
        &["eval", "compare", "in.gguf", "b.gguf", "--csv", "in.gguf", "--force"],
        &["quantize", "in.gguf", "x.md", "-t", "q8_0", "--imatrix", "x.md", "--force"],
        &["quantize", "in.gguf", "x.md", "-t", "q8_0", "--tensor-type-file", "x.md", "--force"],
        &["quantize", "in.gguf", "new", "-t", "q8_0", "--imatrix", "x.json", "--report", "x.json", "--force"],
        &["hf-to-gguf", "d", "-o", "x.json", "--arch-file", "x.json", "--force"],
        &["hf-to-gguf", "d", "-o", "x.json", "--merge-lora", "x.json:0.5", "--force"],
    ] {
        place.refuses(args, &own);
    }
    for args in [
        &["quantize", "in.gguf", "new.md", "-t", "q8_0", "--report", "new.md"][..],
        &["quantize", "in.gguf", "x.md", "-t", "q8_0", "--report", "d/../x.md", "--force"],
        &["quantize", "in.gguf", "new", "-t", "q8_0", "--report", "x.md", "--report", "x.md", "--force"],
    ] {
        place.refuses(args, &["two outputs have one name"]);
    }
    assert!(fs::read(place.path("in.gguf")).unwrap() == bytes);
}

/// Names of any length that a disk takes; no files where a directory was meant; rights of what is replaced.
#[test]
fn names_and_rights() {
    let place = with_model();
    let quantize = |output: &'static str| ["quantize", "in.gguf", output, "-t", "q8_0", "-q", "--force"];
    fs::create_dir(place.path("o")).unwrap();
    let long = format!("o/{}.gguf", "n".repeat(250));
    let args = ["quantize", "in.gguf", &long, "-t", "q8_0", "-q"];
    place.succeeds(&args);
    place.refuses(&args, &["exists already"]);
    assert_eq!(fs::read_dir(place.path("o")).unwrap().count(), 1, "nothing hidden stays");
    for none in ["none/", "none/.", "o/none/"] {
        place.refuses(&quantize(none), &["ends as a directory does"]);
    }
    place.refuses(&["imatrix", "--in-file", "in.gguf", "-o", "none/"], &[]);
    place.succeeds(&quantize("q.gguf"));
    for mode_of in [0o600, 0o640, 0o444] {
        chmod(&place, "q.gguf", mode_of);
        place.succeeds(&quantize("q.gguf"));
        assert_eq!(mode(&place, "q.gguf"), mode_of);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.current_dir(place.0.path()).args(["quantize", "in.gguf"]).arg(OsStr::from_bytes(b"\xff.gguf"));
    let output = command.args(["-t", "q8_0", "-q", "--json"]).output().unwrap();
    place::check_refusal(&output, "no UTF-8", &["is no name in UTF-8"]);
    // A directory may be called so.
    fs::create_dir(place.0.path().join(OsStr::from_bytes(b"\xff"))).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.current_dir(place.0.path()).args(["quantize", "in.gguf"]).arg(OsStr::from_bytes(b"\xff/q.gguf"));
    let output = command.args(["-t", "q8_0", "-q", "--json"]).output().unwrap();
    assert!(output.status.success());
    assert!(serde_json::from_slice::<Json>(&output.stdout).unwrap()["output"].is_string());
}
