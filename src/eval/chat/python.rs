//! What Python's Jinja does otherwise than minijinja: the text of values, JSON, arithmetic on texts
//! and lists, slices, methods, and some tests.

use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::bounds::fail;

type Made = Result<Value, Error>;

/// `str(value)`.
pub fn text(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_string()),
        ValueKind::Undefined => Ok(String::new()),
        _ => {
            let mut out = String::new();
            repr(value, &mut out)?;
            Ok(out)
        }
    }
}

/// `repr(value)`. How large and deep it is has been looked at before.
fn repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    '\\' => out.push_str("\\\\"),
                    c if c == quote => out.extend(['\\', c]),
                    c if c.is_control() => write!(out, "\\x{:02x}", u32::from(c))?,
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&item, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&key, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

/// `json.dumps(value, ensure_ascii=False)`; transformers gives templates this filter, with these
/// options.
pub fn tojson(value: &Value, options: Kwargs) -> Made {
    let indent: Option<Value> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let indent = indent.filter(|v| !v.is_none()).map(|v| match v.as_i64() {
        Some(n) => " ".repeat(n.clamp(0, 64) as usize),
        None => v.as_str().unwrap_or_default().to_string(),
    });
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(String::from);
    let [comma, colon] = match separators.as_deref() {
        Some([comma, colon]) => [comma.clone(), colon.clone()],
        _ => default,
    };
    let all = [indent.as_ref(), Some(&comma), Some(&colon)];
    if all.into_iter().flatten().any(|text| text.len() > 64) {
        return Err(fail("asks tojson for too much"));
    }
    let flag = |name| options.get::<Option<bool>>(name).map(Option::unwrap_or_default);
    let json = Json { indent, comma, colon, ascii: flag("ensure_ascii")?, sorted: flag("sort_keys")? };
    let mut out = String::new();
    json.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

struct Json {
    indent: Option<String>,
    comma: String,
    colon: String,
    ascii: bool,
    sorted: bool,
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => write!(out, "{value}")?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out)?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(['[', ']'], items, depth, out, |item, out| self.write(&item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(['{', '}'], keys, depth, out, |key, out| {
                    self.string(&text(&key)?, out)?;
                    out.push_str(&self.colon);
                    self.write(&value.get_item(&key)?, depth + 1, out)
                })?;
            }
            kind => return Err(fail(format!("turns {kind} into JSON, which has no form for it"))),
        }
        Ok(())
    }

    fn list(
        &self,
        [open, close]: [char; 2],
        items: Vec<Value>,
        depth: usize,
        out: &mut String,
        each: impl Fn(Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        let empty = items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            out.push_str(if i > 0 { &self.comma } else { "" });
            line(depth + 1, out);
            each(item, out)?;
            check_len(out.len())?;
        }
        if !empty {
            line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) -> Result<(), Error> {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}")?;
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
        Ok(())
    }
}

/// `join(value, separator, attribute)`.
pub fn join(value: &Value, separator: Option<&str>, options: Kwargs) -> Made {
    let named: Option<String> = options.get("d")?;
    let attribute: Option<Value> = options.get("attribute")?;
    joined(value, separator.or(named.as_deref()).unwrap_or_default(), attribute.as_ref())
}

fn joined(value: &Value, separator: &str, attribute: Option<&Value>) -> Made {
    let mut out = String::new();
    let items: Vec<Value> = match value.as_str() {
        Some(s) => s.chars().map(Value::from).collect(),
        None => value.try_iter()?.collect(),
    };
    // The separator may be longer than all that is joined.
    check_len(separator.len().saturating_mul(items.len()))?;
    for (i, entry) in items.iter().enumerate() {
        out.push_str(if i > 0 { separator } else { "" });
        out.push_str(&match attribute {
            Some(name) => text(&item(entry, name)?)?,
            None => text(entry)?,
        });
    }
    Ok(Value::from(out))
}

