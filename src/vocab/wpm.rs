//! WordPiece, from tokenizer.json or vocab.txt: `tokenizer.ggml.model` = `bert`.
//!
//! Hugging Face marks what continues a word (`##ing`), GGUF what begins one (`▁the`). Tokens that
//! are found in the text before it is split keep their text.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::added::{all_added, ids_by_text};
use super::bpe::GGML_PRE;
use super::hf::{self, AddedToken, Entries, Model, TokenizerJson};
use super::{Kind, MAX_TOKENS, Source, TokenType, Vocab, special, vocab_size_for_all};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// What GGUF puts before a token that begins a word.
pub const WORD_START: char = '\u{2581}';
/// What Hugging Face puts before a token that continues a word, where the file does not say.
pub const CONTINUATION: &str = "##";

/// The role tokens of BERT's tokenizer class, which old files leave unsaid.
const ROLES: [(&str, &str); 5] =
    [("cls", "[CLS]"), ("sep", "[SEP]"), ("unk", "[UNK]"), ("pad", "[PAD]"), ("mask", "[MASK]")];

/// Whether a tokenizer.json holds this kind.
pub fn fits(json: &TokenizerJson) -> bool {
    json.model.kind() == "WordPiece"
}

/// `config` with BERT's own names for the roles that it leaves out and `has` knows.
fn with_roles(config: &Value, has: impl Fn(&str) -> bool) -> Value {
    let mut config = config.clone();
    for (role, text) in ROLES {
        let key = format!("{role}_token");
        if hf::token_text(&config, &key).is_none() && has(text) {
            config[key] = text.into();
        }
    }
    config
}

/// What transformers makes of vocab.txt, one token a line; `None` where there is none.
///
/// # Errors
/// `Malformed` when the file is not UTF-8, `Limit` and `Io` from reading.
pub fn vocab_txt(source: &Source, config: &Value, limits: &Limits) -> Result<Option<TokenizerJson>> {
    let path = source.dir.join("vocab.txt");
    let Some(bytes) = hf::read_side_file(&path, limits.side_file_bytes)? else { return Ok(None) };
    let text = String::from_utf8(bytes).map_err(|_| Error::malformed("is not UTF-8").at(&path))?;
    if text.lines().count() as u64 > MAX_TOKENS {
        return Err(Error::limit(format!("holds more than the {MAX_TOKENS} tokens allowed")).at(&path));
    }
    // Of two equal lines the last counts.
    let ids: HashMap<&str, u32> = text.lines().zip(0..).collect();
    let config = with_roles(config, |text| ids.contains_key(text));
    let mut added_tokens = Vec::new();
    for (role, _) in ROLES {
        let Some(content) = hf::token_text(&config, &format!("{role}_token")) else { continue };
        let Some(&id) = ids.get(content.as_str()) else { continue };
        if added_tokens.iter().all(|t: &AddedToken| t.id != id) {
            added_tokens.push(AddedToken::special(id, content));
        }
    }
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let token = |key: &str, type_id: u32| json!({"SpecialToken": {"id": hf::token_text(&config, key), "type_id": type_id}});
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let (cls, sep) = (token("cls_token", 0), token("sep_token", 0));
    Ok(Some(TokenizerJson {
        normalizer: json!({"type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars").unwrap_or(true),
            "strip_accents": flag("strip_accents"), "lowercase": flag("do_lower_case").unwrap_or(true)}),
        pre_tokenizer: json!({"type": "BertPreTokenizer"}),
        post_processor: json!({"type": "TemplateProcessing", "single": [cls, sequence("A", 0), sep],
            "pair": [cls, sequence("A", 0), sep, sequence("B", 1), token("sep_token", 1)]}),
        model: Model {
            kind: Some("WordPiece".into()),
            vocab: Entries::Map(ids.iter().map(|(text, id)| ((*text).to_owned(), *id)).collect()),
            merges: Vec::new(),
            unk_token: hf::token_text(&config, "unk_token"),
            byte_fallback: None,
            ignore_merges: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            unk_id: None,
        },
        added_tokens,
    }))
}

/// What is done to a text first.
#[derive(Default)]
struct Normalization {
    lowercase: bool,
    strip_accents: Option<bool>,
    bert: bool,
    /// What llama.cpp cannot do.
    faults: Vec<String>,
}

impl Normalization {
    fn of(normalizer: &Value) -> Self {
        let mut found = Self::default();
        found.add(normalizer);
        if !found.bert {
            // llama.cpp strips accents together with lowering case, unless told.
            found.strip_accents.get_or_insert(false);
        }
        found
    }

