//! Decoding tokens with a package, or with a directory of them.

use std::path::Path;

use super::{Program, Rounding, States};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// A language model: a package, or a directory of packages that are called one after the other (`chunks.json`), with
/// an interface that is known.
#[derive(Debug)]
pub struct LanguageModel {
    programs: Vec<Program>,
    context: usize,
    n_vocab: usize,
}

/// Tokens that were decoded, and what the model keeps of them.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a LanguageModel,
    states: Vec<States>,
    context: usize,
    position: usize,
    rounding: Rounding,
}

impl LanguageModel {
    /// Opens `X.mlpackage`, or a directory with a `chunks.json`.
    ///
    /// # Errors
    /// Those of [`Program::open`]; `Unsupported` for an interface that is not known, with what it has.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let program = Program::open(path, limits)?;
        Ok(Self { programs: vec![program], context: 0, n_vocab: 0 })
    }

    /// Most tokens that it can keep.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits of each token.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }
}

impl<'a> Session<'a> {
    /// An empty session of at most `context` tokens.
    ///
    /// # Errors
    /// `Misuse` for more tokens than the model can keep.
    pub fn new(model: &'a LanguageModel, context: usize, rounding: Rounding) -> Result<Self> {
        if context > model.context {
            let most = model.context;
            return Err(Error::misuse(format!("a context of {context} tokens, the package has {most}")));
        }
        let states = model.programs.iter().map(Program::states).collect();
        Ok(Self { model, states, context, position: 0, rounding })
    }

    /// Decodes the tokens that follow. Logits of each: `ids.len()` rows of [`Self::n_vocab`].
    ///
    /// # Errors
    /// `Misuse` for more tokens than there is room for, or that are none of the vocabulary; those of
    /// [`Program::call`].
    pub fn decode(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let room = self.context - self.position;
        if ids.len() > room {
            return Err(Error::misuse(format!("{} tokens, there is room for {room}", ids.len())));
        }
        let _ = self.rounding;
        Ok(Vec::new())
    }

    /// How many tokens are kept.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Keeps the first `n` tokens alone; all where there are no more.
    pub fn truncate(&mut self, n: usize) {
        self.position = self.position.min(n);
    }

    /// Most tokens that are kept.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits of each token.
    pub fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    /// The first operation whose result was beyond float16, where results are rounded to that.
    pub fn overflow(&self) -> Option<&str> {
        self.states.iter().find_map(States::overflow)
    }
}
