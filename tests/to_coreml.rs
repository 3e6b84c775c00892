//! Conversions to Core ML packages, and back: what is planned is what is written, by any number of threads, whole or
//! not at all; what cannot be is refused with a sentence. What packages compute, other tests look at.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use assert_cmd::Command;
use common::{fixture, plan};
use qconv::block::codec;
use qconv::container::coreml::{Package, chunks};
use qconv::container::{Store, safetensors};
use qconv::convert::{
    Budget, Forms, Granularity, Matrices, Observer, Profile, Silent, ToCoreml, ToHf, ToQpack,
};
use qconv::error::ErrorKind;
use qconv::limits::Limits;
use qconv::tensor::{DType, TensorInfo};

/// Models of the families that have a graph.
const FAMILIES: [&str; 10] = [
    "models/llama",
    "models/llama-rope3",
    "models/mistral",
    "models/mixtral",
    "models/qwen2",
    "models/qwen3",
    "models/gemma3-spm",
    "models/phi_3",
    "models/gpt2",
    "models/gpt_oss-mxfp4",
];
const PROFILES: [Profile; 2] = [Profile::Gpu, Profile::Ane];

fn conversion(source: &Path, output: &Path, profile: Profile, forms: Forms) -> ToCoreml {
    ToCoreml { output: Some(output.to_path_buf()), profile, forms, ..ToCoreml::new(source) }
}

fn budget(threads: usize) -> Budget {
    Budget::new(Some(threads), None).unwrap()
}

/// All files below a directory, by their paths from there on.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn visit(dir: &Path, root: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => visit(&path, root, found),
                false => {
                    found.insert(path.strip_prefix(root).unwrap().to_path_buf(), fs::read(&path).unwrap());
                }
            }
        }
    }
    let mut found = BTreeMap::new();
    visit(dir, dir, &mut found);
    found
}

fn values(store: &Store, t: &TensorInfo) -> Vec<f32> {
    let mut out = vec![0.0; t.elements() as usize];
    codec(t.dtype).unwrap().decode(&store.read_all(t).unwrap(), &mut out).unwrap();
    out
}

