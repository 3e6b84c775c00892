//! Every definition in `formats/arch` is tried on its `[example]` and each `[variant.NAME]` of it.
//!
//! Nothing but the config is given. Which tensors the model has and how they are shaped, the linked
//! llama.cpp says: it loads a file of zeros that holds what the definition's rules make, and its
//! complaints tell what is missing and what shape was expected, until it is content. The rules, run
//! backwards, turn that into the names and shapes of a checkpoint. This is filled with noise and
//! then goes the way of any model: converted, loaded, run, converted back and compared, converted
//! again and compared.
//!
//! `QCONV_ARCH=NAME` tries one; the table of results goes to stdout (`-- --nocapture`).
#![cfg(feature = "ggml")]

#[path = "common/arch_table.rs"]
mod arch_table;
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use qconv::arch::{self, Architecture, Data, Facts, Mapped, Model, Target};
use qconv::container::gguf::{Gguf, Metadata, Value, write};
use qconv::container::safetensors;
use qconv::convert::FileType;
use qconv::convert::{
    Folding, HfToGguf, MethodChoice, Quantize, Quantizer, Recipe, Silent, ToHf, TokenCheck,
};
use qconv::eval::embed::output;
use qconv::ggml;
use qconv::limits::Limits;
use qconv::tensor::{DType, TensorInfo, elements};
use qconv::vocab;
use serde_json::Value as Json;

const MAX_LAYERS: u64 = 64;
const TOKENS: &[i32] = &[5, 17, 300, 42, 7, 99, 256, 3];

type Shapes = BTreeMap<String, Vec<u64>>;
type Outcome<T> = Result<T, String>;

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

#[test]
fn every_definition_runs_on_its_example() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("formats/arch");
    let only = std::env::var("QCONV_ARCH").ok();
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let (mut tried, mut faults) = (arch_table::Examples::new(), Vec::new());
    for path in files {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let is_base =
            !fs::read_to_string(&path).unwrap().lines().any(|l| l.trim_start().starts_with("arch "));
        if is_base || only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        let definition = arch::read(&path, &Limits::default()).unwrap();
        let Some(examples) = definition.examples() else {
            faults.push(format!("{name}: has no [example]"));
            continue;
        };
        tried.push((definition.clone(), examples.iter().map(|(name, _)| name.clone()).collect()));
        for (example, config) in examples {
            match Trial::new(&path, &definition, config).and_then(|t| t.run()) {
                Ok((tensors, folds)) => {
                    println!(
                        "{name}\t{example}\t{tensors} tensors\tconverts, loads, runs, goes back\t{folds}"
                    )
                }
                Err(e) => {
                    println!("{name}\t{example}\t{e}");
                    faults.push(format!("{name}, {example}: {e}"));
                }
            }
        }
    }
    assert!(!tried.is_empty());
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    if only.is_none() {
        arch_table::check(&tried);
    }
}

struct Trial {
    definition: PathBuf,
    model: Model,
    metadata: Metadata,
    dir: tempfile::TempDir,
}

impl Trial {
    fn new(path: &Path, definition: &Architecture, mut config: Json) -> Outcome<Self> {
        let dir = tempfile::tempdir().map_err(text)?;
        let kinds = &definition.tokenizer.kinds;
        let has = |kind: &str| kinds.iter().any(|k| k == kind);
        let fixture = match () {
            () if has("wpm") => "models/bert",
            () if has("ugm") => "models/t5",
            () if has("bpe") => "models/llama",
            () => "models/gemma3-spm",
        };
        let fixture = common::fixture(fixture);
        let hf = dir.path().join("hf");
        fs::create_dir(&hf).map_err(text)?;
        for name in ["tokenizer.json", "tokenizer.model", "spiece.model", "tokenizer_config.json"] {
            if fixture.join(name).exists() {
                fs::copy(fixture.join(name), hf.join(name)).map_err(text)?;
            }
        }
        let theirs = fs::read(fixture.join("config.json")).map_err(text)?;
        let theirs: Json = serde_json::from_slice(&theirs).map_err(text)?;
        let map = config.as_object_mut().ok_or("the example is no table")?;
        for key in ["vocab_size", "type_vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"] {
            if let (false, Some(value)) = (map.contains_key(key), theirs.get(key)) {
                map.insert(key.into(), value.clone());
            }
        }
        fs::write(hf.join("config.json"), config.to_string()).map_err(text)?;
        let mut model = arch::take_for(definition.clone(), &config).map_err(text)?;
        let source = vocab::Source {
            dir: &hf,
            config: &config,
            vocab_size: model.var("vocab_size").map_err(text)?.as_u64(),
            pre: None,
            kinds,
        };
        let vocab = vocab::load(&source, &Limits::default()).map_err(text)?;
        *model.facts_mut() =
            Facts { n_tokens: Some(vocab.tokens.len() as u64), file_type: Some(0), ..Facts::default() };
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", definition.arch.as_str());
        for (key, value) in model.metadata().map_err(text)?.0 {
            metadata.set(key, value);
        }
        for (key, value) in model.scalars(&mut |_| Ok(0.5)).map_err(text)?.0 {
            metadata.set(key, value);
        }
        vocab.to_metadata(&mut metadata);
        Ok(Self { definition: path.to_path_buf(), model, metadata, dir })
    }

