//! The small files beside the weights: configs, tokenizers, indexes, model cards.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::open_regular;
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};

/// A whole side file; `None` when there is none.
///
/// # Errors
/// `Misuse` for what is no regular file, `Limit` when it has more than `max_bytes`, `Io` when it cannot be read.
pub fn read_side_file(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    if std::fs::metadata(path)
        .is_err_and(|e| matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory))
    {
        return Ok(None);
    }
    let (file, len) = open_regular(path)?;
    let too_long = || {
        let message = format!("holds more than the {max_bytes} bytes allowed");
        // Some files have lower bounds of their own.
        let moves = max_bytes == Limits::default().side_file_bytes;
        if moves { Bound::SideFile.reached(message) } else { Error::limit(message) }.at(path)
    };
    if len > max_bytes {
        return Err(too_long());
    }
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
    if bytes.len() as u64 > max_bytes {
        return Err(too_long());
    }
    Ok(Some(bytes))
}

/// Endings of files that hold weights, in one form or another.
const WEIGHTS: [&str; 15] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "onnx",
    "onnx_data",
    "h5",
    "msgpack",
    "ot",
    "npz",
    "tflite",
    "qpack",
];
/// Directories within directories.
const MAX_DEPTH: u32 = 4;

/// Whether a file is called as files of weights are.
pub fn is_weights(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, ending)| WEIGHTS.contains(&ending))
}

/// What is in a directory.
#[derive(Debug, Default)]
pub struct Below {
    /// Files, by names relative to it and by path, in the order of their names.
    pub files: Vec<(String, PathBuf)>,
    /// What is passed over: hidden names, names that are not UTF-8, links to directories, what lies too deep.
    pub skipped: Vec<String>,
}

/// All files in a directory and in those in it.
///
/// # Errors
/// `Io`.
pub fn files_below(dir: &Path) -> Result<Below> {
    let mut found = Below::default();
    visit(dir, "", 0, &mut found)?;
    found.files.sort();
    found.skipped.sort();
    Ok(found)
}

fn visit(dir: &Path, prefix: &str, depth: u32, found: &mut Below) -> Result<()> {
    let failed = |e| Error::io("read", dir, e);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, own) = (entry.path(), entry.file_name());
        let name = format!("{prefix}{}", own.to_string_lossy());
        if own.to_str().is_none_or(|own| own.starts_with('.')) {
            found.skipped.push(name);
            continue;
        }
        let kind = entry.file_type().map_err(failed)?;
        // Links to files are how caches are made; links to directories may lead in circles.
        if kind.is_dir() && depth < MAX_DEPTH {
            visit(&path, &format!("{name}/"), depth + 1, found)?;
        } else if !kind.is_dir() && path.is_file() {
            found.files.push((name, path));
        } else {
            found.skipped.push(name);
        }
    }
    Ok(())
}

/// A text file that the user named.
///
/// # Errors
/// As [`read_side_file`]; `Io` when there is none, `Malformed` when it is not UTF-8.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    let bytes = read_side_file(path, max_bytes)?
        .ok_or_else(|| Error::io("open", path, std::io::ErrorKind::NotFound.into()))?;
    String::from_utf8(bytes).map_err(|_| Error::malformed("is no UTF-8 text").at(path))
}

/// Longest JSON file that is kept as a whole, in bytes.
const JSON_BYTES: u64 = 32 << 20;
/// Most values in such a file; one takes up to 80 bytes.
const JSON_VALUES: usize = 1 << 20;
/// Most values in JSON of which the reader keeps what it knows: those of the largest tokenizers, and half as many.
const KNOWN_VALUES: usize = 3 << 20;

/// A JSON file beside the weights; `None` when there is none.
///
/// # Errors
/// As [`read_side_file`], `Malformed` when it is not the JSON expected, and `Limit` for too many values.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, max_bytes: u64) -> Result<Option<T>> {
    let bytes = read_side_file(path, max_bytes.min(JSON_BYTES))?;
    bytes.map(|bytes| parse(&bytes, path, JSON_VALUES)).transpose()
}

