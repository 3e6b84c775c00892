//! GPTQ: integers of 2, 3, 4 or 8 bits with a scale and a zero for each group of inputs.
//!
//! Of a linear layer `P` with `in` inputs and `out` outputs there are `P.qweight` I32
//! `[in * bits / 32, out]`, a stream of codes along the input for each output, lowest bits first;
//! `P.qzeros` I32 `[groups, out * bits / 32]`, the same along the output; `P.scales`
//! `[groups, out]`; `P.g_idx` I32 `[in]`, the group of each input.
//! `W[o, i] = (q[i, o] - z[g, o]) * scale[g, o]` with `g = g_idx[i]`, in f32. The first version of
//! the format stores `z - 1`. Sources: AutoGPTQ's and GPTQModel's `qlinear`, checked by values.

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, Tile, View, tiles, values, words};
use crate::container::{Joined, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "gptq",
    name: "GPTQ",
    marks: |t| [".qweight", ".qzeros"].iter().any(|ending| t.name.ends_with(ending)),
    join,
};

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let config = Config::read(packed)?;
    let mut joined = Vec::new();
    for (stem, qweight) in packed.ending(".qweight") {
        let matrix = config.matrix(packed, stem, qweight)?;
        let parts = [&matrix.qweight, &matrix.qzeros, &matrix.scales].into_iter().chain(&matrix.g_idx);
        joined.push(Joined {
            name: format!("{stem}.weight"),
            dtype: DType::F32,
            shape: vec![matrix.outputs, matrix.inputs],
            parts: parts.map(|t| t.name.clone()).collect(),
            view: Box::new(matrix),
        });
    }
    Ok(joined)
}

/// What quantization_config says of all matrices.
struct Config {
    bits: u64,
    /// `None`: one group.
    group_size: Option<u64>,
    act_order: bool,
    /// What is added to a stored zero.
    zero_offset: u32,
}

impl Config {
    fn read(packed: &Packed<'_>) -> Result<Self> {
        let missing = |key: &str| Error::malformed(format!("quantization_config: {key} is missing"));
        let unsupported = |key: &str, value: &Json| {
            Error::unsupported(format!("quantization_config: {key} = {value} is not read"))
        };
        let bits = match packed.integer("bits")?.ok_or_else(|| missing("bits"))? {
            bits @ (2 | 3 | 4 | 8) => bits as u64,
            bits => return Err(unsupported("bits", &bits.into()).hint("2, 3, 4 and 8 are")),
        };
        let group_size = match packed.integer("group_size")?.ok_or_else(|| missing("group_size"))? {
            -1 => None,
            n @ 1.. => Some(n as u64),
            n => return Err(Error::malformed(format!("quantization_config: group_size = {n}"))),
        };
        let zero_offset = match packed.config.get("checkpoint_format") {
            None | Some(Json::Null) => 1,
            Some(Json::String(format)) if format == "gptq" => 1,
            Some(Json::String(format)) if format == "gptq_v2" => 0,
            Some(other) => return Err(unsupported("checkpoint_format", other)),
        };
        match packed.config.get("pack_dtype") {
            None | Some(Json::Null) => (),
            Some(Json::String(dtype)) if dtype == "int32" => (),
            Some(other) => return Err(unsupported("pack_dtype", other)),
        }
        if let Some(dynamic) = packed.config.get("dynamic").and_then(Json::as_object)
            && !dynamic.is_empty()
        {
            return Err(unsupported("dynamic", &Json::Object(dynamic.clone())));
        }
        let act_order = packed.config.get("desc_act") == Some(&Json::Bool(true));
        Ok(Self { bits, group_size, act_order, zero_offset })
    }

    fn matrix(&self, packed: &Packed<'_>, stem: &str, qweight: &TensorInfo) -> Result<Matrix> {
        let context = |e: Error| e.context(format!("GPTQ with {} bits", self.bits));
        let fail = |what: String| context(Error::malformed(format!("tensor {:?} {what}", qweight.name)));
        let [words, outputs] = qweight.shape[..] else {
            return Err(fail(format!("has shape {:?}, two dimensions were expected", qweight.shape)));
        };
        let whole = |n: u64, divisor: u64| n.is_multiple_of(divisor).then(|| n / divisor);
        let inputs = words
            .checked_mul(32)
            .and_then(|n| whole(n, self.bits))
            .ok_or_else(|| fail(format!("has {words} rows, which hold no whole number of codes")))?;
        let zero_words = outputs
            .checked_mul(self.bits)
            .and_then(|n| whole(n, 32))
            .ok_or_else(|| fail(format!("has {outputs} columns, whose zeros do not fill whole words")))?;
        let group_size = self.group_size.unwrap_or(inputs).max(1);
        let groups = inputs.div_ceil(group_size);
        let part = |name: &str, types: &[DType], shape: &[u64]| {
            packed
                .part(&format!("{stem}.{name}"), types, shape)
                .map_err(|e| context(e.context(format!("{inputs} inputs in groups of {group_size}"))))
        };
        super::check(qweight, &[DType::I32], &[words, outputs]).map_err(context)?;
        let g_idx = format!("{stem}.g_idx");
        if self.act_order && packed.store.get(&g_idx).is_none() {
            return Err(context(Error::malformed(format!("tensor {g_idx:?} is missing")))
                .hint("with desc_act it tells the group of each input"));
        }
        Ok(Matrix {
            qweight: qweight.clone(),
            qzeros: part("qzeros", &[DType::I32], &[groups, zero_words])?.clone(),
            scales: part("scales", FLOATS, &[groups, outputs])?.clone(),
            g_idx: match packed.store.get(&g_idx) {
                Some(_) => Some(part("g_idx", &[DType::I32], &[inputs])?.clone()),
                None => None,
            },
            inputs,
            outputs,
            bits: self.bits,
            group_size,
            groups,
            zero_offset: self.zero_offset,
        })
    }
}

