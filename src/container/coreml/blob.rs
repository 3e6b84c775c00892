//! Weight files: MIL's blob storage, version 2 (coremltools, `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`).
//!
//! A header of 64 bytes, then blobs: each a record of 64 bytes that begins at a multiple of 64, and its data behind
//! it. All is little-endian; gaps are zeros. A program names a blob by the place of its record.
//!
//! [`layout`] places blobs of known sizes before there are data; [`BlobFile`] reads.

use std::collections::{BTreeMap, HashMap};

use super::dtype::DataType;
use super::mil::TensorType;
use crate::container::InputFile;
use crate::container::shards::{Ending, FileLayout};
use crate::error::{Error, Result};
use crate::limits::{Bound, Limits};

/// Records and data begin at multiples of it. It is the length of the header and of a record, too.
pub const ALIGNMENT: u64 = 64;
const VERSION: u32 = 2;
const SENTINEL: u32 = 0xDEAD_BEEF;

/// A blob to be written.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Type of its elements.
    pub data_type: DataType,
    /// How many there are.
    pub elements: u64,
    /// SHA-256 of its data, where that is known: blobs of one type, size and sum are written once.
    pub sum: Option<[u8; 32]>,
}

/// Where a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Type of its elements.
    pub data_type: DataType,
    /// First byte of its record: what a program names it by.
    pub record: u64,
    /// Bytes of its data.
    pub bytes: u64,
    /// Bits of the last byte that are not used.
    padding_bits: u64,
}

impl Blob {
    /// First byte of its data.
    pub fn data(&self) -> u64 {
        self.record + ALIGNMENT // within the file, as reader and layout see to
    }

    /// Bits of the last byte that are not used, the highest.
    pub fn padding_bits(&self) -> u64 {
        self.padding_bits
    }

    fn end(&self) -> Option<u64> {
        self.record.checked_add(ALIGNMENT)?.checked_add(self.bytes)
    }

    fn record_bytes(&self, number: u32) -> [u8; ALIGNMENT as usize] {
        let mut out = [0; ALIGNMENT as usize];
        out[..4].copy_from_slice(&SENTINEL.to_le_bytes());
        out[4..8].copy_from_slice(&number.to_le_bytes());
        out[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        out[16..24].copy_from_slice(&self.data().to_le_bytes());
        out[24..32].copy_from_slice(&self.padding_bits.to_le_bytes());
        out
    }
}

/// The records of a file, which lie between the data.
#[derive(Debug)]
pub struct Records(Vec<(u64, [u8; ALIGNMENT as usize])>);

impl Records {
    /// Writes them; `write` is given offsets in the file.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn write(&self, write: impl Fn(u64, &[u8]) -> Result<()>) -> Result<()> {
        self.0.iter().try_for_each(|(at, bytes)| write(*at, bytes))
    }
}

/// Lays out a file of these blobs in this order, and says where each is; those that are the same share a place.
///
/// # Errors
/// `Unsupported` for types that weight files lack; `Malformed` for sizes beyond what a file can have.
pub fn layout(name: impl Into<String>, wanted: &[Wanted]) -> Result<(FileLayout, Vec<Blob>)> {
    let too_large = || Error::malformed("the weights would exceed 2^64 bytes");
    let (mut end, mut blobs, mut records) = (ALIGNMENT, Vec::with_capacity(wanted.len()), Vec::new());
    let mut placed = HashMap::new();
    for Wanted { data_type, elements, sum } in wanted {
        let number = data_type
            .blob_number()
            .ok_or_else(|| Error::unsupported(format!("weight files have no type {data_type}")))?;
        if let Some(blob) = sum.and_then(|sum| placed.get(&(*data_type, *elements, sum))) {
            blobs.push(*blob);
            continue;
        }
        let record = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
        let bytes = data_type.bytes(*elements).ok_or_else(too_large)?;
        let padding_bits = data_type.padding_bits(*elements);
        let blob = Blob { data_type: *data_type, record, bytes, padding_bits };
        end = blob.end().ok_or_else(too_large)?;
        records.push((record, blob.record_bytes(number)));
        if let Some(sum) = sum {
            placed.insert((*data_type, *elements, *sum), blob);
        }
        blobs.push(blob);
    }
    let count = u32::try_from(records.len()).map_err(|_| Error::malformed("more than 2^32 blobs"))?;
    let mut header = vec![0; ALIGNMENT as usize];
    header[..4].copy_from_slice(&count.to_le_bytes());
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    let ending = Some(Ending::Blobs(Records(records)));
    Ok((FileLayout { name: name.into(), header, len: end, ending }, blobs))
}

