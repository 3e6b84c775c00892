//! A long output that a killed process leaves resumable: finished parts lie in the unfinished file, beside
//! it a small description of how far the work is, with the sums of what is unfinished.
//!
//! Both are hidden files beside the output, `.NAME.qconv-partial` and `.NAME.qconv-state`. The state is
//! replaced as a whole, after everything that it calls finished has reached the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::plan::{BUFFER, Plan};
use crate::container::open_regular;
use crate::error::{Error, Result};
use crate::sys;

/// How far the work is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// SHA-256 of the header of the output: model, text, inputs.
    pub job: String,
    /// Units in the file.
    pub done: u64,
    /// Where the pass ends whose sums follow; `done` where none do.
    pub end: u64,
    /// Windows of the text behind these sums.
    pub windows: usize,
}

/// An output in the making.
#[derive(Debug)]
pub struct Workplace {
    target: PathBuf,
    partial: PathBuf,
    state: PathBuf,
    file: File,
}

/// Longest description.
const MAX_STATE: usize = 4096;
/// Values written at once.
const VALUES: usize = 512;

impl Workplace {
    /// Begins the output `target`, or goes on with it where the same job was left unfinished. Returns the
    /// state, and the sums of the units of its pass.
    ///
    /// # Errors
    /// `Misuse` when the output exists, or another job is unfinished there, and `force` is off; or
    /// somebody else works on it. `Io`.
    pub fn open(target: &Path, plan: &Plan, job: &str, force: bool) -> Result<(Self, State, Vec<Vec<f64>>)> {
        let work = Self::create(target, force)?;
        let total = plan.layout.total_len;
        let fresh = State { job: job.into(), ..State::default() };
        match work.load(plan) {
            Ok(Some((state, sums))) if state.job == job && work.len()? == total => {
                return Ok((work, state, sums));
            }
            Ok(None) => {}
            // What nobody can go on with is in the way of nothing.
            Err(_) if force => {}
            Ok(Some((state, _))) if force || state.job == job => {}
            Ok(Some(_)) => {
                return Err(Error::misuse(
                    "an unfinished calibration of another model, text or choice lies here",
                )
                .at(&work.state)
                .hint("finish it with its own options, choose another output, or drop it with --force"));
            }
            Err(e) => return Err(e.hint("--force begins anew")),
        }
        work.begin(&plan.layout.header, total)?;
        Ok((work, fresh, Vec::new()))
    }

