//! Every weight decoded; with a source, each tensor beside it: its values are the nearest that its scales and tables
//! have, and nothing of the source is missing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use half::f16;

use super::super::tensors::{Sums, TensorCheck};
use super::super::{Options, Outcome};
use super::groups::{Groups, most_error};
use crate::arch::{Mapped, Positions};
use crate::container::Store;
use crate::container::coreml::{Constant, Form, Package, constants};
use crate::convert::to_coreml::{Given, Opened};
use crate::convert::{Budget, Observer, Scratch, Source};
use crate::diff::stretches;
use crate::error::{Error, Result};
use crate::mil::identifier;
use crate::packed::coreml::{Constants, Tensor, Weight};
use crate::tensor::DType;
use crate::work::each;

/// Elements decoded at a time.
const SPAN: u64 = 1 << 17;

/// Weights of one name that are compared with each other.
const MOST_OTHERS: usize = 16;

/// What was found: each tensor, how it ended, in words.
pub(super) type Found = (Vec<TensorCheck>, Outcome, String);

/// Decodes everything, and finds it finite.
///
/// # Errors
/// `Malformed` for what cannot be decoded; `Io`; `Interrupted`.
pub(super) fn decode(packages: &[Arc<Package>], budget: &Budget, observer: &dyn Observer) -> Result<Found> {
    let mut weights = Vec::new();
    for package in packages {
        let mut seen: HashMap<String, Vec<Arc<Constant>>> = HashMap::new();
        for (function, body) in &package.model().program.functions {
            let context = |e: Error| e.context(format_args!("function {function:?}")).at(package.path());
            let all = constants(package, body).map_err(context)?;
            let parts: HashSet<&str> =
                all.iter().flat_map(|c| c.parts()).map(|(_, part)| part.name.as_str()).collect();
            let is_weight = |c: &Constant| {
                (!matches!(c.form, Form::Plain(_)) || c.is_in_file()) && !parts.contains(c.name.as_str())
            };
            for constant in all.iter().filter(|c| is_weight(c)) {
                // Functions share weights, but for those that only have the same name.
                let others = seen.entry(constant.name.clone()).or_default();
                if others.len() > MOST_OTHERS || !others.contains(constant) {
                    others.push(Arc::clone(constant));
                    weights.push((package, Arc::clone(constant)));
                }
            }
        }
    }
    let counts = each(
        &weights,
        budget.threads,
        || vec![0.0; SPAN as usize],
        |values, (package, constant)| {
            // Values of what is sparse are looked at with their mask.
            if matches!(constant.form, Form::SparseLut { .. } | Form::SparseBlockwise { .. }) {
                return Ok((0, 0));
            }
            let weight = Weight::new(Arc::clone(package), Arc::clone(constant))?;
            let mut non_finite = 0u64;
            for span in stretches(constant.elements(), SPAN) {
                if observer.interrupted() {
                    return Err(Error::interrupted());
                }
                let values = &mut values[..(span.end - span.start) as usize];
                weight.read(span.start, values)?;
                non_finite += values.iter().filter(|x| !x.is_finite()).count() as u64;
            }
            observer.advance(constant.bytes(), &constant.name);
            Ok((constant.elements(), non_finite))
        },
    )?;
    let bad = weights.iter().zip(&counts).find(|(_, (_, non_finite))| *non_finite > 0);
    if let Some(((_, constant), (_, n))) = bad {
        let detail = format!("weight {:?}: {n} values are NaN or infinite", constant.name);
        return Ok((Vec::new(), Outcome::Failed, detail));
    }
    let n: u64 = counts.iter().map(|(elements, _)| elements).sum();
    let detail = format!("{} weights, {n} values decoded, all finite", weights.len());
    Ok((Vec::new(), Outcome::Passed, detail))
}

