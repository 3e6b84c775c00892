//! LoRA adapters: as GGUF files beside llama.cpp's converter, merged beside transformers, and both ways
//! beside each other; and adapters that do not fit.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

#[cfg(feature = "ggml")]
use common::reference;
use common::{budget, fixture};
use qconv::convert::{FileType, HfToGguf, LoraToGguf, MergeLora, Silent, TokenCheck};
use qconv::error::{Error, ErrorKind};
use qconv::verify::{self, Outcome};
use serde_json::{Value as Json, json};

/// Each has an adapter in `fixtures/lora`.
#[cfg(feature = "ggml")]
const BASES: &[&str] = &["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe", "phi_3", "gemma3-spm"];

fn base(name: &str) -> PathBuf {
    fixture("models").join(name)
}

fn adapter(name: &str) -> PathBuf {
    fixture("lora").join(name)
}

fn merging(name: &str, output: &Path, adapters: &[(PathBuf, f32)]) -> HfToGguf {
    let merge = |(adapter, scale): &(PathBuf, f32)| MergeLora { adapter: adapter.clone(), scale: *scale };
    HfToGguf {
        source: base(name),
        output: Some(output.to_path_buf()),
        file_type: FileType::parse("f32"),
        merge_lora: adapters.iter().map(merge).collect(),
        tokens: TokenCheck::Skipped,
        ..HfToGguf::default()
    }
}

fn merged(name: &str, output: &Path, scale: f32) {
    let job =
        merging(name, output, &[(adapter(name), scale)]).plan().unwrap_or_else(|e| panic!("{name}: {e}"));
    job.run(true, &budget(), &Silent).unwrap();
}

fn converting(adapter: &Path, base: &Path, output: &Path) -> LoraToGguf {
    LoraToGguf {
        adapter: adapter.to_path_buf(),
        base: base.to_path_buf(),
        output: Some(output.to_path_buf()),
        ..LoraToGguf::default()
    }
}

#[cfg(feature = "ggml")]
mod logits {
    use qconv::eval::logits::{Agreement, Matrix, compare, forward_with};
    use qconv::ggml::{Model, ModelOptions};

    use super::*;

    fn run(model: &Path, adapters: &[(PathBuf, f32)], ids: &[i32]) -> Matrix {
        let options = ModelOptions { adapters: adapters.to_vec(), ..ModelOptions::default() };
        forward_with(&Model::load(model, &options).unwrap(), ids, 1).unwrap()
    }

    fn close(a: &Matrix, b: &Matrix) -> Agreement {
        compare(a, b).unwrap()
    }

    /// The model with its adapter merged computes what transformers computes; that with the adapter
    /// added at run time computes the same, also at half the strength; and without it something else.
    #[test]
    fn merged_added_and_transformers_agree() {
        let dir = tempfile::tempdir().unwrap();
        for name in BASES {
            let (plain, whole, half) =
                (dir.path().join("plain.gguf"), dir.path().join("whole.gguf"), dir.path().join("half.gguf"));
            let added = dir.path().join("adapter.gguf");
            common::convert(&base(name), &plain, Some("f32"));
            merged(name, &whole, 1.0);
            merged(name, &half, 0.5);
            // In F32: with factors of BF16 the engine rounds what they are multiplied with, too.
            let exact = converting(&adapter(name), &base(name), &added);
            let exact = LoraToGguf { file_type: FileType::parse("f32"), ..exact };
            exact.plan().unwrap().run(true, &budget(), &Silent).unwrap();
            let (ids, logits) = reference(&adapter(name));
            let expected = Matrix { columns: logits.len() / ids.len(), values: logits };

            let with = run(&whole, &[], &ids);
            let off = close(&with, &expected);
            // llama.cpp looks GELU up in a table of F16.
            let bound = if ["gpt2", "gemma3-spm"].contains(name) { 1e-3 } else { 2e-5 };
            assert!(off.rel_rms < bound, "{name}: merged, beside transformers: {off:?}");
            let off = close(&run(&plain, &[(added.clone(), 1.0)], &ids), &with);
            assert!(off.rel_rms < bound, "{name}: added, beside merged: {off:?}");
            let off = close(&run(&plain, &[(added.clone(), 0.5)], &ids), &run(&half, &[], &ids));
            assert!(off.rel_rms < bound, "{name}: added by half, beside merged by half: {off:?}");
            let twice = [(added.clone(), 0.25), (added.clone(), 0.75)];
            let off = close(&run(&plain, &twice, &ids), &with);
            assert!(off.rel_rms < bound, "{name}: added in two parts: {off:?}");
            let off = close(&run(&plain, &[], &ids), &with);
            assert!(off.rel_rms > 0.1, "{name}: without the adapter: {off:?}");
        }
    }

