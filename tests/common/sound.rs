//! A small GGUF model with nothing wrong, and ways to make one thing wrong.
#![allow(dead_code)] // each test uses its part

use qconv::tensor::DType;

use crate::checkpoint::f32_bytes;
use crate::raw::{Raw, kind};

/// A model with nothing wrong: three tensors, of which the second is followed by padding.
pub fn sound() -> Raw {
    let raw = Raw::empty()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 128)
        .u32("llama.embedding_length", 8)
        .u32("llama.attention.head_count", 2)
        .entry("llama.attention.layer_norm_rms_epsilon", kind::F32, 1e-5f32.to_le_bytes())
        .text("tokenizer.ggml.model", "llama");
    let raw = vocabulary(raw, &[b"<s>", b"</s>", b"a", b"b"])
        .u32("tokenizer.ggml.bos_token_id", 0)
        .text("tokenizer.chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}");
    with_tensors(raw, "token_embd.weight", 128, 224)
}

pub fn vocabulary(raw: Raw, tokens: &[&[u8]]) -> Raw {
    let n = tokens.len() as u64;
    let types: Vec<u8> = (0..n).flat_map(|i| if i < 2 { 3u32 } else { 1 }.to_le_bytes()).collect();
    let scores: Vec<u8> = (0..n).flat_map(|i| (-(i as f32)).to_le_bytes()).collect();
    raw.strings("tokenizer.ggml.tokens", tokens)
        .array("tokenizer.ggml.token_type", kind::I32, n, types)
        .array("tokenizer.ggml.scores", kind::F32, n, scores)
}

pub fn with_tensors(raw: Raw, first: &str, second_at: u64, third_at: u64) -> Raw {
    let mut raw = raw.info(first, &[8, 4], 0, 0).info("blk.0.ffn_up.weight", &[32, 2], 8, second_at).info(
        "output_norm.weight",
        &[8],
        0,
        third_at,
    );
    raw.data = vec![0; third_at as usize + 32];
    put(&mut raw, 0, &f32_bytes(&[0.5; 32]));
    let block = [&[0u8, 0x3c][..], &[1; 32]].concat();
    put(&mut raw, second_at as usize, &[block.clone(), block].concat());
    put(&mut raw, third_at as usize, &f32_bytes(&[1.0; 8]));
    raw
}

pub fn put(raw: &mut Raw, at: usize, bytes: &[u8]) {
    raw.data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The model with other bytes at a place of its data.
pub fn data(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut raw = sound();
    put(&mut raw, at, bytes);
    raw.bytes()
}

/// The model without an entry.
pub fn without(key: &str) -> Raw {
    let mut raw = sound();
    let begin = raw.string(key);
    let before = raw.entries.len();
    raw.entries.retain(|e| !e.starts_with(&begin));
    assert_eq!(raw.entries.len() + 1, before, "{key}");
    raw
}

/// The model with another vocabulary.
pub fn tokens(tokens: &[&[u8]]) -> Raw {
    let mut raw = sound();
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"] {
        let begin = raw.string(key);
        raw.entries.retain(|e| !e.starts_with(&begin));
    }
    vocabulary(raw, tokens)
}

pub fn numbers(key: &str, element: u32, values: &[u32]) -> Vec<u8> {
    let payload: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    without(key).array(key, element, values.len() as u64, payload).bytes()
}

pub fn template(text: &str) -> Vec<u8> {
    without("tokenizer.chat_template").text("tokenizer.chat_template", text).bytes()
}

/// One tensor and nothing else.
pub fn one(dims: &[u64], dtype: DType, data: &[u8]) -> Vec<u8> {
    let mut raw = without("tokenizer.ggml.bos_token_id");
    raw.infos.clear();
    raw = raw.info("token_embd.weight", &[8, 4], 0, 0).info("x.weight", dims, dtype.ggml_id().unwrap(), 128);
    raw.data = [f32_bytes(&[0.5; 32]), data.to_vec()].concat();
    raw.data.resize(raw.data.len().next_multiple_of(32), 0);
    raw.bytes()
}

pub fn shard(no: u32, raw: Raw, tensors: u32) -> Vec<u8> {
    raw.u32("split.no", no).u32("split.count", 2).u32("split.tensors.count", tensors).bytes()
}