    fn run(&self) -> Outcome<(usize, String)> {
        let targets = self.model.targets(MAX_LAYERS).map_err(text)?;
        let shapes = self.shapes(&targets)?;
        let infos: Vec<TensorInfo> = shapes.iter().map(|(name, shape)| info(name, shape)).collect();
        let mut sources = self.model.map_back(&infos).map_err(|e| format!("backwards: {e}"))?;
        sources.extend(self.model.scalars_back(&self.metadata).map_err(text)?);
        let path = |name: &str| self.dir.path().join(name);
        write_checkpoint(&path("hf"), &sources);
        self.convert("hf", "a.gguf")?;
        let a = contents(&Gguf::open(path("a.gguf"), &Limits::default()).map_err(text)?.store);
        let output = ggml::Model::load(path("a.gguf"), &ggml::ModelOptions::default())
            .and_then(|model| output(&model, TOKENS, 1))
            .map_err(|e| format!("runs: {e}"))?;
        let values = &output.matrix().values;
        if !values.iter().all(|v| v.is_finite()) {
            return Err(format!("{} are not finite", output.name()));
        }
        if values.iter().all(|v| *v == values[0]) {
            return Err(format!("all {} are the same", output.name()));
        }
        let folds = self.fold(values)?;
        ToHf {
            dtype: Some(DType::F32),
            arch_file: Some(self.definition.clone()),
            ..ToHf::new(path("a.gguf"), path("back"))
        }
        .plan()
        .and_then(|job| job.run(false, &common::budget(), &Silent))
        .map_err(|e| format!("back: {e}"))?;
        let open = |name: &str| {
            let file = path(name).join("model.safetensors");
            safetensors::open(&file, &Limits::default()).map(|f| contents(&f.store)).map_err(text)
        };
        same("back", &open("hf")?, &open("back")?)?;
        self.convert("back", "b.gguf")?;
        let [(metadata, tensors), (again, b)] = ["a.gguf", "b.gguf"].map(|name| {
            let gguf = Gguf::open(path(name), &Limits::default()).unwrap();
            (gguf.metadata.clone(), contents(&gguf.store))
        });
        same("again", &tensors, &b)?;
        let keys = |m: &Metadata| m.iter().map(|(k, _)| k.to_string()).collect::<BTreeSet<_>>();
        for key in keys(&metadata).union(&keys(&again)) {
            let (x, y) = (metadata.get(key), again.get(key));
            if x != y && !key.starts_with("general.") {
                return Err(format!("again: {key} was {x:?} and is {y:?}"));
            }
        }
        Ok((a.len(), folds))
    }

