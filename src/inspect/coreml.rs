//! What Core ML packages hold: functions with their interfaces and operations, and weights with their encodings.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::encoded::{OfEncoding, bits, print_sums};
use super::{Filter, Report, Totals};
use crate::container::coreml::mil::{self, ValueType};
use crate::container::coreml::model::{
    ArrayFeatureType, FeatureDescription, FeatureKind, Flexibility, ModelDescription, SizeRange,
};
use crate::container::coreml::package::{MANIFEST, MODEL};
use crate::container::coreml::{Constant, DataType, Form, Package, Place, chunks, constants};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::mil::Text;
use crate::plain;

/// What the format is called.
pub(super) const FORMAT: &str = "Core ML";

/// A function of a package.
#[derive(Debug, Serialize)]
pub struct Function {
    /// The package, of a model in several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Its name.
    pub name: String,
    /// Whether it is called where none is asked for.
    pub is_default: bool,
    /// The set of operators it is written in: `CoreML8` is that of iOS 18.
    pub opset: String,
    /// Inputs.
    pub inputs: Vec<Feature>,
    /// What it keeps from call to call.
    pub states: Vec<Feature>,
    /// Outputs.
    pub outputs: Vec<Feature>,
    /// How many there are of each operation.
    pub operations: BTreeMap<String, usize>,
    /// The program as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// An input, an output or a state.
#[derive(Debug, Serialize)]
pub struct Feature {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    #[serde(rename = "type")]
    pub data_type: String,
    /// Its shape; `null` for sizes that are not known before a call.
    pub shape: Vec<Option<u64>>,
    /// Shapes that are taken, where there are several: least and largest size of each dimension, no largest one
    /// where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranges: Option<Vec<(u64, Option<u64>)>>,
    /// The same where they are listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shapes: Option<Vec<Vec<i64>>>,
}

/// A weight of a package.
#[derive(Debug, Serialize)]
pub struct Weight {
    /// The package, of a model in several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// What the program calls it.
    pub name: String,
    /// Its shape once decoded, outermost dimension first.
    pub shape: Vec<u64>,
    /// How it is encoded, in words.
    pub encoding: String,
    /// Bits that are stored for an element.
    pub bits_per_weight: f64,
    /// Bytes of all that is stored for it.
    pub bytes: u64,
    /// Where its blobs begin in the weight file: codes, scales and so on; those that stand in the program have none.
    pub blobs: Vec<u64>,
}

impl Weight {
    fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |n: u64, size| n.saturating_mul(*size))
    }
}

/// Looks at a package, or at a directory of packages.
pub(super) fn of_packages(path: &Path, limits: &Limits) -> Result<Report> {
    let paths = chunks::packages(path, limits)?;
    let mut report = Report { path: path.into(), format: FORMAT, ..Report::default() };
    let mut distinct = 0u64;
    for at in &paths {
        let package = Package::open(at, limits)?;
        let name = (paths.len() > 1)
            .then(|| at.file_name().map(|name| name.to_string_lossy().into_owned()))
            .flatten();
        describe(&mut report, &package);
        distinct = distinct.saturating_add(add(&mut report, &package, name.as_deref())?);
    }
    if paths.len() > 1 {
        report.container.insert("packages".into(), json!(paths.len()));
    }
    let parameters = report.weights.iter().map(Weight::elements).fold(0, u64::saturating_add);
    report.totals = Totals {
        tensors: report.weights.len(),
        parameters,
        bytes: distinct,
        bits_per_weight: bits(distinct, parameters),
        ..Totals::default()
    };
    for weight in &report.weights {
        let of: &mut OfEncoding = report.encodings.entry(weight.encoding.clone()).or_default();
        of.tensors += 1;
        of.parameters = of.parameters.saturating_add(weight.elements());
        of.bytes = of.bytes.saturating_add(weight.bytes);
        of.content_bytes = of.bytes;
        of.bits_per_weight = bits(of.bytes, of.parameters);
    }
    Ok(report)
}

/// What a model says of itself; of several packages, what the first one says.
fn describe(report: &mut Report, package: &Package) {
    let model = package.model();
    let files = [MANIFEST, MODEL].map(|name| package.path().join(name));
    let length = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
    report.files.extend(files.into_iter().map(|path| {
        let bytes = length(&path);
        (path, bytes)
    }));
    let weights = package.weights().values().map(|file| file.file());
    report.files.extend(weights.map(|file| (file.path().to_path_buf(), file.len())));
    if !report.container.is_empty() {
        return;
    }
    report.container.insert("specification".into(), json!(model.specification_version));
    if !package.unknown().is_empty() {
        report.container.insert("unknown_fields".into(), json!(format!("{:?}", package.unknown())));
    }
    let said = &model.description.metadata;
    let plain = [
        ("shortDescription", &said.short_description),
        ("versionString", &said.version_string),
        ("author", &said.author),
        ("license", &said.license),
    ];
    let mut metadata: Map<String, Json> = plain
        .into_iter()
        .filter(|(_, text)| !text.is_empty())
        .map(|(key, text)| (key.to_string(), json!(text)))
        .collect();
    metadata.extend(said.user_defined.iter().map(|(key, text)| (key.clone(), json!(text))));
    report.metadata = metadata;
}

