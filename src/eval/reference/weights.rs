//! What candle reads its weights from.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;

use crate::error::{Error, Result};
use crate::eval::logits::Matrix;

/// The weights of a checkpoint under Hugging Face's names.
pub trait Weights: Send + Sync {
    /// The shape of a tensor; `None` where there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// All values of a tensor that is there, row-major.
    ///
    /// # Errors
    /// As reads fail.
    fn values(&self, name: &str) -> Result<Vec<f32>>;
}

/// Where the same tensor stands in checkpoints of other classes of the family: with a projector
/// around it, or without the head.
fn names(name: &str) -> impl Iterator<Item = String> {
    let inner = name.split_once('.').filter(|(first, _)| ["model", "transformer"].contains(first));
    let around = ["language_model.".to_string() + name];
    let inner = inner.map(|(_, rest)| [format!("model.language_model.{rest}"), rest.to_string()]);
    std::iter::once(name.to_string()).chain(around).chain(inner.into_iter().flatten())
}

const HEAD: &str = "lm_head.weight";

/// Weights as candle asks for them.
pub(super) struct Backend {
    weights: Arc<dyn Weights>,
    embedding: &'static str,
    n_tokens: usize,
    /// Further rows of the embedding.
    rows: Option<Matrix>,
}

impl Backend {
    pub fn new(weights: &Arc<dyn Weights>, embedding: &'static str) -> Result<Self> {
        let mut backend = Self { weights: weights.clone(), embedding, n_tokens: 0, rows: None };
        let shape = backend.find(embedding).map(|(_, shape)| shape);
        backend.n_tokens = shape.and_then(|s| s.first().copied()).ok_or_else(|| {
            Error::unsupported(format!("candle's model wants the tensor {embedding:?}, which is not there"))
        })?;
        Ok(backend)
    }

    /// Puts rows behind those of the vocabulary.
    pub fn with_rows(self, rows: Matrix) -> Self {
        Self { rows: Some(rows), ..self }
    }

    /// Tokens of the vocabulary.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Rows of the embedding.
    pub fn n_rows(&self) -> usize {
        self.n_tokens + self.rows.as_ref().map_or(0, Matrix::rows)
    }

    /// Whether the embedding is the output matrix too.
    pub fn is_tied(&self) -> bool {
        self.find(HEAD).is_none()
    }

    fn find(&self, name: &str) -> Option<(String, Vec<usize>)> {
        names(name).find_map(|name| self.weights.shape(&name).map(|shape| (name, shape)))
    }

    fn load(&self, name: &str) -> candle_core::Result<(Vec<usize>, Vec<f32>)> {
        // Models that always ask for it.
        let wanted = if name == HEAD && self.is_tied() { self.embedding } else { name };
        let (stored, mut shape) = self
            .find(wanted)
            .ok_or_else(|| candle_core::Error::Msg(format!("tensor {name:?} is not in the checkpoint")))?;
        let mut values = self.weights.values(&stored).map_err(candle_core::Error::wrap)?;
        if let (Some(rows), Some(n)) = (&self.rows, shape.first_mut()) {
            if name == self.embedding || name == HEAD {
                *n += rows.rows();
                values.extend_from_slice(&rows.values);
            } else if name.ends_with("wpe.weight") {
                // Rows in place of embeddings hold positions already.
                values.fill(0.0);
            }
        }
        Ok((shape, values))
    }
}

impl SimpleBackend for Backend {
    fn get(
        &self,
        wanted: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let (shape, values) = self.load(name)?;
        if shape != wanted.dims() {
            return Err(candle_core::Error::Msg(format!(
                "tensor {name:?} has shape {shape:?}, {:?} was expected",
                wanted.dims()
            )));
        }
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let (shape, values) = self.load(name)?;
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.find(name).is_some()
    }
}