    #[test]
    fn an_adapter_of_another_base_is_refused_by_the_engine() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, added) = (dir.path().join("plain.gguf"), dir.path().join("adapter.gguf"));
        common::convert(&base("qwen2"), &plain, Some("f32"));
        converting(&adapter("llama"), &base("llama"), &added)
            .plan()
            .unwrap()
            .run(true, &budget(), &Silent)
            .unwrap();
        let load = |path: &Path| {
            let options =
                ModelOptions { adapters: vec![(path.to_path_buf(), 1.0)], ..ModelOptions::default() };
            Model::load(&plain, &options).unwrap_err().to_string()
        };
        assert!(load(&added).contains("arch"), "{}", load(&added));
        assert!(load(&plain).contains("is a model, an adapter was expected"), "{}", load(&plain));
    }
}

/// The adapters differ from their records in nothing.
#[test]
fn equal_to_llama_cpps_converter() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("adapter.gguf");
    for name in ["llama", "mixtral", "phi_3"] {
        let job =
            converting(&adapter(name), &base(name), &output).plan().unwrap_or_else(|e| panic!("{name}: {e}"));
        job.run(true, &budget(), &Silent).unwrap();
        common::expected::compare(&format!("lora-{name}"), &output, &|_| false);
    }
}

/// The base may be a directory, its config.json, or a GGUF file.
#[test]
fn the_base_in_any_form() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, output) = (dir.path().join("base.gguf"), dir.path().join("adapter.gguf"));
    for name in ["mixtral", "gpt2", "phi_3"] {
        common::convert(&base(name), &gguf, Some("f16"));
        let mut files = Vec::new();
        for base in [base(name), base(name).join("config.json"), gguf.clone()] {
            let job =
                converting(&adapter(name), &base, &output).plan().unwrap_or_else(|e| panic!("{name}: {e}"));
            let noted = job.plan.notes.iter().any(|n| n.contains("weights are not there"));
            assert_eq!(noted, base.ends_with("config.json"), "{name}: {:?}", job.plan.notes);
            job.run(true, &budget(), &Silent).unwrap();
            files.push(fs::read(&output).unwrap());
        }
        assert!(files.windows(2).all(|w| w[0] == w[1]), "{name}: not the same file");
    }
}

/// Neither threads nor memory show in a merged file, and it passes verification beside its sources only
/// with the adapter.
#[test]
fn merging_is_streamed_and_verified() {
    use qconv::convert::Budget;
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2", "mixtral"] {
        let (one, other) = (dir.path().join("one.gguf"), dir.path().join("other.gguf"));
        merged(name, &one, 0.75);
        let job = merging(name, &other, &[(adapter(name), 0.75)]).plan().unwrap();
        let least = (1..64)
            .map(|n| n << 18)
            .find(|n| Budget::new(Some(3), Some(*n)).is_ok_and(|budget| budget.check(&job.plan).is_ok()));
        let small = Budget::new(Some(3), least).unwrap();
        assert!(small.peak(&job.plan) <= least.unwrap() && least.unwrap() < 8 << 20, "{name}: {least:?}");
        job.run(true, &small, &Silent).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&other).unwrap(), "{name}");

        let with = |scale| {
            let options = verify::Options {
                against: Some(base(name)),
                forward: false,
                tokens: TokenCheck::Skipped,
                merge_lora: vec![MergeLora { adapter: adapter(name), scale }],
                ..verify::Options::new(&one)
            };
            let report = verify::verify(&options, &budget(), &Silent).unwrap();
            report.checks.iter().find(|c| c.name == "tensors").unwrap().outcome
        };
        assert_eq!((with(0.75), with(0.5)), (Outcome::Passed, Outcome::Failed), "{name}");
    }
    // Little memory is an error before anything is written.
    let job = merging("llama", &dir.path().join("x.gguf"), &[(adapter("llama"), 1.0)]).plan().unwrap();
    let tight = Budget::new(Some(1), Some(512 << 10)).unwrap();
    let error = job.run(true, &tight, &Silent).unwrap_err();
    assert!(error.kind() == ErrorKind::Misuse && error.to_string().contains("adapter's factors"), "{error}");
}

/// An adapter with changes to its config and its tensors.
struct Altered {
    dir: tempfile::TempDir,
}

