//! config.json and its like: numbers of the wrong kind, contradictions, growth. `formats/spec/configs.md`.

use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::arch;
use qconv::limits::Limits;
use serde_json::{Value as Json, json};

use crate::side::{Accepted, Expect, Place, Refused, check, damaged};

/// What stands for the value of a key, as text: JSON has more numbers than a `Json`.
fn with(place: &Place, key: &str, value: &str) {
    let mut config: Json = Place::model("llama").json("config.json");
    config[key] = json!("VALUE");
    place.put("config.json", config.to_string().replace("\"VALUE\"", value));
}

/// Values of a kind that no number of layers, heads or tokens is.
const NO_COUNTS: [&str; 12] = [
    "\"x\"",
    "-1",
    "0.5",
    "1e308",
    "18446744073709551616",
    "[]",
    "{}",
    "[[[]]]",
    "true",
    "4294967296",
    "9223372036854775807",
    "1000000000",
];

/// Whether the definition takes the config, and what it makes of it.
fn metadata(config: &Json, llama: &arch::Architecture) -> qconv::Result<()> {
    let path = std::path::Path::new("config.json");
    arch::take_for(llama.clone(), config).and_then(|model| model.metadata()).map(drop).map_err(|e| e.at(path))
}

fn llama() -> arch::Architecture {
    arch::all().unwrap().into_iter().find(|a| a.name == "llama").unwrap()
}

#[test]
fn numbers_of_the_wrong_kind() {
    let llama = llama();
    let config = Place::model("llama").json("config.json");
    metadata(&config, &llama).unwrap();
    // Each key with each value: an error of the definition, or a value that its type holds. Never more.
    for key in config.as_object().unwrap().keys() {
        for value in NO_COUNTS.iter().filter_map(|v| serde_json::from_str::<Json>(v).ok()) {
            let mut other = config.clone();
            other[key] = value.clone();
            if let Err(e) = metadata(&other, &llama) {
                assert!(matches!(e.kind(), Malformed | Unsupported | Limit), "{key} = {value}: {e}");
            }
        }
    }
    let place = Place::model("llama");
    for (key, value, expect) in [
        ("num_hidden_layers", "\"2\"", Refused(Unsupported, "must give the number of layers")),
        ("num_hidden_layers", "-1", Refused(Unsupported, "must give the number of layers")),
        ("num_hidden_layers", "0.5", Refused(Malformed, "0.5 is no unsigned 32-bit integer")),
        ("num_hidden_layers", "[]", Refused(Unsupported, "must give the number of layers")),
        ("num_hidden_layers", "1e308", Refused(Malformed, "is no unsigned 32-bit integer")),
        ("num_hidden_layers", "18446744073709551616", Refused(Malformed, "is no unsigned 32-bit integer")),
        ("num_hidden_layers", "1000000000", Refused(Malformed, "the weights have 2 layers")),
        ("num_hidden_layers", "4294967296", Refused(Malformed, "the weights have 2 layers")),
        ("num_hidden_layers", "1", Refused(Malformed, "belongs to layer 1")),
        ("num_attention_heads", "0", Refused(Unsupported, "must give the number of layers")),
        ("num_attention_heads", "3", Refused(Unsupported, "must be a multiple")),
        ("num_attention_heads", "1000000000", Refused(Malformed, "q_proj")),
        ("head_dim", "[]", Refused(Malformed, "[] is no unsigned 32-bit integer")),
        ("head_dim", "\"x\"", Refused(Malformed, "is no unsigned 32-bit integer")),
        ("max_position_embeddings", "4294967296", Refused(Malformed, "is no unsigned 32-bit integer")),
        ("max_position_embeddings", "[]", Refused(Malformed, "is no unsigned 32-bit integer")),
        ("rms_norm_eps", "\"x\"", Refused(Malformed, "is no number")),
        ("vocab_size", "1048577", Refused(Limit, "at most 1048576")),
        ("vocab_size", "9223372036854775807", Refused(Limit, "at most 1048576")),
        ("vocab_size", "7", Refused(Malformed, "vocab_size 7")),
        ("rms_norm_eps", "NaN", Refused(Malformed, "\"NaN\" is no number")),
        ("rms_norm_eps", "1e999", Refused(Malformed, "is not the JSON expected")),
        ("architectures", "7", Refused(Malformed, "names no architecture")),
        ("architectures", "[{}]", Refused(Malformed, "names no architecture")),
        ("architectures", "[\"../../etc/passwd\"]", Refused(Unsupported, "is not known")),
        // Of no model of this kind, or not looked at by the conversion.
        ("layer_types", "[[1], null]", Accepted),
        ("eos_token_id", "[4294967296, -1, \"x\"]", Accepted),
        ("max_position_embeddings", "0", Accepted),
        ("x", "[[[[]]]]", Accepted),
    ] {
        with(&place, key, value);
        place.converts(&format!("{key} = {value}"), expect);
    }
}

