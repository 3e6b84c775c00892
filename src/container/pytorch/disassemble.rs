//! Which functions and classes the pickles of a file name, without running them: what a scanner says of files that are
//! not read. Opcodes and the forms of their arguments are those of Python's `pickletools`.

use std::collections::{BTreeMap, HashMap};

use super::globals::{Global, shown};
use super::zip::{Archive, LOCAL_HEADER};
use crate::container::InputFile;
use crate::error::Result;
use crate::limits::Limits;

/// Longest pickle that is looked at, in bytes.
const MAX_PICKLE: u64 = 64 << 20;
/// The number that old torch files begin with, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Pickles of an old torch file.
const OLD_PICKLES: usize = 5;
/// Most names and instructions that are told of, of one file.
const MAX_MENTIONS: usize = 1000;

/// What a pickle does that may be of interest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instruction {
    /// Names something: module and name.
    Global(String, String),
    /// Takes a name from where it cannot be seen, or from a registry outside the file.
    Hidden(&'static str),
    /// Is none, or is cut short.
    Broken(&'static str),
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Mention {
    /// What.
    pub instruction: Instruction,
    /// Whether it is one that tensors need.
    pub known: bool,
    /// The member of the archive, where the file is one.
    pub member: Option<String>,
    /// Its first byte in the file, where the pickle is not compressed.
    pub offset: Option<u64>,
}

/// What the pickles of `file` name: all members of an archive that end in `.pkl`, or the pickles that the file begins
/// with. Each name once, where it comes first.
///
/// # Errors
/// `Malformed` and `Limit` for archives that cannot be read; `Io`.
pub fn mentions(file: &InputFile, limits: &Limits) -> Result<Vec<Mention>> {
    let mut head = [0; 4];
    let n = file.len().min(4) as usize;
    file.read_at(0, head.get_mut(..n).unwrap_or_default())?;
    let max = MAX_PICKLE.min(limits.header_bytes);
    let mut found = Found::default();
    if head == LOCAL_HEADER {
        let archive = Archive::read(file, limits)?;
        let mut names: Vec<String> =
            archive.names().filter(|n| n.ends_with(".pkl")).map(str::to_owned).collect();
        names.sort_unstable();
        for name in names {
            let bytes = archive.bytes(file, &name, max)?.unwrap_or_default();
            let base = archive.stored(&name).ok().map(|m| m.offset);
            found.pickle(&bytes, base, Some(&name));
        }
    } else {
        let mut bytes = vec![0; file.len().min(max) as usize];
        file.read_at(0, &mut bytes)?;
        let (mut at, mut number, mut is_old) = (0, 0, false);
        while let Some(rest) = bytes.get(at..).filter(|rest| at == 0 || !rest.is_empty()) {
            // Behind the last pickle of an old torch file its storages lie. Its pickles begin with any byte.
            let goes_on = if is_old { number < OLD_PICKLES } else { matches!(rest, [0x80, 2..=5, ..]) };
            if number > 0 && !goes_on {
                break;
            }
            let Some(len) = found.pickle(rest, Some(at as u64), None) else { break };
            if number == 0 {
                is_old = rest.get(..len).is_some_and(is_magic);
            }
            at += len;
            number += 1;
        }
    }
    Ok(found.0.into_values().collect())
}

/// Whether a pickle is the number that old torch files begin with, in any form that Python reads it in.
fn is_magic(pickle: &[u8]) -> bool {
    let mut walk = Walk { bytes: pickle, at: 0 };
    let mut start = 0;
    while let Some(step) = walk.next() {
        let own = pickle.get(start..walk.at).unwrap_or_default();
        let number = match own {
            [b'I' | b'L', ..] => true, // as text, which has many forms
            [0x8a | 0x8b, ..] => own.windows(MAGIC.len()).any(|w| w == MAGIC),
            _ => false,
        };
        if number || matches!(step, Step::Stop) {
            return number;
        }
        start = walk.at;
    }
    false
}

#[derive(Default)]
struct Found(BTreeMap<(Instruction, Option<String>), Mention>);

impl Found {
    fn add(&mut self, instruction: Instruction, at: Option<u64>, member: Option<&str>) {
        if self.0.len() >= MAX_MENTIONS {
            return;
        }
        let known = match &instruction {
            Instruction::Global(module, name) => Global::find(module, name).is_ok(),
            _ => false,
        };
        let member = member.map(shown);
        let key = (instruction.clone(), member.clone());
        self.0.entry(key).or_insert(Mention { instruction, known, member, offset: at });
    }

    /// Goes through the pickle that `bytes` begin with, which lie at `base`. Returns its length; `None` where it does
    /// not end.
    fn pickle(&mut self, bytes: &[u8], base: Option<u64>, member: Option<&str>) -> Option<usize> {
        let mut walk = Walk { bytes, at: 0 };
        // Texts that were pushed one after the other and lie on top of the stack; nothing else came in between.
        let mut texts: Vec<&[u8]> = Vec::new();
        // What is no text takes its number all the same: MEMOIZE counts the numbers that are taken.
        let mut memo: HashMap<u64, Option<&[u8]>> = HashMap::new();
        loop {
            let start = walk.at;
            let place = base.and_then(|b| b.checked_add(start as u64));
            let Some(step) = walk.next() else {
                let why = if start == bytes.len() {
                    "it ends without STOP"
                } else {
                    "an instruction is unknown or cut"
                };
                self.add(Instruction::Broken(why), place, member);
                return None;
            };
            let name = |text: &[u8]| shown(&String::from_utf8_lossy(text));
            match step {
                Step::Stop => return Some(walk.at),
                Step::Text(text) => texts.push(text),
                Step::Get(n) => match memo.get(&n).copied().flatten() {
                    Some(text) => texts.push(text),
                    None => texts.clear(),
                },
                Step::Put(n) => {
                    memo.insert(n, texts.last().copied());
                }
                Step::Memoize => {
                    memo.insert(memo.len() as u64, texts.last().copied());
                }
                Step::Global(module, own) => {
                    self.add(Instruction::Global(name(module), name(own)), place, member);
                    texts.clear();
                }
                Step::StackGlobal => {
                    let instruction = match texts.as_slice() {
                        [.., module, own] => Instruction::Global(name(module), name(own)),
                        _ => Instruction::Hidden("STACK_GLOBAL takes a name that was computed"),
                    };
                    self.add(instruction, place, member);
                    texts.clear();
                }
                Step::Extension => {
                    self.add(Instruction::Hidden("EXT takes a name from a registry"), place, member);
                    texts.clear();
                }
                Step::Frame => {}
                Step::Other => texts.clear(),
            }
        }
    }
}

/// What an instruction means here.
enum Step<'a> {
    Text(&'a [u8]),
    Get(u64),
    Put(u64),
    Memoize,
    Global(&'a [u8], &'a [u8]),
    StackGlobal,
    Extension,
    Frame,
    Stop,
    Other,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(n)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn number(&mut self, n: usize) -> Option<u64> {
        Some(self.take(n)?.iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b)))
    }

    /// Bytes behind a length of `n` bytes.
    fn counted(&mut self, n: usize) -> Option<&'a [u8]> {
        let len = self.number(n)?;
        self.take(usize::try_from(len).ok()?)
    }

    fn line(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let end = rest.iter().position(|b| *b == b'\n')?;
        self.at += end + 1;
        rest.get(..end)
    }

    fn decimal(&mut self) -> Option<u64> {
        std::str::from_utf8(self.line()?).ok()?.trim().parse().ok()
    }

    /// `None` where there is no instruction, or not the whole of one.
    fn next(&mut self) -> Option<Step<'a>> {
        let opcode = self.number(1)?;
        Some(match opcode as u8 {
            b'.' => Step::Stop,
            b'('
            | b'0'
            | b'1'
            | b'2'
            | b'N'
            | b'Q'
            | b'R'
            | b'a'
            | b'b'
            | b'd'
            | b'}'
            | b'e'
            | b'l'
            | b']'
            | b'o'
            | b's'
            | b't'
            | b')'
            | b'u'
            | 0x81
            | 0x85..=0x89
            | 0x8f..=0x92
            | 0x97
            | 0x98 => Step::Other,
            b'K' => self.skip(1)?,
            b'M' => self.skip(2)?,
            b'J' => self.skip(4)?,
            b'G' => self.skip(8)?,
            0x80 => {
                self.take(1)?;
                Step::Frame
            }
            0x95 => {
                self.take(8)?;
                Step::Frame
            }
            b'F' | b'I' | b'L' | b'P' => {
                self.line()?;
                Step::Other
            }
            b'S' => {
                let quoted = self.line()?;
                Step::Text(quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default())
            }
            b'V' => Step::Text(self.line()?),
            b'X' | b'T' => Step::Text(self.counted(4)?),
            b'U' | 0x8c => Step::Text(self.counted(1)?),
            0x8d => Step::Text(self.counted(8)?),
            b'B' | 0x8b => {
                self.counted(4)?;
                Step::Other
            }
            b'C' | 0x8a => {
                self.counted(1)?;
                Step::Other
            }
            0x8e | 0x96 => {
                self.counted(8)?;
                Step::Other
            }
            b'c' | b'i' => {
                let module = self.line()?;
                Step::Global(module, self.line()?)
            }
            0x93 => Step::StackGlobal,
            0x82 => {
                self.take(1)?;
                Step::Extension
            }
            0x83 => {
                self.take(2)?;
                Step::Extension
            }
            0x84 => {
                self.take(4)?;
                Step::Extension
            }
            b'g' => Step::Get(self.decimal()?),
            b'h' => Step::Get(self.number(1)?),
            b'j' => Step::Get(self.number(4)?),
            b'p' => Step::Put(self.decimal()?),
            b'q' => Step::Put(self.number(1)?),
            b'r' => Step::Put(self.number(4)?),
            0x94 => Step::Memoize,
            _ => return None,
        })
    }

    fn skip(&mut self, n: usize) -> Option<Step<'a>> {
        self.take(n).map(|_| Step::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pickle: &[u8]) -> Vec<String> {
        let file = InputFile::of_bytes("x", pickle.to_vec());
        let of = |m: Mention| match m.instruction {
            Instruction::Global(module, name) => format!("{module}.{name} {}", m.known),
            Instruction::Hidden(what) | Instruction::Broken(what) => what.to_string(),
        };
        mentions(&file, &Limits::default()).unwrap().into_iter().map(of).collect()
    }

    #[test]
    fn names_are_found() {
        assert_eq!(names(b"cos\nsystem\n(S'id'\ntR."), ["os.system false"]);
        assert_eq!(names(b"\x80\x02ccollections\nOrderedDict\nq\x00)R."), ["collections.OrderedDict true"]);
        assert_eq!(names(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93."), ["posix.system false"]);
        // By way of the memo, and with something else on top.
        assert_eq!(names(b"\x80\x04\x8c\x02os\x940\x8c\x06system\x94h\x00h\x01\x93."), ["os.system false"]);
        // MEMOIZE writes to the number of entries, not behind the highest.
        let over = b"\x80\x04\x8c\x05torchq\x01q\x01\x8c\x05posix\x94\x8c\x06deviceq\x02\x8c\x06system\x94h\x01h\x02\x93.";
        assert_eq!(names(over), ["posix.system false"]);
        let hidden = b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93.";
        assert_eq!(names(hidden), ["STACK_GLOBAL takes a name that was computed"]);
        assert_eq!(names(b"\x80\x02\x82\x01."), ["EXT takes a name from a registry"]);
        assert_eq!(names(b"\x80\x02\xff."), ["an instruction is unknown or cut"]);
        assert_eq!(names(b"\x80\x02}"), ["it ends without STOP"]);
        assert_eq!(names(b"\x80\x02}.\x80\x02cos\nsystem\n."), ["os.system false"]);
        // Of an old torch file all five, and nothing of its storages.
        let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
        for first in [&magic[..], b"L119547037146038801333356L\n.", b"I0x1950a86a20f9469cfc6c\n."] {
            let old = [first, b"I1001\n.}.cos\nsystem\n.].\x80\x02\0\0"].concat();
            assert_eq!(names(&old), ["os.system false"]);
        }
    }
}