    /// Begins the output `target` anew, without a way to go on.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn anew(target: &Path, header: &[u8], total: u64, force: bool) -> Result<Self> {
        let work = Self::create(target, force)?;
        if fs::symlink_metadata(&work.state).is_ok() && !force {
            return Err(Error::misuse("an unfinished calibration lies here")
                .at(&work.state)
                .hint("finish it, choose another output, or drop it with --force"));
        }
        work.begin(header, total)?;
        Ok(work)
    }

    fn create(target: &Path, force: bool) -> Result<Self> {
        if sys::ends_as_directory(target) && !target.exists() {
            return Err(Error::misuse("ends as a directory does, and there is none")
                .at(target)
                .hint("give the name of a file"));
        }
        // Through a link what it points to is replaced, and the link stays.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
        target.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(&target))?;
        check(&target, force)?;
        let partial = sys::hidden(&target, "partial");
        let Some(file) = sys::open_locked(&partial)? else {
            return Err(Error::misuse("another qconv is writing this output").at(&target));
        };
        let work = Self { state: sys::hidden(&target, "state"), target, partial, file };
        // Who held it may have finished the output in the meantime.
        match check(&work.target, force) {
            Err(e) => {
                let _ = fs::remove_file(&work.partial);
                Err(e)
            }
            Ok(()) => Ok(work),
        }
    }

    fn begin(&self, header: &[u8], total: u64) -> Result<()> {
        let dir = self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Some(free) = sys::free_space(dir)
            && free < total
        {
            let _ = fs::remove_file(&self.partial);
            let full = format!("{total} bytes are needed, the disk has {free} left");
            let full = std::io::Error::new(std::io::ErrorKind::StorageFull, full);
            return Err(Error::io("write", &self.target, full));
        }
        remove(&self.state)?;
        let sized = self.file.set_len(0).and_then(|()| self.file.set_len(total));
        let begun = sized.map_err(|e| Error::io("create", &self.partial, e)).and_then(|()| {
            sys::take_mode(&self.partial, &self.target, false);
            self.write_at(0, header)
        });
        if begun.is_err() {
            // Nobody could go on with it.
            let _ = fs::remove_file(&self.partial);
        }
        begun
    }

    fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|e| Error::io("read", &self.partial, e))?.len())
    }

    /// Writes `bytes` at `offset` of the output.
    ///
    /// # Errors
    /// `Io`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        sys::write_all_at(&self.file, bytes, offset).map_err(|e| Error::io("write", &self.partial, e))
    }

    /// Reads the state, `None` where there is none. Sums are read only as far as `plan` has units.
    fn load(&self, plan: &Plan) -> Result<Option<(State, Vec<Vec<f64>>)>> {
        let (file, len) = match fs::symlink_metadata(&self.state) {
            Ok(meta) if meta.is_dir() => {
                return Err(Error::misuse("is a directory, where a state would be kept").at(&self.state));
            }
            // What somebody else put there is nothing to go on with.
            Ok(meta) if !sys::is_own(&meta) => return Ok(None),
            Ok(_) => open_regular(&self.state)?,
            Err(_) => return Ok(None),
        };
        let unsound = || Error::malformed("is no sound state of a calibration").at(&self.state);
        let mut file = BufReader::with_capacity(BUFFER, file);
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            file.read_exact(&mut byte).map_err(|_| unsound())?;
            match byte {
                [b'\n'] => break,
                _ if line.len() >= MAX_STATE => return Err(unsound()),
                _ => line.push(byte[0]),
            }
        }
        let state: State = serde_json::from_slice(&line).map_err(|_| unsound())?;
        if state.done > state.end || state.end > plan.units {
            // Of a job with other units.
            return Ok(Some((State { end: state.done, ..state }, Vec::new())));
        }
        let bytes: u64 = (state.done..state.end).map(|n| plan.unit_len(n) * 8).sum();
        if len != line.len() as u64 + 1 + bytes {
            return Ok(Some((
                State { end: state.done, windows: 0, job: String::new(), ..state },
                Vec::new(),
            )));
        }
        let mut sums = Vec::new();
        for n in state.done..state.end {
            let mut values = vec![0f64; plan.unit_len(n) as usize];
            file.read_exact(bytemuck::cast_slice_mut(&mut values))
                .map_err(|e| Error::io("read", &self.state, e))?;
            values.iter_mut().for_each(|v| *v = f64::from_bits(u64::from_le(v.to_bits())));
            sums.push(values);
        }
        Ok(Some((state, sums)))
    }

    /// Keeps the state, so that the work can go on from here.
    ///
    /// # Errors
    /// `Io`.
    pub fn save<'s>(&self, state: &State, sums: impl Iterator<Item = &'s [f64]>) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("flush", &self.partial, e))?;
        let next = sys::hidden(&self.target, "state-next");
        // Whatever lies there is removed, never opened.
        remove(&next)?;
        let write = || -> std::io::Result<()> {
            let file = OpenOptions::new().write(true).create_new(true).open(&next)?;
            let mut file = BufWriter::with_capacity(BUFFER, file);
            serde_json::to_writer(&mut file, state)?;
            file.write_all(b"\n")?;
            let mut bytes = [0u8; 8 * VALUES];
            for part in sums.flat_map(|s| s.chunks(VALUES)) {
                for (place, v) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(part) {
                    *place = v.to_le_bytes();
                }
                file.write_all(&bytes[..part.len() * 8])?;
            }
            file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
        };
        write().map_err(|e| Error::io("write", &next, e))?;
        fs::rename(&next, &self.state).map_err(|e| Error::io("rename to", &self.state, e))
    }

    /// Gives the finished output its name.
    ///
    /// # Errors
    /// `Io`.
    pub fn commit(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io("flush", &self.partial, e))?;
        let meta = self.file.metadata().map_err(|e| Error::io("read", &self.partial, e))?;
        if !sys::is_still(&self.partial, &meta) {
            return Err(Error::misuse("what was written is not there any more: another program removed it")
                .at(&self.partial));
        }
        sys::take_mode(&self.partial, &self.target, true);
        fs::rename(&self.partial, &self.target).map_err(|e| Error::io("rename to", &self.target, e))?;
        // Without the file it belongs to it means nothing any more.
        let _ = fs::remove_file(&self.state);
        sys::sync_directory(self.target.parent().unwrap_or(Path::new(".")));
        Ok(())
    }

    /// Removes what was written, where nobody can go on with it.
    pub fn discard(self) {
        // The error that led here is the news.
        let _ = fs::remove_file(&self.partial);
        let _ = fs::remove_file(&self.state);
    }
}

