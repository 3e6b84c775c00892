//! The members of a zip archive, as far as torch's files need them: found through the central
//! directory, stored or (small ones) deflated, zip64 included. Field offsets are those of APPNOTE.TXT
//! 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.

use std::collections::HashMap;

use super::globals::shown;
use super::machine::MAX_TENSORS;
use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};

pub const LOCAL_HEADER: [u8; 4] = *b"PK\x03\x04";
pub const CENTRAL_HEADER: [u8; 4] = *b"PK\x01\x02";
pub const END: [u8; 4] = *b"PK\x05\x06";
pub const ZIP64_END: [u8; 4] = *b"PK\x06\x06";
pub const ZIP64_LOCATOR: [u8; 4] = *b"PK\x06\x07";

const END_BYTES: u64 = 22;
const LOCATOR_BYTES: u64 = 20;
pub const ZIP64_END_BYTES: usize = 56;
const CENTRAL_BYTES: usize = 46;
pub const LOCAL_BYTES: usize = 30;
const MAX_COMMENT: u64 = u16::MAX as u64;
/// Longest directory, in bytes; a member takes about a hundred.
const MAX_DIRECTORY: u64 = 32 << 20;
/// Most members: one for each storage, and a few small ones.
const MAX_MEMBERS: u64 = MAX_TENSORS as u64 + (1 << 10);
/// What stands in a field whose value is in a zip64 record.
pub const FULL_16: u64 = u16::MAX as u64;
pub const FULL_32: u64 = u32::MAX as u64;

const STORED: u16 = 0;
const DEFLATED: u16 = 8;
const ENCRYPTED: u16 = 1;
/// Sizes and checksum stand behind the data.
const SIZES_FOLLOW: u16 = 1 << 3;
pub const ZIP64_EXTRA: u16 = 1;

/// A member.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// First byte of its data.
    pub offset: u64,
    /// Bytes that its data take in the file.
    packed: u64,
    /// Bytes when unpacked.
    pub len: u64,
    method: u16,
}

/// The directory of an archive.
pub struct Archive {
    members: HashMap<String, Member>,
}

/// Fields of a record; what lies outside it is 0, but every record is read at its full length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u16(&self, at: usize) -> u16 {
        self.0.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
    }

    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
    }

    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
    }
}

fn bad(what: impl Into<String>) -> Error {
    Error::malformed(what)
}

impl Archive {
    /// Reads the directory of `file`, and every member's own header.
    ///
    /// # Errors
    /// `Malformed` for what is no whole archive: no directory at its end, members that overlap,
    /// leave the file, or are called otherwise in their own header. `Unsupported` for encrypted
    /// members and archives of several files. `Limit`.
    pub fn read(file: &InputFile, limits: &Limits) -> Result<Self> {
        let Directory { offset, bytes, count } = Directory::find(file)?;
        if bytes > limits.header_bytes {
            return Err(Bound::Header.reached(format!("its directory has {bytes} bytes")));
        }
        // Besides a member for each tensor there are a few small ones.
        if count > limits.tensors.saturating_add(1 << 10) {
            return Err(Bound::Tensors.reached(format!("its directory has {count} members")));
        }
        if bytes > MAX_DIRECTORY || count > MAX_MEMBERS {
            return Err(Error::limit(format!("its directory has {count} members in {bytes} bytes")));
        }
        let mut directory = vec![0; bytes as usize]; // lies within the file
        file.read_at(offset, &mut directory)?;
        let mut members = HashMap::new();
        let mut ranges = Vec::new();
        let mut rest = directory.as_slice();
        while !rest.is_empty() {
            let (name, at, mut member, used) = central(rest)?;
            rest = rest.get(used..).unwrap_or_default();
            member.offset = data_offset(file, name, at, offset, &member)?;
            let end = member.offset.checked_add(member.packed).filter(|end| *end <= offset);
            let Some(end) = end else {
                return Err(bad(format!("its member {:?} runs into the directory", shown(name))));
            };
            ranges.push((at, end));
            if members.insert(name.to_owned(), member).is_some() {
                return Err(bad(format!("its member {:?} comes twice", shown(name))));
            }
        }
        if members.len() as u64 != count {
            return Err(bad(format!("its directory has {} members, not {count}", members.len())));
        }
        ranges.sort_unstable();
        if ranges.is_sorted_by(|a, b| a.1 <= b.0) {
            Ok(Self { members })
        } else {
            Err(bad("its members overlap"))
        }
    }

