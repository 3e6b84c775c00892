//! The way back: tensor names, shapes and config.json from GGUF, by the same rows.

use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;
use serde_json::{Map, Value as Json, json};

use super::Model;
use super::active::ActiveRow;
use super::expr::{Expr, Scope, truth};
use super::halves::Layout;
use super::mapping::{Data, Mapped, Piece, sizes};
use super::rope::Llama3;
use super::rows::{Op, Row};
use super::schema::{Architecture, Class, ConfigValue, GenerateFn};
use super::scope::{ModelScope, WithCaptures, WithShape, WithValues};
use super::template::Captures;
use crate::container::gguf::{Metadata, Value};
use crate::error::{Error, Result};
use crate::tensor::{Axes, TensorInfo, elements};

/// A rearrangement in einops' notation: `(h two d) ... -> (h d two) ...`.
pub(super) struct Rearrange {
    left: Vec<Vec<String>>,
    right: Vec<Vec<String>>,
}

/// For [`crate::tensor::Axes::regroup`]: parts of each axis, and the parts of each new axis.
pub(super) type Regrouping = (Vec<Vec<u64>>, Vec<Vec<usize>>);

/// Names of each axis, `...` written out, and the size of each name.
type Bound = (Vec<Vec<String>>, HashMap<String, u64>);

const REST: &str = "...";

impl Rearrange {
    pub fn parse(spec: &str) -> Result<Self> {
        let fail = || Error::malformed(format!("{spec:?} is no rearrangement such as \"(h d) i -> h d i\""));
        let (left, right) = spec.split_once("->").ok_or_else(fail)?;
        let side = |text: &str| -> Result<Vec<Vec<String>>> {
            let mut axes: Vec<Vec<String>> = Vec::new();
            let mut group: Option<Vec<String>> = None;
            for word in text.replace('(', " ( ").replace(')', " ) ").split_whitespace() {
                match (word, &mut group) {
                    ("(", None) => group = Some(Vec::new()),
                    (")", Some(_)) => axes.extend(group.take()),
                    ("(" | ")", _) => return Err(fail()),
                    (name, Some(g)) => g.push(name.to_string()),
                    (name, None) => axes.push(vec![name.to_string()]),
                }
            }
            if group.is_some() { Err(fail()) } else { Ok(axes) }
        };
        let spec = Self { left: side(left)?, right: side(right)? };
        let names = |side: &[Vec<String>]| {
            let mut names: Vec<String> = side.iter().flatten().filter(|n| *n != "1").cloned().collect();
            names.sort();
            names
        };
        let (l, r) = (names(&spec.left), names(&spec.right));
        let mut unique = l.clone();
        unique.dedup();
        if l != r || unique.len() != l.len() { Err(fail()) } else { Ok(spec) }
    }

    /// `...` written out as `n` names.
    fn expand(side: &[Vec<String>], n: usize) -> Vec<Vec<String>> {
        side.iter()
            .flat_map(|axis| {
                if axis.first().is_some_and(|name| name == REST) {
                    (0..n).map(|k| vec![format!("...{k}")]).collect()
                } else {
                    vec![axis.clone()]
                }
            })
            .collect()
    }

    /// Sizes of all names for a tensor of this shape on one side.
    fn bind(side: &[Vec<String>], shape: &[u64], sizes: &HashMap<String, u64>) -> Result<Bound> {
        let fail = |why: &str| Error::malformed(format!("shape {shape:?}: {why}"));
        let has_rest = side.iter().flatten().any(|n| n == REST);
        let fixed = side.len() - usize::from(has_rest);
        if shape.len() < fixed || (!has_rest && shape.len() != fixed) {
            return Err(fail(&format!("{fixed} dimensions were expected")));
        }
        let axes = Self::expand(side, shape.len() - fixed);
        let mut bound = HashMap::new();
        for (axis, &n) in axes.iter().zip(shape) {
            let mut known = 1u64;
            let mut open = None;
            for name in axis {
                match sizes.get(name).copied().or((name == "1").then_some(1)) {
                    Some(size) => {
                        known = known.checked_mul(size).ok_or_else(|| fail("sizes overflow"))?;
                        bound.insert(name.clone(), size);
                    }
                    None if open.is_none() => open = Some(name),
                    None => return Err(fail("two sizes of one axis are unknown")),
                }
            }
            match open {
                Some(name) if known > 0 && n.is_multiple_of(known) => {
                    bound.insert(name.clone(), n / known);
                }
                None if known == n => {}
                _ => return Err(fail(&format!("{n} is not made of {axis:?} with {known}"))),
            }
        }
        Ok((axes, bound))
    }

