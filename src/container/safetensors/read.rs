//! Opens files, directories and indexes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Deserialize;

use super::header::{Header, Unique};
use crate::container::{InputFile, Store};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// The index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";

/// An opened checkpoint.
#[derive(Debug)]
pub struct SafeTensors {
    /// All tensors: files by name, and within a file tensors by name, which is the order in which
    /// Python's library lists them.
    pub store: Store,
    /// `__metadata__` of each file.
    pub metadata: Vec<IndexMap<String, String>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// Opens a file, an index, or a directory that holds either.
///
/// # Errors
/// `Io` when something cannot be read, `Unsupported` when a directory holds no weights,
/// `Malformed` as `formats/spec/safetensors.md` lists.
pub fn open(path: &Path, limits: &Limits) -> Result<SafeTensors> {
    let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if meta.is_dir() {
        return open_directory(path, limits);
    }
    match path.file_name().and_then(|n| n.to_str()) {
        Some(name) if name.ends_with(".index.json") => open_index(path, limits),
        // Any file of a model stands for the model.
        Some(name) if is_shard(name) || name == "config.json" => open_directory(
            path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")),
            limits,
        ),
        _ => open_files(&[path.to_path_buf()], limits),
    }
}

fn open_directory(dir: &Path, limits: &Limits) -> Result<SafeTensors> {
    let index = dir.join(INDEX_FILE);
    if index.is_file() {
        return open_index(&index, limits);
    }
    let single = dir.join(SINGLE_FILE);
    if single.is_file() {
        return open_files(&[single], limits);
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let entry = entry.map_err(|e| Error::io("read", dir, e))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    let shards: Vec<&String> = names.iter().filter(|n| is_shard(n)).collect();
    let Some(last) = shards.last() else {
        let other = names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pth") || n.ends_with(".pt"));
        let error = Error::unsupported("holds no safetensors weights").at(dir);
        return Err(if other {
            error.hint("PyTorch files cannot be read yet: save the model with safe_serialization=True")
        } else {
            error.hint(format!("{SINGLE_FILE} or {INDEX_FILE} was expected"))
        });
    };
    // Without an index the numbers tell whether all are there.
    let count: usize =
        last.rsplit_once("-of-").and_then(|(_, c)| c.strip_suffix(".safetensors")?.parse().ok()).unwrap_or(0);
    if count != shards.len() {
        return Err(Error::malformed(format!(
            "{} of {count} shards are there, and no {INDEX_FILE}",
            shards.len()
        ))
        .at(dir)
        .hint("a shard is missing: fetch it again"));
    }
    open_files(&shards.iter().map(|n| dir.join(n)).collect::<Vec<_>>(), limits)
}

/// `model-00001-of-00002.safetensors`
fn is_shard(name: &str) -> bool {
    let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    name.strip_suffix(".safetensors")
        .and_then(|n| n.rsplit_once("-of-"))
        .and_then(|(rest, count)| Some((rest.rsplit_once('-')?.1, count)))
        .is_some_and(|(no, count)| number(no) && number(count))
}

fn open_index(path: &Path, limits: &Limits) -> Result<SafeTensors> {
    let at = |e: Error| e.at(path);
    let len = fs::metadata(path).map_err(|e| Error::io("open", path, e))?.len();
    if len > limits.side_file_bytes {
        return Err(at(Error::limit(format!(
            "has {len} bytes, at most {} are allowed",
            limits.side_file_bytes
        ))));
    }
    let text = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|e| at(Error::malformed(format!("is no valid index: {e}"))))?;
    let map = index.weight_map.0;
    if map.len() as u64 > limits.tensors {
        return Err(at(Error::limit(format!(
            "{} tensors, at most {} are allowed",
            map.len(),
            limits.tensors
        ))));
    }
    let names: BTreeSet<&String> = map.values().collect();
    if names.len() as u64 > limits.shards {
        return Err(at(Error::limit(format!(
            "{} shards, at most {} are allowed",
            names.len(),
            limits.shards
        ))));
    }
    let dir = path.parent().unwrap_or(Path::new(""));
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let plain =
            !name.is_empty() && !name.contains(['/', '\\', '\0', ':']) && *name != "." && *name != "..";
        if !plain {
            return Err(at(Error::malformed(format!("shard {name:?} is no plain file name"))));
        }
        let file = dir.join(name);
        if !file.is_file() {
            return Err(Error::io("open", &file, std::io::ErrorKind::NotFound.into())
                .hint(format!("{INDEX_FILE} names this shard: fetch it")));
        }
        files.push(file);
    }
    let opened = open_files(&files, limits)?;
    let mut of_file: HashMap<&str, usize> = HashMap::new();
    for (i, name) in names.iter().enumerate() {
        of_file.insert(name.as_str(), i);
    }
    for (tensor, shard) in &map {
        let found = opened.store.get(tensor).map(|t| t.file);
        if found != of_file.get(shard.as_str()).copied() {
            return Err(at(Error::malformed(format!(
                "tensor {tensor:?} is not in {shard}, where the index has it"
            ))));
        }
    }
    if let Some(extra) = opened.store.tensors().iter().find(|t| !map.contains_key(&t.name)) {
        return Err(at(Error::malformed(format!(
            "tensor {:?} is in a shard, but not in the index",
            extra.name
        ))));
    }
    Ok(opened)
}

fn open_files(paths: &[PathBuf], limits: &Limits) -> Result<SafeTensors> {
    let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), Vec::new());
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (i, path) in paths.iter().enumerate() {
        let file = InputFile::open(path)?;
        let header = Header::read(&file, i, limits)?;
        for t in &header.tensors {
            if let Some(other) = seen.insert(t.name.clone(), i) {
                let other = paths.get(other).map(|p| p.display().to_string()).unwrap_or_default();
                return Err(Error::malformed(format!("tensor {:?} is in {other} too", t.name)).at(path));
            }
        }
        tensors.extend(header.tensors);
        metadata.push(header.metadata);
        files.push(file);
    }
    if tensors.len() as u64 > limits.tensors {
        return Err(Error::limit(format!(
            "{} tensors, at most {} are allowed",
            tensors.len(),
            limits.tensors
        )));
    }
    Ok(SafeTensors { store: Store::new(files, tensors)?, metadata })
}
