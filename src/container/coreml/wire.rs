//! Protocol buffers, version 3: fields as they lie in bytes (protobuf.dev, "Encoding").
//!
//! A message is a list of fields, each a key (number and wire type) and its content. Every length is checked against
//! what is left before anything is taken. Nesting is bounded, and so is the memory that messages take: a message of two
//! bytes may become some hundred. What messages are made of is in [`super::message`].

use std::collections::BTreeMap;

use super::message::{Message, Taken};
use crate::error::{Error, Result};

/// Deepest nesting of messages, as in the protobuf libraries.
pub(super) const MAX_DEPTH: u32 = 100;
/// Most bytes of memory for each byte of a file, beside [`SOME_MEMORY`].
const MEMORY_PER_BYTE: u64 = 24;
/// What a file of any size may take.
const SOME_MEMORY: u64 = 1 << 20;
/// Beyond this, most bytes of memory for each byte of a file: so long files hold elements rather than operations.
const MUCH_MEMORY: u64 = 512 << 20;
const MUCH_MEMORY_PER_BYTE: u64 = 4;
/// Entries of a node of a map (`std`, B = 6). A node is taken whole, and at least half of it is used.
const NODE: usize = 11;
/// What an allocation takes beside its bytes.
const ALLOCATION: usize = 16;
/// Most numbers of fields that are passed over.
const MAX_UNKNOWN: usize = 256;
/// Largest number of a field.
const MAX_NUMBER: u64 = (1 << 29) - 1;
/// Most bytes of a varint.
const MAX_VARINT: usize = 10;

pub(super) const VARINT: u32 = 0;
pub(super) const FIXED64: u32 = 1;
pub(super) const BYTES: u32 = 2;
pub(super) const FIXED32: u32 = 5;

/// Fields that were passed over: the message and the number of the field, and how often it came.
pub type Unknown = BTreeMap<(&'static str, u32), u64>;

/// All bytes of a message.
pub fn encode<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// The message that `bytes` are, and the fields that were passed over.
///
/// # Errors
/// `Malformed` for what is no such message, with the place of the fault; `Unsupported` for an unknown member of an
/// enumeration; `Limit` for nesting, unknown fields and memory beyond all use: 24 bytes for each of `bytes` and 1 MiB,
/// beyond 512 MiB 4 for each.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<(M, Unknown)> {
    let mut decoder = Decoder::new(bytes.len() as u64);
    let message = decoder.message(bytes, 0)?;
    Ok((message, decoder.unknown))
}

/// What is counted while a file is read.
#[derive(Debug)]
pub struct Decoder {
    depth: u32,
    /// Bytes that what was read takes in memory, and may take.
    memory: u64,
    most_memory: u64,
    unknown: Unknown,
}

impl Decoder {
    /// For a file of so many bytes.
    fn new(bytes: u64) -> Self {
        let most = SOME_MEMORY.saturating_add(bytes.saturating_mul(MEMORY_PER_BYTE));
        let most_memory = most.min(MUCH_MEMORY.max(bytes.saturating_mul(MUCH_MEMORY_PER_BYTE)));
        Self { depth: 0, memory: 0, most_memory, unknown: Unknown::new() }
    }

    /// Counts memory that is about to be taken, or was.
    pub(super) fn take(&mut self, bytes: usize) -> Result<()> {
        self.memory = self.memory.saturating_add(bytes as u64);
        match self.memory <= self.most_memory {
            true => Ok(()),
            false => Err(Error::limit(format!(
                "its messages take more than {} bytes of memory, far more than a file of this length should",
                self.most_memory
            ))),
        }
    }

    /// The same of text or bytes.
    pub(super) fn take_bytes(&mut self, bytes: usize) -> Result<()> {
        self.take(if bytes == 0 { 0 } else { bytes.saturating_add(ALLOCATION) })
    }

    /// The same of an entry of a map that has `len` of them: nodes are taken whole.
    pub(super) fn take_entry(&mut self, len: usize, entry: usize) -> Result<()> {
        let is_new = len.is_multiple_of(NODE.div_ceil(2));
        self.take(if is_new { entry.saturating_mul(NODE) } else { 0 })
    }

    /// Counts a field that is passed over.
    pub(super) fn pass_over(&mut self, message: &'static str, number: u32) -> Result<()> {
        if self.unknown.len() >= MAX_UNKNOWN && !self.unknown.contains_key(&(message, number)) {
            return Err(Error::limit(format!("fields of more than {MAX_UNKNOWN} numbers are not known")));
        }
        *self.unknown.entry((message, number)).or_default() += 1;
        Ok(())
    }

