//! What was found, and where.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::rules::{LIMIT, MALFORMED, Rule, SHARD_MISSING, Severity};
use crate::error::{Error, ErrorKind, Place};

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Which rule.
    pub rule: &'static Rule,
    /// Its short name.
    pub name: &'static str,
    /// How much it weighs.
    pub severity: Severity,
    /// What was found, in a sentence.
    pub message: String,
    /// The file.
    pub file: PathBuf,
    /// First byte that it is about, where one can be named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Bytes that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// The tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// The metadata key, or the name of a template or a side file's field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What stands there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// What should.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// The way on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Finding {
    /// Of this rule, in this file.
    pub fn new(rule: &'static Rule, file: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self {
            rule,
            name: rule.name,
            severity: rule.severity,
            message: message.into(),
            file: file.as_ref().to_path_buf(),
            offset: None,
            length: None,
            tensor: None,
            key: None,
            found: None,
            expected: None,
            hint: None,
        }
    }

    /// What a reader objected to; `None` where it says nothing of the file: it could not be read, or is of a kind that
    /// is not known. `file` is the one that was scanned.
    pub fn of_error(error: &Error, file: &Path) -> Option<Self> {
        let at = error.path().unwrap_or(file);
        let rule = match error.kind() {
            ErrorKind::Malformed | ErrorKind::Check => &MALFORMED,
            ErrorKind::Limit => &LIMIT,
            ErrorKind::Io if is_missing(error, file) => &SHARD_MISSING,
            _ => return None,
        };
        Some(Self::quoting(rule, error, at))
    }

    /// In the words of an error; `file` is to blame where that names none.
    pub fn quoting(rule: &'static Rule, error: &Error, file: &Path) -> Self {
        let at = error.path().unwrap_or(file);
        let mut finding = Self::new(rule, at, error.message());
        let Place { offset, tensor, key } = error.place().clone();
        (finding.offset, finding.tensor, finding.key) = (offset, tensor, key);
        finding.hint = error.hint_text().map(str::to_owned);
        finding
    }

    /// At this byte.
    pub fn at(mut self, offset: impl Into<Option<u64>>) -> Self {
        self.offset = offset.into();
        self
    }

    /// About so many bytes.
    pub fn of(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }

    /// In this tensor.
    pub fn tensor(mut self, name: &str) -> Self {
        self.tensor = Some(name.into());
        self
    }

    /// About this key.
    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.into());
        self
    }

    /// What stands there, and what should.
    pub fn values(mut self, found: impl ToString, expected: impl ToString) -> Self {
        self.found = Some(found.to_string());
        self.expected = Some(expected.to_string());
        self
    }

    /// The way on.
    pub fn hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Whether another file than `file` is missing, which `file` (or a directory) refers to.
fn is_missing(error: &Error, file: &Path) -> bool {
    let source = std::error::Error::source(error).and_then(|s| s.downcast_ref::<std::io::Error>());
    source.is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
        && error.path().is_some_and(|p| p != file)
}
