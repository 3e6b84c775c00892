//! The encodings of tensors as the manifest states them, and the sizes of their parts.
//!
//! What codes decode to stands in `formats/spec/qpack.md` and is done by `packed::qpack`.

use serde_json::{Value as Json, json};

use super::fields::{Fields, dtype};
use super::json::{Kept, MAX_NUMBER};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// How the values of a tensor are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Encoding {
    /// Elements or ggml's blocks as they are.
    Plain(DType),
    /// Integers in groups: `(code - zero) * scale`.
    Integers(Integers),
    /// Numbers of a table: `table[code] * scale`.
    Codebook(Codebook),
    /// -1, 0 and 1 times a scale.
    Ternary(Ternary),
    /// The same where most are 0.
    Sparse(Sparse),
    /// Elements of a small type times a scale.
    Scaled(Scaled),
    /// Something of a later time: its parts are listed, and mean nothing here.
    Unknown(Unknown),
}

/// An encoding that is not known.
#[derive(Clone, Debug, PartialEq)]
pub struct Unknown {
    /// Its name.
    pub kind: String,
    /// What else a manifest says of it.
    pub more: Kept,
}

/// Integers in groups.
#[derive(Clone, Debug, PartialEq)]
pub struct Integers {
    /// Bits of a code: 1 to 8.
    pub bits: u32,
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// Type of the scales.
    pub scales: DType,
    /// What is taken from the codes.
    pub zeros: Zeros,
    /// Whether a list says the group of each column.
    pub g_idx: bool,
}

/// What is taken from codes before they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Zeros {
    /// The middle code: half of 2 to the power of the bits.
    Middle,
    /// For each group a code of as many bits, and this added to it: 0 or 1.
    Codes(u8),
    /// For each group a number of this type.
    Numbers(DType),
}

/// Numbers of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    /// Bits of a code: 1 to 8.
    pub bits: u32,
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// Whether the tensor is one row of all its elements: groups go on from row to row.
    pub flat: bool,
    /// Type of the scales; `None` where there are none.
    pub scales: Option<DType>,
    /// The scales' own codebook, where they are codes.
    pub nested: Option<Nested>,
    /// Type of the table's numbers.
    pub table: DType,
    /// Rows and columns that share a table.
    pub tables: [u64; 2],
}

/// Scales as codes of 8 bits: `table[code] * scale + offset`, all in F32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nested {
    /// Scales that share a scale.
    pub block: u64,
}

/// -1, 0 and 1 times a scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Ternary {
    /// How digits lie in bytes.
    pub packing: Trits,
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// Type of the scales.
    pub scales: DType,
}

/// How ternary digits lie in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trits {
    /// Five to a byte.
    Base3,
    /// Four to a byte.
    Bits2,
}

/// A bit for each weight that says whether it is 0, and the signs of the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Sparse {
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// Type of the scales.
    pub scales: DType,
}

/// Elements of a small type times a scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaled {
    /// Type of the elements.
    pub dtype: DType,
    /// Rows and columns that share a scale.
    pub block: [u64; 2],
    /// Type of the scales.
    pub scales: DType,
    /// What products are divided by, as a multiplication with its inverse in f32.
    pub divisor: u64,
}

/// A part of a tensor: its name, and its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct PartSize {
    /// Its name in the manifest.
    pub name: &'static str,
    /// Type of its elements.
    pub dtype: DType,
    /// Its shape; where it `varies`, the largest.
    pub shape: Vec<u64>,
    /// Whether it may be shorter.
    pub varies: bool,
}

/// Types that scales, zeros and tables may have.
const SCALES: &[DType] = &[DType::F16, DType::BF16, DType::F32, DType::F8_E8M0];
const NUMBERS: &[DType] = &[DType::F16, DType::BF16, DType::F32];
const SCALED: &[DType] = &[DType::I8, DType::F8_E4M3, DType::F8_E5M2];

/// Longest row of integers and ternary digits, which are decoded, and moved to other layouts, by whole rows.
pub const MAX_COLS: u64 = 1 << 20;

/// The rows and columns of a tensor that is no plain one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// All dimensions but the innermost, multiplied.
    pub rows: u64,
    /// The innermost.
    pub cols: u64,
}

