//! Second moments: for each input of a model's matrices the sum of `x x^T` over the tokens of a
//! calibration text, which quantizers measure the error of a layer's output with.
//!
//! A GGUF file with four tensors for each input, see `formats/spec/moments.md`. Nothing but headers and
//! counts is read at opening: the matrices of a model are larger than many a model.

use std::path::Path;

use indexmap::IndexMap;

use super::InputFile;
use super::gguf::write::Layout;
use super::gguf::{Array, Gguf, Metadata, Value};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::{DType, TensorInfo};

/// Version of the format that is written, and the only one that is read.
const VERSION: u32 = 1;
const KEY_VERSION: &str = "moments.version";
const KEY_MODEL: &str = "moments.model";
const KEY_WEIGHTS: &str = "moments.weights";
const KEY_INPUTS: &str = "moments.inputs";
const KEY_TEXTS: &str = "moments.texts";
const KEY_TOKENS: &str = "moments.tokens.sha256";
const KEY_CONTEXTS: &str = "moments.contexts";
const KEY_CHUNKS: &str = "moments.chunks";

/// The tensors of an input, by the ends of their names, with their types.
const PARTS: [(&str, DType); 4] = [
    (".in_moments", DType::F32),
    (".in_sum", DType::F32),
    (".in_sum_abs", DType::F32),
    (".counts", DType::I64),
];
/// Longest row of a matrix, far above any: its square stays far below 2^64.
const MAX_COLUMNS: u64 = 1 << 24;

/// What several matrices are multiplied with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// The first of the weights, after which it is called: `blk.0.attn_q.weight`.
    pub name: String,
    /// All weights that read it, the first included.
    pub weights: Vec<String>,
    /// Values of one token: columns of the weights.
    pub columns: u64,
    /// Matrices in a stack, each with inputs of its own; 1 where there is no stack.
    pub experts: u64,
}

impl Input {
    /// Values of a packed upper triangle; `None` beyond any model.
    pub fn packed(&self) -> Option<u64> {
        (self.columns > 0 && self.columns <= MAX_COLUMNS).then(|| self.columns * (self.columns + 1) / 2)
    }

    /// Where row `i` of a packed triangle begins, with its diagonal element: all earlier rows lie before.
    pub fn row_start(&self, i: u64) -> u64 {
        i * self.columns - i * i.saturating_sub(1) / 2
    }
}

/// A text that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Its name, as it was given.
    pub name: String,
    /// SHA-256 of its tokens (I32, little-endian) in hexadecimal.
    pub tokens: String,
    /// Tokens of a window.
    pub n_ctx: u32,
    /// Windows.
    pub chunks: u32,
}

/// All that a file states besides its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// What tells the model from others.
    pub model: String,
    /// The texts.
    pub texts: Vec<Text>,
    /// The inputs, in the order of the file.
    pub inputs: Vec<Input>,
}

/// Where the numbers of an input lie in a file: byte offsets of the four parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// `experts x packed` F32.
    pub moments: u64,
    /// `experts x columns` F32.
    pub sum: u64,
    /// `experts x columns` F32.
    pub sum_abs: u64,
    /// `experts` I64.
    pub counts: u64,
}

