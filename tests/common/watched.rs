//! Runs the command under a clock, and says what it took.
#![cfg(unix)]
#![allow(dead_code)] // each test uses its part

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use wait4::Wait4;

/// After this a run counts as a hang, and is ended. Slow machines and slow builds stay far below.
const HANG: Duration = Duration::from_secs(60);

/// What a run of the command came to.
pub struct Run {
    pub args: String,
    /// `None` where a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// Peak of resident memory, in bytes.
    pub peak: u64,
    pub time: Duration,
}

/// Runs `qconv` with what it prints in `scratch`, where it also runs.
pub fn qconv<S: AsRef<OsStr>>(scratch: &Path, args: &[S]) -> Run {
    let (out, err) = (scratch.join("stdout"), scratch.join("stderr"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.args(args).current_dir(scratch).stdin(Stdio::null());
    command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    let begun = Instant::now();
    let mut child = command.spawn().unwrap();
    let id = child.id().to_string();
    let (done, is_done) = channel::<()>();
    let clock = std::thread::spawn(move || {
        let hangs = is_done.recv_timeout(HANG) == Err(RecvTimeoutError::Timeout);
        if hangs {
            Command::new("kill").args(["-KILL", &id]).status().unwrap();
        }
        hangs
    });
    let ended = child.wait4().unwrap();
    drop(done);
    let time = begun.elapsed();
    let args: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
    let args = args.join(" ");
    assert!(!clock.join().unwrap(), "qconv {args} hangs");
    let peak = ended.rusage.maxrss;
    let (stdout, stderr) = (fs::read(&out).unwrap(), fs::read(&err).unwrap());
    fs::remove_file(out).unwrap();
    fs::remove_file(err).unwrap();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    Run { args, code: ended.status.code(), stdout, stderr, peak, time }
}
