//! Scales that move from an operation into the matrices that read it: the model computes the same, and
//! columns that matter are rounded more finely. Which tensors go together, `formats/arch` says.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use indexmap::IndexMap;

use super::gather::Scratch;
use super::plan::{Budget, Plan, Rounding, TensorPlan};
use super::stream::Observer;
use crate::arch::{FoldKind, FoldRule, Template, folds};
use crate::block::codec;
use crate::container::Store;
use crate::container::gguf::{Metadata, Value};
use crate::container::moments::{Input, Moments};
use crate::error::{Error, Result};
use crate::quantize::awq::{self, Matrix};
use crate::quantize::sums;
use crate::tensor::DType;

/// Where scales come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folding {
    /// AWQ's search, by second moments.
    Search,
    /// Any of 1/4, 1/2, 1, 2 and 4. Multiplying with them is exact: a model that computes the same gives the
    /// same results to the last bit, or the definition is wrong.
    Random(u64),
}

/// The scales of a fold, once they are known.
#[derive(Debug, Default)]
pub struct Scales(OnceLock<Values>);

#[derive(Debug)]
struct Values {
    /// By column of the consumers; of one expert after the other where each has its own.
    columns: Vec<f32>,
    /// By value of the producer.
    outputs: Vec<f32>,
}

/// What scales do to a tensor.
#[derive(Clone, Debug)]
pub struct Factor {
    pub(super) scales: Arc<Scales>,
    pub(super) side: Side,
    /// Elements of a row.
    row: u64,
    /// Elements of a matrix.
    matrix: u64,
    /// Matrices with scales of their own; 1 where all share them.
    experts: u64,
}

/// Which end of a fold a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Columns are multiplied.
    Consumer,
    /// Rows are divided, after so many that are not.
    Producer { skip: u64 },
}

impl Factor {
    /// Applies it to the tensor's elements from number `first` on.
    ///
    /// # Errors
    /// `Misuse` before scales are known, or where they do not fit.
    pub fn apply(&self, values: &mut [f32], first: u64) -> Result<()> {
        let not_fit = || Error::misuse("scales of a fold that are not known, or do not fit");
        let scales = self.scales.0.get().ok_or_else(not_fit)?;
        let (mut at, mut rest) = (first, values);
        while !rest.is_empty() {
            let column = at % self.row;
            let n = (self.row - column).min(rest.len() as u64) as usize;
            let (part, after) = rest.split_at_mut(n);
            let expert = if self.experts > 1 { at / self.matrix } else { 0 };
            match self.side {
                Side::Consumer => {
                    let from = (expert * self.row + column) as usize;
                    let scales = scales.columns.get(from..from + n).ok_or_else(not_fit)?;
                    part.iter_mut().zip(scales).for_each(|(x, s)| *x *= s);
                }
                Side::Producer { skip } => {
                    let row = at % self.matrix / self.row;
                    let each = scales.outputs.len() as u64 / self.experts;
                    if let Some(k) = row.checked_sub(skip) {
                        let scale = scales.outputs.get((expert * each + k) as usize).ok_or_else(not_fit)?;
                        part.iter_mut().for_each(|x| *x /= scale);
                    }
                }
            }
            at += n as u64;
            rest = after;
        }
        Ok(())
    }

    /// The other end of the fold, at a tensor of matrices of so many rows.
    fn of_consumer(&self, row: u64, rows: u64) -> Self {
        Self { side: Side::Consumer, row, matrix: row * rows, ..self.clone() }
    }

    /// What the columns of an expert's matrix are multiplied with.
    pub(super) fn columns(&self, expert: u64) -> Option<&[f32]> {
        let expert = if self.experts > 1 { expert } else { 0 };
        let from = expert.checked_mul(self.row)? as usize;
        self.scales.0.get()?.columns.get(from..from.checked_add(self.row as usize)?)
    }
}

/// One fold: an operation, and the matrices that read it.
#[derive(Debug)]
pub struct FoldPlan {
    /// The operation.
    pub name: String,
    /// Its tensor, as a number of the plan's, and what scales do to that.
    producer: (usize, Factor),
    /// The matrices, as numbers of the plan's tensors, and what they read, where it was calibrated.
    consumers: Vec<(usize, Option<Input>)>,
    scales: Arc<Scales>,
    /// Matrices in a stack that have scales of their own.
    experts: u64,
    columns: u64,
    /// For each column of a matrix the producer's value.
    output_of: OutputOf,
    source: FromWhere,
}

