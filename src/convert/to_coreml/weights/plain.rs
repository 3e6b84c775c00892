//! Weights as float16.

use super::rotation::Rotation;
use super::values::{Outcome, Scratch, Span, Tensor};
use super::{Encoding, Operand, Put};
use crate::block::codec;
use crate::container::Store;
use crate::container::coreml::DataType;
use crate::error::{Error, Result};
use crate::mil::{Form, Stored};
use crate::tensor::DType;

/// Fewer elements stand in the program, as coremltools has it.
const FEWEST: u64 = 10;

/// Each weight rounded to the nearest, or a table that is computed.
#[derive(Debug)]
pub(super) struct Plain {
    /// Few elements stand in the program.
    bytes: Option<Vec<u8>>,
    table: Option<Rotation>,
}

impl Plain {
    /// Reads the weights, if they are so few that they stand in the program.
    pub fn new(tensor: &Tensor, store: &Store) -> Result<Self> {
        if tensor.elements() >= FEWEST {
            return Ok(Self { bytes: None, table: None });
        }
        let mut scratch = Scratch::default();
        tensor.values(store, &(0..tensor.rows), &mut scratch)?;
        halves(&scratch.values, &mut scratch.bytes)?;
        Ok(Self { bytes: Some(scratch.bytes), table: None })
    }

    /// The table that `tensor` is.
    pub fn computed(table: Rotation, tensor: &Tensor) -> Self {
        let bytes = (tensor.elements() < FEWEST).then(|| table.bytes(&(0..tensor.rows)));
        Self { bytes, table: Some(table) }
    }
}

/// Values as float16, little-endian.
pub(super) fn halves(values: &[f32], bytes: &mut Vec<u8>) -> Result<()> {
    let codec = codec(DType::F16).ok_or_else(|| Error::unsupported("F16 has no codec"))?;
    bytes.resize(values.len() * 2, 0);
    codec.encode(values, values.len(), None, bytes)
}

/// What these are.
pub(super) fn from_halves(bytes: &[u8], values: &mut Vec<f32>) -> Result<()> {
    let codec = codec(DType::F16).ok_or_else(|| Error::unsupported("F16 has no codec"))?;
    values.resize(bytes.len() / 2, 0.0);
    codec.decode(bytes, values)
}

impl Encoding for Plain {
    fn name(&self) -> &'static str {
        "f16"
    }

    fn method(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        vec![Operand { bytes: self.bytes.clone(), ..Operand::new(DataType::Float16, tensor.shape.clone()) }]
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let [values] = <[Stored; 1]>::try_from(operands).ok()?;
        Some((Form::Plain(values), None))
    }

    fn unit(&self) -> u64 {
        1
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        if let Some(table) = &self.table {
            put(0, rows.start * tensor.cols * 2, &table.bytes(rows))?;
            return Ok(Outcome::default());
        }
        span.values(scratch)?;
        halves(&scratch.values, &mut scratch.bytes)?;
        from_halves(&scratch.bytes, &mut scratch.stored)?;
        put(0, rows.start * tensor.cols * 2, &scratch.bytes)?;
        Ok(Outcome::of(&scratch.values, &scratch.stored))
    }
}
