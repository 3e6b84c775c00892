//! The linked llama.cpp behind our wrapper, on small models made up here.
#![cfg(feature = "ggml")]

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qconv::ErrorKind;
use qconv::eval::generate::{End, Options, Session, tokenize_prompt};
use qconv::eval::logits::{Matrix, compare, forward, forward_with};
use qconv::eval::parity;
use qconv::eval::sample::Sampling;
use qconv::ggml::{
    Context, ContextOptions, Logits, Model, ModelOptions, Node, Observer, Op, VocabType, linked, oracle,
    type_facts,
};
use tokenizers::Tokenizer;

/// A GGUF file of version 3, put together by hand: independent of the writer under test elsewhere.
#[derive(Default, Clone)]
struct Gguf {
    metadata: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, Vec<f32>)>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Gguf {
    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        self.metadata.retain(|(k, ..)| k != key);
        self.metadata.push((key.to_owned(), kind, value));
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.set(key, 4, value.to_le_bytes().to_vec());
    }

    fn str(&mut self, key: &str, value: &str) {
        self.set(key, 8, string(value));
    }

    fn array(&mut self, key: &str, kind: u32, items: impl Iterator<Item = Vec<u8>>) {
        let items: Vec<_> = items.collect();
        let head = [&kind.to_le_bytes()[..], &(items.len() as u64).to_le_bytes()].concat();
        self.set(key, 9, [head, items.concat()].concat());
    }

    fn write(&self, path: &Path) {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for (name, shape, values) in &self.tensors {
            out.extend(string(name));
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        std::fs::write(path, out).unwrap();
    }
}

/// A vocabulary of the SentencePiece kind: `<unk> <s> </s>`, bytes, and a few pieces.
fn spm_vocabulary(gguf: &mut Gguf, with_bytes: bool) -> u64 {
    let mut tokens: Vec<(String, f32, i32)> =
        vec![("<unk>".into(), 0.0, 2), ("<s>".into(), 0.0, 3), ("</s>".into(), 0.0, 3)];
    if with_bytes {
        tokens.extend((0..=255).map(|b| (format!("<0x{b:02X}>"), 0.0, 6)));
    }
    let pieces = ["\u{2581}", "t", "h", "e", "\u{2581}t", "he", "\u{2581}the", "\u{4e2d}"];
    tokens.extend(pieces.iter().enumerate().map(|(i, p)| (p.to_string(), i as f32, 1)));
    // llama.cpp wants every entry to be unique.
    for i in tokens.len()..tokens.len().next_multiple_of(32) {
        tokens.push((format!("<pad{i}>"), -1e3, 5));
    }
    gguf.str("tokenizer.ggml.model", "llama");
    gguf.array("tokenizer.ggml.tokens", 8, tokens.iter().map(|t| string(&t.0)));
    gguf.array("tokenizer.ggml.scores", 6, tokens.iter().map(|t| t.1.to_le_bytes().to_vec()));
    gguf.array("tokenizer.ggml.token_type", 5, tokens.iter().map(|t| t.2.to_le_bytes().to_vec()));
    gguf.u32("tokenizer.ggml.bos_token_id", 1);
    gguf.u32("tokenizer.ggml.eos_token_id", 2);
    tokens.len() as u64
}

