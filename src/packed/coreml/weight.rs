//! What a constant decodes to.
//!
//! Values are those that coremltools decodes: products are rounded once to the type of the result.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::block::{bits, f32_from_bf16};
use crate::container::coreml::{Constant, DataType, Form, Package, Place};
use crate::error::{Error, Result};

/// Elements of a mask between two numbers of a [`Weight`]'s index.
const STRETCH: u64 = 1 << 15;
/// Elements that are read at a time.
const RUN: usize = 1 << 15;
/// Tables are decoded as a whole where they have at most so many times the elements that are read, or so few.
const TABLE_TIMES: usize = 16;
const TABLE_FEW: usize = 1 << 9;

/// A constant of a package, ready to be read from any element on.
#[derive(Clone, Debug)]
pub struct Weight {
    package: Arc<Package>,
    constant: Arc<Constant>,
    /// Of what is sparse: how many elements are not zero before each stretch of the mask.
    ranks: Arc<[u64]>,
}

impl Weight {
    /// Of what is sparse, the mask is read.
    ///
    /// # Errors
    /// `Unsupported` for forms that are not known, and types without values; `Malformed` where a mask has not as many
    /// bits as there are values; `Io`.
    pub fn new(package: Arc<Package>, constant: Arc<Constant>) -> Result<Self> {
        let context = |e: Error| e.context(format_args!("constant {:?}", constant.name));
        check(&constant).map_err(context)?;
        let ranks = match &constant.form {
            Form::Sparse { mask, values } => ranks(&package, mask, values).map_err(context)?,
            _ => Vec::new(),
        };
        Ok(Self { package, constant, ranks: ranks.into() })
    }

    /// What it decodes.
    pub fn constant(&self) -> &Arc<Constant> {
        &self.constant
    }

    /// The package it is of.
    pub fn package(&self) -> &Arc<Package> {
        &self.package
    }

    /// Fills `out` with the values from element `start` on, in row-major order.
    ///
    /// # Errors
    /// `Misuse` beyond its elements; `Malformed` for indices beyond a table; `Io`.
    pub fn read(&self, start: u64, out: &mut [f32]) -> Result<()> {
        let all = self.constant.elements();
        if start.checked_add(out.len() as u64).is_none_or(|end| end > all) {
            return Err(Error::misuse(format!(
                "{} elements from {start} on of constant {:?}, which has {all}",
                out.len(),
                self.constant.name
            )));
        }
        let context = |e: Error| e.context(format_args!("constant {:?}", self.constant.name));
        self.values(&self.constant, start, out).map_err(context)
    }

    /// The same of a part of it.
    pub(super) fn values(&self, constant: &Constant, start: u64, out: &mut [f32]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        match &constant.form {
            Form::Plain(place) => plain(&self.package, place, constant.data_type, start, out),
            Form::Blockwise { data, scale, offset } => {
                self.values(data, start, out)?;
                self.scale(&constant.shape, (scale, offset.as_deref()), start, out)
            }
            Form::Lut { indices, lut, vector_axis: None } => {
                let codes = self.codes(indices, start, out.len())?;
                self.entries(&constant.shape, lut, start, &codes, out)
            }
            Form::Lut { indices, lut, vector_axis: Some(axis) } => {
                self.vectors((constant, indices, lut), *axis, start, out)
            }
            Form::Sparse { mask, values } => self.sparse(mask, values, start, out),
            Form::SparseLut { .. } | Form::SparseBlockwise { .. } | Form::Unknown(_) => Err(unread(constant)),
        }
    }

