//! Core ML packages that are run: what they read, say and predict, against llama.cpp with the same model.

#[cfg(feature = "ggml")]
mod common;
#[path = "common/place.rs"]
mod place;

use std::path::Path;

use place::Place;

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