    /// The way back.
    pub fn inverse(self) -> Self {
        Self { left: self.right, right: self.left }
    }

    /// What to do with a tensor of this shape.
    pub fn resolve(&self, shape: &[u64], sizes: &HashMap<String, u64>) -> Result<Regrouping> {
        let (left, bound) = Self::bind(&self.left, shape, sizes)?;
        let rest = left.iter().flatten().filter(|n| n.starts_with(REST)).count();
        let right = Self::expand(&self.right, rest);
        let size = |n: &String| bound.get(n).copied().unwrap_or(1);
        let groups = left.iter().map(|axis| axis.iter().map(size).collect()).collect();
        let flat: Vec<&String> = left.iter().flatten().collect();
        let order = right
            .iter()
            .map(|axis| axis.iter().filter_map(|n| flat.iter().position(|f| *f == n)).collect())
            .collect();
        Ok((groups, order))
    }

    /// The shape before, for a tensor that has `shape` after.
    fn shape_before(&self, shape: &[u64], sizes: &HashMap<String, u64>) -> Result<Vec<u64>> {
        let (right, bound) = Self::bind(&self.right, shape, sizes)?;
        let rest = right.iter().flatten().filter(|n| n.starts_with(REST)).count();
        let size = |n: &String| bound.get(n).copied().unwrap_or(1);
        Self::expand(&self.left, rest)
            .iter()
            .map(|axis| {
                axis.iter()
                    .try_fold(1u64, |product, n| product.checked_mul(size(n)))
                    .ok_or_else(|| Error::malformed("sizes overflow"))
            })
            .collect()
    }
}

impl Model {
    /// The way of every tensor of a GGUF file into a Hugging Face checkpoint.
    ///
    /// # Errors
    /// `Malformed` for a tensor that no row makes, or a split of which a part is missing.
    pub fn map_back(&self, tensors: &[TensorInfo]) -> Result<Vec<Mapped>> {
        self.map_back_as(tensors, Layout::Ggml)
    }

    /// The same from the order of rotated elements that `layout` says.
    ///
    /// # Errors
    /// As [`Self::map_back`].
    pub fn map_back_as(&self, tensors: &[TensorInfo], layout: Layout) -> Result<Vec<Mapped>> {
        let rows = self.active_rows(tensors.len())?;
        let mut out: IndexMap<String, Mapped> = IndexMap::new();
        // What a slice took away at the beginning comes back as zeros.
        let mut cut: HashSet<&str> = HashSet::new();
        for t in tensors {
            if self.arch.generate.iter().any(|g| g.name.matches(&t.name).is_some()) {
                continue;
            }
            let mut made = rows.iter().filter_map(|r| {
                let (k, captures) =
                    r.row.to.iter().enumerate().find_map(|(k, to)| Some((k, to.matches(&t.name)?)))?;
                r.in_layer(&captures).then_some((r, k, captures))
            });
            let Some(first) = made.next() else {
                return Err(Error::malformed(format!(
                    "tensor {:?} has no place in the architecture {}",
                    t.name, self.arch.arch
                )));
            };
            let together = first.0.row.at.is_some();
            let others = made.filter(|other| together && other.0.row.at.is_some());
            for (active, k, captures) in std::iter::once(first).chain(others) {
                if active.row.cuts_beginning() {
                    cut.insert(&t.name);
                }
                self.unmap(t, active, k, captures, layout, &mut out)
                    .map_err(|e| e.context(format!("tensor {:?}", t.name)))?;
            }
        }
        let out: Vec<Mapped> = out.into_values().collect();
        for m in &out {
            if let Data::Copied { pieces, .. } = &m.data {
                let copied: u64 = pieces.iter().map(|p| p.copy.elements()).sum();
                let whole = !pieces.iter().all(|p| cut.contains(p.source.as_str()));
                if whole && copied != elements(&m.shape)? {
                    return Err(Error::malformed(format!(
                        "tensor {:?}: a part of it is missing from the GGUF file",
                        m.name
                    )));
                }
            }
        }
        Ok(out)
    }

