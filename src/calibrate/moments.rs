//! Second moments of the inputs of a model's matrices, over a text.
//!
//! The text is read as often as the memory asks for, each time for the next units of the [`Plan`]. A unit
//! sums up the tokens in their order whatever else is held, and on one thread: neither threads nor memory
//! nor an interruption shows in the file. Keys and values are kept in F32, and attention is computed
//! without the fused kernel, so that activations come close to an exact reference.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::gram::{Panels, ROWS};
use super::inputs::{Finder, Selection, product};
use super::plan::{BUFFER, Plan, Unit};
use super::resume::{State, Workplace};
use crate::container::gguf::Gguf;
use crate::container::gguf::write::Layout;
use crate::container::moments::{Contents, Input, Places, Text};
use crate::error::{Error, Result};
use crate::eval::windows::Windows;
use crate::ggml::{Context, ContextOptions, Logits, Model, Node, Observer, Op};
use crate::limits::Limits;
use crate::sha256::{Sha256, hex};

/// Most bytes of logits that llama.cpp keeps. They have to be asked for: it leaves out tokens whose logits
/// nobody wants from the last layer.
const LOGIT_BYTES: usize = 256 << 20;
/// Tokens of the computation that shows which inputs there are.
const PROBE: usize = 8;
/// Bytes of each end of a tensor that tell models apart.
const SAMPLED: u64 = 4096;
/// Where saving takes long, it takes at most this part of the time.
const SAVING_SHARE: u32 = 20;

/// How to work.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads, of the model as well as for the sums.
    pub threads: u32,
    /// Most bytes for the sums and what they need; the model and llama.cpp's own come on top.
    pub max_memory: u64,
    /// How often the state is saved, so that a killed process goes on from there.
    pub save_every: Duration,
}

/// A calibration that can begin.
#[derive(Debug)]
pub struct Calibration<'m> {
    model: &'m Model,
    windows: Windows,
    n_batch: usize,
    /// What there is to do.
    pub plan: Plan,
}

/// Where the work is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Which pass, from 0 on.
    pub pass: usize,
    /// Passes in all.
    pub passes: usize,
    /// Windows read in this pass.
    pub windows: usize,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Passes over the text, also those of an earlier process.
    pub passes: usize,
    /// Whether an earlier process had begun.
    pub resumed: bool,
    /// Time in the model's own computation.
    pub reading: Duration,
    /// Time for the sums.
    pub summing: Duration,
}

impl<'m> Calibration<'m> {
    /// Looks which inputs the model at `path` has, and lays the work out. `texts` names what `windows`
    /// hold; `on_gpu` says whether layers lie on another device.
    ///
    /// # Errors
    /// `Unsupported` for models with a separate encoder, and what llama.cpp cannot execute; `Misuse` when
    /// nothing is chosen.
    pub fn new(
        model: &'m Model,
        path: &Path,
        windows: Windows,
        texts: &str,
        selection: &Selection,
        on_gpu: bool,
    ) -> Result<Self> {
        if model.has_encoder() {
            return Err(Error::unsupported("the model has an encoder beside its decoder")
                .hint("decoders, and encoders alone, can be calibrated"));
        }
        let n_batch = match model.has_logits() {
            true => (LOGIT_BYTES / 4 / model.n_tokens().max(1)).clamp(32, 512).min(windows.n_ctx),
            // An encoder looks at a whole window at once.
            false => windows.n_ctx,
        };
        let mut finder = Finder::default();
        let first: Vec<i32> = windows.each().next().unwrap_or_default();
        let first =
            if model.has_logits() { first.get(..PROBE.min(n_batch)).unwrap_or(&first) } else { &first };
        let mut context = context(model, windows.n_ctx, n_batch, 1)?;
        context.decode_observed(first, Logits::All, &mut finder)?;
        let rows = n_batch as u64 * finder.used as u64;
        let text = Text {
            name: texts.into(),
            tokens: tokens_sha256(&windows),
            n_ctx: u32::try_from(windows.n_ctx).map_err(|_| Error::misuse("windows are too long"))?,
            chunks: u32::try_from(windows.count()).map_err(|_| Error::misuse("the text is too long"))?,
        };
        let inputs = finder.select(selection)?;
        let contents = Contents { model: model_sha256(path)?, texts: vec![text], inputs };
        let plan = Plan::new(contents, rows, on_gpu)?;
        Ok(Self { model, windows, n_batch, plan })
    }

