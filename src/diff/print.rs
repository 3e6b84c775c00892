//! A diff for people.

use std::io::{self, Write};

use serde_json::Value as Json;

use super::{Diff, TensorDiff};
use crate::plain;

/// Prints what differs; all tensors where `all` is set.
///
/// # Errors
/// As `out` fails.
pub fn print(diff: &Diff, all: bool, out: &mut impl Write) -> io::Result<()> {
    for (mark, model) in ["first: ", "second:"].iter().zip(&diff.models) {
        writeln!(out, "{mark} {} ({})", model.path.display(), model.format)?;
    }
    for note in &diff.notes {
        writeln!(out, "note: {note}")?;
    }
    if !diff.metadata.is_empty() {
        writeln!(out, "\nmetadata ({})", diff.metadata.len())?;
        for entry in &diff.metadata {
            match &entry.values {
                [Some(a), Some(b)] => {
                    writeln!(out, "  {}: {} -> {}", plain::line(&entry.key), short(a), short(b))?
                }
                [a, b] => {
                    let sign = if a.is_some() { '-' } else { '+' };
                    let value = a.as_ref().or(b.as_ref()).map(short).unwrap_or_default();
                    writeln!(out, "{sign} {}: {value}", plain::line(&entry.key))?;
                }
            }
        }
    }
    if !diff.files.is_empty() {
        writeln!(out, "\nfiles ({})", diff.files.len())?;
        for file in &diff.files {
            match file.bytes {
                [Some(a), Some(b)] if a == b => {
                    writeln!(out, "  {}: other bytes, {a} of them", plain::line(&file.name))?
                }
                [Some(a), Some(b)] => writeln!(out, "  {}: {a} -> {b} bytes", plain::line(&file.name))?,
                [a, b] => {
                    let sign = if a.is_some() { '-' } else { '+' };
                    writeln!(out, "{sign} {}: {} bytes", plain::line(&file.name), a.or(b).unwrap_or(0))?;
                }
            }
        }
    }
    let shown: Vec<&TensorDiff> = diff.tensors.iter().filter(|t| all || !t.kind.is_equal()).collect();
    if !shown.is_empty() {
        writeln!(out, "\ntensors ({})", shown.len())?;
    }
    for t in shown {
        writeln!(out, "  {}: {}", plain::line(&t.name), line(t))?;
    }
    if !diff.counts.is_empty() {
        let counts: Vec<String> =
            diff.counts.iter().map(|(kind, n)| format!("{n} {}", kind.words())).collect();
        writeln!(out, "\n{} tensors: {}", diff.tensors.len(), counts.join(", "))?;
    }
    if diff.equal {
        writeln!(out, "no difference")?;
    }
    Ok(())
}

fn line(t: &TensorDiff) -> String {
    let beside = |pair: [Option<String>; 2]| match pair {
        [Some(a), Some(b)] if a == b => a,
        [Some(a), Some(b)] => format!("{a} -> {b}"),
        [a, b] => a.or(b).unwrap_or_default(),
    };
    let shapes = beside([0, 1].map(|k| t.shapes[k].as_ref().map(|s| format!("{s:?}"))));
    let mut line = format!("{}; {shapes} {}", t.kind.words(), beside(t.encodings.clone()));
    if let Some(e) = &t.errors {
        line += &format!(
            "; {} values, at most {:.3e} apart, NMSE {:.3e}, cosine {:.6}",
            e.differing, e.max, e.nmse, e.cosine
        );
        if e.non_finite > 0 {
            line += &format!("; {} are NaN or infinite in one", e.non_finite);
        }
    }
    line
}

/// A value on a line.
fn short(value: &Json) -> String {
    const CHARS: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= CHARS {
        return text;
    }
    let head: String = text.chars().take(CHARS).collect();
    match value {
        Json::Array(list) => format!("{head}... ({} entries)", list.len()),
        _ => format!("{head}..."),
    }
}
