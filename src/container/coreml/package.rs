//! Packages: a directory with a manifest, a model and weight files.
//!
//! `Manifest.json` lists what is in `Data` (coremltools, `modelpackage/src/ModelPackage.cpp`); the model is a file
//! there, and names weight files by paths from its own directory on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::MapAccess;
use serde::{Deserialize, Serialize};
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, json};

use super::blob::{Blob, BlobFile};
use super::check;
use super::constants::Place;
use super::mil::{BlobFileValue, TensorType};
use super::model::Model;
use super::wire::{Unknown, decode, encode};
use crate::container::InputFile;
use crate::container::qpack::is_path;
use crate::container::side::{from_json, read_side_file};
use crate::container::unique::{self, Unique};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::sha256::Sha256;

/// Where the manifest is in a package.
pub const MANIFEST: &str = "Manifest.json";
/// Where the model is, in packages that are written.
pub const MODEL: &str = "Data/com.apple.CoreML/model.mlmodel";
/// Where the weights are, in packages that are written.
pub const WEIGHTS: &str = "Data/com.apple.CoreML/weights/weight.bin";
/// What the model calls them.
pub const WEIGHTS_IN_MODEL: &str = "@model_path/weights/weight.bin";

const DATA: &str = "Data";
const MODEL_PATH: &str = "@model_path/";
const FORMAT_VERSION: &str = "1.0.0";
const AUTHOR: &str = "com.apple.CoreML";
/// Name and description of the items of a package.
const MODEL_ITEM: [&str; 2] = ["model.mlmodel", "CoreML Model Specification"];
const WEIGHTS_ITEM: [&str; 2] = ["weights", "CoreML Model Weights"];
/// Most bytes of a protocol buffer.
const MAX_MODEL: usize = (1 << 31) - 1;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    file_format_version: String,
    root_model_identifier: String,
    item_info_entries: Unique<Item>,
}

/// An item: a file or a directory in `Data`. All four fields have to be there.
#[derive(Deserialize)]
struct Item {
    path: String,
    name: String,
    author: String,
    #[serde(rename = "description")]
    _description: String,
}

impl unique::Entry for Item {
    const OBJECT: &str = "an object of items";

    fn read<'de, A: MapAccess<'de>>(_: &str, map: &mut A) -> std::result::Result<Self, A::Error> {
        map.next_value()
    }
}

/// An opened package. Its values lie where their types say.
#[derive(Debug)]
pub struct Package {
    path: PathBuf,
    model: Model,
    unknown: Unknown,
    /// Length of the model.
    model_bytes: u64,
    /// By the names that the model has for them.
    weights: BTreeMap<String, BlobFile>,
}

/// Whether there is a package at `path`, by what is in it.
pub fn is_package(path: &Path) -> bool {
    path.join(MANIFEST).is_file() && path.join(DATA).is_dir()
}