    /// What shares a scale or a table: `None` where all of it does, or each element stands for itself. Second, how
    /// many elements of it there are in each group.
    pub(super) fn shared(&self) -> Option<(Groups, u64)> {
        let shape = &self.constant.shape;
        let groups = match &self.constant.form {
            Form::Blockwise { scale, .. } => &scale.shape[..],
            Form::Lut { lut, vector_axis: None, .. } => tables(lut)?,
            Form::Sparse { values, .. } => match &values.form {
                Form::SparseBlockwise { scale, .. } => &scale.shape[..],
                Form::SparseLut { lut, .. } => tables(lut)?,
                _ => return None,
            },
            _ => return None,
        };
        let count: u64 = groups.iter().product(); // each divides its dimension
        let each = self.constant.elements().checked_div(count)?;
        (count > 1 && each > 1).then(|| (Groups::new(shape, groups), each))
    }

    /// Codes of at most 8 bits as they are stored.
    fn codes(&self, constant: &Constant, start: u64, n: usize) -> Result<Vec<u8>> {
        let Form::Plain(place) = &constant.form else { return Err(unread(constant)) };
        let mut codes = vec![0; n];
        codes_of(&self.package, place, constant.data_type, start, &mut codes)?;
        Ok(codes)
    }

    /// `scale * (data - offset)`, of data in `out`.
    fn scale(
        &self,
        shape: &[u64],
        (scale, offset): (&Constant, Option<&Constant>),
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        let groups = Groups::new(shape, &scale.shape);
        let span = groups.span(start, out.len());
        let n = (span.end - span.start) as usize;
        let mut scales = vec![0.0; n];
        self.values(scale, span.start, &mut scales)?;
        let mut offsets = vec![0.0; if offset.is_some() { n } else { 0 }];
        // A difference of floats is a number of their type; one of integers is exact.
        let mut is_float = false;
        if let Some(offset) = offset {
            self.values(offset, span.start, &mut offsets)?;
            is_float = matches!(offset.data_type, DataType::Float16 | DataType::Float32);
        }
        groups.runs(start, out.len(), |run, group| {
            let at = (group - span.start) as usize;
            let out = &mut out[run];
            if let Some(offset) = offsets.get(at) {
                out.iter_mut().for_each(|x| *x -= offset);
                if is_float {
                    round(scale.data_type, out);
                }
            }
            let scale = scales[at];
            out.iter_mut().for_each(|x| *x *= scale);
        });
        round(scale.data_type, out);
        Ok(())
    }

    /// Entries of tables of one element each.
    fn entries(
        &self,
        shape: &[u64],
        lut: &Constant,
        start: u64,
        codes: &[u8],
        out: &mut [f32],
    ) -> Result<()> {
        let Some([groups @ .., entries, _]) = lut.shape.get(..) else { return Err(unread(lut)) };
        let (groups, entries) = (Groups::new(shape, groups), *entries);
        let span = groups.span(start, out.len());
        let Some(tables) = self.tables(lut, &span, entries, out.len())? else {
            let mut read = Ok(());
            groups.runs(start, out.len(), |run, group| {
                for (x, code) in out[run.clone()].iter_mut().zip(&codes[run]) {
                    if read.is_ok() {
                        read = self.values(lut, group * entries + u64::from(*code), std::slice::from_mut(x));
                    }
                }
            });
            return read;
        };
        groups.runs(start, out.len(), |run, group| {
            // Codes of n bits are below the 2^n entries, as was checked.
            let table = &tables[((group - span.start) * entries) as usize..][..entries as usize];
            let codes = &codes[run.clone()];
            out[run].iter_mut().zip(codes).for_each(|(x, code)| *x = table[usize::from(*code)]);
        });
        Ok(())
    }

    /// Elements of the tables of these groups, each of `size` of them; `None` where these are far more than the
    /// `wanted` that are read.
    fn tables(
        &self,
        lut: &Constant,
        groups: &Range<u64>,
        size: u64,
        wanted: usize,
    ) -> Result<Option<Vec<f32>>> {
        let most = wanted.saturating_mul(TABLE_TIMES).max(TABLE_FEW);
        let n = (groups.end - groups.start).checked_mul(size).and_then(|n| usize::try_from(n).ok());
        let Some(n) = n.filter(|n| *n <= most) else { return Ok(None) };
        let mut tables = vec![0.0; n];
        self.values(lut, groups.start * size, &mut tables)?;
        Ok(Some(tables))
    }

