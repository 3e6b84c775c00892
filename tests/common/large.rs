//! A model that takes a while: that of the fixtures, larger.
#![allow(dead_code)] // each test uses its part

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value as Json, json};

/// Writes a llama of so many layers, 7.9 MB each in BF16, in files of so many layers.
pub fn write(dir: &Path, layers: u64, of_file: u64) {
    let like = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/models/llama");
    fs::create_dir_all(dir).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(like.join(name), dir.join(name)).unwrap();
    }
    let mut config: Json = serde_json::from_slice(&fs::read(like.join("config.json")).unwrap()).unwrap();
    let (hidden, inner, vocab) = (512, 2048, config["vocab_size"].as_u64().unwrap());
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", inner),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 16),
        ("num_key_value_heads", 8),
    ] {
        config[key] = value.into();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    // The same numbers again and again, from another place on in each tensor.
    let mut state = 1u32;
    let numbers: Vec<u8> = (0..1 << 20)
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Of either sign, from 2^-7 up.
            ((state >> 16 & 0x807f) | 0x3c00).to_le_bytes().into_iter().take(2)
        })
        .collect();
    let files = layers.div_ceil(of_file);
    let mut map = Map::new();
    for file in 0..files {
        let mut tensors: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        if file == 0 {
            tensors.insert("model.embed_tokens.weight".into(), vec![vocab, hidden]);
            tensors.insert("lm_head.weight".into(), vec![vocab, hidden]);
            tensors.insert("model.norm.weight".into(), vec![hidden]);
        }
        for layer in file * of_file..layers.min((file + 1) * of_file) {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![hidden / 2, hidden]),
                ("self_attn.v_proj", vec![hidden / 2, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
            ] {
                tensors.insert(format!("model.layers.{layer}.{name}.weight"), shape);
            }
        }
        let name = match files {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{files:05}.safetensors", file + 1),
        };
        let (mut header, mut at) = (Map::new(), 0);
        for (tensor, shape) in &tensors {
            let end = at + shape.iter().product::<u64>() * 2;
            header
                .insert(tensor.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
            map.insert(tensor.clone(), json!(name));
            at = end;
        }
        let mut header = Json::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = BufWriter::new(fs::File::create(dir.join(&name)).unwrap());
        out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        out.write_all(&header).unwrap();
        for (k, shape) in tensors.values().enumerate() {
            let mut left = shape.iter().product::<u64>() as usize * 2;
            let mut from = (k * 7919 * 2) % numbers.len();
            while left > 0 {
                let n = left.min(numbers.len() - from);
                out.write_all(&numbers[from..from + n]).unwrap();
                (left, from) = (left - n, 0);
            }
        }
        out.flush().unwrap();
    }
    if files > 1 {
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    }
}
