//! Quantized checkpoints.

use std::path::Path;

use qconv::container::{InputFile, Store};
use qconv::packed as layouts;
use serde_json::Value as Json;

use super::containers::{limits, read, values};
use super::input::{Bytes, part, parts};
use super::scratch;

/// Most bytes of a checkpoint that is made up.
const MOST_BYTES: u64 = 1 << 18;

/// A checkpoint in memory: what config.json says of its quantization, tensors as lines `NAME TYPE D0 D1 ...`, and bytes
/// that are repeated for their data.
pub fn made(data: &[u8]) -> bool {
    let files = parts(data);
    let quantization = part(&files, "config.json").and_then(|text| serde_json::from_slice::<Json>(text).ok());
    let tensors = super::words::listed(part(&files, "tensors").unwrap_or_default());
    let len = tensors.last().map_or(0, |t| t.offset.saturating_add(t.nbytes));
    if len > MOST_BYTES {
        return false;
    }
    let filling = part(&files, "data").filter(|d| !d.is_empty()).unwrap_or(&[0]);
    let bytes = filling.iter().copied().cycle().take(len as usize).collect();
    let file = InputFile::of_bytes(Path::new("model.safetensors"), bytes);
    let Ok(store) = Store::new(vec![file], tensors) else { return false };
    let Ok((store, method)) = layouts::unpack(store, quantization.as_ref()) else { return false };
    read(&store);
    method.is_some()
}

/// A checkpoint as a directory: config.json, model.safetensors and what else there may be.
pub fn directory(data: &[u8]) -> bool {
    let dir = scratch::directory(parts(data));
    let Ok(model) = qconv::Model::open(&dir, &limits()) else { return false };
    values(&model, &mut Bytes(&data[data.len().saturating_sub(32)..]));
    true
}