impl Matrix {
    /// Of a tensor of this shape; `flat` makes it one row.
    ///
    /// # Errors
    /// `Malformed` where there are no elements, or too many.
    pub fn of(shape: &[u64], flat: bool) -> Result<Self> {
        let all = crate::tensor::elements(shape)?;
        let cols = if flat { all } else { shape.last().copied().unwrap_or(1) };
        match all {
            0 => Err(Error::malformed(format!("shape {shape:?} has no elements"))),
            _ => Ok(Self { rows: all / cols, cols }),
        }
    }

    /// Of a tensor whose rows are decoded as a whole.
    fn of_rows(shape: &[u64]) -> Result<Self> {
        let matrix = Self::of(shape, false)?;
        match matrix.cols <= MAX_COLS {
            true => Ok(matrix),
            false => {
                Err(Error::limit(format!("a row has {} columns, at most {MAX_COLS} are read", matrix.cols)))
            }
        }
    }

    /// How many blocks there are, one below the other and side by side.
    pub fn blocks(&self, block: [u64; 2]) -> [u64; 2] {
        [self.rows.div_ceil(block[0].max(1)), self.cols.div_ceil(block[1].max(1))]
    }

    fn check(&self, block: [u64; 2], what: &str) -> Result<()> {
        let fits = (1..=self.rows).contains(&block[0]) && (1..=self.cols).contains(&block[1]);
        match fits {
            true => Ok(()),
            false => {
                Err(Error::malformed(format!("{what} = {block:?} of {} rows of {}", self.rows, self.cols)))
            }
        }
    }

    /// Rows of streams of codes, each of whole bytes.
    fn streams(&self, bits: u32) -> Result<Vec<u64>> {
        Ok(vec![self.rows, stream_bytes(self.cols, bits)?])
    }
}

/// Bytes that `n` codes fill, the last one perhaps in part.
fn stream_bytes(n: u64, bits: u32) -> Result<u64> {
    let bits_of_all = u128::from(n) * u128::from(bits);
    u64::try_from(bits_of_all.div_ceil(8)).map_err(|_| Error::malformed(format!("{n} codes of {bits} bits")))
}

fn part(name: &'static str, dtype: DType, shape: impl Into<Vec<u64>>) -> PartSize {
    PartSize { name, dtype, shape: shape.into(), varies: false }
}

impl Encoding {
    /// Of the manifest.
    ///
    /// # Errors
    /// `Malformed` for a kind that is known, and fields that it cannot have.
    pub(super) fn parse(value: &Json) -> Result<Self> {
        let mut fields = Fields::of(value, "encoding")?;
        let parsed = match fields.text("kind")? {
            "plain" => Self::Plain(one_of(&mut fields, "type", DType::ALL)?),
            "integers" => Self::Integers(Integers {
                bits: fields.number("bits", 1..=8)? as u32,
                block: pair(&mut fields, "block")?,
                scales: one_of(&mut fields, "scales", SCALES)?,
                zeros: zeros(&mut fields)?,
                g_idx: fields.flag("g_idx")?,
            }),
            "codebook" => codebook(&mut fields)?,
            "ternary" => Self::Ternary(Ternary {
                packing: match fields.text("packing")? {
                    "base3" => Trits::Base3,
                    "bits2" => Trits::Bits2,
                    other => return Err(fields.wrong("packing", &other.into())),
                },
                block: pair(&mut fields, "block")?,
                scales: one_of(&mut fields, "scales", SCALES)?,
            }),
            "sparse_ternary" => Self::Sparse(Sparse {
                block: pair(&mut fields, "block")?,
                scales: one_of(&mut fields, "scales", SCALES)?,
            }),
            "scaled" => Self::Scaled(Scaled {
                dtype: one_of(&mut fields, "type", SCALED)?,
                block: pair(&mut fields, "block")?,
                scales: one_of(&mut fields, "scales", SCALES)?,
                divisor: fields.number("divisor", 1..=1 << 24)?,
            }),
            kind => return Ok(Self::Unknown(Unknown { kind: kind.to_string(), more: fields.rest() })),
        };
        match fields.left().next() {
            None => Ok(parsed),
            Some((key, _)) => {
                Err(Error::malformed(format!("encoding {:?} has a field {key:?}", parsed.kind())))
            }
        }
    }

