//! What the encodings of `.qpack` files decode to, and how values are put into them; `formats/spec/qpack.md`
//! describes both. Each encoding is a file: a view that reads by rows, and what writes rows.
//!
//! The container itself, manifest and segments, is `container::qpack`.

mod codebook;
mod integers;
mod restore;
mod scaled;
mod sparse;
mod take;
mod ternary;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;

pub use codebook::put as put_codebook;
pub use integers::put as put_integers;
pub use restore::{KNOWN_LAYOUTS, restore};
pub use scaled::put as put_scaled;
pub use sparse::{put as put_sparse, sign_bytes};
pub use take::{Taken, take};
pub use ternary::put as put_ternary;

use super::{QUANTIZE_CONFIG, quantization};
use crate::block::{bf16_from_f32, f16_from_f32, f32_from_bf16, f32_from_f16};
use crate::container::grouped::{Grouped, Rows, Values};
use crate::container::qpack::{Encoding, Matrix, PartSize, Qpack, Tensor, part_name};
use crate::container::side::from_json;
use crate::container::{Joined, Store, Stored, View};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::{DType, TensorInfo};

/// Opens the model that the file at `path` belongs to: its tensors as values, and what the manifest says of
/// each. A tensor whose encoding or compression is not known is there as its parts, `NAME / PART`, in
/// bytes. What stayed in the layout of a quantized checkpoint is joined as the file's config.json says ([`stated`]).
///
/// # Errors
/// As [`Qpack::open`], [`join`] and [`super::unpack`].
pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<(Store, Vec<Tensor>)> {
    let path = path.as_ref();
    let model = Qpack::open(path, limits)?;
    let config: Json = match model.files().iter().any(|f| f.name == CONFIG) {
        true => from_json(&model.read_file(CONFIG, limits)?, path).map_err(|e| e.context(CONFIG))?,
        false => Json::Null,
    };
    let stated = stated(&model, &config, limits).map_err(|e| e.at(path))?;
    let (parts, tensors) = model.into_parts()?;
    let store = join(parts, &tensors).map_err(|e| e.at(path))?;
    let (store, _) = unpack_rest(store, stated.as_ref()).map_err(|e| e.at(path))?;
    Ok((store, tensors))
}

/// What the model says of the quantization of its rest: in its config.json, which is `config`, or in the
/// quantize_config.json of early GPTQ models.
///
/// # Errors
/// As [`Qpack::read_file`]; `Malformed` for what is no JSON.
pub fn stated(model: &Qpack, config: &Json, limits: &Limits) -> Result<Option<Json>> {
    quantization(config, || match model.files().iter().any(|f| f.name == QUANTIZE_CONFIG) {
        true => from_json(&model.read_file(QUANTIZE_CONFIG, limits)?, Path::new(QUANTIZE_CONFIG)),
        false => Ok(None),
    })
}

/// Joins what stayed in the layout of a quantized checkpoint, as the model says of its quantization. A second
/// result names the method that it states.
///
/// # Errors
/// As [`super::unpack`].
pub fn unpack_rest(store: Store, stated: Option<&Json>) -> Result<(Store, Option<&'static str>)> {
    super::unpack_some(store, stated, 0)
}

/// The file that says how the rest is quantized, with early GPTQ models another one.
const CONFIG: &str = "config.json";

/// Joins the parts of tensors ([`Qpack::into_parts`]).
///
/// # Errors
/// `Malformed` where parts are missing, or names come twice.
pub fn join(store: Store, tensors: &[Tensor]) -> Result<Store> {
    let mut joined = Vec::new();
    for tensor in tensors {
        let context = |e: Error| e.context(format_args!("tensor {:?}", tensor.name));
        if let Some(view) = view(&store, tensor).map_err(context)? {
            joined.push(Joined {
                name: tensor.name.clone(),
                dtype: DType::F32,
                shape: tensor.shape.clone(),
                parts: tensor.parts.iter().map(|p| part_name(tensor, p)).collect(),
                view,
            });
        }
    }
    store.join(joined)
}