/// Mean square of the differences, in parts of the mean square: the most of any tensor of `was`.
fn worst(was: &Path, is: &Path) -> f64 {
    let open =
        |dir: &Path| safetensors::open(&dir.join("model.safetensors"), &Limits::default()).unwrap().store;
    let (was, is) = (open(was), open(is));
    let names = |store: &Store| {
        store.tensors().iter().map(|t| t.name.clone()).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(names(&was), names(&is));
    let square = |x: f32| f64::from(x).powi(2);
    let of = |t: &TensorInfo| {
        let other = is.get(&t.name).unwrap();
        assert_eq!(other.shape, t.shape, "{}", t.name);
        let (a, b) = (values(&was, t), values(&is, other));
        let lost: f64 = a.iter().zip(&b).map(|(a, b)| square(a - b)).sum();
        lost / a.iter().map(|a| square(*a)).sum::<f64>().max(f64::MIN_POSITIVE)
    };
    was.tensors().iter().map(of).fold(0.0, f64::max)
}

fn to_hf(source: &Path, output: &Path) {
    let back = ToHf { dtype: Some(DType::F32), ..ToHf::new(source, output) };
    back.plan()
        .unwrap_or_else(|e| panic!("{}: {e}", source.display()))
        .run(false, &budget(1), &Silent)
        .unwrap();
}

#[test]
fn every_family_becomes_what_was_planned_and_comes_back() {
    for name in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let source = fixture(name);
        to_hf(&source, &dir.path().join("was"));
        for profile in PROFILES {
            let at = dir.path().join(profile.name());
            fs::create_dir(&at).unwrap();
            let output = at.join("X.mlpackage");
            let mut job =
                conversion(&source, &output, profile, Forms::new(Matrices::Float16)).plan().unwrap();
            if name.contains("gpt_oss") || name.contains("mixtral") {
                assert_eq!(job.plan.obstacle.is_some(), profile == Profile::Ane, "{name}: experts");
                job.plan.obstacle = None;
            }
            assert!(!output.exists());
            job.run(false, &budget(2), &Silent).unwrap_or_else(|e| panic!("{name}: {e}"));
            let found = files(&output);
            let planned: BTreeMap<_, _> = job.plan.files.iter().map(|f| (f.name.clone(), f.len)).collect();
            let written: BTreeMap<_, _> =
                found.iter().map(|(path, b)| (path.clone(), b.len() as u64)).collect();
            assert_eq!(written, planned, "{name}");
            let package =
                Package::open(&output, &Limits::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let functions: Vec<&String> = package.model().program.functions.keys().collect();
            let expected = if profile == Profile::Gpu { vec!["main"] } else { vec!["infer", "prefill"] };
            assert_eq!(functions, expected, "{name}");
            for beside in ["config.json", "tokenizer.json", "generation_config.json"] {
                let was = fs::read(source.join(beside)).ok();
                assert_eq!(fs::read(at.join(beside)).ok(), was, "{name}: {beside}");
            }
            to_hf(&output, &at.join("back"));
            // Float16 rounds what has more bits; norms are stored with 1 added in some families.
            let lost = worst(&dir.path().join("was"), &at.join("back"));
            assert!(lost < 1e-4, "{name}, {}: {lost}", profile.name());
        }
    }
}

#[test]
fn threads_and_memory_do_not_matter() {
    let source = fixture("models/llama");
    let each = [
        Forms { embedding_bits: Some(8), ..Forms::new(Matrices::Float16) },
        Forms::new(Matrices::Integers(8)),
        Forms::new(Matrices::Integers(4)),
        Forms::new(Matrices::Palette(2)),
        Forms { granularity: Some(Granularity::Tensor), ..Forms::new(Matrices::Palette(6)) },
        Forms::new(Matrices::Ternary),
        Forms { sparse: true, ..Forms::new(Matrices::Ternary) },
    ];
    for forms in each {
        for profile in PROFILES {
            let write = |budget: &Budget| {
                let dir = tempfile::tempdir().unwrap();
                let job = conversion(&source, &dir.path().join("X.mlpackage"), profile, forms.clone())
                    .plan()
                    .unwrap();
                job.run(false, budget, &Silent).unwrap();
                files(dir.path())
            };
            let one = write(&budget(1));
            assert!(
                one == write(&Budget::new(Some(4), Some(256 << 20)).unwrap()),
                "{forms:?} {}",
                profile.name()
            );
        }
    }
}

#[test]
fn sizes_follow_from_bits() {
    let source = fixture("tiny-llama");
    let bits = |matrices: Matrices, embedding_bits: Option<u32>, name: &str| {
        let forms = Forms { embedding_bits, ..Forms::new(matrices) };
        let job = conversion(&source, Path::new("X.mlpackage"), Profile::Gpu, forms).plan().unwrap();
        let t = job.plan.tensors.iter().find(|t| t.name == name).unwrap();
        let elements: u64 = t.shape.iter().product();
        (t.nbytes as f64 * 8.0 / elements as f64, t.type_name())
    };
    // Rows of 256, so that a scale for each costs 16/256 bits; tables of 2^k for 8 rows 16 * 2^k / 2048.
    for (matrices, expected, kind) in [
        (Matrices::Float16, 16.0, "f16"),
        (Matrices::Integers(8), 8.0 + 16.0 / 256.0, "int8"),
        (Matrices::Integers(4), 4.0 + 16.0 / 32.0, "int4"),
        (Matrices::Palette(4), 4.0 + 16.0 * 16.0 / 2048.0, "lut4"),
        (Matrices::Palette(3), 3.0 + 16.0 * 8.0 / 2048.0, "lut3"),
        (Matrices::Palette(2), 2.0 + 16.0 * 4.0 / 2048.0, "lut2"),
    ] {
        assert_eq!(bits(matrices, None, "blk.0.attn_q.weight"), (expected, kind), "{matrices:?}");
        assert_eq!(bits(matrices, None, "blk.0.attn_norm.weight").0, 16.0, "{matrices:?}");
    }
    let (ternary, _) = bits(Matrices::Ternary, None, "blk.0.attn_q.weight");
    assert!((2.0 + 16.0 / 256.0..2.07).contains(&ternary), "{ternary}");
    let embeddings = |matrices, given| bits(matrices, given, "token_embd.weight").1;
    assert_eq!(embeddings(Matrices::Palette(2), None), "lut4");
    assert_eq!(embeddings(Matrices::Palette(4), None), "lut6");
    assert_eq!(embeddings(Matrices::Integers(4), None), "int8");
    assert_eq!(embeddings(Matrices::Integers(4), Some(16)), "f16");
    assert_eq!(embeddings(Matrices::Float16, Some(3)), "lut3");
}

#[test]
fn chunks_are_below_what_was_said() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("tiny-llama");
    let most = 3_500_000;
    let plan = |output: &str, forms: &Forms, chunk_size: u64| {
        let conversion = conversion(&source, &dir.path().join(output), Profile::Ane, forms.clone());
        ToCoreml { chunk_size, ..conversion }.plan()
    };
    let plain = Forms::new(Matrices::Float16);
    let job = plan("X.mlpackage", &plain, most).unwrap();
    assert_eq!(job.output, dir.path().join("X"));
    job.run(false, &budget(2), &Silent).unwrap();
    let packages = chunks::packages(&job.output, &Limits::default()).unwrap();
    assert!(packages.len() > 3, "{packages:?}");
    for package in &packages {
        let bytes: usize = files(package).values().map(Vec::len).sum();
        assert!((bytes as u64) < most, "{}: {bytes}", package.display());
        Package::open(package, &Limits::default()).unwrap();
    }
    assert!(job.output.join("tokenizer.json").is_file() && !dir.path().join("tokenizer.json").exists());
    to_hf(&source, &dir.path().join("was"));
    to_hf(&job.output, &dir.path().join("back"));
    assert!(worst(&dir.path().join("was"), &dir.path().join("back")) < 1e-6);

    // Fewer packages in the same place: none of the others stays.
    let other = plan("X", &Forms::new(Matrices::Integers(8)), most).unwrap();
    assert_eq!(other.output, job.output);
    assert_eq!(other.run(false, &budget(1), &Silent).unwrap_err().kind(), ErrorKind::Misuse);
    other.run(true, &budget(1), &Silent).unwrap();
    let left = fs::read_dir(&job.output)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "mlpackage"));
    assert_eq!(left.count(), chunks::packages(&job.output, &Limits::default()).unwrap().len());

    let e = plan("Y", &plain, 1_100_000).unwrap_err();
    assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains("alone takes"), "{e}");
}

