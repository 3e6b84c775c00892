//! Lays out files that `torch.load` reads, with `weights_only` and mapped too: zip archives of
//! stored members, each aligned to 64 bytes as torch aligns them.
//!
//! Sizes are known beforehand, and so is the place of everything. What is not are the checksums of the
//! tensors' data, which stand in the members' headers and in the directory: [`Checksums`] writes
//! these when the data are there. Field offsets are those of APPNOTE.TXT 6.3.10, sections 4.3.7 to
//! 4.3.16 and 4.5.3.

use super::zip::{
    CENTRAL_HEADER, END, FULL_16, FULL_32, LOCAL_BYTES, LOCAL_HEADER, ZIP64_END, ZIP64_END_BYTES,
    ZIP64_EXTRA, ZIP64_LOCATOR,
};
use super::{NAMING, pickle};
use crate::container::shards::{Ending, FileLayout, Layout, Member};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Where data begin: at multiples of it.
const ALIGNMENT: u64 = 64;
/// The extra field that moves them there is called `FB` by torch.
const PADDING: u16 = u16::from_le_bytes(*b"FB");
const EXTRA_BYTES: u64 = 4;
/// The field of zip64 with both sizes.
const WIDE_SIZES: u64 = EXTRA_BYTES + 16;

/// Versions of the format that are needed: the first, and zip64's.
const VERSION: u16 = 10;
const VERSION_64: u16 = 45;
/// Names are UTF-8.
const FLAGS: u16 = 1 << 11;
/// 1 January 1980.
const DATE: u16 = 0x21;

/// Bytes that are read at a time.
const BUFFER: u64 = 1 << 20;

/// Fills files of at most `max_shard_size` bytes of data with `tensors` (name, type, shape) in this
/// order; a tensor larger than that has a file of its own.
///
/// # Errors
/// `Unsupported` for a type that torch lacks, `Malformed` for impossible sizes, and a name that comes
/// twice.
pub fn layout(tensors: &[(&str, DType, &[u64])], max_shard_size: u64) -> Result<Layout> {
    NAMING.lay_out(tensors, max_shard_size, file)
}

fn too_large() -> Error {
    Error::malformed("a file would exceed 2^64 bytes")
}

fn file(name: String, tensors: &[Member<'_>]) -> Result<(FileLayout, Vec<u64>)> {
    let folder = name.strip_suffix(".bin").unwrap_or(&name);
    let mut entries = Vec::with_capacity(tensors.len() + 3);
    let mut header = Vec::new();
    let small = [
        ("data.pkl", pickle::state_dict(tensors)?),
        ("byteorder", b"little".to_vec()),
        ("version", b"3\n".to_vec()),
    ];
    for (name, bytes) in small {
        let entry = Entry::new(format!("{folder}/{name}"), header.len() as u64, bytes.len() as u64)?;
        let sum = crc32fast::hash(&bytes);
        header.extend(entry.local(sum));
        header.extend(bytes);
        entries.push(Entry { sum: Some(sum), ..entry });
    }
    let mut end = header.len() as u64;
    let mut places = Vec::with_capacity(tensors.len());
    for (key, t) in tensors.iter().enumerate() {
        let entry = Entry::new(format!("{folder}/data/{key}"), end, t.nbytes)?;
        end = entry.end().ok_or_else(too_large)?;
        places.push(entry.data);
        entries.push(entry);
    }
    let checksums = Checksums { entries, directory: end };
    let directory = checksums.directory(&vec![0; checksums.entries.len()]).len() as u64;
    let len = end.checked_add(directory).ok_or_else(too_large)?;
    Ok((FileLayout { name, header, len, ending: Some(Ending::Zip(checksums)) }, places))
}

/// The members of a file, and where its directory is to be.
#[derive(Debug)]
pub struct Checksums {
    entries: Vec<Entry>,
    directory: u64,
}

#[derive(Debug)]
struct Entry {
    name: String,
    /// First byte of its header, and of its data.
    at: u64,
    data: u64,
    /// Bytes of its data.
    len: u64,
    /// CRC-32 of its data, where these are in the file's header.
    sum: Option<u32>,
}

impl Checksums {
    /// Bytes that [`Self::write`] reads.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().filter(|e| e.sum.is_none()).map(|e| e.len).sum()
    }

    /// Sums up the data of each tensor, and writes its header and the directory. Both functions are
    /// given offsets in the file.
    ///
    /// # Errors
    /// Those of `read` and `write`.
    pub fn write(
        &self,
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
        write: impl Fn(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; BUFFER as usize];
        let mut sums = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let sum = match entry.sum {
                Some(sum) => sum,
                None => {
                    let mut hasher = crc32fast::Hasher::new();
                    for from in (0..entry.len).step_by(BUFFER as usize) {
                        let piece = &mut buffer[..BUFFER.min(entry.len - from) as usize];
                        read(entry.data + from, piece)?;
                        hasher.update(piece);
                    }
                    let sum = hasher.finalize();
                    write(entry.at, &entry.local(sum))?;
                    sum
                }
            };
            sums.push(sum);
        }
        write(self.directory, &self.directory(&sums))
    }

    /// The directory with these checksums: as many bytes with any.
    fn directory(&self, sums: &[u32]) -> Vec<u8> {
        let mut out = Record::default();
        for (entry, sum) in self.entries.iter().zip(sums) {
            entry.central(*sum, &mut out);
        }
        let (bytes, count) = (out.0.len() as u64, self.entries.len() as u64);
        if bytes >= FULL_32 || self.directory >= FULL_32 || count >= FULL_16 {
            let at = self.directory + bytes; // lies within the file
            out.put(&ZIP64_END).u64(ZIP64_END_BYTES as u64 - 12).u16(VERSION_64).u16(VERSION_64);
            out.u32(0).u32(0).u64(count).u64(count).u64(bytes).u64(self.directory);
            out.put(&ZIP64_LOCATOR).u32(0).u64(at).u32(1);
        }
        let count = count.min(FULL_16) as u16;
        out.put(&END).u16(0).u16(0).u16(count).u16(count);
        out.u32(bytes.min(FULL_32) as u32).u32(self.directory.min(FULL_32) as u32).u16(0);
        out.0
    }
}

