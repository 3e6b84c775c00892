//! Opens files, directories and indexes.

use std::path::Path;

use indexmap::IndexMap;

use super::header::Header;
use crate::container::Store;
use crate::container::shards::{Located, Naming};
use crate::error::Result;
use crate::limits::Limits;

/// How the files are called.
pub const NAMING: Naming = Naming { format: "safetensors", stem: "model", suffix: "safetensors" };

/// An opened checkpoint.
#[derive(Debug)]
pub struct SafeTensors {
    /// All tensors: files by name, and within a file tensors by name, which is the order in which
    /// Python's library lists them.
    pub store: Store,
    /// `__metadata__` of each file.
    pub metadata: Vec<IndexMap<String, String>>,
}

/// Opens a file, an index, or a directory that holds either.
///
/// # Errors
/// `Io` when something cannot be read, `Unsupported` when a directory holds no weights,
/// `Malformed` as `formats/spec/safetensors.md` lists.
pub fn open(path: &Path, limits: &Limits) -> Result<SafeTensors> {
    open_located(&NAMING.locate(path, limits)?, limits)
}

/// Opens the files that were found.
///
/// # Errors
/// As [`open`].
pub fn open_located(located: &Located, limits: &Limits) -> Result<SafeTensors> {
    let read = |file: &_, number| Header::read(file, number, limits).map(|h| (h.tensors, h.metadata));
    let (store, metadata) = located.open(limits, read)?;
    Ok(SafeTensors { store, metadata })
}
