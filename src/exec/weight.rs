//! Constants, decoded where they are read: by [`packed::coreml`](crate::packed::coreml), out of their file.

use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::tensor::{Data, MOST_STORED, Tensor, bounded, zeros};
use crate::container::coreml::{Constant, DataType, Form, Package};
use crate::error::{Error, Result};
use crate::packed::coreml::Weight as Decoded;

/// Values are rounded in runs of so many, on the stack.
const RUN: usize = 512;
/// What a read is beside its elements: a look at the mask before them, or at scales and tables.
const SPARSE_READ: usize = 1 << 13;
const PLAIN_READ: usize = 1 << 6;

/// A constant of numbers or truth values.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) dtype: DataType,
    pub(super) shape: Vec<usize>,
    decoded: Decoded,
}

impl Weight {
    /// # Errors
    /// As [`Decoded::new`]; `Unsupported` for types that are not computed with; `Limit` for sizes beyond use.
    pub(super) fn new(package: &Arc<Package>, constant: Arc<Constant>) -> Result<Self> {
        use DataType::{
            Bool, Float16, Float32, Int4, Int8, Int16, Int32, UInt1, UInt2, UInt3, UInt4, UInt6, UInt8,
            UInt16,
        };
        let dtype = constant.data_type;
        if ![
            Bool, Float16, Float32, Int4, Int8, Int16, Int32, UInt1, UInt2, UInt3, UInt4, UInt6, UInt8,
            UInt16,
        ]
        .contains(&dtype)
        {
            return Err(Error::unsupported(format!("constants of type {dtype} are not computed with")));
        }
        let shape: Option<Vec<usize>> = constant.shape.iter().map(|n| usize::try_from(*n).ok()).collect();
        let shape = shape.ok_or_else(|| Error::limit("a size is beyond memory"))?;
        bounded(&shape, MOST_STORED)?;
        Ok(Self { dtype, shape, decoded: Decoded::new(Arc::clone(package), constant)? })
    }

    /// How many elements it has.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product() // bounded
    }

    /// Whether something of it is read from a file.
    pub(super) fn is_in_file(&self) -> bool {
        self.decoded.constant().is_in_file()
    }

    /// What it is to read so many elements so many times, each about as much as one of an addition.
    pub(super) fn work(&self, reads: usize, each: usize) -> usize {
        let begin = match self.decoded.constant().form {
            Form::Sparse { .. } => SPARSE_READ,
            _ => PLAIN_READ,
        };
        reads.saturating_mul(each.saturating_add(begin))
    }

    /// The elements from `first` on.
    ///
    /// # Errors
    /// As [`Decoded::read`].
    pub(super) fn read(&self, first: usize, out: &mut [f32]) -> Result<()> {
        self.decoded.read(first as u64, out)
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`Self::read`]; `Limit` where there is no memory for it.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let (n, constant) = (self.len(), self.decoded.constant());
        let shape = self.shape.clone();
        // float32 does not hold all of them.
        if let (DataType::Int32, Form::Plain(place)) = (self.dtype, &constant.form) {
            let mut bytes = vec![0; n * 4];
            self.decoded.package().read(place, 0, &mut bytes)?;
            let ints = bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
            return Ok(Tensor { dtype: self.dtype, shape, data: Data::Ints(Arc::new(ints)) });
        }
        let mut values = zeros(n)?;
        self.read(0, &mut values)?;
        let data = match self.dtype {
            dtype if is_float(dtype) => Data::Floats(Arc::new(values)),
            DataType::Bool => Data::Bools(Arc::new(values.into_iter().map(|v| v != 0.0).collect())),
            _ => Data::Ints(Arc::new(values.into_iter().map(|v| v as i32).collect())),
        };
        Ok(Tensor { dtype: self.dtype, shape, data })
    }
}

pub(super) fn is_float(dtype: DataType) -> bool {
    matches!(dtype, DataType::Float16 | DataType::Float32)
}

/// Rounds to float16; whether one that was finite is not any more: from 65520 on they are not.
pub(super) fn round(values: &mut [f32]) -> bool {
    let (mut halves, mut overflows) = ([f16::ZERO; RUN], false);
    for values in values.chunks_mut(RUN) {
        let halves = &mut halves[..values.len()];
        overflows |= values.iter().fold(false, |any, v| any | ((v.abs() >= 65520.0) & v.is_finite()));
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
    overflows
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::container::coreml::Place;
    use crate::limits::Limits;

    /// Any package: constants of tests do not lie in it.
    pub(in super::super) fn package() -> Arc<Package> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/coreml/mini.mlpackage");
        Arc::new(Package::open(path, &Limits::default()).unwrap())
    }

    pub(in super::super) fn of_bytes(data_type: DataType, shape: &[u64], bytes: &[u8]) -> Arc<Constant> {
        let form = Form::Plain(Place::Immediate(bytes.into()));
        Arc::new(Constant { name: "x".into(), data_type, shape: shape.into(), form })
    }

    #[test]
    fn integers_and_truth_values() {
        let tensor = |dtype, shape: &[u64], bytes: &[u8]| {
            Weight::new(&package(), of_bytes(dtype, shape, bytes)).unwrap().tensor().unwrap()
        };
        let int = tensor(DataType::Int32, &[], &i32::MAX.to_le_bytes());
        assert_eq!(int.as_ints().unwrap(), [i32::MAX], "float32 has no such number");
        assert_eq!(tensor(DataType::Int4, &[3], &[0x78, 0x0f]).as_ints().unwrap(), [-8, 7, -1]);
        assert_eq!(tensor(DataType::Bool, &[2], &[0, 1]).data, Data::Bools(Arc::new(vec![false, true])));
        let half = tensor(DataType::Float16, &[1], &f16::from_f32(1.5).to_le_bytes());
        assert_eq!((half.dtype(), half.as_floats().unwrap()), (DataType::Float16, &[1.5][..]));
        for (dtype, shape) in [(DataType::Float64, vec![0]), (DataType::UInt1, vec![u64::MAX >> 8, 0])] {
            assert!(Weight::new(&package(), of_bytes(dtype, &shape, &[])).is_err(), "{dtype}");
        }
    }

    proptest! {
        #[test]
        fn rounded_as_one_by_one(values in prop::collection::vec(any::<f32>(), 0..1200)) {
            let mut rounded = values.clone();
            let overflows = round(&mut rounded);
            let mut beyond = false;
            for (value, found) in values.iter().zip(rounded) {
                let wanted = f16::from_f32(*value).to_f32();
                prop_assert!(found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan()));
                beyond |= value.is_finite() && wanted.is_infinite();
            }
            prop_assert_eq!(overflows, beyond);
        }
    }
}