impl FoldPlan {
    /// What its scales follow from: what was measured, and how it is used.
    pub(super) fn basis(&self) -> (Option<&Moments>, String) {
        let how = format!("{:?} {:?} {} {}", self.consumers, self.output_of, self.experts, self.columns);
        match &self.source {
            FromWhere::Moments(moments) => (Some(moments), how),
            FromWhere::Seed(seed) => (None, format!("{how} {seed}")),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum OutputOf {
    Itself,
    /// Heads of so many values, of which so many read the same.
    Head {
        size: u64,
        shared: u64,
    },
}

#[derive(Debug)]
enum FromWhere {
    Moments(Arc<Moments>),
    Seed(u64),
}

impl OutputOf {
    fn column(self, c: u64) -> u64 {
        match self {
            Self::Itself => c,
            Self::Head { size, shared } => c / (size * shared) * size + c % size,
        }
    }
}

/// Finds the folds of a model, ties its tensors to them, and notes which they are. `originals` are the
/// tensors' names in the model.
///
/// # Errors
/// As definitions are read; `Unsupported` where the architecture has no pairs.
pub(super) fn plan_folds(
    folding: Folding,
    moments: Option<Arc<Moments>>,
    plan: &mut Plan,
    originals: &[String],
    metadata: &Metadata,
) -> Result<()> {
    let arch = metadata.str("general.architecture").unwrap_or_default().to_string();
    let rules = folds(&arch)?;
    if rules.is_empty() {
        return Err(Error::unsupported(format!("no scales can be folded: nothing is known of {arch:?}"))
            .hint("a [fold] table in formats/arch would say which; use another method meanwhile"));
    }
    let by_name: HashMap<&str, usize> = (0..).zip(originals).map(|(i, n)| (n.as_str(), i)).collect();
    let finder = Finder { arch: &arch, metadata, by_name, moments };
    let mut done: IndexMap<String, u64> = IndexMap::new();
    let mut not: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (from, rule) in &rules {
        for name in originals.iter().filter_map(|n| n.strip_suffix(".weight")) {
            let Some(captures) = from.matches(name) else { continue };
            let present = |t: &Template| {
                let base = t.fill(&captures)?;
                finder.by_name.get(format!("{base}.weight").as_str()).copied()
            };
            let consumers: Vec<usize> = rule.to.iter().filter_map(present).collect();
            let lacks = rule.with.as_ref().is_some_and(|t| present(t).is_none())
                || rule.without.as_ref().is_some_and(|t| present(t).is_some());
            if consumers.is_empty() || lacks {
                continue;
            }
            let found = finder.tie(name, from, rule, consumers, folding, &plan.tensors);
            match found {
                Ok((fold, factors)) => {
                    for (tensor, factor) in factors {
                        plan.tensors[tensor].source.fold(factor);
                        plan.tensors[tensor].check()?;
                    }
                    let short = |t: &Template| t.text().replace("blk.{i}.", "");
                    let to = rule.to.iter().filter(|t| present(t).is_some()).map(short);
                    let line = format!("{} into {}", short(from), to.collect::<Vec<_>>().join(", "));
                    *done.entry(line).or_default() += 1;
                    plan.folds.push(fold);
                }
                Err(why) => not.entry(why).or_default().push(name.to_string()),
            }
        }
    }
    let lines =
        done.iter().map(|(line, n)| if *n == 1 { line.clone() } else { format!("{line} ({n} layers)") });
    plan.notes.push(match plan.folds.len() {
        0 => "awq: no scales are folded".into(),
        n => format!("awq: scales are folded in {n} places: {}", lines.collect::<Vec<_>>().join("; ")),
    });
    plan.notes.extend(not.iter().map(|(why, names)| {
        let more = if names.len() > 3 { ", ..." } else { "" };
        format!(
            "awq: no scales for {} ({}{more}): {why}",
            names.len(),
            names[..names.len().min(3)].join(", ")
        )
    }));
    Ok(())
}

struct Finder<'a> {
    arch: &'a str,
    metadata: &'a Metadata,
    by_name: HashMap<&'a str, usize>,
    moments: Option<Arc<Moments>>,
}

impl Finder<'_> {
    /// The fold, and what it does to which tensor; or why there is none.
    fn tie(
        &self,
        name: &str,
        from: &Template,
        rule: &FoldRule,
        consumers: Vec<usize>,
        folding: Folding,
        tensors: &[TensorPlan],
    ) -> std::result::Result<(FoldPlan, Vec<(usize, Factor)>), String> {
        let tensor = |end: &str| self.by_name.get(format!("{name}{end}").as_str()).map(|&i| (i, &tensors[i]));
        let (producer, weight) = tensor(".weight").ok_or("the tensor is missing")?;
        let bias = tensor(".bias");
        let columns = tensors[consumers[0]].rows().0;
        if consumers.iter().any(|&c| tensors[c].rows().0 != columns) {
            return Err("rows of the matrices differ in length".into());
        }
        let experts_of = |t: &TensorPlan| {
            let (row, rows) = t.rows();
            t.source.elements() / row / rows
        };
        let is_norm = rule.kind == FoldKind::Norm;
        let experts = if is_norm { 1 } else { experts_of(weight) };
        if !is_norm && consumers.iter().any(|&c| experts_of(&tensors[c]) != experts) {
            return Err("they have not as many experts".into());
        }
        let vectors = bias.into_iter().chain(is_norm.then_some((producer, weight)));
        if vectors.clone().any(|(_, t)| t.dtype != DType::F32) {
            return Err("its vectors are not stored in F32".into());
        }
        let mut output_of = OutputOf::Itself;
        let mut outputs = columns;
        if matches!(rule.kind, FoldKind::Heads | FoldKind::LastHeads) {
            // Layers are left out, others numbered anew.
            let named = weight.name.strip_suffix(".weight").and_then(|n| from.matches(n));
            let layer = named.and_then(|c| c.integers.get(&'i').copied());
            let of_layer = |key: &str| {
                let value = self.metadata.get(&format!("{}.attention.{key}", self.arch))?;
                match value {
                    Value::Array(list) => list.get(layer? as usize)?.as_u64(),
                    value => value.as_u64(),
                }
            };
            let heads = of_layer("head_count").filter(|&n| n > 0 && columns.is_multiple_of(n));
            let heads = heads.ok_or("the heads do not divide the columns")?;
            let shared = of_layer("head_count_kv").unwrap_or(heads);
            if shared == 0 || !heads.is_multiple_of(shared) {
                return Err("the heads of values do not divide the heads".into());
            }
            output_of = OutputOf::Head { size: columns / heads, shared: heads / shared };
            outputs = columns / heads * shared;
        }
        let (row, rows) = if is_norm { (1, weight.source.elements()) } else { weight.rows() };
        let exact = !matches!(rule.kind, FoldKind::LastRows | FoldKind::LastHeads);
        let skip = rows.checked_sub(outputs).filter(|&skip| skip == 0 || !exact);
        let skip = skip.ok_or_else(|| format!("it has {rows} outputs for {outputs}"))?;
        if bias.is_some_and(|(_, t)| t.source.elements() != rows * experts) {
            return Err("its bias has another length".into());
        }
        let mut all: Vec<usize> = consumers.clone();
        all.push(producer);
        if let Some(&i) = all.iter().find(|&&i| {
            let t = &tensors[i];
            t.is_plain() && t.dtype.is_block() || t.source.check_decodable().is_err()
        }) {
            return Err(format!("{} is quantized already", tensors[i].name));
        }
        let source = match (folding, &self.moments) {
            (Folding::Search, Some(moments)) => {
                self.check_inputs(moments, &consumers, columns, tensors)?;
                FromWhere::Moments(moments.clone())
            }
            (Folding::Random(seed), _) => FromWhere::Seed(
                name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)),
            ),
            (Folding::Search, None) => return Err("there are no moments".into()),
        };
        let scales = Arc::new(Scales::default());
        let side = Side::Producer { skip };
        let factor = Factor { scales: scales.clone(), side, row, matrix: row * rows, experts };
        let mut factors = vec![(producer, factor.clone())];
        factors.extend(bias.map(|(i, _)| (i, Factor { row: 1, matrix: rows, ..factor.clone() })));
        for &c in &consumers {
            let (row, rows) = tensors[c].rows();
            factors.push((c, factor.of_consumer(row, rows)));
        }
        let names: HashMap<usize, &str> = self.by_name.iter().map(|(n, i)| (*i, *n)).collect();
        let input = |i: &usize| self.moments.as_ref()?.input_of(names.get(i)?).cloned();
        let consumers = consumers.into_iter().map(|i| (i, input(&i))).collect();
        let (name, producer) = (name.to_string(), factors[0].clone());
        let fold = FoldPlan { name, producer, consumers, scales, experts, columns, output_of, source };
        Ok((fold, factors))
    }

    /// Whether all that reads the same is among the consumers, as far as calibration has seen, and one
    /// of them at least was seen.
    fn check_inputs(
        &self,
        moments: &Moments,
        consumers: &[usize],
        columns: u64,
        tensors: &[TensorPlan],
    ) -> std::result::Result<(), String> {
        let names: HashMap<usize, &str> = self.by_name.iter().map(|(n, i)| (*i, *n)).collect();
        let mut seen = false;
        for c in consumers {
            let Some(input) = names.get(c).and_then(|n| moments.input_of(n)) else { continue };
            if input.columns != columns {
                return Err(format!("the moments of {:?} have {} columns", input.name, input.columns));
            }
            let known = |w: &String| self.by_name.get(w.as_str()).is_some_and(|i| consumers.contains(i));
            if let Some(other) = input.weights.iter().find(|w| !known(w)) {
                return Err(format!("{other} reads the same, and its definition does not say so"));
            }
            seen |= is_rounded(&tensors[*c]) || consumers.iter().all(|&c| !is_rounded(&tensors[c]));
        }
        if seen { Ok(()) } else { Err("what they read was not calibrated".into()) }
    }
}

