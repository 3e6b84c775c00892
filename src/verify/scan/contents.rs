//! What tensors hold, and sums of files and tensors: all of it read once, in pieces, on many threads.

use std::path::{Path, PathBuf};

use super::blocks::{FAULTS, ODD_AT, Tally, judge};
use super::finding::Finding;
use super::rules::{TENSOR_NOISE, TENSOR_ZERO, VECTOR_ZERO};
use super::{File, Scan, TensorSum};
use crate::container::{InputFile, Store};
use crate::convert::{Budget, Observer};
use crate::error::{Error, Result};
use crate::sha256::{Sha256, hex};
use crate::tensor::TensorInfo;
use crate::work::each;

/// What is wanted of the bytes.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub tensors: bool,
    pub sha256: bool,
}

/// Bytes that are read at a time: so many stay near the processor.
const SPAN: u64 = 512 << 10;
/// Share of values that may be subnormal or huge, one in so many.
const ODD_SHARE: u64 = 4;

/// Most pieces of work of a store: the larger it is, the larger they are.
const PIECES: u64 = 1 << 14;

/// A piece of work.
enum Item<'a> {
    /// The sum of a file.
    File(usize),
    /// Bytes of a tensor, of which only the whole is summed.
    Part { info: &'a TensorInfo, number: usize, at: u64, bytes: u64 },
}

/// What came of one.
enum Done {
    File(usize, String),
    Part(usize, Tally, Option<String>),
}

/// Looks at the tensors of `store`, and sums its files.
pub(super) fn check(
    scan: &mut Scan,
    store: &Store,
    format: &'static str,
    wanted: Wanted,
    budget: &Budget,
    observer: &dyn Observer,
) -> Result<()> {
    let infos = store.tensors();
    let mut items = Vec::new();
    if wanted.sha256 {
        items.extend((0..store.files().len()).map(Item::File));
    }
    let all: u64 = infos.iter().fold(0, |sum, t| t.nbytes.saturating_add(sum));
    let part = (all / PIECES).max(SPAN);
    for (number, info) in infos.iter().enumerate() {
        let whole = Item::Part { info, number, at: 0, bytes: info.nbytes };
        if wanted.sha256 {
            items.push(whole);
        } else if wanted.tensors {
            let size = info.dtype.type_size();
            let part = (part / size * size).max(size);
            let starts = (0..info.nbytes.div_ceil(part)).map(|i| i * part);
            items.extend(starts.map(|at| Item::Part { info, number, at, bytes: part.min(info.nbytes - at) }));
        }
    }
    let done = each(&items, budget.threads, Vec::new, |buffer: &mut Vec<u8>, item| match *item {
        Item::File(number) => {
            let file = store.files().get(number).ok_or_else(|| Error::misuse("no such file"))?;
            Ok(Done::File(number, sum_of(file, buffer, observer)?))
        }
        Item::Part { info, number, at, bytes } => {
            let (mut tally, mut sum) = (Tally::default(), wanted.sha256.then(Sha256::new));
            let size = info.dtype.type_size();
            let span = (SPAN / size * size).max(size);
            for i in 0..bytes.div_ceil(span) {
                if observer.interrupted() {
                    return Err(Error::interrupted());
                }
                let at = at + i * span;
                let read = read(store, info, at, span.min(bytes - i * span), buffer)?;
                if let Some(sum) = &mut sum {
                    sum.update(read);
                }
                if wanted.tensors {
                    judge(info.dtype, read, at, &mut tally);
                }
                observer.advance(read.len() as u64, &info.name);
            }
            Ok(Done::Part(number, tally, sum.map(|sum| hex(&sum.finalize()))))
        }
    })?;
    let mut sums = vec![None; store.files().len()];
    let mut tallies = vec![Tally::default(); infos.len()];
    let mut of_tensors = vec![None; infos.len()];
    for item in done {
        match item {
            Done::File(number, sum) => sums[number] = Some(sum),
            Done::Part(number, tally, sum) => {
                tallies[number].add(&tally);
                of_tensors[number] = sum;
            }
        }
    }
    if wanted.tensors {
        for (info, tally) in infos.iter().zip(&tallies) {
            let file = store.files().get(info.file).map_or(Path::new(""), InputFile::path);
            findings(scan, file, info, tally, store.stored().place(info).is_some());
        }
    }
    for (number, (file, sum)) in store.files().iter().zip(sums).enumerate() {
        let tensors = infos.iter().zip(&of_tensors).filter(|(info, _)| info.file == number);
        let tensors = tensors.filter_map(|(info, sum)| {
            let (dtype, sha256) = (info.dtype.name().to_string(), sum.clone()?);
            Some(TensorSum { name: info.name.clone(), dtype, shape: info.shape.clone(), sha256 })
        });
        let path = file.path().to_path_buf();
        scan.files.push(File { path, format, bytes: file.len(), sha256: sum, tensors: tensors.collect() });
    }
    Ok(())
}

