//! Verification: reads a finished file as a stranger would, and compares it with its source.
//!
//! Each check is small and says what it found: structure, tensors against the bound their type
//! promises, token parity, and a forward pass. Nothing here trusts what the conversion knew.

mod chat;
mod coreml;
mod qpack;
pub mod scan;
mod tensors;

#[cfg(feature = "ggml")]
mod engine;
#[cfg(feature = "ggml")]
mod logits;

#[cfg(feature = "ggml")]
pub use logits::{Comparison, Departure, Place, Proof};
pub use tensors::TensorCheck;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::arch::PROJECTOR;
use crate::container::gguf::Gguf;
use crate::container::qpack::Qpack;
use crate::convert::{Budget, HfToGguf, MergeLora, Observer, TokenCheck};
use crate::diff::TensorDiff;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;

/// What to verify, and how thoroughly.
#[derive(Clone, Debug)]
pub struct Options {
    /// A GGUF or `.qpack` file, any shard of it; a Core ML package, or a directory of them.
    pub file: PathBuf,
    /// Its source: a Hugging Face directory or a GGUF file; of a `.qpack` file, a model of any format; of a
    /// package, what packages are made of.
    pub against: Option<PathBuf>,
    /// Elements to look at in each tensor; `None` looks at all.
    pub sample: Option<u64>,
    /// Whether to run a forward pass.
    pub forward: bool,
    /// Whether to compare logits with the source's, instead of the forward pass.
    pub logits: Option<LogitsOptions>,
    /// Architecture and pre-tokenizer that the conversion was told.
    pub arch: Option<String>,
    /// See `arch`.
    pub arch_file: Option<PathBuf>,
    /// See `arch`.
    pub pre: Option<String>,
    /// Whether llama.cpp's tokens must be those of the source's tokenizer.
    pub tokens: TokenCheck,
    /// Adapters that the conversion merged into the weights.
    pub merge_lora: Vec<MergeLora>,
    /// Bounds on what files may demand.
    pub limits: Limits,
}

impl Options {
    /// All checks of `file` alone.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self {
            file: file.into(),
            against: None,
            sample: None,
            forward: true,
            logits: None,
            arch: None,
            arch_file: None,
            pre: None,
            tokens: TokenCheck::default(),
            merge_lora: Vec::new(),
            limits: Limits::default(),
        }
    }
}

/// How logits are compared.
#[derive(Clone, Debug)]
pub struct LogitsOptions {
    /// Tokens of the text, at most.
    pub tokens: usize,
    /// Bytes that the source's forward pass may take; `None`: what is free.
    pub memory: Option<u64>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Nothing to object.
    Passed,
    /// The file is not what it should be.
    Failed,
    /// Could not be checked; the detail says why.
    Skipped,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found.
    pub detail: String,
}

/// All checks of a file.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The file.
    pub file: PathBuf,
    /// Its source, where one was given.
    pub against: Option<PathBuf>,
    /// The checks, in order.
    pub checks: Vec<Check>,
    /// Each tensor compared.
    pub tensors: Vec<TensorCheck>,
    /// The same of a `.qpack` file, its source first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub compared: Vec<TensorDiff>,
    /// The logits beside the source's.
    #[cfg(feature = "ggml")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
}

impl Report {
    /// Whether no check failed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|c| c.outcome != Outcome::Failed)
    }

    /// The tensor with the largest error relative to its own size.
    pub fn worst(&self) -> Option<&TensorCheck> {
        self.tensors.iter().max_by(|a, b| a.relative_rmse.total_cmp(&b.relative_rmse))
    }

    fn add(&mut self, name: &'static str, result: Result<(Outcome, String)>) {
        let (outcome, detail) = match result {
            Ok(found) => found,
            Err(e) => (Outcome::Failed, e.to_string()),
        };
        self.checks.push(Check { name, outcome, detail });
    }
}

