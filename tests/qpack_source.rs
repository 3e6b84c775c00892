//! A `.qpack` file is a source as the directory is that it was made of.

mod common;
#[path = "common/qpack.rs"]
mod made;

use std::fs;
use std::path::{Path, PathBuf};

use qconv::container::gguf::{Gguf, Metadata, is_gguf, write};
use qconv::container::qpack::{Encoding, Integers, Kept, Manifest, Qpack, Tensor, Unknown, Zeros};
use qconv::convert::{
    Checkpoint, FromQpack, HfToGguf, Job, LoraToGguf, Quantize, Quantizer, Recipe, SideFiles, Silent, ToHf,
    ToQpack, Wanted,
};
use qconv::error::{Error, ErrorKind};
use qconv::limits::Limits;
use qconv::packed::write::Format;
use qconv::tensor::DType;

fn written(job: &Job) -> Vec<u8> {
    job.run(true, &common::budget(), &Silent).unwrap();
    job.outputs().iter().flat_map(|path| fs::read(path).unwrap()).collect()
}

/// The directory of a fixture and its `.qpack`, both called so.
fn both(place: &Path, fixture: &str, name: &str) -> (PathBuf, PathBuf) {
    let source = common::fixture(fixture);
    let dir = place.join("plain").join(name);
    fs::create_dir_all(&dir).unwrap();
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let packed = place.join(format!("{name}.qpack"));
    pack(&dir, &packed, u64::MAX);
    (dir, packed)
}

fn pack(source: &Path, output: &Path, max_shard_size: u64) -> Vec<PathBuf> {
    let job = ToQpack { output: Some(output.into()), max_shard_size, ..ToQpack::new(source) }.plan().unwrap();
    job.run(true, &common::budget(), &Silent).unwrap();
    job.outputs()
}

#[test]
fn gguf_is_that_of_the_directory() {
    for fixture in
        ["tiny-llama", "models/fmt-gptq4", "models/fmt-fp8-block", "models/gpt_oss-mxfp4", "models/bert"]
    {
        let place = tempfile::tempdir().unwrap();
        let (dir, packed) = both(place.path(), fixture, "some-model");
        let convert = |source: &Path, output: &str| {
            let output = Some(place.path().join(output));
            HfToGguf { source: source.to_path_buf(), output, ..HfToGguf::default() }.plan().unwrap()
        };
        let jobs = [convert(&dir, "a.gguf"), convert(&packed, "b.gguf")];
        assert!(written(&jobs[0]) == written(&jobs[1]), "{fixture}");
        let notes = |job: &Job| job.plan.notes.clone();
        assert_eq!(notes(&jobs[0]), notes(&jobs[1]), "{fixture}");
    }
}

#[test]
fn checkpoints_are_those_of_the_directory() {
    let place = tempfile::tempdir().unwrap();
    let (dir, packed) = both(place.path(), "models/fmt-gptq4", "some-model");
    let files = |source: &Path, output: &str, wanted: Option<Wanted>| {
        let output = place.path().join(output);
        let job = ToHf { wanted, ..ToHf::new(source, &output) }.plan().unwrap();
        job.run(true, &common::budget(), &Silent).unwrap();
        let mut files: Vec<_> = fs::read_dir(&output)
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| (p.file_name().unwrap().to_owned(), fs::read(&p).unwrap()))
            .collect();
        files.sort();
        files
    };
    assert!(files(&dir, "a", None) == files(&packed, "b", None));
    let gptq = || Some(Wanted::new(Format::Gptq));
    let moved = files(&packed, "c", gptq());
    assert!(files(&dir, "d", gptq()) == moved);
    assert!(moved.iter().any(|(name, _)| name == "tokenizer.json"));
}

/// Outputs are called after the file, and lie beside it; of a set after the set.
#[test]
fn names_are_those_of_the_file() {
    let place = tempfile::tempdir().unwrap();
    let (_, packed) = both(place.path(), "tiny-llama", "Some-Model-v2");
    let default = |packed: &Path| {
        let gguf = HfToGguf { source: packed.to_path_buf(), ..HfToGguf::default() }.plan().unwrap().output;
        let hf = ToHf { output: None, ..ToHf::new(packed, "") }.plan().unwrap().output;
        (gguf, hf)
    };
    let (gguf, hf) = default(&packed);
    assert_eq!(gguf.parent(), Some(place.path()));
    assert!(gguf.file_name().unwrap().to_str().unwrap().starts_with("Some-Model"), "{gguf:?}");
    assert_eq!(hf, place.path().join("Some-Model-v2-bfloat16"));
    let set = pack(&common::fixture("tiny-llama"), &packed, 3 << 20);
    assert_eq!(set.len(), 3);
    for part in &set {
        assert_eq!(default(part), (gguf.clone(), hf.clone()));
    }
}

