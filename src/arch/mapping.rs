//! From the tensors of a checkpoint to the tensors of a GGUF file: which go where, and how.

use std::collections::{BTreeMap, HashMap, HashSet};

use indexmap::IndexMap;

use super::Model;
use super::active::ActiveRow;
use super::elementwise::Elementwise;
use super::expr::{Expr, Scope, truth};
use super::halves::Layout;
use super::rope;
use super::rows::{Function, Op, Row};
use super::schema::Drop;
use super::scope::{WithCaptures, WithShape};
use super::template::{Captures, PARAMETERS};
use crate::error::{Error, Result};
use crate::tensor::{Axes, DType, StridedCopy, TensorInfo, elements};

/// As many as `LLAMA_MAX_LAYERS`, where tensors are made for each.
pub(super) const MAX_LAYERS: u64 = 512;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Its name in the output.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Where its values come from.
    pub data: Data,
    /// The type it has in GGUF, whatever the file type.
    pub fixed: Option<DType>,
}

impl Mapped {
    /// Names of the tensors that it is copied from.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        let pieces = match &self.data {
            Data::Copied { pieces, .. } => &pieces[..],
            Data::Values(_) => &[],
        };
        pieces.iter().map(|p| p.source.as_str())
    }
}

/// Where values come from.
#[derive(Clone, Debug)]
pub enum Data {
    /// Copies from source tensors that tile the output, then arithmetic on each value, in order.
    Copied {
        /// The copies.
        pieces: Vec<Piece>,
        /// Arithmetic in f32.
        elementwise: Vec<Elementwise>,
    },
    /// Values known now.
    Values(Vec<f32>),
}

/// A tensor that no checkpoint holds.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Its name.
    pub name: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// Its values.
    pub values: Vec<f32>,
}

/// A copy from one source tensor.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The source tensor's name.
    pub source: String,
    /// How its elements lie in the output.
    pub copy: StridedCopy,
}

impl Model {
    /// The way of every tensor of a checkpoint into GGUF, in the checkpoint's order.
    ///
    /// # Errors
    /// `Malformed` for a tensor that no rule knows (naming the nearest rule), one that is missing,
    /// or a shape that a transform does not fit.
    pub fn map(&self, tensors: &[TensorInfo]) -> Result<Vec<Mapped>> {
        self.map_as(tensors, Layout::Ggml)
    }