/// A Llama of two layers with random weights.
fn tiny_llama(seed: u64) -> Gguf {
    const WIDTH: u64 = 64;
    const FEED_FORWARD: u64 = 96;
    let mut gguf = Gguf::default();
    gguf.str("general.architecture", "llama");
    for (key, value) in [
        ("context_length", 64),
        ("embedding_length", WIDTH as u32),
        ("block_count", 2),
        ("feed_forward_length", FEED_FORWARD as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 16),
    ] {
        gguf.u32(&format!("llama.{key}"), value);
    }
    gguf.set("llama.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
    let n_vocab = spm_vocabulary(&mut gguf, true);
    let mut state = seed;
    let mut tensor = |name: &str, shape: &[u64]| {
        let values = (0..shape.iter().product::<u64>()).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        });
        let values = if shape.len() == 1 { vec![1.0; shape[0] as usize] } else { values.collect() };
        gguf.tensors.push((name.to_owned(), shape.to_vec(), values));
    };
    tensor("token_embd.weight", &[WIDTH, n_vocab]);
    for layer in 0..2 {
        for (name, shape) in [
            ("attn_norm", &[WIDTH][..]),
            ("attn_q", &[WIDTH, WIDTH]),
            ("attn_k", &[WIDTH, WIDTH / 2]),
            ("attn_v", &[WIDTH, WIDTH / 2]),
            ("attn_output", &[WIDTH, WIDTH]),
            ("ffn_norm", &[WIDTH]),
            ("ffn_gate", &[WIDTH, FEED_FORWARD]),
            ("ffn_up", &[WIDTH, FEED_FORWARD]),
            ("ffn_down", &[FEED_FORWARD, WIDTH]),
        ] {
            tensor(&format!("blk.{layer}.{name}.weight"), shape);
        }
    }
    tensor("output_norm.weight", &[WIDTH]);
    tensor("output.weight", &[WIDTH, n_vocab]);
    gguf
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, gguf: &Gguf) -> PathBuf {
        let path = self.path(name);
        gguf.write(&path);
        path
    }
}

fn load(path: &Path) -> Model {
    Model::load(path, &ModelOptions::default()).unwrap()
}

const IDS: [i32; 12] = [1, 265, 100, 260, 3, 258, 77, 266, 12, 264, 200, 31];

#[test]
fn the_linked_library_is_named() {
    let linked = linked().unwrap();
    assert!(linked.ggml_version.starts_with("0."), "{linked:?}");
    assert!(linked.backends.iter().any(|(name, devices)| name == "CPU" && devices.len() == 1));
    assert!(linked.system_info.contains("CPU"));
    assert_eq!(type_facts(8).unwrap().type_size, 34);
    assert_eq!(type_facts(u32::MAX), None);
}

#[test]
fn what_llama_cpp_refuses_comes_with_its_reason() {
    let folder = Folder::new();
    let refuse = |path: &Path| Model::load(path, &ModelOptions::default()).unwrap_err();
    assert_eq!(refuse(&folder.path("absent.gguf")).kind(), ErrorKind::Io);
    assert_eq!(refuse(folder.0.path()).kind(), ErrorKind::Misuse);
    for content in ["", "GG", "a text file, not a model"] {
        let path = folder.path("text.gguf");
        std::fs::write(&path, content).unwrap();
        assert_eq!(refuse(&path).kind(), ErrorKind::Malformed, "{content:?}");
        assert!(!oracle::gguf_opens(&path));
    }
    let mut gguf = tiny_llama(1);
    gguf.tensors.retain(|(name, ..)| name != "blk.1.attn_k.weight");
    let error = refuse(&folder.write("missing.gguf", &gguf));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("blk.1.attn_k.weight"), "{error}");
    let mut gguf = tiny_llama(1);
    gguf.str("general.architecture", "llamba");
    let error = refuse(&folder.write("unknown.gguf", &gguf));
    assert!(error.to_string().contains("llamba"), "{error}");
    let whole = std::fs::read(folder.write("whole.gguf", &tiny_llama(1))).unwrap();
    for part in [9, 40, 900, whole.len() / 2, whole.len() - 64] {
        let path = folder.path("cut.gguf");
        std::fs::write(&path, &whole[..part]).unwrap();
        assert_eq!(refuse(&path).kind(), ErrorKind::Malformed, "{part} bytes");
    }
}

