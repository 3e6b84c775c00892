//! Expressions of architecture files: total, without loops or I/O.
//!
//! ```text
//! num_key_value_heads ?? n_heads          first that is not null
//! rope.rope_type == "llama3" ? 8 : 1      comparison and choice
//! per_layer((i + 1) % 4 == 0, n_layers)   a list with one value a layer
//! ```
//!
//! A name is a variable of the file, a value the converter provides (`rope`, `tokenizer`,
//! `file_type`), or a key of config.json; `.` and `[...]` reach into it. What is missing is
//! `null`, and arithmetic with `null` is `null`. Integers are 64-bit and checked; `/` divides
//! integers only exactly.

use serde_json::Value as Json;

use super::fuel::Step;
use crate::error::{Error, Result};

/// A parsed expression.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    /// A literal.
    Literal(Json),
    /// A name.
    Name(String),
    /// `a.name`
    Field(Box<Expr>, String),
    /// `a[i]`
    Index(Box<Expr>, Box<Expr>),
    /// `!a`, `-a`
    Unary(char, Box<Expr>),
    /// `a op b`
    Binary(&'static str, Box<Expr>, Box<Expr>),
    /// `a ? b : c`
    Choice(Box<Expr>, Box<Expr>, Box<Expr>),
    /// `f(a, ...)`
    Call(String, Vec<Expr>),
    /// `[a, ...]`
    List(Vec<Expr>),
    /// `{ name: a, ... }`
    Object(Vec<(String, Expr)>),
}

/// What names mean.
pub trait Scope {
    /// The value of a name; `None` when nobody knows it (which then reads as `null`).
    fn get(&self, name: &str) -> Result<Option<Json>>;
}

// Operators by rising precedence; all group to the left.
const LEVELS: &[&[&str]] =
    &[&["??"], &["||"], &["&&"], &["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];
const MAX_DEPTH: u32 = 64;
const MAX_LIST: i64 = 1 << 16;
/// Most operators, fields and indexes in one expression, which bounds how deep its tree is.
const MAX_OPERATORS: u32 = 256;
/// Bytes of one expression.
const MAX_TEXT: usize = 1 << 14;

impl Expr {
    /// Parses `text`.
    ///
    /// # Errors
    /// `Malformed`, with the position, when it is no expression.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_TEXT {
            return Err(Error::limit(format!(
                "an expression of {} bytes, at most {MAX_TEXT} are allowed",
                text.len()
            )));
        }
        let mut p = Parser { text, at: 0, depth: 0, operators: 0 };
        let e = p.choice()?;
        p.space();
        if p.at < text.len() {
            return Err(p.fail("an operator or the end"));
        }
        Ok(e)
    }

    /// Evaluates in `scope`.
    ///
    /// # Errors
    /// `Malformed` when types do not fit, numbers overflow, or a division has a remainder; `Limit` for more steps,
    /// larger values or deeper variables than any definition needs (`fuel.rs`).
    pub fn eval(&self, scope: &dyn Scope) -> Result<Json> {
        let step = Step::begin()?;
        let value = self.value(scope)?;
        step.end(&value)?;
        Ok(value)
    }

    fn value(&self, scope: &dyn Scope) -> Result<Json> {
        Ok(match self {
            Self::Literal(v) => v.clone(),
            Self::Name(n) => scope.get(n)?.unwrap_or(Json::Null),
            Self::Field(a, f) => a.eval(scope)?.get(f).cloned().unwrap_or(Json::Null),
            Self::Index(a, i) => {
                let i = i.eval(scope)?;
                let a = a.eval(scope)?;
                match (&a, i.as_u64()) {
                    (Json::Array(list), Some(i)) => list.get(i as usize).cloned().unwrap_or(Json::Null),
                    (Json::String(s), Some(i)) => {
                        let end = usize::try_from(i).ok().and_then(|i| i.checked_add(1));
                        end.and_then(|end| s.get(end - 1..end)).map_or(Json::Null, Json::from)
                    }
                    (Json::Object(map), n) => {
                        let key = n.map(|n| n.to_string()).or(i.as_str().map(str::to_string));
                        key.and_then(|k| map.get(&k)).cloned().unwrap_or(Json::Null)
                    }
                    _ => Json::Null,
                }
            }
            Self::Unary('!', a) => Json::Bool(!truth(&a.eval(scope)?)),
            Self::Unary(_, a) => arithmetic("-", &Json::from(0), &a.eval(scope)?)?,
            Self::Choice(a, b, c) => if truth(&a.eval(scope)?) { b } else { c }.eval(scope)?,
            Self::Binary(op, a, b) => {
                let a = a.eval(scope)?;
                match *op {
                    "??" if !a.is_null() => a,
                    "??" => b.eval(scope)?,
                    "&&" if !truth(&a) => Json::Bool(false),
                    "||" if truth(&a) => Json::Bool(true),
                    "&&" | "||" => Json::Bool(truth(&b.eval(scope)?)),
                    _ => binary(op, &a, &b.eval(scope)?)?,
                }
            }
            Self::Call(f, args) => call(f, args, scope)?,
            Self::List(items) => items.iter().map(|e| e.eval(scope)).collect::<Result<Vec<_>>>()?.into(),
            Self::Object(entries) => Json::Object(
                entries.iter().map(|(k, e)| Ok((k.clone(), e.eval(scope)?))).collect::<Result<_>>()?,
            ),
        })
    }

    /// The name that comes first in `a ?? b ?? ...`.
    pub fn first_name(&self) -> Option<&Expr> {
        match self {
            Self::Name(_) | Self::Field(..) => Some(self),
            Self::Binary("??", a, _) => a.first_name(),
            _ => None,
        }
    }

    /// Whether this is a chain of names, with a literal at its end at most: what a config says,
    /// and nothing computed.
    pub fn is_alias_chain(&self) -> bool {
        match self {
            Self::Name(_) | Self::Field(..) | Self::Literal(_) => true,
            Self::Binary("??", a, b) => a.is_alias_chain() && b.is_alias_chain(),
            _ => false,
        }
    }
}

