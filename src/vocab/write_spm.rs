//! SentencePiece -> tokenizer.json and tokenizer.model.

use std::collections::HashMap;

use prost::Message;
use serde_json::{Value, json};

use super::base64;
use super::hf::VocabOut;
use super::proto::{BPE, ModelProto, NormalizerSpec, SentencePiece, TrainerSpec, UNIGRAM};
use super::write::{ModelOut, TokenizerOut, added_tokens, is_padding, post_processor};
use super::{Kind, TokenType, Vocab};

/// SentencePiece's sign for a space.
const SPACE: &str = "\u{2581}";

/// tokenizer.json: BPE whose merges are all splits of all tokens, highest score first, which is
/// how llama.cpp merges; or Unigram where the scores are log-probabilities.
pub fn tokenizer<'a>(vocab: &'a Vocab, texts: &[&'a str]) -> TokenizerOut<'a> {
    let merges_spaces = match vocab.kind {
        Kind::Ugm => vocab.remove_extra_whitespaces == Some(true),
        _ => !vocab.charsmap.is_empty(),
    };
    // llama.cpp puts the one space that a run becomes before every word, the first too.
    let prefix = vocab.add_space_prefix != Some(false) || vocab.kind == Kind::Ugm && merges_spaces;
    let escape = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut normalizers = Vec::new();
    if !vocab.charsmap.is_empty() {
        normalizers
            .push(json!({"type": "Precompiled", "precompiled_charsmap": base64::encode(&vocab.charsmap)}));
    }
    if merges_spaces {
        normalizers.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
        normalizers.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
    }
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
    }
    normalizers.push(escape);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unk = vocab.token_types.iter().position(|t| *t == TokenType::Unknown);
    let byte_fallback = vocab.token_types.contains(&TokenType::Byte);
    let model = if vocab.unigram {
        let scores = vocab.scores.as_deref().unwrap_or_default();
        let trained = scores.iter().zip(&vocab.token_types).filter(|(_, t)| **t == TokenType::Normal);
        let lowest = trained.map(|(s, _)| *s).fold(0.0, f32::min);
        // A list by id has no holes: padding stays, but at the end, and unused tokens keep a score
        // that nothing chooses. What else was not trained must not set the lowest score, which counts where a
        // character has no token.
        let rows = texts.iter().enumerate().rposition(|(id, text)| !is_padding(vocab, id, text));
        let rows = rows.map_or(0, |last| last + 1);
        let row = |(id, (text, score)): (usize, (&&'a str, &f32))| match vocab.token_types.get(id)
            == Some(&TokenType::Unused)
        {
            true => (*text, f64::from(*score)),
            false => (*text, f64::from(score.max(lowest))),
        };
        ModelOut::Unigram {
            r#type: "Unigram",
            unk_id: unk.map(|id| id as u32),
            vocab: texts.iter().zip(scores).enumerate().take(rows).map(row).collect(),
            byte_fallback,
        }
    } else {
        let entries = texts.iter().enumerate().filter(|(id, text)| !is_padding(vocab, *id, text));
        ModelOut::Bpe {
            r#type: "BPE",
            dropout: Value::Null,
            unk_token: unk.and_then(|id| texts.get(id).copied()),
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: true,
            byte_fallback,
            ignore_merges: false,
            vocab: VocabOut(entries.map(|(id, text)| (*text, id as u32)).collect()),
            merges: merges(vocab, texts),
        }
    };
    TokenizerOut {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens: added_tokens(vocab, texts, |_| false),
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        post_processor: post_processor(vocab, texts),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
    }
}

/// Every way to make a normal token of two, ordered by the token's score, then by ids.
fn merges<'a>(vocab: &Vocab, texts: &[&'a str]) -> Vec<(&'a str, &'a str)> {
    let mut id_of: HashMap<&str, usize> = HashMap::new();
    for (id, (text, kind)) in texts.iter().zip(&vocab.token_types).enumerate() {
        if *kind == TokenType::Normal {
            id_of.insert(text, id);
        }
    }
    let scores = vocab.scores.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    for (&text, &id) in texts.iter().filter_map(|text| id_of.get_key_value(text)) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&l), Some(&r)) = (id_of.get(left), id_of.get(right)) {
                let score = scores.get(id).copied().unwrap_or(0.0);
                found.push((score, id, l, r));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    found.into_iter().filter_map(|(_, _, l, r)| Some((*texts.get(l)?, *texts.get(r)?))).collect()
}

/// tokenizer.model, with every row as a piece.
pub fn model_proto(vocab: &Vocab) -> Vec<u8> {
    let scores = vocab.scores.as_deref().unwrap_or_default();
    let rows = vocab.tokens.iter().zip(&vocab.token_types).zip(scores);
    let pieces = rows.map(|((text, &kind), &score)| {
        let piece = match (kind, std::str::from_utf8(text)) {
            (TokenType::UserDefined, Ok(text)) => text.replace(' ', SPACE).into_bytes(),
            _ => text.clone(),
        };
        let kind = (kind != TokenType::Normal).then_some(kind as i32);
        SentencePiece { piece: Some(piece), score: Some(score), kind }
    });
    let id = |id: Option<u32>| Some(id.map_or(-1, |id| i32::try_from(id).unwrap_or(-1)));
    let text =
        |id: Option<u32>| vocab.tokens.get(id? as usize).map(|t| String::from_utf8_lossy(t).into_owned());
    let special = &vocab.special;
    let unk = vocab.token_types.iter().position(|t| *t == TokenType::Unknown).map(|id| id as u32);
    let trainer_spec = Some(TrainerSpec {
        model_type: Some(if vocab.unigram { UNIGRAM } else { BPE }),
        vocab_size: i32::try_from(vocab.tokens.len()).ok(),
        byte_fallback: Some(vocab.token_types.contains(&TokenType::Byte)),
        unk_id: id(unk),
        bos_id: id(special.bos),
        eos_id: id(special.eos),
        pad_id: id(special.pad),
        unk_piece: text(unk),
        bos_piece: text(special.bos),
        eos_piece: text(special.eos),
        pad_piece: text(special.pad),
    });
    let plain = vocab.charsmap.is_empty();
    let merges_spaces = if vocab.kind == Kind::Ugm { vocab.remove_extra_whitespaces } else { Some(!plain) };
    let normalizer_spec = Some(NormalizerSpec {
        name: Some(if plain { "identity" } else { "user_defined" }.into()),
        precompiled_charsmap: Some(vocab.charsmap.clone()),
        add_dummy_prefix: Some(vocab.add_space_prefix != Some(false)),
        remove_extra_whitespaces: Some(merges_spaces == Some(true)),
        escape_whitespaces: Some(true),
    });
    ModelProto { pieces: pieces.collect(), trainer_spec, normalizer_spec }.encode_to_vec()
}
