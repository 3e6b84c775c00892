//! Importance matrices: for each matrix of a model, the mean square of every input column over a
//! calibration text, which quantizers weigh their errors with.
//!
//! Two formats of llama.cpp's imatrix tool are read: GGUF (per matrix a tensor `NAME.in_sum2` with
//! the sums of squares, columns innermost, and one `NAME.counts` with the tokens behind them, for
//! each expert), and the older flat file. Values are read when they are needed, a row at a time:
//! those of a model with many experts are larger than many a model. Source: `imatrix-loader.cpp`,
//! `tools/quantize`.

use std::collections::BTreeMap;
use std::path::Path;

use indexmap::IndexMap;

use super::InputFile;
use super::gguf::write::Layout;
use super::gguf::{Array, Gguf, Metadata, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::tensor::DType;

/// An opened importance matrix.
#[derive(Debug)]
pub struct ImportanceMatrix {
    /// Entries by the name of the matrix they belong to, such as `blk.0.ffn_down.weight`.
    pub entries: IndexMap<String, Entry>,
    /// The texts it was made from, as its maker named them.
    pub datasets: Vec<String>,
    /// Chunks of text behind it, where stated.
    pub chunks: Option<u32>,
    file: InputFile,
    big_endian: bool,
}

/// The importance of one matrix: where it lies in the file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// First byte of the sums, which are F32.
    offset: u64,
    /// Columns of one expert's matrix.
    columns: u64,
    /// For each expert what its sums are to be divided by.
    counts: Vec<f32>,
    /// Whether an expert without a count has an importance of 1 throughout; otherwise its sums
    /// stand as they are.
    ones_where_unseen: bool,
}

/// What a look at all values of an entry found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Values.
    pub values: u64,
    /// Values that are NaN or infinite.
    pub not_finite: u64,
    /// Values below zero, which no mean of squares is.
    pub negative: u64,
    /// Values that are zero.
    pub zero: u64,
    /// Experts that no token of the text reached; their importance is 1 throughout.
    pub unseen_experts: u64,
}

/// Bytes read at once.
const BUFFER: usize = 64 << 10;
/// Fewest bytes of an entry in the flat format: three lengths, one byte of name, one value.
const MIN_ENTRY: u64 = 4 + 1 + 4 + 4 + 4;
/// Numbers of tokens that there can be.
const COUNTS: std::ops::Range<f32> = 0.0..9e15;
/// Bytes of a name in the flat format, far above any.
const MAX_NAME: u64 = 1 << 10;