#[test]
fn rope_and_quantization() {
    let place = Place::model("llama");
    let rope = |fields: &str| format!("{{\"rope_theta\": 10000.0, {fields}}}");
    for (key, value, expect) in [
        ("rope_parameters", rope("\"rope_type\": \"llama3\", \"factor\": 0"), Refused(Malformed, "factor")),
        (
            "rope_parameters",
            rope("\"rope_type\": \"llama3\", \"factor\": \"x\""),
            Refused(Malformed, "factor"),
        ),
        (
            "rope_parameters",
            rope("\"rope_type\": \"llama3\", \"factor\": -8.0"),
            Refused(Malformed, "factor"),
        ),
        ("quantization_config", "1".into(), Refused(Unsupported, "unnamed")),
        (
            "quantization_config",
            "{\"quant_method\": \"\\u001b[31m\"}".into(),
            Refused(Unsupported, "cannot be read"),
        ),
    ] {
        with(&place, key, &value);
        place.converts(&format!("{key} = {value}"), expect);
    }
    let place = Place::model("fmt-gptq4");
    for (field, value, expect) in [
        ("bits", json!(0), Refused(Unsupported, "bits = 0")),
        ("bits", json!(-4), Refused(Unsupported, "bits = -4")),
        ("bits", json!("4"), Refused(Malformed, "is no integer")),
        ("bits", json!(4.5), Refused(Malformed, "is no integer")),
        ("bits", json!(1u64 << 63), Refused(Malformed, "is no integer")),
        ("bits", json!(null), Refused(Malformed, "bits is missing")),
        ("group_size", json!(0), Refused(Malformed, "group_size = 0")),
        ("group_size", json!(-2), Refused(Malformed, "group_size = -2")),
        ("group_size", json!(i64::MAX), Refused(Malformed, "")),
        ("group_size", json!([128]), Refused(Malformed, "is no integer")),
        ("quant_method", json!(["gptq"]), Refused(Unsupported, "unnamed")),
        ("quant_method", json!("awq"), Refused(Malformed, "")),
    ] {
        let place = Place::model("fmt-gptq4");
        place.edit("config.json", |c| c["quantization_config"][field] = value.clone());
        place.converts(&format!("{field} = {value}"), expect);
    }
    place.converts("sound", Accepted);
}

