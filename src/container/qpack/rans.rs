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

/// The code of `bytes`; `None` where there are no two different ones.
///
/// 32 bytes, of which bit `b` says whether byte `b` occurs; of those that do their frequencies (UINT16); the states
/// (UINT32); words of 16 bits in the order in which they are read.
pub(super) fn encode(bytes: &[u8]) -> Option<Vec<u8>> {
    let frequencies = frequencies(bytes)?;
    let mut out = vec![0; 32];
    let mut begins = [0u32; 256];
    let mut sum = 0;
    for (b, frequency) in frequencies.iter().enumerate().filter(|(_, f)| **f > 0) {
        out[b / 8] |= 1 << (b % 8);
        out.extend((*frequency as u16).to_le_bytes());
        begins[b] = sum;
        sum += frequency;
    }
    let mut states = [LEAST; LANES];
    let mut words = Vec::with_capacity(bytes.len() / 2);
    // The last byte first: the decoder gets them in their order.
    for (i, byte) in bytes.iter().enumerate().rev() {
        let (x, b) = (&mut states[i % LANES], usize::from(*byte));
        let f = frequencies[b]; // below TOTAL, since there are others
        if *x >= f << (32 - PRECISION) {
            words.push(*x as u16);
            *x >>= 16;
        }
        *x = (*x / f << PRECISION) + *x % f + begins[b];
    }
    states.iter().for_each(|x| out.extend(x.to_le_bytes()));
    out.reserve(2 * words.len());
    words.iter().rev().for_each(|word| out.extend(word.to_le_bytes()));
    Some(out)
}

/// How often bytes occur, of `TOTAL` in all; those that do at least once.
fn frequencies(bytes: &[u8]) -> Option<[u32; 256]> {
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
        let Some(largest) = (0..256).rev().max_by_key(|b| parts[*b]) else { return None };
        match sum.cmp(&TOTAL) {
            std::cmp::Ordering::Equal => return Some(parts),
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

    proptest! {
        #[test]
        fn bytes_come_back(
            draws in prop::collection::vec((any::<u8>(), any::<u8>()), 0..2000),
            mask in prop::sample::select(vec![0u8, 1, 3, 15, 255]),
        ) {
            // Small ones are more frequent.
            let bytes: Vec<u8> = draws.iter().map(|(a, b)| a & b & mask).collect();
            let Some(code) = encode(&bytes) else {
                prop_assert!(bytes.iter().all(|b| *b == bytes[0]));
                return Ok(());
            };
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
            let table = encode(&[1, 2, 2, 3]).unwrap();
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
        let bits = encode(&bytes).unwrap().len() as f64 * 8.0 / bytes.len() as f64;
        assert!((0.53..0.56).contains(&bits), "{bits}");
        let bytes: Vec<u8> = (0..1 << 18).map(|_| noise() as u8).collect();
        let bits = encode(&bytes).unwrap().len() as f64 * 8.0 / bytes.len() as f64;
        assert!((7.99..8.1).contains(&bits), "{bits}");
    }
}
