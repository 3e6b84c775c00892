//! Core ML programs, executed: the numbers are those of another interpreter, the same whatever the threads and the
//! division into calls; damage is refused, never met with a panic.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::fixture;
use qconv::container::coreml::package::{MANIFEST, MODEL, WEIGHTS};
use qconv::error::ErrorKind;
use qconv::exec::{LanguageModel, Program, Rounding, Session, Tensor};
use qconv::limits::Limits;
use serde_json::Value as Json;

const IDS: [i32; 8] = [5, 17, 200, 3, 42, 7, 99, 254];

/// What `check_mlpackage.py` (coremltools 9.0, numpy) computes of a fixture.
fn executed(package: &str, rounding: Rounding, key: &str) -> Vec<f32> {
    let all: Json = serde_json::from_slice(&fs::read(fixture("coreml/executed.json")).unwrap()).unwrap();
    let of = &all[package][format!("{rounding:?}")][key];
    of.as_array().unwrap_or_else(|| panic!("{key}")).iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn open(path: &Path) -> Program {
    Program::open(path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn model(name: &str) -> LanguageModel {
    LanguageModel::open(&fixture(name), &Limits::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn ids(ids: &[i32]) -> BTreeMap<String, Tensor> {
    [("ids".to_string(), Tensor::ints(&[1, ids.len()], ids.to_vec()).unwrap())].into()
}

fn near(found: &[f32], wanted: &[f32], most: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let spread = wanted.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = found.iter().zip(wanted).map(|(f, w)| (f - w).abs()).fold(0f32, f32::max);
    assert!(worst <= most * spread, "{what}: differs by {worst} of {spread}");
}

/// A table of 2 bits, a matrix of 4, a state: by the formulas of the script that wrote it.
#[test]
fn a_package_that_was_written_by_hand() {
    let table = |row: usize, column: usize| {
        let i = row * 32 + column;
        (-1.5 + ((i * 7 + i / 5) % 4) as f32) * (1 + row / 4) as f32
    };
    let weight = |o: usize, i: usize| 0.25 * (1 + o) as f32 * (((o * 32 + i) * 5 % 16) as f32 - 8.0);
    let program = open(&fixture("coreml/mini.mlpackage"));
    assert_eq!(program.functions().collect::<Vec<_>>(), ["main"]);
    for rounding in [Rounding::F32, Rounding::F16] {
        let mut states = program.states();
        let mut sums = [0f32; 32];
        for call in [&[0, 7, 3][..], &[5]] {
            let found = program.call("main", &ids(call), &mut states, rounding).unwrap();
            for (column, sum) in sums.iter_mut().enumerate() {
                *sum += call.iter().map(|id| table(*id as usize, column)).sum::<f32>() / call.len() as f32;
            }
            let y: Vec<f32> = (0..6).map(|o| (0..32).map(|i| weight(o, i) * sums[i]).sum()).collect();
            near(found["y"].as_floats().unwrap(), &y, 2e-3, "y");
            assert_eq!(found["y"].shape(), [1, 1, 6]);
            near(states.get("acc").unwrap().as_floats().unwrap(), &sums, 1e-3, "acc");
        }
        assert!(states.overflow().is_none());
    }
}

#[test]
fn every_type_of_a_package_of_coremltools() {
    let program = open(&fixture("coreml/coremltools.mlpackage"));
    for (rounding, most) in [(Rounding::F32, 1e-6), (Rounding::F16, 1e-6)] {
        let mut states = program.states();
        for (n, call) in [&[0, 11, 5][..], &[7]].into_iter().enumerate() {
            let found = program.call("main", &ids(call), &mut states, rounding).unwrap();
            assert_eq!(found.len(), 2);
            for (name, value) in &found {
                let wanted = executed("coremltools.mlpackage", rounding, &format!("{n}/{name}"));
                near(value.as_floats().unwrap(), &wanted, most, &format!("{rounding:?} {n}/{name}"));
            }
        }
        let wanted = executed("coremltools.mlpackage", rounding, "state/cache");
        near(states.get("cache").unwrap().as_floats().unwrap(), &wanted, most, "cache");
    }
}

/// A llama of two layers, whose weights are encoded in every way.
#[test]
fn a_language_model_of_coremltools() {
    let model = model("coreml/llama.mlpackage");
    assert_eq!((model.context(), model.n_vocab()), (64, 256));
    for (rounding, most) in [(Rounding::F32, 2e-6), (Rounding::F16, 2e-3)] {
        let wanted: Vec<f32> =
            (0..4).flat_map(|n| executed("llama.mlpackage", rounding, &format!("{n}/logits"))).collect();
        let mut session = Session::new(&model, 64, rounding).unwrap();
        for chunk in [8, 5, 1] {
            session.truncate(0);
            let found: Vec<f32> = IDS.chunks(chunk).flat_map(|ids| session.decode(ids).unwrap()).collect();
            assert_eq!(session.position(), IDS.len());
            near(&found, &wanted, most, &format!("{rounding:?} in chunks of {chunk}"));
        }
        // What was cut off is of no effect.
        session.truncate(5);
        let again: Vec<f32> = IDS[5..].iter().flat_map(|id| session.decode(&[*id]).unwrap()).collect();
        near(&again, &wanted[5 * 256..], most, "again");
        assert!(session.overflow().is_none());
    }
    let mut session = Session::new(&model, 6, Rounding::F32).unwrap();
    let e = session.decode(&IDS).unwrap_err();
    assert!(e.kind() == ErrorKind::Misuse && e.to_string().contains("room for 6"), "{e}");
    let e = session.decode(&[256]).unwrap_err();
    assert!(e.to_string().contains("there is no token 256"), "{e}");
    assert!(Session::new(&model, 65, Rounding::F32).is_err());
}

#[test]
fn threads_change_no_bit() {
    let model = model("coreml/llama.mlpackage");
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut session = Session::new(&model, 64, Rounding::F16).unwrap();
            let ids: Vec<i32> = (0..60).map(|i| i * 37 % 256).collect();
            session.decode(&ids).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        })
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(5));
}

#[test]
fn what_is_no_language_model() {
    let open = |path: &Path| LanguageModel::open(path, &Limits::default()).unwrap_err();
    let e = open(&fixture("coreml/mini.mlpackage"));
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("main(ids int32[1,?])"), "{e}");
    let e = open(&fixture("coreml"));
    assert!(e.to_string().contains("has no chunks.json"), "{e}");
    let dir = tempfile::tempdir().unwrap();
    for (chunks, words) in [
        (r#"{"packages": []}"#, "there are no packages"),
        (r#"{"packages": [{"package": "../x"}]}"#, "lies elsewhere"),
        (r#"{"packages": 3}"#, "chunks.json"),
    ] {
        fs::write(dir.path().join("chunks.json"), chunks).unwrap();
        let e = open(dir.path());
        assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
    }
}

#[test]
fn inputs_have_their_types() {
    let program = open(&fixture("coreml/mini.mlpackage"));
    let fault = |inputs: &BTreeMap<String, Tensor>| {
        let e = program.call("main", inputs, &mut program.states(), Rounding::F32).unwrap_err();
        assert!(e.path().is_some(), "{e}");
        e.to_string()
    };
    assert!(fault(&BTreeMap::new()).contains("the input \"ids\" is missing: int32[1,?]"));
    let more = [("id".to_string(), Tensor::ints(&[], vec![0]).unwrap())];
    assert!(fault(&ids(&[1]).into_iter().chain(more).collect()).contains("there is no input \"id\""));
    let floats = [("ids".to_string(), Tensor::floats(&[1, 1], vec![0.0]).unwrap())].into();
    assert!(fault(&floats).contains("\"ids\" is fp32[1,1], it is declared int32[1,?]"));
    for id in [8, -1] {
        let e = fault(&ids(&[id]));
        assert!(e.contains(&format!("gather \"emb\": index {id} of 8")), "{e}");
    }
    let e = program.call("other", &ids(&[1]), &mut program.states(), Rounding::F32).unwrap_err();
    assert_eq!(e.hint_text(), Some("it has [\"main\"]"));
    let mut states = program.states();
    assert!(program.call("main", &ids(&[9]), &mut states, Rounding::F32).is_err());
    assert!(
        program.call("main", &ids(&[1]), &mut states, Rounding::F32).is_ok(),
        "it failed before it took a state"
    );
}

/// Cut anywhere, or with a byte changed: refused when opened or called, or executed, but no panic.
#[test]
fn damage_is_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mlpackage");
    fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
    let from = fixture("coreml/mini.mlpackage");
    for name in [MANIFEST, MODEL, WEIGHTS] {
        fs::copy(from.join(name), path.join(name)).unwrap();
    }
    let whole = fs::read(from.join(MODEL)).unwrap();
    let (mut opened, mut called) = (0, 0);
    let mut attempt = |bytes: &[u8]| {
        fs::write(path.join(MODEL), bytes).unwrap();
        if let Ok(program) = Program::open(&path, &Limits::default()) {
            opened += 1;
            let result = program.call("main", &ids(&[1, 2]), &mut program.states(), Rounding::F16);
            called += usize::from(result.is_ok());
        }
    };
    (0..whole.len()).for_each(|n| attempt(&whole[..n]));
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        attempt(&bytes);
    }
    assert!(opened > called && called > 100, "{opened} opened, {called} called of {}", whole.len());
}
