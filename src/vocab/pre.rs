//! Pre-tokenizers: which `tokenizer.ggml.pre` splits text as a Hugging Face tokenizer does.
//!
//! A tokenizer.json is brought to a canonical [`Structure`], which does not depend on the
//! vocabulary, so a fine-tune with added tokens is recognised like its base. The table is
//! `formats/vocab/pre.toml`. There is no default: an unknown structure is an error that shows it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::{Value, json};

use super::Vocab;
use crate::error::{Error, Result};
use crate::sha256::Sha256;

const TABLE: &str = include_str!("../../formats/vocab/pre.toml");

/// How some tokenizers write the English contractions that others write with `(?i:`.
const CONTRACTIONS: (&str, &str) =
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)");

/// What is done to text before merging, in canonical words (see `formats/vocab/pre.toml`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Normalizers, in order.
    pub normalizer: Vec<String>,
    /// Splitting and byte-encoding steps, in order.
    pub steps: Vec<String>,
    /// Whether a word that is a token is taken without merging.
    pub ignore_merges: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    schema: u32,
    adds_bos: Vec<String>,
    raw: Vec<String>,
    known: Vec<String>,
    regex: BTreeMap<String, Regex>,
    pre: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Regex {
    pattern: String,
    #[serde(default)]
    total: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    names: Vec<String>,
    steps: Vec<String>,
    #[serde(default)]
    normalizer: Vec<String>,
    /// What llama.cpp does instead of `steps`.
    #[serde(default)]
    llama_cpp: Vec<String>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    note: Option<String>,
}

/// The embedded table, with `$name` in steps replaced by the pattern.
fn table() -> &'static Table {
    static PARSED: OnceLock<Table> = OnceLock::new();
    PARSED.get_or_init(|| {
        // Embedded data, checked by a test: no input reaches these panics.
        let mut table: Table = toml::from_str(TABLE).expect("formats/vocab/pre.toml parses");
        assert_eq!(table.schema, 1, "formats/vocab/pre.toml");
        for row in &mut table.pre {
            for step in row.steps.iter_mut().chain(&mut row.llama_cpp) {
                if let Some(name) = step.strip_prefix("split $") {
                    *step = format!("split {}", table.regex[name].pattern);
                }
            }
        }
        table
    })
}

/// GPT-2's own pattern, which `ByteLevel` applies when `use_regex` is set.
fn gpt2_split() -> String {
    format!("split {}", table().regex["gpt2"].pattern)
}

/// The names of each row of the table.
pub fn rows() -> impl Iterator<Item = &'static [String]> {
    table().pre.iter().map(|row| row.names.as_slice())
}

/// All names that the linked llama.cpp accepts.
pub fn known() -> impl Iterator<Item = &'static str> {
    table().known.iter().chain(&table().raw).map(String::as_str)
}

/// Whether the linked llama.cpp accepts `name`.
pub fn is_known(name: &str) -> bool {
    known().any(|n| n == name)
}

/// The known name that looks most like `name`.
pub fn nearest(name: &str) -> Option<&'static str> {
    let shared = |n: &str| n.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    known().max_by_key(|n| shared(n)).filter(|n| shared(n) > 0)
}

/// Whether llama.cpp adds BOS for `name` when the file does not say.
pub fn adds_bos(name: &str) -> bool {
    table().adds_bos.iter().any(|n| n == name)
}

impl Structure {
    /// The canonical form of the `normalizer` and `pre_tokenizer` of a tokenizer.json.
    pub fn of(normalizer: &Value, pre_tokenizer: &Value, ignore_merges: bool) -> Self {
        let mut structure = Self { normalizer: Vec::new(), steps: Vec::new(), ignore_merges };
        structure.add_normalizer(normalizer);
        structure.add_pre_tokenizer(pre_tokenizer);
        structure
    }

    fn add_normalizer(&mut self, json: &Value) {
        match kind(json) {
            "" if json.is_null() => {}
            "Sequence" => list(json, "normalizers").for_each(|n| self.add_normalizer(n)),
            "NFC" => self.normalizer.push("nfc".into()),
            _ => self.normalizer.push(json.to_string()),
        }
    }

