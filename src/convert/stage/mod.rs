//! Outputs appear whole or not at all: they grow under a temporary name beside the final one, and
//! are renamed when complete. One process works on an output at a time; its journal is the lock.

mod place;
mod recover;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

pub(super) use self::place::no_directory;
use self::place::{Place, Places, remove};
use self::recover::{Half, old, restore_old, sweep};
use super::journal::{Journal, Rename};
use crate::error::{Error, Result};
use crate::sys;

/// A file being written.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    file: File,
}

impl OutputFile {
    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// `Io`: disk full, quota.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        sys::write_all_at(&self.file, bytes, offset).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Leaves off what is behind the first `len` bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn cut(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|e| Error::io("cut", &self.path, e))
    }

    /// Fills `bytes` with what was written at `offset`.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        sys::read_exact_at(&self.file, bytes, offset).map_err(|e| Error::io("read", &self.path, e))
    }
}

/// What becomes of an output that an earlier process left unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// It is gone on with where it is the same output, of the same sources and options, and begun anew otherwise.
    #[default]
    Gladly,
    /// It is an error if there is nothing to go on with.
    Must,
    /// It is begun anew.
    Never,
}

/// What is to be written.
pub(super) enum Outputs<'a> {
    /// A file, or the shards of one, with their lengths.
    Files(&'a [(PathBuf, u64)]),
    /// A directory of such files, named relative to it.
    Directory {
        target: &'a Path,
        files: &'a [(PathBuf, u64)],
        /// Whether one that exists goes as a whole, with what else is in it.
        replaces: bool,
    },
}

/// An output that is not visible under its final name yet. Dropped without [`Stage::commit`] or
/// [`Stage::keep`], it removes what it wrote.
#[derive(Debug)]
pub struct Stage {
    places: Places,
    files: Vec<OutputFile>,
    journal: Journal,
    /// Whether finished spans are noted.
    is_noted: bool,
    force: bool,
    /// Whether the files stay when this is dropped.
    stays: bool,
}

impl Stage {
    /// Begins files of the given lengths, each of which will appear at its path: a file, or the
    /// shards of one.
    ///
    /// # Errors
    /// `Misuse` when one exists and `force` is off, or somebody else is writing it; `Io` when it
    /// cannot be created or the disk has not enough bytes free for all.
    pub fn files_at(targets: &[(PathBuf, u64)], force: bool) -> Result<Self> {
        Self::begin(&Outputs::Files(targets), force, None)
    }

    /// Begins an output; with a key, goes on with one that an earlier process left, as wished. What is there stays
    /// when this fails.
    ///
    /// # Errors
    /// As [`Self::files_at`]; `Misuse` where it must be gone on with and cannot.
    pub(super) fn begin(outputs: &Outputs<'_>, force: bool, going: Option<(&str, Resume)>) -> Result<Self> {
        let places = match outputs {
            Outputs::Files(targets) => Places::files(targets)?,
            Outputs::Directory { target, files, replaces } => Places::directory(target, files, *replaces)?,
        };
        let target = &places.first()?.target;
        let lacks = || {
            Err(Error::misuse("there is no interrupted run of this command to go on with").at(target).hint(
                "without --resume it is begun anew; sources that were changed, another version and other options \
                 make another output",
            ))
        };
        let must = going.is_some_and(|(_, resume)| resume == Resume::Must);
        let path = places.journal()?;
        let was_there = fs::symlink_metadata(&path).is_ok();
        if !was_there {
            restore_old(&places)?;
            places.check(force, &|_| false)?;
            if must {
                return lacks();
            }
        }
        let Some(journal) = Journal::lock(path)? else {
            return Err(Error::misuse("another qconv is writing this output").at(target));
        };
        let goes_on = going.is_some_and(|(key, resume)| resume != Resume::Never && journal.is_of(key));
        restore_old(&places)?;
        let half = Half::of(&journal, places.parent()?);
        places.check(force, &|path| half.holds(path, goes_on))?;
        if must && !goes_on {
            return lacks();
        }
        match goes_on {
            true => half.take_back()?,
            false => half.remove()?,
        }
        places.check_space()?;
        let found = if goes_on && journal.is_begun() { places.open() } else { None };
        let mut stage =
            Self { places, files: Vec::new(), journal, is_noted: going.is_some(), force, stays: true };
        match found {
            Some(files) => {
                stage.journal.go_on()?;
                stage.files = files;
                stage.stays = false;
            }
            None => {
                stage.journal.begin(going.map(|(key, _)| key))?;
                stage.stays = false;
                stage.places.clear()?;
                sweep(&stage.places, going.is_some());
                stage.files = stage.places.create()?;
            }
        }
        Ok(stage)
    }

    /// Whether an earlier process left something at an output that the next may go on with.
    pub fn is_unfinished(output: &Path) -> bool {
        let path = output.canonicalize().unwrap_or_else(|_| output.to_path_buf());
        Journal::path_for(&path).is_ok_and(|path| fs::symlink_metadata(path).is_ok())
    }

    /// Where finished spans are noted, if they are.
    pub(super) fn journal(&self) -> Option<&Journal> {
        self.is_noted.then_some(&self.journal)
    }

    /// Leaves the files as they are, for a later process to go on with.
    pub fn keep(mut self) {
        self.stays = true;
    }

