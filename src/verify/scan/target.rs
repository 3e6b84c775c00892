//! Which files paths mean, and what each of them is.

use std::fs;
use std::path::{Path, PathBuf};

use super::Unchecked;
use crate::container::coreml::{chunks, package};
use crate::container::gguf::MAGIC;
use crate::container::shards::split_shard_name;
use crate::container::side::files_below;
use crate::container::{InputFile, pytorch, qpack};
use crate::error::{Error, Result};

/// What a target is read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A GGUF file, or a split set by one of its files.
    Gguf,
    /// A safetensors file, or a set.
    Safetensors,
    /// A PyTorch file, or a pickle.
    Pytorch,
    /// A `.qpack` file or set.
    Qpack,
    /// A directory with config.json or weights.
    HuggingFace,
    /// A Core ML package, or a directory of them.
    CoreMl,
    /// A flat importance matrix of llama.cpp.
    Imatrix,
    /// None of these.
    Unknown,
}

impl Kind {
    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gguf => "GGUF",
            Self::Safetensors => "safetensors",
            Self::Pytorch => "PyTorch",
            Self::Qpack => "qpack",
            Self::HuggingFace => "Hugging Face",
            Self::CoreMl => "Core ML",
            Self::Imatrix => "imatrix",
            Self::Unknown => "unknown",
        }
    }
}

/// Something to scan: a file with what belongs to it, or a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// Where it is; of a set any file.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Whether it was named, and not met in a directory.
    pub named: bool,
}

/// Endings of files that are looked at in directories that are no checkpoints, whatever they begin with.
const ENDINGS: &[&str] = &["gguf", "safetensors", "bin", "pt", "pth", "ckpt", "pkl", "pickle", "qpack"];
/// Endings of pickles of other libraries.
pub const PICKLES: &[&str] = &["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

/// The targets that `paths` mean: files, directories of models, and what lies in other directories; and what cannot be
/// looked at in these.
///
/// # Errors
/// `Io` when one of `paths` cannot be looked at.
pub fn find(paths: &[PathBuf]) -> Result<(Vec<Target>, Vec<Unchecked>)> {
    let mut found = Targets::default();
    for path in paths {
        let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        if !meta.is_dir() {
            // What a user names is looked at, whatever it is.
            let kind = kind_of_file(path)?;
            found.add(path, kind, true);
        } else if let Some(kind) = kind_of_directory(path) {
            found.model(path, kind, true);
        } else {
            directory(path, 0, &mut found);
        }
    }
    Ok((found.targets, found.unchecked))
}

#[derive(Default)]
struct Targets {
    targets: Vec<Target>,
    unchecked: Vec<Unchecked>,
}

/// The set that a file belongs to by its name: the directory, the name without its number, and how many there are.
pub type Set = (PathBuf, String, u64);

impl Target {
    /// The set that it belongs to by its name. Whether it does, only the files can say.
    pub fn set(&self) -> Option<Set> {
        let name = self.path.file_name()?.to_str()?;
        let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
        let (stem, _, count) = split_shard_name(name, ending)?;
        Some((self.path.parent()?.to_path_buf(), format!("{stem}.{ending}"), count))
    }
}

impl Targets {
    fn fail(&mut self, path: &Path, error: &Error) {
        self.unchecked.push(Unchecked { path: path.to_path_buf(), error: error.to_string() });
    }

    fn add(&mut self, path: &Path, kind: Kind, named: bool) {
        self.targets.push(Target { path: path.to_path_buf(), kind, named });
    }

    /// A directory that is a model. Files of other formats directly in it are models of their own; they come before it,
    /// which then lists what is not listed yet.
    fn model(&mut self, dir: &Path, kind: Kind, named: bool) {
        if kind == Kind::HuggingFace {
            // What cannot be read is told of with the directory.
            for (name, path) in files_of(dir).unwrap_or_default() {
                let beside = !name.contains('/') && (name.ends_with(".gguf") || name.ends_with(".qpack"));
                if beside && let Ok(kind) = kind_of_file(&path) {
                    self.add(&path, kind, false);
                }
            }
        }
        self.add(dir, kind, named);
    }
}

/// Directories within directories.
const MAX_DEPTH: u32 = 8;

/// Paths in a directory in order, and whether they are directories.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let failed = |e| Error::io("read", dir, e);
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        entries.push((entry.path(), entry.file_type().map_err(failed)?.is_dir()));
    }
    entries.sort();
    Ok(entries)
}

