//! Lists of hashes: what files and tensors were, to be held against what they are.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Component, Path};

use serde::de::MapAccess;
use serde::{Deserialize, Serialize};

use super::finding::Finding;
use super::rules::{HASH_OF_FILE, HASH_OF_TENSOR, MANIFEST, NOT_LISTED, NOT_THERE};
use super::{Scan, TensorSum};
use crate::container::side::read_side_file;
use crate::container::unique::{Entry, Unique};
use crate::error::{Error, Result};

/// The version that is written and read.
const VERSION: u64 = 1;
/// Longest manifest, in bytes.
const MAX_BYTES: u64 = 256 << 20;

#[derive(Serialize)]
struct Written<'a> {
    qconv_manifest: u64,
    files: BTreeMap<String, OfFile<'a>>,
}

#[derive(Serialize)]
struct OfFile<'a> {
    bytes: u64,
    sha256: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<&'a TensorSum>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    qconv_manifest: u64,
    files: Unique<ReadFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadFile {
    bytes: u64,
    sha256: String,
    #[serde(default)]
    tensors: Vec<ReadTensor>,
}

impl Entry for ReadFile {
    const OBJECT: &str = "an object of files";

    fn read<'de, A: MapAccess<'de>>(_: &str, map: &mut A) -> std::result::Result<Self, A::Error> {
        map.next_value()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    sha256: String,
}

/// The text of a manifest that lies in `dir`, of a scan with sums.
///
/// # Errors
/// `Misuse` for files that do not lie in `dir`, or names that are not UTF-8.
pub fn text(scan: &Scan, dir: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    for file in &scan.files {
        let Some(sha256) = &file.sha256 else { continue };
        let name = relative(&file.path, dir)?;
        files.insert(name, OfFile { bytes: file.bytes, sha256, tensors: file.tensors.iter().collect() });
    }
    let text = serde_json::to_string_pretty(&Written { qconv_manifest: VERSION, files });
    text.map(|t| t + "\n").map_err(|e| Error::misuse(e.to_string()))
}

/// The name of a file as seen from `dir`.
fn relative(path: &Path, dir: &Path) -> Result<String> {
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::io("open", path, e));
    // The last part may be a link, as in caches: the name that it has here counts.
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let full = real(parent)?.join(path.file_name().unwrap_or_default());
    let dir = real(if dir.as_os_str().is_empty() { Path::new(".") } else { dir })?;
    let inside = full.strip_prefix(&dir).ok().and_then(Path::to_str).map(|name| name.replace('\\', "/"));
    inside.ok_or_else(|| {
        Error::misuse(format!("lies outside {}", dir.display()))
            .at(path)
            .hint("a manifest lists files beside it, or in directories beside it")
    })
}

/// Whether a name stays in its directory.
fn is_inside(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0', ':'])
        && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
}

/// Holds a scan with sums to the manifest at `path`.
///
/// # Errors
/// `Io` where there is no such manifest.
pub fn check(scan: &mut Scan, path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let bytes = read_side_file(path, MAX_BYTES)?
        .ok_or_else(|| Error::io("open", path, std::io::ErrorKind::NotFound.into()))?;
    let read: Read = match serde_json::from_slice(&bytes) {
        Ok(read) => read,
        Err(e) => {
            scan.find(Finding::new(&MANIFEST, path, format!("is no manifest: {e}")));
            return Ok(());
        }
    };
    if read.qconv_manifest != VERSION {
        let message = format!("is of version {}, {VERSION} is known", read.qconv_manifest);
        scan.find(Finding::new(&MANIFEST, path, message).values(read.qconv_manifest, VERSION));
        return Ok(());
    }
    if let Some(name) = read.files.0.keys().find(|name| !is_inside(name)) {
        let message = format!("names {name:?}, which leads out of its directory: nothing was compared");
        scan.find(Finding::new(&MANIFEST, path, message));
        return Ok(());
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for file in &scan.files {
        let Some(sum) = &file.sha256 else { continue };
        let name = relative(&file.path, dir).unwrap_or_else(|_| file.path.display().to_string());
        let Some(wanted) = read.files.0.get(&name) else {
            found.push(Finding::new(&NOT_LISTED, &file.path, format!("{name} is not in the manifest")));
            continue;
        };
        seen.insert(name.clone());
        let before = found.len();
        tensors(&mut found, &file.path, &file.tensors, &wanted.tensors);
        if file.bytes != wanted.bytes || !sum.eq_ignore_ascii_case(&wanted.sha256) {
            let where_ = match found.len() - before {
                0 if file.tensors.is_empty() || wanted.tensors.is_empty() => "",
                0 => ": all tensors are as they were, what is around them is not",
                _ => ": see its tensors",
            };
            let (what, has, should) = match file.bytes == wanted.bytes {
                true => ("SHA-256", sum.clone(), wanted.sha256.clone()),
                false => ("length", file.bytes.to_string(), wanted.bytes.to_string()),
            };
            let message = format!("{name} has another {what} than in the manifest{where_}");
            found.push(Finding::new(&HASH_OF_FILE, &file.path, message).values(has, should));
        }
    }
    for name in read.files.0.keys().filter(|name| !seen.contains(*name)) {
        let file = dir.join(name);
        let what = if file.exists() { "was not among the files that were scanned" } else { "is missing" };
        found.push(Finding::new(&NOT_THERE, &file, format!("{name} of the manifest {what}")));
    }
    scan.findings.extend(found);
    Ok(())
}

fn tensors(found: &mut Vec<Finding>, file: &Path, have: &[TensorSum], wanted: &[ReadTensor]) {
    if wanted.is_empty() {
        return;
    }
    let by_name: HashMap<&str, &ReadTensor> = wanted.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut seen = HashSet::new();
    for tensor in have {
        let Some(wanted) = by_name.get(tensor.name.as_str()) else {
            let message = format!("tensor {:?} is not in the manifest", tensor.name);
            found.push(Finding::new(&NOT_LISTED, file, message).tensor(&tensor.name));
            continue;
        };
        seen.insert(tensor.name.as_str());
        let form = |dtype: &str, shape: &[u64]| format!("{dtype} {shape:?}");
        let (is, was) = (form(&tensor.dtype, &tensor.shape), form(&wanted.dtype, &wanted.shape));
        let finding = if is != was {
            let message = format!("tensor {:?} is {is}, in the manifest {was}", tensor.name);
            Finding::new(&HASH_OF_TENSOR, file, message).values(is, was)
        } else if !tensor.sha256.eq_ignore_ascii_case(&wanted.sha256) {
            let message = format!("tensor {:?} has another SHA-256 than in the manifest", tensor.name);
            Finding::new(&HASH_OF_TENSOR, file, message).values(&tensor.sha256, &wanted.sha256)
        } else {
            continue;
        };
        found.push(finding.tensor(&tensor.name));
    }
    for tensor in wanted.iter().filter(|t| !seen.contains(t.name.as_str())) {
        let message = format!("tensor {:?} of the manifest is missing", tensor.name);
        found.push(Finding::new(&NOT_THERE, file, message).tensor(&tensor.name));
    }
}
