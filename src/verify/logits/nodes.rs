//! Where candle lacks the family: two files in llama.cpp, compared node by node.

use std::collections::HashSet;

use super::departure::{Departure, Place};
use super::{Case, Comparison, LayerOutputs, LogitsOptions, Proof, check_memory, layer_of_output};
use crate::convert::{Budget, FileType};
use crate::error::{Error, Result};
use crate::eval::logits::{self, Matrix};
use crate::ggml::{self, Model, ModelOptions, Node};
use crate::verify::SourceModel;
use crate::verify::engine::{TempFile, conversion, tolerance};

/// A node of one layer.
struct Seen {
    name: String,
    /// Its weights, where it has any.
    tensor: Option<String>,
    /// `None` where it is only another view of a node before.
    values: Option<Matrix>,
}

/// All that a layer computes.
struct LayerNodes<'a> {
    layer: usize,
    inside: bool,
    is_tensor: &'a dyn Fn(&str) -> bool,
    seen: Vec<Seen>,
    /// Nodes of the branch for inputs of tokens and vectors mixed: computed from nothing, and not used.
    unused: HashSet<usize>,
}

impl ggml::Observer for LayerNodes<'_> {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        let mut sources = (0..).map_while(|i| node.source(i));
        if sources.any(|s| s.name().starts_with("inp_mixed") || self.unused.contains(&s.id())) {
            self.unused.insert(node.id());
            return false;
        }
        let here = self.inside;
        if let Some(layer) = layer_of_output(&node.name()) {
            self.inside = layer + 1 == self.layer;
        }
        here
    }

    fn see(&mut self, node: &Node<'_>) -> Result<()> {
        let mut sources = (0..).map_while(|i| node.source(i)).map(|s| s.name().into_owned());
        let tensor = sources.find(|name| (self.is_tensor)(name));
        let mut scratch = Vec::new();
        let is_float = node.dtype().is_some_and(|d| d == crate::tensor::DType::F32);
        let values = if is_float { node.values(&mut scratch).ok() } else { None };
        let values = values.map(|v| Matrix { columns: node.shape()[0].max(1), values: v.to_vec() });
        self.seen.push(Seen { name: node.name().into_owned(), tensor, values });
        Ok(())
    }
}

/// Compares the file with a conversion of its source to F32, or with the source where that is a GGUF
/// file.
///
/// # Errors
/// As the conversion, and where a model does not run.
pub(super) fn prove(
    case: &Case<'_>,
    source: &SourceModel,
    how: &LogitsOptions,
    budget: &Budget,
    no_candle: &str,
) -> Result<Proof> {
    let scratch = TempFile::beside(&case.options.file);
    let job = conversion(Some(source), case.options, FileType::parse("f32"), &scratch.0)?;
    let is_hf = matches!(source, SourceModel::HuggingFace(_));
    let reference = if is_hf { "a conversion to F32 in llama.cpp" } else { "the source in llama.cpp" };
    let path = match (job, source) {
        (Some(job), _) => {
            check_memory("a conversion of the source", job.plan.total_len(), how)?;
            job.run(true, budget, case.observer)?;
            job.output
        }
        (None, SourceModel::Gguf(other)) => {
            let file = other.store.files().first();
            file.ok_or_else(|| Error::misuse("the source has no file"))?.path().to_path_buf()
        }
        (None, SourceModel::HuggingFace(_)) => return Err(Error::misuse("the source cannot be converted")),
    };
    let wanted_model = Model::load(&path, &ModelOptions::default())?;
    let (mut found_layers, mut wanted_layers) = (LayerOutputs::default(), LayerOutputs::default());
    let found = logits::observed(case.model, &case.ids, case.threads, &mut found_layers)?;
    let wanted = logits::observed(&wanted_model, &case.ids, case.threads, &mut wanted_layers)?;
    let source = Comparison::new(&found, &wanted)?;
    let (exact, is_exact) = case.tolerance();
    let weights = case.gguf.store.tensors().iter().filter(|t| t.shape.len() > 1).map(|t| t.dtype);
    let allowed = if is_exact { Some(exact) } else { tolerance(weights) };
    let mut departure = None;
    if !source.within(allowed) {
        let limit = allowed.unwrap_or(exact);
        let layer = found_layers.0.iter().find(|(k, found)| {
            let near = wanted_layers.0.get(k).and_then(|wanted| logits::compare(found, wanted).ok());
            !near.is_some_and(|a| a.finite && a.rel_rms <= limit)
        });
        let layers = found_layers.0.len();
        departure = Some(match layer.map(|(k, _)| *k) {
            None if layers == 0 => unknown(case),
            layer => in_layer(case, &wanted_model, layer, layers, limit)?,
        });
    } else if let Some(place) = case.suspects.first() {
        let tensors = case.suspects.of(place);
        let why = format!("{} is no rounding of the source's", case.suspects.describe(&tensors));
        departure = Some(Departure { place: Some(place), tensors, why });
    }
    Ok(Proof {
        reference: reference.to_string(),
        no_candle: Some(no_candle.to_string()),
        tokens: case.ids.len(),
        source,
        own_weights: None,
        tolerance: allowed,
        departure,
    })
}

/// Where llama.cpp does not name its layers' outputs.
fn unknown(case: &Case<'_>) -> Departure {
    let place = case.suspects.first();
    let tensors = place.map(|place| case.suspects.of(place)).unwrap_or_default();
    let why = match tensors.is_empty() {
        true => "llama.cpp does not show its layers".to_string(),
        false => case.suspects.describe(&tensors),
    };
    Departure { place, tensors, why }
}

/// The first node of a layer (or, for `None`, of the head) that departs.
fn in_layer(
    case: &Case<'_>,
    wanted_model: &Model,
    layer: Option<usize>,
    layers: usize,
    limit: f64,
) -> Result<Departure> {
    let place = layer.map_or(Place::Head, Place::Layer);
    let is_tensor = |name: &str| case.gguf.store.get(name).is_some();
    let nodes = |model: &Model| -> Result<Vec<Seen>> {
        let layer = layer.unwrap_or(layers);
        let mut nodes = LayerNodes {
            layer,
            inside: layer == 0,
            is_tensor: &is_tensor,
            seen: Vec::new(),
            unused: HashSet::new(),
        };
        logits::observed(model, &case.ids, case.threads, &mut nodes)?;
        Ok(nodes.seen)
    };
    let (found, wanted) = (nodes(case.model)?, nodes(wanted_model)?);
    let first = found.iter().zip(&wanted).find(|(a, b)| match (&a.values, &b.values) {
        (Some(a), Some(b)) => !logits::compare(a, b).is_ok_and(|c| c.finite && c.rel_rms <= limit),
        _ => false,
    });
    let suspects = case.suspects.of(place);
    let Some((node, _)) = first else {
        let why = format!("no node of it by itself; {}", case.suspects.describe(&suspects));
        return Ok(Departure { place: Some(place), tensors: suspects, why });
    };
    let mut why = format!("node {:?}", node.name);
    match &node.tensor {
        Some(tensor) => why += &format!(", which reads {tensor}"),
        None => why += ", which reads no tensor: metadata differ",
    }
    if !suspects.is_empty() {
        why += &format!("; not the source's: {}", case.suspects.describe(&suspects));
    }
    let tensors = node.tensor.clone().map_or(suspects, |tensor| vec![tensor]);
    Ok(Departure { place: Some(place), tensors, why })
}
