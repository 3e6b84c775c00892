//! `tokenizer.*` metadata: keys and value types as llama.cpp's converter writes them.

use super::{AddTokens, Kind, SpecialIds, TokenType, Vocab, charsmap};
use crate::container::gguf::{Array, Metadata, Value};
use crate::error::{Error, Result};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const MERGE_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";
const LOWERCASE: &str = "tokenizer.ggml.normalizer.lowercase";
const STRIP_ACCENTS: &str = "tokenizer.ggml.normalizer.strip_accents";
const SEGMENTS: &str = "tokenizer.ggml.token_type_count";
const TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATES: &str = "tokenizer.chat_templates";

/// Keys that have a field of their own, apart from ids, `add` flags and templates.
const OWN: [&str; 12] = [
    MODEL,
    PRE,
    TOKENS,
    SCORES,
    TYPES,
    MERGES,
    SPACE_PREFIX,
    MERGE_SPACES,
    LOWERCASE,
    STRIP_ACCENTS,
    SEGMENTS,
    TEMPLATES,
];

/// Keys of the `add` flags.
fn add_flags(add: &mut AddTokens) -> [(&'static str, &mut Option<bool>); 3] {
    [
        ("tokenizer.ggml.add_bos_token", &mut add.bos),
        ("tokenizer.ggml.add_eos_token", &mut add.eos),
        ("tokenizer.ggml.add_sep_token", &mut add.sep),
    ]
}

impl Vocab {
    /// Adds the `tokenizer.*` entries.
    pub fn to_metadata(&self, metadata: &mut Metadata) {
        metadata.set(MODEL, self.kind.ggml_model());
        // This one is its own pre-tokenizer.
        if self.kind != Kind::Gemma4 {
            metadata.set(PRE, self.pre.as_str());
        }
        metadata.set(TOKENS, Value::Array(Array::String(self.tokens.clone())));
        if let Some(scores) = &self.scores {
            metadata.set(SCORES, Value::Array(Array::F32(scores.clone())));
        }
        let types = self.token_types.iter().map(|&t| t as i32).collect();
        metadata.set(TYPES, Value::Array(Array::I32(types)));
        if !self.merges.is_empty() {
            let merges = self.merges.iter().map(|m| m.clone().into_bytes()).collect();
            metadata.set(MERGES, Value::Array(Array::String(merges)));
        }
        for (_, key, id) in self.special.iter() {
            if let Some(id) = id {
                metadata.set(key, Value::U32(id));
            }
        }
        for (key, flag) in add_flags(&mut self.add.clone()) {
            if let Some(flag) = *flag {
                metadata.set(key, Value::Bool(flag));
            }
        }
        let flags = [
            (SPACE_PREFIX, self.add_space_prefix),
            (MERGE_SPACES, self.remove_extra_whitespaces),
            (LOWERCASE, self.lowercase),
            (STRIP_ACCENTS, self.strip_accents),
        ];
        for (key, flag) in flags {
            if let Some(flag) = flag {
                metadata.set(key, Value::Bool(flag));
            }
        }
        if let Some(count) = self.token_type_count {
            metadata.set(SEGMENTS, Value::U32(count));
        }
        if self.kind == Kind::Ugm && !self.charsmap.is_empty() {
            metadata.set(CHARSMAP, Value::Array(Array::U8(self.charsmap.clone())));
        }
        let mut names: Vec<&str> = Vec::new();
        for (name, text) in self.chat_templates.iter().filter(|(name, _)| name != "default") {
            metadata.set(format!("{TEMPLATE}.{name}"), text.as_str());
            names.push(name);
        }
        if !names.is_empty() {
            names.sort_unstable();
            let names = names.iter().map(|n| n.as_bytes().to_vec()).collect();
            metadata.set(TEMPLATES, Value::Array(Array::String(names)));
        }
        if let Some((_, text)) = self.chat_templates.iter().find(|(name, _)| name == "default") {
            metadata.set(TEMPLATE, text.as_str());
        }
        for (key, value) in &self.extra {
            metadata.set(key.as_str(), value.clone());
        }
    }

    /// Reads the `tokenizer.*` entries of a GGUF file.
    ///
    /// # Errors
    /// `Unsupported` for a tokenizer model other than `gpt2`, `llama`, `bert`, `t5` and `gemma4`; `Malformed` when
    /// entries are missing, of another type, or of different lengths.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let missing = |key: &str| Error::malformed(format!("metadata has no {key} of the right type"));
        let kind = match metadata.str(MODEL).ok_or_else(|| missing(MODEL))? {
            "gpt2" => Kind::Bpe,
            "llama" => Kind::Spm,
            "bert" => Kind::Wpm,
            "t5" => Kind::Ugm,
            "gemma4" => Kind::Gemma4,
            other => {
                return Err(Error::unsupported(format!("tokenizer model {other:?} is not supported")));
            }
        };
        let mut vocab = Self::new(
            kind,
            metadata.str(PRE).unwrap_or(if kind == Kind::Gemma4 { "gemma4" } else { "default" }),
        );
        let array =
            |key: &str| metadata.get(key).map(|v| v.as_array().ok_or_else(|| missing(key))).transpose();
        vocab.tokens = match array(TOKENS)? {
            Some(Array::String(tokens)) => tokens.clone(),
            _ => return Err(missing(TOKENS)),
        };
        let n = vocab.tokens.len();
        let same_length = |key: &str, len: usize| match len == n {
            true => Ok(()),
            false => Err(Error::malformed(format!("{key} has {len} entries, {TOKENS} has {n}"))),
        };
        vocab.scores = match array(SCORES)? {
            Some(Array::F32(scores)) => Some(scores.clone()),
            Some(Array::I32(scores)) => Some(scores.iter().map(|&s| s as f32).collect()),
            Some(_) => return Err(missing(SCORES)),
            None if matches!(kind, Kind::Spm | Kind::Ugm) => return Err(missing(SCORES)),
            None => None,
        };
        if let Some(scores) = &vocab.scores {
            same_length(SCORES, scores.len())?;
        }
        vocab.token_types = match array(TYPES)? {
            Some(Array::I32(types)) => {
                same_length(TYPES, types.len())?;
                let known = |&t: &i32| {
                    TokenType::from_id(t)
                        .ok_or_else(|| Error::malformed(format!("{TYPES} has the unknown type {t}")))
                };
                types.iter().map(known).collect::<Result<_>>()?
            }
            Some(_) => return Err(missing(TYPES)),
            None => vec![TokenType::Normal; n],
        };
        match array(MERGES)? {
            Some(Array::String(merges)) => {
                let text = |m: &Vec<u8>| {
                    String::from_utf8(m.clone())
                        .map_err(|_| Error::malformed(format!("{MERGES} holds a merge that is not UTF-8")))
                };
                vocab.merges = merges.iter().map(text).collect::<Result<_>>()?;
            }
            Some(_) => return Err(missing(MERGES)),
            None => {}
        }
        for (_, key, slot) in vocab.special.iter_mut() {
            let Some(value) = metadata.get(key) else { continue };
            match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) if (id as usize) < n => *slot = Some(id),
                // Files in the wild hold -1 for "none", which reads as 2^32 - 1.
                Some(u32::MAX) => {}
                _ => return Err(Error::malformed(format!("{key} is {value}, there are {n} tokens"))),
            }
        }
        // Left out, these have numbers of their own in llama.cpp, and are put around every text.
        let given = |id: u32| Some(id).filter(|&id| (id as usize) < n);
        match kind {
            Kind::Wpm => {
                vocab.special.bos = vocab.special.bos.or(given(101));
                vocab.special.sep = vocab.special.sep.or(given(102));
                vocab.special.unk = vocab.special.unk.or(given(100));
            }
            Kind::Ugm => vocab.special.eos = vocab.special.eos.or(given(1)),
            Kind::Bpe | Kind::Spm | Kind::Gemma4 => {}
        }
        for (key, flag) in add_flags(&mut vocab.add) {
            *flag = metadata.get(key).and_then(Value::as_bool);
        }
        let flag = |key: &str| metadata.get(key).and_then(Value::as_bool);
        vocab.add_space_prefix = flag(SPACE_PREFIX);
        vocab.remove_extra_whitespaces = flag(MERGE_SPACES);
        vocab.lowercase = flag(LOWERCASE);
        vocab.strip_accents = flag(STRIP_ACCENTS);
        let count = metadata.get(SEGMENTS).map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok()));
        vocab.token_type_count = count.map(|n| n.ok_or_else(|| missing(SEGMENTS))).transpose()?;
        if kind == Kind::Ugm && metadata.get(CHARSMAP).is_some() {
            vocab.charsmap = match array(CHARSMAP)? {
                Some(Array::U8(bytes)) => bytes.clone(),
                Some(Array::I8(bytes)) => bytes.iter().map(|&b| b as u8).collect(),
                _ => return Err(missing(CHARSMAP)),
            };
            charsmap::check(&vocab.charsmap)?;
        }
        let text = |key: &str, value: &Value| {
            value.as_str().map(str::to_owned).ok_or_else(|| Error::malformed(format!("{key} is not text")))
        };
        let is_id = |key: &str| SpecialIds::default().iter().any(|(_, k, _)| k == key);
        for (key, value) in metadata.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
            if key == TEMPLATE {
                vocab.chat_templates.insert(0, ("default".to_owned(), text(key, value)?));
            } else if let Some(name) = key.strip_prefix("tokenizer.chat_template.") {
                vocab.chat_templates.push((name.to_owned(), text(key, value)?));
            } else if !(OWN.contains(&key) || is_id(key) || kind == Kind::Ugm && key == CHARSMAP)
                && add_flags(&mut AddTokens::default()).iter().all(|(k, _)| *k != key)
            {
                vocab.extra.push((key.to_owned(), value.clone()));
            }
        }
        if let Some(scores) = &vocab.scores {
            let trained = scores.iter().zip(&vocab.token_types).filter(|(_, t)| **t == TokenType::Normal);
            vocab.unigram =
                kind == Kind::Ugm || kind == Kind::Spm && trained.clone().any(|(s, _)| s.fract() != 0.0);
        }
        Ok(vocab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn sample() -> Vocab {
        let mut v = Vocab::new(Kind::Spm, "default");
        v.scores = Some(Vec::new());
        v.push("<unk>", TokenType::Unknown, 0.0);
        v.push("a", TokenType::Normal, -1.0);
        v.special.unk = Some(0);
        v.add.bos = Some(true);
        v.chat_templates =
            vec![("default".into(), "D".into()), ("z".into(), "Z".into()), ("b".into(), "B".into())];
        v.extra.push(("tokenizer.ggml.fim_pre_token_id".into(), Value::U32(1)));
        v
    }

    #[test]
    fn round_trip() {
        let mut m = Metadata::default();
        sample().to_metadata(&mut m);
        assert_eq!(Vocab::from_metadata(&m).unwrap(), sample());
        let names = m.get(TEMPLATES).unwrap().as_array().unwrap();
        assert_eq!(names, &Array::String(vec![b"b".to_vec(), b"z".to_vec()]));
    }

    #[test]
    fn refuses_contradictions() {
        let mut good = Metadata::default();
        sample().to_metadata(&mut good);
        let error = |key: &str, value: Value| {
            let mut m = good.clone();
            m.set(key, value);
            Vocab::from_metadata(&m).unwrap_err().kind()
        };
        assert_eq!(error(TYPES, Value::Array(Array::I32(vec![1]))), ErrorKind::Malformed);
        assert_eq!(error(TYPES, Value::Array(Array::I32(vec![1, 9]))), ErrorKind::Malformed);
        assert_eq!(error(SCORES, Value::Array(Array::F32(vec![1.0]))), ErrorKind::Malformed);
        assert_eq!(error(TOKENS, Value::U32(1)), ErrorKind::Malformed);
        assert_eq!(error("tokenizer.ggml.unknown_token_id", Value::U32(2)), ErrorKind::Malformed);
        assert_eq!(error(MODEL, "rwkv".into()), ErrorKind::Unsupported);
    }
}
