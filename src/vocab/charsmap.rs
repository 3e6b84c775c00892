//! SentencePiece's compiled normalization (`precompiled_charsmap`): its layout, and a check of it.
//!
//! Layout (SentencePiece's `normalizer.cc`, darts-clone): u32 length of the trie in bytes; the trie,
//! u32 units of a double array; then texts that end in NUL. All little-endian. A unit holds a label
//! in bits 0..8 and 31, "has a value" in bit 8, an offset in bits 10..31 that bit 9 shifts left by
//! eight; a value is the offset of the text that takes the matched bytes' place.

use serde_json::Value;

use super::base64;
use crate::error::{Error, Result};

/// Most regular expressions of a tokenizer, and most of its patterns of any kind: the `tokenizers` library
/// compiles each, whatever it takes. Tokenizers have about five.
const MOST_REGEXES: usize = 64;
const MOST_PATTERNS: usize = 1 << 10;

/// Checks what the `tokenizers` library (0.23) takes from a normalizer, pre-tokenizer and the like without
/// looking: a compiled normalization that is none makes it panic, be it when it is read or later.
///
/// # Errors
/// `Malformed`; `Limit` for too many patterns.
pub fn check_steps<'a>(steps: impl IntoIterator<Item = &'a Value>) -> Result<()> {
    let (mut regexes, mut patterns) = (0, 0);
    let mut open: Vec<&Value> = steps.into_iter().collect();
    while let Some(step) = open.pop() {
        match step {
            Value::Array(list) => open.extend(list),
            Value::Object(map) => {
                if map.get("type").is_some_and(|t| t == "Precompiled")
                    || map.contains_key("precompiled_charsmap")
                {
                    let text = map.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
                    let bytes = base64::decode(text)?;
                    if base64::encode(&bytes) != text {
                        return Err(Error::malformed("the compiled normalization is no strict base64"));
                    }
                    check(&bytes)?;
                }
                regexes += usize::from(map.contains_key("Regex"));
                patterns += usize::from(map.contains_key("pattern"));
                open.extend(map.values());
            }
            _ => {}
        }
    }
    if regexes > MOST_REGEXES || patterns > MOST_PATTERNS {
        return Err(Error::limit(format!(
            "has {regexes} regular expressions in {patterns} patterns; at most {MOST_REGEXES} in {MOST_PATTERNS} are tried"
        )));
    }
    Ok(())
}

/// Checks that no text leads out of the trie, out of the texts, or into a character. llama.cpp stops the
/// process where one does, the `tokenizers` library panics.
///
/// # Errors
/// `Malformed`.
pub fn check(charsmap: &[u8]) -> Result<()> {
    let wrong = |why: &str| Error::malformed(format!("the compiled normalization is damaged: {why}"));
    let Some((length, rest)) = charsmap.split_first_chunk::<4>() else {
        return Err(wrong("it has no header"));
    };
    let length = u32::from_le_bytes(*length) as usize;
    if length == 0 || !length.is_multiple_of(4) {
        return Err(wrong("its trie has no units"));
    }
    let Some((trie, texts)) = rest.split_at_checked(length).filter(|(_, texts)| !texts.is_empty()) else {
        return Err(wrong("its trie is longer than the whole"));
    };
    if texts.last() != Some(&0) {
        return Err(wrong("its last text does not end"));
    }
    let texts = std::str::from_utf8(texts).map_err(|_| wrong("its texts are not UTF-8"))?;
    let units: Vec<u32> = trie.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
    let mut seen = vec![false; units.len()];
    // Nodes whose children are to be visited, as the index that a label is combined with.
    let mut open = vec![units.first().map_or(0, |root| offset(*root))];
    while let Some(base) = open.pop() {
        for label in 1..=255usize {
            let at = base ^ label;
            let unit = *units.get(at).ok_or_else(|| wrong("its trie leads outside"))?;
            if (unit & (1 << 31 | 0xFF)) as usize != label || std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let next = at ^ offset(unit);
            if unit & 1 << 8 != 0 {
                let value = units.get(next).ok_or_else(|| wrong("its trie leads outside"))?;
                let text = (value & !(1 << 31)) as usize;
                if text >= texts.len() || !texts.is_char_boundary(text) {
                    return Err(wrong("a text lies outside, or begins within a character"));
                }
            }
            open.push(next);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map that turns `a` into `b`: 1024 units, the root's children at 256 and up.
    fn sample() -> Vec<u8> {
        let mut units = vec![0u32; 1024];
        units[0] = 256 << 10;
        let a = 256 ^ usize::from(b'a');
        // Its value at `a ^ 512`.
        units[a] = u32::from(b'a') | 1 << 8 | (512 << 10);
        units[a ^ 512] = 1 << 31 | 1;
        let trie: Vec<u8> = units.iter().flat_map(|u| u.to_le_bytes()).collect();
        [&(trie.len() as u32).to_le_bytes()[..], &trie, b"\0b\0"].concat()
    }

    #[test]
    fn damage_is_found() {
        let good = sample();
        check(&good).unwrap();
        for n in 0..good.len() {
            assert!(check(&good[..n]).is_err(), "{n}");
        }
        let with_unit = |at: usize, unit: u32| {
            let mut bad = good.clone();
            bad[4 + at * 4..8 + at * 4].copy_from_slice(&unit.to_le_bytes());
            check(&bad)
        };
        let a = 256 ^ usize::from(b'a');
        assert!(with_unit(0, 5000 << 10).is_err());
        assert!(with_unit(a, u32::from(b'a') | 1 << 8 | (4096 << 10)).is_err());
        assert!(with_unit(a ^ 512, 1 << 31 | 3).is_err());
        let mut bad = good.clone();
        bad[0] -= 1;
        assert!(check(&bad).is_err());
        // The text `\0\u{e9}\0`, of which a value takes the last byte.
        let accent = [&good[..good.len() - 3], "\0\u{e9}\0".as_bytes()].concat();
        check(&accent).unwrap();
        let value = 4 + (a ^ 512) * 4;
        let within = [&accent[..value], &(1u32 << 31 | 2).to_le_bytes(), &accent[value + 4..]].concat();
        assert!(check(&within).is_err());
        assert!(check(&[&good[..good.len() - 1], b"\xff\0"].concat()).is_err());
        assert!(check(b"\0\0\0\0\0").is_err());
        // A node that is its own child ends too.
        with_unit(a, u32::from(b'a') | u32::from(b'a') << 10).unwrap();
    }
}
