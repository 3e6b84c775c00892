//! What conversions to Core ML may replace: what they wrote themselves, and nothing else, whatever is said. Options that
//! say nothing are refused, packages are called what they are, and divided heads come back.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use common::fixture;
use qconv::container::coreml::{Package, chunks};
use qconv::convert::{Budget, Forms, Job, Matrices, Profile, Silent, ToCoreml};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;

const LLAMA: &str = "models/llama";
const OTHER: &str = "models/qwen3";

fn planned(source: &str, output: &Path, matrices: Matrices) -> Job {
    let forms = Forms::new(matrices);
    ToCoreml { output: Some(output.into()), forms, ..ToCoreml::new(fixture(source)) }.plan().unwrap()
}

/// A model in several packages.
fn divided(source: &str, output: &Path) -> Job {
    let conversion = ToCoreml::new(fixture(source));
    let whole = ToCoreml { profile: Profile::Ane, ..conversion.clone() }.plan().unwrap().plan.total_len();
    let output = Some(output.to_path_buf());
    ToCoreml { output, profile: Profile::Ane, chunk_size: whole * 2 / 3, ..conversion }.plan().unwrap()
}

fn run(job: &Job, force: bool) -> Result<(), Error> {
    job.run(force, &Budget::new(Some(1), None).unwrap(), &Silent).map(|_| ())
}

/// That it fails because of this file, and that all stays as it is.
fn refused(job: &Job, at: &Path, words: &str) {
    let before = entries(job.output.parent().unwrap());
    let e = run(job, true).unwrap_err();
    assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains(words), "{words:?} was expected: {e}");
    assert_eq!(e.path().map(|p| p.canonicalize().unwrap()), Some(at.canonicalize().unwrap()), "{e}");
    assert!(e.hint_text().is_some() || words.contains("no Core ML package"), "{e}");
    assert_eq!(entries(job.output.parent().unwrap()), before);
}

/// Everything below a directory: paths, and how long files are.
fn entries(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            found.push((entry.path(), if meta.is_dir() { 0 } else { meta.len() }));
            if meta.is_dir() {
                open.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn form(package: &Path) -> String {
    let package = Package::open(package, &Limits::default()).unwrap();
    package.model().description.metadata.user_defined["com.qconv.weights"].clone()
}

#[test]
fn packages_replace_packages_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    let job = planned(LLAMA, &output, Matrices::Float16);
    run(&job, false).unwrap();
    let eight = planned(LLAMA, &output, Matrices::Integers(8));
    assert!(run(&eight, false).unwrap_err().to_string().contains("exists already"));
    run(&eight, true).unwrap();
    assert_eq!(form(&output), "int8");
    // Whatever somebody put into it.
    let inside =
        ["notes.txt", "Data/notes.txt", "Data/com.apple.CoreML/weights/more.bin", "Data/other/deep/file"];
    for name in inside {
        let path = output.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"of value").unwrap();
        let at = if name.contains("deep") { output.join("Data/other") } else { path.clone() };
        refused(&job, &at, "was not written by");
        fs::remove_file(&path).unwrap();
        let _ = fs::remove_dir_all(output.join("Data/other"));
    }
    #[cfg(unix)]
    {
        let (weights, moved) = (output.join("Data/com.apple.CoreML/weights"), dir.path().join("moved"));
        fs::rename(&weights, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &weights).unwrap();
        refused(&job, &weights, "was not written by");
        fs::remove_file(&weights).unwrap();
        fs::rename(&moved, &weights).unwrap();
    }
    run(&job, true).unwrap();
    assert_eq!(form(&output), "f16");
    // Directories of others, also with a chunks.json of theirs.
    let taken = dir.path().join("taken.mlpackage");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("chunks.json"), br#"{"chunks": ["a", "b"]}"#).unwrap();
    refused(&planned(LLAMA, &taken, Matrices::Float16), &taken, "is no Core ML package");
    fs::remove_file(taken.join("chunks.json")).unwrap();
    run(&planned(LLAMA, &taken, Matrices::Float16), false).unwrap();
}

