//! Models go into `.qpack` and come out as the files they were; the same input gives the same bytes.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{convert, fixture};
use qconv::container::gguf::write::Layout;
use qconv::container::gguf::{Array, Gguf, Metadata, Value};
use qconv::container::qpack::{Qpack, Trits};
use qconv::convert::{Budget, FromQpack, HfContainer, ImatrixChoice, Outcome, Silent, ToHf, ToQpack, Wanted};
use qconv::error::ErrorKind;
use qconv::limits::Limits;
use qconv::packed::write::{Format, QpackEncoding};
use qconv::tensor::DType;
use sha2::{Digest, Sha256};

fn budget(threads: usize) -> Budget {
    Budget::new(Some(threads), None).unwrap()
}

fn pack(source: &Path, output: &Path, max: u64, threads: usize) -> Vec<PathBuf> {
    let job =
        ToQpack { output: Some(output.into()), max_shard_size: max, ..ToQpack::new(source) }.plan().unwrap();
    job.run(false, &budget(threads), &Silent).unwrap();
    job.outputs()
}

fn unpack(source: &Path, output: &Path) {
    let job = FromQpack { output: Some(output.into()), ..FromQpack::new(source) }.plan().unwrap();
    job.run(false, &budget(2), &Silent).unwrap();
}

/// All files of a directory that `keep` names.
fn files(dir: &Path, keep: impl Fn(&str) -> bool) -> BTreeMap<String, Vec<u8>> {
    let read = |e: std::io::Result<std::fs::DirEntry>| {
        let path = e.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        (path.is_file() && keep(&name)).then(|| (name, std::fs::read(&path).unwrap()))
    };
    std::fs::read_dir(dir).unwrap().filter_map(read).collect()
}

/// Reference values lie beside the models, which are no part of them.
fn of_model(name: &str) -> bool {
    let is_weights = name.starts_with("model") && !name.contains("moments");
    is_weights || ![".safetensors", ".gguf"].iter().any(|e| name.ends_with(e))
}

#[test]
fn directories_come_back_file_by_file() {
    let dir = tempfile::tempdir().unwrap();
    for name in
        ["tiny-llama", "models/fmt-gptq4", "models/gpt_oss-mxfp4", "models/fmt-fp8-block", "models/bert"]
    {
        let (packed, back) = (dir.path().join("x.qpack"), dir.path().join("back"));
        pack(&fixture(name), &packed, u64::MAX, 2);
        let model = Qpack::open(&packed, &Limits::default()).unwrap();
        assert!(model.verify(2, &|_| true).unwrap().is_empty(), "{name}");
        unpack(&packed, &back);
        let (was, is) = (files(&fixture(name), of_model), files(&back, |_| true));
        assert!(was.keys().eq(is.keys()), "{name}: {:?} {:?}", was.keys(), is.keys());
        assert!(was == is, "{name}: some file has other bytes");
        std::fs::remove_file(packed).unwrap();
        std::fs::remove_dir_all(back).unwrap();
    }
}

#[test]
fn shards_come_back_as_shards() {
    let dir = tempfile::tempdir().unwrap();
    let [sharded, back] = ["sharded", "back"].map(|n| dir.path().join(n));
    let job = ToHf { max_shard_size: 2 << 20, ..ToHf::new(fixture("tiny-llama"), &sharded) }.plan().unwrap();
    job.run(false, &budget(2), &Silent).unwrap();
    let outputs = pack(&sharded, &dir.path().join("x.qpack"), 3 << 20, 2);
    assert_eq!(outputs.len(), 3);
    // Any of the set opens it.
    unpack(&outputs[1], &back);
    let was = files(&sharded, |_| true);
    assert!(was.len() > 8 && was == files(&back, |_| true));
}

