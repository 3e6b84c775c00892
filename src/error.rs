//! The one error type of the library.
//!
//! An error says what kind of thing went wrong, in which file, what was found and what was
//! expected, and, where there is one, the way on. The command line prints it as
//!
//! ```text
//! error: model.safetensors: tensor "lm_head.weight" ends at byte 900, the file has 800
//!   hint: the download is incomplete; fetch the file again
//! ```

use std::fmt;
use std::path::{Path, PathBuf};

use crate::plain;

/// Longest message that is shown, in bytes.
const LONGEST: usize = 4000;

/// Shorthand for results of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of thing went wrong. Tests assert on it; the message is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The operating system refused: no such file, disk full, permission.
    Io,
    /// The file contradicts its own format.
    Malformed,
    /// The file is fine, but holds something that qconv does not know or cannot express.
    Unsupported,
    /// A limit of [`crate::limits::Limits`] was reached.
    Limit,
    /// The caller asked for something contradictory or impossible.
    Misuse,
    /// A check of what was written failed.
    Check,
    /// Ctrl-C, or a termination signal.
    Interrupted,
}

/// Where in a file something is wrong, as far as that can be named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The byte of the file where it begins, or what says it.
    pub offset: Option<u64>,
    /// The tensor.
    pub tensor: Option<String>,
    /// The metadata key.
    pub key: Option<String>,
}

/// An error with its kind, its file, its place in it, and a hint.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    place: Place,
    hint: Option<String>,
    source: Option<std::io::Error>,
}

impl Error {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(Box::new(Inner { kind, message, path: None, place: Place::default(), hint: None, source: None }))
    }

    /// The file contradicts its own format.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Malformed, message)
    }

    /// The file holds something qconv does not know or cannot express.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// A limit was reached.
    pub fn limit(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Limit, message)
    }

    /// The caller asked for something contradictory or impossible.
    pub fn misuse(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Misuse, message)
    }

    /// A check of what was written failed.
    pub fn check(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Check, message)
    }

    /// The user or the system asked to stop.
    pub fn interrupted() -> Self {
        Self::new(ErrorKind::Interrupted, "interrupted")
    }

    /// An operating-system error while doing `action` ("read", "create", ...) on `path`.
    pub fn io(action: &str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, format!("cannot {action}"));
        error.0.path = Some(path.as_ref().to_path_buf());
        error.0.source = Some(source);
        error
    }

    /// Names the file; a name given earlier (closer to the fault) is kept.
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the byte of the file; one given earlier is kept, and so it is with what follows.
    pub fn offset(mut self, offset: u64) -> Self {
        self.0.place.offset.get_or_insert(offset);
        self
    }

    /// Names the tensor. The message says it as well, where it is to be read.
    pub fn tensor(mut self, name: &str) -> Self {
        self.0.place.tensor.get_or_insert_with(|| name.into());
        self
    }

    /// Names the metadata key, as [`Self::tensor`] does.
    pub fn key(mut self, key: &str) -> Self {
        self.0.place.key.get_or_insert_with(|| key.into());
        self
    }

    /// Names what lies below `from` as what lies below `to`: of files that were put elsewhere for a while.
    pub fn moved(mut self, from: &Path, to: &Path) -> Self {
        if let Some(path) = &mut self.0.path
            && let Ok(inside) = path.strip_prefix(from)
        {
            *path = if inside.as_os_str().is_empty() { to.to_path_buf() } else { to.join(inside) };
        }
        self
    }

    /// Says what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Puts `what` before the message: `tensor "x": ...`.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The hint, if there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The file, if one is to blame.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Where in the file.
    pub fn place(&self) -> &Place {
        &self.0.place
    }

    /// What is wrong, without file and byte.
    pub fn message(&self) -> String {
        // Names and shapes come from files, and may be long and steer a terminal.
        let message = plain::shortened(&self.0.message, LONGEST);
        let message = plain::lines(&message);
        match &self.0.source {
            Some(source) => format!("{message}: {source}"),
            None => message.to_string(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.0.path {
            write!(f, "{}: ", plain::line(&path.display().to_string()))?;
        }
        f.write_str(&self.message())?;
        match self.0.place.offset {
            Some(offset) if !says(&self.0.message, offset) => write!(f, " (byte {offset})"),
            _ => Ok(()),
        }
    }
}

/// Whether a message names the byte itself, where it belongs.
fn says(message: &str, offset: u64) -> bool {
    let name = format!("byte {offset}");
    message
        .match_indices(&name)
        .any(|(at, _)| !message[at + name.len()..].starts_with(|c: char| c.is_ascii_digit()))
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}
