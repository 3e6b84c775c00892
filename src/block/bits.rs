//! Codes of 1 to 8 bits as one stream: code `i` takes the bits from `i * bits` on, lowest first, of bytes,
//! or, what is the same, of little-endian words. GPTQ, compressed-tensors and Core ML store integers so.

/// Bytes that `n` codes fill, the last one perhaps in part. `None` where that is beyond 2^64.
pub fn bytes(n: u64, bits: u32) -> Option<u64> {
    // n = 8 a + b: no product of the whole is needed.
    (n / 8).checked_mul(bits.into())?.checked_add((n % 8 * u64::from(bits)).div_ceil(8))
}

/// Fills `codes` from code `first` of `stream` on. What the stream does not hold is 0.
///
/// # Panics
/// For `bits` other than 1 to 8.
pub fn unpack(stream: &[u8], bits: u32, first: usize, codes: &mut [u8]) {
    match bits {
        1 => unpack_as::<1>(stream, first, codes),
        2 => unpack_as::<2>(stream, first, codes),
        3 => unpack_as::<3>(stream, first, codes),
        4 => unpack_as::<4>(stream, first, codes),
        5 => unpack_as::<5>(stream, first, codes),
        6 => unpack_as::<6>(stream, first, codes),
        7 => unpack_as::<7>(stream, first, codes),
        8 => unpack_as::<8>(stream, first, codes),
        _ => panic!("codes of {bits} bits"),
    }
}

/// Writes `codes` as a stream from the first bit of `stream` on, and zeros behind them. Bits beyond `bits`
/// are left out, and codes beyond the end of `stream`.
///
/// # Panics
/// For `bits` other than 1 to 8.
pub fn pack(codes: &[u8], bits: u32, stream: &mut [u8]) {
    match bits {
        1 => pack_as::<1>(codes, stream),
        2 => pack_as::<2>(codes, stream),
        3 => pack_as::<3>(codes, stream),
        4 => pack_as::<4>(codes, stream),
        5 => pack_as::<5>(codes, stream),
        6 => pack_as::<6>(codes, stream),
        7 => pack_as::<7>(codes, stream),
        8 => pack_as::<8>(codes, stream),
        _ => panic!("codes of {bits} bits"),
    }
}

