//! Core ML programs, executed: the numbers are those of another interpreter, the same whatever the threads and the
//! division into calls; damage is refused, never met with a panic.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::fixture;
use qconv::container::coreml::mil::{Binding, Block, Function, Value, ValueType};
use qconv::container::coreml::package::{MANIFEST, MODEL, WEIGHTS};
use qconv::container::coreml::{DataType, Model, Only, decode, encode};
use qconv::error::{Error, ErrorKind};
use qconv::exec::{LanguageModel, Program, Rounding, Session, Tensor};
use qconv::limits::Limits;
use serde_json::Value as Json;
use tempfile::TempDir;

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
        let mut states = program.states().unwrap();
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
        let mut states = program.states().unwrap();
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
        (r#"{"packages": []}"#, "names no packages"),
        (r#"{"packages": [{"package": "../x"}]}"#, "is no name of a directory beside it"),
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
        let e = program.call("main", inputs, &mut program.states().unwrap(), Rounding::F32).unwrap_err();
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
    let e = program.call("other", &ids(&[1]), &mut program.states().unwrap(), Rounding::F32).unwrap_err();
    assert_eq!(e.hint_text(), Some("it has [\"main\"]"));
    let mut states = program.states().unwrap();
    assert!(program.call("main", &ids(&[9]), &mut states, Rounding::F32).is_err());
    assert!(
        program.call("main", &ids(&[1]), &mut states, Rounding::F32).is_ok(),
        "it failed before it took a state"
    );
}

/// A copy of a package, to be changed.
struct Copied {
    _dir: TempDir,
    path: PathBuf,
    model: Vec<u8>,
}

impl Copied {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.mlpackage");
        fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
        for file in [MANIFEST, MODEL, WEIGHTS] {
            fs::copy(fixture(name).join(file), path.join(file)).unwrap();
        }
        let model = fs::read(path.join(MODEL)).unwrap();
        Self { _dir: dir, path, model }
    }

    fn open(&self, model: &[u8]) -> Result<Program, Error> {
        fs::write(self.path.join(MODEL), model).unwrap();
        Program::open(&self.path, &Limits::default())
    }

    /// With another function.
    fn changed(&self, change: impl Fn(&mut Function, &mut Block)) -> Result<Program, Error> {
        let mut model: Model = decode(&self.model).unwrap().0;
        let main = model.program.functions.get_mut("main").unwrap();
        let opset = main.opset.clone();
        let mut block = main.block_specializations.remove(&opset).unwrap();
        change(main, &mut block);
        main.block_specializations.insert(opset, block);
        self.open(&encode(&model))
    }
}

/// Cut anywhere, or with a bit changed: refused when opened or called, or executed, but no panic.
#[test]
fn damage_is_no_panic() {
    for (name, every) in [("coreml/mini.mlpackage", 2), ("coreml/llama.mlpackage", 151)] {
        let copied = Copied::new(name);
        let mask = Tensor::floats(&[1, 1, 2, 2], vec![0.0, -30000.0, 0.0, 0.0]).unwrap();
        let tokens = Tensor::ints(&[1, 2], vec![1, 2]).unwrap();
        let inputs: BTreeMap<String, Tensor> = match name.contains("mini") {
            true => ids(&[1, 2]),
            false => [("inputIds".to_string(), tokens), ("causalMask".to_string(), mask)].into(),
        };
        let (mut opened, mut called) = (0, 0);
        let mut attempt = |bytes: &[u8]| {
            if let Ok(program) = copied.open(bytes) {
                opened += 1;
                let result = program.call("main", &inputs, &mut program.states().unwrap(), Rounding::F16);
                called += usize::from(result.is_ok());
            }
        };
        let whole = &copied.model;
        attempt(whole);
        (0..whole.len()).step_by(every).for_each(|n| attempt(&whole[..n]));
        for at in (0..whole.len()).step_by(every) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            attempt(&bytes);
        }
        assert!(
            opened > called && called > 20,
            "{name}: {opened} opened, {called} called of {}",
            whole.len()
        );
    }
}

