//! Opening: the footer, then the manifest. Nothing else is read before it is asked for.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::frame::{FOOTER, Footer, check_header};
use super::manifest::{Manifest, Part, Segment, ShardSeal, SideFile, Split, Tensor};
use super::planes::{self, Compressed, Planes};
use super::sums::sums;
use super::write::Seen;
use super::{ALIGNMENT, SUFFIX};
use crate::container::shards::{shard_name, split_shard_name};
use crate::container::{InputFile, Store};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};
use crate::sha256::Sha256;
use crate::tensor::{DType, TensorInfo};

/// An opened model, of one file or many.
#[derive(Debug)]
pub struct Qpack {
    shards: Vec<Shard>,
}

/// An opened file.
#[derive(Debug)]
struct Shard {
    file: InputFile,
    manifest: Manifest,
    footer: Footer,
    /// Where each segment begins, and at last the manifest.
    places: Vec<u64>,
}

/// What a verification found to be otherwise than the manifest says.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// What of it.
    pub part: Where,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq)]
pub enum Where {
    /// A part of a tensor.
    Tensor {
        /// The tensor's name.
        name: String,
        /// The part's name.
        part: String,
    },
    /// A side file.
    File(String),
    /// The zeros behind such.
    Padding(Box<Where>),
    /// The signature.
    Signature,
}

impl std::fmt::Display for Where {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tensor { name, part } => write!(f, "tensor {name:?}, part {part:?}"),
            Self::File(name) => write!(f, "file {name:?}"),
            Self::Padding(behind) => write!(f, "the zeros behind {behind}"),
            Self::Signature => write!(f, "the signature"),
        }
    }
}

