//! What is written is none of what is read.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::stage::is_stale;
use crate::container::shards::split_shard_name;
use crate::error::{Error, Result};
use crate::sys;

/// Files, known again by any path that leads to them. A second name of one (a hard link) is another file: who replaces
/// it leaves the first as it is.
pub(super) struct Known {
    paths: HashSet<PathBuf>,
    ids: HashSet<(u64, u64)>,
}

impl Known {
    pub fn of(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Self {
        let mut known = Self { paths: HashSet::new(), ids: HashSet::new() };
        for path in paths {
            let path = path.as_ref();
            known.paths.extend(path.canonicalize());
            // By a directory that is there twice (a bind mount), too.
            known.ids.extend(fs::metadata(path).ok().and_then(|meta| sys::sole_identity(&meta)));
        }
        known
    }

    pub fn has(&self, path: &Path) -> bool {
        let id = || fs::metadata(path).ok().and_then(|meta| sys::sole_identity(&meta));
        path.canonicalize().is_ok_and(|path| self.paths.contains(&path))
            || id().is_some_and(|id| self.ids.contains(&id))
    }
}

pub(super) fn refused(path: &Path) -> Error {
    Error::misuse("the output would overwrite its own input").at(path)
}

/// Refuses outputs that are inputs, under whatever name, other shards of one, or parts of one that is a directory; and
/// outputs that are each other. It does not ask whether anything may be overwritten.
///
/// # Errors
/// `Misuse` naming the file.
pub fn refuse_inputs(outputs: &[PathBuf], inputs: &[PathBuf]) -> Result<()> {
    let known = Known::of(inputs.iter().filter(|path| path.is_file()));
    let full = |path: &PathBuf| path.canonicalize().ok();
    let directories: Vec<_> = inputs.iter().filter(|path| path.is_dir()).filter_map(full).collect();
    let shards: HashSet<_> = inputs.iter().filter_map(full).filter_map(|path| set(&path)).collect();
    let mut places = HashSet::new();
    for output in outputs {
        let twice = || Err(Error::misuse("would be written twice: two outputs have one name").at(output));
        let Some(found) = full(output) else {
            // The directory may be there, under another name than it has in another output, or be made only now.
            let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else { continue };
            let parent = full(&parent.join(".")).or_else(|| std::path::absolute(parent).ok());
            if !places.insert(parent.unwrap_or_default().join(name)) {
                return twice();
            }
            continue;
        };
        if !found.is_file() {
            continue;
        }
        let is_part = |directory: &PathBuf| {
            let is_package = directory.extension().is_some_and(|e| e == "mlpackage" || e == "mlmodelc");
            let is_direct = found.parent() == Some(directory.as_path());
            is_direct && is_of_model(&found) || is_package && found.starts_with(directory)
        };
        let is_shard = set(&found).is_some_and(|set| shards.contains(&set));
        if is_shard || known.has(&found) || directories.iter().any(is_part) {
            return Err(refused(output));
        }
        if !places.insert(found) {
            return twice();
        }
    }
    Ok(())
}

/// What the shards of a model have in common: directory, name, ending and count.
fn set(path: &Path) -> Option<(PathBuf, String, String, u64)> {
    let ending = path.extension()?.to_str()?;
    let (stem, _, count) = split_shard_name(path.file_name()?.to_str()?, ending)?;
    Some((path.parent()?.to_path_buf(), stem.to_string(), ending.to_string(), count))
}

/// Whether readers take a file of a model's directory for a part of the model.
fn is_of_model(path: &Path) -> bool {
    const ENDINGS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "model", "jinja", "py", "tiktoken", "npz"];
    const BEGIN: [&str; 13] = [
        "config",
        "generation_config",
        "tokenizer",
        "special_tokens",
        "added_tokens",
        "vocab",
        "merges",
        "chat_template",
        "preprocessor",
        "processor",
        "adapter_",
        "readme",
        "license",
    ];
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    is_stale(path) || ENDINGS.contains(&ending) || BEGIN.iter().any(|begin| name.starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_no_inputs_and_not_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for inner in ["d", "e", "p.mlpackage/x"] {
            fs::create_dir_all(path(inner)).unwrap();
        }
        for name in [
            "a",
            "b",
            "d/config.json",
            "d/m.safetensors",
            "d/r.md",
            "m-00001-of-00002.gguf",
            "m-00002-of-00002.gguf",
            "m-00001-of-00003.gguf",
            "p.mlpackage/x/y",
        ] {
            fs::write(path(name), name).unwrap();
        }
        let inputs = ["a", "d", "p.mlpackage", "m-00001-of-00002.gguf", "none"].map(path);
        let refuses = |outputs: &[&str]| {
            let outputs: Vec<_> = outputs.iter().map(|name| path(name)).collect();
            refuse_inputs(&outputs, &inputs).err().map(|e| e.to_string())
        };
        for own in
            ["a", "e/../a", "d/config.json", "d/m.safetensors", "m-00002-of-00002.gguf", "p.mlpackage/x/y"]
        {
            assert!(refuses(&["b", own]).unwrap().contains("overwrite its own input"), "{own}");
        }
        for free in ["b", "none", "new", "d/new.json", "d/r.md", "d", "e", "m-00001-of-00003.gguf"] {
            assert_eq!(refuses(&[free]), None, "{free}");
        }
        for [a, b] in [["b", "e/../b"], ["new", "e/../new"]] {
            assert!(refuses(&[a, b]).unwrap().contains("twice"), "{a} {b}");
        }
        assert_eq!(refuses(&["e/new", "new", "e", "b"]), None);
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(path("a"), path("soft")).unwrap();
            assert!(refuses(&["soft"]).is_some());
            // What is replaced is the second name.
            fs::hard_link(path("a"), path("hard")).unwrap();
            assert_eq!(refuses(&["hard"]), None);
        }
    }
}