/// What counts as true: everything but `null`, `false`, zero, and what is empty.
pub fn truth(v: &Json) -> bool {
    match v {
        Json::Null => false,
        Json::Bool(b) => *b,
        Json::Number(n) => n.as_f64() != Some(0.0),
        Json::String(s) => !s.is_empty(),
        Json::Array(a) => !a.is_empty(),
        Json::Object(o) => !o.is_empty(),
    }
}

fn binary(op: &str, a: &Json, b: &Json) -> Result<Json> {
    let order = || match (a.as_f64(), b.as_f64()) {
        (Some(x), Some(y)) => x.partial_cmp(&y),
        _ => None,
    };
    Ok(match op {
        "==" | "!=" => {
            let same = match (a.as_f64(), b.as_f64()) {
                (Some(x), Some(y)) => x == y,
                _ => a == b,
            };
            Json::Bool(same == (op == "=="))
        }
        "<" => Json::Bool(order().is_some_and(|o| o.is_lt())),
        "<=" => Json::Bool(order().is_some_and(|o| o.is_le())),
        ">" => Json::Bool(order().is_some_and(|o| o.is_gt())),
        ">=" => Json::Bool(order().is_some_and(|o| o.is_ge())),
        _ => arithmetic(op, a, b)?,
    })
}

fn arithmetic(op: &str, a: &Json, b: &Json) -> Result<Json> {
    if a.is_null() || b.is_null() {
        return Ok(Json::Null);
    }
    let fail = |why: &str| Error::malformed(format!("{a} {op} {b}: {why}"));
    if let (Some(x), Some(y)) = (a.as_i64(), b.as_i64()) {
        let v = match op {
            "+" => x.checked_add(y),
            "-" => x.checked_sub(y),
            "*" => x.checked_mul(y),
            "/" if y != 0 && x.checked_rem(y) != Some(0) => return Err(fail("does not divide")),
            "/" => x.checked_div(y),
            _ => x.checked_rem_euclid(y),
        };
        return v.map(Json::from).ok_or_else(|| fail("overflows or divides by zero"));
    }
    if let (Json::String(x), Json::String(y), "+") = (a, b, op) {
        return Ok(Json::from(format!("{x}{y}")));
    }
    if let (Json::String(x), Json::Number(y), "+") = (a, b, op) {
        return Ok(Json::from(format!("{x}{y}")));
    }
    let (Some(x), Some(y)) = (a.as_f64(), b.as_f64()) else {
        return Err(fail("not numbers"));
    };
    number(match op {
        "+" => x + y,
        "-" => x - y,
        "*" => x * y,
        "/" => x / y,
        _ => x % y,
    })
}