impl Qpack {
    /// Opens the model that the file at `path` belongs to.
    ///
    /// # Errors
    /// `Malformed` for what is no such file, is cut short or grown, and for manifests that contradict
    /// themselves or each other; `Unsupported` for a later version; `Limit`; `Io`, a missing file too.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        let first = Shard::open(path, limits)?;
        let Some(split) = first.manifest.split.clone() else { return Ok(Self { shards: vec![first] }) };
        if split.count > limits.shards {
            return Err(Bound::Shards
                .reached(format!("{} files, at most {} are allowed", split.count, limits.shards))
                .at(path));
        }
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let stem = match split_shard_name(name, SUFFIX) {
            Some((stem, no, count)) if (no + 1, count) == (split.no, split.count) => stem,
            _ => {
                return Err(Error::malformed(format!(
                    "is file {} of {}, and not called so",
                    split.no, split.count
                ))
                .at(path)
                .hint(format!(
                    "such files are called {}",
                    shard_name("NAME", split.no - 1, split.count, SUFFIX)
                )));
            }
        };
        let mut shards = Vec::new();
        for no in 0..split.count {
            let path = path.with_file_name(shard_name(stem, no, split.count, SUFFIX));
            shards.push(
                Shard::open(&path, limits)
                    .map_err(|e| e.hint("a file of the set is missing or damaged: fetch it"))?,
            );
        }
        let model = Self { shards };
        model.check_set(limits)?;
        Ok(model)
    }

    /// That the files belong together.
    fn check_set(&self, limits: &Limits) -> Result<()> {
        let count = self.shards.len() as u64;
        let seals =
            self.shards.last().and_then(|s| s.manifest.split.as_ref()).map_or(&[][..], |s| &s.seals[..]);
        let (mut names, mut total) = (std::collections::HashSet::new(), 0);
        for (k, shard) in self.shards.iter().enumerate() {
            let at = |e: Error| e.at(shard.file.path());
            let own = |s: &Split| (s.no, s.count) == (k as u64 + 1, count);
            if !shard.manifest.split.as_ref().is_some_and(own) {
                return Err(at(Error::malformed(format!(
                    "does not say that it is file {} of {count}",
                    k + 1
                ))));
            }
            let found = ShardSeal { bytes: shard.file.len(), manifest: shard.footer.manifest_sha256 };
            // The last one vouches for the others.
            if k + 1 < self.shards.len() && seals.get(k) != Some(&found) {
                return Err(at(Error::malformed("is not the file that the last one of the set names"))
                    .hint("it belongs to another model, or another version of this"));
            }
            total += shard.manifest.tensors.len() as u64;
            if total > limits.tensors {
                return Err(at(Bound::Tensors
                    .reached(format!("{total} tensors, at most {} are allowed", limits.tensors))));
            }
            if let Some(t) = shard.manifest.tensors.iter().find(|t| !names.insert(t.name.as_str())) {
                return Err(at(Error::malformed(format!("tensor {:?} is in another file too", t.name))));
            }
        }
        Ok(())
    }

    /// Path and manifest of each file.
    pub fn manifests(&self) -> impl Iterator<Item = (&Path, &Manifest)> {
        self.shards.iter().map(|s| (s.file.path(), &s.manifest))
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.shards.iter().flat_map(|s| &s.manifest.tensors)
    }

    /// That the values of all tensors can be read.
    ///
    /// # Errors
    /// `Unsupported`, by name, for an encoding or a compression that is not known.
    pub fn check_readable(&self) -> Result<()> {
        self.tensors()
            .try_for_each(|t| t.check_readable().map_err(|e| e.context(format_args!("tensor {:?}", t.name))))
    }

    /// The model's other files.
    pub fn files(&self) -> &[SideFile] {
        self.shards.first().map_or(&[], |s| &s.manifest.files)
    }

    /// SHA-256 of the manifest, and the signature's length, of each file.
    pub fn seals(&self) -> impl Iterator<Item = ([u8; 32], u64)> {
        self.shards.iter().map(|s| (s.footer.manifest_sha256, s.footer.signature))
    }

    /// The bytes of a side file.
    ///
    /// # Errors
    /// `Misuse` where there is none of this name, `Limit` for one that is too long, `Malformed` where its bytes
    /// are not those that the manifest names, `Unsupported` where their compression is not known.
    pub fn read_file(&self, name: &str, limits: &Limits) -> Result<Vec<u8>> {
        let missing = || Error::misuse(format!("holds no file {name:?}"));
        let shard = self.shards.first().ok_or_else(missing)?;
        let k = shard.manifest.files.iter().position(|f| f.name == name).ok_or_else(missing)?;
        let segment = &shard.manifest.files[k].segment;
        let at = |e: Error| e.context(format!("file {name:?}")).at(shard.file.path());
        let len = segment.content_bytes();
        if len > limits.side_file_bytes {
            return Err(at(Bound::SideFile
                .reached(format!("{len} bytes, at most {} are allowed", limits.side_file_bytes))));
        }
        let mut bytes = vec![0; len as usize];
        match opened(&shard.file, shard.places[k], segment).map_err(at)? {
            Some(compressed) => compressed.read(&shard.file, 0, &mut bytes).map_err(at)?,
            None => shard.file.read_at(shard.places[k], &mut bytes)?,
        }
        let named = segment.compression.as_ref().map_or(segment.sha256, |c| c.sha256);
        match named == Sha256::digest(&bytes) {
            true => Ok(bytes),
            false => Err(at(Error::malformed("its bytes are not those that the manifest names"))),
        }
    }

    /// The names and bytes of all side files that are `wanted`, one after the other.
    ///
    /// # Errors
    /// `Limit` where they are too long together; as [`Self::read_file`] for each.
    pub fn read_files<'a>(
        &'a self,
        wanted: impl Fn(&SideFile) -> bool,
        limits: &'a Limits,
    ) -> Result<impl Iterator<Item = Result<(String, Vec<u8>)>>> {
        let wanted: Vec<_> = self.files().iter().filter(|f| wanted(f)).collect();
        let path = self.shards.first().map(|s| s.file.path());
        SideFile::check_sum(wanted.iter().copied(), limits).map_err(|e| match path {
            Some(path) => e.at(path),
            None => e,
        })?;
        Ok(wanted.into_iter().map(|f| Ok((f.name.clone(), self.read_file(&f.name, limits)?))))
    }

    /// What each segment of a file stands for, in the order of the file; `number` counts files from 0.
    pub fn contents(&self, number: usize) -> impl Iterator<Item = Result<Content<'_>>> {
        let shards = self.shards.get(number).into_iter();
        shards.flat_map(|shard| {
            let segments = shard.manifest.segments().zip(shard.manifest.names()).zip(&shard.places);
            segments.map(|((segment, place), at)| Content::open(&shard.file, *at, segment, place))
        })
    }

    /// The parts of all tensors, as tensors of their own: those of `NAME` are called `NAME / PART`, but for a
    /// plain tensor, which is what it is. Those of encodings and compressions that are not known are bytes.
    ///
    /// # Errors
    /// `Malformed` for names that come twice, and compressed segments that contradict themselves; `Io`.
    pub fn into_parts(self) -> Result<(Store, Vec<Tensor>)> {
        let (mut files, mut infos, mut tensors) = (Vec::new(), Vec::new(), Vec::new());
        let mut compressed = HashMap::new();
        for (number, shard) in self.shards.into_iter().enumerate() {
            let mut places = shard.places.iter().skip(shard.manifest.files.len());
            for tensor in &shard.manifest.tensors {
                let sizes = match tensor.is_closed() {
                    true => Vec::new(),
                    false => tensor.encoding.parts(&tensor.shape)?.unwrap_or_default(),
                };
                for (k, part) in tensor.parts.iter().enumerate() {
                    let offset = places.next().copied().unwrap_or_default();
                    let name = part_name(tensor, part);
                    let mut nbytes = part.segment.bytes;
                    if !tensor.is_closed()
                        && let Some(found) = opened(&shard.file, offset, &part.segment)
                            .map_err(|e| e.context(format_args!("tensor {name:?}")).at(shard.file.path()))?
                    {
                        nbytes = part.segment.content_bytes();
                        compressed.insert(name.clone(), found);
                    }
                    let (dtype, shape) = match sizes.get(k) {
                        Some(size) if !size.varies => (size.dtype, size.shape.clone()),
                        _ => (DType::U8, vec![nbytes]),
                    };
                    infos.push(TensorInfo { name, dtype, shape, file: number, offset, nbytes });
                }
            }
            files.push(shard.file);
            tensors.extend(shard.manifest.tensors);
        }
        Ok((Store::with_compressed(files, infos, compressed)?, tensors))
    }

    /// Compares all bytes with what the manifests say of them, on so many threads.
    ///
    /// # Errors
    /// `Io`; `Interrupted`.
    pub fn verify(&self, threads: usize, seen: &Seen<'_>) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        for shard in &self.shards {
            let path = shard.file.path().to_path_buf();
            faults.extend(
                shard.verify(threads, seen)?.into_iter().map(|part| Fault { path: path.clone(), part }),
            );
        }
        Ok(faults)
    }
}

