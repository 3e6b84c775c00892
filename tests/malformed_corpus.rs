//! Files that lie (`common/corpus`), through the library and through the command: each is refused with the right
//! kind of error, which names what is wrong, or read. Never a panic, never a hang, never a byte from beyond the
//! file, never memory beyond the file's size. Then every cut and every changed byte of files that are right.
//! What is decided is written in `formats/spec/gguf.md` and `formats/spec/safetensors.md`.

#[path = "common/corpus/mod.rs"]
mod corpus;
#[path = "common/raw.rs"]
mod raw;
#[cfg(unix)]
#[path = "common/watched.rs"]
mod watched;

use std::fs;
use std::path::Path;

use corpus::{Case, Outcome, index, safetensors as st};
use qconv::ErrorKind::Malformed;
use qconv::Result;
use qconv::container::Store;
use qconv::container::gguf::Gguf;
use qconv::limits::Limits;
use qconv::model;

fn open_gguf(path: &Path) -> Result<()> {
    Gguf::open(path, &Limits::default()).map(|g| stays_within("gguf", &g.store))
}

fn open_safetensors(path: &Path) -> Result<()> {
    let opened = qconv::container::safetensors::open(path, &Limits::default());
    opened.map(|s| stays_within("safetensors", &s.store))
}

/// No tensor leaves its file, and all can be read.
#[track_caller]
fn stays_within(case: &str, store: &Store) {
    for t in store.tensors() {
        let file = &store.files()[t.file];
        let len = fs::metadata(file.path()).unwrap().len();
        let end = t.offset.checked_add(t.nbytes);
        assert!(end.is_some_and(|end| end <= len), "{case}: {:?} ends beyond the file", t.name);
        assert_eq!(Some(t.nbytes), t.dtype.nbytes(&t.shape).ok(), "{case}: {:?}", t.name);
        let bytes = store.read_all(t).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(bytes.len() as u64, t.nbytes, "{case}");
    }
}

fn open(case: &str, path: &Path) -> Result<()> {
    stays_within(case, model::open(path)?.store());
    Ok(())
}

#[track_caller]
fn check(case: &str, outcome: &Outcome, result: Result<()>) {
    match (outcome, result) {
        (Outcome::Fine, Ok(())) => {}
        (Outcome::Fine, Err(e)) => panic!("{case}: {e}"),
        (Outcome::Refused(..), Ok(())) => panic!("{case}: accepted"),
        (Outcome::Refused(kind, says), Err(e)) => {
            assert_eq!(e.kind(), *kind, "{case}: {e}");
            assert!(e.to_string().contains(says), "{case}: {e}\nshould say: {says}");
            assert!(e.path().is_some(), "{case}: {e} names no file");
            assert!(e.to_string().len() < 2000, "{case}: its message has {} bytes", e.to_string().len());
        }
    }
}

/// The corpus is all there: as many cases of each kind as the threats ask for, and more.
#[test]
fn the_corpus_is_whole() {
    let count = |cases: &[Case]| {
        let refused = cases.iter().filter(|c| !matches!(c.used, Outcome::Fine)).count();
        (refused, cases.len() - refused)
    };
    let (gguf, safetensors, indexes) = (corpus::all_gguf(), st::all(), index::all());
    assert!(gguf.len() >= 152 && safetensors.len() >= 43 && indexes.len() >= 6);
    let (refused, accepted) = count(&gguf);
    assert!(refused >= 104 && accepted >= 11, "{refused} {accepted}");
    let (refused, accepted) = count(&safetensors);
    assert!(refused >= 31 && accepted >= 7, "{refused} {accepted}");
    assert!(count(&indexes).0 >= 6);
}

/// Each decision stands in the specification, as a line of its table.
#[test]
fn decisions_are_written_down() {
    let page = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("formats/spec").join(name);
        fs::read_to_string(path).unwrap()
    };
    for (page, cases) in [(page("gguf.md"), corpus::all_gguf()), (page("safetensors.md"), st::all())] {
        let mut decided = 0;
        for case in &cases {
            let Some(line) = case.policy else { continue };
            decided += 1;
            let row = page.lines().find(|l| l.starts_with(&format!("| {line}")));
            let row = row.unwrap_or_else(|| panic!("{}: no line begins {line:?}", case.name));
            // What the second column says is what happens.
            let says = row.split('|').nth(2).unwrap().trim();
            let (reads, kind) = match &case.opened {
                Outcome::Fine => (true, String::new()),
                Outcome::Refused(kind, _) => (false, format!("{kind:?}").to_lowercase()),
            };
            assert!(if reads { says.starts_with("read") } else { says.starts_with(&kind) }, "{row}");
            let used = !matches!(case.used, Outcome::Fine);
            assert_eq!(reads && used, says.contains("no model"), "{}: {row}", case.name);
        }
        assert!(decided >= 5);
    }
}

