//! How a checkpoint is quantized already: of each packed matrix, and of all.

use std::io::{self, Write};
use std::path::Path;

use indexmap::IndexMap;
use regex::Regex;
use serde::Serialize;
use serde_json::Value as Json;

use crate::container::{Packing, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::model::groups;
use crate::packed;
use crate::plain;
use crate::tensor::{DType, TensorInfo};

/// What quantization has made of a checkpoint's weights.
#[derive(Debug, Serialize)]
pub struct Quantization {
    /// `quant_method` of config.json, or `qpack`.
    pub method: String,
    /// Why nothing more can be said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// That, where config and tensors contradict each other, or parts do not fit together.
    #[serde(skip)]
    pub contradiction: Option<Error>,
    /// Whether groups follow the order in which columns were quantized, where config.json says so.
    pub act_order: Option<bool>,
    /// All packed matrices.
    pub packed: Option<Sums>,
    /// All tensors.
    pub whole: Option<Sums>,
    /// Packed matrices of the same kind.
    pub kinds: Vec<Kind>,
    /// Tensors that are not packed, by their names with numbers left out.
    pub unquantized: Vec<Unquantized>,
    /// Each packed matrix.
    pub matrices: Vec<Matrix>,
}

/// Sums over some tensors.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sums {
    /// Number of tensors; a packed matrix counts as one.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes in the files, scales and all that belongs to a matrix included.
    pub bytes: u64,
    /// Bits for each weight.
    pub bits_per_weight: f64,
}

impl Sums {
    fn add(&mut self, parameters: u64, bytes: u64) {
        self.tensors += 1;
        self.parameters = self.parameters.saturating_add(parameters);
        self.bytes = self.bytes.saturating_add(bytes);
        self.bits_per_weight = bits_per_weight(self.parameters, self.bytes);
    }
}

fn bits_per_weight(parameters: u64, bytes: u64) -> f64 {
    bytes as f64 * 8.0 / parameters.max(1) as f64
}

/// Packed matrices of the same kind.
#[derive(Debug, Serialize)]
pub struct Kind {
    /// Bits of a code.
    pub bits: u32,
    /// Rows and columns that share a scale; 0 are all.
    pub block: [u64; 2],
    /// Whether codes mean values around 0; `None` where nothing says so.
    pub symmetric: Option<bool>,
    /// How many and how large.
    #[serde(flatten)]
    pub sums: Sums,
}

/// A packed matrix.
#[derive(Debug, Serialize)]
pub struct Matrix {
    /// Name when unpacked.
    pub name: String,
    /// Shape when unpacked.
    pub shape: Vec<u64>,
    /// Bits of a code.
    pub bits: u32,
    /// Rows and columns that share a scale; 0 are all.
    pub block: [u64; 2],
    /// Whether codes mean values around 0; `None` where nothing says so.
    pub symmetric: Option<bool>,
    /// Bytes of its parts.
    pub bytes: u64,
    /// Bits for each weight.
    pub bits_per_weight: f64,
    /// What it consists of: names and types.
    pub parts: IndexMap<String, &'static str>,
}

/// Tensors that are not packed, and whose names differ in numbers only.
#[derive(Debug, Serialize)]
pub struct Unquantized {
    /// Their name, with `*` for a number between dots.
    pub pattern: String,
    /// Their types.
    pub types: Vec<&'static str>,
    /// How many and how large.
    #[serde(flatten)]
    pub sums: Sums,
}

impl Quantization {
    /// Of the weights in `store`, and what the model says of them; `None` where they are not quantized.
    /// Errors name the file `config`.
    pub(super) fn of(store: Store, stated: Result<Option<Json>>, config: &Path) -> Option<Self> {
        let mut method = "unnamed".to_string();
        let unpacked = stated.and_then(|stated| {
            if let Some(name) = stated.as_ref().and_then(|s| s.get("quant_method")).and_then(Json::as_str) {
                method = name.to_string();
            }
            let (store, known) = packed::unpack(store, stated.as_ref())?;
            Ok(known.map(|_| (store, stated.unwrap_or_default())))
        });
        match unpacked {
            Ok(unpacked) => unpacked.map(|(store, stated)| Self::read(method, &store, &stated)),
            Err(e) => {
                let e = e.at(config);
                let error = Some(e.to_string());
                let contradiction = (e.kind() != ErrorKind::Unsupported).then_some(e);
                Some(Self { error, contradiction, ..Self::empty(method) })
            }
        }
    }

