//! Token parity: do the `tokenizers` library, which models are trained with, and llama.cpp's
//! tokenizer, which reads our GGUF file, give the same ids for the same text?
//!
//! Text is compared without added tokens, the names of special tokens being read as those tokens
//! by both. Which tokens each side adds at the ends is compared once, not in every probe.
//!
//! Seven differences have known causes outside the file. A probe that differs is held against them
//! and, where one accounts for *every* id, counted as explained, never dropped:
//!
//! * llama.cpp applies no Unicode normalization (NFC and its kin) for byte-level vocabularies.
//!   Explained when it gives the same ids for the text as normalized by the tokenizer.
//! * With `add_space_prefix`, llama.cpp puts a space in front of every stretch of text that
//!   follows a special token; newer tokenizers put one at the very beginning only. Explained when
//!   each stretch by itself has the same ids.
//! * A token that swallows the white space around it (`lstrip`, `rstrip`), or stands as a word of
//!   its own only (`single_word`): GGUF has no field for it. Explained when the same tokenizer
//!   without those flags has the same ids.
//! * A tokenizer.json that transformers made from a SentencePiece model may have lost that some
//!   pieces are user-defined (found before all others). The GGUF file follows the SentencePiece
//!   model. Explained when the tokenizer with these tokens added has the same ids.
//! * WordPiece gives up on words of more than a hundred characters, llama.cpp does not. Explained
//!   when the same tokenizer without that limit has the same ids.
//! * Where accents are stripped, llama.cpp's WordPiece drops every combining mark, vowel signs of
//!   Indic scripts among them, and of a Hangul syllable all but its first letter; BERT's own
//!   drops marks that take no space. Explained when the text without these has the same ids.
//! * The tokenizers library applies a compiled normalization to what the eye takes for one
//!   character, llama.cpp to the longest match, as SentencePiece does. Explained when the composed
//!   text has the same ids.

use std::collections::BTreeMap;

use regex::Regex;
use tokenizers::{AddedToken, ModelWrapper, NormalizedString, Normalizer, Tokenizer};

use super::probe;
use crate::error::{Error, Result};
use crate::ggml::{Model, VocabType};

/// Special tokens probed each by itself.
const SPECIAL_TOKENS: usize = 512;
/// Special tokens probed between words as well.
const SPECIAL_TOKENS_IN_TEXT: usize = 32;
/// Entries of the vocabulary whose text is probed.
const ENTRIES: usize = 4096;
/// Entries joined in one probe.
const ENTRIES_PER_PROBE: usize = 32;

/// What is known to differ between the two, apart from the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Explanation {
    /// llama.cpp applies no Unicode normalization.
    Normalization,
    /// llama.cpp puts a space after every special token.
    SpacePrefix,
    /// GGUF cannot say that a token strips the white space around it.
    Stripping,
    /// tokenizer.json does not know that a SentencePiece piece is user-defined.
    UserDefined,
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
            Self::SpacePrefix => "llama.cpp puts a space after special tokens",
            Self::Stripping => "GGUF cannot say that a token strips the white space around it",
            Self::UserDefined => "tokenizer.json lost user-defined pieces of tokenizer.model",
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
        // A few pieces around the first difference tell the story.
        let near = |pieces: &[String]| {
            let from = self.at.saturating_sub(3).min(pieces.len());
            format!("{:?}", &pieces[from..(self.at + 5).min(pieces.len())])
        };
        write!(
            f,
            "{:?}: token {} on, tokenizer.json gives {} and the GGUF file {}",
            self.text.chars().take(120).collect::<String>(),
            self.at,
            near(&self.expected_pieces),
            near(&self.found_pieces)
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
    /// The first of them.
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

/// Compares `tokenizer` with the vocabulary of `model`. `user_defined` are the pieces of a
/// tokenizer.model beside tokenizer.json that are matched as they stand.
///
/// # Errors
/// `Unsupported` when one of the two cannot tokenize a probe at all.
pub fn compare(tokenizer: &Tokenizer, model: &Model, user_defined: &[(u32, String)]) -> Result<Parity> {
    let sides = Sides::new(tokenizer, model, user_defined);
    let expected_added = match tokenizer.get_post_processor() {
        Some(_) => Some(added(to_i32(&sides.expected("a", true)?), &to_i32(&sides.expected("a", false)?))?),
        None => None,
    };
    let found_added = added(model.tokenize("a", true, true)?, &model.tokenize("a", false, true)?)?;
    let mut parity = Parity {
        probes: 0,
        tokens: 0,
        differing: 0,
        first_difference: None,
        explained: BTreeMap::new(),
        expected_added,
        found_added,
    };
    for text in probes(&sides.tokenizer) {
        let expected = sides.expected(&text, false)?;
        let found = model.tokenize(&text, false, true)?;
        parity.probes += 1;
        parity.tokens += expected.len();
        if same(&expected, &found) {
            continue;
        }
        if let Some(explanation) = sides.explain(&text, &found)? {
            *parity.explained.entry(explanation).or_default() += 1;
            continue;
        }
        parity.differing += 1;
        if parity.first_difference.is_none() {
            parity.first_difference = Some(sides.difference(text, expected, found));
        }
    }
    Ok(parity)
}

fn same(expected: &[u32], found: &[i32]) -> bool {
    expected.len() == found.len()
        && expected.iter().zip(found).all(|(&e, &f)| u32::try_from(f).is_ok_and(|f| f == e))
}

fn to_i32(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| i32::try_from(id).unwrap_or(-1)).collect()
}