    fn add(&mut self, part: &Value) {
        let flag = |key: &str| part.get(key).and_then(Value::as_bool);
        match part.get("type").and_then(Value::as_str) {
            None if part.is_null() => {}
            Some("Sequence") => {
                let parts = part.get("normalizers").and_then(Value::as_array);
                parts.into_iter().flatten().for_each(|part| self.add(part));
            }
            Some("Lowercase") => self.lowercase = true,
            Some("StripAccents") => self.strip_accents = Some(true),
            // Stripping accents decomposes anyhow.
            Some("NFD") => {}
            Some("BertNormalizer") => {
                self.bert = true;
                self.lowercase = flag("lowercase").unwrap_or(true);
                self.strip_accents = flag("strip_accents");
                if flag("handle_chinese_chars") == Some(false) {
                    self.faults.push("llama.cpp takes Chinese characters one by one".into());
                }
            }
            _ => self.faults.push(format!("llama.cpp cannot do this normalization: {part}")),
        }
    }
}

/// Whether words are parted at white space and punctuation, as llama.cpp parts them.
fn splits_words(pre_tokenizer: &Value) -> bool {
    let kind = |v: &Value| v.get("type").and_then(Value::as_str).map(str::to_owned);
    let isolated = |v: &Value| matches!(v.get("behavior").and_then(Value::as_str), None | Some("Isolated"));
    match (kind(pre_tokenizer).as_deref(), pre_tokenizer.get("pretokenizers").and_then(Value::as_array)) {
        (Some("BertPreTokenizer"), _) => true,
        (Some("Sequence"), Some(parts)) => match parts.as_slice() {
            [one] => splits_words(one),
            [a, b] => {
                kind(a).as_deref() == Some("WhitespaceSplit")
                    && kind(b).as_deref() == Some("Punctuation")
                    && isolated(b)
            }
            _ => false,
        },
        _ => false,
    }
}

