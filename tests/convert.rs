//! `qconv convert`: quantized checkpoints from any source. Codes and scales that are on the grid of the output
//! are moved; there and back, everything is as it was.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use checkpoint::{Made, Random};
use place::Place;
use proptest::prelude::*;
use qconv::container::gguf::Gguf;
use qconv::container::grouped::Rows;
use qconv::container::weights;
use qconv::convert::{HfToGguf, Silent, ToHf, TokenCheck, Wanted};
use qconv::error::Result;
use qconv::limits::Limits;
use qconv::packed::write::{CompressedFormat, Data, Format, Target};
use qconv::tensor::DType;
use serde_json::Value as Json;

const LLAMA: &str = "models/llama";

/// All tensors of a directory but those that were never quantized, as they are stored.
fn packed(dir: &Path) -> BTreeMap<String, (DType, Vec<u64>, Vec<u8>)> {
    let store = weights::open(dir, &Limits::default()).unwrap().store;
    let inner = store.tensors().iter().filter(|t| t.name.contains("_proj."));
    inner.map(|t| (t.name.clone(), (t.dtype, t.shape.clone(), store.read_all(t).unwrap()))).collect()
}

/// The llama fixture with random integers for matrices: negative scales and zeros among them. Where
/// `minimum` is set, zero times scale is a number of F16.
fn random_model(target: &Target, seed: u64, minimum: bool, dir: &Path) {
    let mut random = Random(seed);
    let mut made = Made::of(&common::fixture(LLAMA));
    let names: Vec<String> = made.tensors.iter().map(|(n, _)| n.clone()).collect();
    let mut sizes = Vec::new();
    for name in names.iter().filter(|n| n.ends_with("_proj.weight")) {
        let (_, shape, _) = made.take(name);
        let shape = [shape[0], shape[1]];
        sizes.push(shape);
        let layout = target.layout(&[shape], "float16").unwrap();
        let grid = *layout.grid().unwrap();
        let size = grid.shape(shape[0], shape[1]);
        let lines = (size.rows * size.groups) as usize;
        let most = grid.levels.into();
        let zeros = (0..lines).map(|_| match grid.symmetric {
            true => f32::from(grid.middle()),
            false => random.below(most).max(grid.least_zero.into()) as f32,
        });
        let rows = Rows {
            zeros: zeros.collect(),
            codes: (0..shape[0] * shape[1]).map(|_| random.below(most) as u8).collect(),
            scales: (0..lines)
                .map(|_| match minimum {
                    true => (random.below(15) as f32 - 7.0) / 256.0,
                    false => random.value() / 100.0,
                })
                .map(|s| qconv::block::f32_from_f16(qconv::block::f16_from_f32(s)))
                .collect(),
        };
        let mut rows = rows;
        if minimum {
            // Where the scale is 0, a minimum tells no zero.
            let pairs = rows.scales.iter().zip(&mut rows.zeros);
            pairs.filter(|(scale, _)| **scale == 0.0).for_each(|(_, zero)| *zero = 0.0);
        }
        let parts = layout.parts(shape[0], shape[1]).unwrap();
        let mut data: Vec<Vec<u8>> =
            parts.iter().map(|p| vec![0; p.dtype.nbytes(&p.shape).unwrap() as usize]).collect();
        let order: Vec<u32> = (0..shape[1]).map(|_| random.below(size.groups) as u32).collect();
        let given = if target.ordered { Data::Ordered(&rows, &order) } else { Data::Integers(&rows) };
        layout
            .write(shape, 0, given, &mut |part, at, bytes| {
                data[part][at as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })
            .unwrap();
        let stem = name.strip_suffix(".weight").unwrap();
        for (part, data) in parts.iter().zip(data) {
            let dtype = part.dtype.safetensors_name().unwrap();
            made = made.with(&format!("{stem}{}", part.suffix), dtype, &part.shape, data);
        }
    }
    let config = target.config(&["lm_head".into()], &sizes, "float16").unwrap().unwrap();
    made.quantized(config).write(dir, &common::fixture(LLAMA));
}

fn convert(from: &Path, to: &Path, wanted: Wanted) -> Result<()> {
    let conversion = ToHf { wanted: Some(wanted), exact_only: true, ..ToHf::new(from, to) };
    conversion.plan()?.run(true, &common::budget(), &Silent).map(drop)
}

fn to_gguf(from: &Path, to: &Path) -> Vec<DType> {
    let conversion = HfToGguf {
        source: from.to_path_buf(),
        output: Some(to.to_path_buf()),
        tokens: TokenCheck::Skipped,
        ..HfToGguf::default()
    };
    let job = conversion.plan().unwrap();
    job.run(true, &common::budget(), &Silent).unwrap();
    job.plan.tensors.iter().filter(|t| t.name.starts_with("blk.0.attn_q")).map(|t| t.dtype).collect()
}

/// What is wanted again, whatever lies between.
fn again(target: &Target) -> Wanted {
    Wanted {
        bits: Some(target.bits),
        group_size: Some(target.group_size.map_or(-1, |n| n as i64)),
        symmetric: Some(target.symmetric),
        second_version: target.second_version,
        ..Wanted::new(target.format)
    }
}

const PACK: Format = Format::Compressed(CompressedFormat::Pack);
const NAIVE: Format = Format::Compressed(CompressedFormat::Naive);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3))]
    #[test]
    fn there_and_back(seed: u64, group in prop::sample::select(vec![Some(32), Some(64), Some(128), None])) {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let grid = |format, bits, symmetric| Target {
            bits, group_size: group, symmetric, second_version: Some(!symmetric), ..Target::new(format)
        };
        let plain = |format, bits, symmetric| Target { second_version: None, ..grid(format, bits, symmetric) };
        // With act-order, columns name their groups.
        let ordered = |target: Target| Target {
            ordered: true, group_size: group.or(Some(32)), second_version: None, ..target
        };
        // What holds what, and the block type of GGUF that does, if zeros allow it.
        let pairs = [
            (grid(Format::Gptq, 4, true), vec![PACK, Format::Awq], Some(DType::Q4_0)),
            (grid(Format::Gptq, 8, true), vec![PACK, NAIVE], Some(DType::Q8_0)),
            (grid(Format::Gptq, 4, false), vec![PACK, Format::Awq], Some(DType::Q4_1)),
            (grid(Format::Gptq, 2, true), vec![PACK], None),
            (grid(Format::Gptq, 3, false), vec![PACK], None),
            (ordered(grid(Format::Gptq, 4, true)), vec![PACK, Format::Gptq], None),
            (ordered(grid(PACK, 4, false)), vec![Format::Gptq], None),
            (plain(Format::Awq, 4, false), vec![PACK, Format::Gptq], Some(DType::Q4_1)),
            (plain(PACK, 4, true), vec![Format::Gptq, Format::Awq], Some(DType::Q4_0)),
            (plain(NAIVE, 8, true), vec![Format::Gptq, PACK], Some(DType::Q8_0)),
        ];
        for (k, (a, others, block)) in pairs.iter().enumerate() {
            random_model(a, seed.wrapping_add(k as u64), *block == Some(DType::Q4_1), &path("a"));
            let wanted = packed(&path("a"));
            for other in others {
                let via = Wanted { second_version: None, ..Wanted::new(*other) };
                convert(&path("a"), &path("b"), via).unwrap_or_else(|e| panic!("{a:?} -> {other:?}: {e}"));
                convert(&path("b"), &path("c"), again(a)).unwrap_or_else(|e| panic!("{other:?} -> {a:?}: {e}"));
                prop_assert!(packed(&path("c")) == wanted, "{:?} by {:?}", a, other);
            }
            let Some(block) = block else { continue };
            prop_assert_eq!(to_gguf(&path("a"), &path("b.gguf")), [*block], "{:?}", a);
            convert(&path("b.gguf"), &path("c"), again(a)).unwrap_or_else(|e| panic!("{block} -> {a:?}: {e}"));
            prop_assert!(packed(&path("c")) == wanted, "{:?} by {}", a, block);
        }
    }
}

