//! Reading a configuration file, however hostile: its size, its nesting and what its aliases unfold to
//! are bounded, and no key may come twice.

use std::cell::Cell;
use std::fmt;
use std::path::Path;

use qconv::container::side::read_text;
use qconv::error::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value as Json};

/// Longest file.
const MOST_BYTES: u64 = 256 << 10;
/// Most brackets in YAML: its parser takes time that grows with the square of how deep they nest.
const MOST_BRACKETS: usize = 4096;
/// Most that a file may unfold to, in bytes of text and in values, each counting as [`VALUE`] bytes: YAML's
/// aliases repeat what they name.
const MOST_UNFOLDED: usize = 1 << 20;
const VALUE: usize = 16;

/// How a file is written.
#[derive(Clone, Copy)]
pub enum Form {
    Toml,
    Yaml,
}

impl Form {
    /// By the ending of a file's name.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "toml" => Some(Self::Toml),
            "yaml" | "yml" => Some(Self::Yaml),
            _ => None,
        }
    }

    /// The values of a file.
    ///
    /// # Errors
    /// `Limit` for a file that is too long, `Malformed` with the parser's words, `Io`.
    pub fn read(self, path: &Path) -> Result<Json> {
        let text = read_text(path, MOST_BYTES)?;
        self.parse(&text).map_err(|e| e.at(path))
    }

    /// The values of a text.
    ///
    /// # Errors
    /// `Malformed` with the parser's words.
    pub fn parse(self, text: &str) -> Result<Json> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let left = Cell::new(MOST_UNFOLDED);
        let malformed = |e: String| Error::malformed(e.trim_end().to_string());
        match self {
            Self::Toml => {
                let parser = toml::Deserializer::parse(text).map_err(|e| malformed(e.to_string()))?;
                Bounded(&left).deserialize(parser).map_err(|e| malformed(e.to_string()))
            }
            Self::Yaml if text.matches(['[', '{']).count() > MOST_BRACKETS => {
                Err(Error::limit(format!("more than {MOST_BRACKETS} lists and tables in brackets")))
            }
            Self::Yaml => Bounded(&left)
                .deserialize(serde_norway::Deserializer::from_str(text))
                .map_err(|e| malformed(e.to_string())),
        }
    }
}

/// A value, as long as there is something left to unfold.
#[derive(Clone, Copy)]
struct Bounded<'b>(&'b Cell<usize>);

impl Bounded<'_> {
    fn take<E: serde::de::Error>(self, bytes: usize) -> std::result::Result<(), E> {
        let left = self.0.get().checked_sub(bytes.saturating_add(VALUE));
        self.0.set(left.ok_or_else(|| {
            E::custom(format_args!("its aliases unfold to more than the {MOST_UNFOLDED} bytes allowed"))
        })?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Json, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true or false, a list or a table")
    }

    fn visit_unit<E: serde::de::Error>(self) -> std::result::Result<Json, E> {
        self.take(0).map(|()| Json::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, v: bool) -> std::result::Result<Json, E> {
        self.take(0).map(|()| v.into())
    }

    fn visit_i64<E: serde::de::Error>(self, v: i64) -> std::result::Result<Json, E> {
        self.take(0).map(|()| v.into())
    }

    fn visit_u64<E: serde::de::Error>(self, v: u64) -> std::result::Result<Json, E> {
        self.take(0).map(|()| v.into())
    }

    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<Json, E> {
        self.take(0)?;
        serde_json::Number::from_f64(v).map(Json::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> std::result::Result<Json, E> {
        self.take(v.len()).map(|()| v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Json, A::Error> {
        self.take(0)?;
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut table: A) -> std::result::Result<Json, A::Error> {
        self.take(0)?;
        let mut entries = Map::new();
        while let Some(key) = table.next_key_seed(self)? {
            let key = match key {
                Json::String(key) => key,
                Json::Number(key) => key.to_string(),
                other => return Err(A::Error::custom(format_args!("{other} is no key"))),
            };
            if entries.contains_key(&key) {
                return Err(A::Error::custom(format_args!("{key:?} appears twice")));
            }
            let value = table.next_value_seed(self)?;
            entries.insert(key, value);
        }
        Ok(entries.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_forms_give_the_same() {
        let value = json!({"a": "x", "b": [1, 2.5, true], "c": {"d": -3}});
        let toml = Form::Toml.parse("a = 'x'\nb = [1, 2.5, true]\n[c]\nd = -3\n").unwrap();
        let yaml = Form::Yaml.parse("\u{feff}a: x\nb: [1, 2.5, true]\nc: {d: -3}\n").unwrap();
        assert_eq!((toml, yaml), (value.clone(), value));
        let repeated = Form::Yaml.parse("a: &b [1]\nc: *b\n").unwrap();
        assert_eq!(repeated, json!({"a": [1], "c": [1]}));
    }

    #[test]
    fn hostile_files_are_refused() {
        let long = format!("a: &a {}\nb: [{}]\n", "x".repeat(100_000), "*a,".repeat(1000));
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for n in 1..30 {
            bomb += &format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9));
        }
        let deep = "[".repeat(100_000);
        let less_deep = format!("a: {}{}", "[".repeat(4000), "]".repeat(4000));
        let dashes = "- ".repeat(100_000);
        let circle = "a: &a [*a]";
        for (form, text, why) in [
            (Form::Yaml, long.as_str(), "unfold"),
            (Form::Yaml, &bomb, "unfold"),
            (Form::Yaml, &deep, "brackets"),
            (Form::Yaml, &less_deep, "recursion"),
            (Form::Yaml, &dashes, "recursion"),
            (Form::Yaml, circle, "recursion"),
            (Form::Yaml, "a: 1\na: 2\n", "twice"),
            (Form::Yaml, "a: .nan", "finite"),
            (Form::Yaml, "[a]: 2", "no key"),
            (Form::Yaml, "a: \u{0}", ""),
            (Form::Toml, "a = 1\na = 2\n", "duplicate"),
            (Form::Toml, &format!("a = {deep}{}", "]".repeat(100_000)), "recursion"),
        ] {
            let start: String = text.chars().take(30).collect();
            let e = form.parse(text).expect_err(&start).to_string();
            assert!(e.contains(why), "{start}: {}", &e[..e.len().min(300)]);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.yaml");
        std::fs::write(&path, vec![b'#'; MOST_BYTES as usize + 1]).unwrap();
        assert!(Form::Yaml.read(&path).unwrap_err().to_string().contains("bytes allowed"));
    }
}
