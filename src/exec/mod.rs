//! Executes the programs of Core ML packages, on any machine.
//!
//! What is executed is what stands in the file: messages of [`container::coreml`](crate::container::coreml), not the
//! graph they were built from. Operations are those of language models, see `ops`; formulas are Apple's (coremltools,
//! `converters/mil/mil/ops/defs`). Weights stay in their file and are read and decoded in tiles as they are
//! used: a file that changes meanwhile is an error or another number, never a signal. Every result is held against the
//! type that the program declares. The same inputs give the same bits, however many
//! threads there are: those of rayon's current pool.
//!
//! [`Program`] is any program, called function by function; [`Session`] decodes tokens with those that have an
//! interface that it knows.

mod call;
mod ops;
mod parse;
mod product;
mod program;
mod session;
mod strided;
mod tensor;
mod weight;

pub use program::{Program, States};
pub use session::{LanguageModel, Session};
pub use tensor::Tensor;

/// What becomes of results between operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// They stay float32, whatever type is declared: what the program means.
    #[default]
    F32,
    /// Those that are declared float16 are rounded to it, as devices do.
    F16,
}
