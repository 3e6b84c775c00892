//! Converts, quantizes, inspects, verifies and runs language-model files.
//!
//! The flow of a conversion is open, recognise, plan, stream, finish, verify.
//! Modules import downward only, from `cli` to `tensor`.
#![warn(missing_docs)]
// What may hold `unsafe` is named where it is allowed; each module without such a place forbids it.
#![deny(unsafe_code)]
#![deny(clippy::undocumented_unsafe_blocks)]

#[forbid(unsafe_code)]
pub mod arch;
pub mod block;
#[forbid(unsafe_code)]
pub mod calibrate;
pub mod container;
#[forbid(unsafe_code)]
pub mod convert;
#[forbid(unsafe_code)]
pub mod diff;
#[forbid(unsafe_code)]
pub mod error;
#[forbid(unsafe_code)]
pub mod eval;
#[forbid(unsafe_code)]
pub mod exec;
#[cfg(feature = "ggml")]
pub mod ggml;
#[forbid(unsafe_code)]
pub mod inspect;
#[forbid(unsafe_code)]
pub mod limits;
#[forbid(unsafe_code)]
pub mod mil;
#[forbid(unsafe_code)]
pub mod mix;
#[forbid(unsafe_code)]
pub mod model;
#[forbid(unsafe_code)]
pub mod packed;
#[forbid(unsafe_code)]
pub mod plain;
#[forbid(unsafe_code)]
pub mod quantize;
pub mod sha256;
#[forbid(unsafe_code)]
pub mod sys;
#[forbid(unsafe_code)]
pub mod tensor;
#[forbid(unsafe_code)]
pub mod verify;
#[forbid(unsafe_code)]
pub mod vocab;
#[forbid(unsafe_code)]
pub mod work;

pub use error::{Error, ErrorKind, Result};
pub use model::{Model, open};
