//! The TOML of an architecture: its fields, and how one file extends another.

use std::collections::BTreeMap;
use std::path::Path;

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::Value as Json;

use super::also::Also;
use super::decoder::GraphKey;
use super::expr::{Expr, truth};
use super::fold::FoldSpec;
use super::rows::{Row, RowSpec};
use super::scalars::ScalarRule;
use super::scope::ModelScope;
use super::template::{Captures, Template};
use crate::container::side::read_side_file;
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Name and text of every file in `formats/arch/`.
static MODELS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/arch.rs"));
/// Name and text of every file in `formats/mmproj/`.
static PROJECTORS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/mmproj.rs"));
const SCHEMA: u32 = 1;
const MAX_EXTENDS: u32 = 4;
/// Longest file of a user.
const MAX_BYTES: u64 = 1 << 20;

/// One architecture, extensions resolved.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    schema: u32,
    /// The file, without its extension.
    #[serde(skip)]
    pub name: String,
    /// llama.cpp's name: `general.architecture`. All projectors have `clip`.
    #[serde(default)]
    pub arch: String,
    extends: Option<String>,
    /// Objects of config.json that are searched before its root.
    #[serde(default)]
    pub(super) config_root: Vec<String>,
    /// Source tensors that are left out.
    #[serde(default)]
    pub(super) drop: Vec<Drop>,
    #[serde(default)]
    pub(super) class: Vec<Class>,
    /// Of a projector: the other part of the checkpoint.
    pub(super) language_model: Option<LanguageModel>,
    #[serde(default)]
    pub(super) vars: IndexMap<String, Expr>,
    #[serde(default)]
    pub(super) kv: IndexMap<String, Kv>,
    #[serde(default)]
    pub(super) require: Vec<Rule>,
    #[serde(default)]
    pub(super) warn: Vec<Rule>,
    /// How the vocabulary is read.
    #[serde(default)]
    pub tokenizer: TokenizerRule,
    #[serde(default)]
    tensors: IndexMap<Template, RowSpec>,
    /// Layouts that are read as well: names in the checkpoint, after the class's renaming.
    #[serde(default)]
    pub(super) also: IndexMap<Template, Also>,
    /// Tensors of one number, which become metadata.
    #[serde(default)]
    pub(super) scalars: IndexMap<Template, ScalarRule>,
    /// `tensors`, names resolved.
    #[serde(skip)]
    pub(super) rows: Vec<Row>,
    /// Scales that can move from one tensor into others, by the producer's name.
    #[serde(default)]
    pub(super) fold: IndexMap<Template, FoldSpec>,
    #[serde(default)]
    pub(super) generate: Vec<Generate>,
    /// What config.json says beyond `kv` when it is written from a GGUF.
    #[serde(default)]
    pub(super) config: IndexMap<String, ConfigValue>,
    /// What the model computes, where it is described.
    pub(super) graph: Option<IndexMap<GraphKey, Expr>>,
    /// Keys of a tiny config.json, on which the definition is tried.
    pub(super) example: Option<IndexMap<String, Json>>,
    /// The example with other keys, by name; `"null"` takes a key away.
    #[serde(default)]
    pub(super) variant: IndexMap<String, IndexMap<String, Json>>,
}

/// Tensors that are left out: where no row takes them, or where a condition holds.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Drop {
    Name(Template),
    When { name: Template, when: Expr },
}

/// A class of transformers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Class {
    pub name: String,
    pub model_type: String,
    #[serde(default)]
    aliases: Vec<String>,
    /// Names in the checkpoint -> names in `tensors`; the first that matches counts.
    #[serde(default)]
    pub rename: IndexMap<Template, Template>,
    /// Which config.json files of this class are meant, where another definition takes the rest.
    pub only: Option<Expr>,
    /// Why models of this class are not converted: in `refused.toml`.
    pub refuse: Option<String>,
    /// On the way back: whether a GGUF becomes this class.
    pub when: Option<Expr>,
}

