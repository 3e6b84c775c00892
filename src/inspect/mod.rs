//! Inspection: what a file or directory holds, from its headers alone.

mod coreml;
mod encoded;
mod quantization;

pub use coreml::{Feature, Function, Weight};
pub use encoded::{Encoded, OfEncoding};
pub use quantization::{Kind, Matrix, Quantization, Sums, Unquantized};

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use crate::container::Store;
use crate::container::coreml::chunks::is_model;
use crate::container::gguf::Gguf;
use crate::container::qpack::{Qpack, VERSION};
use crate::container::weights::Weights;
use crate::convert;
use crate::error::Result;
use crate::limits::Limits;
use crate::model::{Opened, metadata_of_gguf};
use crate::packed;
use crate::plain;
use crate::tensor::DType;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// What was inspected.
    pub path: PathBuf,
    /// `GGUF`, `safetensors`, `PyTorch`, `qpack`, `Hugging Face` or `Core ML`.
    pub format: &'static str,
    /// Facts about the container: version, byte order, alignment, shards.
    pub container: Map<String, Json>,
    /// Files, with their bytes.
    pub files: Vec<(PathBuf, u64)>,
    /// Metadata in file order; of a Hugging Face directory, config.json.
    pub metadata: Map<String, Json>,
    /// Tensors in file order.
    pub tensors: Vec<Tensor>,
    /// Sums over all tensors.
    pub totals: Totals,
    /// How the weights are quantized already, of a Hugging Face directory that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// The tensors of a `.qpack` file, each of which is one or several of `tensors`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub encoded: Vec<Encoded>,
    /// Sums of these by encoding.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    pub encodings: IndexMap<String, OfEncoding>,
    /// The functions of Core ML packages.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<Function>,
    /// The weights of Core ML packages.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<Weight>,
}

/// One tensor.
#[derive(Debug, Serialize)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Shape in the format's own order: GGUF has the row length first, Hugging Face last.
    pub shape: Vec<u64>,
    /// Type.
    #[serde(rename = "type")]
    pub dtype: DType,
    /// Which of the files.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// Share of all tensors' bytes.
    pub share: f64,
}

/// Sums over all tensors.
#[derive(Debug, Default, Serialize)]
pub struct Totals {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights; those of packed tensors as they are when unpacked.
    pub parameters: u64,
    /// Bytes of data.
    pub bytes: u64,
    /// Bits for each weight.
    pub bits_per_weight: f64,
    /// For each type: tensors, weights, bytes.
    pub types: IndexMap<&'static str, (usize, u64, u64)>,
}

/// What is printed of a report.
#[derive(Debug, Default)]
pub struct Filter {
    /// Tensors whose name matches; none at all when only metadata are wanted.
    pub tensor: Option<Regex>,
    /// Only metadata.
    pub metadata_only: bool,
    /// Arrays whole.
    pub whole_arrays: bool,
    /// The programs of Core ML packages, operation by operation.
    pub ops: bool,
}

/// Looks at `path` by its content.
///
/// # Errors
/// `Io` for no such path; `Unsupported` for what is none of the formats; what the readers say.
pub fn inspect(path: &Path, limits: &Limits) -> Result<Report> {
    if is_model(path) {
        return coreml::of_packages(path, limits);
    }
    match Opened::open(path, limits)? {
        Opened::Gguf(gguf) => Ok(of_gguf(path, &gguf)),
        Opened::Safetensors(opened) => {
            let metadata = opened.metadata.into_iter().flatten().map(|(k, v)| (k, json!(v))).collect();
            Ok(report(path, "safetensors", &opened.store, Map::new(), metadata, false))
        }
        Opened::Pytorch(store) => Ok(report(path, "PyTorch", &store, Map::new(), Map::new(), false)),
        Opened::Qpack(model) => of_qpack(path, model),
        Opened::Directory { dir, weights, config } => Ok(of_directory(path, &dir, weights, config, limits)),
    }
}