#[test]
fn text_becomes_tokens_and_back() {
    let folder = Folder::new();
    let model = load(&folder.write("m.gguf", &tiny_llama(1)));
    assert_eq!(model.vocab_type(), VocabType::Spm);
    assert_eq!(model.n_tokens(), 288);
    let special = model.special_tokens();
    assert_eq!((special.bos, special.eos, special.add_bos), (Some(1), Some(2), true));
    // 259 is the first piece, U+2581; 265 is its word "the".
    assert_eq!(model.tokenize("the", true, true).unwrap(), [1, 265]);
    assert_eq!(model.tokenize("the</s>", false, true).unwrap(), [265, 2]);
    assert_ne!(model.tokenize("the</s>", false, false).unwrap(), [265, 2]);
    assert!(model.tokenize("", false, true).unwrap().is_empty());
    // A character without a token of its own is spelled in bytes.
    assert_eq!(model.tokenize("\u{e9}", false, true).unwrap(), [259, 3 + 0xc3, 3 + 0xa9]);
    let long = "the ".repeat(5000) + "\u{4e2d}";
    let ids = model.tokenize(&long, false, true).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| model.token_to_piece(id, false).unwrap()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), format!(" {long}"));
    assert_eq!(model.token_to_piece(1, false).unwrap(), b"");
    assert_eq!(model.token_to_piece(1, true).unwrap(), b"<s>");
    assert!(model.is_end_of_generation(2) && model.is_control(2) && !model.is_control(265));
    for id in [-1, 288, i32::MAX] {
        assert!(model.token_to_piece(id, true).is_err() && model.token_text(id).is_none());
        assert!(!model.is_end_of_generation(id));
    }
    assert_eq!(tokenize_prompt(&model, "<s>the").unwrap(), [1, 265]);
}

#[test]
fn a_vocabulary_that_cannot_spell_is_an_error() {
    let folder = Folder::new();
    let mut gguf = Gguf::default();
    gguf.str("general.architecture", "llama");
    spm_vocabulary(&mut gguf, false);
    let options = ModelOptions { vocab_only: true, ..ModelOptions::default() };
    let model = Model::load(folder.write("v.gguf", &gguf), &options).unwrap();
    assert!(model.tokenize("the \u{4e2d}", false, true).is_ok());
    let error = model.tokenize("then", false, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("'n'"), "{error}");
    assert_eq!(Context::new(&model, &ContextOptions::default()).unwrap_err().kind(), ErrorKind::Misuse);
}

#[test]
fn logits_do_not_depend_on_how_they_are_computed() {
    let folder = Folder::new();
    let paths = [1, 2].map(|seed| folder.write(&format!("{seed}.gguf"), &tiny_llama(seed)));
    let whole = paths.each_ref().map(|path| forward(path, &IDS, 1).unwrap());
    for logits in &whole {
        assert_eq!((logits.rows(), logits.columns), (IDS.len(), 288));
    }
    let apart = compare(&whole[0], &whole[1]).unwrap();
    assert!(apart.finite && apart.rel_rms > 0.5, "{apart:?}");
    assert_eq!(forward(&paths[0], &IDS, 1).unwrap(), whole[0]);
    let threaded = compare(&forward(&paths[0], &IDS, 2).unwrap(), &whole[0]).unwrap();
    assert!(threaded.rel_rms < 1e-5, "{threaded:?}");

    // Two models in turn, token by token.
    let models = paths.each_ref().map(|path| load(path));
    let options = ContextOptions { n_ctx: 16, n_batch: 1, exact: true, ..ContextOptions::default() };
    let mut contexts = models.each_ref().map(|model| Context::new(model, &options).unwrap());
    let mut single = [Vec::new(), Vec::new()];
    for id in IDS {
        for (context, values) in contexts.iter_mut().zip(&mut single) {
            context.decode(&[id], Logits::Last).unwrap();
            values.extend_from_slice(context.logits(0).unwrap());
        }
    }
    let first = single[0][..288].to_vec();
    for (values, whole) in single.into_iter().zip(&whole) {
        let agreement = compare(&Matrix { columns: 288, values }, whole).unwrap();
        assert!(agreement.rel_rms < 1e-5 && agreement.argmax_agree == IDS.len(), "{agreement:?}");
    }
    let context = &mut contexts[0];
    assert_eq!(context.position(), IDS.len());
    assert!(context.logits(1).is_none());
    context.clear();
    context.decode(&IDS[..1], Logits::Last).unwrap();
    assert!(context.logits(0).unwrap() == first, "a cleared context is a fresh one");
}

