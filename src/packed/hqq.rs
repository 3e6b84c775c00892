//! HQQ: integers of 1 to 8 bits in groups, whose zeros are no integers.
//!
//! The weights `[out, in]` of a module `P` are regarded as a matrix of another shape: `[out * in / group_size,
//! group_size]` for `axis` 1, `[group_size, out * in / group_size]` for `axis` 0. `P.scale` and `P.zero` have a
//! value for each of its rows, or columns. `P.W_q` holds its codes in planes along the rows, the first plane
//! highest: `packing` says how many lie in a byte, or (`3bit_32`) in a word of 32 bits; there the last
//! plane is filled up. `W = (q - zero) * scale`, in f32. With `view_as_float` the bytes of `P.W_q` are called floats.
//!
//! How a module is packed (`nbits`, `group_size`, `axis`, `shape`, `packing` ...) stands in tensors beside it,
//! as transformers saves it, or in the pickle of the library's own `qmodel.pt`, older ones
//! in a dict `meta` ([`stated`]). Sources: the library's `core/quantize.py` and `core/bitpack.py`.

use std::ops::Range;

use serde_json::{Map, Value as Json, json};

use super::{FLOATS, Format, Packed, bytes, matrix, tiles, values};
use crate::container::grouped::{Grouped, Shape};
use crate::container::{Joined, Packing, Stored, View};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo, elements};

pub(super) const FORMAT: Format = Format {
    method: METHOD,
    name: "HQQ",
    marks: |t| [CODES, ".unpack_view_dtype"].iter().any(|ending| t.name.ends_with(ending)),
    join,
};

const METHOD: &str = "hqq";
const CODES: &str = ".W_q";
/// Where [`stated`] puts what the weights' file says.
const VALUES: &str = "values";

/// What a module's tensors are called besides `W_q`, `scale`, `zero` and `bias`.
const FACTS: [&str; 16] = [
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
];
/// Most bytes of one of these.
const FACT_BYTES: u64 = 64;

/// Name of a packing, bits of a code, codes in a byte or word, bytes of that.
const PACKINGS: [(&str, u32, u64, u64); 5] = [
    ("8bit_u8", 8, 1, 1),
    ("4bit_u8", 4, 2, 1),
    ("3bit_32", 3, 10, 4),
    ("2bit_u8", 2, 4, 1),
    ("1bit_u8", 1, 8, 1),
];

/// The quantization of a model whose config.json says `config` of it, and whose weights' file says `values`:
/// HQQ's own library leaves it all to the latter.
///
/// # Errors
/// `Malformed` where the two contradict each other.
pub fn stated(config: Option<Json>, values: Map<String, Json>) -> Result<Option<Json>> {
    if values.is_empty() {
        return Ok(config);
    }
    match config.as_ref().and_then(|c| c.get("quant_method")) {
        Some(other) if other != METHOD => Err(Error::malformed(format!(
            "quantization_config: quant_method = {other}, but the weights are packed as in HQQ"
        ))
        .hint("config.json belongs to another version of the model")),
        _ => Ok(Some(json!({"quant_method": METHOD, VALUES: values}))),
    }
}

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    let each = packed.ending(CODES);
    each.map(|(stem, codes)| {
        module(packed, stem, codes).map_err(|e| e.context(format_args!("HQQ: {stem:?}")))
    })
    .collect()
}

/// What is said of a module, in the weights' file or in a tensor.
fn fact(packed: &Packed<'_>, stem: &str, key: &str) -> Result<Option<Json>> {
    let said = packed.config.get(VALUES);
    if let Some(value) = names(stem, key).iter().find_map(|name| said?.get(name)) {
        return Ok(Some(value.clone()));
    }
    let Some(t) = packed.store.get(&format!("{stem}.{key}")) else { return Ok(None) };
    if t.nbytes > FACT_BYTES {
        return Err(Error::malformed(format!(
            "tensor {:?} has {} bytes, a fact was expected",
            t.name, t.nbytes
        )));
    }
    let found = packed.store.read_all(t)?;
    let numbers: Vec<Json> = match t.dtype {
        DType::U8 if !t.shape.is_empty() => return Ok(Some(String::from_utf8_lossy(&found).into())),
        DType::U8 | DType::Bool => found.iter().map(|b| json!(b)).collect(),
        DType::I32 => found.as_chunks().0.iter().map(|b| json!(i32::from_le_bytes(*b))).collect(),
        DType::I64 => found.as_chunks().0.iter().map(|b| json!(i64::from_le_bytes(*b))).collect(),
        DType::F32 => found.as_chunks().0.iter().map(|b| json!(f32::from_le_bytes(*b))).collect(),
        other => return Err(Error::malformed(format!("tensor {:?} is {other}, no fact", t.name))),
    };
    Ok(match t.shape.is_empty() {
        true => numbers.into_iter().next(),
        false => Some(numbers.into()),
    })
}