impl ImportanceMatrix {
    /// Opens `path` in either format. Values are not looked at, see [`Self::examine`].
    ///
    /// # Errors
    /// `Malformed` for what is neither format, for sums without counts, counts that are no numbers of tokens, shapes
    /// that disagree, and a file that ends early; `Io`.
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        let file = InputFile::open(path)?;
        let mut magic = [0; 4];
        if file.len() >= 4 {
            file.read_at(0, &mut magic)?;
        }
        let matrix =
            if &magic == b"GGUF" { Self::from_gguf(path, limits) } else { Self::from_flat(file, limits) };
        matrix.map_err(|e| e.at(path))
    }

    fn from_gguf(path: &Path, limits: &Limits) -> Result<Self> {
        let gguf = Gguf::open(path, limits)?;
        if gguf.shards > 1 {
            return Err(Error::unsupported("an importance matrix in several files"));
        }
        let datasets = match gguf.metadata.get("imatrix.datasets") {
            Some(Value::Array(Array::String(names))) => {
                names.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect()
            }
            _ => Vec::new(),
        };
        let chunks = gguf.metadata.u64("imatrix.chunk_count");
        if chunks.is_none() || gguf.metadata.get("imatrix.datasets").is_none() {
            return Err(Error::malformed(
                "is no importance matrix: it has no imatrix.datasets and imatrix.chunk_count",
            )
            .hint("llama.cpp's imatrix tool makes them"));
        }
        let mut entries = IndexMap::new();
        for sums in gguf.store.tensors() {
            let Some(name) = sums.name.strip_suffix(".in_sum2") else {
                match sums.name.strip_suffix(".counts") {
                    Some(name) if gguf.store.get(&format!("{name}.in_sum2")).is_none() => {
                        return Err(Error::malformed(format!("{name:?} has counts, but no sums")));
                    }
                    _ => continue,
                }
            };
            let wrong = |what: &str| Err(Error::malformed(format!("the entry of {name:?} {what}")));
            let Some(counts) = gguf.store.get(&format!("{name}.counts")) else {
                return wrong("has sums, but no counts");
            };
            if sums.dtype != DType::F32 || counts.dtype != DType::F32 {
                return wrong("is not F32");
            }
            let (values, experts) = (sums.elements(), counts.elements());
            if experts == 0 || values == 0 || !values.is_multiple_of(experts) {
                return wrong(&format!("has {values} sums for {experts} counts"));
            }
            let raw = gguf.store.read_all(counts)?;
            // Counts are numbers of tokens; llama.cpp rounds them to integers.
            let counts: Vec<f32> =
                raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b).round()).collect();
            if let Some(count) = counts.iter().find(|count| !COUNTS.contains(count)) {
                return wrong(&format!("has a count of {count}"));
            }
            entries.insert(
                name.to_string(),
                Entry { offset: sums.offset, columns: values / experts, counts, ones_where_unseen: true },
            );
        }
        if entries.is_empty() {
            return Err(Error::malformed("is an importance matrix without entries"));
        }
        let chunks = chunks.and_then(|n| u32::try_from(n).ok());
        Ok(Self { entries, datasets, chunks, file: InputFile::open(path)?, big_endian: gguf.big_endian })
    }

    /// `count, (name length, name, calls, values, F32...)..., [chunks, name length, dataset]`, all
    /// numbers of 32 bits, little-endian.
    fn from_flat(file: InputFile, limits: &Limits) -> Result<Self> {
        let neither = |e: Error| match e.kind() {
            ErrorKind::Io => e,
            _ => e.hint("an importance matrix is a GGUF file, or a .dat file of llama.cpp's imatrix tool"),
        };
        let mut at = 0u64;
        let number = |at: &mut u64| -> Result<u64> {
            let mut bytes = [0; 4];
            file.read_at(*at, &mut bytes)?;
            *at += 4;
            u64::try_from(i32::from_le_bytes(bytes))
                .map_err(|_| Error::malformed(format!("a length at offset {} is negative", *at - 4)))
        };
        let text = |at: &mut u64, len: u64| -> Result<String> {
            if len > MAX_NAME {
                return Err(Error::malformed(format!("a name of {len} bytes at offset {at}")));
            }
            let mut bytes = vec![0; len as usize];
            file.read_at(*at, &mut bytes)?;
            *at += len;
            String::from_utf8(bytes)
                .map_err(|_| Error::malformed(format!("a name at offset {at} is not UTF-8")))
        };
        let n = number(&mut at).map_err(neither)?;
        if n == 0 || n > file.len() / MIN_ENTRY || n > limits.tensors {
            return Err(neither(Error::malformed(format!("is no importance matrix: {n} entries"))));
        }
        let mut entries = IndexMap::new();
        for i in 0..n {
            let entry = (|| {
                let len = number(&mut at)?;
                let name = text(&mut at, len)?;
                let (calls, columns) = (number(&mut at)?, number(&mut at)?);
                let end = columns.checked_mul(4).and_then(|bytes| at.checked_add(bytes));
                if columns == 0 || end.is_none_or(|end| end > file.len()) {
                    return Err(Error::malformed(format!("{name:?} has {columns} values at offset {at}")));
                }
                let counts = vec![if calls > 0 { calls as f32 } else { 1.0 }];
                let entry = Entry { offset: at, columns, counts, ones_where_unseen: false };
                at += columns * 4;
                Ok((name, entry))
            })();
            let (name, entry) = entry.map_err(|e| neither(e.context(format!("entry {i} of {n}"))))?;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(Error::malformed(format!("{name:?} appears twice")));
            }
        }
        // What follows is optional, and older files end within it.
        let chunks = number(&mut at).ok();
        let dataset = number(&mut at).and_then(|len| text(&mut at, len)).ok().filter(|d| !d.is_empty());
        let chunks = chunks.and_then(|n| u32::try_from(n).ok());
        Ok(Self { entries, datasets: dataset.into_iter().collect(), chunks, file, big_endian: false })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Keeps the entries whose name contains one of `names`.
    pub fn include(&mut self, names: &[String]) {
        self.entries.retain(|entry, _| names.iter().any(|n| entry.contains(n.as_str())));
    }

    /// Drops the entries whose name contains one of `names`.
    pub fn exclude(&mut self, names: &[String]) {
        self.entries.retain(|entry, _| !names.iter().any(|n| entry.contains(n.as_str())));
    }

    /// The importance of the columns of one expert's matrix (expert 0 where there are none): mean
    /// squares, never negative in a sound file. `out` has one value per column.
    ///
    /// A flat entry holds all experts as one row; `out` then takes its part.
    ///
    /// # Errors
    /// `Misuse` for an expert that is not there; `Io`.
    pub fn read(&self, entry: &Entry, expert: u64, out: &mut [f32]) -> Result<()> {
        let columns = out.len() as u64;
        let first = expert.checked_mul(columns);
        let Some(first) = first.filter(|f| f.checked_add(columns).is_some_and(|end| end <= entry.values()))
        else {
            return Err(Error::misuse(format!("expert {expert} is not in the importance matrix")));
        };
        self.read_means(entry, first, out)
    }

    /// The mean squares from value `first` of an entry on, as many as `out` takes and there are.
    fn read_means(&self, entry: &Entry, first: u64, out: &mut [f32]) -> Result<()> {
        self.read_stored(entry, first, out)?;
        for (i, value) in (first..).zip(out.iter_mut()) {
            *value = entry.mean(i, *value);
        }
        Ok(())
    }

    /// The values from `first` of an entry on as the file has them.
    fn read_stored(&self, entry: &Entry, first: u64, out: &mut [f32]) -> Result<()> {
        self.file.read_at(entry.offset + first * 4, bytemuck::cast_slice_mut(out))?;
        for value in out {
            let bytes = value.to_ne_bytes();
            *value = if self.big_endian { f32::from_be_bytes(bytes) } else { f32::from_le_bytes(bytes) };
        }
        Ok(())
    }

    /// An entry as it was collected: sums of squares, and tokens. The flat format has only their ratio,
    /// and how many windows there were: of `window` tokens each, as its maker is told by the same
    /// option.
    ///
    /// # Errors
    /// `Io`; `Limit` for more values than memory can hold.
    pub fn sums(&self, name: &str, entry: &Entry, window: u32) -> Result<Sums> {
        let factor = if entry.ones_where_unseen { 1.0 } else { f64::from(window) };
        let counts = entry.counts.iter().map(|count| (f64::from(*count) * factor) as u64).collect();
        let too_many = |_| Error::limit(format!("the entry of {name:?} has too many values")).at(self.path());
        let len = usize::try_from(entry.values()).map_err(too_many)?;
        let mut stored = [0f32; BUFFER / 4];
        let mut squares = Vec::with_capacity(len);
        while squares.len() < len {
            let part = &mut stored[..(len - squares.len()).min(BUFFER / 4)];
            self.read_stored(entry, squares.len() as u64, part)?;
            squares.extend(part.iter().map(|&v| f64::from(v) * factor));
        }
        Ok(Sums { squares, counts })
    }

    /// Looks at every value of an entry.
    ///
    /// # Errors
    /// `Io`.
    pub fn examine(&self, entry: &Entry) -> Result<Findings> {
        let mut findings = Findings { values: entry.values(), ..Findings::default() };
        if entry.ones_where_unseen {
            findings.unseen_experts = entry.counts.iter().filter(|c| c.is_nan() || **c <= 0.0).count() as u64;
        }
        let mut values = [0f32; BUFFER / 4];
        let mut at = 0;
        while at < entry.values() {
            let n = (entry.values() - at).min(values.len() as u64) as usize;
            self.read_means(entry, at, &mut values[..n])?;
            for &value in &values[..n] {
                findings.not_finite += u64::from(!value.is_finite());
                findings.negative += u64::from(value < 0.0);
                findings.zero += u64::from(value == 0.0);
            }
            at += n as u64;
        }
        Ok(findings)
    }
}

