//! llama.cpp judges the tokens of a conversion: what agrees is taken, whoever listed it; what does
//! not is refused, or said where that was allowed.
#![cfg(feature = "ggml")]

mod common;

use std::path::{Path, PathBuf};

use qconv::ErrorKind;
use qconv::container::gguf::Gguf;
use qconv::convert::{HfToGguf, Job, Silent, ToHf, TokenCheck};
use qconv::eval::parity::Explanation;
use qconv::limits::Limits;
use qconv::vocab;
use serde_json::{Value as Json, json};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models")
}

/// The fixture `llama` with another tokenizer: bytes, pairs of digits and of other characters, so that
/// splits show, and tokens that a fine-tune might add.
fn model(dir: &Path, regex: &str) -> PathBuf {
    let source = models().join("llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), dir.join(name)).unwrap();
    }
    let mut texts: Vec<String> = vocab::pre::byte_of_char().keys().map(char::to_string).collect();
    texts.sort_unstable();
    let mut merges = Vec::new();
    let pairs = ["0123456789", "aeiost", ".,!'", "ĠĊĉ"];
    for (left, right) in [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (2, 3), (3, 2), (3, 0), (0, 2)] {
        for l in pairs[left].chars() {
            merges.extend(pairs[right].chars().map(|r| (l, r)));
        }
    }
    merges.truncate(240);
    texts.extend(merges.iter().map(|(l, r)| format!("{l}{r}")));
    let entries: serde_json::Map<String, Json> =
        texts.iter().zip(0..).map(|(text, id)| (text.clone(), json!(id))).collect();
    let added: Vec<Json> = ["<|im_start|>", "<|im_end|>", "<tool>"]
        .iter()
        .zip(texts.len()..)
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": text.contains('|')})
        })
        .collect();
    let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
    let json = json!({"version": "1.0", "added_tokens": added, "normalizer": null, "post_processor": null,
        "decoder": null, "truncation": null, "padding": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "model": {"type": "BPE", "vocab": entries, "merges": merges}});
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    dir.to_path_buf()
}

fn plan(source: PathBuf, pre: Option<&str>, tokens: TokenCheck) -> qconv::Result<Job> {
    let output = Some(source.join("out.gguf"));
    HfToGguf { source, output, pre: pre.map(str::to_owned), tokens, ..HfToGguf::default() }.plan()
}

/// A fine-tune with added tokens, whose hash nobody lists.
#[test]
fn added_tokens_do_not_hide_the_pre_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let job = plan(model(dir.path(), LLAMA3), None, TokenCheck::Required).unwrap();
    let tokens = job.tokens.as_ref().unwrap();
    assert_eq!((tokens.pre.as_str(), tokens.model), ("smaug-bpe", "gpt2"));
    assert!(tokens.parity.agrees() && tokens.parity.explained.is_empty() && tokens.parity.tokens > 5000);
    job.run(true, &common::budget(), &Silent).unwrap();
    let gguf = Gguf::open(&job.output, &Limits::default()).unwrap();
    assert_eq!(gguf.metadata.str("tokenizer.ggml.pre"), Some("smaug-bpe"));
}

/// A structure that the table does not know, though it splits like one that it does.
#[test]
fn what_nobody_listed_is_found_by_trying() {
    let dir = tempfile::tempdir().unwrap();
    let other = LLAMA3
        .replace(r"\p{N}{1,3}", r"(?:\p{N}|\p{N}\p{N}|\p{N}\p{N}\p{N})")
        .replace(r"(?:\p{N}|\p{N}\p{N}|\p{N}\p{N}\p{N})", r"(?:\p{N}\p{N}\p{N}|\p{N}\p{N}|\p{N})");
    let job = plan(model(dir.path(), &other), None, TokenCheck::Required).unwrap();
    let pre = &job.tokens.as_ref().unwrap().pre;
    // The vocabulary has no long words, so that names which differ in ignore_merges are equal to it.
    assert!(["llama-bpe", "smaug-bpe"].contains(&pre.as_str()), "{pre}");
    assert!(job.plan.notes.iter().any(|n| n.contains("no table knows")), "{:?}", job.plan.notes);
}

