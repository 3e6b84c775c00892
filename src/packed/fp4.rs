//! FP4 with a scale for each group of 16 or 32 inputs: NVFP4 and MXFP4 of linear layers, as ModelOpt and
//! compressed-tensors store them.
//!
//! Codes are U8 `[.., out, in / 2]`, element `2j` in the low half of byte `j`; scales `[.., out, in / group]`
//! are F8_E4M3, or F8_E8M0 (also as U8). `W = E2M1[code] * (scale * factor)`, in f32, where `factor` is
//! ModelOpt's `weight_scale_2`, or one over compressed-tensors' `weight_global_scale`. Sources:
//! ModelOpt's `NVFP4QTensor`, compressed-tensors' `nvfp4_quantized.py`.

use super::{bytes, values};
use crate::container::{Packing, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

/// The values of the codes of FP4 (E2M1).
pub(super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// What all scales are multiplied with, or divided by.
#[derive(Debug)]
pub(super) enum Factor {
    None,
    Times(TensorInfo),
    Over(TensorInfo),
}

/// Matrices of FP4.
#[derive(Debug)]
pub(super) struct Fp4 {
    pub codes: TensorInfo,
    pub scales: TensorInfo,
    pub factor: Factor,
    /// Columns that share a scale: an even number.
    pub group: u64,
}

impl View for Fp4 {
    fn packing(&self) -> Packing {
        Packing { bits: 4, block: [1, self.group] }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let out = out.as_chunks_mut::<4>().0;
        let end = start + out.len() as u64;
        if out.is_empty() {
            return Ok(());
        }
        let (first, first_group) = (start / 2, start / self.group);
        let codes = bytes(stored, &self.codes, first, (end.div_ceil(2) - first) as usize)?;
        let n = (end.div_ceil(self.group) - first_group) as usize;
        let mut scales = if self.scales.dtype == DType::U8 {
            let exponents = bytes(stored, &self.scales, first_group, n)?;
            exponents.into_iter().map(|e| (f64::from(e) - 127.0).exp2() as f32).collect()
        } else {
            values(stored, &self.scales, first_group, n)?
        };
        match &self.factor {
            Factor::None => {}
            Factor::Times(t) => {
                let factor = values(stored, t, 0, 1)?[0];
                scales.iter_mut().for_each(|s| *s *= factor);
            }
            Factor::Over(t) => {
                let factor = values(stored, t, 0, 1)?[0];
                scales.iter_mut().for_each(|s| *s /= factor);
            }
        }
        if let Some(k) = scales.iter().position(|s| !s.is_finite()) {
            let at = first_group + k as u64;
            return Err(Error::malformed(format!("tensor {:?}: scale {at} is not finite", self.scales.name)));
        }
        for (y, i) in out.iter_mut().zip(start..) {
            let code = codes[(i / 2 - first) as usize] >> (4 * (i % 2)) & 15;
            let scale = scales[(i / self.group - first_group) as usize];
            *y = (E2M1[usize::from(code)] * scale).to_le_bytes();
        }
        Ok(())
    }
}
