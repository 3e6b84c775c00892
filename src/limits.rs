//! What a file may demand of us before we refuse it.

use std::sync::RwLock;

use crate::error::Error;

/// Bounds on numbers that come from files. All are checked before anything is allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest JSON or GGUF header, in bytes.
    pub header_bytes: u64,
    /// Longest single string in a header, in bytes.
    pub string_bytes: u64,
    /// Most tensors in a file, and in a checkpoint of many files.
    pub tensors: u64,
    /// Most metadata entries in a GGUF file.
    pub metadata_entries: u64,
    /// Deepest nesting of GGUF arrays.
    pub array_depth: u32,
    /// Most shards of one checkpoint.
    pub shards: u64,
    /// Largest config or tokenizer file, in bytes.
    pub side_file_bytes: u64,
    /// Most bytes of values and states that the executor of Core ML programs holds at a time.
    pub executor_bytes: u64,
}

/// What [`Limits::default`] gives, where a program has said so.
static OF_PROCESS: RwLock<Option<Limits>> = RwLock::new(None);

impl Limits {
    /// The limits where nobody says otherwise.
    pub const STANDARD: Self = Self {
        header_bytes: 1 << 30,
        string_bytes: 64 << 20,
        tensors: 1 << 20,
        metadata_entries: 1 << 16,
        array_depth: 2,
        shards: 1 << 16,
        side_file_bytes: 128 << 20,
        executor_bytes: 4 << 30,
    };

    /// From now on, [`Limits::default`] gives these to all of this process: for programs whose user sets limits
    /// once, for every file that they open on the way.
    pub fn set_default(limits: Self) {
        *OF_PROCESS.write().unwrap_or_else(|e| e.into_inner()) = Some(limits);
    }
}

impl Default for Limits {
    /// [`Self::STANDARD`], or what [`Self::set_default`] was given.
    fn default() -> Self {
        OF_PROCESS.read().unwrap_or_else(|e| e.into_inner()).clone().unwrap_or(Self::STANDARD)
    }
}

/// A field of [`Limits`], for those who run into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// [`Limits::header_bytes`].
    Header,
    /// [`Limits::string_bytes`].
    String,
    /// [`Limits::tensors`].
    Tensors,
    /// [`Limits::metadata_entries`].
    Metadata,
    /// [`Limits::array_depth`].
    Depth,
    /// [`Limits::shards`].
    Shards,
    /// [`Limits::side_file_bytes`].
    SideFile,
    /// [`Limits::executor_bytes`].
    Executor,
}

impl Bound {
    /// The option of the command line that moves it, without the dashes.
    pub const fn option(self) -> &'static str {
        match self {
            Self::Header => "max-header",
            Self::String => "max-string",
            Self::Tensors => "max-tensors",
            Self::Metadata => "max-metadata",
            Self::Depth => "max-depth",
            Self::Shards => "max-shards",
            Self::SideFile => "max-side-file",
            Self::Executor => "max-executor",
        }
    }

    /// The error of a file that wants more; its hint names the option.
    pub fn reached(self, message: impl Into<String>) -> Error {
        Error::limit(message)
            .hint(format!("if the file is what it should be, --{} allows for more", self.option()))
    }
}