/// An opened weight file.
#[derive(Debug)]
pub struct BlobFile {
    file: InputFile,
    /// By the places of their records.
    blobs: BTreeMap<u64, Blob>,
}

impl BlobFile {
    /// Reads all records.
    ///
    /// # Errors
    /// `Io`; `Malformed` as `formats/spec/coreml.md` lists; `Unsupported` for other versions and types; `Limit`.
    pub fn open(file: InputFile, limits: &Limits) -> Result<Self> {
        let blobs = records(&file, limits).map_err(|e| e.at(file.path()))?;
        Ok(Self { file, blobs })
    }

    /// The file.
    pub fn file(&self) -> &InputFile {
        &self.file
    }

    /// All blobs, in the order of the file.
    pub fn blobs(&self) -> impl ExactSizeIterator<Item = &Blob> {
        self.blobs.values()
    }

    /// The blob whose record is at byte `offset`, which has to hold a tensor of this type.
    ///
    /// # Errors
    /// `Malformed` where there is none, or it has another type or size.
    pub fn get(&self, offset: u64, tensor: &TensorType) -> Result<&Blob> {
        let elements = tensor.elements()?;
        let wanted = tensor.data_type;
        self.find(offset, wanted, elements).map_err(|e| e.at(self.file.path()))
    }

    fn find(&self, offset: u64, wanted: DataType, elements: u64) -> Result<&Blob> {
        let Some(blob) = self.blobs.get(&offset) else {
            let error = Error::malformed(format!("no blob's record begins at byte {offset}"));
            let is_data = offset.checked_sub(ALIGNMENT).is_some_and(|at| self.blobs.contains_key(&at));
            return Err(match is_data {
                true => error.hint("the data of one do: a program has to name the record, 64 bytes before"),
                false => error,
            });
        };
        if blob.data_type != wanted {
            return Err(Error::malformed(format!(
                "the blob at byte {offset} has elements of type {}, {wanted} were expected",
                blob.data_type
            )));
        }
        let (bytes, padding) = (wanted.bytes(elements), wanted.padding_bits(elements));
        if bytes != Some(blob.bytes) || padding != blob.padding_bits {
            return Err(Error::malformed(format!(
                "the blob at byte {offset} has {} bytes, the last {} bits of them not used: not {elements} elements \
                 of {wanted}",
                blob.bytes, blob.padding_bits
            )));
        }
        Ok(blob)
    }

    /// Fills `buf` from byte `at` of a blob's data.
    ///
    /// # Errors
    /// `Malformed` when the range leaves the blob; `Io`.
    pub fn read(&self, blob: &Blob, at: u64, buf: &mut [u8]) -> Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > blob.bytes) {
            return Err(Error::malformed(format!(
                "{} bytes at {at} lie beyond the blob of {} bytes at byte {}",
                buf.len(),
                blob.bytes,
                blob.record
            ))
            .at(self.file.path()));
        }
        self.file.read_at(blob.data() + at, buf)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]); // constants within a record
    out
}

