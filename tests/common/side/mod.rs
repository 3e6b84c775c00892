//! Hostile files, given to the library and to the program: what each of them has to say, and what it may take.
#![allow(dead_code)] // each test uses its part

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use qconv::convert::{HfToGguf, TokenCheck};
use qconv::{ErrorKind, Result};
use serde_json::Value as Json;
use wait4::Wait4;

use crate::common::{convert, fixture};

/// What a run may take: processor time, memory; and when it is taken for one that hangs.
const TIME: Duration = Duration::from_secs(2);
const MEMORY: u64 = 256 << 20;
const HANGS: Duration = Duration::from_secs(60);

/// What is expected of a file.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// An error of this kind that says this.
    Refused(ErrorKind, &'static str),
    Accepted,
    /// It is read, and refused, saying this, where the linked llama.cpp compares its tokens.
    Compared(&'static str),
}

pub use Expect::{Accepted, Compared, Refused};

/// A directory with hostile files, and one for what is made of them.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["in", "out"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    /// With a copy of a model of the fixtures.
    pub fn model(name: &str) -> Self {
        let place = Self::new();
        for entry in fs::read_dir(fixture("models").join(name)).unwrap() {
            let entry = entry.unwrap();
            let file = entry.file_name();
            if !file.to_string_lossy().starts_with("reference") {
                fs::copy(entry.path(), place.path(&file.to_string_lossy())).unwrap();
            }
        }
        place
    }

    pub fn source(&self) -> PathBuf {
        self.dir.path().join("in")
    }

    /// The path of an input.
    pub fn path(&self, name: &str) -> PathBuf {
        self.source().join(name)
    }

    pub fn output(&self) -> PathBuf {
        self.dir.path().join("out").join("x.gguf")
    }

    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    pub fn remove(&self, name: &str) -> &Self {
        fs::remove_file(self.path(name)).unwrap();
        self
    }

    pub fn json(&self, name: &str) -> Json {
        serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Changes a JSON file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Json)) -> &Self {
        let mut json = self.json(name);
        change(&mut json);
        self.put(name, json.to_string())
    }

    /// The conversion of the model here, by the library and by the program.
    #[track_caller]
    pub fn converts(&self, case: &str, expect: Expect) {
        self.converts_by(case, None, expect);
    }

    /// The same, by a definition from outside.
    #[track_caller]
    pub fn converts_by(&self, case: &str, definition: Option<&str>, expect: Expect) {
        let definition = definition.map(|name| self.path(name));
        let planned = HfToGguf {
            source: self.source(),
            output: Some(self.output()),
            arch_file: definition.clone(),
            tokens: TokenCheck::Skipped,
            ..HfToGguf::default()
        }
        .plan();
        check(case, planned.map(drop), expect);
        self.program_converts(case, definition.as_deref(), expect);
    }

    /// By the program alone.
    #[track_caller]
    pub fn program_converts(&self, case: &str, definition: Option<&Path>, expect: Expect) {
        let (source, output) = (self.source(), self.output());
        let mut args =
            vec![OsStr::new("hf-to-gguf"), source.as_os_str(), OsStr::new("-o"), output.as_os_str()];
        args.extend(["-q", "--no-verify", "--allow-token-mismatch"].map(OsStr::new));
        if let Some(path) = definition {
            args.extend([OsStr::new("--arch-file"), path.as_os_str()]);
        }
        self.program(case, &args, expect);
    }

    /// Runs the program: it ends in time, within memory, with the error that is expected, and leaves nothing.
    #[track_caller]
    pub fn program(&self, case: &str, args: &[&OsStr], expect: Expect) {
        let ran = run(case, args);
        let (message, left) = (&ran.message, self.dir.path().join("out").read_dir().unwrap().count());
        let is_error = message.starts_with("error: ") || message.contains("\nerror: ");
        let expect = match expect {
            Compared(says) if cfg!(feature = "ggml") => Refused(ErrorKind::Malformed, says),
            Compared(_) => Accepted,
            expect => expect,
        };
        match expect {
            Refused(_, says) if ran.code != Some(2) || !is_error || !message.contains(says) || left > 0 => {
                fault(format!("{case}: {says:?} was expected, {left} files left: {:?} {message}", ran.code));
            }
            Accepted if ran.code != Some(0) => fault(format!("{case}: {message}")),
            _ => {}
        }
        let _ = fs::remove_file(self.output());
    }
}