/// Returns the bytes of what is stored for weights, each counted once.
fn add(report: &mut Report, package: &Package, name: Option<&str>) -> Result<u64> {
    let model = package.model();
    let description = &model.description;
    let (mut seen, mut blobs, mut bytes) = (HashMap::<String, Arc<Constant>>::new(), HashSet::new(), 0u64);
    for (function_name, body) in &model.program.functions {
        let in_function = |e: Error| e.context(format_args!("function {function_name:?}")).at(package.path());
        report.functions.push(function(description, name, function_name, body).map_err(in_function)?);
        for constant in weights(constants(package, body).map_err(in_function)?) {
            if seen.get(&constant.name).is_some_and(|other| *other == constant) {
                continue;
            }
            for (_, place) in constant.stored() {
                match place {
                    Place::File(file, blob) if !blobs.insert((Arc::clone(file), blob.record)) => {}
                    _ => bytes = bytes.saturating_add(place.bytes()),
                }
            }
            report.weights.push(weight(&constant, name));
            seen.insert(constant.name.clone(), constant);
        }
    }
    Ok(bytes)
}

/// Constants that are weights: numbers with a fraction that are decoded, or lie in a weight file, and are not only
/// parts of others.
fn weights(all: Vec<Arc<Constant>>) -> Vec<Arc<Constant>> {
    let parts: HashSet<String> =
        all.iter().flat_map(|constant| constant.parts()).map(|(_, part)| part.name.clone()).collect();
    let is_float =
        |c: &Constant| matches!(c.data_type, DataType::Float16 | DataType::Float32 | DataType::BFloat16);
    let is_decoded = |c: &Constant| !matches!(c.form, Form::Plain(_));
    let is_weight =
        |c: &Constant| is_float(c) && (is_decoded(c) || c.is_in_file()) && !parts.contains(&c.name);
    all.into_iter().filter(|constant| is_weight(constant)).collect()
}

fn weight(constant: &Constant, package: Option<&str>) -> Weight {
    let blob = |place: &Place| match place {
        Place::File(_, blob) => Some(blob.record),
        Place::Immediate(_) => None,
    };
    let bytes = constant.bytes();
    Weight {
        package: package.map(String::from),
        name: constant.name.clone(),
        shape: constant.shape.clone(),
        encoding: constant.encoding(),
        bits_per_weight: bits(bytes, constant.elements()),
        bytes,
        blobs: constant.stored().into_iter().filter_map(|(_, place)| blob(place)).collect(),
    }
}

fn function(
    description: &ModelDescription,
    package: Option<&str>,
    name: &str,
    body: &mil::Function,
) -> Result<Function> {
    let described = description.functions.iter().find(|f| f.name == name);
    let inputs = described.map_or(&description.input, |f| &f.input);
    let mut function = Function {
        package: package.map(String::from),
        name: name.into(),
        is_default: description.functions.is_empty() || description.default_function_name == name,
        opset: body.opset.clone(),
        inputs: Vec::new(),
        states: Vec::new(),
        outputs: Vec::new(),
        operations: BTreeMap::new(),
        text: Some(Text(body).to_string()),
    };
    let described: HashMap<&str, &FeatureDescription> =
        inputs.iter().rev().map(|feature| (feature.name.as_str(), feature)).collect();
    for input in &body.inputs {
        let described = described.get(input.name.as_str()).copied();
        let feature =
            feature(&input.name, &input.value_type, described).map_err(|e| e.context(&input.name))?;
        match input.value_type {
            ValueType::State(_) => function.states.push(feature),
            _ => function.inputs.push(feature),
        }
    }
    let Some(block) = body.block_specializations.get(&body.opset) else { return Ok(function) };
    let results = block.operations.iter().flat_map(|o| &o.outputs).chain(&body.inputs);
    let wanted: HashSet<&str> = block.outputs.iter().map(String::as_str).collect();
    let mut found: HashMap<&str, &ValueType> = HashMap::with_capacity(wanted.len());
    for result in results.filter(|result| wanted.contains(result.name.as_str())) {
        found.entry(&result.name).or_insert(&result.value_type);
    }
    for name in &block.outputs {
        if let Some(value_type) = found.get(name.as_str()) {
            let feature = feature(name, value_type, None).map_err(|e| e.context(name))?;
            function.outputs.push(feature);
        }
    }
    for operation in &block.operations {
        *function.operations.entry(operation.kind.clone()).or_default() += 1;
    }
    Ok(function)
}