/// The bytes that a segment stands for.
#[derive(Debug)]
pub struct Content<'a> {
    /// Whose it is.
    pub place: Where,
    segment: &'a Segment,
    file: &'a InputFile,
    at: u64,
    compressed: Option<Compressed>,
    is_closed: bool,
}

impl<'a> Content<'a> {
    fn open(file: &'a InputFile, at: u64, segment: &'a Segment, place: Where) -> Result<Self> {
        let is_closed = segment.compression.as_ref().is_some_and(|c| c.kind != planes::KIND);
        let found = if is_closed { Ok(None) } else { opened(file, at, segment) };
        let compressed = found.map_err(|e| e.context(&place).at(file.path()))?;
        Ok(Self { place, segment, file, at, compressed, is_closed })
    }

    /// What the manifest says of it.
    pub fn segment(&self) -> &'a Segment {
        self.segment
    }

    /// Whether it is compressed in a way that is not known: the bytes are those of the file then.
    pub fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// How many there are.
    pub fn bytes(&self) -> u64 {
        if self.is_closed { self.segment.bytes } else { self.segment.content_bytes() }
    }

    /// The name of the tensor or file.
    pub fn name(&self) -> &str {
        match &self.place {
            Where::Tensor { name, .. } | Where::File(name) => name,
            Where::Padding(_) | Where::Signature => "",
        }
    }

    /// Their SHA-256, as the manifest has it.
    pub fn sha256(&self) -> [u8; 32] {
        let compression = self.segment.compression.as_ref().filter(|_| !self.is_closed);
        compression.map_or(self.segment.sha256, |c| c.sha256)
    }

    /// That they have this SHA-256.
    ///
    /// # Errors
    /// `Malformed` where they should have another.
    pub fn check(&self, sha256: [u8; 32]) -> Result<()> {
        match self.sha256() == sha256 {
            true => Ok(()),
            false => Err(Error::malformed(format!("{} is damaged: it has another SHA-256", self.place))
                .at(self.file.path())
                .hint("fetch the file again")),
        }
    }

    /// Fills `out` from byte `start` on.
    ///
    /// # Errors
    /// `Malformed` beyond the end, and for what stands for nothing; `Io`.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        match &self.compressed {
            Some(compressed) => compressed
                .read(self.file, start, out)
                .map_err(|e| e.context(&self.place).at(self.file.path())),
            None => self.file.read_at(self.at.saturating_add(start), out),
        }
    }
}