    /// The same, in the order of rotated elements that `layout` says.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn map_as(&self, tensors: &[TensorInfo], layout: Layout) -> Result<Vec<Mapped>> {
        let rows = self.active_rows(tensors.len())?;
        let mut out: IndexMap<String, Building> = IndexMap::new();
        for Generated { name, shape, values } in self.generated()? {
            out.insert(name, Building { shape, values: Some(values), ..Building::default() });
        }
        let mut hits: HashMap<&str, HashSet<Captures>> = HashMap::new();
        for t in tensors {
            let context = |e: Error| e.context(format!("tensor {:?}", t.name));
            let canonical = self.canonical(&t.name);
            let is_other = self.is_beside(&t.name) || self.is_scalar(&canonical);
            if is_other || self.is_dropped(&canonical, true).map_err(context)? {
                continue;
            }
            for (name, axes) in self.taken_for(t, &rows).map_err(context)? {
                let found = rows.iter().find_map(|r| Some((r, r.captures(&name)?)));
                let Some((active, captures)) = found else {
                    if self.is_dropped(&name, false).map_err(context)? {
                        continue;
                    }
                    return Err(self.unknown_tensor(&t.name, &name, &rows));
                };
                self.check_layer(&captures).map_err(context)?;
                for (k, to) in active.row.to.iter().enumerate() {
                    let target =
                        to.fill(&captures).ok_or_else(|| context(Error::malformed("no target name")))?;
                    let (part, elementwise) =
                        self.transform(active.row, k, &axes, &captures, layout).map_err(context)?;
                    let joined = self.joined(active.row, k, &axes, &captures, layout).map_err(context)?;
                    out.entry(target)
                        .or_insert_with(|| Building { stack: active.stack, ..Building::default() })
                        .add(t, active, &captures, part, joined, elementwise)
                        .map_err(context)?;
                }
                hits.entry(active.row.hf.text()).or_default().insert(captures);
            }
        }
        self.check_complete(&rows, &hits, &out)?;
        out.into_iter().map(|(name, b)| b.finish(name)).collect()
    }

    /// Tensors that no checkpoint holds.
    ///
    /// # Errors
    /// As the evaluation of their conditions, and of what they are made from; `Limit` for absurdly
    /// many layers.
    pub fn generated(&self) -> Result<Vec<Generated>> {
        let mut tensors = Vec::new();
        for g in &self.arch.generate {
            if truth(&g.when.eval(&self.scope)?) {
                let (shape, values) = rope::generate(g, self)?;
                let layers = if g.name.has('i') { self.layers()? } else { 1 };
                if layers > MAX_LAYERS {
                    return Err(Error::limit(format!("{layers} layers, at most {MAX_LAYERS} are allowed")));
                }
                let names = (0..layers).filter_map(|i| g.name.fill(&Captures::of_layer(i)));
                tensors.extend(names.map(|name| Generated {
                    name,
                    shape: shape.clone(),
                    values: values.clone(),
                }));
            }
        }
        Ok(tensors)
    }

    /// The name in the definition's terms.
    pub(super) fn canonical(&self, name: &str) -> String {
        // As TensorFlow calls them, and old checkpoints of BERT.
        let tensorflow = [("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")];
        let old =
            tensorflow.into_iter().find_map(|(old, new)| Some(format!("{}{new}", name.strip_suffix(old)?)));
        let name = old.as_deref().unwrap_or(name);
        let within = self.around.as_ref().and_then(|a| a.within(name));
        self.class.canonical(within.as_deref().unwrap_or(name))
    }

    /// Whether a tensor belongs to what the checkpoint holds beside this model.
    fn is_beside(&self, name: &str) -> bool {
        self.around.as_ref().is_some_and(|a| a.within(name).is_none())
    }

    /// Whether a row or a drop is about tensors of this name, in whichever layers and conditions.
    pub(super) fn knows(&self, name: &str) -> bool {
        let name = self.canonical(name);
        let also = self.arch.also.keys();
        self.arch.rows.iter().map(|r| &r.hf).chain(also).any(|t| t.matches(&name).is_some())
            || self.is_scalar(&name)
            || [true, false].iter().any(|when| self.is_dropped(&name, *when).unwrap_or(false))
    }

    /// Whether a tensor is left out: by a condition, or else by its name alone.
    pub(super) fn is_dropped(&self, name: &str, by_condition: bool) -> Result<bool> {
        let other = self.arch.language_model.as_ref().filter(|_| !by_condition);
        if other.is_some_and(|l| l.tensors.matches(name).is_some()) {
            return Ok(true);
        }
        for drop in &self.arch.drop {
            let dropped = match drop {
                Drop::Name(template) => !by_condition && template.matches(name).is_some(),
                Drop::When { name: template, when } => match template.matches(name) {
                    Some(captures) if by_condition => {
                        truth(&when.eval(&WithCaptures(&self.scope, &captures))?)
                    }
                    _ => false,
                },
            };
            if dropped {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Transforms of a row for its part `k`, for a source of these axes and this name.
    pub(super) fn transform(
        &self,
        row: &Row,
        k: usize,
        axes: &Axes,
        captures: &Captures,
        layout: Layout,
    ) -> Result<(Axes, Vec<Elementwise>)> {
        let scope = WithCaptures(&self.scope, captures);
        let mut axes = axes.clone();
        let mut elementwise = Vec::new();
        self.apply(&row.ops, &mut axes, &mut elementwise, &scope, layout)?;
        if row.to.len() > 1 {
            let shape = axes.shape();
            let (start, stop, step) = self.part(row, k, &shape, &scope)?;
            axes.slice(row.axis, start, stop, step)?;
            self.apply(&row.part_ops[k], &mut axes, &mut elementwise, &scope, layout)?;
        }
        Ok((axes, elementwise))
    }

    pub(super) fn apply(
        &self,
        ops: &[Op],
        axes: &mut Axes,
        elementwise: &mut Vec<Elementwise>,
        scope: &WithCaptures<'_>,
        layout: Layout,
    ) -> Result<()> {
        for op in ops.iter().filter(|op| op.layout().is_none_or(|of| of == layout)) {
            let scope_shape = axes.shape();
            let scope = WithShape(scope, &scope_shape);
            let number = |e: &Option<Expr>, default: u64| match e {
                None => Ok(default),
                Some(e) => {
                    let v = e.eval(&scope)?;
                    v.as_u64().ok_or_else(|| Error::malformed(format!("{v} is no index")))
                }
            };
            match op {
                Op::Rearrange(r) => {
                    let sizes = sizes(&r.sizes, &scope)?;
                    let spec = super::inverse::Rearrange::parse(&r.rearrange)?;
                    let (groups, order) = spec.resolve(&axes.shape(), &sizes)?;
                    axes.regroup(&groups, &order)?;
                }
                Op::Slice(s) => {
                    let n = scope_shape.get(s.slice).copied().unwrap_or(0);
                    axes.slice(s.slice, number(&s.start, 0)?, number(&s.stop, n)?, number(&s.step, 1)?)?;
                }
                Op::Scale(s) => {
                    let (&n, rest) = scope_shape
                        .split_first()
                        .ok_or_else(|| Error::malformed("a scalar has no stretches"))?;
                    let row_len = elements(rest)?;
                    let mut start = 0u64;
                    let mut stretches = Vec::new();
                    for (size, factor) in s.sizes.iter().zip(&s.scale) {
                        let mul = factor.eval(&scope)?;
                        let mul = mul
                            .as_f64()
                            .ok_or_else(|| Error::malformed(format!("the factor {mul} is no number")))?;
                        stretches.push((number(&Some(size.clone()), 0)?, mul as f32));
                    }
                    loop {
                        for &(rows, mul) in &stretches {
                            let end = start.checked_add(rows).filter(|end| *end <= n);
                            let end =
                                end.ok_or_else(|| Error::malformed("its stretches are longer than it"))?;
                            let (first, last) = (start * row_len, end * row_len);
                            elementwise.push(Elementwise::Scale { mul, start: first, end: last });
                            start = end;
                        }
                        if !s.repeat || start == 0 || start == n {
                            break;
                        }
                    }
                    if start != n {
                        return Err(Error::malformed(format!(
                            "shape {scope_shape:?} should begin with {start}"
                        )));
                    }
                }
                Op::Function(f) => elementwise.push(match f.function {
                    Function::NegExp => Elementwise::NegExp,
                    Function::Exp => Elementwise::Exp,
                    Function::UnitRows => {
                        Elementwise::UnitRows { row: scope_shape.last().copied().unwrap_or(1).max(1) }
                    }
                }),
                Op::Affine(a) => {
                    let value = |e: &Option<Expr>, default: f32| match e {
                        None => Ok(default),
                        Some(e) => {
                            let v = e.eval(&scope)?;
                            v.as_f64()
                                .map(|v| v as f32)
                                .ok_or_else(|| Error::malformed(format!("{v} is no number")))
                        }
                    };
                    let (mul, add) = (value(&a.mul, 1.0)?, value(&a.add, 0.0)?);
                    if (mul, add) != (1.0, 0.0) {
                        elementwise.push(Elementwise::Affine { mul, add });
                    }
                }
            }
        }
        Ok(())
    }

    /// Where parts of a split have the same name: the first row of part `k`, and the rows of all.
    pub(super) fn joined(
        &self,
        row: &Row,
        k: usize,
        axes: &Axes,
        captures: &Captures,
        layout: Layout,
    ) -> Result<Option<(u64, u64)>> {
        let parts: Vec<usize> = row.joined_with(k).collect();
        if parts.len() == 1 {
            return Ok(None);
        }
        let mut rest: Option<Vec<u64>> = None;
        let (mut first, mut total) = (0, 0u64);
        for j in parts {
            if j == k {
                first = total;
            }
            let shape = self.transform(row, j, axes, captures, layout)?.0.shape();
            let (rows, others) =
                shape.split_first().ok_or_else(|| Error::malformed("a scalar has no parts"))?;
            if rest.replace(others.to_vec()).is_some_and(|r| r != others) {
                return Err(Error::malformed("its parts do not fit together"));
            }
            total = total.checked_add(*rows).ok_or_else(|| Error::malformed("sizes overflow"))?;
        }
        Ok(Some((first, total)))
    }

    /// The range that part `k` of a split takes of its axis.
    fn part(&self, row: &Row, k: usize, shape: &[u64], scope: &dyn Scope) -> Result<(u64, u64, u64)> {
        let n = shape.get(row.axis).copied().unwrap_or(0);
        let parts = row.to.len() as u64;
        if row.sizes.is_empty() {
            if !n.is_multiple_of(parts) {
                return Err(Error::malformed(format!(
                    "axis {} of {shape:?} does not fall into {parts} parts",
                    row.axis
                )));
            }
            return Ok(if row.interleaved {
                (k as u64, n, parts)
            } else {
                (n / parts * k as u64, n / parts * (k as u64 + 1), 1)
            });
        }
        let mut start = 0u64;
        let mut range = (0, 0);
        for (j, size) in row.sizes.iter().enumerate() {
            let size = size.eval(&WithShape(scope, shape))?;
            let size = size.as_u64().ok_or_else(|| Error::malformed(format!("{size} is no size")))?;
            let end = start.checked_add(size).ok_or_else(|| Error::malformed("sizes overflow"))?;
            if j == k {
                range = (start, end);
            }
            start = end;
        }
        if start != n {
            return Err(Error::malformed(format!(
                "axis {} of {shape:?} should have {start} elements",
                row.axis
            )));
        }
        Ok((range.0, range.1, 1))
    }

    fn check_complete(
        &self,
        rows: &[ActiveRow<'_>],
        hits: &HashMap<&str, HashSet<Captures>>,
        out: &IndexMap<String, Building>,
    ) -> Result<()> {
        let n_layers = self.layers()?;
        let none = HashSet::new();
        for r in rows {
            let seen = hits.get(r.row.hf.text()).unwrap_or(&none);
            let layered = r.row.to[0].has('i');
            let parameters: Vec<Option<&'static str>> =
                if r.row.hf.has_parameter() { PARAMETERS.map(Some).to_vec() } else { vec![None] };
            for parameter in parameters {
                let some = seen.iter().any(|c| c.parameter == parameter);
                let needed = !r.optional && (parameter != Some("bias") || r.row.bias);
                if !needed && !some {
                    continue; // all layers lack it
                }
                for i in 0..if layered { n_layers } else { 1 } {
                    let mut captures = Captures { parameter, ..Captures::default() };
                    if layered {
                        captures.integers.insert('i', i);
                    }
                    if !r.in_layer(&captures) || (r.may_lack(&captures) && !seen.contains(&captures)) {
                        continue;
                    }
                    let target = r.row.to[0].fill(&captures);
                    let done = target.as_ref().and_then(|t| out.get(t));
                    let whole = |b: &Building| b.values.is_some() || b.pieces.len() as u64 >= b.stack;
                    if !(done.is_some_and(whole) || r.row.at.is_some() && seen.contains(&captures)) {
                        return Err(self.missing(r, captures, hits));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The sizes that a rearrangement names.
pub(super) fn sizes(given: &BTreeMap<String, Expr>, scope: &dyn Scope) -> Result<HashMap<String, u64>> {
    given
        .iter()
        .map(|(name, e)| {
            let v = e.eval(scope)?;
            let n = v.as_u64().filter(|n| *n > 0);
            Ok((name.clone(), n.ok_or_else(|| Error::malformed(format!("{name} = {v} is no size")))?))
        })
        .collect()
}

/// `model.layers.3.x` -> `model.layers.{i}.x`
pub(super) fn pattern_of(name: &str) -> String {
    let parts: Vec<&str> = name
        .split('.')
        .map(|part| if part.bytes().all(|b| b.is_ascii_digit()) { "{i}" } else { part })
        .collect();
    parts.join(".")
}

/// A target while its sources come in.
#[derive(Default)]
struct Building {
    shape: Vec<u64>,
    stack: u64,
    pieces: BTreeMap<u64, Piece>,
    elementwise: Vec<Elementwise>,
    values: Option<Vec<f32>>,
    fixed: Option<DType>,
}

impl Building {
    fn add(
        &mut self,
        source: &TensorInfo,
        active: &ActiveRow<'_>,
        captures: &Captures,
        axes: Axes,
        joined: Option<(u64, u64)>,
        elementwise: Vec<Elementwise>,
    ) -> Result<()> {
        let mut shape = axes.shape();
        let mut one = elements(&shape)?;
        let index = match (&active.row.stack, joined) {
            (None, None) => {
                if let Some(n) = shape.first_mut() {
                    *n = (*n).max(active.pad);
                }
                0
            }
            (None, Some((first, total))) => {
                one = elements(&shape[1..])?;
                shape[0] = total;
                first
            }
            (Some(_), _) => {
                shape.insert(0, active.stack);
                let e = active.row.at.or(captures.integers.get(&'e').copied()).unwrap_or(0);
                if e >= active.stack {
                    return Err(Error::malformed(format!(
                        "is number {e}, config.json says there are {}",
                        active.stack
                    ))
                    .hint("config.json and the weights are not of the same model"));
                }
                e
            }
        };
        elements(&shape)?;
        if !self.pieces.is_empty() && self.shape != shape {
            return Err(Error::malformed(format!(
                "gives shape {shape:?} where the others give {:?}",
                self.shape
            )));
        }
        self.shape = shape;
        self.elementwise = elementwise;
        self.fixed = active.row.fixed;
        let piece = Piece { source: source.name.clone(), copy: axes.into_copy(index * one) };
        if let Some(other) = self.pieces.insert(index, piece) {
            return Err(Error::malformed(format!("takes the same place as {:?}", other.source)));
        }
        Ok(())
    }

    fn finish(self, name: String) -> Result<Mapped> {
        let data = match self.values {
            Some(values) => Data::Values(values),
            None => {
                Data::Copied { pieces: self.pieces.into_values().collect(), elementwise: self.elementwise }
            }
        };
        Ok(Mapped { name, shape: self.shape, data, fixed: self.fixed })
    }
}
