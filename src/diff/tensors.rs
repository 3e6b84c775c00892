//! Tensors by name: first their bytes, where both are stored alike, then their values.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::Serialize;

use crate::convert::Observer;
use crate::error::{Error, Result};
use crate::model::{Model, Tensor};
use crate::work::each;

/// Elements that are compared at a time: whole blocks of any type.
const SPAN: u64 = 1 << 18;
/// Bytes that are.
const BYTES: u64 = 1 << 20;

/// How two tensors of a name compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The same bytes, of the same types.
    SameBytes,
    /// The same values, stored otherwise.
    SameValues,
    /// Other values.
    OtherValues,
    /// Other bytes, in types that have no values to compare.
    OtherBytes,
    /// Another shape.
    OtherShape,
    /// Only the first model has it.
    OnlyFirst,
    /// Only the second has.
    OnlySecond,
}

impl Kind {
    /// Whether nothing differs but how it is stored.
    pub fn is_equal(self) -> bool {
        matches!(self, Self::SameBytes | Self::SameValues)
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::SameBytes => "equal",
            Self::SameValues => "equal in value, stored otherwise",
            Self::OtherValues => "of other values",
            Self::OtherBytes => "of other bytes",
            Self::OtherShape => "of another shape",
            Self::OnlyFirst => "only in the first",
            Self::OnlySecond => "only in the second",
        }
    }
}

/// Two tensors of a name.
#[derive(Clone, Debug, Serialize)]
pub struct TensorDiff {
    /// The name.
    pub name: String,
    /// How they compare.
    pub kind: Kind,
    /// Shapes, outermost dimension first; `null` where it is missing.
    pub shapes: [Option<Vec<u64>>; 2],
    /// How they are stored.
    pub encodings: [Option<String>; 2],
    /// How far values are apart, of [`Kind::OtherValues`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<Errors>,
}

/// How far the values of the second are from those of the first.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Errors {
    /// The largest difference, in the unit of the weights.
    pub max: f64,
    /// The sum of squared differences over that of the first's squares; infinite where these are 0.
    pub nmse: f64,
    /// Cosine of the angle between the two.
    pub cosine: f64,
    /// Values that differ.
    pub differing: u64,
    /// Of these, values that are NaN or infinite in one of the two only; they are not in the numbers above.
    pub non_finite: u64,
}

/// Sums over a stretch.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    max: f64,
    squares: f64,
    first: f64,
    second: f64,
    product: f64,
    differing: u64,
    non_finite: u64,
}

impl Sums {
    fn of(a: &[f32], b: &[f32]) -> Self {
        let mut sums = Self::default();
        for (&x, &y) in a.iter().zip(b) {
            let is_same = x == y || x.is_nan() && y.is_nan();
            sums.differing += u64::from(!is_same);
            if !x.is_finite() || !y.is_finite() {
                sums.non_finite += u64::from(!is_same);
                continue;
            }
            let (x, y) = (f64::from(x), f64::from(y));
            sums.max = sums.max.max((x - y).abs());
            sums.squares += (x - y) * (x - y);
            sums.first += x * x;
            sums.second += y * y;
            sums.product += x * y;
        }
        sums
    }

    fn add(&mut self, other: &Self) {
        self.max = self.max.max(other.max);
        self.squares += other.squares;
        self.first += other.first;
        self.second += other.second;
        self.product += other.product;
        self.differing += other.differing;
        self.non_finite += other.non_finite;
    }

    fn errors(&self) -> Errors {
        let norm = (self.first * self.second).sqrt();
        Errors {
            max: self.max,
            nmse: if self.squares > 0.0 { self.squares / self.first } else { 0.0 },
            cosine: if norm > 0.0 { self.product / norm } else { f64::from(self.squares == 0.0) },
            differing: self.differing,
            non_finite: self.non_finite,
        }
    }
}

/// Two tensors of the same name and shape.
struct Pair<'a> {
    tensors: [Tensor<'a>; 2],
    /// Where it is among the results.
    place: usize,
    /// Whether types and sizes of what is stored are the same.
    alike: bool,
    differs: AtomicBool,
    /// Bytes of the first that the observer was told of.
    seen: AtomicU64,
}

