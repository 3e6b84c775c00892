//! `verify --logits`: sound conversions pass, of each family that candle has and of others; damaged
//! ones fail, and the layer and the tensor are named.
#![cfg(feature = "ggml")]

mod common;

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use qconv::container::gguf::Gguf;
use qconv::container::safetensors;
use qconv::convert::{Silent, TokenCheck};
use qconv::limits::Limits;
use qconv::verify::{LogitsOptions, Options, Outcome, Place, Proof, verify};

const TOKENS: usize = 48;

fn options(file: &Path, source: &Path) -> Options {
    Options {
        against: Some(source.to_path_buf()),
        logits: Some(LogitsOptions { tokens: TOKENS, memory: None }),
        tokens: TokenCheck::Skipped,
        ..Options::new(file)
    }
}

fn prove_with(options: &Options) -> Proof {
    let report = verify(options, &common::budget(), &Silent).unwrap();
    let proof = report.proof.clone().unwrap();
    let check = report.checks.iter().find(|c| c.name == "logits").unwrap();
    assert_eq!(check.outcome == Outcome::Passed, proof.passed());
    println!("{}: {}", options.file.display(), check.detail);
    proof
}

fn prove(file: &Path, source: &Path) -> Proof {
    prove_with(&options(file, source))
}

/// A converted fixture in a folder of its own.
struct Converted {
    source: PathBuf,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Converted {
    fn new(name: &str, file_type: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (source, file) = (common::fixture(name), dir.path().join(format!("{file_type}.gguf")));
        common::convert(&source, &file, Some(file_type));
        Self { source, file, _dir: dir }
    }

    fn prove(&self) -> Proof {
        prove(&self.file, &self.source)
    }

    fn place_of(&self, tensor: &str) -> (u64, u64) {
        let gguf = Gguf::open(&self.file, &Limits::default()).unwrap();
        let t = gguf.store.get(tensor).unwrap_or_else(|| panic!("no {tensor}"));
        (t.offset, t.nbytes)
    }

    fn read(&self, tensor: &str) -> Vec<u8> {
        let gguf = Gguf::open(&self.file, &Limits::default()).unwrap();
        gguf.store.read_all(gguf.store.get(tensor).unwrap()).unwrap()
    }

    fn write(&self, tensor: &str, bytes: &[u8]) {
        let (offset, nbytes) = self.place_of(tensor);
        assert_eq!(bytes.len() as u64, nbytes, "{tensor}");
        let mut file = OpenOptions::new().write(true).open(&self.file).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    /// Changes the F32 values of a tensor.
    fn edit(&self, tensor: &str, change: impl Fn(f32) -> f32) {
        let bytes = self.read(tensor);
        let changed =
            bytes.as_chunks::<4>().0.iter().flat_map(|b| change(f32::from_le_bytes(*b)).to_le_bytes());
        self.write(tensor, &changed.collect::<Vec<u8>>());
    }

    /// Puts a tensor of the checkpoint (BF16) as it stands into one of the file (F32).
    fn copy_unchanged(&self, from: &str, to: &str) {
        let store =
            safetensors::open(&self.source.join("model.safetensors"), &Limits::default()).unwrap().store;
        let bytes = store.read_all(store.get(from).unwrap()).unwrap();
        let widened = bytes.as_chunks::<2>().0.iter().flat_map(|&[a, b]| [0, 0, a, b]);
        self.write(to, &widened.collect::<Vec<u8>>());
    }
}

/// Fails, and says where and by which tensors.
fn assert_departs(proof: &Proof, place: Place, tensors: &[&str]) {
    assert!(!proof.passed());
    let departure = proof.departure.as_ref().unwrap();
    let found: Vec<&str> = departure.tensors.iter().map(String::as_str).collect();
    assert_eq!((departure.place, &found[..]), (Some(place), tensors), "{departure}");
}

#[cfg(feature = "reference")]
mod candle {
    use std::fs;

    use qconv::convert::{HfToGguf, Quantizer, Recipe};

    use super::*;

    const FAMILIES: &[&str] = &[
        "models/llama",
        "models/llama-rope3",
        "models/mistral",
        "models/mixtral",
        "models/qwen2",
        "models/qwen2_moe",
        "models/qwen3",
        "models/qwen3_moe",
        "models/gemma2-spm",
        "models/gemma3-spm",
        "models/gpt2",
        "models/olmo2",
        "models/phi_3",
        "tiny-llama",
    ];

    #[test]
    fn sound_conversions_pass() {
        for name in FAMILIES {
            for file_type in ["f32", "f16", "bf16", "q8_0"] {
                let proof = Converted::new(name, file_type).prove();
                assert!(proof.passed(), "{name} {file_type}: {proof}");
                assert!(proof.reference.starts_with("candle"), "{name}: {proof}");
                assert_eq!(proof.own_weights.is_some(), file_type == "q8_0");
                let same = proof.source.agreement.argmax_agree;
                assert!(file_type != "f32" || same == proof.tokens, "{name}: {proof}");
            }
        }
    }

    #[test]
    fn quantized_files_compute_what_their_weights_say() {
        for recipe in ["q4_k_m", "q4_0", "iq4_xs", "q2_k"] {
            let dir = tempfile::tempdir().unwrap();
            let (source, file) = (common::fixture("tiny-llama"), dir.path().join("x.gguf"));
            let job = HfToGguf {
                source: source.clone(),
                output: Some(file.clone()),
                quantizer: Some(Quantizer::new(Recipe::parse(recipe).unwrap())),
                tokens: TokenCheck::Skipped,
                ..HfToGguf::default()
            };
            job.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
            let proof = prove(&file, &source);
            assert!(proof.passed(), "{recipe}: {proof}");
            // What quantization lost shows in the comparison with the source alone.
            let own = proof.own_weights.as_ref().unwrap();
            assert!(own.agreement.rel_rms < proof.source.agreement.rel_rms / 2.0, "{recipe}: {proof}");
            assert!(own.kld_mean < proof.source.kld_mean, "{recipe}: {proof}");
        }
    }

    #[test]
    fn a_permutation_left_out_is_found() {
        let model = Converted::new("models/llama", "f32");
        model.copy_unchanged("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight");
        let proof = model.prove();
        assert_departs(&proof, Place::Layer(1), &["blk.1.attn_q.weight"]);
        assert!(proof.departure.unwrap().why.contains("explains"));
    }

    #[test]
    fn a_norm_off_by_one_is_found() {
        for (name, tensor, place) in [
            ("models/llama", "blk.1.ffn_norm.weight", Place::Layer(1)),
            ("models/mixtral", "blk.0.attn_norm.weight", Place::Layer(0)),
            ("models/gemma3-spm", "blk.4.post_attention_norm.weight", Place::Layer(4)),
            ("models/gpt2", "blk.0.ffn_norm.bias", Place::Layer(0)),
            ("models/qwen3", "blk.1.attn_q_norm.weight", Place::Layer(1)),
            ("models/qwen2", "output_norm.weight", Place::Head),
        ] {
            let model = Converted::new(name, "f32");
            model.edit(tensor, |x| x + 1.0);
            assert_departs(&model.prove(), place, &[tensor]);
        }
    }

    #[test]
    fn swapped_layers_are_found() {
        for file_type in ["f32", "q8_0"] {
            let model = Converted::new("models/gemma3-spm", file_type);
            let gguf = Gguf::open(&model.file, &Limits::default()).unwrap();
            let names: Vec<_> = gguf.store.tensors().iter().map(|t| t.name.clone()).collect();
            for name in names.iter().filter(|n| n.starts_with("blk.2.")) {
                let other = name.replace("blk.2.", "blk.3.");
                let (a, b) = (model.read(name), model.read(&other));
                model.write(name, &b);
                model.write(&other, &a);
            }
            let proof = model.prove();
            assert!(!proof.passed());
            let departure = proof.departure.unwrap();
            assert_eq!(departure.place, Some(Place::Layer(2)), "{departure}");
            assert!(departure.why.contains("are those of the source's layer 3"), "{departure}");
            assert_eq!(departure.tensors.len(), names.iter().filter(|n| n.starts_with("blk.2.")).count());
        }
    }

    #[test]
    fn a_damaged_norm_of_a_quantized_file_is_found() {
        let model = Converted::new("models/llama", "q8_0");
        model.edit("blk.1.attn_norm.weight", |x| x + 1.0);
        assert_departs(&model.prove(), Place::Layer(1), &["blk.1.attn_norm.weight"]);
    }

    #[test]
    fn an_embedding_is_found() {
        let model = Converted::new("models/llama", "f32");
        model.edit("token_embd.weight", |x| 2.0 * x + 0.5);
        assert_departs(&model.prove(), Place::Layer(0), &["token_embd.weight"]);
    }

    /// A mistake that conversion and verification share: only another implementation can tell.
    #[test]
    fn a_mistaken_rule_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let toml = dir.path().join("mistaken.toml");
        let text = r#"
            schema  = 1
            arch    = "llama"
            extends = "llama"
            [[class]]
            name = "LlamaForCausalLM"
            model_type = "llama"
            [tensors]
            "model.layers.{i}.self_attn.k_proj.{p}" = "blk.{i}.attn_k.{p}"
            [example]
        "#;
        fs::write(&toml, text).unwrap();
        let (source, file) = (common::fixture("models/llama"), dir.path().join("x.gguf"));
        let conversion = HfToGguf {
            source: source.clone(),
            output: Some(file.clone()),
            arch_file: Some(toml.clone()),
            tokens: TokenCheck::Skipped,
            ..HfToGguf::default()
        };
        conversion.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
        let proof = prove_with(&Options { arch_file: Some(toml), ..options(&file, &source) });
        assert_departs(&proof, Place::Layer(0), &[]);
        assert!(proof.departure.unwrap().why.contains("rule of the mapping"));
    }

    #[test]
    fn too_little_memory_is_said_before() {
        let model = Converted::new("models/llama", "f32");
        let logits = Some(LogitsOptions { tokens: 8, memory: Some(1 << 20) });
        let options = Options { logits, ..options(&model.file, &model.source) };
        let error = verify(&options, &common::budget(), &Silent).unwrap_err();
        assert_eq!(error.kind(), qconv::ErrorKind::Limit, "{error}");
        assert!(error.hint_text().unwrap().contains("--max-memory"), "{error}");
    }
}

/// Families without a model in candle.
const OTHERS: &[&str] = &["models/granite", "models/stablelm-qk", "models/gpt_neox"];

#[test]
fn others_are_compared_in_llama_cpp() {
    for name in OTHERS {
        for file_type in ["f32", "bf16", "q8_0"] {
            let proof = Converted::new(name, file_type).prove();
            assert!(proof.passed(), "{name} {file_type}: {proof}");
            assert!(proof.reference.contains("conversion to F32"), "{proof}");
            assert!(proof.no_candle.is_some());
        }
    }
}

#[test]
fn nodes_tell_of_damage_too() {
    let model = Converted::new("models/granite", "f32");
    model.edit("blk.1.ffn_norm.weight", |x| x + 1.0);
    assert_departs(&model.prove(), Place::Layer(1), &["blk.1.ffn_norm.weight"]);

    let model = Converted::new("models/granite", "f32");
    model.copy_unchanged("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight");
    assert_departs(&model.prove(), Place::Layer(1), &["blk.1.attn_k.weight"]);

    let model = Converted::new("models/gpt_neox", "f32");
    model.edit("output_norm.weight", |x| x + 1.0);
    assert_departs(&model.prove(), Place::Head, &["output_norm.weight"]);
}

#[test]
fn two_gguf_files_are_compared() {
    let (wanted, found) = (Converted::new("models/llama", "f32"), Converted::new("models/llama", "bf16"));
    let proof = prove(&found.file, &wanted.file);
    assert!(proof.passed() && proof.no_candle.is_some(), "{proof}");
    found.edit("blk.0.attn_norm.weight", |x| x + 1.0);
    assert_departs(&prove(&found.file, &wanted.file), Place::Layer(0), &["blk.0.attn_norm.weight"]);
}
