//! Streaming: workers pull spans in output order, read, convert, and write each at its final
//! place. What is written does not depend on threads or budget.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::gather::Scratch;
use super::journal::{Journal, Span, Written};
use super::outcome::{Ledger, Loss, Outcome, Spanned, Tally};
use super::pack::Buffers;
use super::plan::{Budget, Guide, Importance, Plan, Rounding, TensorPlan};
use super::stage::OutputFile;
use super::to_coreml;
use crate::block::{Codec, codec};
use crate::container::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::quantize::{Method, Prepared};
use crate::work::resize;

/// Who watches a conversion: the command line's progress bar, or nobody.
pub trait Observer: Sync {
    /// `bytes` more of the output are written; `tensor` is the one they belong to.
    fn advance(&self, bytes: u64, tensor: &str);
    /// An earlier process had begun, and what it finished, so many bytes of the output, is not done again if it is
    /// still there.
    fn resumed(&self, _bytes: u64) {}
    /// Whether to stop.
    fn interrupted(&self) -> bool;
}

/// Nobody watches.
pub struct Silent;

impl Observer for Silent {
    fn advance(&self, _: u64, _: &str) {}
    fn interrupted(&self) -> bool {
        false
    }
}

/// Writes every tensor of `plan` into `files` (in the order of `plan.files`), but for what `journal` has as
/// finished; the rest is noted there. Returns what became of each.
///
/// # Errors
/// The first that any worker meets; `Interrupted` when the observer says so.
pub fn stream(
    plan: &Plan,
    store: &Store,
    files: &[OutputFile],
    journal: Option<&Journal>,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Vec<Outcome>> {
    // What is noted as one of tensor k has the numbers firsts[k]..firsts[k + 1].
    let mut firsts = vec![0usize];
    for t in &plan.tensors {
        let pieces = budget.spans(t).div_ceil(budget.noted_together(t));
        firsts.push(firsts.last().copied().unwrap_or(0) + pieces as usize);
    }
    let spans = firsts.last().copied().unwrap_or(0);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let guides = Guides::new(budget.threads, plan, store);
    let work = Work { plan, store, files, journal, guides, observer };
    let ledger = Ledger::new(plan);
    if let Some(journal) = journal.filter(|journal| journal.is_begun()) {
        observer.resumed(journal.bytes());
    }
    let fail = |e: Error, tensor: &TensorPlan| {
        stop.store(true, Ordering::Relaxed);
        let mut failure = lock(&failure);
        failure.get_or_insert_with(|| match (e.kind(), e.path()) {
            (ErrorKind::Interrupted, _) | (_, Some(_)) => e,
            _ => e.context(format!("tensor {:?}", tensor.name)),
        });
    };
    let run = || {
        let mut worker = Worker::default();
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= spans {
                break;
            }
            let k = firsts.partition_point(|&first| first <= number) - 1;
            let tensor = &plan.tensors[k];
            let step = budget.span(tensor);
            let piece = step * budget.noted_together(tensor);
            let start = (number - firsts[k]) as u64 * piece;
            let end = (start + piece).min(tensor.source.elements());
            let done = worker.once(&work, Span { tensor: k, start, end }, step);
            match done {
                Ok(Spanned { loss: Some(loss), .. }) if plan.exact_only && loss.lost > 0.0 => {
                    let why = Error::misuse("--exact-only: it is not the same after rounding");
                    fail(why.hint("--dtype f32 holds what blocks hold; fp8, mxfp4 and bnb round"), tensor);
                }
                Ok(spanned) => ledger.enter(k, start, spanned),
                Err(e) => fail(e, tensor),
            }
        }
    };
    crate::work::together(budget.threads, run);
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(ledger.close(plan)),
    }
}

