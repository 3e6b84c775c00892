//! A vocabulary tried in the linked llama.cpp before there is a model file.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use tokenizers::Tokenizer;

use super::parity::{self, Parity, Reference};
use crate::container::gguf::Metadata;
use crate::container::gguf::write::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::ggml::{Model, ModelOptions};
use crate::vocab::Vocab;

/// Loads `vocab` alone into llama.cpp, by way of a temporary file of a few megabytes.
///
/// # Errors
/// `Io` when the temporary file cannot be written or read, `Unsupported` when llama.cpp refuses it.
pub fn load(vocab: &Vocab) -> Result<Model> {
    load_in(&std::env::temp_dir(), vocab)
}

fn load_in(dir: &Path, vocab: &Vocab) -> Result<Model> {
    let mut metadata = Metadata::default();
    // llama.cpp wants the name of an architecture; of a vocabulary alone it asks no more.
    metadata.set("general.architecture", "llama");
    vocab.to_metadata(&mut metadata);
    let header = Layout::new(&metadata, &[])?.header;
    // Under a name that nobody can foresee, made anew, gone when dropped.
    let mut file = tempfile::Builder::new()
        .prefix("qconv-")
        .suffix(".gguf")
        .tempfile_in(dir)
        .map_err(|e| Error::io("write a temporary file in", dir, e))?;
    file.write_all(&header).map_err(|e| Error::io("write", file.path(), e))?;
    let path = file.path();
    Model::load(path, &ModelOptions { vocab_only: true, ..ModelOptions::default() }).map_err(|refused| {
        // What llama.cpp cannot open it refuses like any other, which says nothing of the vocabulary.
        match File::open(path).and_then(|file| file.metadata()) {
            Err(e) => Error::io("read", path, e),
            Ok(_) => refused,
        }
    })
}

/// [`parity::compare`] for a vocabulary that is in no file yet.
///
/// # Errors
/// As [`load`] and [`parity::compare`].
pub fn parity(vocab: &Vocab, tokenizer: &Tokenizer, user_defined: &[(u32, String)]) -> Result<Parity> {
    parity::compare(tokenizer, &load(vocab)?, user_defined)
}

/// What came of trying several vocabularies.
#[derive(Debug)]
pub struct Verdict {
    /// The one that agrees, else the one that came furthest.
    pub vocab: Vocab,
    /// How it compares.
    pub parity: Parity,
    /// How many were tried.
    pub tried: usize,
}

/// The first of `vocabs` with which llama.cpp's ids are those of `reference`, else the one that
/// came furthest; the earlier where several came as far.
///
/// # Errors
/// As [`load`]: `Io` at once, as a vocabulary that was not tried could be the right one; any other when all
/// fail. `Misuse` where there are none.
pub fn judge(vocabs: impl IntoIterator<Item = Vocab>, reference: &Reference) -> Result<Verdict> {
    judge_in(&std::env::temp_dir(), vocabs, reference)
}

/// [`judge`], with temporary files in `dir`.
///
/// # Errors
/// As [`judge`].
pub fn judge_in(
    dir: &Path,
    vocabs: impl IntoIterator<Item = Vocab>,
    reference: &Reference,
) -> Result<Verdict> {
    let mut best: Option<Verdict> = None;
    let mut failed = Error::misuse("no vocabulary to try");
    for (tried, vocab) in (1..).zip(vocabs) {
        match load_in(dir, &vocab).and_then(|model| reference.compare_until_difference(&model)) {
            Ok(parity) if parity.agrees() => return Ok(Verdict { vocab, parity, tried }),
            Ok(parity) if best.as_ref().is_none_or(|best| best.parity.probes < parity.probes) => {
                best = Some(Verdict { vocab, parity, tried });
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::Io | ErrorKind::Interrupted) => return Err(e),
            Err(e) => failed = e,
        }
        best.iter_mut().for_each(|best| best.tried = tried);
    }
    let best = best.ok_or(failed)?;
    Ok(Verdict { parity: reference.compare(&load_in(dir, &best.vocab)?)?, ..best })
}
