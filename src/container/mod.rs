//! On-disk formats. One folder per container, each with its raw layout, a reader and a writer.
//!
//! A reader parses and validates headers only; tensor bytes are fetched by [`Store::read`], which
//! checks every range against the length the file had when it was opened. Nothing is mapped, but where a
//! caller asks for it ([`map`]): a positioned read into a bounded buffer keeps resident memory bounded, and a
//! file that shrinks meanwhile is an error instead of a signal.

pub mod coreml;
mod endian;
pub mod gguf;
pub mod grouped;
pub mod imatrix;
mod low_rank;
pub mod map;
pub mod moments;
pub mod pytorch;
pub mod qpack;
pub mod safetensors;
pub mod shards;
pub mod side;
mod store;
pub(crate) mod unique;
pub mod weights;

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};

pub use low_rank::{Factor, LowRank};
pub use store::{Joined, Packing, Store, Stored, View};

use crate::error::{Error, Result};
use crate::sys;

/// Opens an input file, and gives its length in bytes. Every input is opened here: a named pipe would be waited for
/// without end, a device has no length and may do something when it is opened, so neither is.
///
/// # Errors
/// `Io` when it cannot be opened; `Misuse` for a directory, and for whatever else is no regular file.
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    let sound = |meta: &Metadata| match meta.is_file() {
        true => Ok(()),
        false if meta.is_dir() => Err(Error::misuse("is a directory, a file was expected").at(path)),
        false => Err(Error::misuse("is a pipe, a socket or a device, a file was expected")
            .at(path)
            .hint("write what comes from it to a file first")),
    };
    // Before it is opened, as that may already block; and again, of what was opened.
    sound(&std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?)?;
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let meta = file.metadata().map_err(|e| Error::io("read", path, e))?;
    sound(&meta)?;
    Ok((file, meta.len()))
}

/// An opened input file. Reads go through it, never beyond the length it had at opening.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    data: Data,
    len: u64,
}

#[derive(Debug)]
enum Data {
    File(File),
    Bytes(Vec<u8>),
}

impl InputFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// As [`open_regular`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let (file, len) = open_regular(&path)?;
        Ok(Self { path, data: Data::File(file), len })
    }

    /// A file that is a part of another, and was read from there. `path` is what errors call it.
    pub fn of_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        Self { path: path.into(), len: bytes.len() as u64, data: Data::Bytes(bytes) }
    }

    /// The bytes of a file that is a part of another; `None` of one that was opened.
    pub fn bytes(&self) -> Option<&[u8]> {
        match &self.data {
            Data::File(_) => None,
            Data::Bytes(bytes) => Some(bytes),
        }
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length at opening, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it was empty at opening.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `Malformed` when the range leaves the file, `Io` when the read fails or the file shrank.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(Error::malformed(format!(
                "{} bytes at offset {offset} lie beyond the file's {} bytes",
                buf.len(),
                self.len
            ))
            .at(&self.path));
        }
        match &self.data {
            Data::File(file) => {
                sys::read_exact_at(file, buf, offset).map_err(|e| Error::io("read", &self.path, e))
            }
            Data::Bytes(bytes) => {
                buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]); // within, as was checked
                Ok(())
            }
        }
    }
}
