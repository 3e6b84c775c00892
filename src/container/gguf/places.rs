//! Where metadata entries lie in a file: what says which bytes a remark is about.

use std::collections::HashMap;

use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::limits::Limits;

use super::cursor::Cursor;
use super::layout::{MAGIC, MAX_KEY};

/// For each metadata key of `file` its first byte: that of the key's length.
///
/// # Errors
/// `Malformed` and `Limit` as for [`Gguf::open`](super::Gguf::open); `Io`.
pub fn entry_places(file: &InputFile, limits: &Limits) -> Result<HashMap<String, u64>> {
    let mut c = Cursor::new(file, limits);
    if [c.u8()?, c.u8()?, c.u8()?, c.u8()?] != MAGIC {
        return Err(Error::unsupported("is no GGUF file: it does not begin with \"GGUF\""));
    }
    c.big_endian = c.u32()? & 0xffff == 0;
    let (_, entries) = (c.u64()?, c.u64()?);
    let mut places = HashMap::new();
    for _ in 0..entries.min(limits.metadata_entries) {
        let at = c.pos();
        let key = String::from_utf8_lossy(&c.string(MAX_KEY)?).into_owned();
        c.value()?;
        places.insert(key, at);
    }
    Ok(places)
}
