//! Which files make up a checkpoint: one file, the shards that an index names, or a numbered set;
//! and which files one that is to be written gets. safetensors and PyTorch checkpoints differ in
//! the names only.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, json};

use super::side::{from_json, read_side_file};

use super::coreml::blob::Records;
use super::pytorch::write::Checksums;
use super::qpack::ShardSeal;
use super::qpack::write::{ReadAt, Seal, Seen, WriteAt};
use super::unique::Unique;
use super::{InputFile, Store};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};
use crate::tensor::{DType, TensorInfo};

/// How a format calls its files: `STEM.SUFFIX`, `STEM.SUFFIX.index.json`,
/// `STEM-00001-of-0000N.SUFFIX`.
#[derive(Debug)]
pub struct Naming {
    /// Name of the format in messages.
    pub format: &'static str,
    /// First part of its usual names.
    pub stem: &'static str,
    /// Last part of its names, without the dot.
    pub suffix: &'static str,
}

/// The files of one checkpoint.
#[derive(Debug)]
pub struct Located {
    /// In the order in which they are opened: that of their names.
    pub files: Vec<PathBuf>,
    index: Option<Index>,
}

#[derive(Debug)]
struct Index {
    path: PathBuf,
    /// Tensor to file name.
    map: IndexMap<String, String>,
}

impl Naming {
    fn single(&self) -> String {
        format!("{}.{}", self.stem, self.suffix)
    }

    fn index(&self) -> String {
        format!("{}.{}.index.json", self.stem, self.suffix)
    }

