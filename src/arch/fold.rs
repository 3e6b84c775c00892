//! Which scales can move from one tensor into another without changing what a model computes: pairs of
//! an operation that gives each of its outputs a factor, and the matrices that read these outputs.

use serde::Deserialize;

use super::template::Template;
use crate::error::{Error, Result};

/// An entry of `[fold]`. Names are those of GGUF, without `.weight` and `.bias`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoldRule {
    /// All matrices that read what the producer gives; those that a layer has are meant.
    pub to: Vec<Template>,
    /// How values of the producer become columns of the consumers.
    #[serde(default)]
    pub kind: FoldKind,
    /// A tensor that the layer must have as well.
    pub with: Option<Template>,
    /// A tensor that the layer must not have.
    pub without: Option<Template>,
}

/// How a producer gives each of its outputs a factor.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FoldKind {
    /// A norm: its weight, and its bias where it has one. GGUF holds `1 + w` where a model stores `w`.
    #[default]
    Norm,
    /// A matrix with its bias: one row for each column of the consumers.
    Rows,
    /// The same, where other rows come before.
    LastRows,
    /// A matrix of values of attention: heads that several query heads share stand for as many columns.
    Heads,
    /// The same, where other rows come before.
    LastHeads,
}

/// An entry, several of which those layers tell apart that have a tensor or not, or `false` where the base
/// has one that this definition has not.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum FoldSpec {
    Keep(bool),
    Rule(FoldRule),
    Rules(Vec<FoldRule>),
}

/// The pairs of an architecture, by llama.cpp's name, each with its producer.
///
/// # Errors
/// `Malformed` for a definition that is not.
pub fn folds(arch: &str) -> Result<Vec<(Template, FoldRule)>> {
    let all = super::all()?;
    let definition = all.into_iter().find(|a| a.arch == arch);
    let mut rules = Vec::new();
    for (from, spec) in definition.into_iter().flat_map(|a| a.fold) {
        match spec {
            FoldSpec::Rule(rule) => rules.push((from, rule)),
            FoldSpec::Rules(several) => rules.extend(several.into_iter().map(|rule| (from.clone(), rule))),
            FoldSpec::Keep(false) => {}
            FoldSpec::Keep(true) => {
                return Err(Error::malformed(format!("[fold] {:?}: true says nothing", from.text())));
            }
        }
    }
    Ok(rules)
}
