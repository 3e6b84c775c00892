//! The files beside the weights, byte for byte.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::container::qpack::{HEADERS, is_path};
use crate::container::side::{Below, files_below, is_weights, read_side_file};
use crate::container::{InputFile, safetensors};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};

/// What lies beside weights.
pub struct Beside {
    /// Paths relative to the directory, and bytes.
    pub files: Vec<(String, Vec<u8>)>,
    /// What was left out.
    pub notes: Vec<String>,
}

/// All files of a directory but for weights, those in it too. Of the safetensors files that are packed (`own`) the
/// headers are kept, that they may become the same files again. Of more bytes than are read again the largest files
/// are left out: what a model needs is small.
///
/// # Errors
/// `Io`; `Limit` for more files than there may be.
pub fn beside(dir: &Path, own: &[PathBuf], format: &str, limits: &Limits) -> Result<Beside> {
    let mut found = Beside { files: Vec::new(), notes: Vec::new() };
    let is_safetensors = format == safetensors::NAMING.format;
    // The same file may be called in several ways.
    let own: Vec<PathBuf> = own.iter().filter_map(|path| path.canonicalize().ok()).collect();
    let Below { files, skipped: mut left } = files_below(dir)?;
    let (mut taken, mut names) = (Vec::new(), HashSet::new());
    for (name, path) in files {
        let is_index = name.ends_with(".index.json");
        if path.canonicalize().is_ok_and(|path| own.contains(&path)) {
            if is_safetensors && name.ends_with(".safetensors") && !name.contains('/') {
                taken.push((header_bytes(&path, limits)?, format!("{HEADERS}{name}"), path));
            }
            continue;
        }
        let is_of_others = is_index && !(is_safetensors && name.ends_with(".safetensors.index.json"));
        if is_of_others || is_weights(&name) || !is_path(&name) || !names.insert(name.to_ascii_lowercase()) {
            left.push(name);
            continue;
        }
        let len = path.metadata().map_err(|e| Error::io("read", &path, e))?.len();
        taken.push((len, name, path));
        if taken.len() as u64 > limits.tensors {
            return Err(Bound::Tensors.reached(format!("holds more than {} files", limits.tensors)).at(dir));
        }
    }
    taken.sort();
    let mut room = limits.side_file_bytes;
    for (len, name, path) in taken {
        if len > room {
            left.push(name);
            continue;
        }
        let bytes = match name.starts_with(HEADERS) {
            true => Some(beginning(&path, len)?),
            false => read_side_file(&path, room)?,
        };
        if let Some(bytes) = bytes {
            room = room.saturating_sub(bytes.len() as u64);
            found.files.push((name, bytes));
        }
    }
    left.sort();
    if !left.is_empty() {
        let shown = left[..left.len().min(4)].join(", ");
        let more = if left.len() > 4 { ", ..." } else { "" };
        found.notes.push(format!("{} files are left out: {shown}{more}", left.len()));
    }
    Ok(found)
}

/// The beginnings of safetensors files, as `.qpack` keeps them.
///
/// # Errors
/// `Io`; `Malformed`.
pub fn headers(own: &[PathBuf], format: &str, limits: &Limits) -> Result<Vec<(String, Vec<u8>)>> {
    let own = own.iter().filter(|_| format == safetensors::NAMING.format);
    let named = own.filter_map(|path| Some((path, path.file_name()?.to_str()?)));
    let named = named.filter(|(_, name)| name.ends_with(".safetensors"));
    let header = |path| beginning(path, header_bytes(path, limits)?);
    named.map(|(path, name)| Ok((format!("{HEADERS}{name}"), header(path)?))).collect()
}

/// Bytes of the length and the text before the data.
fn header_bytes(path: &Path, limits: &Limits) -> Result<u64> {
    let file = InputFile::open(path)?;
    let mut len = [0; 8];
    file.read_at(0, &mut len)?;
    let n = u64::from_le_bytes(len).checked_add(8).filter(|n| *n <= file.len() && *n <= limits.header_bytes);
    n.ok_or_else(|| Error::malformed("its header leaves the file").at(path))
}

fn beginning(path: &Path, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    InputFile::open(path)?.read_at(0, &mut bytes)?;
    Ok(bytes)
}
