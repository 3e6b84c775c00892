//! What is finished of an output that takes long: after a kill or Ctrl-C the same command goes on from there, and
//! ends with the same bytes.
//!
//! It is a text beside the unfinished output, `.NAME.qconv-journal`. The first line is the key: what the
//! output is made of. Each further line names a finished span: number of the tensor, first and last element, the
//! places of its bytes (file, offset and length of each run), their sum, and as JSON what became of its rows. Nothing
//! has to be flushed in any order: a span counts if its bytes are still those.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::outcome::{Loss, Spanned, Tally};
use super::plan::{Importance, Plan, Rounding};
use crate::container::{Store, open_regular};
use crate::error::{Error, Result};
use crate::sha256::Sha256;

/// A span of a tensor: its number in the plan, its first element, and the one behind its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    pub tensor: usize,
    pub start: u64,
    pub end: u64,
}

/// The journal of an output.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    finished: HashMap<Span, Finished>,
}

/// What is known of a finished span: where its bytes are, their sum, and what became of its rows.
#[derive(Debug)]
struct Finished {
    runs: Vec<Run>,
    sum: String,
    became: Became,
}

/// What became of a span's rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Became {
    tallies: Vec<Tally>,
    loss: Option<Loss>,
}

/// Bytes in an output file: its number, the first byte, and how many.
type Run = (usize, u64, u64);

/// The bytes of a span, as they were written.
#[derive(Debug, Default)]
pub struct Written {
    runs: Vec<Run>,
    sum: Sha256,
    bytes: u64,
}

impl Written {
    /// Notes bytes at an offset of an output file.
    pub fn note(&mut self, file: usize, offset: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.bytes += len;
        self.sum.update(bytes);
        match self.runs.last_mut() {
            Some((last, at, n)) if *last == file && *at + *n == offset => *n += len,
            _ => self.runs.push((file, offset, len)),
        }
    }
}

const VERSION: &str = "qconv-journal 2";
/// Most runs of a span that is noted: more of them cost more than they save.
const MOST_RUNS: usize = 64;
/// Bytes that are read at a time.
const BUFFER: u64 = 1 << 20;
/// Most bytes of a journal that are read: those of about a million spans.
const MOST_BYTES: u64 = 64 << 20;