impl Contents {
    /// The file's layout, and the places of each input's numbers.
    ///
    /// # Errors
    /// `Unsupported` for names that are too long, `Malformed` for sizes that cannot be.
    pub fn layout(&self) -> Result<(Layout, Vec<Places>)> {
        let strings = |list: Vec<&str>| {
            Value::Array(Array::String(list.into_iter().map(|s| s.as_bytes().to_vec()).collect()))
        };
        let mut metadata = Metadata::default();
        metadata.set("general.type", "moments");
        metadata.set(KEY_VERSION, Value::U32(VERSION));
        metadata.set(KEY_MODEL, self.model.as_str());
        metadata.set(KEY_TEXTS, strings(self.texts.iter().map(|t| t.name.as_str()).collect()));
        metadata.set(KEY_TOKENS, strings(self.texts.iter().map(|t| t.tokens.as_str()).collect()));
        let numbers = |of: fn(&Text) -> u32| Value::Array(Array::U32(self.texts.iter().map(of).collect()));
        metadata.set(KEY_CONTEXTS, numbers(|t| t.n_ctx));
        metadata.set(KEY_CHUNKS, numbers(|t| t.chunks));
        let shared =
            || self.inputs.iter().flat_map(|i| i.weights.iter().map(|w| (w.as_str(), i.name.as_str())));
        metadata.set(KEY_WEIGHTS, strings(shared().map(|(w, _)| w).collect()));
        metadata.set(KEY_INPUTS, strings(shared().map(|(_, i)| i).collect()));
        let mut tensors = Vec::with_capacity(4 * self.inputs.len());
        for input in &self.inputs {
            let too_large = || Error::malformed(format!("{} columns", input.columns)).context(&input.name);
            let packed = input.packed().ok_or_else(too_large)?;
            let lengths = [packed, input.columns, input.columns, 1];
            for ((end, dtype), n) in PARTS.into_iter().zip(lengths) {
                tensors.push((format!("{}{end}", input.name), dtype, [input.experts, n]));
            }
        }
        let infos: Vec<_> = tensors.iter().map(|(n, d, s)| (n.as_str(), *d, &s[..])).collect();
        let layout = Layout::new(&metadata, &infos)?;
        let places = layout.offsets.as_chunks::<4>().0.iter();
        let places = places.map(|&[moments, sum, sum_abs, counts]| Places { moments, sum, sum_abs, counts });
        let places = places.collect();
        Ok((layout, places))
    }
}

/// An opened file.
#[derive(Debug)]
pub struct Moments {
    contents: Contents,
    /// Of each input, tokens for each expert.
    counts: Vec<Vec<u64>>,
    by_weight: IndexMap<String, usize>,
    gguf: Gguf,
}