#[test]
fn mxfp4_goes_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = common::fixture("models/gpt_oss-mxfp4");
    let of = |dir: &Path| {
        let store = weights::open(dir, &Limits::default()).unwrap().store;
        let all = store.tensors().iter();
        all.map(|t| (t.name.clone(), (t.dtype, t.shape.clone(), store.read_all(t).unwrap())))
            .collect::<BTreeMap<_, _>>()
    };
    let wanted = of(&source);
    convert(&source, &path("copy"), Wanted::new(Format::Mxfp4)).unwrap();
    assert!(of(&path("copy")) == wanted);
    common::convert(&source, &path("m.gguf"), None);
    convert(&path("m.gguf"), &path("back"), Wanted::new(Format::Mxfp4)).unwrap();
    let back = of(&path("back"));
    assert!(back.keys().eq(wanted.keys()));
    for (name, tensor) in
        wanted.iter().filter(|(name, _)| name.ends_with("_blocks") || name.ends_with("_scales"))
    {
        assert!(back[name] == *tensor, "{name}");
    }
    // As weights of the model itself, transposed; and from there to codes that are the same, since each
    // block has a weight of the greatest magnitude or is written with a smaller scale.
    let plain = ToHf { measures: true, exact_only: true, ..ToHf::new(&source, path("plain")) };
    plain.plan().unwrap().run(false, &common::budget(), &Silent).unwrap();
    convert(&path("plain"), &path("again"), Wanted::new(Format::Mxfp4)).unwrap();
    common::convert(&path("again"), &path("again.gguf"), Some("f32"));
    common::convert(&source, &path("f32.gguf"), Some("f32"));
    let tensors = |name: &str| {
        let store = Gguf::open(path(name), &Limits::default()).unwrap().store;
        store
            .tensors()
            .iter()
            .map(|t| (t.name.clone(), store.read_all(t).unwrap()))
            .collect::<BTreeMap<_, _>>()
    };
    assert!(tensors("again.gguf") == tensors("f32.gguf"));
}

