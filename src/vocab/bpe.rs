//! Byte-level BPE from tokenizer.json: `tokenizer.ggml.model` = `gpt2`.

use std::collections::HashSet;

use serde_json::Value;
use tokenizers::Model as _;
use tokenizers::models::bpe::BPE;

use super::added::{added_form, all_added, ids_by_text};
use super::hf::{self, Entries, TokenizerJson, merge_parts};
use super::pre::{self, Candidates, Structure, byte_of_char};
use super::{Kind, Source, TokenType, Vocab, special, vocab_size_for_all};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Entry of tokenizer_config.json that our own writer leaves where several pre-tokenizers split
/// alike, so that the name survives a round trip.
pub const GGML_PRE: &str = "ggml_pre";

/// Most merges in merges.txt; the largest tokenizers have half a million.
const MAX_MERGES: usize = 1 << 21;

/// Whether a tokenizer.json holds this kind.
pub fn fits(json: &TokenizerJson) -> bool {
    json.model.kind() == "BPE" && Structure::of(&Value::Null, &json.pre_tokenizer, false).is_byte_level()
}

/// Reads the vocabulary, whose pre-tokenizer is left to be chosen.
///
/// # Errors
/// As [`super::load`].
pub fn load(
    source: &Source,
    config: &Value,
    json: TokenizerJson,
    limits: &Limits,
) -> Result<(Vocab, Candidates)> {
    let TokenizerJson { added_tokens, normalizer, pre_tokenizer, post_processor, model } = json;
    let Entries::Map(entries) = model.vocab else {
        return Err(Error::malformed("a BPE vocabulary must map tokens to ids"));
    };
    for (name, part) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if part.as_ref().is_some_and(|p| !p.is_empty()) {
            return Err(Error::unsupported(format!("BPE with {name} is not something llama.cpp can run")));
        }
    }
    let mut vocab = Vocab::new(Kind::Bpe, "");
    vocab.merges = model.merges.into_iter().map(|m| m.0).collect();
    if vocab.merges.is_empty() {
        vocab.merges = merges_txt(source, limits)?;
    }
    let ids = ids_by_text(&entries)?;
    let added = all_added(added_tokens, config, &ids, &mut vocab.notes)?;

    let max_id = entries.iter().map(|e| e.1).chain(added.iter().map(|t| t.id)).max().map(u64::from);
    let size = vocab_size_for_all(source, max_id)?;
    vocab.pad_to(size, 0.0);
    let mut taken = vec![false; size];
    for (text, id) in &entries {
        if let Some(taken) = taken.get_mut(*id as usize)
            && std::mem::replace(taken, true)
        {
            return Err(Error::malformed(format!("two tokens have the id {id}")));
        }
        vocab.put(*id as usize, text.as_str(), TokenType::Normal, None);
    }
    for token in &added {
        let text = if token.normalized { token.content.clone() } else { decoded(&token.content) };
        let (text, kind) = added_form(&text, token.special || hf::looks_special(&token.content));
        vocab.put(token.id as usize, text, kind, None);
    }

    let structure = Structure::of(&normalizer, &pre_tokenizer, model.ignore_merges.unwrap_or(false));
    let candidates = match source.pre {
        Some(name) => {
            vocab.notes.push(format!("pre-tokenizer {name:?} was given, not recognised"));
            Candidates::only(name)
        }
        None => pre::candidates(&structure, config.get(GGML_PRE).and_then(Value::as_str), || {
            unmerged(&entries, &vocab)
        })?,
    };
    let missing = byte_of_char().keys().filter(|c| !ids.contains_key(c.to_string().as_str())).count();
    if missing > 0 {
        vocab.notes.push(format!("warning: {missing} of the 256 bytes have no token"));
    }
    let special = special::read(source, config, &added, &post_processor, size, limits, &mut vocab.notes)?;
    vocab.special = special.ids;
    vocab.add = special.add;
    vocab.chat_templates = special.chat_templates;
    vocab.add_space_prefix = config.get("add_prefix_space").and_then(Value::as_bool);
    Ok((vocab, candidates))
}

/// merges.txt, where tokenizer.json has no merges.
fn merges_txt(source: &Source, limits: &Limits) -> Result<Vec<String>> {
    let path = source.dir.join("merges.txt");
    let bytes = hf::read_side_file(&path, limits.side_file_bytes)?
        .ok_or_else(|| Error::malformed("has no merges, and there is no merges.txt"))?;
    let text = String::from_utf8(bytes).map_err(|_| Error::malformed("is not UTF-8").at(&path))?;
    if text.lines().count() > MAX_MERGES {
        return Err(Error::limit(format!("holds more than the {MAX_MERGES} merges allowed")).at(&path));
    }
    let lines = text.lines().enumerate().filter(|(i, line)| !(*i == 0 && line.starts_with('#')));
    lines
        .map(|(_, line)| line.trim())
        .filter(|line| !line.is_empty())
        .map(|line| match line.split(' ').count() {
            2 => Ok(line.to_owned()),
            _ => Err(Error::malformed(format!("{line:?} is not a merge")).at(&path)),
        })
        .collect()
}