    /// Windows of the text.
    pub fn windows(&self) -> usize {
        self.windows.count()
    }

    /// Does the work, or what is left of it, and writes `target`. `watch` is asked after each window, and
    /// may stop with an error: the state is kept then.
    ///
    /// # Errors
    /// Those of `watch` and of the model's execution; `Malformed` for activations that are not finite;
    /// as [`Workplace::open`] and [`Plan::pass`].
    pub fn run(
        &self,
        target: &Path,
        force: bool,
        options: &Options,
        watch: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Summary> {
        let plan = &self.plan;
        // Whether the memory suffices shows before anything is written.
        plan.passes(0, options.max_memory)?;
        let job = hex(&Sha256::digest(&plan.layout.header));
        let (work, mut state, sums) = Workplace::open(target, plan, &job, force)?;
        let resumed = state.done > 0 || state.windows > 0;
        let fits = plan.scratch + plan.bytes(state.done..state.end) <= options.max_memory;
        let mut left = Vec::new();
        if state.end > state.done && fits {
            left.push(state.done..state.end);
        } else {
            (state.end, state.windows) = (state.done, 0);
        }
        let mut sums = if fits { sums } else { Vec::new() };
        left.extend(plan.passes(state.end, options.max_memory)?);
        let mut context = context(self.model, self.windows.n_ctx, self.n_batch, options.threads)?;
        let passes = left.len();
        let mut summary = Summary { passes, resumed, reading: Duration::ZERO, summing: Duration::ZERO };
        for (number, range) in left.into_iter().enumerate() {
            if state.end != range.end {
                (state.end, state.windows) = (range.end, 0);
            }
            let mut watcher = Watcher::new(plan, range.clone(), std::mem::take(&mut sums), options.threads);
            let mut saved = Instant::now();
            let mut cost = Duration::ZERO;
            for (w, window) in self.windows.each().enumerate().skip(state.windows) {
                let begun = Instant::now();
                let before = watcher.time;
                self.read(&mut context, &window, &mut watcher)?;
                let summing = watcher.time - before;
                summary.summing += summing;
                summary.reading += begun.elapsed().saturating_sub(summing);
                state.windows = w + 1;
                let go_on = watch(Progress { pass: number, passes, windows: state.windows });
                let due = saved.elapsed() >= options.save_every.max(cost * SAVING_SHARE);
                let last = state.windows == self.windows.count();
                if go_on.is_err() || due && !last {
                    let begun = Instant::now();
                    work.save(&state, watcher.sums.iter().map(Vec::as_slice))?;
                    (cost, saved) = (begun.elapsed(), Instant::now());
                }
                go_on?;
            }
            for (n, sums) in range.clone().zip(&watcher.sums) {
                write_unit(&work, plan, n, sums)?;
            }
            state = State { done: range.end, end: range.end, windows: 0, ..state };
            if range.end < plan.units {
                work.save(&state, std::iter::empty())?;
            }
        }
        work.commit()?;
        Ok(summary)
    }

    /// Lets the model read a window.
    fn read(&self, context: &mut Context<'_>, window: &[i32], watcher: &mut Watcher<'_>) -> Result<()> {
        context.clear();
        watcher.seen = 0;
        let parts = window.chunks(self.n_batch);
        let whole = parts.len() == 1;
        for part in parts {
            watcher.may_stop = whole;
            let done = context.decode_observed(part, Logits::All, watcher);
            match done {
                Err(_) if watcher.stopped() => {}
                other => other?,
            }
        }
        if watcher.seen != watcher.wanted.len() * window.len().div_ceil(self.n_batch) {
            let message = "the model computed this window otherwise than the first: inputs were not seen";
            return Err(Error::unsupported(message));
        }
        Ok(())
    }
}

fn context(model: &Model, n_ctx: usize, n_batch: usize, threads: u32) -> Result<Context<'_>> {
    let to_u32 = |n| u32::try_from(n).map_err(|_| Error::misuse("windows are too long"));
    let (n_ctx, n_batch) = (to_u32(n_ctx)?, to_u32(n_batch)?);
    let options = ContextOptions { n_ctx, n_batch, threads, exact: true, observed: true };
    if model.has_logits() {
        return Context::new(model, &options);
    }
    Context::for_embeddings(model, &options, Some(crate::ggml::Pooling::None))
}

