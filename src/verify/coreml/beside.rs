//! The logits of a package beside those of the linked llama.cpp: with the source's weights, and with the package's own,
//! which say of any number of bits whether the package computes what it should.

use super::super::{Options, Outcome};
use crate::convert::{Budget, Observer};
use crate::error::Result;
use crate::eval::logits::Matrix;

/// What is compared.
#[cfg_attr(not(feature = "ggml"), allow(dead_code, reason = "llama.cpp is what it is compared with"))]
pub(super) struct Case<'a> {
    pub(super) options: &'a Options,
    pub(super) ids: &'a [i32],
    /// What the package gives for these.
    pub(super) logits: &'a Matrix,
    /// Least bits of a weight.
    pub(super) bits: f64,
    /// Tokens that the smallest window of the source's layers holds: llama.cpp may have none.
    pub(super) window: Option<u64>,
    pub(super) budget: &'a Budget,
    pub(super) observer: &'a dyn Observer,
}

#[cfg(not(feature = "ggml"))]
pub(super) fn check(_: &Case<'_>) -> Result<(Outcome, String)> {
    Ok((Outcome::Skipped, "logits beside llama.cpp's need a build with the feature ggml".into()))
}

#[cfg(feature = "ggml")]
pub(super) use linked::check;

#[cfg(feature = "ggml")]
mod linked {
    use std::path::{Path, PathBuf};

    use super::super::super::engine::{FORWARD_SOURCE, TempFile, allowed, conversion};
    use super::super::super::logits::check_memory;
    use super::super::super::{LogitsOptions, SourceModel};
    use super::super::tokenizer::beside;
    use super::*;
    use crate::container::coreml::package::is_package;
    use crate::convert::{FileType, HfToGguf, ToHf, TokenCheck};
    use crate::error::{Error, ErrorKind};
    use crate::eval::logits::{self, Agreement, compare};
    use crate::tensor::DType;

    /// How far logits may stray from those of llama.cpp with the same weights, as root mean square over their spread:
    /// it adds in another order, and graphs round norms to float16.
    const OWN: f64 = 0.02;

    /// Bits of a weight below which the source's logits say little.
    const FEW: f64 = 8.0;
    /// Bytes of decoded weights that are run without --logits.
    const UNASKED: u64 = 512 << 20;

    /// What was found, or why nothing was.
    type Found = std::result::Result<Agreement, String>;

    impl Case<'_> {
        /// Tokens that are compared, and what the package gives for them: those of a window, since what comes later
        /// changes nothing of what is before.
        fn part(&self) -> (&[i32], Matrix) {
            let window = self.window.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
            let n = self.ids.len().min(window.max(1));
            let columns = self.logits.columns;
            (&self.ids[..n], Matrix { columns, values: self.logits.values[..n * columns].to_vec() })
        }

        /// Beside what llama.cpp computes with the GGUF file at `path`.
        fn compare(&self, path: &Path) -> Result<Found> {
            let (ids, found) = self.part();
            match logits::forward(path, ids, self.budget.threads as u32) {
                Ok(wanted) => Ok(Ok(compare(&found, &wanted)?)),
                Err(e) if e.kind() == ErrorKind::Unsupported => Ok(Err(e.to_string())),
                Err(e) => Err(e),
            }
        }

        /// Beside the source.
        fn source(&self) -> Result<Found> {
            let options = self.options;
            let source = match &options.against {
                Some(path) => SourceModel::open(path, options, false)?,
                None => return Ok(Err("there is no source".into())),
            };
            let scratch = TempFile::beside(&options.file);
            let path = match (conversion(Some(&source), options, None, &scratch.0)?, &options.against) {
                (Some(job), _) if job.plan.total_len() > FORWARD_SOURCE => {
                    return Ok(Err("the source is too large to run beside it".into()));
                }
                (Some(job), _) => {
                    job.run(true, self.budget, self.observer)?;
                    job.output
                }
                (None, Some(path)) => path.clone(),
                (None, None) => return Ok(Err("the source has no file".into())),
            };
            self.compare(&path)
        }

