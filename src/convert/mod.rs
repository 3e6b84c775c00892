//! Conversions. Each is the same six steps: open, recognise, plan, stream, finish, verify.
//!
//! [`HfToGguf`], [`GgufToHf`] and [`Quantize`] open their source, recognise it, and make a
//! [`Plan`]; [`Job::run`] streams and finishes it. Verification stands in [`crate::verify`],
//! since it reads the finished file as a stranger would.

mod checkpoint;
mod gather;
mod general;
mod gguf_to_hf;
mod hf_to_gguf;
mod model_id;
mod plan;
mod quantize;
mod recipe;
mod stage;
mod stream;
mod types;

pub use checkpoint::{Checkpoint, GGUF_METADATA_FILE, read_side_file};
pub use gather::{Scratch, Source};
pub use gguf_to_hf::GgufToHf;
pub use hf_to_gguf::{HfToGguf, MetadataEdits, identity, source_tensors};
pub use plan::{Budget, FilePlan, Plan, TensorPlan};
pub use quantize::Quantize;
pub use recipe::{Choice, ModelFacts, Overrides, Recipe, Role, parse_tensor_type};
pub use stage::{OutputFile, Stage};
pub use stream::{Observer, Silent};
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
    /// The file, or the directory, that will appear.
    pub output: PathBuf,
    /// Whether `output` is a directory of `plan.files`.
    pub is_directory: bool,
}

impl Job {
    /// Streams the plan into the output, and gives it its name when complete.
    ///
    /// # Errors
    /// `Misuse` when the output exists (unless `force`) or is an input; `Io`; what the source's
    /// data give.
    pub fn run(&self, force: bool, budget: &Budget, observer: &dyn Observer) -> Result<()> {
        self.check_not_input()?;
        let bytes = self.plan.total_len();
        let stage = if self.is_directory {
            let mut stage = Stage::directory(&self.output, force, bytes)?;
            for f in &self.plan.files {
                stage.add(&f.name, f.len)?;
            }
            stage
        } else {
            Stage::file(&self.output, force, bytes)?
        };
        for (file, plan) in stage.files().iter().zip(&self.plan.files) {
            file.write_at(0, &plan.header)?;
        }
        stream::stream(&self.plan, &self.store, stage.files(), budget, observer)?;
        stage.commit()
    }

    fn check_not_input(&self) -> Result<()> {
        let outputs: Vec<PathBuf> = if self.is_directory {
            self.plan.files.iter().map(|f| self.output.join(&f.name)).collect()
        } else {
            vec![self.output.clone()]
        };
        self.plan.check_not_input(&outputs, &self.store)
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
