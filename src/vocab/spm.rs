//! SentencePiece from tokenizer.model: `tokenizer.ggml.model` = `llama`.

use std::collections::HashMap;
use std::path::Path;

use prost::Message;
use serde_json::Value;

use super::added::added_form;
use super::hf::{self, AddedToken, TokenizerJson};
use super::proto::{self, ModelProto};
use super::{Kind, MAX_TOKENS, Source, TokenType, Vocab, charsmap, special, vocab_size};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Largest tokenizer.model: the biggest in use have 5 MB, and a hostile one grows twentyfold in
/// memory.
const MODEL_BYTES: u64 = 32 << 20;
/// Score of a row without a token, as llama.cpp's converter writes it.
pub const PAD_SCORE: f32 = -10000.0;
/// Score of an added token.
pub const ADDED_SCORE: f32 = -1000.0;

/// What tokenizer.model is.
pub enum Found {
    /// SentencePiece's.
    Model(Box<ModelProto>),
    /// Something else under that name, such as tiktoken's list.
    Other,
}

/// Reads tokenizer.model; `None` when there is none.
///
/// # Errors
/// `Malformed` when it begins like SentencePiece's and then breaks off.
pub fn read_model(path: &Path, limits: &Limits) -> Result<Option<Found>> {
    let max = limits.side_file_bytes.min(MODEL_BYTES);
    let Some(bytes) = hf::read_side_file(path, max)? else { return Ok(None) };
    // The pieces come first: field 1, length-delimited.
    if bytes.first() != Some(&0x0A) {
        return Ok(Some(Found::Other));
    }
    match proto::count_pieces(&bytes) {
        None => return Err(Error::malformed("is not a SentencePiece model: its fields break off").at(path)),
        Some(n) if n > MAX_TOKENS => {
            return Err(Error::limit(format!("holds {n} pieces, at most {MAX_TOKENS} are allowed")).at(path));
        }
        Some(_) => {}
    }
    let model = ModelProto::decode(bytes.as_slice())
        .map_err(|e| Error::malformed(format!("is not a SentencePiece model: {e}")).at(path))?;
    Ok(Some(Found::Model(Box::new(model))))
}

/// Whether a token is `<0xNN>`.
pub fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Refuses what readers take for something else: a token of a byte that names none, a score that is no number.
///
/// # Errors
/// `Malformed`.
pub fn check_piece(id: usize, text: &[u8], kind: TokenType, score: f32) -> Result<()> {
    if !score.is_finite() {
        return Err(Error::malformed(format!("piece {id} has the score {score}")));
    }
    let shown = || {
        let shown: String = String::from_utf8_lossy(text).chars().take(40).collect();
        format!("piece {id}, {shown:?},")
    };
    if kind == TokenType::Byte && !std::str::from_utf8(text).is_ok_and(is_byte) {
        return Err(Error::malformed(format!("{} stands for a byte, but is not <0x00> to <0xFF>", shown())));
    }
    Ok(())
}

