//! Texts: configs, tokenizers, templates, definitions.

use std::path::Path;
use std::sync::OnceLock;

use qconv::arch::{self, Architecture, Expr, Scope};
use qconv::container::gguf::Metadata;
use qconv::convert::{Journal, ModelFacts, Overrides, Recipe};
use qconv::eval::chat as templates;
use qconv::tensor::{DType, TensorInfo};
use qconv::vocab::{self, Source};
use serde_json::{Value as Json, json};

use super::containers::limits;
use super::input::{part, parts};
use super::scratch;

/// All definitions, read once.
pub fn architectures() -> &'static [Architecture] {
    static ALL: OnceLock<Vec<Architecture>> = OnceLock::new();
    ALL.get_or_init(|| arch::all().expect("the definitions are sound"))
}

/// Lines `NAME TYPE D0 D1 ...`, of tensors that follow on each other in a file.
pub fn listed(text: &[u8]) -> Vec<TensorInfo> {
    let (mut tensors, mut offset) = (Vec::new(), 0);
    for line in String::from_utf8_lossy(text).lines().take(64) {
        let mut words = line.split(' ');
        let (Some(name), Some(dtype)) = (words.next(), words.next().and_then(DType::from_name)) else {
            continue;
        };
        let shape: Vec<u64> = words.take(5).filter_map(|n| n.parse().ok()).collect();
        let Ok(nbytes) = dtype.nbytes(&shape) else { continue };
        tensors.push(TensorInfo { name: name.into(), dtype, shape, file: 0, offset, nbytes });
        offset = nbytes.saturating_add(offset);
    }
    tensors
}

/// config.json, and the names and shapes of tensors.
pub fn config(data: &[u8]) -> bool {
    let files = parts(data);
    let text = part(&files, "config.json").unwrap_or(data);
    let Ok(config) = serde_json::from_slice::<Json>(text) else { return false };
    let tensors = listed(part(&files, "tensors").unwrap_or_default());
    let class = config.pointer("/architectures/0").and_then(Json::as_str).unwrap_or_default();
    let mut known = false;
    for arch in architectures().iter().filter(|a| a.class_names().any(|name| name == class)) {
        known = true;
        if let Ok(model) = arch::take_for(arch.clone(), &config) {
            used(model, &tensors);
        }
    }
    // All definitions are read and tried for what is none of theirs: too long for each input.
    if !known && data.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b)) == 0 {
        let _ = (
            arch::recognise(&config, &tensors, None),
            arch::recognise_projector(&config, None, arch::Facts::default()),
        );
    }
    known
}

fn used(mut model: arch::Model, tensors: &[TensorInfo]) {
    model.facts_mut().n_tokens = Some(32);
    let _ = (model.metadata(), model.warnings(), model.generated(), model.targets(4));
    let _ = (model.map(tensors), model.map_back(tensors));
    if model.arch.has_graph() {
        let _ = model.decoder(16);
    }
}

/// A definition of an architecture, tried on its examples.
pub fn architecture(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let base = |name: &str| {
        (name == "decoder_base").then(|| include_str!("../../formats/arch/decoder_base.toml").into())
    };
    let Ok(arch) = Architecture::parse(text, &base) else { return false };
    let _ = arch.generates().count();
    for (_, config) in arch.examples().unwrap_or_default().into_iter().take(2) {
        if let Ok(model) = arch::take_for(arch.clone(), &config) {
            let Ok(targets) = model.targets(4) else { continue };
            let info = |name: String| TensorInfo {
                name,
                dtype: DType::F32,
                shape: vec![8, 8],
                file: 0,
                offset: 0,
                nbytes: 256,
            };
            let tensors: Vec<_> = targets.into_iter().take(64).map(|t| info(t.name)).collect();
            used(model, &tensors);
        }
    }
    true
}

struct Names(Json);

impl Scope for Names {
    fn get(&self, name: &str) -> qconv::Result<Option<Json>> {
        Ok(self.0.get(name).cloned())
    }
}

/// An expression, and after a line end the object that its names are in.
pub fn expression(data: &[u8]) -> bool {
    let mut lines = data.splitn(2, |b| *b == b'\n');
    let text = lines.next().and_then(|line| std::str::from_utf8(line).ok());
    let names = lines.next().and_then(|json| serde_json::from_slice(json).ok());
    let names =
        names.unwrap_or_else(|| json!({"a": 3, "b": [1, 2.5, null], "c": "text", "d": {"e": true}, "i": -7}));
    let Some(Ok(expr)) = text.map(Expr::parse) else { return false };
    let _ = (expr.first_name().is_some(), expr.is_alias_chain());
    expr.eval(&Names(names)).map(|value| arch::truth(&value)).is_ok()
}

