//! A model of any format, opened: its tensors as values and as they are stored, and what is said of it beside.
//!
//! ```
//! # fn main() -> qconv::Result<()> {
//! # let path = "fixtures/models/llama";
//! // A GGUF, safetensors, PyTorch or .qpack file, or a Hugging Face directory.
//! let model = qconv::open(path)?;
//! for tensor in model.tensors() {
//!     println!("{} {:?} {}", tensor.name(), tensor.shape(), tensor.encoding());
//! }
//! // Rows as numbers, whatever they are stored as; of a matrix `[out, in]`, an output's weights are a row.
//! let tensor = model.get("model.layers.0.self_attn.q_proj.weight").expect("a llama has one");
//! let (rows, columns) = tensor.matrix();
//! let mut weights = vec![0.0f32; 2 * columns as usize];
//! tensor.rows(rows - 2..rows, &mut weights)?;
//! # assert!(weights.iter().all(|w| w.is_finite()) && weights.iter().any(|w| *w != 0.0));
//! // What is stored, without a copy: elements, or codes, scales and so on.
//! let map = model.map()?;
//! for part in tensor.parts() {
//!     let bytes: &[u8] = part.mapped(&map).expect("it is not compressed");
//!     println!("{} {} {:?}: {} bytes", part.name(), part.dtype(), part.shape(), bytes.len());
//!     # assert_eq!(bytes.len() as u64, part.nbytes());
//! }
//! # Ok(())
//! # }
//! ```

mod describe;
mod metadata;
mod opened;
mod side;

pub use crate::container::map::Mapped;
pub(crate) use describe::groups;
pub use describe::{describe, encoding};
pub use metadata::of_gguf as metadata_of_gguf;
pub use opened::Opened;
pub use side::SideFile;

use std::ops::Range;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value as Json};

use crate::block::codec;
use crate::container::qpack::Encoding;
use crate::container::side::from_json;
use crate::container::{Store, qpack};
use crate::convert::{self, Scratch, Source, identity};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::packed;
use crate::tensor::{DType, TensorInfo};

/// Opens what is at `path`, told by its content: a GGUF file or a `.qpack` file (any of a set), a safetensors or
/// PyTorch file, or a Hugging Face directory. Headers are read, data when they are asked for.
///
/// # Errors
/// `Io` for no such path; `Unsupported` for what is none of the formats; `Malformed` and `Limit` as the
/// readers of the formats say.
pub fn open(path: impl AsRef<Path>) -> Result<Model> {
    Model::open(path.as_ref(), &Limits::default())
}

/// An opened model.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    format: &'static str,
    store: Store,
    metadata: Map<String, Json>,
    metadata_kind: &'static str,
    side: Vec<SideFile>,
    /// What a `.qpack` file says of its tensors.
    manifest: IndexMap<String, qpack::Tensor>,
    note: Option<String>,
}

/// A tensor of a [`Model`]: a view, which reads when it is asked.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    model: &'a Model,
    info: &'a TensorInfo,
}

/// A run of bytes that a tensor is stored as: its elements, or codes, scales and so on.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    model: &'a Model,
    info: &'a TensorInfo,
}

