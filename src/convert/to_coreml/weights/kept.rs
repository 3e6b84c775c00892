//! Codes of the source, moved: in which form they take least, and its bytes.
//!
//! Integers in groups are Core ML's integers where their scales are numbers of float16. Others, and those of few bits
//! in large groups, are indices into tables of a group, whose entries are what codes stand for. Either gives what the
//! source stands for, rounded once to float16.

use super::codes::{Codes, Survey};
use super::lut::{indices, name, tables};
use super::plain::halves;
use super::values::{BEYOND, Outcome, Scratch, Span, Tensor, whole_bytes};
use super::{Encoding, Keep, Operand, Put, Wish};
use crate::block::bits;
use crate::container::Store;
use crate::container::coreml::DataType;
use crate::container::grouped::Rows;
use crate::error::{Error, Result};
use crate::mil::{Form, Stored};

/// A form that holds codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// -1, 0 and 1, with one scale for a row.
    Ternary,
    /// `code - zero`.
    Signed(u32),
    /// Codes, and zeros beside them.
    Unsigned(u32),
    /// Indices of so many bits.
    Lut(u32),
}

impl Held {
    fn bits(self) -> u32 {
        match self {
            Self::Ternary => 2,
            Self::Signed(bits) | Self::Unsigned(bits) | Self::Lut(bits) => bits,
        }
    }

    /// The form that takes the least for groups of so many columns, with no more bits to a code than are wished, and
    /// no more than twice of that with scales and tables.
    fn of(survey: &Survey, group: u64, cols: u64, most_bits: u32) -> Option<Self> {
        // What codes less zeros lie between, and the greatest zero.
        let range = survey.zeros.map(|(low, high)| (-high, i32::from(survey.most) - low, high, low));
        let within = |low: i32, high: i32| range.is_some_and(|(l, h, ..)| l >= low && h <= high);
        if group == cols && within(-1, 1) {
            return Some(Self::Ternary);
        }
        let zeros_within = |most: i32| range.is_some_and(|(.., high, low)| low >= 0 && high <= most);
        let most = i32::from(survey.most);
        let mut forms = Vec::new();
        if survey.halves {
            forms.extend([(Self::Signed(4), 16, within(-8, 7)), (Self::Signed(8), 16, within(-128, 127))]);
            forms.push((Self::Unsigned(4), 20, zeros_within(15) && most <= 15));
            forms.push((Self::Unsigned(8), 24, zeros_within(255)));
        }
        let lut = [1, 2, 3, 4, 6, 8].map(|bits| (Self::Lut(bits), 16u64 << bits, most < 1 << bits));
        forms.extend(lut);
        let size =
            |form: Self, of_group: u64| u128::from(group) * u128::from(form.bits()) + u128::from(of_group);
        let most_size = u128::from(group) * u128::from((2 * most_bits).min(16));
        let fitting = forms.into_iter().filter(|(form, of_group, fits)| {
            *fits && form.bits() <= most_bits && size(*form, *of_group) <= most_size
        });
        fitting.min_by_key(|(form, of_group, _)| size(*form, *of_group)).map(|(form, ..)| form)
    }
}

/// What becomes of codes.
#[derive(Debug)]
pub(super) enum Choice {
    /// They stay, as ternary digits.
    Ternary(Codes, String),
    /// They stay.
    Kept(Box<Kept>, String),
    /// They do not.
    Decoded(String),
}

/// Codes as they are.
#[derive(Debug)]
pub(super) struct Kept {
    codes: Codes,
    held: Held,
    /// Columns of a group, as it is stored.
    group: u64,
    unit: u64,
}

impl Kept {
    /// Finds out what can become of codes.
    pub fn choose(codes: Codes, tensor: &Tensor, store: &Store, wish: Wish, keep: Keep) -> Result<Choice> {
        let wished = match wish {
            Wish::F16 => 16,
            Wish::Int { bits, .. } | Wish::Lut { bits, .. } => bits,
            Wish::Ternary { .. } => 2,
        };
        let name = codes.name();
        let no = |why: &str| Ok(Choice::Decoded(format!("{name}: its codes do not stay: {why}")));
        if codes.shape.bits.min(8) > wished {
            return no(&format!("{wished} bits are wished"));
        }
        let survey = codes.survey(tensor, store)?;
        let group = if survey.by_row { tensor.cols } else { codes.shape.group_size };
        if group != tensor.cols && (keep == Keep::Rows || !tensor.cols.is_multiple_of(group)) {
            return no(&format!("groups of {group} have scales of their own"));
        }
        let Some(held) = Held::of(&survey, group, tensor.cols, wished) else {
            return no("no form of Core ML holds them in so few bits");
        };
        let note = |form: &str| format!("{name}: codes as they are, {form}");
        let of_group = if group == tensor.cols { "rows".into() } else { format!("groups of {group}") };
        if held == Held::Ternary {
            let rounded = if survey.halves { "" } else { ", scales rounded to float16" };
            return Ok(Choice::Ternary(codes, note(&format!("ternary{rounded}"))));
        }
        let form = match held {
            Held::Lut(bits) => format!("tables of {bits} bits for {of_group}"),
            Held::Unsigned(bits) => format!("integers of {bits} bits with zeros for {of_group}"),
            held => format!("integers of {} bits for {of_group}", held.bits()),
        };
        let mut unit = whole_bytes(tensor.cols, held.bits());
        if let Held::Unsigned(bits) = held {
            unit = unit.max(whole_bytes(tensor.cols / group, bits)); // both are powers of two
        }
        Ok(Choice::Kept(Box::new(Self { codes, held, group, unit }), note(&form)))
    }
}

