//! What a conversion may replace: packages, and the files that an earlier one put with them. A directory that holds
//! anything else stays, whatever is said; so do a config and a tokenizer that belong to another model.
//!
//! A package says in its metadata which files were put with it, with their SHA-256. A file that is there already is
//! taken for one of these where it has that sum.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::source::SIDE;
use crate::container::coreml::Package;
use crate::container::coreml::chunks::{CHUNKS, is_divided, packages};
use crate::container::coreml::model::Metadata;
use crate::container::coreml::package::{MANIFEST, MODEL, WEIGHTS, is_package};
use crate::container::side::read_side_file;
use crate::convert::Job;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::sha256::Sha256;

/// The entry of the metadata: names and SHA-256, in JSON.
const BESIDE: &str = "com.qconv.beside";

type Sums = BTreeMap<String, String>;

/// Notes in the metadata which files are put with a package.
pub fn note(metadata: &mut Metadata, side: &[(String, Vec<u8>)]) {
    let sums: Sums = side.iter().map(|(name, bytes)| (name.clone(), sum(bytes))).collect();
    if let Ok(json) = serde_json::to_string(&sums) {
        metadata.user_defined.insert(BESIDE.into(), json);
    }
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses to replace what no such conversion wrote: at the output, and beside it.
///
/// # Errors
/// `Misuse` with the first that stands in the way; `Io`; `Limit`.
pub fn check(job: &Job) -> Result<()> {
    let output = &job.output;
    let own = if output.is_dir() { written(output)? } else { Sums::new() };
    if is_divided(output) {
        for name in SIDE {
            let path = output.join(name);
            let Some(found) = read(&path)? else { continue };
            let planned = job.plan.files.iter().find(|file| file.name == Path::new(name));
            if !is_noted(&own, name, &found) && planned.is_none_or(|file| file.header != found) {
                return Err(foreign(
                    "was not put there by a conversion, or was changed since",
                    &path,
                    output,
                ));
            }
        }
    }
    for (path, bytes) in &job.beside {
        let Some(found) = read(path)?.filter(|found| found != bytes) else { continue };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let why = match (is_noted(&own, &name, &found), another_package(output)?) {
            (true, None) => continue,
            (true, Some(other)) => format!("exists already, and {} may need it", other.display()),
            (false, _) => "exists already, and is not this model's".to_string(),
        };
        return Err(Error::misuse(why)
            .at(path)
            .hint("give the package a directory of its own: -o NAME/NAME.mlpackage"));
    }
    Ok(())
}

fn foreign(why: &str, path: &Path, output: &Path) -> Error {
    let hint = format!("{} would go as a whole: write elsewhere, or move this away", output.display());
    Error::misuse(why).at(path).hint(hint)
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    read_side_file(path, Limits::default().side_file_bytes)
}

/// Whether a file is one that was put there with a package.
fn is_noted(own: &Sums, name: &str, bytes: &[u8]) -> bool {
    own.get(name).is_some_and(|known| *known == sum(bytes))
}

/// What was put with the package at `output`, or with the packages there. All else that is in it is an error.
fn written(output: &Path) -> Result<Sums> {
    let found = if is_package(output) || is_divided(output) {
        packages(output, &Limits::default())?
    } else {
        let first = entries(output)?.into_iter().next();
        return match first {
            None => Ok(Sums::new()),
            Some(_) => Err(Error::misuse("exists already, and is no Core ML package").at(output)),
        };
    };
    let is_known = |name: &str| name == CHUNKS || SIDE.contains(&name);
    for path in if is_package(output) { Vec::new() } else { entries(output)? } {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        if !(found.contains(&path) || is_file && is_known(&name)) {
            return Err(foreign("was not written by such a conversion", &path, output));
        }
    }
    let mut sums = Sums::new();
    for package in found.iter().filter(|package| package.is_dir()) {
        check_package(package, Path::new(""), output)?;
        // Of one that is damaged nothing is known.
        if let Ok(opened) = Package::open(package, &Limits::default()) {
            let noted = opened.model().description.metadata.user_defined.get(BESIDE).cloned();
            sums.extend(noted.and_then(|json| serde_json::from_str::<Sums>(&json).ok()).unwrap_or_default());
        }
    }
    Ok(sums)
}

/// That a package holds a manifest, a model and weights, and nothing else.
fn check_package(package: &Path, inside: &Path, output: &Path) -> Result<()> {
    for path in entries(&package.join(inside))? {
        let meta = fs::symlink_metadata(&path).map_err(|e| Error::io("read", &path, e))?;
        let name = inside.join(path.file_name().unwrap_or_default());
        let known = [MANIFEST, MODEL, WEIGHTS].map(Path::new);
        if meta.is_dir() && known.iter().any(|known| known.starts_with(&name)) {
            check_package(package, &name, output)?;
        } else if !meta.is_file() || !known.contains(&&*name) {
            return Err(foreign("was not written by such a conversion", &path, output));
        }
    }
    Ok(())
}

/// Another package in the same directory; hidden ones are unfinished.
fn another_package(output: &Path) -> Result<Option<PathBuf>> {
    let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_hidden = |path: &PathBuf| path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
    let is_other =
        |path: &PathBuf| path.file_name() != output.file_name() && !is_hidden(path) && is_package(path);
    Ok(entries(parent)?.into_iter().find(is_other))
}

/// What is in a directory, in order.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = |e| Error::io("read", dir, e);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        found.push(dir.join(entry.map_err(read)?.file_name()));
    }
    found.sort();
    Ok(found)
}
