//! Opens GGUF files: versions 2 and 3, both byte orders, single or split.

use std::collections::HashSet;
use std::path::Path;

use crate::container::qpack::is_qpack;
use crate::container::shards::{shard_name, split_shard_name};
use crate::container::{InputFile, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{Bound, Limits};
use crate::tensor::{DType, TensorInfo};

use super::cursor::Cursor;
use super::layout::{
    KEY_SPLIT_COUNT, KEY_SPLIT_NO, KEY_SPLIT_TENSORS, MAGIC, MAX_DIMS, MAX_KEY, MAX_NAME, MIN_ENTRY,
    MIN_INFO, VERSION, align_up, alignment, check_key,
};
use super::packed;
use super::value::Metadata;

/// An opened GGUF file, or all shards of a split one.
#[derive(Debug)]
pub struct Gguf {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Whether numbers in the file are big-endian. [`Store::read`] delivers little-endian data.
    pub big_endian: bool,
    /// Alignment of tensor data in bytes, a power of two.
    pub alignment: u32,
    /// The first shard's metadata. Of a split set the `split.*` entries are left out: the
    /// tensors here are whole again.
    pub metadata: Metadata,
    /// All tensors, in file order, shard after shard.
    pub store: Store,
    /// Where the tensor data of the first shard begins, in bytes.
    pub data_offset: u64,
    /// Bytes behind the last tensor (and its padding) that belong to nothing, over all shards.
    pub trailing_bytes: u64,
    /// Number of files.
    pub shards: usize,
}

/// The byte of the version, behind the magic.
const VERSION_AT: u64 = MAGIC.len() as u64;

/// One file's header.
struct Header {
    version: u32,
    big_endian: bool,
    alignment: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    data_offset: u64,
    trailing_bytes: u64,
}

/// What a shard says of its place.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Split {
    no: u64,
    count: u64,
    tensors: u64,
}

/// Whether a file begins as GGUF does, or is a `.qpack` file that was made of one: whether [`Gguf::open`] reads it.
///
/// # Errors
/// `Io` when it cannot be read; as [`Qpack::open`](crate::container::qpack::Qpack::open).
pub fn is_gguf(path: &Path) -> Result<bool> {
    let file = InputFile::open(path)?;
    let mut magic = [0; MAGIC.len()];
    if file.len() < magic.len() as u64 {
        return Ok(false);
    }
    file.read_at(0, &mut magic)?;
    Ok(magic == MAGIC || packed::is_packed(&file)?)
}

impl Gguf {
    /// The metadata of the one file `path`, whatever set it belongs to.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn metadata_of(path: impl AsRef<Path>, limits: &Limits) -> Result<Metadata> {
        Header::open(path.as_ref(), limits).map(|(_, header)| header.metadata)
    }

    /// The metadata of a file that was read into memory; errors call it `path`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn metadata_of_bytes(path: impl AsRef<Path>, bytes: Vec<u8>, limits: &Limits) -> Result<Metadata> {
        let path = path.as_ref();
        let header = Header::parse(&InputFile::of_bytes(path, bytes), limits).map_err(|e| e.at(path))?;
        Ok(header.metadata)
    }

    /// Opens `path`; of a split set any shard, the others are found beside it by their names. Also opened is a
    /// `.qpack` file that was made of a GGUF file, as that.
    ///
    /// # Errors
    /// `Io` when a file or shard cannot be read, `Malformed`, `Unsupported` (version 1, unknown
    /// tensor types) and `Limit` as `formats/spec/gguf.md` lists.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        let file = InputFile::open(path)?;
        match is_qpack(&file)? {
            true => packed::open(path, limits),
            false => Self::of_file(path, file, limits),
        }
    }

    /// The same of an opened GGUF file.
    pub(super) fn of_file(path: &Path, file: InputFile, limits: &Limits) -> Result<Self> {
        let header = Header::parse(&file, limits).map_err(|e| e.at(path))?;
        let shards = match header.split().map_err(|e| e.at(path))? {
            None => vec![(file, header)],
            Some(split) => open_shards(path, (file, header), split, limits)?,
        };
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors = Vec::new();
        let mut trailing_bytes = 0u64;
        let mut first: Option<Header> = None;
        for (i, (file, mut shard)) in shards.into_iter().enumerate() {
            tensors.extend(shard.tensors.drain(..).map(|t| TensorInfo { file: i, ..t }));
            trailing_bytes = trailing_bytes.saturating_add(shard.trailing_bytes);
            if first.as_ref().is_some_and(|f| f.big_endian != shard.big_endian) {
                return Err(Error::malformed("its byte order is not that of the first shard").at(file.path()));
            }
            files.push(file);
            first.get_or_insert(shard);
        }
        let mut first = first.ok_or_else(|| Error::malformed("no shards").at(path))?;
        for key in [KEY_SPLIT_NO, KEY_SPLIT_COUNT, KEY_SPLIT_TENSORS] {
            first.metadata.remove(key);
        }
        let shards = files.len();
        let store = Store::new(files, tensors)?;
        Ok(Self {
            version: first.version,
            big_endian: first.big_endian,
            alignment: first.alignment,
            metadata: first.metadata,
            store: if first.big_endian { store.into_big_endian() } else { store },
            data_offset: first.data_offset,
            trailing_bytes,
            shards,
        })
    }
}

