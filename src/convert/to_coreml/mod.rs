//! To Core ML packages.

pub mod weights;
