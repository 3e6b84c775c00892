//! Quantized checkpoints: what is packed decodes to the values of plain formulas, and what does not
//! fit together is refused. The facts are those of `formats/spec/packed.md`.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/unpacked.rs"]
mod unpacked;

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{Made, Random, f32_bytes, i32_bytes};
use qconv::ErrorKind;
use qconv::ErrorKind::{Malformed, Unsupported};
use qconv::container::gguf::Gguf;
use qconv::convert::{HfToGguf, Silent, ToHf};
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::{Value as Json, json};
use unpacked::{decoded, open, same, stream};

/// One GPTQ matrix `p` of random codes, and its values by the formula.
fn gptq(random: &mut Random, bits: u64, group_size: i64, desc_act: bool, version: u32) -> (Made, Vec<f32>) {
    let (inputs, outputs) = (96, 64);
    let size = if group_size < 0 { inputs } else { group_size as usize };
    let groups = inputs.div_ceil(size);
    let mut codes = |n: usize| (0..n).map(|_| random.below(1 << bits) as u32).collect::<Vec<_>>();
    let q: Vec<Vec<u32>> = (0..outputs).map(|_| codes(inputs)).collect();
    let stored_zeros: Vec<Vec<u32>> = (0..groups).map(|_| codes(outputs)).collect();
    let scales: Vec<Vec<f32>> = (0..groups).map(|_| (0..outputs).map(|_| random.value()).collect()).collect();
    let g_idx: Vec<u32> = (0..inputs)
        .map(|i| if desc_act { random.below(groups as u64) as u32 } else { (i / size) as u32 })
        .collect();
    let streams: Vec<Vec<u32>> = q.iter().map(|row| stream(row, bits as usize)).collect();
    let words = streams[0].len();
    let qweight = (0..words).flat_map(|w| streams.iter().map(move |s| s[w]));
    let qzeros = stored_zeros.iter().flat_map(|row| stream(row, bits as usize));
    let made = Made::new(json!({}))
        .with("p.qweight", "I32", &[words as u64, outputs as u64], i32_bytes(qweight))
        .with("p.qzeros", "I32", &[groups as u64, (outputs as u64 * bits) / 32], i32_bytes(qzeros))
        .with("p.scales", "F32", &[groups as u64, outputs as u64], f32_bytes(&scales.concat()))
        .with("p.g_idx", "I32", &[inputs as u64], i32_bytes(g_idx.iter().copied()))
        .quantized(json!({
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": desc_act,
            "checkpoint_format": if version == 1 { "gptq" } else { "gptq_v2" },
        }));
    let mut values = Vec::new();
    for (o, row) in q.iter().enumerate() {
        for (i, code) in row.iter().enumerate() {
            let g = g_idx[i] as usize;
            let zero = stored_zeros[g][o] + u32::from(version == 1);
            values.push((*code as f32 - zero as f32) * scales[g][o]);
        }
    }
    (made, values)
}

#[test]
fn gptq_of_any_width() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    for bits in [2, 3, 4, 8] {
        for (group_size, desc_act, version) in
            [(32, false, 1), (32, true, 1), (-1, false, 2), (40, false, 2), (24, true, 1), (1024, false, 1)]
        {
            let (mut made, values) = gptq(&mut random, bits, group_size, desc_act, version);
            let store = open(dir.path(), &made).unwrap();
            let info = store.get("p.weight").unwrap();
            assert_eq!((store.tensors().len(), &info.shape[..]), (1, &[64, 96][..]));
            same(&decoded(&store, "p.weight"), &values);
            if !desc_act {
                made.take("p.g_idx");
                same(&decoded(&open(dir.path(), &made).unwrap(), "p.weight"), &values);
            }
        }
    }
}

