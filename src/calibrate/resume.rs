//! A long output that a killed process leaves resumable: finished parts lie in the unfinished file, beside
//! it a small description of how far the work is, with the sums of what is unfinished.
//!
//! Both are hidden files beside the output, `.NAME.qconv-partial` and `.NAME.qconv-state`. The state is
//! replaced as a whole, after everything that it calls finished has reached the disk.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
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
        if work.state.exists() && !force {
            return Err(Error::misuse("an unfinished calibration lies here")
                .at(&work.state)
                .hint("finish it, choose another output, or drop it with --force"));
        }
        work.begin(header, total)?;
        Ok(work)
    }

    fn create(target: &Path, force: bool) -> Result<Self> {
        let target = target.canonicalize().unwrap_or_else(|_| target.to_path_buf());
        let name = target.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(&target))?;
        let name = name.to_string_lossy();
        if target.is_dir() {
            return Err(Error::misuse("is a directory, a file is written").at(&target));
        }
        if target.exists() && !force {
            return Err(Error::misuse("exists already").at(&target).hint("--force overwrites it"));
        }
        let partial = target.with_file_name(format!(".{name}.qconv-partial"));
        let state = target.with_file_name(format!(".{name}.qconv-state"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&partial);
        let file = file.map_err(|e| Error::io("create", &partial, e))?;
        if file.try_lock().is_err() {
            return Err(Error::misuse("another qconv is writing this output").at(&target));
        }
        Ok(Self { target, partial, state, file })
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
        if self.state.exists() {
            fs::remove_file(&self.state).map_err(|e| Error::io("remove", &self.state, e))?;
        }
        let sized = self.file.set_len(0).and_then(|()| self.file.set_len(total));
        sized.map_err(|e| Error::io("create", &self.partial, e))?;
        self.write_at(0, header)
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
        if !self.state.exists() {
            return Ok(None);
        }
        let (file, len) = open_regular(&self.state)?;
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
        let mut next = self.state.clone().into_os_string();
        next.push("-next");
        let next = PathBuf::from(next);
        let write = || -> std::io::Result<()> {
            let mut file = BufWriter::with_capacity(BUFFER, File::create(&next)?);
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