/// The records, one behind the other.
fn records(file: &InputFile, limits: &Limits) -> Result<BTreeMap<u64, Blob>> {
    if file.len() < ALIGNMENT {
        let found = file.len();
        return Err(Error::malformed(format!("is no weight file: it has {found} bytes, 64 are its header")));
    }
    let mut header = [0; ALIGNMENT as usize];
    file.read_at(0, &mut header)?;
    let (count, version) = (u32::from_le_bytes(field(&header, 0)), u32::from_le_bytes(field(&header, 4)));
    if version != VERSION {
        return Err(Error::unsupported(format!("is of version {version} of weight files, not {VERSION}")));
    }
    zeros(&header[8..], 8)?;
    if u64::from(count) > limits.tensors {
        return Err(Bound::Tensors.reached(format!("{count} blobs, at most {} are allowed", limits.tensors)));
    }
    let (mut blobs, mut end) = (BTreeMap::new(), ALIGNMENT);
    for n in 0..count {
        let blob = record(file, end).map_err(|e| e.context(format_args!("blob {n} of {count}")))?;
        // Within the file, as was checked.
        end = blob.data() + blob.bytes;
        blobs.insert(blob.record, blob);
    }
    gap(file, end, file.len())?;
    Ok(blobs)
}

/// The blob behind the one that ends at `end`.
fn record(file: &InputFile, end: u64) -> Result<Blob> {
    let cut = |at: u64| {
        Error::malformed(format!("its record at byte {at} lies beyond the file's {} bytes", file.len()))
            .hint("the file is cut short: fetch it again")
    };
    let at = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(|| cut(end))?;
    let data = at.checked_add(ALIGNMENT).filter(|data| *data <= file.len()).ok_or_else(|| cut(at))?;
    gap(file, end, at)?;
    let mut bytes = [0; ALIGNMENT as usize];
    file.read_at(at, &mut bytes)?;
    let sentinel = u32::from_le_bytes(field(&bytes, 0));
    if sentinel != SENTINEL {
        return Err(Error::malformed(format!(
            "its record at byte {at} begins with {sentinel:#x}, not {SENTINEL:#x}"
        )));
    }
    let number = u32::from_le_bytes(field(&bytes, 4));
    let data_type = DataType::of_blob_number(number)
        .ok_or_else(|| Error::unsupported(format!("its type {number} at byte {at} is not known")))?;
    let [len, place, padding_bits] = [8, 16, 24].map(|i| u64::from_le_bytes(field(&bytes, i)));
    if place != data {
        return Err(Error::malformed(format!(
            "its record at byte {at} puts its data at byte {place}, not behind it"
        )));
    }
    if data.checked_add(len).is_none_or(|end| end > file.len()) {
        return Err(Error::malformed(format!(
            "its {len} bytes at byte {data} lie beyond the file's {} bytes",
            file.len()
        ))
        .hint("the file is cut short: fetch it again"));
    }
    let most = if data_type.bits() < 8 && len > 0 { 7 } else { 0 };
    if padding_bits > most {
        return Err(Error::malformed(format!(
            "its record at byte {at} leaves {padding_bits} bits of {data_type} unused, at most {most} can be"
        )));
    }
    zeros(&bytes[32..], at + 32)?;
    Ok(Blob { data_type, record: at, bytes: len, padding_bits })
}

/// That nothing hides between blobs, or behind the last.
fn gap(file: &InputFile, start: u64, end: u64) -> Result<()> {
    let mut bytes = [0; ALIGNMENT as usize];
    let len = end.saturating_sub(start);
    if len >= ALIGNMENT {
        return Err(Error::malformed(format!("{len} bytes at byte {start} belong to no blob")));
    }
    let bytes = &mut bytes[..len as usize];
    file.read_at(start, bytes)?;
    zeros(bytes, start)
}

