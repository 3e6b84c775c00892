//! Weights as Core ML stores them: float16, integers with scales, tables, ternary digits.
//!
//! A [`WeightPlan`] is one tensor, or some rows of it. It says which blobs it needs before a weight is read, what a
//! program has to say of them ([`mil::Encoded`](Encoded)), and writes their bytes span by span: any thread can write
//! any span, and the bytes are the same. Each encoding is a file here. Sources: `formats/spec/coreml.md` for bytes,
//! coremltools 9 (`converters/mil/mil/ops/defs/iOS18/compression.py`) for what operations make of them.

mod codes;
mod integers;
mod kept;
mod lut;
mod plain;
mod rotation;
mod ternary;
mod values;

use std::fmt::Debug;
use std::ops::Range;

use self::codes::Codes;
use self::integers::Integers;
use self::kept::{Choice, Kept};
use self::lut::Lut;
use self::plain::Plain;
use self::rotation::Rotation;
use self::ternary::{Dense, Digits, Sparse};
pub use self::values::{Outcome, Scratch};
use self::values::{Span, Tensor};
use crate::arch::{Mapped, RopeSpec};
use crate::container::Store;
use crate::container::coreml::DataType;
use crate::container::coreml::blob::{Blob, Wanted};
use crate::convert::Importance;
use crate::error::{Error, Result};
use crate::mil::{Encoded, Form, Place, Stored};

/// How weights are to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// As float16.
    F16,
    /// As integers times a scale.
    Int {
        /// Bits of an integer: 4 or 8.
        bits: u32,
        /// Columns that share a scale, a divisor of all; `None` for all of a row.
        block: Option<u64>,
    },
    /// As indices into tables.
    Lut {
        /// Bits of an index: 1, 2, 3, 4, 6 or 8.
        bits: u32,
        /// Rows that share a table, a divisor of a matrix's; `None` for all of them.
        rows: Option<u64>,
    },
    /// As -1, 0 and 1, with a scale for each row.
    Ternary {
        /// Whether zeros are left out; scales are in tables then, else multiplied in behind the product.
        sparse: bool,
    },
}

/// What may become of codes that the source has, where they take no more bits than what is wished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// They are decoded.
    Never,
    /// They stay where a row has one scale.
    Rows,
    /// They stay, blocks of a row having scales of their own as well.
    Blocks,
}

/// A tensor of a package.
#[derive(Debug)]
pub struct WeightPlan {
    tensor: Tensor,
    encoding: Box<dyn Encoding>,
    operands: Vec<Operand>,
    blobs: Vec<Wanted>,
    /// Rows of a span, but for the last.
    step: u64,
    note: Option<String>,
    fallback: Option<String>,
}

/// What an operation that decodes weights takes.
#[derive(Clone, Debug)]
struct Operand {
    dtype: DataType,
    shape: Vec<u64>,
    /// Its bytes, where they are known already and few: they stand in the program.
    bytes: Option<Vec<u8>>,
}

impl Operand {
    fn new(dtype: DataType, shape: impl Into<Vec<u64>>) -> Self {
        Self { dtype, shape: shape.into(), bytes: None }
    }
}

/// Where an encoding puts bytes: the number of the blob, the first byte in its data, and the bytes.
pub type Put<'a> = dyn Fn(usize, u64, &[u8]) -> Result<()> + 'a;

/// How rows of a tensor become blobs. Operands in the program come behind those that are blobs.
trait Encoding: Debug + Send + Sync {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// How codes come about; `None` where they are the source's.
    fn method(&self, is_weighed: bool) -> Option<&'static str> {
        Some(if is_weighed { "imatrix" } else { "rtn" })
    }

    /// What is stored.
    fn operands(&self, tensor: &Tensor) -> Vec<Operand>;

    /// What the program says of it, and the factors behind the product, if there are any.
    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)>;

    /// Spans are multiples of so many rows, but for the last.
    fn unit(&self) -> u64;

    /// Bytes that a worker holds beside the buffers of a span.
    fn held_bytes(&self) -> u64 {
        0
    }

    /// Writes some rows, which begin at a multiple of that.
    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome>;
}

