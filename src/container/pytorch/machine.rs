//! A pickle machine for state dicts: a stack, a memo, and inert objects. It knows the opcodes that
//! torch's `save` makes Python's pickler emit (protocols 2 to 5) and the names of [`Global`];
//! "calling" one of these makes an object of ours. Nothing recurses, every length is held against
//! the bytes that are there, and stack, memo and objects are bounded.

use std::collections::HashMap;

use super::globals::{Global, shown};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Highest protocol that Python has.
const PROTOCOL: u8 = 5;
/// Most values on the stack; picklers fill dicts in portions of a thousand.
const MAX_STACK: usize = 1 << 18;
/// Most marks on the stack: how deep things are nested.
const MAX_MARKS: usize = 1 << 10;
/// Most tensors, and most storages: what a pickle makes takes no more than some 200 MB, however it is made.
pub const MAX_TENSORS: usize = 1 << 17;
/// Most objects, and most entries of the memo. A tensor takes about six of either.
const MAX_OBJECTS: usize = MAX_TENSORS << 3;
/// Most values that come onto the stack in all. A tensor takes about twenty-five.
const MAX_VALUES: usize = MAX_TENSORS << 5;

/// Why a pickle could not be read.
#[derive(Debug)]
pub enum Fault {
    /// It goes on beyond the bytes given.
    End,
    /// Anything else.
    Error(Error),
}

impl From<Error> for Fault {
    fn from(e: Error) -> Self {
        Self::Error(e)
    }
}

impl Fault {
    /// The error, where there are no more bytes to be had.
    pub fn into_error(self) -> Error {
        match self {
            Self::Error(e) => e,
            Self::End => Error::malformed("its pickle ends within an instruction or a frame")
                .hint("the file is cut short: fetch it again"),
        }
    }
}

/// What lies on the stack.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    None,
    Int(i64),
    /// An integer of more than 64 bits: two's complement, little-endian.
    Long(&'a [u8]),
    Bool(bool),
    Float(f64),
    Text(&'a str),
    Global(Global),
    /// Index into [`Pickle::objects`].
    Object(usize),
}

impl<'a> Value<'a> {
    /// The text, where it is one.
    pub fn text(self) -> Option<&'a str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// What values refer to; it can be referred to more than once.
#[derive(Debug)]
pub enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// Index into [`Pickle::storages`].
    Storage(usize),
    /// Apart, so that the others stay small.
    Tensor(Box<Tensor<'a>>),
    /// Known, and of no interest.
    Opaque,
}

/// A piece of memory that tensors share.
#[derive(Debug)]
pub struct Storage<'a> {
    pub key: &'a str,
    pub dtype: DType,
    /// Elements.
    pub numel: u64,
}

/// A view of a storage. Size and stride are not looked at yet.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Index into [`Pickle::storages`].
    pub storage: usize,
    pub dtype: DType,
    pub offset: Value<'a>,
    pub size: Value<'a>,
    pub stride: Value<'a>,
}

/// What a pickle says.
#[derive(Debug)]
pub struct Pickle<'a> {
    pub objects: Vec<Object<'a>>,
    pub storages: Vec<Storage<'a>>,
    pub root: Value<'a>,
    /// Bytes that it took.
    pub len: usize,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle at the beginning of `bytes`.
    ///
    /// # Errors
    /// `End` when it goes on beyond them. `Unsupported` for names, opcodes and persistent ids that
    /// no state dict has, `Malformed` for what contradicts itself, `Limit` for too much of it.
    pub fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        Machine::new(bytes).run()
    }

    /// The items of a tuple or list.
    pub fn items(&self, value: Value) -> Option<&[Value<'a>]> {
        items(&self.objects, value)
    }
}