/// What the tokenizer shows for a token: byte characters turned back into text. A token that is
/// not made of them, or gives no UTF-8, stays as it is.
pub fn decoded(text: &str) -> String {
    let bytes: Option<Vec<u8>> = text.chars().map(|c| byte_of_char().get(&c).copied()).collect();
    bytes.and_then(|b| String::from_utf8(b).ok()).unwrap_or_else(|| text.to_owned())
}

/// For how many tokens of the trained vocabulary merging their own text gives something else, so
/// that `ignore_merges` matters.
fn unmerged(entries: &[(String, u32)], vocab: &Vocab) -> Result<usize> {
    let known: HashSet<&str> = entries.iter().map(|e| e.0.as_str()).collect();
    // The library refuses, or worse, merges of or to something that is no token; they merge nothing.
    let pair = |m: &String| {
        let (left, right) = merge_parts(m)?;
        let all = [left, right, &format!("{left}{right}")].iter().all(|t| known.contains(t));
        all.then(|| (left.to_owned(), right.to_owned()))
    };
    let bpe = BPE::builder()
        .vocab_and_merges(
            entries.iter().cloned().collect::<tokenizers::models::bpe::Vocab>(),
            vocab.merges.iter().filter_map(pair).collect(),
        )
        .cache_capacity(0)
        .build()
        .map_err(|e| Error::malformed(e.to_string()))?;
    let mut count = 0;
    for (text, id) in entries {
        if vocab.token_types.get(*id as usize) == Some(&TokenType::Normal) {
            let pieces = bpe.tokenize(text).map_err(|e| Error::malformed(e.to_string()))?;
            count += usize::from(pieces.len() != 1);
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::vocab::load as load_dir;
    use serde_json::json;

    fn tokenizer(vocab: Value, merges: Value, added: Value) -> Value {
        json!({"added_tokens": added, "normalizer": null, "pre_tokenizer": {"type": "ByteLevel",
            "add_prefix_space": false}, "model": {"type": "BPE", "vocab": vocab, "merges": merges}})
    }

    fn run(json: &Value, size: Option<u64>, pre: Option<&str>) -> Result<Vocab> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let config = json!({});
        let source = Source { dir: dir.path(), config: &config, vocab_size: size, pre, kinds: &[] };
        load_dir(&source, &Limits::default())
    }

    #[test]
    fn padding_types_and_forms() {
        let added = json!([{"id": 4, "content": "Ġx", "normalized": false},
            {"id": 5, "content": "a▁b", "normalized": true}, {"id": 6, "content": "<|q|>"}, {"id": 3, "content": "é"}]);
        let v =
            run(&tokenizer(json!({"b": 1, "a": 0, "ab": 2}), json!(["a b"]), added), Some(8), None).unwrap();
        let texts: Vec<_> = v.tokens.iter().map(|t| std::str::from_utf8(t).unwrap()).collect();
        assert_eq!(texts, ["a", "b", "ab", "é", " x", "a b", "<|q|>", "[PAD7]"]);
        use TokenType::*;
        assert_eq!(v.token_types[3..], [UserDefined, UserDefined, UserDefined, Control, Unused]);
        assert_eq!(v.pre, "gpt-2");
        assert_eq!(v.merges, ["a b"]);
    }

    #[test]
    fn contradictions() {
        let kind =
            |v: Value, size| run(&tokenizer(v, json!(["a b"]), json!([])), size, None).unwrap_err().kind();
        assert_eq!(kind(json!({"a": 0, "b": 9}), Some(9)), ErrorKind::Malformed);
        assert_eq!(kind(json!({"a": 0, "b": 0}), Some(9)), ErrorKind::Malformed);
        assert_eq!(kind(json!({"a": 4_000_000_000u32}), None), ErrorKind::Limit);
        assert_eq!(kind(json!({"a": 0}), Some(u64::MAX)), ErrorKind::Limit);
        let v = tokenizer(json!({"a": 0, "b": 1}), json!([]), json!([]));
        assert_eq!(run(&v, None, None).unwrap_err().kind(), ErrorKind::Malformed);
        let v = tokenizer(json!({"a": 0, "b": 1, "ab": 2}), json!(["a b"]), json!([]));
        let e = run(&v, None, Some("llama-bqe")).unwrap_err();
        assert_eq!((e.kind(), e.hint_text()), (ErrorKind::Misuse, Some("did you mean \"llama-bpe\"?")));
        let v = run(&v, None, Some("llama-bpe")).unwrap();
        assert_eq!((v.pre.as_str(), v.add.bos), ("llama-bpe", Some(false)));
    }

    #[test]
    fn other_kinds_are_named() {
        let mut v = tokenizer(json!({"a": 0}), json!([]), json!([]));
        v["model"]["type"] = json!("WordLevel");
        let e = run(&v, None, None).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("WordLevel"), "{e}");
    }

    #[test]
    fn ignore_merges_is_weighed() {
        // "abc" cannot be reached: merging gives "ab", "c".
        let v = |extra: &str| {
            let mut v =
                tokenizer(json!({"a": 0, "b": 1, "c": 2, "ab": 3, extra: 4}), json!(["a b"]), json!([]));
            v["model"]["ignore_merges"] = json!(true);
            run(&v, None, None).unwrap().notes.join("\n")
        };
        assert!(v("abc").contains("1 tokens come out differently"));
        assert!(v("d").contains("no difference"));
    }
}