/// Refuses to make a text of so many bytes.
fn check_len(bytes: usize) -> Result<(), Error> {
    if bytes > 16 << 20 { Err(fail("makes a value that is too large")) } else { Ok(()) }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn mismatch(operator: &str, a: &Value, b: &Value) -> Error {
    fail(format!("computes {} {operator} {}, which is not possible", a.kind(), b.kind()))
}

/// Two texts, one behind the other. What is beside one that is marked as safe gets escaped, as
/// markupsafe does it, and the whole is safe.
fn concat(a: &str, b: &str, (a_safe, b_safe): (bool, bool)) -> Value {
    let escaped = |text: &str, safe: bool| {
        let pairs = [('&', "&amp;"), ('<', "&lt;"), ('>', "&gt;"), ('"', "&#34;"), ('\'', "&#39;")];
        let pairs = if safe { &[][..] } else { &pairs[..] };
        pairs.iter().fold(text.to_string(), |text, (c, escape)| text.replace(*c, escape))
    };
    if a_safe || b_safe {
        Value::from_safe_string(escaped(a, a_safe) + &escaped(b, b_safe))
    } else {
        Value::from([a, b].concat())
    }
}

/// `a + b`.
pub fn add(a: &Value, b: &Value) -> Made {
    match (a.as_str(), b.as_str()) {
        (Some(x), Some(y)) => return Ok(concat(x, y, (a.is_safe(), b.is_safe()))),
        _ if is_list(a) && is_list(b) => return Ok(Value::from_iter(a.try_iter()?.chain(b.try_iter()?))),
        _ => {}
    }
    numbers(a, b, i64::checked_add, |a, b| a + b).ok_or_else(|| mismatch("+", a, b))
}

/// `a * b`: of a text or list with a number, repeated.
pub fn multiply(a: &Value, b: &Value) -> Made {
    let repeated = |what: &Value, n: &Value| -> Option<Made> {
        let n = n.as_i64().filter(|_| n.is_integer())?.max(0) as usize;
        let len = what.as_str().map(str::len).or(what.len().filter(|_| is_list(what)))?;
        Some(check_len(len.saturating_mul(n)).and_then(|()| match what.as_str() {
            Some(text) => Ok(Value::from(text.repeat(n))),
            None => {
                let items: Vec<Value> = what.try_iter()?.collect();
                Ok(std::iter::repeat_n(items, n).flatten().collect())
            }
        }))
    };
    if let Some(made) = repeated(a, b).or_else(|| repeated(b, a)) {
        return made;
    }
    numbers(a, b, i64::checked_mul, |a, b| a * b).ok_or_else(|| mismatch("*", a, b))
}

/// `a % b`: the remainder, or a text with values put in.
pub fn modulo(state: &State<'_, '_>, a: &Value, b: &Value) -> Made {
    if a.as_str().is_some() {
        let mut args = vec![a.clone()];
        if is_list(b) {
            args.extend(b.try_iter()?);
        } else {
            args.push(b.clone());
        }
        return state.apply_filter("format", &args);
    }
    let floor =
        |a: i64, b: i64| a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r });
    numbers(a, b, floor, |a, b| a - b * (a / b).floor()).ok_or_else(|| mismatch("%", a, b))
}

/// Arithmetic of whole numbers and others; truth values count as 0 and 1.
fn numbers(
    a: &Value,
    b: &Value,
    whole: impl Fn(i64, i64) -> Option<i64>,
    float: impl Fn(f64, f64) -> f64,
) -> Option<Value> {
    let number = |v: &Value| matches!(v.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(a) || !number(b) {
        return None;
    }
    let as_whole = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(i64::from(v.is_true())),
        _ => v.as_i64().filter(|_| v.is_integer()),
    };
    match (as_whole(a), as_whole(b)) {
        (Some(a), Some(b)) => whole(a, b).map(Value::from),
        _ => Some(Value::from(float(f64::try_from(a.clone()).ok()?, f64::try_from(b.clone()).ok()?))),
    }
}

/// `item in container`.
pub fn contains(item: &Value, container: &Value) -> Made {
    Ok(Value::from(match (container.kind(), item.as_str()) {
        (ValueKind::String, Some(part)) => container.as_str().is_some_and(|s| s.contains(part)),
        (ValueKind::String | ValueKind::None | ValueKind::Bool | ValueKind::Number, _) => {
            return Err(fail(format!("looks for {} in {}", item.kind(), container.kind())));
        }
        (ValueKind::Undefined, _) => false,
        _ => container.try_iter()?.any(|v| v == *item),
    }))
}