fn number(v: f64) -> Result<Json> {
    serde_json::Number::from_f64(v)
        .map(Json::Number)
        .ok_or_else(|| Error::malformed("an expression gives a number that is not finite"))
}

struct WithLayer<'a>(&'a dyn Scope, i64);

impl Scope for WithLayer<'_> {
    fn get(&self, name: &str) -> Result<Option<Json>> {
        if name == "i" { Ok(Some(self.1.into())) } else { self.0.get(name) }
    }
}

fn call(name: &str, args: &[Expr], scope: &dyn Scope) -> Result<Json> {
    let fail = |why: &str| Error::malformed(format!("{name}(): {why}"));
    if name == "per_layer" {
        let [e, n] = args else { return Err(fail("takes an expression and a count")) };
        let n = n.eval(scope)?.as_i64().filter(|n| (0..=MAX_LIST).contains(n));
        let n = n.ok_or_else(|| fail("the count is not a number of layers"))?;
        return (0..n).map(|i| e.eval(&WithLayer(scope, i))).collect::<Result<Vec<_>>>().map(Json::Array);
    }
    let values = args.iter().map(|a| a.eval(scope)).collect::<Result<Vec<_>>>()?;
    let f64_of = |v: &Json| v.as_f64().ok_or_else(|| fail(&format!("{v} is not a number")));
    match (name, values.as_slice()) {
        (
            "sqrt" | "ln" | "pow" | "ceil" | "floor" | "round" | "round_up" | "min" | "max" | "sum" | "len"
            | "int",
            [Json::Null, ..],
        ) => Ok(Json::Null),
        ("sqrt", [v]) => number(f64_of(v)?.sqrt()),
        ("ln", [v]) => number(f64_of(v)?.ln()),
        ("pow", [v, exponent]) => number(f64_of(v)?.powf(f64_of(exponent)?)),
        ("ceil", [v]) => Ok(Json::from(f64_of(v)?.ceil() as i64)),
        ("floor" | "int", [v]) => Ok(Json::from(f64_of(v)?.floor() as i64)),
        ("round", [v]) => Ok(Json::from(f64_of(v)?.round_ties_even() as i64)),
        ("round_up", [v, m]) => match (v.as_u64(), m.as_u64()) {
            (Some(v), Some(m)) => v
                .checked_next_multiple_of(m)
                .map(Json::from)
                .ok_or_else(|| fail("overflows or divides by zero")),
            _ => Err(fail("takes two integers")),
        },
        ("min" | "max", [a, b]) => {
            let first = (f64_of(a)? < f64_of(b)?) == (name == "min");
            Ok(if first { a.clone() } else { b.clone() })
        }
        ("min" | "max", [Json::Array(list)]) => {
            let mut best = Json::Null;
            for v in list {
                if best.is_null() || (f64_of(v)? < f64_of(&best)?) == (name == "min") {
                    best = v.clone();
                }
            }
            Ok(best)
        }
        ("sum", [Json::Array(list)]) => list.iter().try_fold(Json::from(0), |s, v| arithmetic("+", &s, v)),
        ("where", [Json::Array(list)]) => {
            Ok((0..list.len()).filter(|&i| truth(&list[i])).map(Json::from).collect::<Vec<_>>().into())
        }
        ("len", [Json::Array(a)]) => Ok(Json::from(a.len())),
        ("len", [Json::String(s)]) => Ok(Json::from(s.len())),
        ("len", [Json::Object(map)]) => Ok(Json::from(map.len())),
        ("numbered", [Json::Array(list)]) => {
            Ok(Json::Object(list.iter().enumerate().map(|(i, v)| (i.to_string(), v.clone())).collect()))
        }
        ("numbered", [_]) => Ok(Json::Null),
        ("contains", [Json::Array(a), v]) => Ok(Json::Bool(a.contains(v))),
        ("contains", [Json::String(s), Json::String(v)]) => Ok(Json::Bool(s.contains(v.as_str()))),
        ("contains", [_, _]) => Ok(Json::Bool(false)),
        ("index_of", [Json::Array(a), v]) => Ok(a.iter().position(|x| x == v).map_or(Json::Null, Json::from)),
        ("index_of", [_, _]) => Ok(Json::Null),
        ("lower", [Json::String(s)]) => Ok(Json::from(s.to_lowercase())),
        ("lower", [v]) => Ok(v.clone()),
        _ => Err(fail("no such function with these arguments")),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
    operators: u32,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn fail(&self, expected: &str) -> Error {
        Error::malformed(format!("expression {:?}, position {}: expected {expected}", self.text, self.at))
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<()> {
        if self.eat(token) { Ok(()) } else { Err(self.fail(token)) }
    }

    /// Counts what makes the tree deeper by one.
    fn operator(&mut self) -> Result<()> {
        self.operators += 1;
        if self.operators > MAX_OPERATORS { Err(self.fail("fewer operators")) } else { Ok(()) }
    }

    fn choice(&mut self) -> Result<Expr> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.fail("less nesting"));
        }
        let condition = self.level(0)?;
        let e = if self.eat("?") {
            let yes = self.choice()?;
            self.expect(":")?;
            Expr::Choice(Box::new(condition), Box::new(yes), Box::new(self.choice()?))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(e)
    }

    fn level(&mut self, level: usize) -> Result<Expr> {
        let Some(&operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.level(level + 1)?;
        'next: loop {
            for &op in operators {
                if self.eat(op) {
                    self.operator()?;
                    let right = self.level(level + 1)?;
                    left = Expr::Binary(op, Box::new(left), Box::new(right));
                    continue 'next;
                }
            }
            return Ok(left);
        }
    }

    fn unary(&mut self) -> Result<Expr> {
        for op in ['!', '-'] {
            if self.eat(op.encode_utf8(&mut [0; 4])) {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return Err(self.fail("less nesting"));
                }
                let e = Expr::Unary(op, Box::new(self.unary()?));
                self.depth -= 1;
                return Ok(e);
            }
        }
        let mut e = self.atom()?;
        loop {
            if self.eat(".") {
                self.operator()?;
                e = Expr::Field(Box::new(e), self.name()?);
            } else if self.eat("[") {
                self.operator()?;
                let i = self.choice()?;
                self.expect("]")?;
                e = Expr::Index(Box::new(e), Box::new(i));
            } else {
                return Ok(e);
            }
        }
    }

    fn name(&mut self) -> Result<String> {
        self.space();
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let n = self.rest().find(|c| !word(c)).unwrap_or(self.rest().len());
        if n == 0 || self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            return Err(self.fail("a name"));
        }
        let name = self.rest()[..n].to_string();
        self.at += n;
        Ok(name)
    }

    fn list(&mut self, end: &str) -> Result<Vec<Expr>> {
        let mut items = Vec::new();
        while !self.eat(end) {
            if !items.is_empty() {
                self.expect(",")?;
            }
            items.push(self.choice()?);
        }
        Ok(items)
    }

    fn atom(&mut self) -> Result<Expr> {
        if self.eat("[") {
            return Ok(Expr::List(self.list("]")?));
        }
        if self.eat("{") {
            let mut entries = Vec::new();
            while !self.eat("}") {
                if !entries.is_empty() {
                    self.expect(",")?;
                }
                let name = self.name()?;
                self.expect(":")?;
                entries.push((name, self.choice()?));
            }
            return Ok(Expr::Object(entries));
        }
        if self.eat("(") {
            let e = self.choice()?;
            self.expect(")")?;
            return Ok(e);
        }
        self.space();
        let rest = self.rest();
        if let Some(quote) = rest.chars().next().filter(|c| matches!(c, '\'' | '"')) {
            let body = &rest[1..];
            let end = body.find(quote).ok_or_else(|| self.fail("a closing quote"))?;
            let literal = Expr::Literal(Json::from(&body[..end]));
            self.at += end + 2;
            return Ok(literal);
        }
        if rest.starts_with(|c: char| c.is_ascii_digit()) {
            let bytes = rest.as_bytes();
            let mut n = 0;
            while n < bytes.len()
                && (bytes[n].is_ascii_digit()
                    || matches!(bytes[n], b'.' | b'e' | b'E')
                    || (matches!(bytes[n], b'+' | b'-') && matches!(bytes[n - 1], b'e' | b'E')))
            {
                n += 1;
            }
            let digits = &rest[..n];
            let value = match digits.parse::<i64>() {
                Ok(v) => Json::from(v),
                Err(_) => number(digits.parse::<f64>().map_err(|_| self.fail("a number"))?)?,
            };
            self.at += n;
            return Ok(Expr::Literal(value));
        }
        let name = self.name()?;
        if self.eat("(") {
            return Ok(Expr::Call(name, self.list(")")?));
        }
        Ok(match name.as_str() {
            "true" => Expr::Literal(Json::Bool(true)),
            "false" => Expr::Literal(Json::Bool(false)),
            "null" => Expr::Literal(Json::Null),
            _ => Expr::Name(name),
        })
    }
}

