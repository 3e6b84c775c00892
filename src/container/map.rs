//! Files in memory without being read: for callers that compute on stored bytes where they lie.
//!
//! All else reads at positions into buffers, since a mapped file that shrinks meanwhile ends the program, and
//! one that is written to changes under the reader's hands. Whoever maps takes that risk: map files that nobody
//! writes to. Outputs of this library appear by renaming, and are not written to afterwards.
#![allow(unsafe_code)]

use memmap2::{Mmap, MmapOptions};

use super::{Data, InputFile, Stored};
use crate::error::{Error, Result};
use crate::tensor::TensorInfo;

/// The files of a store, in memory.
#[derive(Debug)]
pub struct Mapped<'a> {
    stored: &'a Stored,
    maps: Vec<Mmap>,
}

impl<'a> Mapped<'a> {
    /// Maps all files. They must not become shorter nor be written to while this lives: see the module.
    ///
    /// # Errors
    /// `Io`; `Malformed` where a file has become shorter since it was opened.
    pub fn new(stored: &'a Stored) -> Result<Self> {
        Ok(Self { stored, maps: stored.files().iter().map(map).collect::<Result<_>>()? })
    }

    /// The bytes of a tensor as they are stored, little-endian and row-major; `None` where they are compressed, of the
    /// other byte order, or not in order. In a `.qpack` file they begin at a multiple of 64, in a GGUF file at one of
    /// its alignment.
    pub fn bytes(&self, tensor: &TensorInfo) -> Option<&[u8]> {
        let at = self.stored.place(tensor)?;
        self.maps.get(tensor.file)?.get(usize::try_from(at.start).ok()?..usize::try_from(at.end).ok()?)
    }
}

/// One file, in memory.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a file. It must not become shorter nor be written to while this lives: see the module.
    ///
    /// # Errors
    /// As [`Mapped::new`].
    pub fn new(file: &InputFile) -> Result<Self> {
        map(file).map(Self)
    }

    /// All of its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn map(file: &InputFile) -> Result<Mmap> {
    let Data::File(inner) = &file.data else {
        return Err(Error::misuse("lies in memory already").at(file.path()));
    };
    let now = inner.metadata().map_err(|e| Error::io("read", file.path(), e))?.len();
    let len =
        usize::try_from(file.len()).map_err(|_| Error::limit("is longer than memory").at(file.path()))?;
    if now < file.len() {
        return Err(Error::malformed("has become shorter since it was opened").at(file.path()));
    }
    // SAFETY: the map is read only, of a file open for reading, and not longer than that. That nobody writes to it or
    // cuts it while the map lives cannot be known here: it is what callers of `Mapped::new` and `MappedFile::new`
    // promise.
    let map = unsafe { MmapOptions::new().len(len).map(inner) };
    map.map_err(|e| Error::io("map", file.path(), e))
}
