//! Damage to Core ML packages that `verify` finds: each by the check that is for it, and named.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::fixture;
use qconv::container::coreml::mil::{
    Argument, Binding, Dimension, Function, NamedValueType, Operation, Stored, TensorType, Value, ValueType,
};
use qconv::container::coreml::package::{MANIFEST, MODEL, WEIGHTS};
use qconv::container::coreml::{Model, Only, decode, encode};
use qconv::convert::{Forms, Matrices, Profile, Silent, ToCoreml, TokenCheck};
use qconv::verify::{Options, Outcome, Report, verify};
use serde_json::Value as Json;
use tempfile::TempDir;

const SOURCE: &str = "models/llama";

/// A package, of 4 bits for `gpu`, of a palette of 2 bits for `ane`.
struct Package {
    _dir: TempDir,
    path: PathBuf,
}

impl Package {
    fn new(profile: Profile) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mlpackage");
        let bits = match profile {
            Profile::Gpu => Matrices::Integers(4),
            Profile::Ane => Matrices::Palette(2),
        };
        let (output, forms, context) = (Some(path.clone()), Forms::new(bits), Some(128));
        let job = ToCoreml { output, profile, forms, context, ..ToCoreml::new(fixture(SOURCE)) };
        job.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
        Self { _dir: dir, path }
    }

    fn model(&self) -> Model {
        decode(&fs::read(self.path.join(MODEL)).unwrap()).unwrap().0
    }

    /// What `verify` finds when a file is replaced for a while.
    fn with(&self, file: &str, bytes: Option<&[u8]>) -> Report {
        let at = self.path.join(file);
        let whole = fs::read(&at).unwrap();
        match bytes {
            Some(bytes) => fs::write(&at, bytes).unwrap(),
            None => fs::remove_file(&at).unwrap(),
        }
        let report = check(&self.path);
        fs::write(&at, whole).unwrap();
        report
    }

    fn with_model(&self, change: impl FnOnce(&mut Model)) -> Report {
        let mut model = self.model();
        change(&mut model);
        self.with(MODEL, Some(&encode(&model)))
    }

    fn with_weights(&self, change: impl FnOnce(&mut Vec<u8>)) -> Report {
        let mut bytes = fs::read(self.path.join(WEIGHTS)).unwrap();
        change(&mut bytes);
        self.with(WEIGHTS, Some(&bytes))
    }

    fn with_manifest(&self, change: impl FnOnce(&mut Json)) -> Report {
        let mut json: Json = serde_json::from_slice(&fs::read(self.path.join(MANIFEST)).unwrap()).unwrap();
        change(&mut json);
        self.with(MANIFEST, Some(&serde_json::to_vec(&json).unwrap()))
    }
}

fn check(path: &Path) -> Report {
    check_with(path, |_| {})
}

fn check_with(path: &Path, change: impl FnOnce(&mut Options)) -> Report {
    let mut options =
        Options { against: Some(fixture(SOURCE)), tokens: TokenCheck::Skipped, ..Options::new(path) };
    change(&mut options);
    verify(&options, &common::budget(), &Silent).unwrap()
}

/// That this check failed, and no other, with these words.
fn caught(report: &Report, name: &str, words: &str) {
    let failed: Vec<_> = report.checks.iter().filter(|c| c.outcome == Outcome::Failed).collect();
    assert!(
        failed.len() == 1 && failed[0].name == name && failed[0].detail.contains(words),
        "{name}: {words:?} was expected: {:#?}",
        report.checks
    );
}

fn function<'a>(model: &'a mut Model, name: &str) -> &'a mut Function {
    model.program.functions.get_mut(name).unwrap()
}

fn operations<'a>(model: &'a mut Model, name: &str) -> &'a mut Vec<Operation> {
    let function = function(model, name);
    let opset = function.opset.clone();
    &mut function.block_specializations.get_mut(&opset).unwrap().operations
}

/// The first operation of a kind.
fn first<'a>(model: &'a mut Model, function: &str, kind: &str) -> &'a mut Operation {
    operations(model, function).iter_mut().find(|o| o.kind == kind).unwrap()
}