/// The JSON in `bytes`, which were read from `path`. A byte order mark is passed over.
///
/// # Errors
/// `Malformed` when it is not the JSON expected, `Limit` for too many values.
pub fn from_json<T: for<'de> Deserialize<'de>>(bytes: &[u8], path: &Path) -> Result<T> {
    parse(bytes, path, KNOWN_VALUES)
}

fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8], path: &Path, most: usize) -> Result<T> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    // Before any is made: two bytes can stand for eighty.
    if values(bytes) > most {
        return Err(Error::limit(format!("is JSON of more than the {most} values allowed")).at(path));
    }
    let failed = |e| Error::malformed(format!("is not the JSON expected: {e}")).at(path);
    serde_json::from_slice(bytes).or_else(|first| {
        let quoted = with_texts(bytes).ok_or_else(|| failed(first))?;
        serde_json::from_slice(&quoted).map_err(failed)
    })
}

/// Numbers that are none in JSON, but that Python's `json` writes and reads.
const NO_JSON: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];

/// The same JSON with these as texts, which no number is read from: most stand where nobody looks. `None` without any.
fn with_texts(json: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut copied, mut at, mut in_text) = (0, 0, false);
    while let Some(rest) = json.get(at..).filter(|rest| !rest.is_empty()) {
        let found = NO_JSON.iter().find(|word| !in_text && rest.starts_with(word));
        if let Some(word) = found {
            out.extend_from_slice(&json[copied..at]);
            out.extend([b"\"", *word, b"\""].concat());
            at += word.len();
            copied = at;
            continue;
        }
        match rest[0] {
            b'\\' if in_text => at += 1,
            b'"' => in_text = !in_text,
            _ => {}
        }
        at += 1;
    }
    (copied > 0).then(|| {
        out.extend_from_slice(&json[copied..]);
        out
    })
}

/// At least as many as JSON has values: what opens a list or an object, and what comes between their entries.
fn values(json: &[u8]) -> usize {
    let (mut n, mut in_text, mut escaped) = (1, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b',' | b'[' | b'{' if !in_text => n += 1,
            _ => {}
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_only_python_writes_are_texts() {
        let json = br#"{"limit": [0.0, Infinity, -Infinity], "a \" NaN \\": NaN, "n": 1}"#;
        let read: serde_json::Value = from_json(json, Path::new("config.json")).unwrap();
        let expected =
            serde_json::json!({"limit": [0.0, "Infinity", "-Infinity"], "a \" NaN \\": "NaN", "n": 1});
        assert_eq!(read, expected);
        for bad in ["[NaN", "[Nan]", "[+Infinity]", "[NaNNaN]", "NaN\"", "\"NaN\\"] {
            assert!(from_json::<serde_json::Value>(bad.as_bytes(), Path::new("x")).is_err(), "{bad}");
        }
        let e = from_json::<Vec<f64>>(b"[1, NaN]", Path::new("x")).unwrap_err();
        assert!(e.to_string().contains("\"NaN\""), "{e}");
    }

    #[test]
    fn values_are_counted_outside_texts() {
        for (json, n) in [("1", 1), ("[]", 2), (r#"["a,[\"{", {"b": [1, 2]}]"#, 6), (r#"["\\", 1]"#, 3)] {
            assert_eq!(values(json.as_bytes()), n, "{json}");
        }
        let many = format!("[{}0]", "0,".repeat(JSON_VALUES));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, &many).unwrap();
        let e = read_json::<serde_json::Value>(&path, u64::MAX).unwrap_err();
        assert_eq!((e.kind(), e.path()), (crate::ErrorKind::Limit, Some(path.as_path())));
        assert!(from_json::<Vec<u8>>(many.as_bytes(), &path).is_ok());
    }
}
