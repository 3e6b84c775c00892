//! Chat templates: real ones render as transformers renders them, hostile ones are stopped, and all
//! of a model's are carried both ways.

mod common;

use std::fs;
use std::path::Path;

use indexmap::IndexMap;
use qconv::eval::chat::{Conversation, Message, TemplateTokens, render};
use serde_json::Value as Json;

/// 2025-11-21 04:00 UTC, as in `fixtures/chat/make.py`.
const NOW: i64 = 1_763_697_600;

fn conversations() -> IndexMap<String, Conversation> {
    let text = fs::read(common::fixture("chat/conversations.json")).unwrap();
    let json: IndexMap<String, Json> = serde_json::from_slice(&text).unwrap();
    let one = |c: &Json| Conversation {
        messages: c["messages"].clone(),
        tools: c["tools"].clone(),
        add_generation_prompt: c["add_generation_prompt"].as_bool().unwrap(),
        extra: c["extra"].as_object().cloned().unwrap_or_default(),
    };
    json.iter().map(|(name, c)| (name.clone(), one(c))).collect()
}

fn tokens() -> TemplateTokens {
    TemplateTokens { bos: "<s>".into(), eos: "</s>".into() }
}

/// Name, whether it is an error, and the text, of each section that `make.py` wrote.
fn sections(text: &str) -> Vec<(&str, bool, &str)> {
    text.split("=====[ ")
        .skip(1)
        .map(|section| {
            let (name, rest) = section.split_once(" ]=====").unwrap();
            let (head, body) = rest.split_once('\n').unwrap();
            (name, head == " error", body.strip_suffix('\n').unwrap())
        })
        .collect()
}

