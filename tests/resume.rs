//! A quantization with a method that was killed or interrupted goes on, and ends with the same bytes.
#![cfg(all(unix, feature = "ggml"))]

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use place::Place;
use serde_json::Value as Json;

const GOING_ON: &str = "going on where";

/// A small model with its moments, and what becomes of it.
fn calibrated() -> (Place, Vec<u8>) {
    let place = Place::calibrated();
    place.succeeds(&[&quantize("whole.gguf")[..], &["--report", "whole.json"]].concat());
    let whole = fs::read(place.path("whole.gguf")).unwrap();
    (place, whole)
}

/// Of each tensor its name, and what its output lost before and after in a billion parts.
fn outcomes(place: &Place, report: &str) -> Vec<(String, Option<[i64; 2]>)> {
    let report: Json = serde_json::from_slice(&fs::read(place.path(report)).unwrap()).unwrap();
    let parts = |n: &Json| (n.as_f64().unwrap() * 1e9).round() as i64;
    let one = |o: &Json| {
        let error = &o["error"];
        let error = error.is_object().then(|| [parts(&error["before"]), parts(&error["after"])]);
        (o["name"].as_str().unwrap().to_string(), error)
    };
    report["outcomes"].as_array().unwrap().iter().map(one).collect()
}

fn quantize(output: &str) -> Vec<&str> {
    // A few tensors, for their time.
    let options = ["-t", "q4_0", "--tensor-method", "blk.0=gptq", "--moments", "m.gguf", "-j", "1"];
    [&["quantize", "f32.gguf", output][..], &options].concat()
}

fn begin(place: &Place, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(args).current_dir(place.0.path()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the journal has so many lines more than its first.
fn wait_for(place: &Place, child: &mut Child, lines: usize) {
    wait_for_journal(&place.path(".out.gguf.qconv-journal"), child, lines);
}

fn wait_for_journal(journal: &Path, child: &mut Child, lines: usize) {
    let begun = Instant::now();
    while fs::read_to_string(journal).map_or(0, |t| t.lines().count()) <= lines {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        assert!(begun.elapsed() < Duration::from_secs(300));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_run_goes_on_and_ends_the_same() {
    let (place, whole) = calibrated();
    let args = quantize("out.gguf");
    let (journal, partial) = (place.path(".out.gguf.qconv-journal"), place.path(".out.gguf.qconv-partial"));
    // Killed again and again, each time a little later: in the middle of layers, and of tensors.
    let mut lines = 0;
    for more in [1, 3, 10] {
        lines += more;
        let mut child = begin(&place, &args);
        wait_for(&place, &mut child, lines);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(journal.exists() && partial.exists() && !place.path("out.gguf").exists());
    }
    // Ctrl-C ends it in order, and says what is kept. It has begun when it notes more than there was.
    let lines = fs::read_to_string(&journal).unwrap().lines().count();
    let mut child = begin(&place, &args);
    wait_for(&place, &mut child, lines);
    Command::new("kill").args([common::interrupt(), &child.id().to_string()]).status().unwrap();
    let stopped = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(2), "{said}");
    assert!(said.contains(GOING_ON) && said.contains("the same command goes on"), "{said}");
    assert!(journal.exists() && partial.exists());
    let kept = (fs::read(&journal).unwrap(), fs::read(&partial).unwrap());

    let finished = |args: &[&str], goes_on: bool| {
        let output = place.succeeds(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.contains(GOING_ON), goes_on, "{args:?}: {said}");
        assert!(!journal.exists() && !partial.exists());
        let bytes = fs::read(place.path("out.gguf")).unwrap();
        fs::remove_file(place.path("out.gguf")).unwrap();
        bytes
    };
    let restore = || {
        fs::write(&journal, &kept.0).unwrap();
        fs::write(&partial, &kept.1).unwrap();
    };
    // What is said of each tensor is not lost either.
    assert!(finished(&[&args[..], &["--report", "resumed.json"]].concat(), true) == whole);
    assert_eq!(outcomes(&place, "resumed.json"), outcomes(&place, "whole.json"));
    restore();
    assert!(finished(&[&args[..], &["--no-resume"]].concat(), false) == whole);
    // Spans whose bytes are no longer those are done again.
    restore();
    let zeros = vec![0; kept.1.len()];
    fs::write(&partial, zeros).unwrap();
    assert!(finished(&args, true) == whole);
    // What belongs to another command is no use.
    restore();
    let other = finished(&[&args[..], &["--set", "general.author=me"]].concat(), false);
    assert!(other != whole);
    restore();
    let without = ["quantize", "f32.gguf", "out.gguf", "-t", "q4_0"];
    finished(&without, false);
    // A file that was cut short is not gone on with.
    restore();
    fs::write(&partial, &kept.1[..kept.1.len() - 1]).unwrap();
    assert!(finished(&args, false) == whole);
}

/// Of a packed matrix the parts are noted, wherever they lie.
#[test]
fn a_packed_model_goes_on_too() {
    let place = Place::calibrated();
    let source = common::fixture("models/llama");
    let args = |output| {
        let options =
            ["--bits", "4", "--group-size", "32", "--method", "gptq", "--moments", "m.gguf", "-j", "1"];
        [&["pack", source.to_str().unwrap(), "-o", output][..], &options].concat()
    };
    place.succeeds(&[&args("whole.qpack")[..], &["--json"]].concat());
    let (journal, partial) = (place.path(".out.qpack.qconv-journal"), place.path(".out.qpack.qconv-partial"));
    for lines in [2, 5] {
        let mut child = begin(&place, &args("out.qpack"));
        wait_for_journal(&journal, &mut child, lines);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(journal.exists() && partial.exists() && !place.path("out.qpack").exists());
    }
    let output = place.succeeds(&args("out.qpack"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(GOING_ON) && !said.contains("not looked at"), "{said}");
    assert!(!journal.exists() && !partial.exists());
    assert!(fs::read(place.path("out.qpack")).unwrap() == fs::read(place.path("whole.qpack")).unwrap());
}

#[test]
fn an_error_leaves_nothing() {
    let (place, _) = calibrated();
    let mut moments = fs::read(place.path("m.gguf")).unwrap();
    // Within those of the first input.
    moments[16384..20480].chunks_exact_mut(4).for_each(|v| v.copy_from_slice(&f32::NAN.to_le_bytes()));
    fs::write(place.path("m.gguf"), moments).unwrap();
    place.refuses(&[&quantize("out.gguf")[..], &["-q"]].concat(), &["not finite"]);
}