fn of_gguf(path: &Path, gguf: &Gguf) -> Report {
    let mut container = Map::new();
    container.insert("version".into(), json!(gguf.version));
    container
        .insert("byte_order".into(), json!(if gguf.big_endian { "big-endian" } else { "little-endian" }));
    container.insert("alignment".into(), json!(gguf.alignment));
    container.insert("data_offset".into(), json!(gguf.data_offset));
    container.insert("shards".into(), json!(gguf.shards));
    if gguf.trailing_bytes > 0 {
        container.insert("trailing_bytes".into(), json!(gguf.trailing_bytes));
    }
    let metadata = metadata_of_gguf(&gguf.metadata);
    report(path, "GGUF", &gguf.store, container, metadata, true)
}

fn of_qpack(path: &Path, model: Qpack) -> Result<Report> {
    let mut container = Map::new();
    container.insert("version".into(), json!(VERSION));
    let side: Vec<&str> = model.files().iter().map(|f| f.name.as_str()).collect();
    container.insert("side_files".into(), json!(side));
    // The last one names the others.
    if let Some((manifest, signature)) = model.seals().last() {
        let hex: String = manifest.iter().map(|b| format!("{b:02x}")).collect();
        container.insert("manifest_sha256".into(), json!(hex));
        container.insert("signature_bytes".into(), json!(signature));
    }
    container.insert("shards".into(), json!(model.manifests().count()));
    let metadata = model.manifests().next().map(|(_, m)| m.provenance.clone()).unwrap_or_default();
    let encoded = encoded::all(&model);
    let (parts, tensors) = model.into_parts()?;
    let mut report = report(path, "qpack", &parts, container, metadata, false);
    report.encodings = encoded::sums(&encoded);
    report.encoded = encoded;
    let store = packed::qpack::join(parts, &tensors)?;
    report.quantization = Quantization::of_qpack(&store);
    report.count_whole();
    Ok(report)
}

fn of_directory(
    path: &Path,
    dir: &Path,
    weights: Weights,
    config: Map<String, Json>,
    limits: &Limits,
) -> Report {
    let mut container = Map::new();
    container.insert("weights".into(), json!(weights.format));
    container.insert("shards".into(), json!(weights.store.files().len()));
    let mut report = report(path, "Hugging Face", &weights.store, container, config, false);
    let config = Json::Object(report.metadata.clone());
    let stated = convert::quantization(&config, dir, weights.values, limits);
    report.quantization = Quantization::of(weights.store, stated, &dir.join("config.json"));
    report.count_whole();
    report
}

impl Report {
    /// Weights are those of packed matrices as they are when unpacked.
    fn count_whole(&mut self) {
        if let Some(whole) = self.quantization.as_ref().and_then(|q| q.whole.as_ref()) {
            self.totals.parameters = whole.parameters;
            self.totals.bits_per_weight = whole.bits_per_weight;
        }
    }
}

fn report(
    path: &Path,
    format: &'static str,
    store: &Store,
    container: Map<String, Json>,
    metadata: Map<String, Json>,
    reversed: bool,
) -> Report {
    let bytes: u64 = store.tensors().iter().map(|t| t.nbytes).sum();
    let mut totals = Totals { tensors: store.tensors().len(), bytes, ..Totals::default() };
    let mut tensors = Vec::with_capacity(totals.tensors);
    for t in store.tensors() {
        let n = t.elements();
        totals.parameters += n;
        let of_type = totals.types.entry(t.dtype.name()).or_default();
        *of_type = (of_type.0 + 1, of_type.1 + n, of_type.2 + t.nbytes);
        let mut shape = t.shape.clone();
        if reversed {
            shape.reverse();
        }
        tensors.push(Tensor {
            name: t.name.clone(),
            shape,
            dtype: t.dtype,
            file: t.file,
            offset: t.offset,
            bytes: t.nbytes,
            share: t.nbytes as f64 / bytes.max(1) as f64,
        });
    }
    totals.bits_per_weight = bytes as f64 * 8.0 / totals.parameters.max(1) as f64;
    let files = store.files().iter().map(|f| (f.path().to_path_buf(), f.len())).collect();
    Report {
        path: path.to_path_buf(),
        format,
        container,
        files,
        metadata,
        tensors,
        totals,
        ..Report::default()
    }
}

