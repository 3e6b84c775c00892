//! What is written as a quantized checkpoint is read back: the same codes, scales and zeros, whatever the
//! layout and however rows are divided.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/unpacked.rs"]
mod unpacked;

use checkpoint::{Made, Random};
use proptest::prelude::*;
use qconv::container::grouped::Rows;
use qconv::packed::write::{
    Awq, Bnb4, Bnb8, Compressed, CompressedFp8, Data, Fp8, Gptq, Grid, Layout, Mxfp4, round,
};
use serde_json::{Value as Json, json};
use unpacked::{decoded, open};

/// The checkpoint that a layout makes of a matrix, so many of its units of rows at a time.
fn written(
    layout: &dyn Layout,
    shape: [u64; 2],
    step: u64,
    config: Json,
    rows: &dyn Fn(u64, u64) -> Input,
) -> Made {
    let parts = layout.parts(shape[0], shape[1]).unwrap();
    let mut data: Vec<Vec<u8>> =
        parts.iter().map(|p| vec![0xEE; p.dtype.nbytes(&p.shape).unwrap() as usize]).collect();
    let mut first = 0;
    while first < shape[0] {
        let end = shape[0].min(first + step * layout.unit(shape[1]));
        let mut put = |part: usize, offset: u64, bytes: &[u8]| {
            data[part][offset as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        match rows(first, end) {
            Input::Integers(rows) => layout.write(shape, first, Data::Integers(&rows), &mut put),
            Input::Weights(weights) => layout.write(shape, first, Data::Weights(&weights), &mut put),
        }
        .unwrap();
        first = end;
    }
    let made = parts.iter().zip(data).fold(Made::new(json!({})), |made, (part, data)| {
        let dtype = part.dtype.safetensors_name().unwrap();
        made.with(&format!("p{}", part.suffix), dtype, &part.shape, data)
    });
    made.quantized(config)
}

enum Input {
    Integers(Rows),
    Weights(Vec<f32>),
}

/// Random integers: scales of F16, some of them negative or zero.
fn integers(random: &mut Random, grid: &Grid, shape: [u64; 2]) -> Rows {
    let size = grid.shape(shape[0], shape[1]);
    let n = (size.rows * size.groups) as usize;
    let most = grid.levels.into();
    let zero = |random: &mut Random| match grid.symmetric {
        true => grid.middle(),
        false => (random.below(most) as u8).max(grid.least_zero),
    };
    Rows {
        codes: (0..shape[0] * shape[1]).map(|_| random.below(most) as u8).collect(),
        scales: (0..n).map(|_| random.value()).collect(),
        zeros: (0..n).map(|_| zero(random).into()).collect(),
    }
}

/// Some of the rows.
fn part(rows: &Rows, shape: [u64; 2], first: u64, end: u64) -> Rows {
    let cut = |n: usize| {
        let per_row = n / shape[0] as usize;
        first as usize * per_row..end as usize * per_row
    };
    Rows {
        codes: rows.codes[cut(rows.codes.len())].to_vec(),
        scales: rows.scales[cut(rows.scales.len())].to_vec(),
        zeros: rows.zeros[cut(rows.zeros.len())].to_vec(),
    }
}

/// Layouts of integers, with what config.json says of them.
fn layouts(bits: u32, group_size: Option<u64>, symmetric: bool) -> Vec<(Box<dyn Layout>, Json)> {
    let grid = |least_zero| Grid { levels: 1 << bits, group_size, symmetric, least_zero };
    let size = group_size.map_or(-1, |n| n as i64);
    let gptq = |version: &str| json!({"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version});
    let strategy = if group_size.is_some() { "group" } else { "channel" };
    let weights = json!({"num_bits": bits, "strategy": strategy, "group_size": group_size});
    let compressed = json!({
        "quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
    });
    let mut all: Vec<(Box<dyn Layout>, Json)> =
        vec![(Box::new(Compressed { grid: grid(0), bytes: false, act_order: false }), compressed.clone())];
    if bits == 8 {
        all.push((Box::new(Compressed { grid: grid(0), bytes: true, act_order: false }), compressed));
    }
    if matches!(bits, 2 | 3 | 4 | 8) {
        all.push((Box::new(Gptq { grid: grid(1), first_version: true }), gptq("gptq")));
        all.push((Box::new(Gptq { grid: grid(0), first_version: false }), gptq("gptq_v2")));
    }
    if bits == 4 {
        all.push((
            Box::new(Awq { grid: grid(0) }),
            json!({"quant_method": "awq", "bits": 4, "group_size": size}),
        ));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn integers_come_back(
        seed: u64,
        bits in prop::sample::select(vec![2u32, 3, 4, 5, 8]),
        group_size in prop::sample::select(vec![None, Some(32u64), Some(96)]),
        symmetric: bool,
        rows in 1u64..5,
        step in 1u64..4,
    ) {
        let shape = [rows * 32, 96];
        let dir = tempfile::tempdir().unwrap();
        for (layout, config) in layouts(bits, group_size, symmetric) {
            let grid = *layout.grid().unwrap();
            let wanted = integers(&mut Random(seed), &grid, shape);
            let cut = |first, end| Input::Integers(part(&wanted, shape, first, end));
            let made = written(&*layout, shape, step, config, &cut);
            let store = open(dir.path(), &made).unwrap();
            let (matrix, stored) = store.grouped(store.get("p.weight").unwrap()).unwrap();
            prop_assert_eq!(matrix.shape(), &grid.shape(shape[0], shape[1]));
            let mut found = Rows::default();
            found.read(&**matrix, stored, 0..shape[0]).unwrap();
            prop_assert!(found == wanted, "{:?}", layout);
            let in_order = |(c, g): (usize, &u32)| c as u64 / matrix.shape().group_size == u64::from(*g);
            prop_assert!(matrix.groups(stored).unwrap().is_none_or(|g| g.iter().enumerate().all(in_order)));
            // Any part of the rows, too.
            for (first, end) in [(0, 1), (1, shape[0]), (shape[0] / 2 - 1, shape[0] / 2 + 3)] {
                found.read(&**matrix, stored, first..end).unwrap();
                prop_assert!(found == part(&wanted, shape, first, end), "{:?} {}..{}", layout, first, end);
            }
        }
    }
}

/// A fraction of the greatest magnitude that each weight may be off, in the unit that shares a scale.
fn weights(layout: &dyn Layout, config: Json, name: &str, bound: f32) {
    let shape = [70, 192];
    let mut random = Random(31);
    let mut wanted: Vec<f32> = (0..shape[0] * shape[1]).map(|_| random.value() / 16.0).collect();
    wanted[..192].fill(0.0);
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for step in [1, 3, 100] {
        let cut = |first: u64, end: u64| {
            Input::Weights(wanted[(first * shape[1]) as usize..(end * shape[1]) as usize].to_vec())
        };
        files.push(written(layout, shape, step, config.clone(), &cut));
    }
    assert!(files.iter().all(|made| made.tensors == files[0].tensors), "{layout:?}");
    let store = open(dir.path(), &files[0]).unwrap();
    assert_eq!(store.tensors().len(), 1);
    let info = store.get(name).unwrap();
    assert_eq!(info.shape, shape);
    let mut found = vec![0.0; wanted.len()];
    qconv::block::codec(info.dtype).unwrap().decode(&store.read_all(info).unwrap(), &mut found).unwrap();
    let most = wanted.iter().fold(0f32, |m, w| m.max(w.abs()));
    for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert!((found - wanted).abs() <= bound * most, "{layout:?} {i}: {found} {wanted}");
    }
    assert!(found[..192].iter().all(|v| *v == 0.0), "{layout:?}: zeros");
    assert!(layout.write(shape, 0, Data::Integers(&Rows::default()), &mut |_, _, _| Ok(())).is_err());
    for bad in [f32::NAN, f32::INFINITY] {
        let row = [vec![bad], vec![0.0; 192 * 70 - 1]].concat();
        let result = layout.write(shape, 0, Data::Weights(&row), &mut |_, _, _| Ok(()));
        assert!(result.is_err(), "{layout:?} takes {bad}");
    }
}

#[test]
fn weights_come_back_nearly() {
    let bnb = json!({"quant_method": "bitsandbytes"});
    weights(&Bnb8, bnb.clone(), "p.weight", 0.5 / 127.0 * 1.001);
    weights(&Bnb4 { fp4: false, compute: "float16".into(), nested: None }, bnb.clone(), "p.weight", 0.153);
    weights(&Bnb4 { fp4: true, compute: "float16".into(), nested: None }, bnb.clone(), "p.weight", 0.168);
    // Any number does for a mean; scales are then near to what they were.
    let nested = Bnb4 { fp4: false, compute: "float16".into(), nested: Some(Some(0.04)) };
    weights(&nested, bnb, "p.weight", 0.2);
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [32, 128]});
    weights(&Fp8 { block: [32, 128] }, fp8, "p.weight", 16.0 / 448.0 * 1.001);
    let channel = json!({"num_bits": 8, "type": "float", "strategy": "channel"});
    let fp8 = json!({
        "quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": channel}},
    });
    weights(&CompressedFp8, fp8, "p.weight", 16.0 / 448.0 * 1.001);
    weights(&Mxfp4, json!({"quant_method": "mxfp4"}), "p_blocks", 0.25);
}

