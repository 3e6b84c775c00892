//! What would hide from the scanner: files called as parts of sets, types that promise no model, bytes far into padding.

#[path = "common/checkpoint.rs"]
mod checkpoint;
mod common;
#[path = "common/place.rs"]
mod place;
#[path = "common/raw.rs"]
mod raw;
#[path = "common/sound.rs"]
mod sound;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use checkpoint::Made;
use common::{budget, fixture};
use qconv::convert::Silent;
use qconv::verify::scan::{Options, Scan, Severity, scan};
use raw::{Raw, kind};
use serde_json::json;
use sound::{shard, sound, template};

const ESCAPE: &str = "{{ ''.__class__.__mro__ }}";
/// A pickle of the first protocol: `os.system('true')`.
const CALL: &[u8] = b"cos\nsystem\n(S'true'\ntR.";

fn look(dir: &Path) -> Scan {
    scan(&[dir.to_path_buf()], &Options::default(), &budget(), &Silent).unwrap()
}

fn of(files: &[(&str, &[u8])]) -> Scan {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    look(dir.path())
}

fn rules(scan: &Scan) -> BTreeSet<&'static str> {
    scan.findings.iter().map(|f| f.rule.id).collect()
}

#[test]
fn names_of_shards_hide_nothing() {
    let whole = sound().bytes();
    let named = |bytes: &[u8]| of(&[("a-00001-of-00002.gguf", &whole), ("a-00002-of-00002.gguf", bytes)]);
    assert!(rules(&named(&template(ESCAPE))).contains("QV603"));
    assert!(rules(&named(b"garbage")).contains("QV101"));
    let found = of(&[("a-00001-of-00002.pkl", b"N."), ("a-00002-of-00002.pkl", CALL)]);
    assert!(rules(&found).contains("QV701"), "{found:#?}");
    // A set is one model, and told of once, also where it is broken.
    let second = Raw { infos: Vec::new(), data: Vec::new(), ..Raw::empty() };
    let set =
        [("a-00001-of-00002.gguf", shard(0, sound(), 3)), ("a-00002-of-00002.gguf", shard(1, second, 3))];
    let files: Vec<(&str, &[u8])> = set.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    let found = of(&files);
    assert_eq!((found.findings.len(), found.files.len()), (0, 2), "{found:#?}");
    let found = of(&files[..1]);
    assert_eq!((rules(&found), found.findings.len()), (["QV201"].into(), 1), "{found:#?}");
}

#[test]
fn types_that_are_no_models_are_not_believed() {
    // A loader of models takes it all the same.
    let typed = |of_type: &str| {
        let raw = sound().text("general.type", of_type).u32("llama.expert_count", 1 << 30);
        of_gguf(&raw.bytes())
    };
    for of_type in ["imatrix", "moments", "adapter", "model", "anything"] {
        assert!(rules(&typed(of_type)).contains("QV303"), "{of_type}");
    }
    // Nor is a model an importance matrix for a tensor's name.
    let mut raw = sound().u32("llama.expert_count", 1 << 30);
    raw = raw.text("tokenizer.chat_template.other", ESCAPE);
    let infos = std::mem::take(&mut raw.infos);
    raw = raw.info("x.in_sum2", &[1], 0, 256).info("x.counts", &[1], 0, 288);
    raw.infos.extend(infos);
    raw.data.resize(320, 0);
    assert!(rules(&of_gguf(&raw.bytes())).is_superset(&["QV303", "QV603"].into()));
}

fn of_gguf(bytes: &[u8]) -> Scan {
    of(&[("x.gguf", bytes)])
}

/// The sound model with data every `alignment` bytes.
fn aligned(alignment: usize) -> (Raw, [usize; 3]) {
    let mut raw = sound().u32("general.alignment", alignment as u32);
    let places = [0, alignment, 2 * alignment];
    let (old, mut data) = (raw.data.clone(), vec![0; 3 * alignment]);
    for ((from, bytes), to) in [(0, 128), (128, 68), (224, 32)].into_iter().zip(places) {
        data[to..to + bytes].copy_from_slice(&old[from..from + bytes]);
    }
    for (info, place) in raw.infos.iter_mut().zip(places) {
        let at = info.len() - 8;
        info[at..].copy_from_slice(&(place as u64).to_le_bytes());
    }
    (raw.data, raw.alignment) = (data, alignment);
    (raw, places)
}

#[test]
fn padding_is_read_to_its_end() {
    const ALIGNMENT: usize = 1 << 18;
    let (raw, places) = aligned(ALIGNMENT);
    let found = of_gguf(&raw.bytes());
    assert!(found.findings.is_empty(), "{found:#?}");
    let whole = raw.bytes();
    let begin = whole.len() - raw.data.len();
    for (at, bytes, rule) in [
        (begin - 100_000, &b"PK\x03\x04 and more"[..], "QV104"),
        (begin + places[1] - 70_000, b"\x7fELF and more", "QV104"),
        (begin + places[1] - 70_000, b"anything", "QV106"),
        (whole.len() - 10, b"PK\x05\x06", "QV104"),
        // Over the edge of what is read at once.
        (begin + places[0] + 128 + (64 << 10) - 2, b"xPK\x05\x06", "QV104"),
    ] {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(rules(&of_gguf(&damaged)), [rule].into(), "{bytes:?}");
    }
}