impl Class {
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(&self.aliases).map(String::as_str)
    }

    /// The name of a tensor in the definition's terms.
    pub fn canonical(&self, name: &str) -> String {
        let renamed = self.rename.iter().find_map(|(from, to)| to.fill(&from.matches(name)?));
        renamed.unwrap_or_else(|| name.to_string())
    }
}

/// Where the language model lies in a checkpoint that holds a projector as well.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LanguageModel {
    /// Its object in config.json.
    pub config: String,
    /// Its tensors, after renaming; `{*}` is the name in a checkpoint of the language model alone.
    pub tensors: Template,
    /// What config.json may leave out there, by `model_type`: transformers' own values.
    #[serde(default)]
    defaults: BTreeMap<String, BTreeMap<String, Json>>,
}

impl LanguageModel {
    /// The config with what it leaves out of the language model.
    pub fn complete(&self, config: &Json) -> Json {
        let mut config = config.clone();
        if let Some(Json::Object(inner)) = config.get_mut(&self.config) {
            let model_type = inner.get("model_type").and_then(Json::as_str).unwrap_or_default();
            for (key, value) in self.defaults.get(model_type).into_iter().flatten() {
                if inner.get(key).is_none_or(Json::is_null) {
                    inner.insert(key.clone(), value.clone());
                }
            }
        }
        config
    }
}

/// `expr` must hold, or `why` is said.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    pub expr: Expr,
    pub why: String,
}

/// Type and expression of a metadata value: `{ u32 = "n_layers" }`.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "BTreeMap<KvType, Expr>")]
pub(super) struct Kv {
    pub kind: KvType,
    pub expr: Expr,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub(super) enum KvType {
    U32,
    I32,
    F32,
    Bool,
    Str,
}

impl KvType {
    pub fn name(self) -> &'static str {
        match self {
            Self::U32 => "unsigned 32-bit integer",
            Self::I32 => "signed 32-bit integer",
            Self::F32 => "number",
            Self::Bool => "truth value",
            Self::Str => "string",
        }
    }
}

impl TryFrom<BTreeMap<KvType, Expr>> for Kv {
    type Error = String;

    fn try_from(map: BTreeMap<KvType, Expr>) -> Result<Self, String> {
        let mut entries = map.into_iter();
        match (entries.next(), entries.next()) {
            (Some((kind, expr)), None) => Ok(Self { kind, expr }),
            _ => Err("one type and its expression were expected, such as { u32 = \"n_layers\" }".into()),
        }
    }
}

/// How the vocabulary is read.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerRule {
    /// Kinds to try, the first whose files exist: `spm`, `bpe`.
    #[serde(default, rename = "try")]
    pub kinds: Vec<String>,
    /// Overrides `tokenizer.ggml.add_space_prefix` for SentencePiece.
    pub add_space_prefix: Option<bool>,
    /// Tokens of a role (`eot`, `eom`, ...) that no file of the tokenizer names, by their text.
    #[serde(default)]
    pub special: BTreeMap<String, String>,
}

/// A tensor that no checkpoint holds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Generate {
    /// Its name; with `{i}` every layer has one.
    pub name: Template,
    pub when: Expr,
    /// How its values come about: a function, or an expression.
    #[serde(rename = "fn")]
    pub function: Option<GenerateFn>,
    pub values: Option<Expr>,
    /// On the way back: what config.json says of it, as expressions of its `values`.
    #[serde(default)]
    pub config: IndexMap<String, Expr>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum GenerateFn {
    RopeLlama3,
    /// `long_factor` of LongRoPE.
    RopeLong,
    /// `short_factor` of LongRoPE.
    RopeShort,
}

/// A constant, or `{ expr = "..." }`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum ConfigValue {
    Expr { expr: Expr },
    Constant(serde_json::Value),
}

impl Architecture {
    /// Whether it writes this metadata key, perhaps on a condition.
    pub fn writes(&self, key: &str) -> bool {
        self.kv.contains_key(key)
    }

