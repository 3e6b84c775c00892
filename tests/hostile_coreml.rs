//! Core ML packages made to take time or memory: a few kilobytes that ask for gigabytes, messages of two bytes in
//! millions, pipes where files should be, files that shrink while they are read. All through the binary, with its
//! memory and its time measured, or through the library.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::fixture;
use qconv::container::coreml::mil::{
    Binding, NamedValueType, Operation, Program as MilProgram, TensorValue, Value, ValueType,
};
use qconv::container::coreml::model::{
    ArrayDataType, FeatureDescription, Flexibility, ModelDescription, SizeRange,
};
use qconv::container::coreml::package::{MANIFEST, MODEL, WEIGHTS, small_files};
use qconv::container::coreml::{DataType, Model, Only, Package, decode, encode};
use qconv::error::ErrorKind;
use qconv::exec::{LanguageModel, Program, Rounding, Session, Tensor};
use qconv::limits::Limits;
use qconv::mil::{Builder, Dim, Encoded, State, TensorType, Weights};
use tempfile::TempDir;

/// What no damaged file may take.
const MOST_BYTES: u64 = 256 << 20;
const MOST_TIME: Duration = Duration::from_secs(2);

/// How a run of the binary ended, with its peak memory.
struct Run {
    code: Option<i32>,
    output: String,
    peak: u64,
    time: Duration,
}