/// All shards in order; `given` is the one that was named.
fn open_shards(
    path: &Path,
    given: (InputFile, Header),
    split: Split,
    limits: &Limits,
) -> Result<Vec<(InputFile, Header)>> {
    if split.count > limits.shards {
        return Err(Bound::Shards
            .reached(format!("{} shards, at most {} are allowed", split.count, limits.shards))
            .at(path));
    }
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let prefix = match split_shard_name(name, "gguf") {
        Some((prefix, no, count)) if (no, count) == (split.no, split.count) => prefix,
        _ => {
            return Err(Error::malformed(format!(
                "is shard {} of {}, but its name does not say so",
                split.no + 1,
                split.count
            ))
            .at(path)
            .hint(format!(
                "shards are found by name: rename it to {}",
                shard_name("NAME", split.no, split.count, "gguf")
            )));
        }
    };
    let mut given = Some(given);
    let mut shards = Vec::new();
    let mut found = 0;
    for no in 0..split.count {
        let (file, header) = match given.take_if(|_| no == split.no) {
            Some(shard) => shard,
            None => {
                let sibling = path.with_file_name(shard_name(prefix, no, split.count, "gguf"));
                Header::open(&sibling, limits).map_err(|e| {
                    let missing = e.kind() == ErrorKind::Io;
                    let e = e.context(format_args!("shard {} of {}", no + 1, split.count));
                    if missing { e.hint("all shards must lie in one directory") } else { e }
                })?
            }
        };
        if header.split().map_err(|e| e.at(file.path()))? != Some(Split { no, ..split }) {
            return Err(Error::malformed(format!(
                "its split.* metadata do not make it shard {} of {} with {} tensors in all",
                no + 1,
                split.count,
                split.tensors
            ))
            .at(file.path()));
        }
        found += header.tensors.len() as u64;
        limit_tensors(found, limits).map_err(|e| e.at(path))?;
        shards.push((file, header));
    }
    if found != split.tensors {
        return Err(Error::malformed(format!(
            "the shards hold {found} tensors, {KEY_SPLIT_TENSORS} promises {}",
            split.tensors
        ))
        .at(path));
    }
    Ok(shards)
}

impl Header {
    fn open(path: &Path, limits: &Limits) -> Result<(InputFile, Self)> {
        let file = InputFile::open(path)?;
        let header = Self::parse(&file, limits).map_err(|e| e.at(path))?;
        Ok((file, header))
    }

