//! To Core ML packages: a Hugging Face directory, a GGUF file or a `.qpack` becomes an ML Program that Macs and
//! iPhones run, with its weights compressed, and the tokenizer beside it.
//!
//! Every blob's size is known before a weight is read, so that the program, which names blobs by their places, is
//! built first; then the weights are streamed.

mod fit;
mod forms;
mod package;
mod parts;
mod profile;
mod replace;
mod source;
pub mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

pub use self::forms::{Forms, Granularity, Matrices};
pub use self::profile::Profile;
pub(super) use self::replace::check as check_replaced;
pub(crate) use self::source::{Given, Opened};

use self::fit::Needs;
use self::package::{Asked, Weights};
pub(super) use self::source::SIDE;
use super::Job;
use super::plan::{FilePlan, Plan};
use super::quantizer::ImatrixChoice;
use super::to_hf::pretty;
use crate::arch::{Decoder, Ffn, Positions};
use crate::container::coreml::chunks::{CHUNKS, is_model};
use crate::container::imatrix::ImportanceMatrix;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::mil::{LEAST_EPS, Part};

/// What packages end in.
pub const SUFFIX: &str = "mlpackage";
/// Tokens of context, where nothing is said of it.
const CONTEXT: u64 = 2048;
/// The least: ranges of lengths have to be ranges.
const LEAST_CONTEXT: u64 = 4;
/// The most, as for rotations.
const MOST_CONTEXT: u64 = 1 << 20;
/// Sizes of a cache's rows that every device takes are multiples of it.
const ALIGNED: usize = 32;