#[test]
fn other_sources_give_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    for model in ["models/llama", "models/gpt2"] {
        let source = fixture(model);
        let name = |what: &str| place(&format!("{}-{what}", model.replace('/', "-")));
        to_hf(&source, &name("was"));
        let gguf = name("f32.gguf");
        plan(&source, &gguf, Some("f32")).run(true, &common::budget(), &Silent).unwrap();
        let mut sources = vec![gguf.clone()];
        for from in [&source, &gguf] {
            let packed = name(if from == &gguf { "gguf.qpack" } else { "hf.qpack" });
            let job = ToQpack { output: Some(packed.clone()), ..ToQpack::new(from) }.plan().unwrap();
            job.run(false, &budget(1), &Silent).unwrap();
            sources.push(packed);
        }
        for (k, from) in sources.iter().enumerate() {
            let at = name(&format!("at-{k}"));
            fs::create_dir(&at).unwrap();
            let job = conversion(from, &at.join("X.mlpackage"), Profile::Gpu, Forms::new(Matrices::Float16));
            job.plan().unwrap().run(false, &budget(1), &Silent).unwrap();
            for beside in ["config.json", "tokenizer.json"] {
                assert!(at.join(beside).is_file(), "{}: {beside}", from.display());
            }
            to_hf(&at.join("X.mlpackage"), &at.join("back"));
            let lost = worst(&name("was"), &at.join("back"));
            assert!(lost < 1e-6, "{}: {lost}", from.display());
        }
    }
}