#[test]
fn what_does_not_fit_is_refused() {
    let grid = |bits: u32, group_size| Grid { levels: 1 << bits, group_size, symmetric: true, least_zero: 0 };
    let refused = |layout: &dyn Layout, rows, cols, why: &str| {
        let error = layout.parts(rows, cols).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let gptq = |bits, group_size| Gptq { grid: grid(bits, group_size), first_version: true };
    refused(&gptq(4, Some(32)), 33, 64, "multiples of 32");
    refused(&gptq(4, Some(32)), 32, 80, "multiples of 32");
    refused(&gptq(4, Some(64)), 32, 96, "groups of 64 do not divide");
    refused(&gptq(4, Some(64)), 0, 0, "multiples of 32");
    refused(&Awq { grid: grid(8, Some(32)) }, 32, 64, "4 bits");
    refused(&Awq { grid: grid(4, Some(64)) }, 32, 96, "groups of 64");
    refused(&Compressed { grid: grid(4, Some(64)), bytes: false, act_order: false }, 32, 96, "groups of 64");
    refused(&Bnb4 { fp4: false, compute: "float16".into(), nested: None }, 32, 96, "multiples of 64");
    refused(&Mxfp4, 32, 100, "multiples of 32");
}

/// Rounding to a grid and writing: the integers decode to what was rounded.
#[test]
fn rounded_weights_are_on_the_grid() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(77);
    let shape = [64, 128];
    let given: Vec<f32> = (0..shape[0] * shape[1]).map(|_| random.value()).collect();
    for (layout, config) in layouts(4, Some(32), false) {
        let mut rows = Rows::default();
        round(layout.grid().unwrap(), &given, shape[1], &mut rows).unwrap();
        let cut = |first, end| Input::Integers(part(&rows, shape, first, end));
        let store = open(dir.path(), &written(&*layout, shape, 1, config, &cut)).unwrap();
        let found = decoded(&store, "p.weight");
        for (i, (found, given)) in found.iter().zip(&given).enumerate() {
            assert!((found - given).abs() <= rows.scales[i / 32] * 1.5, "{layout:?} {i}: {found} {given}");
        }
    }
}