#[test]
fn decode_refuses_what_would_end_the_process() {
    let folder = Folder::new();
    let model = load(&folder.write("m.gguf", &tiny_llama(1)));
    let options = ContextOptions { n_ctx: 8, n_batch: 4, ..ContextOptions::default() };
    let mut context = Context::new(&model, &options).unwrap();
    for ids in [&[][..], &[1; 5], &[-1], &[288]] {
        assert_eq!(context.decode(ids, Logits::All).unwrap_err().kind(), ErrorKind::Misuse, "{ids:?}");
    }
    assert_eq!(context.position(), 0);
    while context.position() + 4 <= context.n_ctx() {
        context.decode(&[1; 4], Logits::All).unwrap();
        assert!(context.logits(3).is_some() && context.logits(4).is_none());
    }
    assert_eq!(context.decode(&[1; 4], Logits::All).unwrap_err().kind(), ErrorKind::Misuse);
    assert!(context.logits(3).is_some());
}

#[test]
fn a_split_file_loads_by_its_first_shard() {
    let folder = Folder::new();
    let whole = tiny_llama(1);
    let reference = forward(folder.write("whole.gguf", &whole), &IDS, 1).unwrap();
    let (first, second) = whole.tensors.split_at(7);
    for (no, tensors) in [first, second].into_iter().enumerate() {
        let mut shard = Gguf { metadata: whole.metadata.clone(), tensors: tensors.to_vec() };
        shard.set("split.no", 2, (no as u16).to_le_bytes().to_vec());
        shard.set("split.count", 2, 2u16.to_le_bytes().to_vec());
        shard.set("split.tensors.count", 5, (whole.tensors.len() as i32).to_le_bytes().to_vec());
        folder.write(&format!("m-{:05}-of-00002.gguf", no + 1), &shard);
    }
    let first = folder.path("m-00001-of-00002.gguf");
    assert_eq!(forward(&first, &IDS, 1).unwrap(), reference);
    std::fs::remove_file(folder.path("m-00002-of-00002.gguf")).unwrap();
    assert!(Model::load(&first, &ModelOptions::default()).is_err());
}

#[test]
fn llama_cpp_quantizes_as_an_oracle() {
    let folder = Folder::new();
    let (input, output) = (folder.write("m.gguf", &tiny_llama(1)), folder.path("q8_0.gguf"));
    let reference = forward(&input, &IDS, 1).unwrap();
    oracle::model_quantize(&input, &output, &oracle::QuantizeOptions::new(7)).unwrap();
    assert!(oracle::gguf_opens(&input) && oracle::gguf_opens(&output));
    let agreement = compare(&forward(&output, &IDS, 1).unwrap(), &reference).unwrap();
    assert!(agreement.finite && agreement.rel_rms > 1e-6 && agreement.rel_rms < 0.1, "{agreement:?}");
    let again = folder.path("again.gguf");
    let refused = oracle::model_quantize(&output, &again, &oracle::QuantizeOptions::new(2)).unwrap_err();
    assert!(refused.to_string().contains("requantizing"), "{refused}");
    let mut options = oracle::QuantizeOptions::new(2);
    options.allow_requantize = true;
    options.tensor_types = vec![("attn_q".into(), qconv::tensor::DType::Q8_0)];
    options.imatrix = vec![("blk.0.attn_k.weight".into(), vec![1.0; 64])];
    oracle::model_quantize(&output, &again, &options).unwrap();
    assert!(std::fs::metadata(&again).unwrap().len() < std::fs::metadata(&output).unwrap().len());
}

