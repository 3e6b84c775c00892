//! Programs: the messages of `MIL.proto` (coremltools, `mlmodel/format`). Numbers are those of that file.
//!
//! Messages of one field, number 1, are [`Only`] or lie in the variant: `RepeatedInts`, `TupleValue`, `Argument`.

use std::collections::BTreeMap;

use super::dtype::DataType;
use super::message::{Only, Slot, Taken, message, oneof};
use super::wire::{Decoder, Field};
use crate::error::{Error, Result};

message! {
    /// A program: functions by name.
    Program {
        /// Always 1.
        1 version: i64,
        /// `main`, or the functions of a model of several.
        2 functions: BTreeMap<String, Function>,
        /// For people.
        3 doc_string: String,
        /// Anything else, such as coremltools' `buildInfo`.
        4 attributes: BTreeMap<String, Value>,
    }

    /// A function: its inputs, and a block for each set of operators that it is written in.
    Function {
        /// Tensors and states.
        1 inputs: Vec<NamedValueType>,
        /// Which block counts: `CoreML8` is that of iOS 18.
        2 opset: String,
        /// Blocks by set of operators.
        3 block_specializations: BTreeMap<String, Block>,
        /// Anything else.
        4 attributes: BTreeMap<String, Value>,
    }

    /// Operations in an order in which they can be executed.
    Block {
        /// Values by other names than outside; none in the block of a function.
        1 inputs: Vec<NamedValueType>,
        /// Names of the values that it gives.
        2 outputs: Vec<String>,
        /// In order: a value is made before it is used.
        3 operations: Vec<Operation>,
        /// Anything else.
        4 attributes: BTreeMap<String, Value>,
    }

    /// One operation.
    Operation {
        /// Which one: `linear`.
        1 kind: String,
        /// What each parameter is bound to.
        2 inputs: BTreeMap<String, Argument>,
        /// What its results are called, and their types.
        3 outputs: Vec<NamedValueType>,
        /// Of conditions and loops.
        4 blocks: Vec<Block>,
        /// `name`, and `val` of constants.
        5 attributes: BTreeMap<String, Value>,
    }

    /// A name with its type.
    NamedValueType {
        /// Letters, digits, `_` and `@`.
        1 name: String,
        /// Its type.
        2 value_type: ValueType,
    }

    /// A type of tensors.
    TensorType {
        /// Type of the elements.
        1 data_type: DataType,
        /// How many dimensions; -1 where that is not known.
        2 rank: i64,
        /// Sizes, outermost first.
        3 dimensions: Vec<Dimension>,
        /// Anything else.
        4 attributes: BTreeMap<String, Value>,
    }

    /// A type of lists.
    ListType {
        /// Type of the elements.
        1 element: Box<ValueType>,
        /// How many.
        2 length: Dimension,
    }

    /// A type of dictionaries.
    DictionaryType {
        /// Type of the keys.
        1 key: Box<ValueType>,
        /// Type of the values.
        2 value: Box<ValueType>,
    }

    /// A value that is known beforehand.
    Value {
        /// For people.
        1 doc_string: String,
        /// Its type, without unknown dimensions.
        2 value_type: ValueType,
    } + /// Where it is.
    stored: Stored;

    /// A value in a weight file.
    BlobFileValue {
        /// `@model_path/weights/weight.bin`.
        1 file_name: String,
        /// First byte of the blob's record there, not of its data.
        2 offset: u64,
    }

    /// An entry of a dictionary.
    KeyValuePair {
        /// Its key.
        1 key: Value,
        /// Its value.
        2 value: Value,
    }
}

/// What a parameter is bound to: one value, or, for such as `values` of `concat`, several.
pub type Argument = Only<Vec<Binding>>;

oneof! {
    /// What stands for a value.
    Binding {
        /// The name of one that an operation gave, or of an input.
        1 Name(String),
        /// The value itself.
        2 Value(Value),
    }

    /// A type of values.
    ValueType {
        /// Tensors.
        1 Tensor(TensorType),
        /// Lists.
        2 List(ListType),
        /// Tuples, by the types of their elements.
        3 Tuple(Only<Vec<ValueType>>),
        /// Dictionaries.
        4 Dictionary(DictionaryType),
        /// States, by the type of what they hold.
        5 State(Only<Box<ValueType>>),
    }

    /// The size of a dimension.
    Dimension {
        /// Known.
        1 Constant(Only<u64>),
        /// Not known before execution; whether it stands for several.
        2 Unknown(Only<bool>),
    }

    /// Where a value is.
    Stored {
        /// Here.
        3 Immediate(ImmediateValue),
        /// In a weight file.
        5 Blob(BlobFileValue),
    }

    /// A value in the program.
    ImmediateValue {
        /// A tensor.
        1 Tensor(TensorValue),
        /// A tuple.
        2 Tuple(Only<Vec<Value>>),
        /// A list.
        3 List(Only<Vec<Value>>),
        /// A dictionary.
        4 Dictionary(Only<Vec<KeyValuePair>>),
    }

    /// Elements of a tensor, row-major; which list holds those of a type is in [`DataType::held`].
    TensorValue {
        /// Of 32 bits.
        1 Floats(Only<Vec<f32>>),
        /// Of 16 and 32 bits.
        2 Ints(Only<Vec<i32>>),
        /// Truth values.
        3 Bools(Only<Vec<bool>>),
        /// Texts.
        4 Strings(Only<Vec<String>>),
        /// Of 64 bits.
        5 LongInts(Only<Vec<i64>>),
        /// Of 64 bits.
        6 Doubles(Only<Vec<f64>>),
        /// As in a weight file.
        7 Bytes(Only<Vec<u8>>),
    }
}

