//! File types as data: which type each tensor of a model gets.
//!
//! A recipe is a TOML file in `formats/recipe`; CONTRIBUTING.md describes its fields, and
//! `formats/spec/recipes.md` what all recipes share and [`Recipe::choose`] adds: tensors that are
//! never quantized, rows that do not fit, what the user asks for.

mod choose;
mod facts;
mod role;

pub use choose::{Choice, Overrides, loader_order, parse_tensor_type};
pub use facts::ModelFacts;
pub use role::Role;

use std::path::Path;
use std::sync::OnceLock;

use indexmap::IndexMap;
use serde::Deserialize;

use crate::arch::{Expr, Scope};
use crate::container::side::read_text;
use crate::convert::guide::Way;
use crate::error::{Error, Result};
use crate::tensor::DType;
use role::Asked;

/// Name and text of every file in `formats/recipe/`.
static EMBEDDED: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipe.rs"));
const SCHEMA: u32 = 1;
/// Longest file of a user.
const MOST_BYTES: u64 = 64 << 10;
/// Files that may extend each other in a row.
const MAX_CHAIN: u32 = 8;

/// A file type, extensions resolved.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// llama-quantize's name, as in file names: `Q4_K_M`.
    pub name: String,
    /// Other names that are read: `Q4_K`.
    pub aliases: Vec<String>,
    /// `enum llama_ftype` (llama.h), `general.file_type`.
    pub id: u32,
    /// Type of the tensors that no rule is about.
    pub dtype: DType,
    /// Types that need importances in this file type, beyond those that always do.
    pub needs_imatrix: Vec<DType>,
    vars: IndexMap<String, Expr>,
    rules: Vec<Rule>,
}

/// One file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeFile {
    schema: u32,
    name: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
    id: Option<u32>,
    #[serde(rename = "type")]
    dtype: Option<TypeName>,
    extends: Option<String>,
    #[serde(default)]
    needs_imatrix: Vec<TypeName>,
    #[serde(default)]
    vars: IndexMap<String, Expr>,
    #[serde(default)]
    rules: Vec<Rule>,
}

/// Tensors of `role` (all without one) get `dtype` where `when` holds, and are rounded by `method`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    role: Option<Role>,
    when: Option<Expr>,
    #[serde(rename = "type")]
    dtype: Option<TypeName>,
    method: Option<MethodName>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct MethodName(Way);

impl TryFrom<String> for MethodName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Way::parse(&name).map(Self).map_err(|e| e.to_string())
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct TypeName(DType);

impl TryFrom<String> for TypeName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let known = DType::from_name(&name).filter(|t| t.ggml_id().is_some());
        known.map(Self).ok_or_else(|| format!("{name:?} is no type of ggml"))
    }
}

/// The text of a file in `formats/recipe/`.
fn embedded(name: &str) -> Option<String> {
    EMBEDDED.iter().find(|(own, _)| *own == name).map(|(_, text)| (*text).to_owned())
}

impl RecipeFile {
    /// Parses `text`, and what it extends.
    fn parse(text: &str, base: &dyn Fn(&str) -> Option<String>, chain: u32) -> Result<Self> {
        let mut file: Self =
            toml::from_str(text).map_err(|e| Error::malformed(e.to_string().trim_end().to_string()))?;
        if file.schema != SCHEMA {
            return Err(Error::unsupported(format!("schema {} is not known, this is {SCHEMA}", file.schema)));
        }
        if let Some(name) = &file.extends {
            if chain == 0 {
                return Err(Error::malformed(format!("extends {name:?}: too many files, or a circle")));
            }
            let text = base(name)
                .ok_or_else(|| Error::malformed(format!("extends {name:?}, which is not there")))?;
            let base = Self::parse(&text, base, chain - 1).map_err(|e| e.context(name))?;
            // A variable may name those before it: the base's come first.
            let own = std::mem::replace(&mut file.vars, base.vars);
            file.vars.extend(own);
            file.rules.extend(base.rules);
        }
        Ok(file)
    }
}

impl Recipe {
    /// Parses one file; `base` finds the text of a file it extends. `None` is a file without a
    /// name, which is only there to be extended.
    ///
    /// # Errors
    /// `Malformed`, with the line, as the TOML parser says.
    fn from_toml(text: &str, base: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let file = RecipeFile::parse(text, base, MAX_CHAIN)?;
        let Some(name) = file.name else { return Ok(None) };
        let (Some(id), Some(TypeName(dtype))) = (file.id, file.dtype) else {
            return Err(Error::malformed(format!("{name} needs an id and a type")));
        };
        let needs_imatrix = file.needs_imatrix.iter().map(|t| t.0).collect();
        let (vars, rules) = (file.vars, file.rules);
        Ok(Some(Self { name, aliases: file.aliases, id, dtype, needs_imatrix, vars, rules }))
    }

    /// What the text of a file says; it may extend those of the program. `None` is a file without a name.
    ///
    /// # Errors
    /// `Malformed`, with the line.
    pub fn from_text(text: &str) -> Result<Option<Self>> {
        Self::from_toml(text, &embedded)
    }

