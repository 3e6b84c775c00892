//! Where metadata entries lie in a file, and where its header ends: what says which bytes a remark is about.

use std::collections::HashMap;

use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::limits::Limits;

use super::cursor::Cursor;
use super::layout::{KEY_ALIGNMENT, MAGIC, MAX_DIMS, MAX_KEY, align_up, alignment};
use super::value::Metadata;

/// Where the parts of a header lie.
#[derive(Debug, Default)]
pub struct Places {
    /// For each metadata key its first byte: that of the key's length.
    pub entries: HashMap<String, u64>,
    /// Where the header ends, before the padding in front of the data.
    pub end: u64,
    /// Where the data begins.
    pub data_offset: u64,
    /// Alignment of the data in bytes; 0 where nothing is known.
    pub alignment: u32,
}

/// Where the parts of the header of `file` lie.
///
/// # Errors
/// `Malformed` and `Limit` as for [`Gguf::open`](super::Gguf::open); `Io`.
pub fn places(file: &InputFile, limits: &Limits) -> Result<Places> {
    let mut c = Cursor::new(file, limits);
    if [c.u8()?, c.u8()?, c.u8()?, c.u8()?] != MAGIC {
        return Err(Error::unsupported("is no GGUF file: it does not begin with \"GGUF\""));
    }
    c.big_endian = c.u32()? & 0xffff == 0;
    let (tensors, entries) = (c.u64()?, c.u64()?);
    let (mut places, mut metadata) = (Places::default(), Metadata::default());
    for _ in 0..entries.min(limits.metadata_entries) {
        let at = c.pos();
        let key = String::from_utf8_lossy(&c.string(MAX_KEY)?).into_owned();
        let value = c.value()?;
        if key == KEY_ALIGNMENT {
            metadata.set(key.clone(), value);
        }
        places.entries.insert(key, at);
    }
    for _ in 0..tensors.min(limits.tensors) {
        c.string(MAX_KEY)?;
        for _ in 0..c.u32()?.min(MAX_DIMS) {
            c.u64()?;
        }
        c.u32()?;
        c.u64()?;
    }
    places.end = c.pos();
    places.alignment = alignment(&metadata)?;
    places.data_offset = align_up(places.end, places.alignment)
        .ok_or_else(|| Error::malformed("the header overflows").offset(places.end))?;
    Ok(places)
}
