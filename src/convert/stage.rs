//! Outputs appear whole or not at all: they grow under a temporary name beside the final one, and
//! are renamed when complete.

use std::fs::{self, File, OpenOptions};
use std::path::{Component, Path, PathBuf};

use super::journal::Journal;
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

/// An output that is not visible under its final name yet. Dropped without [`Stage::commit`] or
/// [`Stage::keep`], it removes what it wrote.
#[derive(Debug)]
pub struct Stage {
    /// The directory that will appear as a whole, with its temporary name.
    directory: Option<(PathBuf, PathBuf)>,
    /// Files being written.
    files: Vec<OutputFile>,
    /// Their final names.
    targets: Vec<PathBuf>,
    /// Whether the files stay when this is dropped.
    stays: bool,
    /// Whether a directory that exists goes as a whole, with what else is in it.
    replaces: bool,
}

impl Stage {
    /// Begins files of the given lengths, each of which will appear at its path: a file, or the
    /// shards of one.
    ///
    /// # Errors
    /// `Misuse` when one exists and `force` is off, or somebody else is writing it; `Io` when it
    /// cannot be created or the disk has not enough bytes free for all.
    pub fn files_at(targets: &[(PathBuf, u64)], force: bool) -> Result<Self> {
        let mut stage = Self::open(targets, force)?;
        stage.stays = false;
        stage.clear(targets)?;
        Ok(stage)
    }

    /// Goes on with such files where an earlier process left them, with a journal of this `key`, if that is
    /// wished; begins them otherwise. What is there stays when this fails.
    ///
    /// # Errors
    /// As [`Self::files_at`].
    pub(super) fn going_on(
        targets: &[(PathBuf, u64)],
        force: bool,
        key: &str,
        resume: bool,
    ) -> Result<(Self, Journal)> {
        let mut stage = Self::open(targets, force)?;
        let is_whole = |(f, (_, bytes)): (&OutputFile, &(PathBuf, u64))| {
            f.file.metadata().is_ok_and(|meta| meta.len() == *bytes)
        };
        let whole = stage.files.iter().zip(targets).all(is_whole);
        let first = stage.targets.first().ok_or_else(|| Error::misuse("no output"))?;
        let journal = Journal::open(Journal::path_for(first)?, key, resume && whole)?;
        stage.stays = false;
        if !journal.is_begun() {
            stage.clear(targets)?;
        }
        Ok((stage, journal))
    }

    /// Opens the files as they are; what they hold stays for now.
    fn open(targets: &[(PathBuf, u64)], force: bool) -> Result<Self> {
        let bytes = targets.iter().map(|(_, bytes)| bytes).sum();
        let mut places = Vec::with_capacity(targets.len());
        for (target, _) in targets {
            places.push(prepare(target, force, bytes, false)?);
        }
        let mut stage =
            Self { directory: None, files: Vec::new(), targets: Vec::new(), stays: true, replaces: false };
        for (target, temporary) in places {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&temporary)
                .map_err(|e| Error::io("create", &temporary, e))?;
            if file.try_lock().is_err() {
                return Err(Error::misuse("another qconv is writing this output").at(&target));
            }
            stage.files.push(OutputFile { path: temporary, file });
            stage.targets.push(target);
        }
        Ok(stage)
    }

    /// Empties the files, and gives them their lengths.
    fn clear(&self, targets: &[(PathBuf, u64)]) -> Result<()> {
        for (f, (_, bytes)) in self.files.iter().zip(targets) {
            let sized = f.file.set_len(0).and_then(|()| f.file.set_len(*bytes));
            sized.map_err(|e| Error::io("create", &f.path, e))?;
        }
        Ok(())
    }

    /// Leaves the files as they are, for a later process to go on with.
    pub fn keep(mut self) {
        self.stays = true;
    }

    /// Begins a directory at `target`; `bytes` are what all its files will take.
    ///
    /// # Errors
    /// As [`Self::files_at`]; an empty directory may exist.
    pub fn directory(target: &Path, force: bool, bytes: u64) -> Result<Self> {
        let (target, temporary) = prepare(target, force, bytes, true)?;
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(|e| Error::io("remove", &temporary, e))?;
        }
        fs::create_dir(&temporary).map_err(|e| Error::io("create", &temporary, e))?;
        let directory = Some((target, temporary));
        Ok(Self { directory, files: Vec::new(), targets: Vec::new(), stays: false, replaces: false })
    }

    /// Lets a directory that exists go as a whole, with what else is in it.
    #[must_use]
    pub fn replacing(mut self) -> Self {
        self.replaces = true;
        self
    }

    /// Adds a file of `len` bytes to a directory, or to one in it.
    ///
    /// # Errors
    /// `Io` when it cannot be created, `Misuse` for a name that leads out of the directory.
    pub fn add(&mut self, name: &Path, len: u64) -> Result<()> {
        let Some((target, temporary)) = &self.directory else {
            return Err(Error::misuse("files are added to directories only"));
        };
        if name.components().any(|c| !matches!(c, Component::Normal(_))) {
            return Err(Error::misuse(format!("{name:?} is no name of a file in the directory")).at(target));
        }
        let path = temporary.join(name);
        if let Some(inner) = name.parent().filter(|p| !p.as_os_str().is_empty()) {
            let inner = temporary.join(inner);
            fs::create_dir_all(&inner).map_err(|e| Error::io("create", &inner, e))?;
        }
        let file = File::create_new(&path).map_err(|e| Error::io("create", &path, e))?;
        self.targets.push(target.join(name));
        self.files.push(OutputFile { path: path.clone(), file });
        let sized = self.files.last().map(|f| f.file.set_len(len));
        sized.unwrap_or(Ok(())).map_err(|e| Error::io("create", &path, e))
    }

    /// The files, in the order they were added.
    pub fn files(&self) -> &[OutputFile] {
        &self.files
    }

    /// Flushes everything to the disk and gives it its final name. Shards are renamed one after
    /// another: should that fail midway, those renamed before stay.
    ///
    /// # Errors
    /// `Io`; the temporary files are removed then.
    pub fn commit(mut self) -> Result<()> {
        for f in &self.files {
            f.file.sync_all().map_err(|e| Error::io("flush", &f.path, e))?;
        }
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| Error::io("rename to", to, e));
        match &self.directory {
            Some((target, temporary)) if !target.is_dir() => rename(temporary, target)?,
            Some((target, temporary)) if self.replaces => {
                let name = target.file_name().unwrap_or_default().to_string_lossy();
                let old = target.with_file_name(format!(".{name}.qconv-old"));
                if old.exists() {
                    fs::remove_dir_all(&old).map_err(|e| Error::io("remove", &old, e))?;
                }
                rename(target, &old)?;
                if let Err(e) = rename(temporary, target) {
                    rename(&old, target)?;
                    return Err(e);
                }
                fs::remove_dir_all(&old).map_err(|e| Error::io("remove", &old, e))?;
            }
            directory => {
                for (f, target) in self.files.iter().zip(&self.targets) {
                    if let (Some(_), Some(inner)) = (directory, target.parent()) {
                        fs::create_dir_all(inner).map_err(|e| Error::io("create", inner, e))?;
                    }
                    rename(&f.path, target)?;
                }
                if let Some((target, temporary)) = directory {
                    remove_stale(target, &self.targets)?;
                    fs::remove_dir_all(temporary).map_err(|e| Error::io("remove", temporary, e))?;
                }
            }
        }
        self.stays = true;
        let parent = self.directory.as_ref().map(|(d, _)| d).or(self.targets.first());
        sys::sync_directory(parent.and_then(|p| p.parent()).unwrap_or(Path::new(".")));
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        // Nothing better can be done with a failure here: the error that led here is the news.
        let _ = self.directory.as_ref().map(|(_, temporary)| fs::remove_dir_all(temporary));
        if self.directory.is_none() {
            self.files.iter().for_each(|f| {
                let _ = fs::remove_file(&f.path);
            });
        }
    }
}

