//! What a decoder computes: see `decoder.rs` for how it follows from a definition's `[graph]` and a config.

/// What a decoder computes, beyond what its tensors show. Biases, norms of queries and keys, norms behind a sublayer,
/// attention sinks, a head of its own and fused projections are there when their tensors are.
///
/// Sizes are elements; lists have one entry per layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Kind of all norms of the stream.
    pub norm: Norm,
    /// What is added to the variance.
    pub eps: f32,
    /// What scores are multiplied by.
    pub scale: f32,
    /// How positions enter.
    pub positions: Positions,
    /// How many tokens a layer sees, its own included; `None`: all before it.
    pub windows: Vec<Option<u64>>,
    /// Activation of the feed-forward.
    pub activation: Activation,
    /// Shape of the feed-forward.
    pub ffn: Ffn,
    /// The name of the norm before attention.
    pub attn_norm: String,
    /// The name of the norm before the feed-forward.
    pub ffn_norm: String,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// What sublayers are multiplied by before they are added.
    pub residual: f32,
    /// What the residual stream is multiplied by throughout. Norms take it out again: it is for streams beyond what
    /// float16 holds.
    pub stream: f32,
    /// Whether attention and feed-forward read the same stream: the same norm of it, or each its own where both are
    /// there.
    pub parallel: bool,
    /// What logits are multiplied by, before their cap.
    pub logit_scale: f32,
    /// Cap of logits: `tanh(x / cap) * cap`.
    pub logit_softcap: Option<f32>,
    /// Cap of scores.
    pub score_softcap: Option<f32>,
}

/// A kind of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms,
    /// `(x - mean) / sqrt(variance + eps) * weight + bias`.
    Layer,
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// A row of `position_embd.weight` is added to the embedding.
    Learned,
    /// Queries and keys are rotated by halves.
    Rope {
        /// How many of a head's first elements are rotated.
        dim: usize,
        /// The distinct frequencies.
        tables: Vec<RopeSpec>,
        /// Index into `tables` for each layer.
        of_layer: Vec<usize>,
    },
    /// Not at all.
    None,
}

/// Frequencies of a rotation: see `rope_table.rs`, which makes them from a config.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Angle per position, one for each pair of elements.
    pub frequencies: Vec<f64>,
    /// What sine and cosine are multiplied by.
    pub attention_factor: f64,
}

/// An activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x / 2 * (1 + erf(x / sqrt 2))`.
    Gelu,
    /// The same by tanh.
    GeluTanh,
}

/// The shape of a feed-forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ffn {
    /// `down(act(gate(x)) * up(x))`.
    Gated,
    /// The same with gate above up in the one matrix `ffn_up`.
    Fused,
    /// `down(act(up(x)))`.
    Plain,
    /// Several gated ones (`ffn_gate_exps`, `ffn_up_exps`, `ffn_down_exps`, router `ffn_gate_inp`).
    Experts {
        /// How many there are.
        count: usize,
        /// How many a token goes through.
        used: usize,
        /// How they are chosen.
        router: Router,
        /// Whether the weights of the chosen are divided by their sum.
        norm: bool,
        /// gpt-oss's activation: `g = min(g, limit)`, `u = clamp(u)`, `(u + 1) * g * sigmoid(alpha * g)`.
        clamp: Option<Clamp>,
    },
}

/// How experts are chosen from the router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Router {
    /// Softmax of the chosen.
    TopkSoftmax,
    /// The chosen of the softmax.
    SoftmaxTopk,
    /// The chosen of the sigmoid.
    SigmoidTopk,
}

/// Limits of gpt-oss's activation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clamp {
    /// Largest magnitude.
    pub limit: f32,
    /// Slope inside the sigmoid.
    pub alpha: f32,
}
