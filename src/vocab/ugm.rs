//! Unigram, from a SentencePiece file or tokenizer.json: `tokenizer.ggml.model` = `t5`.
//!
//! Of all ways to spell a text in tokens llama.cpp takes the likeliest, after the compiled
//! normalization that the file carries. It has no byte tokens here: what has no token is unknown.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::added::{added_form, all_added};
use super::hf::{self, AddedToken, Entries, TokenizerJson};
use super::proto::{ModelProto, SentencePiece, UNIGRAM};
use super::spm::{self, ADDED_SCORE, Found, PAD_SCORE};
use super::{Kind, Source, TokenType, Vocab, base64, charsmap, special, vocab_size, vocab_size_for_all};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// By how much an unknown character is less likely than the least likely token.
const UNKNOWN_PENALTY: f32 = 10.0;
/// SentencePiece's sign for a space.
const SPACE: &str = "\u{2581}";
/// File names, first choice first.
const FILES: [&str; 3] = ["tokenizer.model", "spiece.model", FAIRSEQ];
/// Under this name the ids of the pieces are not the model's: fairseq put its own tokens first.
const FAIRSEQ: &str = "sentencepiece.bpe.model";
/// What T5's tokenizer class adds where nothing is said.
const EXTRA_IDS: u64 = 100;

/// A Unigram SentencePiece file, and whether fairseq's order of tokens applies.
pub struct File {
    model: Box<ModelProto>,
    fairseq: bool,
}

/// The first SentencePiece file of Unigram in `source`; `None` where there is none.
///
/// # Errors
/// As [`spm::read_model`].
pub fn read_file(source: &Source, limits: &Limits) -> Result<Option<File>> {
    for name in FILES {
        if let Some(Found::Model(model)) = spm::read_model(&source.dir.join(name), limits)?
            && model.trainer_spec.as_ref().and_then(|t| t.model_type).unwrap_or(UNIGRAM) == UNIGRAM
        {
            return Ok(Some(File { model, fairseq: name == FAIRSEQ }));
        }
    }
    Ok(None)
}

/// Whether a tokenizer.json holds this kind.
pub fn fits(json: &TokenizerJson) -> bool {
    json.model.kind() == "Unigram"
}