/// What workers share.
struct Work<'a> {
    plan: &'a Plan,
    store: &'a Store,
    files: &'a [OutputFile],
    journal: Option<&'a Journal>,
    guides: Guides<'a>,
    observer: &'a dyn Observer,
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    values: Vec<f32>,
    stored: Vec<f32>,
    packing: Buffers,
    encoding: to_coreml::weights::Scratch,
    importance: Vec<f32>,
    /// The tensor and expert whose importance was read last.
    important: Option<(String, u64)>,
    bytes: Vec<u8>,
}

impl Worker {
    /// Elements of a tensor, so many in each step, unless an earlier process has finished them.
    fn once(&mut self, work: &Work<'_>, all: Span, step: u64) -> Result<Spanned> {
        let &Work { plan, files, journal, observer, .. } = work;
        let t = &plan.tensors[all.tensor];
        let read = |file: usize, at: u64, bytes: &mut [u8]| match files.get(file) {
            _ if observer.interrupted() => Err(Error::interrupted()),
            Some(file) => file.read_at(at, bytes),
            None => Err(Error::misuse("no such output file")),
        };
        if let Some(found) = journal.and_then(|j| j.find(all, read)) {
            observer.advance(found.bytes, &t.name);
            return Ok(found);
        }
        let mut written = Written::default();
        let mut done = Spanned::default();
        let mut start = all.start;
        while start < all.end {
            if observer.interrupted() {
                return Err(Error::interrupted());
            }
            let span = Span { start, end: all.end.min(start.saturating_add(step)), ..all };
            let spanned = self.span_of(work, span, journal.map(|_| &mut written))?;
            if t.moved.is_none() {
                observer.advance(spanned.bytes, &t.name);
            }
            done.append(spanned);
            start = span.end;
        }
        if let Some(journal) = journal {
            journal.add(all, &written, &done)?;
        }
        Ok(done)
    }

    fn span_of(&mut self, work: &Work<'_>, span: Span, mut note: Option<&mut Written>) -> Result<Spanned> {
        let &Work { plan, store, files, ref guides, observer, .. } = work;
        let Span { tensor, start, end } = span;
        let t = &plan.tensors[tensor];
        if let Some(moved) = &t.moved {
            return moved.write((&t.name, start), store, files, &mut self.encoding, observer, note);
        }
        if let Some(packing) = &t.packing {
            return packing.write(t, store, files, (start, end), &mut self.packing, guides, note);
        }
        let (bytes, tallies) = self.span(t, store, &files[t.file], start, end, guides)?;
        if let Some(note) = &mut note {
            note.note(0, (t.file, t.offset + t.dtype.bytes_for(start)?), &self.bytes);
        }
        let loss = if plan.measures { Some(self.loss(t)?) } else { None };
        Ok(Spanned { bytes, tallies, loss, flushed: 0 })
    }

    fn span(
        &mut self,
        t: &TensorPlan,
        store: &Store,
        file: &OutputFile,
        start: u64,
        end: u64,
        guides: &Guides<'_>,
    ) -> Result<(u64, Vec<Tally>)> {
        let mut tallies = Vec::new();
        if t.is_plain() {
            t.source.raw(store, start, end, &mut self.bytes, &mut self.scratch)?;
        } else {
            t.source.values(store, start, end, &mut self.values, &mut self.scratch)?;
            let codec = codec(t.dtype)
                .ok_or_else(|| Error::unsupported(format!("type {} cannot be written", t.dtype)))?;
            if t.dtype.is_block() {
                check_finite(&self.values)?;
            }
            resize(&mut self.bytes, t.dtype.bytes_for(end - start)? as usize, 0)?;
            match &t.rounding {
                Rounding::Nearest => codec.encode(&self.values, self.values.len(), None, &mut self.bytes)?,
                Rounding::Even => {
                    let row = t.rows().0 as usize;
                    self.important = None;
                    self.importance.clear();
                    self.importance.resize(row, 1.0);
                    codec.encode(&self.values, row, Some(&self.importance), &mut self.bytes)?;
                }
                Rounding::Weighed(importance) => self.weighed(t, importance, codec, start)?,
                Rounding::Guided(guide) => tallies = self.guided(t, guide, codec, start, guides)?,
            }
        }
        file.write_at(t.offset + t.dtype.bytes_for(start)?, &self.bytes)?;
        Ok((self.bytes.len() as u64, tallies))
    }

