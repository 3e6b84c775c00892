//! Importance matrices of llama.cpp, in GGUF or flat.

use std::path::Path;

use super::finding::Finding;
use super::rules::IMPORTANCE;
use super::{Opened, Options, Scan};
use crate::container::Store;
use crate::container::imatrix::ImportanceMatrix;
use crate::error::{Error, Result};

/// Whether tensors are those of an importance matrix, and no others.
pub(super) fn is_one(store: &Store) -> bool {
    let of_one = |name: &str| name.ends_with(".in_sum2") || name.ends_with(".counts");
    !store.tensors().is_empty() && store.tensors().iter().all(|t| of_one(&t.name))
}

/// Checks one in GGUF, whose structure was checked.
pub(super) fn of_gguf(scan: &mut Scan, path: &Path, options: &Options) -> Result<()> {
    let matrix = ImportanceMatrix::open(path, &options.limits)?;
    if options.tensors { values(scan, &matrix) } else { Ok(()) }
}

/// Checks a flat one. It begins with no mark: what does not fit is of an unknown kind.
pub(super) fn flat(scan: &mut Scan, path: &Path, options: &Options) -> Result<Option<Opened>> {
    let matrix = ImportanceMatrix::open(path, &options.limits).map_err(|e| {
        let why = e.to_string();
        if path.extension().is_some_and(|e| e == "dat") { e } else { Error::unsupported(why) }
    })?;
    if options.tensors {
        values(scan, &matrix)?;
    }
    Ok(None)
}

fn values(scan: &mut Scan, matrix: &ImportanceMatrix) -> Result<()> {
    for (name, entry) in &matrix.entries {
        let found = matrix.examine(entry)?;
        if found.not_finite > 0 || found.negative > 0 {
            let message = format!(
                "importances of {name:?}: {} are not finite, {} negative, of {}",
                found.not_finite, found.negative, found.values
            );
            scan.find(Finding::new(&IMPORTANCE, matrix.path(), message).tensor(name));
        }
    }
    Ok(())
}
