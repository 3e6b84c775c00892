//! Core ML packages as an engine: the executor computes, the tokenizer is that of the files beside.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::ThreadPool;

use super::engine::{Delimiters, Engine, Keep, Kind, Reader, ReaderOptions, Size};
use super::logits::is_sound;
use super::tokens::Tokens;
use crate::container::coreml::Package;
use crate::container::coreml::chunks::packages;
use crate::container::coreml::mil::{Binding, BlobFileValue, Operation, Stored, ValueType};
use crate::error::{Error, Result};
use crate::exec::{LanguageModel, Rounding, Session};
use crate::limits::Limits;

/// Most bytes of logits that are computed at once: the executor gives those of every token.
const LOGIT_BYTES: usize = 64 << 20;

/// A package, or a directory of them, with the tokenizer beside it.
#[derive(Debug)]
pub struct CoremlModel {
    path: PathBuf,
    model: LanguageModel,
    tokens: Tokens,
    rounding: Rounding,
    // The first operation whose result was beyond float16.
    overflow: OnceLock<String>,
}

impl CoremlModel {
    /// Opens the packages, and the tokenizer: in the directory that a single package lies in, or in that of
    /// the packages.
    ///
    /// # Errors
    /// As [`LanguageModel::open`] and [`Tokens::open`]; `Unsupported` where no tokenizer is found.
    pub fn open(path: &Path, rounding: Rounding, limits: &Limits) -> Result<Self> {
        let model = LanguageModel::open(path, limits)?;
        let beside = || {
            path.parent().map_or(path, |dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
        };
        let has_tokenizer =
            |dir: &&Path| ["tokenizer.json", "tokenizer.model"].iter().any(|f| dir.join(f).is_file());
        let dir = [path, beside()].into_iter().find(has_tokenizer).ok_or_else(|| {
            Error::unsupported("has no tokenizer.json beside it: text cannot be turned into tokens")
                .at(path)
                .hint("put tokenizer.json, tokenizer_config.json and generation_config.json of its model there; qconv hf-to-coreml does so")
        })?;
        let tokens = Tokens::open(dir, model.n_vocab(), limits)?;
        Ok(Self { path: path.to_path_buf(), model, tokens, rounding, overflow: OnceLock::new() })
    }
}

impl Engine for CoremlModel {
    fn description(&self) -> String {
        format!("a Core ML package for {} tokens of context", self.model.context())
    }

    fn kind(&self) -> Kind {
        Kind::Decoder
    }

    fn n_tokens(&self) -> usize {
        self.model.n_vocab()
    }

    fn n_ctx(&self) -> usize {
        self.model.context()
    }

    fn size(&self) -> Result<Size> {
        size(&self.path)
    }

    fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<i32>> {
        self.tokens.tokenize(text, add_special, parse_special)
    }

    fn piece(&self, id: i32) -> Result<Vec<u8>> {
        self.tokens.piece(id)
    }

    fn token_text(&self, id: i32) -> Option<String> {
        self.tokens.text(id)
    }

    fn delimiters(&self) -> Delimiters {
        self.tokens.delimiters()
    }

    fn is_end_of_generation(&self, id: i32) -> bool {
        self.tokens.is_end(id)
    }

    fn chat_template(&self) -> Option<String> {
        self.tokens.chat_template()
    }

    fn recommended(&self, key: &str) -> Option<String> {
        self.tokens.recommended(key)
    }

    fn remark(&self) -> Option<String> {
        let operation = self.overflow.get()?;
        Some(format!("{operation} was beyond what float16 holds, and infinite from there on"))
    }

    fn reader<'a>(&'a self, options: &ReaderOptions) -> Result<Box<dyn Reader + 'a>> {
        let n_ctx = options.n_ctx as usize;
        if n_ctx > self.n_ctx() {
            let most = self.n_ctx();
            return Err(Error::misuse(format!(
                "the package's context has {most} tokens, {n_ctx} are asked for"
            ))
            .at(&self.path)
            .hint("give a shorter one, with run -c or eval --ctx; or convert with a longer --context"));
        }
        let threads = usize::try_from(options.threads).unwrap_or(usize::MAX).max(1);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool =
            pool.map_err(|e| Error::unsupported(format!("{threads} threads cannot be started: {e}")))?;
        let most = (LOGIT_BYTES / 4 / self.n_tokens().max(1)).max(16);
        let n_batch = usize::try_from(options.n_batch).unwrap_or(usize::MAX).clamp(1, most);
        let session = Session::new(&self.model, n_ctx, self.rounding)?;
        Ok(Box::new(CoremlReader { model: self, session, pool, n_batch, rows: Vec::new(), kept: 0..0 }))
    }
}