    /// Parses one file; `base` finds the text of the file it extends.
    ///
    /// # Errors
    /// `Malformed`, with the line, as the TOML parser says.
    pub fn parse(text: &str, base: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut arch = Self::load(text, base, 0)?;
        let prefix = arch.arch.clone();
        arch.kv = std::mem::take(&mut arch.kv)
            .into_iter()
            .map(|(key, kv)| (key.replace("{arch}", &prefix), kv))
            .fold(IndexMap::new(), |mut map, (key, kv)| {
                map.insert(key, kv);
                map
            });
        arch.also.iter().try_for_each(|(stored, also)| also.check(stored))?;
        arch.rows = std::mem::take(&mut arch.tensors)
            .into_iter()
            .filter(|(_, spec)| !matches!(spec, RowSpec::Keep(false)))
            .map(|(hf, spec)| {
                let quoted = format!("\"{}\"", hf.text());
                let line = text.lines().position(|l| l.trim_start().starts_with(&quoted));
                Row::new(hf, spec).map_err(|e| match line {
                    Some(n) => e.context(format!("line {}", n + 1)),
                    None => e,
                })
            })
            .collect::<Result<_>>()?;
        Ok(arch)
    }

    /// One file with what it extends, keys of metadata written with `{arch}`.
    fn load(text: &str, find: &dyn Fn(&str) -> Option<String>, depth: u32) -> Result<Self> {
        let mut arch: Self =
            toml::from_str(text).map_err(|e| Error::malformed(e.to_string().trim_end().to_string()))?;
        if arch.schema != SCHEMA {
            return Err(Error::unsupported(format!("schema {} is not known, this is {SCHEMA}", arch.schema)));
        }
        // `{arch}.x` and `llama.x` are the same key.
        let prefix = format!("{}.", arch.arch);
        arch.kv = std::mem::take(&mut arch.kv)
            .into_iter()
            .map(|(k, v)| match k.strip_prefix(&prefix) {
                Some(rest) => (format!("{{arch}}.{rest}"), v),
                None => (k, v),
            })
            .collect();
        if let Some(name) = &arch.extends {
            if depth == MAX_EXTENDS {
                return Err(Error::limit(format!("files extend each other more than {MAX_EXTENDS} deep")));
            }
            let text = find(name)
                .ok_or_else(|| Error::malformed(format!("extends {name:?}, which is not there")))?;
            let base = Self::load(&text, find, depth + 1).map_err(|e| e.context(name))?;
            arch.inherit(base);
        }
        Ok(arch)
    }

    /// What the base has and this lacks; where both speak, this one counts and the base's place.
    fn inherit(&mut self, base: Self) {
        fn under<K: std::hash::Hash + Eq, V>(mine: &mut IndexMap<K, V>, base: IndexMap<K, V>) {
            let mine_only = std::mem::replace(mine, base);
            for (key, value) in mine_only {
                mine.insert(key, value);
            }
        }
        under(&mut self.kv, base.kv);
        under(&mut self.vars, base.vars);
        under(&mut self.tensors, base.tensors);
        under(&mut self.also, base.also);
        under(&mut self.scalars, base.scalars);
        under(&mut self.fold, base.fold);
        under(&mut self.config, base.config);
        if let (Some(mine), Some(mut base)) = (&mut self.example, base.example) {
            // Which class it is of, the base does not know.
            base.retain(|key, _| key != "architectures" && key != "model_type");
            under(mine, base);
        }
        if let (Some(mine), Some(base)) = (&mut self.graph, base.graph) {
            under(mine, base);
        }
        self.require.splice(0..0, base.require);
        self.warn.splice(0..0, base.warn);
        self.drop.extend(base.drop);
        self.generate.extend(base.generate);
        if self.config_root.is_empty() {
            self.config_root = base.config_root;
        }
        if self.tokenizer.kinds.is_empty() {
            self.tokenizer = base.tokenizer;
        }
        if self.language_model.is_none() {
            self.language_model = base.language_model;
        }
    }

