//! Ternary digits, five in a byte: digit `i` of a byte counts `3^i`, so that bytes go from 0 to 242. Digits that
//! a last byte has left over are 0.
//!
//! Bytes are looked up: eight bytes are copied for each, of which the next ones overwrite three.

/// Digits of each byte; 3 for a byte that holds none.
static DIGITS: [[u8; 8]; 256] = {
    let mut table = [[3; 8]; 256];
    let mut byte = 0;
    while byte < 243 {
        let (mut number, mut i) = (byte, 0);
        table[byte] = [0; 8];
        while i < 5 {
            table[byte][i] = (number % 3) as u8;
            number /= 3;
            i += 1;
        }
        byte += 1;
    }
    table
};

/// Fills `codes` (0, 1, 2) with the digits of `bytes`; what these do not hold is 0. Returns whether all bytes
/// that were read hold digits, and left over ones are 0.
pub fn unpack(bytes: &[u8], codes: &mut [u8]) -> bool {
    let n = codes.len().div_ceil(5).min(bytes.len());
    let largest = bytes[..n].iter().fold(0, |most, b| if *b > most { *b } else { most });
    // As many as have room for the three bytes too many.
    let wide = (codes.len().saturating_sub(3) / 5).min(n);
    for (i, byte) in bytes[..wide].iter().enumerate() {
        let digits = &DIGITS[usize::from(*byte)];
        match codes.get_mut(5 * i..).and_then(|rest| rest.first_chunk_mut::<8>()) {
            Some(to) => *to = *digits,
            None => break,
        }
    }
    let mut is_rest_zero = true;
    for (codes, byte) in
        codes[5 * wide..].chunks_mut(5).zip(bytes[wide..n].iter().chain(std::iter::repeat(&0)))
    {
        let digits = &DIGITS[usize::from(*byte)];
        let (these, rest) = digits.split_at(codes.len());
        codes.copy_from_slice(these);
        is_rest_zero &= rest.iter().all(|d| *d == 0);
    }
    largest < 243 && is_rest_zero
}

/// Writes `codes` (0, 1, 2), and zeros behind them. Codes beyond the end of `bytes` are left out.
pub fn pack(codes: &[u8], bytes: &mut [u8]) {
    let (fives, rest) = codes.as_chunks::<5>();
    let n = fives.len().min(bytes.len());
    for (byte, five) in bytes.iter_mut().zip(fives) {
        let [a, b, c, d, e] = *five;
        // Byte 4 of the product; no byte below it is above 240.
        let word = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]);
        *byte = (word.wrapping_mul(const { u64::from_le_bytes([81, 27, 9, 3, 1, 0, 0, 0]) }) >> 32) as u8;
    }
    let beyond = &mut bytes[n..];
    beyond.fill(0);
    if let Some(byte) = beyond.first_mut() {
        *byte = rest.iter().rev().fold(0u8, |number, code| number.wrapping_mul(3).wrapping_add(*code));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn digits_come_back(codes in prop::collection::vec(0u8..3, 0..90), more in 0usize..9) {
            let mut bytes = vec![0xA5; codes.len().div_ceil(5) + more];
            pack(&codes, &mut bytes);
            for (i, byte) in bytes.iter().enumerate() {
                let digit = |k: usize| u32::from(codes.get(5 * i + k).copied().unwrap_or(0)) * 3u32.pow(k as u32);
                prop_assert_eq!(u32::from(*byte), (0..5).map(digit).sum::<u32>());
            }
            let mut back = vec![9; codes.len()];
            prop_assert!(unpack(&bytes, &mut back));
            prop_assert_eq!(&back, &codes);
            let mut longer = vec![9; codes.len() + 40];
            unpack(&bytes[..codes.len().div_ceil(5)], &mut longer);
            prop_assert_eq!(&longer[..codes.len()], &codes[..]);
            prop_assert!(longer[codes.len()..].iter().all(|c| *c == 0));
        }

        #[test]
        fn what_holds_no_digits_is_told(n in 1usize..60, at in 0usize..60, byte in 243u8..) {
            let mut bytes = vec![0; n.div_ceil(5)];
            let mut codes = vec![0; n];
            let last = bytes.len() - 1;
            bytes[at.min(last)] = byte;
            prop_assert!(!unpack(&bytes, &mut codes));
            bytes[at.min(last)] = 0;
            prop_assert!(unpack(&bytes, &mut codes));
            // A digit behind the last code.
            bytes[last] = 3u8.pow((n - 1) as u32 % 5 + 1).wrapping_mul(u8::from(n % 5 != 0));
            prop_assert_eq!(unpack(&bytes, &mut codes), n % 5 == 0);
        }
    }
}
