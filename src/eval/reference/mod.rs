//! A forward pass that shares nothing with the conversion: candle's models on a checkpoint's own
//! weights, in F32.
//!
//! candle's models answer with the logits of the last token and keep their layers to themselves.
//! So tokens are fed one by one, and what layer `k` gives is seen as the logits of a model that ends
//! there: the head (last norm and output matrix) applied to it. The hidden states of another engine
//! go through the same head ([`Reference::head`]), and can be compared without a word about layouts.
//!
//! One row in `families.rs` is one family.

mod config;
mod families;
mod gpt2;
mod weights;

pub use weights::Weights;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value as Json;

use self::config::Config;
use self::families::{FAMILIES, Family};
use self::weights::Backend;
use super::logits::Matrix;
use crate::error::{Error, Result};

/// Reads token ids of shape `[sequences, 1]`, which stand at a position of their sequences after all
/// that was read before, and gives logits, `[sequences, .., vocabulary]`.
type Step = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

/// A model of a family that candle has.
pub struct Reference {
    family: &'static Family,
    config: Config,
}

impl Reference {
    /// Finds the family of a config.json.
    ///
    /// # Errors
    /// `Unsupported` with the reason where candle has no such family, or leaves out what this model
    /// needs; `Malformed` for a config that contradicts itself.
    pub fn new(config: &Json) -> Result<Self> {
        let config = Config::read(config);
        let model_type = config.text("model_type").unwrap_or_default();
        let family = FAMILIES.iter().find(|f| f.model_type == model_type);
        let family = family
            .ok_or_else(|| Error::unsupported(format!("no model of candle's is known for {model_type:?}")))?;
        let config = (family.prepare)(config)?;
        Ok(Self { family, config })
    }

    /// `model_type` of the family.
    pub fn name(&self) -> &'static str {
        self.family.model_type
    }

    /// Layers of the model.
    pub fn n_layers(&self) -> usize {
        self.config.count("num_hidden_layers").unwrap_or(0)
    }

    /// Most tokens for which candle's model computes what the family is defined to compute: some leave
    /// out the sliding window.
    pub fn most_tokens(&self) -> usize {
        let window = self.config.count("sliding_window").ok().filter(|_| !self.family.has_window);
        window.unwrap_or(usize::MAX).min(self.config.positions())
    }

    /// The logits after each of `ids` of the model that ends after `n_layers` layers.
    ///
    /// # Errors
    /// `Unsupported` with candle's reason when it fails, `Interrupted`.
    pub fn logits(
        &self,
        weights: &Arc<dyn Weights>,
        ids: &[i32],
        n_layers: usize,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Matrix> {
        guarded(|| {
            let mut step = self.load(Backend::new(weights, self.family.embedding)?, n_layers, ids.len())?;
            let mut logits = Matrix { columns: 0, values: Vec::new() };
            for (position, &id) in ids.iter().enumerate() {
                if interrupted() {
                    return Err(Error::interrupted());
                }
                let id = u32::try_from(id).map_err(|_| Error::misuse("negative token id"))?;
                let row = Tensor::new(&[[id]], &Device::Cpu).and_then(|id| step(&id, position));
                let row = row.and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(failed)?;
                logits.columns = row.len();
                logits.values.extend(row);
            }
            Ok(logits)
        })
    }

    /// The head (last norm, output matrix) applied to hidden states, one row per token.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn head(&self, weights: &Arc<dyn Weights>, hidden: &Matrix) -> Result<Matrix> {
        guarded(|| {
            // They stand in the embedding, after the vocabulary.
            let rows = hidden.rows();
            let scale = (self.family.embedding_scale)(&self.config);
            let hidden =
                Matrix { columns: hidden.columns, values: hidden.values.iter().map(|v| v / scale).collect() };
            let backend = Backend::new(weights, self.family.embedding)?.with_rows(hidden);
            let n_tokens = backend.n_tokens();
            let mut step = self.load(backend, 0, 1)?;
            let first = u32::try_from(n_tokens).map_err(|_| Error::limit("too large a vocabulary"))?;
            let ids = Tensor::arange(first, first + rows as u32, &Device::Cpu).and_then(|t| t.unsqueeze(1));
            let logits =
                ids.and_then(|ids| step(&ids, 0)?.flatten_all()?.to_vec1::<f32>()).map_err(failed)?;
            let columns = logits.len().checked_div(rows).unwrap_or(0).max(1);
            let values = logits.chunks_exact(columns).flat_map(|row| &row[..n_tokens.min(columns)]);
            Ok(Matrix { columns: n_tokens, values: values.copied().collect() })
        })
    }

    fn load(&self, backend: Backend, n_layers: usize, positions: usize) -> Result<Step> {
        let config = self
            .config
            .with("num_hidden_layers", n_layers)
            .with("vocab_size", backend.n_rows())
            .with("tie_word_embeddings", backend.is_tied())
            .with("max_position_embeddings", positions.max(1));
        let builder = VarBuilder::from_backend(Box::new(backend), DType::F32, Device::Cpu);
        (self.family.load)(&config, builder)
    }
}

fn failed(e: candle_core::Error) -> Error {
    Error::unsupported(format!("candle: {e}"))
}

/// candle trusts its configs; what stops it is not to stop the program.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::unsupported("candle gave up on this model")))
}
