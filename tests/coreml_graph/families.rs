//! Models that are nothing but sizes: the eight families.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use qconv::arch::{Activation, Clamp, Decoder, Ffn, Norm, Positions, RopeSpec, Router};
use qconv::container::coreml::DataType;
use qconv::container::coreml::blob::{Wanted, layout};
use qconv::mil::{Encoded, Form, Place, Stored, Weights, identifier};

pub const CONTEXT: u64 = 48;

/// Weights of a model that is nothing but names and shapes: float16, one behind the other in a file.
#[derive(Default)]
pub struct Shapes {
    pub shapes: BTreeMap<String, Vec<u64>>,
    pub forms: BTreeMap<String, Compressed>,
    /// By name, from the first question on.
    encoded: OnceLock<BTreeMap<String, Encoded>>,
}

#[derive(Clone, Copy)]
pub enum Compressed {
    Int4,
    Lut4,
    Ternary,
    Sparse,
}

impl Shapes {
    pub fn add(&mut self, name: &str, shape: &[u64]) -> &mut Self {
        self.shapes.insert(name.into(), shape.to_vec());
        self
    }

    /// What is stored of a tensor: type and shape of each blob.
    fn stored(&self, name: &str) -> Vec<(DataType, Vec<u64>)> {
        let shape = &self.shapes[name];
        let half = |shape: &[u64]| (DataType::Float16, shape.to_vec());
        let Some(form) = self.forms.get(name) else { return vec![half(shape)] };
        let [outer @ .., rows, columns] = &shape[..] else { panic!("{name} {shape:?}") };
        let scale = [outer, &[*rows, columns / 32]].concat();
        let table = |rows: u64, entries: u64| [outer, &[rows, 1, entries, 1]].concat();
        match form {
            Compressed::Int4 => vec![(DataType::Int4, shape.clone()), half(&scale)],
            Compressed::Lut4 => vec![(DataType::UInt4, shape.clone()), half(&table(rows / 8, 16))],
            Compressed::Ternary => {
                let whole = [vec![1; shape.len()], vec![4, 1]].concat();
                vec![(DataType::UInt2, shape.clone()), half(&whole), half(&[outer, &[*rows]].concat())]
            }
            Compressed::Sparse => {
                let nonzero = shape.iter().product::<u64>() / 2;
                let indices = (DataType::UInt1, vec![nonzero]);
                vec![(DataType::UInt1, shape.clone()), indices, half(&table(*rows, 2))]
            }
        }
    }

    /// All that is stored, in order; short values stand in the program.
    fn all(&self) -> impl Iterator<Item = (&str, DataType, Vec<u64>, bool)> {
        self.shapes.keys().flat_map(|name| {
            self.stored(name).into_iter().map(move |(dtype, shape)| {
                let is_short = dtype == DataType::Float16 && shape.iter().product::<u64>() < 10;
                (name.as_str(), dtype, shape, is_short)
            })
        })
    }

    /// Whose each blob of the file is.
    pub fn owners(&self) -> Vec<&str> {
        self.all().filter(|(.., is_short)| !is_short).map(|(name, ..)| name).collect()
    }

    pub fn wanted(&self) -> Vec<Wanted> {
        let in_file = self.all().filter(|(.., is_short)| !is_short);
        let wanted = |(_, data_type, shape, _): (_, _, Vec<u64>, _)| Wanted {
            data_type,
            elements: shape.iter().product(),
            sum: None,
        };
        in_file.map(wanted).collect()
    }
}

impl Weights for Shapes {
    fn get(&self, name: &str) -> Option<Encoded> {
        self.encoded.get_or_init(|| self.encode()).get(name).cloned()
    }
}

impl Shapes {
    fn encode(&self) -> BTreeMap<String, Encoded> {
        let (_, blobs) = layout("weight.bin", &self.wanted()).unwrap();
        let mut blobs = blobs.iter();
        let mut stored = self.all().map(|(_, dtype, shape, is_short)| {
            let place = match is_short {
                true => Place::Immediate(vec![0x3c; shape.iter().product::<u64>() as usize * 2]),
                false => Place::File(blobs.next().unwrap().record),
            };
            Stored { dtype, shape, place }
        });
        let mut next = || stored.next().unwrap();
        let mut encode = |(name, shape): (&String, &Vec<u64>)| {
            let (form, after) = match self.forms.get(name) {
                None => (Form::Plain(next()), None),
                Some(Compressed::Int4) => {
                    (Form::Blockwise { data: next(), scale: next(), offset: None }, None)
                }
                Some(Compressed::Lut4) => (Form::Lut { indices: next(), lut: next() }, None),
                Some(Compressed::Ternary) => (Form::Lut { indices: next(), lut: next() }, Some(next())),
                Some(Compressed::Sparse) => {
                    (Form::SparseLut { mask: next(), indices: next(), lut: next() }, None)
                }
            };
            (name.clone(), Encoded { name: identifier(name), shape: shape.clone(), form, after })
        };
        self.shapes.iter().map(&mut encode).collect()
    }
}

