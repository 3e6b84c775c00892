//! Every definition in `formats/mmproj` is tried on its `[example]` and each `[variant.NAME]` of it.
//!
//! `fixtures/mmproj/NAME-EXAMPLE.json` says which tensors such a checkpoint has, and what llama.cpp's
//! own converter made of it (`tests/peers/mmproj.py` records both). The checkpoint is made here, of the
//! same values, and has to become the same tensors and metadata. Then its language model is converted
//! alone, and run.
//!
//! `QCONV_MMPROJ=NAME` tries one, and leaves what it made in `QCONV_KEEP`, where that is given.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::expected::recorded;
use qconv::arch;
use qconv::container::gguf::Gguf;
use qconv::container::safetensors::write::layout;
use qconv::convert::{FileType, HfToGguf, Silent, ToHf, TokenCheck};
use qconv::error::{ErrorKind, Result};
use qconv::limits::Limits;
use qconv::tensor::DType;
use qconv::verify::{self, Outcome};
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

type Shapes = BTreeMap<String, Vec<u64>>;

/// Noise in [-1/8, 1/8): splitmix64 of the index, begun at FNV-1a of the name.
fn noise(name: &str, n: u64) -> impl Iterator<Item = f32> {
    let seed =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (1..=n).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.25
    })
}

