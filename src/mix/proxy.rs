//! What rounding a tensor does to its output, estimated from some of its rows.
//!
//! With an error `e` of a row and mean squares `h` of its inputs the output changes by the sum of `h e^2` in
//! the mean square; that over the sum of `h w^2` is the share that is compared. The mean squares come from an
//! importance matrix or from second moments; without either all inputs count alike. (Whole second moments
//! foretell the KLD worse: most of what they add is a shift common to all tokens, to which a model hardly
//! responds.) Rows are rounded as llama.cpp does, also where the conversion will use another method: what
//! that gains is much the same for all types.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use indexmap::IndexMap;

use super::table::Cost;
use crate::block::codec;
use crate::container::Store;
use crate::convert::{Guide, Importance, Job, Observer, Rounding, Scratch, TensorPlan};
use crate::error::{Error, Result};

/// Rows that are looked at, evenly spaced over all experts.
const ROWS: u64 = 48;

/// The costs of all tensors named in `wanted`, by name and type: those of the same tensor in each of
/// `jobs`, which differ in types only.
///
/// # Errors
/// As tensors, importances and moments can be read.
pub fn costs(
    jobs: &[Job],
    wanted: &[String],
    threads: usize,
    observer: &dyn Observer,
) -> Result<IndexMap<String, IndexMap<String, Cost>>> {
    let Some(first) = jobs.first() else { return Ok(IndexMap::new()) };
    let places: BTreeMap<&str, usize> =
        (0..).zip(&first.plan.tensors).map(|(i, t)| (t.name.as_str(), i)).collect();
    let next = AtomicUsize::new(0);
    let found: Mutex<Result<BTreeMap<usize, IndexMap<String, Cost>>>> = Mutex::new(Ok(BTreeMap::new()));
    let work = || {
        while let Some((k, name)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|k| Some((k, wanted.get(k)?)))
        {
            let of_tensor = || {
                if observer.interrupted() {
                    return Err(Error::interrupted());
                }
                let at =
                    *places.get(name.as_str()).ok_or_else(|| Error::misuse(format!("no tensor {name:?}")))?;
                let plans: Vec<&TensorPlan> = jobs.iter().filter_map(|j| j.plan.tensors.get(at)).collect();
                tensor(&plans, &first.store).map_err(|e| e.context(format!("tensor {name:?}")))
            };
            let costs = of_tensor();
            let mut all = found.lock().unwrap_or_else(|e| e.into_inner());
            match (all.as_mut(), costs) {
                (Ok(all), Ok(costs)) => drop(all.insert(k, costs)),
                (Ok(_), Err(e)) => *all = Err(e),
                (Err(_), _) => return,
            }
        }
    };
    crate::work::together(threads, work);
    let found = found.into_inner().unwrap_or_else(|e| e.into_inner())?;
    Ok(wanted.iter().cloned().zip(found.into_values()).collect())
}

/// The costs of one tensor as the types that `plans` have.
fn tensor(plans: &[&TensorPlan], store: &Store) -> Result<IndexMap<String, Cost>> {
    let mut costs = IndexMap::new();
    let Some(first) = plans.first() else { return Ok(costs) };
    let (columns, rows_of_expert) = first.rows();
    let rows = first.source.elements() / columns;
    let looked_at = rows.min(ROWS);
    let mut by_expert: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for i in 0..looked_at {
        let row = (2 * i + 1) * rows / (2 * looked_at);
        by_expert.entry(row / rows_of_expert).or_default().push(row);
    }
    let mut plans: Vec<&TensorPlan> = plans.to_vec();
    plans.dedup_by_key(|p| p.dtype);
    let mut errors = vec![0f64; plans.len()];
    let mut whole = 0f64;
    let mut scratch = Scratch::default();
    let mut row = Vec::new();
    for (expert, rows) in by_expert {
        // Rows as they are, then their errors as each type.
        let mut vectors: Vec<Vec<f32>> = Vec::with_capacity(rows.len() * (plans.len() + 1));
        for at in &rows {
            first.source.unfolded(store, at * columns, (at + 1) * columns, &mut row, &mut scratch)?;
            vectors.push(row.clone());
        }
        for plan in &plans {
            for k in 0..rows.len() {
                vectors.push(rounding_error(plan, expert, &vectors[k])?);
            }
        }
        let known = plans.iter().find_map(|plan| importance(plan, expert).transpose());
        let importance = known.transpose()?;
        let weight = |j: usize| importance.as_ref().map_or(1.0, |d| f64::from(d[j]));
        let square = |v: &Vec<f32>| (0..).zip(v).map(|(j, x)| weight(j) * f64::from(*x).powi(2)).sum::<f64>();
        let squares: Vec<f64> = vectors.iter().map(square).collect();
        let (of_rows, of_errors) = squares.split_at(rows.len());
        whole += of_rows.iter().sum::<f64>();
        for (sum, squares) in errors.iter_mut().zip(of_errors.chunks(rows.len())) {
            *sum += squares.iter().sum::<f64>();
        }
    }
    for (plan, error) in plans.iter().zip(errors) {
        let share = if whole > 0.0 { (error / whole).max(0.0) } else { 0.0 };
        if !share.is_finite() {
            return Err(Error::malformed(format!("its error as {} is no number", plan.dtype))
                .hint("the model, its importance matrix or its second moments are damaged"));
        }
        costs.insert(plan.dtype.to_string(), Cost { bytes: plan.nbytes, error: share });
    }
    Ok(costs)
}

/// The importance of an expert's columns, where the plan knows it.
fn importance(plan: &TensorPlan, expert: u64) -> Result<Option<Vec<f32>>> {
    let importance = match &plan.rounding {
        Rounding::Nearest | Rounding::Even => return Ok(None),
        Rounding::Weighed(importance) => importance.clone(),
        Rounding::Guided(guide) => {
            let Guide { moments, input, readers: None, .. } = &**guide else { return Ok(None) };
            Importance::Diagonal { moments: moments.clone(), input: input.clone() }
        }
    };
    let mut out = vec![0f32; plan.rows().0 as usize];
    importance.read(expert, &mut out)?;
    Ok(Some(out))
}

/// What a row is as the plan's type, less what it is.
fn rounding_error(plan: &TensorPlan, expert: u64, row: &[f32]) -> Result<Vec<f32>> {
    let codec = codec(plan.dtype).filter(|c| c.can_encode());
    let codec = codec.ok_or_else(|| Error::unsupported(format!("type {} cannot be written", plan.dtype)))?;
    let weights = match &plan.rounding {
        Rounding::Nearest => None,
        _ if !codec.heeds_importance() => None,
        _ => Some(importance(plan, expert)?.unwrap_or_else(|| vec![1f32; row.len()])),
    };
    let mut bytes = vec![0u8; plan.dtype.bytes_for(row.len() as u64)? as usize];
    codec.encode(row, row.len(), weights.as_deref(), &mut bytes)?;
    let mut out = vec![0f32; row.len()];
    codec.decode(&bytes, &mut out)?;
    out.iter_mut().zip(row).for_each(|(o, w)| *o -= w);
    Ok(out)
}