/// Where a part may be.
fn names(stem: &str, key: &str) -> [String; 2] {
    [format!("{stem}.{key}"), format!("{stem}.meta.{key}")]
}

fn module(packed: &Packed<'_>, stem: &str, codes: &TensorInfo) -> Result<Joined> {
    let fact = |key: &str| fact(packed, stem, key);
    let needed = |key: &str| fact(key)?.ok_or_else(|| Error::malformed(format!("{key} is missing")));
    let is =
        |key: &str| fact(key).map(|v| v.is_some_and(|v| v == true || v.as_u64().is_some_and(|n| n != 0)));
    let bad = |key: &str, value: &Json| Error::malformed(format!("{key} = {value}"));
    let refused = |what: String| Error::unsupported(format!("{what} is not read"));
    for key in ["quant_scale", "quant_zero"] {
        if is(key)? {
            return Err(refused(format!("{key} (scales or zeros that are quantized themselves)")));
        }
    }
    if fact("channel_wise")?.is_some_and(|v| v == false || v == 0) {
        return Err(refused("channel_wise = false".into()));
    }
    if names(stem, "zero_scale").iter().any(|name| packed.store.get(name).is_some()) {
        return Err(refused("zero_scale (of offload_meta)".into()));
    }
    let shape = needed("shape")?;
    let dims: Option<Vec<u64>> =
        shape.as_array().and_then(|dims| dims.iter().map(|n| n.as_u64().filter(|n| *n > 0)).collect());
    let [rows, cols] = dims.as_deref().unwrap_or_default()[..] else { return Err(bad("shape", &shape)) };
    let count = elements(&[rows, cols])?;
    let axis = needed("axis")?;
    let by_rows = match axis.as_u64() {
        Some(0) => false,
        Some(1) => true,
        _ => return Err(bad("axis", &axis)),
    };
    let group_size = match fact("group_size")? {
        None | Some(Json::Null) => {
            if by_rows {
                cols
            } else {
                rows
            }
        }
        Some(n) => n.as_u64().filter(|n| *n > 0).ok_or_else(|| bad("group_size", &n))?,
    };
    if !count.is_multiple_of(group_size) {
        return Err(Error::malformed(format!(
            "group_size {group_size} does not divide the {count} weights of {shape}"
        )));
    }
    let lines = count / group_size;
    let (height, width) = if by_rows { (lines, group_size) } else { (group_size, lines) };
    let packing = needed("packing")?;
    let (_, bits, planes, word) =
        PACKINGS.into_iter().find(|(name, ..)| packing == *name).ok_or_else(|| {
            refused(format!("packing = {packing}"))
                .hint(format!("read are {}", PACKINGS.map(|p| p.0).join(", ")))
        })?;
    let nbits = needed("nbits")?;
    if nbits.as_f64().is_none_or(|n| n <= 0.0 || n > f64::from(bits)) {
        return Err(Error::malformed(format!("nbits = {nbits}, packing = {packing}")));
    }
    if bits != 3 && !height.is_multiple_of(planes) {
        return Err(Error::malformed(format!(
            "packing = {packing}, which {height} rows of groups do not fill"
        )));
    }
    let step = height.div_ceil(planes);
    // No more than the weights, or ten words.
    let wanted = step.checked_mul(width).and_then(|n| n.checked_mul(word));
    let kinds = if is("view_as_float")? {
        FLOATS
    } else if word == 4 {
        &[DType::I32]
    } else {
        &[DType::U8]
    };
    if !kinds.contains(&codes.dtype) || Some(codes.nbytes) != wanted {
        let kinds: Vec<_> = kinds.iter().map(|t| t.name()).collect();
        return Err(Error::malformed(format!(
            "tensor {:?} is {} of {} bytes, {} of {} was expected (shape {shape}, packing {packing})",
            codes.name,
            codes.dtype,
            codes.nbytes,
            kinds.join(" or "),
            wanted.map_or("an impossible number".to_string(), |n| n.to_string())
        )));
    }
    let line_shape = if by_rows { [lines, 1] } else { [1, lines] };
    let part = |key: &str| {
        let [plain, old] = names(stem, key);
        let name = if packed.store.get(&plain).is_some() { plain } else { old };
        packed.part(&name, FLOATS, &line_shape).cloned()
    };
    let (scale, zero) = (part("scale")?, part("zero")?);
    let facts =
        FACTS.iter().map(|key| format!("{stem}.{key}")).filter(|name| packed.store.get(name).is_some());
    let parts = [codes, &scale, &zero].map(|t| t.name.clone()).into_iter().chain(facts).collect();
    let codes = Codes { tensor: codes.clone(), bits, planes, word, plane: step * width };
    let name = format!("{stem}.weight");
    if by_rows && cols.is_multiple_of(group_size) {
        let shape = Shape { rows, cols, bits, group_size, groups: cols / group_size };
        return Ok(matrix(name, parts, Matrix { shape, codes, scale, zero }));
    }
    let view = Lines { codes, scale, zero, width, group_size, by_rows };
    Ok(Joined { name, dtype: DType::F32, shape: vec![rows, cols], parts, view: Box::new(view) })
}

