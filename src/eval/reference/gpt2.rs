//! GPT-2, which candle lacks: written on its operations, one token at a time, from the definition in
//! "Language Models are Unsupervised Multitask Learners" and the names of transformers' checkpoints.

use candle_core::{D, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{Embedding, LayerNorm, Module, VarBuilder, embedding, layer_norm};

/// Sizes of a model.
#[derive(serde::Deserialize)]
pub(super) struct Sizes {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub layer_norm_epsilon: f64,
}

/// `x W + b`: checkpoints of GPT-2 hold the matrix with a row for each input.
struct Conv1d {
    weight: Tensor,
    bias: Tensor,
}

impl Conv1d {
    fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get((inputs, outputs), "weight")?, bias: vb.get(outputs, "bias")? })
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weight)?.broadcast_add(&self.bias)
    }
}

struct Layer {
    ln_1: LayerNorm,
    c_attn: Conv1d,
    attn_proj: Conv1d,
    ln_2: LayerNorm,
    c_fc: Conv1d,
    mlp_proj: Conv1d,
    /// Keys and values so far, each `[sequences, heads, positions, head]`.
    seen: Option<(Tensor, Tensor)>,
}

impl Layer {
    fn new(sizes: &Sizes, vb: VarBuilder) -> Result<Self> {
        let (n, eps) = (sizes.hidden_size, sizes.layer_norm_epsilon);
        Ok(Self {
            ln_1: layer_norm(n, eps, vb.pp("ln_1"))?,
            c_attn: Conv1d::new(n, 3 * n, vb.pp("attn.c_attn"))?,
            attn_proj: Conv1d::new(n, n, vb.pp("attn.c_proj"))?,
            ln_2: layer_norm(n, eps, vb.pp("ln_2"))?,
            c_fc: Conv1d::new(n, sizes.intermediate_size, vb.pp("mlp.c_fc"))?,
            mlp_proj: Conv1d::new(sizes.intermediate_size, n, vb.pp("mlp.c_proj"))?,
            seen: None,
        })
    }

    fn forward(&mut self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (sequences, n) = x.dims2()?;
        let qkv = self.c_attn.forward(&self.ln_1.forward(x)?)?;
        let part = |k: usize| qkv.narrow(1, k * n, n)?.reshape((sequences, heads, 1, n / heads));
        let (q, mut k, mut v) = (part(0)?, part(1)?, part(2)?);
        if let Some((before_k, before_v)) = &self.seen {
            k = Tensor::cat(&[before_k, &k], 2)?;
            v = Tensor::cat(&[before_v, &v], 2)?;
        }
        let scores = (q.matmul(&k.transpose(2, 3)?)? / ((n / heads) as f64).sqrt())?;
        let attended = softmax_last_dim(&scores)?.matmul(&v)?.reshape((sequences, n))?;
        self.seen = Some((k, v));
        let x = (x + self.attn_proj.forward(&attended)?)?;
        // Tensor::gelu is the formula with tanh.
        let inner = self.c_fc.forward(&self.ln_2.forward(&x)?)?.gelu()?;
        &x + self.mlp_proj.forward(&inner)?
    }
}

/// The model, and what it has read.
pub(super) struct Gpt2 {
    wte: Embedding,
    wpe: Embedding,
    layers: Vec<Layer>,
    ln_f: LayerNorm,
    heads: usize,
}

impl Gpt2 {
    pub fn new(sizes: &Sizes, vb: VarBuilder) -> Result<Self> {
        let (vb, n) = (vb.pp("transformer"), sizes.hidden_size);
        let layer = |i: usize| Layer::new(sizes, vb.pp(format!("h.{i}")));
        Ok(Self {
            wte: embedding(sizes.vocab_size, n, vb.pp("wte"))?,
            wpe: embedding(sizes.n_positions, n, vb.pp("wpe"))?,
            layers: (0..sizes.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            ln_f: layer_norm(n, sizes.layer_norm_epsilon, vb.pp("ln_f"))?,
            heads: sizes.num_attention_heads,
        })
    }

    /// Logits after one more token of each sequence; the output matrix is the embedding.
    pub fn forward(&mut self, ids: &Tensor, position: usize) -> Result<Tensor> {
        let ids = ids.squeeze(D::Minus1)?;
        let position = Tensor::new(&[position as u32], ids.device())?;
        let mut x = self.wte.forward(&ids)?.broadcast_add(&self.wpe.forward(&position)?)?;
        for layer in &mut self.layers {
            x = layer.forward(&x, self.heads)?;
        }
        self.ln_f.forward(&x)?.matmul(&self.wte.embeddings().t()?)
    }
}
