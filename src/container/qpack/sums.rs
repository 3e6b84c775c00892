//! The SHA-256 of segments and of files.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::write::{ReadAt, Seen};
use crate::container::InputFile;
use crate::error::{Error, Result};
use crate::sha256::lanes::{self, Lane};
use crate::work::each;

/// Bytes that a thread reads at a time, for all that it hashes at once.
const BUFFER: usize = 1 << 19;

/// A segment of which some is hashed.
struct Open {
    number: usize,
    at: u64,
    left: u64,
    hash: Lane,
}

/// The SHA-256 of segments, each given by its first byte and its length, on so many threads. Each thread hashes
/// several at once where that is faster.
///
/// # Errors
/// Those of `read`; `Interrupted` as `seen` says.
pub(super) fn sums(
    segments: &[(u64, u64)],
    threads: usize,
    read: &ReadAt<'_>,
    seen: &Seen<'_>,
) -> Result<Vec<[u8; 32]>> {
    let has_more = segments.len() > threads.max(1);
    let start = if has_more { Lane::beside() } else { Lane::alone() };
    sums_by(&start, segments, threads, read, seen)
}

/// As [`sums`], beginning with `start`.
fn sums_by(
    start: &Lane,
    segments: &[(u64, u64)],
    threads: usize,
    read: &ReadAt<'_>,
    seen: &Seen<'_>,
) -> Result<Vec<[u8; 32]>> {
    let threads = threads.clamp(1, segments.len().max(1));
    let at_once = start.at_once().min(segments.len().div_ceil(threads));
    // The longest first, so that no thread is left with one at the end.
    let mut order: Vec<usize> = (0..segments.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(segments[*i].1));
    // At first they are dealt like cards, so that each thread has long ones; then each takes the next.
    let next = AtomicUsize::new(threads * at_once);
    let hash_some = |buffer: &mut Vec<u8>, thread: &usize| {
        let mut dealt = order.iter().skip(*thread).step_by(threads).take(at_once);
        let take = || dealt.next().or_else(|| order.get(next.fetch_add(1, Ordering::Relaxed)));
        let begun = |number: &usize| {
            let (at, left) = segments[*number];
            Open { number: *number, at, left, hash: start.clone() }
        };
        let mut waiting = std::iter::from_fn(take).map(begun).fuse();
        let (mut open, mut found) = (Vec::with_capacity(at_once), Vec::new());
        loop {
            open.extend(waiting.by_ref().take(at_once - open.len()));
            if open.is_empty() {
                return Ok(found);
            }
            hash_pieces(&mut open, buffer, read, seen)?;
            let done = open.extract_if(.., |segment| segment.left == 0);
            found.extend(done.map(|segment| (segment.number, segment.hash.finalize())));
        }
    };
    let numbers: Vec<usize> = (0..threads).collect();
    let found = each(&numbers, threads, || vec![0; BUFFER], hash_some)?;
    let mut sums = vec![[0; 32]; segments.len()];
    found.into_iter().flatten().for_each(|(number, sum)| sums[number] = sum);
    Ok(sums)
}

/// Reads and hashes the next bytes of each.
fn hash_pieces(open: &mut [Open], buffer: &mut [u8], read: &ReadAt<'_>, seen: &Seen<'_>) -> Result<()> {
    // Few have longer pieces; whole blocks.
    let most = buffer.len() / open.len() / 64 * 64;
    let mut pieces = Vec::with_capacity(open.len());
    let mut bytes = 0;
    for (segment, piece) in open.iter_mut().zip(buffer.chunks_exact_mut(most)) {
        let len = segment.left.min(most as u64);
        let piece = &mut piece[..len as usize];
        read(segment.at, piece)?;
        segment.at += len;
        segment.left -= len;
        bytes += len;
        pieces.push((&mut segment.hash, &*piece));
    }
    lanes::update(pieces);
    match bytes == 0 || seen(bytes) {
        true => Ok(()),
        false => Err(Error::interrupted()),
    }
}

/// The SHA-256 of a file.
///
/// # Errors
/// `Io`.
pub fn sum_of_file(file: &InputFile) -> Result<[u8; 32]> {
    let read = |at: u64, bytes: &mut [u8]| file.read_at(at, bytes);
    Ok(sums(&[(0, file.len())], 1, &read, &|_| true)?[0])
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::error::ErrorKind;

    /// Segments of many lengths, some of them none, in no order.
    fn segments() -> (Vec<u8>, Vec<(u64, u64)>) {
        let bytes: Vec<u8> = (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let lens = [0, 5, 200_000, 64, 0, 100_000, 70_000, 3000, 140_000, 128, 63, 65, 4096, 4096, 4096];
        let mut at = 0;
        let mut segment = |len: u64| {
            at += len;
            (at - len, len)
        };
        let more = (0..60).map(|k| k * 97 % 5000);
        let all = lens.into_iter().chain(more).map(&mut segment).collect();
        (bytes, all)
    }

    #[test]
    fn threads_do_not_show() {
        let (bytes, segments) = segments();
        let slice = |at: u64, len: u64| &bytes[at as usize..][..len as usize];
        let read = |at: u64, out: &mut [u8]| {
            out.copy_from_slice(slice(at, out.len() as u64));
            Ok(())
        };
        let expected: Vec<[u8; 32]> = segments
            .iter()
            .map(|(at, len)| <sha2::Sha256 as sha2::Digest>::digest(slice(*at, *len)).into())
            .collect();
        let total: u64 = segments.iter().map(|(_, len)| len).sum();
        for start in Lane::implementations() {
            for threads in [0, 1, 3, 1000] {
                for count in [0, 1, 2, 9, segments.len()] {
                    let told = AtomicU64::new(0);
                    let seen = |n| told.fetch_add(n, Ordering::Relaxed) < u64::MAX;
                    let found = sums_by(&start, &segments[..count], threads, &read, &seen).unwrap();
                    assert_eq!(found, expected[..count], "{threads} threads, {count} segments");
                    if count == segments.len() {
                        assert_eq!(told.into_inner(), total);
                    }
                }
            }
        }
    }

    #[test]
    fn ends_when_told_to() {
        let (_, segments) = segments();
        let asked = Mutex::new(0);
        let seen = |_| {
            *asked.lock().unwrap() += 1;
            false
        };
        let failed = sums(&segments, 2, &|_, _| Ok(()), &seen).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Interrupted);
        // Once for each thread, and no more.
        assert!((1..=2).contains(&*asked.lock().unwrap()));
        let unread = |_: u64, _: &mut [u8]| Err(Error::malformed("gone"));
        assert_eq!(sums(&segments, 2, &unread, &|_| true).unwrap_err().kind(), ErrorKind::Malformed);
    }
}