fn read<'b>(store: &Store, info: &TensorInfo, at: u64, n: u64, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
    let n = n as usize; // at most a span, or a block
    if buffer.len() < n {
        buffer.resize(n, 0);
    }
    let bytes = buffer.get_mut(..n).unwrap_or_default();
    store.stored().read(info, at, bytes)?;
    Ok(bytes)
}

/// What the tally of a tensor means.
fn findings(scan: &mut Scan, file: &Path, info: &TensorInfo, tally: &Tally, has_place: bool) {
    let is_block = info.dtype.is_block();
    let pieces = info.nbytes / info.dtype.type_size();
    let what = if is_block { "blocks" } else { "values" };
    let place = |at: Option<u64>| at.filter(|_| has_place).and_then(|at| info.offset.checked_add(at));
    let about = |rule, message: String| Finding::new(rule, file, message).tensor(&info.name);
    for (flag, rule, says) in FAULTS {
        let (count, first) = (tally.count[*flag], tally.first[*flag]);
        if count == 0 {
            continue;
        }
        let number = first.unwrap_or(0) / info.dtype.type_size();
        let message = format!(
            "tensor {:?} ({}): {count} of {pieces} {what} {says}, first number {number}",
            info.name, info.dtype
        );
        scan.find(about(rule, message).at(place(first)).of(info.dtype.type_size()));
    }
    let odd = tally.count[ODD_AT];
    if odd > pieces / ODD_SHARE && pieces >= 32 {
        let message = format!(
            "tensor {:?} ({}): {odd} of {pieces} values are subnormal or above 1e10",
            info.name, info.dtype
        );
        scan.find(about(&TENSOR_NOISE, message).at(place(Some(0))).of(info.nbytes));
    }
    if !tally.nonzero && info.nbytes > 0 {
        let is_matrix = info.shape.iter().filter(|n| **n > 1).count() > 1;
        let rule = if is_matrix && !info.name.ends_with("bias") { &TENSOR_ZERO } else { &VECTOR_ZERO };
        let message = format!("tensor {:?} ({}) is zero throughout", info.name, info.dtype);
        scan.find(about(rule, message).at(place(Some(0))).of(info.nbytes));
    }
}

fn sum_of(file: &InputFile, buffer: &mut Vec<u8>, observer: &dyn Observer) -> Result<String> {
    let mut sum = Sha256::new();
    buffer.resize(SPAN as usize, 0);
    let mut at = 0;
    while at < file.len() {
        if observer.interrupted() {
            return Err(Error::interrupted());
        }
        let n = SPAN.min(file.len() - at);
        let bytes = buffer.get_mut(..n as usize).unwrap_or_default();
        file.read_at(at, bytes)?;
        sum.update(bytes);
        at += n;
    }
    Ok(hex(&sum.finalize()))
}

/// Lists files of which no tensors are read: one, or those of a directory that are not listed yet.
pub(super) fn files_alone(
    scan: &mut Scan,
    path: &Path,
    format: &'static str,
    sha256: bool,
    observer: &dyn Observer,
) -> Result<()> {
    let paths: Vec<PathBuf> = match path.is_dir() {
        true => super::target::files_of(path)?.into_iter().map(|(_, path)| path).collect(),
        false => vec![path.to_path_buf()],
    };
    let mut buffer = Vec::new();
    let listed: std::collections::HashSet<PathBuf> = scan.files.iter().map(|f| f.path.clone()).collect();
    for path in paths.into_iter().filter(|path| !listed.contains(path)) {
        let file = match InputFile::open(&path) {
            Ok(file) => file,
            Err(e) => {
                scan.error(e, &path)?;
                continue;
            }
        };
        let sum = match sha256 {
            true => Some(sum_of(&file, &mut buffer, observer)?),
            false => None,
        };
        scan.files.push(File { path, format, bytes: file.len(), sha256: sum, tensors: Vec::new() });
    }
    Ok(())
}