    /// Adds to `out` what the row's part `k` made this tensor from.
    fn unmap(
        &self,
        t: &TensorInfo,
        active: &ActiveRow<'_>,
        k: usize,
        mut captures: Captures,
        layout: Layout,
        out: &mut IndexMap<String, Mapped>,
    ) -> Result<()> {
        let (one, places) = match (&active.row.stack, t.shape.split_first()) {
            (None, _) => (t.shape.clone(), 0..1),
            (Some(_), Some((&n, rest))) if n == active.stack => {
                (rest.to_vec(), active.row.at.map_or(0..n, |at| at..at + 1))
            }
            _ => {
                return Err(Error::malformed(format!(
                    "shape {:?} should begin with {}",
                    t.shape, active.stack
                )));
            }
        };
        for (k, one, first) in self.parts_of(active.row, k, &one, &captures)? {
            let shape = self.shape_before(active.row, k, &one, &captures)?;
            elements(&shape)?;
            let (axes, mut elementwise) =
                self.transform(active.row, k, &Axes::new(&shape), &captures, layout)?;
            if axes.shape() != one {
                return Err(Error::malformed(format!("shape {one:?} cannot be undone")));
            }
            elementwise.reverse();
            elementwise.iter_mut().for_each(|e| *e = e.inverse());
            let n = elements(&one)?;
            for e in places.clone() {
                if active.row.stack.is_some() && active.row.at.is_none() {
                    captures.integers.insert('e', e);
                }
                let name = active.source_name(&captures);
                let name = name.ok_or_else(|| Error::malformed("has no name"))?;
                let copy = axes.clone().into_copy(first + e * n).inverse();
                let piece = Piece { source: t.name.clone(), copy };
                match out.get_mut(&name) {
                    None => {
                        let data = Data::Copied { pieces: vec![piece], elementwise: elementwise.clone() };
                        let name_out = self.original(&name);
                        let mapped = Mapped { name: name_out, shape: shape.clone(), data, fixed: None };
                        out.insert(name, mapped);
                    }
                    Some(Mapped { data: Data::Copied { pieces, .. }, shape: s, .. }) if *s == shape => {
                        pieces.push(piece);
                    }
                    Some(_) => return Err(Error::malformed("its parts do not fit together")),
                }
            }
        }
        Ok(())
    }

    /// The parts that were joined to a tensor of this shape: number, shape, first element. Of a
    /// part that stands alone, itself.
    fn parts_of(
        &self,
        row: &Row,
        k: usize,
        shape: &[u64],
        captures: &Captures,
    ) -> Result<Vec<(usize, Vec<u64>, u64)>> {
        let joined: Vec<usize> = row.joined_with(k).collect();
        if joined.len() == 1 {
            return Ok(vec![(k, shape.to_vec(), 0)]);
        }
        let fail = || Error::malformed(format!("shape {shape:?} does not fall into its parts"));
        let (&total, rest) = shape.split_first().ok_or_else(fail)?;
        let row_len = elements(rest)?;
        let (mut parts, mut at) = (Vec::new(), 0u64);
        for j in joined {
            let rows = self.rows_of_part(row, j, captures)?;
            let end = at.checked_add(rows).filter(|end| *end <= total).ok_or_else(fail)?;
            let first = at.checked_mul(row_len).ok_or_else(fail)?;
            parts.push((j, [&[rows], rest].concat(), first));
            at = end;
        }
        if at == total { Ok(parts) } else { Err(fail()) }
    }

