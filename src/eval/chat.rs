//! Chat templates: from messages to the text that a model was trained on.
//!
//! A template is a program that comes with the model. It runs without files, network or clock
//! other than the time it is given, with bounded steps (fuel) and bounded output.

use std::io::Write;
use std::sync::{Arc, LazyLock};

use minijinja::value::{Kwargs, ViaDeserialize};
use minijinja::{Environment, ErrorKind as JinjaErrorKind, context};
use regex::Regex;
use serde::Serialize;

use crate::error::{Error, Result};

/// Steps that a template may take.
const FUEL: u64 = 5_000_000;
/// Bytes that a template may write.
const OUTPUT_BYTES: usize = 16 << 20;

/// One message of a conversation.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// The special tokens that a template may name; empty where the vocabulary has none.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct TemplateTokens {
    pub bos: String,
    pub eos: String,
}

/// Renders `template` as transformers' `apply_chat_template` does, ready for the assistant's turn.
/// `now` is the time in seconds since 1970, in UTC, for templates that print the date.
///
/// # Errors
/// `Unsupported` when the template is faulty, refuses the messages (`raise_exception`), or wants
/// more than a template may take.
pub fn render(template: &str, messages: &[Message], tokens: &TemplateTokens, now: i64) -> Result<String> {
    // transformers adds a tag that marks the assistant's text, for training; it prints nothing.
    static GENERATION: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%(-?)\s*(end)?generation\s*(-?)%\}").expect("a valid pattern"));
    let template = GENERATION.replace_all(template, |c: &regex::Captures<'_>| {
        let tag = if c.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {tag} {}%}}", &c[1], &c[3])
    });

    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(JinjaErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: &str| strftime(format, now));
    env.add_template("chat_template", &template).map_err(|e| fault(&e))?;
    let template = env.get_template("chat_template").map_err(|e| fault(&e))?;
    let none = minijinja::Value::from(());
    let mut output = Bounded(Vec::new());
    template
        .render_captured_to(
            context! {
                messages,
                add_generation_prompt => true,
                bos_token => tokens.bos,
                eos_token => tokens.eos,
                tools => none.clone(),
                documents => none,
            },
            &mut output,
        )
        .map_err(|e| fault(&e))?;
    String::from_utf8(output.0).map_err(|_| Error::unsupported("the chat template wrote invalid UTF-8"))
}

fn fault(error: &minijinja::Error) -> Error {
    let line = error.line().map_or(String::new(), |l| format!(" (line {l})"));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let message = match error.kind() {
        JinjaErrorKind::OutOfFuel => {
            format!("the chat template does not end within {FUEL} steps")
        }
        JinjaErrorKind::WriteFailure => {
            format!("the chat template writes more than {OUTPUT_BYTES} bytes")
        }
        _ => format!("the chat template fails{line}: {what}"),
    };
    Error::unsupported(message).hint("run without --chat and write the prompt in the model's own format")
}

/// Output that ends in an error instead of filling memory.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + buf.len() > OUTPUT_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` spells it; Jinja's own filter would
/// also escape HTML. With `indent`, over several lines.
fn to_json(
    value: ViaDeserialize<serde_json::Value>,
    options: Kwargs,
) -> std::result::Result<minijinja::Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // `ensure_ascii`, `separators` and `sort_keys` are accepted and have their default effect.
    let mut out = Vec::new();
    let failed = |e: serde_json::Error| {
        minijinja::Error::new(JinjaErrorKind::BadSerialization, "value has no JSON form").with_source(e)
    };
    match indent {
        Some(n) => {
            let indent = b" ".repeat(n.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut serializer).map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSeparators);
            value.serialize(&mut serializer).map_err(failed)?;
        }
    }
    let text: Arc<str> = String::from_utf8_lossy(&out).into();
    Ok(minijinja::Value::from_safe_string(text.to_string()))
}

/// `", "` and `": "`.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The directives of `strftime` that templates use, in UTC; others stay as written.
fn strftime(format: &str, now: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[days.rem_euclid(7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year.rem_euclid(100)),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('H') => format!("{:02}", seconds / 3600),
            Some('I') => format!("{:02}", (seconds / 3600 + 11) % 12 + 1),
            Some('M') => format!("{:02}", seconds / 60 % 60),
            Some('S') => format!("{:02}", seconds % 60),
            Some('p') => (if seconds < 43_200 { "AM" } else { "PM" }).to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => {
                format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
            }
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        });
    }
    out
}

/// Year, month and day of a day since 1970 in the Gregorian calendar, by counting in cycles of 400
/// years that begin in March.
fn civil(days: i64) -> (i64, i64, i64) {
    // From 0000-03-01 to 1970-01-01 are 719,468 days; a cycle has 146,097.
    let days = days + 719_468;
    let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, months have 153 days in every five.
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * cycle + year + carry, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render_one(template: &str) -> Result<String> {
        let tokens = TemplateTokens { bos: "<s>".into(), eos: "</s>".into() };
        let messages = [Message::new("system", " Be brief. "), Message::new("user", "Why?")];
        render(template, &messages, &tokens, 1_763_697_600)
    }

    #[test]
    fn chatml() {
        let text = render_one(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        );
        assert_eq!(
            text.unwrap(),
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_blocks_and_tools() {
        let text = render_one(
            "{{ bos_token }}\n{%- if tools %}never{% endif -%}\n{% set ns = namespace(n=0) %}\n{% for m in messages[1:] %}\n  {% generation %}\n{{ m.content.strip().upper() }}{% endgeneration %}\n{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n{{ ns.n }} {{ messages[0].content.strip().split(' ') | length }} {{ 'ab'.startswith('a') }}\n{%- for k, v in messages[0].items() %} {{ k }}{% endfor %}{{ eos_token }}",
        );
        assert_eq!(text.unwrap(), "<s>WHY?1 2 True role content</s>");
    }

    #[test]
    fn json_is_pythons() {
        let text = render_one("{{ {'a': [1, 2.5, '<é>'], 'b': none, 'c': true} | tojson }}");
        assert_eq!(text.unwrap(), r#"{"a": [1, 2.5, "<é>"], "b": null, "c": true}"#);
        let text = render_one("{{ {'a': 1} | tojson(indent=2) }}");
        assert_eq!(text.unwrap(), "{\n  \"a\": 1\n}");
    }

    #[test]
    fn dates() {
        assert_eq!(render_one("{{ strftime_now('%d %b %Y') }}").unwrap(), "21 Nov 2025");
        assert_eq!(strftime("%F %T %A %j %", 951_782_400), "2000-02-29 00:00:00 Tuesday %j %");
        assert_eq!(strftime("%F %I%p", -1), "1969-12-31 11PM");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
    }

    #[test]
    fn faults_are_told() {
        let fault = render_one("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(fault.to_string().contains("roles must alternate"), "{fault}");
        for (template, expected) in [
            ("{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}", "steps"),
            ("{% set x = 'abcdefgh' * 100000 %}{% for i in range(99) %}{{ x }}{% endfor %}", "bytes"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails"),
            ("{% if %}", "fails"),
            ("{% include '/etc/passwd' %}", "fails"),
        ] {
            let fault = render_one(template).unwrap_err().to_string();
            assert!(fault.contains(expected), "{template}: {fault}");
        }
    }
}
