//! Codes that a source has already: integers in groups, in whatever checkpoint, and ggml's blocks of whole numbers.

use std::ops::Range;
use std::sync::Arc;

use super::values::{BEYOND, Scratch, Span, Tensor, half};
use crate::arch::{Data, Mapped};
use crate::block::{codec, f16_from_f32, f32_from_f16};
use crate::container::Store;
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::error::{Error, Result};
use crate::packed::write::is_half;
use crate::tensor::{DType, Dim, StridedCopy};

/// The codes of a tensor: `(code - zero) * scale`.
#[derive(Debug)]
pub(super) struct Codes {
    pub shape: Shape,
    /// The greatest code that there can be.
    most: u8,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    Blocks(&'static Blocks),
    /// Matrices, and where their rows go.
    Grouped(Vec<(Arc<dyn Grouped>, StridedCopy)>),
}

/// A block type whose weights are whole numbers times a scale.
#[derive(Debug)]
struct Blocks {
    dtype: DType,
    /// First byte of the scale.
    scale: usize,
    /// The least number.
    least: i8,
    bits: u32,
    /// The greatest number, counted from the least.
    most: u8,
}

/// Layouts: `formats/spec/blocks.md`. Numbers are what decoding gives with a scale of 1.
static BLOCKS: &[Blocks] = &[
    Blocks { dtype: DType::Q4_0, scale: 0, least: -8, bits: 4, most: 15 },
    Blocks { dtype: DType::Q5_0, scale: 0, least: -16, bits: 5, most: 31 },
    Blocks { dtype: DType::Q8_0, scale: 0, least: -128, bits: 8, most: 255 },
    Blocks { dtype: DType::Q2_0, scale: 0, least: -1, bits: 2, most: 3 },
    Blocks { dtype: DType::TQ1_0, scale: 52, least: -1, bits: 2, most: 2 },
    Blocks { dtype: DType::TQ2_0, scale: 64, least: -1, bits: 2, most: 2 },
    // Numbers are twice those of E2M1, so that the scale is half of what is stored.
    Blocks { dtype: DType::MXFP4, scale: 0, least: -12, bits: 5, most: 24 },
];

impl Blocks {
    /// Takes the scale out of a block, and puts a 1 there.
    fn take_scale(&self, block: &mut [u8]) -> f32 {
        if self.dtype == DType::MXFP4 {
            // 2^(e - 128), and 2^0; of the least exponents subnormal numbers.
            let e = std::mem::replace(&mut block[self.scale], 128);
            return f64::from(2f32).powi(i32::from(e) - 128) as f32;
        }
        let Some([low, high]) = block.get_mut(self.scale..self.scale + 2) else { return 0.0 };
        let scale = f32_from_f16(u16::from_le_bytes([*low, *high]));
        [*low, *high] = f16_from_f32(1.0).to_le_bytes();
        scale
    }
}

/// What is known of all codes, scales and zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct Survey {
    /// The greatest code.
    pub most: u8,
    /// The least and the greatest zero; `None` where there are some that are no whole numbers.
    pub zeros: Option<(i32, i32)>,
    /// Whether all scales are numbers of float16.
    pub halves: bool,
    /// Whether all groups of a row have the same scale and zero.
    pub by_row: bool,
}

impl Codes {
    /// Those of `tensor`; the reason where codes that there are cannot stay, `None` where there are none.
    pub fn of(
        mapped: &Mapped,
        tensor: &Tensor,
        store: &Store,
    ) -> Result<Option<std::result::Result<Self, String>>> {
        let Data::Copied { pieces, elementwise } = &mapped.data else { return Ok(None) };
        let packed =
            |p: &crate::arch::Piece| store.grouped(store.get(&p.source)?).map(|(matrix, _)| matrix.clone());
        let blocks = tensor.source.dtype().and_then(|dtype| BLOCKS.iter().find(|b| b.dtype == dtype));
        let no = |why: &str| Ok(Some(Err(format!("its codes do not stay: {why}"))));
        if tensor.shape.len() < 2 || blocks.is_none() && !pieces.iter().any(|p| packed(p).is_some()) {
            return Ok(None);
        }
        if !elementwise.is_empty() || tensor.source.is_changed() {
            return no("values are computed from them");
        }
        let (rows, cols) = (tensor.rows, tensor.cols);
        if let Some(blocks) = blocks {
            let group_size = blocks.dtype.block_size();
            if !tensor.source.is_plain(blocks.dtype) || !cols.is_multiple_of(group_size) {
                return no("blocks are divided");
            }
            let shape = Shape { rows, cols, bits: blocks.bits, group_size, groups: cols / group_size };
            return Ok(Some(Ok(Self { shape, most: blocks.most, origin: Origin::Blocks(blocks) })));
        }
        let (mut matrices, mut copied) = (Vec::new(), 0u64);
        let mut shape: Option<(Shape, u8)> = None;
        for piece in pieces {
            let Some(matrix) = packed(piece) else { return no("parts of it are not packed") };
            let own = (Shape { rows, ..matrix.shape().clone() }, matrix.most());
            let Some(copy) = piece.copy.in_blocks(cols).filter(|_| own.0.cols == cols) else {
                return no("its rows are not rows of the source");
            };
            if shape.get_or_insert_with(|| own.clone()) != &own {
                return no("its parts have other groups");
            }
            if matrix.order(store.stored())?.is_some() {
                return no("columns are in an order of their own (act-order)");
            }
            copied = copied.saturating_add(piece.copy.elements());
            matrices.push((matrix, copy));
        }
        match shape {
            Some((shape, most)) if copied == tensor.source.elements() => {
                Ok(Some(Ok(Self { shape, most, origin: Origin::Grouped(matrices) })))
            }
            _ => no("parts of it have no source"),
        }
    }

