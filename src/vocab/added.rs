//! Tokens that were added to a trained vocabulary: they are found in the text before it is split.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::TokenType;
use super::hf::{self, AddedToken};
use crate::error::{Error, Result};

/// How a token that was added to a trained vocabulary appears in GGUF. llama.cpp matches
/// user-defined ones in raw text, so SentencePiece's space sign becomes a space.
pub fn added_form(text: &str, special: bool) -> (String, TokenType) {
    match special || hf::looks_special(text) {
        true => (text.to_owned(), TokenType::Control),
        false => (text.replace('\u{2581}', " "), TokenType::UserDefined),
    }
}

/// Ids by text.
///
/// # Errors
/// `Malformed` for a text that appears twice.
pub fn ids_by_text(entries: &[(String, u32)]) -> Result<HashMap<&str, u32>> {
    let mut ids = HashMap::with_capacity(entries.len());
    for (text, id) in entries {
        if ids.insert(text.as_str(), *id).is_some() {
            return Err(Error::malformed(format!("token {text:?} appears twice in the vocabulary")));
        }
    }
    Ok(ids)
}

/// All added tokens: those of tokenizer.json, those that only tokenizer_config.json lists, and
/// role tokens of the vocabulary that nobody lists.
///
/// # Errors
/// As [`hf::added_tokens_decoder`] and [`check_ids`].
pub fn all_added(
    mut added: Vec<AddedToken>,
    config: &Value,
    ids: &HashMap<&str, u32>,
    notes: &mut Vec<String>,
) -> Result<Vec<AddedToken>> {
    let listed = hf::added_tokens_decoder(config)?;
    // The tokenizers library passes over these.
    added.retain(|token| {
        if token.content.is_empty() {
            notes.push(format!("the added token with id {} is empty: ignored", token.id));
        }
        !token.content.is_empty()
    });
    let known: HashSet<u32> = added.iter().map(|t| t.id).collect();
    added.extend(listed.into_iter().filter(|t| !known.contains(&t.id)));
    for token in &mut added {
        if let Some(&id) = ids.get(token.content.as_str())
            && id != token.id
        {
            notes.push(format!("added token {:?} has id {id}, not {}", token.content, token.id));
            token.id = id;
        }
    }
    check_ids(&added, |_| None)?;
    for role in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"] {
        let Some(content) = hf::token_text(config, &format!("{role}_token")) else { continue };
        if added.iter().any(|t| t.content == content) {
            continue;
        }
        match ids.get(content.as_str()) {
            Some(&id) => added.push(AddedToken::special(id, content)),
            None => notes.push(format!("the {role} token {content:?} is not in the vocabulary")),
        }
    }
    Ok(added)
}

/// Refuses two added tokens of one id; the same token twice does no harm. `own` is the id that the vocabulary
/// itself gives a text, which counts.
///
/// # Errors
/// `Malformed`.
pub fn check_ids(added: &[AddedToken], own: impl Fn(&str) -> Option<u32>) -> Result<()> {
    let mut texts: HashMap<u32, &str> = HashMap::with_capacity(added.len());
    for token in added {
        let id = own(&token.content).unwrap_or(token.id);
        let first = texts.entry(id).or_insert(&token.content);
        if *first != token.content {
            return Err(Error::malformed(format!(
                "the added tokens {first:?} and {:?} have the same id {id}",
                token.content
            )));
        }
    }
    Ok(())
}