/// What an importance matrix is made of: the sums of one matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Sums of the squares of each input column, expert after expert.
    pub squares: Vec<f64>,
    /// Tokens behind them, for each expert; a single one where all have the same.
    pub counts: Vec<u64>,
}

/// The bytes of an importance matrix in GGUF, as llama.cpp's imatrix tool writes it. `chunk_size` is in
/// tokens.
///
/// # Errors
/// `Misuse` when sums are not the same number of columns for each count; what GGUF cannot hold.
pub fn to_gguf(
    sums: &BTreeMap<String, Sums>,
    datasets: &[String],
    chunks: u32,
    chunk_size: u32,
) -> Result<Vec<u8>> {
    let mut metadata = Metadata::default();
    metadata.set("general.type", "imatrix");
    let datasets = datasets.iter().map(|d| d.as_bytes().to_vec()).collect();
    metadata.set("imatrix.datasets", Value::Array(Array::String(datasets)));
    metadata.set("imatrix.chunk_count", Value::U32(chunks));
    metadata.set("imatrix.chunk_size", Value::U32(chunk_size));
    let mut tensors = Vec::with_capacity(2 * sums.len());
    for (name, s) in sums {
        let experts = s.counts.len() as u64;
        let columns = s.columns(name)? as u64;
        tensors.push((format!("{name}.in_sum2"), [experts, columns]));
        tensors.push((format!("{name}.counts"), [experts, 1]));
    }
    // Of a single expert there is only one dimension.
    let shape = |s: &'_ [u64; 2]| if s[0] == 1 { 1..2 } else { 0..2 };
    let infos: Vec<_> = tensors.iter().map(|(n, s)| (n.as_str(), DType::F32, &s[shape(s)])).collect();
    let layout = Layout::new(&metadata, &infos)?;
    let mut file = layout.header;
    let mut offsets = layout.offsets.iter();
    let mut next = |file: &mut Vec<u8>| {
        file.resize(offsets.next().map_or(file.len(), |at| *at as usize), 0);
    };
    for s in sums.values() {
        next(&mut file);
        s.squares.iter().for_each(|v| file.extend((*v as f32).to_le_bytes()));
        next(&mut file);
        s.counts.iter().for_each(|n| file.extend((*n as f32).to_le_bytes()));
    }
    file.resize(layout.total_len as usize, 0);
    Ok(file)
}