fn items<'o, 'a>(objects: &'o [Object<'a>], value: Value) -> Option<&'o [Value<'a>]> {
    let Value::Object(id) = value else { return None };
    match objects.get(id) {
        Some(Object::Tuple(items) | Object::List(items)) => Some(items),
        _ => None,
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Values pushed so far.
    values: usize,
    /// Heights of the stack.
    marks: Vec<usize>,
    /// Entries by number; picklers count them up from 0.
    memo: Vec<Option<Value<'a>>>,
    /// How many numbers have an entry: where Python's MEMOIZE puts the next one.
    memoized: usize,
    objects: Vec<Object<'a>>,
    storages: Vec<Storage<'a>>,
    by_key: HashMap<&'a str, usize>,
    /// Tensors so far.
    tensors: usize,
}

fn bad(what: &str) -> Fault {
    Error::malformed(format!("its pickle is faulty: {what}")).into()
}

fn too_many() -> Fault {
    Error::limit(format!("its pickle has more than {MAX_OBJECTS} objects, or {MAX_VALUES} values")).into()
}

fn too_many_tensors() -> Fault {
    Error::limit(format!("its pickle has more than {MAX_TENSORS} tensors or storages"))
        .hint("save it in several files")
        .into()
}

fn unknown(what: impl std::fmt::Display) -> Fault {
    Fault::Error(
        Error::unsupported(format!("its pickle holds {what}, which no state dict needs"))
            .hint("save the state dict alone, or as safetensors"),
    )
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            stack: Vec::new(),
            values: 0,
            marks: Vec::new(),
            memo: Vec::new(),
            memoized: 0,
            objects: Vec::new(),
            storages: Vec::new(),
            by_key: HashMap::new(),
            tensors: 0,
        }
    }

    fn run(mut self) -> Result<Pickle<'a>, Fault> {
        if self.byte()? != 0x80 {
            return Err(Error::unsupported("is no pickle of protocol 2 to 5").into());
        }
        match self.byte()? {
            2..=PROTOCOL => (),
            n => return Err(Error::unsupported(format!("its pickle has protocol {n}, not 2 to 5")).into()),
        }
        loop {
            let at = self.at;
            let opcode = self.byte()?;
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok(Pickle { objects: self.objects, storages: self.storages, root, len: self.at });
            }
            self.step(opcode, at)?;
            if self.stack.len() > MAX_STACK || self.marks.len() > MAX_MARKS {
                return Err(Error::limit("its pickle is nested too deep").into());
            }
            if self.objects.len() > MAX_OBJECTS || self.memo.len() > MAX_OBJECTS || self.values > MAX_VALUES {
                return Err(too_many());
            }
        }
    }

    /// Opcodes are those of `pickletools`; the comment on each line is its name there.
    fn step(&mut self, opcode: u8, at: usize) -> Result<(), Fault> {
        match opcode {
            // FRAME: what it holds is read as it comes, and has to be there.
            0x95 => {
                let len = self.uint(8)?;
                let rest = self.bytes.len().saturating_sub(self.at);
                if len > rest as u64 {
                    return Err(Fault::End);
                }
            }
            b'(' => self.marks.push(self.stack.len()), // MARK
            b'N' => self.push(Value::None),            // NONE
            // NEWTRUE, NEWFALSE
            0x88 | 0x89 => self.push(Value::Bool(opcode == 0x88)),
            // BININT1, BININT2, BININT
            b'K' => self.int(1)?,
            b'M' => self.int(2)?,
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()));
            }
            // LONG1, LONG4
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            // BINFLOAT
            b'G' => {
                let x = f64::from_be_bytes(self.array()?);
                self.push(Value::Float(x));
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8; SHORT_BINSTRING, BINSTRING of Python 2
            0x8c | b'U' => self.text(1)?,
            b'X' | b'T' => self.text(4)?,
            0x8d => self.text(8)?,
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.make(Object::Tuple(Vec::new())),
            0x85..=0x87 => {
                let n = usize::from(opcode - 0x84);
                let from = self.height(n)?;
                let items = self.stack.split_off(from);
                self.make(Object::Tuple(items));
            }
            b't' => {
                let items = self.since_mark()?;
                self.make(Object::Tuple(items));
            }
            b']' => self.make(Object::List(Vec::new())), // EMPTY_LIST
            b'}' => self.make(Object::Dict(Vec::new())), // EMPTY_DICT
            // APPEND, APPENDS, SETITEM, SETITEMS
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set(&items)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE; BINGET, LONG_BINGET
            b'q' => {
                let key = self.uint(1)?;
                self.remember(key)?;
            }
            b'r' => {
                let key = self.uint(4)?;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memoized as u64)?,
            b'h' => {
                let key = self.uint(1)?;
                self.recall(key)?;
            }
            b'j' => {
                let key = self.uint(4)?;
                self.recall(key)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(Global::find(module, name)?));
            }
            0x93 => {
                let (Value::Text(name), Value::Text(module)) = (self.pop()?, self.pop()?) else {
                    return Err(bad("a name that is no text"));
                };
                self.push(Value::Global(Global::find(module, name)?));
            }
            b'Q' => self.persistent()?, // BINPERSID
            b'R' => self.reduce()?,     // REDUCE
            b'b' => self.build()?,      // BUILD
            _ => return Err(unknown(format_args!("opcode 0x{opcode:02x} at byte {at}"))),
        }
        Ok(())
    }

    // Bytes.

    fn take(&mut self, n: u64) -> Result<&'a [u8], Fault> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n)).ok_or(Fault::End)?;
        self.at += taken.len();
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        self.take(1)?.first().copied().ok_or(Fault::End)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N as u64)?.first_chunk().copied().ok_or(Fault::End)
    }

    /// A little-endian number of at most 8 bytes.
    fn uint(&mut self, bytes: u64) -> Result<u64, Fault> {
        let taken = self.take(bytes)?;
        Ok(taken.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    fn int(&mut self, bytes: u64) -> Result<(), Fault> {
        let n = self.uint(bytes)?;
        self.push(Value::Int(n as i64)); // one or two bytes
        Ok(())
    }

    fn long(&mut self, bytes: u64) -> Result<(), Fault> {
        let n = self.uint(bytes)?;
        let taken = self.take(n)?;
        self.push(match taken {
            [] => Value::Int(0),
            [.., last] if taken.len() <= 8 => {
                let mut whole = [if *last >= 0x80 { 0xff } else { 0 }; 8];
                whole.iter_mut().zip(taken).for_each(|(w, t)| *w = *t);
                Value::Int(i64::from_le_bytes(whole))
            }
            _ => Value::Long(taken),
        });
        Ok(())
    }

    fn text(&mut self, bytes: u64) -> Result<(), Fault> {
        let n = self.uint(bytes)?;
        let text = std::str::from_utf8(self.take(n)?).map_err(|_| bad("a text is not UTF-8"))?;
        self.push(Value::Text(text));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|b| *b == b'\n').ok_or(Fault::End)?;
        let line = self.take(len as u64 + 1)?;
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        std::str::from_utf8(line).map_err(|_| bad("a name is not UTF-8"))
    }

    // Stack, memo, objects.

    fn push(&mut self, value: Value<'a>) {
        self.values += 1;
        self.stack.push(value);
    }

    fn make(&mut self, object: Object<'a>) {
        self.push(Value::Object(self.objects.len()));
        self.objects.push(object);
    }

    /// Height of the stack below its `n` uppermost values, which must lie above the last mark.
    fn height(&self, n: usize) -> Result<usize, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(n).filter(|h| *h >= floor).ok_or_else(|| bad("its stack is empty"))
    }

    fn pop(&mut self) -> Result<Value<'a>, Fault> {
        self.height(1)?;
        self.stack.pop().ok_or_else(|| bad("its stack is empty"))
    }

    fn since_mark(&mut self) -> Result<Vec<Value<'a>>, Fault> {
        let mark = self.marks.pop().ok_or_else(|| bad("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Object<'a>, Fault> {
        let top = self.height(1)?;
        match self.stack.get(top) {
            Some(Value::Object(id)) => self.objects.get_mut(*id).ok_or_else(|| bad("no such object")),
            _ => Err(bad("something is put into what is no list and no dict")),
        }
    }

    fn append(&mut self, mut more: Vec<Value<'a>>) -> Result<(), Fault> {
        match self.top()? {
            Object::List(items) => items.append(&mut more),
            _ => return Err(bad("something is appended to what is no list")),
        }
        Ok(())
    }

    fn set(&mut self, more: &[Value<'a>]) -> Result<(), Fault> {
        let (pairs, rest) = more.as_chunks::<2>();
        match self.top()? {
            Object::Dict(entries) if rest.is_empty() => entries.extend(pairs.iter().map(|[k, v]| (*k, *v))),
            Object::Dict(_) => return Err(bad("a key has no value")),
            _ => return Err(bad("an entry is set in what is no dict")),
        }
        Ok(())
    }

    fn remember(&mut self, key: u64) -> Result<(), Fault> {
        let top = self.height(1)?;
        // Each entry so far took a byte and more.
        let key = usize::try_from(key).ok().filter(|key| *key < self.at);
        let key = key.ok_or_else(|| bad("its memo has an entry whose number is far beyond those before"))?;
        if key > MAX_OBJECTS {
            return Err(too_many());
        }
        if key >= self.memo.len() {
            self.memo.resize(key + 1, None);
        }
        if let (Some(entry), Some(value)) = (self.memo.get_mut(key), self.stack.get(top)) {
            if entry.is_none() {
                self.memoized += 1;
            }
            *entry = Some(*value);
        }
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), Fault> {
        let value = usize::try_from(key).ok().and_then(|key| self.memo.get(key).copied().flatten());
        self.push(value.ok_or_else(|| bad("its memo has no such entry"))?);
        Ok(())
    }

    // Meaning.

    /// `("storage", class, key, location, numel)`; in the old layout with `None`, or a view of
    /// that storage, as the last.
    fn persistent(&mut self) -> Result<(), Fault> {
        let id = self.pop()?;
        let fields = items(&self.objects, id).ok_or_else(|| bad("a persistent id is no tuple"))?;
        let (class, key, numel) = match *fields {
            [Value::Text("storage"), class, key, _, numel] => (class, key, numel),
            [Value::Text("storage"), class, key, _, numel, Value::None] => (class, key, numel),
            [Value::Text("storage"), _, _, _, _, _] => return Err(unknown("a view of a storage")),
            [Value::Text(kind), ..] => return Err(unknown(format_args!("a persistent {:?}", shown(kind)))),
            _ => return Err(bad("a persistent id has no kind")),
        };
        let (Value::Global(Global::Storage(dtype)), Value::Text(key), Value::Int(numel @ 0..)) =
            (class, key, numel)
        else {
            return Err(bad("a storage is not given by class, key, and number of elements"));
        };
        let numel = numel as u64; // not negative
        let id = match self.by_key.get(key) {
            None if self.storages.len() >= MAX_TENSORS => return Err(too_many_tensors()),
            None => {
                self.by_key.insert(key, self.storages.len());
                self.storages.push(Storage { key, dtype, numel });
                self.storages.len() - 1
            }
            Some(&id) => {
                let same = self.storages.get(id).is_some_and(|s| s.dtype == dtype && s.numel == numel);
                if !same {
                    let key = shown(key);
                    return Err(bad(&format!("storage {key:?} has two types, or two sizes")));
                }
                id
            }
        };
        self.make(Object::Storage(id));
        Ok(())
    }

    fn reduce(&mut self) -> Result<(), Fault> {
        /// Most arguments of any function that is known.
        const ARGUMENTS: usize = 8;
        let (args, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else {
            return Err(bad("something is called that is no name"));
        };
        let wrong = || bad(&format!("{function:?} has other arguments than expected"));
        let args = items(&self.objects, args).filter(|a| a.len() <= ARGUMENTS).ok_or_else(wrong)?.to_vec();
        match (function, args.as_slice()) {
            (Global::OrderedDict, []) => self.make(Object::Dict(Vec::new())),
            // As Python 2 has it: a list of pairs.
            (Global::OrderedDict, &[list]) => {
                let pairs = items(&self.objects, list).ok_or_else(wrong)?;
                let pair = |v: &Value<'a>| match items(&self.objects, *v) {
                    Some(&[key, value]) => Ok((key, value)),
                    _ => Err(wrong()),
                };
                // A list can be named many times by few bytes.
                self.values += pairs.len();
                if self.values > MAX_VALUES {
                    return Err(too_many());
                }
                let entries = pairs.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
                self.make(Object::Dict(entries));
            }
            (Global::Size, &[sizes]) => self.push(sizes),
            (Global::Device, _) => self.make(Object::Opaque),
            // The function that makes the tensor, its class, its arguments, its attributes.
            (
                Global::RebuildFromType,
                &[Value::Global(inner), Value::Global(Global::TensorType), args, _],
            ) => {
                let args = items(&self.objects, args).filter(|a| a.len() <= ARGUMENTS);
                let args = args.ok_or_else(wrong)?.to_vec();
                self.rebuild(inner, &args)?;
            }
            _ => self.rebuild(function, &args)?,
        }
        Ok(())
    }

    /// A tensor, from the arguments of one of torch's functions that make one.
    fn rebuild(&mut self, function: Global, args: &[Value<'a>]) -> Result<(), Fault> {
        let object = |value: Value| match value {
            Value::Object(id) => self.objects.get(id),
            _ => None,
        };
        let (view, dtype) = match (function, args) {
            (Global::RebuildTensor, &[a, b, c, d]) => ([a, b, c, d], None),
            (Global::RebuildTensorV2, &[a, b, c, d, _, _] | &[a, b, c, d, _, _, Value::None]) => {
                ([a, b, c, d], None)
            }
            (Global::RebuildTensorV2 | Global::RebuildTensorV3, [.., Value::Object(_)]) if args.len() > 6 => {
                return Err(unknown("a tensor that is conjugated or the like"));
            }
            (
                Global::RebuildTensorV3,
                &[a, b, c, d, _, _, Value::Global(Global::DType(dtype))]
                | &[a, b, c, d, _, _, Value::Global(Global::DType(dtype)), Value::None],
            ) => ([a, b, c, d], Some(dtype)),
            (Global::RebuildParameter, &[data, _, _] | &[data, _, _, _])
                if matches!(object(data), Some(Object::Tensor(_))) =>
            {
                self.push(data);
                return Ok(());
            }
            _ => return Err(bad(&format!("{function:?} has other arguments than expected"))),
        };
        let [storage, offset, size, stride] = view;
        let storage = match object(storage) {
            Some(Object::Storage(id)) => *id,
            _ => return Err(bad("a tensor has no storage")),
        };
        let own = self.storages.get(storage).map(|s| s.dtype);
        let dtype = dtype.or(own).ok_or_else(|| bad("a tensor has no storage"))?;
        self.tensors += 1;
        if self.tensors > MAX_TENSORS {
            return Err(too_many_tensors());
        }
        self.make(Object::Tensor(Box::new(Tensor { storage, dtype, offset, size, stride })));
        Ok(())
    }

    /// Attributes of a dict, such as the `_metadata` of a state dict, are passed over.
    fn build(&mut self) -> Result<(), Fault> {
        self.pop()?;
        match self.top()? {
            Object::Dict(_) => Ok(()),
            _ => Err(unknown("an object with attributes")),
        }
    }
}
