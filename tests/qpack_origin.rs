//! Quantized checkpoints go into `.qpack` files, and come out as the tensors they were.

mod common;
#[path = "common/qpack.rs"]
mod made;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use qconv::container::qpack::{Encoding, Manifest, Origin, Qpack, Tensor};
use qconv::container::{Store, safetensors};
use qconv::limits::Limits;
use qconv::packed::qpack::{join, open as open_qpack, restore, take};
use qconv::packed::unpack;
use qconv::tensor::DType;
use serde_json::{Value as Json, json};

/// Type, shape and bytes of tensors by their names.
type Tensors = BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>;

fn all(store: &Store) -> Tensors {
    let one = |t: &qconv::tensor::TensorInfo| {
        (t.name.clone(), (t.dtype, t.shape.clone(), store.read_all(t).unwrap()))
    };
    store.tensors().iter().map(one).collect()
}

/// Into a file and out of it again; the encodings on the way.
fn through(path: &Path, config: Option<&Json>) -> BTreeSet<String> {
    through_beside(path, config, &[("config.json", json!({"quantization_config": config}))])
}

/// As [`through`], with these files, in the order of their names.
fn through_beside(path: &Path, config: Option<&Json>, files: &[(&str, Json)]) -> BTreeSet<String> {
    let open = || safetensors::open(path, &Limits::default()).unwrap().store;
    let source = open();
    let plain = all(&source);
    let store = unpack(open(), config).unwrap().0;
    let taken = take(&store, config).unwrap();
    let tensors: Vec<Tensor> = taken.iter().map(|t| t.tensor.clone()).collect();
    let contents: Vec<_> =
        taken.iter().flat_map(|t| made::fill(&t.tensor, |put| t.write(&store, put))).collect();
    let texts: Vec<Vec<u8>> = files.iter().map(|(_, json)| json.to_string().into_bytes()).collect();
    let files = files.iter().zip(&texts).map(|((name, _), text)| made::side_file(name, text)).collect();
    let manifest = Manifest { files, tensors, ..Manifest::default() };
    let contents: Vec<Vec<u8>> = texts.into_iter().chain(contents).collect();
    let (bytes, _) = made::file(manifest, &contents, &[]);
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("x.qpack");
    std::fs::write(&packed, bytes).unwrap();
    let model = Qpack::open(&packed, &Limits::default()).unwrap();
    assert!(model.verify(2, &|_| true).unwrap().is_empty());
    // What a command reads: all values, what stayed as it was joined too.
    assert!(all(&open_qpack(&packed, &Limits::default()).unwrap().0) == all(&store), "{}", path.display());
    let opened = qconv::open(&packed).unwrap();
    let is_there = |t: &qconv::tensor::TensorInfo| opened.get(&t.name).is_some();
    assert!(opened.tensors().len() == store.tensors().len() && store.tensors().iter().all(is_there));
    let (parts, tensors) = model.into_parts().unwrap();
    let back = join(parts, &tensors).unwrap();

    // As values: those of the checkpoint, once what is plain is joined as there.
    let mut again = Tensors::new();
    for tensor in &tensors {
        let Some(origin) = Origin::of(tensor).unwrap() else {
            let info = back.get(&tensor.name).unwrap();
            again.insert(info.name.clone(), (info.dtype, info.shape.clone(), back.read_all(info).unwrap()));
            continue;
        };
        let values = |store: &Store| store.read_all(store.get(&tensor.name).unwrap()).unwrap();
        assert!(values(&back) == values(&store), "{}: other values", tensor.name);
        let mut found: Vec<Vec<u8>> =
            origin.parts.iter().map(|s| vec![0xDD; s.dtype.nbytes(&s.shape).unwrap() as usize]).collect();
        let mut put = |k: usize, at: u64, bytes: &[u8]| {
            found[k][at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        restore(&back, tensor, &origin, &mut put).unwrap();
        for (source, bytes) in origin.parts.into_iter().zip(found) {
            again.insert(source.name, (source.dtype, source.shape, bytes));
        }
    }
    assert!(again.keys().eq(plain.keys()), "{:?}", again.keys());
    for (name, (dtype, shape, bytes)) in &plain {
        let found = &again[name];
        assert_eq!((&found.0, &found.1), (dtype, shape), "{name}");
        assert!(&found.2 == bytes, "{}: {name} has other bytes", path.display());
    }
    tensors.iter().map(|t| t.encoding.kind().to_string()).collect()
}

/// What the libraries wrote: see `tests/packed_libraries.rs`.
#[test]
fn every_checkpoint_comes_back_bit_by_bit() {
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in std::fs::read_dir(common::fixture("packed")).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let metadata = safetensors::open(&path, &Limits::default()).unwrap().metadata;
        let config = metadata[0].get("quantization_config").map(|text| serde_json::from_str(text).unwrap());
        println!("{name}");
        for kind in through(&path, config.as_ref()) {
            kinds.entry(kind).or_default().push(name.clone());
        }
    }
    let has = |kind: &str, begin: &str| kinds[kind].iter().filter(|n| n.starts_with(begin)).count();
    // Files of GPTQ, AWQ and so on, none of which is left as it was.
    for (kind, begin) in [
        ("integers", "gptq"),
        ("integers", "awq"),
        ("integers", "pack4"),
        ("integers", "int-"),
        ("codebook", "nf4"),
        ("codebook", "fp4"),
        ("scaled", "fp8"),
        ("scaled", "float-"),
        ("scaled", "int8"),
    ] {
        assert!(has(kind, begin) > 0, "{kind} {begin}: {kinds:?}");
    }
}

#[test]
fn models_come_back_bit_by_bit() {
    for name in ["models/fmt-gptq4", "models/gpt_oss-mxfp4", "models/fmt-fp8-block", "tiny-llama"] {
        let dir = common::fixture(name);
        let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let kinds = through(&dir.join("model.safetensors"), config.get("quantization_config"));
        assert_eq!(
            kinds.len() > 1,
            name != "tiny-llama" && name != "models/gpt_oss-mxfp4",
            "{name}: {kinds:?}"
        );
    }
}

/// A file of `fixtures/packed` in which a tensor begins with other bytes, and its `quantization_config`.
fn changed(dir: &Path, name: &str, tensor: &str, begin: &[u8]) -> (PathBuf, Json) {
    let source = common::fixture("packed").join(name).with_extension("safetensors");
    let mut bytes = std::fs::read(&source).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let fields: Json = serde_json::from_slice(&bytes[8..header]).unwrap();
    let at = header + fields[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..][..begin.len()].copy_from_slice(begin);
    let path = dir.join("x.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let config = fields["__metadata__"]["quantization_config"].as_str().unwrap();
    (path, serde_json::from_str(config).unwrap())
}

/// NaN with more to say than that it is none: no encoding gives it back.
const ODD_NAN: [u8; 2] = 0x7E01u16.to_le_bytes();

#[test]
fn odd_numbers_stay_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = |name: &str, tensor: &str, begin: &[u8]| {
        let (path, config) = changed(dir.path(), name, tensor, begin);
        through(&path, Some(&config)).into_iter().collect::<Vec<_>>()
    };
    // One that makes no number, and others that do.
    for begin in [ODD_NAN, 0x7C01u16.to_le_bytes(), 0xFE01u16.to_le_bytes()] {
        assert_eq!(kinds("gptq4", "p.scales", &begin), ["plain"]);
        assert_eq!(kinds("awq", "p.scales", &begin), ["plain"]);
    }
    for begin in [0x7E00u16, 0xFC00, 0x8000, 0x0001].map(u16::to_le_bytes) {
        assert_eq!(kinds("gptq4", "p.scales", &begin), ["integers", "plain"]);
    }
    // One for all rows, in BF16.
    assert_eq!(kinds("int-tensor", "p.weight_scale", &0x7FC0u16.to_le_bytes()), ["integers", "plain"]);
}

#[test]
fn groups_that_there_are_not_stay_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["gptq4", "gptq4-act"] {
        let (path, config) = changed(dir.path(), name, "p.g_idx", &(-1i32).to_le_bytes());
        let open = || safetensors::open(&path, &Limits::default()).unwrap().store;
        let store = unpack(open(), Some(&config)).unwrap().0;
        let mut found = Tensors::new();
        for taken in take(&store, Some(&config)).unwrap() {
            let contents = made::fill(&taken.tensor, |put| taken.write(&store, put));
            let Encoding::Plain(dtype) = taken.tensor.encoding else { panic!("{:?}", taken.tensor) };
            found.insert(taken.tensor.name, (dtype, taken.tensor.shape, contents.concat()));
        }
        assert!(found == all(&open()), "{name}");
    }
}

/// What has no encoding is joined at reading, as another file than config.json says.
#[test]
fn early_gptq_is_joined() {
    let dir = tempfile::tempdir().unwrap();
    let (path, config) = changed(dir.path(), "gptq4", "p.scales", &ODD_NAN);
    let mut early = config.clone();
    early.as_object_mut().unwrap().remove("quant_method");
    for first in [json!({}), json!({"quantization_config": null})] {
        let files = [("config.json", first), ("quantize_config.json", early.clone())];
        assert_eq!(through_beside(&path, Some(&config), &files).len(), 1);
    }
    assert_eq!(through_beside(&path, Some(&config), &[("quantize_config.json", early)]).len(), 1);
}
