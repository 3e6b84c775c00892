//! What can be executed: the GGUF file that is given, a conversion to one for as long as it is needed, or a Core ML
//! package.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qconv::container::InputFile;
use qconv::container::coreml::chunks::is_model as is_coreml;
use qconv::container::gguf::is_gguf;
use qconv::container::qpack::is_qpack;
use qconv::convert::{Budget, FileType, FromQpack, HfToGguf, Job, Outcome, Sharding, Temporary, TokenCheck};
use qconv::error::{Error, Result};
use qconv::eval::coreml::CoremlModel;
use qconv::eval::engine::Engine;
use qconv::exec::Rounding;
use qconv::limits::Limits;
use qconv::verify::scan::unloadable;
use serde_json::{Value as Json, json};

use super::common::WriteArgs;
use super::ui::{self, Progress};

/// A file to run. A conversion is removed when this is dropped, or the program is ended by Ctrl-C.
pub struct Runnable {
    pub path: PathBuf,
    /// What a conversion is, where that has to be said.
    stated: Option<Stated>,
    /// For as long as this is there.
    _kept: Option<Temporary>,
}

/// How a conversion holds the weights of its source.
pub struct Stated {
    bytes: u64,
    /// Tensors with all values of the source.
    exact: usize,
    /// Of each type: tensors that it does not hold exactly, and the largest NMSE among them.
    rounded: BTreeMap<&'static str, (usize, f64)>,
    /// The command that writes the same file.
    command: String,
}

/// What becomes of matrices whose packing no type holds.
const DECODED: &str = "q8_0";

impl Runnable {
    /// A model as it is given: a GGUF file, which stays what it is, or a `.qpack` file or a Hugging Face directory,
    /// which are converted. Each tensor has the type that holds it exactly, where there is one; what is quantized
    /// otherwise has Q8_0, or F16 where rows do not fit that. How much that loses is said.
    ///
    /// # Errors
    /// As the conversion; `Unsupported` for a Core ML package, `Malformed` for a file that would end the process.
    pub fn of(path: &Path, threads: Option<u32>, quiet: bool) -> Result<Self> {
        if is_coreml(path) {
            return Err(Error::unsupported("is a Core ML package, which llama.cpp does not execute")
                .at(path)
                .hint(
                    "qconv run and qconv eval execute it; for anything else give the model it was made from",
                ));
        }
        let is_packed = path.is_file() && is_qpack(&InputFile::open(path)?)?;
        if !is_packed && !path.is_dir() {
            refuse_fatal(path)?;
            return Ok(Self { path: path.to_path_buf(), stated: None, _kept: None });
        }
        ui::catch_interrupt();
        let kept = beside(path)?;
        let output = Some(kept.path().to_path_buf());
        let (mut job, command) = if is_packed && is_gguf(path)? {
            (FromQpack { output, ..FromQpack::new(path) }.plan()?, "qconv unpack")
        } else {
            let conversion = HfToGguf {
                source: path.to_path_buf(),
                output,
                decoded: FileType::parse(DECODED),
                tokens: TokenCheck::Lenient,
                ..HfToGguf::default()
            };
            (conversion.plan()?, "qconv hf-to-gguf --decoded-type q8_0")
        };
        (job.plan.measures, job.is_trial) = (true, true);
        let threads = threads.and_then(|n| usize::try_from(n).ok());
        let outcomes = convert(&job, &Budget::new(threads, None)?, quiet)?;
        let stated = Stated::new(&job, &outcomes, command);
        if !quiet {
            // Of all that a conversion says, what keeps the model from being itself.
            job.plan.notes.iter().filter(|n| n.starts_with("warning")).for_each(|n| ui::say(n));
            ui::say(&format!("note: {}", stated.sentence()));
        }
        Ok(Self { path: job.output, stated: Some(stated), _kept: Some(kept) })
    }

