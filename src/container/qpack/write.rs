//! Lays out files. All sizes are known beforehand, and so is the length of the manifest: what is not are the
//! SHA-256 in it, which have the same length whatever they are. [`Seal`] fills them in when the data are there.

use std::path::PathBuf;
use std::sync::OnceLock;

use serde_json::{Value as Json, json};

use super::SUFFIX;
pub use super::frame::header;
use super::frame::{FOOTER, Footer};
use super::manifest::{Manifest, ShardSeal, Split};
use super::sums::sums;
use crate::container::InputFile;
use crate::container::shards::{Ending, FileLayout, Layout, shard_name};
use crate::error::{Error, Result};
use crate::sha256::{Sha256, hex};

/// The end of a file, which says what the segments are.
#[derive(Debug)]
pub struct Seal {
    manifest: Manifest,
    sources: Sources,
    of_sources: OnceLock<Vec<[u8; 32]>>,
    /// Where each segment begins, and at last the manifest.
    places: Vec<u64>,
}

/// Reads and writes at offsets of a file.
pub type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> Result<()> + Sync + 'a;
/// As [`ReadAt`].
pub type WriteAt<'a> = dyn Fn(u64, &[u8]) -> Result<()> + Sync + 'a;
/// Is told how many bytes were read; `false` ends it.
pub type Seen<'a> = dyn Fn(u64) -> bool + Sync + 'a;

/// Lays out a model: `STEM.qpack`, or, where tensors have more than `max_shard_size` bytes, files of at most as
/// many in the order of the tensors; a tensor larger than that has a file of its own. The SHA-256 in `manifest`
/// play no part. There is a place for each segment: side files, then the parts of each tensor. `sources` are the
/// files that it is made from, which its provenance tells of.
///
/// # Errors
/// `Malformed` for what a reader would refuse; `Unsupported` for what has no place in a manifest; `Io` for
/// sources that are not there.
pub fn layout(
    stem: &str,
    mut manifest: Manifest,
    max_shard_size: u64,
    mut sources: Sources,
) -> Result<Layout> {
    sources.list(&mut manifest)?;
    let shards = divided(manifest, max_shard_size);
    let mut layout = Layout { files: Vec::new(), places: Vec::new(), index: None };
    let count = shards.len() as u64;
    let mut lengths = Vec::new();
    for (k, mut manifest) in shards.into_iter().enumerate() {
        let name = match count {
            1 => format!("{stem}.{SUFFIX}"),
            _ => shard_name(stem, k as u64, count, SUFFIX),
        };
        if count > 1 {
            let is_last = k as u64 + 1 == count;
            let seals = if is_last { std::mem::take(&mut lengths) } else { Vec::new() };
            manifest.split = Some(Split { no: k as u64 + 1, count, seals });
        }
        let (file, places) = sealed(name, manifest, std::mem::take(&mut sources))?;
        lengths.push(ShardSeal { bytes: file.len, ..ShardSeal::default() });
        layout.files.push(file);
        layout.places.extend(places.into_iter().map(|at| (k, at)));
    }
    Ok(layout)
}

/// The manifests of files of so many bytes of tensors; the first has the side files.
fn divided(mut whole: Manifest, max_shard_size: u64) -> Vec<Manifest> {
    let tensors = std::mem::take(&mut whole.tensors);
    let empty = |whole: &Manifest| Manifest { more: whole.more.clone(), ..Manifest::default() };
    let mut shards = vec![whole];
    let mut of_file = 0u64;
    for tensor in tensors {
        let nbytes = tensor.parts.iter().fold(0u64, |sum, p| sum.saturating_add(p.segment.bytes));
        let is_begun = shards.last().is_some_and(|m| !m.tensors.is_empty());
        if is_begun && of_file.saturating_add(nbytes) > max_shard_size {
            shards.push(empty(&shards[0]));
            of_file = 0;
        }
        of_file = of_file.saturating_add(nbytes);
        if let Some(last) = shards.last_mut() {
            last.tensors.push(tensor);
        }
    }
    shards
}

/// Lays out one file, and gives the place of each of its segments. The last file of a split model names the
/// lengths of the others, which their layouts tell.
///
/// # Errors
/// As [`layout`].
pub fn file(name: String, manifest: Manifest) -> Result<(FileLayout, Vec<u64>)> {
    sealed(name, manifest, Sources::default())
}

fn sealed(name: String, manifest: Manifest, sources: Sources) -> Result<(FileLayout, Vec<u64>)> {
    let places = manifest.places()?;
    let at = places.last().copied().unwrap_or_default();
    let len = at.checked_add(manifest.bytes()?.len() as u64).and_then(|n| n.checked_add(FOOTER));
    let len = len.ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
    let of_segments = places[..places.len() - 1].to_vec();
    let ending =
        Some(Ending::Qpack(Box::new(Seal { manifest, sources, of_sources: OnceLock::new(), places })));
    Ok((FileLayout { name, header: header().to_vec(), len, ending }, of_segments))
}

/// What a model is made from: files whose SHA-256 are to stand in its provenance.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Those with its weights.
    pub files: Vec<PathBuf>,
    /// Second moments, or the importance matrix.
    pub calibration: Option<PathBuf>,
}

