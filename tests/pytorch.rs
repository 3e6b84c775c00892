//! PyTorch files: bytes against CPython's own unpickler and zipfile (`fixtures/pytorch/make.py`),
//! and how files, shards and indexes are found.

mod common;
#[path = "common/torch.rs"]
mod torch;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qconv::ErrorKind::{Io, Malformed, Unsupported};
use qconv::container::gguf::Gguf;
use qconv::container::{Store, pytorch, safetensors, weights};
use qconv::inspect::inspect;
use qconv::limits::Limits;
use qconv::tensor::DType;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn open(path: &Path) -> Store {
    pytorch::open(path, &Limits::default()).unwrap()
}

#[test]
fn tensors_have_the_bytes_that_python_finds() {
    let expected = fs::read(common::fixture("pytorch/expected.json")).unwrap();
    let expected: Json = serde_json::from_slice(&expected).unwrap();
    let files = expected.as_object().unwrap();
    assert_eq!(files.len(), 7);
    for (name, tensors) in files {
        let store = open(&common::fixture("pytorch").join(name));
        for t in store.tensors() {
            let whole = store.read_all(t).unwrap();
            assert_eq!(tensors[&t.name], hex(&whole), "{name}: {}", t.name);
            // The same in pieces of an element.
            let size = t.dtype.type_size() as usize;
            let mut piece = vec![0; size];
            for (i, want) in whole.chunks(size).enumerate() {
                store.read(t, (i * size) as u64, &mut piece).unwrap();
                assert_eq!(piece, want, "{name}: {} {i}", t.name);
            }
        }
        assert_eq!(store.tensors().len(), tensors.as_object().unwrap().len(), "{name}");
    }
}

#[test]
fn tensors_keep_the_order_of_the_dict_and_tied_ones_share_bytes() {
    let store = open(&common::fixture("pytorch/plain-2.pt"));
    let names: Vec<&str> = store.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names[..4], ["w", "tied", "transposed", "stepped"]);
    let place = |name| store.get(name).map(|t| (t.offset, t.nbytes));
    assert_eq!(place("w"), place("tied"));
    let strided: Vec<&str> =
        store.tensors().iter().filter(|t| store.is_scattered(t)).map(|t| t.name.as_str()).collect();
    assert_eq!(strided, ["transposed", "stepped"]);
}

#[test]
fn directories_indexes_and_shards_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits::default();
    let copy = |from: &str, to: &str| {
        fs::copy(common::fixture(from), dir.path().join(to)).unwrap();
    };
    let format = |path: &Path| weights::open(path, &limits).map(|w| (w.format, w.store.tensors().len()));
    assert_eq!(format(dir.path()).unwrap_err().kind(), Unsupported);
    let (first, second) = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin");
    copy("pytorch/plain-2.pt", first);
    assert_eq!(format(dir.path()).unwrap_err().kind(), Io, "a shard is missing");
    copy("pytorch/lpips-alex-0.1.pth", second);
    assert_eq!(format(dir.path()).unwrap(), ("PyTorch", 16), "by their numbering");
    assert_eq!(format(&dir.path().join(second)).unwrap(), ("PyTorch", 16), "a shard for all");
    let index = dir.path().join("pytorch_model.bin.index.json");
    let mut map: serde_json::Map<String, Json> = open(&dir.path().join("pytorch_model-00001-of-00002.bin"))
        .tensors()
        .iter()
        .map(|t| (t.name.clone(), json!(if t.file == 0 { first } else { second })))
        .collect();
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    for path in [dir.path(), &index, &dir.path().join(first)] {
        assert_eq!(format(path).unwrap(), ("PyTorch", 16));
    }
    map.insert("w".into(), json!(second));
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(format(dir.path()).unwrap_err().kind(), Malformed, "not where the index has it");
    map.insert("w".into(), json!("../w.bin"));
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(format(dir.path()).unwrap_err().kind(), Malformed, "out of the directory");
    fs::remove_file(&index).unwrap();

    copy("pytorch/big-endian-3.pt", first);
    assert_eq!(format(dir.path()).unwrap_err().kind(), Unsupported, "of both byte orders");
    copy("pytorch/lpips-alex-0.0.pth", first);
    assert_eq!(format(dir.path()).unwrap_err().kind(), Malformed, "one name in both");
    copy("pytorch/nested-4.pt", "pytorch_model.bin");
    assert_eq!(format(dir.path()).unwrap(), ("PyTorch", 11), "one file before shards");
    copy("models/llama/model.safetensors", "model.safetensors");
    assert_eq!(format(dir.path()).unwrap().0, "safetensors", "which come first");
    assert_eq!(format(&dir.path().join("pytorch_model.bin")).unwrap(), ("PyTorch", 11), "by its name");
    // By content, not by extension.
    copy("pytorch/plain-2.pt", "model.gguf");
    assert_eq!(format(&dir.path().join("model.gguf")).unwrap().0, "PyTorch");
}

#[test]
fn inspection_shows_them() {
    let limits = Limits::default();
    let report = inspect(&common::fixture("pytorch/lpips-alex-0.1.pth"), &limits).unwrap();
    assert_eq!((report.format, report.tensors.len()), ("PyTorch", 5));
    let report = inspect(&common::fixture("models/fmt-ptbin-sharded"), &limits).unwrap();
    assert_eq!((report.format, &report.container["weights"]), ("Hugging Face", &json!("PyTorch")));
    assert_eq!((report.container["shards"].as_u64(), report.totals.parameters), (Some(2), 151_872));
    assert_eq!(report.metadata["model_type"], "llama");
}

/// A whole model whose matrices are stored transposed becomes the same GGUF file.
#[test]
fn transposed_matrices_convert_to_the_same_bytes() {
    let source = common::fixture("models/gpt2");
    let store = safetensors::open(&source, &Limits::default()).unwrap().store;
    let (mut entries, mut members) = (Vec::new(), Vec::new());
    for (k, t) in store.tensors().iter().enumerate() {
        assert_eq!(t.dtype, DType::BF16);
        let data = store.read_all(t).unwrap();
        let shape: Vec<i64> = t.shape.iter().map(|d| *d as i64).collect();
        let (data, strides) = match shape[..] {
            [rows, columns] => {
                let (pairs, mut turned) = (data.as_chunks::<2>().0, Vec::new());
                for c in 0..columns {
                    (0..rows).for_each(|r| turned.extend_from_slice(&pairs[(r * columns + c) as usize]));
                }
                (turned, vec![1, rows])
            }
            _ => (data, vec![1; shape.len()]),
        };
        let key = k.to_string();
        let storage = torch::storage("torch\nBFloat16Storage", &key, data.len() as i64 / 2);
        entries.push((torch::text(&t.name), torch::tensor(storage, 0, &shape, &strides)));
        members.push(torch::member(&format!("m/data/{key}"), &data));
    }
    members.insert(0, torch::member("m/data.pkl", &torch::whole(&torch::dict(&entries))));
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(source.join(name), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("pytorch_model.bin"), torch::zip(&members)).unwrap();
    let tensors = |source: &Path, file_type| {
        let output = dir.path().join("x.gguf");
        common::convert(source, &output, Some(file_type));
        let gguf = Gguf::open(&output, &Limits::default()).unwrap();
        let bytes = |t| hex(&gguf.store.read_all(t).unwrap());
        let all: BTreeMap<_, _> = gguf.store.tensors().iter().map(|t| (t.name.clone(), bytes(t))).collect();
        all
    };
    for file_type in ["bf16", "q8_0"] {
        assert_eq!(tensors(dir.path(), file_type), tensors(&source, file_type), "{file_type}");
    }
}