#[test]
fn generation_ends_when_it_should() {
    let folder = Folder::new();
    let model = load(&folder.write("m.gguf", &tiny_llama(3)));
    let prompt = tokenize_prompt(&model, "the the").unwrap();
    let run = |max_tokens, n_ctx, sampling: Sampling, stop: bool| {
        let options = Options { max_tokens: Some(max_tokens), stop: Vec::new(), sampling };
        let mut text = String::new();
        let summary = Session::new(&model, n_ctx, 1)?.generate(
            &prompt,
            &options,
            &AtomicBool::new(stop),
            &mut |piece| {
                text.push_str(piece);
                Ok(())
            },
        );
        summary.map(|summary| (summary, text))
    };
    let greedy = |max_tokens, n_ctx| run(max_tokens, n_ctx, Sampling::greedy(), false);
    let (first, text) = greedy(10, 64).unwrap();
    assert!(first.end == End::Length && first.generated.len() == 10, "{first:?}");
    let bytes: Vec<u8> =
        first.generated.iter().flat_map(|&id| model.token_to_piece(id, false).unwrap()).collect();
    assert_eq!(text, String::from_utf8_lossy(&bytes));
    assert_eq!(greedy(10, 64).unwrap().0.generated, first.generated);
    // The likeliest tokens by the logits of the whole sequence at once.
    let ids = [&prompt[..], &first.generated].concat();
    let logits = forward_with(&model, &ids, 1).unwrap();
    for (i, id) in first.generated.iter().enumerate() {
        let row = &logits.values[(prompt.len() - 1 + i) * 288..][..288];
        assert_eq!(qconv::eval::logits::argmax(row), Some(*id as usize), "token {i}");
    }
    let stopped = run(10, 64, Sampling::greedy(), true).unwrap().0;
    assert!(stopped.end == End::Interrupted && stopped.generated.is_empty());
    assert_eq!(greedy(0, 64).unwrap().0.end, End::Length);
    // llama.cpp rounds the context up to 256 tokens.
    let long = vec![5; 257];
    let options = Options { sampling: Sampling::greedy(), ..Options::default() };
    let refused =
        Session::new(&model, 64, 1)
            .unwrap()
            .generate(&long, &options, &AtomicBool::new(false), &mut |_| Ok(()));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Misuse);
    let full = greedy(100_000, 64).unwrap().0;
    assert!([End::ContextFull, End::EndOfGeneration(2)].contains(&full.end), "{:?}", full.end);
    assert_eq!(text, first.text);
    let sampled = || run(10, 64, Sampling { seed: 5, ..Sampling::default() }, false).unwrap().1;
    assert_eq!(sampled(), sampled());
}

/// The byte-level vocabulary of a fixture as a GGUF file without tensors.
fn bpe_vocabulary(folder: &Path, change: impl Fn(&mut Vec<String>)) -> Gguf {
    let json = std::fs::read(folder.join("tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let added = json["added_tokens"].as_array().unwrap();
    let mut tokens = vec![String::new(); vocab.len().max(added.len())];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let mut types = vec![1i32; tokens.len()];
    for token in added {
        types[token["id"].as_u64().unwrap() as usize] = 3;
    }
    change(&mut tokens);
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        serde_json::Value::String(merge) => merge.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    let mut gguf = Gguf::default();
    gguf.str("general.architecture", "llama");
    gguf.str("tokenizer.ggml.model", "gpt2");
    gguf.str("tokenizer.ggml.pre", "gpt-2");
    gguf.array("tokenizer.ggml.tokens", 8, tokens.iter().map(|t| string(t)));
    gguf.array("tokenizer.ggml.token_type", 5, types.iter().map(|t| t.to_le_bytes().to_vec()));
    gguf.array("tokenizer.ggml.merges", 8, merges.map(|m| string(&m)));
    gguf.u32("tokenizer.ggml.bos_token_id", 0);
    gguf
}

#[test]
fn token_parity_sees_agreement_and_faults() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny-llama");
    let tokenizer = Tokenizer::from_file(source.join("tokenizer.json")).unwrap();
    let folder = Folder::new();
    let options = ModelOptions { vocab_only: true, ..ModelOptions::default() };
    let check = |gguf: &Gguf| {
        let model = Model::load(folder.write("v.gguf", gguf), &options).unwrap();
        parity::compare(&tokenizer, &model, &[]).unwrap()
    };
    let right = check(&bpe_vocabulary(&source, |_| {}));
    assert!(right.agrees() && right.explained.is_empty(), "{right:?}");
    assert!(right.probes > 200 && right.tokens > 10_000, "{} {}", right.probes, right.tokens);
    assert!(right.found_added.before.is_empty());

    let swapped = check(&bpe_vocabulary(&source, |tokens| tokens.swap(1234, 1235)));
    assert!(!swapped.agrees(), "two entries changed places");
    let shown = swapped.first_difference.unwrap();
    assert_ne!(shown.expected[shown.at] as i32, shown.found[shown.at]);
    let mut wrong = bpe_vocabulary(&source, |_| {});
    wrong.str("tokenizer.ggml.pre", "default");
    assert!(!check(&wrong).agrees(), "another pre-tokenizer");
    let mut adding = bpe_vocabulary(&source, |_| {});
    adding.set("tokenizer.ggml.add_bos_token", 7, vec![1]);
    let adding = check(&adding);
    assert!(adding.agrees() && adding.found_added.before == [0] && adding.found_added.after.is_empty());
}

/// Sums up what it is shown of one kind of node.
struct Inputs {
    seen: Vec<(String, [usize; 4])>,
    inputs: Vec<f32>,
    fail_at: Option<&'static str>,
    panic_at: Option<&'static str>,
}

impl Observer for Inputs {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        node.op() == Op::MulMat && node.source(0).is_some_and(|w| w.name().ends_with(".weight"))
    }

    fn see(&mut self, node: &Node<'_>) -> qconv::Result<()> {
        let (weight, input) = (node.source(0).unwrap(), node.source(1).unwrap());
        let name = weight.name().into_owned();
        assert!(self.panic_at != Some(name.as_str()), "as told");
        if self.fail_at == Some(name.as_str()) {
            return Err(qconv::Error::check("enough seen"));
        }
        let mut scratch = Vec::new();
        // A product is what its sources say it is.
        let (mut w, mut x) = (Vec::new(), Vec::new());
        let (w, x) = (weight.values(&mut w)?, input.values(&mut x)?);
        let ([columns, rows, ..], tokens) = (weight.shape(), input.shape()[1]);
        let y = node.values(&mut scratch)?;
        assert_eq!((node.shape()[0], node.shape()[1]), (rows, tokens));
        let dot: f32 = w[..columns].iter().zip(&x[x.len() - columns..]).map(|(a, b)| a * b).sum();
        let last = y[(tokens - 1) * rows];
        assert!((dot - last).abs() <= 1e-3 * (1.0 + last.abs()), "{name}: {dot} {last}");
        if name == "blk.0.attn_q.weight" {
            self.inputs.extend_from_slice(x);
        }
        self.seen.push((name, input.shape()));
        Ok(())
    }
}

