//! Tensors as they are, into `.qpack`: what has an encoding there is moved into it, and everything else stays the
//! tensors it was. Nothing is rounded, and `restore` gives back each tensor bit by bit.

use std::sync::Arc;

use serde_json::Value as Json;

use super::integers::put_lines;
use super::restore::halves_exchanged;
use super::{put_integers, shares};
use crate::container::grouped::{Grouped, Rows, Shape};
use crate::container::qpack::{
    Codebook, Encoding, Integers, Nested, Origin, Part, Scaled, Segment, Source, Tensor, Zeros, part_name,
};
use crate::container::{Store, Stored};
use crate::error::{Error, ErrorKind, Result};
use crate::packed::write::Put;
use crate::tensor::{DType, TensorInfo};

/// A tensor for a `.qpack` file, and where its bytes come from.
#[derive(Debug)]
pub struct Taken {
    /// As the manifest has it, but for its SHA-256.
    pub tensor: Tensor,
    from: Supply,
}

#[derive(Debug)]
enum Supply {
    /// The data of a tensor of the store.
    Whole(TensorInfo),
    /// Integers in groups, and behind their parts bytes that are kept.
    Integers(Arc<dyn Grouped>, Option<Vec<u32>>, Vec<TensorInfo>),
    /// Bytes for each part.
    Parts(Vec<Bytes>),
}

#[derive(Debug)]
enum Bytes {
    Copied(TensorInfo),
    /// The halves of each byte change places.
    Exchanged(TensorInfo),
    Given(Vec<u8>),
}

/// Codes that are moved at a time, and bytes that are.
const CODES: u64 = 4 << 20;
const BUFFER: u64 = 1 << 20;

/// All tensors of a store whose `quantization_config` is `config`, in its order.
///
/// # Errors
/// As reads fail.
pub fn take(store: &Store, config: Option<&Json>) -> Result<Vec<Taken>> {
    let mut taken = Vec::with_capacity(store.tensors().len());
    for info in store.tensors() {
        let context = |e: Error| e.context(format_args!("tensor {:?}", info.name));
        let Some((packing, parts)) = store.packing(info) else {
            taken.push(plain(info).map_err(context)?);
            continue;
        };
        let joined =
            JoinedTensor { store, info, parts, block: packing.block, config: config.unwrap_or(&Json::Null) };
        match joined.encoded().map_err(context)? {
            Some(encoded) => taken.push(encoded),
            None => {
                for part in parts {
                    taken.push(Taken {
                        from: Supply::Parts(vec![Bytes::Copied(part.clone())]),
                        ..plain(part)?
                    });
                }
            }
        }
    }
    Ok(taken)
}

fn plain(info: &TensorInfo) -> Result<Taken> {
    let tensor = Tensor::new(&info.name, info.shape.clone(), Encoding::Plain(info.dtype))?;
    Ok(Taken { tensor, from: Supply::Whole(info.clone()) })
}

impl Taken {
    /// A tensor of `.qpack`, part by part, out of a store of parts. What is compressed in a way that is known will
    /// not be.
    ///
    /// # Errors
    /// `Misuse` for a tensor of another store.
    pub fn parts(store: &Store, mut tensor: Tensor) -> Result<Self> {
        let missing = || Error::misuse(format!("tensor {:?} is not of this store", tensor.name));
        let find = |part: &Part| store.get(&part_name(&tensor, part)).cloned().ok_or_else(missing);
        let infos = tensor.parts.iter().map(find).collect::<Result<Vec<_>>>()?;
        if !tensor.is_closed() {
            tensor.parts.iter_mut().for_each(|p| p.segment = Segment::plain(p.segment.content_bytes()));
        }
        let from = match (&tensor.encoding, &infos[..]) {
            (Encoding::Plain(_), [info]) if !tensor.is_closed() => Supply::Whole(info.clone()),
            _ => Supply::Parts(infos.into_iter().map(Bytes::Copied).collect()),
        };
        Ok(Self { tensor, from })
    }