impl Altered {
    fn new(name: &str, config: &[(&str, Json)], tensors: &dyn Fn(&str) -> Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut json: Json =
            serde_json::from_slice(&fs::read(adapter(name).join("adapter_config.json")).unwrap()).unwrap();
        for (key, value) in config {
            json[key] = value.clone();
        }
        fs::write(dir.path().join("adapter_config.json"), json.to_string()).unwrap();
        let bytes = fs::read(adapter(name).join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let kept = file.tensors().into_iter().filter_map(|(name, view)| Some((tensors(&name)?, view)));
        safetensors::serialize_to_file(kept, None, &dir.path().join("adapter_model.safetensors")).unwrap();
        Self { dir }
    }

    fn gguf(&self, name: &str) -> Result<(), Error> {
        converting(self.dir.path(), &base(name), &self.dir.path().join("x.gguf")).plan().map(|_| ())
    }

    fn merge(&self, name: &str) -> Result<(), Error> {
        let adapters = [(self.dir.path().to_path_buf(), 1.0)];
        merging(name, &self.dir.path().join("x.gguf"), &adapters).plan().map(|_| ())
    }
}

fn same(name: &str) -> Option<String> {
    Some(name.to_string())
}

fn says(result: Result<(), Error>, kind: ErrorKind, words: &[&str]) {
    let error = result.unwrap_err();
    let text = format!("{error} / {}", error.hint_text().unwrap_or("no hint"));
    assert_eq!(error.kind(), kind, "{text}");
    assert!(words.iter().all(|w| text.contains(w)) && error.hint_text().is_some(), "{words:?}: {text}");
}

/// Kinds of adapters that are more than a sum of products.
#[test]
fn other_kinds_are_refused_with_the_reason() {
    for (key, value, word) in [
        ("peft_type", json!("IA3"), "IA3"),
        ("use_dora", json!(true), "DoRA"),
        ("lora_bias", json!(true), "bias"),
        ("layer_replication", json!([[0, 2], [1, 2]]), "repeated"),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"]), "parameters"),
        ("trainable_token_indices", json!([1, 2]), "rows of the embedding"),
        ("init_lora_weights", json!("pissa_niter_16"), "path_initial_model_for_weight_conversion"),
        ("invocation_string", json!("<go>"), "alora_invocation_tokens"),
    ] {
        let altered = Altered::new("qwen2", &[(key, value)], &same);
        for result in [altered.gguf("qwen2"), altered.merge("qwen2")] {
            says(result, ErrorKind::Unsupported, &[word, "adapter_config.json"]);
        }
    }
    // Empty settings are none, and an aLoRA can be converted, not merged.
    let unset =
        [("target_parameters", json!([])), ("use_dora", json!(false)), ("init_lora_weights", json!(true))];
    Altered::new("qwen2", &unset, &same).gguf("qwen2").unwrap();
    let alora = Altered::new("qwen2", &[("alora_invocation_tokens", json!([5, 6]))], &same);
    alora.gguf("qwen2").unwrap();
    says(alora.merge("qwen2"), ErrorKind::Unsupported, &["switched on by tokens"]);
}

/// Tensors that are no factors, or do not fit.
#[test]
fn tensors_that_do_not_fit_are_named() {
    const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let renamed = |to: &'static str| {
        Altered::new("qwen2", &[], &move |n| Some(if n == Q { to.into() } else { n.into() }))
    };
    for (to, kind, word) in [
        ("base_model.model.lm_head.weight", ErrorKind::Unsupported, "modules_to_save"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", ErrorKind::Unsupported, "bias"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            ErrorKind::Unsupported,
            "DoRA",
        ),
    ] {
        says(renamed(to).gguf("qwen2"), kind, &[to, word]);
        says(renamed(to).merge("qwen2"), kind, &[to, word]);
    }
    let without_a = Altered::new("qwen2", &[], &|n| (n != Q).then(|| n.to_string()));
    let error = without_a.gguf("qwen2").unwrap_err().to_string();
    assert!(error.contains("q_proj.weight") && error.contains("lora_A is missing"), "{error}");
    let none = Altered::new("qwen2", &[], &|_| None);
    assert!(none.merge("qwen2").unwrap_err().to_string().contains("no LoRA matrices"));