/// What stands in config.json is what was written, by the readers.
#[test]
fn every_format_is_read_back() {
    let place = Place::new();
    let source = common::fixture(LLAMA);
    let source = source.to_str().unwrap();
    let convert = |output: &str, more: &[&str]| {
        let args = [&["convert", source, "-o", output, "--json", "-q"], more].concat();
        serde_json::from_slice::<Json>(&place.succeeds(&args).stdout).unwrap()
    };
    let cases: &[(&str, &[&str], f64)] = &[
        ("gptq", &["--to", "gptq"], 2e-2),
        ("gptq-3", &["--to", "gptq", "--bits", "3", "--group-size", "32", "--asym"], 4e-2),
        ("gptq-v1", &["--to", "gptq", "--asym", "--checkpoint-format", "gptq"], 2e-2),
        ("awq", &["--to", "awq", "--group-size", "64"], 1e-2),
        ("nf4", &["--to", "bnb_4bit"], 1e-2),
        ("nf4-dq", &["--to", "bnb-nf4", "--double-quant"], 1e-2),
        ("fp4", &["--to", "bnb-fp4"], 2e-2),
        ("int8", &["--to", "bnb_8bit"], 1e-4),
        ("pack", &["--to", "compressed-tensors"], 2e-2),
        ("pack-7", &["--to", "compressed-tensors", "--bits", "7", "--group-size", "-1", "--asym"], 5e-4),
        (
            "naive",
            &["--to", "compressed-tensors", "--compressed-format", "naive-quantized", "--bits", "8"],
            1e-4,
        ),
        (
            "int",
            &[
                "--to",
                "compressed-tensors",
                "--compressed-format",
                "int-quantized",
                "--bits",
                "8",
                "--group-size",
                "-1",
            ],
            1e-4,
        ),
        ("float", &["--to", "compressed-tensors", "--compressed-format", "float-quantized"], 1e-3),
        ("fp8", &["--to", "fp8"], 1e-3),
        ("pt", &["--to", "pytorch"], 0.0),
        ("st", &["--to", "safetensors", "--dtype", "f32", "--max-shard-size", "300K"], 0.0),
    ];
    for (name, options, most) in cases {
        let summary = convert(name, options);
        let losses = summary["losses"].as_array().unwrap();
        for loss in losses {
            let (tensor, nmse) = (loss["name"].as_str().unwrap(), loss["nmse"].as_f64().unwrap());
            let rounded = tensor.contains("_proj.") && *most > 0.0;
            assert_eq!(loss["exact"], nmse == 0.0);
            // Of what goes from BF16 to F16, the smallest weights lose a little.
            assert!(nmse <= if rounded { *most } else { 1e-15 }, "{name}: {loss}");
            assert!(nmse > 0.0 || !rounded, "{name}: {loss}");
        }
        // What is said to be lost is what the readers find.
        let conversion =
            |source: &Path| ToHf { dtype: Some(DType::F32), ..ToHf::new(source, place.path("f32")) };
        let values = |source: &Path| {
            conversion(source).plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
            let of = |(name, (_, _, bytes)): (String, (DType, Vec<u64>, Vec<u8>))| {
                let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                (name, values)
            };
            packed(&place.path("f32")).into_iter().map(of).collect::<BTreeMap<_, _>>()
        };
        let (before, after) = (values(Path::new(source)), values(&place.path(name)));
        assert_eq!(before.len(), after.len(), "{name}");
        for (tensor, before) in &before {
            let square = |x: f32| f64::from(x).powi(2);
            let lost: f64 = before.iter().zip(&after[tensor]).map(|(a, b)| square(a - b)).sum();
            let nmse = lost / before.iter().map(|x| square(*x)).sum::<f64>();
            let said =
                losses.iter().find(|l| l["name"] == tensor.as_str()).unwrap()["nmse"].as_f64().unwrap();
            assert!((nmse - said).abs() <= 1e-3 * said, "{name} {tensor}: {nmse}, said {said}");
        }
        let is_quantized = *most > 0.0;
        let config: Json =
            serde_json::from_slice(&fs::read(place.path(name).join("config.json")).unwrap()).unwrap();
        assert_eq!(config.get("quantization_config").is_some(), is_quantized);
        assert!(place.path(name).join("tokenizer.json").exists());
    }
}