#[test]
fn pytorch_comes_back_as_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let [torch, packed, back] = ["torch", "x.qpack", "back"].map(|n| dir.path().join(n));
    let source = fixture("tiny-llama");
    let job = ToHf { container: HfContainer::Pytorch, ..ToHf::new(&source, &torch) }.plan().unwrap();
    job.run(false, &budget(2), &Silent).unwrap();
    pack(&torch, &packed, u64::MAX, 2);
    unpack(&packed, &back);
    let open = |path: &Path| qconv::container::weights::open(path, &Limits::default()).unwrap().store;
    let (was, is) = (open(&source), open(&back));
    assert_eq!(was.tensors().len(), is.tensors().len());
    for t in was.tensors() {
        let other = is.get(&t.name).unwrap();
        assert_eq!((t.dtype, &t.shape), (other.dtype, &other.shape));
        assert!(was.read_all(t).unwrap() == is.read_all(other).unwrap(), "{}", t.name);
    }
}

#[test]
fn gguf_comes_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for file_type in ["f16", "q8_0", "tq2_0"] {
        let [gguf, packed, back] =
            ["gguf", "qpack", "back.gguf"].map(|e| dir.path().join(format!("{file_type}.{e}")));
        convert(&fixture("tiny-llama"), &gguf, Some(file_type));
        pack(&gguf, &packed, u64::MAX, 1);
        unpack(&packed, &back);
        assert!(std::fs::read(&gguf).unwrap() == std::fs::read(&back).unwrap(), "{file_type}");
    }
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let sums: Vec<Vec<String>> = [1, 2, 7]
        .into_iter()
        .map(|threads| {
            // The name of a set is in its files' names only.
            let output = dir.path().join(format!("{threads}.qpack"));
            let outputs = pack(&fixture("models/fmt-gptq4"), &output, 100_000, threads);
            outputs.iter().map(|p| format!("{:x}", Sha256::digest(std::fs::read(p).unwrap()))).collect()
        })
        .collect();
    assert!(sums[0].len() > 1);
    assert!(sums.iter().all(|s| *s == sums[0]), "{sums:?}");
}

#[test]
fn provenance_names_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("tiny-llama");
    let outputs = pack(&source, &dir.path().join("x.qpack"), 3 << 20, 2);
    let model = Qpack::open(&outputs[0], &Limits::default()).unwrap();
    let manifests: Vec<_> = model.manifests().map(|(_, m)| m.clone()).collect();
    let weights = std::fs::read(source.join("model.safetensors")).unwrap();
    let wanted = serde_json::json!([{
        "name": "model.safetensors", "bytes": weights.len(), "sha256": format!("{:x}", Sha256::digest(&weights)),
    }]);
    assert_eq!(manifests[0].provenance["sources"], wanted);
    assert!(manifests[0].provenance["tool"].as_str().unwrap().starts_with("qconv "));
    assert!(manifests[1..].iter().all(|m| m.provenance.is_empty()));
    // A set that is made one file keeps what is known of it.
    let one = dir.path().join("one.qpack");
    pack(&outputs[0], &one, u64::MAX, 2);
    let one = Qpack::open(&one, &Limits::default()).unwrap();
    assert_eq!(one.manifests().next().unwrap().1.provenance, manifests[0].provenance);
    let role = |name: &str| one.tensors().find(|t| t.name == name).unwrap().role.clone();
    assert_eq!(role("model.layers.1.self_attn.q_proj.weight").as_deref(), Some("attn_q"));
    assert_eq!(role("model.embed_tokens.weight").as_deref(), Some("token_embd"));
}

#[test]
fn what_cannot_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |source: &Path| ToQpack::new(source).plan().unwrap_err();
    assert_eq!(refused(dir.path()).kind(), ErrorKind::Unsupported);
    assert_eq!(refused(&dir.path().join("none")).kind(), ErrorKind::Io);
    let text = dir.path().join("x.txt");
    std::fs::write(&text, "no model").unwrap();
    assert!(refused(&text).path().is_some());
    let e = FromQpack::new(&text).plan().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Malformed, "{e}");
}