#[test]
fn without_a_config_tensors_have_the_names_of_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    let job =
        conversion(&fixture("models/llama"), &output, Profile::Ane, Forms::new(Matrices::Ternary)).plan();
    job.unwrap().run(false, &budget(1), &Silent).unwrap();
    let config = dir.path().join("config.json");
    fs::remove_file(&config).unwrap();
    let back = dir.path().join("back");
    to_hf(&output, &back);
    let store = safetensors::open(&back.join("model.safetensors"), &Limits::default()).unwrap().store;
    let query = store.get("blk_0_attn_q_weight").unwrap();
    assert_eq!(query.shape.len(), 2, "without what a convolution has behind it");
    // Factors behind the product are part of it: a row holds a number, its opposite, and 0.
    let values = values(&store, query);
    for row in values.chunks(query.shape[1] as usize) {
        let scale = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(scale != 1.0 && row.iter().all(|x| *x == 0.0 || x.abs() == scale));
    }
    assert!(store.get("blk_0_attn_q_weight_scale").is_none() && !back.join("config.json").exists());
    // That of another model.
    fs::copy(fixture("models/qwen3/config.json"), &config).unwrap();
    let e = ToHf::new(&output, dir.path().join("other")).plan().unwrap_err();
    assert!(e.kind() == ErrorKind::Malformed && e.to_string().contains("config.json describes"), "{e}");
}

#[test]
fn what_cannot_be_is_refused() {
    let source = fixture("models/llama");
    let output = Path::new("X.mlpackage");
    let refused = |conversion: ToCoreml, kind: ErrorKind, words: &str| {
        let e = conversion.plan().unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(words), "{words:?} was expected: {e}");
    };
    let with = |profile, forms| conversion(&source, output, profile, forms);
    let group = |matrices, n| Forms { granularity: Some(Granularity::Group(n)), ..Forms::new(matrices) };
    let (four, misuse) = (Matrices::Integers(4), ErrorKind::Misuse);
    refused(with(Profile::Gpu, Forms::new(Matrices::Palette(5))), misuse, "no such indices");
    refused(
        with(Profile::Gpu, Forms { embedding_bits: Some(7), ..Forms::new(four) }),
        misuse,
        "no such indices",
    );
    refused(with(Profile::Gpu, group(Matrices::Ternary, 8)), misuse, "a scale for each row");
    refused(with(Profile::Ane, group(Matrices::Integers(8), 32)), misuse, "no scales of blocks");
    refused(with(Profile::Gpu, Forms { sparse: true, ..Forms::new(four) }), misuse, "--ternary-form");
    refused(with(Profile::Gpu, group(four, 48)), ErrorKind::Unsupported, "no multiple of 48");
    let allowed = with(Profile::Gpu, Forms { allow_fallback: true, ..group(four, 48) }).plan().unwrap();
    assert!(
        allowed.plan.notes.iter().any(|n| n.contains("a scale for each row")),
        "{:?}",
        allowed.plan.notes
    );
    for context in [3, (1 << 20) + 1] {
        let given = ToCoreml { context: Some(context), ..with(Profile::Gpu, Forms::new(four)) };
        refused(given, misuse, &format!("--context {context}"));
    }
    let olmo = conversion(&fixture("models/olmo2"), output, Profile::Gpu, Forms::new(four));
    refused(olmo, ErrorKind::Unsupported, "has no [graph]");
    let gguf = ToCoreml { arch: Some("llama".into()), ..ToCoreml::new(fixture("models/llama")) };
    assert!(gguf.plan().is_ok(), "an architecture may be named");
    let experts = conversion(&fixture("models/gpt_oss"), output, Profile::Ane, Forms::new(Matrices::Float16));
    let e = experts.plan().unwrap().run(true, &budget(1), &Silent).unwrap_err();
    assert!(e.to_string().contains("experts") && e.hint_text().unwrap().contains("--allow-unfit"), "{e}");
    assert!(!output.exists());
}

