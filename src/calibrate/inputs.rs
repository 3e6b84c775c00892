//! Which inputs a model's matrices have: found by a look at one computation.

use std::collections::{HashMap, HashSet};

use regex::Regex;

use crate::container::moments::Input;
use crate::error::{Error, Result};
use crate::ggml::{Node, Observer, Op};

/// Which inputs are wanted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Layers, all where `None`.
    pub layers: Option<Layers>,
    /// Weights whose name matches.
    pub tensors: Option<Regex>,
    /// The matrix that makes the logits too.
    pub output: bool,
}

/// Numbers of layers, as in `0-3,7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers(Vec<(usize, usize)>);

impl std::str::FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last).then_some((first, last))
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        ranges.map(Self).ok_or_else(|| "numbers of layers were expected, such as 0-3,7".into())
    }
}

impl Layers {
    /// Whether layer `i` is among them.
    pub fn contains(&self, i: usize) -> bool {
        self.0.iter().any(|&(first, last)| (first..=last).contains(&i))
    }
}

/// The weight and the input of a product, where it is one with a model's weight.
pub(super) fn product<'n>(node: &Node<'n>) -> Option<(String, Node<'n>)> {
    if node.op() == Op::Other {
        return None;
    }
    let (weight, input) = (node.source(0)?, node.source(1)?);
    let name = weight.name();
    name.ends_with(".weight").then(|| (name.into_owned(), input))
}

/// Collects the inputs of all products with weights, and looks at none.
#[derive(Debug, Default)]
pub(super) struct Finder {
    inputs: Vec<Input>,
    // By the node that is the input, and the matrices that it is divided among.
    by_node: HashMap<(usize, u64, bool), usize>,
    seen: HashSet<String>,
    /// Most experts that one token is shown to.
    pub(super) used: usize,
}

impl Observer for Finder {
    fn wants(&mut self, node: &Node<'_>) -> bool {
        if let Some((name, input)) = product(node) {
            let [columns, _, stacked, more] = node.source(0).map_or([0; 4], |w| w.shape());
            let experts = (stacked * more) as u64;
            if !self.seen.insert(name.clone()) {
                return false;
            }
            self.used = self.used.max(node.source(2).map_or(1, |ids| ids.shape()[0]));
            let key = (input.id(), experts, node.op() == Op::MulMatId);
            let at = *self.by_node.entry(key).or_insert_with(|| {
                let columns = columns as u64;
                self.inputs.push(Input { name: name.clone(), weights: Vec::new(), columns, experts });
                self.inputs.len() - 1
            });
            self.inputs[at].weights.push(name);
        }
        false
    }

    fn see(&mut self, _: &Node<'_>) -> Result<()> {
        Ok(())
    }
}

impl Finder {
    /// The inputs that `selection` wants, in the order of the computation; each keeps all its weights.
    ///
    /// # Errors
    /// `Misuse` when nothing is selected.
    pub(super) fn select(self, selection: &Selection) -> Result<Vec<Input>> {
        let wanted = |weight: &String| {
            let layer = weight.split('.').skip_while(|p| *p != "blk").nth(1).and_then(|n| n.parse().ok());
            let output = ["output.weight", "token_embd.weight"].contains(&weight.as_str());
            let layers = match (&selection.layers, layer) {
                (None, _) => true,
                (Some(layers), Some(layer)) => layers.contains(layer),
                (Some(_), None) => output,
            };
            layers
                && (selection.output || !output)
                && selection.tensors.as_ref().is_none_or(|t| t.is_match(weight))
        };
        let found = self.inputs.len();
        let inputs: Vec<Input> = self.inputs.into_iter().filter(|i| i.weights.iter().any(wanted)).collect();
        if inputs.is_empty() {
            return Err(Error::misuse(format!("none of {found} inputs of matrices is chosen"))
                .hint("--layers and --tensors choose; qconv inspect MODEL lists the weights"));
        }
        Ok(inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::Layers;

    #[test]
    fn layers() {
        let layers: Layers = "0-2, 7".parse().unwrap();
        let found: Vec<usize> = (0..10).filter(|i| layers.contains(*i)).collect();
        assert_eq!(found, [0, 1, 2, 7]);
        for text in ["", "a", "3-1", "1,,2", "-1", "1-"] {
            assert!(text.parse::<Layers>().is_err(), "{text}");
        }
    }
}