fn feature(name: &str, value_type: &ValueType, described: Option<&FeatureDescription>) -> Result<Feature> {
    let held = match value_type {
        ValueType::State(inner) => &*inner.0,
        other => other,
    };
    let (data_type, shape) = match held {
        ValueType::Tensor(tensor) => (tensor.data_type.to_string(), tensor.shape()?),
        _ => ("no tensor".into(), Vec::new()),
    };
    let array = described.and_then(|f| match &f.feature_type.kind {
        FeatureKind::MultiArray(array) => Some(array),
        _ => None,
    });
    let (mut ranges, mut shapes) = (None, None);
    match array.map(|array: &ArrayFeatureType| &array.flexibility) {
        Some(Flexibility::Range(sizes)) => {
            let range = |r: &SizeRange| (r.lower_bound, u64::try_from(r.upper_bound).ok());
            ranges = Some(sizes.0.iter().map(range).collect());
        }
        Some(Flexibility::Enumerated(list)) => {
            shapes = Some(list.0.iter().map(|shape| shape.0.clone()).collect());
        }
        _ => {}
    }
    Ok(Feature { name: name.into(), data_type, shape, ranges, shapes })
}

impl Feature {
    /// `[1, 1..64]`.
    fn sizes(&self) -> String {
        let size = |(i, size): (usize, &Option<u64>)| match (size, &self.ranges) {
            (Some(n), _) => n.to_string(),
            (None, Some(ranges)) => match ranges.get(i) {
                Some((least, Some(most))) => format!("{least}..{most}"),
                Some((least, None)) => format!("{least}.."),
                None => "?".into(),
            },
            (None, None) => "?".into(),
        };
        let sizes: Vec<String> = self.shape.iter().enumerate().map(size).collect();
        let listed = match &self.shapes {
            Some(list) => format!(", one of {} shapes", list.len()),
            None => String::new(),
        };
        format!("[{}]{listed}", sizes.join(", "))
    }
}

/// Prints the functions, with `ops` the program of each.
pub(super) fn print_functions(functions: &[Function], ops: bool, out: &mut impl Write) -> io::Result<()> {
    for f in functions {
        let of = f.package.as_ref().map_or(String::new(), |package| format!(" of {package}"));
        let is_one_of = functions.iter().filter(|other| other.package == f.package).nth(1).is_some();
        let default = if f.is_default && is_one_of { ", the default" } else { "" };
        writeln!(out, "function {}{of} ({}{default})", f.name, f.opset)?;
        if let Some(text) = f.text.as_ref().filter(|_| ops) {
            text.lines().try_for_each(|line| writeln!(out, "  {line}"))?;
            writeln!(out)?;
            continue;
        }
        let all = || [("input", &f.inputs), ("state", &f.states), ("output", &f.outputs)];
        let names = all().into_iter().flat_map(|(_, list)| list).map(|feature| feature.name.chars().count());
        let width = plain::width(names, 0);
        for (kind, list) in all() {
            for feature in list {
                let (name, data_type, sizes) =
                    (plain::line(&feature.name), &feature.data_type, feature.sizes());
                writeln!(out, "  {kind:<6}  {name:<width$}  {data_type} {sizes}")?;
            }
        }
        let mut counts: Vec<(&String, &usize)> = f.operations.iter().collect();
        counts.sort_by_key(|(kind, n)| (std::cmp::Reverse(**n), (*kind).clone()));
        let counts: Vec<String> = counts.into_iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        writeln!(out, "  {} operations: {}\n", f.operations.values().sum::<usize>(), counts.join(", "))?;
    }
    Ok(())
}

/// A line for each weight, and one for each encoding.
pub(super) fn print_weights(report: &Report, filter: &Filter, out: &mut impl Write) -> io::Result<()> {
    let wanted = |w: &&Weight| filter.tensor.as_ref().is_none_or(|r| r.is_match(&w.name));
    let shown: Vec<&Weight> = report.weights.iter().filter(wanted).collect();
    let name = plain::width(shown.iter().map(|w| w.name.chars().count()), 4);
    let shape = plain::width(shown.iter().map(|w| format!("{:?}", w.shape).len()), 5);
    writeln!(
        out,
        "{:<name$}  {:<shape$}  {:>12}  {:>14}  {:>7}  encoding",
        "name", "shape", "blob", "bytes", "bits/w"
    )?;
    for w in shown {
        writeln!(
            out,
            "{:<name$}  {:<shape$}  {:>12}  {:>14}  {:>7.3}  {}",
            plain::line(&w.name),
            format!("{:?}", w.shape),
            w.blobs.first().map_or_else(|| "program".into(), u64::to_string),
            w.bytes,
            w.bits_per_weight,
            w.encoding
        )?;
    }
    if filter.tensor.is_none() {
        print_sums(&report.encodings, out)?;
        let apart = report.weights.iter().map(|w| w.bytes).fold(0, u64::saturating_add);
        if apart != report.totals.bytes {
            writeln!(out, "  {} bytes are stored: some weights share them", report.totals.bytes)?;
        }
    }
    Ok(())
}
