//! Lays out a GGUF file: header bytes, and the place of every tensor. Version 3, little-endian.
//!
//! llama.cpp's loader wants tensors one behind the other in the order of their infos, each padded
//! to the alignment; that is what comes out here. The caller writes the data.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::tensor::DType;

use super::layout::{MAGIC, MAX_DIMS, MAX_NAME, VERSION, align_up, alignment, check_key};
use super::value::{Array, Metadata, Value};

/// A file to be written.
#[derive(Debug)]
pub struct Layout {
    /// Everything before the first tensor, padding included.
    pub header: Vec<u8>,
    /// First byte of each tensor, from the beginning of the file.
    pub offsets: Vec<u64>,
    /// Bytes of the whole file. Gaps between tensors are zeros.
    pub total_len: u64,
}

impl Layout {
    /// Lays out `tensors` (name, type, shape with the outermost dimension first) in this order.
    ///
    /// # Errors
    /// `Unsupported` for what the format cannot hold: types ggml lacks, more than four
    /// dimensions, names over 63 bytes. `Malformed` for faulty keys, alignment or sizes.
    pub fn new(metadata: &Metadata, tensors: &[(&str, DType, &[u64])]) -> Result<Self> {
        let alignment = alignment(metadata)?;
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((metadata.0.len() as u64).to_le_bytes());
        for (key, value) in metadata.iter() {
            check_key(key)?;
            put_string(&mut out, key.as_bytes());
            out.extend(value.value_type().id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut names = HashSet::with_capacity(tensors.len());
        let mut relative = Vec::with_capacity(tensors.len());
        let mut at = 0u64;
        for (name, dtype, shape) in tensors {
            let context = |e: Error| e.context(format_args!("tensor {name:?}"));
            if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
                let message = format!("GGUF names have 1 to {MAX_NAME} bytes, and no NUL");
                return Err(context(Error::unsupported(message)));
            }
            if !names.insert(*name) {
                return Err(context(Error::malformed("appears twice")));
            }
            if shape.len() > MAX_DIMS as usize {
                return Err(context(Error::unsupported(format!(
                    "GGUF tensors have at most {MAX_DIMS} dimensions"
                ))));
            }
            let id = dtype
                .ggml_id()
                .ok_or_else(|| context(Error::unsupported(format!("GGUF has no type {dtype}"))))?;
            put_string(&mut out, name.as_bytes());
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(id.to_le_bytes());
            out.extend(at.to_le_bytes());
            relative.push(at);
            at = dtype
                .nbytes(shape)
                .map_err(context)?
                .checked_add(at)
                .and_then(|end| align_up(end, alignment))
                .ok_or_else(|| context(Error::malformed("the file would exceed 2^64 bytes")))?;
        }
        let data = align_up(out.len() as u64, alignment).unwrap_or(out.len() as u64);
        out.resize(data as usize, 0);
        let total_len =
            data.checked_add(at).ok_or_else(|| Error::malformed("the file would exceed 2^64 bytes"))?;
        Ok(Self { header: out, offsets: relative.iter().map(|r| data + r).collect(), total_len })
    }
}

fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(v) => put_array(out, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    macro_rules! numbers {
        ($list:expr) => {
            $list.iter().for_each(|v| out.extend(v.to_le_bytes()))
        };
    }
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => numbers!(v),
        Array::U16(v) => numbers!(v),
        Array::I16(v) => numbers!(v),
        Array::U32(v) => numbers!(v),
        Array::I32(v) => numbers!(v),
        Array::F32(v) => numbers!(v),
        Array::Bool(v) => out.extend(v.iter().map(|b| u8::from(*b))),
        Array::String(v) => v.iter().for_each(|s| put_string(out, s)),
        Array::U64(v) => numbers!(v),
        Array::I64(v) => numbers!(v),
        Array::F64(v) => numbers!(v),
        Array::Array(v) => v.iter().for_each(|a| put_array(out, a)),
    }
}