impl Sources {
    /// Lists them in the provenance, without their SHA-256.
    fn list(&self, manifest: &mut Manifest) -> Result<()> {
        let one = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let len = InputFile::open(path)?.len();
            Ok(json!({"name": name, "bytes": len, "sha256": hex(&[0; 32])}))
        };
        if !self.files.is_empty() {
            let listed = self.files.iter().map(one).collect::<Result<Vec<_>>>()?;
            manifest.provenance.insert("sources".into(), listed.into());
        }
        if let Some(path) = &self.calibration {
            let known = manifest.provenance.entry("calibration").or_insert_with(|| json!({}));
            if let (Some(known), Json::Object(more)) = (known.as_object_mut(), one(path)?) {
                known.extend(more);
            }
        }
        Ok(())
    }

    /// In this order, as [`Self::entries`].
    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().chain(&self.calibration)
    }

    /// What provenance says of each.
    fn entries<'a>(&self, manifest: &'a mut Manifest) -> Vec<&'a mut Json> {
        let (mut files, mut calibration) = (None, None);
        for (key, value) in &mut manifest.provenance {
            match key.as_str() {
                "sources" if !self.files.is_empty() => files = value.as_array_mut(),
                "calibration" if self.calibration.is_some() => calibration = Some(value),
                _ => {}
            }
        }
        files.into_iter().flatten().chain(calibration).collect()
    }
}

impl Seal {
    /// Bytes that are read for it.
    pub fn bytes(&self) -> u64 {
        let lengths = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
        let of_sources: u64 = self.sources.paths().map(lengths).sum();
        self.manifest.segments().map(|s| s.bytes).sum::<u64>() + of_sources
    }

    /// Sums up the sources on so many threads, which need not wait for what is made of them. That is done once.
    ///
    /// # Errors
    /// `Io`; `Interrupted` as `seen` says.
    pub fn sum_sources(&self, threads: usize, seen: &Seen<'_>) -> Result<()> {
        if self.of_sources.get().is_some() {
            return Ok(());
        }
        let (mut runs, mut files, mut end) = (Vec::new(), Vec::new(), 0u64);
        for path in self.sources.paths() {
            let file = InputFile::open(path)?;
            runs.push((end, file.len()));
            files.push((end, file));
            end = runs.last().and_then(|(at, len)| at.checked_add(*len)).unwrap_or(u64::MAX);
        }
        // As if they lay one behind the other.
        let read = |at: u64, bytes: &mut [u8]| {
            let found = files.partition_point(|(from, _)| *from <= at).checked_sub(1);
            match found.and_then(|k| files.get(k)) {
                Some((from, file)) => file.read_at(at - from, bytes),
                None => Err(Error::misuse("no such source")),
            }
        };
        let sums = sums(&runs, threads, &read, seen)?;
        self.of_sources.get_or_init(|| sums);
        Ok(())
    }

    /// Reads all segments on so many threads (and sources, if that was not done), and writes padding, manifest and
    /// footer. The last file of a split model is given what writing the others returned.
    ///
    /// # Errors
    /// Those of `read` and `write`; `Interrupted` as `seen` says.
    pub fn write(
        &self,
        threads: usize,
        others: &[ShardSeal],
        read: &ReadAt<'_>,
        write: &WriteAt<'_>,
        seen: &Seen<'_>,
    ) -> Result<ShardSeal> {
        self.sum_sources(threads, seen)?;
        let lengths = self.manifest.segments().map(|s| s.bytes);
        let runs: Vec<_> = self.places.iter().copied().zip(lengths).collect();
        let sums = sums(&runs, threads, read, seen)?;
        let mut manifest = self.manifest.clone();
        for (segment, sum) in manifest.segments_mut().zip(sums) {
            segment.sha256 = sum;
        }
        let of_sources = self.of_sources.get().into_iter().flatten();
        for (source, sum) in self.sources.entries(&mut manifest).into_iter().zip(of_sources) {
            source["sha256"] = hex(sum).into();
        }
        if let Some(split) = manifest.split.as_mut().filter(|s| !s.seals.is_empty()) {
            if !split.seals.iter().map(|s| s.bytes).eq(others.iter().map(|s| s.bytes)) {
                return Err(Error::misuse("the other files of the set are not those that were laid out"));
            }
            split.seals.copy_from_slice(others);
        }
        let pairs = self.places.windows(2).zip(self.manifest.segments());
        for (place, segment) in pairs {
            let end = place[0] + segment.bytes;
            write(end, &vec![0; (place[1] - end) as usize])?;
        }
        let (at, bytes, seal) = ending(&manifest)?;
        write(at, &bytes)?;
        Ok(seal)
    }
}

/// Where the manifest begins; its bytes and the footer's; and what identifies the file.
///
/// # Errors
/// As [`Manifest::bytes`].
pub fn ending(manifest: &Manifest) -> Result<(u64, Vec<u8>, ShardSeal)> {
    let at = manifest.places()?.last().copied().unwrap_or_default();
    let mut bytes = manifest.bytes()?;
    let manifest_sha256 = Sha256::digest(&bytes);
    let footer = Footer {
        manifest: (at, bytes.len() as u64),
        manifest_sha256,
        signature: 0,
        signature_sha256: Sha256::digest([]),
    };
    bytes.extend(footer.bytes());
    let len = at.checked_add(bytes.len() as u64);
    let len = len.ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
    Ok((at, bytes, ShardSeal { bytes: len, manifest: manifest_sha256 }))
}
