//! GGUF -> Hugging Face -> GGUF returns the same tensor bytes and the same metadata; threads and
//! memory do not show in the output.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use qconv::container::gguf::{Gguf, Metadata};
use qconv::convert::{Budget, FileType, HfToGguf, Silent, ToHf};
use qconv::limits::Limits;
use qconv::tensor::DType;

/// Type, shape and bytes by name.
type Tensors = BTreeMap<String, (DType, Vec<u64>, Vec<u8>)>;

fn contents(path: &Path) -> (Tensors, Metadata) {
    let gguf = Gguf::open(path, &Limits::default()).unwrap();
    let read = |t: &qconv::tensor::TensorInfo| {
        (t.name.clone(), (t.dtype, t.shape.clone(), gguf.store.read_all(t).unwrap()))
    };
    (gguf.store.tensors().iter().map(read).collect(), gguf.metadata.clone())
}

#[test]
fn back_and_forth() {
    let dir = tempfile::tempdir().unwrap();
    for name in common::MODELS.iter().chain(common::ENCODERS) {
        for file_type in ["f32", "f16", "bf16"] {
            let (there, again) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
            common::convert(&common::fixture(name), &there, Some(file_type));
            let hf = dir.path().join("hf");
            ToHf { dtype: DType::from_name(file_type), max_shard_size: 300_000, ..ToHf::new(&there, &hf) }
                .plan()
                .and_then(|job| job.run(true, &common::budget(), &Silent))
                .unwrap_or_else(|e| panic!("{name} {file_type}: {e}"));
            common::convert(&hf, &again, Some(file_type));
            std::fs::remove_dir_all(&hf).unwrap();
            let (a, b) = (contents(&there), contents(&again));
            assert_eq!(a.0.keys().collect::<Vec<_>>(), b.0.keys().collect::<Vec<_>>(), "{name} {file_type}");
            for (key, tensor) in &a.0 {
                assert_eq!((tensor.0, &tensor.1), (b.0[key].0, &b.0[key].1), "{name} {file_type}: {key}");
                assert!(tensor.2 == b.0[key].2, "{name} {file_type}: the bytes of {key} differ");
            }
            for (key, value) in a.1.iter() {
                assert_eq!(Some(value), b.1.get(key), "{name} {file_type}: {key}");
            }
            assert_eq!(a.1.0.len(), b.1.0.len(), "{name} {file_type}: {:?}", b.1.0.keys());
        }
    }
}

#[test]
fn threads_and_memory_do_not_show() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["models/mixtral", "models/gpt2", "models/gpt_oss-mxfp4", "models/fmt-gptq4", "tiny-llama"] {
        for file_type in ["bf16", "q8_0", "tq2_0", "f32"] {
            let mut first: Option<Vec<u8>> = None;
            for (threads, memory) in [(1, 64 << 20), (2, 1 << 20), (7, 4 << 20), (3, 1 << 30)] {
                let output = dir.path().join("a.gguf");
                let budget = Budget::new(Some(threads), Some(memory)).unwrap();
                common::plan(&common::fixture(name), &output, Some(file_type))
                    .run(true, &budget, &Silent)
                    .unwrap();
                let bytes = std::fs::read(&output).unwrap();
                match &first {
                    None => first = Some(bytes),
                    Some(first) => assert!(*first == bytes, "{name} {file_type} {threads} {memory}"),
                }
            }
        }
    }
}

/// A transposed quantized matrix is read by halves of blocks.
#[test]
fn quantized_and_transposed() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a.gguf", "b.gguf"].map(|n| dir.path().join(n));
    common::convert(&common::fixture("models/gpt2"), &a, Some("q8_0"));
    let hf = dir.path().join("hf");
    ToHf { dtype: Some(DType::F32), ..ToHf::new(&a, &hf) }
        .plan()
        .and_then(|job| job.run(false, &common::budget(), &Silent))
        .unwrap();
    HfToGguf {
        source: hf,
        output: Some(b.clone()),
        file_type: FileType::parse("q8_0"),
        ..HfToGguf::default()
    }
    .plan()
    .and_then(|job| job.run(false, &common::budget(), &Silent))
    .unwrap();
    // Q8_0 of what Q8_0 decodes to is the same again, where the largest weight of a block is met.
    let (a, b) = (contents(&a), contents(&b));
    for (key, tensor) in &a.0 {
        let same = tensor.2.iter().zip(&b.0[key].2).filter(|(x, y)| x == y).count();
        assert!(same * 100 >= tensor.2.len() * 99, "{key}: {same} of {} bytes", tensor.2.len());
    }
}
