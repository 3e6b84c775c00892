//! Cosines and sines of rotations as float16, computed as they are written: tables of long contexts are larger than what
//! memory there may be.

use std::ops::Range;

use half::f16;

use super::plain::FEWEST;
use super::values::{Outcome, Scratch, Span, Tensor};
use super::{Encoding, Operand, Put};
use crate::arch::RopeSpec;
use crate::container::coreml::DataType;
use crate::error::Result;
use crate::mil::{Form, Stored};

/// A row for each position.
#[derive(Debug)]
pub(super) struct Rotation {
    spec: RopeSpec,
    sines: bool,
    bytes: Option<Vec<u8>>,
}

impl Rotation {
    /// The table that `tensor` is; few elements stand in the program.
    pub fn new(spec: RopeSpec, sines: bool, tensor: &Tensor) -> Self {
        let mut table = Self { spec, sines, bytes: None };
        table.bytes = (tensor.elements() < FEWEST).then(|| table.bytes(&(0..tensor.rows)));
        table
    }

    fn bytes(&self, rows: &Range<u64>) -> Vec<u8> {
        let mut values: Vec<f16> = Vec::new();
        rows.clone().for_each(|position| self.spec.row(position, self.sines, &mut values));
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

impl Encoding for Rotation {
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

    fn write(&self, span: &Span<'_>, _: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        put(0, rows.start * tensor.cols * 2, &self.bytes(rows))?;
        Ok(Outcome::default())
    }
}
