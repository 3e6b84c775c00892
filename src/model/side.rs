//! The files of a model beside its weights.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::container::qpack::Qpack;
use crate::container::{InputFile, Store};
use crate::error::{Error, Result};

/// Directories within each other.
const MAX_DEPTH: u32 = 4;
/// Endings of files that are weights, perhaps of another format, or list them.
const WEIGHTS: [&str; 11] =
    ["safetensors", "bin", "pt", "pth", "gguf", "qpack", "h5", "msgpack", "onnx", "index.json", "lock"];
/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;

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
        let path = match &self.place {
            Place::Summed(sum) => return Ok(*sum),
            Place::Path(path) => path,
        };
        let file = InputFile::open(path)?;
        let (mut hasher, mut buffer) = (Sha256::new(), vec![0; BUFFER]);
        let mut at = 0;
        while at < file.len() {
            let n = (file.len() - at).min(BUFFER as u64) as usize;
            file.read_at(at, &mut buffer[..n])?;
            hasher.update(&buffer[..n]);
            at += n as u64;
        }
        Ok(hasher.finalize().into())
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
    visit(dir, "", 0, store, &mut found)?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn visit(dir: &Path, prefix: &str, depth: u32, store: &Store, found: &mut Vec<SideFile>) -> Result<()> {
    let failed = |e| Error::io("read", dir, e);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.') {
            continue;
        }
        let meta = fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?;
        let name = format!("{prefix}{name}");
        if meta.is_dir() {
            if depth < MAX_DEPTH {
                visit(&path, &format!("{name}/"), depth + 1, store, found)?;
            }
        } else if meta.is_file()
            && !WEIGHTS.iter().any(|end| name.ends_with(&format!(".{end}")))
            && !store.files().iter().any(|f| f.path() == path)
        {
            found.push(SideFile { name, bytes: meta.len(), place: Place::Path(path) });
        }
    }
    Ok(())
}
