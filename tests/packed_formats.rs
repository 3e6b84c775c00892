//! Quantized checkpoints by AutoAWQ, AutoRound, bitsandbytes, compressed-tensors, BitNet and ModelOpt: random
//! codes laid out by plain loops give the values of plain formulas, and what lacks a part is refused.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/unpacked.rs"]
mod unpacked;

use checkpoint::{Made, Random, f32_bytes, i32_bytes};
use serde_json::{Value as Json, json};
use unpacked::{decoded, open, same, stream};

const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A checkpoint with the matrix `p.weight`, and its values.
type Example = (Made, Vec<f32>);

/// A matrix of codes, and scales and zeros for groups of its columns.
struct Groups {
    rows: usize,
    cols: usize,
    size: usize,
    codes: Vec<u32>,
    scales: Vec<f32>,
    zeros: Vec<u32>,
}

impl Groups {
    fn new(random: &mut Random, rows: usize, cols: usize, size: usize, bits: u64) -> Self {
        let groups = rows * cols.div_ceil(size);
        Self {
            rows,
            cols,
            size,
            codes: (0..rows * cols).map(|_| random.below(1 << bits) as u32).collect(),
            scales: (0..groups).map(|_| random.value()).collect(),
            zeros: (0..groups).map(|_| random.below(1 << bits) as u32).collect(),
        }
    }

    fn groups(&self) -> usize {
        self.cols.div_ceil(self.size)
    }

    fn values(&self) -> Vec<f32> {
        let value = |i: usize| {
            let g = i / self.cols * self.groups() + i % self.cols / self.size;
            (self.codes[i] as f32 - self.zeros[g] as f32) * self.scales[g]
        };
        (0..self.codes.len()).map(value).collect()
    }
}

/// `[rows, cols]` -> `[cols, rows]`.
fn transposed<T: Copy>(x: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|c| x[c..].iter().step_by(cols).copied()).collect()
}

/// AWQ's words, from values in the order `[inputs or groups, outputs]`.
fn awq_words(fields: &[u32]) -> Vec<u32> {
    let order = [0, 2, 4, 6, 1, 3, 5, 7];
    fields.chunks(8).map(|eight| (0..8).fold(0, |word, k| word | eight[order[k]] << (4 * k))).collect()
}

fn awq_tensors(made: Made, g: &Groups) -> Made {
    let (rows, cols, groups) = (g.rows as u64, g.cols as u64, g.groups() as u64);
    let words = |fields: &[u32], cols| i32_bytes(awq_words(&transposed(fields, cols)));
    made.with("p.qweight", "I32", &[cols, rows / 8], words(&g.codes, g.cols))
        .with("p.qzeros", "I32", &[groups, rows / 8], words(&g.zeros, g.groups()))
        .with("p.scales", "F32", &[groups, rows], f32_bytes(&transposed(&g.scales, g.groups())))
}

fn awq(random: &mut Random) -> Example {
    let g = Groups::new(random, 40, 96, 32, 4);
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"});
    (awq_tensors(Made::new(json!({})), &g).quantized(config), g.values())
}

fn auto_round(random: &mut Random) -> Example {
    let g = Groups::new(random, 40, 96, 96, 4);
    let config = json!({
        "quant_method": "auto-round", "bits": 4, "group_size": -1, "packing_format": "auto_round:auto_awq",
    });
    (awq_tensors(Made::new(json!({})), &g).quantized(config), g.values())
}