impl Journal {
    /// The journal's place beside an output.
    ///
    /// # Errors
    /// `Misuse` for a path that names no file.
    pub fn path_for(output: &Path) -> Result<PathBuf> {
        let name = output.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(output))?;
        Ok(output.with_file_name(format!(".{}.qconv-journal", name.to_string_lossy())))
    }

    /// Goes on with the journal at `path` if it has this `key` and that is wished; otherwise begins it anew.
    ///
    /// # Errors
    /// `Io`; `Misuse` for what is no regular file.
    pub fn open(path: PathBuf, key: &str, resume: bool) -> Result<Self> {
        // What is no regular file might be waited for without end.
        if path.exists() {
            open_regular(&path)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = file.map_err(|e| Error::io("create", &path, e))?;
        let mut bytes = Vec::new();
        if resume {
            let read = (&file).take(MOST_BYTES).read_to_end(&mut bytes);
            read.map_err(|e| Error::io("read", &path, e))?;
        }
        let begin = format!("{VERSION} {key}\n");
        let mut finished = HashMap::new();
        let mut kept = 0;
        if let Some(lines) = bytes.strip_prefix(begin.as_bytes()) {
            kept = begin.len();
            for line in lines.split_inclusive(|b| *b == b'\n') {
                // What follows a line that was being written when the process ended is not believed.
                let Some((span, found)) = str::from_utf8(line).ok().and_then(parse) else { break };
                finished.insert(span, found);
                kept += line.len();
            }
        }
        let written = file
            .set_len(kept as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .and_then(|_| if kept == 0 { file.write_all(begin.as_bytes()) } else { Ok(()) });
        written.map_err(|e| Error::io("write", &path, e))?;
        Ok(Self { path, file: Mutex::new(file), finished })
    }

    /// What became of the rows of a span that was finished before, if `read` (of an output file, from an offset on)
    /// gives the bytes that it had.
    pub(super) fn find(
        &self,
        span: Span,
        read: impl Fn(usize, u64, &mut [u8]) -> Result<()>,
    ) -> Option<Spanned> {
        let Finished { runs, sum, became } = self.finished.get(&span)?;
        let (mut found, mut bytes, mut total) = (Sha256::new(), Vec::new(), 0);
        for &(file, at, len) in runs {
            let mut done = 0;
            while done < len {
                bytes.resize((len - done).min(BUFFER) as usize, 0);
                read(file, at.checked_add(done)?, &mut bytes).ok()?;
                found.update(&bytes);
                done += bytes.len() as u64;
            }
            total += len;
        }
        let Became { tallies, loss } = became.clone();
        (digest(found) == *sum).then_some(Spanned { bytes: total, tallies, loss, flushed: 0 })
    }

    /// Whether there is anything to go on with.
    pub fn is_begun(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Notes a finished span with its bytes, and what became of its rows.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn add(&self, span: Span, written: Written, spanned: &Spanned) -> Result<()> {
        if written.runs.len() > MOST_RUNS {
            return Ok(());
        }
        let became = Became { tallies: spanned.tallies.clone(), loss: spanned.loss };
        let became = serde_json::to_string(&became).unwrap_or_default();
        let runs: Vec<_> = written.runs.iter().map(|(f, at, len)| format!("{f}:{at}:{len}")).collect();
        let Span { tensor, start, end } = span;
        let (runs, sum) = (runs.join(","), digest(written.sum));
        let line = format!("{tensor} {start} {end} {runs} {sum} {became}\n");
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Removes it: there is nothing left that it says.
    pub fn remove(self) {
        // Without the file that it belongs to it means nothing anyway.
        let _ = fs::remove_file(&self.path);
    }
}

fn parse(line: &str) -> Option<(Span, Finished)> {
    let mut parts = line.strip_suffix('\n')?.splitn(6, ' ');
    let tensor = parts.next()?.parse().ok()?;
    let start = parts.next()?.parse().ok()?;
    let end = parts.next()?.parse().ok()?;
    let run = |text: &str| {
        let mut numbers = text.splitn(3, ':');
        let file = numbers.next()?.parse().ok()?;
        Some((file, numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    let runs = parts.next()?.split(',').map(run).collect::<Option<_>>()?;
    let sum = parts.next()?.to_string();
    // The report may do without.
    let became = serde_json::from_str(parts.next()?).unwrap_or_default();
    Some((Span { tensor, start, end }, Finished { runs, sum, became }))
}

fn digest(sum: Sha256) -> String {
    hex(&sum.finalize()[..12])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What the bytes of a plan's output depend on: the program, the headers, what each tensor is made of and by which
/// method, and the files that all that is read from, by place, length and time of change.
///
/// # Errors
/// `Io` when a source has gone.
pub fn key(plan: &Plan, store: &Store) -> Result<String> {
    let mut hash = Hashing(Sha256::new());
    hash.0.update(env!("CARGO_PKG_VERSION"));
    let mut sources = HashSet::new();
    for file in store.files() {
        hash.file(file.path())?;
    }
    for file in &plan.files {
        hash.0.update(file.len.to_le_bytes());
        hash.0.update(&file.header);
        let _ = write!(hash, "{:?}", file.ending);
    }
    for fold in &plan.folds {
        hash.0.update(&fold.name);
    }
    for t in &plan.tensors {
        // Formatting into a hash cannot fail.
        let _ = write!(hash, "{} {} {} {:?}", t.name, t.dtype, t.offset, t.source);
        if let Some(packing) = &t.packing {
            let _ = write!(hash, " {:?} {}", packing.layout, packing.expert);
        }
        let (how, moments) = match &t.rounding {
            Rounding::Nearest => ("nearest".to_string(), None),
            Rounding::Even => ("even".to_string(), None),
            Rounding::Weighed(Importance::Matrix { matrix, entry }) => {
                if sources.insert(matrix.path()) {
                    hash.file(matrix.path())?;
                }
                (format!("weighed by {entry:?}"), None)
            }
            Rounding::Weighed(Importance::Diagonal { moments, input }) => {
                (format!("weighed by {input:?}"), Some(moments))
            }
            Rounding::Guided(guide) => {
                (format!("{:?} by {:?}", guide.method, guide.input), Some(&guide.moments))
            }
        };
        let _ = writeln!(hash, " {how}");
        for file in moments.iter().flat_map(|m| m.files()) {
            if sources.insert(file.path()) {
                hash.file(file.path())?;
            }
        }
    }
    Ok(hex(&hash.0.finalize()))
}

/// A hash that can be written to.
struct Hashing(Sha256);

impl Hashing {
    fn file(&mut self, path: &Path) -> Result<()> {
        let meta = fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        self.0.update(path.canonicalize().unwrap_or_default().as_os_str().as_encoded_bytes());
        self.0.update(meta.len().to_le_bytes());
        self.0.update(modified.map_or(0, |t| t.as_nanos()).to_le_bytes());
        Ok(())
    }
}

impl std::fmt::Write for Hashing {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.update(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_finished_is_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = Journal::path_for(&dir.path().join("a.gguf")).unwrap();
        let span = |tensor| Span { tensor, start: 0, end: 32 };
        let has = |journal: &Journal, tensor, found: u8| {
            let read = |file: usize, at: u64, bytes: &mut [u8]| {
                bytes.fill(if (file, at) == (1, 40) { found } else { 0 });
                Ok(())
            };
            journal.find(span(tensor), read).is_some_and(|s| s.bytes == 3)
        };
        let add = |journal: &Journal, tensor, bytes: &[u8]| {
            let mut written = Written::default();
            written.note(1, 40, bytes);
            journal.add(span(tensor), written, &Spanned::default()).unwrap();
        };
        let open = |key, resume| Journal::open(path.clone(), key, resume).unwrap();
        let journal = open("k", true);
        assert!(!journal.is_begun());
        add(&journal, 1, &[7; 3]);
        add(&journal, 2, &[8; 3]);
        let whole = fs::read(&path).unwrap();
        // Cut anywhere, the lines that are whole count, and those added later.
        for len in 0..=whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let journal = open("k", true);
            add(&journal, 3, &[9; 3]);
            let journal = open("k", true);
            assert!(has(&journal, 3, 9), "{len}");
            assert_eq!(has(&journal, 2, 8), len == whole.len(), "{len}");
        }
        let journal = open("k", true);
        assert!(has(&journal, 1, 7) && !has(&journal, 1, 6) && !has(&journal, 4, 7));
        assert!(!open("other", true).is_begun());
        add(&open("k", true), 1, &[7; 3]);
        assert!(!open("k", false).is_begun());
        let key = "qconv-journal 2 k\n";
        for bad in ["1 2\n", "a b c d e {}\n", "1 2 3 4\n", "1 0 32 1:2 x {}\n", "\n", "\u{0}\n"] {
            fs::write(&path, format!("{key}{bad}1 0 32 0:0:1 x {{}}\n")).unwrap();
            assert!(!open("k", true).is_begun(), "{bad:?}");
        }
        fs::write(&path, [255; 100]).unwrap();
        assert!(!open("k", true).is_begun());
    }
}