fn is_rounded(t: &TensorPlan) -> bool {
    t.dtype.is_block() && !t.is_plain()
}

/// The type that scales are sought for where nothing is rounded yet.
const LATER: DType = DType::Q4_0;

/// Columns of each fold whose products are compared.
const CHECKED: u64 = 8;

impl FoldPlan {
    /// Bytes that finding its scales takes at most.
    fn bytes(&self) -> u64 {
        awq::bytes(self.columns, self.consumers.len() as u64)
    }

    /// Makes its scales known.
    fn settle(&self, plan: &Plan, store: &Store, observer: &dyn Observer) -> Result<()> {
        let n = self.columns as usize;
        let output_of: Vec<u32> = (0..self.columns).map(|c| self.output_of.column(c) as u32).collect();
        let count = output_of.iter().max().map_or(0, |m| *m as usize + 1);
        let mut outputs = Vec::with_capacity(count * self.experts as usize);
        for expert in 0..self.experts {
            match &self.source {
                FromWhere::Seed(seed) => outputs.extend(random(seed.wrapping_add(expert), count)),
                FromWhere::Moments(moments) => {
                    let own = (self.experts > 1).then_some(expert);
                    let matrices = self.matrices(moments, own, plan, store)?;
                    let stop = || observer.interrupted();
                    outputs.extend(awq::search(&matrices, &output_of, count, &stop)?);
                }
            }
        }
        let column = |k: usize| outputs[k / n * count + output_of[k % n] as usize];
        let columns = (0..n * self.experts as usize).map(column).collect();
        let _ = self.scales.0.set(Values { columns, outputs });
        self.check(plan, store)
    }

