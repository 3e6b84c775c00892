//! Messages of protocol buffers, version 3, as Rust types.
//!
//! `message!` and `oneof!` make Rust types of tables of fields; both directions come from one table. What is written
//! is deterministic: fields in the order of the table, which is that of their numbers, maps in the order of their
//! keys, nothing that has its default value but in a oneof. What is read may be in any order.
//!
//! Stricter than the libraries, where nobody writes otherwise and readers disagree: a field that does not repeat,
//! or a oneof, or a key of a map, comes once; numbers lie within their type. Fields that a table lacks are passed
//! over and counted ([`Unknown`](super::wire::Unknown)).

use std::collections::BTreeMap;

use super::wire::{Content, Decoder, FIXED32, FIXED64, Field, Fields, encode, put_bytes, put_key};
use crate::error::{Error, Result};

/// A type with fields. Made by `message!` and `oneof!`.
pub trait Message: Default + PartialEq {
    /// Its name in the `.proto` file.
    const NAME: &'static str;

    /// Appends its fields.
    fn encode(&self, out: &mut Vec<u8>);

    /// Takes one field.
    ///
    /// # Errors
    /// `Malformed` for what the field cannot hold.
    fn take(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<Taken>;
}

/// What became of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is there, and may not come again.
    Once,
    /// It is there; another may come.
    Repeated,
    /// The message has no field of this number.
    Unknown,
}

/// The content of a field, in Rust: a number, a text, a message, a list or a map of these.
pub trait Slot: Default + PartialEq {
    /// Whether it may come several times.
    const TAKEN: Taken = Taken::Once;

    /// Appends it as the field `number`, whatever its value.
    fn write(&self, number: u32, out: &mut Vec<u8>);

    /// Takes one field.
    ///
    /// # Errors
    /// `Malformed` for a wire type or a value that it cannot hold.
    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()>;

    /// Appends a list as fields of one number; of numbers as one field.
    fn write_list(list: &[Self], number: u32, out: &mut Vec<u8>) {
        list.iter().for_each(|item| item.write(number, out));
    }

    /// Takes one field of a list.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn read_list(list: &mut Vec<Self>, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        let mut item = Self::default();
        item.read(field, decoder)?;
        // Most lists have one item: a list that grows by itself begins with four.
        if list.capacity() == 0 {
            list.reserve_exact(1);
        }
        list.push(item);
        Ok(())
    }
}

/// [`Slot`] for types that are [`Varint`].
macro_rules! varint_slot {
    ($($type:ty)*) => {$(
        impl $crate::container::coreml::message::Slot for $type {
            fn write(&self, number: u32, out: &mut Vec<u8>) {
                $crate::container::coreml::wire::write_varint(*self, number, out);
            }

            fn read(
                &mut self,
                field: &$crate::container::coreml::wire::Field<'_>,
                _: &mut $crate::container::coreml::wire::Decoder,
            ) -> $crate::error::Result<()> {
                *self = $crate::container::coreml::wire::read_varint(field)?;
                Ok(())
            }

            fn write_list(list: &[Self], number: u32, out: &mut Vec<u8>) {
                $crate::container::coreml::wire::write_varints(list, number, out);
            }

            fn read_list(
                list: &mut Vec<Self>,
                field: &$crate::container::coreml::wire::Field<'_>,
                _: &mut $crate::container::coreml::wire::Decoder,
            ) -> $crate::error::Result<()> {
                $crate::container::coreml::wire::read_varints(list, field)
            }
        }
    )*};
}
pub(super) use varint_slot;

varint_slot! { u64 i64 i32 bool }