    /// Names of all members, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// A member whose bytes are a range of the file.
    ///
    /// # Errors
    /// `Malformed` when there is none of this name, `Unsupported` when it is compressed.
    pub fn stored(&self, name: &str) -> Result<Member> {
        let member =
            self.members.get(name).ok_or_else(|| bad(format!("its member {:?} is missing", shown(name))))?;
        match member.method {
            STORED if member.packed == member.len => Ok(*member),
            STORED => Err(bad(format!("its member {:?} has two sizes", shown(name)))),
            _ => Err(Error::unsupported(format!("its member {:?} is compressed", shown(name)))
                .hint("torch stores tensors uncompressed: pack it again with zip -0")),
        }
    }

    /// The bytes of a small member; `None` when there is none of this name.
    ///
    /// # Errors
    /// `Limit` when it has more than `max` bytes, `Malformed` when it does not unpack,
    /// `Unsupported` for ways of compression other than deflate.
    pub fn bytes(&self, file: &InputFile, name: &str, max: u64) -> Result<Option<Vec<u8>>> {
        let Some(member) = self.members.get(name) else { return Ok(None) };
        if member.len > max || member.packed > max {
            return Err(Error::limit(format!(
                "its member {name:?} has {} bytes, at most {max} are allowed",
                member.len
            )));
        }
        let mut packed = vec![0; member.packed as usize]; // lies within the file
        file.read_at(member.offset, &mut packed)?;
        match member.method {
            STORED if member.packed == member.len => Ok(Some(packed)),
            DEFLATED => {
                let bytes = miniz_oxide::inflate::decompress_to_vec_with_limit(&packed, member.len as usize);
                let bytes = bytes.ok().filter(|b| b.len() as u64 == member.len);
                bytes.map(Some).ok_or_else(|| bad(format!("its member {:?} does not unpack", shown(name))))
            }
            STORED => Err(bad(format!("its member {:?} has two sizes", shown(name)))),
            n => Err(Error::unsupported(format!("its member {name:?} is compressed (method {n})"))),
        }
    }
}

/// Where the central directory lies.
struct Directory {
    offset: u64,
    bytes: u64,
    count: u64,
}

impl Directory {
    fn find(file: &InputFile) -> Result<Self> {
        let cut = || {
            bad("is no whole zip archive: its directory is missing at its end")
                .hint("the file is cut short: fetch it again")
        };
        let tail = file.len().min(END_BYTES + MAX_COMMENT);
        let from = file.len() - tail;
        let mut bytes = vec![0; tail as usize];
        file.read_at(from, &mut bytes)?;
        // The record whose comment fills the file exactly; the last, where there are several.
        let at = (0..bytes.len().saturating_sub(END_BYTES as usize - 1)).rev().find(|&at| {
            let record = bytes.get(at..).unwrap_or_default();
            let comment = usize::from(Fields(record).u16(20));
            record.starts_with(&END) && record.len() == END_BYTES as usize + comment
        });
        let at = at.ok_or_else(cut)?;
        let record = Fields(bytes.get(at..).unwrap_or_default());
        let mut end = from + at as u64;
        let (mut disks, mut found) = (
            record.u16(4) != 0 || record.u16(6) != 0 || record.u16(8) != record.u16(10),
            Self {
                offset: record.u32(16).into(),
                bytes: record.u32(12).into(),
                count: record.u16(10).into(),
            },
        );
        // torch writes zip64's records always, needed or not.
        if let Some(locator_at) = end.checked_sub(LOCATOR_BYTES) {
            let mut locator = [0; LOCATOR_BYTES as usize];
            file.read_at(locator_at, &mut locator)?;
            if locator.starts_with(&ZIP64_LOCATOR) {
                let record_at = Fields(&locator).u64(8);
                let mut record = [0; ZIP64_END_BYTES];
                if record_at.checked_add(ZIP64_END_BYTES as u64).is_none_or(|e| e > locator_at) {
                    return Err(bad("its zip64 record lies outside the file"));
                }
                file.read_at(record_at, &mut record)?;
                let fields = Fields(&record);
                if !record.starts_with(&ZIP64_END) {
                    return Err(bad("its zip64 record is missing"));
                }
                disks = fields.u32(16) != 0 || fields.u32(20) != 0 || fields.u64(24) != fields.u64(32);
                let wide = Self { offset: fields.u64(48), bytes: fields.u64(40), count: fields.u64(32) };
                let agree = |short, long, full| short == long || short == full;
                if !agree(found.offset, wide.offset, FULL_32)
                    || !agree(found.bytes, wide.bytes, FULL_32)
                    || !agree(found.count, wide.count, FULL_16)
                {
                    return Err(bad("its zip64 record disagrees with the one behind it"));
                }
                found = wide;
                end = record_at;
            }
        }
        if disks {
            return Err(Error::unsupported("is one of several files of a zip archive"));
        }
        // Nothing may hide before or behind it.
        if found.offset.checked_add(found.bytes) != Some(end) {
            return Err(bad(format!(
                "its directory should have {} bytes at {}, and end at {end}",
                found.bytes, found.offset
            ))
            .hint("the file is cut short, or something was put before it"));
        }
        if found.count > found.bytes / CENTRAL_BYTES as u64 {
            return Err(bad(format!("its directory cannot hold {} members", found.count)));
        }
        Ok(found)
    }
}