    /// What they are called in messages.
    pub fn name(&self) -> String {
        match &self.origin {
            Origin::Blocks(blocks) => blocks.dtype.to_string(),
            Origin::Grouped(_) => format!("{} bits", self.shape.bits),
        }
    }

    /// Fills `scratch.rows` with some rows.
    pub fn read(&self, span: &Span<'_>, scratch: &mut Scratch) -> Result<()> {
        let Span { tensor, store, rows } = span;
        let from = tensor.in_source(rows);
        match &self.origin {
            Origin::Blocks(blocks) => {
                self.scales_of_blocks(blocks, tensor, store, &from, scratch)?;
                self.codes_of_blocks(blocks, &from, scratch)
            }
            Origin::Grouped(matrices) => {
                let (cols, groups) = (self.shape.cols as usize, self.shape.groups as usize);
                let n = (from.end - from.start) as usize;
                let Scratch { rows: out, some, .. } = scratch;
                out.codes.resize(n * cols, 0);
                out.scales.resize(n * groups, 0.0);
                out.zeros.resize(n * groups, 0.0);
                each_run(matrices, &from, &mut |matrix, source, to| {
                    let n = (source.end - source.start) as usize;
                    some.read(matrix, store.stored(), source)?;
                    out.codes[to * cols..(to + n) * cols].copy_from_slice(&some.codes);
                    out.scales[to * groups..(to + n) * groups].copy_from_slice(&some.scales);
                    out.zeros[to * groups..(to + n) * groups].copy_from_slice(&some.zeros);
                    Ok(())
                })
            }
        }
    }

    /// Reads blocks, and takes their scales out of them.
    fn scales_of_blocks(
        &self,
        blocks: &Blocks,
        tensor: &Tensor,
        store: &Store,
        from: &Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Scratch { fetch, rows: Rows { scales, zeros, .. }, bytes, .. } = scratch;
        let cols = self.shape.cols;
        tensor.source.raw(store, from.start * cols, from.end * cols, bytes, fetch)?;
        let each = bytes.chunks_exact_mut(blocks.dtype.type_size() as usize);
        scales.clear();
        scales.extend(each.map(|block| blocks.take_scale(block)));
        zeros.clear();
        zeros.resize(scales.len(), -f32::from(blocks.least));
        Ok(())
    }

    /// What is left of them: whole numbers.
    fn codes_of_blocks(&self, blocks: &Blocks, from: &Range<u64>, scratch: &mut Scratch) -> Result<()> {
        let Scratch { rows: Rows { codes, .. }, bytes, values, .. } = scratch;
        let codec = codec(blocks.dtype)
            .ok_or_else(|| Error::unsupported(format!("type {} has no codec", blocks.dtype)))?;
        values.resize(((from.end - from.start) * self.shape.cols) as usize, 0.0);
        codec.decode(bytes, values)?;
        codes.clear();
        codes.extend(values.iter().map(|v| (*v as i32 - i32::from(blocks.least)) as u8));
        Ok(())
    }

