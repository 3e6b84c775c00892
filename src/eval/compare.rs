//! The comparison behind [`super::parity`].

use std::collections::{BTreeMap, HashSet};

use regex::Regex;
use tokenizers::models::unigram::Unigram;
use tokenizers::{AddedToken, ModelWrapper, NormalizedString, Normalizer, PreTokenizerWrapper, Tokenizer};

use super::parity::{Added, Difference, Explanation, Parity};
use super::probe::{added_tokens, probes};
use crate::error::{Error, Result};
use crate::ggml::{Model, VocabType};
use crate::vocab::pre::{self, Structure};

/// Words of the longest run that is tried in place of a whole text that differs.
const WORDS: usize = 3;

/// Compares `tokenizer` with the vocabulary of `model`. `user_defined` are the pieces of a
/// tokenizer.model beside tokenizer.json that are matched as they stand.
///
/// # Errors
/// `Unsupported` when one of the two cannot tokenize a probe at all.
pub fn compare(tokenizer: &Tokenizer, model: &Model, user_defined: &[(u32, String)]) -> Result<Parity> {
    Reference::new(tokenizer, user_defined)?.compare(model)
}

/// The `tokenizers` library's side: all texts, with the ids that they should have.
pub struct Reference {
    tokenizer: Tokenizer,
    user_defined: Vec<(u32, String)>,
    probes: Vec<(String, Vec<u32>)>,
    added: Option<Added>,
}

impl Reference {
    /// Tokenizes the texts; `user_defined` as in [`compare`].
    ///
    /// # Errors
    /// `Unsupported` when it cannot.
    pub fn new(tokenizer: &Tokenizer, user_defined: &[(u32, String)]) -> Result<Self> {
        let mut tokenizer = tokenizer.clone();
        // These would cut or fill the ids; no model is run on padding here.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let ids = |text: String| encode(&tokenizer, &text, false).map(|ids| (text, ids));
        let probes = probes(&tokenizer).into_iter().map(ids).collect::<Result<_>>()?;
        let around = |special| encode(&tokenizer, "a", special).map(|ids| to_i32(&ids));
        let added = match tokenizer.get_post_processor() {
            Some(_) => Some(added(around(true)?, &around(false)?)?),
            None => None,
        };
        Ok(Self { user_defined: user_defined.to_vec(), probes, added, tokenizer })
    }

    /// Compares all texts.
    ///
    /// # Errors
    /// `Unsupported` when llama.cpp cannot tokenize a text at all.
    pub fn compare(&self, model: &Model) -> Result<Parity> {
        self.run(model, false)
    }

    /// Compares texts up to the first that differs: how far it came is in [`Parity::probes`].
    ///
    /// # Errors
    /// As [`Self::compare`].
    pub fn compare_until_difference(&self, model: &Model) -> Result<Parity> {
        self.run(model, true)
    }

    fn run(&self, model: &Model, stop: bool) -> Result<Parity> {
        let sides = Sides::new(&self.tokenizer, model, &self.user_defined);
        let found_added = added(model.tokenize("a", true, true)?, &model.tokenize("a", false, true)?)?;
        let mut parity = Parity {
            probes: 0,
            tokens: 0,
            differing: 0,
            first_difference: None,
            explained: BTreeMap::new(),
            expected_added: self.added.clone(),
            found_added,
        };
        for (text, expected) in &self.probes {
            let found = model.tokenize(text, false, true)?;
            parity.probes += 1;
            parity.tokens += expected.len();
            if same(expected, &found) {
                continue;
            }
            if let Some(explanation) = sides.explain(text, expected, &found)? {
                *parity.explained.entry(explanation).or_default() += 1;
                continue;
            }
            parity.differing += 1;
            if parity.first_difference.is_none() {
                parity.first_difference = Some(sides.difference(text, expected, found)?);
            }
            if stop {
                break;
            }
        }
        Ok(parity)
    }
}

fn same(expected: &[u32], found: &[i32]) -> bool {
    expected.len() == found.len()
        && expected.iter().zip(found).all(|(&e, &f)| u32::try_from(f).is_ok_and(|f| f == e))
}

fn to_i32(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| i32::try_from(id).unwrap_or(-1)).collect()
}

fn to_u32(ids: &[i32]) -> Vec<u32> {
    ids.iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect()
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
    tokenizer: &'m Tokenizer,
    model: &'m Model,
    // The tokenizer with all tokens taken literally, if any was not.
    literal: Option<Tokenizer>,
    // The tokenizer with the simpler splitting of llama.cpp, if the table knows of one.
    simpler: Option<Tokenizer>,
    // The tokenizer with a SentencePiece model's user-defined pieces, if it lacked some.
    user_defined: Option<Tokenizer>,
    // The tokenizer with the tokens that llama.cpp takes for control tokens by their names.
    special_names: Option<Tokenizer>,
    // The tokenizer with the tokens that llama.cpp makes of characters without one.
    characters: Option<Tokenizer>,
    // The tokenizer of Unigram that does not take `<0x0A>`, written out, for the piece.
    without_byte_pieces: Option<Tokenizer>,
    // The tokenizer without WordPiece's longest word.
    unlimited: Option<Tokenizer>,
    // Texts of tokens that end a stretch of text.
    specials: Vec<String>,
    unknown: Option<u32>,
    normalizes: bool,
    space_prefix: bool,
}

