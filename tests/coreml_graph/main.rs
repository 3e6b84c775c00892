//! The graphs of decoders: what stands in a function of one layer, in both layouts, for each family.
//!
//! `QCONV_UPDATE=1` writes `tests/goldens/coreml` anew; `QCONV_PACKAGES=DIR` keeps packages with random weights, for
//! coremltools to look at.

mod families;
mod package;
mod run;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use families::{CONTEXT, Compressed, Family, WIDTH, families, llama};
use package::save;
use qconv::container::coreml::mil::Binding;
use qconv::error::ErrorKind;
use qconv::mil::{Built, Layout, Part, Target, Text, decoder};

const ROWS: Target = Target { layout: Layout::Rows, context: CONTEXT, vocab_split: 1 };
const CHANNELS: Target = Target { layout: Layout::Channels { tokens: 8 }, context: CONTEXT, vocab_split: 1 };

fn build(family: &Family, target: &Target, part: Part) -> Built {
    let built = decoder(&family.decoder, &family.weights, target, part.clone());
    let built = built.unwrap_or_else(|e| panic!("{} {target:?} {part:?}: {e}", family.name));
    types::check(&built.function).unwrap_or_else(|e| panic!("{} {target:?} {part:?}: {e}", family.name));
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

/// Kind of an operation, names that it reads by parameter, names of its results.
type Seen<'a> = (&'a str, BTreeMap<&'a str, Vec<&'a str>>, Vec<&'a str>);

/// What each operation reads and gives, in order.
fn operations(built: &Built) -> Vec<Seen<'_>> {
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
            for (i, part) in parts.iter().enumerate() {
                save(&family, &format!("part-{i}-{layout}"), &[("main", part)]);
            }
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
