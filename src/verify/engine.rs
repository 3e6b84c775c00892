//! Checks that run the file in the linked llama.cpp: token parity, forward pass.

use std::path::Path;

use super::{Options, Outcome, Report, SourceModel};
use crate::container::InputFile;
use crate::container::gguf::Gguf;
use crate::container::qpack::is_qpack;
use crate::convert::{Budget, FileType, FromQpack, HfToGguf, Job, Observer, TokenCheck};
use crate::error::{Error, Result};
use crate::eval::{embed, logits, parity};
use crate::ggml::{Model, ModelOptions};
use crate::tensor::DType;
use crate::vocab::{self, Vocab};

/// Tokens of the forward pass.
const FORWARD_TOKENS: usize = 32;
/// A source of up to this many bytes is converted for the forward comparison.
pub(super) const FORWARD_SOURCE: u64 = 8 << 30;

pub(super) fn check(
    report: &mut Report,
    gguf: &Gguf,
    source: Option<&SourceModel>,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    if gguf.metadata.str("tokenizer.ggml.model").is_none_or(|m| m == "no_vocab" || m == "none") {
        report.add("tokens", Ok((Outcome::Skipped, "the file has no vocabulary".into())));
    } else if options.tokens == TokenCheck::Skipped {
        report.add("tokens", Ok((Outcome::Skipped, "not asked for".into())));
    } else {
        report.add("tokens", tokens(gguf, source, options));
    }
    if observer.interrupted() {
        return Err(Error::interrupted());
    }
    if let (Some(how), Some(source)) = (&options.logits, source) {
        super::logits::check(report, gguf, source, options, how, budget, observer)?;
    } else if super::is_projector(gguf) {
        report.add("forward", Ok((Outcome::Skipped, "projectors are not run".into())));
    } else if options.forward {
        let found = forward(gguf, source, options, budget, observer);
        report.add("forward", found);
    }
    Ok(())
}

/// The same ids from the `tokenizers` library and from llama.cpp.
fn tokens(gguf: &Gguf, source: Option<&SourceModel>, options: &Options) -> Result<(Outcome, String)> {
    // Refuses what llama.cpp would stop the process over.
    let vocab = Vocab::from_metadata(&gguf.metadata)?;
    let (tokenizer, user_defined) = match source {
        Some(SourceModel::HuggingFace(hf)) => {
            let side = hf.side_files()?;
            let dir = side.dir();
            (vocab::reference_tokenizer(dir)?, vocab::user_defined_pieces(dir)?)
        }
        _ => (rebuilt(&vocab)?, Vec::new()),
    };
    let model = Model::load(&options.file, &ModelOptions { vocab_only: true, ..ModelOptions::default() })?;
    let found = parity::compare(&tokenizer, &model, &user_defined)?;
    Ok(match (found.agrees(), options.tokens) {
        (true, _) => (Outcome::Passed, found.to_string()),
        (false, TokenCheck::Required) => (Outcome::Failed, found.to_string()),
        (false, _) => (Outcome::Passed, format!("allowed to differ: {found}")),
    })
}

/// The tokenizer that a Hugging Face directory made from this vocabulary would have.
fn rebuilt(vocab: &Vocab) -> Result<tokenizers::Tokenizer> {
    let files = vocab.write_hf()?;
    let (_, json) = files
        .iter()
        .find(|(name, _)| name == "tokenizer.json")
        .ok_or_else(|| Error::unsupported("no tokenizer.json can be made from this vocabulary"))?;
    tokenizers::Tokenizer::from_bytes(json)
        .map_err(|e| Error::malformed(format!("the vocabulary is faulty: {e}")))
}

/// How far logits may stray from the source's, as root mean square over their spread; beyond, the
/// layout is wrong rather than the precision low. `None`: the type promises nothing.
pub(super) fn tolerance(dtypes: impl Iterator<Item = DType>) -> Option<f64> {
    allowed(dtypes.map(DType::bits_per_weight).fold(f64::INFINITY, f64::min))
}

