//! Vocabularies of the fixtures: against what llama.cpp's converter wrote, against the
//! `tokenizers` library's ids, and there and back.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qconv::container::gguf::{Array, Metadata, Value};
use qconv::limits::Limits;
use qconv::vocab::{self, Kind, Source, TokenType, Vocab};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

const BPE: [&str; 9] =
    ["llama", "llama-rope3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt2", "fmt-chat-list"];
const SPM: [&str; 2] = ["gemma3-spm", "fmt-spm-bpe"];
const UNIGRAM: [&str; 1] = ["fmt-spm-unigram"];
const ENCODERS: [&str; 2] = ["bert", "t5"];

const TEXT: &str = "The quick brown fox's 1234 jumps, \"over\"  13 lazy dogs!\n\n\tIt'll be\r\n   3.14159 — naïve Ünï 漢字 🦀\u{200d} e\u{301} <|im_start|>user <unk> </s> word     end  ";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn model_dir(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

fn config_of(dir: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn load(dir: &Path) -> Vocab {
    let config = config_of(dir);
    let vocab_size = config.get("vocab_size").or_else(|| config["text_config"].get("vocab_size"));
    let vocab_size = vocab_size.and_then(Json::as_u64);
    let source = Source { dir, config: &config, vocab_size, pre: None, kinds: &[] };
    vocab::load(&source, &Limits::default()).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

fn metadata(vocab: &Vocab) -> Metadata {
    let mut m = Metadata::default();
    vocab.to_metadata(&mut m);
    m
}

/// Writes the Hugging Face files and the config that goes with them.
fn write(vocab: &Vocab, dir: &Path) {
    for (name, bytes) in vocab.write_hf().unwrap() {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    let mut config = json!({"vocab_size": vocab.tokens.len()});
    for (key, id) in vocab.config_ids() {
        config[key] = json!(id);
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// A JSON string with ASCII escapes, as Python writes it.
fn python_string(bytes: &[u8]) -> String {
    let mut out = String::from("\"");
    for c in std::str::from_utf8(bytes).unwrap().chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|u| out.push_str(&format!("\\u{u:04x}"))),
        }
    }
    out + "\""
}

/// Python's repr of a float: of two shortest forms equally near it takes the even one.
fn python_float(v: f64) -> String {
    let shortest = format!("{v:?}");
    let decimals = shortest.split_once('.').map_or(0, |(_, digits)| digits.len());
    let even = format!("{v:.decimals$}");
    if !shortest.contains('e') && even.parse() == Ok(v) { even } else { shortest }
}

fn sha(text: &[u8]) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

/// A value in the form of the `expect` files.
fn recorded(value: &Value) -> Json {
    match value {
        Value::Array(array) => {
            let items: Vec<String> = match array {
                Array::String(v) => v.iter().map(|s| python_string(s)).collect(),
                Array::F32(v) => v.iter().map(|&f| python_float(f.into())).collect(),
                Array::I32(v) => v.iter().map(i32::to_string).collect(),
                Array::U8(v) => v.iter().map(u8::to_string).collect(),
                other => panic!("{other:?}"),
            };
            let list = format!("[{}]", items.join(", "));
            let kind = array.element_type().name();
            if array.len() > 24 {
                json!({"array": kind, "len": array.len(), "sha256": sha(list.as_bytes())})
            } else {
                json!({"array": kind, "values": serde_json::from_str::<Json>(&list).unwrap()})
            }
        }
        Value::String(s) if s.len() > 160 => json!({"len": s.len(), "sha256": sha(s), "type": "STRING"}),
        Value::String(s) => json!({"type": "STRING", "value": String::from_utf8_lossy(s)}),
        Value::U32(v) => json!({"type": "UINT32", "value": v}),
        Value::Bool(v) => json!({"type": "BOOL", "value": v}),
        other => panic!("{other:?}"),
    }
}

fn compare(name: &str, expect: &str, metadata: &Metadata, differs: &[&str]) {
    let path = fixtures().join("expect").join(format!("{expect}.json"));
    let expect: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let soft: Vec<&str> = expect["soft_kv"].as_array().unwrap().iter().filter_map(Json::as_str).collect();
    let wanted = expect["kv"].as_object().unwrap().iter().filter(|(k, _)| k.starts_with("tokenizer."));
    let mut count = 0;
    for (key, value) in wanted {
        let found = metadata.get(key).map(recorded);
        let same = found.as_ref() == Some(value);
        assert!(
            same || soft.contains(&key.as_str()) || differs.contains(&key.as_str()),
            "{name} {key}: {value} {found:?}"
        );
        count += 1;
    }
    let extra: Vec<_> =
        metadata.iter().filter(|(k, _)| expect["kv"].get(*k).is_none()).map(|(k, _)| k).collect();
    assert!(extra.is_empty(), "{name}: {extra:?}");
    assert!(count > 5);
}

#[test]
fn metadata_is_what_llama_cpp_writes() {
    for name in BPE.iter().chain(&SPM).chain(&UNIGRAM).chain(&ENCODERS) {
        let expect = if model_dir(name).join("config.json").exists()
            && !name.contains("-spm")
            && !name.starts_with("fmt")
            && !ENCODERS.contains(name)
        {
            format!("micro-{name}")
        } else {
            (*name).to_owned()
        };
        let mut vocab = load(&model_dir(name));
        if UNIGRAM.contains(name) {
            // SentencePiece finds its user-defined pieces as they stand, and so must llama.cpp; its
            // converter makes ordinary ones of them.
            let user_defined = vocab.token_types.iter_mut().filter(|t| **t == TokenType::UserDefined);
            assert_eq!(user_defined.map(|t| *t = TokenType::Normal).count(), 2);
        }
        compare(name, &expect, &metadata(&vocab), &[]);
    }
}

#[test]
fn pre_tokenizers_are_chosen_by_structure() {
    for name in BPE {
        // fmt-chat-list has Llama 3's pattern without ignore_merges, which is what sets
        // "smaug-bpe" and "llama-bpe" apart.
        let pre = if name == "fmt-chat-list" { "smaug-bpe" } else { "smollm" };
        assert_eq!(load(&model_dir(name)).pre, pre, "{name}");
    }
    assert_eq!(load(&fixtures().join("tiny-llama")).pre, "gpt-2");
}

/// What is added around a text can be said or left to the default: T5's own files leave it, a
/// tokenizer.json that was written says it.
fn without_flags(mut m: Metadata) -> Metadata {
    for role in ["bos", "eos", "sep"] {
        m.remove(&format!("tokenizer.ggml.add_{role}_token"));
    }
    m
}

#[test]
fn encoders_there_and_back() {
    for name in ENCODERS {
        let source = model_dir(name);
        let first = load(&source);
        let again = Vocab::from_metadata(&metadata(&first)).unwrap();
        assert_eq!(metadata(&again), metadata(&first));
        let dir = tempfile::tempdir().unwrap();
        write(&again, dir.path());
        assert_eq!(without_flags(metadata(&load(dir.path()))), without_flags(metadata(&first)), "{name}");
        // From the other of the two files.
        for file in ["spiece.model", "vocab.txt"] {
            let _ = std::fs::remove_file(dir.path().join(file));
        }
        let mut alone = metadata(&load(dir.path()));
        let mut wanted = metadata(&first);
        if name == "t5" {
            // tokenizer.json names the unknown token; its number is llama.cpp's default.
            alone.remove("tokenizer.ggml.unknown_token_id");
            wanted.remove("tokenizer.ggml.unknown_token_id");
        }
        assert_eq!(without_flags(alone), without_flags(wanted), "{name}");
        for special in [false, true] {
            let ids = |dir: &Path| {
                let t = vocab::reference_tokenizer(dir).unwrap();
                t.encode((TEXT, TEXT), special).unwrap().get_ids().to_vec()
            };
            assert_eq!(ids(&source), ids(dir.path()), "{name}");
        }
    }
}

#[test]
fn bert_from_vocab_txt() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vocab.txt", "tokenizer_config.json", "config.json"] {
        std::fs::copy(model_dir("bert").join(name), dir.path().join(name)).unwrap();
    }
    assert_eq!(metadata(&load(dir.path())), metadata(&load(&model_dir("bert"))));
    let ids =
        |dir: &Path| vocab::reference_tokenizer(dir).unwrap().encode(TEXT, true).unwrap().get_ids().to_vec();
    assert_eq!(ids(dir.path()), ids(&model_dir("bert")));
}

const SENTENCEPIECE: [(&str, &[u32]); 6] = [
    (
        "It was a truth universally acknowledged,",
        &[29, 8, 32, 16, 180, 18, 74, 123, 149, 12, 5, 71, 41, 16, 25, 67, 23, 17, 44, 33, 19, 58, 19, 4],
    ),
    (
        "  two  spaces\n\tand a \u{fb01}ne \u{bd} \u{ff21}\u{ff42}\u{ff43}  ",
        &[277, 3, 5, 39, 9, 76, 5, 14, 16, 64, 72, 7, 3, 2, 174, 51, 25],
    ),
    ("naïve café 漢字漢 x", &[3, 23, 9, 2, 129, 143, 9, 37, 2, 3, 2, 3, 201]),
    ("", &[]),
    (" ", &[]),
    ("the\u{a0}the\u{3000}the", &[11, 11, 11]),
];

/// What SentencePiece's own library (0.2.3) says of T5's toy; made by its `EncodeAsIds`.
#[test]
fn unigram_ids_are_sentencepieces() {
    let t = vocab::reference_tokenizer(&model_dir("t5")).unwrap();
    for (text, ids) in SENTENCEPIECE {
        assert_eq!(t.encode(text, false).unwrap().get_ids(), ids, "{text:?}");
    }
}

#[test]
fn there_and_back() {
    let all =
        BPE.iter().chain(&SPM).chain(&UNIGRAM).map(|n| model_dir(n)).chain([fixtures().join("tiny-llama")]);
    for source in all {
        let first = load(&source);
        let again = Vocab::from_metadata(&metadata(&first)).unwrap();
        assert_eq!(metadata(&again), metadata(&first));
        let dir = tempfile::tempdir().unwrap();
        write(&again, dir.path());
        assert_eq!(metadata(&load(dir.path())), metadata(&first), "{}", source.display());
        if !first.charsmap.is_empty() {
            continue; // GGUF's `llama` model has no place for it.
        }
        let ids = |dir: &Path, special| {
            let t = vocab::reference_tokenizer(dir).unwrap();
            t.encode(TEXT, special).unwrap().get_ids().to_vec()
        };
        assert_eq!(ids(&source, false), ids(dir.path(), false), "{}", source.display());
        // And from tokenizer.json alone, or tokenizer.model alone.
        if first.kind == Kind::Spm {
            std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
            assert_eq!(ids(&source, false), ids(dir.path(), false), "{}", source.display());
        }
    }
}

/// What llama.cpp's SentencePiece tokenizer does with a piece of raw text: join the neighbours
/// whose text is the token of the highest score, leftmost first, then fall back to bytes.
fn llama_cpp_spm(vocab: &Vocab, text: &str) -> Vec<u32> {
    let scores = vocab.scores.as_ref().unwrap();
    let ids: HashMap<&[u8], u32> = vocab.tokens.iter().enumerate().map(|(i, t)| (&t[..], i as u32)).collect();
    let prefix = if vocab.add_space_prefix != Some(false) { " " } else { "" };
    let escaped = format!("{prefix}{text}").replace(' ', "\u{2581}");
    let mut parts: Vec<String> = escaped.chars().map(String::from).collect();
    loop {
        let mut best: Option<(f32, usize)> = None;
        for i in 1..parts.len() {
            let joined = format!("{}{}", parts[i - 1], parts[i]);
            if let Some(&id) = ids.get(joined.as_bytes())
                && best.is_none_or(|(score, _)| scores[id as usize] > score)
            {
                best = Some((scores[id as usize], i));
            }
        }
        let Some((_, i)) = best else { break };
        let right = parts.remove(i);
        parts[i - 1] += &right;
    }
    let byte = |b: &u8| ids[format!("<0x{b:02X}>").as_bytes()];
    let one = |p: &String| match ids.get(p.as_bytes()) {
        Some(&id) => vec![id],
        None => p.as_bytes().iter().map(byte).collect(),
    };
    parts.iter().flat_map(one).collect()
}

#[test]
fn scores_merge_like_the_tokenizers_library() {
    let words = fixtures().join("tiny-llama/evaluation.txt");
    let prose: String = std::fs::read_to_string(words).unwrap().chars().take(3000).collect();
    let texts = ["Hello world", "a  b   c", "naïve 漢字 🦀", " leading", "x\ny\tz", prose.as_str()];
    let reference = vocab::reference_tokenizer(&model_dir("fmt-spm-bpe")).unwrap();
    let from_model = load(&model_dir("fmt-spm-bpe"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(model_dir("fmt-spm-bpe").join(name), dir.path().join(name)).unwrap();
    }
    let recovered = load(dir.path());
    assert!(recovered.notes.iter().any(|n| n.contains("recovered")));
    // Recovered without loss: the very scores of tokenizer.model.
    assert_eq!(metadata(&recovered), metadata(&from_model));
    for text in texts {
        let ids = reference.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(llama_cpp_spm(&from_model, text), ids, "{text:?}");
    }
}

#[test]
fn gemma_without_tokenizer_model() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        std::fs::copy(model_dir("gemma3-spm").join(name), dir.path().join(name)).unwrap();
    }
    // This toy's tokenizer.json does not know the token "\n\n" of its tokenizer.model: llama.cpp
    // would make it of two line ends, the tokenizers library would not.
    let config = config_of(dir.path());
    let source = |pre| Source { dir: dir.path(), config: &config, vocab_size: Some(600), pre, kinds: &[] };
    let merging = vocab::load(&source(None), &Limits::default()).unwrap();
    assert_eq!((merging.kind, merging.add.bos), (Kind::Gemma4, Some(true)));
    assert!(merging.notes.iter().any(|n| n.contains(r#""\n\n""#)), "{:?}", merging.notes);
    // Real Gemma lists it as an added token; then the vocabulary is recovered.
    let path = dir.path().join("tokenizer.json");
    let mut json: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let id = json["model"]["vocab"]["\n\n"].clone();
    let list = json["added_tokens"].as_array_mut().unwrap();
    list.push(json!({"id": id, "content": "\n\n", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false}));
    std::fs::write(&path, json.to_string()).unwrap();
    let recovered = vocab::load(&source(None), &Limits::default()).unwrap();
    let original = load(&model_dir("gemma3-spm"));
    assert_eq!((recovered.kind, recovered.add_space_prefix), (Kind::Spm, Some(false)));
    let reference = vocab::reference_tokenizer(dir.path()).unwrap();
    for text in ["It was a truth", "two  spaces   three", "naïve 漢字"] {
        let ids = reference.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(llama_cpp_spm(&recovered, text), ids, "{text:?}");
    }
    // Same tokens; user-defined instead of normal where the list says so.
    assert_eq!(recovered.tokens, original.tokens);
    assert_eq!(recovered.token_types[id.as_u64().unwrap() as usize], TokenType::UserDefined);
}

/// SmolLM2 from the wheel: `QCONV_SMOLLM2_GGUF=FILE cargo test --release --test vocab -- --ignored`
#[test]
#[ignore = "needs the GGUF file that `make demo MODEL=smollm2` fetches"]
fn smollm2() {
    let path = std::env::var_os("QCONV_SMOLLM2_GGUF").expect("QCONV_SMOLLM2_GGUF names the file");
    let gguf = qconv::container::gguf::Gguf::open(Path::new(&path), &Limits::default()).unwrap();
    let vocab = Vocab::from_metadata(&gguf.metadata).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write(&vocab, dir.path());
    let again = load(dir.path());
    assert_eq!(metadata(&again), metadata(&vocab));
    compare("SmolLM2", "SmolLM2-135M-f16", &metadata(&again), &[]);
}

/// llama.cpp's vocabulary files with the ids of the original tokenizers;
/// `QCONV_LLAMA_CPP_MODELS` names the folder `models` of its source.
#[test]
#[ignore = "needs llama.cpp's source tree"]
fn written_tokenizers_give_the_original_ids() {
    let folder = std::env::var_os("QCONV_LLAMA_CPP_MODELS").expect("QCONV_LLAMA_CPP_MODELS names the folder");
    let folder = PathBuf::from(folder);
    let mut all_good = true;
    for name in [
        "llama-bpe",
        "qwen2",
        "qwen35",
        "gpt-2",
        "mpt",
        "starcoder",
        "refact",
        "command-r",
        "deepseek-coder",
        "deepseek-llm",
        "falcon",
        "llama-spm",
        "phi-3",
        "gemma-4",
        "bert-bge",
    ] {
        let path = folder.join(format!("ggml-vocab-{name}.gguf"));
        let gguf = qconv::container::gguf::Gguf::open(&path, &Limits::default()).unwrap();
        let mut vocab = Vocab::from_metadata(&gguf.metadata).unwrap();
        vocab.add.bos = Some(false);
        let dir = tempfile::tempdir().unwrap();
        write(&vocab, dir.path());
        let t = vocab::reference_tokenizer(dir.path()).unwrap();
        let read = |ending: &str| std::fs::read_to_string(path.with_extension(ending)).unwrap();
        let (inputs, outputs) = (read("gguf.inp"), read("gguf.out"));
        let (mut good, mut bad) = (0, Vec::new());
        for (text, ids) in inputs.split("\n__ggml_vocab_test__\n").zip(outputs.lines()) {
            let ids: Vec<u32> = ids.split_whitespace().map(|i| i.parse().unwrap()).collect();
            match t.encode(text, false).unwrap().get_ids() == ids {
                true => good += 1,
                false => bad.push((text.to_owned(), t.encode(text, false).unwrap().get_ids().to_vec(), ids)),
            }
        }
        eprintln!("{name}: {good} texts agree, {} do not", bad.len());
        for b in bad.iter().take(3) {
            eprintln!("   {b:?}");
        }
        let again = load(dir.path());
        let (a, b) = (metadata(&again), metadata(&vocab));
        for (key, value) in b.iter() {
            if a.get(key) != Some(value) {
                eprintln!("   {key}: {:?} -> {value}", a.get(key).map(|v| v.to_string()));
            }
        }
        all_good &= bad.is_empty();
    }
    assert!(all_good);
}
