//! GGUF vocabulary -> Hugging Face files.

use std::collections::HashSet;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::hf::{AddedToken, VocabOut, merge_parts};
use super::{AddTokens, Kind, TokenType, Vocab, bpe, gemma4, pad, pre, write_spm, write_wpm};
use crate::error::{Error, Result};

/// tokenizer.json, in the order in which the `tokenizers` library writes it.
#[derive(Serialize)]
pub struct TokenizerOut<'a> {
    pub version: &'static str,
    pub truncation: Value,
    pub padding: Value,
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
    pub model: ModelOut<'a>,
}

/// `model` of tokenizer.json.
#[derive(Serialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant)] // one value, for as long as it takes to write it
pub enum ModelOut<'a> {
    /// Merges.
    Bpe {
        r#type: &'static str,
        dropout: Value,
        unk_token: Option<&'a str>,
        continuing_subword_prefix: Value,
        end_of_word_suffix: Value,
        fuse_unk: bool,
        byte_fallback: bool,
        ignore_merges: bool,
        vocab: VocabOut<'a>,
        merges: Vec<(&'a str, &'a str)>,
    },
    /// The longest known beginning of what is left of a word.
    WordPiece {
        r#type: &'static str,
        unk_token: &'a str,
        continuing_subword_prefix: &'static str,
        max_input_chars_per_word: u32,
        vocab: VocabOut<'a>,
    },
    /// Log-probabilities: wide, so that sums which are equal in llama.cpp stay equal.
    Unigram { r#type: &'static str, unk_id: Option<u32>, vocab: Vec<(&'a str, f64)>, byte_fallback: bool },
}

impl Vocab {
    /// Whether llama.cpp adds BOS before a text, and EOS after it: the flags, or its default for this vocabulary.
    pub fn adds(&self) -> (bool, bool) {
        let default = match self.kind {
            Kind::Bpe => (pre::adds_bos(&self.pre), false),
            Kind::Spm | Kind::Gemma4 => (true, false),
            // Always, whatever the flags say.
            Kind::Wpm => return (true, true),
            Kind::Ugm => (false, true),
        };
        (self.add.bos.unwrap_or(default.0), self.add.eos.unwrap_or(default.1))
    }

    /// The tokenizer files of a Hugging Face directory: name and content of each. The ids of
    /// [`Vocab::config_ids`] belong into config.json, which is the caller's.
    ///
    /// # Errors
    /// `Unsupported` for a pre-tokenizer whose structure is not known, for tokens that are not
    /// UTF-8, and for two tokens with one text, which tokenizer.json cannot hold.
    pub fn write_hf(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = vec![("tokenizer.json".to_owned(), tokenizer_json(self)?)];
        // The names under which llama.cpp's converter looks for them.
        match self.kind {
            Kind::Spm => files.push(("tokenizer.model".to_owned(), write_spm::model_proto(self))),
            Kind::Ugm => files.push(("spiece.model".to_owned(), write_spm::model_proto(self))),
            Kind::Bpe | Kind::Wpm | Kind::Gemma4 => {}
        }
        let mut config = serde_json::to_vec_pretty(&tokenizer_config(self))
            .map_err(|e| Error::malformed(e.to_string()))?;
        config.push(b'\n');
        files.push(("tokenizer_config.json".to_owned(), config));
        Ok(files)
    }
}

/// tokenizer.json alone.
///
/// # Errors
/// As [`Vocab::write_hf`].
pub fn tokenizer_json(vocab: &Vocab) -> Result<Vec<u8>> {
    let texts = texts(vocab)?;
    let written;
    let plain: Vec<&str>;
    let tokenizer = match vocab.kind {
        Kind::Bpe => byte_level(vocab, &texts)?,
        Kind::Gemma4 => gemma4::tokenizer(vocab, &texts)?,
        Kind::Spm | Kind::Ugm => write_spm::tokenizer(vocab, &texts),
        Kind::Wpm => {
            written = write_wpm::texts(vocab, &texts);
            plain = distinct(written.iter().map(|text| &**text))?;
            write_wpm::tokenizer(vocab, &plain)
        }
    };
    serde_json::to_vec(&tokenizer).map_err(|e| Error::malformed(e.to_string()))
}

/// All tokens as text, checked to be distinct.
fn texts(vocab: &Vocab) -> Result<Vec<&str>> {
    let mut texts = Vec::with_capacity(vocab.tokens.len());
    for (id, bytes) in vocab.tokens.iter().enumerate() {
        texts.push(std::str::from_utf8(bytes).map_err(|_| {
            Error::unsupported(format!("token {id} {:?} is not UTF-8", String::from_utf8_lossy(bytes)))
        })?);
    }
    distinct(texts.into_iter())
}

fn distinct<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<&'a str>> {
    let mut seen = HashSet::new();
    let one = |(id, text): (usize, &'a str)| match seen.insert(text) {
        true => Ok(text),
        false => Err(Error::unsupported(format!("token {id} {text:?} appears twice"))),
    };
    texts.enumerate().map(one).collect()
}

/// Whether token `id` is only padding, which no tokenizer file needs to hold.
pub fn is_padding(vocab: &Vocab, id: usize, text: &str) -> bool {
    vocab.token_types.get(id) == Some(&TokenType::Unused) && text == pad(id)
}

