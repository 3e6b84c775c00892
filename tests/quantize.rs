//! `quantize` beside the linked `llama_model_quantize`: the same file, byte for byte, for every
//! file type and every fixture; and its options.
#![cfg(feature = "ggml")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qconv::container::gguf::{Gguf, Metadata};
use qconv::container::imatrix::{self, Sums};
use qconv::convert::{
    Budget, HfToGguf, ImatrixChoice, Quantize, Quantizer, Recipe, Sharding, Silent, TokenCheck,
    parse_tensor_type,
};
use qconv::ggml::oracle::{QuantizeOptions, model_quantize};
use qconv::limits::Limits;
use qconv::tensor::DType;

fn recipe(name: &str) -> &'static Recipe {
    Recipe::parse(name).unwrap()
}

fn run(options: &Quantize) -> qconv::Result<()> {
    options.plan()?.run(true, &common::budget(), &Silent).map(drop)
}

fn quantize(source: &Path, output: &Path, quantizer: Quantizer) -> qconv::Result<()> {
    run(&Quantize::new(source, output, quantizer))
}

/// Fails at the first tensor that differs, or else at the first byte.
fn assert_same_file(ours: &Path, ggmls: &Path, what: &str) {
    let (a, b) = (fs::read(ours).unwrap(), fs::read(ggmls).unwrap());
    if a == b {
        return;
    }
    let open = |path| Gguf::open(path, &Limits::default()).unwrap();
    let (x, y) = (open(ours), open(ggmls));
    for (t, u) in x.store.tensors().iter().zip(y.store.tensors()) {
        assert_eq!((&t.name, t.dtype, &t.shape), (&u.name, u.dtype, &u.shape), "{what}");
        let (t_bytes, u_bytes) = (x.store.read_all(t).unwrap(), y.store.read_all(u).unwrap());
        assert!(t_bytes == u_bytes, "{what}: the bytes of {} ({}) differ", t.name, t.dtype);
    }
    let metadata = |m: &Metadata| m.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>();
    assert_eq!(metadata(&x.metadata), metadata(&y.metadata), "{what}");
    let at = a.iter().zip(&b).position(|(x, y)| x != y);
    panic!("{what}: files of {} and {} bytes differ at {at:?}", a.len(), b.len());
}

/// Importances by the name of the matrix.
type Entries = BTreeMap<String, Vec<f32>>;

/// An importance for every matrix of a file: positive, uneven, some of it zero.
fn importance(gguf: &Path) -> Entries {
    let gguf = Gguf::open(gguf, &Limits::default()).unwrap();
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let matrices = gguf.store.tensors().iter().filter(|t| t.shape.len() > 1);
    matrices
        .map(|t| {
            let experts = if t.shape.len() > 2 { t.shape[0] } else { 1 };
            let n = experts * t.shape[t.shape.len() - 1];
            (t.name.clone(), (0..n).map(|_| random().powi(3) * 10.0 - 1e-4).map(|v| v.max(0.0)).collect())
        })
        .collect()
}

/// Writes it as llama.cpp's imatrix tool does today; the counts are those of every entry's experts.
fn write_imatrix(path: &Path, entries: &Entries, experts: usize, count: f32) {
    let sums = entries.iter().map(|(name, values)| {
        let squares = values.iter().map(|v| f64::from(v * count)).collect();
        let counts = vec![count as u64; if name.contains("_exps") { experts } else { 1 }];
        (name.clone(), Sums { squares, counts })
    });
    let datasets = ["calibration.txt".to_string()];
    fs::write(path, imatrix::to_gguf(&sums.collect(), &datasets, 10, 512).unwrap()).unwrap();
}

/// The older flat format: sums over calls.
fn write_dat(path: &Path, entries: &Entries, calls: i32) {
    let mut file = (entries.len() as i32).to_le_bytes().to_vec();
    for (name, values) in entries {
        file.extend((name.len() as i32).to_le_bytes());
        file.extend(name.as_bytes());
        file.extend(calls.to_le_bytes());
        file.extend((values.len() as i32).to_le_bytes());
        values.iter().for_each(|v| file.extend((v * calls as f32).to_le_bytes()));
    }
    file.extend(10i32.to_le_bytes());
    file.extend(15i32.to_le_bytes());
    file.extend(b"calibration.txt");
    fs::write(path, file).unwrap();
}

