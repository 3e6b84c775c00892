//! Taking the fields of a JSON object one by one, each with its bounds.

use std::ops::RangeInclusive;

use serde_json::{Map, Value as Json};

use super::json::Kept;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The fields of an object that have not been taken yet.
pub(super) struct Fields<'a> {
    what: &'static str,
    map: &'a Map<String, Json>,
    taken: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which is called `what` in messages.
    pub fn of(value: &'a Json, what: &'static str) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::malformed(format!("{what} is no object")))?;
        Ok(Self { what, map, taken: Vec::new() })
    }

    /// A field that may be missing.
    pub fn optional(&mut self, key: &'static str) -> Option<&'a Json> {
        self.taken.push(key);
        self.map.get(key)
    }

    pub fn required(&mut self, key: &'static str) -> Result<&'a Json> {
        let what = self.what;
        self.optional(key).ok_or_else(|| Error::malformed(format!("{what} has no {key}")))
    }

    pub fn text(&mut self, key: &'static str) -> Result<&'a str> {
        let value = self.required(key)?;
        value.as_str().ok_or_else(|| self.wrong(key, value))
    }

    pub fn flag(&mut self, key: &'static str) -> Result<bool> {
        let value = self.required(key)?;
        value.as_bool().ok_or_else(|| self.wrong(key, value))
    }

    pub fn list(&mut self, key: &'static str) -> Result<&'a [Json]> {
        let value = self.required(key)?;
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong(key, value))
    }

    pub fn number(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Result<u64> {
        let value = self.required(key)?;
        value.as_u64().filter(|n| range.contains(n)).ok_or_else(|| self.wrong(key, value))
    }

    /// Numbers, as many as there are.
    pub fn numbers(&mut self, key: &'static str) -> Result<Vec<u64>> {
        let list = self.list(key)?;
        let numbers: Option<Vec<u64>> = list.iter().map(Json::as_u64).collect();
        numbers.ok_or_else(|| Error::malformed(format!("{} has {key} that are no numbers", self.what)))
    }

    /// SHA-256 in hexadecimal.
    pub fn sha256(&mut self, key: &'static str) -> Result<[u8; 32]> {
        let value = self.required(key)?;
        value.as_str().and_then(from_hex).ok_or_else(|| self.wrong(key, value))
    }

    /// The error for a field of another type, or beyond its bounds.
    pub fn wrong(&self, key: &str, value: &Json) -> Error {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            shown = shown.chars().take(80).chain("...".chars()).collect();
        }
        Error::malformed(format!("{} has {key} = {shown}, which it cannot be", self.what))
    }

    /// The fields that nobody took.
    pub fn rest(&self) -> Kept {
        let left = self.left().map(|(key, value)| (key.clone(), value.clone()));
        left.collect::<Map<String, Json>>().into()
    }

    /// Their names and values.
    pub fn left(&self) -> impl Iterator<Item = (&'a String, &'a Json)> {
        self.map.iter().filter(|(key, _)| !self.taken.contains(&key.as_str()))
    }
}

/// The element or block type of this name, as it is spelt.
pub(super) fn dtype(name: &str) -> Option<DType> {
    DType::ALL.iter().copied().find(|t| t.name() == name)
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let pairs = text.as_bytes().as_chunks::<2>();
    if pairs.0.len() != 32 || !pairs.1.is_empty() {
        return None;
    }
    let mut out = [0; 32];
    for (byte, [high, low]) in out.iter_mut().zip(pairs.0) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(out)
}