    fn parse(file: &InputFile, limits: &Limits) -> Result<Self> {
        let mut c = Cursor::new(file, limits);
        let magic = [c.u8()?, c.u8()?, c.u8()?, c.u8()?];
        if magic != MAGIC {
            return Err(Error::unsupported("is no GGUF file: it does not begin with \"GGUF\"").offset(0));
        }
        // Little-endian versions are small numbers; read the other way round they are huge.
        let mut version = c.u32()?;
        if version & 0xffff == 0 {
            c.big_endian = true;
            version = version.swap_bytes();
        }
        match version {
            2 | VERSION => {}
            0 | 1 => {
                return Err(Error::unsupported(format!("GGUF version {version} is too old"))
                    .offset(VERSION_AT)
                    .hint("versions 2 and 3 are read; make the file anew from its source"));
            }
            _ => {
                let message = format!("GGUF version {version} is newer than this program");
                return Err(Error::unsupported(message).offset(VERSION_AT));
            }
        }
        let (n_tensors, n_entries) = (c.u64()?, c.u64()?);
        c.expect(n_entries, MIN_ENTRY, "metadata entries")?;
        c.expect(n_tensors, MIN_INFO, "tensor infos")?;
        limit_tensors(n_tensors, limits)?;
        if n_entries > limits.metadata_entries {
            let most = limits.metadata_entries;
            return Err(
                Bound::Metadata.reached(format!("{n_entries} metadata entries, at most {most} are allowed"))
            );
        }
        let mut metadata = Metadata::default();
        for i in 0..n_entries {
            let at = c.pos();
            entry(&mut c, i, &mut metadata).map_err(|e| e.offset(at))?;
        }
        let alignment = alignment(&metadata)?;
        let mut tensors = Vec::with_capacity(n_tensors as usize);
        let mut infos = Vec::with_capacity(n_tensors as usize);
        for i in 0..n_tensors {
            infos.push(c.pos());
            let info = tensor_info(&mut c, alignment).map_err(|e| {
                e.context(format_args!("tensor {i}")).offset(infos.last().copied().unwrap_or(0))
            })?;
            tensors.push(info);
        }
        let data_offset =
            align_up(c.pos(), alignment).ok_or_else(|| Error::malformed("the header overflows"))?;
        let end = place(&mut tensors, &infos, data_offset, alignment, file.len())?;
        let trailing_bytes = file.len().saturating_sub(end);
        let big_endian = c.big_endian;
        Ok(Self { version, big_endian, alignment, metadata, tensors, data_offset, trailing_bytes })
    }

    /// The file's place in a split set; `None` when it is whole.
    fn split(&self) -> Result<Option<Split>> {
        let number = |key: &str| match self.metadata.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                None => Err(Error::malformed(format!("{key} is {v}, not a count")).key(key)),
                n => Ok(n),
            },
        };
        let (no, count) = (number(KEY_SPLIT_NO)?, number(KEY_SPLIT_COUNT)?);
        let tensors = number(KEY_SPLIT_TENSORS)?;
        // Absent, 0 and 1 all say that this is the only file.
        let count = count.unwrap_or(0).max(1);
        if no.is_some_and(|no| no >= count) {
            return Err(Error::malformed(format!(
                "{KEY_SPLIT_NO} is {}, of {count} shards",
                no.unwrap_or_default()
            ))
            .key(KEY_SPLIT_NO));
        }
        match (no, tensors) {
            _ if count == 1 => Ok(None),
            (Some(no), Some(tensors)) => Ok(Some(Split { no, count, tensors })),
            _ => Err(Error::malformed(format!(
                "is one of {count} shards, but {KEY_SPLIT_NO} or {KEY_SPLIT_TENSORS} is missing"
            ))),
        }
    }
}