/// Builds the vocabulary.
///
/// # Errors
/// As [`super::load`].
pub fn load(
    source: &Source,
    config: &Value,
    model: Box<ModelProto>,
    json: Option<&TokenizerJson>,
    limits: &Limits,
) -> Result<Vocab> {
    let path = source.dir.join("tokenizer.model");
    let mut vocab = Vocab::new(Kind::Spm, source.pre.unwrap_or("default"));
    vocab.scores = Some(Vec::new());
    let last = (model.pieces.len() as u64).checked_sub(1);
    let size = vocab_size(source, last).map_err(|e| e.at(&path))?;
    let ModelProto { mut pieces, trainer_spec, normalizer_spec } = *model;
    if pieces.len() > size {
        vocab.notes.push(format!(
            "{} of the {} pieces lie beyond vocab_size {size}",
            pieces.len() - size,
            pieces.len()
        ));
        pieces.truncate(size);
    }
    let listed = json.map_or(&[][..], |json| json.added_tokens.as_slice());
    let in_json: HashMap<u32, &AddedToken> = listed.iter().map(|t| (t.id, t)).collect();
    for (id, piece) in pieces.into_iter().enumerate() {
        let number = piece.kind.unwrap_or(TokenType::Normal as i32);
        let kind = TokenType::from_id(number)
            .ok_or_else(|| Error::malformed(format!("piece {id} has the unknown type {number}")).at(&path))?;
        let mut text = piece.piece.unwrap_or_default();
        let score = piece.score.unwrap_or(0.0);
        check_piece(id, &text, kind, score).map_err(|e| e.at(&path))?;
        let mut kind = kind;
        if kind == TokenType::UserDefined {
            // Matched literally by SentencePiece. Where tokenizer.json is the tokenizer in use
            // and does not list the token, it is an ordinary one that no merge makes.
            if json.is_some() && !in_json.contains_key(&(id as u32)) {
                kind = TokenType::Normal;
            } else if let Ok(s) = std::str::from_utf8(&text) {
                text = s.replace('\u{2581}', " ").into_bytes();
            }
        }
        vocab.push(text, kind, score);
    }
    vocab.pad_to(size, PAD_SCORE);
    let mut handled = add_from_files(source, config, &mut vocab, limits)?;
    for token in listed {
        let id = token.id as usize;
        let is = vocab.token_types.get(id).copied();
        let settled = match is {
            None | Some(TokenType::Control | TokenType::Unknown | TokenType::Byte) => true,
            Some(TokenType::UserDefined) => !token.special,
            _ => false,
        };
        if settled || handled.contains(&token.id) {
            continue;
        }
        let (text, kind) = added_form(&token.content, token.special);
        vocab.put(id, text, kind, (is == Some(TokenType::Unused)).then_some(ADDED_SCORE));
        handled.push(token.id);
    }

    let trainer = trainer_spec.unwrap_or_default();
    let normalizer = normalizer_spec.unwrap_or_default();
    vocab.unigram = trainer.model_type.unwrap_or(proto::UNIGRAM) != proto::BPE;
    vocab.notes.push(format!(
        "SentencePiece {} from tokenizer.model",
        if vocab.unigram { "Unigram" } else { "BPE" }
    ));
    if vocab.unigram {
        vocab.notes.push(
            "warning: llama.cpp merges by score, a Unigram tokenizer maximises the sum: ids can differ"
                .into(),
        );
    }
    vocab.charsmap = normalizer.precompiled_charsmap.unwrap_or_default();
    if !vocab.charsmap.is_empty() {
        charsmap::check(&vocab.charsmap).map_err(|e| e.at(&path))?;
        vocab.notes.push(format!(
            "warning: llama.cpp does not apply the tokenizer's normalization {:?}",
            normalizer.name.unwrap_or_default()
        ));
    }
    let stated = config.get("add_prefix_space").and_then(Value::as_bool);
    vocab.add_space_prefix = stated.or((normalizer.add_dummy_prefix == Some(false)).then_some(false));
    let post_processor = json.map_or(&Value::Null, |json| &json.post_processor);
    finish(source, config, listed, post_processor, vocab, limits)
}

/// Ids, flags and templates: the same for both origins of SentencePiece.
///
/// # Errors
/// As [`special::read`].
pub fn finish(
    source: &Source,
    config: &Value,
    added: &[AddedToken],
    post_processor: &Value,
    mut vocab: Vocab,
    limits: &Limits,
) -> Result<Vocab> {
    let n = vocab.tokens.len();
    let special = special::read(source, config, added, post_processor, n, limits, &mut vocab.notes)?;
    vocab.special = special.ids;
    vocab.add = special.add;
    vocab.chat_templates = special.chat_templates;
    if vocab.add.bos.is_none() {
        // What llama.cpp does for this model anyhow, and Llama's tokenizer class too.
        vocab.add.bos = Some(true);
        vocab.notes.push("no file says whether BOS is added: add_bos_token = true is stated".into());
    }
    Ok(vocab)
}

