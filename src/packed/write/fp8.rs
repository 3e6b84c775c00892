//! FP8 in blocks: see [`super::super::fp8`].

use super::{Data, Layout, Part, Put, greatest, lost};
use crate::block::{e4m3_from_f32, f32_from_e4m3};
use crate::error::Result;
use crate::tensor::DType;

/// FP8 with a scale for each block of rows and columns, as DeepSeek V3 is published.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8 {
    /// Rows and columns of a block.
    pub block: [u64; 2],
}

/// The greatest number of E4M3.
const MOST: f32 = 448.0;

/// The scale that brings the greatest magnitude to the greatest number of E4M3.
pub(super) fn scale(most: f32) -> f32 {
    (most / MOST).max(1e-12)
}

/// Weights over `scale`, each as the next number of E4M3. Returns the sum of the squares of what they lose.
pub(super) fn encode(weights: &[f32], scale: f32, codes: &mut [u8]) -> f64 {
    let mut loss = 0.0;
    for (weights, codes) in weights.chunks(128).zip(codes.chunks_mut(128)) {
        codes.iter_mut().zip(weights).for_each(|(code, w)| *code = e4m3_from_f32(w / scale));
        let mut stored = [0f32; 128];
        stored.iter_mut().zip(&*codes).for_each(|(y, code)| *y = f32_from_e4m3(*code) * scale);
        loss += lost(weights, &stored[..weights.len()]);
    }
    loss
}

impl Layout for Fp8 {
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let [high, wide] = self.block;
        Ok(vec![
            Part::new(".weight", DType::F8_E4M3, &[rows, cols]),
            Part::new(".weight_scale_inv", DType::F32, &[rows.div_ceil(high), cols.div_ceil(wide)]),
        ])
    }

    fn unit(&self, _cols: u64) -> u64 {
        self.block[0]
    }

    fn write(&self, [_, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let weights = data.weights()?;
        let [high, wide] = self.block;
        let (row, wide_n) = (cols as usize, wide as usize);
        let blocks = row.div_ceil(wide_n);
        let mut loss = 0.0;
        for (k, weights) in weights.chunks(row * high as usize).enumerate() {
            let mut codes = vec![0; weights.len()];
            let mut scales = Vec::with_capacity(blocks * 4);
            for b in 0..blocks {
                let columns = b * wide_n..row.min((b + 1) * wide_n);
                let most = weights.chunks(row).map(|w| greatest(&w[columns.clone()])).fold(0.0, f32::max);
                let scale = scale(most);
                for (weights, codes) in weights.chunks(row).zip(codes.chunks_mut(row)) {
                    loss += encode(&weights[columns.clone()], scale, &mut codes[columns.clone()]);
                }
                scales.extend(scale.to_le_bytes());
            }
            let first = first + k as u64 * high;
            put(0, first * cols, &codes)?;
            put(1, first / high * blocks as u64 * 4, &scales)?;
        }
        Ok(loss)
    }
}