/// A model of the sizes below, and its weights.
pub struct Family {
    /// What the noise of the norms behind sublayers is multiplied by.
    pub loud: f32,
    pub name: &'static str,
    pub decoder: Decoder,
    pub weights: Shapes,
}

pub const WIDTH: u64 = 64;
pub const HEADS: u64 = 4;
pub const KV_HEADS: u64 = 2;
pub const HEAD_DIM: u64 = 32;
pub const FFN: u64 = 96;
pub const VOCAB: u64 = 256;
pub const EXPERTS: u64 = 3;

/// Llama: what the others differ from.
pub fn llama(layers: usize) -> Family {
    let tables = vec![RopeSpec { frequencies: vec![1.0; HEAD_DIM as usize / 2], attention_factor: 1.0 }];
    let decoder = Decoder {
        layers,
        width: WIDTH as usize,
        heads: HEADS as usize,
        kv_heads: KV_HEADS as usize,
        head_dim: HEAD_DIM as usize,
        norm: Norm::Rms,
        eps: 1e-5,
        scale: (HEAD_DIM as f32).sqrt().recip(),
        positions: Positions::Rope { dim: HEAD_DIM as usize, tables, of_layer: vec![0; layers] },
        windows: vec![None; layers],
        activation: Activation::Silu,
        ffn: Ffn::Gated,
        ffn_norm: "ffn_norm".into(),
        embedding_scale: 1.0,
        residual: 1.0,
        stream: 1.0,
        parallel: false,
        logit_scale: 1.0,
        attn_norm: "attn_norm".into(),
        logit_softcap: None,
        score_softcap: None,
    };
    let mut weights = Shapes::default();
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    weights
        .add("token_embd.weight", &[VOCAB, WIDTH])
        .add("output.weight", &[VOCAB, WIDTH])
        .add("output_norm.weight", &[WIDTH])
        .add("rope_cos.0", &[CONTEXT, HEAD_DIM])
        .add("rope_sin.0", &[CONTEXT, HEAD_DIM]);
    for i in 0..layers {
        let mut add = |name: &str, shape: &[u64]| {
            weights.add(&format!("blk.{i}.{name}"), shape);
        };
        add("attn_norm.weight", &[WIDTH]);
        add("attn_q.weight", &[queries, WIDTH]);
        add("attn_k.weight", &[keys, WIDTH]);
        add("attn_v.weight", &[keys, WIDTH]);
        add("attn_output.weight", &[WIDTH, queries]);
        add("ffn_norm.weight", &[WIDTH]);
        add("ffn_gate.weight", &[FFN, WIDTH]);
        add("ffn_up.weight", &[FFN, WIDTH]);
        add("ffn_down.weight", &[WIDTH, FFN]);
    }
    Family { loud: 8.0, name: "llama", decoder, weights }
}

/// The others: llama with other names, and more or fewer tensors, in each layer.
pub fn family(
    name: &'static str,
    layers: usize,
    change: impl FnOnce(&mut Decoder),
    removed: &[&str],
    added: &[(&str, &[u64])],
) -> Family {
    let mut family = llama(layers);
    family.name = name;
    change(&mut family.decoder);
    for i in 0..layers {
        let prefix = format!("blk.{i}.");
        let drop = |tensor: &str| removed.iter().any(|r| *r == tensor.trim_start_matches(&prefix));
        family.weights.shapes.retain(|tensor, _| !drop(tensor));
        for (tensor, shape) in added {
            let prefix = if tensor.starts_with('.') { &prefix } else { "" };
            family.weights.add(&format!("{prefix}{}", tensor.trim_start_matches('.')), shape);
        }
    }
    family
}