        /// Beside the package's own weights, decoded, in a GGUF file of F32.
        fn own(&self) -> Result<Found> {
            let options = self.options;
            let path = options.file.as_path();
            let dir = if is_package(path) { beside(path) } else { path };
            if !dir.join("config.json").is_file() {
                return Ok(Err("there is no config.json beside the package".into()));
            }
            let scratch = tempfile::Builder::new().prefix(".qconv-own-").tempdir_in(beside(path));
            let scratch = scratch.map_err(|e| Error::io("write", beside(path), e))?;
            let [back, gguf] = ["model", "model.gguf"].map(|name| scratch.path().join(name));
            let (arch_file, limits) = (options.arch_file.clone(), options.limits.clone());
            let to_hf = ToHf { dtype: Some(DType::F32), arch_file, limits, ..ToHf::new(path, &back) };
            let job = match to_hf.plan() {
                Ok(job) => job,
                Err(e) => return unless_io(e),
            };
            let bytes = job.plan.total_len();
            let most = if options.logits.is_some() { FORWARD_SOURCE } else { UNASKED };
            if bytes > most {
                let mib = bytes >> 20;
                return Ok(Err(format!(
                    "they take {mib} MiB decoded, and --logits was not given, or is too little"
                )));
            }
            let how = options.logits.clone().unwrap_or(LogitsOptions { tokens: 0, memory: None });
            if let Err(e) = check_memory("running its decoded weights", bytes.saturating_mul(2), &how) {
                return Ok(Err(e.to_string()));
            }
            job.run(true, self.budget, self.observer)?;
            let job = HfToGguf {
                source: back,
                output: Some(PathBuf::from(&gguf)),
                file_type: FileType::parse("f32"),
                arch: options.arch.clone(),
                arch_file: options.arch_file.clone(),
                pre: options.pre.clone(),
                tokens: TokenCheck::Skipped,
                limits: options.limits.clone(),
                ..HfToGguf::default()
            };
            let job = match job.plan() {
                Ok(job) => job,
                Err(e) => return unless_io(e),
            };
            job.run(true, self.budget, self.observer)?;
            self.compare(&gguf)
        }
    }

    /// Why something cannot be made of the package.
    fn unless_io(e: Error) -> Result<Found> {
        match e.kind() {
            ErrorKind::Io | ErrorKind::Interrupted => Err(e),
            _ => Ok(Err(e.to_string())),
        }
    }

    fn words(found: &Agreement) -> String {
        let (far, same, rows) = (found.rel_rms, found.argmax_agree, found.rows);
        format!("{far:.2e} of their spread, same largest at {same} of {rows}")
    }

    /// With the source's weights; where it was asked for, or few bits promise little, with the package's own too.
    pub(in super::super) fn check(case: &Case<'_>) -> Result<(Outcome, String)> {
        let (most, tokens) = (allowed(case.bits), case.part().0.len());
        let source = case.source()?;
        let mut passed = true;
        let mut said = match &source {
            Ok(found) => {
                passed &= found.finite && most.is_none_or(|most| found.rel_rms <= most);
                format!("they differ from those of the source by llama.cpp by {}", words(found))
            }
            Err(why) => format!("not compared with the source's: {why}"),
        };
        let own = match case.options.logits.is_some() || case.bits < FEW {
            true => Some(case.own()?),
            false => None,
        };
        match &own {
            Some(Ok(found)) => {
                passed &= found.finite && found.rel_rms <= OWN;
                said += &format!("; from llama.cpp's with the package's own weights by {}", words(found));
                said += &format!(" ({OWN} is allowed)");
            }
            Some(Err(why)) => said += &format!("; not compared with its own weights: {why}"),
            None => {}
        }
        // So few bits promise nothing of the source.
        let is_told = matches!(own, Some(Ok(_))) || (source.is_ok() && most.is_some());
        let outcome = match (passed, is_told) {
            (false, _) => Outcome::Failed,
            (true, true) => Outcome::Passed,
            (true, false) => Outcome::Skipped,
        };
        Ok((outcome, format!("{tokens} tokens: {said}")))
    }
}