/// Refuses what exists and must not be replaced.
fn check(target: &Path, force: bool) -> Result<()> {
    let Ok(meta) = fs::symlink_metadata(target) else { return Ok(()) };
    match meta.is_dir() {
        true => Err(Error::misuse("is a directory, a file is written").at(target)),
        false if !meta.is_file() && !meta.is_symlink() => {
            Err(Error::misuse("exists and is no regular file").at(target))
        }
        false if !force => Err(Error::misuse("exists already").at(target).hint("--force overwrites it")),
        false => Ok(()),
    }
}

/// Removes a file or a link, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    const HEADER: &[u8] = b"head";

    fn begin(target: &Path, force: bool) -> Result<Workplace> {
        Workplace::anew(target, HEADER, 8, force)
    }

    fn save(work: &Workplace) {
        work.save(&State::default(), std::iter::empty()).unwrap();
    }

    /// Links, second names and pipes where an output grows, or its state: removed, not opened, not waited for.
    #[test]
    fn what_others_put_there_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (target, victim) = (dir.path().join("m.gguf"), dir.path().join("victim"));
        fs::write(&victim, "dear").unwrap();
        let soft = |at: &Path| symlink(&victim, at).unwrap();
        let hard = |at: &Path| fs::hard_link(&victim, at).unwrap();
        let pipe = |at: &Path| mknodat(CWD, at, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let ways: [&dyn Fn(&Path); 3] = [&soft, &hard, &pipe];
        for put in ways {
            for what in ["partial", "state", "state-next"] {
                put(&sys::hidden(&target, what));
                let work = begin(&target, true).unwrap();
                save(&work);
                save(&work);
                work.commit().unwrap();
                assert_eq!(fs::read(&victim).unwrap(), b"dear");
                assert_eq!(fs::read(&target).unwrap(), b"head\0\0\0\0");
                let mut names: Vec<_> =
                    fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
                names.sort();
                assert_eq!(names, ["m.gguf", "victim"], "{what}");
            }
        }
        // A pipe, a link, a private file under the name itself.
        assert_eq!(begin(&target, false).unwrap_err().kind(), crate::error::ErrorKind::Misuse);
        fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        begin(&target, true).unwrap().commit().unwrap();
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        fs::remove_file(&target).unwrap();
        pipe(&target);
        assert!(begin(&target, true).unwrap_err().to_string().contains("no regular file"));
        assert!(begin(&dir.path().join("none/"), true).unwrap_err().to_string().contains("directory"));
    }

    /// One at a time; and nobody gives a name to what another put in the place of what was written.
    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.gguf");
        let work = begin(&target, false).unwrap();
        assert!(begin(&target, true).unwrap_err().to_string().contains("another qconv"));
        fs::remove_file(&work.partial).unwrap();
        fs::write(&work.partial, "another's").unwrap();
        assert!(work.commit().unwrap_err().to_string().contains("not there any more"));
        assert!(!target.exists());
    }
}