/// Compares all tensors with those of a source.
///
/// # Errors
/// As [`decode`]; what keeps the source from being read.
pub(super) fn compare(
    packages: &[Arc<Package>],
    source: &Opened,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Found> {
    let all = of_each(packages)?;
    let generated: HashSet<String> = source.model.arch.generates().collect();
    let (mut wanted, mut used) = (Vec::new(), HashSet::new());
    for mapped in &source.mapped {
        let mut tensors = Vec::new();
        for constants in &all {
            tensors.extend(tensors_of(constants, mapped, source)?);
        }
        if tensors.is_empty() && !generated.contains(&mapped.name) {
            let detail = format!("tensor {:?} of the source is missing", mapped.name);
            return Ok((Vec::new(), Outcome::Failed, detail));
        }
        for (tensor, constants) in tensors {
            if !is_same_shape(tensor.shape(), &mapped.shape) {
                let detail = format!(
                    "tensor {:?} has shape {:?}, its source {:?}",
                    mapped.name,
                    tensor.shape(),
                    mapped.shape
                );
                return Ok((Vec::new(), Outcome::Failed, detail));
            }
            used.extend(constants);
            wanted.push((tensor, mapped));
        }
    }
    let mut differing = all.iter().flat_map(Constants::differing);
    if let Some(differing) = differing.find(|d| used.contains(d.constant.as_str())) {
        let [one, other] = &differing.functions;
        let name = &differing.constant;
        let detail = format!("the functions {one:?} and {other:?} have different weights {name:?}");
        return Ok((Vec::new(), Outcome::Failed, detail));
    }
    let store = &source.store;
    let checks = each(&wanted, budget.threads, State::default, |state, (tensor, mapped)| {
        let one = check(tensor, mapped, store, state, observer);
        one.map_err(|e| e.context(format_args!("tensor {:?}", mapped.name)))
    })?;
    if let Some(fault) = rotations(&all, source)? {
        return Ok((checks.into_iter().map(|one| one.check).collect(), Outcome::Failed, fault));
    }
    let (outcome, detail) = judge(&checks);
    Ok((checks.into_iter().map(|one| one.check).collect(), outcome, detail))
}

/// Graphs shape tensors as they need them: dimensions of size 1 come and go, and a vector may be in several.
fn is_same_shape(found: &[u64], wanted: &[u64]) -> bool {
    let real = |shape: &[u64]| -> Vec<u64> { shape.iter().copied().filter(|n| *n != 1).collect() };
    match wanted {
        [n] => found.iter().try_fold(1u64, |all, n| all.checked_mul(*n)) == Some(*n),
        _ => real(found) == real(wanted),
    }
}

/// The tensors of the package that hold one of the source: itself, and where a head that is the embedding is divided,
/// or stored again, that as well.
fn tensors_of<'c>(
    constants: &'c Constants,
    mapped: &Mapped,
    source: &Opened,
) -> Result<Vec<(Tensor, Vec<&'c str>)>> {
    let name = mapped.name.as_str();
    let has = |name: &str| constants.get(&identifier(name)).is_some();
    let divided = || -> Vec<String> {
        (0..).map(|j| format!("output.{j}.weight")).take_while(|name| has(name)).collect()
    };
    let has_head = source.mapped.iter().any(|m| m.name == HEAD);
    let mut names = vec![vec![name.to_string()]];
    match name {
        HEAD if !has(HEAD) => names = vec![divided()],
        EMBEDDING if !has_head => names.extend([divided(), vec![HEAD.to_string()]]),
        _ => {}
    }
    let context = |e: Error| e.context(format_args!("tensor {name:?}"));
    let mut found = Vec::new();
    for names in names {
        let names: Vec<String> = names.iter().map(|name| identifier(name)).collect();
        found.extend(constants.tensor(&names).map_err(context)?);
    }
    Ok(found)
}

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

#[derive(Default)]
struct State {
    found: Vec<f32>,
    wanted: Vec<f32>,
    nearest: Vec<f32>,
    scratch: Scratch,
}

fn check(
    tensor: &Tensor,
    mapped: &Mapped,
    store: &Store,
    state: &mut State,
    observer: &dyn Observer,
) -> Result<Checked> {
    let from = Source::new(mapped, store)?;
    let (mut sums, mut groups) = (Sums::default(), Groups::default());
    for span in stretches(tensor.elements(), SPAN) {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        let n = (span.end - span.start) as usize;
        state.found.resize(n, 0.0);
        tensor.read(span.start, &mut state.found)?;
        from.values(store, span.start, span.end, &mut state.wanted, &mut state.scratch)?;
        state.nearest.clone_from(&state.wanted);
        let is_told = tensor.nearest(span.start, &mut state.nearest)?;
        sums.add(&state.found, &state.wanted);
        if tensor.is_coded() {
            groups.add(tensor, span.start, &state.found, &state.wanted);
        }
        let largest = state.wanted.iter().fold(0f32, |most, x| most.max(x.abs()));
        let slack = f64::from(largest) * tensor.slack();
        let distance = |x: f32, y: f32| f64::from((x - y).abs());
        let all = state.found.iter().zip(&state.wanted).zip(&state.nearest);
        // Where that is told, a value is at most as far from the source as the nearest one.
        let far = all.filter(|((x, y), best)| distance(**x, **y) > distance(**best, **y) + slack);
        sums.out_of_bound += if is_told { far.count() as u64 } else { 0 };
    }
    observer.advance(tensor.bytes(), &mapped.name);
    let dtype = if tensor.bits() >= 32 { DType::F32 } else { DType::F16 };
    let mut one = sums.finish(&mapped.name, dtype);
    one.encoding = Some(tensor.encoding());
    let most = if tensor.is_coded() { most_error(tensor.bits()) } else { f64::INFINITY };
    Ok(Checked { check: one, lost: groups.lost, most })
}

