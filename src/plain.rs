//! Text from files, as it may be shown: no control character of a name reaches a terminal, no column is
//! as wide as a file wishes, no message is longer than anyone reads.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

/// Widest column of a table, in characters; longer cells stick out.
const WIDEST: usize = 100;

/// What steers a terminal, or the order in which it shows text.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` with what steers a terminal as `\u001b`, where `keep` does not say otherwise.
fn escaped(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    let hidden = |c: char| steers(c) && !keep(c);
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if hidden(c) {
            // A string takes everything.
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// `text` on one line, with control characters as `\u001b`.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// As [`line()`], but lines and tabs stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

/// `text`, or its beginning and its end, if it has more than about `most` bytes.
pub fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return Cow::Borrowed(text);
    }
    // A character has at most four bytes: one of four places next to each other is between two.
    let begin = most / 4 * 3;
    let head = (0..4).find_map(|n| text.get(..begin.checked_sub(n)?)).unwrap_or_default();
    let end = text.len() - most / 4;
    let tail = (end..end + 4).find_map(|at| text.get(at..)).unwrap_or_default();
    Cow::Owned(format!("{head} ... ({} bytes more) ... {tail}", text.len() - head.len() - tail.len()))
}

/// Width of a column with cells of these widths, and with a heading of `least`.
pub fn width(cells: impl Iterator<Item = usize>, least: usize) -> usize {
    cells.max().unwrap_or(0).min(WIDEST).max(least)
}

/// Writes text as [`lines`] shows it.
#[derive(Debug)]
pub struct Plain<W>(pub W);

impl<W: Write> Write for Plain<W> {
    /// Takes whole characters, as `write!` gives them; what is no UTF-8 is replaced.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.0.write_all(lines(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_shown() {
        assert!(matches!(line("blk.0.é 漢"), Cow::Borrowed(_)));
        assert_eq!(line("a\u{1b}[2J\n\u{9b}\u{202e}\u{7f}"), "a\\u001b[2J\\u000a\\u009b\\u202e\\u007f");
        assert_eq!(line("\u{61c}"), "\\u061c");
        assert_eq!(lines("a\n\tb\r"), "a\n\tb\\u000d");
        let mut out = Plain(Vec::new());
        write!(out, "\u{9b}31m é\n\u{1b}").unwrap();
        assert_eq!(out.0, "\\u009b31m é\n\\u001b".as_bytes());
    }

    #[test]
    fn long_text_is_cut_and_columns_are_narrow() {
        assert_eq!(shortened("abc", 3), "abc");
        let long = shortened(&"é".repeat(5000), 1000).into_owned();
        assert!(long.len() < 1100 && long.contains("bytes more"), "{}", long.len());
        assert_eq!(width([3, 1 << 20].into_iter(), 4), WIDEST);
        assert_eq!((width([].into_iter(), 4), width([7].into_iter(), 4)), (4, 7));
    }
}
