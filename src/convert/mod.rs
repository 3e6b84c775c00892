//! Conversions. Each is the same six steps: open, recognise, plan, stream, finish, verify.
//!
//! [`HfToGguf`], [`LoraToGguf`], [`GgufToHf`] and [`Quantize`] open their source, recognise it, and make a
//! [`Plan`]; [`Job::run`] streams and finishes it. Verification stands in [`crate::verify`],
//! since it reads the finished file as a stranger would.

mod adapter;
mod checkpoint;
mod edits;
mod fold;
mod gather;
mod general;
mod gguf_to_hf;
mod guide;
mod hf_to_gguf;
mod lora_to_gguf;
mod low_rank;
mod model_id;
mod outcome;
mod plan;
mod quantize;
mod quantizer;
mod recipe;
mod sentence;
mod shards;
mod stage;
mod stream;
mod tokens;
mod types;

pub use checkpoint::{Checkpoint, GGUF_METADATA_FILE};
pub use edits::MetadataEdits;
pub use fold::{Factor, FoldPlan, Folding};
pub use gather::{Scratch, Source, identity};
pub use gguf_to_hf::GgufToHf;
pub use guide::{MethodChoice, Way, parse_method, parse_tensor_method, strip_awq};
pub use hf_to_gguf::{HfToGguf, MergeLora, source_tensors};
pub use lora_to_gguf::LoraToGguf;
pub use outcome::{Fallback, Outcome, OutputError};
pub use plan::{Budget, FilePlan, Obstacle, Plan, TensorPlan};
pub use quantize::Quantize;
pub use quantizer::{ImatrixChoice, Quantizer};
pub use recipe::{Choice, ModelFacts, Overrides, Recipe, Role, parse_tensor_type};
pub use shards::{Reshard, Sharding};
pub use stage::{OutputFile, Stage};
pub use stream::{Observer, Silent};
pub use tokens::{TokenCheck, Tokens};
pub use types::{FILE_TYPES, FileType, base_name};

use std::path::{Path, PathBuf};

use crate::container::Store;
use crate::error::Result;

/// A planned conversion, ready to run.
#[derive(Debug)]
pub struct Job {
    /// What will be written.
    pub plan: Plan,
    /// What it is read from.
    pub store: Store,
    /// The directory that will appear, or the file. Of several shards it is the first.
    pub output: PathBuf,
    /// Whether `output` is a directory of `plan.files`; otherwise these lie where it lies.
    pub is_directory: bool,
    /// How llama.cpp's tokens compare with the source's, where that was asked for.
    pub tokens: Option<Tokens>,
}

impl Job {
    /// A job that writes a GGUF file, or its shards, beside each other.
    pub fn gguf(plan: Plan, store: Store, output: &Path) -> Self {
        let first = plan.files.first().map(|f| f.name.as_path()).filter(|n| !n.as_os_str().is_empty());
        let output = first.map_or_else(|| output.to_path_buf(), |name| output.with_file_name(name));
        Self { plan, store, output, is_directory: false, tokens: None }
    }

    /// The files that will be there in the end.
    pub fn outputs(&self) -> Vec<PathBuf> {
        let place = |f: &FilePlan| match (self.is_directory, f.name.as_os_str().is_empty()) {
            (true, _) => self.output.join(&f.name),
            (false, true) => self.output.clone(),
            (false, false) => self.output.with_file_name(&f.name),
        };
        self.plan.files.iter().map(place).collect()
    }

    /// Streams the plan into the output, and gives it its name when complete. Returns what became of each
    /// tensor, in the plan's order.
    ///
    /// # Errors
    /// `Misuse` when the output exists (unless `force`) or is an input, when something that the plan
    /// needs is missing, or when the budget is too small; `Io`; what the source's data give.
    pub fn run(&self, force: bool, budget: &Budget, observer: &dyn Observer) -> Result<Vec<Outcome>> {
        let outputs = self.outputs();
        self.plan.check_feasible()?;
        self.plan.check_not_input(&outputs, &self.store)?;
        budget.check(&self.plan)?;
        let stage = if self.is_directory {
            let mut stage = Stage::directory(&self.output, force, self.plan.total_len())?;
            for f in &self.plan.files {
                stage.add(&f.name, f.len)?;
            }
            stage
        } else {
            let lens = self.plan.files.iter().map(|f| f.len);
            Stage::files_at(&outputs.into_iter().zip(lens).collect::<Vec<_>>(), force)?
        };
        fold::settle(&self.plan, &self.store, budget, observer)?;
        for (file, plan) in stage.files().iter().zip(&self.plan.files) {
            file.write_at(0, &plan.header)?;
        }
        let outcomes = stream::stream(&self.plan, &self.store, stage.files(), budget, observer)?;
        stage.commit()?;
        Ok(outcomes)
    }
}

/// `dir` + `name`, unless `given` is a file's path already.
fn output_path(given: Option<&Path>, beside: &Path, name: &str) -> PathBuf {
    match given {
        Some(path) if path.is_dir() => path.join(name),
        Some(path) => path.to_path_buf(),
        None => beside.join(name),
    }
}
