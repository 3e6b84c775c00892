//! Weights that a graph refers to: how they are encoded, and where they stand. Their values are not seen here.

use crate::container::coreml::DataType;

/// Answers a builder's question for a weight. The conversion answers with places in the weight file, tests with
/// anything.
pub trait Weights {
    /// The tensor called so (by its GGUF name, `blk.0.attn_q.weight`), or `None` where the model has none.
    fn get(&self, name: &str) -> Option<Encoded>;
}

/// An encoded tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// What the value is called in the program: the tensor's name with `_` for what an identifier cannot hold.
    pub name: String,
    /// Its shape once decoded, outermost dimension first: `[out, in]`, `[experts, out, in]`, `[n]`.
    pub shape: Vec<u64>,
    /// How it is encoded.
    pub form: Form,
    /// A factor for each output, `[out]` (`[experts, out]` for experts), multiplied in behind the product.
    pub after: Option<Stored>,
}

/// An encoding of a weight. The operands of `constexpr` operations have the rank of the weight; a lookup table has
/// two dimensions more: `[groups of each dimension.., 2^bits, 1]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Values (float16).
    Plain(Stored),
    /// `constexpr_blockwise_shift_scale`: `scale * (data - offset)`.
    Blockwise {
        /// Codes.
        data: Stored,
        /// Scales, one for each block.
        scale: Stored,
        /// Zero points, of the codes' type.
        offset: Option<Stored>,
    },
    /// `constexpr_lut_to_dense`.
    Lut {
        /// Indices.
        indices: Stored,
        /// Tables.
        lut: Stored,
    },
    /// `constexpr_lut_to_sparse`, then `constexpr_sparse_to_dense`.
    SparseLut {
        /// One bit per element.
        mask: Stored,
        /// Indices of the elements that are not zero, in order: `[count]`.
        indices: Stored,
        /// Tables.
        lut: Stored,
    },
}

/// Elements that stand somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Their type.
    pub dtype: DataType,
    /// Their shape.
    pub shape: Vec<u64>,
    /// Where they stand.
    pub place: Place,
}

/// Where elements stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the weight file: the place of the blob's record.
    File(u64),
    /// In the program: bytes as the file would hold them.
    Immediate(Vec<u8>),
}
