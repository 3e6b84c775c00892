//! SentencePiece recovered from tokenizer.json, where there is no tokenizer.model.
//!
//! The `tokenizers` library keeps such a vocabulary as BPE with explicit merges. llama.cpp has
//! scores instead: it merges any two neighbours whose joined text is a token, the highest score
//! first. Both give the same ids when the merges hold every split of every token, and no token's
//! merges straddle another's in rank; then the scores follow from the ranks. Both conditions are
//! checked, and a vocabulary that breaks them is refused rather than converted wrongly.

use std::collections::HashMap;

use serde_json::Value;

use super::added::{added_form, check_ids};
use super::hf::{AddedToken, Entries, TokenizerJson, merge_parts};
use super::spm::{ADDED_SCORE, PAD_SCORE, finish, is_byte};
use super::{Kind, Source, TokenType, Vocab, gemma4, vocab_size};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;

/// SentencePiece's sign for a space.
pub const SPACE: char = '\u{2581}';

/// Whether a tokenizer.json holds this kind.
pub fn fits(json: &TokenizerJson) -> bool {
    json.model.kind() == "BPE" && json.model.byte_fallback == Some(true) && !super::bpe::fits(json)
}

/// What is left of a tokenizer.json when its tokens are taken.
pub struct Rest {
    /// Whether a space is put before a text.
    pub prefix: bool,
    added: Vec<AddedToken>,
    post_processor: Value,
}

impl Rest {
    /// Ids, flags and templates.
    ///
    /// # Errors
    /// As [`finish`].
    pub fn finish(self, source: &Source, config: &Value, vocab: Vocab, limits: &Limits) -> Result<Vocab> {
        finish(source, config, &self.added, &self.post_processor, vocab, limits)
    }
}

/// The tokens with their types, the merges, and the rest.
pub type Parts = (Vocab, Vec<String>, Rest);

/// Takes a tokenizer.json apart.
///
/// # Errors
/// As [`super::load`]; `Unsupported` when the normalizer does more than llama.cpp can.
pub fn entries(source: &Source, kind: Kind, json: TokenizerJson) -> Result<Parts> {
    let mut vocab = Vocab::new(kind, source.pre.unwrap_or("default"));
    vocab.scores = Some(Vec::new());
    let prefix = space_prefix(&json, &mut vocab.notes)?;
    let Entries::Map(entries) = json.model.vocab else {
        return Err(Error::malformed("a BPE vocabulary must map tokens to ids"));
    };
    let ids = entries.iter().map(|e| e.1).chain(json.added_tokens.iter().map(|t| t.id));
    let size = vocab_size(source, ids.max().map(u64::from))?;
    vocab.pad_to(size, PAD_SCORE);
    for (text, id) in &entries {
        match vocab.token_types.get(*id as usize) {
            Some(TokenType::Unused) => {}
            Some(_) => return Err(Error::malformed(format!("two tokens have the id {id}"))),
            None => {
                vocab.notes.push(format!("token {text:?} has id {id}, beyond vocab_size {size}: ignored"));
                continue;
            }
        }
        let kind = match text {
            text if Some(text) == json.model.unk_token.as_ref() => TokenType::Unknown,
            text if is_byte(text) => TokenType::Byte,
            _ => TokenType::Normal,
        };
        vocab.put(*id as usize, text.as_str(), kind, Some(0.0));
    }
    let own: HashMap<&str, u32> = entries.iter().map(|(text, id)| (text.as_str(), *id)).collect();
    check_ids(&json.added_tokens, |text| own.get(text).copied())?;
    for token in &json.added_tokens {
        let id = token.id as usize;
        let (text, kind) = added_form(&token.content, token.special);
        match vocab.token_types.get(id) {
            Some(TokenType::Unknown | TokenType::Byte) | None => {}
            Some(&old) => {
                let score = (old == TokenType::Unused).then_some(ADDED_SCORE);
                vocab.put(id, text, kind, score);
            }
        }
    }
    let merges = json.model.merges.into_iter().map(|m| m.0).collect();
    let rest = Rest { prefix, added: json.added_tokens, post_processor: json.post_processor };
    Ok((vocab, merges, rest))
}

