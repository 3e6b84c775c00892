//! Conversions. Each is the same six steps: open, recognise, plan, stream, finish, verify.
//!
//! [`HfToGguf`], [`LoraToGguf`], [`ToHf`] and [`Quantize`] open their source, recognise it, and make a
//! [`Plan`]; [`Job::run`] streams and finishes it. Verification stands in [`crate::verify`],
//! since it reads the finished file as a stranger would.

mod adapter;
mod checkpoint;
mod compress;
mod edits;
mod fold;
mod from_qpack;
mod gather;
mod general;
mod guide;
mod hf_to_gguf;
mod inputs;
mod journal;
mod lora_to_gguf;
mod low_rank;
mod model_id;
mod moved;
mod outcome;
mod pack;
mod plan;
mod quantize;
mod quantizer;
mod readers;
mod recipe;
mod sentence;
mod shards;
mod side_files;
mod stage;
mod stream;
pub mod to_coreml;
mod to_hf;
mod to_qpack;
mod tokens;
mod types;

pub use checkpoint::{Checkpoint, GGUF_METADATA_FILE, quantization};
pub use compress::{Recompressed, recompress};
pub use edits::MetadataEdits;
pub use fold::{Factor, FoldPlan, Folding};
pub use from_qpack::FromQpack;
pub use gather::{Scratch, Source, identity};
pub use guide::{MethodChoice, Way, parse_method, parse_tensor_method, strip_awq};
pub use hf_to_gguf::{HfToGguf, MergeLora, source_tensors};
pub use inputs::refuse_inputs;
pub use journal::Journal;
pub use lora_to_gguf::LoraToGguf;
pub use moved::Moved;
pub use outcome::{Fallback, Outcome, OutputError};
pub use pack::{Origin, Packing, PartPlan};
pub use plan::{Budget, FilePlan, Guide, Importance, Obstacle, Plan, Rounding, TensorPlan};
pub use quantize::Quantize;
pub use quantizer::{ImatrixChoice, Quantizer};
pub use recipe::{Choice, ModelFacts, Overrides, Recipe, Role, parse_tensor_type};
pub use shards::{Reshard, Sharding};
pub use side_files::SideFiles;
pub use stage::{OutputFile, Resume, Stage, Temporary};
pub use stream::{Observer, Silent};
pub use to_coreml::{Forms, Granularity, Matrices, Profile, ToCoreml};
pub use to_hf::{HfContainer, ToHf, Wanted};
pub use to_qpack::ToQpack;
pub use tokens::{TokenCheck, Tokens};
pub use types::{FILE_TYPES, FileType, base_name};

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use self::inputs::{Known, refused};
use self::stage::Outputs;
use crate::container::qpack::Qpack;
use crate::container::{InputFile, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::work::spawn;

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
    /// A `.qpack` that is read, whose bytes have to be those of its manifest.
    pub vouched: Option<PathBuf>,
    /// Whether the output is tried and removed: nothing is kept of it when that is interrupted.
    pub is_trial: bool,
    /// Whether the output is a Core ML package, or a directory of some: one that exists goes as a whole.
    pub is_package: bool,
    /// Small files that appear beside the output, at these paths. Those that are there already, and the same, stay.
    pub beside: Vec<(PathBuf, Vec<u8>)>,
}

impl Job {
    /// A job that writes a GGUF file, or its shards, beside each other.
    pub fn gguf(plan: Plan, store: Store, output: &Path) -> Self {
        let first = plan.files.first().map(|f| f.name.as_path()).filter(|n| !n.as_os_str().is_empty());
        let output = first.map_or_else(|| output.to_path_buf(), |name| output.with_file_name(name));
        Self::new(plan, store, output, false)
    }

    /// A job that writes a directory.
    pub fn directory(plan: Plan, store: Store, output: PathBuf) -> Self {
        Self::new(plan, store, output, true)
    }

    /// The same, compared with the manifest before anything appears where `source` is a `.qpack`.
    ///
    /// # Errors
    /// `Io`.
    pub fn vouching(self, source: &Path) -> Result<Self> {
        let vouched = side_files::is_qpack_file(source)?.then(|| source.to_path_buf());
        Ok(Self { vouched, ..self })
    }

    fn new(plan: Plan, store: Store, output: PathBuf, is_directory: bool) -> Self {
        Self {
            plan,
            store,
            output,
            is_directory,
            tokens: None,
            vouched: None,
            is_trial: false,
            is_package: false,
            beside: Vec::new(),
        }
    }

    /// Bytes that are written or read over again while it runs: what progress counts.
    pub fn work(&self) -> u64 {
        let vouched = self.vouched.iter().flat_map(|_| self.store.files()).map(InputFile::len);
        self.plan.work() + vouched.sum::<u64>()
    }