fn with_imatrix(quantizer: Quantizer, path: &Path) -> Quantizer {
    let imatrix = ImatrixChoice { path: path.to_path_buf(), include: Vec::new(), exclude: Vec::new() };
    Quantizer { imatrix: Some(imatrix), ..quantizer }
}

/// Every file type, of every fixture: the file that llama.cpp writes.
fn every_type_of(model: &str) {
    let dir = tempfile::tempdir().unwrap();
    let [full, ours, ggmls] = ["full.gguf", "ours.gguf", "ggmls.gguf"].map(|n| dir.path().join(n));
    common::convert(&common::fixture(model), &full, None);
    let mut written = 0;
    for recipe in Recipe::all().unwrap() {
        let what = format!("{model} {}", recipe.name);
        let ggml = model_quantize(&full, &ggmls, &QuantizeOptions::new(recipe.id));
        let own = quantize(&full, &ours, Quantizer::new(recipe));
        match (ggml, own) {
            (Ok(()), Ok(())) => assert_same_file(&ours, &ggmls, &what),
            (Err(e), Err(own)) => {
                assert_same_refusal(&e, &own, &what);
                continue;
            }
            (ggml, own) => panic!("{what}: llama.cpp {ggml:?}, qconv {own:?}"),
        }
        written += 1;
    }
    assert!(written > 20, "{model}: {written} file types");
}

/// Both say no for the same reason.
fn assert_same_refusal(ggml: &qconv::Error, own: &qconv::Error, what: &str) {
    let (ggml, own) = (ggml.to_string(), own.to_string());
    let same = ggml.contains("imatrix") && own.contains("importance")
        || ggml.contains("no tensor type fallback") && own.contains("blocks of");
    assert!(same, "{what}: llama.cpp {ggml}, qconv {own}");
}

/// And with an importance matrix.
fn every_type_weighed(model: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (full, ours, ggmls, imatrix) =
        (path("full.gguf"), path("ours.gguf"), path("ggmls.gguf"), path("imatrix.gguf"));
    common::convert(&common::fixture(model), &full, None);
    let entries = importance(&full);
    let gguf = Gguf::open(&full, &Limits::default()).unwrap();
    let experts = gguf.store.tensors().iter().find(|t| t.shape.len() > 2).map_or(1, |t| t.shape[0] as usize);
    // A power of two, so that dividing gives back what was multiplied.
    write_imatrix(&imatrix, &entries, experts, 64.0);
    for recipe in Recipe::all().unwrap() {
        let what = format!("{model} {} weighed", recipe.name);
        let options = QuantizeOptions {
            imatrix: entries.iter().map(|(n, v)| (n.clone(), v.clone())).collect(),
            ..QuantizeOptions::new(recipe.id)
        };
        let ggml = model_quantize(&full, &ggmls, &options);
        match (ggml, quantize(&full, &ours, with_imatrix(Quantizer::new(recipe), &imatrix))) {
            (Ok(()), Ok(())) => {}
            (Err(e), Err(own)) => {
                assert_same_refusal(&e, &own, &what);
                continue;
            }
            (ggml, own) => panic!("{what}: llama.cpp {ggml:?}, qconv {own:?}"),
        }
        // llama_model_quantize itself does not say where the importance came from.
        let gguf = Gguf::open(&ours, &Limits::default()).unwrap();
        let keys =
            ["file", "dataset", "entries_count", "chunks_count"].map(|k| format!("quantize.imatrix.{k}"));
        assert!(keys.iter().all(|k| gguf.metadata.get(k).is_some()), "{what}");
        assert_eq!(gguf.metadata.str("quantize.imatrix.dataset"), Some("calibration.txt"));
        assert_same_tensors(&ours, &ggmls, &what);
    }
}

