//! What does not fit between config.json and the weights, said so that one knows what to do.

use std::collections::{HashMap, HashSet};

use super::Model;
use super::active::ActiveRow;
use super::mapping::pattern_of;
use super::template::Captures;
use crate::error::{Error, Result};

const OTHER_MODEL: &str = "config.json and the weights are not of the same model";

/// The captures of all tensors that a row was used for, by the row.
pub(super) type Hits<'a> = HashMap<&'a str, HashSet<Captures>>;

impl Model {
    pub(super) fn check_layer(&self, captures: &Captures) -> Result<()> {
        let n = self.layers()?;
        match captures.integers.get(&'i') {
            Some(&i) if n > 0 && i >= n => {
                Err(Error::malformed(format!("belongs to layer {i}, config.json says there are {n}"))
                    .hint(OTHER_MODEL))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn unknown_tensor(&self, name: &str, canonical: &str, rows: &[ActiveRow<'_>]) -> Error {
        let pattern = pattern_of(canonical);
        let nearest = rows
            .iter()
            .map(|r| r.row.hf.text())
            .max_by(|a, b| strsim::jaro_winkler(a, &pattern).total_cmp(&strsim::jaro_winkler(b, &pattern)));
        let error =
            Error::malformed(format!("tensor {name:?} has no place in the architecture {}", self.arch.name));
        match nearest {
            Some(rule) => error.hint(format!(
                "the nearest rule is {rule:?}; where the tensor has a use, a definition that has a place for it can be given with --arch-file"
            )),
            None => error,
        }
    }

    /// A tensor that is needed and not there: because config.json counts more layers or experts than
    /// there are, because the model is of another kind, or because a file is incomplete.
    pub(super) fn missing(&self, r: &ActiveRow<'_>, mut captures: Captures, hits: &Hits<'_>) -> Error {
        let none = HashSet::new();
        let seen = hits.get(r.row.hf.text()).unwrap_or(&none);
        let layers = hits.values().flatten().filter_map(|c| c.integers.get(&'i')).max().map_or(0, |i| i + 1);
        let n_layers = self.layers().unwrap_or(0);
        if let Some(&i) = captures.integers.get(&'i')
            && i >= layers
            && layers > 0
        {
            return Error::malformed(format!(
                "the weights have {layers} layers, config.json says there are {n_layers}"
            ))
            .hint(format!("{OTHER_MODEL}, or the files of the last layers are missing"));
        }
        if r.row.stack.is_some() && r.row.at.is_none() {
            let of_layer = |c: &&Captures| c.integers.get(&'i') == captures.integers.get(&'i');
            let experts: HashSet<u64> =
                seen.iter().filter(of_layer).filter_map(|c| c.integers.get(&'e').copied()).collect();
            let lacking = (0..r.stack).find(|e| !experts.contains(e)).unwrap_or(0);
            captures.integers.insert('e', lacking);
            if lacking > 0 && lacking == experts.len() as u64 {
                let layer = captures.integers.get(&'i').map_or(String::new(), |i| format!("layer {i} has "));
                return Error::malformed(format!(
                    "{layer}{lacking} experts, config.json says there are {} ({:?})",
                    r.stack,
                    r.row.hf.text()
                ))
                .hint(format!("{OTHER_MODEL}, or the files of the other experts are missing"));
            }
        }
        let name = r.source_name(&captures).unwrap_or_else(|| r.row.hf.text().to_string());
        let error = Error::malformed(format!("tensor {name:?} is missing"));
        if seen.is_empty() {
            error
                .hint(format!("the architecture {} needs it; is this another kind of model?", self.arch.name))
        } else {
            error.hint("other layers or experts have it: fetch the weights again, a file may be incomplete")
        }
    }
}