#[test]
fn gptq_that_does_not_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let (good, _) = gptq(&mut Random(2), 4, 32, true, 1);
    let refused = |kind: ErrorKind, says: &str, change: &dyn Fn(&mut Made)| {
        let mut made = good.clone();
        change(&mut made);
        let error = open(dir.path(), &made).expect_err(says);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "{says:?} is not in: {error}");
    };
    let set = |key: &'static str, value: Json| {
        move |m: &mut Made| m.config["quantization_config"][key] = value.clone()
    };
    refused(Malformed, "\"p.scales\" is missing", &|m| drop(m.take("p.scales")));
    refused(Malformed, "\"p.qzeros\" is missing", &|m| drop(m.take("p.qzeros")));
    refused(Malformed, "\"p.g_idx\" is missing", &|m| drop(m.take("p.g_idx")));
    refused(Malformed, "no tensor is packed so", &|m| drop(m.take("p.qweight")));
    refused(Malformed, "\"p.qzeros\" has shape [3, 8], [2, 8] was expected", &set("group_size", json!(64)));
    refused(Malformed, "[1, 8] was expected", &set("group_size", json!(i64::MAX)));
    refused(Malformed, "[1, 8] was expected", &set("group_size", json!(-1)));
    for absurd in [json!(0), json!(-7), json!(i64::MIN), json!(1.5), json!("32"), json!(u64::MAX), Json::Null]
    {
        refused(Malformed, "group_size", &set("group_size", absurd));
    }
    refused(Malformed, "bits", &set("bits", Json::Null));
    refused(Malformed, "was expected", &set("bits", json!(8)));
    refused(Malformed, "hold no whole number of codes", &|m| {
        m.config["quantization_config"]["bits"] = json!(3);
        m.get("p.qweight").1 = vec![16, 48];
    });
    refused(Malformed, "do not fill whole words", &|m| m.get("p.qweight").1 = vec![64, 12]);
    refused(Malformed, "two dimensions", &|m| m.get("p.qweight").1 = vec![768]);
    refused(Malformed, "no whole number of codes", &|m| {
        *m.get("p.qweight") = ("I32".into(), vec![1 << 62, 0], vec![]);
    });
    refused(Malformed, "is F32, I32 was expected", &|m| m.get("p.qzeros").0 = "F32".into());
    refused(Malformed, "is I32, F32 or F16", &|m| m.get("p.scales").0 = "I32".into());
    refused(Malformed, "\"p.weight\": is there, and packed as well", &|m| {
        m.tensors.push(("p.weight".into(), ("F32".into(), vec![1], vec![0; 4])));
    });
    for bits in [1, 5, 16, -4] {
        refused(Unsupported, "bits", &set("bits", json!(bits)));
    }
    refused(Unsupported, "marlin", &set("checkpoint_format", json!("marlin")));
    refused(Unsupported, "pack_dtype", &set("pack_dtype", json!("int16")));
    refused(Unsupported, "quantized by quip", &set("quant_method", json!("quip")));
    refused(Malformed, "quant_method is \"awq\"", &set("quant_method", json!("awq")));
    refused(Malformed, "\"p.qweight\" is packed as in GPTQ", &|m| m.config = json!({}));
    refused(Malformed, "by mxfp4, but no tensor", &set("quant_method", json!("mxfp4")));
    // The right bytes in the wrong place show when they are read.
    let mut made = good.clone();
    made.get("p.g_idx").2[4 * 17] = 3;
    let store = open(dir.path(), &made).unwrap();
    let error = store.read_all(store.get("p.weight").unwrap()).unwrap_err();
    assert_eq!(error.kind(), Malformed);
    assert!(error.to_string().contains("input 17 is of group 3, there are 3"), "{error}");
}