/// A checkpoint of noise. `saved` renames tensors, whose values remain those of the old name.
fn write_checkpoint(dir: &Path, shapes: &Shapes, saved: &BTreeMap<String, String>) {
    let named: BTreeMap<&str, (&str, &[u64])> = shapes
        .iter()
        .map(|(name, shape)| (saved.get(name).unwrap_or(name).as_str(), (name.as_str(), shape.as_slice())))
        .collect();
    let tensors: Vec<_> = named.iter().map(|(name, (_, shape))| (*name, DType::F32, *shape)).collect();
    let layout = layout(&tensors, u64::MAX).unwrap();
    let mut bytes = layout.files[0].header.clone();
    bytes.resize(layout.files[0].len as usize, 0);
    for ((seed, shape), (_, offset)) in named.values().zip(&layout.places) {
        for (i, value) in noise(seed, shape.iter().product()).enumerate() {
            let at = *offset as usize + 4 * i;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    fs::write(dir.join(&layout.files[0].name), bytes).unwrap();
}

struct Trial {
    key: String,
    dir: PathBuf,
    record: Json,
    shapes: Shapes,
}

impl Trial {
    /// Writes the checkpoint of an example.
    fn new(scratch: &Path, key: String, mut config: Json) -> Self {
        let path = common::fixture(&format!("mmproj/{key}.json"));
        let text = fs::read(&path).unwrap_or_else(|e| {
            panic!("{}: {e}; tests/peers/mmproj.py makes it", path.display());
        });
        let record: Json = serde_json::from_slice(&text).unwrap();
        let shapes: Shapes = serde_json::from_value(record["checkpoint"].clone()).unwrap();
        let dir = scratch.join(&key);
        fs::create_dir_all(&dir).unwrap();
        let files: Vec<String> =
            config.as_object().unwrap().keys().filter(|k| k.ends_with(".json")).cloned().collect();
        for name in files {
            let content = config.as_object_mut().unwrap().remove(&name).unwrap();
            fs::write(dir.join(name), content.to_string()).unwrap();
        }
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        write_checkpoint(&dir, &shapes, &BTreeMap::new());
        Self { key, dir, record, shapes }
    }

    fn try_convert(&self, mmproj: bool, file_type: &str) -> Result<Gguf> {
        let kind = if mmproj { "mmproj" } else { "model" };
        let output = self.dir.join(format!("{kind}-{file_type}.gguf"));
        let conversion = HfToGguf {
            source: self.dir.clone(),
            output: Some(output.clone()),
            file_type: FileType::parse(file_type),
            mmproj,
            tokens: TokenCheck::Skipped,
            ..HfToGguf::default()
        };
        conversion.plan()?.run(true, &common::budget(), &Silent)?;
        Gguf::open(output, &Limits::default())
    }

    fn convert(&self, file_type: &str) -> Gguf {
        self.try_convert(true, file_type).unwrap_or_else(|e| panic!("{}: {e}", self.key))
    }

    /// Faults where what was written is not what llama.cpp's converter wrote.
    fn compare(&self, file_type: &str, found: &Gguf) -> Vec<String> {
        let mut faults = Vec::new();
        let on_purpose = |name: &str| self.record["differs"].get(name).is_some();
        let mut object = |what: &str, expected: &Json, found: BTreeMap<String, Json>| {
            let Some(expected) = expected.as_object() else {
                faults.push(format!("no {what} is recorded"));
                return;
            };
            for (name, value) in expected {
                if found.get(name) != Some(value) && !on_purpose(name) {
                    let found = found.get(name);
                    faults.push(format!("{what} {name}: expected {value}, found {found:?}"));
                }
            }
            for (name, value) in found {
                if !expected.contains_key(&name) && !on_purpose(&name) {
                    faults.push(format!("{what} {name}: not expected, found {value}"));
                }
            }
        };
        let tensors = found.store.tensors().iter().map(|t| {
            let digest = Sha256::digest(found.store.read_all(t).unwrap());
            let digest: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
            (t.name.clone(), json!([t.shape, t.dtype.name(), digest]))
        });
        object("tensor", &self.record["tensors"][file_type], tensors.collect());
        if file_type == "f16" {
            let metadata = found.metadata.iter().map(|(key, value)| (key.to_string(), recorded(value)));
            object("key", &self.record["kv"], metadata.collect());
        }
        faults
    }
}

/// The trials of all definitions, or of the one that `QCONV_MMPROJ` names.
fn trials(scratch: &Path) -> Vec<Trial> {
    let only = std::env::var("QCONV_MMPROJ").ok();
    let mut trials = Vec::new();
    for definition in arch::all_projectors().unwrap() {
        let name = definition.name.clone();
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        let examples = definition.examples().unwrap_or_else(|| panic!("{name} has no [example]"));
        trials.extend(
            examples.into_iter().map(|(example, c)| Trial::new(scratch, format!("{name}-{example}"), c)),
        );
    }
    assert!(!trials.is_empty());
    trials
}

#[test]
fn equal_to_llama_cpps_converter() {
    let scratch = tempfile::tempdir().unwrap();
    let keep = std::env::var_os("QCONV_KEEP").map(PathBuf::from);
    let mut faults = Vec::new();
    for trial in trials(keep.as_deref().unwrap_or(scratch.path())) {
        for file_type in ["f16", "q8_0"] {
            let found = trial.convert(file_type);
            assert_eq!(found.metadata.str("general.architecture"), Some("clip"));
            let n = found.store.tensors().len();
            let differing = trial.compare(file_type, &found);
            println!("{}\t{file_type}\t{n} tensors\t{} faults", trial.key, differing.len());
            faults.extend(differing.into_iter().map(|f| format!("{}, {file_type}: {f}", trial.key)));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What transformers writes today may be named in another way than what is published.
#[test]
fn names_of_today_give_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let mut tried = 0;
    for trial in trials(scratch.path()) {
        let Ok(saved) = serde_json::from_value::<BTreeMap<String, String>>(trial.record["saved"].clone())
        else {
            continue;
        };
        write_checkpoint(&trial.dir, &trial.shapes, &saved);
        let faults = trial.compare("f16", &trial.convert("f16"));
        assert!(faults.is_empty(), "{}: {}", trial.key, faults.join("\n"));
        tried += 1;
    }
    assert!(tried > 0 || std::env::var_os("QCONV_MMPROJ").is_some());
}

/// Without `--mmproj` the language model is converted, from the same directory, and runs.
#[test]
#[cfg(feature = "ggml")]
fn language_models_convert_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let mut faults = Vec::new();
    for trial in trials(scratch.path()) {
        // The tokenizer that has as many tokens.
        let rows = trial.shapes.iter().find(|(name, _)| name.ends_with("embed_tokens.weight")).unwrap().1[0];
        let tokenizer = common::fixture(if rows == 512 { "models/llama" } else { "models/gemma3-spm" });
        for name in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"] {
            if tokenizer.join(name).exists() {
                fs::copy(tokenizer.join(name), trial.dir.join(name)).unwrap();
            }
        }
        let found = trial.try_convert(false, "f32").and_then(|gguf| {
            assert!(
                gguf.store.tensors().iter().all(|t| !t.name.starts_with("v.") && !t.name.starts_with("mm."))
            );
            let logits =
                qconv::eval::logits::forward(trial.dir.join("model-f32.gguf"), &[5, 17, 300, 42], 1)?;
            assert!(logits.values.iter().all(|v| v.is_finite()), "{}", trial.key);
            Ok(gguf.metadata.str("general.architecture").unwrap().to_string())
        });
        match found {
            Ok(arch) => println!("{}\t{arch}", trial.key),
            Err(e) => faults.push(format!("{}: {e}", trial.key)),
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn one(scratch: &Path, name: &str) -> Trial {
    let definition = arch::all_projectors().unwrap().into_iter().find(|p| p.name == name).unwrap();
    let (example, config) = definition.examples().unwrap().swap_remove(0);
    Trial::new(scratch, format!("{name}-{example}"), config)
}

#[test]
fn verify_compares_with_the_source_and_runs_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let trial = one(scratch.path(), "gemma3");
    trial.convert("q8_0");
    let options = |against: &Path| verify::Options {
        against: Some(against.to_path_buf()),
        ..verify::Options::new(trial.dir.join("mmproj-q8_0.gguf"))
    };
    let report = verify::verify(&options(&trial.dir), &common::budget(), &Silent).unwrap();
    assert!(report.passed(), "{:?}", report.checks);
    let tensors = report.checks.iter().find(|c| c.name == "tensors").unwrap();
    assert_eq!(tensors.outcome, Outcome::Passed);
    // Other weights of the same shapes.
    let renamed: Shapes = trial.shapes.iter().map(|(n, s)| (format!("{n}x"), s.clone())).collect();
    let names = renamed.keys().map(|n| (n.clone(), n.trim_end_matches('x').to_string())).collect();
    write_checkpoint(&trial.dir, &renamed, &names);
    assert!(!verify::verify(&options(&trial.dir), &common::budget(), &Silent).unwrap().passed());
}

#[test]
fn what_is_missing_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let fails = |trial: &Trial, kind: ErrorKind, words: &[&str]| {
        let e = trial.try_convert(true, "f16").err().unwrap_or_else(|| panic!("{words:?}"));
        assert_eq!(e.kind(), kind, "{e}");
        let said = format!("{e} {}", e.hint_text().unwrap_or_default());
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    let trial = one(scratch.path(), "pixtral");
    fs::remove_file(trial.dir.join("tokenizer_config.json")).unwrap();
    fails(&trial, ErrorKind::Unsupported, &["[IMG_BREAK]", "tokenizer.json"]);
    let trial = one(scratch.path(), "gemma3");
    fs::remove_file(trial.dir.join("preprocessor_config.json")).unwrap();
    fails(&trial, ErrorKind::Unsupported, &["image_mean", "preprocessor_config.json"]);
    let trial = one(scratch.path(), "gemma3");
    fs::write(trial.dir.join("preprocessor_config.json"), "[1]").unwrap();
    fails(&trial, ErrorKind::Malformed, &["preprocessor_config.json", "no JSON object"]);
    let trial = one(scratch.path(), "qwen3vl");
    let mut shapes = trial.shapes.clone();
    shapes.remove("model.visual.deepstack_merger_list.1.norm.bias").unwrap();
    write_checkpoint(&trial.dir, &shapes, &BTreeMap::new());
    fails(
        &trial,
        ErrorKind::Malformed,
        &["model.visual.deepstack_merger_list.1.norm.bias", "missing"]
            .map(|w| w.trim_start_matches("model.")),
    );
    let trial = one(scratch.path(), "idefics3");
    let mut shapes = trial.shapes.clone();
    shapes.insert("model.vision_model.more.weight".into(), vec![4, 4]);
    write_checkpoint(&trial.dir, &shapes, &BTreeMap::new());
    fails(&trial, ErrorKind::Malformed, &["model.vision_model.more.weight", "idefics3"]);
    fs::write(trial.dir.join("config.json"), r#"{"architectures": ["LlamaForCausalLM"]}"#).unwrap();
    fails(&trial, ErrorKind::Unsupported, &["LlamaForCausalLM", "without --mmproj"]);
}

#[test]
fn has_no_way_back() {
    let scratch = tempfile::tempdir().unwrap();
    let trial = one(scratch.path(), "gemma3");
    trial.convert("f16");
    let back = ToHf::new(trial.dir.join("mmproj-f16.gguf"), scratch.path().join("back"));
    let e = back.plan().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("is a projector"), "{e}");
}
