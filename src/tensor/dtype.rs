//! Element and block types, and the one table they all come from.

use crate::error::{Error, Result};

macro_rules! dtypes {
    ($($variant:ident $name:literal ggml $ggml:expr, safetensors $st:expr, $block:literal => $bytes:literal;)*) => {
        /// Element types and ggml block types alike.
        ///
        /// A type stores `block_size` elements in `type_size` bytes; for element types
        /// `block_size` is 1. Names are ggml's and safetensors' own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types, missing_docs)]
        pub enum DType { $($variant),* }

        impl DType {
            /// Every type, in table order.
            pub const ALL: &'static [DType] = &[$(DType::$variant),*];

            /// ggml's name (`q4_0` is written `Q4_0`, `q4_K` is `Q4_K`).
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name),* }
            }

            /// The number in a GGUF tensor header (`enum ggml_type`), where ggml has the type.
            pub const fn ggml_id(self) -> Option<u32> {
                match self { $(DType::$variant => $ggml),* }
            }

            /// The name in a safetensors header, where safetensors has the type.
            pub const fn safetensors_name(self) -> Option<&'static str> {
                match self { $(DType::$variant => $st),* }
            }

            /// Elements in a block.
            pub const fn block_size(self) -> u64 {
                match self { $(DType::$variant => $block),* }
            }

            /// Bytes of a block.
            pub const fn type_size(self) -> u64 {
                match self { $(DType::$variant => $bytes),* }
            }
        }
    };
}

// Sources: `enum ggml_type` and `type_traits` of ggml 0.26 (ggml.h, ggml-common.h); the dtype
// strings of the safetensors format.
dtypes! {
    F32      "F32"     ggml Some(0),  safetensors Some("F32"),  1 => 4;
    F16      "F16"     ggml Some(1),  safetensors Some("F16"),  1 => 2;
    BF16     "BF16"    ggml Some(30), safetensors Some("BF16"), 1 => 2;
    F64      "F64"     ggml Some(28), safetensors Some("F64"),  1 => 8;
    I8       "I8"      ggml Some(24), safetensors Some("I8"),   1 => 1;
    I16      "I16"     ggml Some(25), safetensors Some("I16"),  1 => 2;
    I32      "I32"     ggml Some(26), safetensors Some("I32"),  1 => 4;
    I64      "I64"     ggml Some(27), safetensors Some("I64"),  1 => 8;
    U8       "U8"      ggml None,     safetensors Some("U8"),   1 => 1;
    U16      "U16"     ggml None,     safetensors Some("U16"),  1 => 2;
    U32      "U32"     ggml None,     safetensors Some("U32"),  1 => 4;
    U64      "U64"     ggml None,     safetensors Some("U64"),  1 => 8;
    Bool     "BOOL"    ggml None,     safetensors Some("BOOL"), 1 => 1;
    F8_E4M3  "F8_E4M3" ggml None,     safetensors Some("F8_E4M3"), 1 => 1;
    F8_E5M2  "F8_E5M2" ggml None,     safetensors Some("F8_E5M2"), 1 => 1;
    F8_E8M0  "F8_E8M0" ggml None,     safetensors Some("F8_E8M0"), 1 => 1;
    Q4_0     "Q4_0"    ggml Some(2),  safetensors None, 32 => 18;
    Q4_1     "Q4_1"    ggml Some(3),  safetensors None, 32 => 20;
    Q5_0     "Q5_0"    ggml Some(6),  safetensors None, 32 => 22;
    Q5_1     "Q5_1"    ggml Some(7),  safetensors None, 32 => 24;
    Q8_0     "Q8_0"    ggml Some(8),  safetensors None, 32 => 34;
    Q8_1     "Q8_1"    ggml Some(9),  safetensors None, 32 => 36;
    Q2_K     "Q2_K"    ggml Some(10), safetensors None, 256 => 84;
    Q3_K     "Q3_K"    ggml Some(11), safetensors None, 256 => 110;
    Q4_K     "Q4_K"    ggml Some(12), safetensors None, 256 => 144;
    Q5_K     "Q5_K"    ggml Some(13), safetensors None, 256 => 176;
    Q6_K     "Q6_K"    ggml Some(14), safetensors None, 256 => 210;
    Q8_K     "Q8_K"    ggml Some(15), safetensors None, 256 => 292;
    IQ2_XXS  "IQ2_XXS" ggml Some(16), safetensors None, 256 => 66;
    IQ2_XS   "IQ2_XS"  ggml Some(17), safetensors None, 256 => 74;
    IQ3_XXS  "IQ3_XXS" ggml Some(18), safetensors None, 256 => 98;
    IQ1_S    "IQ1_S"   ggml Some(19), safetensors None, 256 => 50;
    IQ4_NL   "IQ4_NL"  ggml Some(20), safetensors None, 32 => 18;
    IQ3_S    "IQ3_S"   ggml Some(21), safetensors None, 256 => 110;
    IQ2_S    "IQ2_S"   ggml Some(22), safetensors None, 256 => 82;
    IQ4_XS   "IQ4_XS"  ggml Some(23), safetensors None, 256 => 136;
    IQ1_M    "IQ1_M"   ggml Some(29), safetensors None, 256 => 56;
    TQ1_0    "TQ1_0"   ggml Some(34), safetensors None, 256 => 54;
    TQ2_0    "TQ2_0"   ggml Some(35), safetensors None, 256 => 66;
    MXFP4    "MXFP4"   ggml Some(39), safetensors None, 32 => 17;
    NVFP4    "NVFP4"   ggml Some(40), safetensors None, 64 => 36;
    Q1_0     "Q1_0"    ggml Some(41), safetensors None, 128 => 18;
    Q2_0     "Q2_0"    ggml Some(42), safetensors None, 64 => 18;
}