impl Entry {
    /// A member whose header begins at `at`.
    fn new(name: String, at: u64, len: u64) -> Result<Self> {
        let wide = if len >= FULL_32 { WIDE_SIZES } else { 0 };
        let head = LOCAL_BYTES as u64 + name.len() as u64 + wide + EXTRA_BYTES;
        let data = at.checked_add(head).and_then(|n| n.checked_next_multiple_of(ALIGNMENT));
        let data = data.ok_or_else(too_large)?;
        Ok(Self { name, at, data, len, sum: None })
    }

    fn end(&self) -> Option<u64> {
        self.data.checked_add(self.len)
    }

    /// What the header and the directory have in common, up to the sizes.
    fn common(&self, sum: u32, is_wide: bool, out: &mut Record) {
        out.u16(if is_wide { VERSION_64 } else { VERSION }).u16(FLAGS).u16(0).u16(0).u16(DATE).u32(sum);
        let len = self.len.min(FULL_32) as u32;
        out.u32(len).u32(len).u16(self.name.len() as u16);
    }

    /// The header before the data.
    fn local(&self, sum: u32) -> Vec<u8> {
        let mut out = Record::default();
        let is_wide = self.len >= FULL_32;
        out.put(&LOCAL_HEADER);
        self.common(sum, is_wide, &mut out);
        let extra = self.data - self.at - LOCAL_BYTES as u64 - self.name.len() as u64;
        out.u16(extra as u16).put(self.name.as_bytes());
        let mut padding = extra - EXTRA_BYTES;
        if is_wide {
            padding -= WIDE_SIZES;
            out.u16(ZIP64_EXTRA).u16(16).u64(self.len).u64(self.len);
        }
        out.u16(PADDING).u16(padding as u16);
        out.0.resize(out.0.len() + padding as usize, 0);
        out.0
    }

    /// The entry of the directory.
    fn central(&self, sum: u32, out: &mut Record) {
        // The sizes, and the offset, where they do not fit the fields.
        let sizes = [self.len, self.len, self.at];
        let wide: Vec<u64> = sizes.into_iter().filter(|n| *n >= FULL_32).collect();
        let version = if wide.is_empty() { VERSION } else { VERSION_64 };
        out.put(&CENTRAL_HEADER).u16(version);
        self.common(sum, !wide.is_empty(), out);
        let extra = if wide.is_empty() { 0 } else { EXTRA_BYTES as u16 + 8 * wide.len() as u16 };
        out.u16(extra).u16(0).u16(0).u16(0).u32(0).u32(self.at.min(FULL_32) as u32);
        out.put(self.name.as_bytes());
        if !wide.is_empty() {
            out.u16(ZIP64_EXTRA).u16(8 * wide.len() as u16);
            wide.into_iter().for_each(|n| {
                out.u64(n);
            });
        }
    }
}

/// Bytes of little-endian fields.
#[derive(Default)]
struct Record(Vec<u8>);

impl Record {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn u16(&mut self, n: u16) -> &mut Self {
        self.put(&n.to_le_bytes())
    }

    fn u32(&mut self, n: u32) -> &mut Self {
        self.put(&n.to_le_bytes())
    }

    fn u64(&mut self, n: u64) -> &mut Self {
        self.put(&n.to_le_bytes())
    }
}
