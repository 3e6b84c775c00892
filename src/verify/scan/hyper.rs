//! Metadata that loaders need: which must be there, of which type, within which bounds.
//!
//! What llama.cpp requires is read in `llama_model_base::load_hparams` and the `load_arch_hparams` of its models
//! (version of the linked library); the bounds are `LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`.

use super::Scan;
use super::gguf::{Entries, short};
use super::rules::{ARCHITECTURE, KEY_IMPLAUSIBLE, KEY_MISSING, KEY_RANGE, KEY_TYPE};
use crate::arch::{self, PROJECTOR};
use crate::container::gguf::{Value, ValueType};
use crate::tensor::TensorInfo;

/// `LLAMA_MAX_LAYERS`: llama.cpp has arrays of so many.
const MAX_LAYERS: u64 = 512;
/// `LLAMA_MAX_EXPERTS`.
const MAX_EXPERTS: u64 = 1024;
const NAME: &str = "general.architecture";

/// Counts that may be one number or one for each layer, and what they may be at most.
const COUNTS: &[(&str, u64)] = &[
    ("attention.head_count", 1 << 16),
    ("attention.head_count_kv", 1 << 16),
    ("feed_forward_length", 1 << 24),
    ("context_length", 1 << 32),
    ("embedding_length", 1 << 20),
    ("vocab_size", 1 << 26),
    ("expert_count", MAX_EXPERTS),
    ("expert_used_count", MAX_EXPERTS),
    ("attention.key_length", 1 << 16),
    ("attention.value_length", 1 << 16),
    ("rope.dimension_count", 1 << 16),
];
/// Keys without which llama.cpp loads no model.
const NEEDED: &[&str] = &["block_count", "context_length", "embedding_length"];
/// Keys of which llama.cpp needs one or the other, where the architecture has them.
const EPSILONS: &[&str] = &["attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"];
/// Keys that architectures with a state need, where they have them.
const STATES: &[&str] = &["ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"];
/// Types of entries that every reader knows.
const TYPES: &[(&str, ValueType)] = &[
    ("general.name", ValueType::String),
    ("general.type", ValueType::String),
    ("general.file_type", ValueType::U32),
    ("general.quantization_version", ValueType::U32),
    ("tokenizer.ggml.model", ValueType::String),
    ("tokenizer.ggml.pre", ValueType::String),
    ("tokenizer.chat_template", ValueType::String),
    ("tokenizer.ggml.add_bos_token", ValueType::Bool),
    ("tokenizer.ggml.add_eos_token", ValueType::Bool),
    ("tokenizer.ggml.add_space_prefix", ValueType::Bool),
];
/// The version of block types that ggml has.
const QUANTIZATION_VERSION: u64 = 2;

pub(super) fn check(scan: &mut Scan, entries: &Entries<'_>, tensors: &[TensorInfo]) {
    for (key, wanted) in TYPES {
        if let Some(value) = entries.metadata.get(key)
            && value.value_type() != *wanted
        {
            wrong_type(scan, entries, key, value, wanted.name());
        }
    }
    let version = "general.quantization_version";
    if let Some(n) = entries.metadata.u64(version).filter(|n| *n != QUANTIZATION_VERSION) {
        let message = format!("{version} is {n}, ggml has {QUANTIZATION_VERSION}");
        scan.find(entries.finding(&KEY_IMPLAUSIBLE, version, message).values(n, QUANTIZATION_VERSION));
    }
    let name = match entries.metadata.get(NAME) {
        None => return missing(scan, entries, NAME),
        Some(value) => match value.as_str() {
            Some("") => {
                let message = format!("{NAME} is empty");
                return scan.find(entries.finding(&KEY_RANGE, NAME, message));
            }
            Some(name) => name,
            None => return wrong_type(scan, entries, NAME, value, "STRING"),
        },
    };
    let known = arch::named(name).unwrap_or_default();
    if known.is_empty() && name != PROJECTOR {
        let message = format!("{NAME} is {name:?}, which is not known here");
        scan.find(entries.finding(&ARCHITECTURE, NAME, message));
    }
    if name == PROJECTOR {
        return;
    }
    let key = |short: &str| format!("{name}.{short}");
    let has = |short: &str| entries.metadata.get(&key(short)).is_some();
    // Of others nobody knows what they need: they may be no language models.
    for short in NEEDED {
        if !known.is_empty() && !has(short) {
            missing(scan, entries, &key(short));
        }
    }
    let writes = |short: &&&str| known.iter().any(|a| a.writes(&key(short)));
    if let Some(epsilon) = EPSILONS.iter().find(writes)
        && !EPSILONS.iter().any(|e| has(e))
    {
        missing(scan, entries, &key(epsilon));
    }
    for short in STATES.iter().filter(writes).filter(|s| !has(s)) {
        missing(scan, entries, &key(short));
    }
    ranges(scan, entries, name, tensors);
}

fn missing(scan: &mut Scan, entries: &Entries<'_>, key: &str) {
    let message = format!("{key} is missing");
    scan.find(entries.finding(&KEY_MISSING, key, message));
}

fn wrong_type(scan: &mut Scan, entries: &Entries<'_>, key: &str, value: &Value, wanted: &str) {
    let found = value.value_type().name();
    let message = format!("{key} is of type {found}, not {wanted}");
    scan.find(entries.finding(&KEY_TYPE, key, message).values(found, wanted));
}

