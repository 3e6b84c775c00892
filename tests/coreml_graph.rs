//! The graphs of decoders: what stands in a function of one layer, in both layouts, for each family.
//!
//! `QCONV_UPDATE=1` writes `tests/goldens/coreml` anew; `QCONV_PACKAGES=DIR` keeps packages with random weights, for
//! coremltools to look at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use qconv::arch::{Activation, Clamp, Decoder, Ffn, Norm, Positions, RopeSpec, Router};
use qconv::container::coreml::blob::{Wanted, layout};
use qconv::container::coreml::mil::{Binding, Program};
use qconv::container::coreml::model::{
    ArrayDataType, FeatureDescription, Flexibility, FunctionDescription, ModelDescription, SizeRange,
};
use qconv::container::coreml::package::{WEIGHTS, small_files};
use qconv::container::coreml::{DataType, Model, Only, Package};
use qconv::error::ErrorKind;
use qconv::limits::Limits;
use qconv::mil::{
    Built, Encoded, Form, Layout, Part, Place, Stored, Target, TensorType, Text, Weights, check, decoder,
    identifier,
};

const CONTEXT: u64 = 48;
const ROWS: Target = Target { layout: Layout::Rows, context: CONTEXT, vocab_split: 1 };
const CHANNELS: Target = Target { layout: Layout::Channels { tokens: 8 }, context: CONTEXT, vocab_split: 1 };

/// Weights of a model that is nothing but names and shapes: float16, one behind the other in a file.
#[derive(Default)]
struct Shapes {
    shapes: BTreeMap<String, Vec<u64>>,
    forms: BTreeMap<String, Compressed>,
}

#[derive(Clone, Copy)]
enum Compressed {
    Int4,
    Lut4,
    Ternary,
    Sparse,
}