fn compressed(bits: u64, format: &str, weights: Json) -> Json {
    let mut weights = weights;
    weights["num_bits"] = bits.into();
    json!({
        "quant_method": "compressed-tensors", "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    })
}

/// With zeros and an order of columns, at a width that crosses words, rows that end within one.
fn packed_integers(random: &mut Random) -> Example {
    let mut g = Groups::new(random, 34, 70, 24, 3);
    let order: Vec<u32> = (0..70).map(|_| random.below(3) as u32).collect();
    let rows = g.codes.chunks(70).flat_map(|row| stream(row, 3));
    let zeros: Vec<u32> = transposed(&g.zeros, 3).chunks(34).flat_map(|column| stream(column, 3)).collect();
    let made = Made::new(json!({}))
        .with("p.weight_packed", "I32", &[34, 7], i32_bytes(rows))
        .with("p.weight_scale", "F32", &[34, 3], f32_bytes(&g.scales))
        .with("p.weight_zero_point", "I32", &[4, 3], i32_bytes(transposed(&zeros, 4)))
        .with("p.weight_g_idx", "I32", &[70], i32_bytes(order.iter().copied()))
        .with("p.weight_shape", "I64", &[2], [34u64, 70].map(u64::to_le_bytes).concat())
        .quantized(compressed(3, "pack-quantized", json!({"strategy": "group", "group_size": 24})));
    // Each column's group is looked up: as if there were a group for each column.
    g.scales = (0..34 * 70).map(|i| g.scales[i / 70 * 3 + order[i % 70] as usize]).collect();
    g.zeros = (0..34 * 70).map(|i| g.zeros[i / 70 * 3 + order[i % 70] as usize]).collect();
    g.size = 1;
    (made, g.values())
}

fn integers_of_8_bits(random: &mut Random) -> Example {
    let mut g = Groups::new(random, 7, 50, 50, 8);
    g.zeros = vec![128; 7];
    let bytes: Vec<u8> = g.codes.iter().map(|c| (*c as u8) ^ 0x80).collect();
    let made = Made::new(json!({}))
        .with("p.weight", "I8", &[7, 50], bytes)
        .with("p.weight_scale", "F32", &[7, 1], f32_bytes(&g.scales))
        .quantized(compressed(8, "int-quantized", json!({"strategy": "channel"})));
    (made, g.values())
}

fn nf4(random: &mut Random, nested: bool) -> Example {
    let n: usize = 5 * 77;
    let codes: Vec<u8> = (0..n).map(|_| random.below(16) as u8).collect();
    let map: Vec<f32> = (0..16).map(|_| random.value()).collect();
    let blocks = n.div_ceil(64);
    let bytes: Vec<u8> = codes.chunks(2).map(|c| c[0] << 4 | c.get(1).unwrap_or(&0)).collect();
    let mut state = json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [5, 77]});
    let mut made = Made::new(json!({})).with("p.weight", "U8", &[bytes.len() as u64, 1], &bytes).with(
        "p.weight.quant_map",
        "F32",
        &[16],
        f32_bytes(&map),
    );
    let scales: Vec<f32> = if nested {
        let outer: Vec<f32> = (0..blocks.div_ceil(4)).map(|_| random.value()).collect();
        let outer_map: Vec<f32> = (0..256).map(|_| random.value()).collect();
        let absmax: Vec<u8> = (0..blocks).map(|_| random.below(256) as u8).collect();
        state["nested_blocksize"] = 4.into();
        state["nested_offset"] = 0.375.into();
        made = made
            .with("p.weight.absmax", "U8", &[blocks as u64], &absmax)
            .with("p.weight.nested_absmax", "F32", &[outer.len() as u64], f32_bytes(&outer))
            .with("p.weight.nested_quant_map", "F32", &[256], f32_bytes(&outer_map));
        absmax.iter().enumerate().map(|(k, c)| outer_map[usize::from(*c)] * outer[k / 4] + 0.375).collect()
    } else {
        let absmax: Vec<f32> = (0..blocks).map(|_| random.value()).collect();
        made = made.with("p.weight.absmax", "F32", &[blocks as u64], f32_bytes(&absmax));
        absmax
    };
    let state = state.to_string();
    let made = made
        .with("p.weight.quant_state.bitsandbytes__nf4", "U8", &[state.len() as u64], &state)
        .quantized(json!({"quant_method": "bitsandbytes", "load_in_4bit": true}));
    (made, codes.iter().enumerate().map(|(i, c)| map[usize::from(*c)] * scales[i / 64]).collect())
}