/// `container[key]`; undefined where there is none.
pub fn item(container: &Value, key: &Value) -> Made {
    if container.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "takes an item of what is undefined"));
    }
    let at = |len: usize| {
        let i = key.as_i64().filter(|_| key.is_integer())?;
        usize::try_from(if i < 0 { i + len as i64 } else { i }).ok().filter(|i| *i < len)
    };
    let found = match (container.kind(), container.as_str()) {
        (_, Some(s)) => {
            at(s.chars().count()).and_then(|i| s.chars().nth(i)).map(|c| Value::from(c.to_string()))
        }
        (ValueKind::Seq, _) => match at(container.len().unwrap_or(0)) {
            Some(i) => Some(container.get_item_by_index(i)?),
            None => None,
        },
        // A list as key would have to be hashed, with all that is in it.
        _ if matches!(key.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) => None,
        (ValueKind::Map | ValueKind::Plain, _) => Some(container.get_item(key)?),
        _ => None,
    };
    Ok(found.unwrap_or(Value::UNDEFINED))
}

/// `value[start:stop:step]`.
pub fn slice(value: &Value, start: &Value, stop: &Value, step: &Value) -> Made {
    let number = |v: &Value| match v.kind() {
        ValueKind::None => Ok(None),
        _ => v.as_i64().map(Some).ok_or_else(|| fail(format!("slices by {}", v.kind()))),
    };
    let step = number(step)?.unwrap_or(1);
    if step == 0 {
        return Err(fail("slices in steps of 0"));
    }
    let (start, stop) = (number(start)?, number(stop)?);
    let range = |len: usize| {
        let len = len as i64;
        // Where a given bound lies, kept within what a walk in this direction can reach.
        let bound = |b: i64| {
            let b = if b < 0 { b.saturating_add(len) } else { b };
            if step > 0 { b.clamp(0, len) } else { b.clamp(-1, len - 1) }
        };
        let (first, last) = if step > 0 { (0, len) } else { (len - 1, -1) };
        let (start, stop) = (start.map_or(first, bound), stop.map_or(last, bound));
        let in_front = move |i: &i64| if step > 0 { *i < stop } else { *i > stop };
        let indices = std::iter::successors(Some(start), move |i| i.checked_add(step));
        indices.take_while(in_front).map(|i| i as usize)
    };
    if let Some(s) = value.as_str() {
        let chars: Vec<char> = s.chars().collect();
        return Ok(Value::from(range(chars.len()).map(|i| chars[i]).collect::<String>()));
    }
    if !is_list(value) {
        return Err(fail(format!("slices {}", value.kind())));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    Ok(range(items.len()).map(|i| items[i].clone()).collect())
}

/// `{key: value, ...}` from keys and values in turn.
pub fn map(pairs: &[Value]) -> Made {
    for key in pairs.iter().step_by(2) {
        if matches!(key.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            return Err(fail(format!("takes {} for a key", key.kind())));
        }
    }
    Ok(pairs.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect())
}

/// Whether a filter or method is asked for more than a text of some width or a list of some length:
/// these take the number for granted before anyone can look at what they make.
pub fn widens(name: &str, args: &[Value]) -> bool {
    const WIDEST: f64 = 4096.0;
    match name {
        "|indent" | "|batch" | "|slice" | "|round" | "|center" => {
            let wide = |v: &Value| f64::try_from(v.clone()).is_ok_and(|n| n.abs() > WIDEST);
            let named = |v: &Value| {
                let keys = v.try_iter().into_iter().flatten().filter(|_| v.is_kwargs());
                keys.filter_map(|key| v.get_item(&key).ok()).any(|v| wide(&v))
            };
            args.iter().skip(1).any(|v| wide(v) || named(v))
        }
        "|format" | ".format" => {
            let spec = args.first().and_then(Value::as_str).unwrap_or_default();
            spec.contains('*') || spec.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 3)
        }
        _ => false,
    }
}