#[track_caller]
fn fault(what: String) {
    if std::env::var_os("SIDE_KEEP").is_some() { eprintln!("FAULT {what}") } else { panic!("{what}") }
}

/// What the library found.
#[track_caller]
pub fn check(case: &str, found: Result<()>, expect: Expect) {
    match (found, expect) {
        (Ok(()), Accepted | Compared(_)) => {}
        (Err(e), Accepted | Compared(_)) => fault(format!("{case}: {e}")),
        (Ok(()), Refused(kind, says)) => fault(format!("{case}: accepted, {kind:?} was expected: {says}")),
        (Err(e), Refused(kind, says)) => {
            if e.kind() != kind || !e.to_string().contains(says) || e.path().is_none() {
                fault(format!(
                    "{case}: {kind:?} was expected that says {says:?}: {:?} {e}, at {:?}",
                    e.kind(),
                    e.path()
                ));
            }
        }
    }
}

pub struct Ran {
    pub code: Option<i32>,
    /// What it wrote to stderr.
    pub message: String,
}

/// Where [`spawned`] finds what it is to run, and leaves how that went.
const ORDER: &str = "QCONV_SIDE_ORDER";

/// Runs the program with these arguments, and holds it to what it may take. The system counts memory from that of
/// the process that starts another, so a small one does it: this test's program anew, as [`spawned`].
#[track_caller]
pub fn run(case: &str, args: &[&OsStr]) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<&str> = args.iter().map(|a| a.to_str().unwrap()).collect();
    fs::write(dir.path().join("order"), lines.join("\n")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "side::spawned", "--ignored"]).env(ORDER, dir.path()).stdin(Stdio::null());
    let output = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(output.success(), "{case}: {output}");
    let used = fs::read_to_string(dir.path().join("used")).unwrap();
    let used: Vec<i64> = used.split(' ').map(|n| n.parse().unwrap()).collect();
    let [code, millis, peak] = used[..] else { panic!("{case}: {used:?}") };
    let message = String::from_utf8_lossy(&fs::read(dir.path().join("said")).unwrap()).into_owned();
    assert!((0..=2).contains(&code), "{case}: ended with {code}: {message}");
    assert!(!message.contains("panicked") && !message.contains("overflowed"), "{case}: {message}");
    let (time, peak) = (Duration::from_millis(millis as u64), peak as u64);
    assert!(time < TIME, "{case} took {time:?}: {message}");
    assert!(peak < MEMORY, "{case} took {} MB: {message}", peak >> 20);
    Ran { code: Some(code as i32), message }
}

/// What [`run`] starts: runs the program, and writes down its exit code, milliseconds of processor time, and bytes
/// of memory.
#[test]
#[ignore = "a part of the others, which start it"]
fn spawned() {
    let Some(dir) = std::env::var_os(ORDER).map(PathBuf::from) else { return };
    let order = fs::read_to_string(dir.join("order")).unwrap();
    let said = File::create(dir.join("said")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(order.split('\n')).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    let mut child = command.spawn().unwrap();
    let (done, is_done) = channel::<()>();
    let id = child.id().to_string();
    // A child that hangs is ended, so that the test does.
    let guard = std::thread::spawn(move || {
        if is_done.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
            Command::new("kill").args(["-9", &id]).status().unwrap();
        }
    });
    let used = child.wait4().unwrap();
    drop(done);
    guard.join().unwrap();
    let time = used.rusage.utime + used.rusage.stime;
    let code = used.status.code().unwrap_or(-1);
    fs::write(dir.join("used"), format!("{code} {} {}", time.as_millis(), used.rusage.maxrss)).unwrap();
}

/// A small model as GGUF, F16, made once.
pub fn small_gguf() -> &'static Path {
    static MADE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small.gguf");
        convert(&fixture("models/fmt-spm-bpe"), &path, Some("f16"));
        (dir, path)
    });
    path
}

/// All beginnings of `bytes`, and copies in which one byte is another.
pub fn damaged(bytes: &[u8]) -> impl Iterator<Item = (String, Vec<u8>)> + '_ {
    let cut = (0..bytes.len()).map(|n| (format!("cut at {n}"), bytes[..n].to_vec()));
    let changed = (0..bytes.len()).flat_map(move |at| {
        [0, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80, b'"'].into_iter().map(move |byte| {
            let mut other = bytes.to_vec();
            other[at] = byte;
            (format!("byte {at} is {byte:#x}"), other)
        })
    });
    cut.chain(changed)
}