#[derive(Debug)]
struct Matrix {
    qweight: TensorInfo,
    qzeros: TensorInfo,
    scales: TensorInfo,
    /// Without it the groups follow on each other.
    g_idx: Option<TensorInfo>,
    inputs: u64,
    outputs: u64,
    bits: u64,
    group_size: u64,
    groups: u64,
    zero_offset: u32,
}

/// Columns that share their words: 32 codes fill whole words at any width.
const UNIT: usize = 32;

impl View for Matrix {
    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let mut out = out.as_chunks_mut().0;
        for tile in tiles(start, start + out.len() as u64, self.inputs) {
            let n = (tile.rows.end - tile.rows.start) * (tile.cols.end - tile.cols.start);
            let (these, rest) = out.split_at_mut(n as usize);
            out = rest;
            self.tile(stored, &tile, these)?;
        }
        Ok(())
    }

    /// A row of the matrix is a column of what is stored.
    fn is_scattered(&self) -> bool {
        true
    }
}

impl Matrix {
    fn tile(&self, stored: &Stored, tile: &Tile, out: &mut [[u8; 4]]) -> Result<()> {
        let Tile { rows, cols } = tile;
        let (n_rows, n_cols) = ((rows.end - rows.start) as usize, (cols.end - cols.start) as usize);
        let groups = self.groups_of(stored, cols)?;
        let (Some(&least), Some(&most)) = (groups.iter().min(), groups.iter().max()) else { return Ok(()) };
        // Zeros and scales of the groups that occur, a row of the tile in each column.
        let (mut zeros, mut scales) = (Vec::new(), Vec::new());
        let first_word = rows.start * self.bits / 32;
        let zero_words = ((rows.end * self.bits).div_ceil(32) - first_word) as usize;
        for group in least..=most {
            let at = group * self.qzeros.row() + first_word;
            let words = words(stored, &self.qzeros, at, zero_words)?;
            zeros.extend(rows.clone().map(|row| {
                let field = code(&words, 1, row * self.bits - first_word * 32, self.bits);
                field + self.zero_offset
            }));
            scales.extend(values(stored, &self.scales, group * self.outputs + rows.start, n_rows)?);
        }
        let first_word = cols.start * self.bits / 32;
        let last_word = (cols.end * self.bits).div_ceil(32);
        let codes = if n_rows as u64 == self.outputs {
            let n = (last_word - first_word) as usize * n_rows;
            words(stored, &self.qweight, first_word * self.outputs, n)?
        } else {
            let mut codes = Vec::with_capacity((last_word - first_word) as usize * n_rows);
            for word in first_word..last_word {
                codes.extend(words(stored, &self.qweight, word * self.outputs + rows.start, n_rows)?);
            }
            codes
        };
        for from in (0..n_cols).step_by(UNIT) {
            let to = n_cols.min(from + UNIT);
            for row in 0..n_rows {
                for (col, group) in (from..to).zip(&groups[from..to]) {
                    let bit = (cols.start + col as u64) * self.bits - first_word * 32;
                    let q = code(&codes[row..], n_rows, bit, self.bits);
                    let at = (group - least) as usize * n_rows + row;
                    let difference = (q as i32 - zeros[at] as i32) as f32;
                    out[row * n_cols + col] = (difference * scales[at]).to_le_bytes();
                }
            }
        }
        Ok(())
    }

    /// The group of each of these inputs.
    fn groups_of(&self, stored: &Stored, cols: &std::ops::Range<u64>) -> Result<Vec<u64>> {
        let Some(g_idx) = &self.g_idx else {
            return Ok(cols.clone().map(|col| col / self.group_size).collect());
        };
        let groups = words(stored, g_idx, cols.start, (cols.end - cols.start) as usize)?;
        let groups: Vec<u64> = groups.into_iter().map(u64::from).collect();
        match cols.clone().zip(&groups).find(|(_, g)| **g >= self.groups) {
            None => Ok(groups),
            Some((col, group)) => Err(Error::malformed(format!(
                "tensor {:?}: input {col} is of group {}, there are {}",
                g_idx.name, *group as u32 as i32, self.groups
            ))),
        }
    }
}

/// The code of `bits` bits from bit `at` on of a stream whose words lie `stride` apart.
fn code(words: &[u32], stride: usize, at: u64, bits: u64) -> u32 {
    let (word, shift) = ((at / 32) as usize * stride, at % 32);
    let low = words[word] >> shift;
    let high = if shift + bits > 32 { words[word + stride] << (32 - shift) } else { 0 };
    (low | high) & ((1 << bits) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_cross_words() {
        // The stream of 3-bit codes 0, 1, 2 ... 7, 0, 1 ...
        let mut words = [0u32; 3];
        for i in 0..32u64 {
            for bit in 0..3 {
                words[(i * 3 + bit) as usize / 32] |= (((i % 8) >> bit & 1) as u32) << ((i * 3 + bit) % 32);
            }
        }
        let codes: Vec<u32> = (0..32).map(|i| code(&words, 1, i * 3, 3)).collect();
        assert_eq!(codes, (0..32).map(|i| i % 8).collect::<Vec<_>>());
        let spread = words.map(|w| [w, !w]).concat();
        assert_eq!((0..32).map(|i| code(&spread, 2, i * 3, 3)).collect::<Vec<_>>(), codes);
    }
}