/// A session with its last logits.
#[derive(Debug)]
struct CoremlReader<'a> {
    model: &'a CoremlModel,
    session: Session<'a>,
    pool: ThreadPool,
    n_batch: usize,
    // Logits of all tokens decoded last.
    rows: Vec<f32>,
    // Of these, whose were asked for.
    kept: Range<usize>,
}

impl Reader for CoremlReader<'_> {
    fn n_ctx(&self) -> usize {
        self.session.context()
    }

    fn n_batch(&self) -> usize {
        self.n_batch
    }

    fn step(&self) -> usize {
        self.model.model.step()
    }

    fn position(&self) -> usize {
        self.session.position()
    }

    fn decode(&mut self, ids: &[i32], keep: Keep) -> Result<()> {
        if ids.is_empty() || ids.len() > self.n_batch {
            let (n, most) = (ids.len(), self.n_batch);
            return Err(Error::misuse(format!("{n} tokens given to decode at once, 1 to {most} can be")));
        }
        self.kept = 0..0;
        let (session, pool) = (&mut self.session, &self.pool);
        match pool.install(|| session.decode(ids)) {
            Ok(rows) => self.rows = rows,
            Err(e) => {
                // What it had read may be lost.
                self.session = Session::new(&self.model.model, self.session.context(), self.model.rounding)?;
                return Err(e);
            }
        }
        if let Some(operation) = self.session.overflow() {
            self.model.overflow.get_or_init(|| operation.to_string());
            if !is_sound(&self.rows) {
                let message = format!("the logits are no numbers: {operation} was beyond what float16 holds");
                return Err(Error::check(message).hint("without --fp16 nothing is rounded to it"));
            }
        }
        self.kept = if keep == Keep::All { 0..ids.len() } else { ids.len() - 1..ids.len() };
        Ok(())
    }

    fn logits(&self, i: usize) -> Option<&[f32]> {
        if !self.kept.contains(&i) {
            return None;
        }
        let n = self.session.n_vocab();
        self.rows.get(i.checked_mul(n)?..)?.get(..n)
    }

    fn last_logits(&self) -> Option<&[f32]> {
        self.logits(self.kept.end.checked_sub(1)?)
    }

    fn truncate(&mut self, keep: usize) -> usize {
        self.kept = 0..0;
        self.session.truncate(keep);
        self.session.position()
    }
}

/// The weight files of one package or several, and how many weights their blobs are.
fn size(path: &Path) -> Result<Size> {
    let limits = Limits::default();
    let mut sum = Size::default();
    for path in packages(path, &limits)? {
        let package = Package::open(path, &limits)?;
        sum.bytes += package.weights().values().map(|file| file.file().len()).sum::<u64>();
        // Functions share blobs.
        let mut seen = HashSet::new();
        for function in package.model().program.functions.values() {
            let operations = function.block_specializations.get(&function.opset).map(|b| &b.operations);
            for operation in operations.into_iter().flatten() {
                let first = blobs(operation).min_by_key(|blob| blob.offset);
                if let (Some(blob), Some(result)) = (first, operation.outputs.first())
                    && seen.insert((blob.file_name.as_str(), blob.offset))
                    && let ValueType::Tensor(tensor) = &result.value_type
                {
                    sum.parameters = sum.parameters.saturating_add(tensor.elements()?);
                }
            }
        }
    }
    Ok(sum)
}

/// What an operation has of the weight files.
fn blobs(operation: &Operation) -> impl Iterator<Item = &BlobFileValue> {
    let bound =
        operation.inputs.values().flat_map(|argument| &argument.0).filter_map(|binding| match binding {
            Binding::Value(value) => Some(value),
            _ => None,
        });
    bound.chain(operation.attributes.get("val")).filter_map(|value| match &value.stored {
        Stored::Blob(blob) => Some(blob),
        _ => None,
    })
}