/// Runs `qconv ARGS` on one thread; ended where it takes a minute.
fn run(args: &[&str]) -> Run {
    let begin = Instant::now();
    let out = tempfile::NamedTempFile::new().unwrap();
    let (stdout, stderr) = (out.reopen().unwrap(), out.reopen().unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_qconv"))
        .args(args)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut peak = 0;
    let code = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = found.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if begin.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{args:?}: more than a minute");
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    Run { code, output: fs::read_to_string(out.path()).unwrap(), peak, time: begin.elapsed() }
}

/// That it ended by itself with this code and these words, in little memory and time.
fn ends(args: &[&str], code: i32, words: &str) {
    let run = run(args);
    assert!(run.code == Some(code) && run.output.contains(words), "{args:?}: {:?} {}", run.code, run.output);
    assert!(run.peak < MOST_BYTES, "{args:?}: {} bytes", run.peak);
    assert!(run.time < MOST_TIME * 5, "{args:?}: {:?}", run.time); // the machine may be busy
}

struct None;

impl Weights for None {
    fn get(&self, _: &str) -> Option<Encoded> {
        Option::None
    }
}

/// A package that gives `words` logits for each token, and keeps `state` elements.
fn language_model(words: i64, state: u64) -> (TempDir, PathBuf) {
    let mut b = Builder::new(&None);
    let (one, tokens, keys) = (Dim::Known(1), b.any(), b.any());
    let ids = b.input("inputIds", DataType::Int32, &[one, tokens]).unwrap();
    b.input("causalMask", DataType::Float16, &[one, one, tokens, keys]).unwrap();
    let mut kept = State::new(&mut b, "keyCache", &[1, 1, 1, state, 4]).unwrap();
    let before = kept.read(&mut b);
    let (begin, end) = (b.ints(&[0; 5]).unwrap(), b.ints(&[1, 1, 1, state as i64, 4]).unwrap());
    kept.write(&mut b, &before, &begin, &end).unwrap();
    let ids = b.op("cast", "ids", [("x", (&ids).into()), ("dtype", "fp16".into())]).unwrap();
    let ids = b.op("expand_dims", "column", [("x", (&ids).into()), ("axes", [2].into())]).unwrap();
    let logits = b.op("tile", "logits", [("x", (&ids).into()), ("reps", [1, 1, words].into())]).unwrap();
    let built = b.finish(&[("logits", &logits)]).unwrap();
    let array = |name: &str, ty: &TensorType| {
        let data_type =
            if ty.dtype == DataType::Int32 { ArrayDataType::Int32 } else { ArrayDataType::Float16 };
        let range = |n: Option<u64>| {
            let (lower_bound, upper_bound) = n.map_or((1, 64), |n| (n, n as i64));
            SizeRange { lower_bound, upper_bound }
        };
        let ranges = ty.declared().into_iter().map(range).collect();
        let sizes: Vec<i64> = ty.declared().iter().map(|n| n.unwrap_or(1) as i64).collect();
        FeatureDescription::array(name, data_type, &sizes, Flexibility::Range(Only(ranges)))
    };
    let output = built
        .outputs
        .iter()
        .map(|f| FeatureDescription::array(&f.name, ArrayDataType::Float16, &[], Flexibility::None));
    let description = ModelDescription {
        input: built.inputs.iter().map(|f| array(&f.name, &f.ty)).collect(),
        output: output.collect(),
        state: vec![FeatureDescription::state("keyCache", &[1, 1, 1, state as i64, 4])],
        ..ModelDescription::default()
    };
    let functions = BTreeMap::from([("main".to_string(), built.function)]);
    let program = MilProgram { version: 1, functions, ..MilProgram::default() };
    let model = Model { specification_version: 9, description, program, ..Model::default() };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mlpackage");
    for (name, content) in small_files(&model, false).unwrap() {
        fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
        fs::write(path.join(name), content).unwrap();
    }
    (dir, path)
}

#[test]
fn a_vocabulary_beyond_all_use() {
    // What is well is run: 40 words, 64 tokens of context.
    let (_dir, path) = language_model(40, 64);
    let model = LanguageModel::open(&path, &Limits::default()).unwrap();
    assert_eq!((model.n_vocab(), model.context()), (40, 64));
    assert_eq!(Session::new(&model, 64, Rounding::F32).unwrap().decode(&[3, 7]).unwrap()[39..41], [3.0, 7.0]);
    for words in [1 << 30, 1 << 20, i64::from(i32::MAX)] {
        let (_dir, path) = language_model(words, 64);
        assert!(Package::open(&path, &Limits::default()).unwrap().bytes() < 4096);
        let e = LanguageModel::open(&path, &Limits::default()).unwrap_err();
        assert!(e.kind() == ErrorKind::Limit && e.to_string().contains("logits for a token"), "{e}");
        ends(&["verify", path.to_str().unwrap()], 1, "logits for a token");
    }
}

#[test]
fn states_beyond_memory() {
    for state in [1 << 24, 1 << 30] {
        let (_dir, path) = language_model(40, state);
        let e = Program::open(&path, &Limits::default()).unwrap_err();
        assert!(e.kind() == ErrorKind::Limit && e.to_string().contains("its states have"), "{e}");
        assert!(e.hint_text().unwrap().contains("--max-memory"), "{e}");
        ends(&["verify", path.to_str().unwrap()], 1, "its states have");
    }
    // What the user gives counts, too.
    let (_dir, path) = language_model(40, 1 << 22);
    assert!(Program::open(&path, &Limits::default()).is_ok());
    let limits = Limits { executor_bytes: 8 << 20, ..Limits::default() };
    let e = Program::open(&path, &limits).unwrap_err();
    assert!(e.to_string().contains("executing may take 8388608 bytes"), "{e}");
    ends(&["verify", "--max-memory", "16M", path.to_str().unwrap()], 1, "its states have 16777216 elements");
}

/// A copy of a small package.
fn copy(name: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.mlpackage");
    fs::create_dir_all(path.join(WEIGHTS).parent().unwrap()).unwrap();
    for file in [MANIFEST, MODEL, WEIGHTS] {
        fs::copy(fixture(name).join(file), path.join(file)).unwrap();
    }
    (dir, path)
}

#[test]
fn millions_of_tiny_messages() {
    let (_dir, path) = copy("coreml/mini.mlpackage");
    let whole = fs::read(path.join(MODEL)).unwrap();
    let field = |number: u32, content: &[u8]| {
        let mut key = number << 3 | 2;
        let mut out = Vec::new();
        for mut n in [std::mem::take(&mut key) as usize, content.len()] {
            while n >= 0x80 {
                out.push(n as u8 | 0x80);
                n >>= 7;
            }
            out.push(n as u8);
        }
        [out, content.to_vec()].concat()
    };
    const MIB: usize = 16 << 20;
    // Inputs of the model; operations of a block; dimensions of a type; values of an attribute; unknown fields.
    let inputs = field(2, &[0x0a, 0].repeat(MIB / 2));
    let block = field(3, &[field(1, b"CoreML8"), field(2, &[0x1a, 0].repeat(MIB / 2))].concat());
    let function = field(2, &[field(1, b"more"), field(2, &block)].concat());
    let operations = field(502, &function);
    let named: Vec<u8> = (0..1u32 << 20).flat_map(|n| field(4, &field(1, &n.to_le_bytes()))).collect();
    let attributes = field(502, &named);
    // Keys of five bytes, from field 2^20 on.
    let key = |n: u32| [0, 7, 14, 21].map(|bits| 0x80 | (n << 3 >> bits) as u8);
    let unknown: Vec<u8> = (1u32 << 20..3 << 20).flat_map(|n| [&key(n)[..], &[0, 0]].concat()).collect();
    let cases = [("inputs", inputs), ("operations", operations), ("attributes", attributes)];
    for (what, more) in cases.into_iter().chain([("unknown", unknown)]) {
        fs::write(path.join(MODEL), [&whole[..], &more].concat()).unwrap();
        for command in ["inspect", "verify"] {
            let run = run(&[command, path.to_str().unwrap()]);
            assert!(matches!(run.code, Some(1 | 2)), "{what}: {:?} {}", run.code, run.output);
            // 24 for each byte, the file itself, and what lists take while they grow.
            assert!(run.peak < 700 << 20, "{command} {what}: {} bytes", run.peak);
            assert!(run.time < MOST_TIME * 5, "{command} {what}: {:?}", run.time);
        }
    }
}

#[test]
fn many_outputs_take_time_by_their_number() {
    let (_dir, path) = copy("coreml/mini.mlpackage");
    let mut model: Model = decode(&fs::read(path.join(MODEL)).unwrap()).unwrap().0;
    let feature = model.description.input[0].clone();
    for n in 0..60_000 {
        model.description.input.push(FeatureDescription { name: format!("i{n}"), ..feature.clone() });
    }
    let main = model.program.functions.get_mut("main").unwrap();
    let input = main.inputs[0].clone();
    for n in 0..60_000 {
        main.inputs.push(NamedValueType { name: format!("i{n}"), ..input.clone() });
    }
    let block = main.block_specializations.get_mut("CoreML8").unwrap();
    block.outputs.extend((0..60_000).map(|n| format!("i{n}")));
    fs::write(path.join(MODEL), encode(&model)).unwrap();
    for (command, code) in [("inspect", 0), ("verify", 1)] {
        let run = run(&[command, path.to_str().unwrap()]);
        assert_eq!(run.code, Some(code), "{command}: {}", run.output);
        assert!(run.time < MOST_TIME * 10, "{command}: {:?}", run.time);
    }
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_refused() {
    for name in [MANIFEST, MODEL, WEIGHTS] {
        let (_dir, path) = copy("coreml/mini.mlpackage");
        let at = path.join(name);
        fs::remove_file(&at).unwrap();
        assert!(Command::new("mkfifo").arg(&at).status().unwrap().success());
        for command in ["inspect", "verify"] {
            let run = run(&[command, path.to_str().unwrap()]);
            assert!(matches!(run.code, Some(1 | 2)), "{command} {name}: {:?} {}", run.code, run.output);
            // What has no manifest that is a file is no package.
            let words = if (command, name) == ("inspect", MANIFEST) { "" } else { "neither a file nor" };
            assert!(run.output.contains(words), "{command} {name}: {}", run.output);
        }
        fs::remove_file(&at).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &at).unwrap();
        let e = Package::open(&path, &Limits::default()).unwrap_err();
        assert!(e.to_string().contains("neither a file nor"), "{name}: {e}");
    }
}

/// Files of caches are links; a directory that lies elsewhere is none of the package's.
#[cfg(unix)]
#[test]
fn links_of_directories_stay_inside() {
    use std::os::unix::fs::symlink;
    let (dir, path) = copy("coreml/mini.mlpackage");
    let open = || Package::open(&path, &Limits::default());
    let (file, cached) = (path.join(WEIGHTS), dir.path().join("blob"));
    fs::rename(&file, &cached).unwrap();
    symlink(&cached, &file).unwrap();
    open().unwrap();
    let (weights, inside, outside) = (file.parent().unwrap(), path.join("w"), dir.path().join("w"));
    fs::rename(weights, &inside).unwrap();
    symlink(&inside, weights).unwrap();
    open().unwrap();
    fs::remove_file(weights).unwrap();
    fs::rename(&inside, &outside).unwrap();
    symlink(&outside, weights).unwrap();
    let e = open().unwrap_err();
    assert!(e.kind() == ErrorKind::Malformed && e.to_string().contains("outside of the package"), "{e}");
}

/// What is cut while a program is open is an error when it is read.
#[test]
fn a_weight_file_that_shrinks() {
    let (_dir, path) = copy("coreml/mini.mlpackage");
    let program = Program::open(&path, &Limits::default()).unwrap();
    let ids = Tensor::ints(&[1, 1], vec![7]).unwrap();
    let call = || {
        let inputs = BTreeMap::from([("ids".to_string(), ids.clone())]);
        program.call("main", &inputs, &mut program.states().unwrap(), Rounding::F32)
    };
    call().unwrap();
    let file = fs::OpenOptions::new().write(true).open(path.join(WEIGHTS)).unwrap();
    file.set_len(64).unwrap();
    let e = call().unwrap_err();
    assert!(e.kind() == ErrorKind::Io && e.to_string().contains("weight.bin"), "{e}");
}

/// What an attempt at a package ends in: nothing, an error, or what it was.
fn read(path: &Path) -> Option<(Vec<u8>, usize)> {
    let package = Package::open(path, &Limits::default()).ok()?;
    let all =
        package.model().program.functions.values().map(|f| qconv::container::coreml::constants(&package, f));
    let constants = all.collect::<Result<Vec<_>, _>>().ok()?;
    Some((encode(package.model()), constants.iter().map(Vec::len).sum()))
}

/// Every single-byte change and every truncation of the model and the manifest, and of the weight file's header and
/// records: an error, or what can be read and written again, and no panic. A sample of them through the binary.
#[test]
fn every_byte_of_a_small_package() {
    let (_dir, path) = copy("coreml/mini.mlpackage");
    for (name, sample) in [(MODEL, 97), (MANIFEST, 53), (WEIGHTS, 31)] {
        let whole = fs::read(path.join(name)).unwrap();
        let (mut read_all, mut n) = (0, 0);
        let mut attempt = |bytes: &[u8]| {
            fs::write(path.join(name), bytes).unwrap();
            read_all += usize::from(read(&path).is_some());
            n += 1;
            if n % sample == 0 {
                for args in [&["inspect", "--ops"][..], &["verify"]] {
                    let run = run(&[args, &[path.to_str().unwrap()]].concat());
                    assert!(matches!(run.code, Some(0..=2)), "{name} {n}: {:?} {}", run.code, run.output);
                    assert!(!run.output.contains("panicked"), "{name} {n}: {}", run.output);
                    assert!(run.peak < MOST_BYTES, "{name} {n}: {} bytes", run.peak);
                    assert!(run.time < MOST_TIME * 5, "{name} {n}: {:?}", run.time);
                }
            }
        };
        for len in 0..whole.len() {
            attempt(&whole[..len]);
        }
        let is_data = |at: usize| name == WEIGHTS && ((128..192).contains(&at) || (256..352).contains(&at));
        for at in (0..whole.len()).filter(|at| !is_data(*at)) {
            for value in [0, 0xff, whole[at] ^ 1, whole[at] ^ 0x80, whole[at].wrapping_add(1)] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                attempt(&bytes);
            }
        }
        fs::write(path.join(name), &whole).unwrap();
        println!("{name}: {n} attempts, {read_all} read");
        assert!(read_all > 0 && read_all < n * 3 / 4, "{name}: {read_all} of {n}");
    }
    assert!(read(&path).is_some());
}

