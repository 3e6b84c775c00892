//! Core ML packages that are run: what they read, say and predict, against llama.cpp with the same model.

mod common;
#[path = "common/place.rs"]
mod place;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use place::Place;
use serde_json::Value as Json;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:";

/// A place with packages of the trained fixture: `gpu/m.mlpackage`, `ane/m.mlpackage`, and `chunks/m`, which is the
/// second in several. The tokenizer of the first has a chat template.
fn packages() -> Place {
    let place = Place::new();
    let source = common::fixture("tiny-llama");
    let convert = |output: &str, args: &[&str]| {
        fs::create_dir(place.path(output)).unwrap();
        let output = format!("{output}/m.mlpackage");
        let all = ["hf-to-coreml", source.to_str().unwrap(), "-o", &output, "--context", "128", "-q"];
        place.succeeds(&[&all[..], args].concat());
    };
    convert("gpu", &[]);
    convert("ane", &["--profile", "ane"]);
    convert("chunks", &["--profile", "ane", "--chunk-size", "4M"]);
    let config = place.path("gpu/tokenizer_config.json");
    let mut json: Json = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["chat_template"] = TEMPLATE.into();
    fs::write(config, json.to_string()).unwrap();
    place
}

/// The objects that `run --json` prints.
fn run(place: &Place, args: &[&str], stdin: &str) -> Vec<Json> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qconv"));
    command.arg("run").args(args).args(["--json", "--temp", "0", "-q"]).current_dir(place.0.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{args:?}");
    serde_json::Deserializer::from_slice(&output.stdout).into_iter().map(Result::unwrap).collect()
}

/// fixtures/tiny-llama/reference.json has what transformers generates.
#[test]
fn packages_say_what_transformers_says() {
    let place = packages();
    let reference = fs::read(common::fixture("tiny-llama/reference.json")).unwrap();
    let reference: Json = serde_json::from_slice(&reference).unwrap();
    let prompt = "It was a truth";
    let expected = reference["greedy"][prompt]["text"].as_str().unwrap();
    for (model, args) in [
        ("gpu/m.mlpackage", &["-n", "12"][..]),
        ("gpu/m.mlpackage", &["-n", "4", "--fp16"]),
        ("ane/m.mlpackage", &["-n", "4", "-j", "1"]),
        ("chunks/m", &["-n", "4", "--fp16"]),
    ] {
        let found = run(&place, &[&[model, "-p", prompt], args].concat(), "");
        let text = found[0]["text"].as_str().unwrap();
        assert!(!text.is_empty() && expected.starts_with(text), "{model} {args:?}: {text:?}");
        assert_eq!(found[0]["generated_tokens"].to_string(), args[1], "{model} {args:?}");
        assert_eq!((found.len(), &found[0]["converted"]), (1, &Json::Null));
    }
    // Each question is read in its template, and what was said before it is not read again.
    let chat = run(&place, &["gpu/m.mlpackage", "--chat", "-n", "3"], "It was late\nAnd then?\n");
    let plain = run(&place, &["gpu/m.mlpackage", "-n", "3", "-p", "user:It was late\nassistant:"], "");
    assert_eq!(chat[0]["text"], plain[0]["text"]);
    assert_eq!(chat[0]["cached_tokens"], 0);
    assert!(chat[1]["cached_tokens"].as_u64() > chat[0]["prompt_tokens"].as_u64(), "{chat:?}");
    // Room for an answer, and no more.
    let full = run(&place, &["gpu/m.mlpackage", "-n", "-1", "-c", "8", "-p", prompt], "");
    assert_eq!(full[0]["finish_reason"], "length");
    assert_eq!(full[0]["prompt_tokens"].as_u64().unwrap() + full[0]["generated_tokens"].as_u64().unwrap(), 9);

    place.refuses(&["run", "ane/m.mlpackage", "--chat", "-p", "x"], &["ane/m.mlpackage", "no chat template"]);
    place.refuses(&["run", "gpu/m.mlpackage", "-p", "x", "-c", "129"], &["128 tokens", "129", "-c"]);
    place.refuses(&["eval", "perplexity", "gpu/m.mlpackage"], &["128 tokens", "512", "--ctx"]);
    let tokenizer = place.path("ane/tokenizer.json");
    let of_another = common::fixture("models/gpt2/tokenizer.json");
    fs::copy(&of_another, &tokenizer).unwrap();
    let other = run(&place, &["ane/m.mlpackage", "-p", "a", "-n", "0"], "");
    assert_eq!(other[0]["generated_tokens"], 0, "smaller vocabularies are what padded ones look like");
    let mut json: Json = serde_json::from_slice(&fs::read(&of_another).unwrap()).unwrap();
    json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
        "id": 2048, "content": "<|more|>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false
    }));
    fs::write(&tokenizer, json.to_string()).unwrap();
    place.refuses(&["run", "ane/m.mlpackage", "-p", "a"], &["2048"]);
    fs::remove_file(&tokenizer).unwrap();
    place.refuses(&["run", "ane/m.mlpackage", "-p", "a"], &["ane/m.mlpackage", "tokenizer.json beside it"]);
}

