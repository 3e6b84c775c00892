//! GGUF, ggml's file format: metadata, tensor table, data. The bytes are described in
//! `formats/spec/gguf.md`.
//!
//! [`Gguf::open`] reads a file or a split set, and a `.qpack` file that was made of one; [`write::Layout`] plans a file to write.

mod cursor;
mod layout;
mod model;
mod packed;
mod places;
mod read;
mod value;
pub mod write;

pub use layout::{DEFAULT_ALIGNMENT, MAGIC};
pub use places::{Places, places};
pub use read::{Gguf, is_gguf};
pub use value::{Array, Metadata, Value, ValueType};
