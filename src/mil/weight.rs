//! Weights that a graph refers to: how they are encoded, and where they stand. Their values are not seen here.

use super::builder::{Builder, Value};
use super::infer::infer;
use super::types::TensorType;
use super::value::Operand;
use crate::container::coreml::mil::{Binding, TensorValue, Value as Immediate};
use crate::container::coreml::{DataType, Held, Only};
use crate::error::{Error, Result};

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

impl Encoded {
    /// The same elements as kernels of a convolution that does what the matrix does: `[out, in, 1, 1]`.
    ///
    /// # Errors
    /// `Misuse` for what is no matrix.
    pub fn kernels(mut self) -> Result<Self> {
        if self.shape.len() != 2 {
            return Err(Error::misuse(format!("weight {}: {:?} is no matrix", self.name, self.shape)));
        }
        self.shape.extend([1, 1]);
        let widen = |stored: &mut Stored| stored.shape.extend([1, 1]);
        // Behind the dimensions of a table that are those of the weight.
        let table = |stored: &mut Stored| drop(stored.shape.splice(2..2, [1, 1]));
        match &mut self.form {
            Form::Plain(values) => widen(values),
            Form::Blockwise { data, scale, offset } => {
                [Some(data), Some(scale), offset.as_mut()].into_iter().flatten().for_each(widen);
            }
            Form::Lut { indices, lut } => (widen(indices), table(lut)).1,
            Form::SparseLut { mask, lut, .. } => (widen(mask), table(lut)).1,
        }
        Ok(self)
    }

    /// The same values in another shape.
    ///
    /// # Errors
    /// `Misuse` for another number of elements, and for weights that are compressed.
    pub fn reshaped(mut self, shape: &[u64]) -> Result<Self> {
        let Form::Plain(values) = &mut self.form else {
            return Err(Error::misuse(format!("weight {}: a vector is not compressed", self.name)));
        };
        if values.shape.iter().product::<u64>() != shape.iter().product::<u64>() {
            return Err(Error::misuse(format!(
                "weight {} is {:?}, {shape:?} was expected",
                self.name, self.shape
            )));
        }
        values.shape = shape.to_vec();
        self.shape = shape.to_vec();
        Ok(self)
    }
}

impl Form {
    /// The operations that decode it; the last one's result is called `name`.
    pub(super) fn build(&self, b: &mut Builder<'_>, name: &str) -> Result<Value> {
        match self {
            Self::Plain(values) => {
                let operand = Operand::weight(values.ty());
                Ok(b.constant(name, values.value()?, operand))
            }
            Self::Blockwise { data, scale, offset } => {
                let mut given = vec![("data", data), ("scale", scale)];
                given.extend(offset.as_ref().map(|offset| ("offset", offset)));
                let [value] = decode(b, "constexpr_blockwise_shift_scale", [name], &given)?;
                Ok(value)
            }
            Self::Lut { indices, lut } => {
                let given = [("indices", indices), ("lut", lut)];
                let [value] = decode(b, "constexpr_lut_to_dense", [name], &given)?;
                Ok(value)
            }
            Self::SparseLut { mask, indices, lut } => {
                let given = [("indices_mask", mask), ("indices_nonzero_data", indices), ("lut", lut)];
                let names = [&*format!("{name}_mask"), &*format!("{name}_nonzero")];
                let [mask, values] = decode(b, "constexpr_lut_to_sparse", names, &given)?;
                b.op(
                    "constexpr_sparse_to_dense",
                    name,
                    [("nonzero_data", (&values).into()), ("mask", (&mask).into())],
                )
            }
        }
    }
}

