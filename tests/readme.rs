//! Every `$ qconv ...` of README.md's console blocks works as it stands, in order, in a directory
//! that holds the bundled models.
#![cfg(unix)] // the examples are written for a shell

mod common;

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// The commands of the console blocks; a line that ends in a backslash goes on in the next.
fn commands(readme: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut inside = false;
    let mut open: Option<String> = None;
    for line in readme.lines() {
        if let Some(fence) = line.trim_start().strip_prefix("```") {
            inside = fence.trim() == "console" && !inside;
            continue;
        }
        let text = match (&mut open, line.strip_prefix("$ ")) {
            (Some(begun), _) => format!("{begun}{}", line.trim_start()),
            (None, Some(command)) if inside => command.to_string(),
            _ => continue,
        };
        match text.strip_suffix('\\') {
            Some(unfinished) => open = Some(unfinished.to_string()),
            None => {
                open = None;
                commands.push(text);
            }
        }
    }
    commands
}

#[test]
fn examples_work() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let commands = commands(&readme);
    for name in [
        "hf-to-gguf",
        "lora-to-gguf",
        "gguf-to-hf",
        "convert",
        "hf-to-coreml",
        "gguf-to-coreml",
        "coreml-to-hf",
        "pack",
        "unpack",
        "quantize",
        "imatrix",
        "calibrate",
        "eval",
        "split",
        "merge",
        "inspect",
        "verify",
        "diff",
        "run",
        "embed",
        "bench",
        "completions",
    ] {
        let shown = commands.iter().any(|c| c.starts_with(&format!("qconv {name}")));
        assert!(shown, "README.md shows no example of {name}");
    }

    let dir = tempfile::tempdir().unwrap();
    for name in ["tiny-llama", "models/llama", "lora/llama"] {
        let copy = dir.path().join("fixtures").join(name);
        fs::create_dir_all(&copy).unwrap();
        for entry in fs::read_dir(common::fixture(name)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
    }
    let binary = Path::new(env!("CARGO_BIN_EXE_qconv")).parent().unwrap();
    let path = env::join_paths(
        std::iter::once(binary.to_path_buf()).chain(env::split_paths(&env::var_os("PATH").unwrap())),
    )
    .unwrap();
    for command in &commands {
        let engine = [
            "qconv run",
            "qconv embed",
            "qconv eval",
            "qconv imatrix",
            "qconv calibrate",
            "qconv bench",
            // A calibration comes first.
            "--samples",
            "--moments",
        ];
        let needs_ggml = engine.iter().any(|c| command.contains(c));
        if !cfg!(feature = "ggml") && needs_ggml {
            continue; // needs the engine
        }
        let output = Command::new("sh")
            .args(["-c", command])
            .current_dir(dir.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "$ {command}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
