//! AWQ: integers of 4 bits with a scale and a zero for each group of inputs, in AutoAWQ's GEMM layout.
//!
//! Of a linear layer `P` with `in` inputs and `out` outputs there are `P.qweight` I32 `[in, out / 8]`,
//! `P.qzeros` I32 `[groups, out / 8]` and `P.scales` `[groups, out]`. A word holds eight neighbouring
//! outputs, output `k` of them in nibble `NIBBLE[k]`, the lowest being 0.
//! `W[o, i] = (q[i, o] - z[g, o]) * scales[g, o]`, `g = i / group_size`, in f32. What AWQ multiplied
//! channels with is in the layers before. Sources: AutoAWQ's `WQLinear_GEMM` and `awq/utils/packing_utils.py`.

use std::ops::Range;

use serde_json::Value as Json;

use super::{FLOATS, Format, Packed, check, matrix, scales_of_rows, unsupported, words};
use crate::container::grouped::{Grouped, Shape};
use crate::container::{Joined, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "awq",
    name: "AWQ",
    marks: |t| [".qweight", ".qzeros"].iter().any(|ending| t.name.ends_with(ending)),
    join: |packed| {
        match packed.config.get("version").or(packed.config.get("checkpoint_format")) {
            None | Some(Json::Null) => {}
            Some(Json::String(v)) if v.starts_with("gptq") => {
                return Err(Error::malformed(format!(
                    "quantization_config: quant_method is \"awq\", and checkpoint_format {v:?}"
                ))
                .hint("one of the two is wrong: GPTQ's tensors have a g_idx, AWQ's have none"));
            }
            Some(Json::String(v)) if v.eq_ignore_ascii_case("gemm") => {}
            Some(other) => return Err(unsupported("version", other).hint("\"gemm\" is")),
        }
        join(packed)
    },
};

/// Where each of eight outputs lies in their word.
const NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
const OF_WORD: u64 = 8;

pub(super) fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    packed.bits(&[4])?;
    let group_size = packed.group_size()?;
    let mut joined = Vec::new();
    for (stem, qweight) in packed.ending(".qweight") {
        let [inputs, out_words] = qweight.shape[..] else {
            return Err(Error::malformed(format!("tensor {:?} has shape {:?}", qweight.name, qweight.shape)));
        };
        check(qweight, &[DType::I32], &qweight.shape)?;
        let outputs = out_words
            .checked_mul(OF_WORD)
            .ok_or_else(|| Error::malformed(format!("tensor {:?}: sizes overflow", qweight.name)))?;
        let group_size = group_size.unwrap_or(inputs).max(1);
        let groups = inputs.div_ceil(group_size);
        let part = |name: &str, types: &[DType], shape: &[u64]| {
            let part = packed.part(&format!("{stem}.{name}"), types, shape);
            part.cloned().map_err(|e| e.context(format!("AWQ: {inputs} inputs in groups of {group_size}")))
        };
        let codes = Matrix {
            qweight: qweight.clone(),
            qzeros: part("qzeros", &[DType::I32], &[groups, out_words])?,
            scales: part("scales", FLOATS, &[groups, outputs])?,
            shape: Shape { rows: outputs, cols: inputs, bits: 4, group_size, groups },
        };
        let parts = [&codes.qweight, &codes.qzeros, &codes.scales].map(|t| t.name.clone()).to_vec();
        joined.push(matrix(format!("{stem}.weight"), parts, codes));
    }
    Ok(joined)
}

#[derive(Debug)]
struct Matrix {
    shape: Shape,
    qweight: TensorInfo,
    qzeros: TensorInfo,
    scales: TensorInfo,
}

impl Matrix {
    /// Hands the words that hold these rows, of each row of a stored tensor, to `each`, and the place of
    /// the first row in them.
    fn columns(
        &self,
        stored: &Stored,
        t: &TensorInfo,
        rows: &Range<u64>,
        mut each: impl FnMut(usize, &[u32]),
    ) -> Result<()> {
        let (first, last) = (rows.start / OF_WORD, rows.end.div_ceil(OF_WORD));
        let n = (last - first) as usize;
        let count = t.shape.first().copied().unwrap_or(0);
        if n as u64 == t.row() {
            let all = words(stored, t, 0, n * count as usize)?;
            all.chunks_exact(n.max(1)).enumerate().for_each(|(i, words)| each(i, words));
            return Ok(());
        }
        for i in 0..count {
            each(i as usize, &words(stored, t, i * t.row() + first, n)?);
        }
        Ok(())
    }
}

/// The word of eight outputs.
#[inline(always)]
pub(super) fn word(field: impl Fn(usize) -> u8) -> [u8; 4] {
    let word = (0..8).fold(0, |word, i| word | u32::from(field(i) & 15) << (4 * NIBBLE[i]));
    word.to_le_bytes()
}

/// The field of row `r` in words whose first holds the rows from `first` on.
fn field(words: &[u32], r: usize) -> u8 {
    (words[r / 8] >> (4 * NIBBLE[r % 8])) as u8 & 15
}

impl Grouped for Matrix {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let (cols, skipped) = (self.shape.cols as usize, (rows.start % OF_WORD) as usize);
        self.columns(stored, &self.qweight, &rows, |i, words| {
            for (r, row) in codes.chunks_exact_mut(cols).enumerate() {
                row[i] = field(words, skipped + r);
            }
        })
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        let (groups, skipped) = (self.shape.groups as usize, (rows.start % OF_WORD) as usize);
        self.columns(stored, &self.qzeros, &rows, |g, words| {
            for (r, row) in zeros.chunks_exact_mut(groups).enumerate() {
                row[g] = field(words, skipped + r).into();
            }
        })?;
        scales_of_rows(stored, &self.scales, rows, scales)
    }

    fn is_scattered(&self) -> bool {
        true
    }
}