/// What is written can be read: beside tensors there is no more than the limit says.
#[test]
fn the_largest_files_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("model");
    std::fs::create_dir(&source).unwrap();
    for (name, bytes) in files(&fixture("tiny-llama"), of_model) {
        std::fs::write(source.join(name), bytes).unwrap();
    }
    let sum_of = |path: &Path| -> u64 {
        let model = Qpack::open(path, &Limits::default()).unwrap();
        model.files().iter().map(|f| f.segment.bytes).sum()
    };
    let packed = dir.path().join("x.qpack");
    pack(&source, &packed, u64::MAX, 1);
    let sum = sum_of(&packed);
    // Larger than any other, and each alone small enough.
    for name in ["a.txt", "z.txt"] {
        std::fs::write(source.join(name), vec![b'x'; sum as usize]).unwrap();
    }
    let with = |side_file_bytes: u64| {
        let limits = Limits { side_file_bytes, ..Limits::default() };
        let output = Some(packed.clone());
        let job = ToQpack { output, limits: limits.clone(), ..ToQpack::new(&source) }.plan().unwrap();
        job.run(true, &budget(1), &Silent).unwrap();
        FromQpack { limits, ..FromQpack::new(&packed) }.plan().unwrap();
        (sum_of(&packed), job.plan.notes.join("; "))
    };
    let (found, notes) = with(3 * sum);
    assert!(found == 3 * sum && !notes.contains("left out"), "{notes}");
    let (found, notes) = with(3 * sum - 1);
    assert!(found == 2 * sum && notes.contains("1 files are left out: z.txt"), "{notes}");
    let (found, notes) = with(sum);
    assert!(found == sum && notes.contains("2 files are left out: a.txt, z.txt"), "{notes}");

    // What has to be there has no place elsewhere.
    let gguf = dir.path().join("x.gguf");
    convert(&fixture("tiny-llama"), &gguf, Some("f16"));
    let limits = Limits { side_file_bytes: 100, ..Limits::default() };
    let e = ToQpack { limits, ..ToQpack::new(&gguf) }.plan().unwrap_err();
    assert!(e.kind() == ErrorKind::Limit && e.to_string().contains("bytes together"), "{e}");
}

fn quantize(source: &Path, output: &Path, wanted: Wanted, exact_only: bool) -> Vec<Outcome> {
    let job = ToHf {
        container: HfContainer::Qpack,
        wanted: Some(wanted),
        measures: true,
        exact_only,
        max_shard_size: u64::MAX,
        ..ToHf::new(source, output)
    };
    job.plan().unwrap().run(false, &budget(2), &Silent).unwrap()
}

/// All values of a model as F32, by name.
fn values(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let model = qconv::open(path).unwrap();
    let one = |t: qconv::model::Tensor<'_>| {
        let (rows, cols) = t.matrix();
        let mut values = vec![0.0; (rows * cols) as usize];
        t.rows(0..rows, &mut values).unwrap();
        (t.name().to_string(), values)
    };
    model.tensors().map(one).collect()
}

/// What is stored is what the summary says, and it is what other formats are made from.
#[test]
fn matrices_are_quantized_into_every_encoding() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("models/llama");
    let was = values(&source);
    for (name, encoding) in QpackEncoding::NAMES.iter().filter(|(_, e)| *e != QpackEncoding::Sparse) {
        for group_size in [None, Some(-1), Some(40)] {
            let scales_are_fixed = matches!(encoding, QpackEncoding::Int8 | QpackEncoding::Fp8);
            if scales_are_fixed && group_size.is_some() {
                continue;
            }
            let what = format!("{name} {group_size:?}");
            let wanted = Wanted { group_size, ..Wanted::new(Format::Qpack(*encoding)) };
            let [packed, unpacked] = ["x.qpack", "x"].map(|n| dir.path().join(n));
            let outcomes = quantize(&source, &packed, wanted, false);
            let is = values(&packed);
            assert!(was.keys().eq(is.keys()), "{what}");
            let mut lossy = 0;
            for o in &outcomes {
                let pairs = was[&o.name].iter().zip(&is[&o.name]);
                let lost: f64 = pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
                let power: f64 = was[&o.name].iter().map(|a| f64::from(*a).powi(2)).sum();
                let stated = o.nmse.unwrap();
                assert!((lost / power - stated).abs() <= 1e-6 * stated, "{what} {}: {stated}", o.name);
                assert!(stated < 0.25, "{what} {}: {stated}", o.name);
                lossy += usize::from(stated > 0.0);
            }
            assert!(lossy >= 14, "{what}: {lossy}");
            let manifest = Qpack::open(&packed, &Limits::default()).unwrap();
            let provenance = &manifest.manifests().next().unwrap().1.provenance;
            assert_eq!(provenance["options"]["encoding"], *name, "{provenance:?}");
            assert_eq!(provenance["method"], "rtn");
            let job = ToHf { dtype: Some(DType::F32), ..ToHf::new(&packed, &unpacked) }.plan().unwrap();
            job.run(false, &budget(2), &Silent).unwrap();
            assert!(values(&unpacked) == is, "{what}");
            std::fs::remove_file(packed).unwrap();
            std::fs::remove_dir_all(unpacked).unwrap();
        }
    }
}