/// What is extracted goes away again, and nothing is written elsewhere.
#[test]
fn side_files_are_there_while_they_are_needed() {
    let place = tempfile::tempdir().unwrap();
    let packed = place.path().join("m.qpack");
    pack(&common::fixture("tiny-llama"), &packed, u64::MAX);
    let model = Checkpoint::open(&packed, &Limits::default()).unwrap();
    let dir = model.dir.clone();
    let wanted = fs::read(common::fixture("tiny-llama").join("tokenizer.json")).unwrap();
    assert!(fs::read(dir.join("tokenizer.json")).unwrap() == wanted);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o077, 0, "others may look");
    }
    drop(model);
    assert!(!dir.exists());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
}

/// Whatever reads all files beside the tensors reads no more than the limit says, of all of them together.
#[test]
fn side_files_are_bounded_together() {
    let place = tempfile::tempdir().unwrap();
    let packed = place.path().join("m.qpack");
    let tensor = Tensor::new("x", vec![2], Encoding::Plain(DType::F32)).unwrap();
    let files = ["a.txt", "b.txt", "config.json"].map(|name| (name.to_string(), b"{     }".to_vec()));
    made::with_files(files.to_vec(), vec![(tensor, vec![vec![0; 8]])], &packed);
    let limits = |side_file_bytes| Limits { side_file_bytes, ..Limits::default() };
    let model = Qpack::open(&packed, &limits(20)).unwrap();
    assert_eq!(model.read_file("b.txt", &limits(20)).unwrap(), b"{     }");
    assert_eq!(model.read_files(|_| true, &limits(21)).unwrap().count(), 3);
    assert_eq!(model.read_files(|f| f.name != "a.txt", &limits(20)).unwrap().count(), 2);
    let refused = |limits: Limits| {
        let pack = ToQpack { limits: limits.clone(), ..ToQpack::new(&packed) }.plan().err();
        let unpack = FromQpack { limits: limits.clone(), ..FromQpack::new(&packed) }.plan().err();
        let extract = SideFiles::of(&packed, &limits).err();
        [pack, unpack, extract].map(|e| e.map(|e| (e.kind(), e.to_string())))
    };
    assert_eq!(refused(limits(21)), [None, None, None]);
    for (kind, said) in refused(limits(20)).map(Option::unwrap) {
        assert_eq!(kind, ErrorKind::Limit);
        assert!(said.starts_with(packed.to_str().unwrap()), "{said}");
        assert!(said.contains("have 21 bytes together, at most 20"), "{said}");
    }
}

fn refusal(packed: &Path) -> Error {
    let error = HfToGguf { source: packed.to_path_buf(), ..HfToGguf::default() }.plan().err().unwrap();
    assert!(error.to_string().starts_with(packed.to_str().unwrap()), "{error}");
    error
}

#[test]
fn what_is_no_model_is_refused_with_its_reason() {
    let place = tempfile::tempdir().unwrap();
    let packed = place.path().join("m.qpack");
    let tensor = || (Tensor::new("x", vec![2], Encoding::Plain(DType::F32)).unwrap(), vec![vec![0; 8]]);
    let write = |files: &[(&str, &str)]| {
        let files = files.iter().map(|(name, text)| (name.to_string(), text.as_bytes().to_vec())).collect();
        made::with_files(files, vec![tensor()], &packed);
        refusal(&packed)
    };
    let error = write(&[]);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("config.json"), "{error}");
    assert!(error.hint_text().unwrap().contains("inspect"), "{error}");

    // The file in the file is named.
    let error = write(&[("config.json", "{")]);
    assert_eq!(error.kind(), ErrorKind::Malformed);
    assert!(
        error.to_string().contains(&format!("m.qpack{}config.json", std::path::MAIN_SEPARATOR)),
        "{error}"
    );

    // One would have to be a directory for the other.
    let error = write(&[("config.json", "{}"), ("onnx", "x"), ("onnx/config.json", "{}")]);
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("onnx/config.json"), "{error}");
}

#[test]
fn what_cannot_be_read_is_named() {
    let place = tempfile::tempdir().unwrap();
    let packed = place.path().join("m.qpack");
    let source = common::fixture("tiny-llama");
    let e = Integers { bits: 4, block: [1, 32], scales: DType::F16, zeros: Zeros::Middle, g_idx: false };
    let tensor = Tensor::new("some.weight", vec![4, 64], Encoding::Integers(e)).unwrap();
    let contents: Vec<_> = tensor.parts.iter().map(|p| vec![0; p.segment.bytes as usize]).collect();
    let mut unknown = tensor.clone();
    unknown.encoding = Encoding::Unknown(Unknown { kind: "quasicrystal".into(), more: Kept::default() });
    let mut closed = tensor.clone();
    for part in &mut closed.parts {
        part.segment.compression = Some(qconv::container::qpack::Compression {
            kind: "lzfoo".into(),
            bytes: part.segment.bytes,
            sha256: [0; 32],
            more: Kept::default(),
        });
    }
    for (tensor, kind) in [(unknown, "quasicrystal"), (closed, "lzfoo")] {
        made::with_side_files(&source, vec![(tensor, contents.clone())], &packed);
        let error = refusal(&packed);
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("some.weight") && error.to_string().contains(kind), "{error}");
        let _: Manifest =
            Qpack::open(&packed, &Limits::default()).unwrap().manifests().next().unwrap().1.clone();
    }
}