#[derive(Debug)]
struct Codes {
    tensor: TensorInfo,
    bits: u32,
    /// Codes in a byte or word, and bytes of that.
    planes: u64,
    word: u64,
    /// Codes of a plane.
    plane: u64,
}

impl Codes {
    /// Those from `start` on, in the order of the weights.
    fn read(&self, stored: &Stored, mut start: u64, mut out: &mut [u8]) -> Result<()> {
        let mask = u8::MAX >> (8 - self.bits);
        // Of floats that the bytes are called there may be none that begins here.
        let size = self.tensor.dtype.type_size();
        while !out.is_empty() {
            let (plane, from) = (start / self.plane, start % self.plane);
            let n = (out.len() as u64).min(self.plane - from);
            let (these, rest) = out.split_at_mut(n as usize);
            let (first, last) = (from * self.word / size, ((from + n) * self.word).div_ceil(size));
            let found = bytes(stored, &self.tensor, first, (last - first) as usize)?;
            let found = &found[(from * self.word - first * size) as usize..];
            let shift = self.bits * (self.planes - 1 - plane) as u32;
            if self.word == 1 {
                these.iter_mut().zip(found).for_each(|(code, byte)| *code = byte >> shift & mask);
            } else {
                let words = found.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b));
                these.iter_mut().zip(words).for_each(|(code, word)| *code = (word >> shift) as u8 & mask);
            }
            (start, out) = (start + n, rest);
        }
        Ok(())
    }
}

/// Whose groups are parts of rows.
#[derive(Debug)]
struct Matrix {
    shape: Shape,
    codes: Codes,
    scale: TensorInfo,
    zero: TensorInfo,
}

impl Grouped for Matrix {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        self.codes.read(stored, rows.start * self.shape.cols, codes)
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        let first = rows.start * self.shape.groups;
        scales.copy_from_slice(&values(stored, &self.scale, first, scales.len())?);
        zeros.copy_from_slice(&values(stored, &self.zero, first, zeros.len())?);
        Ok(())
    }
}

/// Groups as they come: rows or columns of a matrix of `width` columns.
#[derive(Debug)]
struct Lines {
    codes: Codes,
    scale: TensorInfo,
    zero: TensorInfo,
    width: u64,
    group_size: u64,
    by_rows: bool,
}

impl View for Lines {
    fn packing(&self) -> Packing {
        let block = if self.by_rows { [1, self.group_size] } else { [self.group_size, 1] };
        Packing { bits: self.codes.bits, block }
    }

    fn read(&self, stored: &Stored, start: u64, out: &mut [u8]) -> Result<()> {
        let mut out = out.as_chunks_mut::<4>().0.iter_mut();
        let mut codes = vec![0; out.len()];
        self.codes.read(stored, start, &mut codes)?;
        let mut codes = codes.into_iter();
        for tile in tiles(start, start + codes.len() as u64, self.width) {
            let lines = if self.by_rows { tile.rows.clone() } else { tile.cols.clone() };
            let n = (lines.end - lines.start) as usize;
            let scales = values(stored, &self.scale, lines.start, n)?;
            let zeros = values(stored, &self.zero, lines.start, n)?;
            for row in tile.rows.clone() {
                for col in tile.cols.clone() {
                    let line = (if self.by_rows { row } else { col } - lines.start) as usize;
                    let (Some(y), Some(code)) = (out.next(), codes.next()) else { break };
                    *y = ((f32::from(code) - zeros[line]) * scales[line]).to_le_bytes();
                }
            }
        }
        Ok(())
    }
}