    /// Of a `.qpack` file; `None` where all tensors are what they are.
    pub(super) fn of_qpack(store: &Store) -> Option<Self> {
        let has_joined = store.tensors().iter().any(|t| store.is_joined(t));
        has_joined.then(|| Self::read("qpack".to_string(), store, &Json::Null))
    }

    fn empty(method: String) -> Self {
        Self {
            method,
            error: None,
            contradiction: None,
            act_order: None,
            packed: None,
            whole: None,
            kinds: Vec::new(),
            unquantized: Vec::new(),
            matrices: Vec::new(),
        }
    }

    fn read(method: String, store: &Store, stated: &Json) -> Self {
        let mut found = Self { act_order: act_order(stated), ..Self::empty(method) };
        let (mut packed, mut whole) = (Sums::default(), Sums::default());
        let mut kinds: IndexMap<_, Sums> = IndexMap::new();
        let mut unquantized: IndexMap<String, (Vec<&'static str>, Sums)> = IndexMap::new();
        for t in store.tensors() {
            let Some((packing, parts)) = store.packing(t) else {
                let (types, sums) = unquantized.entry(pattern(&t.name)).or_default();
                sums.add(t.elements(), t.nbytes);
                whole.add(t.elements(), t.nbytes);
                if !types.contains(&t.dtype.name()) {
                    types.push(t.dtype.name());
                }
                continue;
            };
            let matrix = Matrix::new(t, packing, parts, stated);
            for sums in [
                kinds.entry((matrix.bits, matrix.block, matrix.symmetric)).or_default(),
                &mut packed,
                &mut whole,
            ] {
                sums.add(t.elements(), matrix.bytes);
            }
            found.matrices.push(matrix);
        }
        found.kinds = kinds
            .into_iter()
            .map(|((bits, block, symmetric), sums)| Kind { bits, block, symmetric, sums })
            .collect();
        found.unquantized = unquantized
            .into_iter()
            .map(|(pattern, (types, sums))| Unquantized { pattern, types, sums })
            .collect();
        (found.packed, found.whole) = (Some(packed), Some(whole));
        found
    }

    /// Prints all but the single matrices.
    pub(super) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "quantization: {}", self.method)?;
        if let Some(error) = &self.error {
            writeln!(out, "  error: {error}")?;
        }
        if let Some(act_order) = self.act_order {
            writeln!(out, "  act-order: {}", if act_order { "yes" } else { "no" })?;
        }
        for (name, sums) in [("packed", &self.packed), ("whole", &self.whole)] {
            if let Some(s) = sums {
                let what = if name == "packed" { "matrices" } else { "tensors" };
                writeln!(
                    out,
                    "  {name}: {} {what}, {} weights, {} bytes, {:.3} bits per weight",
                    s.tensors, s.parameters, s.bytes, s.bits_per_weight
                )?;
            }
        }
        for kind in &self.kinds {
            let s = &kind.sums;
            writeln!(
                out,
                "    {}: {} matrices, {:.3} bits per weight",
                described(kind.bits, kind.block, kind.symmetric),
                s.tensors,
                s.bits_per_weight
            )?;
        }
        if !self.unquantized.is_empty() {
            writeln!(out, "  not quantized:")?;
        }
        let width = plain::width(self.unquantized.iter().map(|o| o.pattern.chars().count()), 0);
        for o in &self.unquantized {
            let (s, types) = (&o.sums, o.types.join(" "));
            writeln!(
                out,
                "    {:<width$}  {types:<4}  {:>5} tensors  {:>12} weights  {:>13} bytes",
                plain::line(&o.pattern),
                s.tensors,
                s.parameters,
                s.bytes
            )?;
        }
        Ok(())
    }

    /// Prints a line for each matrix whose name, or a part of which, matches.
    pub(super) fn print_matrices(&self, filter: Option<&Regex>, out: &mut impl Write) -> io::Result<()> {
        let matches = |m: &&Matrix| {
            filter.is_none_or(|r| r.is_match(&m.name) || m.parts.keys().any(|part| r.is_match(part)))
        };
        let shown: Vec<&Matrix> = self.matrices.iter().filter(matches).collect();
        if shown.is_empty() {
            return Ok(());
        }
        let name = plain::width(shown.iter().map(|m| m.name.chars().count()), 15);
        let shape = plain::width(shown.iter().map(|m| format!("{:?}", m.shape).len()), 5);
        writeln!(out, "\n{:<name$}  {:<shape$}  {:>6}  packing", "packed matrices", "shape", "bits/w")?;
        for m in shown {
            writeln!(
                out,
                "{:<name$}  {:<shape$}  {:>6.3}  {}; {}",
                plain::line(&m.name),
                format!("{:?}", m.shape),
                m.bits_per_weight,
                described(m.bits, m.block, m.symmetric),
                m.layout()
            )?;
        }
        Ok(())
    }
}

