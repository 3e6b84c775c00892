//! The tensors of a `.qpack` file as its manifest has them, and where they come from.

use std::io::{self, Write};

use indexmap::IndexMap;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::{Filter, short, text_of};
use crate::container::qpack::{Kept, Qpack, Tensor};
use crate::model::encoding;
use crate::plain;

/// A tensor of a `.qpack` file.
#[derive(Debug, Serialize)]
pub struct Encoded {
    /// Name.
    pub name: String,
    /// Shape, the outermost dimension first.
    pub shape: Vec<u64>,
    /// What it is in a model, where the file says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// How it is stored, as the manifest has it.
    pub encoding: Json,
    /// The same in words.
    pub stored_as: String,
    /// The layout of the tensors that it was made of, and becomes again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// Bytes in the file.
    pub bytes: u64,
    /// Bytes without compression.
    pub content_bytes: u64,
    /// Bits in the file for each weight.
    pub bits_per_weight: f64,
    /// Bytes of its parts in the file.
    pub parts: IndexMap<String, u64>,
}

/// Sums over the tensors of an encoding.
#[derive(Debug, Default, Serialize)]
pub struct OfEncoding {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes in the file.
    pub bytes: u64,
    /// Bytes without compression.
    pub content_bytes: u64,
    /// Bits in the file for each weight.
    pub bits_per_weight: f64,
}

impl Encoded {
    fn of(t: &Tensor) -> Self {
        let segments = || t.parts.iter().map(|p| &p.segment);
        let bytes = segments().map(|s| s.bytes).sum();
        let origin = t.origin.as_ref().map(Kept::fields).unwrap_or_default();
        let origin = origin.get("layout").and_then(Json::as_str);
        Self {
            name: t.name.clone(),
            shape: t.shape.clone(),
            role: t.role.clone(),
            encoding: t.encoding.json(),
            stored_as: encoding(&t.encoding, &t.shape),
            origin: origin.map(String::from),
            bytes,
            content_bytes: segments().map(|s| s.content_bytes()).sum(),
            bits_per_weight: bits(bytes, t.shape.iter().product()),
            parts: t.parts.iter().map(|p| (p.name.clone(), p.segment.bytes)).collect(),
        }
    }

    fn parameters(&self) -> u64 {
        self.shape.iter().product() // below 2^63, as was checked at opening
    }
}

pub(super) fn bits(bytes: u64, parameters: u64) -> f64 {
    bytes as f64 * 8.0 / parameters.max(1) as f64
}

/// All tensors of a file.
pub(super) fn all(model: &Qpack) -> Vec<Encoded> {
    model.tensors().map(Encoded::of).collect()
}

/// Sums by encoding, in words.
pub(super) fn sums(tensors: &[Encoded]) -> IndexMap<String, OfEncoding> {
    let mut sums: IndexMap<String, OfEncoding> = IndexMap::new();
    for t in tensors {
        let of = match sums.get_mut(&t.stored_as) {
            Some(of) => of,
            None => sums.entry(t.stored_as.clone()).or_default(),
        };
        of.tensors += 1;
        of.parameters = of.parameters.saturating_add(t.parameters());
        of.bytes = of.bytes.saturating_add(t.bytes);
        of.content_bytes = of.content_bytes.saturating_add(t.content_bytes);
    }
    sums.values_mut().for_each(|of| of.bits_per_weight = bits(of.bytes, of.parameters));
    sums
}

/// `, 70.1 % of the bytes without compression`; nothing where there is none.
fn ratio(bytes: u64, content: u64) -> String {
    match bytes == content {
        true => String::new(),
        false => format!(", {:.1} % of what it stands for", bytes as f64 * 100.0 / content.max(1) as f64),
    }
}

/// A line for each tensor.
pub(super) fn print(tensors: &[Encoded], filter: &Filter, out: &mut impl Write) -> io::Result<()> {
    let wanted = |t: &&Encoded| filter.tensor.as_ref().is_none_or(|r| r.is_match(&t.name));
    let shown: Vec<&Encoded> = tensors.iter().filter(wanted).collect();
    let name = plain::width(shown.iter().map(|t| t.name.chars().count()), 4);
    let shape = plain::width(shown.iter().map(|t| format!("{:?}", t.shape).len()), 5);
    writeln!(out, "{:<name$}  {:<shape$}  {:>14}  {:>7}  stored as", "name", "shape", "bytes", "bits/w")?;
    for t in shown {
        write!(
            out,
            "{:<name$}  {:<shape$}  {:>14}  {:>7.3}  {}{}",
            plain::line(&t.name),
            format!("{:?}", t.shape),
            t.bytes,
            t.bits_per_weight,
            t.stored_as,
            ratio(t.bytes, t.content_bytes)
        )?;
        if let Some(origin) = &t.origin {
            write!(out, "; from {origin}")?;
        }
        if let Some(role) = &t.role {
            write!(out, "; {role}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A line for all, and one for each encoding.
pub(super) fn print_sums(sums: &IndexMap<String, OfEncoding>, out: &mut impl Write) -> io::Result<()> {
    let sum = |of: fn(&OfEncoding) -> u64| sums.values().map(of).fold(0, u64::saturating_add);
    let (weights, bytes) = (sum(|s| s.parameters), sum(|s| s.bytes));
    writeln!(
        out,
        "\n{} tensors, {weights} weights, {bytes} bytes, {:.3} bits per weight{}",
        sums.values().map(|s| s.tensors).sum::<usize>(),
        bits(bytes, weights),
        ratio(bytes, sum(|s| s.content_bytes))
    )?;
    for (name, of) in sums {
        writeln!(
            out,
            "  {:>6} tensors  {:>14} weights  {:>14} bytes  {:>7.3} bits/w  {name}{}",
            of.tensors,
            of.parameters,
            of.bytes,
            of.bits_per_weight,
            ratio(of.bytes, of.content_bytes)
        )?;
    }
    Ok(())
}

/// Where a file comes from: files a line each, options as they were given.
pub(super) fn print_provenance(provenance: &Map<String, Json>, out: &mut impl Write) -> io::Result<()> {
    if provenance.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nprovenance")?;
    for (key, value) in provenance {
        match value {
            Json::Array(list) => {
                writeln!(out, "  {key}:")?;
                list.iter().try_for_each(|item| writeln!(out, "    {}", line(item)))?;
            }
            Json::Object(fields) if !fields.is_empty() => writeln!(out, "  {key}: {}", line(value))?,
            _ => writeln!(out, "  {key}: {}", text_of(value))?,
        }
    }
    Ok(())
}

/// `a 1, b 2`; names without their key.
fn line(value: &Json) -> String {
    let Json::Object(fields) = value else { return short(value) };
    let field = |(key, value): (&String, &Json)| match key.as_str() {
        "name" => text_of(value),
        "bytes" => format!("{value} bytes"),
        _ => format!("{key} {}", value.as_str().map_or_else(|| line(value), String::from)),
    };
    // What it is called comes first.
    let (names, rest): (Vec<_>, Vec<_>) = fields.iter().partition(|(key, _)| *key == "name");
    names.into_iter().chain(rest).map(field).collect::<Vec<_>>().join(", ")
}