/// F8_E4M3 by its definition.
fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => fraction / 8.0 * 2f32.powi(-6),
        e => (1.0 + fraction / 8.0) * 2f32.powi(e - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Any code but NaN.
fn codes(random: &mut Random, n: usize) -> Vec<u8> {
    (0..n).map(|_| (random.below(127) | random.below(2) << 7) as u8).collect()
}

#[test]
fn fp8_in_blocks_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(3);
    // Ragged blocks, a stack of matrices.
    let codes = codes(&mut random, 2 * 37 * 50);
    let scales: Vec<f32> = (0..2 * 3 * 4).map(|_| random.value()).collect();
    let config = json!({"quant_method": "fp8", "weight_block_size": [16, 15]});
    let made = Made::new(json!({}))
        .with("p.weight_scale_inv", "F32", &[2, 3, 4], f32_bytes(&scales))
        .with("p.weight", "F8_E4M3", &[2, 37, 50], &codes)
        .with("p.input_scale", "F32", &[], f32_bytes(&[2.0]))
        .with("norm.weight", "F32", &[2], f32_bytes(&[1.0, 2.0]))
        .quantized(config);
    let store = open(dir.path(), &made).unwrap();
    assert_eq!(store.tensors().len(), 2, "{:?}", store.tensors());
    let scale = |i: usize| {
        let (e, r, c) = (i / (37 * 50), i / 50 % 37, i % 50);
        scales[e * 12 + r / 16 * 4 + c / 15]
    };
    let wanted: Vec<f32> = codes.iter().enumerate().map(|(i, c)| e4m3(*c) * scale(i)).collect();
    same(&decoded(&store, "p.weight"), &wanted);

    // One scale for all, a power of two by its exponent.
    let made = Made::new(json!({}))
        .with("p.weight", "F8_E4M3", &[74, 50], &codes)
        .with("p.weight_scale_inv", "F8_E8M0", &[1], [124])
        .with("p.activation_scale", "F32", &[], f32_bytes(&[2.0]))
        .quantized(json!({"quant_method": "fp8", "weight_block_size": null}));
    let wanted: Vec<f32> = codes.iter().map(|c| e4m3(*c) / 8.0).collect();
    same(&decoded(&open(dir.path(), &made).unwrap(), "p.weight"), &wanted);
}

#[test]
fn fp8_that_does_not_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let good = Made::new(json!({}))
        .with("p.weight", "F8_E4M3", &[40, 64], vec![1; 40 * 64])
        .with("p.weight_scale_inv", "F32", &[2, 2], f32_bytes(&[1.0; 4]))
        .quantized(json!({"quant_method": "fp8", "weight_block_size": [32, 32]}));
    assert!(open(dir.path(), &good).is_ok());
    let refused = |says: &str, change: &dyn Fn(&mut Made)| {
        let mut made = good.clone();
        change(&mut made);
        let error = open(dir.path(), &made).expect_err(says);
        assert_eq!(error.kind(), Malformed, "{error}");
        assert!(error.to_string().contains(says), "{says:?} is not in: {error}");
    };
    let block = |value: Json| {
        move |m: &mut Made| m.config["quantization_config"]["weight_block_size"] = value.clone()
    };
    refused("\"p.weight_scale_inv\" is missing", &|m| drop(m.take("p.weight_scale_inv")));
    refused("belongs to is not there", &|m| {
        m.take("p.weight");
        m.tensors.push(("q.weight".into(), ("F8_E4M3".into(), vec![1, 1], vec![0])));
        m.tensors.push(("q.weight_scale_inv".into(), ("F32".into(), vec![1, 1], vec![0; 4])));
    });
    refused("no tensor is packed so", &|m| m.get("p.weight").0 = "I8".into());
    refused("[40, 1] was expected", &block(json!([1, 64])));
    refused("[1, 1] was expected", &block(json!([u64::MAX, u64::MAX])));
    refused("but quantization_config no weight_block_size", &block(Json::Null));
    for absurd in [json!([0, 32]), json!([32]), json!([32, 32, 32]), json!(32), json!([-1, 32]), json!("x")] {
        refused("weight_block_size", &block(absurd));
    }
    refused("is U8, F32 or F16", &|m| *m.get("p.weight_scale_inv") = ("U8".into(), vec![2, 2], vec![0; 4]));
    refused("no matrix", &|m| m.get("p.weight").1 = vec![40 * 64]);
    refused("is packed as in FP8, but config.json has no", &|m| m.config = json!({}));
}

fn mxfp4() -> Made {
    let mut random = Random(4);
    let mut bytes = |n: usize, below| (0..n).map(|_| random.below(below) as u8).collect::<Vec<_>>();
    Made::new(json!({}))
        .with("x_blocks", "U8", &[3, 5, 2, 16], bytes(3 * 5 * 2 * 16, 256))
        .with("x_scales", "U8", &[3, 5, 2], bytes(3 * 5 * 2, 255))
        .quantized(json!({"quant_method": "mxfp4"}))
}