    /// Whether some products of a weight and what it reads are still the same. That the architecture
    /// computes such products, its definition's test has to show.
    fn check(&self, plan: &Plan, store: &Store) -> Result<()> {
        let (tensor, factor) = &self.producer;
        let producer = &plan.tensors[*tensor];
        let mut scratch = Scratch::default();
        let mut read = |t: &TensorPlan, factor: &Factor, start: u64, n: u64| {
            let mut before = Vec::new();
            t.source.unfolded(store, start, start + n, &mut before, &mut scratch)?;
            let mut after = before.clone();
            factor.apply(&mut after, start)?;
            Ok::<_, Error>((before, after))
        };
        let skip = match factor.side {
            Side::Producer { skip } => skip,
            Side::Consumer => 0,
        };
        for k in 0..CHECKED {
            let expert = k % self.experts;
            let column = (2 * k + 1) * self.columns / (2 * CHECKED);
            let start = expert * factor.matrix + (skip + self.output_of.column(column)) * factor.row;
            let (before, after) = read(producer, factor, start, factor.row)?;
            for (c, _) in &self.consumers {
                let consumer = &plan.tensors[*c];
                let (row, rows) = consumer.rows();
                let of_consumer = factor.of_consumer(row, rows);
                let depth = consumer.source.elements() / row / rows;
                let at = (if self.experts > 1 { expert } else { k % depth }) * rows + k % rows;
                let (weight, folded) = read(consumer, &of_consumer, at * row + column, 1)?;
                let same = |(b, a): (&f32, &f32)| {
                    let (b, a) = (f64::from(*b) * f64::from(weight[0]), f64::from(*a) * f64::from(folded[0]));
                    (a - b).abs() <= 1e-6 * b.abs() + f64::from(f32::MIN_POSITIVE)
                };
                if !before.iter().zip(&after).all(same) {
                    return Err(Error::check(format!(
                        "scales folded from {} into {} change their product",
                        producer.name, consumer.name
                    )));
                }
            }
        }
        Ok(())
    }

