//! Checkpoints that are quantized already: several stored tensors, such as codes and scales, are
//! one tensor to all that comes after.
//!
//! [`unpack`] finds the format by `quantization_config` and by the tensors' names; the two have to
//! agree. What it joins has an ordinary name, a shape and a type, and is read by rows like any
//! other ([`View`]): definitions of architectures know nothing of packing. A format that ggml has
//! too keeps its type, and its bits are moved; any other gives F32.
//!
//! A format is a file here, a row in the table `FORMATS` and a section of
//! `formats/spec/packed.md`.

mod auto_round;
mod awq;
mod bitnet;
mod bnb;
mod compressed;
pub mod coreml;
mod exact;
mod fp4;
mod fp8;
mod gptq;
mod hqq;
mod modelopt;
mod mxfp4;
pub(crate) mod patterns;
pub mod qpack;
pub mod write;

pub use exact::{BLOCKS, give_blocks, give_same};
pub use hqq::stated;

use std::ops::Range;
use std::sync::Arc;

use serde_json::Value as Json;

use crate::block::codec;
use crate::container::grouped::{Grouped, Shape, Values};
use crate::container::{Joined, Store, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

/// How one method lays out its tensors.
struct Format {
    /// `quant_method` in config.json.
    method: &'static str,
    /// How it is called in messages.
    name: &'static str,
    /// Whether only this packing has such a tensor.
    marks: fn(&TensorInfo) -> bool,
    /// All tensors that are packed.
    join: fn(&Packed<'_>) -> Result<Vec<Joined>>,
}

static FORMATS: &[Format] = &[
    fp8::FORMAT,
    fp8::FBGEMM,
    gptq::FORMAT,
    awq::FORMAT,
    auto_round::FORMAT,
    bnb::FORMAT,
    compressed::FORMAT,
    bitnet::FORMAT,
    hqq::FORMAT,
    modelopt::FORMAT,
    mxfp4::FORMAT,
];

/// The file in which early GPTQ models say how they are quantized.
pub const QUANTIZE_CONFIG: &str = "quantize_config.json";

/// What a model says of its quantization: in config.json, or, of early GPTQ models, in a file of its own, which
/// `early` reads.
///
/// # Errors
/// As `early`.
pub fn quantization(config: &Json, early: impl FnOnce() -> Result<Option<Json>>) -> Result<Option<Json>> {
    let text = config.get("text_config").unwrap_or(&Json::Null);
    let mut both = [config, text].into_iter().filter_map(|c| c.get("quantization_config"));
    if let Some(stated) = both.find(|q| !q.is_null()) {
        return Ok(Some(stated.clone()));
    }
    let mut early = early()?;
    if let Some(fields) = early.as_mut().and_then(Json::as_object_mut) {
        fields.entry("quant_method").or_insert_with(|| "gptq".into());
    }
    Ok(early)
}

/// Joins what is packed in `store`, of a model whose config.json says `quantization` of it
/// (`None` where it says nothing). A second result names the method.
///
/// # Errors
/// `Unsupported` for a method that is not known, or a variant of one; `Malformed` where config and
/// tensors contradict each other, or parts do not fit together.
pub fn unpack(store: Store, quantization: Option<&Json>) -> Result<(Store, Option<&'static str>)> {
    unpack_some(store, quantization, 1)
}

/// As [`unpack`], where at least so many tensors are packed.
fn unpack_some(
    store: Store,
    quantization: Option<&Json>,
    least: usize,
) -> Result<(Store, Option<&'static str>)> {
    let marked = |store: &Store| {
        store
            .tensors()
            .iter()
            .filter(|t| !store.is_joined(t))
            .find_map(|t| Some((FORMATS.iter().find(|f| (f.marks)(t))?, t.name.clone())))
    };
    let Some(config) = quantization.filter(|q| !q.is_null()) else {
        return match marked(&store) {
            None => Ok((store, None)),
            Some((format, name)) => Err(Error::malformed(format!(
                "tensor {name:?} is packed as in {}, but config.json has no quantization_config",
                format.name
            ))
            .hint("take over the quantization_config of the model's original config.json")),
        };
    };
    let method = config.get("quant_method").and_then(Json::as_str).unwrap_or("unnamed");
    let format = FORMATS.iter().find(|f| f.method == method).ok_or_else(|| {
        let known: Vec<_> = FORMATS.iter().map(|f| f.method).collect();
        Error::unsupported(format!("weights quantized by {method} cannot be read yet")).hint(format!(
            "convert the unquantized model that it was made from; read are: {}",
            known.join(", ")
        ))
    })?;
    let joined = (format.join)(&Packed { store: &store, config })?;
    if joined.len() < least {
        return Err(Error::malformed(format!(
            "config.json says that the weights are quantized by {method}, but no tensor is packed so"
        ))
        .hint("if they are not quantized, take quantization_config out of config.json"));
    }
    let store = store.join(joined)?;
    match marked(&store) {
        None => Ok((store, Some(format.method))),
        Some((other, name)) => Err(Error::malformed(format!(
            "tensor {name:?} is packed as in {}, but what it belongs to is not there, or quantized by {method}",
            other.name
        ))
        .hint("a shard may be missing, or config.json belongs to another version of the model")),
    }
}

/// A store with packed tensors, and what config.json says about them.
struct Packed<'a> {
    store: &'a Store,
    config: &'a Json,
}

impl Packed<'_> {
    /// The tensors whose name ends so, and what comes before.
    fn ending<'s>(&'s self, ending: &'static str) -> impl Iterator<Item = (&'s str, &'s TensorInfo)> {
        self.store.tensors().iter().filter_map(move |t| Some((t.name.strip_suffix(ending)?, t)))
    }

    /// A part that has to be there, and has to have one of these types and this shape.
    fn part(&self, name: &str, types: &[DType], shape: &[u64]) -> Result<&TensorInfo> {
        let t = self.store.get(name).ok_or_else(|| {
            Error::malformed(format!("tensor {name:?} is missing"))
                .hint("other parts of the packed tensor are there; a shard may be missing")
        })?;
        check(t, types, shape)?;
        Ok(t)
    }

    /// An entry of quantization_config; `None` where it is missing or null.
    fn integer(&self, key: &str) -> Result<Option<i64>> {
        match self.config.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| {
                Error::malformed(format!("quantization_config: {key} = {value} is no integer"))
            }),
        }
    }
}

