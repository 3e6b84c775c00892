//! What a run has collected so far, as a file beside its output: after a crash or Ctrl-C the same
//! command goes on from there, and ends with the same bytes.
//!
//! It is a GGUF file with sums in F64 and a key that says what they belong to: the model, the size of
//! windows, the tokens of those read, the sums at the beginning. So a run with more windows goes on
//! too, and a run with anything else begins anew.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::collect::{Options, Progress};
use super::importance::Importance;
use crate::container::gguf::write::Layout;
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::container::imatrix::Sums;
use crate::error::{Error, Result};
use crate::eval::score::Perplexity;
use crate::eval::windows::Windows;
use crate::limits::Limits;
use crate::sha256::Sha256;
use crate::tensor::DType;

/// What the sums of a run belong to.
#[derive(Clone)]
pub struct Key(Sha256);

impl Key {
    /// The key of a run; `begin` is what it adds to.
    ///
    /// # Errors
    /// `Io` when the model is not there.
    pub fn new(model: &Path, windows: &Windows, options: Options, begin: &Importance) -> Result<Self> {
        let mut key = Sha256::new();
        let meta = model.metadata().map_err(|e| Error::io("read", model, e))?;
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        key.update(meta.len().to_le_bytes());
        key.update(modified.map_or(0, |t| t.as_nanos()).to_le_bytes());
        key.update(model.canonicalize().unwrap_or_default().as_os_str().as_encoded_bytes());
        key.update([0, u8::from(options.process_output), u8::from(options.perplexity)]);
        key.update((windows.n_ctx as u64).to_le_bytes());
        key.update(windows.bos.unwrap_or(-1).to_le_bytes());
        for (name, sums) in &begin.sums {
            key.update(name.as_bytes());
            key.update([0]);
            sums.squares.iter().for_each(|s| key.update(s.to_le_bytes()));
            sums.counts.iter().for_each(|n| key.update(n.to_le_bytes()));
        }
        Ok(Self(key))
    }

