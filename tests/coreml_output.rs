//! What conversions to Core ML may replace: what they wrote themselves, and nothing else, whatever is said. Options that
//! say nothing are refused, packages are called what they are, and divided heads come back.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use checkpoint::{Made, Random, f32_bytes};
use common::fixture;
use qconv::container::coreml::{Package, chunks};
use qconv::container::{Store, safetensors};
use qconv::convert::{Budget, Forms, Granularity, Job, Matrices, Observer, Profile, Silent, ToCoreml, ToHf};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;
use serde_json::json;

const LLAMA: &str = "models/llama";
const OTHER: &str = "models/qwen3";

fn planned(source: &str, output: &Path, matrices: Matrices) -> Job {
    let forms = Forms::new(matrices);
    ToCoreml { output: Some(output.into()), forms, ..ToCoreml::new(fixture(source)) }.plan().unwrap()
}

/// A model in several packages.
fn divided(source: &str, output: &Path) -> Job {
    let conversion = ToCoreml::new(fixture(source));
    let whole = ToCoreml { profile: Profile::Ane, ..conversion.clone() }.plan().unwrap().plan.total_len();
    let output = Some(output.to_path_buf());
    ToCoreml { output, profile: Profile::Ane, chunk_size: whole * 2 / 3, ..conversion }.plan().unwrap()
}

fn run(job: &Job, force: bool) -> Result<(), Error> {
    job.run(force, &Budget::new(Some(1), None).unwrap(), &Silent).map(|_| ())
}

/// That it fails because of this file, and that all stays as it is.
fn refused(job: &Job, at: &Path, words: &str) {
    let before = entries(job.output.parent().unwrap());
    let e = run(job, true).unwrap_err();
    assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains(words), "{words:?} was expected: {e}");
    assert_eq!(e.path().map(|p| p.canonicalize().unwrap()), Some(at.canonicalize().unwrap()), "{e}");
    assert!(e.hint_text().is_some() || words.contains("no Core ML package"), "{e}");
    assert_eq!(entries(job.output.parent().unwrap()), before);
}

/// Everything below a directory: paths, and how long files are.
fn entries(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            found.push((entry.path(), if meta.is_dir() { 0 } else { meta.len() }));
            if meta.is_dir() {
                open.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn form(package: &Path) -> String {
    let package = Package::open(package, &Limits::default()).unwrap();
    package.model().description.metadata.user_defined["com.qconv.weights"].clone()
}

#[test]
fn packages_replace_packages_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    let job = planned(LLAMA, &output, Matrices::Float16);
    run(&job, false).unwrap();
    let eight = planned(LLAMA, &output, Matrices::Integers(8));
    assert!(run(&eight, false).unwrap_err().to_string().contains("exists already"));
    run(&eight, true).unwrap();
    assert_eq!(form(&output), "int8");
    // Whatever somebody put into it.
    let inside =
        ["notes.txt", "Data/notes.txt", "Data/com.apple.CoreML/weights/more.bin", "Data/other/deep/file"];
    for name in inside {
        let path = output.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"of value").unwrap();
        let at = if name.contains("deep") { output.join("Data/other") } else { path.clone() };
        refused(&job, &at, "was not written by");
        fs::remove_file(&path).unwrap();
        let _ = fs::remove_dir_all(output.join("Data/other"));
    }
    #[cfg(unix)]
    {
        let (weights, moved) = (output.join("Data/com.apple.CoreML/weights"), dir.path().join("moved"));
        fs::rename(&weights, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &weights).unwrap();
        refused(&job, &weights, "was not written by");
        fs::remove_file(&weights).unwrap();
        fs::rename(&moved, &weights).unwrap();
    }
    run(&job, true).unwrap();
    assert_eq!(form(&output), "f16");
    // Directories of others, also with a chunks.json of theirs.
    let taken = dir.path().join("taken.mlpackage");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("chunks.json"), br#"{"chunks": ["a", "b"]}"#).unwrap();
    refused(&planned(LLAMA, &taken, Matrices::Float16), &taken, "is no Core ML package");
    fs::remove_file(taken.join("chunks.json")).unwrap();
    run(&planned(LLAMA, &taken, Matrices::Float16), false).unwrap();
}

