//! The code of a template, and what its texts say once they are joined, as Jinja reads them.

/// The stretches of a template that are code, braces included, by their bytes.
pub(super) fn code(text: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    let mut has_raw = true;
    while let Some(open) = text.get(at..).and_then(|rest| rest.find('{')).map(|n| n + at) {
        let close = match text.as_bytes().get(open + 1) {
            Some(b'%') => "%}",
            Some(b'{') => "}}",
            Some(b'#') => {
                let rest = text.get(open + 2..).unwrap_or_default();
                at = rest.find("#}").map_or(text.len(), |n| open + 2 + n + 2);
                continue;
            }
            _ => {
                at = open + 1;
                continue;
            }
        };
        if let Some(end) = tag(text, open, "raw") {
            // What has no end is no template; better that it is looked at.
            let past = Some(end).filter(|_| has_raw).and_then(|end| end_of_raw(text, end));
            has_raw = past.is_some();
            at = past.unwrap_or(end);
            continue;
        }
        let end = closing(text, open + 2, close);
        found.push((open, end));
        at = end;
    }
    found
}

/// Where `{% name %}` that begins at `open` ends.
fn tag(text: &str, open: usize, name: &str) -> Option<usize> {
    let rest = text.get(open..)?.strip_prefix("{%")?;
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    let rest = rest.trim_start().strip_prefix(name)?.trim_start();
    let rest = rest.strip_prefix(['-', '+']).unwrap_or(rest).strip_prefix("%}")?;
    Some(text.len() - rest.len())
}

fn end_of_raw(text: &str, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let open = text.get(at..)?.find("{%")? + at;
        if let Some(end) = tag(text, open, "endraw") {
            return Some(end);
        }
        at = open + 2;
    }
}

/// Where code that begins at `from` ends: braces within quotes or other brackets do not count.
fn closing(text: &str, from: usize, close: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut quote, mut depth) = (None, 0_usize);
    let mut at = from;
    while let Some(&byte) = bytes.get(at) {
        match quote {
            Some(_) if byte == b'\\' => at += 1,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if depth == 0 && bytes.get(at..).is_some_and(|rest| rest.starts_with(close.as_bytes())) => {
                return at + close.len();
            }
            None => match byte {
                b'\'' | b'"' => quote = Some(byte),
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            },
        }
        at += 1;
    }
    text.len()
}

enum Token<'a> {
    /// A text, and whether it is spelled as it reads.
    Text(String, bool),
    Name(&'a str),
    Number(usize),
    Sign(char),
}

struct Placed<'a> {
    token: Token<'a>,
    from: usize,
    to: usize,
}

impl Placed<'_> {
    fn is(&self, sign: char) -> bool {
        matches!(self.token, Token::Sign(c) if c == sign)
    }
}

/// The tokens of one stretch.
fn tokens(text: &str, (from, to): (usize, usize)) -> Vec<Placed<'_>> {
    let code = text.get(..to).unwrap_or_default();
    let mut found = Vec::new();
    let mut at = from + 2;
    while let Some(c) = code.get(at..).and_then(|rest| rest.chars().next()) {
        let rest = code.get(at..).unwrap_or_default();
        let mut end = at + c.len_utf8();
        let token = match c {
            c if c.is_whitespace() => {
                at = end;
                continue;
            }
            '\'' | '"' => {
                let inner = quoted(rest, c);
                end = (end + inner.len() + 1).min(code.len());
                let read = decoded(inner);
                let plain = read == inner;
                Token::Text(read, plain)
            }
            c if c.is_alphanumeric() || c == '_' => {
                let len = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                end = at + len;
                let word = rest.get(..len).unwrap_or_default();
                word.parse().map_or(Token::Name(word), Token::Number)
            }
            c => Token::Sign(c),
        };
        found.push(Placed { token, from: at, to: end });
        at = end;
    }
    found
}

