//! qconv's own container: tensors in encodings that no other file has room for, the model's other files, and
//! where all of it comes from. `formats/spec/qpack.md` describes every byte.
//!
//! A file is a header, *segments* one after the other, a manifest in canonical JSON, and a footer that says
//! where the manifest lies and what its SHA-256 is. The manifest lists the segments in the order of the file
//! with their lengths and SHA-256: where each begins follows from that, so that segments cannot overlap, and
//! nothing can lie between them but zeros.
//!
//! Here are the bytes and the manifest; what tensors in an encoding decode to is in `packed::qpack`.

mod encoding;
mod fields;
mod frame;
mod json;
mod manifest;
mod origin;
pub mod planes;
mod rans;
mod read;
mod sums;
pub mod write;

pub use encoding::{
    Codebook, Encoding, Integers, MAX_COLS, Matrix, Nested, PartSize, Scaled, Sparse, Ternary, Trits,
    Unknown, Zeros,
};
pub use frame::{ALIGNMENT, VERSION, is_magic, is_qpack};
pub use json::Kept;
pub use manifest::is_path;
pub use manifest::{Compression, Manifest, Part, Segment, ShardSeal, SideFile, Split, Tensor};
pub use origin::{Origin, Source};
pub(crate) use read::part_name;
pub use read::{Content, Fault, Qpack, Where};
pub use sums::sum_of_file;

/// The file of a model from Hugging Face.
pub const CONFIG: &str = "config.json";
/// The file of a model from GGUF: its metadata, as a GGUF file without tensors.
pub const METADATA: &str = "metadata.gguf";
/// Where headers of the safetensors files are that a model was made from.
pub const HEADERS: &str = ".qpack/headers/";
/// The last part of a file's name, without the dot.
pub const SUFFIX: &str = "qpack";
