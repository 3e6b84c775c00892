//! Vocabularies of GGUF files: whether their lists agree, ids are within, and loaders come back from them.

use std::collections::HashSet;

use super::Scan;
use super::gguf::Entries;
use super::rules::{
    KEY_TYPE, VOCAB_BYTE, VOCAB_DUPLICATE, VOCAB_EMPTY, VOCAB_ID, VOCAB_LENGTH, VOCAB_LONG, VOCAB_MERGE,
    VOCAB_SCORE, VOCAB_TYPE, VOCAB_UNLOADABLE,
};
use crate::container::gguf::{Array, Value};
use crate::vocab::check_loadable;

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
/// The type of byte tokens, and the highest (`enum llama_token_type`).
const BYTE: i64 = 6;
/// Bytes of a token, far above any: real ones have some hundred, of spaces or dashes.
const LONGEST: usize = 4096;

pub(super) fn check(scan: &mut Scan, entries: &Entries<'_>) {
    let metadata = entries.metadata;
    let Some(value) = metadata.get(TOKENS) else { return };
    let Value::Array(Array::String(tokens)) = value else {
        let found = value.value_type().name();
        return wrong(scan, entries, TOKENS, found, "ARRAY of STRING");
    };
    if tokens.is_empty() {
        scan.find(entries.finding(&VOCAB_EMPTY, TOKENS, "the vocabulary has no tokens"));
    }
    if let Some((id, token)) = tokens.iter().enumerate().find(|(_, t)| t.len() > LONGEST) {
        let message = format!("token {id} has {} bytes, at most {LONGEST} were expected", token.len());
        scan.find(entries.finding(&VOCAB_LONG, TOKENS, message).values(token.len(), LONGEST));
    }
    scores(scan, entries, tokens.len());
    types(scan, entries, tokens);
    special(scan, entries, tokens.len());
    merges(scan, entries, tokens);
    if let Err(e) = check_loadable(metadata) {
        let text = e.to_string();
        let rule = if text.contains("appears twice") { &VOCAB_DUPLICATE } else { &VOCAB_UNLOADABLE };
        scan.find(entries.finding(rule, TOKENS, text));
    }
}

fn wrong(scan: &mut Scan, entries: &Entries<'_>, key: &str, found: &str, wanted: &str) {
    let message = format!("{key} is of type {found}, not {wanted}");
    scan.find(entries.finding(&KEY_TYPE, key, message).values(found, wanted));
}

fn length(scan: &mut Scan, entries: &Entries<'_>, key: &str, found: usize, tokens: usize) {
    if found != tokens {
        let message = format!("{key} has {found} entries for {tokens} tokens");
        let hint = "a reader that takes one for each token reads beyond the list";
        scan.find(entries.finding(&VOCAB_LENGTH, key, message).values(found, tokens).hint(hint));
    }
}

fn scores(scan: &mut Scan, entries: &Entries<'_>, tokens: usize) {
    match entries.metadata.get(SCORES) {
        None => {}
        Some(Value::Array(Array::F32(scores))) => {
            length(scan, entries, SCORES, scores.len(), tokens);
            if let Some(id) = scores.iter().position(|s| s.is_nan()) {
                let message = format!("the score of token {id} is not a number");
                scan.find(entries.finding(&VOCAB_SCORE, SCORES, message));
            }
        }
        Some(other) => wrong(scan, entries, SCORES, other.value_type().name(), "ARRAY of FLOAT32"),
    }
}

