//! Canonical JSON: one text for each value. RFC 8785 for what a manifest holds: keys are ASCII and sorted, there
//! is no white space, and numbers are integers from 0 to 2^53 - 1.

use std::fmt;
use std::io::Write;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};

/// The largest number: all up to it are exact in any reader.
pub const MAX_NUMBER: u64 = (1 << 53) - 1;
/// Objects and arrays within each other.
const MAX_DEPTH: u32 = 32;
/// Most values in an item of a list: a value in memory may have 40 times the bytes of its text.
const MAX_OF_ITEM: u32 = 1 << 12;
/// Most values in all that is beside the lists.
const MAX_BESIDE: u32 = 1 << 20;

/// JSON that nothing is asked of here: its canonical text, which takes a fraction of the memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept(Box<str>);

impl Kept {
    /// The value.
    pub fn value(&self) -> Json {
        serde_json::from_str(&self.0).unwrap_or_default()
    }

    /// The fields of an object; of anything else none.
    pub fn fields(&self) -> Map<String, Json> {
        match self.value() {
            Json::Object(map) => map,
            _ => Map::new(),
        }
    }
}

impl From<&Json> for Kept {
    fn from(value: &Json) -> Self {
        // What has no canonical text is refused when it is written.
        let text = write(value).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        Self(text.unwrap_or_else(|| value.to_string()).into())
    }
}

impl From<Map<String, Json>> for Kept {
    fn from(fields: Map<String, Json>) -> Self {
        match fields.is_empty() {
            true => Self::default(),
            false => Self::from(&Json::Object(fields)),
        }
    }
}

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
#[cfg(test)]
pub fn parse(bytes: &[u8]) -> Result<Json> {
    let value = serde_json::from_slice(bytes).map_err(|e| Error::malformed(format!("is no JSON: {e}")))?;
    let again = write(&value).map_err(|e| Error::malformed(e.to_string()))?;
    same(&again, bytes).map(|()| value)
}

/// That a text, written again, is the same. A key that comes twice is there once in a value.
fn same(again: &[u8], bytes: &[u8]) -> Result<()> {
    match again
        .iter()
        .zip(bytes)
        .position(|(a, b)| a != b)
        .or((again.len() != bytes.len()).then_some(again.len().min(bytes.len())))
    {
        None => Ok(()),
        Some(at) => Err(Error::malformed(format!(
            "is no canonical JSON from byte {at} on: keys are not in order, one comes twice, or there is white space"
        ))),
    }
}

/// The object in `bytes`, which have to be its canonical text, without the arrays in it that are called as one of
/// `lists`: their items are given to `item` as they come, with the number of their list. Of many tensors only one is
/// there as a value at a time.
///
/// # Errors
/// `Malformed` when it is no canonical text, or a list is missing; `Limit` for more values in an item, or beside the
/// lists, than there may be; those of `item`.
pub fn parse_lists(
    bytes: &[u8],
    lists: &[&str],
    item: &mut dyn FnMut(usize, &Json) -> Result<()>,
) -> Result<Map<String, Json>> {
    let again = Vec::with_capacity(bytes.len());
    let mut reader = Reader { lists, item, again, beside: 0, seen: Vec::new(), failure: None };
    let mut from = serde_json::Deserializer::from_slice(bytes);
    let read = (&mut reader).deserialize(&mut from).and_then(|map| from.end().map(|()| map));
    let Reader { again, seen, failure, .. } = reader;
    let map = read.map_err(|e| failure.unwrap_or_else(|| Error::malformed(format!("is no JSON: {e}"))))?;
    same(&again, bytes)?;
    match (0..lists.len()).find(|number| !seen.contains(number)) {
        None => Ok(map),
        Some(number) => Err(Error::malformed(format!("a manifest has no {}", lists[number]))),
    }
}

/// Reads an object, and writes it once more.
struct Reader<'a> {
    lists: &'a [&'a str],
    item: &'a mut dyn FnMut(usize, &Json) -> Result<()>,
    again: Vec<u8>,
    /// Values that were beside the lists.
    beside: u32,
    /// The lists that were there.
    seen: Vec<usize>,
    /// Why reading was ended.
    failure: Option<Error>,
}

impl Reader<'_> {
    /// Writes what was read, and keeps why that is not possible.
    fn put<E: de::Error>(&mut self, put: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<(), E> {
        put(&mut self.again).map_err(|e| self.fail(Error::malformed(e.to_string())))
    }

    fn fail<E: de::Error>(&mut self, e: Error) -> E {
        self.failure = Some(e);
        E::custom("the manifest is refused")
    }
}

impl<'de> DeserializeSeed<'de> for &mut Reader<'_> {
    type Value = Map<String, Json>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_> {
    type Value = Map<String, Json>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut found, mut before) = (Map::new(), None::<String>);
        self.again.push(b'{');
        while let Some(key) = map.next_key::<String>()? {
            if !key.is_ascii() || before.as_ref().is_some_and(|before| *before >= key) {
                return Err(self.fail(Error::malformed(format!(
                    "is no canonical JSON: key {key:?} is not ASCII, not in order, or comes twice"
                ))));
            }
            if before.is_some() {
                self.again.push(b',');
            }
            self.put(|out| put_text(&key, out))?;
            self.again.push(b':');
            match self.lists.iter().position(|name| *name == key) {
                Some(number) => map.next_value_seed(List { reader: self, number })?,
                None => {
                    let read = map.next_value_seed(Counted { seen: &mut self.beside, most: MAX_BESIDE });
                    let value = read.map_err(|e| match self.beside > MAX_BESIDE {
                        true => self.fail(too_many(MAX_BESIDE, "beside its lists")),
                        false => e,
                    })?;
                    self.put(|out| put(&value, 1, out))?;
                    found.insert(key.clone(), value);
                }
            }
            before = Some(key);
        }
        self.again.push(b'}');
        Ok(found)
    }
}

