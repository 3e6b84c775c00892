//! Files of tensors.

use std::collections::BTreeMap;

use qconv::arch;
use qconv::container::gguf::Gguf;
use qconv::container::gguf::write::Layout;
use qconv::container::imatrix::{self, ImportanceMatrix};
use qconv::container::moments::Moments;
use qconv::container::{Store, pytorch as torch_files, safetensors as st, weights};
use qconv::convert::{Budget, ModelFacts, Silent};
use qconv::limits::Limits;
use qconv::verify::scan as scanner;
use qconv::vocab::{self, Vocab};
use qconv::{ErrorKind, inspect as inspection};

use super::input::{Bytes, parts};
use super::{scratch, torch};

/// Those of a program that has little memory.
pub fn limits() -> Limits {
    Limits { header_bytes: 1 << 24, string_bytes: 1 << 20, tensors: 1 << 12, ..Limits::default() }
}

/// Most bytes of a tensor that are looked at.
const MOST_BYTES: u64 = 1 << 18;

/// Reads all tensors, whole and in pieces, and holds them against the files.
pub fn read(store: &Store) {
    for tensor in store.tensors().iter().take(64) {
        if let Some(place) = store.stored().place(tensor).filter(|_| !store.is_joined(tensor)) {
            assert!(place.end <= store.files()[tensor.file].len(), "{tensor:?} leaves its file");
            assert_eq!(tensor.dtype.nbytes(&tensor.shape).ok(), Some(tensor.nbytes), "{tensor:?}");
        }
        if tensor.nbytes > MOST_BYTES {
            continue;
        }
        let Ok(whole) = store.read_all(tensor) else { continue };
        assert_eq!(whole.len() as u64, tensor.nbytes);
        let blocks = tensor.nbytes / tensor.dtype.type_size();
        let at = blocks / 3 * tensor.dtype.type_size();
        let mut rest = vec![0; (tensor.nbytes - at) as usize];
        store.read(tensor, at, &mut rest).expect("a part of what can be read");
        assert!(rest == whole[at as usize..], "{tensor:?} from byte {at} on");
        assert!(store.read(tensor, tensor.nbytes, &mut [0; 512]).is_err(), "{tensor:?} beyond its end");
    }
}

/// A GGUF file, and what is done with it before anything is believed.
pub fn gguf(data: &[u8]) -> bool {
    let path = scratch::file("a.gguf", data);
    let by_bytes = Gguf::metadata_of_bytes("a.gguf", data.to_vec(), &limits());
    let Ok(gguf) = Gguf::open(&path, &limits()) else { return false };
    // The tensors of a split set are not all there; its metadata lack what says so.
    if let (Ok(metadata), 1) = (by_bytes, gguf.shards) {
        assert!(format!("{metadata:?}").len() >= format!("{:?}", gguf.metadata).len());
    }
    for (_, value) in gguf.metadata.iter() {
        let _ = (value.to_string(), value.as_array().and_then(|a| a.get(a.len())));
    }
    read(&gguf.store);
    let _ = (gguf.check_model(), ModelFacts::from_metadata(&gguf.metadata));
    true
}

/// A GGUF file as a model: its vocabulary, and the config.json that it stands for.
pub fn gguf_model(data: &[u8]) -> bool {
    let path = scratch::file("a.gguf", data);
    let Ok(gguf) = Gguf::open(&path, &limits()) else { return false };
    let _ = vocab::check_loadable(&gguf.metadata);
    if let Ok(vocab) = Vocab::from_metadata(&gguf.metadata) {
        let mut again = gguf.metadata.clone();
        vocab.to_metadata(&mut again);
        let _ = vocab.write_hf();
        for id in 0..vocab.tokens.len().min(64) {
            let _ = vocab.piece(id);
        }
    }
    let tensors = gguf.store.tensors();
    for arch in super::words::architectures() {
        if gguf.metadata.str("general.architecture") != Some(arch.arch.as_str()) {
            continue;
        }
        if let Ok(model) = arch::Model::from_gguf_as(arch.clone(), &gguf.metadata, tensors) {
            let _ = (model.map_back(tensors), model.metadata(), model.warnings());
        }
    }
    true
}

