//! Lays out files. All sizes are known beforehand, and so is the length of the manifest: what is not are the
//! SHA-256 in it, which have the same length whatever they are. [`Seal`] fills them in when the data are there.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use super::frame::{FOOTER, Footer, header};
use super::manifest::{Manifest, Segment, ShardSeal};
use crate::error::{Error, Result};

/// Bytes that are read at a time.
const BUFFER: u64 = 1 << 20;

/// A file to be written.
#[derive(Debug)]
pub struct Layout {
    /// Everything before the first segment.
    pub header: Vec<u8>,
    /// Where each segment begins, in the order of the manifest: side files, then the parts of each tensor.
    pub places: Vec<u64>,
    /// Bytes of the whole file.
    pub len: u64,
    /// Writes the end, once the segments are there.
    pub seal: Seal,
}

/// The end of a file, which says what the segments are.
#[derive(Debug)]
pub struct Seal {
    manifest: Manifest,
    /// Where each segment begins, and at last the manifest.
    places: Vec<u64>,
}

/// Reads and writes at offsets of a file.
pub type ReadAt<'a> = dyn Fn(u64, &mut [u8]) -> Result<()> + Sync + 'a;
/// As [`ReadAt`].
pub type WriteAt<'a> = dyn Fn(u64, &[u8]) -> Result<()> + Sync + 'a;

/// Lays out one file; the SHA-256 in `manifest` play no part. The last file of a split model names the lengths of
/// the others, which their layouts tell.
///
/// # Errors
/// `Malformed` for what a reader would refuse; `Unsupported` for what has no place in a manifest.
pub fn layout(manifest: Manifest) -> Result<Layout> {
    let places = manifest.places()?;
    let at = places.last().copied().unwrap_or_default();
    let len = at.checked_add(manifest.bytes()?.len() as u64).and_then(|n| n.checked_add(FOOTER));
    let len = len.ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
    let of_segments = places[..places.len() - 1].to_vec();
    Ok(Layout { header: header().to_vec(), places: of_segments, len, seal: Seal { manifest, places } })
}

impl Seal {
    /// Reads all segments on so many threads, and writes padding, manifest and footer. The last file of a
    /// split model is given what writing the others returned.
    ///
    /// # Errors
    /// Those of `read` and `write`.
    pub fn write(
        &self,
        threads: usize,
        others: &[ShardSeal],
        read: &ReadAt<'_>,
        write: &WriteAt<'_>,
    ) -> Result<ShardSeal> {
        let sums = self.sums(threads, read)?;
        let mut manifest = self.manifest.clone();
        for (segment, sum) in manifest.segments_mut().zip(sums) {
            segment.sha256 = sum;
        }
        if let Some(split) = manifest.split.as_mut().filter(|s| !s.seals.is_empty()) {
            if !split.seals.iter().map(|s| s.bytes).eq(others.iter().map(|s| s.bytes)) {
                return Err(Error::misuse("the other files of the set are not those that were laid out"));
            }
            split.seals.copy_from_slice(others);
        }
        let pairs = self.places.windows(2).zip(self.manifest.segments());
        for (place, segment) in pairs {
            let end = place[0] + segment.bytes;
            write(end, &vec![0; (place[1] - end) as usize])?;
        }
        let bytes = manifest.bytes()?;
        let at = self.places.last().copied().unwrap_or_default();
        let manifest_sha256 = Sha256::digest(&bytes).into();
        let footer = Footer {
            manifest: (at, bytes.len() as u64),
            manifest_sha256,
            signature: 0,
            signature_sha256: Sha256::digest([]).into(),
        };
        write(at, &bytes)?;
        let end = at + bytes.len() as u64;
        write(end, &footer.bytes())?;
        Ok(ShardSeal { bytes: end + FOOTER, manifest: manifest_sha256 })
    }

    /// The SHA-256 of each segment.
    fn sums(&self, threads: usize, read: &ReadAt<'_>) -> Result<Vec<[u8; 32]>> {
        let segments: Vec<(u64, &Segment)> =
            self.places.iter().copied().zip(self.manifest.segments()).collect();
        // The longest first, so that no thread is left with one at the end.
        let mut order: Vec<usize> = (0..segments.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(segments[*i].1.bytes));
        let next = AtomicUsize::new(0);
        let sums = Mutex::new((vec![[0; 32]; segments.len()], None));
        let work = || {
            let mut buffer = vec![0; BUFFER as usize];
            while let Some(&i) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (at, segment) = segments[i];
                let sum = sha256(at, segment.bytes, read, &mut buffer);
                let mut sums = sums.lock().unwrap_or_else(|e| e.into_inner());
                match sum {
                    Ok(sum) => sums.0[i] = sum,
                    Err(e) => {
                        next.store(order.len(), Ordering::Relaxed);
                        sums.1.get_or_insert(e);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.clamp(1, 256).min(segments.len().max(1)) {
                scope.spawn(work);
            }
            work();
        });
        match sums.into_inner().unwrap_or_else(|e| e.into_inner()) {
            (sums, None) => Ok(sums),
            (_, Some(e)) => Err(e),
        }
    }
}

/// Of `len` bytes from `at` on.
pub(super) fn sha256(at: u64, len: u64, read: &ReadAt<'_>, buffer: &mut [u8]) -> Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let step = buffer.len() as u64;
    let mut done = 0;
    while done < len {
        let piece = &mut buffer[..step.min(len - done) as usize];
        read(at + done, piece)?;
        hasher.update(&*piece);
        done += piece.len() as u64;
    }
    Ok(hasher.finalize().into())
}