    fn add_pre_tokenizer(&mut self, json: &Value) {
        let flag = |key: &str, default: bool| json.get(key).and_then(Value::as_bool).unwrap_or(default);
        match kind(json) {
            "" if json.is_null() => {}
            "Sequence" => list(json, "pretokenizers").for_each(|p| self.add_pre_tokenizer(p)),
            "ByteLevel" => {
                if flag("add_prefix_space", true) {
                    self.steps.push("prefix-space".into());
                }
                if flag("use_regex", true) {
                    self.steps.push(gpt2_split());
                }
                self.steps.push("bytes".into());
            }
            "Digits" => {
                let pattern = if flag("individual_digits", false) { r"\p{N}" } else { r"\p{N}+" };
                self.steps.push(format!("split {pattern}"));
            }
            "Punctuation" => {
                let behavior = json.get("behavior").and_then(Value::as_str).unwrap_or("Isolated");
                self.steps.push(format!("punctuation {}", behavior.to_lowercase()));
            }
            "Split" => self.steps.push(split_step(json)),
            _ => self.steps.push(json.to_string()),
        }
    }

    /// Twelve hexadecimal digits that stand for the structure.
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.to_string().as_bytes());
        digest.iter().take(6).map(|b| format!("{b:02x}")).collect()
    }

    /// Whether text is turned into byte characters at all.
    pub fn is_byte_level(&self) -> bool {
        self.steps.iter().any(|s| s == "bytes")
    }
}

/// One line per part, as an error shows it.
impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for n in &self.normalizer {
            writeln!(f, "normalizer {n}")?;
        }
        for s in &self.steps {
            writeln!(f, "{s}")?;
        }
        write!(f, "ignore_merges {}", self.ignore_merges)
    }
}

fn kind(json: &Value) -> &str {
    json.get("type").and_then(Value::as_str).unwrap_or("")
}

fn list<'a>(json: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    json.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn split_step(json: &Value) -> String {
    let behavior = json.get("behavior").and_then(Value::as_str).unwrap_or("Isolated");
    let invert = json.get("invert").and_then(Value::as_bool).unwrap_or(false);
    let pattern = json.get("pattern");
    let Some(regex) = pattern.and_then(|p| p.get("Regex")).and_then(Value::as_str) else {
        return json.to_string();
    };
    let regex = regex.replace('\r', r"\r").replace('\n', r"\n").replace('\t', r"\t");
    let regex = regex.replace(CONTRACTIONS.0, CONTRACTIONS.1);
    let total = table().regex.values().any(|r| r.total && r.pattern == regex);
    // Pieces between matches are pieces either way, so Isolated is its own inverse.
    match (behavior, invert) {
        ("Isolated", _) => format!("split {regex}"),
        ("Removed", true) if total => format!("split {regex}"),
        (_, false) => format!("split/{behavior} {regex}"),
        (_, true) => format!("split/{behavior}/invert {regex}"),
    }
}

/// Names that a vocabulary's pre-tokenizer may have.
#[derive(Debug)]
pub struct Candidates {
    /// The names, likeliest first, one for each way in which llama.cpp splits text. Never empty.
    pub names: Vec<String>,
    /// What should be known about the first.
    pub notes: Vec<String>,
    /// The same tokens for another of llama.cpp's tokenizers, where this one is known to differ.
    pub instead: Option<Box<Vocab>>,
    /// Set where the table does not know the structure, so that the first name is no more likely
    /// than the others.
    pub unknown: Option<Error>,
}

impl Candidates {
    /// One name, which is no guess.
    pub fn only(name: &str) -> Self {
        Self { names: vec![name.to_owned()], notes: Vec::new(), instead: None, unknown: None }
    }

    /// `vocab`, read from `dir`, with the first name.
    ///
    /// # Errors
    /// `Unsupported` for a structure that the table does not know.
    pub fn by_table(self, dir: &Path, mut vocab: Vocab) -> Result<Vocab> {
        match (self.unknown, self.names.first()) {
            (Some(unknown), _) => Err(unknown.at(dir.join("tokenizer.json"))),
            (None, name) => {
                vocab.notes.splice(0..0, self.notes);
                Ok(vocab.with_pre(name.map_or("default", String::as_str)))
            }
        }
    }
}

