//! What several tests need: the fixtures' paths, conversion into a temporary file.
#![allow(dead_code)] // each test uses its part

pub mod expected;

use std::path::{Path, PathBuf};

use qconv::container::safetensors;
use qconv::convert::{Budget, FileType, HfToGguf, Job, Silent, TokenCheck};
use qconv::limits::Limits;

/// A path below `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Ctrl-C, for `kill`. Where a test was begun with it ignored, as in the background of a script, so are its children,
/// which obey: then the signal that asks programs to end.
pub fn interrupt() -> &'static str {
    const INT: u64 = 1 << (2 - 1);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    if ignored & INT == 0 { "-INT" } else { "-TERM" }
}

/// The models of the fixtures that are converted whole.
pub const MODELS: &[&str] = &[
    "models/llama",
    "models/llama-rope3",
    "models/mistral",
    "models/mixtral",
    "models/qwen2",
    "models/qwen3",
    "models/qwen3_moe",
    "models/qwen3_vl_moe",
    "models/falcon2",
    "models/stablelm-qk",
    "models/gpt2",
    "models/gemma3-spm",
    "models/fmt-spm-bpe",
    "models/fmt-ptbin-sharded",
    "models/gemma2-spm",
    "models/gpt_neox",
    "models/gpt_neox-seq",
    "models/gpt_oss",
    "models/gpt_oss-mxfp4",
    "models/fmt-fp8-block",
    "models/fmt-gptq4",
    "models/granite",
    "models/mamba2",
    "models/olmo2",
    "models/phi_3",
    "models/qwen2_moe",
    "models/deepseek_v2-qlora",
    "models/cohere",
    "models/deepseek_v3",
    "models/glm4",
    "models/lfm2_moe",
    "models/llama4",
    "models/nemotron_h",
    "models/qwen3_next",
    "tiny-llama",
];

/// Encoders: these have hidden states for a reference.
pub const ENCODERS: &[&str] = &["models/bert", "models/t5"];

/// One thread, little memory.
pub fn budget() -> Budget {
    Budget::new(Some(1), None).unwrap()
}

/// Plans a conversion of `source` to `output`.
pub fn plan(source: &Path, output: &Path, file_type: Option<&str>) -> Job {
    HfToGguf {
        source: source.to_path_buf(),
        output: Some(output.to_path_buf()),
        file_type: file_type.map(|t| FileType::parse(t).unwrap()),
        // `vocab_parity.rs` looks at the tokens.
        tokens: TokenCheck::Skipped,
        ..HfToGguf::default()
    }
    .plan()
    .unwrap_or_else(|e| panic!("{}: {e}", source.display()))
}

/// Converts `source` to `output`.
pub fn convert(source: &Path, output: &Path, file_type: Option<&str>) {
    plan(source, output, file_type).run(true, &budget(), &Silent).unwrap();
}

/// The ids that the reference is about, and its logits.
pub fn reference(source: &Path) -> (Vec<i32>, Vec<f32>) {
    reference_named(source, "logits")
}

/// The ids that the reference is about, and one of its tensors.
pub fn reference_named(source: &Path, name: &str) -> (Vec<i32>, Vec<f32>) {
    find_reference(source, name).unwrap()
}

/// The same; `None` where there is no such tensor.
pub fn find_reference(source: &Path, name: &str) -> Option<(Vec<i32>, Vec<f32>)> {
    let store =
        safetensors::open(&source.join("reference_logits.safetensors"), &Limits::default()).unwrap().store;
    let ids = store.read_all(store.get("input_ids").unwrap()).unwrap();
    let ids = ids.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect();
    let values = store.read_all(store.get(name)?).unwrap();
    let values = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Some((ids, values))
}
