//! What a model does, measured: logits and embeddings against a reference, token parity, generated
//! text.

pub mod chat;
#[cfg(feature = "ggml")]
mod compare;
#[cfg(feature = "ggml")]
pub mod embed;
#[cfg(feature = "ggml")]
pub mod generate;
pub mod logits;
pub mod parity;
#[cfg(feature = "ggml")]
mod probe;
#[cfg(feature = "ggml")]
pub mod trial;
