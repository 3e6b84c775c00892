//! Safetensors: Hugging Face's tensor format, single files and shards with an index. The bytes
//! are described in `formats/spec/safetensors.md`.

mod header;
mod read;
pub mod write;

pub use header::parse_header;
pub use read::{NAMING, SafeTensors, open, open_located};
