//! The rows of a definition that apply to one model, with the layers that they apply to.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Model;
use super::expr::{Expr, truth};
use super::rows::Row;
use super::scope::WithLayer;
use super::template::Captures;
use crate::error::{Error, Result};

/// Rows that apply to this model, with the layers they apply to.
pub(super) struct ActiveRow<'a> {
    pub row: &'a Row,
    layers: Option<HashSet<u64>>,
    /// All layers may lack it, or these.
    pub optional: bool,
    lacking: HashSet<u64>,
    pub pad: u64,
    /// Letters of the source's name by layer, where they follow from it, and the layer by these.
    letters: (HashMap<u64, Letters>, HashMap<Letters, u64>),
    pub stack: u64,
}

type Letters = BTreeMap<char, u64>;

impl ActiveRow<'_> {
    /// What the placeholders of a source's name stand for, if the row is about it.
    pub fn captures(&self, name: &str) -> Option<Captures> {
        let mut captures = self.row.hf.matches(name)?;
        if !self.row.with.is_empty() {
            let value = |c: &char| Some((*c, *captures.integers.get(c)?));
            let letters = self.row.with.keys().map(value).collect::<Option<Letters>>()?;
            captures.integers.insert('i', *self.letters.1.get(&letters)?);
        }
        self.in_layer(&captures).then_some(captures)
    }

    /// The source's name.
    pub fn source_name(&self, captures: &Captures) -> Option<String> {
        match captures.integers.get(&'i').and_then(|i| self.letters.0.get(i)) {
            None => self.row.hf.fill(captures),
            Some(letters) => {
                let mut captures = captures.clone();
                captures.integers.extend(letters);
                self.row.hf.fill(&captures)
            }
        }
    }

    pub fn in_layer(&self, captures: &Captures) -> bool {
        match (&self.layers, captures.integers.get(&'i')) {
            (Some(layers), Some(i)) => layers.contains(i),
            _ => true,
        }
    }

    pub fn may_lack(&self, captures: &Captures) -> bool {
        self.optional || captures.integers.get(&'i').is_some_and(|i| self.lacking.contains(i))
    }
}

impl Model {
    /// Number of layers, if the definition has any. Bounded by nothing: compare, do not allocate.
    pub(super) fn layers(&self) -> Result<u64> {
        Ok(self.var("n_layers")?.as_u64().unwrap_or(0))
    }

    pub(super) fn active_rows(&self, tensors: usize) -> Result<Vec<ActiveRow<'_>>> {
        // A layer that applies has at least one tensor: more layers than tensors are not visited.
        let n_layers = self.layers()?.min(tensors as u64 + 1);
        let mut rows = Vec::new();
        for row in &self.arch.rows {
            let context = |e: Error| e.context(format!("{}: row {:?}", self.arch.name, row.hf.text()));
            let holds = |e: &Option<Expr>| match e {
                Some(e) => Ok(truth(&e.eval(&self.scope)?)),
                None => Ok(true),
            };
            if !holds(&row.when).map_err(context)? {
                continue;
            }
            let layers_where = |e: &Expr| {
                let mut set = HashSet::new();
                for i in 0..n_layers {
                    if truth(&e.eval(&WithLayer(&self.scope, i)).map_err(context)?) {
                        set.insert(i);
                    }
                }
                Ok(set)
            };
            let mut layers = row.layers.as_ref().map(layers_where).transpose()?;
            let (optional, lacking) = match &row.optional {
                None => (false, HashSet::new()),
                Some(Expr::Literal(v)) => (truth(v), HashSet::new()),
                Some(e) => (false, layers_where(e)?),
            };
            let mut letters = (HashMap::new(), HashMap::new());
            if !row.with.is_empty() {
                for i in (0..n_layers).filter(|i| layers.as_ref().is_none_or(|l| l.contains(i))) {
                    if let Some(found) = self.letters(row, i).map_err(context)? {
                        letters.1.insert(found.clone(), i);
                        letters.0.insert(i, found);
                    }
                }
                layers = Some(letters.0.keys().copied().collect());
            }
            let stack =
                match &row.stack {
                    None => 1,
                    Some(e) => e.eval(&self.scope).map_err(context)?.as_u64().ok_or_else(|| {
                        context(Error::malformed("the number of tensors to stack is unknown"))
                    })?,
                };
            let pad = match &row.pad {
                None => 0,
                Some(e) => e.eval(&self.scope).map_err(context)?.as_u64().unwrap_or(0),
            };
            rows.push(ActiveRow { row, layers, optional, lacking, pad, letters, stack });
        }
        Ok(rows)
    }

    /// The letters that follow from layer `i`; none where one is null.
    fn letters(&self, row: &Row, i: u64) -> Result<Option<Letters>> {
        let mut letters = Letters::new();
        for (c, e) in &row.with {
            let v = e.eval(&WithLayer(&self.scope, i))?;
            match v.as_u64() {
                Some(n) => letters.insert(*c, n),
                None if v.is_null() => return Ok(None),
                None => return Err(Error::malformed(format!("{{{c}}} = {v} is no index"))),
            };
        }
        Ok(Some(letters))
    }
}
