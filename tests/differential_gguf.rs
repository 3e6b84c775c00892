//! What our reader of GGUF takes, ggml's own takes too, with the same tensors and metadata, or the difference is one of
//! those that `formats/spec/gguf.md` lists. Files are the seeds of fuzzing and changed ones; those that a long run of
//! the target `gguf` found can be added: `QCONV_FUZZ_CORPUS` names their directory.
//!
//! A file at which ggml ends the process ends this test: such are to be refused.
#![cfg(feature = "ggml")]

#[path = "common/changed.rs"]
mod changed;

use std::fs;
use std::path::{Path, PathBuf};

use changed::{Random, changed};
use qconv::container::gguf::{Array, Gguf, Metadata, Value};
use qconv::ggml::gguf::{Listed, list};
use qconv::limits::Limits;

const CHANGED: usize = 20_000;

/// What became of a file.
#[derive(Debug, PartialEq)]
enum Found {
    /// We refuse it: what ggml does with it is not our concern.
    Refused,
    /// Both read the same.
    Same,
    /// We read it, and ggml does not, for this reason of those that are written down.
    Policy(&'static str),
}

fn compare(path: &Path) -> Result<Found, String> {
    let Ok(ours) = Gguf::open(path, &Limits::default()) else { return Ok(Found::Refused) };
    if ours.shards != 1 {
        return Ok(Found::Policy("a split set"));
    }
    let Some(theirs) = list(path).map_err(|e| e.to_string())? else {
        return match reason(&ours) {
            Some(why) => Ok(Found::Policy(why)),
            None => Err("ggml refuses it, and none of the known reasons is there".into()),
        };
    };
    if let Some(why) = reason(&ours) {
        return Err(format!("ggml reads it, though there is {why}"));
    }
    let facts = (theirs.version, theirs.alignment);
    if facts != (ours.version, u64::from(ours.alignment)) {
        return Err(format!("version and alignment are {facts:?} for ggml"));
    }
    // Without tensors there is no data; ggml then does not pad the header.
    if !theirs.tensors.is_empty() && theirs.data_offset != ours.data_offset {
        return Err(format!("data begin at {} for ggml, at {} for us", theirs.data_offset, ours.data_offset));
    }
    let mut metadata = theirs.metadata;
    for key in ["split.no", "split.count", "split.tensors.count"] {
        metadata.remove(key);
    }
    let (theirs_text, ours_text) = (format!("{metadata:?}"), format!("{:?}", cut(&ours.metadata)));
    if theirs_text != ours_text {
        return Err(format!("metadata are {theirs_text} for ggml, {ours_text} for us"));
    }
    let listed = ours.store.tensors().iter().map(|t| {
        let mut ne = [1; 4];
        ne.iter_mut().zip(t.shape.iter().rev()).for_each(|(to, from)| *to = *from as i64);
        let type_id = t.dtype.ggml_id().unwrap_or(u32::MAX);
        Listed {
            name: t.name.clone().into(),
            ne,
            type_id,
            offset: t.offset - ours.data_offset,
            bytes: t.nbytes,
        }
    });
    let listed: Vec<Listed> = listed.collect();
    if listed != theirs.tensors {
        return Err(format!("tensors are {:?} for ggml, {listed:?} for us", theirs.tensors));
    }
    Ok(Found::Same)
}

/// Why ggml refuses what we read.
fn reason(ours: &Gguf) -> Option<&'static str> {
    if ours.big_endian {
        return Some("the other byte order");
    }
    let is_nested = |v: &Value| matches!(v, Value::Array(Array::Array(_)));
    if ours.metadata.iter().any(|(_, v)| is_nested(v)) {
        return Some("an array of arrays");
    }
    let mut end = ours.data_offset;
    for t in ours.store.tensors() {
        if t.offset != end {
            return Some("another order than that of the infos, or a gap");
        }
        end = (t.offset + t.nbytes).next_multiple_of(ours.alignment.into());
    }
    None
}

/// Texts end where C strings do.
fn cut(metadata: &Metadata) -> Metadata {
    let text = |s: &[u8]| s.split(|b| *b == 0).next().unwrap_or_default().to_vec();
    let value = |v: &Value| match v {
        Value::String(s) => Value::String(text(s)),
        Value::Array(Array::String(list)) => {
            Value::Array(Array::String(list.iter().map(|s| text(s)).collect()))
        }
        other => other.clone(),
    };
    Metadata(metadata.iter().map(|(k, v)| (k.to_string(), value(v))).collect())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn ggml_reads_what_we_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for target in ["gguf", "gguf_model"] {
        seeds
            .extend(files(&root.join("fuzz/corpus").join(target)).iter().map(|path| fs::read(path).unwrap()));
    }
    assert!(seeds.len() > 8);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let (mut same, mut policy, mut refused) = (0, 0, 0);
    let mut check = |what: &str, data: &[u8]| {
        fs::write(&path, data).unwrap();
        match compare(&path) {
            Ok(Found::Refused) => refused += 1,
            Ok(Found::Same) => same += 1,
            Ok(Found::Policy(_)) => policy += 1,
            Err(why) => {
                let kept = std::env::temp_dir().join(format!("qconv-differs-{what}.gguf"));
                fs::write(&kept, data).unwrap();
                panic!("{what}: {why}; it was written to {}", kept.display());
            }
        }
    };
    for (i, seed) in seeds.iter().enumerate() {
        check(&format!("seed-{i}"), seed);
    }
    let mut random = Random(0x0123_4567_89AB_CDEF);
    for i in 0..CHANGED {
        let (seed, other) = (random.below(seeds.len()), random.below(seeds.len()));
        check(&format!("changed-{i}"), &changed(&mut random, &seeds[seed], &seeds[other]));
    }
    if let Some(corpus) = std::env::var_os("QCONV_FUZZ_CORPUS") {
        for file in files(Path::new(&corpus)) {
            check(&file.file_name().unwrap().to_string_lossy(), &fs::read(&file).unwrap());
        }
    }
    println!("{same} the same, {policy} as written, {refused} refused");
    assert!(same > CHANGED / 20 && policy > CHANGED / 200, "too few are read: {same} and {policy}");
}
