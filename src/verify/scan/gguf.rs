//! GGUF files: how their parts lie, what their shards say, and their metadata.

use std::path::Path;

use super::finding::Finding;
use super::rules::{
    HOLE, KEY_RANGE, ORDER, PADDING, POLYGLOT, SHARD_FOREIGN, TRAILING, VOCAB_BYTE, VOCAB_DUPLICATE,
    VOCAB_UNLOADABLE,
};
use super::{Opened, Options, Scan, hyper, imatrix, names, shape, template, vocab};
use crate::container::gguf::{Gguf, Metadata, Places, Value, is_gguf, places};
use crate::container::{InputFile, Store};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::TensorInfo;

/// A file's metadata, and where each entry lies.
pub(super) struct Entries<'a> {
    /// The file they lie in.
    pub file: &'a Path,
    pub metadata: &'a Metadata,
    places: Places,
}

impl<'a> Entries<'a> {
    /// Of a file that was opened already.
    pub fn new(file: &'a InputFile, metadata: &'a Metadata, limits: &Limits) -> Self {
        // Remarks without a place are better than none.
        Self { file: file.path(), metadata, places: places(file, limits).unwrap_or_default() }
    }

    /// First byte of an entry.
    pub fn place(&self, key: &str) -> Option<u64> {
        self.places.entries.get(key).copied()
    }

    /// First byte of an entry's value, where that is a string: behind the key's length, the key, the type, and the
    /// string's length.
    pub fn text_place(&self, key: &str) -> Option<u64> {
        self.place(key)?.checked_add(8 + key.len() as u64 + 4 + 8)
    }

    /// A finding about an entry.
    pub fn finding(&self, rule: &'static super::Rule, key: &str, message: impl Into<String>) -> Finding {
        Finding::new(rule, self.file, message).key(key).at(self.place(key))
    }
}

/// Values of `general.type` that are no models, and the ends of the names of all their tensors. A loader of models does
/// not ask for the type: what has other tensors is checked as a model.
const NO_MODELS: &[(&str, &[&str])] = &[
    ("imatrix", &[".in_sum2", ".counts"]),
    ("moments", &[".in_moments", ".in_sum", ".in_sum_abs", ".counts"]),
    ("adapter", &[".lora_a", ".lora_b"]),
];

/// Whether a file can be no model. Importance matrices need not say what they are.
fn is_no_model(kind: &str, store: &Store) -> bool {
    let all = |ends: &[&str]| store.tensors().iter().all(|t| ends.iter().any(|end| t.name.ends_with(end)));
    NO_MODELS.iter().any(|(name, ends)| *name == kind && all(ends)) || imatrix::is_one(store)
}

pub(super) fn check(scan: &mut Scan, path: &Path, options: &Options) -> Result<Option<Opened>> {
    if !is_gguf(path)? {
        return Err(Error::malformed("is called .gguf, but does not begin with \"GGUF\"").at(path));
    }
    let gguf = Gguf::open(path, &options.limits)?;
    let Some(first) = gguf.store.files().first() else { return Ok(None) };
    let entries = Entries::new(first, &gguf.metadata, &options.limits);
    for (number, file) in gguf.store.files().iter().enumerate() {
        let tensors = gguf.store.tensors().iter().filter(|t| t.file == number);
        let own = if number == 0 { None } else { Some(places(file, &options.limits)?) };
        layout(scan, file, tensors.collect(), own.as_ref().unwrap_or(&entries.places))?;
        if number > 0 {
            shard(scan, &gguf.metadata, file, &options.limits)?;
        }
    }
    for info in gguf.store.tensors() {
        let file = gguf.store.files().get(info.file).map_or(path, InputFile::path);
        scan.findings
            .extend(names::check(file, "tensor", &info.name).into_iter().map(|f| f.tensor(&info.name)));
    }
    for (key, _) in gguf.metadata.iter() {
        let found = names::check(entries.file, "key", key);
        scan.findings.extend(found.into_iter().map(|f| f.key(key).at(entries.place(key))));
    }
    let kind = gguf.metadata.str("general.type").unwrap_or_default();
    if !is_no_model(kind, &gguf.store) {
        hyper::check(scan, &entries, gguf.store.tensors());
        shape::check(scan, &entries, &gguf.store);
    }
    vocab::check(scan, &entries);
    template::check_metadata(scan, &entries);
    let format = match imatrix::is_one(&gguf.store) {
        true => {
            imatrix::of_gguf(scan, path, options)?;
            "imatrix"
        }
        false => "GGUF",
    };
    Ok(Some(Opened { store: gguf.store, format }))
}