    /// How many rows part `k` has when it is joined: what its rearrangement says of the first axis,
    /// or its size.
    fn rows_of_part(&self, row: &Row, k: usize, captures: &Captures) -> Result<u64> {
        let scope = WithCaptures(&self.scope, captures);
        let unknown = || Error::malformed(format!("the rows of part {k} are unknown"));
        match row.part_ops[k].last() {
            Some(Op::Rearrange(r)) => {
                let sizes = sizes(&r.sizes, &scope)?;
                let spec = Rearrange::parse(&r.rearrange)?;
                let names = spec.right.first().ok_or_else(unknown)?;
                names.iter().try_fold(1u64, |n, name| n.checked_mul(*sizes.get(name)?)).ok_or_else(unknown)
            }
            _ => row.sizes[k].eval(&scope)?.as_u64().ok_or_else(unknown),
        }
    }

    /// The name in the checkpoint for a name in the definition's terms.
    pub(super) fn original(&self, name: &str) -> String {
        self.class
            .rename
            .iter()
            .find_map(|(from, to)| from.fill(&to.matches(name)?))
            .unwrap_or_else(|| name.to_string())
    }

    /// The shape that a row's transforms turn into `shape` (of part `k`).
    fn shape_before(&self, row: &Row, k: usize, shape: &[u64], captures: &Captures) -> Result<Vec<u64>> {
        let scope = WithCaptures(&self.scope, captures);
        let mut shape = before(&row.part_ops[k], shape, &scope)?;
        if row.to.len() > 1
            && let Some(n) = shape.get_mut(row.axis)
        {
            let total = if row.sizes.is_empty() {
                n.checked_mul(row.to.len() as u64)
            } else {
                let mut total = Some(0u64);
                for (j, size) in row.sizes.iter().enumerate() {
                    let size = if j == k { Some(*n) } else { size.eval(&scope)?.as_u64() };
                    total = total.zip(size).and_then(|(a, b)| a.checked_add(b));
                }
                total
            };
            *n = total.ok_or_else(|| Error::malformed("sizes overflow or are unknown"))?;
        }
        before(&row.ops, &shape, &scope)
    }

    /// Completes config.json by what only the tensors and the vocabulary tell. `generated` are
    /// the values of the file's tensors that a definition generates, by name.
    ///
    /// # Errors
    /// `Unsupported` when RoPE factors follow no known formula.
    pub fn complete_config(
        &mut self,
        extra: impl IntoIterator<Item = (String, Json)>,
        generated: &HashMap<String, Vec<f32>>,
    ) -> Result<()> {
        let mut config = self.scope.config().as_object().cloned().unwrap_or_default();
        config.extend(extra);
        let listed = |function: GenerateFn| {
            self.arch
                .generate
                .iter()
                .find(|g| g.function == Some(function))
                .and_then(|g| generated.get(g.name.text()))
        };
        for (function, key) in
            [(GenerateFn::RopeLong, "long_factor"), (GenerateFn::RopeShort, "short_factor")]
        {
            let Some(values) = listed(function) else { continue };
            let numbers = values.iter().map(|v| json_of(&Value::F32(*v))).collect::<Option<Vec<_>>>();
            let scaling = config.entry("rope_scaling").or_insert_with(|| json!({"rope_type": "longrope"}));
            if let Json::Object(scaling) = scaling {
                scaling.insert(key.into(), json!(numbers));
            }
        }
        if let Some(factors) = listed(GenerateFn::RopeLlama3) {
            let theta = config.get("rope_theta").and_then(Json::as_f64).unwrap_or(10_000.0);
            let p = Llama3::recover(factors, theta).ok_or_else(|| {
                Error::unsupported("rope_freqs.weight follows no formula that config.json could name")
            })?;
            config.insert("rope_scaling".into(), p.config());
        }
        for g in &self.arch.generate {
            let first = g.name.fill(&Captures::of_layer(0)).filter(|_| !g.config.is_empty());
            let Some(values) = first.and_then(|name| generated.get(&name)) else { continue };
            let values = json!(values);
            let scope = WithValues(&self.scope, &values);
            for (path, e) in &g.config {
                let value =
                    e.eval(&scope).map_err(|e| e.context(format!("{path} from {}", g.name.text())))?;
                set(&mut config, path, value);
            }
        }
        self.scope = self.scope.with_config(&self.arch, Json::Object(config));
        Ok(())
    }
}