/// Refuses what would make much more than it takes, before it is made. `bytes` are those of all arguments, and
/// `most` how many elements a list may have.
pub fn check_made(name: &str, args: &[Value], bytes: usize, most: usize) -> Result<(), Error> {
    let text = args.first().and_then(Value::as_str).unwrap_or_default();
    let other = |i: usize| args.get(i).and_then(Value::as_str);
    let count = |c: char| text.matches(c).count();
    match name {
        "|replace" | ".replace" => {
            let (from, to) = (other(1).unwrap_or_default(), other(2).unwrap_or_default());
            check_len(text.len().saturating_add(text.matches(from).count().saturating_mul(to.len())))
        }
        "|indent" => {
            let number = |v: &Value| f64::try_from(v.clone()).map_or(0, |n| n.clamp(0.0, 4096.0) as usize);
            let keyword = |v: &Value| v.get_attr("width").map_or(0, |v| number(&v));
            let width = args.iter().skip(1).map(|v| if v.is_kwargs() { keyword(v) } else { number(v) });
            let lines = count('\n') + 1;
            check_len(text.len().saturating_add(lines.saturating_mul(width.max().unwrap_or(0).max(4))))
        }
        // A width has three digits at most.
        "|format" | ".format" | "%" => {
            let pieces = count('%') + count('{');
            check_len(text.len().saturating_add(pieces.saturating_mul(1000 + bytes - text.len().min(bytes))))
        }
        "|list" | "|batch" | "|slice" | "|sort" | "|unique" | "|groupby" | "|zip" | "|chain" | "|lines"
        | "|split" | ".split" | ".rsplit" | ".splitlines" => {
            let parts = match (name, other(1)) {
                ("|split" | ".split" | ".rsplit", Some(at)) => text.matches(at).count(),
                (".splitlines" | "|lines", _) => count('\n') + count('\r'),
                _ => text.len(),
            };
            if parts > most { Err(fail("makes a value that is too large")) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

/// Methods of texts, lists and dictionaries: Python's.
pub fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Made {
    let first = args.first().and_then(Value::as_str);
    match (value.as_str(), name, first) {
        (Some(s), "removeprefix", Some(p)) => Ok(Value::from(s.strip_prefix(p).unwrap_or(s))),
        (Some(s), "removesuffix", Some(p)) => Ok(Value::from(s.strip_suffix(p).unwrap_or(s))),
        (Some(s), "partition" | "rpartition", Some(p)) => {
            let (found, rest) = match name {
                "partition" => (s.split_once(p), [s, "", ""]),
                _ => (s.rsplit_once(p), ["", "", s]),
            };
            let parts = found.map_or(rest, |(before, after)| [before, p, after]);
            Ok(parts.into_iter().map(Value::from).collect())
        }
        (Some(s), "rsplit", separator) => {
            let n =
                args.get(1).and_then(Value::as_i64).filter(|n| *n >= 0).map_or(usize::MAX, |n| n as usize);
            let mut parts: Vec<&str> = match separator {
                Some("") => return Err(fail("splits at nothing")),
                Some(p) => s.rsplitn(n.saturating_add(1), p).collect(),
                None => s.split_whitespace().rev().collect(),
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        (Some(s), "replace", Some(from)) => {
            let to = args.get(1).and_then(Value::as_str).unwrap_or_default();
            check_len(s.len().saturating_add(s.matches(from).count().saturating_mul(to.len())))?;
            minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
        }
        (Some(s), "join", _) => joined(args.first().unwrap_or(&Value::UNDEFINED), s, None),
        (Some(s), "zfill" | "ljust" | "rjust", _) => {
            let width = args.first().and_then(Value::as_i64).unwrap_or(0).clamp(0, 1 << 16) as usize;
            let missing = width.saturating_sub(s.chars().count());
            let fill = if name == "zfill" { "0" } else { args.get(1).and_then(Value::as_str).unwrap_or(" ") };
            let fill =
                fill.get(..fill.chars().next().map_or(0, char::len_utf8)).unwrap_or(" ").repeat(missing);
            Ok(Value::from(if name == "ljust" { format!("{s}{fill}") } else { format!("{fill}{s}") }))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `trim(value, characters)`, of whatever has a text.
pub fn trim(value: &Value, characters: Option<String>) -> Made {
    let text = text(value)?;
    Ok(Value::from(match characters {
        None => text.trim(),
        Some(set) => text.trim_matches(|c| set.contains(c)),
    }))
}

/// A test of one value.
type Test = fn(&Value) -> bool;

/// Tests that call more things sequences and iterables than minijinja does.
pub const TESTS: &[(&str, Test)] = &[
    ("sequence", |v| matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)),
    ("iterable", |v| {
        matches!(v.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable)
    }),
];