/// Renders each template of `templates` and compares with the file of the same name in `expected`.
fn compare(templates: &Path, expected: &Path) -> (usize, Vec<String>) {
    let conversations = conversations();
    let (mut compared, mut faults) = (0, Vec::new());
    let mut files: Vec<_> = fs::read_dir(templates).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for path in files.iter().filter(|p| p.extension().is_some_and(|e| e == "jinja")) {
        let template = fs::read_to_string(path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let record = fs::read_to_string(expected.join(format!("{name}.txt"))).unwrap();
        for (conversation, fails, text) in sections(&record) {
            let rendered = render(&template, &conversations[conversation], &tokens(), NOW);
            compared += 1;
            match (fails, rendered) {
                (true, Err(_)) => {}
                // What is more forgiving here: loops over none, JSON of what a filter has made.
                (true, Ok(_))
                    if ["'NoneType' object is not iterable", "generator is not JSON"]
                        .iter()
                        .any(|w| text.contains(w)) => {}
                (false, Ok(rendered)) if rendered == text => {}
                (_, rendered) => {
                    let found = rendered.unwrap_or_else(|e| format!("ERROR {e}"));
                    let same = found.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
                    let cut = |s: &str| {
                        String::from_utf8_lossy(&s.as_bytes()[same.saturating_sub(30).min(s.len())..])
                            .chars()
                            .take(160)
                            .collect::<String>()
                    };
                    faults.push(format!(
                        "{name}, {conversation}: expected ...{:?}, found ...{:?}",
                        cut(text),
                        cut(&found)
                    ));
                }
            }
        }
    }
    (compared, faults)
}

#[test]
fn real_templates_render_as_in_transformers() {
    let dir = common::fixture("chat");
    let (compared, faults) = compare(&dir.join("templates"), &dir.join("expected"));
    assert!(compared > 100, "{compared} renderings");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The same with other templates: `QCONV_CHAT=TEMPLATES:EXPECTED cargo test --test chat -- --ignored`
#[test]
#[ignore = "needs a directory of templates, and what fixtures/chat/make.py wrote for it"]
fn other_templates_render_as_in_transformers() {
    let dirs = std::env::var("QCONV_CHAT").expect("QCONV_CHAT names the directories");
    let (templates, expected) = dirs.split_once(':').unwrap();
    let (compared, faults) = compare(Path::new(templates), Path::new(expected));
    assert!(compared > 0);
    assert!(faults.is_empty(), "{} of {compared}:\n{}", faults.len(), faults.join("\n"));
}

fn one(template: &str) -> Result<String, String> {
    let messages = [Message::new("system", " Be brief. "), Message::new("user", "Why?")];
    render(template, &Conversation::new(&messages), &tokens(), NOW).map_err(|e| e.to_string())
}

/// What Python does, spelled out.
#[test]
fn values_behave_as_in_python() {
    for (template, expected) in [
        (
            "{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none, {'b': false}] }}",
            "True None 1.0 [1, 'a', None, {'b': False}]",
        ),
        ("{{ \"it's\" | string }} {{ [\"it's\", 'a\nb'] }}", "it's [\"it's\", 'a\\nb']"),
        ("{{ 'x' ~ none ~ 2 ~ [1] }}", "xNone2[1]"),
        ("{{ 'abcdef'[1:3] }}{{ 'abcdef'[-2:] }}{{ 'abc'[::-1] }}{{ 'abc'[-1] }}", "bcefcbac"),
        ("{{ [1, 2, 3, 4][::-1] }}{{ [1, 2, 3][5:] }}{{ [1, 2, 3, 4][-3:-1] }}", "[4, 3, 2, 1][][2, 3]"),
        ("{{ messages[-1].role }}{{ messages[9] }}{{ messages[0]['none'] }}", "user"),
        (
            "{{ ' a b '.strip().split(' ') }}{{ 'a,b,c'.rsplit(',', 1) }}{{ 'a-b'.partition('-') | list }}",
            "['a', 'b']['a,b', 'c']['a', '-', 'b']",
        ),
        ("{{ 'ab'.startswith(('x', 'a')) }}{{ 'abc'.removesuffix('c') }}{{ '7'.zfill(3) }}", "Trueab007"),
        ("{% for k, v in {'z': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "z1a2"),
        ("{{ {'z': [1, 2.5], 'a': '<é>\"\\n'} | tojson }}", "{\"z\": [1, 2.5], \"a\": \"<é>\\\"\\n\"}"),
        ("{{ {'b': 1, 'a': []} | tojson(indent=2, sort_keys=true) }}", "{\n  \"a\": [],\n  \"b\": 1\n}"),
        ("{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", "[\"\\u00e9\"]"),
        (
            "{{ '%s is %d' % ('a', 3) }}{{ 7 % 3 }}{{ 3 * 'ab' }}{{ [1] + [2] }}{{ 1 + 2.5 }}",
            "a is 31ababab[1, 2]3.5",
        ),
        (
            "{{ 'a' is iterable }}{{ {} is mapping }}{{ 'a' is sequence }}{{ [] is string }}{{ 3 is iterable }}",
            "TrueTrueTrueFalseFalse",
        ),
        (
            "{{ ['b', 'a'] | join(', ') }}{{ messages | map(attribute='role') | join('/') }}",
            "b, asystem/user",
        ),
        ("{{ '<b>' | safe + '<' }}", "<b>&lt;"),
        ("{{ strftime_now('%d %b %Y') }}", "21 Nov 2025"),
        (
            "{% set ns = namespace(n=0) %}\n{% for m in messages %}\n  {% generation %}\n{{ m.content.strip() }}{% endgeneration %}\n{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n{{ ns.n }}\n",
            "Be brief.Why?2",
        ),
        ("{% macro m(x, y='d') %}{{ x ~ y }}{% endmacro %}{{ m('a') }}{{ m('a', y='b') }}", "adab"),
    ] {
        assert_eq!(one(template).as_deref(), Ok(expected), "{template}");
    }
    for (template, expected) in [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ 'a' + 1 }}", "string + number"),
        ("{{ missing.x }}", "undefined"),
        ("{{ messages | nonsense }}", "nonsense"),
        ("{{ messages is nonsense }}", "nonsense"),
        ("{% if %}", "line 1"),
    ] {
        let fault = one(template).unwrap_err();
        assert!(fault.contains(expected), "{template}: {fault}");
    }
}

/// Chains that the compiler would go through by recursion, or again and again, are counted before.
#[test]
fn long_expressions_are_refused_before_they_are_compiled() {
    let n = 150_000;
    let around = |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    let chain = |first: &str, more: &str| format!("{first}{}", more.repeat(n));
    for inner in [
        chain("a", ".b"),
        chain("a", "|e"),
        chain("1", "+1"),
        chain("a", "~a"),
        chain("a", "()"),
        chain("a", "[0]"),
        chain("1", "*1"),
        chain("1", "**1"),
        chain("a", " is a"),
        chain("a", " if a"),
        chain("a", " and a"),
        format!("{}a", "a if a else ".repeat(80_000)),
        format!("{}1", "-".repeat(n)),
        format!("{}1", "not ".repeat(n)),
        around("(", "*1)", n),
        around("1*(", ")", n),
    ] {
        let fault = one(&format!("{{{{ {inner} }}}}")).unwrap_err();
        assert!(fault.contains("more operators than 1000"), "{:.30}: {fault}", inner);
    }
    // Each alone is short enough.
    let constants = format!("{{{{ y{} }}}}", " ~ ['a', 'a', 'a', 'a']".repeat(450));
    let fault = one(&constants.repeat(20)).unwrap_err();
    assert!(fault.contains("more operators than can be compiled"), "{fault}");
    let fault = one(&format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(60_000))).unwrap_err();
    assert!(fault.contains("more branches than 1000"), "{fault}");
    // What is long without being deep is none of this.
    let long = format!(
        "{{% set l = [{}] %}}{{{{ l | length }}}}{}",
        "1, ".repeat(20_000),
        "{{ 1 + 1 }}".repeat(9000)
    );
    assert_eq!(one(&long).unwrap().len(), 5 + 9000);
    let sum = format!("{{{{ 1{} }}}}", " + 1".repeat(900));
    assert_eq!(one(&sum).unwrap(), "901");
}