#[test]
fn directories_of_packages_replace_their_like_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("several");
    let job = divided(LLAMA, &output);
    run(&job, false).unwrap();
    assert!(chunks::packages(&output, &Limits::default()).unwrap().len() > 2);
    run(&job, true).unwrap();
    // Another model's side files are replaced with their packages, which know them.
    run(&divided(OTHER, &output), true).unwrap();
    run(&job, true).unwrap();
    let config = output.join("config.json");
    let own = fs::read(&config).unwrap();
    assert_eq!(own, fs::read(fixture(LLAMA).join("config.json")).unwrap());

    let diary = output.join("diary.txt");
    fs::write(&diary, b"of value").unwrap();
    refused(&job, &diary, "was not written by");
    fs::remove_file(diary).unwrap();
    let inner = output.join("mine");
    fs::create_dir(&inner).unwrap();
    refused(&job, &inner, "was not written by");
    fs::remove_dir(inner).unwrap();
    let more = output.join("vocab.json");
    fs::write(&more, b"{}").unwrap();
    refused(&job, &more, "was changed since");
    fs::remove_file(more).unwrap();
    fs::write(&config, b"{}").unwrap();
    refused(&divided(OTHER, &output), &config, "was changed since");
    fs::write(&config, own).unwrap();
    run(&divided(OTHER, &output), true).unwrap();

    // A chunks.json of somebody else's makes no directory ours.
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("chunks.json"), br#"[{"text": "of value"}]"#).unwrap();
    let e = run(&Job { output: theirs.clone(), ..divided(LLAMA, &output) }, true).unwrap_err();
    assert!(e.to_string().contains("is no Core ML package"), "{e}");
    let inside = planned(LLAMA, &theirs, Matrices::Float16);
    assert_eq!(inside.output.parent(), Some(theirs.as_path()), "a directory for the package");
    run(&inside, false).unwrap();
    assert!(theirs.join("chunks.json").is_file());
}

#[test]
fn files_beside_belong_to_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (config, ours) = (at("config.json"), fixture(LLAMA).join("config.json"));
    fs::write(&config, b"{}").unwrap();
    let job = planned(LLAMA, &at("X.mlpackage"), Matrices::Float16);
    assert_eq!(run(&job, false).unwrap_err().path(), Some(config.as_path()));
    refused(&job, &config, "is not this model's");
    assert!(fs::read(&config).unwrap() == b"{}" && !at("X.mlpackage").exists());
    fs::remove_file(&config).unwrap();
    run(&job, false).unwrap();
    assert_eq!(fs::read(&config).unwrap(), fs::read(&ours).unwrap());

    // Another model in the same directory would take them away from this one.
    refused(&planned(OTHER, &at("Y.mlpackage"), Matrices::Float16), &config, "is not this model's");
    // The same model as well is fine.
    run(&planned(LLAMA, &at("Y.mlpackage"), Matrices::Integers(8)), false).unwrap();
    refused(&planned(OTHER, &at("X.mlpackage"), Matrices::Float16), &config, "may need it");
    fs::remove_dir_all(at("Y.mlpackage")).unwrap();
    // In the place of this one, its files go with it.
    let other = planned(OTHER, &at("X.mlpackage"), Matrices::Float16);
    run(&other, true).unwrap();
    assert_eq!(fs::read(&config).unwrap(), fs::read(fixture(OTHER).join("config.json")).unwrap());
    // One that was changed since is nobody's.
    fs::write(&config, b"{\"mine\": 1}").unwrap();
    refused(&job, &config, "is not this model's");
}

#[test]
fn options_say_something_and_packages_are_called_so() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture(LLAMA);
    let fails = |args: &[&str], words: &str| {
        let mut command = Command::cargo_bin("qconv").unwrap();
        command.arg("hf-to-coreml").arg(&source).args(args).current_dir(dir.path());
        let done = command.assert().code(2);
        let said = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
        assert!(said.contains(words), "{words:?} was expected: {said}");
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none(), "nothing is written");
    };
    fails(&["-o", "X"], "a package is called NAME.mlpackage");
    fails(&["-o", "X.mlmodel"], "hint: -o X.mlmodel.mlpackage");
    let x = ["-o", "X.mlpackage"];
    let with = |more: &[&'static str]| [&x[..], more].concat();
    fails(&with(&["--chunk-size", "1M"]), "--chunk-size means nothing");
    fails(&with(&["--allow-unfit"]), "--allow-unfit means nothing");
    fails(&with(&["--ternary-form", "dense"]), "--ternary-form means nothing");
    fails(&with(&["--bits", "8", "--allow-fallback"]), "--allow-fallback means nothing");
    fails(&with(&["--granularity", "channel"]), "float16 shares nothing");
}

/// Interrupts at once.
struct Hasty;

impl Observer for Hasty {
    fn advance(&self, _: u64, _: &str) {}
    fn interrupted(&self) -> bool {
        true
    }
}

#[test]
fn interruptions_say_what_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    let job = planned(LLAMA, &output, Matrices::Float16);
    let interrupt = || {
        let e = job.run(true, &Budget::new(Some(1), None).unwrap(), &Hasty).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Interrupted);
        e.hint_text().unwrap().to_string()
    };
    assert!(interrupt().starts_with("nothing was written: there is no "));
    assert!(entries(dir.path()).is_empty());
    run(&job, false).unwrap();
    assert!(interrupt().ends_with("X.mlpackage is what it was before"));
}

