//! Where everything of a `.qpack` lies: the manifest of a plan.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};

use crate::container::Store;
use crate::container::qpack::write::Sources;
use crate::container::qpack::{self, Manifest, SUFFIX, Segment, SideFile, Tensor};
use crate::convert::plan::{FilePlan, Plan};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// What a manifest says of a plan.
#[derive(Debug)]
pub struct Contents {
    /// The tensors, in the order of the plan's.
    pub tensors: Vec<Tensor>,
    /// Names and bytes of the model's other files.
    pub side: Vec<(String, Vec<u8>)>,
    /// Where it comes from.
    pub provenance: Provenance,
}

/// Where a model comes from.
#[derive(Debug)]
pub enum Provenance {
    /// As it was.
    Kept(Map<String, Json>),
    /// From the files behind the store, by this tool, with what else is to be said, and the file that calibration
    /// wrote.
    New(Map<String, Json>, Option<PathBuf>),
}

/// Lays out the files, and gives each tensor its place.
///
/// # Errors
/// `Malformed` for names and sizes that cannot be; `Unsupported` for what has no place in a manifest; `Limit` for
/// other files that would not be read again.
pub fn lay_out(
    plan: &mut Plan,
    contents: Contents,
    store: &Store,
    output: &Path,
    max_shard_size: u64,
    limits: &Limits,
) -> Result<()> {
    let Contents { tensors, mut side, provenance } = contents;
    side.sort();
    let (provenance, sources) = match provenance {
        Provenance::Kept(own) => (own, Sources::default()),
        Provenance::New(mut more, calibration) => {
            more.insert("tool".into(), json!(concat!("qconv ", env!("CARGO_PKG_VERSION"))));
            (more, Sources { files: sources(store), calibration })
        }
    };
    let file = |(name, bytes): &(String, Vec<u8>)| SideFile {
        name: name.clone(),
        segment: Segment::plain(bytes.len() as u64),
    };
    let files: Vec<_> = side.iter().map(file).collect();
    SideFile::check_sum(&files, limits)?;
    let manifest = Manifest { files, tensors, provenance, ..Manifest::default() };
    let name = output.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.strip_suffix(SUFFIX).and_then(|s| s.strip_suffix('.')).unwrap_or(&name);
    let mut layout = qpack::write::layout(stem, manifest, max_shard_size, sources)?;
    if let [only] = &mut layout.files[..] {
        only.name.clone_from(&name);
    }
    let mut places = layout.places.into_iter();
    for ((_, bytes), (file, at)) in side.iter().zip(&mut places) {
        let missing = || Error::misuse("a side file without a place");
        // They lie one after the other, right behind the header.
        let header = &mut layout.files.get_mut(file).ok_or_else(missing)?.header;
        header.resize(at as usize, 0);
        header.extend(bytes);
    }
    plan.place(places);
    plan.files = layout.files.into_iter().map(FilePlan::from).collect();
    Ok(())
}

/// The files behind a store, each once.
fn sources(store: &Store) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = store.files().iter().map(|f| f.path().to_path_buf()).collect();
    paths.dedup();
    paths
}
