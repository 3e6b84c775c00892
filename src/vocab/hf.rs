//! Raw fields of the Hugging Face tokenizer files, shared by reading and writing.

use std::fmt;
use std::path::Path;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

pub use crate::container::side::{from_json, read_json, read_side_file};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// tokenizer.json, as far as a conversion needs it.
#[derive(Deserialize)]
pub struct TokenizerJson {
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    #[serde(default)]
    pub normalizer: Value,
    #[serde(default)]
    pub pre_tokenizer: Value,
    #[serde(default)]
    pub post_processor: Value,
    pub model: Model,
}

/// One of `added_tokens` in tokenizer.json, and a value of `added_tokens_decoder`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct AddedToken {
    #[serde(default)]
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub single_word: bool,
    #[serde(default)]
    pub lstrip: bool,
    #[serde(default)]
    pub rstrip: bool,
    #[serde(default)]
    pub normalized: bool,
    #[serde(default)]
    pub special: bool,
}

impl AddedToken {
    /// A special token that is found wherever its text stands.
    pub fn special(id: u32, content: String) -> Self {
        Self {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        }
    }
}

/// `model` of tokenizer.json. Merges are `left right`; a space inside a part is U+0120, as
/// llama.cpp's converter writes it.
#[derive(Deserialize)]
pub struct Model {
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    #[serde(default)]
    pub vocab: Entries,
    #[serde(default)]
    pub merges: Vec<Merge>,
    #[serde(default)]
    pub unk_token: Option<String>,
    #[serde(default)]
    pub byte_fallback: Option<bool>,
    #[serde(default)]
    pub ignore_merges: Option<bool>,
    #[serde(default)]
    pub continuing_subword_prefix: Option<String>,
    #[serde(default)]
    pub end_of_word_suffix: Option<String>,
    #[serde(default)]
    pub unk_id: Option<u64>,
}

impl Model {
    /// `type`, or what the fields say where an old file has none.
    pub fn kind(&self) -> &str {
        match (&self.kind, &self.vocab) {
            (Some(kind), _) => kind,
            (None, Entries::List(_)) => "Unigram",
            (None, Entries::Map(_)) if self.merges.is_empty() => "WordPiece",
            (None, Entries::Map(_)) => "BPE",
        }
    }
}

/// `model.vocab`.
pub enum Entries {
    /// Token and id, in file order.
    Map(Vec<(String, u32)>),
    /// Unigram's: token and log-probability by id.
    List(Vec<(String, f64)>),
}

impl Default for Entries {
    fn default() -> Self {
        Self::Map(Vec::new())
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries::Map(entries))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = seq.next_element()? {
                    entries.push(entry);
                }
                Ok(Entries::List(entries))
            }
        }
        d.deserialize_any(V)
    }
}

/// One merge, as `left right`.
pub struct Merge(pub String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a merge: a string or a pair of strings")
            }
            fn visit_str<E>(self, s: &str) -> Result<Merge, E> {
                Ok(Merge(s.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let mut part = || {
                    seq.next_element::<String>()?.ok_or_else(|| A::Error::custom("a merge needs two parts"))
                };
                let (left, right) = (part()?, part()?);
                if seq.next_element::<IgnoredAny>()?.is_some() {
                    return Err(A::Error::custom("a merge has two parts"));
                }
                Ok(Merge(format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ"))))
            }
        }
        d.deserialize_any(V)
    }
}

impl Model {
    /// Refuses BPE merges that make the `tokenizers` library (0.23) write beyond a buffer it
    /// sizes by the longest token, which ends in a panic.
    ///
    /// # Errors
    /// `Malformed` for a merge longer than any token.
    pub fn check_merges(&self) -> Result<()> {
        let Entries::Map(entries) = &self.vocab else { return Ok(()) };
        // A space counts twice, as its stand-in in our form of merges does.
        let length = |s: &str| s.len() + s.bytes().filter(|b| *b == b' ').count();
        let longest = entries.iter().map(|(text, _)| length(text)).max().unwrap_or(0);
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or("");
        for Merge(merge) in &self.merges {
            let fits = merge_parts(merge).is_some_and(|(left, right)| {
                right.starts_with(prefix) && left.len() + right.len() - prefix.len() <= longest
            });
            if !fits {
                return Err(Error::malformed(format!("the merge {merge:?} makes no token")));
            }
        }
        Ok(())
    }
}

/// The two parts of a merge, as llama.cpp splits it: at the first space after the first byte.
pub fn merge_parts(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let space = merge.get(first..)?.find(' ')? + first;
    Some((merge.get(..space)?, merge.get(space + 1..)?))
}

/// `model.vocab` when written: an object in id order.
pub struct VocabOut<'a>(pub Vec<(&'a str, u32)>);