    /// All file types, by bits per weight of their main type and by number.
    ///
    /// # Errors
    /// `Malformed` when an embedded file is faulty (a test holds them to be sound).
    pub fn all() -> Result<&'static [Self]> {
        static ALL: OnceLock<Vec<Recipe>> = OnceLock::new();
        if let Some(all) = ALL.get() {
            return Ok(all);
        }
        let mut all = Vec::new();
        for (name, text) in EMBEDDED {
            all.extend(Self::from_toml(text, &embedded).map_err(|e| e.context(format!("{name}.toml")))?);
        }
        all.sort_by(|a, b| {
            a.dtype.bits_per_weight().total_cmp(&b.dtype.bits_per_weight()).then(a.id.cmp(&b.id))
        });
        Ok(ALL.get_or_init(|| all))
    }

    /// The file type of this name or alias, in any case, or of this number; or what a file that ends in `.toml` says,
    /// which stays in memory.
    ///
    /// # Errors
    /// `Misuse`, with the nearest names; `Io`, `Limit` and `Malformed` for files.
    pub fn parse(name: &str) -> Result<&'static Self> {
        let path = Path::new(name);
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml")) {
            let text = read_text(path, MOST_BYTES)?;
            let recipe = Self::from_text(&text).map_err(|e| e.at(path))?;
            let recipe = recipe.ok_or_else(|| Error::malformed("has no name").at(path))?;
            return Ok(Box::leak(Box::new(recipe)));
        }
        let all = Self::all()?;
        let id: Option<u32> = name.parse().ok();
        let found = all.iter().find(|r| r.names().any(|n| n.eq_ignore_ascii_case(name)) || Some(r.id) == id);
        found.ok_or_else(|| {
            let wanted = name.to_uppercase();
            let mut near: Vec<_> = all.iter().flat_map(Self::names).collect();
            near.sort_by_key(|n| strsim::damerau_levenshtein(n, &wanted));
            near.truncate(3);
            Error::misuse(format!("{name:?} is no file type"))
                .hint(format!("the nearest are {}; --help lists all", near.join(", ")))
        })
    }

    /// Its name and its aliases.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(&self.aliases).map(String::as_str)
    }

    /// The methods that its rules name.
    pub fn ways(&self) -> impl Iterator<Item = Way> + '_ {
        self.rules.iter().filter_map(|rule| Some(rule.method?.0))
    }

    /// What the rules give: each that applies sets type or method anew.
    fn apply_rules(&self, asked: &Asked) -> Result<(DType, Option<Way>)> {
        let vars: Vec<_> = self.vars.iter().map(|(name, e)| (name.as_str(), e)).collect();
        let mut scope = asked.scope(self.dtype, &vars);
        let mut way = None;
        for rule in &self.rules {
            if rule.role.is_some_and(|role| role != asked.role) {
                continue;
            }
            let holds = match &rule.when {
                Some(when) => crate::arch::truth(&when.eval(&scope as &dyn Scope)?),
                None => true,
            };
            if holds {
                scope.dtype = rule.dtype.map_or(scope.dtype, |t| t.0);
                way = rule.method.map(|m| m.0).or(way);
            }
        }
        Ok((scope.dtype, way))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::collections::HashSet;

    #[test]
    fn embedded_recipes_are_sound() {
        let all = Recipe::all().unwrap();
        let mut names = HashSet::new();
        let mut ids = HashSet::new();
        for recipe in all {
            for name in recipe.names() {
                assert!(names.insert(name.to_uppercase()), "{name} twice");
                assert_eq!(Recipe::parse(&name.to_lowercase()).unwrap().id, recipe.id);
            }
            assert!(ids.insert(recipe.id), "{} twice", recipe.id);
            assert_eq!(Recipe::parse(&recipe.id.to_string()).unwrap().name, recipe.name);
        }
        assert!(all.len() >= 35);
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        let error = Recipe::parse("q4_k_n").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misuse);
        assert!(error.hint_text().unwrap().contains("Q4_K_M"), "{error:?}");
    }

    #[test]
    fn faulty_files_are_refused() {
        let base = |name: &str| match name {
            "circle" => Some("schema = 1\nextends = 'circle'".to_owned()),
            _ => None,
        };
        for (text, why) in [
            ("schema = 2", "schema"),
            ("schema = 1\nname = 'A'\ntype = 'Q8_0'", "id"),
            ("schema = 1\nname = 'A'\nid = 1\ntype = 'Q9_0'", "Q9_0"),
            ("schema = 1\nextends = 'nothing'", "nothing"),
            ("schema = 1\nextends = 'circle'", "circle"),
            ("schema = 1\nrules = [{ role = 'attn_x', type = 'Q8_0' }]", "attn_x"),
            ("schema = 1\nrules = [{ type = 'Q8_0', when = '1 +' }]", "position"),
            ("schema = 1\nrules = [{ method = 'gptx' }]", "gptx"),
            ("schema = 1\nrule = 1", "rule"),
        ] {
            let error = Recipe::from_toml(text, &base).unwrap_err();
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }
}