/// A tensor beside its source.
struct Checked {
    check: TensorCheck,
    /// Groups that are as far from the source as zeros.
    lost: u64,
    /// What its relative error may be.
    most: f64,
}

fn judge(all: &[Checked]) -> (Outcome, String) {
    let encoding = |c: &TensorCheck| c.encoding.clone().unwrap_or_default();
    for Checked { check: bad, lost, most } in all {
        let (name, encoding) = (&bad.name, encoding(bad));
        let fault = if bad.non_finite > 0 {
            format!("tensor {name:?}: {} values are NaN or infinite", bad.non_finite)
        } else if bad.out_of_bound > 0 {
            format!(
                "tensor {name:?} ({encoding}): {} values are not the nearest to the source's that it could hold \
                 (largest error {:.3e})",
                bad.out_of_bound, bad.max_error
            )
        } else if *lost > 0 {
            format!(
                "tensor {name:?} ({encoding}): {lost} of what shares a scale, a table or a factor are as far from \
                 the source as zeros"
            )
        } else if bad.relative_rmse > *most {
            format!(
                "tensor {name:?} ({encoding}) is far from the source: relative error {:.2}, {most} is allowed",
                bad.relative_rmse
            )
        } else {
            continue;
        };
        return (Outcome::Failed, fault);
    }
    let checks = || all.iter().map(|one| &one.check);
    let n: u64 = checks().map(|c| c.elements).sum();
    let worst = checks().max_by(|a, b| a.relative_rmse.total_cmp(&b.relative_rmse));
    let worst = worst.map(|c| {
        format!(
            "; worst {} ({}): relative error {:.2e}, cosine {:.6}",
            c.name,
            encoding(c),
            c.relative_rmse,
            c.cosine
        )
    });
    let detail = format!(
        "{} tensors, {n} weights, each the nearest to the source's that it could be{}",
        all.len(),
        worst.unwrap_or_default()
    );
    (Outcome::Passed, detail)
}

/// The constants of each package.
fn of_each(packages: &[Arc<Package>]) -> Result<Vec<Constants>> {
    packages.iter().map(|package| Constants::of(std::slice::from_ref(package))).collect()
}

/// That tables of rotations are those of the source's definition. Each package of a model has those that it needs.
fn rotations(all: &[Constants], source: &Opened) -> Result<Option<String>> {
    let tables = all.iter().flat_map(Constants::iter).filter(|c| c.name.starts_with("rope_"));
    let Some(context) = tables.filter_map(|c| c.shape.first().copied()).max() else { return Ok(None) };
    let Positions::Rope { tables, .. } = source.model.decoder(context)?.positions else {
        return Ok(Some("it has tables of rotations, which the model has not".into()));
    };
    let rows = usize::try_from(context).map_err(|_| Error::limit("a table beyond the address space"))?;
    for (t, spec) in tables.iter().enumerate() {
        let (cos, sin) = spec.table(rows)?;
        for (name, wanted) in [(format!("rope_cos.{t}"), cos), (format!("rope_sin.{t}"), sin)] {
            let mut is_there = false;
            for constants in all {
                let Some((table, _)) = constants.tensor(&[identifier(&name)])? else { continue };
                is_there = true;
                if table.elements() != wanted.len() as u64 {
                    return Ok(Some(format!("the table {name:?} has shape {:?}", table.shape())));
                }
                let mut found = vec![0.0; wanted.len()];
                table.read(0, &mut found)?;
                let same = |(x, y): (&f32, &f16)| *x == y.to_f32();
                if let Some(at) = found.iter().zip(&wanted).position(|pair| !same(pair)) {
                    return Ok(Some(format!(
                        "the table {name:?} has {} as element {at}, the model's rotations give {}",
                        found[at], wanted[at]
                    )));
                }
            }
            if !is_there {
                return Ok(Some(format!("the table {name:?} is missing")));
            }
        }
    }
    Ok(None)
}

/// Opens a source as packages are made of it.
///
/// # Errors
/// What keeps it from being read.
pub(super) fn open(options: &Options) -> Result<Option<Opened>> {
    let Some(path) = &options.against else { return Ok(None) };
    let given = Given { path, arch: options.arch.as_deref(), arch_file: options.arch_file.as_deref() };
    given.open(&options.limits).map(Some)
}