/// A chat template, alone or with the conversation that it gets.
pub fn chat(data: &[u8]) -> bool {
    let files = parts(data);
    let Ok(template) = std::str::from_utf8(part(&files, "template").unwrap_or(data)) else { return false };
    let message = |role: &str, content: &str| templates::Message::new(role, content);
    let messages =
        [message("system", "Be kind."), message("user", "Who are you?"), message("assistant", " I \n")];
    let mut conversation = templates::Conversation::new(&messages);
    if let Some(Ok(json)) = part(&files, "messages.json").map(serde_json::from_slice) {
        conversation.messages = json;
    }
    if let Some(Ok(json)) = part(&files, "tools.json").map(serde_json::from_slice) {
        conversation.tools = json;
    }
    let tokens = templates::TemplateTokens { bos: "<s>".into(), eos: "</s>".into() };
    templates::render(template, &conversation, &tokens, 1_700_000_000).is_ok()
}

/// A recipe, and the types that it chooses.
pub fn recipe(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(Some(recipe)) = Recipe::from_text(text) else { return false };
    let facts =
        ModelFacts { arch: "llama".into(), layers: 4, main_layers: 4, heads: 8, kv_heads: 2, experts: 2 };
    let names = [
        "token_embd",
        "output",
        "output_norm",
        "blk.0.attn_q",
        "blk.0.attn_k",
        "blk.1.attn_v",
        "blk.3.attn_output",
        "blk.0.ffn_down",
        "blk.1.ffn_gate",
        "blk.2.ffn_up",
        "blk.3.ffn_down_exps",
        "blk.2.ffn_gate_inp",
    ];
    let names: Vec<String> = names.iter().map(|name| format!("{name}.weight")).collect();
    let tensors: Vec<_> = names.iter().map(|n| (n.as_str(), DType::F16, &[512u64, 256][..])).collect();
    let _ = recipe.ways().count();
    recipe.choose(&facts, &Overrides::default(), &tensors).is_ok()
}

/// A journal, from which a conversion would go on.
pub fn journal(data: &[u8]) -> bool {
    const KEY: &[u8] = b"qconv-journal 4 k\n";
    let path = scratch::file("journal", &[KEY, data].concat());
    let opened =
        |path: &Path| Journal::lock(path.to_path_buf()).expect("a file").expect("nobody else has it");
    let mut journal = opened(&path);
    assert!(journal.is_of("k"));
    let said = (journal.is_begun(), journal.bytes(), journal.renames().to_vec());
    journal.go_on().expect("a file that can be written");
    drop(journal);
    // What is kept of it is what was believed; read again it is the same.
    let kept = std::fs::read(&path).expect("it is there");
    assert!(kept.starts_with(KEY) && data.starts_with(&kept[KEY.len()..]));
    let again = opened(&path);
    assert!((again.is_begun(), again.bytes(), again.renames().to_vec()) == said);
    said.0
}

/// tokenizer.json, alone or with the files beside it.
pub fn tokenizer_json(data: &[u8]) -> bool {
    let files = parts(data);
    match files.is_empty() {
        true => loaded(&scratch::directory([("tokenizer.json", data)]), &Json::Null),
        false => {
            let config = part(&files, "config.json").and_then(|text| serde_json::from_slice(text).ok());
            loaded(&scratch::directory(files), &config.unwrap_or_default())
        }
    }
}

/// tokenizer.model, a protocol buffer.
pub fn tokenizer_model(data: &[u8]) -> bool {
    let dir = scratch::directory([("tokenizer.model", data)]);
    let _ = vocab::user_defined_pieces(&dir);
    loaded(&dir, &Json::Null)
}

/// Reads a vocabulary, writes it in both forms, and reads what was written.
fn loaded(dir: &Path, config: &Json) -> bool {
    let vocab_size = config.get("vocab_size").and_then(Json::as_u64).map(|n| n.min(1 << 12));
    let source = Source { dir, config, vocab_size, pre: Some("default"), kinds: &[] };
    let limits = limits();
    let _ = vocab::added_token_ids(dir, &limits);
    let Ok((vocab, candidates)) = vocab::load_undecided(&source, &limits) else { return false };
    let Ok(vocab) = candidates.by_table(dir, vocab.clone()).or(Ok::<_, qconv::Error>(vocab)) else {
        return false;
    };
    assert_eq!(vocab.tokens.len(), vocab.token_types.len());
    for id in 0..vocab.tokens.len().min(64) {
        let _ = vocab.piece(id);
    }
    let _ = vocab.adds();
    if vocab.tokens.len() < 1 << 12 {
        let mut metadata = Metadata::default();
        vocab.to_metadata(&mut metadata);
        let _ = (vocab::check_loadable(&metadata), vocab.write_hf());
        let again = vocab::Vocab::from_metadata(&metadata);
        if let Ok(again) = again {
            assert_eq!(again.tokens, vocab.tokens);
        }
    }
    true
}
