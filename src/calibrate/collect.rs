//! The inputs of a model's matrices, seen while it reads a text.
//!
//! What is taken is what llama.cpp's imatrix tool takes: the inputs of matrices within layers, when
//! they are F32 and come 16 rows at least, those of all experts, and on request those of the output.

use crate::error::{Error, Result};
use crate::eval::score::{Perplexity, log_norm};
use crate::eval::windows::Windows;
use crate::ggml::{Context, ContextOptions, Logits, Model, Node, Observer, Op};
use crate::tensor::DType;

use super::importance::Importance;

/// Fewest rows of an input that counts, unless it goes to experts.
const MIN_ROWS: usize = 16;
/// Most bytes of the logits that are held at once.
const LOGIT_BYTES: usize = 256 << 20;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads of the computation.
    pub threads: u32,
    /// Whether the inputs of `output.weight` count too.
    pub process_output: bool,
    /// Whether the predictions are scored, which takes some time with a large vocabulary.
    pub perplexity: bool,
}

/// What has been collected so far.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The sums.
    pub importance: Importance,
    /// Windows that have been read.
    pub windows: usize,
    /// Of the predictions in them, as in [`Windows::read`].
    pub perplexity: Perplexity,
}

/// Lets the model read the windows that it has not read yet. `after` is called after each of them, and
/// `stop` now and then while it reads one: an error ends it, and `progress` is of use only after the
/// error of `after`.
///
/// # Errors
/// Those of `after` and `stop`; `Unsupported` for a model without logits or with an encoder beside its
/// decoder, and for inputs that are not finite.
pub fn collect(
    model: &Model,
    windows: &Windows,
    options: Options,
    progress: &mut Progress,
    stop: &dyn Fn() -> Result<()>,
    after: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<()> {
    let n_ctx = windows.n_ctx;
    if n_ctx < MIN_ROWS {
        let message = format!("windows of {n_ctx} tokens: at least {MIN_ROWS} are needed");
        return Err(Error::misuse(message));
    }
    if !model.is_decoder_only() {
        return Err(Error::unsupported(format!("{} predicts no next token", model.description())));
    }
    let most = (LOGIT_BYTES / 4 / model.n_tokens().max(1)).clamp(2 * MIN_ROWS, 512);
    // Parts of one size: a small rest would not count.
    let part = n_ctx.div_ceil(n_ctx.div_ceil(most));
    let context_options = ContextOptions {
        n_ctx: u32::try_from(n_ctx).map_err(|_| Error::misuse("windows are too long"))?,
        n_batch: part as u32,
        threads: options.threads,
        observed: true,
        ..ContextOptions::default()
    };
    let mut context = Context::new(model, &context_options)?;
    let scored = n_ctx / 2..n_ctx - 1;
    for (number, read) in windows.each().enumerate().skip(progress.windows) {
        context.clear();
        let mut collector = Collector {
            process_output: options.process_output,
            importance: &mut progress.importance,
            scratch: Vec::new(),
            stop,
        };
        for (k, ids) in read.chunks(part).enumerate() {
            let outcome = context.decode_observed(ids, Logits::All, &mut collector);
            outcome.map_err(|e| e.context(format_args!("window {number}")))?;
            for i in 0..ids.len() {
                let at = k * part + i;
                if options.perplexity && scored.contains(&at) {
                    let row = context.logits(i);
                    let row = row.ok_or_else(|| Error::unsupported("the model gives no logits"))?;
                    let next = read.get(at + 1).and_then(|id| row.get(usize::try_from(*id).ok()?));
                    let log_p = next.map_or(f64::NEG_INFINITY, |&x| f64::from(x) - log_norm(row));
                    progress.perplexity.add(-log_p);
                }
            }
        }
        progress.windows = number + 1;
        after(progress)?;
    }
    Ok(())
}

struct Collector<'a> {
    process_output: bool,
    importance: &'a mut Importance,
    scratch: Vec<f32>,
    stop: &'a dyn Fn() -> Result<()>,
}

impl Observer for Collector<'_> {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        let (Some(matrix), Some(input)) = (node.source(0), node.source(1)) else { return false };
        match node.op() {
            Op::MulMatId => true,
            Op::MulMat => {
                let name = matrix.name();
                input.shape()[1] >= MIN_ROWS
                    && input.dtype() == Some(DType::F32)
                    && (name.starts_with("blk.") || self.process_output && name == "output.weight")
            }
            Op::Other => false,
        }
    }

    fn see(&mut self, node: &Node<'_>) -> Result<()> {
        (self.stop)()?;
        let (Some(matrix), Some(input)) = (node.source(0), node.source(1)) else { return Ok(()) };
        let name = matrix.name();
        let (stack, shape) = (matrix.shape(), input.shape());
        let columns = shape[0].max(1);
        let rows = input.values(&mut self.scratch)?.chunks_exact(columns);
        let touched = if node.op() == Op::MulMatId {
            let chosen = node.source(2).ok_or_else(|| Error::unsupported(format!("{name}: no experts")))?;
            let used = chosen.shape()[0].max(1);
            let experts = stack[2];
            let sums = self.importance.entry(&name, columns.saturating_mul(experts), experts)?;
            let rows: Vec<&[f32]> = rows.collect();
            let mut touched = vec![false; experts];
            for (i, expert) in chosen.integers()?.into_iter().enumerate() {
                // One input for each expert of a token, or one for all of them.
                let row = rows.get(i / used * shape[1] + i % used % shape[1].max(1));
                let expert = usize::try_from(expert).ok().filter(|e| *e < experts);
                let (Some(row), Some(expert)) = (row, expert) else {
                    return Err(Error::unsupported(format!("{name}: an expert or its input is not there")));
                };
                add_squares(&mut sums.squares[expert * columns..][..columns], row);
                sums.counts[expert] += 1;
                touched[expert] = true;
            }
            let touched = touched.into_iter().enumerate().filter(|(_, touched)| *touched);
            touched.map(|(expert, _)| expert).collect()
        } else {
            let matrices = (stack[2] * stack[3]).max(1);
            let sums = self.importance.entry(&name, columns.saturating_mul(matrices), 1)?;
            let mut n = 0;
            for (i, row) in rows.enumerate() {
                let (i2, i3) = (i / shape[1] % shape[2], i / shape[1] / shape[2]);
                let which = (i3 % stack[3]) * stack[2] + i2 % stack[2];
                add_squares(&mut sums.squares[which * columns..][..columns], row);
                n += 1;
            }
            sums.counts[0] += n / matrices as u64;
            (0..matrices).collect::<Vec<_>>()
        };
        let sums = self.importance.sums.get(&*name).map_or(&[][..], |s| &s.squares);
        let finite = |which: &usize| sums[which * columns..][..columns].iter().all(|v| v.is_finite());
        if touched.iter().all(finite) {
            return Ok(());
        }
        Err(Error::unsupported(format!("the inputs of {name} are not finite")).hint(
            "is the model sound (qconv verify)? a window can be left out with --from-chunk and --chunks, and the parts joined with --in-file",
        ))
    }
}

fn add_squares(sums: &mut [f64], row: &[f32]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += f64::from(x * x);
    }
}
