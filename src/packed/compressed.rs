//! compressed-tensors: integers in groups, packed or not, FP8 and FP4, as llm-compressor writes them.
//!
//! What lies where, of a linear layer `P` with `in` inputs and `out` outputs:
//!
//! - pack-quantized: `P.weight_packed` I32 `[out, ceil(in * bits / 32)]`, each row a stream of codes, lowest
//!   bits first; `P.weight_scale` `[out, groups]`, `[out, 1]` or `[1]`; `P.weight_shape` I64 `[2]`;
//!   where zeros are not all the middle, `P.weight_zero_point` I32 `[ceil(out * bits / 32), groups]`, a
//!   stream for each group; with act-order `P.weight_g_idx` I32 `[in]`. Codes and zeros are signed, and
//!   stored with `2^(bits - 1)` added.
//! - int-quantized, naive-quantized: `P.weight` I8 `[out, in]` at any width, scales as above,
//!   `P.weight_zero_point` I8.
//! - float-quantized: `P.weight` F8_E4M3, `P.weight_scale` `[1]`, `[out, 1]` or one for each block.
//! - nvfp4-pack-quantized, mxfp4-pack-quantized: as in [`super::fp4`], `P.weight_packed` and
//!   `P.weight_global_scale`.
//!
//! The layout shows in names and types of the tensors; `config_groups` tells widths. Source: the library's
//! `compressors/`, checked by values.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use serde_json::Value as Json;

use super::fp4::{Factor, Fp4};
use super::patterns::{At, Patterns};
use super::{FLOATS, Format, Packed, bytes, check, fp8, matrix, missing, unsupported, values, words};
use crate::block::bits;
use crate::container::grouped::{Grouped, Shape};
use crate::container::{Joined, Stored};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

pub(super) const FORMAT: Format = Format {
    method: "compressed-tensors",
    name: "compressed-tensors",
    marks: |t| [PACKED, ".weight_shape"].iter().any(|ending| t.name.ends_with(ending)),
    join,
};

const PACKED: &str = ".weight_packed";

fn join(packed: &Packed<'_>) -> Result<Vec<Joined>> {
    if let Some(format) = packed.config.get("format").and_then(Json::as_str)
        && ["marlin-24", "sparse-24-bitmask", "sparse-bitmask", "dense-sparse"].contains(&format)
    {
        return Err(unsupported("format", &format.into()));
    }
    if let Some(sparsity) = packed.config.get("sparsity_config").and_then(|s| s.get("format"))
        && sparsity != "dense"
    {
        return Err(unsupported("sparsity_config.format", sparsity));
    }
    let groups = Schemes::read(packed.config)?;
    let mut joined = Vec::new();
    for (stem, codes) in packed.ending(PACKED) {
        match codes.dtype {
            DType::U8 => joined.push(fp4(packed, stem, codes)?),
            _ => joined.push(integers(packed, stem, codes, groups.of(stem)?)?),
        }
    }
    for (stem, codes) in packed.ending(".weight").filter(|(_, t)| t.dtype == DType::I8) {
        joined.push(integers(packed, stem, codes, groups.of(stem)?)?);
    }
    joined.extend(fp8::join(packed, "_scale", |stem| Ok(groups.of(stem)?.block))?);
    Ok(joined)
}

/// What config_groups says of the weights of some modules.
struct Scheme {
    bits: u64,
    /// Columns of a group, where rows are divided.
    group_size: Option<u64>,
    /// Rows and columns of a block.
    block: Option<[u64; 2]>,
}

/// What config_groups says, and of which modules.
struct Schemes<'a> {
    all: Vec<Scheme>,
    /// Modules by their names.
    names: HashMap<&'a str, usize>,
    patterns: Patterns,
    /// The scheme of each pattern, in the order of the schemes.
    of_patterns: Vec<usize>,
    /// That of all linear layers.
    class: Option<usize>,
}