    /// What the search looks at: some rows of each matrix, and the moments of what it reads.
    fn matrices<'a>(
        &'a self,
        moments: &'a Moments,
        expert: Option<u64>,
        plan: &Plan,
        store: &Store,
    ) -> Result<Vec<Matrix<'a>>> {
        let none_rounded = self.consumers.iter().all(|(c, _)| !is_rounded(&plan.tensors[*c]));
        let mut matrices = Vec::new();
        for (c, input) in &self.consumers {
            let t = &plan.tensors[*c];
            let Some(input) = input else { continue };
            let counts = moments.counts(input)?;
            let experts: Vec<u64> = match (expert, input.experts) {
                (Some(e), _) => vec![e],
                // A few of them stand for all.
                (None, n) => {
                    (0..n.min(awq::MOST_EXPERTS)).map(|k| k * n / n.min(awq::MOST_EXPERTS)).collect()
                }
            };
            let dtype = match none_rounded && self.columns.is_multiple_of(LATER.block_size()) {
                true => LATER,
                false => t.dtype,
            };
            let codec = codec(dtype).filter(|_| dtype.is_block());
            for expert in experts {
                let count = counts.get(expert as usize).copied().unwrap_or(0);
                if count < awq::LEAST_TOKENS {
                    continue;
                }
                matrices.push(Matrix {
                    rows: sample(t, expert, store)?,
                    codec,
                    weighed: !matches!(t.rounding, Rounding::Nearest),
                    mean_abs: mean_abs(moments, input, expert, count)?,
                    count,
                    sums: Box::new(sums(moments, input, expert)),
                });
            }
        }
        Ok(matrices)
    }
}

fn mean_abs(moments: &Moments, input: &Input, expert: u64, count: u64) -> Result<Vec<f32>> {
    let sum = moments.sum_abs(input, expert)?;
    Ok(sum.into_iter().map(|v| (f64::from(v) / count as f64) as f32).collect())
}

/// Rows of an expert's matrix, evenly spread, without what folds do to them.
fn sample(t: &TensorPlan, expert: u64, store: &Store) -> Result<Vec<f32>> {
    let (row, rows) = t.rows();
    let take = awq::sampled_rows(row).min(rows);
    let (mut values, mut scratch) = (Vec::new(), Scratch::default());
    let mut out = Vec::with_capacity((take * row) as usize);
    for k in 0..take {
        let start = (expert * rows + (2 * k + 1) * rows / (2 * take)) * row;
        t.source.unfolded(store, start, start + row, &mut values, &mut scratch)?;
        out.extend_from_slice(&values);
    }
    Ok(out)
}

/// Powers of two between 1/4 and 4.
fn random(seed: u64, n: usize) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..n).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        2f32.powi((state >> 33) as i32 % 5 - 2)
    })
}

/// Bytes that finding scales takes at most, on so many threads.
pub(super) fn peak(plan: &Plan, threads: usize) -> u64 {
    plan.folds.iter().map(FoldPlan::bytes).max().unwrap_or(0).saturating_mul(threads as u64)
}

/// Makes the scales of all folds known, before anything is written.
///
/// # Errors
/// The first that any worker meets; `Interrupted` when the observer says so.
pub(super) fn settle(plan: &Plan, store: &Store, budget: &Budget, observer: &dyn Observer) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let lock = || failure.lock().unwrap_or_else(|e| e.into_inner());
    let work = || {
        while let Some(fold) = plan.folds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = match observer.interrupted() {
                true => Err(Error::interrupted()),
                false => fold.settle(plan, store, observer),
            };
            if let Err(e) = done {
                next.store(plan.folds.len(), Ordering::Relaxed);
                let named = |e: Error| {
                    if e.path().is_some() { e } else { e.context(format!("scales of {:?}", fold.name)) }
                };
                lock().get_or_insert_with(|| named(e));
            }
        }
    };
    crate::work::together(budget.threads.min(plan.folds.len()), work);
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}
