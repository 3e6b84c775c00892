//! A `.qpack` file with its segments compressed, or without. How long they will be is known when they are there:
//! this reads a finished file and appends to another.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

use super::plan::Budget;
use super::stage::{OutputFile, Stage};
use super::stream::Observer;
use crate::container::qpack::planes::{CHUNK, Planes};
use crate::container::qpack::{ALIGNMENT, Content, Manifest, Qpack, SUFFIX, Segment, ShardSeal, write};
use crate::container::shards::{shard_name, split_shard_name};
use crate::error::{Error, Result};
use crate::sha256::Sha256;
use crate::tensor::DType;
use crate::work::each;

/// What was written.
#[derive(Clone, Debug)]
pub struct Recompressed {
    /// The files.
    pub outputs: Vec<PathBuf>,
    /// Bytes of the files that were read.
    pub bytes_before: u64,
    /// Bytes of those that were written.
    pub bytes: u64,
}

/// Writes the model in `source` to `output`, each segment compressed where that saves more than a 32nd, or, where
/// `compress` is not set, as it is without. A set stays a set with the same tensors in each file. The bytes do not
/// depend on threads; without compression they are those of the file as it was first written. Signatures are left
/// out: they are of other bytes. Each thread holds about 8 MiB.
///
/// The observer is told of bytes without compression.
///
/// # Errors
/// `Misuse` where an output exists (unless `force`), or is an input; `Malformed` for segments that are damaged; `Io`;
/// `Interrupted`. Nothing is left then.
pub fn recompress(
    source: &Qpack,
    output: &Path,
    compress: bool,
    force: bool,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Recompressed> {
    let manifests: Vec<_> = source.manifests().collect();
    let outputs = names(output, manifests.len() as u64);
    let mut targets = Vec::with_capacity(outputs.len());
    let mut bytes_before = 0;
    for ((path, manifest), target) in manifests.iter().zip(&outputs) {
        if let (Ok(a), Ok(b)) = (path.canonicalize(), target.canonicalize())
            && a == b
        {
            return Err(Error::misuse("is read, and cannot be written").at(target).hint("give another name"));
        }
        bytes_before += path.metadata().map_err(|e| Error::io("read", path, e))?.len();
        targets.push((target.clone(), most_bytes(manifest)?));
    }
    let stage = Stage::files_at(&targets, force)?;
    let mut seals: Vec<ShardSeal> = Vec::with_capacity(outputs.len());
    for (number, (_, manifest)) in manifests.iter().enumerate() {
        let file = &stage.files()[number];
        let mut writer = Writer { file, at: ALIGNMENT, threads: budget.threads, observer };
        file.write_at(0, &write::header())?;
        let mut manifest = (*manifest).clone();
        let planes = compress.then(|| planes_of(&manifest)).transpose()?;
        let mut segments = Vec::new();
        for (k, content) in source.contents(number).enumerate() {
            let planes = planes.as_ref().and_then(|p| p.get(k).copied());
            segments.push(writer.segment(&content?, planes)?);
        }
        manifest.set_segments(segments);
        if let Some(split) = manifest.split.as_mut().filter(|s| !s.seals.is_empty()) {
            split.seals.clone_from(&seals);
        }
        let (at, end, seal) = write::ending(&manifest)?;
        if at != writer.at {
            return Err(Error::misuse("segments are not where the manifest has them"));
        }
        file.write_at(at, &end)?;
        file.cut(seal.bytes)?;
        seals.push(seal);
    }
    stage.commit()?;
    Ok(Recompressed { outputs, bytes_before, bytes: seals.iter().map(|s| s.bytes).sum() })
}

/// The names of the files of a set, or of one.
fn names(output: &Path, count: u64) -> Vec<PathBuf> {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    if count == 1 {
        return vec![output.to_path_buf()];
    }
    let stem = match split_shard_name(&name, SUFFIX) {
        Some((stem, ..)) => stem,
        None => name.strip_suffix(&format!(".{SUFFIX}")).unwrap_or(&name),
    };
    (0..count).map(|no| output.with_file_name(shard_name(stem, no, count, SUFFIX))).collect()
}

/// What a file takes at most.
fn most_bytes(manifest: &Manifest) -> Result<u64> {
    let mut most = manifest.clone();
    // As if all were compressed, and nothing saved.
    let noted = |s: &Segment| Segment {
        bytes: s.content_bytes().max(s.bytes),
        sha256: s.sha256,
        compression: Some(Planes::of(8).note(s.content_bytes(), s.sha256)),
    };
    most.set_segments(manifest.segments().map(noted).collect());
    let (_, _, seal) = write::ending(&most)?;
    Ok(seal.bytes)
}

/// How each segment is divided: by the size of its elements, where it has such.
fn planes_of(manifest: &Manifest) -> Result<Vec<Planes>> {
    let mut planes: Vec<_> = manifest.files.iter().map(|_| Planes::of(1)).collect();
    for tensor in &manifest.tensors {
        let sizes = tensor.encoding.parts(&tensor.shape)?.unwrap_or_default();
        let size = |dtype: DType| if dtype.is_block() { 1 } else { dtype.type_size() };
        let of_part = |k: usize| sizes.get(k).map_or(1, |part| size(part.dtype));
        planes.extend((0..tensor.parts.len()).map(|k| Planes::of(of_part(k))));
    }
    Ok(planes)
}

/// A file that grows.
struct Writer<'a> {
    file: &'a OutputFile,
    /// Where the next segment begins.
    at: u64,
    threads: usize,
    observer: &'a dyn Observer,
}