/// Codes that a source has are the codes in the file, and become the same codes of other formats.
#[test]
fn codes_go_in_and_come_out() {
    let dir = tempfile::tempdir().unwrap();
    let source = fixture("models/fmt-gptq4");
    let [packed, kept, gptq] = ["x.qpack", "kept.qpack", "gptq"].map(|n| dir.path().join(n));
    let outcomes = quantize(&source, &packed, Wanted::new(Format::Qpack(QpackEncoding::Integers)), true);
    assert!(outcomes.iter().all(|o| o.nmse == Some(0.0)));
    pack(&source, &kept, u64::MAX, 2);
    assert!(values(&packed) == values(&source) && values(&kept) == values(&source));
    for from in [&packed, &kept] {
        let job =
            ToHf { wanted: Some(Wanted::new(Format::Gptq)), exact_only: true, ..ToHf::new(from, &gptq) };
        job.plan().unwrap().run(false, &budget(2), &Silent).unwrap();
        assert!(values(&gptq) == values(&source));
        std::fs::remove_dir_all(&gptq).unwrap();
    }
}

/// What is ternary already keeps its digits, and others are refused.
#[test]
fn ternary_becomes_sparse_without_a_loss() {
    let dir = tempfile::tempdir().unwrap();
    let [once, sparse, again] = ["once.qpack", "sparse.qpack", "again.qpack"].map(|n| dir.path().join(n));
    let wanted = |encoding, group_size| Wanted { group_size, ..Wanted::new(Format::Qpack(encoding)) };
    let source = fixture("models/llama");
    let plan = |encoding| {
        let wanted = Some(wanted(encoding, None));
        ToHf { container: HfContainer::Qpack, wanted, ..ToHf::new(&source, &sparse) }.plan()
    };
    let refused = plan(QpackEncoding::Sparse).unwrap_err();
    assert!(refused.to_string().contains("ternary already"), "{refused}");
    let base3 = QpackEncoding::Ternary(Trits::Base3);
    quantize(&source, &once, wanted(base3, Some(24)), false);
    quantize(&once, &sparse, wanted(QpackEncoding::Sparse, None), true);
    quantize(&sparse, &again, wanted(base3, None), true);
    assert!(values(&once) == values(&sparse));
    let parts = |path: &Path| -> Vec<(String, u64, String)> {
        let model = Qpack::open(path, &Limits::default()).unwrap();
        let of = model.tensors().flat_map(|t| t.parts.iter().map(|p| (format!("{} {}", t.name, p.name), p)));
        of.map(|(name, p)| (name, p.segment.bytes, format!("{:?}", p.segment.sha256))).collect()
    };
    assert_eq!(parts(&once), parts(&again));
}

/// gpt-oss: stacks of experts, whose rows GGUF's 256-weight blocks do not divide.
#[test]
fn experts_of_gpt_oss_are_ternary() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["models/gpt_oss-mxfp4", "models/gpt_oss"] {
        let [packed, gguf] = ["x.qpack", "x.gguf"].map(|n| dir.path().join(n));
        let wanted = Wanted {
            group_size: Some(-1),
            ..Wanted::new(Format::Qpack(QpackEncoding::Ternary(Trits::Base3)))
        };
        quantize(&fixture(name), &packed, wanted, false);
        let model = Qpack::open(&packed, &Limits::default()).unwrap();
        let stacks: Vec<_> = model.tensors().filter(|t| t.shape.len() == 3).collect();
        assert!(stacks.len() == 4 && stacks.iter().all(|t| t.encoding.kind() == "ternary"), "{name}");
        // Rows that 32 divides are exactly Q4_0.
        convert(&packed, &gguf, None);
        let (is, from) = (values(&gguf), values(&packed));
        let down = &from["model.layers.0.mlp.experts.down_proj_blocks"];
        assert!(is["blk.0.ffn_down_exps.weight"] == *down, "{name}");
        std::fs::remove_file(packed).unwrap();
    }
}

