//! `[scalars]`: tensors of one number, which become metadata.

use serde::Deserialize;

use super::Model;
use super::mapping::{Data, Mapped};
use super::template::{Captures, Template};
use crate::container::gguf::{Array, Metadata, Value};
use crate::error::{Error, Result};

/// Where such a tensor goes: `{ key = "xielu.alpha_n", shape = [1] }`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScalarRule {
    /// The key; `{i}` in the tensor's name makes it a list of all layers' numbers.
    pub key: String,
    /// Shape in the checkpoint, `[1]` or `[]`.
    #[serde(default = "one")]
    shape: Vec<u64>,
}

fn one() -> Vec<u64> {
    vec![1]
}

impl Model {
    /// Metadata from tensors of one number. `number_of` finds a tensor's by its name in the
    /// checkpoint.
    ///
    /// # Errors
    /// As `number_of`.
    pub fn scalars(&self, number_of: &mut dyn FnMut(&str) -> Result<f32>) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        for (template, rule) in &self.arch.scalars {
            let mut number = |i: u64| number_of(&self.original(&name(template, i)?));
            let value = if template.has('i') {
                // The first that is missing ends this, however many layers are claimed.
                Value::Array(Array::F32((0..self.layers()?).map(number).collect::<Result<_>>()?))
            } else {
                Value::F32(number(0)?)
            };
            metadata.set(rule.key.as_str(), value);
        }
        Ok(metadata)
    }

    /// The way back: those tensors, from a GGUF file's metadata.
    ///
    /// # Errors
    /// `Malformed` when a key is missing, or no number, or no list with one for each layer.
    pub fn scalars_back(&self, metadata: &Metadata) -> Result<Vec<Mapped>> {
        let mut out = Vec::new();
        for (template, rule) in &self.arch.scalars {
            let found = metadata.get(&rule.key);
            let layers = if template.has('i') { self.layers()? } else { 1 };
            let values: Option<Vec<f32>> = match found {
                Some(Value::Array(Array::F32(list))) if list.len() as u64 == layers => Some(list.clone()),
                Some(Value::F32(v)) if !template.has('i') => Some(vec![*v]),
                _ => None,
            };
            let values = values.ok_or_else(|| {
                let found = if found.is_none() { "is missing" } else { "is something else" };
                let wanted = if template.has('i') { "a number for each layer" } else { "a number" };
                Error::malformed(format!("{} {found}; {wanted} was expected", rule.key))
            })?;
            for (i, value) in (0..).zip(values) {
                let name = self.original(&name(template, i)?);
                out.push(Mapped {
                    name,
                    shape: rule.shape.clone(),
                    data: Data::Values(vec![value]),
                    fixed: None,
                });
            }
        }
        Ok(out)
    }

    /// Whether a tensor, by its name in the definition's terms, becomes metadata.
    pub(super) fn is_scalar(&self, name: &str) -> bool {
        self.arch.scalars.keys().any(|template| template.matches(name).is_some())
    }
}

fn name(template: &Template, i: u64) -> Result<String> {
    template
        .fill(&Captures::of_layer(i))
        .ok_or_else(|| Error::malformed(format!("{:?}: no name", template.text())))
}
