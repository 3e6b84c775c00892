//! Chat templates: what in their text has no business there, and what rendering them takes.
//!
//! A loader that renders templates without a sandbox runs what they say (CVE-2024-34359, CVE-2026-5760). Only what
//! stands between braces is code; what a template writes out is the model's affair.

use std::borrow::Cow;
use std::path::Path;
use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};
use serde_json::json;

use super::finding::Finding;
use super::jinja::{Hidden, code, hidden};
use super::rules::{
    KEY_TYPE, MALFORMED, Rule, TEMPLATE_ADDRESS, TEMPLATE_ATTRIBUTE, TEMPLATE_BOUNDS, TEMPLATE_CODE,
    TEMPLATE_IMPORT, TEMPLATE_LOOP, TEMPLATE_RENDER,
};
use super::{Scan, gguf::Entries};
use crate::container::gguf::{Array, Metadata, Value};
use crate::eval::chat::{Allowance, Conversation, Message, TemplateTokens, exceeds_bounds, render_within};

const TEMPLATE: &str = "tokenizer.chat_template";

/// Where a template lies.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub file: &'a Path,
    /// The metadata key, or the field of a JSON file.
    pub key: &'a str,
    /// Its first byte, where it lies in the file as it is.
    pub offset: Option<u64>,
}

/// The templates of a GGUF file. What is not UTF-8 is looked at all the same, as are texts where others have
/// lists: a loader may be less strict.
pub(super) fn check_metadata(scan: &mut Scan, entries: &Entries<'_>) {
    let mut all = Vec::new();
    for (key, value) in entries.metadata.iter() {
        let Some(name) = key.strip_prefix(TEMPLATE) else { continue };
        let place = |offset| Place { file: entries.file, key, offset };
        match (name, value) {
            (_, Value::String(bytes)) => {
                let text = String::from_utf8_lossy(bytes);
                // Where bytes were replaced, those behind them lie elsewhere in the file.
                let mut offset = entries.text_place(key);
                if matches!(text, Cow::Owned(_)) {
                    scan.find(entries.finding(&MALFORMED, key, "a chat template is not UTF-8"));
                    offset = None;
                }
                let name = if name.is_empty() { "default" } else { name.trim_start_matches('.') };
                all.push((place(offset), name, text));
            }
            // Their names, as gguf-py writes them.
            ("s", Value::Array(Array::String(names))) => {
                all.extend(names.iter().map(|b| (place(None), "names", String::from_utf8_lossy(b))));
            }
            (_, other) => {
                // Without a name, it is one of the keys whose types are known.
                if !name.is_empty() {
                    let message = format!("{key} is {}, not a text", other.value_type().name());
                    scan.find(entries.finding(&KEY_TYPE, key, message));
                }
                if let Value::Array(Array::String(texts)) = other {
                    all.extend(texts.iter().map(|b| (place(None), name, String::from_utf8_lossy(b))));
                }
            }
        }
    }
    let all = all.iter().map(|(place, name, text)| (*place, *name, text.as_ref()));
    check_all(scan, all, &tokens(entries.metadata));
}

/// The texts of the special tokens that templates may name.
fn tokens(metadata: &Metadata) -> TemplateTokens {
    let token = |role: &str| {
        let id = metadata.u64(&format!("tokenizer.ggml.{role}_token_id"))?;
        match metadata.get("tokenizer.ggml.tokens")? {
            Value::Array(tokens) => Some(tokens.get(usize::try_from(id).ok()?)?.as_str()?.to_string()),
            _ => None,
        }
    };
    TemplateTokens { bos: token("bos").unwrap_or_default(), eos: token("eos").unwrap_or_default() }
}

/// Patterns within code, and the rule each is about. Word boundaries keep `system_message` and the like out.
const PATTERNS: &[(&Rule, &str)] = &[
    (
        &TEMPLATE_ATTRIBUTE,
        r"__\w+__|['\x22]__|__['\x22]|\\x5f|\\u005f|\|\s*attr\s*\(|\bfunc_globals\b|\bgi_frame\b|\bmro\s*\(",
    ),
    (
        &TEMPLATE_CODE,
        r"\b(?:os|sys|subprocess|importlib|builtins|socket|shutil|pty|ctypes|pickle|urllib|requests|posix)\s*\.\s*\w|\b(?:popen|eval|exec|system|globals|locals|getattr|setattr|compile|urlopen|spawn\w*)\s*\(",
    ),
    (&TEMPLATE_IMPORT, r"\{%[-+]?\s*(?:import|include|from|extends)\b"),
    (&TEMPLATE_LOOP, r"\brange\s*\([^)]*(?:\d{6,}|\d[\d_]{6,}|\*\*)"),
    (&TEMPLATE_ADDRESS, r"(?i)\b(?:https?|ftp|wss?|file)://[^\s'\x22]+"),
];

static COMPILED: LazyLock<Vec<(&Rule, Regex)>> = LazyLock::new(|| {
    let compile = |pattern: &str| RegexBuilder::new(pattern).build().expect("a valid pattern");
    PATTERNS.iter().map(|(rule, pattern)| (*rule, compile(pattern))).collect()
});

