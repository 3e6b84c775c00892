//! What a model's matrices are multiplied with, over a text: the statistics that quantizers weigh their
//! errors with.

#[cfg(feature = "ggml")]
pub mod checkpoint;
#[cfg(feature = "ggml")]
pub mod collect;
pub mod importance;
pub mod statistics;
pub mod text;
