//! Rows of `[tensors]`: where one kind of tensor goes, and its transforms.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::expr::Expr;
use super::halves::Layout;
use super::template::Template;
use crate::error::{Error, Result};
use crate::tensor::DType;

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum RowSpec {
    /// `false`: the base's row does not count.
    Keep(bool),
    Name(Template),
    Row(Box<RowTable>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RowTable {
    to: Option<Template>,
    #[serde(default)]
    split: Vec<PartSpec>,
    #[serde(default)]
    axis: usize,
    #[serde(default)]
    sizes: Vec<Expr>,
    #[serde(default)]
    interleaved: bool,
    #[serde(default)]
    ops: Vec<Op>,
    stack: Option<Expr>,
    at: Option<u64>,
    pad: Option<Expr>,
    when: Option<Expr>,
    layers: Option<Expr>,
    optional: Option<Expr>,
    #[serde(default)]
    bias: bool,
    #[serde(default)]
    with: BTreeMap<char, Expr>,
    #[serde(rename = "type")]
    fixed: Option<FixedType>,
}

/// A part of a split: its name, or with transforms of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum PartSpec {
    Name(Template),
    Part { to: Template, ops: Vec<Op> },
}

/// How one kind of tensor goes from the checkpoint to GGUF.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Name in the checkpoint.
    pub hf: Template,
    /// Names in GGUF: one, or the parts of a split. Parts of the same name are joined along the
    /// first axis, in this order.
    pub to: Vec<Template>,
    /// For a split: the axis.
    pub axis: usize,
    /// For a split: sizes of the parts; equal parts when empty.
    pub sizes: Vec<Expr>,
    /// For a split: part `k` of `n` takes every `n`-th from `k` on.
    pub interleaved: bool,
    /// Transforms of the whole.
    pub ops: Vec<Op>,
    /// Rearrangements of each part, after `ops` and the split.
    pub part_ops: Vec<Vec<Op>>,
    /// How many tensors are stacked along a new first axis; `{e}` runs from 0 to this.
    pub stack: Option<Expr>,
    /// Instead of `{e}`: the place in the stack.
    pub at: Option<u64>,
    /// Rows that GGUF has at least: zeros follow those of the checkpoint.
    pub pad: Option<Expr>,
    /// Whether the row applies to this config at all.
    pub when: Option<Expr>,
    /// Whether it applies to layer `i`.
    pub layers: Option<Expr>,
    /// `true`: all layers may lack it, or none. An expression: layers `i` of which each may.
    pub optional: Option<Expr>,
    /// With `{p}`: the bias must be there too.
    pub bias: bool,
    /// Letters of the source's name that follow from `i`. Where one is null, the row does not apply.
    pub with: BTreeMap<char, Expr>,
    /// The type in GGUF, whatever the file type.
    pub fixed: Option<DType>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FixedType {
    F32,
    F16,
}

/// A transform.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Op {
    /// `{ rearrange = "(h two d) ... -> (h d two) ...", h = "n_heads", two = 2 }`
    Rearrange(RearrangeOp),
    /// `{ slice = 0, start = "a", stop = "b", step = "c" }`: axis and range.
    Slice(SliceOp),
    /// `{ scale = ["a", "b"], sizes = ["m", "n"] }`: a factor for each stretch of the first axis,
    /// in f32.
    Scale(ScaleOp),
    /// `{ fn = "neg_exp" }`: a function of each value, or row, in f32.
    Function(FunctionOp),
    /// `{ mul = 2, add = 1 }`: `x * mul + add`, in f32.
    Affine(AffineOp),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FunctionOp {
    #[serde(rename = "fn")]
    pub function: Function,
}

/// A function of single values, or of rows.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Function {
    /// `-exp(x)`.
    NegExp,
    /// `exp(x)`.
    Exp,
    /// Each row divided by its Euclidean norm.
    UnitRows,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct RearrangeOp {
    pub rearrange: String,
    /// The layout that it leads to, which of all others lack it: the order of rotated elements.
    #[serde(rename = "for")]
    pub layout: Option<Layout>,
    #[serde(flatten)]
    pub sizes: BTreeMap<String, Expr>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SliceOp {
    pub slice: usize,
    pub start: Option<Expr>,
    pub stop: Option<Expr>,
    pub step: Option<Expr>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScaleOp {
    pub scale: Vec<Expr>,
    pub sizes: Vec<Expr>,
    /// Whether the stretches follow each other until the axis ends.
    #[serde(default)]
    pub repeat: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AffineOp {
    pub mul: Option<Expr>,
    pub add: Option<Expr>,
}

impl Op {
    /// The layout that alone has it.
    pub fn layout(&self) -> Option<Layout> {
        if let Self::Rearrange(r) = self { r.layout } else { None }
    }
}

impl SliceOp {
    /// Whether it takes away the first and nothing else.
    pub fn cuts_beginning(&self) -> bool {
        self.start.is_some() && self.stop.is_none() && self.step.is_none()
    }
}

impl Row {
    /// Whether the first rows of its sources are taken away, and nothing else.
    pub fn cuts_beginning(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Slice(s) if s.cuts_beginning()))
    }

    /// The parts that have the same name as part `k`, itself among them.
    pub fn joined_with(&self, k: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.to.len()).filter(move |&j| self.to[j] == self.to[k])
    }

    pub fn new(hf: Template, spec: RowSpec) -> Result<Self> {
        let table = match spec {
            RowSpec::Row(table) => *table,
            RowSpec::Keep(_) => {
                let why = format!("tensors.{:?}: a name, a table or false was expected", hf.text());
                return Err(Error::malformed(why));
            }
            RowSpec::Name(to) => RowTable {
                to: Some(to),
                split: Vec::new(),
                axis: 0,
                sizes: Vec::new(),
                interleaved: false,
                ops: Vec::new(),
                stack: None,
                at: None,
                pad: None,
                when: None,
                layers: None,
                optional: None,
                bias: false,
                with: BTreeMap::new(),
                fixed: None,
            },
        };
        let fail = |why: &str| Err(Error::malformed(format!("tensors.{:?}: {why}", hf.text())));
        let (to, part_ops): (Vec<Template>, Vec<Vec<Op>>) = match (table.to, table.split) {
            (Some(to), split) if split.is_empty() => (vec![to], vec![Vec::new()]),
            (None, split) if !split.is_empty() => split
                .into_iter()
                .map(|part| match part {
                    PartSpec::Name(to) => (to, Vec::new()),
                    PartSpec::Part { to, ops } => (to, ops),
                })
                .unzip(),
            _ => return fail("either `to` or `split` is needed"),
        };
        if part_ops.iter().flatten().any(|op| !matches!(op, Op::Rearrange(_))) {
            return fail("parts of a `split` can be rearranged, and no more");
        }
        let is_joined = (1..to.len()).any(|k| to[..k].contains(&to[k]));
        // Behind all others: so that they can be undone and done on a tensor of GGUF.
        let last =
            |ops: &[Op]| ops.iter().skip_while(|op| op.layout().is_none()).all(|op| op.layout().is_some());
        let tells_layouts = |ops: &[Op]| ops.iter().any(|op| op.layout().is_some());
        let in_parts = part_ops.iter().any(|ops| tells_layouts(ops));
        let alone = !is_joined && table.stack.is_none() && table.pad.is_none();
        if !last(&table.ops)
            || !part_ops.iter().all(|ops| last(ops))
            || (tells_layouts(&table.ops) && (to.len() > 1 || !alone))
            || (in_parts && !alone)
        {
            return fail(
                "rearrangements `for` a layout come last, in the parts of a `split`, and go with neither joined parts nor `stack` nor `pad`",
            );
        }
        if is_joined && (table.sizes.is_empty() || table.interleaved) {
            return fail("parts that are joined need `sizes`");
        }
        let follows = |c: char| table.with.contains_key(&c);
        if table.with.keys().any(|c| *c == 'i' || !hf.has(*c)) {
            return fail("`with` is about letters of the name that follow from {i}");
        }
        let known = |c: char| hf.has(c) || (c == 'i' && !table.with.is_empty());
        if to.iter().any(|t| t.letters().any(|c| !known(c)) || t.has_parameter() != hf.has_parameter()) {
            return fail("`to` needs the same placeholders");
        }
        let lost = hf.letters().any(|c| c != 'i' && !to[0].has(c) && !follows(c));
        let stacked = lost || table.at.is_some();
        if stacked != table.stack.is_some()
            || (lost && !hf.has('e'))
            || (lost && table.at.is_some())
            || (stacked && to.len() > 1)
        {
            return fail("`stack` goes with an {e} that `to` lacks, or with `at`");
        }
        if table.pad.is_some() && (to.len() > 1 || stacked) {
            return fail("`pad` goes with neither `split` nor `stack`");
        }
        let scales = |op: &Op| matches!(op, Op::Scale(s) if s.sizes.len() == s.scale.len());
        if table.ops.iter().any(|op| matches!(op, Op::Scale(_)))
            && !(table.ops.iter().all(scales) && to.len() == 1 && table.stack.is_none())
        {
            return fail(
                "`scale` needs one size a factor, and goes with neither rearrangements nor `split` nor `stack`",
            );
        }
        if !table.sizes.is_empty() && table.sizes.len() != to.len() {
            return fail("`sizes` needs one size a part");
        }
        Ok(Self {
            hf,
            to,
            axis: table.axis,
            sizes: table.sizes,
            interleaved: table.interleaved,
            ops: table.ops,
            part_ops,
            stack: table.stack,
            at: table.at,
            pad: table.pad,
            when: table.when,
            layers: table.layers,
            optional: table.optional,
            bias: table.bias,
            with: table.with,
            fixed: table.fixed.map(|t| match t {
                FixedType::F32 => DType::F32,
                FixedType::F16 => DType::F16,
            }),
        })
    }
}