    /// A message of `bytes`, which begin at byte `at` of the file.
    pub(super) fn message<M: Message>(&mut self, bytes: &[u8], at: usize) -> Result<M> {
        self.depth += 1; // at most MAX_DEPTH, as an error ends it all
        if self.depth > MAX_DEPTH {
            return Err(Error::limit(format!("messages are nested deeper than {MAX_DEPTH} at byte {at}")));
        }
        let mut message = M::default();
        let mut seen = Vec::new();
        let mut fields = Fields::new(bytes, at);
        while let Some(field) = fields.next()? {
            match message.take(&field, self)? {
                Taken::Unknown => self.pass_over(M::NAME, field.number)?,
                Taken::Once if seen.contains(&field.number) => return Err(field.twice()),
                Taken::Once => seen.push(field.number),
                Taken::Repeated => {}
            }
        }
        self.depth -= 1;
        Ok(message)
    }
}

/// A field as it lies in the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    /// Its number.
    pub number: u32,
    /// First byte of its content in the file.
    pub(super) at: usize,
    pub(super) content: Content<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Content<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

impl<'a> Field<'a> {
    pub(super) fn bytes(&self) -> Result<&'a [u8]> {
        match self.content {
            Content::Bytes(bytes) => Ok(bytes),
            _ => Err(self.not("bytes with their length")),
        }
    }

    pub(super) fn not(&self, wanted: &str) -> Error {
        let found = match self.content {
            Content::Varint(value) => format!("the varint {value}"),
            Content::Fixed64(_) => "8 bytes".into(),
            Content::Bytes(bytes) => format!("{} bytes with their length", bytes.len()),
            Content::Fixed32(_) => "4 bytes".into(),
        };
        Error::malformed(format!("field {} at byte {} is {found}, not {wanted}", self.number, self.at))
    }

    /// That it comes once too often.
    pub(super) fn twice(&self) -> Error {
        Error::malformed(format!("field {} at byte {} comes a second time", self.number, self.at))
    }
}

/// Walks over the fields of a message.
pub(super) struct Fields<'a> {
    bytes: &'a [u8],
    pos: usize,
    /// Where `bytes` begin in the file.
    base: usize,
}

impl<'a> Fields<'a> {
    /// Of `bytes`, which begin at byte `base` of the file.
    pub(super) fn new(bytes: &'a [u8], base: usize) -> Self {
        Self { bytes, pos: 0, base }
    }

    pub(super) fn next(&mut self) -> Result<Option<Field<'a>>> {
        if self.pos == self.bytes.len() {
            return Ok(None);
        }
        let key_at = self.base + self.pos;
        let key = self.varint()?;
        let number = match key >> 3 {
            number @ 1..=MAX_NUMBER => number as u32, // below 2^29
            number => {
                return Err(Error::malformed(format!("no field has the number {number}, byte {key_at}")));
            }
        };
        let at = self.base + self.pos;
        let content = match (key & 7) as u32 {
            VARINT => Content::Varint(self.varint()?),
            FIXED64 => Content::Fixed64(self.fixed()?),
            FIXED32 => Content::Fixed32(self.fixed()?),
            BYTES => {
                let len = self.varint()?;
                let at = self.base + self.pos;
                let bytes = self.slice(len)?;
                return Ok(Some(Field { number, at, content: Content::Bytes(bytes) }));
            }
            other => {
                return Err(Error::malformed(format!(
                    "field {number} at byte {key_at} has wire type {other}; 0, 1, 2 and 5 are those of version 3"
                )));
            }
        };
        Ok(Some(Field { number, at, content }))
    }

    fn varint(&mut self) -> Result<u64> {
        let at = self.base + self.pos;
        let rest = self.bytes.get(self.pos..).unwrap_or_default();
        let mut value = 0;
        for (i, byte) in rest.iter().take(MAX_VARINT).enumerate() {
            let bits = u64::from(byte & 0x7F);
            if i + 1 == MAX_VARINT && bits > 1 {
                break;
            }
            value |= bits << (7 * i);
            if byte & 0x80 == 0 {
                self.pos += i + 1;
                return Ok(value);
            }
        }
        let fault = if rest.len() < MAX_VARINT { "is cut short" } else { "has more than 64 bits" };
        Err(Error::malformed(format!("the varint at byte {at} {fault}")))
    }

    fn slice(&mut self, len: u64) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.pos..).unwrap_or_default();
        let bytes = usize::try_from(len).ok().and_then(|len| rest.get(..len)).ok_or_else(|| {
            let at = self.base + self.pos;
            Error::malformed(format!("{len} bytes at byte {at}, where {} are left", rest.len()))
        })?;
        self.pos += bytes.len();
        Ok(bytes)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.slice(N as u64)?);
        Ok(out)
    }
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(super) fn put_key(number: u32, wire_type: u32, out: &mut Vec<u8>) {
    put_varint(u64::from(number) << 3 | u64::from(wire_type), out);
}

