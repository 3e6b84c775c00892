//! Token parity: do the `tokenizers` library, which models are trained with, and llama.cpp's
//! tokenizer, which reads our GGUF file, give the same ids for the same text?
//!
//! Text is compared without added tokens, the names of special tokens being read as those tokens
//! by both. Which tokens each side adds at the ends is compared once, not in every probe.
//!
//! Some differences have known causes outside the file. A probe that differs is held against them
//! and, where one accounts for *every* id, counted as explained, never dropped:
//!
//! * llama.cpp applies no Unicode normalization (NFC and its kin) for byte-level vocabularies.
//!   Explained when it gives the same ids for the text as normalized by the tokenizer.
//! * llama.cpp's regular expressions for a few pre-tokenizers are simpler than the tokenizers' own, which
//!   std::regex cannot run. The table of pre-tokenizers has both. Explained when the tokenizer with
//!   llama.cpp's has the same ids.
//! * With `add_space_prefix`, llama.cpp puts a space in front of every stretch of text that
//!   follows a special token; newer tokenizers put one at the very beginning only. Explained when
//!   each stretch by itself has the same ids.
//! * A token that swallows the white space around it (`lstrip`, `rstrip`), or stands as a word of
//!   its own only (`single_word`): GGUF has no field for it. Explained when the same tokenizer
//!   without those flags has the same ids.
//! * llama.cpp takes tokens of certain names (`</s>`, `<|endoftext|>`) for control tokens, also where the
//!   tokenizer has them as ordinary ones. Explained when the tokenizer with these added has the same ids.
//! * A tokenizer.json that transformers made from a SentencePiece model may have lost that some
//!   pieces are user-defined (found before all others). The GGUF file follows the SentencePiece
//!   model. Explained when the tokenizer with these tokens added has the same ids.
//! * SentencePiece in llama.cpp merges characters that have no token of their own, `\n` and `\n` to `\n\n`;
//!   BPE in tokenizer.json, which has spelled them in bytes by then, cannot. Explained when the
//!   tokenizer with these tokens added has the same ids.
//! * Where a character has no token, Unigram may spell it in bytes; llama.cpp takes the unknown token.
//!   Explained when nothing else differs.
//! * WordPiece gives up on words of more than a hundred characters, llama.cpp does not. Explained
//!   when the same tokenizer without that limit has the same ids.
//! * Where accents are stripped, llama.cpp's WordPiece drops every combining mark, vowel signs of
//!   Indic scripts among them, and of a Hangul syllable all but its first letter; BERT's own
//!   drops marks that take no space. Explained when the text without these has the same ids.
//! * The tokenizers library applies a compiled normalization to what the eye takes for one
//!   character, llama.cpp to the longest match, as SentencePiece does. Explained when the composed
//!   text has the same ids.

use std::collections::BTreeMap;

#[cfg(feature = "ggml")]
pub use super::compare::{Reference, compare};

/// What is known to differ between the two, apart from the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Explanation {
    /// llama.cpp applies no Unicode normalization.
    Normalization,
    /// llama.cpp's splitting is a simpler one, as the table of pre-tokenizers says.
    Splitting,
    /// llama.cpp puts a space after every special token.
    SpacePrefix,
    /// GGUF cannot say that a token strips the white space around it.
    Stripping,
    /// llama.cpp takes some names for control tokens, whatever the file says.
    SpecialNames,
    /// tokenizer.json does not know that a SentencePiece piece is user-defined.
    UserDefined,
    /// llama.cpp's SentencePiece makes a token of characters that have none.
    Characters,
    /// llama.cpp's Unigram spells nothing in bytes.
    Bytes,
    /// llama.cpp's WordPiece has no longest word.
    LongWord,
    /// llama.cpp's WordPiece strips more than accents.
    Marks,
    /// The tokenizers library normalizes by grapheme.
    Graphemes,
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Normalization => "llama.cpp applies no Unicode normalization",
            Self::Splitting => "llama.cpp splits words by a simpler pattern",
            Self::SpacePrefix => "llama.cpp puts a space after special tokens",
            Self::Stripping => "GGUF cannot say that a token strips the white space around it",
            Self::SpecialNames => "llama.cpp takes tokens such as </s> for control tokens by their names",
            Self::UserDefined => "tokenizer.json lost user-defined pieces of tokenizer.model",
            Self::Characters => "llama.cpp's SentencePiece makes tokens of characters that have none",
            Self::Bytes => "llama.cpp's Unigram takes the unknown token instead of spelling in bytes",
            Self::LongWord => "llama.cpp's WordPiece has no longest word",
            Self::Graphemes => {
                "tokenizers normalizes by grapheme, llama.cpp like SentencePiece by longest match"
            }
            Self::Marks => {
                "llama.cpp's WordPiece strips vowel signs and the ends of Hangul syllables as accents"
            }
        })
    }
}