    /// The checkpoint in `dir`; `None` when there is none of this format.
    ///
    /// # Errors
    /// As [`Located::of_index`]; `Io` for a missing shard, `Malformed` for shards of several sets.
    pub fn in_directory(&self, dir: &Path, limits: &Limits) -> Result<Option<Located>> {
        let index = dir.join(self.index());
        if index.is_file() {
            return Located::of_index(&index, limits).map(Some);
        }
        let single = dir.join(self.single());
        if single.is_file() {
            return Ok(Some(Located { files: vec![single], index: None }));
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
            let entry = entry.map_err(|e| Error::io("read", dir, e))?;
            if let Ok(name) = entry.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        let mut sets: Vec<ShardSet> = names.iter().filter_map(|n| ShardSet::of(n, self.suffix)).collect();
        sets.dedup();
        if sets.iter().any(|s| s.stem == self.stem) {
            // The same weights may lie beside it under another name, such as `consolidated`.
            sets.retain(|s| s.stem == self.stem);
        }
        match sets.as_slice() {
            [set] => Ok(Some(Located { files: set.paths(dir, limits)?, index: None })),
            [] => Ok(None),
            _ => Err(Error::malformed(format!("holds shards of several sets, and no {}", self.index()))
                .at(dir)
                .hint("give a shard of the one that is meant")),
        }
    }

    /// The checkpoint that the file at `path` belongs to: itself, or all shards of its set.
    ///
    /// # Errors
    /// As [`Self::in_directory`].
    pub fn of_file(&self, path: &Path, limits: &Limits) -> Result<Located> {
        let dir = directory_of(path);
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(set) = ShardSet::of(name, self.suffix) else {
            return Ok(Located { files: vec![path.to_path_buf()], index: None });
        };
        let index = dir.join(format!("{}.{}.index.json", set.stem, self.suffix));
        if index.is_file() {
            return Located::of_index(&index, limits);
        }
        Ok(Located { files: set.paths(dir, limits)?, index: None })
    }

    /// What `path` means: a directory or its config.json, an index under any name, a file.
    ///
    /// # Errors
    /// As [`Self::in_directory`]; `Unsupported` when a directory holds nothing of this format.
    pub fn locate(&self, path: &Path, limits: &Limits) -> Result<Located> {
        match Given::of(path)? {
            Given::Directory(dir) => self.in_directory(dir, limits)?.ok_or_else(|| {
                Error::unsupported(format!("holds no {} weights", self.format)).at(dir).hint(format!(
                    "{} or {} was expected",
                    self.single(),
                    self.index()
                ))
            }),
            Given::Index => Located::of_index(path, limits),
            Given::File => self.of_file(path, limits),
        }
    }
}

/// What a path stands for.
pub enum Given<'a> {
    /// A directory, itself or by its config.json.
    Directory(&'a Path),
    /// JSON: an index, whatever its name.
    Index,
    /// Anything else.
    File,
}

impl<'a> Given<'a> {
    /// # Errors
    /// `Io` when there is no such path, or it cannot be read.
    pub fn of(path: &'a Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        if meta.is_dir() {
            return Ok(Self::Directory(path));
        }
        if path.file_name().is_some_and(|n| n == "config.json") {
            return Ok(Self::Directory(directory_of(path)));
        }
        Ok(if begins_json(path)? { Self::Index } else { Self::File })
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
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

/// File name of shard `no` (from 0) of `count`: `STEM-00001-of-0000N.SUFFIX`.
pub fn shard_name(stem: &str, no: u64, count: u64, suffix: &str) -> String {
    format!("{stem}-{:05}-of-{count:05}.{suffix}", no.saturating_add(1))
}

/// Takes such a name apart: stem, number (from 0), count.
pub fn split_shard_name<'a>(name: &'a str, suffix: &str) -> Option<(&'a str, u64, u64)> {
    let (rest, count) = name.strip_suffix(suffix)?.strip_suffix('.')?.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    let number = |s: &str| -> Option<u64> {
        (s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten()
    };
    let (no, count) = (number(no)?.checked_sub(1)?, number(count)?);
    (no < count).then_some((stem, no, count))
}

/// The shards of a name that [`split_shard_name`] knows; the numbers tell which must be there.
#[derive(PartialEq, Eq)]
struct ShardSet {
    stem: String,
    suffix: &'static str,
    count: u64,
}

impl ShardSet {
    /// The set that a file of this name belongs to.
    fn of(name: &str, suffix: &'static str) -> Option<Self> {
        let (stem, _, count) = split_shard_name(name, suffix)?;
        Some(Self { stem: stem.into(), suffix, count })
    }

    fn paths(&self, dir: &Path, limits: &Limits) -> Result<Vec<PathBuf>> {
        let Self { stem, suffix, count } = self;
        if *count > limits.shards {
            return Err(Bound::Shards
                .reached(format!("{count} shards, at most {} are allowed", limits.shards))
                .at(dir));
        }
        let path = |no| dir.join(shard_name(stem, no, *count, suffix));
        let paths: Vec<PathBuf> = (0..*count).map(path).collect();
        match paths.iter().find(|p| !p.is_file()) {
            None => Ok(paths),
            Some(missing) => Err(Error::io("open", missing, std::io::ErrorKind::NotFound.into())
                .hint("a shard is missing: fetch it")),
        }
    }
}

impl Located {
    /// The shards that the index at `path` names.
    ///
    /// # Errors
    /// `Malformed` for what is no index or leaves its directory, `Limit`, `Io` for a missing shard.
    pub fn of_index(path: &Path, limits: &Limits) -> Result<Self> {
        #[derive(Deserialize)]
        struct Fields {
            weight_map: Unique<String>,
        }
        let at = |e: Error| e.at(path);
        let text = read_side_file(path, limits.side_file_bytes)?
            .ok_or_else(|| Error::io("open", path, std::io::ErrorKind::NotFound.into()))?;
        let fields: Fields = from_json(&text, path).map_err(|e| e.context("is no valid index"))?;
        let map = fields.weight_map.0;
        let bounded = |n: usize, max: u64, bound: Bound, what: &str| match n as u64 > max {
            true => Err(at(bound.reached(format!("{n} {what}, at most {max} are allowed")))),
            false => Ok(()),
        };
        bounded(map.len(), limits.tensors, Bound::Tensors, "tensors")?;
        let names: BTreeSet<&String> = map.values().collect();
        bounded(names.len(), limits.shards, Bound::Shards, "shards")?;
        let mut files = Vec::with_capacity(names.len());
        for name in names {
            let plain =
                !name.is_empty() && !name.contains(['/', '\\', '\0', ':']) && *name != "." && *name != "..";
            if !plain {
                return Err(at(Error::malformed(format!("shard {name:?} is no plain file name"))));
            }
            let file = directory_of(path).join(name);
            if !file.is_file() {
                let index = path.file_name().unwrap_or_default().to_string_lossy();
                return Err(Error::io("open", &file, std::io::ErrorKind::NotFound.into())
                    .hint(format!("{index} names this shard: fetch it")));
            }
            files.push(file);
        }
        Ok(Self { files, index: Some(Index { path: path.to_path_buf(), map }) })
    }

    /// Opens every file with `read`, which lists the tensors of one and gives something more, and
    /// holds all against the index.
    ///
    /// # Errors
    /// Those of `read`; `Malformed` for a name in two files, and where index and files disagree.
    pub fn open<T>(
        &self,
        limits: &Limits,
        mut read: impl FnMut(&InputFile, usize) -> Result<(Vec<TensorInfo>, T)>,
    ) -> Result<(Store, Vec<T>)> {
        let (mut files, mut tensors, mut more) = (Vec::new(), Vec::<TensorInfo>::new(), Vec::new());
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (i, path) in self.files.iter().enumerate() {
            let file = InputFile::open(path)?;
            let (found, extra) = read(&file, i)?;
            for t in &found {
                match seen.insert(t.name.clone(), i).and_then(|k| self.files.get(k)) {
                    Some(other) if other == path => {
                        return Err(Error::malformed(format!("tensor {:?} appears twice", t.name)).at(path));
                    }
                    Some(other) => {
                        let other = other.display();
                        return Err(
                            Error::malformed(format!("tensor {:?} is in {other} too", t.name)).at(path)
                        );
                    }
                    None => (),
                }
            }
            tensors.extend(found);
            more.push(extra);
            files.push(file);
            if tensors.len() as u64 > limits.tensors {
                return Err(Bound::Tensors
                    .reached(format!("{} tensors, at most {} are allowed", tensors.len(), limits.tensors))
                    .at(path));
            }
        }
        let store = Store::new(files, tensors)?;
        if let Some(index) = &self.index {
            index.check(&store)?;
        }
        Ok((store, more))
    }
}

impl Index {
    fn check(&self, store: &Store) -> Result<()> {
        let file_name = |file: usize| store.files().get(file)?.path().file_name()?.to_str();
        for (tensor, shard) in &self.map {
            if store.get(tensor).and_then(|t| file_name(t.file)) != Some(shard.as_str()) {
                return Err(Error::malformed(format!(
                    "tensor {tensor:?} is not in {shard}, where the index has it"
                ))
                .at(&self.path));
            }
        }
        if let Some(extra) = store.tensors().iter().find(|t| !self.map.contains_key(&t.name)) {
            return Err(Error::malformed(format!(
                "tensor {:?} is in a shard, but not in the index",
                extra.name
            ))
            .at(&self.path));
        }
        Ok(())
    }
}

/// What of a file is written last: what depends on its data, and what lies between them.
#[derive(Debug)]
pub enum Ending {
    /// Checksums of members.
    Zip(Checksums),
    /// A manifest.
    Qpack(Box<Seal>),
    /// What lies between the data of Core ML's weight files; it does not depend on them.
    Blobs(Records),
}

impl Ending {
    /// Reads the data, and writes it; both functions are given offsets in the file. `seals` are those of the
    /// files that come before, which it adds its own to. `seen` is told of bytes that were read.
    ///
    /// # Errors
    /// Those of `read` and `write`; `Interrupted` as `seen` says.
    pub fn write(
        &self,
        threads: usize,
        seals: &mut Vec<ShardSeal>,
        read: &ReadAt<'_>,
        write: &WriteAt<'_>,
        seen: &Seen<'_>,
    ) -> Result<()> {
        match self {
            Self::Zip(checksums) => {
                let read = |at: u64, bytes: &mut [u8]| {
                    read(at, bytes)?;
                    if seen(bytes.len() as u64) { Ok(()) } else { Err(Error::interrupted()) }
                };
                checksums.write(read, write)?
            }
            Self::Qpack(seal) => {
                let own = seal.write(threads, seals, read, write, seen)?;
                seals.push(own);
            }
            Self::Blobs(records) => records.write(write)?,
        }
        Ok(())
    }

    /// Does what need not wait for the data, on so many threads.
    ///
    /// # Errors
    /// `Io`; `Interrupted` as `seen` says.
    pub fn prepare(&self, threads: usize, seen: &Seen<'_>) -> Result<()> {
        match self {
            Self::Zip(_) | Self::Blobs(_) => Ok(()),
            Self::Qpack(seal) => seal.sum_sources(threads, seen),
        }
    }

    /// Bytes that it reads.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Zip(checksums) => checksums.bytes(),
            Self::Qpack(seal) => seal.bytes(),
            Self::Blobs(_) => 0,
        }
    }
}

