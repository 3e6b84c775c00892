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

/// Whether there is a package at `path`, or a directory of packages, by what is in it. A `chunks.json` that does not
/// list packages is somebody else's.
pub fn is_model(path: &Path) -> bool {
    is_package(path) || matches!(listed(path, &Limits::default()), Ok(Some(_)))
}

/// Whether `path` is a directory of packages, by its `chunks.json`.
pub fn is_divided(path: &Path) -> bool {
    !is_package(path) && is_model(path)
}

/// The packages of a model in the order in which they are called: `path` itself where it is one, or where there is no
/// `chunks.json`.
///
/// # Errors
/// `Io`; `Malformed` for a `chunks.json` that does not list packages, for names that lead elsewhere, or come twice,
/// and where there are none; `Limit`.
pub fn packages(path: &Path, limits: &Limits) -> Result<Vec<PathBuf>> {
    if is_package(path) {
        return Ok(vec![path.to_path_buf()]);
    }
    let Some(chunks) = listed(path, limits)? else { return Ok(vec![path.to_path_buf()]) };
    let mut seen = HashSet::new();
    for Chunk { package } in &chunks.packages {
        let fault = match package.as_str() {
            name if !is_path(name) || name.contains('/') => "is no name of a directory beside it",
            name if !seen.insert(name) => "comes twice",
            _ => continue,
        };
        return Err(Error::malformed(format!("the package {package:?} {fault}")).at(path.join(CHUNKS)));
    }
    match chunks.packages.is_empty() {
        true => Err(Error::malformed("names no packages").at(path.join(CHUNKS))),
        false => Ok(chunks.packages.iter().map(|chunk| path.join(&chunk.package)).collect()),
    }
}

/// What a `chunks.json` in this directory lists.
fn listed(path: &Path, limits: &Limits) -> Result<Option<Chunks>> {
    let file = path.join(CHUNKS);
    match read_side_file(&file, limits.side_file_bytes)? {
        Some(bytes) => from_json(&bytes, &file).map(Some),
        None => Ok(None),
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

    #[test]
    fn files_of_others_are_no_models() {
        let dir = tempfile::tempdir().unwrap();
        let write = |json: &str| fs::write(dir.path().join(CHUNKS), json).unwrap();
        for json in ["[1, 2]", "{", "", r#"{"chunks": []}"#, r#"{"packages": "a"}"#, r#"{"packages": [{}]}"#]
        {
            write(json);
            assert!(!is_model(dir.path()) && !is_divided(dir.path()), "{json}");
            assert_eq!(packages(dir.path(), &Limits::default()).unwrap_err().kind(), ErrorKind::Malformed);
        }
        // One that lists the same twice is ours, and damaged.
        write(r#"{"packages": [{"package": "a"}, {"package": "a"}]}"#);
        assert!(is_divided(dir.path()));
        // What lies in a package says nothing.
        fs::create_dir(dir.path().join("Data")).unwrap();
        fs::write(dir.path().join("Manifest.json"), "{}").unwrap();
        assert!(is_model(dir.path()) && !is_divided(dir.path()));
        assert_eq!(packages(dir.path(), &Limits::default()).unwrap(), [dir.path()]);
    }
}