macro_rules! fixed_slot {
    ($($type:ty: $content:ident, $wire:ident, $bytes:literal, $what:literal;)*) => {$(
        impl Slot for $type {
            fn write(&self, number: u32, out: &mut Vec<u8>) {
                put_key(number, $wire, out);
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn read(&mut self, field: &Field<'_>, _: &mut Decoder) -> Result<()> {
                let Content::$content(bytes) = field.content else { return Err(field.not($what)) };
                *self = <$type>::from_le_bytes(bytes);
                Ok(())
            }

            fn write_list(list: &[Self], number: u32, out: &mut Vec<u8>) {
                if !list.is_empty() {
                    let packed: Vec<u8> = list.iter().flat_map(|v| v.to_le_bytes()).collect();
                    put_bytes(number, &packed, out);
                }
            }

            fn read_list(list: &mut Vec<Self>, field: &Field<'_>, _: &mut Decoder) -> Result<()> {
                match field.content {
                    Content::$content(bytes) => list.push(<$type>::from_le_bytes(bytes)),
                    Content::Bytes(bytes) => {
                        let (numbers, rest) = bytes.as_chunks::<$bytes>();
                        if !rest.is_empty() {
                            return Err(field.not($what));
                        }
                        list.extend(numbers.iter().map(|b| <$type>::from_le_bytes(*b)));
                    }
                    _ => return Err(field.not($what)),
                }
                Ok(())
            }
        }
    )*};
}

fixed_slot! {
    f32: Fixed32, FIXED32, 4, "numbers of 4 bytes";
    f64: Fixed64, FIXED64, 8, "numbers of 8 bytes";
}

impl Slot for String {
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        put_bytes(number, self.as_bytes(), out);
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        let text = std::str::from_utf8(field.bytes()?).map_err(|_| field.not("UTF-8"))?;
        decoder.take_bytes(text.len())?;
        *self = text.into();
        Ok(())
    }
}

impl Slot for Vec<u8> {
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        put_bytes(number, self, out);
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        let bytes = field.bytes()?;
        decoder.take_bytes(bytes.len())?;
        *self = bytes.to_vec();
        Ok(())
    }
}

impl<S: Slot> Slot for Vec<S> {
    const TAKEN: Taken = Taken::Repeated;

    fn write(&self, number: u32, out: &mut Vec<u8>) {
        S::write_list(self, number, out);
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        let (n, capacity) = (self.len(), self.capacity());
        S::read_list(self, field, decoder).map_err(|e| e.context(n))?;
        let more = self.capacity().saturating_sub(capacity);
        decoder.take(more.saturating_mul(size_of::<S>()))
    }
}

/// A map is a list of messages of a key (1) and a value (2).
impl<S: Slot> Slot for BTreeMap<String, S> {
    const TAKEN: Taken = Taken::Repeated;

    fn write(&self, number: u32, out: &mut Vec<u8>) {
        for (key, value) in self {
            let mut entry = Vec::new();
            key.write(1, &mut entry);
            value.write(2, &mut entry);
            put_bytes(number, &entry, out);
        }
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        let (mut key, mut value, mut seen) = (String::new(), S::default(), [false; 2]);
        let mut fields = Fields::new(field.bytes()?, field.at);
        while let Some(inner) = fields.next()? {
            let which = match inner.number {
                1 => 0,
                2 => 1,
                number => {
                    decoder.pass_over("entry of a map", number)?;
                    continue;
                }
            };
            if std::mem::replace(&mut seen[which], true) {
                return Err(inner.twice());
            }
            match which {
                0 => key.read(&inner, decoder)?,
                _ => value.read(&inner, decoder).map_err(|e| e.context(format_args!("{key:?}")))?,
            }
        }
        if self.contains_key(&key) {
            return Err(Error::malformed(format!("{key:?} appears twice, again at byte {}", field.at)));
        }
        decoder.take_entry(self.len(), size_of::<(String, S)>())?;
        self.insert(key, value);
        Ok(())
    }
}

impl<M: Message> Slot for M {
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        put_bytes(number, &encode(self), out);
    }

    fn read(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<()> {
        *self = decoder.message(field.bytes()?, field.at)?;
        Ok(())
    }
}

/// A message of one field, number 1: lists, states, sizes are such.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Only<T>(pub T);

