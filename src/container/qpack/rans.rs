//! Bytes in as many bits as their frequencies ask for: range asymmetric numeral systems (J. Duda, arXiv
//! 1311.2540), in the form of F. Giesen's `rans_word` (arXiv 1402.3392), with a table of frequencies for each run of
//! bytes, and eight states in turn, so that a processor has several in hand.
//!
//! Nothing here depends on a library's version: the same bytes have the same code.

/// States, of which byte `i` goes to number `i % LANES`.
const LANES: usize = 8;
/// Frequencies are parts of `TOTAL`.
const PRECISION: u32 = 12;
const TOTAL: u32 = 1 << PRECISION;
/// States lie from here to 2^32.
const LEAST: u32 = 1 << 16;

/// What became of bytes.
#[derive(Debug, PartialEq)]
pub(super) enum Coded {
    /// There are no two different ones.
    Constant,
    /// Their code would not be shorter than was wished.
    Long,
    /// Their code.
    Code(Vec<u8>),
}

/// How a byte is put into a state.
#[derive(Clone, Copy, Default)]
struct Symbol {
    /// A state from here on gives off a word first.
    most: u32,
    begin: u32,
    /// What is left of `TOTAL` beside its frequency.
    others: u32,
    /// `x / frequency` is `x * reciprocal >> shift`, for all `x` below `frequency << 20`: the reciprocal is too large
    /// by less than 1, and with `l` bits in the frequency `x` times that is below `2^(20 + 2 l)`, which is `shift`.
    /// The product stays below 2^64.
    shift: u32,
    reciprocal: u64,
}

impl Symbol {
    /// Of a frequency from 1 to `TOTAL - 1`.
    fn new(frequency: u32, begin: u32) -> Self {
        let shift = 20 + 2 * frequency.next_power_of_two().trailing_zeros();
        let reciprocal = (1u64 << shift).div_ceil(frequency.into());
        // With 4096 - 1 the product `frequency << 32 - PRECISION` still is a u32.
        Self { most: frequency << (32 - PRECISION), begin, others: TOTAL - frequency, shift, reciprocal }
    }

    /// The state with the byte, and whether a word was taken from it first.
    fn put(&self, x: u32) -> (u32, bool) {
        let is_high = x >= self.most;
        let x = if is_high { x >> 16 } else { x };
        let quotient = ((u64::from(x) * self.reciprocal) >> self.shift) as u32; // below 2^20
        (x + self.begin + quotient * self.others, is_high)
    }
}

/// The code of `bytes`, where it has fewer than `limit` bytes.
///
/// 32 bytes, of which bit `b` says whether byte `b` occurs; of those that do their frequencies (UINT16); the states
/// (UINT32); words of 16 bits in the order in which they are read.
pub(super) fn encode(bytes: &[u8], limit: usize) -> Coded {
    let Some((counts, frequencies)) = frequencies(bytes) else { return Coded::Constant };
    let mut head = vec![0; 32];
    let mut symbols = [Symbol::default(); 256];
    let (mut sum, mut bits) = (0, 0u64);
    for (b, f) in frequencies.iter().copied().enumerate().filter(|(_, f)| *f > 0) {
        head[b / 8] |= 1 << (b % 8);
        head.extend((f as u16).to_le_bytes());
        symbols[b] = Symbol::new(f, sum);
        sum += f;
        bits += u64::from(counts[b]) * u64::from((PRECISION << 16) - log2(f));
    }
    // Whether it is worth it shows beforehand: it comes very near to what frequencies allow.
    let expected = (bits >> 19) as usize + head.len() + 4 * LANES;
    if expected >= limit {
        return Coded::Long;
    }
    let mut states = [LEAST; LANES];
    // The last byte first, and the last word: the decoder gets them in their order. No byte gives off two words.
    let mut words = vec![0u16; bytes.len() + 1];
    let mut at = bytes.len();
    let mut put = |x: &mut u32, byte: u8| {
        let (next, is_high) = symbols[usize::from(byte)].put(*x);
        words[at] = *x as u16;
        at -= usize::from(is_high);
        *x = next;
    };
    let (eights, rest) = bytes.as_chunks::<LANES>();
    states.iter_mut().zip(rest).rev().for_each(|(x, byte)| put(x, *byte));
    for eight in eights.iter().rev() {
        states.iter_mut().zip(eight).rev().for_each(|(x, byte)| put(x, *byte));
    }
    let words = &words[at + 1..];
    let mut out = head;
    out.reserve(4 * LANES + 2 * words.len());
    states.iter().for_each(|x| out.extend(x.to_le_bytes()));
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    if out.len() < limit { Coded::Code(out) } else { Coded::Long }
}