impl Matrix {
    fn new(t: &TensorInfo, packing: Packing, parts: &[TensorInfo], stated: &Json) -> Self {
        let bytes = parts.iter().map(|p| p.nbytes).sum();
        let [rows, cols] = packing.block;
        let is_scale = |p: &&TensorInfo| {
            is_float(p.dtype) && ends(&p.name, &[".scale", "_scale", "_scale_inv", " / scales"])
        };
        let one_scale = parts.iter().find(is_scale).is_some_and(|p| p.elements() == 1);
        let block = [if cols == 0 && one_scale { 0 } else { rows }, cols];
        Self {
            name: t.name.clone(),
            shape: t.shape.clone(),
            bits: packing.bits,
            block,
            symmetric: symmetric(parts, stated),
            bytes,
            bits_per_weight: bits_per_weight(t.elements(), bytes),
            parts: parts.iter().map(|p| (p.name.clone(), p.dtype.name())).collect(),
        }
    }

    /// What it consists of, by last names; of many the first, which tell the layout.
    fn layout(&self) -> String {
        const MOST: usize = 5;
        let stem = self.name.strip_suffix("weight").unwrap_or(&self.name);
        let mut parts: Vec<_> = self
            .parts
            .iter()
            .map(|(name, dtype)| format!("{} {dtype}", name.strip_prefix(stem).unwrap_or(name)))
            .collect();
        if parts.len() > MOST {
            let more = parts.len() - MOST;
            parts.truncate(MOST);
            parts.push(format!("{more} more"));
        }
        parts.join(", ")
    }
}

fn ends(name: &str, endings: &[&str]) -> bool {
    endings.iter().any(|ending| name.ends_with(ending))
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

/// `4 bits, groups of 128, symmetric`.
fn described(bits: u32, block: [u64; 2], symmetric: Option<bool>) -> String {
    let scales = groups(block);
    let sign = match symmetric {
        Some(true) => ", symmetric",
        Some(false) => ", asymmetric",
        None => "",
    };
    format!("{bits} bits, {scales}{sign}")
}

/// The name with `*` for each number between dots.
fn pattern(name: &str) -> String {
    let parts = name.split('.').map(|part| match part.bytes().all(|b| b.is_ascii_digit()) {
        true if !part.is_empty() => "*",
        _ => part,
    });
    parts.collect::<Vec<_>>().join(".")
}

/// Without zeros codes are symmetric; where there are zeros config.json may say that they are all in the
/// middle. Zeros that are floats are not.
fn symmetric(parts: &[TensorInfo], stated: &Json) -> Option<bool> {
    let zeros = parts.iter().find(|p| ends(&p.name, &[".qzeros", "_zero_point", ".zero", " / zeros"]));
    let Some(zeros) = zeros else { return Some(true) };
    if is_float(zeros.dtype) {
        return Some(false);
    }
    let flag = |key: &str| stated.get(key).and_then(Json::as_bool);
    flag("sym").or(flag("zero_point").map(|zeros| !zeros)).or_else(|| {
        let mut said = weights(stated).filter_map(|w| w.get("symmetric")?.as_bool());
        let first = said.next()?;
        said.all(|s| s == first).then_some(first)
    })
}

/// What config_groups of compressed-tensors says of weights.
fn weights(stated: &Json) -> impl Iterator<Item = &Json> {
    let groups = stated.get("config_groups").and_then(Json::as_object);
    groups.into_iter().flat_map(|g| g.values()).filter_map(|group| group.get("weights"))
}

fn act_order(stated: &Json) -> Option<bool> {
    let said = stated.get("desc_act").and_then(Json::as_bool);
    let mut orders = weights(stated).filter_map(|w| w.get("actorder")).peekable();
    said.or_else(|| {
        orders.peek().is_some().then(|| orders.any(|o| !matches!(o, Json::Null | Json::Bool(false))))
    })
}
