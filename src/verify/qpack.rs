//! Checks of `.qpack` files: what is there is what the manifest says, and means something.

use std::path::Path;

use super::{Check, Options, Outcome, Report};
use crate::container::gguf::Gguf;
use crate::container::qpack::{Encoding, Origin, Qpack, Where, is_qpack};
use crate::container::side::from_json;
use crate::container::{InputFile, Store};
use crate::convert::{Budget, Observer};
use crate::diff::{Kind, TensorDiff, compare, stretches};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::model::{Model, Tensor};
use crate::packed::qpack::{KNOWN_LAYOUTS, restore};
use crate::work::each;

/// Files that tell what tensors mean.
const TELLING: [&str; 2] = ["config.json", "metadata.gguf"];
/// Elements that are decoded at a time.
const SPAN: u64 = 1 << 18;

/// Whether a file begins or ends as a `.qpack` file: one of the two may be damaged.
pub(super) fn is_meant(path: &Path) -> Result<bool> {
    let file = InputFile::open(path)?;
    let mut tail = [0; 8];
    if file.len() >= 8 {
        file.read_at(file.len() - 8, &mut tail)?;
    }
    Ok(is_qpack(&file)? || crate::container::qpack::is_magic(&tail))
}

/// Runs the checks, of which later ones are left out where the file cannot be opened.
pub(super) fn check(
    report: &mut Report,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    if options.logits.is_some() || !options.merge_lora.is_empty() || options.arch_file.is_some() {
        return Err(Error::misuse("logits, adapters and architectures are of GGUF files")
            .at(&options.file)
            .hint("--against compares a .qpack file with its source, tensor by tensor"));
    }
    let limits = &options.limits;
    let file = match Qpack::open(&options.file, limits) {
        Ok(file) => file,
        Err(e) if is_finding(&e) => {
            report.add("structure", Err(e));
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let (mut segments, mut bytes) = (0, 0);
    for segment in file.manifests().flat_map(|(_, m)| m.segments()) {
        (segments, bytes) = (segments + 1, bytes + segment.bytes);
    }
    let (tensors, files) = (file.tensors().count(), file.files().len());
    let signed = file.seals().filter(|(_, signature)| *signature > 0).count();
    let shards = file.manifests().count();
    let detail = format!(
        "{shards} files, {tensors} tensors, {files} other files{}",
        if signed > 0 { ", signed (by whom is not checked)" } else { "" }
    );
    report.add("structure", Ok((Outcome::Passed, detail)));

    let damaged = integrity(report, &file, (segments, bytes), budget, observer)?;
    let of_files = side_files(&file, &damaged, limits);
    add_all(report, "other files", of_files, || format!("{files} read"));
    // AWQ takes scales out of matrices, and puts them into what comes before.
    let method = file.manifests().next().and_then(|(_, m)| m.provenance.get("method")?.as_str());
    let is_folded = method.is_some_and(|name| name.contains("awq"));
    drop(file);

    if let Some(name) = damaged.iter().find(|n| TELLING.contains(&n.as_str())) {
        let detail = format!("{name} is damaged, which tells what tensors mean: nothing more was looked at");
        report.add("encodings", Ok((Outcome::Skipped, detail)));
        return Ok(());
    }
    match Model::open(&options.file, limits) {
        Ok(model) => {
            encodings(report, &model, budget, observer)?;
            origins(report, &model, budget, observer)?;
            if let Some(source) = &options.against {
                against(report, (&model, is_folded), source, limits, budget, observer)?;
            }
        }
        Err(e) if is_finding(&e) => report.add("encodings", Err(e)),
        Err(e) => return Err(e),
    }
    Ok(())
}

/// Whether an error is about the file, and not about reading it.
fn is_finding(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Limit | ErrorKind::Unsupported)
}

/// A failed check for each fault; where there are none, one that passed.
fn add_all(report: &mut Report, name: &'static str, faults: Vec<String>, passed: impl FnOnce() -> String) {
    if faults.is_empty() {
        report.add(name, Ok((Outcome::Passed, passed())));
    }
    report.checks.extend(faults.into_iter().map(|detail| Check { name, outcome: Outcome::Failed, detail }));
}

/// Returns the names of other files that are damaged.
fn integrity(
    report: &mut Report,
    file: &Qpack,
    (segments, bytes): (u64, u64),
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Vec<String>> {
    let seen = |bytes: u64| {
        observer.advance(bytes, "SHA-256");
        !observer.interrupted()
    };
    let faults = file.verify(budget.threads, &seen)?;
    let of_file = |part: &Where| match part {
        Where::File(name) => Some(name.clone()),
        _ => None,
    };
    let files = faults.iter().filter_map(|fault| of_file(&fault.part)).collect();
    let is_set = file.manifests().count() > 1;
    let told = faults.into_iter().map(|fault| match is_set {
        true => format!("{}: {} is damaged", fault.path.display(), fault.part),
        false => format!("{} is damaged", fault.part),
    });
    add_all(report, "integrity", told.collect(), || {
        format!("SHA-256 of {segments} segments, {bytes} bytes, and zeros between them")
    });
    Ok(files)
}

/// That JSON is JSON, and metadata.gguf a GGUF file. What is `damaged` was said before.
fn side_files(file: &Qpack, damaged: &[String], limits: &Limits) -> Vec<String> {
    let checked = |read: Result<(String, Vec<u8>)>| {
        let (name, bytes) = read?;
        match &*name {
            "metadata.gguf" => Gguf::metadata_of_bytes(name, bytes, limits).map(drop),
            _ if name.ends_with(".json") => {
                from_json::<serde_json::Value>(&bytes, Path::new(&name)).map(drop)
            }
            _ => Ok(()),
        }
    };
    match file.read_files(|f| !damaged.contains(&f.name), limits) {
        Ok(files) => files.filter_map(|read| checked(read).err()).map(|e| e.to_string()).collect(),
        Err(e) => vec![e.to_string()],
    }
}

/// What a stretch of values holds.
#[derive(Default)]
struct Found {
    non_finite: u64,
    error: Option<String>,
}

/// Decodes everything.
fn encodings(report: &mut Report, model: &Model, budget: &Budget, observer: &dyn Observer) -> Result<()> {
    let tensors: Vec<Tensor<'_>> = model.tensors().filter(Tensor::is_readable).collect();
    let spans = |(k, t): (usize, &Tensor<'_>)| stretches(t.elements(), SPAN).map(move |s| (k, s));
    let items: Vec<_> = tensors.iter().enumerate().flat_map(spans).collect();
    let found = each(&items, budget.threads, Vec::new, |values: &mut Vec<f32>, (k, span)| {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        values.resize((span.end - span.start) as usize, 0.0);
        let share = u128::from(tensors[*k].stored_bytes()) * u128::from(span.end - span.start);
        observer.advance((share / u128::from(tensors[*k].elements())) as u64, tensors[*k].name());
        match tensors[*k].elements_at(span.start, values) {
            Ok(()) => {
                let non_finite = values.iter().filter(|v| !v.is_finite()).count() as u64;
                Ok(Found { non_finite, error: None })
            }
            Err(e) if is_finding(&e) => Ok(Found { non_finite: 0, error: Some(e.to_string()) }),
            Err(e) => Err(e),
        }
    })?;
    let mut whole: Vec<Found> = tensors.iter().map(|_| Found::default()).collect();
    for ((k, _), found) in items.iter().zip(found) {
        whole[*k].non_finite += found.non_finite;
        whole[*k].error = whole[*k].error.take().or(found.error);
    }
    let (mut faults, mut notes) = (Vec::new(), Vec::new());
    for (tensor, found) in tensors.iter().zip(whole) {
        let is_plain = tensor.manifest().is_none_or(|t| matches!(t.encoding, Encoding::Plain(_)));
        let name = tensor.name();
        match (found.error, found.non_finite) {
            (Some(e), _) => faults.push(e),
            (None, 0) => {}
            (None, n) if is_plain => {
                notes.push(format!("; tensor {name:?} has {n} that are NaN or infinite"))
            }
            (None, n) => faults.push(format!("tensor {name:?}: {n} values are NaN or infinite")),
        }
    }
    let elements: u64 = tensors.iter().map(Tensor::elements).sum();
    let unread = model.tensors().len() - tensors.len();
    let n = tensors.len();
    add_all(report, "encodings", faults, || {
        let bytes = if unread > 0 { format!("; {unread} tensors hold no weights") } else { String::new() };
        format!("{n} tensors, {elements} weights decoded{bytes}{}", notes.concat())
    });
    for (name, kind) in model.unread() {
        let detail = format!("tensor {name:?}: {kind} is not known to this version, and was not decoded");
        report.checks.push(Check { name: "encodings", outcome: Outcome::Skipped, detail });
    }
    Ok(())
}

/// Restores what tensors were made of, and throws it away.
fn origins(report: &mut Report, model: &Model, budget: &Budget, observer: &dyn Observer) -> Result<()> {
    let made: Vec<_> = model.manifest().filter(|t| t.origin.is_some()).collect();
    if made.is_empty() {
        return Ok(());
    }
    let found = each(
        &made,
        budget.threads,
        || (),
        |(), tensor| {
            if observer.interrupted() {
                return Err(Error::interrupted());
            }
            match restored(model.store(), tensor) {
                Ok(skipped) => Ok((skipped, None)),
                Err(e) if is_finding(&e) => Ok((None, Some(e.to_string()))),
                Err(e) => Err(e),
            }
        },
    )?;
    let (skipped, faults): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    add_all(report, "origins", faults.into_iter().flatten().collect(), || {
        format!("{} tensors become again those that they were made of", made.len())
    });
    let skipped = skipped.into_iter().flatten();
    let check = |detail| Check { name: "origins", outcome: Outcome::Skipped, detail };
    report.checks.extend(skipped.map(check));
    Ok(())
}

/// `Some` says why it cannot be tried.
fn restored(store: &Store, tensor: &crate::container::qpack::Tensor) -> Result<Option<String>> {
    let Some(origin) = Origin::of(tensor)? else { return Ok(None) };
    if tensor.is_closed() || matches!(tensor.encoding, Encoding::Unknown(_)) {
        return Ok(None);
    }
    if !KNOWN_LAYOUTS.contains(&origin.layout.as_str()) {
        let layout = &origin.layout;
        return Ok(Some(format!("tensor {:?}: layout {layout:?} is not known to this version", tensor.name)));
    }
    restore(store, tensor, &origin, &mut |_, _, _| Ok(()))?;
    Ok(None)
}

/// Compares all values with the source's. What is stored as it was has to be the same; what was rounded may differ,
/// but not be farther away than zeros would be.
fn against(
    report: &mut Report,
    (model, is_folded): (&Model, bool),
    source: &Path,
    limits: &Limits,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    let source = Model::open(source, limits)?;
    let found = match compare([&source, model], &|_| true, budget.threads, observer) {
        Ok(found) => found,
        Err(e) if is_finding(&e) => {
            report.add("source", Err(e));
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    let faults: Vec<String> = found.iter().filter_map(|t| fault((model, is_folded), &source, t)).collect();
    let exact = found.iter().filter(|t| t.kind.is_equal()).count();
    let worst =
        found.iter().filter_map(|t| Some((t, t.errors?))).max_by(|(_, a), (_, b)| a.nmse.total_cmp(&b.nmse));
    let worst = worst.map(|(t, e)| {
        format!(
            ", {} rounded; worst {}: NMSE {:.2e}, largest error {:.3e}",
            found.len() - exact,
            t.name,
            e.nmse,
            e.max
        )
    });
    add_all(report, "source", faults, || {
        format!("{exact} tensors equal to those of the source{}", worst.unwrap_or_default())
    });
    report.compared = found;
    Ok(())
}

fn fault((model, is_folded): (&Model, bool), source: &Model, t: &TensorDiff) -> Option<String> {
    let name = &t.name;
    let shape = |k: usize| t.shapes[k].as_deref().unwrap_or_default();
    match t.kind {
        Kind::SameBytes | Kind::SameValues => None,
        Kind::OnlyFirst => Some(format!("tensor {name:?} of the source is missing")),
        Kind::OnlySecond => Some(format!("tensor {name:?} is not in the source")),
        Kind::OtherShape => {
            Some(format!("tensor {name:?} has shape {:?}, its source {:?}", shape(1), shape(0)))
        }
        Kind::OtherBytes => Some(format!("tensor {name:?} has other bytes than its source")),
        Kind::OtherValues => {
            let errors = t.errors.unwrap_or_default();
            let same_type = model.get(name)?.dtype() == source.get(name)?.dtype();
            let manifest = model.get(name)?.manifest()?;
            let is_copy = same_type && !is_folded && matches!(manifest.encoding, Encoding::Plain(_));
            let is_bad = is_copy || manifest.origin.is_some() || errors.nmse > 1.0 || errors.non_finite > 0;
            is_bad.then(|| {
                format!(
                    "tensor {name:?}: {} values are not those of the source: largest error {:.3e}, NMSE {:.3e}{}",
                    errors.differing,
                    errors.max,
                    errors.nmse,
                    if errors.non_finite > 0 { ", some NaN or infinite" } else { "" }
                )
            })
        }
    }
}