/// Each fault of a program has its words, and names the operation.
#[test]
fn faults_of_programs() {
    let copied = Copied::new("coreml/mini.mlpackage");
    let at = |block: &Block, kind: &str| block.operations.iter().position(|o| o.kind == kind).unwrap();
    let refused = |words: &str, change: &dyn Fn(&mut Function, &mut Block)| {
        let e = copied.changed(change).map(|_| ()).unwrap_err();
        assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
        assert!(e.path().is_some_and(|path| path.starts_with(&copied.path)), "{e}");
    };
    let name = |text: &str| Only(vec![Binding::Name(text.into())]);
    refused("gather \"emb\": x: \"tables\" is used, and nothing before it", &|_, block| {
        let n = at(block, "gather");
        block.operations[n].inputs.insert("x".into(), name("tables"));
    });
    refused("linear \"emb\": \"emb\" is the name of two values", &|_, block| {
        let n = at(block, "linear");
        block.operations[n].outputs[0].name = "emb".into();
    });
    refused("warp \"emb\": this operation is not executed", &|_, block| {
        let n = at(block, "gather");
        block.operations[n].kind = "warp".into();
    });
    refused("gather \"emb\": it has no parameter mode", &|_, block| {
        let n = at(block, "gather");
        block.operations[n].inputs.insert("mode".into(), name("ids"));
    });
    refused("add \"acc_new\": x: \"acc\" is a state", &|_, block| {
        let n = at(block, "add");
        block.operations[n].inputs.insert("x".into(), name("acc"));
    });
    refused("read_state \"acc_in\": input: the name of a state", &|_, block| {
        let n = at(block, "read_state");
        block.operations[n].inputs.insert("input".into(), name("ids"));
    });
    refused("read_state: it has 0 results", &|_, block| {
        let n = at(block, "read_state");
        block.operations[n].outputs.clear();
    });
    refused("its output \"z\" is made by no operation", &|_, block| block.outputs.push("z".into()));
    refused("constexpr_lut_to_dense \"table\": it has the attribute shape", &|_, block| {
        let n = at(block, "constexpr_lut_to_dense");
        block.operations[n].attributes.insert("shape".into(), Value::string("x"));
    });
    refused("constexpr_lut_to_dense \"table\": lut is missing", &|_, block| {
        let n = at(block, "constexpr_lut_to_dense");
        block.operations[n].inputs.remove("lut");
    });
    refused("\"w\": decodes to fp16 of shape [6, 32], its type is fp16 of shape [32, 6]", &|_, block| {
        let n = at(block, "constexpr_blockwise_shift_scale");
        block.operations[n].outputs[0].value_type = ValueType::fixed(DataType::Float16, &[32, 6]);
    });
    refused("const \"axis0\": has no attribute val", &|_, block| {
        let n = at(block, "const");
        block.operations[n].attributes.remove("val");
    });
    refused("input \"acc\": its state is not of floats", &|main, _| {
        main.inputs[1].value_type = ValueType::state(DataType::Int32, &[1, 1, 32]);
    });
    refused("its states have", &|main, _| {
        main.inputs[1].value_type = ValueType::state(DataType::Float16, &[1, 1 << 20, 1 << 14]);
    });
    refused("9 dimensions, at most 8", &|main, _| {
        main.inputs[0].value_type = ValueType::fixed(DataType::Int32, &[1; 9]);
    });
    // What shows when it is computed.
    let computed = |words: &str, change: &dyn Fn(&mut Function, &mut Block)| {
        let program = copied.changed(change).unwrap_or_else(|e| panic!("{words}: {e}"));
        let e = program.call("main", &ids(&[1]), &mut program.states().unwrap(), Rounding::F32).unwrap_err();
        assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
    };
    computed("reduce_mean \"m\": \"m\" is fp16[1,1,32], it is declared fp16[1,2,32]", &|_, block| {
        let n = at(block, "reduce_mean");
        block.operations[n].outputs[0].value_type = ValueType::fixed(DataType::Float16, &[1, 2, 32]);
    });
    computed("gather \"emb\": \"emb\" is fp16[1,1,32], it is declared fp32[1,?,32]", &|_, block| {
        let n = at(block, "gather");
        block.operations[n].outputs[0].value_type =
            ValueType::tensor(DataType::Float32, &[Some(1), None, Some(32)]);
    });
    computed("gather \"emb\": x is missing", &|_, block| {
        let n = at(block, "gather");
        block.operations[n].inputs.remove("x");
    });
    computed("gather \"emb\": x is bound to 2 values, not one", &|_, block| {
        let n = at(block, "gather");
        let two = [Binding::Name("table".into()), Binding::Name("table".into())];
        block.operations[n].inputs.insert("x".into(), Only(two.to_vec()));
    });
    computed("\"acc\" is fp16[1,1,32], it is declared fp16[1,32,1]", &|main, block| {
        main.inputs[1].value_type = ValueType::state(DataType::Float16, &[1, 32, 1]);
        let read = at(block, "read_state");
        block.operations.remove(read);
        // Only the mean is written.
        let add = at(block, "add");
        block.operations[add].inputs.insert("x".into(), name("m"));
    });
}