/// The logarithm of a number from 1 to `TOTAL`, in parts of 2^16, of whole numbers alone: any machine finds the same.
fn log2(n: u32) -> u32 {
    let whole = n.ilog2();
    let mut log = whole;
    // From 1 to below 2; squared, its logarithm doubles.
    let mut x = u64::from(n) << (31 - whole);
    for _ in 0..16 {
        x = (x * x) >> 31;
        let is_above = x >= 1 << 32;
        x >>= u32::from(is_above);
        log = log << 1 | u32::from(is_above);
    }
    log
}

/// How often bytes occur, and the same of `TOTAL` in all; those that do at least once. `None` where there are no two
/// different ones.
fn frequencies(bytes: &[u8]) -> Option<([u32; 256], [u32; 256])> {
    // Several tables: the same byte twice does not wait for itself.
    let mut counts = [[0u32; 256]; 4];
    let (fours, rest) = bytes.as_chunks::<4>();
    for four in fours {
        for (counts, byte) in counts.iter_mut().zip(four) {
            counts[usize::from(*byte)] += 1;
        }
    }
    rest.iter().for_each(|byte| counts[0][usize::from(*byte)] += 1);
    let counts: [u32; 256] = std::array::from_fn(|b| counts.iter().map(|c| c[b]).sum());
    if counts.iter().filter(|n| **n > 0).count() < 2 {
        return None;
    }
    let part = |n: u32| (u64::from(n) * u64::from(TOTAL) / bytes.len() as u64) as u32;
    let mut parts = counts.map(|n| if n > 0 { part(n).max(1) } else { 0 });
    // What rounding leaves over, or takes too much of, is the largest one's.
    loop {
        let sum: u32 = parts.iter().sum();
        let largest = (0..256).rev().max_by_key(|b| parts[*b])?;
        match sum.cmp(&TOTAL) {
            std::cmp::Ordering::Equal => return Some((counts, parts)),
            std::cmp::Ordering::Less => parts[largest] += TOTAL - sum,
            std::cmp::Ordering::Greater => parts[largest] -= 1,
        }
    }
}

/// Fills `out` with what `code` stands for; `None` where it stands for something of another length, or nothing.
pub(super) fn decode(code: &[u8], out: &mut [u8]) -> Option<()> {
    let (bitmap, mut rest) = code.split_first_chunk::<32>()?;
    // Of each number below TOTAL its byte, the byte's frequency, and the number's place among the byte's.
    let mut table = [0u32; TOTAL as usize];
    let mut at = 0;
    for b in (0..256u32).filter(|b| bitmap[*b as usize / 8] >> (b % 8) & 1 == 1) {
        let (frequency, behind) = rest.split_first_chunk::<2>()?;
        let f = u32::from(u16::from_le_bytes(*frequency));
        let slots = table.get_mut(at..at + f as usize).filter(|_| f > 0 && f < TOTAL)?;
        (0..).zip(slots).for_each(|(k, slot): (u32, _)| *slot = b | f << 8 | k << 20);
        (at, rest) = (at + f as usize, behind);
    }
    let (states, words) = rest.split_first_chunk::<{ 4 * LANES }>()?;
    let words = words.as_chunks::<2>();
    let states = states.as_chunks::<4>().0;
    let mut states: [u32; LANES] = std::array::from_fn(|i| u32::from_le_bytes(states[i]));
    if at != table.len() || !words.1.is_empty() || states.iter().any(|x| *x < LEAST) {
        return None;
    }
    let (words, mut next) = (words.0, 0);
    let (eights, rest) = out.as_chunks_mut::<LANES>();
    for eight in eights {
        // A word for each state is as many as they can take.
        let Some(window) = words.get(next..).and_then(|left| left.first_chunk::<LANES>()) else {
            decode_some(&table, &mut states, words, &mut next, eight)?;
            continue;
        };
        let mut taken = 0;
        for (x, y) in states.iter_mut().zip(eight) {
            let entry = table[(*x % TOTAL) as usize];
            *y = entry as u8;
            let moved = step(entry, *x);
            // Without a branch, which nobody could foresee.
            let word = u32::from(u16::from_le_bytes(window[taken % LANES]));
            let is_low = moved < LEAST;
            *x = if is_low { moved << 16 | word } else { moved };
            taken += usize::from(is_low);
        }
        next += taken;
    }
    decode_some(&table, &mut states, words, &mut next, rest)?;
    (states == [LEAST; LANES] && next == words.len()).then_some(())
}