#[test]
fn an_altered_pattern_is_caught() {
    let dir = tempfile::tempdir().unwrap();
    let altered = || model(dir.path(), &LLAMA3.replace("{1,3}", "{1,5}"));
    let e = plan(altered(), None, TokenCheck::Required).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    let (text, hint) = (e.to_string(), e.hint_text().unwrap().to_owned());
    // The structure, the first piece of text, and the ids of both.
    for part in ["tokenizer.json", "{1,5}", "1234", "tokenizer.json gives [", "llama.cpp ["] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(hint.contains("--pre") && hint.contains("--allow-token-mismatch"), "{hint}");

    // A name that was given has to agree, too.
    let e = plan(altered(), Some("llama-bpe"), TokenCheck::Required).unwrap_err();
    assert!(e.to_string().contains("\"llama-bpe\"") && e.hint_text().unwrap().contains("--allow"), "{e}");
    let e = plan(model(dir.path(), LLAMA3), Some("gpt-2"), TokenCheck::Required).unwrap_err();
    assert!(e.to_string().contains("\"gpt-2\""), "{e}");

    // Allowed, it is said.
    let job = plan(altered(), Some("llama-bpe"), TokenCheck::Lenient).unwrap();
    let tokens = job.tokens.unwrap();
    assert!(tokens.pre == "llama-bpe" && tokens.parity.differing > 0);
    let first = tokens.parity.first_difference.unwrap();
    assert_ne!(first.expected.len(), 0);
    assert!(job.plan.notes.iter().any(|n| n.starts_with("warning: llama.cpp does not give")));
}

/// Every fixture converts with the ids that its tokenizer gives, known differences aside.
#[test]
fn fixtures_keep_their_ids() {
    let mut checked = 0;
    for entry in std::fs::read_dir(models()).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let has_weights = std::fs::read_dir(&dir).unwrap().any(|f| {
            let file = f.unwrap().file_name();
            file.to_str().is_some_and(|f| f.ends_with(".safetensors") || f.ends_with(".bin"))
        });
        if !has_weights || !dir.join("config.json").exists() {
            continue;
        }
        let out = tempfile::tempdir().unwrap();
        let job = HfToGguf { source: dir, output: Some(out.path().join("x.gguf")), ..HfToGguf::default() };
        let job = job.plan().unwrap_or_else(|e| panic!("{name}: {e}"));
        let parity = job.tokens.unwrap().parity;
        println!("{name}: {parity}");
        assert!(parity.agrees() && parity.tokens > 5000, "{name}: {parity}");
        assert_ne!(parity.added_agree(), Some(false), "{name}: {parity}");
        let known: &[Explanation] = match name.as_str() {
            "bert" => &[Explanation::LongWord, Explanation::Marks],
            "gemma2-spm" | "gemma3-spm" => &[Explanation::UserDefined],
            _ => &[],
        };
        assert!(parity.explained.keys().all(|e| known.contains(e)), "{name}: {parity}");
        checked += 1;
    }
    assert!(checked > 15);
}

/// llama.cpp's tokenizer `llama`, which its converter writes for every tokenizer.model, merges by
/// score; a Unigram model's ids come from `t5`.
#[test]
fn unigram_in_a_decoder_gets_the_tokenizer_that_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &str, name: &str| {
        std::fs::copy(models().join(from).join(name), dir.path().join(name)).unwrap();
    };
    copy("fmt-spm-bpe", "model.safetensors");
    for name in ["config.json", "tokenizer.model", "tokenizer_config.json"] {
        copy("fmt-spm-unigram", name);
    }
    let job = plan(dir.path().to_path_buf(), None, TokenCheck::Required).unwrap();
    let tokens = job.tokens.as_ref().unwrap();
    assert_eq!(tokens.model, "t5");
    assert!(tokens.parity.explained.keys().all(|e| *e == Explanation::Bytes), "{tokens}");
    assert_ne!(tokens.parity.added_agree(), Some(false));
    assert!(job.plan.notes.iter().any(|n| n.contains("\"llama\" gives other ids")), "{:?}", job.plan.notes);
    job.run(true, &common::budget(), &Silent).unwrap();

    // And back, and again.
    let hf = dir.path().join("hf");
    let back = ToHf::new(&job.output, &hf);
    back.plan().and_then(|job| job.run(true, &common::budget(), &Silent)).unwrap();
    let again = plan(hf, None, TokenCheck::Required).unwrap().tokens.unwrap();
    assert_eq!(again.model, "t5");
}