    /// For the manifest.
    pub fn json(&self) -> Json {
        let kind = self.kind();
        match self {
            Self::Plain(dtype) => json!({"kind": kind, "type": dtype.name()}),
            Self::Integers(e) => json!({
                "kind": kind,
                "bits": e.bits,
                "block": e.block,
                "scales": e.scales.name(),
                "zeros": match e.zeros {
                    Zeros::Middle => "middle",
                    Zeros::Codes(0) => "codes",
                    Zeros::Codes(_) => "codes+1",
                    Zeros::Numbers(dtype) => dtype.name(),
                },
                "g_idx": e.g_idx,
            }),
            Self::Codebook(e) => json!({
                "kind": kind,
                "bits": e.bits,
                "block": e.block,
                "flat": e.flat,
                "scales": match (e.scales, e.nested) {
                    (_, Some(nested)) => json!({"block": nested.block}),
                    (Some(dtype), None) => json!(dtype.name()),
                    (None, None) => Json::Null,
                },
                "table": e.table.name(),
                "tables": e.tables,
            }),
            Self::Ternary(e) => json!({
                "kind": kind,
                "packing": match e.packing {
                    Trits::Base3 => "base3",
                    Trits::Bits2 => "bits2",
                },
                "block": e.block,
                "scales": e.scales.name(),
            }),
            Self::Sparse(e) => json!({"kind": kind, "block": e.block, "scales": e.scales.name()}),
            Self::Scaled(e) => json!({
                "kind": kind,
                "type": e.dtype.name(),
                "block": e.block,
                "scales": e.scales.name(),
                "divisor": e.divisor,
            }),
            Self::Unknown(e) => {
                let mut fields = e.more.fields();
                fields.insert("kind".into(), json!(e.kind));
                fields.into()
            }
        }
    }

    /// Its name in the manifest.
    pub fn kind(&self) -> &str {
        match self {
            Self::Plain(_) => "plain",
            Self::Integers(_) => "integers",
            Self::Codebook(_) => "codebook",
            Self::Ternary(_) => "ternary",
            Self::Sparse(_) => "sparse_ternary",
            Self::Scaled(_) => "scaled",
            Self::Unknown(e) => &e.kind,
        }
    }

    /// The parts of a tensor of this shape, in the order of the file; `None` where that is not known.
    ///
    /// # Errors
    /// `Malformed` where such a tensor cannot be so encoded, or would be too large; `Limit` for rows longer than
    /// [`MAX_COLS`] of encodings that are decoded by rows.
    pub fn parts(&self, shape: &[u64]) -> Result<Option<Vec<PartSize>>> {
        let parts = match self {
            Self::Unknown(_) => return Ok(None),
            Self::Plain(dtype) => vec![part("data", *dtype, shape)],
            Self::Integers(e) => e.parts(Matrix::of_rows(shape)?)?,
            Self::Codebook(e) => e.parts(Matrix::of(shape, e.flat)?)?,
            Self::Ternary(e) => {
                let matrix = Matrix::of_rows(shape)?;
                matrix.check(e.block, "block")?;
                let row = match e.packing {
                    Trits::Base3 => matrix.cols.div_ceil(5),
                    Trits::Bits2 => stream_bytes(matrix.cols, 2)?,
                };
                let scales = part("scales", e.scales, matrix.blocks(e.block));
                vec![part("codes", DType::U8, [matrix.rows, row]), scales]
            }
            Self::Sparse(e) => {
                let matrix = Matrix::of_rows(shape)?;
                matrix.check(e.block, "block")?;
                let row = stream_bytes(matrix.cols, 1)?;
                let starts = matrix.rows + 1; // below 2^63
                let signs = PartSize { varies: true, ..part("signs", DType::U8, [matrix.rows * row]) };
                vec![
                    part("mask", DType::U8, [matrix.rows, row]),
                    part("starts", DType::U64, [starts]),
                    signs,
                    part("scales", e.scales, matrix.blocks(e.block)),
                ]
            }
            Self::Scaled(e) => {
                let matrix = Matrix::of(shape, false)?;
                matrix.check(e.block, "block")?;
                vec![
                    part("data", e.dtype, [matrix.rows, matrix.cols]),
                    part("scales", e.scales, matrix.blocks(e.block)),
                ]
            }
        };
        for part in &parts {
            part.dtype.nbytes(&part.shape).map_err(|e| e.context(part.name))?;
        }
        Ok(Some(parts))
    }
}