/// Most templates of a file.
const MAX_TEMPLATES: usize = 64;

/// All templates of a file: place, name, text. They share what rendering may take; once one goes beyond the bounds,
/// none is rendered any more.
pub(super) fn check_all<'a>(
    scan: &mut Scan,
    templates: impl Iterator<Item = (Place<'a>, &'a str, &'a str)>,
    tokens: &TemplateTokens,
) {
    let allowance = Allowance::samples();
    let mut renders = true;
    for (number, (place, name, text)) in templates.enumerate() {
        if number == MAX_TEMPLATES {
            let message = format!("more than {MAX_TEMPLATES} chat templates");
            return scan.find(Finding::new(&TEMPLATE_BOUNDS, place.file, message).key(place.key));
        }
        patterns(scan, &place, name, text);
        if renders && let Some(finding) = rendered(&place, name, text, tokens, &allowance) {
            renders = finding.rule.id != TEMPLATE_BOUNDS.id;
            scan.find(finding);
        }
    }
}

pub(super) fn check(scan: &mut Scan, place: &Place<'_>, name: &str, text: &str, tokens: &TemplateTokens) {
    check_all(scan, std::iter::once((*place, name, text)), tokens);
}

/// What stands in a template's code.
fn patterns(scan: &mut Scan, place: &Place<'_>, name: &str, text: &str) {
    let stretches = code(text);
    let hidden: Vec<_> = stretches.iter().flat_map(|&stretch| hidden(text, stretch)).collect();
    for (rule, pattern) in COMPILED.iter() {
        let mut matches: Vec<_> = stretches
            .iter()
            .flat_map(|&(from, to)| {
                pattern
                    .find_iter(text.get(from..to).unwrap_or_default())
                    .map(move |m| (from + m.start(), m.as_str()))
            })
            .collect();
        // What its words show is said by them.
        let shown: Vec<usize> = matches.iter().map(|&(at, _)| at).collect();
        matches.extend(hidden.iter().filter_map(|&(kind, from, to)| {
            let of = if kind == Hidden::Attribute { &TEMPLATE_ATTRIBUTE } else { &TEMPLATE_CODE };
            let next = shown.partition_point(|&at| at < from);
            let is_shown = shown.get(next).is_some_and(|&at| at < to);
            (of.id == rule.id && !is_shown).then_some((from, text.get(from..to)?))
        }));
        matches.sort_by_key(|m| m.0);
        if let Some(&(at, first)) = matches.first() {
            let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
            let shown: String = first.chars().take(60).collect();
            let more =
                if matches.len() > 1 { format!(", and {} more", matches.len() - 1) } else { String::new() };
            let message = format!("template {name:?}, line {line}: {shown:?}{more}");
            let finding = Finding::new(rule, place.file, message).key(place.key).of(first.len() as u64);
            scan.find(finding.at(place.offset.and_then(|o| o.checked_add(at as u64))));
        }
    }
}

