//! What is fuzzed (`fuzz/`), without libFuzzer: each target takes its seeds, some thousand changed ones, and all that
//! was found before (`fixtures/bugs/TARGET/WHAT`). A fault is a panic; the input is named before.
//!
//! `QCONV_UPDATE=1` writes the seeds in `fuzz/corpus` anew.

#[path = "common/changed.rs"]
mod changed;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;
#[path = "common/seeds.rs"]
mod seeds;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use changed::{Random, changed};
use fuzz::{TARGETS, Target};

/// The longest that one input may take where nothing is optimized, and tables of grids are made for it.
const MOST_TIME: Duration = Duration::from_secs(60);
/// Changed inputs of each target.
const CHANGED: u64 = 400;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of a directory by name; none where there is no directory.
fn files(dir: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let entries = entries.map(|e| e.unwrap()).filter(|e| e.path().is_file());
    let mut files: Vec<_> = entries.map(|e| (e.file_name().into_string().unwrap(), e.path())).collect();
    files.sort();
    files
}

/// Runs a target on an input, which is named if it fails.
fn run(target: &Target, what: &str, data: &[u8]) -> bool {
    let begin = Instant::now();
    let accepted = std::panic::catch_unwind(|| (target.run)(data));
    let took = begin.elapsed();
    let accepted = accepted.unwrap_or_else(|_| {
        let kept = std::env::temp_dir().join(format!("qconv-{}-{what}", target.name));
        fs::write(&kept, data).unwrap();
        panic!("{}: {what} fails; it was written to {}", target.name, kept.display());
    });
    assert!(took < MOST_TIME, "{}: {what} took {took:?}", target.name);
    accepted
}

fn names_in(dir: &str, suffix: &str) -> BTreeSet<String> {
    let entries =
        fs::read_dir(root().join(dir)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    entries.filter_map(|name| name.strip_suffix(suffix).map(str::to_string)).collect()
}

#[test]
fn every_target_has_its_files() {
    let known: BTreeSet<String> = TARGETS.iter().map(|t| t.name.to_string()).collect();
    assert_eq!(known.len(), TARGETS.len());
    let manifest: toml::Table =
        toml::from_str(&fs::read_to_string(root().join("fuzz/Cargo.toml")).unwrap()).unwrap();
    let bins = manifest["bin"].as_array().unwrap().iter();
    let mut built: BTreeSet<String> = bins.map(|b| b["name"].as_str().unwrap().to_string()).collect();
    let mut there = names_in("fuzz/fuzz_targets", ".rs");
    assert!(built.remove("all") && there.remove("all"));
    assert_eq!((&built, &there), (&known, &known));
    for name in &known {
        let text = fs::read_to_string(root().join(format!("fuzz/fuzz_targets/{name}.rs"))).unwrap();
        assert!(text.contains(&format!("run(\"{name}\", data)")), "{name}");
    }
    assert_eq!(names_in("fuzz/corpus", ""), known);
    assert!(names_in("fixtures/bugs", "").iter().all(|name| known.contains(name) || name.ends_with(".md")));
}

#[test]
fn seeds_are_what_they_are_made_of() {
    let made = seeds::all(&root().join("fixtures"));
    let corpus = root().join("fuzz/corpus");
    if std::env::var_os("QCONV_UPDATE").is_some() {
        let _ = fs::remove_dir_all(&corpus);
        for (target, name, bytes) in &made {
            fs::create_dir_all(corpus.join(target)).unwrap();
            fs::write(corpus.join(target).join(name), bytes).unwrap();
        }
    }
    let mut total = 0;
    for (target, name, bytes) in &made {
        let found = fs::read(corpus.join(target).join(name)).unwrap_or_default();
        assert!(found == *bytes, "{target}/{name}: QCONV_UPDATE=1 writes it anew");
        total += bytes.len();
    }
    let there: usize = TARGETS.iter().map(|t| files(&corpus.join(t.name)).len()).sum();
    assert_eq!(there, made.len(), "files in fuzz/corpus that are no seeds");
    assert!(total < 1 << 20, "{total} bytes");
}

#[test]
fn seeds_are_accepted() {
    for target in TARGETS {
        let dirs = [
            Some(root().join("fuzz/corpus").join(target.name)),
            Some(target.beside).filter(|d| !d.is_empty()).map(|d| root().join(d)),
        ];
        let mut accepted = 0;
        for (name, path) in dirs.iter().flatten().flat_map(|dir| files(dir)) {
            accepted += usize::from(run(target, &name, &fs::read(path).unwrap()));
        }
        assert!(accepted > 0, "{} accepts none of its seeds: it tests nothing", target.name);
        println!("{}: {accepted} accepted", target.name);
    }
}

#[test]
fn what_was_found_is_mended() {
    let mut found = 0;
    for target in TARGETS {
        for (name, path) in files(&root().join("fixtures/bugs").join(target.name)) {
            run(target, &name, &fs::read(path).unwrap());
            found += 1;
        }
    }
    println!("{found} former findings");
}

#[test]
fn changed_seeds_do_not_fail() {
    for target in TARGETS {
        let seeds: Vec<_> = files(&root().join("fuzz/corpus").join(target.name))
            .into_iter()
            .map(|(_, path)| fs::read(path).unwrap())
            .collect();
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        for i in 0..CHANGED {
            let (seed, other) = (&seeds[random.below(seeds.len())], &seeds[random.below(seeds.len())]);
            run(target, &format!("changed-{i}"), &changed(&mut random, seed, other));
        }
    }
}
