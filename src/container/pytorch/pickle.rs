//! Writes the pickle of a state dict, byte for byte as `torch.save` does: protocol 2, an
//! `OrderedDict` of `_rebuild_tensor_v2`, or `_v3` for types without a storage class of their own.

use std::collections::HashMap;

use super::globals::names;
use crate::container::shards::Member;
use crate::error::{Error, Result};

/// Entries that Python's pickler sets at a time.
const BATCH: usize = 1000;

/// The pickle of a dict of `tensors`, each with a storage of its own, whose key is its number.
///
/// # Errors
/// `Unsupported` for a type that torch lacks, `Malformed` for numbers beyond 63 bits.
pub fn state_dict(tensors: &[Member<'_>]) -> Result<Vec<u8>> {
    let mut out = Pickler { bytes: vec![0x80, 2], memo: 0, known: HashMap::new() };
    out.ordered_dict();
    for (batch, some) in tensors.chunks(BATCH).enumerate() {
        if some.len() > 1 {
            out.bytes.push(b'('); // MARK
        }
        for (i, t) in some.iter().enumerate() {
            out.text(t.name);
            out.tensor(batch * BATCH + i, t).map_err(|e| e.context(format_args!("tensor {:?}", t.name)))?;
        }
        out.bytes.push(if some.len() > 1 { b'u' } else { b's' }); // SETITEMS, SETITEM
    }
    out.bytes.push(b'.'); // STOP
    Ok(out.bytes)
}

struct Pickler {
    bytes: Vec<u8>,
    /// Entries of the memo.
    memo: u32,
    /// Entries of what comes again: names, and texts that Python has once.
    known: HashMap<&'static str, u32>,
}

impl Pickler {
    /// Comments on lines are names of opcodes, as in `pickletools`.
    fn tensor(&mut self, key: usize, t: &Member<'_>) -> Result<()> {
        let (class, name) =
            names(t.dtype).ok_or_else(|| Error::unsupported(format!("PyTorch has no type {}", t.dtype)))?;
        let elements = t.nbytes / t.dtype.type_size();
        self.global(
            "torch._utils",
            if class.is_some() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" },
        );
        self.bytes.push(b'('); // MARK
        self.bytes.push(b'('); // MARK
        self.known_text("storage");
        match class {
            Some(class) => self.global("torch", class),
            None => self.global("torch.storage", "UntypedStorage"),
        }
        self.text(&key.to_string());
        self.known_text("cpu");
        self.int(if class.is_some() { elements } else { t.nbytes })?;
        self.bytes.push(b't'); // TUPLE
        self.remember();
        self.bytes.push(b'Q'); // BINPERSID
        self.int(0)?;
        self.sizes(t.shape)?;
        let mut strides = vec![1u64; t.shape.len()];
        for i in (1..t.shape.len()).rev() {
            // An axis of size 0 counts as 1, as torch has it.
            let stride = strides[i].checked_mul(t.shape[i].max(1));
            strides[i - 1] = stride.ok_or_else(|| Error::malformed("its strides overflow"))?;
        }
        self.sizes(&strides)?;
        self.bytes.push(0x89); // NEWFALSE: no gradient
        self.ordered_dict(); // no hooks
        if class.is_none() {
            self.global("torch", name);
        }
        self.bytes.push(b't'); // TUPLE
        self.remember();
        self.bytes.push(b'R'); // REDUCE
        self.remember();
        Ok(())
    }

    fn ordered_dict(&mut self) {
        self.global("collections", "OrderedDict");
        self.bytes.extend(b")R"); // EMPTY_TUPLE, REDUCE
        self.remember();
    }

    fn sizes(&mut self, sizes: &[u64]) -> Result<()> {
        if sizes.len() > 3 {
            self.bytes.push(b'('); // MARK
        }
        sizes.iter().try_for_each(|n| self.int(*n))?;
        match sizes.len() {
            0 => self.bytes.push(b')'),                   // EMPTY_TUPLE
            n @ 1..=3 => self.bytes.push(0x84 + n as u8), // TUPLE1 to TUPLE3
            _ => self.bytes.push(b't'),                   // TUPLE
        }
        if !sizes.is_empty() {
            self.remember();
        }
        Ok(())
    }

    fn int(&mut self, n: u64) -> Result<()> {
        let n = i64::try_from(n).map_err(|_| Error::malformed(format!("{n} is no size that torch takes")))?;
        let bytes = n.to_le_bytes();
        match n {
            0..=0xff => self.put(b'K', &bytes[..1]),               // BININT1
            0x100..=0xffff => self.put(b'M', &bytes[..2]),         // BININT2
            0x1_0000..=0x7fff_ffff => self.put(b'J', &bytes[..4]), // BININT
            _ => {
                // As many bytes as hold it and its sign.
                let len = 8 - (n.leading_zeros() as usize - 1) / 8;
                self.put(0x8a, &[len as u8]); // LONG1
                self.bytes.extend(&bytes[..len]);
            }
        }
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.put(b'X', &(text.len() as u32).to_le_bytes()); // BINUNICODE
        self.bytes.extend(text.as_bytes());
        self.remember();
    }

    fn known_text(&mut self, text: &'static str) {
        if !self.recall(text) {
            self.known.insert(text, self.memo);
            self.text(text);
        }
    }

    fn global(&mut self, module: &str, name: &'static str) {
        if !self.recall(name) {
            self.bytes.extend(format!("c{module}\n{name}\n").into_bytes()); // GLOBAL
            self.known.insert(name, self.memo);
            self.remember();
        }
    }

    fn recall(&mut self, what: &str) -> bool {
        let number = self.known.get(what).copied();
        number.inspect(|n| self.numbered(b'h', b'j', *n)).is_some() // BINGET, LONG_BINGET
    }

    fn remember(&mut self) {
        self.numbered(b'q', b'r', self.memo); // BINPUT, LONG_BINPUT
        self.memo += 1;
    }

    fn numbered(&mut self, short: u8, long: u8, n: u32) {
        match u8::try_from(n) {
            Ok(n) => self.put(short, &[n]),
            Err(_) => self.put(long, &n.to_le_bytes()),
        }
    }

    fn put(&mut self, opcode: u8, bytes: &[u8]) {
        self.bytes.push(opcode);
        self.bytes.extend(bytes);
    }
}
