//! Running a template within bounds.
//!
//! minijinja counts instructions, but one instruction can double a text, copy a list, or compare two
//! nested ones. So the template is compiled first, and each instruction that makes or walks through
//! values is replaced by a call of a function of ours, under a name that no template can use (`+`,
//! `|join`, `.split`). It looks at what it is given and at what it gives.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use minijinja::machinery::{
    CompiledTemplate, Instruction, TemplateConfig, Token, Vm, WhitespaceConfig, make_string_output, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, functions};
use regex::Regex;
use serde_json::{Map, Value as Json};

use super::{clock, python};

/// Instructions that a template may execute.
const FUEL: u64 = 5_000_000;
/// Time that it may take.
const TIME: Duration = Duration::from_secs(10);
/// Bytes of a template, and of what it writes.
const TEMPLATE_BYTES: usize = 1 << 20;
const OUTPUT_BYTES: usize = 16 << 20;
/// Bytes of all values that it makes, whether they are still there or not.
const MADE_BYTES: usize = 256 << 20;
/// Size and depth of one value: elements, and bytes of text, of all that is in it.
const VALUE_ELEMENTS: usize = 1 << 20;
const VALUE_BYTES: usize = 16 << 20;
const VALUE_DEPTH: usize = 48;

type Made = Result<Value, Error>;

pub(super) fn fail(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.into())
}

/// What a rendering has used up.
struct Meter {
    made: AtomicUsize,
    deadline: Instant,
}

/// Size of a value with all that is in it.
#[derive(Default)]
struct Size {
    elements: usize,
    bytes: usize,
}

impl Size {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.elements += 1;
        self.bytes += 32 + value.as_str().map_or(0, str::len);
        if self.elements > VALUE_ELEMENTS || self.bytes > 2 * VALUE_BYTES {
            return Err(fail("makes a value that is too large"));
        }
        let kind = value.kind();
        if matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            if depth == VALUE_DEPTH {
                return Err(fail("nests its values too deep"));
            }
            for item in value.try_iter()? {
                if kind == ValueKind::Map {
                    self.add(&value.get_item(&item)?, depth + 1)?;
                }
                self.add(&item, depth + 1)?;
            }
        }
        Ok(())
    }
}

impl Meter {
    /// Whether what goes in is of a size, so that walking through it ends.
    fn take(&self, args: &[Value]) -> Result<(), Error> {
        if Instant::now() > self.deadline {
            return Err(fail("takes too long"));
        }
        let mut size = Size::default();
        args.iter().try_for_each(|arg| size.add(arg, 0))
    }

    /// What was made, counted, and no longer lazy.
    fn give(&self, value: Value) -> Made {
        let mut size = Size::default();
        size.add(&value, 0)?;
        self.spend(size.bytes)?;
        if value.kind() != ValueKind::Iterable {
            return Ok(value);
        }
        Ok(Value::from(value.try_iter()?.collect::<Vec<_>>()))
    }

    fn spend(&self, bytes: usize) -> Result<(), Error> {
        if self.made.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > MADE_BYTES {
            return Err(fail("makes more values than it may"));
        }
        Ok(())
    }
}

/// The text, or why there is none: "does not end within ...".
pub(super) fn render(template: &str, variables: &Map<String, Json>, now: i64) -> Result<String, String> {
    if template.len() > TEMPLATE_BYTES {
        return Err(format!("is longer than {TEMPLATE_BYTES} bytes"));
    }
    // transformers adds a tag that marks the assistant's text, for training; it prints nothing.
    static GENERATION: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%(-?)\s*(end)?generation\s*(-?)%\}").expect("a valid pattern"));
    let template = GENERATION.replace_all(template, |c: &regex::Captures<'_>| {
        let tag = if c.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {tag} {}%}}", &c[1], &c[3])
    });
    // Jinja ends a template's last line without its line break.
    let template = template.strip_suffix('\n').unwrap_or(&template);
    run(template, variables, now).map_err(|e| fault(&e))
}

