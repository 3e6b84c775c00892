//! On-disk formats. One folder per container, each with its raw layout, a reader and a writer.
//!
//! A reader parses and validates headers only; tensor bytes are fetched by [`Store::read`], which
//! checks every range against the length the file had when it was opened. Nothing is mapped: a
//! positioned read into a bounded buffer keeps resident memory bounded, and a file that shrinks
//! meanwhile is an error instead of a signal.

mod endian;
pub mod gguf;
pub mod imatrix;
pub mod pytorch;
pub mod safetensors;
pub mod shards;
pub mod side;
mod unique;
pub mod weights;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys;
use crate::tensor::{StridedCopy, TensorInfo};

/// An opened input file. Reads go through it, never beyond the length it had at opening.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl InputFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// `Io` when it cannot be opened, `Misuse` when it is a directory.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let meta = file.metadata().map_err(|e| Error::io("read", &path, e))?;
        if meta.is_dir() {
            return Err(Error::misuse("is a directory, a file was expected").at(&path));
        }
        Ok(Self { path, file, len: meta.len() })
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
        sys::read_exact_at(&self.file, buf, offset).map_err(|e| Error::io("read", &self.path, e))
    }
}

/// The tensors of a checkpoint, over one or many files, in the order of the source.
#[derive(Debug, Default)]
pub struct Store {
    files: Vec<InputFile>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    big_endian: bool,
    /// Tensors whose elements do not lie in order: how they do, from the tensor's offset on.
    strided: HashMap<String, StridedCopy>,
}

impl Store {
    /// Joins files and the tensors within them.
    ///
    /// # Errors
    /// `Malformed` when a name appears twice, or a tensor's bytes leave its file.
    pub fn new(files: Vec<InputFile>, tensors: Vec<TensorInfo>) -> Result<Self> {
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            let file = files
                .get(t.file)
                .ok_or_else(|| Error::malformed(format!("tensor {:?} has no file", t.name)))?;
            if t.offset.checked_add(t.nbytes).is_none_or(|end| end > file.len()) {
                return Err(Error::malformed(format!(
                    "tensor {:?} takes {} bytes at offset {}, the file has {}",
                    t.name,
                    t.nbytes,
                    t.offset,
                    file.len()
                ))
                .at(file.path())
                .hint("the file is cut short: fetch it again"));
            }
            if by_name.insert(t.name.clone(), i).is_some() {
                return Err(Error::malformed(format!("tensor {:?} appears twice", t.name)).at(file.path()));
            }
        }
        Ok(Self { files, tensors, by_name, big_endian: false, strided: HashMap::new() })
    }

    /// Declares the data big-endian: [`Self::read`] then turns every element round.
    pub(crate) fn into_big_endian(self) -> Self {
        Self { big_endian: true, ..self }
    }

    /// Declares how the elements of some tensors lie, by name: [`Self::read`] then brings them into
    /// row-major order. No copy may reach beyond its file.
    pub(crate) fn with_strided(self, strided: HashMap<String, StridedCopy>) -> Self {
        Self { strided, ..self }
    }

    /// Whether the tensor's elements lie apart in the file, so that small reads of it are slow.
    pub fn is_strided(&self, tensor: &TensorInfo) -> bool {
        self.strided.contains_key(&tensor.name)
    }

    /// All files.
    pub fn files(&self) -> &[InputFile] {
        &self.files
    }

    /// All tensors, in source order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Fills `buf` from byte `offset` of the tensor's data; the data is little-endian and row-major
    /// whatever the file's order.
    ///
    /// # Errors
    /// `Malformed` when the range leaves the tensor, `Io` when the read fails. For a big-endian
    /// file also `Unsupported` when the block type has no defined big-endian layout, and for it and
    /// strided tensors `Misuse` when the range is not whole blocks.
    pub fn read(&self, tensor: &TensorInfo, offset: u64, buf: &mut [u8]) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > tensor.nbytes) {
            return Err(Error::malformed(format!(
                "{} bytes at {offset} lie beyond tensor {:?} of {} bytes",
                buf.len(),
                tensor.name,
                tensor.nbytes
            )));
        }
        let file = self.files.get(tensor.file);
        let at = tensor.offset.checked_add(offset);
        let (Some(file), Some(at)) = (file, at) else {
            return Err(Error::misuse(format!("tensor {:?} is not of this store", tensor.name)));
        };
        let size = tensor.dtype.type_size();
        let copy = self.strided.get(&tensor.name);
        if (self.big_endian || copy.is_some())
            && !(offset.is_multiple_of(size) && (buf.len() as u64).is_multiple_of(size))
        {
            return Err(Error::misuse(format!("a range within a block of {}", tensor.dtype)));
        }
        match copy {
            None => file.read_at(at, buf)?,
            Some(copy) => {
                let (start, mut scratch) = (offset / size, Vec::new());
                for part in copy.clip(start, start + buf.len() as u64 / size) {
                    let mut fetch = |unit: u64, buf: &mut [u8]| {
                        let at = unit.checked_mul(size).and_then(|n| n.checked_add(tensor.offset));
                        file.read_at(at.unwrap_or(u64::MAX), buf)
                    };
                    part.gather(start, size, buf, &mut scratch, &mut fetch)?;
                }
            }
        }
        if self.big_endian {
            endian::swap(tensor.dtype, buf)
                .map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)))?;
        }
        Ok(())
    }

    /// All bytes of a small tensor.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all(&self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        // `nbytes` lies within the file, so this allocates no more than the file's length.
        let mut buf = vec![0; tensor.nbytes as usize];
        self.read(tensor, 0, &mut buf)?;
        Ok(buf)
    }
}
