//! Segments in fewer bytes. A segment is divided into chunks, a chunk into planes (the first bytes of all elements,
//! then the second ones, and so on), and each plane is stored as it is, as one byte, or by the frequencies of its
//! bytes (`rans`): the exponents of BF16 take less than 3 bits, signs and mantissas stay 8.
//!
//! Chunks are read by themselves, so that rows need not wait for the whole.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use super::manifest::Compression;
use super::rans::{self, Coded};
use crate::container::InputFile;
use crate::error::{Error, Result};

/// What a manifest calls it.
pub const KIND: &str = "planes";
/// Bytes of a chunk: from `2^16` to `2^24`, and what is written.
const MIN_CHUNK: u64 = 1 << 16;
const MAX_CHUNK: u64 = 1 << 24;
/// See [`Planes::of`].
pub const CHUNK: u64 = 1 << 20;

/// Bytes that one byte may stand for: memory is to be proportional to files.
const MOST_TIMES: u64 = 1024;

/// How a plane is stored, in the upper two bits of its entry; below are its bytes in the file.
const COPIED: u32 = 0;
const CONSTANT: u32 = 1;
const CODED: u32 = 2;
const LENGTH_BITS: u32 = 30;

/// The way a segment is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// Bytes of an element: 1 to 8.
    pub planes: usize,
    /// Bytes of a chunk without compression.
    pub chunk: u64,
}

impl Planes {
    /// For elements of so many bytes.
    pub fn of(size: u64) -> Self {
        Self { planes: size.clamp(1, 8) as usize, chunk: CHUNK }
    }

    /// Of a manifest; `None` where it is of another kind.
    ///
    /// # Errors
    /// `Malformed` for numbers that it cannot have.
    pub fn parse(compression: &Compression) -> Result<Option<Self>> {
        if compression.kind != KIND {
            return Ok(None);
        }
        let more = compression.more.fields();
        let number = |key: &str| more.get(key).and_then(serde_json::Value::as_u64);
        let planes = number("planes").filter(|n| (1..=8).contains(n));
        let chunk = number("chunk").filter(|n| n.is_power_of_two() && (MIN_CHUNK..=MAX_CHUNK).contains(n));
        match (planes, chunk) {
            (Some(planes), Some(chunk)) => Ok(Some(Self { planes: planes as usize, chunk })),
            _ => Err(Error::malformed(format!("compression {KIND:?} has no planes or no chunk that can be"))),
        }
    }

    /// What a manifest says of content of so many bytes.
    pub fn note(&self, bytes: u64, sha256: [u8; 32]) -> Compression {
        let more = [("planes", self.planes as u64), ("chunk", self.chunk)];
        let more = more.into_iter().map(|(key, n)| (key.to_string(), n.into()));
        let more = more.collect::<serde_json::Map<_, _>>().into();
        Compression { kind: KIND.to_string(), bytes, sha256, more }
    }

    /// Whether `stored` bytes in the place of `bytes` are worth the time, and readers take them.
    pub fn is_worth(bytes: u64, stored: u64) -> bool {
        stored < bytes - bytes / 32 && bytes / MOST_TIMES <= stored
    }