/// A text for which the two give different ids.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Difference {
    /// The text.
    pub text: String,
    /// Index of the first id that differs.
    pub at: usize,
    /// The ids of the `tokenizers` library.
    pub expected: Vec<u32>,
    /// llama.cpp's ids.
    pub found: Vec<i32>,
    /// The vocabulary's entries for `expected`.
    pub expected_pieces: Vec<String>,
    /// The vocabulary's entries for `found`.
    pub found_pieces: Vec<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A few ids around the first difference tell the story.
        fn near<T>(items: &[T], at: usize) -> &[T] {
            &items[at.saturating_sub(4).min(items.len())..(at + 12).min(items.len())]
        }
        write!(f, "{:?}", self.text.chars().take(200).collect::<String>())?;
        if self.at > 4 {
            write!(f, " (from token {} on)", self.at - 4)?;
        }
        write!(
            f,
            ": tokenizer.json gives {:?} {:?}, llama.cpp {:?} {:?}",
            near(&self.expected, self.at),
            near(&self.expected_pieces, self.at),
            near(&self.found, self.at),
            near(&self.found_pieces, self.at)
        )
    }
}

/// The tokens that a side puts before and after a text.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Added {
    /// Ids in front.
    pub before: Vec<i32>,
    /// Ids at the end.
    pub after: Vec<i32>,
}

/// What the comparison found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Parity {
    /// Texts compared.
    pub probes: usize,
    /// Ids compared: those of the `tokenizers` library.
    pub tokens: usize,
    /// Texts with different ids that nothing explains.
    pub differing: usize,
    /// The first of them, or the shortest run of words in it that differs too.
    pub first_difference: Option<Difference>,
    /// Texts with different ids that are llama.cpp's own doing.
    pub explained: BTreeMap<Explanation, usize>,
    /// What tokenizer.json adds; `None` where it has no post-processor and leaves that to
    /// `tokenizer_config.json`.
    pub expected_added: Option<Added>,
    /// What llama.cpp adds.
    pub found_added: Added,
}

impl Parity {
    /// Whether every text has the same ids, or an explanation.
    pub fn agrees(&self) -> bool {
        self.differing == 0
    }

    /// Whether both add the same tokens; `None` where tokenizer.json does not say. A difference
    /// need not be a fault: transformers lets `tokenizer_config.json` overrule tokenizer.json.
    pub fn added_agree(&self) -> Option<bool> {
        self.expected_added.as_ref().map(|expected| *expected == self.found_added)
    }
}

/// In a line.
impl std::fmt::Display for Parity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.first_difference {
            Some(first) => {
                write!(f, "{} of {} texts have other ids; the first: {first}", self.differing, self.probes)?;
            }
            None => write!(f, "{} texts, {} tokens, the same ids", self.probes, self.tokens)?,
        }
        for (explanation, n) in &self.explained {
            write!(f, ", but for {n} texts: {explanation}")?;
        }
        if self.added_agree() == Some(false) {
            write!(
                f,
                "; but begin and end tokens differ: tokenizer.json {:?}, llama.cpp {:?}",
                self.expected_added.as_ref().map(|a| (&a.before, &a.after)),
                (&self.found_added.before, &self.found_added.after)
            )?;
        }
        Ok(())
    }
}