/// What stands between the quotes that `rest` begins with.
fn quoted(rest: &str, quote: char) -> &str {
    let inner = rest.get(1..).unwrap_or_default();
    let mut escaped = false;
    let end = inner.char_indices().find(|&(_, c)| {
        let ends = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    inner.get(..end.map_or(inner.len(), |(n, _)| n)).unwrap_or_default()
}

/// A text as Python reads it. Of characters by name, the one that matters.
fn decoded(inner: &str) -> String {
    let mut out = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(c) = rest.chars().next() {
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
        let Some(kind) = rest.chars().next().filter(|_| c == '\\') else {
            out.push(c);
            continue;
        };
        let after = rest.get(kind.len_utf8()..).unwrap_or_default();
        let number = |digits: &str, radix| u32::from_str_radix(digits, radix).ok().and_then(char::from_u32);
        let hex = |n: usize| Some((number(after.get(..n)?, 16)?, after.get(n..)?));
        let found = match kind {
            'n' => Some(('\n', after)),
            'r' => Some(('\r', after)),
            't' => Some(('\t', after)),
            'x' => hex(2),
            'u' => hex(4),
            'U' => hex(8),
            'N' => after
                .strip_prefix('{')
                .and_then(|name| name.split_once('}'))
                .map(|(name, after)| (if name.eq_ignore_ascii_case("low line") { '_' } else { '?' }, after)),
            '0'..='7' => {
                let digits = rest.chars().take(3).take_while(|c| c.is_digit(8)).count();
                rest.split_at_checked(digits).and_then(|(d, after)| Some((number(d, 8)?, after)))
            }
            '\\' | '\'' | '"' => Some((kind, after)),
            _ => None,
        };
        match found {
            Some((c, after)) => {
                out.push(c);
                rest = after;
            }
            None => out.push('\\'),
        }
    }
    out
}

/// What code spells in a way that its words do not show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hidden {
    /// Names of Python's internals.
    Attribute,
    /// Functions that run programs or read files.
    Code,
}

/// Functions that are nobody's keys.
const FUNCTIONS: &[&str] = &["popen", "getattr", "setattr", "urlopen", "subprocess", "importlib", "builtins"];
/// Functions that may be keys, if they are not called.
const CALLED: &[&str] = &["eval", "exec", "system", "globals", "locals", "compile", "open"];
const INTERNALS: &[&str] = &["mro", "func_globals", "gi_frame"];
const KEYWORDS: &[&str] = &["in", "and", "or", "not", "if", "else", "elif", "is", "set", "for"];

/// What is hidden in one stretch, and where.
pub(super) fn hidden(text: &str, stretch: (usize, usize)) -> Vec<(Hidden, usize, usize)> {
    let tokens = tokens(text, stretch);
    let mut found = joined(&tokens);
    found.extend(computed(&tokens).map(|(from, to)| (Hidden::Attribute, from, to)));
    found.sort_by_key(|f| f.1);
    found
}

/// Texts that are written one behind the other, or repeated.
fn joined(tokens: &[Placed<'_>]) -> Vec<(Hidden, usize, usize)> {
    let mut found = Vec::new();
    let mut i = 0;
    while let Some(first) = tokens.get(i) {
        let Token::Text(text, plain) = &first.token else {
            i += 1;
            continue;
        };
        let mut is_plain = *plain;
        let before = |n: usize| i.checked_sub(n).and_then(|i| tokens.get(i));
        let outer = tokens.get(..i).unwrap_or_default().iter().rev().find(|t| !t.is('('));
        let is_subscript = outer.is_some_and(|t| t.is('['));
        let mut all = match (before(2).map(|t| &t.token), before(1)) {
            (Some(&Token::Number(n)), Some(star)) if star.is('*') && n <= 16 => {
                is_plain = false;
                text.repeat(n)
            }
            _ => text.clone(),
        };
        let mut last = text.as_str();
        let mut to = first.to;
        let mut next = i + 1;
        loop {
            // Brackets around parts change nothing.
            let mut at = next;
            let bracket = |at: usize| tokens.get(at).is_some_and(|t| t.is('(') || t.is(')'));
            while bracket(at) {
                at += 1;
            }
            let sign = tokens.get(at).filter(|t| t.is('~') || t.is('+') || t.is('*'));
            let is_product = sign.is_some_and(|t| t.is('*'));
            at += usize::from(sign.is_some());
            while sign.is_some() && bracket(at) {
                at += 1;
            }
            let Some(part) = tokens.get(at) else { break };
            match &part.token {
                Token::Number(n) if is_product && *n <= 16 => {
                    all.truncate(all.len() - last.len().min(all.len()));
                    all.push_str(&last.repeat(*n));
                    last = "";
                }
                Token::Text(more, _) if !is_product && (sign.is_some() || at == next) => {
                    all.push_str(more);
                    last = more;
                }
                _ => break,
            }
            is_plain = false;
            (to, next) = (part.to, at + 1);
        }
        let spelled = |from: usize| {
            let rest = all.get(from..).unwrap_or_default();
            let len = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
            rest.get(2..len).is_some_and(|name| name.len() > 2 && name.ends_with("__"))
        };
        let is_internal = all.starts_with("__")
            || all.ends_with("__")
            || all.match_indices("__").take(64).any(|(at, _)| spelled(at));
        // `%c` makes characters of numbers.
        let is_character = all.contains("%c") || all.contains(":c}");
        let word = all.as_str();
        let mut behind = tokens.get(next..).unwrap_or_default().iter().skip_while(|t| t.is(')'));
        let is_key = is_subscript && behind.next().is_some_and(|t| t.is(']'));
        let is_call = behind.next().is_some_and(|t| t.is('('));
        if !is_plain && is_internal || is_character || is_key && INTERNALS.contains(&word) {
            found.push((Hidden::Attribute, first.from, to));
        }
        if is_key && (FUNCTIONS.contains(&word) || is_call && CALLED.contains(&word)) {
            found.push((Hidden::Code, first.from, to));
        }
        i = next;
    }
    found
}

/// An open bracket, and what was seen within.
#[derive(Default)]
struct Open {
    from: usize,
    /// What is in it names a part of something else.
    names: bool,
    /// It is worked out.
    computed: bool,
    /// It has texts of underscores.
    underscores: bool,
}

/// Subscripts and `attribute=` whose value is put together with underscores.
fn computed<'a>(tokens: &'a [Placed<'_>]) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut open: Vec<Open> = Vec::new();
    tokens.iter().enumerate().filter_map(move |(i, placed)| {
        let before = i.checked_sub(1).and_then(|i| tokens.get(i));
        let top = open.last_mut();
        match (&placed.token, top) {
            (Token::Sign('[' | '(' | '{'), _) => {
                let is_operand = before.is_some_and(|t| match &t.token {
                    Token::Name(name) => !KEYWORDS.contains(name),
                    Token::Text(..) => true,
                    Token::Sign(c) => matches!(c, ']' | ')'),
                    Token::Number(_) => false,
                });
                open.push(Open { from: placed.from, names: placed.is('[') && is_operand, ..Open::default() });
                None
            }
            (Token::Sign(']' | ')' | '}'), Some(_)) => {
                let closed = open.pop()?;
                if let Some(outer) = open.last_mut().filter(|_| !closed.names) {
                    outer.underscores |= closed.underscores;
                    outer.computed |= closed.computed;
                }
                (closed.names && closed.computed && closed.underscores).then_some((closed.from, placed.to))
            }
            (Token::Sign('='), Some(top)) => {
                let is_attribute = before.is_some_and(|t| matches!(t.token, Token::Name("attribute")));
                if is_attribute {
                    *top = Open { from: placed.from, names: true, ..Open::default() };
                }
                None
            }
            (Token::Sign(','), Some(top)) => {
                let ended = std::mem::replace(top, Open { from: placed.from, ..Open::default() });
                (ended.names && ended.computed && ended.underscores).then_some((ended.from, placed.from))
            }
            (Token::Sign('~' | '+' | '*' | '%' | '|'), Some(top)) => {
                top.computed = true;
                None
            }
            (Token::Text(text, _), Some(top)) => {
                let is_part = !text.is_empty() && text.chars().all(|c| c == '_');
                top.underscores |= is_part || text.contains("__");
                None
            }
            _ => None,
        }
    })
}
