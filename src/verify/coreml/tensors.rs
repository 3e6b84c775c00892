//! Every weight decoded; with a source, each tensor beside it: its values are the nearest that its scales and tables
//! have, and nothing of the source is missing.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use half::f16;

use super::super::tensors::{Sums, TensorCheck};
use super::super::{Options, Outcome};
use super::groups::{Groups, most_error};
use crate::arch::{Mapped, Positions};
use crate::container::Store;
use crate::container::coreml::{Constant, DataType, Form, Package, Place, constants};
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

/// Most elements that all weights of a package decode to, of one of any size, and for each of its bytes: what is stored
/// once may be named a million times. Vectors of a table take 512 for a byte, all that is known 32 and less.
const SOME_ELEMENTS: u64 = 1 << 26;
const ELEMENTS_PER_BYTE: u64 = 512;

/// What was found: each tensor, how it ended, in words.
pub(super) type Found = (Vec<TensorCheck>, Outcome, String);

/// Decodes everything, and finds it finite.
///
/// # Errors
/// `Malformed` for what cannot be decoded; `Io`; `Interrupted`.
pub(super) fn decode(packages: &[Arc<Package>], budget: &Budget, observer: &dyn Observer) -> Result<Found> {
    let mut all = Vec::new();
    for package in packages {
        for (function, body) in &package.model().program.functions {
            let context = |e: Error| e.context(format_args!("function {function:?}")).at(package.path());
            all.push((package, constants(package, body).map_err(context)?));
        }
    }
    let weights = once(&all)?;
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

/// The weights among constants, each content once: functions share them, and names are of no matter.
fn once(all: &[(&Arc<Package>, Vec<Arc<Constant>>)]) -> Result<Vec<(Arc<Package>, Arc<Constant>)>> {
    let (mut weights, mut seen, mut elements) = (Vec::new(), HashSet::new(), HashMap::<&Path, u64>::new());
    for (package, constants) in all {
        let parts: HashSet<&str> =
            constants.iter().flat_map(|c| c.parts()).map(|(_, part)| part.name.as_str()).collect();
        let is_weight = |c: &Constant| {
            (!matches!(c.form, Form::Plain(_)) || c.is_in_file()) && !parts.contains(c.name.as_str())
        };
        for constant in constants.iter().filter(|c| is_weight(c)) {
            let mut content = Vec::new();
            describe(constant, &mut content);
            if !seen.insert((package.path(), content)) {
                continue;
            }
            let sum = elements.entry(package.path()).or_default();
            *sum = sum.saturating_add(constant.elements());
            let most = package.bytes().saturating_mul(ELEMENTS_PER_BYTE).saturating_add(SOME_ELEMENTS);
            if *sum > most {
                return Err(Error::limit(format!(
                    "its weights, each decoded once, are more than {most} elements, for {} bytes",
                    package.bytes()
                ))
                .hint(format!(
                    "the most is {SOME_ELEMENTS} elements, and {ELEMENTS_PER_BYTE} for each byte of the package"
                ))
                .at(package.path()));
            }
            weights.push((Arc::clone(package), Arc::clone(constant)));
        }
    }
    Ok(weights)
}

/// What the elements of a constant depend on: not its name.
#[derive(PartialEq, Eq, Hash)]
enum Content<'a> {
    Form(std::mem::Discriminant<Form>, DataType, &'a [u64], Option<usize>),
    Elements(DataType, u64),
    File(&'a str, u64),
    Bytes(&'a [u8]),
}

fn describe<'a>(constant: &'a Constant, content: &mut Vec<Content<'a>>) {
    if let Form::Plain(place) = &constant.form {
        content.push(Content::Elements(constant.data_type, constant.elements()));
        content.push(match place {
            Place::File(name, blob) => Content::File(name, blob.record),
            Place::Immediate(bytes) => Content::Bytes(bytes),
        });
        return;
    }
    let axis = match &constant.form {
        Form::Lut { vector_axis, .. } => *vector_axis,
        _ => None,
    };
    let form = std::mem::discriminant(&constant.form);
    content.push(Content::Form(form, constant.data_type, &constant.shape, axis));
    for (parameter, part) in constant.parts() {
        content.push(Content::Bytes(parameter.as_bytes()));
        // Blocks are those of its shape.
        content.push(Content::Form(std::mem::discriminant(&part.form), part.data_type, &part.shape, None));
        describe(part, content);
    }
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
        let (names, n) = ([format!("rope_cos.{t}"), format!("rope_sin.{t}")], spec.elements(rows)? as u64);
        // Before any is made: what a shape asks for is no more than what is there.
        for name in &names {
            let mut is_there = false;
            for constants in all {
                let Some(table) = constants.get(&identifier(name)) else { continue };
                is_there = true;
                if table.elements() != n {
                    return Ok(Some(format!("the table {name:?} has shape {:?}", table.shape)));
                }
            }
            if !is_there {
                return Ok(Some(format!("the table {name:?} is missing")));
            }
        }
        let (cos, sin) = spec.table(rows)?;
        for (name, wanted) in names.iter().zip([cos, sin]) {
            for constants in all {
                let Some((table, _)) = constants.tensor(&[identifier(name)])? else { continue };
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
