//! Lays out safetensors files: headers, shards, and the index. The caller writes the data.

use serde_json::{Map, json};

use super::NAMING;
use crate::container::shards::{FileLayout, Layout, Member};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Fills files of at most `max_shard_size` bytes of data with `tensors` (name, type, shape) in this
/// order; a tensor larger than that has a file of its own.
///
/// # Errors
/// `Unsupported` for a type that safetensors lacks, `Malformed` for impossible sizes, and a name that
/// comes twice.
pub fn layout(tensors: &[(&str, DType, &[u64])], max_shard_size: u64) -> Result<Layout> {
    NAMING.lay_out(tensors, max_shard_size, file)
}

fn file(name: String, members: &[Member<'_>]) -> Result<(FileLayout, Vec<u64>)> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut begins = vec![0; members.len()];
    let mut begin = 0;
    // Larger elements first, so that each tensor is aligned to its own; of one type the order stays.
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(members[i].dtype.type_size()));
    for i in order {
        let Member { name, dtype, shape, nbytes } = members[i];
        let st = dtype
            .safetensors_name()
            .ok_or_else(|| Error::unsupported(format!("tensor {name:?}: safetensors has no type {dtype}")))?;
        let entry = json!({"dtype": st, "shape": shape, "data_offsets": [begin, begin + nbytes]});
        if header.insert(name.into(), entry).is_some() {
            return Err(Error::malformed(format!("tensor {name:?} cannot be called so")));
        }
        begins[i] = begin;
        begin += nbytes;
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    let data = header.len() as u64;
    let len = data.checked_add(begin).ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
    begins.iter_mut().for_each(|b| *b += data);
    Ok((FileLayout { name, header, len, ending: None }, begins))
}
