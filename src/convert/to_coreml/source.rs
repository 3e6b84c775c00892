//! What a package is made of: a Hugging Face directory, a GGUF file, or a `.qpack` of either, in GGUF's names, with
//! queries and keys that are rotated by halves.

use std::path::{Path, PathBuf};

use crate::arch::{self, Mapped, Model};
use crate::container::Store;
use crate::container::gguf::is_gguf;
use crate::container::side::read_side_file;
use crate::convert::checkpoint::Checkpoint;
use crate::convert::to_hf::{GgufWish, pretty, recognise_gguf};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::tensor::DType;

/// Files of a checkpoint that belong beside a package.
pub const SIDE: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// A source that has been opened and recognised.
pub struct Opened {
    pub store: Store,
    pub model: Model,
    /// Its tensors by GGUF's names.
    pub mapped: Vec<Mapped>,
    /// The files that belong beside a package: names and bytes.
    pub side: Vec<(String, Vec<u8>)>,
    /// What it is called.
    pub name: String,
    /// Where what is made of it lies by default.
    pub beside: PathBuf,
    pub notes: Vec<String>,
}

/// How a source is taken.
pub struct Given<'a> {
    pub path: &'a Path,
    /// Its architecture, where the config's class is unknown.
    pub arch: Option<&'a str>,
    /// A definition outside the program.
    pub arch_file: Option<&'a Path>,
}

impl Given<'_> {
    /// Opens and recognises.
    ///
    /// # Errors
    /// What is no model; unknown architectures; tensors without a place.
    pub fn open(&self, limits: &Limits) -> Result<Opened> {
        if self.path.is_file() && is_gguf(self.path)? {
            return self.gguf(limits);
        }
        let checkpoint = Checkpoint::open(self.path, limits)?;
        let place = checkpoint.side.place();
        self.checkpoint(checkpoint, limits).map_err(place)
    }

    fn checkpoint(&self, checkpoint: Checkpoint, limits: &Limits) -> Result<Opened> {
        let at = |e: Error| e.at(checkpoint.dir.join("config.json"));
        let (config, tensors) = (&checkpoint.config, checkpoint.store.tensors());
        let model = match self.arch_file {
            Some(path) => arch::take_for(arch::read(path, limits)?, config),
            None => arch::recognise(config, tensors, self.arch),
        };
        let mut model = model.map_err(at)?;
        // Rows of the vocabulary that no token has stay: the head has as many as config.json says.
        model.facts_mut().n_tokens = model.var("vocab_size")?.as_u64();
        let mapped = model.map_as(tensors, arch::Layout::Halves).map_err(|e| e.at(&checkpoint.dir))?;
        let mut side = Vec::new();
        for name in SIDE {
            if let Some(bytes) = read_side_file(&checkpoint.dir.join(name), limits.side_file_bytes)? {
                side.push((name.to_string(), bytes));
            }
        }
        let mut notes = model.warnings()?;
        notes.extend(checkpoint.notes());
        let (name, beside) = (checkpoint.side.model_name(), checkpoint.side.beside().to_path_buf());
        Ok(Opened { store: checkpoint.store, model, mapped, side, name, beside, notes })
    }

    fn gguf(&self, limits: &Limits) -> Result<Opened> {
        if self.arch.is_some() {
            return Err(Error::misuse("--arch means nothing for a GGUF file, which says its own")
                .at(self.path)
                .hint("--arch-file takes the definition from a file"));
        }
        let wish = GgufWish {
            dtype: Some(DType::F16),
            keeps_types: false,
            quant_method: None,
            arch_file: self.arch_file,
        };
        let found = recognise_gguf(self.path, &wish, limits)?;
        let mut side = vec![("config.json".to_string(), pretty(&found.config()))];
        side.extend(found.side_files()?);
        let mapped = found.model.halves(found.store.tensors()).map_err(|e| e.at(self.path))?;
        let mut notes = found.model.warnings()?;
        let stem = || self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = found.name().filter(|name| !name.is_empty()).unwrap_or_else(stem);
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let beside = parent.unwrap_or(Path::new(".")).to_path_buf();
        notes.extend(found.vocab.notes);
        Ok(Opened { store: found.store, model: found.model, mapped, side, name, beside, notes })
    }
}
