//! `qconv::open`: a model of any format, its tensors as values and as they are stored.

mod common;
#[path = "common/qpack.rs"]
mod made;

use std::fs;

use qconv::error::ErrorKind;
use qconv::model::Model;

fn values(model: &Model, name: &str) -> Vec<f32> {
    let tensor = model.get(name).unwrap();
    let (rows, cols) = tensor.matrix();
    let mut values = vec![f32::NAN; (rows * cols) as usize];
    tensor.rows(0..rows, &mut values).unwrap();
    values
}

#[test]
fn rows_of_any_format() {
    let dir = tempfile::tempdir().unwrap();
    let llama = common::fixture("models/llama");
    let name = "model.layers.0.self_attn.q_proj.weight";
    let directory = qconv::open(&llama).unwrap();
    assert_eq!((directory.format(), directory.metadata_kind()), ("Hugging Face", "config.json"));
    assert_eq!(directory.metadata()["model_type"], "llama");
    let file = qconv::open(llama.join("model.safetensors")).unwrap();
    assert_eq!(file.format(), "safetensors");
    let path = dir.path().join("x");
    fs::write(&path, made::of_directory(&llama)).unwrap();
    let packed = qconv::open(&path).unwrap();
    assert_eq!((packed.format(), packed.metadata()), ("qpack", directory.metadata()));
    assert_eq!(packed.side_files()[0].sha256().unwrap(), {
        let own = directory.side_files().iter().find(|f| f.name == "config.json").unwrap();
        own.sha256().unwrap()
    });
    for other in [&file, &packed] {
        assert_eq!(other.tensors().len(), directory.tensors().len());
        assert_eq!(values(other, name), values(&directory, name));
    }
    // Some rows are the same as all.
    let tensor = directory.get(name).unwrap();
    let (rows, cols) = tensor.matrix();
    let all = values(&directory, name);
    let mut some = vec![0.0; 3 * cols as usize];
    tensor.rows(5..8, &mut some).unwrap();
    assert_eq!(some, all[5 * cols as usize..8 * cols as usize]);
    for (from, to, n) in
        [(0, rows + 1, (rows + 1) * cols), (2, 1, 0), (0, 1, cols - 1), (u64::MAX, u64::MAX, 0)]
    {
        let e = tensor.rows(from..to, &mut vec![0.0; n as usize]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Misuse, "{from}..{to}");
    }
    assert!(directory.get("nothing").is_none());
}

#[test]
fn quantized_ones_are_values_and_parts() {
    let gptq = common::fixture("models/fmt-gptq4");
    let directory = qconv::open(&gptq).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qpack");
    fs::write(&path, made::of_directory(&gptq)).unwrap();
    let packed = qconv::open(&path).unwrap();
    let tensor = packed.tensors().find(|t| t.parts().len() > 1).unwrap();
    assert_eq!(values(&packed, tensor.name()), values(&directory, tensor.name()));
    let names: Vec<&str> = tensor.parts().map(|p| p.name().rsplit(" / ").next().unwrap()).collect();
    assert_eq!(names[..3], ["codes", "scales", "zeros"]);
    assert!(tensor.encoding().starts_with("integers of 4 bits, groups of "), "{}", tensor.encoding());
    let stored = directory.get(tensor.name()).unwrap();
    assert!(stored.encoding().starts_with("4 bits, groups of "), "{}", stored.encoding());
    assert!(stored.parts().any(|p| p.name().ends_with(".qweight")));
    assert_eq!(tensor.stored_bytes(), tensor.parts().map(|p| p.nbytes()).sum::<u64>());
}

#[test]
fn parts_in_place() {
    let gptq = common::fixture("models/fmt-gptq4");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qpack");
    fs::write(&path, made::of_directory(&gptq)).unwrap();
    for model in [qconv::open(&path).unwrap(), qconv::open(&gptq).unwrap()] {
        let map = model.map().unwrap();
        let mut first = None;
        for part in model.tensors().flat_map(|t| t.parts().collect::<Vec<_>>()) {
            let bytes = part.mapped(&map).unwrap();
            let mut read = vec![0; part.nbytes() as usize];
            part.read(0, &mut read).unwrap();
            assert!(bytes == read, "{}", part.name());
            let at = bytes.as_ptr() as usize;
            let from = *first.get_or_insert(at);
            assert!(model.format() != "qpack" || (at - from).is_multiple_of(64), "{}", part.name());
        }
    }
    // Compressed ones do not lie there.
    let small = dir.path().join("small.qpack");
    let source = qconv::container::qpack::Qpack::open(&path, &Default::default()).unwrap();
    let budget = qconv::convert::Budget::new(Some(2), None).unwrap();
    qconv::convert::recompress(&source, &small, true, false, &budget, &qconv::convert::Silent).unwrap();
    let (plain, model) = (qconv::open(&path).unwrap(), qconv::open(&small).unwrap());
    let map = model.map().unwrap();
    let (mut without, mut parts) = (0, 0);
    for tensor in model.tensors() {
        assert_eq!(values(&model, tensor.name()), values(&plain, tensor.name()));
        parts += tensor.parts().len();
        without += tensor.parts().filter(|p| p.mapped(&map).is_none()).count();
    }
    assert!(0 < without && without < parts, "{without} of {parts}");
    // A file that is cut meanwhile is not mapped.
    let model = qconv::open(&path).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
    assert_eq!(model.map().unwrap_err().kind(), ErrorKind::Malformed);
}

#[test]
fn what_is_no_model() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(qconv::open(dir.path().join("x")).unwrap_err().kind(), ErrorKind::Io);
    fs::write(dir.path().join("x"), "text").unwrap();
    assert_eq!(qconv::open(dir.path().join("x")).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(qconv::open(dir.path()).unwrap_err().kind(), ErrorKind::Unsupported);
}
