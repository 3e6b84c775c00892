//! Layouts of bitsandbytes: see [`super::super::bnb`].

use std::sync::Arc;

use serde_json::json;

use super::{Data, Layout, Part, Put, lost, nested, unfit};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// NF4 or FP4, in blocks of 64 elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Bnb4 {
    /// FP4 instead of NF4.
    pub fp4: bool,
    /// What the model is computed in, `float16`.
    pub compute: String,
    /// Whether scales are quantized as well, and what their mean is, once it is known.
    pub nested: Option<Option<f64>>,
}

/// Elements that share a scale.
const BLOCK: u64 = 64;

/// The quantiles of a normal distribution: NF4 (Dettmers et al., arXiv 2305.14314, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// bitsandbytes' FP4: codes in an order of their own, the greatest of which is 1.
const FP4: [f32; 8] = [0.0, 0.0625 / 12.0, 8.0 / 12.0, 1.0, 4.0 / 12.0, 6.0 / 12.0, 2.0 / 12.0, 3.0 / 12.0];

impl Bnb4 {
    fn map(&self) -> [f32; 16] {
        match self.fp4 {
            false => NF4,
            true => std::array::from_fn(|i| if i < 8 { FP4[i] } else { -FP4[i - 8] }),
        }
    }

    fn kind(&self) -> &'static str {
        if self.fp4 { "fp4" } else { "nf4" }
    }

    fn state(&self, rows: u64, cols: u64) -> String {
        let kind = self.kind();
        let mut state =
            json!({"quant_type": kind, "blocksize": BLOCK, "dtype": self.compute, "shape": [rows, cols]});
        let Some(mean) = self.nested else { return state.to_string() };
        state["nested_blocksize"] = nested::BLOCK.into();
        state["nested_dtype"] = "float32".into();
        // Its place is as long as any number is.
        let mean = format!("{:?}", mean.unwrap_or_default() as f32);
        let text = state.to_string();
        format!("{},\"nested_offset\":{mean:>24}}}", &text[..text.len() - 1])
    }

    /// The greatest magnitude of each block.
    fn scales(weights: &[f32]) -> Vec<f32> {
        let most = |block: &[f32]| block.iter().fold(0f32, |most, w| most.max(w.abs()));
        weights.chunks(BLOCK as usize).map(most).collect()
    }
}

