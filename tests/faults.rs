//! What goes wrong around a conversion: a full disk, sources that shrink or cannot be read, other processes, links,
//! outputs that are inputs, little memory, signals. Outputs appear whole or not at all, inputs stay.
#![cfg(unix)]

mod common;
#[path = "common/large.rs"]
mod large;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use place::{Place, check_refusal};

/// With a model of 16 MB, `model`, in two files, and `f16.gguf` of it.
fn with_model() -> Place {
    let place = Place::new();
    large::write(&place.path("model"), 2, 1);
    place.succeeds(&["hf-to-gguf", "model", "-o", "f16.gguf", "-t", "f16", "--no-verify", "-q"]);
    place
}

const TO_GGUF: [&str; 8] = ["hf-to-gguf", "model", "-o", "o/m.gguf", "-t", "f16", "--no-verify", "-q"];

/// With a directory `o` for outputs.
fn with_outputs() -> Place {
    let place = with_model();
    fs::create_dir(place.path("o")).unwrap();
    place
}

fn begin(place: &Place, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(args).current_dir(place.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn signal(child: &Child, which: &str) {
    assert!(Command::new("kill").args([which, &child.id().to_string()]).status().unwrap().success());
}

/// Begins a command, and stops it when `path` is there. The command must not have ended by then.
fn held(place: &Place, args: &[&str], path: &str) -> Child {
    let mut child = begin(place, args);
    let begun = Instant::now();
    while fs::symlink_metadata(place.path(path)).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be held");
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    signal(&child, "-STOP");
    child
}

fn go_on(child: Child) -> Output {
    signal(&child, "-CONT");
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Names in a directory, hidden ones too.
fn names(dir: PathBuf) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A small disk of its own, where that may be made.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn new(at: &'a Path, size: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            _ => {
                eprintln!("SKIPPED: no disk can be mounted here (that takes root)");
                None
            }
        }
    }

    fn read_only(&self) {
        let args = ["-o", "remount,ro"];
        assert!(Command::new("mount").args(args).arg(self.0).status().unwrap().success());
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_disk_that_fills_up() {
    let place = with_model();
    let at = place.path("o");
    let Some(_disk) = Disk::new(&at, "24M") else { return };
    // Room is looked for before.
    fs::write(place.path("o/filler"), vec![1; 16 << 20]).unwrap();
    let output = place.qconv(&TO_GGUF);
    check_refusal(&output, "too little room", &["m.gguf", "the disk has"]);
    assert_eq!(names(at.clone()), ["filler"]);
    fs::remove_file(place.path("o/filler")).unwrap();
    // And taken by somebody else meanwhile.
    let child = held(&place, &TO_GGUF, "o/.m.gguf.qconv-partial");
    let filled = fs::write(place.path("o/filler"), vec![1; 24 << 20]);
    assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    let output = go_on(child);
    check_refusal(&output, "a full disk", &["No space left", ".m.gguf.qconv-partial"]);
    assert!(!place.path("o/m.gguf").exists());
    fs::remove_file(place.path("o/filler")).unwrap();
    place.succeeds(&TO_GGUF);
    assert_eq!(names(at.clone()), ["m.gguf"]);
    assert!(fs::read(place.path("o/m.gguf")).unwrap() == fs::read(place.path("f16.gguf")).unwrap());
}

#[test]
fn a_directory_without_permission() {
    let place = with_model();
    let at = place.path("o");
    let Some(disk) = Disk::new(&at, "24M") else { return };
    // Lost in the middle: what is open stays so, but nothing gets its name. Here nothing may be open for a remount,
    // so the directory itself goes.
    disk.read_only();
    place.refuses(&TO_GGUF, &["o/.m.gguf.qconv-journal", "Read-only"]);
    drop(disk);
    let child = held(&place, &TO_GGUF, "o/.m.gguf.qconv-partial");
    fs::remove_dir_all(&at).unwrap();
    let output = go_on(child);
    check_refusal(&output, "a directory that goes", &["m.gguf", "No such file"]);
    assert!(!at.exists());
}

/// Somebody cuts the source off while it is read.
#[test]
fn a_source_that_shrinks() {
    let place = with_outputs();
    let weights = place.path("model/model-00002-of-00002.safetensors");
    let whole = fs::read(&weights).unwrap();
    // It may have read everything before it is held.
    let refused = (0..20).find_map(|_| {
        let child = held(&place, &TO_GGUF, "o/.m.gguf.qconv-partial");
        fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(1 << 20).unwrap();
        let output = go_on(child);
        fs::write(&weights, &whole).unwrap();
        let is_done = output.status.success();
        if is_done {
            fs::remove_file(place.path("o/m.gguf")).unwrap();
        }
        (!is_done).then_some(output)
    });
    check_refusal(&refused.unwrap(), "a source that shrinks", &["model-00002-of-00002.safetensors"]);
    assert_eq!(names(place.path("o")), [""; 0]);
    place.succeeds(&TO_GGUF);
    assert_eq!(names(place.path("o")), ["m.gguf"]);
    assert!(fs::read(place.path("o/m.gguf")).unwrap() == fs::read(place.path("f16.gguf")).unwrap());
}

#[test]
fn sources_that_cannot_be_read() {
    let place = with_outputs();
    let weights = place.path("model/model-00001-of-00002.safetensors");
    fs::remove_file(&weights).unwrap();
    place.refuses(&TO_GGUF, &["model-00001-of-00002.safetensors"]);
    fs::create_dir(&weights).unwrap();
    place.refuses(&TO_GGUF, &["model-00001-of-00002.safetensors"]);
    if cfg!(target_os = "linux") {
        fs::remove_dir(&weights).unwrap();
        // The first page of a process cannot be read.
        symlink("/proc/self/mem", &weights).unwrap();
        place.refuses(&TO_GGUF, &["model-00001-of-00002.safetensors"]);
        place.refuses(&["quantize", "/proc/self/mem", "o/q.gguf", "-t", "q8_0", "-q"], &["/proc/self/mem"]);
    }
}

/// Of several processes that write the same output one does it, and the others say so.
#[test]
fn two_at_once() {
    let place = with_outputs();
    let split = ["split", "f16.gguf", "o/s.gguf", "--max-tensors", "5", "-q"];
    let directory = ["gguf-to-hf", "f16.gguf", "-o", "o/dir", "-q"];
    for (args, partial) in [
        (&TO_GGUF[..], "o/.m.gguf.qconv-partial"),
        (&split, "o/.s-00005-of-00005.gguf.qconv-partial"),
        (&directory, "o/.dir.qconv-partial"),
    ] {
        let child = held(&place, args, partial);
        check_refusal(&place.qconv(args), "the second", &["another qconv is writing"]);
        let first = go_on(child);
        assert!(first.status.success(), "{}", said(&first));
    }
    let of_split: Vec<String> = (1..=5).map(|k| format!("s-{k:05}-of-00005.gguf")).collect();
    let expected: Vec<&str> =
        ["dir", "m.gguf"].into_iter().chain(of_split.iter().map(String::as_str)).collect();
    assert_eq!(names(place.path("o")), expected);
    // All begin together.
    for round in 0..2 {
        for name in names(place.path("o")) {
            let path = place.path("o").join(name);
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        for args in [&TO_GGUF[..], &split, &directory] {
            let all: Vec<Child> = (0..3).map(|_| begin(&place, args)).collect();
            let all: Vec<Output> = all.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
            let won = all.iter().filter(|output| output.status.success()).count();
            assert_eq!(won, 1, "{round} {args:?}: {:?}", all.iter().map(said).collect::<Vec<_>>());
            for output in all.iter().filter(|output| !output.status.success()) {
                let said = said(output);
                let is_known = said.contains("another qconv is writing") || said.contains("exists already");
                assert!(is_known && output.status.code() == Some(2), "{args:?}: {said}");
            }
        }
        assert_eq!(names(place.path("o")), expected);
        assert!(fs::read(place.path("o/m.gguf")).unwrap() == fs::read(place.path("f16.gguf")).unwrap());
    }
}

/// An output that is a link replaces what it points to; links where outputs grow are never followed.
#[test]
fn links() {
    let place = with_outputs();
    let whole = fs::read(place.path("f16.gguf")).unwrap();
    let forced = [&TO_GGUF[..], &["--force"]].concat();
    fs::write(place.path("elsewhere"), "old").unwrap();
    symlink("../elsewhere", place.path("o/m.gguf")).unwrap();
    place.refuses(&TO_GGUF, &["exists already"]);
    place.succeeds(&forced);
    assert!(place.path("o/m.gguf").is_symlink() && fs::read(place.path("elsewhere")).unwrap() == whole);
    // One that leads nowhere is itself replaced.
    fs::remove_file(place.path("elsewhere")).unwrap();
    place.refuses(&TO_GGUF, &["exists already"]);
    place.succeeds(&forced);
    assert!(!place.path("o/m.gguf").is_symlink() && !place.path("elsewhere").exists());
    place.refuses(&["hf-to-gguf", "model", "-o", "/dev/null", "-q", "--force"], &["is no regular file"]);

    fs::write(place.path("victim"), "dear").unwrap();
    fs::create_dir(place.path("victims")).unwrap();
    fs::write(place.path("victims/config.json"), "dear").unwrap();
    let directory = ["gguf-to-hf", "f16.gguf", "-o", "o/dir", "-q"];
    let hard = |from: PathBuf, to: PathBuf| fs::hard_link(from, to).unwrap();
    let soft = |from: PathBuf, to: PathBuf| symlink(from, to).unwrap();
    type Link<'a> = &'a dyn Fn(PathBuf, PathBuf);
    let links: [(Link<'_>, &str); 2] = [(&soft, "victims"), (&hard, "victim")];
    for (link, of_directory) in links {
        for what in ["partial", "journal"] {
            for (args, name) in [(&TO_GGUF[..], "m.gguf"), (&directory, "dir")] {
                let _ = fs::remove_file(place.path("o/m.gguf"));
                let _ = fs::remove_dir_all(place.path("o/dir"));
                let victim = if name == "dir" && what == "partial" { of_directory } else { "victim" };
                link(place.path(victim), place.path(&format!("o/.{name}.qconv-{what}")));
                place.succeeds(args);
                assert_eq!(names(place.path("o")), [name], "{what}");
                assert_eq!(fs::read(place.path("victim")).unwrap(), b"dear");
                assert_eq!(fs::read(place.path("victims/config.json")).unwrap(), b"dear");
            }
        }
    }
}

#[test]
fn outputs_that_are_inputs() {
    let place = with_outputs();
    let input = fs::read(place.path("f16.gguf")).unwrap();
    let own = ["would overwrite its own input"];
    let quantize = |output| ["quantize", "f16.gguf", output, "-t", "q8_0", "-q", "--force"];
    symlink("../f16.gguf", place.path("o/link.gguf")).unwrap();
    for output in ["f16.gguf", "./f16.gguf", "o/../f16.gguf", "o/link.gguf"] {
        place.refuses(&quantize(output), &own);
    }
    // Another name of the same file is a name that may go; the input keeps its own.
    fs::hard_link(place.path("f16.gguf"), place.path("o/hard.gguf")).unwrap();
    place.succeeds(&quantize("o/hard.gguf"));
    assert!(fs::read(place.path("f16.gguf")).unwrap() == input);
    assert!(fs::read(place.path("o/hard.gguf")).unwrap() != input);
    // A shard of the input.
    place.succeeds(&["split", "f16.gguf", "o/s.gguf", "--max-tensors", "5", "-q"]);
    let shard = "o/s-00002-of-00005.gguf";
    place.refuses(&["merge", "o/s-00001-of-00005.gguf", shard, "-q", "--force"], &own);
    // Its own directory, by any path.
    symlink("model", place.path("same")).unwrap();
    for output in ["model", "same", "o/../model"] {
        let args = ["convert", "model", "--to", "pytorch", "-o", output, "-q", "--force"];
        place.refuses(&args, &own);
    }
    // What says what the weights are is an input, too.
    place.refuses(&["hf-to-gguf", "model", "-o", "model/config.json", "-t", "f16", "-q", "--force"], &own);
    // A directory that holds the input: its weights would go.
    fs::create_dir(place.path("links")).unwrap();
    for name in names(place.path("model")) {
        symlink(place.path("model").join(&name), place.path("links").join(&name)).unwrap();
    }
    place.refuses(&["convert", "links", "--to", "pytorch", "-o", "model", "-q", "--force"], &own);
    // In the input's directory there is room for others.
    let before = place.listing();
    place.succeeds(&["convert", "model", "--to", "pytorch", "-o", "model/inner", "-q"]);
    place.succeeds(&["hf-to-gguf", "model", "-o", "model/m.gguf", "-t", "f16", "--no-verify", "-q"]);
    assert!(fs::read(place.path("model/m.gguf")).unwrap() == input);
    let after = place.listing();
    assert!(before.iter().all(|(path, len)| after.get(path) == Some(len)), "inputs stay");
}

/// Indexes that name files elsewhere are refused, and nothing is read or written there.
#[test]
fn names_that_lead_elsewhere() {
    let place = with_outputs();
    let index = place.path("model/model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::copy(place.path("model/model-00002-of-00002.safetensors"), place.path("evil.safetensors")).unwrap();
    let outside = place.path("evil.safetensors").to_string_lossy().into_owned();
    for name in ["../evil.safetensors", &outside, "o/../../evil.safetensors"] {
        fs::write(&index, text.replace("model-00002-of-00002.safetensors", name)).unwrap();
        place.refuses(&TO_GGUF, &["model.safetensors.index.json"]);
    }
}

/// With little memory there are errors; should the process be aborted all the same, it is as if it had been killed.
#[test]
fn little_memory() {
    let place = with_outputs();
    let (mut refused, mut succeeded) = (0, 0);
    for kilobytes in [2 << 20, 400 << 10, 200 << 10, 120 << 10, 80 << 10, 60 << 10, 40 << 10] {
        let line = format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_qconv")]).args(TO_GGUF).args(["-j", "4", "--force"]);
        let output = command.current_dir(place.0.path()).output().unwrap();
        match output.status.code() {
            Some(0) => succeeded += 1,
            _ => refused += 1,
        }
        eprintln!("{kilobytes} kB: {:?} {}", output.status, said(&output).lines().next().unwrap_or_default());
        assert!(!said(&output).contains("panicked"), "{}", said(&output));
        let is_whole = |bytes: Vec<u8>| bytes == fs::read(place.path("f16.gguf")).unwrap();
        assert!(fs::read(place.path("o/m.gguf")).map_or(true, is_whole));
    }
    assert!(refused > 0 && succeeded > 0);
    place.succeeds(&[&TO_GGUF[..], &["--force"]].concat());
    assert_eq!(names(place.path("o")), ["m.gguf"]);
}

/// Ctrl-C and a request to end, early and late: it ends in order, and the same command does the rest.
#[test]
fn signals() {
    let place = with_outputs();
    let whole = fs::read(place.path("f16.gguf")).unwrap();
    let begun = Instant::now();
    place.succeeds(&TO_GGUF);
    let takes = begun.elapsed();
    for (k, which) in [common::interrupt(), "-TERM"].repeat(3).into_iter().enumerate() {
        let _ = fs::remove_file(place.path("o/m.gguf"));
        let mut child = begin(&place, &TO_GGUF);
        std::thread::sleep(takes.mul_f64((k as f64 + 0.5) / 6.0));
        if child.try_wait().unwrap().is_none() {
            signal(&child, which);
        }
        let output = child.wait_with_output().unwrap();
        // Before anything is written the signal's own way is as good.
        let code = output.status.code().or(output.status.signal().map(|n| 128 + n));
        assert!([0, 2, 130, 143].contains(&code.unwrap()), "{which}: {}", said(&output));
        for name in names(place.path("o")) {
            let is_kept = [".m.gguf.qconv-journal", ".m.gguf.qconv-partial"].contains(&name.as_str());
            assert!(is_kept || name == "m.gguf", "{which}: {name}");
        }
        if place.path("o/m.gguf").exists() {
            assert!(fs::read(place.path("o/m.gguf")).unwrap() == whole);
        } else {
            place.succeeds(&TO_GGUF);
        }
        assert!(fs::read(place.path("o/m.gguf")).unwrap() == whole);
        assert_eq!(names(place.path("o")), ["m.gguf"]);
    }
}

/// What a shell has set to be ignored, as `nohup` does, stays so; other signals are heard.
#[cfg(target_os = "linux")]
#[test]
fn ignored_signals_stay_ignored() {
    let place = with_outputs();
    let line = format!("trap '' HUP INT; exec \"$0\" {}", TO_GGUF.join(" "));
    let begin = || {
        let mut command = Command::new("sh");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_qconv")]).current_dir(place.0.path());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let begun = Instant::now();
        while fs::symlink_metadata(place.path("o/.m.gguf.qconv-partial")).is_err() {
            assert!(child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60));
        }
        signal(&child, "-STOP");
        child
    };
    let child = begin();
    signal(&child, "-HUP");
    signal(&child, "-INT");
    let output = go_on(child);
    assert!(output.status.success(), "{}", said(&output));
    // It may be done before it hears.
    let is_heard = (0..20).any(|_| {
        fs::remove_file(place.path("o/m.gguf")).unwrap();
        let child = begin();
        signal(&child, "-TERM");
        go_on(child).status.code() == Some(2)
    });
    assert!(is_heard && !place.path("o/m.gguf").exists());
}

/// A bound on the length of files is an error as a full disk is, and nothing empty stays.
#[test]
fn files_that_may_not_grow() {
    let place = with_outputs();
    for blocks in ["0", "1", "100"] {
        let line = format!("ulimit -f {blocks}; exec \"$0\" {}", TO_GGUF.join(" "));
        let mut command = Command::new("sh");
        command.args(["-c", &line, env!("CARGO_BIN_EXE_qconv")]).current_dir(place.0.path());
        let output = command.output().unwrap();
        // The first file to be written may be one that llama.cpp tries the tokenizer on.
        check_refusal(&output, blocks, &["cannot", "File too large"]);
        assert_eq!(names(place.path("o")), Vec::<String>::new(), "{blocks}");
    }
    place.succeeds(&TO_GGUF);
}

/// Who reads stdout has gone: that is no fault, and no panic.
#[test]
fn a_reader_that_goes() {
    let place = with_model();
    for args in [
        &["inspect", "f16.gguf"][..],
        &["inspect", "f16.gguf", "--json"],
        &["hf-to-gguf", "model", "-o", "x.gguf", "--dry-run", "-q"],
    ] {
        let mut child = begin(&place, args);
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = said(&output);
        assert!(!said.contains("panicked") && output.status.code().is_some(), "{args:?}: {said}");
    }
}

/// `--resume` insists on something to go on with; leftovers of other options go.
#[test]
fn resuming_is_asked_for() {
    let place = with_outputs();
    let insists = [&TO_GGUF[..], &["--resume"]].concat();
    place.refuses(&insists, &["no interrupted run of this command"]);
    let kill = |args: &[&str], partial: &str| {
        let mut child = held(&place, args, partial);
        child.kill().unwrap();
        child.wait().unwrap();
    };
    kill(&TO_GGUF, "o/.m.gguf.qconv-partial");
    let other = ["hf-to-gguf", "model", "-o", "o/m.gguf", "-t", "bf16", "--no-verify", "-q", "--resume"];
    place.refuses(&other, &["no interrupted run of this command"]);
    place.succeeds(&insists);
    assert_eq!(names(place.path("o")), ["m.gguf"]);
    // Divided otherwise, it is the same output all the same.
    fs::remove_file(place.path("o/m.gguf")).unwrap();
    let shards = |n| ["quantize", "f16.gguf", "o/m.gguf", "-t", "q8_0", "-q", "--split-max-tensors", n];
    kill(&shards("4"), "o/.m-00001-of-00006.gguf.qconv-partial");
    kill(&shards("8"), "o/.m-00001-of-00003.gguf.qconv-partial");
    place.succeeds(&TO_GGUF);
    assert_eq!(names(place.path("o")), ["m.gguf"]);
}
