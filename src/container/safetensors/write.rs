//! Lays out safetensors files: headers, shards, and the index. The caller writes the data.

use serde_json::{Map, json};

use crate::container::shards::shard_name;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// One file to be written.
#[derive(Debug)]
pub struct FileLayout {
    /// Its name in Hugging Face's numbering.
    pub name: String,
    /// Everything before the data.
    pub header: Vec<u8>,
    /// Bytes of the whole file.
    pub len: u64,
}

/// A checkpoint to be written.
#[derive(Debug)]
pub struct Layout {
    /// The files.
    pub files: Vec<FileLayout>,
    /// For each tensor: its file, and its first byte there.
    pub places: Vec<(usize, u64)>,
    /// The index, where there are several files.
    pub index: Option<Vec<u8>>,
}

impl Layout {
    /// Fills files of at most `max_shard_size` bytes of data with `tensors` (name, type, shape)
    /// in this order; a tensor larger than that has a file of its own.
    ///
    /// # Errors
    /// `Unsupported` for a type that safetensors lacks, `Malformed` for impossible sizes.
    pub fn new(tensors: &[(&str, DType, &[u64])], max_shard_size: u64) -> Result<Self> {
        // Members of each file, and the bytes of their data.
        let mut shards: Vec<(Vec<usize>, u64)> = vec![(Vec::new(), 0)];
        let mut sizes = Vec::with_capacity(tensors.len());
        for (i, (name, dtype, shape)) in tensors.iter().enumerate() {
            let n = dtype.nbytes(shape).map_err(|e| e.context(format_args!("tensor {name:?}")))?;
            sizes.push(n);
            let full = shards.last().is_some_and(|(members, size)| {
                !members.is_empty() && size.checked_add(n).is_none_or(|s| s > max_shard_size)
            });
            if full {
                shards.push((Vec::new(), 0));
            }
            if let Some((members, size)) = shards.last_mut() {
                members.push(i);
                *size =
                    size.checked_add(n).ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
            }
        }
        let count = shards.len();
        let mut layout =
            Self { files: Vec::with_capacity(count), places: vec![(0, 0); tensors.len()], index: None };
        let mut weight_map = Map::new();
        for (k, (members, size)) in shards.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => shard_name("model", k as u64, count as u64, "safetensors"),
            };
            let mut header = Map::new();
            header.insert("__metadata__".into(), json!({"format": "pt"}));
            let mut begin = 0u64;
            // Larger elements first, so that each tensor is aligned to its own; of one type the
            // order stays.
            let mut order = members.clone();
            order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].1.type_size()));
            for i in order {
                let (tensor, dtype, shape) = tensors[i];
                let st = dtype.safetensors_name().ok_or_else(|| {
                    Error::unsupported(format!("tensor {tensor:?}: safetensors has no type {dtype}"))
                })?;
                let entry = json!({"dtype": st, "shape": shape, "data_offsets": [begin, begin + sizes[i]]});
                if header.insert(tensor.into(), entry).is_some() {
                    return Err(Error::malformed(format!("tensor {tensor:?} appears twice")));
                }
                weight_map.insert(tensor.into(), json!(name));
                layout.places[i] = (k, begin);
                begin += sizes[i];
            }
            let mut text = serde_json::Value::Object(header).to_string().into_bytes();
            text.resize(text.len().next_multiple_of(8), b' ');
            let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text);
            let data = bytes.len() as u64;
            members.iter().for_each(|&i| layout.places[i].1 += data);
            let len =
                data.checked_add(*size).ok_or_else(|| Error::malformed("a file would exceed 2^64 bytes"))?;
            layout.files.push(FileLayout { name, header: bytes, len });
        }
        if count > 1 {
            let total: u64 = sizes.iter().sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            layout.index = Some(format!("{index:#}\n").into_bytes());
        }
        Ok(layout)
    }
}
