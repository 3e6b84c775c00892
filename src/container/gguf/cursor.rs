//! Reads a GGUF header front to back, in either byte order, never beyond the file or the limit.

use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};

use super::value::{Array, Value, ValueType};

const WINDOW: u64 = 64 << 10;

/// A position in a header, over a window of the file's bytes.
pub(super) struct Cursor<'a> {
    file: &'a InputFile,
    limits: &'a Limits,
    window: Vec<u8>,
    window_start: u64,
    pos: u64,
    pub(super) big_endian: bool,
}

macro_rules! numbers {
    ($($name:ident)*) => {$(
        pub(super) fn $name(&mut self) -> Result<$name> {
            let bytes = self.bytes()?;
            Ok(if self.big_endian { $name::from_be_bytes(bytes) } else { $name::from_le_bytes(bytes) })
        }
    )*};
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a InputFile, limits: &'a Limits) -> Self {
        Self { file, limits, window: Vec::new(), window_start: 0, pos: 0, big_endian: false }
    }

    pub(super) fn pos(&self) -> u64 {
        self.pos
    }

    /// Fails unless `count` things of at least `size` bytes each can still follow. After it,
    /// `count` is small enough to allocate for.
    pub(super) fn expect(&self, count: u64, size: u64, what: &str) -> Result<()> {
        let need = count.checked_mul(size);
        if need.is_none_or(|n| n > self.file.len() - self.pos) {
            return Err(Error::malformed(format!(
                "{count} {what} at byte {}, but the file ends at byte {}",
                self.pos,
                self.file.len()
            ))
            .offset(self.pos));
        }
        let end = need.and_then(|n| n.checked_add(self.pos));
        if end.is_none_or(|end| end > self.limits.header_bytes) {
            return Err(Bound::Header
                .reached(format!(
                    "{count} {what} at byte {} make a header of more than {} bytes",
                    self.pos, self.limits.header_bytes
                ))
                .offset(self.pos));
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let within = |c: &Self| {
            let start = usize::try_from(c.pos.checked_sub(c.window_start)?).ok()?;
            c.window.get(start..)?.first_chunk::<N>().copied()
        };
        if let Some(bytes) = within(self) {
            self.pos += N as u64;
            return Ok(bytes);
        }
        self.expect(N as u64, 1, "bytes")?;
        self.window.resize((self.file.len() - self.pos).min(WINDOW) as usize, 0);
        self.file.read_at(self.pos, &mut self.window)?;
        self.window_start = self.pos;
        let bytes = within(self).ok_or_else(|| Error::malformed("the header ends early"))?;
        self.pos += N as u64;
        Ok(bytes)
    }

    numbers! { u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 }

    fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => {
                Err(Error::malformed(format!("BOOL has value {other}, not 0 or 1")).offset(self.pos - 1))
            }
        }
    }

    /// A string of at most `max` bytes.
    pub(super) fn string(&mut self, max: u64) -> Result<Vec<u8>> {
        let len = self.u64()?;
        self.expect(len, 1, "bytes of string")?;
        if len > max {
            let message = format!("string of {len} bytes, at most {max} are allowed");
            // Of keys and names, the format has bounds of its own.
            return Err(match max == self.limits.string_bytes {
                true => Bound::String.reached(message),
                false => Error::limit(message),
            }
            .offset(self.pos - 8));
        }
        let mut bytes = vec![0; len as usize];
        let start = self.pos.checked_sub(self.window_start).and_then(|n| usize::try_from(n).ok());
        let end = start.and_then(|s| s.checked_add(bytes.len()));
        match start.zip(end).and_then(|(s, e)| self.window.get(s..e)) {
            Some(there) => bytes.copy_from_slice(there),
            None => self.file.read_at(self.pos, &mut bytes)?,
        }
        self.pos += len;
        Ok(bytes)
    }

    pub(super) fn value(&mut self) -> Result<Value> {
        use ValueType as T;
        Ok(match self.value_type()? {
            T::U8 => Value::U8(self.u8()?),
            T::I8 => Value::I8(self.i8()?),
            T::U16 => Value::U16(self.u16()?),
            T::I16 => Value::I16(self.i16()?),
            T::U32 => Value::U32(self.u32()?),
            T::I32 => Value::I32(self.i32()?),
            T::F32 => Value::F32(self.f32()?),
            T::Bool => Value::Bool(self.bool()?),
            T::String => Value::String(self.string(self.limits.string_bytes)?),
            T::U64 => Value::U64(self.u64()?),
            T::I64 => Value::I64(self.i64()?),
            T::F64 => Value::F64(self.f64()?),
            T::Array => Value::Array(self.array(1)?),
        })
    }

    fn value_type(&mut self) -> Result<ValueType> {
        let id = self.u32()?;
        ValueType::from_id(id)
            .ok_or_else(|| Error::malformed(format!("value type {id} does not exist")).offset(self.pos - 4))
    }

    fn array(&mut self, depth: u32) -> Result<Array> {
        use ValueType as T;
        if depth > self.limits.array_depth {
            let message = format!("arrays are nested deeper than {}", self.limits.array_depth);
            return Err(Bound::Depth.reached(message).offset(self.pos));
        }
        let element = self.value_type()?;
        let n = self.u64()?;
        Ok(match element {
            T::U8 => Array::U8(self.many(n, 1, Self::u8)?),
            T::I8 => Array::I8(self.many(n, 1, Self::i8)?),
            T::U16 => Array::U16(self.many(n, 2, Self::u16)?),
            T::I16 => Array::I16(self.many(n, 2, Self::i16)?),
            T::U32 => Array::U32(self.many(n, 4, Self::u32)?),
            T::I32 => Array::I32(self.many(n, 4, Self::i32)?),
            T::F32 => Array::F32(self.many(n, 4, Self::f32)?),
            T::Bool => Array::Bool(self.many(n, 1, Self::bool)?),
            T::String => Array::String(self.many(n, 8, |c| c.string(c.limits.string_bytes))?),
            T::U64 => Array::U64(self.many(n, 8, Self::u64)?),
            T::I64 => Array::I64(self.many(n, 8, Self::i64)?),
            T::F64 => Array::F64(self.many(n, 8, Self::f64)?),
            T::Array => Array::Array(self.many(n, 12, |c| c.array(depth + 1))?),
        })
    }

    /// `n` elements of at least `size` bytes each.
    fn many<T>(&mut self, n: u64, size: u64, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        self.expect(n, size, "array elements")?;
        (0..n).map(|i| read(self).map_err(|e| e.context(format_args!("element {i}")))).collect()
    }
}
