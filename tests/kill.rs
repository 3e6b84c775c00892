//! A conversion that is killed at any moment goes on when the same command is given again, ends with the same bytes,
//! and leaves nothing else.
//!
//! `QCONV_KILLS=50` kills each kind of conversion so often instead of once or twice; the tally is printed
//! (`--nocapture`).
#![cfg(unix)]

#[path = "common/large.rs"]
mod large;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A place with a model, where `out` holds what is written, and nothing else.
struct Place(tempfile::TempDir);

/// Every file below a directory, hidden ones too, with its bytes.
type Files = BTreeMap<PathBuf, Vec<u8>>;

fn files(dir: &Path) -> Files {
    fn visit(root: &Path, dir: &Path, found: &mut Files) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => visit(root, &path, found),
                false => {
                    found.insert(path.strip_prefix(root).unwrap().to_path_buf(), fs::read(&path).unwrap());
                }
            }
        }
    }
    let mut found = Files::new();
    visit(dir, dir, &mut found);
    found
}

/// What tells that files were not touched.
fn stamps(dir: &Path) -> Vec<(PathBuf, u64, u64, i64, i64)> {
    let stamp = |path: PathBuf| {
        let meta = fs::metadata(&path).unwrap();
        (path, meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec())
    };
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| stamp(e.unwrap().path())).collect();
    all.sort();
    all
}

/// When a process is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    After(Duration),
    /// So long after it began to give files their names.
    Renaming(Duration),
}

#[derive(Default, Debug)]
struct Tally {
    runs: u32,
    kills: u32,
    /// Of those, while files got their names, or after.
    renaming: u32,
    resumed: u32,
    identical: u32,
}

struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        large::write(&place.path("source/model"), 4, 2);
        let f16 = ["hf-to-gguf", "source/model", "-o", "source/f16.gguf", "-t", "f16", "--no-verify", "-q"];
        assert!(place.run(&f16).status.success());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
        command.args(args).current_dir(self.0.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// An empty `out`, or one with what another command wrote.
    fn prepare(&self, before: &Files) {
        let out = self.path("out");
        let _ = fs::remove_dir_all(&out);
        fs::create_dir(&out).unwrap();
        for (name, bytes) in before {
            fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
            fs::write(out.join(name), bytes).unwrap();
        }
    }

    fn is_renaming(&self) -> bool {
        let journals = fs::read_dir(self.path("out")).unwrap().flatten();
        let mut journals = journals.filter(|e| e.file_name().to_string_lossy().ends_with(".qconv-journal"));
        journals.any(|e| fs::read_to_string(e.path()).is_ok_and(|text| text.contains("\ncommit ")))
    }

    /// Kills a run at a moment; whether it had not ended by then.
    fn kill(&self, args: &[&str], moment: Moment) -> bool {
        let mut child = self.command(args).stderr(Stdio::null()).spawn().unwrap();
        let wait = match moment {
            Moment::After(wait) => wait,
            Moment::Renaming(wait) => {
                while !self.is_renaming() && child.try_wait().unwrap().is_none() {}
                wait
            }
        };
        let begun = Instant::now();
        while begun.elapsed() < wait {
            std::thread::sleep(wait.saturating_sub(begun.elapsed()).min(Duration::from_millis(1)));
        }
        child.kill().unwrap();
        child.wait().unwrap().signal() == Some(9)
    }

    /// Kills `args` so often, sometimes the run that goes on too.
    fn check(&self, what: &str, args: &[&str], before: &[&str], times: (u32, u32)) -> Tally {
        let mut old = Files::new();
        if !before.is_empty() {
            self.prepare(&old);
            assert!(self.run(before).status.success());
            old = files(&self.path("out"));
        }
        self.prepare(&old);
        let begun = Instant::now();
        let whole = self.run(args);
        let takes = begun.elapsed();
        assert!(whole.status.success(), "{what}: {}", String::from_utf8_lossy(&whole.stderr));
        let whole = files(&self.path("out"));
        let source = stamps(&self.path("source"));
        let (mut tally, mut random) = (Tally::default(), Random(times.0.into()));
        for k in 0..times.0 + times.1 {
            self.prepare(&old);
            // Spread over the whole run, a little beyond its end.
            let part = (f64::from(k) + random.part()) / f64::from(times.0.max(1));
            let mut moment = match k < times.0 {
                true => Moment::After(takes.mul_f64(part * 1.05)),
                false => Moment::Renaming(Duration::from_micros((random.part() * 3000.0) as u64)),
            };
            tally.runs += 1;
            let mut goes_on = self.kill(args, moment);
            while goes_on {
                tally.kills += 1;
                tally.renaming += u32::from(self.is_renaming());
                // Every third that goes on is killed as well.
                goes_on = random.part() < 0.33;
                if goes_on {
                    moment = Moment::After(takes.mul_f64(random.part()));
                    tally.runs += 1;
                    goes_on = self.kill(args, moment);
                }
            }
            let left = files(&self.path("out"));
            let last = self.run(args);
            let said = String::from_utf8_lossy(&last.stderr);
            tally.runs += 1;
            tally.resumed += u32::from(said.contains("going on where"));
            // It may have been killed when all was done.
            let was_done = left == whole && said.contains("exists already");
            let names = || left.iter().map(|(n, b)| format!("{n:?} {}", b.len())).collect::<Vec<_>>();
            assert!(last.status.success() || was_done, "{what} {moment:?}: {said}\n{:#?}", names());
            let found = files(&self.path("out"));
            let found_names: Vec<_> = found.keys().collect();
            assert_eq!(found_names, whole.keys().collect::<Vec<_>>(), "{what} {moment:?}");
            assert!(found == whole, "{what} {moment:?}: other bytes");
            assert_eq!(stamps(&self.path("source")), source, "{what}: the source was changed");
            tally.identical += 1;
        }
        eprintln!("{what}: {tally:?}, uninterrupted {takes:.2?}");
        assert_eq!(tally.identical, times.0 + times.1);
        tally
    }
}