impl<'a> Pair<'a> {
    fn new(tensors: [Tensor<'a>; 2], place: usize) -> Self {
        let [a, b] = tensors;
        let alike = a.parts().len() == b.parts().len()
            && a.dtype() == b.dtype()
            && a.encoding() == b.encoding()
            && a.parts().zip(b.parts()).all(|(p, q)| p.dtype() == q.dtype() && p.shape() == q.shape());
        Self { tensors, place, alike, differs: AtomicBool::new(!alike), seen: AtomicU64::new(0) }
    }

    fn differs(&self) -> bool {
        self.differs.load(Ordering::Relaxed)
    }

    /// Tells of so many more bytes, as far as they were not told of.
    fn advance(&self, bytes: u64, observer: &dyn Observer) -> Result<()> {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        let all = self.tensors[0].stored_bytes();
        let before = self.seen.fetch_add(bytes, Ordering::Relaxed).min(all);
        observer.advance((before + bytes).min(all) - before, self.tensors[0].name());
        Ok(())
    }

    fn compare_bytes(&self, part: usize, bytes: &Range<u64>, buffers: &mut Buffers) -> Result<()> {
        if self.differs() {
            return Ok(());
        }
        let n = (bytes.end - bytes.start) as usize;
        for (tensor, buffer) in self.tensors.iter().zip(&mut buffers.bytes) {
            buffer.resize(n, 0);
            if let Some(part) = tensor.parts().nth(part) {
                part.read(bytes.start, buffer)?;
            }
        }
        if buffers.bytes[0] != buffers.bytes[1] {
            self.differs.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn compare_values(&self, span: &Range<u64>, buffers: &mut Buffers) -> Result<Sums> {
        for (tensor, values) in self.tensors.iter().zip(&mut buffers.values) {
            values.resize((span.end - span.start) as usize, 0.0);
            tensor.elements_at(span.start, values)?;
        }
        Ok(Sums::of(&buffers.values[0], &buffers.values[1]))
    }
}

/// Buffers of a thread.
#[derive(Default)]
struct Buffers {
    bytes: [Vec<u8>; 2],
    values: [Vec<f32>; 2],
}

/// Stretches of so many, up to `n`.
pub(crate) fn stretches(n: u64, step: u64) -> impl Iterator<Item = Range<u64>> {
    (0..n.div_ceil(step)).map(move |k| k * step..n.min((k + 1) * step))
}

/// Compares the tensors whose names are `wanted`, on so many threads, each of which holds a few MiB. The observer is
/// told of the bytes of the first model.
///
/// # Errors
/// As reads fail; `Malformed` for codes that mean nothing; `Interrupted`.
pub fn compare(
    models: [&Model; 2],
    wanted: &(dyn Fn(&str) -> bool + Sync),
    threads: usize,
    observer: &dyn Observer,
) -> Result<Vec<TensorDiff>> {
    let (mut found, mut pairs) = (Vec::new(), Vec::new());
    for tensor in models[0].tensors().filter(|t| wanted(t.name())) {
        let other = models[1].get(tensor.name());
        let kind = match other {
            None => Kind::OnlyFirst,
            Some(other) if other.shape() != tensor.shape() => Kind::OtherShape,
            Some(other) => {
                pairs.push(Pair::new([tensor, other], found.len()));
                Kind::SameBytes
            }
        };
        found.push(beside(tensor.name(), kind, [Some(tensor), other]));
    }
    let names: HashSet<&str> = models[0].tensors().map(|t| t.name()).collect();
    for tensor in models[1].tensors().filter(|t| wanted(t.name()) && !names.contains(t.name())) {
        found.push(beside(tensor.name(), Kind::OnlySecond, [None, Some(tensor)]));
    }
    drop(names);

    let mut items = Vec::new();
    for pair in pairs.iter().filter(|p| p.alike) {
        for (k, part) in pair.tensors[0].parts().enumerate() {
            // Elements that are moved about are read as wholes.
            let size = part.dtype().type_size();
            let step = BYTES / size * size;
            items.extend(stretches(part.nbytes(), step).map(|bytes| (pair, k, bytes)));
        }
    }
    each(&items, threads, Buffers::default, |buffers, (pair, part, bytes)| {
        pair.advance(if pair.differs() { 0 } else { bytes.end - bytes.start }, observer)?;
        pair.compare_bytes(*part, bytes, buffers)
    })?;
    drop(items);

    let mut items = Vec::new();
    for pair in pairs.iter().filter(|p| p.differs()) {
        if !pair.tensors.iter().all(Tensor::is_readable) {
            found[pair.place].kind = Kind::OtherBytes;
            pair.advance(pair.tensors[0].stored_bytes(), observer)?;
            continue;
        }
        found[pair.place].kind = Kind::SameValues;
        items.extend(stretches(pair.tensors[0].elements(), SPAN).map(|span| (pair, span)));
    }
    let sums = each(&items, threads, Buffers::default, |buffers, (pair, span)| {
        let all = pair.tensors[0].elements().max(1);
        let share = u128::from(pair.tensors[0].stored_bytes()) * u128::from(span.end - span.start);
        pair.advance((share / u128::from(all)) as u64, observer)?;
        pair.compare_values(span, buffers)
    })?;
    let mut whole: Vec<Option<Sums>> = vec![None; found.len()];
    for ((pair, _), sums) in items.iter().zip(&sums) {
        whole[pair.place].get_or_insert_default().add(sums);
    }
    for (tensor, sums) in found.iter_mut().zip(whole) {
        if let Some(sums) = sums.filter(|s| s.differing > 0) {
            tensor.kind = Kind::OtherValues;
            tensor.errors = Some(sums.errors());
        }
    }
    Ok(found)
}

fn beside(name: &str, kind: Kind, tensors: [Option<Tensor<'_>>; 2]) -> TensorDiff {
    TensorDiff {
        name: name.to_string(),
        kind,
        shapes: tensors.map(|t| t.map(|t| t.shape().to_vec())),
        encodings: tensors.map(|t| t.map(|t| t.encoding())),
        errors: None,
    }
}
