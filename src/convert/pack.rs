//! Matrices of quantized checkpoints in the plan: one planned tensor, several that are written.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::gather::{Scratch, Source};
use super::journal::Written;
use super::outcome::{Loss, Spanned, Tally};
use super::plan::{Budget, Plan, Rounding, TensorPlan};
use super::stage::OutputFile;
use super::stream::{Guides, Observer};
use crate::container::Store;
use crate::container::grouped::Rows;
use crate::error::{Error, Result};
use crate::packed::write::{Data, Grid, IntegerData, Integers, Layout, Regrid, lost, round, weigh};
use crate::tensor::DType;

/// How a planned matrix is stored as several tensors.
#[derive(Debug)]
pub struct Packing {
    /// The format's name.
    pub format: &'static str,
    /// Where codes and scales lie.
    pub layout: Arc<dyn Layout>,
    /// The tensors.
    pub parts: Vec<PartPlan>,
    /// What of the source is taken over as it is.
    pub origin: Option<Origin>,
    /// The number of the matrix, or of the first of several, in the stack that calibration knows it in.
    pub expert: u64,
    /// The same layout, once it is known what it has to know of all weights.
    informed: OnceLock<Arc<dyn Layout>>,
}

/// One tensor of a packed matrix.
#[derive(Debug)]
pub struct PartPlan {
    /// Name in the output.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Which output file.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
}

impl PartPlan {
    /// A tensor whose place is not known yet.
    pub(super) fn new(name: &str, dtype: DType, shape: &[u64]) -> Self {
        Self { name: name.to_string(), dtype, shape: shape.to_vec(), file: 0, offset: 0 }
    }
}

/// What needs no rounding.
#[derive(Debug)]
pub enum Origin {
    /// Integers that are on the layout's grid.
    Integers(Integers, Regrid),
    /// Blocks of MXFP4.
    Mxfp4,
}

/// As many groups as are looked at together.
const GROUPS: u64 = 1 << 18;
/// And codes, where these are looked at as well.
const CODES: u64 = 1 << 22;

impl Packing {
    /// A matrix of a stack (rows of all its members together), called `name` in the output.
    ///
    /// # Errors
    /// `Unsupported` for sizes that the layout cannot hold.
    pub fn new(format: &'static str, layout: Arc<dyn Layout>, name: &str, shape: &[u64]) -> Result<Self> {
        let (cols, outer) = shape.split_last().map_or((1, &[][..]), |(c, outer)| (*c, outer));
        let rows = crate::tensor::elements(outer)?;
        let stem = name.strip_suffix(".weight").or_else(|| name.strip_suffix("_blocks")).unwrap_or(name);
        let part = |part: crate::packed::write::Part| {
            // A stack stays one.
            let shape = match (part.shape.split_first(), outer) {
                (Some((first, rest)), [_, _, ..]) if *first == rows => [outer, rest].concat(),
                _ => part.shape,
            };
            PartPlan::new(&format!("{stem}{}", part.suffix), part.dtype, &shape)
        };
        let parts = layout.parts(rows, cols)?.into_iter().map(part).collect();
        Ok(Self { format, layout, parts, origin: None, expert: 0, informed: OnceLock::new() })
    }

    /// Bytes of all its tensors.
    ///
    /// # Errors
    /// `Malformed` for impossible sizes.
    pub fn nbytes(&self) -> Result<u64> {
        self.parts.iter().try_fold(0u64, |sum, p| {
            let n = p.dtype.nbytes(&p.shape)?;
            sum.checked_add(n).ok_or_else(|| Error::malformed("a matrix would exceed 2^64 bytes"))
        })
    }

    /// Finds out whether codes and scales of the source can be taken over.
    ///
    /// # Errors
    /// As reads fail.
    pub fn settle(&mut self, integers: Option<Integers>, source: &Source, store: &Store) -> Result<()> {
        if self.layout.grid().is_none() {
            let blocks = self.format == crate::packed::write::Format::Mxfp4.name();
            self.origin = (blocks && source.is_plain(DType::MXFP4)).then_some(Origin::Mxfp4);
            return Ok(());
        }
        if let Some(integers) = integers {
            self.settle_integers(integers, source, store)?;
        }
        match self.layout.counted(&[]).is_some() && self.origin.is_none() {
            true => {
                Err(Error::unsupported(format!("{} is for weights that are ternary already", self.format))
                    .hint("--encoding ternary rounds them; what comes of that can be packed so"))
            }
            false => Ok(()),
        }
    }

