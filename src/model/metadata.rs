//! What a model says of itself, as JSON, whatever it is written in.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

use crate::container::gguf::{Array, Gguf, Metadata, Value};
use crate::container::qpack::Qpack;
use crate::error::Result;
use crate::limits::Limits;

/// The file that says what a model is, of Hugging Face.
pub(super) const CONFIG: &str = "config.json";
/// The same in a `.qpack` file that was made of a GGUF file.
pub(super) use crate::container::qpack::METADATA as GGUF;

/// The entries of a GGUF file.
pub(super) fn of_gguf(metadata: &Metadata) -> Map<String, Json> {
    metadata.iter().map(|(k, v)| (k.to_string(), json_of(v))).collect()
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

/// A value of a GGUF file.
pub fn json_of(value: &Value) -> Json {
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
        Value::Array(Array::Array(list)) => {
            Json::Array(list.iter().map(|a| json_of(&Value::Array(a.clone()))).collect())
        }
        Value::Array(a) => Json::Array((0..a.len()).filter_map(|i| a.get(i)).map(|v| json_of(&v)).collect()),
    }
}
