//! GGUF files: how their parts lie, what their shards say, and their metadata.

use std::path::Path;

use super::finding::Finding;
use super::rules::{HOLE, ORDER, PADDING, POLYGLOT, SHARD_FOREIGN, TRAILING};
use super::{Opened, Options, Scan, hyper, imatrix, names, shape, template, vocab};
use crate::container::InputFile;
use crate::container::gguf::{Gguf, Metadata, Places, Value, is_gguf, places};
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

/// Values of `general.type` that are no models.
const NO_MODELS: &[&str] = &["imatrix", "moments", "adapter"];

pub(super) fn check(scan: &mut Scan, path: &Path, options: &Options) -> Result<Option<Opened>> {
    if !is_gguf(path)? {
        return Err(Error::malformed("is called .gguf, but does not begin with \"GGUF\"").at(path));
    }
    let gguf = Gguf::open(path, &options.limits)?;
    let Some(first) = gguf.store.files().first() else { return Ok(None) };
    let entries = Entries::new(first, &gguf.metadata, &options.limits);
    for (number, file) in gguf.store.files().iter().enumerate() {
        let tensors = gguf.store.tensors().iter().filter(|t| t.file == number);
        let begin = (number == 0).then_some((entries.places.end, gguf.data_offset));
        layout(scan, file, tensors.collect(), begin, gguf.alignment)?;
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
    let format = if kind == "imatrix" || imatrix::is_one(&gguf.store) {
        imatrix::of_gguf(scan, path, options)?;
        "imatrix"
    } else {
        if !NO_MODELS.contains(&kind) {
            hyper::check(scan, &entries, gguf.store.tensors());
            shape::check(scan, &entries, &gguf.store);
        }
        vocab::check(scan, &entries);
        template::check_metadata(scan, &entries);
        "GGUF"
    };
    Ok(Some(Opened { store: gguf.store, format }))
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
/// Bytes of a hole that are looked at.
const WINDOW: u64 = 64 << 10;

/// Which other format bytes begin as, or hold the directory of.
pub(super) fn other_format(bytes: &[u8]) -> Option<&'static str> {
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(0);
    let begins = |(magic, name): &(&[u8], &'static str)| {
        [bytes, bytes.get(start..).unwrap_or_default()].iter().any(|b| b.starts_with(magic)).then_some(*name)
    };
    OTHERS
        .iter()
        .find_map(begins)
        .or_else(|| bytes.windows(4).any(|w| w == b"PK\x05\x06").then_some("the end of a zip archive"))
}

/// What lies between tensors, and behind them. `begin` is where the header ends and the data begin, where that is known.
fn layout(
    scan: &mut Scan,
    file: &InputFile,
    tensors: Vec<&TensorInfo>,
    begin: Option<(u64, u64)>,
    alignment: u32,
) -> Result<()> {
    let mut order = tensors.clone();
    order.sort_by_key(|t| (t.offset, t.nbytes));
    if let Some((a, b)) = tensors.iter().zip(&order).find(|(a, b)| a.offset != b.offset) {
        let message = format!("tensor {:?} lies where {:?} should by the order of the list", b.name, a.name);
        scan.find(Finding::new(&ORDER, file.path(), message).tensor(&b.name).at(b.offset));
    }
    let (mut padding, mut first_padding) = (0u64, None);
    if let Some((from, to)) = begin.filter(|(from, to)| *from > 0 && to > from && *to <= file.len())
        && !is_zero(file, from, to - from)?
    {
        (padding, first_padding) = (1, Some((from, to - from)));
    }
    let begin = begin.map(|(_, data)| data);
    let mut end = begin.or(order.first().map(|t| t.offset)).unwrap_or(0);
    for t in order {
        let gap = t.offset.saturating_sub(end);
        if gap >= u64::from(alignment) {
            between(scan, file, end, gap, Some(&t.name))?;
        } else if gap > 0 && !is_zero(file, end, gap)? {
            padding += 1;
            first_padding.get_or_insert((end, gap));
        }
        end = t.offset.saturating_add(t.nbytes);
    }
    if let Some((at, bytes)) = first_padding {
        let message = format!("padding is not zero in {padding} places");
        scan.find(Finding::new(&PADDING, file.path(), message).at(at).of(bytes));
    }
    let rest = file.len().saturating_sub(end);
    let padded = end.checked_next_multiple_of(u64::from(alignment)).unwrap_or(end).saturating_sub(end);
    if rest > padded || (rest > 0 && !is_zero(file, end, rest)?) {
        between(scan, file, end, rest, None)?;
    }
    Ok(())
}

/// Bytes that belong to no tensor, before the tensor named or at the end.
fn between(scan: &mut Scan, file: &InputFile, at: u64, bytes: u64, before: Option<&str>) -> Result<()> {
    let mut seen = vec![0; bytes.min(WINDOW) as usize];
    file.read_at(at, &mut seen)?;
    let mut tail = vec![0; bytes.min(WINDOW) as usize];
    file.read_at(at + (bytes - bytes.min(WINDOW)), &mut tail)?;
    let place = match before {
        Some(name) => format!("before tensor {name:?}"),
        None => "behind the last tensor".to_string(),
    };
    let finding = match other_format(&seen).or_else(|| other_format(&tail)) {
        Some(other) => Finding::new(&POLYGLOT, file.path(), format!("{bytes} bytes {place} are {other}")),
        None if before.is_some() => {
            Finding::new(&HOLE, file.path(), format!("{bytes} bytes {place} belong to no tensor"))
        }
        None => Finding::new(&TRAILING, file.path(), format!("{bytes} bytes {place} belong to nothing")),
    };
    scan.find(finding.at(at).of(bytes));
    Ok(())
}

fn is_zero(file: &InputFile, at: u64, bytes: u64) -> Result<bool> {
    let mut seen = vec![0; bytes.min(WINDOW) as usize];
    file.read_at(at, &mut seen)?;
    Ok(seen.iter().all(|b| *b == 0))
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
