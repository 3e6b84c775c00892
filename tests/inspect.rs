//! What `inspect` says of quantized checkpoints: those that the libraries made (`fixtures/packed`,
//! `fixtures/hqq`), whole models, and such as contradict themselves.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use checkpoint::Made;
use qconv::ErrorKind::Malformed;
use qconv::container::safetensors;
use qconv::inspect::{Quantization, Report, inspect};
use qconv::limits::Limits;
use serde_json::{Value as Json, json};

fn report(path: &Path) -> Report {
    inspect(path, &Limits::default()).unwrap()
}

fn quantization(path: &Path) -> Quantization {
    report(path).quantization.unwrap()
}

/// File, method, bits, block, symmetric, act-order, bits per weight of a matrix `[32, 64]`.
type Expected = (&'static str, &'static str, u32, [u64; 2], bool, Option<bool>, f64);

const OF_LIBRARIES: &[Expected] = &[
    // Besides the codes: 16 bits of scale and 4 of zero for 32 weights, 32 of g_idx for a column.
    ("gptq4-act", "gptq", 4, [1, 32], true, Some(true), 4.0 + 20.0 / 32.0 + 1.0),
    ("gptq4-asym-v2", "gptq", 4, [1, 32], false, Some(false), 5.625),
    ("gptq4-row", "gptq", 4, [1, 0], true, Some(false), 4.0 + 20.0 / 64.0 + 1.0),
    ("gptq3", "gptq", 3, [1, 32], true, Some(false), 3.0 + 19.0 / 32.0 + 1.0),
    ("awq", "awq", 4, [1, 32], false, None, 4.0 + 20.0 / 32.0),
    ("auto-round", "auto-round", 4, [1, 32], true, None, 4.625),
    // Two numbers of 64 bits for the shape.
    ("pack5", "compressed-tensors", 5, [1, 32], true, None, 5.5 + 128.0 / 2048.0),
    ("pack3-asym", "compressed-tensors", 3, [1, 32], false, None, 3.5 + 3.0 / 32.0 + 128.0 / 2048.0),
    ("int-tensor", "compressed-tensors", 8, [0, 0], true, None, 8.0 + 16.0 / 2048.0),
    ("float-channel", "compressed-tensors", 8, [1, 0], true, None, 8.25),
    ("float-block", "compressed-tensors", 8, [16, 32], true, None, 8.0 + 4.0 * 16.0 / 2048.0),
    ("nvfp4", "compressed-tensors", 4, [1, 16], true, None, 4.5 + 32.0 / 2048.0),
    ("fp8-tensor", "fp8", 8, [0, 0], true, None, 8.0 + 32.0 / 2048.0),
    ("fp8-ue8m0", "fp8", 8, [16, 32], true, None, 8.0 + 4.0 * 8.0 / 2048.0),
    ("int8", "bitsandbytes", 8, [1, 0], true, None, 8.5 + 8.0 / 2048.0),
    ("bitnet", "bitnet", 2, [0, 0], true, None, 2.0 + 16.0 / 2048.0),
    ("mxfp4-linear", "compressed-tensors", 4, [1, 32], true, None, 4.25),
];