    // Ranks that config.json and tensors do not agree about, by the common one and by a pattern.
    let other_rank = Altered::new("qwen2", &[("r", json!(16))], &same);
    says(other_rank.gguf("qwen2"), ErrorKind::Malformed, &["rank is 8", "says 16", "_proj.weight"]);
    let pattern = [("rank_pattern", json!({"layers\\.1\\.self_attn\\.k_proj": 2}))];
    says(
        Altered::new("qwen2", &pattern, &same).merge("qwen2"),
        ErrorKind::Malformed,
        &["rank is 8", "says 2", "1.self_attn.k_proj"],
    );

    // Names that no rule knows, and layers that are not there.
    let elsewhere = |from: &'static str, to: &'static str| {
        Altered::new("qwen2", &[], &move |n| Some(n.replace(from, to)))
    };
    says(elsewhere("q_proj", "query").gguf("qwen2"), ErrorKind::Malformed, &["query.weight", "nearest rule"]);
    says(
        elsewhere("q_proj", "query").merge("qwen2"),
        ErrorKind::Malformed,
        &["query.weight", "nearest rule"],
    );
    says(elsewhere("layers.1", "layers.7").gguf("qwen2"), ErrorKind::Malformed, &["layer 7", "there are 2"]);

    // Another base.
    says(Altered::new("llama", &[], &same).gguf("gemma3-spm"), ErrorKind::Malformed, &["another base"]);
    let narrow = Altered::new("qwen2", &[], &same);
    says(
        narrow.merge("gemma3-spm"),
        ErrorKind::Malformed,
        &["matrix of [64, 128]", "[64, 64]", "another base"],
    );
}

/// What only merging can do.
#[test]
fn what_a_gguf_adapter_cannot_hold_can_be_merged() {
    let some_experts =
        Altered::new("mixtral", &[], &|n| (!n.contains("experts.2.w1")).then(|| n.to_string()));
    says(some_experts.gguf("mixtral"), ErrorKind::Unsupported, &["expert 2 of the 4", "--merge-lora"]);
    some_experts.merge("mixtral").unwrap();
    let uneven = [("alpha_pattern", json!({"experts\\.1\\.w3": 5}))];
    let uneven = Altered::new("mixtral", &uneven, &same);
    says(uneven.gguf("mixtral"), ErrorKind::Unsupported, &["experts.1.w3", "--merge-lora"]);
    uneven.merge("mixtral").unwrap();

    // An embedding that is the output, too.
    let embedding = |part: &str| format!("base_model.model.model.embed_tokens.lora_embedding_{part}");
    let tied = Altered::new("gemma3-spm", &[("r", json!(4))], &|n| {
        // A of (4, 64 inputs) serves as A of (4, 64 tokens): not the base's 600.
        let from = "base_model.model.model.layers.0.self_attn.v_proj.lora_";
        n.strip_prefix(from).and_then(|part| part.strip_suffix(".weight")).map(embedding)
    });
    let config = base("gemma3-spm").join("config.json");
    says(
        converting(tied.dir.path(), &config, &tied.dir.path().join("x.gguf")).plan().map(|_| ()),
        ErrorKind::Unsupported,
        &["one matrix for embedding and output", "--merge-lora"],
    );
    says(tied.merge("gemma3-spm"), ErrorKind::Malformed, &["embed_tokens.weight", "[64, 64]", "[600, 64]"]);
}

/// PyTorch's file serves as well, and names that keep the adapter's.
#[test]
fn other_spellings() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, named) = (dir.path().join("plain.gguf"), dir.path().join("named.gguf"));
    converting(&adapter("qwen2"), &base("qwen2"), &plain)
        .plan()
        .unwrap()
        .run(true, &budget(), &Silent)
        .unwrap();
    let spelled = Altered::new("qwen2", &[], &|n| Some(n.replace(".weight", ".default.weight")));
    let with_name = LoraToGguf {
        edits: qconv::convert::MetadataEdits { name: Some("Qwen2".into()), ..Default::default() },
        ..converting(spelled.dir.path(), &base("qwen2"), &named)
    };
    with_name.plan().unwrap().run(true, &budget(), &Silent).unwrap();
    let open =
        |path: &Path| qconv::container::gguf::Gguf::open(path, &qconv::limits::Limits::default()).unwrap();
    let (plain, named) = (open(&plain), open(&named));
    assert!(!plain.store.tensors().is_empty());
    for t in plain.store.tensors() {
        let other = named.store.get(&t.name).unwrap();
        assert_eq!(plain.store.read_all(t).unwrap(), named.store.read_all(other).unwrap(), "{}", t.name);
    }
    assert_eq!(plain.metadata.str("general.type"), Some("adapter"));
    assert_eq!(plain.metadata.str("adapter.type"), Some("lora"));
}