#[test]
fn holes_of_later_shards_are_seen() {
    let mut second = Raw::empty().info("x.weight", &[8], 0, 4096);
    second.data = vec![0; 4096 + 32];
    let with = |second: &Raw| {
        let files = [shard(0, sound(), 4), shard(1, second.clone(), 4)];
        of(&[("a-00001-of-00002.gguf", &files[0]), ("a-00002-of-00002.gguf", &files[1])])
    };
    assert_eq!(rules(&with(&second)), ["QV105"].into());
    second.data[2000..2004].copy_from_slice(b"PK\x03\x04");
    assert_eq!(rules(&with(&second)), ["QV104"].into());
}

#[test]
fn ids_behind_one_that_is_none_are_checked() {
    let ids: Vec<u8> = [-1i32, 999_999].iter().flat_map(|id| id.to_le_bytes()).collect();
    let raw = sound().array("tokenizer.ggml.eog_token_ids", kind::I32, 2, ids);
    assert_eq!(rules(&of_gguf(&raw.bytes())), ["QV502"].into());
}

#[test]
fn files_that_no_index_names_are_opened() {
    let read = |name: &str| fs::read(fixture("models/llama").join(name)).unwrap();
    let (config, weights) = (read("config.json"), read("model.safetensors"));
    let mut other = Made::new(json!({})).with("../x", "F32", &[1], [0; 4]).safetensors();
    let files = |other: &[u8]| {
        of(&[("config.json", &config), ("model.safetensors", &weights), ("adapter_model.safetensors", other)])
    };
    let found = files(&other);
    assert_eq!((rules(&found), found.files.len()), (["QV402"].into(), 3), "{found:#?}");
    other.truncate(other.len() - 1);
    let found = files(&other);
    assert_eq!(rules(&found), ["QV101"].into(), "{found:#?}");
    assert!(found.findings[0].file.ends_with("adapter_model.safetensors"));
}

#[test]
fn places_of_what_readers_refuse_are_told() {
    let mut raw = sound();
    raw.infos.swap(0, 1);
    let whole = raw.bytes();
    let key = b"llama.context_length";
    let at = whole.windows(key.len()).position(|w| w == key).unwrap();
    let mut damaged = whole.clone();
    damaged[at + key.len()] = 77; // the type of its value
    let found = of_gguf(&damaged);
    let finding = &found.findings[0];
    assert_eq!(
        (finding.rule.id, finding.offset, finding.key.as_deref()),
        ("QV101", Some((at + key.len()) as u64), Some("llama.context_length"))
    );
    let found = of_gguf(&whole[..whole.len() - 1]);
    let finding = &found.findings[0];
    assert_eq!((finding.rule.id, finding.tensor.as_deref()), ("QV101", Some("output_norm.weight")));
    let info = b"output_norm.weight";
    let at = whole.windows(info.len()).position(|w| w == info).unwrap();
    assert_eq!(finding.offset, Some(at as u64 - 8));
    let bad = Made::new(json!({})).with("x", "F32", &[1], [0; 4]).safetensors();
    let at = bad.windows(3).position(|w| w == b"F32").unwrap();
    let mut bad = bad;
    bad[at - 1] = b'x';
    let found = of(&[("x.safetensors", &bad)]);
    assert_eq!(found.findings[0].offset, Some(at as u64 - 1), "{found:#?}");
}

#[cfg(unix)]
#[test]
fn what_cannot_be_read_ends_no_scan() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("z.gguf"), template(ESCAPE)).unwrap();
    let (closed, shut) = (dir.path().join("a"), dir.path().join("b.gguf"));
    fs::create_dir(&closed).unwrap();
    fs::write(&shut, sound().bytes()).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o0)).unwrap();
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o0)).unwrap();
    let scan = look(dir.path());
    assert_eq!(scan.count(Severity::Error), 1, "{scan:#?}");
    // Root reads everything.
    let is_root = fs::read_dir(&closed).is_ok();
    assert_eq!(scan.unchecked.len(), if is_root { 0 } else { 2 }, "{scan:#?}");
}

/// llama.cpp has an assertion that more experts are there than are used.
#[cfg(feature = "ggml")]
#[test]
fn what_ends_the_engine_is_not_handed_to_it() {
    let place = place::Place::new();
    fs::write(place.path("x.gguf"), sound().u32("llama.expert_used_count", 255).bytes()).unwrap();
    place.refuses(
        &["run", "x.gguf", "-p", "a", "-n", "1"],
        &[
            "x.gguf: would end the program that loads it",
            "llama.expert_used_count",
            "hint: qconv verify --scan",
        ],
    );
}
