//! Metadata as text: what a user sets and removes, and what `gguf_metadata.json` keeps.

use crate::container::gguf::{Array, Metadata, Value, ValueType};
use crate::error::{Error, Result};

/// Changes the user asks for in the metadata.
#[derive(Clone, Debug, Default)]
pub struct MetadataEdits {
    /// `general.name`.
    pub name: Option<String>,
    /// `key=value` or `key=type:value`.
    pub set: Vec<String>,
    /// Keys to leave out.
    pub remove: Vec<String>,
}

impl MetadataEdits {
    /// Applies the changes.
    ///
    /// # Errors
    /// `Misuse` for a value that does not parse, or a key to remove that is not there.
    pub fn apply(&self, metadata: &mut Metadata) -> Result<()> {
        if let Some(name) = &self.name {
            metadata.set("general.name", name.as_str());
        }
        for entry in &self.set {
            let (key, text) = entry
                .split_once('=')
                .ok_or_else(|| Error::misuse(format!("--set {entry:?} is not of the form key=value")))?;
            let value =
                parse_typed(text, metadata.get(key)).map_err(|e| e.context(format!("--set {key}")))?;
            metadata.set(key, value);
        }
        for key in &self.remove {
            if metadata.remove(key).is_none() {
                return Err(Error::misuse(format!("--remove {key}: there is no such key")));
            }
        }
        Ok(())
    }
}

/// `type:value`, or a value of the type that the key has already, or of the plainest type.
pub(super) fn parse_typed(text: &str, old: Option<&Value>) -> Result<Value> {
    let named = text.split_once(':').and_then(|(t, v)| Some((type_named(t)?, v)));
    let (kind, text) = match (named, old) {
        (Some((kind, text)), _) => (kind, text),
        (None, Some(old)) => (old.value_type(), text),
        (None, None) if text.parse::<u32>().is_ok() => (ValueType::U32, text),
        (None, None) if text.parse::<i64>().is_ok() => (ValueType::I64, text),
        (None, None) if text.parse::<f32>().is_ok() => (ValueType::F32, text),
        (None, None) if text.parse::<bool>().is_ok() => (ValueType::Bool, text),
        (None, None) => (ValueType::String, text),
    };
    fn parse<T: std::str::FromStr>(text: &str, kind: ValueType) -> Result<T> {
        text.parse().map_err(|_| Error::misuse(format!("{text:?} is no {}", kind.name())))
    }
    Ok(match kind {
        ValueType::U8 => Value::U8(parse(text, kind)?),
        ValueType::I8 => Value::I8(parse(text, kind)?),
        ValueType::U16 => Value::U16(parse(text, kind)?),
        ValueType::I16 => Value::I16(parse(text, kind)?),
        ValueType::U32 => Value::U32(parse(text, kind)?),
        ValueType::I32 => Value::I32(parse(text, kind)?),
        ValueType::F32 => Value::F32(parse(text, kind)?),
        ValueType::Bool => Value::Bool(parse(text, kind)?),
        ValueType::U64 => Value::U64(parse(text, kind)?),
        ValueType::I64 => Value::I64(parse(text, kind)?),
        ValueType::F64 => Value::F64(parse(text, kind)?),
        ValueType::String => Value::from(text),
        ValueType::Array => {
            let items: Vec<String> = serde_json::from_str(text)
                .map_err(|_| Error::misuse("an array is written as JSON: [\"a\", \"b\"]"))?;
            Value::Array(Array::String(items.into_iter().map(String::into_bytes).collect()))
        }
    })
}

/// The short names of types: `u32`, `f32`, `str`, `arr`.
const TYPE_NAMES: &[(&str, ValueType)] = &[
    ("u8", ValueType::U8),
    ("i8", ValueType::I8),
    ("u16", ValueType::U16),
    ("i16", ValueType::I16),
    ("u32", ValueType::U32),
    ("i32", ValueType::I32),
    ("f32", ValueType::F32),
    ("bool", ValueType::Bool),
    ("u64", ValueType::U64),
    ("i64", ValueType::I64),
    ("f64", ValueType::F64),
    ("str", ValueType::String),
    ("arr", ValueType::Array),
];

fn type_named(name: &str) -> Option<ValueType> {
    TYPE_NAMES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}

/// The inverse of [`parse_typed`]; `None` for what it cannot say (arrays of anything but text).
pub(super) fn format_typed(value: &Value) -> Option<String> {
    let name = TYPE_NAMES.iter().find(|(_, t)| *t == value.value_type())?.0;
    let text = match value {
        Value::String(_) => value.as_str()?.to_string(),
        Value::Array(Array::String(items)) => {
            let items: Option<Vec<&str>> = items.iter().map(|s| std::str::from_utf8(s).ok()).collect();
            serde_json::to_string(&items?).ok()?
        }
        Value::Array(_) => return None,
        v => v.to_string(),
    };
    Some(format!("{name}:{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits() {
        let mut m = Metadata::default();
        m.set("general.name", "old");
        m.set("llama.context_length", Value::U32(5));
        let edits = MetadataEdits {
            name: Some("new".into()),
            set: [
                "general.name=7",
                "llama.context_length=4096",
                "a=b:c",
                "n=12",
                "f=f32:1",
                "g=0.5",
                "t=true",
            ]
            .map(String::from)
            .to_vec(),
            remove: vec!["n".into()],
        };
        edits.apply(&mut m).unwrap();
        assert_eq!(m.str("general.name"), Some("7"));
        assert_eq!(m.get("llama.context_length"), Some(&Value::U32(4096)));
        assert_eq!(m.str("a"), Some("b:c"));
        assert_eq!(m.get("n"), None);
        assert_eq!(m.get("f"), Some(&Value::F32(1.0)));
        assert_eq!(m.get("t"), Some(&Value::Bool(true)));
        for bad in ["x", "llama.context_length=much", "k=u8:300", "k=arr:x"] {
            assert!(
                MetadataEdits { set: vec![bad.into()], ..Default::default() }.apply(&mut m).is_err(),
                "{bad}"
            );
        }
        assert!(MetadataEdits { remove: vec!["zz".into()], ..Default::default() }.apply(&mut m).is_err());
        for v in [Value::from("u32:é"), Value::F32(1e-6), Value::I8(-3), Value::Bool(false)] {
            assert_eq!(parse_typed(&format_typed(&v).unwrap(), None).unwrap(), v);
        }
    }
}