impl Scheme {
    fn read(group: &Json) -> Result<Self> {
        let weights = group.get("weights").filter(|w| w.is_object());
        let bits = weights.and_then(|w| w.get("num_bits")).and_then(Json::as_u64);
        let bits = bits.filter(|b| (1..=8).contains(b)).ok_or_else(|| {
            Error::malformed("quantization_config: weights.num_bits is no width from 1 to 8")
        })?;
        let group_size = weights.and_then(|w| w.get("group_size")).and_then(Json::as_u64).filter(|n| *n > 0);
        let block = match weights.and_then(|w| w.get("block_structure")) {
            None | Some(Json::Null) => None,
            Some(Json::String(s)) => s.split_once('x').map(|(h, w)| [h.parse(), w.parse()].map(Result::ok)),
            Some(sizes) => Some([0, 1].map(|i| sizes.get(i).and_then(Json::as_u64))),
        };
        let block = match block {
            None => None,
            Some([Some(h), Some(w)]) if h > 0 && w > 0 => Some([h, w]),
            Some(_) => return Err(Error::malformed("quantization_config: block_structure is no two sizes")),
        };
        Ok(Self { bits, group_size, block })
    }
}

impl<'a> Schemes<'a> {
    fn read(config: &'a Json) -> Result<Self> {
        let groups = config.get("config_groups").and_then(Json::as_object);
        let groups = groups.filter(|g| !g.is_empty()).ok_or_else(|| missing("config_groups"))?;
        if groups.len() > MOST_GROUPS {
            let n = groups.len();
            return Err(Error::limit(format!(
                "quantization_config: config_groups has {n} groups, at most {MOST_GROUPS} are allowed"
            )));
        }
        let mut schemes = Self {
            all: Vec::with_capacity(groups.len()),
            names: HashMap::new(),
            patterns: Patterns::new(At::Start),
            of_patterns: Vec::new(),
            class: None,
        };
        let mut seen = HashSet::new();
        for (name, group) in groups {
            schemes.add(group, &mut seen).map_err(|e| e.context(name))?;
        }
        Ok(schemes)
    }

    fn add(&mut self, group: &'a Json, seen: &mut HashSet<&'a str>) -> Result<()> {
        let scheme = self.all.len();
        self.all.push(Scheme::read(group)?);
        for target in group.get("targets").and_then(Json::as_array).into_iter().flatten() {
            let text = target.as_str().ok_or_else(|| unsupported("targets", target))?;
            match text.strip_prefix("re:") {
                // Of a pattern that comes twice, only the first can be the one that counts.
                Some(pattern) if !seen.insert(pattern) => {}
                Some(pattern) => {
                    self.patterns.add(pattern).map_err(|e| e.context("quantization_config"))?;
                    self.of_patterns.push(scheme);
                }
                // Classes begin with a capital: Linear.
                None if text.contains('.') || !text.starts_with(|c: char| c.is_ascii_uppercase()) => {
                    self.names.entry(text).or_insert(scheme);
                }
                None => {
                    self.class.get_or_insert(scheme);
                }
            }
        }
        Ok(())
    }

    /// The scheme of a module: by its name before its class, the first of several.
    fn of(&self, stem: &str) -> Result<&Scheme> {
        let named = self.names.get(stem).copied();
        // Patterns of later schemes need not be asked.
        let before = named.map_or(self.of_patterns.len(), |n| self.of_patterns.partition_point(|s| *s < n));
        let pattern = self.patterns.first(stem, before).map_err(|e| e.context("quantization_config"))?;
        let pattern = pattern.and_then(|i| self.of_patterns.get(i).copied());
        pattern.or(named).or(self.class).and_then(|scheme| self.all.get(scheme)).ok_or_else(|| {
            Error::malformed(format!("{stem:?} is packed, but config_groups has no target that it is"))
        })
    }
}

/// Most entries of config_groups: there can be one for each module.
const MOST_GROUPS: usize = 1 << 16;