pub fn families(layers: usize) -> Vec<Family> {
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let no_ffn = ["ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"];
    let second_table = |d: &mut Decoder| {
        if let Positions::Rope { tables, of_layer, .. } = &mut d.positions {
            tables.push(tables[0].clone());
            of_layer.iter_mut().skip(1).for_each(|table| *table = 1);
        }
    };
    vec![
        llama(layers),
        family("mistral", layers, |d| d.windows.fill(Some(16)), &[], &[]),
        family(
            "qwen2",
            layers,
            |_| {},
            &["output.weight"],
            &[(".attn_q.bias", &[queries]), (".attn_k.bias", &[keys]), (".attn_v.bias", &[keys])],
        ),
        family(
            "qwen3",
            layers,
            |_| {},
            &[],
            &[(".attn_q_norm.weight", &[HEAD_DIM]), (".attn_k_norm.weight", &[HEAD_DIM])],
        ),
        family(
            "gemma3",
            layers,
            |d| {
                second_table(d);
                d.windows[0] = Some(16);
                d.activation = Activation::GeluTanh;
                d.embedding_scale = 16.0;
                d.stream = 0.125;
                d.scale = 0.25;
                d.logit_softcap = Some(30.0);
            },
            &["output.weight"],
            &[
                (".attn_q_norm.weight", &[HEAD_DIM]),
                (".attn_k_norm.weight", &[HEAD_DIM]),
                (".post_attention_norm.weight", &[WIDTH]),
                (".post_ffw_norm.weight", &[WIDTH]),
                ("rope_cos.1", &[CONTEXT, HEAD_DIM]),
                ("rope_sin.1", &[CONTEXT, HEAD_DIM]),
            ],
        ),
        family(
            "phi3",
            layers,
            |d| {
                d.ffn = Ffn::Fused;
                d.windows.fill(Some(CONTEXT)); // as many as there can be: no window
                if let Positions::Rope { dim, .. } = &mut d.positions {
                    *dim = 16;
                }
            },
            &["attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"],
            &[
                (".attn_qkv.weight", &[queries + 2 * keys, WIDTH]),
                (".ffn_up.weight", &[2 * FFN, WIDTH]),
                ("rope_cos.0", &[CONTEXT, 16]),
                ("rope_sin.0", &[CONTEXT, 16]),
            ],
        ),
        family(
            "gpt2",
            layers,
            |d| {
                d.kv_heads = d.heads;
                d.norm = Norm::Layer;
                d.positions = Positions::Learned;
                d.activation = Activation::GeluTanh;
                d.ffn = Ffn::Plain;
            },
            &[
                "attn_q.weight",
                "attn_k.weight",
                "attn_v.weight",
                "ffn_gate.weight",
                "output.weight",
                "rope_cos.0",
                "rope_sin.0",
            ],
            &[
                ("position_embd.weight", &[CONTEXT, WIDTH]),
                ("output_norm.bias", &[WIDTH]),
                (".attn_norm.bias", &[WIDTH]),
                (".attn_qkv.weight", &[3 * queries, WIDTH]),
                (".attn_qkv.bias", &[3 * queries]),
                (".attn_output.bias", &[WIDTH]),
                (".ffn_norm.bias", &[WIDTH]),
                (".ffn_up.bias", &[FFN]),
                (".ffn_down.bias", &[WIDTH]),
            ],
        ),
        family(
            "gpt-oss",
            layers,
            |d| {
                d.windows[0] = Some(16);
                d.ffn_norm = "post_attention_norm".into();
                d.ffn = Ffn::Experts {
                    count: EXPERTS as usize,
                    used: 2,
                    router: Router::TopkSoftmax,
                    norm: false,
                    clamp: Some(Clamp { limit: 7.0, alpha: 1.702 }),
                };
            },
            &[&no_ffn[..], &["ffn_norm.weight"]].concat(),
            &[
                (".attn_q.bias", &[queries]),
                (".attn_k.bias", &[keys]),
                (".attn_v.bias", &[keys]),
                (".attn_output.bias", &[WIDTH]),
                (".attn_sinks.weight", &[HEADS]),
                (".post_attention_norm.weight", &[WIDTH]),
                (".ffn_gate_inp.weight", &[EXPERTS, WIDTH]),
                (".ffn_gate_inp.bias", &[EXPERTS]),
                (".ffn_gate_exps.weight", &[EXPERTS, FFN, WIDTH]),
                (".ffn_gate_exps.bias", &[EXPERTS, FFN]),
                (".ffn_up_exps.weight", &[EXPERTS, FFN, WIDTH]),
                (".ffn_up_exps.bias", &[EXPERTS, FFN]),
                (".ffn_down_exps.weight", &[EXPERTS, WIDTH, FFN]),
                (".ffn_down_exps.bias", &[EXPERTS, WIDTH]),
            ],
        ),
    ]
}