/// Finds the names that may split as `structure` does; `wanted` comes first where the table has it for
/// this structure. `merges_matter` says for how many tokens of this vocabulary `ignore_merges`
/// changes the result; it is asked only when no row has the structure's own flag.
///
/// # Errors
/// Those of `merges_matter`.
pub fn candidates(
    structure: &Structure,
    wanted: Option<&str>,
    merges_matter: impl FnOnce() -> Result<usize>,
) -> Result<Candidates> {
    let nfc_only = structure.normalizer.iter().all(|n| n == "nfc");
    // How far a row is from the structure; what splits in another way is equally far.
    let distance = |row: &Row| match row.steps == structure.steps && nfc_only {
        false => 4,
        true => {
            2 * u8::from(row.ignore_merges != structure.ignore_merges)
                + u8::from(row.normalizer != structure.normalizer)
        }
    };
    let mut rows: Vec<&Row> = table().pre.iter().collect();
    rows.sort_by_key(|row| distance(row));
    let mut names: Vec<String> = Vec::new();
    let mut seen: Vec<(&[String], bool)> = Vec::new();
    for row in &rows {
        // llama.cpp normalizes nothing: rows that differ in that alone are one to it.
        if !seen.contains(&(&row.steps, row.ignore_merges)) {
            seen.push((&row.steps, row.ignore_merges));
            names
                .extend(row.names.iter().find(|n| Some(n.as_str()) == wanted).or(row.names.first()).cloned());
        }
    }
    let Some(row) = rows.first().filter(|row| distance(row) < 4) else {
        let unknown = Error::unsupported(format!(
            "pre-tokenizer {} is not known:\n{structure}",
            structure.fingerprint()
        ))
        .hint("if one of llama.cpp's pre-tokenizers splits text the same way, give it: --pre NAME");
        return Ok(Candidates { names, notes: Vec::new(), instead: None, unknown: Some(unknown) });
    };
    let name = names.first().map_or("", String::as_str);
    let mut notes = vec![format!(
        "pre-tokenizer {name:?} recognised by structure {} (same splitting: {})",
        structure.fingerprint(),
        row.names.join(", ")
    )];
    if !structure.normalizer.is_empty() {
        notes.push("the tokenizer normalises to NFC, llama.cpp does not: other text gets other ids".into());
    }
    if row.ignore_merges != structure.ignore_merges {
        match merges_matter()? {
            0 => notes.push(format!(
                "ignore_merges is {} here and {} in {name:?}: it makes no difference to any token",
                structure.ignore_merges, row.ignore_merges
            )),
            n => notes.push(format!(
                "warning: ignore_merges is {} here and {} in {name:?}: {n} tokens come out differently",
                structure.ignore_merges, row.ignore_merges
            )),
        }
    }
    notes.extend(row.note.iter().map(|n| format!("{name}: {n}")));
    Ok(Candidates { names, notes, instead: None, unknown: None })
}

/// The Hugging Face side of a name: `normalizer`, `pre_tokenizer` and `ignore_merges` of a
/// tokenizer.json that splits as llama.cpp does under `name`.
///
/// # Errors
/// `Unsupported` when the table has no structure for it.
pub fn hf_structure(name: &str) -> Result<(Value, Value, bool)> {
    let row = table().pre.iter().find(|row| row.names.iter().any(|n| n == name)).ok_or_else(|| {
        Error::unsupported(format!("no Hugging Face structure is known for pre-tokenizer {name:?}"))
            .hint("if another name splits text the same way, give it: --pre NAME")
    })?;
    let normalizer = match row.normalizer.is_empty() {
        true => Value::Null,
        false => json!({"type": "NFC"}),
    };
    Ok((normalizer, pre_tokenizer(&row.steps), row.ignore_merges))
}

/// The `pre_tokenizer` that splits as llama.cpp does under `name`, where the table knows that this is
/// not quite the splitting of a tokenizer with this `structure`, which the name stands for.
pub fn as_llama_cpp_splits(name: &str, structure: &Structure) -> Option<Value> {
    let fits = |row: &&Row| row.names.iter().any(|n| n == name) && row.steps == structure.steps;
    let row = table().pre.iter().find(fits)?;
    (!row.llama_cpp.is_empty()).then(|| pre_tokenizer(&row.llama_cpp))
}

/// The `pre_tokenizer` of a tokenizer.json that takes these steps.
fn pre_tokenizer(steps: &[String]) -> Value {
    let gpt2 = gpt2_split();
    let mut parts: Vec<Value> = Vec::new();
    let mut steps = steps.iter().map(String::as_str).peekable();
    while let Some(step) = steps.next() {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        parts.push(if step == gpt2 && steps.next_if_eq(&"bytes").is_some() {
            byte_level(true)
        } else if step == "bytes" {
            byte_level(false)
        } else if step == "punctuation contiguous" {
            json!({"type": "Punctuation", "behavior": "Contiguous"})
        } else if step == "punctuation isolated" {
            json!({"type": "Punctuation", "behavior": "Isolated"})
        } else if step == r"split \p{N}" {
            json!({"type": "Digits", "individual_digits": true})
        } else if step == r"split \p{N}+" {
            json!({"type": "Digits", "individual_digits": false})
        } else {
            let regex = step.strip_prefix("split ").unwrap_or(step);
            json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
        });
    }
    match parts.len() {
        1 => parts.remove(0),
        _ => json!({"type": "Sequence", "pretokenizers": parts}),
    }
}

