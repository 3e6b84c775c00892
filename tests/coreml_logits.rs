//! Core ML packages compute what transformers computes: float16 weights, executed as the program in the file says,
//! held to `reference_logits.safetensors`, whole, in pieces, and token by token with the cache.

mod common;

use std::path::Path;

use qconv::convert::{Forms, Matrices, Profile, Silent, ToCoreml};
use qconv::eval::logits::{Agreement, Matrix, compare};
use qconv::exec::{LanguageModel, Rounding, Session};
use qconv::limits::Limits;

/// One of each family, and of what families have besides: scaled RoPE, windows, experts, sinks.
const FAMILIES: &[&str] = &[
    "tiny-llama",
    "models/llama",
    "models/llama-rope3",
    "models/mistral",
    "models/mixtral",
    "models/qwen2",
    "models/qwen3",
    "models/gemma3-spm",
    "models/phi_3",
    "models/gpt2",
    "models/gpt_oss",
    "models/gpt_oss-mxfp4",
    "models/gemma2-spm",
    "models/gemma2-scaled",
    "models/granite",
    "models/cohere",
    "models/glm4",
    "models/gpt_neox",
    "models/gpt_neox-seq",
    "models/falcon2",
    "models/qwen3_moe",
];

/// Experts are not for the Neural Engine.
const WITH_EXPERTS: &[&str] =
    &["models/mixtral", "models/gpt_oss", "models/gpt_oss-mxfp4", "models/qwen3_moe"];

/// Root mean square of the difference, as a part of the spread of the reference.
const BOUNDS: [(Rounding, f64); 2] = [(Rounding::F32, 1e-3), (Rounding::F16, 2e-2)];

fn package(source: &Path, output: &Path, profile: Profile, forms: Forms) {
    let output = Some(output.into());
    let job = ToCoreml { output, profile, forms, context: Some(128), ..ToCoreml::new(source) };
    job.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
}

/// Logits of `ids`, decoded in pieces of so many.
fn logits(model: &LanguageModel, ids: &[i32], piece: usize, rounding: Rounding) -> Matrix {
    let mut session = Session::new(model, model.context(), rounding).unwrap();
    let rows = ids.chunks(piece).map(|ids| session.decode(ids).unwrap());
    let values = rows.flatten().collect();
    assert_eq!(session.overflow(), None);
    Matrix { columns: model.n_vocab(), values }
}

fn agree(name: &str, model: &LanguageModel, ids: &[i32], wanted: &Matrix) {
    for (rounding, bound) in BOUNDS {
        for piece in [ids.len(), 5, 1] {
            let found: Agreement = compare(&logits(model, ids, piece, rounding), wanted).unwrap();
            println!("{name} {rounding:?} by {piece}: {:.2e}", found.rel_rms);
            assert!(found.finite && found.rel_rms < bound, "{name} {rounding:?} by {piece}: {found:?}");
        }
    }
}

fn family(source: &Path, name: &str, profile: Profile) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("x.mlpackage");
    let (ids, values) = common::reference(source);
    package(source, &output, profile, Forms::new(Matrices::Float16));
    let model = LanguageModel::open(&output, &Limits::default()).unwrap();
    let wanted = Matrix { columns: values.len() / ids.len(), values };
    agree(&format!("{name} {profile:?}"), &model, &ids, &wanted);
    // Longer than what is known: functions of many tokens and of one give the same.
    let longer: Vec<i32> = ids.iter().copied().cycle().take(70).collect();
    let wanted = logits(&model, &longer, 1, Rounding::F32);
    let found = compare(&logits(&model, &longer, longer.len(), Rounding::F32), &wanted).unwrap();
    assert!(found.finite && found.rel_rms < 1e-5, "{name} {profile:?}: {found:?}");
}

#[test]
fn gpu_packages_agree_with_transformers() {
    for name in FAMILIES {
        family(&common::fixture(name), name, Profile::Gpu);
    }
}