impl Slot for Box<ValueType> {
    const TAKEN: Taken = Taken::Once;

    fn write(&self, number: u32, out: &mut Vec<u8>) {
        ValueType::write(self, number, out);
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        decoder.take_bytes(size_of::<ValueType>())?;
        ValueType::read(self, field, decoder)
    }
}

impl TensorType {
    /// Tensors of this shape, outermost dimension first; `None` is a size that is not known before execution.
    pub fn new(data_type: DataType, shape: &[Option<u64>]) -> Self {
        let dimension = |size: &Option<u64>| match size {
            Some(size) => Dimension::Constant(Only(*size)),
            None => Dimension::Unknown(Only(false)),
        };
        let dimensions: Vec<Dimension> = shape.iter().map(dimension).collect();
        Self { data_type, rank: dimensions.len() as i64, dimensions, ..Self::default() }
    }

    /// The shape, outermost dimension first; `None` is a size that is not known before execution.
    ///
    /// # Errors
    /// `Malformed` where rank and dimensions contradict each other, or a dimension says nothing; `Unsupported` for a
    /// rank that is not known.
    pub fn shape(&self) -> Result<Vec<Option<u64>>> {
        if self.rank == -1 {
            return Err(Error::unsupported("its rank is not fixed"));
        }
        if u64::try_from(self.rank) != Ok(self.dimensions.len() as u64) {
            let (rank, found) = (self.rank, self.dimensions.len());
            return Err(Error::malformed(format!("its rank is {rank}, and it has {found} dimensions")));
        }
        let size = |(i, dimension): (usize, &Dimension)| match dimension {
            Dimension::Constant(size) => Ok(Some(size.0)),
            Dimension::Unknown(Only(false)) => Ok(None),
            Dimension::Unknown(Only(true)) => {
                Err(Error::unsupported(format!("its dimension {i} stands for several")))
            }
            Dimension::None => Err(Error::malformed(format!("its dimension {i} has no size"))),
        };
        self.dimensions.iter().enumerate().map(size).collect()
    }

    /// The shape, all of which is known.
    ///
    /// # Errors
    /// As [`Self::shape`]; `Malformed` where a size is not known.
    pub fn fixed_shape(&self) -> Result<Vec<u64>> {
        let shape = self.shape()?;
        let known: Option<Vec<u64>> = shape.iter().copied().collect();
        known.ok_or_else(|| Error::malformed(format!("its shape {shape:?} is not fixed")))
    }

    /// How many elements such a tensor has.
    ///
    /// # Errors
    /// As [`Self::fixed_shape`]; `Malformed` beyond 2^64.
    pub fn elements(&self) -> Result<u64> {
        let shape = self.fixed_shape()?;
        let product = shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size));
        // Where one is 0 there are none, however large the others are.
        let product = if shape.contains(&0) { Some(0) } else { product };
        product.ok_or_else(|| Error::malformed(format!("its shape {shape:?} has more than 2^64 elements")))
    }
}

impl ValueType {
    /// Tensors of this shape, see [`TensorType::new`].
    pub fn tensor(data_type: DataType, shape: &[Option<u64>]) -> Self {
        Self::Tensor(TensorType::new(data_type, shape))
    }

    /// States that hold tensors of this shape.
    pub fn state(data_type: DataType, shape: &[u64]) -> Self {
        Self::State(Only(Box::new(Self::fixed(data_type, shape))))
    }

    /// Tensors of this shape, all of which is known.
    pub fn fixed(data_type: DataType, shape: &[u64]) -> Self {
        let shape: Vec<Option<u64>> = shape.iter().copied().map(Some).collect();
        Self::tensor(data_type, &shape)
    }
}

impl NamedValueType {
    /// A name with its type.
    pub fn new(name: impl Into<String>, value_type: ValueType) -> Self {
        Self { name: name.into(), value_type }
    }
}

impl Value {
    /// A tensor whose elements stand in the program.
    pub fn immediate(data_type: DataType, shape: &[u64], elements: TensorValue) -> Self {
        let value_type = ValueType::fixed(data_type, shape);
        let stored = Stored::Immediate(ImmediateValue::Tensor(elements));
        Self { value_type, stored, ..Self::default() }
    }

