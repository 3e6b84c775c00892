//! Packages of language models: what they are called with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::super::Program;
use super::super::parse::{Declared, Function};
use crate::container::coreml::chunks::{CHUNKS, packages};
use crate::container::coreml::package::is_package;
use crate::error::{Error, Result};
use crate::limits::Limits;

/// What goes from one package to the next.
pub(super) const HIDDEN: &str = "hidden_states";
/// What layers make of it.
pub(super) const HIDDEN_AFTER: &str = "output_hidden_states";

/// The step of functions that take any number of tokens.
const ANY_STEP: usize = 64;
/// Most words of a vocabulary: 2^18 are the most that are known.
const MOST_WORDS: usize = 1 << 22;

/// Names of what goes into a model, and of its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interface {
    /// That of swift-transformers (`LanguageModel.swift`): `inputIds`, `causalMask`; `keyCache` and `valueCache`
    /// `[layers, 1, kv_heads, context, head_dim]`; `logits`. Any number of tokens.
    Gpu,
    /// That of ANEMLL (`llama_converter.py`): `input_ids`, `position_ids`, `causal_mask`, `current_pos`; one state
    /// `[2 layers, kv_heads, context, head_dim]`; `logits1`, `logits2`, ... A function for each number of tokens.
    Ane,
}

/// A language model: a package, or a directory of packages that are called one after the other (`chunks.json`), with
/// an interface that is known.
#[derive(Debug)]
pub struct LanguageModel {
    pub(super) path: PathBuf,
    pub(super) programs: Vec<Program>,
    pub(super) interface: Interface,
    /// Functions by how many tokens they take, most first; `None`: any number.
    pub(super) functions: Vec<(Option<usize>, String)>,
    /// Where logits are, in order, and how many.
    pub(super) logits: Vec<(String, usize)>,
    context: usize,
}

impl LanguageModel {
    /// Opens `X.mlpackage`, or a directory with a `chunks.json`.
    ///
    /// # Errors
    /// Those of [`packages`] and [`Program::open`]; `Unsupported` for an interface that is not known, with what it
    /// has; `Limit` for a vocabulary or states beyond all use.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        Self::of(path, programs(path, limits)?).map_err(|e| e.at(path))
    }

    fn of(path: &Path, programs: Vec<Program>) -> Result<Self> {
        let (Some(first), Some(last)) = (programs.first(), programs.last()) else {
            return Err(Error::malformed("there are no packages"));
        };
        let mut functions = Vec::new();
        let mut interface = None;
        for name in first.functions() {
            let Some((found, tokens)) = first.function(name).and_then(interface_of) else { continue };
            if *interface.get_or_insert(found) == found {
                functions.push((tokens, name.to_string()));
            }
        }
        let Some(interface) = interface else { return Err(unknown(first)) };
        functions.sort_by_key(|(tokens, _)| std::cmp::Reverse(tokens.unwrap_or(usize::MAX)));
        if !matches!(functions.last(), Some((None | Some(1), _))) {
            return Err(Error::unsupported("it has no function for one token"));
        }
        let of = |program: &Program| {
            let missing = |name: &String| {
                let path = program.path().to_path_buf();
                Error::malformed(format!("it has no function {name:?}, as the first package has")).at(path)
            };
            functions.iter().try_for_each(|(_, name)| match program.function(name) {
                Some(_) => Ok(()),
                None => Err(missing(name)),
            })
        };
        programs.iter().try_for_each(of)?;
        let (_, name) = &functions[0]; // there is one, as was found
        let logits = last.function(name).map(logits).unwrap_or_default();
        let words = logits.iter().map(|(_, n)| *n).fold(0, usize::saturating_add);
        if words == 0 {
            return Err(Error::unsupported("it gives no logits of a known number"));
        }
        // A word has a bit at the least.
        let bits = programs.iter().map(|p| p.bytes.saturating_mul(8)).fold(0, u64::saturating_add);
        if words > MOST_WORDS || words as u64 > bits {
            return Err(Error::limit(format!(
                "it gives {words} logits for a token: vocabularies have at most {MOST_WORDS} words, and no more than \
                 weights"
            )));
        }
        first.check_memory(programs.iter().map(Program::state_elements))?;
        let states = programs.iter().filter_map(|p| p.function(name)).flat_map(|f| &f.states);
        let sizes: Option<Vec<usize>> = states.map(|state| context(interface, state)).collect();
        let context = sizes.and_then(|sizes| sizes.into_iter().min());
        let context = context.ok_or_else(|| {
            Error::unsupported("it has no cache, or one of another shape than is known")
                .hint("models without states compute everything again for each token: convert with qconv hf-to-coreml")
        })?;
        Ok(Self { path: path.into(), programs, interface, functions, logits, context })
    }

    /// Most tokens that it can keep.
    pub fn context(&self) -> usize {
        self.context
    }

    /// How many tokens are best decoded at once: the most that a function takes, where none takes any number.
    pub fn step(&self) -> usize {
        let known = self.functions.iter().map_while(|(tokens, _)| *tokens);
        known.max().unwrap_or(ANY_STEP).clamp(1, self.context.max(1))
    }

    /// Logits of each token.
    pub fn n_vocab(&self) -> usize {
        self.logits.iter().map(|(_, n)| n).sum()
    }
}