/// What `with` has around `plain`.
fn added(with: Vec<i32>, plain: &[i32]) -> Result<Added> {
    let at = (0..=with.len().saturating_sub(plain.len()))
        .find(|&i| with.get(i..i + plain.len()).is_some_and(|ids| ids == plain))
        .ok_or_else(|| Error::unsupported("adding special tokens changes the ids of the text itself"))?;
    Ok(Added { before: with[..at].to_vec(), after: with[at + plain.len()..].to_vec() })
}

/// The two tokenizers, and what the explanations need.
struct Sides<'m> {
    tokenizer: Tokenizer,
    model: &'m Model,
    // The tokenizer with all tokens taken literally, if any was not.
    literal: Option<Tokenizer>,
    // The tokenizer with a SentencePiece model's user-defined pieces, if it lacked some.
    user_defined: Option<Tokenizer>,
    // The tokenizer without WordPiece's longest word.
    unlimited: Option<Tokenizer>,
    // Texts of tokens that end a stretch of text.
    specials: Vec<String>,
    normalizes: bool,
    space_prefix: bool,
}

impl<'m> Sides<'m> {
    fn new(tokenizer: &Tokenizer, model: &'m Model, pieces: &[(u32, String)]) -> Self {
        let mut tokenizer = tokenizer.clone();
        // These would cut or fill the ids; no model is run on padding here.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let added = added_tokens(&tokenizer);
        let strips = |t: &AddedToken| t.lstrip || t.rstrip || t.single_word;
        let literal = added.iter().any(strips).then(|| {
            let mut literal = tokenizer.clone();
            for token in added.iter().filter(|t| strips(t)) {
                let plain = token.clone().lstrip(false).rstrip(false).single_word(false);
                let _ = if token.special {
                    literal.add_special_tokens([plain])
                } else {
                    literal.add_tokens([plain])
                };
            }
            literal
        });
        let user_defined = lacking_user_defined(&tokenizer, &added, model, pieces);
        let user_defined = (!user_defined.is_empty()).then(|| {
            let mut with_them = tokenizer.clone();
            let _ = with_them.add_tokens(user_defined);
            with_them
        });
        let unlimited = match tokenizer.get_model() {
            ModelWrapper::WordPiece(words) => {
                let mut words = words.clone();
                words.max_input_chars_per_word = usize::MAX;
                let mut unlimited = tokenizer.clone();
                unlimited.with_model(words);
                Some(unlimited)
            }
            _ => None,
        };
        Self {
            user_defined,
            unlimited,
            normalizes: normalizes_unicode(&tokenizer),
            space_prefix: model.vocab_type() == VocabType::Spm
                && model.metadata("tokenizer.ggml.add_space_prefix").is_none_or(|v| v == "true"),
            specials: added.into_iter().map(|t| t.content).filter(|t| !t.is_empty()).collect(),
            tokenizer,
            model,
            literal,
        }
    }

    fn expected(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        encode(&self.tokenizer, text, add_special)
    }