    /// The files that will be there in the end.
    pub fn outputs(&self) -> Vec<PathBuf> {
        let place = |f: &FilePlan| match (self.is_directory, f.name.as_os_str().is_empty()) {
            (true, _) => self.output.join(&f.name),
            (false, true) => self.output.clone(),
            (false, false) => self.output.with_file_name(&f.name),
        };
        self.plan.files.iter().map(place).chain(self.beside.iter().map(|(path, _)| path.clone())).collect()
    }

    /// Streams the plan into the output, and gives it its name when complete. Returns what became of each
    /// tensor, in the plan's order. What an earlier process has finished of the same output is not done again.
    ///
    /// # Errors
    /// `Misuse` when the output exists (unless `force`) or is an input, when something that the plan
    /// needs is missing, or when the budget is too small; `Io`; what the source's data give.
    pub fn run(&self, force: bool, budget: &Budget, observer: &dyn Observer) -> Result<Vec<Outcome>> {
        self.run_resuming(force, Resume::Gladly, budget, observer)
    }

    /// The same, going on with what an earlier process left as is wished. What is finished is kept when this is
    /// interrupted or the disk is full, unless it is little.
    ///
    /// # Errors
    /// As [`Self::run`]; `Misuse` when it must be gone on with and cannot.
    pub fn run_resuming(
        &self,
        force: bool,
        resume: Resume,
        budget: &Budget,
        observer: &dyn Observer,
    ) -> Result<Vec<Outcome>> {
        let outputs = self.outputs();
        self.plan.check_feasible(force)?;
        self.check_not_input()?;
        budget.check(&self.plan)?;
        let stage = self.begin(&outputs, force, resume)?;
        let beside = self.begin_beside(force)?;
        let done = self.write(&stage, stage.journal(), budget, observer);
        match done {
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::Io) && self.is_much(&stage) => {
                stage.keep();
                Err(e.hint("what is finished is kept: the same command goes on from there"))
            }
            done => {
                let commit = |outcomes| {
                    if self.is_package {
                        to_coreml::check_replaced(self)?;
                    }
                    beside.map_or(Ok(()), Stage::commit)?;
                    stage.commit().map(|()| outcomes)
                };
                done.and_then(commit).map_err(|e| self.left_by(e))
            }
        }
    }

    /// Whether what is finished is worth keeping.
    fn is_much(&self, stage: &Stage) -> bool {
        let least = if self.plan.tensors.iter().any(TensorPlan::takes_long) { 1 } else { KEPT };
        stage.journal().is_some_and(|journal| journal.bytes() >= least)
    }

    fn write(
        &self,
        stage: &Stage,
        journal: Option<&Journal>,
        budget: &Budget,
        observer: &dyn Observer,
    ) -> Result<Vec<Outcome>> {
        fold::settle(&self.plan, &self.store, budget, observer)?;
        pack::survey(&self.plan, &self.store, budget, observer)?;
        for (file, plan) in stage.files().iter().zip(&self.plan.files) {
            file.write_at(0, &plan.header)?;
        }
        let failed = AtomicBool::new(false);
        let seen = |bytes: u64| {
            observer.advance(bytes, "checksums");
            !observer.interrupted() && !failed.load(Ordering::Relaxed)
        };
        let endings = || self.plan.files.iter().filter_map(|f| f.ending.as_ref());
        // One long file after the other is summed up by one thread beside the others.
        let (outcomes, prepared) = std::thread::scope(|scope| {
            let prepare = || endings().try_for_each(|e| e.prepare(1, &seen));
            let beside =
                (budget.threads > 1 && endings().next().is_some()).then(|| spawn(scope, prepare)).flatten();
            let outcomes = stream::stream(&self.plan, &self.store, stage.files(), journal, budget, observer);
            failed.store(outcomes.is_err(), Ordering::Relaxed);
            let prepared =
                beside.map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
            (outcomes, prepared.unwrap_or(Ok(())))
        });
        let outcomes = outcomes?;
        prepared?;
        if let Some(path) = &self.vouched {
            vouch(path, budget.threads, &seen)?;
        }
        let mut seals = Vec::new();
        for (file, plan) in stage.files().iter().zip(&self.plan.files) {
            let Some(ending) = &plan.ending else { continue };
            let read = |at: u64, bytes: &mut [u8]| file.read_at(at, bytes);
            let write = |at: u64, bytes: &[u8]| file.write_at(at, bytes);
            ending.write(budget.threads, &mut seals, &read, &write, &seen)?;
        }
        Ok(outcomes)
    }

    fn begin(&self, outputs: &[PathBuf], force: bool, resume: Resume) -> Result<Stage> {
        let goes_on = !self.is_trial && !self.is_package;
        let key = goes_on.then(|| journal::key(&self.plan, &self.store)).transpose()?;
        let going = key.as_deref().map(|key| (key, resume));
        if going.is_none() && resume == Resume::Must {
            return Err(Error::misuse("--resume: a Core ML package is begun anew").at(&self.output));
        }
        if self.is_directory {
            if self.is_package {
                to_coreml::check_replaced(self)?;
            }
            let files: Vec<_> = self.plan.files.iter().map(|f| (f.name.clone(), f.len)).collect();
            let (target, replaces) = (self.output.as_path(), self.is_package);
            return Stage::begin(&Outputs::Directory { target, files: &files, replaces }, force, going);
        }
        let lens = self.plan.files.iter().map(|f| f.len);
        let targets: Vec<_> = outputs.iter().cloned().zip(lens).collect();
        Stage::begin(&Outputs::Files(&targets), force, going)
    }
}