impl Model {
    /// As [`open`], with other limits.
    ///
    /// # Errors
    /// As there.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let mut model = Self {
            path: path.to_path_buf(),
            format: "",
            store: Store::default(),
            metadata: Map::new(),
            metadata_kind: "config.json",
            side: Vec::new(),
            manifest: IndexMap::new(),
            note: None,
        };
        match Opened::open(path, limits)? {
            Opened::Gguf(gguf) => {
                (model.format, model.metadata_kind) = ("GGUF", "GGUF metadata");
                model.metadata = metadata::of_gguf(&gguf.metadata);
                model.store = gguf.store;
            }
            Opened::Safetensors(opened) => {
                (model.format, model.metadata_kind) = ("safetensors", "safetensors metadata");
                model.metadata = metadata::of_safetensors(&opened.metadata);
                model.store = opened.store;
            }
            Opened::Pytorch(store) => (model.format, model.store) = ("PyTorch", store),
            Opened::Qpack(file) => model.take_qpack(file, limits)?,
            Opened::Directory { dir, weights, config } => {
                model.format = "Hugging Face";
                model.side = side::of_directory(&dir, &weights.store)?;
                let config = Json::Object(config);
                let stated = convert::quantization(&config, &dir, weights.values, limits);
                match stated.and_then(|stated| packed::unpack(weights.store, stated.as_ref())) {
                    Ok((store, _)) => model.store = store,
                    // What is stored is there all the same.
                    Err(e) if e.kind() == ErrorKind::Unsupported => {
                        model.note = Some(e.to_string());
                        if let Opened::Directory { weights, .. } = Opened::open(path, limits)? {
                            model.store = weights.store;
                        }
                    }
                    Err(e) => return Err(e.at(dir.join("config.json"))),
                }
                if let Json::Object(config) = config {
                    model.metadata = config;
                }
            }
        }
        Ok(model)
    }

    fn take_qpack(&mut self, file: qpack::Qpack, limits: &Limits) -> Result<()> {
        self.format = "qpack";
        let has = |name: &str| file.files().iter().any(|f| f.name == name);
        let mut config = Json::Null;
        if has(metadata::CONFIG) {
            config = from_json(&file.read_file(metadata::CONFIG, limits)?, &self.path)
                .map_err(|e| e.context(metadata::CONFIG))?;
            self.metadata = config.as_object().cloned().unwrap_or_default();
        } else if has(metadata::GGUF) {
            self.metadata_kind = "GGUF metadata";
            self.metadata = metadata::of_gguf(&metadata::read_gguf(&file, &self.path, limits)?);
        }
        let stated = packed::qpack::stated(&file, &config, limits).map_err(|e| e.at(&self.path))?;
        self.side = side::of_qpack(&file);
        let path = &self.path;
        let (parts, tensors) = file.into_parts()?;
        let store = packed::qpack::join(parts, &tensors).map_err(|e| e.at(path))?;
        self.store = packed::qpack::unpack_rest(store, stated.as_ref()).map_err(|e| e.at(path))?.0;
        self.manifest = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        Ok(())
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `GGUF`, `safetensors`, `PyTorch`, `qpack` or `Hugging Face`.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The metadata of a GGUF file, `__metadata__` of a safetensors file, config.json of a directory; of a `.qpack`
    /// file those that it has of these.
    pub fn metadata(&self) -> &Map<String, Json> {
        &self.metadata
    }

    /// Which of them.
    pub fn metadata_kind(&self) -> &'static str {
        self.metadata_kind
    }

    /// The other files of a directory or a `.qpack` file, by their names.
    pub fn side_files(&self) -> &[SideFile] {
        &self.side
    }

    /// Why tensors are shown as they are stored, though they are parts of quantized ones.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// All tensors, in the order of the source. Those of a quantized checkpoint that belong together are one.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.store.tensors().iter().map(|info| Tensor { model: self, info })
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.store.get(name).map(|info| Tensor { model: self, info })
    }

    /// What a `.qpack` file's manifest says of its tensors, in the order of the file.
    pub fn manifest(&self) -> impl Iterator<Item = &qpack::Tensor> {
        self.manifest.values()
    }

    /// Tensors of a `.qpack` file that are there as bytes only, by name: their encoding or compression is not known.
    pub fn unread(&self) -> impl Iterator<Item = (&str, String)> {
        self.manifest().filter_map(|t| match (&t.encoding, t.is_closed()) {
            (_, true) => Some((t.name.as_str(), "its compression".to_string())),
            (Encoding::Unknown(_), _) => Some((t.name.as_str(), format!("encoding {:?}", t.encoding.kind()))),
            _ => None,
        })
    }

    /// Maps all files, for callers that compute on stored bytes where they lie ([`Part::mapped`]). Nothing is read
    /// before it is looked at. The files must not become shorter nor be written to meanwhile: a program
    /// that looks behind a file's end is ended by the system.
    ///
    /// # Errors
    /// `Io`; `Malformed` where a file has become shorter since it was opened.
    pub fn map(&self) -> Result<Mapped<'_>> {
        Mapped::new(self.store.stored())
    }

    /// The store behind it.
    pub fn store(&self) -> &Store {
        &self.store
    }
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Its shape, the outermost dimension first.
    pub fn shape(&self) -> &'a [u64] {
        &self.info.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.info.elements()
    }

    /// Rows and columns: columns are the innermost dimension, rows the product of the others.
    pub fn matrix(&self) -> (u64, u64) {
        let cols = self.info.shape.last().copied().unwrap_or(1);
        (self.elements().checked_div(cols).unwrap_or(0), cols)
    }

    /// The element or block type; F32 of what is decoded from other encodings.
    pub fn dtype(&self) -> DType {
        self.info.dtype
    }

    /// How it is stored, in words: `Q4_K`, `integers of 4 bits, groups of 128, scales F16`.
    pub fn encoding(&self) -> String {
        describe(&self.model.store, self.info, self.manifest())
    }

    /// What the manifest of a `.qpack` file says of it.
    pub fn manifest(&self) -> Option<&'a qpack::Tensor> {
        self.model.manifest.get(&self.info.name)
    }

    /// Whether [`Self::rows`] can decode it: integers and flags cannot be.
    pub fn is_readable(&self) -> bool {
        codec(self.info.dtype).is_some()
    }

    /// What it is stored as.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = Part<'a>> {
        let model = self.model;
        let parts = match model.store.packing(self.info) {
            Some((_, parts)) => parts,
            None => std::slice::from_ref(self.info),
        };
        parts.iter().map(move |info| Part { model, info })
    }

    /// Bytes in files, all parts together.
    pub fn stored_bytes(&self) -> u64 {
        self.parts().map(|p| p.nbytes()).sum()
    }

    /// Fills `out` with the values of whole rows ([`Self::matrix`]).
    ///
    /// # Errors
    /// `Misuse` for rows that there are not, and an `out` of another length; `Unsupported` for types without
    /// values; `Malformed` for codes that mean nothing; `Io`.
    pub fn rows(&self, rows: Range<u64>, out: &mut [f32]) -> Result<()> {
        let (all, cols) = self.matrix();
        let n = rows.end.checked_sub(rows.start).and_then(|n| n.checked_mul(cols));
        if rows.end > all || n != Some(out.len() as u64) {
            return Err(Error::misuse(format!(
                "rows {rows:?} into {} values; tensor {:?} has {all} rows of {cols}",
                out.len(),
                self.name()
            )));
        }
        self.elements_at(rows.start * cols, out)
    }

    /// Fills `out` with the values from element `start` on; both ends are those of blocks.
    pub(crate) fn elements_at(&self, start: u64, out: &mut [f32]) -> Result<()> {
        let (store, info) = (&self.model.store, self.info);
        if !store.added(&info.name).is_empty() {
            let mapped = identity(std::slice::from_ref(info));
            let mapped = mapped.first().ok_or_else(|| Error::misuse("no tensor"))?;
            let (mut values, mut scratch) = (Vec::new(), Scratch::default());
            let end = start + out.len() as u64;
            Source::new(mapped, store)?.values(store, start, end, &mut values, &mut scratch)?;
            out.copy_from_slice(&values);
            return Ok(());
        }
        let codec = codec(info.dtype).ok_or_else(|| {
            Error::unsupported(format!("tensor {:?} of type {} has no values to read", info.name, info.dtype))
        })?;
        let mut bytes = vec![0; info.dtype.bytes_for(out.len() as u64)? as usize];
        store.read(info, info.dtype.bytes_for(start)?, &mut bytes)?;
        codec.decode(&bytes, out)
    }
}

impl<'a> Part<'a> {
    /// Its name in the file; of a part in a `.qpack` file `TENSOR / PART`.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// Type of its elements.
    pub fn dtype(&self) -> DType {
        self.info.dtype
    }

    /// Its shape, outermost dimension first.
    pub fn shape(&self) -> &'a [u64] {
        &self.info.shape
    }

    /// Its bytes, without compression.
    pub fn nbytes(&self) -> u64 {
        self.info.nbytes
    }

    /// Its bytes where they lie, without a copy; `None` where they are compressed, of the other byte order, or
    /// not in order. In a `.qpack` file they begin at a multiple of 64 ([`Model::map`]).
    pub fn mapped<'m>(&self, map: &'m Mapped<'_>) -> Option<&'m [u8]> {
        map.bytes(self.info)
    }

    /// Fills `out` with its bytes from `start` on: little-endian and row-major, without compression.
    ///
    /// # Errors
    /// `Malformed` beyond its end; `Misuse` within an element of a file whose elements have to be moved; `Io`.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        self.model.store.stored().read(self.info, start, out)
    }
}