fn named<'a>(model: &'a mut Model, function: &str, name: &str) -> &'a mut Operation {
    let of = |o: &&mut Operation| o.outputs.first().is_some_and(|first| first.name == name);
    operations(model, function).iter_mut().find(of).unwrap()
}

/// The value that a parameter of an operation is stored as.
fn value<'a>(operation: &'a mut Operation, parameter: &str) -> &'a mut Value {
    if operation.kind == "const" {
        return operation.attributes.get_mut("val").unwrap();
    }
    match &mut operation.inputs.get_mut(parameter).unwrap().0[..] {
        [Binding::Value(value)] => value,
        other => panic!("{other:?}"),
    }
}

fn offset<'a>(operation: &'a mut Operation, parameter: &str) -> &'a mut u64 {
    match &mut value(operation, parameter).stored {
        Stored::Blob(at) => &mut at.offset,
        other => panic!("{other:?}"),
    }
}

fn bind(name: &str) -> Argument {
    Only(vec![Binding::Name(name.into())])
}

fn tensor(output: &mut NamedValueType) -> &mut TensorType {
    match &mut output.value_type {
        ValueType::Tensor(tensor) => tensor,
        other => panic!("{other:?}"),
    }
}

/// Where the data of a blob are that a weight's parameter is stored in.
fn data(package: &Package, function: &str, weight: &str, parameter: &str) -> usize {
    *offset(named(&mut package.model(), function, weight), parameter) as usize + 64
}

#[test]
fn sound_packages_pass() {
    for profile in [Profile::Gpu, Profile::Ane] {
        let report = check(&Package::new(profile).path);
        assert!(report.passed(), "{:#?}", report.checks);
        let names: Vec<&str> = report.checks.iter().map(|c| c.name).collect();
        assert_eq!(
            names,
            ["package", "blobs", "program", "states", "tensors", "tokens", "forward", "logits"]
        );
        assert_eq!(report.tensors.len(), 21);
        let palette = report.tensors.iter().filter(|t| t.encoding.as_deref().unwrap().contains("palette"));
        assert_eq!(palette.count(), if profile == Profile::Gpu { 0 } else { 16 });
    }
}

/// A model in four packages.
#[test]
fn of_several_packages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let job = ToCoreml {
        output: Some(path.clone()),
        profile: Profile::Ane,
        context: Some(96),
        chunk_size: 500_000,
        ..ToCoreml::new(fixture(SOURCE))
    };
    job.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
    let report = check(&path);
    assert!(report.passed() && report.checks[0].detail.contains("4 packages"), "{:#?}", report.checks);
    let at = path.join("chunks.json");
    let whole = fs::read_to_string(&at).unwrap();
    fs::write(&at, whole.replace("chunk_03_layers_1_1", "chunk_02_layers_0_0")).unwrap();
    caught(&check(&path), "package", "\"chunk_02_layers_0_0.mlpackage\" comes twice");
    let mut json: Json = serde_json::from_str(&whole).unwrap();
    json["packages"].as_array_mut().unwrap().remove(2);
    fs::write(&at, json.to_string()).unwrap();
    caught(
        &check(&path),
        "package",
        "chunks.json does not name the package \"chunk_03_layers_1_1.mlpackage\"",
    );
    // Layers in another order, whatever is said of them.
    let exchanged = |fields: &[&str]| {
        let mut json: Json = serde_json::from_str(&whole).unwrap();
        let packages = json["packages"].as_array_mut().unwrap();
        for field in fields {
            let [second, third] = [1, 2].map(|n| packages[n][field].clone());
            (packages[1][field], packages[2][field]) = (third, second);
        }
        fs::write(&at, json.to_string()).unwrap();
        check(&path)
    };
    caught(&exchanged(&["package"]), "package", "is said to hold the layers 0..1, it has weights of [1]");
    caught(&exchanged(&["package", "layers"]), "package", "begins with layer 0, behind one that has layer 1");
    fs::write(&at, json.to_string()).unwrap();
    fs::rename(path.join("chunk_03_layers_1_1.mlpackage"), dir.path().join("gone")).unwrap();
    caught(&check(&path), "tensors", "tensor \"blk.1.attn_norm.weight\" of the source is missing");
    fs::write(&at, whole).unwrap();
    caught(&check(&path), "package", "chunk_03_layers_1_1.mlpackage");
}

