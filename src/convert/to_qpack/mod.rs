//! Any source -> `.qpack`, as it is: what has an encoding there is moved into it, and nothing is rounded.

mod files;
mod layout;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

pub(super) use layout::{Contents, Provenance, lay_out};

use self::files::{Beside, beside, headers};
use super::Job;
use super::checkpoint::quantization;
use super::gather::{Source, identity};
use super::moved::Moved;
use super::plan::{Plan, TensorPlan};
use super::to_hf::places_of_checkpoint;
use crate::container::gguf::{Gguf, is_gguf, write};
use crate::container::qpack::{CONFIG, METADATA, Qpack, SUFFIX, Tensor, is_qpack};
use crate::container::shards::split_shard_name;
use crate::container::side::read_json;
use crate::container::{InputFile, Store, weights};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::packed;
use crate::packed::qpack::{Taken, take};

/// A source that goes into `.qpack` as it is.
#[derive(Clone, Debug)]
pub struct ToQpack {
    /// A Hugging Face directory, quantized or not, a GGUF file, a file of weights, or a `.qpack`, which is
    /// divided into files anew.
    pub source: PathBuf,
    /// The file to write; default: beside the source, called after it.
    pub output: Option<PathBuf>,
    /// Most bytes of tensors in a file; a model with more is divided.
    pub max_shard_size: u64,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

/// An opened source.
struct Opened {
    store: Store,
    taken: Vec<Taken>,
    side: Vec<(String, Vec<u8>)>,
    /// What its provenance was, of a source that has one.
    provenance: Option<Map<String, Json>>,
    /// Its own name.
    name: String,
    notes: Vec<String>,
}

impl ToQpack {
    /// A source, and nothing else said.
    pub fn new(source: impl Into<PathBuf>) -> Self {
        Self { source: source.into(), output: None, max_shard_size: u64::MAX, limits: Limits::default() }
    }

    /// Opens and plans.
    ///
    /// # Errors
    /// What is no model; `Unsupported` for what cannot be given back, such as HQQ's own files.
    pub fn plan(&self) -> Result<Job> {
        let Opened { store, taken, side, provenance, name, notes } = self.open()?;
        let mut tensors = Vec::with_capacity(taken.len());
        let mut plan = Plan::new(Vec::with_capacity(taken.len()));
        for taken in taken {
            tensors.push(taken.tensor.clone());
            plan.tensors.push(planned(taken, &store)?);
        }
        plan.notes = notes;
        let output = match &self.output {
            Some(output) if output.is_dir() => output.join(format!("{name}.{SUFFIX}")),
            Some(output) => output.clone(),
            None => self.source_place().with_file_name(format!("{name}.{SUFFIX}")),
        };
        // What is not new has to be what it was.
        let vouched = provenance.is_some().then(|| self.source.clone());
        let provenance = match provenance {
            Some(own) => Provenance::Kept(own),
            None => Provenance::New(Map::new(), None),
        };
        let contents = Contents { tensors, side, provenance };
        lay_out(&mut plan, contents, &store, &output, self.max_shard_size, &self.limits)?;
        Ok(Job { vouched, ..Job::gguf(plan, store, &output) })
    }

    /// The directory of a checkpoint, or the file, by a path that ends in a name.
    fn source_place(&self) -> PathBuf {
        match self.source.file_name() {
            Some(_) => self.source.clone(),
            None => self.source.canonicalize().unwrap_or_else(|_| self.source.clone()),
        }
    }

    fn open(&self) -> Result<Opened> {
        let path = self.source.as_path();
        if path.is_file() {
            if is_qpack(&InputFile::open(path)?)? {
                return self.open_qpack(path);
            }
            if is_gguf(path)? {
                return self.open_gguf(path);
            }
        }
        self.open_checkpoint(path)
    }

    fn open_qpack(&self, path: &Path) -> Result<Opened> {
        let model = Qpack::open(path, &self.limits)?;
        let side = model.read_files(|_| true, &self.limits)?.collect::<Result<_>>()?;
        let provenance = model.manifests().next().map(|(_, m)| m.provenance.clone()).unwrap_or_default();
        let (store, tensors) = model.into_parts()?;
        let taken = tensors.into_iter().map(|t| Taken::parts(&store, t)).collect::<Result<_>>()?;
        let notes = Vec::new();
        Ok(Opened { store, taken, side, provenance: Some(provenance), name: stem(path), notes })
    }