    /// A text.
    pub fn string(text: impl Into<String>) -> Self {
        Self::immediate(DataType::String, &[], TensorValue::Strings(Only(vec![text.into()])))
    }

    /// A tensor whose elements are those of the blob with the record at byte `offset` of the weight file.
    pub fn blob(data_type: DataType, shape: &[u64], offset: u64) -> Self {
        let value_type = ValueType::fixed(data_type, shape);
        let file_name = super::package::WEIGHTS_IN_MODEL.into();
        Self { value_type, stored: Stored::Blob(BlobFileValue { file_name, offset }), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{decode, encode};
    use super::*;
    use crate::error::ErrorKind;

    /// Bytes that `coremltools` writes, see `formats/spec/coreml.md`.
    #[test]
    fn known_bytes() {
        assert_eq!(encode(&Dimension::Constant(Only(64))), [0x0a, 0x02, 0x08, 0x40]);
        assert_eq!(encode(&Dimension::Unknown(Only(false))), [0x12, 0x00]);
        let ids = encode(&ValueType::tensor(DataType::Int32, &[Some(1), None]));
        assert_eq!(
            ids,
            [0x0a, 0x0e, 0x08, 23, 0x10, 2, 0x1a, 4, 0x0a, 2, 0x08, 1, 0x1a, 2, 0x12, 0],
            "a scalar has no rank, all else has"
        );
        let state = encode(&ValueType::state(DataType::Float16, &[]));
        assert_eq!(state, [0x2a, 0x06, 0x0a, 0x04, 0x0a, 0x02, 0x08, 10]);
        assert_eq!(
            encode(&Value::blob(DataType::UInt2, &[], 64)),
            [
                &[0x12, 4, 0x0a, 2, 0x08, 36, 0x2a, 34, 0x0a, 30][..],
                b"@model_path/weights/weight.bin",
                &[0x10, 64]
            ]
            .concat()
        );
        assert_eq!(
            encode(&Value::string("y")),
            [0x12, 4, 0x0a, 2, 0x08, 2, 0x1a, 7, 0x0a, 5, 0x22, 3, 0x0a, 1, b'y']
        );
    }

    #[test]
    fn shapes() {
        let of =
            |rank: i64, dimensions: Vec<Dimension>| TensorType { rank, dimensions, ..TensorType::default() };
        let size = |n| Dimension::Constant(Only(n));
        assert_eq!(of(2, vec![size(3), size(0)]).elements().unwrap(), 0);
        assert_eq!(of(0, vec![]).elements().unwrap(), 1);
        assert_eq!(of(3, vec![size(u64::MAX), size(u64::MAX), size(0)]).elements().unwrap(), 0);
        assert_eq!(of(2, vec![size(3), Dimension::Unknown(Only(false))]).shape().unwrap(), [Some(3), None]);
        for (shape, kind, words) in [
            (of(1, vec![]), ErrorKind::Malformed, "its rank is 1, and it has 0 dimensions"),
            (of(-2, vec![]), ErrorKind::Malformed, "its rank is -2"),
            (of(-1, vec![]), ErrorKind::Unsupported, "not fixed"),
            (of(1, vec![Dimension::None]), ErrorKind::Malformed, "has no size"),
            (of(1, vec![Dimension::Unknown(Only(true))]), ErrorKind::Unsupported, "stands for several"),
            (of(1, vec![Dimension::Unknown(Only(false))]), ErrorKind::Malformed, "not fixed"),
            (of(2, vec![size(u64::MAX), size(2)]), ErrorKind::Malformed, "more than 2^64"),
        ] {
            let e = shape.elements().unwrap_err();
            assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
        }
    }

    #[test]
    fn every_kind_of_type_and_value_comes_back() {
        let scalar = || ValueType::fixed(DataType::Int8, &[]);
        let texts = Value::string("a");
        let pair = KeyValuePair { key: texts.clone(), value: Value::blob(DataType::UInt3, &[2, 9], 128) };
        let types = [
            ValueType::List(ListType { element: Box::new(scalar()), length: Dimension::Constant(Only(2)) }),
            ValueType::Tuple(Only(vec![scalar(), ValueType::None])),
            ValueType::Dictionary(DictionaryType {
                key: Box::new(scalar()),
                value: Box::new(ValueType::None),
            }),
            ValueType::state(DataType::Float16, &[1, 2]),
        ];
        let stored = [
            ImmediateValue::Tuple(Only(vec![texts.clone()])),
            ImmediateValue::List(Only(vec![Value::default(), texts])),
            ImmediateValue::Dictionary(Only(vec![pair])),
            ImmediateValue::Tensor(TensorValue::Doubles(Only(vec![0.5, -1e300]))),
        ];
        for (value_type, stored) in types.into_iter().zip(stored) {
            let value = Value { value_type, stored: Stored::Immediate(stored), ..Value::default() };
            let (back, unknown) = decode::<Value>(&encode(&value)).unwrap();
            assert_eq!(back, value);
            assert!(unknown.is_empty());
        }
    }
}