fn int8_of_bitsandbytes(random: &mut Random) -> Example {
    let codes: Vec<u8> = (0..6 * 33).map(|_| random.below(256) as u8).collect();
    let scales: Vec<f32> = (0..6).map(|_| random.value()).collect();
    let made = Made::new(json!({}))
        .with("p.SCB", "F32", &[6], f32_bytes(&scales))
        .with("p.weight", "I8", &[6, 33], &codes)
        .with("p.weight_format", "U8", &[], [0])
        .quantized(json!({"quant_method": "bitsandbytes", "load_in_8bit": true}));
    let value = |(i, c): (usize, &u8)| f32::from(*c as i8) * scales[i / 33] * (1.0 / 127.0);
    (made, codes.iter().enumerate().map(value).collect())
}

fn bitnet(random: &mut Random) -> Example {
    let (rows, cols) = (12, 19);
    let trits: Vec<u8> = (0..rows * cols).map(|_| random.below(3) as u8).collect();
    let byte = |i: usize| (0..4).fold(0, |byte, k| byte | trits[k * rows / 4 * cols + i] << (2 * k));
    let made = Made::new(json!({}))
        .with(
            "p.weight",
            "U8",
            &[rows as u64 / 4, cols as u64],
            (0..rows / 4 * cols).map(byte).collect::<Vec<_>>(),
        )
        .with("p.weight_scale", "F32", &[1], f32_bytes(&[7.0]))
        .quantized(json!({"quant_method": "bitnet"}));
    (made, trits.iter().map(|t| (f32::from(*t) - 1.0) * (1.0 / 7.0)).collect())
}

/// FP4 in groups of 16: bytes, scales as codes of E4M3 below 1, values without the factor.
fn fp4(random: &mut Random, n: usize) -> (Vec<u8>, Vec<u8>, Vec<f32>) {
    let codes: Vec<u8> = (0..n).map(|_| random.below(16) as u8).collect();
    let exponents: Vec<u8> = (0..n / 16).map(|_| random.below(7) as u8 + 1).collect();
    let bytes = codes.chunks(2).map(|c| c[0] | c[1] << 4).collect();
    let scale = |i: usize| 2f32.powi(i32::from(exponents[i / 16]) - 7);
    let values = codes.iter().enumerate().map(|(i, c)| E2M1[usize::from(*c)] * scale(i)).collect();
    (bytes, exponents.iter().map(|e| e << 3).collect(), values)
}

fn nvfp4(random: &mut Random, library: &str) -> Example {
    let (bytes, scales, values) = fp4(random, 6 * 48);
    let made = Made::new(json!({}));
    match library {
        "modelopt" => {
            let made = made
                .with("p.weight", "U8", &[6, 24], bytes)
                .with("p.weight_scale", "F8_E4M3", &[6, 3], scales)
                .with("p.weight_scale_2", "F32", &[], f32_bytes(&[0.25]))
                .with("p.input_scale", "F32", &[], f32_bytes(&[3.0]))
                .quantized(json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}));
            (made, values.iter().map(|v| v * 0.25).collect())
        }
        _ => {
            let made = made
                .with("p.weight_packed", "U8", &[6, 24], bytes)
                .with("p.weight_scale", "F8_E4M3", &[6, 3], scales)
                .with("p.weight_global_scale", "F32", &[1], f32_bytes(&[8.0]))
                .with("p.input_global_scale", "F32", &[1], f32_bytes(&[3.0]))
                .quantized(compressed(4, "nvfp4-pack-quantized", json!({"strategy": "tensor_group"})));
            (made, values.iter().map(|v| v / 8.0).collect())
        }
    }
}