/// Sums up the inputs of one pass.
struct Watcher<'p> {
    plan: &'p Plan,
    // By the weight at which it is looked at: the input, and the place of its units.
    wanted: HashMap<&'p str, (usize, Range<usize>)>,
    units: Vec<Unit>,
    sums: Vec<Vec<f64>>,
    panels: Panels,
    scratch: Vec<f32>,
    threads: u32,
    // Inputs seen of this window, and whether the last ends it.
    seen: usize,
    may_stop: bool,
    time: Duration,
}

impl<'p> Watcher<'p> {
    /// `sums` are those of the units so far, none for zeros.
    fn new(plan: &'p Plan, range: Range<u64>, mut sums: Vec<Vec<f64>>, threads: u32) -> Self {
        let units: Vec<Unit> = range.clone().filter_map(|n| plan.unit(n)).collect();
        if sums.is_empty() {
            sums = range.map(|n| vec![0.0; plan.unit_len(n) as usize]).collect();
        }
        let mut wanted: HashMap<&str, (usize, Range<usize>)> = HashMap::new();
        for (place, unit) in units.iter().enumerate() {
            if let Some(input) = plan.contents.inputs.get(unit.input) {
                let of = wanted.entry(&input.name).or_insert((unit.input, place..place));
                of.1.end = place + 1;
            }
        }
        let (panels, scratch) = (Panels::default(), Vec::new());
        let (seen, may_stop, time) = (0, false, Duration::ZERO);
        Self { plan, wanted, units, sums, panels, scratch, threads, seen, may_stop, time }
    }

    fn stopped(&self) -> bool {
        self.may_stop && self.seen == self.wanted.len()
    }

    /// Adds the inputs of a product with weights called as `input`.
    fn add(&mut self, node: &Node<'_>, input: &Input, places: Range<usize>) -> Result<()> {
        let wrong = |what: &str| Error::unsupported(format!("the input of {:?} {what}", input.name));
        let source = node.source(1).ok_or_else(|| wrong("is missing"))?;
        let [columns, n1, n2, n3] = source.shape();
        if columns as u64 != input.columns || columns == 0 {
            return Err(wrong(&format!("has {columns} values, {} were expected", input.columns)));
        }
        let count = n1 * n2 * n3;
        // Which rows each matrix of a stack gets.
        let experts = input.experts as usize;
        let mut rows: Vec<Vec<u32>> = vec![Vec::new(); experts];
        if node.op() == Op::MulMatId {
            let ids = node.source(2).ok_or_else(|| wrong("has no choice of experts"))?;
            let used = ids.shape()[0];
            for (i, id) in ids.integers()?.into_iter().enumerate() {
                let (token, slot) = (i / used.max(1), i % used.max(1));
                let row = token * n1 + slot % n1.max(1);
                let of = usize::try_from(id).ok().and_then(|e| rows.get_mut(e)).filter(|_| row < count);
                of.ok_or_else(|| wrong(&format!("goes to expert {id} of {experts}")))?.push(row as u32);
            }
        } else {
            // A stack of which each matrix has a part of the inputs, as of attention's heads.
            let slabs = n2 * n3;
            if experts > 1 && (slabs == 0 || !slabs.is_multiple_of(experts)) {
                return Err(wrong("does not fall to the matrices of its stack evenly"));
            }
            let each = count / experts.max(1);
            for (e, rows) in rows.iter_mut().enumerate() {
                rows.extend((e * each) as u32..((e + 1) * each) as u32);
            }
        }
        let values = source.values(&mut self.scratch)?;
        let first = self.units.get(places.start).map_or(0, |u| u.expert);
        let mut units = self.units[places.clone()].iter().zip(&mut self.sums[places]).peekable();
        for (e, rows) in rows.iter().enumerate().skip(first as usize) {
            let mut own = Vec::new();
            while let Some(unit) = units.next_if(|(u, _)| u.expert == e as u64) {
                own.push(unit);
            }
            if own.is_empty() {
                break;
            }
            for block in rows.chunks(ROWS) {
                let of = |&row: &u32| &values[row as usize * columns..(row as usize + 1) * columns];
                self.panels.pack(columns, block.iter().map(of));
                sum_up(&self.panels, &mut own, self.threads);
            }
        }
        Ok(())
    }
}

