//! Text as it comes: whole characters out of the bytes of tokens, and the end at a stop string.

/// Joins the bytes of tokens to whole characters.
#[derive(Debug, Default)]
pub struct Utf8Stream {
    // The beginning of a character: at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes; returns what is complete. Bytes that are no UTF-8 become U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut out = String::new();
        let rest = std::mem::take(&mut self.pending);
        for chunk in rest.utf8_chunks() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            // An incomplete character at the very end may still be completed.
            let at_end = std::ptr::eq(chunk.invalid().as_ptr_range().end, rest.as_ptr_range().end);
            let incomplete = at_end && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if incomplete {
                self.pending = invalid.to_vec();
            } else if !invalid.is_empty() {
                out.push('\u{fffd}');
            }
        }
        out
    }

    /// What is left at the end: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() { String::new() } else { "\u{fffd}".to_owned() }
    }
}

/// Looks for stop strings in text that comes in pieces, and lets nothing of them through.
///
/// The string that is complete first ends the text; of several that are, the longest. The result does
/// not depend on how the text is cut into pieces.
#[derive(Debug)]
pub struct StopStrings<'a> {
    stops: &'a [String],
    // What may be the beginning of a stop string.
    held: String,
}

impl<'a> StopStrings<'a> {
    /// Empty strings stop nothing.
    pub fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Adds `text`; returns what may be shown, and the stop string that was found, if one was. After
    /// that there is nothing more to come.
    pub fn push(&mut self, text: &str) -> (String, Option<&'a str>) {
        self.held.push_str(text);
        let found = self
            .wanted()
            .filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at, stop)))
            .min_by_key(|&(end, at, _)| (end, at));
        let (shown, stop) = match found {
            Some((_, at, stop)) => (at, Some(stop)),
            None => (self.held.len() - self.beginning(), None),
        };
        let rest = self.held.split_off(shown);
        let ready = std::mem::take(&mut self.held);
        if stop.is_none() {
            self.held = rest;
        }
        (ready, stop)
    }

    /// What was held back and did not become a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn wanted(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.stops.iter().map(String::as_str).filter(|s| !s.is_empty())
    }

    /// Bytes at the end of what is held that begin a stop string.
    fn beginning(&self) -> usize {
        let longest = |stop: &str| {
            (1..stop.len())
                .rev()
                .find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n]))
                .unwrap_or(0)
        };
        self.wanted().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn characters_are_never_cut() {
        let text = "a\u{e9}\u{4e2d}\u{1f469}\u{200d}\u{1f680}z";
        for size in 1..=7 {
            let mut stream = Utf8Stream::default();
            let mut out: String = text.as_bytes().chunks(size).map(|c| stream.push(c)).collect();
            out.push_str(&stream.finish());
            assert_eq!(out, text);
        }
        for (bytes, expected) in [
            (&b"a\xff\xe4\xb8"[..], "a\u{fffd}\u{fffd}"),
            (b"\xe4\xb8b", "\u{fffd}b"),
            (b"\xf0\x9f", "\u{fffd}"),
        ] {
            let mut stream = Utf8Stream::default();
            let mut out: String = bytes.iter().map(|b| stream.push(&[*b])).collect();
            out.push_str(&stream.finish());
            assert_eq!(out, expected);
        }
    }

    /// What is shown of `pieces`, and what stopped it.
    fn shown(stops: &[String], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops);
        let mut out = String::new();
        for piece in pieces {
            let (ready, stop) = matcher.push(piece);
            out += &ready;
            if let Some(stop) = stop {
                return (out, Some(stop.to_string()));
            }
        }
        (out + &matcher.finish(), None)
    }

    /// The same, from the definition: the shortest beginning of the text that ends in a stop string.
    fn by_definition(stops: &[String], text: &str) -> (String, Option<String>) {
        for end in (0..=text.len()).filter(|&n| text.is_char_boundary(n)) {
            let ends = stops.iter().filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some(stop) = ends.max_by_key(|s| s.len()) {
                return (text[..end - stop.len()].to_string(), Some(stop.clone()));
            }
        }
        (text.to_string(), None)
    }

    proptest! {
        #[test]
        fn stop_strings_are_found_however_the_text_comes(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,5}", 0..4),
        ) {
            let text = pieces.concat();
            let expected = by_definition(&stops, &text);
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(&shown(&stops, &pieces), &expected);
            let characters: Vec<String> = text.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            prop_assert_eq!(&shown(&stops, &characters), &expected);
            prop_assert_eq!(&shown(&stops, &[&text]), &expected);
        }
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let stops = ["User:".to_string(), "###".to_string()];
        let mut matcher = StopStrings::new(&stops);
        for (piece, ready) in [("Hi! Us", "Hi! "), ("ed ", "Used "), ("#", ""), ("#x", "##x"), ("Use", "")] {
            assert_eq!(matcher.push(piece), (ready.to_string(), None));
        }
        assert_eq!(matcher.push("r: more"), (String::new(), Some("User:")));
        assert_eq!(matcher.finish(), "");
    }
}