impl<'m> Sides<'m> {
    fn new(tokenizer: &'m Tokenizer, model: &'m Model, pieces: &[(u32, String)]) -> Self {
        let added = added_tokens(tokenizer);
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
        let with = |tokens: Vec<AddedToken>| {
            (!tokens.is_empty()).then(|| {
                let mut with_them = tokenizer.clone();
                let _ = with_them.add_tokens(tokens);
                with_them
            })
        };
        let user_defined = with(lacking_user_defined(tokenizer, &added, model, pieces));
        let special_names = with(named_special(tokenizer, &added, model));
        let characters = with(made_of_characters(tokenizer, &added, model));
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
            simpler: with_simpler_splitting(tokenizer, model),
            user_defined,
            special_names,
            characters,
            unlimited,
            without_byte_pieces: without_byte_pieces(tokenizer),
            // llama.cpp's own where the file names none.
            unknown: model.metadata("tokenizer.ggml.unknown_token_id").map_or(Some(2), |id| id.parse().ok()),
            normalizes: normalizes_unicode(tokenizer),
            space_prefix: model.vocab_type() == VocabType::Spm
                && model.metadata("tokenizer.ggml.add_space_prefix").is_none_or(|v| v == "true"),
            specials: added.into_iter().map(|t| t.content).filter(|t| !t.is_empty()).collect(),
            tokenizer,
            model,
            literal,
        }
    }

    fn expected(&self, text: &str) -> Result<Vec<u32>> {
        encode(self.tokenizer, text, false)
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

    fn explain(&self, text: &str, expected: &[u32], found: &[i32]) -> Result<Option<Explanation>> {
        if self.normalizes
            && let Some(normalizer) = self.tokenizer.get_normalizer()
        {
            let mut normalized = NormalizedString::from(text);
            if normalizer.normalize(&mut normalized).is_ok() && normalized.get() != text {
                let ids = self.model.tokenize(normalized.get(), false, true)?;
                // Both at once is what a long text has.
                let named = self.special_names.as_ref().map(|t| encode(t, text, false)).transpose()?;
                if same(expected, &ids) || named.is_some_and(|named| same(&named, &ids)) {
                    return Ok(Some(Explanation::Normalization));
                }
            }
        }
        if self.space_prefix {
            let mut ids = Vec::new();
            for stretch in self.stretches(text) {
                ids.extend(self.expected(stretch)?);
            }
            if same(&ids, found) {
                return Ok(Some(Explanation::SpacePrefix));
            }
        }
        for (other, explanation) in [
            (&self.simpler, Explanation::Splitting),
            (&self.literal, Explanation::Stripping),
            (&self.user_defined, Explanation::UserDefined),
            (&self.special_names, Explanation::SpecialNames),
            (&self.characters, Explanation::Characters),
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
            let expected = match &self.without_byte_pieces {
                Some(other) => encode(other, text, false)?,
                None => expected.to_vec(),
            };
            if self.without_bytes(&expected) == self.without_bytes(&to_u32(found)) {
                return Ok(Some(Explanation::Bytes));
            }
            let mut composed = NormalizedString::from(text);
            composed.nfc();
            if same(&self.expected(composed.get())?, found) {
                return Ok(Some(Explanation::Graphemes));
            }
        }
        Ok(None)
    }

    /// `ids` with the unknown token, once, for what is spelled in bytes or unknown.
    fn without_bytes(&self, ids: &[u32]) -> Vec<Option<u32>> {
        let is_byte = |id| self.tokenizer.id_to_token(id).is_some_and(|text| is_byte_piece(&text));
        let mut out: Vec<_> =
            ids.iter().map(|&id| Some(id).filter(|&id| Some(id) != self.unknown && !is_byte(id))).collect();
        out.dedup_by(|a, b| a.is_none() && b.is_none());
        out
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

    /// What to show of a text that differs: the shortest run of its words that differs too.
    fn difference(&self, text: &str, expected: &[u32], found: Vec<i32>) -> Result<Difference> {
        let words = words(text);
        for n in 1..=WORDS.min(words.len().saturating_sub(1)) {
            for run in words.windows(n) {
                let piece = run.concat();
                let expected = self.expected(&piece)?;
                let found = self.model.tokenize(&piece, false, true)?;
                if !same(&expected, &found) && self.explain(&piece, &expected, &found)?.is_none() {
                    return Ok(self.shown(&piece, expected, found));
                }
            }
        }
        Ok(self.shown(text, expected.to_vec(), found))
    }

    fn shown(&self, text: &str, expected: Vec<u32>, found: Vec<i32>) -> Difference {
        let at = to_i32(&expected).iter().zip(&found).take_while(|(e, f)| e == f).count();
        let expected_pieces =
            expected.iter().map(|&id| self.tokenizer.id_to_token(id).unwrap_or_default()).collect();
        let found_pieces = found.iter().map(|&id| self.model.token_text(id).unwrap_or_default()).collect();
        Difference { text: text.to_owned(), at, expected, found, expected_pieces, found_pieces }
    }
}

/// `text` cut in front of each white space that follows something else.
fn words(text: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let (mut begin, mut after_space) = (0, true);
    for (at, c) in text.char_indices() {
        if c.is_whitespace() && !after_space {
            out.push(&text[begin..at]);
            begin = at;
        }
        after_space = c.is_whitespace();
    }
    out.push(&text[begin..]);
    out
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

/// The tokens that are control tokens in llama.cpp, and ordinary entries in the tokenizer.
fn named_special(tokenizer: &Tokenizer, added: &[AddedToken], model: &Model) -> Vec<AddedToken> {
    (0..i32::try_from(model.n_tokens()).unwrap_or(i32::MAX))
        .filter(|&id| model.is_control(id))
        .filter_map(|id| Some((u32::try_from(id).ok()?, model.token_text(id)?)))
        .filter(|(id, text)| tokenizer.token_to_id(text) == Some(*id))
        .filter(|(_, text)| added.iter().all(|t| t.content != *text))
        .map(|(_, text)| AddedToken::from(text, true))
        .collect()
}

/// The ordinary tokens of a SentencePiece vocabulary that llama.cpp makes, though one of their
/// characters is no token.
fn made_of_characters(tokenizer: &Tokenizer, added: &[AddedToken], model: &Model) -> Vec<AddedToken> {
    if model.vocab_type() != VocabType::Spm {
        return Vec::new();
    }
    let texts: Vec<(u32, String)> = (0..u32::try_from(model.n_tokens()).unwrap_or(u32::MAX))
        .filter_map(|id| Some((id, model.token_text(i32::try_from(id).ok()?)?)))
        .collect();
    let single = |text: &str| text.chars().nth(1).is_none();
    let characters: HashSet<char> =
        texts.iter().filter(|(_, t)| single(t)).filter_map(|(_, t)| t.chars().next()).collect();
    let makes = |id: u32, text: &str| model.tokenize(text, false, true).is_ok_and(|ids| same(&[id], &ids));
    texts
        .into_iter()
        .filter(|(_, text)| !single(text) && text.chars().any(|c| !characters.contains(&c)))
        .filter(|(id, text)| tokenizer.token_to_id(text) == Some(*id) && makes(*id, text))
        .filter(|(_, text)| added.iter().all(|t| t.content != *text))
        .map(|(_, text)| AddedToken::from(text, false))
        .collect()
}

/// The tokenizer with what llama.cpp does for its pre-tokenizer, where that is known to be simpler.
fn with_simpler_splitting(tokenizer: &Tokenizer, model: &Model) -> Option<Tokenizer> {
    let name = model.metadata("tokenizer.ggml.pre")?;
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let own = serde_json::to_value(tokenizer.get_pre_tokenizer()?).ok()?;
    let simpler = pre::as_llama_cpp_splits(&name, &Structure::of(&normalizer, &own, false))?;
    let simpler: PreTokenizerWrapper = serde_json::from_value(simpler).ok()?;
    let mut other = tokenizer.clone();
    other.with_pre_tokenizer(Some(simpler));
    Some(other)
}

/// Whether a piece stands for a byte.
fn is_byte_piece(text: &str) -> bool {
    text.len() == 6 && text.starts_with("<0x") && text.ends_with('>')
}

/// A tokenizer of Unigram with bytes in which only unknown characters are spelled so; SentencePiece
/// looks for no byte pieces in the text either.
fn without_byte_pieces(tokenizer: &Tokenizer) -> Option<Tokenizer> {
    let ModelWrapper::Unigram(model) = tokenizer.get_model() else { return None };
    let mut json = serde_json::to_value(model).ok()?;
    let mut found = false;
    for piece in json.get_mut("vocab")?.as_array_mut()? {
        let text = piece.get_mut(0)?;
        if text.as_str().is_some_and(is_byte_piece) {
            // What no text holds.
            *text = format!("\0{}", text.as_str()?).into();
            found = true;
        }
    }
    json["byte_fallback"] = false.into();
    // Read only where it can be borrowed.
    json.as_object_mut()?.remove("type");
    let model: Unigram = serde_json::from_value(json).ok().filter(|_| found)?;
    let mut other = tokenizer.clone();
    other.with_model(model);
    Some(other)
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
    fn words_keep_every_character() {
        for text in ["", " ", "a", "a b", "  a \n b\tc  "] {
            assert_eq!(words(text).concat(), text);
        }
        assert_eq!(words("a \n bc  d"), ["a", " \n bc", "  d"]);
    }
}