/// The shape that `ops` turn into `shape`.
fn before(ops: &[Op], shape: &[u64], scope: &dyn Scope) -> Result<Vec<u64>> {
    let mut shape = shape.to_vec();
    for op in ops.iter().rev() {
        match op {
            Op::Rearrange(r) => {
                shape = Rearrange::parse(&r.rearrange)?.shape_before(&shape, &sizes(&r.sizes, scope)?)?;
            }
            Op::Slice(s) if s.cuts_beginning() => {
                let start = s.start.as_ref().map(|e| e.eval(scope)).transpose()?.and_then(|v| v.as_u64());
                let n = shape.get_mut(s.slice).zip(start).and_then(|(n, start)| {
                    *n = n.checked_add(start)?;
                    Some(())
                });
                n.ok_or_else(|| Error::malformed(format!("{shape:?} cannot have been sliced")))?;
            }
            _ => {}
        }
    }
    Ok(shape)
}

/// config.json from metadata: keys whose expression is a chain of aliases go back to the first of
/// them, the rest comes from the definition's `[config]`.
pub(super) fn config(
    arch: &Architecture,
    metadata: &Metadata,
    tensors: &[TensorInfo],
) -> Result<(Json, Class)> {
    let mut kv: Map<String, Json> = metadata
        .iter()
        .filter(|(k, v)| !(k.starts_with("tokenizer.") && v.as_array().is_some()))
        .filter_map(|(k, v)| Some((k.to_string(), json_of(v)?)))
        .collect();
    // For definitions that others extend: `kv['{arch}.block_count']`.
    let prefix = format!("{}.", arch.arch);
    let general: Vec<_> = kv
        .iter()
        .filter_map(|(k, v)| Some((format!("{{arch}}.{}", k.strip_prefix(&prefix)?), v.clone())))
        .collect();
    kv.extend(general);
    let names: Json = tensors.iter().map(|t| t.name.as_str()).collect();
    let scope_of = |config: &Map<String, Json>| {
        let mut scope = ModelScope::new(arch, Json::Object(config.clone()));
        scope.kv = Json::Object(kv.clone());
        scope.tensors = names.clone();
        scope
    };
    let mut config = Map::new();
    // First what is said, then what would be computed otherwise, where it differs.
    for computed in [false, true] {
        for (key, rule) in &arch.kv {
            let Some(value) = kv.get(key) else { continue };
            let Some((name, plain)) = config_key(&rule.expr, arch, true, 0) else { continue };
            if plain == computed || config.contains_key(&name) {
                continue;
            }
            let would_be = if computed { rule.expr.eval(&scope_of(&config))? } else { Json::Null };
            if would_be.as_f64().is_none() || would_be.as_f64() != value.as_f64() {
                config.insert(name, value.clone());
            }
        }
    }
    if let Some(scaling) = rope_scaling(arch, &kv) {
        config.insert("rope_scaling".into(), scaling);
    }
    for (key, value) in &arch.config {
        let value = match value {
            ConfigValue::Constant(v) => v.clone(),
            ConfigValue::Expr { expr } => expr.eval(&WithShape(&scope_of(&config), &[]))?,
        };
        set(&mut config, key, value);
    }
    let scope = scope_of(&config);
    let mut class = None;
    for c in &arch.class {
        let holds = match &c.when {
            Some(e) => truth(&e.eval(&scope)?),
            None => true,
        };
        if holds {
            class = Some(c.clone());
            break;
        }
    }
    let class =
        class.ok_or_else(|| Error::unsupported(format!("no class of {} fits this file", arch.arch)))?;
    let mut ordered = Map::new();
    ordered.insert("architectures".into(), json!([class.name]));
    ordered.insert("model_type".into(), json!(class.model_type));
    ordered.extend(config);
    Ok((Json::Object(ordered), class))
}