    /// Chunks of so many bytes.
    pub fn chunks(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.chunk)
    }

    /// Appends the planes of a chunk to `out`, and their entries to `entries`.
    pub fn compress(&self, chunk: &[u8], out: &mut Vec<u8>, entries: &mut Vec<u32>) {
        let mut plane = Vec::with_capacity(chunk.len().div_ceil(self.planes));
        for p in 0..self.planes {
            self.gather(chunk, p, &mut plane);
            // What saves less is not worth the time.
            let coded = rans::encode(&plane, plane.len() - plane.len() / 32);
            let (kind, bytes) = match &coded {
                Coded::Code(code) => (CODED, &code[..]),
                Coded::Long => (COPIED, &plane[..]),
                Coded::Constant if plane.is_empty() => (COPIED, &[][..]),
                Coded::Constant => (CONSTANT, &plane[..1]),
            };
            out.extend(bytes);
            entries.push(kind << LENGTH_BITS | bytes.len() as u32); // at most 2^24
        }
    }

    /// The bytes of a plane.
    fn gather(&self, chunk: &[u8], plane: usize, out: &mut Vec<u8>) {
        fn of<const N: usize>(chunk: &[u8], plane: usize, out: &mut Vec<u8>) {
            let (elements, rest) = chunk.as_chunks::<N>();
            out.extend(elements.iter().map(|e| e[plane]));
            out.extend(rest.get(plane));
        }
        out.clear();
        match self.planes {
            1 => out.extend(chunk),
            2 => of::<2>(chunk, plane, out),
            4 => of::<4>(chunk, plane, out),
            n => out.extend(chunk.iter().skip(plane).step_by(n)),
        }
    }

    /// Puts the bytes of a plane in their places.
    fn scatter(&self, plane: &[u8], number: usize, chunk: &mut [u8]) {
        fn to<const N: usize>(plane: &[u8], number: usize, chunk: &mut [u8]) {
            let (elements, rest) = chunk.as_chunks_mut::<N>();
            elements.iter_mut().zip(plane).for_each(|(e, byte)| e[number] = *byte);
            if let (Some(last), Some(byte)) = (rest.get_mut(number), plane.last()) {
                *last = *byte;
            }
        }
        match self.planes {
            2 => to::<2>(plane, number, chunk),
            4 => to::<4>(plane, number, chunk),
            n => chunk.iter_mut().skip(number).step_by(n).zip(plane).for_each(|(to, from)| *to = *from),
        }
    }

    /// Fills a chunk with what its planes stand for.
    ///
    /// # Errors
    /// `Malformed` where they stand for something else.
    pub fn decompress(&self, mut stored: &[u8], entries: &[u32], chunk: &mut [u8]) -> Result<()> {
        let wrong = || Error::malformed("a compressed chunk stands for nothing");
        let mut plane = Vec::new();
        for p in 0..self.planes {
            // One plane is the chunk itself.
            let target = match self.planes {
                1 => &mut *chunk,
                _ => {
                    plane.resize(chunk.len().saturating_sub(p).div_ceil(self.planes), 0);
                    &mut plane[..]
                }
            };
            let entry = entries.get(p).ok_or_else(wrong)?;
            let (kind, len) = (entry >> LENGTH_BITS, entry % (1 << LENGTH_BITS));
            let (bytes, rest) = stored.split_at_checked(len as usize).ok_or_else(wrong)?;
            stored = rest;
            match (kind, bytes) {
                (COPIED, bytes) if bytes.len() == target.len() => target.copy_from_slice(bytes),
                (CONSTANT, [byte]) if !target.is_empty() => target.fill(*byte),
                (CODED, bytes) => rans::decode(bytes, target).ok_or_else(wrong)?,
                _ => return Err(wrong()),
            }
            if self.planes > 1 {
                self.scatter(&plane, p, chunk);
            }
        }
        match stored.is_empty() {
            true => Ok(()),
            false => Err(wrong()),
        }
    }
}

/// Chunks that each thread keeps, of the parts of a tensor: spans far smaller than a chunk are read one after the other.
const MOST_KEPT: usize = 4;

/// A chunk of a segment without compression.
struct Kept {
    segment: u64,
    number: usize,
    bytes: Vec<u8>,
}

