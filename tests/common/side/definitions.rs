//! Definitions of architectures and recipes from outside the program: TOML, expressions, templates.

use qconv::ErrorKind::{Io, Limit, Malformed, Misuse, Unsupported};
use qconv::convert::Recipe;
use qconv::limits::Limits;
use qconv::{ErrorKind, arch};

use crate::side::{Accepted, Place, Refused, check, damaged, small_gguf};

/// A definition that takes the fixture's model.
const SOUND: &str = r#"
schema = 1
arch = "llama"
extends = "llama"

[[class]]
name = "LlamaForCausalLM"
model_type = "llama"

[example]
"#;

fn read(text: &str) -> qconv::Result<arch::Architecture> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    std::fs::write(&path, text).unwrap();
    arch::read(&path, &Limits::default())
}

#[test]
fn definitions() {
    let place = Place::model("llama");
    let with = |text: &str| format!("{SOUND}{text}\n");
    let require = |expr: &str| with(&format!("[[require]]\nexpr = {expr:?}\nwhy = 'w'"));
    let chain = |n: usize, of: &str| -> String {
        let vars: String =
            (0..n).map(|i| format!("v{i} = {:?}\n", of.replace('v', &format!("v{}", i + 1)))).collect();
        with(&format!("[vars]\n{vars}v{n} = \"'aaaa'\"\n[[require]]\nexpr = \"v0 == v0\"\nwhy = 'w'"))
    };
    let scale = "[tensors]\n\"model.norm.weight\" = { to = \"output_norm.weight\", ops = [{ scale = ['2'], sizes = ['1'], repeat = true }] }";
    for (case, text, expect) in [
        ("sound", SOUND.to_owned(), Accepted),
        ("nothing", String::new(), Refused(Malformed, "missing field `schema`")),
        ("schema", "schema = 18446744073709551616".into(), Refused(Malformed, "")),
        ("other schema", "schema = 2".into(), Refused(Unsupported, "schema 2 is not known")),
        ("unknown key", with("[xyz]"), Refused(Malformed, "unknown field `xyz`")),
        ("key twice", with("[vars]\na = '1'\na = '2'"), Refused(Malformed, "duplicate key")),
        ("deep array", format!("schema = 1\nx = {}", "[".repeat(100_000)), Refused(Malformed, "")),
        ("deep table", format!("schema = 1\nx = {}", "{a=".repeat(100_000)), Refused(Malformed, "")),
        ("deep key", format!("schema = 1\n{}x = 1", "a.".repeat(100_000)), Refused(Malformed, "")),
        (
            "too long",
            format!("{SOUND}#{}", " ".repeat(1 << 20)),
            Refused(Limit, "holds more than the 1048576 bytes"),
        ),
        ("no UTF-8", "schema = 1 # \u{fffd}".replace('\u{fffd}', "\u{85}"), Refused(Malformed, "")),
        (
            "itself",
            SOUND.replace("extends = \"llama\"", "extends = \"a\""),
            Refused(Limit, "extend each other"),
        ),
        (
            "elsewhere",
            SOUND.replace("extends = \"llama\"", "extends = \"../../a\""),
            Refused(Malformed, "which is not there"),
        ),
        ("no end", require("(((("), Refused(Malformed, "expected")),
        (
            "deep",
            require(&format!("{}1{}", "(".repeat(5000), ")".repeat(5000))),
            Refused(Malformed, "less nesting"),
        ),
        ("deep minus", require(&"-".repeat(10_000)), Refused(Malformed, "less nesting")),
        ("long chain", require(&format!("1{}", "+1".repeat(5000))), Refused(Malformed, "fewer operators")),
        ("many fields", require(&format!("a{}", ".a".repeat(5000))), Refused(Malformed, "fewer operators")),
        ("long text", require(&"1 ".repeat(50_000)), Refused(Malformed, "at most 16384")),
        ("no function", require("system('ls')"), Refused(Malformed, "system(): no such function")),
        ("by zero", require("1 / 0"), Refused(Malformed, "divides by zero")),
        ("least by minus one", require("(-9223372036854775807 - 1) / -1"), Refused(Malformed, "")),
        ("not finite", require("pow(10, 400)"), Refused(Malformed, "not finite")),
        ("list of lists", require("per_layer(per_layer(i, 65536), 65536)"), Refused(Limit, "steps")),
        ("too long a list", require("per_layer(i, 65537)"), Refused(Malformed, "is not a number of layers")),
        ("named twice", chain(60, "[v, v]"), Refused(Limit, "steps")),
        ("added twice", chain(60, "v + v"), Refused(Limit, "steps")),
        ("asked twice", chain(60, "v == v"), Refused(Limit, "steps")),
        ("deep variables", chain(2000, "v"), Refused(Limit, "deep")),
        ("template", with("[tensors]\n\"a.{i\" = \"b\""), Refused(Malformed, "a brace is not closed")),
        ("placeholder", with("[tensors]\n\"a.{foo}\" = \"b\""), Refused(Malformed, "placeholders are")),
        ("placeholder twice", with("[tensors]\n\"a.{i}.{i}\" = \"b\""), Refused(Malformed, "appears twice")),
        (
            "axis",
            with("[tensors]\n\"model.norm.weight\" = { split = ['a', 'b'], axis = 99 }"),
            Refused(Malformed, ""),
        ),
        ("stretches", with(scale), Accepted),
        ("no such kind", with("[tokenizer]\ntry = ['xyz']"), Refused(Unsupported, "\"xyz\" cannot be read")),
    ] {
        place.put("a.toml", &text);
        place.converts_by(case, Some("a.toml"), expect);
    }
    let missing = arch::read(&place.path("none.toml"), &Limits::default()).unwrap_err();
    assert_eq!(missing.kind(), Misuse, "{missing}");
}