impl<T: Slot> Message for Only<T> {
    const NAME: &'static str = "message of one field";

    fn encode(&self, out: &mut Vec<u8>) {
        if self.0 != T::default() {
            self.0.write(1, out);
        }
    }

    fn take(&mut self, field: &Field<'_>, decoder: &mut Decoder) -> Result<Taken> {
        if field.number != 1 {
            return Ok(Taken::Unknown);
        }
        self.0.read(field, decoder)?;
        Ok(T::TAKEN)
    }
}

/// A struct from its fields: number, name, type; a oneof among them follows behind a `+`.
macro_rules! message {
    ($(
        $(#[$doc:meta])*
        $name:ident {
            $($(#[$field_doc:meta])* $number:literal $field:ident: $type:ty,)*
        } $(+ $(#[$one_doc:meta])* $one:ident: $one_type:ty;)?
    )*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
            $($(#[$one_doc])* pub $one: $one_type,)?
        }

        impl $crate::container::coreml::message::Message for $name {
            const NAME: &'static str = stringify!($name);

            fn encode(&self, out: &mut Vec<u8>) {
                use $crate::container::coreml::message::Slot;
                $(if self.$field != <$type>::default() {
                    Slot::write(&self.$field, $number, out);
                })*
                $($crate::container::coreml::message::Message::encode(&self.$one, out);)?
            }

            #[allow(unreachable_patterns)] // the last one, where there is a oneof
            fn take(
                &mut self,
                field: &$crate::container::coreml::wire::Field<'_>,
                decoder: &mut $crate::container::coreml::wire::Decoder,
            ) -> $crate::error::Result<$crate::container::coreml::message::Taken> {
                use $crate::container::coreml::message::Slot;
                match field.number {
                    $($number => {
                        let read = Slot::read(&mut self.$field, field, decoder);
                        read.map_err(|e| e.context(stringify!($field)))?;
                        Ok(<$type as Slot>::TAKEN)
                    })*
                    $(_ => $crate::container::coreml::message::Message::take(&mut self.$one, field, decoder),)?
                    _ => Ok($crate::container::coreml::message::Taken::Unknown),
                }
            }
        }
    )*};
}
pub(super) use message;

/// An enum from the fields of which a message has at most one: number, name, type.
macro_rules! oneof {
    ($(
        $(#[$doc:meta])*
        $name:ident {
            $($(#[$member_doc:meta])* $number:literal $member:ident($type:ty),)*
        }
    )*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub enum $name {
            /// None of them.
            #[default]
            None,
            $($(#[$member_doc])* $member($type),)*
        }

        impl $crate::container::coreml::message::Message for $name {
            const NAME: &'static str = stringify!($name);

            fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    Self::None => {}
                    $(Self::$member(value) => $crate::container::coreml::message::Slot::write(value, $number, out),)*
                }
            }

            fn take(
                &mut self,
                field: &$crate::container::coreml::wire::Field<'_>,
                decoder: &mut $crate::container::coreml::wire::Decoder,
            ) -> $crate::error::Result<$crate::container::coreml::message::Taken> {
                let taken = match field.number {
                    $($number => {
                        let mut value = <$type>::default();
                        let read = $crate::container::coreml::message::Slot::read(&mut value, field, decoder);
                        read.map_err(|e| e.context(stringify!($member)))?;
                        Self::$member(value)
                    })*
                    _ => return Ok($crate::container::coreml::message::Taken::Unknown),
                };
                if *self != Self::None {
                    return Err(field.twice());
                }
                *self = taken;
                // That it comes once was checked here, for all its members together.
                Ok($crate::container::coreml::message::Taken::Repeated)
            }
        }
    )*};
}
pub(super) use oneof;

#[cfg(test)]
mod tests {
    use super::super::wire::{MAX_DEPTH, decode};
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    message! {
        /// For tests.
        Node {
            /// A number.
            1 number: i32,
            /// A text.
            2 text: String,
            /// Nodes below.
            3 below: Vec<Node>,
            /// Nodes by name.
            4 named: BTreeMap<String, Node>,
            /// Numbers.
            5 numbers: Vec<f32>,
            /// Bytes.
            6 bytes: Vec<u8>,
        } + /// One of some.
        one: One;
    }

    oneof! {
        /// For tests.
        One {
            /// A number.
            7 Number(u64),
            /// A message.
            8 Message(Only<bool>),
        }
    }

    fn one() -> impl Strategy<Value = One> {
        prop_oneof![
            Just(One::None),
            any::<u64>().prop_map(One::Number),
            any::<bool>().prop_map(|flag| One::Message(Only(flag)))
        ]
    }

    fn node() -> impl Strategy<Value = Node> {
        let leaf = (
            any::<i32>(),
            any::<String>(),
            prop::collection::vec(-1e9f32..1e9, 0..4),
            any::<Vec<u8>>(),
            one(),
        )
            .prop_map(|(number, text, numbers, bytes, one)| Node {
                number,
                text,
                numbers,
                bytes,
                one,
                ..Node::default()
            });
        leaf.prop_recursive(3, 12, 3, |inner| {
            let named = prop::collection::btree_map("[a-c]{0,2}", inner.clone(), 0..3);
            (prop::collection::vec(inner, 0..3), named, any::<i32>(), one())
                .prop_map(|(below, named, number, one)| Node { below, named, number, one, ..Node::default() })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(node in node()) {
            let bytes = encode(&node);
            let (back, unknown) = decode::<Node>(&bytes).unwrap();
            prop_assert_eq!(encode(&back), bytes);
            prop_assert_eq!(back, node);
            prop_assert!(unknown.is_empty());
        }

        #[test]
        fn any_bytes_are_an_error_or_a_message(bytes: Vec<u8>) {
            if let Ok((node, _)) = decode::<Node>(&bytes) {
                // NaN is not equal to itself; its bytes are.
                let written = encode(&node);
                prop_assert_eq!(encode(&decode::<Node>(&written).unwrap().0), written);
            }
        }
    }

    #[test]
    fn a_oneof_is_written_with_its_default_and_comes_once() {
        assert_eq!(encode(&Node { one: One::Number(0), ..Node::default() }), [0x38, 0]);
        assert_eq!(encode(&Node { one: One::Message(Only(false)), ..Node::default() }), [0x42, 0]);
        let e = decode::<Node>(&[0x38, 0, 0x42, 0]).unwrap_err();
        assert_eq!(e.to_string(), "field 8 at byte 4 comes a second time");
    }

    #[test]
    fn the_way_to_a_fault_is_named() {
        // below[0].named["x"].number is a text.
        let bytes = [0x1a, 0x09, 0x22, 0x07, 0x0a, 0x01, b'x', 0x12, 0x02, 0x0a, 0x00];
        let e = decode::<Node>(&bytes).unwrap_err();
        assert!(e.to_string().starts_with("below: 0: named: \"x\": number: field 1 at byte 11 is"), "{e}");
        let twice = [0x22, 0x03, 0x0a, 0x01, b'x', 0x22, 0x03, 0x0a, 0x01, b'x'];
        let e = decode::<Node>(&twice).unwrap_err();
        assert!(e.kind() == ErrorKind::Malformed && e.to_string().contains("\"x\" appears twice"), "{e}");
    }

    #[test]
    fn nesting_ends() {
        let nested = |depth: u32| {
            let mut node = Node::default();
            (1..depth)
                .for_each(|_| node = Node { below: vec![std::mem::take(&mut node)], ..Node::default() });
            decode::<Node>(&encode(&node))
        };
        assert!(nested(MAX_DEPTH).is_ok());
        assert_eq!(nested(MAX_DEPTH + 1).unwrap_err().kind(), ErrorKind::Limit);
    }
}