/// Builds the vocabulary; as [`super::gemma4`] where scores cannot express the merges.
///
/// # Errors
/// As [`super::load`]; `Unsupported` when that cannot do it either, or the normalizer does more
/// than llama.cpp can.
pub fn load(source: &Source, config: &Value, json: TokenizerJson, limits: &Limits) -> Result<Vocab> {
    let (mut vocab, merges, rest) = entries(source, Kind::Spm, json)?;
    if let Err(e) = score(&mut vocab, &merges, source.pre.is_some()) {
        if e.kind() != ErrorKind::Unsupported {
            return Err(e);
        }
        vocab.notes.push(format!("tokenizer \"gemma4\", which has merges: {e}"));
        return gemma4::complete(source, config, (vocab, merges, rest), limits).map_err(|_| e);
    }
    vocab.notes.push("SentencePiece BPE recovered from the merges of tokenizer.json".into());
    let stated = config.get("add_prefix_space").and_then(Value::as_bool);
    vocab.add_space_prefix = stated.or((!rest.prefix).then_some(false));
    rest.finish(source, config, vocab, limits)
}

/// Whether a space is put before a text. Accepts what llama.cpp can do too: escape spaces, put
/// one in front.
fn space_prefix(json: &TokenizerJson, notes: &mut Vec<String>) -> Result<bool> {
    let is = |v: &Value, kind: &str| v.get("type").and_then(Value::as_str) == Some(kind);
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).map(str::to_owned);
    let parts = |v: &Value, key: &str| -> Vec<Value> {
        match v.get(key).and_then(Value::as_array) {
            Some(list) if is(v, "Sequence") => list.clone(),
            _ if v.is_null() => Vec::new(),
            _ => vec![v.clone()],
        }
    };
    let refuse = |part: &Value| {
        Err(Error::unsupported(format!("llama.cpp's SentencePiece cannot do what this part does: {part}")))
    };
    let literal = |v: &Value| v.get("pattern").and_then(|p| text(p, "String"));
    let sign = Some(SPACE.to_string());
    let (mut prefix, mut escaped) = (false, false);
    for part in parts(&json.normalizer, "normalizers") {
        if is(&part, "Prepend") && text(&part, "prepend") == sign {
            prefix = true;
        } else if is(&part, "Replace")
            && literal(&part).as_deref() == Some(" ")
            && text(&part, "content") == sign
        {
            escaped = true;
        } else {
            return refuse(&part);
        }
    }
    for part in parts(&json.pre_tokenizer, "pretokenizers") {
        if is(&part, "Split") && escaped && literal(&part).as_deref() == Some(" ") {
            continue; // No space is left to split at.
        }
        if !is(&part, "Metaspace") || text(&part, "replacement") != sign {
            return refuse(&part);
        }
        escaped = true;
        let old = part.get("add_prefix_space").and_then(Value::as_bool);
        prefix = match text(&part, "prepend_scheme").as_deref() {
            Some("never") => false,
            Some("first") => {
                notes
                    .push("llama.cpp puts a space after special tokens too, not only first in a text".into());
                true
            }
            Some(_) => true,
            None => old.unwrap_or(true),
        };
        let split = part.get("split").and_then(Value::as_bool).unwrap_or(true);
        if let (true, Entries::Map(entries)) = (split, &json.model.vocab)
            && let Some((inner, _)) = entries.iter().find(|(t, _)| t.chars().skip(1).any(|c| c == SPACE))
        {
            notes.push(format!(
                "warning: the tokenizer splits words at spaces, llama.cpp can make tokens such as {inner:?} across"
            ));
        }
    }
    match escaped {
        true => Ok(prefix),
        false => {
            Err(Error::unsupported("BPE with byte fallback, but without SentencePiece's sign for spaces"))
        }
    }
}