fn types(scan: &mut Scan, entries: &Entries<'_>, tokens: &[Vec<u8>]) {
    let types: Vec<i64> = match entries.metadata.get(TYPES) {
        None => return,
        Some(Value::Array(Array::I32(types))) => types.iter().map(|t| i64::from(*t)).collect(),
        Some(Value::Array(Array::U32(types))) => types.iter().map(|t| i64::from(*t)).collect(),
        Some(other) => return wrong(scan, entries, TYPES, other.value_type().name(), "ARRAY of INT32"),
    };
    length(scan, entries, TYPES, types.len(), tokens.len());
    if let Some((id, t)) = types.iter().enumerate().find(|(_, t)| !(0..=BYTE).contains(*t)) {
        let message = format!("token {id} is of type {t}; there are 0 to {BYTE}");
        scan.find(entries.finding(&VOCAB_TYPE, TYPES, message).values(t, "0 to 6"));
    }
    // WordPiece and byte-level BPE write bytes otherwise; RWKV has them escaped.
    let model = entries.metadata.str("tokenizer.ggml.model").unwrap_or_default();
    if !matches!(model, "llama" | "t5" | "plamo2" | "gemma4") {
        return;
    }
    let is_byte = |token: &[u8]| match token {
        [b'<', b'0', b'x', a, b, b'>'] => a.is_ascii_hexdigit() && b.is_ascii_hexdigit(),
        _ => token.len() == 1, // as itself
    };
    let mut bytes = types.iter().zip(tokens).enumerate().filter(|(_, (t, _))| **t == BYTE);
    if let Some((id, (_, token))) = bytes.find(|(_, (_, token))| !is_byte(token)) {
        let shown: String = String::from_utf8_lossy(token).chars().take(40).collect();
        let message = format!("token {id}, {shown:?}, is marked as a byte, but is not <0x00> to <0xFF>");
        scan.find(entries.finding(&VOCAB_BYTE, TOKENS, message).values(format!("{shown:?}"), "<0xNN>"));
    }
}

/// `tokenizer.ggml.*_token_id`: what a loader takes as an index.
fn special(scan: &mut Scan, entries: &Entries<'_>, tokens: usize) {
    for (key, value) in entries.metadata.iter() {
        let Some(role) = key.strip_prefix("tokenizer.ggml.") else { continue };
        if !(role.ends_with("_token_id") || role.ends_with("_token_ids")) {
            continue;
        }
        // -1, as many writers have it, is none; unsigned it is 2^32 - 1.
        let is_none = |id: &Value| matches!(id, Value::I32(-1) | Value::I64(-1) | Value::U32(u32::MAX));
        let is_bad = |id: &Value| !is_none(id) && id.as_u64().is_none_or(|id| id >= tokens as u64);
        let bad = match value {
            Value::Array(ids) => (0..ids.len()).filter_map(|i| ids.get(i)).find(is_bad),
            id => is_bad(id).then(|| id.clone()),
        };
        if let Some(id) = bad {
            let message = format!("{key} is {id}, of {tokens} tokens");
            scan.find(entries.finding(&VOCAB_ID, key, message).values(id, format!("below {tokens}")));
        }
    }
}

fn merges(scan: &mut Scan, entries: &Entries<'_>, tokens: &[Vec<u8>]) {
    let merges = match entries.metadata.get(MERGES) {
        None => return,
        Some(Value::Array(Array::String(merges))) => merges,
        Some(other) => return wrong(scan, entries, MERGES, other.value_type().name(), "ARRAY of STRING"),
    };
    let known: HashSet<&[u8]> = tokens.iter().map(Vec::as_slice).collect();
    let mut joined = Vec::new();
    let (mut count, mut first) = (0u64, None);
    for (i, merge) in merges.iter().enumerate() {
        // A first piece may be a space itself.
        let at = merge.iter().skip(1).position(|b| *b == b' ').map(|at| at + 1);
        let fault = match at.map(|at| merge.split_at(at)) {
            None => Some("is no pair"),
            Some((a, b)) => {
                let b = b.get(1..).unwrap_or_default();
                joined.clear();
                joined.extend_from_slice(a);
                joined.extend_from_slice(b);
                match [a, b].iter().all(|p| known.contains(p)) && known.contains(joined.as_slice()) {
                    true => None,
                    false => Some("takes or makes what is no token"),
                }
            }
        };
        if let Some(fault) = fault {
            count += 1;
            first.get_or_insert((i, fault, merge));
        }
    }
    if let Some((i, fault, merge)) = first {
        let shown: String = String::from_utf8_lossy(merge).chars().take(60).collect();
        let message = format!("merge {i}, {shown:?}, {fault}; {count} of {} do", merges.len());
        scan.find(entries.finding(&VOCAB_MERGE, MERGES, message));
    }
}