/// What rendering says, with conversations as applications have them.
fn rendered(
    place: &Place<'_>,
    name: &str,
    text: &str,
    tokens: &TemplateTokens,
    allowance: &Allowance,
) -> Option<Finding> {
    let message = |role: &str, text: &str| Message::new(role, text);
    let (system, user, answer) =
        (message("system", "Be brief."), message("user", "What is 2 + 2?"), message("assistant", "4"));
    let mut with_tools = Conversation::new(std::slice::from_ref(&user));
    with_tools.tools = json!([{"type": "function", "function": {"name": "add", "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}]);
    let samples = [
        Conversation::new(std::slice::from_ref(&user)),
        Conversation::new(&[system, user.clone(), answer.clone(), message("user", "And 3 + 3?")]),
        Conversation::new(&[user, answer]),
        with_tools,
    ];
    let mut failed = None;
    let mut any = false;
    for sample in &samples {
        match render_within(text, sample, tokens, 0, allowance) {
            Ok(_) => any = true,
            Err(e) if exceeds_bounds(&e) => {
                let message = format!("template {name:?}: {e}");
                return Some(
                    Finding::new(&TEMPLATE_BOUNDS, place.file, message).key(place.key).at(place.offset),
                );
            }
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    let error = failed.filter(|_| !any)?;
    let message = format!("template {name:?}: {error}");
    Some(Finding::new(&TEMPLATE_RENDER, place.file, message).key(place.key).at(place.offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Vec<&'static str> {
        let mut scan = Scan::default();
        let place = Place { file: Path::new("x"), key: "k", offset: Some(100) };
        check(&mut scan, &place, "default", text, &TemplateTokens::default());
        scan.findings.iter().map(|f| f.rule.id).collect()
    }

    #[test]
    fn templates_are_judged() {
        let harmless =
            "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}os.system('x')";
        assert!(rules(harmless).is_empty());
        assert!(rules("{# __class__ #}{% set system_message = 'x' %}{{ system_message }}").is_empty());
        assert!(rules("{{ ''.__class__.__mro__ }}").contains(&TEMPLATE_ATTRIBUTE.id));
        assert!(rules("{{ '}}' ~ x.__class__ }}").contains(&TEMPLATE_ATTRIBUTE.id));
        assert!(rules("{{ x['__' ~ 'class__'] }}").contains(&TEMPLATE_ATTRIBUTE.id));
        assert!(rules(r"{{ x|map('\x5f\x5fclass\x5f\x5f') }}").contains(&TEMPLATE_ATTRIBUTE.id));
        for hidden in [
            r"x['\x5F\x5Fclass\x5F\x5F']",
            r"x['\u005F\u005Fclass\u005F\u005F']",
            r"x['\137\137class\137\137']",
            r"x['\U0000005f\U0000005fclass\U0000005f\U0000005f']",
            r"x['\N{LOW LINE}\N{LOW LINE}class']",
            "x['_'~'_class_'~'_']",
            "x['_' '_class']",
            "x['_'*2~'class'~'_'*2]",
            "x[2*'_'~'class']",
            "x[('_'~'_')~'class']",
            "x['_' ~ name ~ '_']",
            "x['_' ~ ('_' ~ name)]",
            "x['%c%cclass%c%c'|format(95,95,95,95)]",
            "[x]|map(attribute='_'~'_init_'~'_')|list",
            "[x]|map(attribute='_'~name)|list",
            "{1:{}} and ''.__class__",
            "{1:{2:{}}}[x.__class__]",
        ] {
            assert!(rules(&format!("{{{{ {hidden} }}}}")).contains(&TEMPLATE_ATTRIBUTE.id), "{hidden}");
        }
        let raw = "{% raw %}{#{% endraw %}{{ ''.__class__ }}{% raw %}#}{% endraw %}";
        assert!(rules(raw).contains(&TEMPLATE_ATTRIBUTE.id));
        assert!(rules("{%- raw -%}{{ ''.__class__ }}{%+ endraw %}").is_empty());
        for hidden in ["x['popen']('id')", "x['po' ~ 'pen']", r"x['\x73ystem']('id')", "x[('exec')]('1')"] {
            assert!(rules(&format!("{{{{ {hidden} }}}}")).contains(&TEMPLATE_CODE.id), "{hidden}");
        }
        let harmless = "{% set t = {'a_b': '\\n___\\n', 'system': 1, 'exec': 2} %}{{ t['a_' ~ 'b'] }}{{ t['system'] }}\
            {{ t['exec'] }}{{ ['_', '-'] | join('_') }}{{ 'a_b' | replace('_', ' ') }}{{ 'a_b'.split('_')[0] ~ '_' }}\
            {{ '100%' ~ '\n' + '<|im_end|>' }}{{ t['a' ~ '_b'] }}{{ ('x' * 3) ~ '_' }}";
        assert_eq!(rules(harmless), [""; 0]);
        assert!(rules("{{ cycler.x.os.popen('id').read() }}").contains(&TEMPLATE_CODE.id));
        assert!(rules("{% include '/etc/passwd' %}").contains(&TEMPLATE_IMPORT.id));
        assert!(rules("{% for i in range(10**9) %}{% endfor %}x").contains(&TEMPLATE_LOOP.id));
        assert_eq!(rules("{{ 'see https://example.com/x' }}"), [TEMPLATE_ADDRESS.id]);
        assert_eq!(rules("{{ nothing.at.all }}"), [TEMPLATE_RENDER.id]);
        let long = "{% for i in range(4000) %}{% for j in range(4000) %}x{% endfor %}{% endfor %}";
        assert_eq!(rules(long), [TEMPLATE_BOUNDS.id]);
    }

    #[test]
    fn many_templates_are_not_all_rendered() {
        let rules = |text: &str, n: usize| {
            let mut scan = Scan::default();
            let all =
                (0..n).map(|_| (Place { file: Path::new("x"), key: "k", offset: None }, "default", text));
            check_all(&mut scan, all, &TemplateTokens::default());
            scan.findings.iter().map(|f| f.rule.id).collect::<Vec<_>>()
        };
        let long = "{% for i in range(4000) %}{% for j in range(4000) %}x{% endfor %}{% endfor %}";
        assert_eq!(rules(long, 3), [TEMPLATE_BOUNDS.id]);
        assert!(rules("x", MAX_TEMPLATES).is_empty());
        assert_eq!(rules("x", MAX_TEMPLATES + 2), [TEMPLATE_BOUNDS.id]);
    }

    #[test]
    fn places_are_those_in_the_file() {
        let mut scan = Scan::default();
        let place = Place { file: Path::new("x"), key: "k", offset: Some(100) };
        check(&mut scan, &place, "default", "ab\n{{ x.__dict__ }}", &TemplateTokens::default());
        let finding = scan.findings.iter().find(|f| f.rule.id == TEMPLATE_ATTRIBUTE.id).unwrap();
        assert_eq!((finding.offset, finding.length), (Some(108), Some(8)));
        assert!(finding.message.contains("line 2"), "{}", finding.message);
    }
}