/// The smallest package, with these operations before its own.
fn with_operations(operations: Vec<Operation>) -> (TempDir, PathBuf) {
    let (dir, path) = copy("coreml/mini.mlpackage");
    let mut model: Model = decode(&fs::read(path.join(MODEL)).unwrap()).unwrap().0;
    let main = model.program.functions.get_mut("main").unwrap();
    main.block_specializations.get_mut("CoreML8").unwrap().operations.splice(0..0, operations);
    fs::write(path.join(MODEL), encode(&model)).unwrap();
    (dir, path)
}

fn bytes(dtype: DataType, shape: &[u64], bytes: Vec<u8>) -> Value {
    Value::immediate(dtype, shape, TensorValue::Bytes(Only(bytes)))
}

fn constant(name: &str, value: Value) -> Operation {
    Operation {
        kind: "const".into(),
        outputs: vec![NamedValueType::new(name, value.value_type.clone())],
        attributes: BTreeMap::from([("val".into(), value), ("name".into(), Value::string(name))]),
        ..Operation::default()
    }
}

/// A `constexpr` operation that gives float16.
fn constexpr(kind: &str, name: &str, inputs: &[(&str, Binding)], shape: &[u64]) -> Operation {
    let bound = |(parameter, binding): &(&str, Binding)| (parameter.to_string(), Only(vec![binding.clone()]));
    Operation {
        kind: format!("constexpr_{kind}"),
        inputs: inputs.iter().map(bound).collect(),
        outputs: vec![NamedValueType::new(name, ValueType::fixed(DataType::Float16, shape))],
        attributes: BTreeMap::from([("name".into(), Value::string(name))]),
        ..Operation::default()
    }
}