    /// The tensor of the store whose data are all there is to it.
    pub fn whole(&self) -> Option<&TensorInfo> {
        match &self.from {
            Supply::Whole(info) => Some(info),
            _ => None,
        }
    }

    /// Writes all parts.
    ///
    /// # Errors
    /// As reads and `put` fail.
    pub fn write(&self, store: &Store, put: &mut Put<'_>) -> Result<()> {
        let stored = store.stored();
        match &self.from {
            Supply::Whole(info) => {
                // Whole blocks.
                let size = info.dtype.type_size();
                pieces(info.nbytes, (BUFFER / size).max(1) * size, |at, bytes| {
                    store.read(info, at, bytes)?;
                    put(0, at, bytes)
                })
            }
            Supply::Integers(matrix, g_idx, kept) => {
                let Encoding::Integers(e) = &self.tensor.encoding else {
                    return Err(Error::misuse("integers of another encoding"));
                };
                let shape = matrix.shape();
                let step = (CODES / shape.cols.max(1) / 32 * 32).max(32);
                let (mut rows, mut first) = (Rows::default(), 0);
                while first < shape.rows {
                    let end = shape.rows.min(first + step);
                    rows.read(&**matrix, stored, first..end)?;
                    put_integers(e, &self.tensor.shape, first, &rows, g_idx.as_deref(), put)?;
                    first = end;
                }
                let before = self.tensor.parts.len() - kept.len();
                kept.iter().enumerate().try_for_each(|(k, info)| copy(stored, info, before + k, put))
            }
            Supply::Parts(parts) => parts.iter().enumerate().try_for_each(|(k, part)| match part {
                Bytes::Copied(info) => copy(stored, info, k, put),
                Bytes::Given(bytes) => put(k, 0, bytes),
                Bytes::Exchanged(info) => pieces(info.nbytes, BUFFER, |at, bytes| {
                    stored.read(info, at, bytes)?;
                    halves_exchanged(bytes);
                    put(k, at, bytes)
                }),
            }),
        }
    }
}

fn copy(stored: &Stored, info: &TensorInfo, part: usize, put: &mut Put<'_>) -> Result<()> {
    let size = info.dtype.type_size();
    pieces(info.nbytes, (BUFFER / size).max(1) * size, |at, bytes| {
        stored.read(info, at, bytes)?;
        put(part, at, bytes)
    })
}

/// Goes through so many bytes in pieces.
pub(super) fn pieces(len: u64, step: u64, mut each: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; step.min(len) as usize];
    let mut at = 0;
    while at < len {
        let piece = &mut buffer[..step.min(len - at) as usize];
        each(at, piece)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// A joined tensor and what it is joined from.
struct JoinedTensor<'a> {
    store: &'a Store,
    info: &'a TensorInfo,
    parts: &'a [TensorInfo],
    /// Rows and columns that share a scale; 0 for all columns.
    block: [u64; 2],
    config: &'a Json,
}

