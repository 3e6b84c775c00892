//! JSON objects in which no key may come twice.

use std::fmt;
use std::marker::PhantomData;

use indexmap::IndexMap;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

/// Entries of a JSON object in file order; a key that comes twice is an error, where `serde_json`
/// would keep the last.
pub struct Unique<V>(pub IndexMap<String, V>);

/// A value whose reading may depend on its key.
pub trait Entry: Sized {
    /// What the whole object is, for messages.
    const OBJECT: &str;

    /// Reads the value of `key`.
    ///
    /// # Errors
    /// As `map` has them.
    fn read<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error>;
}

impl Entry for String {
    const OBJECT: &str = "an object of strings";

    fn read<'de, A: MapAccess<'de>>(_: &str, map: &mut A) -> Result<Self, A::Error> {
        map.next_value()
    }
}

impl<'de, V: Entry> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Entry> Visitor<'de> for Entries<V> {
            type Value = Unique<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(V::OBJECT)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = IndexMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if entries.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("{key:?} appears twice")));
                    }
                    let value = V::read(&key, &mut map)?;
                    entries.insert(key, value);
                }
                Ok(Unique(entries))
            }
        }
        d.deserialize_map(Entries(PhantomData))
    }
}