fn named(name: &str) -> Binding {
    Binding::Name(name.into())
}

fn number(n: i32) -> Binding {
    Binding::Value(Value::immediate(DataType::Int32, &[], TensorValue::Ints(Only(vec![n]))))
}

/// Tables out of tables, and wide ones: kilobytes that stand for terabytes.
#[test]
fn tables_stand_for_little() {
    let palette = |name: &str, indices: Value, lut: Binding, axis: i32, shape: &[u64]| {
        let inputs = [("indices", Binding::Value(indices)), ("lut", lut), ("vector_axis", number(axis))];
        constexpr("lut_to_dense", name, &inputs, shape)
    };
    let codes = |shape: &[u64]| {
        let n: u64 = shape.iter().product();
        bytes(DataType::UInt1, shape, vec![0; n.div_ceil(8) as usize])
    };
    let table = |name: &str, rank: usize, width: u64| {
        let shape = [&vec![1; rank][..], &[2, width]].concat();
        constant(name, bytes(DataType::Float16, &shape, vec![0; 4 * width as usize]))
    };
    for (width, words) in [(64, "values decoded"), (65, "lut has entries of 65 elements")] {
        let made = palette("wide", codes(&[1, 8]), named("table"), 1, &[1, 8 * width]);
        let (_dir, path) = with_operations(vec![table("table", 2, width), made]);
        let run = run(&["verify", path.to_str().unwrap()]);
        assert!(run.output.contains(words), "{width}: {}", run.output);
    }
    let first = palette("first", codes(&[1, 1, 2, 32]), named("table"), 3, &[1, 1, 2, 1024]);
    let second = palette("second", codes(&[1, 8]), named("first"), 1, &[1, 8 * 1024]);
    let (_dir, path) = with_operations(vec![table("table", 4, 32), first, second]);
    ends(&["verify", path.to_str().unwrap()], 1, "lut \"first\" is 1-bit palette");
    let scaled = constexpr(
        "blockwise_shift_scale",
        "scaled",
        &[
            ("data", Binding::Value(bytes(DataType::Int8, &[1, 1, 2, 1024], vec![0; 2048]))),
            ("scale", named("first")),
        ],
        &[1, 1, 2, 1024],
    );
    let first = palette("first", codes(&[1, 1, 2, 32]), named("table"), 3, &[1, 1, 2, 1024]);
    let (_dir, path) = with_operations(vec![table("table", 4, 32), first, scaled]);
    ends(&["verify", path.to_str().unwrap()], 1, "scale \"first\" is 1-bit palette");
}

