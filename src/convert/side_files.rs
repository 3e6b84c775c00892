//! Where a model's small files are: in its directory, or in its `.qpack` file.

use std::fs;
use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

use tempfile::TempDir;

use super::to_qpack::stem;
use crate::container::InputFile;
use crate::container::qpack::{HEADERS, Qpack, is_qpack};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// A directory of side files. Those of a `.qpack` file lie in a temporary one, which is removed when this is
/// dropped.
#[derive(Debug)]
pub struct SideFiles {
    dir: PathBuf,
    /// The `.qpack` file that they are from, and what keeps them.
    packed: Option<(PathBuf, TempDir)>,
}

impl SideFiles {
    /// Of the model that `path` is, or is a file of.
    ///
    /// # Errors
    /// `Io`; what [`Qpack::open`] and [`Qpack::read_file`] say.
    pub fn of(path: &Path, limits: &Limits) -> Result<Self> {
        match is_qpack_file(path)? {
            true => Self::extract(&Qpack::open(path, limits)?, path, limits),
            false => {
                let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
                let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
                let dir = if meta.is_dir() { path } else { parent.unwrap_or(Path::new(".")) };
                Ok(Self { dir: dir.to_path_buf(), packed: None })
            }
        }
    }

    /// Those of a `.qpack` file, but for headers of weights.
    ///
    /// # Errors
    /// `Io`; `Malformed` for damaged bytes, and for files that cannot lie beside each other; `Limit` for too many
    /// bytes.
    pub fn extract(model: &Qpack, path: &Path, limits: &Limits) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("qconv-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
        let temporary = std::env::temp_dir();
        let kept = builder.tempdir().map_err(|e| Error::io("create a directory in", &temporary, e))?;
        for read in model.read_files(|file| !file.name.starts_with(HEADERS), limits)? {
            let (name, bytes) = read?;
            let inside = Path::new(&name);
            if inside.components().any(|c| !matches!(c, Component::Normal(_))) {
                let why = format!("file {name:?} would lie outside the model's directory");
                return Err(Error::malformed(why).at(path));
            }
            let target = kept.path().join(inside);
            let created = target
                .parent()
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| fs::File::create_new(&target).and_then(|mut out| out.write_all(&bytes)));
            created.map_err(|e| Error::io("extract", path, e).context(format_args!("file {name:?}")))?;
        }
        Ok(Self { dir: kept.path().to_path_buf(), packed: Some((path.to_path_buf(), kept)) })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the model is called: its directory's name, links and dots resolved, or its file's.
    pub fn model_name(&self) -> String {
        match &self.packed {
            Some((file, _)) => stem(file),
            None => {
                let full = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
                full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
            }
        }
    }

    /// Where something that is made of the model lies by default: beside its directory, or its file.
    pub fn beside(&self) -> &Path {
        let place = self.packed.as_ref().map_or(&self.dir, |(file, _)| file);
        place.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Lets an error name the `.qpack` file, and the file in it, where it names a temporary one.
    pub fn place(&self) -> impl Fn(Error) -> Error + use<> {
        let moved = self.packed.as_ref().map(|(file, _)| (self.dir.clone(), file.clone()));
        move |e| match &moved {
            Some((from, to)) => e.moved(from, to),
            None => e,
        }
    }
}

/// Whether a path is that of a `.qpack` file, by its content.
///
/// # Errors
/// `Io`.
pub fn is_qpack_file(path: &Path) -> Result<bool> {
    let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    Ok(meta.is_file() && is_qpack(&InputFile::open(path)?)?)
}