/// As many bytes as there are states, or fewer.
fn decode_some(
    table: &[u32; TOTAL as usize],
    states: &mut [u32; LANES],
    words: &[[u8; 2]],
    next: &mut usize,
    out: &mut [u8],
) -> Option<()> {
    for (x, y) in states.iter_mut().zip(out) {
        let entry = table[(*x % TOTAL) as usize];
        *y = entry as u8;
        *x = step(entry, *x);
        if *x < LEAST {
            *x = *x << 16 | u32::from(u16::from_le_bytes(*words.get(*next)?));
            *next += 1;
        }
    }
    Some(())
}

/// The state before the byte of this entry was put into it. It is above 0, and below 2^32.
fn step(entry: u32, x: u32) -> u32 {
    (entry >> 8) % TOTAL * (x >> PRECISION) + (entry >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn coded(bytes: &[u8]) -> Vec<u8> {
        match encode(bytes, usize::MAX) {
            Coded::Code(code) => code,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn divisions_and_logarithms() {
        for f in 1..TOTAL {
            let symbol = Symbol::new(f, 0);
            for x in [0, 1, f - 1, f, (f << 20) / 3, (f << 20) - f, (f << 20) - 1] {
                let quotient = ((u64::from(x) * symbol.reciprocal) >> symbol.shift) as u32;
                assert_eq!(quotient, x / f, "{x} / {f}");
            }
            let exact = f64::from(f).log2() * 65536.0;
            assert!((0.0..2.0).contains(&(exact - f64::from(log2(f)))), "{f}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(
            draws in prop::collection::vec((any::<u8>(), any::<u8>()), 0..2000),
            mask in prop::sample::select(vec![0u8, 1, 3, 15, 255]),
        ) {
            // Small ones are more frequent.
            let bytes: Vec<u8> = draws.iter().map(|(a, b)| a & b & mask).collect();
            let Coded::Code(code) = encode(&bytes, usize::MAX) else {
                prop_assert!(bytes.iter().all(|b| *b == bytes[0]));
                return Ok(());
            };
            prop_assert!(encode(&bytes, code.len()) == Coded::Long);
            let mut back = vec![0xEE; bytes.len()];
            prop_assert!(decode(&code, &mut back).is_some());
            prop_assert_eq!(&back, &bytes);
            // Another length is noticed, and so are words that are missing or too many.
            prop_assert!(decode(&code, &mut vec![0; bytes.len() + 1]).is_none());
            prop_assert!(decode(&code, &mut back[1..]).is_none());
            prop_assert!(decode(&[&code[..], &[0, 0]].concat(), &mut back).is_none());
            for len in 0..code.len().min(100) {
                prop_assert!(decode(&code[..len], &mut back).is_none());
            }
        }

        #[test]
        fn nothing_panics(code in prop::collection::vec(any::<u8>(), 0..300), n in 0usize..100) {
            decode(&code, &mut vec![0; n]);
            // Behind a table that is one.
            let table = coded(&[1, 2, 2, 3]);
            decode(&[&table[..38], &code].concat(), &mut vec![0; n]);
        }
    }

    #[test]
    fn as_small_as_frequencies_allow() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 32
        };
        // 0 in 7 of 8 bytes, 1 in the others: 0.5436 bits each.
        let bytes: Vec<u8> = (0..1 << 18).map(|_| u8::from(noise() % 8 == 0)).collect();
        let bits = coded(&bytes).len() as f64 * 8.0 / bytes.len() as f64;
        assert!((0.53..0.56).contains(&bits), "{bits}");
        let bytes: Vec<u8> = (0..1 << 18).map(|_| noise() as u8).collect();
        let bits = coded(&bytes).len() as f64 * 8.0 / bytes.len() as f64;
        assert!((7.99..8.1).contains(&bits), "{bits}");
    }
}