impl Encoding for Kept {
    fn name(&self) -> &'static str {
        match self.held {
            Held::Ternary => "ternary",
            Held::Signed(bits) => {
                if bits == 4 {
                    "int4"
                } else {
                    "int8"
                }
            }
            Held::Unsigned(bits) => {
                if bits == 4 {
                    "uint4"
                } else {
                    "uint8"
                }
            }
            Held::Lut(bits) => name(bits),
        }
    }

    fn method(&self, _: bool) -> Option<&'static str> {
        None
    }

    fn operands(&self, tensor: &Tensor) -> Vec<Operand> {
        let mut scales = tensor.shape.clone();
        if let Some(last) = scales.last_mut() {
            *last /= self.group;
        }
        let of = |dtype| Operand::new(dtype, tensor.shape.clone());
        let scale = Operand::new(DataType::Float16, scales.clone());
        let codes = |narrow, wide| if self.held.bits() == 4 { narrow } else { wide };
        match self.held {
            Held::Signed(_) => vec![of(codes(DataType::Int4, DataType::Int8)), scale],
            Held::Unsigned(_) => {
                let dtype = codes(DataType::UInt4, DataType::UInt8);
                vec![of(dtype), scale, Operand::new(dtype, scales)]
            }
            Held::Lut(bits) => {
                let tables = tables(&tensor.shape, 1, self.group, bits);
                let dtype = indices(bits).unwrap_or(DataType::UInt8);
                vec![of(dtype), Operand::new(DataType::Float16, tables)]
            }
            Held::Ternary => Vec::new(),
        }
    }

    fn form(&self, operands: Vec<Stored>) -> Option<(Form, Option<Stored>)> {
        let mut operands = operands.into_iter();
        let (data, second, third) = (operands.next()?, operands.next()?, operands.next());
        let form = match self.held {
            Held::Lut(_) => Form::Lut { indices: data, lut: second },
            _ => Form::Blockwise { data, scale: second, offset: third },
        };
        Some((form, None))
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    fn write(&self, span: &Span<'_>, scratch: &mut Scratch, put: &Put<'_>) -> Result<Outcome> {
        let Span { tensor, rows, .. } = span;
        self.codes.read(span, scratch)?;
        let Scratch {
            rows: Rows { codes, scales, zeros }, codes: out, scales: small, zeros: offsets, ..
        } = scratch;
        let (cols, group) = (tensor.cols as usize, self.group as usize);
        let (groups, stored) = (cols / group, self.codes.shape.groups as usize);
        out.clear();
        small.clear();
        offsets.clear();
        for (row, codes) in codes.chunks_exact(cols).enumerate() {
            for (g, codes) in codes.chunks_exact(group).enumerate() {
                // Where groups are joined, all lines of the row are the same.
                let line = row * stored + g * (stored / groups);
                let (scale, zero) = (scales[line], zeros[line]);
                let (least, most) =
                    codes.iter().fold((u8::MAX, 0u8), |(least, most), c| ((*c).min(least), (*c).max(most)));
                let end = (f32::from(most) - zero).abs().max((f32::from(least) - zero).abs());
                let fits = end * scale.abs() < BEYOND; // nor NaN
                if !fits {
                    let row = tensor.in_source(rows).start + row as u64;
                    let why =
                        format!("row {row}, group {g}: codes times a scale of {scale} are beyond float16");
                    return Err(Error::unsupported(why));
                }
                match self.held {
                    Held::Lut(bits) => {
                        out.extend_from_slice(codes);
                        let entry =
                            |j: u32| if j <= u32::from(most) { (j as f32 - zero) * scale } else { 0.0 };
                        small.extend((0..1 << bits).map(entry));
                    }
                    Held::Unsigned(_) => {
                        out.extend_from_slice(codes);
                        small.push(scale);
                        offsets.push(zero as u8);
                    }
                    Held::Signed(_) | Held::Ternary => {
                        let zero = zero as i32 as u8;
                        out.extend(codes.iter().map(|code| code.wrapping_sub(zero)));
                        small.push(scale);
                    }
                }
            }
        }
        let n = small.len() / (rows.end - rows.start) as usize;
        halves(small, &mut scratch.small)?;
        put(1, rows.start * n as u64 * 2, &scratch.small)?;
        if let Held::Unsigned(bits) = self.held {
            let first = rows.start * groups as u64;
            let len = bits::bytes(scratch.zeros.len() as u64, bits).unwrap_or(0) as usize;
            scratch.bytes.resize(len, 0);
            bits::pack(&scratch.zeros, bits, &mut scratch.bytes);
            put(2, first * u64::from(bits) / 8, &scratch.bytes)?;
        }
        scratch.put_codes(0, self.held.bits(), rows.start * tensor.cols, put)?;
        Ok(Outcome::default())
    }
}
