//! The JSON header of one file, checked before anything is believed.

use indexmap::IndexMap;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess};

use crate::container::InputFile;
use crate::container::unique::{self, Unique};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};
use crate::tensor::{DType, TensorInfo};

/// Longest header that the format's own library reads, in bytes.
const MAX_HEADER: u64 = 100_000_000;

const METADATA: &str = "__metadata__";
/// Types of the format that nothing here computes with.
const UNSUPPORTED: &[&str] = &["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

enum Item {
    Tensor(Entry),
    Metadata(IndexMap<String, String>),
}

impl unique::Entry for Item {
    const OBJECT: &str = "an object of tensors";

    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> std::result::Result<Self, A::Error> {
        if key == METADATA {
            map.next_value::<Unique<String>>().map(|m| Self::Metadata(m.0))
        } else {
            map.next_value().map(Self::Tensor)
        }
        .map_err(|e| A::Error::custom(format_args!("{key:?}: {e}")))
    }
}

/// Tensors of one file, ordered by name, and its `__metadata__`.
pub(super) struct Header {
    pub tensors: Vec<TensorInfo>,
    pub metadata: IndexMap<String, String>,
    /// Where the last tensor ends.
    pub end: u64,
}

/// The tensors of the file number `number` that begins with `header`, and the length of that file.
///
/// # Errors
/// `Malformed` for what is no such beginning; `Limit`.
pub fn parse_header(header: Vec<u8>, number: usize, limits: &Limits) -> Result<(Vec<TensorInfo>, u64)> {
    let header = Header::parse(&InputFile::of_bytes("", header), number, limits)?;
    Ok((header.tensors, header.end))
}

impl Header {
    /// Reads and checks the header of `file`, whose number among the shards is `number`.
    pub fn read(file: &InputFile, number: usize, limits: &Limits) -> Result<Self> {
        let header = Self::parse(file, number, limits).map_err(|e| e.at(file.path()))?;
        header.check_end(file.len()).map_err(|e| e.at(file.path()))?;
        Ok(header)
    }

    /// Of a file that ends before its data.
    fn parse(file: &InputFile, number: usize, limits: &Limits) -> Result<Self> {
        let mut len = [0; 8];
        if file.len() < 8 {
            return Err(Error::malformed(format!("is no safetensors file: it has {} bytes", file.len())));
        }
        file.read_at(0, &mut len)?;
        let len = u64::from_le_bytes(len);
        let data = len.checked_add(8).filter(|d| *d <= file.len());
        let Some(data) = data else {
            return Err(Error::malformed(format!(
                "its header should have {len} bytes, the file has {}",
                file.len()
            ))
            .hint("the file is cut short, or no safetensors file"));
        };
        if len > MAX_HEADER.min(limits.header_bytes) {
            let message = |most| format!("its header has {len} bytes, at most {most} are allowed");
            return Err(match len > MAX_HEADER {
                true => Error::limit(message(MAX_HEADER)),
                false => Bound::Header.reached(message(limits.header_bytes)),
            });
        }
        let mut json = vec![0; len as usize];
        file.read_at(8, &mut json)?;
        if json.first() != Some(&b'{') {
            return Err(Error::malformed("is no safetensors file: its header does not begin with \"{\""));
        }
        let items: Unique<Item> = serde_json::from_slice(&json).map_err(|e| {
            Error::malformed(format!("its header is faulty: {e}")).offset(8 + byte_of(&json, &e))
        })?;
        if items.0.len() as u64 > limits.tensors {
            return Err(Bound::Tensors.reached(format!(
                "{} tensors, at most {} are allowed",
                items.0.len(),
                limits.tensors
            )));
        }
        let tensors = Vec::with_capacity(items.0.len());
        let mut header = Self { tensors, metadata: IndexMap::new(), end: data };
        for (name, item) in items.0 {
            match item {
                Item::Metadata(map) => header.metadata = map,
                Item::Tensor(entry) => {
                    let info = entry
                        .info(&name, number, data)
                        .map_err(|e| e.context(format_args!("tensor {name:?}")).tensor(&name))?;
                    header.tensors.push(info);
                }
            }
        }
        header.check_tiling(data)?;
        header.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(header)
    }

    /// Tensors must cover the data without gap, overlap or rest: nothing can hide there.
    fn check_tiling(&mut self, data: u64) -> Result<()> {
        self.tensors.sort_by_key(|t| (t.offset, t.nbytes));
        let mut end = data;
        for t in &self.tensors {
            if t.offset != end {
                let what = if t.offset < end { "overlaps the one before" } else { "leaves a gap before it" };
                return Err(Error::malformed(format!(
                    "tensor {:?} {what}: it begins at {}, not {end}",
                    t.name, t.offset
                ))
                .tensor(&t.name)
                .offset(t.offset));
            }
            end = t.offset.saturating_add(t.nbytes);
        }
        self.end = end;
        Ok(())
    }

    /// That a file of so many bytes ends with them.
    fn check_end(&self, len: u64) -> Result<()> {
        let end = self.end;
        if end > len {
            return Err(Error::malformed(format!("its tensors end at byte {end}, the file has {len}"))
                .hint("the file is cut short: fetch it again"));
        }
        if end < len {
            return Err(Error::malformed(format!(
                "{} bytes behind its last tensor belong to nothing",
                len - end
            ))
            .offset(end));
        }
        Ok(())
    }
}

/// The byte of a text that an error's line and column name.
fn byte_of(json: &[u8], error: &serde_json::Error) -> u64 {
    let lines = json.split_inclusive(|b| *b == b'\n').take(error.line().saturating_sub(1));
    let before: usize = lines.map(<[u8]>::len).sum();
    (before + error.column().saturating_sub(1)).min(json.len()) as u64
}

impl Entry {
    fn info(self, name: &str, file: usize, data: u64) -> Result<TensorInfo> {
        let dtype = DType::from_safetensors_name(&self.dtype).ok_or_else(|| {
            let what = if UNSUPPORTED.contains(&self.dtype.as_str()) { "supported" } else { "known" };
            Error::unsupported(format!("its type {:?} is not {what}", self.dtype))
        })?;
        let nbytes = dtype.nbytes(&self.shape)?;
        let (begin, end) = self.data_offsets;
        if end.checked_sub(begin) != Some(nbytes) {
            return Err(Error::malformed(format!(
                "{dtype} of shape {:?} takes {nbytes} bytes, its offsets are {begin} to {end}",
                self.shape
            )));
        }
        let offset = data.checked_add(begin).ok_or_else(|| Error::malformed("its offset overflows"))?;
        Ok(TensorInfo { name: name.into(), dtype, shape: self.shape, file, offset, nbytes })
    }
}
