//! Quantizers that know what a matrix is for: from the second moments of its inputs they choose codes
//! so that its output changes least, on the grids that the block types have.

pub mod gptq;