pub(super) fn put_bytes(number: u32, bytes: &[u8], out: &mut Vec<u8>) {
    put_key(number, BYTES, out);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// A number that is written as a varint.
pub trait Varint: Copy {
    /// As the wire has it: negative numbers in two's complement of 64 bits.
    fn to_varint(self) -> u64;

    /// # Errors
    /// `Malformed` for a value that the type lacks; `Unsupported` for a member that an enumeration lacks.
    fn from_varint(value: u64) -> Result<Self>;
}

impl Varint for u64 {
    fn to_varint(self) -> u64 {
        self
    }

    fn from_varint(value: u64) -> Result<Self> {
        Ok(value)
    }
}

impl Varint for i64 {
    fn to_varint(self) -> u64 {
        self as u64
    }

    fn from_varint(value: u64) -> Result<Self> {
        Ok(value as i64)
    }
}

impl Varint for i32 {
    fn to_varint(self) -> u64 {
        i64::from(self) as u64
    }

    fn from_varint(value: u64) -> Result<Self> {
        let value = value as i64;
        Self::try_from(value).map_err(|_| Error::malformed(format!("{value} does not fit into 32 bits")))
    }
}

impl Varint for bool {
    fn to_varint(self) -> u64 {
        u64::from(self)
    }

    fn from_varint(value: u64) -> Result<Self> {
        match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Error::malformed(format!("a truth value is {value}, not 0 or 1"))),
        }
    }
}

pub(super) fn write_varint(value: impl Varint, number: u32, out: &mut Vec<u8>) {
    put_key(number, VARINT, out);
    put_varint(value.to_varint(), out);
}

pub(super) fn read_varint<V: Varint>(field: &Field<'_>) -> Result<V> {
    match field.content {
        Content::Varint(value) => V::from_varint(value),
        _ => Err(field.not("a varint")),
    }
}

pub(super) fn write_varints<V: Varint>(list: &[V], number: u32, out: &mut Vec<u8>) {
    if !list.is_empty() {
        let mut packed = Vec::with_capacity(list.len());
        list.iter().for_each(|v| put_varint(v.to_varint(), &mut packed));
        put_bytes(number, &packed, out);
    }
}