#[test]
fn packages_are_called_what_their_weights_are() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("m.gguf");
    common::convert(&fixture(LLAMA), &gguf, Some("q8_0"));
    let conversion = |forms| ToCoreml { forms, ..ToCoreml::new(&gguf) };
    let job = conversion(Forms::new(Matrices::Float16)).plan().unwrap();
    let name = job.output.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.ends_with("-int8-gpu.mlpackage"), "{name}");
    run(&job, false).unwrap();
    assert_eq!(form(&job.output), "int8");
    // On the Neural Engine these codes do not stay.
    let ane = ToCoreml { profile: Profile::Ane, ..conversion(Forms::new(Matrices::Float16)) };
    assert!(ane.plan().unwrap().output.to_string_lossy().ends_with("-f16-ane.mlpackage"));

    let refused = |forms: Forms, words: &str| {
        let e = conversion(forms).plan().unwrap_err();
        assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains(words), "{e}");
    };
    let eight = Forms::new(Matrices::Integers(8));
    let rows = Forms { granularity: Some(Granularity::Channel), ..eight.clone() };
    refused(rows.clone(), "--granularity does nothing: the source's codes stay");
    assert!(
        ToCoreml { profile: Profile::Ane, ..conversion(rows) }.plan().is_ok(),
        "it means something there"
    );
    let palette = Forms { must_be_palette: true, ..Forms::new(Matrices::Palette(8)) };
    refused(palette.clone(), "--palettize does nothing");
    assert!(conversion(Forms { must_be_palette: false, ..palette }).plan().is_ok());
    assert!(conversion(eight).plan().unwrap().output.to_string_lossy().ends_with("-int8-gpu.mlpackage"));
}

/// Rows of a vocabulary that the Neural Engine needs in two parts.
const ROWS: u64 = 16392;

fn random(seed: u64, n: u64) -> Vec<u8> {
    let mut random = Random(seed);
    f32_bytes(&(0..n).map(|_| random.value()).collect::<Vec<_>>())
}

/// A model of this fixture with a larger vocabulary, and a config that does not say whether the head is tied.
fn large(source: &str, embedding: &str) -> Made {
    let mut made = Made::of(&fixture(source));
    let (_, shape, _) = made.take(embedding);
    let values = random(7, ROWS * shape[1]);
    let mut made = made.with(embedding, "F32", &[ROWS, shape[1]], values);
    made.config["vocab_size"] = json!(ROWS);
    made.config.as_object_mut().unwrap().remove("tie_word_embeddings");
    made
}

/// Phi 2, whose head has a bias.
fn phi() -> Made {
    let (width, inner) = (32, 64);
    let config = json!({
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": ROWS, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "partial_rotary_factor": 0.5
    });
    let mut made = Made::new(config);
    let layer = "model.layers.0";
    let mut linear = |name: String, [rows, cols]: [u64; 2]| {
        let seed = name.len() as u64;
        let weight =
            made.clone().with(&format!("{name}.weight"), "F32", &[rows, cols], random(seed, rows * cols));
        made = weight.with(&format!("{name}.bias"), "F32", &[rows], random(seed + 1, rows));
    };
    for name in ["q_proj", "k_proj", "v_proj", "dense"] {
        linear(format!("{layer}.self_attn.{name}"), [width, width]);
    }
    linear(format!("{layer}.mlp.fc1"), [inner, width]);
    linear(format!("{layer}.mlp.fc2"), [width, inner]);
    linear("lm_head".into(), [ROWS, width]);
    for name in [&format!("{layer}.input_layernorm"), "model.final_layernorm"] {
        made = made.with(&format!("{name}.weight"), "F32", &[width], random(3, width));
        made = made.with(&format!("{name}.bias"), "F32", &[width], random(4, width));
    }
    made.with("model.embed_tokens.weight", "F32", &[ROWS, width], random(5, ROWS * width))
}

fn open(dir: &Path) -> Store {
    safetensors::open(&dir.join("model.safetensors"), &Limits::default()).unwrap().store
}

