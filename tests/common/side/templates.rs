//! Chat templates: they come with a model and are programs. Rendered only in the sandbox, and only by who asks.

use std::fs;
use std::time::{Duration, Instant};

use qconv::ErrorKind::Unsupported;
use qconv::eval::chat::{Conversation, Message, TemplateTokens, render};
use serde_json::json;

use crate::side::{Accepted, Place, run};

/// Templates that try to leave, to hang, to grow, and a part of the reason that each gets; none where what
/// they reach for is simply not there.
const HOSTILE: &[(&str, &str, Option<&str>)] = &[
    ("classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", Some("")),
    ("classes by filter", "{{ ''|attr('__class__')|attr('__mro__') }}", None),
    ("globals", "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}", Some("")),
    ("cycler", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", Some("")),
    ("lipsum", "{{ lipsum.__globals__['os'].popen('id').read() }}", Some("")),
    ("request", "{{ request.application.__globals__ }}", Some("")),
    ("config", "{{ config.items() }}", Some("")),
    ("format", "{{ '{0.__class__}'.format(messages) }}", Some("")),
    ("include", "{% include '/etc/passwd' %}", Some("other templates")),
    ("import", "{% import '/etc/passwd' as p %}", Some("other templates")),
    ("extends", "{% extends '/etc/passwd' %}", Some("other templates")),
    ("block", "{% block a %}{% endblock %}", Some("blocks")),
    ("debug", "{{ debug() }}", Some("")),
    (
        "nested loops",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        Some("steps"),
    ),
    ("long range", "{% for i in range(10**9) %}{% endfor %}", Some("")),
    ("list of a range", "{{ range(10**9)|list }}", Some("")),
    ("text times", "{{ 'a' * 10**9 }}", Some("")),
    ("text times a variable", "{% set n = 10**9 %}{{ messages[0].content * n }}", Some("")),
    ("list times", "{% set n = 10**9 %}{{ ([0] * n)|length }}", Some("")),
    ("power", "{{ 10 ** 10 ** 10 }}", Some("")),
    (
        "doubled",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        Some(""),
    ),
    (
        "nested",
        "{% set ns = namespace(l=[]) %}{% for i in range(9000) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}",
        Some(""),
    ),
    (
        "joined",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s]|join(ns.s) %}{% endfor %}",
        Some(""),
    ),
    (
        "replaced",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        Some(""),
    ),
    ("wide", "{{ '%999999999d' % 1 }}", Some("")),
    ("indented", "{{ 'a\\nb'|indent(999999999) }}", Some("")),
    ("centred", "{{ 'a'.center(999999999) }}", Some("")),
    ("macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", Some("")),
    (
        "macros",
        "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
        Some(""),
    ),
    ("recursive loop", "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}", Some("")),
    (
        "output",
        "{% for i in range(9999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 99 }}{% endfor %}",
        Some(""),
    ),
    ("cut", "{% if", Some("")),
    ("no end", "{% for x in messages %}", Some("")),
    ("text without end", "{{ 'aaa", Some("")),
    ("unknown filter", "{{ 1|system('id') }}", Some("")),
];

fn deep() -> Vec<(&'static str, String)> {
    vec![
        ("deep brackets", format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000))),
        ("deep lists", format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000))),
        ("deep conditions", "{% if 1 %}".repeat(20_000)),
        ("long chain", format!("{{{{ 1{} }}}}", "+1".repeat(50_000))),
        ("long not", format!("{{{{ {} 1 }}}}", "not ".repeat(50_000))),
        ("long minus", format!("{{{{ {}1 }}}}", "-".repeat(50_000))),
        ("fields", format!("{{{{ messages{} }}}}", ".a".repeat(50_000))),
        ("two megabytes", "a".repeat(2 << 20)),
    ]
}

#[test]
fn hostile_templates_end_with_a_reason() {
    let conversation = Conversation::new(&[Message::new("user", "Why?")]);
    let tokens = TemplateTokens::default();
    let said = deep();
    let all = HOSTILE.iter().map(|(c, t, why)| (*c, *t, *why));
    for (case, template, why) in all.chain(said.iter().map(|(c, t)| (*c, t.as_str(), Some("")))) {
        let began = Instant::now();
        let rendered = render(template, &conversation, &tokens, 0);
        // The sandbox stops after ten seconds by itself.
        assert!(began.elapsed() < Duration::from_secs(20), "{case} took {:?}", began.elapsed());
        match (rendered, why) {
            (Err(e), Some(why)) => {
                assert_eq!(e.kind(), Unsupported, "{case}: {e}");
                assert!(e.to_string().contains(why), "{case}: {e}");
            }
            (Ok(text), Some(_)) => {
                // What is not there prints nothing, and what is there is bounded.
                assert!(
                    text.len() < 17 << 20 && !text.contains("root:") && !text.contains("uid="),
                    "{case}: {:.200}",
                    text
                );
            }
            (rendered, None) => assert!(rendered.is_err() || rendered.is_ok_and(|t| t.len() < 100), "{case}"),
        }
    }
}

/// A template is carried into GGUF as it stands; verify renders it, and says what it does.
#[test]
fn templates_are_carried_and_rendered_by_verify() {
    let place = Place::model("llama");
    for (case, template) in [
        ("import", "{% import 'os' as os %}{{ os.system('touch touched') }}"),
        ("loops", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"),
        ("text times", "{{ 'a' * 10**9 }}"),
    ] {
        place.edit("tokenizer_config.json", |c| c["chat_template"] = json!(template));
        let (source, output) = (place.source(), place.output());
        let args = ["hf-to-gguf".as_ref(), source.as_os_str(), "-o".as_ref(), output.as_os_str()];
        let more = ["-q", "--no-verify", "--allow-token-mismatch"].map(std::ffi::OsStr::new);
        assert_eq!(run(case, &[&args[..], &more].concat()).code, Some(0), "{case}");
        let verified = run(case, &["verify".as_ref(), output.as_os_str()]);
        assert!(matches!(verified.code, Some(0 | 1)), "{case}: {}", verified.message);
        fs::remove_file(&output).unwrap();
        assert!(!std::path::Path::new("touched").exists());
    }
    for (case, template) in
        [("number", json!(7)), ("list of numbers", json!([1, [2]])), ("object", json!({"a": 1}))]
    {
        place.edit("tokenizer_config.json", |c| c["chat_template"] = template);
        place.converts(case, Accepted);
    }
    let huge = format!("{{\"chat_template\": \"{}\"}}", "a".repeat(20 << 20));
    place.put("tokenizer_config.json", huge);
    place.converts("20 MB", Accepted);
}