#[test]
fn every_cut_and_every_byte() {
    let mut refused = 0;
    for (case, bytes) in damaged(SOUND.as_bytes()) {
        let Ok(text) = String::from_utf8(bytes) else { continue };
        if let Err(e) = read(&text) {
            assert!(matches!(e.kind(), Malformed | Unsupported | Misuse), "{case}: {e}");
            refused += 1;
        }
    }
    assert!(refused > SOUND.len(), "{refused}");
}

#[test]
fn recipes() {
    let place = Place::new();
    let sound = "schema = 1\nname = 'MINE'\nid = 15\ntype = 'Q8_0'\n";
    let rule = |when: &str| format!("{sound}[[rules]]\ntype = 'Q4_K'\nwhen = {when:?}\n");
    for (case, text, expect) in [
        ("sound", sound.to_owned(), Accepted),
        ("nothing", String::new(), Refused(Malformed, "missing field `schema`")),
        ("id", sound.replace("15", "4294967296"), Refused(Malformed, "id")),
        ("negative id", sound.replace("15", "-1"), Refused(Malformed, "id")),
        ("type", sound.replace("Q8_0", "Q9_9"), Refused(Malformed, "\"Q9_9\" is no type")),
        ("a type of no weights", sound.replace("Q8_0", "I32"), Refused(Unsupported, "")),
        ("circle", format!("{sound}extends = 'mine'"), Refused(Malformed, "which is not there")),
        ("role", format!("{sound}[[rules]]\nrole = 'x'\ntype = 'Q8_0'"), Refused(Malformed, "x")),
        ("deep", format!("x = {}", "[".repeat(60_000)), Refused(Malformed, "")),
        ("too long", format!("#{}", " ".repeat(1 << 16)), Refused(Limit, "holds more than the 65536 bytes")),
        ("long chain", rule(&format!("1{}", "+1".repeat(5000))), Refused(Malformed, "fewer operators")),
        ("growth", rule("len(per_layer(per_layer(i, 65536), 65536)) == 0"), Refused(Limit, "steps")),
        ("no UTF-8", String::from("schema = 1\n\u{0}"), Refused(Malformed, "")),
    ] {
        let path = place.path("r.toml");
        std::fs::write(&path, &text).unwrap();
        if let Err(e) = Recipe::parse(path.to_str().unwrap()) {
            check(case, Err(e), expect);
        }
        let output = place.output();
        let args = ["quantize".as_ref(), small_gguf().as_os_str(), output.as_os_str()];
        place.program(case, &[&args[..], &["-q".as_ref(), "-t".as_ref(), path.as_os_str()]].concat(), expect);
    }
    let kind = |e: qconv::Error| -> ErrorKind { e.kind() };
    assert_eq!(Recipe::parse("/nowhere/r.toml").map_err(kind).unwrap_err(), Io);
}