/// The bytes of an importance matrix in the older flat format, which holds means and the number of
/// windows behind them; what no token reached is 1.
///
/// # Errors
/// `Misuse` when sums are not the same number of columns for each count; `Limit` for what 32 bits
/// cannot hold.
pub fn to_flat(
    sums: &BTreeMap<String, Sums>,
    datasets: &[String],
    chunks: u32,
    chunk_size: u32,
) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let put = |file: &mut Vec<u8>, n: u64| -> Result<()> {
        let n = i32::try_from(n).map_err(|_| Error::limit(format!("{n} does not fit the .dat format")))?;
        file.extend(n.to_le_bytes());
        Ok(())
    };
    let seen = || sums.iter().filter(|(_, s)| s.counts.iter().any(|&n| n > 0));
    put(&mut file, seen().count() as u64)?;
    for (name, s) in seen() {
        let columns = s.columns(name)?;
        let windows = s.counts.iter().max().copied().unwrap_or(0).div_ceil(u64::from(chunk_size).max(1));
        put(&mut file, name.len() as u64)?;
        file.extend(name.bytes());
        put(&mut file, windows)?;
        put(&mut file, s.squares.len() as u64)?;
        for (squares, &count) in s.squares.chunks(columns.max(1)).zip(&s.counts) {
            for &square in squares {
                let mean = if count == 0 { 1.0 } else { square / count as f64 };
                file.extend(((mean * windows as f64) as f32).to_le_bytes());
            }
        }
    }
    put(&mut file, u64::from(chunks))?;
    let dataset = datasets.last().map_or("", String::as_str);
    put(&mut file, dataset.len() as u64)?;
    file.extend(dataset.bytes());
    Ok(file)
}

impl Sums {
    /// Columns of one expert.
    fn columns(&self, name: &str) -> Result<usize> {
        let (values, experts) = (self.squares.len(), self.counts.len());
        if experts == 0 || !values.is_multiple_of(experts) {
            return Err(Error::misuse(format!("{values} sums for {experts} experts of {name:?}")));
        }
        Ok(values / experts)
    }
}

impl Entry {
    /// Values of all experts.
    pub fn values(&self) -> u64 {
        self.columns.saturating_mul(self.counts.len() as u64)
    }

    /// Columns of one expert's matrix.
    pub fn columns(&self) -> u64 {
        self.columns
    }

    /// Experts; 1 where there are none.
    pub fn experts(&self) -> u64 {
        self.counts.len() as u64
    }

    /// What the sum at `i` means.
    fn mean(&self, i: u64, sum: f32) -> f32 {
        match self.counts.get((i / self.columns) as usize) {
            Some(&count) if count > 0.0 => sum / count,
            _ if self.ones_where_unseen => 1.0,
            _ => sum,
        }
    }
}