/// What decodes a tensor; `None` where there is nothing to decode.
fn view(store: &Store, tensor: &Tensor) -> Result<Option<Box<dyn View>>> {
    if tensor.is_closed() {
        return Ok(None);
    }
    let parts = Parts { store, tensor };
    let shape = &tensor.shape;
    let grouped: Arc<dyn Grouped> = match &tensor.encoding {
        Encoding::Plain(_) | Encoding::Unknown(_) => return Ok(None),
        Encoding::Codebook(e) => return Ok(Some(Box::new(codebook::Codes::new(e, shape, &parts)?))),
        Encoding::Scaled(e) => return Ok(Some(Box::new(scaled::Elements::new(e, shape, &parts)?))),
        Encoding::Integers(e) => Arc::new(integers::Codes::new(e, shape, &parts)?),
        Encoding::Ternary(e) => Arc::new(ternary::Digits::new(e, shape, &parts)?),
        Encoding::Sparse(e) => Arc::new(sparse::Signs::new(e, shape, &parts)?),
    };
    Ok(Some(Box::new(Values(grouped))))
}

/// The parts of a tensor among those of a store.
struct Parts<'a> {
    store: &'a Store,
    tensor: &'a Tensor,
}

impl Parts<'_> {
    fn get(&self, name: &str) -> Result<TensorInfo> {
        let part = self.tensor.parts.iter().find(|p| p.name == name);
        let info = part.and_then(|p| self.store.get(&part_name(self.tensor, p)));
        info.cloned().ok_or_else(|| Error::malformed(format!("part {name:?} is missing")))
    }
}

/// The scales of blocks of rows and columns.
#[derive(Debug)]
struct Scales {
    info: TensorInfo,
    /// Rows of a block.
    high: u64,
    /// Blocks side by side.
    across: u64,
}

impl Scales {
    fn new(info: TensorInfo, matrix: Matrix, block: [u64; 2]) -> Self {
        Self { info, high: block[0], across: matrix.blocks(block)[1] }
    }

    /// Those of whole rows, row by row.
    fn of_rows(&self, stored: &Stored, rows: Range<u64>, out: &mut [f32]) -> Result<()> {
        let (first, last) = (rows.start / self.high, rows.end.saturating_sub(1) / self.high);
        let across = self.across as usize;
        let all = numbers(stored, &self.info, first * self.across, (last - first + 1) as usize * across)?;
        for (row, out) in rows.zip(out.chunks_exact_mut(across)) {
            let at = (row / self.high - first) as usize * across;
            out.copy_from_slice(&all[at..at + across]);
        }
        Ok(())
    }
}

/// The blocks that a tile has a part in: of one row those of its columns, else all of their rows.
struct Blocks {
    /// Rows and columns of a block.
    block: [u64; 2],
    /// Blocks side by side.
    across: u64,
    /// The number of the first one, and how many follow on it, with it.
    first: u64,
    n: u64,
}

impl Blocks {
    fn of(tile: &super::Tile, block: [u64; 2], matrix: Matrix) -> Self {
        let across = matrix.blocks(block)[1];
        let first = tile.rows.start / block[0] * across + tile.cols.start / block[1];
        let last = (tile.rows.end - 1) / block[0] * across + (tile.cols.end - 1) / block[1];
        Self { block, across, first, n: last - first + 1 }
    }

    /// The number of an element's block, from the first one on.
    fn index(&self, row: u64, col: u64) -> usize {
        (row / self.block[0] * self.across + col / self.block[1] - self.first) as usize
    }
}

/// Columns in runs that share blocks of so many.
fn runs(cols: &Range<u64>, wide: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut at, end) = (cols.start, cols.end);
    std::iter::from_fn(move || {
        let run = at..end.min((at / wide).saturating_add(1).saturating_mul(wide));
        at = run.end;
        (!run.is_empty()).then_some(run)
    })
}

/// Whether scales may have this type.
fn shares(dtype: DType) -> bool {
    [DType::F16, DType::BF16, DType::F32, DType::F8_E8M0].contains(&dtype)
}

