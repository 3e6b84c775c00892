//! A vocabulary tried in the linked llama.cpp before there is a model file.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use tokenizers::Tokenizer;

use super::parity::{self, Parity, Reference};
use crate::container::gguf::Metadata;
use crate::container::gguf::write::Layout;
use crate::error::{Error, Result};
use crate::ggml::{Model, ModelOptions};
use crate::vocab::Vocab;

/// A file in the folder for temporary ones, gone when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("qconv-{}-{count}.gguf", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may never have been written.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Loads `vocab` alone into llama.cpp, by way of a temporary file of a few megabytes.
///
/// # Errors
/// `Io` when the temporary file cannot be written, `Unsupported` when llama.cpp refuses it.
pub fn load(vocab: &Vocab) -> Result<Model> {
    let mut metadata = Metadata::default();
    // llama.cpp wants the name of an architecture; of a vocabulary alone it asks no more.
    metadata.set("general.architecture", "llama");
    vocab.to_metadata(&mut metadata);
    let scratch = Scratch::new();
    let header = Layout::new(&metadata, &[])?.header;
    // Anew: where others may write, a link could lie under that name.
    File::create_new(&scratch.0)
        .and_then(|mut file| file.write_all(&header))
        .map_err(|e| Error::io("write", &scratch.0, e))?;
    Model::load(&scratch.0, &ModelOptions { vocab_only: true, ..ModelOptions::default() })
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
/// As [`load`], when that fails for all of them; `Misuse` where there are none.
pub fn judge(vocabs: impl IntoIterator<Item = Vocab>, reference: &Reference) -> Result<Verdict> {
    let mut best: Option<Verdict> = None;
    let mut failed = Error::misuse("no vocabulary to try");
    for (tried, vocab) in (1..).zip(vocabs) {
        match load(&vocab).and_then(|model| reference.compare_until_difference(&model)) {
            Ok(parity) if parity.agrees() => return Ok(Verdict { vocab, parity, tried }),
            Ok(parity) if best.as_ref().is_none_or(|best| best.parity.probes < parity.probes) => {
                best = Some(Verdict { vocab, parity, tried });
            }
            Ok(_) => {}
            Err(e) => failed = e,
        }
        best.iter_mut().for_each(|best| best.tried = tried);
    }
    let best = best.ok_or(failed)?;
    Ok(Verdict { parity: reference.compare(&load(&best.vocab)?)?, ..best })
}