/// Little that would make or walk through much, each of another kind; refused by count, not by time.
#[test]
fn what_templates_make_is_counted() {
    let mut faults = Vec::new();
    let grown = |n: usize, rest: &str| {
        format!(
            "{{% set ns = namespace(s='ab%F%F\\n') %}}{{% for i in range({n}) %}}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}{rest}"
        )
    };
    let listed = |rest: &str| {
        format!("{{% set l = range(90000) | list %}}{{% for i in range(400) %}}{rest}{{% endfor %}}")
    };
    for (template, expected) in [
        (grown(19, "{{ strftime_now(ns.s) | length }}"), "strftime_now for too much"),
        (grown(20, "{{ raise_exception(ns.s) }}"), "refuses"),
        (grown(19, "{{ ns.s | replace('a', ns.s) | length }}"), "too large"),
        (grown(19, "{{ [ns.s] | map('replace', 'a', ns.s) | list | length }}"), "too large"),
        (grown(19, "{{ ns.s | indent(4000) | length }}"), "too large"),
        (grown(19, "{{ ns.s | indent(width=4000) | length }}"), "too large"),
        ("{{ ['a'] | map('indent', 4000000000, true) | list }}".into(), "too much"),
        ("{{ ['%999999999d'] | map('format', 1) | list }}".into(), "too much"),
        (grown(19, "{{ ns.s.ljust(60000, ns.s) | length }}"), "3670016"),
        (grown(19, "{{ ns.s.replace('ab', '{0:>999}').format(1) | length }}"), "too large"),
        (grown(19, "{{ ns.s.replace('a', '%s') % (ns.s,) }}"), "too large"),
        (grown(19, "{{ ns.s | list | length }}"), "too large"),
        (grown(19, "{{ [[1], [2]] | tojson(indent=ns.s) | length }}"), "tojson for too much"),
        (grown(19, "{{ [1, 2] | tojson(separators=(ns.s, ns.s)) | length }}"), "tojson for too much"),
        (listed("{% if l + [1] == 3 %}x{% endif %}"), "more values than"),
        (listed("{% set x = l | sort(reverse=true) %}"), "walks through more"),
        (listed("{% set x = l | unique %}"), "walks through more"),
        (listed("{% set x = l | select('in', l) | list %}"), "walks through more"),
        (
            grown(19, "{% for i in range(2000) %}{% if 'q' in ns.s %}x{% endif %}{% endfor %}"),
            "walks through more",
        ),
        ("{% set d = dict() %}{{ namespace([1] * 2000) }}".into(), "namespace for too much"),
        ("{% macro a() %}{% macro b() %}{% endmacro %}{% endmacro %}".into(), "macros within macros"),
        ("{{ true and ('ab' ~ 'c') * 9000000 }}".into(), "constant"),
        ("{{ 'a' * 99 ** 3 }}".into(), "constant"),
        ("{{ 9999999 // 1 * 'a' }}".into(), "constant"),
        (format!("{{% for i in range(90000) %}}{}{{% endfor %}}", "x".repeat(9000)), "more values than"),
    ] {
        let found = one(&template).unwrap_or_else(|e| e);
        if !found.contains(expected) || found.len() > 2000 {
            faults.push(format!("{template:.200}: {found:.200}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    // Looking at a value from outside costs the same however large it is.
    assert_eq!(one(&listed("{% if l | length == 3 or l is string or l[7] == 8 %}x{% endif %}")).unwrap(), "");
    assert_eq!(
        one("{{ ['a', 'b'] | map('upper') | join }}{{ [' a '] | map('trim') | first }}").unwrap(),
        "ABa"
    );
    assert_eq!(one("{% for k in {'a': 1} | chain({'b': 2}) %}{{ k }}{% endfor %}").unwrap(), "ab");
}

/// Programs that would not end, fill the memory, break the stack, or look around.
#[test]
fn hostile_templates_are_stopped() {
    let grow = |how: &str| {
        format!(
            "{{% set ns = namespace(x='ab', l=['ab', 'c']) %}}{{% for i in range(99) %}}{{% set {how} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
    };
    let nested = |open: &str, close: &str, n: usize| open.repeat(n) + &close.repeat(n);
    let cases: &[(String, &str)] = &[
        ("{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}".into(), "steps"),
        (grow("ns.x = ns.x ~ ns.x"), "too large"),
        (grow("ns.x = ns.x + ns.x"), "too large"),
        (grow("ns.l = ns.l + ns.l"), "too large"),
        (grow("ns.l = ns.l * 100"), "too large"),
        (grow("ns.l = [ns.l, ns.l]"), "too "),
        (grow("ns.l = {'a': ns.l}"), "too deep"),
        (grow("ns.l = dict(a=ns.l)"), "too deep"),
        (grow("ns.l = namespace(a=ns.l)"), "too deep"),
        (grow("ns.x = ns.x.replace('a', ns.x)"), "too large"),
        (grow("ns.x = ns.x | replace('a', ns.x)"), "too large"),
        (grow("ns.x = [ns.x, ns.x] | join(ns.x)"), "too large"),
        (grow("ns.x = ns.x.join(ns.x)"), "too large"),
        (grow("ns.x = ns.x * 1000"), "too large"),
        (grow("ns.x = ns.x | upper ~ (ns.x[0:] * 2)"), "too large"),
        ("{{ 'a' * 100000000 }}".into(), "constant"),
        ("{{ 9999999 * ('a' ~ 'b') }}".into(), "constant"),
        ("{{ [1] * 10000000 * 10000000 }}".into(), "constant"),
        ("{% set n = 100000000 %}{{ 'a' * n }}".into(), "too large"),
        ("{{ 'a' | indent(4000000000, true) }}".into(), "too much"),
        ("{{ 'a' | indent(width=4000000000) }}".into(), "too much"),
        ("{{ [1] | batch(4000000000, 0) | list }}".into(), "too much"),
        ("{{ '%999999999d' | format(1) }}".into(), "too much"),
        ("{{ '%999999999d' % 1 }}".into(), "%"),
        ("{{ '{:>999999999}'.format(1) }}".into(), "too much"),
        ("{% set x %}{% for i in range(99999) %}{% for i in range(99999) %}0123456789012345678901234567890123456789{% endfor %}{% endfor %}{% endset %}".into(), "steps"),
        ("{% for i in range(99999) %}{{ messages }}{{ messages }}{{ messages }}{{ messages }}{% endfor %}".into(), "bytes"),
        ("{% set ns = namespace(x='0123456789') %}{% for i in range(20) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% for i in range(90) %}{{ ns.x }}{% endfor %}".into(), "more"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}".into(), "too deep"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns == ns }}".into(), "too deep"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns | tojson }}".into(), "too deep"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ {ns: 1} }}".into(), "too deep"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ {'a': 1}[ns] }}".into(), "too deep"),
        ("{% set ns = namespace() %}{% set ns.me = ns %}{{ 1 < 2 == ns }}".into(), "at once"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(), "fails"),
        ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}".into(), "fails"),
        (format!("{{{{ {} }}}}", nested("(", ")", 100_000)), "fails"),
        (format!("{{{{ {} }}}}", nested("[", "]", 100_000)), "fails"),
        (nested("{% if true %}", "{% endif %}", 20_000), ""),
        (format!("{{{{ {}1 }}}}", "not ".repeat(100_000)), ""),
        (format!("{{{{ 1{} }}}}", " + 1".repeat(100_000)), ""),
        (format!("{{{{ x{} }}}}", ".a".repeat(100_000)), ""),
        ("x".repeat(2 << 20), "longer"),
        ("{% include '/etc/passwd' %}".into(), "other templates"),
        ("{% extends '/etc/passwd' %}".into(), "other templates"),
        ("{% import '/etc/passwd' as x %}".into(), "other templates"),
        ("{% block a %}{{ self.a() }}{% endblock %}".into(), "blocks"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}".into(), "undefined"),
        ("{{ messages.__class__.__base__ }}".into(), "undefined"),
        ("{{ raise_exception.__globals__['os'].system('id') }}".into(), "undefined"),
        ("{{ namespace.__init__.__globals__ }}".into(), "undefined"),
        ("{{ debug() }}".into(), "unknown"),
        ("{{ open('/etc/passwd') }}".into(), "unknown"),
    ];
    for (template, expected) in cases {
        let shown: String = template.chars().take(120).collect();
        match (one(template), *expected) {
            (Ok(_), "") => {}
            (Ok(text), _) => panic!("{shown}: rendered {} bytes", text.len()),
            // On a busy machine the time may be over first.
            (Err(fault), words) => {
                assert!(fault.contains(words) || fault.contains("takes too long"), "{shown}: {fault}");
            }
        }
    }
}

