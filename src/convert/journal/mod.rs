//! What is finished of an output: after a kill or Ctrl-C the same command goes on from there, and ends with the same
//! bytes. The journal is also the lock of its output, and says which names an output was being given.
//!
//! It is a text beside the unfinished output, `.NAME.qconv-journal`. The first line is the key: what the
//! output is made of. Each further line names a finished span: number of the tensor, first and last element, the
//! places of its bytes (file, offset and length of each run, and where it comes again at equal distances the distance
//! and how often), their hash, and as JSON what became of its rows. Nothing has to be flushed in any order: a span
//! counts if its bytes are still those. A line `commit` says what is renamed to what once all is written.
//!
//! The hash is XXH3 with 128 bits: what a crash leaves is damaged by accident, not by design, and a hash that
//! withstands design would take longer than the conversion.

mod key;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

pub use self::key::key;
use super::outcome::{Loss, Spanned, Tally};
use crate::error::{Error, Result};
use crate::sha256::hex;
use crate::sys;

/// A span of a tensor: its number in the plan, its first element, and the one behind its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    pub tensor: usize,
    pub start: u64,
    pub end: u64,
}

/// The journal of an output, which no other process has while this one does.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Mutex<File>,
    key: Option<String>,
    finished: HashMap<Span, Finished>,
    /// Bytes of what is finished.
    bytes: AtomicU64,
    renames: Vec<Rename>,
    /// Bytes of the lines that count.
    len: u64,
    /// Whether it says anything; it goes otherwise.
    speaks: bool,
}

/// What is renamed in the end: both names are relative to where the journal lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rename {
    /// The unfinished file or directory.
    pub from: String,
    /// Its name in the end.
    pub to: String,
    /// What tells it from others ([`sys::identity`]).
    pub id: u64,
    /// What it is by lengths and times of change, of all files of a directory.
    pub stamp: String,
}

/// What is known of a finished span: where its bytes are, their hash, and what became of its rows.
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
    flushed: u64,
}

/// Bytes in an output file: its number, the first byte, how many, and how often such come again at which distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    file: usize,
    at: u64,
    len: u64,
    stride: u64,
    count: u64,
}

impl Run {
    /// Takes bytes into it that go on where it ends.
    fn extend(&mut self, file: usize, at: u64, len: u64) -> bool {
        let end = self.at.saturating_add(self.len);
        if self.file != file || at < end {
            return false;
        }
        match self.count {
            1 if at == end => self.len += len,
            1 if len == self.len => (self.stride, self.count) = (at - self.at, 2),
            n if n > 1 && len == self.len && Some(at) == self.piece(n) => self.count += 1,
            _ => return false,
        }
        true
    }

    /// Where the bytes come for the `n`th time.
    fn piece(&self, n: u64) -> Option<u64> {
        self.stride.checked_mul(n)?.checked_add(self.at)
    }
}

/// The bytes of a span, as they were written.
#[derive(Default)]
pub struct Written {
    /// The part of the tensor that each belongs to, and the hash of its bytes so far.
    runs: Vec<(usize, Run, XxHash3_128)>,
    bytes: u64,
}

impl Written {
    /// Notes bytes of a part of the tensor at an offset of an output file.
    pub fn note(&mut self, part: usize, (file, offset): (usize, u64), bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.bytes += len;
        let recent = self.runs.iter_mut().rev().take(RECENT);
        for (of, run, hash) in recent {
            if *of == part && run.extend(file, offset, len) {
                return hash.write(bytes);
            }
        }
        if self.runs.len() <= MOST_RUNS {
            let mut hash = XxHash3_128::new();
            hash.write(bytes);
            self.runs.push((part, Run { file, at: offset, len, stride: 0, count: 1 }, hash));
        }
    }

    fn sum(&self) -> String {
        sum(self.runs.iter().map(|(_, _, hash)| hash))
    }
}

const VERSION: &str = "qconv-journal 4";
/// Most runs of a span that is noted: more of them cost more than they save.
const MOST_RUNS: usize = 64;
/// So many parts may be written in turns.
const RECENT: usize = 8;
/// Bytes that are read at a time.
const BUFFER: u64 = 1 << 20;
/// Most bytes of a journal that are read: those of about a million spans.
const MOST_BYTES: u64 = 128 << 20;