#[test]
fn gguf_through_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for case in corpus::all_gguf() {
        fs::write(&path, &case.bytes).unwrap();
        let opened = Gguf::open(&path, &Limits::default());
        let used = opened.as_ref().map_or(Ok(()), Gguf::check_model);
        check(&case.name, &case.opened, opened.map(|g| stays_within(&case.name, &g.store)));
        if matches!(case.opened, Outcome::Fine) {
            check(&case.name, &case.used, used);
        }
        check_model_open(&case, &path);
    }
}

/// What tells formats apart comes to the same, but where the beginning is not GGUF's.
fn check_model_open(case: &Case, path: &Path) {
    match open(&case.name, path) {
        Ok(()) => assert!(matches!(case.opened, Outcome::Fine), "{}", case.name),
        Err(e) if case.bytes.starts_with(b"GGUF") => check(&case.name, &case.opened, Err(e)),
        Err(e) => assert!(e.path().is_some(), "{}: {e}", case.name),
    }
}

#[test]
fn safetensors_through_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for case in st::all() {
        fs::write(&path, &case.bytes).unwrap();
        let opened = open_safetensors(&path);
        match (&case.opened, case.bytes.is_empty()) {
            (_, true) => assert_eq!(opened.unwrap_err().kind(), Malformed),
            _ => check(&case.name, &case.opened, opened),
        }
    }
}