    /// The text as llama.cpp's WordPiece strips it; `None` for other vocabularies.
    fn stripped(&self, text: &str) -> Option<String> {
        self.unlimited.as_ref()?;
        let first_letter = |c: char| match u32::from(c) {
            // Syllables are numbered by first letter, vowel (21) and last letter (28).
            code @ 0xAC00..=0xD7A3 => char::from_u32(0x1100 + (code - 0xAC00) / (21 * 28)).unwrap_or(c),
            _ => c,
        };
        let mut plain = NormalizedString::from(text.chars().map(first_letter).collect::<String>());
        plain.nfd();
        let mark = Regex::new(r"\p{M}").ok()?;
        Some(mark.replace_all(plain.get(), "").into_owned())
    }

    fn explain(&self, text: &str, found: &[i32]) -> Result<Option<Explanation>> {
        if self.normalizes
            && let Some(normalizer) = self.tokenizer.get_normalizer()
        {
            let mut normalized = NormalizedString::from(text);
            if normalizer.normalize(&mut normalized).is_ok() && normalized.get() != text {
                let ids = self.model.tokenize(normalized.get(), false, true)?;
                if same(&self.expected(text, false)?, &ids) {
                    return Ok(Some(Explanation::Normalization));
                }
            }
        }
        if self.space_prefix {
            let mut ids = Vec::new();
            for stretch in self.stretches(text) {
                ids.extend(self.expected(stretch, false)?);
            }
            if same(&ids, found) {
                return Ok(Some(Explanation::SpacePrefix));
            }
        }
        for (other, explanation) in [
            (&self.literal, Explanation::Stripping),
            (&self.user_defined, Explanation::UserDefined),
            (&self.unlimited, Explanation::LongWord),
        ] {
            if let Some(other) = other
                && same(&encode(other, text, false)?, found)
            {
                return Ok(Some(explanation));
            }
        }
        if let (Some(stripped), Some(unlimited)) = (self.stripped(text), &self.unlimited)
            && same(&encode(unlimited, &stripped, false)?, found)
        {
            return Ok(Some(Explanation::Marks));
        }
        if self.model.vocab_type() == VocabType::Ugm {
            let mut composed = NormalizedString::from(text);
            composed.nfc();
            if same(&self.expected(composed.get(), false)?, found) {
                return Ok(Some(Explanation::Graphemes));
            }
        }
        Ok(None)
    }