#[test]
fn of_the_package() {
    let package = Package::new(Profile::Gpu);
    let missing = package.with_manifest(|json| {
        let items = json["itemInfoEntries"].as_object_mut().unwrap();
        items.retain(|_, item| item["name"] == "model.mlmodel");
    });
    caught(&missing, "package", "in none of the items that the manifest lists");
    let missing = package.with_manifest(|json| {
        let items = json["itemInfoEntries"].as_object_mut().unwrap();
        items.values_mut().for_each(|item| drop(item.as_object_mut().unwrap().remove("author")));
    });
    caught(&missing, "package", "author");
    caught(&package.with(MANIFEST, None), "package", "Manifest.json");
    caught(&package.with(MODEL, None), "package", "model.mlmodel");
    let bytes = fs::read(package.path.join(MODEL)).unwrap();
    caught(&package.with(MODEL, Some(&bytes[..bytes.len() - 1])), "package", "model.mlmodel");
    // Field 77 of the model, a number.
    let more = [&bytes[..], &[0xe8, 0x04, 1]].concat();
    caught(&package.with(MODEL, Some(&more)), "package", "fields that are not known");
}

#[test]
fn of_the_weight_file() {
    let package = Package::new(Profile::Gpu);
    let weight = "blk_0_attn_q_weight";
    caught(&package.with(WEIGHTS, None), "blobs", "weight.bin");
    let off = package.with_model(|model| *offset(named(model, "main", weight), "data") += 64);
    caught(&off, "blobs", "no blob's record begins at byte");
    // Another blob of the same type and size: its own is no longer of use.
    let other = package.with_model(|model| {
        let at = *offset(named(model, "main", "blk_1_attn_q_weight"), "data");
        *offset(named(model, "main", weight), "data") = at;
    });
    caught(&other, "blobs", "is no value's");
    let wrong = package.with_model(|model| {
        let at = *offset(named(model, "main", weight), "scale");
        *offset(named(model, "main", weight), "data") = at;
    });
    caught(&wrong, "blobs", "has elements of type fp16, int4 were expected");
    let at = data(&package, "main", weight, "data");
    caught(&package.with_weights(|bytes| bytes[at - 64] = 0), "blobs", "begins with");
    caught(&package.with_weights(|bytes| bytes[at - 48] += 64), "blobs", "puts its data at");
    caught(&package.with_weights(|bytes| bytes.truncate(bytes.len() - 1)), "blobs", "lie beyond");
    caught(&package.with_weights(|bytes| bytes[0] -= 1), "blobs", "");
}

#[test]
fn of_the_program() {
    let package = Package::new(Profile::Gpu);
    let q = "blk_0_attn_q";
    let kind = package.with_model(|model| first(model, "main", "silu").kind = "siluu".into());
    caught(&kind, "program", "the operation siluu is not known");
    let name =
        package.with_model(|model| drop(named(model, "main", q).inputs.insert("x".into(), bind("nowhere"))));
    caught(&name, "program", "linear \"blk_0_attn_q\": x: \"nowhere\" is no value before it");
    let order = package.with_model(|model| {
        let all = operations(model, "main");
        let at = all.iter().position(|o| o.kind == "linear").unwrap();
        let linear = all.remove(at);
        all.insert(0, linear);
    });
    caught(&order, "program", "is no value before it");
    let twice = package.with_model(|model| {
        let again = named(model, "main", q).clone();
        operations(model, "main").push(again);
    });
    caught(&twice, "program", "\"blk_0_attn_q\" is there already");
    let missing = package.with_model(|model| drop(first(model, "main", "gather").inputs.remove("indices")));
    caught(&missing, "program", "indices is missing");
    let shape = package.with_model(|model| {
        let dimensions = &mut tensor(&mut named(model, "main", q).outputs[0]).dimensions;
        *dimensions.last_mut().unwrap() = Dimension::Constant(Only(32));
    });
    caught(&shape, "program", "is declared as fp16[1,?,32], the operation gives fp16[1,?,128]");
    let weight = package.with_model(|model| {
        let down = bind("blk_0_ffn_down_weight");
        named(model, "main", q).inputs.insert("weight".into(), down);
    });
    caught(&weight, "program", "linear \"blk_0_attn_q\"");
    let lost = package.with_model(|model| named(model, "main", q).attributes.clear());
    caught(&lost, "program", "it has no attribute name");
    let opset = package.with_model(|model| model.specification_version = 8);
    caught(&opset, "program", "the model's specification is 8");
    let output = package.with_model(|model| {
        let main = function(model, "main");
        main.block_specializations.get_mut("CoreML8").unwrap().outputs = vec!["logitz".into()];
    });
    caught(&output, "program", "its output \"logitz\" is no value");
}

