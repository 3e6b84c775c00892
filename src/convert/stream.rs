//! Streaming: workers pull spans in output order, read, convert, and write each at its final
//! place. What is written does not depend on threads or budget.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::gather::Scratch;
use super::plan::{Budget, Importance, Plan, TensorPlan};
use super::stage::OutputFile;
use crate::block::{Codec, codec};
use crate::container::Store;
use crate::error::{Error, Result};

/// Who watches a conversion: the command line's progress bar, or nobody.
pub trait Observer: Sync {
    /// `bytes` more of the output are written; `tensor` is the one they belong to.
    fn advance(&self, bytes: u64, tensor: &str);
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

/// Writes every tensor of `plan` into `files` (in the order of `plan.files`).
///
/// # Errors
/// The first that any worker meets; `Interrupted` when the observer says so.
pub fn stream(
    plan: &Plan,
    store: &Store,
    files: &[OutputFile],
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    // Spans of tensor k are numbers firsts[k]..firsts[k + 1].
    let mut firsts = vec![0usize];
    for t in &plan.tensors {
        let spans = t.source.elements().div_ceil(budget.span(t));
        firsts.push(firsts.last().copied().unwrap_or(0) + spans as usize);
    }
    let spans = firsts.last().copied().unwrap_or(0);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        let mut worker = Worker::default();
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= spans {
                break;
            }
            let k = firsts.partition_point(|&first| first <= number) - 1;
            let tensor = &plan.tensors[k];
            let span = budget.span(tensor);
            let start = (number - firsts[k]) as u64 * span;
            let end = (start + span).min(tensor.source.elements());
            let done = if observer.interrupted() {
                Err(Error::interrupted())
            } else {
                worker.span(tensor, store, &files[tensor.file], start, end)
            };
            match done {
                Ok(bytes) => observer.advance(bytes, &tensor.name),
                Err(e) => {
                    stop.store(true, Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                    failure.get_or_insert_with(|| {
                        if e.path().is_some() { e } else { e.context(format!("tensor {:?}", tensor.name)) }
                    });
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..budget.threads {
            scope.spawn(work);
        }
        work();
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    values: Vec<f32>,
    importance: Vec<f32>,
    bytes: Vec<u8>,
}

impl Worker {
    fn span(
        &mut self,
        t: &TensorPlan,
        store: &Store,
        file: &OutputFile,
        start: u64,
        end: u64,
    ) -> Result<u64> {
        if t.is_plain() {
            t.source.raw(store, start, end, &mut self.bytes, &mut self.scratch)?;
        } else {
            t.source.values(store, start, end, &mut self.values, &mut self.scratch)?;
            let codec = codec(t.dtype)
                .ok_or_else(|| Error::unsupported(format!("type {} cannot be written", t.dtype)))?;
            if t.dtype.is_block() {
                check_finite(&self.values)?;
            }
            self.bytes.resize(t.dtype.bytes_for(end - start)? as usize, 0);
            match &t.importance {
                None => codec.encode(&self.values, self.values.len(), None, &mut self.bytes)?,
                Some(importance) => self.weighed(t, importance, codec, start)?,
            }
        }
        file.write_at(t.offset + t.dtype.bytes_for(start)?, &self.bytes)?;
        Ok(self.bytes.len() as u64)
    }

    /// Encodes whole rows from element `start` on, those of each expert with its own importance.
    fn weighed(&mut self, t: &TensorPlan, importance: &Importance, codec: &Codec, start: u64) -> Result<()> {
        let (row, rows_of_expert) = t.rows();
        let (first, end) = (start / row, (start + self.values.len() as u64) / row);
        let row_bytes = t.dtype.bytes_for(row)? as usize;
        self.importance.resize(row as usize, 0.0);
        let mut at = first;
        while at < end {
            let expert = at / rows_of_expert;
            let until = end.min((expert + 1) * rows_of_expert);
            importance.matrix.read(&importance.entry, expert, &mut self.importance)?;
            let rows = (at - first) as usize..(until - first) as usize;
            let values = &self.values[rows.start * row as usize..rows.end * row as usize];
            let bytes = &mut self.bytes[rows.start * row_bytes..rows.end * row_bytes];
            codec.encode(values, row as usize, Some(&self.importance), bytes)?;
            at = until;
        }
        Ok(())
    }
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
