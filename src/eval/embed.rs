//! Embeddings: what encoders, and models that end in a pooling, give for a text.

use crate::error::{Error, Result};
use crate::eval::logits::{self, Matrix};
use crate::ggml::{Context, ContextOptions, Logits, Model, Pooling};

/// A context that takes `n` tokens at once.
fn options(n: usize, threads: u32, exact: bool) -> Result<ContextOptions> {
    let n = u32::try_from(n.max(1)).map_err(|_| Error::limit("too many tokens for one context"))?;
    Ok(ContextOptions { n_ctx: n, n_batch: n, threads, exact, ..ContextOptions::default() })
}

fn none() -> Error {
    Error::unsupported("the model gives no embeddings")
}

/// The last hidden state of each token, after the final norm where there is one; of an
/// encoder-decoder, the encoder's. On the CPU, with F32 keys and values.
///
/// # Errors
/// As [`Context::embed`].
pub fn hidden_states(model: &Model, ids: &[i32], threads: u32) -> Result<Matrix> {
    let options = options(ids.len(), threads, true)?;
    let mut context = Context::for_embeddings(model, &options, Some(Pooling::None))?;
    context.embed(ids)?;
    let rows = context.embeddings().ok_or_else(none)?;
    Ok(Matrix { columns: model.n_embd(), values: rows.concat() })
}

/// The logits of an encoder-decoder for each of `answer`, the first of which is
/// [`Model::decoder_start`], after its encoder has read `ids`.
///
/// # Errors
/// As [`Context::encode`] and [`Context::decode`].
pub fn answer_logits(model: &Model, ids: &[i32], answer: &[i32], threads: u32) -> Result<Matrix> {
    let mut context = Context::new(model, &options(ids.len().max(answer.len()), threads, true)?)?;
    context.encode(ids)?;
    context.decode(answer, Logits::All)?;
    let rows: Option<Vec<&[f32]>> = (0..answer.len()).map(|i| context.logits(i)).collect();
    let rows = rows.ok_or_else(|| Error::unsupported("the model gives no logits"))?;
    Ok(Matrix { columns: model.n_tokens(), values: rows.concat() })
}

/// What a model is judged by.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Next-token logits.
    Logits(Matrix),
    /// Last hidden states, where it predicts no next token.
    HiddenStates(Matrix),
}

impl Output {
    /// The values.
    pub fn matrix(&self) -> &Matrix {
        let (Self::Logits(matrix) | Self::HiddenStates(matrix)) = self;
        matrix
    }

    /// What they are called.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Logits(_) => "logits",
            Self::HiddenStates(_) => "hidden states",
        }
    }
}

/// Logits where the model gives them, else hidden states: of an encoder-decoder the logits of the
/// first token of its answer.
///
/// # Errors
/// As [`hidden_states`] and [`logits::forward_with`].
pub fn output(model: &Model, ids: &[i32], threads: u32) -> Result<Output> {
    if let Some(start) = model.decoder_start() {
        return answer_logits(model, ids, &[start], threads).map(Output::Logits);
    }
    match model.is_decoder_only() {
        true => logits::forward_with(model, ids, threads).map(Output::Logits),
        false => hidden_states(model, ids, threads).map(Output::HiddenStates),
    }
}

/// The embedding of a text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Embedding {
    /// Tokens of the text, with those that the vocabulary puts around it.
    pub tokens: usize,
    /// The vector, of length 1; or a classifier's scores, as they are.
    pub values: Vec<f32>,
}

/// One vector for each text, with the pooling given or else the model's own. Returns the pooling
/// too.
///
/// # Errors
/// `Misuse` when the model states no pooling and none is given, or a text is longer than the
/// model takes; else as [`Context::embed`].
pub fn texts(
    model: &Model,
    texts: &[String],
    pooling: Option<Pooling>,
    threads: u32,
) -> Result<(Pooling, Vec<Embedding>)> {
    let ids: Vec<Vec<i32>> = texts.iter().map(|t| model.tokenize(t, true, false)).collect::<Result<_>>()?;
    let most = model.n_ctx_train() as usize;
    if let Some((n, text)) = ids.iter().zip(1..).find(|(ids, _)| most > 0 && ids.len() > most) {
        return Err(Error::misuse(format!("text {text} has {} tokens, the model takes {most}", n.len()))
            .hint("divide the text"));
    }
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    let mut context = Context::for_embeddings(model, &options(longest, threads, false)?, pooling)?;
    let pooling = context.pooling();
    if pooling == Pooling::None {
        return Err(Error::misuse("the file does not say how the vectors of its tokens become one")
            .hint("say it with --pooling mean, cls or last"));
    }
    let mut found = Vec::with_capacity(ids.len());
    for ids in &ids {
        context.embed(ids)?;
        let row = *context.embeddings().ok_or_else(none)?.first().ok_or_else(none)?;
        let length = match pooling {
            Pooling::Rank => 1.0,
            _ => row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt(),
        };
        if !length.is_finite() || row.iter().any(|v| !v.is_finite()) {
            return Err(Error::check("the embedding holds NaN or infinities"));
        }
        let scale = if length > 0.0 { 1.0 / length } else { 1.0 };
        let values = row.iter().map(|v| (f64::from(*v) * scale) as f32).collect();
        found.push(Embedding { tokens: ids.len(), values });
    }
    Ok((pooling, found))
}