    /// What the span that was just written lost.
    fn loss(&mut self, t: &TensorPlan) -> Result<Loss> {
        if t.is_plain() {
            return Ok(Loss::default());
        }
        let codec =
            codec(t.dtype).ok_or_else(|| Error::unsupported(format!("type {} cannot be read", t.dtype)))?;
        resize(&mut self.stored, self.values.len(), 0.0)?;
        codec.decode(&self.bytes, &mut self.stored)?;
        if self.values.iter().zip(&self.stored).any(|(w, y)| w.is_finite() && !y.is_finite()) {
            return Err(Error::unsupported(format!("values are too large for {}", t.dtype))
                .hint("--dtype bf16 or f32 has room for them"));
        }
        // What is not finite stays what it is.
        let pairs = || self.values.iter().zip(&self.stored).filter(|(w, y)| w != y && !w.is_nan());
        let square = |x: f32| f64::from(x).powi(2);
        Ok(Loss {
            lost: pairs().map(|(w, y)| square(w - y)).sum(),
            power: self.values.iter().filter(|w| w.is_finite()).map(|w| square(*w)).sum(),
        })
    }

    /// Encodes whole rows from element `start` on, those of each expert with its own importance.
    fn weighed(&mut self, t: &TensorPlan, importance: &Importance, codec: &Codec, start: u64) -> Result<()> {
        let Self { values, bytes, importance: weights, important, .. } = self;
        by_expert(t, start, values, bytes, |expert, row, values, bytes| {
            if !important.as_ref().is_some_and(|(name, e)| *name == t.name && *e == expert) {
                *important = None;
                weights.resize(row, 0.0);
                importance.read(expert, weights)?;
                t.source.scale_importance(expert, weights);
                *important = Some((t.name.clone(), expert));
            }
            codec.encode(values, row, Some(weights), bytes)
        })
    }

    /// The same by second moments; weighed by their diagonal where an expert has seen too little. Returns
    /// what became of each expert's rows.
    fn guided(
        &mut self,
        t: &TensorPlan,
        guide: &Guide,
        codec: &Codec,
        start: u64,
        guides: &Guides<'_>,
    ) -> Result<Vec<Tally>> {
        let Self { values, bytes, importance, important, .. } = self;
        let mut tallies = Vec::new();
        let first = start / t.rows().0;
        by_expert(t, start, values, bytes, |expert, row, values, bytes| {
            match guides.get(guide, expert, t.source.column_scales(expert))? {
                Some(prepared) => {
                    let costs = prepared.encode(&guide.lattice, values, bytes)?;
                    let decode = |bytes: &[u8]| {
                        let mut stored = vec![0f32; values.len()];
                        codec.decode(bytes, &mut stored).map(|()| stored)
                    };
                    let plainly = || {
                        let mut plain = vec![0; bytes.len()];
                        codec.encode(values, values.len(), None, &mut plain)?;
                        decode(&plain)
                    };
                    let at = (expert, first);
                    tallies.push(Tally::new(at, &prepared, values, &|| decode(bytes), &plainly, &costs)?);
                    Ok(())
                }
                None => {
                    *important = None;
                    importance.resize(row, 0.0);
                    guide.moments.mean_squares(&guide.input, expert, importance)?;
                    t.source.scale_importance(expert, importance);
                    codec.encode(values, row, Some(importance), bytes)
                }
            }
        })?;
        Ok(tallies)
    }
}