/// Elements of a span, where small reads cost nothing.
const SPAN: u64 = 1 << 18;
/// The same where a stretch of the tensor is scattered in the source.
const SCATTERED_SPAN: u64 = 1 << 21;

/// Bytes of buffers for one element of a span: source and its stretches, value, what it is stored as, codes.
const BYTES_PER_ELEMENT: u64 = 4 + 8 + 4 + 4 + 2;

impl WeightPlan {
    /// Of a tensor, or of some rows of a matrix. Weights are not read, but where sizes depend on them; scales of
    /// codes that could stay are.
    ///
    /// `importance` is that of the tensor's columns, by which errors are weighed.
    ///
    /// # Errors
    /// `Misuse` for rows that are not there, and wishes that Core ML cannot fulfil; `Unsupported` for a tensor that
    /// cannot be read, or has no elements; as reads fail.
    pub fn new(
        tensor: &Mapped,
        store: &Store,
        rows: Option<Range<u64>>,
        wish: Wish,
        keep: Keep,
        importance: Option<Importance>,
    ) -> Result<Self> {
        Self::of(tensor, store, rows, wish, keep, importance)
            .map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)))
    }

    fn of(
        tensor: &Mapped,
        store: &Store,
        rows: Option<Range<u64>>,
        wish: Wish,
        keep: Keep,
        importance: Option<Importance>,
    ) -> Result<Self> {
        let mapped = tensor;
        let tensor = Tensor::new(mapped, store, rows, importance)?;
        let (mut note, mut fallback) = (None, None);
        let mut kept = None;
        let codes = if keep == Keep::Never { None } else { Codes::of(mapped, &tensor, store)? };
        match codes {
            None => {}
            Some(Err(why)) => note = Some(why),
            Some(Ok(codes)) => {
                let (choice, said) = match Kept::choose(codes, &tensor, store, wish, keep)? {
                    Choice::Ternary(codes, said) => (Some(Err(codes)), said),
                    Choice::Kept(kept, said) => (Some(Ok(kept)), said),
                    Choice::Decoded(said) => (None, said),
                };
                (kept, note) = (choice, Some(said));
            }
        }
        let mut ternary = |codes: Option<Codes>, sparse: bool| -> Result<Box<dyn Encoding>> {
            let mut digits = Digits::new(codes);
            if sparse {
                digits = match Sparse::new(&tensor, store, digits)? {
                    Ok(sparse) => return Ok(Box::new(sparse)),
                    Err(digits) => digits,
                };
                fallback = Some("has no weight but zeros, which a sparse form needs".to_string());
            }
            Ok(Box::new(Dense::new(&tensor, digits)?))
        };
        let encoding: Box<dyn Encoding> = match (kept, wish) {
            (Some(Ok(kept)), _) => kept,
            (Some(Err(codes)), wish) => ternary(Some(codes), wish == Wish::Ternary { sparse: true })?,
            (None, Wish::F16) => Box::new(Plain::new(&tensor, store)?),
            (None, Wish::Int { bits, block }) => Box::new(Integers::new(&tensor, bits, block)?),
            (None, Wish::Lut { bits, rows }) => Box::new(Lut::new(&tensor, bits, rows)?),
            (None, Wish::Ternary { sparse }) => ternary(None, sparse)?,
        };
        let planned = Self::stored(tensor, encoding)?;
        Ok(Self { note, fallback, ..planned })
    }

    /// The cosines or the sines of a rotation, a row for each of so many positions.
    ///
    /// # Errors
    /// `Limit` for tables that are too large.
    pub fn rotation(name: &str, spec: &RopeSpec, sines: bool, positions: u64) -> Result<Self> {
        let rows = usize::try_from(positions).unwrap_or(usize::MAX);
        let cols = spec.elements(rows)? as u64 / positions.max(1);
        let tensor = Tensor::made(name, positions, cols);
        let encoding = Plain::computed(Rotation { spec: spec.clone(), sines }, &tensor);
        Self::stored(tensor, Box::new(encoding))
    }

    fn stored(tensor: Tensor, encoding: Box<dyn Encoding>) -> Result<Self> {
        let operands = encoding.operands(&tensor);
        let mut blobs = Vec::with_capacity(operands.len());
        for Operand { dtype, shape, .. } in operands.iter().filter(|o| o.bytes.is_none()) {
            let elements = crate::tensor::elements(shape)?;
            blobs.push(Wanted { data_type: *dtype, elements, sum: None });
        }
        let step = tensor.step(encoding.unit());
        Ok(Self { tensor, encoding, operands, blobs, step, note: None, fallback: None })
    }

    /// What the weight file needs, in order. Empty where so few elements stand in the program.
    pub fn blobs(&self) -> &[Wanted] {
        &self.blobs
    }

    /// What the program says of it, where `blobs` are the places of those of [`Self::blobs`].
    ///
    /// # Errors
    /// `Misuse` for other blobs.
    pub fn encoded(&self, name: impl Into<String>, blobs: &[Blob]) -> Result<Encoded> {
        let mut places = blobs.iter();
        let wrong = || Error::misuse(format!("{} blobs, {} are needed", blobs.len(), self.blobs.len()));
        let mut stored = Vec::with_capacity(self.operands.len());
        for Operand { dtype, shape, bytes } in &self.operands {
            let place = match bytes {
                Some(bytes) => Place::Immediate(bytes.clone()),
                None => Place::File(places.next().ok_or_else(wrong)?.record),
            };
            stored.push(Stored { dtype: *dtype, shape: shape.clone(), place });
        }
        let (form, after) = self.encoding.form(stored).ok_or_else(wrong)?;
        Ok(Encoded { name: name.into(), shape: self.tensor.shape.clone(), form, after })
    }

    /// What its encoding is called, such as `int4`, and how codes come about: `rtn`, `imatrix`, `k-means`, or `copy`
    /// where they are the source's.
    pub fn kind(&self) -> (&'static str, &'static str) {
        (self.encoding.name(), self.encoding.method(self.tensor.is_weighed()).unwrap_or("copy"))
    }

    /// Into how many spans the work falls.
    pub fn spans(&self) -> usize {
        match self.blobs.is_empty() {
            true => 0,
            false => usize::try_from(self.tensor.rows.div_ceil(self.step)).unwrap_or(usize::MAX),
        }
    }

    /// Bytes of a worker's buffers for a span: weights as they are read, as numbers and as they are stored.
    pub fn buffer_bytes(&self) -> u64 {
        let elements = self.step.min(self.tensor.rows).saturating_mul(self.tensor.cols);
        let held = self.tensor.source.held_bytes(elements).saturating_add(self.encoding.held_bytes());
        elements.saturating_mul(BYTES_PER_ELEMENT).saturating_add(held)
    }

    /// Writes a span: `put` is given the number of a blob, the first byte in its data, and bytes. No two spans write
    /// the same bytes.
    ///
    /// # Errors
    /// As reads and `put` fail; `Malformed` for weights that are not finite or beyond float16, naming the first.
    pub fn write(&self, store: &Store, span: usize, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let first = (span as u64).saturating_mul(self.step).min(self.tensor.rows);
        let rows = first..self.tensor.rows.min(first.saturating_add(self.step));
        self.encoding.write(&Span { tensor: &self.tensor, store, rows }, scratch, put).map_err(|e| {
            match e.path() {
                Some(_) => e,
                None => e.context(format_args!("tensor {:?}", self.tensor.name)),
            }
        })
    }

    /// Codes that go in as they are, or why they do not: what is worth saying of it.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Why it is stored otherwise than wished.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }
}
