//! Tensors beside the metadata: those that every loader needs, and sizes that both state.

use super::Scan;
use super::finding::Finding;
use super::gguf::Entries;
use super::rules::{TENSOR_MISSING, TENSOR_SHAPE};
use crate::arch::{self, PROJECTOR};
use crate::container::{InputFile, Store};

const EMBEDDING: &str = "token_embd.weight";

pub(super) fn check(scan: &mut Scan, entries: &Entries<'_>, store: &Store) {
    let Some(name) = entries.metadata.str("general.architecture").filter(|n| !n.is_empty()) else { return };
    if name == PROJECTOR || store.tensors().is_empty() {
        return; // a vocabulary alone is a file as well
    }
    // Of other architectures nobody knows what they need.
    let is_known = arch::named(name).is_ok_and(|known| !known.is_empty());
    if is_known && store.get(EMBEDDING).is_none() {
        let message = format!("tensor {EMBEDDING:?} is missing");
        scan.find(Finding::new(&TENSOR_MISSING, entries.file, message).tensor(EMBEDDING));
    }
    let length = entries.metadata.u64(&format!("{name}.embedding_length"));
    let tokens = entries.metadata.get("tokenizer.ggml.tokens").and_then(|v| Some(v.as_array()?.len() as u64));
    let mut compare = |tensor: &str, found: Option<u64>, wanted: Option<u64>, what: &str| {
        let (Some(info), Some(found), Some(wanted)) = (store.get(tensor), found, wanted) else { return };
        if found != wanted {
            let file = store.files().get(info.file).map_or(entries.file, InputFile::path);
            let message = format!("tensor {tensor:?} has {found} {what}, the metadata {wanted}");
            let finding = Finding::new(&TENSOR_SHAPE, file, message).tensor(tensor).at(info.offset);
            scan.find(finding.values(found, wanted));
        }
    };
    let shape = |tensor: &str| store.get(tensor).map(|t| t.shape.as_slice()).unwrap_or_default();
    compare(EMBEDDING, shape(EMBEDDING).last().copied(), length, "columns");
    if let [rows, _] = shape(EMBEDDING) {
        // More rows than tokens are padding.
        if tokens.is_some_and(|tokens| tokens > *rows) {
            compare(EMBEDDING, Some(*rows), tokens, "rows");
        }
    }
    for tensor in ["output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"] {
        if let [n] = shape(tensor) {
            compare(tensor, Some(*n), length, "values");
        }
    }
}
