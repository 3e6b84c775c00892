//! The file beside candle's forward pass of its source.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::departure::{Departure, Place, rounding};
use super::{Case, Comparison, LayerOutputs, LogitsOptions, Proof, check_memory};
use crate::arch::{Data, Mapped};
use crate::container::Store;
use crate::container::gguf::Gguf;
use crate::convert::{Scratch, Source, identity};
use crate::error::{Error, Result};
use crate::eval::logits::{self, Matrix};
use crate::eval::reference::{Reference, Weights};
use crate::verify::SourceModel;

/// Tensors tried one by one for being the only cause.
const ALONE: usize = 8;

/// The tensors of a store under other names and in another layout.
struct MappedWeights {
    store: Store,
    mapped: HashMap<String, Mapped>,
}

impl MappedWeights {
    fn new(store: Store, mapped: Vec<Mapped>) -> Self {
        Self { store, mapped: mapped.into_iter().map(|m| (m.name.clone(), m)).collect() }
    }

    /// The tensors of the store that go into `name`.
    fn parts(&self, name: &str) -> impl Iterator<Item = &str> {
        let pieces = match self.mapped.get(name).map(|m| &m.data) {
            Some(Data::Copied { pieces, .. }) => pieces.as_slice(),
            _ => &[],
        };
        pieces.iter().map(|p| p.source.as_str())
    }
}

impl Weights for MappedWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.mapped.get(name)?.shape.iter().map(|&n| usize::try_from(n).ok()).collect()
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let mapped = self.mapped.get(name).ok_or_else(|| Error::misuse(format!("no tensor {name:?}")))?;
        let context = |e: Error| e.context(format!("tensor {name:?}"));
        let source = Source::new(mapped, &self.store).map_err(context)?;
        let (mut values, mut scratch) = (Vec::new(), Scratch::default());
        source.values(&self.store, 0, source.elements(), &mut values, &mut scratch).map_err(context)?;
        Ok(values)
    }
}

/// Weights of which some are taken from elsewhere.
struct Replaced {
    base: Arc<dyn Weights>,
    other: Arc<dyn Weights>,
    names: HashSet<String>,
}

impl Replaced {
    fn side(&self, name: &str) -> &dyn Weights {
        if self.names.contains(name) { &*self.other } else { &*self.base }
    }
}

impl Weights for Replaced {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.side(name).shape(name)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.side(name).values(name)
    }
}

/// A source that candle can compute.
pub(super) struct Candle {
    reference: Reference,
    /// The text, as far as candle computes it rightly.
    ids: Vec<i32>,
    source: Arc<dyn Weights>,
    output: Arc<MappedWeights>,
}

impl Candle {
    /// Recognises the source.
    ///
    /// # Errors
    /// `Unsupported` where candle lacks the family; `Limit` where memory does not suffice.
    pub fn open(case: &Case<'_>, source: &SourceModel, how: &LogitsOptions) -> Result<Self> {
        let SourceModel::HuggingFace(hf) = source else {
            return Err(Error::unsupported("the source is a GGUF file"));
        };
        let recognised = hf.recognise()?;
        let reference = Reference::new(&recognised.checkpoint.config)?;
        let output = Gguf::open(&case.options.file, &case.options.limits)?.store;
        let back = recognised.model.map_back(output.tensors())?;
        let store = recognised.checkpoint.store;
        let own = identity(store.tensors());
        // The embedding once more, with rows behind it, is the least beyond the weights.
        let elements: u64 = output.tensors().iter().map(|t| t.elements()).fold(0, u64::saturating_add);
        let embedding = output.get("token_embd.weight").map_or(0, |t| t.elements());
        let logits = (case.ids.len() as u64).saturating_mul(case.model.n_tokens() as u64).saturating_mul(3);
        let values = elements.saturating_add(embedding.saturating_mul(2)).saturating_add(logits);
        check_memory("the source's forward pass in F32", values.saturating_mul(4), how)?;
        let ids = case.ids[..case.ids.len().min(reference.most_tokens())].to_vec();
        Ok(Self {
            reference,
            ids,
            source: Arc::new(MappedWeights::new(store, own)),
            output: Arc::new(MappedWeights::new(output, back)),
        })
    }