/// What is read from a GGUF file and written again is read again the same.
pub fn gguf_round_trip(data: &[u8]) -> bool {
    let path = scratch::file("a.gguf", data);
    let Ok(gguf) = Gguf::open(&path, &limits()) else { return false };
    let tensors = gguf.store.tensors();
    if tensors.iter().map(|t| t.nbytes).sum::<u64>() > 4 * MOST_BYTES {
        return false;
    }
    let Ok(data) = tensors.iter().map(|t| gguf.store.read_all(t)).collect::<Result<Vec<_>, _>>() else {
        return false; // block types of the other byte order
    };
    let list: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.dtype, &t.shape[..])).collect();
    let layout = Layout::new(&gguf.metadata, &list).expect("what was read can be written");
    let mut bytes = layout.header;
    bytes.resize(layout.total_len as usize, 0);
    for (at, data) in layout.offsets.iter().zip(&data) {
        bytes[*at as usize..][..data.len()].copy_from_slice(data);
    }
    let again = Gguf::open(scratch::file("b.gguf", &bytes), &limits()).expect("what was written can be read");
    assert_eq!(format!("{:?}", again.metadata), format!("{:?}", gguf.metadata)); // NaN is not equal to itself
    assert_eq!((again.alignment, again.trailing_bytes), (gguf.alignment, 0));
    assert_eq!(again.store.tensors().len(), tensors.len());
    for (old, data) in tensors.iter().zip(&data) {
        let new = again.store.get(&old.name).expect("it was written");
        assert_eq!((new.dtype, &new.shape), (old.dtype, &old.shape));
        assert!(again.store.read_all(new).expect("it was written") == *data, "{:?}", old.name);
    }
    true
}

/// A safetensors file. What is accepted, the format's own library accepts too.
pub fn safetensors(data: &[u8]) -> bool {
    let path = scratch::file("a.safetensors", data);
    let header = st::parse_header(data.to_vec(), 0, &limits());
    let Ok(opened) = st::open(&path, &limits()) else { return false };
    assert_eq!(header.expect("it is the beginning of what was opened").1, data.len() as u64);
    let other = safetensors::SafeTensors::deserialize(data).expect("the library accepts it");
    assert_eq!(other.len(), opened.store.tensors().len());
    for t in opened.store.tensors() {
        let view = other.tensor(&t.name).expect("the library has it");
        assert!(view.shape().iter().map(|n| *n as u64).eq(t.shape.iter().copied()));
        assert_eq!(view.data().as_ptr() as u64 - data.as_ptr() as u64, t.offset);
        assert_eq!(view.data().len() as u64, t.nbytes);
    }
    read(&opened.store);
    true
}

/// A directory of shards with their index.
pub fn index(data: &[u8]) -> bool {
    let dir = scratch::directory(parts(data));
    let Ok(opened) = weights::open(&dir, &limits()) else { return false };
    for file in opened.store.files() {
        assert_eq!(file.path().parent(), Some(dir.as_path()), "a shard outside of the directory");
    }
    read(&opened.store);
    true
}

/// A PyTorch file of any age.
pub fn pytorch(data: &[u8]) -> bool {
    torch_files::open(&scratch::file("a.bin", data), &limits()).map(|store| read(&store)).is_ok()
}

/// The pickle of a PyTorch file with some storages.
pub fn pickle(data: &[u8]) -> bool {
    let storage = |key: &str, n: usize| torch::member(&format!("x/data/{key}"), &vec![7; n]);
    let members = [torch::member("x/data.pkl", data), storage("0", 24), storage("1", 64), storage("2", 0)];
    pytorch(&torch::zip(&members))
}

