//! One file: which layout it has, and where its storages lie.

use std::collections::HashMap;

use indexmap::IndexSet;
use serde_json::{Map, Value as Json};

use super::globals::shown;
use super::machine::{Fault, Pickle, Value};
use super::state_dict::{self, Place, bytes_of};
use super::zip::{Archive, LOCAL_HEADER};
use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::{StridedCopy, TensorInfo};

/// Longest pickle, in bytes; a tensor takes about two hundred.
const MAX_PICKLE: u64 = 32 << 20;
/// Longest of the members that hold a number or a word.
const MAX_WORD: u64 = 64;
/// What is read of an old file at first; most pickles end within it.
const FIRST_READ: u64 = 1 << 20;

/// First pickle of an old file: this number, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Second pickle of an old file.
const OLD_PROTOCOL: i64 = 1001;
/// `version` of a zip file: torch's reader takes 1 to 10.
const VERSIONS: std::ops::RangeInclusive<u64> = 1..=10;
/// Where and how a tar archive says that it is one.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// What a file holds.
pub struct Contents {
    pub tensors: Vec<TensorInfo>,
    /// Of tensors whose elements are not in order: how they lie, from the tensor's offset on.
    pub strided: HashMap<String, StridedCopy>,
    pub big_endian: bool,
    /// Numbers and words beside the tensors, by name, where each module has a dict of its own.
    pub values: Map<String, Json>,
}

enum Layout {
    Zip,
    /// Before torch 1.6.
    Old,
    /// Before torch 0.2.
    Tar,
    /// A pickle that torch did not write.
    Pickle,
}

impl Layout {
    fn of(file: &InputFile) -> Result<Option<Self>> {
        let mut head = [0; 512];
        let head = head.get_mut(..file.len().min(512) as usize).unwrap_or_default();
        file.read_at(0, head)?;
        let pickle = matches!(head, [0x80, 2..=5, ..]);
        Ok(if head.starts_with(&LOCAL_HEADER) {
            Some(Self::Zip)
        } else if pickle && head.windows(MAGIC.len()).take(32).any(|w| w == MAGIC) {
            Some(Self::Old)
        } else if head.get(TAR.0..).is_some_and(|h| h.starts_with(TAR.1)) {
            Some(Self::Tar)
        } else if pickle && head.get(4..8) != Some(&[0; 4]) {
            // With zeros it is the length of a safetensors header.
            Some(Self::Pickle)
        } else {
            None
        })
    }
}

/// Whether `file` begins as PyTorch's files do, those included that cannot be read.
///
/// # Errors
/// `Io`.
pub fn is_pytorch(file: &InputFile) -> Result<bool> {
    Ok(Layout::of(file)?.is_some())
}

/// Reads the pickle of `file`, whose number among the shards is `number`.
///
/// # Errors
/// As `formats/spec/pytorch.md` lists.
pub fn read(file: &InputFile, number: usize, limits: &Limits) -> Result<Contents> {
    let contents = match Layout::of(file)? {
        Some(Layout::Zip) => read_zip(file, number, limits),
        Some(Layout::Old) => read_old(file, number, limits),
        Some(Layout::Tar) => Err(Error::unsupported("is a tar archive, as torch wrote before 0.2")
            .hint("load it and save it again with a current torch")),
        Some(Layout::Pickle) => {
            // Run all the same: what it refers to is worth more than that it is none of ours.
            pickle_at(file, 0, &mut FIRST_READ.clone(), |_| Ok(()))
                .and_then(|((), _)| Err(Error::unsupported("is a pickle, but none that torch wrote")))
        }
        None => Err(Error::malformed("is no PyTorch file")
            .hint("it begins neither as a zip archive nor as an old torch file")),
    };
    contents.map_err(|e| e.at(file.path()))
}

