//! What the bytes of an output depend on.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::container::Store;
use crate::convert::plan::{Importance, Plan, Rounding};
use crate::error::{Error, Result};
use crate::sha256::{Sha256, hex};
use crate::sys;

/// What the bytes of a plan's output depend on: the program, the headers, what each tensor is made of and by which
/// method, and the files that all that is read from, by place, length and time of change.
///
/// # Errors
/// `Io` when a source has gone.
pub fn key(plan: &Plan, store: &Store) -> Result<String> {
    let mut hash = Hashing(Sha256::new());
    // What is known of finished spans is known to the report as well.
    let _ = write!(hash, "{} {} {}", env!("CARGO_PKG_VERSION"), plan.measures, plan.exact_only);
    let mut sources = HashSet::new();
    for file in store.files() {
        match file.bytes() {
            Some(bytes) => {
                hash.0.update(file.path().as_os_str().as_encoded_bytes());
                hash.0.update(file.len().to_le_bytes());
                hash.0.update(bytes);
            }
            None => hash.file(file.path())?,
        }
    }
    for file in &plan.files {
        hash.0.update(file.name.as_os_str().as_encoded_bytes());
        hash.0.update(file.len.to_le_bytes());
        hash.0.update(&file.header);
        let _ = write!(hash, "{:?}", file.ending);
    }
    for fold in &plan.folds {
        let (moments, how) = fold.basis();
        let _ = writeln!(hash, "{} {how}", fold.name);
        for file in moments.iter().flat_map(|m| m.files()) {
            if sources.insert(file.path()) {
                hash.file(file.path())?;
            }
        }
    }
    for t in &plan.tensors {
        // Formatting into a hash cannot fail.
        let _ = write!(hash, "{} {} {} {:?}", t.name, t.dtype, t.offset, t.source);
        for file in t.source.added().flat_map(|product| product.store.files()) {
            if sources.insert(file.path()) {
                hash.file(file.path())?;
            }
        }
        if let Some(packing) = &t.packing {
            let _ = write!(hash, " {:?} {} {:?}", packing.layout, packing.expert, packing.parts);
        }
        if let Some(moved) = &t.moved {
            let _ = write!(hash, " {moved:?}");
        }
        let (how, moments) = match &t.rounding {
            Rounding::Nearest => ("nearest".to_string(), None),
            Rounding::Even => ("even".to_string(), None),
            Rounding::Weighed(Importance::Matrix { matrix, entry }) => {
                if sources.insert(matrix.path()) {
                    hash.file(matrix.path())?;
                }
                (format!("weighed by {entry:?}"), None)
            }
            Rounding::Weighed(Importance::Diagonal { moments, input }) => {
                (format!("weighed by {input:?}"), Some(moments))
            }
            Rounding::Guided(guide) => {
                (format!("{:?} by {:?}", guide.method, guide.input), Some(&guide.moments))
            }
        };
        let _ = writeln!(hash, " {how}");
        for file in moments.iter().flat_map(|m| m.files()) {
            if sources.insert(file.path()) {
                hash.file(file.path())?;
            }
        }
    }
    Ok(hex(&hash.0.finalize()))
}

/// A hash that can be written to.
struct Hashing(Sha256);

impl Hashing {
    fn file(&mut self, path: &Path) -> Result<()> {
        let meta = fs::metadata(path).map_err(|e| Error::io("read", path, e))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        self.0.update(path.canonicalize().unwrap_or_default().as_os_str().as_encoded_bytes());
        self.0.update(meta.len().to_le_bytes());
        self.0.update(modified.map_or(0, |t| t.as_nanos()).to_le_bytes());
        self.0.update(sys::changed(&meta).to_le_bytes());
        Ok(())
    }
}

impl std::fmt::Write for Hashing {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.update(text);
        Ok(())
    }
}