/// Reads key and value of metadata entry number `i`.
fn entry(c: &mut Cursor<'_>, i: u64, metadata: &mut Metadata) -> Result<()> {
    let key = c.string(MAX_KEY).map_err(|e| e.context(format_args!("metadata entry {i}")))?;
    let key = String::from_utf8(key)
        .map_err(|_| Error::malformed(format!("the key of metadata entry {i} is not UTF-8")))?;
    check_key(&key)?;
    let value = c.value().map_err(|e| e.context(format_args!("metadata {key:?}")).key(&key))?;
    if metadata.get(&key).is_some() {
        return Err(Error::malformed(format!("metadata {key:?} appears twice")).key(&key));
    }
    metadata.set(key, value);
    Ok(())
}

fn limit_tensors(n: u64, limits: &Limits) -> Result<()> {
    if n <= limits.tensors {
        return Ok(());
    }
    Err(Bound::Tensors.reached(format!("{n} tensors, at most {} are allowed", limits.tensors)))
}

/// Name, shape, type and relative offset.
fn tensor_info(c: &mut Cursor<'_>, alignment: u32) -> Result<TensorInfo> {
    let name = c.string(MAX_KEY)?;
    let name = String::from_utf8(name).map_err(|_| Error::malformed("its name is not UTF-8"))?;
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        return Err(Error::malformed(format!(
            "its name {name:?} has {} bytes; 1 to {MAX_NAME} without NUL are allowed",
            name.len()
        )));
    }
    let context = |e: Error| e.context(format_args!("{name:?}")).tensor(&name);
    let n_dims = c.u32()?;
    if n_dims > MAX_DIMS {
        return Err(context(Error::malformed(format!(
            "{n_dims} dimensions, at most {MAX_DIMS} are allowed"
        ))));
    }
    let mut shape = (0..n_dims).map(|_| c.u64()).collect::<Result<Vec<_>>>()?;
    shape.reverse();
    let id = c.u32()?;
    let dtype = DType::from_ggml_id(id).ok_or_else(|| {
        context(match id {
            4 | 5 | 31..=33 | 36..=38 => Error::unsupported(format!("ggml has removed tensor type {id}"))
                .hint("make the file anew from its source"),
            _ => Error::unsupported(format!("tensor type {id} is not known")),
        })
    })?;
    let offset = c.u64()?;
    if !offset.is_multiple_of(u64::from(alignment)) {
        return Err(context(Error::malformed(format!("offset {offset} is no multiple of {alignment}"))));
    }
    let nbytes = dtype.nbytes(&shape).map_err(context)?;
    Ok(TensorInfo { name, dtype, shape, file: 0, offset, nbytes })
}

/// Turns relative offsets into absolute ones; refuses tensors that overlap or leave the file.
/// Returns where the last tensor's padding ends. `infos` are the bytes where the header tells of each.
fn place(
    tensors: &mut [TensorInfo],
    infos: &[u64],
    data_offset: u64,
    alignment: u32,
    len: u64,
) -> Result<u64> {
    let mut names = HashSet::with_capacity(tensors.len());
    for (t, info) in tensors.iter_mut().zip(infos) {
        if !names.insert(t.name.clone()) {
            let message = format!("tensor {:?} appears twice", t.name);
            return Err(Error::malformed(message).tensor(&t.name).offset(*info));
        }
        let end = t.offset.checked_add(data_offset).and_then(|at| {
            t.offset = at;
            at.checked_add(t.nbytes)
        });
        if end.is_none_or(|end| end > len) {
            return Err(Error::malformed(format!(
                "tensor {:?} takes {} bytes from byte {}, the file has {len}",
                t.name, t.nbytes, t.offset
            ))
            .tensor(&t.name)
            .offset(*info)
            .hint("the file is cut short: fetch it again"));
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.offset, t.nbytes));
    for pair in order.windows(2) {
        if let [a, b] = pair
            && a.offset + a.nbytes > b.offset
        {
            let message = format!("tensors {:?} and {:?} overlap", a.name, b.name);
            return Err(Error::malformed(message).tensor(&b.name).offset(b.offset));
        }
    }
    let end = order.last().map_or(data_offset, |t| t.offset + t.nbytes);
    Ok(align_up(end, alignment).unwrap_or(end))
}