impl Package {
    /// Opens a package: reads its manifest, its model, and the records of its weight files.
    ///
    /// # Errors
    /// `Io` when something cannot be read; `Malformed` as `formats/spec/coreml.md` lists; `Unsupported` for models
    /// that are no ML Programs, and for what later versions have; `Limit`.
    pub fn open(path: impl Into<PathBuf>, limits: &Limits) -> Result<Self> {
        let path = path.into();
        let (items, root) = items(&path, limits)?;
        let model_at = path.join(DATA).join(&root);
        let bytes = whole(&model_at, limits)?
            .ok_or_else(|| Error::malformed(format!("its model {root:?} is no file")).at(&path))?;
        let (model, unknown) = decode::<Model>(&bytes).map_err(|e| e.at(&model_at))?;
        let model_bytes = bytes.len() as u64;
        let mut package = Self { path, model, unknown, model_bytes, weights: BTreeMap::new() };
        package.check(&items, &root, limits).map_err(|e| e.at(&model_at))?;
        Ok(package)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Fields of the model that were passed over.
    pub fn unknown(&self) -> &Unknown {
        &self.unknown
    }

    /// The weight files that its values lie in, by the names that the model has for them.
    pub fn weights(&self) -> &BTreeMap<String, BlobFile> {
        &self.weights
    }

    /// Bytes of its model and of its weight files.
    pub fn bytes(&self) -> u64 {
        let weights = self.weights.values().map(|file| file.file().len());
        weights.fold(self.model_bytes, u64::saturating_add)
    }

    /// Where a value of this type is stored.
    ///
    /// # Errors
    /// `Malformed` where it is not: for a value of the model, that was checked at opening.
    pub fn blob(&self, value: &BlobFileValue, tensor: &TensorType) -> Result<(&BlobFile, &Blob)> {
        let file = self.weights.get(&value.file_name).ok_or_else(|| {
            Error::malformed(format!("no value lies in {:?}", value.file_name)).at(&self.path)
        })?;
        Ok((file, file.get(value.offset, tensor)?))
    }

    /// Fills `buf` from byte `at` of what is stored at a place of this package.
    ///
    /// # Errors
    /// `Malformed` when the range leaves it, or no value lies in its file; `Io`.
    pub fn read(&self, place: &Place, at: u64, buf: &mut [u8]) -> Result<()> {
        let lost = |what: String| Error::malformed(what).at(&self.path);
        match place {
            Place::File(name, blob) => match self.weights.get(&**name) {
                Some(file) => file.read(blob, at, buf),
                None => Err(lost(format!("no value lies in {name:?}"))),
            },
            Place::Immediate(bytes) => {
                let found = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..buf.len()));
                let n = buf.len();
                let found = found.ok_or_else(|| lost(format!("{n} bytes at {at} of {}", bytes.len())))?;
                buf.copy_from_slice(found);
                Ok(())
            }
        }
    }

    /// Opens the weight files, and checks the values.
    fn check(&mut self, items: &[String], root: &str, limits: &Limits) -> Result<()> {
        let program = &self.model.program;
        if program.version == 0 && program.functions.is_empty() {
            return Err(Error::unsupported("is no ML Program")
                .hint("neural networks, pipelines and other models of Core ML are not read"));
        }
        if program.version != 1 {
            let found = program.version;
            return Err(Error::unsupported(format!("its program is of version {found}, not 1")));
        }
        let (path, weights) = (&self.path, &mut self.weights);
        let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
        check::values(program, &mut |value, tensor| {
            if !weights.contains_key(&value.file_name) {
                let inside = weight_path(&value.file_name, folder, items)?;
                stays(path, &inside)?;
                let at = path.join(DATA).join(inside);
                regular(&at)?;
                let file = BlobFile::open(InputFile::open(at)?, limits)?;
                weights.insert(value.file_name.clone(), file);
            }
            match weights.get(&value.file_name) {
                Some(file) => file.get(value.offset, tensor).map(|_| ()),
                None => Ok(()), // it was put there
            }
        })
    }
}

/// The paths of a package's items in `Data`, without that of its model, and that.
fn items(path: &Path, limits: &Limits) -> Result<(Vec<String>, String)> {
    let at = path.join(MANIFEST);
    let bytes = whole(&at, limits)?.ok_or_else(|| {
        Error::unsupported(format!("is no Core ML package: it has no {MANIFEST}"))
            .at(path)
            .hint("a package is a directory, usually called NAME.mlpackage")
    })?;
    listed(&bytes, path, &at).map_err(|e| e.at(&at))
}

/// A whole file of a package, see [`read_side_file`].
fn whole(path: &Path, limits: &Limits) -> Result<Option<Vec<u8>>> {
    regular(path)?;
    read_side_file(path, limits.side_file_bytes)
}

/// That what is there, if anything, is a file or a directory: pipes and devices would be waited for.
fn regular(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() && !meta.is_dir() => {
            Err(Error::malformed("is neither a file nor a directory").at(path))
        }
        _ => Ok(()), // what is not there is found when it is opened
    }
}