/// The same of the least bits for a weight.
pub(super) fn allowed(bits: f64) -> Option<f64> {
    match bits {
        b if b >= 16.0 => Some(0.02),
        b if b >= 8.0 => Some(0.1),
        b if b >= 4.0 => Some(0.6),
        _ => None,
    }
}

/// What makes of a source that the engine cannot load a file that it can, at `scratch`; of a Hugging Face model one
/// of this type.
pub(super) fn conversion(
    source: Option<&SourceModel>,
    options: &Options,
    file_type: Option<FileType>,
    scratch: &Path,
) -> Result<Option<Job>> {
    let output = Some(scratch.to_path_buf());
    match (source, &options.against) {
        (Some(SourceModel::HuggingFace(hf)), _) => {
            HfToGguf { output, file_type, ..(**hf).clone() }.plan().map(Some)
        }
        (Some(SourceModel::Gguf(_)), Some(path)) if is_qpack(&InputFile::open(path)?)? => {
            FromQpack { output, ..FromQpack::new(path) }.plan().map(Some)
        }
        _ => Ok(None),
    }
}

fn forward(
    gguf: &Gguf,
    source: Option<&SourceModel>,
    options: &Options,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<(Outcome, String)> {
    let model = Model::load(&options.file, &ModelOptions::default())?;
    let n_tokens = model.n_tokens().max(1) as u64;
    // Fixed ids spread over the vocabulary: no tokenizer is needed to tell right from wrong.
    let n = FORWARD_TOKENS.min(model.n_ctx_train().max(1) as usize);
    let ids: Vec<i32> = (0..n as u64).map(|i| (i.wrapping_mul(2_654_435_761) % n_tokens) as i32).collect();
    let threads = budget.threads as u32;
    let found = embed::output(&model, &ids, threads)?;
    drop(model);
    let what = found.name();
    if found.matrix().values.iter().any(|v| !v.is_finite()) {
        return Ok((Outcome::Failed, format!("the {what} hold NaN or infinities")));
    }
    let scratch = TempFile::beside(&options.file);
    let reference = match (conversion(source, options, None, &scratch.0)?, source) {
        (Some(job), _) if job.plan.total_len() > FORWARD_SOURCE => {
            let detail = format!("{} tokens, finite; the source is too large to run beside it", ids.len());
            return Ok((Outcome::Passed, detail));
        }
        (Some(job), _) => {
            job.run(true, budget, observer)?;
            job.output
        }
        (None, Some(SourceModel::Gguf(other))) => match other.store.files().first() {
            Some(file) => file.path().to_path_buf(),
            None => return Ok((Outcome::Skipped, "the source has no file".into())),
        },
        (None, _) => return Ok((Outcome::Passed, format!("{} tokens, finite", ids.len()))),
    };
    let reference = Model::load(&reference, &ModelOptions::default())?;
    let wanted = embed::output(&reference, &ids, threads)?;
    let agreement = logits::compare(found.matrix(), wanted.matrix())?;
    let detail = format!(
        "{} tokens: {what} differ from the source's by {:.2e} of their spread, same largest at {} of {}",
        ids.len(),
        agreement.rel_rms,
        agreement.argmax_agree,
        agreement.rows
    );
    let weights = gguf.store.tensors().iter().filter(|t| t.shape.len() > 1).map(|t| t.dtype);
    let passed = match tolerance(weights) {
        Some(most) => agreement.finite && agreement.rel_rms <= most,
        None => agreement.finite,
    };
    Ok((if passed { Outcome::Passed } else { Outcome::Failed }, detail))
}

/// A file that goes away again.
pub(super) struct TempFile(pub std::path::PathBuf);

impl TempFile {
    pub fn beside(file: &Path) -> Self {
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Self(file.with_file_name(format!(".{name}.{}.qconv-source.gguf", std::process::id())))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        // It may never have been written.
        let _ = std::fs::remove_file(&self.0);
    }
}