/// What ends the process that loads the file, or never lets it come back.
///
/// # Errors
/// As [`Gguf::open`].
pub fn unloadable(path: &Path, limits: &Limits) -> Result<Option<Finding>> {
    let gguf = Gguf::open(path, limits)?;
    let Some(first) = gguf.store.files().first() else { return Ok(None) };
    let entries = Entries::new(first, &gguf.metadata, limits);
    let mut scan = Scan::default();
    hyper::check(&mut scan, &entries, gguf.store.tensors());
    vocab::check(&mut scan, &entries);
    let fatal = [&KEY_RANGE, &VOCAB_DUPLICATE, &VOCAB_BYTE, &VOCAB_UNLOADABLE].map(|rule| rule.id);
    Ok(scan.findings.into_iter().find(|f| fatal.contains(&f.rule.id)))
}

/// Beginnings of other formats, and what they are.
const OTHERS: &[(&[u8], &str)] = &[
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "the end of a zip archive"),
    (b"PK\x01\x02", "the directory of a zip archive"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program for Windows"),
    (b"\xcf\xfa\xed\xfe", "a program for macOS"),
    (b"#!", "a script"),
    (b"%PDF", "a PDF"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x1f\x8b\x08", "a gzip archive"),
    (b"<?php", "a PHP script"),
    (b"<html", "a page"),
    (b"<script", "a page"),
    (b"GGUF", "another GGUF file"),
    (b"\x80\x02}", "a pickle"),
    (b"\x80\x04\x95", "a pickle"),
];
/// Longest of them, in bytes.
const LONGEST: usize = 8;
/// Where the directory of an archive ends, which its readers look for from the end of a file.
const ZIP_END: &[u8] = b"PK\x05\x06";
/// Bytes that are read at once.
const PIECE: u64 = 64 << 10;

fn begins(bytes: &[u8]) -> Option<&'static str> {
    OTHERS.iter().find_map(|(magic, name)| bytes.starts_with(magic).then_some(*name))
}

/// What bytes are that belong to nothing.
#[derive(Default)]
struct Filling {
    /// The first few from the first that is not zero, and where that is.
    from: Option<(u64, Vec<u8>)>,
    /// The first few of all.
    first: Vec<u8>,
    /// The last few of the pieces before.
    last: Vec<u8>,
    read: u64,
    has_zip: bool,
}

impl Filling {
    /// Of a place in a file, read piece by piece.
    fn of(file: &InputFile, at: u64, bytes: u64) -> Result<Self> {
        let mut filling = Self::default();
        let mut piece = Vec::new();
        while filling.read < bytes {
            piece.resize((bytes - filling.read).min(PIECE) as usize, 0);
            file.read_at(at.saturating_add(filling.read), &mut piece)?;
            filling.piece(&piece);
        }
        Ok(filling)
    }

    fn piece(&mut self, bytes: &[u8]) {
        if self.first.len() < LONGEST {
            self.first.extend(bytes.iter().take(LONGEST - self.first.len()));
        }
        let start = match &self.from {
            None => bytes.iter().position(|b| *b != 0),
            Some((_, there)) => (there.len() < LONGEST).then_some(0),
        };
        if let Some(start) = start {
            let (_, there) = self.from.get_or_insert((self.read + start as u64, Vec::new()));
            there.extend(bytes.iter().skip(start).take(LONGEST - there.len()));
        }
        let edge = [self.last.as_slice(), bytes.get(..ZIP_END.len().min(bytes.len())).unwrap_or_default()];
        let within = |bytes: &[u8]| bytes.windows(ZIP_END.len()).any(|w| w == ZIP_END);
        self.has_zip |= within(&edge.concat()) || within(bytes);
        self.last = bytes.get(bytes.len().saturating_sub(ZIP_END.len() - 1)..).unwrap_or_default().to_vec();
        self.read += bytes.len() as u64;
    }

    fn is_zero(&self) -> bool {
        self.from.is_none()
    }

    fn other(&self) -> Option<&'static str> {
        let from = self.from.as_ref().and_then(|(_, bytes)| begins(bytes));
        begins(&self.first).or(from).or(self.has_zip.then_some("the end of a zip archive"))
    }
}