impl Packed<'_> {
    /// `bits`, which has to be one of these.
    fn bits(&self, known: &[u32]) -> Result<u32> {
        let bits = self.integer("bits")?.ok_or_else(|| missing("bits"))?;
        let found = known.iter().find(|k| i64::from(**k) == bits);
        found.copied().ok_or_else(|| unsupported("bits", &bits.into()).hint(format!("{known:?} are")))
    }

    /// `group_size`; `None` where a row is one group.
    fn group_size(&self) -> Result<Option<u64>> {
        match self.integer("group_size")?.ok_or_else(|| missing("group_size"))? {
            -1 => Ok(None),
            n @ 1.. => Ok(Some(n as u64)),
            n => Err(Error::malformed(format!("quantization_config: group_size = {n}"))),
        }
    }
}

impl Packed<'_> {
    /// The parts of a module that tell how its activations are quantized, which says nothing of weights.
    fn of_activations(&self, stem: &str) -> impl Iterator<Item = String> {
        ["activation_scale", "input_scale", "input_global_scale", "input_zero_point", "k_scale", "v_scale"]
            .into_iter()
            .flat_map(move |s| [format!("{stem}.{s}"), format!("{stem}_{s}"), format!("{stem}.weight_{s}")])
            .filter(|part| self.store.get(part).is_some())
    }
}

fn missing(key: &str) -> Error {
    Error::malformed(format!("quantization_config: {key} is missing"))
}

fn unsupported(key: &str, value: &Json) -> Error {
    Error::unsupported(format!("quantization_config: {key} = {value} is not read"))
}

/// Types that scales are stored in.
const FLOATS: &[DType] = &[DType::F32, DType::F16, DType::BF16, DType::F64];

