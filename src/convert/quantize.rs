//! GGUF file -> GGUF file of another type.

use std::path::PathBuf;

use super::Job;
use super::edits::MetadataEdits;
use super::gather::identity;
use super::quantizer::{Quantizer, Unquantized};
use super::shards::{Sharding, lay_out};
use crate::container::gguf::Gguf;
use crate::error::Result;
use crate::limits::Limits;

/// A change of type within GGUF.
#[derive(Clone, Debug)]
pub struct Quantize {
    /// The file, or any shard of it.
    pub source: PathBuf,
    /// The file to write; shards are named after it.
    pub output: PathBuf,
    /// What to make of it.
    pub quantizer: Quantizer,
    /// How the output is divided into files.
    pub sharding: Sharding,
    /// Changes to the metadata.
    pub edits: MetadataEdits,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl Quantize {
    /// With no options but the quantizer's.
    pub fn new(source: impl Into<PathBuf>, output: impl Into<PathBuf>, quantizer: Quantizer) -> Self {
        Self {
            source: source.into(),
            output: output.into(),
            quantizer,
            sharding: Sharding::Whole,
            edits: MetadataEdits::default(),
            limits: Limits::default(),
        }
    }

    /// Opens and plans.
    ///
    /// # Errors
    /// What is no GGUF file; tensors that are quantized already, unless that is allowed; options
    /// and importance matrices that do not fit the model.
    pub fn plan(&self) -> Result<Job> {
        let gguf = Gguf::open(&self.source, &self.limits)?;
        gguf.check_model()?;
        let Gguf { mut metadata, store, .. } = gguf;
        let tensors = identity(store.tensors()).into_iter().zip(store.tensors());
        let tensors = tensors
            .map(|(mapped, t)| Unquantized { mapped, dtype: t.dtype, place: (t.file, t.offset) })
            .collect();
        let mut quantizer = self.quantizer.clone();
        quantizer.overrides.file_order = self.sharding == Sharding::Keep;
        let mut plan =
            quantizer.plan(tensors, &store, &mut metadata, &self.limits).map_err(|e| e.at(&self.source))?;
        self.edits.apply(&mut metadata)?;
        lay_out(&mut plan, &mut metadata, &self.sharding, &self.output)?;
        Ok(Job::gguf(plan, store, &self.output))
    }
}