#[test]
fn mxfp4_is_repacked() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = mxfp4();
    let store = open(dir.path(), &made).unwrap();
    let info = store.get("x_blocks").unwrap();
    assert_eq!((info.dtype, &info.shape[..]), (DType::MXFP4, &[3, 5, 64][..]));
    let bytes = store.read_all(info).unwrap();
    let mut found = vec![0.0; 3 * 5 * 64];
    qconv::block::codec(DType::MXFP4).unwrap().decode(&bytes, &mut found).unwrap();
    let (codes, scales) = (made.get("x_blocks").2.clone(), made.get("x_scales").2.clone());
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (i, found) in found.iter().enumerate() {
        let code = usize::from(codes[i / 2] >> (4 * (i % 2)) & 15);
        let magnitude = e2m1[code % 8] * 2f64.powi(i32::from(scales[i / 32]) - 127);
        let wanted = if code < 8 { magnitude } else { -magnitude };
        assert_eq!(f64::from(*found), wanted, "element {i}");
    }
    for (first, n) in [(0, 1), (7, 9), (29, 1)] {
        let mut part = vec![0; n * 17];
        store.read(info, first * 17, &mut part).unwrap();
        assert!(part == bytes[first as usize * 17..][..part.len()]);
    }
    assert!(store.read(info, 3, &mut [0; 17]).is_err(), "no whole block");
    assert!(store.read(info, 30 * 17, &mut [0; 17]).is_err(), "beyond the end");
}

#[test]
fn mxfp4_that_does_not_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |says: &str, change: &dyn Fn(&mut Made)| {
        let mut made = mxfp4();
        change(&mut made);
        let error = open(dir.path(), &made).expect_err(says);
        assert_eq!(error.kind(), Malformed, "{error}");
        assert!(error.to_string().contains(says), "{says:?} is not in: {error}");
    };
    refused("\"x_scales\" is missing", &|m| drop(m.take("x_scales")));
    refused("no tensor is packed so", &|m| drop(m.take("x_blocks")));
    refused("belongs to is not there", &|m| {
        m.tensors.push(("y_scales".into(), ("U8".into(), vec![1], vec![0])));
    });
    refused("[3, 5, 2] was expected", &|m| m.get("x_scales").1 = vec![3, 10]);
    refused("[3, 5, 4, 16] was expected", &|m| m.get("x_blocks").1 = vec![3, 5, 4, 8]);
    refused("is I8, U8 was expected", &|m| m.get("x_blocks").0 = "I8".into());
    refused("sizes overflow", &|m| {
        *m.get("x_blocks") = ("U8".into(), vec![0, 1 << 60, 16], vec![]);
        *m.get("x_scales") = ("U8".into(), vec![0, 1 << 60], vec![]);
    });
    refused("is packed as in MXFP4", &|m| m.config = json!({}));
    let mut made = mxfp4();
    made.get("x_scales").2[13] = 255;
    let store = open(dir.path(), &made).unwrap();
    let error = store.read_all(store.get("x_blocks").unwrap()).unwrap_err();
    assert!(error.to_string().contains("scale 13 is NaN"), "{error}");
}

fn tensors(path: &Path) -> BTreeMap<String, (DType, Vec<u64>, Vec<u8>)> {
    let store = Gguf::open(path, &Limits::default()).unwrap().store;
    let read = |t: &qconv::tensor::TensorInfo| (t.dtype, t.shape.clone(), store.read_all(t).unwrap());
    store.tensors().iter().map(|t| (t.name.clone(), read(t))).collect()
}