    /// Moves random powers of two wherever the definition says that this changes nothing, and looks whether
    /// it did. Returns where that was, and the greatest change in parts of the greatest value: none, but for
    /// what is summed in another order. (Other scales would be rounded at each step.)
    fn fold(&self, before: &[f32]) -> Outcome<String> {
        if arch::folds(&self.model.arch.arch).map_err(text)?.is_empty() {
            return Ok("no folds".into());
        }
        let method = MethodChoice { fold: Some(Folding::Random(7)), ..MethodChoice::default() };
        let recipe = Recipe::parse("f32").map_err(text)?;
        let quantizer = Quantizer { method: Some(method), ..Quantizer::new(recipe) };
        let path = |name: &str| self.dir.path().join(name);
        let job = Quantize::new(path("a.gguf"), path("folded.gguf"), quantizer).plan().map_err(text)?;
        job.run(false, &common::budget(), &Silent).map_err(|e| format!("folds: {e}"))?;
        let after = ggml::Model::load(path("folded.gguf"), &ggml::ModelOptions::default())
            .and_then(|model| output(&model, TOKENS, 1))
            .map_err(|e| format!("folded: {e}"))?;
        let most = before.iter().fold(0f32, |m, v| m.max(v.abs()));
        let change = before.iter().zip(&after.matrix().values).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        let notes: Vec<&str> =
            job.plan.notes.iter().filter(|n| n.starts_with("awq")).map(String::as_str).collect();
        let what = format!("{:.1e} by {}", change / most, notes.join("; "));
        match change <= 1e-6 * most {
            true => Ok(what),
            false => Err(format!("folded scales change the output, {what}")),
        }
    }

    fn convert(&self, from: &str, to: &str) -> Outcome<()> {
        HfToGguf {
            source: self.dir.path().join(from),
            output: Some(self.dir.path().join(to)),
            file_type: FileType::parse("f32"),
            arch_file: Some(self.definition.clone()),
            tokens: TokenCheck::Skipped,
            ..HfToGguf::default()
        }
        .plan()
        .and_then(|job| job.run(false, &common::budget(), &Silent))
        .map(|_| ())
        .map_err(|e| format!("{from} to {to}: {e}"))
    }

    /// Every tensor that llama.cpp takes of those that the definition makes.
    fn shapes(&self, targets: &[Target]) -> Outcome<Shapes> {
        let group = |t: &Target| (t.rule.clone(), t.name.ends_with("bias"));
        let mut shapes = Shapes::new();
        let needed = targets.iter().filter(|t| t.needed).map(|t| t.name.clone()).collect();
        self.settle(&mut shapes, needed, targets)?;
        let groups: BTreeSet<_> = targets.iter().filter(|t| !t.needed).map(group).collect();
        for wanted in groups {
            let names: Vec<String> =
                targets.iter().filter(|t| group(t) == wanted).map(|t| t.name.clone()).collect();
            if names.iter().any(|n| shapes.contains_key(n)) {
                continue;
            }
            let mut more = shapes.clone();
            // What llama.cpp knows nothing of, or only together with others, stays away.
            if self.settle(&mut more, names, &[]).is_ok() {
                shapes = more;
            }
        }
        Ok(shapes)
    }

    /// Adds `names`, and what llama.cpp says is missing as far as `targets` make it, until it loads.
    fn settle(&self, shapes: &mut Shapes, names: Vec<String>, targets: &[Target]) -> Outcome<()> {
        shapes.extend(names.into_iter().map(|name| (name.clone(), self.first_guess(&name))));
        for _ in 0..4000 {
            let Err(why) = self.load(shapes) else { return Ok(()) };
            let named = why.rsplit("tensor '").next().filter(|n| n.len() < why.len());
            let quoted = named.and_then(|n| n.split('\'').next()).or(why.split('\'').nth(1));
            let quoted = quoted.unwrap_or_default().to_string();
            if let Some((_, expected)) = why.split_once("wrong shape; expected") {
                let dims = expected.split(", got").next().unwrap_or_default();
                let dims = dims.split(',').map(|d| d.trim().parse::<u64>());
                let mut shape: Vec<u64> = dims.collect::<Result<_, _>>().map_err(|_| why.clone())?;
                shape.reverse();
                if shapes.get(&quoted) == Some(&shape) || elements(&shape).map_err(text)? > 1 << 22 {
                    return Err(why);
                }
                // Most likely other layers are like this one.
                let role = |n: &str| n.splitn(3, '.').nth(2).map(str::to_string);
                let alike: Vec<String> = shapes
                    .iter()
                    .filter(|(n, s)| n.starts_with("blk.") && **s == [1] && role(n) == role(&quoted))
                    .map(|(n, _)| n.clone())
                    .collect();
                shapes.extend(alike.into_iter().map(|n| (n, shape.clone())));
                shapes.insert(quoted, shape);
            } else if (why.contains("missing tensor") || why.contains("not found"))
                && targets.iter().any(|t| t.name == quoted)
            {
                let guess = self.first_guess(&quoted);
                if shapes.insert(quoted, guess).is_some() {
                    return Err(why);
                }
            } else {
                return Err(why);
            }
        }
        Err("llama.cpp is never content".into())
    }