#[test]
fn spans_and_threads_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (name, format) in Format::NAMES.iter().filter(|(_, f)| *f != Format::Mxfp4) {
        let double_quant = *format == Format::BnbNf4;
        let wanted = Wanted { double_quant, ..Wanted::new(*format) };
        let conversion = ToHf { wanted: Some(wanted), ..ToHf::new(common::fixture("tiny-llama"), path("x")) };
        let mut found = Vec::new();
        for (threads, memory) in [(1, 1 << 30), (3, 1 << 20)] {
            let budget = qconv::convert::Budget::new(Some(threads), Some(memory)).unwrap();
            let budget = qconv::convert::Budget { strict: false, ..budget };
            conversion.plan().unwrap().run(true, &budget, &Silent).unwrap();
            found.push(fs::read(path("x").join("model.safetensors")).unwrap());
        }
        assert!(found[0] == found[1], "{name}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let place = Place::new();
    let source = common::fixture(LLAMA);
    let source = source.to_str().unwrap();
    let refused = |more: &[&str], says: &[&str]| {
        place.refuses(&[&["convert", source, "-o", "x"], more].concat(), says);
    };
    refused(&["--to", "gptq", "--group-size", "96"], &["groups of 96 do not divide rows", "--ignore"]);
    refused(&["--to", "gptq", "--bits", "5"], &["gptq has codes of 2, 3, 4, 8 bits, not of 5"]);
    refused(&["--to", "awq", "--bits", "8"], &["awq has codes of 4 bits"]);
    refused(&["--to", "gptq", "--group-size", "0"], &["--group-size 0"]);
    refused(&["--to", "fp8", "--bits", "8"], &["--bits means nothing with --to fp8"]);
    refused(&["--to", "safetensors", "--sym"], &["--sym means nothing"]);
    refused(&["--to", "mxfp4"], &["no matrix to be stored in mxfp4", "gpt-oss"]);
    refused(&["--to", "gptq", "--ignore", "."], &["no matrix to be stored in gptq"]);
    refused(&["--to", "gptq", "--exact-only"], &["14 matrices are not on the grid of gptq"]);
    refused(&["--to", "safetensors", "--dtype", "q4_0"], &["written as f32, f16 or bf16"]);
    refused(&["--to", "gptq", "--asym", "--bits", "2", "--checkpoint-format", "gptq"], &["gptq_v2"]);
    let oss = common::fixture("models/gpt_oss");
    let oss = oss.to_str().unwrap();
    let args = ["convert", oss, "-o", "x", "--to", "mxfp4", "--ignore", "layers.0.mlp"];
    place.refuses(&args, &["down_proj_blocks", "of all layers, or of none"]);
    let gpt2 = common::fixture("models/gpt2");
    place.refuses(&["convert", gpt2.to_str().unwrap(), "-o", "x", "--to", "gptq"], &["Conv1D"]);
    // Nor read: a packed matrix is the other way round.
    let mut made = Made::of(&gpt2);
    let (_, shape, _) = made.take("transformer.h.0.attn.c_proj.weight");
    let data = vec![0; (shape[0] * shape[1]) as usize];
    let made = made
        .with("transformer.h.0.attn.c_proj.weight", "I8", &shape, data)
        .with("transformer.h.0.attn.c_proj.SCB", "F32", &shape[..1], vec![0; shape[0] as usize * 4])
        .quantized(serde_json::json!({"quant_method": "bitsandbytes", "load_in_8bit": true}));
    made.write(&place.path("conv1d"), &gpt2);
    place.refuses(&["hf-to-gguf", "conv1d", "-o", "x"], &["Conv1D", "not read yet"]);
    let target = Target { group_size: Some(32), symmetric: false, ..Target::new(Format::Gptq) };
    random_model(&target, 5, false, &place.path("asym"));
    let args = ["convert", "asym", "-o", "x", "--to", "gptq", "--sym", "--exact-only"];
    place.refuses(&args, &["are not on the grid of gptq"]);
    // The first version of GPTQ's format has no zero of 0.
    let args = ["convert", "asym", "-o", "x", "--to", "gptq", "--checkpoint-format", "gptq", "--exact-only"];
    place.refuses(&args, &["are not on the grid of gptq"]);
    // FP8 is no Q8_0, and says so.
    place.succeeds(&["convert", source, "-o", "fp8", "--to", "fp8", "-q"]);
    place.succeeds(&["hf-to-gguf", "fp8", "-o", "q8.gguf", "-t", "q8_0", "--no-verify", "-q"]);
    let shown = place.succeeds(&["convert", "q8.gguf", "-o", "p", "--to", "fp8"]);
    let shown = String::from_utf8(shown.stderr).unwrap();
    assert!(shown.contains("requantized, NMSE"), "{shown}");
}

/// Loaders take the module of all experts for quantized, unless it is named.
#[test]
fn experts_that_stay_are_named() {
    let place = Place::new();
    let kept = |source: &str, to: &str, more: &[&str]| {
        let source = common::fixture(source);
        let args = ["convert", source.to_str().unwrap(), "-o", "x", "--force", "-q", "--to", to];
        place.succeeds(&[&args, more].concat());
        let config: Json = serde_json::from_slice(&fs::read(place.path("x/config.json")).unwrap()).unwrap();
        let key = if to == "fp8" { "modules_to_not_convert" } else { "ignore" };
        let kept = config["quantization_config"][key].as_array().unwrap().clone();
        kept.into_iter().filter(|m| m.as_str().unwrap().ends_with(".experts")).count()
    };
    assert_eq!(kept("models/gpt_oss", "fp8", &[]), 2);
    assert_eq!(kept("models/mixtral", "fp8", &["--ignore", "experts"]), 2);
    assert_eq!(kept("models/mixtral", "compressed-tensors", &["--group-size", "32"]), 0);
}

#[test]
fn a_directory_is_written_whole_and_not_into_itself() {
    let place = Place::new();
    let source = common::fixture(LLAMA);
    let source = source.to_str().unwrap();
    let convert = |more: &[&'static str]| [&["convert", source, "-q"], more].concat();
    place.succeeds(&convert(&["-o", "x", "--to", "safetensors", "--max-shard-size", "200K"]));
    assert!(place.path("x/model.safetensors.index.json").exists());
    place.refuses(&["convert", "x", "-o", "x", "--to", "pytorch", "--force"], &["overwrite its own input"]);
    place.refuses(
        &["convert", "x/config.json", "-o", "x", "--to", "gptq", "--force"],
        &["overwrite its own input"],
    );
    // What readers would take for a part of the new model goes; the rest stays.
    fs::write(place.path("x/notes.txt"), "mine").unwrap();
    place.succeeds(&convert(&["-o", "x", "--to", "gptq", "--force"]));
    assert!(place.path("x/notes.txt").exists() && place.path("x/quantize_config.json").exists());
    place.succeeds(&convert(&["-o", "x", "--to", "safetensors", "--force"]));
    let names: Vec<String> = fs::read_dir(place.path("x"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("safetensors") || n.starts_with("quantize"))
        .collect();
    assert_eq!(names, ["model.safetensors"]);
}

#[test]
fn names_and_plans_are_shown() {
    let place = Place::new();
    fs::create_dir(place.path("m")).unwrap();
    for entry in fs::read_dir(common::fixture(LLAMA)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), place.path("m").join(entry.file_name())).unwrap();
    }
    let shown = place.succeeds(&["convert", "m", "--to", "gptq", "--dry-run", "--json"]);
    let shown: Json = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["output"], "m-gptq-w4-g128");
    assert!(!place.path("m-gptq-w4-g128").exists());
    let packed = shown["tensors"].as_array().unwrap().iter().filter(|t| t["type"] == "gptq");
    assert_eq!(packed.count(), 14);
    let shown = place.succeeds(&["convert", "m/model.safetensors", "--to", "nf4", "--dry-run", "--json"]);
    let shown: Json = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["output"], "m-bnb-nf4");
    place.succeeds(&["convert", "m", "--to", "compressed-tensors", "--bits", "8", "--group-size=-1", "-q"]);
    assert!(place.path("m-compressed-tensors-w8-channel/model.safetensors").exists());
    let args = ["convert", "m", "--to", "awq", "--ignore", "down_proj$", "-o", "x", "-q"];
    place.succeeds(&args);
    let config: Json = serde_json::from_slice(&fs::read(place.path("x/config.json")).unwrap()).unwrap();
    let kept = config["quantization_config"]["modules_to_not_convert"].to_string();
    assert!(kept.contains("model.layers.1.mlp.down_proj") && kept.contains("lm_head"), "{kept}");
    let store = weights::open(&place.path("x"), &Limits::default()).unwrap().store;
    assert!(store.get("model.layers.0.mlp.down_proj.weight").is_some());
}
