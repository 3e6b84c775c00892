//! Core ML packages (`.mlpackage`) that hold ML Programs. `formats/spec/coreml.md` describes every byte.
//!
//! A package is a directory: a manifest, a model (a protocol buffer, [`Model`]), and a weight file ([`blob`]) whose
//! blobs the program names by their places. [`Package::open`] reads all of it but the weights' data, and has checked
//! that each value lies where its type says. [`package::small_files`] and [`blob::layout`] are what a new one is
//! written from: sizes are known before there are data, and the same input gives the same bytes.
//!
//! [`constants()`] says how each weight of a function is encoded, and where its parts stand.
//!
//! Here are messages and bytes; what operations mean is for whoever builds or executes programs.

pub mod blob;
mod check;
pub mod chunks;
pub mod constants;
mod dtype;
mod message;
pub mod mil;
pub mod model;
pub mod package;
mod wire;

pub use constants::{Constant, Form, Place, constant, constants};
pub use dtype::{DataType, Held};
pub use message::{Message, Only};
pub use model::Model;
pub use package::Package;
pub use wire::{Unknown, decode, encode};
