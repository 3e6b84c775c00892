//! What is looked at in an adapter before llama.cpp gets it: it checks shapes against the base, but
//! not everything that its computation takes for granted.

use std::path::Path;

use crate::container::gguf::Gguf;
use crate::error::{Error, Result};
use crate::limits::Limits;

/// Whether the file is an adapter whose matrices can be multiplied with each other.
///
/// # Errors
/// As [`Gguf::open`]; `Misuse` for a file that is no adapter, `Malformed` for matrices that do not fit
/// each other.
pub fn check(path: &Path) -> Result<()> {
    let gguf = Gguf::open(path, &Limits::default())?;
    let kind = gguf.metadata.str("general.type").unwrap_or("model");
    if kind != "adapter" {
        return Err(Error::misuse(format!("is a {kind}, an adapter was expected"))
            .at(path)
            .hint("adapters are made by qconv lora-to-gguf"));
    }
    for a in gguf.store.tensors() {
        let Some(name) = a.name.strip_suffix(".lora_a") else { continue };
        let Some(b) = gguf.store.get(&format!("{name}.lora_b")) else { continue };
        let rank_of_a = if name == "token_embd.weight" { 0 } else { 1 };
        let inner = |shape: &[u64], k: usize| shape.iter().rev().nth(k).copied();
        let stacked = |shape: &[u64]| shape.iter().rev().skip(2).product::<u64>();
        if inner(&a.shape, rank_of_a) != inner(&b.shape, 0) || stacked(&a.shape) != stacked(&b.shape) {
            return Err(Error::malformed(format!(
                "{name}: A of {:?} and B of {:?} do not fit each other",
                a.shape, b.shape
            ))
            .at(path));
        }
    }
    Ok(())
}
