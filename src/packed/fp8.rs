//! FP8 with a scale for each block of a matrix, or one for all of it: DeepSeek V3, Qwen3-FP8,
//! Ministral.
//!
//! `X` is F8_E4M3 `[.., out, in]`, `X_scale_inv` `[.., ceil(out/bh), ceil(in/bw)]` or a single value;
//! `weight_block_size` is `[bh, bw]`. Despite its name the scale is multiplied:
//! `W = X * X_scale_inv`, in f32. What says how activations are quantized is passed over.
//! Source: DeepSeek V3's `inference/kernel.py` (`weight_dequant`), transformers'
//! `integrations/finegrained_fp8.py`.

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, View, check, tiles, values};
use crate::container::{Joined, Packing, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "fp8",
    name: "FP8",
    marks: |t| t.name.ends_with("_scale_inv"),
    join: |packed| {
        let block = block_size(packed.config)?;
        join(packed, "_scale_inv", |_| Ok(block))
    },
};

/// FP8 of FBGEMM, with a scale for each row.
pub(super) const FBGEMM: Format = Format {
    method: "fbgemm_fp8",
    name: "FP8",
    marks: |_| false,
    join: |packed| join(packed, "_scale", |_| Ok(None)),
};

const WEIGHTS: &[DType] = &[DType::F8_E4M3, DType::F8_E5M2];

/// All matrices of FP8. The scales of `X` are called `X` and `suffix`; `block_of` tells the rows and columns
/// of a block of the module called so. Where it does not, there is one scale, or one for each row.
pub(super) fn join(
    packed: &Packed<'_>,
    suffix: &str,
    block_of: impl Fn(&str) -> Result<Option<[u64; 2]>>,
) -> Result<Vec<Joined>> {
    let mut joined = Vec::new();
    let weights = |t: &&TensorInfo| WEIGHTS.contains(&t.dtype) && !t.name.ends_with(suffix);
    for weight in packed.store.tensors().iter().filter(weights) {
        let name = &weight.name;
        let scale = format!("{name}{suffix}");
        let Some(scale) = packed.store.get(&scale) else {
            return Err(Error::malformed(format!(
                "tensor {name:?} is {}, but {scale:?} is missing",
                weight.dtype
            ))
            .hint("a shard may be missing"));
        };
        let [outer @ .., rows, cols] = &weight.shape[..] else {
            return Err(Error::malformed(format!("tensor {name:?} is {} and no matrix", weight.dtype)));
        };
        let (rows, cols) = (*rows, *cols);
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let (block, grid) = match (block_of(stem)?, scale.elements()) {
            (None, 1) => ([rows.max(1), cols.max(1)], None),
            (None, n) if n == rows && outer.is_empty() => ([1, cols.max(1)], None),
            (None, _) => {
                return Err(Error::malformed(format!(
                    "tensor {:?} has shape {:?}, but quantization_config no weight_block_size",
                    scale.name, scale.shape
                )));
            }
            (Some([bh, bw]), _) => ([bh, bw], Some([rows.div_ceil(bh), cols.div_ceil(bw)])),
        };
        let types = [FLOATS, &[DType::F8_E8M0]].concat();
        let shape = grid.map_or_else(|| scale.shape.clone(), |grid| [outer, &grid[..]].concat());
        check(scale, &types, &shape).map_err(|e| e.context(format!("blocks of {block:?}")))?;
        let parts = [name.clone(), scale.name.clone()];
        joined.push(Joined {
            name: name.clone(),
            dtype: DType::F32,
            shape: weight.shape.clone(),
            parts: parts.into_iter().chain(packed.of_activations(stem)).collect(),
            view: Box::new(Blocked {
                rows,
                cols,
                block,
                is_grid: grid.is_some(),
                weight: weight.clone(),
                scale: scale.clone(),
            }),
        });
    }
    Ok(joined)
}

/// `weight_block_size`: rows and columns of a block.
fn block_size(config: &Json) -> Result<Option<[u64; 2]>> {
    match config.get("weight_block_size") {
        None | Some(Json::Null) => Ok(None),
        Some(sizes) => {
            let size = |i: usize| sizes.get(i).and_then(Json::as_u64).filter(|n| *n > 0);
            match (size(0), size(1), sizes.get(2)) {
                (Some(bh), Some(bw), None) => Ok(Some([bh, bw])),
                _ => Err(Error::malformed(format!(
                    "quantization_config: weight_block_size = {sizes} are not two sizes"
                ))),
            }
        }
    }
}

#[derive(Debug)]
struct Blocked {
    weight: TensorInfo,
    scale: TensorInfo,
    /// Of one matrix.
    rows: u64,
    cols: u64,
    block: [u64; 2],
    /// Whether config.json tells the block, which may be as wide as a row.
    is_grid: bool,
}

impl View for Blocked {
    fn packing(&self) -> Packing {
        let [rows, cols] = self.block;
        Packing { bits: 8, block: [rows, if self.is_grid { cols } else { 0 }] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let [bh, bw] = self.block;
        let (scale_rows, scale_cols) = (self.rows.div_ceil(bh), self.cols.div_ceil(bw));
        let mut out = out.as_chunks_mut().0;
        let mut scales = (u64::MAX, Vec::new());
        for tile in tiles(start, start + out.len() as u64, self.cols) {
            for row in tile.rows {
                let n = (tile.cols.end - tile.cols.start) as usize;
                let codes = values(stored, &self.weight, row * self.cols + tile.cols.start, n)?;
                let scale_row = match self.scale.elements() {
                    1 => 0,
                    _ => row / self.rows * scale_rows + row % self.rows / bh,
                };
                if scales.0 != scale_row {
                    let all = values(stored, &self.scale, scale_row * scale_cols, scale_cols as usize)?;
                    scales = (scale_row, all);
                }
                let (these, rest) = out.split_at_mut(n);
                out = rest;
                for ((y, x), col) in these.iter_mut().zip(codes).zip(tile.cols.clone()) {
                    let scale = scales.1[(col / bw) as usize];
                    *y = f32::to_le_bytes(x * scale);
                }
            }
        }
        Ok(())
    }
}
