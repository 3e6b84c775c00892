//! The scanner: what is wrong or suspicious in files of models, found without their source and without loading them.
//!
//! Headers are read by the readers that conversions use; what they refuse is a finding. What they accept is held to
//! what loaders need and expect. Nothing of a file is executed; templates are rendered in the sandbox of
//! [`crate::eval::chat`]. The rules are in [`RULES`].

mod blocks;
mod checkpoint;
mod contents;
mod finding;
mod gguf;
mod hyper;
mod imatrix;
mod jinja;
pub mod manifest;
mod names;
mod pickle;
mod rules;
pub mod sarif;
mod shape;
mod target;
mod template;
mod vocab;

pub use finding::Finding;
pub use gguf::unloadable;
pub use rules::{RULES, Rule, Severity};
pub use target::{Kind, Target};

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Options as VerifyOptions, Outcome, Report};
use crate::container::Store;
use crate::container::imatrix::ImportanceMatrix;
use crate::container::shards::{shard_name, split_shard_name};
use crate::convert::{Budget, Observer, TokenCheck};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use contents::Wanted;

/// What to look at.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Whether tensors are read, and each block or value judged.
    pub tensors: bool,
    /// Whether files and tensors are summed.
    pub sha256: bool,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// A SHA-256 of a tensor's bytes as they lie in the file.
#[derive(Clone, Debug, Serialize)]
pub struct TensorSum {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// The sum, in hexadecimal.
    pub sha256: String,
}

/// One file that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// What it was read as.
    pub format: &'static str,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Those of its tensors.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorSum>,
}

/// Something that could not be checked.
#[derive(Clone, Debug, Serialize)]
pub struct Unchecked {
    /// Where it is.
    pub path: PathBuf,
    /// Why.
    pub error: String,
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Scan {
    /// All files that were looked at.
    pub files: Vec<File>,
    /// What was found, file by file.
    pub findings: Vec<Finding>,
    /// What could not be checked.
    pub unchecked: Vec<Unchecked>,
}

impl Scan {
    /// How many findings weigh so much.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|f| f.severity == severity).count()
    }

    /// Whether there is something that should keep a file from being loaded; warnings count where `strict`.
    pub fn is_clean(&self, strict: bool) -> bool {
        let least = if strict { Severity::Warning } else { Severity::Error };
        self.findings.iter().all(|f| f.severity < least)
    }

    fn find(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// An error of a reader: a finding, or something that could not be checked.
    ///
    /// # Errors
    /// `Interrupted`.
    fn error(&mut self, error: Error, path: &Path) -> Result<()> {
        if error.kind() == ErrorKind::Interrupted {
            return Err(error);
        }
        match Finding::of_error(&error, path) {
            // A set and each of its files may be looked at.
            Some(new) if self.findings.iter().any(|f| (&f.file, &f.message) == (&new.file, &new.message)) => {
            }
            Some(finding) => self.find(finding),
            None => self.unchecked.push(Unchecked { path: path.to_path_buf(), error: error.to_string() }),
        }
        Ok(())
    }
}

/// Files of a set in which something is wrong that are looked at one by one: each of them may open all others.
const MOST_OF_A_BROKEN_SET: u32 = 16;

/// Looks at `paths`: files, of a set any, and directories.
///
/// # Errors
/// `Io` where a path that was named is not there; `Interrupted`.
pub fn scan(paths: &[PathBuf], options: &Options, budget: &Budget, observer: &dyn Observer) -> Result<Scan> {
    let (targets, unchecked) = target::find(paths)?;
    let mut scan = Scan { unchecked, ..Scan::default() };
    // Of a set each file is met. What was opened with another is done; names alone promise nothing.
    let (mut opened, mut broken) = (HashSet::new(), HashMap::new());
    for target in targets {
        let set = target.set();
        let failures = set.as_ref().and_then(|set| broken.get(set)).copied().unwrap_or(0);
        if failures >= MOST_OF_A_BROKEN_SET || set.is_some() && opened.contains(&target.path) {
            continue;
        }
        let before = (scan.count(Severity::Error), scan.unchecked.len(), scan.files.len());
        one(&mut scan, &target, options, budget, observer)?;
        opened.extend(scan.files.iter().skip(before.2).map(|f| f.path.clone()));
        if let Some(set) =
            set.filter(|_| (scan.count(Severity::Error), scan.unchecked.len()) != (before.0, before.1))
        {
            *broken.entry(set).or_insert(0) += 1;
        }
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
    }
    // Paths may have been given twice, and sets by two of their files; SARIF wants each once.
    let mut seen = HashSet::new();
    scan.files.retain(|f| seen.insert(f.path.clone()));
    // The gravest first, in the order of the files.
    let place: HashMap<PathBuf, usize> =
        scan.files.iter().enumerate().map(|(i, f)| (f.path.clone(), i)).collect();
    scan.findings.sort_by_key(|f| {
        (place.get(&f.file).copied().unwrap_or(usize::MAX), std::cmp::Reverse(f.severity), f.rule.id)
    });
    Ok(scan)
}

/// About how many bytes [`scan`] tells an observer of.
pub fn bytes_to_read(paths: &[PathBuf], options: &Options) -> u64 {
    let (targets, _) = target::find(paths).unwrap_or_default();
    let of_file = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let times = u64::from(options.tensors) + u64::from(options.sha256);
    let bytes: u64 = targets.iter().map(|t| of_file(&t.path)).sum();
    bytes.saturating_mul(times)
}

/// What kind of thing a path is; `None` for a directory that is no model.
///
/// # Errors
/// `Io`.
pub fn kind(path: &Path) -> Result<Option<Kind>> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if meta.is_dir() { Ok(target::kind_of_directory(path)) } else { target::kind_of_file(path).map(Some) }
}