/// The layout of DeepSeek V3: experts that are stacked, and `kv_b_proj` that falls into two parts,
/// one of them transposed, all from FP8 in blocks. The same values in F32 give the same file.
#[test]
fn fp8_goes_through_stacks_and_splits() {
    let dir = tempfile::tempdir().unwrap();
    let like = common::fixture("models/deepseek_v2-qlora");
    let mut packed = Made::of(&like);
    let mut plain = packed.clone();
    let mut random = Random(5);
    let names: Vec<String> = packed.tensors.iter().map(|(name, _)| name.clone()).collect();
    for name in names.iter().filter(|n| n.ends_with("_proj.weight") || n.ends_with("_with_mqa.weight")) {
        let shape = packed.take(name).1;
        let codes = codes(&mut random, (shape[0] * shape[1]) as usize);
        let grid = [shape[0].div_ceil(32), shape[1].div_ceil(32)];
        let scales: Vec<f32> = (0..grid[0] * grid[1]).map(|_| random.value() / 64.0).collect();
        let values = codes.iter().enumerate().map(|(i, code)| {
            let (row, col) = (i as u64 / shape[1], i as u64 % shape[1]);
            e4m3(*code) * scales[(row / 32 * grid[1] + col / 32) as usize]
        });
        *plain.get(name) = ("F32".into(), shape.clone(), f32_bytes(&values.collect::<Vec<_>>()));
        packed = packed.with(name, "F8_E4M3", &shape, &codes);
        packed = packed.with(&format!("{name}_scale_inv"), "F32", &grid, f32_bytes(&scales));
    }
    let packed = packed.quantized(json!({
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
    }));
    let mut files = Vec::new();
    for (name, made) in [("packed", packed), ("plain", plain)] {
        let (source, output) = (dir.path().join(name), dir.path().join(format!("{name}.gguf")));
        made.write(&source, &like);
        for file_type in ["f32", "bf16", "q8_0"] {
            common::convert(&source, &output, Some(file_type));
            files.push(tensors(&output));
        }
        // What is left in its own precision decides what the decoded becomes.
        common::convert(&source, &output, None);
        let automatic = tensors(&output)["blk.1.ffn_up_exps.weight"].0;
        assert_eq!(automatic, if name == "packed" { DType::BF16 } else { DType::F32 });
    }
    for (packed, plain) in files[..3].iter().zip(&files[3..]) {
        assert_eq!(packed.keys().collect::<Vec<_>>(), plain.keys().collect::<Vec<_>>());
        assert!(packed.iter().all(|(name, tensor)| *tensor == plain[name]));
    }
}

#[test]
fn mxfp4_stays_unless_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (source, output) = (common::fixture("models/gpt_oss-mxfp4"), dir.path().join("a.gguf"));
    let role = |file_type: Option<&str>| {
        common::convert(&source, &output, file_type);
        let id = Gguf::open(&output, &Limits::default()).unwrap().metadata.u64("general.file_type");
        let tensors = tensors(&output);
        (tensors["blk.0.ffn_up_exps.weight"].0, tensors["blk.0.attn_q.weight"].0, id)
    };
    assert_eq!(role(None), (DType::MXFP4, DType::BF16, Some(38)));
    assert_eq!(role(Some("f16")), (DType::F16, DType::F16, Some(1)));
    assert_eq!(role(Some("q8_0")), (DType::Q8_0, DType::Q8_0, Some(7)));
}

/// From MXFP4 in GGUF to a directory in BF16: which holds all its values.
#[test]
fn mxfp4_comes_back_in_bf16_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (source, kept, plain) =
        (common::fixture("models/gpt_oss-mxfp4"), dir.path().join("kept.gguf"), dir.path().join("f32.gguf"));
    common::convert(&source, &kept, None);
    let hf = dir.path().join("hf");
    let back = ToHf::new(kept, &hf);
    back.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
    let made = Made::of(&hf);
    assert!(made.config.get("quantization_config").is_none());
    assert!(made.tensors.iter().any(|(n, t)| n.ends_with("experts.gate_up_proj") && t.0 == "BF16"));
    common::convert(&source, &plain, Some("f32"));
    let wanted = tensors(&plain);
    common::convert(&hf, &plain, Some("f32"));
    assert!(tensors(&plain) == wanted);
}

/// An early GPTQ model says in a file of its own how it was quantized.
#[test]
fn quantize_config_json_stands_in() {
    let dir = tempfile::tempdir().unwrap();
    let like = common::fixture("models/fmt-gptq4");
    let mut made = Made::of(&like);
    let mut stated = made.config.as_object_mut().unwrap().remove("quantization_config").unwrap();
    stated.as_object_mut().unwrap().remove("quant_method");
    made.write(dir.path(), &like);
    let plan = || HfToGguf { source: dir.path().into(), ..HfToGguf::default() }.plan();
    let error = plan().unwrap_err();
    assert!(error.to_string().contains("config.json has no quantization_config"), "{error}");
    std::fs::write(dir.path().join("quantize_config.json"), stated.to_string()).unwrap();
    let notes = plan().unwrap().plan.notes;
    assert!(
        notes.iter().any(|n| n.contains("14 tensors of the source keep their codes and scales, as Q5_0")),
        "{notes:?}"
    );
}
