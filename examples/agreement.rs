//! How far what a GGUF file computes lies from what was recorded, as JSON:
//! `agreement MODEL.gguf REFERENCE.safetensors`. The reference holds `input_ids` (i64) and `logits` or
//! `last_hidden_state` (f32, one row per token), as in `fixtures/models`.

use std::path::Path;

use qconv::container::safetensors;
use qconv::eval::embed::{hidden_states, output};
use qconv::eval::logits::{Matrix, compare};
use qconv::ggml::{Model, ModelOptions};
use qconv::limits::Limits;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, reference] = args.as_slice() else {
        anyhow::bail!("usage: agreement MODEL.gguf REFERENCE.safetensors");
    };
    let store = safetensors::open(Path::new(reference), &Limits::default())?.store;
    let (Some(ids), Some(wanted)) =
        (store.get("input_ids"), store.get("logits").or_else(|| store.get("last_hidden_state")))
    else {
        anyhow::bail!("{reference} has no input_ids, or neither logits nor last_hidden_state");
    };
    let columns = wanted.shape.last().map_or(0, |&n| n as usize);
    let is_logits = wanted.name == "logits";
    let ids = store.read_all(ids)?;
    let ids: Vec<i32> = ids.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as i32).collect();
    let values = store.read_all(wanted)?;
    let values = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let model = Model::load(model, &ModelOptions::default())?;
    let found =
        if is_logits { output(&model, &ids, 1)?.matrix().clone() } else { hidden_states(&model, &ids, 1)? };
    println!("{}", serde_json::to_string(&compare(&found, &Matrix { columns, values })?)?);
    Ok(())
}