/// `char -> byte` of GPT-2's byte characters: printable Latin-1 stands for itself, the other
/// bytes for U+0100 and up, in order.
pub fn byte_of_char() -> &'static HashMap<char, u8> {
    static MAP: OnceLock<HashMap<char, u8>> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut next = 0x100u32;
        let mut map = HashMap::with_capacity(256);
        for byte in 0..=255u8 {
            let code = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
                _ => {
                    next += 1;
                    next - 1
                }
            };
            map.extend(char::from_u32(code).map(|c| (c, byte)));
        }
        map
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_matter() -> Result<usize> {
        Ok(0)
    }

    /// The name that is taken where nobody can try.
    fn first(structure: &Structure) -> Result<String> {
        let found = candidates(structure, None, no_matter).unwrap();
        found.unknown.map_or(Ok(found.names[0].clone()), Err)
    }

    #[test]
    fn rows_are_unique_and_known() {
        let t = table();
        for (i, a) in t.pre.iter().enumerate() {
            assert!(a.names.iter().all(|n| is_known(n)), "{:?}", a.names);
            for b in &t.pre[i + 1..] {
                assert!(
                    (&a.steps, &a.normalizer, a.ignore_merges) != (&b.steps, &b.normalizer, b.ignore_merges),
                    "{:?} {:?}",
                    a.names,
                    b.names
                );
            }
        }
        let mut all: Vec<&str> = known().collect();
        let n = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), n);
        let in_row = |name: &&String| t.pre.iter().any(|row| row.names.contains(name));
        assert!(t.known.iter().all(|name| in_row(&name)), "{:?}", t.known.iter().find(|n| !in_row(n)));
        assert!(t.adds_bos.iter().all(|n| is_known(n)));
    }

    /// What is written for a name is recognised as a name of the same row, and loads.
    #[test]
    fn every_row_round_trips() {
        for row in &table().pre {
            let (normalizer, pre, ignore) = hf_structure(&row.names[0]).unwrap();
            let s = Structure::of(&normalizer, &pre, ignore);
            for name in &row.names {
                let found = candidates(&s, Some(name), no_matter).unwrap();
                assert!(found.unknown.is_none());
                // A name that stands in an earlier row too may have been written from that.
                let first = hf_structure(name).unwrap() == (normalizer.clone(), pre.clone(), ignore);
                assert!(!first || found.names[0] == *name, "{name} {found:?}");
            }
            let text = json!({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre,
                "post_processor": null, "decoder": null, "truncation": null, "padding": null,
                "model": {"type": "BPE", "vocab": {}, "merges": []}});
            tokenizers::Tokenizer::from_bytes(text.to_string())
                .unwrap_or_else(|e| panic!("{:?}: {e}", row.names));
        }
    }

    #[test]
    fn spellings_of_one_structure_agree() {
        let regex = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let split = |regex: &str, behavior: &str, invert: bool| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}, bytes]})
        };
        for pre in [split(regex, "Isolated", false), split(regex, "Removed", true)] {
            assert_eq!(first(&Structure::of(&Value::Null, &pre, true)).unwrap(), "llama-bpe");
            assert_eq!(first(&Structure::of(&Value::Null, &pre, false)).unwrap(), "smaug-bpe");
        }
        for altered in [split(r"\p{N}{1,4}", "Isolated", false), split(regex, "Removed", false)] {
            let e = first(&Structure::of(&Value::Null, &altered, true)).unwrap_err();
            assert_eq!(e.kind(), crate::ErrorKind::Unsupported);
            assert!(e.to_string().contains("split") && e.hint_text().unwrap().contains("--pre"));
        }
        let lower = json!({"type": "Lowercase"});
        assert!(first(&Structure::of(&lower, &split(regex, "Isolated", false), true)).is_err());
    }

    #[test]
    fn byte_characters() {
        let map = byte_of_char();
        assert_eq!(map.len(), 256);
        assert_eq!((map[&'Ġ'], map[&'Ċ'], map[&'a'], map[&'Ń']), (b' ', b'\n', b'a', 0xAD));
    }
}
