//! The layout of GGUF output: one file, or the shards of one.
//!
//! Shards are named `NAME-00001-of-00003.gguf`. The first carries the metadata, all carry
//! `split.no`, `split.count` and `split.tensors.count`. Source: `tools/gguf-split`, and
//! `llama_split_path` (llama.cpp).

use std::path::{Path, PathBuf};

use super::Job;
use super::gather::{Source, identity};
use super::plan::{FilePlan, Plan, TensorPlan};
use super::stage::no_directory;
use crate::container::gguf::write::Layout;
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::container::shards::{shard_name, split_shard_name};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::sys;
use crate::tensor::DType;

/// How the output is divided into files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Sharding {
    /// One file.
    #[default]
    Whole,
    /// As many files as the source has, with the same tensors.
    Keep,
    /// As few files as these bounds allow. A tensor that exceeds the size gets a file of its own.
    Bounded {
        /// Most bytes of a file.
        bytes: Option<u64>,
        /// Most tensors of a file.
        tensors: Option<u64>,
    },
}

impl Sharding {
    /// From the bounds that a user may give.
    ///
    /// # Errors
    /// `Misuse` for a bound of 0.
    pub fn bounded(bytes: Option<u64>, tensors: Option<u64>) -> Result<Self> {
        match (bytes, tensors) {
            (Some(0), _) | (_, Some(0)) => Err(Error::misuse("a shard needs room for a tensor at least")),
            (None, None) => Ok(Self::Whole),
            _ => Ok(Self::Bounded { bytes, tensors }),
        }
    }
}

/// A GGUF file whose division into files shall change: split, merged, or split in another way.
#[derive(Clone, Debug)]
pub struct Reshard {
    /// The file, or any shard of it.
    pub source: PathBuf,
    /// The file to write; shards are named after it.
    pub output: PathBuf,
    /// The new division.
    pub sharding: Sharding,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl Reshard {
    /// Opens and plans.
    ///
    /// # Errors
    /// `Misuse` when the output would be divided as the source is; what is no GGUF file, or lacks
    /// shards.
    pub fn plan(&self) -> Result<Job> {
        let Gguf { mut metadata, store, shards, .. } = Gguf::open(&self.source, &self.limits)?;
        let mut plan = Plan::new(Vec::new());
        for (m, info) in identity(store.tensors()).into_iter().zip(store.tensors()) {
            let source = Source::new(&m, &store)?;
            plan.tensors.push(TensorPlan::new(m.name, m.shape, info.dtype, None, source)?);
        }
        lay_out(&mut plan, &mut metadata, &self.sharding, &self.output)?;
        match (shards, plan.files.len()) {
            (1, 1) if self.sharding == Sharding::Whole => {
                Err(Error::misuse("is one file already: there is nothing to merge").at(&self.source))
            }
            (1, 1) => Err(Error::misuse("fits within these bounds: there is nothing to split")
                .at(&self.source)
                .hint("give a smaller --max-size or --max-tensors")),
            _ => Ok(Job::gguf(plan, store, &self.output)),
        }
    }
}

/// Fixes files, headers and offsets of a plan whose tensors are in their final order.
///
/// [`Sharding::Keep`] goes by the `file` of each tensor, which must not decrease.
pub(super) fn lay_out(
    plan: &mut Plan,
    metadata: &mut Metadata,
    sharding: &Sharding,
    output: &Path,
) -> Result<()> {
    for key in ["split.no", "split.count", "split.tensors.count"] {
        metadata.remove(key);
    }
    match sharding {
        Sharding::Whole => plan.tensors.iter_mut().for_each(|t| t.file = 0),
        Sharding::Keep => {
            // Without those that lost all their tensors.
            let mut kept: Vec<usize> = plan.tensors.iter().map(|t| t.file).collect();
            kept.dedup();
            for t in &mut plan.tensors {
                t.file = kept.partition_point(|&k| k < t.file);
            }
        }
        Sharding::Bounded { bytes, tensors } => {
            let head = Layout::new(metadata, &[])?.header.len() as u64 + LATER_HEAD;
            let alignment = metadata.u64("general.alignment").unwrap_or(0);
            let (bytes, tensors) = (bytes.unwrap_or(u64::MAX), tensors.unwrap_or(u64::MAX));
            divide(&mut plan.tensors, head, alignment, bytes, tensors);
        }
    }
    let count = plan.tensors.last().map_or(1, |t| t.file + 1);
    let name = shard_prefix(output)?;
    plan.files.clear();
    let total = plan.tensors.len();
    for no in 0..count {
        let first = plan.tensors.partition_point(|t| t.file < no);
        let end = plan.tensors.partition_point(|t| t.file <= no);
        let mut own = Metadata::default();
        if no == 0 {
            own = metadata.clone();
        } else if let Some(alignment) = metadata.get("general.alignment") {
            own.set("general.alignment", alignment.clone());
        }
        let mut file = PathBuf::new();
        if count > 1 {
            let number = |n: usize, what: &str| {
                u16::try_from(n).map_err(|_| {
                    Error::unsupported(format!("{n} {what}: GGUF counts shards up to {}", u16::MAX))
                })
            };
            own.set("split.no", Value::U16(number(no, "shards")?));
            own.set("split.count", Value::U16(number(count, "shards")?));
            own.set("split.tensors.count", Value::I32(i32::try_from(total).unwrap_or(i32::MAX)));
            file = PathBuf::from(shard_name(&name, no as u64, count as u64, "gguf"));
        }
        let shard = &mut plan.tensors[first..end];
        let layout = Layout::new(&own, &infos(shard))?;
        for (tensor, offset) in shard.iter_mut().zip(&layout.offsets) {
            tensor.offset = *offset;
        }
        plan.files.push(FilePlan { name: file, header: layout.header, len: layout.total_len, ending: None });
    }
    Ok(())
}

/// No fewer bytes than the header of a later shard takes, but for the tensors' entries.
const LATER_HEAD: u64 = 512;
/// No fewer than a tensor's entry in the header and its padding to the default alignment.
const ENTRY: u64 = 160;

/// Gives every tensor its file. `head` are the bytes of the first file without its tensors. Sizes are
/// overestimated by some bytes for each tensor, never the other way.
fn divide(tensors: &mut [TensorPlan], head: u64, alignment: u64, bytes: u64, count: u64) {
    let (mut file, mut size, mut held) = (0, head, 0);
    for t in tensors {
        let own = t.nbytes.saturating_add(ENTRY).saturating_add(alignment);
        if held > 0 && (held >= count || size.saturating_add(own) > bytes) {
            (file, size, held) = (file + 1, LATER_HEAD + alignment, 0);
        }
        size = size.saturating_add(own);
        held += 1;
        t.file = file;
    }
}

fn infos(tensors: &[TensorPlan]) -> Vec<(&str, DType, &[u64])> {
    tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())).collect()
}

/// What the names of shards begin with, where there are several:
/// `dir/model.gguf`, `dir/model` and `dir/model-00001-of-00002.gguf` all give `model`.
fn shard_prefix(output: &Path) -> Result<String> {
    if sys::ends_as_directory(output) && !output.exists() {
        return Err(no_directory(output));
    }
    let name = output.file_name().unwrap_or_default();
    let name = name.to_str().ok_or_else(|| Error::misuse("is no name in UTF-8").at(output))?;
    let prefix = match split_shard_name(name, "gguf") {
        Some((prefix, ..)) => prefix,
        None => name.strip_suffix(".gguf").unwrap_or(name),
    };
    Ok(prefix.to_string())
}