fn fp8_of_rows(random: &mut Random, method: &str) -> Example {
    // Powers of two: exponents of E4M3 without fraction.
    let exponents: Vec<u8> = (0..4 * 30).map(|_| random.below(14) as u8 + 1).collect();
    let scales: Vec<f32> = (0..4).map(|_| random.value()).collect();
    let made = Made::new(json!({}))
        .with("p.weight", "F8_E4M3", &[4, 30], exponents.iter().map(|e| e << 3).collect::<Vec<_>>())
        .with("p.weight_scale", "F32", &[4, 1], f32_bytes(&scales));
    let config = match method {
        "fbgemm_fp8" => json!({"quant_method": "fbgemm_fp8"}),
        _ => compressed(8, "float-quantized", json!({"type": "float", "strategy": "channel"})),
    };
    let value = |(i, e): (usize, &u8)| 2f32.powi(i32::from(*e) - 7) * scales[i / 30];
    (made.quantized(config), exponents.iter().enumerate().map(value).collect())
}

fn examples() -> Vec<(&'static str, Example)> {
    let r = &mut Random(11);
    vec![
        ("awq", awq(r)),
        ("auto-round", auto_round(r)),
        ("compressed-tensors, packed", packed_integers(r)),
        ("compressed-tensors, 8 bits", integers_of_8_bits(r)),
        ("compressed-tensors, NVFP4", nvfp4(r, "compressed-tensors")),
        ("compressed-tensors, FP8", fp8_of_rows(r, "compressed-tensors")),
        ("bitsandbytes, NF4", nf4(r, false)),
        ("bitsandbytes, NF4 nested", nf4(r, true)),
        ("bitsandbytes, 8 bits", int8_of_bitsandbytes(r)),
        ("bitnet", bitnet(r)),
        ("modelopt", nvfp4(r, "modelopt")),
        ("fbgemm", fp8_of_rows(r, "fbgemm_fp8")),
    ]
}

#[test]
fn values_are_those_of_the_formulas() {
    let dir = tempfile::tempdir().unwrap();
    for (name, (made, values)) in examples() {
        let store = open(dir.path(), &made).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(store.tensors().len(), 1, "{name}: {:?}", store.tensors());
        println!("{name}");
        same(&decoded(&store, "p.weight"), &values);
    }
}

/// Whatever part is taken away, whatever shape is changed: an error, when it is opened or when it is read,
/// and never other values.
/// The first group that names a module or has a pattern for it, then the first for its class; and patterns, which
/// take time and memory, are counted over all groups.
#[test]
fn groups_are_found_by_their_targets() {
    let dir = tempfile::tempdir().unwrap();
    let (made, values) = packed_integers(&mut Random(7));
    let with = |groups: &[(u64, Vec<String>)]| {
        let group = |(bits, targets): &(u64, Vec<String>)| json!({"targets": targets, "weights": {"num_bits": bits, "strategy": "group", "group_size": 24}});
        let all: serde_json::Map<_, _> =
            groups.iter().enumerate().map(|(i, g)| (format!("group_{i}"), group(g))).collect();
        let config =
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": all});
        open(dir.path(), &made.clone().quantized(config))
    };
    let to = |targets: &[&str]| targets.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    // The matrix has 3 bits; where 5 are stated, it does not fit.
    for (case, groups, fits) in [
        ("class", vec![(5, to(&["q", "re:q"])), (3, to(&["Linear"]))], true),
        ("first class", vec![(5, to(&["Linear"])), (3, to(&["Linear"]))], false),
        ("name before class", vec![(5, to(&["Linear"])), (3, to(&["p"]))], true),
        ("first name", vec![(3, to(&["p"])), (5, to(&["p"]))], true),
        ("pattern before name", vec![(3, to(&["re:[pq]$"])), (5, to(&["p"]))], true),
        ("name before pattern", vec![(5, to(&["p"])), (3, to(&["re:p"]))], false),
        ("pattern twice", vec![(3, to(&["re:p.*"])), (5, to(&["re:p.*"]))], true),
    ] {
        match with(&groups) {
            Ok(store) if fits => same(&decoded(&store, "p.weight"), &values),
            Ok(_) => panic!("{case}: accepted"),
            Err(e) => assert!(!fits && e.to_string().contains("5 bits"), "{case}: {e}"),
        }
    }
    let many = |groups: usize, each: usize, pattern: &dyn Fn(usize) -> String| {
        let group =
            |g: usize| (3, (0..each).map(|i| pattern(g * each + i)).chain(["Linear".into()]).collect());
        with(&(0..groups).map(group).collect::<Vec<_>>())
    };
    many(400, 1, &|i| format!("re:model\\.layers\\.{i}\\.(self_attn|mlp)\\..*_proj$")).unwrap();
    many(8, 400, &|i| format!("re:model.layers.{i}.mlp.down_proj")).unwrap();
    many(8, 10_000, &|i| format!("model.layers.{i}.mlp.down_proj")).unwrap();
    many(1000, 1, &|_| "re:[^a]{300}".into()).unwrap();
    let long = "(?:)".repeat(50);
    for (case, groups, each, pattern) in
        [("programs", 8, 250, "[^a]{300}"), ("texts", 8, 128, long.as_str()), ("patterns", 8, 600, "x")]
    {
        let e = many(groups, each, &|i| format!("re:{pattern}{i}")).unwrap_err();
        assert_eq!(e.kind(), qconv::ErrorKind::Limit, "{case}: {e}");
        assert!(e.to_string().contains("quantization_config"), "{case}: {e}");
    }
}

