//! Vocabularies, both ways: the tokenizer files of a Hugging Face directory, and the
//! `tokenizer.*` metadata of GGUF.
//!
//! [`load`] and [`Vocab::from_metadata`] read, [`Vocab::to_metadata`] and [`Vocab::write_hf`] write. One
//! file per kind of vocabulary: `bpe` (byte-level BPE), `spm` (SentencePiece from
//! tokenizer.model), `spm_json` (the same, recovered from tokenizer.json), `wpm` (WordPiece),
//! `ugm` (Unigram). Chat templates are carried as data; nothing here renders them.

mod added;
mod base64;
mod bpe;
mod charsmap;
mod gemma4;
mod hf;
mod loadable;
mod metadata;
mod piece;
pub mod pre;
mod proto;
mod special;
mod spm;
mod spm_json;
mod ugm;
mod wpm;
mod write;
mod write_spm;
mod write_wpm;

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::limits::Limits;

pub use loadable::check_loadable;
pub use pre::Candidates;
pub use special::{AddTokens, SpecialIds};

/// Most tokens a vocabulary may have, and the bound on ids and on `vocab_size`.
const MAX_TOKENS: u64 = 1 << 20;

/// Vocabularies in forms of their own, which are named but not read.
const UNREAD: [(&str, &str); 4] = [
    ("qwen.tiktoken", "a list of ranks for tiktoken"),
    ("tiktoken.model", "a list of ranks for tiktoken"),
    ("rwkv_vocab_v20230424.txt", "RWKV's list"),
    ("tokenizer.jsonl", "PLaMo's list"),
];

/// Where a vocabulary can come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// SentencePiece, from tokenizer.model.
    Spm,
    /// SentencePiece, recovered from tokenizer.json.
    SpmFromHfJson,
    /// BPE on text, from tokenizer.json.
    Gemma4,
    /// Byte-level BPE, from tokenizer.json.
    Bpe,
    /// WordPiece, from tokenizer.json or vocab.txt.
    Wpm,
    /// Unigram, from a SentencePiece file.
    Ugm,
    /// Unigram, from tokenizer.json.
    UgmFromHfJson,
}

impl Origin {
    const ALL: [Self; 7] =
        [Self::Spm, Self::SpmFromHfJson, Self::Gemma4, Self::Bpe, Self::Wpm, Self::UgmFromHfJson, Self::Ugm];

    /// What an architecture file calls `name`.
    fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "spm" => Self::Spm,
            "spm_from_hf_json" => Self::SpmFromHfJson,
            "gemma4" => Self::Gemma4,
            "bpe" => Self::Bpe,
            "wpm" => Self::Wpm,
            "ugm" => Self::Ugm,
            "ugm_from_hf_json" => Self::UgmFromHfJson,
            _ => return Err(Error::unsupported(format!("vocabularies of kind {name:?} cannot be read yet"))),
        })
    }
}

/// A Hugging Face directory whose vocabulary is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The directory.
    pub dir: &'a Path,
    /// Its config.json.
    pub config: &'a Value,
    /// Number of tokens the model has rows for, from the config. Missing ids become `[PAD{i}]`.
    pub vocab_size: Option<u64>,
    /// `--pre`: a name given by the user instead of recognising one.
    pub pre: Option<&'a str>,
    /// What to try, first choice first: `spm` (tokenizer.model, tokenized by llama.cpp's `llama`
    /// model even where it is Unigram), `spm_from_hf_json` (the same, recovered from
    /// tokenizer.json), `gemma4` (the same, with its merges), `bpe` (byte-level BPE), `wpm` (WordPiece), `ugm_from_hf_json` (Unigram in
    /// tokenizer.json), `ugm` (Unigram in tokenizer.model, spiece.model or, in the order of
    /// XLM-RoBERTa, sentencepiece.bpe.model). Empty for all, in this order.
    pub kinds: &'a [String],
}

/// How llama.cpp tokenizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Byte-level BPE.
    Bpe,
    /// SentencePiece, merging by score.
    Spm,
    /// WordPiece.
    Wpm,
    /// Unigram.
    Ugm,
    /// BPE on text with SentencePiece's sign for spaces.
    Gemma4,
}