#[test]
fn directories_of_packages_replace_their_like_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("several");
    let job = divided(LLAMA, &output);
    run(&job, false).unwrap();
    assert!(chunks::packages(&output, &Limits::default()).unwrap().len() > 2);
    run(&job, true).unwrap();
    // Another model's side files are replaced with their packages, which know them.
    run(&divided(OTHER, &output), true).unwrap();
    run(&job, true).unwrap();
    let config = output.join("config.json");
    let own = fs::read(&config).unwrap();
    assert_eq!(own, fs::read(fixture(LLAMA).join("config.json")).unwrap());

    let diary = output.join("diary.txt");
    fs::write(&diary, b"of value").unwrap();
    refused(&job, &diary, "was not written by");
    fs::remove_file(diary).unwrap();
    let inner = output.join("mine");
    fs::create_dir(&inner).unwrap();
    refused(&job, &inner, "was not written by");
    fs::remove_dir(inner).unwrap();
    let more = output.join("vocab.json");
    fs::write(&more, b"{}").unwrap();
    refused(&job, &more, "was changed since");
    fs::remove_file(more).unwrap();
    fs::write(&config, b"{}").unwrap();
    refused(&divided(OTHER, &output), &config, "was changed since");
    fs::write(&config, own).unwrap();
    run(&divided(OTHER, &output), true).unwrap();

    // A chunks.json of somebody else's makes no directory ours.
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("chunks.json"), br#"[{"text": "of value"}]"#).unwrap();
    let e = run(&Job { output: theirs.clone(), ..divided(LLAMA, &output) }, true).unwrap_err();
    assert!(e.to_string().contains("is no Core ML package"), "{e}");
    let inside = planned(LLAMA, &theirs, Matrices::Float16);
    assert_eq!(inside.output.parent(), Some(theirs.as_path()), "a directory for the package");
    run(&inside, false).unwrap();
    assert!(theirs.join("chunks.json").is_file());
}

#[test]
fn files_beside_belong_to_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (config, ours) = (at("config.json"), fixture(LLAMA).join("config.json"));
    fs::write(&config, b"{}").unwrap();
    let job = planned(LLAMA, &at("X.mlpackage"), Matrices::Float16);
    assert_eq!(run(&job, false).unwrap_err().path(), Some(config.as_path()));
    refused(&job, &config, "is not this model's");
    assert!(fs::read(&config).unwrap() == b"{}" && !at("X.mlpackage").exists());
    fs::remove_file(&config).unwrap();
    run(&job, false).unwrap();
    assert_eq!(fs::read(&config).unwrap(), fs::read(&ours).unwrap());

    // Another model in the same directory would take them away from this one.
    refused(&planned(OTHER, &at("Y.mlpackage"), Matrices::Float16), &config, "is not this model's");
    // The same model as well is fine.
    run(&planned(LLAMA, &at("Y.mlpackage"), Matrices::Integers(8)), false).unwrap();
    refused(&planned(OTHER, &at("X.mlpackage"), Matrices::Float16), &config, "may need it");
    fs::remove_dir_all(at("Y.mlpackage")).unwrap();
    // In the place of this one, its files go with it.
    let other = planned(OTHER, &at("X.mlpackage"), Matrices::Float16);
    run(&other, true).unwrap();
    assert_eq!(fs::read(&config).unwrap(), fs::read(fixture(OTHER).join("config.json")).unwrap());
    // One that was changed since is nobody's.
    fs::write(&config, b"{\"mine\": 1}").unwrap();
    refused(&job, &config, "is not this model's");
}

#[test]
fn options_say_something_and_packages_are_called_so() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture(LLAMA);
    let fails = |args: &[&str], words: &str| {
        let mut command = Command::cargo_bin("qconv").unwrap();
        command.arg("hf-to-coreml").arg(&source).args(args).current_dir(dir.path());
        let done = command.assert().code(2);
        let said = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(said.contains(words), "{words:?} was expected: {said}");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is written");
    };
    fails(&["-o", "X"], "a package is called NAME.mlpackage");
    fails(&["-o", "X.mlmodel"], "hint: -o X.mlmodel.mlpackage");
    let x = ["-o", "X.mlpackage"];
    let with = |more: &[&'static str]| [&x[..], more].concat();
    fails(&with(&["--chunk-size", "1M"]), "--chunk-size means nothing");
    fails(&with(&["--allow-unfit"]), "--allow-unfit means nothing");
    fails(&with(&["--ternary-form", "dense"]), "--ternary-form means nothing");
    fails(&with(&["--bits", "8", "--allow-fallback"]), "--allow-fallback means nothing");
    fails(&with(&["--granularity", "channel"]), "float16 shares nothing");
}