fn zeros(bytes: &[u8], at: u64) -> Result<()> {
    match bytes.iter().all(|b| *b == 0) {
        true => Ok(()),
        false => Err(Error::malformed(format!(
            "the {} bytes at byte {at} are of no use, and not zeros",
            bytes.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;
    use std::cell::RefCell;

    fn wanted(data_type: DataType, elements: u64) -> Wanted {
        Wanted { data_type, elements, sum: None }
    }

    /// A file with these blobs, whose data are the byte `0xA0 + n`.
    fn file(wanted: &[Wanted]) -> (Vec<u8>, Vec<Blob>) {
        let (layout, blobs) = layout("weight.bin", wanted).unwrap();
        let out = RefCell::new(vec![0; layout.len as usize]);
        let write = |at: u64, bytes: &[u8]| {
            out.borrow_mut()[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        write(0, &layout.header).unwrap();
        for (n, blob) in blobs.iter().enumerate() {
            write(blob.data(), &vec![0xA0 + n as u8; blob.bytes as usize]).unwrap();
        }
        let Some(Ending::Blobs(records)) = &layout.ending else { panic!("no records") };
        records.write(write).unwrap();
        (out.into_inner(), blobs)
    }

    fn open(bytes: &[u8]) -> Result<BlobFile> {
        BlobFile::open(InputFile::of_bytes("weight.bin", bytes.to_vec()), &Limits::default())
    }

    /// The two blobs of the specification.
    #[test]
    fn known_bytes() {
        let (bytes, blobs) = file(&[wanted(DataType::UInt2, 256), wanted(DataType::Int4, 192)]);
        assert_eq!(bytes[..8], [2, 0, 0, 0, 2, 0, 0, 0]);
        let first =
            [0xef, 0xbe, 0xad, 0xde, 10, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes[0x40..0x58], first);
        let second = [0xef, 0xbe, 0xad, 0xde, 8, 0, 0, 0, 0x60, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes[0xc0..0xd8], second);
        assert_eq!((blobs[1].record, blobs[1].data(), bytes.len()), (0xc0, 0x100, 0x160));
    }

    #[test]
    fn the_same_data_are_written_once() {
        let of = |data_type, elements, sum| Wanted { data_type, elements, sum: Some([sum; 32]) };
        let all = [
            of(DataType::UInt8, 3, 1),
            wanted(DataType::UInt8, 3),
            of(DataType::UInt8, 3, 1),
            of(DataType::Int8, 3, 1),
            of(DataType::UInt8, 3, 2),
        ];
        let (layout, blobs) = layout("weight.bin", &all).unwrap();
        assert_eq!(blobs.iter().map(|b| b.record / 64).collect::<Vec<_>>(), [1, 3, 1, 5, 7]);
        assert_eq!((layout.header[0], layout.len), (4, 64 * 8 + 3));
        let e = super::layout("weight.bin", &[wanted(DataType::Int64, 1)]).unwrap_err();
        assert_eq!(e.to_string(), "weight files have no type int64");
        assert!(super::layout("weight.bin", &[wanted(DataType::UInt8, u64::MAX)]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_laid_out_is_read(list in prop::collection::vec((0..DataType::ALL.len(), 0u64..300), 0..12)) {
            let list: Vec<Wanted> = list
                .into_iter()
                .map(|(t, elements)| wanted(DataType::ALL[t], elements))
                .filter(|w| w.data_type.blob_number().is_some())
                .collect();
            let (bytes, blobs) = file(&list);
            let opened = open(&bytes).unwrap();
            prop_assert_eq!(opened.blobs().copied().collect::<Vec<_>>(), &blobs[..]);
            for (n, (w, blob)) in list.iter().zip(&blobs).enumerate() {
                let found = opened.get(blob.record, &TensorType::new(w.data_type, &[Some(w.elements)])).unwrap();
                let mut data = vec![0; found.bytes as usize];
                opened.read(found, 0, &mut data).unwrap();
                prop_assert!(data.iter().all(|b| *b == 0xA0 + n as u8));
                prop_assert!(opened.read(found, 1, &mut data).is_err());
            }
        }
    }

    #[test]
    fn what_a_program_names_has_to_be_there() {
        let (bytes, blobs) = file(&[wanted(DataType::UInt3, 9), wanted(DataType::Float16, 4)]);
        let opened = open(&bytes).unwrap();
        let refused = |offset: u64, t: DataType, shape: &[Option<u64>], words: &str| {
            let e = opened.get(offset, &TensorType::new(t, shape)).unwrap_err();
            assert!(e.kind() == ErrorKind::Malformed && e.to_string().contains(words), "{words:?}: {e}");
            assert!(e.path().is_some() || words.contains("fixed"));
            e
        };
        refused(64, DataType::UInt2, &[Some(9)], "elements of type uint3, uint2 were expected");
        refused(
            64,
            DataType::UInt3,
            &[Some(10)],
            "has 4 bytes, the last 5 bits of them not used: not 10 elements",
        );
        refused(64, DataType::UInt3, &[Some(3), Some(5)], "not 15 elements of uint3");
        refused(64, DataType::UInt3, &[None], "is not fixed");
        let e =
            refused(blobs[1].data(), DataType::Float16, &[Some(4)], "no blob's record begins at byte 256");
        assert!(e.hint_text().unwrap().contains("the record, 64 bytes before"));
        assert!(refused(65, DataType::Float16, &[Some(4)], "at byte 65").hint_text().is_none());
        assert!(opened.get(64, &TensorType::new(DataType::UInt3, &[Some(3), Some(3)])).is_ok());
        assert!(opened.read(&blobs[1], u64::MAX, &mut [0; 8]).is_err());
    }

    #[test]
    fn damage_is_named() {
        let whole = file(&[wanted(DataType::UInt3, 9), wanted(DataType::Float16, 4)]).0;
        assert_eq!(whole.len(), 264);
        let put = |at: usize, with: &[u8]| {
            let mut bytes = whole.clone();
            bytes[at..at + with.len()].copy_from_slice(with);
            bytes
        };
        let refused = |bytes: &[u8], kind: ErrorKind, words: &str| {
            let e = open(bytes).unwrap_err();
            assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
            assert!(e.path().is_some());
        };
        let malformed = |bytes: &[u8], words: &str| refused(bytes, ErrorKind::Malformed, words);
        refused(&put(4, &[1]), ErrorKind::Unsupported, "version 1 of weight files");
        refused(&put(68, &[18]), ErrorKind::Unsupported, "blob 0 of 2: its type 18 at byte 64");
        refused(&put(0, &[255; 4]), ErrorKind::Limit, "4294967295 blobs");
        malformed(&put(0, &[3]), "blob 2 of 3: its record at byte 320 lies beyond");
        malformed(&put(0, &[1]), "132 bytes at byte 132 belong to no blob");
        malformed(&put(9, &[1]), "the 56 bytes at byte 8");
        malformed(&put(64, &[0]), "begins with 0xdeadbe00");
        malformed(&put(72, &[255; 8]), "its 18446744073709551615 bytes at byte 128 lie beyond");
        malformed(&put(80, &[0xC0]), "puts its data at byte 192");
        malformed(&put(88, &[8]), "leaves 8 bits of uint3 unused");
        malformed(&put(216, &[1]), "leaves 1 bits of fp16 unused");
        malformed(&put(100, &[1]), "the 32 bytes at byte 96");
        malformed(&put(140, &[1]), "at byte 132 are of no use");
        malformed(&[&whole[..], &[0; 64]].concat(), "belong to no blob");
        malformed(&[], "is no weight file");
        assert!(open(&[&whole[..], &[0; 56]].concat()).is_ok(), "padding to a multiple of 64 hides nothing");
        for len in 0..whole.len() {
            assert!(open(&whole[..len]).is_err(), "{len} bytes");
        }
    }
}