/// added_tokens.json, then `added_tokens_decoder`; returns the ids they set.
fn add_from_files(source: &Source, config: &Value, vocab: &mut Vocab, limits: &Limits) -> Result<Vec<u32>> {
    let n = vocab.tokens.len();
    let mut handled = Vec::new();
    let path = source.dir.join("added_tokens.json");
    let old: HashMap<String, u32> = hf::read_json(&path, limits.side_file_bytes)?.unwrap_or_default();
    for (text, id) in old {
        if id as usize >= n {
            vocab.notes.push(format!("added token {text:?} has id {id}, beyond vocab_size {n}: ignored"));
            continue;
        }
        vocab.put(id as usize, text, TokenType::UserDefined, Some(ADDED_SCORE));
        handled.push(id);
    }
    let decoder =
        hf::added_tokens_decoder(config).map_err(|e| e.at(source.dir.join("tokenizer_config.json")))?;
    for token in decoder {
        let id = token.id as usize;
        let Some(old) = vocab.tokens.get(id) else {
            vocab
                .notes
                .push(format!("added token {:?} has id {id}, beyond vocab_size {n}: ignored", token.content));
            continue;
        };
        if vocab.token_types.get(id) != Some(&TokenType::Unused) && *old != token.content.as_bytes() {
            let old = String::from_utf8_lossy(old).into_owned();
            vocab.notes.push(format!("token {id} {old:?} becomes {:?}", token.content));
        }
        let (text, kind) = added_form(&token.content, token.special);
        vocab.put(id, text, kind, Some(ADDED_SCORE));
        handled.push(token.id);
    }
    handled.sort_unstable();
    Ok(handled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::vocab::proto::{NormalizerSpec, SentencePiece, TrainerSpec};
    use serde_json::json;

    fn piece(text: &str, score: f32, kind: i32) -> SentencePiece {
        SentencePiece { piece: Some(text.into()), score: Some(score), kind: Some(kind) }
    }

    fn model() -> ModelProto {
        ModelProto {
            pieces: vec![
                piece("<unk>", 0.0, 2),
                piece("▁▁", 0.0, 4),
                piece("a", -1.0, 1),
                piece("b", -2.0, 5),
            ],
            trainer_spec: Some(TrainerSpec { model_type: Some(2), ..Default::default() }),
            normalizer_spec: Some(NormalizerSpec { add_dummy_prefix: Some(false), ..Default::default() }),
        }
    }

    fn run(bytes: &[u8], files: &[(&str, Value)], size: Option<u64>) -> Result<Vocab> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.model"), bytes).unwrap();
        for (name, json) in files {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        let config = json!({"bos_token_id": 2});
        let source = Source { dir: dir.path(), config: &config, vocab_size: size, pre: None, kinds: &[] };
        crate::vocab::load(&source, &Limits::default())
    }

    #[test]
    fn pieces_and_added_tokens() {
        let added = json!({"<think>": 4, "<far>": 99});
        let decoder = json!({"added_tokens_decoder": {"5": {"content": "<|x|>"}, "6": {"content": "▁y"}},
            "add_eos_token": true});
        let files = [("added_tokens.json", added), ("tokenizer_config.json", decoder)];
        let v = run(&model().encode_to_vec(), &files, Some(8)).unwrap();
        let texts: Vec<_> = v.tokens.iter().map(|t| std::str::from_utf8(t).unwrap()).collect();
        assert_eq!(texts, ["<unk>", "  ", "a", "b", "<think>", "<|x|>", " y", "[PAD7]"]);
        use TokenType::*;
        assert_eq!(
            v.token_types,
            [Unknown, UserDefined, Normal, Unused, UserDefined, Control, UserDefined, Unused]
        );
        assert_eq!(v.scores.unwrap()[3..], [-2.0, -1000.0, -1000.0, -1000.0, -10000.0]);
        assert_eq!((v.add_space_prefix, v.add.bos, v.add.eos), (Some(false), Some(true), Some(true)));
        assert_eq!((v.special.bos, v.unigram), (Some(2), false));
    }

    #[test]
    fn hostile_files() {
        let good = model().encode_to_vec();
        for n in 1..good.len() {
            // Every truncation is an error or a smaller model; none panics.
            let _ = run(&good[..n], &[], Some(8));
        }
        assert_eq!(run(&good[..9], &[], None).unwrap_err().kind(), ErrorKind::Malformed);
        let mut wrong = model();
        wrong.pieces[0].kind = Some(77);
        assert_eq!(run(&wrong.encode_to_vec(), &[], None).unwrap_err().kind(), ErrorKind::Malformed);
        assert_eq!(run(b"IQ== 0\n", &[], None).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(run(&good, &[], Some(1 << 40)).unwrap_err().kind(), ErrorKind::Limit);
        assert_eq!(run(&good, &[], Some(2)).unwrap().tokens.len(), 2);
    }
}