/// The tokens that are not made by merging but found in the text.
pub fn added_tokens(
    vocab: &Vocab,
    texts: &[&str],
    mut normalized: impl FnMut(&str) -> bool,
) -> Vec<AddedToken> {
    let kinds = texts.iter().zip(&vocab.token_types).enumerate();
    let added = kinds.filter(|(_, (_, kind))| {
        matches!(kind, TokenType::Unknown | TokenType::Control | TokenType::UserDefined)
    });
    added
        .map(|(id, (text, kind))| AddedToken {
            id: id as u32,
            content: (*text).to_owned(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: normalized(text),
            special: *kind != TokenType::UserDefined,
        })
        .collect()
}

/// A template that puts BOS and EOS around a text. Between two texts there is nothing, but for
/// encoders the end of the first, twice where a separator is added.
pub fn post_processor(vocab: &Vocab, texts: &[&str]) -> Value {
    let (bos, eos) = vocab.adds();
    let token = |wanted: bool, id: Option<u32>| {
        let id = id.filter(|_| wanted)?;
        Some((*texts.get(id as usize)?, id))
    };
    let end = if vocab.kind == Kind::Wpm { vocab.special.sep } else { vocab.special.eos };
    let (bos, eos) = (token(bos, vocab.special.bos), token(eos, end));
    let parted = usize::from(matches!(vocab.kind, Kind::Wpm | Kind::Ugm));
    let parted = parted * if vocab.add.sep == Some(true) { 2 } else { 1 };
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let special = |t: Option<(&str, u32)>, type_id: u32| {
        t.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
    };
    let text = |id: &str, type_id: u32| Some(json!({"Sequence": {"id": id, "type_id": type_id}}));
    let single: Vec<Value> = [special(bos, 0), text("A", 0), special(eos, 0)].into_iter().flatten().collect();
    let between = std::iter::repeat_with(|| special(eos, 0)).take(parted);
    let pair = [special(bos, 0), text("A", 0)].into_iter().chain(between);
    let pair: Vec<Value> = pair.chain([text("B", 1), special(eos, 1)]).flatten().collect();
    let mut tokens = Map::new();
    for (text, id) in [bos, eos].into_iter().flatten() {
        tokens.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

/// Byte-level BPE.
fn byte_level<'a>(vocab: &'a Vocab, texts: &[&'a str]) -> Result<TokenizerOut<'a>> {
    let (normalizer, pre_tokenizer, ignore_merges) = pre::hf_structure(&vocab.pre)?;
    let entries = texts.iter().enumerate().filter(|(id, text)| !is_padding(vocab, *id, text));
    let entries = entries.map(|(id, text)| (*text, id as u32)).collect();
    let pair = |merge: &'a String| {
        merge_parts(merge).ok_or_else(|| Error::malformed(format!("{merge:?} is not a merge")))
    };
    Ok(TokenizerOut {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        // Read back, a token that is not normalized is shown as text: keep that from changing it.
        added_tokens: added_tokens(vocab, texts, |text| bpe::decoded(text) != text),
        normalizer,
        pre_tokenizer,
        post_processor: post_processor(vocab, texts),
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: ModelOut::Bpe {
            r#type: "BPE",
            dropout: Value::Null,
            unk_token: None,
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges,
            vocab: VocabOut(entries),
            merges: vocab.merges.iter().map(pair).collect::<Result<_>>()?,
        },
    })
}

/// tokenizer_config.json.
fn tokenizer_config(vocab: &Vocab) -> Value {
    let mut config = Map::new();
    let AddTokens { bos, eos, sep } = vocab.add;
    let (adds_bos, adds_eos) = vocab.adds();
    let flags = [
        ("add_bos_token", bos.or(adds_bos.then_some(true))),
        ("add_eos_token", eos.or(adds_eos.then_some(true))),
        ("add_sep_token", sep),
        ("add_prefix_space", vocab.add_space_prefix),
    ];
    for (key, flag) in flags {
        if let Some(flag) = flag {
            config.insert(key.into(), flag.into());
        }
    }
    if vocab.kind == Kind::Ugm {
        // Unsaid: as llama.cpp does unless told. transformers does not ask.
        for (key, flag) in [("add_eos_token", eos), ("add_sep_token", sep)] {
            if flag.is_none() {
                config.insert(key.into(), Value::Null);
            }
        }
    }
    let mut special = vocab.special.clone();
    if vocab.kind == Kind::Wpm {
        special.cls = special.cls.or(special.bos);
    }
    for (role, _, id) in special.iter() {
        // A role token that is an ordinary one is named in config.json by its id; here it would
        // become a special token.
        let Some(id) = id.map(|id| id as usize) else { continue };
        let added = matches!(
            vocab.token_types.get(id),
            Some(TokenType::Control | TokenType::Unknown | TokenType::UserDefined)
        );
        if let (true, Some(text)) = (added, vocab.tokens.get(id)) {
            config.insert(format!("{role}_token"), String::from_utf8_lossy(text).into());
        }
    }
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if matches!(vocab.kind, Kind::Bpe | Kind::Wpm) {
        config.insert(bpe::GGML_PRE.into(), vocab.pre.as_str().into());
    }
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    match vocab.chat_templates.as_slice() {
        [] => {}
        [(name, text)] if name == "default" => {
            config.insert("chat_template".into(), text.as_str().into());
        }
        all => {
            let list = all.iter().map(|(name, text)| json!({"name": name, "template": text})).collect();
            config.insert("chat_template".into(), Value::Array(list));
        }
    }
    Value::Object(config)
}