fn converted(source: &Path, output: &Path) -> Vec<(String, String)> {
    common::convert(source, output, Some("bf16"));
    let gguf = qconv::container::gguf::Gguf::open(output, &qconv::limits::Limits::default()).unwrap();
    let templates = gguf.metadata.iter().filter_map(|(key, value)| {
        let name = key.strip_prefix("tokenizer.chat_template")?;
        Some((name.trim_start_matches('.').to_string(), value.as_str()?.to_string()))
    });
    let mut templates: Vec<_> = templates.collect();
    templates.sort();
    templates
}

/// A directory with a model's other files, and these in the place of its chat templates.
fn with_templates(dir: &Path, files: &[(&str, &str)], inline: Json) -> std::path::PathBuf {
    let source = common::fixture("models/fmt-chat-list");
    let copy = dir.join("model");
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir_all(copy.join("additional_chat_templates")).unwrap();
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let config = copy.join("tokenizer_config.json");
    let mut json: Json = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["chat_template"] = inline;
    fs::write(&config, json.to_string()).unwrap();
    for (name, text) in files {
        fs::write(copy.join(name), text).unwrap();
    }
    copy
}

/// Every place where a template can stand, to GGUF, back, and to GGUF again.
#[test]
fn templates_are_carried_both_ways() {
    use serde_json::json;
    let dir = tempfile::tempdir().unwrap();
    let (gguf, again, back) =
        (dir.path().join("model.gguf"), dir.path().join("again.gguf"), dir.path().join("back"));
    let list = common::fixture("models/fmt-chat-list/tokenizer_config.json");
    let list: Json = serde_json::from_slice(&fs::read(list).unwrap()).unwrap();
    let of_list = |name: &str| {
        let entry = list["chat_template"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap();
        entry["template"].as_str().unwrap().to_string()
    };
    let pair = |name: &str, text: &str| (name.to_string(), text.to_string());
    let extra = "additional_chat_templates/tool_use.jinja";
    let cases = [
        (vec![], list["chat_template"].clone(), None),
        (vec![("chat_template.jinja", "J\n")], json!("inline"), Some(vec![pair("", "J\n")])),
        (vec![], json!("inline {{ 'é' }}"), Some(vec![pair("", "inline {{ 'é' }}")])),
        (
            vec![("chat_template.jinja", "J"), (extra, "T")],
            Json::Null,
            Some(vec![pair("", "J"), pair("tool_use", "T")]),
        ),
        (vec![("chat_template.json", "{\"chat_template\": \"P\"}")], Json::Null, Some(vec![pair("", "P")])),
        (vec![], Json::Null, Some(vec![])),
    ];
    for (files, inline, expected) in cases {
        let source = with_templates(dir.path(), &files, inline);
        let found = converted(&source, &gguf);
        match expected {
            Some(expected) => assert_eq!(found, expected, "{files:?}"),
            None => {
                assert!(found.len() > 1, "{found:?}");
                for (name, text) in &found {
                    assert_eq!(*text, of_list(if name.is_empty() { "default" } else { name }), "{name}");
                }
            }
        }
        let _ = fs::remove_dir_all(&back);
        let job = qconv::convert::ToHf::new(&gguf, &back);
        job.plan().unwrap().run(true, &common::budget(), &qconv::convert::Silent).unwrap();
        assert_eq!(converted(&back, &again), found, "{files:?}: there and back");
    }
}

/// `verify` renders what the file carries.
#[test]
fn verify_renders_the_templates() {
    use qconv::verify::{Options, Outcome, verify};
    use serde_json::json;
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("model.gguf");
    let check = |template: &str| {
        converted(&with_templates(dir.path(), &[], json!(template)), &gguf);
        let options = Options {
            sample: Some(16),
            forward: false,
            tokens: qconv::convert::TokenCheck::Skipped,
            ..Options::new(&gguf)
        };
        let report = verify(&options, &common::budget(), &qconv::convert::Silent).unwrap();
        let check = report.checks.into_iter().find(|c| c.name == "chat template").unwrap();
        (check.outcome, check.detail)
    };
    assert_eq!(
        check("{{ messages[0].content }}"),
        (Outcome::Passed, "default: 14 bytes for a question".into())
    );
    let (outcome, detail) =
        check("{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}");
    assert!(outcome == Outcome::Skipped && detail.contains("does not end"), "{detail}");
}
