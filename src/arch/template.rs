//! Tensor-name templates, readable both ways.
//!
//! `model.layers.{i}.mlp.experts.{e}.up_proj.{p}` matches names and, given the captures, makes
//! them: `{i}` and every other letter stand for an integer, `{p}` for `weight` or `bias`, `{*}`
//! for the rest of the name.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// The two suffixes that `{p}` stands for.
pub const PARAMETERS: [&str; 2] = ["weight", "bias"];

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Part {
    Text(String),
    Integer(char),
    Parameter,
    Rest,
}

/// What a template's placeholders stood for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Captures {
    /// Integers by letter.
    pub integers: BTreeMap<char, u64>,
    /// `weight` or `bias`.
    pub parameter: Option<&'static str>,
    /// What `{*}` took.
    pub rest: String,
}

impl Captures {
    /// Of a name that holds the layer and nothing else.
    pub fn of_layer(i: u64) -> Self {
        let mut captures = Self::default();
        captures.integers.insert('i', i);
        captures
    }
}

impl Template {
    /// Parses `text`.
    ///
    /// # Errors
    /// `Malformed` for an unknown placeholder or one used twice.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |why: &str| Error::malformed(format!("name template {text:?}: {why}"));
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_string()));
            }
            let (inside, tail) = after.split_once('}').ok_or_else(|| fail("a brace is not closed"))?;
            let part = match inside {
                "p" => Part::Parameter,
                "*" => Part::Rest,
                _ => match inside.chars().collect::<Vec<_>>()[..] {
                    [c] if c.is_ascii_lowercase() => Part::Integer(c),
                    _ => return Err(fail("placeholders are {i}, {e} or another letter, {p} and {*}")),
                },
            };
            if parts.contains(&part) {
                return Err(fail("a placeholder appears twice"));
            }
            parts.push(part);
            rest = tail;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_string()));
        }
        Ok(Self { text: text.to_string(), parts })
    }

    /// The text it was parsed from.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it has the integer placeholder `{letter}`.
    pub fn has(&self, letter: char) -> bool {
        self.parts.contains(&Part::Integer(letter))
    }

    /// Whether it has `{p}`.
    pub fn has_parameter(&self) -> bool {
        self.parts.contains(&Part::Parameter)
    }

    /// The letters of its integer placeholders.
    pub fn letters(&self) -> impl Iterator<Item = char> + '_ {
        self.parts.iter().filter_map(|p| match p {
            Part::Integer(c) => Some(*c),
            _ => None,
        })
    }

    /// The captures if the whole of `name` matches.
    pub fn matches(&self, name: &str) -> Option<Captures> {
        let mut captures = Captures::default();
        let mut rest = name;
        for part in &self.parts {
            match part {
                Part::Text(t) => rest = rest.strip_prefix(t.as_str())?,
                Part::Integer(c) => {
                    let n = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                    // No leading zeros: "01" would not be made again from 1.
                    let digits = rest.get(..n).filter(|d| *d == "0" || !d.starts_with('0'))?;
                    captures.integers.insert(*c, digits.parse().ok()?);
                    rest = &rest[n..];
                }
                Part::Parameter => {
                    let (p, tail) = PARAMETERS.iter().find_map(|p| Some((*p, rest.strip_prefix(p)?)))?;
                    captures.parameter = Some(p);
                    rest = tail;
                }
                Part::Rest => captures.rest = std::mem::take(&mut rest).to_string(),
            }
        }
        rest.is_empty().then_some(captures)
    }

    /// The name for these captures; `None` when one that it needs is missing.
    pub fn fill(&self, captures: &Captures) -> Option<String> {
        let mut name = String::with_capacity(self.text.len());
        for part in &self.parts {
            match part {
                Part::Text(t) => name.push_str(t),
                Part::Integer(c) => name.push_str(&captures.integers.get(c)?.to_string()),
                Part::Parameter => name.push_str(captures.parameter?),
                Part::Rest => name.push_str(&captures.rest),
            }
        }
        Some(name)
    }
}

impl<'de> serde::Deserialize<'de> for Template {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_ways() {
        let t = Template::parse("model.layers.{i}.experts.{e}.w1.{p}").unwrap();
        let c = t.matches("model.layers.12.experts.3.w1.bias").unwrap();
        assert_eq!((c.integers[&'i'], c.integers[&'e'], c.parameter), (12, 3, Some("bias")));
        assert_eq!(t.fill(&c).unwrap(), "model.layers.12.experts.3.w1.bias");
        for wrong in [
            "model.layers.x.experts.3.w1.bias",
            "model.layers.1.experts.3.w1.bia",
            "model.layers.01.experts.3.w1.bias",
        ] {
            assert!(t.matches(wrong).is_none(), "{wrong}");
        }
        let rest = Template::parse("language_model.{*}").unwrap();
        let c = rest.matches("language_model.model.norm.weight").unwrap();
        assert_eq!(Template::parse("{*}").unwrap().fill(&c).unwrap(), "model.norm.weight");
        assert!(
            Template::parse("a.{x").is_err()
                && Template::parse("{i}.{i}").is_err()
                && Template::parse("{ab}").is_err()
        );
    }

    proptest! {
        #[test]
        fn a_match_makes_the_name_again(name in "[a-z0-9.é]{0,30}") {
            for t in ["{i}.{*}", "a.{i}.b.{p}", "{*}", "a{i}"] {
                let t = Template::parse(t).unwrap();
                if let Some(c) = t.matches(&name) {
                    prop_assert_eq!(t.fill(&c).unwrap(), name.clone());
                }
            }
        }
    }
}
