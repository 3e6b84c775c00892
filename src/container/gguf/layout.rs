//! The raw facts of the format that reader and writer share. See `formats/spec/gguf.md`.

use crate::error::{Error, Result};

use super::value::{Metadata, Value};

/// First four bytes of every file, in both byte orders.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
pub(super) const VERSION: u32 = 3;
/// Alignment of tensor data when `general.alignment` is absent, in bytes.
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Where a file states another alignment, as UINT32.
pub(super) const KEY_ALIGNMENT: &str = "general.alignment";

/// Longest metadata key, in bytes.
pub(super) const MAX_KEY: u64 = 65535;
/// Longest tensor name that ggml loads: `GGML_MAX_NAME` is 64 and counts the final NUL.
pub(super) const MAX_NAME: usize = 63;
/// `GGML_MAX_DIMS`.
pub(super) const MAX_DIMS: u32 = 4;

/// Fewest bytes of a metadata entry: key length, one byte of key, type, one byte of value.
pub(super) const MIN_ENTRY: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor info: name length, one byte of name, dimension count, type, offset.
pub(super) const MIN_INFO: u64 = 8 + 1 + 4 + 4 + 8;

/// Keys that llama.cpp's split files carry.
pub(super) const KEY_SPLIT_NO: &str = "split.no";
pub(super) const KEY_SPLIT_COUNT: &str = "split.count";
pub(super) const KEY_SPLIT_TENSORS: &str = "split.tensors.count";

/// Next multiple of `alignment` (a power of two) that is not below `n`.
pub(super) fn align_up(n: u64, alignment: u32) -> Option<u64> {
    n.checked_next_multiple_of(u64::from(alignment))
}

/// The alignment that `metadata` states, or the default.
pub(super) fn alignment(metadata: &Metadata) -> Result<u32> {
    let fault = match metadata.get(KEY_ALIGNMENT) {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(n)) if n.is_power_of_two() => return Ok(n),
        Some(Value::U32(n)) => format!("is {n}, not a power of two"),
        Some(other) => format!("has type {}, not UINT32", other.value_type().name()),
    };
    Err(Error::malformed(format!("{KEY_ALIGNMENT} {fault}")).key(KEY_ALIGNMENT))
}

/// Checks that a metadata key is one every reader accepts.
pub(super) fn check_key(key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::malformed("metadata key is empty"));
    }
    if key.len() as u64 > MAX_KEY {
        return Err(Error::malformed(format!(
            "metadata key of {} bytes, at most {MAX_KEY} are allowed",
            key.len()
        )));
    }
    if key.contains('\0') {
        return Err(Error::malformed(format!("metadata key {key:?} contains a NUL")));
    }
    Ok(())
}