#[test]
fn indexes_through_the_library() {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in index::shards() {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let path = dir.path().join(index::INDEX);
    for case in index::all() {
        fs::write(&path, &case.bytes).unwrap();
        for path in [&path, dir.path()] {
            check(&case.name, &case.opened, open_safetensors(path));
        }
    }
}

/// Opens all cuts of `whole`.
fn cut(whole: &[u8], path: &Path, open: impl Fn(&Path) -> Result<()>) -> Vec<Result<()>> {
    (0..whole.len())
        .map(|n| {
            fs::write(path, &whole[..n]).unwrap();
            open(path)
        })
        .collect()
}

#[test]
fn every_cut_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let (raw, data) = corpus::gguf::valid();
    let whole = raw.bytes();
    let end = whole.len() - raw.data.len() + data;
    for (n, result) in cut(&whole, &path, open_gguf).into_iter().enumerate() {
        // The padding behind the last tensor may be missing.
        match result {
            Ok(()) => assert!(n >= end, "cut at {n}"),
            Err(e) => assert!(n < end && e.kind() == Malformed, "cut at {n}: {e}"),
        }
    }
    let every = |whole: &[u8], path: &Path| {
        for (n, result) in cut(whole, path, open_safetensors).into_iter().enumerate() {
            assert_eq!(result.expect_err("cut").kind(), Malformed, "cut at {n}");
        }
    };
    every(&st::file(st::GOOD, 16), &path);
    every(&st::file(&st::two(16), 32), &path);
    for (name, bytes) in index::shards() {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    every(&index::good(), &dir.path().join(index::INDEX));
}

/// Opens `whole` with each of its first `n` bytes changed: each of its bits, ends of ranges, neighbours, and what
/// is special in JSON. Returns how many were read, and how many refused.
fn change(whole: &[u8], n: usize, path: &Path, open: impl Fn(&Path) -> Result<()>) -> (usize, usize) {
    fs::write(path, whole).unwrap();
    open(path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let put = |i: usize, byte: u8| qconv::sys::write_all_at(&file, &[byte], i as u64).unwrap();
    let (mut read, mut refused) = (0, 0);
    for (i, &old) in whole.iter().enumerate().take(n) {
        let mut others: Vec<u8> = (0..8).map(|bit| old ^ 1 << bit).collect();
        others.extend([0, 1, 0x7f, 0x80, 0xff, old.wrapping_add(1), old.wrapping_sub(1)]);
        others.extend(b"\"\\{}[],:0-.e ");
        others.sort();
        others.dedup();
        for byte in others.into_iter().filter(|b| *b != old) {
            put(i, byte);
            match open(path) {
                Ok(()) => read += 1,
                Err(e) => {
                    assert!(!e.to_string().is_empty());
                    refused += 1;
                }
            }
        }
        put(i, old);
    }
    (read, refused)
}

/// Every byte of a header: an error, or tensors within the file.
#[test]
fn no_changed_byte_leads_out_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let raw = corpus::tensor::of_all_kinds();
    let whole = raw.bytes();
    let (read, refused) = change(&whole, whole.len() - raw.data.len(), &path, open_gguf);
    assert!(read > 1000 && refused > 1000, "{read} {refused}");
    let whole = st::file(&st::two(16), 32);
    let (read, refused) = change(&whole, whole.len() - 32, &path, open_safetensors);
    assert!(read > 10 && refused > 1000, "{read} {refused}");
    for (name, bytes) in index::shards() {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let (index, path) = (index::good(), dir.path().join(index::INDEX));
    let (read, refused) = change(&index, index.len(), &path, open_safetensors);
    assert!(read > 10 && refused > 1000, "{read} {refused}");
}

/// The same through the command: exit codes, words, time and memory, and nothing is left behind.
#[cfg(unix)]
mod command {
    use std::path::PathBuf;

    use super::*;
    use watched::{Run, qconv};

    /// Most resident memory that a file of some kilobytes may take, in bytes.
    const PEAK: u64 = 256 << 20;

    /// Holds a run against what should come of it.
    fn ended(case: &str, outcome: &Outcome, run: &Run) {
        let says = || format!("{case}: qconv {}: {}", run.args, run.stderr);
        assert!(run.peak < PEAK, "{} bytes of memory: {}", run.peak, says());
        let wild = |c: char| c.is_control() && c != '\n';
        assert!(!run.stderr.contains(wild), "control characters: {}", says());
        assert!(!String::from_utf8_lossy(&run.stdout).contains(wild), "control characters: {}", says());
        assert!(run.stdout.len() < 4 << 20, "{} bytes of output: {}", run.stdout.len(), says());
        match outcome {
            Outcome::Fine => assert_eq!(run.code, Some(0), "{}", says()),
            Outcome::Refused(_, words) => {
                assert_eq!(run.code, Some(2), "{}", says());
                assert!(run.stderr.starts_with("error: ") && run.stderr.contains(words), "{}", says());
                assert!(run.stdout.is_empty(), "{}", says());
            }
        }
    }

    fn names(dir: &Path) -> Vec<PathBuf> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect()
    }

    /// The slowest and the largest.
    fn report(runs: &[Run]) {
        let slowest = runs.iter().max_by_key(|r| r.time).unwrap();
        let largest = runs.iter().max_by_key(|r| r.peak).unwrap();
        let n = runs.len();
        println!("{n} runs; slowest {:?}: qconv {}", slowest.time, slowest.args);
        println!("largest {} kB: qconv {}", largest.peak >> 10, largest.args);
    }

    #[test]
    fn gguf() {
        let mut runs = Vec::new();
        for case in corpus::all_gguf() {
            let dir = tempfile::tempdir().unwrap();
            let file = format!("{}.gguf", case.name);
            fs::write(dir.path().join(&file), &case.bytes).unwrap();
            let run = qconv(dir.path(), &["inspect", &file]);
            let foreign = !case.bytes.starts_with(b"GGUF");
            let outcome = match (&case.opened, foreign) {
                // What does not begin so may be of any format.
                (Outcome::Refused(kind, _), true) => Outcome::Refused(*kind, case.name.clone()),
                _ => case.opened.clone(),
            };
            ended(&case.name, &outcome, &run);
            runs.push(run);
            let wish = ["-t", "f32", "--allow-requantize", "-q", "-j", "1"];
            let run = qconv(dir.path(), &[&["quantize", &file, "out.gguf"][..], &wish].concat());
            ended(&case.name, &case.used, &run);
            let left = names(dir.path());
            assert_eq!(left.len(), 1 + usize::from(matches!(case.used, Outcome::Fine)), "{left:?}");
            runs.push(run);
        }
        report(&runs);
    }

    #[test]
    fn safetensors_and_indexes() {
        let mut runs = Vec::new();
        let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
        for case in st::all().into_iter().chain(index::all()) {
            let dir = tempfile::tempdir().unwrap();
            let is_index = case.name.starts_with("index_");
            let file = if is_index { index::INDEX } else { "model.safetensors" };
            if is_index {
                for (name, bytes) in index::shards() {
                    fs::write(dir.path().join(name), bytes).unwrap();
                }
            }
            fs::write(dir.path().join(file), &case.bytes).unwrap();
            let before = names(dir.path()).len();
            let run = qconv(dir.path(), &["inspect", file]);
            let begins_otherwise = !is_index && case.bytes.get(7..9) != Some(b"\0{");
            let outcome = match &case.opened {
                // What does not begin so may be of any format.
                Outcome::Refused(_, _) if begins_otherwise => Outcome::Refused(Malformed, file.into()),
                outcome => outcome.clone(),
            };
            ended(&case.name, &outcome, &run);
            runs.push(run);
            for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
                fs::copy(llama.join(name), dir.path().join(name)).unwrap();
            }
            // Those that are read have no tensor of a llama.
            let outcome = match &case.opened {
                Outcome::Fine => Outcome::Refused(Malformed, "tensor".into()),
                outcome => outcome.clone(),
            };
            // What else an empty file might be, its own reader does not ask.
            let outcome = match case.bytes.is_empty() {
                true => Outcome::Refused(Malformed, "it has 0 bytes".into()),
                false => outcome,
            };
            let run = qconv(dir.path(), &["hf-to-gguf", ".", "-o", "out.gguf", "-q", "-j", "1"]);
            ended(&case.name, &outcome, &run);
            assert_eq!(names(dir.path()).len(), before + 3, "{:?}", names(dir.path()));
            runs.push(run);
        }
        report(&runs);
    }
}