#[test]
fn the_computation_can_be_watched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let config = tiny_llama(7);
    config.write(&path);
    let model = Model::load(&path, &ModelOptions::default()).unwrap();
    let observed = ContextOptions { n_ctx: 16, exact: true, observed: true, ..ContextOptions::default() };
    let plain = ContextOptions { observed: false, ..observed.clone() };
    let ids = [1, 4, 2, 5, 3];
    let mut reference = Context::new(&model, &plain).unwrap();
    reference.decode(&ids, Logits::All).unwrap();
    let mut inputs = Inputs { seen: Vec::new(), inputs: Vec::new(), fail_at: None, panic_at: None };
    let error = reference.decode_observed(&ids, Logits::All, &mut inputs).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse);

    let mut context = Context::new(&model, &observed).unwrap();
    context.decode_observed(&ids, Logits::All, &mut inputs).unwrap();
    // Watching changes nothing, and every matrix of every layer has seen every token.
    for i in 0..ids.len() {
        assert_eq!(context.logits(i), reference.logits(i));
    }
    let per_layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for layer in 0..model.n_layer() {
        for matrix in per_layer {
            let name = format!("blk.{layer}.{matrix}.weight");
            let found = inputs.seen.iter().filter(|(n, _)| *n == name).collect::<Vec<_>>();
            assert_eq!(found.len(), 1, "{name}");
            assert_eq!(found[0].1[1], ids.len(), "{name}");
        }
    }
    assert!(inputs.inputs.iter().any(|x| *x != 0.0));

    // An error of the observer is the error of the decode; afterwards the context works again.
    inputs.fail_at = Some("blk.0.ffn_down.weight");
    context.clear();
    let error = context.decode_observed(&ids, Logits::All, &mut inputs).unwrap_err();
    assert!(error.to_string().contains("enough seen"), "{error}");
    // A panic of the observer does not cross C++ and comes out here.
    (inputs.fail_at, inputs.panic_at) = (None, Some("blk.0.ffn_up.weight"));
    context.clear();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        context.decode_observed(&ids, Logits::All, &mut inputs)
    }));
    assert!(caught.is_err());
    context.clear();
    context.decode(&ids, Logits::All).unwrap();
    assert_eq!(context.logits(4), reference.logits(4));
}