/// What lies between tensors, and behind them.
fn layout(scan: &mut Scan, file: &InputFile, tensors: Vec<&TensorInfo>, places: &Places) -> Result<()> {
    let mut order = tensors.clone();
    order.sort_by_key(|t| (t.offset, t.nbytes));
    if let Some((a, b)) = tensors.iter().zip(&order).find(|(a, b)| a.offset != b.offset) {
        let message = format!("tensor {:?} lies where {:?} should by the order of the list", b.name, a.name);
        scan.find(Finding::new(&ORDER, file.path(), message).tensor(&b.name).at(b.offset));
    }
    let is_known = places.alignment > 0;
    let alignment = u64::from(places.alignment.max(1));
    let first = order.first().map_or(file.len(), |t| t.offset);
    let (head, begin) = if is_known { (places.end, places.data_offset.min(first)) } else { (first, first) };
    let mut odd = Vec::new();
    let mut pad = |scan: &mut Scan, from: u64, to: u64| -> Result<()> {
        // A file without tensors may end before its data begins.
        let bytes = to.min(file.len()).saturating_sub(from);
        let filling = Filling::of(file, from, bytes)?;
        match filling.other() {
            Some(other) => scan.find(polyglot(file, from, bytes, "of padding", other)),
            None if !filling.is_zero() => odd.push((from, bytes)),
            None => {}
        }
        Ok(())
    };
    pad(scan, head, begin)?;
    let mut end = begin;
    for t in order {
        let gap = t.offset.saturating_sub(end);
        if gap >= alignment {
            between(scan, file, end, gap, Some(&t.name))?;
        } else if gap > 0 {
            pad(scan, end, t.offset)?;
        }
        end = t.offset.saturating_add(t.nbytes);
    }
    if let Some((at, bytes)) = odd.first() {
        let message = format!("padding is not zero in {} places", odd.len());
        scan.find(Finding::new(&PADDING, file.path(), message).at(*at).of(*bytes));
    }
    let rest = file.len().saturating_sub(end);
    let padded = end.checked_next_multiple_of(alignment).unwrap_or(end).saturating_sub(end);
    if rest > padded || (rest > 0 && !Filling::of(file, end, rest)?.is_zero()) {
        between(scan, file, end, rest, None)?;
    }
    Ok(())
}

fn polyglot(file: &InputFile, at: u64, bytes: u64, place: &str, other: &str) -> Finding {
    Finding::new(&POLYGLOT, file.path(), format!("{bytes} bytes {place} are {other}")).at(at).of(bytes)
}

/// Bytes that belong to no tensor, before the tensor named or at the end.
fn between(scan: &mut Scan, file: &InputFile, at: u64, bytes: u64, before: Option<&str>) -> Result<()> {
    let place = match before {
        Some(name) => format!("before tensor {name:?}"),
        None => "behind the last tensor".to_string(),
    };
    let (rule, message) = match Filling::of(file, at, bytes)?.other() {
        Some(other) => {
            scan.find(polyglot(file, at, bytes, &place, other));
            return Ok(());
        }
        None if before.is_some() => (&HOLE, format!("{bytes} bytes {place} belong to no tensor")),
        None => (&TRAILING, format!("{bytes} bytes {place} belong to nothing")),
    };
    scan.find(Finding::new(rule, file.path(), message).at(at).of(bytes));
    Ok(())
}

/// What a later shard says of itself beside the first.
fn shard(scan: &mut Scan, first: &Metadata, file: &InputFile, limits: &Limits) -> Result<()> {
    let own = Gguf::metadata_of(file.path(), limits)?;
    let entries = Entries::new(file, &own, limits);
    for (key, value) in own.iter().filter(|(key, _)| !key.starts_with("split.")) {
        let wanted = first.get(key);
        if wanted != Some(value) {
            let shown = |v: Option<&Value>| v.map_or("nothing".to_string(), short);
            let message = format!("{key} is {}, in the first shard {}", short(value), shown(wanted));
            let finding = entries.finding(&SHARD_FOREIGN, key, message);
            scan.find(finding.values(short(value), shown(wanted)));
            return Ok(()); // one is enough
        }
    }
    Ok(())
}

/// A value for a message.
pub(super) fn short(value: &Value) -> String {
    const CHARS: usize = 60;
    let text = match value.as_str() {
        Some(text) => format!("{text:?}"),
        None => value.to_string(),
    };
    match text.char_indices().nth(CHARS) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text,
    }
}