    /// Names of the tensors that no checkpoint holds; of those of all layers, the first's.
    pub fn generates(&self) -> impl Iterator<Item = String> {
        self.generate.iter().filter_map(|g| g.name.fill(&Captures::of_layer(0)))
    }

    /// Every class that a config.json may name, other names of it included.
    pub fn class_names(&self) -> impl Iterator<Item = &str> {
        self.class.iter().flat_map(Class::names)
    }

    /// The class that a config.json names.
    pub(super) fn class_of(&self, config: &Json) -> Result<Option<&Class>> {
        let name = super::recognise::class_of(config);
        for class in self.class.iter().filter(|c| c.names().any(|n| n == name)) {
            let Some(only) = &class.only else { return Ok(Some(class)) };
            if truth(&only.eval(&ModelScope::new(self, config.clone()))?) {
                return Ok(Some(class));
            }
        }
        Ok(None)
    }
}

/// Text of an embedded file.
fn text(name: &str) -> Option<String> {
    MODELS.iter().chain(PROJECTORS).find(|(n, _)| *n == name).map(|(_, t)| t.to_string())
}

/// A definition outside the program; what it extends lies beside it, or is embedded.
pub(super) fn read(path: &Path, limits: &Limits) -> Result<Architecture> {
    let most = limits.side_file_bytes.min(MAX_BYTES);
    let bytes = read_side_file(path, most)?
        .ok_or_else(|| Error::misuse("is no file: an architecture's definition was expected").at(path))?;
    let toml = String::from_utf8(bytes).map_err(|_| Error::malformed("is no UTF-8 text").at(path))?;
    let beside = |name: &str| {
        let base = path.with_file_name(format!("{name}.toml"));
        let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        let read = if is_name { read_side_file(&base, most).ok().flatten() } else { None };
        read.and_then(|bytes| String::from_utf8(bytes).ok()).or_else(|| text(name))
    };
    let mut arch = Architecture::parse(&toml, &beside).map_err(|e| e.at(path))?;
    arch.name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if arch.arch.is_empty() || arch.class.is_empty() {
        return Err(Error::malformed("needs `arch` and at least one [[class]]").at(path));
    }
    Ok(arch)
}

/// Classes that are not converted, with all their names, and why not.
pub(super) fn refused() -> Result<Vec<(Class, String)>> {
    let refused =
        text("refused").ok_or_else(|| Error::malformed("formats/arch/refused.toml is not there"))?;
    let refused = Architecture::parse(&refused, &text).map_err(|e| e.context("formats/arch/refused.toml"))?;
    Ok(refused.class.into_iter().filter_map(|c| c.refuse.clone().map(|why| (c, why))).collect())
}

/// All embedded architectures of models.
pub(super) fn embedded() -> Result<Vec<Architecture>> {
    parse_all("arch", MODELS)
}

/// Those that describe the architecture `arch`, without a look at others that are not about it.
pub(super) fn named(arch: &str) -> Result<Vec<Architecture>> {
    let quoted = format!("{arch:?}");
    let about: Vec<_> = MODELS.iter().filter(|(_, text)| text.contains(&quoted)).copied().collect();
    let beside = |name: &str| MODELS.iter().find(|(n, _)| *n == name).map(|(_, t)| t.to_string());
    let parsed = about.iter().map(|(_, toml)| Architecture::parse(toml, &beside));
    parsed.filter(|found| found.as_ref().map_or(true, |a| a.arch == arch)).collect()
}

/// All embedded projectors.
pub(super) fn projectors() -> Result<Vec<Architecture>> {
    parse_all("mmproj", PROJECTORS)
}

fn parse_all(folder: &str, files: &[(&str, &str)]) -> Result<Vec<Architecture>> {
    let mut archs = Vec::new();
    let beside = |name: &str| files.iter().find(|(n, _)| *n == name).map(|(_, t)| t.to_string());
    for (name, toml) in files {
        let mut arch = Architecture::parse(toml, &beside)
            .map_err(|e| e.context(format!("formats/{folder}/{name}.toml")))?;
        if !arch.arch.is_empty() {
            arch.name = name.to_string();
            archs.push(arch);
        }
    }
    Ok(archs)
}