/// Whether a file is called as those are that lie beside weights: configurations, vocabularies, templates, texts.
fn is_side(path: &Path) -> bool {
    const ENDINGS: [&str; 7] = ["json", "txt", "model", "jinja", "py", "md", "yaml"];
    path.extension().is_some_and(|ending| ENDINGS.iter().any(|e| ending.eq_ignore_ascii_case(e)))
}

impl Job {
    /// Refuses an output that is one of the inputs, under whatever name, or a file of the kinds that lie beside weights
    /// and say what they are, and a directory whose old content goes where an input is a part of that. A second name of an input (a hard link) may be replaced: the input stays.
    ///
    /// # Errors
    /// `Misuse` naming the file.
    pub fn check_not_input(&self) -> Result<()> {
        let known = Known::of(self.store.files().iter().map(InputFile::path));
        let directory = if self.is_directory { self.output.canonicalize().ok() } else { None };
        let inputs: Vec<PathBuf> =
            self.store.files().iter().filter_map(|f| f.path().canonicalize().ok()).collect();
        for output in self.outputs() {
            let Ok(output) = output.canonicalize() else { continue };
            if known.has(&output) {
                return Err(refused(&output));
            }
            let is_beside =
                !self.is_directory && inputs.iter().any(|input| input.parent() == output.parent());
            if is_beside && is_side(&output) {
                return Err(refused(&output));
            }
        }
        let goes = |input: &&PathBuf| {
            directory.as_ref().is_some_and(|directory| {
                let is_direct = input.parent() == Some(directory.as_path()) && stage::is_stale(input);
                is_direct || (self.is_package && input.starts_with(directory))
            })
        };
        inputs.iter().find(goes).map_or(Ok(()), |input| Err(refused(input)))
    }

    /// What an interruption leaves of a package, said.
    fn left_by(&self, e: Error) -> Error {
        if !self.is_package || e.kind() != ErrorKind::Interrupted {
            return e;
        }
        let output = self.output.display();
        e.hint(match self.output.exists() {
            true => format!("{output} is what it was before"),
            false => format!("nothing was written: there is no {output}"),
        })
    }

    /// Begins the files beside the output that are not there already.
    fn begin_beside(&self, force: bool) -> Result<Option<Stage>> {
        let is_there = |path: &Path, bytes: &[u8]| std::fs::read(path).is_ok_and(|found| found == bytes);
        let new = |(path, bytes): &&(PathBuf, Vec<u8>)| !is_there(path, bytes);
        let new: Vec<_> = self.beside.iter().filter(new).collect();
        if new.is_empty() {
            return Ok(None);
        }
        let targets: Vec<_> = new.iter().map(|(path, bytes)| (path.clone(), bytes.len() as u64)).collect();
        let stage = Stage::files_at(&targets, force)?;
        for (file, (_, bytes)) in stage.files().iter().zip(new) {
            file.write_at(0, bytes)?;
        }
        Ok(Some(stage))
    }
}

/// Fewer finished bytes are not kept when a conversion is interrupted: they are quickly done again.
const KEPT: u64 = 16 << 20;

/// That a `.qpack` is the one that its manifest describes.
///
/// # Errors
/// `Malformed` with the first tensor that is not; `Io`; `Interrupted` as `seen` says.
fn vouch(path: &Path, threads: usize, seen: &(dyn Fn(u64) -> bool + Sync)) -> Result<()> {
    let faults = Qpack::open(path, &Limits::default())?.verify(threads, seen)?;
    match faults.first() {
        None => Ok(()),
        Some(fault) => Err(Error::malformed(format!("{}: its SHA-256 is another", fault.part))
            .at(&fault.path)
            .hint("the file is damaged: fetch it again; qconv verify lists all that is")),
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