    /// With the tokens of the windows that were read.
    fn after(&self, windows: &Windows, read: usize) -> String {
        let mut key = self.0.clone();
        let tokens = windows.tokens.iter().take(windows.n_ctx.saturating_mul(read));
        tokens.for_each(|t| key.update(t.to_le_bytes()));
        key.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// The checkpoint's place beside an output.
///
/// # Errors
/// `Misuse` for a path that names no file.
pub fn path_for(output: &Path) -> Result<PathBuf> {
    output.file_name().ok_or_else(|| Error::misuse("is no name for an output").at(output))?;
    Ok(crate::sys::hidden(output, "checkpoint"))
}

/// The bytes of a checkpoint.
///
/// # Errors
/// What GGUF cannot hold.
pub fn to_bytes(progress: &Progress, key: &Key, windows: &Windows) -> Result<Vec<u8>> {
    let mut metadata = Metadata::default();
    metadata.set("general.type", "checkpoint");
    metadata.set("checkpoint.key", key.after(windows, progress.windows).as_str());
    metadata.set("checkpoint.windows", Value::U64(progress.windows as u64));
    let (count, sum, squares) = progress.perplexity.parts();
    metadata.set("checkpoint.perplexity.count", Value::U64(count));
    metadata.set("checkpoint.perplexity.sum", Value::F64(sum));
    metadata.set("checkpoint.perplexity.squares", Value::F64(squares));
    let mut tensors = Vec::new();
    for (name, sums) in &progress.importance.sums {
        tensors.push((format!("{name}.in_sum2"), DType::F64, [sums.squares.len() as u64]));
        tensors.push((format!("{name}.counts"), DType::I64, [sums.counts.len() as u64]));
    }
    let infos: Vec<_> = tensors.iter().map(|(n, t, s)| (n.as_str(), *t, &s[..])).collect();
    let layout = Layout::new(&metadata, &infos)?;
    let mut file = layout.header;
    let mut offsets = layout.offsets.iter();
    for sums in progress.importance.sums.values() {
        file.resize(offsets.next().map_or(0, |at| *at as usize), 0);
        sums.squares.iter().for_each(|v| file.extend(v.to_le_bytes()));
        file.resize(offsets.next().map_or(0, |at| *at as usize), 0);
        sums.counts.iter().for_each(|n| file.extend(n.to_le_bytes()));
    }
    file.resize(layout.total_len as usize, 0);
    Ok(file)
}

/// Reads a checkpoint; `None` where there is none that belongs to this run, or it is damaged: the run
/// then begins anew.
pub fn open(path: &Path, key: &Key, windows: &Windows) -> Option<Progress> {
    let gguf = Gguf::open(path, &Limits::default()).ok()?;
    let number = |name: &str| gguf.metadata.u64(&format!("checkpoint.{name}"));
    let float = |name: &str| gguf.metadata.get(&format!("checkpoint.{name}"))?.as_f64();
    let read = usize::try_from(number("windows")?).ok().filter(|n| *n <= windows.count())?;
    if gguf.metadata.str("checkpoint.key") != Some(&key.after(windows, read)) {
        return None;
    }
    let words = |name: &str, dtype: DType| -> Option<Vec<[u8; 8]>> {
        let tensor = gguf.store.get(name).filter(|t| t.dtype == dtype)?;
        Some(gguf.store.read_all(tensor).ok()?.as_chunks::<8>().0.to_vec())
    };
    let mut importance = Importance::default();
    for tensor in gguf.store.tensors() {
        let Some(name) = tensor.name.strip_suffix(".in_sum2") else { continue };
        let squares = words(&tensor.name, DType::F64)?;
        let counts = words(&format!("{name}.counts"), DType::I64)?;
        let squares: Vec<f64> = squares.into_iter().map(f64::from_le_bytes).collect();
        let counts = counts.into_iter().map(u64::from_le_bytes).collect();
        if squares.iter().any(|s| !s.is_finite()) {
            return None;
        }
        importance.sums.insert(name.to_string(), Sums { squares, counts });
    }
    let perplexity = (number("perplexity.count")?, float("perplexity.sum")?, float("perplexity.squares")?);
    Some(Progress { importance, windows: read, perplexity: Perplexity::from_parts(perplexity) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_only_where_it_belongs() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::write(&model, "x").unwrap();
        let windows = Windows { tokens: (0..64).collect(), n_ctx: 16, bos: Some(1) };
        let options = Options { threads: 1, process_output: false, perplexity: true };
        let begin = Importance::default();
        let key = Key::new(&model, &windows, options, &begin).unwrap();
        let mut progress = Progress { windows: 2, ..Progress::default() };
        let sums = Sums { squares: vec![0.1, 1e300, 3.0], counts: vec![7, 0, u64::MAX] };
        progress.importance.sums.insert("blk.0.x.weight".into(), sums);
        progress.perplexity.add(0.1);
        let path = path_for(&dir.path().join("out.gguf")).unwrap();
        let bytes = to_bytes(&progress, &key, &windows).unwrap();
        let found = |bytes: &[u8], windows: &Windows| {
            std::fs::write(&path, bytes).unwrap();
            open(&path, &key, windows)
        };
        let same = found(&bytes, &windows).unwrap();
        assert_eq!((same.windows, &same.importance), (2, &progress.importance));
        assert_eq!(same.perplexity.parts(), progress.perplexity.parts());
        let shorter = Windows { tokens: (0..16).collect(), ..windows.clone() };
        assert!(found(&bytes, &shorter).is_none(), "fewer windows than were read");
        let longer = Windows { tokens: (0..80).collect(), ..windows.clone() };
        assert!(found(&bytes, &longer).is_some());
        let other = Windows { tokens: (1..65).collect(), ..windows.clone() };
        assert!(found(&bytes, &other).is_none());
        // Eight bytes of padding end it.
        assert!(found(&bytes[..bytes.len() - 9], &windows).is_none());
        assert!(found(b"", &windows).is_none());
        let other = Key::new(&model, &windows, Options { process_output: true, ..options }, &begin).unwrap();
        assert!(found(&bytes, &windows).is_some() && open(&path, &other, &windows).is_none());
        std::fs::write(&model, "xy").unwrap();
        let other = Key::new(&model, &windows, options, &begin).unwrap();
        assert!(open(&path, &other, &windows).is_none());
    }
}