/// The first entry of `rest`: name, offset of the member's own header, the member (without the
/// offset of its data), and how many bytes the entry takes.
fn central(rest: &[u8]) -> Result<(&str, u64, Member, usize)> {
    let cut = || bad("its directory is cut short");
    let record = rest.get(..CENTRAL_BYTES).ok_or_else(cut)?;
    let fields = Fields(record);
    if !record.starts_with(&CENTRAL_HEADER) {
        return Err(bad("its directory holds something else than members"));
    }
    let (name_len, extra_len, comment_len) =
        (usize::from(fields.u16(28)), usize::from(fields.u16(30)), usize::from(fields.u16(32)));
    let used = CENTRAL_BYTES + name_len + extra_len + comment_len;
    let more = rest.get(CENTRAL_BYTES..used).ok_or_else(cut)?;
    let (name, more) = more.split_at_checked(name_len).ok_or_else(cut)?;
    let (extra, _) = more.split_at_checked(extra_len).ok_or_else(cut)?;
    let name = std::str::from_utf8(name).map_err(|_| bad("a member's name is not UTF-8"))?;
    if fields.u16(8) & ENCRYPTED != 0 {
        return Err(Error::unsupported(format!("its member {:?} is encrypted", shown(name))));
    }
    let mut sizes = [fields.u32(24), fields.u32(20), fields.u32(42)].map(u64::from);
    if sizes.contains(&FULL_32) {
        // zip64: the fields that are full here stand there, in this order.
        let mut wide = zip64(extra).unwrap_or_default();
        for size in sizes.iter_mut().filter(|s| **s == FULL_32) {
            let Some((value, next)) = wide.split_first_chunk() else {
                return Err(bad(format!("its member {:?} lacks its size", shown(name))));
            };
            *size = u64::from_le_bytes(*value);
            wide = next;
        }
    }
    let [len, packed, at] = sizes;
    Ok((name, at, Member { offset: 0, packed, len, method: fields.u16(10) }, used))
}

/// The zip64 field among the extra fields.
fn zip64(mut extra: &[u8]) -> Option<&[u8]> {
    while let Some((head, rest)) = extra.split_at_checked(4) {
        let (data, next) = rest.split_at_checked(Fields(head).u16(2).into())?;
        if Fields(head).u16(0) == ZIP64_EXTRA {
            return Some(data);
        }
        extra = next;
    }
    None
}

/// First byte of a member's data, behind its own header at `at`.
///
/// Names, methods and sizes have to be those of the directory: other readers go by these. Sizes may be left out, as
/// a flag says.
fn data_offset(file: &InputFile, name: &str, at: u64, directory: u64, member: &Member) -> Result<u64> {
    let outside = || bad(format!("its member {:?} lies outside the file", shown(name)));
    let head = LOCAL_BYTES + name.len();
    let end = at.checked_add(head as u64).filter(|end| *end <= directory).ok_or_else(outside)?;
    let mut header = vec![0; head];
    file.read_at(at, &mut header)?;
    let fields = Fields(&header);
    let same = header.starts_with(&LOCAL_HEADER)
        && usize::from(fields.u16(26)) == name.len()
        && header.get(LOCAL_BYTES..) == Some(name.as_bytes());
    if !same {
        return Err(bad(format!("its member {:?} is not where its directory has it", shown(name))));
    }
    let flags = fields.u16(6);
    if flags & ENCRYPTED != 0 {
        return Err(Error::unsupported(format!("its member {:?} is encrypted", shown(name))));
    }
    let agrees = |own: u32, said: u64| u64::from(own) == said || u64::from(own) == FULL_32;
    let sizes = flags & SIZES_FOLLOW != 0
        || agrees(fields.u32(18), member.packed) && agrees(fields.u32(22), member.len);
    if fields.u16(8) != member.method || !sizes {
        return Err(bad(format!(
            "its member {:?} has another size or compression in its own header than in the directory",
            shown(name)
        )));
    }
    Ok(end + u64::from(fields.u16(28))) // held against the directory by the caller
}