/// The config key that an expression reads first, variables followed, and whether nothing in it is
/// computed.
fn config_key(expr: &Expr, arch: &Architecture, plain: bool, depth: u32) -> Option<(String, bool)> {
    let plain = plain && expr.is_alias_chain();
    match expr.first_name()? {
        Expr::Name(name) if depth < 8 && arch.vars.contains_key(name) => {
            let inner = &arch.vars[name];
            match inner.first_name() {
                // Within its own definition a name means the config's key.
                Some(Expr::Name(n)) if n == name => Some((n.clone(), plain && inner.is_alias_chain())),
                _ => config_key(inner, arch, plain, depth + 1),
            }
        }
        Expr::Name(name) if name == "file_type" || name == "pooling" => None,
        Expr::Name(name) => Some((name.clone(), plain)),
        Expr::Field(object, field) => match (&**object, field.as_str()) {
            (Expr::Name(o), "rope_theta") if o == "rope" => Some(("rope_theta".into(), plain)),
            (Expr::Name(o), "rope_theta") if o == "rope_sliding" => {
                Some(("rope_local_base_freq".into(), plain))
            }
            _ => None,
        },
        _ => None,
    }
}

/// Sets a key, or an entry of an object: `rope_scaling.mrope_section`. Null leaves all as it is.
fn set(config: &mut Map<String, Json>, path: &str, value: Json) {
    match path.split_once('.') {
        _ if value.is_null() => {}
        None => {
            config.insert(path.into(), value);
        }
        Some((object, rest)) => {
            if let Json::Object(object) = config.entry(object).or_insert_with(|| json!({})) {
                set(object, rest, value);
            }
        }
    }
}

fn rope_scaling(arch: &Architecture, kv: &Map<String, Json>) -> Option<Json> {
    let get = |name: &str| kv.get(&format!("{}.rope.scaling.{name}", arch.arch)).cloned();
    let kind = get("type").filter(|t| t != "none")?;
    let mut scaling = Map::new();
    scaling.insert("rope_type".into(), kind);
    for (key, name) in [
        ("factor", "factor"),
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_ext_factor", "extrapolation_factor"),
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ] {
        if let Some(v) = get(key) {
            scaling.insert(name.into(), v);
        }
    }
    Some(Json::Object(scaling))
}

/// Scalars and short arrays; a float is written with the digits that tell it from its neighbours.
fn json_of(value: &Value) -> Option<Json> {
    const MAX_ARRAY: usize = 1 << 12;
    Some(match value {
        Value::String(_) => json!(value.as_str()?),
        Value::Bool(b) => json!(b),
        Value::F32(v) => serde_json::from_str(&v.to_string()).ok().filter(|_| v.is_finite())?,
        Value::F64(v) => json!(v),
        Value::Array(a) if a.len() <= MAX_ARRAY => {
            Json::Array((0..a.len()).map(|i| json_of(&a.get(i)?)).collect::<Option<Vec<_>>>()?)
        }
        Value::Array(_) => return None,
        v => json!(v.as_u64().map(Json::from).or(v.as_f64().map(Json::from))?),
    })
}
