//! GGUF file -> GGUF file of another type.

use std::path::PathBuf;

use super::Job;
use super::gather::Source;
use super::hf_to_gguf::{MetadataEdits, QUANTIZATION_VERSION, identity};
use super::plan::{Plan, TensorPlan};
use super::shards::{Sharding, lay_out};
use super::types::FileType;
use crate::container::gguf::{Gguf, Value};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::DType;

/// A change of type within GGUF.
#[derive(Clone, Debug)]
pub struct Quantize {
    /// The file, or any shard of it.
    pub source: PathBuf,
    /// The file to write.
    pub output: PathBuf,
    /// The type to write.
    pub file_type: FileType,
    /// Whether tensors that are quantized already may be quantized again.
    pub allow_requantize: bool,
    /// Changes to the metadata.
    pub edits: MetadataEdits,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl Quantize {
    /// Opens and plans.
    ///
    /// # Errors
    /// What is no GGUF file; tensors that are quantized already, unless that is allowed.
    pub fn plan(&self) -> Result<Job> {
        let gguf = Gguf::open(&self.source, &self.limits)?;
        gguf.check_model()?;
        let store = gguf.store;
        let mut plan = Plan { tensors: Vec::new(), files: Vec::new(), notes: Vec::new() };
        for (m, info) in identity(store.tensors()).into_iter().zip(store.tensors()) {
            let (mut dtype, mut wanted) = self.file_type.choose(&m.name, &m.shape);
            if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
                if !info.dtype.is_block() || info.dtype == dtype {
                    (dtype, wanted) = (info.dtype, None); // integers, and what is done already
                } else if !self.allow_requantize {
                    return Err(Error::misuse(format!(
                        "tensor {:?} is quantized already ({})",
                        m.name, info.dtype
                    ))
                    .at(&self.source)
                    .hint("start from the full-precision file, or accept the loss with --allow-requantize"));
                }
            }
            let source = Source::new(&m, &store)?;
            plan.tensors.push(TensorPlan::new(m.name, m.shape, dtype, wanted, source)?);
        }
        plan.note_fallbacks();
        let mut metadata = gguf.metadata;
        metadata.set("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
        metadata.set("general.file_type", Value::U32(self.file_type.id));
        if let Some(name) = &self.edits.name {
            metadata.set("general.name", name.as_str());
        }
        self.edits.apply(&mut metadata)?;
        lay_out(&mut plan, &mut metadata, &Sharding::Whole, &self.output)?;
        Ok(Job::gguf(plan, store, &self.output))
    }
}