    /// Entries of several elements each, which follow on each other along `axis`.
    fn vectors(
        &self,
        (whole, indices, lut): (&Constant, &Constant, &Constant),
        axis: usize,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        let [groups @ .., entries, width] = &lut.shape[..] else { return Err(unread(lut)) };
        let (groups, entries, width) = (Groups::new(&indices.shape, groups), *entries, *width);
        let inner: u64 = whole.shape[axis + 1..].iter().product();
        let (n, column) = (out.len() as u64, start % inner);
        let end = start + n;
        // Lines of indices: those at one place of the axis.
        let lines = start / inner / width..(end - 1) / inner / width + 1;
        let (mut first, mut last) = (lines.start * inner, lines.end * inner);
        if n <= inner - column {
            (first, last) = (first + column, first + column + n);
        } else if last - first > n.saturating_mul(4) {
            // Few elements of long lines.
            let (here, next) = out.split_at_mut((inner - column) as usize);
            self.vectors((whole, indices, lut), axis, start, here)?;
            return self.vectors((whole, indices, lut), axis, start + inner - column, next);
        }
        let codes = self.codes(indices, first, (last - first) as usize)?;
        let span = groups.span(first, codes.len());
        let tables = self.tables(lut, &span, entries * width, out.len())?;
        for (at, x) in (start..end).zip(out) {
            let (line, column) = (at / inner, at % inner);
            let index = line / width * inner + column;
            let entry = groups.of(index) * entries + u64::from(codes[(index - first) as usize]);
            let place = entry * width + line % width;
            match &tables {
                Some(tables) => *x = tables[(place - span.start * entries * width) as usize],
                None => self.values(lut, place, std::slice::from_mut(x))?,
            }
        }
        Ok(())
    }

    fn sparse(&self, mask: &Constant, values: &Constant, start: u64, out: &mut [f32]) -> Result<()> {
        let stretch = start / STRETCH;
        let from = stretch * STRETCH;
        let bits = self.codes(mask, from, (start - from) as usize + out.len())?;
        let (before, bits) = bits.split_at((start - from) as usize);
        let rank = self.ranks.get(stretch as usize).copied().unwrap_or(0);
        let first = rank + before.iter().map(|b| u64::from(*b)).sum::<u64>();
        let n = bits.iter().filter(|b| **b != 0).count();
        let places = || bits.iter().enumerate().filter(|(_, bit)| **bit != 0).map(|(i, _)| i);
        match &values.form {
            Form::SparseLut { indices, lut, .. } => {
                let mut codes = vec![0; bits.len()];
                let found = self.codes(indices, first, n)?;
                places().zip(found).for_each(|(i, code)| codes[i] = code);
                self.entries(&mask.shape, lut, start, &codes, out)?;
            }
            form => {
                let (data, scale) = match form {
                    Form::SparseBlockwise { data, scale, offset, .. } => {
                        (&**data, Some((&**scale, offset.as_deref())))
                    }
                    _ => (values, None),
                };
                let mut found = vec![0.0; n];
                self.values(data, first, &mut found)?;
                places().zip(found).for_each(|(i, x)| out[i] = x);
                if let Some(scale) = scale {
                    self.scale(&mask.shape, scale, start, out)?;
                }
            }
        }
        bits.iter().zip(out).filter(|(bit, _)| **bit == 0).for_each(|(_, x)| *x = 0.0);
        Ok(())
    }
}

/// How a table's constant is divided.
fn tables(lut: &Constant) -> Option<&[u64]> {
    lut.shape.len().checked_sub(2).and_then(|rank| lut.shape.get(..rank))
}

fn unread(constant: &Constant) -> Error {
    Error::unsupported(format!("{:?} of {} is not decoded", constant.name, constant.encoding()))
}