/// That no directory on the way to what is `inside` of its data is a link that leads out of the package. Files may be
/// links: those of caches are.
fn stays(path: &Path, inside: &str) -> Result<()> {
    let mut at = path.to_path_buf();
    for part in Path::new(DATA).join(inside).components() {
        at.push(part);
        let is_link = fs::symlink_metadata(&at).is_ok_and(|meta| meta.is_symlink());
        if !is_link || !at.is_dir() {
            continue;
        }
        let real = |place: &Path| fs::canonicalize(place).map_err(|e| Error::io("find", place, e));
        if !real(&at)?.starts_with(real(path)?) {
            return Err(Error::malformed("is a link to a directory outside of the package")
                .at(&at)
                .hint("put the directory itself there; files may be links"));
        }
    }
    Ok(())
}

fn listed(bytes: &[u8], path: &Path, at: &Path) -> Result<(Vec<String>, String)> {
    let manifest: Manifest = from_json(bytes, at)?;
    if manifest.file_format_version != FORMAT_VERSION {
        return Err(Error::unsupported(format!(
            "its fileFormatVersion is {:?}, not {FORMAT_VERSION:?}",
            manifest.file_format_version
        )));
    }
    let mut entries = manifest.item_info_entries.0;
    for (key, item) in &entries {
        let context = |e: Error| e.context(format_args!("item {key:?}"));
        if item.path != format!("{}/{}", item.author, item.name) || !is_path(&item.path) {
            return Err(context(Error::malformed(format!(
                "its path {:?} is not its author {:?} and its name {:?}, or leads out of the package",
                item.path, item.author, item.name
            ))));
        }
        let place = path.join(DATA).join(&item.path);
        stays(path, &item.path).map_err(context)?;
        fs::metadata(&place).map_err(|e| context(Error::io("find", &place, e)))?;
    }
    let root = &manifest.root_model_identifier;
    let root = entries
        .shift_remove(root)
        .ok_or_else(|| Error::malformed(format!("its rootModelIdentifier {root:?} is none of its items")))?;
    Ok((entries.into_values().map(|item| item.path).collect(), root.path))
}

/// The path in `Data` of what a model in `folder` calls `name`.
fn weight_path(name: &str, folder: &str, items: &[String]) -> Result<String> {
    let refused = |why: &str| Err(Error::malformed(format!("its weight file {name:?} {why}")));
    let Some(inside) = name.strip_prefix(MODEL_PATH) else {
        return refused("does not begin with \"@model_path/\"");
    };
    if !is_path(inside) {
        return refused("leads out of the package");
    }
    let path = format!("{folder}/{inside}");
    let is_in =
        |item: &String| path.strip_prefix(item).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match items.iter().any(is_in) {
        true => Ok(path),
        false => refused("is in none of the items that the manifest lists"),
    }
}

/// The manifest and the model of a package to be written: their paths in it, and their bytes. Weights are to be at
/// [`WEIGHTS`], where there are any; values call that file [`WEIGHTS_IN_MODEL`].
///
/// # Errors
/// `Unsupported` for a model that is too large.
pub fn small_files(model: &Model, has_weights: bool) -> Result<[(&'static str, Vec<u8>); 2]> {
    let bytes = encode(model);
    if bytes.len() > MAX_MODEL {
        let len = bytes.len();
        return Err(Error::unsupported(format!(
            "the model would have {len} bytes, more than the {MAX_MODEL} of a protocol buffer"
        )));
    }
    Ok([(MANIFEST, manifest(&bytes, has_weights)?), (MODEL, bytes)])
}

/// The manifest: four spaces, keys in order.
fn manifest(model: &[u8], has_weights: bool) -> Result<Vec<u8>> {
    let sum = Sha256::digest(model);
    let items = [MODEL_ITEM, WEIGHTS_ITEM];
    let items = if has_weights { &items[..] } else { &items[..1] };
    let mut entries = BTreeMap::new();
    let mut root = None;
    for [name, description] in items {
        let path = format!("{AUTHOR}/{name}");
        let key = identifier(&path, &sum);
        root.get_or_insert_with(|| key.clone());
        let entry = json!({"author": AUTHOR, "description": description, "name": name, "path": path});
        entries.insert(key, entry);
    }
    let manifest = json!({
        "fileFormatVersion": FORMAT_VERSION,
        "itemInfoEntries": entries.into_iter().collect::<Map<_, _>>(),
        "rootModelIdentifier": root,
    });
    let mut out = Vec::new();
    let written =
        manifest.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(b"    ")));
    written.map_err(|e| Error::malformed(format!("the manifest cannot be written: {e}")))?;
    out.push(b'\n');
    Ok(out)
}

