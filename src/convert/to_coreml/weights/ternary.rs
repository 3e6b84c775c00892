//! Weights as -1, 0 and 1 times a scale for each row.
//!
//! Densely they are indices of 2 bits into one table of -1, 0, 1, and scales are multiplied in behind the product:
//! the Neural Engine wants it so. Sparsely they are a bit for each weight that says whether it is zero, a bit for the
//! sign of each that is not, and a table of two values for each row; how many there are is counted beforehand.
//! Rounded weights get the scale of least squares (`block::ternary`).

use super::codes::Codes;
use super::lut;
use super::plain::halves;
use super::values::{Outcome, Scratch, Span, Tensor, half, whole_bytes};
use super::{Encoding, Operand, Put};
use crate::block::ternary::threshold;
use crate::container::Store;
use crate::container::coreml::DataType;
use crate::error::Result;
use crate::mil::{Form, Stored};

/// Where digits come from.
#[derive(Debug)]
pub(super) struct Digits {
    /// Those of the source, with one scale for each row; else weights are rounded.
    codes: Option<Codes>,
}

impl Digits {
    pub fn new(codes: Option<Codes>) -> Self {
        Self { codes }
    }

    fn method(&self, is_weighed: bool) -> Option<&'static str> {
        match self.codes {
            Some(_) => None,
            None => Some(if is_weighed { "imatrix" } else { "rtn" }),
        }
    }

    /// Fills `scratch.codes` with digits, plus 1, `scratch.scales` with that of each row, a number of float16, and
    /// `scratch.values` and `scratch.stored` with weights before and after.
    fn read(&self, span: &Span<'_>, scratch: &mut Scratch) -> Result<()> {
        let Span { tensor, rows, .. } = span;
        let cols = tensor.cols as usize;
        match &self.codes {
            Some(codes) => codes.digits(span, scratch)?,
            None => {
                span.values(scratch)?;
                scratch.codes.resize(scratch.values.len(), 0);
                scratch.scales.clear();
                for row in rows.clone() {
                    tensor.importance(row / tensor.of_matrix, scratch)?;
                    let at = (row - rows.start) as usize * cols;
                    let x = &scratch.values[at..at + cols];
                    let scale = half(threshold(x, &scratch.importance), 1.0);
                    for (code, x) in scratch.codes[at..at + cols].iter_mut().zip(x) {
                        *code = 1 + u8::from(*x > 0.5 * scale) - u8::from(*x < -0.5 * scale);
                    }
                    scratch.scales.push(scale);
                }
            }
        }
        let Scratch { codes, stored, scales, .. } = scratch;
        stored.resize(codes.len(), 0.0);
        let of_rows = stored.chunks_exact_mut(cols).zip(codes.chunks_exact(cols)).zip(scales);
        for ((y, codes), scale) in of_rows {
            y.iter_mut().zip(codes).for_each(|(y, c)| *y = (f32::from(*c) - 1.0) * *scale);
        }
        if self.codes.is_some() {
            // Nothing is lost but what scales lose, which is said once.
            scratch.values.clone_from(&scratch.stored);
        }
        Ok(())
    }
}

/// All weights.
#[derive(Debug)]
pub(super) struct Dense {
    digits: Digits,
    unit: u64,
}

impl Dense {
    pub fn new(tensor: &Tensor, digits: Digits) -> Result<Self> {
        tensor.check_matrix()?;
        Ok(Self { digits, unit: whole_bytes(tensor.cols, 2) })
    }
}

/// The shape without columns.
fn of_rows(tensor: &Tensor) -> Vec<u64> {
    tensor.shape[..tensor.shape.len() - 1].to_vec() // of two dimensions at least
}