/// Numbers may come packed or one by one.
pub(super) fn read_varints<V: Varint>(list: &mut Vec<V>, field: &Field<'_>) -> Result<()> {
    let Content::Bytes(bytes) = field.content else {
        list.push(read_varint(field)?);
        return Ok(());
    };
    let mut packed = Fields::new(bytes, field.at);
    while packed.pos < bytes.len() {
        list.push(V::from_varint(packed.varint()?)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::coreml::message::Only;
    use crate::container::coreml::mil::Block;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_the_documentation() {
        assert_eq!(encode(&Only(150i32)), [0x08, 0x96, 0x01]);
        assert_eq!(encode(&Only("testing".to_string())), b"\x0a\x07testing");
        assert_eq!(encode(&Only(vec![3, 270, 86_942])), [0x0a, 6, 0x03, 0x8e, 0x02, 0x9e, 0xa7, 0x05]);
        let minus_two = [0x08, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!((encode(&Only(-2i32)), encode(&Only(-2i64))), (minus_two.to_vec(), minus_two.to_vec()));
        assert_eq!(encode(&Only(vec![1.5f32])), [0x0a, 4, 0, 0, 0xc0, 0x3f]);
        assert!(encode(&Only(0i32)).is_empty(), "a default is not written");
        let one_by_one = decode::<Only<Vec<i64>>>(&[0x08, 3, 0x0a, 2, 4, 5, 0x08, 6]).unwrap().0;
        assert_eq!(one_by_one, Only(vec![3, 4, 5, 6]), "numbers may come packed or not");
    }

    #[test]
    fn faults_are_named() {
        let refused = |bytes: &[u8], kind: ErrorKind, words: &str| {
            let e = decode::<Only<i32>>(bytes).unwrap_err();
            assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
        };
        let malformed = |bytes: &[u8], words: &str| refused(bytes, ErrorKind::Malformed, words);
        malformed(&[0x80], "the varint at byte 0 is cut short");
        malformed(&[0x08, 0xff], "the varint at byte 1 is cut short");
        malformed(&[0xff; 12], "the varint at byte 0 has more than 64 bits");
        malformed(&[0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02], "more than 64 bits");
        malformed(&[0x00, 1], "no field has the number 0");
        malformed(&[0x80, 0x80, 0x80, 0x80, 0x10, 1], "no field has the number 536870912");
        malformed(&[0x0b], "wire type 3");
        malformed(&[0x0e], "wire type 6");
        malformed(&[0x12, 4, 1, 2], "4 bytes at byte 2, where 2 are left");
        malformed(&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], "where 0 are left");
        malformed(&[0x15, 1, 2, 3], "4 bytes at byte 1, where 3 are left");
        malformed(&[0x0a, 1, 1], "not a varint");
        malformed(&[0x08, 1, 0x08, 1], "field 1 at byte 3 comes a second time");
        malformed(&[0x08, 0x80, 0x80, 0x80, 0x80, 0x08], "2147483648 does not fit into 32 bits");
        assert!(decode::<Only<bool>>(&[0x08, 2]).unwrap_err().to_string().contains("not 0 or 1"));
        assert!(decode::<Only<String>>(&[0x0a, 1, 0xff]).unwrap_err().to_string().contains("not UTF-8"));
        assert!(decode::<Only<Vec<f64>>>(&[0x0a, 1, 0]).unwrap_err().to_string().contains("8 bytes"));
    }

    #[test]
    fn what_is_not_known_is_passed_over_and_counted() {
        let bytes =
            [0x10, 5, 0x08, 7, 0x1a, 2, 0xff, 0xff, 0x21, 0, 0, 0, 0, 0, 0, 0, 0, 0x2d, 0, 0, 0, 0, 0x10, 6];
        let (message, unknown) = decode::<Only<i64>>(&bytes).unwrap();
        assert_eq!(message, Only(7));
        let counts: Vec<_> = unknown.into_iter().map(|((_, number), n)| (number, n)).collect();
        assert_eq!(counts, [(2, 2), (3, 1), (4, 1), (5, 1)]);
    }

    #[test]
    fn memory_is_bounded_by_the_length() {
        let refused = |bytes: &[u8], words: &str| {
            let e = decode::<Block>(bytes).err().unwrap();
            assert!(e.kind() == ErrorKind::Limit && e.to_string().contains(words), "{e}");
        };
        // Operations of nothing take 2 bytes in a file, and more than a hundred in memory.
        assert_eq!(decode::<Block>(&[0x1a, 0].repeat(1 << 12)).unwrap().0.operations.len(), 1 << 12);
        refused(&[0x1a, 0].repeat(1 << 18), "bytes of memory");
        // With a name of one byte, and an attribute of no value.
        let named = [0x1a, 8, 0x0a, 1, b'x', 0x2a, 3, 0x0a, 1, b'v'];
        refused(&named.repeat(1 << 16), "bytes of memory");
        let unknown: Vec<u8> = (5..MAX_UNKNOWN as u64 + 8)
            .flat_map(|number| {
                let mut field = Vec::new();
                put_varint(number << 3, &mut field);
                field.push(0);
                field
            })
            .collect();
        refused(&unknown, "of more than 256 numbers");
    }

    proptest! {
        #[test]
        fn numbers_come_back(wide: Vec<i64>, narrow: Vec<i32>, plain: Vec<u64>, bits: Vec<bool>) {
            prop_assert_eq!(decode::<Only<Vec<i64>>>(&encode(&Only(wide.clone()))).unwrap().0.0, wide);
            prop_assert_eq!(decode::<Only<Vec<i32>>>(&encode(&Only(narrow.clone()))).unwrap().0.0, narrow);
            prop_assert_eq!(decode::<Only<Vec<u64>>>(&encode(&Only(plain.clone()))).unwrap().0.0, plain);
            prop_assert_eq!(decode::<Only<Vec<bool>>>(&encode(&Only(bits.clone()))).unwrap().0.0, bits);
        }
    }
}