fn integers(packed: &Packed<'_>, stem: &str, codes: &TensorInfo, scheme: &Scheme) -> Result<Joined> {
    let fail = |why: String| Error::malformed(format!("tensor {:?} {why}", codes.name));
    let [rows, row] = codes.shape[..] else {
        return Err(fail(format!("has shape {:?}, two dimensions were expected", codes.shape)));
    };
    let is_packed = codes.dtype != DType::I8;
    // Unpacked, codes of any width fill bytes.
    let width = if is_packed { scheme.bits as u32 } else { 8 };
    let mut parts = vec![codes.name.clone()];
    let cols = if is_packed {
        check(codes, &[DType::I32], &[rows, row])?;
        let shape = packed.part(&format!("{stem}.weight_shape"), &[DType::I64, DType::I32], &[2])?;
        let found = packed.store.read_all(shape)?;
        let size = shape.dtype.type_size() as usize;
        let number = |i: usize| {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&found[i * size..][..size]);
            u64::from_le_bytes(bytes)
        };
        let (stated, cols) = (number(0), number(1));
        let words = bits::bytes(cols, scheme.bits as u32).map(|n| n.div_ceil(4));
        if stated != rows || words != Some(row) {
            return Err(fail(format!(
                "has shape {:?}, which {} bits of {stated} x {cols} ({}) do not fill",
                codes.shape, scheme.bits, shape.name
            )));
        }
        parts.push(shape.name.clone());
        cols
    } else {
        row
    };
    let scale = format!("{stem}.weight_scale");
    let found = packed.store.get(&scale).map_or(&[][..], |t| &t.shape);
    let (shape, groups, of_row) = match *found {
        [] | [1] => (found.to_vec(), 1, false),
        [n] if n == rows => (vec![rows], 1, true),
        [_, n] if n > 0 && n <= cols.max(1) => (vec![rows, n], n, true),
        _ => (vec![rows, 1], 1, true),
    };
    let scales = packed.part(&scale, FLOATS, &shape)?.clone();
    let group_size = scheme.group_size.filter(|_| groups > 1).unwrap_or(cols.div_ceil(groups)).max(1);
    if cols.div_ceil(group_size) != groups.min(cols.max(1)) {
        return Err(fail(format!("has {cols} columns, and {groups} groups of {group_size} ({scale:?})")));
    }
    let zero = format!("{stem}.weight_zero_point");
    let zeros = match packed.store.get(&zero) {
        None => None,
        Some(_) if is_packed => {
            let words = bits::bytes(rows, scheme.bits as u32).map_or(0, |n| n.div_ceil(4));
            Some(packed.part(&zero, &[DType::I32], &[words, groups])?.clone())
        }
        Some(_) => Some(packed.part(&zero, &[DType::I8], &shape)?.clone()),
    };
    let g_idx = format!("{stem}.weight_g_idx");
    let g_idx = match packed.store.get(&g_idx) {
        None => None,
        Some(_) => Some(packed.part(&g_idx, &[DType::I32], &[cols])?.clone()),
    };
    parts.extend(
        [Some(&scales), zeros.as_ref(), g_idx.as_ref()].into_iter().flatten().map(|t| t.name.clone()),
    );
    parts.extend(packed.of_activations(stem));
    let shape = Shape { rows, cols, bits: width, group_size, groups };
    let codes = Matrix { shape, codes: codes.clone(), scales, of_row, zeros, g_idx };
    Ok(matrix(format!("{stem}.weight"), parts, codes))
}

fn fp4(packed: &Packed<'_>, stem: &str, codes: &TensorInfo) -> Result<Joined> {
    let fail = |why: String| Error::malformed(format!("tensor {:?} {why}", codes.name));
    let [outer @ .., bytes] = &codes.shape[..] else { return Err(fail("has no shape".into())) };
    let cols = bytes.checked_mul(2).ok_or_else(|| fail("is too large".into()))?;
    let scales = format!("{stem}.weight_scale");
    let global = packed.store.get(&format!("{stem}.weight_global_scale"));
    let group = if global.is_some() { 16 } else { 32 };
    if !cols.is_multiple_of(group) {
        return Err(fail(format!("has {cols} columns, no multiple of {group}")));
    }
    let types = if global.is_some() { &[DType::F8_E4M3][..] } else { &[DType::U8, DType::F8_E8M0] };
    let scales = packed.part(&scales, types, &[outer, &[cols / group]].concat())?;
    let factor = match global {
        Some(t) if t.elements() == 1 => {
            check(t, FLOATS, &t.shape)?;
            Factor::Over(t.clone())
        }
        Some(t) => return Err(fail(format!("has {} factors, one was expected", t.elements()))),
        None => Factor::None,
    };
    let parts = [codes, scales].into_iter().chain(global).map(|t| t.name.clone());
    Ok(Joined {
        name: format!("{stem}.weight"),
        dtype: DType::F32,
        shape: [outer, &[cols]].concat(),
        parts: parts.chain(packed.of_activations(stem)).collect(),
        view: Box::new(Fp4 { codes: codes.clone(), scales: scales.clone(), factor, group }),
    })
}