impl DType {
    /// The type with this number in a GGUF tensor header.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.ggml_id() == Some(id))
    }

    /// The type with this name in a safetensors header.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.safetensors_name() == Some(name))
    }

    /// The type with this name, in any case: `q8_0`, `Q8_0`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// Whether several elements share a block.
    pub fn is_block(self) -> bool {
        self.block_size() > 1
    }

    /// Bits per weight, block overhead included.
    pub fn bits_per_weight(self) -> f64 {
        self.type_size() as f64 * 8.0 / self.block_size() as f64
    }

    /// Bytes that `elements` consecutive elements take.
    ///
    /// # Errors
    /// `Malformed` when they do not fill whole blocks, or the size does not fit 63 bits.
    pub fn bytes_for(self, elements: u64) -> Result<u64> {
        if !elements.is_multiple_of(self.block_size()) {
            return Err(Error::malformed(format!(
                "{elements} elements do not fill blocks of {} ({self})",
                self.block_size()
            )));
        }
        (elements / self.block_size())
            .checked_mul(self.type_size())
            .filter(|&n| n <= i64::MAX as u64)
            .ok_or_else(|| Error::malformed(format!("{elements} elements of {self} exceed 2^63 bytes")))
    }

    /// Bytes of a whole tensor; every row must fill whole blocks.
    ///
    /// # Errors
    /// As [`Self::bytes_for`]; also when the number of elements does not fit.
    pub fn nbytes(self, shape: &[u64]) -> Result<u64> {
        let row = shape.last().copied().unwrap_or(1);
        let elements = super::elements(shape)?;
        self.bytes_for(row)?;
        self.bytes_for(elements)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl serde::Serialize for DType {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_unique() {
        for (i, a) in DType::ALL.iter().enumerate() {
            for b in &DType::ALL[i + 1..] {
                assert_ne!(a.name(), b.name());
                assert!(a.ggml_id().is_none() || a.ggml_id() != b.ggml_id(), "{a} {b}");
            }
            assert_eq!(DType::from_name(&a.name().to_lowercase()), Some(*a));
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(DType::Q8_0.nbytes(&[3, 64]).unwrap(), 3 * 2 * 34);
        assert!(DType::Q8_0.nbytes(&[32, 3]).is_err());
        assert!(DType::F32.nbytes(&[1 << 40, 1 << 40]).is_err());
        assert!(DType::F64.nbytes(&[1 << 61]).is_err());
    }
}