/// Builds the vocabulary from a SentencePiece file.
///
/// # Errors
/// As [`super::load`]; `Unsupported` for a tokenizer class whose order of tokens is not known.
pub fn load_file(
    source: &Source,
    config: &Value,
    file: File,
    json: Option<&TokenizerJson>,
    limits: &Limits,
) -> Result<Vocab> {
    let ModelProto { mut pieces, trainer_spec, normalizer_spec } = *file.model;
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let mut post_processor = json.map_or(Value::Null, |json| json.post_processor.clone());
    let mut listed = json.map_or(Vec::new(), |json| json.added_tokens.clone());
    if file.fairseq {
        if class.starts_with("Camembert") {
            return Err(Error::unsupported(format!("the order of tokens of {class} is not known"))
                .hint("put the model's tokenizer.json beside it"));
        }
        pieces = fairseq_order(pieces);
        if json.is_none() {
            post_processor = json!({"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]});
            listed = specials(&pieces);
        }
    }
    let n_pieces = pieces.len() as u64;
    let mut vocab = Vocab::new(Kind::Ugm, source.pre.unwrap_or("default"));
    vocab.scores = Some(Vec::new());
    let size = vocab_size(source, n_pieces.checked_sub(1))?;
    if pieces.len() > size {
        vocab
            .notes
            .push(format!("{} of {n_pieces} pieces lie beyond vocab_size {size}", pieces.len() - size));
        pieces.truncate(size);
    }
    for (id, piece) in pieces.into_iter().enumerate() {
        let number = piece.kind.unwrap_or(TokenType::Normal as i32);
        let kind = TokenType::from_id(number)
            .ok_or_else(|| Error::malformed(format!("piece {id} has the unknown type {number}")))?;
        let score = piece.score.unwrap_or(0.0);
        spm::check_piece(id, piece.piece.as_deref().unwrap_or_default(), kind, score)?;
        let text = match String::from_utf8(piece.piece.unwrap_or_default()) {
            // llama.cpp finds these in text as it was written.
            Ok(text) if kind == TokenType::UserDefined => text.replace(SPACE, " ").into_bytes(),
            Ok(text) => text.into_bytes(),
            Err(bytes) => bytes.into_bytes(),
        };
        vocab.push(text, kind, score);
    }
    vocab.pad_to(size, PAD_SCORE);
    let old: std::collections::HashMap<String, u32> =
        hf::read_json(&source.dir.join("added_tokens.json"), limits.side_file_bytes)?.unwrap_or_default();
    for (text, id) in old {
        let special = hf::looks_special(&text) || text.starts_with("<extra_id_");
        let token = AddedToken {
            id,
            content: text,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special,
        };
        put_added(&mut vocab, &token);
    }
    let decoder =
        hf::added_tokens_decoder(config).map_err(|e| e.at(source.dir.join("tokenizer_config.json")))?;
    listed.extend(decoder);
    for token in &listed {
        put_added(&mut vocab, token);
    }
    if class.starts_with("T5Tokenizer") && listed.iter().all(|t| !t.content.starts_with("<extra_id_")) {
        // Behind the pieces, the first last.
        let count = config.get("extra_ids").and_then(Value::as_u64).unwrap_or(EXTRA_IDS);
        let end = n_pieces.saturating_add(count);
        for id in n_pieces..end.min(size as u64) {
            let name = format!("<extra_id_{}>", end - 1 - id);
            if vocab.token_types.get(id as usize) == Some(&TokenType::Unused) {
                vocab.put(id as usize, name, TokenType::Control, Some(0.0));
            }
        }
    }
    let normalizer = normalizer_spec.unwrap_or_default();
    let stated = config.get("add_prefix_space").and_then(Value::as_bool);
    vocab.add_space_prefix = Some(stated.unwrap_or(normalizer.add_dummy_prefix.unwrap_or(true)));
    vocab.remove_extra_whitespaces = Some(normalizer.remove_extra_whitespaces.unwrap_or(true));
    vocab.charsmap = normalizer.precompiled_charsmap.unwrap_or_default();
    let trainer = trainer_spec.unwrap_or_default();
    let mut vocab = finish(source, config, &listed, &post_processor, vocab, limits)?;
    if vocab.special.eos.is_none() && !file.fairseq {
        let id = trainer.eos_id.and_then(|id| u32::try_from(id).ok());
        vocab.special.eos = id.filter(|&id| (id as usize) < size);
    }
    settle(&mut vocab);
    Ok(vocab)
}

/// XLM-RoBERTa's tokens: four of fairseq's own in place of SentencePiece's three, and a mask.
fn fairseq_order(pieces: Vec<SentencePiece>) -> Vec<SentencePiece> {
    let own = |text: &str, kind: TokenType| SentencePiece {
        piece: Some(text.as_bytes().to_vec()),
        score: Some(0.0),
        kind: Some(kind as i32),
    };
    use TokenType::{Control, Unknown};
    let first = [own("<s>", Control), own("<pad>", Control), own("</s>", Control), own("<unk>", Unknown)];
    first.into_iter().chain(pieces.into_iter().skip(3)).chain([own("<mask>", Control)]).collect()
}

/// The control tokens among `pieces`, as tokenizer.json would list them.
fn specials(pieces: &[SentencePiece]) -> Vec<AddedToken> {
    let special = |(piece, id): (&SentencePiece, u32)| {
        let listed = [TokenType::Control as i32, TokenType::Unknown as i32].contains(&piece.kind?);
        let content = String::from_utf8(piece.piece.clone()?).ok().filter(|_| listed)?;
        let lstrip = content == "<mask>";
        Some(AddedToken {
            id,
            content,
            single_word: false,
            lstrip,
            rstrip: false,
            normalized: false,
            special: true,
        })
    };
    pieces.iter().zip(0..).filter_map(special).collect()
}

/// Puts an added token in its place, unless the model has it there already.
fn put_added(vocab: &mut Vocab, token: &AddedToken) {
    let id = token.id as usize;
    let Some(&old) = vocab.token_types.get(id) else {
        let n = vocab.token_types.len();
        vocab
            .notes
            .push(format!("added token {:?} has id {id}, beyond vocab_size {n}: ignored", token.content));
        return;
    };
    if !matches!(old, TokenType::Control | TokenType::Unknown | TokenType::Byte) {
        let (text, kind) = added_form(&token.content, token.special);
        vocab.put(id, text, kind, (old == TokenType::Unused).then_some(ADDED_SCORE));
    }
}

/// What tokenizer.json does to a text before tokens are chosen.
#[derive(Default)]
struct Normalization {
    charsmap: Vec<u8>,
    space_prefix: bool,
    merges_spaces: bool,
    escapes: bool,
    faults: Vec<String>,
    notes: Vec<String>,
}

impl Normalization {
    fn of(json: &TokenizerJson) -> Result<Self> {
        let mut found = Self::default();
        found.add_normalizer(&json.normalizer)?;
        found.add_pre_tokenizer(&json.pre_tokenizer, &json.model.vocab);
        if !found.escapes {
            found.faults.push("Unigram without SentencePiece's sign for spaces".into());
        }
        Ok(found)
    }

    fn add_normalizer(&mut self, part: &Value) -> Result<()> {
        let text = |key: &str| part.get(key).and_then(Value::as_str);
        let pattern = |kind: &str| part.get("pattern").and_then(|p| p.get(kind)?.as_str());
        match text("type") {
            None if part.is_null() => {}
            Some("Sequence") => {
                for part in part.get("normalizers").and_then(Value::as_array).into_iter().flatten() {
                    self.add_normalizer(part)?;
                }
            }
            Some("Precompiled") if self.charsmap.is_empty() => {
                self.charsmap = base64::decode(text("precompiled_charsmap").unwrap_or_default())?;
            }
            // Runs of spaces, those at the ends among them.
            Some("Strip") => {}
            Some("Replace") if matches!(pattern("Regex"), Some(" {2,}" | " +" | r"\s+")) => {
                self.merges_spaces = true;
                self.escapes |= text("content") == Some(SPACE);
            }
            Some("Replace") if pattern("String") == Some(" ") && text("content") == Some(SPACE) => {
                self.escapes = true;
            }
            Some("Prepend") if text("prepend") == Some(SPACE) => self.space_prefix = true,
            _ => self.faults.push(format!("llama.cpp cannot do this normalization: {part}")),
        }
        Ok(())
    }

    fn add_pre_tokenizer(&mut self, part: &Value, vocab: &Entries) {
        let text = |key: &str| part.get(key).and_then(Value::as_str);
        let flag = |key: &str| part.get(key).and_then(Value::as_bool);
        match text("type") {
            None if part.is_null() => {}
            Some("Sequence") => {
                for part in part.get("pretokenizers").and_then(Value::as_array).into_iter().flatten() {
                    self.add_pre_tokenizer(part, vocab);
                }
            }
            Some("WhitespaceSplit") => self.merges_spaces = true,
            Some("Metaspace") if matches!(text("replacement"), None | Some(SPACE)) => {
                self.escapes = true;
                self.space_prefix = match text("prepend_scheme") {
                    Some(scheme) => scheme != "never",
                    None => flag("add_prefix_space").unwrap_or(true),
                };
                let inner = |t: &str| t.chars().skip(1).any(|c| SPACE.starts_with(c));
                if let (true, Entries::List(list)) = (flag("split").unwrap_or(true), vocab)
                    && let Some((inner, _)) =
                        list.iter().find(|(t, _)| inner(t) && t.chars().any(|c| !SPACE.starts_with(c)))
                {
                    self.notes.push(format!(
                        "warning: the tokenizer splits words at spaces, llama.cpp can take tokens such as {inner:?} across"
                    ));
                }
            }
            _ => self.faults.push(format!("llama.cpp cannot split words as this does: {part}")),
        }
    }
}

/// Where a character has no token, SentencePiece spells it in bytes, after all other ways have
/// been weighed; llama.cpp's Unigram knows no bytes and takes the unknown token. For ASCII the byte's token
/// can stand for the character itself, as unlikely as an unknown one: then the ids are the same.
fn bytes_as_characters(vocab: &mut Vocab) {
    let known: HashSet<Vec<u8>> = vocab.tokens.iter().filter(|t| t.len() == 1).cloned().collect();
    let normal = vocab.token_types.iter().zip(vocab.scores.iter().flatten());
    let lowest = normal.filter(|(t, _)| **t == TokenType::Normal).map(|(_, s)| *s).fold(0.0, f32::min);
    for id in 0..vocab.tokens.len() {
        let byte = match (vocab.token_types.get(id), vocab.tokens.get(id)) {
            (Some(TokenType::Byte), Some(text)) => byte_of(text),
            _ => None,
        };
        // No text holds a zero; a space is written otherwise.
        let plain = |b: &u8| b.is_ascii() && *b != b' ' && *b != 0;
        if let Some(byte) = byte.filter(|b| plain(b) && !known.contains(&vec![*b])) {
            vocab.put(id, [byte], TokenType::Normal, Some(lowest - UNKNOWN_PENALTY));
        }
    }
}

/// The byte that `<0xNN>` stands for.
fn byte_of(text: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(text).ok().filter(|text| spm::is_byte(text))?;
    u8::from_str_radix(text.get(3..5)?, 16).ok()
}

/// Builds the vocabulary from tokenizer.json.
///
/// # Errors
/// As [`super::load`]; `Unsupported` for splitting or normalization that llama.cpp does not do,
/// unless `--pre` says to convert all the same.
pub fn load_json(source: &Source, config: &Value, json: TokenizerJson, limits: &Limits) -> Result<Vocab> {
    let mut vocab = Vocab::new(Kind::Ugm, source.pre.unwrap_or("default"));
    vocab.scores = Some(Vec::new());
    let Normalization { charsmap, space_prefix, merges_spaces, faults, notes, .. } =
        Normalization::of(&json)?;
    if let (Some(fault), None) = (faults.first(), source.pre) {
        let hint = "--pre default converts all the same, with some wrong ids";
        return Err(Error::unsupported(fault.clone()).hint(hint));
    }
    vocab.notes.extend(faults.into_iter().map(|fault| format!("warning: {fault}")));
    vocab.notes.extend(notes);
    let TokenizerJson { added_tokens, post_processor, model, .. } = json;
    let Entries::List(list) = model.vocab else {
        return Err(Error::malformed("a Unigram vocabulary must list tokens and scores"));
    };
    let ids: std::collections::HashMap<&str, u32> =
        list.iter().map(|(text, _)| text.as_str()).zip(0..).collect();
    if ids.len() != list.len() {
        return Err(Error::malformed(format!("{} tokens appear twice", list.len() - ids.len())));
    }
    let added = all_added(added_tokens, config, &ids, &mut vocab.notes)?;
    let last = (list.len() as u64).checked_sub(1);
    let max_id = added.iter().map(|t| u64::from(t.id)).chain(last).max();
    let size = vocab_size_for_all(source, max_id)?;
    let byte_fallback = model.byte_fallback == Some(true);
    for (id, (text, score)) in list.iter().enumerate() {
        let (kind, score) = match text {
            _ if model.unk_id == Some(id as u64) => (TokenType::Unknown, *score as f32),
            text if byte_fallback && spm::is_byte(text) => (TokenType::Byte, *score as f32),
            text if *text == super::pad(id) => (TokenType::Unused, PAD_SCORE),
            _ => (TokenType::Normal, *score as f32),
        };
        if !score.is_finite() {
            return Err(Error::malformed(format!("the score of token {text:?} is no number")));
        }
        vocab.push(text.as_str(), kind, score);
    }
    vocab.pad_to(size, PAD_SCORE);
    for token in &added {
        put_added(&mut vocab, token);
    }
    vocab.add_space_prefix = Some(space_prefix);
    vocab.remove_extra_whitespaces = Some(merges_spaces);
    vocab.charsmap = charsmap;
    let mut vocab = finish(source, config, &added, &post_processor, vocab, limits)?;
    settle(&mut vocab);
    Ok(vocab)
}

/// Ids, flags and templates: the same for both origins.
fn finish(
    source: &Source,
    config: &Value,
    added: &[AddedToken],
    post_processor: &Value,
    mut vocab: Vocab,
    limits: &Limits,
) -> Result<Vocab> {
    vocab.unigram = true;
    if !vocab.charsmap.is_empty() {
        charsmap::check(&vocab.charsmap)?;
    }
    if vocab.token_types.contains(&TokenType::Byte) {
        bytes_as_characters(&mut vocab);
        vocab.notes.push(
            "warning: the tokenizer spells unknown characters in bytes, llama.cpp's Unigram only ASCII ones: others become the unknown token".into(),
        );
    }
    let n = vocab.tokens.len();
    let special = special::read(source, config, added, post_processor, n, limits, &mut vocab.notes)?;
    vocab.special = special.ids;
    vocab.add = special.add;
    // Left unsaid, as it was before: llama.cpp adds EOS, and no SEP.
    for (key, flag, default) in
        [("add_eos_token", &mut vocab.add.eos, true), ("add_sep_token", &mut vocab.add.sep, false)]
    {
        if config.get(key).is_some_and(Value::is_null) && *flag == Some(default) {
            *flag = None;
        }
    }
    vocab.chat_templates = special.chat_templates;
    Ok(vocab)
}

/// States what llama.cpp would otherwise assume wrongly.
fn settle(vocab: &mut Vocab) {
    let unknown = vocab.token_types.iter().zip(0..).find(|(kind, _)| **kind == TokenType::Unknown);
    if let (Some((_, id)), None) = (unknown, vocab.special.unk)
        && id != UNKNOWN_ID
    {
        vocab.special.unk = Some(id);
    }
    if vocab.add.bos == Some(true) && vocab.special.bos.is_none() {
        vocab.add.bos = Some(false);
        vocab.notes.push("warning: a BOS token is to be added, but none is named: not added".into());
    }
    if vocab.special.eos.is_none() {
        vocab.add.eos = Some(false);
        vocab.notes.push("no token is named EOS: add_eos_token = false is stated".into());
    }
}

/// The unknown token of a `t5` vocabulary that names none.
const UNKNOWN_ID: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn run(json: &Value, pre: Option<&str>) -> Result<Vocab> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let config = json!({"pad_token_id": 0, "eos_token_id": 1});
        let source = Source { dir: dir.path(), config: &config, vocab_size: Some(6), pre, kinds: &[] };
        crate::vocab::load(&source, &Limits::default())
    }

    fn t5(normalizer: Value, pre_tokenizer: Value) -> Value {
        json!({"added_tokens": [{"id": 4, "content": "<extra_id_0>", "special": true}],
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]},
            "model": {"type": "Unigram", "unk_id": 2, "vocab":
                [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.5], ["<extra_id_0>", 0.0]]}})
    }

    fn metaspace(scheme: &str) -> Value {
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true})
    }

    #[test]
    fn forms_of_one_normalization() {
        let words = json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}]});
        let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": ""});
        let replace = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"});
        let strip = json!({"type": "Strip", "strip_left": false, "strip_right": true});
        let long = json!({"type": "Sequence", "normalizers": [precompiled, strip, replace]});
        for json in [t5(precompiled.clone(), words), t5(long, metaspace("always"))] {
            let v = run(&json, None).unwrap();
            assert_eq!((v.add_space_prefix, v.remove_extra_whitespaces), (Some(true), Some(true)));
            assert_eq!((v.special.eos, v.special.pad, v.add.eos), (Some(1), Some(0), Some(true)));
            use TokenType::*;
            assert_eq!(v.token_types, [Normal, Normal, Unknown, Normal, Control, Unused]);
            assert_eq!(v.scores.unwrap()[3..], [-1.5, 0.0, PAD_SCORE]);
        }
        let v = run(&t5(Value::Null, metaspace("never")), None).unwrap();
        assert_eq!((v.add_space_prefix, v.remove_extra_whitespaces), (Some(false), Some(false)));
    }

    #[test]
    fn what_llama_cpp_cannot_do_is_refused() {
        let lower = t5(json!({"type": "Lowercase"}), metaspace("always"));
        for bad in [&lower, &t5(Value::Null, Value::Null)] {
            assert_eq!(run(bad, None).unwrap_err().kind(), ErrorKind::Unsupported);
            let v = run(bad, Some("default")).unwrap();
            assert!(v.notes.iter().any(|n| n.starts_with("warning")));
        }
        let damaged = json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="});
        assert_eq!(run(&t5(damaged, metaspace("always")), None).unwrap_err().kind(), ErrorKind::Malformed);
        let mut twice = t5(Value::Null, metaspace("always"));
        twice["model"]["vocab"][3][0] = json!("<pad>");
        assert_eq!(run(&twice, None).unwrap_err().kind(), ErrorKind::Malformed);
        let mut short = t5(Value::Null, metaspace("always"));
        short["added_tokens"][0] = json!({"id": 6, "content": "<x>"});
        assert_eq!(run(&short, None).unwrap_err().kind(), ErrorKind::Malformed);
    }
}
