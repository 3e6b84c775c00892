//! GGUF: ggml's file format, versions 2 and 3 read, version 3 written.
//! The bytes are described in `formats/spec/gguf.md`.

mod value;

pub use value::{Array, Metadata, Value, ValueType};
