//! What became of each tensor: by which method it was rounded, what its output lost by that, and where a
//! method could not be had.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::plan::{Plan, TensorPlan};
use crate::block::gram::PANEL;
use crate::error::Result;
use crate::quantize::Prepared;

/// Why a tensor, or a part of it, is not rounded by the method that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fallback {
    /// The method that was asked for.
    pub wanted: &'static str,
    /// The reason: a part of a sentence that begins with the tensor's name.
    pub why: String,
}

/// What became of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Its name in the output.
    pub name: String,
    /// Its type there, or the format of a packed matrix.
    pub dtype: &'static str,
    /// What its weights lost, in parts of their mean square: 0 where they are the same. `None` where that
    /// was not looked at.
    pub nmse: Option<f64>,
    /// How its weights became codes: `rtn`, `imatrix` or a method; `copy` where nothing was rounded.
    pub method: &'static str,
    /// What its output lost, by a sample of its rows; `None` where no method looked at second moments.
    pub error: Option<OutputError>,
    /// The damping that its inputs needed, in parts of the mean of the diagonal: the most of any expert.
    pub damp: Option<f64>,
    /// Whether that is more than was asked for, since the moments could not be factored with less.
    pub damp_grew: bool,
    /// Columns that no token of the calibration text reached, of all its experts.
    pub dead_columns: u64,
    /// Weights that were not zero, and are now: too small for float16. Counted where that was looked at.
    pub flushed: u64,
    /// Where the method that was asked for could not be had.
    pub fallback: Option<Fallback>,
}

/// The mean square of what the output of a matrix loses, over the tokens of the calibration text, in parts
/// of its mean square.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OutputError {
    /// If every block were rounded by itself.
    pub before: f64,
    /// As it was rounded.
    pub after: f64,
}

/// What weights lost by being stored, as sums of squares.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Loss {
    /// Of the differences.
    pub lost: f64,
    /// Of the weights.
    pub power: f64,
}

/// What became of a span.
#[derive(Debug, Default)]
pub(super) struct Spanned {
    /// Bytes written.
    pub bytes: u64,
    /// What became of the rows of each expert in it.
    pub tallies: Vec<Tally>,
    /// What it lost, where that was looked at.
    pub loss: Option<Loss>,
    /// Weights that were not zero, and are now.
    pub flushed: u64,
}

impl Spanned {
    /// Adds the span that follows.
    pub fn append(&mut self, next: Self) {
        self.bytes += next.bytes;
        self.tallies.extend(next.tallies);
        self.flushed += next.flushed;
        self.loss = match (self.loss, next.loss) {
            (Some(a), Some(b)) => Some(Loss { lost: a.lost + b.lost, power: a.power + b.power }),
            (a, b) => a.or(b),
        };
    }
}

/// What rows of one expert add to an outcome.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Tally {
    expert: u64,
    /// Mean squares of the output, of what it would have lost, and of what it lost.
    output: f64,
    before: f64,
    after: f64,
    damp: f64,
    damp_grew: bool,
    dead_columns: u64,
}

/// Of so many spans one is looked at for the loss, which takes a third of the time of rounding it.
const SAMPLE: u64 = 4;

impl Tally {
    /// From rows of `expert` from row `first` of the tensor on, and what each cost. `stored` gives their
    /// weights as they are stored, `plainly` as they would be if each were rounded by itself.
    pub fn new(
        (expert, first): (u64, u64),
        prepared: &Prepared,
        weights: &[f32],
        stored: &dyn Fn() -> Result<Vec<f32>>,
        plainly: &dyn Fn() -> Result<Vec<f32>>,
        costs: &[f64],
    ) -> Result<Self> {
        let feedback = prepared.feedback();
        let mut tally = Self {
            expert,
            output: 0.0,
            before: 0.0,
            after: 0.0,
            damp: feedback.damp(),
            damp_grew: feedback.damp_grew(),
            dead_columns: feedback.dead_columns(),
        };
        if !(first / PANEL as u64).is_multiple_of(SAMPLE) {
            return Ok(tally);
        }
        let lose =
            |stored: Vec<f32>| -> Vec<f32> { weights.iter().zip(&stored).map(|(w, y)| w - y).collect() };
        let squares = lose(stored()?).iter().map(|&e| f64::from(e) * f64::from(e)).sum();
        tally.after = feedback.without_damping(costs.iter().sum(), squares);
        tally.before = feedback.output(&lose(plainly()?));
        tally.output = feedback.output(weights);
        Ok(tally)
    }
}

/// The loss from which on little is to be expected of an output: half of its amplitude.
const COLLAPSED: f64 = 0.25;

/// Gathers what workers report, in any order.
#[derive(Debug)]
pub(super) struct Ledger(Vec<Mutex<Vec<Entry>>>);

/// The first element of a span, and what became of it.
type Entry = (u64, Spanned);

impl Ledger {
    pub fn new(plan: &Plan) -> Self {
        Self(plan.tensors.iter().map(|_| Mutex::default()).collect())
    }