/// Reads an array of the object.
struct List<'a, 'b> {
    reader: &'a mut Reader<'b>,
    number: usize,
}

impl<'de> DeserializeSeed<'de> for List<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.reader.lists[self.number])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { reader, number } = self;
        reader.seen.push(number);
        reader.again.push(b'[');
        let mut is_first = true;
        loop {
            let mut seen = 0;
            let read = items.next_element_seed(Counted { seen: &mut seen, most: MAX_OF_ITEM });
            let read = read.map_err(|e| match seen > MAX_OF_ITEM {
                true => reader.fail(too_many(MAX_OF_ITEM, format!("in one of its {}", reader.lists[number]))),
                false => e,
            });
            let Some(value) = read? else { break };
            if !std::mem::take(&mut is_first) {
                reader.again.push(b',');
            }
            reader.put(|out| put(&value, 2, out))?;
            (reader.item)(number, &value).map_err(|e| reader.fail(e))?;
        }
        reader.again.push(b']');
        Ok(())
    }
}

fn too_many(most: u32, place: impl fmt::Display) -> Error {
    Error::limit(format!("more than {most} JSON values {place}"))
}

/// Reads a value, and counts it and those in it.
struct Counted<'a> {
    seen: &'a mut u32,
    most: u32,
}

impl Counted<'_> {
    fn inner(&mut self) -> Counted<'_> {
        Counted { seen: self.seen, most: self.most }
    }
}

impl<'de> DeserializeSeed<'de> for Counted<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Json, D::Error> {
        *self.seen += 1;
        match *self.seen > self.most {
            true => Err(de::Error::custom("too many values")),
            false => from.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Counted<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Json, E> {
        Ok(flag.into())
    }

    fn visit_u64<E>(self, n: u64) -> Result<Json, E> {
        Ok(n.into())
    }

    fn visit_i64<E>(self, n: i64) -> Result<Json, E> {
        Ok(n.into())
    }

    fn visit_f64<E>(self, n: f64) -> Result<Json, E> {
        Ok(n.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = items.next_element_seed(self.inner())? {
            list.push(value);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Json, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            map.insert(key, entries.next_value_seed(self.inner())?);
        }
        Ok(map.into())
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
        let mut items = Vec::new();
        let mut item = |number: usize, item: &Json| {
            items.push((number, item.clone()));
            Ok(())
        };
        let rest = parse_lists(&text, &["b"], &mut item).unwrap();
        assert_eq!(rest.keys().collect::<Vec<_>>(), ["", "a"]);
        assert_eq!(items, [json!(1), json!(0), json!(true), json!(null)].map(|value| (0, value)));
        let e = parse_lists(&text, &["b", "x"], &mut |_, _| Ok(())).unwrap_err();
        assert!(e.to_string().contains("has no x"), "{e}");
        let e = parse_lists(&text, &["b"], &mut |_, _| Err(Error::interrupted())).unwrap_err();
        assert_eq!(e.kind(), crate::error::ErrorKind::Interrupted);
        assert!(parse_lists(&text, &["a"], &mut |_, _| Ok(())).is_err());
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
            assert!(parse_lists(other.as_bytes(), &[], &mut |_, _| Ok(())).is_err(), "{other}");
            let listed = format!("{{\"l\":[{other}]}}");
            assert!(
                other.is_empty() || parse_lists(listed.as_bytes(), &["l"], &mut |_, _| Ok(())).is_err(),
                "{listed}"
            );
        }
        let listed =
            |n: u32| format!("{{\"l\":[[{}0]],\"x\":[{}0]}}", "0,".repeat(n as usize), "0,".repeat(9));
        let read = |text: &str, lists: &[&str]| parse_lists(text.as_bytes(), lists, &mut |_, _| Ok(()));
        // An array is a value, and so is the last one in it.
        assert!(read(&listed(MAX_OF_ITEM - 2), &["l"]).is_ok());
        let e = read(&listed(MAX_OF_ITEM - 1), &["l"]).unwrap_err();
        assert_eq!(e.kind(), crate::error::ErrorKind::Limit);
        assert!(e.to_string().contains("more than 4096 JSON values in one of its l"), "{e}");
        // Two arrays in `l`, one in `x`, 11 numbers that are always there.
        assert!(read(&listed(MAX_BESIDE - 14), &[]).is_ok());
        let e = read(&listed(MAX_BESIDE - 13), &[]).unwrap_err();
        assert_eq!(e.kind(), crate::error::ErrorKind::Limit);
        assert!(e.to_string().contains("beside its lists"), "{e}");
        let kept = Kept::from(&value);
        assert_eq!((kept.value(), kept.fields().len()), (value.clone(), 3));
        assert_eq!(Kept::from(Map::new()).fields(), Map::new());
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
