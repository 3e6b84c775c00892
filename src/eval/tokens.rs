//! The tokenizer in the files of a Hugging Face directory, for engines that bring none of their own.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::engine::Delimiters;
use crate::container::side::read_json;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::vocab::{self, Source, Vocab};

/// What is read: tokenizer.json, or what another of a tokenizer's files is turned into.
#[derive(Debug)]
pub struct Tokens {
    tokenizer: Tokenizer,
    // The same, which takes the names of special tokens for text.
    literal: OnceLock<Tokenizer>,
    vocab: Vocab,
    ends: BTreeSet<i32>,
    generation: Json,
}

impl Tokens {
    /// Reads the tokenizer's files, config.json and generation_config.json in `dir`; the last two may be missing.
    /// `n_vocab` is the number of tokens that the model has logits for.
    ///
    /// # Errors
    /// As [`vocab::load`], and `Malformed` for a tokenizer with more tokens.
    pub fn open(dir: &Path, n_vocab: usize, limits: &Limits) -> Result<Self> {
        let side = |name: &str| -> Result<Json> {
            Ok(read_json(&dir.join(name), limits.side_file_bytes)?.unwrap_or_default())
        };
        let (config, generation) = (side("config.json")?, side("generation_config.json")?);
        let source = Source { dir, config: &config, vocab_size: Some(n_vocab as u64), pre: None, kinds: &[] };
        let (vocab, _) = vocab::load_undecided(&source, limits)?;
        if vocab.tokens.len() > n_vocab {
            let message = format!("the tokenizer has {} tokens, the model {n_vocab}", vocab.tokens.len());
            return Err(Error::malformed(message).at(dir).hint("the two belong to different models"));
        }
        let mut tokenizer = vocab::reference_tokenizer(dir)?;
        // These would cut or fill the ids.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let special = &vocab.special;
        let named = [special.eos, special.eot, special.eom].into_iter().flatten().map(i64::from);
        let listed = [&generation, &config].into_iter().flat_map(|json| ids(json.get("eos_token_id")));
        let ends = named.chain(listed).filter_map(|id| i32::try_from(id).ok()).collect();
        Ok(Self { tokenizer, literal: OnceLock::new(), vocab, ends, generation })
    }

    /// As [`Engine::tokenize`](super::engine::Engine::tokenize).
    ///
    /// # Errors
    /// `Unsupported` when the text cannot be tokenized, or an id is none that the model has logits for.
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>> {
        let tokenizer = match parse_special || !self.names_special(text) {
            true => &self.tokenizer,
            false => self.literal.get_or_init(|| {
                let mut literal = self.tokenizer.clone();
                literal.set_encode_special_tokens(true);
                literal
            }),
        };
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| Error::unsupported(format!("tokenizer.json cannot tokenize the text: {e}")))?;
        let mut ids = Vec::with_capacity(encoding.len() + 2);
        let Delimiters { bos, eos, add_bos, add_eos } = self.delimiters();
        ids.extend(bos.filter(|_| add_special && add_bos));
        for &id in encoding.get_ids() {
            match i32::try_from(id).ok().filter(|_| (id as usize) < self.vocab.tokens.len()) {
                Some(id) => ids.push(id),
                None => {
                    let n = self.vocab.tokens.len();
                    let message = format!("the tokenizer gives token {id}, the model has {n}");
                    return Err(Error::unsupported(message).hint("the two belong to different models"));
                }
            }
        }
        ids.extend(eos.filter(|_| add_special && add_eos));
        Ok(ids)
    }

    fn names_special(&self, text: &str) -> bool {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.values().any(|t| t.special && !t.content.is_empty() && text.contains(&t.content))
    }

    /// As [`Engine::piece`](super::engine::Engine::piece).
    ///
    /// # Errors
    /// `Misuse` for ids outside the vocabulary.
    pub fn piece(&self, id: i32) -> Result<Vec<u8>> {
        let piece = usize::try_from(id).ok().and_then(|id| self.vocab.piece(id));
        piece.ok_or_else(|| {
            let n = self.vocab.tokens.len();
            Error::misuse(format!("token {id} is not in the vocabulary of {n} tokens"))
        })
    }

    /// The vocabulary's entry for `id`, in its own spelling.
    pub fn text(&self, id: i32) -> Option<String> {
        let text = self.vocab.tokens.get(usize::try_from(id).ok()?)?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    /// What stands around texts.
    pub fn delimiters(&self) -> Delimiters {
        let id = |id: Option<u32>| id.and_then(|id| i32::try_from(id).ok());
        let (bos, eos) = (id(self.vocab.special.bos), id(self.vocab.special.eos));
        let (add_bos, add_eos) = self.vocab.adds();
        Delimiters { bos, eos, add_bos: add_bos && bos.is_some(), add_eos: add_eos && eos.is_some() }
    }

    /// Whether generation ends with `id`: the tokens that the vocabulary gives this role, and `eos_token_id` of
    /// the two configs.
    pub fn is_end(&self, id: i32) -> bool {
        self.ends.contains(&id)
    }

    /// The main chat template.
    pub fn chat_template(&self) -> Option<String> {
        let templates = &self.vocab.chat_templates;
        let main = templates.iter().find(|(name, _)| name == "default").or(templates.first());
        main.map(|(_, text)| text.clone())
    }

    /// What generation_config.json says of sampling, by GGUF's names for it (`general.sampling.*`).
    pub fn recommended(&self, key: &str) -> Option<String> {
        let name = match key {
            "temp" => "temperature",
            "penalty_repeat" => "repetition_penalty",
            _ => key,
        };
        self.generation.get(name).filter(|v| v.is_number()).map(Json::to_string)
    }
}

/// An id, or a list of them.
fn ids(value: Option<&Json>) -> Vec<i64> {
    match value {
        Some(Json::Array(list)) => list.iter().filter_map(Json::as_i64).collect(),
        Some(one) => one.as_i64().into_iter().collect(),
        None => Vec::new(),
    }
}