impl Encoding for Dense {
    fn name(&self) -> &'static str {
        "ternary"
    }

    fn method(&self, is_weighed: bool) -> Option<&'static str> {
        self.digits.method(is_weighed)
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        let mut table = vec![1; tensor.shape.len()];
        table.extend([4, 1]);
        let mut bytes = Vec::new();
        // There is a fourth entry, which nothing uses.
        [0xBC00u16, 0, 0x3C00, 0].iter().for_each(|half| bytes.extend(half.to_le_bytes()));
        vec![
            Operand::new(DataType::UInt2, tensor.shape.clone()),
            Operand::new(DataType::Float16, of_rows(tensor)),
            Operand { bytes: Some(bytes), ..Operand::new(DataType::Float16, table) },
        ]
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let [indices, scales, lut] = <[Stored; 3]>::try_from(operands).ok()?;
        Some((Form::Lut { indices, lut }, Some(scales)))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        self.digits.read(span, scratch)?;
        let outcome = Outcome::of(&scratch.values, &scratch.stored);
        scratch.put_codes(0, 2, rows.start * tensor.cols, put)?;
        halves(&scratch.scales, &mut scratch.small)?;
        put(1, rows.start * 2, &scratch.small)?;
        Ok(outcome)
    }
}

/// Those that are not zero.
#[derive(Debug)]
pub(super) struct Sparse {
    digits: Digits,
    unit: u64,
    step: u64,
    /// Of each span, where its signs begin.
    starts: Vec<Start>,
    count: u64,
}

/// Where the signs of a span begin.
#[derive(Clone, Copy, Debug, Default)]
struct Start {
    /// How many are before.
    count: u64,
    /// Those among them that are in the same byte.
    bits: u8,
}

impl Sparse {
    /// Reads all weights, to count those that are not zero. `None` where none is.
    pub fn new(tensor: &Tensor, store: &Store, digits: Digits) -> Result<Result<Self, Digits>> {
        tensor.check_matrix()?;
        let unit = whole_bytes(tensor.cols, 1);
        let step = tensor.step(unit);
        let (mut starts, mut at, mut scratch) = (Vec::new(), Start::default(), Scratch::default());
        let mut first = 0;
        while first < tensor.rows {
            let rows = first..tensor.rows.min(first + step);
            let span = Span { tensor, store, rows };
            digits.read(&span, &mut scratch)?;
            starts.push(at);
            for code in scratch.codes.iter().filter(|c| **c != 1) {
                let bit = (at.count % 8) as u32;
                at.bits = if bit == 0 { 0 } else { at.bits } | u8::from(*code == 2) << bit;
                at.count += 1;
            }
            first = span.rows.end;
        }
        Ok(match at.count {
            0 => Err(digits),
            count => Ok(Self { digits, unit, step, starts, count }),
        })
    }
}

impl Encoding for Sparse {
    fn name(&self) -> &'static str {
        "sparse_ternary"
    }

    fn method(&self, is_weighed: bool) -> Option<&'static str> {
        self.digits.method(is_weighed)
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        let tables = lut::tables(&tensor.shape, 1, tensor.cols, 1);
        vec![
            Operand::new(DataType::UInt1, tensor.shape.clone()),
            Operand::new(DataType::UInt1, [self.count]),
            Operand::new(DataType::Float16, tables),
        ]
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let [mask, indices, lut] = <[Stored; 3]>::try_from(operands).ok()?;
        Some((Form::SparseLut { mask, indices, lut }, None))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        self.digits.read(span, scratch)?;
        let outcome = Outcome::of(&scratch.values, &scratch.stored);
        let start = self.starts.get((rows.start / self.step) as usize).copied().unwrap_or_default();
        // Spans write the bytes that they complete, and the last one what is left.
        let (mut signs, mut byte, mut n) = (Vec::new(), start.bits, (start.count % 8) as u32);
        byte &= (1u8 << n).wrapping_sub(1);
        for code in scratch.codes.iter().filter(|c| **c != 1) {
            byte |= u8::from(*code == 2) << n;
            n += 1;
            if n == 8 {
                signs.push(byte);
                (byte, n) = (0, 0);
            }
        }
        if n > 0 && rows.end == tensor.rows {
            signs.push(byte);
        }
        put(1, start.count / 8, &signs)?;
        scratch.codes.iter_mut().for_each(|c| *c = u8::from(*c != 1));
        scratch.put_codes(0, 1, rows.start * tensor.cols, put)?;
        let pairs: Vec<f32> = scratch.scales.iter().flat_map(|s| [-s, *s]).collect();
        halves(&pairs, &mut scratch.small)?;
        put(2, rows.start * 4, &scratch.small)?;
        Ok(outcome)
    }
}