/// One content is decoded once, whatever it is called; many of one blob are too many.
#[test]
fn one_blob_by_many_names() {
    let shape = [1u64 << 20];
    let data = || constant("data", bytes(DataType::UInt1, &shape, vec![0; 1 << 17]));
    let scaled = |name: String, n: usize| {
        let scale = Value::immediate(
            DataType::Float16,
            &[1],
            TensorValue::Bytes(Only((n as u16).to_le_bytes().to_vec())),
        );
        let inputs = [("data", named("data")), ("scale", Binding::Value(scale))];
        constexpr("blockwise_shift_scale", &name, &inputs, &shape)
    };
    let verify = |operations: Vec<Operation>| {
        let (_dir, path) = with_operations(operations);
        run(&["verify", path.to_str().unwrap()]).output
    };
    let decoded = |output: String| {
        let line = output.lines().find(|line| line.contains("values decoded")).map(str::to_string);
        line.unwrap_or_else(|| panic!("{output}"))
    };
    let one = decoded(verify(vec![data(), scaled("a".into(), 1)]));
    let same = (0..500).map(|n| scaled(format!("a{n}"), 1));
    assert_eq!(decoded(verify(std::iter::once(data()).chain(same).collect())), one);
    let others = (0..500).map(|n| scaled(format!("a{n}"), n));
    let output = verify(std::iter::once(data()).chain(others).collect());
    assert!(output.contains("its weights, each decoded once, are more than"), "{output}");
}