/// An operation of stored operands, which stand in its place.
fn decode<const N: usize>(
    b: &mut Builder<'_>,
    kind: &'static str,
    names: [&str; N],
    given: &[(&'static str, &Stored)],
) -> Result<[Value; N]> {
    let operands: Vec<Operand> = given.iter().map(|(_, stored)| Operand::weight(stored.ty())).collect();
    let operands: Vec<(&str, Vec<&Operand>)> =
        given.iter().zip(&operands).map(|((parameter, _), operand)| (*parameter, vec![operand])).collect();
    let results = infer(kind, &operands, &mut b.symbols)?;
    let results: [Operand; N] =
        results.try_into().map_err(|_| Error::misuse(format!("{kind} has not {N} results")))?;
    let mut names = names.iter();
    let results = results.map(|operand| b.value(names.next().copied().unwrap_or_default(), operand));
    let bound = |(parameter, stored): &(&'static str, &Stored)| {
        Ok::<_, Error>((*parameter, vec![Binding::Value(stored.value()?)]))
    };
    let inputs = given.iter().map(bound).collect::<Result<_>>()?;
    b.push(kind, inputs, &results.each_ref());
    Ok(results)
}

impl Stored {
    /// Its type.
    pub fn ty(&self) -> TensorType {
        TensorType::fixed(self.dtype, &self.shape)
    }

    /// The value as a program has it.
    fn value(&self) -> Result<Immediate> {
        match &self.place {
            Place::File(record) => Ok(Immediate::blob(self.dtype, &self.shape, *record)),
            Place::Immediate(bytes) => {
                let elements = self.shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size));
                let expected = elements.and_then(|n| self.dtype.bytes(n));
                if expected != Some(bytes.len() as u64) || self.dtype.held() != Held::Bytes {
                    return Err(Error::misuse(format!("{} in {} bytes", self.ty(), bytes.len())));
                }
                let elements = TensorValue::Bytes(Only(bytes.clone()));
                Ok(Immediate::immediate(self.dtype, &self.shape, elements))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(dtype: DataType, shape: &[u64], bytes: usize) -> Stored {
        Stored { dtype, shape: shape.to_vec(), place: Place::Immediate(vec![0; bytes]) }
    }

    fn encoded(shape: &[u64], form: Form) -> Encoded {
        Encoded { name: "w".into(), shape: shape.to_vec(), form, after: None }
    }

    /// The elements of a weight, without a model around it.
    struct One(Encoded);

    impl Weights for One {
        fn get(&self, _: &str) -> Option<Encoded> {
            Some(self.0.clone())
        }
    }

    #[test]
    fn matrices_become_kernels() {
        let lut = stored(DataType::Float16, &[2, 1, 4, 1], 16);
        let forms = [
            Form::Plain(stored(DataType::Float16, &[8, 4], 64)),
            Form::Blockwise {
                data: stored(DataType::UInt4, &[8, 4], 16),
                scale: stored(DataType::Float16, &[8, 1], 16),
                offset: Some(stored(DataType::UInt4, &[8, 1], 4)),
            },
            Form::Lut { indices: stored(DataType::UInt2, &[8, 4], 8), lut },
            Form::SparseLut {
                mask: stored(DataType::UInt1, &[8, 4], 4),
                indices: stored(DataType::UInt1, &[9], 2),
                lut: stored(DataType::Float16, &[8, 1, 2, 1], 32),
            },
        ];
        for form in forms {
            let matrix = encoded(&[8, 4], form);
            for (weight, shape) in [(matrix.clone(), &[8, 4][..]), (matrix.kernels().unwrap(), &[8, 4, 1, 1])]
            {
                let one = One(weight.clone());
                let mut b = Builder::new(&one);
                let value = b.decode(&weight).unwrap_or_else(|e| panic!("{weight:?}: {e}"));
                assert_eq!(*value.ty(), TensorType::fixed(DataType::Float16, shape));
            }
        }
        let e = encoded(&[8], Form::Plain(stored(DataType::Float16, &[8], 16))).kernels().unwrap_err();
        assert!(e.to_string().contains("no matrix"), "{e}");
    }

    #[test]
    fn what_does_not_fit_its_shape() {
        let plain = |shape: &[u64], dtype, bytes| encoded(&[8], Form::Plain(stored(dtype, shape, bytes)));
        let lut = Form::Lut {
            indices: stored(DataType::UInt2, &[8], 2),
            lut: stored(DataType::Float16, &[1, 3, 1], 6),
        };
        for (weight, words) in [
            (plain(&[8], DataType::Float16, 15), "in 15 bytes"),
            (plain(&[8], DataType::Int32, 32), "in 32 bytes"),
            (plain(&[7], DataType::Float16, 14), "not fp16[8]"),
            (plain(&[8], DataType::Int8, 8), "not fp16[8]"),
            (encoded(&[8], lut.clone()), "3 entries"),
        ] {
            let one = One(weight.clone());
            let e = Builder::new(&one).decode(&weight).unwrap_err();
            assert!(e.to_string().contains("weight w") && e.to_string().contains(words), "{words}: {e}");
        }
        let vector = plain(&[8], DataType::Float16, 16);
        assert_eq!(vector.clone().reshaped(&[8, 1, 1]).unwrap().shape, [8, 1, 1]);
        assert!(vector.reshaped(&[9]).unwrap_err().to_string().contains("[9] was expected"));
        assert!(encoded(&[8], lut).reshaped(&[8]).unwrap_err().to_string().contains("compressed"));
    }
}