#[test]
fn ane_packages_agree_with_transformers() {
    for name in FAMILIES.iter().filter(|name| !WITH_EXPERTS.contains(name)) {
        family(&common::fixture(name), name, Profile::Ane);
    }
}

/// The weights that a package decodes to, back in a checkpoint, and from there in a GGUF file of F32, give in llama.cpp
/// what the package gives.
#[cfg(feature = "ggml")]
#[test]
fn compressed_packages_agree_with_llama_cpp() {
    use qconv::convert::ToHf;
    use qconv::eval::logits::forward;
    use qconv::tensor::DType;

    let all = [
        Matrices::Integers(8),
        Matrices::Integers(4),
        Matrices::Palette(4),
        Matrices::Palette(2),
        Matrices::Ternary,
    ];
    let others = ["mistral", "qwen2", "qwen3", "gemma3-spm", "phi_3", "gpt2", "gpt_oss"]
        .map(|name| format!("models/{name}"));
    let cases = all.iter().map(|m| ("models/llama".to_string(), *m));
    let cases = cases.chain(others.into_iter().zip(all.into_iter().cycle()));
    for (case, (name, matrices)) in cases.enumerate() {
        let source = common::fixture(&name);
        let (ids, _) = common::reference(&source);
        let dir = tempfile::tempdir().unwrap();
        let [output, back, gguf] = ["x.mlpackage", "back", "x.gguf"].map(|name| dir.path().join(name));
        let is_gpu = case % 2 == 0 || WITH_EXPERTS.contains(&name.as_str());
        let profile = if is_gpu { Profile::Gpu } else { Profile::Ane };
        let allow_fallback = matrices == Matrices::Integers(4) && profile == Profile::Gpu;
        let forms = Forms { allow_fallback, ..Forms::new(matrices) };
        package(&source, &output, profile, forms);
        let to_hf = ToHf { dtype: Some(DType::F32), ..ToHf::new(&output, &back) };
        to_hf.plan().unwrap().run(true, &common::budget(), &Silent).unwrap();
        common::convert(&back, &gguf, Some("f32"));
        let wanted = forward(&gguf, &ids, 1).unwrap();
        let model = LanguageModel::open(&output, &Limits::default()).unwrap();
        let found = compare(&logits(&model, &ids, ids.len(), Rounding::F32), &wanted).unwrap();
        println!("{name} {matrices:?} {profile:?}: {:.2e}", found.rel_rms);
        assert!(found.finite && found.rel_rms < 1e-3, "{name} {matrices:?} {profile:?}: {found:?}");
    }
}

/// What `tests/peers/graph.py` left in `QCONV_GRAPHS`: families that no fixture has.
#[test]
#[ignore = "needs the models that tests/peers/graph.py makes"]
fn families_without_fixtures_agree_with_transformers() {
    let root = std::env::var_os("QCONV_GRAPHS").expect("QCONV_GRAPHS names their folder");
    let models = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    let mut models: Vec<_> = models.filter(|path| path.join("config.json").exists()).collect();
    models.sort();
    assert!(!models.is_empty());
    for path in models {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let profiles = [Profile::Gpu, Profile::Ane];
        for profile in &profiles[..if name.contains("moe") { 1 } else { 2 }] {
            let dir = tempfile::tempdir().unwrap();
            let output = dir.path().join("x.mlpackage");
            package(&path, &output, *profile, Forms::new(Matrices::Float16));
            let (ids, values) = common::reference(&path);
            let wanted = Matrix { columns: values.len() / ids.len(), values };
            let model = LanguageModel::open(&output, &Limits::default()).unwrap();
            let found = compare(&logits(&model, &ids, ids.len(), Rounding::F32), &wanted).unwrap();
            println!("{name} {profile:?}: {:.2e}", found.rel_rms);
            assert!(found.finite && found.rel_rms < 1e-3, "{name} {profile:?}: {found:?}");
        }
    }
}
