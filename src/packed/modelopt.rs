//! NVIDIA ModelOpt: FP8 with one scale for a matrix, and NVFP4.
//!
//! `P.weight` is F8_E4M3 with `P.weight_scale` (a single value), or U8 `[.., out, in / 2]` with
//! `P.weight_scale` F8_E4M3 `[.., out, in / 16]` and `P.weight_scale_2` (a single value): [`super::fp4`].
//! Source: `modelopt/torch/export` and vLLM's `quantization/modelopt.py`.

use super::fp4::{Factor, Fp4};
use super::{FLOATS, Format, Packed, fp8};
use crate::container::Joined;
use crate::error::{Error, Result};
use crate::tensor::DType;

pub(super) const FORMAT: Format =
    Format { method: "modelopt", name: "ModelOpt", marks: |t| t.name.ends_with(".weight_scale_2"), join };

/// Columns that share a scale.
const GROUP: u64 = 16;

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let mut joined = fp8::join(packed, "_scale", |_| Ok(None))?;
    for (stem, codes) in packed.ending(".weight").filter(|(_, t)| t.dtype == DType::U8) {
        let fail = |why: String| Error::malformed(format!("tensor {:?} {why}", codes.name));
        let [outer @ .., bytes] = &codes.shape[..] else { return Err(fail("has no shape".into())) };
        let cols = bytes.checked_mul(2).filter(|n| n.is_multiple_of(GROUP));
        let cols =
            cols.ok_or_else(|| fail(format!("has rows of {bytes} bytes, no multiple of {}", GROUP / 2)))?;
        let grid = [outer, &[cols / GROUP]].concat();
        let scales = packed.part(&format!("{stem}.weight_scale"), &[DType::F8_E4M3], &grid)?.clone();
        let name = format!("{stem}.weight_scale_2");
        let shape =
            packed.store.get(&name).map(|t| t.shape.clone()).filter(|s| s[..] == [1]).unwrap_or_default();
        let factor = packed.part(&name, FLOATS, &shape)?.clone();
        let parts = [codes, &scales, &factor].map(|t| t.name.clone()).into_iter();
        joined.push(Joined {
            name: codes.name.clone(),
            dtype: DType::F32,
            shape: [outer, &[cols]].concat(),
            parts: parts.chain(packed.of_activations(stem)).collect(),
            view: Box::new(Fp4 { codes: codes.clone(), scales, factor: Factor::Times(factor), group: GROUP }),
        });
    }
    Ok(joined)
}