    fn settle_integers(&mut self, integers: Integers, source: &Source, store: &Store) -> Result<()> {
        let order = integers.order(store.stored())?;
        let Some(regrid) = Regrid::new(&integers, &*self.layout, order) else { return Ok(()) };
        let shape = integers.shape();
        let counts = self.layout.counted(&[]).is_some();
        let reads_codes = counts || regrid.needs_codes();
        let step = if reads_codes { CODES / shape.cols.max(1) } else { GROUPS / shape.groups.max(1) };
        let step = step.max(1);
        let (mut rows, mut bytes, mut scratch) = (Rows::default(), Vec::new(), Scratch::default());
        let (mut moved, mut used) = (Rows::default(), Vec::new());
        let mut first = 0;
        while first < shape.rows {
            let end = shape.rows.min(first + step);
            let data = fetch(&integers, source, store, (first, end), &mut bytes, &mut scratch)?;
            match reads_codes {
                true => integers.read(data, first..end, &mut rows)?,
                false => integers.read_lines(data, first..end, &mut rows)?,
            }
            if !regrid.holds(&rows) {
                return Ok(());
            }
            if counts {
                regrid.apply(&rows, &mut moved)?;
                let of_row = |codes: &[u8]| codes.iter().filter(|code| **code != 1).count() as u64;
                used.extend(moved.codes.chunks_exact(shape.cols as usize).map(of_row));
            }
            first = end;
        }
        if let Some(layout) = self.layout.counted(&used) {
            for (own, part) in self.parts.iter_mut().zip(layout.parts(shape.rows, shape.cols)?) {
                if own.dtype.nbytes(&own.shape)? != part.dtype.nbytes(&part.shape)? {
                    own.shape = part.shape;
                }
            }
            self.layout = layout;
        }
        self.origin = Some(Origin::Integers(integers, regrid));
        Ok(())
    }

    /// Writes the elements `start..end`, whole rows, and returns what became of them.
    ///
    /// # Errors
    /// As reads and writes fail; `Malformed` for weights that cannot be stored.
    #[allow(clippy::too_many_arguments)] // buffers
    pub(super) fn write(
        &self,
        t: &TensorPlan,
        store: &Store,
        files: &[OutputFile],
        (start, end): (u64, u64),
        buffers: &mut Buffers,
        guides: &Guides<'_>,
        mut note: Option<&mut Written>,
    ) -> Result<Spanned> {
        let Buffers { values, scratch, bytes, rows, moved, importance } = buffers;
        let (cols, _) = t.rows();
        let (first, last) = (start / cols, end / cols);
        let mut written = 0;
        let mut put = |number: usize, offset: u64, bytes: &[u8]| {
            let part = self.parts.get(number).ok_or_else(|| Error::misuse("a part that is not there"))?;
            written += bytes.len() as u64;
            if let Some(note) = &mut note {
                note.note(number, (part.file, part.offset + offset), bytes);
            }
            files[part.file].write_at(part.offset + offset, bytes)
        };
        let shape = [t.source.elements() / cols, cols];
        let layout = self.informed.get().unwrap_or(&self.layout);
        match &self.origin {
            Some(Origin::Integers(integers, regrid)) => {
                let data = fetch(integers, &t.source, store, (first, last), bytes, scratch)?;
                integers.read(data, first..last, rows)?;
                regrid.apply(rows, moved)?;
                let data = match regrid.order() {
                    Some(order) => Data::Ordered(moved, order),
                    None => Data::Integers(moved),
                };
                layout.write(shape, first, data, &mut put)?;
                return Ok(Spanned { bytes: written, loss: Some(Loss::default()), ..Spanned::default() });
            }
            Some(Origin::Mxfp4) => {
                t.source.raw(store, start, end, bytes, scratch)?;
                layout.write(shape, first, Data::Mxfp4(bytes), &mut put)?;
                return Ok(Spanned { bytes: written, loss: Some(Loss::default()), ..Spanned::default() });
            }
            None => {}
        }
        t.source.values(store, start, end, values, scratch)?;
        let power = values.iter().map(|w| f64::from(*w).powi(2)).sum();
        let mut tallies = Vec::new();
        let lost = match layout.grid() {
            Some(grid) => {
                tallies = self.round(t, grid, (first, values), rows, importance, guides)?;
                layout.write(shape, first, Data::Integers(rows), &mut put)?;
                let mut stored = vec![0.0; values.len()];
                rows.all_weights(&grid.shape(last - first, cols), &mut stored);
                lost(values, &stored)
            }
            None => layout.write(shape, first, Data::Weights(values), &mut put)?,
        };
        Ok(Spanned { bytes: written, tallies, loss: Some(Loss { lost, power }), flushed: 0 })
    }
}

