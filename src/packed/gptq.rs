//! GPTQ: integers of 2, 3, 4 or 8 bits with a scale and a zero for each group of inputs.
//!
//! Of a linear layer `P` with `in` inputs and `out` outputs there are `P.qweight` I32
//! `[in * bits / 32, out]`, a stream of codes along the input for each output, lowest bits first;
//! `P.qzeros` I32 `[groups, out * bits / 32]`, the same along the output; `P.scales`
//! `[groups, out]`; `P.g_idx` I32 `[in]`, the group of each input.
//! `W[o, i] = (q[i, o] - z[g, o]) * scale[g, o]` with `g = g_idx[i]`, in f32. The first version of
//! the format stores `z - 1`. Sources: AutoGPTQ's and GPTQModel's `qlinear`, checked by values.

use std::ops::Range;

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, bytes, matrix, scales_of_rows, unsupported};
use crate::block::bits;
use crate::container::grouped::{Grouped, Shape};
use crate::container::{Joined, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "gptq",
    name: "GPTQ",
    marks: |t| [".qweight", ".qzeros"].iter().any(|ending| t.name.ends_with(ending)),
    join,
};

pub(super) fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let config = Config::read(packed)?;
    let mut joined = Vec::new();
    for (stem, qweight) in packed.ending(".qweight") {
        let codes = config.matrix(packed, stem, qweight)?;
        let parts = [&codes.qweight, &codes.qzeros, &codes.scales].into_iter().chain(&codes.g_idx);
        let parts = parts.map(|t| t.name.clone()).collect();
        joined.push(matrix(format!("{stem}.weight"), parts, codes));
    }
    Ok(joined)
}

/// What quantization_config says of all matrices.
struct Config {
    bits: u32,
    /// `None`: one group.
    group_size: Option<u64>,
    act_order: bool,
    /// What is added to a stored zero.
    zero_offset: u8,
    /// Some modules have other bits and groups.
    dynamic: bool,
}

impl Config {
    fn read(packed: &Packed<'_>) -> Result<Self> {
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
        // AutoRound's name for the same.
        let rules = ["dynamic", "extra_config"].iter().filter_map(|k| packed.config.get(*k)?.as_object());
        Ok(Self {
            bits: packed.bits(&[2, 3, 4, 8])?,
            group_size: packed.group_size()?,
            act_order: packed.config.get("desc_act") == Some(&Json::Bool(true)),
            zero_offset,
            dynamic: rules.into_iter().any(|rules| !rules.is_empty()),
        })
    }

    fn matrix(&self, packed: &Packed<'_>, stem: &str, qweight: &TensorInfo) -> Result<Matrix> {
        let qzeros = format!("{stem}.qzeros");
        let whole = |n: u64, divisor: u64| n.is_multiple_of(divisor).then(|| n / divisor);
        let [words, outputs] = qweight.shape[..] else {
            return Err(Error::malformed(format!(
                "tensor {:?} has shape {:?}, two dimensions were expected",
                qweight.name, qweight.shape
            )));
        };
        let (mut bits, mut rules) = (u64::from(self.bits), None);
        if self.dynamic
            && let Some([groups, zero_words]) = packed.store.get(&qzeros).map(|t| &t.shape[..])
        {
            // What a rule says of this module shows in the shapes of its tensors.
            let found = zero_words.checked_mul(32).and_then(|n| whole(n, outputs.max(1)));
            bits = found.filter(|bits| matches!(bits, 2 | 3 | 4 | 8)).unwrap_or(bits);
            rules = Some(*groups);
        }
        let context = |e: Error| e.context(format!("GPTQ with {bits} bits"));
        let fail = |what: String| context(Error::malformed(format!("tensor {:?} {what}", qweight.name)));
        let inputs = words
            .checked_mul(32)
            .and_then(|n| whole(n, bits))
            .ok_or_else(|| fail(format!("has {words} rows, which hold no whole number of codes")))?;
        let zero_words = outputs
            .checked_mul(bits)
            .and_then(|n| whole(n, 32))
            .ok_or_else(|| fail(format!("has {outputs} columns, whose zeros do not fill whole words")))?;
        let of_rule = rules.filter(|n| *n > 0).map(|n| inputs.div_ceil(n));
        let group_size = of_rule.or(self.group_size).unwrap_or(inputs).max(1);
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
            shape: Shape { rows: outputs, cols: inputs, bits: bits as u32, group_size, groups },
            zero_offset: self.zero_offset,
        })
    }
}

#[derive(Debug)]
struct Matrix {
    shape: Shape,
    qweight: TensorInfo,
    qzeros: TensorInfo,
    scales: TensorInfo,
    /// Without it the groups follow on each other.
    g_idx: Option<TensorInfo>,
    /// What is added to a stored zero.
    zero_offset: u8,
}

/// Codes that fill whole words at any width.
const UNIT: usize = 32;

impl Grouped for Matrix {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let n = (rows.end - rows.start) as usize;
        let (cols, bits) = (self.shape.cols as usize, self.shape.bits);
        let words_of_row = cols * bits as usize / 32;
        if codes.is_empty() {
            return Ok(());
        }
        // A row of the matrix is a column of what is stored.
        let words = if n as u64 == self.shape.rows {
            bytes(stored, &self.qweight, 0, words_of_row * n)?
        } else {
            let mut all = vec![0; words_of_row * n * 4];
            for (word, bytes) in (0..).zip(all.chunks_exact_mut(n * 4)) {
                stored.read(&self.qweight, (word * self.shape.rows + rows.start) * 4, bytes)?;
            }
            all
        };
        let mut streams = vec![[0; 4]; words.len() / 4];
        bits::transpose(words.as_chunks().0, n, &mut streams);
        let streams = streams.as_flattened().chunks_exact(words_of_row * 4);
        for (stream, codes) in streams.zip(codes.chunks_exact_mut(cols)) {
            bits::unpack(stream, bits, 0, codes);
        }
        Ok(())
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        let (n, bits, groups) =
            ((rows.end - rows.start) as usize, self.shape.bits, self.shape.groups as usize);
        let skipped = (rows.start % UNIT as u64) as usize;
        let first_word = rows.start / UNIT as u64 * u64::from(bits);
        let last_word = (rows.end * u64::from(bits)).div_ceil(32);
        let mut fields = vec![0; n];
        for group in 0..groups {
            let at = group as u64 * self.qzeros.row() + first_word;
            let stream = bytes(stored, &self.qzeros, at, (last_word - first_word) as usize)?;
            bits::unpack(&stream, bits, skipped, &mut fields);
            for (row, field) in fields.iter().enumerate() {
                zeros[row * groups + group] = f32::from(*field) + f32::from(self.zero_offset);
            }
        }
        scales_of_rows(stored, &self.scales, rows, scales)
    }

    fn groups(&self, stored: &Stored) -> Result<Option<Vec<u32>>> {
        self.g_idx.as_ref().map(|t| super::groups_of(stored, t, &self.shape)).transpose()
    }

    fn is_scattered(&self) -> bool {
        true
    }
}
