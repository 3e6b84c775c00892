//! Running a template within bounds.
//!
//! minijinja counts instructions, but one instruction can double a text, copy a list, or compare two
//! nested ones. So the template is compiled first, and each instruction that makes or walks through
//! values is replaced by a call of a function of ours, under a name that no template can use (`+`,
//! `|join`, `.split`). It looks at what it is given and at what it gives.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, TemplateConfig, Vm, WhitespaceConfig, make_string_output,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, functions};
use regex::Regex;
use serde_json::{Map, Value as Json};

use super::bounds::{self, Meter, OUTPUT_BYTES, TEMPLATE_BYTES, fail};
use super::{clock, python};

type Made = Result<Value, Error>;

/// The text, or why there is none: "does not end within ...".
pub(super) fn render(
    template: &str,
    variables: &Map<String, Json>,
    now: i64,
    meter: &Arc<Meter>,
) -> Result<String, String> {
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
    run(template, variables, now, meter).map_err(|e| fault(&e, meter))
}

fn run(source: &str, variables: &Map<String, Json>, now: i64, meter: &Arc<Meter>) -> Result<String, Error> {
    meter.tick()?;
    let ws_config = WhitespaceConfig { keep_trailing_newline: true, lstrip_blocks: true, trim_blocks: true };
    bounds::check(source, ws_config)?;
    let syntax_config = SyntaxConfig;
    let config =
        TemplateConfig { syntax_config, ws_config, default_auto_escape: Arc::new(|_| AutoEscape::None) };
    let compiled = CompiledTemplate::new("chat_template", source, &config)?;
    meter.tick()?;
    let names = guarded_names(&compiled)?;
    let code = guarded_code(&compiled.instructions, &names)?;
    let mut env = Environment::new();
    env.set_fuel(Some(meter.bounds.steps));
    for name in &names {
        let meter = meter.clone();
        let own = name.clone();
        env.add_function(name.as_str(), move |state: &State<'_, '_>, args: Rest<Value>| {
            guarded_call(&meter, &own, state, &args)
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
        let message: String = message.chars().take(1000).collect();
        Err(Error::new(ErrorKind::InvalidOperation, format!("refuses the messages: {message}")))
    });
    let clock = meter.clone();
    env.add_function("strftime_now", move |format: &str| -> Made {
        if format.len() > DATE_BYTES {
            return Err(fail(format!(
                "asks strftime_now for too much: a date of more than {DATE_BYTES} bytes"
            )));
        }
        clock.give(Value::from(clock::strftime(format, now)))
    });
    env.remove_global("debug");
    env.remove_filter("pprint");
    for name in ["dict", "namespace"] {
        let meter = meter.clone();
        env.add_function(name, move |args: Rest<Value>| -> Made {
            meter.take(&args, 1)?;
            // Each loop over a namespace copies its names.
            if name == "namespace" && args.iter().any(|v| v.len().is_some_and(|n| n > NAMES)) {
                return Err(fail(format!("asks namespace for too much: more than {NAMES} names")));
            }
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
        counted.take(std::slice::from_ref(value), 1)?;
        let text = python::text(value)?;
        counted.spend(text.len())?;
        out.write_str(&text).map_err(Error::from)
    });
    let mut output = String::new();
    let root = Value::from_serialize(variables);
    let mut sink = make_string_output(&mut output);
    Vm::new(&env).eval(&code, root, &compiled.blocks, &mut sink, AutoEscape::None)?;
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

/// The same program with guarded functions for what walks through values. Text of the template itself is
/// written as a value is, so that it is counted.
fn guarded_code<'a>(code: &Instructions<'a>, names: &'a BTreeSet<String>) -> Result<Instructions<'a>, Error> {
    let all = || (0..code.len() as u32).filter_map(|i| Some((i, code.get(i)?)));
    // Where each instruction comes to lie.
    let mut places = Vec::with_capacity(code.len() + 1);
    let mut next = 0;
    for (_, instruction) in all() {
        places.push(next);
        next += if matches!(instruction, Instruction::EmitRaw(_)) { 2 } else { 1 };
    }
    places.push(next);
    let place = |old: u32| places.get(old as usize).copied().unwrap_or(next);
    let mut guards = Instructions::new("chat_template", code.source());
    for (i, instruction) in all() {
        let line = code.get_line(i).and_then(|line| u16::try_from(line).ok()).unwrap_or(0);
        let mut add = |instruction| guards.add_with_line(instruction, line);
        if let Some((name, n)) = guarded(instruction) {
            let name = names.get(&name).ok_or_else(|| fail("is too large"))?;
            add(Instruction::CallFunction(name, n));
            continue;
        }
        match instruction.clone() {
            Instruction::EmitRaw(text) => {
                add(Instruction::LoadConst(Value::from(text)));
                add(Instruction::Emit)
            }
            Instruction::Iterate(to) => add(Instruction::Iterate(place(to))),
            Instruction::Jump(to) => add(Instruction::Jump(place(to))),
            Instruction::JumpIfFalse(to) => add(Instruction::JumpIfFalse(place(to))),
            Instruction::JumpIfFalseOrPop(to) => add(Instruction::JumpIfFalseOrPop(place(to))),
            Instruction::JumpIfTrueOrPop(to) => add(Instruction::JumpIfTrueOrPop(place(to))),
            Instruction::BuildMacro(name, to, flags) => add(Instruction::BuildMacro(name, place(to), flags)),
            other => add(other),
        };
    }
    Ok(guards)
}

/// An operation, with what it takes and gives looked at.
fn guarded_call(meter: &Meter, name: &str, state: &State<'_, '_>, args: &[Value]) -> Made {
    let made = match (name, args) {
        // What takes the same time however much is in it.
        ("[]", [container, key]) => {
            let text = if container.as_str().is_some() { args } else { std::slice::from_ref(key) };
            meter.take(text, 1)?;
            return python::item(container, key);
        }
        ("|length" | "|count", [value]) if value.as_str().is_none() => {
            meter.tick()?;
            operation(name, state, args)?
        }
        _ if LOOKS.contains(&name) => {
            meter.tick()?;
            operation(name, state, args)?
        }
        // A filter for each element is called as it is elsewhere.
        ("|map", [value, filter, rest @ ..]) if filter.as_str().is_some() => {
            meter.take(std::slice::from_ref(value), 1)?;
            let name = format!("|{}", filter.as_str().unwrap_or_default());
            let each = |item: Value| {
                let args: Vec<Value> = std::iter::once(item).chain(rest.iter().cloned()).collect();
                guarded_call(meter, &name, state, &args)
            };
            if name == "|map" {
                return Err(fail("maps with map, which is unknown"));
            }
            Value::from(value.try_iter()?.map(each).collect::<Result<Vec<_>, _>>()?)
        }
        ("|select" | "|reject" | "|selectattr" | "|rejectattr", [value, rest @ ..]) => {
            let each = Meter::cost(&meter.size(rest)?);
            meter.take(std::slice::from_ref(value), each)?;
            operation(name, state, args)?
        }
        _ => {
            let bytes = meter.take(args, if SORTS.contains(&name) { 20 } else { 1 })?;
            python::check_made(name, args, bytes, meter.bounds.elements)?;
            operation(name, state, args)?
        }
    };
    match name {
        // A dictionary of several collects its keys at each loop.
        "|chain" if made.kind() == ValueKind::Map => {
            meter.size(std::slice::from_ref(&made))?;
            let pairs = made.try_iter()?.map(|key| Ok((made.get_item(&key)?, key)));
            let pairs = pairs.collect::<Result<Vec<_>, Error>>()?;
            meter.give(pairs.into_iter().map(|(value, key)| (key, value)).collect())
        }
        _ => meter.give(made),
    }
}

/// Tests that look at a value from outside.
const LOOKS: &[&str] = &[
    "?defined",
    "?undefined",
    "?none",
    "?boolean",
    "?true",
    "?false",
    "?number",
    "?integer",
    "?float",
    "?string",
    "?mapping",
    "?sequence",
    "?iterable",
];
/// What compares each element with several others.
const SORTS: &[&str] = &["|sort", "|unique", "|dictsort", "|groupby"];
/// Bytes of the format of a date, and names of a namespace.
const DATE_BYTES: usize = 256;
const NAMES: usize = 1024;

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

fn fault(error: &Error, meter: &Meter) -> String {
    let line = error.line().map_or(String::new(), |l| format!(" (line {l})"));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.kind() {
        ErrorKind::OutOfFuel => format!("does not end within {} steps", meter.bounds.steps),
        _ => format!("fails{line}: {what}"),
    }
}