fn assert_same_tensors(ours: &Path, ggmls: &Path, what: &str) {
    let open = |path| Gguf::open(path, &Limits::default()).unwrap();
    let (x, y) = (open(ours), open(ggmls));
    assert_eq!(x.store.tensors().len(), y.store.tensors().len(), "{what}");
    for (t, u) in x.store.tensors().iter().zip(y.store.tensors()) {
        assert_eq!((&t.name, t.dtype, &t.shape), (&u.name, u.dtype, &u.shape), "{what}");
        let same = x.store.read_all(t).unwrap() == y.store.read_all(u).unwrap();
        assert!(same, "{what}: the bytes of {} ({}) differ", t.name, t.dtype);
    }
}

macro_rules! models {
    ($($name:ident: $model:literal,)*) => {
        mod every_type_gives_llama_cpps_file {
            $(#[test]
            fn $name() {
                super::every_type_of($model);
            })*
        }
        mod every_type_weighed_gives_llama_cpps_tensors {
            $(#[test]
            fn $name() {
                super::every_type_weighed($model);
            })*
        }
    };
}

models! {
    tiny_llama: "tiny-llama",
    llama: "models/llama",
    mixtral: "models/mixtral",
    qwen2: "models/qwen2",
    qwen3_moe: "models/qwen3_moe",
    gemma3: "models/gemma3-spm",
    gpt2: "models/gpt2",
}

/// From Hugging Face in one pass: what conversion and quantizing give one after the other.
#[test]
fn one_pass_equals_two() {
    let dir = tempfile::tempdir().unwrap();
    let [full, one, two] = ["full.gguf", "one.gguf", "two.gguf"].map(|n| dir.path().join(n));
    for model in ["models/qwen3_moe", "models/gemma3-spm", "tiny-llama"] {
        common::convert(&common::fixture(model), &full, None);
        for name in ["q4_k_m", "q4_0", "q5_1", "q2_k", "q6_k", "iq4_xs", "mxfp4_moe"] {
            HfToGguf {
                source: common::fixture(model),
                output: Some(one.clone()),
                quantizer: Some(Quantizer::new(recipe(name))),
                tokens: TokenCheck::Skipped,
                ..HfToGguf::default()
            }
            .plan()
            .and_then(|job| job.run(true, &common::budget(), &Silent))
            .unwrap();
            quantize(&full, &two, Quantizer::new(recipe(name))).unwrap();
            assert_same_file(&one, &two, &format!("{model} {name}"));
        }
    }
}

/// Threads and memory change nothing, with and without importance.
#[test]
fn threads_and_memory_do_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    common::convert(&common::fixture("tiny-llama"), &path("full.gguf"), None);
    write_imatrix(&path("imatrix.gguf"), &importance(&path("full.gguf")), 1, 64.0);
    for name in ["q4_0", "q4_k_m", "iq3_xxs"] {
        let quantizer = with_imatrix(Quantizer::new(recipe(name)), &path("imatrix.gguf"));
        let mut first: Option<Vec<u8>> = None;
        for threads in [1, 2, 7] {
            for memory in [64 << 20, 65 << 20, 200 << 20] {
                let options = Quantize::new(path("full.gguf"), path("out.gguf"), quantizer.clone());
                let budget = Budget::new(Some(threads), Some(memory)).unwrap();
                options.plan().and_then(|job| job.run(true, &budget, &Silent)).unwrap();
                let bytes = fs::read(path("out.gguf")).unwrap();
                match &first {
                    None => first = Some(bytes),
                    Some(first) => assert!(first == &bytes, "{name}, {threads} threads, {memory} bytes"),
                }
            }
        }
    }
}