    /// A shape that llama.cpp corrects. Two tensors it takes by their shapes, and ends the process
    /// where that is none of those it knows.
    fn first_guess(&self, name: &str) -> Vec<u64> {
        if name.ends_with(".ffn_up.weight")
            && let Some(n) = self.metadata.u64("jina-bert-v2.feed_forward_length")
        {
            return vec![2 * n, 1];
        }
        let layer = name.strip_prefix("blk.").and_then(|n| n.strip_suffix(".attn_gate.weight"));
        let heads = self.metadata.get("laguna.attention.head_count");
        match (heads, layer.and_then(|i| i.parse().ok())) {
            (Some(Value::Array(heads)), Some(i)) => {
                vec![heads.get(i).and_then(|n| n.as_u64()).unwrap_or(1), 1]
            }
            _ => vec![1],
        }
    }

    fn load(&self, shapes: &Shapes) -> Outcome<()> {
        let mut tensors: Vec<(&str, DType, &[u64])> =
            shapes.iter().map(|(n, s)| (n.as_str(), DType::F32, s.as_slice())).collect();
        let generated = self.model.generated().map_err(text)?;
        tensors.extend(generated.iter().map(|g| (g.name.as_str(), DType::F32, g.shape.as_slice())));
        let layout = write::Layout::new(&self.metadata, &tensors).map_err(text)?;
        let path = self.dir.path().join("zeros.gguf");
        let mut bytes = layout.header;
        bytes.resize(layout.total_len as usize, 0);
        fs::write(&path, bytes).map_err(text)?;
        ggml::Model::load(&path, &ggml::ModelOptions::default()).map(|_| ()).map_err(text)
    }
}

fn info(name: &str, shape: &[u64]) -> TensorInfo {
    let nbytes = DType::F32.nbytes(shape).unwrap();
    TensorInfo { name: name.into(), dtype: DType::F32, shape: shape.to_vec(), file: 0, offset: 0, nbytes }
}

/// Noise, the same for the same name; zeros at the beginning where GGUF does not hold it.
fn write_checkpoint(dir: &Path, sources: &[Mapped]) {
    let tensors: Vec<(&str, DType, &[u64])> =
        sources.iter().map(|m| (m.name.as_str(), DType::F32, m.shape.as_slice())).collect();
    let layout = safetensors::write::layout(&tensors, u64::MAX).unwrap();
    let file = &layout.files[0];
    let mut bytes = file.header.clone();
    bytes.resize(file.len as usize, 0);
    for (Mapped { name, shape, data, .. }, (_, offset)) in sources.iter().zip(&layout.places) {
        let n = shape.iter().product::<u64>();
        let held = match data {
            Data::Copied { pieces, .. } => pieces.iter().map(|p| p.copy.elements()).sum(),
            Data::Values(_) => n,
        };
        let mut state =
            name.bytes().fold(0x9e37_79b9u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        for i in (n - held) as usize..n as usize {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.25;
            let at = *offset as usize + 4 * i;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    fs::write(dir.join(&file.name), bytes).unwrap();
}

type Contents = BTreeMap<String, (Vec<u64>, Vec<f32>)>;

fn contents(store: &qconv::container::Store) -> Contents {
    let read = |t: &TensorInfo| {
        assert_eq!(t.dtype, DType::F32, "{}", t.name);
        let bytes = store.read_all(t).unwrap();
        let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (t.name.clone(), (t.shape.clone(), values))
    };
    store.tensors().iter().map(read).collect()
}

/// Equal, but for the rounding of arithmetic that is done and undone.
fn same(when: &str, a: &Contents, b: &Contents) -> Outcome<()> {
    let names = |c: &Contents| c.keys().cloned().collect::<BTreeSet<_>>();
    if let Some(name) = names(a).symmetric_difference(&names(b)).next() {
        return Err(format!("{when}: {name} is on one side only"));
    }
    for (name, (shape, values)) in a {
        let (other_shape, other) = &b[name];
        if shape != other_shape {
            return Err(format!("{when}: {name} was {shape:?} and is {other_shape:?}"));
        }
        if let Some((x, y)) = values.iter().zip(other).find(|(x, y)| (**x - **y).abs() > 1e-6) {
            return Err(format!("{when}: a value of {name} was {x} and is {y}"));
        }
    }
    Ok(())
}
