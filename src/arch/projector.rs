//! Projectors: what stands between an image or a sound and a language model. They lie in the same
//! checkpoint as that, and become a GGUF file of their own.

use serde_json::Value as Json;

use super::recognise::class_of;
use super::schema::{Architecture, Class, LanguageModel};
use super::scope::{Facts, ModelScope};
use super::{Model, all_projectors};
use crate::error::{Error, Result};

/// `general.architecture` of projectors.
pub const PROJECTOR: &str = "clip";

/// A checkpoint of a language model and a projector, as the projector's definition describes it.
pub(super) struct Around {
    class: Class,
    pub language_model: LanguageModel,
}

impl Around {
    /// `None` when the config's class is of no projector that we know.
    pub fn of(config: &Json) -> Result<Option<Self>> {
        for p in all_projectors()? {
            if let (Some(class), Some(language_model)) = (p.class_of(config)?, &p.language_model) {
                return Ok(Some(Self { class: class.clone(), language_model: language_model.clone() }));
            }
        }
        Ok(None)
    }

    /// The name of a tensor in a checkpoint of the language model alone.
    pub fn within(&self, name: &str) -> Option<String> {
        Some(self.language_model.tensors.matches(&self.class.canonical(name))?.rest)
    }

    /// The class of the language model, as its part of config.json names it, or else after its
    /// `model_type`.
    pub fn inner_class<'a>(
        &self,
        archs: &'a [Architecture],
        config: &Json,
    ) -> Option<(&'a Architecture, &'a Class)> {
        let inner = config.get(&self.language_model.config)?;
        let model_type = inner.get("model_type").and_then(Json::as_str).unwrap_or_default();
        let after_type = format!("{}forcausallm", model_type.replace(['_', '-'], ""));
        let find = |fits: &dyn Fn(&Class) -> bool| {
            archs.iter().flat_map(|a| a.class.iter().map(move |c| (a, c))).find(|(_, c)| fits(c))
        };
        find(&|c| c.names().any(|n| n == class_of(inner)))
            .or_else(|| find(&|c| c.names().any(|n| n.eq_ignore_ascii_case(&after_type))))
            .or_else(|| find(&|c| c.model_type == model_type))
    }

    /// The language model is of no class that we know.
    pub fn unknown(&self, config: &Json) -> Error {
        let part = &self.language_model.config;
        let inner = config.get(part).unwrap_or(&Json::Null);
        let model_type = inner.get("model_type").and_then(Json::as_str).unwrap_or("unnamed");
        Error::unsupported(format!(
            "the language model within {} is not known: {part} says it is {:?}, of type {model_type:?}",
            self.class.name,
            class_of(inner)
        ))
        .hint("if it computes like a known one, name that with --arch")
    }
}

/// Finds the projector of a config.json by its `architectures` entry, or takes the one called
/// `forced`.
///
/// # Errors
/// `Unsupported` for a class that has none; what a definition's requirements say.
pub fn recognise_projector(config: &Json, forced: Option<&str>, facts: Facts) -> Result<Model> {
    let projectors = all_projectors()?;
    let known = projectors.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
    for p in projectors {
        let fits = match forced {
            Some(name) => p.name == name,
            None => p.class_of(config)?.is_some(),
        };
        if fits {
            return take_for_projector(p, config, facts);
        }
    }
    Err(match forced {
        Some(name) => {
            Error::misuse(format!("no projector is called {name:?}")).hint(format!("known are: {known}"))
        }
        None => Error::unsupported(format!("no projector is known for the class {:?}", class_of(config)))
            .hint(format!(
                "known are: {known}; if the model sees or hears like one of them, name it with --arch. The \
                 language model alone is converted without --mmproj"
            )),
    })
}

/// Takes a config.json for one with a projector of this definition. What lies beside config.json has
/// to be told, since the definition's requirements may be about it.
///
/// # Errors
/// What the definition's requirements say.
pub fn take_for_projector(arch: Architecture, config: &Json, facts: Facts) -> Result<Model> {
    let class = arch.class_of(config)?.or(arch.class.first()).cloned();
    let class = class.ok_or_else(|| Error::malformed(format!("{} has no [[class]]", arch.name)))?;
    let config = arch.language_model.as_ref().map_or_else(|| config.clone(), |l| l.complete(config));
    let mut model = Model { scope: ModelScope::new(&arch, config), arch, class, around: None };
    *model.facts_mut() = facts;
    model.check()?;
    Ok(model)
}

/// Whether a projector can be made from a checkpoint of this config.
pub fn has_projector(config: &Json) -> bool {
    Around::of(config).is_ok_and(|a| a.is_some())
}

/// Why a projector's file does not become a Hugging Face model.
pub(super) fn no_way_back() -> Error {
    Error::unsupported(
        "is a projector, from which no Hugging Face model can be made: it lacks the language model and says \
         nothing of how images and sound are prepared",
    )
    .hint("give the GGUF file of the language model")
}
