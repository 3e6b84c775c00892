//! The weights of a Hugging Face checkpoint, in whichever format they are.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::pytorch;
use super::safetensors;
use super::shards::{Given, Located};
use super::{InputFile, Store};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Opened weights.
#[derive(Debug)]
pub struct Weights {
    /// All tensors.
    pub store: Store,
    /// `safetensors` or `PyTorch`.
    pub format: &'static str,
    /// What the file itself says in numbers and words, by names as tensors have them: of HQQ's modules.
    pub values: Map<String, Json>,
}

/// Opens a file (any shard), an index, or a directory; a directory's safetensors come before its
/// PyTorch files, and these before HQQ's `qmodel.pt`. Formats are told apart by content.
///
/// # Errors
/// `Io` when something cannot be read, `Unsupported` when there are no weights, and what the
/// readers of the formats say.
pub fn open(path: &Path, limits: &Limits) -> Result<Weights> {
    let located = match Given::of(path)? {
        Given::Directory(dir) => {
            let mut found = None;
            for naming in [&safetensors::NAMING, &pytorch::NAMING] {
                found = naming.in_directory(dir, limits)?;
                if found.is_some() {
                    break;
                }
            }
            let hqq = dir.join(pytorch::HQQ_FILE);
            if found.is_none() && hqq.is_file() {
                found = Some(pytorch::NAMING.of_file(&hqq, limits)?);
            }
            found.ok_or_else(|| {
                Error::unsupported("holds no weights")
                    .at(dir)
                    .hint("model.safetensors, pytorch_model.bin, or an index of either was expected")
            })?
        }
        Given::Index => Located::of_index(path, limits)?,
        Given::File if is_pytorch(path)? => pytorch::NAMING.of_file(path, limits)?,
        Given::File => safetensors::NAMING.of_file(path, limits)?,
    };
    let first = located.files.first().map_or(Ok(false), |first| is_pytorch(first));
    Ok(if first? {
        let (store, values) = pytorch::open_located(&located, limits)?;
        Weights { store, format: pytorch::NAMING.format, values }
    } else {
        let store = safetensors::open_located(&located, limits)?.store;
        Weights { store, format: safetensors::NAMING.format, values: Map::new() }
    })
}

fn is_pytorch(path: &Path) -> Result<bool> {
    pytorch::is_pytorch(&InputFile::open(path)?)
}
