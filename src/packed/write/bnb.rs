//! Layouts of bitsandbytes: see [`super::super::bnb`].

use std::sync::Arc;

use serde_json::json;

use super::{Data, Layout, Part, Put, greatest, lost, nested, unfit};
use crate::block::WHOLE;
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
const N: usize = BLOCK as usize;

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

/// A table of 16 numbers, and how weights find their codes.
pub(super) struct Table {
    /// What codes stand for.
    pub map: [f32; 16],
    /// The code of the least number.
    least: u32,
    /// For each greater one, from where on it is nearer than the one before, and by how much its code is greater.
    steps: Vec<(f32, u32)>,
}

impl Table {
    /// FP4, or NF4.
    pub fn new(fp4: bool) -> Self {
        let map = match fp4 {
            false => NF4,
            // Both zeros are 0, none is -0.
            true => std::array::from_fn(|i| if i < 8 { FP4[i] } else { 0.0 - FP4[i - 8] }),
        };
        let mut order: Vec<u32> = (0..16).filter(|i| !(fp4 && *i == 8)).collect();
        order.sort_by(|a, b| map[*a as usize].total_cmp(&map[*b as usize]));
        let step = |pair: &[u32]| {
            let [low, high] = [pair[0], pair[1]];
            ((map[low as usize] + map[high as usize]) / 2.0, high.wrapping_sub(low))
        };
        Self { map, least: order[0], steps: order.windows(2).map(step).collect() }
    }

    /// The codes of weights, the greatest magnitude of which is `most`. Returns the sum of the squares of what
    /// they lose when they are multiplied with `scale`.
    pub fn encode(&self, weights: &[f32], most: f32, scale: f32, codes: &mut [u8]) -> f64 {
        let inverse = if most > 0.0 { 1.0 / most } else { 0.0 };
        let mut loss = 0.0;
        let (blocks, rest) = weights.as_chunks::<N>();
        let (of_blocks, of_rest) = codes.as_chunks_mut::<N>();
        for (weights, codes) in blocks.iter().zip(of_blocks) {
            loss += self.encode_block(weights, inverse, scale, codes);
        }
        let (mut last, mut of_last) = ([0f32; N], [0; N]);
        last[..rest.len()].copy_from_slice(rest);
        if !rest.is_empty() {
            loss += self.encode_block(&last, inverse, scale, &mut of_last);
        }
        of_rest.copy_from_slice(&of_last[..rest.len()]);
        loss
    }

    /// Loops over arrays: only these are done side by side.
    fn encode_block(&self, weights: &[f32; N], inverse: f32, scale: f32, out: &mut [u8; N]) -> f64 {
        let (mut parts, mut codes) = ([0f32; N], [self.least; N]);
        for k in 0..N {
            parts[k] = weights[k] * inverse;
        }
        for &(end, step) in &self.steps {
            for k in 0..N {
                codes[k] = codes[k].wrapping_add(if parts[k] > end { step } else { 0 });
            }
        }
        let mut stored = [0f32; N];
        for k in 0..N {
            stored[k] = self.map[(codes[k] & 15) as usize] * scale;
            out[k] = codes[k] as u8;
        }
        lost(weights, &stored)
    }
}

impl Bnb4 {
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
        weights.chunks(N).map(greatest).collect()
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
        let table = Table::new(self.fp4);
        let mut bytes = Vec::with_capacity(weights.len() / 2);
        let scales = Self::scales(weights);
        let nested = match self.nested {
            None => None,
            Some(mean) => {
                let mean = mean.ok_or_else(|| Error::misuse("the mean of the scales is not known yet"))?;
                Some(nested::quantize(&scales, mean as f32))
            }
        };
        let given = nested.as_ref().map_or(&scales, |n| &n.values);
        let mut loss = 0.0;
        let mut codes = [0; N];
        for (block, (most, given)) in weights.chunks_exact(N).zip(scales.iter().zip(given)) {
            loss += table.encode(block, *most, *given, &mut codes);
            bytes.extend(codes.as_chunks::<2>().0.iter().map(|[a, b]| a << 4 | b));
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
            put(2, 0, &table.map.map(f32::to_le_bytes).concat())?;
            put(3, 0, self.state(rows, cols).as_bytes())?;
        }
        Ok(loss)
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// LLM.int8: bytes with a scale for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct Bnb8;

/// What codes times their scale are multiplied with.
const INVERSE: f32 = 1.0 / 127.0;
/// Below, 127 divided by a magnitude is beyond F32.
const LEAST: f32 = 1e-36;

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
        let mut codes = vec![0; weights.len()];
        let mut scales = Vec::new();
        let mut stored = vec![0f32; cols as usize];
        let mut loss = 0.0;
        for (row, codes) in weights.chunks(cols as usize).zip(codes.chunks_mut(cols as usize)) {
            let most = greatest(row);
            scales.extend(most.to_le_bytes());
            // Rounded twice, as bitsandbytes does.
            let scale = if most > LEAST { 1.0 / most * 127.0 } else { 0.0 };
            for ((w, code), stored) in row.iter().zip(codes).zip(&mut stored) {
                let near = w * scale + WHOLE;
                *code = near.to_bits() as u8;
                *stored = (near - WHOLE) * most * INVERSE;
            }
            loss += lost(row, &stored);
        }
        put(0, first * cols, &codes)?;
        put(1, first * 4, &scales)?;
        put(2, 0, &[0])?;
        Ok(loss)
    }
}