/// Options that llama-quantize has, one by one and together, against the library.
#[test]
fn options_give_llama_cpps_file() {
    let dir = tempfile::tempdir().unwrap();
    let [full, ours, ggmls] = ["full.gguf", "ours.gguf", "ggmls.gguf"].map(|n| dir.path().join(n));
    type Change = fn(&mut Quantizer, &mut QuantizeOptions);
    let changes: [(&str, Change); 7] = [
        ("pure", |q, o| (q.overrides.pure, o.pure) = (true, true)),
        ("leave output", |q, o| (q.overrides.leave_output, o.quantize_output_tensor) = (true, false)),
        ("output type", |q, o| {
            (q.overrides.output, o.output_tensor_type) = (Some(DType::Q5_0), Some(DType::Q5_0));
        }),
        ("embedding type", |q, o| {
            (q.overrides.token_embedding, o.token_embedding_type) = (Some(DType::F16), Some(DType::F16));
        }),
        ("tensor types", |q, o| {
            for entry in ["attn_[qk]=q8_0", "ffn_down=iq4_nl", "blk\\.1\\.=q5_k"] {
                q.overrides.tensor_types.push(parse_tensor_type(entry).unwrap());
                let (pattern, name) = entry.split_once('=').unwrap();
                o.tensor_types.push((pattern.into(), DType::from_name(&name.to_uppercase()).unwrap()));
            }
        }),
        ("pruned", |q, o| {
            q.prune_layers.insert(1);
            o.prune_layers.push(1);
        }),
        ("requantized", |q, o| (q.allow_requantize, o.allow_requantize) = (true, true)),
    ];
    for model in ["tiny-llama", "models/mixtral", "models/gpt2"] {
        common::convert(&common::fixture(model), &full, None);
        for name in ["q4_k_m", "q4_0", "q2_k"] {
            for (what, change) in changes {
                let mut quantizer = Quantizer::new(recipe(name));
                let mut options = QuantizeOptions::new(quantizer.recipe.id);
                change(&mut quantizer, &mut options);
                model_quantize(&full, &ggmls, &options).unwrap();
                quantize(&full, &ours, quantizer).unwrap();
                assert_same_file(&ours, &ggmls, &format!("{model} {name} {what}"));
            }
        }
    }
}

/// What is quantized already is refused, or quantized again as llama.cpp does.
#[test]
fn requantizing() {
    let dir = tempfile::tempdir().unwrap();
    let [full, ours, ggmls] = ["full.gguf", "ours.gguf", "ggmls.gguf"].map(|n| dir.path().join(n));
    common::convert(&common::fixture("tiny-llama"), &full, Some("q8_0"));
    let error = quantize(&full, &ours, Quantizer::new(recipe("q4_k_m"))).unwrap_err();
    assert!(error.to_string().contains("quantized already"), "{error}");
    for name in ["q4_k_m", "f16", "q8_0"] {
        let options = QuantizeOptions { allow_requantize: true, ..QuantizeOptions::new(recipe(name).id) };
        model_quantize(&full, &ggmls, &options).unwrap();
        quantize(&full, &ours, Quantizer { allow_requantize: true, ..Quantizer::new(recipe(name)) }).unwrap();
        assert_same_file(&ours, &ggmls, name);
    }
}

/// Shards stay shards, each with its tensors.
#[test]
fn kept_shards_are_llama_cpps() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let job = HfToGguf {
        source: common::fixture("tiny-llama"),
        output: Some(path("full.gguf")),
        sharding: Sharding::bounded(Some(3 << 20), None).unwrap(),
        ..HfToGguf::default()
    };
    job.plan().and_then(|job| job.run(true, &common::budget(), &Silent)).unwrap();
    let shards: Vec<PathBuf> = (1..=3).map(|i| path(&format!("full-0000{i}-of-00003.gguf"))).collect();
    assert!(shards.iter().all(|s| s.is_file() && fs::metadata(s).unwrap().len() <= 3 << 20));
    for name in ["q4_k_m", "q8_0"] {
        let options = QuantizeOptions { keep_split: true, ..QuantizeOptions::new(recipe(name).id) };
        model_quantize(&shards[0], &path("ggmls"), &options).unwrap();
        let options = Quantize::new(&shards[1], path("ours.gguf"), Quantizer::new(recipe(name)));
        run(&Quantize { sharding: Sharding::Keep, ..options }).unwrap();
        for i in 1..=3 {
            let shard = |who: &str| path(&format!("{who}-0000{i}-of-00003.gguf"));
            let (a, b) = (fs::read(shard("ours")).unwrap(), fs::read(shard("ggmls")).unwrap());
            assert!(a == b, "{name}, shard {i}");
        }
    }
}