/// Reads the vocabulary.
///
/// # Errors
/// As [`super::load`]; `Unsupported` for splitting or normalization that llama.cpp does not do,
/// unless `--pre` says to convert all the same.
pub fn load(source: &Source, config: &Value, json: TokenizerJson, limits: &Limits) -> Result<Vocab> {
    let TokenizerJson { added_tokens, normalizer, pre_tokenizer, post_processor, model } = json;
    let Entries::Map(entries) = model.vocab else {
        return Err(Error::malformed("a WordPiece vocabulary must map tokens to ids"));
    };
    let prefix = model.continuing_subword_prefix.as_deref().unwrap_or(CONTINUATION);
    if prefix.is_empty() {
        return Err(Error::unsupported("WordPiece that does not mark what continues a word"));
    }
    let stated = config.get(GGML_PRE).and_then(Value::as_str);
    let mut vocab = Vocab::new(Kind::Wpm, source.pre.or(stated).unwrap_or("default"));
    let normalization = Normalization::of(&normalizer);
    vocab.lowercase = Some(normalization.lowercase);
    vocab.strip_accents = normalization.strip_accents;
    let mut faults = normalization.faults;
    if !splits_words(&pre_tokenizer) {
        faults.push(format!("llama.cpp cannot split words as this does: {pre_tokenizer}"));
    }
    if let (Some(fault), None) = (faults.first(), source.pre) {
        let hint = "--pre default converts all the same, with some wrong ids";
        return Err(Error::unsupported(fault.clone()).hint(hint));
    }
    vocab.notes.extend(faults.into_iter().map(|fault| format!("warning: {fault}")));

    let ids = ids_by_text(&entries)?;
    let config = &with_roles(config, |text| ids.contains_key(text));
    let added = all_added(added_tokens, config, &ids, &mut vocab.notes)?;
    let max_id = entries.iter().map(|e| e.1).chain(added.iter().map(|t| t.id)).max().map(u64::from);
    let size = vocab_size_for_all(source, max_id)?;
    vocab.pad_to(size, 0.0);
    for (text, id) in &entries {
        if vocab.token_types.get(*id as usize) != Some(&TokenType::Unused) {
            return Err(Error::malformed(format!("two tokens have the id {id}")));
        }
        let text = match text.strip_prefix(prefix) {
            Some(rest) => rest.to_owned(),
            None => format!("{WORD_START}{text}"),
        };
        vocab.put(*id as usize, text, TokenType::Normal, None);
    }
    for token in &added {
        let (text, kind) = if token.special || hf::looks_special(&token.content) {
            (token.content.clone(), TokenType::Control)
        } else if token.normalized {
            // Found in normalized text: a word of the vocabulary comes closest, since llama.cpp
            // looks for literal tokens before it lowers case.
            let text =
                if normalization.lowercase { token.content.to_lowercase() } else { token.content.clone() };
            (format!("{WORD_START}{text}"), TokenType::UserDefined)
        } else {
            (token.content.clone(), TokenType::UserDefined)
        };
        vocab.put(token.id as usize, text, kind, None);
    }
    let mut seen = HashSet::with_capacity(size);
    if let Some((id, text)) = vocab.tokens.iter().enumerate().find(|(_, text)| !seen.insert(text.as_slice()))
    {
        let text = String::from_utf8_lossy(text);
        return Err(Error::unsupported(format!("in GGUF, token {id} and another would both be {text:?}")));
    }

    let special = special::read(source, config, &added, &post_processor, size, limits, &mut vocab.notes)?;
    vocab.special = special.ids;
    vocab.add = special.add;
    vocab.chat_templates = special.chat_templates;
    let roles = &mut vocab.special;
    // llama.cpp puts `bos` before every text, and `sep` behind it.
    roles.bos = roles.cls.or(roles.bos);
    roles.sep = roles.sep.or(roles.eos);
    roles.unk = model.unk_token.as_deref().and_then(|text| ids.get(text).copied()).or(roles.unk);
    if roles.bos.is_none() || roles.sep.is_none() {
        return Err(Error::unsupported(
            "llama.cpp puts a CLS and a SEP token around every text, this vocabulary names none",
        ));
    }
    if post_processor.is_null() {
        vocab.notes.push("the tokenizer adds no tokens, llama.cpp puts CLS and SEP around a text".into());
    }
    vocab.token_type_count.get_or_insert(1);
    Ok(vocab)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn run(files: &[(&str, &str)], pre: Option<&str>) -> Result<Vocab> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let config = json!({});
        let source = Source { dir: dir.path(), config: &config, vocab_size: Some(9), pre, kinds: &[] };
        crate::vocab::load(&source, &Limits::default())
    }

    const WORDS: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n##ing\nding\n##\n";

    #[test]
    fn words_of_a_list() {
        let v = run(&[("vocab.txt", WORDS), ("tokenizer_config.json", r#"{"do_lower_case": false}"#)], None);
        let v = v.unwrap();
        let texts: Vec<_> = v.tokens.iter().map(|t| std::str::from_utf8(t).unwrap()).collect();
        assert_eq!(texts, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁the", "ing", "▁ding", "", "[PAD8]"]);
        assert_eq!((v.lowercase, v.strip_accents, v.token_type_count), (Some(false), None, Some(1)));
        assert_eq!(
            (v.special.bos, v.special.sep, v.special.unk, v.special.pad),
            (Some(2), Some(3), Some(1), Some(0))
        );
        assert_eq!((v.add.bos, v.add.eos, v.add.sep), (Some(true), Some(true), Some(false)));
        use TokenType::*;
        assert_eq!(
            v.token_types,
            [Control, Control, Control, Control, Normal, Normal, Normal, Normal, Unused]
        );
    }

    fn with(normalizer: &str, pre_tokenizer: &str, added: &str) -> String {
        let map: serde_json::Map<_, _> =
            WORDS.lines().zip(0..).map(|(t, i)| (t.to_owned(), json!(i))).collect();
        let parse = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        json!({"added_tokens": parse(added), "normalizer": parse(normalizer),
            "pre_tokenizer": {"type": pre_tokenizer},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": map}})
        .to_string()
    }

    #[test]
    fn what_llama_cpp_cannot_do_is_refused() {
        let lower = r#"{"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}"#;
        let good = with(lower, "BertPreTokenizer", "[]");
        let v = run(&[("tokenizer.json", &good)], None).unwrap();
        assert_eq!((v.lowercase, v.strip_accents), (Some(true), Some(false)));
        for bad in [with(r#"{"type": "NFKC"}"#, "BertPreTokenizer", "[]"), with("null", "Whitespace", "[]")] {
            let e = run(&[("tokenizer.json", &bad)], None).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            assert!(e.hint_text().unwrap().contains("--pre"));
            let v = run(&[("tokenizer.json", &bad)], Some("default")).unwrap();
            assert!(v.notes.iter().any(|n| n.starts_with("warning")));
        }
        let same = r#"[{"id": 8, "content": "ing"}]"#;
        let e = run(&[("tokenizer.json", &with("null", "BertPreTokenizer", same))], None).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("\"ing\""), "{e}");
        let e = run(&[("vocab.txt", "a\nb\n")], None).unwrap_err();
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("CLS"), "{e}");
    }

    #[test]
    fn added_words() {
        let added = r#"[{"id": 8, "content": "COVID", "normalized": true}]"#;
        let lower = r#"{"type": "BertNormalizer", "lowercase": true}"#;
        let v = run(&[("tokenizer.json", &with(lower, "BertPreTokenizer", added))], None).unwrap();
        assert_eq!((v.tokens[8].as_slice(), v.token_types[8]), ("▁covid".as_bytes(), TokenType::UserDefined));
    }
}
