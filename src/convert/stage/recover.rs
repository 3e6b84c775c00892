//! What a process that was killed leaves, and what becomes of it.
//!
//! Outputs get their names one after the other. Before the first the journal notes all of them, so that the next
//! process can tell which files with final names are those of an output that is not whole.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::Temporary;
use super::place::{Place, Places, parent, remove};
use crate::container::shards::split_shard_name;
use crate::convert::journal::{Journal, Rename};
use crate::error::{Error, Result};
use crate::sha256::{Sha256, hex};
use crate::sys;

/// What a directory that is being replaced is called meanwhile.
pub fn old(target: &Path) -> PathBuf {
    sys::hidden(target, "old")
}

impl Rename {
    /// From a file or directory that is there; `None` for names that cannot be noted.
    pub(super) fn new(base: &Path, from: &Path, to: &Path) -> Option<Self> {
        let relative = |path: &Path| Some(path.strip_prefix(base).ok()?.to_str()?.to_string());
        let id = sys::identity(&fs::symlink_metadata(from).ok()?);
        Some(Self { from: relative(from)?, to: relative(to)?, id, stamp: stamp(from)? })
    }

    /// Both paths; `None` where they lead anywhere else.
    fn paths(&self, base: &Path) -> Option<(PathBuf, PathBuf)> {
        let inside = |name: &str| {
            let path = Path::new(name);
            let is_inside = !name.is_empty() && path.components().all(|c| matches!(c, Component::Normal(_)));
            is_inside.then(|| base.join(path))
        };
        let from = inside(&self.from)?;
        let first = Path::new(&self.from).components().next()?;
        first.as_os_str().to_str()?.ends_with(".qconv-partial").then_some(())?;
        Some((from, inside(&self.to)?))
    }

    /// The path that it was renamed to, if it was, and still lies there.
    fn done(&self, base: &Path) -> Option<(PathBuf, PathBuf)> {
        let (from, to) = self.paths(base)?;
        let meta = fs::symlink_metadata(&to).ok()?;
        let is_it = sys::identity(&meta) == self.id && stamp(&to).as_deref() == Some(&*self.stamp);
        (is_it && fs::symlink_metadata(&from).is_err()).then_some((from, to))
    }
}

/// What a file, or all files of a directory, are by length and time of change: who changed one since keeps it.
fn stamp(path: &Path) -> Option<String> {
    fn visit(root: &Path, path: &Path, all: &mut Vec<String>) -> Option<()> {
        let meta = fs::symlink_metadata(path).ok()?;
        let name = path.strip_prefix(root).ok()?;
        if meta.is_dir() {
            all.push(format!("{name:?} is a directory"));
            return fs::read_dir(path).ok()?.try_for_each(|entry| visit(root, &entry.ok()?.path(), all));
        }
        let at = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        all.push(format!("{name:?} {} {at}", meta.len()));
        Some(())
    }
    let mut all = Vec::new();
    visit(path, path, &mut all)?;
    all.sort();
    Some(hex(&Sha256::digest(all.join("\n"))))
}

/// Final names that an output had got when the process ended.
pub struct Half {
    done: Vec<(PathBuf, PathBuf)>,
    /// Whether others had not got theirs, and are not there.
    is_half: bool,
}

impl Half {
    /// By the journal of an output in `base`.
    pub fn of(journal: &Journal, base: &Path) -> Self {
        let renames = journal.renames();
        let done: Vec<_> = renames.iter().filter_map(|r| r.done(base)).collect();
        // Where somebody has put another in the place of one that was missing, it is theirs as a whole.
        let is_missing = |r: &&Rename| r.paths(base).is_some_and(|(_, to)| fs::symlink_metadata(to).is_err());
        let rest = renames.len() - done.len();
        Self { is_half: rest > 0 && renames.iter().filter(is_missing).count() == rest, done }
    }

    /// Whether a file or directory with a final name is no output yet: it can be `taken_back`, or the output is not
    /// whole.
    pub fn holds(&self, target: &Path, taken_back: bool) -> bool {
        (taken_back || self.is_half) && self.done.iter().any(|(_, to)| to == target)
    }

    /// Gives the files the names back that they had while they grew.
    ///
    /// # Errors
    /// `Io`.
    pub fn take_back(&self) -> Result<()> {
        for (from, to) in &self.done {
            let inner = parent(from);
            fs::create_dir_all(inner).map_err(|e| Error::io("create", inner, e))?;
            fs::rename(to, from).map_err(|e| Error::io("rename", to, e))?;
        }
        Ok(())
    }

    /// Removes them where the output is not whole.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self) -> Result<()> {
        self.done.iter().filter(|_| self.is_half).try_for_each(|(_, to)| remove(to))
    }
}

