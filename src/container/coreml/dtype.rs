//! Types of elements, and the one table they all come from.

use super::message::varint_slot;
use super::wire::Varint;
use crate::error::{Error, Result};

macro_rules! data_types {
    ($($variant:ident $name:literal $number:literal, $bits:literal bits, blob $blob:expr, $held:ident;)*) => {
        /// Type of the elements of a tensor, `DataType` of `MIL.proto`.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum DataType {
            /// None is said.
            #[default]
            Unused,
            $($variant),*
        }

        impl DataType {
            /// Every type, in the order of their numbers.
            pub const ALL: &'static [DataType] = &[$(DataType::$variant),*];

            /// Its name, as in the text form of programs.
            pub const fn name(self) -> &'static str {
                match self {
                    Self::Unused => "no type",
                    $(Self::$variant => $name),*
                }
            }

            /// Its number in `MIL.proto`.
            pub const fn number(self) -> u32 {
                match self {
                    Self::Unused => 0,
                    $(Self::$variant => $number),*
                }
            }

            /// Bits of an element; 0 for texts, which have no size.
            pub const fn bits(self) -> u32 {
                match self {
                    Self::Unused => 0,
                    $(Self::$variant => $bits),*
                }
            }

            /// Its number in weight files, where they can hold it.
            pub const fn blob_number(self) -> Option<u32> {
                match self {
                    Self::Unused => None,
                    $(Self::$variant => $blob),*
                }
            }

            /// Which list of a `TensorValue` holds its elements.
            pub const fn held(self) -> Held {
                match self {
                    Self::Unused => Held::Bytes,
                    $(Self::$variant => Held::$held),*
                }
            }
        }
    };
}

// Sources: `enum DataType` of MIL.proto; `BlobDataType.hpp`; for the lists, what coremltools writes and its loader
// takes (`converters/mil/backend/mil/helper.py`).
data_types! {
    Bool     "bool"    1,  8 bits,  blob None,     Bools;
    String   "string"  2,  0 bits,  blob None,     Strings;
    Float16  "fp16"    10, 16 bits, blob Some(1),  Bytes;
    Float32  "fp32"    11, 32 bits, blob Some(2),  Floats;
    Float64  "fp64"    12, 64 bits, blob None,     Doubles;
    BFloat16 "bf16"    13, 16 bits, blob Some(5),  Bytes;
    Int8     "int8"    21, 8 bits,  blob Some(4),  Bytes;
    Int16    "int16"   22, 16 bits, blob Some(6),  Ints;
    Int32    "int32"   23, 32 bits, blob Some(14), Ints;
    Int64    "int64"   24, 64 bits, blob None,     LongInts;
    Int4     "int4"    25, 4 bits,  blob Some(8),  Bytes;
    UInt8    "uint8"   31, 8 bits,  blob Some(3),  Bytes;
    UInt16   "uint16"  32, 16 bits, blob Some(7),  Ints;
    UInt32   "uint32"  33, 32 bits, blob Some(15), Bytes;
    UInt64   "uint64"  34, 64 bits, blob None,     LongInts;
    UInt4    "uint4"   35, 4 bits,  blob Some(11), Bytes;
    UInt2    "uint2"   36, 2 bits,  blob Some(10), Bytes;
    UInt1    "uint1"   37, 1 bits,  blob Some(9),  Bytes;
    UInt6    "uint6"   38, 6 bits,  blob Some(13), Bytes;
    UInt3    "uint3"   39, 3 bits,  blob Some(12), Bytes;
    Float8E4M3FN "fp8e4m3fn" 40, 8 bits, blob Some(16), Bytes;
    Float8E5M2   "fp8e5m2"   41, 8 bits, blob Some(17), Bytes;
}

/// A list of a `TensorValue`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Held {
    Floats,
    Ints,
    Bools,
    Strings,
    LongInts,
    Doubles,
    /// As in a weight file: little-endian, types below a byte as a stream of bits.
    Bytes,
}

impl DataType {
    /// The type of this number in weight files.
    pub fn of_blob_number(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.blob_number() == Some(number))
    }

    /// Bytes that `elements` take. Types below a byte are one stream of bits, the first element in the lowest bits
    /// of the first byte; no row is aligned. `None` beyond 2^64.
    pub fn bytes(self, elements: u64) -> Option<u64> {
        let bits = u128::from(elements) * u128::from(self.bits());
        u64::try_from(bits.div_ceil(8)).ok()
    }

    /// Bits of the last byte that `elements` leave unused, 0 to 7.
    pub fn padding_bits(self, elements: u64) -> u64 {
        let used = elements % 8 * u64::from(self.bits()) % 8;
        (8 - used) % 8
    }
}

impl Varint for DataType {
    fn to_varint(self) -> u64 {
        self.number().into()
    }

    fn from_varint(value: u64) -> Result<Self> {
        let known = Self::ALL.iter().copied().find(|t| u64::from(t.number()) == value);
        match known {
            Some(known) => Ok(known),
            None if value == 0 => Ok(Self::Unused),
            None => Err(Error::unsupported(format!("data type {value} is not known"))
                .hint("the package was made for a later Core ML than this qconv knows")),
        }
    }
}

varint_slot! { DataType }

impl std::fmt::Display for DataType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_are_unique_and_found() {
        let unique = |list: Vec<u32>| list.iter().collect::<HashSet<_>>().len() == list.len();
        assert!(unique(DataType::ALL.iter().map(|t| t.number()).collect()));
        let blobs: Vec<u32> = DataType::ALL.iter().filter_map(|t| t.blob_number()).collect();
        assert!(unique(blobs.clone()));
        assert_eq!((blobs.iter().min(), blobs.iter().max(), blobs.len()), (Some(&1), Some(&17), 17));
        for &t in DataType::ALL {
            assert_eq!(DataType::from_varint(t.number().into()).unwrap(), t);
            assert!(t.blob_number().is_none_or(|n| DataType::of_blob_number(n) == Some(t)));
        }
        assert!(DataType::from_varint(26).is_err() && DataType::of_blob_number(18).is_none());
    }

    /// The table of `formats/spec/coreml.md`: type, elements, bytes, unused bits.
    #[test]
    fn sizes() {
        for (t, elements, bytes, padding) in [
            (DataType::UInt1, 9, 2, 7),
            (DataType::UInt2, 5, 2, 6),
            (DataType::UInt3, 9, 4, 5),
            (DataType::UInt4, 3, 2, 4),
            (DataType::UInt6, 5, 4, 2),
            (DataType::Int4, 3, 2, 4),
            (DataType::Float16, 3, 6, 0),
            (DataType::UInt8, 8, 8, 0),
            (DataType::UInt3, 0, 0, 0),
        ] {
            assert_eq!(
                (t.bytes(elements), t.padding_bits(elements)),
                (Some(bytes), padding),
                "{elements} {t}"
            );
        }
        assert_eq!(DataType::Float16.bytes(u64::MAX), None);
        assert_eq!(DataType::UInt6.padding_bits(u64::MAX), 6);
    }
}