impl Shapes {
    fn add(&mut self, name: &str, shape: &[u64]) -> &mut Self {
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

    fn wanted(&self) -> Vec<Wanted> {
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
        let shape = self.shapes.get(name)?.clone();
        let (_, blobs) = layout("weight.bin", &self.wanted()).unwrap();
        let mut blobs = blobs.iter();
        let placed = self.all().map(|(of, dtype, shape, is_short)| {
            let place = match is_short {
                true => Place::Immediate(vec![0x3c; shape.iter().product::<u64>() as usize * 2]),
                false => Place::File(blobs.next().unwrap().record),
            };
            (of, Stored { dtype, shape, place })
        });
        let mut stored = placed.filter(|(of, _)| *of == name).map(|(_, stored)| stored);
        let mut next = || stored.next().unwrap();
        let (form, after) = match self.forms.get(name) {
            None => (Form::Plain(next()), None),
            Some(Compressed::Int4) => (Form::Blockwise { data: next(), scale: next(), offset: None }, None),
            Some(Compressed::Lut4) => (Form::Lut { indices: next(), lut: next() }, None),
            Some(Compressed::Ternary) => (Form::Lut { indices: next(), lut: next() }, Some(next())),
            Some(Compressed::Sparse) => {
                (Form::SparseLut { mask: next(), indices: next(), lut: next() }, None)
            }
        };
        Some(Encoded { name: identifier(name), shape, form, after })
    }
}

/// A model of the sizes below, and its weights.
struct Family {
    name: &'static str,
    decoder: Decoder,
    weights: Shapes,
}

const WIDTH: u64 = 64;
const HEADS: u64 = 4;
const KV_HEADS: u64 = 2;
const HEAD_DIM: u64 = 32;
const FFN: u64 = 96;
const VOCAB: u64 = 256;
const EXPERTS: u64 = 3;

/// Llama: what the others differ from.
fn llama(layers: usize) -> Family {
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
    Family { name: "llama", decoder, weights }
}

/// The others: llama with other names, and more or fewer tensors, in each layer.
fn family(
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

fn families(layers: usize) -> Vec<Family> {
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
                d.embedding_scale = 8.0;
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

fn build(family: &Family, target: &Target, part: Part) -> Built {
    let built = decoder(&family.decoder, &family.weights, target, part.clone());
    let built = built.unwrap_or_else(|e| panic!("{} {target:?} {part:?}: {e}", family.name));
    check(&built.function).unwrap_or_else(|e| panic!("{} {target:?} {part:?}: {e}", family.name));
    built
}

fn names<'a>(names: impl IntoIterator<Item = &'a String>) -> BTreeSet<&'a str> {
    names.into_iter().map(String::as_str).collect()
}

/// Every weight is used, in both layouts; what a function says is what stands in the golden file.
#[test]
fn families_of_one_layer() {
    for family in families(1) {
        for (layout, target) in [("rows", &ROWS), ("channels", &CHANNELS)] {
            let built = build(&family, target, Part::Whole);
            // Of gemma3's two rotations one layer uses one.
            let mut wanted = names(family.weights.shapes.keys());
            wanted.retain(|name| !["rope_cos.1", "rope_sin.1"].contains(name));
            assert_eq!(names(&built.used), wanted, "{} {layout}", family.name);
            let text = Text(&built.function).to_string();
            let path = format!("tests/goldens/coreml/{}.{layout}.txt", family.name);
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
            if std::env::var_os("QCONV_UPDATE").is_some() {
                fs::write(&path, &text).unwrap();
            }
            let golden = fs::read_to_string(&path).unwrap_or_default();
            let differs = golden.lines().zip(text.lines()).find(|(a, b)| a != b);
            assert!(golden == text, "{}: {differs:?}; QCONV_UPDATE=1 writes it anew", path.display());
            save(&family, layout, &[("main", &built)]);
        }
    }
}

/// What each operation reads and gives, in order: kind, names by parameter, names of results.
fn operations(built: &Built) -> Vec<(&str, BTreeMap<&str, Vec<&str>>, Vec<&str>)> {
    let block = &built.function.block_specializations[&built.function.opset];
    block
        .operations
        .iter()
        .map(|operation| {
            let inputs = operation.inputs.iter().map(|(parameter, argument)| {
                let names = argument.0.iter().filter_map(|binding| match binding {
                    Binding::Name(name) => Some(name.as_str()),
                    _ => None,
                });
                (parameter.as_str(), names.collect())
            });
            let outputs = operation.outputs.iter().map(|o| o.name.as_str());
            (operation.kind.as_str(), inputs.collect(), outputs.collect())
        })
        .collect()
}

/// Whatever is written into a state is the state as it was read last, with something put into it.
#[test]
fn no_stale_state_is_written() {
    for family in families(3) {
        for target in [&ROWS, &CHANNELS] {
            let built = build(&family, target, Part::Whole);
            let mut latest: BTreeMap<&str, &str> = BTreeMap::new();
            let (mut updated, mut writes) = (BTreeMap::new(), 0);
            for (kind, inputs, outputs) in operations(&built) {
                match kind {
                    "read_state" => drop(latest.insert(inputs["input"][0], outputs[0])),
                    "slice_update" => drop(updated.insert(outputs[0], inputs["x"][0])),
                    "write_state" => {
                        let (state, data) = (inputs["input"][0], inputs["data"][0]);
                        assert_eq!(updated[data], latest[state], "{}", family.name);
                        latest.remove(state);
                        writes += 1;
                    }
                    _ => {}
                }
            }
            assert_eq!(writes, 6, "{}", family.name);
        }
    }
}

/// The parts of a model use what the whole uses, each layer one row of its own cache, and fit each other.
#[test]
fn parts() {
    for family in families(3) {
        for target in [&ROWS, &CHANNELS] {
            let whole = build(&family, target, Part::Whole);
            let parts = [Part::Embedding, Part::Layers(0..1), Part::Layers(1..3), Part::Head];
            let parts = parts.map(|part| build(&family, target, part));
            let used: BTreeSet<&str> = parts.iter().flat_map(|part| names(&part.used)).collect();
            assert_eq!(used, names(&whole.used), "{}", family.name);
            let hidden = |part: &Built| (part.inputs[0].clone(), part.outputs[0].clone());
            let [(ids, embedded), (first_in, first), (second_in, second), (head_in, logits)] =
                parts.each_ref().map(hidden);
            assert_eq!((&ids, &logits.name), (&whole.inputs[0], &whole.outputs[0].name));
            for (given, taken) in [(embedded, first_in), (first, second_in), (second, head_in)] {
                assert_eq!(taken.name, "hidden_states");
                assert_eq!(given.ty.declared(), taken.ty.declared(), "{}", family.name);
            }
            let rows = |part: &Built| part.states.iter().map(|s| s.ty.dims[0].known().unwrap()).sum::<u64>();
            assert_eq!(parts.each_ref().map(rows), [0, 2, 4, 0], "keys and values of each layer");
            assert_eq!(rows(&whole), 6);
            let layout = if target == &ROWS { "rows" } else { "channels" };
            save(&family, &format!("three-{layout}"), &[("main", &whole)]);
        }
    }
}

/// A vocabulary in two parts, and a function of one token beside that of eight.
#[test]
fn functions_with_a_divided_vocabulary() {
    for mut family in families(2) {
        family.weights.shapes.remove("output.weight");
        family.weights.add("output.0.weight", &[160, WIDTH]).add("output.1.weight", &[96, WIDTH]);
        let prefill = Target { vocab_split: 2, ..CHANNELS };
        let infer = Target { layout: Layout::Channels { tokens: 1 }, ..prefill.clone() };
        let built = [infer, prefill].map(|target| build(&family, &target, Part::Whole));
        let outputs: Vec<String> = built[1].outputs.iter().map(|o| format!("{}:{}", o.name, o.ty)).collect();
        assert_eq!(outputs, ["logits1:fp16[1,8,160]", "logits2:fp16[1,8,96]"]);
        assert_eq!(built[0].states, built[1].states);
        assert_eq!(built[0].used, built[1].used);
        save(&family, "functions", &[("infer", &built[0]), ("prefill", &built[1])]);
    }
}

/// Weights in every encoding, as matrices and as kernels.
#[test]
fn compressed_weights() {
    use Compressed::{Int4, Lut4, Sparse, Ternary};
    for (target, layout) in [(&ROWS, "rows"), (&CHANNELS, "channels")] {
        for (i, forms) in
            [[Int4, Lut4, Ternary, Sparse], [Ternary, Sparse, Int4, Lut4]].into_iter().enumerate()
        {
            let mut family = families(1).remove(if i == 0 { 2 } else { 7 });
            let matrices: Vec<String> = family.weights.shapes.keys().cloned().collect();
            let matrices = matrices.into_iter().filter(|name| {
                let no_matrix =
                    ["norm", "bias", "rope", "sinks", "inp"].iter().any(|word| name.contains(word));
                !no_matrix
            });
            for (name, form) in matrices.zip(forms.into_iter().cycle()) {
                family.weights.forms.insert(name, form);
            }
            let built = build(&family, target, Part::Whole);
            let kinds: Vec<&str> = operations(&built).iter().map(|(kind, ..)| *kind).collect();
            let count = |kind: &str| kinds.iter().filter(|k| **k == kind).count();
            let of = |wanted: &[Compressed]| {
                let is = |form: &Compressed| wanted.iter().any(|w| *w as u8 == *form as u8);
                family.weights.forms.values().filter(|form| is(form)).count()
            };
            // A tied embedding is decoded once in rows, and as kernels too in channels.
            let again = usize::from(i == 0 && layout == "channels");
            let tied =
                |wanted| usize::from(family.weights.forms["token_embd.weight"] as u8 == wanted as u8) * again;
            assert_eq!(count("constexpr_blockwise_shift_scale"), of(&[Int4]) + tied(Int4));
            assert_eq!(count("constexpr_lut_to_dense"), of(&[Lut4, Ternary]) + tied(Lut4) + tied(Ternary));
            assert_eq!(count("constexpr_sparse_to_dense"), of(&[Sparse]) + tied(Sparse));
            save(&family, &format!("compressed-{layout}"), &[("main", &built)]);
        }
    }
}

/// What a graph asks for has to be there, in the shape that it needs.
#[test]
fn what_does_not_fit() {
    let fault = |change: &dyn Fn(&mut Family), target: &Target, part: Part| {
        let mut family = llama(2);
        change(&mut family);
        let built = decoder(&family.decoder, &family.weights, target, part).map(|built| built.used);
        built.expect_err("it is built")
    };
    let nothing = |_: &mut Family| {};
    let without = |name: &'static str| move |f: &mut Family| drop(f.weights.shapes.remove(name));
    for name in ["blk.1.attn_norm.weight", "blk.0.ffn_down.weight", "rope_sin.0", "output_norm.weight"] {
        let e = fault(&without(name), &ROWS, Part::Whole);
        assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains(name), "{name}: {e}");
    }
    let shaped = |name: &'static str, shape: &'static [u64]| {
        move |f: &mut Family| drop(f.weights.shapes.insert(name.into(), shape.to_vec()))
    };
    for (name, shape, words) in [
        ("blk.1.attn_q.weight", &[128, 65][..], "blk.1.attn_q"),
        ("blk.0.attn_k.weight", &[65, 64], "attn_k"),
        ("blk.0.ffn_gate.weight", &[95, 64], "ffn_gated"),
        ("blk.0.ffn_norm.weight", &[63], "ffn_norm"),
        ("output.weight", &[256], "output_weight"),
        ("rope_cos.0", &[48, 30], "cos"),
    ] {
        for target in [&ROWS, &CHANNELS] {
            let e = fault(&shaped(name, shape), target, Part::Whole);
            assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains(words), "{name}: {e}");
        }
    }
    for part in [Part::Layers(0..0), Part::Layers(1..3)] {
        assert!(fault(&nothing, &ROWS, part).to_string().contains("layers"));
    }
    let many = Target { layout: Layout::Channels { tokens: CONTEXT + 1 }, ..CHANNELS };
    assert!(fault(&nothing, &many, Part::Whole).to_string().contains("tokens at once"));
    assert!(fault(&|f| f.decoder.kv_heads = 3, &ROWS, Part::Whole).to_string().contains("share"));
    assert!(fault(&|f| f.decoder.eps = 1e9, &ROWS, Part::Whole).to_string().contains("float16"));
}