/// Models in a directory that is none itself.
fn directory(dir: &Path, depth: u32, found: &mut Targets) {
    let entries = entries(dir).unwrap_or_else(|e| {
        found.fail(dir, &e);
        Vec::new()
    });
    for (path, is_dir) in entries {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')) {
            continue;
        }
        if is_dir {
            // In a cache of Hugging Face snapshots are links to the blobs.
            if path.file_name().is_some_and(|n| n == "blobs") && dir.join("snapshots").is_dir() {
                continue;
            }
            match kind_of_directory(&path) {
                Some(kind) => found.model(&path, kind, false),
                None if depth < MAX_DEPTH => directory(&path, depth + 1, found),
                None => {}
            }
        } else if path.is_file() {
            let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            match kind_of_file(&path) {
                Ok(Kind::Unknown) if !ENDINGS.contains(&ending) => {}
                Ok(kind) => found.add(&path, kind, false),
                Err(e) => found.fail(&path, &e),
            }
        }
    }
}

/// What a directory is, where it is a model.
pub fn kind_of_directory(dir: &Path) -> Option<Kind> {
    if dir.extension().is_some_and(|e| e == "mlpackage") || package::is_package(dir) || chunks::is_model(dir)
    {
        return Some(Kind::CoreMl);
    }
    let of_weights = |name: &str| {
        ["model", "pytorch_model"].iter().any(|stem| {
            name.strip_prefix(stem).is_some_and(|rest| {
                rest.ends_with(".safetensors") || rest.ends_with(".bin") || rest.ends_with(".index.json")
            })
        })
    };
    let mut names = fs::read_dir(dir).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok());
    names.any(|name| name == "config.json" || of_weights(&name)).then_some(Kind::HuggingFace)
}

/// What a file is, by its first bytes; where they say nothing, by its name.
///
/// # Errors
/// `Io`.
pub fn kind_of_file(path: &Path) -> Result<Kind> {
    let file = InputFile::open(path)?;
    let mut head = [0; 9];
    let n = file.len().min(head.len() as u64) as usize;
    file.read_at(0, head.get_mut(..n).unwrap_or_default())?;
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    Ok(match head {
        _ if head.starts_with(&MAGIC) => Kind::Gguf,
        _ if n == head.len() && head[7] == 0 && head[8] == b'{' => Kind::Safetensors,
        _ if pytorch::is_pytorch(&file)? => Kind::Pytorch,
        _ if qpack::is_qpack(&file)? => Kind::Qpack,
        _ if name == "config.json" || name.ends_with(".index.json") => Kind::HuggingFace,
        // Damaged at the first byte, or something else under that name.
        _ if ending == "gguf" => Kind::Gguf,
        _ if ending == "safetensors" => Kind::Safetensors,
        _ if ending == "qpack" => Kind::Qpack,
        _ if PICKLES.contains(&ending) && matches!(head[0], b'c' | b'(' | b'}' | b']' | 0x80) => {
            Kind::Pytorch
        }
        _ if ending == "dat" || name.contains("imatrix") => Kind::Imatrix,
        // Those of the first protocols begin with any byte.
        _ if PICKLES.contains(&ending) => Kind::Pytorch,
        _ => Kind::Unknown,
    })
}

/// All files of a directory, hidden ones too, by names relative to it.
///
/// # Errors
/// `Io`.
pub fn files_of(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    Ok(files_below(dir)?.files)
}