/// A chunk on its way.
#[derive(Default)]
struct Slot {
    content: Vec<u8>,
    stored: Vec<u8>,
    entries: Vec<u32>,
}

/// What is summed up while chunks pass.
struct Sums {
    content: Sha256,
    stored: Sha256,
}

/// What a thread does with a window of chunks.
enum Task {
    /// Sums what was read before.
    Sum,
    /// Sums and writes what was compressed before.
    Write,
    /// Reads and compresses.
    Fill(usize),
}

impl Writer<'_> {
    /// Appends a segment, compressed where that is wished and worth it.
    fn segment(&mut self, content: &Content<'_>, planes: Option<Planes>) -> Result<Segment> {
        let bytes = content.bytes();
        if let Some(planes) = planes.filter(|_| bytes > 0 && !content.is_closed()) {
            let (stored, sums) = self.chunks(content, Some(planes), true)?;
            content.check(sums.content.finalize())?;
            if Planes::is_worth(bytes, stored) {
                let compression = Some(planes.note(bytes, content.sha256()));
                self.pad(stored)?;
                return Ok(Segment { bytes: stored, sha256: sums.stored.finalize(), compression });
            }
        }
        let tells = planes.is_none() || content.is_closed();
        let (_, sums) = self.chunks(content, None, tells)?;
        content.check(sums.content.finalize())?;
        self.pad(bytes)?;
        let is_closed = content.is_closed();
        let compression = content.segment().compression.clone().filter(|_| is_closed);
        Ok(Segment { bytes, sha256: content.sha256(), compression })
    }

    /// Goes to the next segment's place, with zeros up to it.
    fn pad(&mut self, bytes: u64) -> Result<()> {
        let too_long = || Error::malformed("a file would exceed 2^64 bytes");
        let end = self.at.checked_add(bytes).ok_or_else(too_long)?;
        let next = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_long)?;
        self.file.write_at(end, &vec![0; (next - end) as usize])?;
        self.at = next;
        Ok(())
    }

    /// Writes all chunks from `self.at` on, and says how many bytes that were. While a window of chunks is read and
    /// compressed, the one before is summed and written.
    fn chunks(&self, content: &Content<'_>, planes: Option<Planes>, tells: bool) -> Result<(u64, Sums)> {
        let chunk = planes.map_or(CHUNK, |p| p.chunk);
        let count = content.bytes().div_ceil(chunk) as usize;
        let threads = if count > 1 { self.threads } else { 1 };
        let width = count.min(2 * threads.clamp(1, 32));
        let window = || (0..width).map(|_| RwLock::<Slot>::default()).collect::<Vec<_>>();
        let (mut front, mut back) = (window(), window());
        let (content_sum, stored_sum) = (Mutex::new(Sha256::new()), Mutex::new(Sha256::new()));
        let written = Mutex::new(0u64);
        let mut entries: Vec<u32> = Vec::new();
        let (mut next, mut filled) = (0, 0);
        while next < count || filled > 0 {
            let n = width.min(count - next);
            let mut tasks = Vec::with_capacity(n + 2);
            if filled > 0 {
                tasks.extend([Task::Sum, Task::Write]);
            }
            tasks.extend((0..n).map(Task::Fill));
            each(
                &tasks,
                threads,
                || (),
                |(), task| match task {
                    Task::Sum => {
                        let mut sum = lock(&content_sum);
                        back[..filled].iter().for_each(|slot| sum.update(&look(slot).content));
                        Ok(())
                    }
                    Task::Write => {
                        let (mut sum, mut written) = (lock(&stored_sum), lock(&written));
                        for slot in &back[..filled] {
                            let slot = look(slot);
                            let bytes = if planes.is_some() { &slot.stored } else { &slot.content };
                            if planes.is_some() {
                                sum.update(bytes);
                            }
                            self.file.write_at(self.at + *written, bytes)?;
                            *written += bytes.len() as u64;
                        }
                        Ok(())
                    }
                    Task::Fill(k) => {
                        let slot = &mut *front[*k].write().unwrap_or_else(|e| e.into_inner());
                        let start = (next + k) as u64 * chunk;
                        self.fill(content, start..content.bytes().min(start + chunk), planes, slot, tells)
                    }
                },
            )?;
            back[..filled].iter().for_each(|slot| entries.extend(&look(slot).entries));
            std::mem::swap(&mut front, &mut back);
            (next, filled) = (next + n, n);
        }
        let mut written = written.into_inner().unwrap_or_else(|e| e.into_inner());
        let mut stored = stored_sum.into_inner().unwrap_or_else(|e| e.into_inner());
        let table: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        self.file.write_at(self.at + written, &table)?;
        stored.update(&table);
        written += table.len() as u64;
        let content = content_sum.into_inner().unwrap_or_else(|e| e.into_inner());
        Ok((written, Sums { content, stored }))
    }

    fn fill(
        &self,
        content: &Content<'_>,
        bytes: Range<u64>,
        planes: Option<Planes>,
        slot: &mut Slot,
        tells: bool,
    ) -> Result<()> {
        if self.observer.interrupted() {
            return Err(Error::interrupted());
        }
        slot.content.resize((bytes.end - bytes.start) as usize, 0);
        content.read(bytes.start, &mut slot.content)?;
        slot.stored.clear();
        slot.entries.clear();
        if let Some(planes) = planes {
            planes.compress(&slot.content, &mut slot.stored, &mut slot.entries);
        }
        if tells {
            self.observer.advance(slot.content.len() as u64, content.name());
        }
        Ok(())
    }
}

fn look<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(|e| e.into_inner())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