    /// What became of a span, from element `start` on, of tensor number `tensor`.
    pub fn enter(&self, tensor: usize, start: u64, spanned: Spanned) {
        let says = !spanned.tallies.is_empty() || spanned.loss.is_some();
        if let Some(entries) = self.0.get(tensor).filter(|_| says) {
            entries.lock().unwrap_or_else(|e| e.into_inner()).push((start, spanned));
        }
    }

    /// The outcome of every tensor of the plan, the same whoever reported when.
    pub fn close(self, plan: &Plan) -> Vec<Outcome> {
        let entries = self.0.into_iter().map(|e| e.into_inner().unwrap_or_else(|e| e.into_inner()));
        plan.tensors.iter().zip(entries).map(|(t, entries)| outcome(t, entries)).collect()
    }
}

fn outcome(t: &TensorPlan, mut entries: Vec<Entry>) -> Outcome {
    entries.sort_by_key(|(start, _)| *start);
    let flushed = entries.iter().map(|(_, spanned)| spanned.flushed).sum();
    let losses: Vec<Loss> = entries.iter().filter_map(|(_, spanned)| spanned.loss).collect();
    let tallies: Vec<Tally> = entries.into_iter().flat_map(|(_, spanned)| spanned.tallies).collect();
    let (lost, power) = losses.iter().fold((0.0, 0.0), |(a, b), l| (a + l.lost, b + l.power));
    let nmse = (!losses.is_empty()).then(|| if lost == 0.0 { 0.0 } else { lost / power });
    let sum = |of: fn(&Tally) -> f64| tallies.iter().map(of).sum::<f64>();
    let (output, before, after) = (sum(|t| t.output), sum(|t| t.before), sum(|t| t.after));
    let dead: BTreeMap<u64, u64> = tallies.iter().map(|t| (t.expert, t.dead_columns)).collect();
    Outcome {
        name: t.name.clone(),
        dtype: t.type_name(),
        nmse,
        method: match &t.moved {
            Some(moved) => moved.method,
            None if t.is_rounded() => t.rounding.name(),
            None => "copy",
        },
        error: (output > 0.0).then(|| OutputError { before: before / output, after: after / output }),
        damp: tallies.iter().map(|t| t.damp).reduce(f64::max),
        damp_grew: tallies.iter().any(|t| t.damp_grew),
        dead_columns: dead.values().sum(),
        flushed,
        fallback: t.fallback.clone(),
    }
}

impl Outcome {
    /// What a user should know of a finished run.
    pub fn notes(outcomes: &[Self]) -> Vec<String> {
        let names = |found: &[&Outcome]| {
            let shown: Vec<_> = found.iter().take(3).map(|o| o.name.as_str()).collect();
            format!("{} ({}{})", found.len(), shown.join(", "), if found.len() > 3 { ", ..." } else { "" })
        };
        let mut notes = Vec::new();
        let grown: Vec<_> = outcomes.iter().filter(|o| o.damp_grew).collect();
        if !grown.is_empty() {
            let most = grown.iter().filter_map(|o| o.damp).fold(0.0, f64::max);
            notes
                .push(format!("tensors whose damping had to grow, to {most:.1e} at most: {}", names(&grown)));
        }
        let dead: Vec<_> = outcomes.iter().filter(|o| o.dead_columns > 0).collect();
        if !dead.is_empty() {
            let columns: u64 = dead.iter().map(|o| o.dead_columns).sum();
            notes.push(format!(
                "tensors with columns, {columns} in all, that the calibration text never reached, and that are \
                 rounded each by itself: {}",
                names(&dead)
            ));
        }
        let flushed: Vec<_> = outcomes.iter().filter(|o| o.flushed > 0).collect();
        if !flushed.is_empty() {
            let n: u64 = flushed.iter().map(|o| o.flushed).sum();
            notes.push(format!("{n} weights are 0 now, being too small for float16: {}", names(&flushed)));
        }
        let lost: Vec<_> =
            outcomes.iter().filter(|o| o.error.is_some_and(|e| e.after >= COLLAPSED)).collect();
        if !lost.is_empty() {
            notes.push(format!(
                "tensors whose outputs lose a quarter of their power or more: {}. The model has probably \
                 collapsed; qconv eval kld tells",
                names(&lost)
            ));
        }
        let ratios: Vec<f64> = outcomes
            .iter()
            .filter_map(|o| o.error)
            .filter(|e| e.before > 0.0 && e.after > 0.0)
            .map(|e| (e.after / e.before).ln())
            .collect();
        if !ratios.is_empty() {
            let mean = (ratios.iter().sum::<f64>() / ratios.len() as f64).exp();
            notes.push(format!(
                "the outputs of {} tensors lose, in the geometric mean, {mean:.3} of what they would if each block \
                 were rounded by itself (mean squares over the calibration text)",
                ratios.len()
            ));
        }
        notes
    }
}