fn check(t: &TensorInfo, types: &[DType], shape: &[u64]) -> Result<()> {
    if !types.contains(&t.dtype) {
        let names: Vec<_> = types.iter().map(|t| t.name()).collect();
        return Err(Error::malformed(format!(
            "tensor {:?} is {}, {} was expected",
            t.name,
            t.dtype,
            names.join(" or ")
        )));
    }
    if t.shape != shape {
        return Err(Error::malformed(format!(
            "tensor {:?} has shape {:?}, {shape:?} was expected",
            t.name, t.shape
        ))
        .hint("quantization_config and the weights are not of the same model"));
    }
    Ok(())
}

/// `n` values of a tensor from element `start` on.
fn values(stored: &Stored, t: &TensorInfo, start: u64, n: usize) -> Result<Vec<f32>> {
    let codec = codec(t.dtype).filter(|c| c.dtype.block_size() == 1).ok_or_else(|| {
        Error::unsupported(format!("tensor {:?} of type {} cannot be read", t.name, t.dtype))
    })?;
    let bytes = bytes(stored, t, start, n)?;
    let mut values = vec![0.0; n];
    codec.decode(&bytes, &mut values)?;
    Ok(values)
}

/// The scales of so many rows, row by row, of a tensor that has those of a group side by side.
fn scales_of_rows(stored: &Stored, t: &TensorInfo, rows: Range<u64>, scales: &mut [f32]) -> Result<()> {
    let groups = t.shape.first().map_or(0, |n| *n as usize).max(1);
    for g in 0..groups {
        let values = values(stored, t, g as u64 * t.row() + rows.start, scales.len() / groups)?;
        scales.chunks_exact_mut(groups).zip(values).for_each(|(row, scale)| row[g] = scale);
    }
    Ok(())
}

/// `n` elements of a tensor, as they are stored, from element `start` on.
fn bytes(stored: &Stored, t: &TensorInfo, start: u64, n: usize) -> Result<Vec<u8>> {
    let size = t.dtype.type_size();
    let mut bytes = vec![0; n * size as usize];
    stored.read(t, start * size, &mut bytes)?;
    Ok(bytes)
}

/// `n` words of a tensor of type I32 from element `start` on.
fn words(stored: &Stored, t: &TensorInfo, start: u64, n: usize) -> Result<Vec<u32>> {
    Ok(bytes(stored, t, start, n)?.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
}

/// The group of each column, as a tensor tells it.
fn groups_of(stored: &Stored, t: &TensorInfo, shape: &Shape) -> Result<Vec<u32>> {
    let groups = words(stored, t, 0, shape.cols as usize)?;
    match groups.iter().position(|g| u64::from(*g) >= shape.groups) {
        None => Ok(groups),
        Some(col) => Err(Error::malformed(format!(
            "tensor {:?}: input {col} is of group {}, there are {}",
            t.name, groups[col] as i32, shape.groups
        ))),
    }
}

/// The matrix called `name` of integers in groups, made of `parts`.
fn matrix(name: String, parts: Vec<String>, codes: impl Grouped + 'static) -> Joined {
    let shape = vec![codes.shape().rows, codes.shape().cols];
    Joined { name, dtype: DType::F32, shape, parts, view: Box::new(Values(Arc::new(codes))) }
}

/// Rows and columns of a matrix.
#[derive(Debug, PartialEq)]
struct Tile {
    rows: std::ops::Range<u64>,
    cols: std::ops::Range<u64>,
}

/// The elements `start..end` of rows of `row` elements: the end of a row, whole rows, the
/// beginning of one, as far as there are such.
fn tiles(start: u64, end: u64, row: u64) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let mut at = start;
    while at < end {
        let (r, c) = (at / row, at % row);
        let left = end - at;
        let (rows, cols) = match c {
            0 if left >= row => (r..r + left / row, 0..row),
            _ => (r..r + 1, c..row.min(c + left)),
        };
        at += (rows.end - rows.start) * (cols.end - cols.start);
        tiles.push(Tile { rows, cols });
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_follow_on_each_other() {
        let tile = |rows, cols| Tile { rows, cols };
        assert_eq!(tiles(3, 17, 5), [tile(0..1, 3..5), tile(1..3, 0..5), tile(3..4, 0..2)]);
        assert_eq!(tiles(6, 8, 5), [tile(1..2, 1..3)]);
        assert_eq!(tiles(5, 10, 5), [tile(1..2, 0..5)]);
        assert_eq!(tiles(4, 4, 0), []);
    }
}