    /// What would be written for a conversion whose output is `output`.
    fn conversion(of: &HfToGguf, output: &Path) -> Result<HfToGguf> {
        output.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(output))?;
        let path = Temporary::name(output, "source.gguf");
        let (quantizer, file_type, sharding) = (None, None, Sharding::Whole);
        Ok(HfToGguf { output: Some(path), quantizer, file_type, sharding, ..of.clone() })
    }

    /// The length of what [`Self::write`] writes.
    ///
    /// # Errors
    /// As a plan of the conversion.
    pub fn bytes(of: &HfToGguf, output: &Path) -> Result<u64> {
        Ok(Self::conversion(of, output)?.plan()?.plan.total_len())
    }

    /// Writes a conversion that keeps the source's precision, beside `output`.
    ///
    /// # Errors
    /// As the conversion.
    pub fn write(of: &HfToGguf, output: &Path, args: &WriteArgs) -> Result<Self> {
        let job = Job { is_trial: true, ..Self::conversion(of, output)?.plan()? };
        let quiet = args.work.quiet;
        if !quiet {
            let len = ui::size(job.plan.total_len());
            ui::say(&format!("note: a conversion of {len} that can be run lies beside the output meanwhile"));
        }
        let kept = Temporary::new(job.output.clone());
        convert(&job, &args.work.budget()?, quiet)?;
        Ok(Self { path: job.output, stated: None, _kept: Some(kept) })
    }

    /// Whether it is a conversion of what was given.
    #[cfg(feature = "ggml")]
    pub fn is_temporary(&self) -> bool {
        self.stated.is_some()
    }

    /// What JSON says of a conversion; null of a file that was given.
    pub fn json(&self) -> Json {
        self.stated.as_ref().map_or(Json::Null, Stated::json)
    }
}

/// The library that loads a model has assertions, which end the program.
fn refuse_fatal(path: &Path) -> Result<()> {
    // What is no GGUF file, the engine says.
    if !is_gguf(path)? {
        return Ok(());
    }
    let Some(found) = unloadable(path, &Limits::default())? else { return Ok(()) };
    let message = format!("would end the program that loads it: {}", found.message);
    let error =
        Error::malformed(message).at(&found.file).hint("qconv verify --scan tells all that is wrong with it");
    Err(match found.offset {
        Some(offset) => error.offset(offset),
        None => error,
    })
}

fn convert(job: &Job, budget: &Budget, quiet: bool) -> Result<Vec<Outcome>> {
    let progress = Progress::new("converting", job.plan.total_len(), quiet);
    let done = job.run(true, budget, &progress);
    progress.finish();
    done
}

impl Stated {
    fn new(job: &Job, outcomes: &[Outcome], command: &str) -> Self {
        let (mut exact, mut rounded) = (0, BTreeMap::new());
        for o in outcomes {
            match o.nmse.filter(|nmse| *nmse != 0.0) {
                None => exact += 1,
                Some(nmse) => {
                    let (n, worst) = rounded.entry(o.dtype).or_insert((0, 0f64));
                    (*n, *worst) = (*n + 1, worst.max(nmse));
                }
            }
        }
        Self { bytes: job.plan.total_len(), exact, rounded, command: command.to_string() }
    }

    fn sentence(&self) -> String {
        let Self { exact, command, .. } = self;
        let rounded = self.rounded.iter().map(|(dtype, (n, worst))| {
            format!("; {n} as {dtype} are rounded, with an NMSE of {worst:.2e} at most")
        });
        format!(
            "runs as a temporary conversion of {}, as {command} writes it: {exact} tensors are exact{}",
            ui::size(self.bytes),
            rounded.collect::<String>()
        )
    }

    fn json(&self) -> Json {
        let rounded = self
            .rounded
            .iter()
            .map(|(dtype, (n, worst))| (dtype.to_string(), json!({"tensors": n, "worst_nmse": worst})));
        let rounded: serde_json::Map<_, _> = rounded.collect();
        json!({"bytes": self.bytes, "command": self.command, "exact_tensors": self.exact, "rounded": rounded})
    }
}

/// A name of its own beside a model, or, where nothing can be written there, in the system's directory for such.
fn beside(model: &Path) -> Result<Temporary> {
    let full = model.canonicalize().map_err(|e| Error::io("open", model, e))?;
    let prefix = Temporary::name(&full, "");
    let prefix = prefix.file_name().unwrap_or_default();
    let create = |dir: &Path| tempfile::Builder::new().prefix(prefix).suffix(".gguf").tempfile_in(dir);
    let elsewhere = std::env::temp_dir();
    let created = match full.parent().map(create) {
        Some(Ok(file)) => Ok(file),
        _ => create(&elsewhere),
    };
    let path = created.and_then(|file| file.into_temp_path().keep().map_err(|e| e.error));
    path.map(Temporary::new).map_err(|e| Error::io("create a file in", elsewhere, e))
}

/// A model that the engine has loaded, and the file that it reads. Bound in this order the file goes last.
#[cfg(feature = "ggml")]
pub struct Loaded {
    pub runs: Runnable,
    pub model: qconv::ggml::Model,
}