thread_local! {
    /// The last chunks of which parts were read, the latest behind.
    static KEPT: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// How many segments were opened.
static SEGMENTS: AtomicU64 = AtomicU64::new(0);

/// A compressed segment in a file.
#[derive(Debug)]
pub struct Compressed {
    /// Another for each that is opened.
    number: u64,
    planes: Planes,
    /// Bytes without compression.
    bytes: u64,
    /// For each plane of each chunk how it is stored.
    entries: Vec<u32>,
    /// The first byte of each chunk in the file, and the one behind the last.
    places: Vec<u64>,
}

impl Compressed {
    /// Reads the table at the end of a segment of `len` bytes from `at` on, which stands for `bytes`.
    ///
    /// # Errors
    /// `Malformed` where it does not fill the segment; `Io`.
    pub fn open(file: &InputFile, (at, len): (u64, u64), bytes: u64, planes: Planes) -> Result<Self> {
        let wrong = || Error::malformed("a compressed segment is not as long as its table says");
        if bytes / MOST_TIMES > len {
            return Err(Error::limit(format!(
                "{len} bytes stand for {bytes}, at most {MOST_TIMES} times as many may be"
            )));
        }
        let n = planes.chunks(bytes).checked_mul(planes.planes as u64);
        let table = n.and_then(|n| n.checked_mul(4)).filter(|table| *table <= len).ok_or_else(wrong)?;
        let mut found = vec![0; table as usize]; // not longer than the segment
        file.read_at(at + (len - table), &mut found)?;
        let entries: Vec<u32> = found.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let mut places = vec![at];
        let mut end = at;
        let most = planes.chunk.div_ceil(planes.planes as u64);
        for of_chunk in entries.chunks(planes.planes) {
            for entry in of_chunk {
                let stored = u64::from(entry % (1 << LENGTH_BITS));
                end =
                    Some(stored).filter(|n| *n <= most).and_then(|n| end.checked_add(n)).ok_or_else(wrong)?;
            }
            places.push(end);
        }
        match end.checked_add(table) == at.checked_add(len) {
            true => {
                let number = SEGMENTS.fetch_add(1, Ordering::Relaxed);
                Ok(Self { number, planes, bytes, entries, places })
            }
            false => Err(wrong()),
        }
    }

    /// Fills `out` with the bytes from `start` on.
    ///
    /// # Errors
    /// `Misuse` beyond the end; `Malformed` for chunks that stand for nothing; `Io`.
    pub fn read(&self, file: &InputFile, start: u64, out: &mut [u8]) -> Result<()> {
        if start.checked_add(out.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(Error::misuse(format!("{} bytes at {start} of {}", out.len(), self.bytes)));
        }
        let size = self.planes.chunk;
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            let (k, skipped) = ((at / size) as usize, (at % size) as usize);
            let len = size.min(self.bytes - k as u64 * size) as usize;
            let n = out.len().min(len - skipped);
            let (these, rest) = out.split_at_mut(n);
            match n == len {
                true => self.decompress(file, k, these)?,
                false => {
                    self.part(file, k, len, |chunk| these.copy_from_slice(&chunk[skipped..skipped + n]))?
                }
            }
            (at, out) = (at + n as u64, rest);
        }
        Ok(())
    }

    /// Calls `take` with a chunk of `len` bytes, which this thread keeps for the next part of it.
    fn part(&self, file: &InputFile, number: usize, len: usize, take: impl FnOnce(&[u8])) -> Result<()> {
        let mut kept = KEPT.take();
        let is_it = |kept: &Kept| (kept.segment, kept.number) == (self.number, number);
        let chunk = match kept.iter().position(is_it) {
            Some(at) => kept.remove(at),
            None => {
                let mut bytes = if kept.len() < MOST_KEPT { Vec::new() } else { kept.remove(0).bytes };
                bytes.resize(len, 0);
                self.decompress(file, number, &mut bytes)?;
                Kept { segment: self.number, number, bytes }
            }
        };
        take(&chunk.bytes);
        kept.push(chunk);
        KEPT.set(kept);
        Ok(())
    }

    fn decompress(&self, file: &InputFile, number: usize, chunk: &mut [u8]) -> Result<()> {
        let (Some([from, to]), Some(entries)) = (
            self.places.get(number..number + 2).and_then(|p| p.first_chunk::<2>()),
            self.entries.chunks(self.planes.planes).nth(number),
        ) else {
            return Err(Error::misuse(format!("chunk {number} is not there")));
        };
        let mut stored = vec![0; (to - from) as usize]; // within the segment
        file.read_at(*from, &mut stored)?;
        self.planes.decompress(&stored, entries, chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Compressed, as a segment.
    fn segment(planes: Planes, content: &[u8]) -> Vec<u8> {
        let (mut out, mut entries) = (Vec::new(), Vec::new());
        content.chunks(planes.chunk as usize).for_each(|c| planes.compress(c, &mut out, &mut entries));
        out.extend(entries.iter().flat_map(|e| e.to_le_bytes()));
        out
    }

    fn opened(dir: &std::path::Path, bytes: &[u8]) -> InputFile {
        let path = dir.join("x");
        std::fs::write(&path, bytes).unwrap();
        InputFile::open(path).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn segments_come_back(
            n in 0usize..400_000,
            planes in 1usize..=8,
            mask in prop::collection::vec(prop::sample::select(vec![0u8, 1, 7, 255]), 8),
            start in any::<prop::sample::Index>(),
            end in any::<prop::sample::Index>(),
        ) {
            let planes = Planes { planes, chunk: MIN_CHUNK };
            let content: Vec<u8> = (0..n as u64)
                .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u8 & (mask[i as usize % planes.planes] | u8::from(i % planes.planes as u64 == 0)))
                .collect();
            let bytes = segment(planes, &content);
            let dir = tempfile::tempdir().unwrap();
            let file = opened(dir.path(), &[&[1, 2, 3], &bytes[..]].concat());
            let place = (3, bytes.len() as u64);
            let compressed = Compressed::open(&file, place, n as u64, planes).unwrap();
            let (a, b) = (start.index(n + 1), end.index(n + 1));
            for (start, end) in [(0, n), (a.min(b), a.max(b))] {
                let mut back = vec![0xEE; end - start];
                compressed.read(&file, start as u64, &mut back).unwrap();
                prop_assert!(back == content[start..end]);
            }
            prop_assert!(compressed.read(&file, n as u64, &mut [0]).is_err());
            for (len, bytes) in [(place.1 - u64::from(place.1 > 0), n as u64), (place.1, n as u64 + MIN_CHUNK)] {
                prop_assert!(n == 0 && len == 0 && bytes == 0 || Compressed::open(&file, (3, len), bytes, planes).is_err());
            }
        }
    }

    #[test]
    fn bf16_takes_two_thirds() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let weights = (0..1 << 19).map(|_| (noise() + noise() + noise()) * 0.02);
        let content: Vec<u8> = weights.flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect();
        let share = segment(Planes::of(2), &content).len() as f64 / content.len() as f64;
        assert!((0.6..0.7).contains(&share), "{share}");
    }

    /// Parts of a chunk come from one decompression: what becomes of the file between them is of no effect.
    #[test]
    fn a_chunk_is_decompressed_once() {
        let planes = Planes { planes: 2, chunk: MIN_CHUNK };
        let content: Vec<u8> = (0..3 * MIN_CHUNK).map(|i| (i % 251) as u8).collect();
        let (bytes, dir) = (segment(planes, &content), tempfile::tempdir().unwrap());
        let file = opened(dir.path(), &bytes);
        let open = || Compressed::open(&file, (0, bytes.len() as u64), content.len() as u64, planes).unwrap();
        let (one, other) = (open(), open());
        let mut part = [0; 100];
        for compressed in [&one, &other] {
            compressed.read(&file, 5, &mut part).unwrap();
        }
        let none = opened(dir.path(), &vec![0xEE; bytes.len()]);
        for start in (0..MIN_CHUNK - 100).step_by(1000) {
            for compressed in [&one, &other] {
                compressed.read(&none, start, &mut part).unwrap();
                assert_eq!(part, content[start as usize..][..100]);
            }
        }
        // Of the next chunk nothing is known.
        assert!(
            one.read(&none, MIN_CHUNK, &mut part).is_err() || part != content[MIN_CHUNK as usize..][..100]
        );
    }

    #[test]
    fn chunks_that_stand_for_nothing() {
        let planes = Planes { planes: 2, chunk: MIN_CHUNK };
        let mut chunk = [0; 10];
        let mut check =
            |stored: &[u8], entries: &[u32]| planes.decompress(stored, entries, &mut chunk).is_ok();
        let constant = CONSTANT << LENGTH_BITS | 1;
        assert!(check(&[7, 8], &[constant, constant]));
        assert!(check(&[7, 1, 2, 3, 4, 5], &[constant, 5]));
        assert!(!check(&[7, 8, 9], &[constant, constant]));
        assert!(!check(&[7], &[constant, constant]));
        assert!(!check(&[7, 8], &[constant]));
        assert!(!check(&[7, 1, 2, 3, 4], &[constant, 4]));
        assert!(!check(&[7, 8, 8], &[constant, constant + 1]));
        assert!(!check(&[7, 8], &[constant, 3 << LENGTH_BITS | 1]));
        assert!(!check(&[7, 8], &[constant, CODED << LENGTH_BITS | 1]));
        assert!(!check(&[7, 8], &[constant, u32::MAX]));
    }
}