fn run(source: &str, variables: &Map<String, Json>, now: i64) -> Result<String, Error> {
    let ws_config = WhitespaceConfig { keep_trailing_newline: true, lstrip_blocks: true, trim_blocks: true };
    check_products(source, ws_config)?;
    let syntax_config = SyntaxConfig;
    let config =
        TemplateConfig { syntax_config, ws_config, default_auto_escape: Arc::new(|_| AutoEscape::None) };
    let mut compiled = CompiledTemplate::new("chat_template", source, &config)?;
    if !compiled.blocks.is_empty() {
        return Err(fail("has blocks, which a chat template has no use for"));
    }
    let meter = Arc::new(Meter { made: AtomicUsize::new(0), deadline: Instant::now() + TIME });
    let mut env = Environment::new();
    let names = guarded_names(&compiled)?;
    let mut longest = 1;
    let code = &mut compiled.instructions;
    for i in 0..code.len() as u32 {
        let Some(instruction) = code.get_mut(i) else { break };
        if let Instruction::EmitRaw(text) = instruction {
            longest = text.len().max(longest);
        }
        if let Some((name, n)) = guarded(instruction) {
            let name = names.get(&name).ok_or_else(|| fail("is too large"))?;
            *instruction = Instruction::CallFunction(name, n);
        }
    }
    // Text of the template itself is not metered: so often may its longest piece be written.
    env.set_fuel(Some(FUEL.min((MADE_BYTES / longest) as u64)));
    for name in &names {
        let meter = meter.clone();
        let own = name.clone();
        env.add_function(name.as_str(), move |state: &State<'_, '_>, args: Rest<Value>| {
            meter.take(&args)?;
            meter.give(operation(&own, state, &args)?)
        });
    }
    env.set_unknown_method_callback(python::method);
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", |v: Value| python::text(&v));
    env.add_filter("join", python::join);
    env.add_filter("trim", python::trim);
    env.add_filter("upper", |v: Value| python::text(&v).map(|t| t.to_uppercase()));
    env.add_filter("lower", |v: Value| python::text(&v).map(|t| t.to_lowercase()));
    for (name, test) in python::TESTS {
        env.add_test(*name, *test);
    }
    env.add_function("raise_exception", |message: String| -> Made {
        Err(Error::new(ErrorKind::InvalidOperation, format!("refuses the messages: {message}")))
    });
    env.add_function("strftime_now", move |format: &str| clock::strftime(format, now));
    env.remove_global("debug");
    for name in ["dict", "namespace"] {
        let meter = meter.clone();
        env.add_function(name, move |args: Rest<Value>| -> Made {
            meter.take(&args)?;
            let (kwargs, rest): (Vec<_>, Vec<_>) = args.iter().cloned().partition(Value::is_kwargs);
            let first = rest.first().or(kwargs.first()).cloned();
            match name {
                "namespace" => functions::namespace(first),
                _ => functions::dict(
                    rest.first().cloned(),
                    kwargs.first().cloned().unwrap_or_default().try_into()?,
                ),
            }
        });
    }
    let counted = meter.clone();
    env.set_formatter(move |out: &mut Output<'_>, _: &State<'_, '_>, value: &Value| {
        counted.take(std::slice::from_ref(value))?;
        let text = python::text(value)?;
        counted.spend(text.len())?;
        out.write_str(&text).map_err(Error::from)
    });
    let mut output = String::new();
    let root = Value::from_serialize(variables);
    let mut sink = make_string_output(&mut output);
    Vm::new(&env).eval(&compiled.instructions, root, &compiled.blocks, &mut sink, AutoEscape::None)?;
    drop(sink);
    if output.len() > OUTPUT_BYTES {
        return Err(fail(format!("writes more than {OUTPUT_BYTES} bytes")));
    }
    Ok(output)
}

/// The guarded function that stands for an instruction, and how many values it takes from the stack
/// (`None` where the stack says so itself).
fn guarded(instruction: &Instruction<'_>) -> Option<(String, Option<u16>)> {
    let two = |name: &str| Some((name.to_string(), Some(2)));
    match instruction {
        Instruction::Add => two("+"),
        Instruction::Mul => two("*"),
        Instruction::Rem => two("%"),
        Instruction::StringConcat => two("~"),
        Instruction::Eq => two("=="),
        Instruction::Ne => two("!="),
        Instruction::Lt => two("<"),
        Instruction::Lte => two("<="),
        Instruction::Gt => two(">"),
        Instruction::Gte => two(">="),
        Instruction::In => two("in()"),
        Instruction::GetItem => two("[]"),
        Instruction::Slice => Some(("[:]".into(), Some(4))),
        Instruction::BuildList(Some(n)) => Some(("[,]".into(), Some(u16::try_from(*n).ok()?))),
        Instruction::BuildMap(n) => Some(("{,}".into(), Some(u16::try_from(n.checked_mul(2)?).ok()?))),
        Instruction::ApplyFilter(name, n, _) => Some((format!("|{}", name.trim()), *n)),
        Instruction::PerformTest(name, n, _) => Some((format!("?{}", name.trim()), *n)),
        Instruction::CallMethod(name, n) => Some((format!(".{name}"), *n)),
        _ => None,
    }
}

/// The names of all guarded functions that the template needs.
///
/// # Errors
/// For instructions that cannot be guarded and that no chat template has a use for.
fn guarded_names(compiled: &CompiledTemplate<'_>) -> Result<BTreeSet<String>, Error> {
    let mut names = BTreeSet::new();
    for i in 0..compiled.instructions.len() as u32 {
        let Some(instruction) = compiled.instructions.get(i) else { break };
        match (guarded(instruction), instruction) {
            (Some((name, _)), _) => {
                names.insert(name);
            }
            (None, Instruction::BuildList(Some(_)) | Instruction::BuildMap(_)) => {
                return Err(fail("writes out a list that is too long"));
            }
            (None, Instruction::Include(_) | Instruction::LoadBlocks | Instruction::CallBlock(_)) => {
                return Err(fail("refers to other templates, of which there are none"));
            }
            (None, Instruction::CompareAndPreserve(_)) => {
                return Err(fail("compares three values at once"));
            }
            _ => {}
        }
    }
    Ok(names)
}