/// An importance matrix in either format, and once more as it is written.
pub fn imatrix(data: &[u8]) -> bool {
    let Ok(matrix) = ImportanceMatrix::open(scratch::file("a.imatrix", data), &limits()) else {
        return false;
    };
    let mut all = BTreeMap::new();
    for (name, entry) in matrix.entries.iter().take(64) {
        let _ = matrix.examine(entry);
        let mut out = vec![0.0; entry.columns().min(1 << 12) as usize];
        for expert in 0..entry.experts().min(8) {
            let _ = matrix.read(entry, expert, &mut out);
        }
        if let Ok(sums) = matrix.sums(name, entry, 512) {
            all.insert(name.clone(), sums);
        }
    }
    let _ = imatrix::to_flat(&all, &matrix.datasets, 7, 512);
    let Ok(bytes) = imatrix::to_gguf(&all, &matrix.datasets, 7, 512) else { return true };
    let again = ImportanceMatrix::open(scratch::file("b.imatrix", &bytes), &limits());
    match again {
        Ok(again) => assert_eq!(again.entries.len(), all.len()),
        Err(e) => assert!(all.is_empty() || e.kind() == ErrorKind::Limit, "{e}"),
    }
    true
}

/// A file of second moments.
pub fn moments(data: &[u8]) -> bool {
    let Ok(moments) = Moments::open(scratch::file("a.moments", data), &limits()) else { return false };
    for input in moments.contents().inputs.iter().take(16) {
        let counts = moments.counts(input).expect("an input of this file");
        assert_eq!(counts.len() as u64, input.experts);
        if input.columns > 256 {
            continue;
        }
        let mut means = vec![0.0; input.columns as usize];
        for expert in 0..input.experts.min(4) {
            let _ =
                (moments.square(input, expert), moments.sum(input, expert), moments.sum_abs(input, expert));
            let _ = moments.mean_squares(input, expert, &mut means);
        }
        assert!(moments.sum(input, input.experts).is_err());
    }
    true
}

/// What `qconv inspect` says of a file, whatever it is.
pub fn inspect(data: &[u8]) -> bool {
    let path = scratch::file("a", data);
    let Ok(report) = inspection::inspect(&path, &limits()) else { return false };
    let filter = inspection::Filter::default();
    inspection::print(&report, &filter, &mut std::io::sink()).expect("nothing fails to take it");
    let _ = serde_json::to_string(&report).expect("it is JSON");
    if let Ok(model) = qconv::Model::open(&path, &limits()) {
        values(&model, &mut Bytes(&[]));
    }
    true
}

/// Decodes tensors, whole and in part.
pub fn values(model: &qconv::Model, bytes: &mut Bytes<'_>) {
    for tensor in model.tensors().take(32) {
        let _ = (tensor.encoding(), tensor.stored_bytes());
        let (rows, cols) = tensor.matrix();
        if tensor.elements() > MOST_BYTES / 4 || !tensor.is_readable() {
            continue;
        }
        let mut whole = vec![0.0; tensor.elements() as usize];
        if tensor.rows(0..rows, &mut whole).is_err() || rows == 0 {
            continue;
        }
        let start = u64::from(bytes.u8()) % rows;
        let mut rest = vec![0.0; ((rows - start) * cols) as usize];
        tensor.rows(start..rows, &mut rest).expect("a part of what can be read");
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(
            rest.iter().zip(&whole[(start * cols) as usize..]).all(same),
            "{:?} from row {start} on",
            tensor.name()
        );
    }
}

/// What `qconv verify` finds in a file, or in a directory of several.
pub fn scan(data: &[u8]) -> bool {
    let files = parts(data);
    let path = if files.is_empty() { scratch::file("a", data) } else { scratch::directory(files) };
    let options = scanner::Options { tensors: true, sha256: true, limits: limits() };
    let budget = Budget::new(Some(1), None).expect("one thread");
    let Ok(scan) = scanner::scan(&[path], &options, &budget, &Silent) else { return false };
    let _ = serde_json::to_string(&scan).expect("it is JSON");
    let _ = scanner::sarif::log(&scan).to_string();
    !scan.files.is_empty()
}