/// That everything it is made of can be decoded.
fn check(constant: &Constant) -> Result<()> {
    match &constant.form {
        Form::Unknown(kind) => {
            return Err(Error::unsupported(format!(
                "{kind} is not decoded, as it was before iOS 18, or is new"
            ))
            .hint(
                "save the package with coremltools for iOS 18: minimum_deployment_target=ct.target.iOS18",
            ));
        }
        Form::Plain(_) if !is_number(constant.data_type) => {
            let (name, found) = (&constant.name, constant.data_type);
            return Err(Error::unsupported(format!("{name:?} is {found}, which are no values of weights")));
        }
        Form::Lut { indices, .. } | Form::SparseLut { indices, .. } if !is_plain(indices) => {
            return Err(unread(indices));
        }
        Form::Sparse { mask, .. } if !is_plain(mask) => return Err(unread(mask)),
        _ => {}
    }
    // The places of what is sparse are counted for the whole alone.
    let is_sparse = |part: &Constant| matches!(part.form, Form::Sparse { .. });
    match constant.parts().into_iter().find(|(_, part)| is_sparse(part)) {
        Some((_, part)) => Err(unread(part)),
        None => constant.parts().into_iter().try_for_each(|(_, part)| check(part)),
    }
}

fn is_plain(constant: &Constant) -> bool {
    matches!(constant.form, Form::Plain(_)) && constant.data_type.bits() <= 8
}

fn is_number(data_type: DataType) -> bool {
    !matches!(
        data_type,
        DataType::Unused
            | DataType::String
            | DataType::Float64
            | DataType::Int64
            | DataType::UInt64
            | DataType::Float8E4M3FN
            | DataType::Float8E5M2
    )
}

/// How many bits of a mask are set before each stretch of it.
fn ranks(package: &Package, mask: &Constant, values: &Constant) -> Result<Vec<u64>> {
    let Form::Plain(place) = &mask.form else { return Err(unread(mask)) };
    let (all, mut ranks, mut count) = (mask.elements(), Vec::new(), 0u64);
    let mut bytes = vec![0; (STRETCH / 8) as usize];
    for start in (0..all).step_by(STRETCH as usize) {
        ranks.push(count);
        let n = (all - start).min(STRETCH);
        let bytes = &mut bytes[..n.div_ceil(8) as usize];
        package.read(place, start / 8, bytes)?;
        if n % 8 > 0
            && let Some(last) = bytes.last_mut()
        {
            *last &= (1 << (n % 8)) - 1;
        }
        count += bytes.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
    }
    match count == values.elements() {
        true => Ok(ranks),
        false => Err(Error::malformed(format!(
            "{count} bits of its mask are set, and {} values are there",
            values.elements()
        ))),
    }
}

/// Elements as they are stored.
fn plain(package: &Package, place: &Place, data_type: DataType, start: u64, out: &mut [f32]) -> Result<()> {
    let width = u64::from(data_type.bits());
    if width <= 8 {
        let mut codes = vec![0; out.len()];
        codes_of(package, place, data_type, start, &mut codes)?;
        let pairs = out.iter_mut().zip(codes);
        match data_type {
            DataType::Int8 => pairs.for_each(|(x, code)| *x = f32::from(code as i8)),
            // Two's complement: 8 to 15 are -8 to -1.
            DataType::Int4 => pairs.for_each(|(x, code)| *x = f32::from((code ^ 8) as i8 - 8)),
            _ => pairs.for_each(|(x, code)| *x = f32::from(code)),
        }
        return Ok(());
    }
    let size = width / 8;
    let mut bytes = vec![0; out.len().min(RUN) * size as usize];
    for (k, out) in out.chunks_mut(RUN).enumerate() {
        let bytes = &mut bytes[..out.len() * size as usize];
        package.read(place, (start + (k * RUN) as u64) * size, bytes)?;
        words(data_type, bytes, out)?;
    }
    Ok(())
}

