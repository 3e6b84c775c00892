//! WordPiece -> tokenizer.json.

use std::borrow::Cow;

use serde_json::{Value, json};

use super::hf::{AddedToken, VocabOut};
use super::wpm::{CONTINUATION, WORD_START};
use super::write::{ModelOut, TokenizerOut, added_tokens, is_padding, post_processor};
use super::{TokenType, Vocab};

/// Longer words are unknown, as in all of BERT's tokenizers; llama.cpp knows no such limit.
const LONGEST_WORD: u32 = 100;

/// The tokens as Hugging Face spells them.
pub fn texts<'a>(vocab: &Vocab, texts: &[&'a str]) -> Vec<Cow<'a, str>> {
    let spell = |(id, (&text, kind)): (usize, (&&'a str, &TokenType))| {
        let word = text.strip_prefix(WORD_START).map(Cow::Borrowed);
        match kind {
            TokenType::Control | TokenType::Unknown => text.into(),
            TokenType::UserDefined => word.unwrap_or(text.into()),
            _ if is_padding(vocab, id, text) => text.into(),
            _ => word.unwrap_or_else(|| format!("{CONTINUATION}{text}").into()),
        }
    };
    texts.iter().zip(&vocab.token_types).enumerate().map(spell).collect()
}

/// tokenizer.json, from the tokens as [`texts`] gives them.
pub fn tokenizer<'a>(vocab: &'a Vocab, texts: &[&'a str]) -> TokenizerOut<'a> {
    let entries = texts.iter().enumerate().filter(|(id, text)| !is_padding(vocab, *id, text));
    let unk = vocab.special.unk.and_then(|id| texts.get(id as usize).copied());
    let begins_word = |token: &AddedToken| {
        vocab
            .tokens
            .get(token.id as usize)
            .is_some_and(|text| text.starts_with(WORD_START.to_string().as_bytes()))
    };
    let mut added_tokens = added_tokens(vocab, texts, |_| false);
    for token in &mut added_tokens {
        token.normalized = !token.special && begins_word(token);
    }
    TokenizerOut {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens,
        normalizer: json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": vocab.strip_accents, "lowercase": vocab.lowercase.unwrap_or(true)}),
        pre_tokenizer: json!({"type": "BertPreTokenizer"}),
        post_processor: post_processor(vocab, texts),
        decoder: json!({"type": "WordPiece", "prefix": CONTINUATION, "cleanup": true}),
        model: ModelOut::WordPiece {
            r#type: "WordPiece",
            unk_token: unk.unwrap_or("[UNK]"),
            continuing_subword_prefix: CONTINUATION,
            max_input_chars_per_word: LONGEST_WORD,
            vocab: VocabOut(entries.map(|(id, text)| (*text, id as u32)).collect()),
        },
    }
}
