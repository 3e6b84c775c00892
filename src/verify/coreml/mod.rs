//! Checks of Core ML packages, from the outside in: the package, its weight files, its programs, their states, the
//! weights, and what all of it computes. What cannot be looked at because of an earlier fault is left out.

mod beside;
mod blobs;
mod description;
mod forward;
mod groups;
mod order;
mod program;
mod states;
mod tensors;
mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use super::{Options, Outcome, Report};
use crate::container::coreml::chunks::{CHUNKS, packages};
use crate::container::coreml::package::{MANIFEST, WEIGHTS, is_package};
use crate::container::coreml::{Form, Package, chunks, constants};
use crate::convert::to_coreml::Opened;
use crate::convert::{Budget, Observer};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;

/// More tokens than are executed.
const CONTEXT: u64 = 1 << 16;

/// Whether a path is a package, or a directory of packages, a damaged one too.
pub(super) fn is_meant(path: &Path) -> bool {
    let is_called_so = path.extension().is_some_and(|e| e == "mlpackage");
    path.is_dir() && (is_called_so || chunks::is_model(path))
}

/// Runs the checks.
pub(super) fn check(
    report: &mut Report,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    if !options.merge_lora.is_empty() {
        return Err(Error::misuse("adapters are not merged into packages").at(&options.file));
    }
    let Some(packages) = open(report, options)? else { return Ok(()) };
    {
        let mut sums = Vec::with_capacity(packages.len());
        for package in &packages {
            match blobs::check(package) {
                Ok(found) => sums.push(found),
                Err(e) if is_finding(&e) => {
                    report.add("blobs", Err(e));
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        let sum = |of: fn(&blobs::Sums) -> u64| sums.iter().map(of).sum::<u64>();
        let detail = format!(
            "{} blobs, {} bytes, in the places of {} values",
            sum(|s| s.blobs as u64),
            sum(|s| s.bytes),
            sum(|s| s.values as u64)
        );
        report.add("blobs", Ok((Outcome::Passed, detail)));
    }
    let is_sound = programs(report, &packages);
    // What an unsound program would compute says nothing; its weights still do.
    let source = tensors::open(options)?;
    let found = match &source {
        Some(source) => tensors::compare(&packages, source, budget, observer),
        None => tensors::decode(&packages, budget, observer),
    };
    let found = match found {
        Err(e) if !is_finding(&e) => return Err(e),
        other => other,
    };
    let found = found.map(|(checks, outcome, detail)| {
        report.tensors = checks;
        (outcome, detail)
    });
    report.add("tensors", found);
    match tokenizer::check(options, source.as_ref()) {
        Err(e) if !is_finding(&e) => return Err(e),
        found => report.add("tokens", found),
    }
    let window = source.as_ref().and_then(window);
    drop(source);
    if is_sound && options.forward && report.passed() {
        let bits = least_bits(&packages)?;
        forward::check(report, options, (bits, window), budget, observer)?;
    }
    Ok(())
}

/// Least bits of the codes of a matrix.
fn least_bits(packages: &[Arc<Package>]) -> Result<f64> {
    let mut least = 16;
    for package in packages {
        for function in package.model().program.functions.values() {
            let all = constants(package, function)?;
            let matrices = all.iter().filter(|c| c.shape.len() > 1 && !matches!(c.form, Form::Plain(_)));
            let bits = matrices.filter_map(|c| c.stored().first().map(|(codes, _)| codes.data_type.bits()));
            least = bits.fold(least, u32::min);
        }
    }
    Ok(least.into())
}

/// Tokens that the smallest window of a source's layers holds, where that is less than what is executed.
fn window(source: &Opened) -> Option<u64> {
    let decoder = source.model.decoder(CONTEXT).ok()?;
    decoder.windows.into_iter().flatten().min()
}

/// Bytes of the weights, of which an observer is told about.
pub(super) fn bytes(path: &Path, limits: &Limits) -> u64 {
    let weights = |path: std::path::PathBuf| path.join(WEIGHTS).metadata().map_or(0, |meta| meta.len());
    packages(path, limits).map_or(0, |paths| paths.into_iter().map(weights).sum())
}

/// Opens all packages; `None` where one of them cannot be, which the report says.
fn open(report: &mut Report, options: &Options) -> Result<Option<Vec<Arc<Package>>>> {
    let limits = &options.limits;
    let mut opened = Vec::new();
    let paths = match packages(&options.file, limits) {
        Ok(paths) => paths,
        Err(e) if is_finding(&e) => {
            report.add("package", Err(e));
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    for path in paths {
        match Package::open(&path, limits) {
            Ok(package) => opened.push(Arc::new(package)),
            Err(e) if is_finding(&e) || is_missing(&e, &options.file) => {
                let is_of_weights = e.path().is_some_and(|at| at.extension().is_some_and(|e| e == "bin"));
                report.add(if is_of_weights { "blobs" } else { "package" }, Err(e));
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
    }
    if let Some(package) = opened.iter().find(|package| !package.unknown().is_empty()) {
        let detail =
            format!("{}: fields that are not known: {:?}", package.path().display(), package.unknown());
        report.add("package", Ok((Outcome::Failed, detail)));
        return Ok(None);
    }
    match order::check(&options.file, &opened, limits) {
        Err(e) if is_finding(&e) => {
            report.add("package", Err(e));
            return Ok(None);
        }
        ordered => ordered?,
    }
    if let Some(at) = extra(&options.file, &opened)? {
        report.add("package", Ok((Outcome::Failed, format!("{CHUNKS} does not name the package {at:?}"))));
        return Ok(None);
    }
    let functions: usize = opened.iter().map(|p| p.model().program.functions.len()).sum();
    let versions: Vec<i32> = opened.iter().map(|p| p.model().specification_version).collect();
    let detail = format!(
        "{} package{}, specification {}, {functions} function{}",
        opened.len(),
        if opened.len() == 1 { "" } else { "s" },
        versions.iter().max().copied().unwrap_or(0),
        if functions == 1 { "" } else { "s" },
    );
    report.add("package", Ok((Outcome::Passed, detail)));
    Ok(Some(opened))
}

/// A package beside those that are named.
fn extra(path: &Path, named: &[Arc<Package>]) -> Result<Option<String>> {
    if is_package(path) {
        return Ok(None);
    }
    let io = |e| Error::io("read", path, e);
    let mut found: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let at = entry.map_err(io)?.path();
        if at.join(MANIFEST).is_file() && !named.iter().any(|package| package.path() == at) {
            found.extend(at.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    Ok(found.into_iter().min())
}

/// Adds what was found of programs, descriptions and states. Returns whether all is in order.
fn programs(report: &mut Report, packages: &[Arc<Package>]) -> bool {
    let (mut functions, mut operations) = (Vec::new(), 0);
    for package in packages {
        let model = package.model();
        for (name, function) in &model.program.functions {
            match program::check(name, function, model.specification_version) {
                Ok(typed) => {
                    operations += typed.block.operations.len();
                    functions.push((package, typed));
                }
                Err(e) => {
                    let context = format!("function {name:?}");
                    report.add("program", Err(e.context(context).at(package.path())));
                    return false;
                }
            }
        }
        if let Err(e) = description::check(model) {
            report.add("program", Err(e.at(package.path())));
            return false;
        }
    }
    let n = functions.len();
    let detail = format!(
        "{operations} operations in {n} function{}, of the types that they declare, as they are described",
        if n == 1 { "" } else { "s" }
    );
    report.add("program", Ok((Outcome::Passed, detail)));
    let (mut reads, mut writes) = (0, 0);
    for (package, typed) in &functions {
        match states::check(typed) {
            Ok(of_one) => (reads, writes) = (reads + of_one.0, writes + of_one.1),
            Err(e) => {
                let context = format!("function {:?}", typed.name);
                report.add("states", Err(e.context(context).at(package.path())));
                return false;
            }
        }
    }
    report.add("states", Ok((Outcome::Passed, format!("{writes} writes, {reads} reads: none is lost"))));
    true
}

/// Whether an error is about the package, and not about reading it.
fn is_finding(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Limit | ErrorKind::Unsupported | ErrorKind::Check)
}

/// Whether something of a package that is there is not.
fn is_missing(e: &Error, package: &Path) -> bool {
    let at = e.path().filter(|at| at.starts_with(package) && *at != package);
    e.kind() == ErrorKind::Io && at.is_some_and(|at| matches!(at.try_exists(), Ok(false)))
}