/// Ends the replacement of a directory that a process was killed in: what was there before is there again, unless
/// the new one is.
///
/// # Errors
/// `Io`.
pub fn restore_old(places: &Places) -> Result<()> {
    let Some(Place { target, .. }) = places.directory.as_ref().filter(|_| places.replaces) else {
        return Ok(());
    };
    let old = old(target);
    match fs::symlink_metadata(&old) {
        Ok(meta) if meta.is_dir() && fs::symlink_metadata(target).is_err() => {
            fs::rename(&old, target).map_err(|e| Error::io("rename", &old, e))
        }
        Ok(_) => remove(&old),
        Err(_) => Ok(()),
    }
}

/// Files that lie beside an output while it is made, and that only a killed process leaves.
const MEANWHILE: [&str; 3] = ["plain", "trial", "source"];

/// Removes what killed processes left of the same output divided otherwise, and, where it `is_whole`, of what is
/// needed to make it. What another process is working on stays.
pub fn sweep(places: &Places, is_whole: bool) {
    let Ok(Place { target, .. }) = places.first() else { return };
    let Some(own) = target.file_name().and_then(|name| name.to_str()) else { return };
    let base = parent(target);
    let names = || {
        let entries = fs::read_dir(base).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    };
    let is_meanwhile = |name: &str| {
        let rest = name.strip_prefix('.').and_then(|n| n.strip_prefix(own)?.strip_prefix(".qconv-"));
        is_whole && rest.is_some_and(|rest| MEANWHILE.iter().any(|m| rest.starts_with(m)))
    };
    let mut is_busy = false;
    for name in names() {
        let of = name.strip_prefix('.').and_then(|n| n.strip_suffix(".qconv-journal"));
        let Some(of) = of.filter(|of| *of != own && (family(of) == family(own) || is_meanwhile(of))) else {
            continue;
        };
        // Nothing better can be done with a failure: it is no output of ours that is in the way.
        let Ok(Some(journal)) = Journal::lock(base.join(&name)) else {
            is_busy = true;
            continue;
        };
        let _ = Half::of(&journal, base).remove();
        let ending = ".qconv-partial";
        for partial in names() {
            let grows = partial.strip_prefix('.').and_then(|n| n.strip_suffix(ending));
            if grows.is_some_and(|grows| is_of_set(of, grows)) {
                let _ = remove(&base.join(partial));
            }
        }
        journal.remove();
    }
    for name in names().filter(|name| !is_busy && is_meanwhile(name)) {
        let path = base.join(name);
        if !Temporary::is_needed(&path) {
            let _ = remove(&path);
        }
    }
}

/// `m-00001-of-00003.gguf` as a name, a number and a count.
fn shard(name: &str) -> Option<(&str, u64)> {
    let (_, ending) = name.rsplit_once('.')?;
    split_shard_name(name, ending).map(|(stem, _, count)| (stem, count))
}

/// What all divisions of an output have in common.
fn family(name: &str) -> (&str, &str) {
    let (stem, ending) = name.rsplit_once('.').unwrap_or((name, ""));
    (shard(name).map_or(stem, |(stem, _)| stem), ending)
}

/// Whether a file is of the set whose first is `first`.
fn is_of_set(first: &str, name: &str) -> bool {
    name == first || (shard(first).is_some() && shard(first) == shard(name) && family(first) == family(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisions_of_an_output_are_known() {
        for (a, b, same) in [
            ("m.gguf", "m-00001-of-00003.gguf", true),
            ("m-00001-of-00002.gguf", "m-00001-of-00003.gguf", true),
            ("m.gguf", "m.qpack", false),
            ("m.gguf", "n-00001-of-00003.gguf", false),
            ("m", "m", true),
        ] {
            assert_eq!(family(a) == family(b), same, "{a} {b}");
        }
        assert!(is_of_set("m-00001-of-00003.gguf", "m-00003-of-00003.gguf"));
        assert!(!is_of_set("m-00001-of-00003.gguf", "m-00001-of-00002.gguf"));
        assert!(!is_of_set("m.gguf", "m-00001-of-00002.gguf") && is_of_set("m.gguf", "m.gguf"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_believed() {
        let rename =
            |from: &str, to: &str| Rename { from: from.into(), to: to.into(), id: 0, stamp: String::new() };
        let base = Path::new("/base");
        assert!(rename(".m.qconv-partial", "m").paths(base).is_some());
        assert!(rename(".m.qconv-partial/a/b", "m/a/b").paths(base).is_some());
        for (from, to) in [
            (".m.qconv-partial", "../m"),
            (".m.qconv-partial", "/m"),
            (".m.qconv-partial", ""),
            ("../.m.qconv-partial", "m"),
            ("m", "n"),
            (".m.qconv-partial/../x", "n"),
        ] {
            assert!(rename(from, to).paths(base).is_none(), "{from} {to}");
        }
    }
}