/// A weight file of noise, and the package around these functions; opened again, it is the same.
fn save(family: &Family, what: &str, functions: &[(&str, &Built)]) {
    let kept = std::env::var_os("QCONV_PACKAGES").map(PathBuf::from);
    let dir = tempfile::tempdir().unwrap();
    let path = kept.unwrap_or_else(|| dir.path().into());
    let path = path.join(format!("{}-{what}.mlpackage", family.name));
    let wanted = family.weights.wanted();
    let (file, blobs) = layout("weight.bin", &wanted).unwrap();
    let mut bytes = vec![0u8; file.len as usize];
    bytes[..file.header.len()].copy_from_slice(&file.header);
    let put =
        |bytes: &mut [u8], at: u64, data: &[u8]| bytes[at as usize..][..data.len()].copy_from_slice(data);
    let records = std::sync::Mutex::new(Vec::new());
    let keep = |at: u64, data: &[u8]| {
        records.lock().unwrap().push((at, data.to_vec()));
        Ok(())
    };
    file.ending.unwrap().write(1, &mut Vec::new(), &|_, _| unreachable!(), &keep, &|_| true).unwrap();
    records.into_inner().unwrap().iter().for_each(|(at, data)| put(&mut bytes, *at, data));
    let mut random = 1u64;
    let mut next = || {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) as u32
    };
    for (blob, wanted) in blobs.iter().zip(&wanted) {
        let data: Vec<u8> = match wanted.data_type {
            DataType::Float16 => {
                let number = |n: u32| f16::from_f32(n as f32 / 2f32.powi(33) - 0.125).to_le_bytes();
                (0..wanted.elements).flat_map(|_| number(next())).collect()
            }
            // A mask with as many ones as there are indices.
            _ => (0..blob.bytes).map(|_| 0x55).collect(),
        };
        put(&mut bytes, blob.data(), &data);
    }
    let model = model(functions);
    for (name, content) in small_files(&model, true).unwrap() {
        fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
        fs::write(path.join(name), content).unwrap();
    }
    fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
    fs::write(path.join(WEIGHTS), bytes).unwrap();
    let package = Package::open(&path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(*package.model(), model);
}