/// Both formats of importance matrices mean the same.
#[test]
fn imatrix_formats_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    common::convert(&common::fixture("tiny-llama"), &path("full.gguf"), None);
    let entries = importance(&path("full.gguf"));
    write_imatrix(&path("imatrix.gguf"), &entries, 1, 64.0);
    write_dat(&path("imatrix.dat"), &entries, 64);
    let mut tensors = Vec::new();
    for imatrix in ["imatrix.gguf", "imatrix.dat"] {
        let out = path(&format!("{imatrix}.out"));
        quantize(&path("full.gguf"), &out, with_imatrix(Quantizer::new(recipe("q4_k_m")), &path(imatrix)))
            .unwrap();
        tensors.push(out);
    }
    assert_same_tensors(&tensors[0], &tensors[1], "both formats");
    // Not the same as without one.
    quantize(&path("full.gguf"), &path("plain.gguf"), Quantizer::new(recipe("q4_k_m"))).unwrap();
    assert_ne!(fs::read(path("plain.gguf")).unwrap().len(), 0);
    let open = |name: &Path| Gguf::open(name, &Limits::default()).unwrap();
    let (a, b) = (open(&path("plain.gguf")), open(&tensors[0]));
    let differ =
        a.store.tensors().iter().filter(|t| {
            a.store.read_all(t).unwrap() != b.store.read_all(b.store.get(&t.name).unwrap()).unwrap()
        });
    assert!(differ.count() > 10);
}

/// Faulty importance matrices are refused or reported, by name.
#[test]
fn importance_matrices_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let full = path("full.gguf");
    common::convert(&common::fixture("tiny-llama"), &full, None);
    let sound = importance(&full);
    let name = "blk.1.ffn_down.weight";
    let plan = |entries: &Entries, recipe_name: &str| {
        write_imatrix(&path("imatrix.gguf"), entries, 1, 64.0);
        let quantizer = with_imatrix(Quantizer::new(recipe(recipe_name)), &path("imatrix.gguf"));
        Quantize::new(&full, path("out.gguf"), quantizer)
            .plan()
            .and_then(|job| job.plan.check_feasible(false).map(|()| job.plan.notes.join("\n")))
    };
    let changed = |change: &dyn Fn(&mut Entries)| {
        let mut entries = sound.clone();
        change(&mut entries);
        entries
    };
    let notes = plan(&sound, "q4_k_m").unwrap();
    assert!(notes.contains("importance matrix") && !notes.contains("without"), "{notes}");
    let notes = plan(&changed(&|e| drop(e.remove(name))), "q4_k_m").unwrap();
    assert!(notes.contains("have no entry") && notes.contains(name), "{notes}");
    let error = plan(&changed(&|e| drop(e.remove(name))), "iq2_xxs").unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("importance"), "{error}");
    let error = plan(&changed(&|e| e.get_mut(name).unwrap().truncate(7)), "q4_k_m").unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("7 values"), "{error}");
    let notes = plan(&changed(&|e| e.get_mut("token_embd.weight").unwrap().truncate(7)), "q4_k_m").unwrap();
    assert!(notes.contains("wrong size") && notes.contains("token_embd"), "{notes}");
    let error =
        plan(&changed(&|e| e.get_mut(name).unwrap()[3] = f32::NAN), "q4_k_m").unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("NaN"), "{error}");
    let notes = plan(&changed(&|e| e.get_mut(name).unwrap().fill(0.0)), "q4_k_m").unwrap();
    assert!(notes.contains("zeros only") && notes.contains(name), "{notes}");
    let notes = plan(&changed(&|e| e.get_mut(name).unwrap()[3] = -1.0), "q4_k_m").unwrap();
    assert!(notes.contains("negative") && notes.contains(name), "{notes}");
    let notes = plan(&changed(&|e| drop(e.insert("no.such.tensor".into(), vec![1.0]))), "q4_k_m").unwrap();
    assert!(notes.contains("belong to no tensor") && notes.contains("no.such.tensor"), "{notes}");
}
