//! What a definition is tried on: tiny configs, and the tensors it then makes.

use serde_json::{Map, Value as Json, json};

use super::Model;
use super::schema::Architecture;
use super::template::{Captures, PARAMETERS};
use crate::error::{Error, Result};

/// A tensor that a definition makes in GGUF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// Whether every checkpoint has it; others may lack it in all layers.
    pub needed: bool,
    /// Name template of its source.
    pub rule: String,
}

impl Architecture {
    /// Tiny config.json files, by name: the example and its variants. `None` when the definition
    /// has no example.
    pub fn examples(&self) -> Option<Vec<(String, Json)>> {
        let mut config = Map::new();
        if let Some(class) = self.class.first() {
            config.insert("architectures".into(), json!([class.name]));
            config.insert("model_type".into(), json!(class.model_type));
        }
        config.extend(self.example.clone()?);
        config.retain(|_, v| *v != json!("null"));
        let mut examples = vec![(String::from("example"), Json::Object(config.clone()))];
        for (name, changes) in &self.variant {
            let mut changed = config.clone();
            changed.extend(changes.clone());
            changed.retain(|_, v| *v != json!("null"));
            examples.push((name.clone(), Json::Object(changed)));
        }
        Some(examples)
    }
}

impl Model {
    /// The tensors of a GGUF file of this model, generated ones aside. Where two rules make the
    /// same tensor, the first counts.
    ///
    /// # Errors
    /// As the evaluation of conditions; `Limit` for more layers than `max_layers`.
    pub fn targets(&self, max_layers: u64) -> Result<Vec<Target>> {
        let n_layers = self.layers()?;
        if n_layers > max_layers {
            return Err(Error::limit(format!("{n_layers} layers, at most {max_layers} are allowed here")));
        }
        let mut targets: Vec<Target> = Vec::new();
        for active in self.active_rows(max_layers as usize)? {
            let row = active.row;
            let parameters = if row.hf.has_parameter() { PARAMETERS.map(Some).to_vec() } else { vec![None] };
            for i in 0..if row.to[0].has('i') { n_layers } else { 1 } {
                for &parameter in &parameters {
                    let mut captures = Captures { parameter, ..Captures::default() };
                    captures.integers.insert('i', i);
                    if !active.in_layer(&captures) {
                        continue;
                    }
                    for name in row.to.iter().filter_map(|to| to.fill(&captures)) {
                        if targets.iter().all(|t| t.name != name) {
                            let needed =
                                !active.may_lack(&captures) && (parameter != Some("bias") || row.bias);
                            targets.push(Target { name, needed, rule: row.hf.text().to_string() });
                        }
                    }
                }
            }
        }
        Ok(targets)
    }
}
