//! A place to run the command line in, as a user does.
#![allow(dead_code)] // each test uses its part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use assert_cmd::assert::OutputAssertExt;

/// A temporary directory with `qconv` running in it.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With a small model, `f32.gguf`, and its second moments, `m.gguf`.
    pub fn calibrated() -> Self {
        let place = Self::new();
        let source = crate::common::fixture("models/llama");
        let source = source.to_str().unwrap();
        place.succeeds(&["hf-to-gguf", source, "-o", "f32.gguf", "-t", "f32", "--no-verify", "-q"]);
        let text = ["--ctx", "64", "--chunks", "4", "--process-output"];
        place.succeeds(&[&["calibrate", "f32.gguf", "-o", "m.gguf", "-q"], &text[..]].concat());
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn qconv(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_qconv")).args(args).current_dir(self.0.path()).output().unwrap()
    }

    /// Every file and directory with its length, and whether it is a directory.
    pub fn listing(&self) -> BTreeMap<PathBuf, u64> {
        pub fn visit(dir: &Path, found: &mut BTreeMap<PathBuf, u64>) {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                found.insert(entry.path(), if meta.is_dir() { 0 } else { meta.len() });
                if meta.is_dir() {
                    visit(&entry.path(), found);
                }
            }
        }
        let mut found = BTreeMap::new();
        visit(self.0.path(), &mut found);
        found
    }

    /// Runs what must fail: exit code 2, one message that holds all of `says`, nothing on stdout,
    /// and no file more or less than before.
    pub fn refuses(&self, args: &[&str], says: &[&str]) {
        let before = self.listing();
        let output = self.qconv(args);
        check_refusal(&output, &format!("{args:?}"), says);
        assert_eq!(self.listing(), before, "{args:?} left something behind");
    }

    pub fn succeeds(&self, args: &[&str]) -> Output {
        let output = self.qconv(args);
        output.clone().assert().success();
        output
    }
}

/// Exit code 2, one message that holds all of `says`, nothing on stdout.
pub fn check_refusal(output: &Output, what: &str, says: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{what}: {message}");
    assert!(output.stdout.is_empty(), "{what} wrote to stdout");
    assert_eq!(message.matches("error:").count(), 1, "{what}: {message}");
    let lines: Vec<_> = message.lines().filter(|l| !l.starts_with("note:")).collect();
    assert!(lines.len() <= 2 && lines[0].starts_with("error: "), "{what}: more than a message: {message}");
    for word in says {
        assert!(message.contains(word), "{what}: {word:?} is not in: {message}");
    }
}
