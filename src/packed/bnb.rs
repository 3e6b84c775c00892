//! bitsandbytes: NF4 and FP4, with scales that may be quantized themselves, and LLM.int8.
//!
//! 4 bits: `P.weight` is U8 `[n / 2, 1]` for the `n` elements of a matrix in order, element `2k` in the high
//! half of byte `k`; `P.weight.absmax` a scale for each `blocksize` elements; `P.weight.quant_map` F32 `[16]`
//! the values of the codes; `P.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) JSON with `shape` and
//! `blocksize`. `W = quant_map[code] * absmax`. Nested: `absmax` is U8 and stands for
//! `nested_quant_map[code] * nested_absmax[block / nested_blocksize] + nested_offset`. The bytes of `P.weight`
//! may be called another type (`bnb_4bit_quant_storage`).
//!
//! 8 bits: `P.weight` I8 `[out, in]`, `P.SCB` F32 `[out]`, `W = q * SCB * (1 / 127)`.
//!
//! Sources: `QuantState` and `int8_vectorwise_dequant` in bitsandbytes' `functional.py`, checked by values.

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, bytes, check, tiles, unsupported, values};
use crate::container::{Joined, Packing, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "bitsandbytes",
    name: "bitsandbytes",
    marks: |t| t.name.contains(STATE) || t.name.ends_with(".SCB"),
    join,
};

const STATE: &str = ".quant_state.bitsandbytes__";
/// Most bytes of a `quant_state`.
const STATE_BYTES: u64 = 64 << 10;

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let mut joined = Vec::new();
    for t in packed.store.tensors() {
        if let Some((name, kind)) = t.name.split_once(STATE) {
            joined.push(four_bits(packed, name, kind, t)?);
        } else if let Some(stem) = t.name.strip_suffix(".SCB") {
            joined.push(eight_bits(packed, stem, t)?);
        }
    }
    Ok(joined)
}

fn four_bits(packed: &Packed<'_>, name: &str, kind: &str, state: &TensorInfo) -> Result<Joined> {
    let at_state = |why: String| Error::malformed(format!("tensor {:?}: {why}", state.name));
    if !["nf4", "fp4"].contains(&kind) {
        return Err(unsupported("bnb_4bit_quant_type", &kind.into()));
    }
    if state.dtype != DType::U8 || state.nbytes > STATE_BYTES {
        return Err(at_state(format!("is {} of {} bytes, JSON was expected", state.dtype, state.nbytes)));
    }
    let fields: Json = serde_json::from_slice(&packed.store.read_all(state)?)
        .map_err(|e| at_state(format!("is no JSON: {e}")))?;
    let size = |key: &str| {
        let n = fields.get(key).and_then(Json::as_u64).filter(|n| *n > 0);
        n.ok_or_else(|| at_state(format!("{key} is no size")))
    };
    let shape: Option<Vec<u64>> =
        fields.get("shape").and_then(Json::as_array).and_then(|dims| dims.iter().map(Json::as_u64).collect());
    let shape = shape.ok_or_else(|| at_state("shape is missing".into()))?;
    let n = crate::tensor::elements(&shape).map_err(|e| at_state(e.to_string()))?;
    let block = size("blocksize")?;
    let weight = packed.store.get(name).ok_or_else(|| {
        Error::malformed(format!("tensor {name:?} is missing")).hint("its quant_state is there")
    })?;
    if weight.dtype.is_block() || weight.nbytes != n.div_ceil(2) {
        return Err(Error::malformed(format!(
            "tensor {name:?} has {} bytes, {shape:?} of 4 bits have {}",
            weight.nbytes,
            n.div_ceil(2)
        )));
    }
    let part = |suffix: &str, types: &[DType], shape: &[u64]| {
        packed.part(&format!("{name}.{suffix}"), types, shape).cloned()
    };
    let blocks = n.div_ceil(block);
    let nested = fields.get("nested_blocksize").is_some_and(|v| !v.is_null());
    let absmax = part("absmax", if nested { &[DType::U8] } else { FLOATS }, &[blocks])?;
    let map = part("quant_map", FLOATS, &[16])?;
    let mut parts: Vec<_> = [weight, state, &absmax, &map].map(|t| t.name.clone()).to_vec();
    let nested = if nested {
        let block = size("nested_blocksize")?;
        let offset = fields.get("nested_offset").and_then(Json::as_f64);
        let offset = offset.ok_or_else(|| at_state("nested_offset is missing".into()))? as f32;
        let absmax = part("nested_absmax", FLOATS, &[blocks.div_ceil(block)])?;
        let map = part("nested_quant_map", FLOATS, &[256])?;
        parts.extend([&absmax, &map].map(|t| t.name.clone()));
        Some(Nested { absmax, map, block, offset })
    } else {
        None
    };
    if weight.dtype != DType::U8 && packed.store.is_scattered(weight) {
        return Err(Error::unsupported(format!("tensor {name:?}: its elements lie apart in the file")));
    }
    // Of another storage type elements are several bytes: what counts is bytes.
    let weight = TensorInfo { dtype: DType::U8, shape: vec![weight.nbytes], ..weight.clone() };
    Ok(Joined {
        name: name.to_string(),
        dtype: DType::F32,
        shape,
        parts,
        view: Box::new(FourBits { weight, absmax, map, block, nested }),
    })
}