/// Words of 4 bytes in rows of `cols` become rows of its columns.
///
/// # Panics
/// When `words` are not whole rows, or `out` has another length.
pub fn transpose(words: &[[u8; 4]], cols: usize, out: &mut [[u8; 4]]) {
    assert!(words.len() == out.len() && words.len().is_multiple_of(cols));
    let rows = words.len() / cols;
    // Squares: of each row, and of each column, as much as a line of the cache holds.
    const SIDE: usize = 16;
    for r in (0..rows).step_by(SIDE) {
        for c in (0..cols).step_by(SIDE) {
            let (high, wide) = (SIDE.min(rows - r), SIDE.min(cols - c));
            for k in 0..wide {
                let to = &mut out[(c + k) * rows + r..][..high];
                let from = words[r * cols + c + k..].iter().step_by(cols);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
        }
    }
}

/// Eight codes fill `BITS` bytes.
fn unpack_as<const BITS: usize>(stream: &[u8], first: usize, codes: &mut [u8]) {
    let single = |i: usize| {
        let (byte, shift) = (i / 8 * BITS + i % 8 * BITS / 8, i % 8 * BITS % 8);
        let at = |byte: usize| u16::from(stream.get(byte).copied().unwrap_or(0));
        ((at(byte) | at(byte + 1) << 8) >> shift) as u8 & mask::<BITS>()
    };
    let head = codes.len().min((8 - first % 8) % 8);
    let (head, rest) = codes.split_at_mut(head);
    head.iter_mut().enumerate().for_each(|(k, code)| *code = single(first + k));
    let first = first + head.len();
    let whole = stream.get(first / 8 * BITS..).unwrap_or(&[]).as_chunks::<BITS>().0;
    let (eights, _) = rest.as_chunks_mut::<8>();
    let n = eights.len().min(whole.len());
    for (codes, bytes) in eights.iter_mut().zip(whole) {
        let mut word = [0; 8];
        word[..BITS].copy_from_slice(bytes);
        *codes = scatter::<BITS>(word);
    }
    rest[n * 8..].iter_mut().enumerate().for_each(|(k, code)| *code = single(first + n * 8 + k));
}

fn pack_as<const BITS: usize>(codes: &[u8], stream: &mut [u8]) {
    let (eights, rest) = codes.as_chunks::<8>();
    let whole = stream.as_chunks_mut::<BITS>().0;
    let n = eights.len().min(whole.len());
    for (bytes, codes) in whole.iter_mut().zip(eights) {
        bytes.copy_from_slice(&gather::<BITS>(codes)[..BITS]);
    }
    let beyond = &mut stream[n * BITS..];
    beyond.fill(0);
    // Codes that fill no whole bytes, or of which only a part has room.
    let mut word = [0; 8];
    let codes = eights.get(n).map_or(rest, |codes| &codes[..]);
    word[..codes.len()].copy_from_slice(codes);
    let bytes = gather::<BITS>(&word);
    beyond.iter_mut().zip(&bytes[..BITS]).for_each(|(to, from)| *to = *from);
}

/// The inverse of [`gather`]: halves are parted, then their halves, then theirs.
#[inline(always)]
fn scatter<const BITS: usize>(bytes: [u8; 8]) -> [u8; 8] {
    let word = part(u64::from_le_bytes(bytes), 4 * BITS, 32, const { fields(4 * BITS, 64) });
    let word = part(word, 2 * BITS, 16, const { fields(2 * BITS, 32) });
    part(word, BITS, 8, const { fields(BITS, 16) }).to_le_bytes()
}

/// Parts pairs of fields of so many bits, so that there is one in each `slot`; `even` masks every other one.
#[inline(always)]
fn part(word: u64, bits: usize, slot: usize, even: u64) -> u64 {
    word & even | (word >> bits & even) << slot
}

/// Eight codes, one after the other: neighbours are joined, then pairs, then fours.
#[inline(always)]
fn gather<const BITS: usize>(codes: &[u8; 8]) -> [u8; 8] {
    let word = u64::from_le_bytes(*codes) & const { fields(BITS, 8) };
    let word = join(word, BITS, 8, const { fields(BITS, 16) });
    let word = join(word, 2 * BITS, 16, const { fields(2 * BITS, 32) });
    join(word, 4 * BITS, 32, const { fields(4 * BITS, 64) }).to_le_bytes()
}

/// Joins fields of so many bits, one in each `slot`, to pairs; `even` masks every other one.
#[inline(always)]
fn join(word: u64, bits: usize, slot: usize, even: u64) -> u64 {
    word & even | word >> (slot - bits) & even << bits
}

/// The lowest bits of every `slot`.
const fn fields(bits: usize, slot: usize) -> u64 {
    let (mut word, mut at) = (0, 0);
    while at < 64 {
        word |= (u64::MAX >> (64 - bits)) << at;
        at += slot;
    }
    word
}

const fn mask<const BITS: usize>() -> u8 {
    u8::MAX >> (8 - BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bit_by_bit(codes in prop::collection::vec(any::<u8>(), 0..80), bits in 1u32..=8, cut in 0usize..90) {
            let n = bytes(codes.len() as u64, bits).unwrap() as usize;
            let mut wanted = vec![0u8; n];
            for (i, code) in codes.iter().enumerate() {
                for bit in 0..bits as usize {
                    let at = i * bits as usize + bit;
                    wanted[at / 8] |= (code >> bit & 1) << (at % 8);
                }
            }
            let mut stream = vec![0xA5; n + 3];
            pack(&codes, bits, &mut stream);
            prop_assert_eq!(&stream[..n], &wanted[..]);
            prop_assert_eq!(&stream[n..], &[0; 3]);
            let first = cut.min(codes.len());
            let mut back = vec![0xFF; codes.len() - first];
            unpack(&stream[..n], bits, first, &mut back);
            let masked: Vec<u8> = codes[first..].iter().map(|c| c & (255 >> (8 - bits))).collect();
            prop_assert_eq!(back, masked);
            let mut beyond = vec![0xFF; 9];
            unpack(&stream[..n], bits, codes.len() + 8, &mut beyond);
            prop_assert_eq!(beyond, [0; 9]);
        }
    }

    #[test]
    fn words_change_places() {
        for (rows, cols) in [(1, 1), (16, 32), (37, 18), (3, 40)] {
            let words: Vec<[u8; 4]> = (0..rows * cols).map(|i| (i as u32).to_le_bytes()).collect();
            let mut out = vec![[0; 4]; words.len()];
            transpose(&words, cols, &mut out);
            assert!((0..words.len()).all(|i| out[i] == words[i % rows * cols + i / rows]), "{rows} {cols}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(
            (bytes(0, 3), bytes(1, 3), bytes(8, 3), bytes(9, 3)),
            (Some(0), Some(1), Some(3), Some(4))
        );
        assert_eq!((bytes(u64::MAX, 8), bytes(u64::MAX, 1)), (Some(u64::MAX), Some(1 << 61)));
    }
}