    /// Compares the logits, and finds out where they depart.
    ///
    /// # Errors
    /// `Unsupported` where candle does not take the checkpoint.
    pub fn prove(&self, case: &Case<'_>) -> Result<Proof> {
        let own: Arc<dyn Weights> = self.output.clone();
        let wanted = self.logits(case, &self.source, self.reference.n_layers())?;
        let mut layers = LayerOutputs::default();
        let found = logits::observed(case.model, &self.ids, case.threads, &mut layers)?;
        let source = Comparison::new(&found, &wanted)?;
        let (tolerance, is_exact) = case.tolerance();
        let own_weights = match is_exact {
            true => None,
            false => Some(Comparison::new(&found, &self.logits(case, &own, self.reference.n_layers())?)?),
        };
        let weights = if is_exact { &self.source } else { &own };
        let near = own_weights.as_ref().unwrap_or(&source).within(Some(tolerance));
        let departure = match (near, case.suspects.first()) {
            (true, None) => None,
            // Rounded so coarsely that logits do not tell: the tensors do.
            (true, Some(place)) => Some(self.of_tensors(case, place)?),
            (false, _) => Some(self.departure(case, weights, &layers, tolerance)?),
        };
        Ok(Proof {
            reference: format!("candle's {}", self.reference.name()),
            no_candle: None,
            tokens: self.ids.len(),
            source,
            own_weights,
            tolerance: Some(tolerance),
            departure,
        })
    }

    fn logits(&self, case: &Case<'_>, weights: &Arc<dyn Weights>, n_layers: usize) -> Result<Matrix> {
        self.reference.logits(weights, &self.ids, n_layers, &|| case.observer.interrupted())
    }

    /// The first layer whose output departs, and the tensors that explain it.
    fn departure(
        &self,
        case: &Case<'_>,
        weights: &Arc<dyn Weights>,
        layers: &LayerOutputs,
        tolerance: f64,
    ) -> Result<Departure> {
        let n_layers = self.reference.n_layers();
        // How far llama.cpp's layer lies from candle's, seen through the same head.
        let distance = |weights: &Arc<dyn Weights>, hidden: &Matrix, k: usize| -> Result<f64> {
            let wanted = self.logits(case, weights, k + 1)?;
            let found = self.reference.head(weights, hidden)?;
            let agreement = logits::compare(&found, &wanted)?;
            Ok(if agreement.finite { agreement.rel_rms } else { f64::INFINITY })
        };
        let Some(outputs) = (0..n_layers).map(|k| layers.0.get(&k)).collect::<Option<Vec<_>>>() else {
            let shown = layers.0.len();
            let why = format!("llama.cpp shows the outputs of {shown} layers, the source has {n_layers}");
            return Ok(Departure { place: None, tensors: Vec::new(), why });
        };
        // Layers after one that departs do so as well.
        let (mut low, mut high, mut at_high) = (0, n_layers, f64::NAN);
        while low < high {
            let k = (low + high) / 2;
            let found = distance(weights, outputs[k], k)?;
            if found > tolerance { (high, at_high) = (k, found) } else { low = k + 1 }
        }
        if high == n_layers {
            return self.of_tensors(case, Place::Head);
        }
        let place = Place::Layer(high);
        let suspects = case.suspects.of(place);
        let said = format!("its output differs by {at_high:.1e} of the spread");
        let explains = |names: &[String]| -> Result<bool> {
            let weights: Arc<dyn Weights> = Arc::new(Replaced {
                base: weights.clone(),
                other: self.output.clone(),
                names: self.made_of(names),
            });
            Ok(distance(&weights, outputs[high], high)? <= tolerance)
        };
        if suspects.is_empty() {
            let why = format!(
                "{said}, though its tensors are the source's as this program maps them: a rule of the mapping, the \
                 metadata or llama.cpp's graph departs"
            );
            return Ok(Departure { place: Some(place), tensors: Vec::new(), why });
        }
        if let Some(other) = self.layer_it_is(high, &suspects)? {
            let why = format!("{said}; {} are those of the source's layer {other}", self.list(&suspects));
            return Ok(Departure { place: Some(place), tensors: suspects, why });
        }
        for name in suspects.iter().take(ALONE) {
            if explains(std::slice::from_ref(name))? {
                let why = format!(
                    "{said}, and {} explains it: with it candle computes the same",
                    case.suspects.describe(std::slice::from_ref(name))
                );
                return Ok(Departure { place: Some(place), tensors: vec![name.clone()], why });
            }
        }
        let together = match suspects.len() > 1 && explains(&suspects)? {
            true => "explain it together: with them candle computes the same",
            false => {
                "differ from the source's, and do not explain it: metadata or a rule of the mapping depart as well"
            }
        };
        let why = format!("{said}; {} {together}", case.suspects.describe(&suspects));
        Ok(Departure { place: Some(place), tensors: suspects, why })
    }