fn model(functions: &[(&str, &Built)]) -> Model {
    let description = |name: &str, built: &Built| {
        let array = |name: &str, ty: &TensorType, is_output: bool| {
            let data_type = match ty.dtype {
                DataType::Int32 => ArrayDataType::Int32,
                _ => ArrayDataType::Float16,
            };
            let sizes: Vec<i64> = ty.dims.iter().map(|d| d.known().unwrap_or(1) as i64).collect();
            let range = |d: Option<u64>| {
                let (low, high) = d.map_or((1, CONTEXT), |n| (n, n));
                SizeRange { lower_bound: low, upper_bound: high as i64 }
            };
            let ranges = ty.declared().into_iter().map(range).collect();
            match ty.declared().contains(&None) {
                true if is_output => FeatureDescription::array(name, data_type, &[], Flexibility::None),
                true => FeatureDescription::array(name, data_type, &sizes, Flexibility::Range(Only(ranges))),
                false => FeatureDescription::array(name, data_type, &sizes, Flexibility::None),
            }
        };
        let state = |f: &qconv::mil::Feature| {
            let sizes: Vec<i64> = f.ty.dims.iter().map(|d| d.known().unwrap() as i64).collect();
            FeatureDescription::state(&f.name, &sizes)
        };
        FunctionDescription {
            name: name.into(),
            input: built.inputs.iter().map(|f| array(&f.name, &f.ty, false)).collect(),
            output: built.outputs.iter().map(|f| array(&f.name, &f.ty, true)).collect(),
            state: built.states.iter().map(state).collect(),
        }
    };
    let mut described: Vec<FunctionDescription> =
        functions.iter().map(|(name, built)| description(name, built)).collect();
    let description = match &mut described[..] {
        [one] if one.name == "main" => {
            let FunctionDescription { input, output, state, .. } = one.clone();
            ModelDescription { input, output, state, ..ModelDescription::default() }
        }
        _ => ModelDescription {
            default_function_name: described[0].name.clone(),
            functions: described,
            ..ModelDescription::default()
        },
    };
    let functions = functions.iter().map(|(name, built)| ((*name).into(), built.function.clone()));
    let program = Program { version: 1, functions: functions.collect(), ..Program::default() };
    Model { specification_version: 9, description, program, ..Model::default() }
}
