//! What a model does, measured: logits and embeddings against a reference, token parity, generated
//! text.

pub mod baseline;
#[cfg(feature = "ggml")]
pub mod bench;
pub mod chat;
#[cfg(feature = "ggml")]
mod compare;
pub mod coreml;
pub mod dialogue;
#[cfg(feature = "ggml")]
pub mod embed;
pub mod engine;
pub mod generate;
pub mod logits;
pub mod parity;
pub mod picture;
pub mod plot;
#[cfg(feature = "ggml")]
mod probe;
#[cfg(feature = "reference")]
pub mod reference;
pub mod sample;
pub mod score;
mod softmax;
pub mod stop;
pub mod tokens;
#[cfg(feature = "ggml")]
pub mod trial;
pub mod windows;

/// What is evaluated where no text is given: the second part of Jane Austen's "Persuasion" (1817, in
/// the public domain), 200,000 bytes of English prose.
pub const SAMPLE_TEXT: &str = include_str!("../../fixtures/tiny-llama/evaluation.txt");
