//! `[also]`: layouts that are read besides that of `[tensors]`, and never written.
//!
//! A stored tensor is taken for one that `[tensors]` knows, or for several: experts that lie in one
//! tensor, gate and up that do. Nothing is moved; the tensors it is taken for are parts of it.

use serde::Deserialize;

use super::Model;
use super::active::ActiveRow;
use super::expr::{Expr, truth};
use super::halves::Layout;
use super::rows::Op;
use super::scope::{WithCaptures, WithShape};
use super::template::{Captures, Template};
use crate::error::{Error, Result};
use crate::tensor::{Axes, TensorInfo, elements};

/// Most tensors that one is taken for.
const MAX_PARTS: u64 = 1 << 20;

/// What a stored tensor is taken for.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Also {
    /// `false`: the base's entry does not count.
    Keep(bool),
    Name(Template),
    Table(AlsoTable),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AlsoTable {
    to: Vec<Template>,
    when: Option<Expr>,
    #[serde(default)]
    ops: Vec<Op>,
}

impl Also {
    fn to(&self) -> &[Template] {
        match self {
            Self::Keep(_) => &[],
            Self::Name(to) => std::slice::from_ref(to),
            Self::Table(table) => &table.to,
        }
    }

    fn ops(&self) -> &[Op] {
        if let Self::Table(table) = self { &table.ops } else { &[] }
    }

    fn when(&self) -> Option<&Expr> {
        if let Self::Table(table) = self { table.when.as_ref() } else { None }
    }

    /// The letter that counts along the first axis: one that the stored name lacks.
    fn counter(&self, stored: &Template) -> Option<char> {
        self.to().first()?.letters().find(|c| !stored.has(*c))
    }

    /// # Errors
    /// `Malformed`, as the entry in the definition.
    pub fn check(&self, stored: &Template) -> Result<()> {
        let fail = |why: &str| Err(Error::malformed(format!("also.{:?}: {why}", stored.text())));
        let counter = self.counter(stored);
        let placeholders = |to: &Template| {
            to.has_parameter() == stored.has_parameter()
                && to.letters().all(|c| stored.has(c) || Some(c) == counter)
                && counter.is_none_or(|c| to.has(c))
        };
        if self.to().is_empty() && !matches!(self, Self::Keep(false)) {
            return fail("a name, a table with `to`, or false was expected");
        }
        if !self.to().iter().all(placeholders) {
            return fail(
                "`to` needs the same placeholders, but for one letter that counts along the first axis",
            );
        }
        if self.ops().iter().any(|op| !matches!(op, Op::Rearrange(_)) || op.layout().is_some()) {
            return fail("it can be rearranged, and no more");
        }
        Ok(())
    }
}

impl Model {
    /// The tensors that a stored one is taken for: names in the definition's terms, and where they
    /// lie in it. Mostly itself.
    ///
    /// # Errors
    /// `Malformed` where the counts of config.json and of the tensor differ, or its shape does not
    /// fall into the parts.
    pub(super) fn taken_for(&self, t: &TensorInfo, rows: &[ActiveRow<'_>]) -> Result<Vec<(String, Axes)>> {
        let name = self.canonical(&t.name);
        elements(&t.shape)?;
        let axes = Axes::new(&t.shape);
        for (stored, also) in &self.arch.also {
            let Some(captures) = stored.matches(&name) else { continue };
            let applies = match also.when() {
                Some(when) => {
                    let scope = WithCaptures(&self.scope, &captures);
                    truth(&when.eval(&WithShape(&scope, &t.shape))?)
                }
                None => rows.iter().all(|r| r.row.hf.matches(&name).is_none()),
            };
            if applies && !also.to().is_empty() {
                return self.parts(stored, also, captures, axes, rows);
            }
        }
        Ok(vec![(name, axes)])
    }

    fn parts(
        &self,
        stored: &Template,
        also: &Also,
        mut captures: Captures,
        mut whole: Axes,
        rows: &[ActiveRow<'_>],
    ) -> Result<Vec<(String, Axes)>> {
        self.apply(
            also.ops(),
            &mut whole,
            &mut Vec::new(),
            &WithCaptures(&self.scope, &captures),
            Layout::Ggml,
        )?;
        let shape = whole.shape();
        let first = |axis: usize| {
            shape.get(axis).copied().ok_or_else(|| Error::malformed(format!("shape {shape:?} has no parts")))
        };
        let counter = also.counter(stored);
        let count = if counter.is_some() { first(0)? } else { 1 };
        if let Some(letter) = counter {
            captures.integers.insert(letter, 0);
            let name = also.to().first().and_then(|to| to.fill(&captures)).unwrap_or_default();
            let row = rows.iter().find(|r| r.row.hf.matches(&name).is_some());
            if let Some(wanted) = row.map(|r| r.stack).filter(|n| *n != count) {
                return Err(Error::malformed(format!(
                    "holds {count} tensors, config.json says there are {wanted}"
                ))
                .hint("config.json and the weights are not of the same model"));
            }
        }
        let n = also.to().len() as u64;
        if count.saturating_mul(n) > MAX_PARTS {
            return Err(Error::limit(format!("holds {count} tensors, at most {MAX_PARTS} are allowed")));
        }
        let mut parts = Vec::new();
        for i in 0..count {
            let mut one = whole.clone();
            if let Some(letter) = counter {
                captures.integers.insert(letter, i);
                one.index(i)?;
            }
            for (k, to) in (0..).zip(also.to()) {
                let name = to.fill(&captures).ok_or_else(|| Error::malformed("has no name"))?;
                let mut part = one.clone();
                if n > 1 {
                    let rows = first(usize::from(counter.is_some()))?;
                    if !rows.is_multiple_of(n) {
                        return Err(Error::malformed(format!(
                            "shape {shape:?} does not fall into {n} parts"
                        )));
                    }
                    part.slice(0, rows / n * k, rows / n * (k + 1), 1)?;
                }
                parts.push((name, part));
            }
        }
        Ok(parts)
    }
}