/// Prints a report for people.
///
/// # Errors
/// As `out` fails.
pub fn print(report: &Report, filter: &Filter, out: &mut impl Write) -> io::Result<()> {
    if filter.tensor.is_none() {
        writeln!(out, "{}: {}", plain::line(&report.path.display().to_string()), report.format)?;
        for (key, value) in &report.container {
            writeln!(out, "  {key}: {}", text_of(value))?;
        }
        if report.format == "qpack" {
            encoded::print_provenance(&report.metadata, out)?;
        } else if !report.metadata.is_empty() {
            writeln!(out, "\nmetadata ({})", report.metadata.len())?;
            for (key, value) in &report.metadata {
                writeln!(
                    out,
                    "  {}: {}",
                    plain::line(key),
                    if filter.whole_arrays { value.to_string() } else { short(value) }
                )?;
            }
        }
        if let Some(quantization) = &report.quantization {
            writeln!(out)?;
            quantization.print(out)?;
        }
        writeln!(out)?;
    }
    if filter.metadata_only {
        return Ok(());
    }
    if report.format == coreml::FORMAT {
        if filter.tensor.is_none() {
            coreml::print_functions(&report.functions, filter.ops, out)?;
        }
        return if filter.ops { Ok(()) } else { coreml::print_weights(report, filter, out) };
    }
    if !report.encoded.is_empty() {
        encoded::print(&report.encoded, filter, out)?;
        if filter.tensor.is_none() {
            encoded::print_sums(&report.encodings, out)?;
        }
        return Ok(());
    }
    let wanted = |t: &&Tensor| filter.tensor.as_ref().is_none_or(|r| r.is_match(&t.name));
    let shown: Vec<&Tensor> = report.tensors.iter().filter(wanted).collect();
    let name = plain::width(shown.iter().map(|t| t.name.chars().count()), 4);
    let shape = plain::width(shown.iter().map(|t| format!("{:?}", t.shape).len()), 5);
    writeln!(
        out,
        "{:<name$}  {:<shape$}  {:<7}  {:>14}  {:>14}  {:>6}",
        "name", "shape", "type", "offset", "bytes", "share"
    )?;
    for t in shown {
        writeln!(
            out,
            "{:<name$}  {:<shape$}  {:<7}  {:>14}  {:>14}  {:>5.1}%",
            plain::line(&t.name),
            format!("{:?}", t.shape),
            t.dtype,
            t.offset,
            t.bytes,
            t.share * 100.0
        )?;
    }
    if let Some(quantization) = &report.quantization {
        quantization.print_matrices(filter.tensor.as_ref(), out)?;
    }
    if filter.tensor.is_none() {
        let t = &report.totals;
        writeln!(
            out,
            "\n{} tensors, {} weights, {} bytes, {:.3} bits per weight",
            t.tensors, t.parameters, t.bytes, t.bits_per_weight
        )?;
        for (name, (tensors, weights, bytes)) in &t.types {
            writeln!(out, "  {name:<7}  {tensors:>6} tensors  {weights:>14} weights  {bytes:>14} bytes")?;
        }
    }
    Ok(())
}

fn text_of(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

/// A line that fits a terminal: long strings and arrays are cut, and say how long they are.
fn short(value: &Json) -> String {
    const CHARS: usize = 80;
    const ITEMS: usize = 6;
    match value {
        Json::String(s) if s.chars().count() > CHARS => {
            let head: String = s.chars().take(CHARS).collect();
            format!("{:?}... ({} characters)", head, s.chars().count())
        }
        Json::Array(a) if a.len() > ITEMS => {
            let head: Vec<String> = a.iter().take(ITEMS).map(short).collect();
            format!("[{}, ... {} more]", head.join(", "), a.len() - ITEMS)
        }
        v => v.to_string(),
    }
}
