//! Where outputs lie, and where they grow.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use super::OutputFile;
use crate::convert::journal::Journal;
use crate::error::{Error, Result};
use crate::sys;

/// A name in the end, and the one until then.
#[derive(Clone, Debug)]
pub struct Place {
    pub target: PathBuf,
    pub temporary: PathBuf,
}

/// The files of an output.
#[derive(Debug)]
pub struct Places {
    /// The directory that holds them, where they appear as one.
    pub directory: Option<Place>,
    /// Each file with its length.
    pub files: Vec<(Place, u64)>,
    /// Whether a directory that exists goes as a whole, with what else is in it.
    pub replaces: bool,
}

impl Place {
    /// Through a symbolic link what it points to is replaced, and the link stays.
    fn of(target: &Path) -> Result<Self> {
        let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
        let named =
            target.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(&target))?;
        let parent = parent(&target);
        if !parent.is_dir() {
            return Err(Error::misuse("the directory for the output does not exist").at(parent));
        }
        // All files of an output by one path of their directory, whether they are there already or not.
        let parent = parent.canonicalize().map_err(|e| Error::io("open", parent, e))?;
        let target = parent.join(named);
        Ok(Self { temporary: sys::hidden(&target, "partial"), target })
    }

    /// The same of a file.
    fn of_file(target: &Path) -> Result<Self> {
        match sys::ends_as_directory(target) && !target.exists() {
            true => Err(no_directory(target)),
            false => Self::of(target),
        }
    }

    /// What replaces a file is as private as that was.
    pub fn keep_mode(&self) {
        sys::take_mode(&self.temporary, &self.target, true);
    }

    /// Refuses what exists and must not be replaced.
    fn check(&self, is_directory: bool, force: bool) -> Result<()> {
        let target = &self.target;
        let Ok(meta) = fs::symlink_metadata(target) else { return Ok(()) };
        let exists = |what: &str| Err(Error::misuse(what).at(target).hint("--force overwrites it"));
        match (is_directory, meta.is_dir()) {
            (false, true) => Err(Error::misuse("is a directory").at(target)),
            (true, true) if is_mount(target, &meta) => {
                Err(Error::misuse("is a mount point, and cannot be replaced")
                    .at(target)
                    .hint("give a directory in it"))
            }
            (true, false) => Err(Error::misuse("exists and is no directory").at(target)),
            (false, false) if !meta.is_file() && !meta.is_symlink() => {
                Err(Error::misuse("exists and is no regular file").at(target))
            }
            (false, false) if !force => exists("exists already"),
            (true, true) if !force => {
                let mut entries = fs::read_dir(target).map_err(|e| Error::io("read", target, e))?;
                if entries.next().is_some() { exists("exists already and is not empty") } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}

/// That there is no directory `target`.
pub fn no_directory(target: &Path) -> Error {
    Error::misuse("ends as a directory does, and there is none").at(target).hint("give the name of a file")
}

/// Whether another disk begins at a directory.
fn is_mount(target: &Path, meta: &fs::Metadata) -> bool {
    let above = fs::metadata(parent(target)).ok();
    above.is_some_and(|above| sys::disk(&above) != sys::disk(meta))
}

impl Places {
    /// Of files of these lengths.
    ///
    /// # Errors
    /// `Misuse` for paths that are no names of files, and directories that are not there.
    pub fn files(targets: &[(PathBuf, u64)]) -> Result<Self> {
        let files = targets.iter().map(|(target, len)| Ok((Place::of_file(target)?, *len)));
        Ok(Self { directory: None, files: files.collect::<Result<_>>()?, replaces: false })
    }

    /// Of a directory of such files.
    ///
    /// # Errors
    /// The same, and `Misuse` for a name that leads out of the directory.
    pub fn directory(target: &Path, files: &[(PathBuf, u64)], replaces: bool) -> Result<Self> {
        let directory = Place::of(target)?;
        let mut inside = Vec::with_capacity(files.len());
        for (name, len) in files {
            if name.as_os_str().is_empty() || name.components().any(|c| !matches!(c, Component::Normal(_))) {
                let why = format!("{name:?} is no name of a file in the directory");
                return Err(Error::misuse(why).at(target));
            }
            let Place { target, temporary } = &directory;
            inside.push((Place { target: target.join(name), temporary: temporary.join(name) }, *len));
        }
        Ok(Self { directory: Some(directory), files: inside, replaces })
    }

    /// The directory, or the first of the files.
    ///
    /// # Errors
    /// `Misuse` where there is none.
    pub fn first(&self) -> Result<&Place> {
        let first = self.directory.as_ref().or(self.files.first().map(|(place, _)| place));
        first.ok_or_else(|| Error::misuse("no output"))
    }

    /// The directory that the output appears in.
    ///
    /// # Errors
    /// As [`Self::first`].
    pub fn parent(&self) -> Result<&Path> {
        Ok(parent(&self.first()?.target))
    }

    /// Where the journal lies.
    ///
    /// # Errors
    /// As [`Self::first`].
    pub fn journal(&self) -> Result<PathBuf> {
        Journal::path_for(&self.first()?.target)
    }

    /// Refuses what exists and must not be replaced, but for what is `ours`.
    ///
    /// # Errors
    /// `Misuse`; `Io`.
    pub fn check(&self, force: bool, ours: &dyn Fn(&Path) -> bool) -> Result<()> {
        if let Some(directory) = &self.directory {
            return if ours(&directory.target) { Ok(()) } else { directory.check(true, force) };
        }
        let mut others = self.files.iter().filter(|(place, _)| !ours(&place.target));
        others.try_for_each(|(place, _)| place.check(false, force))
    }

    /// Whether the disk has room, what an earlier process left there counted in.
    ///
    /// # Errors
    /// `Io`.
    pub fn check_space(&self) -> Result<()> {
        let Some(free) = sys::free_space(self.parent()?) else { return Ok(()) };
        let held = |(place, _): &(Place, u64)| {
            fs::symlink_metadata(&place.temporary).map_or(0, |meta| sys::allocated(&meta))
        };
        let held = self.files.iter().map(held).fold(0, u64::saturating_add);
        let bytes = self.files.iter().map(|(_, len)| *len).fold(0, u64::saturating_add);
        if free.saturating_add(held) >= bytes {
            return Ok(());
        }
        let why = format!("{bytes} bytes are needed, the disk has {free} left");
        Err(Error::io("write", &self.first()?.target, std::io::Error::new(ErrorKind::StorageFull, why)))
    }

    /// Opens what an earlier process left, if all is there with its length, and nobody else put it there.
    pub fn open(&self) -> Option<Vec<OutputFile>> {
        if let Some(directory) = &self.directory
            && !fs::symlink_metadata(&directory.temporary).ok()?.is_dir()
        {
            return None;
        }
        let mut files = Vec::with_capacity(self.files.len());
        for (Place { temporary, .. }, len) in &self.files {
            // Directories in the directory are no links either.
            let own = self.directory.as_ref().map_or(Path::new(""), |d| &d.temporary);
            for inner in temporary.ancestors().skip(1).take_while(|p| p.starts_with(own) && *p != own) {
                if self.directory.is_some() && !fs::symlink_metadata(inner).ok()?.is_dir() {
                    return None;
                }
            }
            let file = sys::open_no_link(temporary).ok()?;
            let meta = file.metadata().ok()?;
            if !sys::is_own(&meta) || meta.len() != *len {
                return None;
            }
            files.push(OutputFile { path: temporary.clone(), file });
        }
        Some(files)
    }

    /// Makes the files, with their lengths.
    ///
    /// # Errors
    /// `Io`; what lies there is not opened.
    pub fn create(&self) -> Result<Vec<OutputFile>> {
        let failed = |path: &Path, e| Error::io("create", path, e);
        if let Some(Place { temporary, .. }) = &self.directory {
            fs::create_dir(temporary).map_err(|e| failed(temporary, e))?;
        }
        let mut files = Vec::with_capacity(self.files.len());
        for (Place { temporary: path, target }, len) in &self.files {
            if self.directory.is_some()
                && let Some(inner) = path.parent()
            {
                fs::create_dir_all(inner).map_err(|e| failed(inner, e))?;
            }
            let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path);
            let file = file.map_err(|e| failed(path, e))?;
            sys::take_mode(path, target, false);
            file.set_len(*len).map_err(|e| failed(path, e))?;
            files.push(OutputFile { path: path.clone(), file });
        }
        Ok(files)
    }

    /// Removes what lies where the output grows, whatever it is.
    ///
    /// # Errors
    /// `Io`.
    pub fn clear(&self) -> Result<()> {
        match &self.directory {
            Some(directory) => remove(&directory.temporary),
            None => self.files.iter().try_for_each(|(place, _)| remove(&place.temporary)),
        }
    }
}

/// Removes a file, a link or a whole directory, if it is there.
///
/// # Errors
/// `Io`.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// The directory that a path is in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