#[derive(Debug)]
struct Matrix {
    shape: Shape,
    /// I8, or words.
    codes: TensorInfo,
    scales: TensorInfo,
    /// Whether each row has scales of its own.
    of_row: bool,
    zeros: Option<TensorInfo>,
    g_idx: Option<TensorInfo>,
}

impl Matrix {
    /// What is added to codes and zeros, so that they are unsigned.
    fn middle(&self) -> u8 {
        1 << (self.shape.bits - 1)
    }
}

impl Grouped for Matrix {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn codes(&self, stored: &Stored, rows: Range<u64>, codes: &mut [u8]) -> Result<()> {
        let cols = self.shape.cols as usize;
        let row = self.codes.row();
        let found = bytes(stored, &self.codes, rows.start * row, ((rows.end - rows.start) * row) as usize)?;
        if self.codes.dtype == DType::I8 {
            codes.iter_mut().zip(found).for_each(|(code, byte)| *code = byte ^ 0x80);
            return Ok(());
        }
        let streams = found.chunks_exact(row as usize * 4);
        for (codes, stream) in codes.chunks_exact_mut(cols).zip(streams) {
            bits::unpack(stream, self.shape.bits, 0, codes);
        }
        Ok(())
    }

    fn lines(&self, stored: &Stored, rows: Range<u64>, scales: &mut [f32], zeros: &mut [f32]) -> Result<()> {
        let groups = self.shape.groups as usize;
        let n = scales.len();
        let (first, count) = if self.of_row { (rows.start * groups as u64, n) } else { (0, 1) };
        let found = values(stored, &self.scales, first, count)?;
        scales.iter_mut().enumerate().for_each(|(i, s)| *s = found[if self.of_row { i } else { 0 }]);
        zeros.fill(self.middle().into());
        let Some(t) = &self.zeros else { return Ok(()) };
        if t.dtype == DType::I8 {
            let found = bytes(stored, t, first, count)?;
            let zero = |i: usize| (found[if self.of_row { i } else { 0 }] ^ 0x80).into();
            zeros.iter_mut().enumerate().for_each(|(i, z)| *z = zero(i));
            return Ok(());
        }
        if zeros.is_empty() {
            return Ok(());
        }
        // A stream along the rows for each group: words of one stream lie a row apart.
        let bits = u64::from(self.shape.bits);
        let first_word = rows.start / 32 * bits;
        let last_word = (rows.end * bits).div_ceil(32);
        let table = words(stored, t, first_word * t.row(), ((last_word - first_word) * t.row()) as usize)?;
        let mut fields = vec![0; (rows.end - rows.start) as usize];
        for group in 0..groups {
            let stream: Vec<u8> =
                table[group..].iter().step_by(groups).flat_map(|word| word.to_le_bytes()).collect();
            bits::unpack(&stream, self.shape.bits, (rows.start % 32) as usize, &mut fields);
            for (row, field) in fields.iter().enumerate() {
                zeros[row * groups + group] = f32::from(*field);
            }
        }
        Ok(())
    }

    fn groups(&self, stored: &Stored) -> Result<Option<Vec<u32>>> {
        self.g_idx.as_ref().map(|t| super::groups_of(stored, t, &self.shape)).transpose()
    }
}