impl Layout for Bnb4 {
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        let n = crate::tensor::elements(&[rows, cols])?;
        if !cols.is_multiple_of(BLOCK) || n == 0 {
            return Err(unfit("bitsandbytes with 4 bits", rows, cols, "columns have to be multiples of 64"));
        }
        let state = format!(".weight.quant_state.bitsandbytes__{}", self.kind());
        let mut parts = vec![
            Part::new(".weight", DType::U8, &[n / 2, 1]),
            Part::new(
                ".weight.absmax",
                if self.nested.is_some() { DType::U8 } else { DType::F32 },
                &[n / BLOCK],
            ),
            Part::new(".weight.quant_map", DType::F32, &[16]),
            Part::new(&state, DType::U8, &[self.state(rows, cols).len() as u64]),
        ];
        if self.nested.is_some() {
            let blocks = (n / BLOCK).div_ceil(nested::BLOCK as u64);
            parts.push(Part::new(".weight.nested_absmax", DType::F32, &[blocks]));
            parts.push(Part::new(".weight.nested_quant_map", DType::F32, &[256]));
        }
        Ok(parts)
    }

    fn survey(&self, weights: &[f32]) -> Option<(f64, u64)> {
        let scales = self.nested.map(|_| Self::scales(weights))?;
        Some((scales.iter().map(|s| f64::from(*s)).sum(), scales.len() as u64))
    }

    fn informed(&self, mean: f64) -> Option<Arc<dyn Layout>> {
        self.nested.map(|_| Arc::new(Self { nested: Some(Some(mean)), ..self.clone() }) as Arc<dyn Layout>)
    }

    fn unit(&self, cols: u64) -> u64 {
        match self.nested {
            None => 1,
            // Rows whose scales fill whole blocks.
            Some(_) => {
                let block = BLOCK * nested::BLOCK as u64;
                (1..=block / BLOCK).find(|rows| (rows * cols).is_multiple_of(block)).unwrap_or(1)
            }
        }
    }

    fn write(&self, [rows, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let weights = data.weights()?;
        let map = self.map();
        let mut order: Vec<u8> = (0..16).filter(|i| !(self.fp4 && *i == 8)).collect();
        order.sort_by(|a, b| map[usize::from(*a)].total_cmp(&map[usize::from(*b)]));
        // Between neighbours, half way.
        let value = |k: usize| map[usize::from(order[k])];
        let ends: Vec<f32> = (1..order.len()).map(|k| (value(k - 1) + value(k)) / 2.0).collect();
        let nearest = |x: f32| order[ends.partition_point(|end| *end < x)];
        let mut bytes = Vec::with_capacity(weights.len() / 2);
        let mut stored = Vec::with_capacity(weights.len());
        let scales = Self::scales(weights);
        let nested = match self.nested {
            None => None,
            Some(mean) => {
                let mean = mean.ok_or_else(|| Error::misuse("the mean of the scales is not known yet"))?;
                Some(nested::quantize(&scales, mean as f32))
            }
        };
        let given = nested.as_ref().map_or(&scales, |n| &n.values);
        for (block, (most, given)) in weights.chunks(BLOCK as usize).zip(scales.iter().zip(given)) {
            let inverse = if *most > 0.0 { 1.0 / most } else { 0.0 };
            for pair in block.as_chunks::<2>().0 {
                let [a, b] = pair.map(|w| nearest(w * inverse));
                bytes.push(a << 4 | b);
                stored.extend([a, b].map(|code| map[usize::from(code)] * given));
            }
        }
        put(0, first * cols / 2, &bytes)?;
        let at = first * cols / BLOCK;
        match &nested {
            None => put(1, at * 4, &bytes_of(&scales))?,
            Some(nested) => {
                put(1, at, &nested.codes)?;
                put(4, at.div_ceil(nested::BLOCK as u64) * 4, &bytes_of(&nested.most))?;
            }
        }
        if first == 0 {
            if nested.is_some() {
                put(5, 0, &bytes_of(nested::map()))?;
            }
            put(2, 0, &map.map(f32::to_le_bytes).concat())?;
            put(3, 0, self.state(rows, cols).as_bytes())?;
        }
        Ok(lost(weights, &stored))
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// LLM.int8: bytes with a scale for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct Bnb8;

impl Layout for Bnb8 {
    fn parts(&self, rows: u64, cols: u64) -> Result<Vec<Part>> {
        Ok(vec![
            Part::new(".weight", DType::I8, &[rows, cols]),
            Part::new(".SCB", DType::F32, &[rows]),
            Part::new(".weight_format", DType::U8, &[]),
        ])
    }

    fn write(&self, [_, cols]: [u64; 2], first: u64, data: Data<'_>, put: &mut Put<'_>) -> Result<f64> {
        let weights = data.weights()?;
        let mut codes = Vec::with_capacity(weights.len());
        let (mut scales, mut stored) = (Vec::new(), Vec::with_capacity(weights.len()));
        for row in weights.chunks(cols as usize) {
            let most = row.iter().fold(0f32, |most, w| most.max(w.abs()));
            scales.extend(most.to_le_bytes());
            // Rounded twice, as bitsandbytes does.
            let scale = if most > 0.0 { 1.0 / most * 127.0 } else { 0.0 };
            let code = |w: &f32| (w * scale).round_ties_even() as i8;
            codes.extend(row.iter().map(|w| code(w) as u8));
            stored.extend(row.iter().map(|w| f32::from(code(w)) * most / 127.0));
        }
        put(0, first * cols, &codes)?;
        put(1, first * 4, &scales)?;
        put(2, 0, &[0])?;
        Ok(lost(weights, &stored))
    }
}