impl Moments {
    /// Opens `path`; the matrices are not looked at.
    ///
    /// # Errors
    /// `Malformed` for what is no such file, for parts that are missing or do not fit each other;
    /// `Unsupported` for another version; `Io`.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        Self::read(Gguf::open(path, limits)?).map_err(|e| if e.path().is_some() { e } else { e.at(path) })
    }

    fn read(gguf: Gguf) -> Result<Self> {
        let meta = &gguf.metadata;
        match meta.u64(KEY_VERSION) {
            Some(v) if v == u64::from(VERSION) => {}
            Some(v) => {
                let message = format!("holds second moments in version {v}, version {VERSION} is read");
                return Err(Error::unsupported(message).hint("qconv calibrate makes such files"));
            }
            None => {
                let message = format!("holds no second moments: it has no {KEY_VERSION}");
                return Err(Error::malformed(message).hint("qconv calibrate makes such files"));
            }
        }
        let missing = |key: &str| Error::malformed(format!("{key} is missing, or of another type"));
        let texts = |key: &str| -> Result<Vec<String>> {
            match meta.get(key).and_then(Value::as_array) {
                Some(Array::String(list)) => {
                    Ok(list.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect())
                }
                _ => Err(missing(key)),
            }
        };
        let numbers = |key: &str| match meta.get(key).and_then(Value::as_array) {
            Some(Array::U32(list)) => Ok(list.clone()),
            _ => Err(missing(key)),
        };
        let model =
            meta.get(KEY_MODEL).and_then(Value::as_str).ok_or_else(|| missing(KEY_MODEL))?.to_string();
        let (names, tokens) = (texts(KEY_TEXTS)?, texts(KEY_TOKENS)?);
        let (contexts, chunks) = (numbers(KEY_CONTEXTS)?, numbers(KEY_CHUNKS)?);
        if names.len() != tokens.len() || names.len() != contexts.len() || names.len() != chunks.len() {
            return Err(Error::malformed("the lists about its texts differ in length"));
        }
        let of_texts = names.into_iter().zip(tokens).zip(contexts.into_iter().zip(chunks));
        let of_texts =
            of_texts.map(|((name, tokens), (n_ctx, chunks))| Text { name, tokens, n_ctx, chunks }).collect();
        let (weights, owners) = (texts(KEY_WEIGHTS)?, texts(KEY_INPUTS)?);
        if weights.len() != owners.len() {
            return Err(Error::malformed(format!(
                "{} {KEY_WEIGHTS}, but {} {KEY_INPUTS}",
                weights.len(),
                owners.len()
            )));
        }
        let mut grouped: IndexMap<String, Vec<String>> = IndexMap::new();
        for (weight, owner) in weights.into_iter().zip(owners) {
            grouped.entry(owner).or_default().push(weight);
        }
        let (mut inputs, mut counts) = (Vec::new(), Vec::new());
        let mut by_weight = IndexMap::new();
        for (name, weights) in grouped {
            let (input, of_input) = read_input(&gguf, name, weights)?;
            for weight in &input.weights {
                if by_weight.insert(weight.clone(), inputs.len()).is_some() {
                    return Err(Error::malformed(format!("{weight:?} stands in {KEY_WEIGHTS} twice")));
                }
            }
            inputs.push(input);
            counts.push(of_input);
        }
        if inputs.len() * PARTS.len() != gguf.store.tensors().len() {
            return Err(Error::malformed(format!(
                "{} tensors for {} inputs",
                gguf.store.tensors().len(),
                inputs.len()
            )));
        }
        let contents = Contents { model, texts: of_texts, inputs };
        Ok(Self { contents, counts, by_weight, gguf })
    }

    /// The files that hold it.
    pub fn files(&self) -> &[InputFile] {
        self.gguf.store.files()
    }

    /// What it states.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The input of a weight, such as `blk.0.attn_k.weight`.
    pub fn input_of(&self, weight: &str) -> Option<&Input> {
        self.contents.inputs.get(*self.by_weight.get(weight)?)
    }

    /// Tokens that each expert of an input has seen.
    ///
    /// # Errors
    /// `Misuse` for an input of another file.
    pub fn counts(&self, input: &Input) -> Result<&[u64]> {
        let at = self.by_weight.get(&input.name).and_then(|&i| self.counts.get(i));
        at.map(Vec::as_slice).ok_or_else(|| not_there(&input.name))
    }

    /// The sum of `x x^T` of one expert (0 where there are none) as a whole symmetric matrix,
    /// `columns x columns`, in f64. Divide by the count for the mean.
    ///
    /// # Errors
    /// `Malformed` for values that no sum of squares has, `Misuse` for an expert that is not there, `Io`.
    pub fn square(&self, input: &Input, expert: u64) -> Result<Vec<f64>> {
        let tensor = self.part(input, 0, expert)?;
        let n = input.columns as usize;
        let packed = input.packed().ok_or_else(|| not_there(&input.name))?;
        let mut row = vec![0f32; n];
        let mut out = vec![0f64; n * n];
        for i in 0..n {
            let row = &mut row[i..];
            let at = expert * packed + input.row_start(i as u64);
            self.read_f32(tensor, at, row)?;
            let diagonal = row.first().copied().unwrap_or(0.0);
            if diagonal < 0.0 || row.iter().any(|v| !v.is_finite()) {
                return Err(Error::malformed(format!("row {i} of expert {expert} holds no sums of squares"))
                    .context(format!("tensor {:?}", tensor.name)));
            }
            for (j, &v) in (i..).zip(row.iter()) {
                out[i * n + j] = v.into();
                out[j * n + i] = v.into();
            }
        }
        Ok(out)
    }

    /// The sums of `x` of one expert.
    ///
    /// # Errors
    /// As [`Self::square`].
    pub fn sum(&self, input: &Input, expert: u64) -> Result<Vec<f32>> {
        self.vector(input, 1, expert)
    }

    /// The sums of `|x|` of one expert.
    ///
    /// # Errors
    /// As [`Self::square`].
    pub fn sum_abs(&self, input: &Input, expert: u64) -> Result<Vec<f32>> {
        self.vector(input, 2, expert)
    }

    fn vector(&self, input: &Input, part: usize, expert: u64) -> Result<Vec<f32>> {
        let tensor = self.part(input, part, expert)?;
        let mut out = vec![0f32; input.columns as usize];
        self.read_f32(tensor, expert * input.columns, &mut out)?;
        match out.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(Error::malformed(format!("tensor {:?}: value {i} is not finite", tensor.name))),
            None => Ok(out),
        }
    }

    /// The means of `x^2` of one expert: the importance of its columns. Where it has seen no token, all
    /// columns count alike.
    ///
    /// # Errors
    /// As [`Self::square`]; `Misuse` unless `out` has one value for each column.
    pub fn mean_squares(&self, input: &Input, expert: u64, out: &mut [f32]) -> Result<()> {
        if out.len() as u64 != input.columns {
            return Err(Error::misuse(format!("{:?} has {} columns", input.name, input.columns)));
        }
        let count = self.counts(input)?.get(expert as usize).copied().unwrap_or(0);
        if count == 0 {
            out.fill(1.0);
            return Ok(());
        }
        for (i, mean) in (0..).zip(out) {
            let mut sum = [0f32];
            self.read_packed(input, expert, input.row_start(i), &mut sum)?;
            *mean = (f64::from(sum[0]) / count as f64) as f32;
            if !mean.is_finite() || *mean < 0.0 {
                return Err(Error::malformed(format!(
                    "the moments of {:?} are no sums of squares",
                    input.name
                )));
            }
        }
        Ok(())
    }

    /// Packed values of one expert's triangle from `start` on, as many as `out` takes: for those who go
    /// through a file in bounded memory.
    ///
    /// # Errors
    /// As [`Self::square`]; values are not looked at.
    pub fn read_packed(&self, input: &Input, expert: u64, start: u64, out: &mut [f32]) -> Result<()> {
        let packed = input.packed().ok_or_else(|| not_there(&input.name))?;
        if start.checked_add(out.len() as u64).is_none_or(|end| end > packed) {
            return Err(Error::misuse(format!("{:?} has {packed} moments", input.name)));
        }
        let tensor = self.part(input, 0, expert)?;
        self.read_f32(tensor, expert * packed + start, out)
    }

    fn part(&self, input: &Input, part: usize, expert: u64) -> Result<&TensorInfo> {
        let known = self.input_of(&input.name).is_some_and(|own| own == input);
        let tensor = self.gguf.store.get(&format!("{}{}", input.name, PARTS[part].0));
        tensor.filter(|_| known && expert < input.experts).ok_or_else(|| not_there(&input.name))
    }

    fn read_f32(&self, tensor: &TensorInfo, at: u64, out: &mut [f32]) -> Result<()> {
        self.gguf.store.read(tensor, at * 4, bytemuck::cast_slice_mut(out))?;
        out.iter_mut().for_each(|v| *v = f32::from_bits(u32::from_le(v.to_bits())));
        Ok(())
    }
}

