//! What a model's matrices are multiplied with, over a text: the statistics that quantizers weigh their
//! errors with.

pub mod text;