#[test]
fn growth_and_depth() {
    let place = Place::model("llama");
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
    let yaml = |text: &str| format!("---\n{text}\n---\n");
    let laughs: String = ('b'..'k')
        .map(|c| format!("{c}: &{c} [{}]\n", format!("*{},", (c as u8 - 1) as char).repeat(9)))
        .collect();
    for (name, text, expect) in [
        ("config.json", "[".repeat(100_000), Refused(Malformed, "recursion limit")),
        ("config.json", nested("{\"a\":", "}"), Refused(Malformed, "recursion limit")),
        (
            "config.json",
            format!("[{}0]", "0,".repeat(2 << 20)),
            Refused(Limit, "more than the 1048576 values"),
        ),
        (
            "config.json",
            format!("[{}0]", "{},".repeat(1 << 20)),
            Refused(Limit, "more than the 1048576 values"),
        ),
        ("config.json", "[]".into(), Refused(Malformed, "is no JSON object")),
        ("config.json", String::new(), Refused(Malformed, "is not the JSON expected")),
        ("config.json", "{}{}".into(), Refused(Malformed, "is not the JSON expected")),
        ("generation_config.json", "[".repeat(100_000), Accepted),
        ("generation_config.json", "{\"temperature\": 1e999}".into(), Accepted),
        (
            "generation_config.json",
            "{\"top_k\": [[]], \"top_p\": \"x\", \"temperature\": -1e300}".into(),
            Accepted,
        ),
        ("README.md", yaml(&nested("[", "]")), Accepted),
        ("README.md", yaml(&nested("[", "")), Accepted),
        ("README.md", yaml(&"- ".repeat(100_000)), Accepted),
        ("README.md", yaml(&format!("a: &a [x,x,x,x,x,x,x,x,x]\n{laughs}tags: *j")), Accepted),
        ("README.md", "---\n".into(), Accepted),
        ("README.md", yaml("name: \"a\\u0000b\\ntags: [no, 1, {}]"), Accepted),
    ] {
        let place = Place::model("llama");
        place.put(name, &text);
        place.converts(&format!("{name} {:.40}", text.trim_start_matches("---\n")), expect);
    }
    // Many values, but no more than are allowed.
    with(&place, "layer_types", &format!("[{}0]", "\"full_attention\",".repeat(400_000)));
    place.converts("many layers", Accepted);
    let file = std::fs::File::create(place.path("config.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    place.converts("a sparse terabyte", Refused(Limit, "holds more than"));
    // Of a key that comes twice the last counts, as in Python.
    let text = Place::model("llama").json("config.json").to_string();
    place.put("config.json", text.replacen('{', "{\"num_hidden_layers\": \"x\",", 1));
    place.converts("a key twice", Accepted);
}

#[test]
fn every_cut_and_every_byte() {
    let llama = llama();
    let path = std::path::Path::new("config.json");
    let config = std::fs::read(Place::model("llama").path("config.json")).unwrap();
    let text = String::from_utf8(config).unwrap().trim_end().to_owned();
    let mut refused = 0;
    for (case, bytes) in damaged(text.as_bytes()) {
        let read = qconv::container::side::from_json::<Json>(&bytes, path).and_then(|c| metadata(&c, &llama));
        match read {
            Err(e) => {
                refused += 1;
                assert!(matches!(e.kind(), Malformed | Unsupported | Limit), "{case}: {e}");
            }
            Ok(()) => assert!(!case.starts_with("cut"), "{case}"),
        }
    }
    assert!(refused > text.len());
    let place = Place::model("llama");
    for n in (0..text.len()).step_by(200) {
        place.put("config.json", &text[..n]);
        place.converts("cut", Refused(Malformed, "is not the JSON expected"));
    }
}

/// Adapters, and preprocessors of projectors.
#[test]
fn adapters() {
    let limits = Limits::default();
    let adapter = |change: &dyn Fn(&mut Json)| {
        let place = Place::new();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(crate::common::fixture("lora/llama").join(name), place.path(name)).unwrap();
        }
        place.edit("adapter_config.json", change);
        place
    };
    let base = Place::model("llama");
    let try_it = |case: &str, place: &Place, expect: Expect| {
        let convert = qconv::convert::LoraToGguf {
            adapter: place.source(),
            base: base.source(),
            output: Some(place.output()),
            limits: limits.clone(),
            ..Default::default()
        };
        check(case, convert.plan().map(drop), expect);
        let (source, output, base) = (place.source(), place.output(), base.source());
        let args = ["lora-to-gguf".as_ref(), source.as_os_str(), "--base".as_ref(), base.as_os_str()];
        let args = [&args[..], &["-o".as_ref(), output.as_os_str(), "-q".as_ref()]].concat();
        place.program(case, &args, expect);
    };
    try_it("sound", &adapter(&|_| {}), Accepted);
    let patterns = |n: usize| (0..n).map(|i| (format!("x{i}"), json!(1))).collect::<serde_json::Map<_, _>>();
    let classes =
        |n: usize| (0..n).map(|i| (format!("x{i}|[^a]*"), json!(1))).collect::<serde_json::Map<_, _>>();
    for (key, value, expect) in [
        ("peft_type", json!(["LORA"]), Refused(Unsupported, "unnamed")),
        ("r", json!("8"), Refused(Malformed, "no r other than 0")),
        ("r", json!(0), Refused(Malformed, "no r other than 0")),
        ("r", json!(-1e308), Refused(Malformed, "")),
        ("lora_alpha", json!({}), Refused(Malformed, "no lora_alpha")),
        ("rank_pattern", json!({"(": 1}), Refused(Malformed, "is no pattern with a number")),
        ("rank_pattern", json!({"a": "x"}), Refused(Malformed, "is no pattern with a number")),
        ("rank_pattern", json!({"((a{1000}){1000}){1000}": 1}), Refused(Limit, "is too large")),
        (
            "alpha_pattern",
            json!(patterns(5000)),
            Refused(Limit, "alpha_pattern: there are more than 4096 patterns"),
        ),
        ("rank_pattern", json!(patterns(4096)), Accepted),
        ("rank_pattern", json!(classes(2000)), Refused(Limit, "no plain names")),
        ("alora_invocation_tokens", json!([-1]), Refused(Malformed, "is no list of token ids")),
    ] {
        try_it(&format!("{key} = {:.60}", value.to_string()), &adapter(&|c| c[key] = value.clone()), expect);
    }
    let deep = adapter(&|_| {});
    deep.put("adapter_config.json", "[".repeat(100_000));
    try_it("deep", &deep, Refused(Malformed, "recursion limit"));
}
