//! BitNet as transformers stores it: -1, 0 and 1 in two bits, with one scale for a matrix.
//!
//! `P.weight` is U8 `[out / 4, in]`: bits `2k` and `2k + 1` of row `r` hold row `k * out / 4 + r`, plus 1.
//! `P.weight_scale` is a single value. With `linear_class` `bitlinear` (the default) the weights were multiplied
//! with it, `W = t / weight_scale`; with `autobitlinear` they are its multiples, `W = t * weight_scale`.
//! Source: transformers' `integrations/bitnet.py`.

use std::ops::Range;

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, bytes, check, matrix, unsupported, values};
use crate::container::grouped::{Grouped, Shape};
use crate::container::{Joined, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format { method: "bitnet", name: "BitNet", marks: |_| false, join };

const SCALE: &str = "weight_scale";

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let divided = match packed.config.get("linear_class") {
        None | Some(Json::Null) => true,
        Some(Json::String(class)) if class == "bitlinear" => true,
        Some(Json::String(class)) if class == "autobitlinear" => false,
        Some(other) => return Err(unsupported("linear_class", other)),
    };
    let mut joined = Vec::new();
    for (stem, weight) in packed.ending(".weight").filter(|(_, t)| t.dtype == DType::U8) {
        let [quarter, cols] = weight.shape[..] else {
            return Err(Error::malformed(format!("tensor {:?} has shape {:?}", weight.name, weight.shape)));
        };
        let rows = quarter.checked_mul(4);
        let rows =
            rows.ok_or_else(|| Error::malformed(format!("tensor {:?}: sizes overflow", weight.name)))?;
        let scale = format!("{stem}.{SCALE}");
        let shape =
            packed.store.get(&scale).map(|t| t.shape.clone()).filter(Vec::is_empty).unwrap_or(vec![1]);
        let scale = packed.part(&scale, FLOATS, &shape)?.clone();
        check(weight, &[DType::U8], &[quarter, cols])?;
        let codes = Matrix {
            shape: Shape { rows, cols, bits: 2, group_size: cols.max(1), groups: cols.min(1) },
            weight: weight.clone(),
            scale,
            divided,
        };
        let parts = vec![weight.name.clone(), codes.scale.name.clone()];
        joined.push(matrix(weight.name.clone(), parts, codes));
    }
    Ok(joined)
}

#[derive(Debug)]
struct Matrix {
    shape: Shape,
    weight: TensorInfo,
    scale: TensorInfo,
    /// Whether the scale is one over what -1 and 1 mean.
    divided: bool,
}

impl Grouped for Matrix {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let (cols, quarter) = (self.shape.cols, self.shape.rows / 4);
        let mut row = rows.start;
        let mut codes = codes;
        while row < rows.end {
            // Rows up to the next that lies in other bits.
            let (shift, first) = (2 * (row / quarter), row % quarter);
            let n = (quarter - first).min(rows.end - row);
            let (these, rest) = codes.split_at_mut((n * cols) as usize);
            let stored = bytes(stored, &self.weight, first * cols, these.len())?;
            these.iter_mut().zip(stored).for_each(|(code, byte)| *code = byte >> shift & 3);
            if these.contains(&3) {
                let why =
                    format!("tensor {:?}: two bits of it are 3, which is no ternary digit", self.weight.name);
                return Err(Error::malformed(why));
            }
            (codes, row) = (rest, row + n);
        }
        Ok(())
    }

    fn most(&self) -> u8 {
        2
    }

    fn lines(&self, stored: &Stored, _: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        let scale = values(stored, &self.scale, 0, 1)?[0];
        let scale = if self.divided { 1.0 / scale } else { scale };
        if !scale.is_finite() {
            return Err(Error::malformed(format!("tensor {:?}: {scale} is no scale", self.scale.name)));
        }
        scales.fill(scale);
        zeros.fill(1.0);
        Ok(())
    }
}