/// A UUID (RFC 9562, version 8: of one's own making) for an item of the package whose model has this SHA-256.
fn identifier(path: &str, model: &[u8; 32]) -> String {
    let mut sum = Sha256::new();
    sum.update(model);
    sum.update(path);
    let sum = sum.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&sum[..16]);
    bytes[6] = bytes[6] & 0x0F | 0x80;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let [a, b, c, d, e] = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &hex[part]);
    format!("{a}-{b}-{c}-{d}-{e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_is_as_others_write_it() {
        let text = String::from_utf8(manifest(b"model", true).unwrap()).unwrap();
        let [model, weights] = ["model.mlmodel", "weights"]
            .map(|n| identifier(&format!("{AUTHOR}/{n}"), &Sha256::digest(b"model")));
        let entry = |key: &str, description: &str, name: &str| {
            format!(
                r#"        "{key}": {{
            "author": "com.apple.CoreML",
            "description": "{description}",
            "name": "{name}",
            "path": "com.apple.CoreML/{name}"
        }}"#
            )
        };
        let mut entries = [
            entry(&model, "CoreML Model Specification", "model.mlmodel"),
            entry(&weights, "CoreML Model Weights", "weights"),
        ];
        entries.sort();
        let entries = entries.join(",\n");
        let wanted = format!(
            r#"{{
    "fileFormatVersion": "1.0.0",
    "itemInfoEntries": {{
{entries}
    }},
    "rootModelIdentifier": "{model}"
}}
"#
        );
        assert_eq!(text, wanted);
        let alone = String::from_utf8(manifest(b"model", false).unwrap()).unwrap();
        assert!(alone.contains(&model) && !alone.contains("weights"));
    }

    #[test]
    fn identifiers_are_uuids_of_the_content() {
        let of = |path: &str, model: &[u8]| identifier(path, &Sha256::digest(model));
        let one = of("a", b"x");
        assert_eq!(one, of("a", b"x"));
        assert!(one != of("b", b"x") && one != of("a", b"y"));
        let dashes: Vec<usize> = one.match_indices('-').map(|(i, _)| i).collect();
        assert_eq!((one.len(), dashes, &one[14..15]), (36, vec![8, 13, 18, 23], "8"));
        assert!("89ab".contains(&one[19..20]));
    }

    #[test]
    fn weight_files_stay_in_the_package() {
        let items = ["com.apple.CoreML/weights".to_string(), "com.apple.CoreML/one.bin".into()];
        let path = |name: &str| weight_path(name, "com.apple.CoreML", &items);
        assert_eq!(path(WEIGHTS_IN_MODEL).unwrap(), "com.apple.CoreML/weights/weight.bin");
        assert!(path("@model_path/one.bin").is_ok() && path("@model_path/weights/a/b.bin").is_ok());
        for (name, words) in [
            ("weights/weight.bin", "does not begin with \"@model_path/\""),
            ("@model_path/../../x", "leads out"),
            ("@model_path//etc/passwd", "leads out"),
            ("@model_path/", "leads out"),
            ("@model_path/weights2/x", "in none of the items"),
            ("@model_path/other.bin", "in none of the items"),
        ] {
            let e = path(name).unwrap_err();
            assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
        }
    }
}
