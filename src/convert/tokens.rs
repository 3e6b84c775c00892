//! The judge of a vocabulary: llama.cpp has to give the ids that the `tokenizers` library gives.

use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::eval::parity::Parity;
use crate::vocab::{Candidates, Vocab};

/// What is asked of the tokens of a conversion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenCheck {
    /// llama.cpp's ids have to be those of the source's tokenizer, known differences aside.
    #[default]
    Required,
    /// They are compared, and may differ.
    Lenient,
    /// They are of no interest: the likeliest pre-tokenizer is taken.
    Skipped,
}

/// How the ids compare.
#[derive(Clone, Debug, Serialize)]
pub struct Tokens {
    /// `tokenizer.ggml.model`.
    pub model: &'static str,
    /// `tokenizer.ggml.pre`.
    pub pre: String,
    /// The comparison.
    #[serde(flatten)]
    pub parity: Parity,
}

/// In a line.
impl std::fmt::Display for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, pre-tokenizer {:?}: {}", self.model, self.pre, self.parity)
    }
}

/// Chooses the pre-tokenizer of `vocab`, which was read from `dir`.
///
/// # Errors
/// `Unsupported` when no candidate agrees and that is asked for, or when the table has to decide and
/// does not know the structure.
pub fn choose(
    dir: &Path,
    vocab: Vocab,
    candidates: Candidates,
    check: TokenCheck,
) -> Result<(Vocab, Option<Tokens>)> {
    if check == TokenCheck::Skipped {
        let first = candidates.names.first().map_or("default", String::as_str);
        return Ok((vocab.with_pre(first), None));
    }
    #[cfg(feature = "ggml")]
    return judged::choose(dir, vocab, candidates, check);
    // Nobody can try: the table decides.
    #[cfg(not(feature = "ggml"))]
    candidates.by_table(dir, vocab).map(|vocab| (vocab, None))
}

#[cfg(feature = "ggml")]
mod judged {
    use super::{Candidates, Path, Result, TokenCheck, Tokens, Vocab};
    use crate::error::Error;
    use crate::eval::parity::Reference;
    use crate::eval::trial::{self, Verdict};
    use crate::vocab;

    /// Lets llama.cpp try the candidates.
    pub fn choose(
        dir: &Path,
        vocab: Vocab,
        candidates: Candidates,
        check: TokenCheck,
    ) -> Result<(Vocab, Option<Tokens>)> {
        let path = Some(dir.join("tokenizer.json")).filter(|p| p.exists()).unwrap_or(dir.to_path_buf());
        let reference = Reference::new(&vocab::reference_tokenizer(dir)?, &vocab::user_defined_pieces(dir)?)?;
        let Candidates { names, notes, instead, unknown } = candidates;
        let kind = vocab.kind;
        let named = names.iter().map(|name| vocab.clone().with_pre(name));
        let Verdict { mut vocab, parity, tried } =
            trial::judge(named.chain(instead.map(|other| *other)), &reference)?;
        let pre = vocab.pre.clone();
        let first = vocab.kind == kind && names.first() == Some(&pre);
        if first && unknown.is_none() {
            vocab.notes.splice(0..0, notes);
        } else if parity.agrees() {
            let model = vocab.kind.ggml_model();
            vocab.notes.insert(
                0,
                match &unknown {
                    _ if vocab.kind != kind => format!(
                        "llama.cpp's tokenizer {:?} gives other ids; its {model:?} agrees",
                        kind.ggml_model()
                    ),
                    Some(_) => format!("no table knows the pre-tokenizer; in llama.cpp, {pre:?} agrees"),
                    None => {
                        format!(
                            "pre-tokenizer {:?}, suggested by the structure, gives other ids; {pre:?} agrees",
                            names[0]
                        )
                    }
                },
            );
        }
        let tokens = Tokens { model: vocab.kind.ggml_model(), pre, parity };
        if tokens.parity.agrees() {
            return Ok((vocab, Some(tokens)));
        }
        let which = match (tried, &unknown) {
            (1, _) => format!("with {tokens}"),
            (n, None) => format!("in any of {n} ways; nearest is {tokens}"),
            (n, Some(unknown)) => format!("in any of {n} ways: {unknown}; nearest is {tokens}"),
        };
        let difference = format!("llama.cpp does not give the tokenizer's own ids {which}");
        if check == TokenCheck::Lenient {
            vocab.notes.push(format!("warning: {difference}"));
            return Ok((vocab, Some(tokens)));
        }
        let by_name = if tried > 1 { "--pre NAME takes another pre-tokenizer; " } else { "" };
        Err(Error::unsupported(difference).at(path).hint(format!(
            "{by_name}--allow-token-mismatch converts all the same, and the model will misread such text"
        )))
    }
}