#[test]
fn divided_heads_come_back() {
    let cases = [
        (large("models/gemma2-spm", "model.embed_tokens.weight"), "models/gemma2-spm"),
        (large("models/gpt2", "transformer.wte.weight"), "models/gpt2"),
        (phi(), "models/gpt2"),
    ];
    for (made, like) in cases {
        let dir = tempfile::tempdir().unwrap();
        let [source, output, back] = ["source", "X.mlpackage", "back"].map(|name| dir.path().join(name));
        made.write(&source, &fixture(like));
        let to = ToCoreml { output: Some(output.clone()), profile: Profile::Ane, ..ToCoreml::new(&source) };
        run(&to.plan().unwrap_or_else(|e| panic!("{like}: {e}")), false).unwrap();
        let package = Package::open(&output, &Limits::default()).unwrap();
        let outputs = &package.model().description.functions[0].output;
        assert_eq!(outputs.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(), ["logits1", "logits2"]);
        let to_hf = ToHf { dtype: Some(qconv::tensor::DType::F32), ..ToHf::new(&output, &back) };
        run(&to_hf.plan().unwrap_or_else(|e| panic!("{like}: {e}")), false).unwrap();
        let (was, is) = (open(&source), open(&back));
        let names = |store: &Store| {
            let mut names: Vec<String> = store.tensors().iter().map(|t| t.name.clone()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&is), names(&was));
        // Values that float16 has come back as they were, in their places.
        for t in was.tensors().iter().filter(|t| t.shape[0] == ROWS) {
            let found = is.get(&t.name).unwrap();
            assert_eq!((&found.shape, found.dtype), (&t.shape, t.dtype), "{}", t.name);
            assert!(was.read_all(t).unwrap() == is.read_all(found).unwrap(), "{}", t.name);
        }
    }
}

#[test]
fn factors_of_other_packages_are_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("X.mlpackage");
    run(&planned(LLAMA, &output, Matrices::Ternary), false).unwrap();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let back = || ToHf::new(&output, dir.path().join("back")).plan();
    assert!(back().is_ok(), "its own are known");
    let model = output.join("Data/com.apple.CoreML/model.mlmodel");
    let mut bytes = fs::read(&model).unwrap();
    let (own, other) = (b"com.qconv.version", b"com.other.version");
    let at = bytes.windows(own.len()).position(|some| some == own).unwrap();
    bytes[at..at + other.len()].copy_from_slice(other);
    fs::write(&model, bytes).unwrap();
    let e = back().unwrap_err();
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("_weight_scale\""), "{e}");
}

#[test]
fn an_epsilon_that_float16_has_not_is_raised() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let mut made = Made::of(&fixture(LLAMA));
    made.config["rms_norm_eps"] = json!(1e-12);
    made.config["_name_or_path"] = json!("/home/someone/secret/llama");
    made.write(&source, &fixture(LLAMA));
    let output = dir.path().join("X.mlpackage");
    let job = ToCoreml { output: Some(output.clone()), ..ToCoreml::new(&source) }.plan().unwrap();
    let said = "norms add 5.96e-8 to the variance instead of 1.00e-12";
    assert!(job.plan.notes.iter().any(|n| n.contains(said)), "{:?}", job.plan.notes);
    run(&job, false).unwrap();
    let shown =
        Command::cargo_bin("qconv").unwrap().args(["inspect", "--ops"]).arg(&output).assert().success();
    let text = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    let epsilons: Vec<&str> =
        text.split("epsilon=").skip(1).map(|rest| rest.split([',', ' ']).next().unwrap()).collect();
    assert!(epsilons.len() > 2 && epsilons.iter().all(|e| e.starts_with("0.00000005960")), "{epsilons:?}");
    let model = fs::read(output.join("Data/com.apple.CoreML/model.mlmodel")).unwrap();
    assert!(!model.windows(7).any(|some| some == b"someone"), "no private path");
}

#[test]
fn a_chunks_json_of_others_makes_no_packages() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(fixture(LLAMA)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(source.join("chunks.json"), br#"{"chunks": [{"start": 0, "end": 7}]}"#).unwrap();
    let shown =
        Command::cargo_bin("qconv").unwrap().args(["inspect", "--json"]).arg(&source).assert().success();
    let shown: serde_json::Value = serde_json::from_slice(&shown.get_output().stdout).unwrap();
    assert_ne!(shown["format"], "Core ML");
    assert!(ToCoreml::new(&source).plan().is_ok());
}

/// Memory that tables of a long context take: with all of them it was several hundred megabytes.
#[cfg(target_os = "linux")]
#[test]
fn tables_of_long_contexts_are_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let program = assert_cmd::cargo::cargo_bin("qconv");
    let script = "ulimit -v 180000; exec \"$0\" hf-to-coreml \"$1\" -o X.mlpackage --context 500000 -j 1 --max-memory 64M -q";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(program).arg(fixture(LLAMA)).current_dir(dir.path());
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let weights =
        fs::metadata(dir.path().join("X.mlpackage/Data/com.apple.CoreML/weights/weight.bin")).unwrap();
    assert!(weights.len() > 2 * 500_000 * 16 * 2, "{} bytes", weights.len());
}