/// A store to be read, and what it is called.
struct Opened {
    store: Store,
    format: &'static str,
}

impl Opened {
    fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.store.files().iter().map(|file| file.path().to_path_buf())
    }
}

fn one(
    scan: &mut Scan,
    target: &Target,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    let path = &target.path;
    let format = target.kind.name();
    // Many files are called so that are none; who names one wants to know.
    if target.kind == Kind::Imatrix && !target.named && ImportanceMatrix::open(path, &options.limits).is_err()
    {
        // A pickle may be called so as well.
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if !target::PICKLES.contains(&ending) {
            return Ok(());
        }
        return match pickle::check(scan, path, &options.limits) {
            Ok(true) => contents::files_alone(scan, path, format, options.sha256, observer),
            Ok(false) => Ok(()),
            Err(e) => scan.error(e, path),
        };
    }
    let one = |opened: Option<Opened>| opened.into_iter().collect::<Vec<_>>();
    let opened = match target.kind {
        Kind::Gguf => gguf::check(scan, path, options).map(one),
        Kind::Safetensors => checkpoint::safetensors(scan, path, options).map(one),
        Kind::Pytorch => checkpoint::pytorch(scan, path, options).map(one),
        Kind::HuggingFace => checkpoint::directory(scan, path, options),
        Kind::Imatrix => imatrix::flat(scan, path, options).map(one),
        Kind::Qpack | Kind::CoreMl => whole(scan, target, options, budget, observer).map(one),
        Kind::Unknown => Err(Error::unsupported("is no file that can be read").at(path)),
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(e) => {
            scan.error(e, path)?;
            Vec::new()
        }
    };
    let wanted = Wanted { tensors: options.tensors, sha256: options.sha256 };
    for Opened { store, format } in &opened {
        if let Err(e) = contents::check(scan, store, format, wanted, budget, observer) {
            scan.error(e, path)?;
        }
    }
    if opened.is_empty() || target.kind == Kind::HuggingFace && path.is_dir() {
        contents::files_alone(scan, path, format, options.sha256, observer)?;
    }
    if opened.is_empty() && target.kind == Kind::Qpack {
        for other in set_of(path, &options.limits) {
            contents::files_alone(scan, &other, format, options.sha256, observer)?;
        }
    }
    Ok(())
}

/// The files of the `.qpack` set that one belongs to, as far as they are there.
fn set_of(path: &Path, limits: &Limits) -> Vec<PathBuf> {
    const ENDING: &str = "qpack";
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Some((stem, _, count)) = split_shard_name(name, ENDING) else { return Vec::new() };
    let all =
        (0..count.min(limits.shards)).map(|no| path.with_file_name(shard_name(stem, no, count, ENDING)));
    all.filter(|path| path.is_file()).collect()
}

/// Files that have checks of their own, each of which that fails is a finding. Without `tensors` they are opened only.
fn whole(
    scan: &mut Scan,
    target: &Target,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Option<Opened>> {
    let (path, limits) = (&target.path, &options.limits);
    if !options.tensors {
        if target.kind == Kind::Qpack {
            crate::container::qpack::Qpack::open(path, limits)?;
        } else {
            for package in crate::container::coreml::chunks::packages(path, limits)? {
                crate::container::coreml::Package::open(package, limits)?;
            }
        }
        return Ok(None);
    }
    let checks = VerifyOptions {
        forward: false,
        tokens: TokenCheck::Skipped,
        limits: limits.clone(),
        ..VerifyOptions::new(path)
    };
    let report = super::verify(&checks, budget, observer)?;
    of_report(scan, &report);
    Ok(None)
}

/// The checks of a report that failed, as findings.
fn of_report(scan: &mut Scan, report: &Report) {
    for check in report.checks.iter().filter(|c| c.outcome == Outcome::Failed) {
        let message = format!("{}: {}", check.name, check.detail);
        scan.find(Finding::new(&rules::PACKAGE, &report.file, message).key(check.name));
    }
}