impl Kind {
    /// `tokenizer.ggml.model`.
    pub const fn ggml_model(self) -> &'static str {
        match self {
            Self::Bpe => "gpt2",
            Self::Spm => "llama",
            Self::Wpm => "bert",
            Self::Ugm => "t5",
            Self::Gemma4 => "gemma4",
        }
    }
}

/// `tokenizer.ggml.token_type`; the numbers are SentencePiece's too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// Made by merging.
    Normal = 1,
    /// Stands for what has no token.
    Unknown = 2,
    /// Never in text: BOS, end of turn.
    Control = 3,
    /// Matched literally in text, before merging.
    UserDefined = 4,
    /// Padding of the vocabulary.
    Unused = 5,
    /// `<0xNN>`.
    Byte = 6,
}

impl TokenType {
    /// The type with that number.
    pub const fn from_id(id: i32) -> Option<Self> {
        Some(match id {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// A vocabulary, in GGUF's terms.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocab {
    /// How llama.cpp tokenizes.
    pub kind: Kind,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: String,
    /// Token texts by id. Byte characters for byte-level BPE, U+2581 for spaces in SentencePiece,
    /// U+2581 before what begins a word in WordPiece.
    pub tokens: Vec<Vec<u8>>,
    /// Scores by id; SentencePiece and Unigram only.
    pub scores: Option<Vec<f32>>,
    /// Types by id.
    pub token_types: Vec<TokenType>,
    /// Merges `left right`, first rank first; byte-level BPE only.
    pub merges: Vec<String>,
    /// Tokens with a role.
    pub special: SpecialIds,
    /// What is added around a text.
    pub add: AddTokens,
    /// Whether a space is put before a text.
    pub add_space_prefix: Option<bool>,
    /// Name and template; `default` for the main one.
    pub chat_templates: Vec<(String, String)>,
    /// SentencePiece was trained as Unigram. llama.cpp's `llama` model merges by score all the
    /// same; GGUF does not record it, so from there it is inferred from the scores.
    pub unigram: bool,
    /// SentencePiece's compiled normalization, which GGUF's `llama` model does not carry.
    pub charsmap: Vec<u8>,
    /// Whether runs of spaces count as one; Unigram only.
    pub remove_extra_whitespaces: Option<bool>,
    /// Whether text is brought to lower case; WordPiece only.
    pub lowercase: Option<bool>,
    /// Whether accents are removed; as `lowercase` where it is not stated. WordPiece only.
    pub strip_accents: Option<bool>,
    /// How many kinds of segments the model tells apart (`type_vocab_size`); encoders only.
    pub token_type_count: Option<u32>,
    /// Other `tokenizer.*` entries of the GGUF file this came from.
    pub extra: Vec<(String, crate::container::gguf::Value)>,
    /// What was recognised and how, and warnings. Not part of any file.
    pub notes: Vec<String>,
}

impl Vocab {
    fn new(kind: Kind, pre: &str) -> Self {
        Self {
            kind,
            pre: pre.to_owned(),
            tokens: Vec::new(),
            scores: None,
            token_types: Vec::new(),
            merges: Vec::new(),
            special: SpecialIds::default(),
            add: AddTokens::default(),
            add_space_prefix: None,
            chat_templates: Vec::new(),
            unigram: false,
            charsmap: Vec::new(),
            remove_extra_whitespaces: None,
            lowercase: None,
            strip_accents: None,
            token_type_count: None,
            extra: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// With the pre-tokenizer `name`.
    #[must_use]
    pub fn with_pre(mut self, name: &str) -> Self {
        self.pre = name.to_owned();
        if self.kind == Kind::Bpe && self.add.bos.is_none() && pre::adds_bos(name) {
            // Nothing in the files adds BOS, but llama.cpp would, by the name alone.
            self.add.bos = Some(false);
            self.notes.push(format!(
                "add_bos_token = false is stated, because {name:?} alone makes llama.cpp add BOS"
            ));
        }
        self
    }

    /// The entries that config.json should have for this vocabulary: `ROLE_token_id`, and
    /// `type_vocab_size` of encoders.
    pub fn config_ids(&self) -> impl Iterator<Item = (String, u32)> {
        let types = self.token_type_count.map(|n| ("type_vocab_size".to_owned(), n));
        self.special.iter().filter_map(|(role, _, id)| Some((format!("{role}_token_id"), id?))).chain(types)
    }

    /// Gives `role` (`eot`, `eom`, ...) to the token of this text, where the vocabulary has it and
    /// the role is free.
    ///
    /// # Errors
    /// `Malformed` for a role that does not exist.
    pub fn name_special(&mut self, role: &str, token: &str) -> Result<()> {
        let found = self.tokens.iter().position(|t| t == token.as_bytes());
        let (_, _, id) = self
            .special
            .iter_mut()
            .find(|(name, _, _)| *name == role)
            .ok_or_else(|| Error::malformed(format!("no token has the role {role:?}")))?;
        *id = id.or(found.and_then(|i| u32::try_from(i).ok()));
        Ok(())
    }

    /// Appends a token with its type, and its score where there are scores.
    fn push(&mut self, text: impl Into<Vec<u8>>, kind: TokenType, score: f32) {
        self.tokens.push(text.into());
        self.token_types.push(kind);
        if let Some(scores) = &mut self.scores {
            scores.push(score);
        }
    }

    /// Replaces token `id`; nothing happens to an id that does not exist.
    fn put(&mut self, id: usize, text: impl Into<Vec<u8>>, kind: TokenType, score: Option<f32>) {
        if let (Some(t), Some(k)) = (self.tokens.get_mut(id), self.token_types.get_mut(id)) {
            (*t, *k) = (text.into(), kind);
        }
        if let (Some(score), Some(s)) = (score, self.scores.as_mut().and_then(|s| s.get_mut(id))) {
            *s = score;
        }
    }

    /// Fills up with `[PAD{i}]` to `size` tokens.
    fn pad_to(&mut self, size: usize, score: f32) {
        for i in self.tokens.len()..size {
            self.push(pad(i), TokenType::Unused, score);
        }
    }
}

/// The text of a token that exists only as a row of the embedding.
fn pad(id: usize) -> String {
    format!("[PAD{id}]")
}

/// The size a vocabulary gets: the config's, or just enough for `max_id`.
fn vocab_size(source: &Source, max_id: Option<u64>) -> Result<usize> {
    let needed = max_id.map_or(0, |id| id + 1);
    let size = source.vocab_size.unwrap_or(needed);
    if size > MAX_TOKENS || needed > MAX_TOKENS {
        return Err(Error::limit(format!(
            "a vocabulary of {} tokens: at most {MAX_TOKENS} are allowed",
            size.max(needed)
        )));
    }
    Ok(size as usize)
}

/// The same, where every token up to `max_id` has to have a place.
fn vocab_size_for_all(source: &Source, max_id: Option<u64>) -> Result<usize> {
    let size = vocab_size(source, max_id)?;
    match max_id {
        Some(id) if id >= size as u64 => {
            Err(Error::malformed(format!("has a token with id {id}, the config says vocab_size {size}"))
                .hint("the tokenizer and the config belong to different models"))
        }
        _ => Ok(size),
    }
}

/// Ids of the tokens that were added to a trained vocabulary, by text, as tokenizer.json and
/// tokenizer_config.json list them.
///
/// # Errors
/// `Malformed`, `Limit`, `Io` from reading.
pub fn added_token_ids(dir: &Path, limits: &Limits) -> Result<Value> {
    let json = hf::tokenizer_json(dir, limits)?;
    let listed = hf::added_tokens_decoder(&hf::tokenizer_config(dir, limits)?)?;
    let added = json.map(|j| j.added_tokens).unwrap_or_default().into_iter().chain(listed);
    Ok(added.map(|t| (t.content, Value::from(t.id))).collect::<serde_json::Map<_, _>>().into())
}

/// Reads the vocabulary of a Hugging Face directory. Its pre-tokenizer is what the table says.
///
/// # Errors
/// `Unsupported` for a kind of tokenizer, or a pre-tokenizer, that is not known; `Malformed` when
/// the files contradict themselves or the config's vocabulary size; `Limit`, `Io` from reading.
pub fn load(source: &Source, limits: &Limits) -> Result<Vocab> {
    let (vocab, candidates) = load_undecided(source, limits)?;
    candidates.by_table(source.dir, vocab)
}

/// As [`load`], with the names among which the pre-tokenizer is to be chosen; until then the vocabulary
/// has none. One that the table does not know is no error here.
///
/// # Errors
/// As [`load`].
pub fn load_undecided(source: &Source, limits: &Limits) -> Result<(Vocab, Candidates)> {
    if let Some(name) = source.pre.filter(|name| !pre::is_known(name)) {
        let near = pre::nearest(name).map(|n| format!("did you mean {n:?}?"));
        let error = Error::misuse(format!("llama.cpp knows no pre-tokenizer {name:?}"));
        return Err(near.into_iter().fold(error, Error::hint));
    }
    let config = hf::tokenizer_config(source.dir, limits)?;
    let json_path = source.dir.join("tokenizer.json");
    let mut json = hf::tokenizer_json(source.dir, limits)?;
    let mut seen = Vec::new();
    let named: Vec<Origin> = source
        .kinds
        .iter()
        .map(|k| Origin::from_name(k).map_err(|e| e.at(source.dir)))
        .collect::<Result<_>>()?;
    let mut order = if named.is_empty() { Origin::ALL.to_vec() } else { named };
    if order.contains(&Origin::Spm) && !order.contains(&Origin::UgmFromHfJson) {
        // What a tokenizer.model of Unigram becomes where nothing else gives its ids.
        order.push(Origin::UgmFromHfJson);
    }
    // Encoders say how many kinds of segments they know; decoders do not have them.
    let segments = source.config.get("type_vocab_size").and_then(Value::as_u64);
    let segments = segments.and_then(|n| u32::try_from(n).ok());
    let with_segments =
        |vocab: Vocab| Vocab { token_type_count: segments.or(vocab.token_type_count), ..vocab };
    let decided = |vocab: Vocab| {
        let candidates = Candidates::only(&vocab.pre);
        (vocab, candidates)
    };
    for origin in &order {
        match origin {
            Origin::Spm => match spm::read_model(&source.dir.join("tokenizer.model"), limits)? {
                Some(spm::Found::Model(model)) => {
                    let vocab = spm::load(source, &config, model, json.as_ref(), limits)?;
                    let (vocab, mut candidates) = decided(vocab);
                    if vocab.unigram
                        && let Some(file) = ugm::read_file(source, limits)?
                    {
                        let other = ugm::load_file(source, &config, file, json.as_ref(), limits);
                        candidates.instead = other.ok().map(Box::new);
                    }
                    return Ok((vocab, candidates));
                }
                Some(spm::Found::Other) => {
                    seen.push("a tokenizer.model that is not SentencePiece's".to_owned())
                }
                None => {}
            },
            Origin::SpmFromHfJson => {
                if let Some(json) = json.take_if(|json| spm_json::fits(json)) {
                    let vocab = spm_json::load(source, &config, json, limits);
                    return vocab.map(decided).map_err(|e| e.at(&json_path));
                }
            }
            Origin::Gemma4 => {
                if let Some(json) = json.take_if(|json| spm_json::fits(json)) {
                    let vocab = gemma4::load(source, &config, json, limits);
                    return vocab.map(decided).map_err(|e| e.at(&json_path));
                }
            }
            Origin::Bpe => {
                if let Some(json) = json.take_if(|json| bpe::fits(json)) {
                    let (vocab, candidates) =
                        bpe::load(source, &config, json, limits).map_err(|e| e.at(&json_path))?;
                    return Ok((with_segments(vocab), candidates));
                }
            }
            Origin::Wpm => {
                let (path, words) = match json.take_if(|json| wpm::fits(json)) {
                    Some(json) => (json_path.clone(), Some(json)),
                    None if json.is_some() => (json_path.clone(), None),
                    None => (source.dir.join("vocab.txt"), wpm::vocab_txt(source, &config, limits)?),
                };
                if let Some(words) = words {
                    let vocab = wpm::load(source, &config, words, limits).map_err(|e| e.at(&path))?;
                    return Ok(decided(with_segments(vocab)));
                }
            }
            Origin::Ugm => {
                if let Some(file) = ugm::read_file(source, limits)? {
                    let vocab = ugm::load_file(source, &config, file, json.as_ref(), limits);
                    return Ok(decided(with_segments(vocab.map_err(|e| e.at(source.dir))?)));
                }
            }
            Origin::UgmFromHfJson => {
                if let Some(json) = json.take_if(|json| ugm::fits(json)) {
                    let vocab = ugm::load_json(source, &config, json, limits);
                    return Ok(decided(with_segments(vocab.map_err(|e| e.at(&json_path))?)));
                }
            }
        }
    }
    if let Some(json) = &json {
        seen.push(format!("a tokenizer.json with model {}", json.model.kind()));
    }
    for (name, what) in UNREAD {
        if source.dir.join(name).exists() {
            seen.push(format!("{name}, {what}, which is not read"));
        }
    }
    if seen.is_empty() {
        return Err(Error::unsupported("has no tokenizer.model, tokenizer.json or vocab.txt")
            .at(source.dir)
            .hint("fetch the tokenizer files too; vocab.json and merges.txt alone are not read"));
    }
    Err(Error::unsupported(format!(
        "the vocabulary is none of the kinds this architecture can have ({order:?}): there is {}",
        seen.join(" and ")
    ))
    .at(source.dir)
    .hint("a tokenizer.json of the same model, as transformers saves it, is read"))
}

/// The `tokenizers` library's own tokenizer for a directory: the reference for token ids. Where
/// there is only tokenizer.model, it is built in memory from that.
///
/// # Errors
/// `Malformed` when the library refuses the file, else as [`load`].
pub fn reference_tokenizer(dir: &Path) -> Result<tokenizers::Tokenizer> {
    let limits = Limits::default();
    let path = dir.join("tokenizer.json");
    let bytes = match hf::read_side_file(&path, limits.side_file_bytes)? {
        Some(bytes) => {
            let checked: hf::TokenizerJson = hf::from_json(&bytes, &path)?;
            checked.model.check_merges().map_err(|e| e.at(&path))?;
            charsmap::check_steps([&checked.normalizer, &checked.pre_tokenizer, &checked.post_processor])
                .map_err(|e| e.at(&path))?;
            bytes
        }
        None => {
            let config: Value =
                hf::read_json(&dir.join("config.json"), limits.side_file_bytes)?.unwrap_or_default();
            let size = |c: &Value| c.get("vocab_size")?.as_u64();
            let vocab_size = size(&config).or_else(|| size(config.get("text_config")?));
            let source = Source { dir, config: &config, vocab_size, pre: None, kinds: &[] };
            write::tokenizer_json(&load(&source, &limits)?)?
        }
    };
    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::malformed(e.to_string()).at(path))
}

/// The user-defined pieces of a directory's tokenizer.model, with their ids. A tokenizer.json made
/// from it can have lost that such a piece is matched as it stands.
///
/// # Errors
/// `Malformed` when tokenizer.model is.
pub fn user_defined_pieces(dir: &Path) -> Result<Vec<(u32, String)>> {
    let Some(spm::Found::Model(model)) = spm::read_model(&dir.join("tokenizer.model"), &Limits::default())?
    else {
        return Ok(Vec::new());
    };
    let text = |p: &proto::SentencePiece| String::from_utf8(p.piece.clone()?).ok();
    Ok(model
        .pieces
        .iter()
        .zip(0..)
        .filter(|(p, _)| p.kind == Some(TokenType::UserDefined as i32))
        .filter_map(|(p, id)| Some((id, text(p)?)))
        .collect())
}