    /// `text` cut before and after each special token, the longest first where several begin.
    fn stretches<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        let (mut begin, mut at) = (0, 0);
        while at < text.len() {
            let rest = &text[at..];
            let token = self.specials.iter().filter(|t| rest.starts_with(t.as_str())).max_by_key(|t| t.len());
            if let Some(token) = token {
                out.push(&text[begin..at]);
                out.push(&text[at..at + token.len()]);
                at += token.len();
                begin = at;
            } else {
                at += rest.chars().next().map_or(1, char::len_utf8);
            }
        }
        out.push(&text[begin..]);
        out.retain(|s| !s.is_empty());
        out
    }

    fn difference(&self, text: String, expected: Vec<u32>, found: Vec<i32>) -> Difference {
        let at = to_i32(&expected).iter().zip(&found).take_while(|(e, f)| e == f).count();
        let expected_pieces =
            expected.iter().map(|&id| self.tokenizer.id_to_token(id).unwrap_or_default()).collect();
        let found_pieces = found.iter().map(|&id| self.model.token_text(id).unwrap_or_default()).collect();
        Difference { text, at, expected, found, expected_pieces, found_pieces }
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode_fast(text, add_special)
        .map_err(|e| Error::unsupported(format!("tokenizer.json cannot tokenize {text:?}: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// The user-defined tokens of a SentencePiece vocabulary that stand in the tokenizer under the same
/// id, but as ordinary entries, and that llama.cpp finds.
fn lacking_user_defined(
    tokenizer: &Tokenizer,
    added: &[AddedToken],
    model: &Model,
    pieces: &[(u32, String)],
) -> Vec<AddedToken> {
    if model.vocab_type() != VocabType::Spm {
        return Vec::new();
    }
    let own = (0..i32::try_from(model.n_tokens()).unwrap_or(i32::MAX))
        .filter(|&id| model.is_user_defined(id))
        .filter_map(|id| Some((u32::try_from(id).ok()?, model.token_text(id)?)));
    let found = |id: u32, text: &str| model.tokenize(text, false, true).is_ok_and(|ids| same(&[id], &ids));
    own.chain(pieces.iter().cloned())
        .filter(|(id, text)| tokenizer.token_to_id(text) == Some(*id) && found(*id, text))
        .filter(|(_, text)| added.iter().all(|t| t.content != *text))
        .map(|(_, text)| AddedToken::from(text, false))
        .collect()
}

/// The tokens beside the model's own vocabulary, in order of id.
fn added_tokens(tokenizer: &Tokenizer) -> Vec<AddedToken> {
    let mut tokens: Vec<_> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    tokens.sort_unstable_by_key(|(id, _)| *id);
    tokens.into_iter().map(|(_, token)| token).collect()
}

/// Whether the normalizer is one of Unicode's forms, or holds one; read from its own
/// serialization, which is tokenizer.json's.
fn normalizes_unicode(tokenizer: &Tokenizer) -> bool {
    fn is_form(value: &serde_json::Value) -> bool {
        match value {
            serde_json::Value::Object(object) => {
                let form = object.get("type").and_then(|t| t.as_str());
                form.is_some_and(|t| ["NFC", "NFD", "NFKC", "NFKD"].contains(&t))
                    || object.values().any(is_form)
            }
            serde_json::Value::Array(array) => array.iter().any(is_form),
            _ => false,
        }
    }
    tokenizer.get_normalizer().and_then(|n| serde_json::to_value(n).ok()).is_some_and(|n| is_form(&n))
}

/// `n` of `items`, evenly spread, the first and the last among them.
fn spread<T>(items: &[T], n: usize) -> impl Iterator<Item = &T> {
    let n = n.min(items.len());
    let last = items.len().saturating_sub(1);
    (0..n).filter_map(move |i| items.get(if n > 1 { i * last / (n - 1) } else { 0 }))
}

/// All texts to compare.
fn probes(tokenizer: &Tokenizer) -> Vec<String> {
    let mut probes: Vec<String> = probe::TEXTS.iter().map(|&t| t.to_owned()).collect();
    probes.push(probe::TEXTS.concat());
    probes.push(probe::TEXTS.join(" "));
    for n in 1..=32 {
        probes.push(format!("a{}b", " ".repeat(n)));
        probes.push(format!("a{}b", "\n".repeat(n)));
        probes.push(format!("{}x", "\t".repeat(n)));
        probes.push("1234567890".repeat(4)[..n].to_owned());
    }
    let specials = added_tokens(tokenizer);
    for token in spread(&specials, SPECIAL_TOKENS) {
        probes.push(token.content.clone());
    }
    for token in spread(&specials, SPECIAL_TOKENS_IN_TEXT) {
        let t = &token.content;
        probes.extend([format!("a{t}b"), format!("Hello {t} world"), format!("{t}\nHello\n{t}{t} {t}  x")]);
    }
    // What the vocabulary's own entries say, so that a wrong entry anywhere near is found.
    let ids: Vec<u32> = (0..tokenizer.get_vocab_size(true)).filter_map(|id| id.try_into().ok()).collect();
    let entries: Vec<String> = spread(&ids, ENTRIES)
        .filter_map(|&id| tokenizer.decode(&[id], true).ok())
        .filter(|text| !text.is_empty() && !text.contains('\u{fffd}'))
        .collect();
    probes.extend(entries.chunks(ENTRIES_PER_PROBE).map(|chunk| chunk.join(" ")));
    probes.extend(entries.chunks(ENTRIES_PER_PROBE).map(<[String]>::concat));
    probes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_found_around_the_text() {
        let around = |with: &[i32], plain: &[i32]| added(with.to_vec(), plain);
        assert_eq!(around(&[1, 5, 2], &[5]).unwrap(), Added { before: vec![1], after: vec![2] });
        assert_eq!(around(&[5], &[5]).unwrap(), Added { before: vec![], after: vec![] });
        assert!(around(&[1, 2], &[5]).is_err());
        assert!(around(&[], &[5]).is_err());
    }

    #[test]
    fn a_spread_has_both_ends() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(spread(&items, 4).copied().collect::<Vec<_>>(), [0, 33, 66, 99]);
        assert_eq!(spread(&items, 1000).count(), 100);
        assert_eq!(spread(&items, 1).copied().collect::<Vec<_>>(), [0]);
        assert_eq!(spread(&items[..0], 4).count(), 0);
    }
}