/// Against the GGUF file of the same weights, either way and by way of a baseline.
#[cfg(feature = "ggml")]
#[test]
fn packages_predict_what_llama_cpp_predicts() {
    let place = packages();
    let source = common::fixture("tiny-llama");
    let convert =
        ["hf-to-gguf", source.to_str().unwrap(), "-o", "f16.gguf", "-t", "f16", "--no-verify", "-q"];
    place.succeeds(&convert);
    let text = ["--ctx", "32", "--chunks", "3", "-q", "--json"];
    let json = |args: &[&str]| -> Json {
        serde_json::from_slice(&place.succeeds(&[&["eval"], args].concat()).stdout).unwrap()
    };
    let kld = |args: &[&str]| -> f64 {
        let divergence = &json(&[&["kld"], args].concat())["divergence"];
        let value = divergence["kld"]["value"].as_f64().unwrap();
        assert!(divergence["same_top"]["value"].as_f64().unwrap() > 0.97, "{args:?}: {divergence}");
        assert!(divergence["ln_ratio"]["value"].as_f64().unwrap().abs() < 1e-3, "{args:?}: {divergence}");
        value
    };
    let exact = kld(&[&["gpu/m.mlpackage", "--base", "f16.gguf"], &text[..]].concat());
    assert!(exact < 2e-6, "{exact}");
    let rounded = kld(&[&["gpu/m.mlpackage", "--base", "f16.gguf", "--fp16"], &text[..]].concat());
    assert!(exact < rounded && rounded < 2e-5, "{exact} and {rounded}");
    let other = kld(&[&["f16.gguf", "--base", "chunks/m"], &text[..]].concat());
    assert!(other < 2e-6, "{other}");
    json(&[&["baseline", "ane/m.mlpackage", "-o", "base", "--top-k", "2048"], &text[..]].concat());
    let kept = kld(&["f16.gguf", "--base", "base", "-q", "--json"]);
    assert!(kept < 1e-5, "{kept}");
    let ours = json(&[&["perplexity", "gpu/m.mlpackage"], &text[..]].concat());
    let theirs = json(&[&["perplexity", "f16.gguf"], &text[..]].concat());
    let value = |v: &Json| v["perplexity"]["value"].as_f64().unwrap();
    assert!((value(&ours) / value(&theirs) - 1.0).abs() < 1e-3, "{ours} and {theirs}");
    let rows = json(&[&["compare", "f16.gguf", "gpu/m.mlpackage"], &text[..]].concat());
    let bits = |n: usize| rows[n]["bits_per_weight"].as_f64().unwrap();
    assert!((bits(1) / bits(0) - 1.0).abs() < 0.01, "{rows}");
}

/// A package that is no language model.
fn mini() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/coreml/mini.mlpackage");
    path.to_str().unwrap().to_owned()
}