#[test]
fn of_the_description() {
    let package = Package::new(Profile::Ane);
    let swapped = package.with_model(|model| {
        let infer = model.program.functions.remove("infer").unwrap();
        let prefill = model.program.functions.insert("prefill".into(), infer).unwrap();
        model.program.functions.insert("infer".into(), prefill);
    });
    caught(&swapped, "program", "function \"infer\": input");
    let missing = package.with_model(|model| drop(model.description.functions[0].output.pop()));
    caught(&missing, "program", "are described, it gives");
    let missing = package.with_model(|model| drop(model.description.functions[0].state.pop()));
    caught(&missing, "program", "goes into the function, and is not described");
    let missing = package.with_model(|model| drop(model.description.functions.pop()));
    caught(&missing, "program", "are described, there are [\"infer\", \"prefill\"]");
    let default = package.with_model(|model| model.description.default_function_name = "main".into());
    caught(&default, "program", "the default function \"main\" is none of");
    let package = Package::new(Profile::Gpu);
    let kind = package.with_model(|model| model.description.input[0].name = "ids".into());
    caught(&kind, "program", "the input \"ids\" is described, which the function has not");
    let range = package.with_model(|model| {
        use qconv::container::coreml::model::{FeatureKind, Flexibility};
        let FeatureKind::MultiArray(array) = &mut model.description.input[0].feature_type.kind else {
            panic!("no array")
        };
        array.flexibility = Flexibility::None;
    });
    caught(&range, "program", "is described with the shape [1");
}