/// Loads a model of any format ([`Runnable::of`]).
///
/// # Errors
/// As the conversion, and the engine.
#[cfg(feature = "ggml")]
pub fn load(
    path: &Path,
    options: &qconv::ggml::ModelOptions,
    threads: Option<u32>,
    quiet: bool,
) -> Result<Loaded> {
    let runs = Runnable::of(path, threads, quiet)?;
    let model = loaded(&runs, path, options)?;
    Ok(Loaded { runs, model })
}

#[cfg(feature = "ggml")]
fn loaded(runs: &Runnable, path: &Path, options: &qconv::ggml::ModelOptions) -> Result<qconv::ggml::Model> {
    let model = qconv::ggml::Model::load(&runs.path, options);
    model.map_err(|e| if runs.is_temporary() { e.moved(&runs.path, path) } else { e })
}

/// Whether `--fp16` has something to act on.
///
/// # Errors
/// `Misuse` where it has not.
pub fn check_fp16<'a>(fp16: bool, mut models: impl Iterator<Item = &'a Path>) -> Result<()> {
    match !fp16 || models.any(is_coreml) {
        true => Ok(()),
        false => Err(Error::misuse("--fp16 rounds what Core ML packages compute, and none is given")),
    }
}

/// How a model is executed.
pub struct Execution<'a> {
    pub gpu_layers: i32,
    pub lora: &'a [(PathBuf, f32)],
    /// Whether results of operations are rounded to float16, in Core ML packages.
    pub fp16: bool,
    #[cfg(feature = "ggml")]
    pub linked: Linked,
}

/// What else concerns models that llama.cpp executes.
#[cfg(feature = "ggml")]
pub struct Linked {
    /// For the conversion of those that are no GGUF file.
    pub threads: Option<u32>,
    /// Whether ggml may rearrange weights in memory.
    pub rearranges: bool,
    pub quiet: bool,
}

/// A model in memory, the file it came from, and how long it took to load it. As for [`Loaded`], the file goes last
/// where these are bound in this order.
pub struct Ready {
    pub runs: Runnable,
    pub model: Box<dyn Engine>,
    pub load: Duration,
}

/// Loads a model of any format: a Core ML package, or what llama.cpp executes ([`Runnable::of`]).
///
/// # Errors
/// As the conversion, and the engine; `Misuse` for options that the engine has not.
pub fn execute(path: &Path, execution: &Execution<'_>) -> Result<Ready> {
    if !is_coreml(path) {
        return linked(path, execution);
    }
    for (given, option) in
        [(!execution.lora.is_empty(), "--lora"), (execution.gpu_layers != 0, "--gpu-layers")]
    {
        if given {
            let message = format!("{option} is for what llama.cpp executes, this is a Core ML package");
            return Err(Error::misuse(message).at(path));
        }
    }
    let rounding = if execution.fp16 { Rounding::F16 } else { Rounding::F32 };
    let begin = Instant::now();
    let model = CoremlModel::open(path, rounding, &Limits::default())?;
    let runs = Runnable { path: path.to_path_buf(), stated: None, _kept: None };
    Ok(Ready { runs, model: Box::new(model), load: begin.elapsed() })
}

/// Says what happened to a model that its results do not show.
pub fn say_remark(path: &Path, model: &dyn Engine, quiet: bool) {
    if let Some(remark) = model.remark().filter(|_| !quiet) {
        ui::say(&format!("note: {}: {remark}", path.display()));
    }
}

#[cfg(feature = "ggml")]
fn linked(path: &Path, execution: &Execution<'_>) -> Result<Ready> {
    let options = qconv::ggml::ModelOptions {
        use_extra_bufts: execution.linked.rearranges,
        n_gpu_layers: execution.gpu_layers,
        adapters: execution.lora.to_vec(),
        ..qconv::ggml::ModelOptions::default()
    };
    let runs = Runnable::of(path, execution.linked.threads, execution.linked.quiet)?;
    let begin = Instant::now();
    let model = loaded(&runs, path, &options)?;
    Ok(Ready { runs, model: Box::new(model), load: begin.elapsed() })
}

#[cfg(not(feature = "ggml"))]
fn linked(path: &Path, _: &Execution<'_>) -> Result<Ready> {
    std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    Err(Error::unsupported("is no Core ML package, and this qconv was built without ggml")
        .at(path)
        .hint("a build with the feature ggml executes GGUF files, .qpack files and Hugging Face directories"))
}
