//! Which architecture a checkpoint is of, and for an unknown one, which known one it resembles.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::mapping::pattern_of;
use super::projector::Around;
use super::schema::{self, Architecture, Class};
use super::scope::ModelScope;
use super::{Model, all};
use crate::error::{Error, Result};
use crate::tensor::TensorInfo;

/// Finds the architecture of a config.json by its `architectures` entry, or takes the one called
/// `forced`. The tensors only serve to name the nearest one where none is found.
///
/// # Errors
/// `Unsupported` for an unknown class, with the nearest known one; what a definition's
/// requirements say.
pub fn recognise(config: &Json, tensors: &[TensorInfo], forced: Option<&str>) -> Result<Model> {
    let class = class_of(config);
    let archs = all()?;
    let mut found = None;
    for arch in &archs {
        let is_it = match forced {
            Some(name) => arch.arch == name,
            None => arch.class_of(config)?.is_some(),
        };
        if is_it {
            found = Some(arch);
            break;
        }
    }
    match (found, forced) {
        (Some(arch), _) => take_for(arch.clone(), config),
        (None, Some(name)) => Err(Error::misuse(format!("no architecture is called {name:?}"))
            .hint(format!("known are: {}", names(&archs)))),
        (None, None) => match (refusal(class)?, Around::of(config)?) {
            (Some(why), _) => Err(Error::unsupported(format!("{class}: {why}"))),
            (None, Some(around)) => match around.inner_class(&archs, config) {
                Some((arch, _)) => take_for(arch.clone(), config),
                None => Err(around.unknown(config)),
            },
            (None, None) => Err(unknown_class(&archs, class, config, tensors)),
        },
    }
}

/// Takes a config.json for a model of this architecture: of the class that it names, or of the
/// first. Where the config is of a language model and a projector, the former is taken.
///
/// # Errors
/// What the definition's requirements say.
pub fn take_for(mut arch: Architecture, config: &Json) -> Result<Model> {
    let mut config = config.clone();
    let mut named = arch.class_of(&config)?.cloned();
    let around = if named.is_none() { Around::of(&config)? } else { None };
    if let Some(around) = &around {
        config = around.language_model.complete(&config);
        named = around.inner_class(std::slice::from_ref(&arch), &config).map(|(_, class)| class.clone());
        arch.config_root.insert(0, around.language_model.config.clone());
    }
    let class = named.or_else(|| arch.class.first().cloned());
    let class = class.ok_or_else(|| Error::malformed(format!("{} has no [[class]]", arch.name)))?;
    let model = Model { scope: ModelScope::new(&arch, config), arch, class, around };
    model.check()?;
    Ok(model)
}

/// Why models of a class are not converted, where that is known.
pub(super) fn refusal(class: &str) -> Result<Option<String>> {
    Ok(schema::refused()?.into_iter().find(|(c, _)| c.names().any(|n| n == class)).map(|(_, why)| why))
}

pub(super) fn class_of(config: &Json) -> &str {
    config.get("architectures").and_then(|a| a.get(0)).and_then(Json::as_str).unwrap_or_default()
}

/// The architectures' names, each once.
pub(super) fn names(archs: &[Architecture]) -> String {
    let mut names: Vec<_> = archs.iter().map(|a| a.arch.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

/// A known class that an unknown one may be like.
struct Candidate<'a> {
    arch: &'a Architecture,
    class: &'a Class,
    /// How alike the names of the classes are, from 0 (and little) to 1.
    alike: f64,
    /// Kinds of tensors in the checkpoint whose names the definition knows.
    known: usize,
    /// Whether its rules take the whole checkpoint, shapes included.
    fits: bool,
}

impl Candidate<'_> {
    fn names(&self) -> usize {
        self.arch.class.iter().map(|c| c.names().count()).sum()
    }
}

fn unknown_class(archs: &[Architecture], class: &str, config: &Json, tensors: &[TensorInfo]) -> Error {
    let error = match class {
        "" => Error::malformed("names no architecture (\"architectures\" is missing or empty)"),
        _ => Error::unsupported(format!("the architecture {class} is not known")),
    };
    // Of all layers' and experts' tensors of one kind, one speaks for all.
    let kinds: BTreeMap<String, &str> =
        tensors.iter().map(|t| (pattern_of(&t.name), t.name.as_str())).collect();
    let mut candidates = Vec::new();
    for arch in archs {
        for known_class in &arch.class {
            let alike = known_class.names().map(|name| likeness(name, class)).fold(0.0, f64::max);
            let alike = if alike > 0.8 { alike } else { 0.0 };
            let scope = ModelScope::new(arch, config.clone());
            let mut model = Model { arch: arch.clone(), class: known_class.clone(), around: None, scope };
            let n_tokens = model.var("vocab_size").ok().and_then(|n| n.as_u64());
            model.facts_mut().n_tokens = n_tokens;
            let known = kinds.values().filter(|name| model.knows(name)).count();
            let all_known = known > 0 && known == kinds.len();
            let fits = all_known && model.check().is_ok() && model.map(tensors).is_ok();
            candidates.push(Candidate { arch, class: known_class, alike, known, fits });
        }
    }
    // The likeliest first: with the same model_type, of the most alike name, the most used.
    let model_type = config.get("model_type").and_then(Json::as_str);
    candidates.sort_by(|a, b| {
        let key = |c: &Candidate<'_>| (c.fits, c.known, Some(c.class.model_type.as_str()) == model_type);
        key(b).cmp(&key(a)).then(b.alike.total_cmp(&a.alike)).then_with(|| b.names().cmp(&a.names()))
    });
    let mut fitting: Vec<&str> = candidates.iter().filter(|c| c.fits).map(|c| c.arch.arch.as_str()).collect();
    fitting.dedup();
    let named = candidates.iter().filter(|c| c.alike > 0.0).max_by(|a, b| a.alike.total_cmp(&b.alike));
    let partly = candidates.first().filter(|c| 4 * c.known > 3 * kinds.len());
    let hint = match (fitting.first(), named, partly) {
        (Some(arch), ..) => format!(
            "the rules of {} take all {} tensors; if the model computes like the nearest, try --arch {arch}",
            fitting[..fitting.len().min(5)].join(", "),
            tensors.len(),
        ),
        (None, _, Some(c)) => format!(
            "the nearest known one is {}, which has {} of the {} kinds of tensors; if the model computes like it, \
             try --arch {}",
            c.class.name,
            c.known,
            kinds.len(),
            c.arch.arch
        ),
        (None, Some(c), None) => format!(
            "the nearest known one by name is {}; if the model computes like it, try --arch {}",
            c.class.name, c.arch.arch
        ),
        _ => format!(
            "known are: {}; if the model computes like one of them, name it with --arch",
            names(archs)
        ),
    };
    error.hint(hint)
}

/// How alike two names of classes are. What comes before the task names the family: `Qwen3` of
/// `Qwen3ForCausalLM`; the rest decides between equals.
fn likeness(a: &str, b: &str) -> f64 {
    let family =
        |name: &str| name.split("For").next().unwrap_or(name).trim_end_matches("LMHeadModel").to_lowercase();
    0.99 * strsim::jaro_winkler(&family(a), &family(b)) + 0.01 * strsim::jaro_winkler(a, b)
}