/// Each expert of a stack by what calibration knows of it.
#[test]
fn experts_are_weighed_each_by_its_own() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["models/gpt_oss", "models/gpt_oss-mxfp4"] {
        experts_are_weighed(&fixture(name), &dir);
    }
}

fn experts_are_weighed(source: &Path, dir: &tempfile::TempDir) {
    let [bf16, imatrix, same] = ["x.gguf", "imatrix.gguf", "same.gguf"].map(|n| dir.path().join(n));
    convert(source, &bf16, Some("bf16"));
    // The first half of columns counts for even experts, the second one for odd experts; or the same for all.
    let write = |path: &Path, turns: u64| {
        let gguf = Gguf::open(&bf16, &Limits::default()).unwrap();
        let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = Vec::new();
        for t in gguf.store.tensors().iter().filter(|t| t.shape.len() > 1 && t.name.starts_with("blk")) {
            let cols = *t.shape.last().unwrap();
            let experts = if t.shape.len() == 3 { t.shape[0] } else { 1 };
            let half =
                |e: u64, c: u64| if (c < cols / 2) == ((e * turns).is_multiple_of(2)) { 900.0 } else { 1.0 };
            let sums = (0..experts).flat_map(|e| (0..cols).map(move |c| half(e, c))).collect();
            tensors.push((format!("{}.in_sum2", t.name), vec![experts, cols], sums));
            tensors.push((format!("{}.counts", t.name), vec![experts, 1], vec![1.0; experts as usize]));
        }
        let mut metadata = Metadata::default();
        metadata.set("general.type", "imatrix");
        metadata.set("imatrix.datasets", Value::Array(Array::String(vec![b"made up".to_vec()])));
        metadata.set("imatrix.chunk_count", Value::U32(1));
        metadata.set("imatrix.chunk_size", Value::U32(512));
        let infos: Vec<_> = tensors.iter().map(|(n, s, _)| (n.as_str(), DType::F32, s.as_slice())).collect();
        let layout = Layout::new(&metadata, &infos).unwrap();
        let mut bytes = layout.header.clone();
        bytes.resize(layout.total_len as usize, 0);
        for (at, (_, _, values)) in layout.offsets.iter().zip(&tensors) {
            let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            bytes[*at as usize..][..data.len()].copy_from_slice(&data);
        }
        std::fs::write(path, bytes).unwrap();
    };
    write(&imatrix, 1);
    write(&same, 0);
    let name = "model.layers.0.mlp.experts.down_proj_blocks";
    let weighed = |imatrix: &Path| {
        let packed = dir.path().join("x.qpack");
        let job = ToHf {
            container: HfContainer::Qpack,
            wanted: Some(Wanted { bits: Some(2), ..Wanted::new(Format::Qpack(QpackEncoding::Integers)) }),
            imatrix: Some(ImatrixChoice { path: imatrix.into(), include: vec![], exclude: vec![] }),
            max_shard_size: u64::MAX,
            ..ToHf::new(source, &packed)
        };
        job.plan().unwrap().run(true, &budget(2), &Silent).unwrap();
        let manifest = Qpack::open(&packed, &Limits::default()).unwrap();
        let calibration = &manifest.manifests().next().unwrap().1.provenance["calibration"];
        let sum = format!("{:x}", Sha256::digest(std::fs::read(imatrix).unwrap()));
        assert_eq!(calibration["sha256"], sum.as_str());
        values(&packed)[name].clone()
    };
    let (own, all) = (weighed(&imatrix), weighed(&same));
    let of_expert =
        |values: &[f32], e: usize| values[e * values.len() / 4..(e + 1) * values.len() / 4].to_vec();
    for expert in 0..4 {
        let equal = of_expert(&own, expert) == of_expert(&all, expert);
        assert_eq!(equal, expert % 2 == 0, "expert {expert}");
    }
}