/// Numbers of 16 and 32 bits.
fn words(data_type: DataType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let words = out.iter_mut().zip(bytes.as_chunks::<2>().0);
    let longs = || bytes.as_chunks::<4>().0;
    match data_type {
        DataType::Float16 => {
            let mut halves = [f16::ZERO; 512];
            for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..out.len()];
                let pairs = bytes.as_chunks().0;
                halves.iter_mut().zip(pairs).for_each(|(half, b)| *half = f16::from_le_bytes(*b));
                halves.convert_to_f32_slice(out);
            }
        }
        DataType::BFloat16 => words.for_each(|(x, b)| *x = f32_from_bf16(u16::from_le_bytes(*b))),
        DataType::Int16 => words.for_each(|(x, b)| *x = i16::from_le_bytes(*b).into()),
        DataType::UInt16 => words.for_each(|(x, b)| *x = u16::from_le_bytes(*b).into()),
        DataType::Float32 => out.iter_mut().zip(longs()).for_each(|(x, b)| *x = f32::from_le_bytes(*b)),
        DataType::Int32 => out.iter_mut().zip(longs()).for_each(|(x, b)| *x = i32::from_le_bytes(*b) as f32),
        DataType::UInt32 => out.iter_mut().zip(longs()).for_each(|(x, b)| *x = u32::from_le_bytes(*b) as f32),
        other => return Err(Error::unsupported(format!("{other} are no values of weights"))),
    }
    Ok(())
}

/// Codes of at most 8 bits.
fn codes_of(
    package: &Package,
    place: &Place,
    data_type: DataType,
    start: u64,
    codes: &mut [u8],
) -> Result<()> {
    let width = u64::from(data_type.bits());
    if width == 8 {
        return package.read(place, start, codes);
    }
    // Eight codes are whole bytes; those before `start` are passed over.
    let (first, skip) = (start / 8 * width, (start % 8) as usize);
    let mut bytes = vec![0; ((skip + codes.len()) as u64 * width).div_ceil(8) as usize];
    package.read(place, first, &mut bytes)?;
    bits::unpack(&bytes, data_type.bits(), skip, codes);
    Ok(())
}

/// To the numbers of a type.
pub(super) fn round(data_type: DataType, values: &mut [f32]) {
    if data_type != DataType::Float16 {
        return;
    }
    let mut halves = [f16::ZERO; 256];
    for values in values.chunks_mut(halves.len()) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
}

/// Which block each element is of. Dimensions whose blocks follow on each other are one.
#[derive(Debug)]
pub(super) struct Groups {
    /// Size and number of blocks of each dimension, from the outermost on.
    axes: Vec<(u64, u64)>,
}

impl Groups {
    /// Of blocks that divide the shape.
    pub(super) fn new(shape: &[u64], groups: &[u64]) -> Self {
        let mut axes: Vec<(u64, u64)> = Vec::new();
        for (&size, &groups) in shape.iter().zip(groups).filter(|(size, _)| **size != 1) {
            match axes.last_mut() {
                // Blocks within one place of the dimension before it, or blocks that take all of this one.
                Some(last) if last.0 == last.1 || groups == 1 => *last = (last.0 * size, last.1 * groups),
                _ => axes.push((size, groups)),
            }
        }
        Self { axes }
    }

    /// The block of an element.
    fn of(&self, at: u64) -> u64 {
        let (mut rest, mut stride, mut group) = (at, 1, 0);
        for (size, groups) in self.axes.iter().rev() {
            group += rest % size / (size / groups) * stride;
            rest /= size;
            stride *= groups;
        }
        group
    }