impl Serialize for VocabOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.0.iter().copied())
    }
}

/// tokenizer.json of `dir`.
///
/// # Errors
/// As [`read_side_file`] and [`from_json`].
pub fn tokenizer_json(dir: &Path, limits: &Limits) -> Result<Option<TokenizerJson>> {
    let path = dir.join("tokenizer.json");
    read_side_file(&path, limits.side_file_bytes)?.map(|bytes| from_json(&bytes, &path)).transpose()
}

/// tokenizer_config.json of `dir`, an empty object where there is none.
///
/// # Errors
/// As [`read_json`].
pub fn tokenizer_config(dir: &Path, limits: &Limits) -> Result<Value> {
    let path = dir.join("tokenizer_config.json");
    let value = read_json(&path, limits.side_file_bytes)?;
    match value {
        None => Ok(Value::Object(Default::default())),
        Some(value @ Value::Object(_)) => Ok(value),
        Some(_) => Err(Error::malformed("is not a JSON object").at(path)),
    }
}

/// `added_tokens_decoder` of tokenizer_config.json, with ids filled in.
///
/// # Errors
/// `Malformed` when an entry is not an added token or its id is not a number.
pub fn added_tokens_decoder(config: &Value) -> Result<Vec<AddedToken>> {
    let Some(entries) = config.get("added_tokens_decoder").and_then(Value::as_object) else {
        return Ok(Vec::new());
    };
    let entry = |(id, value): (&String, &Value)| {
        let bad = |why: String| Error::malformed(format!("added_tokens_decoder, token {id:?}: {why}"));
        let mut token = AddedToken::deserialize(value).map_err(|e| bad(e.to_string()))?;
        token.id = id.parse().map_err(|_| bad("its id is not a number".into()))?;
        Ok(token)
    };
    entries.iter().map(entry).collect()
}

/// The text of a token in tokenizer_config.json: a string, or an object with `content`.
pub fn token_text(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// Whether an added token that is not marked special is a control token all the same: several
/// published models forgot the mark.
pub fn looks_special(text: &str) -> bool {
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_of_both_forms() {
        let m: Vec<Merge> = serde_json::from_str(r#"["a b", ["c d", " "], ["x", "y"]]"#).unwrap();
        let m: Vec<&str> = m.iter().map(|m| m.0.as_str()).collect();
        assert_eq!(m, ["a b", "cĠd Ġ", "x y"]);
        assert_eq!(merge_parts("Ġ t"), Some(("Ġ", "t")));
        assert_eq!(merge_parts(""), None);
        for bad in [r#"[["a"]]"#, r#"[["a","b","c"]]"#, "[1]"] {
            assert!(serde_json::from_str::<Vec<Merge>>(bad).is_err());
        }
    }

    #[test]
    fn merges_longer_than_any_token_are_refused() {
        let check = |json: &str| serde_json::from_str::<Model>(json).unwrap().check_merges();
        assert!(check(r#"{"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}"#).is_ok());
        assert!(check(r#"{"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}"#).is_err());
        let prefixed = r###"{"continuing_subword_prefix": "##", "vocab": {"abc": 0}, "merges": ["a b"]}"###;
        assert!(check(prefixed).is_err());
    }

    #[test]
    fn special_looks() {
        for s in ["<pad>", "<|x|>", "<｜end▁of▁sentence｜>", "<unused12>"] {
            assert!(looks_special(s), "{s}");
        }
        assert!(!looks_special("<think>"));
    }
}