/// Whether one of the tensors' names has `part` in it.
fn any(tensors: &[TensorInfo], part: &str) -> bool {
    tensors.iter().any(|t| t.name.contains(part))
}

fn ranges(scan: &mut Scan, entries: &Entries<'_>, name: &str, tensors: &[TensorInfo]) {
    let key = |short: &str| format!("{name}.{short}");
    let number = |short: &str| entries.metadata.u64(&key(short));
    let mut range = |short: &str, message: String, found: &dyn ToString, expected: &str| {
        let key = key(short);
        let finding = entries.finding(&KEY_RANGE, &key, format!("{key} {message}"));
        scan.find(finding.values(found.to_string(), expected));
    };
    let blocks = number("block_count");
    if let Some(n) = blocks.filter(|n| !(1..=MAX_LAYERS).contains(n)) {
        range("block_count", format!("is {n}; llama.cpp has room for 1 to {MAX_LAYERS}"), &n, "1 to 512");
    }
    let (heads, kv) = (number("attention.head_count"), number("attention.head_count_kv"));
    let has_state = any(tensors, ".ssm_") || any(tensors, ".time_mix_") || any(tensors, ".shortconv.");
    if heads == Some(0) && (!has_state || any(tensors, ".attn_q.")) {
        range("attention.head_count", "is 0: loaders divide by it".into(), &0, "at least 1");
    }
    if let (Some(heads), Some(kv)) = (heads.filter(|n| *n > 0), kv.filter(|n| *n > 0))
        && !heads.is_multiple_of(kv)
    {
        range(
            "attention.head_count_kv",
            format!("is {kv}, which does not divide {heads} heads"),
            &kv,
            "a divisor",
        );
    }
    for short in ["embedding_length", "context_length"] {
        if number(short) == Some(0) {
            range(short, "is 0".into(), &0, "at least 1");
        }
    }
    let (experts, used) = (number("expert_count").unwrap_or(0), number("expert_used_count").unwrap_or(0));
    if used > experts {
        range("expert_used_count", format!("is {used}, of {experts} experts"), &used, "at most expert_count");
    }
    if experts > 0 && used == 0 {
        range("expert_used_count", format!("is 0, of {experts} experts"), &0, "at least 1");
    }
    for (short, most) in COUNTS {
        match entries.metadata.get(&key(short)) {
            None => {}
            Some(Value::Array(values)) => {
                let largest = (0..values.len()).filter_map(|i| values.get(i));
                let fault = largest.map(|v| v.as_u64()).find(|n| n.is_none_or(|n| n > *most));
                if let Some(found) = fault {
                    let found = found.map_or("no count".into(), |n| n.to_string());
                    range(short, format!("has an element that is {found}"), &found, "a count");
                }
                if blocks.is_some_and(|n| (values.len() as u64) < n) {
                    let n = values.len();
                    range(short, format!("has {n} elements, fewer than blocks"), &n, "one for each block");
                }
            }
            Some(value) => match value.as_u64() {
                Some(n) if n > *most => range(short, format!("is {n}"), &n, &format!("at most {most}")),
                Some(_) => {}
                None => wrong_number(&mut range, short, value),
            },
        }
    }
    if let Some(value) = entries.metadata.get(&key("block_count")).filter(|v| v.as_u64().is_none()) {
        wrong_number(&mut range, "block_count", value);
    }
    for (full, value) in entries.metadata.iter() {
        let Some(short_key) = full.strip_prefix(name).and_then(|k| k.strip_prefix('.')) else { continue };
        let (Value::F32(_) | Value::F64(_)) = value else { continue };
        let v = value.as_f64().unwrap_or(f64::NAN);
        // Gemma's clamps and the like may be infinite in no file that was seen.
        if !v.is_finite() {
            range(short_key, format!("is {v}"), &v, "a finite number");
        } else if short_key.ends_with("epsilon") && !(v > 0.0 && v <= 0.1) {
            range(short_key, format!("is {v}: it is added to a variance"), &v, "above 0, at most 0.1");
        } else if short_key.starts_with("rope.freq_base") && v <= 0.0 {
            range(short_key, format!("is {v}: its logarithm is taken"), &v, "above 0");
        }
    }
    let length = number("embedding_length");
    if let (Some(length), Some(heads), None) =
        (length, heads.filter(|n| *n > 0), number("attention.key_length"))
        && !length.is_multiple_of(heads)
    {
        let key = key("attention.head_count");
        let message = format!("{key} is {heads}, which does not divide the {length} of embedding_length");
        scan.find(entries.finding(&KEY_IMPLAUSIBLE, &key, message));
    }
    let tensors =
        tensors.iter().filter_map(|t| t.name.strip_prefix("blk.")?.split_once('.')?.0.parse::<u64>().ok());
    if let (Some(last), Some(blocks)) = (tensors.max(), blocks)
        && last >= blocks
    {
        let key = key("block_count");
        let message = format!("{key} is {blocks}, but there are tensors of block {last}");
        scan.find(entries.finding(&KEY_IMPLAUSIBLE, &key, message));
    }
}

fn wrong_number(range: &mut impl FnMut(&str, String, &dyn ToString, &str), short_key: &str, value: &Value) {
    let found = short(value);
    range(short_key, format!("is {found}, no count"), &found, "a count");
}