/// The packages at `path`.
fn programs(path: &Path, limits: &Limits) -> Result<Vec<Program>> {
    if !is_package(path) && !path.join(CHUNKS).is_file() {
        return Err(Error::unsupported(format!("is no Core ML package, and has no {CHUNKS}"))
            .at(path)
            .hint("a package is a directory with a Manifest.json, usually called NAME.mlpackage"));
    }
    packages(path, limits)?.iter().map(|package| Program::open(package, limits)).collect()
}

/// The interface of a function that begins with tokens, and how many it takes.
fn interface_of(function: &Function) -> Option<(Interface, Option<usize>)> {
    let input = |name: &str| function.inputs.iter().map(|(d, _)| d).find(|d| d.name == name);
    let (interface, ids) = match (input("inputIds"), input("input_ids")) {
        (Some(ids), _) => (Interface::Gpu, ids),
        (None, Some(ids)) => (Interface::Ane, ids),
        (None, None) => return None,
    };
    match ids.shape[..] {
        [None | Some(1), tokens] => Some((interface, tokens)),
        _ => None,
    }
}

/// Outputs `logits`, or `logits1`, `logits2`, ..., and their last sizes.
fn logits(function: &Function) -> Vec<(String, usize)> {
    let outputs: HashMap<&str, &Declared> =
        function.outputs.iter().rev().map(|(d, _)| (d.name.as_str(), d)).collect();
    let find = |name: String| {
        let declared = outputs.get(name.as_str())?;
        let n = (declared.shape.len() == 3).then(|| *declared.shape.last()?).flatten()?;
        Some((name, n))
    };
    match find("logits".into()) {
        Some(one) => vec![one],
        None => (1..).map_while(|j| find(format!("logits{j}"))).collect(),
    }
}

/// How many tokens a cache holds.
fn context(interface: Interface, state: &Declared) -> Option<usize> {
    match (interface, &state.shape[..]) {
        (Interface::Gpu, [_, _, _, context, _]) | (Interface::Ane, [_, _, context, _]) => *context,
        _ => None,
    }
}

fn unknown(program: &Program) -> Error {
    let described = |name: &str| {
        let inputs = program.function(name).map(|f| f.inputs.iter());
        let inputs: Vec<String> =
            inputs.into_iter().flatten().map(|(d, _)| format!("{} {d}", d.name)).collect();
        format!("{name}({})", inputs.join(", "))
    };
    let functions: Vec<String> = program.functions().map(described).collect();
    Error::unsupported(format!("it is called otherwise than language models are: {}", functions.join("; ")))
        .hint("known are inputIds with causalMask, and input_ids with position_ids, causal_mask and current_pos")
}