impl<'de> serde::Deserialize<'de> for Expr {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Json::deserialize(d)? {
            Json::String(s) => Self::parse(&s).map_err(serde::de::Error::custom),
            v => Ok(Self::Literal(v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    struct Map(Json);
    impl Scope for Map {
        fn get(&self, name: &str) -> Result<Option<Json>> {
            Ok(self.0.get(name).cloned())
        }
    }

    fn eval(text: &str) -> Result<Json> {
        let scope = Map(json!({"h": 8, "kv": null, "d": 0.5, "rope": {"type": "yarn"}, "list": ["a", "b"]}));
        Expr::parse(text)?.eval(&scope)
    }

    #[test]
    fn values() {
        for (text, expected) in [
            ("1 + 2 * 3", json!(7)),
            ("kv ?? h", json!(8)),
            ("nothing ?? kv ?? 3", json!(3)),
            ("(h - 2) / 3", json!(2)),
            ("h * d", json!(4.0)),
            ("-h + 1", json!(-7)),
            ("rope.type == 'yarn' ? h : 1", json!(8)),
            ("rope.nothing.deeper", json!(null)),
            ("list[1]", json!("b")),
            ("contains(list, 'a') && !contains(list, 'c')", json!(true)),
            ("per_layer((i + 1) % 3 == 0, 4)", json!([false, false, true, false])),
            ("round_up(h + 1, 4)", json!(12)),
            ("kv + 1", json!(null)),
            ("1e-6 < 0.1", json!(true)),
            ("h >= 8 && h != 9", json!(true)),
            ("contains(['x', rope.type], 'yarn')", json!(true)),
            ("rope['type']", json!("yarn")),
            ("{ a: h, b: { c: [kv] } }", json!({"a": 8, "b": {"c": [null]}})),
            ("where([0, 'x', false, true])", json!([1, 3])),
            ("[rope.type[1], rope.type[4]]", json!(["a", null])),
            ("'blk.' + h + '.x'", json!("blk.8.x")),
            ("pow(h, 2)", json!(64.0)),
            ("round(h * 0.4375)", json!(4)),
            ("sum(per_layer(i, 4)) + sum([])", json!(6)),
        ] {
            assert_eq!(eval(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn faults_are_errors() {
        for text in [
            "",
            "1 +",
            "h / 3",
            "h / 0",
            "h % 0",
            "(1",
            "{ a: 1",
            "{ 1: 1 }",
            "'a",
            "list * 2",
            "f(1)",
            "1 2",
            "9223372036854775807 + 1",
        ] {
            assert!(eval(text).is_err(), "{text}");
        }
        assert!(eval(&"(".repeat(10_000)).is_err());
        assert!(eval(&"-".repeat(10_000)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_an_expression_or_an_error(text in "[-a-z0-9 .'()?:+*/%<>=!&|\\[\\],]{0,40}") {
            let _ = eval(&text);
        }
    }
}