/// What was made of GGUF is GGUF to all that read it.
#[test]
fn a_packed_gguf_is_that_gguf() {
    let place = tempfile::tempdir().unwrap();
    let gguf = place.path().join("m.gguf");
    common::convert(&common::fixture("tiny-llama"), &gguf, Some("bf16"));
    for (max, name) in [(u64::MAX, "one.qpack"), (3 << 20, "many.qpack")] {
        let packed = pack(&gguf, &place.path().join(name), max).pop().unwrap();
        assert!(is_gguf(&packed).unwrap());
        let [a, b] = [&gguf, &packed].map(|p| Gguf::open(p, &Limits::default()).unwrap());
        assert_eq!((a.metadata, a.version), (b.metadata, b.version));

        let quantized = |source: &Path, output: &str| {
            let quantizer = Quantizer::new(Recipe::parse("q4_k_m").unwrap());
            written(&Quantize::new(source, place.path().join(output), quantizer).plan().unwrap())
        };
        assert!(quantized(&gguf, "a.gguf") == quantized(&packed, "b.gguf"), "{name}");
        let back = |source: &Path| {
            let job = ToHf::new(source, place.path().join("back")).plan().unwrap();
            job.run(true, &common::budget(), &Silent).unwrap();
            fs::read(place.path().join("back/model.safetensors")).unwrap()
        };
        assert!(back(&gguf) == back(&packed), "{name}");
    }
}

#[test]
fn packed_bases_of_adapters() {
    let place = tempfile::tempdir().unwrap();
    let base = common::fixture("models/llama");
    let gguf = place.path().join("m.gguf");
    common::convert(&base, &gguf, None);
    let [hf, of_gguf] = [(&base, "hf.qpack"), (&gguf, "gguf.qpack")]
        .map(|(source, name)| pack(source, &place.path().join(name), u64::MAX).remove(0));
    let adapted = |base: &Path| {
        let (adapter, output) = (common::fixture("lora/llama"), Some(place.path().join("lora.gguf")));
        let base = base.to_path_buf();
        written(&LoraToGguf { adapter, base, output, ..LoraToGguf::default() }.plan().unwrap())
    };
    assert!(adapted(&base) == adapted(&hf));
    assert!(adapted(&gguf) == adapted(&of_gguf));
}

#[test]
fn what_is_no_packed_gguf_is_refused_with_its_reason() {
    let place = tempfile::tempdir().unwrap();
    let packed = place.path().join("m.qpack");
    let metadata = |tensors: &[(&str, DType, &[u64])]| {
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", "llama");
        ("metadata.gguf".to_string(), write::Layout::new(&metadata, tensors).unwrap().header)
    };
    let tensor = |encoding: Encoding| {
        let tensor = Tensor::new("x", vec![2, 32], encoding).unwrap();
        let contents: Vec<_> = tensor.parts.iter().map(|p| vec![0; p.segment.bytes as usize]).collect();
        (tensor, contents)
    };
    let plain = || tensor(Encoding::Plain(DType::F32));
    let refused = |files: Vec<(String, Vec<u8>)>, tensor, kind: ErrorKind, words: &str| {
        made::with_files(files, vec![tensor], &packed);
        let error = Gguf::open(&packed, &Limits::default()).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words) && error.to_string().contains("m.qpack"), "{error}");
        error.hint_text().unwrap_or_default().to_string()
    };
    made::with_files(vec![metadata(&[])], vec![plain()], &packed);
    assert_eq!(Gguf::open(&packed, &Limits::default()).unwrap().store.tensors().len(), 1);

    let e = Integers { bits: 4, block: [1, 32], scales: DType::F16, zeros: Zeros::Middle, g_idx: false };
    let unsupported = ErrorKind::Unsupported;
    refused(vec![metadata(&[])], tensor(Encoding::Integers(e)), unsupported, "integers");
    refused(vec![metadata(&[])], tensor(Encoding::Plain(DType::U8)), unsupported, "U8");
    let hint = refused(vec![("config.json".into(), b"{}".to_vec())], plain(), unsupported, "metadata.gguf");
    assert!(hint.contains("hf-to-gguf"), "{hint}");
    let hint = refused(vec![], plain(), unsupported, "metadata.gguf");
    assert!(hint.contains("inspect"), "{hint}");
    assert!(!is_gguf(&packed).unwrap());
    refused(vec![("metadata.gguf".into(), b"GGUF".to_vec())], plain(), ErrorKind::Malformed, "");
    let (name, mut header) = metadata(&[("y", DType::F32, &[2])]);
    header.extend([0; 32]);
    refused(vec![(name, header)], plain(), ErrorKind::Malformed, "metadata alone");
}