impl<'a> JoinedTensor<'a> {
    /// The part whose name ends so.
    fn part(&self, ending: &str) -> Option<&'a TensorInfo> {
        self.parts.iter().find(|t| t.name.ends_with(ending))
    }

    /// In an encoding that gives the same values, and the same parts again; `None` where there is none.
    fn encoded(&self) -> Result<Option<Taken>> {
        if self.info.elements() == 0 {
            return Ok(None);
        }
        if let Some(qweight) = self.part(".qweight") {
            return self.gptq_or_awq(qweight);
        }
        if self.info.dtype == DType::MXFP4 {
            return self.mxfp4();
        }
        if self.parts.iter().any(|t| t.name.contains(".quant_state.bitsandbytes__")) {
            return self.four_bits();
        }
        if let Some(scales) = self.part(".SCB") {
            let weight = self.part(".weight").filter(|t| t.dtype == DType::I8);
            return weight.map_or(Ok(None), |weight| self.scaled("bitsandbytes", weight, scales, 127));
        }
        match (self.part(".weight_packed"), self.part(".weight"), self.part(".weight_scale")) {
            (Some(codes), _, Some(scales)) if codes.dtype == DType::I32 => {
                return self.compressed("pack-quantized", codes, scales);
            }
            (None, Some(codes), Some(scales)) if codes.dtype == DType::I8 => {
                return self.compressed("int-quantized", codes, scales);
            }
            _ => {}
        }
        let is_float = |t: &&TensorInfo| [DType::F8_E4M3, DType::F8_E5M2].contains(&t.dtype);
        let weight = self.parts.iter().find(|t| t.name == self.info.name).filter(is_float);
        let scales = ["_scale_inv", "_scale"].map(|suffix| format!("{}{suffix}", self.info.name));
        let scales = self.parts.iter().find(|t| scales.contains(&t.name));
        match (weight, scales) {
            (Some(weight), Some(scales)) => self.scaled("plain", weight, scales, 1),
            _ => Ok(None),
        }
    }

    /// A tensor in this encoding, whose parts come back from those named; what is not named is kept.
    fn made(
        &self,
        encoding: Encoding,
        layout: &str,
        from: &[(&TensorInfo, &str)],
    ) -> Result<(Tensor, Vec<TensorInfo>)> {
        let mut tensor = Tensor::new(&self.info.name, self.info.shape.clone(), encoding)?;
        let mut kept = Vec::new();
        let mut source = |t: &TensorInfo| {
            let named = from.iter().find(|(part, _)| part.name == t.name);
            let from = named.map(|(_, from)| from.to_string()).unwrap_or_else(|| {
                let name = format!("kept.{}", kept.len());
                tensor.parts.push(Part { name: name.clone(), segment: Segment::plain(t.nbytes) });
                kept.push(t.clone());
                name
            });
            Source { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone(), from }
        };
        let parts = self.parts.iter().map(&mut source).collect();
        tensor.origin = Some((&Origin { layout: layout.to_string(), parts }.json()).into());
        Ok((tensor, kept))
    }

    /// The integers behind it, where scales have a type that is known and columns are in order or listed, and
    /// each scale, zero and group is one that the encoding has.
    fn integers(&self, scales: &TensorInfo, of_row: bool, zeros: Zeros) -> Result<Option<Found>> {
        let Some((matrix, stored)) = self.store.grouped(self.info) else { return Ok(None) };
        let shape = matrix.shape();
        if !shares(scales.dtype) || shape.rows * shape.cols != self.info.elements() {
            return Ok(None);
        }
        let size = shape.group_size.min(shape.cols);
        let Some(groups) = found(matrix.groups(stored))? else { return Ok(None) };
        let is_in_order =
            |list: &Vec<u32>| (0..).zip(list).all(|(col, g): (u64, _)| col / size == u64::from(*g));
        let groups = groups.filter(|list| !is_in_order(list));
        let block = if of_row { [1, size] } else { [shape.rows, shape.cols] };
        let e = Integers { bits: shape.bits, block, scales: scales.dtype, zeros, g_idx: groups.is_some() };
        let fits = Encoding::Integers(e.clone()).parts(&self.info.shape).is_ok()
            && found(has_lines(&**matrix, stored, &e, &self.info.shape))?.is_some();
        Ok(fits.then(|| Found { matrix: matrix.clone(), encoding: e, groups }))
    }

    fn gptq_or_awq(&self, qweight: &TensorInfo) -> Result<Option<Taken>> {
        let (Some(qzeros), Some(scales)) = (self.part(".qzeros"), self.part(".scales")) else {
            return Ok(None);
        };
        let Some((matrix, _)) = self.store.grouped(self.info) else { return Ok(None) };
        let shape = matrix.shape();
        let (rows, cols, bits) = (shape.rows, shape.cols, u64::from(shape.bits));
        let whole = |n: u64, of: u64| n.is_multiple_of(of).then(|| n / of);
        let layout = match &qweight.shape[..] {
            [a, b] if Some(*a) == whole(cols * bits, 32) && *b == rows && rows.is_multiple_of(32) => "gptq",
            [a, b] if *a == cols && Some(*b) == whole(rows, 8) && bits == 4 => "awq",
            _ => return Ok(None),
        };
        let is_first =
            layout == "gptq" && self.config.get("checkpoint_format").is_none_or(|v| v != "gptq_v2");
        let Some(found) = self.integers(scales, true, Zeros::Codes(is_first.into()))? else {
            return Ok(None);
        };
        let mut from = vec![(qweight, "codes"), (qzeros, "zeros"), (scales, "scales")];
        if let Some(g_idx) = self.part(".g_idx") {
            from.push((g_idx, if found.groups.is_some() { "g_idx" } else { "columns" }));
        }
        self.of_integers(found, layout, &from).map(Some)
    }

    fn compressed(&self, layout: &str, codes: &TensorInfo, scales: &TensorInfo) -> Result<Option<Taken>> {
        let zero_point = self.part(".weight_zero_point");
        let zeros = if zero_point.is_some() { Zeros::Codes(0) } else { Zeros::Middle };
        let of_row = scales.elements() > 1 || self.info.shape.first() == Some(&1);
        let Some(found) = self.integers(scales, of_row, zeros)? else { return Ok(None) };
        let shape = found.matrix.shape();
        let fills = |n: u64| (n * u64::from(shape.bits)).is_multiple_of(32);
        // What words have left over is not known to be 0.
        let has_room = |_: &TensorInfo| fills(shape.rows) && of_row;
        if layout == "pack-quantized" && !(fills(shape.cols) && zero_point.is_none_or(has_room)) {
            return Ok(None);
        }
        let mut from = vec![(codes, "codes"), (scales, "scales")];
        from.extend(zero_point.map(|t| (t, "zeros")));
        let listed = if found.groups.is_some() { "g_idx" } else { "columns" };
        from.extend(self.part(".weight_g_idx").map(|t| (t, listed)));
        self.of_integers(found, layout, &from).map(Some)
    }

    fn of_integers(&self, found: Found, layout: &str, from: &[(&TensorInfo, &str)]) -> Result<Taken> {
        let (tensor, kept) = self.made(Encoding::Integers(found.encoding), layout, from)?;
        Ok(Taken { tensor, from: Supply::Integers(found.matrix, found.groups, kept) })
    }

    /// Bytes for each part, those that are kept last.
    fn of_parts(
        &self,
        encoding: Encoding,
        layout: &str,
        from: &[(&TensorInfo, &str)],
        parts: Vec<Bytes>,
    ) -> Result<Taken> {
        let (tensor, kept) = self.made(encoding, layout, from)?;
        let parts = parts.into_iter().chain(kept.into_iter().map(Bytes::Copied)).collect();
        Ok(Taken { tensor, from: Supply::Parts(parts) })
    }

    fn scaled(
        &self,
        layout: &str,
        weight: &TensorInfo,
        scales: &TensorInfo,
        divisor: u64,
    ) -> Result<Option<Taken>> {
        let [outer @ .., rows, cols] = &self.info.shape[..] else { return Ok(None) };
        let high = self.block[0].min(*rows);
        let wide = if self.block[1] == 0 { *cols } else { self.block[1].min(*cols) };
        let stack: u64 = outer.iter().product();
        // Blocks go on from one matrix of a stack to the next only in this encoding.
        let blocks = stack.checked_mul(rows.div_ceil(high)).and_then(|n| n.checked_mul(cols.div_ceil(wide)));
        let is_even = stack == 1 || rows.is_multiple_of(high);
        if !is_even
            || blocks != Some(scales.elements())
            || !shares(scales.dtype)
            || weight.shape != self.info.shape
        {
            return Ok(None);
        }
        let e = Scaled { dtype: weight.dtype, block: [high, wide], scales: scales.dtype, divisor };
        let parts = vec![Bytes::Copied(weight.clone()), Bytes::Copied(scales.clone())];
        let from = [(weight, "data"), (scales, "scales")];
        self.of_parts(Encoding::Scaled(e), layout, &from, parts).map(Some)
    }

    fn four_bits(&self) -> Result<Option<Taken>> {
        let n = self.info.elements();
        let weight = self.parts.iter().find(|t| t.name == self.info.name);
        let state = self.parts.iter().find(|t| t.name.contains(".quant_state.bitsandbytes__"));
        // The longer names end so too.
        let named = |suffix: &str| {
            let name = format!("{}.{suffix}", self.info.name);
            self.parts.iter().find(|t| t.name == name)
        };
        let (Some(weight), Some(state), Some(absmax), Some(map)) =
            (weight, state, named("absmax"), named("quant_map"))
        else {
            return Ok(None);
        };
        // Half a byte would be left over.
        if !n.is_multiple_of(2) || map.dtype != DType::F32 {
            return Ok(None);
        }
        let stored = self.store.stored();
        let block = [1, self.block[1].clamp(1, n)];
        let mut e = Codebook {
            bits: 4,
            block,
            flat: true,
            scales: Some(absmax.dtype),
            nested: None,
            table: DType::F32,
            tables: [1, n],
        };
        let mut from = vec![(weight, "codes"), (map, "table"), (absmax, "scales")];
        let mut parts =
            vec![Bytes::Exchanged(weight.clone()), Bytes::Copied(map.clone()), Bytes::Copied(absmax.clone())];
        if let (Some(outer), Some(table)) = (named("nested_absmax"), named("nested_quant_map")) {
            let bytes = crate::packed::bytes(stored, state, 0, state.nbytes as usize)?;
            let fields: Json = serde_json::from_slice(&bytes).unwrap_or_default();
            let size = fields.get("nested_blocksize").and_then(Json::as_u64).filter(|n| *n > 0);
            let offset = fields.get("nested_offset").and_then(Json::as_f64);
            let (Some(size), Some(offset)) = (size, offset) else { return Ok(None) };
            if outer.dtype != DType::F32 || table.dtype != DType::F32 || absmax.dtype != DType::U8 {
                return Ok(None);
            }
            e.scales = Some(DType::F32);
            e.nested = Some(Nested { block: size.min(n.div_ceil(block[1])) });
            from.extend([(table, "scales_table"), (outer, "scales_scales")]);
            parts.extend([
                Bytes::Copied(table.clone()),
                Bytes::Copied(outer.clone()),
                Bytes::Given((offset as f32).to_le_bytes().to_vec()),
            ]);
        } else if !shares(absmax.dtype) {
            return Ok(None);
        }
        self.of_parts(Encoding::Codebook(e), "bitsandbytes", &from, parts).map(Some)
    }

    fn mxfp4(&self) -> Result<Option<Taken>> {
        let (Some(blocks), Some(scales)) = (self.part("_blocks"), self.part("_scales")) else {
            return Ok(None);
        };
        let (tensor, kept) =
            self.made(Encoding::Plain(DType::MXFP4), "mxfp4", &[(blocks, "blocks"), (scales, "scales")])?;
        // A plain tensor keeps nothing.
        let is_all = kept.is_empty();
        Ok(is_all.then(|| Taken { tensor, from: Supply::Whole(self.info.clone()) }))
    }
}

/// `None` where it is the values that do not fit.
fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(e) if matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Unsupported) => Ok(None),
        other => other.map(Some),
    }
}

/// That the encoding has all scales and zeros of a matrix, bit by bit.
fn has_lines(matrix: &dyn Grouped, stored: &Stored, e: &Integers, shape: &[u64]) -> Result<()> {
    let Shape { rows, groups, .. } = *matrix.shape();
    let step = (CODES / groups.max(1) / 32 * 32).max(32);
    let (mut lines, mut first) = (Rows::default(), 0);
    while first < rows {
        let end = rows.min(first + step);
        let n = ((end - first) * groups) as usize;
        lines.scales.resize(n, 0.0);
        lines.zeros.resize(n, 0.0);
        matrix.lines(stored, first..end, &mut lines.scales, &mut lines.zeros)?;
        put_lines(e, shape, first, &lines, &mut |_, _, _| Ok(()))?;
        first = end;
    }
    Ok(())
}

/// Integers of a joined tensor.
struct Found {
    matrix: Arc<dyn Grouped>,
    encoding: Integers,
    /// The group of each column, where that has to be said.
    groups: Option<Vec<u32>>,
}