/// One file to be written. The caller writes header and data, in any order, and then the ending.
#[derive(Debug)]
pub struct FileLayout {
    /// Its name in Hugging Face's numbering.
    pub name: String,
    /// Everything before the data.
    pub header: Vec<u8>,
    /// Bytes of the whole file.
    pub len: u64,
    /// What depends on the data, where there is such.
    pub ending: Option<Ending>,
}

/// A checkpoint to be written.
#[derive(Debug)]
pub struct Layout {
    /// The files.
    pub files: Vec<FileLayout>,
    /// For each tensor: its file, and its first byte there.
    pub places: Vec<(usize, u64)>,
    /// Name and bytes of the index, where there are several files.
    pub index: Option<(String, Vec<u8>)>,
}

/// A tensor to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member<'a> {
    pub name: &'a str,
    pub dtype: DType,
    pub shape: &'a [u64],
    pub nbytes: u64,
}

impl Naming {
    /// Fills files of at most `max_shard_size` bytes of data with `tensors` (name, type, shape) in
    /// this order; a tensor larger than that has a file of its own. `file` lays out one, given its
    /// name, and gives the first byte of each of its tensors too.
    ///
    /// # Errors
    /// Those of `file`; `Malformed` for impossible sizes, and a name that comes twice.
    pub(super) fn lay_out(
        &self,
        tensors: &[(&str, DType, &[u64])],
        max_shard_size: u64,
        mut file: impl FnMut(String, &[Member<'_>]) -> Result<(FileLayout, Vec<u64>)>,
    ) -> Result<Layout> {
        let too_large = || Error::malformed("the tensors would exceed 2^64 bytes");
        let (mut shards, mut members, mut of_file, mut total) = (Vec::new(), Vec::new(), 0u64, 0u64);
        for &(name, dtype, shape) in tensors {
            let nbytes = dtype.nbytes(shape).map_err(|e| e.context(format_args!("tensor {name:?}")))?;
            total = total.checked_add(nbytes).ok_or_else(too_large)?;
            if !members.is_empty() && of_file + nbytes > max_shard_size {
                shards.push(std::mem::take(&mut members));
                of_file = 0;
            }
            of_file += nbytes; // at most the total
            members.push(Member { name, dtype, shape, nbytes });
        }
        shards.push(members);
        let mut layout = Layout { files: Vec::new(), places: Vec::new(), index: None };
        let mut weight_map = Map::new();
        for (k, members) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => self.single(),
                count => shard_name(self.stem, k as u64, count as u64, self.suffix),
            };
            for t in members {
                if weight_map.insert(t.name.into(), json!(name)).is_some() {
                    return Err(Error::malformed(format!("tensor {:?} appears twice", t.name)));
                }
            }
            let (file, places) = file(name, members)?;
            layout.files.push(file);
            layout.places.extend(places.into_iter().map(|at| (k, at)));
        }
        if shards.len() > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            layout.index = Some((self.index(), format!("{index:#}\n").into_bytes()));
        }
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names() {
        assert_eq!(shard_name("m", 0, 3, "gguf"), "m-00001-of-00003.gguf");
        assert_eq!(split_shard_name("a-b-00002-of-00003.gguf", "gguf"), Some(("a-b", 1, 3)));
        for bad in [
            "m.gguf",
            "m-00000-of-00002.gguf",
            "m-00003-of-00002.gguf",
            "m-1-of-2.gguf",
            "m-0000x-of-00002.gguf",
            "m-00001-of-00002.bin",
        ] {
            assert_eq!(split_shard_name(bad, "gguf"), None, "{bad}");
        }
    }
}
