//! What a model's matrices are multiplied with, over a text: the statistics that quantizers weigh their
//! errors with.

#[cfg(feature = "ggml")]
pub mod checkpoint;
#[cfg(feature = "ggml")]
pub mod collect;
pub mod gram;
pub mod importance;
#[cfg(feature = "ggml")]
pub mod inputs;
pub mod merge;
#[cfg(feature = "ggml")]
pub mod moments;
pub mod plan;
pub mod resume;
pub mod statistics;
pub mod text;
