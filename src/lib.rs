//! Converts, quantizes, inspects, verifies and runs language-model files.
//!
//! The flow of a conversion is open, recognise, plan, stream, finish, verify.
//! Modules import downward only, from `cli` to `tensor`.
#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod arch;
pub mod block;
pub mod calibrate;
pub mod container;
pub mod convert;
pub mod diff;
pub mod error;
pub mod eval;
pub mod exec;
#[cfg(feature = "ggml")]
pub mod ggml;
pub mod inspect;
pub mod limits;
pub mod mil;
pub mod mix;
pub mod model;
pub mod packed;
pub mod plain;
pub mod quantize;
pub mod sha256;
pub mod sys;
pub mod tensor;
pub mod verify;
pub mod vocab;
pub mod work;

pub use error::{Error, ErrorKind, Result};
pub use model::{Model, open};