    /// Looks at all scales and zeros, and at codes where these decide; at nothing where the type says it all.
    pub fn survey(&self, tensor: &Tensor, store: &Store) -> Result<Survey> {
        let least = match &self.origin {
            Origin::Blocks(blocks) => Some(-i32::from(blocks.least)),
            Origin::Grouped(_) => None,
        };
        let mut survey = Survey {
            most: self.most,
            zeros: least.map(|zero| (zero, zero)),
            halves: true,
            by_row: self.shape.groups == 1,
        };
        if let Origin::Blocks(Blocks { dtype: DType::Q4_0 | DType::Q5_0 | DType::Q8_0, .. }) = &self.origin {
            return Ok(survey);
        }
        let looks_at_codes = self.shape.bits == 2 && self.most > 2;
        let mut range = (i32::MAX, i32::MIN);
        let (mut whole, mut most) = (true, 0);
        survey.by_row = true;
        let mut scratch = Scratch::default();
        let step = tensor.step(1);
        let mut first = 0;
        while first < tensor.rows {
            let rows = first..tensor.rows.min(first + step);
            let span = Span { tensor, store, rows };
            self.lines(looks_at_codes, &span, &mut scratch)?;
            let Rows { codes, scales, zeros } = &scratch.rows;
            if let Some(scale) = scales.iter().find(|s| !s.is_finite()) {
                return Err(Error::malformed(format!("has a scale of {scale}")));
            }
            survey.halves &= scales.iter().all(|s| is_half(*s));
            whole &= zeros.iter().all(|z| z.fract() == 0.0 && z.abs() <= 1024.0);
            for zero in zeros.iter().map(|z| *z as i32) {
                range = (range.0.min(zero), range.1.max(zero));
            }
            let groups = self.shape.groups as usize;
            let alike = |v: &Vec<f32>| v.chunks(groups).all(|row| row.iter().all(|x| *x == row[0]));
            survey.by_row = survey.by_row && alike(scales) && alike(zeros);
            if looks_at_codes {
                most = codes.iter().fold(most, |most, code| most.max(*code));
            }
            first = span.rows.end;
        }
        survey.zeros = whole.then_some(range);
        survey.most = if looks_at_codes { most } else { self.most };
        Ok(survey)
    }

    /// Scales and zeros, and codes where they are wished.
    fn lines(&self, codes: bool, span: &Span<'_>, scratch: &mut Scratch) -> Result<()> {
        if codes {
            return self.read(span, scratch);
        }
        let Span { tensor, store, rows } = span;
        let from = tensor.in_source(rows);
        let matrices = match &self.origin {
            Origin::Blocks(blocks) => return self.scales_of_blocks(blocks, tensor, store, &from, scratch),
            Origin::Grouped(matrices) => matrices,
        };
        let groups = self.shape.groups as usize;
        let n = (rows.end - rows.start) as usize * groups;
        let Rows { scales, zeros, .. } = &mut scratch.rows;
        scales.resize(n, 0.0);
        zeros.resize(n, 0.0);
        each_run(matrices, &from, &mut |matrix, source, to| {
            let at = to * groups..(to + (source.end - source.start) as usize) * groups;
            matrix.lines(store.stored(), source, &mut scales[at.clone()], &mut zeros[at])
        })
    }

    /// The digits, plus 1, and scales of some rows, of codes that are ternary and have one scale for a row.
    pub fn digits(&self, span: &Span<'_>, scratch: &mut Scratch) -> Result<()> {
        self.read(span, scratch)?;
        let Scratch { rows: Rows { codes, scales, zeros }, codes: digits, scales: of_rows, .. } = scratch;
        let groups = self.shape.groups as usize;
        digits.clear();
        of_rows.clear();
        for (row, codes) in codes.chunks_exact(self.shape.cols as usize).enumerate() {
            let (scale, zero) = (scales[row * groups], zeros[row * groups] as i32);
            if scale.abs() >= BEYOND {
                return Err(Error::unsupported(format!("has a scale of {scale}; float16 ends at 65504")));
            }
            let rounded = if scale < 0.0 { -half(-scale, 1.0) } else { half(scale, 1.0) };
            of_rows.push(rounded);
            // Times a scale that float16 does not tell from zero all digits are.
            let is_zero = f16_from_f32(scale.abs()) == 0;
            let digit = |code: &u8| if is_zero { 1 } else { (i32::from(*code) - zero + 1) as u8 };
            digits.extend(codes.iter().map(digit));
        }
        Ok(())
    }
}

/// Is given a matrix, rows of it, and where the first of them goes.
type Work<'a> = dyn FnMut(&dyn Grouped, Range<u64>, usize) -> Result<()> + 'a;

/// The runs of rows that the rows `to` consist of.
fn each_run(
    matrices: &[(Arc<dyn Grouped>, StridedCopy)],
    to: &Range<u64>,
    work: &mut Work<'_>,
) -> Result<()> {
    for (matrix, copy) in matrices {
        for part in copy.clip(to.start, to.end) {
            runs(&part.dims, part.src_base, part.dst_base, &mut |from, at, n| {
                work(&**matrix, from..from + n, (at - to.start) as usize)
            })?;
        }
    }
    Ok(())
}

fn runs(dims: &[Dim], src: u64, dst: u64, work: &mut dyn FnMut(u64, u64, u64) -> Result<()>) -> Result<()> {
    match dims {
        [] => work(src, dst, 1),
        [Dim { n, src: 1, dst: 1 }] => work(src, dst, *n),
        [d, rest @ ..] => (0..d.n).try_for_each(|i| runs(rest, src + i * d.src, dst + i * d.dst, work)),
    }
}