/// Sets the scores of the normal tokens from the ranks of the merges.
fn score(vocab: &mut Vocab, merges: &[String], forced: bool) -> Result<()> {
    let mut id_of: HashMap<&str, usize> = HashMap::new();
    for (id, (text, kind)) in vocab.tokens.iter().zip(&vocab.token_types).enumerate() {
        if let (Ok(text), TokenType::Normal) = (std::str::from_utf8(text), kind) {
            id_of.insert(text, id);
        }
    }
    // Tokens in the order in which merges make them, and where each token's last merge stands.
    let mut made: Vec<usize> = Vec::new();
    let mut made_at: HashMap<usize, usize> = HashMap::new();
    let mut pairs: HashMap<(&str, &str), usize> = HashMap::with_capacity(merges.len());
    let mut straddling = None;
    for merge in merges {
        let Some((left, right)) = merge_parts(merge) else {
            return Err(Error::malformed(format!("{merge:?} is not a merge")));
        };
        let joined = format!("{left}{right}");
        let Some(&id) = id_of.get(joined.as_str()) else { continue };
        if pairs.insert((left, right), id).is_some() {
            return Err(Error::malformed(format!("the merge {merge:?} appears twice")));
        }
        match made_at.get(&id) {
            None => {
                made_at.insert(id, made.len());
                made.push(id);
            }
            Some(&at) if at + 1 == made.len() => {}
            Some(_) => straddling = straddling.or(Some(joined)),
        }
    }
    // A symbol is a character, with or without a token, or a token.
    let symbol = |s: &str| s.chars().nth(1).is_none() || id_of.contains_key(s);
    let mut missing = Vec::new();
    for text in id_of.keys() {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if symbol(left) && symbol(right) && !pairs.contains_key(&(left, right)) {
                missing.push(*text);
                break;
            }
        }
    }
    missing.sort_unstable();
    let fault = match (missing.as_slice(), straddling) {
        ([], None) => None,
        ([first, ..], _) => Some(format!(
            "llama.cpp would merge in ways that tokenizer.json does not, for {} tokens such as {first:?}",
            missing.len()
        )),
        ([], Some(text)) => Some(format!(
            "the merges that make {text:?} do not stand together in rank, scores cannot express that"
        )),
    };
    if let Some(fault) = fault {
        if !forced {
            return Err(Error::unsupported(fault).hint(
                "put the model's tokenizer.model beside it; --pre default converts all the same, with some wrong ids",
            ));
        }
        vocab.notes.push(format!("warning: {fault}"));
    }
    // SentencePiece numbers BPE pieces in the order of their merges, characters last, and scores
    // them 0, -1, ...: reproduce that where the order agrees.
    let first = id_of.values().copied().min().unwrap_or(0);
    let in_order = made.windows(2).all(|w| w[0] < w[1]);
    let rank = |id: usize| match (in_order, made_at.get(&id)) {
        (true, _) => id - first,
        (false, Some(&rank)) => rank,
        (false, None) => made.len(),
    };
    let scores: Vec<(usize, f32)> = id_of.values().map(|&id| (id, 0.0 - rank(id) as f32)).collect();
    for (id, score) in scores {
        if let Some(s) = vocab.scores.as_mut().and_then(|s| s.get_mut(id)) {
            *s = score;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(vocab: &[&str], merges: Value, pre: Option<&str>) -> Result<Vocab> {
        let map: serde_json::Map<_, _> =
            vocab.iter().enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
        let json = json!({"added_tokens": [{"id": 0, "content": "<unk>", "special": true}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": null,
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>", "vocab": map, "merges": merges}});
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let config = json!({});
        let source = Source { dir: dir.path(), config: &config, vocab_size: None, pre, kinds: &[] };
        crate::vocab::load(&source, &Limits::default())
    }

    #[test]
    fn scores_follow_ranks() {
        let v = run(&["<unk>", "ab", "abc", "a", "b", "c"], json!(["a b", "ab c"]), None).unwrap();
        assert_eq!(v.scores.unwrap(), [0.0, 0.0, -1.0, -2.0, -3.0, -4.0]);
        assert_eq!(v.token_types[0], TokenType::Unknown);
        assert_eq!(v.add_space_prefix, Some(false));
        // Ids in another order than the merges.
        let v = run(&["<unk>", "a", "abc", "b", "ab", "c"], json!(["a b", "ab c"]), None).unwrap();
        assert_eq!(v.scores.unwrap(), [0.0, -2.0, -1.0, -2.0, 0.0, -2.0]);
    }

    #[test]
    fn what_scores_cannot_say_keeps_its_merges() {
        let tokens = ["<unk>", "a", "b", "c", "ab", "bc", "abc", "cc"];
        // a bc is missing.
        let v = run(&tokens, json!(["a b", "b c", "c c", "ab c"]), None).unwrap();
        assert_eq!((v.kind, v.merges.len(), v.pre.as_str()), (Kind::Gemma4, 4, "gemma4"));
        assert!(v.notes.iter().any(|n| n.contains("\"abc\"")), "{:?}", v.notes);
        // The merges of abc straddle that of cc.
        let merges = json!(["a b", "b c", "ab c", "c c", "a bc"]);
        assert_eq!(run(&tokens, merges.clone(), None).unwrap().kind, Kind::Gemma4);
        let v = run(&tokens, merges, Some("default")).unwrap();
        assert!(v.kind == Kind::Spm && v.notes.iter().any(|n| n.starts_with("warning")));
        let v = run(&tokens, json!(["a b", "b c", "c c", "ab c", "a bc"]), None).unwrap();
        assert_eq!(v.kind, Kind::Spm);
    }
}
