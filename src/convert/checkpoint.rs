//! An opened Hugging Face directory: weights, config.json, model card.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::container::{Store, safetensors};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Metadata that a GGUF file had and config.json cannot hold, kept beside it by `gguf-to-hf`.
pub const GGUF_METADATA_FILE: &str = "gguf_metadata.json";

/// A model in Hugging Face's layout. Only headers are read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory.
    pub dir: PathBuf,
    /// Its weights.
    pub store: Store,
    /// config.json.
    pub config: Json,
    /// generation_config.json, where there is a valid one.
    pub generation: Option<Json>,
    /// README.md, where there is one.
    pub model_card: Option<String>,
}

impl Checkpoint {
    /// Opens a directory, or the directory of the weights file or index that is given.
    ///
    /// # Errors
    /// `Io` for no such path, `Malformed` or `Unsupported` for what is no model.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        let dir = if meta.is_dir() {
            path.to_path_buf()
        } else {
            match path.parent() {
                Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
                _ => PathBuf::from("."),
            }
        };
        let config_path = dir.join("config.json");
        if !config_path.is_file() {
            return Err(Error::unsupported("is no Hugging Face model: config.json is missing")
                .at(path)
                .hint("give the directory that holds config.json and the weights"));
        }
        let config: Json = serde_json::from_slice(&read_side_file(&config_path, limits)?)
            .map_err(|e| Error::malformed(format!("is no valid JSON: {e}")).at(&config_path))?;
        if !config.is_object() {
            return Err(Error::malformed("is no JSON object").at(&config_path));
        }
        let store = safetensors::open(path, limits)?.store;
        let card = dir.join("README.md");
        let model_card = match card.is_file() {
            true => Some(String::from_utf8_lossy(&read_side_file(&card, limits)?).into_owned()),
            false => None,
        };
        let generation = dir.join("generation_config.json");
        let generation = match generation.is_file() {
            true => serde_json::from_slice(&read_side_file(&generation, limits)?).ok(),
            false => None,
        };
        Ok(Self { dir, store, config, generation, model_card })
    }

    /// The directory's own name, links and dots resolved.
    pub fn dir_name(&self) -> String {
        let full = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// Reads a whole config-like file.
///
/// # Errors
/// `Io`, or `Limit` when it is larger than such files are.
pub fn read_side_file(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let len = fs::metadata(path).map_err(|e| Error::io("open", path, e))?.len();
    if len > limits.side_file_bytes {
        return Err(
            Error::limit(format!("has {len} bytes, the limit is {}", limits.side_file_bytes)).at(path)
        );
    }
    fs::read(path).map_err(|e| Error::io("read", path, e))
}