/// Stops after some bytes.
struct Impatient(AtomicU64);

impl Observer for Impatient {
    fn advance(&self, bytes: u64, _: &str) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
    fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 100_000
    }
}

#[test]
fn packages_appear_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    let source = fixture("models/llama");
    let job = |matrices| conversion(&source, &output, Profile::Gpu, Forms::new(matrices)).plan().unwrap();
    let nothing = || fs::read_dir(dir.path()).unwrap().next().is_none();
    let e = job(Matrices::Float16).run(false, &budget(2), &Impatient(AtomicU64::new(0))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Interrupted);
    assert!(nothing(), "{:?}", files(dir.path()).keys());

    job(Matrices::Float16).run(false, &budget(1), &Silent).unwrap();
    let first = files(dir.path());
    let hidden = |path: &PathBuf| path.to_string_lossy().starts_with('.');
    assert!(!first.keys().any(hidden));
    // It stays as it is without force, and when that is interrupted.
    let other = job(Matrices::Integers(8));
    assert_eq!(other.run(false, &budget(1), &Silent).unwrap_err().kind(), ErrorKind::Misuse);
    assert!(other.run(true, &budget(1), &Impatient(AtomicU64::new(0))).is_err());
    assert!(files(dir.path()) == first);
    // With it the package goes; the same files beside it stay.
    other.run(true, &budget(1), &Silent).unwrap();
    let second = files(dir.path());
    assert!(second != first && second.keys().eq(first.keys()));
}

#[test]
fn the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let qconv = |args: &[&str]| {
        let mut command = Command::cargo_bin("qconv").unwrap();
        command.args(args).current_dir(dir.path());
        command
    };
    let source = fixture("models/llama");
    let source = source.to_str().unwrap();
    let to = ["hf-to-coreml", source, "-o", "X.mlpackage", "--bits", "4", "--profile", "ane", "--json"];
    let shown = qconv(&[&to[..], &["--dry-run"]].concat()).assert().success();
    let shown: serde_json::Value = serde_json::from_slice(&shown.get_output().stdout).unwrap();
    assert!(!dir.path().join("X.mlpackage").exists());
    let of =
        |name: &str| shown["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap().clone();
    assert_eq!(of("blk.0.attn_q.weight")["type"], "lut4");
    assert_eq!(of("token_embd.weight")["type"], "lut6");
    let done = qconv(&to).assert().success();
    let done: serde_json::Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!(done["bytes"], shown["bytes"]);
    assert!(dir.path().join("X.mlpackage").is_dir() && dir.path().join("tokenizer.json").is_file());
    qconv(&to).assert().code(2);
    let back = qconv(&["coreml-to-hf", "X.mlpackage", "-o", "back"]).assert().success();
    assert!(String::from_utf8_lossy(&back.get_output().stderr).contains("weights in"));
    assert!(dir.path().join("back/model.safetensors").is_file());
    let e = qconv(&["gguf-to-coreml", source, "-o", "Y.mlpackage"]).assert().code(2);
    assert!(String::from_utf8_lossy(&e.get_output().stderr).contains("is no GGUF file"));
    let e = qconv(&["coreml-to-hf", source, "-o", "Y"]).assert().code(2);
    assert!(String::from_utf8_lossy(&e.get_output().stderr).contains("is no Core ML package"));
    for wrong in [["--bits", "3"], ["--granularity", "group:0"], ["--profile", "cpu"]] {
        qconv(&["hf-to-coreml", source, wrong[0], wrong[1]]).assert().code(2);
    }
}