/// Adds the tokens in `panels` to units, each on one thread.
fn sum_up(panels: &Panels, units: &mut [(&Unit, &mut Vec<f64>)], threads: u32) {
    let threads = (threads as usize).min(units.len());
    let left = Mutex::new(units.iter_mut());
    let work = || {
        loop {
            let next = left.lock().unwrap_or_else(|e| e.into_inner()).next();
            let Some((unit, sums)) = next else { break };
            match unit.band {
                None => panels.add_sums(sums),
                Some(band) => panels.add_products(band as usize, sums),
            }
        }
    };
    crate::work::together(threads, work);
}

impl Observer for Watcher<'_> {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        product(node).is_some_and(|(name, _)| self.wanted.contains_key(name.as_str()))
    }

    fn see(&mut self, node: &Node<'_>) -> Result<()> {
        let found = product(node).and_then(|(name, _)| self.wanted.get(name.as_str()).cloned());
        let Some((at, places)) = found else { return Ok(()) };
        let plan = self.plan;
        let Some(input) = plan.contents.inputs.get(at) else { return Ok(()) };
        let begun = Instant::now();
        self.add(node, input, places)?;
        self.time += begun.elapsed();
        self.seen += 1;
        // What follows is of no use to this pass.
        if self.stopped() { Err(Error::interrupted()) } else { Ok(()) }
    }
}

/// Writes what a unit sums up to its place, in F32.
fn write_unit(work: &Workplace, plan: &Plan, n: u64, sums: &[f64]) -> Result<()> {
    let unit = plan.unit(n);
    let input = unit.and_then(|u| plan.contents.inputs.get(u.input));
    let places = unit.and_then(|u| plan.places.get(u.input));
    let (Some(unit), Some(input), Some(&Places { moments, sum, sum_abs, counts })) = (unit, input, places)
    else {
        return Err(Error::misuse(format!("unit {n} of {}", plan.units)));
    };
    if sums.iter().any(|v| !(*v as f32).is_finite()) {
        return Err(Error::malformed(format!(
            "the inputs of {:?} are NaN, infinite or too large",
            input.name
        ))
        .hint("the model computes no sound values on this text"));
    }
    let columns = input.columns;
    let Some(band) = unit.band else {
        let Some((count, sums)) = sums.split_first() else { return Ok(()) };
        work.write_at(counts + unit.expert * 8, &(*count as i64).to_le_bytes())?;
        let (sums, abs) = sums.split_at(columns as usize);
        write_f32(work, sum + unit.expert * columns * 4, sums)?;
        return write_f32(work, sum_abs + unit.expert * columns * 4, abs);
    };
    let row = band * crate::block::gram::PANEL as u64;
    let start = unit.expert * input.packed().unwrap_or(0) + input.row_start(row);
    write_f32(work, moments + start * 4, sums)
}

fn write_f32(work: &Workplace, mut at: u64, values: &[f64]) -> Result<()> {
    let mut bytes = Vec::with_capacity(BUFFER.min(values.len() * 4));
    for part in values.chunks(BUFFER / 4) {
        bytes.clear();
        part.iter().for_each(|v| bytes.extend((*v as f32).to_le_bytes()));
        work.write_at(at, &bytes)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

fn tokens_sha256(windows: &Windows) -> String {
    let mut hash = Sha256::new();
    for window in windows.each() {
        window.iter().for_each(|t| hash.update(t.to_le_bytes()));
    }
    hex(&hash.finalize())
}

/// Of metadata, names, types and shapes, and of both ends of each tensor: enough to tell models apart
/// without reading them whole.
fn model_sha256(path: &Path) -> Result<String> {
    let gguf = Gguf::open(path, &Limits::default())?;
    let tensors = gguf.store.tensors();
    let infos: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())).collect();
    let mut hash = Sha256::new();
    hash.update(Layout::new(&gguf.metadata, &infos)?.header);
    for tensor in tensors {
        let size = tensor.dtype.type_size().max(1);
        let len = (SAMPLED / size * size).max(size).min(tensor.nbytes);
        let mut bytes = vec![0; len as usize];
        for at in [0, tensor.nbytes - len] {
            gguf.store.read(tensor, at, &mut bytes)?;
            hash.update(&bytes);
        }
    }
    Ok(hex(&hash.finalize()))
}