    /// The departure that tensors tell of.
    fn of_tensors(&self, case: &Case<'_>, place: Place) -> Result<Departure> {
        let tensors = case.suspects.of(place);
        let other = match place {
            Place::Layer(k) => self.layer_it_is(k, &tensors)?,
            Place::Head => None,
        };
        let why = match (other, tensors.is_empty()) {
            (Some(other), _) => format!("{} are those of the source's layer {other}", self.list(&tensors)),
            (None, true) => {
                "all layers agree, and its tensors are the source's: the metadata or llama.cpp's graph \
                             depart"
                    .to_string()
            }
            (None, false) => {
                format!("{} is no rounding of the source's", case.suspects.describe(&tensors))
            }
        };
        Ok(Departure { place: Some(place), tensors, why })
    }

    fn list(&self, tensors: &[String]) -> String {
        match tensors {
            [first, rest @ ..] if !rest.is_empty() => format!("{first} and {} more", rest.len()),
            _ => tensors.concat(),
        }
    }

    /// The checkpoint's tensors that are made of these tensors of the file.
    fn made_of(&self, tensors: &[String]) -> HashSet<String> {
        let of_these = |name: &&String| self.output.parts(name).any(|p| tensors.iter().any(|t| t == p));
        self.output.mapped.keys().filter(of_these).cloned().collect()
    }

    /// The other layer of the source whose tensors these of layer `k` are.
    fn layer_it_is(&self, k: usize, tensors: &[String]) -> Result<Option<usize>> {
        let mut names: Vec<String> = self.made_of(tensors).into_iter().collect();
        let size = |name: &String| self.output.shape(name).map_or(0, |s| s.iter().product::<usize>());
        // The small ones first: they tell as well.
        names.sort_by_key(|name| (size(name), name.clone()));
        if names.len() < 2 {
            return Ok(None);
        }
        'layers: for other in (0..self.reference.n_layers()).filter(|other| *other != k) {
            for name in &names {
                let there = name.replacen(&format!(".{k}."), &format!(".{other}."), 1);
                if there == *name || self.source.shape(&there) != self.output.shape(name) {
                    continue 'layers;
                }
                let (found, wanted) = (self.output.values(name)?, self.source.values(&there)?);
                let dtype = self.output.parts(name).find_map(|p| self.output.store.get(p)).map(|t| t.dtype);
                if relative(&found, &wanted) > dtype.map_or(0.0, rounding) {
                    continue 'layers;
                }
            }
            return Ok(Some(other));
        }
        Ok(None)
    }
}

/// Root mean square of the difference over that of `wanted`.
fn relative(found: &[f32], wanted: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(wanted).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let size: f64 = wanted.iter().map(|b| square(f64::from(*b))).sum();
    if size > 0.0 { (difference / size).sqrt() } else { difference.sqrt() }
}