    fn open_gguf(&self, path: &Path) -> Result<Opened> {
        let gguf = Gguf::open(path, &self.limits)?;
        let header = write::Layout::new(&gguf.metadata, &[])?.header;
        let mut taken = take(&gguf.store, None)?;
        for t in &mut taken {
            t.tensor.role = Some(role(&t.tensor.name));
        }
        let mut notes = Vec::new();
        let infos: Vec<_> =
            gguf.store.tensors().iter().map(|t| (t.name.as_str(), t.dtype, &t.shape[..])).collect();
        let anew = write::Layout::new(&gguf.metadata, &infos)?;
        let is_same = anew.offsets.iter().zip(gguf.store.tensors()).all(|(at, t)| *at == t.offset);
        if gguf.big_endian || gguf.version != 3 || gguf.shards > 1 || !is_same || gguf.trailing_bytes > 0 {
            notes.push(
                "unpacked, the tensors and metadata are the same, the file is not: this one is in shards, of an older \
                 version, big-endian or ordered otherwise"
                    .into(),
            );
        }
        let side = vec![(METADATA.to_string(), header)];
        Ok(Opened { store: gguf.store, taken, side, provenance: None, name: stem(path), notes })
    }

    fn open_checkpoint(&self, path: &Path) -> Result<Opened> {
        let weights = weights::open(path, &self.limits)?;
        if !weights.values.is_empty() {
            return Err(Error::unsupported("holds modules of HQQ's own, which have no place in .qpack")
                .at(path)
                .hint("qconv convert --to compressed-tensors keeps what it can hold; pack its output"));
        }
        // Of a lone file nothing else is known.
        let dir = match path.parent() {
            _ if path.is_dir() => Some(path.to_path_buf()),
            parent => parent
                .map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p })
                .filter(|p| p.join(CONFIG).is_file())
                .map(Path::to_path_buf),
        };
        let own: Vec<PathBuf> = weights.store.files().iter().map(|f| f.path().to_path_buf()).collect();
        let Some(dir) = dir else {
            let taken = take(&weights.store, None)?;
            let notes = vec!["there is no config.json beside it: only its tensors are packed".into()];
            let (store, side) = (weights.store, headers(&own, weights.format, &self.limits)?);
            return Ok(Opened { store, taken, side, provenance: None, name: stem(path), notes });
        };
        let config_path = dir.join(CONFIG);
        let config = read_json::<Json>(&config_path, self.limits.side_file_bytes)?.unwrap_or(Json::Null);
        let stated = quantization(&config, &dir, Map::new(), &self.limits).map_err(|e| e.at(&config_path))?;
        let Beside { files: side, mut notes } = beside(&dir, &own, weights.format, &self.limits)?;
        let (store, method) =
            packed::unpack(weights.store, stated.as_ref()).map_err(|e| e.at(&config_path))?;
        let mut taken = take(&store, stated.as_ref())?;
        // What is no model that is known has no roles.
        let places = places_of_checkpoint(&config, &store).unwrap_or_default();
        for t in &mut taken {
            t.tensor.role = places.get(&t.tensor.name).map(|(name, _)| role(name));
        }
        if let Some(method) = method {
            let moved = taken.iter().filter(|t| t.tensor.origin.is_some()).count();
            notes.push(format!("{moved} matrices keep the codes and scales they have ({method})"));
        }
        let full = dir.canonicalize().unwrap_or(dir);
        let name = full.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        Ok(Opened { store, taken, side, provenance: None, name, notes })
    }
}

/// The name of a file without its ending, and of a set without numbers.
pub(super) fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match split_shard_name(&format!("{stem}.{SUFFIX}"), SUFFIX) {
        Some((stem, ..)) => stem.to_string(),
        None => stem,
    }
}

/// What a tensor is in a model, by its name in GGUF: `blk.3.attn_q.weight` is `attn_q`.
pub(super) fn role(name: &str) -> String {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let inner = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    inner.map_or(name, |(_, inner)| inner).to_string()
}

/// One tensor of the plan: copied as it is, or moved.
fn planned(taken: Taken, store: &Store) -> Result<TensorPlan> {
    let Tensor { name, shape, .. } = taken.tensor.clone();
    match taken.whole() {
        Some(info) => {
            let source = Source::new(&identity(std::slice::from_ref(info)).remove(0), store)?;
            TensorPlan::new(name, shape, info.dtype, None, source)
        }
        None => TensorPlan::moved(name, shape, Moved::taken(taken)?),
    }
}
