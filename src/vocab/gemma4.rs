//! BPE on text with SentencePiece's sign for spaces, with its merges: `tokenizer.ggml.model` =
//! `gemma4`. Unlike `llama` it needs no scores, so it has the ids of any such tokenizer.json that puts
//! no space before a text. llama.cpp begins every text with BOS here.

use serde_json::{Value, json};

use super::hf::{TokenizerJson, VocabOut, merge_parts};
use super::spm_json::{self, Parts};
use super::write::{ModelOut, TokenizerOut, added_tokens, is_padding, post_processor};
use super::{Kind, Source, TokenType, Vocab};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// llama.cpp's converter gives every token this score; nothing reads it.
const SCORE: f32 = -1000.0;
/// What a chat's parser has to see, though tokenizer.json calls it special.
const VISIBLE: [&str; 7] = [
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|\"|>",
];

/// Builds the vocabulary from a tokenizer.json for which [`spm_json::fits`] holds.
///
/// # Errors
/// As [`super::load`]; `Unsupported` for a space before every text.
pub fn load(source: &Source, config: &Value, json: TokenizerJson, limits: &Limits) -> Result<Vocab> {
    complete(source, config, spm_json::entries(source, Kind::Gemma4, json)?, limits)
}

/// Builds it from what was read for [`spm_json`].
///
/// # Errors
/// As [`load`].
pub fn complete(source: &Source, config: &Value, parts: Parts, limits: &Limits) -> Result<Vocab> {
    let (mut vocab, merges, rest) = parts;
    vocab.kind = Kind::Gemma4;
    if rest.prefix {
        return Err(Error::unsupported("llama.cpp's tokenizer \"gemma4\" puts no space before a text"));
    }
    vocab.pre = String::from("gemma4");
    vocab.merges = merges;
    for (text, kind) in vocab.tokens.iter().zip(&mut vocab.token_types) {
        if VISIBLE.iter().any(|visible| visible.as_bytes() == text) {
            *kind = TokenType::UserDefined;
        }
    }
    vocab.scores = Some(vec![SCORE; vocab.tokens.len()]);
    vocab.add_space_prefix = Some(false);
    let mut vocab = rest.finish(source, config, vocab, limits)?;
    if vocab.add.bos != Some(true) {
        vocab.notes.push("llama.cpp's tokenizer \"gemma4\" begins every text with BOS: stated so".into());
        vocab.add.bos = Some(true);
    }
    Ok(vocab)
}

/// tokenizer.json.
///
/// # Errors
/// `Malformed` for a merge of one part.
pub fn tokenizer<'a>(vocab: &'a Vocab, texts: &[&'a str]) -> Result<TokenizerOut<'a>> {
    let space = spm_json::SPACE.to_string();
    let pair = |merge: &'a String| {
        merge_parts(merge).ok_or_else(|| Error::malformed(format!("{merge:?} is not a merge")))
    };
    let entries = texts.iter().enumerate().filter(|(id, text)| !is_padding(vocab, *id, text));
    let unk = vocab.special.unk.and_then(|id| texts.get(id as usize).copied());
    Ok(TokenizerOut {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens: added_tokens(vocab, texts, |_| false),
        normalizer: json!({"type": "Replace", "pattern": {"String": " "}, "content": space}),
        pre_tokenizer: Value::Null,
        post_processor: post_processor(vocab, texts),
        decoder: json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": space}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]}),
        model: ModelOut::Bpe {
            r#type: "BPE",
            dropout: Value::Null,
            unk_token: unk,
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: true,
            byte_fallback: true,
            ignore_merges: false,
            vocab: VocabOut(entries.map(|(id, text)| (*text, id as u32)).collect()),
            merges: vocab.merges.iter().map(pair).collect::<Result<_>>()?,
        },
    })
}
