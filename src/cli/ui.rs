//! What a person sees: progress, notes, errors, and Ctrl-C.

use std::io::{BufWriter, IsTerminal, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qconv::convert::Observer;
use qconv::error::{Error, Result};
use qconv::plain::{self, Plain};

use super::interrupt;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static PATIENCE: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Lets the first Ctrl-C stop the work cleanly.
pub fn catch_interrupt() -> &'static AtomicBool {
    static SET: Once = Once::new();
    let end = || {
        if PATIENCE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err() {
            qconv::convert::Temporary::remove_all();
            // As a shell reports a program that Ctrl-C ended.
            std::process::exit(130);
        }
        INTERRUPTED.store(true, Ordering::Relaxed);
    };
    // Where that cannot be, signals end the program at once.
    SET.call_once(|| drop(interrupt::catch(end)));
    &INTERRUPTED
}

/// How many Ctrl-C are taken from now on before one ends the program at once.
pub fn patience(n: usize) {
    PATIENCE.store(n, Ordering::Relaxed);
}

/// The sign that it is the user's turn, on stderr.
pub fn ask(sign: &str) {
    let mut err = std::io::stderr().lock();
    let _ = write!(err, "{sign}").and_then(|()| err.flush());
}

/// Prints an error with its hint.
pub fn error(e: &anyhow::Error) {
    let mut err = std::io::stderr().lock();
    // Where stderr is gone, nobody is left to be told.
    let _ = match e.downcast_ref::<qconv::Error>() {
        Some(own) => writeln!(err, "error: {own}"),
        None => writeln!(err, "error: {}", plain::lines(&format!("{e:#}"))),
    };
    if let Some(hint) = e.downcast_ref::<qconv::Error>().and_then(qconv::Error::hint_text) {
        let _ = writeln!(err, "  hint: {}", plain::lines(hint));
    }
}

/// A line for the user, on stderr.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", plain::lines(text));
}

/// Stdout for what has names and texts of files in it: none of them steers the terminal.
pub fn stdout() -> Plain<BufWriter<StdoutLock<'static>>> {
    Plain(BufWriter::new(std::io::stdout().lock()))
}

/// A line, or several, on stdout; nothing in it steers the terminal, and JSON stays JSON.
///
/// # Errors
/// `Io` where stdout takes nothing more.
pub fn print(text: impl std::fmt::Display) -> Result<()> {
    let mut out = stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|e| Error::io("write", "stdout", e))
}

/// Progress of one pass over so many bytes: a bar on a terminal, a line every few seconds
/// elsewhere, nothing when quiet.
pub struct Progress {
    bar: Option<ProgressBar>,
    lines: bool,
    what: &'static str,
    /// What is counted; bytes where empty.
    unit: &'static str,
    total: u64,
    done: AtomicU64,
    begun: Instant,
    last_line: Mutex<Instant>,
}

const LINE_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    /// Progress in bytes. `what` is a verb: "converting".
    pub fn new(what: &'static str, total: u64, quiet: bool) -> Self {
        Self::counting(what, "", total, quiet)
    }

    /// Progress in something else, such as "windows".
    pub fn counting(what: &'static str, unit: &'static str, total: u64, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (!quiet && terminal).then(|| {
            let style = ProgressStyle::with_template(match unit {
                "" => "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}",
                _ => "{prefix} [{bar:30}] {pos}/{len} {eta} {wide_msg}",
            })
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
            let target = ProgressDrawTarget::stderr_with_hz(10);
            ProgressBar::with_draw_target(Some(total), target).with_style(style).with_prefix(what)
        });
        let now = Instant::now();
        Self {
            bar,
            lines: !quiet && !terminal,
            what,
            unit,
            total,
            done: AtomicU64::new(0),
            begun: now,
            last_line: Mutex::new(now),
        }
    }

    /// Clears the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn advance(&self, bytes: u64, tensor: &str) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            bar.set_message(plain::line(tensor).into_owned());
        } else if self.lines
            && let Ok(mut last) = self.last_line.try_lock()
            && last.elapsed() >= LINE_EVERY
        {
            *last = Instant::now();
            let rate = done as f64 / self.begun.elapsed().as_secs_f64();
            let left = self.total.saturating_sub(done) as f64 / rate.max(1e-3);
            say(&match self.unit {
                "" => format!(
                    "{}: {} of {}, {}/s, {left:.0} s left",
                    self.what,
                    size(done),
                    size(self.total),
                    size(rate as u64)
                ),
                unit => format!("{}: {done} of {} {unit}, {left:.0} s left, {tensor}", self.what, self.total),
            });
        }
    }

    fn resumed(&self, bytes: u64) {
        if self.bar.is_some() || self.lines {
            say(&format!(
                "note: going on where an interrupted run of this command ended, with {} finished; --no-resume \
                 begins anew",
                size(bytes)
            ));
        }
    }

    fn interrupted(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }
}

/// Bytes for people: `98.4 MB`.
pub fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut k = 0;
    while value >= 1000.0 && k + 1 < units.len() {
        value /= 1000.0;
        k += 1;
    }
    if k == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[k]) }
}

/// Numbers for people: `134.5 M`.
pub fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}
