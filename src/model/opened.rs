//! What a path holds, told by its content.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::container::gguf::{Gguf, MAGIC};
use crate::container::qpack::{Qpack, is_qpack};
use crate::container::safetensors::{self, SafeTensors};
use crate::container::side::read_json;
use crate::container::weights::{self, Weights};
use crate::container::{InputFile, Store, pytorch};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// A path's headers, as the reader of its format gives them.
#[derive(Debug)]
pub enum Opened {
    /// A GGUF file, or all shards of one.
    Gguf(Gguf),
    /// A safetensors file.
    Safetensors(SafeTensors),
    /// A PyTorch file.
    Pytorch(Store),
    /// A `.qpack` file, or all of a set.
    Qpack(Qpack),
    /// A Hugging Face directory.
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What lies in it.
        weights: Weights,
        /// config.json; empty where there is none.
        config: Map<String, Json>,
    },
}

impl Opened {
    /// Looks at `path`. An index, or config.json, stands for its directory.
    ///
    /// # Errors
    /// `Io` for no such path; `Unsupported` for what is none of the formats; what the readers say.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let meta = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        if meta.is_dir() {
            return directory(path, limits);
        }
        let file = InputFile::open(path)?;
        let mut head = [0; 9];
        let n = file.len().min(head.len() as u64) as usize;
        file.read_at(0, head.get_mut(..n).unwrap_or_default())?;
        if head.starts_with(&MAGIC) {
            return Gguf::open(path, limits).map(Self::Gguf);
        }
        if n == head.len() && head[8] == b'{' && head[7] == 0 {
            return safetensors::open(path, limits).map(Self::Safetensors);
        }
        if pytorch::is_pytorch(&file)? {
            return pytorch::open(path, limits).map(Self::Pytorch);
        }
        if is_qpack(&file)? {
            return Qpack::open(path, limits).map(Self::Qpack);
        }
        if n > 0 && head[0] == b'{' {
            return directory(path, limits);
        }
        Err(Error::unsupported("is no file that can be read")
            .at(path)
            .hint("GGUF, safetensors, PyTorch and .qpack files, and Hugging Face directories are read"))
    }
}

fn directory(path: &Path, limits: &Limits) -> Result<Opened> {
    let weights = weights::open(path, limits)?;
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let config = read_json(&dir.join("config.json"), limits.side_file_bytes)?.unwrap_or_default();
    Ok(Opened::Directory { dir: dir.to_path_buf(), weights, config })
}
