//! The files of a model beside its weights.

use std::fs;
use std::path::{Path, PathBuf};

use crate::container::qpack::{Qpack, sum_of_file};
use crate::container::side::{files_below, is_weights};
use crate::container::{InputFile, Store};
use crate::error::{Error, Result};

/// A file beside the weights.
#[derive(Clone, Debug)]
pub struct SideFile {
    /// Its path relative to the model's directory, with `/`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Path(PathBuf),
    /// In a `.qpack` file, whose manifest has the sum.
    Summed([u8; 32]),
}

impl SideFile {
    /// SHA-256 of its bytes; in a `.qpack` file, as the manifest has it.
    ///
    /// # Errors
    /// `Io`.
    pub fn sha256(&self) -> Result<[u8; 32]> {
        match &self.place {
            Place::Summed(sum) => Ok(*sum),
            Place::Path(path) => sum_of_file(&InputFile::open(path)?),
        }
    }
}

pub(super) fn of_qpack(file: &Qpack) -> Vec<SideFile> {
    let files = file.files().iter().map(|f| SideFile {
        name: f.name.clone(),
        bytes: f.segment.content_bytes(),
        place: Place::Summed(f.segment.compression.as_ref().map_or(f.segment.sha256, |c| c.sha256)),
    });
    files.collect()
}

/// All files in a directory, and those in it, but for hidden ones and weights.
///
/// # Errors
/// `Io`.
pub(super) fn of_directory(dir: &Path, store: &Store) -> Result<Vec<SideFile>> {
    let mut found = Vec::new();
    for (name, path) in files_below(dir)?.files {
        let is_own = store.files().iter().any(|f| f.path() == path);
        if is_own || is_weights(&name) || name.ends_with(".index.json") || name.ends_with(".lock") {
            continue;
        }
        let meta = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?;
        found.push(SideFile { name, bytes: meta.len(), place: Place::Path(path) });
    }
    Ok(found)
}