/// What a guarded function does.
fn operation(name: &str, state: &State<'_, '_>, args: &[Value]) -> Made {
    match (name, args) {
        ("+", [a, b]) => python::add(a, b),
        ("*", [a, b]) => python::multiply(a, b),
        ("%", [a, b]) if !python::widens("|format", args) => python::modulo(state, a, b),
        ("~", [a, b]) => Ok(Value::from(python::text(a)? + &python::text(b)?)),
        ("==", [a, b]) => Ok(Value::from(a == b)),
        ("!=", [a, b]) => Ok(Value::from(a != b)),
        ("<", [a, b]) => Ok(Value::from(a < b)),
        ("<=", [a, b]) => Ok(Value::from(a <= b)),
        (">", [a, b]) => Ok(Value::from(a > b)),
        (">=", [a, b]) => Ok(Value::from(a >= b)),
        ("in()", [item, container]) => python::contains(item, container),
        ("[]", [container, key]) => python::item(container, key),
        ("[:]", [value, start, stop, step]) => python::slice(value, start, stop, step),
        ("[,]", items) => Ok(Value::from(items.to_vec())),
        ("{,}", pairs) => python::map(pairs),
        _ if python::widens(name, args) => Err(fail(format!("asks {name} for too much"))),
        _ => match (name.split_at(1), args) {
            (("|", filter), args) => state.apply_filter(filter, args).map_err(|e| named(e, filter)),
            (("?", test), args) => {
                state.perform_test(test, args).map(Value::from).map_err(|e| named(e, test))
            }
            ((".", method), [object, rest @ ..]) => object.call_method(state, method, rest),
            _ => Err(fail(format!("uses {name} in a way that is unknown"))),
        },
    }
}

/// An error with the name of what is unknown.
fn named(error: Error, name: &str) -> Error {
    match error.kind() {
        kind @ (ErrorKind::UnknownFilter | ErrorKind::UnknownTest) => {
            Error::new(kind, format!("{name} is unknown"))
        }
        _ => error,
    }
}

/// Products of constants would be multiplied out while the template is compiled, before anything
/// counts them; those of texts and lists are refused, but for a line such as `'-' * 40`.
fn check_products(source: &str, ws_config: WhitespaceConfig) -> Result<(), Error> {
    let mut tokens = Vec::new();
    for token in tokenize(source, false, SyntaxConfig, ws_config) {
        tokens.push(token?.0);
    }
    for (i, token) in tokens.iter().enumerate() {
        if matches!(token, Token::Mul) {
            let left = operand(tokens[..i].iter().rev());
            let right = operand(tokens[i + 1..].iter());
            let is_rule = |i: usize| {
                let beside = [i.checked_sub(2), Some(i + 2)].map(|i| i.and_then(|i| tokens.get(i)));
                !beside.iter().any(|t| matches!(t, Some(Token::Mul)))
                    && matches!(
                        (i.checked_sub(1).and_then(|i| tokens.get(i)), tokens.get(i + 1)),
                        (Some(Token::Str(_)), Some(Token::Int(0..=100)))
                            | (Some(Token::Int(0..=100)), Some(Token::Str(_)))
                    )
            };
            if left.is_constant && right.is_constant && (left.has_text || right.has_text) && !is_rule(i) {
                return Err(fail("multiplies a constant text or list"));
            }
        }
    }
    Ok(())
}

/// What stands beside an operator: one token, or all between brackets.
#[derive(Default)]
struct Operand {
    /// No variable is in it.
    is_constant: bool,
    /// A text or a list is.
    has_text: bool,
}

/// The operand that `tokens` begin with. Backwards, a closing bracket begins a group.
fn operand<'a, 't: 'a>(tokens: impl Iterator<Item = &'a Token<'t>>) -> Operand {
    use Token::{BraceClose, BraceOpen, BracketClose, BracketOpen, ParenClose, ParenOpen};
    let mut open = Vec::new();
    let mut found = Operand { is_constant: true, has_text: false };
    let mut complete = false;
    for token in tokens {
        let bracket = match token {
            ParenOpen | ParenClose => Some((')', matches!(token, ParenOpen))),
            BracketOpen | BracketClose => Some((']', matches!(token, BracketOpen))),
            BraceOpen | BraceClose => Some(('}', matches!(token, BraceOpen))),
            _ => None,
        };
        match (token, bracket) {
            // A variable, or what is called or indexed by the group that was complete.
            (Token::Ident(_), _) => return Operand { is_constant: false, ..found },
            _ if complete => break,
            (Token::Str(_) | Token::String(_), _) => found.has_text = true,
            (_, Some((kind, opens))) => {
                found.has_text |= kind != ')';
                match open.last() {
                    Some(&(_, way)) if way != opens => {
                        open.pop();
                    }
                    _ => open.push((kind, opens)),
                }
            }
            _ => {}
        }
        complete = open.is_empty();
    }
    found
}

fn fault(error: &Error) -> String {
    let line = error.line().map_or(String::new(), |l| format!(" (line {l})"));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.kind() {
        ErrorKind::OutOfFuel => format!("does not end within {FUEL} steps"),
        _ => format!("fails{line}: {what}"),
    }
}
