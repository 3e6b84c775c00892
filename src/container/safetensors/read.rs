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
const INDEX_FILE: &str = "model.safetensors.index.json";
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
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    // Any file of a model stands for the model.
    if name == "config.json" {
        return open_directory(dir, limits);
    }
    if begins_json(path)? {
        return open_index(path, limits);
    }
    let Some(set) = ShardSet::of(name) else { return open_files(&[path.to_path_buf()], limits) };
    let index = dir.join(format!("{}.safetensors.index.json", set.prefix));
    if index.is_file() { open_index(&index, limits) } else { open_files(&set.paths(dir, limits)?, limits) }
}

/// Whether a file begins as JSON does. A safetensors file whose header has 123 bytes begins with
/// `{` as well, but the upper bytes of that length are zeros.
fn begins_json(path: &Path) -> Result<bool> {
    let file = InputFile::open(path)?;
    let mut start = [0; 8];
    let start = start.get_mut(..file.len().min(8) as usize).unwrap_or_default();
    file.read_at(0, start)?;
    Ok(start.first() == Some(&b'{') && !start.contains(&0))
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
    let mut sets: Vec<ShardSet> = names.iter().filter_map(|n| ShardSet::of(n)).collect();
    sets.dedup();
    if sets.iter().any(|s| s.prefix == "model") {
        // The same weights may lie beside it under another name, such as `consolidated`.
        sets.retain(|s| s.prefix == "model");
    }
    match sets.as_slice() {
        [set] => open_files(&set.paths(dir, limits)?, limits),
        [] => {
            let other =
                names.iter().any(|n| n.ends_with(".bin") || n.ends_with(".pth") || n.ends_with(".pt"));
            let error = Error::unsupported("holds no safetensors weights").at(dir);
            Err(if other {
                error.hint("PyTorch files cannot be read yet: save the model with safe_serialization=True")
            } else {
                error.hint(format!("{SINGLE_FILE} or {INDEX_FILE} was expected"))
            })
        }
        _ => Err(Error::malformed(format!("holds shards of several sets, and no {INDEX_FILE}"))
            .at(dir)
            .hint("give a shard of the one that is meant")),
    }
}

/// The files `PREFIX-00001-of-0000N.safetensors`, whose numbers tell which must be there.
#[derive(PartialEq, Eq)]
struct ShardSet {
    prefix: String,
    count: u64,
}

impl ShardSet {
    /// The set that a file of this name belongs to.
    fn of(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let number = |s: &str| -> Option<u64> {
            (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten()
        };
        let (no, count) = (number(no)?, number(count)?);
        (1..=count).contains(&no).then(|| Self { prefix: prefix.into(), count })
    }

    fn paths(&self, dir: &Path, limits: &Limits) -> Result<Vec<PathBuf>> {
        let Self { prefix, count } = self;
        if *count > limits.shards {
            return Err(
                Error::limit(format!("{count} shards, at most {} are allowed", limits.shards)).at(dir)
            );
        }
        let path = |no| dir.join(format!("{prefix}-{no:05}-of-{count:05}.safetensors"));
        let paths: Vec<PathBuf> = (1..=*count).map(path).collect();
        match paths.iter().find(|p| !p.is_file()) {
            None => Ok(paths),
            Some(missing) => Err(Error::io("open", missing, std::io::ErrorKind::NotFound.into())
                .hint("a shard is missing: fetch it")),
        }
    }
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