#[test]
fn of_states() {
    let package = Package::new(Profile::Gpu);
    // The second layer builds on what was read at the beginning.
    let stale = package.with_model(|model| {
        let begin = first(model, "main", "read_state").outputs[0].name.clone();
        let state = first(model, "main", "read_state").inputs["input"].clone();
        let all = operations(model, "main");
        let written: Vec<String> = all
            .iter()
            .filter(|o| o.kind == "write_state" && o.inputs["input"] == state)
            .map(|o| match &o.inputs["data"].0[..] {
                [Binding::Name(name)] => name.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        named(model, "main", &written[1]).inputs.insert("x".into(), bind(&begin));
    });
    caught(&stale, "states", "was read of it before it was last written");
    let lost = package.with_model(|model| {
        let all = operations(model, "main");
        let at = all.iter().rposition(|o| o.kind == "write_state").unwrap();
        all.remove(at);
    });
    caught(&lost, "states", "row 1 of the state");
    // Attention reads keys as they were before those of this call.
    let old = package.with_model(|model| {
        let begin = first(model, "main", "read_state").outputs[0].name.clone();
        let all = operations(model, "main");
        let written = all.iter().position(|o| o.kind == "write_state").unwrap();
        let now = all[written + 1..].iter().find(|o| o.kind == "read_state").unwrap().outputs[0].name.clone();
        let of = |o: &&mut Operation| o.kind == "slice_by_index" && o.inputs["x"] == bind(&now);
        let slice = all.iter_mut().find(of).unwrap();
        slice.inputs.insert("x".into(), bind(&begin));
    });
    caught(&old, "states", "takes row 0 of the state");
    // Keys and values go into each other's state.
    let mixed = package.with_model(|model| {
        let all = operations(model, "main");
        let at: Vec<usize> = (0..all.len()).filter(|i| all[*i].kind == "write_state").collect();
        let data = all[at[0]].inputs["data"].clone();
        all[at[1]].inputs.insert("data".into(), data);
    });
    assert!(!mixed.passed());
    let package = Package::new(Profile::Ane);
    let never = package.with_model(|model| {
        operations(model, "infer").retain(|o| o.kind != "write_state");
    });
    caught(&never, "states", "is never written");
}

#[test]
fn of_weights() {
    let package = Package::new(Profile::Gpu);
    let weight = "blk_0_attn_q_weight";
    let codes = data(&package, "main", weight, "data");
    // Codes packed from the wrong end.
    let order = package.with_weights(|bytes| {
        bytes[codes..codes + 2048].iter_mut().for_each(|b| *b = b.rotate_left(4));
    });
    caught(&order, "tensors", "tensor \"blk.0.attn_q.weight\"");
    // One code.
    let one = package.with_weights(|bytes| bytes[codes + 100] ^= 0x04);
    caught(
        &one,
        "tensors",
        "\"blk.0.attn_q.weight\" (int4, a scale per 1 x 32): 1 values are not the nearest",
    );
    let scale = data(&package, "main", weight, "scale");
    // The exponent of a scale: its codes are the wrong ones now.
    caught(
        &package.with_weights(|bytes| bytes[scale + 1] ^= 0x04),
        "tensors",
        "tensor \"blk.0.attn_q.weight\"",
    );
    caught(&package.with_weights(|bytes| bytes[scale + 1] |= 0x7c), "tensors", "NaN or infinite");
    // A scale of zero makes any code the nearest.
    for scales in [1, 128] {
        let zero = package.with_weights(|bytes| bytes[scale..scale + 2 * scales].fill(0));
        caught(&zero, "tensors", &format!("{scales} of what shares a scale"));
    }
    // Two weights of the same shape.
    let exchanged = package.with_model(|model| {
        for parameter in ["data", "scale"] {
            let at = ["blk_0_attn_k_weight", "blk_0_attn_v_weight"]
                .map(|name| *offset(named(model, "main", name), parameter));
            *offset(named(model, "main", "blk_0_attn_k_weight"), parameter) = at[1];
            *offset(named(model, "main", "blk_0_attn_v_weight"), parameter) = at[0];
        }
    });
    caught(&exchanged, "tensors", "tensor \"blk.0.attn_k.weight\"");
    let norm = data(&package, "main", "blk_1_ffn_norm_weight", "val");
    caught(
        &package.with_weights(|bytes| bytes[norm] ^= 1),
        "tensors",
        "tensor \"blk.1.ffn_norm.weight\" (fp16)",
    );
    let table = data(&package, "main", "rope_sin_0", "val");
    caught(&package.with_weights(|bytes| bytes[table + 40] ^= 1), "tensors", "the table \"rope_sin.0\"");

    let package = Package::new(Profile::Ane);
    let table = data(&package, "infer", weight, "lut");
    let zero = package.with_weights(|bytes| bytes[table..table + 8].fill(0));
    caught(&zero, "tensors", "\"blk.0.attn_q.weight\" (2-bit palette per 8 rows): 1 of what shares a scale");
    // What only the second function reads is looked at, too.
    let norms = ["blk_0_attn_norm_weight", "blk_1_attn_norm_weight"];
    let norms_at = norms.map(|name| data(&package, "infer", name, "val"));
    let mut model = package.model();
    *offset(named(&mut model, "infer", norms[0]), "val") = norms_at[1] as u64 - 64;
    let (of_model, of_weights) = (package.path.join(MODEL), package.path.join(WEIGHTS));
    let whole = [&of_model, &of_weights].map(|path| fs::read(path).unwrap());
    let mut bytes = whole[1].clone();
    bytes[norms_at[0] + 1] |= 0x7c;
    fs::write(&of_model, encode(&model)).unwrap();
    fs::write(&of_weights, bytes).unwrap();
    let second = check_with(&package.path, |options| options.against = None);
    caught(&second, "tensors", "weight \"blk_0_attn_norm_weight\": 1 values are NaN");
    [&of_model, &of_weights]
        .into_iter()
        .zip(&whole)
        .for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    let indices = data(&package, "infer", weight, "indices");
    let one = package.with_weights(|bytes| bytes[indices + 100] ^= 0x10);
    caught(&one, "tensors", "(2-bit palette per 8 rows): 1 values are not the nearest");
    let differing = package.with_model(|model| {
        let at = ["blk_0_attn_k_weight", "blk_0_attn_v_weight"]
            .map(|name| *offset(named(model, "infer", name), "indices"));
        *offset(named(model, "infer", "blk_0_attn_k_weight"), "indices") = at[1];
    });
    caught(&differing, "tensors", "have different weights \"blk_0_attn_k_weight\"");
}

#[test]
fn of_what_is_computed() {
    // Functions for one token and for many no longer compute the same.
    let package = Package::new(Profile::Ane);
    let other = package.with_model(|model| first(model, "infer", "silu").kind = "sigmoid".into());
    caught(&other, "forward", "one by one they differ");
    #[cfg(feature = "ggml")]
    {
        let package = Package::new(Profile::Gpu);
        let other = package.with_model(|model| {
            operations(model, "main")
                .iter_mut()
                .filter(|o| o.kind == "silu")
                .for_each(|o| o.kind = "sigmoid".into());
        });
        caught(&other, "logits", "they differ from those of the source");
    }
}

/// The tokenizer beside a package is the source's.
#[test]
fn of_the_tokenizer() {
    let package = Package::new(Profile::Gpu);
    let dir = package.path.parent().unwrap();
    let check = |tokens: TokenCheck| {
        check_with(&package.path, |options| {
            options.tokens = tokens;
            options.forward = false;
        })
    };
    let report = check(TokenCheck::Required);
    assert!(report.passed() && report.checks[5].detail.contains("as in the source"), "{:#?}", report.checks);
    let at = dir.join("tokenizer.json");
    let whole = fs::read(&at).unwrap();
    let mut json: Json = serde_json::from_slice(&whole).unwrap();
    // The same tokens, and half of the merges.
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.truncate(merges.len() / 2);
    fs::write(&at, json.to_string()).unwrap();
    caught(&check(TokenCheck::Required), "tokens", "divides a text into other tokens");
    let report = check(TokenCheck::Lenient);
    assert!(report.passed() && report.checks[5].detail.contains("allowed to differ"), "{:#?}", report.checks);
    fs::write(&at, "{").unwrap();
    assert!(!check(TokenCheck::Required).passed());
    fs::remove_file(&at).unwrap();
    let report = check(TokenCheck::Required);
    assert_eq!(report.checks[5].outcome, Outcome::Skipped, "{:#?}", report.checks);
}

/// What is wrong in all functions alike is found with few bits, too: by the package's own weights.
#[cfg(feature = "ggml")]
#[test]
fn of_what_few_bits_compute() {
    let package = Package::new(Profile::Ane);
    let report = check(&package.path);
    let logits = report.checks.last().unwrap();
    assert!(report.passed() && logits.detail.contains("with the package's own weights by"), "{logits:?}");
    let other = package.with_model(|model| {
        for name in ["infer", "prefill"] {
            let all = operations(model, name).iter_mut().filter(|o| o.kind == "silu");
            all.for_each(|o| o.kind = "sigmoid".into());
        }
    });
    caught(&other, "logits", "with the package's own weights");
    let asked = check_with(&Package::new(Profile::Gpu).path, |options| {
        options.logits = Some(qconv::verify::LogitsOptions { tokens: 20, memory: None });
    });
    let logits = asked.checks.last().unwrap();
    assert!(asked.passed() && logits.detail.contains("20 tokens") && logits.detail.contains("own weights"));
    assert!(
        !fs::read_dir(package.path.parent().unwrap())
            .unwrap()
            .any(|entry| { entry.unwrap().file_name().to_string_lossy().starts_with(".qconv-own") })
    );
}