/// A segment that is compressed.
fn opened(file: &InputFile, at: u64, segment: &Segment) -> Result<Option<Compressed>> {
    let Some(c) = &segment.compression else { return Ok(None) };
    let unknown = || Error::unsupported(format!("compression {:?} is not known", c.kind));
    let planes = Planes::parse(c)?.ok_or_else(unknown)?;
    Compressed::open(file, (at, segment.bytes), c.bytes, planes).map(Some)
}

impl Manifest {
    /// Whose each segment is.
    fn names(&self) -> impl Iterator<Item = Where> {
        let of_tensor = |t: &Tensor| {
            let of_part = |p: &Part| Where::Tensor { name: t.name.clone(), part: p.name.clone() };
            t.parts.iter().map(of_part).collect::<Vec<_>>()
        };
        let files = self.files.iter().map(|f| Where::File(f.name.clone()));
        files.chain(self.tensors.iter().flat_map(of_tensor))
    }
}

/// What a part of a tensor is called as a tensor of its own.
pub(crate) fn part_name(tensor: &Tensor, part: &Part) -> String {
    match tensor.encoding {
        super::Encoding::Plain(_) if !tensor.is_closed() => tensor.name.clone(),
        _ => format!("{} / {}", tensor.name, part.name),
    }
}

impl Shard {
    fn verify(&self, threads: usize, seen: &Seen<'_>) -> Result<Vec<Where>> {
        let Footer { signature, signature_sha256, .. } = self.footer;
        let lengths = self.manifest.segments().map(|s| s.bytes);
        let mut segments: Vec<_> = self.places.iter().copied().zip(lengths).collect();
        segments.push((self.file.len() - FOOTER - signature, signature));
        let read = |at: u64, bytes: &mut [u8]| self.file.read_at(at, bytes);
        let mut found = sums(&segments, threads, &read, seen)?.into_iter();
        let mut faults = Vec::new();
        let places = self.places.windows(2);
        for (((segment, name), place), sum) in
            self.manifest.segments().zip(self.manifest.names()).zip(places).zip(&mut found)
        {
            if sum != segment.sha256 {
                faults.push(name.clone());
            }
            let end = place[0] + segment.bytes;
            let mut padding = [0; ALIGNMENT as usize];
            let padding = &mut padding[..(place[1] - end) as usize];
            read(end, padding)?;
            if padding.iter().any(|b| *b != 0) {
                faults.push(Where::Padding(Box::new(name)));
            }
        }
        if found.next() != Some(signature_sha256) {
            faults.push(Where::Signature);
        }
        Ok(faults)
    }

    fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let file = InputFile::open(path)?;
        Self::read(file, limits).map_err(|e| e.at(path))
    }

    fn read(file: InputFile, limits: &Limits) -> Result<Self> {
        check_header(&file)?;
        let footer = Footer::read(&file)?;
        let (at, len) = footer.manifest;
        if len > limits.header_bytes {
            return Err(Bound::Header.reached(format!(
                "its manifest has {len} bytes, at most {} are allowed",
                limits.header_bytes
            )));
        }
        // It lies within the file.
        let mut bytes = vec![0; len as usize];
        file.read_at(at, &mut bytes)?;
        if footer.manifest_sha256 != Sha256::digest(&bytes) {
            return Err(Error::malformed("its manifest has another SHA-256 than its footer says")
                .hint("the file is damaged: fetch it again"));
        }
        let manifest = Manifest::parse(&bytes, limits).map_err(|e| e.context("its manifest"))?;
        let places = manifest.places()?;
        match places.last() {
            Some(end) if *end == at => Ok(Self { file, manifest, footer, places }),
            end => Err(Error::malformed(format!(
                "its segments end at {}, its manifest begins at {at}",
                end.copied().unwrap_or_default()
            ))
            .hint("bytes are missing or were put in: fetch the file again")),
        }
    }
}
