//! That a package computes: finite logits, the same ones for all tokens at once and one by one, and those that the
//! linked llama.cpp computes, see [`beside`].

use super::super::{Options, Outcome, Report};
use super::beside::{self, Case};
use super::is_finding;
use crate::convert::{Budget, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::logits::{Agreement, Matrix, compare};
use crate::exec::{LanguageModel, Rounding, Session};

/// Tokens of the forward pass: more than a function for several takes at once, by so many.
const MORE_TOKENS: usize = 8;
const MOST_TOKENS: usize = 520;
/// How far logits of single tokens may stray from those of many, as root mean square over their spread: products are
/// added in another order.
const STEPS: f64 = 1e-3;

/// Runs it.
pub(super) fn check(
    report: &mut Report,
    options: &Options,
    (bits, window): (f64, Option<u64>),
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(budget.threads).build();
    let pool = pool.map_err(|e| Error::unsupported(format!("threads cannot be started: {e}")))?;
    let found = pool.install(|| forward(options, budget, observer));
    if observer.interrupted() {
        return Err(Error::interrupted());
    }
    let (ids, logits) = match found {
        Ok(Found::Logits(ids, logits, agreement)) => {
            let detail = format!(
                "{} tokens, finite; one by one they differ by {:.2e} of their spread",
                ids.len(),
                agreement.rel_rms
            );
            let passed = agreement.finite && agreement.rel_rms <= STEPS;
            report.add("forward", Ok((if passed { Outcome::Passed } else { Outcome::Failed }, detail)));
            if !passed {
                return Ok(());
            }
            (ids, logits)
        }
        Ok(Found::Unknown(why)) => {
            report.add("forward", Ok((Outcome::Skipped, why)));
            return Ok(());
        }
        Ok(Found::NotFinite(at)) => {
            report.add("forward", Ok((Outcome::Failed, format!("token {at}: logits are NaN or infinite"))));
            return Ok(());
        }
        Err(e) if is_finding(&e) => {
            report.add("forward", Err(e));
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    if options.against.is_some() {
        let case = Case { options, ids: &ids, logits: &logits, bits, window, budget, observer };
        match beside::check(&case) {
            Err(e) if !is_finding(&e) => return Err(e),
            found => report.add("logits", found),
        }
    }
    Ok(())
}

enum Found {
    /// Tokens, logits of all at once, and how those of one by one agree with them.
    Logits(Vec<i32>, Matrix, Agreement),
    /// The interface is not known.
    Unknown(String),
    /// The first row that is not finite.
    NotFinite(usize),
}

fn forward(options: &Options, budget: &Budget, observer: &dyn Observer) -> Result<Found> {
    let mut limits = options.limits.clone();
    if budget.strict {
        limits.executor_bytes = limits.executor_bytes.min(budget.memory);
    }
    let model = match LanguageModel::open(&options.file, &limits) {
        Ok(model) => model,
        Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(Found::Unknown(e.to_string())),
        Err(e) => return Err(e),
    };
    let step = model.step().saturating_add(MORE_TOKENS).min(MOST_TOKENS);
    let n = options.logits.as_ref().map_or(step, |how| how.tokens).clamp(1, model.context().max(1));
    let columns = model.n_vocab();
    // Fixed ids spread over the vocabulary: no tokenizer is needed to tell right from wrong.
    let spread = |i: u64| (i.wrapping_mul(2_654_435_761) % columns.max(1) as u64) as i32;
    let ids: Vec<i32> = (0..n as u64).map(spread).collect();
    let values = Session::new(&model, n, Rounding::F32)?.decode(&ids)?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Ok(Found::NotFinite(at / columns.max(1)));
    }
    let mut session = Session::new(&model, n, Rounding::F32)?;
    let mut steps = Vec::with_capacity(values.len());
    for id in &ids {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        steps.extend(session.decode(std::slice::from_ref(id))?);
    }
    let whole = Matrix { columns, values };
    let agreement = compare(&Matrix { columns, values: steps }, &whole)?;
    Ok(Found::Logits(ids, whole, agreement))
}