#[test]
fn what_packages_cannot_do_is_said() {
    let (place, mini) = (Place::new(), mini());
    std::fs::write(place.path("m.gguf"), b"GGUF").unwrap();
    place.refuses(&["run", "m.gguf", "-p", "x", "--fp16"], &["--fp16", "Core ML"]);
    place.refuses(&["eval", "perplexity", "m.gguf", "--fp16"], &["--fp16", "Core ML"]);
    place.refuses(&["run", &mini, "-p", "x", "--gpu-layers", "1"], &["mini.mlpackage", "--gpu-layers"]);
    place.refuses(&["run", &mini, "-p", "x", "--lora", "m.gguf"], &["mini.mlpackage", "--lora"]);
    #[cfg(feature = "ggml")]
    for command in [&["bench", &mini][..], &["embed", &mini, "-p", "x"], &["calibrate", &mini, "-o", "m"]] {
        place.refuses(command, &["mini.mlpackage", "Core ML package", "qconv run"]);
    }
    #[cfg(not(feature = "ggml"))]
    for command in [&["run", "m.gguf", "-p", "x"][..], &["eval", "perplexity", "m.gguf"]] {
        place.refuses(command, &["m.gguf", "without ggml"]);
    }
}

/// One of each kind of vocabulary.
#[cfg(feature = "ggml")]
const VOCABULARIES: [&str; 6] = [
    "tiny-llama",
    "models/gpt2",
    "models/qwen3",
    "models/gemma3-spm",
    "models/fmt-spm-bpe",
    "models/gpt_oss",
];

/// What a package has beside it is read as llama.cpp reads the GGUF file of the same model.
#[cfg(feature = "ggml")]
#[test]
fn tokens_are_llama_cpps() {
    use qconv::eval::SAMPLE_TEXT;
    use qconv::eval::engine::{Delimiters, Engine};
    use qconv::eval::tokens::Tokens;
    use qconv::limits::Limits;
    use qconv::vocab::{self, Source};

    for name in VOCABULARIES {
        let dir = common::fixture(name);
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let source = Source { dir: &dir, config: &config, vocab_size: None, pre: None, kinds: &[] };
        let vocab = vocab::load(&source, &Limits::default()).unwrap();
        let model = qconv::eval::trial::load(&vocab).unwrap();
        let model: &dyn Engine = &model;
        let tokens = Tokens::open(&dir, vocab.tokens.len(), &Limits::default()).unwrap();
        let ours = tokens.delimiters();
        assert_eq!(
            (ours.bos, ours.add_bos, ours.add_eos),
            {
                let Delimiters { bos, add_bos, add_eos, .. } = model.delimiters();
                (bos, add_bos, add_eos)
            },
            "{name}"
        );
        for id in 0..model.n_tokens() as i32 {
            assert_eq!(tokens.text(id), model.token_text(id), "{name}: {id}");
            // llama.cpp knows some ends by their names, too.
            if !model.is_end_of_generation(id) {
                assert_eq!(tokens.piece(id).unwrap(), model.piece(id).unwrap(), "{name}: {id}");
                assert!(!tokens.is_end(id), "{name}: {id}");
            }
        }
        assert!(tokens.piece(-1).is_err() && tokens.piece(model.n_tokens() as i32).is_err());
        assert!(model.delimiters().eos.is_some_and(|eos| tokens.is_end(eos)), "{name}");
        let end = model.delimiters().eos.and_then(|id| model.token_text(id)).unwrap();
        // Line breaks are a known difference: `Explanation::Characters`.
        let novel = SAMPLE_TEXT[..4000].replace('\n', " ");
        let texts = ["", "a", " b  c", "the end", &end, &format!("the{end} end"), &novel];
        for text in texts {
            for (add, parse) in [(true, false), (false, true), (true, true)] {
                let found = tokens.tokenize(text, add, parse).unwrap();
                assert_eq!(
                    found,
                    model.tokenize(text, add, parse).unwrap(),
                    "{name}: {text:?} {add} {parse}"
                );
            }
        }
    }
}