/// Hands the rows of each expert, from element `start` on, to `encode`: the expert's number, the length
/// of a row, the rows' values, and their bytes.
fn by_expert(
    t: &TensorPlan,
    start: u64,
    values: &[f32],
    bytes: &mut [u8],
    mut encode: impl FnMut(u64, usize, &[f32], &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (row, rows_of_expert) = t.rows();
    let (first, end) = (start / row, (start + values.len() as u64) / row);
    let row_bytes = t.dtype.bytes_for(row)? as usize;
    let mut at = first;
    while at < end {
        let expert = at / rows_of_expert;
        let until = end.min((expert + 1) * rows_of_expert);
        let rows = (at - first) as usize..(until - first) as usize;
        let values = &values[rows.start * row as usize..rows.end * row as usize];
        encode(expert, row as usize, values, &mut bytes[rows.start * row_bytes..rows.end * row_bytes])?;
        at = until;
    }
    Ok(())
}

/// What methods have prepared for the inputs that are being worked on. Workers share it: rows of the same
/// input need the same, and it is large.
pub(super) struct Guides<'a> {
    plan: &'a Plan,
    store: &'a Store,
    /// The last used last.
    recent: Mutex<Vec<(Key, Arc<Cell>)>>,
    /// How many are kept.
    most: usize,
    /// One is made at a time: that takes memory.
    making: Mutex<()>,
}

/// Name of an input, an expert, and what is prepared for.
type Key = (String, u64, Method);
type Cell = OnceLock<Option<Arc<Prepared>>>;

impl<'a> Guides<'a> {
    fn new(most: usize, plan: &'a Plan, store: &'a Store) -> Self {
        Self { plan, store, recent: Mutex::new(Vec::new()), most, making: Mutex::new(()) }
    }

    /// For the rows of an expert, whose columns folds have multiplied with `scales`, all that read the
    /// same alike; `None` where too few tokens reached it.
    pub(super) fn get(
        &self,
        guide: &Guide,
        expert: u64,
        scales: Option<&[f32]>,
    ) -> Result<Option<Arc<Prepared>>> {
        let key = (guide.input.name.clone(), expert, guide.method);
        let cell = {
            let mut recent = lock(&self.recent);
            let at = recent.iter().position(|(k, _)| *k == key);
            let entry = at.map_or_else(|| (key, Arc::default()), |i| recent.remove(i));
            let cell = entry.1.clone();
            recent.push(entry);
            let surplus = recent.len().saturating_sub(self.most);
            recent.drain(..surplus);
            cell
        };
        if let Some(prepared) = cell.get() {
            return Ok(prepared.clone());
        }
        let _one_at_a_time = lock(&self.making);
        if let Some(prepared) = cell.get() {
            return Ok(prepared.clone());
        }
        let prepared = match &guide.readers {
            Some(readers) => {
                let metric = readers.measure(self.plan, self.store)?;
                Some(Arc::new(guide.method.prepare_from(&metric, 1)?))
            }
            None => {
                let counts = guide.moments.counts(&guide.input)?;
                let enough = counts.get(expert as usize).is_some_and(|&n| n >= guide.method.least_tokens());
                let prepare = || guide.method.prepare(&guide.moments, &guide.input, expert, scales);
                enough.then(prepare).transpose()?.map(Arc::new)
            }
        };
        Ok(cell.get_or_init(|| prepared).clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Blocks have no room for what is not finite: one such weight spoils its whole block.
fn check_finite(values: &[f32]) -> Result<()> {
    // Without branches: a chunk's largest exponent tells.
    let spoilt = |chunk: &[f32]| chunk.iter().fold(false, |any, v| any | !v.is_finite());
    if !values.chunks(4096).any(spoilt) {
        return Ok(());
    }
    let n = values.iter().filter(|v| !v.is_finite()).count();
    Err(Error::malformed(format!("{n} of {} weights looked at are NaN or infinite", values.len()))
        .hint("the model is damaged; types f32, f16 and bf16 would keep them as they are"))
}