#[test]
fn killed_runs_go_on_and_end_the_same() {
    let times = std::env::var("QCONV_KILLS").ok().map(|n| n.parse::<u32>().unwrap());
    // At any moment, and while files get their names.
    let times = |short: (u32, u32)| times.map_or(short, |n| (n, n.div_ceil(5)));
    let place = Place::new();
    let to_gguf = ["hf-to-gguf", "source/model", "-o", "out/m.gguf", "-t", "f16", "--no-verify", "-j", "2"];
    let quantize = ["quantize", "source/f16.gguf", "out/q.gguf", "-t", "q4_k_m", "-j", "2"];
    let split = ["split", "source/f16.gguf", "out/s.gguf", "--max-size", "2M"];
    let shards = [&quantize[..], &["--split-max-tensors", "4"]].concat();
    let directory = ["gguf-to-hf", "source/f16.gguf", "-o", "out/dir", "--max-shard-size", "4M"];
    let pytorch =
        ["convert", "source/f16.gguf", "--to", "pytorch", "-o", "out/dir", "--max-shard-size", "4M"];
    let over = [&directory[..], &["--force"]].concat();
    let pack = ["pack", "source/model", "-o", "out/p.qpack"];
    /// What it is called, the command, one to run before it, and how many kills.
    type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a str], (u32, u32));
    let cases: [Case<'_>; 7] = [
        ("hf-to-gguf", &to_gguf, &[], times((2, 0))),
        ("quantize", &quantize, &[], times((1, 0))),
        ("quantize to shards", &shards, &[], times((0, 1))),
        ("split", &split, &[], times((1, 1))),
        ("directory", &directory, &[], times((1, 1))),
        ("directory over another", &over, &pytorch, times((0, 1))),
        ("pack", &pack, &[], times((1, 0))),
    ];
    let mut all = Tally::default();
    for (what, args, before, times) in cases {
        let tally = place.check(what, args, before, times);
        all.runs += tally.runs;
        all.kills += tally.kills;
        all.renaming += tally.renaming;
        all.resumed += tally.resumed;
        all.identical += tally.identical;
    }
    eprintln!("all: {all:?}");
    assert!(all.kills > 0 && all.resumed > 0, "{all:?}");
}