fn eight_bits(packed: &Packed<'_>, stem: &str, scales: &TensorInfo) -> Result<Joined> {
    let name = format!("{stem}.weight");
    let rows = scales.elements();
    let cols = packed.store.get(&name).map_or(0, TensorInfo::row);
    let weight = packed.part(&name, &[DType::I8], &[rows, cols])?;
    check(scales, FLOATS, &[rows])?;
    let format = format!("{stem}.weight_format");
    let format = packed.store.get(&format);
    if let Some(format) = format {
        let bytes = if format.nbytes <= 8 { packed.store.read_all(format)? } else { vec![1] };
        if bytes.iter().any(|b| *b != 0) {
            return Err(Error::unsupported(format!("tensor {:?}: other layouts than 0 (row)", format.name)));
        }
    }
    let parts = [Some(weight), Some(scales), format].into_iter().flatten().map(|t| t.name.clone());
    Ok(Joined {
        name: name.clone(),
        dtype: DType::F32,
        shape: weight.shape.clone(),
        parts: parts.collect(),
        view: Box::new(EightBits { weight: weight.clone(), scales: scales.clone() }),
    })
}

/// Scales in 8 bits.
#[derive(Debug)]
struct Nested {
    absmax: TensorInfo,
    map: TensorInfo,
    block: u64,
    offset: f32,
}

#[derive(Debug)]
struct FourBits {
    weight: TensorInfo,
    absmax: TensorInfo,
    map: TensorInfo,
    /// Elements that share a scale.
    block: u64,
    nested: Option<Nested>,
}

impl FourBits {
    /// The scales of so many blocks.
    fn scales(&self, stored: &Stored, first: u64, n: usize) -> Result<Vec<f32>> {
        let Some(nested) = &self.nested else { return values(stored, &self.absmax, first, n) };
        let codes = bytes(stored, &self.absmax, first, n)?;
        let map = values(stored, &nested.map, 0, 256)?;
        let first_outer = first / nested.block;
        let outer = (first + n as u64).div_ceil(nested.block) - first_outer;
        let outer = values(stored, &nested.absmax, first_outer, outer as usize)?;
        let scale = |(code, at): (u8, u64)| {
            map[usize::from(code)] * outer[(at / nested.block - first_outer) as usize] + nested.offset
        };
        Ok(codes.into_iter().zip(first..).map(scale).collect())
    }
}

impl View for FourBits {
    fn packing(&self) -> Packing {
        Packing { bits: 4, block: [1, self.block] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let out = out.as_chunks_mut::<4>().0;
        if out.is_empty() {
            return Ok(());
        }
        let end = start + out.len() as u64;
        let first = start / 2;
        let codes = bytes(stored, &self.weight, first, (end.div_ceil(2) - first) as usize)?;
        let map = values(stored, &self.map, 0, 16)?;
        let first_block = start / self.block;
        let scales = self.scales(stored, first_block, (end.div_ceil(self.block) - first_block) as usize)?;
        for (y, i) in out.iter_mut().zip(start..) {
            let code = codes[(i / 2 - first) as usize] >> (4 * (1 - i % 2)) & 15;
            let scale = scales[(i / self.block - first_block) as usize];
            *y = (map[usize::from(code)] * scale).to_le_bytes();
        }
        Ok(())
    }
}

#[derive(Debug)]
struct EightBits {
    weight: TensorInfo,
    scales: TensorInfo,
}

impl View for EightBits {
    fn packing(&self) -> Packing {
        Packing { bits: 8, block: [1, 0] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let out = out.as_chunks_mut::<4>().0;
        let end = start + out.len() as u64;
        let codes = bytes(stored, &self.weight, start, out.len())?;
        let mut pairs = out.iter_mut().zip(codes);
        for tile in tiles(start, end, self.weight.row()) {
            for row in tile.rows {
                let scale = values(stored, &self.scales, row, 1)?[0];
                for (y, q) in pairs.by_ref().take((tile.cols.end - tile.cols.start) as usize) {
                    *y = (f32::from(q as i8) * scale * (1.0 / 127.0)).to_le_bytes();
                }
            }
        }
        Ok(())
    }
}