    /// The files, in the order they were given.
    pub fn files(&self) -> &[OutputFile] {
        &self.files
    }

    /// Flushes everything to the disk and gives it its final name. Several files are renamed one after another:
    /// where the process is killed meanwhile, the next knows it from the journal.
    ///
    /// # Errors
    /// `Io`; `Misuse` where the output has come to exist. Temporary files are removed then, but for those that
    /// another process can go on with.
    pub fn commit(mut self) -> Result<()> {
        let flush = |f: &OutputFile| f.file.sync_all().map_err(|e| Error::io("flush", &f.path, e));
        let done = self.files.iter().try_for_each(flush).and_then(|()| self.rename());
        if done.is_err() {
            self.stays = self.is_noted;
            return done;
        }
        let parent = self.places.parent()?;
        sys::sync_directory(parent);
        self.stays = true;
        self.journal.silence();
        Ok(())
    }

    fn rename(&mut self) -> Result<()> {
        // Others may have made it in the meantime.
        self.places.check(self.force, &|_| false)?;
        let base = self.places.parent()?;
        let places = &self.places;
        let whole = places.directory.as_ref().filter(|d| !d.target.is_dir() || places.replaces);
        let pairs: Vec<&Place> = match whole {
            Some(directory) => vec![directory],
            None => places.files.iter().map(|(place, _)| place).collect(),
        };
        let noted: Option<Vec<Rename>> =
            pairs.iter().map(|p| Rename::new(base, &p.temporary, &p.target)).collect();
        if let Some(renames) = noted.filter(|all| self.is_noted || all.len() > 1) {
            self.journal.commit(&renames)?;
        }
        if let Some(directory) = whole {
            return if directory.target.is_dir() { replace(directory) } else { rename(directory) };
        }
        for place in pairs {
            if let (Some(_), Some(inner)) = (&places.directory, place.target.parent()) {
                fs::create_dir_all(inner).map_err(|e| Error::io("create", inner, e))?;
            }
            rename(place)?;
        }
        if let Some(Place { target, temporary }) = &places.directory {
            remove_stale(target, places)?;
            remove(temporary)?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.stays {
            // Nothing better can be done with a failure here: the error that led here is the news.
            if let Ok(base) = self.places.parent() {
                let _ = Half::of(&self.journal, base).remove();
            }
            let _ = self.places.clear();
            self.journal.silence();
        }
    }
}

fn rename(place: &Place) -> Result<()> {
    place.keep_mode();
    fs::rename(&place.temporary, &place.target).map_err(|e| Error::io("rename to", &place.target, e))
}

/// Puts a directory in the place of another.
fn replace(place: &Place) -> Result<()> {
    let target = &place.target;
    let old = old(target);
    remove(&old)?;
    fs::rename(target, &old).map_err(|e| Error::io("rename to", &old, e))?;
    if let Err(e) = rename(place) {
        fs::rename(&old, target).map_err(|e| Error::io("rename to", target, e))?;
        return Err(e);
    }
    remove(&old)
}

/// Removes weights, indexes and what tells of their packing from a directory that was written into, where they
/// are not of this output: readers would take them for a part of it.
fn remove_stale(directory: &Path, places: &Places) -> Result<()> {
    let entries = fs::read_dir(directory).map_err(|e| Error::io("read", directory, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read", directory, e))?.path();
        let is_written = places.files.iter().any(|(place, _)| place.target == path);
        if is_stale(&path) && !is_written {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Whether readers take a file of a directory for a part of the weights in it, or for what tells of them.
pub(super) fn is_stale(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_weights = (name.starts_with("model") && name.ends_with(".safetensors"))
        || (name.starts_with("pytorch_model") && name.ends_with(".bin"));
    is_weights || name.ends_with(".index.json") || name == "quantize_config.json"
}

/// The files of this process that are needed for a while.
static NEEDED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file that is needed for a while: gone when dropped. Outputs that are begun meanwhile leave it where it is.
#[derive(Debug)]
pub struct Temporary(PathBuf);

impl Temporary {
    /// A file that may be there or not.
    pub fn new(path: PathBuf) -> Self {
        NEEDED.lock().unwrap_or_else(|e| e.into_inner()).push(path.clone());
        Self(path)
    }

    /// A hidden name beside `output`, where a file of its size finds room.
    pub fn beside(output: &Path, what: &str) -> Self {
        Self::new(Self::name(output, what))
    }

    /// The name that [`Self::beside`] gives.
    pub fn name(output: &Path, what: &str) -> PathBuf {
        sys::hidden(output, what)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether a file is needed, by whatever path.
    pub(super) fn is_needed(path: &Path) -> bool {
        let full = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let path = full(path);
        NEEDED.lock().unwrap_or_else(|e| e.into_inner()).iter().any(|needed| full(needed) == path)
    }

    /// Removes them all: the program is about to end at once.
    pub fn remove_all() {
        let needed = NEEDED.lock().unwrap_or_else(|e| e.into_inner());
        needed.iter().for_each(|path| drop(fs::remove_file(path)));
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut needed = NEEDED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(i) = needed.iter().position(|path| *path == self.0) {
            needed.swap_remove(i);
        }
        // It may never have been written.
        let _ = fs::remove_file(&self.0);
    }
}