#[test]
fn each_matrix_of_the_libraries() {
    for &(name, method, bits, block, symmetric, act_order, bits_per_weight) in OF_LIBRARIES {
        let path = common::fixture("packed").join(format!("{name}.safetensors"));
        let file = safetensors::open(&path, &Limits::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::copy(&path, dir.path().join("model.safetensors")).unwrap();
        let said = &file.metadata[0]["quantization_config"];
        fs::write(dir.path().join("config.json"), format!("{{\"quantization_config\": {said}}}")).unwrap();
        let q = quantization(dir.path());
        assert_eq!((q.method.as_str(), q.act_order), (method, act_order), "{name}: {:?}", q.error);
        let [matrix] = &q.matrices[..] else { panic!("{name}: {:?}", q.matrices) };
        assert_eq!((matrix.bits, matrix.block, matrix.symmetric), (bits, block, Some(symmetric)), "{name}");
        assert_eq!((matrix.name.as_str(), &matrix.shape[..]), ("p.weight", &[32, 64][..]), "{name}");
        assert!(
            (matrix.bits_per_weight - bits_per_weight).abs() < 1e-9,
            "{name}: {}",
            matrix.bits_per_weight
        );
        // All but the values that the library decodes belongs to the matrix.
        let raw = file.store.tensors();
        let parts: Vec<_> = raw.iter().map(|t| &t.name).filter(|name| *name != "expected").collect();
        let mut found: Vec<_> = matrix.parts.keys().collect();
        found.sort();
        assert_eq!(found, parts, "{name}");
        assert_eq!(
            q.unquantized.iter().map(|o| o.pattern.as_str()).collect::<Vec<_>>(),
            ["expected"],
            "{name}"
        );
    }
}

#[test]
fn blocks_as_wide_as_rows_are_blocks() {
    let dir = tempfile::tempdir().unwrap();
    Made::new(json!({}))
        .with("p.weight", "F8_E4M3", &[4, 8], [0x38; 32])
        .with("p.weight_scale_inv", "F32", &[2, 1], [0; 8])
        .quantized(json!({"quant_method": "fp8", "weight_block_size": [2, 8]}))
        .write(dir.path(), dir.path());
    let q = quantization(dir.path());
    assert_eq!((q.matrices[0].bits, q.matrices[0].block), (8, [2, 8]), "{:?}", q.error);
}

#[test]
fn hqq_in_both_forms() {
    for form in ["hqq/qmodel", "hqq/safetensors"] {
        let q = quantization(&common::fixture(form));
        assert_eq!(q.method, "hqq");
        let kinds: Vec<_> = q.matrices.iter().map(|m| (m.bits, m.block, m.symmetric)).collect();
        assert_eq!(kinds.len(), 8);
        for kind in [(8, [1, 16]), (1, [1, 8]), (4, [64, 1]), (4, [1, 64]), (2, [1, 0])] {
            assert!(kinds.contains(&(kind.0, kind.1, Some(false))), "{form}: {kind:?} {kinds:?}");
        }
    }
}

#[test]
fn a_model_as_a_whole() {
    let dir = common::fixture("models/fmt-gptq4");
    let report = report(&dir);
    let q = report.quantization.as_ref().unwrap();
    let (packed, whole) = (q.packed.as_ref().unwrap(), q.whole.as_ref().unwrap());
    assert_eq!((packed.tensors, q.matrices.len()), (14, 14));
    let [kind] = &q.kinds[..] else { panic!("{:?}", q.kinds) };
    assert_eq!((kind.bits, kind.block, kind.symmetric, kind.sums.tensors), (4, [1, 32], Some(false), 14));
    // Every byte is counted once, and every stored tensor is listed as ever.
    let bytes: u64 = report.tensors.iter().map(|t| t.bytes).sum();
    assert_eq!(whole.bytes, bytes);
    assert_eq!(whole.bytes - packed.bytes, q.unquantized.iter().map(|o| o.sums.bytes).sum::<u64>());
    assert!(report.tensors.iter().any(|t| t.name == "model.layers.1.mlp.down_proj.qzeros"));
    let parameters: u64 = q.matrices.iter().map(|m| m.shape.iter().product::<u64>()).sum();
    assert_eq!(packed.parameters, parameters);
    let others = q.unquantized.iter().map(|o| o.sums.parameters).sum::<u64>();
    assert_eq!((whole.parameters, report.totals.parameters), (parameters + others, parameters + others));
    let norms = q.unquantized.iter().find(|o| o.pattern == "model.layers.*.input_layernorm.weight").unwrap();
    assert_eq!((norms.sums.tensors, &norms.types[..]), (2, &["BF16"][..]));
}

fn qconv(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qconv")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_command_shows_it() {
    let dir = common::fixture("models/fmt-gptq4");
    let dir = dir.to_str().unwrap();
    let shown = text(&qconv(&["inspect", dir]).stdout);
    for line in [
        "quantization: gptq",
        "  act-order: no",
        "  packed: 14 matrices, ",
        "    4 bits, groups of 32, asymmetric: 14 matrices, ",
        "    model.layers.*.input_layernorm.weight ",
        "4 bits, groups of 32, asymmetric; qweight I32, qzeros I32, scales F16, g_idx I32",
    ] {
        assert!(shown.contains(line), "{line:?} is not in:\n{shown}");
    }
    let some = text(&qconv(&["inspect", dir, "--tensor", r"1\.mlp\.up_proj"]).stdout);
    assert_eq!(some.matches("groups of 32").count(), 1, "{some}");
    let metadata = text(&qconv(&["inspect", dir, "--metadata"]).stdout);
    assert!(metadata.contains("packed: 14") && !metadata.contains("up_proj.qweight"), "{metadata}");
    let of = |args: &[&str]| -> Json {
        let output = qconv(&[&["inspect", dir, "--json"], args].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let all = of(&[]);
    assert_eq!(all["quantization"]["matrices"].as_array().unwrap().len(), 14);
    assert_eq!(all["quantization"]["matrices"][0]["parts"].as_object().unwrap().len(), 4);
    assert_eq!(all["quantization"]["kinds"][0]["block"], json!([1, 32]));
    assert_eq!(of(&["--tensor", r"\.0\.mlp"])["quantization"]["matrices"].as_array().unwrap().len(), 3);
    assert!(of(&["--metadata"])["quantization"]["matrices"].as_array().unwrap().is_empty());
    let plain = common::fixture("models/llama");
    let plain = qconv(&["inspect", plain.to_str().unwrap(), "--json"]);
    let plain: Json = serde_json::from_slice(&plain.stdout).unwrap();
    assert!(plain.get("quantization").is_none());
}

/// The model with something changed: what is there is listed, whatever is wrong.
#[test]
fn contradictions_are_errors_behind_the_listing() {
    let source = common::fixture("models/fmt-gptq4");
    let case = |change: &dyn Fn(&mut Made), code: i32, says: &str| {
        let mut made = Made::of(&source);
        change(&mut made);
        let dir = tempfile::tempdir().unwrap();
        made.write(dir.path(), &source);
        let output = qconv(&["inspect", dir.path().to_str().unwrap()]);
        let (shown, error) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{says}: {error}");
        assert!(shown.contains("mlp.down_proj.scales") && shown.contains(says), "{says}:\n{shown}");
        assert_eq!(error.contains(says), code != 0, "{error}");
        quantization(dir.path())
    };
    let lacking = |m: &mut Made| drop(m.take("model.layers.0.mlp.up_proj.qzeros"));
    let q = case(&lacking, 2, "model.layers.0.mlp.up_proj.qzeros\" is missing");
    assert_eq!(q.contradiction.unwrap().kind(), Malformed);
    assert!(q.packed.is_none() && q.matrices.is_empty());
    let group = |m: &mut Made| m.config["quantization_config"]["group_size"] = json!(64);
    case(&group, 2, "was expected");
    let unsaid = |m: &mut Made| drop(m.config.as_object_mut().unwrap().remove("quantization_config"));
    case(&unsaid, 2, "is packed as in GPTQ, but config.json has no quantization_config");
    // What is only unknown is no fault of the model.
    let unknown = |m: &mut Made| m.config["quantization_config"]["quant_method"] = json!("quip");
    assert_eq!(case(&unknown, 0, "quantized by quip cannot be read").method, "quip");
}

#[test]
fn a_packed_file_alone_is_listed_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.safetensors");
    fs::copy(common::fixture("packed/gptq4.safetensors"), &path).unwrap();
    let report = report(&path);
    assert!(report.quantization.is_none());
    let names: Vec<_> = report.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["expected", "p.g_idx", "p.qweight", "p.qzeros", "p.scales"]);
    let hqq = self::report(&common::fixture("hqq/qmodel/qmodel.pt"));
    assert!(hqq.tensors.iter().any(|t| t.name == "model.layers.0.mlp.up_proj.W_q"));
}