impl Integers {
    fn parts(&self, matrix: Matrix) -> Result<Vec<PartSize>> {
        matrix.check(self.block, "block")?;
        let blocks = matrix.blocks(self.block);
        let mut parts =
            vec![part("codes", DType::U8, matrix.streams(self.bits)?), part("scales", self.scales, blocks)];
        match self.zeros {
            Zeros::Middle => {}
            Zeros::Codes(_) => {
                let rows = Matrix { rows: blocks[0], cols: blocks[1] };
                parts.push(part("zeros", DType::U8, rows.streams(self.bits)?));
            }
            Zeros::Numbers(dtype) => parts.push(part("zeros", dtype, blocks)),
        }
        if self.g_idx {
            parts.push(part("g_idx", DType::I32, [matrix.cols]));
        }
        Ok(parts)
    }
}

impl Codebook {
    fn parts(&self, matrix: Matrix) -> Result<Vec<PartSize>> {
        matrix.check(self.block, "block")?;
        matrix.check(self.tables, "tables")?;
        let [down, across] = matrix.blocks(self.tables);
        let mut parts = vec![
            part("codes", DType::U8, matrix.streams(self.bits)?),
            part("table", self.table, [down, across, 1 << self.bits]),
        ];
        let blocks = matrix.blocks(self.block);
        if let Some(nested) = self.nested {
            let all = blocks[0] * blocks[1]; // not above the elements
            if nested.block == 0 || nested.block > all {
                return Err(Error::malformed(format!("{all} scales in blocks of {}", nested.block)));
            }
            parts.extend([
                part("scales", DType::U8, blocks),
                part("scales_table", DType::F32, [256]),
                part("scales_scales", DType::F32, [all.div_ceil(nested.block)]),
                part("scales_offset", DType::F32, [1]),
            ]);
        } else if let Some(dtype) = self.scales {
            parts.push(part("scales", dtype, blocks));
        } else if self.block != [matrix.rows, matrix.cols] {
            return Err(Error::malformed("without scales all is one block"));
        }
        Ok(parts)
    }
}

fn codebook(fields: &mut Fields<'_>) -> Result<Encoding> {
    let scales = fields.required("scales")?;
    let mut nested = None;
    let dtype = match scales {
        Json::Null => None,
        Json::Object(_) => {
            let mut inner = Fields::of(scales, "scales")?;
            nested = Some(Nested { block: inner.number("block", 1..=MAX_NUMBER)? });
            if inner.left().next().is_some() {
                return Err(fields.wrong("scales", scales));
            }
            Some(DType::F32)
        }
        _ => Some(one_of(fields, "scales", SCALES)?),
    };
    Ok(Encoding::Codebook(Codebook {
        bits: fields.number("bits", 1..=8)? as u32,
        block: pair(fields, "block")?,
        flat: fields.flag("flat")?,
        scales: dtype,
        nested,
        table: one_of(fields, "table", NUMBERS)?,
        tables: pair(fields, "tables")?,
    }))
}

fn zeros(fields: &mut Fields<'_>) -> Result<Zeros> {
    Ok(match fields.text("zeros")? {
        "middle" => Zeros::Middle,
        "codes" => Zeros::Codes(0),
        "codes+1" => Zeros::Codes(1),
        _ => Zeros::Numbers(one_of(fields, "zeros", NUMBERS)?),
    })
}

fn one_of(fields: &mut Fields<'_>, key: &'static str, types: &[DType]) -> Result<DType> {
    let name = fields.text(key)?;
    dtype(name).filter(|t| types.contains(t)).ok_or_else(|| fields.wrong(key, &name.into()))
}

fn pair(fields: &mut Fields<'_>, key: &'static str) -> Result<[u64; 2]> {
    let numbers = fields.numbers(key)?;
    match numbers[..] {
        [a, b] if a > 0 && b > 0 => Ok([a, b]),
        _ => Err(fields.wrong(key, &json!(numbers))),
    }
}