/// Removes weights, indexes and what tells of their packing from a directory that was written into, where they
/// are not of this output: readers would take them for a part of it.
fn remove_stale(directory: &Path, written: &[PathBuf]) -> Result<()> {
    let entries = fs::read_dir(directory).map_err(|e| Error::io("read", directory, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read", directory, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_weights = (name.starts_with("model") && name.ends_with(".safetensors"))
            || (name.starts_with("pytorch_model") && name.ends_with(".bin"));
        let tells = name.ends_with(".index.json") || name == "quantize_config.json";
        if (is_weights || tells) && !written.contains(&path) {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// A file that is needed for a while: gone when dropped.
#[derive(Debug)]
pub struct Temporary(pub PathBuf);

impl Temporary {
    /// A hidden name beside `output`, where a file of its size finds room.
    pub fn beside(output: &Path, what: &str) -> Self {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        Self(output.with_file_name(format!(".{name}.qconv-{what}")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may never have been written.
        let _ = fs::remove_file(&self.0);
    }
}

/// Checks the target, and names the temporary beside it.
fn prepare(target: &Path, force: bool, bytes: u64, is_dir: bool) -> Result<(PathBuf, PathBuf)> {
    // Through a symbolic link the file it points to is replaced, and the link stays.
    let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
    let name = target
        .file_name()
        .ok_or_else(|| Error::misuse("is no name for an output").at(&target))?
        .to_string_lossy()
        .into_owned();
    if let Ok(meta) = fs::symlink_metadata(&target) {
        let exists = |what: &str| Err(Error::misuse(what).at(&target).hint("--force overwrites it"));
        match (is_dir, meta.is_dir()) {
            (false, true) => return Err(Error::misuse("is a directory").at(&target)),
            (true, false) => return Err(Error::misuse("exists and is no directory").at(&target)),
            (false, false) if !force => return exists("exists already"),
            (true, true) if !force => {
                let mut entries = fs::read_dir(&target).map_err(|e| Error::io("read", &target, e))?;
                if entries.next().is_some() {
                    return exists("exists already and is not empty");
                }
            }
            _ => {}
        }
    }
    let parent = match target.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if !parent.is_dir() {
        return Err(Error::misuse("the directory for the output does not exist").at(&parent));
    }
    let temporary = parent.join(format!(".{name}.qconv-partial"));
    // What an earlier process left there is overwritten.
    let held = fs::metadata(&temporary).map_or(0, |meta| sys::allocated(&meta));
    if let Some(free) = sys::free_space(&parent)
        && free.saturating_add(held) < bytes
    {
        return Err(Error::io(
            "write",
            &target,
            std::io::Error::new(
                std::io::ErrorKind::StorageFull,
                format!("{bytes} bytes are needed, the disk has {free} left"),
            ),
        ));
    }
    Ok((target, temporary))
}
