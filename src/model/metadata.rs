//! What a model says of itself, as JSON, whatever it is written in.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

use crate::container::gguf::{Array, Gguf, Metadata, Value};
use crate::container::qpack::Qpack;
use crate::error::Result;
use crate::limits::Limits;
use crate::sha256::{Sha256, hex};

/// The file that says what a model is, of Hugging Face.
pub(super) const CONFIG: &str = "config.json";
/// The same in a `.qpack` file that was made of a GGUF file.
pub(super) use crate::container::qpack::METADATA as GGUF;

/// Most elements of arrays that the entries of one file show: what a file takes 1 byte for takes 72 here.
const MOST_ELEMENTS: usize = 2 << 20;

/// The entries of a GGUF file. Of arrays beyond all use there are the number of elements and the SHA-256 of these, each
/// as a line of text.
pub fn of_gguf(metadata: &Metadata) -> Map<String, Json> {
    let mut left = MOST_ELEMENTS;
    metadata.iter().map(|(k, v)| (k.to_string(), json_of(v, &mut left))).collect()
}

/// `__metadata__` of all files.
pub(super) fn of_safetensors(files: &[IndexMap<String, String>]) -> Map<String, Json> {
    files.iter().flatten().map(|(k, v)| (k.clone(), json!(v))).collect()
}

/// Those that a `.qpack` file has of a GGUF file.
///
/// # Errors
/// As [`Gguf::open`].
pub(super) fn read_gguf(file: &Qpack, path: &Path, limits: &Limits) -> Result<Metadata> {
    let bytes = file.read_file(GGUF, limits)?;
    Gguf::metadata_of_bytes(path, bytes, limits).map_err(|e| e.context(GGUF))
}

/// A value of a GGUF file, with `left` elements at most.
fn json_of(value: &Value, left: &mut usize) -> Json {
    match value {
        Value::String(s) => json!(String::from_utf8_lossy(s)),
        Value::Bool(b) => json!(b),
        Value::F32(v) => serde_json::from_str(&v.to_string()).unwrap_or_else(|_| json!(v.to_string())),
        Value::F64(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::U8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::Array(a) => {
            let Some(rest) = left.checked_sub(a.len()) else { return summary(a) };
            *left = rest;
            match a {
                Array::Array(list) => {
                    Json::Array(list.iter().map(|a| json_of(&Value::Array(a.clone()), left)).collect())
                }
                a => {
                    let mut shown = Vec::with_capacity(a.len());
                    shown.extend((0..a.len()).filter_map(|i| a.get(i)).map(|v| json_of(&v, left)));
                    Json::Array(shown)
                }
            }
        }
    }
}

/// What stands for an array of too many elements.
fn summary(array: &Array) -> Json {
    let mut sum = Sha256::new();
    lines_of(array, &mut sum);
    json!({ "elements": array.len(), "sha256": hex(&sum.finalize()) })
}

/// Adds each element as a line.
fn lines_of(array: &Array, sum: &mut Sha256) {
    match array {
        Array::Array(list) => list.iter().for_each(|a| lines_of(a, sum)),
        a => (0..a.len()).filter_map(|i| a.get(i)).for_each(|v| sum.update(format!("{v}\n"))),
    }
}