#[test]
fn parts_are_held_against_each_other() {
    let dir = tempfile::tempdir().unwrap();
    for (name, (made, values)) in examples() {
        for k in 0..made.tensors.len() {
            let part = made.tensors[k].0.clone();
            // What may be missing, and changes nothing or has another meaning.
            let optional = ["input", "weight_format", "g_idx", "zero_point", "global_scale"];
            let optional = optional.iter().any(|o| part.contains(o));
            let mut less = made.clone();
            less.take(&part);
            match open(dir.path(), &less).and_then(|s| s.read_all(s.get("p.weight").unwrap())) {
                Err(e) => {
                    let e = e.to_string();
                    assert!(
                        e.contains("p.") || e.contains("no tensor is packed"),
                        "{name} without {part}: {e}"
                    );
                }
                Ok(_) => assert!(optional, "{name} without {part} is read"),
            }
            for shape in [vec![], vec![0, 0], vec![1, 1, 1], vec![u64::MAX, 2], vec![1 << 40]] {
                let mut other = made.clone();
                let tensor = other.get(&part);
                if tensor.1 == shape {
                    continue;
                }
                tensor.1 = shape.clone();
                let size = match tensor.0.as_str() {
                    "F32" | "I32" => 4,
                    "I64" => 8,
                    _ => 1,
                };
                let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
                tensor.2.resize(elements.filter(|n| *n < 9).unwrap_or(0) as usize * size, 0);
                let read = open(dir.path(), &other).and_then(|s| s.read_all(s.get("p.weight").unwrap()));
                let of_activations = part.contains("input") || part.contains("weight_format");
                let sizes = [values.len() * 4, 0];
                match read {
                    Err(_) => {}
                    Ok(bytes) => assert!(
                        of_activations || sizes.contains(&bytes.len()),
                        "{name}: {part} of {shape:?} gives {} bytes",
                        bytes.len()
                    ),
                }
            }
        }
        let mut silent = made.clone();
        silent.config = json!({});
        let found = open(dir.path(), &silent);
        let unmarked = ["bitnet", "fbgemm", "compressed-tensors, 8 bits", "compressed-tensors, FP8"];
        assert_eq!(found.is_ok(), unmarked.contains(&name), "{name} without quantization_config");
    }
}
