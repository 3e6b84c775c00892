//! That a package computes: finite logits, the same ones for all tokens at once and one by one, and, where the linked
//! llama.cpp can run the source, those.

use super::super::{Options, Outcome, Report};
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
    bits: f64,
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
        match beside_source(&ids, &logits, options, bits, budget, observer) {
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
    let n = (model.step() + MORE_TOKENS).min(MOST_TOKENS).min(model.context());
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

#[cfg(not(feature = "ggml"))]
fn beside_source(
    _: &[i32],
    _: &Matrix,
    _: &Options,
    _: f64,
    _: &Budget,
    _: &dyn Observer,
) -> Result<(Outcome, String)> {
    Ok((Outcome::Skipped, "logits beside the source's need a build with the feature ggml".into()))
}

/// The logits of the source, by llama.cpp.
#[cfg(feature = "ggml")]
fn beside_source(
    ids: &[i32],
    found: &Matrix,
    options: &Options,
    bits: f64,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<(Outcome, String)> {
    use super::super::SourceModel;
    use super::super::engine::{FORWARD_SOURCE, TempFile, allowed, conversion};
    use crate::eval::logits;

    let source = match &options.against {
        Some(path) => SourceModel::open(path, options, false)?,
        None => return Ok((Outcome::Skipped, "there is no source".into())),
    };
    let scratch = TempFile::beside(&options.file);
    let path = match (conversion(Some(&source), options, None, &scratch.0)?, &options.against) {
        (Some(job), _) if job.plan.total_len() > FORWARD_SOURCE => {
            return Ok((Outcome::Skipped, "the source is too large to run beside it".into()));
        }
        (Some(job), _) => {
            job.run(true, budget, observer)?;
            job.output
        }
        (None, Some(path)) => path.clone(),
        (None, None) => return Ok((Outcome::Skipped, "the source has no file".into())),
    };
    let wanted = match logits::forward(&path, ids, budget.threads as u32) {
        Ok(wanted) => wanted,
        Err(e) if e.kind() == ErrorKind::Unsupported => return Ok((Outcome::Skipped, e.to_string())),
        Err(e) => return Err(e),
    };
    let agreement = compare(found, &wanted)?;
    let detail = format!(
        "{} tokens: they differ from those of the source by llama.cpp by {:.2e} of their spread, same largest at {} of {}",
        ids.len(),
        agreement.rel_rms,
        agreement.argmax_agree,
        agreement.rows
    );
    let passed = agreement.finite && allowed(bits).is_none_or(|most| agreement.rel_rms <= most);
    Ok((if passed { Outcome::Passed } else { Outcome::Failed }, detail))
}
