//! Two models beside each other: what they say of themselves, their files, and their tensors by name.
//!
//! Values are compared, however they are stored: a matrix of GPTQ beside the same one in a `.qpack` file, an F32
//! beside the BF16 that it was made of. Names are compared as they are.

mod print;
mod tensors;

pub use print::print;
pub(crate) use tensors::stretches;
pub use tensors::{Errors, Kind, TensorDiff, compare};

use std::path::PathBuf;

use indexmap::IndexMap;
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::convert::{Budget, Observer};
use crate::error::Result;
use crate::model::{Model, SideFile};

/// What to compare.
#[derive(Debug, Default)]
pub struct Options {
    /// Tensors whose name matches; all unless given. With it, nothing else is compared.
    pub tensor: Option<Regex>,
    /// No tensors.
    pub metadata_only: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Diff {
    /// The two.
    pub models: [Side; 2],
    /// Whether nothing differs: how tensors are stored does not count.
    pub equal: bool,
    /// Entries of metadata or config.json that differ; those of objects as `object.key`.
    pub metadata: Vec<EntryDiff>,
    /// Other files that differ.
    pub files: Vec<FileDiff>,
    /// How many tensors there are of each kind.
    pub counts: IndexMap<Kind, usize>,
    /// All tensors, in the order of the first model, then those of the second.
    pub tensors: Vec<TensorDiff>,
    /// What was not compared, and why.
    pub notes: Vec<String>,
}

/// A model.
#[derive(Debug, Serialize)]
pub struct Side {
    /// Where it lies.
    pub path: PathBuf,
    /// Its format.
    pub format: &'static str,
}

/// An entry that differs.
#[derive(Debug, Serialize)]
pub struct EntryDiff {
    /// Its key.
    pub key: String,
    /// The values; `null` where it is missing.
    pub values: [Option<Json>; 2],
}

/// A file that differs.
#[derive(Debug, Serialize)]
pub struct FileDiff {
    /// Its name.
    pub name: String,
    /// Lengths; `null` where it is missing.
    pub bytes: [Option<u64>; 2],
}

/// Compares two models.
///
/// # Errors
/// As reads fail; `Malformed` for codes that mean nothing; `Interrupted`.
pub fn diff(
    models: [&Model; 2],
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<Diff> {
    let side = |m: &Model| Side { path: m.path().to_path_buf(), format: m.format() };
    let mut diff = Diff {
        models: models.map(side),
        equal: true,
        metadata: Vec::new(),
        files: Vec::new(),
        counts: IndexMap::new(),
        tensors: Vec::new(),
        notes: models.iter().filter_map(|m| m.note().map(String::from)).collect(),
    };
    if options.tensor.is_none() {
        diff.compare_metadata(models);
        diff.compare_files(models)?;
    }
    if !options.metadata_only {
        let wanted = |name: &str| options.tensor.as_ref().is_none_or(|r| r.is_match(name));
        diff.tensors = compare(models, &wanted, budget.threads, observer)?;
    }
    for t in &diff.tensors {
        *diff.counts.entry(t.kind).or_default() += 1;
    }
    let same_tensors = diff.tensors.iter().all(|t| t.kind.is_equal());
    diff.equal = same_tensors && diff.metadata.is_empty() && diff.files.is_empty();
    Ok(diff)
}

impl Diff {
    fn compare_metadata(&mut self, models: [&Model; 2]) {
        let [a, b] = models;
        if a.metadata_kind() != b.metadata_kind() {
            let kinds = (a.metadata_kind(), b.metadata_kind());
            self.notes.push(format!("{} and {} have other keys, and were not compared", kinds.0, kinds.1));
            return;
        }
        let [old, mut new] = models.map(|m| {
            let mut entries = IndexMap::new();
            flatten("", m.metadata(), &mut entries);
            entries
        });
        for (key, value) in old {
            let other = new.shift_remove(&key);
            if other != Some(value) {
                self.metadata.push(EntryDiff { key, values: [Some(value.clone()), other.cloned()] });
            }
        }
        let added =
            new.into_iter().map(|(key, value)| EntryDiff { key, values: [None, Some(value.clone())] });
        self.metadata.extend(added);
    }

    /// Those of models that have such.
    fn compare_files(&mut self, models: [&Model; 2]) -> Result<()> {
        let [a, b] = models.map(Model::side_files);
        if a.is_empty() || b.is_empty() {
            if let Some(files) = [a, b].iter().find(|files| !files.is_empty()) {
                self.notes.push(format!("one of the two has no other files; the other's {}", files.len()));
            }
            return Ok(());
        }
        let find = |files: &'_ [SideFile], name: &str| files.iter().find(|f| f.name == name).cloned();
        for file in a {
            let other = find(b, &file.name);
            let same = match &other {
                Some(other) => file.bytes == other.bytes && file.sha256()? == other.sha256()?,
                None => false,
            };
            if !same {
                let bytes = [Some(file.bytes), other.map(|o| o.bytes)];
                self.files.push(FileDiff { name: file.name.clone(), bytes });
            }
        }
        for file in b.iter().filter(|f| find(a, &f.name).is_none()) {
            self.files.push(FileDiff { name: file.name.clone(), bytes: [None, Some(file.bytes)] });
        }
        Ok(())
    }
}

/// Entries of objects by `object.key`.
fn flatten<'a>(prefix: &str, map: &'a Map<String, Json>, out: &mut IndexMap<String, &'a Json>) {
    for (key, value) in map {
        let key = format!("{prefix}{key}");
        match value {
            Json::Object(inner) if !inner.is_empty() => flatten(&format!("{key}."), inner, out),
            _ => {
                out.insert(key, value);
            }
        }
    }
}