    /// Calls `each` with places among `n` elements from `start` on, and the block that they are of.
    pub(super) fn runs(&self, start: u64, n: usize, mut each: impl FnMut(Range<usize>, u64)) {
        if let [(size, groups)] = self.axes[..] {
            // Nearly all weights: one block behind the other.
            let wide = size.checked_div(groups).unwrap_or(0).max(1);
            let (mut group, mut left, mut at) = (start / wide, wide - start % wide, 0);
            while at < n {
                let end = at + usize::try_from(left).unwrap_or(n).min(n - at);
                each(at..end, group);
                (group, left, at) = (group + 1, wide, end);
            }
            return;
        }
        let wide = self.axes.last().map_or(u64::MAX, |(size, groups)| size / groups);
        let mut at = 0;
        while at < n {
            let element = start + at as u64;
            let left = wide - element % wide;
            let end = at + usize::try_from(left).unwrap_or(n).min(n - at);
            each(at..end, self.of(element));
            at = end;
        }
    }

    /// The blocks from the first that `n` elements from `start` on have a part in, to the last.
    pub(super) fn span(&self, start: u64, n: usize) -> Range<u64> {
        let (mut first, mut end) = (u64::MAX, 0);
        let mut widen = |group: u64| (first, end) = (first.min(group), end.max(group + 1));
        match &self.axes[..] {
            // They follow on each other.
            _ if n == 0 => return 0..0,
            [] | [_] => [start, start + n as u64 - 1].into_iter().for_each(|at| widen(self.of(at))),
            _ => self.runs(start, n, |_, group| widen(group)),
        }
        first..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;

    fn constant(data_type: DataType, shape: &[u64], bytes: Vec<u8>) -> Arc<Constant> {
        let form = Form::Plain(Place::Immediate(bytes.into()));
        Arc::new(Constant { name: "x".into(), data_type, shape: shape.into(), form })
    }

    /// By the definition, any part: of few elements in long lines, and of tables that are not decoded as a whole.
    #[test]
    fn parts_of_palettes() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/coreml/mini.mlpackage");
        let package = Arc::new(Package::open(path, &Limits::default()).unwrap());
        for (shape, axis, groups, width) in [
            ([3, 40], Some(0), [1, 1], 4u64),
            ([3, 40], Some(0), [1, 40], 2),
            ([3, 40], Some(1), [3, 5], 3),
            ([2, 64], None, [1, 64], 1),
            ([6, 10], None, [2, 1], 1),
        ] {
            let n = (shape[0] * shape[1]) as usize;
            let codes: Vec<u8> = (0..n).map(|i| (i * 89 % 251) as u8).collect();
            let size = (groups[0] * groups[1] * 256 * width) as usize;
            let table: Vec<i16> = (0..size).map(|i| (i * 31 % 30011) as i16).collect();
            let bytes = table.iter().flat_map(|x| x.to_le_bytes()).collect();
            let lut = constant(DataType::Int16, &[groups[0], groups[1], 256, width], bytes);
            let indices = constant(DataType::UInt8, &shape, codes.clone());
            let mut whole = shape;
            axis.into_iter().for_each(|axis: usize| whole[axis] *= width);
            let form = Form::Lut { indices, lut, vector_axis: axis };
            let made = Constant { name: "w".into(), data_type: DataType::Int16, shape: whole.to_vec(), form };
            let weight = Weight::new(Arc::clone(&package), Arc::new(made)).unwrap();
            let wanted = |at: usize| {
                let mut place = [at as u64 / whole[1], at as u64 % whole[1]];
                let within = axis.map_or(0, |axis| place[axis] % width);
                axis.into_iter().for_each(|axis| place[axis] /= width);
                let group = place[0] * groups[0] / shape[0] * groups[1] + place[1] * groups[1] / shape[1];
                let code = u64::from(codes[(place[0] * shape[1] + place[1]) as usize]);
                f32::from(table[((group * 256 + code) * width + within) as usize])
            };
            let all = (whole[0] * whole[1]) as usize;
            for len in [1, 2, 7, 39, 45, all] {
                for start in 0..=all - len {
                    let mut found = vec![0.0; len];
                    weight.read(start as u64, &mut found).unwrap();
                    let wanted: Vec<f32> = (start..start + len).map(wanted).collect();
                    assert_eq!(found, wanted, "{shape:?} {axis:?} {start} {len}");
                }
            }
        }
    }
}