impl Journal {
    /// The journal's place beside an output.
    ///
    /// # Errors
    /// `Misuse` for a path that names no file.
    pub fn path_for(output: &Path) -> Result<PathBuf> {
        output.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(output))?;
        Ok(sys::hidden(output, "journal"))
    }

    /// Takes the journal at `path` for this process, with what an earlier one left in it; `None` where another
    /// process has it.
    ///
    /// # Errors
    /// `Io`.
    pub fn lock(path: PathBuf) -> Result<Option<Self>> {
        let Some(file) = sys::open_locked(&path)? else { return Ok(None) };
        let mut journal = Self {
            path,
            file: Mutex::new(file),
            key: None,
            finished: HashMap::new(),
            bytes: AtomicU64::new(0),
            renames: Vec::new(),
            len: 0,
            speaks: false,
        };
        journal.read()?;
        Ok(Some(journal))
    }

    fn read(&mut self) -> Result<()> {
        let mut bytes = Vec::new();
        let file = self.file.get_mut().unwrap_or_else(|e| e.into_inner());
        let read = file.take(MOST_BYTES).read_to_end(&mut bytes);
        read.map_err(|e| Error::io("read", &self.path, e))?;
        self.speaks = !bytes.is_empty();
        let mut lines = bytes.split_inclusive(|b| *b == b'\n').map(|line| str::from_utf8(line).ok());
        let mut first = || lines.next()??.strip_prefix(VERSION)?.strip_prefix(' ')?.strip_suffix('\n');
        let Some(key) = first() else { return Ok(()) };
        self.key = Some(key.to_string());
        self.len = (VERSION.len() + key.len() + 2) as u64;
        for line in lines {
            // What follows a line that was being written when the process ended is not believed.
            let Some(line) = line else { break };
            if let Some(renames) = line.strip_prefix("commit ") {
                let renames = renames.strip_suffix('\n').and_then(|text| serde_json::from_str(text).ok());
                let Some(renames) = renames else { break };
                self.renames = renames;
            } else {
                let Some((span, found)) = parse(line) else { break };
                let bytes = found.runs.iter().map(|run| run.len.saturating_mul(run.count));
                let noted = self.bytes.get_mut();
                *noted = bytes.fold(*noted, u64::saturating_add);
                self.finished.insert(span, found);
            }
            self.len += line.len() as u64;
        }
        Ok(())
    }

    /// Whether it is that of an output with this key.
    pub fn is_of(&self, key: &str) -> bool {
        self.key.as_deref() == Some(key)
    }

    /// What was about to be renamed when an earlier process ended.
    pub fn renames(&self) -> &[Rename] {
        &self.renames
    }

    /// Whether there is anything to go on with.
    pub fn is_begun(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Bytes of the spans that are noted.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Goes on behind the lines that count.
    ///
    /// # Errors
    /// `Io`.
    pub fn go_on(&mut self) -> Result<()> {
        let file = self.file.get_mut().unwrap_or_else(|e| e.into_inner());
        let cut = file.set_len(self.len).and_then(|()| file.seek(SeekFrom::End(0)));
        cut.map(|_| ()).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Begins it anew, for an output with this key, or for one that is not gone on with.
    ///
    /// # Errors
    /// `Io`.
    pub fn begin(&mut self, key: Option<&str>) -> Result<()> {
        self.finished.clear();
        self.renames.clear();
        *self.bytes.get_mut() = 0;
        self.key = key.map(String::from);
        let first = key.map(|key| format!("{VERSION} {key}\n")).unwrap_or_default();
        self.len = 0;
        self.go_on()?;
        // Where not even this can be written, nothing is to stay.
        self.speaks = false;
        self.append(&first)?;
        self.speaks = !first.is_empty();
        Ok(())
    }

    /// Notes what is about to be renamed, and flushes it to the disk.
    ///
    /// # Errors
    /// `Io`.
    pub fn commit(&mut self, renames: &[Rename]) -> Result<()> {
        if self.key.is_none() {
            self.begin(Some("-"))?;
        }
        self.renames = renames.to_vec();
        let renames = serde_json::to_string(renames).map_err(|e| Error::misuse(e.to_string()))?;
        self.append(&format!("commit {renames}\n"))?;
        let file = self.file.get_mut().unwrap_or_else(|e| e.into_inner());
        file.sync_all().map_err(|e| Error::io("flush", &self.path, e))
    }

    fn append(&self, text: &str) -> Result<()> {
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        file.write_all(text.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
    }

    /// What became of the rows of a span that was finished before, if `read` (of an output file, from an offset on)
    /// gives the bytes that it had.
    pub(super) fn find(
        &self,
        span: Span,
        read: impl Fn(usize, u64, &mut [u8]) -> Result<()>,
    ) -> Option<Spanned> {
        let Finished { runs, sum: noted, became } = self.finished.get(&span)?;
        let (mut hashes, mut bytes, mut total) = (Vec::with_capacity(runs.len()), Vec::new(), 0);
        for run in runs {
            let mut hash = XxHash3_128::new();
            for n in 0..run.count {
                let at = run.piece(n)?;
                let mut done = 0;
                while done < run.len {
                    bytes.resize((run.len - done).min(BUFFER) as usize, 0);
                    read(run.file, at.checked_add(done)?, &mut bytes).ok()?;
                    hash.write(&bytes);
                    done += bytes.len() as u64;
                }
                total = run.len.saturating_add(total);
            }
            hashes.push(hash);
        }
        let Became { tallies, loss, flushed } = became.clone();
        (sum(hashes.iter()) == *noted).then_some(Spanned { bytes: total, tallies, loss, flushed })
    }

    /// Notes a finished span with its bytes, and what became of its rows.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn add(&self, span: Span, written: &Written, spanned: &Spanned) -> Result<()> {
        if written.runs.len() > MOST_RUNS {
            return Ok(());
        }
        let Spanned { tallies, loss, flushed, .. } = spanned;
        let became = Became { tallies: tallies.clone(), loss: *loss, flushed: *flushed };
        let became = serde_json::to_string(&became).unwrap_or_default();
        let run = |Run { file, at, len, stride, count }: &Run| match count {
            1 => format!("{file}:{at}:{len}"),
            _ => format!("{file}:{at}:{len}:{stride}:{count}"),
        };
        let runs: Vec<_> = written.runs.iter().map(|(_, r, _)| run(r)).collect();
        let Span { tensor, start, end } = span;
        let (runs, sum) = (runs.join(","), written.sum());
        self.bytes.fetch_add(written.bytes, Ordering::Relaxed);
        self.append(&format!("{tensor} {start} {end} {runs} {sum} {became}\n"))
    }

    /// Lets it say nothing any more: it goes when it is dropped.
    pub fn silence(&mut self) {
        self.speaks = false;
    }

    /// Removes it.
    pub fn remove(mut self) {
        self.silence();
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if !self.speaks {
            // Before others can have it: who waits for it notices that it has gone.
            let _ = fs::remove_file(&self.path);
            // After a power cut it must not be there again beside an output that is finished.
            sys::sync_directory(self.path.parent().unwrap_or(Path::new(".")));
        }
    }
}

fn parse(line: &str) -> Option<(Span, Finished)> {
    let mut parts = line.strip_suffix('\n')?.splitn(6, ' ');
    let tensor = parts.next()?.parse().ok()?;
    let start = parts.next()?.parse().ok()?;
    let end = parts.next()?.parse().ok()?;
    let run = |text: &str| {
        let numbers = text.split(':').map(|n| n.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
        let (file, at, len, stride, count) = match numbers[..] {
            [file, at, len] => (file, at, len, 0, 1),
            [file, at, len, stride, count] if len > 0 && stride >= len && count > 0 => {
                (file, at, len, stride, count)
            }
            _ => return None,
        };
        Some(Run { file: usize::try_from(file).ok()?, at, len, stride, count })
    };
    let runs = parts.next()?.split(',').map(run).collect::<Option<_>>()?;
    let sum = parts.next()?.to_string();
    // The report may do without.
    let became = serde_json::from_str(parts.next()?).unwrap_or_default();
    Some((Span { tensor, start, end }, Finished { runs, sum, became }))
}

/// The hash of the hashes of runs.
fn sum<'a>(runs: impl Iterator<Item = &'a XxHash3_128>) -> String {
    let mut whole = XxHash3_128::new();
    runs.for_each(|run| whole.write(&run.finish_128().to_le_bytes()));
    hex(&whole.finish_128().to_be_bytes())
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
            written.note(0, (1, 40), bytes);
            journal.add(span(tensor), &written, &Spanned::default()).unwrap();
        };
        let open = |key: &str, resume: bool| {
            let mut journal = Journal::lock(path.clone()).unwrap().unwrap();
            match resume && journal.is_of(key) {
                true => journal.go_on().unwrap(),
                false => journal.begin(Some(key)).unwrap(),
            }
            journal
        };
        let journal = open("k", true);
        assert!(!journal.is_begun());
        add(&journal, 1, &[7; 3]);
        add(&journal, 2, &[8; 3]);
        drop(journal);
        let whole = fs::read(&path).unwrap();
        // Cut anywhere, the lines that are whole count, and those added later.
        for len in 0..=whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let journal = open("k", true);
            add(&journal, 3, &[9; 3]);
            drop(journal);
            let journal = open("k", true);
            assert!(has(&journal, 3, 9), "{len}");
            assert_eq!(has(&journal, 2, 8), len == whole.len(), "{len}");
        }
        let journal = open("k", true);
        assert!(has(&journal, 1, 7) && !has(&journal, 1, 6) && !has(&journal, 4, 7));
        assert!(Journal::lock(path.clone()).unwrap().is_none());
        drop(journal);
        assert!(!open("other", true).is_begun());
        add(&open("k", true), 1, &[7; 3]);
        assert!(!open("k", false).is_begun());
        let key = "qconv-journal 4 k\n";
        for bad in ["1 2\n", "a b c d e {}\n", "1 2 3 4\n", "1 0 32 1:2 x {}\n", "\n", "\u{0}\n"] {
            fs::write(&path, format!("{key}{bad}1 0 32 0:0:1 x {{}}\n")).unwrap();
            assert!(!open("k", true).is_begun(), "{bad:?}");
        }
        fs::write(&path, [255; 100]).unwrap();
        assert!(!open("k", true).is_begun());
    }

    /// Parts that are written in turns, a row at a time.
    #[test]
    fn rows_that_lie_apart_are_few_runs() {
        let mut bytes = vec![0u8; 4096];
        let mut written = Written::default();
        for row in 0..100u8 {
            for (part, at, len) in [(0, 100, 8), (1, 1000, 4), (2, 2000, 8)] {
                let at = at + usize::from(row) * if part == 2 { len } else { len + 1 };
                bytes[at..at + len].fill(row + 1);
                written.note(part, (0, at as u64), &bytes[at..at + len]);
            }
        }
        assert_eq!(written.runs.len(), 3);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".j");
        let mut journal = Journal::lock(path.clone()).unwrap().unwrap();
        journal.begin(Some("k")).unwrap();
        let span = Span { tensor: 0, start: 0, end: 9 };
        journal.add(span, &written, &Spanned::default()).unwrap();
        let renames = [Rename { from: "a b".into(), to: "c".into(), id: 1, stamp: "s".into() }];
        journal.commit(&renames).unwrap();
        drop(journal);
        let journal = Journal::lock(path).unwrap().unwrap();
        assert_eq!((journal.renames(), journal.bytes()), (&renames[..], 2000));
        let found = |bytes: &[u8]| {
            let read = |_: usize, at: u64, out: &mut [u8]| {
                out.copy_from_slice(&bytes[at as usize..][..out.len()]);
                Ok(())
            };
            journal.find(span, read).is_some()
        };
        assert!(found(&bytes));
        bytes[1000 + 50 * 5 + 3] ^= 1;
        assert!(!found(&bytes));
    }

    #[cfg(unix)]
    #[test]
    fn what_others_put_there_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join(".j"), dir.path().join("victim"));
        fs::write(&victim, "dear").unwrap();
        let link = |by: fn(&Path, &Path) -> std::io::Result<()>| {
            by(&victim, &path).unwrap();
            let mut journal = Journal::lock(path.clone()).unwrap().unwrap();
            assert!(!journal.is_of("k"));
            journal.begin(Some("k")).unwrap();
            journal.remove();
            assert_eq!(fs::read(&victim).unwrap(), b"dear");
            assert!(!path.exists());
        };
        link(|a, b| std::os::unix::fs::symlink(a, b));
        link(|a, b| fs::hard_link(a, b));
    }
}
