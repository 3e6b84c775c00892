//! tokenizer.json, tokenizer.model, vocab.txt, merges.txt, added tokens.

use std::fs;

use qconv::ErrorKind::{Limit, Malformed, Unsupported};
use qconv::limits::Limits;
use qconv::vocab::{Source, load};
use serde_json::{Value as Json, json};

use crate::side::{Accepted, Compared, Place, Refused, damaged};

const TOKENIZER: &str = "tokenizer.json";

/// Only the vocabulary, of a model that says `size` tokens.
fn read(place: &Place, size: Option<u64>) -> qconv::Result<()> {
    let (dir, config) = (place.source(), json!({}));
    let source = Source { dir: &dir, config: &config, vocab_size: size, pre: None, kinds: &[] };
    load(&source, &Limits::default()).map(drop)
}

#[test]
fn byte_level() {
    let edit = |change: &dyn Fn(&mut Json)| {
        let place = Place::model("llama");
        place.edit(TOKENIZER, change);
        place
    };
    let sequence = |kind: &str, list: &str, n: usize| {
        let (open, close) = (format!("{{\"type\":{kind:?},{list:?}:["), "]}");
        format!("{}{}", open.repeat(n), close.repeat(n))
    };
    let text = |place: &Place| fs::read_to_string(place.path(TOKENIZER)).unwrap();
    for (case, place, expect) in [
        (
            "id beyond the model",
            edit(&|t| t["model"]["vocab"]["zzz"] = json!(512)),
            Refused(Malformed, "id 512"),
        ),
        ("id of 2^32", edit(&|t| t["model"]["vocab"]["zzz"] = json!(1u64 << 32)), Refused(Malformed, "u32")),
        (
            "id below 2^32",
            edit(&|t| t["model"]["vocab"]["zzz"] = json!(u32::MAX)),
            Refused(Limit, "at most 1048576"),
        ),
        ("negative id", edit(&|t| t["model"]["vocab"]["zzz"] = json!(-1)), Refused(Malformed, "u32")),
        (
            "id twice",
            edit(&|t| t["model"]["vocab"]["zzz"] = json!(300)),
            Refused(Malformed, "two tokens have the id 300"),
        ),
        ("id as text", edit(&|t| t["model"]["vocab"]["zzz"] = json!("1")), Refused(Malformed, "u32")),
        ("no vocabulary", edit(&|t| t["model"]["vocab"] = json!(7)), Refused(Malformed, "a vocabulary")),
        ("empty vocabulary", edit(&|t| t["model"]["vocab"] = json!({})), Compared("makes no token")),
        (
            "merges of one part",
            edit(&|t| t["model"]["merges"] = json!([["a"]])),
            Refused(Malformed, "two parts"),
        ),
        ("merges of numbers", edit(&|t| t["model"]["merges"] = json!([1])), Refused(Malformed, "a merge")),
        (
            "merge of unknown pieces",
            edit(&|t| t["model"]["merges"] = json!(["qqqq zzzz"])),
            Compared("out of vocabulary"),
        ),
        (
            "two added tokens of one id",
            edit(&|t| {
                let mut other = t["added_tokens"][0].clone();
                other["content"] = json!("zzzz");
                t["added_tokens"].as_array_mut().unwrap().push(other);
            }),
            Refused(Malformed, "have the same id"),
        ),
        (
            "an added token of no text",
            edit(&|t| {
                let mut empty = t["added_tokens"][0].clone();
                (empty["id"], empty["content"]) = (json!(300), json!(""));
                t["added_tokens"].as_array_mut().unwrap().push(empty);
            }),
            Accepted,
        ),
        (
            "an added token twice",
            edit(&|t| {
                let same = t["added_tokens"][0].clone();
                t["added_tokens"].as_array_mut().unwrap().push(same);
            }),
            Accepted,
        ),
        ("added token beyond", edit(&|t| t["added_tokens"][0]["id"] = json!(1u32 << 31)), Accepted),
        ("added tokens", edit(&|t| t["added_tokens"] = json!({})), Refused(Malformed, "")),
        ("kind", edit(&|t| t["model"]["type"] = json!("WordLevel")), Refused(Unsupported, "WordLevel")),
        (
            "long token",
            edit(&|t| t["model"]["vocab"]["x".repeat(8 << 20)] = json!(511)),
            Refused(Malformed, "511"),
        ),
    ] {
        place.converts(case, expect);
    }
    // The table of pre-tokenizers has no such pattern; where one is tried against llama.cpp, its search is bounded.
    let backtracks = edit(&|t| {
        let pattern = json!({"Regex": "(?:(?:a+)+)+(?!b)"});
        t["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]});
    });
    if cfg!(not(feature = "ggml")) {
        backtracks.program_converts("backtracks", None, Refused(Unsupported, "is not known"));
    }
    let place = Place::model("llama");
    let whole = text(&place);
    for (case, from, to, expect) in [
        (
            "deep normalizers",
            "\"normalizer\":null",
            format!("\"normalizer\":{}", sequence("Sequence", "normalizers", 50_000)),
            "recursion limit",
        ),
        (
            "deep pre-tokenizers",
            "\"normalizer\":null",
            format!("\"normalizer\":{}", sequence("Sequence", "pretokenizers", 50_000)),
            "recursion limit",
        ),
        ("vocabulary twice", "\"vocab\":", "\"vocab\":{},\"vocab\":".to_owned(), "duplicate field"),
    ] {
        let compact = serde_json::from_str::<Json>(&whole).unwrap();
        let mut compact = compact;
        compact["normalizer"] = Json::Null;
        let compact = compact.to_string();
        assert!(compact.contains(from), "{case}");
        place.put(TOKENIZER, compact.replacen(from, &to, 1));
        place.converts(case, Refused(Malformed, expect));
    }
    // A key that is there twice in the vocabulary.
    place.put(TOKENIZER, whole.replacen("\"vocab\": {", "\"vocab\": {\"twice\": 1, \"twice\": 2,", 1));
    if fs::read_to_string(place.path(TOKENIZER)).unwrap() != whole {
        place.converts("token twice", Refused(Malformed, "\"twice\" appears twice"));
    }
}

#[test]
fn large_files() {
    let place = Place::model("llama");
    let merges = "a b\n".repeat(10 << 18);
    place.edit(TOKENIZER, |t| t["model"]["merges"] = json!([]));
    place.put("merges.txt", &merges);
    place.converts("10 MB of merges", Refused(Limit, "2097152 merges"));
    place.put("merges.txt", "abcdef ghijklm\n".repeat(700_000));
    place.converts("10 MB of long merges", Accepted);
    place.put("merges.txt", "a b c\n");
    place.converts("three parts", Refused(Malformed, "is not a merge"));
    place.put("merges.txt", b"\xff\xfe a\n");
    place.converts("no UTF-8", Refused(Malformed, "is not UTF-8"));
    let place = Place::model("llama");
    let text = format!("{{\"model\":{{\"vocab\":{{}},\"merges\":[{}\"a b\"]}}}}", "\"\",".repeat(4 << 20));
    place.put(TOKENIZER, text);
    place.converts("merges of nothing", Refused(Limit, "more than the 3145728 values"));
    place.put(TOKENIZER, format!("{{\"model\":{{\"vocab\":[{}[\"a\",0]]}}}}", "[\"\",0],".repeat(1 << 20)));
    place.converts("a million pieces", Refused(Limit, "more than the 3145728 values"));
}

#[test]
fn word_piece() {
    let place = Place::model("bert");
    place.remove(TOKENIZER);
    place.converts("vocab.txt", Accepted);
    for (case, text, expect) in [
        ("empty", Vec::new(), Refused(Unsupported, "names none")),
        ("no UTF-8", b"[CLS]\n\xff\n".to_vec(), Refused(Malformed, "is not UTF-8")),
        ("two million lines", b"\n".repeat(2 << 20), Refused(Limit, "1048576 tokens")),
        ("one line", vec![b'a'; 8 << 20], Refused(Unsupported, "names none")),
        ("NUL", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n\0\n".to_vec(), Accepted),
    ] {
        place.put("vocab.txt", text);
        place.converts(case, expect);
    }
}

/// A protobuf field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut n = bytes.len();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    [out, bytes.to_vec()].concat()
}

fn piece(text: &[u8], score: f32, kind: u8) -> Vec<u8> {
    let inner = [field(1, text), vec![2 << 3 | 5], score.to_le_bytes().to_vec(), vec![3 << 3, kind]].concat();
    field(1, &inner)
}

fn bpe(pieces: &[Vec<u8>]) -> Vec<u8> {
    [pieces.concat(), field(2, &[3 << 3, 2])].concat()
}

#[test]
fn sentence_piece() {
    let place = Place::model("fmt-spm-bpe");
    place.remove(TOKENIZER);
    place.converts("sound", Accepted);
    let unk = piece(b"<unk>", 0.0, 2);
    let with = |more: Vec<u8>| bpe(&[unk.clone(), more]);
    let large = [vec![0x0a], b"\xff\xff\xff\xff\x07".to_vec(), vec![0; 100]].concat();
    let huge = [vec![0x0a], b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01".to_vec(), vec![0; 100]].concat();
    let groups = [0x0b; 100_000].to_vec();
    let tiny = b"\x0a\0".repeat(600_000);
    for (case, bytes, expect) in [
        ("byte token of -1", with(piece(b"<0x-1>", 0.0, 6)), Refused(Malformed, "<0x-1>")),
        ("byte token of 3 digits", with(piece(b"<0x100>", 0.0, 6)), Refused(Malformed, "<0x100>")),
        ("byte token of none", with(piece(b"a", 0.0, 6)), Refused(Malformed, "\"a\"")),
        ("score NaN", with(piece(b"a", f32::NAN, 1)), Refused(Malformed, "score")),
        ("score infinite", with(piece(b"a", f32::INFINITY, 1)), Refused(Malformed, "score")),
        ("type 77", with(piece(b"a", 0.0, 77)), Refused(Malformed, "unknown type 77")),
        ("no UTF-8", with(piece(b"\xff\xfe", 0.0, 1)), Compared("not UTF-8")),
        ("NUL", with(piece(b"a\0b", 0.0, 1)), Compared("cannot tokenize")),
        ("no pieces", field(2, &[3 << 3, 2]), Refused(Unsupported, "not SentencePiece")),
        ("length of 2^31", large, Refused(Malformed, "SentencePiece model")),
        ("length of 2^64", huge, Refused(Malformed, "SentencePiece model")),
        ("groups", [unk.clone(), groups].concat(), Refused(Malformed, "SentencePiece model")),
        ("pieces of nothing", tiny, Compared("appears twice")),
        ("more than are allowed", b"\x0a\0".repeat(2 << 20), Refused(Limit, "pieces")),
    ] {
        place.put("tokenizer.model", bytes);
        place.converts(case, expect);
    }
    let place = Place::model("fmt-spm-bpe");
    place.remove(TOKENIZER);
    for (case, text, expect) in [
        ("ids beyond", "{\"a\": 4294967295}", Accepted),
        ("2^32", "{\"a\": 4294967296}", Refused(Malformed, "u32")),
        ("negative", "{\"a\": -1}", Refused(Malformed, "u32")),
        ("list", "[1]", Refused(Malformed, "is not the JSON expected")),
    ] {
        place.put("added_tokens.json", text);
        place.converts(case, expect);
    }
    place.remove("added_tokens.json");
    for (case, decoder, expect) in [
        ("id", json!({"x": {"content": "a"}}), Refused(Malformed, "its id is not a number")),
        ("negative id", json!({"-1": {"content": "a"}}), Refused(Malformed, "its id is not a number")),
        ("no content", json!({"1": {}}), Refused(Malformed, "content")),
        ("beyond", json!({"4294967295": {"content": "a"}}), Accepted),
        ("no object", json!([1]), Accepted),
    ] {
        place.edit("tokenizer_config.json", |c| c["added_tokens_decoder"] = decoder.clone());
        place.converts(case, expect);
    }
}

/// The `tokenizers` library panics on these, so they do not come so far.
#[test]
fn compiled_normalizations() {
    let looped = [&4096u32.to_le_bytes()[..], &b"\0\x01\0\0".repeat(1024), &[0; 50]].concat();
    let far = [&8u32.to_le_bytes()[..], &[0xff; 8], b"abc\0"].concat();
    for (case, charsmap, sound) in [
        ("junk", vec![0xff; 1000], false),
        ("long", b"\xff\xff\xff\x7f\x01\0\0\0".to_vec(), false),
        ("no trie", vec![0; 5], false),
        ("trie that leads outside", far, false),
        ("within the trie", looped, true),
    ] {
        let place = Place::model("fmt-spm-bpe");
        let whole = fs::read(place.path("tokenizer.model")).unwrap();
        place.put("tokenizer.model", [whole, field(3, &field(2, &charsmap))].concat());
        place.remove(TOKENIZER);
        if !sound {
            place.converts(case, Refused(Malformed, "compiled normalization"));
        }
        // The same in tokenizer.json, deep within others.
        let text = base64(&charsmap);
        for (text, sound) in [(text.clone(), sound), (format!("{text}\n"), false)] {
            let place = Place::model("llama");
            let step = json!({"type": "Precompiled", "precompiled_charsmap": text});
            let sequence = |step: &Json| json!({"type": "Sequence", "normalizers": [step]});
            place.edit(TOKENIZER, |t| t["normalizer"] = sequence(&sequence(&step)));
            let found = qconv::vocab::reference_tokenizer(&place.source());
            assert_eq!(found.as_ref().err().map(|e| e.kind()), (!sound).then_some(Malformed), "{case}");
        }
    }
    let place = Place::model("llama");
    place.edit(TOKENIZER, |t| t["normalizer"] = json!({"type": "Precompiled"}));
    assert_eq!(qconv::vocab::reference_tokenizer(&place.source()).unwrap_err().kind(), Malformed);
    let split =
        json!({"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated", "invert": false});
    place.edit(TOKENIZER, |t| {
        t["normalizer"] = Json::Null;
        t["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": vec![split.clone(); 65]});
    });
    assert_eq!(qconv::vocab::reference_tokenizer(&place.source()).unwrap_err().kind(), Limit);
}

fn base64(bytes: &[u8]) -> String {
    let digit =
        |n: u32| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[n as usize]);
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0, |w, i| w << 8 | u32::from(three.get(i).copied().unwrap_or(0)));
        text.extend((0..4).map(|i| if i <= three.len() { digit(word >> (18 - 6 * i) & 63) } else { '=' }));
    }
    text
}

#[test]
fn every_cut_and_every_byte() {
    let place = Place::new();
    let words = json!({"added_tokens": [{"id": 2, "content": "<s>", "special": true}], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false}, "post_processor": null,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": ["a b"]}});
    let text = words.to_string();
    place.put(TOKENIZER, &text);
    read(&place, Some(8)).unwrap();
    for (case, bytes) in damaged(text.as_bytes()) {
        place.put(TOKENIZER, bytes);
        match read(&place, Some(8)) {
            Err(e) => assert!(matches!(e.kind(), Malformed | Unsupported | Limit), "{case}: {e}"),
            Ok(()) => assert!(!case.starts_with("cut"), "{case}"),
        }
    }
    place.remove(TOKENIZER);
    let model = bpe(&[piece(b"<unk>", 0.0, 2), piece(b"a", -1.0, 1), piece(b"<0x0A>", 0.0, 6)]);
    place.put("tokenizer.model", &model);
    read(&place, Some(8)).unwrap();
    for (case, bytes) in damaged(&model) {
        place.put("tokenizer.model", bytes);
        if let Err(e) = read(&place, Some(8)) {
            assert!(matches!(e.kind(), Malformed | Unsupported | Limit), "{case}: {e}");
        }
    }
}
