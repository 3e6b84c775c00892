//! Decoding tokens with a package, or with a directory of them.

mod model;

use std::collections::BTreeMap;

pub use model::LanguageModel;

use super::{Program, Rounding, States, Tensor};
use crate::error::{Error, Result};
use model::{HIDDEN, HIDDEN_AFTER, Interface};

/// What is added to scores that are not to count. Finite, so that no row is without any; float16 holds twice of it.
const HIDDEN_SCORE: f32 = -30000.0;

/// A function that takes so many times the tokens that are left is called once rather than one for a token each time.
const FILLED_UP: usize = 4;

/// Tokens that were decoded, and what the model keeps of them.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a LanguageModel,
    states: Vec<States>,
    context: usize,
    position: usize,
    rounding: Rounding,
}

impl<'a> Session<'a> {
    /// An empty session of at most `context` tokens.
    ///
    /// # Errors
    /// `Misuse` for more tokens than the model can keep; `Limit` where there is no memory for its states.
    pub fn new(model: &'a LanguageModel, context: usize, rounding: Rounding) -> Result<Self> {
        let most = model.context();
        if context > most {
            return Err(Error::misuse(format!("a context of {context} tokens, the package has {most}"))
                .at(&model.path)
                .hint("convert with a longer --context"));
        }
        let states = model.programs.iter().map(Program::states).collect::<Result<_>>()?;
        Ok(Self { model, states, context, position: 0, rounding })
    }

    /// Decodes the tokens that follow. Logits of each: `ids.len()` rows of [`Self::n_vocab`]. Where functions take
    /// fixed numbers of tokens, they are called one after the other, those of most tokens first.
    ///
    /// # Errors
    /// `Misuse` for more tokens than there is room for, or that are none of the vocabulary; those of
    /// [`Program::call`].
    pub fn decode(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let (room, n_vocab) = (self.context - self.position, self.n_vocab());
        if ids.len() > room {
            return Err(Error::misuse(format!("{} tokens, there is room for {room}", ids.len())));
        }
        if let Some(id) = ids.iter().find(|id| usize::try_from(**id).map_or(true, |id| id >= n_vocab)) {
            return Err(Error::misuse(format!("there is no token {id}, the vocabulary has {n_vocab}")));
        }
        let (mut rows, n) = (Vec::new(), ids.len().saturating_mul(n_vocab));
        let reserved = rows.try_reserve_exact(n);
        reserved
            .map_err(|_| Error::limit(format!("there is no memory for {n} logits")).at(&self.model.path))?;
        let mut rest = ids;
        while !rest.is_empty() {
            // What is filled up with other tokens is written over later, and hidden until then.
            let (left, end) = (rest.len(), self.model.context() - self.position);
            let fits = |(tokens, _): &&(Option<usize>, String)| {
                tokens.is_none_or(|n| (1..=left).contains(&n) || (n <= end && n / left <= FILLED_UP))
            };
            // There is one for a single token.
            let Some((tokens, function)) = self.model.functions.iter().find(fits) else { break };
            let (some, others) = rest.split_at(tokens.unwrap_or(left).min(left));
            let mut given = some.to_vec();
            given.resize(tokens.unwrap_or(left), some[0]);
            self.step(function, &given, some.len(), &mut rows)?;
            (self.position, rest) = (self.position + some.len(), others);
        }
        Ok(rows)
    }

    /// Calls one function of every package, and keeps the logits of the first `wanted` tokens.
    fn step(&mut self, function: &str, ids: &[i32], wanted: usize, rows: &mut Vec<f32>) -> Result<()> {
        let mut values = self.inputs(ids)?;
        for (program, states) in self.model.programs.iter().zip(&mut self.states) {
            let Some(found) = program.function(function) else { continue };
            let names = found.inputs.iter().map(|(declared, _)| &declared.name);
            let given = |name: &String| values.get(name.as_str()).map(|value| (name.clone(), value.clone()));
            let inputs: BTreeMap<String, Tensor> = names.filter_map(given).collect();
            for (name, value) in program.call(function, &inputs, states, self.rounding)? {
                let name = if name == HIDDEN_AFTER { HIDDEN.into() } else { name };
                values.insert(name, value);
            }
        }
        let parts = self.model.logits.iter().map(|(name, n)| {
            let part = values.get(name).filter(|part| part.shape() == [1, ids.len(), *n]);
            part.and_then(Tensor::as_floats).map(|part| (part, *n))
        });
        let parts: Option<Vec<(&[f32], usize)>> = parts.collect();
        let parts = parts.ok_or_else(|| {
            let found =
                self.model.logits.iter().filter_map(|(name, _)| Some((name, values.get(name)?.shape())));
            let found: Vec<_> = found.collect();
            Error::unsupported(format!("it gives {found:?}, logits of {} tokens were expected", ids.len()))
                .at(&self.model.path)
        })?;
        for i in 0..wanted {
            parts.iter().for_each(|(part, n)| rows.extend_from_slice(&part[i * n..][..*n]));
        }
        Ok(())
    }

    /// All inputs of the interface: those that a package lacks are left out.
    fn inputs(&self, ids: &[i32]) -> Result<BTreeMap<String, Tensor>> {
        let (first, n) = (self.position, ids.len());
        let keys = match self.model.interface {
            Interface::Gpu => first + n,
            Interface::Ane => self.model.context(),
        };
        if let Some(program) = self.model.programs.first() {
            program.check_input(&[n, keys])?;
        }
        let places = first as i32..(first + n) as i32; // within the context
        let tokens = Tensor::ints(&[1, n], ids.to_vec())?;
        let of = |list: Vec<(&str, Tensor)>| {
            list.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
        };
        Ok(match self.model.interface {
            Interface::Gpu => of(vec![("inputIds", tokens), ("causalMask", mask(first, n, keys)?)]),
            Interface::Ane => of(vec![
                ("input_ids", tokens),
                ("position_ids", Tensor::ints(&[n], places.clone().collect())?),
                ("causal_mask", mask(first, n, keys)?),
                ("current_pos", Tensor::ints(&[1], vec![places.start])?),
            ]),
        })
    }

    /// How many tokens are kept.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Keeps the first `n` tokens alone; all where there are no more.
    pub fn truncate(&mut self, n: usize) {
        // What the cache holds beyond is hidden by the mask until it is written over.
        self.position = self.position.min(n);
    }

    /// Most tokens that are kept.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Logits of each token.
    pub fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    /// The first operation whose result was beyond float16, where results are rounded to that.
    pub fn overflow(&self) -> Option<&str> {
        self.states.iter().find_map(States::overflow)
    }
}

/// `[1, 1, n, keys]`: what tokens from `first` on see, keys up to their own.
fn mask(first: usize, n: usize, keys: usize) -> Result<Tensor> {
    let row = |i: usize| (0..keys).map(move |key| if key <= first + i { 0.0 } else { HIDDEN_SCORE });
    Tensor::floats(&[1, 1, n, keys], (0..n).flat_map(row).collect())
}