/// Numbers of a part.
fn numbers(stored: &Stored, info: &TensorInfo, first: u64, n: usize) -> Result<Vec<f32>> {
    let values = super::values(stored, info, first, n)?;
    if info.dtype == DType::F8_E8M0 && values.iter().any(|v| v.is_nan()) {
        return Err(Error::malformed(format!("tensor {:?}: a scale is 255, which is no number", info.name)));
    }
    Ok(values)
}

/// Numbers as a part holds them.
///
/// # Errors
/// `Unsupported` for a number that the type does not have: nothing is rounded here.
fn store_numbers(dtype: DType, values: impl Iterator<Item = f32>, out: &mut Vec<u8>) -> Result<()> {
    out.clear();
    for value in values {
        let same = |back: f32| back.to_bits() == value.to_bits();
        let exact = match dtype {
            DType::F32 => {
                out.extend(value.to_le_bytes());
                true
            }
            DType::F16 => {
                out.extend(f16_from_f32(value).to_le_bytes());
                same(f32_from_f16(f16_from_f32(value)))
            }
            DType::BF16 => {
                out.extend(bf16_from_f32(value).to_le_bytes());
                same(f32_from_bf16(bf16_from_f32(value)))
            }
            DType::F8_E8M0 => {
                // The exponent of f32 but for its least, which f32 has as a subnormal number.
                let byte = (value.to_bits() >> 23) as u8;
                out.push(byte);
                let back =
                    if byte == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(u32::from(byte) << 23) };
                byte != 255 && same(back)
            }
            _ => false,
        };
        if !exact {
            return Err(Error::unsupported(format!("{value} is no number of {dtype}")));
        }
    }
    Ok(())
}

/// Puts what the rows of a block share: a number for each block, of the first of its rows.
struct Shared<'a> {
    matrix: Matrix,
    block: [u64; 2],
    first: u64,
    /// Of each row its numbers.
    values: &'a [f32],
}

impl Shared<'_> {
    /// The rows that begin a block, with their numbers.
    ///
    /// # Errors
    /// `Misuse` where rows of a block have not the same.
    fn rows(&self) -> Result<Vec<(u64, &[f32])>> {
        let across = self.matrix.blocks(self.block)[1] as usize;
        let mut out: Vec<(u64, &[f32])> = Vec::new();
        let mut before: Option<&[f32]> = None;
        for (row, values) in (self.first..).zip(self.values.chunks_exact(across)) {
            if row % self.block[0] == 0 {
                out.push((row / self.block[0], values));
            } else if before
                .is_some_and(|b| !b.iter().map(|x| x.to_bits()).eq(values.iter().map(|x| x.to_bits())))
            {
                return Err(Error::misuse(format!(
                    "row {row} shares a scale with another, and has not the same"
                )));
            }
            before = Some(values);
        }
        Ok(out)
    }

    /// Writes them as a part of this type.
    fn put(&self, part: usize, dtype: DType, put: &mut super::write::Put<'_>) -> Result<()> {
        let across = self.matrix.blocks(self.block)[1];
        let mut bytes = Vec::new();
        for (row, values) in self.rows()? {
            store_numbers(dtype, values.iter().copied(), &mut bytes)?;
            put(part, row * across * dtype.type_size(), &bytes)?;
        }
        Ok(())
    }
}

/// That these are whole rows of a matrix from `first` on; returns how many.
fn count_rows(matrix: Matrix, first: u64, rows: &Rows, groups: u64) -> Result<u64> {
    let n = rows.codes.len() as u64 / matrix.cols;
    let fits = n * matrix.cols == rows.codes.len() as u64
        && first.checked_add(n).is_some_and(|end| end <= matrix.rows)
        && rows.scales.len() as u64 == n * groups
        && rows.zeros.len() == rows.scales.len();
    match fits {
        true => Ok(n),
        false => Err(Error::misuse(format!("{} codes are no rows of {}", rows.codes.len(), matrix.cols))),
    }
}

/// The number of a part.
fn index_of(parts: &[PartSize], name: &str) -> usize {
    parts.iter().position(|p| p.name == name).unwrap_or(parts.len())
}