fn not_there(name: &str) -> Error {
    Error::misuse(format!("the file of second moments has no such input of {name:?}"))
}

/// Finds the parts of an input, and whether they fit each other.
fn read_input(gguf: &Gguf, name: String, weights: Vec<String>) -> Result<(Input, Vec<u64>)> {
    let wrong = |what: String| Error::malformed(what).context(format!("the moments of {name:?}"));
    if weights.first() != Some(&name) {
        return Err(wrong(format!("{KEY_INPUTS} names an input that is not the first of its weights")));
    }
    let mut shapes = [[0u64; 2]; 4];
    for ((end, dtype), shape) in PARTS.into_iter().zip(&mut shapes) {
        let tensor = gguf.store.get(&format!("{name}{end}"));
        let tensor = tensor.ok_or_else(|| wrong(format!("there is no tensor {name}{end}")))?;
        match *tensor.shape {
            [experts, n] if tensor.dtype == dtype && experts > 0 => *shape = [experts, n],
            _ => return Err(wrong(format!("{name}{end} is {} {:?}", tensor.dtype, tensor.shape))),
        }
    }
    let [[experts, packed], [_, columns], ..] = shapes;
    let input = Input { name: name.clone(), weights, columns, experts };
    let expected = [packed, columns, columns, 1].map(|n| [experts, n]);
    if shapes != expected || input.packed() != Some(packed) {
        return Err(wrong(format!("the shapes {shapes:?} of its parts do not fit each other")));
    }
    let tensor = gguf.store.get(&format!("{name}.counts"));
    let raw = tensor.map(|t| gguf.store.read_all(t)).transpose()?.unwrap_or_default();
    let counts = raw.as_chunks::<8>().0.iter().map(|b| u64::try_from(i64::from_le_bytes(*b)));
    let counts: Result<Vec<u64>, _> = counts.collect();
    Ok((input, counts.map_err(|_| wrong("a count is negative".into()))?))
}