impl Packing {
    /// Rounds whole rows from `first` on by the method of the plan, those of each expert of a stack by what
    /// calibration knows of it.
    fn round(
        &self,
        t: &TensorPlan,
        grid: &Grid,
        (first, values): (u64, &[f32]),
        rows: &mut Rows,
        importance: &mut Vec<f32>,
        guides: &Guides<'_>,
    ) -> Result<Vec<Tally>> {
        let (cols, of_expert) = t.rows();
        if matches!(t.rounding, Rounding::Nearest) {
            return round(grid, values, cols, rows).map(|()| Vec::new());
        }
        let is_stack = t.shape.len() > 2;
        let (mut tallies, mut some) = (Vec::new(), Rows::default());
        rows.clear();
        let (mut at, end) = (first, first + values.len() as u64 / cols);
        while at < end {
            let (expert, until) = match is_stack {
                true => (self.expert + at / of_expert, end.min((at / of_expert + 1) * of_expert)),
                false => (self.expert, end),
            };
            let values = &values[((at - first) * cols) as usize..((until - first) * cols) as usize];
            tallies.extend(self.round_expert(
                t,
                grid,
                (expert, at),
                values,
                &mut some,
                importance,
                guides,
            )?);
            rows.append(&some);
            at = until;
        }
        Ok(tallies)
    }

    #[allow(clippy::too_many_arguments)] // buffers
    fn round_expert(
        &self,
        t: &TensorPlan,
        grid: &Grid,
        (expert, first): (u64, u64),
        values: &[f32],
        rows: &mut Rows,
        importance: &mut Vec<f32>,
        guides: &Guides<'_>,
    ) -> Result<Option<Tally>> {
        let (cols, _) = t.rows();
        importance.clear();
        importance.resize(cols as usize, 1.0);
        match &t.rounding {
            Rounding::Nearest | Rounding::Even => {}
            Rounding::Weighed(source) => source.read(expert, importance)?,
            Rounding::Guided(guide) => {
                if let Some(prepared) = guides.get(guide, expert, None)? {
                    let costs = prepared.round(grid, values, rows)?;
                    let shape = grid.shape(values.len() as u64 / cols, cols);
                    let weights = |rows: &Rows| {
                        let mut stored = vec![0.0; values.len()];
                        rows.all_weights(&shape, &mut stored);
                        stored
                    };
                    let plainly = || {
                        let mut plain = Rows::default();
                        round(grid, values, cols, &mut plain).map(|()| weights(&plain))
                    };
                    let stored = || Ok(weights(rows));
                    let at = (expert, first);
                    return Tally::new(at, &prepared, values, &stored, &plainly, &costs).map(Some);
                }
                guide.moments.mean_squares(&guide.input, expert, importance)?;
            }
        }
        weigh(grid, values, cols, importance, rows).map(|()| None)
    }
}

/// Finds out what layouts have to know of all weights of a matrix before any is written.
///
/// # Errors
/// As reads fail; `Interrupted`.
pub(super) fn survey(plan: &Plan, store: &Store, budget: &Budget, observer: &dyn Observer) -> Result<()> {
    let wanting = |t: &&TensorPlan| t.packing.as_ref().is_some_and(|p| p.layout.survey(&[]).is_some());
    let wanting: Vec<_> = plan.tensors.iter().filter(wanting).collect();
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        let mut buffers = Buffers::default();
        while let Some(t) = wanting.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(e) = survey_one(t, store, budget, observer, &mut buffers) {
                next.store(wanting.len(), Ordering::Relaxed);
                failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
            }
        }
    };
    crate::work::together(budget.threads.min(wanting.len()), work);
    failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
}

fn survey_one(
    t: &TensorPlan,
    store: &Store,
    budget: &Budget,
    observer: &dyn Observer,
    buffers: &mut Buffers,
) -> Result<()> {
    let Some(packing) = &t.packing else { return Ok(()) };
    let (mut sum, mut n, mut start) = (0.0, 0, 0);
    let (row, _) = t.rows();
    while start < t.source.elements() {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        let end = (start + budget.span(t)).min(t.source.elements());
        t.source.values(store, start, end, &mut buffers.values, &mut buffers.scratch)?;
        // Row by row, so that spans do not matter.
        for weights in buffers.values.chunks(row as usize) {
            let (more, of) = packing.layout.survey(weights).unwrap_or_default();
            (sum, n) = (sum + more, n + of);
        }
        start = end;
    }
    if let Some(layout) = packing.layout.informed(sum / n.max(1) as f64) {
        packing.informed.get_or_init(|| layout);
    }
    Ok(())
}

/// Buffers of one worker.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    values: Vec<f32>,
    scratch: Scratch,
    bytes: Vec<u8>,
    rows: Rows,
    moved: Rows,
    importance: Vec<f32>,
}

/// What integers are read from: the files, or the bytes of these rows.
fn fetch<'a>(
    integers: &Integers,
    source: &Source,
    store: &'a Store,
    (first, end): (u64, u64),
    bytes: &'a mut Vec<u8>,
    scratch: &mut Scratch,
) -> Result<IntegerData<'a>> {
    let Integers::Blocks(_, shape) = integers else { return Ok(IntegerData::Stored(store.stored())) };
    source.raw(store, first * shape.cols, end * shape.cols, bytes, scratch)?;
    Ok(IntegerData::Blocks(bytes))
}
