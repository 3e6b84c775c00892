//! Models in several packages: a directory of them, with `chunks.json`, which names them in the order in which they
//! are called.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::package::is_package;
use crate::container::qpack::is_path;
use crate::container::side::{from_json, read_side_file};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// The file that names the packages of a model in several.
pub const CHUNKS: &str = "chunks.json";

#[derive(Deserialize)]
struct Chunks {
    packages: Vec<Chunk>,
}

#[derive(Deserialize)]
struct Chunk {
    /// A directory beside the file.
    package: String,
}

/// Whether there is a package at `path`, or a directory of packages, by what is in it.
pub fn is_model(path: &Path) -> bool {
    is_package(path) || path.join(CHUNKS).is_file()
}

/// The packages of a model in the order in which they are called: `path` itself where it is one.
///
/// # Errors
/// `Io`; `Malformed` for names that lead elsewhere, or come twice, and where there are none; `Unsupported` for what is
/// no model of packages; `Limit`.
pub fn packages(path: &Path, limits: &Limits) -> Result<Vec<PathBuf>> {
    let file = path.join(CHUNKS);
    let Some(bytes) = read_side_file(&file, limits.side_file_bytes)? else {
        return Ok(vec![path.to_path_buf()]);
    };
    let chunks: Chunks = from_json(&bytes, &file)?;
    let mut seen = HashSet::new();
    for Chunk { package } in &chunks.packages {
        let fault = match package.as_str() {
            name if !is_path(name) || name.contains('/') => "is no name of a directory beside it",
            name if !seen.insert(name) => "comes twice",
            _ => continue,
        };
        return Err(Error::malformed(format!("the package {package:?} {fault}")).at(&file));
    }
    match chunks.packages.is_empty() {
        true => Err(Error::malformed("names no packages").at(&file)),
        false => Ok(chunks.packages.iter().map(|chunk| path.join(&chunk.package)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::fs;

    #[test]
    fn packages_are_beside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits::default();
        assert!(!is_model(dir.path()));
        assert_eq!(packages(dir.path(), &limits).unwrap(), [dir.path()]);
        let write = |json: &str| fs::write(dir.path().join(CHUNKS), json).unwrap();
        write(
            r#"{"context": 64, "packages": [{"package": "b.mlpackage", "layers": null}, {"package": "a"}]}"#,
        );
        assert!(is_model(dir.path()));
        let found = packages(dir.path(), &limits).unwrap();
        assert_eq!(found, [dir.path().join("b.mlpackage"), dir.path().join("a")]);
        for (json, words) in [
            (r#"{"packages": []}"#, "names no packages"),
            (r#"{"packages": [{"package": "../a"}]}"#, "is no name"),
            (r#"{"packages": [{"package": "/a"}]}"#, "is no name"),
            (r#"{"packages": [{"package": "a/b"}]}"#, "is no name"),
            (r#"{"packages": [{"package": ""}]}"#, "is no name"),
            (r#"{"packages": [{"package": "a"}, {"package": "a"}]}"#, "\"a\" comes twice"),
            (r#"{"packages": [{}]}"#, "package"),
        ] {
            write(json);
            let e = packages(dir.path(), &limits).unwrap_err();
            assert!(e.kind() == ErrorKind::Malformed && e.to_string().contains(words), "{json}: {e}");
            assert!(e.path().is_some());
        }
    }
}