fn read_zip(file: &InputFile, number: usize, limits: &Limits) -> Result<Contents> {
    let archive = Archive::read(file, limits)?;
    let mut folders = archive.names().filter_map(|n| n.strip_suffix("data.pkl"));
    let mut folders: Vec<&str> = folders.by_ref().filter(|f| f.is_empty() || f.ends_with('/')).collect();
    folders.sort_unstable();
    let folder = match folders.as_slice() {
        [folder] => *folder,
        [] => {
            return Err(Error::unsupported("is a zip archive without data.pkl")
                .hint("torch.save of 1.6 or newer writes one"));
        }
        [a, b, ..] => {
            return Err(Error::malformed(format!("holds {a}data.pkl and {b}data.pkl")));
        }
    };
    let word = |name: &str| -> Result<Option<String>> {
        let bytes = archive.bytes(file, &format!("{folder}{name}"), MAX_WORD)?;
        Ok(bytes.map(|b| String::from_utf8_lossy(&b).trim().to_owned()))
    };
    if archive.names().any(|n| n.strip_prefix(folder) == Some("constants.pkl")) {
        return Err(Error::unsupported("is a TorchScript program, not a state dict")
            .hint("load it, and save its state dict"));
    }
    if let Some(version) = word("version")?
        && !version.parse().is_ok_and(|v: u64| VERSIONS.contains(&v))
    {
        return Err(Error::unsupported(format!("has version {version:?}, 1 to 10 are known")));
    }
    let big_endian = match word("byteorder")?.as_deref() {
        None | Some("little") => false,
        Some("big") => true,
        Some(other) => return Err(Error::malformed(format!("has the byte order {other:?}"))),
    };
    let max = MAX_PICKLE.min(limits.header_bytes);
    let bytes = archive.bytes(file, &format!("{folder}data.pkl"), max)?.unwrap_or_default();
    let pickle = Pickle::read(&bytes).map_err(Fault::into_error)?;
    if pickle.len != bytes.len() {
        return Err(Error::malformed(format!("{} bytes follow its pickle", bytes.len() - pickle.len)));
    }
    let mut offsets = Vec::with_capacity(pickle.storages.len());
    for storage in &pickle.storages {
        let name = format!("{folder}data/{}", storage.key);
        let member = archive.stored(&name)?;
        let wanted = bytes_of(storage)?;
        // torch counts whole elements.
        if member.len < wanted || member.len - wanted >= storage.dtype.type_size() {
            return Err(Error::malformed(format!(
                "its member {name:?} has {} bytes, its pickle says {wanted}",
                member.len
            )));
        }
        offsets.push(member.offset);
    }
    contents(&pickle, &offsets, big_endian, number, limits)
}

