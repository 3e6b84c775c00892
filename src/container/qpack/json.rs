//! Canonical JSON: one text for each value. RFC 8785 for what a manifest holds: keys are ASCII and sorted, there
//! is no white space, and numbers are integers from 0 to 2^53 - 1.

use std::io::Write;

use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};

/// The largest number: all up to it are exact in any reader.
pub const MAX_NUMBER: u64 = (1 << 53) - 1;
/// Objects and arrays within each other.
const MAX_DEPTH: u32 = 32;

/// The bytes of `value`.
///
/// # Errors
/// `Unsupported` for what has no canonical text: other numbers, keys that are not ASCII, too deep a nesting.
pub fn write(value: &Json) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    put(value, 0, &mut out)?;
    Ok(out)
}

/// The value of `bytes`, which have to be its canonical text.
///
/// # Errors
/// `Malformed` when they are not.
pub fn parse(bytes: &[u8]) -> Result<Json> {
    let value = serde_json::from_slice(bytes).map_err(|e| Error::malformed(format!("is no JSON: {e}")))?;
    // A key that comes twice is there once in the value.
    let again = write(&value).map_err(|e| Error::malformed(e.to_string()))?;
    match again
        .iter()
        .zip(bytes)
        .position(|(a, b)| a != b)
        .or((again.len() != bytes.len()).then_some(again.len().min(bytes.len())))
    {
        None => Ok(value),
        Some(at) => Err(Error::malformed(format!(
            "is no canonical JSON from byte {at} on: keys are not in order, one comes twice, or there is white space"
        ))),
    }
}

fn put(value: &Json, depth: u32, out: &mut Vec<u8>) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::unsupported(format!("JSON nested deeper than {MAX_DEPTH}")));
    }
    match value {
        Json::Null => out.extend(b"null"),
        Json::Bool(flag) => out.extend(if *flag { &b"true"[..] } else { b"false" }),
        Json::Number(n) => match n.as_u64().filter(|n| *n <= MAX_NUMBER) {
            Some(n) => write!(out, "{n}").map_err(|e| Error::unsupported(e.to_string()))?,
            None => {
                return Err(Error::unsupported(format!("number {n}: only integers from 0 to 2^53 - 1 are")));
            }
        },
        Json::String(text) => put_text(text, out)?,
        Json::Array(list) => {
            out.push(b'[');
            for (i, value) in list.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                put(value, depth + 1, out)?;
            }
            out.push(b']');
        }
        Json::Object(map) => put_object(map, depth, out)?,
    }
    Ok(())
}

fn put_object(map: &Map<String, Json>, depth: u32, out: &mut Vec<u8>) -> Result<()> {
    // What was read from a manifest is in order already.
    if map.keys().is_sorted() {
        return put_entries(map.iter(), depth, out);
    }
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| key.as_bytes());
    put_entries(entries.into_iter(), depth, out)
}

fn put_entries<'a>(
    entries: impl Iterator<Item = (&'a String, &'a Json)>,
    depth: u32,
    out: &mut Vec<u8>,
) -> Result<()> {
    out.push(b'{');
    for (i, (key, value)) in entries.enumerate() {
        if !key.is_ascii() {
            return Err(Error::unsupported(format!("key {key:?} is not ASCII")));
        }
        if i > 0 {
            out.push(b',');
        }
        put_text(key, out)?;
        out.push(b':');
        put(value, depth + 1, out)?;
    }
    out.push(b'}');
    Ok(())
}

/// serde_json escapes as RFC 8785 does: what has to be, in the shortest way.
fn put_text(text: &str, out: &mut Vec<u8>) -> Result<()> {
    serde_json::to_writer(out, text).map_err(|e| Error::unsupported(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn one_text_for_each_value() {
        let value =
            json!({"b": [1, 0, true, null], "a": {"z": "\u{1f}\n\"\\/é\u{7f}", "A": MAX_NUMBER}, "": {}});
        let text = write(&value).unwrap();
        let wanted = "{\"\":{},\"a\":{\"A\":9007199254740991,\"z\":\"\\u001f\\n\\\"\\\\/é\u{7f}\"},\"b\":[1,0,true,null]}";
        assert_eq!(String::from_utf8(text.clone()).unwrap(), wanted);
        assert_eq!(parse(&text).unwrap(), value);
        for other in [
            "{\"b\":1,\"a\":2}",
            "{\"a\":1,\"a\":1}",
            "{\"a\": 1}",
            " {}",
            "{}\n",
            "{\"a\":\"\\u0041\"}",
            "{\"a\":\"\\/\"}",
            "{\"a\":1.0}",
            "{\"a\":-1}",
            "{\"a\":1e3}",
            "{\"a\":9007199254740992}",
            "{\"é\":1}",
            "{\"a\":}",
            "",
        ] {
            assert!(parse(other.as_bytes()).is_err(), "{other}");
        }
        let deep = |n: usize| [vec![b'['; n], vec![b']'; n]].concat();
        assert!(parse(&deep(33)).is_ok() && parse(&deep(34)).is_err() && parse(&deep(100_000)).is_err());
    }

    proptest! {
        #[test]
        fn texts_come_back(keys in prop::collection::vec("[ -~]{0,6}", 0..6), text in any::<String>(), n in 0..=MAX_NUMBER) {
            let mut map = Map::new();
            for key in keys {
                map.insert(key, json!([text, n]));
            }
            let value = Json::Object(map);
            let bytes = write(&value).unwrap();
            prop_assert_eq!(&parse(&bytes).unwrap(), &value);
            prop_assert_eq!(write(&parse(&bytes).unwrap()).unwrap(), bytes);
        }
    }
}