/// Runs the checks.
///
/// # Errors
/// Only what keeps the checks from being made: no such file, an unreadable source, an interrupt.
/// What is wrong with the file itself is in the report.
pub fn verify(options: &Options, budget: &Budget, observer: &dyn Observer) -> Result<Report> {
    let mut report = Report {
        file: options.file.clone(),
        against: options.against.clone(),
        checks: Vec::new(),
        tensors: Vec::new(),
        compared: Vec::new(),
        #[cfg(feature = "ggml")]
        proof: None,
    };
    if coreml::is_meant(&options.file) {
        coreml::check(&mut report, options, budget, observer)?;
        return Ok(report);
    }
    if qpack::is_meant(&options.file)? {
        qpack::check(&mut report, options, budget, observer)?;
        return Ok(report);
    }
    let gguf = match Gguf::open(&options.file, &options.limits) {
        Ok(gguf) => gguf,
        Err(e) if matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Limit | ErrorKind::Unsupported) => {
            report.add("structure", Err(e));
            return Ok(report);
        }
        Err(e) => return Err(e),
    };
    let tensors = gguf.store.tensors().len();
    report.add(
        "structure",
        gguf.check_model().map(|()| {
            let entries = gguf.metadata.0.len();
            (Outcome::Passed, format!("GGUF v{}, {tensors} tensors, {entries} metadata", gguf.version))
        }),
    );

    let source = match &options.against {
        Some(path) => Some(SourceModel::open(path, options, is_projector(&gguf))?),
        None => None,
    };
    let compared = tensors::compare(&gguf, source.as_ref(), options.sample, observer);
    if let Err(e) = &compared
        && e.kind() == ErrorKind::Interrupted
    {
        return Err(Error::interrupted());
    }
    let compared = compared.map(|(checks, outcome, detail)| {
        report.tensors = checks;
        (outcome, detail)
    });
    report.add("tensors", compared);
    if let Some(found) = chat::check(&gguf.metadata) {
        report.add("chat template", Ok(found));
    }
    #[cfg(feature = "ggml")]
    engine::check(&mut report, &gguf, source.as_ref(), options, budget, observer)?;
    #[cfg(not(feature = "ggml"))]
    report.add(
        "engine",
        Ok((Outcome::Skipped, "token parity and forward pass need a build with the feature ggml".into())),
    );
    Ok(report)
}

/// Bytes that [`verify`] tells an observer of, about.
///
/// # Errors
/// `Io`.
pub fn bytes_to_read(options: &Options) -> Result<u64> {
    let io = |e| Error::io("open", &options.file, e);
    if coreml::is_meant(&options.file) {
        return Ok(coreml::bytes(&options.file, &options.limits));
    }
    let file = std::fs::metadata(&options.file).map_err(io)?.len();
    if !options.file.is_file() || !qpack::is_meant(&options.file)? {
        return Ok(file);
    }
    let Ok(model) = Qpack::open(&options.file, &options.limits) else { return Ok(file) };
    let bytes: u64 = model.manifests().flat_map(|(_, m)| m.segments()).map(|s| s.bytes).sum();
    Ok(bytes.saturating_mul(2 + u64::from(options.against.is_some())))
}

fn is_projector(gguf: &Gguf) -> bool {
    gguf.metadata.str("general.architecture") == Some(PROJECTOR)
}

/// The source to compare with.
enum SourceModel {
    /// A Hugging Face directory.
    HuggingFace(Box<HfToGguf>),
    /// Another GGUF file.
    Gguf(Box<Gguf>),
}

impl SourceModel {
    fn open(path: &Path, options: &Options, mmproj: bool) -> Result<Self> {
        if path.is_file()
            && let Ok(gguf) = Gguf::open(path, &options.limits)
        {
            return Ok(Self::Gguf(Box::new(gguf)));
        }
        Ok(Self::HuggingFace(Box::new(HfToGguf {
            source: path.to_path_buf(),
            mmproj,
            arch: options.arch.clone(),
            arch_file: options.arch_file.clone(),
            pre: options.pre.clone(),
            // The finished file's are looked at, not those of a conversion.
            tokens: TokenCheck::Skipped,
            merge_lora: options.merge_lora.clone(),
            limits: options.limits.clone(),
            ..HfToGguf::default()
        })))
    }
}