/// Magic number, protocol, facts about the machine, the object, the list of storage keys; then each
/// storage as the number of its elements (64 bits) and its data. Data are little-endian whatever
/// the machine was.
fn read_old(file: &InputFile, number: usize, limits: &Limits) -> Result<Contents> {
    let mut window = FIRST_READ;
    let mut at = 0;
    let mut small = |pick: &dyn Fn(&Pickle) -> bool, what: &str| -> Result<()> {
        let (right, end) = pickle_at(file, at, &mut window, |p| Ok(pick(p)))?;
        at = end;
        if right { Ok(()) } else { Err(Error::unsupported(format!("its {what} is not known"))) }
    };
    small(&|p| matches!(p.root, Value::Long(n) if n == MAGIC), "magic number")?;
    small(&|p| matches!(p.root, Value::Int(OLD_PROTOCOL)), "protocol")?;
    small(&|p| matches!(p.root, Value::Object(_)), "description of the machine")?;
    let object_at = at;
    let ((), keys_at) = pickle_at(file, object_at, &mut window, |_| Ok(()))?;
    let (keys, mut at) = pickle_at(file, keys_at, &mut window, |p| {
        let items = p.items(p.root).ok_or_else(|| Error::malformed("its list of storages is missing"))?;
        let mut keys = IndexSet::new();
        for item in items {
            let Value::Text(key) = item else {
                return Err(Error::malformed("its list of storages has a key that is no text"));
            };
            // Before they are copied: one long key can be named many times by few bytes.
            if !keys.insert(*key) {
                return Err(Error::malformed(format!("its storage {:?} comes twice", shown(key))));
            }
        }
        Ok(keys.into_iter().map(str::to_owned).collect::<Vec<_>>())
    })?;
    let (contents, _) = pickle_at(file, object_at, &mut window, |pickle| {
        let ids: HashMap<&str, usize> = pickle.storages.iter().enumerate().map(|(i, s)| (s.key, i)).collect();
        let mut offsets = vec![None; pickle.storages.len()];
        for key in &keys {
            let name = shown(key);
            let (id, storage) = ids
                .get(key.as_str())
                .and_then(|&id| Some((id, pickle.storages.get(id)?)))
                .ok_or_else(|| Error::malformed(format!("its storage {name:?} belongs to nothing")))?;
            let mut count = [0; 8];
            file.read_at(at, &mut count)?;
            if u64::from_le_bytes(count) != storage.numel {
                return Err(Error::malformed(format!(
                    "its storage {name:?} has {} elements, its pickle says {}",
                    u64::from_le_bytes(count),
                    storage.numel
                )));
            }
            let data = at + 8; // within the file, as has been read so far
            let end = data.checked_add(bytes_of(storage)?).filter(|end| *end <= file.len());
            at = end.ok_or_else(|| {
                Error::malformed(format!("its storage {name:?} ends beyond the file"))
                    .hint("the file is cut short: fetch it again")
            })?;
            if let Some(slot) = offsets.get_mut(id) {
                *slot = Some(data);
            }
        }
        if at != file.len() {
            return Err(Error::malformed(format!("{} bytes follow its last storage", file.len() - at)));
        }
        let offsets: Option<Vec<u64>> = offsets.into_iter().collect();
        let offsets = offsets.ok_or_else(|| Error::malformed("a storage of its pickle is missing"))?;
        contents(pickle, &offsets, false, number, limits)
    })?;
    Ok(contents)
}

/// Runs the pickle at `at`, and gives what `take` makes of it, and where it ends. How long it is
/// shows only at its end, so `window` bytes are read, and twice as many where they do not suffice.
fn pickle_at<T>(
    file: &InputFile,
    at: u64,
    window: &mut u64,
    take: impl FnOnce(&Pickle) -> Result<T>,
) -> Result<(T, u64)> {
    let rest = file.len().saturating_sub(at);
    loop {
        let mut bytes = vec![0; (*window).min(rest) as usize];
        file.read_at(at, &mut bytes)?;
        match Pickle::read(&bytes) {
            Ok(pickle) => return Ok((take(&pickle)?, at + pickle.len as u64)),
            Err(Fault::End) if *window < rest && *window < MAX_PICKLE => *window *= 2,
            Err(Fault::End) if *window < rest => {
                return Err(Error::limit(format!("its pickle has more than {MAX_PICKLE} bytes")));
            }
            Err(fault) => return Err(fault.into_error()),
        }
    }
}

/// The tensors of `pickle`, whose storages begin at these bytes of the file.
fn contents(
    pickle: &Pickle,
    offsets: &[u64],
    big_endian: bool,
    file: usize,
    limits: &Limits,
) -> Result<Contents> {
    let mut tensors = Vec::new();
    let mut strided = HashMap::new();
    let (entries, values) = state_dict::read(pickle, limits)?;
    for entry in entries {
        let base = offsets.get(entry.storage).copied().unwrap_or(u64::MAX);
        let name = entry.name.into_owned();
        let within = match entry.place {
            Place::From(byte) => byte,
            Place::Strided(copy) => {
                strided.insert(name.clone(), copy);
                0
            }
        };
        let offset = base
            .checked_add(within)
            .ok_or_else(|| Error::malformed(format!("tensor {name:?}: its offset overflows")))?;
        tensors.push(TensorInfo {
            name,
            dtype: entry.dtype,
            shape: entry.shape,
            file,
            offset,
            nbytes: entry.nbytes,
        });
    }
    Ok(Contents { tensors, strided, big_endian, values })
}