#[cfg(test)]
mod tests {
    use super::super::recognise::refusal;
    use super::*;

    #[test]
    fn embedded_files_are_sound() {
        let (archs, projectors) = (embedded().unwrap(), projectors().unwrap());
        assert!(archs.len() >= 6 && projectors.len() >= 6);
        for archs in [&archs, &projectors] {
            let whole = |c: &&Class| c.only.is_none();
            let mut names: Vec<_> =
                archs.iter().flat_map(|a| a.class.iter().filter(whole).flat_map(Class::names)).collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all, "a class belongs to two architectures");
        }
        assert!(projectors.iter().all(|a| a.language_model.is_some() && !a.rows.is_empty()));
        assert!(archs.iter().all(|a| !a.tokenizer.kinds.is_empty() && !a.rows.is_empty()));
    }

    #[test]
    fn refused_classes_have_a_reason_and_no_definition() {
        let refused = Architecture::parse(&text("refused").unwrap(), &text).unwrap();
        let archs = embedded().unwrap();
        assert!(refused.class.len() > 5);
        for name in refused.class.iter().flat_map(Class::names) {
            assert!(refusal(name).unwrap().is_some_and(|why| !why.is_empty()), "{name}");
            let known = archs.iter().flat_map(|a| &a.class).flat_map(Class::names).any(|n| n == name);
            assert!(!known, "{name} is refused and has a definition");
        }
        assert!(refusal("LlamaForCausalLM").unwrap().is_none());
    }

    #[test]
    fn faults_name_the_line() {
        let none = |_: &str| None;
        let e = Architecture::parse("schema = 1\nunknown = 2\n", &none).unwrap_err();
        assert!(e.to_string().contains("line 2"), "{e}");
        for bad in [
            "schema = 2",
            "schema = 1\nextends = \"x\"",
            "schema = 1\n[kv]\na = { u32 = \"1\", f32 = \"2\" }",
            "schema = 1\n[kv]\na = { u32 = \"1 +\" }",
            "schema = 1\n[tensors]\n\"a.{i}\" = \"b\"\n\"c.{e}\" = \"d\"",
            "schema = 1\n[tensors]\n\"a\" = \"b.{i}\"",
            "schema = 1\n[tensors]\n\"a\" = true",
            "schema = 1\n[tensors]\n\"a\" = { split = [{ to = \"b\", ops = [{ add = 1 }] }, \"c\"] }",
        ] {
            assert!(Architecture::parse(bad, &none).is_err(), "{bad}");
        }
    }

    #[test]
    fn extends_twice_and_takes_away() {
        let base = |name: &str| {
            let text = match name {
                "one" => "schema = 1\narch = \"one\"\nextends = \"two\"\n[kv]\n\"one.n\" = { u32 = \"1\" }",
                "two" => "schema = 1\n[kv]\n\"{arch}.n\" = { u32 = \"2\" }\n[tensors]\na = \"x\"\nb = \"y\"",
                _ => "schema = 1\nextends = \"loop\"",
            };
            Some(text.to_string())
        };
        let text = "schema = 1\narch = \"mine\"\nextends = \"one\"\n[tensors]\na = false";
        let arch = Architecture::parse(text, &base).unwrap();
        assert_eq!(arch.kv.keys().collect::<Vec<_>>(), ["mine.n"]);
        assert_eq!(arch.kv["mine.n"].expr, Expr::parse("1").unwrap());
        assert_eq!(arch.rows.iter().map(|r| r.hf.text()).collect::<Vec<_>>(), ["b"]);
        assert!(Architecture::parse("schema = 1\nextends = \"loop\"", &base).is_err());
        let late = "schema = 1\n\n[tensors]\n\"a\" = \"b.{i}\"";
        let e = Architecture::parse(late, &base).unwrap_err();
        assert!(e.to_string().contains("line 4"), "{e}");
    }
}