/// A conversion to a Core ML package.
#[derive(Clone, Debug)]
pub struct ToCoreml {
    /// A Hugging Face directory, a GGUF file, or a `.qpack`.
    pub source: PathBuf,
    /// The package to write; default: beside the source, called after the model.
    pub output: Option<PathBuf>,
    /// What it is for.
    pub profile: Profile,
    /// How weights are encoded.
    pub forms: Forms,
    /// Tokens that the cache holds; `None`: 2048, or as many as the model was trained on.
    pub context: Option<u64>,
    /// A model of more bytes becomes several packages, each below. Of [`Profile::Ane`] only.
    pub chunk_size: u64,
    /// The importance matrix by which errors are weighed.
    pub imatrix: Option<ImatrixChoice>,
    /// The repository whose tokenizer programs fetch.
    pub model_id: Option<String>,
    /// Whether what does not fit a phone, or would be slow there, is written for one.
    pub allow_unfit: bool,
    /// Architecture, where the config's class is unknown.
    pub arch: Option<String>,
    /// A definition outside the program that is to be used instead.
    pub arch_file: Option<PathBuf>,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl ToCoreml {
    /// A source, as float16 for Macs.
    pub fn new(source: impl Into<PathBuf>) -> Self {
        Self {
            source: source.into(),
            output: None,
            profile: Profile::Gpu,
            forms: Forms::new(Matrices::Float16),
            context: None,
            chunk_size: 950 << 20,
            imatrix: None,
            model_id: None,
            allow_unfit: false,
            arch: None,
            arch_file: None,
            limits: Limits::default(),
        }
    }

    /// Opens, recognises, plans.
    ///
    /// # Errors
    /// What is no model; `Unsupported` for architectures without a graph; `Misuse` for options that do not fit.
    pub fn plan(&self) -> Result<Job> {
        self.forms.check(self.profile)?;
        let given =
            Given { path: &self.source, arch: self.arch.as_deref(), arch_file: self.arch_file.as_deref() };
        let mut opened = given.open(&self.limits)?;
        let (context, of_context) = self.context(&opened)?;
        let at = |e: Error| e.at(&self.source);
        let decoder = opened.model.decoder(context).map_err(at)?;
        let mut notes = std::mem::take(&mut opened.notes);
        notes.extend(of_context);
        notes.extend(self.remarks(&decoder));
        let imatrix = self
            .imatrix
            .as_ref()
            .map(|choice| ImportanceMatrix::open(&choice.path, &self.limits).map(Arc::new));
        let asked =
            Asked { profile: self.profile, forms: &self.forms, context, imatrix: imatrix.transpose()? };
        let mut weights = Weights::of(&opened, &decoder, &asked).map_err(at)?;
        let form = weights.form();
        let id = self.model_id.as_deref();
        weights.metadata = profile::metadata(&opened.model, id, self.profile, context, &form);
        replace::note(&mut weights.metadata, &opened.side);
        let parts = match self.profile {
            Profile::Gpu => vec![Part::Whole],
            Profile::Ane => {
                parts::divide(decoder.layers, self.chunk_size, &|part| weights.bytes(part)).map_err(at)?
            }
        };
        let output = self.output(&opened, &form, parts.len())?;
        let mut plan = Plan::new(Vec::new());
        let mut names = Vec::with_capacity(parts.len());
        for (number, part) in parts.iter().enumerate() {
            let folder = match parts.len() {
                1 => String::new(),
                _ => parts::name(number, part),
            };
            weights.package(&mut plan, Path::new(&folder), part, &opened.store).map_err(at)?;
            names.push(json!({"package": folder, "part": part_name(part), "layers": layers(part)}));
        }
        notes.extend(weights.notes());
        let needs = Needs {
            files: plan.total_len(),
            chunks: parts.len(),
            cache: Needs::cache_bytes(decoder.layers, [decoder.kv_heads, decoder.head_dim], context),
            logits: weights.vocabulary().saturating_mul(2 * self.profile.tokens(context)),
        };
        notes.push(needs.note());
        notes.extend(needs.warning(self.profile));
        plan.obstacle = needs.obstacle(self.profile, &opened.name, &form, &decoder.ffn);
        if self.allow_unfit {
            notes.extend(plan.obstacle.take().map(|obstacle| obstacle.message));
        }
        plan.notes = notes;
        let mut beside = opened.side;
        if parts.len() > 1 {
            let chunks = json!({"context": context, "packages": names});
            let small = std::iter::once((CHUNKS.to_string(), pretty(&chunks))).chain(beside.drain(..));
            plan.files.extend(small.map(|(name, bytes)| FilePlan::whole(name, bytes)));
        }
        let folder = output.parent().map(Path::to_path_buf).unwrap_or_default();
        let beside = beside.into_iter().map(|(name, bytes)| (folder.join(name), bytes)).collect();
        Ok(Job { is_package: true, beside, ..Job::directory(plan, opened.store, output) })
    }

    /// Tokens of context, and what is to be said of it.
    fn context(&self, opened: &Opened) -> Result<(u64, Option<String>)> {
        let key = format!("{}.context_length", opened.model.arch.arch);
        let trained = opened.model.metadata()?.u64(&key).filter(|n| *n > 0);
        let context = self.context.unwrap_or_else(|| trained.map_or(CONTEXT, |n| n.min(CONTEXT)));
        if !(LEAST_CONTEXT..=MOST_CONTEXT).contains(&context) {
            return Err(Error::misuse(format!(
                "--context {context}: from {LEAST_CONTEXT} to {MOST_CONTEXT} tokens are possible"
            )));
        }
        let beyond = trained.filter(|n| context > *n);
        Ok((
            context,
            beyond.map(|n| format!("the model was trained on {n} tokens, its package takes {context}")),
        ))
    }

    /// What the graph of a model means where it runs.
    fn remarks(&self, decoder: &Decoder) -> Vec<String> {
        let mut remarks = Vec::new();
        if !decoder.head_dim.is_multiple_of(ALIGNED) {
            remarks.push(format!(
                "heads have {} elements, no multiple of {ALIGNED}: some devices refuse such a cache (coremltools \
                 #2631)",
                decoder.head_dim
            ));
        }
        let of_stream = decoder.stream * decoder.stream;
        if decoder.eps * of_stream < LEAST_EPS {
            remarks.push(format!(
                "norms add {:.2e} to the variance instead of {:.2e}: float16 has nothing less",
                LEAST_EPS / of_stream,
                decoder.eps
            ));
        }
        if let Ffn::Experts { count, used, .. } = decoder.ffn {
            remarks.push(format!(
                "all {count} experts are computed for each token, which goes through {used}: a package cannot choose \
                 among compressed weights"
            ));
        }
        if decoder.positions == Positions::None {
            remarks.push("the model has no positions".into());
        }
        remarks
    }

    fn output(&self, opened: &Opened, form: &str, packages: usize) -> Result<PathBuf> {
        let name = || {
            let profile = self.profile.name();
            format!("{}-{form}-{profile}.{SUFFIX}", opened.name)
        };
        let is_called_so = |path: &Path| path.extension().is_some_and(|e| e == SUFFIX);
        let output = match &self.output {
            None => opened.beside.join(name()),
            Some(dir) if dir.is_dir() && !is_model(dir) && !is_called_so(dir) => dir.join(name()),
            Some(output) => output.clone(),
        };
        match (packages, is_called_so(&output)) {
            (1, true) | (2.., false) => Ok(output),
            (1, false) => {
                Err(Error::misuse(format!("a package is called NAME.{SUFFIX}: Macs know it by that"))
                    .at(&output)
                    .hint(format!("-o {}.{SUFFIX}", output.display())))
            }
            _ => Ok(output.with_extension("")),
        }
    }
}

fn part_name(part: &Part) -> &'static str {
    match part {
        Part::Whole => "model",
        Part::Embedding => "embedding",
        Part::Layers(_) => "layers",
        Part::Head => "head",
    }
}

/// The first layer, and the one behind the last.
fn layers(part: &Part) -> Option<[usize; 2]> {
    match part {
        Part::Layers(layers) => Some([layers.start, layers.end]),
        _ => None,
    }
}
