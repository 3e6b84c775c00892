//! Names that come from files, and are shown, or used as names of files.

use std::path::Path;

use super::finding::Finding;
use super::rules::{NAME_CONTROL, NAME_DECEPTIVE, NAME_PATH};

/// What is wrong with a name; `what` says whose: `tensor`, `key`.
pub(super) fn check(file: &Path, what: &str, name: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(c) = name.chars().find(|c| c.is_control()) {
        let message = format!("the {what} {name:?} holds the control character {c:?}");
        found.push(Finding::new(&NAME_CONTROL, file, message));
    }
    let parts: Vec<&str> = name.split(['/', '\\']).collect();
    let leads_out = parts.contains(&"..")
        || (parts.len() > 1 && parts.first() == Some(&""))
        || matches!(name.as_bytes(), [a, b':', b'\\' | b'/', ..] if a.is_ascii_alphabetic());
    if leads_out {
        let message = format!("the {what} {name:?} leads out of a directory if it is used as a file name");
        let hint = "who exports tensors to files must refuse it";
        found.push(Finding::new(&NAME_PATH, file, message).hint(hint));
    }
    if let Some(c) = name.chars().find(|c| is_deceptive(*c)) {
        let message = format!("the {what} {} holds U+{:04X}", shown(name), u32::from(c));
        found.push(Finding::new(&NAME_DECEPTIVE, file, message));
    }
    found
}

/// Characters that are not seen, or that turn the text beside them round.
fn is_deceptive(c: char) -> bool {
    matches!(u32::from(c),
        0xad | 0x34f | 0x61c | 0x115f | 0x1160 | 0x17b4 | 0x17b5 | 0x180e | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x2064 | 0x2066..=0x206f | 0x3164
            | 0xfeff | 0xffa0 | 0xe0000..=0xe007f)
}

/// In ASCII.
fn shown(name: &str) -> String {
    let one = |c: char| if c.is_ascii_graphic() { c.to_string() } else { c.escape_unicode().to_string() };
    format!("\"{}\"", name.chars().map(one).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(name: &str) -> Vec<&'static str> {
        check(Path::new("x"), "tensor", name).iter().map(|f| f.rule.id).collect()
    }

    #[test]
    fn names_are_judged() {
        for good in ["blk.0.attn_q.weight", "model/layer_0/kernel", "a..b", "größe", "transformer.h.0..w"] {
            assert!(rules(good).is_empty(), "{good}");
        }
        assert_eq!(rules("\u{1b}[2J"), [NAME_CONTROL.id]);
        for bad in ["../../x", "a/../b", "/etc/passwd", "..\\x", "C:\\x", "a/.."] {
            assert_eq!(rules(bad), [NAME_PATH.id], "{bad}");
        }
        for c in ['\u{202e}', '\u{61c}', '\u{180e}', '\u{3164}'] {
            assert_eq!(rules(&format!("a{c}b")), [NAME_DECEPTIVE.id], "{c:?}");
        }
    }
}
